"Data: what must hold between notebooks, processes and interrupted runs. No network, and never the user's own cache."
import errno, hashlib, io, json, os, pickle, shutil, subprocess, sys, tarfile, time
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

# ---- what torchvision knows how to bring: archives of the published form, with the sums of ours

def tar_of(path, files, mode='w'): # {name: bytes}; returns the MD5
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name,b in files.items(): i = tarfile.TarInfo(name); i.size = len(b); tar.addfile(i, io.BytesIO(b))
    return md5(path.read_bytes())
def md5(b): return hashlib.md5(b).hexdigest()
def jpg(level=9): b = io.BytesIO(); Image.new('RGB', (12,10), (level,)*3).save(b, 'jpeg'); return b.getvalue()

def test_cifar100(home, monkeypatch):
    from torchvision.datasets import CIFAR100 as T
    x = rng.integers(0, 256, (5,3072), np.uint8); two = {s: pickle.dumps({'data': x[:n], 'fine_labels': list(range(n))}) for s,n in (('train',5),('test',3))}
    meta = pickle.dumps({'fine_label_names': ['a']*100})
    sum_ = tar_of(home/'cifar100'/'.download'/T.filename, {f'{T.base_folder}/{k}': v for k,v in (two|{'meta': meta}).items()}, 'w:gz')
    for k,v in dict(train_list=[['train', md5(two['train'])]], test_list=[['test', md5(two['test'])]], tgz_md5=sum_, meta=T.meta|dict(md5=md5(meta))).items(): monkeypatch.setattr(T, k, v)
    s = load('cifar100', progress=False)
    assert np.array_equal(s.images.flatten(1).numpy(), x) and s.labels.tolist()==[0,1,2,3,4] and s.classes[4]=='beaver' and left(home/'cifar100')[-1].startswith('arrays')

def test_stl10_and_its_unlabelled_split(home, monkeypatch):
    from torchvision.datasets import STL10 as T
    x = {k: rng.integers(0, 256, (n,3,96,96), np.uint8) for k,n in (('train',4),('test',3),('unlabeled',6))}
    b = {f'{k}_X.bin': v.transpose(0,1,3,2).tobytes() for k,v in x.items()} | {'train_y.bin': bytes([1,2,3,10]), 'test_y.bin': bytes([1,1,2])}     # columns first, labels from 1
    sum_ = tar_of(home/'stl10'/'.download'/T.filename, {f'{T.base_folder}/{k}': v for k,v in b.items()}, 'w:gz')
    monkeypatch.setattr(T, 'tgz_md5', sum_)
    for k in ('train_list','test_list'): monkeypatch.setattr(T, k, [[f, md5(b[f])] for f,_ in getattr(T, k)])
    a, u, t = load('stl10', progress=False), load('stl10_unlabelled'), load('stl10_unlabelled', 'test')
    for s,k in ((a,'train'),(u,'unlabeled'),(t,'test')): assert np.array_equal(s.images.numpy(), x[k])
    assert a.labels.tolist()==[0,1,2,9] and u.labels.tolist()==[-1]*6 and t.labels.tolist()==[0,0,1] and u.classes==a.classes and len(a.classes)==10
    assert not (home/'stl10_unlabelled').exists() and not (home/'stl10'/'.download').exists()

def test_imagenette(home, monkeypatch):
    from torchvision.datasets import Imagenette as T
    tar_of(home/'imagenette'/'.download'/'imagenette2-320.tgz', {f'imagenette2-320/{s}/{c}/{i}.JPEG': jpg() for s,n in (('train',3),('val',1)) for c in T._WNID_TO_CLASS for i in range(n)}, 'w:gz')
    s,t = (load('imagenette', k, image=8, progress=False) for k in ('train','test'))
    assert (len(s), len(t), len(s.classes), s.classes[0])==(30, 10, 10, 'tench') and s.images[29].shape==(3,8,8) and not list(home.rglob('*.tgz'))

def test_places365(home, monkeypatch):
    from torchvision.datasets import Places365 as T
    d = home/'places365'/'.download'; text = {'categories_places365.txt': b'/b/bridge 0\n/a/attic 1\n', 'places365_train_standard.txt': b'/b/bridge/1.jpg 0\n/a/attic/1.jpg 1\n/a/attic/2.jpg 1\n', 'places365_val.txt': b'v1.jpg 1\n'}
    monkeypatch.setattr(T, '_DEVKIT_META', dict(standard=('filelist_places365-standard.tar', tar_of(d/'filelist_places365-standard.tar', text))))
    monkeypatch.setattr(T, '_CATEGORIES_META', ('categories_places365.txt', md5(text['categories_places365.txt'])))
    monkeypatch.setattr(T, '_FILE_LIST_META', {'train-standard': ('places365_train_standard.txt', md5(text['places365_train_standard.txt'])), 'val': ('places365_val.txt', md5(text['places365_val.txt']))})
    tar_of(d/'train_256_places365standard.tar', {f'data_256/{n}': jpg() for n in ('b/bridge/1.jpg','a/attic/1.jpg','a/attic/2.jpg')})
    monkeypatch.setattr(sources, 'room', lambda *a: None)                                                      # it asks for 55 GB
    s = load('places365', image=8, progress=False); assert (s.classes, s.labels.tolist(), s.images[2].shape)==(('bridge','attic'), [0,1,1], (3,8,8))
    tar_of(d/'filelist_places365-standard.tar', text); tar_of(d/'val_256.tar', {'val_256/v1.jpg': jpg()})
    t = load('places365', 'test', image=8, progress=False); assert t.labels.tolist()==[1] and t.images[0].shape==(3,8,8) and not list(home.rglob('*.tar'))

def test_imagenet_from_its_archives(home, monkeypatch):
    import scipy.io
    from torchvision.datasets import imagenet as T
    d = home/'imagenet'; ids = ['n01440764', 'n02102040']
    def inner(c): tar_of(home/'x'/f'{c}.tar', {f'{c}_{i}.JPEG': jpg() for i in range(3)}); return (home/'x'/f'{c}.tar').read_bytes()
    mat = np.array([(i+1, c, f'word {i}', 'gloss', 0) for i,c in enumerate(ids)], dtype=[(k, object) for k in ('ILSVRC2012_ID','WNID','words','gloss','num_children')])
    b = io.BytesIO(); scipy.io.savemat(b, {'synsets': mat})
    kit = {'ILSVRC2012_devkit_t12/data/meta.mat': b.getvalue(), 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt': b'2\n1\n2\n'}
    sums = dict(train=tar_of(d/T.ARCHIVE_META['train'][0], {f'{c}.tar': inner(c) for c in ids}), val=tar_of(d/T.ARCHIVE_META['val'][0], {f'v{i}.JPEG': jpg() for i in range(3)}), devkit=tar_of(d/T.ARCHIVE_META['devkit'][0], kit, 'w:gz'))
    monkeypatch.setattr(T, 'ARCHIVE_META', {k: (T.ARCHIVE_META[k][0], v) for k,v in sums.items()})
    s,t = (load('imagenet', k, image=8, progress=False) for k in ('train','test'))
    assert s.classes==t.classes==tuple(ids) and s.labels.tolist()==[0]*3+[1]*3 and t.labels.tolist()==[0,1,1] and not list(d.glob('.part*')) and not list((d/'train').rglob('*.tar'))
    with monkeypatch.context() as m:                                                                           # killed in the middle: no half folder
        shutil.rmtree(d/'train'); m.setattr(T, 'extract_archive', lambda f,to,**k: (os.makedirs(to), open(to+'/half', 'w').close(), (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt): load('imagenet', progress=False)
        assert not (d/'train').exists() and not list(d.glob('.part*'))

def test_torchvision_still_has_what_is_read_from_it():
    import torchvision.datasets as tv
    for c in (tv.CIFAR10, tv.CIFAR100, tv.STL10): assert c.url.startswith('http') and len(c.tgz_md5)==32 and c.filename and c.base_folder
    assert len(tv.Imagenette._ARCHIVES['320px'])==2 and len(tv.Imagenette._WNID_TO_CLASS)==10
    assert {('train-standard',True),('val',True)}<=tv.Places365._IMAGES_META.keys() and tv.Places365._DEVKIT_META['standard'] and tv.Places365._BASE_URL
    assert tv.imagenet.ARCHIVE_META.keys()=={'train','val','devkit'} and len(tv.FashionMNIST.resources)==4

# ---- mixtures

def stand_ins(home):
    "A few pictures for each part of the three mixtures, in the layout of the real ones"
    def put(d, n, split='train'):
        for i in range(n): (home/d).mkdir(parents=True, exist_ok=True); (home/d/f'{split}{i}.jpg').write_bytes(jpg(40))
    ids = [f'n{i:08}' for i in range(101)]
    for split in ('train','val'):
        for c in ids: put(f'imagenet/{split}/{c}', 1)
        put(f'coco/{split}2017', 30 if split=='train' else 2)
    (home/'imagenet100').mkdir(); (home/'imagenet100'/'classes.txt').write_text('\n'.join(ids[:100]))
    put('places365/data_256_standard/a/attic', 300)

def stand_in_arrays(monkeypatch, home):
    x = lambda n,s: rng.integers(0, 256, (n,s,s,3), np.uint8)
    for name,s,n,c in (('cifar10',32,50,10),('cifar100',32,50,100),('stl10',96,20,10)):
        splits = {k: (x(m,s), np.arange(m)%c) for k,m in (('train',n),('test',10))} | (dict(unlabelled=(x(100,s), np.full(100,-1))) if name=='stl10' else {})
        here = SETS[name]._replace(sources=[('stand-in', lambda f,p,v=splits: v)], n_bytes=1, sums={}); monkeypatch.setitem(SETS, name, here)
        if name=='stl10': monkeypatch.setitem(SETS, 'stl10_unlabelled', here._replace(folder='stl10', splits=dict(train='unlabelled')))

def test_the_three_mixtures_on_stand_ins(home, monkeypatch):
    stand_in_arrays(monkeypatch, home); stand_ins(home)
    monkeypatch.setitem(sets.PLACED, 'places365', (lambda f,s,p: ([str(q) for q in sorted((f/'data_256_standard').rglob('*.jpg'))], [0]*300, ('attic',), str(f)), ''))
    one, two, three = (load(f'mix:{m}', image=s, progress=False) for m,s in zip(sets.MIXES, (32,24,24)))
    assert one.images.resident and (one.images.names, one.images.sizes)==(['cifar10','cifar100','stl10_unlabelled'], [50,50,100]) and one.images.weights==[.25,.25,.5]
    assert one.classes[0]=='cifar10/airplane' and one.classes[10]=='cifar100/apple' and len(one.classes)==120 and one.labels[50:52].tolist()==[10,11] and (one.labels[100:]==-1).all()
    assert not two.images.resident and (two.images.names, two.images.sizes)==(['imagenet100','stl10_unlabelled'], [100,100]) and two.images[[0,150]].shape==(2,3,24,24)
    assert three.images.sizes==[101,30,300] and np.allclose(three.images.weights, np.sqrt([101,30,300])/np.sqrt([101,30,300]).sum()) and three.labels[101]==-1 and three.classes[-1]=='places365/attic'
    assert len(load('mix:cifar+stl10', 'test', image=32, progress=False))==30
    for m in (one, two, three):
        x = m.images; order = x.order(3, 0); assert order.shape==(len(x),) and x.part_of(order).bincount(minlength=len(x.names)).tolist()==x.quota() and x.open(int(order[0])).mode=='RGB'
        assert torch.equal(pickle.loads(pickle.dumps(x)).order(3, 0), order)

def test_epochs_of_a_mixture(home):
    def part(name, n): return sets.ImageSet(name, 'train', torch.zeros(n,3,2,2, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ('a',), '')
    for sizes,weights in (([97,13],[1,1]), ([50,20,7],[.2,.7,.1]), ([40,40],None), ([5,100],[1,0.01]), ([1,9],[.999,.001])):
        m = sets.Mix([part(str(i), n) for i,n in enumerate(sizes)], weights); N, k = len(m), m.quota()
        assert sum(k)==N and all(abs(q-N*w)<1 for q,w in zip(k, m.weights)) and abs(sum(m.weights)-1)<1e-12
        drawn = torch.stack([m.order(7, e) for e in range(12)])
        for p,n in enumerate(sizes):
            mine = drawn.flatten()[m.part_of(drawn.flatten())==p]; assert len(mine)==12*k[p]
            for r in mine[:len(mine)//n*n].view(-1, n): assert r.unique().numel()==n                           # nobody twice before everybody once, over epochs
        if k[0]*k[1]>9: assert not all(torch.equal(m.part_of(d), m.part_of(drawn[0])) for d in drawn[1:3])               # the parts take turns in another order every epoch
        assert (m.part_of(drawn).sum(1)==m.part_of(drawn[0]).sum()).all() and torch.equal(m.order(7, 11), drawn[11])
        assert sizes==[1,9] or not torch.equal(m.order(8, 0), drawn[0])
    code = ("import torch; from hjepa.data import sets; import hashlib\nz = lambda n: sets.ImageSet(str(n), 'train', torch.zeros(n,3,2,2, dtype=torch.uint8), torch.zeros(n), ('a',), '')\n"
            "torch.manual_seed({0}); torch.set_num_threads({0}); print(hashlib.sha256(sets.Mix([z(50), z(20)], [1,2]).order(5, 3).numpy().tobytes()).hexdigest())")
    out = {subprocess.run([sys.executable, '-c', code.format(k)], capture_output=True, text=True, check=True).stdout.strip() for k in (1,2)}
    assert out=={hashlib.sha256(sets.Mix([part('50', 50), part('20', 20)], [1,2]).order(5, 3).numpy().tobytes()).hexdigest()}

def test_weights_of_a_mixture():
    for text,want in (('a,b', [.75,.25]), ('a,b@proportional', [.75,.25]), ('a,b@balanced', [.5,.5]), ('a,b@T=0', [.5,.5]), ('a,b@T=1', [.75,.25]), ('a=1,b=3', [.25,.75]), ('a=0.5,b=.5', [.5,.5]), ('a=1e-1,b=1', [1/11,10/11])):
        names, weigh = sets.mixture(text); w = np.array(weigh([300,100])); assert names==['a','b'] and np.allclose(w/w.sum(), want), text
    names, weigh = sets.mixture('folder:/x/a=b/c,wds:/y/{a,b}-{0..3}.tar,torchvision:Food101=2'.replace('=2','')); assert names==['folder:/x/a=b/c', 'wds:/y/{a,b}-{0..3}.tar', 'torchvision:Food101']
    assert sets.mixture('folder:/x/y=2,scenes=1')[0]==['folder:/x/y','scenes'] and sets.mixture('folder:/x/me@home/y,scenes')[0][0]=='folder:/x/me@home/y'

# ---- shards and the hub, beside the libraries

def write_shards(home, x, y):
    for k in range(3):
        files = {}
        for i in range(10*k, min(10*k+10, len(x))): b = io.BytesIO(); Image.fromarray(x[i]).save(b, 'png'); files |= {f'{i:05}.png': b.getvalue(), f'{i:05}.cls': str(int(y[i])).encode(), f'{i:05}.txt': b'a caption'}
        tar_of(home/f'train-{k:06}.tar', files)

def test_shards_hold_what_webdataset_reads(home):
    wds = pytest.importorskip('webdataset')
    x,y = TINY['train'][0][:25], TINY['train'][1][:25]; write_shards(home, x, y)
    s = load(f'wds:{home}/train-{{000000..000002}}.tar', image=32, progress=False)
    theirs = list(wds.WebDataset(s.images.urls, shardshuffle=False).decode('rgb8').to_tuple('png', 'cls'))
    assert s.images.counts==[10,10,5] and len(theirs)==len(s)==25
    for i,(px,c) in enumerate(theirs): assert np.array_equal(s.images[i].permute(1,2,0).numpy(), px) and int(s.labels[i])==c
    sub = s.subset(s.labels==1); assert torch.equal(sub.images[:], s.images[(s.labels==1).nonzero()[:,0]]) and isinstance(pickle.loads(pickle.dumps(sub)).images, Folder)
    assert len(load(f'wds:{home}/train-*.tar', image=32, n=7, progress=False))==7

def test_the_hub_reads_a_folder(home):
    pytest.importorskip('datasets')
    for split,n in (('train',4),('test',2)):
        for c in ('cat','dog'):
            (home/'h'/split/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(TINY['train'][0][i+10*(c=='dog')]).save(home/'h'/split/c/f'{i}.png')
    s,t = (load(f'hf:{home}/h', k, image=32, progress=False) for k in ('train','test'))
    assert (len(s), len(t), s.classes, s.labels.tolist())==(8, 4, ('cat','dog'), [0]*4+[1]*4)
    assert np.array_equal(s.images[5].permute(1,2,0).numpy(), TINY['train'][0][11]) and torch.equal(pickle.loads(pickle.dumps(s)).images[5], s.images[5])

@pytest.mark.parametrize('there', ['train', 'test'])
def test_a_set_of_the_hub_with_one_split(home, there):
    "What is held out is not trained on."
    pytest.importorskip('datasets')
    for c in ('cat','dog'):
        (home/'h'/there/c).mkdir(parents=True)
        for i in range(20): Image.fromarray(TINY['train'][0][(i+20*(c=='dog'))%len(TINY['train'][0])]+np.uint8(i)).save(home/'h'/there/c/f'{i}.png')
    get = lambda k: load(f'hf:{home}/h', k, image=32, progress=False)
    if there=='test':
        for k in ('train','test'):
            with pytest.raises(DataError, match='no train'): get(k)
        return
    a,b = get('train'), get('test'); seen = {a.images[i].numpy().tobytes() for i in range(len(a))}
    assert (len(a), len(b))==(36, 4) and not any(b.images[i].numpy().tobytes() in seen for i in range(len(b)))

def test_the_hub_without_its_package(home, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(DataError, match='pip install datasets'): load('hf:uoft-cs/cifar10')

# ---- labels never reach pre-training

class Forbidden:
    "Labels that nobody may look at, not even count"
    def __getattribute__(self, k): raise AssertionError(f'training looked at the labels: {k}')
for k in ('len','getitem','iter','bool','eq','lt','index','int','array','contains','add','radd'): setattr(Forbidden, f'__{k}__', lambda *a, k=k: (_ for _ in ()).throw(AssertionError(f'training looked at the labels: {k}')))

class Watched(torch.Tensor):
    "Labels that only the monitor may look at"
    seen = 0
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        f, who = sys._getframe(1), set()
        while f: who.add(f.f_code.co_filename.rpartition('/')[2] if f.f_code.co_name!='make_monitor' else 'make_monitor'); f = f.f_back
        assert who & {'make_monitor','monitor.py'}, f'{func} on the labels, outside the monitor'
        Watched.seen += 1; return super().__torch_function__(func, types, args, kwargs or {})

def test_labels_never_reach_pretraining(tmp_path):
    from tiny import tiny as small, images, weights, same, losses
    from hjepa.train import fit
    x = images(32); run = lambda name, labels, **kw: fit(small(**kw), data=sets.ImageSet('x', 'train', x, labels, ('a','b'), ''), out=tmp_path/name)
    a = run('a', Forbidden())                                             # touched: it raises
    with pytest.raises(AssertionError, match='looked at the labels'): run('b', Forbidden(), train__monitor=2)     # the guard does guard
    c = run('c', torch.zeros(32, dtype=torch.int64)); d = run('d', torch.arange(32)%2, train__monitor=2)
    e = run('e', (torch.arange(32)%2).as_subclass(Watched), train__monitor=2); assert Watched.seen
    for r in (c, d, e): assert same(weights(a.model), weights(r.model)) and losses(a)==losses(r)                  # not a bit different, whatever they are
    assert d.monitor and d.monitor[-1].keys()>=e.monitor[-1].keys()

def test_a_run_on_a_mixture_and_on_unlabelled_images(home, tmp_path):
    from tiny import tiny as small, images
    from hjepa.train import fit
    a = sets.ImageSet('a', 'train', images(32), torch.zeros(32, dtype=torch.int64), ('x',), ''); b = sets.ImageSet('b', 'train', images(16, seed=1), torch.full((16,), -1), (), '')
    m = sets.ImageSet('m', 'train', sets.Mix([a, b], [1,1]), torch.zeros(48, dtype=torch.int64), ('x',), '')
    r = fit(small(), data=m, out=tmp_path/'run'); assert r.finished and r.facts['images_seen']==48
