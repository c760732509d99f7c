"Leaving early changes nothing but the work: every kind of encoder, any batch; oracle and coin against trying everything; bad input."
import itertools, json
import numpy as np, pytest, torch
from tiny import ROOT, images, tiny
from hjepa.analyze import depth as D
from hjepa.config import HJEPAError
from hjepa.data.scenes import scenes
from hjepa.foreign import foreign
from hjepa.model import build

def labelled(n, seed=1): x, y = scenes(n, 32, seed=seed); return x, y['texture']

MODELS = {'plain': lambda: build(tiny()), 'registers': lambda: build(tiny(**{'encoder.registers': 2, 'encoder.layer_scale': .1})), 'mixed': lambda: build(tiny(**{'encoder.positions': 'mixed'})),
          'timm': lambda: foreign('timm:vit_tiny_patch16_224', size=32, pretrained=False)}

@pytest.mark.parametrize('name', MODELS)
def test_equal_predictions(name):
    model = MODELS[name](); model.eval(); (x, y), (xt, yt) = labelled(120), labelled(40, 2)
    c, cal = D.fit_cascade(model, x, y); feats = D.exit_features(c.exits, xt); t = D.table(c, feats, yt); full = torch.stack([c.ask(k, f)[1] for k, f in enumerate(feats)], 1)
    assert len(cal.conf) == 24 and t.conf.shape == (40, len(c.heads))
    for tau, batch in itertools.product((0., float(np.median(t.conf)), 2.), (7, 500)):
        out = c(xt, tau, batch=batch)
        assert torch.equal(out.exit, torch.from_numpy(t.leave(tau))) and torch.equal(out.answer, full[range(40), out.exit])
        assert np.allclose(out.confidence, t.conf[range(40), out.exit], atol=1e-5)

def test_the_saving_is_real():
    "Blocks see only the images that are still there."
    model = build(tiny()).eval(); c, _ = D.fit_cascade(model, *labelled(120)); x, seen = images(30), []
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(len(o))) for b in c.exits.net.blocks]
    out = c(x, float(c(x, 2.).confidence.median())); here = (out.exit[:, None] >= torch.tensor([1, 2])).sum(0).tolist(); full = len(seen) - sum(n > 0 for n in here)
    assert seen[full:] == [n for n in here if n]
    seen.clear(); c(x, at=0); assert seen == []; c(x, at=1); assert seen == [30]
    for h in hooks: h.remove()
    cost, alone = D.costs(c, x[:8]); assert (np.diff(cost) > 0).all() and D.flops(lambda: c(x, out.confidence.median().item())) == round(cost[c(x, out.confidence.median().item()).exit.numpy()].sum())

def test_oracle_and_coin_against_trying_everything():
    rng = np.random.default_rng(0)
    for _ in range(5):
        right = rng.random((6, 3)) < .5; counts = rng.multinomial(6, [.4, .3, .3])
        ways = {p for p in itertools.permutations(np.repeat(range(3), counts))}
        assert abs(D.oracle(right, counts) - max(np.mean([right[i, k] for i, k in enumerate(w)]) for w in ways)) < 1e-9
        acc, cost = rng.random(4), np.sort(rng.random(4)); w = D.coin(acc, cost, budget := float(rng.uniform(cost[0], 1)))
        mixes = [m for i in range(4) for j in range(4) for u in np.linspace(0, 1, 51) if (m := (1 - u)*np.eye(4)[i] + u*np.eye(4)[j]) @ cost <= budget + 1e-9]
        assert abs(w.sum() - 1) < 1e-9 and w @ cost <= budget + 1e-9 and w @ acc >= max(m @ acc for m in mixes) - 1e-9

def test_who_knows_beats_and_who_guesses_does_not():
    "Confidence that is the truth reaches the oracle; confidence that is noise is a lottery."
    rng = np.random.default_rng(1); right = rng.random((4000, 3)) < [.4, .5, .6]; cost = np.array([1., 2., 3.])
    knows, noise = (D.Table(c, right, [0]*3, [.5]*3) for c in (np.where(right, .9, .1) + .01*rng.random(right.shape), rng.random(right.shape)))
    a, = D.policies(knows, knows, cost, cost, [1.9]); b, = D.policies(noise, noise, cost, cost, [1.9])
    assert a['G'] > .9 and abs(b['G']) < .1 and b['over_random']['lo'] < 0 < b['over_random']['hi'] and a['over_static']['lo'] > 0

def test_bad_input():
    with pytest.raises(HJEPAError, match='windows'): D.Exits(build(tiny(**{'encoder.windows': 1, 'encoder.depth': 2})))
    with pytest.raises(HJEPAError, match='no blocks'): D.Exits(object())
    c, _ = D.fit_cascade(build(tiny()).eval(), *labelled(60))
    for bad in (dict(), dict(tau=.5, at=1), dict(at=9), dict(at=-1), dict(tau=[.5, .5, .5])):
        with pytest.raises(HJEPAError): c(images(4), **bad)

@pytest.mark.parametrize('name', ['depth', 'depth_six'])
def test_results_hang_together(name):
    kept = json.loads((ROOT/f'results/{name}_cifar10_cpu.json').read_text())
    for m in kept['models'].values():
        assert set(m['arms']) == {'hjepa', 'untrained'} and m['clock']['500']['full']['ratio'] == 1
        for a in m['arms'].values():
            assert len(a['acc']) == m['blocks'] + 1 == len(a['cost']) and sorted(a['cost']) == a['cost']
            for p in a['policies']:
                assert abs(sum(p['share']) - 1) < 1e-3 and abs(np.dot(p['share'], a['cost']) / p['flops'] - 1) < 1e-3 and p['ci'][0] <= p['acc'] <= p['ci'][1]
                assert p['oracle'] >= max(p['acc'], p['random']) - 1e-9 and abs(p['over_static']['mean'] - (p['acc'] - p['static'])) < 2e-4
