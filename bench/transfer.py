"""A thousand labels a task: an encoder that was trained on CIFAR-10 beside its untrained twin, raw pixels and pooled level 0.

    python bench/transfer.py --run runs/demo --json results/transfer_cifar10_cpu.json

--run is a folder that `hjepa train` left (`make demo` makes runs/demo). The tasks are those of `hjepa.evaluate.transfer`: every real
task of VTAB-1k in the data folder, and the six that are drawn; or those of --tasks.
"""
import argparse, json, sys, time
from pathlib import Path
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.evaluate.transfer import transfer
from hjepa.model import load, untrained

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    p.add_argument('--tasks', nargs='+'); p.add_argument('--protocol', default='linear'); p.add_argument('--seed', type=int, default=0)
    a = p.parse_args(); model, cpu = load(a.run), time.process_time()
    run = json.loads((Path(a.run)/'run.json').read_text())
    r = transfer(model, untrained(model.recipe), a.tasks, protocol=a.protocol, seed=a.seed, progress=sys.stderr.isatty())
    for name, o in r['tasks'].items(): print(f'{name:20}', o.get('missing') or {k: round(100*s['acc'], 1) for k, s in o['arms'].items()})
    trained = {k: run[k] for k in ('images_seen', 'train_seconds') if k in run} | dict(recipe=model.recipe.name)
    Path(a.json).write_text(json.dumps(dict(machine('cpu'), seed=a.seed, trained=trained,
        seconds=r['seconds'], processor_seconds=round(time.process_time() - cpu, 1), transfer=r), indent=1) + '\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'transfer.py: {e}', file=sys.stderr); sys.exit(2)
