"""The dashboard of a run, in JupyterLab: the picture changes while the cell trains, its button ends the run and saves, and the same call goes on.

    make test-browser        # pictures of what was seen: build/live-*.png
"""
import json, urllib.parse, urllib.request
import pytest
from browser import CELLS, browser, lab, pixels, shot

CELLS_OF_IT = ["""from hjepa.data.scenes import scenes
from hjepa.train import fit
x = scenes(512, seed=0)[0]
quick = dict(data=x, out='live', live=True, batch=64, steps=20000, monitor=500, log=4, precision='fp32', device='cpu') | {
    'encoder.dim': 32, 'encoder.heads': 2, 'predictor.dim': 32, 'predictor.heads': 2, 'whole.hidden': 64}""",
"run = fit('cifar10-cpu', **quick)", "a = run.facts['steps']; print(run.finished, a)",
"run = fit('cifar10-cpu', **quick)", "b = run.facts['steps']; print(run.finished, run.resumed_at == a, b > a)",
"from hjepa.model import read_tensors\nprint(read_tensors('live/state.safetensors')[1]['step'] == str(b))"]

def write_notebook(url:str, cells:list):
    "A new notebook, through the server; its address."
    u = urllib.parse.urlsplit(url); path = u.path.split('/tree/')[1]
    nb = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
              cells=[dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(cells)])
    q = urllib.request.Request(f'{u.scheme}://{u.netloc}/api/contents/{path}', json.dumps(dict(type='notebook', content=nb)).encode(), {'Authorization': f"token {urllib.parse.parse_qs(u.query)['token'][0]}"}, method='PUT')
    urllib.request.urlopen(q, timeout=20).close(); return url

def said(page, i): return ''.join(o.get('text', '') if isinstance(o.get('text', ''), str) else ''.join(o['text']) for o in page.evaluate(CELLS)[i]['outputs'])

def until(page, true, what, seconds=150):
    for _ in range(4 * seconds):
        if true(): return
        page.wait_for_timeout(250)
    raise AssertionError(f'{what}: not within {seconds} s; {[o for c in page.evaluate(CELLS) for o in c["outputs"] if o["output_type"] == "error"]}')

@pytest.mark.parametrize('theme', ['JupyterLab Light', 'JupyterLab Dark'])
def test_the_dashboard_is_live_and_its_button_stops(browser, lab, theme):
    name = theme.split()[1].lower(); page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.goto(write_notebook(lab(f'live-{name}.ipynb'), [c.replace("'live'", f"'live-{name}'").replace("'live/", f"'live-{name}/") for c in CELLS_OF_IT]), wait_until='domcontentloaded')
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=90_000)
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.context?.isReady', timeout=90_000)
    page.evaluate(f"async () => {{ const app = window.jupyterapp; await app.shell.currentWidget.sessionContext.ready; await app.commands.execute('apputils:change-theme', {{theme: '{theme}'}}); app.commands.execute('notebook:run-all-cells') }}")
    cell = page.locator('.jp-Notebook .jp-CodeCell'); picture = cell.nth(1).locator('img.widget-image'); picture.wait_for(timeout=90_000)
    picture.scroll_into_view_if_needed(); page.wait_for_function('i => i.naturalWidth > 0', arg=picture.element_handle()); before = pixels(picture)
    page.evaluate("""() => { window.gaps = 0; const out = document.querySelectorAll('.jp-CodeCell')[1];
      new MutationObserver(() => { if (!out.querySelector('img.widget-image')) window.gaps++ }).observe(out, {childList: true, subtree: true}) }""")
    until(page, lambda: (after := pixels(picture)).shape != before.shape or (after != before).any(2).mean() > .002, 'the picture changes')
    says = cell.nth(1).locator('.widget-hbox:has(button) .widget-html')
    until(page, lambda: any(w in says.inner_text() for w in ('healthy', 'collaps', 'below')), 'the monitor speaks')
    assert page.evaluate('window.gaps') == 0, 'the picture was taken away while it was changed: it flickers'
    shot(page, f'live-{name}')
    cell.nth(1).locator('button.widget-button').click()
    until(page, lambda: said(page, 2).startswith('False'), 'the button ends the run, and the next cell runs', 60)
    assert cell.nth(1).locator('button.widget-button').count() == 0 and any('image/png' in o.get('data', {}) for o in page.evaluate(CELLS)[1]['outputs'])  # the picture stays, the button goes
    cell.nth(3).locator('img.widget-image').wait_for(timeout=30_000); cell.nth(3).scroll_into_view_if_needed(); shot(page, f'live-{name}-again')
    page.wait_for_timeout(500); page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")        # what has always ended a run
    until(page, lambda: said(page, 5), 'an interrupt ends the run', 60)
    assert said(page, 4).split() == ['False', 'True', 'True'] and said(page, 5).split() == ['True']
    shot(page, f'live-{name}-end'); page.close()
