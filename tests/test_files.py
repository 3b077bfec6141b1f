"Folders and tables of any shape: what is read off them, what is left out and said, and that nothing hangs, whatever is there."
import os
import signal
import subprocess
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from ssl_nb.app.embed import embed
from ssl_nb.app.run import pretrain
from ssl_nb.core.loader import class_ids, known_labels
from ssl_nb.data.files import list_files, printable
from ssl_nb.data.folders import folder_listing, listing, split_names, table_listing
from ssl_nb.data.images import image_dl, image_dls
from ssl_nb.data.pairs import pair_dls_from_table
from ssl_nb.data.parts import divide, three_parts, twins
from ssl_nb.data.tables import read_table
from ssl_nb.data.text import text_dls
from ssl_nb.data.video import clip_listing, video_dls

settings.register_profile('same', deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)) # the same each time
settings.load_profile('same')


def tree(root, files):
    for f in files:
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        (root/f).touch()
    return root

def read(root, endings=('.png',), **kwargs):
    "{file: (part, class)} and the listing"
    l = folder_listing(root, set(endings), 'images')
    return {f: (s,c) for f,s,c in zip(l.files, l.split, l.label['class'])},l

def quiet(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return f(*args, **kwargs),[str(w.message) for w in said]

def picture(file, seed=0, side=8):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side,side), np.uint8)).save(file)

@contextmanager
def at_most(seconds):
    "A reader that hangs fails, instead of the whole run of tests"
    def late(*_): raise TimeoutError(f'more than {seconds} s')
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ---- folders

def test_unlabelled_inside_train_is_no_class(tmp_path):
    for name in ('unlabelled','Unlabeled','unsup'):
        rows,_ = read(tree(tmp_path/name, ['train/cat/1.png','train/dog/2.png',f'train/{name}/3.png',f'train/{name}/deep/4.png']))
        assert [c for _,c in rows.values()].count(None)==2 and {c for _,c in rows.values()}=={'cat','dog',None}

def test_unlabelled_beside_classes(tmp_path):
    rows,_ = read(tree(tmp_path, ['cat/1.png','dog/2.png','unlabelled/3.png']))
    assert rows=={'cat/1.png': ('train','cat'), 'dog/2.png': ('train','dog'), 'unlabelled/3.png': ('unlabelled',None)}

@pytest.mark.parametrize('stray', ['train/stray.png','train/cat/inner/deep.png'])
def test_a_stray_file_costs_no_labels(tmp_path, stray):
    names = [f'{s}/{c}/{i}.png' for s in ('train','test') for c in ('cat','dog') for i in range(4)]
    rows,l = read(tree(tmp_path, [*names, stray]))
    assert all(rows[f][1]==f.split('/')[1] for f in names)
    assert rows[stray][1]==('cat' if 'inner' in stray else None)
    *_,said = divide(l)
    assert ('1 without a label' in said)==('inner' not in stray)

def test_a_diary_is_no_classification_and_it_is_said(tmp_path):
    rows,l = read(tree(tmp_path, [f'{y}/{m}/{i}.png' for y in (2023,2024) for m in (7,8) for i in range(3)]))
    assert {c for _,c in rows.values()}=={None}
    assert 'no labels; no classes: only 0 of 12 files lie exactly one folder deep' in divide(l)[-1]

@pytest.mark.parametrize('train,test', [('training_set','test_set'), ('Train','TEST'), ('train-images','test-images'), ('trainset','testset'),
                                        ('train2017','test2017'), ('training','eval')])
def test_names_of_parts(tmp_path, train, test):
    rows,l = read(tree(tmp_path, [f'{train}/cat/1.png',f'{train}/dog/2.png',f'{test}/cat/3.png']))
    assert not l.notes and not l.left
    assert [s for s,_ in rows.values()].count('test')==1 and rows[f'{test}/cat/3.png']==('test','cat')

def test_eval_is_valid_where_there_is_a_test(tmp_path):
    rows,_ = read(tree(tmp_path, ['train/1.png','eval/2.png','test/3.png']))
    assert [s for s,_ in rows.values()]==['valid','test','train']
    assert split_names(['train','dev','eval'], 't.csv')==['train','valid','test']

def test_parts_inside_the_classes(tmp_path):
    rows,_ = read(tree(tmp_path, [f'{c}/{s}/{i}.png' for c in ('cat','dog') for s in ('train','test') for i in range(2)]))
    assert rows['dog/test/1.png']==('test','dog') and rows['cat/train/0.png']==('train','cat')

def test_a_class_called_train(tmp_path):
    rows,_ = read(tree(tmp_path, [f'{c}/{i}.png' for c in ('bus','car','train') for i in range(3)]))
    assert rows['train/0.png']==('train','train') and rows['bus/0.png']==('train','bus')

def test_archives_that_repeat_their_name(tmp_path):
    rows,_ = read(tree(tmp_path, [f'set/{s}/{s}/images/{c}/{i}.png' for s in ('train','test') for c in 'ab' for i in range(2)]))
    assert rows['set/test/test/images/a/0.png']==('test','a')

@pytest.mark.parametrize('image,mask', [('images/1.png','masks/1.png'), ('train/images/1.png','train/masks/1.png'), ('train/1.png','train_masks/1.png'),
                                        ('train/1.png','trainannot/1.png'), ('data/7.png','data/7_mask.png'), ('JPEGImages/1.png','SegmentationClass/1.png')])
def test_masks_are_left_out_and_said(tmp_path, image, mask):
    rows,l = read(tree(tmp_path, [image, image.replace('1.p','2.p').replace('7.p','8.p'), mask]))
    assert mask not in rows and len(rows)==2 and l.left=={'masks of other files': [mask]}
    (*_,said),warned = quiet(divide, l)
    assert f'1 masks of other files ({mask})' in said and mask in warned[0]

@pytest.mark.parametrize('names', [('with_mask','without_mask'), ('mask','no_mask'), ('masks','cats'), ('labels','shoes')])
def test_classes_that_sound_like_masks(tmp_path, names):
    rows,_ = read(tree(tmp_path, [f'{c}/{i}.png' for c in names for i in range(2)]))
    assert {c for _,c in rows.values()}==set(names)

def test_what_else_lies_there_is_said(tmp_path):
    tree(tmp_path, [f'{i}.heic' for i in range(60)]+[f'{i}.dng' for i in range(20)]+[f'raw{i}' for i in range(10)])
    for i in range(4): picture(tmp_path/f'{i}.png', i)
    dls,warned = quiet(image_dls, tmp_path, bs=2)
    assert len(warned)==1 and '90 files with other endings (60 .heic, 20 .dng, 10 without ending)' in warned[0]
    assert dls.info.read=='4 images: train 3, valid 1 (cut off train); no labels; left out: ' \
                          '90 files with other endings (60 .heic, 20 .dng, 10 without ending)'
    (tmp_path/'few').mkdir()
    for i in range(4): picture(tmp_path/'few'/f'{i}.png', i)
    (tmp_path/'few'/'notes.txt').touch()
    dls,warned = quiet(image_dls, tmp_path/'few', bs=2)
    assert not warned and 'left out: 1 files with other endings (1 .txt)' in dls.info.read # said, but no warning

def test_embed_of_a_folder_of_tests(tmp_path):
    for i in range(4): picture(tmp_path/'train'/f'{i}.png', i)
    info = image_dls(tmp_path, bs=2).info
    for i in range(3): picture(tmp_path/'new'/'test'/f'{i}.png', i)
    assert image_dl(tmp_path/'new', info).files==['test/0.png','test/1.png','test/2.png']
    with pytest.raises(ValueError, match='nothing to train on.*called test, but none called train'): image_dls(tmp_path/'new')

def test_pipes_sockets_loops_and_broken_links(tmp_path):
    for i in range(3): picture(tmp_path/f'{i}.png', i)
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'gone.png').symlink_to(tmp_path/'nowhere.png')
    (tmp_path/'self.png').symlink_to(tmp_path/'self.png')
    (tmp_path/'again').symlink_to(tmp_path)
    with at_most(20):
        dls,warned = quiet(image_dls, tmp_path, bs=2)
        with pytest.raises(ValueError, match='pipe or a device'): image_dls(tmp_path/'pipe.png')
    assert sum(dl.n for dl in dls)==3 and '1 pipes, sockets or devices (pipe.png)' in warned[0]
    assert '2 broken links (gone.png, self.png)' in warned[0] or '2 broken links (self.png, gone.png)' in warned[0]

def test_links_that_multiply(tmp_path):
    "Thirty folders with two links to the next: a billion paths"
    for i in range(30):
        (tmp_path/f'd{i}').mkdir()
        for name in 'ab': (tmp_path/f'd{i}'/name).symlink_to(tmp_path/f'd{i+1}')
    tree(tmp_path, ['d30/1.png'])
    with at_most(10): l = folder_listing(tmp_path/'d0', {'.png'})
    assert len(l.files)==1 and 'folders linked too often' in l.left

def test_very_deep_folders(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100): # deeper than Python recurses
        os.mkdir('d', dir_fd=here)
        here,old = os.open('d', os.O_RDONLY, dir_fd=here),here
        os.close(old)
    os.close(os.open('1.png', os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    tree(tmp_path, ['2.png'])
    with at_most(20): assert list_files(tmp_path, {'.png'})==['2.png', 'd/'*1100+'1.png']
    subprocess.run(['rm', '-rf', tmp_path/'d'], check=True) # pytest could not

def test_linked_file_in_two_parts(tmp_path):
    tree(tmp_path, ['pool/1.png','train/2.png','test/3.png'])
    (tmp_path/'train'/'a.png').symlink_to(tmp_path/'pool'/'1.png')
    rows,l = read(tmp_path)
    assert len(rows)==3 and 'second names of the same file' in l.left and list(rows.values()).count(('train',None))==2
    (tmp_path/'test'/'b.png').symlink_to(tmp_path/'pool'/'1.png')
    with pytest.raises(ValueError, match="one file, with split '(train|test)' and '(train|test)'"): read(tmp_path)

def test_twins_across_a_split(tmp_path):
    for i in range(12): picture(tmp_path/'train'/f'{i}.png', i)
    for i in range(3): picture(tmp_path/'test'/f'{i}.png', 20+i)
    (tmp_path/'test'/'copy.png').write_bytes((tmp_path/'train'/'5.png').read_bytes())
    with at_most(20): dls,warned = quiet(image_dls, tmp_path, bs=2)
    assert '1 held-out images are byte for byte in train, too' in dls.info.read and 'byte for byte' in warned[0]

def test_twins_reads_little(tmp_path):
    "Equal sizes alone are no twins, and a pipe or a missing file is none"
    for n in 'abc': (tmp_path/n).write_bytes(n.encode()*10_000)
    (tmp_path/'d').write_bytes(b'a'*10_000)
    os.mkfifo(tmp_path/'pipe')
    with at_most(10): assert twins(tmp_path, ['a','b','c','d','pipe','gone'], [0,4,5], [1,2,3,4,5])==[str(tmp_path/'d')]

def test_names_that_are_no_text(tmp_path):
    for i,c in enumerate((b'caf\xe9',b'bar')):
        for j in range(4): picture(tmp_path/os.fsdecode(c)/f'{j}.png', 10*i+j)
    dls = image_dls(tmp_path, bs=2)
    assert dls.info.names()==['bar',r'caf\xe9'] and dls.info.read.encode()
    assert printable('naïve.png')=='naïve.png' and printable(os.fsdecode(b'\xff.png'))==r'\xff.png' and printable('\ud800')

def test_from_an_odd_folder_to_features(tmp_path, capsys):
    "The line is printed once, and a name that is no UTF-8 reaches the table of features"
    for i in range(8): picture(tmp_path/'data'/'ab'[i%2]/os.fsdecode(b'na\xefve%d.png' % i), i)
    tree(tmp_path/'data', ['notes.txt'])
    run = pretrain('rotation', str(tmp_path/'data'), tmp_path/'run', epochs=1, batch_size=2, device='cpu')
    assert capsys.readouterr().out.count('data: 8 images: train 5, valid 1 (cut off train), test 2 (cut off train); class: 2 classes (a, b); '
                                         'left out: 1 files with other endings (1 .txt)')==1
    df = pd.read_parquet(embed(run, tmp_path/'data', tmp_path/'f.parquet', device='cpu'))
    assert sorted(df.file)==sorted(rf'{"ab"[i%2]}/na\xefve{i}.png' for i in range(8))


# ---- parts and classes

def labels_of(l, **kwargs):
    (y,classes,parts,said),_ = quiet(divide, l, **kwargs)
    assert sorted(np.concatenate(parts))==sorted({*np.concatenate(parts)}) and len(parts[0]) and len(parts[1])
    if classes:
        first = y if y.ndim==1 else y[:,0]
        assert set(first[first>=0]) <= set(first[parts[0]]) # nothing held out that train has not
        assert set(range(len(next(iter(classes.values()))))) <= set(first[parts[0]])
    return y,classes,parts,said

def test_flat_train_with_a_labelled_test(tmp_path):
    _,l = read(tree(tmp_path, [f'train/{i}.png' for i in range(10)]+[f'test/{c}/{i}.png' for c in 'ab' for i in range(3)]))
    y,classes,parts,said = labels_of(l)
    assert not classes and (y==-1).all() and len(parts[2])==6 and 'class: not used: train has 0 of its 2 classes' in said

def test_a_class_that_train_has_not(tmp_path):
    _,l = read(tree(tmp_path, [f'{s}/{c}/{i}.png' for s,cs in (('train','ab'),('test','abc')) for c in cs for i in range(5)]))
    y,classes,parts,said = labels_of(l)
    assert classes=={'class': ['a','b']} and (y[parts[2]]==-1).sum()==5 and 'class: unknown, as train has none: c' in said

def test_one_class_only(tmp_path):
    _,l = read(tree(tmp_path, [f'train/cat/{i}.png' for i in range(10)]))
    _,classes,_,said = labels_of(l)
    assert not classes and 'no classes: all files lie in the folder cat' in said
    (tmp_path/'t.csv').write_text('file,label\n'+''.join(f'{i}.png,cat\n' for i in range(9)))
    _,classes,_,said = labels_of(table_listing(tmp_path/'t.csv'))
    assert not classes and 'label: not used: one class only' in said

@pytest.mark.parametrize('known', [['a'], ['a','b'], ['a','a','b'], ['a','a','b','b'], list('abcdefgh'), ['a']*10+['b']])
def test_few_labels_of_twenty(tmp_path, known):
    (tmp_path/'t.csv').write_text('file,label\n'+''.join(f'{i}.png,{c}\n' for i,c in enumerate(known+['']*(20-len(known)))))
    _,classes,parts,_ = labels_of(table_listing(tmp_path/'t.csv'))
    assert classes==({'label': sorted(set(known))} if len(set(known))>1 else {}) # no class is lost

def test_a_class_of_one_picture_stays_in_train(tmp_path):
    _,l = read(tree(tmp_path, [f'{c}/{i}.png' for c in ('cat','dog') for i in range(12)]+['bird/0.png']))
    _,classes,parts,_ = labels_of(l)
    assert classes=={'class': ['bird','cat','dog']} and l.files.index('bird/0.png') in parts[0]

def test_rows_of_the_part_unlabelled_have_no_label(tmp_path):
    rows = [(f'{i}.png','ab'[i%2],'train') for i in range(8)]+[(f'u{i}.png','ab'[i%2],'unlabelled') for i in range(4)]+[('t.png','a','test')]
    pd.DataFrame(rows, columns=['file','label','split']).to_csv(tmp_path/'t.csv', index=False)
    y,_,parts,said = labels_of(table_listing(tmp_path/'t.csv'))
    assert (y[8:12]==-1).all() and (y[:8]>=0).all() and '4 without a label' in said and set(range(8,12))<=set(parts[0])

@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(['train','train','train','valid','test','unlabelled','']), st.integers(-1,4)), min_size=2, max_size=40),
       st.sampled_from([0.1,0.25,0.5]), st.sampled_from([None,1,2,5]))
def test_parts_of_any_labels(rows, valid, limit):
    "Every used sample is in one part, and held-out classes are known to train where its labels allow that"
    split,y = map(list, zip(*rows))
    n = sum(s in ('train','unlabelled') for s in split)
    try: parts = three_parts(split, np.array(y), valid, limit=limit)
    except ValueError as e:
        assert ('cannot cut' in str(e) or 'nothing to train on' in str(e)) and (n<2 or limit==1)
        return
    assert not set(parts[0])&set(parts[1]) and not set(parts[0])&set(parts[2]) and not set(parts[1])&set(parts[2])
    assert set(np.concatenate(parts)) <= {i for i,s in enumerate(split) if s} and len(parts[0])
    if limit is None: assert len(np.concatenate(parts))==sum(map(bool, split))
    known = lambda p: {y[i] for i in p if split[i] in ('train','unlabelled') and y[i]>=0}
    spare = limit is None and any(y[i]<0 for i in range(len(y)) if split[i] in ('train','unlabelled'))
    if spare: assert known(parts[1]) | known(parts[2]) <= known(parts[0])


# ---- tables

def table(path, text, encoding='utf-8'):
    path.write_bytes(text.encode(encoding))
    return path

def test_cells_that_are_no_label(tmp_path):
    cells = ['cat','dog','','nan','NaN','NA','None','-1','-1.0','null','N/A']
    l = table_listing(table(tmp_path/'t.csv', 'file,label\n'+''.join(f'{i}.png,{c}\n' for i,c in enumerate(cells))))
    assert l.label['label']==['cat','dog']+[None]*9
    df = pd.DataFrame(dict(file=['1.png','2.png','3.png','4.png'], label=[3.,None,-1.,4.]))
    df.to_parquet(tmp_path/'t.parquet')
    df.to_json(tmp_path/'t.jsonl', orient='records', lines=True)
    df.to_csv(tmp_path/'f.csv', index=False) # an empty cell makes floats of whole numbers
    for name in ('t.parquet','t.jsonl','f.csv'): assert table_listing(tmp_path/name).label['label']==['3',None,None,'4']
    assert known_labels(['1.0','1.5','','007'])==['1.0','1.5',None,'007'] and known_labels(['1.0','','007'])==['1',None,'007']
    assert class_ids(known_labels(['--1','2','nan']))[1]==['--1','2']

@pytest.mark.parametrize('make,name', [(image_dls,'images'), (video_dls,'clips'), (text_dls,'texts'), (pair_dls_from_table,'texts of 16 images')])
def test_folders_may_be_called_like_words_that_say_nothing(tmp_path, make, name):
    "Whoever calls a folder NA (sodium, Namibia) or -1 means a class; in a cell of a table the same word says that nothing is known"
    for i in range(16):
        folder = tmp_path/('NA','nan','None','-1')[i%4]
        if make is not text_dls: picture(folder/(f'{i}/1.png' if make is video_dls else f'{i}.png'), i)
        if make not in (image_dls,video_dls):
            folder.mkdir(exist_ok=True)
            (folder/f'{i}.txt').write_text(f'this is number {i} of them all')
    given = {video_dls: dict(frames=1), image_dls: {}}.get(make, dict(vocab_size=300))
    dls,said = quiet(make, tmp_path, bs=2, **given)
    assert dls.info.names()==['-1','NA','None','nan'] and f'16 {name}: train' in dls.info.read and 'without a label' not in dls.info.read
    assert all((dl.y>=0).all() for dl in dls.loaders) and not said

@pytest.mark.parametrize('encoding', ['utf-8','utf-8-sig','utf-16','utf-32'])
@pytest.mark.parametrize('name,sep', [('t.csv',','), ('t.csv',';'), ('t.csv','\t'), ('t.csv','|'), ('t.tsv','\t')])
def test_delimiters_and_encodings(tmp_path, name, sep, encoding):
    text = f'Filename{sep}label\nnaïve.png{sep}"a{sep}b"\nx\\y.png{sep}c\n'
    l = table_listing(table(tmp_path/name, text, encoding))
    assert l.files==['naïve.png','x/y.png'] and l.label['label']==[f'a{sep}b','c']

@pytest.mark.parametrize('encoding', ['latin-1','cp1252','utf-16-le','utf-16-be'])
def test_encodings_that_are_guesses_are_refused_by_name(tmp_path, encoding):
    for name,text in (('t.csv','file,label\nnaïve.png,a\n'), ('t.jsonl','{"file": "naïve.png"}\n')):
        with pytest.raises(ValueError, match=f'{name} (is not UTF-8|cannot be read as .*zero bytes).*UTF-8'):
            table_listing(table(tmp_path/name, text, encoding))

@pytest.mark.parametrize('column', ['file','path','Image','filename','file_name','filepath','FILE_PATH'])
def test_columns_of_files(tmp_path, column):
    assert table_listing(table(tmp_path/'t.csv', f'label,{column}\na,1.png\n')).files==['1.png']

def test_rows_longer_than_the_header(tmp_path):
    with pytest.raises(ValueError, match='t.csv cannot be read as csv'): read_table(table(tmp_path/'t.csv', 'file,label\n1.png,cat,extra\n'))
    assert read_table(table(tmp_path/'t.csv', 'text\nhello, you\n"so, so"\n')).text.tolist()==['hello, you','so, so']
    with pytest.raises(ValueError, match="two columns 'file'"): read_table(table(tmp_path/'t.csv', 'File,file\n1,2\n'))
    with pytest.raises(FileNotFoundError, match='gone.csv'): read_table(tmp_path/'gone.csv')

def test_parts_of_a_table():
    assert split_names(['', None, float('nan'), 'Train', 'dev', 'VAL', 'test_set', 'unsup'], 't')==['train']*4+['valid']*2+['test','unlabelled']
    with pytest.raises(ValueError, match="unknown split .'later'"): split_names(['later'], 't.csv')

def test_a_file_listed_twice(tmp_path):
    tree(tmp_path, ['a.png','sub/b.png'])
    (tmp_path/'link.png').symlink_to(tmp_path/'a.png')
    l = table_listing(table(tmp_path/'t.csv', 'file,label\na.png,\n./a.png,cat\nsub//b.png,dog\nsub/../sub/b.png,dog\nlink.png,\n'))
    assert l.files==['a.png','sub//b.png'] and l.label['label']==['cat','dog'] and len(l.left['second names of the same file'])==3
    for cells in ('cat,train\n./a.png,dog,train', 'cat,train\nlink.png,cat,test', f'cat,\n{tmp_path}/a.png,cat,valid'):
        with pytest.raises(ValueError, match=r'a\.png and .*(a|link)\.png are one file, with'):
            table_listing(table(tmp_path/'t.csv', f'file,label,split\na.png,{cells}\n'))

def test_files_outside_the_folder_are_said(tmp_path):
    for i in range(4): picture(tmp_path/'here'/f'{i}.png', i)
    for i in range(2): picture(tmp_path/'there'/f'{i}.png', 10+i)
    rows = [f'{i}.png' for i in range(4)]+['../there/0.png',str(tmp_path/'there'/'1.png')]
    dls = image_dls(table(tmp_path/'here'/'t.csv', '\n'.join(['file',*rows,''])), bs=2)
    assert '6 images: train 5' in dls.info.read and '2 of them lie outside the folder of t.csv' in dls.info.read

def clips(root, names, frames=4):
    for k,c in enumerate(names):
        for i in range(frames): picture(root/c/f'{i}.png', 10*k+i)
    return root

def test_one_reader_of_tables_for_clips(tmp_path):
    clips(tmp_path, [f'c{i}' for i in range(8)])
    table(tmp_path/'clips.csv', 'clip;label\n'+''.join(f'./c{i};{"ab"[i%2]}\n' for i in range(8))+'c0;a\n', 'utf-16')
    dls,_ = quiet(video_dls, tmp_path, frames=4, bs=2)
    assert dls.info.names()==['a','b'] and '8 clips' in dls.info.read
    table(tmp_path/'clips.csv', 'clip,label\nc0,a\nc0,b\n')
    with pytest.raises(ValueError, match="c0 and c0 are one file, with label 'a' and 'b'"): video_dls(tmp_path, frames=4)

def test_clips_of_classes_beside_unlabelled(tmp_path):
    clips(tmp_path, [f'{c}/clip{i}' for c in ('jump','run') for i in range(4)]+['unlabelled/x','unlabelled/y'])
    l,frames = clip_listing(tmp_path)
    assert len(frames)==10 and l.label['class']==['jump']*4+['run']*4+[None]*2 and l.split==['train']*8+['unlabelled']*2
    dls,_ = quiet(video_dls, tmp_path, frames=4, bs=2)
    assert dls.info.names()==['jump','run'] and '2 without a label' in dls.info.read and sum(dl.n for dl in dls)==10

def test_all_kinds_say_what_they_read(tmp_path):
    for i in range(12): picture(tmp_path/'images'/'ab'[i%2]/f'{i}.png', i)
    clips(tmp_path/'clips', [f'{"ab"[i%2]}/{i}' for i in range(12)])
    for i in range(12):
        f = tmp_path/'texts'/'ab'[i%2]/f'{i}.txt'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(f'this is text {i} of them all')
    for make,name,kwargs in ((image_dls,'images',{}), (video_dls,'clips',dict(frames=4)), (text_dls,'texts',dict(vocab_size=400, test=0.25))):
        dls = make(tmp_path/name, bs=2, **kwargs)
        assert dls.info.read==f'12 {name}: train 8, valid 1 (cut off train), test 3 (cut off train); class: 2 classes (a, b)', name

def test_pairs_divide_images_whatever_they_are_called(tmp_path):
    for i in range(12): picture(tmp_path/f'{i}.png', i)
    rows = ''.join(f'{i}.png;it is number {i};{"ab"[i%2]};{"test" if i>8 else ""}\n./{i}.png;here is {i};{"ab"[i%2]};{"test" if i>8 else ""}\n'
                   for i in range(12))
    dls,_ = quiet(pair_dls_from_table, table(tmp_path/'t.csv', 'filename;text;label;split\n'+rows), vocab_size=400, bs=2)
    inside = [{Path(f).name for f in dl.files} for dl in dls]
    assert [len(dl.files) for dl in dls]==[16,2,6] and not inside[0]&inside[1] and not (inside[0]|inside[1])&inside[2]
    assert dls.info.read=='24 texts of 12 images: train 16, valid 2 (cut off train), test 6; label: 2 classes (a, b)'
    with pytest.raises(ValueError, match="one file, with split 'train' and 'test'"):
        pair_dls_from_table(table(tmp_path/'t.csv', 'filename;text;split\n1.png;a;train\n./1.png;b;test\n2.png;c;\n'))

def test_pairs_say_what_they_left_out(tmp_path):
    "Rows without an image or a text, images that cannot be read, copies across the split, files elsewhere: all in the one line"
    for i in range(12): picture(tmp_path/'here'/f'{i}.png', i)
    picture(tmp_path/'there.png', 50)
    (tmp_path/'here'/'bad.png').write_text('no image')
    (tmp_path/'here'/'copy.png').write_bytes((tmp_path/'here'/'3.png').read_bytes())
    rows = [(f'{i}.png',f'it is {i}','test' if i>8 else '') for i in range(12)]
    rows += [('copy.png','a copy','test'), ('../there.png','far','train'), ('','no image',''), ('5.png',' ',''), ('bad.png','bad',''), ('gone.png','gone','')]
    pd.DataFrame(rows, columns=['file','text','split']).to_csv(tmp_path/'here'/'t.csv', index=False)
    dls,said = quiet(pair_dls_from_table, tmp_path/'here'/'t.csv', vocab_size=300, bs=2)
    for part in ('14 texts of 14 images: train', '1 of them lie outside the folder of t.csv', '1 held-out images are byte for byte in train, too',
                 '1 rows without an image (row 15)', '1 rows without a text (row 16)', '2 of 16 images could not be read and are left out: bad.png (not an image), gone.png'):
        assert part in dls.info.read, dls.info.read
    assert dls.info.skipped==4 and sum(len(dl.files) for dl in dls.loaders)==14

def test_pairs_of_a_folder_say_what_they_left_out(tmp_path):
    for i in range(10):
        picture(tmp_path/f'{i}.png', i)
        if i: (tmp_path/f'{i}.txt').write_text('' if i==1 else f'it is {i}')
    (tmp_path/'alone.txt').write_text('alone')
    (tmp_path/'x.doc').touch()
    dls,_ = quiet(pair_dls_from_table, tmp_path, vocab_size=300, bs=2)
    for part in ('8 texts of 8 images', '1 empty texts (1.txt)', '1 texts without an image (alone.txt)', '1 images without a text (0.png)',
                 '1 files with other endings (1 .doc)'):
        assert part in dls.info.read, dls.info.read


# ---- whatever is there

ours = ValueError, FileNotFoundError
name = st.one_of(st.sampled_from(['train','test','valid','unlabelled','images','masks','cat','dog','Train','val','eval','1','7_mask','a b','.hid']),
                 st.binary(min_size=1, max_size=6).map(lambda b: os.fsdecode(b.replace(b'/', b'_').replace(b'\0', b'0'))).filter(lambda n: n not in ('.','..')))
kind = st.sampled_from(['.png','.png','.png','.txt','','.csv','folder','pipe','link up','link file','broken','loop'])
junk = st.lists(st.tuples(st.lists(name, max_size=3), name, kind), max_size=14)

def grow(root, entries):
    "Make what can be made: a name that is taken is passed over"
    made = []
    for above,last,what in entries:
        p = root.joinpath(*above)/(last+what if what[:1] in ('.','') else last)
        try:
            p.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(p): continue
            if what=='folder': p.mkdir()
            elif what=='pipe': os.mkfifo(f'{p}.png')
            elif what=='link up': p.symlink_to(root)
            elif what=='link file': p.with_name(p.name+'.png').symlink_to(made[0] if made else root)
            elif what=='broken': p.with_name(p.name+'.png').symlink_to(root/'nowhere')
            elif what=='loop': p.symlink_to(p)
            else:
                p.touch()
                made.append(p)
        except OSError: continue
    return root

def check(l, endings=None):
    "A listing is consistent, can be printed, and everything that is there is read or named"
    for column in (l.split, *l.label.values()): assert len(column)==len(l.files)>0
    assert len({os.path.realpath(l.root/f) for f in l.files})==len(l.files)
    assert set(l.split) <= {'train','valid','test','unlabelled',''}
    try: y,classes,parts,said = divide(l)
    except ours as e: assert str(e) and ('train' in str(e) or 'cannot cut' in str(e)); return
    assert said.encode() and '\n' not in said.replace('\n', '', sum(f.count('\n') for fs in l.left.values() for f in fs))
    assert sorted(np.concatenate(parts))==[i for i,s in enumerate(l.split) if s] and y.max()<=max([len(c) for c in classes.values()]+[0])
    for why,names in l.left.items(): assert f'{len(names)} {why}' in said

@settings(max_examples=60)
@given(junk)
def test_any_folder(tmp_path_factory, entries):
    "Whatever lies there: samples or one of our errors, every file read or counted, and never a hang"
    root = grow(tmp_path_factory.mktemp('t'), entries)
    with at_most(5), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: l = folder_listing(root, {'.png'}, 'images')
        except ours as e: assert printable(str(e)) and str(root) in str(e); return
        check(l)
        real = {os.path.realpath(os.path.join(d, f)) for d,ds,fs in os.walk(root) if '/.' not in d[len(str(root)):]
                for f in fs if f[0]!='.' and os.path.isfile(os.path.join(d, f))}
        seen = {os.path.realpath(root/f) for f in [*l.files, *sum(l.left.values(), [])]}
        assert real <= seen

@settings(max_examples=25)
@given(junk, st.sampled_from([image_dls, text_dls, video_dls, pair_dls_from_table]))
def test_any_folder_for_any_kind(tmp_path_factory, entries, make):
    root = grow(tmp_path_factory.mktemp('t'), entries)
    kwargs = dict(frames=1) if make is video_dls else {}
    with at_most(20), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ours) as e: make(root, bs=2, **kwargs) # all files are empty
    assert str(e.value)

cell = st.one_of(st.sampled_from(['1.png','./1.png','a/../1.png','a\\b.png','/etc/passwd','','cat','dog','nan','-1','train','test','eval','dev','3','3.0']),
                 st.text(max_size=8))

@settings(max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(['file','path','label','split','Image','text']), st.text(max_size=5)), min_size=1, max_size=4),
       st.lists(st.lists(cell, max_size=5), max_size=8), st.sampled_from(',;\t|'), st.booleans(),
       st.sampled_from(['utf-8','utf-8-sig','utf-16','utf-32','latin-1','utf-16-le']), st.sampled_from(['.csv','.tsv','.csv.gz']))
def test_any_table(tmp_path_factory, columns, rows, sep, quoted, encoding, ending):
    "Any delimiter, columns, cells and encoding, well formed or not"
    quote = lambda c: '"'+c.replace('"', '""')+'"' if quoted else c
    text = '\n'.join(sep.join(map(quote, r)) for r in (columns, *rows))
    data = text.encode(encoding, 'replace')
    file = tmp_path_factory.mktemp('t')/('t'+ending)
    if ending.endswith('.gz'):
        import gzip
        data = gzip.compress(data)
    file.write_bytes(data)
    with at_most(5), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: l = listing(file, {'.png'})
        except ours as e: assert str(file.parent) in str(e); return
        check(l)

@settings(max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(['.csv','.tsv','.jsonl','.parquet','.csv.gz','.csv.zip','.csv.zst','.jsonl.xz','.csv.bz2']))
def test_bytes_that_are_no_table(tmp_path_factory, data, ending):
    file = tmp_path_factory.mktemp('t')/('t'+ending)
    file.write_bytes(data)
    with at_most(5), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: listing(file, {'.png'})
        except ours as e: assert file.name in str(e) or str(file.parent) in str(e)

json_value = st.recursive(st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5)),
                          lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4)

@settings(max_examples=60)
@given(st.lists(st.fixed_dictionaries({}, optional=dict(file=st.one_of(st.sampled_from(['1.png','2.png','\0','\ud800']), json_value),
                                                          label=json_value, split=st.one_of(st.sampled_from(['train','dev','eval']), json_value))), max_size=6))
def test_any_lines_of_json(tmp_path_factory, rows):
    import json
    file = tmp_path_factory.mktemp('t')/'t.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    with at_most(5), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: l = listing(file, {'.png'})
        except ours as e: assert str(file.parent) in str(e); return
        check(l)
