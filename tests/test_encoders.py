"Encoders: any timm model is one or is refused by name, a fresh one owes nothing to training, and files that are damaged are named."
import copy

import pytest
import torch
from torch import nn

from ssl_nb.core.encoders import ImageEncoder, create_encoder, fresh_encoder, load_encoder, save_encoder
from ssl_nb.core.loader import DataInfo

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
