"What the command line promises: the default run, its folder, SIGKILL and resume, and clear words for bad input."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from safetensors.torch import load_file

import ssl_nb.core.encoders # registers the small encoders with timm
from ssl_nb.app.cli import main
from ssl_nb.core.loader import digits_dls
from ssl_nb.core.method import check_method, find_methods, get_method
from ssl_nb.app.run import build, run_config

command = [sys.executable, '-c', 'import sys; from ssl_nb.app.cli import main; sys.exit(main())'] # what the command ssl_nb does


@pytest.fixture(scope='module')
def default_run(tmp_path_factory):
    "The README's first command"
    cwd = tmp_path_factory.mktemp('default')
    out = subprocess.run([*command, 'pretrain', 'simclr'], cwd=cwd, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return cwd/'runs'/'simclr-mnist', out.stdout


def test_default_run_beats_pixels(default_run):
    "By 10 points with ten labels per class and by 20 with one, on the test split"
    table = json.loads((default_run[0]/'report.json').read_text())['table']
    ours, raw = table['this encoder'], table['raw input']
    for n, points in ((10, 10), (1, 20)):
        for how in ('knn', 'probe'): assert ours[f'{how} {n}'] >= raw[f'{how} {n}'] + points, (how, n, ours, raw)


def test_default_run_is_short_and_reports(default_run):
    run, printed = default_run
    rows = pd.read_csv(run/'history.csv')
    assert len(rows) == get_method('simclr').recipe['epochs']
    assert (rows['samples/s'] > 0).all()
    seconds = (3456/rows['samples/s']).sum() # 27 batches of 128
    assert seconds < 60, f'training took {seconds:.0f} s'
    for word in ('raw input', 'random encoder', 'this encoder', 'supervised', 'logistic regression', 'test split'): assert word in printed


def test_run_folder(default_run):
    run, _ = default_run
    names = {p.name for p in run.iterdir()}
    assert names == {'config.json', 'history.csv', 'checkpoint.pt', 'encoder', 'report.json', 'pretext.png', 'training.png', 'embedding.png'}
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    model = timm.create_model(f'local-dir:{run/"encoder"}', pretrained=True)
    for k, v in load_file(run/'encoder'/'model.safetensors').items():
        assert torch.equal(model.state_dict()[k], v) and torch.equal(state['model'][f'encoder.model.{k}'], v)


def test_report_again_gives_the_same_numbers(default_run):
    run, _ = default_run
    first = json.loads((run/'report.json').read_text())
    assert main(['report', str(run), '--device', 'cpu']) == 0
    again = json.loads((run/'report.json').read_text())
    assert first['protocol'] == again['protocol']
    for row in ('raw input', 'this encoder'):
        for k, v in first['table'][row].items(): assert again['table'][row][k] == pytest.approx(v, rel=1e-3, abs=1e-2)


def test_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    args = ['pretrain', 'simclr', '--data', 'digits', '--epochs', '8', '--device', 'cpu', '--save-seconds', '0']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    subprocess.run([*command, *args, '--out', str(whole)], check=True, capture_output=True)
    resumes = 0
    for epochs in (2, 5): # wait until so many epochs are saved, and a little, then kill
        p = subprocess.Popen([*command, *args, '--out', str(killed), '--resume'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while p.poll() is None:
            rows = len(pd.read_csv(killed/'history.csv')) if (killed/'checkpoint.pt').exists() else 0
            if rows >= epochs: break
            time.sleep(0.02)
        time.sleep(np.random.default_rng(epochs).uniform(0, 0.3))
        p.send_signal(signal.SIGKILL)
        resumes += p.wait() == -signal.SIGKILL
    assert resumes == 2, 'the run was over before it could be killed'
    subprocess.run([*command, *args, '--out', str(killed), '--resume'], check=True, capture_output=True)
    a, b = [torch.load(o/'checkpoint.pt', weights_only=True) for o in (whole, killed)]
    assert a['model'].keys() == b['model'].keys()
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert all(torch.equal(a['opt']['state'][i][k], b['opt']['state'][i][k]) for i in a['opt']['state'] for k in a['opt']['state'][i])
    assert (whole/'encoder'/'model.safetensors').read_bytes() == (killed/'encoder'/'model.safetensors').read_bytes()
    assert list(pd.read_csv(killed/'history.csv').epoch) == list(range(8))


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run(['ssl_nb', '--help'], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert out.returncode == 0 and 'pretrain' in out.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize('name', sorted(find_methods()))
def test_every_method_keeps_the_contract(name):
    cls = get_method(name)
    data = 'digits' if cls.modality in (None, 'images') and not cls.default_data else None # instant where that is possible
    dls, method = build(run_config(name, data, batch_size=32, device='cpu'))
    check_method(method, dls.one_batch())


def photos(folder, n=12, **kinds):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    return folder


def fails(capsys, *args):
    "The message of a command that must fail"
    assert main([str(a) for a in args]) == 2
    return capsys.readouterr().err


def test_bad_names(capsys, tmp_path):
    assert 'did you mean simclr' in fails(capsys, 'pretrain', 'simcrl')
    assert "unknown encoder 'resnet81'" in fails(capsys, 'pretrain', 'simclr', '--encoder', 'resnet81', '--out', tmp_path/'a')
    assert "no data at" in fails(capsys, 'pretrain', 'simclr', '--data', tmp_path/'missing', '--out', tmp_path/'b')
    assert "unknown device 'tpu'" in fails(capsys, 'pretrain', 'simclr', '--device', 'tpu')
    if not torch.cuda.is_available(): assert "'cuda' is not available" in fails(capsys, 'pretrain', 'simclr', '--device', 'cuda')
    assert 'epochs must be at least 1' in fails(capsys, 'pretrain', 'simclr', '--epochs', '0')


def test_empty_folder(capsys, tmp_path):
    (tmp_path/'empty').mkdir()
    assert str(tmp_path/'empty') in fails(capsys, 'pretrain', 'simclr', '--data', tmp_path/'empty', '--out', tmp_path/'run')


def test_batch_size_one(capsys, tmp_path):
    err = fails(capsys, 'pretrain', 'simclr', '--batch-size', 1, '--epochs', 1, '--out', tmp_path/'run', '--device', 'cpu')
    assert 'SimCLR' in err and 'at least 2, got 1' in err and 'batch_size' in err


def test_output_folder(capsys, tmp_path):
    (tmp_path/'file').write_text('')
    assert 'cannot write to the output folder' in fails(capsys, 'pretrain', 'simclr', '--out', tmp_path/'file'/'run')
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'config.json').write_text('{}')
    err = fails(capsys, 'pretrain', 'simclr', '--out', tmp_path/'old')
    assert 'already holds a run' in err and '--resume' in err


def test_nan_loss_keeps_the_last_good_checkpoint(capsys, tmp_path):
    out = tmp_path/'run'
    err = fails(capsys, 'pretrain', 'rotation', '--lr', '1e30', '--epochs', 4, '--out', out, '--device', 'cpu', '--save-seconds', 0)
    assert 'the loss is' in err or 'no longer finite' in err
    if (out/'checkpoint.pt').exists():
        state = torch.load(out/'checkpoint.pt', weights_only=True)
        assert all(t.isfinite().all() for t in state['model'].values() if t.is_floating_point())
    assert 'is not finished' in fails(capsys, 'report', out)


def test_unlabelled_photos_end_to_end(tmp_path, capsys):
    folder = photos(tmp_path/'photos', 24)
    (folder/'broken.png').write_bytes((folder/'0.png').read_bytes()[:500])
    with pytest.warns(UserWarning, match='broken.png'):
        assert main(['pretrain', 'simclr', '--data', str(folder), '--epochs', '1', '--batch-size', '8', '--out', str(tmp_path/'run'), '--device', 'cpu']) == 0
    assert set(json.loads((tmp_path/'run'/'report.json').read_text())['table']['this encoder']) == {'rankme', 'alignment', 'uniformity', 'std'}
    assert json.loads((tmp_path/'run'/'config.json').read_text())['info']['skipped'] == 1
    assert main(['embed', str(tmp_path/'run'), str(folder), '--out', str(tmp_path/'f.npz'), '--device', 'cpu']) == 0
    f = np.load(tmp_path/'f.npz')
    assert len(f['files']) == len(f['features']) == 24 and not any('broken' in n for n in f['files'])
