"The procedural world: same bytes everywhere, nothing leaks, and everything that is said about a picture is true of its pixels."
import inspect, re, subprocess, sys
from collections import Counter
import numpy as np, pytest, torch
from scipy.stats import binom
from tiny import ENV
from hjepa.config import HJEPAError
from hjepa.data import motion as M, scenes as S
from hjepa.data.motion import LIMIT, actions, video, volume
from hjepa.data.sets import load
from hjepa.data.truth import NUMBERS, truth

# ---- the same bytes
SUMS = """import hashlib, torch; torch.set_num_threads({}); from hjepa.data.scenes import scenes; from hjepa.data.motion import video, volume
h = lambda t: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]
print(*(h(scenes(n, size, seed, start)[0]) for n,size,seed,start in ((40,32,0,7), (20,64,1,0), (3,97,-5,2**40), (2,256,3,0))), h(video(2, 9, 48, seed=4).frames), h(volume(3, 32, seed=5).images))"""
WANT = '0cb58a92936dbc14 0729b66c91c67c83 9258cba87cb12f84 ca6d4edbbd72f418 86fa1adbf06b76fd 6312c91024f5461a'

def fast_loops():
    "The processor's features for which numpy has loops of their own, beyond those that it cannot do without"
    try: from numpy._core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f
    except ImportError: from numpy.core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f
    return [k for k in d if f.get(k)]

@pytest.mark.parametrize('threads,off', [(1, ''), (2, ''), (1, ' '.join(fast_loops())), (1, ' '.join(fast_loops()[1:]))])
def test_same_bytes_on_any_processor_and_thread_count(threads, off):
    env = ENV | (dict(NPY_DISABLE_CPU_FEATURES=off) if off else {})
    out = subprocess.run([sys.executable, '-c', SUMS.format(threads)], env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert out == WANT

def test_only_operations_that_round_in_one_way():
    "What IEEE 754 leaves open must not stand between the hash and the pixel"
    for m in (S, M): assert not re.search(r'np\.(sin|cos|tan|arctan2?|exp|log|hypot|power|sum|mean|dot|einsum|matmul|cbrt)\b|\.sum\(|\.mean\(|@ ?[a-z]+\.T', inspect.getsource(m)), m

def test_any_part_in_any_order():
    x, y = S.scenes(1100, 32, seed=3)                        # more than one chunk of factors
    for a, b in ((0, 1), (500, 30), (1090, 10)):
        p, q = S.scenes(b, 32, seed=3, start=a)
        assert torch.equal(p, x[a:a+b]) and all(torch.equal(q[k], y[k][a:a+b]) or k in ('turn', 'tilt', 'ground_tilt') for k in y)
        assert all(torch.equal(q[k].nan_to_num(9), y[k][a:a+b].nan_to_num(9)) for k in ('turn', 'tilt', 'ground_tilt'))

def test_what_cannot_be_drawn_is_refused_in_a_sentence():
    bads = [(dict(n=-1), 'n ≥ 0'), (dict(n=1, start=-1), 'start ≥ 0'), (dict(n=1, size=15), '16 or more'), (dict(n=1.5), 'integers'),
            (dict(n=2, size=64.), 'integers'), (dict(n=2, seed=.5), 'integers'), (dict(n=2, start='3'), 'integers'), (dict(n=10**6, size=256), 'GB')]
    for bad, why in bads:
        for f in (S.scenes, truth, volume):
            with pytest.raises(HJEPAError, match=why): f(**bad)
    S.check(651041, 64)                                      # 7.99999 GB, and one more is too much
    with pytest.raises(HJEPAError, match='8.0 GB, more than 8'): S.check(651042, 64)
    with pytest.raises(HJEPAError, match='GB'): video(10, 10**6, 32)           # all frames count
    with pytest.raises(HJEPAError, match='GB'): volume(10, 1000)               # and all slices
    with pytest.raises(HJEPAError, match='T=2.5'): video(1, 2.5)

def test_a_larger_picture_shows_the_same_scene():
    a, b = truth(40, 32, seed=21), truth(40, 128, seed=21)
    assert a.graph == b.graph and a.captions == b.captions and a.order == b.order and torch.equal(a.classes, b.classes)
    coarse = b.ids.view(40, 32, 4, 32, 4)[:, :, 1:3, :, 1:3].permute(0, 1, 3, 2, 4).flatten(3)   # the four pixels around the middle of a large one
    sure = (coarse == coarse[..., :1]).all(-1)
    assert sure.float().mean() > .8 and (coarse[..., 0] == a.ids)[sure].float().mean() > .998
    both = (a.boxes >= 0).all(-1); off = (a.boxes*4 - b.boxes).abs()[both]
    assert off.float().mean() < 2 and off.max() <= 12        # in pixels of the large picture; a point of a star thinner than a pixel is not seen
    for size in (33, 50, 224): assert S.scenes(2, size)[0].shape == (2, 3, size, size)

# ---- what is said is true
def test_every_object_is_seen_whole_and_inside():
    t = truth(600, 64, seed=31); p = S.params(600, 31)
    k = t.labels['count'] + 1
    assert all(len(t.order[i]) == k[i] and t.masks(i).flatten(1).any(1).all() for i in range(600))       # also the smallest, from 64 pixels on
    small = truth(600, 32, seed=31); missing = sum(int((~small.masks(i).flatten(1).any(1)).sum()) for i in range(600))
    assert missing < .005*k.sum(), missing
    reach = np.array([S.REACH[s] for s in S.SHAPES])[p['cls']]*p['radius']
    assert ((np.abs(p['xy'])+reach[..., None])[p['cls'] >= 0] < 1).all()
    assert ((t.ids > 0) == (t.semantic > 1)).all() and ((t.semantic == 0) | (t.semantic == 1))[t.ids == 0].all()
    g = (torch.arange(64) + .5)/32 - 1
    assert (((t.semantic == 0) == (g[None, :, None] < t.labels['horizon'][:, None, None])) | (t.ids > 0)).all()

def test_occlusion_order_and_hidden_parts():
    t = truth(400, 96, seed=32); p = S.params(400, 32); got = []
    for i in range(400):
        seen = (t.ids[i].flatten().bincount(minlength=12)[1:]*4/96**2/np.pi).numpy()
        for j in range(1, p['count'][i]+1):
            if p['inner'][i, j]: continue
            own = [j] + [l for l in range(1, 11) if p['inner'][i, l] and (p['xy'][i, l] == p['xy'][i, j]).all()]      # what lies inside hides none of it
            hidden = 1 - seen[own].sum()/p['radius'][i, j]**2
            if p['behind'][i, j]: got.append((hidden, p['on'][i, j])); assert hidden < .65 and t.order[i].index(j) < t.order[i].index(0)
            else: assert abs(hidden) < .15 and t.order[i].index(j) > t.order[i].index(0)
    assert len(got) > 100 and np.corrcoef(np.array(got).T)[0, 1] > .85         # as much is hidden as was drawn

def test_relations_are_consistent():
    t = truth(200, 32, seed=33)
    for i, g in enumerate(t.graph):
        assert len(set(g)) == len(g) and all(0 <= a <= t.labels['count'][i] and 0 <= b <= t.labels['count'][i] and a != b for a, _, b in g)
        has = lambda r: {(a, b) for a, q, b in g if q == r}
        for r in ('left-of', 'above'): assert not any((b, a) in has(r) for a, b in has(r))                # never both ways,
        assert not {(a, b) for a, b in has('inside')} & (has('left-of') | has('above'))                   # never inside and beside
        assert not any((a, b) in has('touching') or (b, a) in has('touching') for a, b in has('inside'))
    rows = [i for i in range(200) if t.labels['layout'][i] == S.LAYOUTS.index('nested')]
    assert rows and all(len([1 for _, q, b in t.graph[i] if q == 'inside' and b > 0]) == (t.labels['count'][i]//2) for i in rows)

HUES = [*zip(S.COLOURS, S.RGB), ('yellow', np.array([1, .75, .05])), ('lime', np.array([.6, .9, .05]))]

def hue(rgb):
    "The name of the nearest hue, whatever the light"
    unit = lambda v: (v - v.mean())/np.linalg.norm(v - v.mean())
    return max(HUES, key=lambda h: unit(h[1])@unit(rgb))[0]

def test_captions_are_true_of_the_pixels():
    n, size = 250, 128; t = truth(n, size, seed=34); g = (np.arange(size) + .5)/(size/2) - 1; x, y = np.meshgrid(g, g); nested, edges = 0, []
    read = re.compile(r'a \w+ (\w+) (\w+) with [^,]*, (.*); (\w+) small (\w+) (disc|square|cross)(?:e?s)?(?:, a (\w+) one inside (it|each|\w+ of them)| in a \w+| scattered)?; .* ground, (high|low) horizon, .* light from (.*)')
    for c, im, ids, sem, cls in zip(t.captions, t.images.numpy()/255, t.ids.numpy(), t.semantic.numpy(), t.classes.tolist()):
        colour, shape, place, many, tint, kind, inner, where, horizon, side = read.fullmatch(c).groups()
        pixels = lambda j: np.median(im[:, ids == j], 1)
        outer = NUMBERS.index(many) + 1; within = 0 if not inner else outer if where in ('it', 'each') else NUMBERS.index(where.split()[0]) + 1; nested += within > 0
        assert Counter(hue(pixels(j)) for j in range(2, ids.max() + 1)) == Counter({tint: outer}) + Counter({inner: within}), c   # companions, counted by colour
        assert hue(pixels(1)) == colour and [S.SHAPES[k] for k in cls if k >= 0] == [shape] + [kind]*(outer + within), c
        for axis, less, more in ((x, 'left', 'right'), (y, 'above', 'below')):
            off = axis[ids == 1].mean()                      # what hides a part of it moves the middle of what is seen
            assert off < .03 if less in place else off > -.03 if more in place else abs(off) < .13, (c, off)
        ground = ids == 0; sky = sem[ground] == 0
        top = np.flatnonzero((sem == 1).any(1))[0]; assert top <= size//2 if horizon == 'high' else top >= size//2, c     # the first row of ground
        a = np.stack([np.ones(ground.sum()), sky, x[ground], y[ground]], 1)
        _, edge, *light = np.linalg.lstsq(a, im.mean(0)[ground], rcond=None)[0]                     # how the ground grows brighter
        edges.append(abs(edge)); assert np.array(light)@dict(zip(('the right', 'below', 'the left', 'above'), ((1, 0), (0, 1), (-1, 0), (0, -1))))[side] > .04, (c, light)
    assert nested > 30 and np.median(edges) > .02            # and a step between sky and ground is where the map has it

def test_relations_are_true_of_the_map():
    t = truth(150, 128, seed=35); n = Counter()
    for g, b, ids in zip(t.graph, t.boxes.tolist(), t.ids.numpy().astype(int)):
        pairs = np.concatenate([np.stack([ids[1:], ids[:-1]], -1).reshape(-1, 2), np.stack([ids[:, 1:], ids[:, :-1]], -1).reshape(-1, 2)])
        meet = {(u - 1, v - 1) for u, v in np.unique(np.sort(pairs, 1), axis=0).tolist() if 0 < u < v}             # side by side on the map of what is seen
        assert {(i, j) for i, r, j in g if r == 'touching'} == {(i, j) for i, j in meet if not {(i, 'inside', j), (j, 'inside', i)} & set(g)}
        for i, r, j in g:
            n[r] += 1
            if r == 'left-of': assert b[i][2] <= b[j][0]
            if r == 'above': assert b[i][3] <= b[j][1]
    assert min(n['left-of'], n['above'], n['inside'], n['touching']) > 50

# ---- nothing leaks
QUESTIONS = [k for f in S.FACTORS.values() for k in f]

def cheap(p, size=32):
    im, ids = S.render(p, size, ids=True); n = len(im)
    z = lambda f: (f - f.mean(0))/f.std(0)
    pairs = lambda f: np.concatenate([f, *(f[:, i:i+1]*f[:, i:] for i in range(f.shape[1]))], 1)
    mean, area = z(im.mean((2, 3))), z((ids > 0).mean((1, 2))[:, None])
    e = size//8; corners = z(np.stack([im[:, :, a:, b:][:, :, :e, :e].mean((2, 3)) for a in (0, -e) for b in (0, -e)], 1).reshape(n, 12))
    return dict(corners=(corners,)*2, mean=(pairs(mean), mean), area=(pairs(area), area), thumb=(z(im.reshape(n, 3, 4, size//4, 4, size//4).mean((3, 5)).reshape(n, 48)),)*2)

def leaks(p, y):
    "{(feature, factor): points above chance} that ridge regression or 30 neighbours read; all cells together err once in 1,000"
    out, k = {}, len(p['shape'])//2
    q = {a: [np.asarray(b) for b in S.classes(y, a)] for a in QUESTIONS}
    Y = np.concatenate([(np.arange(m) == v[:k, None]) - (v[:k, None] >= 0)/m for v, m in q.values()], 1)
    for name, (f, g) in cheap(p).items():
        a = f[:k].T@f[:k]; a[np.diag_indices(len(a))] += .01*k
        d = (g[:k]**2).sum(1) - 2*g[k:]@g[:k].T
        for score in (f[k:]@np.linalg.solve(a, f[:k].T@Y), Y[np.argpartition(d, 30, 1)[:, :30]].sum(1)):
            at = 0
            for b, (v, m) in q.items():
                ok = v[k:] >= 0; right = (score[ok, at:at+m].argmax(1) == v[k:][ok]).sum(); at += m
                if right > binom.isf(.001/(8*len(q)), ok.sum(), 1/m): out[name, b] = max(out.get((name, b), 0), right/ok.sum() - 1/m)
    return out

def test_cheap_features_know_only_what_they_may():
    p = S.params(10000, 41)
    found = leaks(p, S.labels(p))
    trace = {('thumb', 'shape'), ('thumb', 'turn')}          # of these at most 4 points above chance
    may = {('mean', 'bright'), ('area', 'size')} | {('corners', k) for k in 'colour light bright horizon'.split()} | {('thumb', k) for k in 'x y size colour light bright horizon'.split()}
    assert found.keys() <= may | trace, found
    assert all(found.get(k, 0) < .04 for k in trace), found
    assert found['corners', 'colour'] < .14, found           # the price of a mean that knows nothing, as the notebook says: no more than that
    assert found.keys() >= {('mean', 'bright'), ('area', 'size'), ('corners', 'colour')} | {('thumb', k) for k in 'colour light bright'.split()}    # the probes can see

def test_the_leak_test_can_fail():
    "Take away one precaution at a time: the probes find out"
    p = S.params(6000, 42); y = S.labels(p)
    assert ('mean', 'colour') in leaks(dict(p, back=np.broadcast_to(np.float32(.5), p['back'].shape)), y)      # a background that makes up for nothing
    q = dict(p, radius=p['radius'].copy()); q['radius'][:, 1:] = .1                                             # companions of one size
    assert ('area', 'count') in leaks(q, y)

def test_factors_are_what_load_hands_out():
    d = load('scenes', 'test', n=50); x, y = S.scenes(50, 32, seed=1)
    assert torch.equal(d.images[:], x) and d.classes == S.SHAPES and torch.equal(d.labels, y['shape']) and set(S.LEVELS) <= set(d.extra)
    assert all(len(v) == 50 and v.ndim == 1 for v in y.values()) and set(y) == set(QUESTIONS)

# ---- motion
def test_random_pushes_move_only_what_they_push():
    n, T = 12, 21
    a = actions(n, T, seed=51); still, moved = video(n, T, 32, seed=51), video(n, T, 32, seed=51, actions=a)
    for i in range(n):
        hit = {int(j) for j, dx, dy in a[i] if dx or dy}
        for j in range(int(still.labels['count'][i])+1):
            same = torch.equal(still.at[i, :, j], moved.at[i, :, j])
            assert same == (j not in hit) and torch.equal(still.velocity[i, :4, j], moved.velocity[i, :4, j])
    v = moved.velocity.nan_to_num(); assert v.abs().max() <= LIMIT
    free = (a[:, :-1, 1:] == 0).all(-1)                      # where nothing is pushed, speeds keep their size
    assert torch.equal(v[:, 1:].abs()[free], v[:, :-1].abs()[free])
    assert moved.at.abs().nan_to_num().max() < 1

def test_a_pushed_film_is_the_same_film_elsewhere():
    a = actions(6, 12, seed=52); whole = video(6, 12, 32, seed=52, actions=a)
    part = video(2, 7, 32, seed=52, start=3, actions=a[3:5, :7])
    assert torch.equal(part.frames, whole.frames[3:5, :7]) and torch.equal(part.ids, whole.ids[3:5, :7])
    assert torch.equal(actions(2, 12, seed=52, start=3), a[3:5])

def test_bad_films_are_refused():
    for kw in (dict(T=0), dict(T=3, actions=torch.zeros(1, 2, 3)), dict(T=2, actions=torch.tensor([[[-1., .1, 0], [0, 0, 0]]])), dict(T=2, size=8)):
        with pytest.raises(HJEPAError): video(1, **kw)
    with pytest.raises(HJEPAError, match='even'): volume(1, 31)

def test_volumes_are_uniform_and_larger_ones_show_the_same():
    y = volume(400, 16, seed=61).labels
    for k, m in (('count', 4), ('shape', 4), ('texture', 4)):
        v = y[k][:, 0] if y[k].ndim > 1 else y[k] - 1; assert (v.bincount(minlength=m) - 100).abs().max() < 45, k
    a, b = volume(6, 24, seed=62), volume(6, 48, seed=62)
    coarse = b.ids.view(6, 24, 2, 24, 2, 24, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4); sure = (coarse == coarse[..., :1]).all(-1)
    assert sure.float().mean() > .9 and (coarse[..., 0] == a.ids)[sure].float().mean() > .9995
