"Folders of clips as users have them. What `nbs/data/06_video.ipynb` shows by example is not repeated here."
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from conftest import quiet
from ssl_nb.app.cli import main
from ssl_nb.core.encoders import create_encoder, load_encoder, save_encoder
from ssl_nb.data.video import Video, bouncing_digits_dls, video_dl, video_dls

def write_clip(folder, n=8, seed=0, side=16, channels=3, first=1):
    folder.mkdir(parents=True)
    frames = np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    for i,f in enumerate(frames): Image.fromarray(f if channels==3 else f[...,0]).save(folder/f'{first+i}.png')
    return torch.from_numpy(frames).permute(3, 0, 1, 2)

def truncate(path): path.write_bytes(path.read_bytes()[:path.stat().st_size//2])

@pytest.fixture
def ten(tmp_path):
    "Ten clips of twelve frames, 16x16, without labels"
    for i in range(10): write_clip(tmp_path/'ten'/f'c{i}', 12, i)
    return tmp_path/'ten'

def clips_of(dl): return {f.split('#')[0] for f in dl.files}

def test_unlabelled_clips_in_the_order_of_their_numbers(ten):
    dls,said = quiet(video_dls, ten, frames=12, bs=2)
    assert said==[] and dls.test is None and dls.info.names()==[] and (dls.train.y==-1).all()
    dl = video_dl(ten, dls.info)
    expected = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (12,16,16,3), dtype=np.uint8)).permute(3,0,1,2)
    assert torch.equal(dl.xs[0][dl.files.index('c3')], expected) # frames 9, 10, 11 and not 1, 10, 11, 12, 2
    x,y = dls.one_batch()
    assert x.shape==(2,3,12,16,16) and x.min()>=0 and 0.9<x.max()<=1

def test_missing_and_not_a_folder(ten, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder; give a folder of clips'): video_dls(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='1.png is not a folder'): video_dls(ten/'c0'/'1.png')

def test_empty_folder_and_video_files(tmp_path):
    with pytest.raises(ValueError, match='the folder is empty.*ffmpeg') as e: video_dls(tmp_path)
    assert str(tmp_path) in str(e.value)
    (tmp_path/'a.mp4').write_bytes(b'x')
    with pytest.raises(ValueError, match='found 1 .mp4.*ffmpeg'): video_dls(tmp_path)

def test_frames_without_a_clip_folder(ten):
    with pytest.raises(ValueError, match='12 images lie in .*c0 itself.*a folder of its own') as e: video_dls(ten/'c0')
    assert 'DIR/CLIP/FRAME.jpg' in str(e.value)

def test_one_clip(tmp_path):
    write_clip(tmp_path/'only')
    with pytest.raises(ValueError, match='1 clip.*at least 2'): video_dls(tmp_path, frames=8)

def test_all_too_short_names_the_longest(ten):
    with pytest.raises(ValueError, match='all 10 clips .* shorter than 13 frames, the longest has 12'): video_dls(ten, frames=13)
    with pytest.raises(ValueError, match='shorter than 15 frames'): video_dls(ten, frames=8, every=2)

def test_short_clips_are_counted(ten):
    for i in (10,11): write_clip(ten/f'c{i}', 3, i)
    dls,said = quiet(video_dls, ten, frames=8, bs=2)
    assert said==[f'{ten}: 10 clips; left out: 2 clips of fewer than 8 frames (c10, c11)'] and said[0].split('; ')[1] in dls.info.read
    assert sum(dl.n for dl in dls.loaders)==10

def test_bad_numbers(ten):
    for kw in (dict(frames=0), dict(every=0)):
        with pytest.raises(ValueError, match='must be at least 1'): video_dls(ten, **kw)

def test_samples_of_a_clip_stay_on_one_side(ten):
    for frames in (2,3,5):
        dls = video_dls(ten, frames=frames, bs=2, valid=0.3)
        assert sum(dl.n for dl in dls.loaders)==10*(12//frames)
        assert not clips_of(dls.train) & clips_of(dls.valid)

def test_broken_frames_cost_their_sample_only(ten):
    truncate(ten/'c4'/'2.png'); (ten/'c7'/'12.png').write_bytes(b'no image')
    dls,said = quiet(video_dls, ten, frames=6, bs=2)
    names = {f for dl in dls.loaders for f in dl.files}
    assert dls.info.skipped==2 and len(said)==1 and '2 of 120 images could not be read' in said[0] and said[0] in dls.info.read
    assert 'c4#1' in names and 'c4#0' not in names and 'c7#0' in names and 'c7#1' not in names and len(names)==18

def test_all_broken(ten):
    for f in ten.glob('*/*.png'): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='can be read.*1.png: not an image') as e: video_dls(ten)
    assert str(ten) in str(e.value)

def test_one_readable_clip_left(ten):
    for i in range(9): truncate(ten/f'c{i}'/'5.png')
    with pytest.raises(ValueError, match='1 readable clip.*at least 2'): quiet(video_dls, ten, frames=12)

def test_classes_and_splits_from_folders(tmp_path):
    for s,n in (('train',4),('test',2)):
        for c in ('jump','run'):
            for i in range(n): write_clip(tmp_path/s/c/f'{s}{c}{i}', 4, i)
    dls = video_dls(tmp_path, frames=4, bs=2)
    assert dls.info.names()==['jump','run'] and dls.test.n==4 and all('test/' in f for f in dls.test.files)
    assert {f.split('/')[1]: int(y) for f,y in zip(dls.test.files, dls.test.y)} == {'jump': 0, 'run': 1}

def test_table_of_clips(ten):
    pd.DataFrame(dict(clip=[f'c{i}' for i in range(8)]+['gone'], label=['a','b']*4+['a'], Speaker=range(9))).to_csv(ten/'clips.csv', index=False)
    dls,said = quiet(video_dls, ten, frames=12, bs=2)
    assert len(said)==1 and 'left out: 1 clips of clips.csv without a folder of frames (gone)' in said[0] and 'frames (gone)' in dls.info.read
    assert dls.info.names()==['a','b'] and dls.test is not None
    known = {f: int(y) for dl in dls.loaders for f,y in zip(dl.files, dl.y)}
    assert known=={f'c{i}': i%2 if i<8 else -1 for i in range(10)}
    assert len(quiet(video_dls, ten, frames=12, label='speaker', bs=2)[0].info.names('speaker'))==8

def test_bad_tables(ten):
    def table(text): (ten/'clips.csv').write_text(text)
    table('name,label\nc0,a\n')
    with pytest.raises(ValueError, match="no column 'clip'; it has 'name', 'label'"): video_dls(ten)
    table('clip,split\nc0,later\n')
    with pytest.raises(ValueError, match="unknown split .*later.*known are"): video_dls(ten)
    table('clip,label\nx,a\ny,b\n')
    with pytest.raises(ValueError, match='none of the clips in .*clips.csv is a folder'): video_dls(ten)
    table('clip,label\nc0,a\n')
    with pytest.raises(ValueError, match="no column 'colour' to take labels from"): video_dls(ten, label='colour')

def test_the_table_has_any_delimiter_and_can_be_named_itself(ten):
    (ten/'clips.csv').write_text('clip;label;split\n'+''.join(f'c{i}{"/" if i==2 else ""};{"ab"[i%2]};{"test" if i>7 else "train"}\n' for i in range(10)))
    for path in (ten, ten/'clips.csv'):
        dls,said = quiet(video_dls, path, frames=12, bs=2)
        assert said==[] and dls.info.names()==['a','b'] and sorted(dls.test.files)==['c8','c9']
        assert {f: int(y) for dl in dls.loaders for f,y in zip(dl.files, dl.y)}=={f'c{i}': i%2 for i in range(10)}
        assert Video.suits(path)==1
    assert len(video_dl(ten/'clips.csv', dls.info).files)==10

def test_classes_beside_unlabelled_clips(tmp_path):
    for i in range(8): write_clip(tmp_path/('jump','run')[i%2]/f'c{i}', 4, i)
    for i in range(3): write_clip(tmp_path/'unlabelled'/f'u{i}', 4, 9+i)
    dls = video_dls(tmp_path, frames=4, bs=2)
    assert dls.info.names()==['jump','run'] and sum(dl.n for dl in dls.loaders)==11
    known = {f: int(y) for dl in dls.loaders for f,y in zip(dl.files, dl.y)}
    assert {f for f,y in known.items() if y==-1}=={f'unlabelled/u{i}' for i in range(3)}
    assert all(y==(f.startswith('run')) for f,y in known.items() if y>=0)

def test_deep_frames(tmp_path):
    rng = np.random.default_rng(0)
    for c in range(4):
        (tmp_path/f'c{c}').mkdir()
        for i in range(4): np.save(tmp_path/f'c{c}'/f'{i}.npy', rng.integers(-1000, 1000, (8,8,5)))
    dls = video_dls(tmp_path, frames=4, bs=2, range=(-1000,1000))
    assert dls.one_batch()[0].shape==(2,5,4,8,8) and dls.info.range==[[-1000,1000]]*5
    x = video_dl(tmp_path, dls.info).one_batch()[0]
    want = (np.load(tmp_path/'c1'/'2.npy').transpose(2,0,1)+1000)/2000
    assert np.allclose(x[1,:,2], want, atol=1e-5)

def test_too_much_for_the_memory(ten, monkeypatch):
    monkeypatch.setattr('ssl_nb.data.parts.free_memory', lambda: 1000)
    with pytest.raises(ValueError, match='GiB of memory.*smaller size'): video_dls(ten)

def test_grey_frames_and_size(tmp_path):
    for i in range(4): write_clip(tmp_path/f'{i}', 4, i, channels=1)
    dls = video_dls(tmp_path, frames=2, every=2, size=12, bs=2)
    assert dls.one_batch()[0].shape==(2,1,2,12,12) and len(dls.info.mean)==1

def test_encoder_of_timm_for_the_frames_is_saved(tmp_path):
    info,x = bouncing_digits_dls(frames=3).info,torch.rand(2,1,3,24,24)
    for name in ('small_video','small_cnn'):
        enc = create_encoder(name, info).eval()
        save_encoder(enc, tmp_path/name)
        assert torch.equal(load_encoder(tmp_path/name)(x), enc(x))

def test_from_a_folder_to_features(ten, tmp_path, recwarn):
    args = ['--data', str(ten), '--epochs', '1', '--batch-size', '2', '--device', 'cpu']
    for method in ('next_frame','frame_order'):
        run = tmp_path/method
        assert main(['pretrain', method, *args, '--out', str(run)]) == 0
        assert main(['embed', str(run), str(ten), '--out', str(tmp_path/'f.npz'), '--device', 'cpu']) == 0
        assert len(np.load(tmp_path/'f.npz')['features'])==10
    assert not [w for w in recwarn if 'collapse' in str(w.message)] # one held-out clip tells nothing
