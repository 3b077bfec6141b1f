"Undistort: the target, the distortions, the loss beside loops, padding, and bad input."
import pytest, torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.method import check_method
from ssl_nb.data.mel import log_mel, real_samples
from ssl_nb.data.spoken import AudioInfo
from ssl_nb.pretext.undistort import Clip, Undistort, clean_frames, clip_peaks, distortions, undistort_loss

INFO = AudioInfo('test', rate=8000, length=3200)


def sounds(B=12, T=3200, seed=0):
    "Noise of different lengths, padded with zeros"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 1, T, generator=g)-0.5
    n = torch.randint(T//2, T+1, (B,), generator=g)
    x = x*(torch.arange(T)<n[:,None,None])
    x[torch.arange(B),0,n-1] = 0.3
    return x


def small(name='small_audio', **kwargs): return create_encoder(name, INFO, dim=32, depth=1, mlp=1, **kwargs)


def test_target():
    "Each frame holds its two log-mel slices; each band has mean 0 and deviation 1 over the real frames of its clip, and padding is 0"
    x = sounds()
    t, real = clean_frames(x, 8000, 160)
    assert torch.equal(real, small().real(x)) and (t[~real]==0).all()
    for b in (0, 5):
        n = int(real[b].sum())
        m = log_mel(x[b:b+1], 8000, 256, 80, 40)[0,:,:2*n]
        by_band = (m-m.mean(1, keepdim=True))/(m.std(1, keepdim=True, correction=0)+0.1)
        for f in (0, 7, n-1): assert torch.allclose(t[b,f], torch.cat([by_band[:,2*f], by_band[:,2*f+1]]), atol=1e-4)


def test_loss():
    pred, target, real = torch.randn(3,4,5, requires_grad=True), torch.randn(3,4,5), torch.rand(3,4)<0.6
    total = sum((pred[b,n,p]-target[b,n,p])**2 for b in range(3) for n in range(4) for p in range(5) if real[b,n])
    loss, loops = undistort_loss(pred, target, real), total/(5*real.sum())
    assert torch.allclose(loss, loops, atol=1e-5)
    assert torch.allclose(*[torch.autograd.grad(o, pred)[0] for o in (loss, loops)], atol=1e-5)
    spoiled = torch.where(real[...,None], target, 9.) # what padding holds is never asked for
    assert torch.equal(undistort_loss(pred, spoiled, real), loss)


@pytest.mark.parametrize('only', ['noise', 'hole', 'band', 'reverb', 'clip'])
def test_distortions(only):
    "Each changes sounds, none changes where they end, all stay in [-1,1]"
    torch.manual_seed(0)
    x, off = sounds(32), dict(noise=None, hole=0, band=0, reverb=0, clip=0)
    own = dict(noise=(0.,20.), hole=0.4, band=1., reverb=1., clip=1.)[only]
    y = distortions(8000, **off | {only: own}, p=1.)(x)
    assert torch.equal(real_samples(y), real_samples(x)) and y.abs().max() <= 1
    assert ((x-y).abs().amax((1,2))>1e-4).float().mean() > 0.9


def test_clipping():
    x = sounds(4)
    y = clip_peaks(x, torch.tensor([0.1, 0.5, 0.9, 1.]))
    for i, level in enumerate((0.1, 0.5, 0.9, 1.)):
        top = level*x[i].abs().max()
        assert torch.allclose(y[i], x[i].clamp(-top, top))
    assert torch.equal(y[3], x[3]) and Clip((0.2, 0.2), 1.)(x).abs().max() <= 0.1+1e-3


@pytest.mark.parametrize('name', ['small_audio', 'small_wave'])
def test_method(name):
    torch.manual_seed(0)
    check_method(Undistort(small(name), distortions(8000)), (sounds(), torch.zeros(12, dtype=torch.long)))


@pytest.mark.parametrize('make,words', [
    (lambda: distortions(0), 'rate must be above 0 samples a second, got 0'),
    (lambda: distortions(8000, noise=None, hole=0, band=0, reverb=0, clip=0), 'at least one distortion'),
    (lambda: undistort_loss(torch.rand(2,3,4), torch.rand(2,3,5)), 'pred and target must have the same shape'),
    (lambda: Undistort(create_encoder('small_mel_cnn', INFO), None), 'small_audio'),
    (lambda: Undistort(small(), distortions(8000)).pretext(torch.rand(2,1,99)), 'frame')])
def test_bad_input(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value)
