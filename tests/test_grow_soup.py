"Growing keeps the function of every kind of encoder and lets copies part; soups average what means the same and refuse the rest."
import copy
import pytest, torch
from hjepa.config import HJEPAError, change
from hjepa.data.scenes import SHAPES, scenes
from hjepa.data.sets import ImageSet
from hjepa.evaluate.probes import knn_probe
from hjepa.grow import grow, widen
from hjepa.model import build, load
from hjepa.soup import average, held_out_accuracy, soup
from hjepa.train import fit
from tiny import images, same, tiny, weights

X = images(64)
def moved(**kw): # a model whose every weight, and whose slow copy, is its own
    m, g = build(tiny(**kw)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1 * torch.randn(p.shape, generator=g))
    return m

KINDS = dict(plain={}, registers=dict(encoder__registers=2), scaled=dict(encoder__layer_scale=.5), normed=dict(encoder__qk_norm=True), gated=dict(encoder__act='swiglu'), conv=dict(encoder__stem='conv', encoder__dim=32, encoder__heads=4),
    joint=dict(predictor__attention='joint'), packed=dict(predictor__attention='packed'), views=dict(prediction__weight=0.), vicreg=dict(whole__kind='vicreg', whole__args={}), three=dict(encoder__depth=3, levels__depths=(1, 2, 3)),
    bare=dict(encoder__final_norm=False), windows=dict(encoder__windows=1, encoder__registers=1, masks__hidden=(0, 3)), group=dict(levels__depths=(1, (1, 2), 2), levels__join='mean'), pyramid=dict(levels__fpn=True, levels__pool='attention'))

@pytest.mark.parametrize('k', KINDS)
@pytest.mark.parametrize('depth,times', [(None, 2), (5, 1), (4, 3)])
def test_the_function_is_kept(k, depth, times):
    m = moved(**KINDS[k]); before = weights(m); e = m.recipe.encoder
    b = grow(m, depth, times * e.dim)
    assert same(before, weights(m)) and (b.recipe.encoder.dim, b.recipe.encoder.depth) == (times * e.dim, depth or e.depth)
    for u, v in zip(m.levels(X[:4]), b.levels(X[:4])): torch.testing.assert_close(v, u.repeat(1, 1, times), atol=1e-5, rtol=1e-5)
    g = torch.Generator().manual_seed(1); views, masks = torch.randn(2, 6, 3, 32, 32, generator=g), m.draw_masks(12, g)
    u, v = (copy.deepcopy(q).train()(views, masks, 0) for q in (m, b))
    assert u.keys() == v.keys()
    for q in u: torch.testing.assert_close(v[q], u[q], atol=1e-5, rtol=1e-4)

def test_a_grown_model_trains_saves_and_copies_part(tmp_path):
    run = fit(tiny(), data=X, out=tmp_path/'a'); halves = {}
    for uneven in (0., .1):
        b = grow(load(tmp_path/'a'), dim=32, uneven=uneven)
        run = fit(b.recipe, model=b, data=X, out=tmp_path/str(uneven), train__steps=10)
        assert same(weights(load(run.path)), weights(b))
        u, v = b.encoder.blocks[0].mlp[0].bias.detach().chunk(2); halves[uneven] = float((u - v).norm() / u.norm())
    assert halves[0.] < 1e-5 and halves[.1] > 1e-3, halves

def test_new_blocks_learn(tmp_path):
    m = moved(); b = grow(m, depth=4); proj = b.encoder.blocks[1].attn.proj.weight; assert not proj.any()
    fit(b.recipe, model=b, data=X, out=tmp_path, train__steps=2); assert proj.any()

@pytest.mark.parametrize('kw,words', [(dict(dim=24), 'multiple of the width'), (dict(dim=8), 'multiple of the width'), (dict(depth=1), 'no less depth')])
def test_growth_refused(kw, words):
    with pytest.raises(HJEPAError, match=words): grow(build(tiny()), **kw)

@pytest.mark.parametrize('kw', [dict(positions='sincos'), dict(slots=2), dict(across=True), dict(levels__depths=(1, (1, 2), 2))], ids=str)
def test_what_grows_in_depth_alone(kw):
    m = moved(**kw)
    for u, v in zip(m.levels(X[:4]), grow(m, 4).levels(X[:4])): torch.testing.assert_close(v, u, atol=1e-5, rtol=1e-5)
    with pytest.raises(HJEPAError, match='does not grow'): grow(m, dim=32)

def test_what_cannot_be_repeated_is_refused():
    with pytest.raises(HJEPAError, match='whole multiples'): widen(torch.ones(16, 3), (24, 3), 'encoder.embed.proj.weight')
    m = build(tiny(encoder__stem='conv', encoder__dim=24, encoder__heads=2))          # a stem of 16 channels that would need 24
    with pytest.raises(HJEPAError, match='whole multiples'): grow(m, dim=48)

# ---- soups

def test_average_by_hand_and_what_is_left_alone():
    a, b, c = moved(), moved(seed=1), moved(seed=2); before = [weights(m) for m in (a, b, c)]
    m, kept = soup([a, b, c]); assert kept == [0, 1, 2] and m.recipe == a.recipe and not m.training
    for k, v in m.state_dict().items():
        if v.is_floating_point(): torch.testing.assert_close(v, (before[0][k] + before[1][k] + before[2][k]) / 3, atol=1e-6, rtol=1e-6)
    assert all(same(q, weights(x)) for q, x in zip(before, (a, b, c)))
    for k, v in average([a, b], [1., 0.]).state_dict().items(): torch.testing.assert_close(v, before[0][k])
    assert same(weights(average([a, a])), before[0])

def test_soup_of_files_and_of_different_sets(tmp_path):
    start = fit(tiny(), data=X, out=tmp_path/'start')
    for i, half in enumerate((X[:32], X[32:])): fit(tiny(), model=load(start.path), data=half, out=tmp_path/str(i), seed=i)
    m, _ = soup([tmp_path/'0', tmp_path/'1'/'model.safetensors']); m.save(tmp_path/'soup.safetensors')
    assert same(weights(load(tmp_path/'soup.safetensors')), weights(average([load(tmp_path/'0'), load(tmp_path/'1')])))

def test_greedy_keeps_what_helps():
    ms = [build(tiny(seed=s)) for s in range(4)]
    for m, v in zip(ms, (1., -.9, 5., .5)): torch.nn.init.constant_(m.encoder.norm.bias, v)
    score = lambda m: -abs(m.encoder.norm.bias[0].item())                              # best: 0
    m, kept = soup(ms, score=score)
    assert kept == [3, 1] and score(m) == pytest.approx(-.2)                            # .5 alone; with -.9: -.2; with 1 as well: .2, not better; with 5: far off
    worst, alone = soup([ms[2], ms[0]], score=score); assert alone == [1] and worst is ms[0]

@pytest.mark.parametrize('kw,words', [(dict(encoder__theta=50.), 'differ in encoder.theta'), (dict(levels__depths=(2, 2, 2)), 'differ in levels.depths'), (dict(data__mean=(.5, .5, .5)), 'differ in data.mean'),
    (dict(encoder__depth=3), 'differ in encoder.depth'), (dict(prediction__weight=0.), 'parts that others lack'), (dict(whole__dim=12), 'differ in whole.dim')])
def test_other_recipes_are_refused(kw, words):
    with pytest.raises(HJEPAError, match=words): soup([build(tiny()), build(tiny(**kw))])

def test_what_led_to_the_weights_may_differ():
    soup([build(tiny()), build(tiny(optim__lr=2e-3, seed=4, encoder__drop_path=.2, levels__weights=(1., .5), masks__hidden=(3, 3), train__batch=16, name='other'))])

def test_bad_soups():
    with pytest.raises(HJEPAError, match='two models or more and got 1'): soup([build(tiny())])
    with pytest.raises(HJEPAError, match='two models or more and got 0'): soup([], score=lambda m: 0.)
    with pytest.raises(HJEPAError, match='sum to 1'): average([build(tiny())] * 2, [.5, .6])
    with pytest.raises(HJEPAError, match='either score or shares'): soup([build(tiny())] * 2, lambda m: 0., [.5, .5])

def test_held_out_accuracy_reads_no_test_image(monkeypatch):
    import hjepa.sweep as hs
    x, y = scenes(200, 32, seed=0); asked = []
    monkeypatch.setattr(hs, 'load_images', lambda name, split, image: (asked.append(split), ImageSet(name, split, x, y['shape'], SHAPES, 'here'))[1])
    score = held_out_accuracy(tiny(data__labelled=60), probe=knn_probe); a = score(build(tiny()))
    assert asked == ['train'] and 0 <= a <= 1 and a == score(build(tiny()))
