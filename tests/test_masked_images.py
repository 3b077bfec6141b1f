"SimMIM, MaskFeat and BEiT: what is hidden cannot be seen, the loss is taken where something was hidden, and a tokenizer is part of the state."
import pytest
import torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.loader import digits_dls
from ssl_nb.core.masks import gather_tokens, ids_to_mask
from ssl_nb.core.method import get_method
from ssl_nb.masked.hidden import blockwise_ids, mixed, patchify, unpatchify

NAMES = 'simmim', 'maskfeat', 'beit'


@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=16)


def make(name, dls, **kwargs):
    torch.manual_seed(0)
    if name=='beit': kwargs['steps'] = 20
    return get_method(name).for_data(create_encoder('small_vit', dls.info), dls, **kwargs)


def ask(m, x):
    with torch.no_grad(): return m.pretext(x)


@pytest.mark.parametrize('name', NAMES)
def test_a_mask_token_hides_its_patch(name, dls):
    m, x = make(name, dls, seen=0.).eval(), dls.one_batch()[0]
    (shown, masked), (_, hidden) = ask(m, x)
    assert torch.equal(masked, hidden) and torch.equal(shown, x)
    t = patchify(x, m.p)
    t[ids_to_mask(masked, m.n)] = torch.rand(masked.numel(), t.shape[2])
    with torch.no_grad(): assert torch.allclose(m(unpatchify(t, m.p), masked), m(x, masked), atol=1e-5)
    t[~ids_to_mask(masked, m.n)] = 0.  # what is visible does count
    with torch.no_grad(): assert not torch.allclose(m(unpatchify(t, m.p), masked), m(x, masked), atol=1e-2)


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_is_taken_at_hidden_places(name, dls):
    m, x = make(name, dls), dls.one_batch()[0]
    (shown, masked), (target, hidden) = ask(m, x)
    pred = m(shown, masked).detach().requires_grad_()
    grad, = torch.autograd.grad(m.loss(pred, target, hidden), pred)
    assert torch.equal(grad.abs().sum(2)>0, ids_to_mask(hidden, m.n))
    other = target.clone()
    other[~ids_to_mask(hidden, m.n)] = 0
    assert torch.equal(m.loss(pred, other, hidden), m.loss(pred, target, hidden))


def test_a_hidden_place_gets_a_token_another_patch_or_its_own():
    torch.manual_seed(0)
    x = torch.rand(2000, 1, 8, 8)
    hidden = blockwise_ids(2000, (4, 4), 0.6)
    shown, masked = mixed(x, 2, hidden, 0.6)
    moved = (patchify(shown, 2)!=patchify(x, 2)).any(2)
    assert not (moved & ids_to_mask(masked, 16)).any() and not (moved & ~ids_to_mask(hidden, 16)).any()
    assert (moved.sum(1)==3).all() and masked.shape[1]==hidden.shape[1]-6
    assert torch.equal(gather_tokens(patchify(shown, 2), hidden)[1:][moved.gather(1, hidden)[1:]],
                       gather_tokens(patchify(x, 2).roll(1, 0), hidden)[1:][moved.gather(1, hidden)[1:]])
    share = ids_to_mask(masked, 16).sum(0)/ids_to_mask(hidden, 16).sum(0)  # whoever is hidden gets a token equally often
    assert (share-masked.shape[1]/hidden.shape[1]).abs().max() < 0.08


def test_the_tokenizer_is_saved_with_beit(dls):
    a = make('beit', dls)
    b = get_method('beit').for_data(create_encoder('small_vit', dls.info), dls, steps=3)
    x = dls.one_batch()[0]
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.tokenizer(x), b.tokenizer(x))
    before = {k: v.clone() for k, v in a.tokenizer.state_dict().items()}
    a.train()
    (shown, masked), targets = ask(a, x)
    a.loss(a(shown, masked), *targets).backward()
    assert all(torch.equal(v, before[k]) for k, v in a.tokenizer.state_dict().items())
    assert not a.tokenizer.training and all(p.grad is None for p in a.tokenizer.parameters())
