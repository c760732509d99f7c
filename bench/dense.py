"""Segmentation and detection on frozen levels of a small encoder, beside the controls, on procedural scenes.

    python bench/dense.py --state runs/dense --json results/dense_scenes.json

The demo's recipe with three levels is pre-trained on scenes of 64 pixels without labels. Heads are fitted on labelled scenes of the
same world (its training split), judged on another one. Beside the JSON file lies a .npz with the answers to four test images.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
import torch
from hjepa.bench import machine
from hjepa.config import HJEPAError, recipe
from hjepa.evaluate.dense import at_size, dense_scenes, dense_arms, detection, segmentation
from hjepa.model import untrained
from hjepa.train import fit

RECIPE = {'data.name': 'scenes', 'data.image': 64, 'levels.cells': (1, 2, 4), 'levels.depths': (1, 2, 2, 2), 'levels.weights': (1, 1, 1),
          'masks.hidden': (16, 4, 1), 'masks.predict': (8, 4, 1), 'train.monitor': 0, 'train.precision': 'fp32'}

def pictures(model, twin, heads, images) -> dict: # {name: (n,S,S) uint8}
    size, out = images.shape[-1], {}
    arms = dense_arms(at_size(model, size), at_size(twin, size), size)
    for a in ('hjepa', 'untrained'):
        m, pooled = arms[a]; zs = m.levels(images, pooled=pooled)
        for (p, i), h in heads[a].items():
            if p == 'linear': out[f'{a}/{i}'] = h(zs, m, size).byte().numpy()
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=300, help='of pre-training'); p.add_argument('--train', type=int, default=300); p.add_argument('--test', type=int, default=200)
    p.add_argument('--detector-steps', type=int, default=300); p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    run = fit(recipe('cifar10-cpu', steps=a.steps, **RECIPE), out=a.state, live=False)
    if not run.finished: return 130
    model, twin = run.model.eval(), untrained(run.model.recipe)
    train, test = dense_scenes(a.train, 64, 0), dense_scenes(a.test, 64, 1)
    out = dict(machine('cpu'), command=' '.join(['python', *sys.argv]), recipe=model.recipe.model_dump(mode='json'))
    def keep(): Path(a.json).write_text(json.dumps(out, indent=1, allow_nan=False) + '\n'); np.savez_compressed(Path(a.json).with_suffix('.npz'), **arrays)
    out['segmentation'], heads = segmentation(model, twin, train, test, progress=True)
    arrays = pictures(model, twin, heads, test.images[:4]); keep()
    out['detection'], found = detection(model, twin, train, test, steps=a.detector_steps, progress=True)
    out['found'] = {f'{arm}/{n}': [[dict(box=[round(v, 1) for v in b], label=int(l), score=round(float(s), 3)) for b, l, s in zip(o['boxes'].tolist(), o['labels'], o['scores']) if s >= .3]
                                   for o in os[:4]] for (arm, n), os in found.items()}
    for (arm, n), os in found.items():
        if (arm, n) in (('hjepa', 'native'), ('untrained', 'native')): # outlines, packed
            for j, o in enumerate(os[:4]): arrays[f'masks/{arm}/{j}'] = np.packbits(o['masks'][o['scores'] >= .3].numpy(), axis=-1)
    out['load'] = machine('cpu')['load']; keep()
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'dense.py: {e}', file=sys.stderr); sys.exit(2)
