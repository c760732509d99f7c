"""What would make the training step faster? One idea at a time beside the step as it is, in turns, in one process.

    python bench/ideas.py --json results/speed_ideas_cpu.json [--only NAME ...]

The predictions were written before anything was measured: bench/NOTES.md. Ideas of the first kind leave what is computed
as it is; the script checks the loss. Those of the second change what is learned. Rows are kept in the file by name.
"""
import argparse, json, statistics
from contextlib import contextmanager
from pathlib import Path
import torch
from torch import nn
from hjepa.bench import Step, bench_recipe, machine, product_rate, ratios, timed
from hjepa.config import change
from hjepa.files import write

def chunked(k):
    "The target pass in pieces of k images."
    def make(s):
        whole = s.model.target.forward
        s.model.target.forward = lambda x, *a, **kw: [torch.cat(t) for t in zip(*(whole(c, *a, **kw) for c in x.split(k)))]
    return make

def inference(s):
    "The target pass without version counters; its outputs are copied so that the loss may keep them."
    whole = s.model.targets
    def run(*a, **kw):
        with torch.inference_mode(): out = whole(*a, **kw)
        return [t.clone() for t in out]
    s.model.targets = run

class Packed(nn.Module):
    "A linear map, with GELU if asked for, by oneDNN on weights in its own layout, laid out anew when they have changed."
    def __init__(self, lin, gelu): super().__init__(); self.lin, self.gelu, self.seen = [lin], 'gelu' if gelu else 'none', None
    def forward(self, x):
        lin, rows = self.lin[0], x.numel() // x.shape[-1]
        if self.seen != (lin.weight._version, rows): self.w, self.seen = torch.ops.mkldnn._reorder_linear_weight(lin.weight.detach(), rows), (lin.weight._version, rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.w, lin.bias, self.gelu, [], 'none')

@contextmanager
def swapped(blocks):
    "Packed layers in the place of the blocks' own."
    old = []
    for b in blocks:
        old.append((b.attn.qkv, b.attn.proj, b.mlp)); q, p, (up, _, down) = old[-1]
        if not hasattr(b, 'quick'): b.quick = [Packed(q, False), Packed(p, False), nn.Sequential(Packed(up, True), Packed(down, False))]
        b.attn.qkv, b.attn.proj, b.mlp = b.quick
    try: yield
    finally:
        for b, (q, p, m) in zip(blocks, old): b.attn.qkv, b.attn.proj, b.mlp = q, p, m

def onednn(s):
    "The target's layers by oneDNN."
    whole, blocks = s.model.targets, s.model.target.blocks
    def run(*a, **kw):
        with swapped(blocks): return whole(*a, **kw)
    s.model.targets = run

def int8(s):
    "The target's layers on 8-bit weights and activations, quantised anew in every step."
    class Q(nn.Module):
        def __init__(self, lin): super().__init__(); self.lin, self.seen = [lin], None
        def forward(self, x):
            lin = self.lin[0]
            if self.seen != lin.weight._version:
                w = torch.quantize_per_channel(lin.weight.detach(), (lin.weight.detach().abs().amax(1) / 127).double(), torch.zeros(len(lin.weight), dtype=torch.long), 0, torch.qint8)
                self.w, self.seen = torch.ops.quantized.linear_prepack(w, lin.bias.detach()), lin.weight._version
            return torch.ops.quantized.linear_dynamic(x, self.w, True)
    for b in s.model.target.blocks: b.quick = [Q(b.attn.qkv), Q(b.attn.proj), nn.Sequential(Q(b.mlp[0]), b.mlp[1], Q(b.mlp[2]))]
    onednn(s)

def bf16(s):
    "The target pass under autocast to bfloat16."
    whole = s.model.targets
    def run(*a, **kw):
        with torch.autocast('cpu', torch.bfloat16): return whole(*a, **kw)
    s.model.targets = run

def naive(s):
    "Attention as two products and a softmax."
    from torch.nn.attention import sdpa_kernel, SDPBackend
    loss = s.loss
    def run(*a):
        with sdpa_kernel(SDPBackend.MATH): return loss(*a)
    s.loss = run

def half_kernel(s):
    "The fused kernel in half precision forward and back, as autocast would have it."
    loss, kernel = s.loss, torch.nn.functional.scaled_dot_product_attention
    def half(q, k, v, **kw): return kernel(q.bfloat16(), k.bfloat16(), v.bfloat16(), **kw)
    def run(*a):
        torch.nn.functional.scaled_dot_product_attention = half
        try: return loss(*a)
        finally: torch.nn.functional.scaled_dot_product_attention = kernel
    s.loss = run

def real_rope(s):
    "Rotary positions by real products, as torch.compile gets them."
    import hjepa.parts.attention as at
    cut = at.rotate
    def turn(x, cos, sin):
        p = x.unflatten(-1, (-1, 2)); return x * cos + torch.stack((-p[..., 1], p[..., 0]), -1).flatten(-2) * sin
    loss = s.loss
    def run(*a):
        at.rotate = turn
        try: return loss(*a)
        finally: at.rotate = cut
    s.loss = run

def loose_adamw(s): s.opt = torch.optim.AdamW([{k: g[k] for k in ('params', 'weight_decay')} for g in s.opt.param_groups], lr=s.r.optim.lr, betas=s.r.optim.betas, foreach=False)

def loose_ema(s):
    def follow():
        with torch.no_grad():
            for p, q in zip(s.model.encoder.parameters(), s.model.target.parameters()): q.lerp_(p, 1 - s.r.optim.ema)
        for c in s.model.chance: c.commit()
    s.follow = follow

SAME = {'target in pieces of 4': chunked(4), 'target in pieces of 2': chunked(2), 'inference mode': inference, 'oneDNN in the target': onednn, 'naive attention': naive,
        'real rotations': real_rope, 'AdamW one by one': loose_adamw, 'EMA one by one': loose_ema, 'bf16 target': bf16, 'int8 target': int8}
CHANGED = {'4 pieces of a batch': {'train.accumulate': 4}, 'targets from 8 blocks': {'levels.depths': (3, 6, 8)}, 'targets from 6 blocks': {'levels.depths': (2, 4, 6)}, 'targets from 4 blocks': {'levels.depths': (2, 3, 4)},
           'half of the images predicted': {'prediction.share': .5}, 'a quarter of the images predicted': {'prediction.share': .25}, '25 patches visible': {'masks.hidden': (11, 8, 8)}, 'predictor 96x6': {'predictor.dim': 96},
           'predictor 192x3': {'predictor.depth': 3}, 'patches of 16 and 32': {'encoder.patches': (16, 32)}, 'tanh GELU': {'encoder.act': 'gelu_tanh'}}
HALF = {'half-precision kernel': half_kernel} # beside a step in bf16
OTHER = ('compiled', 'one thread', 'bf16')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=[*SAME, *HALF, *CHANGED, *OTHER]); p.add_argument('--encoder', default='vit_tiny'); p.add_argument('--batch', type=int, default=16)
    p.add_argument('--steps', type=int, default=3); p.add_argument('--rounds', type=int, default=4); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); r, path = bench_recipe(a.encoder, 224, 16, a.batch, '384x6' if a.encoder == 'vit_small' else '192x6'), Path(a.json)
    rows, threads = json.loads(path.read_text())['ideas'] if path.exists() else {}, torch.get_num_threads()
    for name in a.only or [*SAME, *HALF, *CHANGED, *OTHER]:
        base, other, first = Step(r, precision='bf16' if name in HALF else 'fp32'), Step(change(r, **CHANGED.get(name, {})), precision='bf16' if name in HALF or name == 'bf16' else 'fp32', compile=name == 'compiled'), 0.
        if do := (SAME | HALF).get(name): do(other)
        piece = next(base.pieces()); base.model.calibrate([piece]); other.model.calibrate([piece])
        if name not in CHANGED: first = abs(float(base.loss(*piece).detach() - other.loss(*piece).detach())); [c.seen.clear() for s in (base, other) for c in s.model.chance]
        start = timed(other, 2, 'cpu'); timed(base, 2, 'cpu'); times = ([], [])
        for _ in range(a.rounds):
            times[0].append(timed(base, a.steps, 'cpu'))
            if name == 'one thread': torch.set_num_threads(1)
            times[1].append(timed(other, a.steps, 'cpu')); torch.set_num_threads(threads)
        res = ratios([1 / t for t in times[1]], [1 / t for t in times[0]])
        rows[name] = dict(machine('cpu'), recipe=r.name, batch=a.batch, steps=a.steps, **res, loss_apart=first if name not in CHANGED else None, seconds_per_step=[statistics.median(t) / a.steps for t in times],
            first_two_steps=start, flops=[s.model.step_cost(4)['flops_per_image'] for s in (base, other)] if name in CHANGED else None, product_flops_per_second=product_rate('cpu'))
        print(f"{name:34} {res['ratio']:.3f} ({res['ratio_range'][0]:.3f} to {res['ratio_range'][1]:.3f})  loss apart {first:.1e}", flush=True)
        write(path, json.dumps(dict(what='images a second with the idea over those without, in turns', seed=r.seed, ideas=rows), indent=1) + '\n')

if __name__ == '__main__': main()
