"A classifier from a run and some labels, by the commands: what is written, what it says, what it refuses"
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import timm
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from conftest import put_in_hub, quiet
from ssl_nb.app.checks import read_record
from ssl_nb.app.cli import main
from ssl_nb.data.parts import three_parts
from ssl_nb.app.finetune import judged, labelled_dls, least_sure, load_finetuned
from ssl_nb.app.run import load_run, pretrain
from ssl_nb.transfer.label_efficiency import curve_table, label_curve, labels_needed, plot_label_curve

COLORS = dict(red=(220,30,30), green=(30,200,30), blue=(30,30,220))
SHORT = '--epochs','3','--device','cpu'


def picture(path, color, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-25, 26, (16,16,3))
    Image.fromarray((np.array(color)+noise).clip(0, 255).astype(np.uint8)).save(path)


def coloured(folder, n=20):
    for c,rgb in COLORS.items():
        for i in range(n): picture(folder/c/f'{i:02}.png', rgb, i)
    return folder


def run_of(method, data): return pretrain(method, data, data.with_name('run'), epochs=1, batch_size=16, device='cpu', supervised=False)


def record(folder): return read_record(folder/'finetune.json', ('result','temperature'))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "(folder of images, run, classifier)"
    d = coloured(tmp_path_factory.mktemp('images')/'data')
    run = run_of('rotation', d)
    out = d.with_name('classifier')
    assert quiet(main, ['finetune', str(run), str(d), '--labels', '5', '--out', str(out), *SHORT])[0] == 0
    return d,run,out


# ---- what is written

def test_folder_of_a_classifier(images):
    d,_,out = images
    there = {'encoder','head.safetensors','finetune.json','confusion.png','reliability.png','uncertain.csv','uncertain.png'}
    assert there <= {f.name for f in out.iterdir()}
    cfg = record(out)
    r = cfg['result']
    M = np.array(r['confusion'])
    assert cfg['classes'] == sorted(COLORS) and cfg['labels_per_class'] == 5
    assert M.sum() == r['samples'] == 12 and M.sum(1).tolist() == [4,4,4] # a fifth of each class
    assert r['accuracy'] == pytest.approx(100*M.trace()/M.sum()) and r['commonest'] == pytest.approx(100/3)
    assert r['accuracy'] > 90 # three colours


def test_numbers_of_the_test_part_are_those_of_the_saved_classifier(images):
    "Read the files again from disk, and count by hand"
    d,_,out = images
    files = sorted(d.rglob('*.png'))
    y = np.array([sorted(COLORS).index(f.parent.name) for f in files])
    held = [files[i] for i in three_parts(['train']*len(y), y, test=0.2)[2]]
    unsure = pd.read_csv(out/'uncertain.csv')
    assert {d.joinpath(f).name for f in unsure.file} == {f.name for f in held} and len(unsure) == len(held)
    said = d.with_name('said.csv')
    assert main(['predict', str(out), str(d), '--out', str(said), '--device', 'cpu']) == 0
    t = pd.read_csv(said)
    t.index = ['/'.join(f.split('/')[-2:]) for f in t.file]
    names = ['/'.join(f.parts[-2:]) for f in held]
    share = accuracy_score([n.split('/')[0] for n in names], t.loc[names, 'prediction'])
    assert 100*share == pytest.approx(record(out)['result']['accuracy'])
    gap = unsure.probability-unsure.its_probability
    assert (gap.diff().dropna() >= -1e-4).all() # the least sure first


def test_prediction_table(images, tmp_path):
    "Probabilities are those of the model at its temperature; a broken file is left out and told"
    d,_,out = images
    picture(tmp_path/'new'/'a.png', COLORS['red'], 99)
    picture(tmp_path/'new'/'b.png', COLORS['blue'], 98)
    (tmp_path/'new'/'c.png').write_bytes(b'no image')
    rc,said = quiet(main, ['predict', str(out), str(tmp_path/'new'), '--out', str(tmp_path/'t.csv'), '--device', 'cpu'])
    t = pd.read_csv(tmp_path/'t.csv')
    assert rc == 0 and len(t) == 2 and any('1' in s and 'c.png' in s for s in said)
    cfg,model = load_finetuned(out)
    x = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path/'new'/f'{n}.png'))) for n in 'ab'])
    with torch.no_grad(): p = (model(x.permute(0,3,1,2).float()/255)/cfg['temperature']).softmax(1).sort(1, descending=True)
    np.testing.assert_allclose(t[['probability','its_probability']], p[0][:,:2], atol=2e-4)
    assert t.prediction.tolist() == [cfg['classes'][i] for i in p[1][:,0]] == ['red','blue']
    assert t.runner_up.tolist() == [cfg['classes'][i] for i in p[1][:,1]]


@pytest.mark.parametrize('train', ['head','gradual'])
def test_frozen_and_gradual(images, tmp_path, train):
    d,run,_ = images
    assert main(['finetune', str(run), str(d), '--train', train, '--out', str(tmp_path/'o'), *SHORT]) == 0
    a = load_finetuned(tmp_path/'o')[1].encoder.state_dict()
    before = load_run(run)[1].state_dict()
    assert all(torch.equal(v, before[k]) for k,v in a.items()) == (train=='head')


def test_another_encoder_is_asked_about_the_same_files(images, tmp_path):
    "Otherwise the two accuracies could not be compared"
    d,run,out = images
    args = ['finetune', str(d), '--encoder', 'small_cnn', '--labels', '5', '--out', str(tmp_path/'o'), *SHORT]
    assert quiet(main, args)[0] == 0
    files = lambda o: sorted(pd.read_csv(o/'uncertain.csv').file)
    assert files(tmp_path/'o') == files(out)
    assert main(['predict', str(tmp_path/'o'), str(d/'red'), '--out', str(tmp_path/'t.csv'), '--device', 'cpu']) == 0


@pytest.mark.parametrize('way', ['run','name'])
def test_texts(tmp_path, way):
    d = tmp_path/'words'
    d.mkdir()
    row = lambda i: f'"number {i} is a {["sad","glad"][i%2]} one, said nobody but {"xyz"[i%3]}",{["sad","glad"][i%2]}\n'
    for part,ids in dict(train=range(60), test=range(60,80)).items():
        (d/f'{part}.csv').write_text('text,label\n' + ''.join(map(row, ids)))
    first = [str(run_of('sentence_order', d)), str(d)] if way=='run' else [str(d), '--encoder', 'small_text']
    assert quiet(main, ['finetune', *first, '--out', str(tmp_path/'o'), '--epochs', '8', '--device', 'cpu'])[0] == 0
    assert record(tmp_path/'o')['result']['samples'] == 20 # the part that the files name
    assert (tmp_path/'o'/'tokenizer.json').exists() and not (tmp_path/'o'/'uncertain.png').exists()
    assert quiet(main, ['predict', str(tmp_path/'o'), str(d/'test.csv'), '--out', str(tmp_path/'t.csv'), '--device', 'cpu'])[0] == 0
    assert len(pd.read_csv(tmp_path/'t.csv')) == 20


# ---- what is refused

def test_sounds(tmp_path):
    "Low and high tones, from a run on sounds to a table of predictions"
    rng = np.random.default_rng(0)
    for name,pitch in (('low', 200), ('high', 1500)):
        (tmp_path/'tones'/name).mkdir(parents=True)
        for i in range(20):
            wave = 0.4*np.sin(2*np.pi*(pitch+10*i)*np.arange(3000)/8000) + 0.05*rng.standard_normal(3000)
            soundfile.write(tmp_path/'tones'/name/f'{i:02}.wav', wave, 8000)
    run = pretrain('hubert', tmp_path/'tones', tmp_path/'run', epochs=1, batch_size=8, device='cpu', supervised=False)
    out,table = tmp_path/'classifier',tmp_path/'p.csv'
    assert quiet(main, ['finetune', str(run), str(tmp_path/'tones'), '--out', str(out), '--epochs', '8', '--device', 'cpu'])[0]==0
    assert record(out)['classes']==['high','low']
    assert quiet(main, ['predict', str(out), str(tmp_path/'tones'/'low'), '--out', str(table), '--device', 'cpu'])[0]==0
    found = pd.read_csv(table)
    assert len(found)==20 and (found.prediction=='low').mean() > 0.9


def test_a_refusal_leaves_no_folder(images, tmp_path, capsys):
    d,run,_ = images
    assert main(['finetune', str(run), str(d), '--labels', '500', '--out', str(tmp_path/'a'/'c'), *SHORT])==2
    assert 'per_class must be at least 1' in capsys.readouterr().err and not (tmp_path/'a').exists()


def test_the_weights_of_a_timm_encoder_are_taken(images, tmp_path, offline, capsys):
    "As the hub's cache holds them; a frozen encoder ends as it began"
    torch.manual_seed(5)
    weights = timm.create_model('test_resnet').state_dict()
    put_in_hub(offline, 'test_resnet.r160_in1k', weights)
    args = ['finetune', str(images[0]), '--encoder', 'test_resnet', '--pretrained', '--train', 'head', '--out', str(tmp_path/'o'), *SHORT]
    assert quiet(main, args)[0] == 0, capsys.readouterr().err
    cfg,model = load_finetuned(tmp_path/'o')
    mine = model.encoder.model.state_dict()
    assert cfg['pretrained'] is True and cfg['encoder'] == 'test_resnet'
    assert all(torch.equal(v, weights[k]) for k,v in mine.items() if 'running' not in k and 'num_batches' not in k)
    assert model.encoder.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg('test_resnet').mean)


@pytest.mark.parametrize('more,said', [
    (['--labels','500'], 'has'), (['--labels','0'], 'per_class must be at least 1'), (['--label','colour'], "no label 'colour'"),
    (['--encoder','resnet18'], 'give the folder of a run'), (['--epochs','0'], 'epochs')])
def test_refused_settings(images, tmp_path, capsys, more, said):
    d,run,_ = images
    assert main(['finetune', str(run), str(d), '--out', str(tmp_path/'o'), '--device', 'cpu', *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path/'o'/'finetune.json').exists()


def test_data_without_labels(images, tmp_path, capsys):
    for i in range(8): picture(tmp_path/'bare'/f'{i}.png', (9,9,9), i)
    for i in range(8): picture(tmp_path/'one'/'same'/f'{i}.png', (9,9,9), i)
    for i in range(4): picture(tmp_path/'few'/'ab'[i%2]/f'{i}.png', (9,9,9), i)
    for name,said in dict(bare='has no labels', one='has no labels', few='too few labelled').items():
        assert quiet(main, ['finetune', str(images[1]), str(tmp_path/name), *SHORT])[0] == 2
        assert said in capsys.readouterr().err
        assert quiet(main, ['finetune', str(tmp_path/name), '--encoder', 'small_cnn', '--out', str(tmp_path/'x'), *SHORT])[0] == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize('file', ['head.safetensors','finetune.json','encoder/encoder.safetensors'])
def test_damaged_classifiers_are_named(images, tmp_path, capsys, file):
    bad = tmp_path/'bad'
    shutil.copytree(images[2], bad)
    f = bad/file if (bad/file).exists() else next((bad/'encoder').glob('*.safetensors'))
    f.write_bytes(f.read_bytes()[:40])
    assert main(['predict', str(bad), str(images[0]), '--out', str(tmp_path/'t.csv'), '--device', 'cpu']) == 2
    assert f.name in capsys.readouterr().err and not (tmp_path/'t.csv').exists()


# ---- numbers

def test_judged_and_least_sure_by_hand():
    logits = torch.tensor([[4.,0,0],[0,2.,1.9],[0,0,1.],[3.,2.9,0]])
    y = torch.tensor([0,1,0,-1])
    r = judged(logits, y, 2., 'abc')
    assert r['samples'] == 3 and r['accuracy'] == pytest.approx(200/3) and r['commonest'] == pytest.approx(200/3)
    assert r['confusion'] == [[1,0,1],[0,1,0],[0,0,0]]
    t = least_sure(logits, list('wxyz'), list('abc'), 1., 2)
    assert {*t.file} == {'x','z'} and t.set_index('file').loc['x','runner_up'] == 'c'


def test_label_curve_counts_and_draws(images):
    cfg,enc = load_run(images[1])
    dls = labelled_dls(cfg, images[1], images[0])[0]
    c = label_curve({'ours': enc}, dls, (1,None), seeds=2, epochs=1)
    sizes = c.groupby(['encoder','how','labels'], sort=False).size().to_dict()
    assert sizes == {('raw input','probe',1): 2, ('raw input','probe','all'): 1, ('ours','probe',1): 2, ('ours','probe','all'): 1,
                     ('ours','finetune',1): 2, ('ours','finetune','all'): 2, ('from scratch','scratch',1): 2, ('from scratch','scratch','all'): 2}
    assert c[c.labels=='all'].per_class.unique().tolist() == [dls.train.n/3] and c.accuracy.between(0, 100).all()
    assert curve_table(c).columns.tolist() == [1,'all'] and len(plot_label_curve(c).axes[0].lines) == 4
    same = label_curve({'ours': enc}, dls, (1,), ['probe','finetune'], 2, epochs=1, raw=False)
    want = c[(c.labels==1) & (c.encoder=='ours')].reset_index(drop=True)
    pd.testing.assert_frame_equal(want.drop(columns='labels'), same.drop(columns='labels')) # all again, bit by bit
    assert labels_needed([1,10], [50.,60.], 55.) == pytest.approx(10**0.5)
