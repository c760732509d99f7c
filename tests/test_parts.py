"The switches of the parts, through whole models and against independent computations."
import pytest, torch
import torch.nn.functional as F
from hjepa.config import HJEPAError, change
from hjepa.data.views import draw_views, make_views
from hjepa.model import build, load
from hjepa.parts.encoder import Encoder
from hjepa.parts.masking import sample_masks
from hjepa.parts.patch import gather, patchify, resize_matrix
from hjepa.parts.pyramid import Pyramid
from hjepa.parts.rope import centres, rotate, rotations
from hjepa.train import Trainer, fit
from tiny import Count, images, tiny

SWITCHES = {'mixed': dict(positions='mixed'), 'sincos': dict(positions='sincos'), 'learned': dict(positions='learned', stretch=True), 'none': dict(positions='none'), 'swiglu': dict(act='swiglu', registers=1),
    'pre_norm': dict(pre_norm=True), 'no last norm': dict(final_norm=False), 'bottleneck': {'predictor.dim': 8, 'predictor.heads': 2}, 'conv stem': dict(stem='conv'), 'windows': {'windows': 1, 'registers': 2, 'masks.hidden': (0, 3)},
    'max': dict(pool='max'), 'attention': dict(pool='attention'), 'conv': dict(pool='conv'), 'fpn': dict(fpn=True), 'across': dict(across=True), 'slots': dict(slots=2),
    'all of the neck': dict(pool='conv', fpn=True, across=True, slots=3), 'patches': dict(patches=(4, 8)), 'local views': dict(pool='attention', fpn=True, across=True, slots=2, **{'views.local': 2})}

def batch(m, B=4, seed=0, progress=None): # views, masks, and local views if there are any
    g, r = torch.Generator().manual_seed(seed), m.recipe
    x, draw = images(B, r.data.image, seed), draw_views(B, r.views, g)
    local = [make_views(x, draw.local, r.views.local_size, r.data.mean, r.data.std)] if draw.local else []
    return make_views(x, draw, r.data.image, r.data.mean, r.data.std), m.draw_masks(r.views.count * B, g, progress=progress), 0, *local

@pytest.mark.parametrize('kw', SWITCHES.values(), ids=SWITCHES)
def test_every_weight_learns_and_hidden_pixels_stay_hidden(kw, tmp_path):
    m = build(tiny(**kw)).train(); views, masks, *rest = batch(m)
    m(views, masks, *rest)['loss'].backward()
    assert not [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]          # as several processes require
    assert not [n for n, p in m.named_parameters() if 'target' in n and p.requires_grad]
    x, h = views.flatten(0, 1), m.recipe.grid
    seen = torch.zeros(len(x), h*h).scatter(1, masks.context, 1.).view(-1, 1, h, h).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad(): a, b = (m.eval().look(v, masks) for v in (x, torch.where(seen > 0, x, torch.randn_like(x) * 9)))
    for s, t in zip(a, b): torch.testing.assert_close(s, t, atol=1e-5, rtol=1e-4)
    m.save(tmp_path/'m.safetensors'); again = load(tmp_path/'m.safetensors')
    assert all(torch.equal(s, t) for s, t in zip(m.levels(images(2)), again.levels(images(2)))) and [t.shape[1] for t in m.levels(images(2))] == [a*b for a, b in m.grids]

@pytest.mark.parametrize('kw', [dict(cells=(1,), top=False, depths=(2,), weights=(1.,), hidden=(20,)), dict(cells=(1, 2), depths=(1, 2, 2), weights=(1., 1.), hidden=(4, 3)),
    dict(cells=(1,), depths=(1, 2), weights=(1.,), hidden=(20,)), dict(cells=(1, 2, 4), depths=(1, 2, 2, 2), weights=(1.,)*3, hidden=(4, 3, 1))], ids=['1', '3', '2', '4'])
def test_one_to_four_levels(kw):
    keys = dict(cells='levels.cells', top='levels.top', depths='levels.depths', weights='levels.weights', hidden='masks.hidden')
    r = tiny(); d = r.model_dump()
    for k, v in kw.items(): d[keys[k].split('.')[0]][keys[k].split('.')[1]] = v
    from hjepa.config import from_dict
    for extra in ({}, dict(fpn=True, across=True), dict(slots=2)):
        if (extra and len(kw['depths']) < 2) or ('slots' in extra and not kw.get('top', True)): continue
        m = build(change(from_dict(d), **extra)).train(); out = m(*batch(m)); out['loss'].backward()
        assert torch.isfinite(out['loss']) and len(m.levels(images(2))) == len(kw['depths'])

def test_a_neck_is_trained_followed_and_kept(tmp_path):
    run = fit(tiny(pool='attention', fpn=True, across=True, slots=2, train__steps=4, **{'optim.ema': .5, 'optim.ema_end': .5}), data=images(), out=tmp_path/'a')
    start = build(run.recipe)
    for a, b, c in zip(run.model.neck.parameters(), start.neck.parameters(), run.model.target_neck.parameters(), strict=True):
        assert not torch.equal(a, b) and not torch.equal(c, b) and not torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path/'a').levels(images(3)), run.model.levels(images(3))))

def test_a_neck_on_an_odd_grid_follows_the_origins():
    r = tiny(**{'data.image': 56, 'levels.cells': (1, 2, 4), 'levels.depths': (1, 2, 2, 2), 'levels.weights': (1., 1., 1.), 'masks.hidden': (9, 8, 2), 'levels.fpn': True})
    m = build(r).eval(); x = torch.randn(2, 3, 56, 56)                                     # 14 patches a side, 3 cells of 4
    for o in ([(0, 0)]*4, [(0, 0), (0, 0), (2, 2), (0, 0)]):
        for l, (a, h) in enumerate(zip(m.targets(x, o), m.target(x, depths=m.depths))): torch.testing.assert_close(a, F.layer_norm(m.pyramid.pool(h, l, o[l]), (16,)), atol=1e-5, rtol=1e-4)
    with torch.no_grad(): [g.add_(1.) for g in m.target_neck.gain]
    a, b = m.targets(x, [(0, 0)]*4), m.targets(x, [(0, 0), (0, 0), (2, 2), (0, 0)])
    assert not torch.allclose(a[1], b[1]) and torch.equal(a[3], b[3])                      # another parent speaks to a cell, the whole is the whole

@pytest.mark.parametrize('kw', [dict(), dict(pool='max'), dict(pool='conv', fpn=True, across=True, slots=2), dict(positions='sincos')], ids=str)
@pytest.mark.parametrize('size', [32, 48])
def test_one_pass_reads_what_two_do(kw, size):
    m, x = build(tiny(**kw)).eval(), images(3, size)
    if m.target_neck: [p.data.add_(torch.randn_like(p) * .1) for p in m.target_neck.parameters()]
    got = m.read(x)
    for w, want in (('levels', m.levels(x)), ('pooled_l0', m.levels(x, pooled=True))): assert all(torch.equal(a, b) for a, b in zip(got[w], want, strict=True))
    assert [b.shape[1] for b in got['blocks']] == [(size // 4)**2] * 2

def test_chance_starts_anew_where_large_patches_give_way():
    r = tiny(patches=(4, 8), large_first=True, train__steps=20); tr = Trainer(r, build(r), images(), None, None); tr.steps = 20; c = tr.model.chance[0]
    for s, x in enumerate(tr.loader.run(0, 10)): tr.update(x, s)
    assert not c.ready and tr.model.chance[1].ready
    c.level.fill_(99.); c.mean.fill_(99.)                          # what was known of the patches when nothing was trained
    x, = tr.loader.run(10, 11); tr.update(x, 10); assert c.ready and c.level < 1 and c.mean.abs().max() < 10

def test_chance_asks_whether_it_is_set_of_what_was_loaded():
    from hjepa.losses.prediction import Chance
    t, used, fresh = torch.randn(8, 4, 6), Chance(4, 6), Chance(4, 6).state_dict()
    used.observe(t); used.commit(); mean = used.mean.clone(); used.observe(t + 1); assert torch.equal(used.mean, mean)    # set once
    used.load_state_dict(fresh); used.observe(t + 5); torch.testing.assert_close(used.mean, (t + 5).mean(0))              # loaded unset: the next batch sets it
    again = Chance(4, 6); again.load_state_dict(used.state_dict()); again.observe(t); assert torch.equal(again.mean, used.mean)
    class Asked(torch.Tensor):
        def __bool__(self): raise AssertionError('asked the device')
    used.ready = used.ready.as_subclass(Asked); used.observe(t)

def test_a_level_without_a_question_has_no_share():
    m = build(tiny(**{'masks.hidden': (6, 0), 'whole.kind': 'none', 'views.count': 1, 'prediction.weight': 1.})); x = torch.randn(1, 8, 3, 32, 32)
    out = m(x, m.draw_masks(8, torch.Generator().manual_seed(0))); assert out['level_1'] == 0 and out['loss'] == out['level_0']
    with pytest.raises(HJEPAError, match='no share to any level that is asked'): tiny(**{'masks.hidden': (6, 0), 'levels.weights': (0., 1.)})

def test_cost_counts_every_share_and_every_pass():
    from hjepa.config import peer
    cost = {s: build(tiny(**{'prediction.share': s})).step_cost()['flops_per_image'] for s in (.1, .2, .3)}
    assert cost[.1] < cost[.2] < cost[.3] and abs(cost[.3] - cost[.2] - (cost[.2] - cost[.1])) < .02 * (cost[.3] - cost[.2])
    r = peer('dino', tiny()); target = build(r).step_cost()['tokens']['target']
    assert build(tiny(**{'whole.kind': r.whole.kind, 'whole.args': r.whole.args, 'prediction.share': .25})).step_cost()['tokens']['target'] == 1.25 * target

def test_windows_are_a_mask_between_windows():
    "Against the same blocks with full attention and an explicit mask."
    torch.manual_seed(0); e = Encoder(32, 4, 32, 3, 4, windows=2, window=4, positions='mixed').eval(); x = torch.randn(2, 3, 32, 32)
    keep = sample_masks(Pyramid((8, 8)), 2, (0, 0, 2), generator=torch.Generator().manual_seed(1)).context
    at = (keep // 8 // 4) * 2 + keep % 8 // 4; same = (at[:, :, None] == at[:, None])[:, None]
    with torch.no_grad():
        t = e.embed(x, keep)
        for i, b in enumerate(e.blocks): t = b(t, e.rope(e.places((8, 8))[keep], i, 0), mask=same if i < 2 else None)
        torch.testing.assert_close(e(x, keep), e.norm(t), atol=1e-5, rtol=1e-4)
        order = torch.randperm(keep.shape[1]); torch.testing.assert_close(e(x, keep[:, order]), e(x, keep)[:, order], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('kw', [dict(windows=2, window=4, registers=2), dict(positions='mixed'), dict(positions='learned', act='swiglu')], ids=str)
def test_checkpointing_gives_the_same_gradients(kw):
    a, b = Encoder(32, 4, 32, 3, 4, **kw).train(), Encoder(32, 4, 32, 3, 4, checkpoint=True, **kw).train(); b.load_state_dict(a.state_dict()); x = torch.randn(2, 3, 32, 32)
    for e in (a, b): e(x).square().mean().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True): torch.testing.assert_close(p.grad, q.grad)

def plain(e, x, keep): # the encoder without a single switch
    t = gather(patchify(x, 4), keep); h = e.embed.proj(t.flatten(0, 1)).unflatten(0, t.shape[:2])
    rope = [q.unsqueeze(1) for q in rotations(centres(8, 8)[keep], 8)]
    for b in e.blocks:
        q, k, v = [u.unflatten(-1, (2, 8)).transpose(1, 2) for u in b.attn.qkv(b.norm1(h)).chunk(3, -1)]
        h = h + b.attn.proj(F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v).transpose(1, 2).flatten(2))
        h = h + b.mlp[2](F.gelu(b.mlp[0](b.norm2(h))))
    return e.norm(h)

def test_switches_that_are_off_cost_nothing():
    e, x, keep = build(tiny()).encoder.train(), torch.randn(2, 3, 32, 32), torch.rand(2, 64).argsort(1)[:, :20]; out = []
    for run in (plain, lambda e, x, keep: e(x, keep)):
        e.zero_grad()
        with Count() as c: z = run(e, x, keep); z.square().mean().backward()
        out.append((z.detach(), [q.grad.clone() for q in e.parameters()], c.n))
    (a, ga, na), (b, gb, nb) = out
    assert torch.equal(a, b) and all(torch.equal(u, v) for u, v in zip(ga, gb, strict=True)) and nb <= na, (na, nb)

def test_mixed_frequencies_and_tables_do_not_decay():
    from hjepa.optim import param_groups
    for kind, name in (('mixed', 'freq'), ('learned', 'table')):
        e = Encoder(16, 4, 16, 1, 2, positions=kind); decayed = {id(p) for g in param_groups(e, .1) if g['decay'] for p in g['params']}; assert decayed
        assert not any(id(p) in decayed for n, p in e.named_parameters() if n.startswith(name))

@pytest.mark.parametrize('p,q', [(4, 8), (8, 12), (8, 6), (16, 14)])
def test_resizing_is_the_least_squares_answer(p, q):
    "Solved for in double precision; exact where the patch grows."
    B = F.interpolate(torch.eye(p*p, dtype=torch.double).view(p*p, 1, p, p), (q, q), mode='bilinear', antialias=q < p).flatten(1).T      # resizes a patch
    w = torch.randn(p*p, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.lstsq(B.T, w[:, None], driver='gelsd').solution[:, 0]
    torch.testing.assert_close(resize_matrix(p, q).double() @ w, best, atol=1e-3, rtol=1e-3)
    assert (q < p) == bool((B.T @ best - w).abs().max() > 1e-6)

def test_large_patches_first(tmp_path):
    seen = []
    from hjepa.model import HJEPA
    real = HJEPA.draw_masks
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(HJEPA, 'draw_masks', lambda self, *a, **k: (lambda m: (seen.append(m.unit), m)[1])(real(self, *a, **k)))
        run = fit(tiny(patches=(4, 8), large_first=True, train__steps=6), data=images(), out=tmp_path/'a')
    assert sorted(set(seen)) == [0, 1] and seen == sorted(seen, reverse=True)
    assert [r['level_0'] == 0 for r in run.history] == [True]*3 + [False]*3 and all(r['level_1'] > 0 for r in run.history)
    m = run.model
    for unit, n in ((0, [64, 16, 1]), (1, [16, 1])): assert [t.shape[1] for t in m.levels(images(2), unit=unit)] == n
    assert m.chance[0].ready and torch.isfinite(m.chance[0].level)

def test_a_rehearsal_is_of_all_sizes():
    seen, r = [], tiny(patches=(4, 8, 8, 8), large_first=True); tr = Trainer(r, build(r), images(), None, None); real = tr.model.draw_masks
    tr.model.draw_masks = lambda *a, **k: (lambda m: (seen.append(m.unit), m)[1])(real(*a, **k)); tr.rehearse()
    assert seen[-40:] == ([1]*15 + [0]*5)*2                                         # once to warm up, once on the clock

def test_targets_of_large_patches_are_levels_of_the_same_image():
    m = build(tiny(patches=(4, 8))).eval(); x = torch.randn(2, 3, 32, 32); t = m.targets(x, unit=1)
    assert t[0] is None
    want = m.target(x, depths=m.depths, p=8)
    torch.testing.assert_close(t[1], F.layer_norm(want[1], (16,))); torch.testing.assert_close(t[2], F.layer_norm(want[2].mean(1, keepdim=True), (16,)))

@pytest.mark.parametrize('kw,why', [
    (dict(positions='sincos', **{'encoder.dim': 18, 'encoder.heads': 3, 'predictor.dim': 24}), 'multiple of 4 for sin-cos'), (dict(positions='none', stretch=True), 'no coordinates to stretch'),
    (dict(positions='learned', **{'views.local': 2}), 'encoder.stretch=True'), (dict(positions='learned', patches=(4, 8)), 'encoder.stretch=True'), (dict(act='swiglu', **{'encoder.mlp': 1.32}), 'makes them even'),
    (dict(large_first=True), 'gives none'), (dict(windows=2), 'leaves none of 2 blocks'), ({'windows': 1}, 'hides parts of them'), ({'windows': 1, 'masks.hidden': (0, 3), 'data.image': 36}, 'tile'),
    ({'windows': 1, 'masks.hidden': (0, 3), 'views.local': 1, 'views.local_size': 12}, 'local views included'), ({'windows': 1, 'patches': (4, 8), 'masks.hidden': (0, 3)}, 'use one of the two'),
    (dict(patches=(4, 12)), "not the side of a level's cell"), (dict(patches=(8,)), 'must hold encoder.patch 4'), (dict(patches=(4, 8), **{'masks.hidden': (20, 0)}), 'leave nothing to ask'),
    (dict(patches=(4, 8), stem='conv'), 'stem=conv'), (dict(patches=(4, 8), fpn=True), 'a learned neck'), (dict(fpn=True, **{'whole.kind': 'none'}), 'only the whole-image loss trains'),
    (dict(pool='attention', **{'whole.weight': 0.}), 'only the whole-image loss trains'), (dict(slots=1), 'competes with nobody'), (dict(pool='conv', slots=2, **{'levels.cells': (1,), 'levels.depths': (1, 2), 'levels.weights': (1.,), 'masks.hidden': (20,)}), 'no level between'),
    (dict(fpn=True, **{'views.local': 1, 'views.local_size': 4}), 'smaller than the coarsest cell')], ids=lambda v: str(v)[:50])
def test_senseless_combinations_are_refused(kw, why):
    d = tiny().model_dump()
    from hjepa.config import from_dict, full_key
    for k, v in kw.items():
        a, b = full_key(k).split('.'); d[a][b] = v
    with pytest.raises(HJEPAError, match=why): from_dict(d)
