"""What does an encoder look at, and is the map right? Deletion on photographs, pointing on procedural scenes, beside the untrained twin.

    python bench/attention.py --images 300 --json results/attention_cifar10_cpu.json
    python bench/attention.py --model runs/demo --other pretrained:cifar10-cpu-long-20k --json FILE

--model is a run directory, a model.safetensors, pretrained:NAME or timm:NAME. Attentive probes are fitted on --labelled training images
(of --data: their classes; of scenes: the shape of the main object) and on nothing else; maps are made for --images other ones.
--other is a judge of deletion that made none of the maps.
"""
import argparse, json, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from hjepa.analyze.attention import (Colours, area, attentive_head, cells_at, controls, deletion, interval, mean_tokens, network_maps, occlusion, others,
                                     patch_grid, pointing, similarity)
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.scenes import scenes
from hjepa.data.sets import load as load_set
from hjepa.data.truth import truth
from hjepa.evaluate.features import cells
from hjepa.evaluate.probes import stratified_subset
from hjepa.evaluate.probing import side_of
from hjepa.foreign import foreign
from hjepa.model import load, load_pretrained, untrained

WORLDS, SHOWN = 720_000, 4                                       # scenes that no training set uses; examples kept for the figures

def model_and_twin(name):
    "The network, and the same one untrained."
    kind, _, rest = name.partition(':')
    if kind == 'timm': m = foreign(name); return m, m.untrained()
    m = load_pretrained(rest) if kind == 'pretrained' else load(name)
    return m, untrained(m.recipe).eval()

def small(t): return [[round(float(v), 4) for v in row] for row in t.flatten(1)]

def deleted(model, twin, other, data, n, labelled, seed):
    "Deletion of every map, judged by the trained network with its probe; of some maps by the twin too, and by another network, which made none of them."
    train, test = load_set(data, image=side_of(model)), load_set(data, 'test', image=side_of(model))
    train, test = (s.subset(stratified_subset(s.labels, k, seed)) for s, k in ((train, labelled), (test, n)))
    nets = dict(hjepa=model, untrained=twin, other=other)
    heads = {a: attentive_head(cells(m, train)[0], train.labels, seed=seed) for a, m in nets.items()}
    judges = {a: lambda x, a=a, m=m: heads[a](m.levels(x)[0].cpu())[0].softmax(-1) for a, m in nets.items()}
    x, fill = test.images, train.images.float().mean((0, 2, 3)).round().to(torch.uint8)
    grid, g = patch_grid(model), torch.Generator().manual_seed(seed); random = [torch.rand(len(x), *grid, generator=g) for _ in range(5)]
    maps = {a: {k: v for k, v in network_maps(m, x, heads[a]).items() if 'head' not in k} for a, m in (('hjepa', model), ('untrained', twin))}
    maps |= dict(control=controls(x, grid) | dict(occlusion=occlusion(judges['hjepa'], x, grid, fill)))
    def judged(judge, maps): # what each map gains over the mean of random orders
        score = lambda m: area(deletion(judge, x, m, fill, seed)); rand = torch.stack([*map(score, random)]).mean(0)
        areas = {a: {k: score(m) for k, m in ms.items()} for a, ms in maps.items()}
        out = {a: {k: dict(area=interval(v), gain=interval(rand - v)) for k, v in d.items()} for a, d in areas.items()}
        for k, v in areas['hjepa'].items(): out['hjepa'][k]['minus_untrained'] = interval(areas['untrained'][k] - v)
        return dict(probe_accuracy=round(float((judge(x).argmax(1) == test.labels).float().mean()), 4), random=interval(rand), maps=out)
    some = {a: {k: v for k, v in d.items() if k in ('rollout', 'probe', 'centre', 'contrast', 'odd colour')} for a, d in maps.items()}
    return dict(data=data, images=len(x), labelled=len(train), **judged(judges['hjepa'], maps), other_judges={a: judged(judges[a], some) for a in ('untrained', 'other')})

def pointed(model, twin, n, labelled, seed):
    "Pointing on exact masks; also with the cell most like the one under the middle of the object, and with each block's and head's mean map, the same for every image."
    size = side_of(model); train, y = scenes(labelled, size, seed=WORLDS + 2*seed); t = truth(n, size, seed=WORLDS + 2*seed + 1)
    mask, at = t.ids == 1, torch.stack([(t.labels[k].float() + 1) / 2 for k in 'yx'], 1)
    grid, kept, hits, fixed, right = patch_grid(model), {}, {}, {}, {}
    def like(m): # level -> shares of the most similar other cell
        alike = similarity(m, t.images, at, mean_tokens(m, train)); return alike, {f'like it, level {l}': pointing(others(s, i), mask) for l, (s, i) in enumerate(zip(alike, cells_at(m, at))) if s[0].numel() > 1}
    for a, m in (('hjepa', model), ('untrained', twin)):
        head = attentive_head(cells(m, train)[0], y['shape'], seed=seed); maps = network_maps(m, t.images, head); alike, near = like(m)
        right[a] = interval((head(m.levels(t.images)[0].cpu())[0].argmax(1) == t.labels['shape']).float())
        hits[a] = {k: pointing(v, mask) for k, v in maps.items()} | near
        fixed[a] = {k: pointing(v.mean(0, keepdim=True).expand_as(v), mask) for k, v in maps.items()}
        kept[a] = dict(maps={k: small(v[:SHOWN]) for k, v in maps.items()}, alike=[small(s[:SHOWN]) for s in alike])
    share = lambda g: F.adaptive_avg_pool2d(mask[:, None].float(), tuple(g))[:, 0]
    hits['control'] = {k: pointing(v, mask) for k, v in (controls(t.images, grid) | dict(ceiling=share(grid))).items()} | like(Colours(model.grids))[1]
    chance, ceiling = dict(maps=mask.float().mean((1, 2))), {}
    for l, i in enumerate(cells_at(model, at)):                  # random other cells, and the best other cell
        if tuple(model.grids[l]) != (1, 1): k = f'like it, level {l}'; chance[k], ceiling[k] = (pointing(others(m, i), mask) for m in (torch.zeros(n, *model.grids[l]), share(model.grids[l])))
    of = lambda k: chance.get(k, chance['maps'])
    out = {a: {k: dict(hit=interval(v), gain=interval(v - of(k))) for k, v in d.items()} for a, d in hits.items()}
    for a, d in fixed.items():
        for k, v in d.items(): out[a][k]['minus_fixed'] = interval(hits[a][k] - v)
    for k, v in hits['hjepa'].items(): out['hjepa'][k]['minus_untrained'] = interval(v - hits['untrained'][k])
    shown = dict(world=WORLDS + 2*seed + 1, size=size, grid=grid, grids=model.grids, at=[[round(v, 4) for v in p] for p in at[:SHOWN].tolist()], **kept)
    often = t.labels['shape'].bincount().max() / n
    return dict(images=n, labelled=labelled, question='shape', probe_accuracy=right | dict(most_frequent=round(float(often), 4)), chance={k: interval(v) for k, v in chance.items()},
                ceiling={k: interval(v) for k, v in ceiling.items()}, maps=out), shown

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='pretrained:cifar10-cpu-long-20k'); p.add_argument('--other', default='pretrained:cifar10-cpu'); p.add_argument('--data', default='cifar10')
    p.add_argument('--images', type=int, default=500); p.add_argument('--labelled', type=int, default=5000); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--note', help='where the weights come from, if the name does not say'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    facts = dict(machine('cpu'), model=a.note or a.model, other=a.other, seed=a.seed)
    (model, twin), (other, _) = map(model_and_twin, (a.model, a.other))
    t = time.perf_counter()
    pointing_, shown = pointed(model, twin, a.images, a.labelled, a.seed)
    out = dict(deletion=deleted(model, twin, other, a.data, a.images, a.labelled, a.seed), pointing=pointing_, shown=shown)
    Path(a.json).write_text('{' + ',\n '.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in (facts | dict(seconds=round(time.perf_counter() - t, 1)) | out).items()) + '}\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'attention.py: {e}', file=sys.stderr); sys.exit(2)
