"Our parts against timm's, on the same weights."
from functools import partial
import pytest, torch
from torch import nn
from timm.layers import PatchEmbed as TimmPatch
from timm.models.vision_transformer import Block as TimmBlock, VisionTransformer
import hjepa.parts.encoder as enc
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
