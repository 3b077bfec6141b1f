"What the command line promises: the default run, its folder, SIGKILL and resume, and clear words for bad input."
import json, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from safetensors.torch import load_file

import ssl_nb.core.encoders # registers the small encoders with timm
import ssl_nb.app.run as app_run
from ssl_nb.app.checks import write_record
from ssl_nb.app.cli import main, method_lines
from ssl_nb.core.loader import digits_dls
from ssl_nb.core.method import check_method, find_methods, get_method, kinds_of
from ssl_nb.app.embed import embed
from ssl_nb.app.folder import get_dls, guess_kind, read_config, run_config, run_folder
from ssl_nb.app.run import build, enough_steps, pretrain, run_method, what_was_read
from ssl_nb.app.runner import settings
from ssl_nb.core.learner import Checkpoint
from ssl_nb.data.images import image_listing

command = [sys.executable, '-c', 'import sys; from ssl_nb.app.cli import main; sys.exit(main())'] # what the command ssl_nb does


@pytest.fixture(scope='module')
def default_run(tmp_path_factory):
    "The README's first command"
    cwd = tmp_path_factory.mktemp('default')
    def spent(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    out = subprocess.run([*command, 'pretrain', 'simclr'], cwd=cwd, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return cwd/'runs'/'simclr-mnist', out.stdout, spent()-before


def test_default_run_beats_pixels(default_run):
    "By 10 points with ten labels per class and by 20 with one, on the test split"
    table = json.loads((default_run[0]/'report.json').read_text())['table']
    ours, raw = table['this encoder'], table['raw input']
    for n, points in ((10, 10), (1, 20)):
        for how in ('knn', 'probe'): assert ours[f'{how} {n}'] >= raw[f'{how} {n}'] + points, (how, n, ours, raw)


def test_default_run_is_short_and_reports(default_run):
    "Two minutes of one core, report included; in seconds of the processor, so that what runs beside it hardly counts"
    run, printed, seconds = default_run
    rows = pd.read_csv(run/'history.csv')
    assert len(rows) == get_method('simclr').recipe['epochs']
    assert (rows['samples/s'] > 0).all()
    assert seconds < 300, f'training and report took {seconds:.0f} s of the processor'
    for word in ('raw input', 'random encoder', 'this encoder', 'supervised', 'logistic regression', 'test split'): assert word in printed


def test_run_folder(default_run):
    run = default_run[0]
    names = {p.name for p in run.iterdir()}
    assert names == {'config.json', 'history.csv', 'checkpoint.pt', 'encoder', 'report.json', 'pretext.png', 'training.png', 'embedding.png'}
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    model = timm.create_model(f'local-dir:{run/"encoder"}', pretrained=True)
    for k, v in load_file(run/'encoder'/'model.safetensors').items():
        assert torch.equal(model.state_dict()[k], v) and torch.equal(state['model'][f'encoder.model.{k}'], v)


def test_report_again_gives_the_same_numbers(default_run):
    run = default_run[0]
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
    data = 'digits' if 'images' in (kinds_of(cls) or ('images',)) and not cls.default_data else None # instant where that is possible
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
    (tmp_path/'old'/'checkpoint.pt').write_text('')
    err = fails(capsys, 'pretrain', 'simclr', '--out', tmp_path/'old')
    assert 'already holds a run' in err and '--resume' in err


def test_nan_loss_keeps_the_last_good_checkpoint(capsys, tmp_path):
    out = tmp_path/'run'
    err = fails(capsys, 'pretrain', 'rotation', '--lr', '1e30', '--epochs', 4, '--out', out, '--device', 'cpu', '--save-seconds', 0)
    assert 'the loss is' in err or 'no longer finite' in err
    if (out/'checkpoint.pt').exists():
        state = torch.load(out/'checkpoint.pt', weights_only=True)
        assert all(t.isfinite().all() for t in state['model'].values() if t.is_floating_point())
    said = fails(capsys, 'report', out)
    assert 'is not finished' in said if out.exists() else 'holds no run' in said


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


# A run goes on as it was begun or not at all; what is damaged, foreign or impossible is named in one line, and nothing is lost by it.

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A finished run on a folder of pictures; tests that change it take a copy"
    here = tmp_path_factory.mktemp('tiny')
    run = pretrain('simclr', str(photos(here/'x'/'train', 24)), here/'run', epochs=1, batch_size=8, size=16, device='cpu')
    return run


@pytest.fixture
def mine(tiny, tmp_path): return Path(shutil.copytree(tiny, tmp_path/'mine'))


def one_line(capsys, *args):
    "The message of a command that must fail: one line, no traceback"
    capsys.readouterr()
    err = fails(capsys, *args)
    assert err.startswith('ssl_nb: ') and err.count('\n') == 1, err
    return err


def test_resume_refuses_what_differs(mine, tmp_path, capsys):
    other = photos(tmp_path/'other', 4)
    for args, said in ((['--epochs', 3], 'epochs 1 (now 3)'), (['--lr', 0.5], 'lr 0.01 (now 0.5)'), (['--seed', 7], 'seed 0 (now 7)'),
                       (['--size', 32], 'size 16 (now 32)'), (['--batch-size', 4], 'batch_size 8 (now 4)'),
                       (['--encoder', 'small_vit'], "encoder 'small_cnn' (now 'small_vit')"), (['--encoder', mine], f"(now '{mine}')"),
                       (['--set', 'temp=0.2'], "set {} (now {'temp': 0.2})"), (['--no-flip'], "views {} (now {'flip': 0.0})"),
                       (['--range', 'percentiles'], "range None (now 'percentiles')"), (['--pretrained'], 'pretrained False (now True)'), (['--data', other], f"train' (now '{other}')")):
        err = one_line(capsys, 'pretrain', 'simclr', '--out', mine, '--resume', '--device', 'cpu', *args)
        assert said in err and f'--from {mine}' in err
    assert "method 'simclr' (now 'rotation')" in one_line(capsys, 'pretrain', 'rotation', '--out', mine, '--resume')


def test_resume_goes_on_with_what_is_the_same(mine, capsys):
    before = (mine/'encoder'/'model.safetensors').read_bytes()
    (mine/'report.json').write_text('damaged'); (mine/'history.csv').write_text('')
    assert main(['pretrain', 'simclr', '--out', str(mine), '--resume', '--device', 'cpu', '--epochs', '1', '--size', '16', '--seed', '0']) == 0
    assert (mine/'encoder'/'model.safetensors').read_bytes() == before
    assert 'table' in json.loads((mine/'report.json').read_text())


def test_resume_without_a_folder_takes_only_its_own(tiny, tmp_path, monkeypatch, capsys):
    "The whole path of the data counts, in whatever folder the run is; the newest of several"
    monkeypatch.chdir(tmp_path)
    cfg = read_config(tiny)
    for name, data in (('simclr-cats2', '/d/cats2'), ('simclr-train', '/x/train'), ('simclr-set[1]', '/d/set[1]'), ('simclr-set[1]-2', '/d/set[1]')):
        shutil.copytree(tiny, tmp_path/'runs'/name)
        write_record(tmp_path/'runs'/name/'config.json', cfg | dict(data=data))
    (tmp_path/'runs'/'broken').mkdir()
    (tmp_path/'runs'/'broken'/'config.json').write_text('{')
    os.utime('runs/simclr-set[1]-2/config.json', (1, 1))
    asked = lambda data: run_folder(None, cfg | dict(data=data), resume=True)
    assert asked('/d/cats2').name == 'simclr-cats2' and asked('/d/set[1]').name == 'simclr-set[1]'
    for data in ('/d/cats', '/y/train', '/d/set1'):
        with pytest.raises(FileNotFoundError, match='holds no run of simclr on'): asked(data)
    assert 'holds no run of simclr on digits' in one_line(capsys, 'pretrain', 'simclr', '--data', 'digits', '--resume')


def test_train_further(mine, tmp_path, capsys, monkeypatch):
    "Weights, history and count of epochs go on; stopped and resumed, it ends the same"
    args = ['pretrain', 'simclr', '--from', str(mine), '--epochs', '2', '--device', 'cpu', '--save-seconds', '0', '--out']
    whole, part = tmp_path/'whole', tmp_path/'part'
    assert main([*args, str(whole)]) == 0
    said = capsys.readouterr().out
    assert f'begins with the weights of {mine} after 1 epochs' in said and 'schedule of its own' in said
    assert list(pd.read_csv(whole/'history.csv').epoch) == [0, 1, 2]
    cfg = read_config(whole)
    assert (cfg['start_from'], cfg['before'], cfg['epochs'], cfg['size']) == (str(mine), 1, 2, 16)
    save = Checkpoint.save
    def stop(self):
        save(self)
        raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, 'save', stop)
    assert main([*args, str(part)]) == 130
    assert f'go on with: ssl_nb pretrain simclr --out {part} --resume' in capsys.readouterr().err
    monkeypatch.undo()
    assert main(['pretrain', 'simclr', '--out', str(part), '--resume', '--device', 'cpu']) == 0
    a, b = [load_file(o/'encoder'/'model.safetensors') for o in (whole, part)]
    old = load_file(mine/'encoder'/'model.safetensors')
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], old[k]) for k in a)
    assert list(pd.read_csv(part/'history.csv').epoch) == [0, 1, 2]


def test_training_further_starts_from_the_weights(mine, tmp_path):
    new = pretrain('simclr', out=tmp_path/'new', start_from=mine, lr=1e-12, device='cpu')
    a, b = [load_file(o/'encoder'/'model.safetensors') for o in (mine, new)]
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a if 'running' not in k and 'num_batches' not in k)


def test_what_cannot_be_trained_further(mine, tmp_path, capsys):
    assert "has the encoder 'small_cnn', not 'small_vit'" in one_line(capsys, 'pretrain', 'simclr', '--from', mine, '--encoder', 'small_vit')
    assert "has the method 'simclr', not 'byol'" in one_line(capsys, 'pretrain', 'byol', '--from', mine)
    assert 'holds no run' in one_line(capsys, 'pretrain', 'simclr', '--from', tmp_path)


def test_two_processes_do_not_share_a_folder(mine, tmp_path, capsys):
    code = 'import sys, time; from ssl_nb.app.checks import alone_in\nwith alone_in(sys.argv[1]): print(1, flush=True); time.sleep(100)'
    first = subprocess.Popen([sys.executable, '-c', code, mine], stdout=subprocess.PIPE)
    first.stdout.readline()
    assert f'process {first.pid} is at work in {mine}' in one_line(capsys, 'pretrain', 'simclr', '--out', mine, '--resume')
    first.kill(); first.wait()
    assert (mine/'.lock').exists() # what a killed process leaves is in nobody's way
    assert main(['pretrain', 'simclr', '--out', str(mine), '--resume', '--device', 'cpu']) == 0
    assert not (mine/'.lock').exists()


def damage(file, how):
    b = file.read_bytes()
    flipped = bytearray(b)
    flipped[len(b)//2] ^= 1
    file.write_bytes(dict(truncated=b[:len(b)//2], empty=b'', zeros=bytes(len(b)), text=b'nothing of this\n', flipped=bytes(flipped))[how])


@pytest.mark.parametrize('how', ['truncated', 'empty', 'zeros', 'text', 'flipped', 'missing'])
@pytest.mark.parametrize('file,command', [('config.json', 'report'), ('config.json', 'resume'), ('checkpoint.pt', 'resume'), ('checkpoint.pt', 'from'),
                                          ('encoder/config.json', 'embed'), ('encoder/model.safetensors', 'embed')])
def test_damaged_file_is_named(mine, file, command, how, capsys, tmp_path):
    if (file, how) == ('encoder/config.json', 'flipped'): pytest.skip('timm reads any good JSON')
    if how == 'missing': (mine/file).unlink()
    else: damage(mine/file, how)
    args = dict(report=['report', mine], resume=['pretrain', 'simclr', '--out', mine, '--resume'], embed=['embed', mine, tmp_path],
                **{'from': ['pretrain', 'simclr', '--from', mine, '--out', tmp_path/'new']})[command]
    err = one_line(capsys, *args, '--device', 'cpu')
    name = 'encoder' if how == 'missing' and 'encoder' in file else file # a folder without a file
    assert name in err and str(mine) in err
    assert any(w in err for w in ('restore', 'start again', 'again', 'delete', 'copy', 'go on with', 'holds no run')), err
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('change,said', [(dict(method='nothing'), "unknown method 'nothing'"), (dict(colour='red'), "unknown setting 'colour'"),
                                         (dict(epochs='many'), "epochs must be a whole number, got 'many'"), (dict(kind=3), 'kind must be a name, got 3'),
                                         (dict(info=dict(kind='images', colour=1)), "unknown setting 'colour'")])
def test_foreign_config(mine, change, said, capsys):
    write_record(mine/'config.json', read_config(mine) | change)
    err = one_line(capsys, 'embed', mine, '.')
    assert said in err and str(mine/'config.json') in err


def test_folder_of_something_else_is_not_written_over(tmp_path, capsys):
    (tmp_path/'config.json').write_text('{"architecture": "resnet18"}')
    assert f"{tmp_path/'config.json'} has no 'method'" in one_line(capsys, 'pretrain', 'simclr', '--out', tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['config.json']


bad_settings = [('--size', '1', 'size must be at least 4, got 1'), ('--size', '-5', 'size must be at least 4, got -5'),
                ('--size', '100000', 'size must be at most 4,096, got 100000'), ('--encoder', '', 'encoder is empty'),
                ('--device', 'cpu:x', "unknown device 'cpu:x'"), ('--device', 'cuda:99', "device 'cuda:99' is not available"),
                ('--data', '', 'data is empty'), ('--out', '', 'out is empty'), ('--epochs', '0', 'epochs must be at least 1'),
                ('--batch-size', '0', 'batch_size must be at least 1')]
bad_pretrain = [('--seed', str(10**20), 'seed must be at most'), ('--seed', '-1', 'seed must be at least 0'), ('--lr', 'nan', 'lr must be a number, got nan'),
                ('--lr', '0', 'lr must be at least'), ('--hue', '3', 'hue must be a number between 0 and 0.5'),
                ('--set', 'tmp=1', "setting of simclr 'tmp'; did you mean temp"), ('--set', 'temp=low', 'usual: temp=0.5'), ('--range', 'low', 'range must be the two values'), ('--save-seconds', 'nan', 'save_seconds must be a number, got nan'), ('--from', '', 'start_from is empty')]
bad_compare = [('--workers', '-1', 'workers must be at least 1, got -1'), ('--seeds', '0', 'seeds must be at least 1'), ('--methods', ',', 'names no method'),
               ('--methods', '', 'names no method'), ('--samples', '-3', 'samples must be at least 1'), ('--methods', 'simclr:tmp=1', 'did you mean temp')]


@pytest.mark.parametrize('args,said', [(('pretrain', 'simclr', o, v), m) for o, v, m in bad_settings+bad_pretrain] +
                                      [(('compare', '--data', 'digits', o, v), m) for o, v, m in bad_settings+bad_compare])
def test_impossible_settings(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in one_line(capsys, *args)
    assert not [*tmp_path.iterdir()]


def test_library_has_the_same_checks(tmp_path):
    with pytest.raises(TypeError, match="unknown setting 'epoch'; did you mean epochs"): pretrain('simclr', out=tmp_path/'a', epoch=3)
    with pytest.raises(ValueError, match='epochs must be a whole number, got 2.5'): pretrain('simclr', out=tmp_path/'a', epochs=2.5)
    with pytest.raises(ValueError, match='size must be at least 4'): get_dls('photos', size=1)
    with pytest.raises(ValueError, match='batch_size must be at least 1'): embed(tmp_path, tmp_path, batch_size=0)


def test_embed_says_at_once_that_it_cannot_write(tiny, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    assert 'cannot write to the output folder' in one_line(capsys, 'embed', tiny, tiny, '--out', tmp_path/'file'/'f.npz', '--device', 'cpu')


def test_failed_start_leaves_nothing(tmp_path, capsys):
    "Nor does it take the folder from the corrected command"
    folder = photos(tmp_path/'photos', 24)
    args = ['pretrain', 'simclr', '--data', folder, '--out', tmp_path/'a'/'run', '--device', 'cpu', '--epochs', 1, '--size', 16]
    for wrong in (['--encoder', 'resnet81'], ['--batch-size', 1], ['--pretrained'], ['--set', 'hidden=2.5'], ['--scale', 0, 0]): # before the training, and in its first step
        one_line(capsys, *args, *wrong)
        assert not (tmp_path/'a').exists()
    (tmp_path/'a'/'run').mkdir(parents=True)
    (tmp_path/'a'/'run'/'history.csv').write_text('of somebody else')
    one_line(capsys, *args, '--batch-size', 1)
    assert [p.name for p in (tmp_path/'a'/'run').iterdir()] == ['history.csv']
    assert main([str(a) for a in (*args, '--batch-size', 8)]) == 0


def test_data_that_grew_is_another_set(mine, tmp_path, capsys):
    data = Path(read_config(mine)['data'])
    new = data/'new.png'
    shutil.copy(data/'0.png', new)
    try:
        for args in (('pretrain', 'simclr', '--out', mine, '--resume'), ('report', mine)):
            err = one_line(capsys, *args, '--device', 'cpu')
            assert f'{data} is not what it was' in err and 'training samples then' in err and '--from' in err
        assert main(['pretrain', 'simclr', '--from', str(mine), '--out', str(tmp_path/'further'), '--device', 'cpu']) == 0
    finally: new.unlink()


def test_folder_of_that_name_wins_over_the_built_in_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path/'digits', 4)
    with pytest.warns(UserWarning, match=f"'digits' is read from {tmp_path/'digits'}"): cfg = run_config('simclr', 'digits')
    assert cfg['data'] == str(tmp_path/'digits')
    with pytest.warns(UserWarning, match='is read from'): assert settings('digits')['data'] == str(tmp_path/'digits')


def test_run_is_no_data(tiny, tmp_path, monkeypatch, capsys):
    "A run inside the folder of its data; its figures are no samples"
    monkeypatch.chdir(photos(tmp_path/'data', 6))
    shutil.copytree(tiny, 'runs/simclr-data')
    (tmp_path/'data'/'compared').mkdir()
    (tmp_path/'data'/'compared'/'compare.json').write_text('{}')
    shutil.copy('0.png', 'compared/ranking.png')
    assert len(image_listing('.').files) == 6
    assert 'is the folder of a run, not of data' in one_line(capsys, 'pretrain', 'simclr', '--data', 'runs/simclr-data')


def test_kind_of_data_is_what_the_files_are(tmp_path):
    "A column called texture is no text, and captions or notes beside pictures do not make them texts"
    folder = photos(tmp_path/'photos', 6)
    for i in range(6): (folder/f'{i}.txt').write_text('a caption')
    assert guess_kind(folder) == 'pairs'
    for i in range(6): (folder/f'{i}.txt').unlink(); (folder/f'note{i}.txt').write_text('a note'); (folder/f'more{i}.txt').write_text('a note')
    assert guess_kind(folder) == 'images'
    files = [f'{i}.png' for i in range(6)]
    for name, columns, kind in (('texture.csv', dict(file=files, texture=files), 'images'), ('captions.csv', dict(file=files, text=files), 'pairs'),
                                ('pairs.csv', dict(image=files, text=files), 'pairs'), ('text.csv', dict(text=files), 'text')):
        pd.DataFrame(columns).to_csv(folder/name, index=False)
        assert settings(folder/name)['kind'] == kind, name


def test_labels_of_one_class_are_told_before_the_training(tmp_path, capsys):
    photos(tmp_path/'data'/'train'/'cats', 20); photos(tmp_path/'data'/'test'/'cats', 4)
    args = ['pretrain', 'simclr', '--data', tmp_path/'data', '--epochs', 1, '--batch-size', 8, '--size', 16, '--out', tmp_path/'run', '--device', 'cpu']
    assert main([str(a) for a in args]) == 0
    said = capsys.readouterr().out
    assert 0 < said.index('the report will have no accuracies') < said.index('train_loss')
    assert 'knn 10' not in json.loads((tmp_path/'run'/'report.json').read_text())['table']['this encoder']


def test_failed_report_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs): raise RuntimeError('bad luck\nin many lines')
    monkeypatch.setattr(app_run, 'report', broken)
    data = read_config(tiny)['data']
    err = one_line(capsys, 'pretrain', 'simclr', '--data', data, '--epochs', 1, '--batch-size', 8, '--size', 16, '--out', tmp_path/'run', '--device', 'cpu')
    assert 'the report failed: bad luck' in err and f"ssl_nb report {tmp_path/'run'}" in err
    monkeypatch.undo()
    assert main(['report', str(tmp_path/'run'), '--device', 'cpu']) == 0 and (tmp_path/'run'/'report.json').exists()


def test_sigterm_says_how_to_go_on(tiny, tmp_path):
    out = tmp_path/'run'
    args = ['pretrain', 'simclr', '--data', read_config(tiny)['data'], '--epochs', '1000', '--batch-size', '8', '--size', '16', '--device', 'cpu']
    p = subprocess.Popen([*command, *args, '--out', str(out), '--save-seconds', '0'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out/'checkpoint.pt').exists() and p.poll() is None: time.sleep(0.1)
    p.terminate()
    err = p.communicate()[1]
    assert p.returncode == 128+signal.SIGTERM and f'stopped; go on with: ssl_nb pretrain simclr --out {out} --resume' in err and 'Traceback' not in err
    assert not (out/'.lock').exists()


# What is asked for on the command line arrives in the run, or is refused by name.

def test_what_was_asked_for_arrives(tmp_path, capsys):
    "In the method, in config.json and in the first lines; a run that goes on keeps it"
    data = photos(tmp_path/'data', 30)
    args = ['pretrain', 'simclr', '--data', data, '--size', 16, '--epochs', 1, '--out', tmp_path/'run', '--device', 'cpu', '--no-supervised']
    own = ['--set', 'temp=0.2', '--set', 'dim=16', '--no-flip', '--scale', 0.5, 1, '--hue', 0.02, '--turns']
    assert main([str(a) for a in (*args, *own)]) == 0
    said = capsys.readouterr().out
    for words in ('16x16 pixels, 3 channels', 'would make 1 step an epoch of 27 samples', 'temp = 0.2, dim = 16', 'hue = 0.02', 'of training, and'): assert words in said
    assert said.index('pixels') < said.index('of training, and') < said.index('train_loss')
    cfg = read_config(tmp_path/'run')
    assert cfg['set'] == dict(temp=0.2, dim=16) and cfg['views'] == dict(scale=[0.5, 1.], hue=0.02, flip=0., turns=True) and cfg['batch_size'] == 16
    dls, m = build(cfg)
    assert m.temp == 0.2 and [(m.views[0].scale, m.views[0].flip), m.views[1].hue, m.views[-1].turns] == [((0.5, 1.), 0.), 0.02, True]
    assert cfg['lr'] == pytest.approx(get_method('simclr').recipe['lr']*(16/128)**0.5)
    assert main([str(a) for a in (*args, *own, '--resume')]) == 0 and 'going on after epoch 1 of 1' in capsys.readouterr().out
    new = pretrain('simclr', str(data), tmp_path/'new', start_from=tmp_path/'run', set=dict(temp=0.3), device='cpu', supervised=False)
    assert read_config(new)['set'] == dict(temp=0.3, dim=16) and read_config(new)['views'] == cfg['views']


@pytest.mark.parametrize('method,data,views,said', [('rotation', 'photos', dict(hue=0.3), 'has the random views CropFlip'), ('rotation', 'photos', dict(turns=True), 'turns=True would'),
    ('jigsaw', 'photos', dict(turns=True), 'turns=True would'), ('vae', 'digits', dict(flip=0.), 'has no random views'), ('simclr', 'mnist', dict(scale=(0.5, 1)), 'random views Affine'),
    ('simclr', 'digits', dict(hue=0.1), 'has images without colours'), ('simclr', 'bouncing', dict(hue=0.1), 'random views ClipViews')])
def test_views_that_would_change_nothing(method, data, views, said):
    with pytest.raises(ValueError, match=said): build(run_config(method, data, views=views, device='cpu', batch_size=8))


def test_range_of_deep_pictures(tmp_path, capsys):
    "Twelve bits in sixteen are not black; a range that is given is kept"
    data = tmp_path/'deep'
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20): Image.fromarray(rng.integers(0, 4096, (16, 16)).astype(np.uint16)).save(data/f'{i}.png')
    with pytest.warns(UserWarning, match='12 bits'): run = pretrain('vae', str(data), tmp_path/'a', epochs=1, supervised=False, device='cpu')
    shown = np.asarray(Image.open(run/'pretext.png').convert('L'))
    assert np.mean((shown > 60) & (shown < 200)) > 0.1
    assert main([str(a) for a in ('pretrain', 'vae', '--data', data, '--epochs', 1, '--range', 0, 2000, '--out', tmp_path/'b', '--device', 'cpu')]) == 0
    assert read_config(tmp_path/'b')['info']['range'] == [[0., 2000.]]
    (tmp_path/'texts').mkdir()
    for i in range(9): (tmp_path/'texts'/f'{i}.txt').write_text('a text')
    assert 'text has no pixels of unknown range' in one_line(capsys, 'pretrain', 'bert', '--data', tmp_path/'texts', '--range', 0, 1)


@pytest.mark.parametrize('n,asked,bs', [(1024, None, 128), (1023, None, 64), (203, None, 16), (5, None, 16), (203, 128, 128)])
def test_an_epoch_has_eight_steps(n, asked, bs):
    dls, cfg = digits_dls(bs=128), run_config('simclr', 'digits', batch_size=asked)
    dls.loaders[0] = dls.train.take(torch.arange(n))
    said = enough_steps(cfg, dls, {'lr'} if asked else ('batch_size', 'lr'))
    assert cfg['batch_size'] == bs and bool(said) == (bs != (asked or 128)) and dls.train.bs == min(bs, n) == dls.test.bs*min(bs, n)//bs
    assert f'{len(dls.train)} steps' in what_was_read(dls)


def test_begin_with_the_encoder_of_a_run(mine, tmp_path, monkeypatch):
    "Named from its own folder, stored whole; a run that goes on needs nothing to be named"
    monkeypatch.chdir(mine.parent)
    new = pretrain('byol', read_config(mine)['data'], tmp_path/'new', encoder='mine', epochs=1, lr=1e-12, size=16, device='cpu', supervised=False)
    assert read_config(new)['encoder'] == str(mine)
    a, b = [load_file(o/'encoder'/'model.safetensors') for o in (mine, new)]
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a if 'running' not in k and 'num_batches' not in k)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(mine)
    assert main(['report', str(new), '--no-supervised', '--device', 'cpu']) == 0 # what it began with is not needed any more


def test_methods_are_listed_without_being_imported():
    lines = [f'{name:19} {"/".join(kinds_of(cls)) or "any":6} {(cls.__doc__ or "").splitlines()[0]}' for name, cls in find_methods().items()]
    assert method_lines() == lines
    code = 'import sys; from ssl_nb.app.cli import main; main(["methods"]); sys.exit("torch" in sys.modules)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.splitlines() == lines
