"The weights that come with the package."
import json
from importlib.resources import files
import pytest, torch
from hjepa.config import HJEPAError
from hjepa.data.scenes import scenes
from hjepa.evaluate.features import level_features
from hjepa.evaluate.probes import knn_probe
from hjepa.model import load, load_pretrained, untrained

NAMES = sorted(f.stem for f in (files('hjepa')/'weights').glob('*.safetensors'))

def test_there_are_some(): assert 'cifar10-cpu' in NAMES

@pytest.mark.parametrize('name', NAMES)
def test_shipped_weights_are_small_and_trained(name):
    f = files('hjepa')/'weights'/f'{name}.safetensors'; assert f.stat().st_size < 15e6 and f.with_suffix('.md').exists()
    m = load(f'pretrained:{name}'); assert m.facts['images_seen'] > 1e5 and len(m.facts['commit']) == 40 and not m.facts['dirty']
    s = m.recipe.data.image; (x, y), (xt, yt) = scenes(600, s, seed=1), scenes(300, s, seed=2)
    acc = lambda net: max(knn_probe(a, y['colour'], b, yt['colour']).acc for a, b in zip(level_features(net, x), level_features(net, xt)))
    assert acc(m) > acc(untrained(m.recipe)) + .1                                  # photographs taught it something about drawings
    with torch.no_grad():
        masks = m.draw_masks(2*m.recipe.views.count, torch.Generator().manual_seed(0)); v = torch.randn(m.recipe.views.count, 2, 3, s, s)
        out = m(v, masks); assert 'whole' not in out and all(torch.isfinite(t) for t in out.values())

def test_unknown_name():
    with pytest.raises(HJEPAError, match='cifar10-cpu'): load_pretrained('cifar10cpu')
