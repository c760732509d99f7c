"""Do the levels of an encoder form a hierarchy? Every number of hjepa.analyze.consistency, beside all controls.

    python bench/consistency.py pretrained:cifar10-cpu-long-20k --control runs/control-20k.safetensors --json results/consistency_cifar10.json
    hjepa train cifar10-cpu data.name=scenes steps=1800 --out runs/scenes --no-report
    python bench/consistency.py runs/scenes --data scenes --control runs/control-scenes.safetensors --json results/consistency_scenes.json

MODEL is what hjepa.model.load takes, or timm:NAME. The positive control, MODEL trained on with the labels of --train images, is
kept in --control and trained only if that file is not there. Probes learn from --labelled training images; the test images are
read once.
"""
import argparse, json, sys
from dataclasses import replace
from pathlib import Path
from hjepa.analyze.consistency import TREES, Pixels, claim, consistency, judge_arm, minus, novelties, read_arms, supervised, tree_paths
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.sets import load as images
from hjepa.evaluate.features import cells
from hjepa.evaluate.finetune import quick
from hjepa.evaluate.probes import stratified_subset
from hjepa.foreign import foreign
from hjepa.model import HJEPA, load, untrained

def open_model(name:str) -> tuple: # model, its untrained twin
    model = foreign(name) if name.startswith('timm:') else load(name)
    return model, untrained(model.recipe) if isinstance(model, HJEPA) else model.untrained()

def sets(name:str, model, labelled:int, train:int, test:int) -> tuple: # ImageSets: labelled, for the control, test; stratified
    image = model.recipe.data.image if isinstance(model, HJEPA) else None
    a, b = (images(name, s, image) for s in ('train', 'test'))
    return tuple(s.subset(stratified_subset(s.labels, n, 0)) for s, n in ((a, labelled), (a, train), (b, test)))

def control(model, train, epochs:float, file): # the positive control, from its file if it is there
    if file and Path(file).exists(): return load(file)
    net = supervised(model, train.images, train.labels, replace(quick, epochs=epochs), progress=sys.stderr.isatty())
    if file: Path(file).parent.mkdir(parents=True, exist_ok=True); net.save(file)
    return net

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model'); p.add_argument('--data', default='cifar10', choices=list(TREES)); p.add_argument('--control', metavar='FILE')
    p.add_argument('--labelled', type=int, default=4000); p.add_argument('--train', type=int, default=20000); p.add_argument('--epochs', type=float, default=2)
    p.add_argument('--test', type=int, default=3000); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    model, twin = open_model(a.model)
    some, train, test = sets(a.data, model, a.labelled, a.train, a.test)
    best, paths = control(model, train, a.epochs, a.control), tree_paths(TREES[a.data], test.classes)
    feats = read_arms(model, twin, best, some, test)
    arms = {k: judge_arm(f, some.labels, test.labels, paths) for k, f in feats.items()}
    few, nets = test.images[:1000] if test.resident else test.subset(range(1000)), dict(hjepa=model, untrained=twin, pixels=Pixels(model.grids), supervised=best)
    out = {k: consistency(m, test.labels, paths) for k, m in arms.items()}
    for k, m in nets.items(): out[k]['novelty'] = novelties(cells(m, few), m.grids)
    out['pooled_l0']['novelty'] = novelties(cells(model, few, pooled=True), model.grids)
    over = {k: minus(arms['hjepa'], arms[k], test.labels, paths) for k in ('untrained', 'pixels', 'pooled_l0')}
    Path(a.json).write_text(json.dumps(dict(machine('cpu'), model=a.model, data=a.data, labelled=len(some), test=len(test),
        supervised=dict(images=len(train), epochs=a.epochs), grids=[list(g) for g in model.grids], classes=list(test.classes), tree=TREES[a.data], arms=out,
        over=over, claim=claim(over, out['hjepa']['novelty'])), indent=1) + '\n')
    print(json.dumps(dict(claim=claim(over, out['hjepa']['novelty']), **{k: [round(l['accuracy']['value'], 3) for l in o['levels']] for k, o in out.items()})))

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'consistency.py: {e}', file=sys.stderr); sys.exit(2)
