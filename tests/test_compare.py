"`ssl_nb compare` as a user meets it: folders with and without labels, what does not fit, going on where it stopped."
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from ssl_nb.app.cli import main
from ssl_nb.app.compare import compare, ranking
from ssl_nb.app.runner import settings


def photos(folder, n=24, classes=0, channels=3):
    "Noise of one colour a class"
    rng = np.random.default_rng(0)
    for i in range(n):
        sub = folder/f'class{i%classes}' if classes else folder
        sub.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        if classes: x[..., i%classes] += 150
        Image.fromarray(x if channels==3 else x[..., 0]).save(sub/f'{i}.png')
    return folder


def run(folder, out, *more): return main([str(a) for a in ('compare', '--data', folder, '--out', out, '--epochs', 1, '--device', 'cpu', '--workers', 1, *more)])


def test_unlabelled_folder(tmp_path, capsys):
    out = tmp_path/'out'
    assert run(photos(tmp_path/'photos'), out, '--methods', 'simclr,rotation') == 0
    said = capsys.readouterr().out
    assert 'probe' not in said and 'by agreement' in said and 'Next: ssl_nb pretrain' in said
    assert {'ranking.png', 'ranking.csv', 'compare.json'} <= {f.name for f in out.iterdir()}


def test_ten_labels_a_class_are_enough(tmp_path, capsys):
    out = tmp_path/'out'
    assert run(photos(tmp_path/'photos', 24, 2), out, '--methods', 'simclr') == 0
    table = pd.read_csv(out/'ranking.csv')
    assert table.probe[0] > 80  # the classes differ in colour
    assert 'probe' in capsys.readouterr().out


def test_what_does_not_fit_is_left_out_with_its_reason(tmp_path, capsys):
    assert run(photos(tmp_path/'photos', channels=1), tmp_path/'out', '--methods', 'simclr,colorization') == 0
    said = capsys.readouterr().out
    assert 'Left out: colorization' in said and 'colour' in said


def test_goes_on_where_it_stopped(tmp_path):
    cfg = settings(photos(tmp_path/'photos'), epochs=1, device='cpu')
    compare(cfg, ['simclr'], tmp_path/'out', workers=1, bar=False)
    file = tmp_path/'out'/'compare.json'
    marked = json.loads(file.read_text())
    marked.pop('checksum')  # it is changed by hand
    for r in marked['runs']: r['rankme'] = -1.0
    file.write_text(json.dumps(marked))
    again = compare(cfg, ['simclr', 'byol'], tmp_path/'out', workers=1, bar=False)
    assert {r['method']: r['rankme']==-1.0 for r in again['runs']} == {'raw input': True, 'random encoder': True, 'simclr': True, 'byol': False}
    assert set(ranking(again).index) == {'simclr', 'byol'}


def test_several_seeds_are_one_row_and_say_so(tmp_path, capsys):
    out = tmp_path/'out'
    folder = photos(tmp_path/'my photos', 24, 2)
    assert run(folder, out, '--methods', 'simclr,rotation') == 0
    first = json.loads((out/'compare.json').read_text())['runs']
    assert 'trained once' in capsys.readouterr().out
    assert run(folder, out, '--methods', 'simclr,rotation', '--seeds', 2) == 0  # what is there is kept
    said,results = capsys.readouterr().out,json.loads((out/'compare.json').read_text())
    assert 'trained once' not in said and f"pretrain {ranking(results).index[0]} --data '{folder}'" in said
    assert [r['seed'] for r in results['runs']] == [0]*4 + [1]*4
    kept = [k for k in first[0] if k != 'agreement']
    assert all(a[k]==b[k] for a,b in zip(first, results['runs']) for k in kept)
    assert sorted(ranking(results).index) == ['rotation', 'simclr']
    assert sorted(pd.read_csv(out/'ranking.csv').method) == ['rotation', 'simclr']


@pytest.mark.parametrize('args,message', [(['--data', 'nowhere'], "no data at 'nowhere'"), (['--methods', 'simcrl'], 'did you mean simclr'),
                                          (['--methods', 'rotation,bert'], 'images and text'), (['--epochs', '0'], 'epochs must be at least 1'),
                                          (['--size', '0'], 'size must be at least 4'), (['--seeds', '0'], 'seeds must be at least 1'),
                                          (['--data', 'digits:3,x'], "unknown class of digits 'x'")])
def test_bad_arguments(args, message, capsys):
    assert main(['compare', *args]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    here = tmp_path_factory.mktemp('compared')
    cfg = settings(photos(here/'photos'), epochs=1, samples=1000, device='cpu')
    compare(cfg, ['rotation'], here/'out', workers=1, bar=False)
    return here


@pytest.mark.parametrize('file', ['compare.json', 'neighbours/rotation-0.npy'])
@pytest.mark.parametrize('how', ['truncated', 'empty', 'zeros', 'text', 'flipped', 'missing'])
def test_damaged_results_are_named(compared, tmp_path, file, how, capsys):
    if (file, how) in (('compare.json', 'missing'), ('neighbours/rotation-0.npy', 'flipped')): pytest.skip('begins anew; changes one neighbour')
    out = Path(shutil.copytree(compared/'out', tmp_path/'out'))
    b = (out/file).read_bytes()
    at = b.index(b'"rankme"')+15 if file=='compare.json' else 0
    flipped = b[:at] + bytes([b[at]^1]) + b[at+1:]
    if how == 'missing': (out/file).unlink()
    else: (out/file).write_bytes(dict(truncated=b[:len(b)//2], empty=b'', zeros=bytes(len(b)), text=b'nothing of this\n', flipped=flipped)[how])
    capsys.readouterr()
    assert run(compared/'photos', out, '--methods', 'rotation') == 2
    err = capsys.readouterr().err
    assert str(out/file) in err and 'compare again' in err and err.count('\n') == 1


def test_output_folder_is_tried_first(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    start = time.perf_counter()
    assert run(photos(tmp_path/'photos'), tmp_path/'file'/'out', '--methods', 'rotation') == 2
    assert 'cannot write to the output folder' in capsys.readouterr().err and time.perf_counter()-start < 5


def test_failed_comparison_leaves_no_folder(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert run(tmp_path/'empty', tmp_path/'a'/'out', '--methods', 'rotation') == 2
    assert not (tmp_path/'a').exists() and str(tmp_path/'empty') in capsys.readouterr().err


pools = dict(runs='from ssl_nb.app.runner import run_all', images='from ssl_nb.data.images import _pool')
calls = dict(runs='list(run_all(work, [(0,),(1,)], 2, bar=False))', images='list(_pool(5000, 2).map(work, [0, 1]))')


@pytest.mark.parametrize('what,how', [('runs', signal.SIGKILL), ('runs', signal.SIGTERM), ('images', signal.SIGKILL)])
def test_workers_end_with_their_parent(what, how, tmp_path):
    "However a process is killed, none of its workers is left, not even in the middle of a job"
    (tmp_path/'job.py').write_text(f'import pathlib, time\n{pools[what]}\n'
                                   'def work(i):\n    pathlib.Path(f"begun{i}").touch()\n    time.sleep(300)\n'
                                   f'if __name__=="__main__": {calls[what]}')
    parent = subprocess.Popen([sys.executable, '-W', 'ignore', 'job.py'], cwd=tmp_path)
    while not all((tmp_path/f'begun{i}').exists() for i in (0, 1)): time.sleep(0.1)
    me = psutil.Process(parent.pid)
    everything = me.children(recursive=True)
    assert len(everything) >= 2
    parent.send_signal(how)
    parent.wait()
    _, alive = psutil.wait_procs(everything, timeout=20)
    for p in alive: p.kill()
    assert not alive
