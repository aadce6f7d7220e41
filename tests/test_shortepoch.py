"ShortEpochCallback in what a page cannot show: random loaders, streams, workers, faults in mid-epoch, dry runs, looks from inside"
import multiprocessing, operator, pickle, random, threading
from contextlib import suppress
from copy import deepcopy
from decimal import ROUND_CEILING, Decimal
from itertools import count, cycle, islice
from types import SimpleNamespace

import matplotlib
matplotlib.use('agg')
import pytest
from fastai.callback.rnn import ModelResetter
from fastai.vision.all import Datasets, ImageDataLoaders, RocAucBinary, aug_transforms, mae, mse
from fastprogress.fastprogress import ConsoleMasterBar, ConsoleProgressBar
from hypothesis import given, strategies as st
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader as TorchLoader, Dataset, IterableDataset, Sampler

from common import *
from fastcb_training.core import FitCallback, LoaderView, numbered_batches
from fastcb_training.data import digits
from fastcb_training.resume import ResumeFit
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

def evenly(rows, n):
    "`n` of the `rows`, from the first to the last, as evenly as whole numbers allow"
    return [rows[i*(len(rows)-1)//max(n-1, 1)] for i in range(n)]

def whole(dls, n_train, n_valid):
    "Loaders with the batches that a short epoch has, and no more"
    train,valid = ([t.clone() for t in dl.dataset.tensors] for dl in dls)
    bs = dls.train.bs
    train = [t[:n_train*bs] for t in train]
    if n_valid < len(dls.valid): valid = [torch.stack(evenly(t, n_valid*bs)) for t in valid]
    return DataLoaders(*(DataLoader(TensorDataset(*o), bs=bs) for o in (train, valid)), device='cpu')

# ---- how many batches

def phases(cb, n, n_valid):
    "The batches of the two phases of one epoch, without a Learner"
    cb.learn = learn = SimpleNamespace(dls=SimpleNamespace(train=range(n)), cbs=[], lock=threading.Lock())
    cb('before_fit')
    for phase,dl in dict(train=range(n), validate=range(n_valid)).items():
        learn.dl = dl
        cb(f'before_{phase}')
        assert len(learn.dl) == len(got := list(learn.dl))
        yield got

def exact(percent, n): return int((Decimal(percent)/100*n).to_integral_value(ROUND_CEILING))

def test_number_of_batches_is_exact():
    for percent in range(1, 101):
        cb = ShortEpochCallback(percent/100, resume=percent % 5 == 0)
        for n in (*range(1, 20), 25, 40, 50, 75, 100, 125, 150, 175, 200): # where floats round up
            wanted = [list(range(exact(percent, m))) for m in (n, 201 - n)]
            assert list(phases(cb, n, 201 - n)) == wanted, (percent, n)

@pytest.mark.parametrize('n', [1, 7, 200])
def test_numbers_of_batches(n):
    for k in 1, 2, 6, 7, 8, 199, 200, 201:
        assert [len(o) for o in phases(ShortEpochCallback(n_batches=k), n, 3)] == [min(k, n), min(k, 3)]
        assert [len(o) for o in phases(ShortEpochCallback(n_batches=k, n_valid=2), n, 3)] == [min(k, n), 2]
        assert [len(o) for o in phases(ShortEpochCallback(n_batches=k, resume=True), n, 3)] == [k, min(k, 3)]
        assert [len(o) for o in phases(ShortEpochCallback(n_valid=k), n, 200)] == [exact(1, n), min(k, 200)]

def test_numbers_of_numpy_are_numbers():
    for kwargs in (dict(pct=np.float32(.07)), dict(pct=np.float64(.07)), dict(n_batches=np.int64(7), n_valid=np.int64(14))):
        assert [len(o) for o in phases(ShortEpochCallback(**kwargs), 100, 200)] == [7, 14]

@pytest.mark.parametrize('pct, n', [(1e-12, [1, 1]), (5e-324, [1, 1]), (5/6, [84, 5]), (1 - 1e-12, [100, 6])])
def test_parts_that_no_decimal_says(pct, n): assert [len(o) for o in phases(ShortEpochCallback(pct), 100, 6)] == n

# ---- random loaders, against a plain list of what should be seen

class Stream(IterableDataset):
    "Items that come one after the other, and the length that is `said`, if any; `again` and again"
    def __init__(self, ds, again=False, said=None):
        self.ds,self.again = ds,again
        if said is not None: self.__class__ = type('Said', (Stream,), dict(__len__=lambda self: said))
    def __iter__(self):
        rows = (self.ds[i] for i in range(len(self.ds)))
        return cycle([*rows]) if self.again else rows

def loader(cls, ds, bs, **kwargs):
    "A loader of fastai's or of PyTorch's"
    if cls is TorchLoader and 'bs' not in kwargs: kwargs['batch_size'] = bs
    else: kwargs['bs'] = bs
    return cls(ds, **kwargs)

kinds = st.sampled_from(['map', 'stream', 'endless', 'says less', 'endless, says a length'])
sizes = st.integers(1, 40)

@examples(60)
@given(kinds, st.sampled_from([DataLoader, TorchLoader]), sizes, sizes, st.integers(1, 8), st.booleans(), st.booleans(), st.integers(1, 12),
       st.none()|st.integers(1, 12), st.sampled_from(['first', 'resume', 'overfit']), st.integers(1, 4), st.integers(0, 2))
def test_any_loader(kind, cls, n, n_valid, bs, shuffle, drop_last, k, k_valid, mode, n_epoch, start_epoch):
    n,n_valid = max(n, bs),max(n_valid, bs)
    dss = [regression(m, seed=i).train_ds for i,m in enumerate((n, n_valid))]
    def passes(ds):
        "A whole pass over `ds`, in batches"
        rows = items(ds.tensors[:1])
        batches = [rows[i:i+bs] for i in range(0, len(rows), bs)]
        return batches[:-1] if drop_last and len(batches[-1]) < bs else batches
    plain,plain_valid = map(passes, dss)
    if kind == 'map':
        loaders = [loader(cls, ds, bs, shuffle=sh, drop_last=drop_last) for ds,sh in zip(dss, (shuffle, False))]
    else:
        shuffle = False
        said = dict(stream=None, endless=None).get(kind, max(bs, n//2))
        streams = [Stream(ds, 'endless' in kind, said) for ds in dss]
        if said: # what is claimed is all there is
            plain,plain_valid = ([b for b in islice(cycle(items(ds.tensors[:1])), said)] for ds in dss)
            plain,plain_valid = ([o[i:i+bs] for i in range(0, said, bs)] for o in (plain, plain_valid))
            if drop_last: plain,plain_valid = ([b for b in o if len(b) == bs] for o in (plain, plain_valid))
            if kind == 'says less' and (said > n_valid or said % bs): return # `DataLoader` counts these otherwise
            if said % bs: return
        elif kind == 'endless': plain,plain_valid = ([islice_rows(ds, bs, i) for i in range(60)] for ds in dss)
        loaders = [loader(cls, ds, bs, drop_last=drop_last) for ds in streams]
    if mode == 'overfit': k_valid = None
    if mode != 'resume': start_epoch = 0
    if kind == 'endless' and mode == 'resume' and (n_epoch+start_epoch)*k > 60: return
    learn,probe = start(DataLoaders(*loaders, device='cpu'))
    learn.fit(n_epoch+start_epoch, cbs=ShortEpochCallback(n_batches=k, n_valid=k_valid, resume=mode=='resume', overfit=mode=='overfit'),
              start_epoch=start_epoch)
    seen = [x.tolist() for x in probe.xs]
    if mode == 'resume':
        assert len(seen) == n_epoch*k
        if not shuffle: assert seen == [*islice(cycle(plain), start_epoch*k, (start_epoch+n_epoch)*k)]
        elif start_epoch == 0:
            for i in range(0, len(seen), len(plain)):
                rows = sum(seen[i:i+len(plain)], [])
                assert len({*map(tuple, rows)}) == len(rows)
                if len(rows) == n: assert sorted(rows) == sorted(sum(passes(dss[0]), []))
    else:
        first = min(k, len(plain))
        assert len(seen) == first*n_epoch
        if not shuffle: assert seen == plain[:first]*n_epoch
        if mode == 'overfit': assert seen == seen[:first]*n_epoch
    valid = [x.tolist() for x in probe.valid_xs]
    if mode == 'overfit': assert valid == seen
    else:
        m = min(k_valid or k, len(plain_valid))
        want = plain_valid[:m]
        if kind == 'map' and m < len(plain_valid):
            rows = evenly(sum(plain_valid, []), m*bs)
            want = [rows[i:i+bs] for i in range(0, len(rows), bs)]
        assert valid == want*n_epoch
    assert len(learn.recorder.losses) == len(seen) and learn.dl is None
    assert all(len(row) + 2 == len(learn.recorder.metric_names) for row in learn.recorder.values[start_epoch:])
    assert not any('it' in vars(dl) for dl in loaders)

def islice_rows(ds, bs, i): return [*islice(cycle(items(ds.tensors[:1])), i*bs, (i+1)*bs)]

@pytest.mark.parametrize('kind, cls, mode', [
    ('map', DataLoader, 'first'), ('map', TorchLoader, 'resume'), ('stream', DataLoader, 'resume'), ('endless', TorchLoader, 'first'),
    ('endless', DataLoader, 'overfit'), ('says 4', TorchLoader, 'overfit'), ('says 4', DataLoader, 'first')])
def test_workers(kind, cls, mode):
    ds = data().train_ds # 160 items, from each of the two workers where it is a stream
    if kind != 'map': ds = Stream(ds, kind == 'endless', 64 if kind == 'says 4' else None)
    before = workers()
    dls = DataLoaders(*(loader(cls, ds, 16, num_workers=2) for _ in range(2)), device='cpu')
    learn,probe = start(dls)
    learn.fit(3, cbs=ShortEpochCallback(n_batches=3, n_valid=2, **({} if mode == 'first' else {mode: True}))
              if mode != 'overfit' else ShortEpochCallback(n_batches=3, overfit=True))
    assert [len(probe.xs), len(probe.valid_xs)] == [9, 9 if mode == 'overfit' else 6]
    xs = [x.tolist() for x in probe.xs]
    if mode != 'resume': assert xs == xs[:3]*3
    elif kind == 'map': assert items(probe.xs) == items(ds.tensors[:1])[:144]
    assert workers() <= before

def test_a_stream_has_a_bar_a_schedule_and_a_row(monkeypatch, tmp_path):
    bars = {}
    monkeypatch.setattr(ConsoleProgressBar, 'on_update', lambda bar, val, text: bars.setdefault(id(bar), [bar]).append(text))
    stream = Stream(data().train_ds, again=True)
    learn,probe = start(DataLoaders(*(DataLoader(stream, bs=16) for _ in range(2)), device='cpu'), ProgressCallback, path=tmp_path)
    learn.fit_one_cycle(2, 1., cbs=[ShortEpochCallback(n_batches=5, n_valid=2, resume=True), SaveModelCallback, CSVLogger])
    ends = [texts[-1].split()[:2] for bar,*texts in bars.values() if bar.master is None]
    assert ends == [['100.00%', '[5/5'], ['100.00%', '[2/2']]*2
    lrs = learn.recorder.hps['lr']
    assert len(lrs) == 10 and lrs[0] == 1/25 and max(lrs) > .95 and lrs[-1] < .1
    assert [len(o) for o in learn.recorder.values] == [2, 2]

@pytest.mark.parametrize('kwargs, name', [(dict(), 'n_batches'), (dict(pct=.5), 'n_batches'), (dict(n_batches=2, short_valid=False), 'n_valid')])
def test_a_stream_without_a_number_is_refused_by_name(kwargs, name):
    for cls in DataLoader, TorchLoader:
        dls = DataLoaders(*(loader(cls, Stream(data().train_ds), 16) for _ in range(2)), device='cpu')
        with pytest.raises(TypeError, match=f'`{name}` has to say how many batches'): start(dls)[0].fit(1, cbs=ShortEpochCallback(**kwargs))

def test_one_stream_is_read_by_others_in_mid_pass():
    ds = data().train_ds
    learn,probe = start(DataLoaders(*(DataLoader(Stream(ds, said=160), bs=16) for _ in range(2)), device='cpu'))
    read = [At('after_train', lambda cb: cb.dls.train.one_batch()), At('after_epoch', guarded(lambda l: l.validate(0)))]
    learn.fit(4, cbs=[ShortEpochCallback(.3, resume=True), *read])
    everything = items(ds.tensors[:1])
    assert items(probe.xs) == everything + everything[:32]

# ---- a spread validation

class Counted(Dataset):
    "Knows how often each item was asked for, by whichever process; the second half is the other class"
    def __init__(self, n): self.asked = torch.zeros(n, dtype=torch.int).share_memory_()
    def __len__(self): return len(self.asked)
    def __getitem__(self, i):
        self.asked[i] += 1
        return torch.full((3,), i/len(self)), tensor([float(2*i >= len(self))])

@pytest.mark.parametrize('cls, num_workers', [(DataLoader, 0), (DataLoader, 2), (TorchLoader, 2)])
@pytest.mark.parametrize('short, k, k_valid', [(dict(n_batches=5, n_valid=1), 5, 1), (dict(pct=.01, resume=True), 5, 5)])
def test_loads_no_more_than_it_takes(short, k, k_valid, cls, num_workers):
    dls = DataLoaders(*(loader(cls, Counted(5000), 10, num_workers=num_workers) for _ in range(2)), device='cpu')
    learn,probe = start(dls, ShortEpochCallback(**short))
    learn.fit(1)
    train,valid = (dl.dataset.asked for dl in dls)
    assert k*10 <= train.sum() <= k*10 + (0 if short.get('resume') else 2*num_workers*10)  # each worker fetches 2 batches ahead
    assert valid.sum() == k_valid*10 and valid.max() == 1
    at = valid.nonzero().flatten()
    assert at[0] == 0 and at[-1] == 4999 and at.diff().max() - at.diff().min() <= 1
    assert probe.valid_xs[0][:, 0].diff().min() > 0

def test_a_metric_of_two_classes_works_in_one_batch(tmp_path):
    dls = DataLoaders(*(DataLoader(Counted(320), bs=16) for _ in range(2)), device='cpu')
    learn,_ = start(dls, metrics=RocAucBinary(), loss_func=nn.MSELoss(), path=tmp_path)
    learn.fit(2, cbs=[ShortEpochCallback(), SaveModelCallback(monitor='roc_auc_score')])
    assert all(np.isfinite(row).all() for row in learn.recorder.values) and (tmp_path/'models'/'model.pth').exists()

def test_items_that_belong_together_stay_together():
    ds = data().train_ds
    class Pairs(DataLoader):
        def create_item(self, i): return super().create_item(i)
    batches = [[0, 1], [5, 6, 7], [2], [3, 4], [9]]
    for dl,own in (Pairs(ds, bs=16), None),(TorchLoader(ds, batch_sampler=batches), batches):
        learn,probe = start(DataLoaders(dl, dl, device='cpu'))
        learn.fit(1, cbs=ShortEpochCallback(n_batches=3))
        n = len(own or range(10))
        assert [x.tolist() for x in probe.valid_xs] == [x.tolist() for x,_ in evenly([*dl], 3)] and len(probe.valid_xs) == 3 < n

# ---- a whole epoch to everyone else: equal to a full fit on loaders that have no more

FITS = dict(fit=(4, .02), fit_one_cycle=(4, .05), fit_flat_cos=(4, .02), fit_sgdr=(2, 1, .02), fine_tune=(3, .02, 2))
SHORT = [(dict(pct=.3), 3, 2), (dict(n_batches=4, short_valid=False), 4, 5), (dict(pct=1), 10, 5)]

@pytest.mark.parametrize('fit, kwargs, k, k_valid', [(fit, *SHORT[i%3]) for i,fit in enumerate(FITS)]+[('fit', *SHORT[1])], ids=str)
def test_equals_a_full_fit_of_less_data(fit, kwargs, k, k_valid):
    left = []
    for dls,cbs in ((data(), ShortEpochCallback(**kwargs)), (whole(data(), k, k_valid), None)):
        learn, probe = start(dls, metrics=[mse, mae])
        getattr(learn, fit)(*FITS[fit], cbs=cbs)
        left.append(left_by(learn, probe))
    assert left[0] == left[1]
    assert left[0]['pct_train'] == pytest.approx(1) and not any('cancel' in event for event in left[0]['events'])

@pytest.mark.parametrize('train,valid,short_valid', [(True, True, True), (True, False, False), (False, True, True)])
def test_rows_are_as_long_as_the_header(train, valid, short_valid):
    left = []
    for dls,cbs in ((data(), ShortEpochCallback(.3, short_valid)), (whole(data(), 3, 2 if short_valid else 5), None)):
        learn, probe = start(dls, metrics=[mse, mae, mse])
        learn.recorder.train_metrics, learn.recorder.valid_metrics = train, valid
        learn.fit(2, cbs=cbs)
        left.append(left_by(learn, probe))
    assert left[0] == left[1] and len(left[0]['losses']) == 6
    for row in left[0]['rows']: assert len(row) + 2 == len(left[0]['header']) and np.isfinite(row).all()

def test_trackers_and_csv(tmp_path):
    trackers = SaveModelCallback, partial(EarlyStoppingCallback, patience=3), ReduceLROnPlateau, CSVLogger
    left = []
    for name,dls,cbs in (('short', data(), [ShortEpochCallback(.3)]), ('twin', whole(data(), 3, 2), [])):
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

def test_graph_and_progress_bars(monkeypatch):
    graphs, bars = [], {}
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph', lambda self, *args: graphs.append(args))
    monkeypatch.setattr(ConsoleProgressBar, 'on_update', lambda bar, val, text: bars.setdefault(id(bar), [bar]).append(text))
    learn, _ = start(cbs=ProgressCallback)
    learn.fit(3, .02, cbs=[ShowGraphCallback, ShortEpochCallback(.3)])
    ends = [texts[-1].split()[:2] for bar,*texts in bars.values() if bar.master is None]  # those of an epoch
    assert ends == [['100.00%', '[3/3'], ['100.00%', '[2/2']]*3
    (train, valid), x_bounds, y_bounds = graphs[-1]
    assert len(graphs) == 3 and x_bounds == (0, 9) and np.isfinite(y_bounds).all()
    assert [len(o) for o in (*train, *valid)] == [9, 9, 3, 3] and valid[0] == [3, 6, 9]

@pytest.mark.parametrize('kwargs, starts, ends', [(dict(), [4, 4], [4, 4]), (dict(resume=True), [2, 4], [2, 4]), (dict(overfit=True), [1, 0], [1, 0])])
@pytest.mark.parametrize('stream', [False, True])
def test_a_pass_begins_and_ends_once(stream, kwargs, starts, ends):
    dls, begun, over = data(), [[], []], [[], []]
    if stream: dls = DataLoaders(*(DataLoader(Stream(dl.dataset, said=len(dl.dataset)), bs=16) for dl in dls), device='cpu')
    for dl,b,e in zip(dls, begun, over): dl.before_iter,dl.after_iter = partial(b.append, 1), partial(e.append, 1)
    start(dls)[0].fit(4, cbs=ShortEpochCallback(.3, **kwargs))
    assert [len(o) for o in begun] == starts and [len(o) for o in over] == ends

@pytest.mark.parametrize('dls', [lambda: regression(n=0), lambda: regression(n=7, drop_last=True)])
def test_a_loader_without_batches(dls):
    for kwargs in dict(), dict(n_batches=2), dict(n_batches=2, resume=True), dict(overfit=True):
        learn, _ = start(dls())
        with pytest.raises(ValueError, match=r'`dls\.train` .* at least one batch'): learn.fit(1, cbs=ShortEpochCallback(**kwargs))
        learn.dls = data()
        assert n_trained(learn) == 10
    learn, _ = start(dls())
    assert n_trained(learn, cbs=ShortEpochCallback(1.)) == 0 # none of our business then
    learn, probe = start(regression(n_valid=0), ShortEpochCallback(.3))
    assert n_trained(learn) == 3 and not probe.valid_xs and learn.recorder.values[0][1] is None

# ---- only the fit is short

def preds(n, **kwargs): return f'get_preds {kwargs}', lambda l: l.get_preds(**kwargs), n
LOOKS = [preds(80), preds(80, inner=True, reorder=False), preds(160, ds_idx=0, reorder=False, inner=True), preds(80, with_loss=True),
         ('get_preds dl', lambda l: l.get_preds(dl=l.dls.train), 160), ('validate', lambda l: l.validate(), 80),
         ('validate dl', lambda l: l.validate(dl=l.dls.train), 160),
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
@pytest.mark.parametrize('kwargs', [dict(), dict(resume=True), dict(overfit=True)], ids=str)
def test_looks_are_whole_and_disturb_nothing(look, n, kwargs):
    rows, seen, outs = Rows(), [], []
    def inside(learn):
        before = rows.n
        outs.append(as_lists(look(learn)))
        seen.append(rows.n - before)
    learn, probe = start(cbs=[rows, ShortEpochCallback(.4, **kwargs)], lr=0.)
    learn.fit(3, cbs=At('after_train', guarded(inside), order=99))
    everything = all_items(learn.dls.train)
    assert items(probe.xs) == (everything + everything[:32] if 'resume' in kwargs else everything[:64]*3)
    inside(learn)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_step', stop(KeyboardInterrupt())))
    inside(learn)
    assert seen == [n]*5 and outs == [as_lists(look(fitted()))]*5
    assert n_trained(learn) == 4

def test_lr_find_sees_all_its_data(tmp_path):
    kinds = [None, *(ShortEpochCallback(.1, **kwargs) for kwargs in (dict(), dict(resume=True), dict(overfit=True), dict(dry_run=True)))]
    learners = [start(cbs=cbs, path=tmp_path)[0] for cbs in kinds]
    rates = [l.lr_find(num_it=50, stop_div=False, show_plot=False) for l in learners]
    left = [(l.recorder.lrs, l.recorder.losses, weights(l.model).tolist()) for l in learners]
    assert all(r == rates[0] for r in rates) and all(o == left[0] for o in left) and len(left[0][0]) == 50
    assert [n_trained(l) for l in learners[:4]] == [10, 1, 1, 1]

def test_predict_tta_and_show_results_see_all_their_data(tmp_path):
    path = digits(tmp_path, classes=(0, 1), size=8)
    dls = ImageDataLoaders.from_folder(path, valid_pct=.2, seed=0, bs=16, device='cpu', num_workers=0, batch_tfms=aug_transforms())
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
    learn.fit(2, cbs=At('after_epoch', guarded(look), order=99))
    look(learn)
    assert len(looked) == 3 and n_trained(learn) == -(-len(dls.train)//10)

@pytest.mark.parametrize('cbs,k', [(ShortEpochCallback, 1), (ShortEpochCallback(.3), 3), (ShortEpochCallback(.3, resume=True), 3)])
def test_again_and_again(cbs, k):
    learn, probe = start()
    dls, loaders, before = learn.dls, list(learn.dls), list(learn.cbs)
    assert [n_trained(learn, cbs=cbs) for _ in range(3)] == [k]*3
    assert items(probe.xs) == all_items(learn.dls.train)[:k*16]*3
    assert learn.dls is dls and all(a is b for a,b in zip(dls, loaders)) and [len(dl) for dl in dls] == [10, 5]
    assert list(learn.cbs) == before and learn.dl is None and n_trained(learn) == 10

class Nested(Callback):
    "A fit inside the fit, after its first epoch"
    def __init__(self, n=2): self.n,self.done = n,False
    def after_epoch(self):
        if self.done: return
        self.done,n_epoch = True,self.n_epoch
        self.learn.fit(self.n)
        self.learn.n_epoch = n_epoch

@pytest.mark.parametrize('on_learner', [False, True])
def test_a_fit_inside_a_fit(on_learner):
    cb = ShortEpochCallback(.3, resume=True)
    learn, probe = start(cbs=cb if on_learner else None)
    learn.fit(3, cbs=[Nested()] if on_learner else [cb, Nested()])
    everything = all_items(learn.dls.train)
    assert items(probe.xs) == everything[:48] + everything[:96] + everything[48:144] # the inner one has a place of its own

# ---- resume

def test_each_pass_is_shuffled_anew():
    for cls in DataLoader, TorchLoader:
        ds = data().train_ds
        learn, probe = start(DataLoaders(*(loader(cls, ds, 16, shuffle=True) for _ in range(2)), device='cpu'))
        learn.fit(8, cbs=ShortEpochCallback(.4, resume=True))
        passes = [items(probe.xs[i:i+10]) for i in (0, 10, 20)]
        assert passes[0] != passes[1] != passes[2] != passes[0] and all(sorted(p) == sorted(passes[0]) for p in passes)

@pytest.mark.parametrize('shuffle, num_workers', [(True, 0), (False, 0), (True, 1)])
def test_start_epoch_goes_on_where_those_epochs_would_have_stopped(shuffle, num_workers):
    seen,asked = [],[]
    for start_epoch in 0, 3:
        random.seed(1)
        dls = DataLoaders(*(DataLoader(Counted(160), bs=16, shuffle=shuffle, num_workers=num_workers) for _ in range(2)), device='cpu')
        learn, probe = start(dls)
        learn.fit(5, cbs=ShortEpochCallback(.3, resume=True), start_epoch=start_epoch)
        seen.append(items(probe.xs)[-6*16:])
        asked.append(dls.train.dataset.asked.sum())
    assert seen[0] == seen[1] and asked == [15*16, 6*16]

class Levels(Dataset):
    "Items that say which level they were read at, as a curriculum's"
    level = 0
    def __len__(self): return 80
    def __getitem__(self, i): return torch.full((3,), float(self.level)), tensor([1.])

@pytest.mark.parametrize('cls, num_workers', [(DataLoader, 0), (DataLoader, 1), (TorchLoader, 1)])
def test_a_curriculum_reaches_the_workers(cls, num_workers):
    kwargs = dict(persistent_workers=bool(num_workers)) if cls is TorchLoader else {}
    learn, probe = start(DataLoaders(*(loader(cls, Levels(), 8, num_workers=num_workers, **kwargs) for _ in range(2)), device='cpu'))
    level = At('before_epoch', lambda cb: setattr(cb.dls.train.dataset, 'level', cb.epoch))
    learn.fit(4, cbs=[level, ShortEpochCallback(.3, resume=True)])
    assert [x[0, 0].item() for x in probe.xs] == [0]*3 + [1]*3 + [2]*3 + [3]*3

class Memory(nn.Module):
    "Remembers the sum of all it has seen since its `reset`, in a tensor, a list and a buffer"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer('kept', torch.zeros(()))
        self.reset()
    def reset(self): self.hidden,self.seen,_ = torch.zeros(()), [torch.zeros(())], self.kept.zero_()
    def forward(self, x):
        self.hidden,self.seen[0] = self.hidden + x.sum(), self.seen[0] + x.sum()
        self.kept += x.sum()
        return self.layer(x) + self.hidden + self.seen[0] + self.kept

@pytest.mark.parametrize('stream', [None, True, False])
def test_a_recurrent_model_remembers_a_whole_pass(stream):
    lost = []
    for k in 10, 3:
        dls = data()
        if stream is not None: # and says how long it is, or does not
            dls = DataLoaders(*(DataLoader(Stream(dl.dataset, said=160 if stream else None), bs=16) for dl in dls), device='cpu')
        torch.manual_seed(0)
        learn, probe = start(dls, model=Memory())
        learn.fit(3 if k == 10 else 10, 1e-4, cbs=[ModelResetter, ShortEpochCallback(n_batches=k, n_valid=1, resume=True)])
        lost.append(probe.losses[:30])
    assert lost[0] == lost[1]

def test_loaders_replaced_in_mid_fit_are_noticed():
    for kwargs in dict(), dict(resume=True):
        new = regression(n=96, bs=8, seed=1)
        learn, probe = start(cbs=At('before_epoch', lambda cb: setattr(cb.learn, 'dls', new), ep=1))
        old = learn.dls
        learn.fit(3, cbs=ShortEpochCallback(.25, **kwargs))
        again = all_items(new.train)[24:48] if kwargs else all_items(new.train)[:24]
        assert items(probe.xs) == all_items(old.train)[:48] + all_items(new.train)[:24] + again

def test_a_loader_that_skips_items_still_fills_resumed_epochs():
    def skip(item):
        if item[0][0] > 0: raise SkipItemException()
        return item
    def none(item): raise SkipItemException()
    ds = data().train_ds
    kept = [row for row in items(ds.tensors[:1]) if row[0] <= 0]
    learn, probe = start(DataLoaders(*(DataLoader(ds, bs=16, after_item=skip) for _ in range(2)), device='cpu'))
    learn.fit(4, cbs=ShortEpochCallback(.4, resume=True))
    assert len(probe.xs) == 16 and items(probe.xs)[:2*len(kept)] == kept*2
    learn, probe = start(DataLoaders(DataLoader(ds, bs=16, after_item=none), DataLoader(ds, bs=16), device='cpu'))
    learn.fit(2, cbs=ShortEpochCallback(.4, resume=True)) # ends
    assert not probe.xs

# ---- a fit that goes on in another process

@pytest.mark.parametrize('kind', ['map', 'shuffled', 'torch', 'stream'])
@pytest.mark.parametrize('mode, at', [('resume', 0), ('resume', 4), ('resume', 8), ('overfit', 0), ('overfit', 4)])
def test_state(kind, mode, at):
    def anew(seed=0):
        random.seed(seed)
        torch.manual_seed(seed)
        ds = [dl.dataset for dl in data()]
        if kind == 'stream': dls = [DataLoader(Stream(o, said=len(o)), bs=16) for o in ds]
        elif kind == 'torch': dls = [TorchLoader(o, 16, shuffle=True) for o in ds]
        else: dls = [DataLoader(o, bs=16, shuffle=kind == 'shuffled') for o in ds]
        cb = ShortEpochCallback(n_batches=7, **{mode: True})
        return *start(DataLoaders(*dls, device='cpu'), cb, seed=seed), cb
    saved = []
    def save(cb):
        if len(probe.xs) == 7+at and not saved and cb.training: saved.append((pickle.dumps(cb.short_epoch.state_dict()), cb.iter+1))
    learn,probe,cb = anew()
    learn.fit(4, cbs=At('after_batch', save, order=500))
    (state,done), = saved
    seen = items(probe.xs)
    learn,probe,cb = anew(seed=1) # nothing is as it was
    class Resume(FitCallback):
        "As ResumeFit does it: epochs that are over are not fitted, batches that are trained not loaded"
        order,epoch_now = 13,(7+at-1)//7
        def before_epoch(self):
            if self.epoch == self.epoch_now:
                cb._begin()
                cb.load_state_dict(pickle.loads(state))
        def before_train(self):
            if self.epoch == self.epoch_now: self.learn.dl = LoaderView(self.dl, 7-done, numbered_batches(self.dl, range(done, 7)))
    learn.fit(4, cbs=Resume, start_epoch=Resume.epoch_now)
    rows = items(probe.xs)
    if kind in ('shuffled', 'torch') and mode == 'resume':
        n = 160*((7+at)*16//160+1) - (7+at)*16 # what is left of the pass; the next one is drawn with the loader's numbers
        if kind == 'torch': rows,seen = rows[:n],seen[:(7+at)*16+n]
    assert rows == seen[(7+at)*16:]

# ---- the same batches

def test_a_fit_that_goes_on_in_validation_validates_on_the_same_batches(tmp_path):
    seen,steps = [],[]
    for end in None, KeyboardInterrupt(), None:
        random.seed(len(seen)) # the loader takes its own from it
        learn, probe = start(data(shuffle=True), path=tmp_path/str(bool(seen)))
        cut = At('before_batch', lambda cb: cb.training or cb.iter == 2 and end and stop(end)(cb), ep=1)
        with suppress(KeyboardInterrupt), learn.added_cbs([cut, At('after_step', lambda cb: steps.append(len(seen)))]):
            learn.fit(3, .02, cbs=[ShortEpochCallback(n_batches=4, overfit=True), ResumeFit(every=0)])
        seen.append([[x.tolist() for x in xs] for xs in (probe.xs, probe.valid_xs)])
    assert [steps.count(i) for i in range(3)] == [12, 8, 4] and [len(o) for o in seen[1]] == [8, 6] # the probe's goes on too
    for xs,valid_xs in seen[0],seen[2]: assert xs == xs[:4]*3 == valid_xs
    assert seen[2][0][:8] == seen[1][0]

@pytest.mark.parametrize('num_workers', [0, 2])
def test_overfit_sees_the_same_batches_to_the_last_bit(num_workers):
    class Overwrites(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(3, 1)
        def forward(self, x): return self.layer(x.mul_(2))
    noise = dict(after_item=lambda o: (o[0] + torch.randn(3), o[1]), shuffle=True, num_workers=num_workers)
    learn, probe = start(data(**noise), model=Overwrites())
    learn.fit(40, .05, cbs=ShortEpochCallback(n_batches=2, overfit=True))
    xs,valid = ([x.tolist() for x in o] for o in (probe.xs, probe.valid_xs))
    assert xs == xs[:2]*40 == valid and xs[0] != xs[1]
    assert probe.losses[-1] < probe.losses[0]

# ---- faults in mid-epoch

FAULTS = dict(before_train=None, before_batch=1, after_step=2, after_train=None, before_validate=None, after_epoch=None)
def in_validation(f): return At('after_batch', lambda cb: cb.training or f(cb), it=1)
def in_a_look(f): return At('after_train', guarded(lambda l: l.validate(cbs=At('after_batch', f, it=3))))
faults = [in_validation, in_a_look] + [partial(At, event, it=it, ep=1) for event,it in FAULTS.items()]

@pytest.mark.parametrize('exc, on_learner, kwargs', [
    (KeyboardInterrupt(), False, dict()), (ValueError('broken'), True, dict(resume=True)), (KeyboardInterrupt(), True, dict(overfit=True))],
    ids=repr)
def test_the_fit_after_a_fault_is_as_if_nothing_had_been(exc, on_learner, kwargs):
    for fault in faults:
        left = []
        for broken in (True, False):
            cb = ShortEpochCallback(.3, **kwargs)
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
    ('after_step', CancelTrainException(), 8), ('after_step', CancelFitException(), 5), ('before_epoch', CancelEpochException(), 6),
    ('before_train', CancelTrainException(), 6), ('before_fit', CancelFitException(), 0)], ids=repr)
def test_cancelling_is_no_fault(event, exc, trained, resume):
    it = 1 if event.split('_')[1] in ('batch', 'step') else None
    learn, probe = start(cbs=ShortEpochCallback(.3, resume=resume))
    with learn.added_cbs(At(event, stop(exc), it=it, ep=None if event == 'before_fit' else 1)): learn.fit(3)
    assert probe.events.count('after_loss') - len(probe.valid_xs) == trained
    if resume: assert items(probe.xs) == all_items(learn.dls.train)[:len(items(probe.xs))] or event == 'before_batch'
    for xs in (probe.xs, probe.valid_xs): xs.clear()
    learn.fit(2)
    assert items(probe.xs) == (all_items(learn.dls.train)[:96] if resume else all_items(learn.dls.train)[:48]*2)

def test_data_that_could_not_be_read():
    for on_learner,kwargs in [(o, kw) for o in (False, True) for kw in (dict(), dict(resume=True), dict(overfit=True))]:
        asked = count()
        def fragile(item):
            if next(asked) == 40: raise OSError('no such picture')
            return item
        cb = ShortEpochCallback(.3, **kwargs)
        learn, probe = start(data(after_item=fragile), cb if on_learner else None)
        with pytest.raises(OSError, match='no such picture'): learn.fit(3, cbs=None if on_learner else cb)
        probe.xs.clear()
        assert n_trained(learn, cbs=None if on_learner else cb) == 3 and items(probe.xs) == all_items(learn.dls.train)[:48]

@pytest.mark.parametrize('stream, cls, kwargs, on_learner', [
    (False, DataLoader, dict(), True), (False, TorchLoader, dict(resume=True), True), (True, DataLoader, dict(resume=True), True),
    (True, TorchLoader, dict(), False), (False, DataLoader, dict(resume=True), False)], ids=str)
def test_workers_go_at_once_when_a_fit_fails(stream, cls, kwargs, on_learner):
    before = workers()
    ds = data().train_ds
    if stream: ds = Stream(ds)
    cb, fault = ShortEpochCallback(n_batches=3, **kwargs), At('after_step', stop(ValueError('broken')), it=1, ep=1)
    learn, _ = start(DataLoaders(*(loader(cls, ds, 16, num_workers=2) for _ in range(2)), device='cpu'), cb if on_learner else None)
    try: learn.fit(2, cbs=[fault] if on_learner else [cb, fault])
    except ValueError: assert workers() <= before # while the traceback still holds all frames
    else: assert False
    learn.fit(1, cbs=None if on_learner else cb)
    assert workers() <= before

# ---- dry runs

def everything(learn, folder):
    "All that a dry run must leave as it was"
    def opt_state():
        if learn.opt is None: return None
        torch_opt = getattr(learn.opt, 'opt', None)
        state = torch_opt.state if torch_opt else learn.opt.state
        return [dict(o) for o in learn.opt.hypers],[{k: v.tolist() if isinstance(v, Tensor) else v for k,v in state[p].items()}
                for ps in learn.opt.param_lists for p in ps if p in state]
    attrs = {k: v for k,v in vars(learn).items() if isinstance(v, (int, float, str, Path, type(None)))}
    files = {str(o.relative_to(folder)): (hash(o.read_bytes()), o.stat().st_mtime_ns) if o.is_file() else None for o in sorted(folder.rglob('*'))}
    return dict(attrs=attrs, names=sorted(vars(learn)), cbs=[*learn.cbs], files=files, opt=opt_state(), opt_is=id(learn.opt),
        weights={k: v.tolist() for k,v in learn.model.state_dict().items()}, modes=modes(learn.model),
        grads=[None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()],
        trained=[p.requires_grad for p in learn.model.parameters()],
        recorder={k: str(v) for k,v in vars(learn.recorder).items() if k != 'learn'},
        numbers=(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        loaders=[(id(dl), dl.rng.getstate(), sorted(vars(dl))) for dl in learn.dls])

class Writes(Callback):
    "A callback of the user's own, which writes and draws"
    def before_fit(self): self.file = (self.learn.path/'losses.txt').open('a')
    def after_batch(self):
        print(self.loss.item(), file=self.file)
        random.random(), np.random.rand()
    def after_train(self):
        self.learn.save('mine', with_opt=True)
        (self.learn.path/self.learn.model_dir/'sub').mkdir(exist_ok=True)
        self.file.flush()
    def after_fit(self): self.file.close()

class AnyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(.2), nn.Linear(4, 1))
        self.register_buffer('scale', torch.ones(1).expand(4), persistent=False)
        self.calls,self.log = 0,[]
    def forward(self, x):
        self.calls += 1
        self.log.append(1)
        return self.layers(x)

ENDS = None, KeyboardInterrupt(), ValueError('broken'), CancelFitException()

@pytest.mark.parametrize('trained, fit, on_learner, fault', [(bool(j), fit, (i+j) % 2 == 0, ENDS[(i+2*j) % 4])
                         for i,fit in enumerate(FITS) for j in range(2)], ids=repr)
def test_a_dry_run_leaves_nothing(trained, fit, on_learner, fault, tmp_path):
    opt_func = dict(fit=Adam, fit_one_cycle=partial(OptimWrapper, opt=torch.optim.Adam)).get(fit, partial(SGD, mom=.9))
    model_dir = dict(fit=tmp_path/'elsewhere', fit_sgdr='../models').get(fit, 'models')
    learn, probe = start(data(shuffle=True), model=AnyNet(), metrics=mae, path=tmp_path/'data', model_dir=model_dir, opt_func=opt_func)
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'losses.txt').write_text('old\n')
    saver, cbs = SaveModelCallback(reset_on_fit=False, fname='best'), [CSVLogger(append=True), Writes()]
    absolute = SaveModelCallback(fname=str(tmp_path/'data'/'absolute'), with_opt=True, every_epoch=True)
    if trained: learn.fit_one_cycle(2, .02, cbs=[saver, absolute, *cbs])
    cb = ShortEpochCallback(.3, dry_run=True)
    if on_learner: learn.add_cb(cb)
    before, best = everything(learn, tmp_path), (saver.best, saver.last_saved_path, learn.model.calls, [*learn.model.log])
    if isinstance(fault, CancelFitException): cbs.append(At('after_epoch', stop(fault), order=99))
    elif fault: cbs.append(At('after_step', stop(fault), it=1))
    probe.xs.clear()
    n = len(probe.xs)
    with suppress(KeyboardInterrupt, ValueError): getattr(learn, fit)(*FITS[fit], cbs=[*cbs, saver, absolute] if on_learner else [cb, *cbs, saver, absolute])
    assert len(probe.xs) >= 1 # the user's own callback keeps what it has seen
    assert_same(everything(learn, tmp_path), before)
    assert best == (saver.best, saver.last_saved_path, learn.model.calls, learn.model.log)

def test_the_fit_after_a_dry_run_is_as_if_there_had_been_none(tmp_path):
    left = []
    for dry in (True, False):
        torch.manual_seed(3)
        learn, probe = start(data(shuffle=True), model=AnyNet(), path=tmp_path/str(dry), seed=3)
        learn.dls.train.rng = random.Random(3)
        if dry:
            learn.fine_tune(2, cbs=[ShortEpochCallback(n_batches=2, overfit=True, dry_run=True), SaveModelCallback()])
            assert not learn.recorder.values if hasattr(learn.recorder, 'values') else True
            probe.__init__()
        learn.fine_tune(2, .01, cbs=SaveModelCallback())
        left.append(left_by(learn, probe))
    assert_same(*left)

def test_a_dry_run_can_read_what_is_there(tmp_path):
    learn, _ = start(path=tmp_path)
    learn.save('stage1')
    (tmp_path/'labels.csv').write_text('a,b\n')
    seen = []
    def read(cb):
        cb.learn.load('stage1')
        seen.append((pd.read_csv(cb.learn.path/'labels.csv').columns.tolist(), sorted(o.name for o in cb.learn.path.iterdir())))
    learn.fit(1, cbs=[ShortEpochCallback(dry_run=True), At('after_epoch', read)])
    assert seen == [(['a', 'b'], ['labels.csv', 'models'])] and learn.path == tmp_path

class InPlace(Metric):
    "A metric that adds up in the tensor that it has"
    def __init__(self): self.total = torch.zeros(1)
    def reset(self): self.total.zero_()
    def accumulate(self, learn): self.total += 1
    value = property(lambda self: self.total.item())

class OfNumpy(Sampler):
    "Draws from NumPy's new generator"
    def __init__(self, n): self.n,self.rng = n,np.random.default_rng(0)
    def __len__(self): return self.n
    def __iter__(self): return iter(self.rng.permutation(self.n).tolist())

class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(4, 1, sparse=True)
    def forward(self, x): return self.layer((x[:, 0] > 0).long())

def lazy_net(): return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
def script_net(): return torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))

@pytest.mark.parametrize('net', [lazy_net, script_net, Sparse])
def test_a_dry_run_puts_back_what_is_rare(net):
    (train,valid),metric = data(),InPlace()
    sampler,model = OfNumpy(160),net()
    dls = DataLoaders(TorchLoader(train.dataset, 16, sampler=sampler), TorchLoader(valid.dataset, 16), device='cpu')
    opt_func = partial(OptimWrapper, opt=torch.optim.SparseAdam) if net is Sparse else SGD
    learn = linear_learner(dls, model, metrics=metric, opt_func=opt_func)
    if net is Sparse: model.layer.weight.grad = torch.sparse_coo_tensor([[1]], [[2.]], (4, 1))
    mine = Callback()
    mine.log_dir = 'mine' # a user's own is none of our business
    def left():
        params = [(type(p), p.grad, None if is_lazy(p) else p.tolist()) for p in model.parameters()]
        return str(params), str(model), modes(model), metric.total.item(), sampler.rng.bit_generator.state, mine.log_dir
    metric.total += 3
    before = left()
    learn.fit(2, .1, cbs=(cb for cb in [ShortEpochCallback(n_batches=2, dry_run=True), mine]))
    assert left() == before and learn.opt is None
    if net is not Sparse: assert n_trained(learn, lr=.1) == 10

def test_a_dry_run_leads_each_path_away(tmp_path):
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'old').write_text('old')
    learn, _ = start(path=tmp_path/'data')
    def write(cb):
        path = cb.learn.path
        (path/'old').rename(path/'older')
        assert [o.name for o in path.iterdir()] == [o.name for o in path.ls()] == ['older'] and not (path/'old').exists()
        others = path/'..'/'up', path.parent/'up2', Path(path)/'plain', path.resolve()/'resolved', Path(f'{path}/text'), path/str(tmp_path/'absolute')
        for o in others:
            with open(o, 'w') as f: f.write('new')
            assert o.read_text() == 'new'
        np.save(path/'array.npy', np.zeros(1))
        pd.DataFrame([1]).to_csv(path/'table.csv')
        assert pickle.loads(pickle.dumps(deepcopy(path)/'older')).read_text() == 'old'
        seen.append(others)
    seen = []
    learn.fit(1, cbs=[ShortEpochCallback(n_batches=1, dry_run=True), At('after_epoch', write)])
    assert seen and [str(o.relative_to(tmp_path)) for o in sorted(tmp_path.rglob('*'))] == ['data', 'data/old']

def test_a_dry_run_inside_a_fit():
    learn, probe = start()
    dry = At('after_epoch', guarded(lambda l: l.fit(2, cbs=ShortEpochCallback(n_batches=2, dry_run=True))), ep=0)
    rows = []
    for cbs in [], [dry]:
        learn, probe = start()
        learn.fit(3, .02, cbs=cbs)
        rows.append([*learn.recorder.values, weights(learn.model).tolist()])
    assert rows[0] == rows[1]

# ---- export

def three(i): return tensor([1., i/10, i % 7])
def target(i): return tensor([i % 3.])
def datasets(source=range(100)):
    ds = Datasets(source, [[three], [target]], splits=[range(80), range(80, 100)])  # 10 batches and 3
    return ds.dataloaders(bs=8, shuffle=False, num_workers=0, device='cpu')

settings_of = operator.attrgetter('pct', 'short_valid', 'n_batches', 'n_valid', 'resume', 'overfit', 'dry_run')

class Live:
    "An item of a data set that must not go along with an exported Learner"
    def __init__(self, i): self.i = i
    def __mod__(self, n): return self.i % n
    def __truediv__(self, n): return self.i/n
    def __reduce__(self): raise pickle.PicklingError('the data went along')

@pytest.mark.parametrize('when, kwargs', [('after_validate', dict(resume=True)), ('after_epoch', dict(overfit=True)), ('after', dict())], ids=str)
def test_export_and_load_learner(when, kwargs, tmp_path):
    dls = datasets([Live(i) for i in range(100)])
    cb = ShortEpochCallback(.3, **kwargs)
    learn, probe = start(dls, cb, path=tmp_path, lr=0.)
    learn.fit(3, cbs=At(when, lambda cb: cb.learn.export(), ep=1) if '_' in when else None)
    if when == 'after': learn.export()
    assert len(probe.xs) == 9 and n_trained(learn) == 3
    loaded = load_learner(tmp_path/'export.pkl')
    assert settings_of(loaded.short_epoch) == settings_of(cb)
    assert len(loaded.get_preds(dl=datasets().train)[0]) == 80
    loaded.dls = datasets()
    loaded.probe.xs.clear()
    loaded.fit(2)
    assert len(loaded.probe.xs) == 6

@pytest.mark.parametrize('kwargs', [dict(), dict(resume=True)], ids=str)
def test_a_stream_is_put_down_after_the_fit(kwargs):
    learn, _ = start(DataLoaders(*(DataLoader(Stream(dl.dataset, said=len(dl.dataset)), bs=16) for dl in data()), device='cpu'))
    learn.fit(2, cbs=ShortEpochCallback(.3, **kwargs))
    assert n_trained(deepcopy(learn)) == 10

# ---- what is refused

@pytest.mark.parametrize('kwargs, a, b', [
    (dict(pct=.5, n_batches=3), 'pct', 'n_batches'), (dict(pct=.01, n_batches=3), 'pct', 'n_batches'), (dict(overfit=True, resume=True), 'overfit', 'resume'),
    (dict(overfit=True, n_valid=3), 'overfit', 'n_valid'), (dict(short_valid=False, n_valid=3), 'n_valid', 'short_valid'),
    (dict(overfit=True, short_valid=False), 'overfit', 'short_valid')], ids=str)
def test_what_excludes_each_other_is_refused_by_name(kwargs, a, b):
    with pytest.raises(ValueError, match=f'(?s)`{a}.*`{b}.*exclude|`{b}.*`{a}.*exclude'): ShortEpochCallback(**kwargs)

def test_the_rest_goes_by_name_only():
    with pytest.raises(TypeError): ShortEpochCallback(.5, True, 3)
    with pytest.raises(TypeError): ShortEpochCallback(.5, before_fit=noop)
