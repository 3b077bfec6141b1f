"Methods that predict features or classes of an EMA teacher at hidden patches: data2vec, I-JEPA and iBOT."
import pytest
import torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.heads import cosine_momentum
from ssl_nb.core.loader import DataInfo
from ssl_nb.core.masks import ids_to_mask
from ssl_nb.masked.data2vec import Data2Vec, data2vec_loss, linear_ramp
from ssl_nb.masked.ibot import Center, gram_loss, iBOT, ibot_loss
from ssl_nb.masked.ijepa import IJEPA, jepa_loss, jepa_masks

INFO = DataInfo(size=16, channels=1)
def vit(): return create_encoder('small_vit', INFO, patch_size=4, depth=1, embed_dim=32)
def flipped(x): return x.flip(-1)

MAKE = {'data2vec': lambda enc, **k: Data2Vec(enc, top=1, **k), 'ijepa': lambda enc, **k: IJEPA(enc, **k),
        'ibot': lambda enc, **k: iBOT(enc, flipped, dim=8, **k)}
each = pytest.mark.parametrize('name', sorted(MAKE))


def made(name, **kwargs):
    torch.manual_seed(0)
    return MAKE[name](vit(), **kwargs)


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


@each
def test_only_the_student_is_trained(name):
    "No gradient reaches the teacher, and what the student is changes no target"
    m = made(name).eval()
    x = torch.rand(8,1,16,16)
    def ask():
        torch.manual_seed(1)
        return m.pretext(x)
    (inputs, targets) = ask()
    m.loss(m(*inputs), *targets).backward()
    assert all(p.grad is None and not p.requires_grad for p in m.teacher.parameters())
    assert weights(m.encoder).isfinite().all() and m.encoder.model.pos_embed.grad.abs().sum() > 0
    with torch.no_grad():
        for p in m.encoder.parameters(): p.add_(1)
    for a, b in zip(targets, ask()[1]): assert torch.equal(a, b)


@pytest.mark.parametrize('name,at', [('data2vec', lambda pct: linear_ramp(pct, (0.9,0.99))), ('ijepa', lambda pct: 0.9+0.1*pct),
                                     ('ibot', lambda pct: cosine_momentum(pct, 0.9))])
@pytest.mark.parametrize('pct', [0., 0.3, 1.])
def test_the_teacher_follows_by_the_schedule(name, at, pct):
    m = made(name, momentum=(0.9,0.99) if name=='data2vec' else 0.9)
    student = torch.nn.ModuleList([m.encoder, m.head]) if name=='ibot' else m.encoder
    with torch.no_grad():
        for p in student.parameters(): p.add_(1)
    before = weights(m.teacher)
    m.update(pct)
    moved = weights(m.teacher)-before
    assert torch.allclose(moved, torch.full_like(moved, 1-at(pct)), atol=1e-5)


def test_places_of_the_targets_are_equally_likely():
    "Where nothing is drawn again: 2 by 2 patches on a grid of 4 by 4 have nine places"
    torch.manual_seed(0)
    keep, at = jepa_masks(6000, (4,4), blocks=1, scale=(.25,.25), aspect=(1.,1.), draws=1, least=0.)
    places, count = at[:,0,0].unique(return_counts=True)
    assert places.tolist()==[0,1,2,4,5,6,8,9,10]
    assert (count/6000-1/9).abs().max() < 0.02
    assert keep.shape[1]==12 and not (ids_to_mask(keep, 16) & ids_to_mask(at.flatten(1), 16)).any()


def test_contexts_are_large_enough_where_that_is_possible():
    torch.manual_seed(0)
    least = [min(jepa_masks(32, (14,14), least=l, draws=d)[0].shape[1] for _ in range(10)) for l, d in ((0., 1), (.3, 16))]
    assert least[0] < 0.3*196 <= least[1]


def test_the_centre_is_of_all_batches_of_a_step():
    c = Center(3, m=0.5).train()
    a, b = torch.randn(4,3), torch.randn(2,3)
    for t in (a, b): assert torch.allclose(c(t, 0.1), (t/0.1).softmax(1))  # used from the next step on
    c.step()
    assert torch.allclose(c.mean, torch.cat([a, b]).mean(0)/2, atol=1e-6)
    was = c.mean.clone()
    c.eval()(a, 0.1)
    c.step()
    assert torch.equal(c.mean, was)  # validation moves nothing


def test_gram_anchoring_counts_from_its_time_on():
    m = made('ibot', gram=1., koleo=0., gram_from=0.5)
    x = torch.rand(8,1,16,16)
    inputs, targets = m.pretext(x)
    pred = m(*inputs)
    plain = ibot_loss(*pred[:2], *targets[:2], 0.1)
    m.update(0.4)
    assert torch.equal(m.loss(pred, *targets), plain)
    m.update(0.5)
    assert torch.allclose(m.loss(pred, *targets), plain+gram_loss(pred[2], targets[2]))
    assert gram_loss(pred[2], targets[2]) > 0


@each
def test_what_hides_no_patches_is_refused(name):
    with pytest.raises(ValueError, match='try small_vit'): MAKE[name](create_encoder('small_cnn', INFO))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="centring must be .* got 'median'"): made('ibot', centring='median')
    with pytest.raises(ValueError, match='top must be between 1 and the number of blocks, 1, got 2'): Data2Vec(vit(), top=2)
    with pytest.raises(ValueError, match='hide all of 4 x 4 patches'): jepa_masks(4, (4,4), scale=(1.,1.))
    a, b = torch.zeros(2,4,3,5), torch.zeros(2,4,1,5)
    with pytest.raises(ValueError, match='pred and target must have the same shape'): jepa_loss(a, b)
    with pytest.raises(ValueError, match='beta must be a number above 0'): data2vec_loss(a[0], a[0], torch.zeros(4,1).long(), 0)
    with pytest.raises(ValueError, match='student and anchor must have the same shape'): gram_loss(a[0], b[0])
