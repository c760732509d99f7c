"Answers are those of the training loss; games and maps against plain loops; chance where it must be; bad input."
import json
import numpy as np, pytest, torch
import torch.nn.functional as F
from tiny import ROOT, images, tiny
from hjepa.analyze import predictions as P
from hjepa.config import HJEPAError
from hjepa.data.views import normalise
from hjepa.losses.prediction import distance
from hjepa.model import build

def model(**kw): return build(tiny(**kw)).eval()

@pytest.mark.parametrize('kw', [{}, {'predictor.attention': 'joint'}, {'encoder.registers': 2}, {'masks.kind': 'blocks'}, {'data.image': 28}])
def test_answers_are_those_of_the_loss(kw):
    m = model(**kw); x = images(12, m.recipe.data.image); masks = m.draw_masks(12, torch.Generator().manual_seed(3)); xn = normalise(x, m.recipe.data.mean, m.recipe.data.std)
    with torch.no_grad(): m.calibrate([(xn[None], masks)]); parts, _ = m.predict(xn, m.look(xn, masks)[0], masks)
    for l, (t, p) in enumerate(zip(P.ask(m, x, masks), parts, strict=True)):
        assert abs(distance(t.answer, t.target).mean() / m.chance[l].level - p) < 1e-4 and t.seen.shape == (12, 1, 16)
        assert torch.allclose(t.seen.norm(dim=-1), torch.full((12, 1), 4.), atol=.02)                # normalised, as targets are

def test_games_against_a_loop():
    m = model(); x = images(6); b = P.bank(m, images(40, seed=5)); t = P.ask(m, x, m.draw_masks(6, torch.Generator().manual_seed(0)))[0]
    got = P.games(dict(p=t.answer), t.target, t.cells, b, 0, K=40)['p']['same place']; c = b.centre[0]; want = torch.zeros(6)   # all but one of the bank
    g = torch.Generator().manual_seed(0); who = torch.rand(6, t.cells.shape[1], 40, generator=g).topk(39).indices
    for i in range(6):
        for j, cell in enumerate(t.cells[i]):
            cos = lambda z: F.cosine_similarity(t.answer[i, j] - c, z - c, dim=-1)
            want[i] += float(cos(b.cells[0][who[i, j], cell]).max() < cos(t.target[i, j])) / t.cells.shape[1]
    assert torch.allclose(got, want, atol=1e-6)

def test_chance_where_it_must_be():
    m = model(); b, x = P.bank(m, images(300, seed=5)), images(150, seed=6); b.place = P.bank(m, images(300, seed=9)).place   # of images that are no candidates: the bank is a little nearer to its own mean
    o = P.retrieval(m, x, b, draws=2, K=10)
    assert len(o) == 2 and o[0]['chance'] == {'any place': .1, 'same place': .1, 'same image': 1 / o_cells(m)}
    assert abs(o[0]['place']['same place']['mean'] - .1) < .025    # knows nothing of the image
    assert abs(o[0]['seen']['same image']['mean'] - o[0]['chance']['same image']) < 1e-3
    t = P.ask(m, x, m.draw_masks(150, torch.Generator().manual_seed(0)))[0]
    same = torch.zeros_like(t.target); flat = P.Bank(b.images, [torch.zeros_like(z) for z in b.cells], b.place, [torch.zeros_like(c) for c in b.centre])
    assert all(abs(v.mean() - (1/10 if k != 'same image' else 1/t.cells.shape[1])) < 1e-6 for k, v in P.games(dict(p=same), same, t.cells, flat, 0, K=10)['p'].items())   # ties go by lot

def o_cells(m): return m.draw_masks(1).targets[0].shape[1]

def test_error_maps_against_a_loop():
    m = model(); x, b = images(5), P.bank(m, images(60, seed=5)); maps = P.error_maps(m, x, b, draws=6, seed=2); g = torch.Generator().manual_seed(2); total, n = torch.zeros(5, 64), torch.zeros(5, 64)
    chance = distance(b.place[0].expand_as(b.cells[0]), b.cells[0]).mean()
    for _ in range(6):
        t = P.ask(m, x, m.draw_masks(5, g))[0]
        for i in range(5):
            for j, c in enumerate(t.cells[i]): total[i, c] += distance(t.answer[i, j], t.target[i, j]) / chance; n[i, c] += 1
    assert torch.allclose(maps[0]['predictor'].flatten(1), total / n, atol=1e-5, equal_nan=True) and maps[1]['seen'].shape == (5, 4, 4)

def test_pixels_and_nearest():
    m = model(); x = images(8); raw = P.bank(m, x, pixels=True); assert raw.cells[0].shape[:2] == (8, 64)
    i, c, s = P.nearest(raw.cells[0][3, 17], raw, 0, 2); assert (i[0], c[0]) == (3, 17) and s[0] > .999
    rows = P.expect(m, x[:3], m.draw_masks(3), P.bank(m, images(20, seed=4)), 1, k=4); assert all(len(v) == 4 for r in rows for v in r['near'].values())

def test_bad_input():
    with pytest.raises(HJEPAError, match='no predictor'): P.bank(model(**{'prediction.weight': 0.}), images(4))
    with pytest.raises(HJEPAError, match='plain layers'): P.ask(model(**{'prediction.targets': 'whiten'}), images(4), None)
    m = model(); b = P.bank(m, images(9))
    with pytest.raises(HJEPAError, match='fewer candidates'): P.retrieval(m, images(4), b)

def test_results_hang_together():
    kept = json.loads((ROOT/'results/predictions_cifar10_cpu.json').read_text())
    for o in kept['retrieval']:
        for p in ('predictor', 'place', 'seen', 'pixels', 'untrained'):
            for v in o[p].values(): assert 0 <= v['lo'] <= v['mean'] <= v['hi'] <= 1
    assert abs(kept['errors']['hjepa'][0]['place']['mean']['mean'] - 1) < .1                        # the mean is chance, by definition
