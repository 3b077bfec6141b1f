"Each notebook is a test: it is run from a fresh kernel, and every cell has to pass. `pytest -k simclr` runs one."
import asyncio
import copy
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from conftest import ROOT

KERNELS = ROOT/'tests'/'kernels.py'
LIMIT, SLOW = 300, 60  # seconds: a notebook fails after the first, and is reported after the second
notebooks = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))


class ThisPython(AsyncKernelManager):
    "A kernel of the Python that runs the tests, whatever kernels the user has registered"
    server = None  # where kernels are forked from a process that has imported the libraries
    @property
    def kernel_spec(self):
        start = ['-m', 'ipykernel_launcher', '-f'] if self.server is None else [str(KERNELS), 'kernel', self.server]
        return KernelSpec(argv=[sys.executable, *start, '{connection_file}'], display_name='python3', language='python')


@pytest.fixture(scope='session', autouse=sys.platform=='linux')
def server():
    "One for each process of pytest; where it does not start within a minute, each kernel imports for itself"
    with tempfile.TemporaryDirectory() as folder:
        address = f'{folder}/kernels'
        process = subprocess.Popen([sys.executable, str(KERNELS), 'serve', address], env=kernel_env(), stdout=subprocess.DEVNULL)
        until = time.perf_counter() + 60
        while not os.path.exists(address) and process.poll() is None and time.perf_counter() < until: time.sleep(0.2)
        ThisPython.server = address if os.path.exists(address) else None
        yield
        ThisPython.server = None
        process.kill()
        process.wait()


def kernel_env():
    env = {**os.environ, 'IN_TEST': '1', 'HF_HUB_OFFLINE': '1', 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}
    env.pop('MPLBACKEND', None)  # or figures would not come inline
    return env


def plain(text): return re.sub(r'\x1b\[[0-9;]*m', '', text)


def printed(cell):
    "What a cell has shown, as text"
    out = []
    for o in cell.get('outputs', []):
        if o.output_type=='stream': out.append(o.text)
        elif o.output_type=='error': out.append('\n'.join(o.traceback))
        else: out.append(o.data.get('text/plain', ''))
    return plain('\n'.join(out))


def shows(cell):
    "Has the cell a result, warnings aside?"
    return any(o.output_type in ('display_data', 'execute_result') or (o.output_type=='stream' and o.name=='stdout')
               for o in cell.get('outputs', []))


def failure(nb, n, why):
    cell = nb.cells[n]
    pytest.fail(f'{why}\n--- cell {n} ---\n{cell.source}\n--- its output ---\n{printed(cell)[-6000:]}', pytrace=False)


def run(nb, path):
    "Execute the cells of `nb`, in place; returns the seconds"
    at = {'cell': 0}
    async def on_start(cell, cell_index): at['cell'] = cell_index
    km = ThisPython()
    client = NotebookClient(nb, km=km, timeout=None, resources={'metadata': {'path': str(path.parent)}},
                            on_cell_start=on_start, startup_timeout=120)
    async def go():
        try: await asyncio.wait_for(client.async_execute(env=kernel_env()), LIMIT)
        finally: await km.shutdown_kernel(now=True) # nbclient leaves a kernel alive that it was given
    start,why = time.perf_counter(),None
    try: asyncio.run(go())
    except CellExecutionError: why = 'raised an error'
    except (DeadKernelError, asyncio.TimeoutError): why = 'killed the kernel'
    took = time.perf_counter() - start
    if why and took >= LIMIT: why = f'was still running after {LIMIT} s'
    if why: failure(nb, at['cell'], f'{path.name}: cell {at["cell"]} {why}')
    return took


NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*[\w])')
TRAINS = re.compile(r'(?<!def )\b(?:\w*fit\w*|\w*train\w*|\w*report\w*|\w*tune\w*|\w*run\w*|compare\w*|supervised\w*|estimate|advice)\(|subprocess|^!', re.M)
VARIES = re.compile(r'perf_counter|process_time|time\.time|%time|__version__|timeit|threads|memory|mkdtemp|TemporaryDirectory')


def comparable(nb):
    "Numbers of the code cells that do not depend on the machine: those before anything is trained or reported, clocks aside"
    for n,c in enumerate(nb.cells):
        if c.cell_type!='code' or re.search(r'^#\|\s*(?:export|eval:\s*false)', c.source, re.M|re.I): continue
        if TRAINS.search(c.source): return
        if not VARIES.search(c.source): yield n


def said(cell):
    "What a cell has shown, in words and numbers; addresses, warnings and bars of progress left out"
    out = [o.text if o.output_type=='stream' else o.data.get('text/plain', '') for o in cell.get('outputs', [])
           if o.output_type!='error' and not (o.output_type=='stream' and o.name=='stderr')]
    text = re.sub(r'0x[0-9a-f]+|/\S+/\S*|<IPython.core.display.HTML object>', '', plain('\n'.join(out)))
    return ' '.join(NUMBER.sub('#', text).split()), [float(v) for v in NUMBER.findall(text)]


def stale(old, new):
    "How a stored output differs from what the cell shows today; None if by rounding only"
    (words,numbers),(now,values) = said(old), said(new)
    if words!=now: return f'the file holds\n{words[:1500]}\nand it shows\n{now[:1500]}'
    off = [(a, b) for a,b in zip(numbers, values) if abs(a-b) > 0.02+0.02*max(abs(a), abs(b))]
    if off: return f'the file holds {off[0][0]:g} where it shows {off[0][1]:g}'


def files(folder): return {p for p in folder.iterdir() if p.suffix!='.ipynb' and p.name[0]!='.'}


@pytest.mark.parametrize('path', notebooks, ids=[p.relative_to(ROOT/'nbs').as_posix() for p in notebooks])
def test_notebook(path, record_property):
    nb = nbformat.read(path, 4)
    kept = copy.deepcopy(nb)
    stored = [shows(c) for c in nb.cells]
    for c in nb.cells:
        if c.cell_type=='code' and re.search(r'^#\|\s*eval:\s*false', c.source, re.M|re.I): c.cell_type = 'raw'
    before = files(path.parent)
    took = run(nb, path)
    record_property('seconds', (path.relative_to(ROOT).as_posix(), round(took, 1)))
    if took > SLOW: warnings.warn(f'{path.name} took {took:.0f} s; it should take at most {SLOW} s on 2 cores')
    for n,(c,s) in enumerate(zip(nb.cells, stored)):
        if c.cell_type=='code' and shows(c) and not s:
            failure(nb, n, f'{path.name}: cell {n} has a result that the file does not hold. Run the whole notebook and save it.')
    for n in comparable(kept):
        why = stale(kept.cells[n], nb.cells[n])
        if why: failure(nb, n, f'{path.name}: the stored output of cell {n} is not of today: {why}. Run the whole notebook and save it.')
    left = files(path.parent) - before
    assert not left, f'{path.name} leaves {sorted(p.name for p in left)} in nbs/; let it write to a temporary folder'


def code(source, text): return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output('stream', text=text)])


@pytest.mark.parametrize('old, new, same', [
    ('loss 0.693, 12 clips', 'loss 0.694, 12 clips', True), ('loss 0.693', 'loss 0.793', False), ('loss 0.693', 'cost 0.693', False),
    ('1 2 3', '1 2', False), ('<f at 0x7f2ab>', '<f at 0x81cde>', True), ('in /tmp/a1/x.csv', 'in /tmp/b2/x.csv', True),
    ('32x32 grey', '28x28 grey', False), ('[1, 0.5]', '[1, 0.9]', False), ('1e-07', '2e-07', True), ('200', '203', True), ('200', '210', False)])
def test_a_stored_output_of_other_code_is_found(old, new, same):
    assert (stale(code('f()', old), code('f()', new)) is None) == same


def test_what_is_trained_or_timed_is_not_compared():
    sources = ['f()', '#| export\ndef fit(): train()', 'time.perf_counter()', 'g()', 'learn.fit_one_cycle(3)', 'h()']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('#'), *(code(s, '') for s in sources)])
    assert list(comparable(nb)) == [1, 4]
