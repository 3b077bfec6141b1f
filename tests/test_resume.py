"For every method of the package: a run that was killed and resumed is the run that was not, looking changes nothing, and samples are counted as samples."
import contextlib, os, random, resource, shutil, signal, stat, subprocess, sys, time, zipfile
from functools import cache

import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from ssl_nb.app.folder import get_dls
from ssl_nb.app.run import time_needed
from ssl_nb.core.common import stoppable, whole_file, write_json
from ssl_nb.core.encoders import create_encoder, save_encoder
from ssl_nb.core.learner import Checkpoint, loose_buffers, read_state, save_atomic, ssl_learner
from ssl_nb.core.loader import finish_dls, get_kind
from ssl_nb.data.images import Images
from ssl_nb.data.text import Text, text_dls
from ssl_nb.core.method import _plain_state, asked, check_method, find_methods, kinds_of
from ssl_nb.evaluate.plot import plot_embedding, show_neighbours, show_pretext
from ssl_nb.evaluate.report import report

METHODS = sorted(find_methods())
WORDS = 'cat', 'dog', 'red house', 'old tree', 'window', 'blue lake', 'bird'


@pytest.fixture
def no_figure(monkeypatch): monkeypatch.setattr('ssl_nb.evaluate.plot.show_rows', lambda *args, **kwargs: None) # drawing itself takes most of the time


@cache
def source(kind, data):
    "A data set that comes with the library, read once; of text a few lines, which need no long tokenizer"
    if kind is Text: return text_dls([f'The {a} sees a {b}. Then it is {c}. It ends here.' for a in WORDS for b in WORDS for c in WORDS], bs=8, max_len=32)
    return get_dls(data or ('digits' if kind is Images else next(iter(kind.builtin))), bs=8, device='cpu')


def tiny(name, bs=8, batches=2, valid=11):
    "A few samples for a method, the last batch of valid smaller than the others; and how to build the method"
    cls = find_methods()[name]
    kind = get_kind((kinds_of(cls) or ('images',))[0])
    dls = source(kind, cls.default_data)
    small = finish_dls([dl.take(torch.arange(n)).new(bs=bs) for dl, n in zip(dls.loaders, (bs*batches, valid))], dls.info, 'cpu')
    if hasattr(dls, 'tokenizer'): small.tokenizer = dls.tokenizer
    def build():
        torch.manual_seed(0)
        return cls.for_data(create_encoder(cls.default_encoder or kind.default_encoder, small.info), small)
    return small, build


def train(dls, method, epochs=3, cbs=(), every=0, **kwargs):
    learn = ssl_learner(dls, method, every=every, cbs=list(cbs), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn


def state(module):
    "Everything in a module: tensors, also those that are not saved, numbers, and which parts are in training mode"
    tensors = {k: v.clone() for k, v in [*module.state_dict().items(), *loose_buffers(module).items()]}
    modes = {n: m.training for n, m in module.named_modules()}
    return tensors, _plain_state(module) | modes


def assert_same(a, b):
    (ta, pa), (tb, pb) = a, b
    assert ta.keys() == tb.keys()
    assert not [k for k in ta if ta[k].shape != tb[k].shape or not torch.equal(ta[k], tb[k])]
    assert pa == pb


def draw(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


class KeepEach(Callback):
    "A copy of the checkpoint of each epoch, as a kill after it would leave it"
    order = 71
    def after_epoch(self): shutil.copy(self.checkpoint.path, self.checkpoint.path.with_name(f'{self.epoch}.pt'))


def rows(learn): return [{k: v for k, v in r.items() if k != 'samples/s'} for r in learn.history]


@pytest.mark.parametrize('name', METHODS)
def test_killed_after_any_epoch(name, tmp_path, no_figure):
    "Tensors and history are those of a run that was not killed, although it was looked at before it went on"
    dls, build = tiny(name)
    whole = train(dls, build(), every=1, cbs=[Checkpoint(tmp_path/'whole.pt', seconds=0), KeepEach()])
    assert len(whole.history) == 3 and all(np.isfinite(r['train_loss']) for r in whole.history)
    e = METHODS.index(name)%2 # half of the methods after the first epoch, half after the second
    method = build()
    show_pretext(method, dls, n=4)
    again = train(dls, method, every=1, cbs=[Checkpoint(tmp_path/f'{e}.pt', resume=True)])
    assert_same(state(whole.model), state(again.model))
    assert rows(whole) == rows(again)


class KeepSteps(KeepEach):
    "A copy of the checkpoint that a kill after a batch would leave"
    def after_epoch(self): pass
    def after_batch(self):
        if self.training and self.checkpoint.path.exists(): shutil.copy(self.checkpoint.path, self.checkpoint.path.with_name(f'{self.epoch}-{self.iter}.pt'))


@pytest.mark.parametrize('name, cbs, at', [('simclr', (), '1-0'), ('moco', (), '1-2'), ('mae', (), '0-1'), ('bert', (), '2-1'), ('vae', (GradientAccumulation(20),), '1-0')])
def test_killed_within_an_epoch(name, cbs, at, tmp_path, no_figure):
    "The batches that are left come in the same order, with the same random numbers, schedule and sums; also where gradients wait for their step, or only the validation is left"
    dls, build = tiny(name, batches=3)
    whole = train(dls, build(), every=1, cbs=[*cbs, Checkpoint(tmp_path/'whole.pt', seconds=1e9, steps=2), KeepSteps()])
    made = read_state(tmp_path/f'{at}.pt')
    done = made['epoch']*3 + made['within']['batches']
    assert done%2==0 and done == int(at[0])*3 + int(at[2]) + 1
    again = train(dls, build(), every=1, cbs=[*cbs, Checkpoint(tmp_path/f'{at}.pt', resume=True)])
    assert_same(state(whole.model), state(again.model))
    assert rows(whole) == rows(again) and 'one_batch' not in vars(again)


@pytest.mark.parametrize('name', METHODS)
def test_looking_changes_nothing(name, no_figure):
    "No tensor, no number, no switch between training and evaluation and no random number is another after a look; between two steps and in validation"
    dls, build = tiny(name)
    method = build()
    inputs, targets = method.pretext(*dls.one_batch()[:-1], *([dls.one_batch()[-1]] if method.uses_labels else []))
    method(*inputs) # in training mode, so that there is something that waits for a step
    frozen = next(m for m in method.encoder.modules() if not [*m.children()])
    frozen.eval()
    before = state(method)
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    drawn = draw()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    show_pretext(method, dls, n=4)
    seen = dls.train.epoch
    assert min(time_needed(dict(device='cpu', wd=0.05, epochs=3), dls, method)) > 0 and dls.train.epoch == seen
    learn = ssl_learner(dls, method)
    learn.n_epoch = learn.epoch = 1
    for cb in (learn.pretext, learn.collapse_monitor, learn.online_knn): cb.before_fit()
    for cb in (learn.collapse_monitor, learn.online_knn): cb.after_validate()
    assert learn.metrics and drawn == draw()
    assert_same(before, state(method))
    frozen.train()
    before = state(method.eval())
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert_same(before, state(method.eval()))


class CountSteps(Callback):
    "After how many batches does the optimizer step?"
    def before_fit(self): self.batches, self.steps = 0, []
    def after_pred(self): self.batches += self.training
    def after_step(self): self.steps.append(self.batches)


@pytest.mark.parametrize('name', METHODS)
def test_gradients_of_64_samples_are_one_step(name):
    "Eight batches of 16 are two steps of 64, whatever the targets look like; valid_loss counts samples, too"
    dls, build = tiny(name, bs=16, batches=8, valid=24)
    count = CountSteps()
    learn = train(dls, build(), epochs=1, cbs=[GradientAccumulation(64), count])
    assert count.steps == [4, 8]
    learn.epoch_seed.before_validate()
    method, losses = learn.model.eval(), []
    for b in dls.valid:
        with torch.no_grad():
            inputs, targets = method.pretext(*asked(method, b))
            losses += [(method.loss(method(*inputs), *targets).item(), len(b[0]))]
    assert [n for _, n in losses] == [16, 8]
    assert learn.history[-1]['valid_loss'] == pytest.approx(sum(l*n for l, n in losses)/24, rel=1e-4)


def test_the_centre_of_dino_is_of_all_batches_of_a_step():
    dls, build = tiny('dino', bs=16, batches=8)
    method, seen = build(), []
    method.teacher.register_forward_hook(lambda net, x, out: seen.append(out))
    for b in [*dls.train][:4]: method.pretext(b[0])
    method.update(0.)
    assert torch.allclose(method.center, torch.cat(seen).mean(0), atol=1e-6) and not method.total.any()


def test_gradients_that_wait_survive_a_kill(tmp_path):
    "An epoch of three batches, a step every two: one waits at the end of the epoch"
    dls, build = tiny('moco', batches=3)
    cbs = lambda *more: [GradientAccumulation(16), *more]
    whole = train(dls, build(), cbs=cbs(Checkpoint(tmp_path/'whole.pt', seconds=0), KeepEach()))
    again = train(dls, build(), cbs=cbs(Checkpoint(tmp_path/'0.pt', resume=True)))
    saved = read_state(tmp_path/'0.pt')
    assert saved['waiting']==8 and saved['grads'] and len(saved['loose']['queue.fresh'])
    assert_same(state(whole.model), state(again.model))


def test_train_loss_is_the_mean_of_its_epoch():
    seen = []
    class Losses(Callback):
        def after_batch(self):
            if self.training: seen.append(self.learn.loss.item())
    dls, build = tiny('rotation', batches=4)
    learn = train(dls, build(), cbs=[Losses()])
    assert [r['train_loss'] for r in learn.history] == pytest.approx([np.mean(seen[i:i+4]) for i in (0, 4, 8)], rel=1e-5)


def test_a_batch_that_is_too_small_is_not_counted():
    "The last batch of valid holds one sample, which has no negatives: nothing of the batch before is counted for it"
    dls, build = tiny('simclr', valid=17)
    few, _ = tiny('simclr', valid=16)
    a, b = [train(d, build(), epochs=1).history[-1] for d in (dls, few)]
    assert a['valid_loss'] == pytest.approx(b['valid_loss'], rel=1e-6) and a['accuracy'] == pytest.approx(b['accuracy'])


def test_report_and_neighbours_change_nothing():
    dls, build = tiny('rotation', batches=4, valid=20)
    dls = finish_dls([*dls.loaders, dls.valid], dls.info, 'cpu')
    encoder = build().encoder.train()
    next(m for m in encoder.modules() if not [*m.children()]).eval()
    before = state(encoder)
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    drawn = draw()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    report(encoder, dls, labels=(1,), draws=1, supervised=1, show=False)
    plt.close(show_neighbours(encoder, dls.test, queries=2, k=2))
    assert drawn == draw()
    assert_same(before, state(encoder))


def test_a_number_outside_of_the_state_is_found():
    class Counts(find_methods()['rotation']):
        asked = 0
        def update(self, pct): self.asked += 1
    dls, build = tiny('rotation')
    with pytest.raises(AssertionError, match='asked changed while it learned'): check_method(Counts(build().encoder), dls.one_batch())


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')/'checkpoint.pt'
    dls, build = tiny('rotation')
    train(dls, build(), epochs=1, cbs=[Checkpoint(path)])
    return path


def resume(path, name='rotation', epochs=1, encoder=None):
    dls, build = tiny(name)
    method = build() if encoder is None else find_methods()[name].for_data(create_encoder(encoder, dls.info), dls)
    train(dls, method, epochs, cbs=[Checkpoint(path, resume=True)])


DAMAGE = {'truncated': lambda b: b[:len(b)//2], 'empty': lambda b: b'', 'zeros': lambda b: bytes(len(b)), 'text': lambda b: b'no weights'*99,
          'half zeros': lambda b: b[:len(b)//2] + bytes(len(b)-len(b)//2)}


@pytest.mark.parametrize('how', DAMAGE)
def test_a_damaged_checkpoint_is_named(how, checkpoint, tmp_path):
    file = tmp_path/'checkpoint.pt'
    file.write_bytes(DAMAGE[how](checkpoint.read_bytes()))
    with pytest.raises(ValueError, match='checkpoint.pt is damaged'): resume(file)


def test_a_flipped_bit_is_found_or_harmless(checkpoint, tmp_path):
    "In any place: in the weights, the names, the lists of the archive"
    good, file, rng = checkpoint.read_bytes(), tmp_path/'checkpoint.pt', np.random.default_rng(0)
    whole = read_state(checkpoint)
    with zipfile.ZipFile(checkpoint) as z: weights = max(z.infolist(), key=lambda i: i.file_size)
    places = [weights.header_offset+1000, *rng.integers(0, len(good), 20), *(len(good)-rng.integers(1, 3000, 40))]
    found = 0
    for i in places:
        bad = bytearray(good)
        bad[i] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        try: state = read_state(file)
        except ValueError as e: assert str(file) in str(e); found += 1
        else: assert all(torch.equal(state['model'][k], v) for k, v in whole['model'].items()) and state['history'] == whole['history']
    assert found > 20


def test_a_foreign_checkpoint_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match='checkpoint.pt belongs to another method, encoder or data set: head'): resume(checkpoint, 'simclr')
    with pytest.raises(ValueError, match='checkpoint.pt belongs to another'): resume(checkpoint, encoder='small_vit')
    with pytest.raises(ValueError, match='run of 1 epochs, not 2'): resume(checkpoint, epochs=2)
    for i, foreign in enumerate([dict(model={}), [1, 2], torch.ones(3)]):
        save_atomic(foreign, tmp_path/f'{i}.pt')
        with pytest.raises(ValueError, match=f'{i}.pt is no checkpoint'): resume(tmp_path/f'{i}.pt')


def test_nothing_is_executed_on_load(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save(dict(model=Evil()), tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='is damaged, or no checkpoint'): resume(tmp_path/'checkpoint.pt')
    assert not (tmp_path/'ran').exists()


@contextlib.contextmanager
def full_disk(size):
    "No file may grow beyond `size` bytes: the error is another, the place is the same"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_the_last_file_stays(checkpoint, tmp_path):
    file = tmp_path/'checkpoint.pt'
    shutil.copy(checkpoint, file)
    good = file.read_bytes()
    dls, build = tiny('rotation')
    with full_disk(100_000), pytest.raises(OSError, match='checkpoint.pt could not be written: .*; the file that was there is unchanged'):
        train(dls, build(), epochs=1, cbs=[Checkpoint(file, seconds=0)])
    assert file.read_bytes() == good and [f.name for f in tmp_path.iterdir()] == ['checkpoint.pt']
    with full_disk(10), pytest.raises(OSError, match='a.json could not be written'): write_json(tmp_path/'a.json', dict(a='b'*99_999))
    with pytest.raises(FileNotFoundError, match='a.json could not be written'): write_json(tmp_path/'none'/'a.json', {})
    assert [f.name for f in tmp_path.iterdir()] == ['checkpoint.pt']


def test_files_have_ordinary_permissions(checkpoint, tmp_path):
    save_encoder(tiny('rotation')[1]().encoder, tmp_path/'encoder')
    write_json(tmp_path/'a.json', {})
    with whole_file(tmp_path/'b') as f: os.close(os.open(f.with_name('c'), os.O_CREAT, 0o600)); os.replace(f.with_name('c'), f)
    (tmp_path/'ordinary').touch()
    mode = stat.S_IMODE((tmp_path/'ordinary').stat().st_mode)
    files = [checkpoint, tmp_path/'a.json', tmp_path/'b', *(tmp_path/'encoder').iterdir()]
    assert {f.name: stat.S_IMODE(f.stat().st_mode) for f in files} == {f.name: mode for f in files}


def test_a_signal_ends_as_ctrl_c_does(tmp_path):
    "In a process of its own: the checkpoint of the epoch before is there, nothing half-written, and a line says how to go on"
    out = tmp_path/'run'
    command = [sys.executable, '-W', 'ignore', '-c', 'import sys; from ssl_nb.app.cli import main; sys.exit(main())', 'pretrain', 'rotation',
               '--data', 'digits', '--epochs', '500', '--device', 'cpu', '--save-seconds', '0', '--out', str(out)]
    heard = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL) # also where the tests themselves run under nohup
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while p.poll() is None and not (out/'checkpoint.pt').exists(): time.sleep(0.05)
    time.sleep(0.3)
    p.send_signal(signal.SIGHUP)
    printed, err = p.communicate(timeout=30)
    assert p.returncode == 128+signal.SIGHUP and 'stopped' in err and '--resume' in err and 'Traceback' not in err
    assert '\r' not in printed and '█' not in printed # no bars in a file
    saved = read_state(out/'checkpoint.pt')
    assert saved['epoch'] >= 1 and not [*out.rglob('*.tmp')]
    assert list(pd.read_csv(out/'history.csv').epoch) == list(range(saved['epoch'])) or len(pd.read_csv(out/'history.csv')) == saved['epoch']+1


def test_signals_come_back_and_what_is_ignored_stays():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally: signal.signal(signal.SIGHUP, old)


def test_a_resumed_run_says_from_where(checkpoint, tmp_path, capsys):
    dls, build = tiny('rotation')
    train(dls, build(), cbs=[Checkpoint(tmp_path/'whole.pt', seconds=0), KeepEach()])
    capsys.readouterr()
    learn = ssl_learner(dls, build(), every=0, cbs=[Checkpoint(tmp_path/'0.pt', resume=True)])
    learn.fit_one_cycle(3)
    lines = capsys.readouterr().out.splitlines()
    assert [l for l in lines if 'going on after epoch 1 of 3' in l and '0.pt' in l]
    assert [l.split()[0] for l in lines if l[:1].isdigit()] == ['1', '2']
    assert [l for l in lines if l.split()[:2] == ['epoch', 'train_loss']]


@pytest.mark.parametrize('h', [torch.ones(30, 8), torch.eye(30)[:, :1]*1e-9, torch.rand(3, 4)], ids=['collapsed', 'nearly', 'few'])
def test_a_map_of_dead_or_few_features(h):
    "scikit-learn ends the process where all samples are alike"
    fig = plot_embedding(h, torch.zeros(len(h)).long())
    assert sum(len(c.get_offsets()) for c in fig.axes[0].collections) == len(h)
    plt.close(fig)
