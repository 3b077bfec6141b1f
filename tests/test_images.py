"Folders as users have them: empty, broken, mixed. What the notebooks of `nbs/data` show by example is not repeated."
import os, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from ssl_nb.core.loader import DataInfo
from ssl_nb.data.images import image_dl, image_dls
from ssl_nb.data.pixels import Pixels
from ssl_nb.data.reading import StreamDL, load_images

def image(seed, size=(16,16), channels=3, dtype=np.uint8):
    shape = size[::-1] if channels==1 else (*size[::-1], channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype))

def save(path, im):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path)
    return path

def truncate(path): path.write_bytes(path.read_bytes()[:path.stat().st_size//2])

@pytest.fixture
def ten(tmp_path):
    "A folder of ten readable images of 16x16 pixels"
    for i in range(10): save(tmp_path/'ten'/f'{i}.png', image(i))
    return tmp_path/'ten'

def said(record): return [str(w.message) for w in record if 'could not be read' in str(w.message)]

def quiet(f, *args, **kwargs):
    "(result, warnings about images that could not be read)"
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter('always')
        res = f(*args, **kwargs)
    return res, said(record)

def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as e: image_dls(tmp_path/'nowhere')
    assert 'nowhere does not exist' in str(e.value) and 'folder of images' in str(e.value)

def test_empty_folder(tmp_path):
    with pytest.raises(ValueError) as e: image_dls(tmp_path)
    assert str(tmp_path) in str(e.value) and '.png' in str(e.value) and 'the folder is empty' in str(e.value)

def test_folder_without_images_says_what_is_there(tmp_path):
    for n in ('a.txt','b.txt','c.dat','noending'): (tmp_path/n).write_text('x')
    with pytest.raises(ValueError) as e: image_dls(tmp_path)
    assert all(o in str(e.value) for o in (str(tmp_path), '.jpg', '2 .txt', '1 .dat', '1 without ending'))

def test_not_a_folder(tmp_path):
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(ValueError, match='no images in .*notes.txt.*found 1 .txt'): image_dls(tmp_path/'notes.txt')

def test_hidden_files_are_not_looked_at(ten):
    save(ten/'.thumbs'/'0.png', image(0)); save(ten/'._0.png', image(0))
    dls = image_dls(ten, bs=4)
    assert sum(dl.n for dl in dls) == 10

@pytest.mark.parametrize('resident', [True,False])
def test_all_unreadable(tmp_path, resident):
    for i in range(5): (tmp_path/f'{i}.jpg').write_bytes(b'no image at all')
    with pytest.raises(ValueError) as e: image_dls(tmp_path, resident=resident)
    assert 'none of the 5 image files' in str(e.value) and str(tmp_path) in str(e.value) and '0.jpg: not an image' in str(e.value)

@pytest.mark.parametrize('resident', [True,False])
def test_all_truncated(tmp_path, resident):
    for i in range(5): truncate(save(tmp_path/f'{i}.png', image(i)))
    with pytest.raises(ValueError) as e: image_dls(tmp_path, resident=resident)
    assert 'can be read' in str(e.value) and str(tmp_path) in str(e.value) and '.png' in str(e.value)

def test_truncated_are_counted_and_reported_once(ten):
    for i in (1,3,4,8): truncate(ten/f'{i}.png')
    dls,messages = quiet(image_dls, ten, bs=2)
    assert len(messages)==1 and messages[0].startswith('4 of 10 images could not be read')
    assert sum(f'{i}.png' in messages[0] for i in (1,3,4,8)) == 3 and messages[0].endswith(', ...')
    assert dls.info.skipped == 4 and messages[0] in dls.info.read # said once, and kept in the line that says what was read
    assert sorted(f for dl in dls for f in dl.files) == [f'{i}.png' for i in (0,2,5,6,7,9)]
    _,messages = quiet(lambda: [b for dl in dls for b in dl])
    assert messages == []

@pytest.mark.parametrize('workers', [0,2])
def test_truncated_while_streaming(ten, workers):
    for i in (1,3,4,8): truncate(ten/f'{i}.png')
    dls,before = quiet(image_dls, ten, bs=2, resident=False, workers=workers, valid=0.3)
    (sizes,rest),messages = quiet(lambda: ([len(b[0]) for _ in range(2) for b in dls.train], [b for _ in range(2) for b in dls.valid]))
    assert set(sizes)=={2} and len(sizes)==2*(7//2)
    assert before==[] and len(messages)==1 and 'of 10 images could not be read' in messages[0]
    assert dls.info.skipped == 4
    assert sum(len(b[0]) for b in rest) == 2*len(dls.valid.files)

def test_samples_and_files_agree_where_some_fail(ten):
    for i in (0,5): truncate(ten/f'{i}.png')
    info = DataInfo(size=16, channels=3)
    for kw in (dict(resident=True), dict(resident=False, workers=2)):
        dl,_ = quiet(image_dl, ten, info, bs=3, **kw)
        x,_ = quiet(lambda: torch.cat([b[0] for b in dl]))
        assert dl.files == [f'{i}.png' for i in (1,2,3,4,6,7,8,9)]
        for f,o in zip(dl.files, x): assert np.array_equal((o*255).round().numpy().transpose(1,2,0), np.asarray(Image.open(ten/f)))

def test_the_only_valid_file_is_broken(tmp_path):
    for i in range(4): save(tmp_path/f'{i}.png', image(i))
    victim = image_dls(tmp_path, bs=2).valid.files[0]
    truncate(tmp_path/victim)
    dls,messages = quiet(image_dls, tmp_path, bs=2)
    assert (dls.train.n, dls.valid.n) == (2,1) and victim in messages[0]

def test_one_image(tmp_path):
    save(tmp_path/'lonely.png', image(0))
    with pytest.raises(ValueError, match='1 image.*at least 2'): image_dls(tmp_path)
    save(tmp_path/'broken.png', image(1)); truncate(tmp_path/'broken.png')
    with pytest.raises(ValueError, match=r'1 readable image.*at least 2'): image_dls(tmp_path)

def test_mixed_sizes(tmp_path):
    for i,size in enumerate([(50,40),(300,20),(33,1000),(64,64),(1,1),(7,90)]): save(tmp_path/f'{i}.png', image(i, size))
    dls = image_dls(tmp_path, bs=2)
    assert dls.info.size == 32 # the median of 40, 20, 33, 64, 1, 7 is 26.5
    assert {tuple(x.shape[1:]) for dl in dls for x,_ in dl} == {(3,32,32)}
    assert image_dls(tmp_path, bs=2, size=50).info.size == 50

def test_mixed_modes_follow_the_most_common(tmp_path):
    for i in range(6): save(tmp_path/f'grey{i}.png', image(i, channels=1))
    save(tmp_path/'rgb.png', image(6)); save(tmp_path/'rgba.png', image(7, channels=4))
    save(tmp_path/'deep.png', image(8, channels=1, dtype=np.uint16)); save(tmp_path/'bit.png', image(9).convert('1'))
    save(tmp_path/'la.png', image(10).convert('LA')); save(tmp_path/'palette.gif', image(11).convert('P'))
    dls,messages = quiet(image_dls, tmp_path, bs=2)
    assert dls.info.channels==1 and messages==[] and sum(dl.n for dl in dls)==12

@pytest.mark.parametrize('make,channels,dtype', [(dict(channels=4),4,torch.uint8), (dict(channels=1),1,torch.uint8),
                                                 (dict(channels=1, dtype=np.uint16),1,torch.uint16)])
def test_channels_and_bits(tmp_path, make, channels, dtype):
    for i in range(8): save(tmp_path/f'{i}.png', image(i, **make))
    dls = image_dls(tmp_path, bs=2)
    assert dls.info.channels==channels and len(dls.info.mean)==channels and dls.train.xs[0].dtype==dtype
    x,_ = dls.one_batch()
    assert 0 <= x.min() and 0.5 < x.max() <= 1
    stream = image_dls(tmp_path, bs=2, resident=False, workers=0)
    assert torch.equal(stream.train.one_batch()[0], x)

def test_any_mode_can_become_any_other(tmp_path):
    deep = image(2, channels=1, dtype=np.uint16)
    ims = [image(0).convert(m) for m in ('1','L','LA','P','RGB','RGBA','CMYK')] + [deep]
    files = [save(tmp_path/f'{i}.tif', im) for i,im in enumerate(ims)]
    for mode,c in (('L',1),('LA',2),('RGB',3),('RGBA',4),(Pixels('L',16),1),(Pixels('RGB',16),3)):
        x,_,failed = load_images([f.name for f in files], 16, mode, tmp_path)
        assert failed=={} and x.shape==(len(ims),c,16,16)

def test_float_pixels_are_skipped_with_a_reason(ten):
    Image.fromarray(np.zeros((16,16), np.float32)).save(ten/'float.tif')
    dls,messages = quiet(image_dls, ten, bs=4)
    assert dls.info.skipped==1 and 'float.tif (float pixels have no fixed range' in messages[0]

def test_large_sets_are_read_in_order_by_processes(tmp_path):
    for i in range(2100): Image.fromarray(np.full((2,2), i%256, np.uint8)).save(tmp_path/f'{i:04}.bmp')
    (tmp_path/'0777.bmp').write_bytes(b'BM')
    x,good,failed = load_images(sorted(os.listdir(tmp_path)), 2, 'L', tmp_path, workers=2, progress=False)
    assert list(failed)==[777] and len(good)==2099
    assert np.array_equal(x[:,0,0,0].numpy(), good.astype(int)%256)

def test_linked_folders(ten, tmp_path):
    (tmp_path/'links').mkdir()
    (tmp_path/'links'/'here').symlink_to(ten)
    (ten/'circle').symlink_to(ten)
    assert sum(dl.n for dl in image_dls(tmp_path/'links', bs=2)) == 10

def test_images_beside_the_parts_are_named(tmp_path):
    for i in range(8): save(tmp_path/'train'/f'{i}.png', image(i))
    for i in range(3): save(tmp_path/'extra'/f'{i}.png', image(i))
    with pytest.warns(UserWarning, match='3 images .* beside the folders train'): dls = image_dls(tmp_path, bs=2)
    assert not any('extra' in f for dl in dls for f in dl.files)

def test_parts_of_train_and_valid_only(tmp_path):
    for s,n in (('train',20),('valid',6)):
        for i in range(n): save(tmp_path/s/('a','b')[i%2]/f'{i}.png', image(i))
    dls = image_dls(tmp_path, bs=4)
    assert [dl.n for dl in dls]==[18,2,6] and all(f.startswith('valid/') for f in dls.test.files)
    assert set(dls.train.y.tolist())=={0,1} and dls.info.names()==['a','b']

def write_csv(folder, text):
    (folder/'list.csv').write_text(text)
    return folder/'list.csv'

def test_csv_missing_column(ten):
    with pytest.raises(ValueError) as e: image_dls(write_csv(ten, 'name,label\n1.png,cat\n'))
    assert 'list.csv has no column \'file\' or \'path\'' in str(e.value) and "it has 'name', 'label'" in str(e.value)

@pytest.mark.parametrize('text,message', [('','cannot be read as csv'), ('file,label\n','lists no files')])
def test_csv_empty(ten, text, message):
    with pytest.raises(ValueError, match=message): image_dls(write_csv(ten, text))

def test_csv_missing_file_is_skipped(ten):
    path = write_csv(ten, 'file,label\n'+''.join(f'{i}.png,{"ab"[i%2]}\n' for i in range(10))+'gone.png,a\n')
    dls,messages = quiet(image_dls, path, bs=2)
    assert messages == ['1 of 11 images could not be read and are left out: gone.png (missing)']
    assert dls.info.skipped==1 and dls.info.names()==['a','b'] and dls.test is not None

def test_csv_of_nothing_but_missing_files(ten):
    with pytest.raises(ValueError, match='none of the 2 image files.*x.png: missing'): image_dls(write_csv(ten, 'file\nx.png\ny.png\n'))

def test_csv_splits_and_partly_known_labels(ten):
    path = write_csv(ten, 'path\tlabel\tsplit\n'+''.join(f'{i}.png\t{"" if i<3 else i%2}\t{"test" if i>7 else "train"}\n' for i in range(10)))
    dls = image_dls(path, bs=2)
    assert sorted(dls.test.files)==['8.png','9.png'] and dls.valid.y.min()>=0
    assert {f for f,y in zip(dls.train.files, dls.train.y) if y==-1} == {'0.png','1.png','2.png'}

def test_limit_takes_so_many_of_each_part(ten):
    assert sum(dl.n for dl in image_dls(ten, bs=2, limit=6)) == 6

def test_a_set_that_does_not_fit_is_streamed(ten, monkeypatch):
    monkeypatch.setattr('ssl_nb.data.parts.free_memory', lambda: 1000)
    assert isinstance(image_dls(ten, bs=4, workers=0).train, StreamDL)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_the_gpu(ten):
    for kw in (dict(resident=True), dict(resident=False, workers=2)):
        x,y = image_dls(ten, bs=4, device='cuda', **kw).one_batch()
        assert x.is_cuda and y.is_cuda and x.dtype==torch.float32
