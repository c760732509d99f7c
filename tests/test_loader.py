"The loader: the same batches whoever makes them, from any step on; and what happens when files or workers fail."
import functools, io, json, os, signal, subprocess, sys, tarfile, time, warnings
from pathlib import Path
import pytest, torch
from PIL import Image
import hjepa.data.loader as hl
from hjepa.config import HJEPAError
from hjepa.files import DataError
from hjepa.images import BadImage, Folder
from hjepa.data import sets as sources
from hjepa.data.sets import ImageSet, Mix
from hjepa.data.loader import Loader, Stream, buffered
from tiny import ENV, losses, same, tiny, weights

N, B = 96, 16
Shards = functools.partial(sources.Shards, image=8)
pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create')       # more workers than cores
COUNTS = [17, 5, 30, 1, 22, 9, 12]                                  # 96 images in shards of unequal sizes
def colour(i): return i // 200, i % 200, 7
def number(x): return (x[:, 0, 0, 0].int()*200 + x[:, 1, 0, 0]).tolist()
def resident(): return torch.tensor([colour(i) for i in range(N)], dtype=torch.uint8)[:, :, None, None].expand(N, 3, 8, 8).contiguous()
def png(i): b = io.BytesIO(); Image.new('RGB', (12, 8), colour(i)).save(b, 'png'); return b.getvalue()

def mixed(x): # half from the first 24 images, half from the other 72
    part = lambda name, ids: ImageSet(name, 'train', x[ids] if isinstance(x, torch.Tensor) else x.subset(ids), torch.zeros(len(ids)), ('a',), '')
    return Mix([part('small', torch.arange(24)), part('large', torch.arange(24, N))], (.5, .5))

def write_shards(folder, files): # files: of each shard a list of (name, bytes)
    for s, members in enumerate(files):
        with tarfile.open(folder/f'{s}.tar', 'w') as tar:
            for name, data in members: t = tarfile.TarInfo(name); t.size = len(data); tar.addfile(t, io.BytesIO(data))
    return [str(folder/f'{s}.tar') for s in range(len(files))]

@pytest.fixture(scope='module')
def disk(tmp_path_factory): # the same images as files and in shards, with labels beside them
    d = tmp_path_factory.mktemp('disk'); (d/'files').mkdir()
    for i in range(N): (d/'files'/f'{i:03}.png').write_bytes(png(i))
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    write_shards(d, [[(f'{i:03}.{k}', v) for i in range(e - c, e) for k, v in (('cls', b'3'), ('png', png(i)))] for c, e in zip(COUNTS, ends)])
    return d

def sets(d):
    folder, shards = Folder(sorted((d/'files').iterdir()), 8), Shards([str(d/f'{s}.tar') for s in range(len(COUNTS))], COUNTS)
    return dict(resident=resident(), folder=folder, mix=mixed(resident()), lazymix=mixed(folder), shards=shards)
KINDS = ['resident', 'folder', 'mix', 'lazymix', 'shards']

def batches(images, start=0, stop=15, batch=B, **kw): return [number(x) for x in Loader(images, batch, seed=4, **kw).run(start, stop)]

# ---- which images

@pytest.mark.parametrize('kind', KINDS)
def test_batches_are_the_planned_ones_for_any_workers(disk, kind):
    x = sets(disk)[kind]; plan = [Loader(x, B, seed=4).indices(s).tolist() for s in range(15)]
    for w in (0, 1, 2, 3): assert batches(x, workers=w) == plan, w
    assert plan != [Loader(x, B, seed=5).indices(s).tolist() for s in range(15)]

@pytest.mark.parametrize('kind', ['resident', 'folder', 'shards'])
@pytest.mark.parametrize('batch', [1, 6, 16, 32])
def test_an_epoch_shows_every_image_once(disk, kind, batch):
    x = sets(disk)[kind]; steps = N // batch
    seen = [sum(batches(x, e*steps, (e + 1)*steps, batch=batch), []) for e in (0, 1)]
    assert all(sorted(s) == list(range(N)) for s in seen) and seen[0] != seen[1]

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('world', [2, 4, 16])
def test_processes_cut_each_batch(disk, kind, world):
    x = sets(disk)[kind]; whole = batches(x)
    parts = [batches(x, rank=r, world=world, workers=w) for r, w in zip(range(world), (0, 2, 1, *[0]*13))]
    assert [sum(p, []) for p in zip(*parts)] == whole

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('start', [1, 5, 6, 11])                     # within an epoch of 6 steps, at its end, in the next
def test_goes_on_at_any_step(disk, kind, start):
    x = sets(disk)[kind]; whole = batches(x)
    for w in (0, 2): assert batches(x, start, workers=w) == whole[start:]
    assert batches(x, start, start + 1, rank=1, world=2) == [whole[start][B//2:]]
    assert batches(x, start, start) == []

def test_left_over_images_change_from_epoch_to_epoch(disk):
    for x in (resident(), sets(disk)['shards']):
        missing = []
        for e in range(8):
            seen = sum(batches(x, 4*e, 4*e + 4, batch=20), [])
            assert len(set(seen)) == 80; missing.append(frozenset(range(N)) - frozenset(seen))
        assert len(set(missing)) > 4 and len(frozenset.union(*missing)) > 32

def test_global_randomness_is_left_alone(disk):
    before = torch.get_rng_state()
    for k in KINDS: batches(sets(disk)[k], stop=3, workers=2)
    assert torch.equal(before, torch.get_rng_state())

# ---- mixtures

@pytest.mark.parametrize('kind', ['mix', 'lazymix'])
def test_mix_keeps_its_shares(disk, kind):
    x = sets(disk)[kind]; l = Loader(x, B, seed=4)
    assert l.shares() == dict(small=0, large=0)
    drawn = sum((number(b) for b in l.run(0, 18)), [])
    assert l.shares() == dict(small=.5, large=.5) and sorted(i for i in drawn[:96] if i < 24) == sorted([*range(24)]*2) and len({i for i in drawn if i >= 24}) == 72
    half, again = Loader(x, B, seed=4, rank=1, world=2), Loader(x, B, seed=4)
    for _ in half.run(0, 8): pass
    for _ in again.run(7, 8): pass                                   # a restart counts what was drawn before it
    now = sum(i < 24 for i in drawn[:8*B]) / (8*B)
    for a in (half, again): assert a.shares() == dict(small=now, large=1 - now)

# ---- views made in the workers

def note(pics, step, rows): # numbers of the images, their sizes, the step and the rows
    return torch.tensor([p.getpixel((0, 0))[0]*200 + p.getpixel((0, 0))[1] for p in pics]), torch.tensor([p.size for p in pics]), torch.tensor(step), rows

@pytest.mark.parametrize('kind', KINDS)
def test_make_gets_the_open_images_step_and_rows(disk, kind):
    x = sets(disk)[kind]; whole = batches(x)
    size = (12, 8) if kind in ('folder', 'lazymix', 'shards') else (8, 8)      # the whole picture, before any cut
    for workers, rank, world in ((0, 0, 1), (2, 0, 1), (2, 1, 2)):
        b = B // world
        for s, (i, sizes, step, rows) in enumerate(Loader(x, B, seed=4, make=note, workers=workers, rank=rank, world=world).run(3, 9), 3):
            assert i.tolist() == whole[s][rank*b:][:b] and step == s and rows.tolist() == list(range(rank*b, rank*b + b))
            assert [tuple(z) for z in sizes.tolist()] == [size]*b

def test_make_may_return_one_tensor(disk):
    got, = Loader(sets(disk)['folder'], B, seed=4, make=functools.partial(lambda n, p, s, r: n + r, 100), workers=1).run(2, 3)
    assert got.tolist() == list(range(100, 100 + B))

def threads(pics, step, rows): return torch.tensor(torch.get_num_threads())
def test_a_worker_has_one_thread(disk):
    torch.set_num_threads(2)
    try: assert {int(x) for x in Loader(sets(disk)['folder'], B, workers=2, make=threads).run(0, 4)} == {1} and torch.get_num_threads() == 2
    finally: torch.set_num_threads(1)

# ---- streams

@pytest.mark.parametrize('counts', [[96], [95, 1], [50, 1, 1, 44], [6]*16, [1]*96, [3, 0, 90, 3]])
@pytest.mark.parametrize('batch', [1, 8, 12, 20])
def test_stream_plan_shows_every_image_once(counts, batch):
    for buffer in (1, 40, 8192):
        st = Stream(Shards(['']*len(counts), counts), batch, 3, buffer)
        for e in (0, 3):
            seen = torch.cat([st.indices(e*st.steps + i) for i in range(st.steps)])
            assert st.steps == 96 // batch and len(seen.unique()) == len(seen) == st.steps*batch and 0 <= seen.min() and seen.max() < 96

def test_stream_reads_a_lane_once(disk, monkeypatch):
    opened = []
    read = hl.samples
    monkeypatch.setattr(hl, 'samples', lambda url, n: opened.append((Path(url).name, tuple(n))) or read(url, n))
    x = Shards([str(disk/f'{s}.tar') for s in range(7)], COUNTS)
    l = Loader(x, 4, seed=4); assert (l.stream.groups, l.stream.turns) == (2, 3)
    once = sum((number(b) for b in l.run(0, 24)), [])
    whole = sum(len(n) for _, n in opened); assert whole == N                        # every image is taken out of its shard once
    opened.clear(); parts = {}
    for r in (0, 1):                                                                 # two processes, the steps of three workers in each
        for w in range(3):
            reading = hl.Reading(Loader(x, 4, seed=4, rank=r, world=2), range(w, 24, 3))
            for s in range(w, 24, 3): parts[s, r] = number(torch.stack(reading(s, {})))
    assert sum(len(n) for _, n in opened) == N and sum((parts[s, r] for s in range(24) for r in (0, 1)), []) == once
    assert len(opened) <= 7 + 6 - 1                                                  # a shard is opened again only where a cut falls into it

def test_stream_resumes_without_decoding_or_opening_what_is_done(disk, tmp_path, monkeypatch):
    x = sets(disk)['shards']; whole = batches(x, stop=6)
    st = Loader(x, B, seed=4, buffer=8).stream; late = {int(i) for s in (4, 5) for i in st.indices(s)}
    plan = [number(b) for b in Loader(x, B, seed=4, buffer=8).run(0, 6)]
    ends = torch.tensor(COUNTS).cumsum(0).tolist(); needed = [any(e - c <= i < e for i in late) for c, e in zip(COUNTS, ends)]
    assert not all(needed)
    links = [str(tmp_path/f'{s}.tar') if n else '/nowhere/missing.tar' for s, n in enumerate(needed)]
    for s, n in enumerate(needed):
        if n: os.symlink(disk/f'{s}.tar', links[s])
    decoded = []; f = hl.decoded
    monkeypatch.setattr(hl, 'decoded', lambda *a: decoded.append(a) or f(*a))
    assert [number(b) for b in Loader(Shards(links, COUNTS), B, seed=4, buffer=8).run(4, 6)] == plan[4:] and len(decoded) == 2*B
    assert sorted(sum(whole, [])) == sorted(sum(plan, []))                           # another buffer, another order, the same images

def test_a_buffer_never_holds_more_than_its_size():
    for n, size in ((200, 30), (30, 200), (50, 1), (1, 1)):
        o = buffered(n, size, 5).tolist(); held, read, most = set(), 0, 0
        for p in o:
            while p not in held: held.add(read); read += 1; most = max(most, len(held))
            held.remove(p)
        assert most <= size and sorted(o) == list(range(n))

def test_without_webdataset_a_sentence(disk, monkeypatch):
    monkeypatch.setattr(hl, 'find_spec', lambda name: None)
    with pytest.raises(HJEPAError, match='pip install webdataset'): Loader(sets(disk)['shards'], B)
    Loader(sets(disk)['folder'], B)

@pytest.mark.parametrize('workers', [0, 2])
def test_broken_shards(disk, tmp_path, workers):
    x = sets(disk)['shards']; run = lambda urls, counts=COUNTS: [*Loader(Shards(urls, counts), B, workers=workers).run(0, 6)]
    whole = Path(x.urls[2]).read_bytes()
    def refused(data, *needles, name='shard.tar'):
        p = tmp_path/name
        if data is not None: p.write_bytes(data)
        with pytest.raises(DataError) as e: run([*x.urls[:2], str(p), *x.urls[3:]])
        assert all(n in str(e.value) for n in (name, *needles)) and '\n' not in str(e.value) and 'Traceback' not in str(e.value), e.value
    refused(whole[:20000]); refused(whole[:20480], 'ends after', 'cut short'); refused(b''); refused(b'no tar'*1000); refused(None, name='missing.tar')
    with pytest.raises(DataError, match='should hold at least'): run(x.urls, [*COUNTS[:-1], 40])
    for far in ('pipe:exit 3', f'pipe:head -c 20000 {x.urls[2]}; exit 3', 'https://127.0.0.1:9/a.tar'):
        with pytest.raises(DataError, match='cannot be read') as e: run([*x.urls[:2], far, *x.urls[3:]])
        assert far in str(e.value) and not {*'[]{}'} & {*str(e.value)} and '((' not in str(e.value), e.value

def test_pipe_is_read_like_a_file(disk):
    x = sets(disk)['shards']; assert batches(Shards([f'pipe:cat {u}' for u in x.urls], COUNTS)) == batches(x) == batches(Shards([f'file:{u}' for u in x.urls], COUNTS))

# ---- images that cannot be read

@pytest.fixture
def damaged(tmp_path): # 400 images, as files and in shards; three cannot be read
    bad = {7: b'', 8: b'no image', 300: png(300)[:40]}
    for i in range(400): (tmp_path/f'{i:03}.png').write_bytes(bad.get(i, png(i)))
    urls = write_shards(tmp_path, [[(f'{i:03}.png', bad.get(i, png(i))) for i in range(s, 400, 5)] for s in range(5)])
    return Folder(sorted(tmp_path.glob('*.png')), 8), Shards(urls, [80]*5)

def warned(f):
    with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); out = f()
    return out, [str(x.message) for x in w]

@pytest.mark.parametrize('workers', [0, 2])
def test_bad_files_are_replaced_counted_and_named_once(damaged, workers):
    folder, shards = damaged; plan = [[{7: 9, 8: 9, 300: 301}.get(i, i) for i in Loader(folder, 20, seed=4).indices(s).tolist()] for s in range(45)]
    got, said = warned(lambda: batches(folder, 0, 45, batch=20, workers=workers))
    assert got == plan and len(said) == 1 and '3 of 900 images' in said[0] and all(n in said[0] for n in ('007.png (', '008.png (', '300.png ('))
    l = Loader(shards, 20, seed=4, workers=workers); got, said = warned(lambda: [number(x) for x in l.run(0, 20)])
    assert len(said) == 1 and '3 of 400' in said[0] and said[0].count('.png') == 3 and len(l.bad) == 3
    for s, b in enumerate(got): # the next readable one of the batch
        want = [{7: None, 8: None, 300: None}.get(i, i) for i in [i % 80*5 + i//80 for i in l.indices(s).tolist()]]
        assert b == [next(x for x in (want + want)[j:] if x is not None) for j in range(20)]

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('make', [None, note])
def test_more_than_one_percent_stops(damaged, workers, make):
    folder, shards = damaged
    few = Folder([*folder.items[:150], *folder.items[300:350]], 8)                                   # 3 of 200
    with warnings.catch_warnings(record=True) as said, pytest.raises(DataError, match='3 of 200 images cannot be read, more than 1 %') as e:
        warnings.simplefilter('always'); [*Loader(few, 20, workers=workers, make=make).run(0, 30)]
    assert not said and all(n in str(e.value) for n in ('007.png', '008.png', '300.png'))          # named once
    three = Shards([shards.urls[i] for i in (0, 2, 3)], [80]*3)                                     # 3 of 240
    with pytest.raises(DataError, match='3 of 240 images cannot be read, more than 1 %'): [*Loader(three, 20, workers=workers, make=make).run(0, 30)]

def test_one_bad_image_never_stops_and_all_bad_do(tmp_path, damaged):
    folder, _ = damaged
    _, said = warned(lambda: batches(Folder(folder.items[290:310], 8), 0, 4, batch=10)); assert len(said) == 1 and '300.png' in said[0]
    for i in range(20): (tmp_path/f'x{i}.png').write_bytes(b'x')
    with pytest.raises(DataError, match='100 images in a row'): batches(Folder(sorted(tmp_path.glob('x*.png')), 8), batch=10)
    with pytest.raises(DataError, match='None of the 10 images'): batches(Shards(write_shards(tmp_path, [[(f'{i}.png', b'x') for i in range(20)]]), [20]), batch=10)

def test_what_is_no_image_in_a_shard_is_passed_over_alike_in_order_and_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path/'root'))
    junk = {0: [('__meta__.json', b'{}')], 20: [('._020.png', b'Mac')], 40: [('README', b'words'), ('a/README', b'words')], 60: [('x.cls', b'1')], 70: [('y.json', b'{}'), ('y.cls', b'7')], 80: [('__x__/1.png', b'')]}
    files = [f for i in range(150) for f in junk.get(i, [])+[(f'{i:03}.PNG' if i % 2 else f'd.0/{i:03}.seg.png', b'' if i == 90 else png(i)), (f'{i:03}.cls' if i % 2 else f'd.0/{i:03}.cls', b'%d' % (i % 2))]]
    url, = write_shards(tmp_path, [files]); s = sources.load(f'wds:{url}', image=8, progress=False)
    assert s.images.counts == [150] and s.labels.tolist() == [0, 1]*75 and s.classes == ('0', '1')
    for i in (0, 39, 40, 59, 60, 61, 70, 80, 149): assert number(s.images[[i]]) == [i]
    got, said = warned(lambda: batches(s.images, 0, 15, batch=10)); again, _ = warned(lambda: batches(Shards([f'pipe:cat {url}'], [150]), 0, 15, batch=10))
    assert len(said) == 1 and 'd.0/090.seg.png (the file is empty)' in said[0] and got == again
    assert set(sum(got, [])) == set(range(150)) - {90}
    with pytest.warns(UserWarning, match='1 of 150 .* number 90 .the file is empty'): assert len(s.clean(progress=False)) == 149

# ---- workers that fail

class Faulty:
    def __init__(self, how): self.how = how
    def __len__(self): return N
    def __getitem__(self, i): return self.how() if i == 50 else torch.zeros(3, 8, 8, dtype=torch.uint8)

def broken(): raise KeyError('a\nb')
def honest(): raise HJEPAError('Too much rain: wait.')
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_an_error_in_a_worker_is_one_sentence(workers):
    with pytest.raises(HJEPAError) as e: [*Loader(Faulty(broken), B, workers=workers).run(0, 6)]
    step = next(s for s in range(6) if 50 in Loader(Faulty(broken), B).indices(s))
    assert str(e.value) == fr"Step {step} could not be loaded (KeyError: 'a\nb'): data.workers=0 shows where."
    assert bool(e.value.__cause__) == (workers == 0)
    with pytest.raises(HJEPAError) as e: [*Loader(Faulty(honest), B, workers=workers).run(0, 6)]
    assert str(e.value) == 'Too much rain: wait.'

def kill(): os.kill(os.getpid(), signal.SIGKILL)
def leave(): os._exit(3)
@pytest.mark.parametrize('how,words', [(kill, 'killed by signal: Killed'), (leave, 'exited unexpectedly')])
def test_a_worker_that_dies_is_one_sentence_between_two_batches(how, words):
    old, batches = signal.getsignal(signal.SIGCHLD), 0
    with pytest.raises(HJEPAError) as e:
        for _ in Loader(Faulty(how), B, workers=2).run(0, 60):
            batches += 1
            try: time.sleep(.3)                                       # the death comes here, in the middle of a step
            except BaseException as err: pytest.fail(f'the step was interrupted by {err}')
    assert words in str(e.value) and 'data.workers' in str(e.value) and '\n' not in str(e.value)
    new = signal.getsignal(signal.SIGCHLD); assert new is old or new.__module__.startswith('torch')

def who(pics, step, rows): return torch.tensor(os.getpid())
def test_workers_leave_stop_signals_to_the_main_process(disk):
    run = Loader(sets(disk)['folder'], B, workers=2, make=who).run(0, 30)
    pids = {int(next(run)) for _ in range(4)}; assert len(pids) == 2 and os.getpid() not in pids
    for p in pids: os.kill(p, signal.SIGINT); os.kill(p, signal.SIGTERM)
    assert {int(x) for x in run} == pids                              # the same two, over several epochs
    for p in pids:
        for _ in range(100):
            try: os.kill(p, 0); time.sleep(.05)
            except ProcessLookupError: break
        else: pytest.fail('a worker lives on')

SPAWN = '''
import sys, torch
from pathlib import Path
import hjepa.data.loader as hl
from hjepa.config import HJEPAError
from test_loader import B, Faulty, batches, kill, note, sets
if __name__ == '__main__':
    torch.multiprocessing.set_start_method('spawn')
    for k, x in sets(Path(sys.argv[1])).items():
        if k == 'lazymix': assert batches(x, 2, 9, workers=1) == batches(x, 2, 9)
    got = [n.tolist() for n, *_ in hl.Loader(x, B, seed=4, make=note, workers=1).run(2, 4)]
    assert got == batches(x, 2, 4)
    try: [*hl.Loader(Faulty(kill), B, workers=1).run(0, 6)]
    except HJEPAError as e: print(e)
    try: [*hl.Loader(x, B, make=lambda *a: 1, workers=1).run(0, 6)]
    except HJEPAError as e: print(e)
'''
def test_spawned_workers_do_the_same(disk, tmp_path):
    (tmp_path/'main.py').write_text(SPAWN)
    p = subprocess.run([sys.executable, str(tmp_path/'main.py'), str(disk)], env=ENV, capture_output=True, text=True, timeout=110)
    assert p.returncode == 0, p.stderr[-3000:]
    a, b = p.stdout.strip().splitlines()
    assert 'A data worker died' in a and 'cannot be sent to a worker' in b

def test_wrong_numbers_are_refused(disk):
    for x in sets(disk).values():
        with pytest.raises(HJEPAError, match='fewer than a batch'): Loader(x, 97)
        with pytest.raises(HJEPAError, match='does not divide over 3'): Loader(x, 16, world=3)

# ---- in use

def test_fit_on_shards_is_the_same_for_any_workers(disk, tmp_path, monkeypatch):
    from hjepa.train import fit                                       # not at the top: a spawned worker imports this file
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path))
    r = tiny(**{'data.name': f'wds:{disk}/{{0..6}}.tar', 'train.steps': 14})            # two shuffles
    a, b = (fit(r, out=tmp_path/str(w), **{'data.workers': w}) for w in (0, 2))
    assert losses(a) == losses(b) and same(weights(a.model), weights(b.model)) and a.facts['images_seen'] == 14*8

def test_help_of_bench_data_has_an_example_that_parses(capsys):
    from hjepa.cli import main, parser
    with pytest.raises(SystemExit): main(['bench', 'data', '--help'])
    args = parser().parse_args(capsys.readouterr().out.split('example: hjepa ')[1].split())
    assert (args.name, args.workers, args.json) == ('cifar10', [0, 1, 2], 'out.json')

@pytest.mark.parametrize('kind,ours', [('folder', ['bytes', 'workers']), ('wds', ['bytes', 'workers']), ('scenes', ['device', 'workers'])])
def test_bench_data(disk, tmp_path, monkeypatch, capsys, kind, ours):
    from hjepa.cli import main
    monkeypatch.setenv('HJEPA_DATA', str(tmp_path)); name = dict(folder=f'folder:{disk}', wds=f'wds:{disk}/{{0..6}}.tar', scenes='scenes')[kind]
    words = ['--image', 16, '--patch', 4, '--batch', 8, *([] if kind == 'wds' else ['--n', 40]), '--workers', 0, 1, '--steps', 1, '--rounds', 2, '--encoder', 'vit_tiny', '--device', 'cpu']
    assert main(['bench', 'data', name, *map(str, words), '--json', str(tmp_path/'b.json'), 'views.count=1']) == 0
    b = json.loads((tmp_path/'b.json').read_text())
    assert {s['back_end'] for s in b['sides'] if s['side'] == 'ours'} == set(ours) and b['images'] == (N if kind == 'wds' else 40)
    assert all(len(s['rounds']) == 2 and s['images_per_second'] > 0 for s in b['sides']) and b['best'][0][1] != 'bytes'
    by = {(s['side'], s['back_end'], s['workers']): s['rounds'] for s in b['sides']}
    q = [x / y for x, y in zip(*(by[tuple(k)] for k in b['best']))]; assert b['ratio'] == pytest.approx(sum(q) / 2)
    s = b['step']; assert 0 < s['share_waited'] < 1 and s['seconds_with_data'] > 0 and s['back_end'] == ours[-1 if kind != 'scenes' else 0]
    assert b['views'] == 1 and b['cores'] == os.cpu_count() and 'torchvision' in capsys.readouterr().out
    assert main(['bench', 'data', name, *map(str, words), 'views.kind=weak']) == 2
