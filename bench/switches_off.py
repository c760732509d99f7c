"""What do switches cost that are off? The default step of this tree beside that of a tree from before the switches, in turn.

    git worktree add /tmp/before 0755289
    OMP_NUM_THREADS=1 python bench/switches_off.py --before /tmp/before --json results/switches_off_cpu.json

0755289 is the last commit before positions, stems, windows, patch sizes, necks, targets, losses, level weights and optimizers could be
chosen. Each side is a process of its own that imports its own package, holds one training step of the recipe and waits; rounds alternate,
and who begins alternates too. Per recipe: the median of the ratios of seconds, this tree over the old one, with a 95 % interval
(bootstrap over rounds). The aim is at most 1.01.
"""
import argparse, json, os, random, statistics, subprocess, sys
from pathlib import Path

CHILD = """
import json, sys
import hjepa; from hjepa.bench import Step, bench_recipe, timed; from hjepa.config import recipe
step = Step(bench_recipe(**json.loads(sys.argv[2])) if sys.argv[1] == 'bench' else recipe(sys.argv[1]))
print(hjepa.__file__, flush=True)
for line in sys.stdin: print(timed(step, int(line), 'cpu') / int(line), flush=True)
"""

class Side:
    "A process with one training step."
    def __init__(self, root, *args):
        self.p = subprocess.Popen([sys.executable, '-c', CHILD, *args], cwd=root, env=dict(os.environ, PYTHONPATH=str(root)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        at = self.read()
        if not Path(at).is_relative_to(Path(root).resolve()): sys.exit(f'{root} was asked for, and the package came from {at}: give the root of a checkout.')
    def read(self): return self.p.stdout.readline().strip() or sys.exit('A side ended early: its message stands above.')
    def __call__(self, n): self.p.stdin.write(f'{n}\n'); self.p.stdin.flush(); return float(self.read())
    def close(self): self.p.stdin.close(); self.p.wait()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--before', required=True); p.add_argument('--rounds', type=int, default=40); p.add_argument('--json', required=True)
    a = p.parse_args(); here, draw, res = Path(__file__).resolve().parent.parent, random.Random(0), {}
    sys.path.insert(0, str(here))
    from hjepa.bench import machine
    for name, args, n in (('the demo, cifar10-cpu', ['cifar10-cpu'], 8), ('ViT-Ti/16 at 224 px, batch 4', ['bench', '{"batch": 4}'], 2)):
        new, old = Side(here, *args), Side(a.before, *args)
        for s in (new, old): s(n)
        pairs = []
        for i in range(a.rounds):
            order = (new, old) if i % 2 else (old, new); t = {s: s(n) for s in order}; pairs.append((t[new], t[old]))
        ratio = [x / y for x, y in pairs]; boot = sorted(statistics.median(draw.choices(ratio, k=len(ratio))) for _ in range(2000))
        res[name] = dict(ratio=statistics.median(ratio), lo=boot[50], hi=boot[1949], rounds=a.rounds, steps=n, seconds=[statistics.median(x) for x in zip(*pairs)])
        print(f"{name}: {res[name]['ratio']:.3f} [{res[name]['lo']:.3f}, {res[name]['hi']:.3f}]", flush=True); new.close(); old.close()
    before = subprocess.run(['git', '-C', a.before, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    Path(a.json).write_text(json.dumps(dict(machine('cpu'), what='seconds of the default step, switches there and off, over those of a tree without them', before=before, rows=res), indent=1) + '\n')

if __name__ == '__main__': main()
