"What the tests share: where things are, one thread for each of pytest's processes, the seconds of each notebook in the summary."
import os
import warnings
from pathlib import Path

import pytest

# These networks are as fast on one thread as on two, so pytest runs as many tests at once as there are cores. Set before torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

ROOT = Path(__file__).resolve().parent.parent
seconds = {}  # notebook -> seconds, gathered from the reports of all processes


@pytest.fixture(scope='session')
def root(): return ROOT


def quiet(f, *args, **kwargs):
    "(result, what was warned of)"
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter('always')
        res = f(*args, **kwargs)
    return res, [str(w.message) for w in record if w.category is UserWarning]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No network, and an empty folder of fetched weights"
    def unreachable(*args, **kwargs): raise ConnectionError('Name or service not known')
    def sleep(seconds): raise AssertionError('it tries again and again')
    from huggingface_hub import constants
    monkeypatch.setattr('ssl_nb.core.encoder_images.get_session', unreachable)
    monkeypatch.setattr('time.sleep', sleep)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    yield tmp_path/'hub'
    assert not constants.HF_HUB_OFFLINE, 'the hub stays switched off'


def put_in_hub(hub, name, weights):
    "Weights in the hub's cache, as timm would have fetched them"
    from safetensors.torch import save_file
    cache = hub/f'models--timm--{name}'
    for d in ('refs', 'snapshots/abc'): (cache/d).mkdir(parents=True)
    (cache/'refs'/'main').write_text('abc')
    save_file({k: v.contiguous() for k,v in weights.items()}, cache/'snapshots'/'abc'/'model.safetensors')


@pytest.hookimpl(optionalhook=True) # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    "Notebooks go to whichever process is free; the tests of another file stay together, for they share what they trained"
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split('::')[0]
            return nodeid if file.endswith('test_notebooks.py') else file
    return ByFile(config, log)


def pytest_runtest_logreport(report):
    if report.when=='call': seconds.update({v: t for k,(v,t) in report.user_properties if k=='seconds'})


def pytest_terminal_summary(terminalreporter):
    if not seconds: return
    terminalreporter.section('seconds per notebook')
    for name,s in sorted(seconds.items()): terminalreporter.write_line(f'{s:7.1f}  {name}')
    terminalreporter.write_line(f'{sum(seconds.values()):7.1f}  together')
