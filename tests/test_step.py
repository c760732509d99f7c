"The benchmark of the step: MAE's step around a checkout, here a small one written for the test; where the time goes; numbers of tokens."
import json
import pytest, torch
from hjepa.bench import Peer, Step, bench_recipe, bench_step, product_rate
from hjepa.cli import main
from hjepa.config import HJEPAError
from tiny import tiny

MODEL = """
import numpy as np, torch
from timm.models.vision_transformer import Block, PatchEmbed
class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth, decoder_num_heads, norm_layer, norm_pix_loss):
        super().__init__()
        assert norm_pix_loss and np.arange(3, dtype=np.float).dtype == float
        many = lambda d, n, h: torch.nn.ModuleList(Block(d, h, 4., qkv_bias=True, qk_scale=None, norm_layer=norm_layer) for _ in range(n))
        self.patch_embed, self.blocks, self.norm = PatchEmbed(img_size, patch_size, 3, embed_dim), many(embed_dim, depth, num_heads), norm_layer(embed_dim)
        self.inp, self.decoder = torch.nn.Linear(embed_dim, decoder_embed_dim), many(decoder_embed_dim, decoder_depth, decoder_num_heads)
        print('noise on stdout')
    def forward(self, x, mask_ratio):
        x = self.patch_embed(x); x = x[:, :int(x.shape[1] * (1 - mask_ratio))]
        for b in self.blocks: x = b(x)
        x = self.inp(self.norm(x))
        for b in self.decoder: x = b(x)
        return x.pow(2).mean(), None, None
"""
MISC = """
from torch._six import inf
class NativeScalerWithGradNormCount:
    def __call__(self, loss, optimizer, parameters): loss.backward(); assert inf > 0 and list(parameters); optimizer.step()
"""

@pytest.fixture
def mae(tmp_path):
    (tmp_path/'util').mkdir()
    for f, s in {'models_mae.py': MODEL, 'util/__init__.py': '', 'util/misc.py': MISC, 'util/lr_sched.py': "def adjust_learning_rate(opt, epoch, args): opt.param_groups[0]['lr'] = args.lr * epoch / args.warmup_epochs\n"}.items(): (tmp_path/f).write_text(s)
    return f'mae={tmp_path}'

def test_mae_in_turn_with_ours(mae, tmp_path, capsys):
    assert main(['bench', 'step', '--image', '64', '--batch', '2', '--predictor', '48x1', '--peer', mae, '--decoder', '48x2', '--match', '--device', 'cpu', '--json', str(tmp_path/'s.json')]) == 0
    d = json.loads((tmp_path/'s.json').read_text()); p, o = d['peer'], d['ours']
    assert p['name'] == 'facebookresearch/mae' and d['decoder'] == '48x2' and d['ratio'] > 0 and len(p['rounds']) == 3
    assert p['tokens'] == dict(context=5, target=0, predictor=17, predicted=12) and o['tokens']['context'] == 4 and o['tokens']['predicted'] == 12
    assert p['params']['trained'] - p['params']['encoder'] == 192 * 48 + 48 + 2 * (12 * 48**2 + 13 * 48) and p['flops_per_image'] > 0 and p['peak_bytes'] > 0
    assert all(0 < d[k]['share_of_product_rate'] < 1 for k in ('ours', 'peer'))

def test_a_peer_that_is_none(mae, tmp_path):
    r = bench_recipe('vit_tiny', 64, 16, 2, '48x1')
    for peer, words in ((f'mae={tmp_path}/util', 'no checkout of facebookresearch/mae'), (mae.replace('mae=', 'ijepa='), 'no checkout of facebookresearch/ijepa'), (mae.replace('mae=', 'mea='), "Did you mean 'mae'")):
        with pytest.raises(HJEPAError, match=words): Peer(peer, r, 'cpu', 'fp32')
    with pytest.raises(HJEPAError, match='decoder .big. is not WIDTHxDEPTH'): bench_step(r, 'cpu', peer=mae, decoder='big')
    (tmp_path/'models_mae.py').write_text('raise RuntimeError("spoilt")')
    with pytest.raises(HJEPAError, match='spoilt'): Peer(mae, r, 'cpu', 'fp32')

def test_stages_add_up_and_change_nothing():
    a, b = Step(tiny()), Step(tiny())
    for s in (a, b): s()
    spent = a.stages(2); b(); b(); b()                                              # one more, before the clocks count
    assert {'masks', 'target', 'context', 'predictor', 'losses', 'backward', 'clip', 'optimizer', 'EMA'} < spent.keys() and min(spent.values()) >= 0
    assert a.n == b.n == 4 and all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert not {'targets', 'look'} & vars(a.model).keys() and not {'pieces', 'loss', 'move'} & vars(a).keys() and 'forward' not in vars(a.model.predictor)
    alone = Step(tiny(**{'prediction.weight': 0.}))
    assert 'predictor' not in alone.stages(1)

def test_the_rate_of_products_is_that_of_this_machine(): assert 1e8 < product_rate('cpu') < 1e14
