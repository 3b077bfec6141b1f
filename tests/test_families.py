"Pretext tasks and autoencoders as families: what holds for every method, whoever adds one."
import pytest
import torch

from ssl_nb.data.embedded import photos_dls
from ssl_nb.core.learner import ssl_learner
from ssl_nb.core.method import find_methods, kinds_of
from ssl_nb.app.folder import run_config
from ssl_nb.app.run import build

METHODS = sorted(k for k, c in find_methods().items() if c.__module__.split('.')[1] in ('pretext', 'autoencoders'))
IMAGES = [k for k in METHODS if 'images' in (kinds_of(find_methods()[k]) or ('images',))]


def make(name, **kwargs):
    torch.manual_seed(0)
    return build(run_config(name, batch_size=32, device='cpu', **kwargs))


def ask(method, *x):
    with torch.no_grad(): inputs, targets = method.pretext(*x)
    return method.loss(method(*inputs), *targets)


def test_the_families_are_complete():
    assert {'rotation', 'jigsaw', 'relative_patch', 'inpainting', 'colorization', 'deblur', 'denoise', 'transformation', 'next_frame', 'frame_order',
            'sentence_order', 'next_sentence', 'autoencoder', 'sparse_autoencoder', 'denoising', 'contractive', 'vae', 'vqvae', 'gan', 'bigan'} <= set(METHODS)


@pytest.mark.parametrize('name', METHODS)
def test_loss_survives_odd_batches_and_half_precision(name):
    dls, m = make(name)
    *x, _ = dls.one_batch()
    for n in (max(2, m.min_batch), 29):
        loss = ask(m, *(o[:n] for o in x))
        loss.backward()
        m.update(0.5)
        assert loss.isfinite() and loss.ndim==0
    with torch.autocast('cpu', torch.bfloat16): assert ask(m, *x).isfinite()
    m.eval()
    with torch.no_grad(): assert ask(m, *x).isfinite()  # validation runs without gradient


@pytest.mark.parametrize('name', IMAGES)
def test_colour_pictures_of_an_odd_size(name):
    dls = photos_dls(size=20, stride=64, bs=32)
    from ssl_nb.core.encoders import create_encoder
    m = find_methods()[name].for_data(create_encoder('small_cnn', dls.info), dls)
    assert ask(m, dls.one_batch()[0]).isfinite()
    rows = m.show(dls.one_batch()[:1], *m.pretext(dls.one_batch()[0]))
    assert rows and all(len(v) for v in rows.values())


@pytest.mark.parametrize('name', IMAGES)
def test_text_is_refused_in_words(name):
    from ssl_nb.core.encoders import create_encoder
    from ssl_nb.data.text import text_dls
    dls = text_dls(['one short text', 'and another one', 'a third', 'the last of them']*4, bs=4)
    with pytest.raises((ValueError, TypeError), match='image|picture'):
        m = find_methods()[name].for_data(create_encoder('small_text', dls.info), dls)
        m.pretext(*dls.one_batch()[:-1])


@pytest.mark.parametrize('name', ['gan', 'vqvae', 'contractive', 'jigsaw'])  # what draws at random, keeps a list, or has two players
def test_two_copies_of_one_run_are_equal(name):
    def weights():
        dls, m = make(name)
        dls.loaders[0] = dls.train.take(torch.arange(128))
        learn = ssl_learner(dls, m, seed=1, every=0)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
        return torch.cat([p.detach().flatten() for p in m.parameters()])
    assert torch.equal(weights(), weights())
