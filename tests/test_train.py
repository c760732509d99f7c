"Runs that are killed, stopped, starved, poisoned or split end as if nothing had happened, or say why not."
import errno, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import hjepa.model as hm, hjepa.monitor as hmo, hjepa.train as ht
from hjepa.config import HJEPAError
from hjepa.data.sets import ImageSet
from hjepa.model import HJEPA, build, load
from hjepa.monitor import Dashboard
from hjepa.train import Trainer, fit, native_bf16, read_rows
from tiny import ENV, ROOT, images, losses, same, tiny, weights

X = images()
ALL = dict(encoder__drop_path=.3, optim__ema=.5, optim__wd_end=.2, train__steps=30) # every schedule moves, and chance has a hand in each step

def go(out, data=X, **kw): return fit(tiny(**{k: v for k, v in kw.items() if k not in ('fresh', 'model')}), data=data, out=out, **{k: v for k, v in kw.items() if k in ('fresh', 'model')})
def bytes_of(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}

def after(monkeypatch, step, f): # calls f(trainer) once `step` steps are done
    def update(self, x, s, real=Trainer.update):
        res = real(self, x, s)
        return f(self, res) or res if s == step - 1 else res
    monkeypatch.setattr(Trainer, 'update', update)

def interrupt(monkeypatch, step, sig=signal.SIGINT): after(monkeypatch, step, lambda *_: os.kill(os.getpid(), sig))

# ---- going on

def test_same_call_twice_gives_the_same_run(tmp_path):
    state = torch.get_rng_state()
    a = go(tmp_path/'a', encoder__drop_path=.3); torch.manual_seed(5); torch.rand(3); b = go(tmp_path/'b', encoder__drop_path=.3)
    assert same(weights(a.model), weights(b.model)) and losses(a) == losses(b)
    assert not same(weights(a.model), weights(go(tmp_path/'c', encoder__drop_path=.3, seed=1).model))
    torch.set_rng_state(state)

def test_killed_run_goes_on_bit_for_bit(tmp_path):
    call = f"fit(tiny(train__save=.0005, **{ALL}), data=images(), out={str(tmp_path/'cut')!r})"
    slow = "import time\nfrom hjepa.train import Trainer, fit\nfrom tiny import *\ndef u(self, x, s, f=Trainer.update): time.sleep(.1); return f(self, x, s)\nTrainer.update = u\n"
    p = subprocess.Popen([sys.executable, '-c', slow + call], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    state, end = tmp_path/'cut'/'state.safetensors', time.time() + 120
    while p.poll() is None and time.time() < end and not (state.exists() and len(read_rows(tmp_path/'cut'/'history.csv')) > 4): time.sleep(.01)
    p.kill(); p.wait()
    assert p.returncode == -signal.SIGKILL, p.stderr.read().decode()[-2000:]
    step = int(hm.read_tensors(state)[1]['step']); assert 0 < step < 30
    cut, whole = go(tmp_path/'cut', train__save=.0005, **ALL), go(tmp_path/'whole', **ALL)
    assert cut.finished and same(weights(cut.model), weights(whole.model))
    assert losses(cut) == losses(whole) and [r['step'] for r in cut.history] == list(range(30))
    assert same(weights(load(tmp_path/'cut')), weights(whole.model))

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_resume_restores_step_and_schedules(tmp_path, monkeypatch, sig):
    before = signal.getsignal(sig)
    moves = []
    monkeypatch.setattr(hm, 'ema_update', lambda *a, f=hm.ema_update: (moves.append(a[2]), f(*a))[1])
    whole = go(tmp_path/'whole', **ALL); wanted, moves[:] = moves[:], []
    with monkeypatch.context() as m: interrupt(m, 11, sig); first = go(tmp_path/'cut', **ALL)
    assert not first.finished and first.facts['steps'] == 11 and len(moves) == 11
    cut = go(tmp_path/'cut', **ALL)
    assert cut.finished and cut.facts['steps'] == 30 and moves == wanted and len(set(wanted)) > 20
    assert losses(cut) == losses(whole) and len({r['lr'] for r in losses(whole)}) > 20
    assert same(weights(cut.model), weights(whole.model))
    assert signal.getsignal(sig) is before                                       # handlers are put back

# ---- the dashboard

def watch(monkeypatch): # fit draws as in a notebook, at every logged step; the dashboards of its runs
    made = []
    class Often(Dashboard):
        def __init__(self, stop): super().__init__(stop, share=1e9); made.append(self)
        def show(self, tr, x): self.drawn = self.drawn and -1e9; super().show(tr, x)
    monkeypatch.setattr(hmo, 'in_notebook', lambda: True); monkeypatch.setattr(hmo, 'hears_clicks', lambda: True); monkeypatch.setattr(hmo, 'Dashboard', Often)
    return made

def test_the_button_stops_as_ctrl_c_does(tmp_path, monkeypatch, capsys):
    kw, made = ALL | dict(train__monitor=3, train__steps=12), watch(monkeypatch)
    monkeypatch.setattr(hmo, 'in_notebook', lambda: False); whole = go(tmp_path/'whole', **kw); assert not made
    monkeypatch.setattr(hmo, 'in_notebook', lambda: True)
    with monkeypatch.context() as m: after(m, 5, lambda tr, res: tr.dash.button.click() or tr.dash.button.click()); first = go(tmp_path/'cut', **kw)
    assert not first.finished and first.facts['steps'] == 5 and made[0].button.disabled and 'stopped at step 5 of 12: saved' in capsys.readouterr().out
    with monkeypatch.context() as m: interrupt(m, 5); other = go(tmp_path/'ctrl-c', **kw)
    a, b = [hm.read_tensors(p/'state.safetensors') for p in (tmp_path/'cut', tmp_path/'ctrl-c')]; assert same(a[0], b[0])     # one mechanism: one state
    cut = go(tmp_path/'cut', **kw); assert cut.finished and cut.resumed_at == 5 and len(made) == 3
    assert same(weights(cut.model), weights(whole.model)) and losses(cut) == losses(whole) and cut.monitor == whole.monitor   # and looking at every step changed nothing
    assert all(d.png[:4] == b'\x89PNG' for d in made) and any(w in made[-1].says.value for w in ('healthy', 'collaps'))

def test_the_dashboard_leaves_no_trace(tmp_path, monkeypatch):
    import matplotlib as mpl, matplotlib.pyplot as plt
    made, before = watch(monkeypatch), (dict(mpl.rcParams), plt.get_fignums())
    go(tmp_path/'a', train__monitor=2, train__steps=3); assert made and (dict(mpl.rcParams), plt.get_fignums()) == before
    for k, kw in enumerate((dict(prediction__weight=0.), dict(whole__kind='none'), dict(levels__cells=(1,), levels__depths=(1, 2), levels__weights=(1.,), masks__hidden=(16,)), dict(train__accumulate=2))):
        assert go(tmp_path/str(k), train__steps=2, **kw).finished and made[-1].png, kw                                                        # whatever the recipe asks

def test_a_click_is_heard_while_the_cell_runs(): # in a real kernel; a frontend sends what widgets say to a subshell, as JupyterLab does
    from jupyter_client.manager import start_new_kernel
    km, kc = start_new_kernel(kernel_name='python3', env=ENV)
    try:
        ask = kc.session.msg('create_subshell_request', {}); kc.control_channel.send(ask)
        shell = kc.control_channel.get_msg(timeout=60)['content']['subshell_id']
        kc.execute("""import time\nfrom hjepa.monitor import Dashboard\nheard = []; dash = Dashboard(heard.append); print(dash.heard, dash.button.model_id, flush=True); end = time.time() + 20
while time.time() < end and not heard: time.sleep(.05)\nprint('heard', heard)""")
        said = ''
        while 'heard [' not in said:
            m = kc.get_iopub_msg(timeout=120); assert m['msg_type'] != 'error', m['content']
            if m['msg_type'] != 'stream': continue
            if not said: click = kc.session.msg('comm_msg', dict(comm_id=m['content']['text'].split()[1], data=dict(method='custom', content=dict(event='click')))); click['header']['subshell_id'] = shell; kc.shell_channel.send(click)
            said += m['content']['text']
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)
    assert said.startswith('True') and "heard ['button']" in said

def test_a_picture_waits_until_it_is_cheap(monkeypatch):
    clock, drawn = [0.], []
    monkeypatch.setattr(hmo.time, 'perf_counter', lambda: clock[0])
    dash = Dashboard(print); tr = SimpleNamespace(monitor=None, step=0, model=build(tiny()).requires_grad_(False), r=tiny(), pieces=lambda *a: iter([(torch.zeros(1, 1, 3, 32, 32), None)]))
    def draw(*a): drawn.append(clock[0]); clock[0] += .2
    dash.draw = draw
    while clock[0] < 100: dash.show(tr, None); clock[0] += .1
    gaps = [b - a for a, b in zip(drawn, drawn[1:])]
    assert drawn[0] == 0 and gaps[0] < 1.5 and all(10 <= g < 10.5 for g in gaps[1:])                                           # 2 % of the time

def test_no_notebook_no_dashboard_and_it_says_so(tmp_path, monkeypatch, capsys):
    assert fit(tiny(), data=X, out=tmp_path/'a', live=True).finished; assert 'live=True draws in a notebook, and this is none: progress is written instead' in capsys.readouterr().out
    assert fit(tiny(), data=X, out=tmp_path/'b').finished; assert 'live' not in capsys.readouterr().out
    monkeypatch.setattr(hmo, 'in_notebook', lambda: True); monkeypatch.setattr(hmo, 'find_spec', lambda n: None)
    assert fit(tiny(), data=X, out=tmp_path/'c').finished; assert 'pip install ipywidgets' in capsys.readouterr().out
    monkeypatch.undo(); made = watch(monkeypatch); assert fit(tiny(), data=X, out=tmp_path/'d', live=False).finished and not made

def test_other_processes_draw_nothing(tmp_path, monkeypatch):
    made = watch(monkeypatch)
    monkeypatch.setattr(ht, 'accelerator', lambda d, f=ht.accelerator: SimpleNamespace(**{k: getattr(f(d), k) for k in ('device', 'num_processes', 'process_index', 'no_sync', 'backward', 'wait_for_everyone')}, is_main_process=False))
    tr = Trainer(tiny(), build(tiny()), X, None, tmp_path, True); tr.steps = 2; assert tr.run() and not made and tr.dash is None

def test_minutes_become_steps_once(tmp_path, monkeypatch):
    kw = dict(train__minutes=.0001)                            # never under 10 steps
    with monkeypatch.context() as m:
        n = [0]
        def update(self, x, s, f=Trainer.update): n[0] += 1; r = f(self, x, s); (n[0] == 25 + 4) and os.kill(os.getpid(), signal.SIGINT); return r
        m.setattr(Trainer, 'update', update); first = go(tmp_path/'cut', **kw)
    assert first.facts['steps'] == 4
    monkeypatch.setattr(Trainer, 'rehearse', lambda self: pytest.fail('timed again'))
    assert same(weights(go(tmp_path/'cut', **kw).model), weights(go(tmp_path/'whole', train__steps=10).model))   # and the rehearsal left no trace

def test_finished_run_is_read_not_repeated(tmp_path, monkeypatch):
    a = go(tmp_path); monkeypatch.setattr(Trainer, 'update', lambda *_: pytest.fail('trained again')); b = go(tmp_path)
    assert same(weights(a.model), weights(b.model)) and b.finished

# ---- EMA and accumulation

@pytest.mark.parametrize('pieces', [1, 4])
def test_ema_moves_once_per_step_and_after_it(tmp_path, monkeypatch, pieces):
    log = []
    def ema(target, online, momentum, f=hm.ema_update):
        old = [p.clone() for p in target.parameters()]; f(target, online, momentum); log.append('ema')
        for o, t, p in zip(old, target.parameters(), online.parameters(), strict=True): torch.testing.assert_close(t, momentum*o + (1-momentum)*p, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(hm, 'ema_update', ema)
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, *a, f=torch.optim.AdamW.step, **k: (log.append('step'), f(self, *a, **k))[1])
    run = go(tmp_path, train__accumulate=pieces)
    assert log == ['step', 'ema'] * 6
    assert not any(torch.equal(a, b) for a, b in zip(run.model.target.blocks.parameters(), run.model.encoder.blocks.parameters()))

def test_pieces_add_up_to_the_whole_batch(monkeypatch, tmp_path):
    def first_gradient(pieces): # 4 x 16 against 1 x 64
        r, kept = tiny(whole__kind='none', train__batch=64, train__accumulate=pieces, optim__clip=None), []
        with monkeypatch.context() as m:
            m.setattr(torch.optim.AdamW, 'step', lambda self, *a, **k: kept.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']])))
            run = fit(r, data=images(64), out=tmp_path/str(pieces), train__steps=1)
        return kept[0], run.history[0]
    (a, ra), (b, rb) = first_gradient(1), first_gradient(4)
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-5 * a.norm() and abs(ra['loss'] - rb['loss']) < 2e-5

# ---- what is refused, and what is left whole

def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    go(tmp_path); before = bytes_of(tmp_path)
    for key, v in (('optim.lr', 2e-3), ('masks.hidden', (3, 3)), ('whole.args', {'lam': .1}), ('train.steps', 7), ('seed', 1)):
        with pytest.raises(HJEPAError, match=f'{key}=.*(another folder|fresh)'): go(tmp_path, **{key: v})
    assert bytes_of(tmp_path) == before
    assert go(tmp_path, train__log=2, name='other').finished                          # what cannot change the weights may differ
    assert go(tmp_path, optim__lr=2e-3, fresh=True).finished and bytes_of(tmp_path.with_name(tmp_path.name + '-2'))['state.safetensors'] == before['state.safetensors']

def test_other_images_in_the_same_folder_are_refused(tmp_path, monkeypatch):
    interrupt(monkeypatch, 3); assert not go(tmp_path).finished
    monkeypatch.undo(); before = bytes_of(tmp_path)
    for other, says in ((images(40), '32 images .*these are 40 images'), (images(seed=1), '32 images that begin with')):
        with pytest.raises(HJEPAError, match=f'holds a run on {says}.*(another folder|fresh)'): go(tmp_path, data=other)
    assert bytes_of(tmp_path) == before and go(tmp_path).finished
    with pytest.raises(HJEPAError, match='holds a run on'): go(tmp_path, data=images(seed=1))       # a finished run is no answer for other images

def test_another_precision_midway_is_refused(tmp_path, monkeypatch):
    interrupt(monkeypatch, 3); assert not go(tmp_path, train__precision='fp32').finished
    monkeypatch.undo()
    with pytest.raises(HJEPAError, match='unfinished run in fp32.*in bf16: set train.precision=fp32'): go(tmp_path, train__precision='bf16')
    assert go(tmp_path, train__precision='auto' if not native_bf16(torch.device('cpu')) else 'fp32').finished
    assert go(tmp_path, train__precision='bf16').finished                             # what is finished is only read

@pytest.mark.parametrize('share', [0, 7, .5, .99])
@pytest.mark.parametrize('name', ['state', 'model'])
def test_truncated_checkpoint(tmp_path, name, share):
    go(tmp_path, train__steps=2); f = tmp_path/f'{name}.safetensors'
    f.write_bytes(f.read_bytes()[:share if share > 1 else int(share * f.stat().st_size)]); before = bytes_of(tmp_path)
    with pytest.raises(HJEPAError, match=f'{f}.*(cut short|earlier)'): go(tmp_path, train__steps=2) if name == 'state' else load(tmp_path)
    assert bytes_of(tmp_path) == before

def test_foreign_checkpoint(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(2)}, tmp_path/'state.safetensors')
    with pytest.raises(HJEPAError, match='start over with fresh'): go(tmp_path)
    hm.write_tensors(tmp_path/'model.safetensors', {'a': torch.zeros(2)}, dict(recipe=hm.to_yaml(tiny())))
    with pytest.raises(HJEPAError, match='do not fit'): load(tmp_path)

@pytest.mark.parametrize('at', ['model', 'state'])
def test_full_disk_loses_nothing(tmp_path, monkeypatch, at):
    with monkeypatch.context() as m: interrupt(m, 3); go(tmp_path)
    before = bytes_of(tmp_path)
    def full(tensors, path, f=hm.save_file, **k):
        if at in Path(path).name: Path(path).write_bytes(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
        f(tensors, path, **k)
    with monkeypatch.context() as m:
        m.setattr(hm, 'save_file', full)
        with pytest.raises(HJEPAError, match='space.*what was saved before is whole'): go(tmp_path)
    now = bytes_of(tmp_path)
    assert now['state.safetensors'] == before['state.safetensors'] and now.keys() == before.keys()
    load(tmp_path); assert same(weights(go(tmp_path).model), weights(go(tmp_path.with_name(tmp_path.name + 'w')).model))

@pytest.mark.parametrize('log', [1, 4])
def test_nan_loss_stops_and_the_last_save_is_whole(tmp_path, monkeypatch, log):
    def poison(tr, res): # the loss and the weights go bad in one step, as they do
        with torch.no_grad(): tr.model.encoder.blocks[0].mlp[0].weight.fill_(float('nan'))
        return {k: v * float('nan') for k, v in res.items()}
    with monkeypatch.context() as m:
        after(m, 6, poison)
        with pytest.raises(HJEPAError, match='became nan.*lower optim.lr.*whole'): go(tmp_path, train__steps=12, train__save=1e-9, train__log=log)
    for f in ('model', 'state'):
        t, meta = hm.read_tensors(tmp_path/f'{f}.safetensors')
        assert all(torch.isfinite(v).all() for v in t.values() if v.is_floating_point()), f'NaN weights were saved at step {meta["step"]}'
    assert same(weights(go(tmp_path, train__steps=12, train__save=1e-9, train__log=log).model), weights(go(tmp_path.with_name(tmp_path.name + 'w'), train__steps=12).model))

def test_bad_images(tmp_path):
    f = X.float() / 255
    nan = f.clone(); nan[3, 1, 2, 2] = float('nan')
    for x, word in ((nan, 'NaN'), (f * 255, r'\[0, 1\]'), (f - .5, r'\[0, 1\]'), (X[:, :1], r'\(N,3,H,W\)'), (X[0], r'\(N,3,H,W\)'), (X[:7], '7 images are fewer than a batch of 8')):
        with pytest.raises(HJEPAError, match=word): go(tmp_path, data=x)
    assert not any(tmp_path.iterdir())
    assert same(weights(go(tmp_path/'a', data=f, train__steps=2).model), weights(go(tmp_path/'b', train__steps=2).model))     # floats are the same images

# ---- models that come in, labels that stay out, flags

def test_given_weights_survive(tmp_path, monkeypatch):
    m = build(tiny())
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn_like(p) * .1)
    given, seen = weights(m), []
    monkeypatch.setattr(Trainer, 'update', lambda self, x, s, f=Trainer.update: (seen.append(weights(self.model)) if s == 0 else None, f(self, x, s))[1])
    run = go(tmp_path, model=m)
    assert same(given, seen[0]) and run.model is m and not same(given, weights(m))
    with pytest.raises(HJEPAError, match="encoder is not the recipe's"): go(tmp_path/'b', model=build(tiny()), encoder__depth=3, levels__depths=(1, 2, 3))
    with pytest.raises(HJEPAError, match="whole is not the recipe's"): go(tmp_path/'c', model=build(tiny()), whole__weight=.5)   # else silently ignored

def test_given_model_is_saved_with_the_recipe_that_trained_it(tmp_path):
    m = build(tiny()); go(tmp_path/'a', model=m, **{'optim.lr': 2e-4, 'data.mean': (.1, .1, .1)})
    r = load(tmp_path/'a').recipe; assert r.optim.lr == 2e-4 and r.data.mean == (.1, .1, .1) and m.recipe == r
    with pytest.raises(HJEPAError, match="data.image is not the recipe's"): go(tmp_path/'b', model=build(tiny()), data=images(size=64), **{'data.image': 64})

def test_a_fused_optimizer_counts_on_its_device(tmp_path, monkeypatch):
    "On a GPU the count of steps has to lie beside the weights: seen here by what is asked of it."
    interrupt(monkeypatch, 3); go(tmp_path); monkeypatch.undo(); moved = []
    r = tiny(); tr = Trainer(r, build(r), X, None, tmp_path); tr.opt.param_groups[0]['fused'] = True
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *a, f=torch.Tensor.to, **kw: (moved.append(self.ndim) if a and isinstance(a[0], torch.device) else None, f(self, *a, **kw))[1])
    assert tr.restore() and moved.count(0) >= len(tr.opt.state)

def test_target_is_the_online_encoder_at_the_start(tmp_path, monkeypatch):
    def update(self, x, s, f=Trainer.update):
        if s == 0:
            v, *_ = next(self.pieces(x, 0)); self.model.train()
            target = self.model.target(v[0]); online = self.model.encoder.eval()(v[0]); self.model.encoder.train()
            assert torch.equal(target, online) and not torch.equal(self.model.encoder(v[0]), online)      # drop path is on, in one of them
        return f(self, x, s)
    monkeypatch.setattr(Trainer, 'update', update); go(tmp_path, encoder__drop_path=.9, train__steps=2)

def test_labels_never_reach_the_weights(tmp_path):
    y = torch.arange(32) % 4
    s = ImageSet('t', 'train', X, y, tuple('abcd'), 'here')
    other = replace(s, labels=y[torch.randperm(32, generator=torch.Generator().manual_seed(0))], extra={'y': y})
    runs = [go(tmp_path/str(i), data=d, train__monitor=2) for i, d in enumerate((s, other, X))]
    assert same(weights(runs[0].model), weights(runs[1].model)) and same(weights(runs[0].model), weights(runs[2].model))
    assert 'knn' in runs[0].monitor[0] and 'knn' not in runs[2].monitor[0]

def test_monitor_and_log_leave_the_weights_alone(tmp_path):
    a, b = go(tmp_path/'a', train__monitor=3, train__log=4, encoder__drop_path=.3), go(tmp_path/'b', encoder__drop_path=.3)
    assert same(weights(a.model), weights(b.model)) and len(a.monitor) >= 3 and [r['step'] for r in a.history] == [0, 4, 5]

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    go(tmp_path, train__tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    e = EventAccumulator(str(tmp_path/'tensorboard')); e.Reload()
    assert [s.step for s in e.Scalars('loss')] == list(range(6))                      # all of them, as soon as the run ends

def test_compile_flag(tmp_path, monkeypatch): # which parts are compiled; that the compiler works is PyTorch's own affair
    done = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *a, **k: done.append(type(self).__name__))
    go(tmp_path/'a', train__steps=1); assert done == []
    go(tmp_path/'b', train__steps=1, train__compile=True); assert done == ['Encoder', 'Encoder', 'Predictor']
