"`ssl_nb compare` as a user meets it: folders with and without labels, what does not fit, going on where it stopped."
import json
import re
import shlex
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

from ssl_nb.app import cli
from ssl_nb.app.cli import main
from ssl_nb.app.compare import advice, compare, measure, next_command, printed, ranking, text_ranking
from ssl_nb.app.runner import load, run_one, settings
from ssl_nb.benchmarks.brief import held, table


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


def test_label_says_what_ranks(capsys, tmp_path):
    "Of `scenes` raw pixels know the colour and not the digit; the first label is the default"
    cfg = settings('scenes', samples=300, epochs=1, device='cpu', label='colour')
    assert cfg['label']=='colour' and 'label' not in settings('scenes', samples=300, epochs=1, device='cpu')
    dls = load(cfg)
    found = {k: measure(None, dls, label=k)[0]['probe'] for k in ('digit', 'colour')}
    assert found['colour'] > found['digit']+10
    assert measure(None, dls)[0]['probe']==found[next(iter(dls.info.classes))]
    assert run('scenes', tmp_path/'out', '--samples', 100, '--methods', 'rotation', '--label', 'colur')
    said = capsys.readouterr()
    assert "unknown label 'colur'; did you mean colour?" in said.err
    assert not (tmp_path/'out/compare.json').exists() and 'rotation' not in said.out # before anything is trained


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
                                          (['--seconds', '0'], 'seconds must be at least 0.1'), (['--seconds', 'nan'], 'seconds must be a number'),
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


damages = [('compare.json', how) for how in ('truncated', 'empty', 'zeros', 'text', 'flipped')] + [('neighbours/rotation-0.npy', how) for how in ('truncated', 'flipped')]


@pytest.mark.parametrize('file,how', damages)
def test_damaged_results_are_named(compared, tmp_path, file, how, capsys):
    out = Path(shutil.copytree(compared/'out', tmp_path/'out'))
    b = (out/file).read_bytes()
    at = b.index(b'"rankme"')+15 if file=='compare.json' else len(b)-2  # in the last neighbour
    flipped = b[:at] + bytes([b[at]^1]) + b[at+1:]
    (out/file).write_bytes(dict(truncated=b[:len(b)//2], empty=b'', zeros=bytes(len(b)), text=b'nothing of this\n', flipped=flipped)[how])
    capsys.readouterr()
    assert run(compared/'photos', out, '--methods', 'rotation') == 2
    err = capsys.readouterr().err
    assert str(out/file) in err and 'compare again' in err and err.count('\n') == 1


def test_neighbours_that_were_deleted_are_made_again(compared, tmp_path):
    out = Path(shutil.copytree(compared/'out', tmp_path/'out'))
    def times(): return {r['method']: r.get('seconds') for r in json.loads((out/'compare.json').read_text())['runs']}
    before = times()
    (out/'neighbours'/'rotation-0.npy').unlink()
    compare(settings(compared/'photos', epochs=1, samples=1000, device='cpu'), ['rotation'], out, workers=1, bar=False)
    assert {k: v==before[k] for k, v in times().items()} == {'raw input': True, 'random encoder': True, 'rotation': False}


def test_output_folder_is_tried_first(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    start = time.perf_counter()
    assert run(photos(tmp_path/'photos'), tmp_path/'file'/'out', '--methods', 'rotation') == 2
    assert 'cannot write to the output folder' in capsys.readouterr().err and time.perf_counter()-start < 5


def test_failed_comparison_leaves_no_folder(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert run(tmp_path/'empty', tmp_path/'a'/'out', '--methods', 'rotation') == 2
    assert not (tmp_path/'a').exists() and str(tmp_path/'empty') in capsys.readouterr().err


def timed(methods, **kwargs):
    "Runs on 300 digits by name"
    cfg = settings('digits', samples=300, device='cpu', **kwargs)
    return {n: run_one(n, 0, cfg, lambda *args: ({}, None))[0] for n in methods}


def test_every_method_trains_for_the_same_time():
    runs = timed(['vae', 'mae', 'byol'], seconds=1.5)
    assert {n: r['batch_size'] for n, r in runs.items()} == {'vae': 32, 'mae': 75, 'byol': 64}  # of their recipes; 128 would make two steps an epoch
    assert all(0.6 < r['seconds'] < 2.5 for r in runs.values()), runs
    equal = timed(['vae', 'mae'], epochs=1)
    assert [r['epochs'] for r in equal.values()] == [1, 1] and runs['mae']['epochs'] > 1
    assert timed(['mae'], epochs=2, seconds=1000)['mae']['epochs'] == 2  # whichever comes first


def test_small_sets_have_several_steps_an_epoch(tmp_path):
    folder = photos(tmp_path/'photos', 40, 2)
    for n, given in (('simclr', {}), ('barlow', {}), ('simclr', dict(batch_size=16))):
        cfg = settings(folder, epochs=1, device='cpu', **given)
        bs, train = run_one(n, 0, cfg, lambda *args: ({}, None))[0]['batch_size'], load(cfg).train.n
        assert bs == given.get('batch_size', train//4), n


def test_the_same_command_in_seconds_goes_on(tmp_path, capsys):
    folder, out = photos(tmp_path/'photos', 24, 2), tmp_path/'out'
    args = ['compare', '--data', str(folder), '--out', str(out), '--seconds', '0.3', '--device', 'cpu', '--workers', '1', '--methods']
    assert main([*args, 'vae']) == 0
    first = json.loads((out/'compare.json').read_text())
    assert first['config']['seconds'] == 0.3 and first['config']['epochs'] is None
    capsys.readouterr()
    assert main([*args, 'vae']) == 0  # nothing is left to do, so nothing is announced
    assert 'ready at' not in capsys.readouterr().out
    assert main([*args, 'vae,rotation']) == 0
    assert ': 1 method, 0.3 seconds each' in capsys.readouterr().out
    runs = json.loads((out/'compare.json').read_text())['runs']
    assert [r['method'] for r in runs] == ['raw input', 'random encoder', 'vae', 'rotation']
    assert all(r[k]==old[k] for r, old in zip(runs, first['runs']) for k in old if k != 'agreement')
    assert main([*args[:5], '--epochs', '1', *args[7:], 'vae']) == 2 and 'other settings' in capsys.readouterr().err


def test_the_wait_is_told_and_nothing_is_drawn_into_files(tmp_path):
    args = ['compare', '--data', 'digits', '--samples', '200', '--methods', 'simclr,vae,rotation,denoising', '--out', 'out', '--epochs', '1', '--device', 'cpu']
    run = 'import sys; from ssl_nb.app.cli import main; sys.exit(main())'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', run, *args, '--workers', '1'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    said = re.fullmatch(r'digits: 4 methods, 1 epoch each \((.*)\), about (\d+) s on cpu, ready at \d\d:\d\d -> out', first)
    assert said and [k.split()[0] for k in said[1].split(', ')] == ['simclr', 'vae', 'rotation', 'denoising'], first
    assert 1 <= int(said[2]) <= 60
    assert not any(c in done.stdout+done.stderr for c in '\r█') and '%' not in done.stdout


given = [(dict(size=64), 'ssl_nb pretrain simclr --data mnist --size 64'),
         (dict(encoder='resnet18'), 'ssl_nb pretrain simclr --data mnist --encoder resnet18'),
         (dict(batch_size=32), 'ssl_nb pretrain simclr --data mnist --batch-size 32 --lr 0.005'), # scaled as in the comparison
         (dict(batch_size=128), 'ssl_nb pretrain simclr --data mnist'), (dict(lr=0.02), 'ssl_nb pretrain simclr --data mnist --lr 0.02')]


@pytest.mark.parametrize('settings_given,command', given)
def test_next_command_repeats_what_was_given(settings_given, command, monkeypatch):
    monkeypatch.setattr('ssl_nb.app.compare.pick_device', lambda *a: 'cpu')
    cfg = settings('mnist', ['simclr'], epochs=1, device='cpu', **settings_given)
    assert next_command(dict(config=cfg, runs=[best('simclr')])) == command


def best(name): return dict(method=name, seed=0, probe=90., agreement=0.1, views=0.5, diagnosis=None) | {'± probe': 1.}


def test_next_command_with_odd_names(tmp_path, monkeypatch):
    folder = photos(tmp_path/"my cat's photos")
    cfg = settings(folder, epochs=1, device='cpu', encoder='resnet18', size=24)
    monkeypatch.setattr('ssl_nb.app.compare.pick_device', lambda *a: 'cuda')  # there is a better device, and cpu was asked for
    for name, more in (('mae:ratio=0.5', ['--size', '24', '--device', 'cpu', '--set', 'ratio=0.5']), # it has a ViT of its own
                       ('simclr:temp=0.1', ['--size', '24', '--encoder', 'resnet18', '--device', 'cpu', '--set', 'temp=0.1'])):
        words = shlex.split(next_command(dict(config=cfg, runs=[best(name)])))
        assert words == ['ssl_nb', 'pretrain', name.split(':')[0], '--data', str(folder), *more]
        cli.parser().parse_args(words[1:])


def test_advice_of_a_single_method_claims_no_lead():
    cfg = settings('mnist', ['simclr'], epochs=1, device='cpu')
    refs = [best(n) | dict(probe=50.) for n in ('raw input', 'random encoder')]
    said = advice(dict(config=cfg, runs=[*refs, best('simclr')]))
    assert 'comes first' not in said and 'Next: ssl_nb pretrain simclr' in said


def test_printed_ranking_fits_the_screen():
    names = ['simclr:temp=0.1;dim=64;views=None;something=True', 'sparse_autoencoder', 'simclr:temp=0.1;dim=64;views=None;something=None']
    numbers = dict(seed=0, probe=99.97, agreement=0.5, views=0.5, rankme=1234.5, std=0.3, accuracy=0.5, seconds=123456., epochs=10000) | {'± probe': 11.1}
    for labels in (True, False):
        runs = [dict(method=n, diagnosis='dimensional') | numbers for n in names] + [dict(method='raw input') | numbers]
        if not labels: runs = [{k: v for k, v in r.items() if 'probe' not in k} for r in runs]
        head, *lines = printed(text_ranking(dict(runs=runs))).splitlines()
        assert all(len(o) <= 100 for o in (head, *lines)), max(map(len, lines))
        ends = [m.end() for m in re.finditer(r'\S+', head)]
        starts = [0, *ends[:-1]]
        assert len(ends) == len(head.split()) and len({o[:starts[1]-8] for o in lines}) == 4  # names stay apart
        for o in lines: assert all(o[e:e+2].strip() == '' for e in ends[:-1]), o


tables = dict(texture=('file,texture,label', lambda i: f'{i}.png,rough {i%3},{i%2}', 'images'),
              captions=('file,caption,label', lambda i: f'{i}.png,a thing of kind {i%2} and number {i},{i%2}', 'pairs'),
              texts=('title,text,label', lambda i: f'title {i},the text of number {i} is long enough {"good" if i%2 else "bad"},{i%2}', 'text'))


@pytest.mark.parametrize('what', tables)
def test_kind_of_tables_with_words_in_several_columns(what, tmp_path, capsys):
    head, row, kind = tables[what]
    folder, out = photos(tmp_path/'photos', 40), tmp_path/'out'
    file = folder/'list.csv' if what!='texts' else tmp_path/'texts.csv'
    file.write_text('\n'.join([head, *map(row, range(40))]))
    assert settings(file)['kind'] == kind
    assert run(file, out, '--methods', 'simclr') == 0
    results = json.loads((out/'compare.json').read_text())
    assert [r['method'] for r in results['runs']] == ['raw input', 'random encoder', 'simclr'] and all('error' not in r for r in results['runs'])
    assert 'probe' in results['runs'][2]


def test_texts_beside_pictures_are_no_texts_to_learn_from(tmp_path):
    folder = photos(tmp_path/'photos', 24, 2)
    for f in sorted(folder.rglob('*.png')): f.with_suffix('.txt').write_text(f'a picture called {f.stem}')
    assert settings(folder)['kind'] == 'pairs'
    for f in folder.rglob('*.txt'): f.rename(f.with_name(f'note {f.name}'))  # now they belong to no picture
    assert settings(folder)['kind'] == 'images'
    assert run(folder, tmp_path/'out', '--methods', 'simclr') == 0


def test_how_often_the_advice_held():
    def runs(data, first, second, middle, brief):
        long = [dict(data=data, length='long', place=p, method=m, test=t) for p, m, t in zip(('first', 'second', 'middle'), 'abc', (first, second, middle))]
        return [dict(data=data, length='brief', method=m, test=t) for m, t in (('raw input', 50.), ('a', brief), ('b', 9.), ('c', 8.))] + long
    t = table(dict(runs=runs('one', 80., 70., 75., 60.) + runs('two', 60., 66., 50., 65.) + runs('begun', 1., 2., 3., 4.)[:-1]))
    assert list(t.index) == ['one', 'two'] and list(t.lost) == [0., 6.]  # what is not complete does not count
    assert held(t) == dict(sets=2, methods=6, first=1, pairs=4, lost=3.0, better=1)


pools = dict(runs='from ssl_nb.app.runner import run_all', images='from ssl_nb.data.reading import _pool')
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
