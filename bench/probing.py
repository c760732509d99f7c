"""What do the levels and blocks of the demo's encoder know of procedural scenes, beside its untrained twin and a random CNN?

    python bench/probing.py --state runs/probing --json results/probing_scenes_cpu.json

The demo's recipe is trained on scenes for --steps steps and probed by `hjepa.evaluate.probing` at its default size; a ResNet-18 with
random weights (its "twin" is one of another seed) on 2,000 and 1,000 scenes of 64 pixels.
"""
import argparse, json, sys, time
from pathlib import Path
from hjepa.bench import machine
from hjepa.config import HJEPAError, recipe
from hjepa.evaluate.probing import probing
from hjepa.foreign import foreign
from hjepa.model import untrained
from hjepa.train import fit

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=500, help='of training')
    p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    facts = dict(machine('cpu'))         # the state of the source before anything is written
    run = fit(recipe('cifar10-cpu', steps=a.steps, monitor=0, **{'data.name': 'scenes'}), out=a.state, live=False)
    if not run.finished: return 130
    t = time.perf_counter(); demo = probing(run.model, untrained(run.model.recipe), progress=sys.stderr.isatty()); seconds = time.perf_counter() - t
    cnn = probing(*(foreign('timm:resnet18', size=64, pretrained=False, seed=s) for s in (0, 1)), 2000, 1000, progress=sys.stderr.isatty())
    Path(a.json).write_text(json.dumps(facts | dict(steps=a.steps, seconds=seconds, demo=demo, random_cnn=cnn), indent=1) + '\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'probing.py: {e}', file=sys.stderr); sys.exit(2)
