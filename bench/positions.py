"""How well do features survive another resolution? Encoders that differ in their positions alone, trained at 32 pixels, probed at 32, 48 and 64.

    nice python bench/positions.py --json results/positions_cifar10_cpu.json
    python bench/positions.py --device cuda --steps 20000 --batch 512 --dim 192 --depth 12 --heads 3 --images 5000 --kinds axial mixed sincos learned none --json FILE

Images are CIFAR-10's training images, enlarged bilinearly: a larger one holds no more detail, so what changes is the grid alone.
An encoder may give the larger grid larger coordinates ('grow') or the old ones, closer together ('stretch'); that is decided after
training, on the same weights. Features: the slow encoder's last block, averaged over the image. Two linear probes: `carried` was
fitted at 32 pixels, `fresh` at the resolution it is asked at. Probes are fitted on --images training images and asked on as many
others, which the encoders have not seen; the test split is never read. Controls: the same-seed untrained encoder, and raw pixels
averaged to 8x8. The interval is over images (bootstrap) for a row, over seeds (range) in the summary. Stopped and started again, it goes on
where it was.
"""
import argparse, json, statistics
from pathlib import Path
import torch
import torch.nn.functional as F
from hjepa.bench import machine
from hjepa.config import change, recipe
from hjepa.data.sets import load
from hjepa.data.views import normalise
from hjepa.evaluate.probes import linear_probe, stratified_subset
from hjepa.model import build
from hjepa.train import fit

def features(model, x, size, stretch, device):
    "Mean token of the last block, (N,D)."
    d, out = model.recipe.data, []
    model.target.stretch = stretch
    for part in x.split(250):
        part = normalise(part.to(device), d.mean, d.std)
        with torch.no_grad(): out.append(model.target(F.interpolate(part, (size, size), mode='bilinear')).mean(1).float().cpu())
    return torch.cat(out)

def rows(model, tag, train, test, sizes, device):
    kind, out = model.recipe.encoder.positions, []
    at = {(s, st): (features(model, train.images, s, st, device), features(model, test.images, s, st, device)) for s in sizes for st in ((False, True) if s != sizes[0] else (False,))
          if not (kind == 'learned' and s != sizes[0] and not st) and not (kind == 'none' and st)}
    first = at[sizes[0], False]
    for (s, st), (a, b) in at.items():
        ask = lambda z: linear_probe(z, train.labels, b, test.labels).json()
        out.append(dict(tag, size=s, grid='same' if s == sizes[0] else 'stretch' if st else 'grow', carried=ask(first[0]), fresh=ask(a)))
        print(*tag.values(), s, out[-1]['grid'], *(f"{k} {100 * out[-1][k]['acc']:.1f}" for k in ('carried', 'fresh')), flush=True)
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kinds', nargs='+', default=['axial', 'sincos']); p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    for k, v in dict(steps=200, batch=64, dim=64, depth=2, heads=4, images=1000).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cpu'); p.add_argument('--out', default='runs/positions'); p.add_argument('--json', required=True)
    a = p.parse_args(); sizes, found = (32, 48, 64), []
    whole = load('cifar10', 'train', image=32)
    both = stratified_subset(whole.labels, 2 * a.images, 1234)[torch.randperm(2 * a.images, generator=torch.Generator().manual_seed(0))]
    i, j = both.split(a.images); keep = torch.ones(len(whole), dtype=torch.bool); keep[both] = False
    train, test, rest = whole.subset(i), whole.subset(j), whole.subset(keep.nonzero()[:, 0])
    r = recipe('cifar10-cpu', **{'encoder.patch': 4, 'encoder.dim': a.dim, 'encoder.depth': a.depth, 'encoder.heads': a.heads, 'levels.depths': (a.depth,) * 3, 'masks.hidden': (8, 6), 'masks.predict': (8, 6),
        'train.batch': a.batch, 'train.steps': a.steps, 'train.monitor': 0, 'train.device': a.device})
    raw = [F.adaptive_avg_pool2d(normalise(x.images, r.data.mean, r.data.std), 8).flatten(1) for x in (train, test)]
    pixels = linear_probe(raw[0], train.labels, raw[1], test.labels).json()
    for seed in a.seeds:
        for kind in a.kinds:
            q, tag = change(r, seed=seed, **{'encoder.positions': kind}), dict(positions=kind, seed=seed)
            for trained, model in ((False, build(q).to(a.device).eval()), (True, fit(q, data=rest, out=f'{a.out}/{kind}-{seed}').model)):
                if trained or seed == a.seeds[0]: found += rows(model, dict(tag, trained=trained), train, test, sizes, a.device)
            Path(a.json).write_text(json.dumps(dict(machine(a.device), recipe=r.model_dump(mode='json'), pixels=pixels, summary=summary(found), rows=found), indent=1) + '\n')

def summary(found):
    "Mean and range over seeds, in points."
    out = {}
    for r in found:
        if r['trained']: out.setdefault(f"{r['positions']} {r['size']} {r['grid']}", []).append((100 * r['carried']['acc'], 100 * r['fresh']['acc']))
    return {k: {n: dict(mean=round(statistics.mean(x), 2), range=[round(min(x), 2), round(max(x), 2)]) for n, x in zip(('carried', 'fresh'), zip(*v))} for k, v in out.items()}

if __name__ == '__main__': main()
