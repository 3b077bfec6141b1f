"The pages of the methods: each is read in one sitting, has a drawing, and says when to use it."
import ast
import re

import nbformat
import pytest

from conftest import ROOT
from ssl_nb.app.gallery import method_pages
from ssl_nb.core.method import find_methods

LIMIT = 15  # minutes
PAGES = sorted(p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in (ROOT/'nbs').glob('*/[0-9]*.ipynb'))


def words(text):
    "Words of a cell of prose; a formula, an address and a drawing are not read word by word"
    text = re.sub(r'<svg.*?</svg>', '', text, flags=re.S)
    text = re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', ' formula ', text, flags=re.S)
    text = re.sub(r'\]\([^)]*\)', ']', text)
    return len([w for w in text.split() if re.search(r'\w', w)])


def is_code(source):
    "Is this Python, and not an IPython command?"
    try: return bool(ast.parse(source))
    except SyntaxError: return False


def code_lines(source):
    "Lines of code that a reader reads: neither imports nor nbdev's directives"
    imports = set()
    if is_code(source):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)): imports |= set(range(node.lineno, node.end_lineno + 1))
    return len([i for i,l in enumerate(source.splitlines(), 1)
                if l.strip() and not l.lstrip().startswith('#|') and i not in imports])


def directive(cell, pattern): return bool(re.search(rf'^#\|\s*{pattern}', cell.source, re.M))


def pictures(cell): return sum(any(k.startswith('image/') for k in o.get('data', {})) for o in cell.get('outputs', []))


def to_read(nb):
    "The cells of a notebook without its section `Checked against`, which a reader may skip"
    skipped = False
    for c in nb.cells:
        if c.cell_type!='markdown':
            if not skipped: yield c
            continue
        for part in re.split(r'^(?=## )', c.source, flags=re.M):
            if part.startswith('## '): skipped = part.startswith('## Checked against')
            if not skipped: yield nbformat.v4.new_markdown_cell(part)


def reading_time(nb):
    "Minutes: 200 words or 30 lines of code a minute, 20 s a figure. Code that only draws and is folded is not read"
    minutes = 0.
    for c in to_read(nb):
        if c.cell_type=='markdown':
            minutes += words(c.source)/200 + len(re.findall(r'!\[|<svg', c.source))/3
        elif c.cell_type=='code' and not directive(c, 'hide'):
            drawn = pictures(c)
            folded = drawn and directive(c, 'code-fold:\\s*true')
            minutes += drawn/3 + (0 if folded else code_lines(c.source)/30)
    return minutes


def notebook(*cells):
    make = dict(md=nbformat.v4.new_markdown_cell, code=nbformat.v4.new_code_cell)
    return nbformat.v4.new_notebook(cells=[make[kind](source) for kind,source in cells])


def with_picture(source):
    image = nbformat.v4.new_output('display_data', data={'image/png': ''})
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=[image])])


def test_prose():
    assert reading_time(notebook(('md', 'word '*200))) == pytest.approx(1)
    assert words('Here $a + b$ is\n\n$$c = d + e$$\n\n| one | two |\n|---|---|') == 6
    assert words('See [the page](../core/01_method.ipynb#a-b).') == 3


def test_code():
    assert reading_time(notebook(('code', 'x = 1\n'*30))) == pytest.approx(1)
    assert code_lines('#| export\nimport torch\nfrom a import (b,\n    c)\n\ndef f():\n    return 1') == 2
    assert code_lines('%matplotlib inline\nx = 1') == 2
    assert reading_time(notebook(('code', '#| hide\n' + 'x = 1\n'*30))) == 0


def test_figures():
    assert reading_time(with_picture('draw()')) == pytest.approx(1/3 + 1/30)
    assert reading_time(with_picture('#| code-fold: true\n' + 'draw()\n'*30)) == pytest.approx(1/3)
    assert reading_time(notebook(('code', '#| code-fold: true\n' + 'x = 1\n'*30))) == pytest.approx(1) # draws nothing
    assert reading_time(notebook(('md', '![](a.png)'))) == pytest.approx(1/3)


def test_checks_are_skipped_exercises_are_not():
    cells = [('md', 'word '*50 + '\n\n## When\n\n' + 'word '*49 + '\n\n## Checked against\n\n' + 'word '*500),
             ('code', 'x = 1\n'*300), ('md', '### More'), ('code', 'x = 1\n'*300), ('md', '## Exercises\n\n' + 'word '*99)]
    assert reading_time(notebook(*cells)) == pytest.approx(1)


@pytest.mark.parametrize('page', PAGES)
def test_a_page_is_read_in_a_quarter_of_an_hour(page):
    took = reading_time(nbformat.read(ROOT/f'nbs/{page}.ipynb', 4))
    assert took <= LIMIT, f'{page} takes {took:.1f} minutes to read; leave out what is told twice, or proved a third time'


MODULES = {c.__module__.removeprefix('ssl_nb.') for c in find_methods().values()}
METHOD_PAGES = [p for pages in method_pages(ROOT/'nbs', MODULES).values() for p in pages]


@pytest.mark.parametrize('path', METHOD_PAGES, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_a_method_has_its_drawing_its_question_and_its_limits(path):
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type=='code']
    drawn = [c for c in code if pictures(c) and re.search(r'draw_flow\(|arrow', c.source)]  # boxes and arrows, no curves
    assert any(directive(c, 'code-fold:\\s*true') for c in drawn), f'{path.name} draws its method nowhere (`draw_flow`)'
    headings = re.findall(r'^##+ (.+)', '\n'.join(c.source for c in nb.cells if c.cell_type=='markdown'), re.M)
    for part in ('The question', 'When to use it', 'Exercises'):
        assert any(h.startswith(part) for h in headings), f'{path.name} has no section "{part} ..."'
