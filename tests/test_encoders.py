"Encoders: any timm model is one or is refused by name, a fresh one owes nothing to training, and files that are damaged are named."
import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import put_in_hub
from safetensors.torch import save_file
from torch import nn

from ssl_nb.contrastive.cpc import CPC
from ssl_nb.core.encoders import ImageEncoder, SmallCNN, StemConv, create_encoder, feature_map, fresh_encoder, load_encoder, map_channels, patch_size, save_encoder
from ssl_nb.core.loader import DataInfo, array_dls
from ssl_nb.evaluate.report import report
from ssl_nb.masked.mae import MAE

IMAGES = DataInfo(channels=3, size=32, mean=[0.4,0.5,0.6], std=[0.2,0.3,0.2])
TEXT = DataInfo(kind='text', vocab_size=30, max_len=8)
VIDEO = DataInfo(kind='video', channels=1, size=24, frames=4)
MADE = [('small_cnn', IMAGES, {}), ('small_resnet', IMAGES, {}), ('small_vit', IMAGES, {}), ('small_stem', IMAGES, {}),
        ('resnet18', IMAGES, {}), ('convnext_atto', IMAGES, {}), ('vit_tiny_patch16_224', IMAGES, dict(patch_size=4, class_token=False, global_pool='avg')),
        ('efficientvit_b0', IMAGES, {}), ('small_text', TEXT, {}), ('small_text', TEXT, dict(drop=0.1, depth=2)),
        ('small_video', VIDEO, {}), ('small_cnn', VIDEO, {}), ('small_vit', VIDEO, dict(dim=16))]


@torch.no_grad()
def overwrite(encoder, value=7):
    "A copy of which every number is another, but for the channel means"
    new = copy.deepcopy(encoder)
    for k,v in new.state_dict().items():
        if k.split('.')[-1] not in ('mean', 'std'): v.fill_(value)
    return new


def same(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('name,info,kwargs', MADE, ids=[f'{n}-{i.kind}-{len(k)}' for n,i,k in MADE])
def test_a_fresh_encoder_owes_nothing_to_training(name, info, kwargs, tmp_path):
    torch.manual_seed(0)
    enc = create_encoder(name, info, **kwargs).eval()
    trained,state = overwrite(enc),torch.get_rng_state()
    fresh = fresh_encoder(enc, 1)
    assert same(fresh, fresh_encoder(trained, 1)) and not fresh.training
    assert torch.equal(torch.get_rng_state(), state), 'making it moved the random numbers of the process'
    assert not same(fresh, enc) and not same(fresh, fresh_encoder(enc, 2)) and type(fresh) is type(enc)
    torch.manual_seed(1)
    assert same(fresh, create_encoder(name, info, **kwargs)), 'drawn by other code than the first'
    save_encoder(trained, tmp_path/'e')
    assert same(fresh_encoder(load_encoder(tmp_path/'e'), 1), fresh), 'a loaded encoder forgot how it was built'
    assert all(torch.equal(getattr(fresh, k), getattr(enc, k)) for k in ('mean', 'std') if hasattr(enc, k))


def test_a_fresh_encoder_of_ones_own():
    class Own(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.net,self.own = create_encoder('small_vit', IMAGES),nn.MultiheadAttention(width, 2)
            self.num_features = width
    enc = Own()
    with pytest.raises(ValueError, match='Own was changed after it was built: own.in_proj_weight is .24, 8.'):
        broken = copy.deepcopy(enc)
        broken.args = dict(width=4)
        fresh_encoder(broken)
    fresh = fresh_encoder(enc, 1)
    assert same(fresh, fresh_encoder(overwrite(enc), 1)) and not same(fresh, enc)
    enc.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match='no `reset_parameters` draws token; keep the keyword arguments'): fresh_encoder(enc)
    twice = nn.Module()
    twice.a = twice.b = create_encoder('small_cnn', IMAGES) # one network under two names
    with pytest.raises(ValueError, match='draws b'): fresh_encoder(twice)


def test_a_fresh_encoder_of_a_changed_one():
    enc = create_encoder('resnet18', IMAGES)
    enc.model.conv1 = nn.Conv2d(3, 64, 7)
    with pytest.raises(ValueError, match='was changed after it was built: model.conv1.weight'): fresh_encoder(enc)


def of_size(size, channels=3, **kwargs): return DataInfo(channels=channels, size=size, **kwargs)


# What fits, and what does not. The smallest of many families, of which none may end in an error of its own.
FAMILIES = ('cait_xxs24_224', 'coat_tiny', 'test_convnext', 'csatv2', 'deit_tiny_patch16_224', 'edgenext_xx_small', 'efficientformerv2_s0', 'efficientvit_b0',
            'eva02_tiny_patch14_224', 'ghostnet_050', 'gmlp_ti16_224', 'inception_next_atto', 'inception_v3', 'levit_128',
            'test_mambaout', 'mixer_s32_224', 'mobilenetv3_small_050', 'mobilevit_xxs', 'test_nfnet', 'pit_ti_224', 'pvt_v2_b0', 'regnetx_002', 'starnet_s050',
            'test_coatnet', 'test_resnet', 'test_vit', 'test_vit_relpos', 'vit_tiny_r_s16_p8_224', 'xcit_nano_12_p8_224')

SEVERAL = 'coat_tiny', # no one map

@pytest.mark.parametrize('name', FAMILIES)
def test_any_architecture_is_an_encoder_or_is_refused(name):
    for channels,size in ((3,32), (1,28), (5,64)):
        state = torch.get_rng_state()
        try: enc = create_encoder(name, of_size(size, channels))
        except ValueError as e:
            said = str(e)
            assert f'encoder {name!r} does not fit images of ({channels}, {size}, {size})' in said and '\n' not in said and len(said)<450, said
            assert ' px, and ' in said or ' px (size, --size)' in said or 'small_cnn' in said, f'not told what would do: {said}'
            assert e.__context__ is None or e.__suppress_context__, 'the hundred lines of timm are shown as well'
            assert torch.equal(torch.get_rng_state(), state)
            continue
        assert enc.training and not any(m._forward_pre_hooks for m in enc.modules())
        x = torch.rand(3, channels, size, size)
        with torch.no_grad(): h = enc.eval()(x)
        assert h.shape==(3, enc.num_features) and h.isfinite().all()
        try: tokens,real = enc.tokens(x)
        except ValueError as e: assert name in SEVERAL and 'features of several resolutions side by side' in str(e)
        else: assert name not in SEVERAL and tokens.shape==(3, tokens.shape[1], map_channels(enc)) and real is None and tokens.isfinite().all()


@pytest.mark.parametrize('name,size', [('test_convnext', 32), ('efficientvit_b0', 32), ('levit_128', 32), ('test_mambaout', 32), ('edgenext_xx_small', 64),
                                       ('mobilevit_xxs', 64), ('pit_ti_224', 32), ('test_vit_relpos', 32), ('xcit_nano_12_p8_224', 32), ('coat_tiny', 32)])
def test_ten_families_are_saved_loaded_and_built_anew(name, size, tmp_path):
    enc,x = create_encoder(name, of_size(size)).eval(),torch.rand(2, 3, size, size)
    save_encoder(enc, tmp_path/'e')
    loaded = load_encoder(tmp_path/'e')
    with torch.no_grad(): assert torch.allclose(loaded(x), enc(x), atol=1e-4, rtol=1e-3)
    fresh = fresh_encoder(enc, 1)
    assert same(fresh, fresh_encoder(overwrite(enc), 1)) and same(fresh, fresh_encoder(loaded, 1)) and not same(fresh, enc)
    with pytest.raises(ValueError, match='features of several resolutions') if name in SEVERAL else nullcontext(): feature_map(enc, x)


@pytest.mark.parametrize('name,size,fits', [('test_convnext', 28, 32), ('edgenext_xx_small', 20, 32), ('inception_v3', 64, 96), ('test_coatnet', 40, 32)])
def test_a_size_that_fits_is_found_by_trying(name, size, fits):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f'{name}.*{size}, {size}.: .*; resize the images to {fits} px .size, --size'): create_encoder(name, of_size(size))
    assert torch.equal(torch.get_rng_state(), state)
    create_encoder(name, of_size(fits))


def test_the_trial_leaves_the_encoder_as_it_was_drawn():
    torch.manual_seed(3)
    enc,state = create_encoder('resnet18', of_size(32)),torch.get_rng_state()
    assert enc.model.bn1.num_batches_tracked==0 and enc.model.bn1.running_mean.abs().max()==0
    torch.manual_seed(3)
    timm.create_model('small_stem', in_chans=3, num_classes=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_fits_at_some_sizes_only_fits_at_those():
    assert create_encoder('levit_128', of_size(224)).num_features==384
    for name in ('gmlp_ti16_224', 'coat_tiny', 'hiera_tiny_224'): # told the size of the images, they take it
        assert create_encoder(name, of_size(64))(torch.rand(2,3,64,64)).shape[0]==2


@pytest.mark.parametrize('name,size,near', [
    ('vit_tiny_patch16_224', 30, '16 or 32'), ('deit_tiny_patch16_224', 8, '16'), ('cait_xxs24_224', 30, '16 or 32'), ('eva02_tiny_patch14_224', 32, '28 or 42'),
    ('swin_tiny_patch4_window7_224', 30, '28 or 32'), ('convmixer_768_32', 32, '28 or 35'), ('small_vit', 61, '60 or 63'), ('small_vit', 1, '2'), ('small_vit', 997, '992 or 1008')])
def test_patches_divide_the_image(name, size, near):
    with pytest.raises(ValueError, match=f' {size}.* images to {near} px|images of {size} px.*to {near} px'): create_encoder(name, of_size(size))


def test_every_size_up_to_512_has_few_patches_or_a_neighbour_that_has():
    few,refused = 0,[]
    for size in range(1, 513):
        try: p = patch_size(size)
        except ValueError as e:
            refused.append(size)
            near = [int(s) for s in str(e).split('resize them to ')[1].split(' px')[0].split(' or ')]
            assert all(patch_size(s) and abs(s-size)<=16 for s in near)
            continue
        assert size%p==0 and 4 <= (size//p)**2 <= max(20, size//16)**2
        few += 1
    assert {7, 17, 28, 33, 64, 96, 224, 384, 512} & set(refused)==set() and few>150
    assert {61, 23, 127} < set(refused)
    assert {(s//patch_size(s))**2 for s in range(24, 129, 8) if s not in (88, 104, 120)}=={49, 64}, 'a smaller image has more patches'


@pytest.mark.parametrize('name', ['small_cnn', 'small_resnet', 'small_stem', 'small_vit'])
@pytest.mark.parametrize('size', [7, 27, 33, 50, 51, 63])
def test_our_own_encoders_see_every_pixel(name, size):
    torch.manual_seed(0)
    enc,x = create_encoder(name, of_size(size)).eval(),torch.rand(4, 3, size, size, requires_grad=True)
    for p in enc.parameters(): nn.init.normal_(p) # the last scales of a ResNet's blocks begin at 0
    h = enc(x)
    (h*torch.randn_like(h)).sum().backward()
    seen = x.grad.abs().amax((0, 1))>0
    assert seen.any(0).all() and seen.any(1).all(), 'rows or columns are left out'


def test_frames_are_seen_to_the_border():
    enc,x = create_encoder('small_video', DataInfo(kind='video', channels=1, size=30)),torch.rand(1,1,2,30,30, requires_grad=True)
    enc(x).square().sum().backward()
    assert (x.grad[0,0].abs().amax((0, 1))>0).all()


def work(name, size):
    "Millions of multiplications of the convolutions for one image"
    enc,n = create_encoder(name, of_size(size)),[0]
    def count(conv, args, out): n[0] += out[0,0].numel()*conv.weight.numel()
    for m in enc.modules():
        if isinstance(m, nn.Conv2d): m.register_forward_hook(count)
    with torch.no_grad(): enc.eval()(torch.rand(1, 3, size, size))
    return n[0]/1e6


@pytest.mark.parametrize('name,first', [('resnet18', 33), ('small_cnn', 21)])
def test_a_smaller_image_is_never_the_dearer_one(name, first):
    "Each longer stride of the stem makes the network cheaper at one stroke, but never to less than half"
    sizes = [20, 21, 28, 32, 33, 48, 49, 56, 64, 65, 72, 80, 81, 96, 128]
    cost = {s: work(name, s) for s in sizes}
    for a in sizes:
        for b in sizes:
            if a<b: assert cost[b] >= (0.5 if a>=first or b<first else 0.37 if name=='resnet18' else 0.08)*cost[a], (a, b, cost)
    assert cost[48] <= cost[64]*1.01 and cost[72] <= cost[96]*1.01 # the sizes that people choose between


def test_an_old_small_cnn_is_the_same_where_the_stem_left_nothing_out():
    torch.manual_seed(0)
    m,x = SmallCNN(3, stem_stride=4).eval(),torch.rand(2,3,64,64)
    stem = nn.functional.conv2d(x, m.body[0].weight, stride=4)
    assert isinstance(m.body[0], StemConv) and torch.equal(m.body[0](x), stem)


@pytest.mark.parametrize('name', ['resnet18.a1_in1k', 'vit_tiny_patch16_224.augreg_in21k'])
def test_trained_weights_must_be_asked_for(name):
    for info in (of_size(32), VIDEO):
        with pytest.raises(ValueError, match=f'names trained weights.*add pretrained .--pretrained.*architecture alone is .{name.split(".")[0]}.'):
            create_encoder(name, info)


@pytest.mark.parametrize('n,places', [(4, 4), (5, 4), (2, 1), (1, 1), (18, 16), (19, None), (7, None)])
def test_a_class_token_that_timm_does_not_declare_is_no_position(n, places):
    class Net(nn.Module): # as VOLO: a class token, and no `num_prefix_tokens`
        num_features = 3
        def forward_features(self, x): return torch.arange(n).float().view(1, n, 1).expand(2, n, 3)
    enc,x = ImageEncoder(Net(), [0.]*3, [1.]*3),torch.rand(2, 3, 8, 8)
    if places is None:
        for f in (enc.tokens, lambda x: feature_map(enc, x)):
            with pytest.raises(ValueError, match=f'Net gives {n} tokens, which make no square map'): f(x)
        return
    h,m = enc.tokens(x)[0],feature_map(enc, x)
    assert h[0,:,0].tolist()==list(range(n-places, n)) and torch.equal(m.flatten(2).transpose(1, 2), h) and m.shape[2]==m.shape[3]


def test_a_wrong_argument_is_named():
    with pytest.raises(ValueError, match="'resnet18'.*small_stem.*unexpected keyword argument 'width'|'small_stem' does not fit.*'width'"):
        create_encoder('resnet18', of_size(32), width=3)
    with pytest.raises(ValueError, match="'test_resnet' does not fit.*'img_size'"): create_encoder('test_resnet', of_size(32), img_size=32)


# Methods that cannot work with so few patches

def test_mae_with_nothing_to_hide():
    for kwargs in (dict(patch_size=8), dict(patch_size=16, img_size=16)):
        enc = create_encoder('small_vit', of_size(kwargs.get('img_size', 8)), **kwargs)
        with pytest.raises(ValueError, match='MAE would hide every patch: small_vit cuts an image into 1, of .* larger images'): MAE(enc)
    enc = create_encoder('small_vit', of_size(8)) # 16 patches
    with pytest.raises(ValueError, match='into 16, of 2 px, and the ratio is 0.01'): MAE(enc, ratio=0.01)
    m = MAE(create_encoder('small_vit', of_size(2)))
    inputs,targets = m.pretext(torch.rand(4,3,2,2))
    assert m.loss(m(*inputs), *targets).isfinite()


@pytest.mark.parametrize('size', [1, 2, 3])
def test_cpc_with_too_few_rows(size):
    info = of_size(size)
    with pytest.raises(ValueError, match=f'images of {size} px have not two rows'):
        CPC.for_data(create_encoder('small_cnn', info), SimpleNamespace(info=info))


@pytest.mark.parametrize('size', [4, 5, 16, 17])
def test_cpc_with_enough_rows(size):
    info = of_size(size)
    m = CPC.for_data(create_encoder('small_cnn', info), SimpleNamespace(info=info))
    inputs,targets = m.pretext(torch.rand(4, 3, size, size))
    assert m.loss(m(*inputs), *targets).isfinite()
    with pytest.raises(ValueError, match='not two rows'): CPC.for_data(m.encoder, SimpleNamespace(info=info), patch=size)


# Folders: what timm reads, and what is damaged or foreign

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "One folder of each sort, and the encoders"
    root = tmp_path_factory.mktemp('saved')
    made = dict(image=create_encoder('small_cnn', IMAGES), timm=create_encoder('test_resnet', IMAGES), text=create_encoder('small_text', TEXT),
                video=create_encoder('small_video', VIDEO))
    for k,enc in made.items(): save_encoder(enc, root/k)
    return root,made


def copy_of(folder, to):
    to.mkdir()
    for f in folder.iterdir(): (to/f.name).write_bytes(f.read_bytes())
    return to


def flip(data): return data[:-100] + bytes([data[-100]^1]) + data[-99:]


DAMAGE = dict(truncated=lambda b: b[:len(b)//2], empty=lambda b: b'', zeros=lambda b: bytes(len(b)), text=lambda b: b'not weights\n', bit=flip,
              latin=lambda b: 'größe'.encode('latin1'), nothing=lambda b: None)

@pytest.mark.parametrize('kind', ['image', 'timm', 'text', 'video'])
@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('checked', [True, False], ids=['checksum', 'older'])
def test_damaged_weights(saved, tmp_path, kind, damage, checked):
    f = copy_of(saved[0]/kind, tmp_path/'e')
    if not checked:
        cfg = json.loads((f/'config.json').read_text())
        del cfg['weights_sha256'], cfg['config_sha256'] # as folders were written before
        (f/'config.json').write_text(json.dumps(cfg))
        load_encoder(f)
    new = DAMAGE[damage]((f/'model.safetensors').read_bytes())
    if new is None: (f/'model.safetensors').unlink()
    else: (f/'model.safetensors').write_bytes(new)
    if damage=='bit' and not checked: return # a number among numbers: only the checksum can know
    with pytest.raises(FileNotFoundError if new is None else ValueError, match='model.safetensors.*(copy the folder again|give the folder that)') as e: load_encoder(f)
    assert '\n' not in str(e.value)


def change(f, **kwargs):
    "Change the configuration; without its checksum, as older folders were written"
    cfg = json.loads((f/'config.json').read_text())
    cfg.pop('config_sha256', None)
    for k,v in kwargs.items():
        if v is None: del cfg[k]
        else: cfg[k] = v
    (f/'config.json').write_text(json.dumps(cfg))


FOREIGN = {'text': lambda f: (f/'config.json').write_text('hello'), 'empty': lambda f: (f/'config.json').write_text(''), 'zeros': lambda f: (f/'config.json').write_bytes(bytes(99)),
           'truncated': lambda f: (f/'config.json').write_text((f/'config.json').read_text()[:50]), 'latin1': lambda f: (f/'config.json').write_bytes(b'{"a": "\xe4"}'),
           'list': lambda f: (f/'config.json').write_text('[1]'), 'no architecture': lambda f: change(f, architecture=None), 'number': lambda f: change(f, architecture=3),
           'other architecture': lambda f: change(f, architecture='resnet_19'), 'no arguments': lambda f: change(f, model_args=None),
           'unknown argument': lambda f: change(f, model_args=dict(size=32, colour='red')), 'arguments of no kind': lambda f: change(f, model_args=[3]),
           'wrong checksum': lambda f: change(f, weights_sha256='0'*64), 'not ours': lambda f: change(f, architecture='ssl_nb.core.loader.DataInfo'),
           'no module': lambda f: change(f, architecture='ssl_nb.core.nothing.Net'), 'missing': lambda f: (f/'config.json').unlink()}

@pytest.mark.parametrize('kind', ['image', 'timm', 'text'])
@pytest.mark.parametrize('what', FOREIGN)
def test_a_foreign_configuration(saved, tmp_path, kind, what):
    f = copy_of(saved[0]/kind, tmp_path/'e')
    FOREIGN[what](f)
    if what=='no arguments' and kind!='text': return # a timm model without arguments is what it is by default
    with pytest.raises((ValueError, FileNotFoundError), match='config.json') as e: load_encoder(f)
    assert '\n' not in str(e.value) and len(str(e.value))<600


def test_weights_of_another_encoder(saved, tmp_path):
    for kind,other in (('image', 'text'), ('text', 'image'), ('timm', 'image'), ('video', 'timm')):
        f = copy_of(saved[0]/kind, tmp_path/kind)
        (f/'model.safetensors').write_bytes((saved[0]/other/'model.safetensors').read_bytes())
        with pytest.raises(ValueError, match='model.safetensors is damaged or of another encoder'): load_encoder(f)
        change(f, weights_sha256=None)
        with pytest.raises(ValueError, match='config.json and model.safetensors do not make an encoder'): load_encoder(f)


def test_nothing_in_a_folder_is_executed(saved, tmp_path):
    class Bomb:
        def __reduce__(self): return exec, (f'open({str(tmp_path/"ran")!r}, "w")',)
    for kind in ('image', 'text'):
        f = copy_of(saved[0]/kind, tmp_path/kind)
        for name in ('pytorch_model.bin', 'model.safetensors'):
            torch.save({'weight': Bomb()}, f/name)
            (f/'__init__.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
            if name=='model.safetensors': change(f, weights_sha256=None)
            try: load_encoder(f)
            except ValueError: pass
        (f/'model.safetensors').unlink()
        with pytest.raises(FileNotFoundError, match='model.safetensors is missing'): load_encoder(f)
        change(f, architecture='os.system', model_args=dict(command='touch ran'))
        with pytest.raises((ValueError, FileNotFoundError)): load_encoder(f)
    assert not (tmp_path/'ran').exists()


def test_what_was_saved_stays_until_the_new_one_is_whole(saved, tmp_path, monkeypatch):
    f = copy_of(saved[0]/'image', tmp_path/'e')
    before = {p.name: p.read_bytes() for p in f.iterdir()}
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('ssl_nb.core.encoder_weights.write_json', full)
    with pytest.raises(OSError, match='No space'): save_encoder(create_encoder('small_cnn', IMAGES), f)
    assert {p.name: p.read_bytes() for p in f.iterdir()}==before


def test_the_configuration_says_how_pictures_were_resized(saved):
    cfg = json.loads((saved[0]/'timm'/'config.json').read_text())
    assert cfg['pretrained_cfg']['interpolation']=='bilinear' and cfg['pretrained_cfg']['crop_pct']==1
    data = timm.data.resolve_data_config({}, model=timm.create_model(f'local-dir:{saved[0]/"timm"}', pretrained=True))
    assert data['interpolation']=='bilinear' and data['input_size']==(3,32,32) and data['mean']==pytest.approx(IMAGES.mean)


def test_timm_reads_the_folder_of_a_small_encoder_after_import_ssl_nb(tmp_path):
    x = torch.rand(2, 3, 32, 32)
    for name in ('small_cnn', 'small_vit', 'small_resnet'):
        enc = create_encoder(name, IMAGES).eval()
        save_encoder(enc, tmp_path/name)
        with torch.no_grad(): save_file(dict(x=enc.normalize(x).contiguous(), h=enc(x)), tmp_path/name/'x')
    code = f'''
import importlib.util, sys, time
start = time.perf_counter()
import ssl_nb
took = time.perf_counter()-start
assert took<0.5 and not {{'torch', 'timm', 'ssl_nb.core'}} & set(sys.modules), took
importlib.util.find_spec('timm') # somebody asks whether it is there
import timm
from safetensors.torch import load_file
assert 'ssl_nb.core' not in sys.modules and not hasattr(ssl_nb, '__all__')
for name in ('small_cnn', 'small_vit', 'small_resnet'):
    folder = {str(tmp_path)!r} + '/' + name
    d,model = load_file(folder + '/x'),timm.create_model('local-dir:' + folder, pretrained=True).eval()
    assert (model(d['x'])-d['h']).abs().max()<1e-5, name
'''
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode==0, done.stderr[-2000:]


def test_a_flipped_bit_of_the_configuration(saved, tmp_path):
    f = copy_of(saved[0]/'text', tmp_path/'e')
    right,rng = (f/'config.json').read_bytes(),torch.Generator().manual_seed(0)
    cfg,found = json.loads(right),0
    for i in range(0, len(right), 3):
        new = bytearray(right)
        new[i] ^= 1 << int(torch.randint(8, (1,), generator=rng))
        (f/'config.json').write_bytes(new)
        try: load_encoder(f)
        except ValueError as e:
            found += 1
            assert str(f/'config.json') in str(e) and '\n' not in str(e) and 'copy the folder again' in str(e) or 'names no architecture' in str(e)
        else: # the name of the checksum itself, or two names for one letter
            new = json.loads(bytes(new))
            assert new==cfg or [new[k] for k in cfg if k!='config_sha256']==[v for k,v in cfg.items() if k!='config_sha256']
    assert found > len(right)/3-12
    (f/'config.json').write_bytes(right)
    load_encoder(f)


def test_a_configuration_that_was_edited(saved, tmp_path):
    f = copy_of(saved[0]/'timm', tmp_path/'e')
    cfg = json.loads((f/'config.json').read_text())
    cfg['pretrained_cfg']['mean'][0] += 0.1
    (f/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match='config.json is damaged or was changed by hand: it does not fit its checksum'): load_encoder(f)


# Weights to begin with: timm's, from a file in the place of the hub, or those of a folder

def source(name, folder, **cfg):
    "(`pretrained_cfg_overlay`, the weights): a file as timm would fetch it"
    torch.manual_seed(5)
    weights = timm.create_model(name).state_dict()
    save_file({k: v.contiguous() for k,v in weights.items()}, folder/f'{name}.safetensors')
    return dict(file=str(folder/f'{name}.safetensors'), mean=(.5,.4,.3), std=(.1,.2,.3), **cfg),weights


@pytest.mark.parametrize('name,size', [('resnet18', 32), ('test_convnext', 64), ('test_vit', 96)])
def test_pretrained_is_what_timm_has(name, size, tmp_path):
    (overlay,weights),info = source(name, tmp_path),of_size(size, mean=[.1]*3, std=[.9]*3)
    enc = create_encoder(name, info, pretrained=True, pretrained_cfg_overlay=overlay)
    own = {k: v for k,v in enc.model.state_dict().items() if k!='pos_embed'} # resized with the image
    assert own and all(torch.equal(v, weights[k]) for k,v in own.items()) and enc.training
    assert enc.mean.flatten().tolist()==pytest.approx([.5,.4,.3]) and enc.std.flatten().tolist()==pytest.approx([.1,.2,.3])
    sized = dict(img_size=size) if name=='test_vit' else {}
    timms,x = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **sized).eval(),torch.rand(2,3,size,size)
    same_out = lambda a, b: torch.allclose(a(x), b((x-enc.mean)/enc.std), atol=1e-5)
    with torch.no_grad(): assert same_out(enc.eval(), timms), 'another stem, or another size, than timm makes of it'
    save_encoder(enc, tmp_path/'e')
    cfg = json.loads((tmp_path/'e'/'config.json').read_text())
    assert str(tmp_path) not in str(cfg) and cfg['pretrained_cfg']['mean']==pytest.approx([.5,.4,.3])
    again = timm.create_model(f'local-dir:{tmp_path/"e"}', pretrained=True).eval()
    assert again.pretrained_cfg['mean']==pytest.approx([.5,.4,.3]) and again.pretrained_cfg['std']==pytest.approx([.1,.2,.3])
    with torch.no_grad(): assert same_out(load_encoder(tmp_path/'e'), again) and same_out(enc, again)
    for e in (enc, load_encoder(tmp_path/'e'), create_encoder(tmp_path/'e', info)):
        fresh = fresh_encoder(e, 1)
        assert same(fresh, fresh_encoder(overwrite(enc), 1)) and torch.equal(fresh.mean, enc.mean)
        assert not any(torch.equal(v, weights[k]) for k,v in fresh.model.state_dict().items() if k.endswith('weight') and v.std()>0)


@pytest.mark.parametrize('channels', [1, 2, 5])
def test_pretrained_with_other_channels(channels, tmp_path):
    overlay,weights = source('resnet18', tmp_path)
    enc = create_encoder('resnet18', of_size(40, channels), pretrained=True, pretrained_cfg_overlay=overlay)
    w = weights['conv1.weight']
    w = w.sum(1, keepdim=True) if channels==1 else w.repeat(1, 2, 1, 1)[:,:channels]*3/channels
    assert torch.allclose(enc.model.conv1.weight, w, atol=1e-6)
    assert enc.mean.flatten().tolist()==pytest.approx([.4]*channels) and enc.std.flatten().tolist()==pytest.approx([.2]*channels)


def test_frames_with_pretrained_weights(tmp_path, monkeypatch):
    (overlay,weights),make = source('resnet18', tmp_path),timm.create_model
    def from_file(name, pretrained=False, **kwargs): return make(name, pretrained, **kwargs | (dict(pretrained_cfg_overlay=overlay) if pretrained else {}))
    monkeypatch.setattr(timm, 'create_model', from_file)
    info = DataInfo(kind='video', channels=3, size=32, frames=3, mean=[.1]*3, std=[.9]*3)
    for name in ('resnet18', 'resnet18.a1_in1k'):
        enc = create_encoder(name, info, pretrained=True)
        assert all(torch.equal(v, weights[k]) for k,v in enc.net.model.state_dict().items())
        assert enc.mean.flatten().tolist()==pytest.approx([.5,.4,.3])
    monkeypatch.undo() # from here on nothing is fetched
    save_encoder(enc.eval(), tmp_path/'e')
    clips = torch.rand(1, 3, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(load_encoder(tmp_path/'e')(clips), enc(clips), atol=1e-5)
    assert same(fresh_encoder(enc, 1), fresh_encoder(overwrite(enc), 1)) and not same(fresh_encoder(enc, 1), enc)


@pytest.mark.parametrize('name,info', [('small_cnn', IMAGES), ('small_vit', IMAGES), ('small_stem', IMAGES), (None, IMAGES), ('small_text', TEXT), (None, TEXT),
                                       ('small_video', VIDEO), ('small_cnn', VIDEO), ('resnet19', IMAGES)])
def test_who_has_no_pretrained_weights_is_named(name, info):
    usual = dict(images='small_cnn', text='small_text')
    with pytest.raises(ValueError, match=f'no pretrained weights of {(name or usual[info.kind])!r}: leave out pretrained .--pretrained., or take .*resnet18'):
        create_encoder(name, info, pretrained=True)


def test_pretrained_weights_that_do_not_exist_or_fit(tmp_path):
    with pytest.raises(ValueError, match="unknown pretrained weights 'resnet18.a1_in2k'; did you mean resnet18.a1_in1k"):
        create_encoder('resnet18.a1_in2k', IMAGES, pretrained=True)
    overlay,_ = source('test_resnet', tmp_path)
    with pytest.raises(ValueError, match=r"pretrained weights of 'resnet18' do not fit images of \(3, 32, 32\): ") as e:
        create_encoder('resnet18', IMAGES, pretrained=True, pretrained_cfg_overlay=overlay)
    assert '\n' not in str(e.value) and e.value.__suppress_context__


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet.r160_in1k', 'test_vit'])
def test_without_network_the_error_says_what_to_do(offline, name):
    with pytest.raises(FileNotFoundError, match=f"weights of {name!r} are not on this machine.*network.*copy .*hub.*leave out pretrained") as e:
        create_encoder(name, of_size(32), pretrained=True)
    assert '\n' not in str(e.value) and e.value.__suppress_context__


def test_without_network_fetched_weights_serve(offline):
    _,weights = source('test_resnet', offline.parent)
    put_in_hub(offline, 'test_resnet.r160_in1k', weights)
    enc = create_encoder('test_resnet', of_size(32, mean=[.1]*3, std=[.9]*3), pretrained=True)
    assert all(torch.equal(v, weights[k]) for k,v in enc.model.state_dict().items())
    assert enc.mean.flatten().tolist()==pytest.approx(timm.get_pretrained_cfg('test_resnet').mean)


INFOS = dict(image=IMAGES, timm=IMAGES, text=TEXT, video=VIDEO)

@pytest.mark.parametrize('kind', INFOS)
@pytest.mark.parametrize('run', [False, True], ids=['encoder', 'run'])
def test_an_encoder_begins_with_what_a_folder_holds(saved, tmp_path, kind, run, monkeypatch):
    enc,info = saved[1][kind],copy.copy(INFOS[kind])
    if info.mean: info.mean = [.1]*3
    if run: (tmp_path/'r').mkdir()
    folder = copy_of(saved[0]/kind, tmp_path/('r/encoder' if run else 'r')).parent
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path/'r'), tmp_path/'r', 'r', './r'):
        new = create_encoder(name, info)
        assert same(new, enc) and new.training and type(new) is type(enc)
    fresh = fresh_encoder(new, 1)
    assert same(fresh, fresh_encoder(overwrite(new), 1)) and same(fresh, fresh_encoder(enc, 1)) and not same(fresh, new)
    with pytest.raises(ValueError, match='r has its architecture and weights already; leave out pretrained, dim'): create_encoder('r', info, pretrained=True, dim=3)


def test_a_folder_called_like_an_architecture(saved, tmp_path, monkeypatch):
    copy_of(saved[0]/'image', tmp_path/'test_resnet'), copy_of(saved[0]/'text', tmp_path/'small_text')
    monkeypatch.chdir(tmp_path)
    assert type(create_encoder('test_resnet', IMAGES).model).__name__=='ResNet' and same(create_encoder('./test_resnet', IMAGES), saved[1]['image'])
    assert not same(create_encoder('small_text', TEXT), saved[1]['text'])


def test_an_encoder_goes_on_at_another_size_where_it_can(saved, tmp_path):
    new = create_encoder(saved[0]/'image', of_size(64))
    assert new(torch.rand(2,3,64,64)).shape==(2,256) and torch.equal(new.mean, saved[1]['image'].mean)
    save_encoder(new, tmp_path/'e')
    assert json.loads((tmp_path/'e'/'config.json').read_text())['pretrained_cfg']['input_size']==[3,64,64]
    assert same(create_encoder(saved[0]/'text', DataInfo(kind='text', vocab_size=30, max_len=5)), saved[1]['text'])


@pytest.mark.parametrize('kind,info,said', [
    ('image', of_size(32, 1), 'was made for channels 3, not for channels 1'), ('image', TEXT, "data of the kind 'text': it holds ImageEncoder, not TextTransformer"),
    ('image', VIDEO, "'video': it holds ImageEncoder, not VideoEncoder"), ('text', IMAGES, 'it holds TextTransformer, not ImageEncoder'), ('video', IMAGES, 'it holds VideoEncoder'),
    ('text', DataInfo(kind='text', vocab_size=31, max_len=8), 'for vocab size 30, not for vocab size 31'), ('text', DataInfo(kind='text', vocab_size=30, max_len=9), 'max len 8, not for max len 9'),
    ('video', DataInfo(kind='video', channels=1, size=32), 'for size 24, not for size 32; read the images at its size .--size 24'),
    ('video', DataInfo(kind='video', channels=3, size=32), 'for channels 1 and size 24, not for channels 3 and size 32$'),
    ('vit', of_size(64), 'for size 32, not for size 64; read the images at its size .--size 32')])
def test_a_folder_that_does_not_fit_is_refused(saved, tmp_path, kind, info, said):
    folder = saved[0]/kind
    if kind=='vit': save_encoder(create_encoder('small_vit', IMAGES), folder := tmp_path/'vit')
    with pytest.raises(ValueError, match=f'{folder} does not fit .*{said}') as e: create_encoder(folder, info)
    assert '\n' not in str(e.value)


def test_a_folder_without_an_encoder(saved, tmp_path):
    for name in (tmp_path/'nothing', './nothing', tmp_path):
        with pytest.raises(FileNotFoundError, match='holds no encoder: config.json is missing; .*that of a finished run'): create_encoder(name, IMAGES)
    f = copy_of(saved[0]/'image', tmp_path/'e')
    (f/'model.safetensors').write_bytes(flip((f/'model.safetensors').read_bytes()))
    with pytest.raises(ValueError, match='model.safetensors is damaged'): create_encoder(f, IMAGES)


def test_the_report_of_a_started_encoder_shows_nothing_trained_in_its_random_row(tmp_path):
    y = torch.arange(120)%2
    dls = array_dls((torch.rand(120, 1, 8, 8)*0.6+0.4*y[:,None,None,None]).numpy(), y.numpy(), bs=16)
    torch.manual_seed(0)
    enc = create_encoder('small_vit', dls.info)
    rows = []
    for value in (None, 0.05):
        save_encoder(enc if value is None else overwrite(enc, value), tmp_path/'e')
        rows.append(report(create_encoder(tmp_path/'e', dls.info), dls, supervised=False, show=False).table)
    same_rows = (rows[0].fillna(0)==rows[1].fillna(0)).all(axis=1)
    assert same_rows.to_dict()=={'raw input': True, 'random encoder': True, 'this encoder': False}

def test_text_goes_on_with_the_tokens_of_the_run_that_it_begins_with(tmp_path):
    from ssl_nb.app.run import pretrain
    for name,words in (('a', 'red green blue grey'), ('b', 'cyan rose lime plum')):
        (tmp_path/name).mkdir()
        for i in range(24): (tmp_path/name/f'{i}.txt').write_text(' '.join(words.split()[(i*k)%4] for k in range(1, 12)))
    same = dict(epochs=1, batch_size=16, supervised=False, device='cpu')
    a = pretrain('bert', tmp_path/'a', tmp_path/'run_a', **same)
    b = pretrain('bert', tmp_path/'b', tmp_path/'run_b', encoder=str(a), **same)
    assert (a/'tokenizer.json').read_bytes()==(b/'tokenizer.json').read_bytes(), 'the numbers of the words have changed their meaning'
