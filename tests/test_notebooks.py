"Each notebook is a test: it is run from a fresh kernel, and every cell has to pass. `pytest -k simclr` runs one."
import asyncio
import os
import re
import sys
import time
import warnings

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from conftest import ROOT

LIMIT, SLOW = 300, 60  # seconds: a notebook fails after the first, and is reported after the second
notebooks = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))


class ThisPython(AsyncKernelManager):
    "A kernel of the Python that runs the tests, whatever kernels the user has registered"
    @property
    def kernel_spec(self):
        return KernelSpec(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
                          display_name='python3', language='python')


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


def files(folder): return {p for p in folder.iterdir() if p.suffix!='.ipynb' and p.name[0]!='.'}


@pytest.mark.parametrize('path', notebooks, ids=[p.relative_to(ROOT/'nbs').as_posix() for p in notebooks])
def test_notebook(path, record_property):
    nb = nbformat.read(path, 4)
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
    left = files(path.parent) - before
    assert not left, f'{path.name} leaves {sorted(p.name for p in left)} in nbs/; let it write to a temporary folder'
