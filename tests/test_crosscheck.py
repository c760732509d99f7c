"Every judge against an independent implementation, on random and degenerate inputs; at chance where nothing is to be known; and the test split read once."
import json, math
from collections import Counter
import numpy as np, pytest, torch
import torch.nn.functional as F
from scipy import linalg, stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_cohen_kappa
import hjepa.cli as cli
from hjepa.config import HJEPAError
from hjepa.data.sets import ImageSet
from hjepa.evaluate import probes as pr, quality as q
from hjepa.evaluate.suite import SUITES, evaluate
from hjepa.model import HJEPA, build
from tiny import images, tiny

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def clouds(n=400, m=300, d=24, k=4, spread=.7, seed=0): # correlated features of k overlapping classes: training, then test
    y = torch.arange(n + m) % k
    x = (rand(k, d, seed=seed)[y]*spread + rand(n + m, d, seed=seed + 1)) @ (rand(d, d, seed=seed + 2) * torch.logspace(0, -2, d)) + 3
    return x[:n], y[:n], x[n:], y[n:]

DATA = clouds()
tokens = lambda x: x[:, None].repeat(1, 3, 1)
PROBES = dict(linear=pr.linear_probe, knn=pr.knn_probe, few_shot=lambda *a: pr.few_shot(*a, shots=3, tries=4), sgd=lambda *a: pr.sgd_probe(*a, norm=True, steps=60, batch=64),
              attentive=lambda x, y, xt, yt: pr.attentive_probe(tokens(x), y, tokens(xt), yt, epochs=12, batch=32, lr=3e-3))
each = pytest.mark.parametrize('probe', PROBES)

# ---- k-NN, logistic regression, accuracy

@pytest.mark.parametrize('k', [1, 5, 20, 200])
@pytest.mark.parametrize('data', [DATA, clouds(60, 200, 5, 3, 2., 7)])
def test_knn_is_sklearns(data, k):
    x, y, xt, yt = (t.numpy() for t in data); s, k = pr.knn_probe(*data, k=k), min(k, len(x))
    z, zt = (x - x.mean(0))/x.std(0), (xt - x.mean(0))/x.std(0)
    sk = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((d.min(1, keepdims=True) - d)/.07)).fit(z.astype('f8'), y)
    p = sk.predict_proba(zt.astype('f8')); top = np.sort(p, 1)
    sure = top[:, -1] - top[:, -2] > 1e-4                                 # rounding may decide the others
    assert sure.mean() > .9 and ((p.argmax(1) == yt) == s.correct)[sure].all()

def test_knn_of_copies_and_constants():
    x, y, xt, yt = DATA
    twice = pr.knn_probe(x.repeat(2, 1), y.repeat(2), xt, yt, k=10); once = pr.knn_probe(x, y, xt, yt, k=5)
    assert (twice.correct == once.correct).mean() > .99                   # each neighbour twice is the same vote
    assert set(pr.knn_predict(torch.zeros(9, 3), torch.arange(9) % 3, torch.zeros(4, 3), 3).tolist()) <= {0, 1, 2}

@pytest.mark.parametrize('C', [1e-3, .1, 10.])
@pytest.mark.parametrize('data', [DATA, clouds(200, 100, 300, 3, .3, 3), tuple(t[:, [0, 0, 1, 2]] if t.ndim == 2 else t for t in clouds(seed=5))]) # narrow; wide; with a copy
def test_logistic_regression_is_sklearns(data, C):
    x, y, xt, yt = data
    head, (z, zt) = pr.LinearHead(x, y, Cs=(C,)), (t.double().numpy() for t in pr.standardise(x, xt))
    sk = LogisticRegression(C=C, tol=1e-9, max_iter=10000).fit(z, y)
    np.testing.assert_allclose(head.logits(xt).softmax(1).numpy(), sk.predict_proba(zt), atol=5e-3)              # wide and separable, the valley is flat
    assert abs((head(xt) == yt).float().mean().item() - sk.score(zt, yt)) <= .01
    s = pr.linear_probe(*data, Cs=(C,)); assert (s.correct == (head(xt) == yt).numpy()).all() and s.C == head.C == C

def test_search_of_C_is_sklearns():
    x, y, xt, yt = DATA; (z, zt), (fit, val) = pr.standardise(x, xt), pr.held_out(y)
    losses = []
    for C in pr.C_grid:
        p = LogisticRegression(C=C, tol=1e-8, max_iter=10000).fit(z[fit].double(), y[fit]).predict_proba(z[val].double())
        losses.append(-np.log(p[np.arange(len(val)), y[val]]).mean())
    s = pr.linear_probe(*DATA, rise=math.inf)
    assert s.C == pr.C_grid[int(np.argmin(losses))] and abs(s.loss - min(losses)) < .01*min(losses)

def test_accuracy_and_kappa_are_torchmetrics():
    a, b, y = (torch.from_numpy(np.random.default_rng(i).integers(0, 5, 500)) for i in range(3))
    s, t = pr.score(a, y, val=0.), pr.score(b, y, val=0.)
    assert abs(s.acc - multiclass_accuracy(a, y, 5, average='micro').item()) < 1e-6
    assert abs(q.error_consistency(s.correct, t.correct) - multiclass_cohen_kappa(*(torch.from_numpy(o.correct).long() for o in (s, t)), 2).item()) < 1e-5
    lo, hi = stats.binomtest(int(s.correct.sum()), 500).proportion_ci(.95, 'wilson'); assert abs(s.lo - lo) < .012 and abs(s.hi - hi) < .012
    assert abs(q.agreement(a, b) - (a == b).float().mean().item()) < 1e-6

# ---- nothing to know, everything to know, the same again

@each
def test_shuffled_labels_are_at_chance(probe):
    x, y, xt, yt = clouds(600, 1200, spread=2., seed=11); g = torch.Generator().manual_seed(2)
    y, yt = (t[torch.randperm(len(t), generator=g)] for t in (y, yt))     # of both: clusters guessed alike would fall together, and an interval over images not hold
    s = PROBES[probe](x, y, xt, yt)
    if probe == 'few_shot': assert abs(s['acc'] - .25) < .04              # its interval is over draws of labels, tested on the same images
    else: assert s.lo <= .25 <= s.hi

@each
def test_perfect_features_are_right(probe):
    y = torch.arange(500) % 4; x = F.one_hot(y, 8)*4. + .01*rand(500, 8)
    s = PROBES[probe](x[:300], y[:300], x[300:], y[300:]); assert (s['acc'] if isinstance(s, dict) else s.acc) == 1.

@each
def test_constant_features_are_at_chance(probe):
    y = torch.arange(500) % 4; x = torch.full((500, 8), .1)
    s = PROBES[probe](x[:300], y[:300], x[300:], y[300:]); assert (s['acc'] if isinstance(s, dict) else s.acc) == .25

@each
def test_same_again(probe):
    state = torch.get_rng_state(); a, b = PROBES[probe](*DATA), PROBES[probe](*DATA); assert state.equal(torch.get_rng_state())
    assert a == b if isinstance(a, dict) else a.json() == b.json() and (a.correct == b.correct).all()

# ---- bad input: a sentence each

def put(t, i, v): t = t.clone(); t[i] = v; return t
x, y, xt, yt = DATA
BAD = {'NaN in training': ((put(x, [1, 4], math.nan), y, xt, yt), '2 of 400 rows of the training features'),
       'Inf in test': ((x, y, put(xt, 7, math.inf), yt), '1 of 300 rows of the test features'),
       'one class': ((x, y*0 + 2, xt, yt), 'same label, 2'),
       'labels missing in training': ((x, put(y, [0, 3], -1), xt, yt), '2 of 400 training images have no label'),
       'labels missing in test': ((x, y, xt, put(yt, 0, -1)), '1 of 300 test images have no label'),
       'every image its own class': ((x[:4], y[:4], xt, yt), ('only one of its class', 'lower shots')),
       'widths': ((x, y, xt[:, :5], yt), '24 wide and test features'),
       'number': ((x, y[:5], xt, yt), 'one label a row'),
       'no rows': ((x[:0], y[:0], xt, yt), 'nothing at all'), 'no test rows': ((x, y, xt[:0], yt[:0]), 'nothing at all'),
       'whole features': ((x.long(), y, xt.long(), yt), 'floating-point numbers'), 'broken labels': ((x, y.float(), xt, yt), 'whole numbers'),
       'no tensors': ((x, y.tolist(), xt, yt), 'labels must be a tensor'), 'labels as one-hot': ((x, F.one_hot(y), xt, yt), ' and must be ')}

@each
@pytest.mark.parametrize('bad', BAD)
def test_bad_input_is_a_sentence(probe, bad):
    args, needle = BAD[bad]
    with pytest.raises(HJEPAError) as e: PROBES[probe](*args)
    said = str(e.value).replace('3 x 24', '24').replace('3 x 5', '5')
    assert any(n in said or probe == 'attentive' and 'tokens (N,M,D)' in said for n in ((needle,) if isinstance(needle, str) else needle)), said
    assert '\n' not in said and said[0].isupper() or said[0].isdigit()

@each
def test_a_class_that_was_never_seen_counts_as_wrong(probe):
    z = torch.where(yt == 1, 9, yt)
    with pytest.warns(UserWarning, match=r'75 of 300 test images are of classes that no training image has \(9\)'): s = PROBES[probe](x, y, xt, z)
    right = s['acc'] if isinstance(s, dict) else s.acc; assert right <= .75 and (isinstance(s, dict) or not s.correct[z == 9].any())

def test_wrong_shapes_of_the_others():
    for f, n in ((lambda: pr.attentive_probe(x, y, xt, yt), 'cells()'), (lambda: pr.linear_probe(tokens(x), y, tokens(xt), yt), '(N,F)'), (lambda: pr.attentive_probe(tokens(x), y, tokens(xt), yt, heads=5), 'heads'),
                 (lambda: pr.few_shot(x, y, xt, yt, shots=0), 'at least 1'), (lambda: pr.knn_probe(x, y, xt, yt, k=0), 'neighbour'), (lambda: pr.equal_width(x, xt, 0), 'width'),
                 (lambda: pr.sgd_probe(x*1e30, y, xt*1e30, yt, steps=5), 'diverged')):
        with pytest.raises(HJEPAError) as e: f()
        assert n in str(e.value)

# ---- numbers without labels

SPECTRA = dict(random=rand(60, 12), wide=rand(20, 50), scaled=rand(80, 10)*torch.logspace(0, -6, 10), far=rand(60, 12) + 1e3, copies=rand(30, 4).repeat(2, 3), rank_one=rand(50, 1) @ rand(1, 9),
               two=torch.tensor([[1., 2.], [3., 1.]]), half_constant=torch.cat([rand(40, 3), torch.full((40, 5), .1)], 1))

@pytest.mark.parametrize('name', SPECTRA)
def test_ranks_are_those_of_the_singular_values(name):
    a = SPECTRA[name].double().numpy(); s, raw = linalg.svdvals(a - a.mean(0)), linalg.svdvals(a)
    s = s[s > 3e-7*s[0]]                                                  # squares below 1e-13 of the first are rounding, there as here
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-3)
    erank = math.exp(stats.entropy(s)); t = SPECTRA[name]
    close(q.effective_rank(t), erank); close(q.erank_over_dim(t), erank/a.shape[1])
    close(q.participation_ratio(t), (s**2).sum()**2/(s**4).sum()); close(q.stable_rank(t), (s**2).sum()/(s**2).max())
    p = raw/raw.sum() + 1e-7; close(q.rankme(t), math.exp(-(p*np.log(p)).sum()))

def test_decay_is_a_fitted_line():
    a = rand(3000, 60)*torch.arange(1, 61)**-.7
    lam = linalg.svdvals((a - a.mean(0)).double().numpy())**2; i = np.arange(11, 31)
    fit = stats.linregress(np.log(i), np.log(lam[10:30])); np.testing.assert_allclose(q.alpha_req(a), (-fit.slope, fit.rvalue**2), rtol=1e-6)

def test_constants_have_no_rank():
    for v in (0., .1, 1e6): assert [f(torch.full((30, 5), v)) for f in (q.effective_rank, q.participation_ratio, q.stable_rank, q.erank_over_dim)] == [0]*4 and q.collapsed(torch.full((30, 5), v))

def test_a_spectrum_of_nothing_is_a_sentence():
    for bad, n in ((put(x, [2, 3], math.nan), '2 of 400 rows'), (x[:1], 'at least 2')):
        with pytest.raises(HJEPAError) as e: q.spectrum(bad)
        assert n in str(e.value)

def hsic(k, l): # debiased, from its definition with sums over pairs, triples and quadruples without repetition (Song et al. 2012)
    n = len(k); one = np.ones(n); a, b = (m - np.diag(np.diag(m)) for m in (k, l))
    return (np.trace(a @ b) + one @ a @ one * (one @ b @ one)/((n - 1)*(n - 2)) - 2/(n - 2)*(one @ a @ b @ one))/(n*(n - 3))
def gram_cka(x, y): k, l = (t.double().numpy() @ t.double().numpy().T for t in (x, y)); return hsic(k, l)/math.sqrt(hsic(k, k)*hsic(l, l))
def triples(k, l): # the same by counting
    n, t2, t3, t4 = len(k), 0., 0., 0.
    for i in range(n):
        for j in range(n):
            if j == i: continue
            t2 += k[i, j]*l[i, j]
            for m in range(n):
                if m in (i, j): continue
                t3 += k[i, j]*l[i, m]
                t4 += sum(k[i, j]*l[m, r] for r in range(n) if r not in (i, j, m))
    p = lambda c: math.perm(n, c)
    return t2/p(2) + t4/p(4) - 2*t3/p(3)

PAIRS = dict(random=(rand(40, 6), rand(40, 9, seed=1)), alike=(rand(40, 6), rand(40, 6) @ rand(6, 9, seed=1)), wide=(rand(12, 50), rand(12, 30, seed=1)), copies=(rand(20, 4).repeat(2, 1), rand(20, 5, seed=1).repeat(2, 1)),
             rank_one=(rand(30, 1) @ rand(1, 5), rand(30, 1) @ rand(1, 3, seed=2)), far=(rand(40, 6) + 100, rand(40, 6, seed=3) - 100), same=(rand(25, 3),)*2)

@pytest.mark.parametrize('name', PAIRS)
def test_cka_is_that_of_the_gram_matrices(name):
    a, b = PAIRS[name]; np.testing.assert_allclose(q.cka(a, b), gram_cka(a - a.mean(0), b - b.mean(0)), atol=1e-9)
    assert abs(q.cka(a, b) - q.cka(b, a)) < 1e-12

def test_debiased_is_counting():
    a, b = (t.double() - t.double().mean(0) for t in (rand(7, 3), rand(7, 2, seed=1))); k, l = ((t @ t.T).numpy() for t in (a, b))
    np.testing.assert_allclose(hsic(k, l), triples(k, l), rtol=1e-9)
    np.testing.assert_allclose(q.cka(a, b), triples(k, l)/math.sqrt(triples(k, k)*triples(l, l)), rtol=1e-9)

@pytest.mark.parametrize('v', [0., .1, 1/3, 1e6])
def test_cka_of_constants_is_no_number(v):
    for n, kind in ((10, torch.float32), (37, torch.float64), (999, torch.float64)):
        c = torch.full((n, 5), v, dtype=kind); assert math.isnan(q.cka(c, rand(n, 4))) and math.isnan(q.cka(rand(n, 4), c)) and math.isnan(q.cka(c, c))

def test_alignment_and_uniformity_pair_by_pair():
    a, b = rand(40, 5), rand(40, 5) + .3*rand(40, 5, seed=1); u, w = (t.double().numpy() for t in (a, b)); u, w = (t/np.linalg.norm(t, axis=1, keepdims=True) for t in (u, w))
    np.testing.assert_allclose(q.alignment(a, b), np.mean([((i - j)**2).sum() for i, j in zip(u, w)]))
    np.testing.assert_allclose(q.uniformity(a), np.log(np.mean([np.exp(-2*((u[i] - u[j])**2).sum()) for i in range(40) for j in range(i)])))
    assert q.uniformity(torch.ones(9, 3)) == 0 and q.alignment(a, 7*a) < 1e-12 and abs(q.alignment(a, -a) - 4) < 1e-9

def test_lidar_is_a_generalised_eigenproblem():
    z = rand(30, 1, 6)*2 + rand(30, 5, 6, seed=1)*torch.logspace(0, -1, 6); a = z.double().numpy(); m = a.mean(1)
    within = sum(np.outer(d, d) for d in (a - m[:, None]).reshape(-1, 6))/(30*4) + 1e-4*np.eye(6); between = np.cov(m.T)
    lam = linalg.eigh(between, within, eigvals_only=True); p = lam/lam.sum() + 1e-8
    np.testing.assert_allclose(q.lidar(z), math.exp(-(p*np.log(p)).sum()), rtol=1e-9)

# ---- the benchmark's command

def test_bench_eval(tmp_path, capsys):
    words = 'bench eval --image 32 --batch 4 --n 4 --rounds 1 --knn 300 100 8 --linear 300 100 8 --device cpu --threads 1 --json'.split()
    assert cli.main([*words, str(tmp_path/'e.json')]) == 0
    r, said = json.loads((tmp_path/'e.json').read_text()), capsys.readouterr().out
    assert r['knn']['peak_bytes'] > 1e8 and set(r['features']['sides']) == {'timm alone', 'timm, by levels', 'ours, by levels'} and [w['C'] for w in r['linear']['rows']] == [None, .01, 1.]
    assert {'commit', 'device', 'threads', 'torch', 'timm', 'sklearn', 'load', 'load_after', 'seconds'} <= r.keys() and 'images/s' in said and said.count(': ') > 5
    assert cli.main(['bench', 'eval', '--threads', '0']) == 2 and 'at least 1' in capsys.readouterr().err

# ---- the test split: read once, and never to choose

N, M = 60, 40
def sets(test=None, labels=None):
    f = lambda x, y, split: ImageSet('scenes', split, x, y, ('a', 'b', 'c'), 'made for a test')
    y = lambda n: torch.arange(n) % 3
    return f(images(N), y(N), 'train'), f(images(M, seed=1) if test is None else test, y(M) if labels is None else labels, 'test')

def run(out, **kw):
    r = tiny(); m = build(r)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    SUITES['read'] = ('few_shot', 'readouts')
    try: return evaluate(m.eval(), build(r).eval(), r, *sets(**kw), out, 'read', N, 0, progress=False, umap=False)
    finally: del SUITES['read']

TIMES = ('seconds', 'date', 'load')
def without(o, *keys): # a report without some keys, at any depth
    if isinstance(o, dict): return {k: without(v, *keys) for k, v in o.items() if not any(w in k for w in keys)}
    return [without(v, *keys) for v in o] if isinstance(o, list) else o

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    seen, ways, out = Counter(), (HJEPA.read, HJEPA.levels), tmp_path_factory.mktemp('card')
    def counted(f):
        def g(self, x, *a, **k):
            for im in x: seen[sum(float(p.detach().double().sum()) for p in self.parameters()), im.numpy().tobytes()] += 1
            return f(self, x, *a, **k)
        return g
    HJEPA.read, HJEPA.levels = map(counted, ways)
    try: first = run(out); once = Counter(seen); again = run(out); twice = Counter(seen)
    finally: HJEPA.read, HJEPA.levels = ways
    return first, once, again, twice

def test_test_pixels_are_encoded_once_by_each_network(report):                # for the card and for parts that read the same images
    first, once, again, twice = report; test = [im.numpy().tobytes() for im in sets()[1].images]
    nets = {k[0] for k in once}; assert len(nets) == 2
    assert {once[n, t] for n in nets for t in test} == {1}                 # model and twin, once each: its levels and the pooled control together
    real = lambda c: {k: v for k, v in c.items() if any(k[1])}             # without the black one whose FLOPs are counted
    assert real(once) == real(twice) and first == again and {p for p in first['parts'] if first['parts'][p]['rows']} == {'few_shot', 'readouts'}   # nor a second time, though the features are gone

def test_test_labels_choose_nothing(report, tmp_path):
    r, y = report[0], sets()[1].labels; poisoned = run(tmp_path, labels=y[torch.randperm(M, generator=torch.Generator().manual_seed(4))])
    answers = ('acc', 'lo', 'hi', 'diff', 'verdict', 'key', 'agreement', 'error_consistency', 'each', 'rows', 'text', *TIMES)
    assert without(r, *answers) == without(poisoned, *answers) and r['scores'] != poisoned['scores']
    chosen = lambda r: {(p, a, l): (s['C'], s['val'], s['loss']) for p, by in r['scores'].items() for a, ls in by.items() for l, s in ls.items()}
    assert chosen(r) == chosen(poisoned) and any(c[0] for c in chosen(r).values()) and {p: h['level'] for p, h in r['headline'].items()} == {p: h['level'] for p, h in poisoned['headline'].items()}

def test_test_pixels_choose_nothing(report, tmp_path):
    r, poisoned = report[0], run(tmp_path, test=255 - images(M, seed=9)); pick = lambda r: [[(s['C'], s['val'], s['loss']) for ls in by.values() for s in ls.values()] for by in r['scores'].values()]
    assert pick(r) == pick(poisoned) and r['collapse'] == poisoned['collapse'] and {p: h['level'] for p, h in r['headline'].items()} == {p: h['level'] for p, h in poisoned['headline'].items()}

def test_same_seed_same_card(report, tmp_path):
    assert without(report[0], *TIMES) == without(run(tmp_path), *TIMES)
