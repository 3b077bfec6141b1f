"World models: what the pages of the small world and of LeWM show by example is not repeated here."
import pytest
import torch

from ssl_nb.app.folder import which_data
from ssl_nb.core.encoders import create_encoder, fresh_encoder
from ssl_nb.core.loader import get_kind
from ssl_nb.core.method import check_method, get_method
from ssl_nb.data.video import place_sprites
from ssl_nb.data.world import SIDE, STEP, draw_episodes, episodes_dls, push, pushed_dls
from ssl_nb.masked.lewm import LeWM, lewm_loss


@pytest.fixture(scope='module')
def dls(): return pushed_dls(n=64, bs=16)


def make(dls, **kwargs):
    torch.manual_seed(0)
    return LeWM.for_data(create_encoder('small_frame', dls.info), dls, **kwargs)


def test_every_frame_follows_from_the_one_before():
    "By a loop over episodes, steps and axes; and the clip shows the digit where it is said to be"
    e = draw_episodes('valid', 30, frames=6, size=40, seed=3)
    for i in range(30):
        for t in range(5):
            for axis in range(2):
                to = e['where'][i,t,axis].item() + STEP*int(e['action'][i,t,axis])
                assert e['where'][i,t+1,axis] == min(40-SIDE, max(0, to))
    assert torch.equal(e['clip'], place_sprites(e['sprite'], e['where'].numpy(), 40))


def test_actions_and_starts_are_even():
    e = draw_episodes('train', 3000, frames=3)
    pairs = (3*(e['action'][...,0]+1)+e['action'][...,1]+1).long().flatten().bincount(minlength=9)/6000
    assert (pairs-1/9).abs().max() < 0.02 # standard error 0.004
    starts = e['where'][:,0].flatten().bincount(minlength=32-SIDE+1)/6000
    assert len(starts)==32-SIDE+1 and (starts-1/len(starts)).abs().max() < 0.015


def test_a_seed_is_an_episode_and_parts_share_no_digit():
    a,b,c = [draw_episodes(p, 20, seed=s) for p,s in (('train',0), ('train',0), ('train',1))]
    assert torch.equal(a['clip'], b['clip']) and not torch.equal(a['clip'], c['clip'])
    train,test = [{s.tobytes() for s in draw_episodes(p, 500)['sprite']} for p in ('train','test')]
    assert not train & test


def test_labels_are_digit_and_place_at_the_end(dls):
    w,(_,place) = dls.valid.world,dls.valid.y.T
    centre = w['where'][:,-1]+SIDE/2
    assert torch.equal(place, 2*(centre[:,0]>=16).long()+(centre[:,1]>=16).long())
    assert torch.equal(dls.valid.y[:,0], w['digit']) and list(dls.info.classes)==['digit','place']


def test_no_prediction_knows_a_later_frame_or_action(dls):
    m = make(dls).eval() # batch normalisation mixes samples in training
    x,a,_ = dls.one_batch()
    with torch.no_grad():
        pred,z = m(x, a)
        x2,a2 = x.clone(),a.clone()
        x2[:,:,6:],a2[:,5:] = 0.5,0
        pred2,z2 = m(x2, a2)
    assert torch.allclose(pred[:,:5], pred2[:,:5], atol=1e-5) and torch.allclose(z[:,:6], z2[:,:6], atol=1e-5)
    assert (pred[:,5:]-pred2[:,5:]).abs().amax((0,2)).min() > 1e-4


def test_gradient_reaches_the_target_too():
    "No stop-gradient: the embedding that is predicted moves as much as the prediction, the other way"
    pred,z = torch.randn(8,3,4, requires_grad=True),torch.randn(8,4,4, requires_grad=True)
    p,t = torch.autograd.grad(lewm_loss(pred, z, lamb=0.), (pred, z))
    assert torch.allclose(p, -t[:,1:]) and not t[:,0].any() and p.any()


def test_rollout_is_step_after_step(dls):
    m,(x,a,_) = make(dls).eval(),dls.one_batch()
    with torch.no_grad():
        z = start = m.embed(x)[:,0]
        for t in range(4): z = m.step(z, a[:,t])
    assert torch.allclose(m.rollout(start, a[:,:4])[:,-1], z)
    assert m.rollout(start[:,None].expand(-1,5,-1), a[:,None,:4].expand(-1,5,-1,-1)).shape==(16,5,4,32)


class Known(LeWM):
    "A world model that knows: the embedding is row and column, divided by ten"
    def embed(self, x):
        ink = x[:,0].clamp(min=1e-6)
        axis = lambda dim: (ink.sum(dim)*torch.arange(32.)).sum(2)/ink.sum((2,3))
        return torch.stack([axis(3), axis(2)], 2)/10
    def step(self, z, action): return (10*z+STEP*action).clamp(SIDE/2-1, 32-SIDE/2)/10


def test_the_planner_reaches_every_goal_in_a_world_that_is_known(dls):
    m = Known(create_encoder('small_frame', dls.info))
    sprite = torch.full((40,SIDE,SIDE), 255, dtype=torch.uint8).numpy()
    g = torch.Generator().manual_seed(0)
    here,goal = torch.randint(0, 32-SIDE+1, (2,40,2), generator=g)
    frames = lambda p: place_sprites(sprite, p[:,None].numpy(), 32)[:,:,0].float()/255
    plan = m.plan(frames(here), frames(goal), steps=8, generator=g)
    assert plan.shape==(40,8,2) and set(plan.unique().tolist()) <= {-1.,0.,1.}
    for a in plan.unbind(1): here = push(here, a)
    assert ((here-goal).abs()<=STEP-1).all(1).float().mean() > 0.9


def test_worlds_of_your_own():
    "Colours, another number of frames, actions of three numbers, one label"
    clip = torch.randint(0, 256, (24,3,5,40,40), dtype=torch.uint8)
    own = episodes_dls([(clip, torch.randn(24,4,3), torch.arange(24)%2)]*2, dict(way=['in','out']), bs=8)
    m = make(own)
    assert m.actions==3 and own.info.channels==3
    check_method(m, own.one_batch())
    x,a,_ = own.one_batch()
    with pytest.raises(ValueError, match=r'LeWM needs actions \(8,4,3\)'): m.pretext(x, a[:,:3])
    with torch.autocast('cpu', torch.bfloat16): assert m.loss(m(x, a)).isfinite()


def test_its_encoder_is_built_anew(dls):
    enc = create_encoder('small_frame', dls.info, dim=16)
    new = fresh_encoder(enc)
    assert new.num_features==16 and not torch.equal(new.out.weight, enc.out.weight)


def test_the_kind_is_found_by_name_and_never_guessed(tmp_path):
    assert get_method('lewm') is LeWM and which_data(None, 'world')==('world','pushed')
    with pytest.raises(ValueError, match='is world, but this method asks about video'): which_data('pushed', 'video')
    with pytest.raises(ValueError, match='does not say which actions were taken'): get_kind('world').read(tmp_path)
    assert get_kind('world').suits(tmp_path)==0
    with pytest.raises(ValueError, match='frames must be at least 2'): pushed_dls(frames=1)
