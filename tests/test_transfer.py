"Drawn tasks against independent geometry; VTAB's sets in torchvision's layout; what a probe must and must not find; bad input."
import json
from dataclasses import replace
import numpy as np, pytest, torch
import matplotlib.pyplot as plt
from matplotlib.path import Path as Outline
from PIL import Image
from scipy import ndimage
from scipy.io import savemat
from scipy.spatial import ConvexHull
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from hjepa.config import HJEPAError
from hjepa.data import sprites as sp
from hjepa.data.scenes import uniforms
from hjepa.data.sets import ImageSet
from hjepa.data.sprites import POINTERS, SPRITES, silhouette, sprites
from hjepa.evaluate import transfer as tr
from hjepa.evaluate.probes import standardise, stratified_subset
from hjepa.evaluate.transfer import VTAB, plot_transfer, transfer, vtab_sets, vtab_table
from hjepa.foreign import foreign
from hjepa.model import build
from tiny import tiny

# ---- drawn tasks
def test_one_thread_or_two():
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = {t: sprites(t, 150, 32, seed=3) for t in SPRITES}
        torch.set_num_threads(2)
        for t, (im, y) in one.items():
            again = sprites(t, 150, 32, seed=3)
            assert torch.equal(im, again[0]) and all(torch.equal(v, again[1][k]) for k, v in y.items()), t
    finally: torch.set_num_threads(n)

def test_pointers_point_where_the_label_says():
    "Each mask, turned back by its answer about its centre of mass, is one of the upright outlines."
    S = 128; g = (np.arange(S) + .5)/(S/2) - 1; X, Y = np.meshgrid(g, g)
    upright = [silhouette(p, X/.4, Y/.4) < 0 for p in POINTERS]
    _, y = sprites('orient', 60, S, seed=2, masks=True)
    for m, v, area in zip(y['mask'].numpy()/255, y['value'].numpy(), y['area'].numpy()):
        a, z, c = 2*np.pi*v/16, (4*area/np.pi)**.5/.4, ndimage.center_of_mass(m)
        turn = z*np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])             # rows are y
        back = ndimage.affine_transform(m, turn, np.array(c) - turn @ np.full(2, (S-1)/2), order=1) > .5
        assert max((back & u).sum()/(back | u).sum() for u in upright) > .9

def test_solids_by_trigonometry():
    "The corners of the boxes, projected with sine and cosine: their hulls cover what was drawn."
    for task, k in (('azimuth', 4), ('elevation', 5)):
        _, y = sprites(task, 12, 96, seed=1, masks=True)
        u = uniforms(1 + 2**59*(1 + 2*k), np.arange(12), 8)
        assert np.allclose(y['value'], (18*u[:, 0], 9*u[:, 1])[k - 4], atol=1e-4)
        for i in range(12):
            a, e = 2*np.pi*u[i, 0], np.radians(8 + 72*u[i, 1])
            boxes = sp.BOXES[int(u[i, 2]*5)]; sign = np.array(np.meshgrid(*[[-1, 1]]*3)).reshape(3, 8).T
            at = np.stack([np.array([[-np.sin(a), np.cos(a), 0], [-np.sin(e)*np.cos(a), -np.sin(e)*np.sin(a), np.cos(e)]]) @ (b[:3] + sign*b[3:]).T for b in boxes])
            m = y['mask'][i].numpy() > 127; rows, cols = np.nonzero(m)
            g = np.stack(np.meshgrid((np.arange(96) - cols.mean())/48, (rows.mean() - np.arange(96))/48), -1).reshape(-1, 2)
            inside = lambda pts, scale=1.: np.any([Outline(p.T[ConvexHull(p.T).vertices]).contains_points(pts/scale) for p in at], 0)
            fine = np.stack(np.meshgrid(*[np.linspace(-2, 2, 400)]*2), -1).reshape(-1, 2); solid = fine[inside(fine)]
            zoom = (m.sum()/48**2/(len(solid)*.01**2*1.005))**.5
            want = inside(g + zoom*solid.mean(0), zoom).reshape(96, 96)
            assert (m & want).sum()/(m | want).sum() > .92, (task, i)

@pytest.mark.parametrize('task', ['count', 'distance'])
def test_area_and_colour_tell_nothing(task):
    n, K = 12000, SPRITES[task]; im, y = sprites(task, n, 32, seed=9); v, h = y['label'].numpy(), n//2
    lo, hi = binom.ppf([.0005, .9995], n - h, 1/K)/(n - h)
    for f in (y['area'].double()[:, None], im.double().mean((2, 3))):
        f = ((f - f.mean(0))/f.std(0)).numpy(); f = np.concatenate([f, f**2, f**3], 1)
        got = (LogisticRegression(C=10, max_iter=300).fit(f[:h], v[:h]).predict(f[h:]) == v[h:]).mean()
        assert lo <= got <= hi, (task, got)

# ---- VTAB's sets in miniature
def jpg(path, k=0, size=20):
    path.parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (size, size), (k*37 % 256, k*91 % 256, k % 256)).save(path)

def caltech(root):
    for k in range(102):
        for i in range(1, 33 if k < 2 else 4): jpg(root/'caltech101'/'101_ObjectCategories'/(f'c{k:03}' if k else 'BACKGROUND_Google')/f'image_{i:04}.jpg', k)

def dtd(root):
    (root/'dtd/dtd/labels').mkdir(parents=True)
    for s, n in (('train', 2), ('val', 1), ('test', 3)):
        names = [f't{k:02}/{s}{i}.jpg' for k in range(47) for i in range(n)]; (root/f'dtd/dtd/labels/{s}1.txt').write_text('\n'.join(names) + '\n')
        for p in names: jpg(root/'dtd/dtd/images'/p, int(p[1:3]))

def pets(root):
    at = root/'oxford-iiit-pet'; (at/'annotations').mkdir(parents=True)
    for s, n in (('trainval', 2), ('test', 1)):
        rows = [(f'breed{k:02}_{s}{i}', k) for k in range(37) for i in range(n)]; (at/f'annotations/{s}.txt').write_text(''.join(f'{a} {k+1} 1 1\n' for a, k in rows))
        for a, k in rows: jpg(at/'images'/f'{a}.jpg', k)

def sun(root):
    names = [f'/{"abc"[k % 3]}/kind{k:03}' for k in range(397)]; (root/'SUN397').mkdir(); (root/'SUN397/ClassName.txt').write_text('\n'.join(sorted(names)) + '\n')
    for k, n in enumerate(sorted(names)):
        for i in range(2): jpg(root/f'SUN397{n}/sun_{k}{i}.jpg', k, 8)

def clevr(root):
    for s in ('train', 'val'):
        content = []
        for i in range(24 if s == 'train' else 16):
            jpg(root/f'clevr/CLEVR_v1.0/images/{s}/CLEVR_{s}_{i:06}.png', i)
            content.append(dict(image_filename=f'CLEVR_{s}_{i:06}.png', objects=[dict(pixel_coords=[1, 1, 7.9 + .5*(i % 6) + j]) for j in range(3 + i % 8)]))
        f = root/f'clevr/CLEVR_v1.0/scenes/CLEVR_{s}_scenes.json'; f.parent.mkdir(exist_ok=True); f.write_text(json.dumps(dict(scenes=content)))

def kitti(root):
    for i in range(40):
        jpg(root/f'Kitti/raw/training/image_2/{i:06}.png', i); f = root/f'Kitti/raw/training/label_2/{i:06}.txt'; f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('' if i % 4 == 3 else f'Car 0.00 0 1.5 0 0 9 9 1.5 1.6 4.0 2.0 1.6 {(5, 15, 40)[i % 4]} 1.5\n')

def flowers(root):
    at = root/'flowers-102'; y = np.arange(306) % 102 + 1
    for i in range(306): jpg(at/f'jpg/image_{i+1:05}.jpg', y[i] - 1)
    savemat(at/'imagelabels.mat', dict(labels=y[None])); savemat(at/'setid.mat', dict(trnid=np.arange(1, 103), valid=np.arange(103, 205), tstid=np.arange(205, 307)))

def svhn(root):
    rng = np.random.default_rng(0)
    for s, n in (('train', 60), ('test', 30)): savemat(root/f'{s}_32x32.mat', dict(X=rng.integers(0, 256, (32, 32, 3, n), np.uint8), y=(np.arange(n) % 10 + 1)[:, None].astype(np.uint8)))

SIZES = dict(caltech101=(caltech, 260, 104), dtd=(dtd, 94, 141), pets=(pets, 74, 37), sun397=(sun, 397, 397), clevr_count=(clevr, 24, 16), clevr_distance=(clevr, 24, 16),
             kitti=(kitti, 36, 4), flowers102=(flowers, 102, 102), svhn=(svhn, 60, 30))

@pytest.mark.parametrize('name', SIZES)
def test_real_tasks(name, tmp_path, monkeypatch):
    make, n_train, n_test = SIZES[name]
    for module in ('flowers102', 'svhn'): monkeypatch.setattr(f'torchvision.datasets.{module}.check_integrity', lambda *a: True)   # its checksums are of the published files
    before = {r['name']: r['status'] for r in vtab_table(tmp_path)}
    assert before[name] == ('proxy' if VTAB[name].proxy else 'missing') and not list(tmp_path.iterdir())                            # asking leaves no folder behind
    with pytest.raises(HJEPAError, match='not on this machine'): vtab_sets(name, 16, tmp_path)
    make(tmp_path)
    assert next(r for r in vtab_table(tmp_path) if r['name'] == name)['status'] == 'real'
    train, test = vtab_sets(name, 16, tmp_path)
    assert (len(train), len(test)) == (n_train, n_test) and len(train.classes) == VTAB[name].classes
    for s in (train, test): assert s.images[0].shape == (3, 16, 16) and 0 <= s.labels.min() and s.labels.max() < len(s.classes) and s.name == name
    if name == 'clevr_count': assert train.labels[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    if name == 'clevr_distance': assert train.labels[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    if name == 'kitti': assert sorted(test.labels.tolist()) == [0, 1, 2, 3] and test.classes[3] == 'none'
    if name in ('caltech101', 'sun397', 'kitti'): assert not set(train.images.items) & set(test.images.items)
    if name in ('caltech101', 'dtd', 'pets', 'sun397', 'flowers102'):                                                                # images and labels belong together
        for i in (0, len(train)//2, len(train) - 1):
            k = int(train.labels[i]); assert abs(train.images[i].float().mean((1, 2)) - torch.tensor([k*37 % 256, k*91 % 256, k % 256])).max() < 30

def test_pcam_says_what_it_needs(tmp_path, monkeypatch):
    f = tmp_path/VTAB['pcam'].marker; f.parent.mkdir(); f.write_bytes(b'')
    monkeypatch.setattr(tr, 'find_spec', lambda name: None)
    row = next(r for r in vtab_table(tmp_path) if r['name'] == 'pcam'); assert row['status'] == 'missing' and 'h5py' in row['source']

def test_broken_files_are_a_sentence(tmp_path):
    clevr(tmp_path); (tmp_path/'clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json').write_text('{')
    r = transfer(Oracle(), Oracle(), ('clevr_count', 'x'), n_train=60, n_test=30, root=tmp_path, size=16)
    assert 'cannot be opened' in r['tasks']['clevr_count']['missing'] and r['tasks']['clevr_count']['status'] == 'real' and 'arms' in r['tasks']['x']

# ---- what a probe must find, and must not
class Oracle:
    "Two levels: the class that a first pixel says, or whatever `f` makes of the images."
    grids = [(2, 2), (1, 1)]
    def __init__(self, f=None): self.f = f or (lambda x: torch.nn.functional.one_hot(x[:, 0, 0, 0].long() % 4, 4).float())
    def levels(self, x, pooled=False): z = self.f(x)[:, None]; return [z.expand(-1, 4, -1), z]

def marked(n, seed, name='marked'):
    g = torch.Generator().manual_seed(seed); x = torch.randint(0, 256, (n, 3, 16, 16), generator=g, dtype=torch.uint8); y = torch.randint(0, 4, (n,), generator=g)
    x[:, 0, 0, 0] = x[:, 0, 0, 0]//4*4 + y.to(torch.uint8); return ImageSet(name, 'train' if seed % 2 == 0 else 'test', x, y, tuple('abcd'), 'drawn')

def noise(x): return torch.randn(len(x), 6, generator=torch.Generator().manual_seed(int(x.sum())))

def test_perfect_and_shuffled():
    train, test = marked(200, 0), marked(400, 1); g = torch.Generator().manual_seed(0)
    mixed = [replace(s, labels=s.labels[torch.randperm(len(s), generator=g)]) for s in (train, test)]
    r = transfer(Oracle(), Oracle(noise), dict(perfect=(train, test), shuffled=mixed))
    a, b = r['tasks']['perfect'], r['tasks']['shuffled']
    assert a['arms']['hjepa']['acc'] == 1 and a['arms']['untrained']['lo'] < .25 < a['arms']['untrained']['hi'] and a['over']['untrained']['lo'] > .5
    for arm in b['arms'].values(): assert arm['lo'] - .03 < .25 < arm['hi'] + .03
    assert .25 <= a['chance'] < .35 and (a['train'], a['test']) == (200, 400)
    g = r['groups']['given']; assert g['tasks'] == ['perfect', 'shuffled'] and g['arms']['hjepa']['acc'] == pytest.approx((1 + b['arms']['hjepa']['acc'])/2, abs=1e-6)

class Counted:
    "Images that count how often each is read"
    def __init__(self, x): self.x, self.n = x, np.zeros(len(x), int)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): self.n[int(i)] += 1; return self.x[int(i)]

def test_the_test_split_is_read_once():
    train, test = marked(100, 0), marked(120, 1); counted = replace(test, images=Counted(test.images))
    transfer(Oracle(), Oracle(noise), dict(t=(train, counted)))
    assert (counted.images.n == 3).all()                                     # once for model, twin and pixels, whatever there was to choose; pooled level 0 is here the model's own choice

def test_a_grid_that_is_too_wide_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(tr, 'WIDE', 15)                                      # 4 cells of 4 numbers are 16
    got = tr.linear(Oracle(), Oracle(noise), marked(60, 0), marked(40, 1))
    assert [got[a][1]['no_grid'] for a in got] == [[0], [0], [], [0]] and got['hjepa'][1]['mode'] == 'mean' and got['hjepa'][0].acc == 1
    monkeypatch.setattr(tr, 'WIDE', 16); assert tr.linear(Oracle(), Oracle(), marked(60, 0), marked(40, 1))['hjepa'][1]['no_grid'] == []

def test_tuned_on_images_in_files(tmp_path):
    for k in range(10):
        for i in range(10): jpg(tmp_path/f'eurosat/2750/class{k}/{i}.jpg', 9*k + i, 32)
    r = transfer(build(tiny(seed=1)), build(tiny()), ['eurosat'], protocol='finetune', steps=3, root=tmp_path)['tasks']['eurosat']
    assert (r['train'], r['test'], r['status'], r['group']) == (80, 20, 'real', 'specialised') and r['split'].startswith('a fifth') and set(r['over']) == {'untrained'}

def test_refit_is_scikit_learn():
    g = torch.Generator().manual_seed(1); y = torch.randint(0, 5, (500,), generator=g); x = torch.nn.functional.one_hot(y, 20) + torch.randn(500, 20, generator=g)
    val = stratified_subset(y[:300], 60, 0); fit = torch.ones(300, dtype=torch.bool); fit[val] = False
    c = tr.choose(x[:300], y[:300], 5, fit, val); z, zt = standardise(x[:300], x[300:])
    sk = LogisticRegression(C=c.C, max_iter=2000, tol=1e-8).fit(z[fit], y[:300][fit])
    assert c.val == pytest.approx(sk.score(z[val], y[:300][val]), abs=1e-6)
    sk = LogisticRegression(C=c.C, max_iter=2000, tol=1e-8).fit(z, y[:300])
    assert (tr.refit(x[:300], y[:300], x[300:], 5, c).numpy() == sk.predict(zt)).mean() > .99

def test_nineteen_of_nineteen(tmp_path, monkeypatch):
    "The mean is there when all are real, and not for eighteen."
    for k in range(4):
        for i in range(12): jpg(tmp_path/'f'/'train'/f'c{k}'/f'{i}.png', 60*k + i, 16); jpg(tmp_path/'f'/'test'/f'c{k}'/f'{i}.png', 60*k + i, 16)
    for n, t in VTAB.items(): monkeypatch.setitem(VTAB, n, replace(t, classes=4))
    sets = {n: f"folder:{tmp_path/'f'}" for n in VTAB}; kw = dict(size=16, root=tmp_path, n_test=40)
    r = transfer(Oracle(), Oracle(noise), list(VTAB), sets=sets, **kw)
    assert r['vtab_real'] == 19 and r['vtab_mean']['arms']['hjepa']['acc'] == pytest.approx(np.mean([o['arms']['hjepa']['acc'] for o in r['tasks'].values()]), abs=1e-5)
    assert {g: len(o['tasks']) for g, o in r['groups'].items()} == dict(natural=7, specialised=4, structured=8)
    del sets['dmlab']; r = transfer(Oracle(), Oracle(noise), ['dmlab', 'kitti'], sets=sets, **kw)
    assert r['vtab_mean'] is None and r['vtab_real'] == 1 and 'sprites:distance' in r['tasks']['dmlab']['missing']
    assert transfer(Oracle(), Oracle(noise), ['pcam'], sets=sets, most=8, **kw)['tasks']['pcam']['split'] == 'at most 8 test images; as given'

# ---- bad input
def test_one_bad_task_does_not_stop_the_others():
    train, test = marked(80, 0), marked(60, 1); broken, flat = (replace(s, images=torch.full_like(s.images, v)) for s, v in ((train, 255), (train, 7)))
    def f(x):
        z = noise(x); return z.masked_fill((x == 255).all((1, 2, 3))[:, None], float('nan')).masked_fill((x == 7).all((1, 2, 3))[:, None], 3.)
    sets = dict(good=(train, test), nan=(broken, test), flat=(flat, test), one_class=(replace(train, labels=0*train.labels), test), unlabelled=(train, replace(test, labels=test.labels - 1)),
                few=(train.subset(slice(3)), test), beyond=(train, replace(test, labels=test.labels + 1)), empty=(train, test.subset(slice(0))))
    r = transfer(Oracle(f), Oracle(noise), sets)['tasks']
    for name, word in dict(nan='NaN', flat='same features', one_class='one class', unlabelled='without labels', few='raise n_train', beyond='labels beyond', empty='no test images').items():
        assert word in r[name]['missing'] and 'arms' not in r[name], name
    assert 'missing' not in r['good']
    assert plot_transfer(dict(tasks={k: v for k, v in r.items() if k != 'good'}, groups={})) is None

def test_wrong_words(tmp_path):
    with pytest.raises(HJEPAError, match="mean 'pets'"): transfer(Oracle(), Oracle(), ['pet'], size=16)
    with pytest.raises(HJEPAError, match='protocol'): transfer(Oracle(), Oracle(), ['x'], size=16, protocol='knn')
    with pytest.raises(HJEPAError, match='pass size='): transfer(Oracle(), Oracle(), ['x'])
    r = transfer(Oracle(), Oracle(), ['count'], n_train=40, n_test=40, size=16, protocol='finetune')
    assert 'cannot be fine-tuned' in r['tasks']['count']['missing']

# ---- real models
def test_ours_and_a_foreign_one(tmp_path):
    ours, net = build(tiny(seed=1)), foreign('timm:resnet10t', 64, pretrained=False)
    for model, twin, tasks, size in ((ours, build(tiny()), None, 32), (net, net.untrained(), ['distance', 'azimuth'], 64)):
        r = transfer(model, twin, tasks, n_train=60, n_test=50, root=tmp_path)
        assert json.loads(json.dumps(r)) == r and r['size'] == size and set(r['tasks']) == set(tasks or SPRITES) and r['vtab_mean'] is None and len(r['table']) == 19
        for o in r['tasks'].values():
            assert o['status'] == 'proxy' and set(o['arms']) == {'hjepa', 'untrained', 'pixels', 'pooled_l0'} and set(o['over']) == {'untrained', 'pixels', 'pooled_l0'}
            for s in o['arms'].values(): assert s['lo'] <= s['acc'] <= s['hi']
        fig = plot_transfer(r); assert len(fig.axes) == 2; plt.close(fig)
    r = transfer(ours, build(tiny()), ['elevation'], n_train=60, n_test=50, protocol='finetune', steps=3)
    assert 'reduced to 3 of 1,000' in r['protocol'] and set(r['tasks']['elevation']['arms']) == {'hjepa', 'untrained'}
