"Next patch: nothing that is still to come reaches a prediction, through any token, prefix or size of image."
import pytest, torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.loader import DataInfo
from ssl_nb.masked.next_patch import NextPatch, next_patch_loss, prefix_mask


@pytest.mark.parametrize('name, size, kwargs', [('small_vit', 32, dict(patch_size=8)), ('vit_tiny_patch16_224', 64, {})]) # without and with a class token
@pytest.mark.parametrize('pool', (True, False))
def test_the_future_is_hidden(name, size, kwargs, pool):
    "The gradient of what is asked for does not reach the pixels of that patch or of a later one, and reaches those of the last one seen"
    torch.manual_seed(0)
    m = NextPatch(create_encoder(name, DataInfo(size=size, channels=3), depth=2, **kwargs), pool=pool)
    p, side = m.p, size//m.p
    for prefix in (1, 5, m.n-1):
        x = torch.rand(2, 3, size, size, requires_grad=True)
        pred = m(x, torch.full((2,), prefix))
        for k in range(prefix, m.n, 5): # patch k is predicted at k-1
            g, = torch.autograd.grad(pred[:, k-1].square().sum(), x, retain_graph=True)
            g = g.abs().unflatten(2, (side, p)).unflatten(4, (side, p)).sum((1, 3, 5)).flatten(1) # (2,N)
            assert (g[:, k:] == 0).all() and (g[:, :k] > 0).all()


def test_prefix_is_uniform():
    "From 1 to N-1 patches, each length as often as another; without a random prefix always one patch"
    torch.manual_seed(0)
    info = DataInfo(size=8, channels=1)
    (_, prefix), (target, same) = NextPatch(create_encoder('small_vit', info, patch_size=2)).pretext(torch.rand(6000, 1, 8, 8))
    n = prefix.bincount(minlength=17)
    assert n[0] == 0 and n[16] == 0 and ((n[1:16]-400).abs() < 100).all() and target.shape == (6000, 15, 4) and torch.equal(prefix, same)
    (_, prefix), _ = NextPatch(create_encoder('small_vit', info, patch_size=2), prefix=False).pretext(torch.rand(50, 1, 8, 8))
    assert (prefix == 1).all()


def test_loss_counts_patches_not_images():
    "An image with one question weighs a fifteenth of one with fifteen"
    pred, target = torch.zeros(2, 15, 4), torch.zeros(2, 15, 4)
    target[0] = 1.
    assert next_patch_loss(pred, target, torch.tensor([1, 15])).item() == pytest.approx(15/16)
    assert prefix_mask(torch.tensor([15]), 16)[0, 0, :15, :15].all()
