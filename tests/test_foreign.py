"Foreign encoders on the evaluators, and fine-tuning against timm's own grouping."
from dataclasses import replace
import pytest, timm, torch
from timm.optim import param_groups_layer_decay
from hjepa import foreign as F
from hjepa.config import HJEPAError
from hjepa.data.sets import load
from hjepa.evaluate.features import level_features, weights_digest
from hjepa.evaluate.finetune import Classifier, freeze, groups, quick, training_mode, tune
from hjepa.evaluate.probes import linear_probe
from hjepa.model import build
from tiny import images, tiny

VIT, CNN = 'timm:vit_tiny_patch16_224', 'timm:resnet18'

def test_a_hub_out_of_reach_is_said(monkeypatch):
    monkeypatch.setattr(F, 'hub_weights', lambda hub_id: (None, 'no connection'))
    with pytest.warns(UserWarning, match='NOT pretrained'): m = F.foreign(VIT, size=32)
    assert 'random weights, seed 0 (no connection)' in m.note
    asked = F.foreign(VIT, size=32, pretrained=False)
    assert torch.equal(m.levels(images(2))[0], asked.levels(images(2))[0])

def test_no_global_random_state_moves():
    before = torch.get_rng_state(); m = F.foreign(CNN, size=32, pretrained=False); m.untrained(); m.levels(images(2))
    assert torch.equal(before, torch.get_rng_state())

def test_cached_features_know_the_depths():
    a, b = (F.foreign(VIT, size=32, depths=d, pretrained=False) for d in ((6, 12), (3, 12)))
    assert a.grids == b.grids and weights_digest(a) != weights_digest(b)

@pytest.mark.parametrize('name', [VIT, CNN])
def test_a_probe_reads_it(name, tmp_path):
    m, s = F.foreign(name, size=64, pretrained=False), load('scenes', n=80)
    a, b = (level_features(m, s, cache=tmp_path) for _ in range(2))
    assert len(a) == len(m.grids) and all(torch.equal(x, y) for x, y in zip(a, b))
    y = s.extra['texture']
    assert 0 <= linear_probe(a[-1][:60], y[:60], a[-1][60:], y[60:]).acc <= 1

def test_layer_decay_is_timms():
    "The same rates as timm gives its own network with its own classifier."
    m = F.foreign(VIT, size=32, pretrained=False); net = Classifier(m, 7)
    ref = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=7)
    def rates(net, gs): n = {id(p): k for k, p in net.named_parameters()}; return {n[id(p)].removeprefix('body.'): (g['lr_scale'], g['weight_decay']) for g in gs for p in g['params']}
    free = [*ref.no_weight_decay()]
    want = rates(ref, param_groups_layer_decay(ref, .05, no_weight_decay_list=free, layer_decay=.65))
    assert rates(net, groups(net, .05, .65)) == want

@pytest.mark.parametrize('which', [0, 1, 'norms'])
def test_what_is_frozen_stays(which):
    "Weights and running statistics, of a network with batch norm."
    m, s = F.foreign(CNN, size=32, pretrained=False), load('scenes', n=64)
    before = {k: v.clone() for k, v in m.net.state_dict().items()}
    net, _ = tune(m, s.images, s.labels, replace(quick, epochs=2, least=0, batch=32, which=which, drop_path=0.))
    asked = Classifier(m, 8); freeze(asked, which); training_mode(asked)
    free = {n.removeprefix('body.') for n, p in asked.named_parameters() if p.requires_grad}
    still = {f'{n}.{b}' for n, mod in asked.body.named_modules() if not mod.training for b, _ in mod.named_buffers(recurse=False)} | (set(before) - free - {n for n, _ in asked.body.named_buffers()})
    after = net.body.state_dict()
    assert still and all(torch.equal(after[k], before[k]) for k in still)
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert (not moved) if which == 0 else moved
    assert all(torch.equal(v, before[k]) for k, v in m.net.state_dict().items())

def test_nan_weights_are_said():
    from hjepa.evaluate.finetune import finetune
    m, s = build(tiny()), load('scenes', n=40)
    with torch.no_grad(): m.target.norm.weight.fill_(torch.nan)
    with pytest.raises(HJEPAError, match='diverged'): finetune(m, s, s, replace(quick, epochs=1, least=0, batch=16), progress=False)
