"""The front page. nbs/index.ipynb is the source: this writes its table of notebooks and, from the whole, README.md.

nbdev has its own way (`nbdev_readme`), but it needs Quarto, and two ways would give two READMEs. So there is one, and
it needs nothing beyond Python and PyYAML:  python tools/readme.py  (part of `make export`; the gate checks the result)."""
import json, posixpath, re
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
BEGIN, END = '<!-- notebooks: begin (written by `make export`) -->', '<!-- notebooks: end -->'
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

def fill_index():
    "Put the current table between its two marks; returns the notebook's text."
    txt = (NBS/'index.ipynb').read_text(encoding='utf-8'); nb = json.loads(txt)
    for c in nb['cells']:
        s = source(c)
        if BEGIN in s and END in s:
            new = s[:s.index(BEGIN)+len(BEGIN)] + '\n' + table() + '\n' + s[s.index(END):]
            if new != s: c['source'] = new.splitlines(True); txt = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
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
