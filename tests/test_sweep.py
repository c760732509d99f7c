"Many runs: nothing is trained twice, nothing is judged on the test split unasked, a kill costs one run's last minutes, and every bad file is one sentence."
import csv, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, yaml
import hjepa.cli as cli, hjepa.sweep as hs
from hjepa.config import HJEPAError, from_yaml
from hjepa.data.scenes import SHAPES, scenes
from hjepa.data.sets import ImageSet
from hjepa.model import build
from hjepa.sweep import equal_flops, interval, read_sweep, recipes_of, summary, sweep, sweep_table
from hjepa.train import Trainer
from tiny import ENV, TINY, tiny

def shapes(split='train', n=200): x, y = scenes(n, 32, seed=split == 'test'); return ImageSet('scenes', split, x, y['shape'], SHAPES, 'here')
SET = shapes()
FILE = dict(name='t', recipe=TINY.model_dump(mode='json'), change={'data.labelled': 60}, arms={'both': None, 'views only': {'prediction.weight': 0}}, seeds=[0, 1])
def go(tmp, data=SET, **kw): return sweep(FILE | {k: v for k, v in kw.items() if k != 'fresh'}, out=tmp/'runs', results=tmp/'results', data=data, fresh=kw.get('fresh', False))
def same_rows(a, b): return [{k: v for k, v in r.items() if k != 'seconds'} for r in a['rows']] == [{k: v for k, v in r.items() if k != 'seconds'} for r in b['rows']]
@pytest.fixture(scope='module')
def whole(tmp_path_factory): return go(tmp_path_factory.mktemp('whole'))

def test_rows_files_and_controls(whole):
    assert whole['finished'] and [(r['arm'], r['seed']) for r in whole['rows']] == [('both', 0), ('both', 1), ('views only', 0), ('views only', 1)]
    on_disk = list(csv.DictReader(open(whole['csv'])))
    assert [{k: str(v) for k, v in r.items()} for r in whole['rows']] == on_disk and Path(whole['figure']).read_bytes()[:4] == b'\x89PNG'
    for r in whole['rows']:
        for p in ('linear', 'knn'): assert all(0 <= r[f'{p}{k}'] <= 1 for k in ('', '_lo', '_hi', '_untrained', '_pixels', '_pooled_l0')) and r[f'{p}_lo'] <= r[p] <= r[f'{p}_hi']
    a, b = whole['rows'][0], whole['rows'][2]
    assert a['linear_pixels'] == b['linear_pixels'] and a['flops'] > b['flops'] and a['steps'] == b['steps'] == 6
    json.dumps(whole); assert sweep_table(whole['rows']).count('\n') == 3

def test_done_runs_are_skipped(tmp_path, monkeypatch, whole):
    folder = Path(whole['csv']).parent.parent
    monkeypatch.setattr(hs, 'one_run', lambda *a: pytest.fail('trained or judged again'))
    again = sweep(FILE, out=folder/'runs', results=tmp_path, data=SET)
    assert again['rows'] == whole['rows'] and (tmp_path/'t.csv').read_bytes() == Path(whole['csv']).read_bytes()

def test_killed_and_started_again_is_as_if_never_killed(tmp_path, whole):
    code = ("import time\nfrom hjepa.train import Trainer\nfrom test_sweep import *\n"
            "def u(self, x, s, f=Trainer.update): time.sleep(.15); return f(self, x, s)\nTrainer.update = u\n"
            f"go(Path({str(tmp_path)!r}), change=FILE['change'] | {{'train.save': .0005}})")
    p = subprocess.Popen([sys.executable, '-c', code], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    second, end = tmp_path/'runs'/'views-only-0'/'history.csv', time.time() + 100
    while p.poll() is None and time.time() < end and not (second.exists() and second.read_text().count('\n') > 2): time.sleep(.02)
    p.kill(); p.wait()
    assert p.returncode == -signal.SIGKILL, p.stderr.read().decode()[-2000:]
    assert (tmp_path/'runs'/'both-0'/'score.json').exists() and not (second.parent/'score.json').exists()
    steps, real = [], Trainer.update
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, 'update', lambda self, x, s: (steps.append((self.out.name, s)), real(self, x, s))[1])
        out = go(tmp_path, change=FILE['change'] | {'train.save': .0005})
    assert same_rows(out, whole) and not [s for n, s in steps if n == 'both-0'] and 0 < min(s for n, s in steps if n == 'views-only-0')

def test_stop_ends_the_sweep_and_keeps_what_is_done(tmp_path, monkeypatch, whole):
    real = Trainer.update
    def update(self, x, s):
        if self.out.name == 'both-1' and s == 2: os.kill(os.getpid(), signal.SIGINT)
        return real(self, x, s)
    kw = dict(arms={'both': None})
    with monkeypatch.context() as m: m.setattr(Trainer, 'update', update); cut = go(tmp_path, **kw)
    assert not cut['finished'] and [(r['arm'], r['seed']) for r in cut['rows']] == [('both', 0)]
    assert same_rows(go(tmp_path, **kw), dict(rows=whole['rows'][:2]))

def test_one_bad_arm_costs_the_others_nothing(tmp_path, whole):
    hot = go(tmp_path, arms={'hot': {'optim.lr': 1e30, 'optim.clip': None, 'train.log': 1}, **FILE['arms']}, seeds=[0])
    assert not hot['finished'] and [r['arm'] for r in hot['rows']] == ['both', 'views only'] and list(hot['failed']) == ['hot, seed 0']
    assert [r['linear'] for r in hot['rows']] == [r['linear'] for r in whole['rows'] if r['seed'] == 0]
    with pytest.raises(HJEPAError, match='No run ended. hot, seed 0: The loss'): go(tmp_path/'only', arms={'hot': {'optim.lr': 1e30, 'optim.clip': None, 'train.log': 1}}, seeds=[0])

def test_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(HJEPAError, match='without accelerate launch'): go(tmp_path)

def test_stopped_in_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hs, 'one_run', lambda *a: None)
    assert go(tmp_path) == dict(finished=False, failed={}, rows=[], summary={}, csv=str(tmp_path/'results'/'t.csv'), figure=str(tmp_path/'results'/'t.png'))

def test_test_split_is_for_final_alone(tmp_path, monkeypatch):
    asked, keys = [], dict(arms={'both': None}, seeds=[0])
    monkeypatch.setattr(hs, 'load_images', lambda name, split, image: (asked.append(split), shapes(split))[1])
    a = go(tmp_path, data=None, **keys); assert asked == ['train']
    monkeypatch.setattr(Trainer, 'update', lambda *a: pytest.fail('final trained again'))
    b = go(tmp_path, data=None, final=True, **keys)
    assert set(asked) == {'train', 'test'} and a['csv'] != b['csv'] and a['rows'][0]['linear_pixels'] != b['rows'][0]['linear_pixels']
    assert go(tmp_path, data=None, **keys)['rows'] == a['rows']

def test_no_arm_sees_what_judges(tmp_path, monkeypatch):
    seen, on = set(), []
    monkeypatch.setattr(Trainer, 'update', lambda self, x, s, f=Trainer.update: (seen.update(t.numpy().tobytes() for t in x), f(self, x, s))[1])
    monkeypatch.setattr(hs, 'features_of', lambda m, t, some, test, f=hs.features_of: (on.extend((some, test)), f(m, t, some, test))[1])
    go(tmp_path, arms={'both': None}, seeds=[0], change=FILE['change'] | {'steps': 40})
    some, held = ({t.numpy().tobytes() for t in s.images} for s in on)
    assert len(held) == 20 and len(some) == 60 and 170 < len(seen) <= 180 and not held & (seen | some)

# ---- equal means

def test_equal_flops_within_a_percent(tmp_path):
    arms = dict(both=None, deep={'encoder.depth': 4, 'levels.depths': [2, 4, 4]}, narrow={'encoder.dim': 8}, views={'prediction.weight': 0}, big={'train.batch': 12})
    rs = recipes_of(read_sweep(FILE | dict(arms=arms, change={'steps': 60})))
    steps = equal_flops(rs, None); totals = {a: steps[a] * r.train.batch * build(r).step_cost()['flops_per_image'] for a, r in rs.items()}
    dear = max(totals.values()); assert all(abs(t / dear - 1) < .01 for t in totals.values()) and min(steps.values()) == 60 and len(set(steps.values())) >= 4
    epochs = {a: r.model_copy(update=dict(train=r.train.model_copy(update=dict(steps=None, epochs=2.)))) for a, r in rs.items()}
    assert min(equal_flops(epochs, lambda r: SET).values()) in (2 * (200 // 8), 2 * (200 // 12))
    out = go(tmp_path, equal='flops', change=FILE['change'] | {'steps': 60}, seeds=[0])
    assert abs(out['rows'][0]['flops'] / out['rows'][1]['flops'] - 1) < .01 and out['rows'][0]['steps'] == 60 < out['rows'][1]['steps']

def test_equal_time_measures_once(tmp_path, monkeypatch):
    times, kw = iter([.125, .0625] * 3), dict(equal='time', change=FILE['change'] | {'minutes': .025}, seeds=[0])
    with monkeypatch.context() as m: m.setattr(Trainer, 'rehearse', lambda self: next(times)); out = go(tmp_path, **kw)
    assert [r['steps'] for r in out['rows']] == [12, 24]
    monkeypatch.setattr(Trainer, 'rehearse', lambda self: pytest.fail('measured again'))
    assert go(tmp_path, **kw)['rows'] == out['rows']
    with pytest.raises(HJEPAError, match='measured for other arms or minutes'): go(tmp_path, **kw | dict(arms={'both': None}))
    with pytest.raises(HJEPAError, match='measured for other arms or minutes'): go(tmp_path, **kw | dict(change={'minutes': .03}))

# ---- statistics

def test_intervals_against_scipy():
    from scipy import stats
    x = [.5, .52, .57, .49]; d = interval(x); lo, hi = stats.ttest_1samp(x, 0).confidence_interval()
    assert (d['lo'], d['hi']) == pytest.approx((lo, hi)) and interval([.5]) == dict(mean=.5, lo=None, hi=None, each=[.5])

def test_differences_are_paired_by_seed_even_where_some_are_missing():
    row = lambda a, s, v: dict(arm=a, seed=s, linear=v, knn=v, **{f'{p}_{c}': .1 for p in ('linear', 'knn') for c in ('untrained', 'pixels', 'pooled_l0')})
    d = summary([row('a', 0, .5), row('a', 1, .7), row('b', 1, .71), row('b', 2, .9)])['b']['linear']
    assert d['minus_first']['each'] == pytest.approx([.01]) and d['each'] == [.71, .9] and 'a' in sweep_table([row('a', 0, .5)])

# ---- refused

BAD = {'unknown': (dict(gird={}), "Did you mean 'grid'"), 'no such arm key': (dict(arms=dict(a={'encodr.depth': 3})), "Arm 'a': Unknown recipe key"), 'senseless arm': (dict(arms=dict(a={'encoder.patch': 5})), "Arm 'a': .*not divisible"),
    'own seed': (dict(grid=dict(seed=[1, 2])), 'list seeds under'), 'same folder': (dict(arms={'a b': {}, 'a/b': {}}), 'another arm has this name'), 'twice': (dict(seeds=[1, 1]), 'twice'), 'no seeds': (dict(seeds=[]), "'seeds'"),
    'word for a seed': (dict(seeds=['one']), "'seeds.0'"), 'equal': (dict(equal='steps'), "'equal'"), 'name': (dict(name='a/b'), "'name'"), 'recipe': (dict(recipe='cifar11'), "Unknown recipe 'cifar11'"), 'arms': (dict(arms=[1]), "'arms'"),
    'minutes': (dict(equal='flops', change={'minutes': 1}), 'needs the length of a run in steps or epochs'), 'steps': (dict(equal='time'), 'needs the length of a run in minutes'),
    'own length': (dict(equal='flops', arms=dict(a=None, b={'steps': 9})), 'set their own'), 'few': (dict(equal='flops', change={'steps': 3}), 'ask for more')}

@pytest.mark.parametrize('kw,words', BAD.values(), ids=BAD)
def test_bad_file_is_one_sentence_before_any_training(tmp_path, monkeypatch, kw, words):
    monkeypatch.setattr(hs, 'fit', lambda *a, **k: pytest.fail('trained'))
    with pytest.raises(HJEPAError, match=words) as e: go(tmp_path, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 350 and re.search(r'[.?]$', str(e.value))

def test_unlabelled_and_changed(tmp_path, whole):
    with pytest.raises(HJEPAError, match='without labels'): go(tmp_path, data=ImageSet('scenes', 'train', SET.images, SET.labels * 0 - 1, SHAPES, 'here'))
    with pytest.raises(HJEPAError, match='optim.lr=0.001'): sweep(FILE | dict(change=FILE['change'] | {'lr': 2e-3}), out=Path(whole['csv']).parent.parent/'runs', results=tmp_path, data=SET)

@pytest.mark.parametrize('text,words', [('a: [', 'is not YAML'), ('hello', 'key: value'), ('{name: x, sedes: [1]}', "Did you mean 'seeds'"), (None, 'cannot be read'), ('arms: {a: {}}', "'name'")])
def test_command_refuses_bad_files(tmp_path, capsys, text, words):
    if text: (tmp_path/'s.yaml').write_text(text)
    assert cli.main(['sweep', str(tmp_path/'s.yaml'), '--out', str(tmp_path/'r')]) == 2
    assert words in capsys.readouterr().err and not (tmp_path/'r').exists()

def test_command(tmp_path, capsys, monkeypatch, whole):
    monkeypatch.setattr(hs, 'load_images', lambda name, split, image: shapes(split))
    (tmp_path/'s.yaml').write_text(yaml.safe_dump(FILE | dict(arms={'both': None}, seeds=[0])))
    words = ['sweep', str(tmp_path/'s.yaml'), '--out', str(tmp_path/'r'), '--results', str(tmp_path/'res'), '--json', str(tmp_path/'f.json')]
    assert cli.main(words) == 0 and '| both |' in capsys.readouterr().out and json.loads((tmp_path/'f.json').read_text())['finished']
    assert cli.main([*words, '--final']) == 0 and (tmp_path/'res'/'t-final.csv').exists()
    monkeypatch.setattr(hs, 'one_run', lambda *a: None); assert cli.main([*words, '--fresh']) == 130 and (tmp_path/'r-2').exists()
    def one(*a): raise HJEPAError('The loss became nan.')
    monkeypatch.setattr(hs, 'one_run', one); assert cli.main([*words, '--fresh']) == 2 and 'No run ended. both, seed 0: The loss became nan.' in capsys.readouterr().err
    with pytest.raises(SystemExit): cli.main(['sweep', '--help'])
    text = capsys.readouterr().out.split('hjepa sweep levels.yaml')[1]; assert recipes_of(read_sweep(yaml.safe_load(text))).keys() == {f'{a}, lr={v}' for a in ('two levels', 'views only') for v in (.001, .002)}
