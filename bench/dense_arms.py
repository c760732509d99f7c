"""Does the hierarchy pay where it should most, on dense answers? Segmentation and detection by the encoders of curves.py: the hierarchy, its flat twin, MAE, and the same network untrained.

    python bench/curves.py --state runs/curves --looks 1 --arms hierarchy 'one level' MAE --seeds 0 1 2 --like results/curves_cifar10_cpu.json     # a fresh --state
    OMP_NUM_THREADS=1 python bench/dense_arms.py --runs runs/curves --json results/dense_arms_scenes.json

The encoders have seen photographs of 32 pixels, equally long at their own speed, and are frozen; here they look at drawn scenes of 64 pixels.
Heads see 300 labelled scenes, 200 others judge: mean intersection over union of sky, ground and object by a linear head and by k-NN, on
the input (a level, or all of them) that does best on a held-out tenth of the 300; and AP of boxes and masks of objects by a Mask R-CNN on
the native levels, or, where there is one level, on that one pooled. The hierarchy's levels also read an early block, which its twin's do not: so every
trained encoder is read in three ways more, or the hierarchy in two (segmentation only): a block a scale, which is how the hierarchy reads its own;
all these blocks at one scale; the last block at all scales. With two levels all three are equally wide. Sky is above and ground below, so a map that knows
the place and nothing of the image is a control, and each encoder is read once more by heads that are told the place. What is done is kept in --runs, so that a stopped command goes on.
The first of --arms says which levels and blocks are read, and stands as the untrained network.
"""
import argparse, json, sys
from pathlib import Path
import torch
from hjepa.bench import machine
from hjepa.config import HJEPAError, change
from hjepa.evaluate.dense import Patches, Places, Told, at_size, average_precision, dense_scenes, detect, draws, interval, iou, miou, segmenters, tallies, train_detector
from hjepa.files import write
from hjepa.model import build, load, untrained

def readings(r): # recipe of the hierarchy -> name -> recipe
    "Which blocks are read at which scales."
    *by_scale, top = r.levels.depths; last = [top] * len(by_scale)
    one = {'levels.cells': r.levels.cells[:1], 'levels.depths': [tuple(sorted({d for g in r.levels.groups for d in g})), top], 'levels.weights': [1.],
           'masks.hidden': [r.levels.cells[-1]], 'masks.predict': [1], 'encoder.patches': (), 'encoder.large_first': False} # what is hidden and drawn in training plays no part in reading
    return {'a block a scale': r, 'all blocks, one scale': change(r, **one), 'last block, all scales': change(r, **{'levels.depths': [*last, top]})}

def read_so(model, r): # of curves.py, recipe -> HJEPA
    "The same blocks, read as another recipe says."
    out = build(r).eval(); out.target.load_state_dict(model.target.state_dict()); return out

def segmented(model, train, test, seed): # of at_size() -> probe -> counts of every image, the input they were read from, and mIoU of every input
    heads = segmenters(model, False, train, seed=seed); n, out = tallies(model, False, heads, test), {}
    for p in ('linear', 'knn'):
        k = max((k for k in heads if k[0] == p), key=lambda k: heads[k].val)
        out[p] = dict(counts=n[k].tolist(), input=k[1], by_input={q[1]: float(miou(n[q].sum(0))) for q in heads if q[0] == p})
    return out

def judged(rows, classes): # of one seed -> the same with mIoU, IoU of every class, and paired differences instead of counts; intervals over images
    "An arm is compared with the untrained network and with the first arm, told the place if it was told."
    by, first, told = {r['arm']: r for r in rows}, rows[0]['arm'], lambda r: ', told the place' if 'told' in r['arm'] else ''
    for p in ('linear', 'knn'):
        t = {k: torch.tensor(r[p].pop('counts')).double() for k, r in by.items()}; w = draws(len(t[first]))
        again = {k: iou((w @ n.flatten(1)).unflatten(1, n.shape[1:])) for k, n in t.items()}; one = {k: iou(n.sum(0)) for k, n in t.items()}
        minus = lambda k, o: {c: dict(diff=float(a - b), **interval(x - y)) for c, a, b, x, y in (('mIoU', one[k].mean(), one[o].mean(), again[k].mean(1), again[o].mean(1)), *zip(classes, one[k], one[o], again[k].T, again[o].T))}
        for k, r in by.items():
            r[p] |= dict(miou=float(one[k].mean()), **interval(again[k].mean(1)), classes={c: dict(iou=float(v), **interval(d)) for c, v, d in zip(classes, one[k], again[k].T)},
                         minus={o: minus(k, o) for o in ('untrained' + told(r), first + told(r), 'place alone') if o != k})
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', required=True, metavar='DIR', help='the --state of curves.py'); p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--arms', nargs='+', default=['hierarchy', 'one level', 'MAE'], help='of curves.py, in this order; or pretrained:NAME, --seeds being of the heads alone')
    p.add_argument('--train', type=int, default=300); p.add_argument('--test', type=int, default=200); p.add_argument('--size', type=int, default=64, help='pixels'); p.add_argument('--detector-steps', type=int, default=200, help='0: no detection')
    p.add_argument('--json', metavar='FILE')
    a = p.parse_args(); root, facts, rows, done = Path(a.runs), machine('cpu'), [], []
    train, test = dense_scenes(a.train, a.size, 0, kinds=False), dense_scenes(a.test, a.size, 1, kinds=False)
    def judge(arm, seed, model, find=True):
        root.mkdir(parents=True, exist_ok=True); file = root / f"dense-{arm.replace(' ', '-').replace(':', '-')}-{seed}.json"
        if not file.exists() or 'counts' not in json.loads(file.read_text())['linear']:
            r = segmented(model, train, test, seed)
            if a.detector_steps and find: r |= average_precision(detect(train_detector(model, train, len(model.grids) > 2, a.detector_steps, seed=seed), test), test.objects)  # the last grid is the whole image
            write(file, json.dumps(r))
        rows.append(dict(arm=arm, seed=seed, **json.loads(file.read_text()))); r = rows[-1]; now = {p: 100*float(miou(torch.tensor(r[p]['counts']).sum(0))) for p in ('linear', 'knn')}
        print(arm, seed, f"mIoU {now['linear']:.1f} ({r['linear']['input']}) and {now['knn']:.1f} ({r['knn']['input']})", *(f"AP {100*r[k]['ap']:.1f} of {k}" for k in ('box', 'mask') if k in r), flush=True)
    for seed in a.seeds:
        for arm in a.arms:
            model = load(arm if ':' in arm else root / f"{arm.replace(' ', '-')}-{seed}").eval(); ours = at_size(model, a.size); judge(arm, seed, ours); judge(f'{arm}, told the place', seed, Told(ours, a.size), False)
            if arm == a.arms[0]:
                ways, none = readings(model.recipe), at_size(untrained(model.recipe), a.size); judge('untrained', seed, none); judge('untrained, told the place', seed, Told(none, a.size), False)
                judge('raw pixels', seed, Patches(ours, a.size)); judge('place alone', seed, Places(ours, a.size))
            for way, r in ways.items():
                if model.recipe.levels != r.levels: judge(f'{arm}, {way}', seed, at_size(read_so(model, r), a.size), False)
        done += judged(rows, test.classes); rows.clear()
    if a.json: write(Path(a.json), json.dumps(dict(facts, what='dense answers on frozen encoders', train=a.train, test=a.test, size=a.size, detector_steps=a.detector_steps, runs=done), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'dense_arms.py: {e}', file=sys.stderr); sys.exit(2)
