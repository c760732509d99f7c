"""Accuracy against images seen and against minutes: the hierarchy, its flat twin and its peers, on the same axes.

    python bench/curves.py --state runs/curves --json results/curves_cifar10_cpu.json

Every arm has the recipe's encoder, data and batch, and the steps that fit into --minutes at its own speed, which is measured
in turn, arm by arm, before anything is trained; a minute on the axis is that measured time, so what else the machine does
later changes no result. --recipe takes a name or a YAML file. At each look both probes judge the slow copy as it is then, in the middle of its schedule, at the
level that a tenth of the labels chooses: 5,000 labelled training images, and 5,000 others that no arm was trained on. The
test split is never read. Stopped and started again, it goes on where it was; several seeds may run beside each other in one
--state, and a last call with all of them writes the file.
"""
import argparse, json, sys
from pathlib import Path
import torch
from arms import steps_in
from hjepa.bench import best_device, machine, one_level
from hjepa.config import change, peer, recipe, to_yaml
from hjepa.data.sets import load
from hjepa.evaluate.features import features, pixels
from hjepa.evaluate.probes import choose_level, knn_probe, linear_probe, stratified_subset
from hjepa.files import write
from hjepa.model import HJEPA, build
from hjepa.monitor import Monitor
from hjepa.parts.masking import sample_masks
from hjepa.train import Trainer, finish, read_rows

PROBES = dict(linear=linear_probe, knn=knn_probe)

class Flat(HJEPA):
    "The flat twin where a run has several sizes of patches: in every step its patches, and nothing larger, are hidden and asked, as many of them as the hierarchy hides, and asks in all."
    def draw_masks(self, B, generator=None, device=None, progress=None):
        like, P = super().draw_masks(1, torch.Generator() if self.recipe.encoder.large_first else generator, None, progress), self.pyramid; u = like.unit
        hidden, asked = P.sizes[u] - like.context.shape[1], sum(t.shape[1] for t in like.targets)
        return sample_masks(P, B, *([n if l == u else 0 for l in range(len(P.cells))] for n in (hidden, asked)), generator=generator, device=device, unit=u)

def flat(r): return change(r, **{'levels.depths': (r.encoder.depth,) * len(r.levels.depths)}) if r.encoder.patches else one_level(r)

def large(r): # patches of the larger size from first to last, read through the small ones
    q = max(r.encoder.patches); k = r.levels.cells.index(q // r.encoder.patch)
    return change(r, **{'encoder.patch': q, 'encoder.patches': (), 'encoder.large_first': False, 'encoder.read': r.encoder.patch, 'levels.cells': [c // r.levels.cells[k] for c in r.levels.cells[k:]],
        **{f: v and v[k:] for f in ('levels.depths', 'levels.weights', 'masks.hidden', 'masks.predict') for v in [getattr(getattr(r, f.split('.')[0]), f.split('.')[1])]}})

def arms(r): # name -> recipe
    return {'hierarchy': r, 'one level': flat(r), 'views alone': change(r, **{'prediction.weight': 0.}), **({'large patches alone': large(r)} if r.encoder.patches else {}),
            'hierarchy, VICReg': change(r, **{'whole.kind': 'vicreg', 'whole.args': {}}),
            **{name: peer(key, r) for name, key in {'I-JEPA': 'ijepa', 'MAE': 'mae', 'LeJEPA': 'lejepa', 'VICReg alone': 'vicreg'}.items()}}

def judged(feats, some, held) -> dict: # feats: level -> (labelled, held out)
    "Both probes, at the level each chooses."
    out = {}
    for p, probe in PROBES.items():
        scores = [probe(x, some.labels, xt, held.labels, seed=0) for x, xt in feats]; l = choose_level(scores)
        out |= {p: scores[l].acc, f'{p}_lo': scores[l].lo, f'{p}_hi': scores[l].hi, f'{p}_level': l}
    return out

class Looks(Monitor):
    "A monitor that judges as a report does."
    def __init__(self, some, held): super().__init__(None); self.some, self.held = some, held
    def check(self, model, step):
        training = model.training; model.eval()
        pair = [features(model, s, dict(levels=['mean']))['levels']['mean'] for s in (self.some, self.held)]
        self.rows.append(dict(step=step, **judged(list(zip(*pair)), self.some, self.held))); self.start = {}
        model.train(training); return []

def make(k, r): # as hjepa.model.build
    if k != 'one level' or not r.encoder.patches: return build(r)
    with torch.random.fork_rng(devices=[]): torch.manual_seed(r.seed); return Flat(r)

def curve(k, r, train, some, held, out) -> list: # rows of monitor.csv; None when it was stopped
    "Train, looking now and then; or go on; or only read."
    if (out / 'run.json').exists(): return read_rows(out / 'monitor.csv')
    out.mkdir(parents=True, exist_ok=True)
    tr = Trainer(r, make(k, r), train.images, train.labels, out, False); tr.monitor = Looks(some, held)
    if not tr.restore(): tr.plan(); write(out / 'config.yaml', to_yaml(r)); tr.save()
    done = tr.run()
    if done: finish(tr, done)
    return tr.monitor.rows if done else None

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=3.); p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2], help='none: only measure the speeds'); p.add_argument('--looks', type=int, default=6)
    p.add_argument('--arms', nargs='+', help='only these'); p.add_argument('--like', metavar='FILE', help='the steps of an earlier result: nothing is measured'); p.add_argument('--recipe', default='cifar10-cpu'); p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', metavar='FILE')
    a = p.parse_args(); base = recipe(a.recipe); every = load(base.data.name, 'train', image=base.data.image)
    apart = stratified_subset(every.labels, 5000, 1234); keep = torch.ones(len(every), dtype=torch.bool); keep[apart] = False
    train, held = every.subset(keep.nonzero()[:, 0]), every.subset(apart); some = train.subset(stratified_subset(train.labels, 5000, 0))
    if bad := {*(a.arms or ())} - {*arms(base)}: p.error(f"there is no arm {', '.join(sorted(bad))}: choose from {', '.join(arms(base))}.")
    rs, state = {k: r for k, r in arms(base).items() if not a.arms or k in a.arms}, Path(a.state); state.mkdir(parents=True, exist_ok=True); plan = state / 'steps.json'
    old = json.loads((plan if plan.exists() else Path(a.like)).read_text()) if plan.exists() or a.like else dict(minutes=a.minutes, steps={})
    if old['minutes'] != a.minutes: p.error(f"{plan if plan.exists() else a.like} is of {old['minutes']:g} minutes, not {a.minutes:g}: give --minutes {old['minutes']:g}, or another --state.")
    steps = steps_in(rs, train.images, a.minutes, {k: n for k, n in old['steps'].items() if plan.exists() or k in rs}, make=make); write(plan, json.dumps(dict(minutes=a.minutes, steps=steps))); print(steps, flush=True)
    facts, runs = machine(base.train.device or best_device()), []
    for seed in a.seeds:
        for k, r in rs.items():
            out = state / f"{k.replace(' ', '-')}-{seed}"; rows = curve(k, change(r, seed=seed, steps=steps[k], monitor=a.looks), train, some, held, out)
            if rows is None: return 130
            ran = json.loads((out / 'run.json').read_text())
            runs.append(dict(arm=k, seed=seed, **{f: ran[f] for f in ('commit', 'precision')}, rows=[dict(images=w['step'] * r.train.batch, minutes=round(a.minutes * w['step'] / steps[k], 3), **w) for w in rows]))
            print(k, seed, ' '.join(f"{100 * w['linear']:.1f}/{100 * w['knn']:.1f}" for w in rows), flush=True)
    if a.json: write(Path(a.json), json.dumps(dict(facts, minutes=a.minutes, steps=steps, recipe=base.model_dump(mode='json'),
        pixels=judged([(pixels(some), pixels(held))], some, held), runs=runs), indent=1) + '\n')

if __name__ == '__main__': sys.exit(main())
