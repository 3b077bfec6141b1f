"Masks and boxes: metrics against scikit-learn, torchmetrics and loops, heads on encoders of several kinds, folders and tables with mistakes, training"
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn

from ssl_nb.core.encoders import create_encoder, feature_map, map_channels
from ssl_nb.core.loader import DataInfo
from ssl_nb.data.scenes import draw_scenes
from ssl_nb.transfer.detection import (average_precision, blobs, centerness, check_boxes, crops, detect, detector, fit_detector, ranked_precision,
                                       read_boxes, scene_boxes)
from ssl_nb.transfer.finetune import finetune
from ssl_nb.transfer.segmentation import (VOID, LinearMapHead, Pyramid, Segmenter, UNetHead, few_masks, fit_masks, iou, mask_dls, mask_folder, mean_iou,
                                          neighbourhoods, pca_rgb, pixel_confusion, pixel_loss, predict_masks, scene_masks)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def some(*shape, n=5, seed=0): return torch.randint(n, shape, generator=gen(seed))
def encoder(name='small_cnn', size=32, **kwargs):
    torch.manual_seed(0)
    return create_encoder(name, DataInfo(size=size, mean=[.4]*3, std=[.2]*3), **kwargs).eval()


@pytest.fixture(scope='module')
def scenes(): return draw_scenes('train', 24, 32)


# --- masks: the metric ---

@pytest.mark.parametrize('seed', range(3))
def test_iou_is_that_of_scikit_learn(seed):
    p,y = some(3,6,7, seed=seed),some(3,6,7, seed=seed+10)
    got = iou(pixel_confusion(p, y, 5)).numpy()
    assert got==pytest.approx(jaccard_score(y.flatten(), p.flatten(), average=None), abs=1e-12)


def test_confusion_by_loops():
    p,y = some(2,4,4, n=3),some(2,4,4, n=3, seed=1)
    y[0,0,:2] = VOID
    n = torch.zeros(3,3, dtype=torch.long)
    for a,b in zip(y.flatten().tolist(), p.flatten().tolist()):
        if a!=VOID: n[a,b] += 1
    assert torch.equal(pixel_confusion(p, y, 3), n)


def test_a_class_that_is_nowhere_does_not_count():
    y = torch.tensor([[[0,0,2,2]]])
    assert iou(pixel_confusion(y, y, 4)).isnan().tolist()==[False,True,False,True]
    assert mean_iou(y, y, 4)==1
    assert mean_iou(torch.zeros_like(y), y, 4)==pytest.approx((0.5+0)/2)


@pytest.mark.parametrize('y,says', [(torch.tensor([[[0,7]]]), r'y\[0, 0, 1\] is class 7, but there are 5'), (torch.tensor([[[-2,0]]]), 'class -2'),
                                    (torch.tensor([[[0.,1.]]]), 'whole numbers'), (torch.tensor([[[0]]]), 'one shape')])
def test_bad_masks_are_named(y, says):
    with pytest.raises(ValueError, match=says): pixel_confusion(torch.zeros(1,1,2).long(), y, 5)


def test_pixel_loss_by_loops_and_its_gradient():
    s,y = torch.randn(2,3,2,2, generator=gen(), dtype=torch.float64).requires_grad_(),some(2,2,2, n=3)
    y[0,1,1] = VOID
    loss = sum(-s[i,:,r,c].log_softmax(0)[y[i,r,c]] for i in (0,1) for r in (0,1) for c in (0,1) if y[i,r,c]!=VOID)/7
    assert pixel_loss(s, y).item()==pytest.approx(loss.item(), abs=1e-6)
    a,b = [torch.autograd.grad(l, s, retain_graph=True)[0] for l in (pixel_loss(s, y), loss)]
    assert torch.allclose(a, b, atol=1e-6)
    assert (a[0,:,1,1]==0).all()


def test_a_batch_of_void_has_no_loss_and_no_nan():
    s = torch.randn(1,3,2,2, requires_grad=True)
    loss = pixel_loss(s, torch.full((1,2,2), VOID))
    loss.backward()
    assert loss.item()==0 and (s.grad==0).all()
    with pytest.raises(ValueError, match='must agree'): pixel_loss(s, torch.zeros(1,3,2).long())


# --- masks: heads ---

@pytest.mark.parametrize('name,kwargs', [('small_cnn', {}), ('small_cnn', dict(stem_stride=1)), ('small_resnet', {}), ('small_vit', {}),
                                         ('resnet18', {})])
@pytest.mark.parametrize('size', [(32,32), (28,28)])
def test_heads_give_scores_of_the_size_of_the_image(name, kwargs, size):
    enc,x = encoder(name, size[0], **kwargs),torch.rand(2,3,*size, generator=gen())
    p = Pyramid(enc)
    maps = p(x)
    assert maps[0].shape[2:]==x.shape[2:] and len({m.shape[2:] for m in maps})==len(maps)
    assert [m.shape[1] for m in maps]==p.channels(x)
    assert UNetHead(p.channels(x), 5)(maps).shape==(2,5,*size)
    assert torch.allclose(maps[-1], feature_map(enc, x), atol=1e-5)
    assert LinearMapHead(map_channels(enc), 5)(feature_map(enc, x), x).shape==(2,5,*size)


def test_images_need_not_be_square():
    enc,x = encoder(),torch.rand(1,3,30,40, generator=gen())
    p = Pyramid(enc)
    assert UNetHead(p.channels(x), 4)(p(x)).shape==(1,4,30,40)


def test_every_map_reaches_the_scores():
    enc,x = encoder(),torch.rand(2,3,32,32, generator=gen())
    maps = [m.detach().requires_grad_() for m in Pyramid(enc)(x)]
    UNetHead([m.shape[1] for m in maps], 3)(maps).square().sum().backward()
    assert all((m.grad!=0).any() for m in maps)


def test_channels_leaves_the_mode_and_the_statistics():
    p = Pyramid(encoder().train()).train()
    before = {k: v.clone() for k,v in p.state_dict().items()}
    p.channels(torch.rand(2,3,32,32))
    assert p.training and all(torch.equal(v, before[k]) for k,v in p.state_dict().items())


def test_scene_masks_by_loops():
    s = draw_scenes('train', 6, 48, digits=(1,3))
    for label in ('digit','colour'):
        got,what = scene_masks(s, label),getattr(s, label)
        for i in range(6):
            for k in range(3): assert (got[i][s.mask[i]==k+1]==what[i,k]+1).all()
            assert (got[i][s.mask[i]==0]==0).all()
    with pytest.raises(ValueError, match='did you mean digit'): scene_masks(s, 'digits')


@pytest.mark.parametrize('head', ['linear','unet'])
def test_a_segmenter_learns_masks_by_heart(head):
    s = draw_scenes('train', 4, 32, background='black')
    y = scene_masks(s, 'place')
    dls,enc = mask_dls([(s.image, y), (s.image, y)], 'abcde'),encoder(stem_stride=1, channels=(8,16,24,32))
    few = few_masks(dls, 4, steps=80, bs=4)
    torch.manual_seed(0)
    model = Segmenter(enc, LinearMapHead(32, 5) if head=='linear' else UNetHead(Pyramid(enc).channels(s.image/255), 5))
    losses = fit_masks(model, few, lr=1e-2)
    assert len(losses)==80 and np.mean(losses[-5:]) < 0.3*np.mean(losses[:5])
    assert mean_iou(predict_masks(model, s.image), y, 5) > (0.9 if head=='unet' else 0.3)
    assert model.encoder is not enc and all(p.requires_grad for p in model.parameters())


def test_a_frozen_segmenter_changes_its_head_only(scenes):
    y,enc = scene_masks(scenes),encoder(channels=(8,16,24,32))
    dls = few_masks(mask_dls([(scenes.image, y), (scenes.image, y)], [str(i) for i in range(11)]), 4, steps=3, bs=4)
    model = Segmenter(enc, UNetHead(Pyramid(enc).channels(scenes.image/255), 11))
    head = model.head.scores.weight.clone()
    fit_masks(model, dls, encoder_lr=0.)
    now = model.encoder.state_dict()
    assert all(torch.equal(v, now[k]) for k,v in enc.state_dict().items()) and not torch.equal(head, model.head.scores.weight)


@pytest.mark.parametrize('train', ['head','all'])
def test_the_linear_head_fits_into_finetune(scenes, train):
    y,enc = scene_masks(scenes),encoder(channels=(8,16,24,32))
    dls = few_masks(mask_dls([(scenes.image, y), (scenes.image, y)], [str(i) for i in range(11)]), 8, steps=30, bs=4)
    model = finetune(enc, DataLoaders(*dls.loaders), head=LinearMapHead(32, 11), loss=pixel_loss, train=train, epochs=1, lr=1e-2).model
    assert pixel_loss(model(scenes.image/255).cpu(), y).item() < np.log(11)-0.2 # all classes alike: log 11
    moved = not torch.equal(enc.model.body[0].weight, model.encoder.model.body[0].weight)
    assert moved==(train=='all')


# --- masks: loaders, baseline, picture ---

def test_mask_loaders_and_their_errors(scenes):
    y,names = scene_masks(scenes),[str(i) for i in range(11)]
    dls = mask_dls([(scenes.image, y), (scenes.image[:5], y[:5])], names, bs=8)
    x,m = dls.one_batch()
    assert x.shape==(8,3,32,32) and m.shape==(8,32,32) and 0<=x.min() and x.max()<=1
    few = few_masks(dls, 3, steps=4, bs=5, seed=1)
    batches = list(few.train)
    assert len(batches)==4 and len(torch.cat([b[0] for b in batches]).flatten(1).unique(dim=0))==3
    a,b = [few_masks(dls, 3, steps=1, bs=3, seed=s).train.y for s in (1,2)]
    assert torch.equal(a, few_masks(dls, 3, steps=1, bs=3, seed=1).train.y) and not torch.equal(a, b)
    for bad,says in (((scenes.image, y[:,:16]), 'size of their images'), ((scenes.image, y[:4]), 'as many masks'),
                     ((scenes.image, y+1), 'but there are 11 classes'), ((scenes.image[0], y[0]), r'masks \(N,H,W\)')):
        if says.startswith('but'): bad[1][0,0,0] = 11
        with pytest.raises(ValueError, match=says): mask_dls([bad], names)
    for n in (0, 25):
        with pytest.raises(ValueError, match='1 to 24'): few_masks(dls, n)


def test_neighbourhoods_by_loops():
    x = torch.rand(2,3,5,6, generator=gen())
    h,pad = neighbourhoods(x, 1),F.pad(x, (1,1,1,1), mode='reflect')
    assert h.shape==(2,5,6,29)
    for r,c in ((0,0), (2,3), (4,5)): assert torch.equal(h[1,r,c,:27], pad[1,:,r:r+3,c:c+3].flatten())
    assert h[0,0,0,27:].tolist()==[-1,-1] and h[0,4,5,27:].tolist()==[1,1]


def test_pca_colours_are_the_components():
    h = torch.randn(3,8,4,5, generator=gen(), dtype=torch.float64)*torch.arange(1, 9)[:,None,None]
    rgb,rows = pca_rgb(h),h.movedim(1,-1).flatten(0,2)
    u,s,_ = torch.linalg.svd(rows-rows.mean(0), full_matrices=False)
    z = rgb.movedim(1,-1).flatten(0,2).double()
    for k in range(3):
        inside = (z[:,k]>0) & (z[:,k]<1)
        r = np.corrcoef(z[inside,k], (u*s)[inside,k])[0,1]
        assert abs(r)==pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match='three channels'): pca_rgb(h[:,:2])


def test_predict_masks_keeps_the_mode(scenes):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    y = predict_masks(model, scenes.image, batch_size=7)
    assert y.shape==(24,32,32) and y.dtype==torch.long and model.training
    assert torch.equal(y, model.eval()(scenes.image/255).argmax(1))


# --- masks: folders ---

def write(folder, name, im, mask):
    for sub,a,ending in (('images', im, 'jpg'), ('masks', mask, 'png')):
        (folder/sub).mkdir(exist_ok=True)
        if a is not None: Image.fromarray(a).save(folder/sub/f'{name}.{ending}')


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        mask = rng.integers(0, 3, (12,16), dtype=np.uint8); mask[0] = 9
        write(tmp_path, f'é {i}', rng.integers(0, 255, (12,16,3), dtype=np.uint8), mask)
    return tmp_path


def test_a_folder_of_masks(folder):
    x,y = mask_folder(folder, 'abc', void=9)
    assert x.shape==(3,3,12,16) and x.dtype==torch.uint8 and y.shape==(3,12,16)
    assert (y[:,0]==VOID).all() and (y[:,1:]>=0).all()
    assert torch.equal(y[1,1:], torch.from_numpy(np.array(Image.open(folder/'masks'/'é 1.png')))[1:].long())
    x,y2 = mask_folder(folder, 'abc', size=(6,8), void=9)
    assert x.shape==(3,3,6,8) and set(y2.unique().tolist()) <= {VOID,0,1,2}
    for r in range(6):
        for c in range(8): assert y2[0,r,c] in y[0,2*r:2*r+2,2*c:2*c+2] # no class between two others


@pytest.mark.parametrize('break_it,error,says', [
    (lambda f: (f/'masks'/'é 1.png').unlink(), FileNotFoundError, r'é 1.jpg has no mask'),
    (lambda f: (f/'images'/'é 1.jpg').unlink(), FileNotFoundError, r'é 1.png has no image'),
    (lambda f: write(f, 'é 2', None, np.zeros((12,15), np.uint8)), ValueError, r'é 2.png has 15x12 pixels, and its image 16x12'),
    (lambda f: write(f, 'é 2', None, np.full((12,16), 5, np.uint8)), ValueError, r'é 2.png.*is class 5, but there are 3'),
    (lambda f: write(f, 'é 2', None, np.zeros((12,16,3), np.uint8)), ValueError, r'é 2.png has colours'),
    (lambda f: write(f, 'é 2', np.zeros((8,8,3), np.uint8), np.zeros((8,8), np.uint8)), ValueError, r'é 2.jpg has \(8, 8\)'),
    (lambda f: (f/'masks'/'é 0.png').write_bytes(b'no picture'), ValueError, r'é 0.png cannot be read'),
    (lambda f: (f/'masks').rename(f/'labels'), FileNotFoundError, 'masks is no folder')])
def test_a_folder_with_a_mistake(folder, break_it, error, says):
    break_it(folder)
    with pytest.raises(error, match=says): mask_folder(folder, 'abc', void=9)


def test_void_that_was_not_named(folder):
    with pytest.raises(ValueError, match='is class 9, but there are 3 classes'): mask_folder(folder, 'abc')


# --- boxes: metrics ---

def test_ranked_precision_by_hand():
    assert ranked_precision([], 3)==0
    assert ranked_precision([True]*4, 4)==1
    assert ranked_precision([False,True], 1)==pytest.approx(0.5)
    with pytest.raises(ValueError, match='at least one'): ranked_precision([True], 0)


@pytest.mark.parametrize('seed', range(4))
def test_average_precision_is_that_of_the_ranking(seed):
    rng,n = np.random.default_rng(seed),6
    hits = rng.random(9)<0.5
    hits[np.cumsum(hits)>n] = False
    true = [[20.*i,0.,20.*i+10,10.] for i in range(n)]
    at = iter(range(n))
    found = [true[next(at)] if h else [500+20.*j,0.,510+20.*j,10.] for j,h in enumerate(hits)]
    zeros = lambda k: torch.zeros(k).long()
    got = average_precision([dict(boxes=torch.tensor(found), labels=zeros(9), scores=torch.linspace(.9, .1, 9))],
                            [dict(boxes=torch.tensor(true), labels=zeros(n))])
    assert got['AP50']==pytest.approx(ranked_precision(hits, n), abs=1e-6)
    assert got['AP']==pytest.approx(got['AP50'], abs=1e-6) # the boxes agree to the pixel


def test_the_name_counts_unless_it_shall_not():
    box = torch.tensor([[0.,0.,9.,9.]])
    found,truth = [dict(boxes=box, labels=torch.tensor([1]), scores=torch.ones(1))],[dict(boxes=box, labels=torch.tensor([2]))]
    assert average_precision(found, truth)['AP']==0 and average_precision(found, truth, named=False)['AP']==pytest.approx(1)
    with pytest.raises(ValueError, match='same images'): average_precision(found, truth*2)


def test_nothing_found():
    none = dict(boxes=torch.zeros(0,4), labels=torch.zeros(0).long(), scores=torch.zeros(0))
    assert average_precision([none], [dict(boxes=torch.tensor([[0.,0.,9.,9.]]), labels=torch.tensor([0]))])==dict(AP=0, AP50=0)


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics.detection', None)
    with pytest.raises(ImportError, match=r'ssl_nb\[transfer\]'): average_precision([], [])


def test_centerness_by_loops():
    places,boxes = torch.rand(20,2, generator=gen())*20,torch.tensor([[2.,3.,12.,9.], [0.,0.,20.,20.]])
    got = centerness(places, boxes)
    for p,(x,y) in enumerate(places.tolist()):
        for n,(x0,y0,x1,y1) in enumerate(boxes.tolist()):
            l,t,r,b = x-x0,y-y0,x1-x,y1-y
            want = (min(l,r)/max(l,r)*min(t,b)/max(t,b))**0.5 if min(l,t,r,b)>0 else 0
            assert got[p,n].item()==pytest.approx(want, abs=1e-5)


# --- boxes: what is given ---

@pytest.mark.parametrize('target,says', [
    (dict(boxes=[[0,0,33,9]], labels=[0]), 'outside the image of 32 x 32'), (dict(boxes=[[-1,0,3,9]], labels=[0]), 'outside'),
    (dict(boxes=[[5,0,5,9]], labels=[0]), 'x0 < x1'), (dict(boxes=[[5,9,7,2]], labels=[0]), 'y0 < y1'),
    (dict(boxes=[[0,0,9,9]], labels=[3]), 'label 3, but there are 3 classes'), (dict(boxes=[[0,0,9,9]], labels=[]), 'a label for each'),
    (dict(boxes=[[0,0,9,9]]), 'has no labels'), (dict(boxes=[[0,0,float('nan'),9]], labels=[0]), 'x0 < x1')])
def test_boxes_that_cannot_be(target, says):
    with pytest.raises(ValueError, match=says): check_boxes(target, (32,32), 3)


@pytest.fixture
def table(tmp_path):
    for i in range(2): Image.fromarray(np.full((20,40,3), 90*i, np.uint8)).save(tmp_path/f'{i}.png')
    def written(*rows):
        file = tmp_path/'boxes.csv'
        file.write_text('\n'.join(['image,label,xmin,ymin,xmax,ymax', *rows]), encoding='utf-8')
        return file
    return written


def test_a_table_of_boxes(table, tmp_path):
    x,targets,names = read_boxes(table('0.png,dog,0,0,10,20', '1.png,cat,4,2,40,12', '0.png,cat,20,10,30,20'), tmp_path, (10,10))
    assert x.shape==(2,3,10,10) and x.dtype==torch.uint8 and names==['cat','dog']
    assert targets[0]['boxes'].tolist()==[[0,0,2.5,10], [5,5,7.5,10]] and targets[0]['labels'].tolist()==[1,0]
    assert targets[1]['boxes'].tolist()==[[1,1,10,6]] and x[1].unique().tolist()==[90]


@pytest.mark.parametrize('row,error,says', [
    ('1.png,cat,0,0,41,9', ValueError, r'1.png, line 3: .*outside the image of 20 x 40'), ('1.png,cat,9,0,9,9', ValueError, 'line 3: .*x0 < x1'),
    ('1.png,,0,0,9,9', ValueError, 'line 3: the box has no label'), ('2.png,cat,0,0,9,9', FileNotFoundError, '2.png does not exist'),
    ('1.png,cat,0,zero,9,9', ValueError, 'line 3: xmin, ymin, xmax and ymax must be numbers'),
    ('1.png,cta,0,0,9,9', ValueError, 'did you mean cat')])
def test_a_table_with_a_mistake(table, tmp_path, row, error, says):
    with pytest.raises(error, match=says): read_boxes(table('0.png,cat,0,0,10,20', row), tmp_path, (10,10), classes=['cat','dog'])


def test_bad_boxes_may_be_left_out(table, tmp_path):
    _,targets,_ = read_boxes(table('0.png,cat,0,0,10,20', '1.png,cat,9,0,9,9'), tmp_path, (10,10), skip=True)
    assert [len(t['labels']) for t in targets]==[1,0]


def test_blobs_and_crops():
    ink = np.zeros((10,12), bool); ink[1:4,2:5] = ink[6:9,7:12] = ink[0,11] = True
    assert blobs(ink, least=2).tolist()==[[2,1,5,4], [7,6,12,9]] and blobs(~ink[:1]&ink[:1]).shape==(0,4)
    im = torch.arange(120.).view(10,12)
    assert crops(im, blobs(ink, 2), side=4).shape==(2,16)
    assert crops(im, torch.tensor([[2.,3.,6.,7.]]), side=4)[0].tolist()==im[3:7,2:6].flatten().tolist()


# --- boxes: the detector ---

def test_scene_boxes():
    s = draw_scenes('train', 8, 48, digits=(1,3))
    for i,t in enumerate(scene_boxes(s, 'colour')):
        check_boxes(t, (48,48), 6)
        assert t['labels'].tolist()==[c for c in s.colour[i].tolist() if c>=0]


def test_the_detector_is_fcos_on_our_map():
    enc = encoder(stem_stride=1, channels=(8,16,24,32))
    model = detector(enc, 4, (24,40), width=32)
    x = torch.rand(2,3,24,40, generator=gen())
    images,_ = model.transform(list(x))
    assert torch.allclose(images.tensors, x, atol=1e-6) # neither resized nor normalised again
    assert model.backbone(x)['map'].shape==(2,32,3,5)
    assert model.backbone.encoder is not enc
    assert model.head.classification_head.num_classes==4


def test_a_detector_learns_by_heart_and_forgets_no_mode():
    s = draw_scenes('train', 4, 32, background='black')
    targets,enc = scene_boxes(s),encoder(stem_stride=1, channels=(8,16,32,64))
    torch.manual_seed(0)
    model = detector(enc, 10, 32, width=32)
    losses = fit_detector(model, s.image, targets, steps=120, batch_size=4, lr=1e-2)
    assert np.mean(losses[-5:]) < 0.5*np.mean(losses[:5])
    found = detect(model, s.image)
    assert model.training and average_precision(found, targets)['AP50'] > 0.5
    assert all((o['scores'].diff()<=0).all() for o in found)


def test_a_frozen_encoder_stays_as_it_is():
    s,enc = draw_scenes('train', 4, 32),encoder(channels=(8,16,24,32))
    model = detector(enc, 10, 32, width=32)
    head = model.backbone.neck.weight.clone()
    fit_detector(model, s.image, scene_boxes(s), steps=3, batch_size=2, encoder_lr=0.)
    now = model.backbone.encoder.state_dict()
    assert all(torch.equal(v, now[k]) for k,v in enc.state_dict().items()) and not torch.equal(head, model.backbone.neck.weight)


def test_training_looks_at_the_boxes_first():
    s,model = draw_scenes('train', 2, 32),detector(encoder(), 5, 32, width=32)
    bad = [dict(boxes=torch.tensor([[0.,0.,9.,40.]]), labels=torch.tensor([0]))]*2
    with pytest.raises(ValueError, match=r'targets\[0\]: box 0.*outside'): fit_detector(model, s.image, bad, steps=1)
    with pytest.raises(ValueError, match='as many targets'): fit_detector(model, s.image, bad[:1], steps=1)


def test_the_same_seed_gives_the_same_detector():
    s,losses = draw_scenes('train', 6, 32),[]
    for seed in (0,0,1):
        torch.manual_seed(0)
        losses.append(fit_detector(detector(encoder(channels=(8,16,24,32)), 10, 32, width=32), s.image, scene_boxes(s), steps=3, batch_size=2, seed=seed))
    assert losses[0]==losses[1]!=losses[2]
