"What the tests share: the smallest recipe that has every part, a few images, and a way to compare."
import os, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from hjepa.config import change, from_dict
from hjepa.data.scenes import scenes

torch.set_num_threads(1)          # tiny tensors: one thread is faster, and sums are the same in every process
ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]), TQDM_DISABLE='1')
ENV.pop('HJEPA_DATA', None)

TINY = from_dict(dict(name='tiny', data=dict(name='scenes', image=32),
    encoder=dict(patch=4, dim=16, depth=2, heads=2), levels=dict(cells=(1, 2), depths=(1, 2, 2), weights=(1., 1.)),
    masks=dict(hidden=(4, 3)), predictor=dict(dim=16, depth=1, heads=2), whole=dict(args=dict(lam=.05), hidden=24, dim=8),
    optim=dict(ema=.9), train=dict(batch=8, epochs=None, steps=6, device='cpu', precision='fp32', monitor=0, log=1)))

def tiny(**kw): return change(TINY, **kw) if kw else TINY
def images(n=32, size=32, seed=0): return scenes(n, size, seed=seed)[0]
def weights(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def losses(run): return [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_second')} for r in run.history]

class Count(TorchDispatchMode): # operations, forward and backward
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None): self.n += f.__name__.split('.')[0] not in ('detach', 'alias'); return f(*args, **(kwargs or {}))
