"V-JEPA and the video ViT: what their pages show by example is not repeated here."
import pytest
import torch

from ssl_nb.core.encoders import create_encoder, load_encoder, save_encoder
from ssl_nb.core.loader import DataInfo
from ssl_nb.core.masks import ids_to_mask
from ssl_nb.core.method import check_method, get_method
from ssl_nb.data.video import Video
from ssl_nb.masked.tubelets import VideoViT, tubelets
from ssl_nb.masked.vjepa import VJEPA, half_ids, tube_ids, vjepa_loss

INFO = DataInfo(kind='video', channels=1, size=16, frames=4, mean=[.1], std=[.3])


def make(info=INFO, **kwargs):
    torch.manual_seed(0)
    return VJEPA(create_encoder('small_video_vit', info, dim=16, depth=1), **kwargs)


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_a_tubelet_is_a_part_of_the_clip():
    "By loops over times, rows and columns"
    x = torch.rand(2,3,6,8,12)
    t,i = tubelets(x, 4, 3),0
    assert t.shape==(2, 2*2*3, 3*3*4*4)
    for f in range(2):
        for r in range(2):
            for c in range(3):
                assert torch.equal(t[:,i], x[:,:,3*f:3*f+3,4*r:4*r+4,4*c:4*c+4].flatten(1))
                i += 1


def test_places_of_a_tube_are_equally_likely():
    "One block of 2 by 2 on a grid of 4 by 4 has nine places, and is the same at all three times"
    torch.manual_seed(0)
    keep,hidden = tube_ids(6000, (3,4,4), blocks=1, scale=(.25,.25), aspect=(1.,1.))
    assert keep.shape[1]==36 and hidden.shape[1]==12
    assert not (ids_to_mask(keep, 48) & ids_to_mask(hidden, 48)).any()
    by_time = hidden.view(-1,3,4)-16*torch.arange(3)[:,None]
    assert (by_time==by_time[:,:1]).all()
    places,count = by_time[:,0,0].unique(return_counts=True)
    assert places.tolist()==[0,1,2,4,5,6,8,9,10] and (count/6000-1/9).abs().max() < 0.02


def test_many_small_blocks_have_the_papers_shape():
    "Short range: eight blocks of 15 % on 14 by 14; never a seen place that is hidden, and equally many in each clip"
    torch.manual_seed(0)
    share = []
    for _ in range(30):
        keep,hidden = tube_ids(16, (8,14,14), blocks=8, scale=(.15,.15))
        both = torch.stack([ids_to_mask(i, 8*196) for i in (keep, hidden)])
        assert not both.all(0).any() and (both.sum(2)==both.sum(2)[:,:1]).all()
        share.append(1-keep.shape[1]/(8*196))
    assert 0.65 < sum(share)/30 < 0.9 and max(share) < 1


def test_half_is_past_or_future():
    for frames in (2,3,5):
        for past in (True, False):
            keep,hidden = half_ids(3, (frames,2,2), past)
            assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(4*frames).expand(3, -1))
            assert (hidden.max() < keep.min()) if past else (keep.max() < hidden.min())
            assert min(keep.shape[1], hidden.shape[1]) == 4*(frames//2)


def test_past_and_future_are_hidden_equally_often():
    m,x = make(),torch.rand(1,1,4,16,16)
    past = sum(m.pretext(x)[0][2].min().item()==0 for _ in range(400))
    assert abs(past-200) < 50 # five standard errors


@pytest.mark.parametrize('hide', ['half','tubes'])
def test_hidden_values_change_no_token_and_no_prediction(hide):
    m,x = make(hide=hide).eval(),torch.rand(6,1,4,16,16)
    (x,keep,hidden),_ = m.pretext(x)
    seen = ids_to_mask(keep, 32).view(-1,2,4,4).repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = x.where(seen[:,None], torch.rand_like(x))
    assert not torch.equal(other, x)
    with torch.no_grad():
        assert torch.allclose(m.encoder.tokens(x, keep)[0], m.encoder.tokens(other, keep)[0], atol=1e-6)
        assert torch.allclose(m(x, keep, hidden), m(other, keep, hidden), atol=1e-6)
        assert not torch.allclose(m.encoder(x), m.encoder(other), atol=1e-3)


@pytest.mark.parametrize('hide', ['half','tubes'])
def test_the_loss_is_taken_at_hidden_places_only(hide):
    "Another feature of the teacher at a place that is seen changes nothing; at a hidden one it does"
    m,x = make(hide=hide).eval(),torch.rand(6,1,4,16,16)
    h = torch.randn(6,32,16)
    m.teacher.forward_features = lambda x: h
    def ask():
        torch.manual_seed(1)
        inputs,targets = m.pretext(x)
        with torch.no_grad(): return m.loss(m(*inputs), *targets),inputs[2]
    loss,hidden = ask()
    places = ids_to_mask(hidden, 32)
    h[~places] += torch.randn_like(h[~places])
    assert torch.equal(ask()[0], loss)
    h[0,hidden[0,0]] += torch.randn(16)
    assert not torch.equal(ask()[0], loss)


def test_only_the_student_is_trained():
    m = make()
    inputs,targets = m.pretext(torch.rand(4,1,4,16,16))
    m.loss(m(*inputs), *targets).backward()
    assert all(p.grad is None and not p.requires_grad for p in m.teacher.parameters())
    assert m.encoder.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('pct', [0., 0.3, 1.])
def test_the_teacher_follows_by_the_schedule(pct):
    m = make(momentum=0.9)
    with torch.no_grad():
        for p in m.encoder.parameters(): p.add_(1)
    before = weights(m.teacher)
    m.update(pct)
    moved = weights(m.teacher)-before
    assert torch.allclose(moved, torch.full_like(moved, 0.1*(1-pct)), atol=1e-5)


def test_the_number_beside_the_loss():
    "The mean of the batch at each place is worth 1, the truth 0"
    target = torch.randn(8,5,4)
    guess = target.mean(0).expand_as(target)
    assert torch.allclose(make().metrics(guess, target)['to_mean'], torch.tensor(1.))
    assert make().metrics(target, target)['to_mean']==0


def test_its_encoder_is_saved_and_loaded(tmp_path):
    enc = create_encoder('small_video_vit', INFO, dim=16, depth=1).eval()
    save_encoder(enc, tmp_path)
    again,x = load_encoder(tmp_path),torch.rand(2,1,4,16,16)
    assert isinstance(again, VideoViT) and torch.equal(again(x), enc(x))
    assert 'small_video_vit' in Video.encoders and type(create_encoder('small_video', INFO)).__name__=='VideoEncoder'


def test_a_clip_without_anything_has_a_gradient():
    "The deviation of equal tokens is 0, and its root has no slope there"
    enc = create_encoder('small_video_vit', INFO, dim=16, depth=1)
    with torch.no_grad(): enc.norm.weight.zero_()
    enc(torch.zeros(2,1,4,16,16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in enc.parameters())


def test_colours_other_sides_and_half_precision():
    info = DataInfo(kind='video', channels=3, size=20, frames=6)
    m,x = make(info),torch.rand(8,3,6,20,20)
    assert m.encoder.grid==(3,4,4)
    check_method(m, (x, torch.zeros(8)))
    with torch.autocast('cpu', torch.bfloat16):
        inputs,targets = m.pretext(x)
        assert m.loss(m(*inputs), *targets).isfinite()


def test_wrong_arguments_are_named():
    assert get_method('vjepa') is VJEPA
    with pytest.raises(ValueError, match='the encoder is VideoEncoder; try small_video_vit'): VJEPA(create_encoder('small_video', INFO))
    with pytest.raises(ValueError, match="hide must be half or tubes, got 'most'"): make(hide='most')
    with pytest.raises(ValueError, match='hide all of 4 x 4 places'): make(hide='tubes', scale=(1.,1.)).pretext(torch.rand(2,1,4,16,16))
    with pytest.raises(ValueError, match='2 frames are one tubelet'): make(DataInfo(kind='video', channels=1, size=16, frames=2))
    with pytest.raises(ValueError, match='2 frames and 4 x 4 pixels do not fit into 5 frames'): make(DataInfo(kind='video', channels=1, size=16, frames=5))
    with pytest.raises(ValueError, match=r'this encoder takes clips \(B,1,4,16,16\), got \(2, 1, 4, 20, 20\)'): make()(torch.rand(2,1,4,20,20), None, None)
    with pytest.raises(ValueError, match='pred and target must have the same shape'): vjepa_loss(torch.rand(2,3,4), torch.rand(2,1,4))
