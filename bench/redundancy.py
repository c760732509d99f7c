"""Does the question about a whole cell ask for anything that the questions about its four patches have not asked for already?

    fixed="minutes=null steps=1818 monitor=0 --no-report"                # asked for cells, or never; the same with the last block as the target of patches
    for s in 0 1 2; do
      [ $s = 0 ] || hjepa train cifar10-cpu $fixed seed=$s --out runs/asked-$s                            # seed 0 is in the package
      hjepa train cifar10-cpu $fixed seed=$s 'levels.weights=[1,0]' --out runs/never-$s
      hjepa train cifar10-cpu $fixed seed=$s 'levels.depths=[2,2,2]' --out runs/asked-deep-$s
      hjepa train cifar10-cpu $fixed seed=$s 'levels.depths=[2,2,2]' 'levels.weights=[1,0]' --out runs/never-deep-$s
    done
    OMP_NUM_THREADS=1 python bench/redundancy.py --json results/redundancy_cifar10_cpu.json

A cell of level 1 is hidden whole. The predictor answers for the cell, and for each of its four patches at level 0. How much of the variance of
the true cell (what the slow encoder makes of it, around the mean at its place) does a linear map explain that reads the one answer, the four, or
both? Ridge regression: fitted on half of --images training images, its weight chosen on a tenth of these, judged on the other half; 95 % intervals
over the judging images, paired where two are compared. What needs no predictor stands beside it: the mean of what is seen, and
the first model untrained. No label and no test image is read.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np, torch
from attention import model_and_twin                             # of this folder
from hjepa.analyze.predictions import ask
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.sets import load as load_set
from hjepa.evaluate.probing import side_of
from hjepa.files import write

MODELS = ['pretrained:cifar10-cpu', *(f'runs/{k}-{s}' for k, seeds in (('asked', (1, 2)), ('never', (0, 1, 2)), ('asked-deep', (0, 1, 2)), ('never-deep', (0, 1, 2))) for s in seeds)]

def asked(model, images, seed): # uint8 (N,3,H,W) -> cell (N,), inputs {name: (N,k)}, true (N,D)
    "One hidden cell of level 1 an image, its patches asked one by one as well."
    g, parts = torch.Generator().manual_seed(seed), []
    for x in images.split(500):
        m = model.draw_masks(len(x), g); cell = m.targets[1][:, :1]; m.targets = [model.pyramid.children(1)[cell[:, 0]], cell]
        fine, coarse = ask(model, x, m); parts.append((cell[:, 0], coarse.answer[:, 0], fine.answer.flatten(1), coarse.seen[:, 0], coarse.target[:, 0]))
    cell, coarse, fine, seen, true = (torch.cat(p) for p in zip(*parts))
    return cell, {'mean of what is seen': seen, 'answer for the cell': coarse, 'answers for its patches': fine, 'both answers': torch.cat((coarse, fine), 1)}, true

def ridge(x, y, weight): # (n,k), (n,D) centred -> (k,D)
    return torch.linalg.solve(x.T @ x + weight * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

def explained(model, images, seed, times=1000): # of asked() -> {name: {mean, lo, hi}}, shares of variance
    cell, inputs, true = asked(model, images, seed); n = len(true) // 2; fit, val, out, left = slice(0, n * 9 // 10), slice(n * 9 // 10, n), {}, {}
    place = torch.stack([true[:n][cell[:n] == c].mean(0) for c in range(model.pyramid.sizes[1])]); y = (true - place[cell]).double()
    boot = torch.randint(len(y) - n, (times, len(y) - n), generator=torch.Generator().manual_seed(seed)); total = y[n:].square().sum(1)
    for k, x in inputs.items():
        x = torch.cat((x, torch.nn.functional.one_hot(cell, len(place))), 1).double(); x = (x - x[:n].mean(0)) / x[:n].std(0)
        best = min((10.**e for e in range(-5, 2)), key=lambda w: (x[val] @ ridge(x[fit], y[fit], w) - y[val]).square().sum())
        left[k] = (x[n:] @ ridge(x[:n], y[:n], best) - y[n:]).square().sum(1)
    def said(part): # (n,) squared error explained -> share, over images drawn anew
        lo, hi = np.quantile((part[boot].sum(1) / total[boot].sum(1)).numpy(), (.025, .975)); return dict(mean=float(part.sum() / total.sum()), lo=float(lo), hi=float(hi))
    more = {f'{a}, over {b}': said(left[b] - left[a]) for a, b in (('both answers', 'answers for its patches'), ('both answers', 'answer for the cell'), ('answers for its patches', 'mean of what is seen'))}
    return {k: said(total - e) for k, e in left.items()} | more

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=MODELS, help='with a predictor of two levels'); p.add_argument('--data', default='cifar10')
    p.add_argument('--images', type=int, default=20000); p.add_argument('--seed', type=int, default=0); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); facts, rows = machine('cpu'), []
    for name in a.models:
        model, twin = model_and_twin(name)
        images = load_set(a.data, 'train', image=side_of(model)).images
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(a.seed))[:a.images]]
        for who, m in ((name, model), *[(f'{name}, untrained', twin)] * (not rows)):
            rows.append(dict(model=who, explained=explained(m, images, a.seed)))
            print(who, *(f"\n  {k}: {100*v['mean']:.1f} [{100*v['lo']:.1f}, {100*v['hi']:.1f}] %" for k, v in rows[-1]['explained'].items()), flush=True)
    write(Path(a.json), json.dumps(dict(facts, seed=a.seed, what='share of the variance of a hidden cell of level 1, around the mean at its place, that a linear map of the answers explains', images=a.images, runs=rows), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'redundancy.py: {e}', file=sys.stderr); sys.exit(2)
