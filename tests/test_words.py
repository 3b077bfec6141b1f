"Text with holes: what is hidden, how it looks, and what is asked. BERT, ELECTRA and text diffusion."
import itertools
import math

import pytest
import torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.loader import DataInfo
from ssl_nb.data.text import CLS, MASK, PAD, SEP, UNK
from ssl_nb.masked.bert import BERT
from ssl_nb.masked.bert_encoder import BertEncoder, load_bert, save_bert
from ssl_nb.masked.diffusion_text import MaskedDiffusion, diffusion_loss, hide_share, spread_shares
from ssl_nb.masked.electra import ELECTRA, electra_loss, rtd_loss, sample_tokens
from ssl_nb.masked.segments import sentence_pairs
from ssl_nb.masked.words import chosen, mask_tokens, mlm_loss

V = 40
INFO = DataInfo(kind='text', vocab_size=V, max_len=24)
METHODS = BERT, ELECTRA, MaskedDiffusion
MAKE = [(cls, kw) for cls in METHODS for kw in ({},)] + [(BERT, dict(pairs='next')), (BERT, dict(pairs='order')), (MaskedDiffusion, dict(ratio=0.5))]


def texts(n=64, low=3):
    "Rows `[CLS] words [SEP]` of all lengths"
    torch.manual_seed(0)
    x = torch.randint(5, V, (n, 24))
    length = torch.randint(low, 23, (n,))
    x[:, 0] = CLS
    for r, k in zip(x, length): r[k] = SEP; r[k+1:] = PAD
    return x


def method(cls, **kw):
    torch.manual_seed(0)
    return cls(create_encoder('small_text', INFO), **kw)


def chi2(counts, expected): return ((counts-expected)**2/expected).sum().item()


# what is chosen, and what stands there

def test_80_10_10_is_a_distribution_over_draws():
    "Shares of the three kinds within four standard deviations, and the random tokens alike often"
    torch.manual_seed(1)
    x = torch.randint(5, V, (4000, 24))
    seen, t = mask_tokens(x, p=0.25, vocab_size=V)
    mask = t != -100
    assert (mask.sum(1) == 6).all() # a quarter of 24 in every row
    n = mask.sum().item()
    other = (seen != MASK) & (seen != x) & mask
    for got, share in ((seen[mask] == MASK, 0.8), (other[mask], 0.1*34/35), ((seen == x)[mask], 0.1+0.1/35)): # a random token may be the old one
        assert abs(got.sum().item()-n*share) < 4*(n*share*(1-share))**0.5
    drawn = torch.bincount(seen[other], minlength=V).float()
    assert drawn[:5].sum() == 0 and chi2(drawn[5:], other.sum()/35) < 35+4*70**0.5
    places = mask.float().mean(0)
    assert (places-0.25).abs().max() < 4*(0.25*0.75/4000)**0.5 # no place is chosen more often than others


@pytest.mark.parametrize('p', [0.1, 0.3, 0.5, 0.9])
def test_share_of_each_row(p):
    x = texts()
    seen, t = mask_tokens(x, p=p, vocab_size=V)
    words = (x > MASK).sum(1)
    assert torch.equal((t >= 0).sum(1), (words*p).round().long().clamp(min=1))
    assert torch.equal(seen[t < 0], x[t < 0]) and (t[x <= MASK] == -100).all()


def test_special_tokens_can_be_others():
    x = texts()
    assert (mask_tokens(x, special=(CLS, SEP, 7), p=0.9)[1] == 7).sum() == 0
    assert (mask_tokens(x, special=(), p=0.9)[1] == CLS).any() # nothing is special but padding


def test_the_same_generator_gives_the_same_holes():
    x = texts()
    a, b = [mask_tokens(x, vocab_size=V, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_share_is_hidden_exactly_and_anywhere():
    "Text diffusion: whole words, rounded up; every pair of places as often as any other"
    x = texts()
    n = (x > MASK).sum(1)
    for k in (1, 2, 9):
        t = (k/n).clamp(max=1)
        assert torch.equal(hide_share(x, t)[0].sum(1), torch.minimum(n, torch.tensor(k)))
        assert torch.equal(hide_share(x, (t-0.5/n).clamp(min=1e-3))[0].sum(1), torch.minimum(n, torch.tensor(k)))
    hidden = hide_share(torch.full((20000, 6), 9), torch.full((20000,), 0.3))[0]
    pairs = torch.bincount((hidden*2**torch.arange(6)).sum(1), minlength=64)
    pairs = pairs[pairs > 0].float()
    assert len(pairs) == 15 and chi2(pairs, torch.tensor(20000/15)) < 14+4*28**0.5


def test_every_number_of_holes_is_as_likely():
    "With t uniform on (0,1] the number of holes is uniform on 1 to n"
    x = torch.full((8, 10), 9)
    k = torch.cat([hide_share(x, spread_shares(8))[0].sum(1) for _ in range(2500)])
    assert chi2(torch.bincount(k, minlength=11)[1:].float(), torch.tensor(2000.)) < 9+4*18**0.5


def test_shares_are_uniform_and_spread():
    t = torch.stack([spread_shares(7) for _ in range(4000)])
    assert (t > 0).all() and (t <= 1).all()
    assert chi2(torch.histc(t[:, 0], 10, 0, 1), torch.tensor(400.)) < 9+4*18**0.5
    assert torch.allclose(t.sort(1).values.diff(), torch.tensor(1/7), atol=1e-5)


def test_drawn_tokens_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 9)
    drawn = sample_tokens(logits.expand(1, 30000, 9), torch.rand(1, 30000))
    assert chi2(torch.bincount(drawn[0], minlength=9), 30000*logits.softmax(-1)[0, 0]) < 8+4*16**0.5
    ends = sample_tokens(logits, torch.tensor([[0.999999]])), sample_tokens(logits, torch.zeros(1, 1))
    assert ends[0].item() == 8 and ends[1].item() == 0


# no leak, and loss only where something is asked

@pytest.mark.parametrize('cls,kw', MAKE)
def test_no_leak(cls, kw):
    "Another word where [MASK] stands changes no input; where inputs must hold the text (ELECTRA), what the generator reads does not change"
    m, x = method(cls, **kw), texts(8, low=12)
    torch.manual_seed(5)
    inputs, targets = m.pretext(x)
    if cls is BERT and kw: # another word in the row is one in the pair
        rows = torch.cat([x, x])
        pairs = sentence_pairs(x, kw['pairs'])
        assert all(set(p.tolist())-{CLS, SEP, PAD} <= set(x.flatten().tolist()) for p in pairs[0])
        return
    seen = inputs[1] if cls is ELECTRA else inputs[0]
    holes = seen == MASK
    assert holes.any()
    other = torch.where(holes, (x-5+11) % 35+5, x) # another word wherever [MASK] will stand
    torch.manual_seed(5)
    again, new = m.pretext(other)
    assert torch.equal(again[1] if cls is ELECTRA else again[0], seen)
    assert all(torch.equal(a, b) for a, b in zip(inputs[1:] if cls is not ELECTRA else inputs[2:], again[1:] if cls is not ELECTRA else again[2:]))
    assert not torch.equal(targets[0], new[0]) # the question has changed


@pytest.mark.parametrize('cls', METHODS)
def test_prediction_uses_nothing_hidden(cls):
    "The scores of the holes are the same whatever was there, in ELECTRA those of the generator"
    m, x = method(cls).eval(), texts(8, low=12)
    torch.manual_seed(5)
    inputs, _ = m.pretext(x)
    holes = (inputs[1] if cls is ELECTRA else inputs[0]) == MASK
    other = torch.where(holes, (x-5+11) % 35+5, x)
    torch.manual_seed(5)
    again, _ = m.pretext(other)
    a, b = [m(*i)[0] if cls is ELECTRA else m(*i) for i in (inputs, again)]
    assert torch.equal(a, b)


def test_loss_only_where_asked():
    torch.manual_seed(0)
    s, t = torch.randn(3, 5, V), torch.randint(5, V, (3, 5))
    t[0, 2:] = -100
    other = s.clone()
    other[0, 2:] = torch.randn(3, V)*50
    assert mlm_loss(s, t) == mlm_loss(other, t)
    logits, replaced = torch.randn(3, 9), torch.randint(0, 2, (3, 9))
    replaced[1, 4:] = -100
    changed = logits.clone()
    changed[1, 4:] = 99.
    assert rtd_loss(logits, replaced) == rtd_loss(changed, replaced)
    assert electra_loss(s, t, logits, replaced) == electra_loss(other, t, changed, replaced)
    assert rtd_loss(logits, torch.full((3, 9), -100)) == 0


@pytest.mark.parametrize('cls', METHODS)
def test_other_words_that_are_not_asked_change_no_target(cls):
    "BERT and diffusion ask about holes only: another word elsewhere gives another input and the same target"
    m, x = method(cls), texts(8, low=12)
    torch.manual_seed(5)
    inputs, targets = m.pretext(x)
    seen = inputs[1] if cls is ELECTRA else inputs[0]
    first = x[:, 1] # a word of each row, never the same as its replacement
    other = x.clone()
    other[:, 1] = (first-5+3) % 35+5
    torch.manual_seed(5)
    _, new = m.pretext(other)
    asked = seen[:, 1] == MASK if cls is not BERT else ((inputs[1] == 1) & (targets[0] >= 0)).any(1)
    assert not asked.all()
    if cls is MaskedDiffusion: targets, new = [torch.zeros(x.shape).long().masked_scatter(seen == MASK, o[0])[:, 2:] for o in (targets, new)]
    else: targets, new = [o[0][~asked] for o in (targets, new)]
    assert torch.equal(targets, new)


# losses against their loops

def test_losses_against_loops():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 7, requires_grad=True), torch.tensor([[1, -100, 4], [6, 0, -100]])
    logits, replaced = torch.randn(2, 5, requires_grad=True), torch.tensor([[0, 1, 0, -100, -100], [1, 0, 0, 0, -100]])
    s, logits = s.detach(), logits.detach()
    mlm = [-math.log(math.exp(s[b, i, t[b, i]])/sum(math.exp(o) for o in s[b, i])) for b in range(2) for i in range(3) if t[b, i] >= 0]
    said = lambda b, i: 1/(1+math.exp(-logits[b, i]))
    rtd = [-math.log(said(b, i) if replaced[b, i] else 1-said(b, i)) for b in range(2) for i in range(5) if replaced[b, i] >= 0]
    loops = sum(mlm)/len(mlm), sum(rtd)/len(rtd)
    assert mlm_loss(s, t).item() == pytest.approx(loops[0], abs=1e-5) and rtd_loss(logits, replaced).item() == pytest.approx(loops[1], abs=1e-5)
    assert electra_loss(s, t, logits, replaced, lam=3.).item() == pytest.approx(loops[0]+3*loops[1], abs=1e-4)
    share = torch.tensor([0.5, 0.5, 0.25])
    cost = sum(-math.log(math.exp(s[0, i, v])/sum(math.exp(o) for o in s[0, i]))/w for i, (v, w) in enumerate(zip((3, 2, 6), share.tolist())))
    assert diffusion_loss(s[0], torch.tensor([3, 2, 6]), share, torch.tensor(8)).item() == pytest.approx(cost/8, abs=1e-5)


def test_losses_say_what_does_not_fit():
    with pytest.raises(ValueError, match='logits and targets must have the same shape'): mlm_loss(torch.randn(2, 3, 7), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match='logits and replaced'): rtd_loss(torch.randn(2, 3), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match='targets and t'): diffusion_loss(torch.randn(4, 7), torch.zeros(4).long(), torch.ones(3), torch.tensor(3))


# text diffusion as a model of language

@pytest.fixture(scope='module')
def tiny():
    "A network for texts of three tokens out of four (5 to 8), all its answers, and the probability of every text"
    torch.manual_seed(0)
    m = MaskedDiffusion(create_encoder('small_text', DataInfo(kind='text', vocab_size=9, max_len=5), dim=8))
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p)*0.7)
    m.eval()
    every = list(itertools.product((5, 6, 7, 8), repeat=3))
    seen = list(itertools.product((5, 6, 7, 8, MASK), repeat=3))
    x = torch.tensor([[CLS, *s, SEP] for s in seen])
    with torch.no_grad(): h = m(x, torch.arange(x.numel())).view(len(x), 5, -1)[:, 1:4].log_softmax(-1)
    log = {s: h[i] for i, s in enumerate(seen)}
    def surprise(text, order):
        now, total = [MASK]*3, 0.
        for i in order:
            total -= log[tuple(now)][i, text[i]].item()
            now[i] = text[i]
        return total
    orders = list(itertools.permutations(range(3)))
    paid = {t: [surprise(t, o) for o in orders] for t in itertools.product(range(9), repeat=3) if set(t) <= {1, 5, 6, 7, 8} and 1 not in t}
    return m, every, paid


def test_special_tokens_are_never_written(tiny):
    m = tiny[0]
    p = m(torch.tensor([[CLS, MASK, MASK, MASK, SEP]]), torch.tensor([1, 2, 3])).softmax(-1)
    assert (p[:, [PAD, CLS, SEP, MASK]] == 0).all() and torch.allclose(p.sum(1), torch.ones(3))


def test_bound_is_the_mean_over_orders_and_above_the_surprise(tiny):
    m, every, paid = tiny
    x = torch.tensor([[CLS, *t, SEP] for t in every[::7]])
    g = torch.Generator().manual_seed(0)
    got, n = m.surprise(x.repeat(400, 1), draws=6, generator=g)
    assert (n == 3).all()
    got = got.view(400, -1)
    for i, t in enumerate(every[::7]):
        mean = sum(paid[t])/6
        assert abs(got[:, i].mean()-mean) < 5*got[:, i].std()/20+1e-4
        assert mean >= -math.log(sum(math.exp(-s) for s in paid[t])/6)


def test_training_loss_has_the_same_mean(tiny):
    m, every, paid = tiny
    text = every[11]
    x = torch.tensor([[CLS, *text, SEP]]).repeat(4000, 1)
    torch.manual_seed(0)
    with torch.no_grad(): losses = torch.stack([(lambda i, t: m.loss(m(*i), *t))(*m.pretext(x)) for _ in range(8)])
    assert abs(3*losses.mean()-sum(paid[text])/6) < 0.03


def test_writing_one_by_one_draws_from_the_model(tiny):
    "Frequencies of texts written in random order against their exact probabilities"
    m, every, paid = tiny
    torch.manual_seed(0)
    wrote = m.generate(torch.tensor([[CLS, MASK, MASK, MASK, SEP]]).repeat(20000, 1))[:, 1:4]
    assert (wrote >= 1).all() and ((wrote == UNK) | (wrote > MASK)).all()
    p = torch.tensor([sum(math.exp(-s) for s in paid[t])/6 for t in every])
    counts = torch.tensor([(wrote == torch.tensor(t)).all(1).sum().item() for t in every]).float()
    often = 20000*p > 5
    assert often.sum() > 10
    assert chi2(counts[often], 20000*p[often]) < often.sum()+4*(2*often.sum())**0.5


def test_generate_fills_holes_and_nothing_else(tiny):
    m = tiny[0]
    x = torch.tensor([[CLS, MASK, 6, MASK, SEP], [CLS, 7, MASK, 5, SEP]])
    for kw in (dict(), dict(steps=1), dict(order='confidence'), dict(temp=0.), dict(steps=99, temp=0.3)):
        new = m.generate(x, **kw)
        assert torch.equal(new[x != MASK], x[x != MASK]) and not (new == MASK).any()
    assert torch.equal(m.generate(x, temp=0., order='confidence'), m.generate(x, temp=0., order='confidence'))


# bad input

def test_bad_input(tiny):
    m, x = tiny[0], texts(4)
    for p, says in ((0, 'hides nothing'), (-1, 'hides nothing'), (1, 'hides everything'), (2., 'hides everything')):
        with pytest.raises(ValueError, match=says): mask_tokens(x, p=p)
        for cls in (BERT, ELECTRA):
            with pytest.raises(ValueError, match=f'ratio={p} {says}'): method(cls, ratio=p)
    with pytest.raises(ValueError, match='ratio=0: a share to hide is above 0'): method(MaskedDiffusion, ratio=0)
    with pytest.raises(ValueError, match='above 0 and at most 1, got 0 to 0'): hide_share(x, torch.zeros(4))
    with pytest.raises(ValueError, match='at least one round'): m.generate(3, steps=0)
    with pytest.raises(ValueError, match='at least one to write'): m.generate(0)
    with pytest.raises(ValueError, match="take 'random' or 'confidence'"): m.generate(3, order='best')
    with pytest.raises(ValueError, match='temperature is at least 0'): m.generate(3, temp=-1)
    with pytest.raises(ValueError, match='has no .MASK.'): m.generate(torch.tensor([[CLS, 5, SEP]]))
    with pytest.raises(ValueError, match='needs a tokenizer'): m.generate('a [MASK]')
    with pytest.raises(ValueError, match='at most 5'): m.generate(10)
    image = create_encoder('small_cnn', DataInfo(channels=1, size=8, mean=[0.5], std=[0.5]))
    for cls in METHODS:
        with pytest.raises(ValueError, match='no token embedding'): cls(image)


@pytest.mark.parametrize('cls,kw', MAKE)
def test_texts_without_any_word(cls, kw):
    "Nothing is asked, the loss is 0 or that of the words that are, and all gradients are finite"
    m = method(cls, **kw)
    x = torch.tensor([[CLS, SEP]+[0]*22, [0]*24, [CLS, UNK, SEP]+[0]*21])
    inputs, targets = m.pretext(x)
    loss = m.loss(m(*inputs), *targets)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


# pairs of segments

@pytest.mark.parametrize('kind', ['next', 'order'])
def test_pairs_against_a_loop(kind):
    x = texts(40)
    torch.manual_seed(2)
    rows, second, right = sentence_pairs(x, kind)
    for i, r in enumerate(x.tolist()):
        words = [t for t in r if t not in (CLS, SEP, PAD)]
        before = [t for t in x[i-1].tolist() if t not in (CLS, SEP, PAD)]
        half = lambda w: max(0, (len(w)-1)//2)
        n = min(half(words), half(before)) if kind == 'next' else half(words)
        n = min(n, 10) # of 24 places three are [CLS] and two [SEP]
        a, b = words[half(words)-n:half(words)], words[half(words):half(words)+n]
        if right[i] == 0: a, b = (a, before[half(before):half(before)+n]) if kind == 'next' else (b, a)
        assert rows[i].tolist() == [CLS, *a, SEP, *b, SEP]+[PAD]*(21-2*n)
        assert second[i].tolist() == [False]*(n+2)+[True]*(n+1)+[False]*(21-2*n)
        assert (right[i] == -100) == (n == 0)


def test_pairs_are_right_half_of_the_time():
    right = sentence_pairs(texts(4000, low=8), 'next')[2]
    assert set(right.tolist()) == {0, 1} and abs(right.float().mean()-0.5) < 4*0.5/4000**0.5


def test_second_segment_is_marked_and_the_encoder_left_as_it_was():
    m = method(BERT, pairs='order').eval()
    x = texts(4, low=12)
    rows, second, _ = sentence_pairs(x, 'order')
    plain = m.encoder.forward_features(rows)
    with torch.no_grad(): m.two.segment.zero_()
    assert torch.equal(m.two.tokens(m.encoder, rows, second), plain)
    with torch.no_grad(): m.two.segment.fill_(0.3).mul_(torch.randn(64))
    assert not torch.allclose(m.two.tokens(m.encoder, rows, second), plain, atol=1e-3)
    assert torch.equal(m.encoder.forward_features(rows), plain) and not m.encoder.embedding._forward_hooks


# the published layout

def by_formula():
    "A small BERT encoder whose weights need no file"
    enc = BertEncoder(12, 8, 16, 2, 4, 24)
    with torch.no_grad():
        for name, p in enc.named_parameters():
            wave = (torch.arange(p.numel(), dtype=torch.float64)*0.7+len(name)).sin().float().view(p.shape)
            p.copy_(0.3*wave+(1 if 'norm' in name and name.endswith('weight') else 0))
    return enc.eval()


ROWS = torch.tensor([[2, 7, 9, 11, 3, 8, 6, 3], [2, 5, 10, 3, 0, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0]*8])


def test_hidden_states_are_those_of_transformers(tmp_path):
    "Values of `BertModel` of transformers 5.24 with the same weights, read from the folder that `save_bert` writes"
    save_bert(by_formula(), tmp_path)
    enc = load_bert(tmp_path)
    with torch.no_grad(): h = enc.forward_features(ROWS, segment=SEGMENTS)
    with_segments = [2.4468112, 0.4764725, -0.0723974, 0.1918766, -0.1320483]
    with_padding = [2.0010536, 1.1715571, -0.3097548, -0.5188091, 0.1885539]
    pooled = [[0.9859685, -0.9725948, -0.9985117], [0.9863030, -0.9836270, -0.9988240]]
    for got, want in ((h[0, 1, :5], with_segments), (h[1, 3, :5], with_padding), (enc.pooled(h)[:, :3], pooled)):
        assert torch.allclose(got, torch.tensor(want), atol=1e-4)


def test_bert_folder_there_and_back(tmp_path):
    enc = by_formula()
    save_bert(enc, tmp_path/'a')
    again = load_bert(tmp_path/'a')
    assert again.args == enc.args and all(torch.equal(a, b) for a, b in zip(enc.state_dict().values(), again.state_dict().values()))


def test_bert_folder_that_does_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file
    with pytest.raises(FileNotFoundError, match='no config.json'): load_bert(tmp_path)
    save_bert(by_formula(), tmp_path)
    file = tmp_path/'model.safetensors'
    weights = load_file(file)
    key = 'encoder.layer.1.attention.self.key.weight'
    save_file({k: v for k, v in weights.items() if k != key}, file)
    with pytest.raises(ValueError, match='blocks.layers.1.self_attn.in_proj_weight .*missing'): load_bert(tmp_path)
    save_file({('bert.'+k).replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v
               for k, v in weights.items() if not k.startswith('pooler')}, file) # names of old folders, and no pooler
    old = load_bert(tmp_path)
    with torch.no_grad(): assert torch.equal(old(ROWS), by_formula()(ROWS))


def test_bert_encoder_is_an_encoder():
    enc = create_encoder('bert', INFO, dim=16, depth=1).eval()
    x = texts(20, low=12)
    with torch.no_grad():
        h, real = enc.tokens(x)
        assert torch.equal(real, x != PAD) and torch.allclose(enc(x), (h*real[..., None]).sum(1)/real.sum(1, keepdim=True), atol=1e-6)
        short = x[(x != PAD).sum(1) <= 16]
        assert len(short) and torch.allclose(enc(short[:, :16]), enc(short), atol=1e-5) # padding is nothing
        some = torch.tensor([[0, 3, 5]]).repeat(20, 1)
        assert enc.tokens(x, some)[0].shape == (20, 3, 16)
    for cls in METHODS:
        m = cls(enc.train())
        inputs, targets = m.pretext(x)
        m.loss(m(*inputs), *targets).backward()
        assert enc.positions.grad is not None
