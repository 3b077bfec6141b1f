"What the tests share: where things are, and the seconds of each notebook in the summary."
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
seconds = {}  # notebook -> seconds, filled by test_notebooks


@pytest.fixture(scope='session')
def root(): return ROOT


def pytest_terminal_summary(terminalreporter):
    if not seconds: return
    terminalreporter.section('seconds per notebook')
    for name,s in seconds.items(): terminalreporter.write_line(f'{s:7.1f}  {name}')
    terminalreporter.write_line(f'{sum(seconds.values()):7.1f}  together')
