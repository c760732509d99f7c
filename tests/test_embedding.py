"Maps on clouds that are known, their file, and the explorer."
import json
import numpy as np, pytest, torch
from sklearn.manifold import trustworthiness
from tiny import ROOT, images
from hjepa.analyze import embedding as E
from hjepa.config import HJEPAError
from hjepa.evaluate.probes import standardise

def blobs(n=120): g = torch.Generator().manual_seed(0); y = torch.arange(n) % 3; return torch.randn(n, 12, generator=g) + 12*torch.eye(12)[y], y

def test_maps_and_their_worth():
    x, y = blobs(); m = E.laid_flat(x, seeds=(0, 1))
    assert [*m] == ['PCA', 'UMAP 0', 'UMAP 1', 'agreement']
    for k in ('PCA', 'UMAP 0', 'UMAP 1'):
        assert m[k]['trust'] == round(trustworthiness(standardise(x)[0].numpy(), m[k]['xy'], n_neighbors=10), 4)
        assert m[k]['xy'].min() >= -1e-9 and m[k]['xy'].max() <= 1 + 1e-9 and E.sorted_by(m[k]['xy'], y, 'class') > .9
    assert .1 < m['agreement'] < 1
    again = E.laid_flat(x, seeds=(0,)); assert np.allclose(again['UMAP 0']['xy'], m['UMAP 0']['xy']) and again['agreement'] is None

def test_unit_keeps_shape():
    m = np.random.default_rng(0).normal(size=(50, 2)) * [3, 1]; u = E.unit(m)
    d = lambda a: np.linalg.norm(a[:, None] - a[None], axis=-1)
    assert np.allclose(d(u) / d(u).max(), d(m) / d(m).max()) and np.isclose(np.ptp(u, axis=0).max(), 1)
    assert np.isfinite(E.unit(np.ones((4, 2)))).all()

def test_agreement():
    r = np.random.default_rng(0); a, b = r.random((200, 2)), r.random((200, 2))
    assert E.agreement([a, 5*a[:, ::-1] + 1]) == 1 and E.agreement([a, b]) < .1
    assert np.isclose(E.agreement([a, a, b]), (1 + 2*E.agreement([a, b])) / 3, atol=1e-3)

def test_sorted_by():
    r = np.random.default_rng(0); xy = r.random((300, 2)); v = xy[:, 0]
    assert min(E.sorted_by(xy, v, 'number'), E.sorted_by(xy, v, 'angle')) > .9
    assert max(E.sorted_by(xy, r.random(300), k) for k in ('number', 'angle')) < .1
    seen = np.where(r.random(300) < .3, np.nan, v); assert E.sorted_by(xy, seen, 'number') > .85
    c = (v > .5).astype(float); c[:50] = -1; assert E.sorted_by(xy, c, 'class') > .85 and abs(E.sorted_by(xy, r.permutation(c), 'class')) < .1

def test_colours():
    x = images(8); b = E.brightness(x); assert torch.allclose(b, x.float().mean((1, 2, 3)) / 255)
    assert torch.allclose(E.hue(x), E.hue(x.flip(-1)), atol=1e-5) and E.hue(x).min() >= 0 and E.hue(x).max() <= 1
    assert E.hue(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)).isnan().all()
    kind, names = E.animal_or_vehicle(('airplane', 'cat', 'truck'), torch.tensor([0, 1, 2, 1])); assert kind.tolist() == [0, 1, 0, 1] and names == ('vehicle', 'animal')

def test_file(tmp_path):
    x, y = blobs(60); sets = dict(a=dict(maps=dict(hjepa=[E.laid_flat(x, seeds=())]), colours=dict(kind=y, size=x[:, 0]), names=dict(kind=['p', 'q', 'r']), images=images(5)))
    E.save_maps(tmp_path/'m.npz', dict(who='test'), sets); back = E.load_maps(tmp_path/'m.npz'); s = back['sets']['a']
    assert back['facts'] == dict(who='test') and s['names'] == sets['a']['names'] and s['images'].shape == (5, 24, 24, 3)
    assert np.abs(s['maps']['hjepa'][0]['PCA']['xy'] - sets['a']['maps']['hjepa'][0]['PCA']['xy']).max() <= 5.1e-4
    assert np.array_equal(s['colours']['kind'], y.numpy()) and np.allclose(s['colours']['size'], x[:, 0], atol=2e-2)
    ex = E.MapExplorer(back); assert ex.view.value[:4] == b'\x89PNG' and ex.level.max == 0 and ex.method.options == ('PCA',)

def test_bad_input(tmp_path):
    with pytest.raises(HJEPAError, match='at least 30'): E.laid_flat(torch.zeros(20, 4))
    for name, content in (('none.npz', None), ('text.npz', b'no'), ('other.npz', 'npz')):
        if content == 'npz': np.savez(tmp_path/name, a=np.zeros(3))
        elif content: (tmp_path/name).write_bytes(content)
        with pytest.raises(HJEPAError, match='holds no maps'): E.load_maps(tmp_path/name)

def test_results_are_whole():
    path = ROOT/'results'/'embedding_cifar10_cpu.npz'; r = E.load_maps(path); assert path.stat().st_size < 200_000 and not r['facts']['dirty']
    for s in r['sets'].values():
        n = r['facts']['images']; assert all(len(v) == n for v in s['colours'].values())
        assert s['maps'].keys() == {'hjepa', 'untrained', 'pixels'} and all(m[k]['xy'].shape == (n, 2) and 0 < m[k]['trust'] <= 1 for ls in s['maps'].values() for m in ls for k in ('PCA', 'UMAP 0', 'UMAP 1', 'UMAP 2'))
