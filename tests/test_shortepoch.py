"ShortEpochCallback in what a page cannot show: every size, faults in mid-epoch, workers, copies, looks from inside"
import multiprocessing, operator, pickle
from contextlib import suppress
from copy import deepcopy
from decimal import ROUND_CEILING, Decimal
from itertools import count, cycle, islice
from types import SimpleNamespace

import matplotlib
matplotlib.use('agg')
import pytest
from fastai.vision.all import Datasets, ImageDataLoaders, aug_transforms, mae, mse
from fastprogress.fastprogress import ConsoleMasterBar, ConsoleProgressBar
from hypothesis import given, strategies as st
from torch.utils.data import Dataset, IterableDataset

from common import *
from fastcb_training.data import digits
from fastcb_training.shortepoch import ShortEpochCallback

def data(**kwargs): return regression(n_valid=80, **kwargs)  # 10 batches and 5; at 30 % 3 and 2
def all_items(dl): return items(dl.dataset.tensors[:1])
def workers(): return {worker.pid for worker in multiprocessing.active_children()}
def n_trained(learn, **kwargs):
    "The batches that a fit of one epoch trains and records"
    learn.fit(1, **kwargs)
    assert learn.train_iter == len(learn.recorder.losses)
    return learn.train_iter

def start(dls=None, cbs=None, **kwargs):
    "A Learner with a Probe, and the Probe"
    learn, probe = linear_learner(dls or data(), cbs=cbs, **kwargs), Probe()
    return learn.add_cb(probe), probe

def guarded(f):
    "`f(learn)`, for `At`, but not when `f` itself brings the event about"
    busy = []
    def _inner(cb):
        if busy: return
        busy.append(True)
        f(cb.learn)
        busy.clear()
    return _inner

def whole(dls, *ks):
    "Loaders with no more than the first `ks` batches of those in `dls`"
    parts = [TensorDataset(*(t[:k*dl.bs] for t in dl.dataset.tensors)) for dl,k in zip(dls, ks)]
    return DataLoaders(*(DataLoader(part, bs=dl.bs) for part,dl in zip(parts, dls)), device='cpu')

# ---- how many batches

def phases(cb, n, n_valid):
    "The batches of the two phases of one epoch, without a Learner"
    cb.learn = learn = SimpleNamespace(dls=SimpleNamespace(train=range(n)))
    cb('before_fit')
    for phase,dl in dict(train=range(n), validate=range(n_valid)).items():
        learn.dl = dl
        cb(f'before_{phase}')
        assert len(learn.dl) == len(got := list(learn.dl))
        yield got

def exact(percent, n): return int((Decimal(percent)/100*n).to_integral_value(ROUND_CEILING))

@pytest.mark.parametrize('resume', [False, True])
def test_number_of_batches_is_exact(resume):
    for percent in range(1, 101):
        cb = ShortEpochCallback(percent/100, resume=resume)
        for n in range(1, 201):
            wanted = [list(range(exact(percent, m))) for m in (n, 201 - n)]
            assert list(phases(cb, n, 201 - n)) == wanted, (percent, n)

@pytest.mark.parametrize('n', [1, 2, 7, 200])
def test_n_batches_is_a_number_not_a_part(n):
    for k in range(1, 210):
        assert [len(o) for o in phases(ShortEpochCallback(.5, n_batches=k), n, 3)] == [min(k, n), min(k, 3)]

def test_numbers_of_numpy_are_numbers():
    for kwargs in (dict(pct=np.float32(.07)), dict(pct=np.float64(.07)), dict(n_batches=np.int64(7))):
        assert [len(o) for o in phases(ShortEpochCallback(**kwargs), 100, 200)] == [7, 14 if 'pct' in kwargs else 7]

@pytest.mark.parametrize('pct, n', [(1e-12, [1, 1]), (5e-324, [1, 1]), (5/6, [84, 5]), (1 - 1e-12, [100, 6])])
def test_parts_that_no_decimal_says(pct, n): assert [len(o) for o in phases(ShortEpochCallback(pct), 100, 6)] == n

@examples(40)
@given(st.integers(1, 10_000), st.none()|st.integers(1, 12), st.integers(1, 60), st.integers(0, 20), st.integers(1, 9),
       st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_any_loader_in_a_real_fit(ten_thousandths, n_batches, n, n_valid, bs, drop_last, shuffle, short_valid, n_epoch):
    n = max(n, bs)
    cb = ShortEpochCallback(ten_thousandths/10_000, short_valid, n_batches=n_batches)
    learn, probe = start(regression(n, bs, n_valid, shuffle=shuffle, drop_last=drop_last))
    dls = learn.dls
    def k(dl): return exact(Decimal(ten_thousandths)/100, len(dl)) if n_batches is None else min(n_batches, len(dl))
    first_valid = list(islice(dls.valid, k(dls.valid) if short_valid else None))
    first_train = [] if shuffle else list(islice(dls.train, k(dls.train)))
    learn.fit(n_epoch, cbs=cb)
    assert len(probe.xs) == len(learn.recorder.losses) == n_epoch*k(dls.train)
    assert items(probe.valid_xs) == items(x for x,_ in first_valid)*n_epoch
    if not shuffle: assert items(probe.xs) == items(x for x,_ in first_train)*n_epoch
    assert [len(row) + 2 for row in learn.recorder.values] == [len(learn.recorder.metric_names)]*n_epoch

@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('kwargs', [dict(), dict(num_workers=2), dict(num_workers=2, persistent_workers=True)], ids=str)
def test_workers(kwargs, shuffle, resume):
    before = workers()
    learn, probe = start(data(shuffle=shuffle, **kwargs), ShortEpochCallback(.3, resume=resume))
    learn.fit(2)
    assert [len(probe.xs), len(probe.valid_xs)] == [6, 4]
    seen = items(probe.xs) if resume else items(probe.xs[:3])
    assert len(set(map(tuple, seen))) == len(seen)
    if not shuffle: assert seen == all_items(learn.dls.train)[:len(seen)]
    assert workers() <= before

@pytest.mark.parametrize('resume', [False, True])
def test_a_plain_torch_loader(resume):
    ds = data().train_ds
    learn, probe = start(DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=16) for _ in range(2)), device='cpu'))
    learn.fit(2, cbs=ShortEpochCallback(.3, resume=resume))
    assert items(probe.xs) == (items(ds.tensors[:1])[:96] if resume else items(ds.tensors[:1])[:48]*2)
    assert items(probe.valid_xs) == items(ds.tensors[:1])[:48]*2

def test_counts_the_loader_that_the_distributed_trainer_made():
    every_other = At('before_train', lambda cb: setattr(cb.learn, 'dl', list(cb.dl)[1::2]), order=11)
    learn, probe = start(cbs=[ShortEpochCallback(.5), every_other])
    assert n_trained(learn) == 3 and items(probe.xs[1:2]) == all_items(learn.dls.train)[48:64]

def test_the_view_is_the_loader_in_all_else():
    dls, seen = data(), []
    learn, _ = start(dls, [ShortEpochCallback(.3), At('before_batch', lambda cb: seen.append(cb.dl))])
    learn.fit(1)
    for view,dl,n in zip((seen[0], seen[-1]), dls, (3, 2)):
        assert len(view) == n and view.dataset is dl.dataset and view.bs == dl.bs and view.get_idxs() == dl.get_idxs()

# ---- a whole epoch to everyone else: equal to a full fit on loaders that have no more

FITS = dict(fit=(4, .02), fit_one_cycle=(4, .05), fit_flat_cos=(4, .02), fit_sgdr=(2, 1, .02), fine_tune=(3, .02, 2))
SHORT = [(dict(pct=.3), 3, 2), (dict(pct=.3, short_valid=False), 3, 5), (dict(n_batches=4), 4, 4),
         (dict(n_batches=1), 1, 1), (dict(pct=1), 10, 5), (dict(), 1, 1)]

@pytest.mark.parametrize('kwargs,k,k_valid', SHORT, ids=str)
@pytest.mark.parametrize('fit', FITS)
def test_equals_a_full_fit_of_less_data(fit, kwargs, k, k_valid):
    left = []
    for dls,cbs in ((data(), ShortEpochCallback(**kwargs)), (whole(data(), k, k_valid), None)):
        learn, probe = start(dls, metrics=[mse, mae])
        getattr(learn, fit)(*FITS[fit], cbs=cbs)
        left.append(left_by(learn, probe))
    assert left[0] == left[1]
    assert left[0]['pct_train'] == pytest.approx(1) and not any('cancel' in event for event in left[0]['events'])

@pytest.mark.parametrize('metrics', [[], [mae], [mse, mae, mse]])
@pytest.mark.parametrize('train,valid', [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize('short_valid', [True, False])
def test_rows_are_as_long_as_the_header(train, valid, metrics, short_valid):
    left = []
    k_valid = 2 if short_valid else 5
    for dls,cbs in ((data(), ShortEpochCallback(.3, short_valid)), (whole(data(), 3, k_valid), None)):
        learn, probe = start(dls, metrics=metrics)
        learn.recorder.train_metrics, learn.recorder.valid_metrics = train, valid
        learn.fit(2, cbs=cbs)
        left.append(left_by(learn, probe))
    assert left[0] == left[1] and len(left[0]['losses']) == 6
    for row in left[0]['rows']: assert len(row) + 2 == len(left[0]['header']) and np.isfinite(row).all()

def test_one_cycle_has_the_whole_range_of_rates():
    learn, _ = start()
    learn.fit_one_cycle(2, 1., cbs=ShortEpochCallback(.5))
    learn.fit_one_cycle(2, 1., cbs=ShortEpochCallback(.5, resume=True))
    lrs = learn.recorder.hps['lr']
    assert len(lrs) == 10 and lrs[0] == 1/25 and max(lrs) > .95 and lrs[-1] < .1

@pytest.mark.parametrize('short_valid,k_valid', [(True, 2), (False, 5)])
def test_trackers_and_csv(short_valid, k_valid, tmp_path):
    trackers = SaveModelCallback, partial(EarlyStoppingCallback, patience=3), ReduceLROnPlateau, CSVLogger
    short, left = ShortEpochCallback(.3, short_valid), []
    for name,dls,cbs in (('short', data(), [short]), ('twin', whole(data(), 3, k_valid), [])):
        (tmp_path/name).mkdir()
        learn, probe = start(dls, metrics=mae, path=tmp_path/name)
        learn.fit(9, 1.2, cbs=cbs + [tracker() for tracker in trackers])  # a rate at which the loss soon rises
        log = pd.read_csv(tmp_path/name/'history.csv')
        assert list(log) == list(learn.recorder.metric_names)
        assert log.iloc[:, 1:-1].to_numpy() == pytest.approx(np.array(learn.recorder.values), rel=1e-6)
        assert 3 < len(log) < 9 and learn.recorder.lrs[-1] < learn.recorder.lrs[0]
        saved = torch.load(tmp_path/name/'models'/'model.pth')
        assert all(saved[k].equal(v) for k,v in learn.model.state_dict().items())
        left.append(left_by(learn, probe))
    assert left[0] == left[1]

@pytest.mark.parametrize('kwargs', [dict(every_epoch=True), dict(at_end=True),
                                    dict(monitor='mae', comp=np.less, with_opt=True)], ids=str)
def test_save_model(kwargs, tmp_path):
    for name,dls,cbs in (('short', data(), [ShortEpochCallback(.3)]), ('twin', whole(data(), 3, 2), [])):
        start(dls, metrics=mae, path=tmp_path/name)[0].fit(3, .02, cbs=[SaveModelCallback(**kwargs), *cbs])
    files = {o.name for o in (tmp_path/'twin'/'models').iterdir()}
    assert files and files == {o.name for o in (tmp_path/'short'/'models').iterdir()}
    def load(name, file):
        state = torch.load(tmp_path/name/'models'/file, weights_only=False)
        return state.get('model', state)
    for file in files: assert all(v.equal(load('twin', file)[k]) for k,v in load('short', file).items())

def test_graph_and_progress_bars(monkeypatch):
    graphs, bars = [], {}
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph', lambda self, *args: graphs.append(args))
    def on_update(bar, val, text): bars.setdefault(id(bar), [bar]).append(text)
    monkeypatch.setattr(ConsoleProgressBar, 'on_update', on_update)
    learn, _ = start(cbs=ProgressCallback)
    learn.fit(3, .02, cbs=[ShowGraphCallback, ShortEpochCallback(.3)])
    ends = [texts[-1].split()[:2] for bar,*texts in bars.values() if bar.master is None]  # those of an epoch
    assert ends == [['100.00%', '[3/3'], ['100.00%', '[2/2']]*3
    (train, valid), x_bounds, y_bounds = graphs[-1]
    assert len(graphs) == 3 and x_bounds == (0, 9) and np.isfinite(y_bounds).all()
    assert [len(o) for o in (*train, *valid)] == [9, 9, 3, 3] and valid[0] == [3, 6, 9]

def test_plots():
    learn, _ = start()
    learn.fit_one_cycle(4, .02, cbs=ShortEpochCallback(.3))
    rec = learn.recorder
    train, valid = rec.plot_loss(skip_start=0, ax=plt.subplots()[1]).lines[:2]
    assert list(train.get_ydata()) == pytest.approx([o.item() for o in rec.losses])
    assert list(valid.get_xdata()) == [3, 6, 9, 12] and list(valid.get_ydata()) == [row[1] for row in rec.values]
    rec.plot_sched()
    assert [len(ax.lines[0].get_ydata()) for ax in plt.gcf().axes] == [12, 12]
    plt.close('all')

def test_an_empty_validation_set_stays_empty():
    learn, probe = start(regression(n_valid=0), ShortEpochCallback(.3))
    assert n_trained(learn) == 3 and not probe.valid_xs and learn.recorder.values[0][1] is None

# ---- only the fit is short

def preds(n, **kwargs): return f'get_preds {kwargs}', lambda l: l.get_preds(**kwargs), n
LOOKS = [preds(80), preds(80, reorder=False), preds(80, inner=True), preds(80, inner=True, reorder=False),
         preds(160, ds_idx=0), preds(160, ds_idx=0, reorder=False, inner=True), preds(80, with_loss=True),
         ('get_preds dl', lambda l: l.get_preds(dl=l.dls.train), 160), ('validate', lambda l: l.validate(), 80),
         ('validate ds_idx', lambda l: l.validate(0), 160), ('validate dl', lambda l: l.validate(dl=l.dls.train), 160),
         ('validate cbs', lambda l: l.validate(cbs=ShortEpochCallback(.1)), 80)]
looks = pytest.mark.parametrize('look,n', [pytest.param(*look, id=name) for name,*look in LOOKS])

class Rows(Callback):
    "How many items there were, in training or not"
    order, n = 201, 0
    def before_batch(self): self.n += len(self.x)

def fitted():
    "A Learner that knows what it would without a fit, but for the state that `inner=True` needs"
    learn, _ = start(lr=0.)
    learn.fit(1)
    return learn

def as_lists(out): return [o.tolist() if isinstance(o, Tensor) else o for o in out]

@looks
@pytest.mark.parametrize('resume', [False, True])
def test_looks_outside_a_fit_are_whole(look, n, resume):
    rows = Rows()
    learn, plain = start(cbs=[ShortEpochCallback(.3, resume=resume), rows], lr=0.)[0], fitted()
    def check():
        rows.n = 0
        assert as_lists(look(learn)) == as_lists(look(plain)) and rows.n == n
    learn.fit(2)
    check()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_step', stop(KeyboardInterrupt())))
    check()
    assert n_trained(learn) == 3
    check()

@looks
@pytest.mark.parametrize('event', ['after_train', 'after_epoch', 'after_validate'])
@pytest.mark.parametrize('kwargs', [dict(), dict(resume=True)], ids=str)
def test_looks_inside_a_fit_are_whole_and_disturb_nothing(look, n, event, kwargs):
    rows, seen, outs = Rows(), [], []
    def inside(learn):
        before = rows.n
        outs.append(as_lists(look(learn)))
        seen.append(rows.n - before)
    learn, probe = start(cbs=rows, lr=0.)
    learn.fit(3, cbs=[ShortEpochCallback(.4, **kwargs), At(event, guarded(inside), order=99)])
    assert seen == [n]*3
    assert outs == [as_lists(look(fitted()))]*3
    assert len(items(probe.valid_xs)) == 3*n + 3*2*16
    everything = all_items(learn.dls.train)
    assert items(probe.xs) == (everything + everything[:32] if kwargs else everything[:64]*3)

def test_fetch_preds_inside_a_fit():
    fetch = FetchPredsCallback()
    start()[0].fit(2, cbs=[ShortEpochCallback(.3), fetch])
    assert [len(o) for o in fetch.preds] == [80, 80]

def test_lr_find_sees_all_its_data(tmp_path):
    kinds = None, ShortEpochCallback(.1), ShortEpochCallback(.1, resume=True)
    learners = [start(cbs=cbs, path=tmp_path)[0] for cbs in kinds]
    rates = [l.lr_find(num_it=50, stop_div=False, show_plot=False) for l in learners]
    left = [(l.recorder.lrs, l.recorder.losses, weights(l.model).tolist()) for l in learners]
    assert rates[0] == rates[1] == rates[2] and left[0] == left[1] == left[2] and len(left[0][0]) == 50
    assert [n_trained(l) for l in learners] == [10, 1, 1]

@pytest.mark.parametrize('inside', [False, True])
def test_predict_tta_and_show_results_see_all_their_data(inside, tmp_path):
    path = digits(tmp_path, classes=(0, 1), size=8)
    dls = ImageDataLoaders.from_folder(path, valid_pct=.2, seed=0, bs=16, device='cpu', num_workers=0,
                                       batch_tfms=aug_transforms())
    n, looked = len(dls.valid_ds), []
    def look(learn):
        preds, targs = learn.get_preds()
        assert len(preds) == len(targs) == n > 32 and all(len(o) == n for o in learn.tta(n=2))
        assert learn.predict(dls.valid_ds.items[-1])[2].tolist() == pytest.approx(preds[-1].tolist(), abs=1e-5)
        learn.show_results(max_n=9)
        assert len([ax for ax in plt.gcf().axes if ax.images]) == 9
        plt.close('all')
        looked.append(learn.dls)
    learn = quiet(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), cbs=ShortEpochCallback(.1)))
    learn.fit(2, cbs=At('after_epoch', guarded(look), order=99) if inside else None)
    look(learn)
    assert len(looked) == 1 + 2*inside and n_trained(learn) == -(-len(dls.train)//10)

@pytest.mark.parametrize('resume', [False, True])
def test_nothing_is_left_for_the_next_fit(resume):
    learn, probe = start()
    dls, loaders, cbs = learn.dls, list(learn.dls), list(learn.cbs)
    assert n_trained(learn, cbs=ShortEpochCallback(.3, resume=resume)) == 3
    assert learn.dls is dls and all(a is b for a,b in zip(dls, loaders)) and [len(dl) for dl in dls] == [10, 5]
    assert list(learn.cbs) == cbs and not hasattr(learn, 'short_epoch') and learn.dl is None
    assert n_trained(learn) == 10 and len(probe.valid_xs) == 2 + 5

@pytest.mark.parametrize('cbs,k', [(ShortEpochCallback, 1), (ShortEpochCallback(.3), 3),
                                   (ShortEpochCallback(.3, resume=True), 3)])
def test_a_class_or_an_object_again_and_again(cbs, k):
    learn, probe = start()
    assert [n_trained(learn, cbs=cbs) for _ in range(3)] == [k]*3
    assert items(probe.xs) == all_items(learn.dls.train)[:k*16]*3
    assert [n_trained(start()[0], cbs=[cbs]) for _ in range(2)] == [k]*2

# ---- resume

@pytest.mark.parametrize('pct,n_epoch', [(.1, 10), (.2, 5), (.25, 4), (1/3, 3), (.5, 2), (1., 1)])
@pytest.mark.parametrize('shuffle', [False, True])
def test_resume_sees_every_item_once(pct, n_epoch, shuffle):
    dls = regression(n=16*60, n_valid=80, shuffle=shuffle)
    learn, probe = start(dls)
    learn.fit(n_epoch, cbs=ShortEpochCallback(pct, resume=True))
    assert sorted(items(probe.xs)) == sorted(all_items(dls.train)) and len(probe.xs) == 60
    assert (items(probe.xs) != all_items(dls.train)) == shuffle
    assert items(probe.valid_xs) == all_items(dls.valid)[:16*exact(Decimal(str(pct))*100, 5)]*n_epoch

@examples(40)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 12), st.integers(1, 9), st.booleans(), st.booleans())
def test_resume_loses_and_repeats_nothing(n, bs, k, n_epoch, shuffle, drop_last):
    n = max(n, bs)
    learn, probe = start(regression(n, bs, 3*bs, shuffle=shuffle, drop_last=drop_last))
    dls = learn.dls
    plain = [x for x,_ in dls.valid], [x for x,_ in dls.train]
    learn.fit(n_epoch, cbs=ShortEpochCallback(n_batches=k, resume=True))
    assert len(probe.xs) == min(k, len(dls.train))*n_epoch == len(learn.recorder.losses)
    assert items(probe.valid_xs) == items(plain[0][:k])*n_epoch
    if not shuffle: assert items(probe.xs) == items(islice(cycle(plain[1]), len(probe.xs)))
    passes = [items(probe.xs[i:i+len(dls.train)]) for i in range(0, len(probe.xs), len(dls.train))]
    for seen in passes:
        assert len(set(map(tuple, seen))) == len(seen)
        if len(seen) == n: assert sorted(seen) == sorted(all_items(dls.train))

def test_each_pass_is_shuffled_anew():
    learn, probe = start(data(shuffle=True))
    learn.fit(8, cbs=ShortEpochCallback(.4, resume=True))
    passes = [items(probe.xs[i:i+10]) for i in (0, 10, 20)]
    assert passes[0] != passes[1] != passes[2] != passes[0] and all(sorted(p) == sorted(passes[0]) for p in passes)

def test_validation_and_a_new_fit_start_over():
    learn, probe = start(cbs=ShortEpochCallback(.3, resume=True))
    learn.fit(3)
    learn.fit(2)
    everything, valid = all_items(learn.dls.train), all_items(learn.dls.valid)
    assert items(probe.xs) == everything[:144] + everything[:96]
    assert items(probe.valid_xs) == valid[:32]*5

@pytest.mark.parametrize('kwargs', [dict(), dict(resume=True)], ids=str)
def test_loaders_replaced_in_mid_fit_are_noticed(kwargs):
    new = regression(n=96, bs=8, seed=1)
    learn, probe = start(cbs=At('before_epoch', lambda cb: setattr(cb.learn, 'dls', new), ep=1))
    old = learn.dls
    learn.fit(3, cbs=ShortEpochCallback(.25, **kwargs))
    again = all_items(new.train)[24:48] if kwargs else all_items(new.train)[:24]
    assert items(probe.xs) == all_items(old.train)[:48] + all_items(new.train)[:24] + again

class Stream(IterableDataset):
    "Items that come one after the other"
    def __init__(self, ds): self.ds = ds
    def __iter__(self): return (self.ds[i] for i in range(len(self.ds)))

def streams(**kwargs):
    return DataLoaders(*(DataLoader(Stream(dl.dataset), bs=16, **kwargs) for dl in data()), device='cpu')

@pytest.mark.parametrize('stream,n_look', [(False, 0), (False, 1), (True, 0)])  # fastai reads a stream for one only
def test_resume_when_somebody_else_reads_the_loader(stream, n_look):
    learn, probe = start(streams(n=160) if stream else data())
    read = [At('after_train', lambda cb: cb.dls.train.one_batch()), At('after_epoch', guarded(lambda l: l.validate(0)))]
    learn.fit(4, cbs=[ShortEpochCallback(.3, resume=True), *read[:2*n_look]])
    everything = all_items(data().train)
    assert items(probe.xs) == everything + everything[:32]

@pytest.mark.parametrize('kwargs', [dict(), dict(resume=True)], ids=str)
def test_a_stream_is_put_down_after_the_fit(kwargs):
    learn, _ = start(streams(n=160))
    learn.fit(2, cbs=ShortEpochCallback(.3, **kwargs))
    assert n_trained(deepcopy(learn)) == 10

def test_a_loader_that_skips_items_still_fills_resumed_epochs():
    def skip(item):
        if item[0][0] > 0: raise SkipItemException()
        return item
    ds = data().train_ds
    kept = [row for row in items(ds.tensors[:1]) if row[0] <= 0]
    learn, probe = start(DataLoaders(*(DataLoader(ds, bs=16, after_item=skip) for _ in range(2)), device='cpu'))
    learn.fit(4, cbs=ShortEpochCallback(.4, resume=True))
    assert len(probe.xs) == 16 and items(probe.xs)[:2*len(kept)] == kept*2

# ---- the work not asked for

class Counted(Dataset):
    "Knows how often each item was asked for, by whichever process"
    def __init__(self, n): self.asked = torch.zeros(n, dtype=torch.int).share_memory_()
    def __len__(self): return len(self.asked)
    def __getitem__(self, i):
        self.asked[i] += 1
        return torch.full((3,), i/len(self)), tensor([1.])

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('short', [dict(pct=.01), dict(n_batches=5), dict(n_batches=5, resume=True)], ids=str)
def test_reads_no_more_than_it_trains(short, num_workers):
    loaders = [DataLoader(Counted(5000), bs=10, num_workers=num_workers, shuffle=shuffle) for shuffle in (True, False)]
    dls = DataLoaders(*loaders, device='cpu')
    start(dls, ShortEpochCallback(**short))[0].fit(1)
    for dl in dls:
        asked = dl.dataset.asked
        assert 50 <= asked.sum() <= 50 + 2*num_workers*10 and asked.max() == 1  # each worker fetches 2 batches ahead
    assert dls.valid.dataset.asked[:50].all()

@pytest.mark.parametrize('resume,passes', [(False, [4, 4]), (True, [2, 4])])
def test_loaders_are_started_no_more_than_needed(resume, passes):
    begun = [[], []]
    dls = data()
    for dl,b in zip(dls, begun): dl.before_iter = partial(b.append, True)
    start(dls)[0].fit(4, cbs=ShortEpochCallback(.3, resume=resume))
    assert [len(o) for o in begun] == passes

# ---- faults in mid-epoch

FAULTS = dict(before_train=None, before_batch=1, after_step=2, after_train=None, before_validate=None, after_epoch=None)
def in_validation(f): return At('after_batch', lambda cb: cb.training or f(cb), it=1)
def in_a_look(f): return At('after_train', guarded(lambda l: l.validate(cbs=At('after_batch', f, it=3))))

@pytest.mark.parametrize('fault', [in_validation, in_a_look] + [
    pytest.param(partial(At, event, it=it, ep=1), id=event) for event,it in FAULTS.items()])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), ValueError('broken')], ids=repr)
@pytest.mark.parametrize('on_learner', [False, True])
@pytest.mark.parametrize('resume', [False, True])
def test_the_fit_after_a_fault_is_as_if_nothing_had_been(fault, exc, on_learner, resume):
    left = []
    for broken in (True, False):
        cb = ShortEpochCallback(.3, resume=resume)
        learn, probe = start(cbs=cb if on_learner else None)
        fit = partial(learn.fit, 3, .02, cbs=None if on_learner else cb, reset_opt=True)
        before = {k: v.clone() for k,v in learn.model.state_dict().items()}
        if broken:
            with learn.added_cbs(fault(stop(exc))), pytest.raises(type(exc)): fit()
            learn.model.load_state_dict(before)
            learn.model.zero_grad()  # which fastai leaves after an error between a step and `zero_grad`
            for recorded in (probe.xs, probe.valid_xs, probe.events, probe.grads): recorded.clear()
        fit()
        left.append(left_by(learn, probe))
    assert left[0] == left[1]
    assert n_trained(learn) == (3 if on_learner else 10)

@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('event,exc,trained', [
    ('before_batch', CancelBatchException(), 8), ('before_step', CancelStepException(), 9),
    ('after_step', CancelTrainException(), 8), ('after_step', CancelEpochException(), 8),
    ('after_step', CancelFitException(), 5), ('before_epoch', CancelEpochException(), 6),
    ('before_train', CancelTrainException(), 6), ('before_fit', CancelFitException(), 0)], ids=repr)
def test_cancelling_is_no_fault(event, exc, trained, resume):
    it = 1 if event.split('_')[1] in ('batch', 'step') else None
    learn, probe = start(cbs=ShortEpochCallback(.3, resume=resume))
    with learn.added_cbs(At(event, stop(exc), it=it, ep=None if event == 'before_fit' else 1)): learn.fit(3)
    assert probe.events.count('after_loss') - len(probe.valid_xs) == trained
    for xs in (probe.xs, probe.valid_xs): xs.clear()
    learn.fit(2)
    assert items(probe.xs) == (all_items(learn.dls.train)[:96] if resume else all_items(learn.dls.train)[:48]*2)
    assert len(probe.valid_xs) == 4

@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('on_learner', [False, True])
def test_data_that_could_not_be_read(on_learner, resume):
    asked = count()
    def fragile(item):
        if next(asked) == 70: raise OSError('no such picture')
        return item
    cb = ShortEpochCallback(.3, resume=resume)
    learn, probe = start(data(after_item=fragile), cb if on_learner else None)
    with pytest.raises(OSError, match='no such picture'): learn.fit(3, cbs=None if on_learner else cb)
    probe.xs.clear()
    assert n_trained(learn, cbs=None if on_learner else cb) == 3 and items(probe.xs) == all_items(learn.dls.train)[:48]

@pytest.mark.parametrize('persistent_workers', [False, True])
@pytest.mark.parametrize('short', [dict(), dict(resume=True)], ids=str)
def test_no_worker_outlives_the_fit(short, persistent_workers):
    before = workers()
    learn, _ = start(data(num_workers=2, persistent_workers=persistent_workers))
    cb, fault = ShortEpochCallback(.3, **short), At('after_step', stop(ValueError), it=1, ep=1)
    learn.fit(2, cbs=cb)
    assert workers() <= before
    with suppress(ValueError): learn.fit(2, cbs=[cb, fault])
    assert workers() <= before
    learn.add_cb(cb)
    with suppress(ValueError): learn.fit(2, cbs=fault)
    learn.fit(1)
    assert workers() <= before

# ---- export

def three(i): return tensor([1., i/10, i % 7])
def target(i): return tensor([i % 3.])
def datasets(source=range(100)):
    ds = Datasets(source, [[three], [target]], splits=[range(80), range(80, 100)])  # 10 batches and 3
    return ds.dataloaders(bs=8, shuffle=False, num_workers=0, device='cpu')

settings_of = operator.attrgetter('pct', 'short_valid', 'n_batches', 'resume')

class Live:
    "An item of a data set that must not go along with an exported Learner"
    def __init__(self, i): self.i = i
    def __mod__(self, n): return self.i % n
    def __truediv__(self, n): return self.i/n
    def __reduce__(self): raise pickle.PicklingError('the data went along')

@pytest.mark.parametrize('when', ['before', 'after_validate', 'after_epoch', 'after'])
@pytest.mark.parametrize('resume', [False, True])
def test_export_and_load_learner(when, resume, tmp_path):
    dls = datasets([Live(i) for i in range(100)])
    learn, probe = start(dls, ShortEpochCallback(.3, False, resume=resume), path=tmp_path, lr=0.)
    if when == 'before': learn.export()
    learn.fit(3, cbs=At(when, lambda cb: cb.learn.export(), ep=1) if '_' in when else None)
    if when == 'after': learn.export()
    assert len(probe.xs) == 9 and n_trained(learn) == 3
    loaded = load_learner(tmp_path/'export.pkl')
    assert settings_of(loaded.short_epoch) == (.3, False, None, resume)
    assert len(loaded.get_preds(dl=datasets().train)[0]) == 80
    loaded.dls = datasets()
    loaded.probe.xs.clear()
    loaded.fit(2)
    assert len(loaded.probe.xs) == 6

# ---- what is refused

@pytest.mark.parametrize('kwargs', [dict(n_batches=3, pct=2), dict(n_batches=3, pct='all')], ids=str)
def test_pct_is_checked_also_where_n_batches_rules(kwargs):
    with pytest.raises((TypeError, ValueError), match='pct'): ShortEpochCallback(**kwargs)

def test_n_batches_and_resume_go_by_name_only():
    with pytest.raises(TypeError): ShortEpochCallback(.5, True, 3)
    with pytest.raises(TypeError): ShortEpochCallback(.5, before_fit=noop)

@pytest.mark.parametrize('dls', [lambda: regression(n=0), lambda: regression(n=7, drop_last=True)])
@pytest.mark.parametrize('cbs', [ShortEpochCallback, ShortEpochCallback(n_batches=2, resume=True)])
def test_a_training_loader_without_batches(dls, cbs):
    learn, _ = start(dls())
    with pytest.raises(ValueError, match=r'`dls\.train` .* at least one batch'): learn.fit(1, cbs=cbs)
    learn.dls = data()
    assert n_trained(learn) == 10

def test_a_loader_without_a_length_is_refused_as_fastai_refuses_it():
    for cbs in (None, ShortEpochCallback(.5), ShortEpochCallback(n_batches=2, resume=True)):
        with pytest.raises(TypeError): start(streams())[0].fit(1, cbs=cbs)
