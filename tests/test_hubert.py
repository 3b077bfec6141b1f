"HuBERT and masked frames: labels are part of the state, padding changes nothing, only hidden values count, what does not go together is refused."
import shutil

import pytest, torch
from fastai.callback.core import Callback

from ssl_nb.core.encoders import create_encoder, save_encoder
from ssl_nb.core.learner import Checkpoint, ssl_learner
from ssl_nb.core.method import check_method
from ssl_nb.data.spoken import spoken_dls
from ssl_nb.masked.hubert import HuBERT, hubert_loss, kmeans, nearest
from ssl_nb.masked.masked_frames import band_mask, frames_picture, MaskedFrames


@pytest.fixture(scope='module')
def dls(): return spoken_dls(bs=8, limit=32)


def encoder(dls, name='small_audio', seed=0):
    torch.manual_seed(seed)
    return create_encoder(name, dls.info, depth=2, dim=32)


def hubert(dls, first=None, seed=0, **kwargs):
    enc = encoder(dls, seed=seed)
    return HuBERT.for_data(enc, dls, first=first, clusters=20, **kwargs)


@pytest.fixture(scope='module')
def first(dls): return encoder(dls, seed=5)


class KeepEach(Callback):
    order = 71
    def after_epoch(self): shutil.copy(self.checkpoint.path, self.checkpoint.path.with_name(f'{self.epoch}.pt'))


def train(dls, method, *cbs):
    learn = ssl_learner(dls, method, every=0, cbs=list(cbs))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3)
    return learn


@pytest.mark.parametrize('second', [False, True])
def test_a_killed_run_goes_on_with_its_own_labels(second, dls, first, tmp_path):
    "Bit for bit; also where k-means, asked again, would find other clusters"
    teacher = first if second else None
    whole = train(dls, hubert(dls, teacher), Checkpoint(tmp_path/'whole.pt', seconds=0), KeepEach())
    again = hubert(dls, teacher, seed=9)
    again.sort(dls.train.new(drop_last=False), seed=9)
    x = dls.one_batch()[0]
    assert not torch.equal(again.centroids, whole.model.centroids)
    resumed = train(dls, again, Checkpoint(tmp_path/'1.pt', resume=True))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(whole.model.labels(x)[0], resumed.model.labels(x)[0])
    assert any(k.startswith('teacher.') for k in a) == second


def test_the_teacher_stays_as_it_was(dls, first):
    before = {k: v.clone() for k, v in first.state_dict().items()}
    method = hubert(dls, first)
    train(dls, method)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())


def test_the_second_round_from_a_folder(dls, first, tmp_path):
    save_encoder(first, tmp_path/'encoder')
    a, b = [hubert(dls, f, layer=1) for f in (first, str(tmp_path/'encoder'))]
    assert torch.equal(a.centroids, b.centroids) and a.centroids.shape == (20, 32)


def test_clusters_are_the_same_whenever_they_are_asked_for(dls):
    torch.manual_seed(3)
    a = hubert(dls)
    torch.manual_seed(4)
    b = hubert(dls)
    assert torch.equal(a.centroids, b.centroids)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    a.sort(dls.train)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_labels_are_the_nearest_centroids_of_clean_sound(dls):
    method, x = hubert(dls), dls.one_batch()[0]
    m, real = method.described(x)
    labels, again = method.labels(x)
    far = torch.cdist(m, method.centroids.expand(len(m), -1, -1))
    chosen = far.gather(2, labels[...,None])[...,0]
    assert torch.allclose(chosen, far.amin(2), atol=1e-3) and torch.equal(real, again)
    (_, hidden), (asked, h, seen) = method.pretext(x)
    assert torch.equal(asked, labels) and torch.equal(h, hidden)
    assert torch.equal(hidden | seen, real) and not (hidden & seen).any() and hidden.any(1).all()


def hubert_loops(cos, labels, hidden, seen, alpha, temp):
    total = {True: [], False: []}
    for b in range(cos.shape[0]):
        for t in range(cos.shape[1]):
            below = sum(torch.exp(c/temp) for c in cos[b,t])
            surprise = -torch.log(torch.exp(cos[b,t,labels[b,t]]/temp)/below)
            if hidden[b,t] or seen[b,t]: total[bool(hidden[b,t])].append(surprise)
    mean = {k: sum(v)/len(v) for k, v in total.items()}
    return alpha*mean[True] + (1-alpha)*mean[False]


@pytest.mark.parametrize('alpha', [1., 0.7, 0.])
def test_the_loss_is_its_sum_signs(alpha):
    "Value and gradient, with frames that are hidden, seen and padding"
    torch.manual_seed(0)
    cos, labels, u = (2*torch.rand(3, 5, 4)-1).requires_grad_(), torch.randint(0, 4, (3, 5)), torch.rand(3, 5)
    fast, slow = [f(cos, labels, u<0.4, u>0.6, alpha, 0.1) for f in (hubert_loss, hubert_loops)]
    a, b = [torch.autograd.grad(o, cos)[0] for o in (fast, slow)]
    assert torch.allclose(fast, slow, atol=1e-5) and torch.allclose(a, b, atol=1e-5)
    asked = {1.: u<0.4, 0.7: (u<0.4)|(u>0.6), 0.: u>0.6}[alpha]
    assert (a.abs().sum(2)>0).eq(asked).all()


def test_padding_changes_no_label(dls, first):
    x = dls.one_batch()[0].clone()
    x[:,:,4800:] = 0
    longer = torch.nn.functional.pad(x, (0, 1600))
    for m in (hubert(dls), hubert(dls, first)):
        with torch.no_grad(): (a, real), (b, _) = m.labels(x), m.labels(longer)
        assert not real[:,30:].any() and torch.equal(a[real], b[:,:a.shape[1]][real])


@pytest.mark.parametrize('kwargs', [{}, dict(channels=9)])
def test_padding_changes_nothing(kwargs, dls):
    "Longer by silence: the same targets and predictions at real frames, for the same holes"
    x = dls.one_batch()[0].clone()
    x[:,:,4800:] = 0
    longer = torch.nn.functional.pad(x, (0, 1600))
    method = MaskedFrames(encoder(dls), **kwargs).eval()
    (_, mask, bands), (target, hidden) = method.pretext(x)
    n = mask.shape[1]
    wide = torch.nn.functional.pad(mask, (0, longer.shape[-1]//method.hop-n))
    assert not hidden[:,30:].any()
    with torch.no_grad():
        a, b = method(x, mask, bands), method(longer, wide, bands)[:,:n]
    real = method.encoder.real(x)
    assert torch.allclose(a[real], b[real], atol=1e-4)


def test_what_is_hidden_is_not_seen(dls):
    "Another sound in the hidden frames (or channels) changes no prediction; in a seen one it does"
    method, x = MaskedFrames(encoder(dls), channels=12).eval(), torch.rand(4, 1, 6400)-0.5
    mask = torch.zeros(4, 40, dtype=torch.bool)
    mask[:,10:20] = True
    none, all_ = torch.zeros(4, 40).bool(), torch.ones(4, 40).bool()
    other = x.clone()
    other[:,:,12*160:18*160] = torch.rand(4, 1, 960)-0.5 # a window reaches into the next frame
    with torch.no_grad():
        assert torch.equal(method(x, mask, none), method(other, mask, none))
        assert not torch.allclose(method(x, ~mask, none), method(other, ~mask, none))
        assert torch.equal(method(x, mask & False, all_), method(other, mask & False, all_))


def test_bands():
    torch.manual_seed(0)
    m = band_mask(2000, 40, 10)
    edges = (m[:,1:] != m[:,:-1]).sum(1) + m[:,0].int() + m[:,-1].int()
    assert set(edges.tolist()) == {0, 2} # one band, or none
    assert abs(m.float().mean().item()-5/40) < 0.01
    assert not band_mask(5, 40, 0).any()


def test_frames_as_a_picture():
    m = torch.zeros(1, 3, 80)
    m[0,1,40] = 5. # the second slice of frame 1, lowest channel
    p = frames_picture(m)
    assert p.shape == (1, 1, 40, 6) and p[0,0,39,3] == 1 and (p == 0.5).sum() == 239


def test_contract_with_waves(dls):
    "An encoder that reads the waveform has frames, too, and no log-mel channels to hide"
    batch, enc = dls.one_batch(), encoder(dls, 'small_wave')
    check_method(HuBERT.for_data(enc, dls, clusters=20, alpha=0.5), batch)
    check_method(MaskedFrames(enc), batch)
    with pytest.raises(ValueError, match='hidden channels take an encoder that reads log-mel'): MaskedFrames(enc, channels=4)
    with pytest.raises(ValueError, match='a band of at most 40 of 40 channels'): MaskedFrames(encoder(dls), channels=40)


def test_frames_that_cannot_be_sorted():
    with pytest.raises(ValueError, match='30 clusters take at least 30 frames, and there are 20'): kmeans(torch.rand(20, 3), 30)
    with pytest.raises(ValueError, match='NaN'): kmeans(torch.full((20, 3), float('nan')), 3)
    assert nearest(torch.zeros(2, 0, 3), torch.rand(4, 3)).shape == (2, 0)
