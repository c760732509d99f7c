"Every field of a recipe is read by something, and changes something; every senseless recipe is refused in one sentence."
import ast, importlib, inspect, re
from pathlib import Path
from typing import Literal, get_args, get_origin
import pytest, torch
import hjepa, hjepa.parts.encoder as he, hjepa.train as ht
from hjepa.config import Branch, HJEPAError, Recipe, change, fields, from_dict, from_yaml, recipe, recipes, to_yaml
from hjepa.data.sets import ImageSet
from hjepa.data.scenes import scenes
from hjepa.evaluate.card import plot_masks
from hjepa.losses.contrast import WHOLE
from hjepa.model import build, load, write_tensors
from hjepa.train import Trainer, fit, run_folder
from tiny import TINY, images, tiny, weights

LEAVES, BRANCHES = list(fields(Recipe())), [k for k, v in Recipe() if isinstance(v, Branch)]
PACKAGE = Path(hjepa.__file__).parent

# ---- read: `r.optim.lr`, `o = r.optim; o.lr`, `v:Views; v.flip`, or `Encoder(**r.encoder.model_dump())`

def aliases(f): # names in a function that stand for a branch or for a whole recipe
    out = {'r': '', 'recipe': ''}
    for a in f.args.args + f.args.kwonlyargs:
        if isinstance(a.annotation, ast.Name) and a.annotation.id.lower() in BRANCHES: out[a.arg] = a.annotation.id.lower() + '.'
    pairs = lambda t, v: [q for x, y in zip(t.elts, v.elts) for q in pairs(x, y)] if isinstance(t, ast.Tuple) and isinstance(v, ast.Tuple) else [(t, v)]
    for n in ast.walk(f):
        if isinstance(n, ast.Assign):
            for t, v in (q for t in n.targets for q in pairs(t, n.value)):
                if isinstance(t, ast.Name) and isinstance(v, ast.Attribute) and v.attr in BRANCHES: out[t.id] = v.attr + '.'
    return out

def prefix(n, names): # of an expression that is a branch or a recipe, else None
    if isinstance(n, ast.Name): return names.get(n.id)
    if isinstance(n, ast.Attribute): return n.attr + '.' if n.attr in BRANCHES else '' if n.attr in ('recipe', 'r') else None

def read_by(path): # recipe leaves that a module reads
    mod, got = None, set()
    for f in ast.walk(ast.parse(path.read_text())):
        if not isinstance(f, ast.FunctionDef): continue
        names = aliases(f)
        for n in ast.walk(f):
            if isinstance(n, ast.Attribute) and (p := prefix(n.value, names)) is not None: got.add(p + n.attr)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
                for k in n.keywords:
                    if k.arg is None and isinstance(k.value, ast.Call) and getattr(k.value.func, 'attr', '') == 'model_dump':
                        mod = mod or importlib.import_module('.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts))
                        got |= {prefix(k.value.func.value, names) + q for q in inspect.signature(getattr(mod, n.func.id)).parameters}
    return got

@pytest.fixture(scope='module')
def read(): return set().union(*(read_by(p) for p in PACKAGE.rglob('*.py') if p.name not in ('config.py', '_modidx.py', 'bench.py')))

@pytest.mark.parametrize('leaf', LEAVES)
def test_field_is_read(read, leaf): assert leaf in read, f'no module reads {leaf}'

# ---- changes something: (field, value, what both recipes have besides)

CHANGES = [('name', 'other'), ('seed', 1), ('data.name', 'another'), ('data.image', 40), ('data.mean', (.5, .5, .5)), ('data.std', (.2, .2, .2)),
    ('views.count', 3), ('views.scale', (.6, 1.)), ('views.ratio', (1., 1.)), ('views.flip', 0.), ('views.jitter', 0.), ('views.brightness', 0.),
    ('views.contrast', 0.), ('views.saturation', 0.), ('views.hue', 0.), ('views.gray', 1.),
    ('views.kind', '3aug'), ('views.kind', 'weak'), ('views.crop', 'simple'), ('views.pad', .2, {'views.crop': 'simple'}), ('views.solarize', 1.), ('views.blur', 1.),
    ('views.sigma', (2., 3.), {'views.blur': 1.}), ('views.local', 2), ('views.local_size', 8, {'views.local': 2}), ('views.local_scale', (.3, .5), {'views.local': 2}),
    ('encoder.patch', 8, {'masks.hidden': (3, 1)}), ('encoder.dim', 24), ('encoder.depth', 3), ('encoder.heads', 4), ('encoder.mlp', 2.), ('encoder.stem', 'conv'),
    ('encoder.registers', 1), ('encoder.layer_scale', .1), ('encoder.drop_path', .5), ('encoder.qk_norm', True), ('encoder.theta', 10.),
    ('encoder.positions', 'mixed'), ('encoder.positions', 'sincos'), ('encoder.positions', 'learned'), ('encoder.positions', 'none'), ('encoder.stretch', True),
    ('encoder.act', 'swiglu'), ('encoder.act', 'gelu_tanh'), ('encoder.act', 'quick_gelu'), ('encoder.pre_norm', True), ('encoder.final_norm', False), ('encoder.eps', 1e-3), ('encoder.windows', 1, {'masks.hidden': (0, 3)}),
    ('encoder.patches', (4, 8)), ('encoder.large_first', True, {'encoder.patches': (4, 8)}),
    ('levels.pool', 'max'), ('levels.pool', 'attention'), ('levels.pool', 'conv'), ('levels.fpn', True), ('levels.across', True), ('levels.slots', 3),
    ('levels.cells', (1, 4)), ('levels.top', False, {'levels.depths': (1, 2)}), ('levels.depths', (2, 2, 2)), ('levels.depths', (1, 2, 1)), ('levels.weights', (1., .5)),
    ('masks.kind', 'blocks'), ('masks.hidden', (3, 3)), ('masks.predict', (2, 1)), ('masks.blocks', 1, {'masks.kind': 'blocks', 'masks.hidden': (12, 2)}),
    ('masks.aspect', (.2, .3), {'masks.kind': 'blocks', 'masks.hidden': (12, 2)}),
    ('predictor.dim', 24), ('predictor.depth', 2), ('predictor.heads', 4), ('predictor.attention', 'joint'), ('predictor.attention', 'packed'),
    ('prediction.weight', .5), ('prediction.weight', 0.), ('prediction.kind', 'mse'), ('prediction.kind', 'cosine'), ('prediction.share', .5),
    ('prediction.momentum', .5), ('prediction.floor', 10.),
    ('whole.kind', 'vicreg', {'whole.args': {}}), ('whole.kind', 'none'), ('whole.weight', .5), ('whole.args', {'lam': .5}), ('whole.hidden', 32), ('whole.dim', 12),
    ('optim.lr', 2e-3), ('optim.lr_end', 1e-4), ('optim.warmup', .7), ('optim.betas', (.8, .9)), ('optim.wd', .5), ('optim.wd_end', .5),
    ('optim.clip', .01), ('optim.clip', None), ('optim.ema', .5), ('optim.ema_end', .5),
    ('optim.kind', 'schedulefree', {'optim.schedule': 'constant'}), ('optim.kind', 'lars'), ('optim.kind', 'muon'), ('optim.schedule', 'linear'), ('optim.schedule', 'constant'),
    ('optim.restarts', 1), ('optim.cooldown', .9, {'optim.schedule': 'linear'}), ('optim.layer_decay', .5), ('optim.momentum', .5, {'optim.kind': 'lars'}), ('optim.momentum', .5, {'optim.kind': 'muon'}), ('optim.ema_schedule', 'linear', {'train.steps': 4}),
    ('train.batch', 10), ('train.accumulate', 2), ('train.epochs', 1.), ('train.steps', 4), ('train.minutes', .0001), ('train.precision', 'bf16'),
    ('train.log', 2), ('train.monitor', 1), ('train.tensorboard', True)]
CHANGES += [('levels.depths', (1, (1, 2), 2)), ('levels.join', 'mean', {'levels.depths': (1, (1, 2), 2)}), ('levels.weighting', 'uw-so'), ('levels.temperature', 5., {'levels.weighting': 'uw-so'}),
    ('prediction.targets', 'whiten'), ('prediction.gradient', True, {'optim.ema': 0., 'optim.ema_end': 0.}), ('prediction.visible', .5), ('prediction.visible_warmup', 10, {'prediction.visible': .5}), ('prediction.next_view', .5),
    *(('levels.weighting', k) for k in ('uw-o', 'learned', 'gradnorm')), *(('whole.kind', k, {'whole.args': {}}) for k in WHOLE if k not in ('sigreg', 'vicreg')), ('whole.kind', {'sigreg': 1., 'infonce': .1}, {'whole.args': {}})] # losses
ELSEWHERE = {'encoder.checkpoint', 'encoder.read', 'data.workers', 'data.labelled', 'train.device', 'train.compile', 'train.save'} # each in a test of its own

def test_the_list_is_complete(): assert {c[0] for c in CHANGES} | ELSEWHERE == set(LEAVES)

def test_every_choice_is_in_the_list(): # of fields that offer a few words, or yes and no
    offered = {f'{b}.{k}': a for b in BRANCHES for k, f in type(getattr(TINY, b)).model_fields.items() if (a := (True, False) if f.annotation is bool else get_args(f.annotation) if get_origin(f.annotation) is Literal else ())}
    offered |= {'prediction.targets': ('layer', 'whiten'), 'whole.kind': (*WHOLE, 'none')}; assert len(offered) > 20
    tried = {(c[0], str(c[1])) for c in CHANGES} | {(k, str(v)) for k, v in fields(TINY).items()} | {('train.precision', 'auto')}      # fp32 on this device
    assert {(k, str(a)) for k, v in offered.items() if k not in ELSEWHERE for a in v} <= tried

def run(r, folder, monkeypatch): # everything that can be seen of a short run, the recipe's own record left out
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ht, 'load_images', lambda name, split, image: ImageSet(name, split, scenes(32, image, seed=len(name))[0], torch.arange(32) % 4, tuple('abcd'), 'here'))
    out = fit(r)
    rows = [{k: v for k, v in q.items() if k not in ('seconds', 'images_per_second')} for q in out.history]
    sizes = [r.data.image] + [r.data.image + 16] * (r.encoder.positions != 'learned')       # a learned table has one size
    feats = {f'features {s} {i}': f for s in sizes for i, f in enumerate(out.model.levels(images(4, s)))}
    return dict(path=out.path.name, files=sorted(p.name for p in out.path.iterdir()), rows=rows, monitor=out.monitor), weights(out.model) | feats

def differ(a, b): return a[0] != b[0] or a[1].keys() != b[1].keys() or any(x.shape != b[1][k].shape or not torch.equal(x, b[1][k]) for k, x in a[1].items())

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    kept = {}
    def get(kw):
        if (key := str(kw)) not in kept:
            with pytest.MonkeyPatch.context() as m: kept[key] = run(change(TINY, **{'train.steps': 3, **kw}), tmp_path_factory.mktemp('base'), m)
        return kept[key]
    return get

def test_nothing_changed_changes_nothing(base, tmp_path, monkeypatch): assert not differ(base({}), run(tiny(train__steps=3), tmp_path, monkeypatch))

@pytest.mark.parametrize('field,value,both', [(*c, {})[:3] for c in CHANGES], ids=[f'{c[0]}={c[1]}' for c in CHANGES])
def test_field_changes_something(base, tmp_path, monkeypatch, field, value, both):
    first = {} if field == 'levels.top' else both         # the top cannot go without its depth
    if field == 'whole.kind' and value == 'none': both = {}
    changed = run(change(TINY, **{'train.steps': 3, **both, field: value}), tmp_path, monkeypatch)
    assert differ(base(first), changed), f'{field}={value} makes no difference'

@pytest.mark.parametrize('field,value', [c[:2] for c in CHANGES if any(not k.startswith('train.') for k in (*c, {})[2])], ids=lambda v: str(v))
def test_alone_it_changes_something_or_is_refused(base, tmp_path, monkeypatch, field, value):
    try: r = change(TINY, **{'train.steps': 3, field: value})
    except HJEPAError as e: assert one_sentence(str(e)); return
    try: got = run(r, tmp_path, monkeypatch)
    except HJEPAError as e: assert one_sentence(str(e))                   # arguments of a loss: refused when it is built
    else: assert differ(base({}), got), f'{field}={value} alone makes no difference'

def test_checkpoint_recomputes(tmp_path, monkeypatch):
    n = [0]
    monkeypatch.setattr(he, 'checkpoint', lambda f, *a, g=he.checkpoint, **k: (n.__setitem__(0, n[0] + 1), g(f, *a, **k))[1])
    fit(tiny(train__steps=1), data=images(), out=tmp_path/'a'); assert n == [0]
    fit(tiny(train__steps=1, encoder__checkpoint=True), data=images(), out=tmp_path/'b'); assert n[0] >= 2

def test_workers_decode(tmp_path, monkeypatch):
    import hjepa.data.loader as hl
    seen, real = [], hl.DataLoader
    monkeypatch.setattr(hl, 'DataLoader', lambda *a, num_workers, **k: (seen.append(num_workers), real(*a, num_workers=num_workers and 1, **k))[1])
    lazy = type('Lazy', (), dict(__len__=lambda s: 32, __getitem__=lambda s, i, x=images(): x[i]))()
    fit(tiny(train__steps=1, data__workers=3), data=lazy, out=tmp_path); assert 3 in seen

def test_device_is_asked_for(tmp_path):
    with pytest.raises(HJEPAError, match="'tpu' is unknown"): fit(tiny(train__device='tpu'), data=images(), out=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(HJEPAError, match='cuda but this machine offers cpu'): fit(tiny(train__device='cuda'), data=images(), out=tmp_path)

def test_save_interval(tmp_path, monkeypatch):
    n = []; monkeypatch.setattr(Trainer, 'save', lambda self, f=Trainer.save: (n.append(self.step), f(self))[1])
    fit(tiny(), data=images(), out=tmp_path/'a'); assert n == [0, 6]
    fit(tiny(train__save=1e-9), data=images(), out=tmp_path/'b'); assert n == [0, 6, 0, 1, 2, 3, 4, 5, 6, 6]

def test_labelled_reaches_the_report(tmp_path, monkeypatch):
    import hjepa.cli as cli
    seen = {}; monkeypatch.setattr(cli, 'run_suite', lambda *a, **k: (seen.update(labelled=a[7]), (tmp_path/'report.md').write_text(''), dict(missing={}))[2])
    from hjepa.model import build
    build(tiny()).save(tmp_path/'model.safetensors')
    monkeypatch.setattr(cli, 'load_images', lambda *a, **k: None)
    assert cli.main(['evaluate', str(tmp_path), 'labelled=17']) == 0 and seen['labelled'] == 17

# ---- recipes and their printed form

@pytest.mark.parametrize('name', recipes)
def test_shipped_recipes_print_and_read_back(name):
    r = recipe(name); assert r.name == name and from_yaml(to_yaml(r)) == r and recipes[name].__doc__

def test_file_equals_name(tmp_path):
    (tmp_path/'r.yaml').write_text(to_yaml(recipe('cifar10'))); assert recipe(tmp_path/'r.yaml') == recipe('cifar10')

# ---- bad input

BAD = {'unknown key': (dict(encodr=3), "Unknown recipe key 'encodr'"), 'near key': (dict(pach=4), "Did you mean 'patch'"), 'two meanings': (dict(depth=3), 'encoder.depth or predictor.depth'),
    'patch': (dict(encoder__patch=5), 'not divisible'), 'patch over image': (dict(encoder__patch=64), 'not divisible'), 'cell over grid': (dict(levels__cells=(1, 16)), 'larger than the 8x8 grid'),
    'not nested': (dict(levels__cells=(1, 2, 3)), 'do not nest'), 'no level': (dict(levels__cells=()), 'cells'), 'depth': (dict(levels__depths=(1, 2, 3)), 'outside'),
    'depth count': (dict(levels__depths=(1, 2)), 'one block a level'), 'no context': (dict(masks__hidden=(0, 16)), 'no context'), 'no context 2': (dict(masks__hidden=(64, 0)), 'no context'),
    'too many': (dict(masks__hidden=(1, 17)), 'hide fewer'), 'negative': (dict(masks__hidden=(-1, 3)), '0 or more'), 'negative asked': (dict(masks__predict=(-1, 1)), 'predict'),
    'nothing hidden': (dict(masks__hidden=(0, 0)), 'hides nothing'), 'count': (dict(masks__hidden=(1, 2, 3)), 'one a level'), 'seed': (dict(seed=2**64), 'seed'), 'empty name': (dict(name=''), 'name'), 'no weight': (dict(levels__weights=(0., 0.)), 'weights'),
    'no loss': (dict(prediction__weight=0., whole__kind='none'), 'no loss'), 'no weight on any loss': (dict(prediction__weight=0., whole__weight=0.), 'whole.weight is 0, so there is no loss'), 'one view': (dict(views__count=1), 'views.count is 1'), 'heads': (dict(encoder__heads=5), 'not divisible by 5 heads'), 'head': (dict(encoder__heads=8), 'multiple of 4'),
    'pieces': (dict(train__accumulate=3), 'not divisible'), 'no length': (dict(train__steps=None), 'exactly one'), 'type': (dict(optim__lr='fast'), "optim.lr"), 'sign': (dict(optim__lr=-1.), 'optim.lr'),
    'choice': (dict(masks__kind='bloks'), "masks.kind"), 'mean': (dict(data__mean=(125., 120., 110.)), 'divide by 255'), 'std': (dict(data__std=(.2, 0., .2)), 'data.std'),
    **{f'{k} {a}': ({f'views__{k}': a}, f'views.{k}') for k, bad in dict(count=[0], kind=['3-aug', ''], crop=['random'], flip=[-.1, 1.1, float('nan')], jitter=[2.], gray=[-1.], solarize=[1.5], blur=[-.5],
        brightness=[-.1, 1.5], contrast=[1.1], saturation=[-1.], hue=[-.1, .6], pad=[-.1, 1.], scale=[(1., .3), (0., 1.), (.3, 1.2), (-.3, 1.), (float('nan'), 1.), (.3,)], local_scale=[(.3, .05), (.1, 2.)],
        ratio=[(4/3, 3/4), (0., 1.), (-1., 1.), (1., float('inf'))], sigma=[(2., .1), (0., 1.)], local=[-1], local_size=[0]).items() for a in bad},
    'local patch': (dict(views__local=2, views__local_size=10), 'local_size 10 is not divisible'), 'local alone': (dict(views__local=2, whole__kind='none'), 'views.local is 2')}

def one_sentence(text): return '\n' not in text and len(text) < 400 and re.search(r'[.?]$', text)

@pytest.mark.parametrize('kw,words', BAD.values(), ids=BAD)
def test_bad_recipe_is_refused_in_a_sentence(kw, words):
    with pytest.raises(HJEPAError, match=re.escape(words)) as e: tiny(**kw)
    assert one_sentence(str(e.value)), str(e.value)

@pytest.mark.parametrize('kw,words', [(dict(whole__kind='vicrag', whole__args={}), "Did you mean 'vicreg'"), (dict(whole__args={'lamb': 1}), "Did you mean 'lam'"), (dict(whole__kind='no.such.Class', whole__args={}), 'cannot be imported'), (dict(whole__kind='.x', whole__args={}), 'cannot be imported'),
                                      (dict(whole__kind='math.sqrt', whole__args={}), 'is no class of torch.nn'), (dict(prediction__targets='math.pi'), 'cannot be called')])
def test_bad_whole_is_refused_when_built(tmp_path, kw, words):
    with pytest.raises(HJEPAError, match=re.escape(words)) as e: fit(tiny(**kw), data=images(), out=tmp_path)
    assert one_sentence(str(e.value)) and not any(tmp_path.iterdir())

def test_a_file_of_weights_cannot_run_a_program(tmp_path):
    evil = tiny(whole__kind='os.system', whole__args=dict(command=f'touch {tmp_path/"ran"}'))
    write_tensors(tmp_path/'model.safetensors', build(tiny()).state_dict(), dict(format='hjepa', recipe=to_yaml(evil)))
    with pytest.raises(HJEPAError, match='os.system.* is no class'): load(tmp_path/'model.safetensors')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('bad,words', [(lambda x: x.long(), 'these are int64'), (lambda x: x.float(), 'Float images must lie'), (lambda x: x / 0 * 0, 'NaN or infinite')], ids=['integers', 'floats to 255', 'nan'])
def test_levels_refuse_what_fit_refuses(bad, words):
    model, x = build(tiny()).eval(), images()[:2]
    with pytest.raises(HJEPAError, match=words) as e: model.levels(bad(x))
    assert one_sentence(str(e.value)); torch.testing.assert_close(model.levels(x)[0], model.levels(x / 255)[0])

def test_masks_of_fewer_test_images_than_the_figure_shows():
    fig = plot_masks(build(tiny()), images()[:2]); per_row = fig.axes[0].get_gridspec().ncols
    assert len(fig.axes) == 2 * per_row

def test_a_recipe_file_that_is_no_text(tmp_path):
    (tmp_path/'r.yaml').write_bytes(b'seed: \xff'); (tmp_path/'dir.yaml').mkdir()
    for f in ('r.yaml', 'dir.yaml'):
        with pytest.raises(HJEPAError, match='cannot be read') as e: recipe(tmp_path/f)
        assert one_sentence(str(e.value))

def test_a_path_is_no_set_of_images(tmp_path):
    with pytest.raises(HJEPAError, match='no sequence of images'): fit(tiny(), data=tmp_path, out=tmp_path/'run')

def test_a_name_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(run_folder(None, 'a', False)) for _ in range(3)] == ['runs/a', 'runs/a-2', 'runs/a-3']

@pytest.mark.parametrize('text,words', [('a: [', 'not YAML'), ('hello', 'key: value'), ('encoder: 3', 'encoder'), ('encoder: {pach: 3}', "Did you mean 'patch'")])
def test_bad_file_is_refused_in_a_sentence(tmp_path, text, words):
    (tmp_path/'r.yaml').write_text(text)
    with pytest.raises(HJEPAError, match=words) as e: recipe(tmp_path/'r.yaml')
    assert one_sentence(str(e.value))
