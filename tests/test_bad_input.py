"Everything a user may hand over that is not what it should be: converted, or refused in one sentence, and nothing half-written left."
import errno, gzip, hashlib, http.server, io, json, os, re, shutil, struct, subprocess, sys, tarfile, threading, warnings, zlib
from functools import partial
from importlib.util import find_spec
import numpy as np, pytest, torch
from PIL import Image
from hjepa import files, sources
from hjepa.config import HJEPAError
from hjepa.files import DataError, checksum, download
from hjepa.images import BadImage, open_image
from hjepa.data import sets
from hjepa.data.sets import Named, SETS, load

def sentence(e, *needles): # one, of words, with a cure
    m = str(e.value if hasattr(e, 'value') else e)
    assert '\n' not in m and m[-1] in '.?' and len(m)<700, m
    assert not re.search(r'Traceback|Errno|download=True|object at 0x', m), m
    for n in needles: assert n in m, m
    return m

def halves(folder): # what would be half of something
    return [p.name for p in folder.rglob('*') if p.name.startswith('.part-') or p.suffix=='.part' or p.name=='.download']

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A data root of its own, and no way to a network"
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path/'root'))
    monkeypatch.setattr('socket.create_connection', lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENETUNREACH, 'no network')))
    return tmp_path

# ---- one file in a folder

y, x = np.mgrid[:48,:64]
PHOTO = np.stack([255*x/63, 255*y/47, 128+100*np.sin(x/9)], -1).astype(np.uint8)     # red grows to the right, green downwards
GREY = np.asarray(Image.fromarray(PHOTO).convert('L'))

def stored(im, fmt='png', **kw):
    b = io.BytesIO(); (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(b, fmt, **kw); return b.getvalue()

def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
def png(w, h, depth, kind, rows, crc=0): # by hand, for what Pillow does not write
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, kind, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+head[:-1]+bytes([head[-1]^crc])+chunk(b'IDAT', rows)+chunk(b'IEND', b'')

def rgb16(): return png(64, 48, 16, 2, zlib.compress(b''.join(b'\0'+r.astype('>u2').tobytes() for r in PHOTO.astype(np.uint16)*257)))
def exif(k): e = Image.Exif(); e[0x0112] = k; return e
TURNED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}   # how the camera held it; its inverse is in the file

def masked(im, hidden): # transparent on the left half, with garbage under it
    a = np.dstack([im, np.where(x<32, 0, 255)]).astype(np.uint8); a[:,:32,:-1] = hidden; return a

im, white = Image.fromarray(PHOTO), np.where(x[...,None]<32, 255, PHOTO)
pal = im.quantize(64); clear = pal.copy(); clear.paste(0, (0,0,32,48))
CONVERTED = { # name: (bytes, the picture one expects (H,W) or (H,W,3), mean difference allowed)
    'rgb.png': (stored(im), PHOTO, 0), 'grey.png': (stored(GREY), GREY, 0), 'grey16.png': (stored(GREY.astype(np.uint16)*257), GREY, 0),
    'rgb16.png': (rgb16(), PHOTO, 0), 'palette.png': (stored(pal), np.asarray(pal.convert('RGB')), 0),
    'clear-palette.png': (stored(clear, transparency=0), np.where(np.asarray(clear)[...,None]==0, 255, np.asarray(clear.convert('RGB'))), 0),
    'alpha.png': (stored(masked(PHOTO, 77)), white, 0), 'grey-alpha.png': (stored(masked(GREY[...,None], 9)), np.where(x<32, 255, GREY), 0),
    'alpha.webp': (stored(masked(PHOTO, 77), 'webp', lossless=True, exact=True), white, 0), 'bits.png': (stored(GREY>127), np.where(GREY>127, 255, 0), 0),
    'cmyk.jpg': (stored(im.convert('CMYK'), 'jpeg', quality=95), PHOTO, 3), 'grey.jpg': (stored(GREY, 'jpeg'), GREY, 3), 'rgb.jpg': (stored(im, 'jpeg'), PHOTO, 4),
    'progressive.jpg': (stored(im, 'jpeg', progressive=True), PHOTO, 4), 'cmyk.tif': (stored(im.convert('CMYK'), 'tiff'), PHOTO, 3),
    'ycc.tif': (stored(im.convert('YCbCr'), 'tiff'), PHOTO, 3), 'float.tif': (stored(GREY/np.float32(255), 'tiff'), GREY, 0),
    'int32.tif': (stored(GREY.astype(np.int32)*257, 'tiff'), GREY, 0), 'u16.tif': (stored(GREY.astype(np.uint16)*257, 'tiff'), GREY, 0),
    'deep.pgm': (b'P5 64 48 65535\n'+(GREY.astype('>u2')*257).tobytes(), GREY, 0), 'pages.tif': (stored(im, 'tiff', save_all=True, append_images=[Image.fromarray(GREY)]), PHOTO, 0),
    'moving.gif': (stored(Image.fromarray(GREY), 'gif', save_all=True, append_images=[Image.fromarray(255-GREY)]), GREY, 0),
    'moving.webp': (stored(im, 'webp', save_all=True, lossless=True, append_images=[Image.fromarray(255-PHOTO)]), PHOTO, 0),
    'moving.png': (stored(im, 'png', save_all=True, append_images=[Image.fromarray(255-PHOTO)]), PHOTO, 0), 'x.bmp': (stored(im, 'bmp'), PHOTO, 0),
    'really-a-png.jpg': (stored(im), PHOTO, 0), 'tail.jpg': (stored(im, 'jpeg')+b'garbage'*9, PHOTO, 4), 'ÜBER all 1.PNG': (stored(im), PHOTO, 0),
    'lab.tif': (stored(Image.new('LAB', (8,8), (128,128,128)), 'tiff'), np.full((8,8), 119), 1), 'one.png': (stored(PHOTO[:1,:1]), PHOTO[:1,:1], 0), 'thread.png': (stored(PHOTO[:1]), PHOTO[:1], 0),
    **{f'exif{k}.jpg': (stored(im.transpose({6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(k, t)), 'jpeg', exif=exif(k)), PHOTO, 4) for k,t in TURNED.items()}}

@pytest.mark.parametrize('name', CONVERTED)
def test_odd_but_good_files_are_converted(home, name):
    data, want, off = CONVERTED[name]
    (home/'pics').mkdir(); (home/'pics'/name).write_bytes(data)
    s = load(f'folder:{home}/pics', image=24); got = s.images.open(0)
    want = np.broadcast_to(want[...,None] if want.ndim==2 else want, (*want.shape[:2], 3))
    assert got.mode=='RGB' and got.size==want.shape[1::-1] and np.abs(np.asarray(got).astype(int)-want).mean()<=off
    fitted = s.images[0]; assert fitted.shape==(3,24,24) and fitted.dtype==torch.uint8
    side = min(want.shape[:2]); middle = want[(want.shape[0]-side)//2:][:side, (want.shape[1]-side)//2:][:,:side]
    assert (fitted.double().mean((1,2))-torch.from_numpy(middle.mean((0,1)))).abs().max()<off+6
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert len(s.clean(progress=False))==1

jpg, whole_png = stored(im, 'jpeg', quality=95), stored(im)
BAD = { # name: (bytes, why)
    'empty.jpg': (b'', 'the file is empty'), 'empty.png': (b'', 'the file is empty'), 'text.jpg': (b'hello', 'it is not an image'), 'page.jpg': (b'<!DOCTYPE html><html>404</html>', 'it is not an image'),
    'noise.png': (np.random.default_rng(0).bytes(4000), 'it is not an image'), 'zeros.jpg': (bytes(4000), 'it is not an image'), 'drawing.png': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'it is not an image'),
    'array.png': (b'\x93NUMPY'+bytes(200), 'it is not an image'), 'zip.png': (b'PK\3\4'+bytes(200), 'it is not an image'), 'half.jpg': (jpg[:len(jpg)//2], 'truncated'), 'end.jpg': (jpg[:-200], 'truncated'),
    'head.jpg': (jpg[:300], ''), 'first.jpg': (jpg[:2], 'it is not an image'), 'half.png': (whole_png[:len(whole_png)//2], ''), 'head.png': (whole_png[:33], ''), 'half.gif': (stored(im, 'gif')[:1500], ''),
    'half.webp': (stored(im, 'webp', lossless=True)[:400], ''), 'half.bmp': (stored(im, 'bmp')[:2000], 'truncated'), 'half.tif': (stored(im, 'tiff')[:150], ''), 'half.pgm': (b'P5 64 48 255\n'+bytes(99), ''),
    'crc.png': (png(64, 48, 8, 2, zlib.compress(bytes(193*48)), crc=1), ''), 'stream.png': (png(64, 48, 8, 2, b'not zlib at all'), ''), 'no-pixels.png': (png(64, 48, 8, 2, b''), ''),
    'bomb.png': (png(60000, 60000, 8, 2, zlib.compress(bytes(999))), '3,600 million pixels and at most 179 million are read'), 'nothing.png': (png(0, 0, 8, 2, zlib.compress(b'')), ''),
    'nan.tif': (stored(np.full((8,8), np.nan, np.float32), 'tiff'), 'numbers outside 0 to 1'), 'float255.tif': (stored(GREY.astype(np.float32), 'tiff'), 'numbers outside 0 to 1'),
    'minus.tif': (stored(np.full((8,8), -3, np.int32), 'tiff'), 'numbers outside 0 to 65535'), 'huge.tif': (stored(np.full((8,8), 70000, np.int32), 'tiff'), 'numbers outside 0 to 65535')}

@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_named_and_left_out(home, name):
    data, why = BAD[name]; d = home/'pics'; d.mkdir()
    for i in range(3): (d/f'good{i}.png').write_bytes(whole_png)
    (d/name).write_bytes(data)
    s = load(f'folder:{d}', image=24); bad = next(i for i,p in enumerate(s.images.items) if p.endswith(name))
    for use in (s.images.__getitem__, s.images.open, lambda i: s.images[[i]]):
        with pytest.raises(BadImage) as e: use(bad)
        assert e.value.path==str(d/name) and why in e.value.why and e.value.why; sentence(e, str(d/name), 'replace or remove it')
    with pytest.warns(UserWarning, match='cannot be read') as w: good = s.clean(progress=False)
    assert len(good)==2 and len(w)==1 and str(d/name) in str(w[0].message) and good.images[:].shape==(2,3,24,24)   # 3 good, a tenth held out

def test_a_file_that_vanishes_and_a_link_to_nowhere(home):
    d = home/'pics'; d.mkdir(); (d/'a.png').write_bytes(whole_png); (d/'b.png').symlink_to(d/'nowhere')
    assert load(f'folder:{d}', image=8).images.items==[str(d/'b.png')]        # listed; a.png is the held-out tenth
    s = sets.ImageSet('x', 'train', sets.Folder([str(d/'a.png'), str(d/'b.png')], 8), torch.zeros(2, dtype=torch.int64), ('a',), '')
    (d/'a.png').unlink()
    for i in (0, 1):
        with pytest.raises(BadImage) as e: s.images[i]
        sentence(e, 'No such file')
    with pytest.raises(DataError) as e: s.clean(progress=False)
    sentence(e, '2 of 2 images', 'more than 1 %', 'a.png', 'b.png')

@pytest.mark.parametrize('n,bad,stops', [(3,1,False), (60,1,False), (60,2,True), (250,2,False), (250,3,True)])
def test_one_percent(home, n, bad, stops):
    d = home/'pics'; d.mkdir(); paths = [str(d/f'{i}.png') for i in range(n)]
    for i,p in enumerate(paths): open(p, 'wb').write(b'' if i<bad else stored(PHOTO[:4,:4]))
    s = sets.ImageSet('x', 'train', sets.Folder(paths, 4), torch.zeros(n, dtype=torch.int64), ('a',), '')
    if stops:
        with pytest.raises(DataError) as e: s.clean(progress=False)
        sentence(e, f'{bad} of {n} images of x', '0.png (the file is empty)')
    else:
        with pytest.warns(UserWarning, match=f'{bad} of {n}'): assert len(s.clean(progress=False))==n-bad

# ---- folders

def pics(d, *paths):
    for p in paths: (d/p).parent.mkdir(parents=True, exist_ok=True); (d/p).write_bytes(whole_png)
FOLDERS = {
    'nowhere': (lambda d: None, ('There is no folder', 'check the path')),
    'a file': (lambda d: d.write_text('x'), ('There is no folder',)),
    'empty': (lambda d: d.mkdir(), ('has no images', 'cat/1.png')),
    'other files': (lambda d: [d.mkdir(), (d/'notes.txt').write_text('x')], ('has no images',)),
    'hidden': (lambda d: pics(d, '.cat/1.png'), ('has no images',)),
    'empty classes': (lambda d: [(d/'cat').mkdir(parents=True), (d/'dog').mkdir()], ('has no images',)),
    'a class with no images': (lambda d: [pics(d, 'cat/1.png'), (d/'dog').mkdir()], ('dog has no images (1 of 2 classes are empty)', 'fill it or remove it')),
    'a class with other files': (lambda d: [pics(d, 'cat/1.png'), (d/'dog').mkdir(), (d/'dog'/'1.txt').write_text('')], ('dog has no images',)),
    'val only': (lambda d: pics(d, 'val/cat/1.png', 'val/dog/1.png'), ('has val and no train', '/train')),
    'a class twice': (lambda d: [pics(d, 'cat/1.png'), (d/'dog').symlink_to(d/'cat')], ('are the same folder', 'remove one')),
    'copies of a Mac': (lambda d: pics(d, 'cat/._1.png', 'cat/.ipynb_checkpoints/1.png'), ('has no images',)),
    'empty train': (lambda d: [(d/'train').mkdir(parents=True), pics(d, 'val/cat/1.png')], ('train has no images',))}

@pytest.mark.parametrize('what', FOLDERS)
def test_bad_folders(home, what):
    make, needles = FOLDERS[what]; d = home/'pics'; make(d)
    with pytest.raises(DataError) as e: load(f'folder:{d}')
    sentence(e, *needles)

def test_what_is_no_program_is_not_run(home, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *a, **k: pytest.fail('Ghostscript was run'))
    for name,data in (('eps.jpg', stored(im, 'eps')), ('pdf.png', stored(im, 'pdf')), ('psd.jpg', b'8BPS'+bytes(99)), ('icns.png', stored(im, 'icns'))):
        (home/name).write_bytes(data)
        for use in (home/name, io.BytesIO(data)):
            with pytest.raises(BadImage) as e: open_image(use, name=name)
            assert e.value.why=='it is not an image'

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_not_waited_for(home):
    os.mkfifo(home/'x.jpg')
    for p in (home/'x.jpg', '/dev/zero'):
        with pytest.raises(BadImage) as e: open_image(str(p))
        sentence(e, 'it is not a plain file')

def test_large_images(home):
    (home/'a.png').write_bytes(png(12000, 8000, 8, 0, zlib.compress(bytes(12001*8000))))                    # 96 million pixels
    code = f"from hjepa.images import open_image; print(open_image({str(home/'a.png')!r}).size)"
    out = subprocess.run([sys.executable, '-W', 'default', '-c', code], capture_output=True, text=True)
    assert out.stdout=='(12000, 8000)\n' and 'Warning' not in out.stderr, out.stderr

def test_links_that_lead_back_up(home):
    d = home/'pics'; pics(d, *(f'{s}/{c}/{i}.png' for s in ('train','val') for c in ('cat','dog') for i in range(10))); one = {s: load(f'folder:{d}', s) for s in ('train','test')}
    for f,to in (('train/cat/back', 'train'), ('train/cat/up', '.'), ('train/dog/here', 'train/dog'), ('val/cat/top', '/'), ('train/loop', 'train'), ('val/cat/other', 'train/..')): (d/f).symlink_to(d/to if to!='/' else '/')
    for s,want in one.items():
        got = load(f'folder:{d}', s); assert got.images.items==want.images.items and torch.equal(got.labels, want.labels) and len(got)==20
    (d/'train/cat/more').symlink_to(home/'more'); pics(home/'more', '1.png', 'deep/2.png'); assert len(load(f'folder:{d}'))==22         # a link to more of a class is followed

def test_what_is_left_out_is_said_once(home):
    d = home/'pics'; pics(d, *(f'{c}/{i}.png' for c in ('cat','dog') for i in range(4)), 'cat/._1.png', 'dog/.ipynb_checkpoints/1.png', '.hidden/1.png')
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert len(load(f'folder:{d}'))+len(load(f'folder:{d}', 'test'))==8
    for f in ('cat/1.heic', 'dog/2.heic', 'dog/notes.txt'): (d/f).write_bytes(b'')
    pics(d, 'stray.png')
    with pytest.warns(UserWarning) as w: assert len(load(f'folder:{d}'))==6
    assert len(w)==1; sentence(w[0].message, str(d), '1 image beside the class folders, 2 .heic, 1 .txt')

def test_bad_splits(home):
    pics(home/'a', 'train/cat/1.png', 'train/dog/1.png', 'test/cat/1.png'); pics(home/'b', 'cat/1.png'); pics(home/'c', '1.png', '2.png')
    with pytest.raises(DataError) as e: load(f'folder:{home}/a', 'test')
    sentence(e, 'different class folders (dog', 'make them the same')
    with pytest.raises(DataError) as e: load(f'folder:{home}/b', 'test')
    sentence(e, 'too few images for a test split')
    with pytest.raises(DataError) as e: load(f'folder:{home}/c', 'val')
    sentence(e, "'train' or 'test'")
    assert load(f'folder:{home}/c').labels.tolist()==[-1]     # no classes, no labels

# ---- shards

def shard(path, members, end=True):
    with tarfile.open(path, 'w') as tar:
        for name,data in members: t = tarfile.TarInfo(name); t.size = len(data); tar.addfile(t, io.BytesIO(data))
        size = tar.offset
    if not end: os.truncate(path, size)
GOOD = [(f'{i:03}.{e}', d) for i in range(4) for e,d in (('png', stored(PHOTO[:8,:8])), ('cls', b'%d' % (i%2)))]
def gzipped(p): shard(p, GOOD); p.write_bytes(gzip.compress(p.read_bytes()))
SHARDS = {
    'cut in a file': (lambda p: [shard(p, GOOD), os.truncate(p, 1300)], ('t-0.tar', 'bring it again')),
    'cut in a header': (lambda p: [shard(p, GOOD), os.truncate(p, 1024+300)], ('t-0.tar', 'bring it again')),
    'cut between files': (lambda p: shard(p, GOOD, end=False), ('t-0.tar is cut short', 'bring it again')),
    'zero bytes': (lambda p: p.write_bytes(b''), ('t-0.tar', 'not a whole, uncompressed tar file')),
    'text': (lambda p: p.write_text('hello'*300), ('not a whole, uncompressed tar file',)),
    'gzipped': (gzipped, ('not a whole, uncompressed tar file',)),
    'nothing in it': (lambda p: shard(p, []), ('holds no images',)),
    'only text': (lambda p: shard(p, [('a.txt', b'x'), ('9.cls', b'1')]), ('holds no images',)),
    'label of letters': (lambda p: shard(p, GOOD+[('9.png', whole_png), ('9.cls', b'cat')]), ('a label that is no number (9.cls)',)),
    'label below': (lambda p: shard(p, GOOD+[('9.png', whole_png), ('9.cls', b'-7')]), ('has the label -7 (9.cls)', 'numbered from 0')),
    'label far above': (lambda p: shard(p, [('9.png', whole_png), ('9.cls', b'5000000')]), ('has the label 5000000 (9.cls)', '99,999')),
    'label beyond int64': (lambda p: shard(p, [('9.png', whole_png), ('9.cls', b'9'*30)]), ('has the label 999', '(9.cls)')),
    'missing': (lambda p: None, ('There is no shard', '2 of 2 are missing'))}

@pytest.mark.parametrize('what', SHARDS)
def test_bad_shards(home, what):
    make, needles = SHARDS[what]; make(home/'t-0.tar')
    if what!='missing': shard(home/'t-1.tar', GOOD)
    with pytest.raises(DataError) as e: load(f'wds:{home}/t-{{0..1}}.tar', image=8, progress=False)
    sentence(e, *needles); assert not halves(home)

def test_a_bad_image_in_a_shard_is_named(home):
    shard(home/'t.tar', GOOD+[('bad.png', b'no image')]); s = load(f'wds:{home}/t.tar', image=8, progress=False)
    with pytest.raises(BadImage) as e: s.images[4]
    sentence(e, 't.tar, number 4', 'it is not an image')
    with pytest.warns(UserWarning, match='t.tar, number 4'): assert len(s.clean(progress=False))==4

def test_a_shard_that_changes_is_counted_again(home):
    shard(home/'t.tar', GOOD); assert len(load(f'wds:{home}/t.tar', image=8, progress=False))==4
    kept = next((home/'root'/'shards').iterdir()); kept.write_bytes(kept.read_bytes()[:50]); assert len(load(f'wds:{home}/t.tar', image=8, progress=False))==4
    shard(home/'t.tar', GOOD[:4]); assert len(load(f'wds:{home}/t.tar', image=8, progress=False))==2

@pytest.mark.parametrize('name,needle', [('wds:https://host/a-{0..3}.tar', '?n='), ('wds:pipe:cat a.tar', '?n='), ('wds:/nowhere/*.tar', 'No file is called'), ('wds:', 'Unknown data set')])
def test_bad_patterns(home, name, needle):
    with pytest.raises(DataError) as e: load(name)
    sentence(e, needle)

def test_remote_shards_are_read_in_order_only(home):
    s = load('wds:https://host/a-{0..3}.tar?n=10,3', image=8); assert len(s)==33 and s.labels.unique().tolist()==[-1]
    for f in (lambda: s.images[0], lambda: s.images.open(5), lambda: sets.Mix([s, s])):
        with pytest.raises(DataError) as e: f()
        sentence(e, 'in order', 'to this machine')
    shard(home/'t.tar', GOOD); t = load(f'wds:{home}/t.tar?n=4', image=8)                                  # it is here, only counted by hand
    for f in (lambda: t.images[0], lambda: sets.Mix([t, t])):
        with pytest.raises(DataError) as e: f()
        sentence(e, 'in order', 'leave ?n= out')
    with pytest.raises(DataError) as e: load('wds:https://host/a.tar?n=10', 'test')
    sentence(e, '{split}')

# ---- names and mixtures

NAMES = {'CIFAR-10': "mean 'cifar10'", 'Fashion-MNIST': "mean 'fashion_mnist'", 'torchvision:flowers-102': "mean 'Flowers102'", 'torchvision:xyzxyz': 'on the page torchvision.datasets', 'cifar-10': 'cifar10', 'Cifar10': 'cifar10', 'stl': 'stl10', 'imagenet-100': 'imagenet100', 'scene': 'scenes', '': 'Choose from', 'folder:': 'folder:PATH', 'torchvision:CIFAR': 'CIFAR10',
         'torchvision:VisionDataset': 'put its files there', 'torchvision:Flowers102': '`hjepa data fetch torchvision:Flowers102`', 'torchvision:CIFAR100': '`hjepa data fetch torchvision:CIFAR100`', 'hf:no/such-set': 'no connection to huggingface.co' if find_spec('datasets') else 'pip install datasets',
         'stl10': 'stl10_binary', 'cifar100': 'cifar-100-python', 'imagenette': 'imagenette2-320', 'places365': 'data_256_standard', 'imagenet': 'image-net.org', 'coco': 'train2017', 'imagenet100': 'imagenet100.txt of the repository HobbitLong/CMC', 'imagenet100:/no/list': '/no/list'}

@pytest.mark.parametrize('name', NAMES)
def test_names_that_cannot_be_had(home, name):
    with pytest.raises(DataError) as e: load(name, progress=False)
    sentence(e, NAMES[name]); assert not halves(home)

MIXES = {'mix:scenes': 'fewer than two', 'mix:scenes,': 'empty name', 'mix:scenes,,cifar10': 'empty name', 'mix:scenes,scenes': 'twice', 'mix:scenes=1,cifar10': 'some sets and not others', 'mix:scenes=x,cifar10=1': 'no number',
         'mix:scenes=0,cifar10=1': 'not positive', 'mix:scenes=-1,cifar10=1': 'not positive', 'mix:scenes=nan,cifar10=1': 'not positive', 'mix:scenes=inf,cifar10=1': 'not positive', 'mix:scenes,cifar10@even': "unknown rule 'even'",
         'mix:scenes,cifar10@T=2': 'outside 0 to 1', 'mix:scenes,cifar10@T=hot': 'no number', 'mix:scenes=1,cifar10=1@balanced': 'weights and a rule', 'mix:mix:scenes,cifar10': 'a mixture in it', 'mix:scenes,cifar-10': "mean 'cifar10'", 'mix:': 'Unknown data set'}

@pytest.mark.parametrize('name', MIXES)
def test_mixtures_that_cannot_be_read(home, name):
    with pytest.raises(DataError) as e: load(name, image=32)
    sentence(e, MIXES[name])

def test_mixture_of_two_sizes(home):
    pics(home/'p', *(f'{i}.png' for i in range(9)))
    with pytest.raises(DataError) as e: load(f'mix:scenes,folder:{home}/p')
    sentence(e, '32, 224', 'image=')
    assert load(f'mix:scenes,folder:{home}/p', image=16).images[[0,20001]].shape==(2,3,16,16)

@pytest.mark.parametrize('kw', [dict(n=0), dict(n=-3), dict(image=0), dict(split='valid')])
def test_senseless_arguments(home, kw):
    with pytest.raises(DataError) as e: load('scenes', **kw)
    sentence(e)

# ---- sets with a name: bytes, labels, lists

rng = np.random.default_rng(0)
TINY = {s: (rng.integers(0, 256, (n,32,32,3), np.uint8), rng.integers(0, 3, n, np.uint8)) for s,n in (('train',40),('test',20))}
def named(monkeypatch, get, **kw): monkeypatch.setitem(SETS, 'tiny', Named([('there', get)], ('a','b','c'), 1e5, 'bring the files.')._replace(**kw))

@pytest.mark.parametrize('labels,needle', [([3]*40, 'labels from 3 to 3 and 3 classes'), ([0]*39+[200], '0 to 200'), ([-2]*40, 'from -2 to -2 and 3 classes: labels count the classes from 0'), ([0]*39, '40 train images and 39 labels')])
def test_labels_outside_range(home, monkeypatch, labels, needle):
    named(monkeypatch, lambda f,p: dict(train=(TINY['train'][0], np.array(labels)), test=TINY['test']))
    with pytest.raises((DataError, TypeError)) as e: load('tiny')
    sentence(e, needle)

@pytest.mark.parametrize('file,data', [('source.json', b'{'), ('source.json', b'[]'), ('source.json', b''), ('train-images.npy', b''), ('train-images.npy', b'x'*500), ('train-labels.npy', b'\x80\x04N.'), ('train-labels.npy', None)])
def test_damaged_cache_is_brought_again(home, monkeypatch, file, data):
    named(monkeypatch, lambda f,p: TINY); load('tiny'); f = home/'root'/'tiny'/'arrays'/file
    f.unlink() if data is None else f.write_bytes(data)
    assert torch.equal(load('tiny').labels, torch.from_numpy(TINY['train'][1].astype(np.int64))) and not halves(home)
    f.unlink() if data is None else f.write_bytes(data)
    named(monkeypatch, lambda f,p: (_ for _ in ()).throw(OSError('gone')))
    with pytest.raises(DataError) as e: load('tiny')
    sentence(e, 'No source has tiny (there: gone)', 'bring the files')

def test_wrong_sums_and_full_disks(home, monkeypatch):
    named(monkeypatch, lambda f,p: TINY, sums=dict(train=('0'*64, '0'*64)))
    with pytest.raises(DataError) as e: load('tiny')
    sentence(e, 'not the published bytes (train images, train labels differ)'); assert not (home/'root'/'tiny'/'arrays').exists()
    named(monkeypatch, lambda f,p: TINY, n_bytes=1e18)
    with pytest.raises(DataError) as e: load('tiny')
    sentence(e, 'MB free', 'HJEPA_DATA')
    named(monkeypatch, lambda f,p: TINY)
    for code,needle in ((errno.ENOSPC, 'no space left on the disk'), (errno.EDQUOT, 'no space left on the disk'), (errno.EIO, 'nput/output error')):
        with monkeypatch.context() as m:
            m.setattr(np, 'save', lambda *a: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
            with pytest.raises(DataError) as e: load('tiny')
        sentence(e, needle, 'make room', 'HJEPA_DATA'); assert not halves(home) and not (home/'root'/'tiny'/'arrays').exists()
    assert len(load('tiny'))==40

@pytest.mark.parametrize('code', [errno.EACCES, errno.EROFS])
def test_read_only_cache(home, monkeypatch, code):
    named(monkeypatch, lambda f,p: TINY); real = open
    def locked(f, *a, **k):
        if str(f).endswith('.lock'): raise OSError(code, os.strerror(code))
        return real(f, *a, **k)
    monkeypatch.setattr('builtins.open', locked); s = load('tiny', 'test')
    assert 'not cached' in s.source and 'read-only' in s.source and len(s)==20 and not (home/'root'/'tiny'/'arrays').exists()
    pics(home/'root'/'coco', 'train2017/1.jpg'); assert len(load('coco', image=8))==1     # and what is there can be read

def test_data_root_is_a_file(home, monkeypatch):
    named(monkeypatch, lambda f,p: TINY); (home/'root').write_text('x')
    for name in ('tiny', 'imagenette'):
        with pytest.raises(DataError) as e: load(name)
        sentence(e, 'root')

def test_sources_that_are_cut_or_forged(home):
    d = home/'root'/'fashion_mnist'; d.mkdir(parents=True)
    idx = lambda a: bytes([0,0,8,a.ndim])+np.array(a.shape, '>i4').tobytes()+a.tobytes()
    for f in ('train','t10k'): (d/f'{f}-images-idx3-ubyte.gz').write_bytes(gzip.compress(idx(GREY[None]))); (d/f'{f}-labels-idx1-ubyte').write_bytes(idx(GREY[0]))
    for cut,needle in ((lambda b: b[:-9], 'cut short'), (lambda b: b[:5], 'cut short'), (lambda b: b'text', 'not an idx file')):
        (d/'train-labels-idx1-ubyte').write_bytes(cut(idx(GREY[0])))
        with pytest.raises(DataError) as e: load('fashion_mnist', progress=False)
        sentence(e, needle)
    (d/'train-labels-idx1-ubyte').write_bytes(idx(GREY[0])); (d/'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(idx(GREY[None]))[:60])
    with pytest.raises(DataError) as e: load('fashion_mnist', progress=False)
    sentence(e, 'cut short or damaged')
    (home/'root'/'cifar-100-python').mkdir(); (home/'root'/'cifar-100-python'/'train').write_bytes(b'not a pickle')   # never opened: its MD5 is wrong
    with pytest.raises(DataError) as e: load('cifar100', progress=False)
    sentence(e, 'not found or corrupted', 'cifar-100-python')

LISTS = {'too few': ('c1\nc2\n', 'has 2 classes and ImageNet-100 has 100'), 'twice': ('c1\nc1\n', 'c1 twice'), 'empty': ('', 'has 0 classes'), 'comments': ('# none\n', 'has 0 classes'),
         'binary': (b'\xff\xfe\0', 'it is not text'), 'strangers': ('\n'.join(f'd{i}' for i in range(100)), 'no folder for 100 of 100 classes')}
@pytest.mark.parametrize('what', LISTS)
def test_class_lists(home, what):
    text, needle = LISTS[what]; pics(home/'root'/'imagenet', 'train/c1/1.jpg')
    f = home/'list.txt'; f.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as e: load(f'imagenet100:{f}')
    sentence(e, needle)

def test_forged_archives_of_imagenet_and_places(home):
    d = home/'root'/'imagenet'; d.mkdir(parents=True); shard(d/'ILSVRC2012_img_train.tar', [])
    with pytest.raises(DataError) as e: load('imagenet', progress=False)
    sentence(e, 'not the published files'); assert not (d/'train').exists() and not halves(home)
    (home/'root'/'places365'/'val_256').mkdir(parents=True)
    with pytest.raises(DataError) as e: load('places365', 'test', progress=False)
    sentence(e, 'filelist_places365-standard.tar')

# ---- downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    data, how, asked = b'', 'well', []
    def do_GET(self):
        start = int((self.headers['Range'] or 'bytes=0-')[6:-1]); self.asked.append(start); how = self.how
        if how in ('404', '503'): return self.send_error(int(how))
        if start>=len(self.data) and how!='no ranges': return self.send_error(416)
        if how=='no ranges': start = 0
        body = self.data[start:]
        self.send_response(206 if start else 200); self.send_header('Content-Length', str(10**15 if how=='huge' else len(body))); self.end_headers()
        if how=='breaks': body = body[:len(body)//2]
        try: self.wfile.write(body[:-1]+bytes([body[-1]^1]) if how=='lies' else body)
        except OSError: return
        if how=='resets': pass
    def log_message(self, *a): pass

@pytest.fixture
def web(tmp_path, monkeypatch):
    "The set 'web', which lies on a server; how it behaves is Server.how"
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path/'root')); monkeypatch.setenv('no_proxy', '127.0.0.1')
    b = io.BytesIO(); np.savez(b, **{f'{s}{k}': v for s,p in TINY.items() for k,v in zip('xy', p)}); Server.data, Server.asked, Server.how = b.getvalue(), [], 'well'
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start(); url = f'http://127.0.0.1:{server.server_port}/tiny.npz'
        def get(folder, progress):
            download(url, f := folder/'.download'/'tiny.npz', hashlib.md5(Server.data).hexdigest(), False)
            with np.load(f) as z: return {s: (z[s+'x'], z[s+'y']) for s in TINY}
        monkeypatch.setitem(SETS, 'web', Named([('the server', get)], ('a','b','c'), 1e5, 'go there yourself.')); yield tmp_path/'root'/'web'
        server.shutdown()

def refused(*needles):
    with pytest.raises(DataError) as e: load('web')
    return sentence(e, 'No source has web (the server: ', 'go there yourself', *needles)
def arrived(folder): assert len(load('web'))==40 and sorted(p.name for p in folder.iterdir())==['.lock', 'arrays']

def test_download_well(web): arrived(web); load('web', 'test'); assert Server.asked==[0]

def test_download_breaks_half_way_and_goes_on(web):
    Server.how = 'breaks'; refused('the connection ended', 'are kept: ask again'); assert [p.name for p in web.rglob('*.part')]==['tiny.npz.part'] and not (web/'arrays').exists()
    Server.how = 'well'; arrived(web); assert Server.asked==[0, len(Server.data)//2]

def test_download_from_a_server_that_cannot_go_on(web):
    Server.how = 'breaks'; refused(); Server.how = 'no ranges'; arrived(web)

def test_connection_reset(web, monkeypatch):
    class Torn(io.RawIOBase):
        status, headers, n = 200, {'Content-Length': str(len(Server.data))}, 0
        def read(self, k): self.n += 1; return Server.data[:700] if self.n==1 else (_ for _ in ()).throw(ConnectionResetError(104, 'Connection reset by peer'))
    with monkeypatch.context() as m: m.setattr(files, 'urlopen', lambda *a, **k: Torn()); refused('the connection broke', 'Connection reset', 'are kept')
    arrived(web); assert Server.asked==[700]

@pytest.mark.parametrize('how,needles', [('404', ['404']), ('503', ['503']), ('lies', ['tiny.npz is not the published file']), ('huge', ['MB free'])])
def test_servers_that_are_no_help(web, how, needles):
    Server.how = how; refused(*needles); assert not halves(web) or halves(web)==['.download']
    assert not list(web.rglob('*.part')) and not (web/'arrays').exists()
    Server.how = 'well'; arrived(web)

def test_too_much_was_there_already(web):
    p = web/'.download'/'tiny.npz.part'; p.parent.mkdir(parents=True); p.write_bytes(Server.data+b'more'); refused('not the published file'); arrived(web)
    shutil.rmtree(web); p.parent.mkdir(parents=True); p.write_bytes(Server.data); arrived(web)

def test_disk_fills_during_a_download(web, monkeypatch):
    real = open
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *a): self.f.close()
        def write(self, b): self.f.write(b[:500]); raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(files, 'open', lambda f, *a, **k: Full(real(f, *a, **k)) if str(f).endswith('.part') else real(f, *a, **k), raising=False); refused('filled up', 'make room')
    assert not list(web.rglob('*.part')); arrived(web)

def test_nobody_there(web, monkeypatch):
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9'); monkeypatch.delenv('no_proxy'); refused('no connection to 127.0.0.1')

def test_fetch_through_torchvision_is_whole_or_nothing(home, monkeypatch):
    import torchvision
    class Fetched:
        def __init__(self, root, train=True, download=False):
            f = root/'data.npz'
            if download and not f.exists(): f.write_bytes(b'half'); self.bring(f)
            if not f.exists(): raise RuntimeError('Dataset not found or corrupted. You can use download=True to download it')
            with np.load(f) as z: self.data, self.targets = z['x'], z['y'].tolist()
        def __len__(self): return len(self.data)
    monkeypatch.setattr(torchvision.datasets, 'Fetched', Fetched, raising=False)
    Fetched.bring = staticmethod(lambda f: (_ for _ in ()).throw(OSError('network is down')))
    with pytest.raises(DataError) as e: load('torchvision:Fetched', fetch=True)
    sentence(e, 'cannot bring Fetched', 'network is down'); assert not (home/'root'/'fetched').exists() and not halves(home)
    with pytest.raises(DataError) as e: load('torchvision:Fetched')
    sentence(e, '`hjepa data fetch torchvision:Fetched`')
    Fetched.bring = staticmethod(lambda f: np.savez(f, x=TINY['train'][0], y=TINY['train'][1]))
    assert len(load('torchvision:Fetched', fetch=True))==40 and len(load('torchvision:Fetched'))==40 and not halves(home)

# ---- archives and the door

@pytest.mark.parametrize('data', [b'', b'text', gzip.compress(b'x'*3000)[:20]], ids=['empty', 'text', 'cut'])
def test_archives_that_cannot_be_unpacked(home, data):
    (home/'a.tgz').write_bytes(data)
    with pytest.raises(DataError) as e: files.unpack(home/'a.tgz', home/'out')
    sentence(e, 'a.tgz cannot be unpacked'); assert not (home/'out').exists() and not halves(home)

def test_archive_that_wants_out(home):
    shard(home/'a.tar', [('../../evil.txt', b'x')])
    with pytest.raises(DataError) as e: files.unpack(home/'a.tar', home/'out')
    assert not (home/'out').exists() and not (home.parent/'evil.txt').exists() and not (home/'evil.txt').exists()

def test_the_command_line_says_it_in_a_sentence(home, capsys):
    from hjepa.cli import main
    d = home/'pics'; pics(d, *(f'{c}/{i}.png' for c in ('cat','dog') for i in range(30))); (d/'cat'/'0.png').write_bytes(b'')
    for words in (['data'], ['data', 'draw', 'scenes'], ['data', 'info'], ['data', 'show', 'cifar11'], ['data', 'fetch', 'torchvision:Flowers102'], ['data', 'info', f'folder:{home}/no'], ['data', 'a', 'b', 'c']):
        try: status = main(words)
        except SystemExit as e: status = e.code
        out, err = capsys.readouterr(); assert status==2 and 'Traceback' not in err and err.strip(), words
    assert main(['data', 'info', f'folder:{d}', '--json', str(home/'f.json')])==0
    out, err = capsys.readouterr(); f = json.loads((home/'f.json').read_text())
    assert '0.png (the file is empty)' in err and f['train']['images']+f['test']['images']==60 and f['train']['bytes']>0 and set(f['train']['per_class'])=={'cat','dog'}
    assert main(['data', 'show', f'folder:{d}', '--out', str(home/'new'/'grid.png')])==0 and Image.open(home/'new'/'grid.png').size[0]>300

def run(capsys, *words): # status, what was printed, what was said as an error
    from hjepa.cli import main
    status = main([str(w) for w in words]); out, err = capsys.readouterr(); assert 'Traceback' not in err
    return status, out, '\n'.join(l for l in err.splitlines() if '%|' not in l).strip()                        # without the bars

SMALL = 'encoder.patch=8 encoder.dim=16 encoder.depth=2 encoder.heads=2 predictor.dim=16 predictor.heads=2 whole.hidden=32 whole.dim=8 batch=4 steps=2 device=cpu precision=fp32 monitor=0'.split()

def test_data_command_where_something_is_missing(home, capsys):
    shard(home/'t.tar', GOOD); wds = f'wds:{home}/t.tar'
    status, out, err = run(capsys, 'data', wds, '--image', 8, '--json', home/'f.json')
    assert status==0 and 'train         4 images (3, 8, 8)' in out and 'test  none: ' in out and list(json.loads((home/'f.json').read_text()))==['train'] and not err
    status, out, err = run(capsys, 'data', wds, '--split', 'test'); assert status==2; sentence(err.strip(), '{split}')
    for name,n in ((f'wds:pipe:cat {home}/t.tar?n=4', 4), (f'wds:{home}/t.tar?n=3', 3)):                    # only in order: looked at where they begin
        pytest.importorskip('webdataset'); status, out, err = run(capsys, 'data', 'info', name, '--image', 8); assert status==0 and f'({n} images)' in out and not err
        assert run(capsys, 'data', 'show', name, '--image', 8, '--out', home/'far.png')[0]==0 and (home/'far.png').stat().st_size>1000
    pics(home/'p', *(f'{i}.png' for i in range(20))); status, out, err = run(capsys, 'data', f'mix:scenes,folder:{home}/p', '--image', 16); assert status==0 and 'shares scenes' in out
    for f,needle in (('x.txt', 'x.txt does not end like a picture'), ('noend', 'does not end'), ('p/1.png/x.png', 'cannot be written')):
        status, out, err = run(capsys, 'data', 'show', 'scenes', '--out', home/f); assert status==2; sentence(err.strip(), needle, '--out')
    status, out, err = run(capsys, 'data', 'fetch', 'scenes'); assert status==0 and 'kept under' not in out
    (home/'p'/'1.heic').write_bytes(b''); status, out, err = run(capsys, 'data', f'folder:{home}/p', '--image', 8); assert status==0 and err.count('1 .heic')==1

def test_class_names_that_the_font_lacks(home, capsys):
    pics(home/'p', *(f'{c}/{i}.png' for c in ('猫', '犬', 'Übung', 'cat') for i in range(4)))
    with warnings.catch_warnings(): warnings.filterwarnings('error', 'Glyph'); status, out, err = run(capsys, 'data', 'show', f'folder:{home}/p', '--image', 8, '--out', home/'p.png')
    assert status==0 and not err

def test_training_without_labels_or_test_images(home, capsys, monkeypatch):
    pytest.importorskip('webdataset'); monkeypatch.chdir(home); shard(home/'t.tar', GOOD); pics(home/'flat', *(f'{i}.png' for i in range(9)))
    for name,needles in ((f'wds:{home}/t.tar', ('needs test images', '{split}')), (f'folder:{home}/flat', ('needs labels', 'flat/train has images without'))):
        words = ['train', 'cifar10-cpu', f'data.name={name}', *SMALL, '--out', home/'run'/name[:3]]
        for more in ([], ['--fallback']):
            status, out, err = run(capsys, *words, *more); assert status==2 and not (home/'run').exists() and 'NOTE' not in out; sentence(err.strip(), *needles, '--no-report')
    for name in (f'wds:{home}/t.tar', f'folder:{home}/flat'):
        status, out, err = run(capsys, 'train', 'cifar10-cpu', f'data.name={name}', *SMALL, '--no-report', '--out', home/'run'/name[:3])
        assert status==0 and 'finished: 8 images' in out, err
