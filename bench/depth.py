"""Do all images need all blocks? Early exit by calibrated confidence, fixed exits, random ones and the oracle; FLOPs counted, seconds measured in turns.

    python bench/depth.py --model pretrained:cifar10-cpu-long-20k --model pretrained:cifar10-cpu --json results/depth_cifar10_cpu.json

--model, as often as wanted, is a run directory, a model.safetensors, pretrained:NAME or timm:NAME of a plain ViT. Probes are fitted on four
fifths of --labelled training images, temperatures and thresholds on the last fifth; the numbers are of all test images, or of --images.
"""
import argparse, base64, json, sys, time
from pathlib import Path
import numpy as np, torch
from attention import model_and_twin                             # of this folder
from hjepa.analyze.attention import interval
from hjepa.analyze.depth import clock, costs, exit_features, fit_cascade, policies, summary, table, threshold
from hjepa.analyze.embedding import sheet
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.sets import load as load_set
from hjepa.evaluate.probes import stratified_subset
from hjepa.evaluate.probing import side_of

SHARES = (.1, .2, .3, .4, .5, .6, .7, .8, .9)                    # budgets, as shares of the full pass
HALF, SHOWN, PICKED = .5, 14, 36                                 # the budget of clock and pictures; images kept for them; for the widget

def tidy(v, n=5): # the same with short numbers
    if isinstance(v, dict): return {k: tidy(x, n) for k, x in v.items()}
    if isinstance(v, (list, tuple, np.ndarray)): return [tidy(x, n) for x in v]
    return float(f'{v:.{n}g}') if isinstance(v, (float, np.floating)) else v.item() if isinstance(v, np.generic) else v

def jpeg(images): return base64.b64encode(sheet(images, 32, 90).tobytes()).decode()

def judged(model, train, test, seed):
    "Policies of one network; the cascade and its tables."
    cascade, cal = fit_cascade(model, train, train.labels, seed); feats = exit_features(cascade.exits, test)
    t, (cost, alone) = table(cascade, feats, test.labels), costs(cascade, train.images[:16])
    rows = policies(cal, t, cost, alone, [s * cost[-1] for s in SHARES])
    inner = policies(cal.only(slice(1, None)), t.only(slice(1, None)), cost[1:] - cost[0], alone[1:], [s * alone[-1] for s in SHARES if s * alone[-1] > cost[1]]) if len(cost) > 2 else []
    said = torch.stack([cascade.ask(k, f)[1] for k, f in enumerate(feats)], 1).numpy()
    return dict(summary(t), temperature=cascade.T, cost=cost, alone=alone, policies=rows, without_pixels=inner), cascade, cal, t, said

def timed(cascade, tau, test, rounds):
    "Seconds an image, all in turns: the encoder's own full pass, the cascade's, early exit, the last exit but one, pixels."
    net, prepare, last = cascade.exits.net, cascade.exits.prepare, len(cascade.heads) - 1; out = {}
    for batch, n in ((500, 1000), (1, 100)):
        x = test.images[:n]
        def whole():
            with torch.no_grad():
                for c in x.split(batch): net(prepare(c))
        runs = dict(full=lambda: cascade(x, at=last, batch=batch), early=lambda: cascade(x, tau, batch=batch), encoder=whole, pixels=lambda: cascade(x, at=0, batch=batch))
        runs |= {'one block less': lambda: cascade(x, at=last - 1, batch=batch)} if last > 1 else {}
        out[str(batch)] = dict(images=n, share=np.bincount(cascade(x, tau).exit, minlength=last + 1) / n, **clock(runs, n, rounds))
    return out

def leavers(t, tau, test):
    "Who leaves where: classes."
    who = t.leave(tau); last = t.conf.shape[1] - 1; mean = lambda m: interval(m.astype(float))
    by = {c: dict(first=mean(who[m] == 0), last=mean(who[m] == last), right=mean(t.right[m, last])) for k, c in enumerate(test.classes) if (m := (test.labels == k).numpy()).any()}
    return dict(tau=tau, share=np.bincount(who, minlength=last + 1) / len(who), right=[mean(t.right[who == k, k]) if (who == k).any() else None for k in range(last + 1)], classes=by)

def pictures(t, said, tau, test, seed):
    "A few that left at once, a few that stayed to the end, and some at random with what every exit says."
    who, mix = t.leave(tau), np.random.default_rng(seed).permutation(len(t.conf)); last = t.conf.shape[1] - 1
    few = lambda m: mix[m[mix]][:SHOWN]
    cut = lambda i, k: dict(sheet=jpeg(test.images[i]), truth=test.labels[i].tolist(), answer=said[i, k])
    return dict(first=cut(few(who == 0), 0), last=cut(few(who == last), last), picked=dict(sheet=jpeg(test.images[mix[:PICKED]]), truth=test.labels[mix[:PICKED]].tolist(), answer=said[mix[:PICKED]], conf=t.conf[mix[:PICKED]]))

def sweep(t, cost): # for a slider: the whole curve
    taus = np.r_[np.linspace(.1, 1, 46), 1.01]
    of = lambda tau: (who := t.leave(tau), dict(tau=tau, flops=cost[who].mean(), acc=t.right[np.arange(len(who)), who].mean(), share=np.bincount(who, minlength=len(cost)) / len(who)))[1]
    return [of(tau) for tau in taus]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', action='append'); p.add_argument('--data', default='cifar10'); p.add_argument('--note', action='append', help='where the weights come from, one for each model')
    p.add_argument('--images', type=int); p.add_argument('--labelled', type=int, default=5000); p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--seed', type=int, default=0); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); names, t0, out = a.model or ['pretrained:cifar10-cpu-long-20k'], time.perf_counter(), {}
    for name, note in zip(names, a.note or names, strict=True):
        model, twin = model_and_twin(name); size = side_of(model)
        train, test = (load_set(a.data, s, image=size) for s in ('train', 'test'))
        train, test = (s.subset(stratified_subset(s.labels, n, a.seed)) for s, n in ((train, a.labelled), (test, a.images)))
        got = {arm: judged(m, train, test, a.seed) for arm, m in (('hjepa', model), ('untrained', twin))}; arm, cascade, cal, t, said = got['hjepa']
        tau = threshold(cal, np.array(arm['cost']), HALF * arm['cost'][-1])
        out[name] = dict(note=note, blocks=cascade.exits.net.depth, arms={k: v[0] for k, v in got.items()}, leavers=leavers(t, tau, test), clock=timed(cascade, tau, test, a.rounds))
        if len(out) == 1: out[name] |= dict(sweep=sweep(t, arm['cost']), shown=pictures(t, said, tau, test, a.seed))
    facts = dict(machine('cpu'), data=a.data, images=len(test), labelled=len(train), classes=list(test.classes), seed=a.seed, seconds=round(time.perf_counter() - t0, 1))
    Path(a.json).write_text('{' + ',\n '.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in (facts | dict(models=tidy(out))).items()) + '}\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'depth.py: {e}', file=sys.stderr); sys.exit(2)
