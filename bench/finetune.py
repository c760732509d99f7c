"""What is pre-training worth once the encoder may change? Fine-tuned against trained from scratch, over numbers of labels.

    python bench/finetune.py --state runs/finetune --json results/finetune_cifar10.json

The demo's recipe is pre-trained on CIFAR-10 without labels for --steps steps, then it and its untrained twin are fine-tuned by
`hjepa.evaluate.finetune.quick` on the same labels. The file is written anew after every number of labels.
"""
import argparse, json, sys
from pathlib import Path
from hjepa.bench import machine
from hjepa.config import HJEPAError, recipe
from hjepa.data.sets import load
from hjepa.evaluate.finetune import by_labels, quick
from hjepa.model import untrained
from hjepa.train import fit

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=500, help='of pre-training')
    p.add_argument('--counts', type=int, nargs='+', default=[500, 2000]); p.add_argument('--test', type=int, default=2000, help='test images')
    p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    run = fit(recipe('cifar10-cpu', steps=a.steps, monitor=0), out=a.state, live=False)
    if not run.finished: return 130
    train, test = load('cifar10'), load('cifar10', 'test', n=a.test)
    rows = []
    for n in a.counts:
        rows += by_labels(run.model, untrained(run.model.recipe), train, test, [n], quick, progress=sys.stderr.isatty())
        print(n, *(f"{100*rows[-1][k]['acc']:.1f}" for k in ('tuned', 'scratch')), rows[-1]['worth'], flush=True)
        Path(a.json).write_text(json.dumps(dict(machine('cpu'), pretraining_steps=a.steps,
            rows=rows), indent=1) + '\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'finetune.py: {e}', file=sys.stderr); sys.exit(2)
