"The front page says what results/ says."
import json
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
cells = [c for c in json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
source = lambda c: ''.join(c['source'])

def test_saved_tables_are_current(monkeypatch):
    "README.md is made from the saved outputs, so they must be what the cells give now."
    monkeypatch.chdir(ROOT/'nbs'); got, space = [], {}
    exec(source(cells[0]), space)
    for c in cells:
        if not any('text/markdown' in o.get('data', {}) for o in c['outputs']): continue
        before, last = source(c).split('\nMarkdown(')
        exec(before, space); now = eval('Markdown(' + last, space).data
        assert now == ''.join(c['outputs'][0]['data']['text/markdown']), 'nbs/index.ipynb was saved before results/ changed: run it, save it, then make export'
        got.append(now)
    assert len(got) == 2 and all(t in (ROOT/'README.md').read_text(encoding='utf-8').replace('nbs/tutorials/', 'tutorials/') for t in got)

def test_readme_stays_short():
    text = (ROOT/'README.md').read_text(encoding='utf-8'); rows = text.index('<!-- notebooks: begin')
    a, b = text.index('<!-- speeds: begin'), text.index('<!-- speeds: end')            # made from results/, as long as they are
    assert text[:a].count('\n') + text[b:rows].count('\n') < 75 and text[:rows].count('```bash') == 1    # two commands and one table before the list of notebooks
