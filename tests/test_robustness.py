"Corruptions against independent implementations and their published order; published files; a real model from end to end."
import json, math
import numpy as np, pytest, torch
import matplotlib.colors as mc
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images
from hjepa.config import HJEPAError
from hjepa.data.sets import DataError, Folder, ImageSet
from hjepa.evaluate import robustness as rb
from hjepa.evaluate.robustness import CORRUPTIONS, SHIFTS, TABLES, VALIDATION, corrupt, mean_change, resize
from hjepa.model import build
from tiny import images, tiny

ALL = CORRUPTIONS + VALIDATION + SHIFTS

def photos(size, n=3): # square cuts of scikit-learn's two photographs
    out = []
    for a in load_sample_images().images:
        t = torch.tensor(a).permute(2, 0, 1)[None]
        out += [resize(t[:, :, y:y+300, x:x+300].contiguous(), size) for y in (0, 120) for x in (0, 170, 340)]
    return torch.cat(out[::12//n] if n < 12 else out)

UNIT = images(6, 32).numpy().astype(np.float32)/255
rngs = lambda n=6: rb._rngs('test', 1, range(n), 0)
draw = lambda name, c, x=UNIT: rb._DRAW[name](x, rngs(len(x)), c)

# how many severities of each kind, one after the other; the published parameters change the kind of damage there
KINDS = {('cifar', 'saturate'): (2, 3), ('imagenet', 'saturate'): (2, 3), ('cifar', 'spatter'): (3, 2)}
# steps that the published parameters leave level or a little lower: the share that must be left; weather varies most from image to image, so it is drawn twelve times
LEVEL = {('cifar', 'glass_blur'): .9, ('imagenet', 'glass_blur'): .9, ('imagenet', 'fog'): .9}

@pytest.mark.parametrize('table,make', [('cifar', lambda: images(150, 32)), ('cifar', lambda: photos(32, 12)),
                                        ('imagenet', lambda: images(4, 224)), ('imagenet', lambda: photos(224, 4))])
def test_more_severe_is_more_change(table, make):
    x = make()
    for name in ALL:
        if name == 'elastic_transform': continue                   # below
        v = np.mean([mean_change(x, name, table, seed) for seed in range(12 if name in ('snow', 'frost', 'fog') else 1)], 0); least = LEVEL.get((table, name), .97)
        for k in np.split(v, np.cumsum(KINDS.get((table, name), (5,)))[:-1]):
            assert (k[1:] > least*k[:-1]).all() and k[-1] > k[0], (name, v)

@pytest.mark.parametrize('table,size,kinds', [('cifar', 32, (5,)), ('imagenet', 224, (2, 3))])
def test_elastic_drift_grows(table, size, kinds): # the published bend of the whole shrinks meanwhile; alone, the drift grows
    x = images(3 if size > 99 else 40, size).numpy().astype(np.float32)/255
    v = [np.abs(draw('elastic_transform', (a, s, 0), x) - x).mean() for a, s, _ in TABLES[table]['elastic_transform']]
    assert all((np.diff(k) > 0).all() for k in np.split(np.array(v), np.cumsum(kinds)[:-1])), v
    bend = [c for _, _, c in TABLES[table]['elastic_transform']]
    v = [np.abs(draw('elastic_transform', (0, 0, c), x) - x).mean() for c in sorted(set(bend))]
    assert (np.diff(v) > 0).all(), v

@pytest.mark.parametrize('size', [32, 96])
def test_bytes_depend_on_the_image_alone(size):
    x, n = images(9, size), [5, 900, 3, 44, 0, 7, 8, 1, 2]
    for name in ALL:
        whole = corrupt(x, name, 4, n, seed=3)
        assert whole.dtype == torch.uint8 and whole.shape == x.shape
        for i in (0, 4, 8): assert torch.equal(corrupt(x[i:i+1], name, 4, n[i:i+1], seed=3)[0], whole[i]), name
        assert torch.equal(corrupt(x.flip(0), name, 4, n[::-1], seed=3, chunk=2), whole.flip(0)), name
        assert torch.equal(corrupt(x, name, 0), x)

def test_gaussian_blur():
    k = torch.exp(-torch.arange(-4., 5)**2/2).double(); k /= k.sum()
    y = F.pad(torch.from_numpy(UNIT).double(), (4,)*4, mode='replicate')
    y = F.conv2d(F.conv2d(y.flatten(0, 1)[:, None], k[None, None, None]), k[None, None, :, None])[:, 0].view(6, 3, 32, 32)
    np.testing.assert_allclose(draw('gaussian_blur', 1), y.numpy(), atol=1e-6)

@pytest.mark.parametrize('c', [(1.5, .1), (3, .1), (10, .5)])
def test_defocus(c):
    k = rb._disk(*c); want = np.stack([[ndimage.correlate(ch.astype(float), k, mode='mirror') for ch in i] for i in UNIT])
    np.testing.assert_allclose(draw('defocus_blur', c), want, atol=1e-6)

def test_motion_pixel_by_pixel():
    for angle in (-90, -30, 0, 45, 135):
        got, x, w = rb._trail(UNIT[0], 3, 2., angle), UNIT[0], np.exp(-np.arange(7)**2/8)
        for y0, x0 in ((0, 0), (31, 5), (16, 16), (3, 30)):
            a = math.radians(angle)
            at = [(min(max(y0 + math.ceil(i*math.sin(a) - .5), 0), 31), min(max(x0 + math.ceil(i*math.cos(a) - .5), 0), 31)) for i in range(7)]
            np.testing.assert_allclose(got[:, y0, x0], sum(k*x[:, p, q] for k, (p, q) in zip(w, at))/w.sum(), atol=1e-6)

@pytest.mark.parametrize('z', [1., 1.01, 1.1, 1.26, 2.5, 4.])
def test_enlarge(z):
    cut = math.ceil(32/z); top = (32 - cut)//2
    y = np.stack([ndimage.zoom(c[top:top+cut, top:top+cut].astype(float), z, order=1) for c in UNIT[0]])
    t = (y.shape[1] - 32)//2
    np.testing.assert_allclose(rb._enlarge(UNIT[0], z), y[:, t:t+32, t:t+32], atol=1e-6)

def test_colours():
    hsv = mc.rgb_to_hsv(UNIT.transpose(0, 2, 3, 1).astype(float))
    back = lambda h: mc.hsv_to_rgb(np.clip(h, 0, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(draw('brightness', .3), back(hsv + [0, 0, .3]), atol=1e-5)
    for c in ((.3, 0), (2.5, .2), (20, .2)): np.testing.assert_allclose(draw('saturate', c), back(hsv*[1, c[0], 1] + [0, c[1], 0]), atol=1e-5)
    grey = np.full((1, 3, 4, 4), .5, np.float32); np.testing.assert_allclose(draw('saturate', (2, .1), grey)[0, :, 0, 0], [.5, .45, .45], atol=1e-6)

def test_glass_copies_as_the_published_code_does():
    "A swap of two views of one array, written out, against our list of pixel numbers."
    for size, reach, rounds in ((16, 1, 2), (20, 4, 1)):
        x, g = np.arange(size*size*3).reshape(size, size, 3), np.random.default_rng(7)
        at = [(h, w) for h in range(size - reach, reach, -1) for w in range(size - reach, reach, -1)]
        for _ in range(rounds):
            for (h, w), dx, dy in zip(at, *g.integers(-reach, reach, (2, len(at)))): x[h, w], x[h+dy, w+dx] = x[h+dy, w+dx], x[h, w]
        np.testing.assert_array_equal(rb._shuffle(np.random.default_rng(7), size, reach, rounds), x.reshape(-1, 3)[:, 0]//3)

def test_plasma_point_by_point():
    n, decay = 16, 1.7
    u, a, step, size = np.random.default_rng(5).uniform(-1, 1, (n, n)), np.zeros((n, n)), n, 1e4
    while step > 1:
        h = step//2; mean = lambda y, x, ds: sum(a[(y + p) % n, (x + q) % n] for p, q in ds)/4
        for y in range(h, n, step):
            for x in range(h, n, step): a[y, x] = mean(y, x, [(-h, -h), (-h, h), (h, -h), (h, h)]) + size*u[y, x]
        for y in range(0, n, h):
            for x in range(0 if y//h % 2 else h, n, step): a[y, x] = mean(y, x, [(-h, 0), (h, 0), (0, -h), (0, h)]) + size*u[y, x]
        step, size = h, size/decay**2
    want = (a - a.min())/(a.max() - a.min())
    np.testing.assert_allclose(rb._plasma([np.random.default_rng(5)], n, decay)[0], want, atol=1e-6)
    assert rb._plasma(rngs(2), 11, 2).shape == (2, 11, 11)

def test_noise_has_its_published_spread():
    x = np.full((40, 3, 32, 32), .5, np.float32)
    for name, c, sd in (('gaussian_noise', .1, .1), ('speckle_noise', .2, .1), ('shot_noise', 50, (.5/50)**.5)):
        d = draw(name, c, x) - x; assert abs(d.std() - sd) < .02*sd and abs(d.mean()) < .005, name
    d = draw('impulse_noise', .2, x); assert abs((d == 0).mean() - .1) < .003 and abs((d == 1).mean() - .1) < .003

def test_shifts():
    x = images(5, 32); y = corrupt(x, 'occlusion', 4).numpy()
    grey = (y == 128).all(1).reshape(5, 8, 4, 8, 4).all((2, 4)); assert (grey.sum((1, 2)) == 32).all()
    assert len({g.tobytes() for g in grey}) == 5
    kept = np.kron(~grey, np.ones((4, 4), bool))[:, None].repeat(3, 1); assert (y[kept] == x.numpy()[kept]).all()
    one = Image.fromarray(x[0].permute(1, 2, 0).numpy()); small = one.resize((12, 12), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(corrupt(x[:1], 'resolution', 3)[0].permute(1, 2, 0), small)

def a_set(x, name='toy', split='test', classes=4):
    return ImageSet(name, split, x, torch.arange(len(x)) % classes, tuple(map(str, range(classes))), 'drawn')

def test_cifar_files(tmp_path):
    test = a_set(images(12, 32), 'cifar10'); folder = tmp_path/'CIFAR-10-C'; folder.mkdir()
    assert rb.official(test, 'fog', tmp_path) is None
    x = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8); np.save(folder/'fog.npy', x)
    with pytest.raises(DataError, match='cannot be read'): rb.official(test, 'fog', tmp_path)
    np.save(folder/'labels.npy', np.tile(test.labels.numpy(), 5).astype(np.uint8))
    got = rb.official(test, 'fog', tmp_path)(3, [7, 2]); assert np.array_equal(got.permute(0, 2, 3, 1), x[[24 + 7, 24 + 2]])
    with pytest.raises(DataError, match='does not belong'): rb.official(test.subset(slice(6)), 'fog', tmp_path)
    assert rb.official(a_set(images(12, 32)), 'fog', tmp_path) is None            # files of another set
    seen = []
    def predict(z): seen.append(z); return dict(it=torch.zeros(len(z), dtype=torch.long))
    right, source = rb.answers(predict, test, ('fog', 'contrast'), (2,), [1, 4], root=tmp_path)
    assert source == dict(fog='official files', contrast='generated') and np.array_equal(seen[1].permute(0, 2, 3, 1), x[[12 + 1, 12 + 4]])
    assert torch.equal(seen[2], corrupt(test.images[[1, 4]], 'contrast', 2, [1, 4])) and right['it']['fog'].shape == (1, 2)
    assert rb.answers(predict, test, ('fog',), (2,), [1], root=tmp_path, files=False)[1] == dict(fog='generated')

def test_imagenet_files(tmp_path):
    names = [f'n{i:08d}' for i in range(1000)]; clean, spoiled = tmp_path/'val', tmp_path/'ImageNet-C'/'snow'/'5'
    for k, (c, f) in enumerate(((names[3], 'a.png'), (names[999], 'b.png'))):
        for d, v in ((clean, 10), (spoiled, 100)): (d/c).mkdir(parents=True); Image.new('RGB', (24, 24), (v + k,)*3).save(d/c/f)
    test = ImageSet('folder:val', 'test', Folder([str(clean/names[3]/'a.png'), str(clean/names[999]/'b.png')], 24), torch.tensor([3, 999]), tuple(names), 'val')
    assert rb.official(test, 'snow', tmp_path)(5, [1, 0])[:, 0, 0, 0].tolist() == [101, 100] and rb.official(test, 'fog', tmp_path) is None
    with pytest.raises(HJEPAError): rb.official(test, 'snow', tmp_path)(4, [0])   # a severity that is not there is an error
    assert not rb.is_imagenet(a_set(images(4, 32)))

def test_reference():
    alex = rb.corruption_error(rb.ALEXNET, rb.ALEXNET, rb.ALEXNET_CLEAN, rb.ALEXNET_CLEAN)
    assert alex['mce'] == pytest.approx(100) and alex['relative_mce'] == pytest.approx(100)
    big = ImageSet('imagenet', 'test', images(2, 32), torch.tensor([0, 1]), tuple(map(str, range(1000))), 'drawn')
    full = [1, 2, 3, 4, 5]
    assert rb._reference(None, big, full, 224) == 'alexnet' and rb._reference(None, a_set(images(4, 32)), full, 224) == 'pixels'
    assert rb._reference(None, big, full, 32) == 'pixels' == rb._reference(None, big, full[:3], 224)
    with pytest.raises(HJEPAError, match='ImageNet-1k'): rb._reference('alexnet', big, full, 64)

def test_a_real_model():
    r = tiny(); model, twin = build(r), build(tiny(seed=1))
    train, test = a_set(images(60, 32), split='train'), a_set(images(90, 32, seed=1))
    kw = dict(severities=(1, 5), n=20)
    one = rb.robustness(model, twin, train, test, **kw)
    assert json.loads(json.dumps(one)) == one and rb.robustness(model, twin, train, test, batch=9, **kw) == one
    assert set(one['arms']) == {'hjepa', 'untrained', 'pooled_l0', 'pixels'} and len(one['arms']['hjepa']) == len(model.grids)
    assert one['arms']['pixels']['pixels']['mce'] == 100 and one['images'] == 20 and set(one['over']) == {'untrained', 'pooled_l0', 'pixels'}
    for arm in one['arms'].values():
        for s in arm.values():
            c = s['corrupted']; assert c['lo'] <= c['acc'] <= c['hi']
            assert s['lost']['diff'] == pytest.approx(s['clean']['acc'] - c['acc'], abs=2e-6) and len(s['by_corruption']) == 21
    some = rb.robustness(model, twin, train, test, names=('occlusion',), severities=(3,), n=20)   # no corruption error of what is not one
    assert 'mce' not in some['arms']['hjepa']['0'] and some['arms']['pixels']['pixels']['clean'] == one['arms']['pixels']['pixels']['clean']
