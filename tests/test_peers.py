"The peers: against other people's code and formulas written anew; each trains, goes on after a kill, runs on two processes, is judged; and labels reach one loss alone."
import subprocess, sys
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from hjepa.config import PEERS, HJEPAError, change, peer, recipe
from hjepa.data.sets import ImageSet
from hjepa.data.scenes import scenes
from hjepa.evaluate.suite import evaluate
from hjepa.losses.regularize import directions, epps_pulley
from hjepa.model import build, load, load_pretrained, ship
from hjepa.parts.patch import gather, patchify, unpatchify
from hjepa.parts.pyramid import Pyramid
from hjepa.peers import DINO, Supervised, pixels
from hjepa.train import Trainer, fit
from tiny import ENV, TINY, images, losses, same, weights

Y = torch.arange(32) % 4
DATA = ImageSet('t', 'train', images(), Y, tuple('abcd'), 'made for a test')
def small(name, **kw): return peer(name, TINY, **{'views.local_size': 16, 'whole.dim': 8, **({'whole.args': dict(prototypes=16)} if name == 'dino' else {}), **kw})
def go(name, out, data=DATA, **kw): return fit(small(name, **{'train.steps': 20, **kw}), data=data, out=out)

def batch(r, B=6, seed=1): # what the model's forward takes
    g = torch.Generator().manual_seed(seed); S, s = r.data.image, r.views.local_size
    masks = build(r).draw_masks(r.views.count * B, g)
    return torch.randn(r.views.count, B, 3, S, S, generator=g), masks, 3, torch.randn(r.views.local, B, 3, s, s, generator=g) if r.views.local else None, None, torch.arange(B) % 4

# ---- each reproduces its original

def test_ijepa_and_bootleg_losses_by_hand():
    for name, blocks in (('ijepa', (2,)), ('bootleg', (1, 2))):
        r = small(name); m = build(r).train(); x, k, *rest = batch(r); x0 = x[0]; got = m(x, k, *rest)['loss']
        assert k.context.shape == (6, 36) and k.targets[0].shape == (6, 28)          # 28 = 44 % of 64
        with torch.no_grad(): full = torch.cat([F.layer_norm(t, t.shape[-1:]) for t in m.encoder(x0, depths=blocks)], -1)    # the slow copy has not moved
        pos = m.pyramid.centres(0); a = m.predictor(m.encoder(x0, k.context), pos[k.context], [pos[k.targets[0]]])[0]
        chance = F.smooth_l1_loss(full.mean(0).expand_as(full), full)
        torch.testing.assert_close(got, F.smooth_l1_loss(a, gather(full, k.targets[0])) / chance)
        m.target.requires_grad_(True); got = m(x, k, *rest)['loss']; got.backward()
        assert all(p.grad is None for p in m.target.parameters()) and m.predictor.heads_out[0].out_features == 16 * len(blocks)

def test_ijepa_hides_rectangles_of_drawn_shape_and_as_many_patches_everywhere():
    m = build(peer('ijepa', 'cifar10')).draw_masks(256, torch.Generator().manual_seed(0)); hit = torch.zeros(64)
    for c, t in zip(m.context, m.targets[0]): assert sorted([*c.tolist(), *t.tolist()]) == list(range(64)); hit[t] += 1
    assert m.targets[0].shape == (256, 28) and hit.min() > 0 and hit[56:].sum() > 0 and hit[7::8].sum() > 0     # the last row and column too, which the original never asks

def test_cjepa_is_the_published_sum_up_to_a_factor():
    r = small('cjepa'); m = build(r).train(); out = m(*batch(r)); part = {k: v.item() for k, v in out.items()}
    assert .38 * part['loss'] == pytest.approx(.38 * part['level_0'] + .001 * part['whole'], rel=1e-5)
    x, k = batch(r)[:2]; z = m.projector(m.look(x.flatten(0, 1), k)[1]).unflatten(0, (2, 6)).detach()
    d = z - z.mean(1, keepdim=True); C = d.transpose(1, 2) @ d / 5; var = C.diagonal(dim1=1, dim2=2)
    want = 25 * F.mse_loss(z[0], z[1]) + 25 * sum(F.relu(1 - (v + 1e-4).sqrt()).mean() for v in var) / 2 + sum((c.square().sum() - c.diagonal().square().sum()) / 8 for c in C)
    assert part['whole'] == pytest.approx(float(want), rel=1e-4)

def test_lejepa_is_the_minimal_sum_over_eight_views():
    r = small('lejepa'); m = build(r).train(); b = batch(r); got = m(*b)['loss']
    z = m.projector(torch.cat([m.look(v)[1] for v in (*b[0], *b[3])])).unflatten(0, (8, -1)); A = directions(8, 256, 3)
    want = .95 * (z.mean(0) - z).square().mean() + .05 * torch.stack([epps_pulley(v @ A).mean() for v in z]).mean()
    torch.testing.assert_close(got, want)

def test_vicreg_is_lightlys_on_whole_views():
    L = pytest.importorskip('lightly.loss')
    r = small('vicreg'); m = build(r).train(); b = batch(r); assert b[1].context.shape == (12, 64)      # nothing is hidden
    z = m.projector(m.encoder(b[0].flatten(0, 1)).mean(1)).unflatten(0, (2, 6))
    (m(*b)['loss'] - L.VICRegLoss()(*z)).backward()                                                      # the same loss, and the same gradient of every weight
    torch.testing.assert_close(m(*b)['loss'], L.VICRegLoss()(*z), rtol=1e-4, atol=1e-5)
    assert all(p.grad.abs().max() < 1e-3 for p in m.parameters() if p.requires_grad) and not hasattr(m, 'predictor')

def test_mae_targets_are_lightlys_and_loss_is_the_papers():
    U = pytest.importorskip('lightly.models.utils')
    r = small('mae'); m = build(r).train(); x, k, *rest = batch(r)
    ours, theirs = m.targets(x[0], train=True)[0], U.normalize_mean_var(U.patchify(x[0], 4))
    torch.testing.assert_close(ours, theirs.unflatten(2, (16, 3)).transpose(2, 3).flatten(2))          # they put the colours last
    raw = m(x, k, *rest)['level_0'] * m.chance[0].level; pos = m.pyramid.centres(0)
    a = m.predictor(m.encoder(x[0], k.context), pos[k.context], [pos[k.targets[0]]])[0]
    hidden = torch.ones(6, 64).scatter(1, k.context, 0); assert hidden.sum(1).eq(48).all()
    full = torch.zeros(6, 64, 48).scatter(1, k.targets[0][..., None].expand_as(a), a)
    torch.testing.assert_close(raw, (((full - ours)**2).mean(-1) * hidden).sum() / hidden.sum())

def test_pixels_of_coarse_cells_on_an_odd_grid_follow_the_origin():
    x = torch.rand(2, 3, 28, 28); P = Pyramid((7, 7), (1, 2, 4)); o = P.origins(torch.Generator().manual_seed(0)); assert o[1] != (0, 0)
    got = pixels(x, P, o, 4); assert [t.shape for t in got] == [(2, n, 48) for n in (49, 9, 1)]
    y, x0 = o[1]; cell = x[:, :, 4*(y+2):4*(y+4), 4*(x0+4):4*(x0+6)].unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)).flatten(1)   # row 1, column 2
    torch.testing.assert_close(got[1][:, 5], (cell - cell.mean(1, keepdim=True)) / (cell.var(1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(unpatchify(patchify(x, 4), 4, 7), x)

def test_a_hierarchy_of_pixels_trains_with_large_patches_too(tmp_path):
    kw = {'prediction.targets': 'hjepa.peers.pixels', 'encoder.patches': (4, 8), 'train.steps': 4}
    run = fit(change(TINY, **kw), data=images(), out=tmp_path); m = run.model
    assert {'level_0', 'level_1'} <= set().union(*run.history) and [c.mean.shape[1] for c in m.chance] == [48, 48]
    assert m.targets(torch.rand(1, 3, 32, 32), train=True, unit=1)[0] is None and m.levels(images(2))[0].shape == (2, 64, 16)

def test_dino_is_lightlys_with_gradient_and_centre():
    L = pytest.importorskip('lightly.loss')
    d, their, g = DINO(6, 20).train(), L.DINOLoss(20, teacher_temp=.04, student_temp=.1), torch.Generator().manual_seed(0)
    for _ in range(3):
        z, slow = torch.randn(5, 7, 6, generator=g, requires_grad=True), torch.randn(2, 7, 6, generator=g)
        with torch.no_grad(): d.weight.add_(.1 * torch.randn(20, 6, generator=g))
        f = lambda a, w: F.normalize(a, dim=-1) @ F.normalize(w, dim=-1).T
        a = d(z, 0, slow); b = their([*f(slow, d.slow_weight)], [*f(z, d.weight)]); torch.testing.assert_close(a, b)
        for p, q in zip(torch.autograd.grad(a, (z, d.weight)), torch.autograd.grad(b, (z, d.weight))): torch.testing.assert_close(p, q)
        before = d.slow_weight.clone(); d.after_step(.9)
        torch.testing.assert_close(d.slow_weight, .9 * before + .1 * d.weight.detach()); torch.testing.assert_close(d.centre, their.center[0, 0])

def test_dino_asks_the_slow_network_about_whole_large_views(tmp_path):
    run = go('dino', tmp_path, **{'optim.ema': .5, 'optim.ema_end': .5}); m, r = run.model.train(), run.recipe; b = batch(r)
    assert not same(m.projector_slow.state_dict(), m.projector.state_dict()) and m.whole.centre.abs().sum() > 0
    with torch.no_grad():
        slow = torch.stack([m.projector_slow(v) for v in m.target(b[0].flatten(0, 1)).mean(1)[None]]).view(2, 6, 8)
        z = m.projector(torch.cat([m.encoder(v).mean(1) for v in (*b[0], *b[3])])).unflatten(0, (8, -1))
        torch.testing.assert_close(m(*b)['loss'], m.whole(z, 0, slow))
    assert not any(p.requires_grad for p in m.projector_slow.parameters())

# ---- each trains, is judged, and is kept

@pytest.fixture(scope='module')
def runs(tmp_path_factory): d = tmp_path_factory.mktemp('runs'); return {n: go(n, d/n) for n in PEERS}

@pytest.mark.parametrize('name', PEERS)
def test_it_trains_and_is_the_same_again_from_disk(runs, name):
    run, start = runs[name], build(small(name)); m = load(run.path); assert run.finished and len(run.history) == 20
    assert all(not torch.equal(p, q) for (k, p), (_, q) in zip(run.model.encoder.named_parameters(), start.encoder.named_parameters()) if 'bias' not in k)
    assert same(weights(m), weights(run.model)) and m.recipe == run.recipe
    x = images(3, seed=9); ls = m.levels(x); assert [t.shape[:2] for t in ls] == [(3, 64), (3, 1)] and all(t.isfinite().all() for t in ls)
    online = all(torch.equal(a, b) for a, b in zip(m.target.parameters(), m.encoder.parameters()))
    assert online == (name in ('mae', 'vicreg', 'lejepa', 'supervised'))     # no slow copy where the paper has none

@pytest.mark.parametrize('name', ['bootleg', 'mae', 'dino', 'supervised'])
def test_it_ships(runs, name, tmp_path):
    ship(runs[name].model, tmp_path/'m.safetensors'); m = load_pretrained('m', tmp_path); x = images(3, seed=9)
    for a, b in zip(m.levels(x), runs[name].model.levels(x)): assert F.cosine_similarity(a, b, dim=-1).min() > .999
    assert m.whole is None and not hasattr(m, 'projector_slow') and m.asks == set()

@pytest.mark.parametrize('name', ['bootleg', 'dino']) # the one whose levels differ in width, and one of the others
def test_the_card_judges_it(runs, name, tmp_path):
    m = runs[name].model; test = replace(DATA, split='test', images=images(24, seed=4), labels=Y[:24])
    r = evaluate(m, build(m.recipe).eval(), m.recipe, replace(DATA, images=images(48, seed=2), labels=torch.arange(48) % 4), test, tmp_path, 'quick', 48, 0, progress=False, umap=False)
    assert {'hjepa', 'untrained', 'pooled_l0', 'pixels'} <= r['scores']['knn'].keys() if 'scores' in r else r['levels']['hjepa']

@pytest.mark.parametrize('name', PEERS)
def test_a_killed_run_goes_on_bit_for_bit(runs, name, tmp_path, monkeypatch):
    class Killed(BaseException): pass
    def update(self, x, s, f=Trainer.update):
        if s == 13: raise Killed
        return f(self, x, s)
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'update', update)
        with pytest.raises(Killed): go(name, tmp_path, **{'train.save': 1e-5})        # a save after every step; the last one holds 13
    cut = go(name, tmp_path, **{'train.save': 1e-5}); assert cut.resumed_at == 13
    assert same(weights(cut.model), weights(runs[name].model)) and losses(cut) == losses(runs[name])

# ---- labels

@pytest.mark.parametrize('name', PEERS)
def test_labels_reach_the_supervised_loss_alone(runs, name, tmp_path):
    other = replace(DATA, labels=Y[torch.randperm(32, generator=torch.Generator().manual_seed(0))], extra={'y': Y})
    assert same(weights(go(name, tmp_path, other).model), weights(runs[name].model)) == (name != 'supervised')
    r = small(name); tr = Trainer(r, build(r), DATA.images, Y, tmp_path/'t', False); tr.steps = 9
    assert (tr.labels is None) == (name != 'supervised') and all((labels is None) == (name != 'supervised') for *_, labels in tr.pieces(DATA.images[:8], 0))

def test_every_label_goes_with_its_image(tmp_path): # images of one grey each, as bright as their label
    x = (torch.arange(32).byte() * 8)[:, None, None, None].expand(32, 3, 32, 32).contiguous()
    r = small('supervised', **{'whole.dim': 32, 'views.kind': 'weak', 'train.accumulate': 2, 'data.mean': (0., 0., 0.), 'data.std': (1., 1., 1.)})
    tr = Trainer(r, build(r), x, torch.arange(32), tmp_path, False); tr.steps = 9
    for s, part in zip(range(9), tr.loader.run(0, 9)):                               # over two ends of an epoch
        for views, *_, labels in tr.pieces(part, s): torch.testing.assert_close(views[:, :, 0, 5, 5] * 255 / 8, labels.float().expand(2, -1))

def test_supervised_is_cross_entropy_and_learns():
    r = small('supervised', **{'whole.dim': 4, 'whole.args': dict(smoothing=0.)}); m = build(r).train(); b = batch(r)
    z = m.projector(m.encoder(b[0].flatten(0, 1)).mean(1)); torch.testing.assert_close(m(*b)['loss'], F.cross_entropy(z, b[5].repeat(2)))

def test_bad_inputs(tmp_path):
    def refused(f, words):
        with pytest.raises(HJEPAError, match=words): f()
    refused(lambda: go('supervised', tmp_path/'a', images()), 'these data have none')
    refused(lambda: go('supervised', tmp_path/'b', replace(DATA, labels=Y - 1)), 'these data lack some')
    refused(lambda: go('supervised', tmp_path/'c', **{'whole.dim': 3}), 'label 3 and whole.dim is 3')
    refused(lambda: build(small('supervised'))(*batch(small('supervised'))[:5]), 'learns from labels, and the model got none')
    refused(lambda: build(change(TINY, **{'whole.kind': {'sigreg': 1., 'hjepa.peers.DINO': 1.}, 'whole.args': {}})), 'asks for slow, which a sum')
    refused(lambda: build(small('mae', **{'prediction.targets': 'hjepa.peers.pixel'})), "prediction.targets 'hjepa.peers.pixel' cannot be imported")
    refused(lambda: small('mae', **{'prediction.targets': 'pixels'}), 'the dotted path of a function')
    refused(lambda: small('mae', **{'prediction.gradient': True, 'whole.kind': 'vicreg', 'views.count': 2}), 'not made by one')
    refused(lambda: peer('moco'), 'Unknown peer'); refused(lambda: build(small('dino', **{'whole.args': dict(prototype=4)})), "Did you mean 'prototypes'")

def test_a_peer_is_a_change_like_any_other(capsys, tmp_path):
    from hjepa.cli import main
    from hjepa.sweep import read_sweep, recipes_of
    (tmp_path/'s.yaml').write_text('name: peers\nrecipe: cifar10\nchange: {steps: 5}\narms: {ours: , mae: {peer: mae}, tuned: {peer: dino, lr: 0.01}}\n')
    rs = recipes_of(read_sweep(tmp_path/'s.yaml')); plain = recipe('cifar10', steps=5)
    assert rs == dict(ours=plain, mae=peer('mae', plain), tuned=peer('dino', plain, lr=.01)) and rs['mae'].encoder == plain.encoder
    assert main(['recipes', 'cifar10', 'peer=mae']) == 0 and 'hjepa.peers.pixels' in capsys.readouterr().out
    assert main(['recipes', 'cifar10', 'peer=moco']) == 2 and 'Unknown peer' in capsys.readouterr().err

@pytest.mark.parametrize('name', PEERS)
def test_nothing_of_the_base_objective_is_left(name):
    kw = {'levels.weighting': 'uw-so', 'levels.temperature': 5., 'levels.fpn': True, 'masks.kind': 'blocks', 'masks.blocks': 3, 'masks.hidden': (12, 2), 'prediction.visible': .5, 'prediction.kind': 'cosine', 'prediction.targets': 'whiten', 'views.local': 2, 'whole.weight': .3}
    assert small(name) == peer(name, change(TINY, **kw), **{'whole.dim': 8, **({'whole.args': dict(prototypes=16)} if name == 'dino' else {})})
    assert peer(name, change(TINY, **{'encoder.patches': (4, 8), 'encoder.large_first': True})) == peer(name, TINY)

# ---- two processes

WORKER = '''
import sys, torch
from test_peers import PEERS, go, weights
for k in PEERS:
    run = go(k, f'{sys.argv[1]}/{k}', **{'train.steps': 4})
    torch.save(dict(weights=weights(run.model), rows=run.history, world=run.facts['processes']), f"{sys.argv[1]}/{k}-{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
'''
@pytest.fixture(scope='module')
def two(tmp_path_factory):
    d = tmp_path_factory.mktemp('two'); (d / 'worker.py').write_text(WORKER)
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(d / 'worker.py'), str(d)], env=ENV, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-4000:]
    return {k: [torch.load(d / f'{k}-{i}.pt') for i in range(2)] for k in PEERS}

@pytest.mark.parametrize('name', PEERS)
def test_two_processes_equal_one(two, name, tmp_path):
    a, b = two[name]; one = go(name, tmp_path, **{'train.steps': 4})
    assert a['world'] == 2 and same(a['weights'], b['weights'])
    for i, (p, q, q2) in enumerate(zip(one.history, a['rows'], b['rows'], strict=True)): # the mean over both
        assert (q['loss'] + q2['loss']) / 2 == pytest.approx(p['loss'], rel=2e-3 if i else 1e-4), i
    if name == 'dino': torch.testing.assert_close(a['weights']['whole.centre'], one.model.state_dict()['whole.centre'], rtol=.02, atol=1e-3)
