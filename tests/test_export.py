"`ssl_nb export`, by the command: each format read by its own library, what is left behind, what is refused"
import importlib
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from ssl_nb.app.cli import main
from ssl_nb.app.export import TO, difference
from ssl_nb.app.run import load_run, pretrain
from ssl_nb.core.encoders import load_encoder


def run_of(folder, method, data, encoder):
    return pretrain(method, str(data), folder/encoder, encoder=encoder, epochs=1, batch_size=32, device='cpu', supervised=False)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One run of a network that timm has, one of a network that it has not, one of text"
    d = tmp_path_factory.mktemp('runs')
    data = load_digits()
    for i in range(200):
        (d/'digits'/str(data.target[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i]*15).astype('uint8')).save(d/'digits'/str(data.target[i])/f'{i}.png')
    text = d/'texts'
    for c,words in dict(sea='wave ship salt', wood='oak leaf moss').items():
        (text/c).mkdir(parents=True)
        for i in range(24): (text/c/f'{i}.txt').write_text(' '.join(words.split()[(i+k)%3] for k in range(12)))
    return dict(small_vit=run_of(d, 'mae', d/'digits', 'small_vit'), small_resnet=run_of(d, 'rotation', d/'digits', 'small_resnet'),
                small_text=run_of(d, 'bert', text, 'small_text'))


def export(run, to, out): return main(['export', str(run), '--to', to, '--out', str(out)])


def pixels(n=7, seed=0): return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def features(run, x):
    with torch.no_grad(): return load_run(run)[1].eval()(x)


def padded(ids, length): return ids+[0]*(length-len(ids))


def read(to, folder, x):
    "Features by the library that the export is for"
    if to=='onnx':
        import onnxruntime
        return onnxruntime.InferenceSession(str(folder/'encoder.onnx'), providers=['CPUExecutionProvider']).run(None, dict(x=x.numpy()))[0]
    with torch.no_grad():
        if to=='torchscript': return torch.jit.load(str(folder/'encoder.pt'))(x)[0]
        if to=='hf': return load_encoder(folder).eval()(x)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        mean,std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ('mean','std'))
        return model((x-mean)/std)


@pytest.mark.parametrize('to', list(TO))
def test_features_are_those_of_the_run(runs, tmp_path, to):
    "At sizes of the batch that the exporter has not tried"
    assert export(runs['small_vit'], to, tmp_path/'out') == 0
    for n in (1,7,33): assert difference(read(to, tmp_path/'out', pixels(n)), features(runs['small_vit'], pixels(n))) < 1e-4
    card = (tmp_path/'out'/'README.md').read_text()
    assert '# mae on digits' in card and 'ssl_nb export' in card and ('onnxruntime' if to=='onnx' else to if to!='hf' else 'load_encoder') in card


@pytest.mark.parametrize('to', ['onnx','torchscript','hf'])
def test_a_network_of_this_library_travels(runs, tmp_path, to):
    assert export(runs['small_resnet'], to, tmp_path/'out') == 0
    assert difference(read(to, tmp_path/'out', pixels()), features(runs['small_resnet'], pixels())) < 1e-4


def test_text_takes_its_tokenizer_along(runs, tmp_path):
    from tokenizers import Tokenizer
    assert export(runs['small_text'], 'onnx', tmp_path/'out') == 0
    tokenizer = Tokenizer.from_file(str(tmp_path/'out'/'tokenizer.json'))
    length = json.loads((runs['small_text']/'config.json').read_text())['info']['max_len']
    ids = torch.tensor([padded(tokenizer.encode(t).ids, length) for t in ('ship salt wave', 'oak moss')])
    assert difference(read('onnx', tmp_path/'out', ids), features(runs['small_text'], ids)) < 1e-4


def test_export_again_replaces_only_an_export(runs, tmp_path):
    out = tmp_path/'out'
    assert export(runs['small_resnet'], 'onnx', out) == 0
    first = (out/'encoder.onnx').read_bytes()
    assert export(runs['small_vit'], 'onnx', out) == 0 and (out/'encoder.onnx').read_bytes() != first
    assert export(runs['small_vit'], 'torchscript', out) == 2 and {f.name for f in out.iterdir()} == {'encoder.onnx','README.md'}


@pytest.mark.parametrize('run,to,said', [('small_resnet', 'timm', 'timm alone cannot build small_resnet'), ('small_text', 'timm', 'timm has no'),
                                         ('small_vit', 'onxx', 'onnx')])
def test_refused_and_nothing_left(runs, tmp_path, capsys, run, to, said):
    try: code = export(runs[run], to, tmp_path/'out')
    except SystemExit as e: code = e.code # argparse knows the formats
    assert code == 2 and said in capsys.readouterr().err and [*tmp_path.iterdir()] == []


def test_without_onnxruntime_the_error_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    load = importlib.import_module
    def missing(name, *args):
        if name=='onnxruntime': raise ImportError("No module named 'onnxruntime'", name=name)
        return load(name, *args)
    monkeypatch.setattr('ssl_nb.app.export.importlib.import_module', missing)
    assert export(runs['small_vit'], 'onnx', tmp_path/'out') == 2
    assert 'onnxruntime' in (err := capsys.readouterr().err) and 'pip install ssl_nb[export]' in err and not (tmp_path/'out').exists()


def test_an_export_that_differs_is_not_kept(runs, tmp_path, capsys, monkeypatch):
    "What was there before stays"
    out = tmp_path/'out'
    assert export(runs['small_vit'], 'torchscript', out) == 0
    before = (out/'encoder.pt').read_bytes()
    load = torch.jit.load
    monkeypatch.setattr('ssl_nb.app.export.torch.jit.load', lambda f: lambda x: [o+1e-2 for o in load(f)(x)])
    assert export(runs['small_vit'], 'torchscript', out) == 2
    assert 'encoder.pt differs by' in capsys.readouterr().err and (out/'encoder.pt').read_bytes() == before


def test_loading_names_each_weight_that_does_not_fit(runs, tmp_path):
    "Against the checksums the file is named; in a folder without them, as others write it, each weight"
    assert export(runs['small_resnet'], 'hf', tmp_path/'out') == 0
    file = next((tmp_path/'out').glob('*.safetensors'))
    weights = load_file(file)
    name = next(iter(weights))
    weights['extra'] = weights.pop(name)
    save_file(weights, file, dict(format='pt'))
    with pytest.raises(ValueError, match=f'{file.name} is damaged or of another encoder'): load_encoder(tmp_path/'out')
    cfg = json.loads((tmp_path/'out'/'config.json').read_text())
    (tmp_path/'out'/'config.json').write_text(json.dumps({k: v for k,v in cfg.items() if not k.endswith('sha256')}))
    with pytest.raises(ValueError) as e: load_encoder(tmp_path/'out')
    assert 'extra' in str(e.value) and name in str(e.value)


def test_an_unfinished_run_is_refused(runs, tmp_path, capsys):
    half = tmp_path/'half'
    shutil.copytree(runs['small_vit'], half)
    shutil.rmtree(half/'encoder')
    assert export(half, 'onnx', tmp_path/'out') == 2
    assert str(half) in capsys.readouterr().err and not (tmp_path/'out').exists()
