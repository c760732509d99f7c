"Probing against independent implementations and known answers; features from one pass, on disk and from bad encoders."
import json, sys, warnings
import numpy as np, pytest, torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from hjepa import foreign as F
from hjepa.config import HJEPAError
from hjepa.data.scenes import FACTORS, SHAPES, scenes
from hjepa.evaluate import features as ft, probing as pb
from hjepa.evaluate.features import block_features, features, level_features, weights_digest
from hjepa.evaluate.probes import knn_probe, linear_probe
from hjepa.evaluate.quality import quality
from hjepa.model import build, untrained
from tiny import images, tiny

WANT = dict(levels=['mean', 'grid'], pooled_l0=['mean'], blocks=['mean', 'grid4', 'last4'])
same = lambda a, b: all(torch.equal(x, y) for w in a for m in a[w] for x, y in zip(a[w][m], b[w][m], strict=True))

class Fixed: # says z to every image it is shown, in order
    grids, size = [(2, 2), (1, 1)], 32
    def __init__(self, *sets): self.known = {im.numpy().tobytes(): v for x, z in sets for im, v in zip(x, z)}
    def levels(self, x, pooled=False): z = torch.stack([self.known[im.numpy().tobytes()] for im in x]); return [z, z.mean(1, keepdim=True)]

def knows(f, n=(300, 200), seed=0): # an encoder that knows one factor and has noise beside it
    g, out = torch.Generator().manual_seed(seed), []
    for x, y in pb.worlds(*n, 32):
        v, seen, _ = pb.question(y, f)
        v = torch.nn.functional.one_hot(v.clamp_min(0)).float() if v.ndim == 1 else v.float()
        z = torch.cat([v, .1*torch.randn(len(v), 4, generator=g)], 1)
        out.append((x, z[:, None].expand(-1, 4, -1).contiguous()))
    return Fixed(*out)

# ---- features

def test_one_pass_and_no_memory(tmp_path):
    m, x = build(tiny()), images(40)
    runs = []; m.target.register_forward_hook(lambda *_: runs.append(1))
    a = features(m, x, WANT, batch=16); assert len(runs) == 3                                   # 40 images in 3 batches, once
    with warnings.catch_warnings(action='error'):
        b = features(m, x, WANT, batch=16, cache=tmp_path); assert len(runs) == 6
        c = features(m, x, WANT, cache=tmp_path); assert len(runs) == 6 and same(a, b) and same(a, c)
        z = c['levels']['mean'][0]; z += 1                                                      # an ordinary tensor to whoever uses it
    assert same(a, features(m, x, WANT, cache=tmp_path))
    more = features(m, x, WANT | dict(levels=['mean', 'grid4']), batch=40, cache=tmp_path)      # only what is missing
    assert len(runs) == 7 and torch.equal(more['levels']['grid4'][0], ft.coarse(m.levels(x)[0], m.grids[0]))
    assert [t.shape for t in c['blocks']['last4']] == [(40, 32)] and torch.allclose(c['blocks']['mean'][1], m.blocks(x)[1].mean(1), atol=1e-5)

def test_the_cache_knows_weights_images_and_what_is_read(tmp_path):
    m, x = build(tiny()), images(8)
    files = lambda: {f.name[:64] for f in tmp_path.iterdir()}
    level_features(m, x, cache=tmp_path); one = files()
    for go in (lambda: level_features(m, x, True, cache=tmp_path), lambda: level_features(m, x, mode='grid', cache=tmp_path), lambda: block_features(m, x, cache=tmp_path),
               lambda: block_features(m, x, 'last4', cache=tmp_path), lambda: level_features(m, images(8, seed=1), cache=tmp_path), lambda: level_features(build(tiny(seed=1)), x, cache=tmp_path)):
        before = files(); go(); assert len(files()) == len(before) + 1
    assert one < files()
    assert weights_digest(build(tiny())) != weights_digest(build(tiny(mean=(0., 0., 0.))))      # the transform

def test_an_interrupted_pass_leaves_nothing(tmp_path):
    class Stops(type(build(tiny()))):
        def levels(self, x, pooled=False):
            if len(x) < 16: raise KeyboardInterrupt
            return super().levels(x, pooled)
    m = Stops(tiny())
    with pytest.raises(KeyboardInterrupt): level_features(m, images(40), batch=16, cache=tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', ['timm:vit_tiny_patch16_224', 'timm:resnet18'])
def test_foreign_blocks(name):
    m, x = F.foreign(name, size=64, pretrained=False), images(6)
    got = features(m, x, WANT)
    assert len(got['blocks']['mean']) == (12 if m.plain else 5) and got['blocks']['last4'][0].shape[1] == (768 if m.plain else 64 + 128 + 256 + 512)
    for k, p in dict(levels=False, pooled_l0=True).items():
        for a, b in zip(got[k]['mean'], m.levels(x, pooled=p), strict=True): assert torch.allclose(a, b.mean(1), atol=1e-5)
    if m.plain: # timm's own answer at block 7, class token dropped
        with torch.no_grad(): t = m.net.norm(m.net.blocks[:7](m.net.pos_drop(m.net._pos_embed(m.net.patch_embed(m.prepare(x))))))[:, 1:]
        assert torch.allclose(m.blocks(x)[6], torch.nn.functional.layer_norm(t, t.shape[-1:]), atol=1e-4)

def test_broken_encoders():
    m, x, y = build(tiny()), images(60), torch.arange(60) % 3
    with torch.no_grad(): m.target.blocks[1].mlp[0].weight.fill_(float('inf')) if isinstance(m.target.blocks[1].mlp, torch.nn.Sequential) else next(m.target.blocks[1].mlp.parameters()).fill_(float('inf'))
    for read, where in ((lambda: level_features(m, x), 'Level 1'), (lambda: block_features(m, x), 'Block 2')):
        with pytest.raises(HJEPAError, match=f'{where} holds NaN or infinite'): read()
    m = build(tiny())
    with torch.no_grad():
        for p in m.target.parameters(): p.zero_()
    z, cells = level_features(m, x), ft.cells(m, x)
    assert all(o['collapsed'] and o['effective_rank'] == 0 for o in quality(cells, m.grids))
    for f in z:
        for probe in (linear_probe, knn_probe): assert abs(probe(f[:30], y[:30], f[30:], y[30:]).acc - 1/3) < .01
    r = pb.probing(m, untrained(tiny()), 120, 100)
    assert all(r['collapsed']['hjepa'].values()) and not any(r['collapsed']['untrained'].values()) and json.loads(json.dumps(r)) == r
    assert all(abs(v['raw']) < .12 for t in r['readouts'].values() for f, arms in t.items() for v in arms['hjepa'].values())

# ---- questions

def test_questions_are_the_factors():
    _, y = scenes(3000, 16, seed=3)
    for f in (k for fs in FACTORS.values() for k in fs):
        v, seen, chance = pb.question(y, f)
        if v.ndim == 1: assert abs(float((v[seen] == 0).double().mean()) - chance) < .03
        else: assert chance == 0 and v[seen].isfinite().all() and (v.shape[1] == 1 or torch.allclose(v[seen].norm(dim=1), torch.ones(int(seen.sum()), dtype=torch.float64)))
    v, seen, _ = pb.question(y, 'turn'); a = y['turn']
    for s, fold in dict(disc=0, triangle=3, pill=2, moon=1).items():
        i = y['shape'] == SHAPES.index(s)
        if not fold: assert not seen[i].any()
        else: assert torch.allclose(v[i, 1], torch.sin(fold * a[i].double()), atol=2e-3)

# ---- readouts

def test_equal_width_is_scikit_learns_and_fitted_on_training_features():
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(200, 30, generator=g) * torch.linspace(3, .1, 30) + 2, torch.randn(80, 30, generator=g)
    a, b = pb.equal_width(x, t, 6)
    sc = StandardScaler().fit(x.double()); pca = PCA(6, whiten=True, svd_solver='full').fit(sc.transform(x.double()))
    for mine, ref in ((a, pca.transform(sc.transform(x.double()))), (b, pca.transform(sc.transform(t.double())))):
        ref = torch.from_numpy(ref) * (200/199)**.5
        assert torch.allclose((mine.double() * ref.sign() * mine.sign()), ref, atol=2e-3)        # up to the sign of an axis
    for other in (t * 0, t * 1e3, t[:3], torch.full_like(t, 1e6)): assert torch.equal(pb.equal_width(x, other, 6)[0], a)
    assert torch.equal(pb.equal_width(x, torch.cat([t, t * 9]), 6)[1][:80], b)

@pytest.mark.parametrize('n,w', [(300, 20), (30, 60)])
def test_ridge_is_scikit_learns(n, w):
    r = np.random.default_rng(1); x, xt = r.normal(size=(n, w)), r.normal(size=(50, w)); y = x[:, :2] @ r.normal(size=(2, 2)) + r.normal(size=(n, 2)); t = torch.from_numpy
    def left_out(a): # the long way
        keep = lambda i: np.arange(n) != i
        return sum(((Ridge(a).fit(x[keep(i)], y[keep(i)]).predict(x[i:i+1]) - y[i])**2).sum() for i in range(n))
    some = (1e-3, 1e-1, 10.); best = min(some, key=lambda p: left_out(p*n))
    assert np.allclose(pb.ridge(t(x), t(y), t(xt), some).numpy(), Ridge(best*n).fit(x, y).predict(xt), atol=1e-7)

def test_skill_is_r2_and_chance_corrected_accuracy():
    _, y = scenes(900, 16, seed=4); g = torch.Generator().manual_seed(2); cut = lambda a, b: {k: v[a:b] for k, v in y.items()}
    for f in ('x', 'turn', 'shape', 'layout'):
        ask, ans = (pb.question(cut(*c), f) for c in ((0, 600), (600, 900)))
        z = torch.cat([y['x'][:, None] + .1*torch.randn(900, 1, generator=g), torch.eye(8)[y['shape']] + torch.randn(900, 8, generator=g)], 1)
        e, b = pb.missed(z[:600], z[600:], ask, ans), pb.guessed(ask, ans)
        raw = pb.resample({'a': e}, b)[0]['a']
        if f == 'x':
            p = pb.ridge(z[:600], ask[0], z[600:]).numpy()
            assert abs(raw - r2_score(ans[0], p)) < .01 and .5 < raw < 1
        if f == 'shape':
            acc = LogisticRegression(max_iter=1000).fit(z[:600], ask[0]).score(z[600:], ans[0])
            assert abs(raw - (acc - 1/8) / (7/8)) < .04 and raw > .2
        if f in ('turn', 'layout'): assert raw < .1 and len(e) == int(ans[1].sum()) < 300

def test_intervals_cover():
    "Of the R² of a fixed readout over draws of the test images."
    r, n, hits = np.random.default_rng(0), 150, 0
    truth = 1 - .25/1.25                                                                        # y = x + noise/2, read as x
    for i in range(200):
        x, u = r.normal(size=(2, n)); y = x + u/2
        _, d = pb.resample({'a': (y - x)**2}, y**2, 300, i); w = pb.within(d['a']); hits += w['lo'] <= truth <= w['hi']
    assert stats.binomtest(hits, 200, .95).pvalue > 1e-3 and hits < 200, hits

# ---- the matrix

@pytest.mark.parametrize('f', ['colour', 'x'])
def test_an_encoder_that_knows_one_factor(f):
    r = pb.probing(knows(f), knows('layout', seed=1), 300, 200)
    for readout, table in r['readouts'].items():
        for g, arms in table.items():
            for p, s in arms['hjepa'].items():
                assert s['skill'] > .95 if g == f else s['raw'] < .12, (readout, g, p, s)
                assert s['lo'] <= s['skill'] <= s['hi'] and s['skill'] == max(0, s['raw'])
            if g == f: assert all(d['lo'] > .8 for d in r['minus']['untrained'][readout][g].values())
    if f == 'x': assert r == pb.probing(knows(f), knows('layout', seed=1), 300, 200)

def test_shuffled_labels_are_at_chance():
    m = knows('shape'); (x, y), (xt, yt) = pb.worlds(300, 200, 32)
    z, zt = (level_features(m, a)[0] for a in (x, xt)); g = torch.Generator().manual_seed(5)
    for f in pb.ASKED:
        mix = {k: v[torch.randperm(300, generator=g)] if k == f else v for k, v in y.items()}
        if f in ('turn',): continue                                                             # its symmetry hangs on the shape
        ask, ans = pb.question(mix, f), pb.question(yt, f)
        raw = pb.resample({'a': pb.missed(*pb.equal_width(z, zt, 12), ask, ans)}, pb.guessed(ask, ans))[0]['a']
        assert raw < .12, (f, raw)

def test_widths_that_do_not_match():
    a = torch.randn(50, 8)
    with pytest.raises(HJEPAError, match='8 wide and test features 7'): pb.equal_width(a, a[:, :7], 4)
    with pytest.raises(HJEPAError, match='8 wide and test features 7'): linear_probe(a, torch.arange(50) % 2, a[:, :7], torch.arange(50) % 2)

def test_deep_networks_and_the_figure():
    import matplotlib; matplotlib.use('Agg')
    m = F.foreign('timm:vit_tiny_patch16_224', size=32, pretrained=False)
    r = pb.probing(m, m, 120, 100, blocks=3)
    assert [p for p in r['readouts']['grid']['x']['hjepa']] == ['level 0', 'level 1', 'level 2', 'block 4', 'block 8', 'block 12'][:len(m.grids)] + ['block 4', 'block 8', 'block 12']
    assert all(d['diff'] == 0 and d['lo'] <= 0 for t in r['minus']['untrained'].values() for ps in t.values() for d in ps.values())   # a network against itself
    fig = pb.plot_probing(r); assert len(fig.axes) == 2; matplotlib.pyplot.close(fig)
    assert pb.spread(12, 6) == [1, 3, 5, 7, 9, 11] and pb.spread(2, 6) == [0, 1] and pb.spread(5, 1) == [4]
