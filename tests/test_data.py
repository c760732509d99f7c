"Data: what must hold between notebooks, processes and interrupted runs. No network, and never the user's own cache."
import errno, hashlib, io, json, os, pickle, subprocess, sys, tarfile, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from hjepa import files, sources
from hjepa.config import HJEPAError
from hjepa.data import sets
from hjepa.data.scenes import scenes
from hjepa.data.sets import DataError, Folder, Named, SETS, checksum, load

rng = np.random.default_rng(0)
TINY = {s: (rng.integers(0, 256, (n,32,32,3), np.uint8), rng.integers(0, 3, n, np.uint8)) for s,n in (('train',40),('test',20))}
SUMS = {s: tuple(map(checksum, v)) for s,v in TINY.items()}

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A data root of its own, and no way to a network"
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path))
    monkeypatch.setattr('socket.create_connection', lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENETUNREACH, 'no network')))
    return tmp_path

def tiny(monkeypatch, *sources, **kw):
    "The set 'tiny', with these functions as sources"
    s = Named([(f.__name__, f) for f in sources], ('a','b','c'), 1e6, 'bring the files.', SUMS)._replace(**kw)
    monkeypatch.setitem(SETS, 'tiny', s)

def good(folder, progress): return TINY
def other_bytes(folder, progress): return {s:(x^1, y) for s,(x,y) in TINY.items()}
def other_labels(folder, progress): return {s:(x, (y+1)%3) for s,(x,y) in TINY.items()}
def offline(folder, progress): raise OSError('the network is down')

def left(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and p.name!='.lock')

@pytest.mark.parametrize('when', ['first array', 'last array', 'rename'])
@pytest.mark.parametrize('what', [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, 'full')])
def test_interrupted_import_leaves_nothing(home, monkeypatch, when, what):
    tiny(monkeypatch, good)
    with monkeypatch.context() as m:
        if when=='rename': m.setattr(sets.os, 'replace', lambda *a: (_ for _ in ()).throw(what))
        else:
            calls, save = [], np.save
            def dying(f, a):
                calls.append(f); save(f, a)
                if len(calls)==(1 if when=='first array' else 4): raise what
            m.setattr(np, 'save', dying)
        with pytest.raises((KeyboardInterrupt, MemoryError, DataError)): load('tiny')
        assert left(home/'tiny')==[]
    assert load('tiny').images.shape==(40,3,32,32)
    assert left(home/'tiny')==['arrays/source.json'] + [f'arrays/{s}-{k}.npy' for s in ('test','train') for k in ('images','labels')]

def test_killed_process_leaves_no_half_and_next_call_works(home, monkeypatch):
    code = ("import os, numpy as np\nfrom hjepa.data import sets\nz = np.zeros((4,8,8,3), np.uint8); y = np.zeros(4, np.uint8)\n"
            "sets.SETS['tiny'] = sets.Named([('x', lambda f,p: dict(train=(z,y), test=(z,y)))], ('a',), 1, '')\n"
            "n = []; save = np.save\ndef die(f, a):\n    save(f, a); n.append(f)\n    if len(n)==2: os.kill(os.getpid(), 9)\n"
            "np.save = die\nsets.load('tiny')")
    assert subprocess.run([sys.executable, '-c', code]).returncode==-9
    assert not (home/'tiny'/'arrays').exists() and list((home/'tiny').glob('.part-*'))
    tiny(monkeypatch, good)
    assert torch.equal(load('tiny').labels, torch.from_numpy(TINY['train'][1].astype(np.int64)))
    assert not list((home/'tiny').glob('.part-*'))

def test_cached_set_asks_nobody_and_damage_is_noticed(home, monkeypatch):
    tiny(monkeypatch, good); a = load('tiny', 'test')
    tiny(monkeypatch, offline); b = load('tiny', 'test')
    assert torch.equal(a.images, b.images) and b.source=='good'
    f = home/'tiny'/'arrays'/'test-images.npy'; f.write_bytes(f.read_bytes()[:-100])
    with pytest.raises(DataError, match='network is down'): load('tiny', 'test')
    tiny(monkeypatch, good); assert torch.equal(load('tiny', 'test').images, a.images)

@pytest.mark.parametrize('liar', [other_bytes, other_labels])
def test_wrong_bytes_refused_next_source_used(home, monkeypatch, liar):
    tiny(monkeypatch, liar, good)
    d = load('tiny'); assert d.source=='good' and np.array_equal(d.images.permute(0,2,3,1).numpy(), TINY['train'][0])
    assert json.loads((home/'tiny'/'arrays'/'source.json').read_text())['sha256']=={s:list(v) for s,v in SUMS.items()}

def test_error_names_every_source_reason_and_cure(home, monkeypatch):
    tiny(monkeypatch, offline, other_bytes, other_labels)
    with pytest.raises(DataError) as e: load('tiny')
    m = str(e.value)
    for part in ('offline', 'the network is down', 'other_bytes', 'train images', 'other_labels', 'test labels', 'bring the files'): assert part in m, m
    assert isinstance(e.value, HJEPAError) and '\n' not in m and left(home/'tiny')==[]

@pytest.mark.parametrize('name', ['cifar10', 'fashion_mnist'])
def test_real_sets_without_network_fail_fast_and_in_words(home, monkeypatch, name):
    monkeypatch.setattr(sets.shutil, 'which', lambda *_: None); monkeypatch.setattr(sets, 'DEBIAN', ('/nowhere',))
    t = time.time()
    with pytest.raises(DataError) as e: load(name)
    assert time.time()-t<10                                  # an import of torchvision included
    m = str(e.value); assert 'no connection to' in m and 'HJEPA_DATA' in m
    for source,_ in SETS[name].sources: assert source in m, m

def test_archive_that_is_there_is_unpacked_again_after_a_kill(home, monkeypatch):
    from torchvision.datasets import CIFAR10
    d = home/'cifar10'/'.download'; (d/CIFAR10.base_folder).mkdir(parents=True)            # a kill while unpacking left an empty folder
    rng, sums = np.random.default_rng(0), {}
    with tarfile.open(d/CIFAR10.filename, 'w:gz') as tar:
        for name in ('data_batch_1', 'test_batch', 'batches.meta'):
            b = pickle.dumps({'data': rng.integers(0, 256, (3,3072), np.uint8), 'labels': [0,1,2], 'label_names': ['a','b','c']})
            i = tarfile.TarInfo(f'{CIFAR10.base_folder}/{name}'); i.size = len(b); tar.addfile(i, io.BytesIO(b)); sums[name] = hashlib.md5(b).hexdigest()
    for k,v in dict(train_list=[['data_batch_1', sums['data_batch_1']]], test_list=[['test_batch', sums['test_batch']]], tgz_md5=hashlib.md5((d/CIFAR10.filename).read_bytes()).hexdigest(),
                    meta=dict(filename='batches.meta', key='label_names', md5=sums['batches.meta'])).items(): monkeypatch.setattr(CIFAR10, k, v)
    monkeypatch.setattr(files, 'reach', lambda *_: pytest.fail('asked the network'))
    got = sources.cifar('CIFAR10', home/'cifar10', False)
    assert got['train'][0].shape==(3,32,32,3) and got['test'][1].tolist()==[0,1,2]

def test_pickled_labels_refused(home, monkeypatch):
    d = home/'cifar10'; d.mkdir()
    for f in ('train-0.webp','test.webp'): Image.new('RGB', (64,64)).save(d/f, lossless=True)
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(home/'boom'),)
    for s in ('train','test'): np.save(d/f'y_{s}.npy', np.array([Bomb()], dtype=object), allow_pickle=True)
    monkeypatch.setattr(sets.shutil, 'which', lambda *_: None)
    with pytest.raises(DataError, match='pickle'): load('cifar10', progress=False)
    assert not (home/'boom').exists()

def test_too_little_disk(home, monkeypatch):
    tiny(monkeypatch, good, n_bytes=1e18)
    with pytest.raises(DataError, match='make room, or set HJEPA_DATA'): load('tiny')

def test_sprites_with_the_right_sums_become_the_set(home, monkeypatch):
    d = home/'tiny'; d.mkdir()
    for s,(x,y) in TINY.items():
        np.save(d/f'y_{s}.npy', y); parts = np.split(x, 2) if s=='train' else [x]
        for i,p in enumerate(parts):
            sheet = p.reshape(-1, 10, 32, 32, 3).swapaxes(1, 2).reshape(-1, 320, 3)
            Image.fromarray(sheet).save(d/(f'train-{i}.webp' if s=='train' else 'test.webp'), lossless=True)
    tiny(monkeypatch, sources.import_sprites)
    for s,(x,y) in TINY.items():
        got = load('tiny', s, progress=False)
        assert np.array_equal(got.images.permute(0,2,3,1).numpy(), x) and got.labels.tolist()==y.tolist() and got.labels.dtype==torch.int64
    assert (d/'train-0.webp').exists()                       # the user's files stay

def test_two_processes_at_once(home):
    code = ("import time, numpy as np\nfrom hjepa.data import sets\nz = np.zeros((4,8,8,3), np.uint8); y = np.zeros(4, np.uint8)\n"
            "def get(folder, p):\n    open(folder/'asked', 'a').write('x'); time.sleep(.5)\n    return dict(train=(z,y), test=(z,y))\n"
            "sets.SETS['tiny'] = sets.Named([('x', get)], ('a',), 1, '')\nprint(len(sets.load('tiny')))")
    ps = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in ps]==['4','4']
    assert (home/'tiny'/'asked').read_text()=='x'            # one of them asked, the other waited

def test_data_root_is_the_one_that_was_set(home, monkeypatch, tmp_path):
    tiny(monkeypatch, good); load('tiny')
    assert sets.data_root()==home and (home/'tiny'/'arrays'/'source.json').exists()
    load('tiny', root=tmp_path/'elsewhere'); assert (tmp_path/'elsewhere'/'tiny'/'arrays').is_dir()
    monkeypatch.delenv('HJEPA_DATA'); assert sets.data_root()==Path.home()/'.cache'/'hjepa'

def test_folder_round_trip(home):
    for split,k in (('train',6),('val',3)):
        for c,name in enumerate(('cat','dog')):
            d = home/'pics'/split/name; d.mkdir(parents=True)
            for i,im in enumerate(scenes(k, 32, seed=c+10*k)[0]): Image.fromarray(im.permute(1,2,0).numpy()).save(d/f'{i}.png')
    tr,te = (load(f'folder:{home}/pics', s, image=32) for s in ('train','test'))
    assert (len(tr), len(te), tr.classes, tr.resident)==(12, 6, ('cat','dog'), False)
    assert torch.equal(tr.images[:], torch.cat([scenes(6, 32, seed=60+c)[0] for c in range(2)]))    # png keeps every byte
    assert torch.equal(te.images[[0,4]], torch.stack([scenes(3, 32, seed=30)[0][0], scenes(3, 32, seed=31)[0][1]]))
    assert tr.labels.tolist()==[0]*6+[1]*6 and tr.images[0].dtype==torch.uint8
    again = pickle.loads(pickle.dumps(tr.images)); assert isinstance(again, Folder) and torch.equal(again[5], tr.images[5])   # for workers

def test_folder_with_other_classes_in_test(home):
    for p in ('train/cat','train/dog','test/cat','test/cow'):
        (home/'p'/p).mkdir(parents=True); Image.new('RGB', (8,8)).save(home/'p'/p/'1.png')
    with pytest.raises(DataError, match='cow, dog'): load(f'folder:{home}/p', 'test')

def test_scenes_are_the_same_in_every_process_and_thread_count(home):
    code = ("import hashlib, torch; torch.set_num_threads({}); from hjepa.data.sets import load; d = load('scenes', 'test', n=300)\n"
            "print(hashlib.sha256(d.images.numpy().tobytes()+b''.join(v.numpy().tobytes() for v in d.extra.values())).hexdigest())")
    out = [subprocess.run([sys.executable, '-c', code.format(k)], capture_output=True, text=True, check=True).stdout.strip() for k in (1,2)]
    d = load('scenes', 'test', n=300)
    here = hashlib.sha256(d.images.numpy().tobytes()+b''.join(v.numpy().tobytes() for v in d.extra.values())).hexdigest()
    assert out==[here, here] and torch.equal(load('scenes', 'test', n=100).images, d.images[:100])

def test_unknown_names_say_the_nearest(home):
    for bad,near in (('cifar-10','cifar10'), ('fashion-mnist','fashion_mnist'), ('scene','scenes'), ('torchvision:CIFAR','CIFAR10')):
        with pytest.raises(DataError, match=near): load(bad)
