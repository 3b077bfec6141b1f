"The habits: modules follow the notebooks, notebooks are clean, layers import only downwards, settings.ini is the one source."
import ast
import importlib
import json
import os
import re
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
    assert kb <= 300, f'{path.name} has {kb:.0f} KB; the limit is 300: fewer or smaller figures (72 dpi)'


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


# Layers: a module imports only from those before it. Inside core, only from notebooks with a smaller number.
first = ['method'], ['data', 'views', 'masks', 'encoders', 'heads']  # the rest of core comes third
families = 'pretext', 'contrastive', 'masked', 'autoencoders'
after = 'transfer', 'tutorials', 'benchmarks'


def modules():
    "Module ('core.method') -> its file and its notebook"
    out = {}
    for p in (ROOT/'ssl_nb').rglob('*.py'):
        nb = re.search(r'File to edit: (\S+\.ipynb)\.', p.read_text(encoding='utf-8'))
        if nb: out['.'.join(p.relative_to(ROOT/'ssl_nb').with_suffix('').parts)] = p, (p.parent/nb[1]).resolve()
    return out


def layer(mod, nb):
    folder,name = mod.split('.')[0], mod.split('.')[-1]
    if folder=='core': return next((i for i,names in enumerate(first) if name in names), 1 if nb.name[:2] < '07' else 2)
    return 3 if folder in families else 4 + after.index(folder)


def imports(path, mod):
    "(module of this package, inside a function?) for each import in `path`"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        names = []
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        if isinstance(n, ast.ImportFrom):
            up = mod.split('.')[:-n.level]
            base = '.'.join(['ssl_nb', *up, *([n.module] if n.module else [])]) if n.level else n.module
            names = [base, *(f'{base}.{a.name}' for a in n.names)]
        for name in names:
            if name.startswith('ssl_nb.'): yield name.removeprefix('ssl_nb.'), n in inside


def allowed(mod, nb, other, other_nb, lazy):
    if layer(other, other_nb) != layer(mod, nb): return layer(other, other_nb) < layer(mod, nb)
    if mod.startswith('core.'): return other_nb.name < nb.name or lazy
    return nb.parent==other_nb.parent and other_nb.name.startswith(('00_','01_'))


def test_layers_import_only_downwards():
    mods = modules()
    assert 'core.method' in mods, 'no generated module was found: run nbdev-export'
    wrong = [f'{mod} imports {other}' for mod,(path,nb) in mods.items() for other,lazy in imports(path, mod)
             if other in mods and other!=mod and not allowed(mod, nb, other, mods[other][1], lazy)]
    assert not wrong, ('\n' + '\n'.join(sorted(set(wrong))) + '\nOrder: core.method > data, views, masks, encoders, heads > '
                       'the rest of core > methods > transfer > tutorials, benchmarks; methods share only the first notebooks (00, 01) of their family.')


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


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_files_that_are_named_exist(name):
    named = re.findall(r'\b((?:nbs|tests|ssl_nb)/[a-z0-9_./-]+\.(?:ipynb|py))\b', (ROOT/name).read_text(encoding='utf-8'))
    missing = [f for f in named if not (ROOT/f).exists()]
    assert named and not missing, f'{name} names files that do not exist: {missing}'
