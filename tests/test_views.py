"Views: what is drawn is what is seen, by both back ends, and what was measured before stays as it was."
import math, pickle
import pytest, torch, torch.nn.functional as F, torchvision.transforms.v2.functional as TF
import hjepa.model as hm, hjepa.train as ht
from hjepa.config import Views, recipes
from hjepa.data.loader import mixed_seed
from hjepa.data.scenes import scenes
from hjepa.data.sets import ImageSet, Mix
from hjepa.data.views import blurred, crop, draw_views, make_views, overlap, pil_crops, pil_views, recolour, resized_boxes, simple_boxes
from hjepa.model import build
from hjepa.train import Crops, fit
from tiny import images, losses, same, tiny, weights

RAW = (0,)*3, (1,)*3
STILL = dict(count=1, scale=(1, 1), ratio=(1, 1), flip=0., jitter=0., gray=0.)
KINDS = {'jitter': {}, '3aug': dict(kind='3aug'), 'weak': dict(kind='weak'), 'simple': dict(crop='simple', pad=.2), 'blur': dict(blur=.5, solarize=.5), 'local': dict(local=3)}
def gen(seed=0): return torch.Generator().manual_seed(seed)
def views(**kw): return Views(**kw)
def drawn(B=16, seed=0, aspect=None, **kw): return draw_views(B, views(**kw), gen(seed), aspect)
def pils(x): return [TF.to_pil_image(i) for i in x]

# ---- what was measured before

def before(x, B, v, S, mean, std, g): # views as they were made when crop, flip, jitter and grey were all there was
    u = torch.rand(4, v.count, B, generator=g)
    area, logr = v.scale[0] + (v.scale[1]-v.scale[0])*u[0], math.log(v.ratio[0]) + math.log(v.ratio[1]/v.ratio[0])*u[1]
    h, w = (area / logr.exp()).sqrt().clamp(max=1), (area * logr.exp()).sqrt().clamp(max=1)
    cy, cx, zero = (1-h)*(2*u[2]-1), (1-w)*(2*u[3]-1), torch.zeros_like(h)
    flip = 1. - 2. * (torch.rand(v.count, B, generator=g) < v.flip)
    u = torch.rand(6, v.count, B, generator=g); on = u[4] < v.jitter
    b, c, s = (torch.where(on, 1 + a*(2*u[i]-1), 1.) for i, a in enumerate((v.brightness, v.contrast, v.saturation)))
    s = torch.where(u[5] < v.gray, 0., s)
    turn = torch.where(on, v.hue*(2*u[3]-1), 0.) * 2 * math.pi
    k = torch.tensor([[0., -1., 1.], [1., 0., -1.], [-1., 1., 0.]]) / 3**.5
    cos, sin, l = turn.cos()[..., None, None], turn.sin()[..., None, None], torch.tensor([.299, .587, .114])
    sat = s[..., None, None] * torch.eye(3) + (1 - s)[..., None, None] * l.expand(3, 3)
    colour = (c*b)[..., None, None] * ((cos * torch.eye(3) + sin * k + (1 - cos) / 3) @ sat)
    theta, x = torch.stack((torch.stack((w*flip, zero, cx), -1), torch.stack((zero, h, cy), -1)), -2), x.float() / 255
    x = torch.cat([F.grid_sample(x, F.affine_grid(t, (B, 3, S, S), align_corners=False), mode='bilinear', padding_mode='border', align_corners=False) for t in theta])
    grey = torch.einsum('bchw,c->b', x, l) / S**2
    x = torch.baddbmm((grey * ((1-c)*b).flatten())[:, None, None], colour.flatten(0, 1), x.flatten(2)).clamp_(0, 1).unflatten(2, (S, S))
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).unflatten(0, (v.count, B))

@pytest.mark.parametrize('name', [k for k in recipes if not k.startswith('peer-')])
def test_old_recipes_see_what_they_saw(name):
    r = recipes[name](); x = images(24)
    for seed in range(5):
        a, b = gen(seed), gen(seed)
        assert torch.equal(before(x, 24, r.views, 32, r.data.mean, r.data.std, a), make_views(x, draw_views(24, r.views, b), 32, r.data.mean, r.data.std))
        assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))       # masks come next

# ---- the draws

@pytest.mark.parametrize('kw', KINDS.values(), ids=KINDS)
def test_draws_are_seeded_and_differ(kw):
    a, b, c = drawn(**kw), drawn(**kw), drawn(seed=1, **kw)
    assert torch.equal(a.box, b.box) and torch.equal(a.colour, b.colour) and torch.equal(a.sigma, b.sigma) and not torch.equal(a.box, c.box)
    assert len(a.box.flatten(0, 1).unique(dim=0)) == a.box[..., 0].numel()              # each view of each image its own
    assert pickle.loads(pickle.dumps(a))[2:4].flip.shape == (2, 2) and (a.local is None) == ('local' not in kw)
    if a.local: assert a[2:4].local.box.shape == (3, 2, 4) and not set(a.box[..., 2].flatten().tolist()) & set(a.local.box[..., 2].flatten().tolist())

def test_weak_is_the_crop_alone():
    d = drawn(50, kind='weak', flip=1., solarize=1., blur=1., gray=1., jitter=1.)
    assert (d.flip == 1).all() and not d.solarise.any() and not d.sigma.any() and not d.shift.any() and torch.allclose(d.colour, torch.eye(3).expand(2, 50, 3, 3), atol=1e-6)
    assert d.box[..., 2].std() > .05

def test_pictures_must_be_as_many_as_the_draws():
    with pytest.raises(ValueError): pil_crops(pils(images(3)), drawn(4), 32)

@pytest.mark.parametrize('W,H', [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_the_smallest_pictures_have_views(W, H):
    for kw in (dict(), dict(crop='simple', pad=.3)):
        out = pil_crops(pils([torch.full((3, H, W), 77, dtype=torch.uint8)]), drawn(1, aspect=torch.tensor([W/H]), **kw), 32)
        assert (out == 77).all()

@pytest.mark.parametrize('aspect', [.25, .75, 1., 4/3, 3.])
def test_boxes_keep_their_promises(aspect):
    v, w = views(), torch.full((4000,), aspect)
    cy, cx, h, k = resized_boxes(1, 4000, v.scale, v.ratio, w, gen()).unbind(-1)
    assert (cy.abs() + h).max() < 1 + 1e-6 and (cx.abs() + k).max() < 1 + 1e-6 and (h*k).max() <= 1
    shape = k / h * aspect
    assert shape.min() > .75 - 1e-5 and shape.max() < 4/3 + 1e-5
    if 3/4 <= aspect <= 4/3: assert abs((h*k).mean() - .65) < .04 and (h*k).min() > .29   # area as asked; an oblong picture has no room for all of it
    cy, cx, h, k = simple_boxes(1, 4000, .1, w, gen()).unbind(-1)
    assert torch.allclose(k * aspect, h) and torch.allclose(h.maximum(k), torch.ones(()))
    reach = .2 * torch.stack((h, k), -1).max(1).values                                  # a tenth of the short side
    assert (cy.abs() + h).max() <= 1 + reach[0, 0] + 1e-6 and (cx.abs() + k).max() <= 1 + reach[0, 1] + 1e-6
    assert (cy.abs() + h).max() > 1 + .9*reach[0, 0] and (cx.abs() + k).max() > 1 + .9*reach[0, 1]

# ---- colours, against torchvision's

@pytest.mark.parametrize('key,tv', [('brightness', TF.adjust_brightness), ('contrast', TF.adjust_contrast), ('saturation', TF.adjust_saturation)])
def test_each_jitter_is_torchvisions(key, tv):
    x, off = images(16), dict.fromkeys(('brightness', 'contrast', 'saturation', 'hue'), 0.)
    d = drawn(**STILL | off | {'jitter': 1., key: .4})
    factor = d.colour[0].sum(2)[:, 0] if key != 'saturation' else 1 - (d.colour[0, :, 0, 1] / .587)
    for got, i, f in zip(make_views(x, d, 32, *RAW)[0], x/255, factor): torch.testing.assert_close(got, tv(i, float(f)), atol=1e-4, rtol=0)

def test_effects_are_torchvisions():
    x = images(16); d = drawn(**STILL | dict(kind='3aug'))
    done = dict(grey=0, solarise=0, blur=0)
    for k, (got, i) in enumerate(zip(make_views(x, d, 32, *RAW)[0], x/255)):
        s, sharp = float(d.sigma[0, k]), slice(7, 25)                                    # kernels end differently at the border
        if s: done['blur'] += 1; torch.testing.assert_close(got[:, sharp, sharp], TF.gaussian_blur(i, [31, 31], [s, s])[:, sharp, sharp], atol=2e-3, rtol=0)
        elif d.solarise[0, k]: done['solarise'] += 1; torch.testing.assert_close(got, TF.solarize(i, .5), atol=1e-4, rtol=0)
        else: done['grey'] += 1; torch.testing.assert_close(got, TF.rgb_to_grayscale(i, 3), atol=1e-3, rtol=0)
    assert all(done.values())

def test_blur_keeps_what_is_even_and_what_is_not_chosen():
    x = torch.rand(4, 3, 20, 20, generator=gen())
    assert torch.allclose(blurred(torch.ones_like(x), torch.tensor([.3, 1., 3., 9.])), torch.ones_like(x))
    d = drawn(4, **STILL | dict(blur=1.)); d.sigma[0, :2] = 0.
    out = recolour(x[None].clone(), d, *RAW)[0]
    assert torch.allclose(out[:2], x[:2], atol=1e-6) and not torch.allclose(out[2:], x[2:], atol=.01)

# ---- geometry: paint coordinates, read them back

def painted(W, H): # what each pixel shows is where it is, in [0,255] along either axis
    y, x = torch.meshgrid((torch.arange(H) + .5) / H, (torch.arange(W) + .5) / W, indexing='ij')
    return (torch.stack((y, x, torch.zeros_like(x))) * 255).round().byte()

def places(d, k, i, n): # where the pixels of a view should be, y and x in [0,255]; over the border as in a mirror
    t = (torch.arange(n) + .5) / n * 2 - 1
    cy, cx, h, w = d.box[k, i].tolist()
    fold = lambda p: 255/2 * (1 + torch.where(p.abs() > 1, (2 - p.abs()) * p.sign(), p))
    return fold(cy + h*t)[:, None].expand(n, n), fold(cx + w*float(d.flip[k, i])*t)[None].expand(n, n)

@pytest.mark.parametrize('kw', [dict(), dict(crop='simple', pad=.2), dict(local=2, local_scale=(.2, .3))])
@pytest.mark.parametrize('size', [(200, 200), (300, 150), (120, 210)])
def test_pixels_come_from_where_the_record_says(kw, size):
    W, H = size; im, n, B = painted(W, H), 64, 6
    d = drawn(B, aspect=torch.full((B,), W/H), **dict(jitter=0., gray=0.) | kw)
    for part in filter(None, (d, d.local)):
        seen = [pil_crops(pils([im]*B), part, n).float(), make_views(im.expand(B, -1, -1, -1), part, n, *RAW) * 255] # the second does not smooth, which a ramp does not mind
        for k in range(len(part.box)):
            for i in range(B):
                for s in seen:
                    for got, want in zip(s[k, i], places(part, k, i, n)):
                        inner = (want > 4) & (want < 251)                                # at the border and in its mirror a bend
                        assert (got - want)[inner].abs().max() < 1.6 and inner.float().mean() > .5 # two levels of 255 are about a pixel and a half here

def test_large_pictures_are_smoothed():
    board = (torch.arange(512)[:, None] + torch.arange(512)) % 2 * 255
    out = pil_crops(pils([board.byte().expand(3, -1, -1)]), drawn(1, **STILL), 64)
    assert (out.float() - 127.5).abs().max() < 3

# ---- two back ends, one record

@pytest.mark.parametrize('kw', KINDS.values(), ids=KINDS)
def test_back_ends_agree(kw):
    x = scenes(12, 64, seed=1)[0]; d = drawn(12, **kw)
    for part in filter(None, (d, d.local)):
        cut = torch.stack([crop(x.float(), b, f, 64) for b, f in zip(part.box, part.flip)])
        assert (pil_crops(pils(x), part, 64).float() - cut).abs().max() < 1.01            # one grey level: Pillow rounds twice
        diff = (pil_views(pils(x), part, 64, *RAW) - make_views(x, part, 64, *RAW)).abs() * 255
        assert diff.mean() < .6 and diff.max() < 4                                        # colours enlarge it

# ---- overlap

def patches(t, n): return t.unflatten(2, (n, -1)).unflatten(1, (n, -1)).permute(1, 3, 0, 2, 4).reshape(n*n, 2, -1)

@pytest.mark.parametrize('kw', [dict(), dict(crop='simple', pad=.2), dict(local=2, local_scale=(.2, .4))])
def test_overlap_is_what_painted_coordinates_say(kw):
    x, B, n = painted(256, 256), 8, 4
    d = drawn(B, **dict(jitter=0., gray=0., ratio=(.5, 2.)) | kw)
    seen = [v[:, :2] for e in filter(None, (d, d.local)) for v in make_views(x.expand(B, -1, -1, -1), e, 128, *RAW) * 255]
    for a in range(len(seen)):
        for b in range(len(seen)):
            got = overlap(d, a, b, n)
            assert got.shape == (B, 16, 16) and got.min() >= 0 and got.sum(2).max() < 1 + 1e-5
            if 'crop' in kw: continue                                                     # the mirror shows places twice; below
            for i in range(B):
                p, q = patches(seen[a][i], n), patches(seen[b][i], n)
                lo, hi = q.amin(-1)[None, :, :, None], q.amax(-1)[None, :, :, None]
                share = ((p[:, None] >= lo) & (p[:, None] <= hi)).all(2).float().mean(-1)
                assert (share - got[i]).abs().max() < .09                                 # a row and a column of 32 pixels, and bytes

def test_overlap_with_itself_mirrored_and_turned_round():
    d = drawn(4, count=3, local=1)
    d.box[1], d.flip[1] = d.box[0], d.flip[0]; d.box[2], d.flip[2] = d.box[0], -d.flip[0]
    assert torch.allclose(overlap(d, 0, 1, 3), torch.eye(9).expand(4, 9, 9), atol=1e-5)
    mirror = torch.eye(9).view(3, 3, 9).flip(1).view(9, 9)
    assert torch.allclose(overlap(d, 0, 2, 3), mirror.expand(4, 9, 9), atol=1e-5)
    ab, ba = overlap(d, 0, 3, (3, 2)), overlap(d, 3, 0, (2, 3))                            # the same areas, as shares of either
    area = lambda box, g: box[..., 2:].prod(-1)[:, None, None] / g**2
    assert ab.shape == (4, 9, 4) and torch.allclose(ab * area(d.box[0], 3), ba.transpose(1, 2) * area(d.local.box[0], 2), atol=1e-6)

def test_the_mirror_world_overlaps_with_nothing():
    d = drawn(2, **STILL | dict(count=3, crop='simple')); d.box[:] = torch.tensor([0., 0., 1., 1.]); d.box[0, :, 1] = .5; d.box[1, :, 1] = -.5
    for a, inside in ((0, [1., 1, 1, 0]), (1, [0., 1, 1, 1])):                              # the right quarter of view 0 is over the border, the left one of view 1
        for b in (a, 2): assert torch.allclose(overlap(d, a, b, 4).sum(2).view(2, 4, 4), torch.tensor(inside).expand(2, 4, 4), atol=1e-5)

# ---- training: local views, and pictures cut in workers

def test_local_views_reach_the_whole_image_loss_alone():
    r = tiny(views__local=3, views__local_size=16); m = build(r).train(); seen = []
    m.target.register_forward_hook(lambda mod, a, out: seen.append(a[0].shape[-1]))
    g = gen(); x, few, masks = torch.randn(2, 8, 3, 32, 32, generator=g), torch.randn(3, 8, 3, 16, 16, generator=g), m.draw_masks(16, g)
    codes = []; m.whole.register_forward_pre_hook(lambda mod, a: codes.append(a[0].shape[:2]))
    a = m(x, masks, local=few); b = m(x, masks, local=few + 1)
    assert set(seen) == {32} and codes == [(5, 8)]*2 and a['level_0'] == b['level_0'] and a['whole'] != b['whole']
    few.requires_grad_(); m(x, masks, local=few)['loss'].backward(); assert few.grad.abs().sum() > 0

def test_one_global_view_and_local_ones(tmp_path, monkeypatch):
    seen = []; monkeypatch.setattr(hm.HJEPA, 'forward', lambda self, v, m, step=0, local=None, *rest, f=hm.HJEPA.forward, **kw: (seen.append((v.shape[:2], local.shape)), f(self, v, m, step, local, *rest, **kw))[1])
    run = fit(tiny(views__count=1, views__local=2, views__local_size=8, train__steps=2), data=images(), out=tmp_path)
    assert run.finished and all(math.isfinite(q['loss']) and q['whole'] > 0 for q in run.history)
    assert seen[0] == ((1, 8), (2, 8, 3, 8, 8))

class Pictures: # a lazy set that can open its pictures at their own size
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]
    def open(self, i): return TF.to_pil_image(self.x[i])

@pytest.mark.parametrize('kw', [{}, dict(views__local=2, views__crop='simple', views__kind='3aug', train__accumulate=2)])
def test_pictures_train_as_bytes_do(tmp_path, kw):
    r, x = tiny(train__steps=2, train__monitor=1, **kw), images()
    a, b = (fit(r, data=d, out=tmp_path/n) for d, n in ((x, 'bytes'), (Pictures(x), 'pictures')))
    assert a.finished and b.finished
    for p, q in zip(a.history, b.history):
        assert p['loss'] != q['loss'] and all(abs(p[k] - q[k]) < .02*max(1, abs(p[k])) for k in p if k == 'loss' or k.startswith('level'))

def test_shares_of_a_mixture_are_facts(tmp_path, capsys):
    part = lambda name, n: ImageSet(name, 'train', images(n), torch.zeros(n, dtype=torch.long), ('x',), 'here')
    run = fit(tiny(train__steps=4), data=Mix([part('a', 24), part('b', 8)], [1, 3]), out=tmp_path) # one epoch
    said = capsys.readouterr()
    assert run.facts['shares'] == {'a': .25, 'b': .75} and 'drawn from: a 25.0%, b 75.0%' in said.out and 'a=25%, b=75%' in said.err    # at the end, and while it trains

def test_workers_change_nothing(tmp_path):
    oblong = Pictures([torch.randint(256, (3, 40 + i, 70 - i), dtype=torch.uint8, generator=gen(i)) for i in range(16)])
    a, b = (fit(tiny(train__steps=4, views__local=2, data__workers=w), data=oblong, out=tmp_path/str(w)) for w in (0, 2))
    assert losses(a) == losses(b) and same(weights(a.model), weights(b.model))

def test_data_by_name_goes_into_the_recipe(tmp_path, monkeypatch):
    asked = []; monkeypatch.setattr(ht, 'load_images', lambda name, split, image: (asked.append((name, split, image)), images())[1])
    run = fit(tiny(train__steps=1), data='mix:a=1,b=2', out=tmp_path)
    assert asked == [('mix:a=1,b=2', 'train', 32)] and run.recipe.data.name == 'mix:a=1,b=2' and 'mix:a=1,b=2' in (tmp_path/'config.yaml').read_text()

def test_workers_cut_what_one_process_would():
    r, x = tiny(views__local=2, views__local_size=8), [TF.to_pil_image(torch.randint(256, (3, 40 + i, 70 - i), dtype=torch.uint8, generator=gen(i))) for i in range(8)]
    make, threads = pickle.loads(pickle.dumps(Crops(r))), torch.get_num_threads()
    whole, other = make(x, 3, torch.arange(8)), make(x, 4, torch.arange(8))
    halves = [make(x[i:i+4], 3, torch.arange(i, i+4)) for i in (0, 4)]
    assert [t.shape for t in whole] == [(2, 8, 3, 32, 32), (2, 8, 3, 8, 8)] and all(t.dtype == torch.uint8 for t in whole)
    for k in (0, 1): assert torch.equal(whole[k], torch.cat([h[k] for h in halves], 1)) and not torch.equal(whole[k], other[k])
    g = torch.Generator().manual_seed(mixed_seed(r.seed, 3, 1))
    again = draw_views(8, r.views, g)                                                      # the trainer draws again, without knowing the pictures: the colours are the same
    aspect = torch.tensor([p.width / p.height for p in x]); told = draw_views(8, r.views, torch.Generator().manual_seed(mixed_seed(r.seed, 3, 1)), aspect)
    assert torch.equal(again.colour, told.colour) and torch.equal(again.flip, told.flip) and not torch.equal(again.box, told.box)
    assert torch.equal(whole[0], pil_crops(x, told, 32)) and torch.get_num_threads() == threads
