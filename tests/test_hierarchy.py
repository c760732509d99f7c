"Levels, masks and losses through the whole model: what no single part can promise."
import pytest, torch
import hjepa.model as hm
from hjepa.data.views import draw_views, make_views
from hjepa.model import build
from hjepa.optim import param_groups
from hjepa.parts.masking import sample_masks
from hjepa.parts.patch import gather
from hjepa.parts.pyramid import Pyramid
from tiny import images, tiny

HIDDEN = {8: (4, 3, 1), 14: (9, 6, 2)}

def inside(pyramid, level, origin, cell): # the patches of a cell, counted by hand
    c, (h, w), W, (y, x) = pyramid.cells[level], pyramid.grids[level], pyramid.grid[1], origin
    i, j = divmod(int(cell), w)
    assert 0 <= i < h
    return {(y + i*c + a) * W + x + j*c + b for a in range(c) for b in range(c)}

def batch(m, B=4, seed=0): # views (V,B,3,H,W) and masks
    g = torch.Generator().manual_seed(seed)
    r = m.recipe
    return make_views(images(B, r.data.image, seed), draw_views(B, r.views, g), r.data.image, r.data.mean, r.data.std), m.draw_masks(r.views.count * B, g)

@pytest.mark.parametrize('grid', [8, 14])
@pytest.mark.parametrize('kind', ['nested', 'blocks'])
@pytest.mark.parametrize('predict', [None, (12, 5, 1)])
def test_masks_hide_whole_cells_in_equal_numbers(grid, kind, predict):
    p, hidden, B, N = Pyramid((grid, grid), (1, 2, 4)), HIDDEN[grid], 6, grid * grid
    sure = [sum(k * (b // c)**2 for k, b in zip(hidden[l:], p.cells[l:])) for l, c in enumerate(p.cells)]
    for s in range(12):
        m = sample_masks(p, B, hidden, predict, kind, generator=torch.Generator().manual_seed(s))
        assert m.context.shape == (B, N - sum(k*c*c for k, c in zip(hidden, p.cells)))
        assert [t.shape for t in m.targets] == [(B, n if predict is None else min(n, k)) for n, k in zip(sure, predict or sure)]
        for b in range(B):
            seen = m.context[b].tolist()
            assert len(set(seen)) == len(seen) and set(seen) < set(range(N))
            for l, t in enumerate(m.targets):
                cells = t[b].tolist()
                assert len(set(cells)) == len(cells)
                for c in cells: assert not inside(p, l, m.origins[l], c) & set(seen)

@pytest.mark.parametrize('grid', [8, 14])
@pytest.mark.parametrize('kind', ['nested', 'blocks'])
def test_masks_use_the_last_rows_and_columns(grid, kind):
    p = Pyramid((grid, grid), (1, 2, 4))
    seen, asked = torch.zeros(grid * grid), [torch.zeros(grid * grid) for _ in p.cells]
    for s in range(20):
        m = sample_masks(p, 16, HIDDEN[grid], None, kind, generator=torch.Generator().manual_seed(s))
        seen.scatter_add_(0, m.context.flatten(), torch.ones(m.context.numel()))
        for l, t in enumerate(m.targets):
            for c in t[:4].flatten().tolist(): asked[l][list(inside(p, l, m.origins[l], c))] += 1
    for count in (seen, *asked):
        g = count.reshape(grid, grid)
        assert (g[-1] > 0).all() and (g[:, -1] > 0).all() and (g[0] > 0).all() and (g[:, 0] > 0).all()

@pytest.mark.parametrize('stem', ['linear', 'conv'])
@pytest.mark.parametrize('kind', ['nested', 'blocks'])
def test_hidden_pixels_reach_nothing_but_the_targets(stem, kind):
    r = tiny(encoder__stem=stem, masks__kind=kind, levels__cells=(1, 2, 4), levels__depths=(1, 2, 2, 2), levels__weights=(1., 1., 1.), masks__hidden=(4, 3, 1))
    m = build(r).eval(); views, masks = batch(m)
    out = {}
    for k in ('encoder', 'predictor', 'projector'): getattr(m, k).register_forward_hook(lambda mod, a, o, k=k: out.update({k: o}))
    def run(x):
        m(x, masks); flat = list(out['predictor']) + [out['encoder'], out['projector']]
        return [t.detach().clone() for t in flat], m.targets(x.flatten(0, 1), masks.origins)
    before, t0 = run(views)
    V, B, C, H, W = views.shape; n, p = H // 4, 4
    def noisy(patches): # per view image: the patches whose pixels change
        x = views.clone().flatten(0, 1)
        for i, ps in enumerate(patches):
            for q in ps: y, z = divmod(q, n); x[i, :, y*p:(y+1)*p, z*p:(z+1)*p] = 9 * torch.rand(C, p, p)
        return x.unflatten(0, (V, B))
    for l, t in enumerate(masks.targets):
        after, t1 = run(noisy([set().union(*(inside(m.pyramid, l, masks.origins[l], c) for c in row.tolist())) for row in t]))
        assert all(torch.equal(a, b) for a, b in zip(before, after)), f'level {l} leaks'
        assert (gather(t0[l], t) - gather(t1[l], t)).abs().amax(-1).min() > 1e-3       # while every asked target moved
    after, _ = run(noisy([[int(row[-1])] for row in masks.context]))                   # the test can fail: visible pixels are seen
    assert not any(torch.equal(a, b) for a, b in zip(before, after))

def test_loss_counts_every_asked_cell_once(monkeypatch):
    m = build(tiny(masks__predict=(7, 2), prediction__share=.5)).train(); views, masks = batch(m, 8)
    seen, real = [], hm.distance
    def note(a, b, kind): d = real(a, b, kind); seen.append(d); return d
    monkeypatch.setattr(hm, 'distance', note)
    out = m(views, masks)
    assert [tuple(d.shape) for d in seen] == [(8, 7), (8, 2)]                          # share .5 of 2 views x 8 images; M cells
    for l, d in enumerate(seen): torch.testing.assert_close(out[f'level_{l}'], d.sum() / d.numel() / m.chance[l].level)
    torch.testing.assert_close(out['loss'], (out['level_0'] + out['level_1']) / 2 + out['whole'])

@pytest.mark.parametrize('kind', ['smooth_l1', 'mse', 'cosine'])
def test_mean_answer_costs_one(monkeypatch, kind):
    m = build(tiny(prediction__kind=kind, masks__hidden=(30, 6))).eval(); views, masks = batch(m, 32)
    m.calibrate([(views, masks)])
    full = m.targets(views.flatten(0, 1), masks.origins, levels=2)
    for c, t in zip(m.chance, full): torch.testing.assert_close(float(c.relative(hm.distance(c.mean.expand_as(t), t, kind).mean())), 1., rtol=1e-4, atol=0)
    monkeypatch.setattr(m.predictor, 'forward', lambda *a: [c.mean.expand(len(t), -1, -1).gather(1, t[..., None].expand(-1, -1, 16)) for c, t in zip(m.chance, masks.targets)])
    out = m(views, masks)
    for l in range(2): assert abs(out[f'level_{l}'] - 1) < .1                          # a random subset of cells: sampling noise only

@pytest.mark.parametrize('kind', ['sigreg', 'vicreg'])
def test_healthy_images_lower_the_whole_image_loss_and_identical_ones_raise_it(kind):
    m = build(tiny(whole__kind=kind, whole__args={}, prediction__weight=.1)).train()
    opt = torch.optim.AdamW(param_groups(m, .05), lr=2e-3)
    data = [batch(m, 32, s) for s in range(2)]
    start = float(m(*data[0], 0)['whole'].detach())
    for s in range(16): m(*data[s % 2], s)['loss'].backward(); opt.step(); opt.zero_grad(); m.after_step(.99)
    (views, masks), score = data[0], lambda v, k: float(m(v, k, 0)['whole'].detach())
    healthy, one_image, one_view = score(views, masks), score(views[:1, :1].expand_as(views), masks), score(views[:1, :1].expand_as(views), masks[[0] * 64])
    assert healthy < .95 * start and one_image > 1.1 * healthy and one_view > 1.1 * healthy, (start, healthy, one_image, one_view)
