"Bad input for text: each message names the file or argument."
import gzip, json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ssl_nb.core.loader import DataInfo
from ssl_nb.core.encoders import create_encoder
from ssl_nb.data.text import CLS, MASK, PAD, SEP, UNK, decode, encode, read_texts, text_dls, train_tokenizer
from ssl_nb.masked.bert import BERT, corrupt, mlm_loss

words = 'the quick brown fox jumps over the lazy dog while seven wizards quietly mix a large box of jade paint'.split()
texts = [' '.join(np.random.default_rng(i).permutation(words)) for i in range(40)]
labels = ['even' if i%2==0 else 'odd' for i in range(40)]
small = dict(vocab_size=80, max_len=16, bs=4)

def table(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return path

def sizes(dls): return [dl.n for dl in dls.loaders]

def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): text_dls(tmp_path/'nowhere')

def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=f'no texts in .*{tmp_path.name}: looked for .*.txt, found nothing'): text_dls(tmp_path)

def test_folder_of_something_else(tmp_path):
    (tmp_path/'a.png').write_bytes(b'x')
    with pytest.raises(ValueError, match='no texts in .*looked for .*.txt, found 1 .png'): text_dls(tmp_path)

def test_unknown_kind_of_file(tmp_path):
    (tmp_path/'a.docx').write_bytes(b'x')
    with pytest.raises(ValueError, match='a.docx.*not from .\\.docx'): text_dls(tmp_path/'a.docx')

def test_missing_column_names_those_found(tmp_path):
    f = table(tmp_path/'t.csv', review=texts, stars=labels)
    with pytest.raises(ValueError, match="t.csv has no column 'text'; it has 'review', 'stars'"): text_dls(f)
    dls = text_dls(f, text='review', label='stars', **small)
    assert dls.info.names()==['even','odd']

def test_asked_label_column_must_exist(tmp_path):
    f = table(tmp_path/'t.csv', text=texts)
    with pytest.raises(ValueError, match="no column 'stars'"): text_dls(f, label='stars')
    assert text_dls(f, **small).info.names()==[]

def test_broken_tables(tmp_path):
    f = tmp_path/'t.csv'
    f.write_text('')
    with pytest.raises(ValueError, match='t.csv cannot be read as csv'): text_dls(f)
    f.write_bytes('text\nna\u00efve\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='t.csv is not UTF-8'): text_dls(f)
    g = tmp_path/'t.jsonl.gz'
    g.write_bytes(b'this is no gzip')
    with pytest.raises(ValueError, match='t.jsonl.gz cannot be read as jsonl'): text_dls(g)

def test_undecodable_files_are_skipped_counted_and_reported_once(tmp_path):
    for i,t in enumerate(texts): (tmp_path/f'{i:02}.txt').write_text(t)
    for i in range(3): (tmp_path/f'bad{i}.txt').write_bytes(b'\xff\xfe\xfa')
    with pytest.warns(UserWarning, match='3 of 43 texts .* not UTF-8 .* bad0.txt') as w: dls = text_dls(tmp_path, **small)
    assert len([o for o in w if 'UTF-8' in str(o.message)])==1 and dls.info.skipped==3

def test_nothing_but_bad_files(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'\xff')
    (tmp_path/'b.txt').write_text('   ')
    with pytest.raises(ValueError, match=f'no text in .*{tmp_path.name}: 2 entries'): text_dls(tmp_path)

def test_lists():
    with pytest.raises(ValueError, match='40 texts but 3 labels'): text_dls(texts, [1,2,3])
    with pytest.raises(ValueError, match='no text given'): text_dls([])
    with pytest.raises(ValueError, match='cannot cut 1'): text_dls(['only one text here'], **small)

def test_no_training_part(tmp_path):
    with pytest.raises(ValueError, match='nothing to train on'): text_dls(table(tmp_path/'test.csv', text=texts))

def test_split_rules(tmp_path):
    for splits,want in ((('train','test'), [18,2,20]), (('train','valid'), [18,2,20]), (('train',), [29,3,8])):
        s = [splits[i//20 % len(splits)] for i in range(40)]
        dls = text_dls(table(tmp_path/'t.csv', text=texts, label=labels, split=s), chunk=False, **small)
        assert sizes(dls)==want and dls.test is not None
        assert sorted(sum((dl.files for dl in dls.loaders), []))==sorted(f't.csv:{i}' for i in range(1,41))
    assert text_dls(texts, chunk=False, **small).test is None

def test_every_form_gives_the_same_rows(tmp_path):
    split = ['train']*24 + ['valid']*6 + ['test']*10
    df = pd.DataFrame(dict(text=texts, label=labels, split=split))
    df.to_csv(tmp_path/'a.csv', index=False)
    df.to_csv(tmp_path/'a.tsv.gz', index=False, sep='\t')
    df.to_json(tmp_path/'a.jsonl.xz', orient='records', lines=True)
    df.to_parquet(tmp_path/'a.parquet')
    for i,r in df.iterrows():
        f = tmp_path/'tree'/r.split/r.label/f'{i:03}.txt'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(r.text)
    (tmp_path/'tables').mkdir()
    for s,part in df.groupby('split'): part[['text','label']].to_csv(tmp_path/'tables'/f'{s}.csv', index=False)
    forms = [text_dls(tmp_path/f, **small) for f in ('a.csv','a.tsv.gz','a.jsonl.xz','a.parquet','tree','tables')]
    rows = [[sorted(map(tuple, torch.cat([dl.xs[0], dl.y[:,None]], 1).tolist())) for dl in d.loaders] for d in forms]
    assert all(r==rows[0] for r in rows) and all(d.info.names()==['even','odd'] for d in forms)

def test_tokenizer_of_others(tmp_path):
    tok = train_tokenizer(texts, 80)
    tok.save(str(tmp_path/'tokenizer.json'))
    a,b = text_dls(texts, tokenizer=tok, **small),text_dls(texts, tokenizer=tmp_path/'tokenizer.json', **small)
    assert torch.equal(a.train.xs[0], b.train.xs[0])
    from tokenizers import Tokenizer, models
    with pytest.raises(ValueError, match=r'must begin with \[PAD\] \[UNK\]'): text_dls(texts, tokenizer=Tokenizer(models.WordPiece({'[UNK]': 0}, unk_token='[UNK]')))

def test_any_language_and_strange_letters():
    strange = ['日本語のテキスト です', 'Ünïcödé ß straße', 'مرحبا بالعالم', '🙂🙂 emoji 🙂', 'a'*500, '\x00\x01 control', '[MASK] [PAD] literally']*3
    dls = text_dls(strange, **small)
    x = dls.train.xs[0]
    assert x.min()>=0 and x.max()<dls.info.vocab_size and (x[:,0]==CLS).all()

def test_long_texts_share_no_split():
    long = [' '.join(t for _ in range(8)) for t in texts]
    dls = text_dls(long, labels, **small)
    files = [set(dl.files) for dl in dls.loaders]
    assert dls.train.n > len(files[0]) and not files[0]&files[1] and not files[0]&files[2] and not files[1]&files[2]
    assert dls.test.n==len(files[2])

def test_bert_needs_text():
    image = create_encoder('small_cnn', DataInfo(channels=1, size=8, mean=[0.5], std=[0.5]))
    with pytest.raises(ValueError, match='no token embedding'): BERT(image)

def test_bert_on_texts_without_any_word():
    m = BERT(create_encoder('small_text', DataInfo(kind='text', vocab_size=30, max_len=8)))
    x = torch.tensor([[CLS,SEP,0,0,0,0,0,0],[0]*8,[CLS,UNK,SEP,0,0,0,0,0]])
    (seen,at),(targets,) = m.pretext(x)
    assert torch.equal(seen, x) and (targets==-100).all()
    loss = m.loss(m(seen, at), targets)
    loss.backward()
    assert loss==0 and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
