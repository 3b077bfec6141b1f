"The site is built once; its links are checked in the files, and its pages in a headless Chromium."
import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from browser import Browser, find_chromium
from conftest import ROOT

if not shutil.which('quarto') and not importlib.util.find_spec('smalldocs'):
    pytest.skip('neither Quarto nor smalldocs (Python 3.11 or later) is installed', allow_module_level=True)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site"
    out = tmp_path_factory.mktemp('site')/'_docs'
    code = f'from ssl_nb.app.docs import build_docs; build_docs({str(out)!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, f'the site could not be built:\n{done.stderr[-3000:]}'
    out.with_name('warnings.txt').write_text('\n'.join(l for l in done.stderr.splitlines() if l.startswith('warning:')))
    return out


def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if 'site_libs' not in p.parts)


class Links(HTMLParser):
    "The ids and the links of a page"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def test_every_notebook_has_a_page(site):
    from nbdev.config import nbpath2html
    nbs = [p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb')]
    missing = [p.as_posix() for p in nbs if not any(x[0] in '._' for x in p.parts) and not (site/nbpath2html(p)).exists()]
    assert not missing, f'no page for {missing}'


def test_renderer_has_no_warnings(site):
    text = site.with_name('warnings.txt').read_text()
    assert not text, f'the renderer warns:\n{text}'


def test_no_broken_link(site):
    parsed = {p: Links((site/p).read_text(encoding='utf-8')) for p in pages(site)}
    broken = []
    for page,found in parsed.items():
        for link in found.links:
            if urlsplit(link).scheme or link.startswith('//'): continue
            to = urlsplit(urljoin(f'/{page}', link))
            target,anchor = unquote(to.path).lstrip('/'), unquote(to.fragment)
            if not target or target.endswith('/'): target += 'index.html'
            if not (site/target).is_file(): broken.append(f'{page}: {link} (no such file)')
            elif anchor and target in parsed and anchor not in parsed[target].ids: broken.append(f'{page}: {link} (no such heading)')
    assert not broken, '\n' + '\n'.join(sorted(set(broken)))


def test_every_page_links_to_colab(site):
    without = [p for p in pages(site) if p!='index.html' and 'https://colab.research.google.com/github/' not in (site/p).read_text(encoding='utf-8')]
    assert not without, f'no link to Colab on {without}'


def test_every_page_has_an_icon(site): # without one, a browser asks for /favicon.ico and reports that it is missing
    without = [p for p in pages(site) if not re.search(r'<link [^>]*rel="[^"]*\bicon"', (site/p).read_text(encoding='utf-8'))]
    assert not without, f'no icon on {without}'


def test_sidebar_lists_every_page(site):
    home = Links((site/'index.html').read_text(encoding='utf-8')).links
    missing = [p for p in pages(site) if p!='index.html' and not any(unquote(l).removeprefix('./')==p for l in home)]
    assert not missing, f'not in the sidebar: {missing}; does _quarto.yml know the folder?'


@pytest.fixture(scope='module')
def base(site):
    "The address of the site, served from this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}/'
    server.shutdown()


@pytest.fixture(scope='module')
def chromium():
    program = find_chromium()
    if not program: pytest.skip('no Chromium is installed (Debian: apt-get install chromium)')
    b = Browser(program)
    yield b
    b.close()


def test_home_page(base, chromium):
    chromium.open(base)
    assert 'ssl_nb' in chromium.js('document.title')
    assert 'pip install -e . && ssl_nb pretrain simclr' in chromium.js('document.querySelector("main").innerText')
    assert chromium.js('document.querySelector("main pre").getBoundingClientRect().top') < 1000, 'the command is not on the first screen'


def test_search(base, chromium):
    chromium.open(base)
    chromium.js('document.querySelector("#quarto-search input, #quarto-search button").focus()')
    chromium.js('document.querySelector("#quarto-search input, #quarto-search button").click()')
    chromium.send('Input.insertText', text='check_method')
    hits = chromium.wait_for('[...document.querySelectorAll(".smalldocs-search-results a, .aa-Panel a")].map(a => a.href)')
    assert any('core/method.html' in h for h in hits), f'the search for check_method finds {hits}'
    chromium.open(hits[0])
    assert chromium.js('document.querySelector("main h1").innerText')


broken_images = '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))'
flat_equations = '[...document.querySelectorAll("math")].filter(m => !m.getBoundingClientRect().height).length'
raw_tex = '''[...document.querySelectorAll("main p, main li, main td, main h1, main h2, main .description")].map(e => {
    const c = e.cloneNode(true); c.querySelectorAll("code, pre, annotation").forEach(x => x.remove()); return c.textContent})
    .filter(t => /\\$\\$|\\\\\\(|\\\\\\[|\\\\(frac|sum|log|mathcal|theta)/.test(t))'''


def test_pages_in_the_browser(site, base, chromium):
    "Every page opens without a console error, asks nothing of the network, and shows its figures and equations"
    wrong,equations = [],0
    for page in pages(site):
        chromium.errors.clear(); chromium.requests.clear()
        chromium.open(base + page)
        outside = [u for u in chromium.requests if not u.startswith((base, 'data:', 'about:', 'blob:'))]
        equations += chromium.js('document.querySelectorAll("math").length')
        wrong += [f'{page}: {what}' for what in [*chromium.errors, *(f'asks the network for {u}' for u in outside),
                  *(f'image does not show: {s}' for s in chromium.js(broken_images)),
                  *(f'LaTeX is not rendered: {t[:80]}' for t in chromium.js(raw_tex))]]
        if chromium.js(flat_equations): wrong.append(f'{page}: {chromium.js(flat_equations)} equations have no height')
    assert not wrong, '\n' + '\n'.join(wrong)
    assert equations, 'no page has an equation'


def test_method_page(site, base, chromium):
    "A page as it is meant to be: sidebar, code, results, an equation, a figure, reference with documented parameters"
    page = next((p for p in ('contrastive/simclr.html', 'core/views.html') if (site/p).exists()), None)
    assert page, 'neither SimCLR nor the views have a page'
    chromium.open(base + page)
    count = lambda css: chromium.js(f'document.querySelectorAll({json.dumps(css)}).length')
    assert chromium.js('document.querySelector("main h1").innerText').strip()
    assert count('#quarto-sidebar a.active')==1, 'the sidebar does not show where we are'
    for what,css in {'code': 'main pre code', 'result': 'main .cell-output', 'figure': 'main .cell-output img, main .cell-output svg',
                     'equation': 'main math', 'reference': 'main .api', 'documented parameters': 'main .api pre'}.items():
        assert count(css), f'{page} shows no {what}'
    assert re.search(r'#\s*\S+', chromium.js('document.querySelector("main .api pre").innerText')), 'the reference lost the comments on parameters'
