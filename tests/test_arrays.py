"Arrays, pixels of science and medicine, and how much memory reading takes: whatever is not understood is refused by name."
import os, subprocess, sys, zlib
from pathlib import Path
from struct import pack
import numpy as np, pytest, tifffile, torch
from PIL import Image
from conftest import quiet
from ssl_nb.contrastive.vicreg import VICReg
from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.learner import ssl_learner
from ssl_nb.core.loader import DataInfo, ResidentDL, array_dls, channel_stats, get_kind, to_unit
from ssl_nb.data.images import Images, image_dl, image_dls, look
from ssl_nb.data.pixels import ENDINGS, Pixels, opened, pixels_of, read_image
from ssl_nb.data.reading import ImageFiles, StreamDL, load_images

rng = np.random.default_rng(0)
grey = rng.integers(0, 256, (40,8,8), dtype=np.uint8)

def unit(dls): return to_unit(torch.cat([dls.train.xs[0], dls.valid.xs[0]])) # of all pictures, in another order

def same(a, b): assert torch.equal(torch.sort(a.flatten(1).mean(1))[0], torch.sort(b.flatten(1).mean(1))[0])

# ---- arrays

@pytest.mark.parametrize('dtype', ['int8','int16','int32','int64','uint32'])
def test_whole_numbers_without_a_range_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=rf'x of type {dtype} has values 0 to 99: .*range=\(0, 99\)'):
        array_dls((grey%100).astype(dtype))

def test_a_range_says_what_they_are():
    ct = rng.integers(-1000, 1001, (20,8,8)).astype(np.int16)
    dls = array_dls(ct, range=(-1000,1000))
    same(unit(dls), torch.from_numpy(((ct+1000)/2000).astype(np.float32))[:,None])
    assert dls.info.range==[[-1000,1000]]
    for bad in ((1,1),(5,0)):
        with pytest.raises(ValueError, match='range'): array_dls(ct, range=bad)

def test_types_that_say_what_they_are():
    same(unit(array_dls(grey)), torch.from_numpy(grey)[:,None]/255)
    same(unit(array_dls(grey>99)), torch.from_numpy(grey>99)[:,None].float())
    same(unit(array_dls(grey.astype(np.uint16)*257)), torch.from_numpy(grey)[:,None]/255)
    for floats in (grey/255, (grey/255).astype(np.float32), torch.from_numpy(grey)/255):
        dls = array_dls(floats)
        assert dls.train.xs[0].dtype==torch.uint8 # nothing is lost
        same(unit(dls), torch.from_numpy(grey)[:,None]/255)
    fine = 0.5+rng.random((20,8,8))/1000 # bytes would make all of it one grey
    same(unit(array_dls(fine)), torch.from_numpy(fine.astype(np.float32))[:,None])
    half = torch.rand(20,1,8,8).bfloat16()
    same(unit(array_dls(half)), half.float())

@pytest.mark.parametrize('x,message', [
    (np.where(grey==3, np.nan, grey/255), r'\d+ values that are NaN or infinite'), (grey/1., r'float images must lie in \[0,1\]'),
    (np.array([['a']*3]*3)[None], 'images must be numbers'), (np.zeros((5,8,9)), 'must be square, x has 8x9 pixels'),
    (np.zeros((0,8,8)), r'x is \(0, 1, 8, 8\)'), (np.zeros((5,8)), r'x is \(5, 8\)'), (grey.astype(object), 'images must be numbers')])
def test_what_cannot_be_an_image(x, message):
    with pytest.raises(ValueError, match=message): array_dls(x)

def test_channels_last():
    x = rng.random((20,8,8,3)).astype(np.float32)
    dls = array_dls(x)
    assert (dls.info.channels, dls.info.size)==(3,8)
    same(unit(dls), torch.from_numpy(x).permute(0,3,1,2))
    assert array_dls(rng.random((20,3,3,3))).info.channels==3 and array_dls(rng.random((9,5,8,8))).info.channels==5

def test_a_resident_loader_takes_no_other_type():
    for x in (torch.zeros(4,1,8,8, dtype=torch.int16), torch.zeros(4,1,8,8, dtype=torch.int64), torch.zeros(4,1,8,8).bool()):
        with pytest.raises(ValueError, match=f'samples of type {str(x.dtype)[6:]}'): ResidentDL(x)
    with pytest.raises(ValueError, match='labels must be whole numbers'): ResidentDL(torch.zeros(2,3), y=['a','b'])
    with pytest.raises(ValueError, match='labels must be whole numbers'): ResidentDL(torch.zeros(2,3), y=[0.5,1])

def test_16_bits_come_out_of_every_way_to_take_them():
    x = torch.from_numpy(rng.integers(0, 65536, (9,1,4,4), dtype=np.uint16))
    dl = ResidentDL(x, bs=4, shuffle=True)
    want = x.float()/65535
    got = torch.cat([b[0] for b in dl])
    assert got.dtype==torch.float32 and torch.equal(got.flatten().sort()[0], want.flatten().sort()[0])
    assert torch.equal(dl.take(torch.tensor([3,1])).new(shuffle=False).one_batch()[0], want[[3,1]])

# ---- labels

@pytest.mark.parametrize('y,names', [
    ([1,2,3]*4, ['1','2','3']), ([5,100,5]*4, ['5','100']), ([0.5,-2,7]*4, ['-2','0.5','7']), (['cat','dog','cat']*4, ['cat','dog']),
    (['cat',None,'dog']*4, ['cat','dog']), ([1.,float('nan'),2.]*4, ['1','2']), ([True,False,True]*4, ['False','True']),
    (np.eye(3)[[0,1,2]*4], ['0','1','2']), (torch.tensor([[3],[1],[2]]*4), ['1','2','3']), (np.array(['a','nan','b']*4), ['a','b'])])
def test_labels_of_any_kind_become_classes(y, names):
    dls = array_dls(grey[:12], y, valid=0.25)
    assert dls.info.names()==names
    ys = torch.cat([dls.train.y, dls.valid.y]).sort()[0].tolist()
    flat = np.asarray(y).argmax(1) if np.ndim(y)==2 and np.shape(y)[1]>1 else np.asarray(y, dtype=object).ravel()
    unknown = sum(o is None or o!=o or o=='nan' for o in flat)
    assert ys.count(-1)==unknown and set(ys)-{-1}==set(range(len(names)))

def test_labels_keep_to_their_images():
    y = [f'{m.mean():.0f}' for m in grey]
    dls = array_dls(grey, y, grey[:5], y[:5])
    for dl in dls: assert [dls.info.names()[i] for i in dl.y]==[f'{m.float().mean():.0f}' for m in dl.xs[0]]

def test_several_labels_and_named_ones():
    both = np.array([[0,2],[1,0],[0,1],[1,2]]*3)
    dls = array_dls(grey[:12], both)
    assert dls.info.classes=={'label 0': ['0','1'], 'label 1': ['0','1','2']} and dls.train.y.shape[1]==2
    dls = array_dls(grey[:12], both, classes=dict(digit=['a','b'], colour=['x','y','z']))
    assert dls.info.names('colour')==['x','y','z'] and dls.train.y.max()==2
    dls = array_dls(grey[:12], [[0,1],[1,0]]*6, classes=dict(one=['a','b'], two=['c','d']))
    assert dls.train.y.shape[1]==2 # not one-hot, for two labels are named
    with pytest.raises(ValueError, match="class 7 is neither a number below 2 nor one of a, b"): array_dls(grey[:12], [0,7]*6, classes=['a','b'])

def test_too_few_labels_and_a_test_set_of_another_size():
    with pytest.raises(ValueError, match='y has the shape .30,.; 40 labels are needed'): array_dls(grey, [0,1]*15)
    with pytest.raises(ValueError, match='test_y has the shape .2,.; 5 labels'): array_dls(grey, [0,1]*20, grey[:5], [0,1])
    with pytest.raises(ValueError, match=r'images of test_x are \(1, 9, 9\), those of x \(1, 8, 8\)'):
        array_dls(grey, None, np.zeros((5,9,9), np.uint8))
    with pytest.raises(ValueError, match='test_x of type int16'): array_dls(grey, None, grey.astype(np.int16))

# ---- statistics

def test_deviation_of_dark_deep_pictures_is_theirs():
    x = torch.from_numpy(rng.integers(0, 20, (500,1,8,8), dtype=np.uint16))
    (mean,),(std,) = channel_stats(x)
    z = (to_unit(x)-mean)/std
    assert abs(z.mean())<0.01 and abs(z.std()-1)<0.01

def test_statistics_over_pieces_are_those_of_the_whole(monkeypatch):
    x = torch.from_numpy(rng.integers(0, 256, (300,3,64,64), dtype=np.uint8)).float().div(255)*torch.tensor([1,0.1,0.001])[:,None,None]
    x = x.repeat(4,1,1,1) # 15 million values, two pieces
    mean,std = channel_stats(x)
    assert np.allclose(mean, x.double().mean((0,2,3)), rtol=1e-5) and np.allclose(std, x.double().std((0,2,3)), rtol=1e-4)

def test_a_constant_channel_and_one_bright_pixel():
    assert channel_stats(torch.full((9,1,4,4), 0.3))[1]==[1.0]
    x = torch.zeros(1000,1,8,8); x[500,0,3,3] = 1
    assert channel_stats(x)[1][0]>=0.001

# ---- files

def png16(path, a):
    "A PNG of 16 bits, which Pillow cannot write in colour"
    h,w,c = a.shape
    def chunk(name, data): return pack('>I', len(data))+name+data+pack('>I', zlib.crc32(name+data))
    rows = zlib.compress(b''.join(b'\0'+r.astype('>u2').tobytes() for r in a))
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', pack('>IIBBBBB', w, h, 16, {1:0,2:4,3:2,4:6}[c], 0, 0, 0))+chunk(b'IDAT', rows)+
                     chunk(b'IEND', b''))

def deep(c, top=65536, dtype=np.uint16): return rng.integers(0, top, (8,8,c)).astype(dtype)

def write(folder, make, name, n=6):
    folder.mkdir(exist_ok=True)
    stored = [make() for _ in range(n)]
    for i,a in enumerate(stored):
        if name=='png': png16(folder/f'{i}.png', a)
        elif name=='npy': np.save(folder/f'{i}.npy', a)
        elif name=='npz': np.savez_compressed(folder/f'{i}.npz', picture=a)
        else: tifffile.imwrite(folder/f'{i}.tif', a, photometric='rgb' if name in ('rgb','webp') else 'minisblack', planarconfig='contig' if a.shape[2]>1 else None,
                               compression=name if name in ('zlib','lzw','zstd','webp') else None, compressionargs={'lossless': True} if name=='webp' else None)
    return stored

@pytest.mark.parametrize('name,c,top,dtype', [('tif',5,256,np.uint8), ('tif',4,256,np.uint8), ('tif',2,256,np.uint8), ('zlib',7,256,np.uint8),
    ('lzw',5,65536,np.uint16), ('zstd',4,256,np.uint8), ('webp',3,256,np.uint8),
    ('rgb',3,65536,np.uint16), ('png',2,65536,np.uint16), ('png',3,65536,np.uint16), ('png',4,65536,np.uint16), ('tif',5,65536,np.uint16), ('npy',1,256,np.uint8),
    ('npy',3,65536,np.uint16), ('npz',6,256,np.uint8), ('tif',1,65536,np.uint16)])
def test_any_number_of_bands_of_8_and_16_bits(tmp_path, name, c, top, dtype):
    "Every value arrives, resident and streamed, and an encoder takes them"
    stored = write(tmp_path/'set', lambda: deep(c, top, dtype), name)
    for kw in (dict(resident=True), dict(resident=False, workers=0)):
        dls,said = quiet(image_dls, tmp_path/'set', bs=2, **kw)
        assert said==[] and (dls.info.channels, dls.info.size)==(c,8)
        dl = image_dl(tmp_path/'set', dls.info, **kw)
        x = torch.cat([b[0] for b in dl])
        for a,o in zip(stored, x):
            a = torch.from_numpy(a.astype(np.float32)).permute(2,0,1)/(top-1)
            if name=='png' and c!=3: a = a*(a[-1:]>0)
            assert torch.allclose(o, a, atol=1e-6)
    assert create_encoder('small_cnn', dls.info)(x).shape[0]==6

@pytest.mark.parametrize('dtype', [np.int16, np.int32, np.float32, np.float64])
def test_what_could_mean_anything_gets_the_range_of_the_data_or_yours(tmp_path, dtype):
    stored = write(tmp_path/'ct', lambda: rng.integers(-1000, 3000, (16,16,1)).astype(dtype), 'tif')
    dls,said = quiet(image_dls, tmp_path/'ct', bs=2)
    (low,high), = dls.info.range
    assert len(said)==1 and 'of any range; 99.8% of the values' in said[0] and 'cut off; range=(low, high) sets others' in said[0]
    assert -1000<=low<-900 and 2900<high<=3000
    x = image_dl(tmp_path/'ct', dls.info).one_batch()[0]
    assert x.min()==0 and x.max()==1
    mine,said = quiet(image_dls, tmp_path/'ct', bs=2, range=(-1000,3000))
    assert said==[] and mine.info.range==[[-1000,3000]]
    dl = image_dl(tmp_path/'ct', mine.info) # an encoder sees other pictures with the range that it was trained with
    want = torch.from_numpy(np.stack(stored)[...,0].astype(np.float64)+1000)/4000
    assert torch.allclose(dl.one_batch()[0][:,0].double(), want, atol=1e-5)

def test_floats_in_unit_range_stay_as_they_are(tmp_path):
    stored = write(tmp_path/'f', lambda: rng.random((8,8,3)).astype(np.float32)*0.5, 'npy')
    dls,said = quiet(image_dls, tmp_path/'f', bs=2)
    assert said==[] and dls.info.range==[[0,1]]*3
    x = image_dl(tmp_path/'f', dls.info).one_batch()[0]
    assert torch.allclose(x, torch.from_numpy(np.stack(stored)).permute(0,3,1,2), atol=1e-5)

def test_a_camera_of_12_bits_is_not_black(tmp_path):
    write(tmp_path/'c', lambda: deep(1, 4096), 'tif')
    dls,said = quiet(image_dls, tmp_path/'c', bs=2)
    assert len(said)==1 and 'the 12 bits in use (0 to 4095) become 0 to 1' in said[0]
    assert dls.one_batch()[0].max()>0.9 and dls.info.range==[[0,4095]]
    whole,said = quiet(image_dls, tmp_path/'c', bs=2, range=(0,65535))
    assert said==[] and whole.one_batch()[0].max()<0.07

def test_percentiles_by_choice(tmp_path):
    "Through the reader of the kind, as the command line asks for it: 16 bits of which a microscope uses a few in the middle"
    write(tmp_path/'m', lambda: rng.integers(900, 921, (16,16,2)).astype(np.uint16), 'tif')
    dls,said = quiet(Images.read, tmp_path/'m', bs=2, range='percentiles')
    assert len(said)==1 and '99.8% of the values (900 to 920, 900 to 920) become 0 to 1' in said[0] and dls.info.range==[[900,920]]*2
    assert dls.one_batch()[0].min()==0 and dls.one_batch()[0].max()==1
    dls,said = quiet(Images.read, tmp_path/'m', bs=2, range=(0,1840))
    assert said==[] and abs(dls.one_batch()[0].mean()-0.495)<0.01
    write(tmp_path/'b', lambda: deep(1, 256, np.uint8), 'tif')
    assert 'is for deeper images' in quiet(image_dls, tmp_path/'b', bs=2, range='percentiles')[1][0]

@pytest.mark.parametrize('kind', ['images','video','pairs'])
def test_all_kinds_of_pixels_take_a_range(tmp_path, kind):
    stored = [rng.integers(0, 500, (8,8,1)).astype(np.int16) for _ in range(24)]
    for i,a in enumerate(stored):
        folder = tmp_path/(f'c{i//4}' if kind=='video' else '')
        folder.mkdir(exist_ok=True)
        tifffile.imwrite(folder/f'{i}.tif', a[...,0])
        if kind=='pairs': (folder/f'{i}.txt').write_text(f'this is number {i}')
    given = dict(video=dict(frames=4), pairs=dict(vocab_size=300)).get(kind, {})
    dls,said = quiet(get_kind(kind).read, tmp_path, bs=2, range=(0,1000), **given)
    assert said==[] and dls.info.range==[[0,1000]] and 0.4<to_unit(dls.train.xs[0]).max()<0.5

def test_bad_ranges(tmp_path):
    write(tmp_path/'c', lambda: deep(2, 4096), 'tif')
    for bad in ((5,5), (1,), ((0,1),)*3, 'percentile', ('a','b')):
        with pytest.raises(ValueError, match='range must be .low, high. with low < high, 2 such pairs for 2 bands, or'): image_dls(tmp_path/'c', range=bad)
    write(tmp_path/'b', lambda: deep(1, 256, np.uint8), 'tif')
    assert '8 bits; range=0 to 4095 is for deeper images' in quiet(image_dls, tmp_path/'b', bs=2, range=(0,4095))[1][0]

def test_mixed_pixels_are_counted_and_said(tmp_path):
    write(tmp_path/'m', lambda: deep(3, 65536), 'rgb', 5)
    for i in range(3): Image.fromarray(deep(1, 256, np.uint8)[...,0]).save(tmp_path/'m'/f'g{i}.png')
    dls,said = quiet(image_dls, tmp_path/'m', bs=2)
    assert len(said)==1 and '8 images looked at: 5 colour of 16 bits, 3 grey; all become colour of 16 bits' in said[0]
    np.save(tmp_path/'m'/'five.npy', deep(5, 256, np.uint8)); np.save(tmp_path/'m'/'ct.npy', np.full((8,8), -1000.))
    dls,said = quiet(image_dls, tmp_path/'m', bs=2)
    assert dls.info.skipped==2 and any('2 of 10 images could not be read' in o for o in said)
    assert any('5 bands where the set has 3' in o or 'no fixed range' in o for o in said)

def test_nan_pixels_are_named(tmp_path):
    write(tmp_path/'n', lambda: rng.random((8,8,1)), 'npy', 5)
    a = rng.random((8,8)); a[2,3] = np.nan; np.save(tmp_path/'n'/'bad.npy', a)
    dls,said = quiet(image_dls, tmp_path/'n', bs=2)
    assert dls.info.skipped==1 and any('bad.npy (1 pixels are NaN or infinite)' in o for o in said)

@pytest.mark.parametrize('bits', [8,16])
def test_white_is_zero(tmp_path, bits):
    a = np.full((8,8), 25700 if bits==16 else 100, f'uint{bits}')
    tifffile.imwrite(tmp_path/'w.tif', a, photometric='miniswhite')
    x = read_image(tmp_path/'w.tif', 8, Pixels('L', bits))
    assert abs(x.mean()/np.iinfo(x.dtype).max-0.608) < 0.001

def test_turned_deep_files_are_as_their_8_bit_twins(tmp_path):
    a = rng.integers(0, 256, (6,10,3), dtype=np.uint8)
    for o in range(1, 9):
        tifffile.imwrite(tmp_path/'d.tif', a.astype(np.uint16)*257, photometric='rgb', extratags=[(274,'H',1,o,True)])
        tifffile.imwrite(tmp_path/'g.tif', a[...,0].astype(np.uint16)*257, extratags=[(274,'H',1,o,True)])
        exif = Image.Exif(); exif[274] = o
        Image.fromarray(a).save(tmp_path/'e.png', exif=exif)
        e = read_image(tmp_path/'e.png', 6)
        assert np.array_equal(read_image(tmp_path/'d.tif', 6, Pixels('RGB',16))//257, e), o
        assert np.array_equal(read_image(tmp_path/'g.tif', 6, Pixels('L',16))[0]//257, e[0]), o
        for kind in ('raw','tiff_lzw'):
            Image.fromarray(a).save(tmp_path/'p.tif', compression=kind, exif=exif)
            assert np.array_equal(read_image(tmp_path/'p.tif', 6), e), (o,kind)

def test_transparent_pixels_have_no_colour_at_any_size(tmp_path):
    rgba = np.full((8,8,4), (200,100,50,0), np.uint8); rgba[:,4:,3] = 255
    Image.fromarray(rgba).save(tmp_path/'8.png'); png16(tmp_path/'16.png', rgba.astype(np.uint16)*257)
    for size in (8,4,16):
        for f,pixels in (('8.png',Pixels('RGBA')), ('16.png',Pixels('RGBA',16))):
            x = read_image(tmp_path/f, size, pixels)
            top = np.iinfo(x.dtype).max
            assert (x[:,:,0]==0).all() and abs(x[:,0,-1]/top-np.array([200,100,50,255])/255).max()<0.005
            half = (x[3]>0) & (x[3]<top) # on the border the colour is that of what can be seen
            assert (abs(x[0][half]/top-200/255)<0.02).all()

def test_arrays_that_are_no_images_say_so(tmp_path):
    np.savez(tmp_path/'two.npz', a=grey, b=grey); np.save(tmp_path/'set.npy', rng.random((3,4,8,8)))
    np.save(tmp_path/'words.npy', np.array(['a','b'])); (tmp_path/'cut.npy').write_bytes(b'\x93NUMPY'); (tmp_path/'bad.npz').write_bytes(b'PK')
    np.save(tmp_path/'things.npy', np.array([{}]*4).reshape(2,2), allow_pickle=True)
    _,good,failed = load_images(sorted(os.listdir(tmp_path)), 8, 'L', tmp_path)
    assert len(good)==0 and len(failed)==6
    why = dict(zip(sorted(os.listdir(tmp_path)), failed.values()))
    assert why['two.npz'].startswith('2 arrays in one file') and 'is no image' in why['set.npy'] and 'is no image' in why['things.npy']

def test_channels_first_or_last(tmp_path):
    a = rng.integers(0, 256, (5,20,30), dtype=np.uint8)
    np.save(tmp_path/'first.npy', a); np.save(tmp_path/'last.npy', a.transpose(1,2,0))
    for f in ('first','last'):
        with opened(tmp_path/f'{f}.npy') as im: assert (pixels_of(im), im.size)==(Pixels('5'), (30,20))
    assert np.array_equal(*[read_image(tmp_path/f'{f}.npy', 20, '5') for f in ('first','last')])

# ---- memory, pipes, parts without a readable file

def peak(f):
    "Bytes by which the memory of this process rose while `f` ran"
    def rss(what): return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(what))
    Path('/proc/self/clear_refs').write_text('5')
    before = rss('VmRSS')
    f()
    return rss('VmHWM')-before

linux = pytest.mark.skipif(sys.platform!='linux', reason='reads /proc')

@linux
def test_statistics_need_little_memory_at_any_size():
    x = torch.empty(60,3,1024,1024, dtype=torch.uint8).random_(255) # 189 MB
    assert peak(lambda: channel_stats(x)) < 320e6 # of floats it would be 755 MB and more

def bomb(path, side):
    "A PNG of so many black pixels, packed to very little"
    def chunk(name, data): return pack('>I', len(data))+name+data+pack('>I', zlib.crc32(name+data))
    z = zlib.compressobj(1)
    rows = b''.join(z.compress(bytes(1+3*side)) for _ in range(side))+z.flush()
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))+chunk(b'IDAT', rows)+chunk(b'IEND', b''))

@linux
def test_a_file_that_unpacks_to_very_much_is_left_out_and_named(tmp_path):
    for i in range(4): Image.fromarray(grey[i]).save(tmp_path/f'{i}.png')
    bomb(tmp_path/'bomb.png', 9000)
    assert (tmp_path/'bomb.png').stat().st_size < 2e6
    said = []
    assert peak(lambda: said.extend(quiet(image_dls, tmp_path, bs=2, size=8)[1])) < 60e6 # unpacked it has 243 MB
    assert any('bomb.png (9000x9000 pixels unpack to 309 MB and at most 256 are read' in o for o in said)
    tifffile.imwrite(tmp_path/'bomb.tif', np.broadcast_to(np.uint8(0), (6000,6000,9)), photometric='minisblack', planarconfig='contig', compression='zlib')
    with pytest.raises(ValueError, match='6000x6000 pixels unpack to 309 MB'): read_image(tmp_path/'bomb.tif', 8, '9')

@linux
def test_large_jpegs_are_decoded_small(tmp_path):
    Image.new('RGB', (8000,8000)).save(tmp_path/'large.jpg')
    assert peak(lambda: read_image(tmp_path/'large.jpg', 64)) < 60e6 # 192 MB in full

@linux
def test_unreadable_files_cost_no_second_copy(tmp_path):
    for i in range(60): Image.fromarray(grey[0]).save(tmp_path/f'{i:02}.png')
    (tmp_path/'00.png').write_bytes(b'')
    got = []
    assert peak(lambda: got.append(load_images(sorted(os.listdir(tmp_path)), 1024, 'RGB', tmp_path))) < 1.9*60*3*1024**2
    x,good,failed = got[0]
    assert list(failed)==[0] and len(x)==59 and torch.equal(x[0], x[58])

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes')
def test_a_pipe_does_not_hang_the_reader(tmp_path):
    for i in range(5): Image.fromarray(grey[i]).save(tmp_path/f'{i}.png')
    os.mkfifo(tmp_path/'pipe.png')
    with pytest.raises(ValueError, match='not a regular file'): read_image(tmp_path/'pipe.png', 8)
    (tmp_path/'list.csv').write_text('file\n'+''.join(f'{i}.png\n' for i in range(5))+'pipe.png\n')
    for kw in (dict(resident=True), dict(resident=False, workers=0)):
        dls,said = quiet(image_dls, tmp_path/'list.csv', bs=2, **kw)
        _,more = quiet(lambda: [b for dl in dls.loaders for b in dl])
        assert any('1 of 6 images could not be read' in o for o in said+more)

@pytest.mark.parametrize('part', ['valid','test'])
def test_parts_without_a_readable_file(tmp_path, part):
    for s,n in (('train',12),('valid',4),('test',4)):
        for i in range(n):
            (tmp_path/s/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
            f = tmp_path/s/'ab'[i%2]/f'{i}.png'
            if s==part: f.write_bytes(b'no image')
            else: Image.fromarray(grey[i]).save(f)
    for kw in (dict(resident=True), dict(resident=False, workers=0)):
        dls,said = quiet(image_dls, tmp_path, bs=4, **kw)
        sizes = [sum(len(b[0]) for b in dl) for dl in dls.loaders]
        assert sizes[1]>0 and all(f.startswith('train/') for f in dls.valid.files) == (part=='valid')
        assert (dls.test is None)==(part=='test')
        assert any('read' in o for o in said)
    assert any(o.endswith(f': none of the files for {part} can be read') for o in said)
    assert f'none of the files for {part} can be read' in dls.info.read

def test_too_few_samples_are_said_to_be_too_few():
    "A larger batch size is no help where there are no more samples"
    for images,cure in ((grey[:2],'there are only 1 samples to train on'), (grey,'raise batch_size')):
        dls = array_dls(images, bs=1)
        learn = ssl_learner(dls, VICReg.for_data(create_encoder('small_cnn', dls.info), dls), every=0)
        with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=f'batches of at least 2, got 1; {cure}'): learn.fit(1)
