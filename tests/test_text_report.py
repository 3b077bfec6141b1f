"The report on text: bits, bytes, counters, few labels and pairs of sentences."
import json
import math
import types

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from ssl_nb.contrastive.simcse import SimCSE, set_dropout, simcse_loss
from ssl_nb.core.encoders import create_encoder
from ssl_nb.core.loader import DataInfo
from ssl_nb.core.method import get_method
from ssl_nb.data.running import letter_tokenizer
from ssl_nb.data.text import CLS, SEP, UNK, encode, text_dls, train_tokenizer
from ssl_nb.evaluate.text_report import (asked_bytes, bigram, count_words, label_scores, logits_of, looks_ahead, next_token_score, ranks, spearman,
                                         sts_score, text_report, unigram)

good = ['a fine film with fine acting', 'what a fine story', 'fine music and a fine end', 'the acting is fine']
bad = ['a dull film with dull acting', 'what a dull story', 'dull music and a dull end', 'the acting is dull']
texts, labels = (good+bad)*6, (['good']*4+['bad']*4)*6


def data(**kwargs): return text_dls(texts, labels, **dict(vocab_size=330, max_len=16, bs=8) | kwargs)


def test_uniform_is_the_logarithm_of_the_vocabulary():
    for V in (7, 300):
        s = next_token_score(lambda x: torch.full((*x.shape, V), 3.), torch.randint(5, V, (20, 9)))
        assert s['bits'] == pytest.approx(math.log2(V), rel=1e-5) and s['perplexity'] == pytest.approx(V, rel=1e-4)
        assert s['tokens']==20*8 and math.isnan(s['bits_per_byte'])


def test_a_model_that_is_certain_has_no_surprise_and_a_wrong_one_much():
    rows = torch.tensor([[CLS, 5, 6, 7, SEP], [CLS, 5, 6, 7, SEP]])
    def knows(x): # 5 after the beginning, then one more each time
        return torch.nn.functional.one_hot(torch.where(x==CLS, 5, (x+1).clamp(max=8)), 9)*50.
    assert next_token_score(knows, rows)['bits'] < 1e-6
    assert next_token_score(lambda x: knows(x).flip(2), rows)['bits'] > 20


def test_batches_do_not_change_the_score():
    rows = torch.randint(5, 30, (23, 9)) * (torch.arange(9)<torch.randint(3, 10, (23, 1)))
    f = unigram(rows, 30)
    a, b = [next_token_score(f, rows, bs=bs) for bs in (4, 23)]
    assert a['bits'] == pytest.approx(b['bits'], rel=1e-6) and a['tokens']==b['tokens']==int((rows[:, 1:]>4).sum())


def test_bytes_are_those_of_the_text():
    said = ['Über die Brücke', 'two words', '東京 🙂 ok']
    tok = train_tokenizer(said*2, 320)
    rows, of = encode(tok, said, 48)
    assert [asked_bytes(tok, r) for r in rows] == [len(t.lower().encode()) for t in said]
    letters = letter_tokenizer('abc é')
    ids = torch.tensor(letters.encode('aé bx', add_special_tokens=False).ids)
    assert ids[-1]==UNK and asked_bytes(letters, ids) == len('é b'.encode()) # the first is not asked for, x is unknown


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    "Two tokenizers and the model that knows nothing of either: its bits per byte are tokens times log V over bytes"
    for V in (300, 330):
        tok = train_tokenizer(texts, V)
        rows = encode(tok, texts, 32)[0].long()
        s = next_token_score(lambda x: torch.zeros(*x.shape, tok.get_vocab_size()), rows, tok)
        assert s['bytes']==sum(len(t) for t in texts)
        assert s['bits_per_byte'] == pytest.approx(math.log2(tok.get_vocab_size())*s['tokens']/s['bytes'], rel=1e-4)


def test_counters_are_distributions_and_beat_each_other_where_order_counts():
    seen = torch.arange(40*9).view(40, 9)%6 + 5 # each token is followed by the next of six
    uni, two = unigram(seen, 12), bigram(seen, 12)
    for f in (uni, two): assert torch.allclose(f(seen[:3]).exp().sum(2), torch.ones(3, 9), atol=1e-5)
    assert next_token_score(two, seen)['bits'] < 0.2 < 2 < next_token_score(uni, seen)['bits']
    assert two.k==1 # pairs tell all: lean on the shares as little as may be
    noise = torch.randint(5, 200, (40, 9), generator=torch.Generator().manual_seed(0))
    assert bigram(noise, 200).k==1000 # pairs tell nothing


def test_looking_ahead_is_found():
    info = DataInfo(kind='text', vocab_size=60, max_len=12)
    x = torch.randint(5, 60, (4, 12))
    gpt = get_method('gpt')
    one = gpt(create_encoder(gpt.default_encoder, info)).eval()
    assert not looks_ahead(logits_of(one), x) and not looks_ahead(logits_of(one.encoder), x)
    both = create_encoder('small_text', info).eval()
    assert looks_ahead(logits_of(both), x)
    with pytest.raises(ValueError, match='looks ahead'): next_token_score(both, x)
    was = one.train()
    next_token_score(one, x)
    assert was.training and was.encoder.training # the mode comes back


def test_gpt_score_is_its_loss():
    gpt = get_method('gpt')
    m = gpt(create_encoder(gpt.default_encoder, DataInfo(kind='text', vocab_size=60, max_len=12))).eval()
    x = torch.randint(5, 60, (8, 12))
    with torch.no_grad():
        inputs, targets = m.pretext(x)
        loss = m.loss(m(*inputs), *targets).item()
    assert next_token_score(m, x)['bits'] == pytest.approx(loss/math.log(2), rel=1e-4)


def test_labels_by_words():
    y = np.array([0]*4+[1]*4)
    for tfidf in (False, True):
        h, th = count_words(good+bad, ['fine fine', 'dull end', 'nothing known'], tfidf)
        assert h.shape[0]==8 and np.allclose(h.multiply(h).sum(1), 1)
        out = label_scores(h, y, th, [0, 1, -1], labels=(2, None), draws=3)
        assert out[None]==[100.] and len(out[2])==3
    want = LogisticRegression(C=1., max_iter=1000, tol=1e-8).fit(h, y).predict(th)
    assert label_scores(h, y, th, want, labels=(None,))[None]==[100.]
    with pytest.raises(ValueError, match='give more texts'): count_words(['one', 'two'], ['three'])


def test_ranks_are_scipys():
    rng = np.random.default_rng(1)
    for n in (2, 3, 50):
        a, b = rng.integers(0, 6, n)+np.arange(n)//2, rng.random(n)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert ranks([3, 1, 3]).tolist()==[2.5, 1, 2.5] and math.isnan(spearman([1, 1], [1, 2]))


def test_sts_score_takes_modules_and_functions():
    info = DataInfo(kind='text', vocab_size=60, max_len=12)
    enc = create_encoder('small_text', info)
    a, b = [torch.randint(5, 60, (30, 12)) for _ in range(2)]
    same = torch.cosine_similarity(enc.eval()(a), enc(b)).detach()
    assert sts_score(enc, a, b, same, bs=7) == pytest.approx(100) == sts_score(enc.forward, a, b, same)
    assert sts_score(enc, a, b, -same) == pytest.approx(-100)
    with pytest.raises(ValueError, match='30 and 29 sentences, and 30 scores'): sts_score(enc, a, b[1:], same)


def test_one_table():
    dls = data()
    t = text_report(dls, {'random': create_encoder('small_text', dls.info)}, labels=(None,), draws=1)
    assert t.index.tolist()==['every token alike', 'unigram', 'bigram', 'bag of words', 'tf-idf', 'random']
    assert t.loc['tf-idf', 'labels all']==100 and t['bits a token'].notna().sum()==3
    alone = text_dls(texts, vocab_size=330, max_len=16, bs=8)
    assert 'labels all' not in text_report(alone, labels=(None,))
    with pytest.raises(ValueError, match='see text_dls'): text_report(types.SimpleNamespace())


def test_simcse_is_cross_entropy_of_scaled_cosines():
    "The form of the released code: cosines of all pairs over the temperature, and the diagonal as the class"
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 5, dtype=torch.float64)
    sim = torch.cosine_similarity(a[:, None], b[None], dim=2)/0.05
    assert torch.allclose(simcse_loss(a, b), torch.nn.functional.cross_entropy(sim, torch.arange(9)))


def test_dropout_is_set_and_checked():
    enc = create_encoder('small_text', DataInfo(kind='text', vocab_size=60, max_len=12))
    x = torch.randint(5, 60, (4, 12))
    SimCSE(enc, drop=0.)
    assert torch.equal(enc(x), enc(x))
    SimCSE(enc, drop=0.1)
    assert not torch.allclose(enc(x), enc(x)) and torch.equal(enc.eval()(x), enc(x))
    assert {m.p for m in enc.modules() if isinstance(m, torch.nn.Dropout)}=={0.1} == {enc.blocks.layers[0].self_attn.dropout}
    for wrong in (1., -0.1):
        with pytest.raises(ValueError, match='from 0 to below 1'): SimCSE(enc, drop=wrong)
    with pytest.raises(ValueError, match='Linear has no dropout'): set_dropout(torch.nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match='temp'): SimCSE(enc, temp=0.)


def test_imdb_command_end_to_end(tmp_path):
    from ssl_nb.benchmarks.imdb import main, table
    for part in ('train', 'test'): pd.DataFrame(dict(label=[int(l=='good') for l in labels], rating=1, text=texts)).to_csv(tmp_path/f'{part}.csv', index=False)
    pd.DataFrame(dict(text=[f'{t} {i}' for i, t in enumerate(texts*2)])).to_csv(tmp_path/'unsup.csv', index=False)
    file = tmp_path/'out.json'
    main([str(tmp_path), '--seconds', '0.2', '--dim', '8', '--depth', '1', '--vocab_size', '330', '--max_len', '16', '--device', 'cpu', '--file', str(file)])
    out = json.loads(file.read_text())
    t = table(out)
    assert t.loc[('tf-idf', 'whole review'), 'all']==100 and out['config']['dim']==8
    assert {'BERT', 'GPT', 'BERT, untrained', 'GPT, untrained', 'bigram'} <= {r['row'] for r in out['runs']}
