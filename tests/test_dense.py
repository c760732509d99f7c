"Segmentation and detection against torchmetrics, pycocotools and scikit-learn; published folders; encoders and sets that are broken."
import contextlib, io, json
import numpy as np, pytest, torch
from dataclasses import replace
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import MulticlassJaccardIndex
from hjepa.config import HJEPAError
from hjepa.evaluate import dense as d
from hjepa.files import DataError
from hjepa.foreign import foreign
from hjepa.model import build

gen = lambda seed=0: torch.Generator().manual_seed(seed)
theirs = lambda k: MulticlassJaccardIndex(num_classes=k, average='macro', ignore_index=255)

@pytest.mark.parametrize('k,present', [(2, 2), (5, 5), (7, 3), (1, 1)])                     # (7, 3): four classes are nowhere
def test_miou_is_that_of_torchmetrics(k, present):
    for seed in range(5):
        g = gen(seed); y, p = (torch.randint(present, (4, 9, 9), generator=g) for _ in range(2))
        y[torch.rand(y.shape, generator=g) < .2] = 255
        ours = d.miou(d.tally(p, y, k).sum(0))
        if k > 1: assert abs(float(ours) - float(theirs(k)(p, y))) < 1e-6
        else: assert ours == 1

def test_miou_where_little_counts():
    y, p = torch.full((2, 4, 4), 255), torch.zeros(2, 4, 4, dtype=torch.long)
    assert d.miou(d.tally(p, y, 3).sum(0)).isnan() and theirs(3)(p, y).isnan()              # nothing counts
    y[0, 0, 0] = 1                                                                            # one pixel, answered wrongly: two classes at 0
    assert d.miou(d.tally(p, y, 3).sum(0)) == 0 == theirs(3)(p, y)
    y[0, 0, 0] = 0
    assert d.miou(d.tally(p, y, 3).sum(0)) == 1 == theirs(3)(p, y)

def test_the_mean_is_over_the_set_and_not_over_images():
    y = torch.tensor([[[0, 0], [0, 0]], [[0, 1], [1, 1]]]); p = torch.tensor([[[0, 0], [0, 1]], [[1, 1], [1, 1]]])
    t = d.tally(p, y, 2)
    assert abs(float(d.miou(t.sum(0))) - (3/5 + 3/5)/2) < 1e-9 and abs(float(d.miou(t).mean()) - (3/8 + 3/8)/2) < 1e-9

def test_soft_labels_of_whole_cells_are_logistic_regression():
    g = gen(); x = torch.randn(400, 6, generator=g); y = (x[:, :3] + torch.randn(400, 3, generator=g)).argmax(1)
    head, C = d.linear_head(x, torch.eye(3)[y], None, (.1,)); z = (x - x.mean(0)) / x.std(0, correction=0)
    sk = LogisticRegression(C=.1, tol=1e-8, max_iter=1000).fit(z.numpy(), y.numpy())
    assert np.abs(head(x).softmax(1).numpy() - sk.predict_proba(z.numpy())).max() < 2e-3

def test_knn_votes_by_hand():
    g = gen(); x, q = torch.randn(50, 5, generator=g), torch.randn(9, 5, generator=g); t = torch.rand(50, 4, generator=g)
    mu, sd = x.mean(0), x.std(0, correction=0); a, b = ((v - mu) / sd for v in (x, q))
    s = torch.nn.functional.cosine_similarity(b[:, None], a[None], dim=2)
    for row, ours in zip(s, d.knn_head(x, t, k=7)(q)):
        i = row.argsort(descending=True)[:7]; w = (row[i] / .07).exp()
        assert torch.allclose(ours, (w[:, None]*t[i]).sum(0) / w.sum(), atol=1e-4)

# ---- detection
def answers(s, n, seed=0): # the truth, shaken
    g, out = gen(seed), []
    for i in range(n):
        o = s.objects[i]; k = len(o['labels']); pick = torch.randint(k, (2*k,), generator=g)
        masks = torch.stack([o['masks'][j].roll(tuple(torch.randint(-2, 3, (2,), generator=g).tolist()), (0, 1)) for j in pick])
        b = (o['boxes'][pick] + 2*torch.randn(2*k, 4, generator=g)).view(-1, 2, 2)
        out.append(dict(boxes=torch.cat([b.amin(1), b.amax(1) + .1], 1), masks=masks.bool(), scores=torch.rand(2*k, generator=g),
                        labels=torch.where(torch.rand(2*k, generator=g) < .7, o['labels'][pick], torch.randint(1, 9, (2*k,), generator=g))))
    return out

def coco_ap(found, true, size, kind): # pycocotools alone, its own accumulation and its own reading of results
    n, gt = 0, dict(images=[dict(id=i + 1, height=size, width=size) for i in range(len(true))], categories=[dict(id=k) for k in range(1, 9)], annotations=[])
    code = lambda m: rle.encode(np.asfortranarray(m.numpy().astype(np.uint8)))
    wh = lambda b: [float(b[0]), float(b[1]), float(b[2]) - float(b[0]), float(b[3]) - float(b[1])]
    for i, o in enumerate(true):
        for b, l, m, c in zip(o['boxes'], o['labels'], o['masks'], o['iscrowd']):
            n += 1; gt['annotations'].append(dict(id=n, image_id=i + 1, category_id=int(l), bbox=wh(b), area=float(m.sum()), iscrowd=int(c), segmentation=code(m)))
    dets = [dict(image_id=i + 1, category_id=int(l), score=float(s), **(dict(bbox=wh(b)) if kind == 'bbox' else dict(segmentation=code(m))))
            for i, o in enumerate(found) for b, l, m, s in zip(o['boxes'], o['labels'], o['masks'], o['scores'])]
    with contextlib.redirect_stdout(io.StringIO()):
        c = COCO(); c.dataset = gt; c.createIndex(); e = COCOeval(c, c.loadRes(dets), kind); e.evaluate(); e.accumulate(); e.summarize()
    return e.stats[0]

@pytest.mark.parametrize('crowd', [False, True])
def test_ap_is_that_of_pycocotools_and_torchmetrics(crowd):
    s = d.dense_scenes(12, 64, 3); true, found = [dict(s.objects[i]) for i in range(12)], answers(s, 12)
    true[4] |= dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 64, 64, dtype=torch.uint8), iscrowd=torch.zeros(0, dtype=torch.long))
    found[5] = {k: v[:0] for k, v in found[5].items()}                                       # an image without objects, one without answers
    if crowd: true[6]['iscrowd'] = torch.ones_like(true[6]['iscrowd'])
    both = d.average_precision(found, true)
    for kind, k in (('bbox', 'box'), ('segm', 'mask')):
        ours, direct = d.precision(d.matches(found, true, 64, 8, kind)), coco_ap(found, true, 64, kind)
        assert .02 < direct < .9 and abs(ours.mean() - direct) < 1e-6 and abs(both[k]['ap'] - direct) < 1e-6, (kind, ours.mean(), direct, both[k])
        assert abs(ours[0] - both[k]['ap50']) < 1e-6 and abs(ours[5] - both[k]['ap75']) < 1e-6

def test_perfect_answers_and_other_images_answers():
    s = d.dense_scenes(16, 64, 5); true = [s.objects[i] for i in range(16)]
    perfect = [dict(o, masks=o['masks'].bool(), scores=torch.ones(len(o['labels']))) for o in true]
    for kind in ('bbox', 'segm'):
        assert (d.precision(d.matches(perfect, true, 64, 8, kind)) == 1).all()
        assert d.precision(d.matches(perfect[3:] + perfect[:3], true, 64, 8, kind)).mean() < .1
    none = [{k: v[:0] for k, v in o.items()} for o in perfect]
    assert d.precision(d.matches(none, true, 64, 8, 'bbox')).mean() == 0 and np.isnan(d.precision(d.matches(perfect, none, 64, 8, 'bbox'))).all()

# ---- encoders
class Fake: # features made from the truth, or broken ones
    def __init__(self, make, grids=((8, 8), (4, 4))): self.make, self.grids = make, list(grids)
    def levels(self, x, pooled=False): return [self.make(x, g) for g in self.grids]

def test_an_encoder_that_knows_beats_its_controls_and_one_that_knows_nothing_is_at_chance():
    tr, te = d.dense_scenes(40, 64, 0), d.dense_scenes(20, 64, 1)
    known = {bytes(i.numpy()): y for s in (tr, te) for i, y in zip(s.images, s.semantic)}
    def oracle(x, g):
        y = torch.stack([known.get(bytes(i.numpy()), torch.zeros(64, 64, dtype=torch.uint8)) for i in x]).long()
        return d.shares(y, 10, g, 64)
    constant = Fake(lambda x, g: torch.ones(len(x), g[0]*g[1], 4))
    r, heads = d.segmentation(Fake(oracle), constant, tr, te, most=800)
    json.dumps(r, allow_nan=False)
    for p, h in r['headline'].items():
        assert h['over']['untrained']['lo'] > .3 and h['over']['pixels']['lo'] > 0, (p, h)
        flat = r['scores'][p]['untrained']['0']; assert flat['miou'] < .1 and flat['lo'] <= flat['miou'] <= flat['hi']    # the commonest class everywhere
    assert d.segmentation(Fake(oracle), constant, tr, te, most=800)[0] == r                  # the seed decides everything

def test_the_place_alone_gives_every_image_the_commonest_answers_of_the_training_images():
    tr, te = d.dense_scenes(60, 64, 0, kinds=False), d.dense_scenes(6, 64, 1, kinds=False)
    where = d.Places(Fake(None), 64); heads = d.segmenters(where, False, tr); commonest = torch.nn.functional.one_hot(tr.semantic.long(), 3).sum(0).argmax(2)
    for probe in ('linear', 'knn'):
        answers = heads[probe, '0'](where.levels(te.images), where, 64); assert (answers == answers[:1]).all()      # whatever the image
        assert (answers[0] == commonest).float().mean() > .9
    found = d.detect(d.train_detector(where, tr, False, 2, 2, width=8), te.subset([0, 1])); assert torch.equal(found[0]['boxes'], found[1]['boxes'])
    constant = Fake(lambda x, g: torch.ones(len(x), g[0]*g[1], 4)); h = d.segmentation(constant, constant, tr, te, most=800)[0]['headline']['linear']
    assert h['over']['place']['hi'] < -.2 and abs(h['told']['place']['diff']) < .02                             # a constant is far behind the place; told it, it has what the place has

def test_places_are_where_cells_are():
    wide = d.Places(Fake(None, [(4, 8), (1, 1)]), 64); p = wide.levels(torch.zeros(2, 3, 64, 64))[0]; assert p.shape == (2, 32, 19)
    along = p[0, :, 0].view(4, 8); assert torch.allclose(along, ((torch.arange(8) + .5)/8*torch.pi).cos().expand(4, 8)) # the first wave goes along a row
    assert (p[0].std(0) > .1).all() and wide.places[1].tolist() == [[1.]]                                        # no column of rounding errors; one cell is nowhere
    odd = d.at_size(build(dict(encoder=dict(patch=4, dim=16, depth=1, heads=1), levels=dict(depths=(1,)*4))), 56); assert odd.grids[2] == (3, 3)
    assert torch.allclose(d.Places(odd, 56).places[2].view(3, 3, 8)[0, :, 0], (torch.tensor([8., 24, 40])/56*torch.pi).cos())  # cells that end eight pixels before the border

def test_encoders_that_are_broken():
    s = d.dense_scenes(12, 64, 0); fine = Fake(lambda x, g: torch.randn(len(x), g[0]*g[1], 4, generator=gen()))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(HJEPAError, match='NaN or infinite'): d.segmentation(Fake(lambda x, g: torch.full((len(x), g[0]*g[1], 4), bad)), fine, s, s)
    with pytest.raises(HJEPAError, match='loss of the detector'): d.train_detector(Fake(lambda x, g: torch.full((len(x), g[0]*g[1], 4), torch.nan)), s, steps=1, batch=2, width=8)
    with pytest.raises(HJEPAError, match='grids'): d.at_size(Fake(lambda x, g: torch.ones(len(x), 9, 4)), 64)
    with pytest.raises(HJEPAError, match='no level with more than one cell'): d.strides(Fake(None, [(1, 1)]), 64)
    with pytest.raises(HJEPAError, match='Level 1'): d.strides(Fake(None, [(16, 16), (4, 4)]), 64)            # a gap: a stride of 8 is missing
    net = d.train_detector(Fake(lambda x, g: torch.ones(len(x), g[0]*g[1], 4)), s, steps=2, batch=2, width=8)  # constant: nothing to learn, nothing breaks
    assert len(d.detect(net, s.subset([0, 1]))) == 2

def test_sets_that_are_broken():
    s, m = d.dense_scenes(12, 64, 0), Fake(lambda x, g: torch.rand(len(x), g[0]*g[1], 4, generator=gen()))
    seg = lambda a, b: d.segmentation(m, m, a, b, most=200)
    with pytest.raises(DataError, match='of one size'): seg(replace(s, semantic=s.semantic[:, :32, :32]), s)
    with pytest.raises(DataError, match='12 images and 5 maps'): seg(replace(s, semantic=s.semantic[:5]), s)
    with pytest.raises(DataError, match='holds the number 99'): seg(replace(s, semantic=s.semantic.where(s.semantic != 1, torch.tensor(99, dtype=torch.uint8))), s)
    with pytest.raises(HJEPAError, match='no map'): seg(replace(s, semantic=None), s)
    with pytest.raises(HJEPAError, match='at least 2'): seg(s.subset([0]), s)
    with pytest.raises(HJEPAError, match='differ in classes or size'): seg(s, d.dense_scenes(4, 32))
    with pytest.raises(HJEPAError, match='too few training images'): seg(replace(s, semantic=torch.full_like(s.semantic, 255)), s)
    with pytest.raises(HJEPAError, match='No pixel'): seg(s, replace(s, semantic=torch.full_like(s.semantic, 255)))
    unseen = replace(s, semantic=s.semantic.where(s.semantic != 1, torch.tensor(0, dtype=torch.uint8)))          # no ground while training
    r, _ = seg(unseen, s); assert all(v['iou'][1] == 0 for by in r['scores'].values() for a in by.values() for v in a.values())
    o = s.objects[0]
    with pytest.raises(DataError, match='a mask'): d.train_detector(m, replace(s, objects=[dict(o, masks=o['masks'][:, :32])]*12), steps=1, batch=1, width=8)
    with pytest.raises(DataError, match='outside 1 to 8'): d.train_detector(m, replace(s, objects=[dict(o, labels=o['labels'] + 8)]*12), steps=1, batch=1, width=8)
    with pytest.raises(DataError, match='objects for 3'): d.train_detector(m, replace(s, objects=[o]*3), steps=1)
    empty = {k: v[:0] for k, v in o.items()}
    with pytest.raises(HJEPAError, match='None of 2 drawn images'): d.train_detector(m, replace(s, objects=[empty]*12), steps=1, batch=2, width=8)
    with pytest.raises(HJEPAError, match='No image of scenes has an object'): d.detection(m, m, s, replace(s, objects=[empty]*12))

def test_a_foreign_encoder_is_read_at_the_size_it_sees():
    m = foreign('timm:test_vit', size=128, pretrained=False)
    s = d.dense_scenes(12, 64, 0)
    r, _ = d.segmentation(m, m.untrained(), s, s.subset(range(4)), most=200); assert set(r['scores']['linear']['hjepa']) == {*map(str, range(len(m.grids))), 'all'}
    assert d.strides(d.at_size(m, 64), 64)[0] == 64 // m.grids[0][0]
    net = d.train_detector(d.at_size(m, 64), s, steps=1, batch=2, width=8); assert len(d.detect(net, s.subset([0]))) == 1

def test_larger_images_leave_the_model_as_it_was():
    m = build('cifar10-cpu'); big = d.at_size(m, 96)
    assert m.grids[0] == (4, 4) and big.grids[0] == (12, 12) and [z.shape[1] for z in m.levels(torch.zeros(1, 3, 32, 32))] == [16, 4, 1]

# ---- published folders
def put(path, a, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True); im = Image.fromarray(a)
    if mode == 'P': im = im.convert('L'); im = Image.frombytes('P', im.size, im.tobytes()); im.putpalette(list(range(256))*3)
    im.save(path)

def test_voc_and_pets_as_torchvision_finds_them(tmp_path):
    rng = np.random.default_rng(0); pic = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    y = np.zeros((30, 30), np.uint8); y[:10], y[10:12], y[12:] = 15, 255, 3
    v = tmp_path/'VOCdevkit/VOC2012'; put(v/'JPEGImages/a.jpg', pic); put(v/'SegmentationClass/a.png', y, 'P')
    (v/'ImageSets/Segmentation').mkdir(parents=True); (v/'ImageSets/Segmentation/val.txt').write_text('a\n')
    s = d.voc(tmp_path, size=30); assert torch.equal(s.semantic[0], torch.from_numpy(y)) and s.classes[15] == 'person' and len(s.classes) == 21
    t = np.full((30, 30), 2, np.uint8); t[5:9] = 3; t[9:20] = 1
    o = tmp_path/'oxford-iiit-pet'; put(o/'images/cat_1.jpg', pic); put(o/'annotations/trimaps/cat_1.png', t); (o/'annotations/test.txt').write_text('cat_1 1 1 1\n')
    s = d.pets(tmp_path, size=30); assert [int(s.semantic[0][r, 0]) for r in (0, 6, 12)] == [0, 255, 1]
    m = Fake(lambda x, g: torch.rand(len(x), g[0]*g[1], 4, generator=gen()), [(5, 5)])
    both = replace(s, images=[s.images[0]]*4, semantic=[s.semantic[0]]*4)
    r, _ = d.segmentation(m, m, both, both); assert list(r['scores']['linear']['hjepa']) == ['0'] and 'hierarchy' not in r['headline']['linear']
