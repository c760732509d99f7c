"""The front page. nbs/index.ipynb is the source: this writes its table of notebooks and, from the whole, README.md.

nbdev has its own way (`nbdev_readme`), but it needs Quarto, and two ways would give two READMEs. So there is one, and
it needs nothing beyond Python and PyYAML:  python tools/readme.py  (part of `make export`; the gate checks the result)."""
import json, posixpath, re, statistics
from functools import partial
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
BEGIN, END = '<!-- notebooks: begin (written by `make export`) -->', '<!-- notebooks: end -->'
SPEEDS = '<!-- speeds: begin (written by `make export` from results/) -->', '<!-- speeds: end -->'
NOTE = '<!-- Made from nbs/index.ipynb by `make export`: change that notebook, not this file. -->\n'

def read_nb(p): return json.loads(Path(p).read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def name(p): return Path(p).relative_to(NBS).as_posix()

def notebooks():
    "All notebooks, by path below nbs/ (nbdev leaves out what begins with _ or a dot, and so do we)."
    return sorted(n for n in map(name, NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in n.split('/')))

def sidebar():
    "The sidebar in reading order: (section, path) pairs, '' for a page outside the sections."
    items = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    def walk(items, sec=''):
        for o in items:
            if isinstance(o, str): yield sec, o
            elif 'section' in o:
                if 'href' in o: yield o['section'], o['href']
                yield from walk(o.get('contents', []), o['section'])
            else: yield sec, o['href']
    return list(walk(items))

def title(path):
    "(title, description) from the first cell: `# Title` and `> description`."
    ls = source(read_nb(NBS/path)['cells'][0]).splitlines()
    get = lambda mark: next((o[len(mark):].strip() for o in ls if o.startswith(mark)), '')
    return get('# ') or path, get('> ')

def directives(cell):
    "{'export': '', 'eval:': 'false', ...} from the lines `#| ...` that open a code cell."
    res = {}
    for l in source(cell).splitlines():
        if l.strip() and not (m := re.match(r'\s*#\s*\|\s*(\S+)\s*(.*)', l)): break
        if l.strip(): res[m[1]] = m[2].strip()
    return res

def table():
    "Every notebook with its one-line description, in reading order."
    rows, last = ['| | notebook | what is in it |', '|-----|----------|------------------------------|'], ''
    for sec, p in sidebar():
        if p == 'index.ipynb' or not (NBS/p).exists(): continue
        t, d = (o.replace('|', '\\|') for o in title(p))
        rows.append(f'| {sec if sec != last else ""} | [{t}]({p}) | {d} |'); last = sec
    return '\n'.join(rows)

def span(r, lo=None, hi=None):
    "A ratio and its range."
    if isinstance(r, dict): r, lo, hi = r['ratio'], *r.get('ratio_range', (r.get('lo'), r.get('hi')))
    return f'{r:.{3 if r < round(r, 2) == round(r) else 2}f} ({lo:.2f} to {hi:.2f})'   # 1.996 is not 2

def latency(row):
    ours, theirs = row['sides'].values(); return f"{ours['ms']:.0f} ms, timm {theirs['ms']:.0f} ms"

def step(d, matched=False): # with the tokens of both sides where they are meant to be alike
    a, b = (d[k]['tokens'] for k in ('ours', 'peer'))
    return f"{span(d)}; batch {d['batch']}" + (f", {a['context']:.0f} and {b['context']:.0f} seen, {a['predicted']:.0f} and {b['predicted']:.0f} asked" if matched else '')
def price(d): r = d['axes']['levels']; return '{:+.0%} ({:+.0%} to {:+.0%})'.format(r['price'], *r['price_range'])
def attention(d): return ' and '.join(span(r['forward']) for r in (d['rows'][0], d['rows'][-1]))
def checkpointing(d):
    most = f", {d['on']['peak_bytes']/1e9:.1f} GB at most" if d['on']['peak_bytes'] else ''
    return f"{span(1/d['time'], *(1/t for t in d['time_range'][::-1]))}; kept for the way back {d['saved']:.2f}, peak {d['peak']:.2f}{most}"

def overtaking(d):
    "From the curves: minutes of MAE's recipe to ours' last accuracy, as a share of ours'."
    def course(arm, probe): runs = [r['rows'] for r in d['runs'] if r['arm'] == arm]; return [w['minutes'] for w in runs[0]], [statistics.mean(w[probe] for w in at) for at in zip(*runs)]
    def share(probe):
        (ours, goals), (t, acc) = course('hierarchy', probe), course('MAE', probe); goal = goals[-1]
        k = next((k for k, v in enumerate(acc) if v >= goal), None)
        if k is None: return 'never reached'
        return f"{(t[k-1] + (goal - acc[k-1]) / (acc[k] - acc[k-1]) * (t[k] - t[k-1]) if k else t[0]) / ours[-1]:.2f}"
    return f"linear {share('linear')}, k-NN {share('knn')}; {len({r['seed'] for r in d['runs']})} seeds"

STEP = {'vit_tiny': 'ViT-Ti/16', 'vit_small': 'ViT-S/16', 'vit_base': 'ViT-B/16'}
I, M, SEEN = "I-JEPA's code", "MAE's code", partial(step, matched=True)
PEERS = [ # who, aim and file on a CPU, how it is said; aim, file and run on a GPU
    (I, '≥ 3', '', step, '≥ 4', 'ijepa', ''), (f'{I}, about as many tokens as it asks', '', '_match', SEEN, '', 'ijepa', ' matched'),
    (f'{M}, its decoder as published', '≥ 2', '_mae', step, '≥ 2', 'mae', ''), (f'{M}, its decoder as large as our predictor', '≥ 2', '_mae_decoder', step, '≥ 2', 'mae_decoder', ''),
    (f'{M}, such a decoder, as many tokens as it decodes', '', '_mae_match', SEEN, '', 'mae_decoder', ' matched')]
ON_CPU = [ # what, aim, file, its figures in words
    *((f'step, {STEP[e]}, 224 px, beside {who}', aim, f'speed_step_cpu_{e}{f}.json', say) for e in ('vit_tiny', 'vit_small') for who, aim, f, say, *_ in PEERS),
    ("time to what ours has after three minutes of CIFAR-10: that of MAE's recipe, in our trainer, over ours", '≥ 2', 'curves_cifar10_cpu.json', overtaking),
    ("one image, all levels, ViT-Ti/16, 224 px, beside timm's plain forward", '< 20 ms', 'speed_latency_cpu.json', lambda d: latency(d['rows']['vit_tiny'])),
    ('a step of three levels beside one of one, ViT-Ti/16: what the hierarchy costs', '≤ +5 % time', 'speed_growth_cpu_levels.json', price),
    ('fused attention, forward, beside the formula, 64 and 4,096 tokens', '', 'speed_attention_cpu.json', attention),
    ('the default step, every switch there and off, beside the step from before there were switches (95 % intervals)', '1', 'switches_off_cpu.json', lambda d: '; '.join(f"{span(1/r['ratio'], 1/r['hi'], 1/r['lo'])} {k}" for k, r in d['rows'].items())),
    ("two views of CIFAR-10 from memory, beside torchvision's `DataLoader` and transforms", '', 'data_cifar10_cpu.json', span),
    ('two 224 px views of JPEGs of 500×375, beside the same', '', 'data_photos_cpu.json', lambda d: f"{span(d)}; {d['step']['share_waited']:.1%} of a ViT-S/16 step waits for data"),
    ('views on the device, beside kornia, least and most of four', '', 'views_kornia_cpu.json', lambda d: '{:.2f} to {:.2f}'.format(*(f(r['ratio'] for r in d['rows']) for f in (min, max)))),
    ("features of ViT-Ti/16 at 224 px, all levels, beside timm's own one vector", '≥ 1', 'eval_cpu.json', lambda d: '{} from timm\'s network, {} from ours'.format(*(span(d['features']['sides'][k]) for k in ('timm, by levels', 'ours, by levels')))),
    ('gradient checkpointing, ViT-Ti/16 at 224 px, beside the same step without', '≥ 0.80; kept ≤ 0.40', 'memory_cpu_vit_tiny.json', checkpointing),
    ('linear probe, strength searched, beside scikit-learn, made-up features 10,000 × 384', '≥ 1', 'eval_cpu.json', lambda d: f"{span(d['linear']['rows'][0])}; accuracy {d['linear']['rows'][0]['points']:+.2f} points")]
ON_GPU = [ # what, aim, files, run in such a file, its figures in words
    *((f'step, {STEP[e]}, 224 px, bf16, beside {who}', aim, f'speed_step_[!c]*_{peer}.json', f'{e}{run} compiled', say) for e in ('vit_small', 'vit_base') for who, _, _, say, aim, peer, run in PEERS),
    ('share of the rate of plain matrix products, ViT-B/16, bf16', '≥ 40 %', 'speed_step_[!c]*_base.json', 'vit_base compiled', lambda d: f"{d['ours']['share_of_product_rate']:.0%}"),
    ('from JPEGs of 500×375 to two views and through the step, ViT-S/16, images/s', '≥ 2,500', 'data_photos_[!c]*.json', None, lambda d: f"{d['step']['batch'] / d['step']['seconds_with_data']:,.0f}"),
    ('a step of three levels beside one of one, ViT-S/16: what the hierarchy costs', '≤ +5 % time', 'speed_growth_[!c]*.json', None, price),
    ('gradient checkpointing, ViT-B/16, batch 128, bf16, beside the same step without', '≥ 0.80; kept ≤ 0.40, < 16 GB at most', 'memory_[!c]*.json', None, checkpointing),
    ('fused attention, forward, beside the formula, 64 and 4,096 tokens', '', 'speed_attention_[!c]*.json', None, attention),
    ("one image, all levels, ViT-B/16, 224 px, beside timm's plain forward", '< 20 ms', 'speed_latency_[!c]*.json', None, lambda d: latency(d['rows']['vit_base'])),
    ("time to ours' last accuracy on CIFAR-10: that of MAE's recipe, in our trainer, over ours", '≥ 2', 'curves_[!c]*.json', None, overtaking)]

def speeds():
    "What was measured, from the files it was written to; `waiting` where there is none. A link names the commit and leads to the file."
    head, res = '| {} | aim | measured | commit, file |\n|------------|---|------|---|', ROOT/'results'
    def row(what, aim, file, part, say, where=''):
        d = json.loads(file.read_text(encoding='utf-8')); m = d.get('machine', d); d = d['runs'][part] if part else d
        said = '' if where or m['threads'] == 2 else ', one thread'
        return f"| {what} | {aim} | {say(d)}{where and ', ' + m['device']}{said} | [{m['commit'][:7]}](../results/{file.name}) |"
    rows = [head.format('on two CPU cores, fp32, two threads unless said: images a second, ours over theirs')]
    for what, aim, f, say in ON_CPU: rows.append(row(what, aim, res/f, None, say) if (res/f).exists() else f'| {what} | {aim} | waiting | |')
    rows += ['', head.format('on one GPU, ours compiled, theirs as it is: images a second, ours over theirs')]
    for what, aim, f, part, say in ON_GPU:
        runs = lambda p: json.loads(p.read_text(encoding='utf-8')).get('runs', {})
        files = [p for p in sorted(res.glob(f)) if not part or not {'skipped', 'failed'} & {*runs(p).get(part, ['skipped'])}]
        rows += [row(what, aim, p, part, say, 'on') for p in files] or [f'| {what} | {aim} | waiting | |']
    return '\n'.join(rows)

def fill_index():
    "Put the current tables between their marks; returns the notebook's text."
    txt = (NBS/'index.ipynb').read_text(encoding='utf-8'); nb = json.loads(txt)
    for c in nb['cells']:
        s = source(c)
        for (begin, end), made in (((BEGIN, END), table), (SPEEDS, speeds)):
            if begin not in s or end not in s: continue
            new = s[:s.index(begin)+len(begin)] + '\n' + made() + '\n' + s[s.index(end):]
            if new != s: c['source'], s = new.splitlines(True), new; txt = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    return txt

def relink(md):
    "Links of a page in nbs/ as seen from the root; text between code fences stays."
    fix = lambda m: m[1] + posixpath.normpath('nbs/' + m[2]) + m[3]
    parts = re.split(r'(?ms)(^```.*?^```$)', md)
    return ''.join(o if i % 2 else re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))', fix, o) for i, o in enumerate(parts))

def readme(index):
    "README.md from the text of the index: prose as it stands, shown code in fences, hidden cells left out."
    out = [NOTE]
    for c in json.loads(index)['cells']:
        d, s = directives(c), source(c).strip()
        if c['cell_type'] == 'markdown': out.append(relink(s) + '\n')
        elif c['cell_type'] == 'code' and not d.keys() & {'hide', 'export', 'exporti', 'default_exp'}:
            code = '\n'.join(l for l in s.splitlines() if not re.match(r'\s*#\s*\|', l)).strip()
            if code and d.get('echo:') != 'false': out.append(f'```python\n{code}\n```\n')
            for o in c.get('outputs', []):
                md, tx = (o.get('data', {}).get(k) for k in ('text/markdown', 'text/plain'))
                if md: out.append(relink(''.join(md)).strip() + '\n')
                elif tx or o.get('name') == 'stdout': out.append('```\n' + ''.join(tx or o['text']).rstrip() + '\n```\n')
    return '\n'.join(out)

def write():
    if not (NBS/'index.ipynb').exists(): return
    index = fill_index()
    (NBS/'index.ipynb').write_text(index, encoding='utf-8')
    (ROOT/'README.md').write_text(readme(index), encoding='utf-8')   # also makes it newer than the index: nbdev_docs lets it be

if __name__ == '__main__': write()
