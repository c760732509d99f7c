"The gates themselves: each can fail, and says why in words."
import json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import gate, readme

def code(src, outputs=()): return dict(cell_type='code', metadata={}, source=src.splitlines(True), outputs=list(outputs), execution_count=None)
def md(src): return dict(cell_type='markdown', metadata={}, source=src.splitlines(True))
def nb(*cells): return dict(cells=[md('# T\n\n> what it is'), *cells])

def test_imports_run_downhill():
    low, high = nb(code('#| default_exp config')), nb(code('#| default_exp model'), code('def f():\n    from hjepa.config import Recipe'))
    assert not list(gate.check_imports({'00_config.ipynb': low, '40_model.ipynb': high}))
    low['cells'].append(code('%matplotlib inline\ndef f():\n    from hjepa import model'))
    [msg] = gate.check_imports({'00_config.ipynb': low, '40_model.ipynb': high})
    assert 'hjepa.model (number 40)' in msg and 'downhill' in msg
    [msg] = gate.check_imports({'40_model.ipynb': nb(code('import hjepa.nowhere'))})
    assert 'no notebook exports' in msg

def test_cells_and_outputs():
    err, big = dict(output_type='error', ename='E', evalue='', traceback=[]), dict(output_type='stream', name='stdout', text=['x'*300_000])
    n = nb(code('1/0', [err]), code('print(1)', [big]), *[md('x')]*60)
    msgs = list(gate.check_cells({'00_a.ipynb': n}))
    assert len(msgs) == 3 and all(any(w in m for m in msgs) for w in ('63 cells', '293 kB', 'saved with an error'))

def test_pages_have_a_title_and_links_that_lead_somewhere():
    table = md('| a | b |\n|---|---|\n| 1 | 2 |')
    pages = {'00_a.ipynb': nb(table, md('[b](data/10_b.ipynb#x), [c](https://c.org/c.ipynb)')), 'data/10_b.ipynb': nb(table, md('[a](../00_a.ipynb)'))}
    assert not list(gate.check_pages(pages))
    pages['data/10_b.ipynb'] = nb(table, md('[a](00_a.ipynb)')); [msg] = gate.check_pages(pages); assert 'data/10_b.ipynb, cell 2, links to 00_a.ipynb' in msg
    pages['data/10_b.ipynb'] = nb(table, md('[me](10_b.ipynb), [c](https://c.org/c.ipynb)')); [msg] = gate.check_pages(pages); assert 'data/10_b.ipynb links to no other notebook' in msg
    [*_, msg] = gate.check_pages({'00_a.ipynb': dict(cells=[md('# T'), table])}); assert 'links to no other' in msg
    [msg, *_] = gate.check_pages({'00_a.ipynb': dict(cells=[md('# T'), table])}); assert 'does not begin with' in msg

def test_pages_show_something():
    out = lambda **data: dict(output_type='display_data', data=data, metadata={})
    drawn, html, text = out(**{'image/png': 'x'}), out(**{'text/html': ['<table>', '</table>']}), out(**{'text/plain': ['1 | 2']})
    assert not gate.shows(nb(md('a - b | c\n\n---\n'), code('1', [text])))
    for cell in (md('a | b\n--- | ---\n1 | 2'), code('plot()', [text, drawn]), code('frame', [html]), code('say()', [out(**{'text/markdown': ['|a|b|\n', '|:-:|---|\n']})])): assert gate.shows(nb(cell)), cell
    assert not gate.shows(nb(code('#| hide\nplot()', [drawn])))             # the site leaves it out
    [msg] = gate.check_pages({'00_a.ipynb': nb(md('[b](10_b.ipynb)')), '10_b.ipynb': nb(md('[a](00_a.ipynb)'), code('plot()', [drawn]))}); assert '00_a.ipynb has no figure and no table' in msg

def test_widgets_leave_no_state():
    view, said = dict(output_type='display_data', data={'application/vnd.jupyter.widget-view+json': {}, 'text/plain': ['HBox()']}), dict(output_type='stream', name='stdout', text=['1'])
    n = nb(code('slider', [view, said])); n['metadata'] = dict(widgets={'state': 'x'*300_000}, kernelspec={})
    assert 'saved outputs' in next(gate.check_cells({'00_a.ipynb': n}))
    assert gate.still(n)['metadata'] == dict(kernelspec={}) and n['cells'][-1]['outputs'] == [said] and not list(gate.check_cells({'00_a.ipynb': n}))

def test_budget_counts_exported_lines_only():
    n = nb(code('#| export\nx = 1\n\n# why\ny = 2'), code('z = 3'))
    assert gate.exported_lines(n) == 3
    assert gate.budget({'parts/20_a.ipynb': n, 'data/10_b.ipynb': n, '61_train.ipynb': n, '60_monitor.ipynb': n}) == {'parts/20_a.ipynb': 3, '61_train.ipynb': 3}
    long = nb(code('#| export\n' + 'x = 1\n'*1501))
    assert '1501 lines' in next(gate.check_budget({'40_model.ipynb': long}))

def test_names():
    a, b = nb(code('#| default_exp parts.patch')), nb(code('#| default_exp rope'))
    assert not list(gate.check_names({'parts/20_patch.ipynb': a, 'index.ipynb': nb()}))
    msgs = list(gate.check_names({'parts/20_patch.ipynb': a, 'parts/20_rope.ipynb': b, 'parts/last.ipynb': nb()}))
    assert len(msgs) == 3 and 'same number' in msgs[0] and 'hjepa.parts.rope' in msgs[1] and 'no number' in msgs[2]

def test_directives():
    assert readme.directives(code('#| export\n#| eval: false\nx = 1\n#| slow')) == {'export': '', 'eval:': 'false'}

def test_readme_shows_and_hides():
    index = nb(md('see [a](data/10_a.ipynb), [b](https://b.c), [c](#d)\n\n```md\n[d](e.f)\n```'), code('#| hide\nsecret'),
               code('1+1', [dict(output_type='execute_result', data={'text/plain': ['2']})]))
    t = readme.readme(json.dumps(index))
    assert '[a](nbs/data/10_a.ipynb)' in t and '[b](https://b.c)' in t and '[c](#d)' in t and '[d](e.f)' in t
    assert 'secret' not in t and '```python\n1+1\n```' in t and '```\n2\n```' in t

def test_import_cells_hold_only_imports():
    n = nb(code('#| export\nimport os\nx = 1'), code('import sys\nimport re'), code('import nbdev; nbdev.nbdev_export()'), code('y = 2'))
    assert not list(gate.check_import_cells({'00_a.ipynb': n}))
    n['cells'].append(code('import sys\nprint(y)'))
    assert 'cell 5, mixes imports' in next(gate.check_import_cells({'00_a.ipynb': n}))
