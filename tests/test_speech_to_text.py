"CTC against sums over all alignments, beams against all texts, word errors by hand, sequences of digits, and fine-tuning"
import math
from collections import Counter
from itertools import groupby, product

import numpy as np
import pytest
import torch

from ssl_nb.core.encoders import create_encoder
from ssl_nb.data.spoken import AudioInfo, spoken_arrays
from ssl_nb.transfer.speech_to_text import (DIGITS, SpeechToText, beam_search, ctc_loss, digit_sequences, edit_distance, finetune_ctc, greedy, waves,
                                            word_errors)


def all_texts(logp):
    "Text -> probability, by all alignments"
    texts = Counter()
    for path in product(range(logp.shape[1]), repeat=len(logp)):
        text = tuple(k for k,_ in groupby(path) if k)
        texts[text] += math.exp(sum(row[k].item() for row,k in zip(logp, path)))
    return texts


def scores(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*2


# --- the loss ---

@pytest.mark.parametrize('y', [[1], [1,2], [2,2], [3,1,3], [1,1,2], [2,2,2]])
def test_ctc_is_the_sum_over_all_alignments(y):
    logits = scores(1,5,4).requires_grad_()
    loss = ctc_loss(logits, torch.tensor([5]), torch.tensor([y]))
    p = all_texts(logits[0].log_softmax(-1))[tuple(y)]
    assert loss.item()==pytest.approx(-math.log(p)/len(y), abs=1e-6)


def test_the_gradient_is_that_of_the_sum():
    logits,y = scores(1,4,3).requires_grad_(),(1,2)
    fast, = torch.autograd.grad(ctc_loss(logits, torch.tensor([4]), torch.tensor([y])), logits)
    p,total = logits[0].softmax(-1),0
    for path in product(range(3), repeat=4):
        if tuple(k for k,_ in groupby(path) if k)==y: total = total + math.prod(row[k] for row,k in zip(p, path))
    slow, = torch.autograd.grad(-total.log()/2, logits)
    assert torch.allclose(fast, slow, atol=1e-6)


def test_frames_of_the_padding_count_nothing():
    logits,y,frames = scores(2,6,4),torch.tensor([[1,2],[3,0]]),torch.tensor([6,3])
    other = logits.clone()
    other[1,3:] = 9.
    assert torch.equal(ctc_loss(logits, frames, y), ctc_loss(other, frames, y))
    single = [ctc_loss(logits[i:i+1,:n], torch.tensor([n]), y[i:i+1]) for i,n in enumerate((6,3))]
    assert torch.allclose(ctc_loss(logits, frames, y), torch.stack(single).mean())


@pytest.mark.parametrize('y,frames,words', [
    ([[1,2,3]], [2], 'at least 3 frames, and the sound has 2'), ([[2,2,2]], [4], 'at least 5 frames'), ([[4]], [5], 'labels y must be 1 to 3'),
    ([[1,0,2]], [5], r'then zeros; got \[1, 0, 2\]'), ([[-1]], [5], 'and -1 to -1'), ([[1],[2]], [5], 'as many transcripts')])
def test_what_cannot_be_said_is_refused(y, frames, words):
    with pytest.raises(ValueError, match=words): ctc_loss(scores(1,5,4), torch.tensor(frames), torch.tensor(y))


# --- decoding ---

@pytest.mark.parametrize('seed', range(4))
def test_a_wide_beam_finds_every_text_with_its_probability(seed):
    logp = scores(5,3,seed=seed).log_softmax(-1)
    found,truth = beam_search(logp, width=1000),all_texts(logp)
    assert {tuple(t) for t,_ in found}==set(truth)
    assert all(math.exp(v)==pytest.approx(truth[tuple(t)], abs=1e-9) for t,v in found)
    assert tuple(found[0][0])==truth.most_common(1)[0][0]
    assert sum(math.exp(v) for _,v in found)==pytest.approx(1)


def test_a_narrow_beam_keeps_the_best_beginnings():
    logp = scores(12,5,seed=3).log_softmax(-1)
    narrow,wide = beam_search(logp, width=4),beam_search(logp, width=400)
    assert len(narrow)==4 and [v for _,v in narrow]==sorted((v for _,v in narrow), reverse=True)
    assert narrow[0][1] <= wide[0][1]+1e-9
    with pytest.raises(ValueError, match='width must be at least 1, got 0'): beam_search(logp, width=0)


def test_greedy_drops_repeats_and_blanks():
    for path,text in (([0,1,1,0,1,2,2], [1,1,2]), ([0,0], []), ([3,3,3], [3]), ([1,2,1], [1,2,1])):
        assert greedy(torch.eye(4)[path])==text


def test_greedy_and_beam_differ_where_a_text_has_many_alignments():
    logp = torch.tensor([[0.6,0.4]]*2).log()
    assert greedy(logp)==[]
    text,value = beam_search(logp)[0]
    assert text==[1] and math.exp(value)==pytest.approx(0.64)


# --- word errors ---

@pytest.mark.parametrize('a,b,n', [('','',0), ('','abc',3), ('abc','',3), ('abc','abc',0), ('kitten','sitting',3), ('flaw','lawn',2), ('ab','ba',2)])
def test_edit_distance_by_hand(a, b, n): assert edit_distance(a, b)==edit_distance(b, a)==n


def test_word_errors_by_hand():
    assert word_errors(['one two', 'three'], ['one two', 'three'])==0
    assert word_errors(['', ''], ['one two', 'three'])==1
    assert word_errors(['one one one one'], ['two'])==4
    assert word_errors([['one','nine'], ['five']], ['one two three', 'five'])==pytest.approx(2/4)
    for guesses,truths in ((['one'], []), ([''], [''])):
        with pytest.raises(ValueError, match='as many guesses as truths'): word_errors(guesses, truths)


JIWER = [ # guesses, truths, jiwer.wer(truths, guesses) of jiwer 4.0.0
    (['four two five seven', 'one eight eight three', 'five two zero'], ['seven four two five', 'nine eight nine three', 'five two'], 0.5),
    (['five three four seven one seven', 'one eight', 'two five'], ['eight three seven seven', 'one', 'two eight one five zero'], 0.7),
    (['three nine one one', '', 'six eight five two'], ['zero six one one', 'eight', 'six eight five five two'], 0.4),
    (['six nine zero one', 'four five zero', 'zero zero eight four six'], ['six nine six zero one', 'six five', 'zero eight one six'], 0.454545),
    (['zero', '', 'one'], ['seven', 'eight three', 'one nine six'], 0.833333),
    (['nine', 'six six six five', 'one four seven seven eight'], ['two nine', 'six six five', 'one three seven eight zero'], 0.5)]


@pytest.mark.parametrize('guesses,truths,wer', JIWER)
def test_word_errors_of_jiwer(guesses, truths, wer): assert word_errors(guesses, truths)==pytest.approx(wer, abs=1e-6)


# --- the data ---

def test_sequences_are_takes_of_one_voice_one_after_the_other():
    x,y = digit_sequences(12, 'test', seed=3)
    assert x.dtype==torch.int16 and x.shape[:2]==(12,1) and y.shape==(12,4)
    clips,labels = spoken_arrays()['test']
    clips = clips[labels[:,0]>=0] # 20 words in 3 takes for each voice
    cut = [c[:np.flatnonzero(c)[-1]+1] for c in clips]
    for wave,digits in zip(x[:,0].numpy(), y):
        at,voices = 0,set()
        for d in digits[digits>0].tolist():
            here = [i for i,c in enumerate(cut) if (i%60)//3==d-1 and np.array_equal(wave[at:at+len(c)], c)]
            assert here, f'no take of {DIGITS[d-1]} at sample {at}'
            voices.add(here[0]//60); at += len(cut[here[0]])
        assert len(voices)==1 and not wave[at:].any()


def test_sequences_are_the_same_each_time_and_others_for_each_seed():
    (a,ya),(b,yb),(c,yc) = [digit_sequences(6, seed=s) for s in (0,0,1)]
    assert torch.equal(a, b) and torch.equal(ya, yb) and not torch.equal(ya, yc)
    n = (ya>0).sum(1)
    assert n.min()>=2 and all((row[:k]>0).all() and (row[k:]==0).all() for row,k in zip(ya, n))
    assert (digit_sequences(5, longest=6, shortest=6)[1]>0).all()


@pytest.mark.parametrize('kwargs,words', [
    (dict(part='dev'), "part must be 'train', 'valid' or 'test', got 'dev'"), (dict(n=0), 'n must be at least 1'), (dict(shortest=5), 'got 5 and 4'),
    (dict(shortest=0), 'got 0 and 4')])
def test_bad_sequences(kwargs, words):
    with pytest.raises(ValueError, match=words): digit_sequences(**dict(n=2) | kwargs)


def test_waves_are_as_long_as_the_longest_sound():
    x = torch.zeros(2,1,1000, dtype=torch.int16)
    x[0,0,99],x[1,0,330] = 5,-32768
    out = waves(x)
    assert out.shape==(2,1,480) and out.min()==-1 and torch.equal(waves(out), out)


# --- network and training ---

def network(seed=0):
    torch.manual_seed(seed)
    return SpeechToText(create_encoder('small_audio', AudioInfo('digits', length=12800), dim=64, depth=1, heads=2))


def test_a_transcript_does_not_depend_on_the_batch():
    x,y = digit_sequences(5, seed=0)
    model = network()
    finetune_ctc(model, x, y, steps=15)
    together = model.transcribe(x)
    assert together==[model.transcribe(o)[0] for o in x.split(1)]==model.transcribe(x, batch_size=2)
    assert all(set(t) <= set(DIGITS) for t in together)


def test_training_learns_and_is_the_same_each_time():
    x,y = digit_sequences(4, seed=0)
    runs = []
    for _ in range(2):
        model = network()
        losses = finetune_ctc(model, x, y, steps=80, lr=3e-3)
        runs.append((losses, model.state_dict()))
    assert runs[0][0]==runs[1][0] and all(torch.equal(a, b) for a,b in zip(runs[0][1].values(), runs[1][1].values()))
    assert losses[-1] < 0.5 < losses[20]
    assert word_errors(model.transcribe(x, width=4), [[DIGITS[k-1] for k in row if k] for row in y.tolist()]) < 0.2


def test_the_head_learns_alone_at_first():
    x,y = digit_sequences(4, seed=0)
    model = network()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    finetune_ctc(model, x, y, steps=4, warmup=4)
    changed = {k.split('.')[0] for k,v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed=={'head'} and all(p.requires_grad for p in model.parameters())
    finetune_ctc(model, x, y, steps=4, warmup=2)
    assert any(not torch.equal(v, before[k]) for k,v in model.encoder.state_dict(prefix='encoder.').items())


def test_an_encoder_without_order_in_time_is_refused():
    for name in ('small_mel_cnn', 'small_cnn'):
        info = AudioInfo('digits', length=12800)
        if name=='small_cnn': encoder = torch.nn.Linear(3,3)
        else: encoder = create_encoder(name, info)
        with pytest.raises(ValueError, match='encoder must have frames in the order of time'): SpeechToText(encoder)
