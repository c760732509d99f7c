"""A preview of the site where Quarto is not installed: python tools/preview.py  ->  _site/index.html  (`make docs`)

nbdev processes the notebooks (it runs all imports and exports and writes the reference of each symbol: a test in itself);
pandoc, Quarto's own engine, turns them into pages. No widgets: every page says "pandoc preview". Search is a list of titles,
first lines and headings in a script beside the pages, so it works on files, without a server.
At the end the pages are checked: one per notebook, no saved errors, no broken local link, words for each
picture, a heading for each public symbol."""
import ast, base64, html, json, os, posixpath, re, shutil, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
import yaml
sys.path.insert(0, str(Path(__file__).resolve().parent))
import readme as R
from readme import ROOT, source, directives

SITE, PROC = ROOT/'_site', ROOT/'_proc'

CSS = """
:root { --bg:#fff; --fg:#1c2733; --dim:#5b6773; --line:#dfe4e8; --code:#f5f7f8; --link:#0a6aa6; --kw:#7b3fa0; --st:#237a3b; --nu:#a5520a; --co:#77828d; --fn:#0a6aa6; }
@media (prefers-color-scheme: dark) { :root { --bg:#14191e; --fg:#dde3e8; --dim:#98a4af; --line:#2c353d; --code:#1c2329; --link:#6cb8ea; --kw:#c79be6; --st:#8fce9d; --nu:#eab06f; --co:#84909b; --fn:#7fc1ee; }
  .content img:not([src$=".svg"]) { background:#fff; border-radius:6px; padding:6px; } }
* { box-sizing:border-box; } body { margin:0; background:var(--bg); color:var(--fg); font:16px/1.6 system-ui, sans-serif; }
a { color:var(--link); text-decoration:none; } a:hover { text-decoration:underline; }
.label { background:var(--code); border-bottom:1px solid var(--line); color:var(--dim); font-size:.82rem; padding:.35rem 1.2rem; display:flex; justify-content:space-between; align-items:center; gap:1rem; }
search { position:relative; flex:0 0 15rem; } search input { width:100%; font:inherit; color:var(--fg); background:var(--bg); border:1px solid var(--line); border-radius:4px; padding:.2rem .5rem; }
#found { position:absolute; right:0; z-index:1; width:min(26rem, 90vw); background:var(--bg); box-shadow:0 4px 14px #0004; border-radius:4px; max-height:70vh; overflow:auto; } #found a { display:block; padding:.3rem .7rem; border-bottom:1px solid var(--line); } #found small { display:block; color:var(--dim); }
.page { display:flex; align-items:flex-start; max-width:80rem; margin:0 auto; }
nav.side { flex:0 0 14.5rem; position:sticky; top:0; max-height:100vh; overflow:auto; padding:1.2rem; font-size:.92rem; }
nav.side p { margin:.9rem 0 .15rem; color:var(--dim); font-size:.8rem; } nav.side a { display:block; padding:.1rem 0; color:inherit; }
nav.side a.here { font-weight:600; color:var(--link); }
main { flex:1 1 auto; min-width:0; max-width:52rem; padding:1.2rem 1.6rem 4rem; } .desc { color:var(--dim); font-size:1.08rem; margin-top:-.4rem; }
nav#TOC { flex:0 0 13rem; position:sticky; top:0; max-height:100vh; overflow:auto; padding:1.6rem 1rem; font-size:.83rem; } nav#TOC ul { list-style:none; margin:0; padding-left:.8rem; }
h1,h2,h3 { line-height:1.25; } h2 { border-bottom:1px solid var(--line); padding-bottom:.2rem; margin-top:2.2rem; } hr { border:0; border-top:1px solid var(--line); margin:1.6rem 0; }
pre { background:var(--code); padding:.65rem .9rem; overflow:auto; white-space:pre-wrap; overflow-wrap:anywhere; border-radius:4px; font-size:.85rem; line-height:1.45; } code { font-family:ui-monospace, monospace; } :not(pre)>code { background:var(--code); padding:.08em .3em; border-radius:3px; font-size:.88em; }
pre.output { background:none; border-left:3px solid var(--line); border-radius:0; margin-top:-.6rem; } img { max-width:100%; } figure { margin:1rem 0; } figcaption { color:var(--dim); font-size:.85rem; }
col { width:auto !important; } table { border-collapse:collapse; font-size:.9rem; display:block; overflow:auto; } th,td { border-bottom:1px solid var(--line); padding:.25rem .7rem; text-align:left; vertical-align:top; }
math[display=block] { margin:.9rem 0; } blockquote { margin-left:0; padding-left:1rem; border-left:3px solid var(--line); color:var(--dim); } [class*=callout] { border-left:4px solid var(--link); background:var(--code); padding:.2rem 1rem; margin:1rem 0; }
.turn { display:flex; justify-content:space-between; border-top:1px solid var(--line); margin-top:3rem; padding-top:.8rem; }
.kw,.cf,.im { color:var(--kw); } .st,.ss,.vs,.ch { color:var(--st); } .dv,.fl,.bn,.va,.cn { color:var(--nu); } .co,.do { color:var(--co); font-style:italic; } .fu,.bu,.at { color:var(--fn); }
@media (max-width:70rem) { nav#TOC { display:none; } } @media (max-width:46rem) { .page { flex-direction:column; } nav.side { position:static; max-height:none; order:1; } main { max-width:100%; } }
"""
TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$pagetitle$</title><link rel="stylesheet" href="$root$preview.css"><link rel="stylesheet" href="$root$styles.css"></head><body>
<div class="label"><span><strong>pandoc preview</strong>: made without Quarto, no widgets. <code>make docs</code> with Quarto installed builds the full site.</span>
<search><input id="q" type="search" placeholder="Search" aria-label="Search titles and headings"><div id="found"></div></search></div>
<div class="page"><nav class="side">$side$</nav>
<main><h1>$pagetitle$</h1>$if(desc)$<p class="desc">$desc$</p>$endif$
<div class="content">$body$</div><div class="turn">$turn$</div></main>
$if(toc)$<nav id="TOC">$toc$</nav>$endif$</div><script src="$root$search.js" data-root="$root$"></script></body></html>
"""
SEARCH = """
const here = document.querySelector('nav.side .here'), side = here && here.closest('nav'); // the page's own line in view
if (side) side.scrollTop = here.offsetTop - side.offsetTop - side.clientHeight / 2;
const root = document.currentScript.dataset.root || '', box = document.getElementById('q'), found = document.getElementById('found');
box.addEventListener('input', () => { // every word must be there; titles before headings before first lines
  const words = box.value.toLowerCase().split(/\\s+/).filter(w => w), has = (t, w) => t.toLowerCase().includes(w);
  const rank = ([, title, head, text]) => words.every(w => has(title, w)) ? (head ? 1 : 0) : words.every(w => has(title + ' ' + head, w)) ? 2 : 3;
  const hits = words.length ? INDEX.filter(e => words.every(w => has(e.slice(1).join(' '), w))).sort((a, b) => rank(a) - rank(b)) : [], seen = {};
  const few = hits.filter(([, title]) => (seen[title] = (seen[title] || 0) + 1) <= 3).slice(0, 12); // no page takes the whole list
  found.replaceChildren(...few.map(([url, title, head, text]) => {
    const a = Object.assign(document.createElement('a'), {href: root + url, textContent: title}), s = document.createElement('small');
    s.textContent = head || text; a.append(s); return a; }));
  if (words.length && !hits.length) found.textContent = 'Nothing found';
});
"""

def front(nb):
    "The YAML that nbdev makes of a notebook's first cell."
    c = nb['cells'][0]
    return yaml.safe_load(source(c).strip().strip('-')) or {} if c['cell_type'] == 'raw' else {}

def fence(text, cls):
    ticks = '`' * max(3, 1 + max((len(m) for m in re.findall('`+', text)), default=0))
    return f'{ticks} {{.{cls}}}\n{text.rstrip()}\n{ticks}\n'

def outputs(c, d, save):
    "Pandoc markdown of a cell's saved outputs; `save(bytes, suffix)` stores a figure and returns its link."
    if d.get('output:') == 'false' or d.get('include:') == 'false': return
    alt = html.escape(str(yaml.safe_load(d.get('fig-alt:', '')) or ''))
    def picture(b, suffix): return f'```{{=html}}\n<p><img src="{save(b, suffix)}" alt="{alt}"></p>\n```\n'
    for o in c.get('outputs', []):
        if o['output_type'] == 'stream':
            if o['name'] == 'stdout' and ''.join(o['text']).strip(): yield fence(''.join(o['text']), 'output')
            continue
        data = {k: ''.join(v) if isinstance(v, list) else v for k, v in o.get('data', {}).items()}
        if 'image/svg+xml' in data: yield picture(data['image/svg+xml'].encode(), 'svg')
        elif mime := next((m for m in ('image/png', 'image/jpeg') if m in data), None): yield picture(base64.b64decode(data[mime]), mime[6:])
        elif 'text/markdown' in data: yield data['text/markdown'].replace('*Call self as a function.*', '') + '\n'   # nbdev's words for a function without a docstring
        elif 'text/html' in data: yield f'```{{=html}}\n{data["text/html"]}\n```\n'
        elif 'text/plain' in data: yield fence(data['text/plain'], 'output')

def markdown(nb, save):
    "A processed notebook as pandoc markdown."
    for c in nb['cells']:
        d, s = directives(c), source(c)
        if c['cell_type'] == 'markdown': yield s + '\n'
        if c['cell_type'] != 'code' or d.get('include:') == 'false': continue
        code = '\n'.join(l for l in s.splitlines() if not re.match(r'\s*#\s*\|', l)).strip('\n')
        if code.strip() and d.get('echo:') != 'false': yield fence(code, 'python')
        yield from outputs(c, d, save)

def build():
    "Write _site/; returns {notebook: page}."
    import pypandoc
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    cfg = get_config(); base = cfg.doc_host + cfg.doc_baseurl
    refresh_quarto_yml(); proc_nbs(force=True, n_workers=min(2, os.cpu_count()))
    order = [(s, p) for s, p in R.sidebar() if (PROC/p).exists()]
    nbs = {p: R.read_nb(PROC/p) for _, p in order}
    page = {p: posixpath.join(posixpath.dirname(p), front(nb).get('output-file') or Path(p).stem + '.html') for p, nb in nbs.items()}
    name = {p: front(nb).get('title', p) for p, nb in nbs.items()}
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(PROC, SITE, ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '.*'))
    (SITE/'preview.css').write_text(CSS, encoding='utf-8')
    found = [] # [page, title, heading, first line]
    with tempfile.TemporaryDirectory() as tmp:
        tpl = Path(tmp)/'page.html'; tpl.write_text(TEMPLATE, encoding='utf-8')
        for i, (_, p) in enumerate(order):
            out = SITE/page[p]; here = posixpath.dirname(p) or '.'; figs = Path(f'{out.stem}_files')
            def rel(q): return posixpath.relpath(q, here)
            def a(q, text, cls=''): return f'<a{cls} href="{rel(page[q])}">{html.escape(text)}</a>'
            def save(b, suffix):
                f = out.parent/figs; f.mkdir(parents=True, exist_ok=True); n = len(list(f.iterdir()))
                (f/f'{n}.{suffix}').write_bytes(b); return f'{figs}/{n}.{suffix}'
            side, last = [], ''
            for s, q in order:
                if s != last: side.append(f'<p>{html.escape(s)}</p>'); last = s
                side.append(a(q, name[q], ' class="here"' if q == p else ''))
            turn = [a(order[j][1], t.format(name[order[j][1]])) if 0 <= j < len(order) else '<span></span>' for j, t in ((i-1, '← {}'), (i+1, '{} →'))]
            root = '' if here == '.' else rel('.') + '/'
            def local(m):     # links to notebooks and to the published site become links between these pages
                q = posixpath.normpath(posixpath.join(here, m[2]))
                if q in page: return f'{m[1]}{rel(page[q])}{m[3]}'
                if q.startswith('../'): return f'{m[1]}{cfg.git_url}/blob/{cfg.branch}/{q[3:]}{m[3]}'
                return m[0]
            md = '\n'.join(markdown(nbs[p], save)).replace(f']({base}/', f']({root}')
            md = re.sub(r'(\]\()(?![a-z]+:|#|/)([^)#\s]+)((?:#[^)\s]*)?\))', local, md)
            v = dict(pagetitle=name[p], desc=re.sub(r'\*([^*]+)\*', r'<em>\1</em>', re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(front(nbs[p]).get('description', ''), quote=False))), side='\n'.join(side), turn='\n'.join(turn), root=root)
            args = ['--standalone', f'--template={tpl}', '--mathml', '--toc', '--toc-depth=3', *(f'--variable={k}={x}' for k, x in v.items() if x)]
            out.parent.mkdir(parents=True, exist_ok=True)
            page_html = pypandoc.convert_text(md, 'html5', format='markdown', extra_args=args)
            out.write_text(page_html, encoding='utf-8')
            text = lambda h: html.unescape(re.sub('<[^>]+>', '', h)).strip()
            found += [[page[p], name[p], '', front(nbs[p]).get('description', '')], *([f'{page[p]}#{i}', name[p], text(h), ''] for i, h in re.findall(r'<h[2-4][^>]*? id="([^"]+)"[^>]*>(.*?)</h', page_html, re.S))]
    (SITE/'search.js').write_text(f'const INDEX = {json.dumps(found, ensure_ascii=False)};{SEARCH}', encoding='utf-8')
    return page

class Page(HTMLParser):
    "Ids, links and headings of one page."
    def __init__(self, path):
        super().__init__(); self.ids, self.links, self.heads, self.h, self.silent = set(), [], [], None, []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids.add(a.get('id')); self.links += [a[k] for k in ('href', 'src') if a.get(k)]
        if tag == 'img' and not a.get('alt'): self.silent.append(a.get('src', '')[:60])
        if re.fullmatch('h[1-6]', tag): self.h = ''
    def handle_data(self, s):
        if self.h is not None: self.h += s
    def handle_endtag(self, tag):
        if re.fullmatch('h[1-6]', tag) and self.h is not None: self.heads.append(self.h.strip()); self.h = None

def symbols(nb):
    "Public functions and classes of the exported cells; a patched method as '.name'."
    for c in nb['cells']:
        if c['cell_type'] != 'code' or not directives(c).keys() & {'export', 'exports'}: continue
        for o in ast.parse(source(c)).body:
            if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and o.name[0] != '_':
                yield ('.' if any(ast.unparse(x).startswith('patch') for x in o.decorator_list) else '') + o.name

def check(page):
    pages = {p: Page(SITE/f) for p, f in page.items()}; by = {f: pages[p] for p, f in page.items()}
    for n in R.notebooks():
        if n not in page: yield f'nbs/{n} has no page: list it in nbs/sidebar.yml.'; continue
        nb = R.read_nb(R.NBS/n)
        if any(o['output_type'] == 'error' for c in nb['cells'] for o in c.get('outputs', [])): yield f'nbs/{n} was saved with an error: run it again and save.'
        if directives(nb['cells'][0]).get('skip_showdoc'): continue
        for s in symbols(nb):
            if not any(h == s.lstrip('.') or s[0] == '.' and h.endswith(s) for h in pages[n].heads):
                yield f'nbs/{n} exports {s} but its page has no heading for it: take away what hides it, or add show_doc.'
    for f, pg in by.items():
        for src in pg.silent: yield f'{f} shows {src} without words for those who cannot see it: give its cell a line `#| fig-alt: "…"`.'
        for l in pg.links:
            if re.match(r'[a-z]+:|//', l): continue
            to, _, frag = l.partition('#'); q = posixpath.normpath(posixpath.join(posixpath.dirname(f), to)) if to else f
            if not (SITE/q).exists(): yield f'{f} links to {l}, which does not exist: correct the link.'
            elif frag and q in by and frag not in by[q].ids: yield f'{f} links to {l}, but {q} has no such heading: correct the link.'

def main():
    sys.path.insert(0, str(ROOT)); os.chdir(ROOT)
    try: page = build()
    except Exception as e: sys.exit(f'FAIL docs: the site could not be built; mend the cell it names (the site runs imports, exports and references only): {e}')
    fails = list(check(page))
    for f in fails: print(f'FAIL docs: {f}', file=sys.stderr)
    print(f'pandoc preview (not a Quarto render): {len(page)} pages, _site/index.html' + ('' if fails else '; all checks passed'))
    sys.exit(bool(fails))

if __name__ == '__main__': main()
