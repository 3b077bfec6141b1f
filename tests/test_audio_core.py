"Log-mel against librosa, views of sounds against scipy and numpy, encoders and padding"
import math
import numpy as np, pytest, torch
from types import SimpleNamespace
from scipy import signal
from ssl_nb.core.encoders import fresh_encoder, load_encoder, save_encoder
from ssl_nb.data import sound_views as V
from ssl_nb.data.mel import log_mel, mel_filters, mel_stats, real_frames, real_samples, resample
from ssl_nb.data.sound_encoders import FrameEncoder, MelPictures, sound_encoder, strides

RATE = 8000

def tone(hz, n=6400, T=6400, amp=0.5):
    x = torch.zeros(1, 1, T)
    x[:,:,:n] = amp*torch.sin(2*math.pi*hz*(torch.arange(n)+0.5)/RATE)
    return x

def peak(x, n=None):
    "Frequency of the largest peak, by a parabola through the logarithms of its three bins"
    x = x.flatten()[:n].double().numpy()
    s = np.log(np.abs(np.fft.rfft(x*np.hanning(len(x)), 8*len(x)))+1e-12)
    k = s.argmax()
    return (k + (s[k-1]-s[k+1])/(2*(s[k-1]-2*s[k]+s[k+1])))*RATE/(8*len(x))

def at(hz, x):
    "Amplitude of one frequency in the middle of a sound"
    x = x.flatten()[1600:4800].double()
    t = torch.arange(1600, 4800).double()/RATE
    c = [(x*f(2*math.pi*hz*t)).mean()*2 for f in (torch.sin, torch.cos)]
    return math.hypot(*c)

# ---------------------------------------------------------------- log-mel
def probe():
    "Two sounds that any machine makes alike: a chirp, and pulses that end early"
    t = np.arange(6400)/8000
    a = 0.5*np.sin(2*np.pi*(300*t+1500*t**2)) + 0.05*np.sin(2*np.pi*2500*t)
    b = 0.3*np.sign(np.sin(2*np.pi*140*t))*np.exp(-3*t)
    b[4000:] = 0
    return torch.from_numpy(np.stack([a, b]).astype(np.float32))

LIBROSA = { # librosa 0.11.0 in float64, natural log of its power in Slaney's bands with a floor of 1e-6
    (8000,256,80,40): (8, 16, '''
        -1.83249 -13.81551 -13.81551 -13.81551 -13.81551 -7.15559
        -3.19379 -12.19059 -13.81551 -13.81551 -13.81551 -7.04699
        -6.51637 -9.04688 -11.87946 -13.81551 -13.81551 -6.73625
        -9.06026 -13.81551 -11.88946 -6.89891 -13.81551 -5.99595
        -3.23968 -2.35397 -2.35396 -2.35402 -2.35355 -1.83121
        0.18998 -3.07979 -3.83931 -4.95991 -13.81551 -13.81551
        -3.62753 -5.62728 -6.71611 -7.57275 -13.81551 -13.81551
        -2.58439 -2.41321 -3.33363 -4.32407 -13.81551 -13.81551
        -3.72706 -3.67790 -4.72407 -5.61192 -13.81551 -13.81551
        -5.37578 -5.54173 -6.68867 -7.48684 -13.81551 -13.81551
        '''),
    (16000,512,160,80): (19, 9, '''
        -1.94475 -13.81551 -13.81551 -13.81551 -13.81551
        0.73355 -13.81551 -13.81551 -13.81551 -13.81551
        -5.58268 2.74774 -13.81551 -13.81551 -13.81551
        -9.53832 -13.81551 -12.87435 -12.74112 -13.81551
        -8.60340 -13.81551 -13.81551 -13.81551 -13.81551
        -0.62860 -5.03902 -6.18742 -13.81551 -13.81551
        -2.33969 -6.21757 -8.25810 -13.81551 -13.81551
        -5.45988 -6.21850 -7.89636 -13.81551 -13.81551
        -5.11374 -5.60869 -6.61268 -13.81551 -13.81551
        -4.75986 -4.93153 -6.05257 -13.81551 -13.81551
        '''),
    (44100,1024,441,64): (15, 4, '''
        -2.34211 -13.81551 -13.81551 -13.81551
        -1.31976 -13.81551 -13.81551 -13.81551
        -1.23652 -13.81551 -13.81551 -13.81551
        -7.86498 -5.96740 -13.81551 -13.81551
        -8.46056 -13.81551 -13.81551 -13.81551
        -1.27147 -5.03830 -6.28619 -13.81551
        -0.39694 -6.21027 -7.39846 -13.81551
        -2.18146 -6.21859 -7.54730 -13.81551
        -3.17422 -3.67438 -5.00423 -13.81551
        -4.30672 -4.79840 -6.12131 -13.81551
        '''),
}

@pytest.mark.parametrize('how', LIBROSA)
def test_log_mel_is_librosas(how):
    rows,cols,text = LIBROSA[how]
    ours = log_mel(probe().double(), *how)
    few = ours[:,::rows,::cols]
    known = torch.tensor([float(v) for v in text.split()]).double().view_as(few)
    assert (few-known).abs().max()<2e-5
    single = log_mel(probe(), *how) # the transform is in double precision, what comes out is not
    assert single.dtype==torch.float32 and (single-ours).abs().max()<1e-5

def test_filters_have_librosas_sums():
    for how,total,top in [((8000,256,40),1.2792624,0.014443773), ((16000,512,80),2.5582607,0.021594275),
                          ((44100,1024,64),1.4846789,0.013009735)]:
        w = mel_filters(*how)
        assert abs(w.sum().item()-total)<1e-5 and abs(w[3].max().item()-top)<1e-7

def test_mel_stats_ignore_padding():
    x = probe()[1:,:4000]
    long = torch.nn.functional.pad(x, (0,2400))
    real = real_frames(long, 80, 81)
    m = log_mel(x, RATE)[:,:,:50]
    assert real.sum()==50
    s = mel_stats(long, RATE)
    assert torch.allclose(s, torch.cat([m.mean(2), m.std(2, unbiased=False)], 1), atol=1e-4)
    assert mel_stats(torch.zeros(2, 1, 800), RATE).isfinite().all()

def test_log_mel_of_a_longer_clip_is_the_same():
    x = probe()[:,:3200]
    assert torch.equal(log_mel(torch.nn.functional.pad(x, (0,3200)), RATE)[:,:,:41], log_mel(x, RATE))

def test_resample_is_scipys():
    x = probe().numpy()
    assert np.allclose(resample(x, 8000, 6000), signal.resample_poly(x, 3, 4, axis=-1), atol=1e-6)
    assert abs(peak(torch.from_numpy(resample(tone(500).numpy(), 8000, 4000)))-1000)<1 # peak() reads it at 8 kHz
    with pytest.raises(ValueError, match='old'): resample(x, 0, 8000)

@pytest.mark.parametrize('bad,name', [(dict(rate=0),'rate'), (dict(hop=0),'hop'), (dict(n_mels=2.5),'n_mels'),
                                      (dict(n_mels=200),'too many')])
def test_bad_settings_of_log_mel(bad, name):
    with pytest.raises(ValueError, match=name): log_mel(probe(), **dict(rate=8000) | bad)

def test_bad_sounds():
    for x in (torch.zeros(2, 2, 100), torch.zeros(100), torch.zeros(2, 100, dtype=torch.int16)):
        with pytest.raises(ValueError, match='sounds are float'): log_mel(x, RATE)

# ---------------------------------------------------------------- views, one by one
def test_speed_moves_pitch_and_length():
    x = torch.cat([tone(500, 4000)]*3)
    f = torch.tensor([0.8, 1., 1.25])
    y = V.speed(x, f)
    assert real_samples(y).tolist()==[5000, 4000, 3200]
    for row,k in zip(y, f.tolist()): assert abs(peak(row, int(4000/k))-500*k)<1.
    assert (y[1]-x[1]).abs().max()<2e-3 # factor 1 changes nothing
    want = signal.resample(x[2,0].numpy(), 5120) # scipy's, by Fourier, of the whole clip
    assert np.abs(y[2,0,200:3000].numpy()-want[200:3000]).max()<5e-3

def test_speed_does_not_alias():
    assert V.speed(tone(3600), torch.tensor([1.5]))[0,0,400:4000].abs().max()<0.02 # 5,400 Hz would fold to 2,600

def test_stretch_keeps_the_pitch_and_pitch_keeps_the_length():
    x = torch.cat([tone(500, 5000)]*2)
    y = V.stretch(x, torch.tensor([1.25, 0.8]))
    assert real_samples(y).tolist()==[4000, 6250]
    for row,n in zip(y, (4000, 6250)): assert abs(peak(row, n)-500)<1.5
    z = V.pitch(x, torch.tensor([3., -3.]))
    assert (real_samples(z)-5000).abs().max()<=2
    for row,k in zip(z, (3, -3)): assert abs(peak(row, 5000)/500/2**(k/12)-1)<0.004
    assert 0.8<(z[:,:,1000:4000].std()/x[:,:,1000:4000].std()).item()<1.1 # about as loud as before

def test_snr_is_exact_and_padding_stays_zero():
    torch.manual_seed(0)
    x = torch.cat([tone(440, n) for n in (6400, 3000, 1000)])
    snr = torch.tensor([0., 10., 20.])
    noise = V.add_noise(x, snr)-x
    got = 10*torch.log10((x**2).sum(2)/(noise**2).sum(2)).flatten()
    assert torch.allclose(got, snr, atol=1e-3)
    assert real_samples(noise).tolist()==[6400, 3000, 1000]

def test_gain_in_decibels():
    x = torch.cat([tone(440)]*2)
    y = V.gain(x, torch.tensor([20., -6.]))
    assert torch.allclose(y[0], 10*x[0]) and torch.allclose(y[1], x[1]*10**-0.3)

def test_band_filter_has_butterworths_response():
    hz = torch.tensor([100., 200., 400., 1000., 2000., 2500., 3200.])
    x = torch.cat([tone(float(f)) for f in hz])
    y = V.band_filter(x, RATE, torch.full((7,), 300.), torch.full((7,), 2000.), order=4)
    got = torch.tensor([at(float(f), b)/at(float(f), a) for f,a,b in zip(hz, x, y)])
    low = signal.freqs(*signal.butter(4, 2*math.pi*300, 'high', analog=True), 2*math.pi*hz.numpy())[1]
    high = signal.freqs(*signal.butter(4, 2*math.pi*2000, analog=True), 2*math.pi*hz.numpy())[1]
    assert np.abs(got.numpy()-np.abs(low*high)).max()<5e-3
    open_ = V.band_filter(x, RATE, torch.zeros(7), torch.full((7,), 4000.))
    assert (open_-x).abs().max()<1e-5

def test_reverb_decays_as_drawn_and_is_a_convolution():
    torch.manual_seed(0)
    want = torch.tensor([0.1, 0.3, 0.6]).repeat_interleave(8)
    h = V.room(want, RATE, 8000)
    left = (h.double()**2).flip(2).cumsum(2).flip(2)[:,0] # Schroeder's curve: the energy still to come
    db = 10*torch.log10(left/left[:,:1])
    for k,t in enumerate((0.1, 0.3, 0.6)): # from -5 to -25 dB, three times that is 60
        d = db[8*k:8*k+8]
        t60 = 3*((d>-25).sum(1)-(d>-5).sum(1)).double().mean()/RATE
        assert abs(t60/t-1)<0.1
    x = torch.cat([tone(700, 2000)]*2)
    torch.manual_seed(1)
    y = V.reverb(x, RATE, torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.]))
    torch.manual_seed(1)
    echo = V.room(torch.tensor([0.1, 0.3]), RATE, 6400)[0,0]
    by_hand = x[0,0].numpy() + 0.5*signal.fftconvolve(x[0,0].numpy(), echo.numpy())[:6400]
    assert np.abs(y[0,0,:2000].numpy()-by_hand[:2000]).max()<1e-4
    assert torch.allclose(y[1], x[1], atol=1e-5)

def test_masks_and_segments():
    x = torch.arange(1., 11).view(1, 1, 10).repeat(2, 1, 1)
    y = V.mask_time(x, torch.tensor([0, 4]), torch.tensor([3, 2]))
    assert y[0,0].tolist()==[0,0,0,4,5,6,7,8,9,10] and y[1,0].tolist()==[1,2,3,4,0,0,7,8,9,10]
    assert V.segment(x, torch.tensor([0, 4]), torch.tensor([3, 2]))[1,0].tolist()==[5,6]+[0]*8
    m = torch.ones(2, 4, 3)
    z = V.mask_mel(m, torch.tensor([1, 0]), torch.tensor([2, 1]), -1.)
    assert z[0,:,0].tolist()==[1,-1,-1,1] and z[1,:,2].tolist()==[-1,1,1,1]
    torch.manual_seed(0)
    s = V.SpecAugment(time=0.3, bands=0.3)(torch.ones(400, 40, 80))
    gone = (s==0).float().mean((1,2))
    assert gone.std()>0.05 and 0.3<gone.mean()<0.6 # two spans each way, of 15 % on average

OPS = [V.Shift(), V.Segment(), V.Gain(), V.Noise(p=1), V.Speed(p=1), V.Stretch(p=1), V.Pitch(p=1), V.Band(RATE, p=1),
       V.Reverb(RATE, p=1), V.Hole(p=1), V.audio_views(RATE)]

@pytest.mark.parametrize('op', OPS, ids=lambda o: type(o).__name__)
def test_each_row_its_own_draw_and_padding_stays(op):
    torch.manual_seed(0)
    x = (tone(300, 4000)+tone(1100, 4000, amp=0.3)).repeat(8, 1, 1)
    y = op(x)
    assert y.shape==x.shape and y.isfinite().all()
    assert len({r.numpy().tobytes() for r in y})==8
    most = 4000/0.9 + 640 if isinstance(op, (V.AudioViews, V.Speed, V.Shift)) else 4000
    assert real_samples(y).max()<=most+2
    assert not y[:,:,int(most)+2:].any()
    torch.manual_seed(0)
    assert torch.equal(op(x), y)

@pytest.mark.parametrize('op', OPS, ids=lambda o: type(o).__name__)
def test_silence_and_one_sample(op):
    x = torch.zeros(4, 1, 1600)
    assert op(x).isfinite().all() and not op(x).any()
    x[:,:,0] = 0.5
    assert op(x).isfinite().all()

def test_views_refuse_what_is_no_sound():
    views = V.audio_views(RATE)
    for bad in (torch.zeros(2, 3, 100), torch.zeros(2, 1, 100, dtype=torch.int16), torch.full((1, 1, 10), 300.),
                torch.full((1, 1, 10), math.nan)):
        with pytest.raises(ValueError, match='views'): views(bad)
    for bad in (dict(rate=0), dict(rate=8000, speed=(0,1)), dict(rate=8000, noise=(9,2)), dict(rate=8000, p=2)):
        with pytest.raises(ValueError): V.audio_views(**bad)
    with pytest.raises(ValueError, match='one number for each'): V.gain(torch.zeros(3, 1, 9), torch.zeros(2))

# ---------------------------------------------------------------- encoders
def info(rate=8000, length=6400, n=0): return SimpleNamespace(kind='audio', rate=rate, length=length, mean=[-6.]*n, std=[3.]*n)

@pytest.mark.parametrize('front', ['mel','wave'])
@pytest.mark.parametrize('rate', [8000, 16000, 22050])
def test_a_padded_frame_changes_nothing(front, rate):
    torch.manual_seed(0)
    enc = sound_encoder(f'small_{"audio" if front=="mel" else front}', info(rate, int(rate*0.8)), depth=2).eval()
    hop = enc.hop
    n = 13*hop-hop//3 # the last frame is only partly real
    x = torch.randn(2, 1, n)*0.1
    h,real = enc.tokens(torch.nn.functional.pad(x, (0, 13*hop-n)))
    long,mask = enc.tokens(torch.nn.functional.pad(x, (0, 30*hop-n)))
    assert real is None and mask.sum(1).tolist()==[13, 13]
    assert (long[:,:13]-h).abs().max()<2e-4
    assert (enc(torch.nn.functional.pad(x, (0, 30*hop-n)))-h.mean(1)).abs().max()<2e-4
    assert (enc.frames(torch.nn.functional.pad(x, (0, 30*hop-n)))[:,:13]-enc.frames(
        torch.nn.functional.pad(x, (0, 13*hop-n)))).abs().max()<2e-4

@pytest.mark.parametrize('front', ['mel','wave'])
def test_parts_agree(front):
    enc = FrameEncoder(front=front).eval()
    x = tone(500, 4000).repeat(3, 1, 1)
    h = enc.forward_features(x)
    assert torch.allclose(enc.context(enc.frames(x), enc.real(x)), h)
    hs = enc.hidden(x)
    assert len(hs)==4 and torch.allclose(enc.norm(hs[-1]), h)
    assert torch.allclose(h[:,:25].mean(1), enc(x), atol=1e-5)
    keep = torch.tensor([[3,7,30]]*3)
    k,real = enc.tokens(x, keep)
    assert k.shape==(3,3,64) and real.tolist()==[[True,True,False]]*3

@torch.no_grad()
def test_frames_that_are_left_out_are_not_seen():
    enc = FrameEncoder().eval()
    h = torch.randn(2, 40, 64)
    keep = torch.tensor([[0,5,9],[2,3,20]])
    a = enc.context(h, keep=keep)
    other = torch.randn(2, 40, 64).scatter(1, keep[:,:,None].expand(-1, -1, 64), h.gather(1, keep[:,:,None].expand(-1, -1, 64)))
    assert torch.allclose(enc.context(other, keep=keep), a, atol=1e-5)

NAMES = ['small_audio','small_wave','small_mel_cnn','small_vit','resnet18']
@pytest.mark.parametrize('name', NAMES)
def test_saved_loaded_and_drawn_anew(name, tmp_path):
    enc = sound_encoder(name, info(n=40)).eval()
    x = tone(500, 5000).repeat(2, 1, 1)
    save_encoder(enc, tmp_path)
    again = load_encoder(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(x), enc(x), atol=1e-6) and enc(x).shape==(2,enc.num_features)
        fresh = fresh_encoder(enc, 1)
        assert not torch.allclose(fresh(x), enc(x)) and type(fresh) is type(enc)
        assert torch.equal(fresh_encoder(enc, 1)(x), fresh(x))

def test_all_weights_learn_and_silence_is_finite():
    for name in NAMES[:3]:
        enc = sound_encoder(name, info())
        enc(tone(500, 4000).repeat(4, 1, 1)+0.1*torch.randn(4, 1, 6400)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in enc.parameters())
        assert enc.eval()(torch.zeros(2, 1, 6400)).isfinite().all()

def test_strides_multiply_to_the_hop():
    for rate in (8000, 11025, 16000, 22050, 24000, 44100, 48000):
        hop = 2*(rate//100)
        assert math.prod(strides(hop))==hop

def test_bad_encoders():
    with pytest.raises(ValueError, match='small_audio'): sound_encoder('small_audoi', info())
    with pytest.raises(ValueError, match='shorter than one frame'): sound_encoder('small_audio', info(length=100))
    with pytest.raises(ValueError, match='shorter than one frame'): FrameEncoder()(torch.zeros(1, 1, 100))
    with pytest.raises(ValueError, match='rate'): FrameEncoder(rate=0)
    with pytest.raises(ValueError, match='front'): FrameEncoder(front='mell')

@pytest.mark.parametrize('name', ['small_mel_cnn','resnet18'])
def test_pictures_are_pooled_over_real_columns(name):
    torch.manual_seed(0)
    enc = sound_encoder(name, info(n=40)).eval()
    x = torch.cat([tone(hz, n) for hz,n in ((300,2500), (900,4000), (2000,5500))]) + 0.01*torch.randn(3, 1, 6400)
    for row,n in zip(x, (2500,4000,5500)): row[:,n:] = 0
    pad = torch.nn.functional.pad
    with torch.no_grad():
        h,long = enc(x),enc(pad(x, (0,8000))) # a second of padding
        tokens,real = enc.tokens(pad(x, (0,8000)))
        assert (long-h).norm()<0.4*(h-h.mean(0)).norm()
        assert real.shape==tokens.shape[:2] and not real.all() and real.any(1).all()
        assert torch.allclose(long, torch.stack([t[r].mean(0) for t,r in zip(tokens, real)]), atol=1e-5)
        assert not enc.picture(x)[:,:,:,36:].any() and enc.tokens(x+1e-3)[1] is None
        other = pad(x, (0,8000))
        assert enc(torch.zeros(1, 1, 6400)).isfinite().all() and enc.picture(other).shape[3]==90

@pytest.mark.parametrize('name', ['small_mel_cnn','small_vit','small_wave'])
def test_training_begins_with_any_encoder_of_sounds(name, tmp_path):
    from ssl_nb.core.encoders import create_encoder
    from ssl_nb.core.loader import DataInfo
    from ssl_nb.data.spoken import AudioInfo
    enc,x = create_encoder(name, AudioInfo()).eval(),tone(500).repeat(2, 1, 1)
    save_encoder(enc, tmp_path)
    with torch.no_grad(): assert torch.allclose(create_encoder(tmp_path, AudioInfo()).eval()(x), enc(x), atol=1e-6)
    with pytest.raises(ValueError, match='rate 8000'): create_encoder(tmp_path, AudioInfo(rate=16000, length=12800))
    with pytest.raises(ValueError, match="of the kind 'images'"): create_encoder(tmp_path, DataInfo(channels=1, size=16))

def test_an_encoder_of_another_rate_is_refused(tmp_path):
    from ssl_nb.core.encoders import create_encoder
    from ssl_nb.data.spoken import AudioInfo
    at = lambda rate: AudioInfo(rate=rate, length=int(rate*0.8))
    enc = create_encoder('small_audio', at(8000))
    save_encoder(enc, tmp_path)
    with torch.no_grad(): # longer clips of the same rate do
        assert torch.allclose(create_encoder(tmp_path, AudioInfo(rate=8000, length=12000)).eval()(tone(500)), enc.eval()(tone(500)), atol=1e-6)
    with pytest.raises(ValueError, match='rate 8000'): create_encoder(tmp_path, at(16000))
