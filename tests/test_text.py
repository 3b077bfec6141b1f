"Bad input for text: each message names the file or argument."
import os, tracemalloc, unicodedata
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ssl_nb.core.loader import DataInfo
from ssl_nb.core.encoders import create_encoder
from ssl_nb.data.text import CLS, MASK, PAD, SEP, UNK, Text, decode, encode, read_texts, text_dls, train_tokenizer
from ssl_nb.masked.bert import BERT
from ssl_nb.masked.words import corrupt, mlm_loss

words = 'the quick brown fox jumps over the lazy dog while seven wizards quietly mix a large box of jade paint'.split()
texts = [' '.join(np.random.default_rng(i).permutation(words)) for i in range(40)]
labels = ['even' if i%2==0 else 'odd' for i in range(40)]
small = dict(vocab_size=320, max_len=16, bs=4)

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
    for i in range(3): (tmp_path/f'bad{i}.txt').write_bytes(b'caf\xe9')
    with pytest.warns(UserWarning, match='40 texts; left out: 3 texts that are not UTF-8 .*bad0.txt') as w: dls = text_dls(tmp_path, **small)
    assert len([o for o in w if 'UTF-8' in str(o.message)])==1 and dls.info.skipped==3 and 'bad0.txt' in dls.info.read

def test_nothing_but_bad_files(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'\xff')
    (tmp_path/'b.txt').write_text('   ')
    with pytest.raises(ValueError, match=f'no text in .*{tmp_path.name}: 2 entries, 1 texts that are not UTF-8 .a.txt., 1 empty texts .b.txt.'): text_dls(tmp_path)

def test_lists():
    with pytest.raises(ValueError, match='40 texts but 3 labels'): text_dls(texts, [1,2,3])
    with pytest.raises(ValueError, match='no text in the list'): text_dls([])
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
    tok = train_tokenizer(texts, 320)
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

spoken = dict(english='It is not your fault, is it?', german='Größe, Straße und süße Äpfel', turkish='ölü ile olu, ığdır', vietnamese='Má, mạ, mà và mả',
              greek='η γη γυρίζει', russian='Ёжик и ёлка', hindi='हिन्दी में की और कि', bengali='বাংলা ভাষা', thai='ภาษาไทยที่นี่ น้ำ', khmer='ភាសាខ្មែរ',
              arabic='مُحَمَّد في البيت', hebrew='שָׁלוֹם עולם', japanese='がぎぐ かきく プール ブール', chinese='我们去东京大学看书。', korean='한국어를 배워요',
              georgian='ქართული ენა', tamil='தமிழ் மொழி', emoji='ok 👩🏽‍🚀 🇻🇳!', mixed='a\u200bb «c» -- d_e 3½')

@pytest.mark.parametrize('lowercase', [True, False])
@pytest.mark.parametrize('seen', [True, False], ids=['own vocabulary', 'English vocabulary'])
def test_every_language_comes_back_as_it_was_written(lowercase, seen):
    "NFC, lower case where that was chosen, nothing unknown, and a bounded vocabulary"
    said = list(spoken.values())
    tok = train_tokenizer(said*3 if seen else texts, 900, lowercase)
    form = [unicodedata.normalize('NFC', t) for t in said]
    rows = encode(tok, [unicodedata.normalize('NFD', t) for t in said], 256)[0]
    assert [decode(tok, r) for r in rows]==[t.lower() if lowercase else t for t in form]
    assert not (rows==UNK).any() and rows.max()<tok.get_vocab_size()<=900

def test_different_words_are_different_tokens():
    pairs = [('ölü','olu'), ('Größe','Große'), ('schon','schön'), ('má','mạ'), ('mà','ma'), ('की','कि'), ('が','か'), ('プール','ブール'), ('น้ำ','นำ')]
    tok = train_tokenizer([w for p in pairs for w in p]*3, 600)
    same = [(a,b) for a,b in pairs if tok.encode(a).ids==tok.encode(b).ids]
    assert not same

def test_letters_that_do_not_fit_are_bytes():
    "3,000 kinds of letters and a vocabulary of 400"
    many = [''.join(chr(0x4e00+(37*i+j)%3000) for j in range(40)) for i in range(300)]
    tok = train_tokenizer(many, 400)
    rows = encode(tok, many[:20], 256)[0]
    assert tok.get_vocab_size()<=400 and not (rows==UNK).any() and [decode(tok, r) for r in rows]==many[:20]

def test_names_of_special_tokens_in_a_text_are_letters():
    tok = train_tokenizer(texts, 320)
    row = encode(tok, ['say [MASK] and [PAD] <0x41>'], 64)[0][0]
    assert decode(tok, row)=='say [mask] and [pad] <0x41>' and row[1:].tolist().index(SEP)==int((row>0).sum())-2
    assert MASK in tok.encode('say [MASK]').ids # but a person can ask for them

def test_the_same_texts_give_the_same_vocabulary():
    "Of many pairs that are equally frequent"
    found = {train_tokenizer(texts[:2]+list(spoken.values())*2, 700).to_str() for _ in range(4)}
    assert len(found)==1

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'utf-16-le', 'utf-16-be'])
def test_encodings_of_files(tmp_path, encoding):
    "With a mark any encoding is read, by every form; UTF-16 without one is refused by name, never read as UTF-8"
    said = [f'größe {i} が' for i in range(8)]
    marked = encoding not in ('utf-16-le','utf-16-be')
    (tmp_path/'lines.txt').write_text('\n'.join(said), encoding=encoding)
    (tmp_path/'t.csv').write_text('text\n'+'\n'.join(said), encoding=encoding)
    (tmp_path/'tree').mkdir()
    for i,t in enumerate(said): (tmp_path/'tree'/f'{i}.txt').write_text(t, encoding=encoding)
    for name in ('lines.txt','t.csv','tree'):
        if marked: assert read_texts(tmp_path/name).text.tolist()==said
        else:
            with pytest.raises(ValueError, match=f'{name}.*(UTF-16|zero bytes|UTF-8)'): read_texts(tmp_path/name)

def test_what_is_no_text_is_left_out_by_name(tmp_path):
    for name,b in {'good.txt': b'good', 'also.txt': b'also good', 'empty.txt': b'', 'white.txt': b' \n\t\n', 'photo.txt': b'\x89PNG\0\0\1\2',
                   'latin.txt': b'caf\xe9', 'half.txt': 'half'.encode('utf-16')[:-1]}.items(): (tmp_path/name).write_bytes(b)
    with pytest.warns(UserWarning) as w: df = read_texts(tmp_path)
    said = str(w[0].message)
    assert sorted(df.text)==['also good','good'] and df.attrs['skipped']==5 and len(w)==1
    for part in ('2 empty texts (empty.txt', 'zero bytes', 'photo.txt', 'latin.txt', 'half.txt', 'UTF-16'): assert part in said, said

def test_empty_cells_and_lines_are_counted(tmp_path):
    (tmp_path/'t.txt').write_text('one\n\n  \ntwo\n')
    with pytest.warns(UserWarning, match=r'2 empty texts \(t.txt:2'): assert read_texts(tmp_path/'t.txt').source.tolist()==['t.txt:1','t.txt:4']
    pd.DataFrame(dict(text=['one',None,'','two',' '])).to_parquet(tmp_path/'t.parquet')
    with pytest.warns(UserWarning, match='3 empty texts'): assert read_texts(tmp_path/'t.parquet').text.tolist()==['one','two']
    (tmp_path/'t.jsonl').write_text('{"text": "one"}\n{"text": "\\ud800"}\n{"text": 5}\n')
    with pytest.warns(UserWarning, match='1 texts that are not UTF-8 .t.jsonl:2.'): read_texts(tmp_path/'t.jsonl')

def test_a_giant_line_is_left_out_in_bounded_memory(tmp_path):
    "60 MB in one line, between two that are none"
    with open(tmp_path/'t.txt', 'w') as f:
        f.write('first\n')
        for _ in range(60): f.write('word '*200_000)
        f.write('\nlast\n')
    tracemalloc.start()
    with pytest.warns(UserWarning, match='10,000,000 letters .t.txt:2.'): df = read_texts(tmp_path/'t.txt')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert df.text.str.strip().tolist()==['first','last'] and peak<50e6
    os.rename(tmp_path/'t.txt', tmp_path/'one.txt')
    (tmp_path/'two.txt').write_text('short')
    with pytest.warns(UserWarning, match='10,000,000 letters .one.txt.'): assert read_texts(tmp_path).text.tolist()==['short']

def test_more_than_memory_holds_is_refused(tmp_path, monkeypatch):
    (tmp_path/'t.txt').write_text('a\nb')
    monkeypatch.setattr('ssl_nb.data.documents.fits', lambda n: False)
    for path in (tmp_path/'t.txt', tmp_path):
        with pytest.raises(ValueError, match=f'{path.name} holds .* MB of text'): read_texts(path)

def test_messages_of_tables_name_the_file(tmp_path):
    train,test = table(tmp_path/'train.csv', text=texts, label=labels),table(tmp_path/'test.csv', text=texts[:4], label=labels[:4])
    (tmp_path/'notes.txt').write_text('not one of them')
    with pytest.warns(UserWarning, match='1 files that are not named by split .notes.txt'): dls = text_dls(tmp_path, **small)
    assert 'test 4' in dls.info.read and 'label: 2 classes' in dls.info.read and '4 held-out texts are word for word in train' in dls.info.read
    table(tmp_path/'test.csv', review=texts[:4])
    with pytest.raises(ValueError, match="test.csv has no column 'text'; it has 'review'"): text_dls(tmp_path)
    f = table(tmp_path/'t.csv', text=texts, split=['train','holdout']*20)
    with pytest.raises(ValueError, match="t.csv has the unknown split .'holdout'."): text_dls(f)

def test_labels_that_say_nothing_are_none(tmp_path):
    f = table(tmp_path/'t.csv', text=texts, label=['a','b','nan','NA','','-1','None','a']*5)
    assert text_dls(f, **small).info.names()==['a','b']
    assert text_dls(texts, [1.,2.,float('nan'),None]*10, **small).info.names()==['1','2']

def test_unlabelled_texts_only_train(tmp_path):
    f = table(tmp_path/'t.csv', text=texts, label=labels, split=['train','test','unlabelled','train']*10)
    dls = text_dls(f, **small)
    free = [y for y,name in zip(dls.train.y.tolist(), dls.train.files) if int(name.split(':')[1])%4==3]
    assert free and set(free)=={-1}

def test_a_vocabulary_made_elsewhere():
    "A WordPiece tokenizer with our five tokens first, as earlier runs keep one"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from ssl_nb.data.text import SPECIALS
    vocab = {t: i for i,t in enumerate([*SPECIALS, *sorted(set(words)), '##s'])}
    tok = Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.add_special_tokens(SPECIALS)
    dls = text_dls(texts+['unheard of'], tokenizer=tok, max_len=24, bs=4)
    assert dls.info.vocab_size==len(vocab) and BERT.for_data(create_encoder('small_text', dls.info), dls).vocab_size==len(vocab)

def test_new_texts_are_read_with_the_tokenizer_of_the_run(tmp_path):
    "Also where there is a folder called test and no other"
    dls = text_dls(texts, **small)
    Text.keep(dls, tmp_path)
    (tmp_path/'new'/'test').mkdir(parents=True)
    for i,t in enumerate(['The fox', ' ', 'quick wizards']): (tmp_path/'new'/'test'/f'{i}.txt').write_text(t)
    with pytest.warns(UserWarning, match='1 empty texts .test/1.txt.'): dl = Text.files(tmp_path/'new', dls.info, kept=tmp_path)
    assert dl.files==['test/0.txt','test/2.txt'] and dl.info.skipped==1 and [decode(dls.tokenizer, r) for r in dl.xs[0]]==['the fox','quick wizards']
