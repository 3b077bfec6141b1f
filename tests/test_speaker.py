"Speaker contrast: the pieces of a recording, its loss, bad input; verification: the equal error rate beside loops and scikit-learn."
import math

import numpy as np, pytest, torch
from sklearn.metrics import roc_curve

from ssl_nb.contrastive.speaker import SpeakerContrast, channel_views, speaker_loss, two_pieces
from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.method import check_method
from ssl_nb.data.mel import real_samples
from ssl_nb.data.spoken import AudioInfo
from ssl_nb.evaluate.verification import det_curve, eer_spread, equal_error_rate, verification_scores

INFO = AudioInfo('test', rate=8000, length=3200)


def sounds(B=12, T=3200, seed=0):
    "Noise of different lengths, padded with zeros"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 1, T, generator=g)*0.5+0.1
    n = torch.randint(T//2, T+1, (B,), generator=g)
    return x*(torch.arange(T)<n[:,None,None]), n


def small(): return create_encoder('small_audio', INFO, dim=32, depth=1, mlp=1)


def test_pieces_are_the_recording():
    "Put back together the two pieces are the sound, sample for sample; neither is always the first"
    x, n = sounds(64)
    torch.manual_seed(0)
    a, b = two_pieces(x, 0.3, 0.6)
    firsts = 0
    for i in range(len(x)):
        p, q = [v[i,0,:k] for v, k in zip((a, b), (real_samples(a)[i], real_samples(b)[i]))]
        there = [torch.equal(torch.cat(o), x[i,0,:n[i]]) for o in ((p, q), (q, p))]
        assert any(there)
        firsts += there[0]
        assert 0.29*n[i] <= len(p if there[0] else q) <= 0.6*n[i]
    assert 15 < firsts < 49


def test_views_keep_the_padding():
    x, _ = sounds()
    torch.manual_seed(0)
    y = channel_views(8000)(x)
    assert torch.equal(real_samples(y), real_samples(x)) and not torch.equal(x, y)


def test_method():
    torch.manual_seed(0)
    x, _ = sounds()
    m = SpeakerContrast(small(), channel_views(8000))
    check_method(m, (x, torch.zeros(12, dtype=torch.long)))
    z = torch.randn(8, 5)
    same = torch.ones(8, 5)
    assert speaker_loss(z, z) < speaker_loss(z, z.roll(1, 0))
    assert abs(speaker_loss(same, same).item()-math.log(8)) < 1e-4
    assert torch.allclose(speaker_loss(z, z.roll(1, 0)), speaker_loss(z.roll(1, 0), z))


@pytest.mark.parametrize('make,words', [
    (lambda: two_pieces(torch.rand(2,1,100), 0.7, 0.3), '0 < low <= high < 1, got 0.7 and 0.3'),
    (lambda: SpeakerContrast(small(), None, cut=(0., 0.5)), 'cut must be'),
    (lambda: speaker_loss(torch.rand(4,3), torch.rand(5,3)), 'z1 and z2 must have the same shape'),
    (lambda: speaker_loss(torch.rand(4,3), torch.rand(4,3), temp=0), 'temp must be a number above 0'),
    (lambda: channel_views(0), 'rate must be above 0'),
    (lambda: det_curve([0.1, math.nan], [True, False]), 'NaN in 1 of 2'),
    (lambda: det_curve([0.1, 0.2], [True, True]), 'got 2 and 0'),
    (lambda: det_curve([0.1, 0.2], [True]), 'same shape'),
    (lambda: verification_scores(torch.rand(4,3), torch.full((4,), -1)), 'got 0'),
    (lambda: eer_spread(torch.rand(4,3), torch.tensor([0,0,1,1])), 'at least 3 speakers')])
def test_bad_input(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value)


@pytest.mark.parametrize('seed', range(4))
def test_eer(seed):
    "Beside scikit-learn's ROC curve, with and without equal scores; and where its line crosses the diagonal"
    g = np.random.default_rng(seed)
    same = g.random(200)<0.3
    s = g.normal(size=200)+same
    if seed%2: s = s.round(1)
    fa, miss, at = det_curve(s, same)
    fpr, tpr, t = roc_curve(same, s, drop_intermediate=False)
    assert np.allclose(fa, fpr) and np.allclose(miss, 1-tpr) and np.allclose(at[1:], t[1:])
    eer, fine = equal_error_rate(s, same), np.linspace(0, 1, 200_001)
    i = np.abs(np.interp(fine, np.arange(len(fa))/(len(fa)-1), fa-miss)).argmin()
    assert abs(eer-np.interp(fine[i], np.arange(len(fa))/(len(fa)-1), fa)) < 1e-3
    assert abs(equal_error_rate(-s, same)-(1-eer)) < 1e-9
    w = g.integers(1, 4, 200)
    assert abs(equal_error_rate(s, same, w)-equal_error_rate(np.repeat(s, w), np.repeat(same, w))) < 1e-9


def test_pairs():
    "All pairs of known speakers, each once, none with itself"
    h, who = torch.randn(9, 4), torch.tensor([0,1,-1,0,2,1,-1,0,2])
    s, same = verification_scores(h, who)
    known = [i for i in range(9) if who[i]>=0]
    pairs = [(i, j) for i in known for j in known if i<j]
    cos = [torch.cosine_similarity(h[i], h[j], dim=0).item() for i, j in pairs]
    assert np.allclose(s, cos, atol=1e-6) and same.tolist()==[who[i].item()==who[j].item() for i, j in pairs]
    assert 0 < eer_spread(h, who) < 0.5
