"""What is it worth to read an encoder through finer patches than it was trained on? `encoder.read` of 8 (as trained), 4 and 2 pixels.

    OMP_NUM_THREADS=1 python bench/read.py --json results/read_cifar10_cpu.json

Linear and k-NN probes of the levels, fitted on 5,000 training images and asked on 5,000 others; the encoder has seen both without their
labels, the test split is never read. Each probe chooses its level on a tenth of the labelled images. Beside it the same network untrained,
read in the same way, and raw pixels.
"""
import argparse, json
from pathlib import Path
import torch
from hjepa.bench import machine
from hjepa.config import recipe
from hjepa.data.sets import load as images
from hjepa.evaluate.features import features, pixels
from hjepa.evaluate.probes import choose_level, knn_probe, linear_probe, stratified_subset
from hjepa.files import write
from hjepa.model import load, untrained

def judged(feats, some, held): # level -> (labelled, asked)
    out = {}
    for name, probe in (('linear', linear_probe), ('knn', knn_probe)):
        scores = [probe(x, some.labels, y, held.labels, seed=0) for x, y in feats]; l = choose_level(scores)
        out[name] = dict(level=l, acc=scores[l].acc, lo=scores[l].lo, hi=scores[l].hi, by_level=[s.acc for s in scores])
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='pretrained:cifar10-cpu'); p.add_argument('--sides', type=int, nargs='+', help='of patches, in pixels: divisors of the one it was trained on (default: that one, its half and its quarter)'); p.add_argument('--images', type=int, default=5000); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); model, rows = load(a.model), []; every = images(model.recipe.data.name, 'train', image=model.recipe.data.image)
    both = stratified_subset(every.labels, 2 * a.images, 1234)[torch.randperm(2 * a.images, generator=torch.Generator().manual_seed(0))]
    some, held = (every.subset(i) for i in both.split(a.images))
    raw = judged([(pixels(some), pixels(held))], some, held)
    for arm, net in (('hjepa', model), ('untrained', untrained(model.recipe))):
        for side in a.sides or [model.recipe.encoder.patch // k for k in (1, 2, 4) if model.recipe.encoder.patch // k > 1]:
            net.recipe = recipe(net.recipe, **{'encoder.read': side})
            both = [features(net, s, dict(levels=['mean']))['levels']['mean'] for s in (some, held)]
            rows.append(dict(arm=arm, read=side, tokens=(model.recipe.data.image // side)**2, **judged([*zip(*both)], some, held)))
            print(arm, side, *(f"{k} {100*rows[-1][k]['acc']:.1f}" for k in ('linear', 'knn')), flush=True)
    write(Path(a.json), json.dumps(dict(machine('cpu'), model=a.model, seed=0, images=a.images, pixels=raw, rows=rows), indent=1) + '\n')

if __name__ == '__main__': main()
