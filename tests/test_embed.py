"Features of files with what is known of each, and the page that shows them all"
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from browser import Browser, find_chromium
from conftest import quiet
from ssl_nb.app.cli import main
from ssl_nb.app.embed import _arrays, _part, embed, features_of, load_features
from ssl_nb.app.map import Looks, map_files, map_html, near_duplicates, outliers, place, thumbnails
from ssl_nb.app.folder import read_data
from ssl_nb.app.run import pretrain
from ssl_nb.core.loader import DataInfo, ResidentDL


def picture(path, seed, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size,size,3), np.uint8)).save(path)


def trained(folder, method='rotation', **kwargs):
    return pretrain(method, folder, folder.with_name(f'run-{folder.name}'), epochs=1, batch_size=8, device='cpu', supervised=False, **kwargs)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "(folder, run): two classes, no parts, so that valid and test are cut off"
    d = tmp_path_factory.mktemp('images')/'data'
    for i in range(40): picture(d/'ab'[i%2]/f'{i:02}.png', i)
    return d,trained(d)


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    d = tmp_path_factory.mktemp('texts')/'words'
    d.mkdir()
    row = lambda i: f'"number {i} is a {["sad","glad"][i%2]} one, said nobody but {"xyz"[i%3]}",{["sad","glad"][i%2]}\n'
    for part,ids in dict(train=range(40), test=range(40,50)).items():
        (d/f'{part}.csv').write_text('text,label\n' + ''.join(map(row, ids)))
    return d,trained(d, 'sentence_order')


def known(df): return {f: (l,s) for f,l,s in zip(df.file, df.label, df.split)}


# ---- what is known of each sample

@pytest.mark.parametrize('name', ['f.parquet','f.npz'])
def test_labels_and_parts_of_folders(images, tmp_path, name):
    for part in ('train','test'):
        for c in 'ab': picture(tmp_path/'new'/part/c/'1.png', 1)
    picture(tmp_path/'new'/'unlabelled'/'2.png', 2)
    (tmp_path/'new'/'test'/'a'/'0.png').write_bytes(b'no image') # the rows after it must not be shifted
    out = quiet(embed, images[1], tmp_path/'new', tmp_path/name, device='cpu')[0]
    facts,h = load_features(out)
    assert [*facts] == ['file','label','split'] and h.shape == (5,256) and h.dtype == np.float32
    assert known(facts) == {f'{p}/{c}/1.png': (c,p) for p in ('train','test') for c in 'ab'} | {'unlabelled/2.png': ('','unlabelled')}
    if name.endswith('npz'): assert {*np.load(out)} == {'files','labels','splits','features'}

def test_a_folder_with_nothing_but_test(images, tmp_path):
    for c in 'ab': picture(tmp_path/'new'/'test'/c/'1.png', 1)
    assert known(features_of(images[1], tmp_path/'new', 'cpu')[0]) == {f'test/{c}/1.png': (c,'test') for c in 'ab'}

def test_files_of_which_nothing_is_known(images, tmp_path):
    for i in range(3): picture(tmp_path/'new'/f'{i}.png', i)
    assert known(features_of(images[1], tmp_path/'new', 'cpu')[0]) == {f'{i}.png': ('','') for i in range(3)}

def test_a_table(images, tmp_path):
    for i in range(4): picture(tmp_path/f'{i}.png', i)
    (tmp_path/'t.csv').write_text('file,label,split\n3.png,cat,test\n0.png,dog,train\n1.png,,train\n2.png,dog,unlabelled\n')
    facts = features_of(images[1], tmp_path/'t.csv', 'cpu')[0]
    assert known(facts) == {'3.png': ('cat','test'), '0.png': ('dog','train'), '1.png': ('','train'), '2.png': ('','unlabelled')}

def test_streamed_images(images, monkeypatch):
    "Too many to hold: which files can be read is known after the pass only"
    import ssl_nb.data.images
    whole = features_of(images[1], images[0], 'cpu')
    monkeypatch.setattr(ssl_nb.data.images, 'fits', lambda *_: False)
    facts,h = features_of(images[1], images[0], 'cpu')
    assert facts.equals(whole[0]) and np.allclose(h, whole[1], atol=1e-5)

def test_the_parts_of_the_own_data(images, tmp_path):
    "Valid and test were cut off at random; the run knows which files are in them"
    d,run = images
    facts = features_of(run, d, 'cpu')[0]
    dls = read_data('images', str(d), device='cpu')
    assert {s: {*facts.file[facts.split==s]} for s in ('train','valid','test')} == {s: {*dl.files} for s,dl in zip(('train','valid','test'), dls.loaders)}
    assert all(l==f[0] for f,l in zip(facts.file, facts.label))

def test_own_data_that_has_changed(tmp_path):
    for i in range(12): picture(tmp_path/'data'/'ab'[i%2]/f'{i:02}.png', i)
    run = trained(tmp_path/'data')
    picture(tmp_path/'data'/'a'/'new.png', 99)
    (facts,_),said = quiet(features_of, run, tmp_path/'data', 'cpu')
    assert len(facts)==13 and not any(facts.split) and any('is not what it was' in s for s in said)

def test_several_labels():
    info = DataInfo(classes=dict(digit=['one','two'], split=['red','blue']))
    facts = _part(ResidentDL(torch.zeros(2,1,4,4), y=[[0,1],[-1,0]]), 'valid', info)
    assert facts.to_dict('list') == dict(file=['valid/0','valid/1'], digit=['one',''], label_split=['blue','red'], split=['valid']*2)
    a = _arrays(facts)
    assert a['labels'].tolist() == [['one','blue'],['','red']] and a['label_names'].tolist() == ['digit','label_split']

def test_texts(texts, tmp_path):
    facts,h = features_of(texts[1], texts[0], 'cpu')
    assert len(h)==50 and facts.split.value_counts().to_dict() == dict(train=36, test=10, valid=4)
    row = facts[facts.file=='test.csv:2'].iloc[0]
    assert (row.label, row.split) == ('glad','test') and row.caption.startswith('number 41 is a glad one')
    assert [*pd.read_parquet(embed(texts[1], texts[0], tmp_path/'f.parquet', 'cpu'))][:4] == ['file','label','split','f0']

def test_clips(tmp_path):
    for i in range(12):
        for j in range(16 if i==0 else 8): picture(tmp_path/'clips'/('test' if i>8 else 'train')/'ab'[i%2]/f'{i:02}'/f'{j}.png', 20*i+j)
    run = trained(tmp_path/'clips', 'frame_order')
    got = known(features_of(run, tmp_path/'clips', 'cpu')[0])
    assert len(got)==13 and got['train/a/00#1'][0]=='a' and got['test/b/11'] == ('b','test')
    (tmp_path/'two'/'x').mkdir(parents=True)
    for c in 'pq':
        for j in range(8): picture(tmp_path/'two'/c/f'{j}.png', j)
    (tmp_path/'two'/'clips.csv').write_text('clip,label,split\np,one,test\nq,two,train\n')
    assert known(features_of(run, tmp_path/'two', 'cpu')[0]) == dict(p=('one','test'), q=('two','train'))

def test_pairs(tmp_path):
    "Labels stand in the table, also where a folder is given; the captions go to the map"
    d = tmp_path/'pairs'
    for i in range(24): picture(d/'pics'/f'{i:02}.png', i)
    rows = [f'pics/{i:02}.png,picture {i} of a {"cat" if i%2 else "dog"},{"cat" if i%2 else "dog"}' for i in range(24)]
    (d/'table.csv').write_text('\n'.join(['file,text,label', *rows]))
    run = trained(d, 'simclr')
    assert json.loads((run/'config.json').read_text())['info']['kind'] == 'pairs'
    facts = features_of(run, d, 'cpu')[0]
    assert len(facts)==24 and {*facts.split} == {'train','valid','test'}
    assert facts.iloc[3][['file','label','caption']].tolist() == ['pics/03.png','cat','picture 3 of a cat']


# ---- copies and strays

def clouds(n=400, d=16, seed=0):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n,d)) + 4*rng.normal(size=(8,d))[rng.integers(8, size=n)]
    return h.astype(np.float32), pd.DataFrame(dict(file=[f'{i}' for i in range(n)], label='', split='')), rng

def test_no_copies_where_there_are_none():
    for seed in range(3): assert len(near_duplicates(*clouds(seed=seed)[:2])) <= 2

@pytest.mark.parametrize('copies', [1,7])
def test_copies_of_any_number_are_found(copies):
    h,facts,rng = clouds()
    for i in range(copies): h[100+10*i:110+10*i] = h[:10] + 0.02*rng.normal(size=(10,16))
    found = {(int(a)%10, int(b)%10) for a,b in zip(*(near_duplicates(h, facts)[c] for c in ('file','copy')))}
    assert found == {(i,i) for i in range(10)}

def test_exact_copies_come_first(images):
    h,facts,rng = clouds(50)
    keys = [*range(49),7]
    df = near_duplicates(np.r_[h[:49], h[7:8]], facts, keys=keys)
    assert (df.iloc[0].file, df.iloc[0]['copy'], df.iloc[0].exact) == ('7','49',True)

def test_strays_in_a_group_are_found():
    h,facts,rng = clouds()
    h[200:210] = 12*rng.normal(size=16) + rng.normal(size=(10,16))
    assert {*map(int, outliers(h, facts).file[:10])} == {*range(200,210)}

def test_features_that_are_all_the_same():
    h,facts,_ = clouds(30)
    assert np.isfinite(outliers(0*h+1, facts).distance).all() and np.isfinite(place(0*h+1)).all()
    assert len(near_duplicates(0*h+1, facts))==0 # nothing is nearer than the others

@pytest.mark.parametrize('channels', [1,2,3,4,7])
def test_thumbnails_of_any_channels(channels):
    x = torch.full((2,channels,9,27), 0.6)
    x[...,9:] = 1 # the frames after the first
    assert (thumbnails(x, 4)==153).all()


# ---- the page

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "A map of 60 images in three colours, one of them with a bad name, one there twice"
    d = tmp_path_factory.mktemp('map')/'data'
    for i in range(60):
        f = d/['red','green','blue'][i%3]/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        a = np.random.default_rng(i).integers(0, 80, (16,16,3), np.uint8)
        a[...,i%3] += 150
        Image.fromarray(a).save(f)
    Image.fromarray(a).save(d/'blue'/'<img src=x onerror=alert(1)>.png')
    return map_files(trained(d, 'simclr'), d, d.with_name('map.html'), device='cpu')

def test_the_tables_beside_it(page):
    copies,far = [pd.read_csv(page.with_name(f'map-{n}.csv')) for n in ('duplicates','outliers')]
    assert {copies.file[0], copies['copy'][0]} == {'blue/59.png','blue/<img src=x onerror=alert(1)>.png'} and copies.exact[0]
    assert {'similarity','usual','label','label of copy','split','split of copy'} <= {*copies} and [*far] == ['file','label','split','distance'] and len(far)==30

def test_in_a_browser(page):
    if not find_chromium(): pytest.skip('no Chromium is installed')
    b = Browser(find_chromium())
    try:
        b.open(page.as_uri())
        ink = "[...g.getImageData(0, 0, map.width, map.height).data].filter((v, i) => i % 4 === 3 && v).length"
        b.wait_for(f'{ink} > 5000')
        x,y = b.js("(([x, y]) => { const r = map.getBoundingClientRect(); return [x + r.left, y + r.top] })(at(7))")
        b.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
        b.wait_for("document.querySelector('#card b')?.textContent === D.files[chosen]")
        assert b.js("document.querySelectorAll('#card .row button').length") == 5
        b.js("map.focus()")
        for kind in ('keyDown','keyUp'): b.send('Input.dispatchKeyEvent', type=kind, key='ArrowRight')
        for kind in ('keyDown','keyUp'): b.send('Input.dispatchKeyEvent', type=kind, key='+')
        assert b.js('view.s') > 1
        b.js("$('find').value = 'RED/'; $('find').dispatchEvent(new Event('input'))")
        assert b.js("$('count').textContent") == '20 of 61'
        assert b.js("[...document.querySelectorAll('h2')].map(o => o.textContent)") == ['Near-duplicates','Outliers']
        b.js("document.querySelector('.strip button').click()")
        assert b.js("document.querySelector('#card b').textContent").startswith('blue/')
        assert b.js("document.querySelectorAll('img').length") == 1 # the sprite: a name is text, whatever it contains
        assert not b.errors and {r.split(':')[0] for r in b.requests} == {'file','data'}
    finally: b.close()

def test_names_cannot_end_the_script():
    facts,h = clouds(5)[1],clouds(5)[0]
    facts.loc[0,'file'] = '</script><script>alert(1)</script>'
    html = map_html(facts, h, None, near_duplicates(h, facts), outliers(h, facts))
    assert html.count('</script>')==2 and '\\u003c/script>' in html

def test_more_samples_than_fit(images, tmp_path, capsys):
    "A random part of them, but all that the lists name"
    page = map_files(images[1], images[0], tmp_path/'m.html', 'cpu', limit=35)
    data = json.loads(page.read_text().split('application/json">')[1].split('</script>')[0])
    assert len(data['files'])==35 and '35 of 40 images' in data['note'] and '35 of 40 samples' in capsys.readouterr().out
    assert {*pd.read_csv(tmp_path/'m-outliers.csv').file} <= {*data['files']}
    assert all(0<=i<35 for near in data['near'] for i in near)

def test_a_map_of_texts(texts, tmp_path):
    page = map_files(texts[1], texts[0], tmp_path/'m.html', 'cpu')
    data = json.loads(page.read_text().split('application/json">')[1].split('</script>')[0])
    assert data['tile']==0 and data['captions'][0].startswith('number') and data['by'][0]['names']==['glad','sad']


# ---- what cannot work

def test_bad_input(images, texts, tmp_path, capsys):
    def said(*args):
        assert main([*map(str, args), '--device', 'cpu'])==2
        return capsys.readouterr().err
    d,run = images
    for i in range(2): picture(tmp_path/'two'/f'{i}.png', i)
    assert 'must end in .html' in said('map', run, d, '--out', tmp_path/'map.png')
    (tmp_path/'map.html').mkdir()
    assert 'is a folder' in said('map', run, d, '--out', tmp_path/'map.html')
    assert 'at least 3' in said('map', run, tmp_path/'two', '--out', tmp_path/'m.html') and not (tmp_path/'m.html').exists()
    assert "no data at" in said('map', run, tmp_path/'nowhere')
    assert 'config.json is missing' in said('map', d, d)
    assert 'no text' in said('map', texts[1], d) and "'pydoc' is text" in said('embed', run, 'pydoc')
    assert f"was trained on '{d}'" in said('embed', run, 'mnist')
    assert 'samples must be at least 1' in said('map', run, d, '--limit', 0)
    with pytest.raises(FileNotFoundError, match='ssl_nb embed RUN DATA'): load_features(tmp_path/'f.parquet')
    (tmp_path/'bad.npz').write_bytes(b'no features')
    with pytest.raises(ValueError, match='bad.npz holds no features'): load_features(tmp_path/'bad.npz')

def test_many_thumbnails_become_smaller():
    looks = Looks(lambda x: x, 48, many=20)
    for _ in range(3): looks(torch.full((9,3,48,48), 0.6))
    assert np.concatenate(looks.rgb).shape == (27,32,32,3) and len(looks.keys)==27 and (looks.rgb[0]==153).all()
