"Few labels for texts: tf-idf by loops, the same draws for every row, refusals, and a word that decides the class is learned"
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.data.text import text_dls
from ssl_nb.transfer.text_tasks import mean_and_spread, text_rows, tfidf_features


def test_tfidf_is_what_loops_give():
    texts,other = ['my card is lost my card', 'my card is late', 'exchange rate'], ['late card of nobody']
    n = Counter(w for t in texts for w in set(t.split()))
    words = sorted(n)
    rows = []
    for t in texts+other:
        v = [(1+math.log(t.split().count(w)))*(1+math.log((1+3)/(1+n[w]))) if w in t.split() else 0. for w in words]
        rows.append(np.array(v)/np.linalg.norm(v))
    a,b = tfidf_features(texts, other, ngrams=1)
    assert np.allclose(np.vstack([a.toarray(), b.toarray()]), rows, atol=1e-12)
    assert tfidf_features(texts)[0].shape[1]>len(words) # pairs of words, too


@pytest.mark.parametrize('args,words', [((['a', '  '],), r'train\[1\] is an empty text'), ((['a'], ['b', '']), r'others\[0\]\[1\]'),
                                        ((['a', None],), r'train\[1\]')])
def test_empty_texts_are_named(args, words):
    with pytest.raises(ValueError, match=words): tfidf_features(*args)


@pytest.fixture(scope='module')
def dls():
    rng = np.random.default_rng(0)
    fill = 'one two three four five six seven eight nine ten'.split()
    y = rng.integers(2, size=300)
    texts = [' '.join([*rng.choice(fill, 5), ('good','bad')[c], *rng.choice(fill, 3)]) for c in y]
    torch.manual_seed(0)
    return text_dls(texts, [('fine','poor')[c] for c in y], vocab_size=400, max_len=16, bs=32, device='cpu')


def test_every_row_learns_the_word_that_decides_and_repeats(dls):
    torch.manual_seed(0)
    encs = {'random': create_encoder('small_text', dls.info, dim=16)}
    before = {k: v.clone() for k,v in encs['random'].state_dict().items()}
    rows = text_rows(encs, dls, labels=(4,40), draws=2, epochs=10, lr=5e-3)
    t = mean_and_spread(rows)
    assert t.index.tolist()==['tf-idf','random, probe','random, fine-tuned','from scratch, all labels']
    assert t.columns.tolist()==['4 a class','40 a class','all']
    df = pd.DataFrame(rows)
    best = df.groupby('row').accuracy.max()
    assert best['tf-idf']>95 and best['random, fine-tuned']>80 and best['from scratch, all labels']>90
    assert all(torch.equal(v, before[k]) for k,v in encs['random'].state_dict().items())
    again = text_rows(encs, dls, labels=(4,), draws=1, epochs=2)
    assert again==text_rows(encs, dls, labels=(4,), draws=1, epochs=2)


def test_too_few_labels_are_named(dls):
    torch.manual_seed(0)
    encs = {'random': create_encoder('small_text', dls.info, dim=16)}
    with pytest.raises(ValueError, match='fine has|poor has'): text_rows(encs, dls, labels=(1000,), draws=1, epochs=1)
