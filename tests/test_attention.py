"Attention maps against an independent computation, on blocks of every kind; the two games on maps whose skill is known; bad input."
import json
import pytest, torch
import torch.nn.functional as F
from torch import nn
from tiny import ROOT, images, tiny
from hjepa.analyze import attention as A
from hjepa.config import HJEPAError
from hjepa.data.truth import truth
from hjepa.explore import try_out
from hjepa.foreign import foreign
from hjepa.model import build
from hjepa.parts.attention import Attention

class Instead(A.Taps):
    "Computes with the weights that were read instead of with the kernel."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return self.weights[-1] @ args[2] if func is F.scaled_dot_product_attention else out

def close(a, b, eps=1e-5): assert (a - b).abs().max() < eps, (a - b).abs().max()

@pytest.mark.parametrize('change', [{}, {'encoder.qk_norm': True}, {'encoder.registers': 3}, {'encoder.layer_scale': .1}])
def test_weights_reproduce_the_encoder(change):
    m, x = build(tiny(**change)).eval(), images(4)
    with Instead(): again = m.levels(x)
    for a, b in zip(again, m.levels(x)): close(a, b)
    for w in A.attention(m, x):
        close(w.sum(-1), torch.ones(w.shape[:-1]))
        assert w.shape == (4, 2, 64 + change.get('encoder.registers', 0), 64 + change.get('encoder.registers', 0))

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'eva02_tiny_patch14_224'])
def test_weights_reproduce_timm(name):
    m, x = foreign(f'timm:{name}', size=56 if 'eva' in name else 64, pretrained=False), images(1, 64)
    with Instead() as t: again = m.levels(x)
    for a, b in zip(again, m.levels(x)): close(a, b)
    assert len(t.weights) == len(A.attention(m, x)) == len(m.net.blocks)

def test_against_torch_multihead():
    "PyTorch's own layer returns its weights."
    torch.manual_seed(0); layer, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(3, 7, 16)
    want = layer(x, x, x, average_attn_weights=False)[1]
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    split = lambda t: t.unflatten(-1, (2, 8)).transpose(1, 2)
    close(A.kernel_weights(split(q), split(k)), want, 1e-6)

@pytest.mark.parametrize('kw', [dict(is_causal=True), dict(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(2)), dict(attn_mask=torch.linspace(-2, 2, 36).view(6, 6)), dict(scale=.3), dict(enable_gqa=True)])
def test_every_argument_of_the_kernel(kw):
    g = torch.Generator().manual_seed(0); h = 2 if 'enable_gqa' in kw else 4
    q, k, v = (torch.randn(2, n, 6, 8, generator=g) for n in (4, h, h))
    got = A.kernel_weights(q, k, v, **kw) @ (v.repeat_interleave(2, 1) if h == 2 else v)
    close(got, F.scaled_dot_product_attention(q, k, v, **kw))

def test_cross_attention_and_no_trace():
    layer, x, c = Attention(16, 2, cross=True), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    with A.Taps() as t: layer(x, context=c)
    assert t.weights[0].shape == (2, 2, 3, 5) and not t.weights[0].requires_grad
    layer(x, context=c); assert len(t.weights) == 1                   # outside, nothing is kept

def test_rollout():
    uniform = [torch.full((2, 4, 6, 6), 1/6)] * 5
    R = A.rollout(uniform)
    close(A.received(R, (2, 3)), torch.full((2, 2, 3), 1/6)); close(R.sum(-1), torch.ones(2, 6))
    ws = [torch.rand(2, 3, 6, 6).softmax(-1) for _ in range(3)]
    plain = [.5*w.mean(1) + .5*torch.eye(6) for w in ws]
    close(A.rollout(ws), torch.stack([c @ b @ a for a, b, c in zip(*plain)]))
    close(A.received(ws[0], (1, 5), 'class'), ws[0][..., 0, 1:][..., None, :]); close(A.received(ws[0], (2, 2), 1), ws[0][..., 3, 2:].unflatten(-1, (2, 2)))

def test_pointing():
    t = truth(300, 32, seed=5); masks = t.ids == 1; share = masks.float().mean((1, 2))
    close(A.pointing(masks, masks), torch.ones(300)); close(A.pointing(torch.zeros(300, 8, 8), masks), share)
    every = torch.stack([A.pointing(F.one_hot(torch.full((300,), i), 16).view(-1, 4, 4), masks) for i in range(16)]).mean(0)
    close(every, share)                                                # all cells in turn: exactly the area

def test_deletion():
    "A judge that adds up known worths: the right order is the best of all orders."
    worth = torch.tensor([.4, .1, .3, .2]); fill = torch.zeros(3, dtype=torch.uint8); x = torch.full((6, 3, 8, 8), 255, dtype=torch.uint8)
    def judge(im): p = (F.adaptive_avg_pool2d(im[:, :1].float(), 2).flatten(1) > 0).float() @ worth; return torch.stack([p, torch.zeros_like(p)], 1)
    m = worth.view(1, 2, 2).expand(6, 2, 2)
    close(A.deletion(judge, x, m, fill), torch.tensor([1, .6, .3, .1, 0]).expand(6, 5))
    best = A.area(A.deletion(judge, x, m, fill)); close(A.occlusion(judge, x, (2, 2), fill), m)
    for s in range(5): assert (A.area(A.deletion(judge, x, torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(s)), fill)) >= best - 1e-6).all()
    ties = A.area(torch.cat([A.deletion(judge, x, torch.zeros(6, 2, 2), fill, s) for s in range(100)])).mean()
    assert abs(ties - .5) < .02                                        # a flat map deletes in random order

def test_similarity_and_cells():
    m, x = build(tiny()).eval(), images(5)
    mean = A.mean_tokens(m, x)
    for s, g, c in zip(A.similarity(m, x, (.3, .8), mean), m.grids, A.cells_at(m, torch.tensor([[.3, .8]] * 5))):
        assert s.shape == (5, *g) and s.abs().max() < 1 + 1e-5
        close(s.flatten(1).gather(1, c[:, None]), torch.ones(5, 1))
        if s[0].numel() > 1: assert (A.others(s, c).flatten(1).argmax(1) != c).all()
    p = m.pyramid                                                      # every patch's own middle falls in the cell that the pyramid says
    at = p.centres(0) / torch.tensor(p.grid)
    for l, c in enumerate(A.cells_at(m, at)): assert torch.equal(c, p.parent(l))

def test_interval():
    r = A.interval(torch.randn(400, generator=torch.Generator().manual_seed(0)))
    assert r['lo'] < r['mean'] < r['hi'] and abs(r['hi'] - r['lo'] - 2*1.96/20) < .03
    json.dumps(r); assert A.interval([1.] * 5) == dict(mean=1., lo=1., hi=1.)

def test_explorer():
    m, x = build(tiny()).eval(), images(3)
    e = A.AttentionExplorer(m, build(tiny(seed=1)).eval(), x); assert len(e.buttons) == 64
    try_out(e, e.buttons[0].click, lambda: e.click(9), (e.image, 2), (e.head, 1), (e.block, 'rollout'))
    assert e.head.disabled; e.block.value = 0; assert not e.head.disabled
    at, mean = (.2, .7), e.means['trained']                              # what was computed beforehand is what the image alone gives
    for a, b in zip(A.similarity(m, x[2:], at, mean), A.similarity(m, x[2:], at, mean, [z[2:] for z in e.tokens['trained']])): close(a, b)

def test_bad_input():
    m, x = build(tiny()).eval(), images(2)
    with pytest.raises(HJEPAError, match='choose a transformer'): A.attention(foreign('timm:resnet18', size=64, pretrained=False), x)
    class Windows: # attends in four windows of four
        grids = [(4, 4)]
        def levels(self, im): q = torch.zeros(4*len(im), 1, 4, 8); return [F.scaled_dot_product_attention(q, q, q)]
    with pytest.raises(HJEPAError, match='inside windows'): A.attention(Windows(), x)
    with pytest.raises(HJEPAError, match='no class token'): A.received(torch.zeros(1, 4, 4), (2, 2), 'class')
    with pytest.raises(HJEPAError, match='another number of heads'): A.attentive_head(torch.zeros(4, 2, 10), torch.tensor([0, 1, 0, 1]), heads=4)

def test_results_are_whole():
    r = json.loads((ROOT/'results'/'attention_cifar10_cpu.json').read_text())
    for game, key in (('deletion', 'area'), ('pointing', 'hit')):
        maps = r[game]['maps']
        assert maps['hjepa'].keys() == maps['untrained'].keys() and 'probe' in maps['hjepa']
        assert all(v[key]['lo'] <= v[key]['mean'] <= v[key]['hi'] for d in maps.values() for v in d.values())
    assert not r['dirty'] and '/' not in r['model']
