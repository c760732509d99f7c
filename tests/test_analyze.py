"What the levels know: nulls and bounds with known answers, a second way to compute, and bad input."
import itertools, json, math
from pathlib import Path
import numpy as np, pytest, torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_mutual_info_score
from hjepa.analyze import affinity as A, consistency as C
from hjepa.config import HJEPAError
from hjepa.data.scenes import scenes
from hjepa.evaluate.finetune import quick
from hjepa.foreign import foreign
from hjepa.model import untrained
from dataclasses import replace
from tiny import ROOT, images, tiny

CIFAR = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
TWO = C.tree_paths(C.TREES['cifar10'], CIFAR)
THREE = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [0, 2], [0, 1], [0, 0], [0, 2], [1, 0], [1, 1]])
CIFAR100 = (np.arange(100) // 5)[:, None]

def slow_hops(scores, y, paths): # word by word from the definition
    k = len(paths); shared = lambda a, b: next((i for i, (p, q) in enumerate(zip(paths[a], paths[b])) if p != q), len(paths[a])) + (a == b)
    depth = [shared(y, c) for c in range(k)]; order = sorted(set(depth), reverse=True); r = [order.index(d) for d in depth]
    e, o = sorted(r), [r[c] for c in sorted(range(k), key=lambda c: -scores[c])]
    w = []
    for v in sorted(set(e)):
        n, low = e.count(v), 2.**-(v + 1) if v < max(e) else 0.
        w += [2.**-v + (low - 2.**-v) * j / n for j in range(n)]
    dist = lambda a: sum(wi * abs(p - q) for wi, p, q in zip(w, e, a))
    return min(1, max(0, 1 - dist(o) / dist(e[::-1])))

@pytest.mark.parametrize('paths', [TWO, THREE, CIFAR100[:20]])
def test_hops_is_its_definition(paths):
    r = np.random.default_rng(0); s, y = r.normal(size=(60, len(paths))), r.integers(len(paths), size=60)
    assert np.allclose(C.hops(s, y, paths), [slow_hops(a, b, paths.tolist()) for a, b in zip(s, y)])

@pytest.mark.parametrize('paths,chance,top', [(TWO, .29, .69), (THREE, .25, .73), (CIFAR100, .01, .44)])
def test_hops_nulls(paths, chance, top): # the table of the project's protocol
    y = np.arange(len(paths))
    assert abs(C.hops_null(y, paths, False) - chance) < .012 and abs(C.hops_null(y, paths) - top) < .012

def test_hops_minus_bounds():
    r = np.random.default_rng(1); y = r.integers(10, size=4000); R = C.lca_ranks(THREE)
    assert np.isclose(C.hops_minus(-R[y] + .1*r.random((4000, 10)), y, THREE), 1).all()
    m = C.hops_minus(r.random((4000, 10)), y, THREE); assert abs(m.mean()) < 4 * m.std() / 4000**.5 + .01
    few = (y < 3); assert abs(C.hops_minus(r.random((few.sum(), 10)), y[few], TWO).mean()) < .03      # classes need not be balanced

def test_identical_and_independent_levels():
    g = torch.Generator().manual_seed(0); y = torch.arange(400) % 8; paths = np.array([[0]]*4 + [[1]]*4); x = torch.eye(8)[y]*2 + torch.randn(400, 8, generator=g)
    one = C.consistency(C.judge_arm([(x, x)]*2, y, y, paths), y, paths, 40)['pairs']['0-1']
    assert all(np.isclose(one[k]['value'], 1) for k in ('agreement', 'kappa', 'cka', 'triplets'))
    noise = [torch.randn(900, 8, generator=g) for _ in range(2)]; y = torch.arange(900) % 8
    two = C.consistency(C.judge_arm([(n[:500], n[500:]) for n in noise], y[:500], y[500:], paths), y[500:], paths, 100)
    p = two['pairs']['0-1']; assert abs(p['kappa']['value']) < .2 and max(abs(p[k]['value']) for k in ('cka', 'triplets', 'nestedness')) < .05
    assert two['hcs']['value'] < .05 and two['tree']['p'] > .02

def test_coherence_nulls_and_bounds():
    r = np.random.default_rng(0); y = np.arange(1000) % 10; trees = C.regroupings(TWO[:, 0]); group = TWO[y, 0]
    assert C.hcs(y, group, y, TWO) == pytest.approx(1) == C.hcs_minus(y, group, y, trees) and C.group_fit(group, y, trees)['p'] == pytest.approx(1/210)
    assert C.hcs_minus(r.integers(20, size=1000), r.integers(4, size=1000), y, trees) < .05
    # perfect classes, merged into clusters without regard to the tree: HCS is taken in, the regrouped score is not, on average over merges
    merges = [r.permutation(10) // 3 for _ in range(40)]
    assert np.mean([C.hcs(y, m[y], y, TWO) for m in merges]) > .2 and abs(np.mean([C.group_fit(m[y], y, trees)['fit'] for m in merges])) < .06
    ps = [C.group_fit(m[y], y, trees)['p'] for m in merges]; assert np.mean(np.array(ps) <= .1) < .3

def test_regroupings():
    for sizes in ((6, 4), (4, 4), (2, 2, 2)):
        g = np.repeat(np.arange(len(sizes)), sizes); trees = C.regroupings(g)
        same = math.prod(math.factorial(sizes.count(s)) for s in set(sizes))
        assert len(trees) == math.factorial(len(g)) // math.prod(map(math.factorial, sizes)) // same == len({tuple(t) for t in trees}) and trees[0].tolist() == g.tolist()
        assert all(sorted(np.bincount(t)) == sorted(sizes) for t in trees)

def test_nestedness_against_sklearn():
    r = np.random.default_rng(0); a = r.integers(12, size=500); b = np.where(r.random(500) < .7, a // 4, r.integers(3, size=500))
    assert C.nestedness(b, b) == pytest.approx(adjusted_mutual_info_score(b, b)) == pytest.approx(1)
    n = C.nestedness(a, b); h = lambda x: -sum(p*math.log(p) for p in np.bincount(x)/len(x))    # AMI divides by the mean entropy, we by the coarse one
    shuffled = np.mean([1 - (C.nestedness(r.permutation(a), b)) for _ in range(200)]); assert abs(shuffled - 1) < .01 and 0 < n < 1 and h(b) < h(a)
    assert n > adjusted_mutual_info_score(a, b)

def test_mantel():
    r = np.random.default_rng(0); d = r.random((10, 10)); d += d.T; i = np.triu_indices(10, 1)
    m = C.mantel(d, TWO, 999); assert m['rho'] == pytest.approx(spearmanr(d[i], C.lca_ranks(TWO)[i])[0])
    assert C.mantel(C.lca_ranks(TWO).astype(float), TWO, 999)['rho'] == pytest.approx(1)
    ps = [C.mantel(d + d.T, TWO, 99, s)['p'] for s in range(60) for d in [np.random.default_rng(s + 1).random((10, 10))]]
    assert .02 < np.mean(np.array(ps) <= .2) < .4 and C.mantel(np.ones((10, 10)), TWO)['rho'] is None

def test_intervals_cover():
    inside = [0, 0]
    for s in range(120):
        x = np.random.default_rng(s).normal(size=80)
        for k in (0, 1): r = C.resample(lambda i: x[i].mean(), 80, 200, bool(k), s); inside[k] += r['lo'] <= 0 <= r['hi']
    assert all(.86 < n / 120 <= 1 for n in inside)

def test_constant_and_tiny():
    y = torch.arange(60) % 8; paths = np.array([[0]]*4 + [[1]]*4); dead = torch.ones(60, 4)
    out = C.consistency(C.judge_arm([(dead, dead)]*2, y, y, paths), y, paths, 10)
    p = out['pairs']['0-1']; assert out['hcs']['value'] == 0 and p['cka']['value'] is None and p['nestedness']['value'] is None and out['levels'][0]['mantel']['rho'] is None
    json.dumps(out, allow_nan=False)
    with pytest.raises(HJEPAError, match='clusters'): C.clusters(dead[:3], 4)
    with pytest.raises(HJEPAError, match='at least 3'): C.triplets(dead[:2], dead[:2])
    with pytest.raises(HJEPAError, match='no image'): C.centroid_distances(dead, torch.zeros(60, dtype=torch.int64), 8)
    assert C.triplets(torch.tensor([[0.], [1.], [3.]]), torch.tensor([[0.], [1.], [3.]])).mean() == 1

def test_arms_of_ours_and_foreign():
    y = torch.arange(40) % 8; x = images(40)
    for model, twin in ((untrained(tiny()), untrained(tiny(seed=1))), (f := foreign('timm:resnet18', 32, pretrained=False), f)):
        sup = C.supervised(twin, x, y, replace(quick, least=2, epochs=0, batch=8))
        assert any(not torch.equal(a, b) for a, b in zip(sup.levels(x[:4]), twin.levels(x[:4]))) and [t.shape for t in sup.levels(x[:4])] == [t.shape for t in twin.levels(x[:4])]
        arms = C.read_arms(model, twin, sup, x[:30], x[30:]); assert set(arms) == set(C.titles)
        assert all(len(l) == len(model.grids) and all(a.shape[1] == b.shape[1] for a, b in l) for l in arms.values()) and torch.equal(arms['pooled_l0'][0][0], arms['hjepa'][0][0])

def test_affinity_parts():
    y, n = torch.arange(300) % 3, 300
    g = torch.Generator().manual_seed(0); good, bad = torch.eye(3)[y]*5 + torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    tasks = [A.Task('t', 'coarse', y[:200].clone(), y[200:].clone())]; tasks[0].yt[:10] = -1        # without an answer
    right = A.answers([(bad[:200], bad[200:]), (good[:200], good[200:])], tasks, 150, 2); assert right['t'].shape == (2, 90)
    m = A.matrix(right, tasks, 200)['t']; assert m['levels'][1]['value'] > .9 and m['slope']['lo'] > .3 and abs(m['levels'][0]['value']) < .3
    assert A.chance(A.Task('t', '', torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1, -1]))) == pytest.approx(1/3)
    assert A.best_levels(right)['t']['level'] == 1 and A.best_levels(right)['t']['p']['0'] < .01
    for L in (2, 3): # luck hits one expectation in L
        e = ['coarse', 'fine']; a = np.eye(L)[[L-1, 0]]; assert A.hits(a, e)['hits'] == 2 and A.hits(a, e)['p'] == pytest.approx(1/L**2, abs=.02)

def test_flip_test_is_exact_on_few(): # against all sign patterns
    d = np.array([.5, -.2, .9, .4, .1, .7, -.3, .8]); every = np.array([abs((np.array(s) * d).sum()) for s in itertools.product((-1, 1), repeat=8)])
    assert A.flip_test(d, 20000) == pytest.approx((every >= abs(d.sum()) - 1e-9).mean(), abs=.01)

def test_holm_against_definition():
    p = np.random.default_rng(0).random(12)**3; out = A.holm(p); o = np.sort(p)
    assert np.allclose(np.sort(out), [min(1, max(o[j] * (12 - j) for j in range(i + 1))) for i in range(12)]) and (out >= p).all()

def test_scene_tasks():
    (_, a), (_, b) = scenes(50, 16), scenes(20, 16, seed=1); tasks = A.scene_tasks(a, b)
    assert {t.name for t in tasks} == {*A.EXPECT['scenes'], *A.OPEN['scenes']} and all(len(t.y) == 50 and len(t.yt) == 20 for t in tasks)
    assert all((t.expect == A.EXPECT['scenes'].get(t.name, '')) for t in tasks)

@pytest.mark.parametrize('file', sorted((ROOT/'results').glob('consistency_*.json')) + sorted((ROOT/'results').glob('affinity_*.json')), ids=lambda f: f.name)
def test_results_are_whole(file): # what the notebooks read
    r = json.loads(file.read_text()); assert r['command'].startswith('python bench/') and r['commit'] and len(file.read_text()) < 400_000
    if 'arms' in r: assert set(r['arms']) == set(C.titles)
    bad = [v for v in walk(r) if isinstance(v, dict) and {'value', 'lo', 'hi'} <= set(v) and v['value'] is not None and not v['lo'] - .01 <= v['value'] <= v['hi'] + .01]
    assert not bad

def walk(o):
    yield o
    for v in (o.values() if isinstance(o, dict) else o if isinstance(o, list) else ()): yield from walk(v)
