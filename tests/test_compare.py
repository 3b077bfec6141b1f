"`ssl_nb compare` as a user meets it: folders with and without labels, what does not fit, going on where it stopped."
import json

import numpy as np
import pandas as pd
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
                                          (['--size', '0'], 'size must be at least 1'), (['--seeds', '0'], 'seeds must be at least 1'),
                                          (['--data', 'digits:3,x'], "unknown class of digits 'x'")])
def test_bad_arguments(args, message, capsys):
    assert main(['compare', *args]) == 2
    assert message in capsys.readouterr().err
