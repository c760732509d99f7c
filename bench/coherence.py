"""May the coherence scores of hjepa.analyze.consistency be trusted? A validation on fresh seeds and several data sets.

    python bench/coherence.py --state runs/coherence --json results/consistency_validation.json

For each set and seed an untrained encoder and its positive control (the same network, trained with labels) are compared on test
images; no probe is involved. Three questions were written down before any of these networks was trained:
  separates: the positive control is above untrained, pixels and its own pooled level 0, each interval above 0
  specific:  the real tree fits its clusters better than random regroupings of the classes, p < .05
  selective: judged by random trees instead, the score falls below half
A score is trusted if all three hold in every set and seed. Stopped and started again, it goes on where it was.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
from hjepa.analyze.consistency import TREES, Pixels, clusters, group_fit, hcs, hcs_minus, regroupings, resample, tree_paths
from hjepa.bench import machine
from hjepa.config import HJEPAError, recipe
from hjepa.evaluate.features import level_features
from hjepa.evaluate.probes import knn_probe
from hjepa.model import build
from consistency import control, sets

def scores(name:str, seed:int, a) -> dict: # of one set and seed
    twin = build(recipe('cifar10-cpu', seed=seed))
    some, train, test = sets(name, twin, 2000, a.train, a.test)
    best = control(twin, train, a.epochs, Path(a.state)/f'{name}-{seed}.safetensors', seed)
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
    a = p.parse_args(); rows = []
    for seed in a.seeds:
        for name in a.sets:
            f = Path(a.state)/f'{name}-{seed}.json'
            if not f.exists(): r = scores(name, seed, a); f.write_text(json.dumps(r))
            rows.append(json.loads(f.read_text())); r = rows[-1]
            print(name, seed, f"knn {r['knn']:.3f}", {k: [round(o[s]['value'], 3) for s in ('hcs', 'hcs_minus')] for k, o in r['arms'].items()}, r['wrong_trees'], flush=True)
            Path(a.json).write_text(json.dumps(dict(machine('cpu'), command=' '.join(['python', *sys.argv]), train=a.train, epochs=a.epochs, test=a.test,
                trees={k: TREES[k] for k in a.sets}, rows=rows, verdict={s: verdict(rows, s) for s in ('hcs', 'hcs_minus')}), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'coherence.py: {e}', file=sys.stderr); sys.exit(2)
