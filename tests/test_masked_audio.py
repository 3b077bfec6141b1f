"Sound with holes: which frames are hidden, what is asked there, and what a padded frame may change (nothing). wav2vec 2.0 and BEST-RQ."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ssl_nb.data.sound_encoders import FrameEncoder
from ssl_nb.masked.best_rq import BESTRQ, best_rq_loss, random_codes
from ssl_nb.masked.frames import FrameMethod, mel_frames, perplexity, span_mask
from ssl_nb.masked.wav2vec2 import GumbelQuantizer, Wav2Vec2, contrast_scores, diversity_loss, draw_distractors, wav2vec2_loss

N, HOP = 30, 160


def sounds(B=6, seed=0):
    "Noise of different length, zeros after it; the first is full, the last one frame long"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 1, N*HOP, generator=g)*1.6-0.8
    for i in range(1, B): x[i, :, max(HOP, N*HOP*(B-1-i)//(B-1)):] = 0
    return x


def method(cls, front='mel', **kw):
    torch.manual_seed(0)
    return cls(FrameEncoder(8000, N*HOP, dim=16, depth=1, heads=2, front=front), **kw)


# spans

@pytest.mark.parametrize('p, span', [(0.065, 10), (0.02, 4), (0.15, 5), (0.3, 1)])
def test_spans_have_the_expected_share_and_length(p, span):
    "As many starts as p says, without replacement: the share that no start reaches, and the mean run, of long rows"
    torch.manual_seed(0)
    m = span_mask(200, 1000, p, span)
    seen = (1-p)**span
    assert abs(m.float().mean().item()-(1-seen)) < 0.012
    runs = (m & ~F.pad(m, (1, 0))[:, :-1]).sum()
    assert abs((m.sum()/runs).item()/((1-seen)/(p*seen))-1) < 0.03


def test_span_mask_by_loops():
    "The union of spans from drawn starts: each row is one of the masks that k starts can make, and all of these occur"
    torch.manual_seed(0)
    n, span, k = 7, 2, 2
    possible = set()
    for starts in itertools.combinations(range(n), k):
        row = [0]*n
        for s in starts:
            for j in range(s, min(s+span, n)): row[j] = 1
        possible.add(tuple(row))
    got = {tuple(r) for r in span_mask(3000, n, k/n, span).int().tolist()}
    assert got == possible


def test_rows_hide_only_what_is_real():
    torch.manual_seed(0)
    real = torch.arange(40) < torch.tensor([[40], [25], [11], [10], [3], [0]])
    many = torch.stack([span_mask(6, 40, real=real) for _ in range(100)])
    assert not (many & ~real).any()
    assert many[:, :3].any(2).all() and not many[:, 3:].any()


def test_generator_decides():
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(span_mask(4, 50, generator=g()), span_mask(4, 50, generator=g()))


# mel frames

def test_mel_frames_are_normalised_where_real_and_blind_to_padding():
    x = sounds()
    m, real = mel_frames(x, 8000)
    assert m.shape == (6, N, 80) and (m[~real] == 0).all()
    first = m[0].view(-1, 40)
    assert first.mean(0).abs().max() < 1e-4 and (first.std(0)-0.9).abs().max() < 0.15 # 0.1 is added to the deviation
    longer = F.pad(x, (0, 10*HOP))
    again, _ = mel_frames(longer, 8000)
    inside = mel_frames(x, 8000)[1].clone()
    inside[:, -1] = False # the last window of the full clip is cut by the end of the batch
    torch.testing.assert_close(again[:, :N][1:][inside[1:]], m[1:][inside[1:]], rtol=1e-3, atol=1e-3)


# methods

@pytest.mark.parametrize('cls', [BESTRQ, Wav2Vec2])
@pytest.mark.parametrize('front', ['mel', 'wave'])
def test_padding_changes_nothing(cls, front):
    "A batch that is padded further: the same predictions at the same hidden frames"
    m, x = method(cls, front).eval(), sounds()[1:]
    (x, mask), _ = m.pretext(x)
    longer, wider = F.pad(x, (0, 8*HOP)), F.pad(mask, (0, 8))
    a, b = m(x, mask), m(longer, wider)
    for u, v in zip(*[p if isinstance(p, tuple) else (p,) for p in (a, b)]): torch.testing.assert_close(u, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('cls', [BESTRQ, Wav2Vec2])
def test_what_is_hidden_does_not_reach_the_prediction(cls):
    "No gradient of a prediction at the local features of hidden frames; with BEST-RQ none of the loss either"
    m, x = method(cls), sounds(3)
    (x, mask), targets = m.pretext(x)
    h = m.encoder.frames(x).detach().requires_grad_()
    m.hidden_features(x, mask, h).pow(2).sum().backward()
    assert (h.grad[mask] == 0).all() and h.grad[~mask & m.encoder.real(x)].abs().sum() > 0


@pytest.mark.parametrize('cls', [BESTRQ, Wav2Vec2])
def test_the_loss_is_taken_at_hidden_frames_only(cls):
    m, x = method(cls), sounds()
    (x, mask), targets = m.pretext(x)
    pred = m(x, mask)
    for p in pred if isinstance(pred, tuple) else (pred,): assert len(p) == mask.sum()
    if cls is BESTRQ: assert torch.equal(targets[0], m.labels(x)[mask])


@pytest.mark.parametrize('cls', [BESTRQ, Wav2Vec2])
def test_too_short_for_a_question(cls):
    "A batch in which nothing can be hidden: a loss that is a number, and gradients that are no NaN"
    m = method(cls)
    x = sounds()
    x[:, :, 3*HOP:] = 0 # shorter than a span
    inputs, targets = m.pretext(x)
    loss = m.loss(m(*inputs), *targets)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is None or torch.isfinite(p.grad).all() for p in m.parameters())
    assert all(math.isfinite(float(v)) for v in m.metrics(m(*inputs), *targets).values())


@pytest.mark.parametrize('cls', [BESTRQ, Wav2Vec2])
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match='p=1.5 must be a share'): method(cls, p=1.5)
    with pytest.raises(ValueError, match='span=0 must be a whole number'): method(cls, span=0)
    with pytest.raises(ValueError, match='would hide all 4 frames'): method(cls).pretext(torch.rand(2, 1, 4*HOP))
    with pytest.raises(ValueError, match='Linear has no frames'): cls(torch.nn.Linear(3, 3))


# BEST-RQ

def test_random_codes_are_the_nearest_normalised_codes():
    torch.manual_seed(0)
    x, A, codes = torch.randn(40, 12), torch.randn(12, 5), torch.randn(30, 5)
    z = F.normalize(x @ A, dim=1)
    far = [[(z[i]-F.normalize(c, dim=0)).norm().item() for c in codes] for i in range(40)]
    assert random_codes(x, A, codes).tolist() == [min(range(30), key=f.__getitem__) for f in far]
    with pytest.raises(ValueError, match='A must be'): random_codes(x, A.T, codes)


def test_best_rq_keeps_its_dice():
    "Projection and books are state without gradient: saved, the same for all batches, another for another seed"
    m = method(BESTRQ)
    assert {'A', 'book'} <= set(m.state_dict()) and not {'A', 'book'} & {n for n, _ in m.named_parameters()}
    other = method(BESTRQ)
    other.A.add_(torch.randn_like(other.A))
    assert not torch.equal(m.labels(sounds()), other.labels(sounds()))
    other.load_state_dict(m.state_dict())
    assert torch.equal(m.labels(sounds()), other.labels(sounds()))


def test_best_rq_loss_by_loops():
    torch.manual_seed(0)
    logits, codes = torch.randn(5, 3, 4, requires_grad=True), torch.randint(4, (5, 3))
    loops = sum(-torch.log(logits[i, g].exp()[codes[i, g]]/logits[i, g].exp().sum()) for i in range(5) for g in range(3))/15
    a, b = [torch.autograd.grad(f, logits)[0] for f in (best_rq_loss(logits, codes), loops)]
    torch.testing.assert_close(best_rq_loss(logits, codes), loops)
    torch.testing.assert_close(a, b)


# wav2vec 2.0

def test_distractors_are_other_hidden_frames_of_the_clip_and_all_alike_often():
    torch.manual_seed(0)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, 2:7] = mask[1, 4:6] = mask[3, [0, 3, 11]] = True
    drawn, row = draw_distractors(mask, 3000), mask.nonzero()[:, 0]
    for i, d in enumerate(drawn):
        others = [j for j in range(len(row)) if row[j] == row[i] and j != i]
        share = torch.bincount(d, minlength=len(row)).float()/3000
        assert set(d.tolist()) == set(others)
        assert (share[others]-1/len(others)).abs().max() < 4*(1/len(others)/3000)**0.5


def test_a_lonely_hidden_frame_asks_nothing():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = mask[1, 3] = True
    drawn = draw_distractors(mask, 4)
    assert drawn[0].tolist() == [0]*4
    c, q = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.isinf(contrast_scores(c, q, drawn)[0, 1:]).all()


def test_wav2vec2_loss_by_loops_and_without_equal_codes():
    torch.manual_seed(0)
    c, q = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    with torch.no_grad(): q[3] = q[0]
    others = torch.tensor([[1, 3, 2], [0, 2, 2], [4, 5, 0], [0, 0, 1], [5, 1, 2], [4, 3, 0]])
    sim = lambda a, b: (a @ b)/a.norm()/b.norm()/0.1
    total = 0
    for t in range(6):
        candidates = [q[t]] + [q[j] for j in others[t].tolist() if not torch.equal(q[j], q[t])]
        total = total - torch.log(sim(c[t], q[t]).exp()/sum(sim(c[t], k).exp() for k in candidates))
    torch.testing.assert_close(wav2vec2_loss(c, q, others), total/6)
    for v in (c, q):
        a, b = [torch.autograd.grad(f, v, retain_graph=True)[0] for f in (wav2vec2_loss(c, q, others), total/6)]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gumbel_quantizer_is_torchs_gumbel_softmax():
    "Same noise: same choice and same gradients as torch.nn.functional.gumbel_softmax with hard=True"
    torch.manual_seed(0)
    gq = GumbelQuantizer(5, out=6, groups=2, entries=7, temp=0.7)
    z = torch.randn(4, 3, 5, requires_grad=True)
    torch.manual_seed(1)
    code, p, number = gq(z)
    torch.manual_seed(1)
    l = gq.scores(z).unflatten(-1, (2, 7))
    theirs = torch.einsum('bngv,gvd->bngd', F.gumbel_softmax(l, tau=0.7, hard=True), gq.codes).flatten(-2)
    torch.testing.assert_close(code, theirs)
    for v in (z, gq.codes, gq.scores.weight):
        a, b = [torch.autograd.grad(o.pow(2).sum(), v, retain_graph=True)[0] for o in (code, theirs)]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p, l.softmax(-1))
    gq.eval()
    assert torch.equal(gq(z)[2], l.argmax(-1)) and torch.equal(gq(z)[2], gq(z)[2])


def test_one_choice_is_one_code_to_the_last_bit():
    "What is left out as a distractor is compared exactly: rounding in the straight-through choice must not part two frames"
    torch.manual_seed(0)
    gq = GumbelQuantizer(8, groups=2, entries=3).train()
    code, _, number = gq(torch.randn(300, 8))
    same = (number[:, None] == number[None]).all(-1)
    assert same.sum() > 3000
    assert torch.equal(same, (code[:, None] == code[None]).all(-1))


def test_diversity_is_the_authors_form():
    "fairseq: (number of vectors - perplexity)/number of vectors, perplexity summed over the books"
    torch.manual_seed(0)
    p = torch.randn(50, 2, 9).mul(3).softmax(-1)
    avg = p.mean(0)
    ppl = torch.exp(-torch.sum(avg*torch.log(avg+1e-7), dim=-1)).sum()
    torch.testing.assert_close(diversity_loss(p), (18-ppl)/18, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diversity_loss(p.view(5, 10, 2, 9)), diversity_loss(p))
    even = perplexity(torch.full((2, 9), 1/9))
    torch.testing.assert_close(even, torch.full((2,), 9.))


def test_codes_learn_and_the_temperature_falls():
    "Each part of the quantizer and the local features get gradient from the contrastive loss; the temperature is state"
    m, x = method(Wav2Vec2, diversity=0.), sounds()
    (x, mask), (others,) = m.pretext(x)
    m.loss(m(x, mask), others).backward()
    for name, p in m.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, name
    temps = []
    for pct in (0., 0.5, 1.):
        m.update(pct)
        temps.append(m.quantizer.temp.item())
    assert temps == pytest.approx([2., 1., 0.5])
    other = method(Wav2Vec2)
    other.load_state_dict(m.state_dict())
    assert other.quantizer.temp.item() == pytest.approx(0.5)


def test_span_mask_is_offered_by_wav2vec2():
    from ssl_nb.masked import wav2vec2
    assert wav2vec2.span_mask is span_mask and issubclass(Wav2Vec2, FrameMethod)
