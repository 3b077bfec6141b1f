"""The report: it counts with what the data holds, says how far its numbers can be trusted, stays small, and changes nothing by looking."""
import copy, json, re, subprocess, sys, warnings

import numpy as np
import pytest
import torch
from torch import nn

from ssl_nb.core.loader import array_dls, digits_dls, finish_dls
from ssl_nb.core.measures import default_k
from ssl_nb.evaluate import baselines as R, report as reports
from ssl_nb.evaluate.few_labels import check_labels, few_label_accuracy, fit_probe, paired_lead, test_error as standard_error
from ssl_nb.evaluate.report import report, table_text

from conftest import quiet


class Means(nn.Module):
    "An encoder that costs nothing: a linear layer over the image at 8 x 8"
    def __init__(self, channels=1, num_features=16):
        super().__init__()
        self.args, self.num_features = dict(channels=channels, num_features=num_features), num_features
        self.layer = nn.Linear(channels*64, num_features)
    def forward(self, x): return self.layer(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))


def classes(counts, seed=0, own=0.5):
    "8 x 8 images: each class has a pattern, with noise"
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.random.default_rng(9).random((len(counts), 8, 8))[y]*own + (1-own)*rng.random((len(y), 8, 8))
    order = rng.permutation(len(y))
    return x[order], y[order]


def quick(dls, **kwargs): return report(Means(dls.info.channels), dls, show=False, **dict(supervised=0) | kwargs)


MEMORY = '''
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_report import Means, array_dls, quick, report
n, size = {n}, 64
x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
y = torch.arange(n)%2 if {labels} else torch.full((n,), -1)
dls = array_dls(x[:n//2], y[:n//2].numpy(), x[n//2:], y[n//2:].numpy(), classes=['a', 'b'] if {labels} else [])
small = array_dls(x[:200], y[:200].numpy(), classes=['a', 'b'] if {labels} else [])
views = lambda v: v.flip(-1)
quick(small, views=views) # what is needed once: libraries, threads
del x
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rep = quick(dls, views=views)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)*1024/(n*3*size**2), list(rep.table))
'''


@pytest.mark.parametrize('labels', [False, True])
def test_memory_is_at_most_three_times_the_images(labels, root):
    "Measured in a process of its own; it was 8 to 10 times without labels, and 16 times with them"
    source = MEMORY.format(tests=str(root/'tests'), n=8000, labels=labels)
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', source], capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout.split()[0]) < 3, out.stdout
    assert ('probe all' in out.stdout) == labels


def test_more_samples_than_fit_are_left_out_in_every_row_and_said():
    x, y = classes([300, 300])
    dls = array_dls(x[:400], y[:400], x[400:], y[400:])
    rep = quick(dls, most=100*64)
    assert '100 of them drawn at random' in rep.protocol and '(100 samples' in rep.protocol
    assert rep.error.loc['raw input', 'probe all'] == pytest.approx(100*standard_error(rep.table.loc['raw input', 'probe all']/100, 100))


nothing = dict(
    unlabelled=(lambda y: np.full_like(y, -1), 'no sample of the train split has a label'),
    one_class=(lambda y: np.zeros_like(y), "of one class, '0'"),
    one_label=(lambda y: np.where(np.arange(len(y)) == 3, 0, -1), 'of one class'))

@pytest.mark.parametrize('name', nothing)
def test_without_two_classes_to_learn_from_there_is_a_report_that_says_so(name):
    change, why = nothing[name]
    x, y = classes([20, 20])
    dls = array_dls(x, change(y), x, y, classes=['0', '1'])
    assert why in check_labels(dls)
    rep = quick(dls, supervised=True)
    assert list(rep.table) == ['rankme', 'alignment', 'uniformity', 'std'] and f'No accuracies: {check_labels(dls)}' in rep.protocol
    assert json.dumps(rep.to_dict()) and 'without labels' in rep.verdict()


def test_a_class_of_one_sample_and_a_class_that_only_the_test_has():
    x, y = classes([30, 30, 1, 5])
    train = y != 3
    rep = quick(array_dls(x[train], y[train], x, y, classes=list('abcd')), supervised=True)
    assert rep.table.loc['raw input', 'probe all'] > 80 and 'the smallest class has 1' in rep.protocol


def test_k_follows_the_data_and_does_not_hand_uneven_sets_to_the_majority():
    x, y = classes([200, 20, 12, 12])
    tx, ty = classes([100, 10, 6, 6], seed=1)
    dls = array_dls(x, y, tx, ty, classes=list('abcd'))
    at = {k: quick(dls, k=k).table.loc['raw input', 'knn all'] for k in (1, 200, None)}
    assert at[200] < 85 < 95 < min(at[1], at[None]), at # 82 is the majority
    assert default_k(torch.tensor([0]*36+[1]*36+[-1]*500)) == 6


def test_uneven_classes_show_a_majority_and_balanced_accuracies():
    x, y = classes([80, 10, 10])
    dls = array_dls(x, y, x, y, classes=list('abc'))
    rep = quick(dls)
    assert rep.table.index[0] == 'majority' and rep.table.loc['majority', 'knn all'] == pytest.approx(80)
    assert rep.balanced.loc['majority', 'knn all'] == pytest.approx(100/3)
    assert '80.0 ± 4.0 (33.3)' in repr(rep) and 'nan' not in repr(rep).lower()
    even = quick(digits_dls())
    assert 'majority' not in even.table.index and even.balanced is None


def test_both_errors_are_in_the_table():
    rep = quick(digits_dls())
    v, s, e = [t.loc['raw input'] for t in (rep.table, rep.spread, rep.error)]
    assert e['knn all'] == pytest.approx(100*(v['knn all']/100*(1-v['knn all']/100)/449)**0.5)
    assert np.isnan(s['knn all']) and f"{v['knn all']:.1f} ± {e['knn all']:.1f}" in repr(rep)
    assert f"{v['knn 1']:.1f} ± {(s['knn 1']**2+e['knn 1']**2)**0.5:.1f}" in repr(rep)


def test_the_lead_is_paired():
    "Its error is that of the difference, as 2,000 other test sets show"
    rng = np.random.default_rng(0)
    def one():
        hard = rng.random(200)
        return [(hard < p).astype(float)[None] for p in (0.8, 0.75)]
    leads = np.array([paired_lead(*one()) for _ in range(2000)])
    assert leads[:, 0].std() == pytest.approx(leads[:, 1].mean(), rel=0.1) and leads[:, 0].mean() == pytest.approx(5, abs=0.2)


def test_few_labels_in_all_are_divided_again_and_again():
    x, y = classes([300, 300], own=0.2)
    some = np.full_like(y, -1)
    for c in range(2): some[np.flatnonzero(y == c)[:12]] = c
    dls = array_dls(x[:400], some[:400], x[400:], some[400:], classes=list('ab'))
    rep = quick(dls, supervised=True)
    assert list(rep.table)[:4] == ['knn 1', 'knn 6', 'probe 1', 'probe 6']
    assert '24 samples have one' in rep.protocol and 'divided 10 times' in rep.protocol
    assert rep.spread.loc['raw input', 'probe 6'] > 0 and rep.error.loc['raw input', 'probe 6'] > 2
    full = quick(array_dls(x[:400], y[:400], x[400:], y[400:]))
    assert 'divided' not in full.protocol and 'probe 10' in full.table


def test_an_encoder_that_training_has_ruined_is_called_so():
    dls = digits_dls()
    ruined = Means()
    with torch.no_grad(): ruined.layer.weight[1:] = 0.
    rep = report(ruined, dls, supervised=0, show=False)
    assert 'below its random self' in rep.verdict() and 'training made it worse' in ' '.join(repr(rep).split())
    assert max(map(len, repr(rep).splitlines())) <= 100
    assert 'mean of three random encoders' in rep.protocol


def test_an_untrained_encoder_is_not_called_better_than_another_one(monkeypatch):
    "One draw of the weights may be unlucky; three of them, and the luck between them, are not"
    torch.manual_seed(0)
    dls, lucky, draws = digits_dls(), Means(), []
    def fresh(enc, seed=0): # the first has lost a quarter of its features
        draws.append(Means())
        with torch.no_grad():
            if seed == 0: draws[-1].layer.weight[12:] = 0.
        return draws[-1]
    monkeypatch.setattr(R, 'fresh_encoder', fresh)
    rep = report(lucky, dls, supervised=0, show=False)
    assert len(draws) == 3 and 'level with its random self' in rep.verdict() and 'worse' not in repr(rep)
    c = rep.table['probe 10']
    assert c['this encoder']-c['random encoder'] > 6 # against one of them it would be better


class Normalised(Means):
    "Of its features eight say the class; the others, next to nothing as built, are as large once normalised"
    def __init__(self, loud=True, channels=1, num_features=200):
        super().__init__(channels, num_features)
        self.args |= dict(loud=loud)
        self.norm, self.loud = nn.BatchNorm1d(self.num_features), loud
    def forward(self, x):
        h = super().forward(x)
        rest = torch.sin(1e4*h[:, 8:]) # as good as noise
        return self.norm(torch.cat([h[:, :8], 1e-3*rest], 1) if self.loud else torch.cat([1e-3*h[:, :8]+100, 1e-3*rest+100], 1))


@pytest.mark.parametrize('loud,words', [(True, 'has not seen'), (False, 'has seen')])
def test_the_random_encoder_is_the_stronger_of_two(loud, words):
    "As built or fitted to the data, whichever knows more of the train split; labels of the test split play no part"
    x, y = classes([150]*4, own=0.3)
    tx, ty = classes([60]*4, seed=1, own=0.3)
    one, other = [array_dls(x, y, tx, t, bs=64) for t in (ty, np.roll(ty, 7))]
    enc = Normalised(loud=loud)
    best = R.random_encoder(enc, one)
    fitted = best.norm.num_batches_tracked > 0
    assert bool(fitted) != loud and not best.training
    same = R.random_encoder(enc, other).state_dict()
    assert all(torch.equal(v, same[k]) for k, v in best.state_dict().items())
    assert words in report(enc, one, supervised=0, show=False).protocol
    plain = R.random_encoder(Means(), one)
    assert 'normalisation' not in report(plain, one, supervised=0, show=False).protocol


def test_one_rare_class_does_not_end_the_choice_of_a_random_encoder():
    x, y = classes([150, 150, 150, 1], own=0.3)
    best = R.random_encoder(Normalised(loud=False), array_dls(x, y, x, y, bs=64))
    assert best.norm.num_batches_tracked > 0


def test_without_labels_a_random_encoder_is_as_built():
    x = np.random.default_rng(0).random((100, 8, 8))
    best = R.random_encoder(Normalised(), array_dls(x, bs=32))
    assert best.norm.num_batches_tracked == 0


def test_supervised_has_a_length_of_its_own_and_a_rival_with_ten_labels():
    x, y = classes([150, 150, 150])
    tx, ty = classes([60, 60, 60], seed=1)
    dls = array_dls(x, y, tx, ty, bs=64)
    rep = report(Means(), dls, show=False)
    rows = ['raw input', 'random encoder', 'this encoder', 'supervised', 'supervised, 10 labels']
    assert list(rep.table.index) == rows and 'until valid stopped rising' in rep.protocol
    assert rep.table.loc['supervised', 'probe all'] > 90
    rival = rep.table.loc[rows[-1]]
    assert rival.notna()[['knn 10', 'probe 10']].all() and rival.isna()[['knn 1', 'probe all']].all()
    assert list(report(Means(), dls, supervised=1, show=False).table.index) == rows[:4]
    assert list(report(Means(), dls, supervised=False, show=False).table.index) == rows[:3]


def test_the_rival_sees_only_its_labels():
    "What the other samples are called changes nothing in it"
    x, y = classes([60, 60])
    dls = [array_dls(x, o, x, y, bs=32, classes=list('ab')) for o in (y, y)]
    idx = R.draw_labels(dls[1].train.y, 10, 0)
    other = torch.full_like(dls[1].train.y, 1)
    other[idx] = dls[1].train.y[idx]
    kept = dls[0].train.take(torch.from_numpy(np.sort(idx)))
    few = finish_dls([kept, dls[0].valid, dls[0].test], dls[0].info)
    a = R._to_train_and_watch(dls[0], dls[0].train, None, 10, 0)[0]
    assert set(map(float, a.xs[0].flatten(1).float().sum(1))) == set(map(float, few.train.xs[0].flatten(1).float().sum(1)))


def test_looking_changes_nothing():
    dls, enc = digits_dls(), Means().train()
    before = {k: v.clone() for k, v in enc.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    report(enc, dls, supervised=1, show=False)
    assert enc.training and all(torch.equal(v, before[k]) for k, v in enc.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_an_encoder_that_cannot_be_built_anew_is_still_reported():
    class Token(nn.Module):
        num_features = 64
        def __init__(self): super().__init__(); self.token = nn.Parameter(torch.randn(64))
        def forward(self, x): return x.flatten(1)+self.token
    rep = report(Token(), digits_dls(), show=False)
    assert list(rep.table.index) == ['raw input', 'this encoder'] and 'cannot be built anew' in rep.protocol
    assert 'raw input' in rep.verdict()


def test_a_streamed_set_gives_the_report_of_a_resident_one(tmp_path):
    "Only what has a label is read, and the same samples in the same order"
    from PIL import Image
    from ssl_nb.data.images import image_dls
    x, y = classes([100, 100])
    rows = []
    for i, (im, c) in enumerate(zip(x, y)):
        Image.fromarray((im*255).astype(np.uint8)).save(tmp_path/f'{i}.png')
        rows.append(f"{i}.png,{'ab'[c] if i%2 or i > 120 else ''},{'test' if i > 120 else 'train'}")
    (tmp_path/'set.csv').write_text('\n'.join(['file,label,split', *rows]))
    made = [image_dls(tmp_path/'set.csv', resident=r, workers=0, bs=8) for r in (True, False)]
    a, b = [quick(dls, views=lambda v: v, most=30*64) for dls in made]
    assert R.labelled(made[1].train, made[1].info).n == (made[0].train.y >= 0).sum() < made[1].train.n
    for c in ('knn 10', 'probe all'): assert b.table.loc['raw input', c] == pytest.approx(a.table.loc['raw input', c])


def test_rows_that_could_outlast_the_training_are_left_out_and_said():
    x, y = classes([100, 100])
    dls = array_dls(x, y, x, y)
    short = report(Means(), dls, longest=1e-6, show=False)
    assert list(short.table.index) == ['raw input', 'random encoder', 'this encoder'] and 'No rows trained with labels' in short.protocol
    assert 'supervised' in report(Means(), dls, supervised=1, longest=1e6, show=False).table.index


def test_every_encoder_looks_once_at_each_sample(monkeypatch):
    x, y = classes([100, 100, 100])
    dls, seen, raws = array_dls(x[:200], y[:200], x[200:], y[200:]), [], []
    class Counts(Means):
        def forward(self, x): seen.append(len(x)); return super().forward(x)
    real = reports.raw_features
    monkeypatch.setattr(reports, 'raw_features', lambda *args: raws.append(args[0].n) or real(*args))
    monkeypatch.setattr(reports, '_luck', lambda *args: [])
    monkeypatch.setattr(R, 'fresh_encoder', lambda *args: Means())
    report(Counts(), dls, supervised=0, show=False)
    n, views = sum(dl.n for dl in (dls.train, dls.test)), 2*dls.test.one_batch()[0].shape[0]
    assert sum(seen) == n+views and sorted(raws) == sorted((dls.train.n, dls.test.n))


def test_weights_of_16_bits_have_features_of_32():
    "They met images of 32 bits, and the report stopped"
    dls, enc = digits_dls(), Means()
    whole, half = [report(e, dls, supervised=1, show=False) for e in (enc, copy.deepcopy(enc).bfloat16())]
    assert half.features[0].dtype == torch.float32 and list(half.table.index) == list(whole.table.index)
    for c in ('knn 10', 'probe all'): assert half.table.loc['this encoder', c] == pytest.approx(whole.table.loc['this encoder', c], abs=3)
    with torch.autocast('cpu', torch.bfloat16): auto = report(enc, dls, supervised=0, show=False)
    assert auto.features[0].dtype == torch.float32
    assert auto.table.loc['raw input', 'knn all'] == pytest.approx(whole.table.loc['raw input', 'knn all'], abs=1e-6)


def test_a_printed_table_is_100_wide_and_its_columns_stand_apart():
    x, y = classes([80, 10, 10])
    rep = quick(array_dls(x, y, x, y, classes=list('abc')))
    lines = table_text(rep.text()).splitlines()
    assert max(map(len, lines)) <= 100 and 'probe all   rankme' not in lines[0]
    cells = [re.split(' {3,}', l.strip()) for l in lines if l]
    assert [c for line in cells if line[0].startswith(('knn', 'probe', 'rankme')) for c in line] == list(rep.table)


def test_scikit_learn_says_nothing_and_a_probe_that_is_not_done_says_it_once():
    x, y = classes([60, 12, 5])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quick(array_dls(x, y, x, y, classes=list('abc')))
        many, c = classes([4]*30) # one label in each of 30 classes: more than half as many classes as samples
        quick(array_dls(many, c, many, c, classes=[str(i) for i in range(30)]))
    _, said = quiet(few_label_accuracy, *[torch.as_tensor(o).float().flatten(1) if o.ndim > 1 else torch.as_tensor(o) for o in (x, y, x, y)])
    assert not said
    with pytest.warns(UserWarning, match='did not converge in 2 steps'): fit_probe(x.reshape(len(x), -1), y, max_iter=2)


def test_pretrain_gives_the_rows_with_labels_its_own_time_and_three_minutes_at_least(tmp_path, monkeypatch):
    from ssl_nb.app import run
    given = []
    monkeypatch.setattr(run, 'report_run', lambda *args, **kwargs: given.append(kwargs['longest']))
    dls = digits_dls()
    for speed in (1., 1000.):
        (tmp_path/'history.csv').write_text(f'epoch,samples/s\n0,{speed}\n1,{speed}\n')
        run._report_after(tmp_path, dls, Means(), True)
    assert given == [2*dls.train.n, 180]


def test_a_long_report_says_so_before_and_shows_bars_with_an_estimate(monkeypatch, capsys):
    from ssl_nb.core import bars
    x, y = classes([100, 100])
    dls = array_dls(x, y, x, y)
    monkeypatch.setattr(bars, 'can_draw', lambda: True)
    monkeypatch.setattr(R, 'can_draw', lambda: True)
    monkeypatch.setattr(reports, '_seconds', lambda *args: (30., 600.))
    report(Means(), dls)
    out = capsys.readouterr().out
    assert out.index('report: about 30 seconds for the features, and up to 10 minutes') < out.index('this encoder: features')
    assert 'supervised (until valid stops rising)' in out and 'supervised, 10 labels (until valid' in out and re.search(r'\d+% \[\d+/\d+ \d\d:\d\d<\d\d:\d\d', out)
    monkeypatch.setattr(reports, '_seconds', lambda *args: (1., 2.))
    report(Means(), dls, supervised=0)
    assert '█' not in capsys.readouterr().out # what is done at once has none


def test_a_report_on_several_labels_is_each_report_and_encodes_once(monkeypatch):
    "The third label is missing for some training samples, so that its features are made anew; rows trained with labels are each label's own"
    x, y = classes([120]*4)
    few = np.where(np.arange(len(y))%3==0, -1, y//2)
    y = np.stack([y, y%2, few], 1)
    dls = array_dls(x[:360], y[:360], x[360:], y[360:],
                    classes=dict(shape=list('abcd'), odd=['even', 'odd'], half=['low', 'high']))
    torch.manual_seed(0)
    enc, count, encode = Means(), [0], reports.encode
    def counted(*args): count[0] += 1; return encode(*args)
    monkeypatch.setattr(reports, 'encode', counted)
    ask = dict(labels=(5, None), supervised=1, show=False)
    names = ['shape', 'odd', 'half']
    alone = {l: report(enc, dls, label=l, **ask) for l in names}
    apart, count[0] = count[0], 0
    together = report(enc, dls, label=names, **ask)
    assert list(together) == names and count[0] < 0.7*apart
    for l in names:
        assert together[l].protocol == alone[l].protocol
        np.testing.assert_allclose(together[l].table.values.astype(float), alone[l].table.values.astype(float), atol=1e-4)
    with pytest.raises(ValueError, match='label is an empty list'): report(enc, dls, label=[], **ask)
