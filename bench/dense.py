"""Segmentation and detection on frozen levels of a small encoder, beside the controls, on procedural scenes.

    python bench/dense.py --state runs/dense --json results/dense_scenes.json

The demo's recipe with three levels is pre-trained on scenes of 64 pixels without labels. Heads are fitted on labelled scenes of the
same world (its training split), judged on another one: segmentation with ten classes, and with sky, ground and object; detection of
objects of any kind, since a few hundred steps do not teach eight. Beside the JSON file lies a .npz with the answers to four test
images. Of --parts, those that are left out stay as the file has them.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
from hjepa.bench import machine
from hjepa.config import HJEPAError, recipe
from hjepa.evaluate.dense import at_size, dense_scenes, dense_arms, detection, segmentation
from hjepa.model import untrained
from hjepa.train import fit

RECIPE = {'data.name': 'scenes', 'data.image': 64, 'levels.cells': (1, 2, 4), 'levels.depths': (1, 2, 2, 2), 'levels.weights': (1, 1, 1),
          'masks.hidden': (16, 4, 1), 'masks.predict': (8, 4, 1), 'train.monitor': 0, 'train.precision': 'fp32'}

PARTS = ['segmentation', 'objects', 'detection']

def pictures(model, twin, heads, images, what) -> dict: # {name: (n,S,S) uint8}
    size, out = images.shape[-1], {}
    arms = dense_arms(at_size(model, size), at_size(twin, size), size)
    for a in ('hjepa', 'untrained'):
        m, pooled = arms[a]; zs = m.levels(images, pooled=pooled)
        for (p, i), h in heads[a].items():
            if p == 'linear': out[f'{what}/{a}/{i}'] = h(zs, m, size).byte().numpy()
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=300, help='of pre-training'); p.add_argument('--train', type=int, default=300); p.add_argument('--test', type=int, default=200)
    p.add_argument('--detector-steps', type=int, default=300); p.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); facts = machine('cpu')  # before anything is written
    run = fit(recipe('cifar10-cpu', steps=a.steps, **RECIPE), out=a.state, live=False)
    if not run.finished: return 130
    model, twin = run.model.eval(), untrained(run.model.recipe)
    sets = lambda kinds: (dense_scenes(a.train, 64, 0, kinds=kinds), dense_scenes(a.test, 64, 1, kinds=kinds))
    file, arrays, out = Path(a.json), {}, {}
    if set(a.parts) != set(PARTS) and file.exists(): out, arrays = json.loads(file.read_text()), dict(np.load(file.with_suffix('.npz')))
    out |= dict(recipe=model.recipe.model_dump(mode='json'))
    def keep(part, r):
        out[part] = r | dict(machine=facts)
        file.write_text(json.dumps(out, indent=1, allow_nan=False) + '\n'); np.savez_compressed(file.with_suffix('.npz'), **arrays)
    for part, kinds in (('segmentation', True), ('objects', False)):
        if part not in a.parts: continue
        train, test = sets(kinds)
        r, heads = segmentation(model, twin, train, test, progress=True)
        if not kinds: arrays |= pictures(model, twin, heads, test.images[:4], part)
        keep(part, r)
    if 'detection' in a.parts:
        r, found = detection(model, twin, *sets(False), steps=a.detector_steps, progress=True)
        for arm in ('hjepa', 'untrained'):                      # four images, answers of at least .3, outlines packed
            for j, o in enumerate(found[arm, 'native'][:4]):
                ok = o['scores'] >= .3
                arrays |= {f'found/{arm}/{j}/boxes': o['boxes'][ok].numpy(), f'found/{arm}/{j}/masks': np.packbits(o['masks'][ok].numpy(), axis=-1)}
        keep('detection', r)
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'dense.py: {e}', file=sys.stderr); sys.exit(2)
