"""The workbook as a person meets it: JupyterLab with a slider that is moved, and the site with its search, in Chromium.

    make test-browser        # pictures of what was seen: build/*.png

Not part of `make test`: it needs Chromium, the system's or Playwright's own (`.venv/bin/playwright install chromium`). Notebooks are run
in a copy, so that nothing here is changed; the site must have been built (`make docs`, which `make test-browser` does first).
"""
import io, os, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT/'build'

@pytest.fixture(scope='session')
def browser():
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as p:
        own = Path(p.chromium.executable_path)
        exe = own if own.exists() else next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
        if not exe: pytest.exit('No Chromium found: install it, or run `.venv/bin/playwright install chromium`.', 1)
        b = p.chromium.launch(executable_path=str(exe), args=['--no-sandbox'] if os.geteuid() == 0 else []) # root has no sandbox
        yield b
        b.close()

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "The address of a JupyterLab on a copy of the notebooks; all cells are kept in the page, seen or not."
    tmp = tmp_path_factory.mktemp('lab'); work = tmp/'work'
    for d in ('nbs', 'hjepa', 'results', 'bench'): shutil.copytree(ROOT/d, work/d, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'setup.py', '_quarto.yml', 'README.md'): shutil.copy(ROOT/f, work/f)
    (s := tmp/'settings'/'@jupyterlab'/'notebook-extension').mkdir(parents=True); (s/'tracker.jupyterlab-settings').write_text('{"windowingMode": "none"}')
    (s := tmp/'settings'/'@jupyterlab'/'apputils-extension').mkdir(parents=True); (s/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as k: k.bind(('127.0.0.1', 0)); port = k.getsockname()[1]
    token, log = secrets.token_hex(16), open(tmp/'lab.log', 'w')
    env = os.environ | dict(JUPYTERLAB_SETTINGS_DIR=str(tmp/'settings'), JUPYTER_CONFIG_DIR=str(tmp/'config'), JUPYTERLAB_WORKSPACES_DIR=str(tmp/'workspaces'), PYTHONPATH=str(work), OMP_NUM_THREADS='1') # the copy's package too
    p = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
        f'--notebook-dir={work}', '--expose-app-in-browser'], stdout=log, stderr=log, env=env)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={token}', timeout=2); break
            except OSError: time.sleep(.5)
            assert p.poll() is None, (tmp/'lab.log').read_text()[-2000:]
        yield lambda nb: f'http://127.0.0.1:{port}/lab/workspaces/{secrets.token_hex(4)}/tree/{nb}?token={token}&reset'
    finally: p.terminate(); p.wait(20); log.close()

RUN_ALL = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await panel.context.ready; await panel.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells');
}"""
CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.filter(c => c.cell_type == 'code').map(c => ({source: c.getSource(), count: c.execution_count, outputs: c.getOutputs()}))"

def run_all(page, url):
    "Open a notebook and run it; its code cells."
    page.goto(url, wait_until='domcontentloaded')
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=90_000)
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.context?.isReady', timeout=90_000)
    page.evaluate(RUN_ALL)
    cells = page.evaluate(CELLS)
    errors = [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors, '\n'.join(errors[0]['traceback'])
    assert all(c['count'] for c in cells if c['source'].strip()), 'a cell did not run'
    return cells

def pixels(locator): return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert('RGB'), int)

def shot(page, name): page.screenshot(path=SHOTS/f'{name}.png')

def changed(page, picture, act, share=.01):
    "Do something, and wait until so much of the picture is another; its pixels before and after."
    picture.scroll_into_view_if_needed(); before = pixels(picture); act()
    for _ in range(60):
        page.wait_for_timeout(250); after = pixels(picture)
        if after.shape != before.shape or (after != before).any(2).mean() > share: return before, after
    raise AssertionError('something was moved or clicked, and the picture stayed as it was')

def test_a_slider_changes_the_picture(browser, lab):
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    run_all(page, lab('nbs/analyze/76_masks.ipynb'))
    picture, handle = page.locator('.jp-OutputArea img.widget-image').first, page.locator('.widget-slider .noUi-handle').nth(1) # the share that is hidden
    def move(): handle.focus(); [page.keyboard.press('ArrowRight') for _ in range(20)]
    picture.scroll_into_view_if_needed(); shot(page, 'lab-before'); changed(page, picture, move); shot(page, 'lab-after'); page.close()

def test_a_click_on_a_patch(browser, lab):
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    run_all(page, lab('nbs/analyze/72_attention.ipynb'))
    page.locator('.widget-gridbox button').nth(5).scroll_into_view_if_needed(); shot(page, 'lab-patch-before')
    before, after = changed(page, page.locator('.jp-OutputArea img.widget-image').last, page.locator('.widget-gridbox button').nth(5).click)
    assert before.shape == after.shape
    for name, a, b in zip(('patch', 'attention', 'level 0', 'level 1'), *(np.array_split(t, 4, 1) for t in (before, after))): assert (a != b).any(2).mean() > .005, f'a click on another patch changes nothing at: {name}'
    shot(page, 'lab-patch-after'); page.close()

def test_a_notebook_runs(browser, lab):
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    cells = run_all(page, lab('nbs/parts/25_masking.ipynb'))
    assert any('image/png' in o.get('data', {}) for c in cells for o in c['outputs'])
    page.locator('.jp-OutputArea img').first.scroll_into_view_if_needed(); shot(page, 'lab-masking'); page.close()

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_site(browser, scheme):
    site = next((ROOT/d for d in ('_docs', '_site') if (ROOT/d/'index.html').exists()), None)
    assert site, 'The site is not there: build it with `make docs`.'
    page = browser.new_page(viewport=dict(width=1300, height=900), color_scheme=scheme); failed = []
    page.on('requestfailed', lambda r: failed.append(r.url)); page.on('pageerror', lambda e: failed.append(str(e)))
    page.goto((site/'index.html').as_uri()); assert 'hjepa' in page.title(); shot(page, f'site-{scheme}')
    assert page.evaluate('[...document.images].every(i => i.naturalWidth > 0 && i.alt)'), 'a picture on the front page is missing, or has no text for those who cannot see it'
    if site.name == '_docs': page.keyboard.press('/'); page.keyboard.type('masks on the pyramid'); hits = page.locator('.aa-Item a')
    else: page.fill('#q', 'masks on the pyramid'); hits = page.locator('#found a')
    hits.first.wait_for(timeout=20_000); shot(page, f'search-{scheme}'); hits.first.click()
    page.wait_for_url('**/masking.html*'); assert page.locator('h1').inner_text() == 'Masks on the pyramid'
    shot(page, f'masking-{scheme}'); assert not failed, failed; page.close()

def test_the_map_walks(browser):
    "No kernel, no script: the levels change by mouse and keyboard, and a dot shows its photograph."
    site = next(ROOT/d for d in ('_docs', '_site') if (ROOT/d/'index.html').exists())
    page = browser.new_page(viewport=dict(width=1300, height=900), java_script_enabled=False); page.goto((site/'analyze'/'embedding.html').as_uri())
    field = page.locator('[id^=walk] .map'); dot = field.locator('input').first
    changed(page, field, lambda: page.locator('[id^=walk] label', has_text='untrained').click())
    where = dot.bounding_box(); page.locator('[id^=walk] .l0').focus(); changed(page, field, lambda: page.keyboard.press('ArrowRight')); page.wait_for_timeout(1000)
    assert dot.bounding_box() != where; changed(page, field, lambda: dot.hover(force=True)); shot(page, 'site-map'); page.close()
