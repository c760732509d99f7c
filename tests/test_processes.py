"Two processes (gloo) against one: the same global batches must give the same weights."
import subprocess, sys
import pytest, torch
from hjepa.config import change
from hjepa.train import fit
from tiny import ENV, TINY, images

CASES = {'local': {'views.local': 2, 'views.local_size': 16}, 'sigreg': {}, 'vicreg': {'whole.kind': 'vicreg', 'whole.args': {}}, 'share': {'prediction.share': .5},
         'pieces': {'whole.kind': 'none', 'train.accumulate': 2}, 'pieces-sigreg': {'train.accumulate': 2, 'encoder.drop_path': .2},
         'schedulefree': {'optim.kind': 'schedulefree', 'optim.schedule': 'constant', 'train.save': 1e-9}, 'muon': {'optim.kind': 'muon'}}
WORKER = '''
import sys, torch
import hjepa.model as hm
from hjepa.train import Trainer, fit
from hjepa.model import build
from MODULE import recipes
from tiny import images, same, weights
out, moves, steps = sys.argv[1], [0], [0]
def count(*a, f=hm.ema_update): moves[0] += 1; f(*a)
hm.ema_update = count
def update(self, x, step, f=Trainer.update): # notes the target as the wrapped model starts, and after each step
    net = self.net.train(); assert type(net).__name__ == 'DistributedDataParallel' and net.module is self.model
    if step == 0:
        assert all(torch.equal(a, b) for a, b in zip(self.model.target.parameters(), self.model.encoder.parameters(), strict=True))
        v, *_ = next(self.pieces(x, 0)); got = self.model.targets(v[0])
        self.model.eval(); assert not any(m.training for m in self.model.target.modules())
        assert all(torch.equal(a, b) for a, b in zip(got, self.model.targets(v[0]))); net.train()
        assert not any(m.training for m in self.model.target.modules())
    before = moves[0]; res = f(self, x, step); assert moves[0] == before + 1; steps[0] += 1
    return res
Trainer.update = update
for k, r in recipes().items():
    run = fit(r, data=images(), out=f'{out}/{k}')
    torch.save(dict(weights=weights(run.model), rows=run.history, world=run.facts['processes'], steps=run.facts['steps']), f"{out}/{k}-{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
'''
def recipes(): return {k: change(TINY, **{'train.batch': 16, **kw}) for k, kw in CASES.items()}

@pytest.fixture(scope='module')
def two(tmp_path_factory): # one launch for all cases: starting torch twice is what takes the time
    d = tmp_path_factory.mktemp('two'); (d / 'worker.py').write_text(WORKER.replace('MODULE', __name__))
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(d / 'worker.py'), str(d)],
                       env=ENV, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-4000:]
    return {k: [torch.load(d / f'{k}-{i}.pt') for i in range(2)] for k in CASES}

@pytest.mark.parametrize('case', CASES)
def test_both_processes_hold_the_same_weights(two, case):
    a, b = two[case]
    assert a['world'] == b['world'] == 2 and a['steps'] == 6
    for k in a['weights']: assert torch.equal(a['weights'][k], b['weights'][k]), k

def apart(a, b, start, part): # distance between two ends, as a share of the way from the start
    cat = lambda w: torch.cat([w[k].flatten().double() for k in w if k.startswith(part) and w[k].is_floating_point()])
    a, b, s = cat(a), cat(b), cat(start)
    return float((a - b).norm() / (a - s).norm())

@pytest.mark.parametrize('case', ['sigreg', 'vicreg', 'pieces'])
def test_two_processes_equal_one(two, tmp_path, case):
    # AdamW turns the rounding of a gradient near zero into a whole step, so single weights may differ:
    # the ends must lie within 5 % of the way walked, the losses within 1e-3, the first within 3e-5 (processes that do not share statistics miss both by far).
    from hjepa.model import build
    r = recipes()[case]; start = build(r).state_dict()
    run = fit(r, data=images(), out=tmp_path); one, (got, other) = run.model.state_dict(), two[case]
    for i, (p, q, q2) in enumerate(zip(run.history, got['rows'], other['rows'], strict=True)):
        for k in p:
            if k.startswith('level') or k in ('loss', 'whole', 'lr'): assert (q[k] + q2[k]) / 2 == pytest.approx(p[k], rel=1e-3 if i else 3e-5), (i, k)
    for part in ('encoder', 'target', 'predictor', 'projector', 'chance'):
        if any(k.startswith(part) for k in one): d = apart(one, got['weights'], start, part); assert d < .05, (part, d)
    assert apart(got['weights'], start, start, 'target') == 1.       # the target moved
