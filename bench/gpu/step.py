"""Step benchmark at ViT-Ti/S/B: images/s, tokens, FLOPs, peak memory, share of the machine's matrix-product rate; compile off and on.

    PYTHONPATH=. python bench/gpu/step.py --json results/speed_step.json [--peer ijepa=../ijepa] [--choices]

The file is written anew after every measurement, so a command that is cut short leaves what it had. Try it anywhere with --tiny.
"""
import argparse, gc, json, os, sys, time
from pathlib import Path
import torch
from hjepa.bench import bench_choices, bench_recipe, bench_step, best_device, machine, named_peer
from hjepa.config import recipe

BATCH = dict(vit_tiny=256, vit_small=256, vit_base=128)
PREDICTOR = dict(vit_tiny='192x6', vit_small='384x6', vit_base='384x6')

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--encoders', nargs='+', default=list(BATCH), choices=list(BATCH))
    p.add_argument('--batch', type=int, help='images a step (default: 256, 256, 128)')
    p.add_argument('--image', type=int, default=224); p.add_argument('--patch', type=int, default=16)
    p.add_argument('--precision', default='bf16', choices=['fp32', 'bf16']); p.add_argument('--device', default=None)
    p.add_argument('--compile', default='both', choices=['off', 'on', 'both'])
    p.add_argument('--match', action='store_true', help="also with the peer's own numbers of tokens")
    p.add_argument('--peer', metavar='NAME=PATH', help='ijepa=PATH or mae=PATH, a checkout to run in turn')
    p.add_argument('--decoder', default='512x8', help='of MAE, WIDTHxDEPTH (default: as published)')
    p.add_argument('--choices', action='store_true', help='also the price of the predictor\'s attention and of the hierarchy')
    p.add_argument('--steps', type=int, default=20); p.add_argument('--rounds', type=int, default=3); p.add_argument('--warm', type=int, default=5)
    p.add_argument('--minutes', type=float, default=9., help='start no measurement that would end after this, were it as long as the longest so far')
    p.add_argument('--tiny', action='store_true', help='a toy size, to try the script on a CPU')
    p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args()
    if a.tiny: a.encoders, a.batch, a.image, a.precision, a.steps, a.rounds, a.warm = a.encoders[:1], 2, 160, 'fp32', 1, 1, 1
    return a

def plan(a):
    "What to measure, the most wanted first: (name, recipe, compile, is it the table of choices?)."
    size = lambda r: recipe(r, **{'encoder.depth': 2, 'levels.depths': (1, 1, 2)}) if a.tiny and not a.peer else r
    like = named_peer(a.peer or 'ijepa')[0]
    make = lambda e, m: size(bench_recipe(e, a.image, a.patch, a.batch or BATCH[e], PREDICTOR[e], like if m else None))
    for on in {'off': [False], 'on': [True], 'both': [True, False]}[a.compile]:
        for e in a.encoders:
            for m in [False, True] if a.match else [False]: yield f"{e}{' matched' if m else ''}{' compiled' if on else ''}", make(e, m), on, False
    if a.choices: yield 'choices', make(a.encoders[-1], False), a.compile != 'off', True

def main():
    a, start, longest = options(), time.time(), 0.
    device = a.device or best_device()
    res = dict(machine(device), precision=a.precision, seed=0, runs={})
    for name, r, on, choices in plan(a):
        began = time.time()
        if began - start + longest > a.minutes * 60: res['runs'][name] = dict(skipped='out of time'); continue
        kw = dict(steps=a.steps, warm=a.warm, rounds=a.rounds, precision=a.precision, compile=on)
        try:
            if choices: res['runs'][name] = bench_choices(r, device, **kw)
            else:
                b = res['runs'][name] = bench_step(r, device, peer=a.peer, decoder=a.decoder, **kw)
                print(f"{name:28}{b['ours']['images_per_second']:10,.1f} images/s  {100 * b['ours']['share_of_product_rate']:5.1f} % of the product rate"
                      f"  {(b['ours']['peak_bytes'] or 0) / 2**30:6.2f} GiB" + (f"  {b['ratio']:.2f}x the peer {b['ratio_range']}" + (f", {b['ratio_without_peer_masks']:.2f}x without its masks, which workers can draw" if b.get('ratio_without_peer_masks') else '') if a.peer else ''), flush=True)
        except Exception as e: res['runs'][name] = dict(failed=f'{type(e).__name__}: {e}'.splitlines()[0]); print(name, 'failed:', e, flush=True) # a compiler has errors of its own; the other sizes go on
        torch._dynamo.reset(); gc.collect(); longest = max(longest, time.time() - began)   # a compiled model holds itself: what is not collected counts as the next one's memory
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        save(a.json, res | dict(seconds=round(time.time() - start, 1)))
    return int(any('failed' in v for v in res['runs'].values()))

def save(path, res):
    "Beside it, then in place."
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.name}'); tmp.write_text(json.dumps(res, indent=1) + '\n'); os.replace(tmp, path)

if __name__ == '__main__': sys.exit(main())
