"""The `cifar10` recipe, trained and judged, in commands of a few minutes each.

    PYTHONPATH=. python bench/gpu/cifar10.py --data DIR [DIR ...] --state DIR --minutes 9 --json results/cifar10.json [key=value ...]

The same command is given again until it exits with 0. Exit status 3: stopped in time and saved, give it again. 1 or 2: something is wrong.
  --data   folders that together hold train-0.webp, train-1.webp, test.webp, y_train.npy, y_test.npy: lossless sheets of 32x32 tiles
  --state  where the run lives between two commands (about 0.5 GB, the decoded images and compiled kernels included)
A run that decides something is judged on 5,000 training images that it was not trained on; only with --final does it train on all of
them and read the test split. Try it anywhere, without data, with --tiny.
"""
import argparse, json, os, shutil, signal, sys, threading, time
from pathlib import Path
import torch
from hjepa.bench import machine, one_level
from hjepa.cli import overrides
from hjepa.config import HJEPAError, recipe
from hjepa.data.sets import load
from hjepa.evaluate.card import report
from hjepa.evaluate.probes import stratified_subset
from hjepa.model import load_pretrained, ship
from hjepa.train import fit, read_rows

AGAIN = 3

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('change', nargs='*', metavar='key=value', default=[], help='changes of the recipe')
    p.add_argument('--data', nargs='+', default=[], metavar='DIR'); p.add_argument('--state', required=True, metavar='DIR')
    p.add_argument('--minutes', type=float, default=9., help='wall clock of this command')
    p.add_argument('--train-minutes', type=float, help='length of the whole run; measured once, then fixed as a number of steps (default: the recipe\'s epochs)')
    p.add_argument('--judge-minutes', type=float, default=4., help='judge in this command only if so much is left')
    p.add_argument('--recipe', default='cifar10'); p.add_argument('--seed', type=int, default=0); p.add_argument('--device', default=None)
    p.add_argument('--flat', action='store_true', help='the flat twin: one level, as many context tokens and questions')
    p.add_argument('--labelled', type=int, help='labelled images (default: all)')
    p.add_argument('--json', required=True, metavar='FILE')
    p.add_argument('--final', action='store_true', help='train on all training images and judge on the test split: once, at the end')
    p.add_argument('--weights', metavar='FILE', help='also write what `pretrained:` loads, in bf16, about 15 MB')
    p.add_argument('--tiny', action='store_true', help='a toy size on the embedded scenes, to try the script on a CPU')
    return p.parse_args()

def the_recipe(a):
    "The recipe with this command's changes; the same words must be given every time."
    kw = overrides(a.change)
    if a.train_minutes: kw['minutes'] = a.train_minutes
    if a.tiny: kw = {'data.name': 'scenes', 'encoder.depth': 2, 'levels.depths': (1, 1, 2, 2), 'encoder.dim': 48, 'predictor.dim': 48, 'predictor.depth': 1,
                     'predictor.heads': 3, 'whole.hidden': 64, 'batch': 32, 'steps': 40, 'monitor': 2, 'train.log': 10} | kw
    r = recipe(a.recipe, seed=a.seed, **{'train.device': a.device}, **kw)
    return one_level(recipe(r, name=r.name + '-flat')) if a.flat else r

def images(a, r):
    "Images to train on and images to judge on, from the sheets."
    root = Path(a.state) / 'data'
    here = root / 'cifar10'; here.mkdir(parents=True, exist_ok=True)
    for f in (f for d in a.data for f in Path(d).iterdir() if f.suffix in ('.webp', '.npy')):
        if not (here / f.name).exists(): shutil.copy(f, here / f.name)
    train, test = (load(r.data.name, s, image=r.data.image, root=root) for s in ('train', 'test'))
    if a.tiny: train, test = train.subset(slice(400)), test.subset(slice(100))
    if a.final: return train, test
    apart = stratified_subset(train.labels, 100 if a.tiny else 5000, 1234); keep = torch.ones(len(train), dtype=torch.bool); keep[apart] = False
    return train.subset(keep.nonzero()[:, 0]), train.subset(apart)

def stop_after(seconds):
    "Ask the training loop to stop, as a scheduler would; it ends between two steps and saves."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))           # before and after the loop
    t = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)); t.daemon = True; t.start()
    return t

def main():
    a, start = options(), time.time()
    state = Path(a.state); state.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(state.resolve() / 'inductor'))   # compile once
    left = lambda: a.minutes * 60 - (time.time() - start)
    r = the_recipe(a); train, test = images(a, r)
    timer = stop_after(max(left() - 15, 1))
    run = fit(r, data=train, out=state / 'run'); timer.cancel()
    print(f"step {run.facts['steps']}, {run.facts['images_seen']:,} images, {run.facts['images_per_second']:,.0f} a second", flush=True)
    if not run.finished: return AGAIN
    if left() < a.judge_minutes * 60 and not a.tiny: print('trained; too little time left to judge'); return AGAIN
    judge(a, r, run, train, test, start)
    return 0

def judge(a, r, run, train, test, start):
    "Report card, JSON and, if asked for, the encoder."
    rep = report(run.model, r, train, test, run.path, labelled=a.labelled, seed=r.seed, history=read_rows(run.path / 'history.csv'), run=run.facts, umap=False)
    out = Path(a.json); out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rep | dict(machine(next(run.model.parameters()).device), judged_on='the test split' if a.final else 'training images held out',
        seconds=round(run.facts['train_seconds'], 1), history=run.history[::max(1, len(run.history) // 200)], monitor=run.monitor), indent=1) + '\n')
    print(rep['verdict'])
    if a.weights:
        out = Path(a.weights); out.parent.mkdir(parents=True, exist_ok=True)
        ship(run.model, out, run=json.dumps({k: run.facts.get(k) for k in ('commit', 'dirty', 'train_seconds', 'images_seen', 'images_per_second', 'flops_per_image', 'torch', 'steps')} | dict(seed=r.seed)))
        load_pretrained(out.stem, out.parent)

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'cifar10.py: {e}', file=sys.stderr); sys.exit(2)
