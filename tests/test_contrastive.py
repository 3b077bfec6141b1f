"The contrastive family as a whole: what holds for every method, whoever adds one."
import json

import pytest
import torch

from ssl_nb.app.runner import references, run_many, settings
from ssl_nb.benchmarks.contrastive import family, main, results_file
from ssl_nb.core.loader import DataInfo, array_dls, digits_dls
from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.learner import ssl_learner
from ssl_nb.core.method import check_method, find_methods
from ssl_nb.core.views import TokenViews

METHODS = family()
ABOUT_IMAGES = {'cpc'}  # asks about patches or pieces of sound


def build(name, info, encoder='small_cnn', **kwargs):
    torch.manual_seed(0)
    dls = digits_dls(bs=128)
    return find_methods()[name].for_data(create_encoder(encoder, info), dls, **kwargs), dls


def test_the_family_is_complete():
    assert {'simclr', 'moco', 'moco_v3', 'dcl', 'nnclr', 'cpc', 'supcon', 'byol', 'simsiam', 'barlow', 'vicreg', 'wmse', 'lejepa',
            'deepcluster', 'swav', 'dino'} <= set(METHODS)
    assert 'clip' in find_methods()


@pytest.mark.parametrize('name', METHODS)
def test_loss_survives_odd_batches_and_half_precision(name):
    m, dls = build(name, digits_dls().info)
    x, y = dls.one_batch()
    for n in (max(2, m.min_batch), 77, 128):
        if n < m.min_batch: continue
        asked = (x[:n], y[:n]) if m.uses_labels else (x[:n],)
        with torch.no_grad(): inputs, targets = m.pretext(*asked)
        loss = m.loss(m(*inputs), *targets)
        loss.backward()
        m.update(0.5)
        assert loss.isfinite()
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad(): inputs, targets = m.pretext(*asked)
        loss = m.loss(m(*inputs), *targets)
    assert loss.isfinite() and loss.ndim==0


@pytest.mark.parametrize('name', sorted(set(METHODS)-ABOUT_IMAGES))
def test_the_same_class_reads_text(name):
    torch.manual_seed(0)
    tokens = torch.randint(5, 60, (128, 12))
    tokens[:, 9:] = 0
    encoder = create_encoder('small_text', DataInfo(kind='text', vocab_size=60, max_len=12))
    method = find_methods()[name](encoder, views=TokenViews(0.3))
    check_method(method, (tokens, torch.arange(128)%4))


@pytest.mark.parametrize('name', METHODS)
def test_guards_are_named_and_in_place(name):
    m, dls = build(name, digits_dls().info)
    guards = m.guards()
    assert guards and all(ok is True for ok in guards.values()), guards


@pytest.mark.parametrize('name', METHODS)
def test_two_copies_of_one_run_are_equal(name):
    "Same seed, same weights, method state included, even when it is built twice"
    ends = []
    for _ in range(2):
        x = torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        dls = array_dls(x, torch.arange(128)%4, bs=64)
        torch.manual_seed(0)
        m = find_methods()[name].for_data(create_encoder('small_cnn', dls.info), dls)
        learn = ssl_learner(dls, m, every=0)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        ends.append(learn.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


def test_comparison_goes_on_where_it_stopped(tmp_path):
    def compare(*methods): main(['--data', 'digits', '--methods', ','.join(methods), '--epochs', '1', '--samples', '256', '--seeds', '1', '--device', 'cpu', '--workers', '1',
                                 '--folder', str(tmp_path)])
    compare('simclr')
    cfg = settings('digits', ['simclr'], 'small_cnn', 1, 128, samples=256, device='cpu')
    file = results_file(cfg, tmp_path)
    first = json.loads(file.read_text())
    first.pop('checksum')  # it is changed by hand
    assert [r['method'] for r in first['runs']] == [*references, 'simclr']
    for r in first['runs']: r['knn 10'] = -1.0  # a mark: a finished run is not repeated
    file.write_text(json.dumps(first))
    compare('simclr', 'byol')
    again = json.loads(file.read_text())
    assert [(r['method'], r['knn 10']==-1.0) for r in again['runs']] == [*((k, True) for k in references), ('simclr', True), ('byol', False)]
    assert again['config'] == cfg
    with pytest.raises(ValueError, match='simclr'): compare('simclrr')
    with pytest.raises(ValueError, match='other settings'): run_many(cfg | dict(lr=1e-3), ['byol'], file)
