"""What the learner shows: bars only where someone sees them, from the epoch where a run goes on; columns that do not run together; a look that copies nothing."""
import copy, re, subprocess, sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastai.callback.core import Callback
from ssl_nb.core.learner import Checkpoint, EpochBars, ssl_learner, table_line
from ssl_nb.core.loader import array_dls
from ssl_nb.core.measures import default_k, encode, knn_predict
from ssl_nb.core.method import Method


class Small(nn.Module):
    num_features = 8
    def __init__(self): super().__init__(); self.layer = nn.Linear(64, 8)
    def forward(self, x): return self.layer(x.flatten(1))


class Mirrored(Method):
    def __init__(self, encoder=None):
        super().__init__(encoder or Small())
        self.head = nn.Linear(8, 2)
    def pretext(self, x):
        turned = torch.rand(len(x)) < 0.5
        return (torch.where(turned[:, None, None, None], x.flip(3), x),), (turned.long(),)
    def forward(self, x): return self.head(self.encoder(x))
    def loss(self, pred, turned): return F.cross_entropy(pred, turned)


def small_dls(n=80, counts=None):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(counts)), counts) if counts else np.arange(n)%2
    x = rng.random((len(y), 8, 8))+y[:, None, None]*0.2
    x /= x.max()
    return array_dls(x, y, x, y, bs=16)


class Stop(Callback):
    order = 80 # after `Checkpoint`
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch==self.last: raise KeyboardInterrupt


def test_a_run_that_goes_on_has_a_bar_from_there(tmp_path, monkeypatch, capsys):
    "It said epoch 7 of 20 and estimated from twelve epochs that took no time"
    monkeypatch.setattr('ssl_nb.core.bars.can_draw', lambda: True)
    dls = small_dls()
    with pytest.raises(KeyboardInterrupt):
        ssl_learner(dls, Mirrored(), cbs=[Checkpoint(tmp_path/'c.pt', seconds=0), Stop(11)]).fit(20)
    capsys.readouterr()
    seen, real = [], EpochBars.before_epoch
    def before_epoch(self):
        real(self)
        if self.epoch==14: seen.append((self.mbar.main_bar.pred_t-(self.mbar.main_bar.last_t-self.mbar.main_bar.start_t)) /
                                       (self.mbar.main_bar.last_t-self.mbar.main_bar.start_t))
    monkeypatch.setattr(EpochBars, 'before_epoch', before_epoch)
    ssl_learner(dls, Mirrored(), cbs=[Checkpoint(tmp_path/'c.pt', resume=True)]).fit(20)
    out = capsys.readouterr().out
    epochs = [int(e) for e in re.findall(r'Epoch (\d+)/20', out)]
    assert sorted(set(epochs))==list(range(13, 21)), set(epochs)
    assert seen==[pytest.approx(3)] # two epochs seen, six to go
    assert 'going on after epoch 12 of 20' in out and out.index('going on') < out.index('train_loss')
    rows = [l for l in re.split(r'[\r\n]', out) if re.match(r'\d+ +\d\.\d{4}  ', l)]
    assert len(rows)==8, rows


PIPE = '''
import sys, torch, numpy as np
sys.path.insert(0, {tests!r})
from test_learner import Mirrored, Small, small_dls, ssl_learner, Checkpoint
from test_report import Means
from ssl_nb.core.learner import progress
from ssl_nb.evaluate.report import report
dls = small_dls(300)
for resume in (False, True): ssl_learner(dls, Mirrored(), cbs=[Checkpoint({out!r}, resume=resume)]).fit(2)
report(Means(), dls)
list(progress(range(3), what='three'))
'''

def test_a_pipe_gets_lines_and_no_bars(root, tmp_path):
    source = PIPE.format(tests=str(root/'tests'), out=str(tmp_path/'c.pt'))
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', source], capture_output=True, timeout=200)
    text = (done.stdout+done.stderr).decode()
    assert done.returncode==0, text[-2000:]
    assert not re.search('[\r█]|\x1b|---|%', text), text
    lines = done.stdout.decode().splitlines()
    assert len([l for l in lines if re.match(r'\d +\d', l)])==2 and len([l for l in lines if l.startswith('epoch')])==1
    rest = [l for l in lines if 'going on after epoch 2 of 2' not in l] # that one names a folder of any length
    assert len(rest) < len(lines) and max(map(len, rest)) <= 100
    assert len(lines) < 30, text


def test_one_rule_for_all_bars(root):
    "Whatever draws a bar asks `progress`, which knows whether someone can see it"
    uses = [p.relative_to(root).as_posix() for p in (root/'ssl_nb').rglob('*.py') if re.search('progress_bar|master_bar|ProgressCallback', p.read_text('utf-8'))
            and p.name!='_modidx.py']
    assert uses==['ssl_nb/core/bars.py']


def test_columns_do_not_run_together():
    names = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'samples/s', 'std', 'rank', 'z_std', 'knn', 'time']
    for v in (0.1, 123456789.123, 1e-9, -5e12, None, float('nan')):
        line = table_line([3, v, v, v, 12345, v, v, v, v, '00:12'], names)
        assert len(re.split(' {2,}', line))==len(names) and len(line) <= 120, line
    assert len(table_line([3, 0.5, 0.5, 0.5, 12345, 0.5, 123.4, 0.5, 0.5, '1:00:12'], names)) <= 100


def test_the_online_knn_counts_with_what_there_is():
    "k = 200 gave the majority on classes of 100, 10 and 6"
    dls = small_dls(counts=[200, 20, 12])
    learn = ssl_learner(dls, Mirrored(), lr=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    (h, y), (vh, vy) = [encode(learn.model.encoder, dl) for dl in (dls.train.new(shuffle=False, drop_last=False), dls.valid)]
    k = default_k(y)
    assert k < 12 and learn.history[0]['knn']==pytest.approx((knn_predict(h, y, vh, k)==vy).float().mean().item())


def test_a_look_copies_nothing_and_leaves_the_modes(monkeypatch):
    dls, m = small_dls(), Mirrored()
    m.encoder.frozen = nn.Dropout(0.5).eval()
    learn = ssl_learner(dls, m)
    real = copy.deepcopy
    def no_encoder(o, *args):
        assert not isinstance(o, Small), 'the encoder was copied'
        return real(o, *args)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        monkeypatch.setattr(copy, 'deepcopy', no_encoder)
        learn.fit(1)
    assert learn.history[0]['knn'] > 0 and m.encoder.layer.training==m.training
