"""Sounds in, clips out: every format, rate, length and number of channels; what cannot be used is counted and named once; labels from
folders, tables and names; spoken words that are the same everywhere; and commands that read folders of sounds as they read images."""
import json
import os
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from ssl_nb.core.loader import ResidentDL, to_unit
from ssl_nb.data.audio import Audio, audio_dl, audio_dls, load_sounds, read_sound
from ssl_nb.data.mel import real_samples
from ssl_nb.data.spoken import ACCENTS, HEARD, UNHEARD, WORDS, spoken_arrays, spoken_dls

RATES = dict(wav=22050, flac=16000, ogg=44100, mp3=16000)


def tone(rate, seconds=0.5, pitch=440, loud=0.5): return loud*np.sin(2*np.pi*pitch*np.arange(round(rate*seconds))/rate)


def put(path, wave, rate=8000, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **kwargs)


def quiet(f, *args, **kwargs):
    "(result, texts of the warnings)"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        out = f(*args, **kwargs)
    return out,[str(w.message) for w in said]


@pytest.fixture(scope='module')
def sounds(tmp_path_factory):
    "Two classes (low, high) of 12 files each, by two speakers, in four formats"
    d = tmp_path_factory.mktemp('sounds')/'tones'
    for name,pitch in (('low', 300), ('high', 1200)):
        for i in range(12):
            end,rate = list(RATES.items())[i%4]
            put(d/name/f'{i:02}_{"ab"[i//6]}.{end}', tone(rate, 0.3+0.02*i, pitch+7*i), rate)
    return d


def pitch_of(clip, rate):
    "Loudest frequency"
    return np.abs(np.fft.rfft(clip)).argmax()*rate/len(clip)


# The seam: whole numbers of 16 bits

def test_sounds_stay_int16_and_come_out_as_floats():
    x = torch.tensor([[[-32768,0,16384,32767]]], dtype=torch.int16).repeat(3, 1, 1)
    dl = ResidentDL(x, bs=2)
    assert dl.xs[0].dtype==torch.int16 and torch.equal(dl.one_batch()[0][0,0], torch.tensor([-1,0,0.5,32767/32768]))
    assert torch.equal(to_unit(x), x.float()/32768)
    with pytest.raises(ValueError, match='int16'): ResidentDL(x[:,0])  # (N,T) is not a sound


# One file

@pytest.mark.parametrize('end', RATES)
@pytest.mark.parametrize('channels', [1,2,8])
def test_every_format_at_every_rate_keeps_pitch_and_length(tmp_path, end, channels):
    if end=='mp3' and channels>2: pytest.skip('mp3 has one or two channels')
    rate = RATES[end]
    put(tmp_path/f's.{end}', np.tile(tone(rate)[:,None], channels), rate)
    clip,old,clipped = read_sound(tmp_path/f's.{end}', 8000, 8000)
    assert clip.dtype==np.int16 and clip.shape==(8000,) and old==rate and clipped==0
    n = int(real_samples(torch.from_numpy(clip)[None]/32768))
    assert 3900 < n < 4800 and not clip[n:].any()  # mp3 has blocks of 1,152 samples
    middle = clip[500:3500]/32768
    assert abs(pitch_of(middle, 8000)-440) < 5 and abs(np.abs(middle).max()-0.5) < 0.05


def test_channels_are_averaged_and_long_sounds_cut(tmp_path):
    put(tmp_path/'s.wav', np.stack([np.full(900, 0.5), np.full(900, -0.25)], 1))
    clip,_,_ = read_sound(tmp_path/'s.wav', 8000, 400)
    assert np.abs(clip/32768-0.125).max() < 1e-3 and clip.shape==(400,)


def test_resampling_takes_away_what_the_rate_cannot_hold(tmp_path):
    "6,000 Hz would come out as 2,000 Hz at 8,000 samples a second"
    put(tmp_path/'s.wav', tone(44100, pitch=6000)+0.5*tone(44100, pitch=500), 44100)
    clip,_,_ = read_sound(tmp_path/'s.wav', 8000, 4000)
    power = np.abs(np.fft.rfft(clip[200:3800]))
    hz = np.fft.rfftfreq(3600, 1/8000)
    assert power[abs(hz-2000)<20].max() < 0.01*power[abs(hz-500)<20].max()


def test_only_the_beginning_of_a_long_file_is_read(tmp_path, monkeypatch):
    put(tmp_path/'s.wav', tone(8000, 60))
    read,many = soundfile.SoundFile.read,[]
    monkeypatch.setattr(soundfile.SoundFile, 'read', lambda self, n=-1, *a, **k: many.append(n) or read(self, n, *a, **k))
    read_sound(tmp_path/'s.wav', 8000, 800)
    assert many and all(0<n<2000 for n in many)


# What cannot be used

BAD = {'empty': lambda p: put(p, np.zeros(0)), 'silent': lambda p: put(p, np.zeros(4000)), 'NaN': lambda p: put(p, np.full(4000, np.nan), subtype='FLOAT'),
       '9 channels': lambda p: put(p, np.ones((4000,9))*0.1), 'shorter': lambda p: put(p, tone(8000, 0.005)),
       'ormat': lambda p: p.write_bytes(b'RIFF no sound'), 'infinite': lambda p: put(p, np.full(4000, np.inf), subtype='FLOAT')}


@pytest.fixture
def mixed(tmp_path):
    for i in range(12): put(tmp_path/f'{"ab"[i%2]}/{i}.wav', tone(8000, 0.4, 300+20*i))
    for k,(why,make) in enumerate(BAD.items()): make(tmp_path/f'a/bad{k}.wav')
    return tmp_path


def test_unusable_files_are_counted_and_named_once(mixed):
    dls,said = quiet(audio_dls, mixed, bs=2)
    assert dls.info.skipped==len(BAD) and sum(dl.n for dl in dls.loaders)==12
    about = [s for s in said if 'could not be read' in s]
    assert len(about)==1 and f'{len(BAD)} of {12+len(BAD)} sounds' in about[0] and about[0].split(': ')[0] in dls.info.read
    assert not any('bad' in f for dl in dls.loaders for f in dl.files)
    dl,_ = quiet(audio_dl, mixed, dls.info)
    assert dl.n==12 and dl.info.skipped==len(BAD)


@pytest.mark.parametrize('why', BAD)
def test_the_reason_is_said(tmp_path, why):
    BAD[why](tmp_path/'s.wav')
    x,good,failed,_ = load_sounds(['s.wav'], 8000, 800, tmp_path)
    assert len(x)==len(good)==0 and why in failed[0]


def test_a_folder_without_a_usable_sound(tmp_path):
    for i in range(3): put(tmp_path/f'{i}.wav', np.zeros(4000))
    with pytest.raises(ValueError, match='none of the 3 sounds .* silent'): quiet(audio_dls, tmp_path)
    (tmp_path/'e').mkdir()
    with pytest.raises(ValueError, match='no sounds in .*wav .flac .ogg .mp3'): audio_dls(tmp_path/'e')


def test_clipped_sounds_and_other_rates_are_kept_and_said(tmp_path):
    for i in range(10): put(tmp_path/f'{i}.wav', tone(8000, loud=0.5 if i else 3.), 8000)
    put(tmp_path/'x.wav', tone(16000), 16000)
    dls,said = quiet(audio_dls, tmp_path, bs=2)
    assert dls.info.rate==8000 and sum(dl.n for dl in dls.loaders)==11
    for line in (dls.info.read, ' '.join(said)):
        assert re.search(r'1 files? .*clipped', line) and re.search(r'16,?000 to 8,?000', line)
    assert sum('resampled' in s for s in said)==1


@pytest.mark.parametrize('given,match', [(dict(rate=0), 'rate .* got 0'), (dict(rate=-8000), 'rate .* got -8000'), (dict(seconds=0), 'seconds .* got 0'),
    (dict(rate=float('nan')), 'rate .* got nan'), (dict(rate=8000.5), 'whole number'), (dict(seconds=-1.), 'seconds'), (dict(pattern='(?P<x'), 'no regular expression'),
    (dict(pattern=r'\d'), 'no group'), (dict(pattern='(?P<x>zzz)'), 'none of 24'), (dict(label='accent'), None)])
def test_bad_settings_are_named(sounds, given, match):
    if match is None: return audio_dls(sounds, **given)  # folders have no columns: nothing to complain about
    with pytest.raises(ValueError, match=match): quiet(audio_dls, sounds, **given)


# Folders, tables, names

def test_class_folders_and_speakers_of_names(sounds):
    dls,said = quiet(audio_dls, sounds, bs=4, pattern=r'_(?P<speaker>[a-z])\.')
    info = dls.info
    assert info.kind=='audio' and info.classes=={'class': ['high','low'], 'speaker': ['a','b']}
    assert info.rate==16000 and abs(info.length/16000-0.52) < 0.1  # 16,000 is the commonest
    for dl in dls.loaders:
        assert len(dl.files)==dl.n
        assert [info.classes['class'][c] for c,_ in dl.y.tolist()]==[f.split('/')[0] for f in dl.files]
        assert [info.classes['speaker'][s] for _,s in dl.y.tolist()]==[re.search(r'_(\w)\.', f)[1] for f in dl.files]
    x,y = dls.one_batch()
    assert x.shape==(4,1,info.length) and x.abs().max()<=1 and y.shape==(4,2)
    assert len(info.mean)==len(info.std)==40


def test_each_row_is_its_file(sounds):
    "After shuffling parts, a clip still has the pitch of the class that its name says"
    dls,_ = quiet(audio_dls, sounds, rate=8000)
    for dl in dls.loaders:
        for x,f in zip(dl.xs[0], dl.files): assert (pitch_of(x[0,:2000].numpy(), 8000) > 700)==f.startswith('high'), f


def test_split_folders(tmp_path):
    for s,n in (('train', 8), ('valid', 4), ('test', 4)):
        for i in range(n): put(tmp_path/s/'ab'[i%2]/f'{s}{i}.wav', tone(8000, pitch=300+30*i+len(s)))
    dls,_ = quiet(audio_dls, tmp_path, bs=2)
    assert [dl.n for dl in dls.loaders]==[8,4,4] and dls.info.names()==['a','b']
    assert all(f.startswith(s) for s,dl in zip(('train','valid','test'), dls.loaders) for f in dl.files)


def test_a_pattern_may_name_the_part(tmp_path):
    for i in range(12): put(tmp_path/f'{i%2}_{["train","train","test"][i%3]}_{i}.wav', tone(8000, pitch=300+30*i))
    dls,_ = quiet(audio_dls, tmp_path, bs=2, pattern=r'(?P<digit>\d)_(?P<split>[a-z]+)_')
    assert list(dls.info.classes)==['digit'] and dls.test.n==4 and all('_test_' in f for f in dls.test.files)
    assert sum(dl.n for dl in dls.loaders)==12


@pytest.mark.parametrize('end', ['csv','tsv','jsonl','parquet'])
def test_tables(sounds, end):
    files = sorted(str(p.relative_to(sounds)) for p in sounds.rglob('*.*') if p.parent!=sounds)
    df = pd.DataFrame(dict(audio=files, word=[f.split('/')[0] for f in files], speaker=[f.split('.')[0][-1] for f in files],
                           split=['test' if i%4==0 else 'train' for i in range(len(files))]))
    table = sounds/f'table.{end}'
    try:
        if end=='csv': df.to_csv(table, index=False)
        elif end=='tsv': df.to_csv(table, index=False, sep='\t')
        elif end=='jsonl': df.to_json(table, orient='records', lines=True)
        else: df.to_parquet(table)
        from ssl_nb.app.folder import guess_kind
        assert guess_kind(table)=='audio'
        dls,_ = quiet(audio_dls, table, bs=4)
        assert list(dls.info.classes)==['word','speaker'] and dls.test.n==6
        only,_ = quiet(audio_dls, table, label='speaker', bs=4)
        assert list(only.info.classes)==['speaker'] and only.train.y.ndim==1
        with pytest.raises(ValueError, match="no column 'accent'"): audio_dls(table, label='accent')
    finally: table.unlink(missing_ok=True)


def test_a_missing_file_of_a_table(sounds, tmp_path):
    for i in range(6): put(tmp_path/f'{i}.wav', tone(8000, pitch=300+50*i))
    pd.DataFrame(dict(file=[f'{i}.wav' for i in range(7)])).to_csv(tmp_path/'t.csv', index=False)
    dls,said = quiet(audio_dls, tmp_path/'t.csv', bs=2)
    assert dls.info.skipped==1 and any('6.wav (missing)' in s for s in said)


def test_lengths_are_cut_and_padded(tmp_path):
    for i in range(20): put(tmp_path/f'{i}.wav', tone(8000, 0.2 if i%2 else 1.5, 300+9*i))
    dls,_ = quiet(audio_dls, tmp_path, seconds=0.5, bs=2)
    found = {int(n) for dl in dls.loaders for n in real_samples(to_unit(dl.xs[0]))}
    assert dls.info.length==4000 and {n//100 for n in found}<={15,16,39,40} and len(found)>1
    auto,_ = quiet(audio_dls, tmp_path, bs=2)
    assert auto.info.length==12000
    assert quiet(audio_dls, tmp_path, bs=2, limit=8)[0].info.read.startswith('8 sounds')


def test_what_does_not_fit_is_refused(sounds, monkeypatch):
    import ssl_nb.data.audio as module
    monkeypatch.setattr(module, 'fits', lambda nbytes, device=None: nbytes<1000)
    with pytest.raises(ValueError, match='GiB of memory'): audio_dls(sounds)


# The kind

def test_the_kind(sounds):
    from ssl_nb.app.folder import builtin_data, guess_kind
    assert guess_kind(sounds)=='audio' and builtin_data()['spoken']=='audio'
    dls,_ = quiet(Audio.read, sounds, bs=4, limit=12)
    x,info = dls.one_batch()[0],dls.info
    shown,raw = Audio.show(x, info),Audio.raw(x, info)
    assert shown.ndim==4 and shown.shape[1]==1 and 0<=shown.min() and shown.max()<=1 and raw.shape==(4,80)
    for name in ('small_audio','small_wave','small_mel_cnn'): assert Audio.encoder(name, info)(x).shape[0]==4
    for small in (False,True): assert Audio.views(info, small)(x).shape==x.shape
    with pytest.raises(ValueError, match='pixels'): Audio.read(sounds, size=32)
    with pytest.raises(ValueError, match='nothing_audio'): Audio.encoder('nothing_audio', info)


def test_low_tones_are_drawn_below():
    from ssl_nb.data.spoken import AudioInfo
    low,high = [torch.tensor(tone(8000, 0.8, p))[None,None].float() for p in (200,3000)]
    rows = [Audio.show(x, AudioInfo())[0,0].mean(1).argmax().item() for x in (low,high)]
    assert rows[0] > 30 > 10 > rows[1]


def test_commands_on_a_folder_of_sounds(sounds, tmp_path):
    from ssl_nb.app.cli import main
    run,features = tmp_path/'run',tmp_path/'f.parquet'
    assert main(['pretrain', 'simclr', '--data', str(sounds), '--epochs', '1', '--batch-size', '8', '--out', str(run), '--device', 'cpu', '--no-supervised'])==0
    cfg = json.loads((run/'config.json').read_text())
    assert cfg['kind']=='audio' and cfg['info']['rate']==16000 and cfg['encoder']=='small_audio' and (run/'pretext.png').exists()
    assert {'raw input','random encoder','this encoder'} <= set(json.loads((run/'report.json').read_text())['table'])
    assert main(['report', str(run), '--device', 'cpu'])==0
    assert main(['embed', str(run), str(sounds), '--out', str(features), '--device', 'cpu'])==0
    h = pd.read_parquet(features)
    assert len(h)==24 and set(h.label)=={'low','high'}
    assert main(['compare', '--data', str(sounds), '--methods', 'simclr', '--epochs', '1', '--workers', '1', '--out', str(tmp_path/'c'), '--device', 'cpu'])==0


def test_what_a_folder_of_sounds_was_told_is_kept(sounds, tmp_path, capsys):
    from ssl_nb.app.cli import main
    run,pattern = tmp_path/'run',r'_(?P<speaker>[a-z])\.'
    told = ['--rate', '8000', '--clip-seconds', '0.3', '--pattern', pattern]
    usual = ['--epochs', '1', '--batch-size', '8', '--device', 'cpu', '--no-supervised']
    assert main(['pretrain', 'simclr', '--data', str(sounds), '--out', str(run), '--encoder', 'small_mel_cnn', *told, *usual])==0
    cfg = json.loads((run/'config.json').read_text())
    assert [cfg[k] for k in ('rate','clip_seconds','pattern')]==[8000,0.3,pattern]
    assert (cfg['info']['rate'],cfg['info']['length'])==(8000,2400) and [*cfg['info']['classes']]==['class','speaker']
    assert main(['report', str(run), '--device', 'cpu', '--no-supervised'])==0
    assert main(['embed', str(run), str(sounds), '--out', str(tmp_path/'f.parquet'), '--device', 'cpu'])==0
    assert set(pd.read_parquet(tmp_path/'f.parquet').speaker)=={'a','b'}
    assert main(['pretrain', 'simclr', '--from', str(run), '--out', str(tmp_path/'on'), *usual])==0
    on = json.loads((tmp_path/'on/config.json').read_text())
    assert on['pattern']==pattern and on['info']['length']==2400
    put(tmp_path/'fast'/'0_a.wav', tone(16000), 16000) # would be read at 16,000 by itself
    for i in range(1, 16): shutil.copy(tmp_path/'fast'/'0_a.wav', tmp_path/'fast'/f'{i}_a.wav')
    assert main(['pretrain', 'simclr', '--from', str(run), '--data', str(tmp_path/'fast'), '--out', str(tmp_path/'new'), *usual])==0
    assert json.loads((tmp_path/'new/config.json').read_text())['info']['rate']==8000
    capsys.readouterr()
    for args,said in ((['--data', str(sounds), '--out', str(run), '--resume', '--rate', '16000'], 'rate 8000 (now 16000)'),
                      (['--data', 'digits', '--pattern', pattern], 'leave out pattern'), (['--data', 'spoken', '--rate', '8000'], 'leave out rate'),
                      (['--from', str(run), '--rate', '16000'], 'has heard sounds of 8000 samples a second, not of 16000'),
                      (['--data', str(sounds), '--rate', '0'], 'rate must be at least 1000, got 0'),
                      (['--data', str(sounds), '--clip-seconds', '0'], 'clip_seconds must be at least 0.1'),
                      (['--data', str(sounds), '--pattern', 'x'], 'names no group')):
        assert main(['pretrain', 'simclr', '--device', 'cpu', *args])==2
        assert said in capsys.readouterr().err


def test_compare_repeats_what_sounds_were_told(sounds, tmp_path):
    from ssl_nb.app.compare import next_command
    from ssl_nb.app.runner import load, settings
    cfg = settings(sounds, ['simclr'], epochs=1, device='cpu', rate=8000, clip_seconds=0.3, pattern=r'_(?P<speaker>[a-z])\.')
    assert load(cfg).info.length==2400 and 'speaker' in load(cfg).info.classes
    best = {'method': 'simclr', 'probe': 90., '± probe': 1., 'agreement': 0.1, 'views': 0.5, 'diagnosis': None}
    assert r"--rate 8000 --clip-seconds 0.3 --pattern '_(?P<speaker>[a-z])\.'" in next_command(dict(config=cfg, runs=[best]))
    with pytest.raises(TypeError, match='ratte'): settings(sounds, rate=8000, ratte=1)


def test_methods_of_images_refuse_sounds(sounds, capsys):
    from ssl_nb.app.cli import main
    assert main(['pretrain', 'rotation', '--data', str(sounds), '--device', 'cpu'])==2
    said = capsys.readouterr().err
    assert 'Traceback' not in said and said.strip()


# Spoken words

@pytest.fixture(scope='module')
def spoken(): return spoken_dls()


def test_spoken_asks_for_words_of_unheard_voices_and_voices_of_other_takes(spoken):
    x,y = spoken.test.xs[0],spoken.test.y
    word,voice = y.T
    assert ((word<0) ^ (voice<0)).all() and (word>=0).sum()>300 and (voice>=0).sum()>300
    assert (spoken.train.y>=0).all() and spoken.info.classes['word']==WORDS and len(spoken.info.classes['speaker'])==len(HEARD)*len(ACCENTS)
    assert not set(HEARD) & set(UNHEARD) and x.dtype==torch.int16 and x.shape[1:]==(1,6400)
    counts = torch.bincount(spoken.train.y[:,0])
    assert len(counts)==len(WORDS) and counts.min()==counts.max()
    have = {o.numpy().tobytes() for o in spoken.train.xs[0]}
    assert not any(o.numpy().tobytes() in have for o in x)  # no clip twice


def test_spoken_padding_and_loudness(spoken):
    x = spoken.one_batch()[0]
    n = real_samples(x)
    assert (n>1000).all() and (n<=6400).all() and (n<6400).float().mean()>0.5
    assert (x.abs().amax((1,2))>0.02).all() and x.abs().max()<=1


def test_spoken_is_the_same_anew(tmp_path, monkeypatch):
    "Another cache folder, so it is spoken again, by a process of its own; a broken file is made anew"
    import ssl_nb.data.spoken as module
    old = spoken_arrays()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    new = spoken_arrays()
    assert all(np.array_equal(a, b) for k in old for a,b in zip(old[k], new[k]))
    file, = tmp_path.rglob('*.npz')
    file.write_bytes(file.read_bytes()[:5000])  # as a full disk leaves it
    monkeypatch.setattr(module, '_spoken_anew', lambda rate, length: {k: v[0] for k,v in old.items()})
    assert np.array_equal(spoken_arrays()['test'][0], old['test'][0]) and file.stat().st_size>10**6


def test_spoken_needs_no_cache(tmp_path, monkeypatch):
    import ssl_nb.data.spoken as module
    clips = {k: v[0] for k,v in spoken_arrays().items()}
    (tmp_path/'file').write_text('no folder')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    monkeypatch.setattr(module, '_spoken_anew', lambda rate, length: clips)
    assert spoken_dls(limit=30).train.n==30


def test_spoken_words_can_be_told_apart_and_leave_room(spoken):
    "Nearest class mean of the mean log-mel, on voices and takes that were not heard"
    from ssl_nb.data.mel import mel_stats
    features = [mel_stats(to_unit(dl.xs[0]), 8000) for dl in (spoken.train, spoken.test)]
    h,t = [(f-features[0].mean(0))/features[0].std(0) for f in features]
    for k,chance in ((0, 1/20), (1, 1/27)):
        y,ty = spoken.train.y[:,k],spoken.test.y[:,k]
        middle = torch.stack([h[y==c].mean(0) for c in range(int(y.max())+1)])
        right = (torch.cdist(t[ty>=0], middle).argmin(1)==ty[ty>=0]).float().mean()
        assert 3*chance < right < 0.9


@pytest.mark.parametrize('given', [dict(rate=0), dict(rate=-1), dict(seconds=0), dict(seconds=-1.)])
def test_spoken_settings(given):
    with pytest.raises(ValueError, match=f'{list(given)[0]} (must be )?at least'): spoken_dls(**given)
