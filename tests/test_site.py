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
    out.with_name('progress.txt').write_text(done.stderr)
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


def test_build_shows_how_far_it_is(site):
    built,text = len(pages(site)), site.with_name('progress.txt').read_text()
    for n,what in ((built-1, 'notebooks read'), (built, 'pages rendered')): # the gallery is no notebook
        assert f'20 of {n} {what}' in text and f'{n} of {n} {what}' in text, f'the build does not say how many {what}:\n{text}'


class Words(HTMLParser):
    "The text of a page that is no code, its images, and its code"
    def __init__(self, text):
        super().__init__()
        self.inside,self.words,self.code,self.images = [],[],[],[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        if tag in ('code', 'pre', 'script', 'style', 'math'): self.inside.append(tag)
        if tag=='img': self.images.append(dict(attrs))
    def handle_endtag(self, tag):
        if self.inside and tag==self.inside[-1]: self.inside.pop()
    def handle_data(self, data):
        (self.code if self.inside else self.words).append(data)


@pytest.fixture(scope='module')
def read(site):
    return {p: Words((site/p).read_text(encoding='utf-8')) for p in pages(site)}


def test_no_page_shows_the_syntax_of_a_link(read):
    "A link inside the text of a link, and the brackets of both are shown"
    wrong = [f'{p}: {m[0]}' for p,r in read.items() for m in re.finditer(r'.{0,40}\]\([^)\n]{0,60}', ''.join(r.words))]
    assert not wrong, '\n' + '\n'.join(wrong)


def test_every_figure_is_described(read):
    wrong = [f"{p}: {i.get('src', '')[:40]}" for p,r in read.items() for i in r.images if len((i.get('alt') or '').split()) < 2]
    assert sum(len(r.images) for r in read.values()) > 100 and not wrong, 'figures without an alt text:\n' + '\n'.join(wrong)
    alts = [i['alt'] for i in read['contrastive/simclr.html'].images]
    assert any('match the two rows of views' in a for a in alts), f'the text before a figure is not its alt text: {alts}'
    assert not [a for r in read.values() for a in (i['alt'] for i in r.images) if re.search(r'[`$]|\]\(|\n', a) or len(a) > 500]


def test_signatures_say_none_as_the_code_does(read):
    code = {p: ''.join(r.code) for p,r in read.items() if p!='app/page.html'} # which says how it is put right
    wrong = [p for p,c in code.items() if 'NoneType=' in c]
    assert not wrong and any('=None' in c for c in code.values()), f'data:NoneType=None on {wrong}'


def test_every_option_of_the_command_line_is_on_its_page(read):
    from ssl_nb.app.cli import parser
    commands = next(a.choices for a in parser()._actions if a.dest=='command')
    options = {f'{name} {o}' for name,p in commands.items() for a in p._actions for o in a.option_strings if o.startswith('--') and o!='--help'}
    shown = '\n'.join(read['app/cli.html'].code)
    missing = [o for o in options if not re.search(re.escape(o.split()[1]) + r'(?![\w-])', shown.partition('ssl_nb ' + o.split()[0])[2])]
    assert len(options) > 20 and not missing, f'not in the tables of nbs/app/09_cli.ipynb: {missing}; run it again'


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
    without = [p for p in pages(site) if p not in ('index.html','gallery.html') and 'https://colab.research.google.com/github/' not in (site/p).read_text(encoding='utf-8')]
    assert not without, f'no link to Colab on {without}'


def test_gallery_has_a_tile_for_each_method(site):
    from ssl_nb.core.method import find_methods
    page = (site/'gallery.html').read_text(encoding='utf-8')
    tiles = re.findall(r'<a class="tile" href="([^"]+)">(.*?)</a>', page, re.S)
    modules = {c.__module__.removeprefix('ssl_nb.').replace('.', '/')+'.html' for c in find_methods().values()}
    assert {href for href,_ in tiles}==modules
    bare = [href for href,inside in tiles if '<img' not in inside and len(re.sub('<[^>]*>', '', inside))<120]
    assert not bare, f'neither a picture nor a text on the tiles of {bare}'


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


def search(chromium, url, text):
    "Titles and headings of what the search finds, and where they lead"
    chromium.open(url)
    box = 'document.querySelector("#quarto-search input, .smalldocs-search input")'
    chromium.js(f'{box}.focus()')
    chromium.send('Input.insertText', text=text)
    shown = chromium.wait_for('[...document.querySelectorAll(".search-result, .search-none")].map(a => [a.innerText, a.href || ""])')
    return [(text, href.removeprefix(url)) for text,href in shown]


@pytest.mark.skipif(bool(shutil.which('quarto')), reason='Quarto brings its own search')
@pytest.mark.parametrize('words,page', [('csv', 'data/tables.html'), ('augmentation', 'core/views.html'), ('own images', 'index.html'),
    ('temperature', 'contrastive/'), ('collapse', 'contrastive/collapse.html'), ('create_encoder', 'core/encoders.html'), ('masks', 'core/masks.html')])
def test_search_ranks_titles_and_headings_first(base, chromium, words, page):
    found = [href for _,href in search(chromium, base, words)]
    assert found[0].startswith(page), f'the search for {words} begins with {found[:3]}'


@pytest.mark.skipif(bool(shutil.which('quarto')), reason='Quarto brings its own search')
def test_search_finds_nothing_where_there_is_nothing(base, chromium):
    assert search(chromium, base, 'zebrafish onnx')[0][0]=='No results'


@pytest.mark.skipif(bool(shutil.which('quarto')), reason='Quarto brings its own search')
def test_search_in_a_file_says_that_it_needs_a_server(site, chromium):
    chromium.errors.clear()
    assert 'python -m http.server' in search(chromium, (site/'index.html').as_uri(), 'simclr')[0][0]


@pytest.fixture
def window(chromium):
    "Sets the width of the window; afterwards it is as before"
    def width(n): chromium.send('Emulation.setDeviceMetricsOverride', width=n, height=1200, deviceScaleFactor=1, mobile=n < 600)
    yield width
    chromium.send('Emulation.clearDeviceMetricsOverride')


some_pages = ['index.html', 'gallery.html', 'contrastive/simclr.html', 'data/images.html', 'evaluate/report.html', 'tutorials/which_task.html', 'app/cli.html']
wider = '''[...document.querySelectorAll("main div.sourceCode")].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.innerText.split("\\n").sort((a, b) => b.length - a.length)[0])'''


@pytest.mark.parametrize('n', [1280, 390])
def test_code_fits_its_column(base, chromium, window, n):
    "At 1280 pixels, with both menus, and on a phone; what is wider than the page scrolls in its own box"
    window(n)
    for page in some_pages:
        chromium.open(base + page)
        assert not chromium.js(wider), f'{page} at {n} pixels: {chromium.js(wider)[:2]}'
        assert chromium.js('document.documentElement.scrollWidth') <= n, f'{page} is wider than {n} pixels'


def test_one_menu_on_a_phone(base, chromium, window):
    window(390)
    chromium.open(base + 'contrastive/simclr.html')
    shown = '[...document.querySelectorAll(".navbar-toggler, .quarto-btn-toggle")].filter(e => e.offsetParent)'
    assert chromium.js(f'{shown}.length')==1, 'a phone should show one menu'
    chromium.js(f'{shown}[0].click()')
    chromium.wait_for('document.querySelector("#quarto-sidebar").getBoundingClientRect().left >= 0')


def test_sidebar_is_in_the_order_of_reading_and_open_where_you_are(base, chromium):
    chromium.open(base + 'contrastive/simclr.html')
    top = chromium.js('[...document.querySelectorAll(".sidebar-menu-container > ul > li > div")].map(e => e.innerText.trim())')
    assert top[0]=='Start here' and top[-1]=='Inside' and top.index('Tutorials') < top.index('Pretext tasks') < top.index('Contrastive'), top
    opened = chromium.js('[...document.querySelectorAll("#quarto-sidebar ul.show")].map(e => e.parentElement.innerText.split("\\n")[0].trim())')
    assert opened==['Contrastive'], f'open in the sidebar: {opened}'


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
