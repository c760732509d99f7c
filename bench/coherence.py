"""May the coherence scores of hjepa.analyze.consistency be trusted? A validation on fresh seeds and several data sets.

    python bench/coherence.py --state runs/coherence --json results/consistency_validation.json

For each set and seed a small convolutional network is compared with itself after training with labels (the positive control), on
test images; no probe is involved. It is another kind of network than the ones that the scores are meant for. Three questions were written down before any of these networks was trained:
  separates: the positive control is above untrained, pixels and its own pooled level 0, each interval above 0
  specific:  the real tree fits its clusters better than random regroupings of the classes, p < .05
  selective: judged by random trees instead, the score falls below half
A score is trusted if all three hold in every set and seed. Stopped and started again, it goes on where it was.
"""
import argparse, copy, json, sys
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from hjepa.analyze.consistency import TREES, Pixels, clusters, group_fit, hcs, hcs_minus, regroupings, resample, tree_paths
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.sets import load as images
from hjepa.evaluate.features import level_features
from hjepa.evaluate.probes import knn_probe

class Net(nn.Module):
    "Three convolutions, each halving the grid; the levels are their outputs."
    def __init__(self, classes:int, width:int=32):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.parts, self.head = nn.ModuleList([conv(3, width), conv(width, 2*width), conv(2*width, 4*width)]), nn.Linear(4*width, classes)
        self.grids = [(16, 16), (8, 8), (4, 4)]
    def maps(self, x): # (B,3,32,32) uint8 -> 3 maps (B,C,h,w)
        x, out = x.float() / 128 - 1, []
        for p in self.parts: x = p(x); out.append(x)
        return out
    @torch.no_grad()
    def levels(self, x, pooled=False): # -> (B,N_l,D_l)
        m = self.maps(x)
        return [(F.adaptive_avg_pool2d(m[0], g) if pooled else f).flatten(2).mT for f, g in zip(m, self.grids)]

def fit(net:Net, images, labels, epochs:float, seed:int, batch:int=128, lr:float=2e-3) -> Net: # trained with the labels, crops and flips
    g, n = torch.Generator().manual_seed(seed), len(images); steps = int(epochs * n / batch)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=.05); plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps)
    for _ in range(steps):
        i = torch.randint(n, (batch,), generator=g); a, b = torch.randint(0, 7, (2,), generator=g).tolist()
        x = F.pad(images[i].float(), (3,)*4, mode='reflect')[:, :, a:a+32, b:b+32]
        x = torch.where((torch.rand(batch, generator=g) < .5)[:, None, None, None], x.flip(3), x)
        F.cross_entropy(net.head(net.maps(x)[-1].mean((2, 3))), labels[i]).backward()
        opt.step(); opt.zero_grad(); plan.step()
    return net.eval()

def scores(name:str, seed:int, a) -> dict: # of one set and seed
    some, train, test = (images(name, s, 32).subset(slice(n)) for s, n in (('train', 2000), ('train', a.train), ('test', a.test)))
    torch.manual_seed(seed); twin = Net(len(train.classes)).eval(); best = fit(copy.deepcopy(twin).train(), train.images, train.labels, a.epochs, seed)
    paths = tree_paths(TREES[name], test.classes); group, y, n = paths[:, 0], test.labels.numpy(), len(test); trees = regroupings(group, seed=seed)
    feats = dict(untrained=level_features(twin, test), pixels=level_features(Pixels(twin.grids), test, mode='grid'),
                 pooled_l0=level_features(best, test, pooled=True), supervised=level_features(best, test))
    cl = {k: (clusters(f[-2], 2*len(paths), seed), clusters(f[-1], 2*len(np.unique(group)), seed)) for k, f in feats.items()}
    by = dict(hcs=lambda c, i: hcs(c[0][i], c[1][i], y[i], paths), hcs_minus=lambda c, i: hcs_minus(c[0][i], c[1][i], y[i], trees))
    wrong, c, every = trees[np.random.default_rng(seed).permutation(np.arange(1, len(trees)))[:30]], cl['supervised'], np.arange(n)
    other = lambda t: np.concatenate([t[None], trees])                          # a wrong tree in the place of the real one
    half = lambda f: resample(f, n, 100, True, seed)
    return dict(data=name, seed=seed, knn=knn_probe(level_features(best, some)[-1], some.labels, feats['supervised'][-1], test.labels).acc,
        arms={k: {s: half(lambda i: f(v, i)) for s, f in by.items()} | dict(tree=group_fit(v[1], y, trees)) for k, v in cl.items()},
        over={k: {s: half(lambda i: f(c, i) - f(v, i)) for s, f in by.items()} for k, v in cl.items() if k != 'supervised'},
        wrong_trees=dict(hcs=float(np.mean([hcs(*c, y, t[:, None]) for t in wrong])), hcs_minus=float(np.mean([hcs_minus(*c, y, other(t)) for t in wrong]))))

def verdict(rows:list, s:str) -> dict: # of one score
    separates = [f"{r['data']}-{r['seed']} over {k}" for r in rows for k, o in r['over'].items() if o[s]['lo'] is None or o[s]['lo'] <= 0]
    specific = [f"{r['data']}-{r['seed']}" for r in rows if r['arms']['supervised']['tree']['p'] >= .05]
    selective = [f"{r['data']}-{r['seed']}" for r in rows if r['wrong_trees'][s] >= r['arms']['supervised'][s]['value'] / 2]
    return dict(trusted=not (separates or specific or selective), fails=dict(separates=separates, specific=specific, selective=selective))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sets', nargs='+', default=list(TREES), choices=list(TREES)); p.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    p.add_argument('--train', type=int, default=20000); p.add_argument('--epochs', type=float, default=4); p.add_argument('--test', type=int, default=2000)
    p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); rows = []; Path(a.state).mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        for name in a.sets:
            f = Path(a.state)/f'{name}-{seed}.json'
            if not f.exists(): r = scores(name, seed, a); f.write_text(json.dumps(r))
            rows.append(json.loads(f.read_text())); r = rows[-1]
            print(name, seed, f"knn {r['knn']:.3f}", {k: [round(o[s]['value'], 3) for s in ('hcs', 'hcs_minus')] for k, o in r['arms'].items()}, r['wrong_trees'], flush=True)
            Path(a.json).write_text(json.dumps(dict(machine('cpu'), train=a.train, epochs=a.epochs, test=a.test,
                trees={k: TREES[k] for k in a.sets}, rows=rows, verdict={s: verdict(rows, s) for s in ('hcs', 'hcs_minus')}), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'coherence.py: {e}', file=sys.stderr); sys.exit(2)
