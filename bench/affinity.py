"""Which question is answered best at which level? The affinity matrices of hjepa.analyze.affinity, beside all controls.

    hjepa train cifar10-cpu data.name=scenes steps=1800 --out runs/scenes --no-report
    python bench/affinity.py runs/scenes --data scenes --control runs/control-scenes.safetensors --json results/affinity_scenes.json
    python bench/affinity.py pretrained:cifar10-cpu-long-20k --data cifar10 --control runs/control-20k.safetensors --json results/affinity_cifar10.json

MODEL and --control are as in consistency.py. Probes learn from --labelled of --pool training images.
"""
import argparse, json, sys
from dataclasses import replace
from pathlib import Path
from hjepa.analyze.affinity import affinity, answers, cifar_tasks, scene_tasks
from hjepa.analyze.consistency import read_arms
from hjepa.bench import machine
from hjepa.config import HJEPAError
from consistency import control, open_model, sets

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model'); p.add_argument('--data', default='scenes', choices=['scenes', 'cifar10']); p.add_argument('--control', metavar='FILE')
    p.add_argument('--pool', type=int, default=3000); p.add_argument('--labelled', type=int, default=1500); p.add_argument('--probes', type=int, default=2)
    p.add_argument('--train', type=int, default=20000); p.add_argument('--epochs', type=float, default=2); p.add_argument('--test', type=int, default=3000)
    p.add_argument('--width', type=int, default=192); p.add_argument('--mode', default='grid', choices=['grid', 'mean'], help='cells end to end, or their mean'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); model, twin = open_model(a.model)
    pool, train, test = sets(a.data, model, a.pool, a.train, a.test); best = control(model, train, a.epochs, a.control)
    if a.data == 'scenes': tasks = scene_tasks(pool.extra, test.extra)
    else: x, xt, tasks = cifar_tasks(pool, test); pool, test = replace(pool, images=x), replace(test, images=xt)
    right = {}
    for k, f in read_arms(model, twin, best, pool, test, a.mode).items():
        right[k] = answers(f, tasks, a.labelled, a.probes, a.width); print(k, {t: r.mean(1).round(3).tolist() for t, r in right[k].items()}, flush=True)
    Path(a.json).write_text(json.dumps(dict(machine('cpu'), model=a.model, data=a.data, pool=len(pool), labelled=a.labelled,
        probes=a.probes, width=a.width, mode=a.mode, test=len(test), supervised=dict(images=len(train), epochs=a.epochs), grids=[list(g) for g in model.grids],
        arms=affinity(right, tasks)), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'affinity.py: {e}', file=sys.stderr); sys.exit(2)
