"""Does the hierarchy pay where it should most, on dense answers? Segmentation and detection on scenes: the hierarchy, its flat twin, MAE, and the same network untrained.

    OMP_NUM_THREADS=1 python bench/dense_arms.py --state runs/dense-arms --json results/dense_arms_scenes.json

Every arm has the recipe of dense.py (scenes of 64 pixels, three levels below the whole image) and the steps that fit into --minutes
at its own speed, measured in turn before anything is trained. Frozen heads see 300 labelled scenes, 200 others judge: mean
intersection over union of sky, ground and object by a linear head and by k-NN, on the input (a level, or all of them) that does best
on a held-out tenth of the 300; and AP of boxes and masks of objects by a Mask R-CNN on the native levels, or, where there is one level,
on that one pooled. Stopped and started again, it goes on where it was; several seeds may run beside each other in one --state, and a
last call with all of them writes the file.
"""
import argparse, json, sys
from pathlib import Path
from arms import steps_in
from dense import RECIPE
from hjepa.bench import machine, one_level
from hjepa.config import HJEPAError, change, peer, recipe
from hjepa.data.sets import load
from hjepa.evaluate.dense import Patches, at_size, average_precision, dense_scenes, detect, miou, segmenters, tallies, train_detector
from hjepa.files import write
from hjepa.model import untrained
from hjepa.train import fit

def arms(r): # name -> recipe
    return {'hierarchy': r, 'one level': one_level(r), 'MAE': peer('mae', r)}

def segmented(model, train, test, seed): # of at_size() -> probe -> mIoU and the input it was read from
    heads = segmenters(model, False, train, seed=seed); n, out = tallies(model, False, heads, test), {}
    for p in ('linear', 'knn'):
        k = max((k for k in heads if k[0] == p), key=lambda k: heads[k].val)
        out[p] = dict(miou=float(miou(n[k].sum(0))), input=k[1], by_input={q[1]: float(miou(n[q].sum(0))) for q in heads if q[0] == p})
    return out

def judged(model, native, train, test, a, seed): # -> everything of one encoder
    out = segmented(model, train, test, seed)
    if a.detector_steps: out |= average_precision(detect(train_detector(model, train, native, a.detector_steps, seed=seed), test), test.objects)
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=2.); p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2], help='none: only measure the speeds')
    p.add_argument('--train', type=int, default=300); p.add_argument('--test', type=int, default=200); p.add_argument('--detector-steps', type=int, default=200, help='0: no detection')
    p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', metavar='FILE')
    a = p.parse_args(); base = recipe('cifar10-cpu', steps=1, **RECIPE); data = load('scenes', 'train', image=64); facts = machine('cpu')
    train, test = dense_scenes(a.train, 64, 0, kinds=False), dense_scenes(a.test, 64, 1, kinds=False)
    rs, state = arms(base), Path(a.state); state.mkdir(parents=True, exist_ok=True); plan = state / 'steps.json'
    steps = steps_in(rs, data.images, a.minutes, json.loads(plan.read_text()) if plan.exists() else {}); plan.write_text(json.dumps(steps)); print(steps, flush=True)
    runs = []
    def keep(arm, seed, make, native):
        file = state / f"{arm.replace(' ', '-')}-{seed}.json"
        if not file.exists(): write(file, json.dumps(judged(at_size(make(), 64) if arm != 'raw pixels' else make(), native, train, test, a, seed)))
        runs.append(dict(arm=arm, seed=seed, **json.loads(file.read_text()))); r = runs[-1]
        print(arm, seed, f"mIoU {100*r['linear']['miou']:.1f} ({r['linear']['input']}) and {100*r['knn']['miou']:.1f} ({r['knn']['input']})", *(f"AP {100*r[k]['ap']:.1f} of {k}" for k in ('box', 'mask') if k in r), flush=True)
    for seed in a.seeds:
        for k, r in rs.items():
            run = fit(change(r, seed=seed, steps=steps[k]), data=data, out=state / f"{k.replace(' ', '-')}-{seed}", live=False)
            if not run.finished: return 130
            model = run.model.eval(); keep(k, seed, lambda: model, len(model.grids) > 2)          # the last is the whole image
            if k == 'hierarchy': keep('untrained', seed, lambda: untrained(model.recipe), True); keep('raw pixels', seed, lambda: Patches(at_size(model, 64), 64), False)
    if a.json: write(Path(a.json), json.dumps(dict(facts, minutes=a.minutes, steps=steps, train=a.train, test=a.test, detector_steps=a.detector_steps, recipe=base.model_dump(mode='json'), runs=runs), indent=1) + '\n')

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'dense_arms.py: {e}', file=sys.stderr); sys.exit(2)
