"""What does each part of the demo's objective add or cost? The same recipe with parts switched off, at equal time, over seeds.

    python bench/arms.py --state runs/arms --json results/arms_cifar10_cpu.json

Every arm gets the steps that fit into --minutes at its own speed, measured in turn (arm by arm, three rounds) before
anything is trained, so what else the machine does later changes no result. Judged on 5,000 *training* images that no arm
sees, with 5,000 others as labels; the test split is never read. Stopped and started again, it goes on where it was.
"""
import argparse, json, statistics, sys
from pathlib import Path
import torch
from hjepa.bench import machine, one_level
from hjepa.config import HJEPAError, change, recipe
from hjepa.data.sets import load
from hjepa.evaluate.card import report
from hjepa.evaluate.probes import stratified_subset
from hjepa.model import build
from hjepa.train import Trainer, fit, read_rows

def arms(r):
    "name -> recipe"
    blocks, finer = ({'masks.hidden': h, 'masks.predict': p} for h, p in (((0, 2), (4, 2)), ((4, 1), (4, 1))))     # 8 of 16 patches hidden in both
    last = {'levels.depths': [r.encoder.depth] * len(r.levels.depths)}                                             # every level reads the last block
    r, fine = change(r, **blocks), change(r, **finer)
    return {'hierarchy': r, 'one level': one_level(r), 'views only': change(r, **{'prediction.weight': 0}),
            'prediction only': change(r, **{'whole.kind': 'none', 'whole.args': {}, 'views.count': 1, 'prediction.share': 1.}),
            'hierarchy, last block': change(r, **last),
            'one level, same masks': change(r, **last, **{'levels.weights': [1.] + [0.] * (len(r.levels.cells) - 1)}),
            'hierarchy, finer masks': fine, 'views only, finer masks': change(fine, **{'prediction.weight': 0})}

def steps_in(rs:dict, images, minutes:float, known:dict, rounds=3, make=lambda k, r: build(r)) -> dict:
    "Steps of each arm in so many minutes. An arm added after others have been trained is timed beside the first of them, and gets steps in proportion to that one's."
    first = next((k for k in rs if k in known), None); new = [k for k in rs if k not in known]
    seconds = {k: [] for k in ([first] if first and new else []) + new}
    for _ in range(rounds):
        for k in seconds: seconds[k].append(Trainer(change(rs[k], monitor=0), make(k, rs[k]), images, None, None).rehearse())
    seconds = {k: statistics.median(s) for k, s in seconds.items()}
    return known | {k: int((known[first] * seconds[first] if first else minutes * 60) / seconds[k]) for k in new}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=2.5); p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--recipe', default='cifar10-cpu'); p.add_argument('--state', required=True, metavar='DIR'); p.add_argument('--json', required=True, metavar='FILE')
    p.add_argument('--arms', nargs='+', help='only these')
    a = p.parse_args()
    base = recipe(a.recipe); whole = load(base.data.name, 'train', image=base.data.image)
    out = stratified_subset(whole.labels, 5000, 1234); keep = torch.ones(len(whole), dtype=torch.bool); keep[out] = False
    train, held = whole.subset(keep.nonzero()[:, 0]), whole.subset(out)
    rs = {k: r for k, r in arms(base).items() if not a.arms or k in a.arms}
    state = Path(a.state); state.mkdir(parents=True, exist_ok=True); plan = state / 'steps.json'
    steps, runs = steps_in(rs, train.images, a.minutes, json.loads(plan.read_text()) if plan.exists() else {}), []
    plan.write_text(json.dumps(steps))
    for seed in a.seeds:
        for k, r in rs.items():
            r = change(r, seed=seed, steps=steps[k]); folder = state / f"{k.replace(' ', '-')}-{seed}"
            if not (folder / 'report.json').exists():
                run = fit(r, data=train, out=folder)
                if not run.finished: return 130
                report(run.model, r, train, held, folder, labelled=5000, seed=0, history=read_rows(folder / 'history.csv'), run=run.facts, umap=False)
            rep = json.loads((folder / 'report.json').read_text())
            runs.append(dict(arm=k, seed=seed, **{f: rep[f] for f in ('images_seen', 'train_seconds', 'flops_per_image', 'headline', 'coarse')}, scores=rep['scores']))
            print(k, seed, {q: (rep['headline'][q]['level'], *(f"{100 * x:.1f}" for x in (rep['headline'][q]['score']['acc'], rep['headline'][q]['over']['untrained']['diff']))) for q in ('linear', 'knn')}, flush=True)
            Path(a.json).write_text(json.dumps(dict(machine('cpu'), minutes=a.minutes, steps=steps, recipe=rs[next(iter(rs))].model_dump(mode='json'),
                summary=summary(runs), runs=runs), indent=1) + '\n')
    return 0

def summary(runs:list) -> dict:
    "Mean over seeds and range, in points: accuracy at the chosen level, and the difference to the first arm of the same seed."
    out = {}
    for k in dict.fromkeys(r['arm'] for r in runs):
        for q in ('linear', 'knn'):
            acc = {r['seed']: 100 * r['headline'][q]['score']['acc'] for r in runs if r['arm'] == k}
            ref = {r['seed']: 100 * r['headline'][q]['score']['acc'] for r in runs if r['arm'] == runs[0]['arm']}
            d = [acc[s] - ref[s] for s in acc]
            out.setdefault(k, {})[q] = dict(mean=round(statistics.mean(acc.values()), 2), range=[round(min(acc.values()), 2), round(max(acc.values()), 2)],
                minus_first_arm=dict(mean=round(statistics.mean(d), 2), each=[round(x, 2) for x in d]), seeds=len(acc))
    return out

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'arms.py: {e}', file=sys.stderr); sys.exit(2)
