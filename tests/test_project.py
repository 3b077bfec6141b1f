"The habits: modules follow the notebooks, notebooks are clean, layers import only downwards, lines fit, settings.ini is the one source."
import ast
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from configparser import ConfigParser
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest

from conftest import ROOT

notebooks = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))
ids = [p.relative_to(ROOT/'nbs').as_posix() for p in notebooks]
each_notebook = pytest.mark.parametrize('path', notebooks, ids=ids)


def code_cells(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']


def source(cell): return ''.join(cell['source'])


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what nbdev reads, exported and cleaned there, so that the working tree stays as it is"
    d = tmp_path_factory.mktemp('copy')
    for f in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/f, d)
    shutil.copytree(ROOT/'nbs', d/'nbs', ignore=shutil.ignore_patterns('_quarto.yml', '.ipynb_checkpoints'))
    (d/'ssl_nb').mkdir()
    shutil.copy(ROOT/'ssl_nb'/'__init__.py', d/'ssl_nb')
    code = ('from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean\n'
            'nbdev_export.__wrapped__(); nbdev_clean.__wrapped__()')
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    done = subprocess.run([sys.executable, '-c', code], cwd=d, env=env, capture_output=True, text=True)
    assert done.returncode==0, f'nbdev could not export the notebooks:\n{done.stderr[-3000:]}'
    return d


def test_modules_follow_the_notebooks(copy):
    there,here = [{p.relative_to(d/'ssl_nb').as_posix(): p.read_text(encoding='utf-8') for p in (d/'ssl_nb').rglob('*.py')}
                  for d in (copy, ROOT)]
    wrong = [f'ssl_nb/{f} comes from no notebook: delete it' for f in here.keys() - there.keys()]
    wrong += [f'ssl_nb/{f} is missing: run nbdev-export' for f in there.keys() - here.keys()]
    wrong += [f'ssl_nb/{f} is not what its notebook says: run nbdev-export (an edit made in the module is lost; make it in the notebook)'
              for f in here.keys() & there.keys() if here[f]!=there[f]]
    assert not wrong, '\n' + '\n'.join(sorted(wrong))


@each_notebook
def test_notebook_is_clean(copy, path):
    clean = path.read_bytes()==(copy/path.relative_to(ROOT)).read_bytes()
    assert clean, f'{path.name} is not as nbdev-clean writes it (metadata, execution counts, order of keys): run nbdev-clean'


@each_notebook
def test_notebook_is_small(path):
    kb = path.stat().st_size/1024
    assert kb <= 300, f'{path.name} has {kb:.0f} KB; the limit is 300: shrink_figures of ssl_nb.app.docs, fewer figures, or smaller ones (72 dpi)'


@each_notebook
def test_nothing_is_left_to_be_written(path):
    left = re.findall(r'@@\w*|\bTODO\w*|\bFIXME\b|\b[A-Z]+PROSE\b', ' '.join(source(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']))
    assert not left, f'{path.name} still has {left}'


@each_notebook
def test_results_are_stored(path):
    "The notebook was saved after a full run, that run met no error, and its results name no folder of one machine"
    cells = code_cells(path)
    shown = [c for c in cells if not re.search(r'^#\|\s*(export|hide|default_exp|eval:\s*false)', source(c), re.M)]
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs or not shown, f'{path.name} is stored without results: run it from start to end and save it'
    assert not [o for o in outputs if o['output_type']=='error'], f'{path.name} is stored with an error'
    text = json.dumps([o.get('text') or {k:v for k,v in o.get('data', {}).items() if 'image' not in k} for o in outputs])
    for place in (r'/site-packages/', r'/home/\w', r'/Users/\w', r'/root/', r'[A-Z]:\\\\Users', re.escape(str(ROOT))):
        found = re.search('.{0,60}' + place + '.{0,60}', text)
        assert not found, f'{path.name} shows a path of the machine it was run on: {found[0]}'


@each_notebook
def test_first_cell_installs_the_package_in_colab(path):
    "Each page has a link that opens it in Colab, where nothing of this repository is installed"
    if path.name=='index.ipynb': return # it has no such link
    first,folder = source(code_cells(path)[0]), path.parent.relative_to(ROOT).as_posix()
    assert first.startswith('#| hide\n#| eval: false\n') and 'pip install' in first and f"os.chdir('/content/ssl_nb/{folder}')" in first, (
        f'{path.name} should begin with the cell that installs the package in Colab; copy it from another notebook of {folder}')


@each_notebook
def test_imports_stand_alone(path):
    "Building the site runs every cell that imports; one that also does something else would do it there"
    for n,c in enumerate(code_cells(path)):
        src = source(c)
        if re.search(r'^\s*[%!]|^#\|\s*eval:\s*false', src, re.M): continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SyntaxWarning)
            body = ast.parse(src).body
        mixed = any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body) and any(isinstance(o, (ast.Expr, ast.Assign)) for o in body)
        assert not mixed, f'{path.name}: code cell {n} mixes imports with other code; give the imports a cell of their own\n{src}'


# Layers: a module imports only from folders before its own, and inside a folder only from notebooks with a smaller number.
families = 'pretext', 'contrastive', 'masked', 'autoencoders'
order = [('core',), ('data',), ('evaluate',), families, ('transfer',), ('app',), ('tutorials', 'benchmarks')]
own = re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)


def module_of(path):
    "The module that a notebook exports to ('core.method'), or the notebook's own place where it exports nothing"
    names = [m[1] for c in code_cells(path) if (m := own.search(source(c)))]
    rel = path.relative_to(ROOT/'nbs').with_suffix('')
    return names[0] if names else '.'.join([*rel.parts[:-1], rel.name])


def level(mod): return next(i for i,folders in enumerate(order) if mod.split('.')[0] in folders)


def nodes(*cells):
    "Names, imports and assignments in cells, whose lines that are no Python are left out"
    kinds = ast.Name, ast.Import, ast.ImportFrom, ast.Assign
    code = ('\n'.join(l for l in c.splitlines() if not l.lstrip().startswith(('%', '!'))) for c in cells)
    return [n for c in code for n in ast.walk(ast.parse(c)) if isinstance(n, kinds)]


@functools.cache
def page_nodes(path): return nodes(*map(source, code_cells(path)))


def imports(path):
    "The modules of this package that a cell of the notebook imports from, exported or not"
    for n in page_nodes(path):
        names = []
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        if isinstance(n, ast.ImportFrom) and n.module: names = [n.module, *(f'{n.module}.{a.name}' for a in n.names)]
        yield from (name.removeprefix('ssl_nb.') for name in names if name.startswith('ssl_nb.'))


def allowed(mod, path, other, other_path):
    if mod==other: return True # a page shows what it will define
    if level(mod)!=level(other): return level(other) < level(mod)
    if mod.split('.')[0] in families: return path.parent==other_path.parent and other_path.name.startswith(('00_', '01_'))
    return path.parent==other_path.parent and other_path.name < path.name


def test_layers_import_only_downwards():
    "Notebooks, and so the modules made from them; the cells that show something keep the rule as well"
    mods = {module_of(p): p for p in notebooks if p.parent!=ROOT/'nbs'}
    assert len(mods) > 50 and 'core.method' in mods
    wrong = {f'{mod} imports {other}' for mod,path in mods.items() for other in imports(path)
             if other in mods and not allowed(mod, path, other, mods[other])}
    assert not wrong, ('\n' + '\n'.join(sorted(wrong)) + '\nOrder: ' + ' < '.join(', '.join(o) for o in order) +
                       '; inside a folder only notebooks with a smaller number; methods share only 00_ and 01_ of their family, '
                       'and get others by name: get_method(...)')


def test_layers_see_a_wrong_import(tmp_path):
    "The test above can fail: an import of a later folder, of another method, and of a later notebook"
    mods = {module_of(p): p for p in notebooks if p.parent!=ROOT/'nbs'}
    for mod,other in (('core.method', 'data.images'), ('contrastive.byol', 'contrastive.simclr'), ('data.images', 'data.text'),
                      ('evaluate.report', 'contrastive.simclr'), ('pretext.rotation', 'app.run')):
        assert not allowed(mod, mods[mod], other, mods[other])
    for mod,other in (('data.images', 'core.loader'), ('contrastive.byol', 'contrastive.infonce'), ('app.run', 'masked.mae')):
        assert allowed(mod, mods[mod], other, mods[other])


def unused_imports(nodes):
    "Names that cells import, and that none of them uses or lists in `_all_`"
    imported = {a.asname or a.name.split('.')[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    listed = {c.value for n in nodes if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', None)=='_all_'
              for c in ast.walk(n.value) if isinstance(c, ast.Constant)}
    return imported - used - listed - {'fit_one_cycle'} # importing it gives fastai's Learner its method


def test_what_is_imported_is_used():
    "By a cell of the page (those that are not run count), or by another page or a test, which takes it from there"
    tests = [p.read_text(encoding='utf-8') for p in (ROOT/'tests').glob('*.py')]
    taken = {(n.module.removeprefix('ssl_nb.'), a.name) for ns in (*map(page_nodes, notebooks), nodes(*tests)) for n in ns
             if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
    def elsewhere(mod, name): return (mod, name) in taken or any(re.search(rf'\b{mod.split(".")[-1]}\.{name}\b', t) for t in tests)
    wrong = [f'{p.relative_to(ROOT)} imports {name} without use' for p in notebooks
             for name in sorted(unused_imports(page_nodes(p))) if not elsewhere(module_of(p), name)]
    assert not wrong, '\n' + '\n'.join(wrong)


def test_unused_imports_are_seen():
    "The test above can fail: a plain import, one with another name, one of several, one that is only an attribute or set"
    cells = ("import copy, json, time\nimport numpy as np\nfrom fastcore.test import test_eq, test_close, test_fail",
             "%matplotlib inline\ntime = 3\nx.copy(np=1)\ndef f(): return f'{json.dumps(x)}', test_eq", "_all_ = ['test_close']")
    assert unused_imports(nodes(*cells))=={'copy', 'np', 'time', 'test_fail'}


@each_notebook
def test_lines_fit(path):
    "Code is read beside its result: at most 100 characters in a line"
    wide = [l for c in code_cells(path) for l in source(c).splitlines() if len(l)>100]
    assert not wide, f'{path.name} has {len(wide)} lines of more than 100 characters, the first:\n{wide[0]}'


def test_no_star_import_in_the_package():
    stars = [str(p.relative_to(ROOT)) for p in (ROOT/'ssl_nb').rglob('*.py') for n in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
             if isinstance(n, ast.ImportFrom) and n.names[0].name=='*']
    assert not stars, f'import names, not stars: {stars}'


def test_settings_ini_is_the_one_source():
    "Version, description and requirements of the installed package are those of settings.ini, and stand nowhere else"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    s = cfg['DEFAULT']
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    project = re.search(r'^\[project\]\n(.*?)(?=^\[|\Z)', text, re.M|re.S)[1]
    fixed = set(re.findall(r'^(\S+) *=', project, re.M)) - {'name', 'dynamic'}
    assert not fixed, f'pyproject.toml sets {fixed}; settings.ini is the place for it'
    again = "; run pip install -e '.[dev]' again"
    assert version('ssl_nb')==s['version'], 'the installed version is another than that of settings.ini' + again
    assert metadata('ssl_nb')['Summary']==s['description'], 'the installed description is another than that of settings.ini' + again
    def names(reqs): return {re.match(r'[\w.-]+', r)[0].lower().replace('_', '-') for r in reqs}
    wanted = names(s['requirements'].split()) | names(s['dev_requirements'].split())
    assert names(requires('ssl_nb'))==wanted, 'the installed requirements are others than those of settings.ini' + again


def test_readme_is_the_index():
    "README.md is nbs/index.ipynb, rendered; Quarto and nbconvert lay it out differently, so the words are compared"
    from ssl_nb.app.docs import readme_text
    def words(text): return re.findall(r'\w+', re.sub(r'<!--.*?-->', '', text, flags=re.S))
    readme,index = words((ROOT/'README.md').read_text(encoding='utf-8')), words(readme_text(ROOT))
    where = next((i for i,(a,b) in enumerate(zip(readme, index)) if a!=b), min(len(readme), len(index)))
    assert readme==index, ('README.md is not what nbs/index.ipynb says, from "%s". To write it: ' % ' '.join(index[max(0,where-3):where+8]) +
                           'python -c "from ssl_nb.app.docs import make_readme; make_readme()"')


def test_readme_imports_what_exists():
    "The Python in README.md is not run, but every name that it imports from the package is there"
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M|re.S)
    names = [(n.module, a.name) for b in blocks for n in ast.walk(ast.parse(b)) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert names, 'README.md shows no import from the package'
    def exists(mod, name):
        try: return hasattr(importlib.import_module(mod), name)
        except ModuleNotFoundError: return False
    missing = [f'{mod}.{name}' for mod,name in names if not exists(mod, name)]
    assert not missing, f'README.md imports what does not exist: {missing}'


def readme(lang): return re.findall(rf'^```{lang}\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M|re.S)


def test_readme_commands_are_understood():
    "Each command of ours in README.md, and each option that it names, is one of the command line"
    from ssl_nb.app.cli import parser
    lines = [l for b in readme('sh') for l in b.splitlines() if l.startswith('ssl_nb ')]
    assert len(lines) >= 4
    for line in lines:
        try: parser().parse_args(shlex.split(line)[1:])
        except SystemExit: pytest.fail(f'the command line does not understand: {line}')
    commands = next(a.choices for a in parser()._actions if a.dest=='command')
    known = {o for p in commands.values() for a in p._actions for o in a.option_strings}
    named = set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', (ROOT/'README.md').read_text(encoding='utf-8')))
    assert named and not named - known, f'README.md names options that do not exist: {named - known}'


def test_fine_tuning_of_the_readme(tmp_path, monkeypatch):
    "The lines that fine-tune an encoder, on a few pictures"
    import numpy as np
    import torch
    from PIL import Image

    from ssl_nb.core.encoders import create_encoder, save_encoder
    from ssl_nb.data.images import image_dls
    for i in range(16):
        f = tmp_path/f'path/to/images/train/{"ab"[i%2]}/{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32,32,3), 200*(i%2)+i, 'uint8')).save(f)
    dls = image_dls(tmp_path/'path/to/images', size=32, bs=4)
    save_encoder(create_encoder('small_cnn', dls.info), tmp_path/'runs/mine/encoder')
    code = next(b for b in readme('python') if 'local-dir:' in b)
    assert 'range(20)' in code and 'batch_size=64' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('range(20)', 'range(8)').replace('batch_size=64', 'batch_size=8'), scope := {})
    assert scope['model'][-1].out_features==2 and scope['loss'] < 0.6, 'a dark and a bright class are not told apart'
    assert torch.load('classifier.pt').keys()==scope['model'].state_dict().keys()


def test_readme_pictures_are_there_and_small():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    pictures = re.findall(r'!\[([^\]]*)\]\(([^)]+)\)', text)
    wrong = [f for alt,f in pictures if not (ROOT/f).is_file() or (ROOT/f).stat().st_size > 100e3 or len(alt.split()) < 4]
    assert pictures and not wrong, f'README.md shows pictures that are not there, above 100 KB, or not described: {wrong}'


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_files_that_are_named_exist(name):
    named = re.findall(r'\b((?:nbs|tests|ssl_nb)/[a-z0-9_./-]+\.(?:ipynb|py))\b', (ROOT/name).read_text(encoding='utf-8'))
    missing = [f for f in named if not (ROOT/f).exists()]
    assert named and not missing, f'{name} names files that do not exist: {missing}'
