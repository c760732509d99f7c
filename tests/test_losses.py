"Losses against other people's code and formulas written anew, with gradients; on two processes; and every switch of the loss side, off and on."
import subprocess, sys
from itertools import combinations
import numpy as np, pytest, torch
import torch.nn.functional as F
from scipy.stats import norm
from hjepa.config import HJEPAError, change
from hjepa.data.views import draw_views, make_views
from hjepa.losses.contrast import WHOLE, BarlowTwins, InfoNCE, Mix
from hjepa.losses.prediction import distance, whiten
from hjepa.losses.regularize import SIGReg, VICReg, VISReg, directions
from hjepa.losses.weighting import Weighting
from hjepa.model import build
from hjepa.parts.patch import gather
from hjepa.train import fit
from tiny import Count, ENV, TINY, images, tiny

# ---- whole-image losses: lightly's, value and gradient

def codes(V=2, B=24, K=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, B, K, generator=g) @ torch.randn(K, K, generator=g) * .4 + .3 * torch.randn(V, B, K, generator=g) + .2

def lightly_sigreg(L, z): # one draw of directions for every view, as ours
    total = 0.
    for v in z: torch.manual_seed(7); total = total + L.lejepa_loss.SIGReg(num_vectors=64)(v) / len(z)
    return total

def lightly_visreg(L, z):
    torch.manual_seed(7)
    return L.VISRegLoss(lambda_param=.6, num_slices=64)(local_proj=z[:0], global_proj=z)

THEIRS = dict(vicreg=(VICReg(), lambda L, z: L.VICRegLoss()(*z)), barlow=(BarlowTwins(.02), lambda L, z: L.BarlowTwinsLoss(lambda_param=.02)(*z)),
    infonce=(InfoNCE(.3), lambda L, z: L.NTXentLoss(temperature=.3)(*z)), sigreg=(SIGReg(lam=1., slices=64), lightly_sigreg), visreg=(VISReg(slices=64), lightly_visreg))

def grad_of(f, z):
    z = z.clone().requires_grad_(); out = f(z); out.backward()
    return out.detach(), z.grad

@pytest.mark.parametrize('name', THEIRS)
def test_whole_image_loss_is_lightlys(name):
    L = pytest.importorskip('lightly.loss')
    ours, theirs = THEIRS[name]; z, state = codes(), torch.get_rng_state()
    (a, ga), (b, gb) = grad_of(lambda z: ours(z, 7), z), grad_of(lambda z: theirs(L, z), z)
    torch.set_rng_state(state)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6); torch.testing.assert_close(ga, gb, rtol=1e-3, atol=1e-5 * float(gb.abs().max()))

# ---- and the papers' formulas in numpy, double precision, for three views; the gradient along random directions by central differences

def np_vicreg(z):
    V, n, K = z.shape; total = 25 * np.mean([((a - b)**2).mean() for a, b in combinations(z, 2)])
    for v in z: C = np.cov(v.T); total += 25 / V * np.maximum(0, 1 - np.sqrt(np.diag(C) + 1e-4)).mean() + (C**2).sum() / K - (np.diag(C)**2).sum() / K
    return total

def np_sigreg(z, lam=.3):
    A, t, total = directions(z.shape[2], 16, 3).double().numpy(), np.linspace(0, 3, 17), 0.
    phi = np.exp(-t**2 / 2)
    for v in z:
        tx = (v @ A)[..., None] * t
        total += z.shape[1] * 2 * np.trapezoid(phi * ((np.cos(tx).mean(0) - phi)**2 + np.sin(tx).mean(0)**2), t, axis=-1).mean() / len(z)
    return (1 - lam) * ((z - z.mean(0))**2).mean() + lam * total

def np_visreg(z, sigma=None):
    A, n, total = directions(z.shape[2], 16, 3).double().numpy(), z.shape[1], 0.
    for i, v in enumerate(z):
        std, mean = v.std(0), v.mean(0); held = std if sigma is None else sigma[i]       # the deviation under the shape is a constant
        x = np.sort((v - mean) / (held + 1e-4) @ A, 0)
        total += (((1 - std)**2).mean() + ((x - norm.ppf(np.arange(1, n + 1) / (n + 1))[:, None])**2).mean() + (mean**2).mean()) / len(z)
    return .4 * ((z - z.mean(0))**2).mean() + .6 * total

def np_barlow(z):
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5); out = []
    for a, b in combinations(z, 2): C = a.T @ b / len(a); d = np.diag(C); out.append(((1 - d)**2).sum() + .005 * ((C**2).sum() - (d**2).sum()))
    return np.mean(out)

def np_infonce(z):
    V, n, K = z.shape; q = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(V*n, K); e = np.exp(q @ q.T / .2); total = 0.
    for i in range(V*n):
        for p in range(i % n, V*n, n):
            if p != i: total -= np.log(e[i, p] / (e[i].sum() - e[i, i]))
    return total / (V * n * (V - 1))

FORMULAS = dict(vicreg=(VICReg(), np_vicreg), sigreg=(SIGReg(lam=.3, slices=16), np_sigreg), visreg=(VISReg(slices=16), np_visreg), barlow=(BarlowTwins(), np_barlow), infonce=(InfoNCE(), np_infonce))

@pytest.mark.parametrize('name', FORMULAS)
def test_whole_image_loss_is_the_papers_formula(name):
    ours, f = FORMULAS[name]; z = codes(3, 17, 6); x = z.double().numpy()
    value, grad = grad_of(lambda z: ours(z, 3), z)
    assert float(value) == pytest.approx(f(x), rel=1e-4)
    g = np.random.default_rng(0)
    if name == 'visreg': f = lambda y, s=[v.std(0) for v in x]: np_visreg(y, s)
    for _ in range(4):
        d = g.standard_normal(x.shape); h = 1e-7                        # far below the gaps between sorted codes
        assert (f(x + h*d) - f(x - h*d)) / (2*h) == pytest.approx(float((grad.double().numpy() * d).sum()), rel=2e-3, abs=1e-4)

@pytest.mark.parametrize('name', WHOLE)
def test_collapse_costs_more_and_the_way_out_is_downhill(name):
    torch.manual_seed(0)
    loss, healthy = WHOLE[name](), torch.randn(1, 128, 16) + .1*torch.randn(2, 128, 16)
    same = torch.randn(1, 1, 16).expand(2, 128, 16)
    assert loss(healthy) < .6 * loss(same)
    z = (same + .05*torch.randn(1, 128, 16)).clone().requires_grad_(); start = z.detach().std(1).mean() / z.detach().norm(dim=-1).mean()
    opt = torch.optim.Adam([z], .02)
    for i in range(60): opt.zero_grad(); loss(z, i).backward(); opt.step()
    assert z.std(1).mean() / z.norm(dim=-1).mean() > 2 * start          # codes of different images moved apart, whatever the scale

def test_mix_is_the_sum_and_alone_changes_nothing():
    z = codes()
    assert torch.equal(Mix([VICReg()], [1.])(z), VICReg()(z))
    torch.testing.assert_close(Mix([VICReg(), InfoNCE()], [.5, .1])(z), .5*VICReg()(z) + .1*InfoNCE()(z))

# ---- weights between levels

@pytest.mark.parametrize('scale', [1., 1 / 180])
def test_one_hot_trap(scale): # UW-SO at T=1 on raw losses gives one level everything; as shares of chance it does not
    w = Weighting((1., 1., 1.), 'uw-so'); w(torch.tensor([.8, .9, 1.]).mul(scale).unbind()); w.commit()
    share = w.factors() / 3
    torch.testing.assert_close(share, torch.softmax(1 / (torch.tensor([.8, .9, 1.]) * scale), 0), rtol=1e-4, atol=1e-6)
    assert (share.max() > .999) == (scale < 1) and (share.min() > .25) == (scale == 1)

def test_temperature_evens_and_weights_are_constants():
    l = [torch.tensor(x, requires_grad=True) for x in (.2, .4)]
    def go(**kw): w = Weighting((1., 2.), **kw); w(l); w.commit(); return w
    assert go(kind='uw-so', temperature=100.).factors().sub(1).abs().max() < .02 < go(kind='uw-so').factors().sub(1).abs().max()
    w = go(kind='uw-o'); total = w(l); g = torch.autograd.grad(total, l)
    torch.testing.assert_close(torch.stack(g), torch.tensor([1/.2, 2/.4]) / 3); torch.testing.assert_close(total.detach(), torch.tensor(1.))

# ---- the model: every switch of the loss side

OFF = {'ema': {'optim.ema': 0., 'optim.ema_end': 0.}}
SWITCHES = {**{k: {'whole.kind': k, 'whole.args': {}} for k in WHOLE if k != 'sigreg'}, 'mix': {'whole.kind': {'sigreg': 1., 'infonce': .1}, 'whole.args': {'sigreg': {'lam': .05}}},
    'group': {'levels.depths': (1, (1, 2), 2)}, 'mean': {'levels.depths': (1, (1, 2), 2), 'levels.join': 'mean'}, 'whiten': {'prediction.targets': 'whiten'},
    'visible': {'prediction.visible': .5}, 'next_view': {'prediction.next_view': .5}, 'no-ema': OFF['ema'], 'gradient': {**OFF['ema'], 'prediction.gradient': True},
    **{k: {'levels.weighting': k} for k in ('uw-so', 'uw-o', 'learned', 'gradnorm')}, 'even': {'levels.weighting': 'uw-so', 'levels.temperature': 5.}}

def batch(r, B=16, rows=slice(None)): # what a step gets, or a part of it
    g = torch.Generator().manual_seed(1); draw = draw_views(B, r.views, g); views = make_views(images(B), draw, 32, r.data.mean, r.data.std)
    masks = build(r).draw_masks(2*B, g)[(torch.arange(2)[:, None]*B + torch.arange(B)[rows]).flatten()]
    frames = torch.cat((draw.box, draw.flip[..., None]), -1)[:, rows]
    return (views[:, rows], masks), dict(frames=frames) if r.prediction.next_view else {}

def two_steps(r, rows=slice(None), wrap=lambda m: m): # losses of two steps and the gradient of the second
    m = build(r).train(); net = wrap(m); a, kw = batch(r, rows=rows); seen = []
    for s in range(2):
        m.zero_grad(); out = net(*a, s, **kw); out['loss'].backward(); seen.append({k: float(v.detach()) for k, v in out.items()})
        grad = {k: p.grad.clone() for k, p in m.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in m.parameters():
                if p.grad is not None: p -= .05 * p.grad
        m.after_step(r.optim.ema)
    return seen, grad

@pytest.fixture(scope='module')
def off(): return two_steps(TINY)

@pytest.mark.parametrize('name', SWITCHES)
def test_switch_changes_the_step(off, name):
    seen, grad = two_steps(change(TINY, **SWITCHES[name]))
    assert all(np.isfinite(list(s.values())).all() for s in seen) and all(g.isfinite().all() for g in grad.values())
    assert [n for n, g in grad.items() if g.abs().max() == 0 and not n.endswith('bias')] == []    # what was added is trained
    same = {k for k in grad if k in off[1] and grad[k].shape == off[1][k].shape and torch.equal(grad[k], off[1][k])}
    assert not any(k.startswith('encoder.blocks') for k in same), f'{name} leaves the gradient of the encoder as it was'
    assert seen[1] != off[0][1]

def plain(m, views, masks, step): # the step as it was before there were switches
    V, B = views.shape[:2]; x, total, rows = views.flatten(0, 1), 0., slice(None); ctx = m.encoder(x, masks.context); part = masks[rows]
    with torch.no_grad(): full = [F.layer_norm(m.pyramid.pool(h.float(), l, masks.origins[l]), h.shape[-1:]) for l, h in enumerate(m.target(x[rows], depths=m.depths[:2]))]
    pos, w, losses = lambda l: m.pyramid.centres(l, masks.origins[l], x.device), m.recipe.levels.weights, []
    places = [pos(l)[t] for l, t in enumerate(part.targets)]
    for a, t, i, c in zip(m.predictor(ctx[rows], pos(0)[part.context], places), full, part.targets, m.chance):
        c.observe(t); losses.append(c.relative(distance(a.float(), gather(t, i), c.kind).mean()))
    total = total + m.recipe.prediction.weight * (sum(a * b for a, b in zip(w, losses)) / sum(w))
    whole = m.whole(m.projector(torch.cat([ctx.mean(1)])).unflatten(0, (-1, B)), step)
    return total + m.recipe.whole.weight * whole

def test_off_is_as_before_bit_for_bit_and_costs_nothing():
    (views, masks), _ = batch(TINY); out = []
    for run in (lambda m: plain(m, views, masks, 3), lambda m: m(views, masks, 3)['loss']):
        m = build(TINY).train()
        with Count() as c: loss = run(m); loss.backward()
        out.append((loss.detach(), [p.grad for p in m.parameters() if p.requires_grad], c.n))
    (a, ga, na), (b, gb, nb) = out
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(ga, gb, strict=True))
    assert nb <= na                                                    # not one operation more, forward and backward

# ---- what single switches promise

def test_group_is_made_of_its_blocks():
    one, two = (build(tiny(levels__depths=(d, (1, 2), 2))) for d in (1, 2)); x = torch.randn(3, 3, 32, 32)
    cells = [build(tiny(levels__depths=(d, d, 2))).targets(x)[1] for d in (1, 2)]
    torch.testing.assert_close(one.targets(x)[1], torch.cat(cells, -1)); assert one.chance[1].mean.shape == (16, 32)
    mean = build(tiny(levels__depths=(1, (1, 2), 2), levels__join='mean'))
    torch.testing.assert_close(mean.targets(x)[1], sum(cells) / 2)
    assert [t.shape[-1] for t in one.levels(images(2))] == [16, 32, 16] and [t.shape[-1] for t in mean.levels(images(2))] == [16]*3
    assert [t.shape[-1] for t in one.levels(images(2), pooled=True)] == [16]*3

def test_whitened_targets_train_and_features_stay():
    a, b = build(TINY), build(tiny(prediction__targets='whiten')); x = images(16)
    assert all(torch.equal(s, t) for s, t in zip(a.levels(x), b.levels(x)))
    t = whiten(torch.randn(64, 8, 6) @ torch.randn(6, 6) + 2).flatten(0, 1)
    torch.testing.assert_close(t.T @ t / len(t), torch.eye(6), atol=.02, rtol=0)

def test_zero_momentum_is_the_online_encoder(tmp_path):
    run = fit(tiny(**{'optim.ema': 0., 'optim.ema_end': 0.}), data=images(), out=tmp_path)
    for a, b in zip(run.model.encoder.parameters(), run.model.target.parameters()): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

def test_gradient_reaches_the_targets_only_when_asked():
    x = torch.randn(2, 3, 32, 32)
    def leads(**kw): m = build(tiny(**kw)).train(); return m.targets(x, train=True)[0].requires_grad, m.targets(x)[0].requires_grad, m
    ema = {'optim.ema': 0., 'optim.ema_end': 0.}
    assert leads()[:2] == (False, False) == leads(**ema)[:2] and leads(**ema, prediction__gradient=True)[:2] == (True, False)
    (views, masks), _ = batch(TINY); values = [float(build(tiny(**ema, prediction__gradient=g)).train()(views, masks)['loss'].detach()) for g in (False, True)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)              # the same loss at the start, another gradient (test above)

def test_visible_counts_every_seen_patch_by_its_nearness():
    m = build(tiny(prediction__visible=.5)).train(); (views, masks), _ = batch(m.recipe); got = []
    m.predictor.register_forward_hook(lambda mod, a, o: got.append(list(o)))
    out = m(views, masks); again = got[0][0][:, masks.targets[0].shape[1]:]
    t = gather(m.targets(views.flatten(0, 1), masks.origins)[0], masks.context)
    total = 0.
    for b in range(len(again)):
        seen, places = masks.context[b].tolist(), [divmod(i, 8) for i in range(64)]; hidden = [places[i] for i in range(64) if i not in seen]
        for k, i in enumerate(seen):
            near = min(((places[i][0] - y)**2 + (places[i][1] - x)**2)**.5 for y, x in hidden)
            total += F.smooth_l1_loss(again[b, k], t[b, k]).item() / near**.5
    assert out['visible'].item() == pytest.approx(total / masks.context.numel() / float(m.chance[0].level), rel=1e-4)
    rest = out['level_0'] / 2 + out['level_1'] / 2 + .5 * out['visible'] + out['whole']
    torch.testing.assert_close(out['loss'].detach(), rest)

def test_visible_warms_up():
    for step, share in ((0, .25), (1, .5), (3, 1.), (9, 1.)):
        m = build(tiny(prediction__visible=.5, prediction__visible_warmup=4)).train(); (views, masks), _ = batch(m.recipe); out = m(views, masks, step)
        torch.testing.assert_close(out['loss'].detach(), out['level_0'] / 2 + out['level_1'] / 2 + .5 * share * out['visible'] + out['whole'])

def test_next_view_of_equal_views_asks_the_same_cells(): # the next view is this view: same places, same targets, all in sight
    m = build(tiny(prediction__next_view=1., views__count=2)).train(); (views, masks), kw = batch(m.recipe)
    B = len(views[0]); twice, mm = views[:1].expand(2, -1, -1, -1, -1), masks[torch.arange(B).repeat(2)]
    out = m(twice, mm, frames=kw['frames'][:1].expand(2, -1, -1))
    torch.testing.assert_close(out['next_view'], (out['level_0'] + out['level_1']) / 2, rtol=1e-4, atol=1e-5)
    far = torch.tensor([[5., 5, .1, .1, 1], [-5, -5, .1, .1, 1]])[:, None].expand(2, B, 5)
    assert m(views, masks, frames=far)['next_view'] == 0                   # nothing in sight, nothing asked
    with pytest.raises(HJEPAError, match='where the views lie'): m(views, masks)

def test_fit_runs_with_everything_on(tmp_path):
    r = tiny(**SWITCHES['mix'], **SWITCHES['group'], **SWITCHES['visible'], **SWITCHES['next_view'], **SWITCHES['gradnorm'], prediction__targets='whiten', views__local=2, train__accumulate=2)
    run = fit(r, data=images(), out=tmp_path); row = run.history[-1]
    assert {'visible', 'next_view', 'weight_0', 'weight_1', 'whole'} <= row.keys() and run.history[0]['weight_0'] == 1 != row['weight_0']

# ---- refused

BAD = {'gradient': (dict(prediction__gradient=True), 'optim.ema=0'), 'constant': (dict(prediction__gradient=True, whole__kind='none', whole__args={}, **OFF['ema']), 'constant targets'),
    **{k: ({**kw, 'prediction.weight': 0.}, f'prediction.{k} is on') for k, kw in dict(visible=SWITCHES['visible'], next_view=SWITCHES['next_view'], targets=SWITCHES['whiten']).items()},
    'one view': ({**SWITCHES['next_view'], 'views.count': 1, 'whole.kind': 'none', 'whole.args': {}}, 'another view'), 'join': (dict(levels__join='mean'), 'nothing to join'), 'warmup': (dict(prediction__visible_warmup=5), 'prediction.visible is 0'),
    'order': (dict(levels__depths=(1, (2, 1), 2)), 'rising'), 'empty': (dict(levels__depths=(1, (), 2)), 'empty'), 'deep': (dict(levels__depths=(1, (1, 3), 2)), 'outside'),
    'mix none': (dict(whole__kind={'none': 1.}, whole__args={}), 'above 0'), 'mix zero': (dict(whole__kind={'sigreg': 0.}, whole__args={}), 'above 0'), 'mix empty': (dict(whole__kind={}, whole__args={}), 'above 0'),
    'temperature': (dict(levels__temperature=2.), 'only by'), 'one level': (dict(levels__weighting='uw-so', levels__weights=(1., 0.)), 'needs two'),
    'no question': (dict(levels__weighting='uw-o', masks__hidden=(8, 0)), 'a question at every level'),
    'zero temperature': (dict(levels__weighting='uw-so', levels__temperature=0.), 'levels.temperature')}

@pytest.mark.parametrize('kw,words', BAD.values(), ids=BAD)
def test_senseless_is_refused_in_a_sentence(kw, words):
    with pytest.raises(HJEPAError, match=words) as e: tiny(**kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400

@pytest.mark.parametrize('kind,args,words', [({'sigreg': 1., 'infonse': .1}, {}, "Did you mean 'infonce'"), ({'sigreg': 1.}, {'lam': .1}, 'by name'), ({'sigreg': 1.}, {'vicreg': {}}, 'by name'),
    ({'sigreg': 1.}, {'sigreg': {'lamb': .1}}, "Did you mean 'lam'"), ('infonce', {'temperature': 0}, 'above 0')])
def test_bad_whole_is_refused_when_built(kind, args, words):
    with pytest.raises(HJEPAError, match=words): build(tiny(whole__kind=kind, whole__args=args))

# ---- two processes

WORKER = '''
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tiny import TINY
from hjepa.config import change
from hjepa.losses.contrast import WHOLE
from MODULE import SWITCHES, codes, grad_of, two_steps
dist.init_process_group('gloo'); rank, out = dist.get_rank(), {}
half = slice(8 * rank, 8 * rank + 8)
for k, f in WHOLE.items(): out[f'loss {k}'] = grad_of(lambda z: f()(z, 5), codes(2, 16)[:, half])
for k, kw in SWITCHES.items(): out[k] = two_steps(change(TINY, **kw), half, lambda m: DDP(m, broadcast_buffers=False))
torch.save(out, f'{sys.argv[1]}/{rank}.pt'); dist.barrier()
'''

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    d = tmp_path_factory.mktemp('two'); (d / 'worker.py').write_text(WORKER.replace('MODULE', __name__))
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(d / 'worker.py'), str(d)], env=ENV, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-4000:]
    return [torch.load(d / f'{i}.pt') for i in range(2)]

@pytest.mark.parametrize('name', WHOLE)
def test_two_processes_have_the_loss_and_gradient_of_one(two, name): # DDP will divide by the number of processes
    value, grad = grad_of(lambda z: WHOLE[name]()(z, 5), codes(2, 16)); (a, ga), (b, gb) = (t[f'loss {name}'] for t in two)
    torch.testing.assert_close((a + b) / 2, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat((ga, gb), 1) / 2, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))

@pytest.mark.parametrize('name', SWITCHES)
def test_two_processes_take_the_step_of_one(two, name):
    (s, grad), ((s0, g0), (s1, g1)) = two_steps(change(TINY, **SWITCHES[name])), (t[name] for t in two)
    for i in range(2):
        for k in s[i]: assert (s0[i][k] + s1[i][k]) / 2 == pytest.approx(s[i][k], rel=2e-4, abs=1e-6), (i, k)
    cat = lambda g: torch.cat([g[k].flatten() for k in grad])
    assert torch.equal(cat(g0), cat(g1)) and (cat(g0) - cat(grad)).norm() < 2e-3 * cat(grad).norm()
