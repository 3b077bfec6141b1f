"""Every exported loss and measure: at least single precision inside, whatever the precision of its arguments and under autocast; a NaN that
goes in comes out; shapes, temperatures and widths that do not go together are refused; views too refuse what makes no sense."""
import importlib
import inspect
import pkgutil
import types

import pytest
import torch

import ssl_nb
from ssl_nb.core.heads import in_full_precision
from ssl_nb.core.method import find_methods

gen = torch.Generator().manual_seed(0)
def r(*shape): return torch.randn(*shape, generator=gen, dtype=torch.float64)
def p(*shape): return torch.rand(*shape, generator=gen, dtype=torch.float64)*0.9+0.05
def ints(high, *shape): return torch.randint(high, shape, generator=gen)
def spoil(z, size=0.3): return z + size*r(*z.shape)

def jacobian(x, v):
    "The codes are computed from `x` by products that 16 bits hold exactly, so that only the sum of squares can lose anything"
    from ssl_nb.autoencoders.contractive import jacobian_norm
    x = x.detach().requires_grad_()
    return jacobian_norm((x.unflatten(1, (4,-1))*torch.tensor([1,2,4,8.]).to(x)[:,None]).sum(2), x, v, create_graph=False)

draw = torch.randn
def drawn(*shape, dtype=None, **kwargs):
    "Random numbers that are the same in every precision"
    return draw(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)

# name -> arguments in double precision. Tensors of one shape must be alike in shape; what may differ has another size here.
z, y = r(32,16), ints(5, 32)
images,near,steps = p(4,3,8,8),r(200,3),r(40,6,3)
EXAMPLES = {
    'core.heads': dict(sinkhorn=[r(32,8)/4], koleo=[z]),
    'core.measures': dict(
        feature_std=[z], rankme=[z], alignment=[z, spoil(z)], uniformity=[z], epps_pulley=[r(32,5)], sigreg=[z], frechet_distance=[z, r(40,16)],
        knn_predict=[r(60,4), ints(3, 60), r(200,4), 20, 0.05], nearest_ids=[r(200,3), torch.arange(100)]),
    'contrastive.infonce': dict(
        log_sum_exp=[r(20,16)/4, r(30,16)/4, 0.1], info_nce=[z, spoil(z), r(50,16), 0.1], positive_accuracy=[near, spoil(near)]),
    'contrastive.simclr': dict(nt_xent=[z, spoil(z), 0.1]),
    'contrastive.moco_v3': dict(ctr=[z, spoil(z), 0.1]),
    'contrastive.dcl': dict(dcl_loss=[z, spoil(z), 0.1, 0.5], pair_weights=[p(32), 0.5]),
    'contrastive.nnclr': dict(nnclr_loss=[z, spoil(z), r(50,16), 0.1], nearest_in_support=[r(50,16), z]),
    'contrastive.supcon': dict(supcon_loss=[z, y, 0.1], class_accuracy=[r(200,3), ints(5, 200)]),
    'contrastive.cpc': dict(cpc_loss=[r(4,6,8), r(4,6,2,8)], ahead_accuracy=[steps, spoil(torch.stack([steps.roll(-1, 1), steps.roll(-2, 1)], 2))]),
    'contrastive.byol': dict(byol_loss=[z, spoil(z)]),
    'contrastive.simsiam': dict(neg_cosine=[z, spoil(z)]),
    'contrastive.barlow': dict(cross_correlation=[z, spoil(z)], barlow_loss=[z, spoil(z)]),
    'contrastive.vicreg': dict(vicreg_terms=[z/2, spoil(z)/2], vicreg_loss=[z/2, spoil(z)/2]),
    'contrastive.wmse': dict(whiten=[z], wmse_loss=[z, spoil(z)]),
    'contrastive.lejepa': dict(lejepa_loss=[[z, spoil(z)]]),
    'contrastive.deepcluster': dict(deepcluster_loss=[z, y, r(5,16), 0.1], unit=[z], spherical_kmeans=[r(200,4), r(9,4)]),
    'contrastive.swav': dict(
        prototype_scores=[z, r(8,16)], swav_loss=[z, spoil(z), r(8,16), [spoil(z)]], used=[r(200,8)]),
    'contrastive.dino': dict(
        teacher_probs=[r(2,32,8)/4, r(8)/4], cross_entropy=[r(2,32,8).softmax(2), r(3,32,8)],
        dino_loss=[[r(32,8), r(32,8), r(32,8)], [r(32,8)/4, r(32,8)/4], r(8)/4]),
    'contrastive.simcse': dict(simcse_loss=[z, spoil(z), 0.1]),
    'contrastive.clip': dict(clip_loss=[z, spoil(z), 10.], siglip_loss=[z, spoil(z), 10., -10.]),
    'autoencoders.autoencoder': dict(squared_error=[images, spoil(images)], kl_sparsity=[p(32,8)/4], pca=[z, 3]),
    'autoencoders.denoising': dict(denoising_loss=[images, spoil(images), p(4,3,8,8)<0.3, 0.7, 0.3]),
    'autoencoders.contractive': dict(
        sigmoid_penalty=[p(32,8), r(8,16)], jacobian_norm=[r(32,4000), ints(2, 32, 2, 4)*2.-1]),
    'autoencoders.vae': dict(
        kl_normal=[r(32,8), r(32,8)/4], normal_log_likelihood=[images, spoil(images), 0.3],
        elbo=[images, spoil(images), r(4,8), r(4,8)/4, 0.3]),
    'autoencoders.vqvae': dict(
        vq_loss=[images, spoil(images), r(4,5,8), r(4,5,8)], assign=[r(200,2), r(150,2)], perplexity=[ints(9, 200), 9]),
    'autoencoders.gan': dict(gan_loss=[r(30), r(31)], generator_loss=[r(30)]),
    'autoencoders.bigan': dict(bigan_loss=[r(30), r(31)], rebalance=[r(30), r(31)]),
    'masked.next_patch': dict(next_patch_loss=[r(4,8,12), r(4,8,12), torch.tensor([1,2,5,8])]),
    'masked.mae': dict(mae_loss=[r(4,9,12), r(4,9,12), torch.tensor([[0,2,5]]*4)]),
    'masked.simmim': dict(simmim_loss=[r(4,9,12), r(4,9,12), torch.tensor([[0,2,5]]*4)]),
    'masked.maskfeat': dict(maskfeat_loss=[r(4,9,12), r(4,9,12), torch.tensor([[0,2,5]]*4)]),
    'masked.beit': dict(beit_loss=[r(4,9,12), ints(12, 4, 9), torch.tensor([[0,2,5]]*4)]),
    'masked.segments': dict(pair_loss=[r(4,6,20), r(4,2), ints(20, 4, 6), ints(2, 4)]),
    'masked.electra': dict(
        rtd_loss=[r(4,6), ints(2, 4, 6)], electra_loss=[r(4,3,20), ints(20, 4, 3), r(4,6), ints(2, 4, 6), 50.]),
    'masked.diffusion_text': dict(diffusion_loss=[r(9,20), ints(20, 9), p(9)+0.1, torch.tensor(30)]),
    'masked.words': dict(mlm_loss=[r(4,6,20), ints(20, 4, 6)]),
    'masked.left_to_right': dict(next_token_loss=[r(40,20), ints(20, 40)]),
    'masked.llama': dict(rms_norm=[r(40,16), r(16)]),
    'masked.lewm': dict(lewm_loss=[r(32,3,5), r(32,4,5)]),
    'masked.vjepa': dict(vjepa_loss=[r(8,3,5), r(8,3,5)]),
    'pretext.rotation': dict(rotation_loss=[r(32,4), ints(4, 32)]),
    'pretext.jigsaw': dict(jigsaw_loss=[r(32,24), ints(24, 32)]),
    'pretext.relative_patch': dict(relative_patch_loss=[r(32,8), ints(8, 32)]),
    'pretext.inpainting': dict(context_loss=[images, spoil(images), p(4,1,8,8)], adversarial_loss=[r(30,1), r(31,1)]),
    'pretext.colorization': dict(
        colour_loss=[r(4,9,6,6), torch.arange(5).view(1,5,1,1).expand(4,5,6,6), p(4,5,6,6), p(9)],
        annealed_mean=[r(4,9,6,6), 20*r(9,2), 0.4]),
    'pretext.restoration': dict(restoration_loss=[images, spoil(images)], psnr=[images, spoil(images)]),
    'pretext.transformation': dict(aet_loss=[r(32,7), r(32,7)]),
    'pretext.next_frame': dict(next_frame_loss=[images, spoil(images)], skill=[images, spoil(images), spoil(images)]),
    'pretext.frame_order': dict(order_loss=[r(32,12), ints(12, 32)]),
    'pretext.sentence_order': dict(order_loss=[r(32,2), ints(2, 32)]),
    'pretext.undistort': dict(undistort_loss=[r(4,9,12), r(4,9,12), p(4,9)<0.5]),
    'contrastive.speaker': dict(speaker_loss=[z, spoil(z), 0.1]),
    'masked.frames': dict(perplexity=[p(4,9)/9]),
    'masked.wav2vec2': dict(
        wav2vec2_loss=[r(6,4), r(6,4), torch.tensor([[1,2],[0,2],[0,1],[4,5],[3,5],[3,4]]), 0.1], diversity_loss=[p(6,2,5)/5]),
    'masked.best_rq': dict(best_rq_loss=[r(6,2,5), ints(5, 6, 2)]),
    'masked.hubert': dict(hubert_loss=[p(4,9,12), ints(12, 4, 9), p(4,9)<0.5, p(4,9)<0.5, 0.7, 0.1], nearest=[r(4,9,3), r(7,3)]),
    'masked.masked_frames': dict(masked_l1=[r(4,9,12), r(4,9,12), p(4,9,12)<0.5]),
    'transfer.captioning': dict(captioning_loss=[r(4,5,7), ints(6, 4, 5)+1]),
    'transfer.proteins': dict(letter_loss=[r(4,9,3), ints(3, 4, 9)]),
    'transfer.tables': dict(vime_loss=[r(4,9), r(4,9), r(4,9), p(4,9)<0.5]),
    'transfer.speech_to_text': dict(ctc_loss=[r(4,9,6), torch.tensor([9,9,8,7]), torch.tensor([[1,2,2],[5,0,0],[3,1,0],[4,4,4]])]),
}
EXAMPLES = {f'{module}.{name}': args for module,of in EXAMPLES.items() for name,args in of.items()}
SPECIAL = {'autoencoders.contractive.jacobian_norm': jacobian}
# what is an index or a share of samples: no small change of the arguments changes it
DISCRETE = {'masked.hubert.nearest', 'core.measures.knn_predict', 'core.measures.nearest_ids', 'contrastive.infonce.positive_accuracy', 'contrastive.swav.used',
    'contrastive.supcon.class_accuracy', 'contrastive.cpc.ahead_accuracy', 'autoencoders.vqvae.assign', 'autoencoders.vqvae.perplexity'}
# arguments that only choose: the nearest neighbour, the start of k-means, the (linear) place where a Jacobian is taken
CHOOSE = {'contrastive.nnclr.nnclr_loss': 0, 'contrastive.nnclr.nearest_in_support': 1, 'contrastive.deepcluster.spherical_kmeans': 1,
    'autoencoders.contractive.jacobian_norm': 0}
# called by losses, and none themselves
NO_LOSS = {'core.masks.gather_tokens', 'core.measures.encode', 'core.measures.fed', 'core.measures.default_k', 'core.heads.full_precision', 'core.heads.reverse_gradient', 'pretext.inpainting.hole_weights'}


def exported():
    "Full name -> function, of all that the notebooks export"
    found = {}
    for m in pkgutil.walk_packages(ssl_nb.__path__, 'ssl_nb.'):
        mod = importlib.import_module(m.name)
        own = {k: getattr(mod, k) for k in getattr(mod, '__all__', [])}
        found |= {f'{m.name[7:]}.{k}': f for k,f in own.items() if inspect.isfunction(f) and f.__module__==m.name}
    return found

FUNCTIONS = exported()
def names_in(code): return {*code.co_names} | {n for c in code.co_consts if isinstance(c, types.CodeType) for n in names_in(c)}

def losses_and_measures():
    "What is called a loss, what the methods' losses and metrics call, and the measures"
    full = {f: name for name,f in FUNCTIONS.items()}
    found = {name for name in FUNCTIONS if name.endswith('_loss') or name.startswith('core.measures.')}
    for method in find_methods().values():
        for f in (method.loss, method.metrics):
            called = [f.__globals__.get(n) for n in names_in(f.__code__)]
            found |= {full[o] for o in called if inspect.isfunction(o) and o in full}
    return found - NO_LOSS

def cast(x, dtype):
    if isinstance(x, list): return [cast(o, dtype) for o in x]
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x

def value(name, args):
    "All numbers that come out, and their types"
    torch.manual_seed(0)
    torch.randn = drawn # the directions of LeJEPA
    try: out = SPECIAL.get(name, FUNCTIONS.get(name))(*args)
    finally: torch.randn = draw
    out = out if isinstance(out, tuple) else (out,)
    return torch.cat([o.detach().double().flatten() for o in out]), {o.dtype for o in out if o.is_floating_point()}

def close(a, b, tol=2e-5): return a.shape==b.shape and bool(((a-b).abs() <= tol*(1+b.abs())).all())

def floats(x): return torch.is_tensor(x) and x.is_floating_point()
def continuous(name): return [(i,a) for i,a in enumerate(EXAMPLES[name]) if floats(a) and CHOOSE.get(name)!=i and not (name in SPECIAL and i)]

every = pytest.mark.parametrize('name', sorted(EXAMPLES))


def test_every_loss_keeps_the_rule():
    "A loss or measure is tried on the arguments above, or at least has the decorator; a table of names that are gone would test nothing"
    rule = in_full_precision(len).__code__
    bare = {name for name in losses_and_measures() - {*EXAMPLES} if FUNCTIONS[name].__code__ is not rule}
    assert bare == set()
    assert {*EXAMPLES} - {*FUNCTIONS} == set()


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_in_single_precision(name, dtype):
    low = cast(EXAMPLES[name], dtype)
    truth,_ = value(name, cast(low, torch.float64))
    got,types_ = value(name, low)
    assert types_ <= {torch.float32}
    assert close(got, truth), (got-truth).abs().max()
    with torch.autocast('cpu', torch.bfloat16): mixed,types_ = value(name, low)
    assert types_ <= {torch.float32} and close(mixed, truth)


@every
def test_autocast_changes_nothing(name):
    single = cast(EXAMPLES[name], torch.float32)
    plain,_ = value(name, single)
    with torch.autocast('cpu', torch.bfloat16): mixed,types_ = value(name, single)
    assert types_ <= {torch.float32} and torch.equal(plain, mixed)


@every
def test_double_precision_stays_double(name):
    "To the last digit: what single precision rounds away makes a difference"
    args = EXAMPLES[name]
    got,types_ = value(name, args)
    if name in DISCRETE: return
    assert types_ <= {torch.float64}
    for i,a in continuous(name):
        rounded,_ = value(name, [*args[:i], cast(cast(a, torch.float32), torch.float64), *args[i+1:]])
        assert not torch.equal(got, rounded), f'argument {i} is computed in single precision'


@every
def test_a_nan_that_goes_in_comes_out(name):
    "So that `NanGuard` sees it; no loss looks for it, since a GPU would have to wait for the answer"
    if name in DISCRETE: return
    for i,a in continuous(name):
        bad = a.clone()
        bad.view(-1)[0] = float('nan')
        args = [*EXAMPLES[name][:i], bad, *EXAMPLES[name][i+1:]]
        try: out,_ = value(name, args)
        except (ValueError, torch.linalg.LinAlgError): continue
        assert out.isnan().any(), f'argument {i}'


@every
def test_tensors_that_must_be_alike(name):
    "One row instead of many would be broadcast without a word; one column fewer ends in a message of torch"
    if name in SPECIAL: return
    args = [torch.stack(a) if isinstance(a, list) else a for a in EXAMPLES[name]]
    shapes = [tuple(a.shape) if floats(a) else None for a in args]
    alike = [i for i,s in enumerate(shapes) if s and s in shapes[:i]]
    for i in alike:
        for wrong in (args[i][:1], args[i][1:], args[i][...,1:]):
            with pytest.raises(ValueError, match='same shape'): value(name, [*args[:i], wrong, *args[i+1:]])


@every
def test_temperatures_are_above_zero(name):
    own = inspect.signature(FUNCTIONS[name]).parameters
    for k in {'temp','scale','sigma'} & {*own}:
        given = dict(zip(own, EXAMPLES[name]))
        for bad in (0, -0.1, float('nan')):
            with pytest.raises(ValueError, match=f'{k} must be a number above 0'): FUNCTIONS[name](**given | {k: bad})


def widths():
    for name in ('core.measures.knn_predict', 'core.measures.frechet_distance', 'contrastive.infonce.info_nce', 'contrastive.infonce.log_sum_exp',
                 'contrastive.nnclr.nnclr_loss', 'contrastive.nnclr.nearest_in_support', 'contrastive.swav.swav_loss',
                 'contrastive.deepcluster.deepcluster_loss', 'autoencoders.vqvae.assign'):
        yield name,max(i for i,a in enumerate(EXAMPLES[name]) if floats(a))

@pytest.mark.parametrize('name,i', [*widths()])
def test_queues_and_banks_have_the_width_of_the_features(name, i):
    args = list(EXAMPLES[name])
    args[i] = args[i][:,:1]
    with pytest.raises(ValueError, match='same shape'): FUNCTIONS[name](*args)


def test_a_queue_takes_vectors_of_its_own_width():
    from ssl_nb.contrastive.infonce import FeatureQueue, enqueue
    with pytest.raises(ValueError, match='same shape'): enqueue(torch.zeros(8,4), torch.tensor(0), torch.ones(3,1))
    with pytest.raises(ValueError, match='same shape'): FeatureQueue(8, 4).add(torch.ones(3,1))
    with pytest.raises(ValueError, match='size must be a number above 0'): FeatureQueue(0, 4)


@pytest.mark.parametrize('name,rows', [('supcon.supcon_loss', 5), ('supcon.class_accuracy', 5)])
def test_one_label_for_each_row(name, rows):
    with pytest.raises(ValueError, match='same shape'): FUNCTIONS[f'contrastive.{name}'](z, y[:rows])


def test_neighbours_vote_at_any_temperature():
    knn = FUNCTIONS['core.measures.knn_predict']
    bank = torch.tensor([[1,0],[.99,.141],[.99,.141],[.99,.141]])
    for temp,label in ((0.005, 1), (1e-6, 1), (10., 0)):
        labels = torch.tensor([1,0,0,0])
        for query in (torch.tensor([[1.,0]]), torch.tensor([[1.,0]]).double()):
            assert knn(bank, labels, query, 4, temp).tolist()==[label]


@pytest.mark.parametrize('far', [0., 1e3, 1e4])
def test_the_nearest_code_is_found_far_from_the_origin(far):
    torch.manual_seed(0)
    codes,idx = torch.randn(64,4)+far,torch.randint(64, (500,))
    assert torch.equal(FUNCTIONS['autoencoders.vqvae.assign'](codes[idx]+1e-2*torch.randn(500,4), codes), idx)


# --- views ---

def bad_views():
    from ssl_nb.core.views import Affine, Blur, ClipViews, CropFlip, Grey, Jitter, TokenViews, image_views, resized_crop
    x,clips,one = torch.rand(2,3,8,8),torch.rand(2,3,4,8,8),torch.zeros(2, dtype=torch.long)
    yield from {
        'size': [lambda: image_views(0), lambda: CropFlip((8,0)), lambda: Affine(-3), lambda: ClipViews(7.5),
                 lambda: resized_crop(x, one, one, one+8, one+8, 0)],
        'scale': [lambda: image_views(8, scale=(1,0.1)), lambda: CropFlip(8, scale=(0.5,2)), lambda: ClipViews(8, scale=(1,0.1))],
        'ratio': [lambda: image_views(8, ratio=(4/3,3/4)), lambda: CropFlip(8, ratio=(0,1))],
        'zoom': [lambda: image_views(8, affine=dict(zoom=(0,1)))], 'aspect': [lambda: Affine(8, aspect=0.5)],
        'sigma': [lambda: Blur(sigma=(2.,0.1))], 'hue': [lambda: Jitter(hue=3)], 'drop': [lambda: TokenViews(15)],
        'p': [lambda: Grey(20), lambda: image_views(8, jitter=float('nan')), lambda: image_views(8, grey=-0.2)],
        'views take images in': [lambda: image_views(8)(x*255), lambda: image_views(8)(x/0), lambda: image_views(8)(x*2-1),
                                 lambda: image_views(8)(x.half()*255), lambda: ClipViews(8)(clips*255)],
    }.items()

@pytest.mark.parametrize('word,makers', [*bad_views()])
def test_views_refuse_what_makes_no_sense(word, makers):
    for f in makers:
        with pytest.raises(ValueError, match=f'^{word} '): f()


# --- what a method can know before it trains ---

def toy(n=40, y=None, **kwargs):
    from ssl_nb.core.loader import array_dls
    x = (torch.rand(n,1,8,8)*255).byte().numpy()
    return array_dls(x, y, x[:10], None if y is None else y[:10], **kwargs)

def made(name, dls, **kwargs):
    from ssl_nb.core.encoders import create_encoder
    return find_methods()[name].for_data(create_encoder('small_cnn', dls.info), dls, **kwargs)

def test_supcon_needs_labels_for_training():
    import numpy as np
    for y in (None, np.full(40, -1)):
        with pytest.raises(ValueError, match='supcon learns from labels'): made('supcon', toy(y=y))
    made('supcon', toy(y=np.arange(40)%3))

def test_whitening_needs_a_batch_above_its_width():
    for kwargs,dls in ((dict(dim=16), toy(bs=16)), (dict(dim=64), toy(bs=64))):
        with pytest.raises(ValueError, match='takes batches of at least'): made('wmse', dls, **kwargs)
    made('wmse', toy(bs=16), dim=15)
    made('wmse', toy(bs=16), dim=16, whitening=False)
