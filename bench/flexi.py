"""Does one encoder serve several patch sizes? Encoders trained on 4-pixel patches, on 8-pixel ones, on both in turn (FlexiViT), and on both with the large ones first; each probed at 4, 8 and 16 pixels.

    python bench/flexi.py --json results/flexi_cifar10_cpu.json
    python bench/flexi.py --device cuda --steps 20000 --batch 512 --dim 192 --depth 12 --heads 3 --json FILE

All arms are given the FLOPs of --steps steps on 4-pixel patches, so those that see large patches see more images. A size that an arm was
not trained on is read through the resized patch embedding, as FlexiViT's authors read a ViT. Features: the slow encoder's last block,
averaged over the image; a linear probe for each size, fitted on --images training images and asked on as many others, which no encoder has
seen; the test split is never read. Controls: the same-seed untrained encoder, and raw pixels averaged to 8x8. The interval is over images
(bootstrap) for a row, over seeds (range) in the summary. Stopped and started again, it goes on where it was.
"""
import argparse, json, statistics, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from hjepa.bench import machine
from hjepa.config import change, recipe
from hjepa.data.sets import load
from hjepa.data.views import normalise
from hjepa.evaluate.probes import linear_probe, stratified_subset
from hjepa.model import HJEPA, build
from hjepa.train import fit

SIZES = (4, 8, 16)
ARMS = {'4 pixels': {}, '8 pixels': {'encoder.patch': 8, 'levels.cells': [1], 'levels.weights': [1], 'levels.depths': [0, 0], 'masks.hidden': [6], 'masks.predict': [6]},
        '4 and 8': {'encoder.patches': [4, 8]}, '8, then 4': {'encoder.patches': [4, 8], 'encoder.large_first': True}}

def features(model, x, p, device): # images, side of a patch -> (N,D)
    "Mean token of the last block."
    d, out = model.recipe.data, []
    for part in x.split(250):
        with torch.no_grad(): out.append(model.target(normalise(part.to(device), d.mean, d.std), p=p).mean(1).float().cpu())
    return torch.cat(out)

def flops(r, progress): # a recipe, share of the run that is over -> of a step
    "A step's cost, at the patches that are drawn at that time."
    model = build(r)
    model.draw_masks = lambda B, **kw: HJEPA.draw_masks(model, B, progress=progress, **kw)
    return model.step_cost()['flops_per_image'] * r.train.batch

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    for k, v in dict(steps=240, batch=128, dim=96, depth=4, heads=4, images=5000).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cpu'); p.add_argument('--out', default='runs/flexi'); p.add_argument('--json', required=True)
    a = p.parse_args(); found, D = [], a.depth
    whole = load('cifar10', 'train', image=32)
    both = stratified_subset(whole.labels, 2 * a.images, 1234)[torch.randperm(2 * a.images, generator=torch.Generator().manual_seed(0))]
    i, j = both.split(a.images); keep = torch.ones(len(whole), dtype=torch.bool); keep[both] = False
    train, test, rest = whole.subset(i), whole.subset(j), whole.subset(keep.nonzero()[:, 0])
    base = recipe('cifar10-cpu', **{'encoder.patch': 4, 'encoder.dim': a.dim, 'encoder.depth': D, 'encoder.heads': a.heads, 'levels.cells': (1, 2), 'levels.depths': (D // 2, D, D), 'levels.weights': (1, 1),
        'masks.hidden': (8, 6), 'masks.predict': (8, 6), 'train.batch': a.batch, 'train.steps': a.steps, 'train.monitor': 0, 'train.device': a.device})
    rs = {k: change(base, **{n: [D] * len(v) if n == 'levels.depths' else v for n, v in arm.items()}) for k, arm in ARMS.items()}
    few, many = (flops(rs['8, then 4'], t) for t in (0., 1 - 1e-6))      # of a step on large patches, on small ones
    cost = {k: (few + many) / 2 if r.encoder.patches else flops(r, None) for k, r in rs.items()}
    rs = {k: change(r, steps=round(a.steps * cost['4 pixels'] / cost[k])) for k, r in rs.items()}
    raw = [F.adaptive_avg_pool2d(normalise(x.images, base.data.mean, base.data.std), 8).flatten(1) for x in (train, test)]
    pixels = linear_probe(raw[0], train.labels, raw[1], test.labels).json()
    for seed in a.seeds:
        for k, r in rs.items():
            q = change(r, seed=seed)
            run = fit(q, data=rest, out=Path(a.out) / f"{k.replace(', ', '-').replace(' ', '-')}-{seed}", live=False)
            if not run.finished: sys.exit('stopped: the same command goes on')
            for trained, model in ((False, build(q).to(a.device).eval()), (True, run.model)):
                for s in SIZES:
                    z = [features(model, x.images, s, a.device) for x in (train, test)]
                    found.append(dict(arm=k, seed=seed, trained=trained, patch=s, **linear_probe(z[0], train.labels, z[1], test.labels).json()))
                    print(k, seed, 'trained' if trained else 'untrained', s, f"{100 * found[-1]['acc']:.1f}", flush=True)
        Path(a.json).write_text(json.dumps(dict(machine(a.device), recipe=base.model_dump(mode='json'), arms=ARMS, steps={k: r.train.steps for k, r in rs.items()},
            flops={k: cost[k] * r.train.steps for k, r in rs.items()}, pixels=pixels, summary=summary(found), rows=found), indent=1) + '\n')

def summary(found):
    "Mean and range over seeds, in percent."
    out = {}
    for r in found: out.setdefault(f"{r['arm']}, at {r['patch']}, {'trained' if r['trained'] else 'untrained'}", []).append(100 * r['acc'])
    return {k: dict(mean=round(statistics.mean(x), 2), range=[round(min(x), 2), round(max(x), 2)]) for k, x in out.items()}

if __name__ == '__main__': main()
