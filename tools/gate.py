"""The gates of the workbook. Each failure is one sentence: cause and cure.

    python tools/gate.py export    notebooks -> hjepa/, cleaned notebooks, README.md   (make export)
    python tools/gate.py drift     does that change anything? Puts every file back as it was
    python tools/gate.py checks    sidebar, sizes, saved errors, imports downhill, line budget, paths
    python tools/gate.py skipped   how many notebook cells the flags leave out

`drift` compares bytes before and after, so it works with uncommitted changes; with CI=true git must be clean as well."""
import argparse, ast, base64, io, json, os, re, subprocess, sys
from collections import Counter
from pathlib import Path
from PIL import Image
sys.path.insert(0, str(Path(__file__).resolve().parent))
import readme as R
from readme import ROOT, NBS, read_nb, source, directives

PKG = ROOT/'hjepa'
MAX_CELLS, MAX_NB_KB, MAX_ALL_KB, MAX_LINES = 60, 200, 4096, 1500
BUDGET = ('parts/', 'losses/', '34_', '40_', '41_', '61_')   # floors 2-4 and hjepa.train
EXPORTS = {'export', 'exports', 'exporti'}

# ---- export and drift
def made():
    "Every file that `export` may write, with its bytes."
    ps = [*PKG.rglob('*.py'), *(NBS/n for n in R.notebooks()), ROOT/'README.md', NBS/'nbdev.yml']
    return {p: p.read_bytes() for p in ps if p.exists()}

def restore(before):
    for p in made().keys() - before.keys(): p.unlink()
    for p, b in before.items():
        if not p.exists() or p.read_bytes() != b: p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(b)

def few_colors(png):
    "A saved figure (base64) in a palette of 256 colours, on white: a third of the bytes, and no eye sees it. One that has a palette is left as it is."
    im = Image.open(io.BytesIO(base64.b64decode(png)))
    if im.mode == 'P': return png
    white = Image.new('RGBA', im.size, 'white'); white.alpha_composite(im.convert('RGBA')); out = io.BytesIO()
    white.convert('RGB').quantize(256, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True, dpi=im.info.get('dpi'))
    return base64.b64encode(out.getvalue()).decode()

def still(nb):
    "A notebook without the state of its widgets and progress bars, which do nothing without a kernel and are large; its figures small."
    nb['metadata'].pop('widgets', None)
    alive = lambda o: any(k.startswith('application/vnd.jupyter.widget') for k in o.get('data', {}))
    for c in code_cells(nb):
        c['outputs'] = [o for o in c['outputs'] if not alive(o)]
        for o in c['outputs']:
            if png := o.get('data', {}).get('image/png'): o['data']['image/png'] = few_colors(png)
    return nb

def slim():
    for p in (NBS/n for n in R.notebooks()):
        b = p.read_bytes()
        if b'vnd.jupyter.widget' in b or b'"image/png"' in b:
            new = json.dumps(still(json.loads(b)), sort_keys=True, indent=1, ensure_ascii=False) + '\n'
            if new.encode() != b: p.write_text(new, encoding='utf-8')

def export():
    "From nothing: modules without a notebook disappear. If anything fails, every file is put back."
    if bad := load()[1]: raise RuntimeError(' '.join(bad))
    before = made()
    try:
        for p in PKG.rglob('*.py'): p.unlink()
        code = ('from nbdev.doclinks import nbdev_export as e; from nbdev.clean import nbdev_clean as c\n'
                'from nbdev.quarto import refresh_quarto_yml as r; e.__wrapped__(); c.__wrapped__(); r()')
        r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
        if r.returncode or 'Failed to clean' in r.stderr:
            raise RuntimeError(f'nbdev could not export; everything is as it was. Mend what it names:\n{r.stderr[-1500:]}')
        slim(); R.write()
    except BaseException: restore(before); raise

def drift():
    before = made()
    try: export()
    except RuntimeError as e: yield str(e); return
    after = made(); restore(before)
    rel = lambda p: p.relative_to(ROOT).as_posix()
    for p in sorted(before.keys() | after.keys()):
        if before.get(p) == after.get(p): continue
        if p not in after: yield f'{rel(p)} has no notebook behind it: write it as a notebook or delete it (`make export` deletes it).'
        elif p not in before: yield f'{rel(p)} is missing though a notebook makes it: run `make export`.'
        elif p.suffix == '.py': yield (f'{rel(p)} is not what its notebook exports: run `make export` if the notebook was changed; '
                                       'if the .py was changed by hand, move the change into the notebook first.')
        elif p.suffix == '.ipynb': yield (f'{rel(p)} is not clean (run numbers, extra metadata, or an old table of notebooks): '
                                          'close it in Jupyter and run `make export`.')
        else: yield f'{rel(p)} is older than what it is made from (nbs/index.ipynb, settings.ini): run `make export`.'
    if os.environ.get('CI', '').lower() in ('true', '1'):
        st = git('status', '--porcelain', '--', 'hjepa', 'nbs', 'README.md')
        if st: yield f'git sees changes in a tree that should be clean ({"; ".join(st.split(chr(10))[:5])}): commit what `make export` wrote.'

def git(*args):
    "Output of git, or None where this is no checkout."
    try: return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return None

# ---- checks on the notebooks as they lie there
def code_cells(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']
def number(n): m = re.match(r'(\d+)_', Path(n).name); return int(m[1]) if m else None

def module(nb):
    "'hjepa.data.sets' for a notebook with `#| default_exp data.sets`, else None."
    for c in code_cells(nb):
        if e := directives(c).get('default_exp'): return f'hjepa.{e}'

def imported(c):
    "What a code cell imports, as (dotted name, is surely a module): `from a import b` gives a, and a.b, which may be a name."
    src = '\n'.join('' if re.match(r'\s*[%!]', l) else l for l in source(c).splitlines())
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, ast.Import): yield from ((a.name, True) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, True; yield from ((f'{node.module}.{a.name}', False) for a in node.names)

def check_sidebar(nbs):
    listed = Counter(p for _, p in R.sidebar())
    for n in nbs:
        if listed[n] != 1: yield f'nbs/{n} stands {listed[n]} times in nbs/sidebar.yml: list it exactly once, in reading order.'
    for p in listed:
        if p not in nbs: yield f'nbs/sidebar.yml lists {p}, which does not exist: add the notebook or take the line out.'

def check_names(nbs):
    seen = {}
    for n, nb in nbs.items():
        k, m = number(n), module(nb)
        if n == 'index.ipynb': continue
        if k is None: yield f'nbs/{n} has no number: name it NN_name.ipynb with the number of its floor.'; continue
        if k in seen: yield f'nbs/{n} and nbs/{seen[k]} have the same number: give one of them a free number of its floor.'
        seen[k] = n
        want = 'hjepa.' + re.sub(r'(^|/)\d+_', r'\1', n[:-6]).replace('/', '.')
        if m and m != want: yield f'nbs/{n} exports to {m}: its place makes it {want}; change default_exp or move the notebook.'

def check_cells(nbs):
    total = 0
    for n, nb in nbs.items():
        k, cs = len(nb['cells']), code_cells(nb)
        if k > MAX_CELLS: yield f'nbs/{n} has {k} cells (at most {MAX_CELLS}): split it, one idea a notebook.'
        kb = len(json.dumps([c.get('outputs') for c in cs] + [nb.get('metadata')], ensure_ascii=False).encode())/1024; total += kb
        if kb > MAX_NB_KB: yield f'nbs/{n} holds {kb:.0f} kB of saved outputs (at most {MAX_NB_KB}): lower the dpi of its figures or print less.'
        for i, c in enumerate(nb['cells']):
            if any(o['output_type'] == 'error' for o in c.get('outputs', [])):
                yield f'nbs/{n}, cell {i}, was saved with an error: mend the cell, run it again and save.'
    if total > MAX_ALL_KB: yield f'All notebooks together hold {total:.0f} kB of saved outputs (at most {MAX_ALL_KB}): shrink the largest ones.'

TABLE = re.compile(r'(?m)^[ \t]*\|?[ \t]*:?-+:?[ \t]*\|[-:| \t]*$')   # the line below the head of a markdown table

def shows(nb):
    "Is there a figure or a table among the cells that the site shows?"
    for c in nb['cells']:
        if c['cell_type'] == 'markdown' and TABLE.search(source(c)): return True
        if c['cell_type'] != 'code' or 'hide' in directives(c): continue
        for d in (o.get('data', {}) for o in c.get('outputs', [])):
            text = lambda kind: ''.join(d.get(kind, ''))
            if any(k.startswith('image/') for k in d) or re.search('<(table|svg|img)', text('text/html')) or TABLE.search(text('text/markdown')): return True
    return False

def check_pages(nbs):
    "What a reader needs to find the way: a title, one line that says what it is, something to look at, and links that lead somewhere."
    for n, nb in nbs.items():
        if not re.fullmatch(r'# [^\n]+\n\n> [^\n]+', source(nb['cells'][0]).strip()): yield f'nbs/{n} does not begin with a cell of `# Title`, an empty line and `> one line`: that line is its entry in the table of notebooks.'
        if not shows(nb): yield f'nbs/{n} has no figure and no table: put one that shows its idea among its first cells.'
        found = set()
        for i, c in enumerate(nb['cells']):
            for to in re.findall(r'\]\(([^)\s#:]+\.ipynb)', source(c)) if c['cell_type'] == 'markdown' else ():
                found.add(page := os.path.normpath(Path(n).parent/to).replace(os.sep, '/'))
                if page not in nbs: yield f'nbs/{n}, cell {i}, links to {to}, which does not exist: correct the link.'
        if not found - {n}: yield f'nbs/{n} links to no other notebook: name the one before it and the one after it.'

def check_imports(nbs):
    num = {m: number(n) for n, nb in nbs.items() if (m := module(nb))}
    for n, nb in nbs.items():
        me = number(n)
        if me is None: continue
        for i, c in enumerate(nb['cells']):
            if c['cell_type'] != 'code': continue
            try: mods = sorted(set(imported(c)))
            except SyntaxError as e: yield f'nbs/{n}, cell {i}, is not Python ({e.msg}): mend it.'; continue
            for m, sure in mods:
                if (num.get(m) or 0) > me:
                    yield f'nbs/{n}, cell {i}, imports {m} (number {num[m]}): imports run downhill only; move the code to a lower number.'
                if sure and m.startswith('hjepa.') and m not in num and not any(k.startswith(m + '.') for k in num):
                    yield f'nbs/{n}, cell {i}, imports {m}, which no notebook exports: correct the name or add the notebook.'

def check_import_cells(nbs):
    "Where a notebook exports, building the site runs every cell that contains an import, and of the other cells none."
    for n, nb in nbs.items():
        if not any(directives(c).keys() & EXPORTS for c in code_cells(nb)): continue
        for i, c in enumerate(nb['cells']):
            d = directives(c) if c['cell_type'] == 'code' else {}
            if c['cell_type'] != 'code' or d.keys() & EXPORTS or d.get('eval:') == 'false' or 'nbdev_export(' in source(c): continue
            try: body = ast.parse('\n'.join('' if re.match(r'\s*[%!]', l) else l for l in source(c).splitlines()))
            except SyntaxError: continue
            imps = (ast.Import, ast.ImportFrom)
            if any(isinstance(o, imps) for o in ast.walk(body)) and not all(isinstance(o, imps) for o in body.body):
                yield f'nbs/{n}, cell {i}, mixes imports with other code, which would run without the cells before it when the site is built: give the imports a cell of their own.'

def exported_lines(nb):
    "Lines of exported cells, without blank lines and directives."
    return sum(bool(l.strip()) and not re.match(r'\s*#\s*\|', l)
               for c in code_cells(nb) if directives(c).keys() & EXPORTS for l in source(c).splitlines())

def budget(nbs): return {n: exported_lines(nb) for n, nb in nbs.items() if n.startswith(BUDGET)}
def check_budget(nbs):
    k = sum(budget(nbs).values())
    if k > MAX_LINES: yield f'Floors 2-4 and hjepa.train export {k} lines (at most {MAX_LINES}): say the same with less code.'

def check_paths():
    "No file of the project may name a person's home or the folder of this checkout."
    fs = git('ls-files', '-co', '--exclude-standard')
    fs = fs.splitlines() if fs is not None else [p.relative_to(ROOT).as_posix() for d in ('nbs', 'hjepa', 'tools', 'tests', '.github')
                                                  for p in (ROOT/d).rglob('*') if p.is_file()]
    here = [re.escape(str(p)) for p in {ROOT, Path.home()} if len(p.parts) > 2]
    bad = re.compile(r'(?<![\w.:/-])(?:' + '|'.join([r'/(?:home|Users)/[A-Za-z]\w*', r'/roo[t]/', r'[A-Z]:\\{1,2}Users\\', *here]) + ')')
    for f in fs:
        p = ROOT/f
        if not p.is_file() or p.is_symlink() or p.stat().st_size > 5e6: continue
        b = p.read_bytes()
        if b'\0' not in b[:4096] and (m := bad.search(b.decode('utf-8', 'replace'))):
            yield f'{f} names a path of one machine ({m[0]}): write it relative to the project, or take it from the configuration.'

def load():
    res, bad = {}, []
    for n in R.notebooks():
        try: res[n] = read_nb(NBS/n)
        except ValueError as e: bad.append(f'nbs/{n} is not a notebook ({e}): restore it from git or save it again.')
    return res, bad

def checks():
    nbs, bad = load(); yield from bad
    for f in (check_sidebar, check_names, check_cells, check_pages, check_imports, check_import_cells, check_budget): yield from f(nbs)
    yield from check_paths()
    print(f'{len(nbs)} notebooks; floors 2-4 and hjepa.train export {sum(budget(nbs).values())} of {MAX_LINES} lines')

# ---- what the tests did not run
def skipped(on=''):
    "Count code cells that `nbdev_test --flags on` leaves out, by reason."
    ini = re.search(r'(?m)^tst_flags\s*=\s*(.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8'))
    flags, why, ran = set(ini[1].split()) - set(on.split()), Counter(), 0
    for n, nb in load()[0].items():
        whole = ((NBS/n).parent/'.notest').exists() or re.search(r'(?m)^- skip_exec:\s*true', source(nb['cells'][0]))
        for c in code_cells(nb):
            d = directives(c)
            if not source(c).strip() or 'nbdev_export(' in source(c): continue
            if whole: why['whole notebook'] += 1
            elif hit := sorted(flags & d.keys()): why[hit[0]] += 1
            elif d.get('eval:', '').lower() == 'false': why['eval: false'] += 1
            else: ran += 1
    reasons = ', '.join(f'{k} {v}' for k, v in sorted(why.items())) or 'none'
    print(f'Notebook cells run: {ran}; skipped by flags: {sum(why.values())} ({reasons})')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', nargs='*', default=['drift', 'checks'], help='export, drift, checks, skipped (default: drift checks)')
    ap.add_argument('--flags', default='', help='flags that nbdev_test was told to run')
    a = ap.parse_args(); n = 0
    for w in a.what:
        if w == 'skipped': skipped(a.flags); continue
        if w == 'export':
            try: export()
            except RuntimeError as e: print(e, file=sys.stderr); n += 1
            continue
        if w not in ('drift', 'checks'): ap.error(f'no gate {w!r}: use export, drift, checks or skipped')
        fails = list({'drift': drift, 'checks': checks}[w]())
        for f in fails: print(f'FAIL {w}: {f}', file=sys.stderr)
        if not fails: print(f'gate {w}: ok')
        n += len(fails)
    sys.exit(bool(n))

if __name__ == '__main__': main()
