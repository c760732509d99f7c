"Optimizers and schedules: against formulas and other implementations; killed, stopped and watched runs end as if nothing had happened."
import math
import pytest, torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
import hjepa.model as hm
from hjepa.config import HJEPAError, Optim
from hjepa.model import build, load
from hjepa.optim import Muon, learning_rate, linear, optimizer, param_groups, settled
from hjepa.train import Trainer, fit, read_rows
from tiny import images, losses, same, tiny, weights

X = images()
KINDS = dict(adamw={}, schedulefree=dict(optim__schedule='constant'), lars=dict(optim__lr=.5), muon={})
def kind(k, **kw): return tiny(optim__kind=k, **KINDS[k], **{'encoder__drop_path': .3, 'optim__wd_end': .2, 'optim__layer_decay': .7, 'train__steps': 14, **kw})
def go(k, out, data=X, **kw): return fit(kind(k, **kw), data=data, out=out)

# ---- killed, stopped, looked at

@pytest.mark.parametrize('k,how', [*((k, 'kill') for k in KINDS), ('schedulefree', 'stop')])
def test_goes_on_bit_for_bit(tmp_path, monkeypatch, k, how):
    import os, signal
    class Killed(BaseException): pass
    def update(self, x, s, f=Trainer.update):                  # killed within step 9, with the save of step 8 on disk; stopped after it
        res = f(self, x, s)
        if s == 8 and how == 'kill': raise Killed
        if s == 8: os.kill(os.getpid(), signal.SIGINT)
        return res
    kw = dict(train__save=1e-9) if how == 'kill' else {}
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'update', update)
        if how == 'stop': assert not go(k, tmp_path/'cut').finished
        else:
            with pytest.raises(Killed): go(k, tmp_path/'cut', **kw)
    assert int(hm.read_tensors(tmp_path/'cut'/'state.safetensors')[1]['step']) == (8 if how == 'kill' else 9)
    cut, whole = go(k, tmp_path/'cut', **kw), go(k, tmp_path/'whole')
    assert same(weights(cut.model), weights(whole.model)) and losses(cut) == losses(whole)
    assert same(weights(load(tmp_path/'cut')), weights(whole.model))      # what is saved is what is handed back

@pytest.mark.parametrize('k', KINDS)
def test_looking_and_saving_leave_the_run_alone(tmp_path, k):
    a, b = go(k, tmp_path/'a', train__save=1e-9, train__monitor=5), go(k, tmp_path/'b')
    assert len(a.monitor) >= 5 and same(weights(a.model), weights(b.model))

@pytest.mark.parametrize('k', ['schedulefree', 'muon'])
def test_minutes_rehearse_without_a_trace(tmp_path, k):
    assert same(weights(go(k, tmp_path/'a', train__minutes=.0001).model), weights(go(k, tmp_path/'b', train__steps=10).model))

@pytest.mark.parametrize('k', KINDS)
def test_learns(tmp_path, k):
    run = fit(tiny(optim__kind=k, **KINDS[k], train__steps=60, train__batch=16), data=images(64), out=tmp_path)
    a, b = ([r['level_1'] for r in run.history][i] for i in (slice(0, 5), slice(-5, None)))
    assert sum(b) < .8 * sum(a), (a, b)

def test_default_is_fused_adamw():
    m = build(tiny()); opt = optimizer(m, Optim())
    assert type(opt) is torch.optim.AdamW and opt.defaults['fused'] and not hasattr(opt, 'eval')      # settled() does nothing

# ---- schedule-free

def test_schedule_free_is_the_average_of_its_path():
    "Defazio et al. 2024, written out: y between z and x; z steps by the gradient at y over its size; x averages z by the square of the rate."
    w, lr, b1, b2, wd = torch.nn.Linear(3, 2, bias=False), .05, .9, .95, .1
    opt = optimizer(torch.nn.ModuleDict(dict(a=w)), Optim(kind='schedulefree', schedule='constant', lr=lr, betas=(b1, b2), wd=wd))
    z = x = w.weight.detach().clone(); v, total = torch.zeros_like(z), 0.
    g = torch.Generator().manual_seed(0)
    for t in range(1, 40):
        rate = lr * min(1, t / 10)
        for q in opt.param_groups: q['lr'] = rate
        y = (1 - b1) * z + b1 * x; grad = y**3 + torch.randn(y.shape, generator=g)
        torch.testing.assert_close(w.weight.detach(), y, atol=1e-5, rtol=1e-5)
        w.weight.grad = grad.clone(); opt.step()
        v = b2 * v + (1 - b2) * grad**2
        z = z - rate * (grad / ((v / (1 - b2**t)).sqrt() + 1e-8) + wd * y)
        total += rate**2; x = x + rate**2 / total * (z - x)
        with settled(opt): torch.testing.assert_close(w.weight.detach(), x, atol=1e-5, rtol=1e-5)

def test_all_that_reads_sees_the_average(tmp_path, monkeypatch):
    seen = {}
    def save(self, f=Trainer.save):
        f(self); seen[self.step] = weights(self.model)                                 # what is stepped
    monkeypatch.setattr(Trainer, 'save', save)
    run = go('schedulefree', tmp_path, optim__ema=0., optim__ema_end=0.)
    last, kept = seen[14], weights(run.model)
    assert any(not torch.equal(last[k], v) for k, v in kept.items() if k.startswith('encoder.')) and same(weights(load(tmp_path)), kept)
    for (n, a), b in zip(run.model.encoder.named_parameters(), run.model.target.parameters()): assert torch.equal(a, b), n    # ema 0: the target is the average itself

# ---- Muon and LARS

def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    m = build(tiny(encoder__stem='conv', encoder__registers=1, encoder__layer_scale=.1)); opt = optimizer(m, Optim(kind='muon'))
    names = {p: n for n, p in m.named_parameters()}
    a, b = ({names[p] for g in o.param_groups for p in g['params']} for o in opt.parts)
    assert isinstance(opt, Muon) and not a & b and a | b == {n for n, p in m.named_parameters() if p.requires_grad}
    assert a == {n for n in a | b if '.blocks.' in n and n.endswith('.weight') and 'norm' not in n} and len(a) == 2*4 + 1*5     # cross-attention has q and kv apart

def test_muon_step_is_orthogonal_and_as_large_as_adamw():
    m = build(tiny()); o = Optim(kind='muon', wd=0.); opt = optimizer(m, o); w = m.encoder.blocks[0].mlp[0].weight
    before = w.detach().clone(); w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)); opt.step()
    s = torch.linalg.svdvals(w.detach() - before) / o.lr / (.2 * max(w.shape)**.5)     # Liu et al. 2025: .2 sqrt(max(rows, columns))
    assert (s > .6).all() and (s < 1.3).all()

@pytest.mark.parametrize('wd', [0., .1])
def test_lars_step_by_hand(wd):
    m = torch.nn.ModuleDict(dict(a=torch.nn.Linear(4, 3))); o = Optim(kind='lars', lr=2., wd=wd, momentum=.8); opt = optimizer(m, o)
    w, b = m.a.weight, m.a.bias; moves, g = [0., 0.], torch.Generator().manual_seed(0)
    want = [w.detach().clone(), b.detach().clone()]
    for _ in range(3):
        w.grad, b.grad = torch.randn(3, 4, generator=g), torch.randn(3, generator=g)
        trust = .001 * want[0].norm() / (w.grad.norm() + wd * want[0].norm())
        moves = [.8 * moves[0] + trust * (w.grad + wd * want[0]), .8 * moves[1] + b.grad]
        want = [p - 2. * q for p, q in zip(want, moves)]; opt.step()
    for p, q in zip((w, b), want): torch.testing.assert_close(p.detach(), q, atol=1e-6, rtol=1e-4)

# ---- layers and schedules

def test_layer_decay_as_timm_has_it():
    m = build(tiny(encoder__registers=1, encoder__depth=3, levels__depths=(1, 2, 3)))
    layer = lambda n: int(n.split('.')[2]) + 1 if n.startswith('encoder.blocks.') else 3 if n.startswith('encoder.norm') else 0 if n.startswith('encoder.') else 4
    m.group_matcher = lambda coarse=False: layer
    ref = param_groups_layer_decay(m, .05, no_weight_decay_list=['encoder.registers', 'predictor.level.weight'], layer_decay=.65)
    ours = param_groups(m, .05, .65)
    what = lambda gs: {id(p): (g['weight_decay'], pytest.approx(g['lr_scale'])) for g in gs for p in g['params']}
    a, b = what(ref), what(ours)
    assert a.keys() == b.keys() and all(a[k][0] == b[k][0] and a[k][1] == b[k][1].expected for k in a)

def test_layer_decay_slows_early_layers(tmp_path):
    moved = []
    for i, d in enumerate((1., .1)):
        m = build(tiny()); before = weights(m); fit(tiny(optim__layer_decay=d, train__steps=3), model=m, data=X, out=tmp_path/str(i))
        moved.append([float((weights(m)[k] - before[k]).abs().mean()) for k in ('encoder.embed.proj.weight', 'encoder.blocks.1.mlp.0.weight', 'predictor.inp.weight')])
    (a0, a1, a2), (b0, b1, b2) = moved
    assert b0 < .01 * a0 and .05 * a1 < b1 < .2 * a1 and .5 * a2 < b2 < 2 * a2

@pytest.mark.parametrize('n,again', [(30, 0), (30, 2), (31, 3), (270, 6)])
def test_restarts_like_torch(n, again):
    p = torch.nn.Parameter(torch.zeros(1)); opt = torch.optim.SGD([p], 1.)
    ours = [learning_rate(s, n, 1., .1, 0., restarts=again) for s in range(n)]
    peaks = [s for s in range(n) if ours[s] > .97 and (s == 0 or ours[s] > ours[s-1])]
    assert len(peaks) == again + 1 and all(abs(s - i * n / (again + 1)) < 1 for i, s in enumerate(peaks)) and abs(ours[-1] - .1) < 1e-9
    if n % (again + 1): return
    run = n // (again + 1); sched = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, run, eta_min=.1)
    for s in range(n): # torch's cosine ends one step after the last of a cycle, ours with it
        want = .1 + .9 * (1 + math.cos(math.pi * (s % run) / (run - 1))) / 2
        assert abs(ours[s] - want) < 1e-9 and abs(ours[s] - sched.get_last_lr()[0]) < 2 / run; opt.step(); sched.step()

def test_linear_and_constant():
    f = lambda s, **kw: learning_rate(s, 100, 1., .1, .1, **kw)
    assert [f(s, schedule='constant') for s in (0, 9, 10, 99)] == [.1, 1., 1., 1.]
    assert f(79, schedule='linear') == 1. and abs(f(89, schedule='linear') - .55) < 1e-9 and abs(f(99, schedule='linear') - .1) < 1e-9
    assert linear(.9, 1., .5) == .95 and linear(0., 1., 2.) == 1.

def test_ema_moves_in_a_straight_line(tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr(hm, 'ema_update', lambda *a, f=hm.ema_update: (moves.append(a[2]), f(*a))[1])
    fit(tiny(optim__ema_schedule='linear', optim__ema=.5, optim__ema_end=1.), data=X, out=tmp_path)
    assert moves == pytest.approx([.5, .6, .7, .8, .9, 1.])

# ---- refused

@pytest.mark.parametrize('kw,words', [(dict(kind='schedulefree'), 'set optim.schedule=constant'), (dict(kind='schedulefree', schedule='constant', betas=(0., .9)), 'optim.betas'),
    (dict(restarts=2, schedule='linear'), 'only a cosine starts anew'), (dict(schedule='linear', warmup=.6, cooldown=.5), 'more than the whole run'),
    (dict(kind='adam'), 'optim.kind'), (dict(schedule='step'), 'optim.schedule'), (dict(layer_decay=0.), 'optim.layer_decay'), (dict(layer_decay=1.5), 'optim.layer_decay'),
    (dict(restarts=-1), 'optim.restarts'), (dict(cooldown=0.), 'optim.cooldown'), (dict(momentum=1.), 'optim.momentum'), (dict(ema_schedule='step'), 'optim.ema_schedule')])
def test_refused_in_a_sentence(kw, words):
    with pytest.raises(HJEPAError, match=words) as e: tiny(**{f'optim__{k}': v for k, v in kw.items()})
    assert '\n' not in str(e.value) and len(str(e.value)) < 300
