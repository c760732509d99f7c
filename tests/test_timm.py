"Our parts against timm's, on the same weights; whole networks there and back."
from functools import partial
import pytest, timm, torch
from safetensors.torch import save_file
from torch import nn
from timm.layers import PatchEmbed as TimmPatch
from timm.models.vision_transformer import Block as TimmBlock, VisionTransformer
import hjepa.parts.encoder as enc
from hjepa.config import HJEPAError
from hjepa.foreign import encoder_fields, from_timm, start_from, to_timm
from hjepa.model import load
from hjepa.parts.attention import Block
from hjepa.parts.encoder import Encoder
from hjepa.parts.patch import PatchEmbed

NORM = partial(nn.LayerNorm, eps=1e-6)
NAMES = {'gain1': 'ls1.gamma', 'gain2': 'ls2.gamma', 'mlp.0.weight': 'mlp.fc1.weight', 'mlp.0.bias': 'mlp.fc1.bias',
         'mlp.2.weight': 'mlp.fc2.weight', 'mlp.2.bias': 'mlp.fc2.bias'}

def shake(m): # weights that no layer could mistake for its own fresh ones
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn_like(p) * .3)
    return m.eval()

def copy_patch(ours, theirs): # (D,C,p,p) kernel -> (D,C*p*p)
    with torch.no_grad(): ours.proj.weight.copy_(theirs.proj.weight.flatten(1)); ours.proj.bias.copy_(theirs.proj.bias)

def copy_block(ours, theirs):
    t = theirs.state_dict()
    ours.load_state_dict({k: t.pop(NAMES.get(k, k)) for k in ours.state_dict()})
    assert not t                                  # nothing of theirs is left over

def test_patch_embed():
    torch.manual_seed(0)
    theirs, ours = shake(TimmPatch(24, 4, 3, 20)), PatchEmbed(4, 20).eval()
    copy_patch(ours, theirs)
    x = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    keep = torch.tensor([[35, 0, 7], [1, 2, 34]])
    torch.testing.assert_close(ours(x, keep), torch.stack([t[k] for t, k in zip(theirs(x), keep)]), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('gain', [None, .1])
def test_block(gain):
    torch.manual_seed(1)
    theirs = shake(TimmBlock(24, 3, qkv_bias=True, init_values=gain, norm_layer=NORM))
    ours = Block(24, 3, layer_scale=gain).eval(); copy_block(ours, theirs)
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('gain,registers', [(None, 0), (.1, 2)])
def test_encoder_without_positions(monkeypatch, gain, registers):
    torch.manual_seed(2)
    theirs = shake(VisionTransformer(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0, class_token=False, pos_embed='none',
                                     global_pool='', reg_tokens=registers, init_values=gain, norm_layer=NORM, fc_norm=False))
    ours = Encoder(24, 4, 24, 3, 3, registers=registers, layer_scale=gain).eval()
    copy_patch(ours.embed, theirs.patch_embed)
    for a, b in zip(ours.blocks, theirs.blocks, strict=True): copy_block(a, b)
    ours.norm.load_state_dict(theirs.norm.state_dict())
    if registers: ours.registers.data.copy_(theirs.reg_token)
    x = torch.randn(2, 3, 24, 24)
    assert (ours(x) - theirs.forward_features(x)[:, registers:]).abs().max() > .01     # positions do matter
    monkeypatch.setattr(enc, 'centres', lambda *a, f=enc.centres, **k: f(*a, **k) * 0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.forward_features(x)[:, registers:], atol=1e-4, rtol=1e-4)
        hidden = theirs.forward_intermediates(x, indices=[0, 1], norm=False, output_fmt='NLC', intermediates_only=True)
        for a, b in zip(ours(x, depths=(1, 2)), hidden, strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

# ---- whole networks: each has something that the others lack
ZOO = {'vit_base_patch16_224': 'class token, positions of its own', 'vit_small_patch14_reg4_dinov2': 'registers, LayerScale', 'vit_giant_patch14_dinov2': 'SwiGLU',
    'vit_huge_patch14_gap_224': 'I-JEPA: no class token', 'vit_base_patch16_clip_224': 'norm before the blocks, no bias there, another epsilon', 'vit_base_patch32_clip_quickgelu_224': 'QuickGELU',
    'vit_base_patch16_siglip_224': 'GELU by tanh, pooling by attention', 'vit_betwixt_patch16_gap_256': 'no bias of queries, keys, values',
    'vit_little_patch16_reg4_gap_256': 'no norm after the last block', 'vit_intern300m_patch14_448': 'nor anywhere later',
    'vit_so150m_patch16_reg4_gap_256': 'an odd width of the MLP'}

def shrunk(name, grid=4): # the architecture as timm makes it, two blocks deep and 48 wide, with no weight at its fresh value
    p = next(int(p) for p in ('14', '32', '16') if f'patch{p}' in name)
    torch.manual_seed(0); net = timm.create_model(name, img_size=grid * p, depth=2, embed_dim=48, num_heads=3)
    with torch.no_grad(): [q.add_(torch.randn_like(q) * .1) for q in net.parameters()]
    return net.eval(), torch.randn(2, 3, grid * p, grid * p)

def patches(net, x): return net.forward_features(x)[:, net.num_prefix_tokens:]

@pytest.mark.parametrize('name', ZOO)
@torch.no_grad()
def test_networks_go_in_and_out(name, tmp_path):
    net, x = shrunk(name)
    ours, want = from_timm(net), patches(net, x)
    torch.testing.assert_close(ours(x), want, atol=1e-4, rtol=0)
    first = net.forward_intermediates(x, indices=[0], norm=False, output_fmt='NLC', intermediates_only=True)[0]
    torch.testing.assert_close(ours(x, depths=(1,))[0], first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches(to_timm(ours), x), want, atol=1e-4, rtol=0)
    save_file({k: v.contiguous() for k, v in to_timm(ours, shrunk(name)[0]).state_dict().items()}, tmp_path/'w.safetensors')
    back = timm.create_model(name, img_size=x.shape[-1], depth=2, embed_dim=48, num_heads=3, checkpoint_path=str(tmp_path/'w.safetensors')).eval()
    torch.testing.assert_close(patches(back, x), want, atol=1e-4, rtol=0)

@torch.no_grad()
def test_positions_stretch_as_timm_stretches_them():
    net, _ = shrunk('vit_small_patch14_reg4_dinov2'); ours = from_timm(net); x = torch.randn(1, 3, 84, 84)
    net.set_input_size(84); torch.testing.assert_close(ours(x), patches(net, x), atol=1e-4, rtol=0)

@pytest.mark.parametrize('name,why', [('vit_dwee_patch16_reg1_gap_256', 'one after the other'), ('vit_pwee_patch16_reg1_gap_256', 'one after the other'), ('vit_small_patch16_rope_224', 'a Eva'),
    ('vit_relpos_small_patch16_224', 'RelPos'), ('vit_small_r26_s32_224', 'more than one map')])
def test_what_does_not_fit_is_named(name, why):
    kw = {} if 'r26' in name else dict(embed_dim=48, num_heads=3)
    net = timm.create_model(name, depth=1, **kw)
    with pytest.raises(HJEPAError, match=why): from_timm(net)

@pytest.mark.parametrize('kw', [dict(), dict(registers=2, layer_scale=.5), dict(positions='mixed'), dict(positions='sincos', registers=1, act='swiglu'), dict(positions='learned', qk_norm=True),
    dict(positions='none', act='gelu_tanh', final_norm=False), dict(positions='learned', pre_norm=True, eps=1e-4), dict(pre_norm=True, qk_norm=True), dict(positions='sincos', pre_norm=True, act='quick_gelu')], ids=str)
@torch.no_grad()
def test_our_encoders_go_out(kw):
    torch.manual_seed(0); ours = Encoder(24, 4, 48, 2, 3, **kw).eval()
    for q in ours.parameters(): q.add_(torch.randn_like(q) * .1)
    x, net = torch.randn(2, 3, 24, 24), to_timm(ours)
    torch.testing.assert_close(patches(net, x), ours(x), atol=1e-4, rtol=0)
    if type(net) is VisionTransformer: torch.testing.assert_close(from_timm(net)(x), ours(x), atol=1e-4, rtol=0)

@pytest.mark.parametrize('kw,why', [(dict(stem='conv'), 'convolutional stem'), (dict(windows=1, window=2), 'windowed'), (dict(act='swiglu'), 'rotary positions with swiglu'), (dict(positions='mixed', registers=1), 'with registers')])
def test_what_timm_lacks_is_named(kw, why):
    with pytest.raises(HJEPAError, match=why): to_timm(Encoder(16, 4, 48, 2, 3, **kw))

def test_a_network_of_another_kind_is_not_filled_in():
    ours = from_timm(shrunk('vit_base_patch32_clip_quickgelu_224')[0])
    with pytest.raises(HJEPAError, match='act quick_gelu against gelu'): to_timm(ours, shrunk('vit_base_patch16_clip_224')[0])
    with pytest.raises(HJEPAError, match='rotary positions'): to_timm(Encoder(16, 4, 48, 2, 3), shrunk('vit_base_patch16_224')[0])

def test_training_starts_from_it_and_the_file_holds_it(tmp_path):
    net, x = shrunk('vit_base_patch16_clip_224', 8)
    r = dict(levels=dict(cells=(1, 2), depths=(1, 2, 2), weights=(1., 1.)), masks=dict(hidden=(4, 3)))
    m = start_from(r, net)
    assert m.recipe.encoder.model_dump().items() >= encoder_fields(net).items() and m.recipe.data.mean == tuple(net.pretrained_cfg['mean'])
    m.save(tmp_path/'m.safetensors'); again = load(tmp_path/'m.safetensors')
    with torch.no_grad():
        for part in (again.encoder, again.target): torch.testing.assert_close(part(x), patches(net, x), atol=1e-4, rtol=0)
