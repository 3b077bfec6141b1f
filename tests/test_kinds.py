"""A new kind of data is one new file: time series of three channels, added to a copy of the package, are trained on, reported on,
embedded and compared by commands that know nothing of them."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT

# What its notebook would export: a kind, the loaders, an encoder and a random view.
SERIES = '''
from pathlib import Path
import numpy as np, torch
from torch import nn
from ssl_nb.core.loader import DataInfo, Kind, ResidentDL, cut, make_dls


class SeriesEncoder(nn.Module):
    "Two convolutions over time; series (B,C,T) to features (B,64)"
    def __init__(self, channels=3):
        super().__init__()
        self.args,self.num_features = dict(channels=channels),64
        self.net = nn.Sequential(nn.Conv1d(channels, 32, 5, 2), nn.ReLU(), nn.Conv1d(32, 64, 5, 2), nn.ReLU())

    def forward_features(self, x): return self.net(x) # (B,64,T')
    def forward(self, x): return self.forward_features(x).mean(2)
    def tokens(self, x, keep=None): return self.forward_features(x).transpose(1, 2),None


def noisy(x): return x*torch.empty(len(x),1,1).uniform_(0.8, 1.2) + 0.2*torch.randn_like(x)


def read(path):
    "(series (N,C,T), labels (N,)) of a file"
    with np.load(path) as f: return torch.tensor(f['x']).float(),f['y']


class Series(Kind):
    "Time series (B,C,T) in .series files with x and y"
    default_encoder = 'small_series'

    @classmethod
    def read(cls, path, bs=64, device=None, seed=0, size=None, limit=None, kept=None):
        x,y = read(path)
        rest,test = cut(np.arange(len(y)), y, 0.25)
        train,valid = cut(rest, y, 0.1)
        info = DataInfo(Path(path).stem, kind='series', channels=x.shape[1], classes={'wave': ['sine','square']})
        return make_dls([((x[i],), y[i]) for i in (train, valid, test)], info, bs=bs, device=device, seed=seed)

    @classmethod
    def suits(cls, path): return float(Path(path).suffix=='.series')
    @classmethod
    def files(cls, path, info, bs=64, device=None, kept=None):
        dl = ResidentDL(read(path)[0], bs=bs, device=device)
        dl.files,dl.info = [f'{Path(path).name}:{i}' for i in range(dl.n)],info
        return dl
    @classmethod
    def encoder(cls, name, info, **kwargs):
        if name!='small_series': raise ValueError(f'unknown encoder {name!r}; series have small_series')
        return SeriesEncoder(info.channels)
    @classmethod
    def views(cls, info, small=False): return noisy
    @classmethod
    def show(cls, x, info=None): return x[:,:,None].repeat(1, 1, 8, 1).sigmoid() # a stripe for each series
'''


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A copy of the package with one more file, and a file of 240 series"
    d = tmp_path_factory.mktemp('kinds')
    shutil.copytree(ROOT/'ssl_nb', d/'ssl_nb', ignore=shutil.ignore_patterns('__pycache__'))
    (d/'ssl_nb'/'data'/'series.py').write_text(SERIES)
    rng = np.random.default_rng(0)
    y = np.arange(240)%2
    t = np.linspace(0, 12, 64) + rng.uniform(0, 6, (240,3,1))
    wave = np.sin(t)
    x = np.where(y[:,None,None]==0, wave, np.sign(wave)) + 0.1*rng.normal(size=wave.shape)
    with open(d/'waves.series', 'wb') as f: np.savez(f, x=x.astype(np.float32), y=y)
    return d


def ssl_nb(place, *args):
    "Run the command with the copied package; what it printed"
    code = 'import sys; from ssl_nb.app.cli import main; sys.exit(main())'
    env = os.environ | {'PYTHONPATH': str(place)}
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    return done.stdout


def test_train_report_and_embed(place):
    run,features = place/'run',place/'features.parquet'
    said = ssl_nb(place, 'pretrain', 'simclr', '--data', 'waves.series', '--epochs', 8, '--batch-size', 32, '--out', run, '--device', 'cpu')
    assert 'simclr on waves: 162 training samples, small_series' in said
    table = json.loads((run/'report.json').read_text())['table']
    assert table['this encoder']['probe 10'] > 90 and {'raw input','random encoder','supervised'} <= set(table)
    assert (run/'pretext.png').exists() and json.loads((run/'config.json').read_text())['info']['kind']=='series'
    assert 'this encoder' in ssl_nb(place, 'report', run, '--device', 'cpu')
    ssl_nb(place, 'embed', run, 'waves.series', '--out', features, '--device', 'cpu')
    h = pd.read_parquet(features)
    assert h.shape==(240, 67) and h.file[7]=='waves.series:7'


def test_compare(place):
    said = ssl_nb(place, 'compare', '--data', 'waves.series', '--methods', 'simclr,vicreg', '--epochs', 2, '--workers', 1,
                  '--out', place/'compare', '--device', 'cpu')
    assert 'simclr' in said and 'vicreg' in said and 'Left out' not in said
    ranked = pd.read_csv(place/'compare'/'ranking.csv')
    assert set(ranked.method)=={'simclr','vicreg'} and (ranked.probe > 60).all()


def test_methods_of_other_kinds_say_so(place):
    code = 'import sys; from ssl_nb.app.cli import main; sys.exit(main())'
    done = subprocess.run([sys.executable, '-c', code, 'pretrain', 'rotation', '--data', 'waves.series'], cwd=place,
                          env=os.environ | {'PYTHONPATH': str(place)}, capture_output=True, text=True)
    assert done.returncode==2 and 'waves.series' in done.stderr and 'Traceback' not in done.stderr


def test_the_rest_of_the_library_does_not_ask_for_the_kind():
    "What depends on the kind of data is asked of its class; a comparison with a name would be a place that a new kind has to change"
    from ssl_nb.core.loader import find_kinds
    files,names = [p for p in (ROOT/'ssl_nb').rglob('*.py') if p.parent.name!='data'],'|'.join([*find_kinds(),'audio'])
    asks = [f'{p.relative_to(ROOT)}:{n}: {line.strip()}' for p in files for n,line in enumerate(p.read_text().splitlines(), 1)
            if re.search(rf'\b(kind|modality) *[!=]= *[\'"]({names})', line)]
    assert len(files) > 40 and not asks, '\n'.join(asks)


def test_pairs_serve_methods_of_any_kind(tmp_path):
    "SimCLR and its report take the images of pairs; the rows trained with labels can be left out"
    from ssl_nb.app.cli import main
    run = tmp_path/'run'
    assert main(['pretrain', 'simclr', '--data', 'painted', '--epochs', '1', '--out', str(run), '--device', 'cpu', '--no-supervised']) == 0
    assert {*json.loads((run/'report.json').read_text())['table']} == {'raw input', 'random encoder', 'this encoder'}


def kinds_of(path):
    from ssl_nb.app.folder import guess_kind
    return guess_kind(path)


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image
    for i in range(8): Image.new('RGB', (16,16), (30*i,0,0)).save(tmp_path/f'{i}.png')
    return tmp_path


@pytest.mark.parametrize('columns,kind', [
    ('text,label', 'text'), ('label,text,split', 'text'), ('text,file', 'text'), ('file,texture', 'images'), ('image,texture', 'images'),
    ('file,label,context', 'images'), ('image,text', 'pairs'), ('file,text', 'pairs'), ('path,caption', 'pairs'), ('file_name,text,label', 'pairs')])
def test_the_columns_of_a_table_say_its_kind(pictures, columns, kind):
    "A column `texture` is no text, and texts beside names of images are pairs; the same in every form of a table"
    cell = dict(text='a red square', caption='a red square', label='x', split='train', texture='rough', context='some')
    rows = [{c: cell.get(c, f'{i}.{"txt" if columns=="text,file" else "png"}') for c in columns.split(',')} for i in range(8)]
    df = pd.DataFrame(rows)
    df.to_csv(pictures/'t.csv', index=False)
    df.to_csv(pictures/'semicolons.csv', index=False, sep=';')
    df.to_json(pictures/'t.jsonl', orient='records', lines=True)
    df.to_parquet(pictures/'t.parquet')
    found = {f: kinds_of(pictures/f) for f in ('t.csv','semicolons.csv','t.jsonl','t.parquet')}
    assert set(found.values())=={kind}, found


def test_captions_beside_pictures_are_pairs(pictures):
    "One .txt beside each image, or one table of them; a lone README beside images changes nothing"
    from ssl_nb.data.pairs import Pairs
    (pictures/'README.txt').write_text('pictures')
    assert kinds_of(pictures)=='images'
    for i in range(8): (pictures/f'{i}.txt').write_text(f'square number {i}')
    assert kinds_of(pictures)=='pairs'
    with pytest.warns(UserWarning, match=r'left out: 1 texts without an image .README.txt.'): dls = Pairs.read(pictures, bs=2)
    seen = {f: c for dl in dls.loaders for f,c in zip(dl.files, dl.captions)}
    assert seen=={f'{i}.png': f'square number {i}' for i in range(8)} and dls.info.skipped==1
    assert dls.info.read.startswith('8 texts of 8 images: train')
    for i in range(8): (pictures/f'{i}.txt').unlink()
    pd.DataFrame(dict(file_name=[f'{i}.png' for i in range(8)], text=[f'square {i}' for i in range(8)])).to_csv(pictures/'metadata.csv', index=False)
    assert kinds_of(pictures)=='pairs' and len(Pairs.read(pictures, bs=2).train.files)


def test_tables_of_texts_named_by_split_are_text(tmp_path):
    for s in ('train','test'): pd.DataFrame(dict(text=['one two','three'], label=[0,1])).to_csv(tmp_path/f'{s}.csv', index=False)
    assert kinds_of(tmp_path)=='text'
    (tmp_path/'train.csv').write_text('text\n"broken')
    assert kinds_of(tmp_path) in ('text','images')
