"""FeatureCache against the fit without it, whose frozen body a small callback holds in eval mode whole

Run as a script by several processes, it is what each of them does."""
import gc, math, os, pickle, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from torch.utils.data import Dataset, IterableDataset, DataLoader as TorchLoader

from common import *
from fastcb_training.features import FeatureCache
import fastcb_training.features as features

HERE = Path(__file__).parent


class Held(Callback):
    "The twin: each frozen part of the model is in eval mode whole, and what is frozen has no gradient"
    order = math.inf
    def before_batch(self):
        if not self.training: return
        model = getattr(self.learn.model, 'module', self.learn.model)
        for m in model.modules():
            ps = list(m.parameters())
            if ps and not any(p.requires_grad for p in ps):
                m.eval()
                for p in ps: p.grad = None

class Body(nn.Sequential):
    "A body that counts the items that it has computed"
    n = 0
    def forward(self, x):
        Body.n += len(x)
        return super().forward(x)

def net(seed=0, wide=4, inplace=True):
    torch.manual_seed(seed)
    body = Body(nn.Linear(3, wide), nn.BatchNorm1d(wide), nn.Sequential(nn.Dropout(.5), nn.Linear(wide, 5))).requires_grad_(False)
    body[1].running_mean.normal_()
    return nn.Sequential(body, nn.ReLU(inplace=inplace), nn.Sequential(nn.Dropout(.3), nn.LayerNorm(5), nn.Linear(5, 1)))

def data(n=40, bs=8, n_valid=14, seed=0, view=DataLoader, **kwargs):
    g = torch.Generator().manual_seed(seed)
    def ds(n): return TensorDataset(torch.randn(n, 3, generator=g), torch.randn(n, 1, generator=g))
    random.seed(seed)
    return DataLoaders(view(ds(n), **{'batch_size': bs}, **kwargs), view(ds(n_valid), batch_size=bs), device='cpu')

def learner(dls=None, model=None, cbs=(), **kwargs):
    return linear_learner(dls or data(), model or net(), cbs=[*L(cbs), Probe()], metrics=[mae, rmse], train_bn=False, **kwargs)

def fit(learn, cbs=(), n_epoch=3, how='fit', lr=.05):
    "What a fit leaves, but for the inputs that a Probe sees"
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    Body.n = 0
    getattr(learn, how)(n_epoch, lr, cbs=cbs)
    left = left_by(learn, learn.probe)
    learn.probe.__init__()
    return left | dict(xs=None, valid_xs=None, random=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))

exact = 'header', 'lrs', 'iters', 'stats', 'modes', 'events', 'random', 'hps', 'pct_train'
rounded = 'rows', 'losses', 'weights', 'grads'

def assert_close(left, expected, case=''):
    "Equal where rounding has no part, else to 1e-5"
    assert_same({k: left[k] for k in exact}, {k: expected[k] for k in exact}, case)
    for k in rounded: np.testing.assert_allclose(np.array(left[k], dtype=float), np.array(expected[k], dtype=float),
                                                 rtol=1e-5, atol=1e-5, err_msg=f'{k} {case}')

def is_clean(learn, dls, loaders):
    assert learn.dls is dls and all(map(operator.is_, dls.loaders, loaders)) and learn.dl is None
    assert not any('forward' in vars(m) for m in learn.model.modules())


# Equal to the fit without it

@st.composite
def configurations(draw):
    bs = draw(st.sampled_from([1, 3, 8, 50]))
    shuffle = draw(st.booleans())
    drop = draw(st.booleans())
    return dict(dls=dict(n=draw(st.integers(max(5, bs if drop else 0), 40 if bs < 50 else 60)), bs=bs, shuffle=shuffle, drop_last=drop,
                         n_valid=draw(st.integers(1, 20)), num_workers=draw(st.sampled_from([0]*9+[2]))),
                n_epoch=draw(st.integers(1, 4)), how=draw(st.sampled_from(['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune'])),
                wide=draw(st.integers(1, 6)), cut=draw(st.sampled_from([None, lambda m: m[0]])), views=draw(st.integers(1, 3)))

@examples(20)
@given(configurations())
def test_equal_to_the_fit_without_it(case):
    got,expected = [fit(learn := learner(data(**case['dls']), net(wide=case['wide'])), cb, case['n_epoch'], case['how'])
                    for cb in (FeatureCache(case['cut'], views=case['views']), Held())]
    assert_close(got, expected)

def test_bit_for_bit_where_batches_do_not_matter():
    "All batches are of one size: then the body's output is the same in each"
    assert_same(fit(learner(), FeatureCache()), fit(learner(), Held()))

def test_a_head_that_writes_into_its_input():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Dropout(.3, inplace=True), nn.Linear(4, 1))
    assert_same(*[fit(learner(model=model()), cb) for cb in (FeatureCache(), Held())])

loaders = dict(
    torch=dict(view=TorchLoader), torch_shuffle=dict(view=TorchLoader, shuffle=True), torch_drops=dict(view=TorchLoader, drop_last=True, shuffle=True, n=43),
    torch_generator=dict(view=TorchLoader, shuffle=True, generator=7), torch_workers=dict(view=TorchLoader, shuffle=True, num_workers=2),
    torch_weighted=dict(view=TorchLoader, sampler=[1., 2.]*20), persistent=dict(num_workers=2, persistent_workers=True, shuffle=True),
    shuffle_fn=dict(shuffle=True, shuffle_fn=lambda idxs: sorted(idxs, key=lambda i: -i%7)), weighted=dict(view='weighted_dl'), subset=dict(view='subset'))

def loaded(view=DataLoader, generator=None, sampler=None, n=40, **kwargs):
    "Data as one of `loaders` gives it"
    if generator: kwargs['generator'] = torch.Generator().manual_seed(generator)
    if sampler: kwargs['sampler'] = torch.utils.data.WeightedRandomSampler(sampler, 30)
    if view == 'subset': return DataLoaders(DataLoader(torch.utils.data.Subset(data().train_ds, range(5, 38, 2)), bs=4, shuffle=True), data().valid, device='cpu')
    if view == 'weighted_dl':
        dsets = Datasets(range(40), [[lambda i: torch.tensor([i%5, i%3, 1.])], [lambda i: torch.tensor([i/9])]])
        return DataLoaders(WeightedDL(dsets, bs=8, wgts=range(1, 41)), data().valid, device='cpu')
    dls = data(n)
    random.seed(0)
    return DataLoaders(view(dls.train_ds, 8, **kwargs), dls.valid, device='cpu')

@pytest.mark.parametrize('name', loaders)
def test_any_loader_with_indices(name):
    "The body runs once for each item that an epoch has met, however they are drawn"
    (got,n),(expected,n_held) = [(fit(learner(loaded(**loaders[name])), cb), Body.n) for cb in (FeatureCache(), Held())]
    assert_close(got, expected)
    assert n <= min(n_held, 57) + 2*(8+7+8) + 2*8 # `drop_last` leaves some for later epochs, in full batches

class Stream(IterableDataset):
    def __iter__(self): return iter([tuple(o) for o in data().train_ds])

no_order = dict(
    stream=lambda ds: TorchLoader(Stream(), 8), batches=lambda ds: [ds[:8], ds[8:]],
    own_batches=lambda ds: TorchLoader(ds, batch_sampler=[[0, 1], [2, 3, 4]]))

@pytest.mark.parametrize('name', no_order)
def test_loaders_without_indices(name):
    with pytest.raises(ValueError, match='needs a loader with indices.*give its data set'):
        learner(DataLoaders(no_order[name](data().train_ds), data().valid, device='cpu')).fit(1, cbs=FeatureCache)

# With what stands beside it

def in_training(exc):
    def _inner(cb):
        if cb.training: raise exc()
    return _inner

beside = dict(
    accumulation=lambda: [GradientAccumulation(20)], clip=lambda: [GradientClip(.1)], bnfreeze=lambda: [BnFreeze()],
    short=lambda: [ShortEpochCallback(.5)], going_on=lambda: [ShortEpochCallback(n_batches=2, resume=True)],
    bf16=lambda: [CpuMixedPrecision('bf16', init_scale=1.)], tracker=lambda: [EarlyStoppingCallback(patience=1)],
    preds=lambda: [At('after_batch', lambda cb: cb.learn.get_preds(inner=True), it=2)],
    cancels=lambda: [At('before_batch', in_training(CancelBatchException), it=1, ep=0, order=11.4)],
    cancels_later=lambda: [At('after_pred', in_training(CancelBatchException), it=1, ep=0)])

@pytest.mark.parametrize('name', beside)
@pytest.mark.parametrize('before', [True, False])
def test_beside_others(name, before, tmp_path):
    "With `shuffle`, an epoch meets items that the one before has dropped, among others that are known"
    shuffle = before == (len(name)%2 == 0)
    dls = partial(data, n=46, shuffle=shuffle, drop_last=shuffle)
    def cbs(cb): return [cb, *beside[name]()] if before else [*beside[name](), cb]
    (got,n),(expected,_) = [(fit(learner(dls(), path=tmp_path), cbs(cb)), Body.n) for cb in (FeatureCache(), Held())]
    if name == 'bf16': got,expected = ({k: o for k,o in d.items() if k not in rounded} | {k: [0.] for k in rounded} for d in (got, expected))
    assert_close(got, expected, name)

def test_a_smoke_test_computes_only_what_it_needs():
    fit(learner(data(n=400)), [cb := FeatureCache(), ShortEpochCallback(n_batches=2)], n_epoch=1)
    assert Body.n <= 2*(2*8+23) # two batches each, and the checks
    fit(learner(data(n=400)), [FeatureCache(), ShortEpochCallback(n_batches=2, resume=True)], n_epoch=3)
    assert Body.n <= 3*2*8 + 2*8 + 2*23

def test_lr_find_sees_the_whole_model():
    got,expected = [(learn := learner()) and learn.lr_find(num_it=20, show_plot=False) for cb in (FeatureCache(), None)
                    if seeded() is None and (learn := learner(cbs=[cb] if cb else []))]
    assert got == expected

def test_a_pickle_has_no_features(tmp_path):
    "Nor has a copy, in mid-fit too, and an exported Learner"
    learn,copies = learner(data(n=400), path=tmp_path),[]
    learn.add_cb(cb := FeatureCache(lambda m: m[0], views=2))
    fit(learn, At('after_batch', lambda at: copies.append((copy(cb).nbytes, cb.nbytes))))
    assert all(o == 0 < kept for o,kept in copies) and cb.nbytes == (2*400+14)*5*4
    learn.remove_cb(cb)
    cb.body = None
    assert len(pickle.dumps(cb)) < 1000
    again = pickle.loads(pickle.dumps(cb))
    assert not again.nbytes and (again.views, again.path, again.body) == (2, None, None)
    assert_same(fit(learner(), again), fit(learner(), FeatureCache(views=2)))

def seeded(): return torch.manual_seed(1) and random.seed(1)


# The body runs once

def test_the_body_runs_once_over_the_data():
    "And a second fit, and a second head, look at some items only"
    cb,dls = FeatureCache(),data(n=400, shuffle=True, n_valid=100)
    counts = []
    for learn in (learn := learner(dls)),learn,learner(dls),learner(data(n=400, shuffle=True, n_valid=100)):
        fit(learn, cb, n_epoch=3)
        counts.append(Body.n)
    assert 500 <= counts[0] <= 500 + 2*3*8 and max(counts[1:]) <= 30

def test_another_head_may_have_other_targets():
    dls,other,cb = data(shuffle=True),data(shuffle=True),FeatureCache()
    other.train_ds.tensors = other.train_ds.tensors[0],-3*other.train_ds.tensors[1]
    fit(learner(dls), cb)
    got,n = fit(learner(other), cb),Body.n
    assert n <= 20
    other.rng = None
    again = data(shuffle=True)
    again.train_ds.tensors = other.train_ds.tensors
    assert_same(got, fit(learner(again), Held()))

# What has changed is computed anew

def times(o, by): return lambda cb: o(cb).data.mul_(by)
changes = dict(
    weight=lambda cb: cb.learn.model[0][0].weight.data.mul_(1.1), mean=lambda cb: cb.learn.model[0][1].running_mean.add_(.1),
    loaded=lambda cb: cb.learn.model[0].load_state_dict(net(seed=7)[0].state_dict()),
    layer=lambda cb: cb.learn.model[0].__setitem__(2, nn.Sequential(nn.Linear(4, 5).requires_grad_(False))),
    eps=lambda cb: setattr(cb.learn.model[0][1], 'eps', .5),
    inputs=lambda cb: cb.dls.train_ds.tensors[0].mul_(1.5), targets=lambda cb: cb.dls.train_ds.tensors[1].mul_(-2),
    valid=lambda cb: cb.dls.valid_ds.tensors[1].mul_(-2), order=lambda cb: setattr(cb.dls.train.dataset, 'tensors', tuple(
        o.flip(0) for o in cb.dls.train_ds.tensors)))

@pytest.mark.parametrize('name', changes)
def test_what_changes_between_fits(name):
    def run(make):
        learn,cb = learner(),make()
        fit(learn, cb)
        torch.manual_seed(3)
        with learn.added_cbs(At('after_fit', noop)): changes[name](learn.cbs[0])
        return fit(learn, cb)
    assert_close(run(FeatureCache), run(Held), name)

@pytest.mark.parametrize('event', ['before_epoch', 'after_batch'])
@pytest.mark.parametrize('name', ['weight', 'mean', 'loaded', 'inputs', 'targets', 'valid', 'order'])
def test_what_changes_in_a_fit(name, event):
    "The data from one epoch to the next, the body at any moment, but from the next epoch if its `.data` is changed"
    if event == 'after_batch' and name not in ('mean', 'loaded'): return
    def run(cb): return fit(learner(), [cb, At(event, changes[name], it=2 if event == 'after_batch' else None, ep=1)])
    assert_close(run(FeatureCache()), run(Held()), name)

def test_targets_that_are_others_in_each_epoch():
    def run(cb): return fit(learner(data(shuffle=True)), [cb, At('before_epoch', changes['targets'])])
    assert_close(run(FeatureCache()), run(Held()))

@pytest.mark.parametrize('event', ['before_epoch', 'after_batch'])
def test_a_body_that_is_unfrozen_in_a_fit(event):
    def unfreeze(cb):
        cb.learn.unfreeze()
        cb.learn.opt.set_hypers(lr=.01)
    def run(cb): return fit(learner(), [cb, At(event, unfreeze, it=2 if event == 'after_batch' else None, ep=1)])
    assert_close(run(FeatureCache()), run(Held()))


# What it refuses: the error names what it is, and the Learner is as before

class Noise(nn.Module):
    def forward(self, x): return x + torch.randn_like(x)
class Always(nn.Module):
    def forward(self, x): return F.dropout(x, .5)
class Memory(nn.Module):
    last = 0.
    def forward(self, x):
        out,self.last = x + self.last,x.mean()
        return out
class Skips(nn.Module):
    def __init__(self, more): 
        super().__init__()
        self.body,self.head,self.more = nn.Linear(3, 3).requires_grad_(False),nn.Linear(3, 1),more
    def forward(self, x):
        f = self.body(x)
        return self.head(f + x if self.more == 'input' else f*self.seen if self.more == 'attribute' else f)
class Scaled(Skips):
    def forward(self, x): return self.head(self.body(x/2))
class Noted(nn.Linear):
    def forward(self, x):
        self.noted = super().forward(x)
        return self.noted
class ByNote(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner,self.last,self.head = Noted(3, 3).requires_grad_(False),nn.Linear(3, 3).requires_grad_(False),nn.Linear(3, 1)
        self.body = nn.Sequential(self.inner, self.last)
    def forward(self, x): return self.head(self.body(x)*self.inner.noted)

def sequential(*body): return nn.Sequential(nn.Sequential(nn.Linear(3, 4), *body).requires_grad_(False), nn.Linear(4, 1))
def hooked():
    model = sequential(nn.Linear(4, 4))
    model[0][1].register_forward_hook(noop)
    return model
def half_frozen():
    model = sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0][1].requires_grad_(True)
    return model
class Random(Dataset):
    def __len__(self): return 20
    def __getitem__(self, i): return torch.full((3,), i)+.01*torch.randn(3),torch.ones(1)
class Add(Callback):
    order = 30
    def before_batch(self): self.learn.xb = (self.x*2,)
class AddInPlace(Callback):
    def before_batch(self): self.learn.xb[0].add_(1)

by_body = dict(body=lambda m: m.body)
first = dict(body=lambda m: m[0])
refused = dict(
    nothing_frozen=(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), {}, 'nothing is frozen.*learn.freeze'),
    no_front=(lambda: Skips(''), {}, 'finds none at the front of this Skips.*body=lambda'),
    batchnorm_trains=(half_frozen, {}, r'`0.1` \(BatchNorm1d\) trains.*train_bn=False'),
    batchnorm_trains_given=(half_frozen, first, r'`0.1` \(BatchNorm1d\) trains.*train_bn=False'),
    trains=(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 4)), nn.Linear(4, 1)), first,
            r'`0.1` \(Linear\) trains: freeze it'),
    noise=(lambda: sequential(Noise()), {}, r'`0.1` \(Noise\)'), always=(lambda: sequential(Always()), {}, r'`0.1` \(Always\)'),
    batch=(lambda: sequential(nn.BatchNorm1d(4, track_running_stats=False)), {}, r'`0.1` \(BatchNorm1d\).*other items'),
    hook=(hooked, {}, '`0.1` of it has a forward hook'),
    memory=(lambda: sequential(Memory()), {}, r'`0.1` \(Memory\) of the body gives something else'),
    skip=(lambda: Skips('input'), by_body, 'wants more'), attribute=(ByNote, by_body, 'wants more'), scaled=(Scaled, by_body, 'changed before'),
    not_in_model=(lambda: sequential(), dict(body=nn.Linear(3, 3)), 'a module of the model'))

@pytest.mark.parametrize('name', refused)
def test_models_that_are_refused(name):
    make,kwargs,words = refused[name]
    if name == 'scaled': make = lambda: Scaled('')
    learn = learner(model=make())
    dls,loaders,before = learn.dls,list(learn.dls),weights(learn.model)
    with pytest.raises(ValueError, match=words): learn.fit(1, cbs=FeatureCache(**kwargs))
    learn.dl = None # as fastai leaves it after an error
    is_clean(learn, dls, loaders)
    assert torch.equal(before, weights(learn.model))

refused_others = dict(mixup=(MixUp, 'mix_up'), replaced=(Add, 'add'), in_place=(AddInPlace, 'add_in_place'))

@pytest.mark.parametrize('second', [True, False])
@pytest.mark.parametrize('name', refused_others)
def test_callbacks_that_are_refused(name, second):
    "In the first fit, and in one that has its features already"
    cb,(other,words) = FeatureCache(),refused_others[name]
    learn = learner()
    if second: learn.fit(1, cbs=cb)
    with pytest.raises(ValueError, match=f'changed the batch.*{words}'): learn.fit(1, cbs=[cb, other()])

def test_data_that_is_refused():
    dls = DataLoaders(DataLoader(Random(), bs=8), DataLoader(Random(), bs=8), device='cpu')
    with pytest.raises(ValueError, match='read differently each time, by the data set, a Random.*views'): learner(dls).fit(1, cbs=FeatureCache)

def test_random_validation_is_whole():
    "In validation there is nothing to refuse: it is as without the cache"
    def run(cb): return fit(learner(DataLoaders(data().train, DataLoader(Random(), bs=8), device='cpu')), cb)
    assert_close(run(FeatureCache()), run(Held()))

class OwnRandom(Random):
    "Its random numbers are nobody else's"
    def __init__(self): self.rng = np.random.default_rng(0)
    def __getitem__(self, i): return torch.full((3,), i+self.rng.normal()).float(),torch.ones(1)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_as_many_views_as_epochs_is_the_usual_training(num_workers):
    "The seeds of workers are those of the usual training"
    def run(cb):
        random.seed(0)
        dl = DataLoader(Random(), bs=5, shuffle=True, num_workers=num_workers)
        return fit(learner(DataLoaders(dl, data().valid, device='cpu')), cb, n_epoch=2)
    assert_same(run(FeatureCache(views=2)), run(Held()))

def test_random_numbers_that_cannot_be_seeded(tmp_path):
    "Such features are good for the fit, and for no other: they are not kept, neither in memory nor on disk"
    cb,ns = FeatureCache(views=2, path=tmp_path),[]
    for _ in range(2):
        fit(learner(DataLoaders(DataLoader(OwnRandom(), bs=5), data().valid, device='cpu')), cb, n_epoch=4)
        ns.append(Body.n)
    assert 40+14 <= ns[0] <= 40+14+3*23 and ns[1] >= 40 and len(files(tmp_path)) == 1 # of the validation set
    assert cb.nbytes == 14*5*4

def test_a_model_that_is_refused_spoils_no_features():
    cb,dls = FeatureCache(lambda m: m.body),data()
    def model(more):
        torch.manual_seed(0)
        return Skips(more)
    learner(dls, model('')).fit(1, cbs=cb)
    with pytest.raises(ValueError, match='wants more'): learner(dls, model('input')).fit(1, cbs=cb)
    assert cb.nbytes == 54*3*4


# Models for text and tables

def text_learner(what, lengths=(6,), cbs=()):
    "A small AWD-LSTM, untrained, with a frozen encoder; each batch is as long as its longest line"
    import fastai.text.all as text
    def pad(items): return [(F.pad(x, (max(len(o) for o,_ in items)-len(x), 0)),y) for x,y in items]
    rng = torch.Generator().manual_seed(0)
    xs = [torch.randint(2, 9, (lengths[i%len(lengths)],), generator=rng) for i in range(24)]
    ds = [(x, torch.tensor(i%2) if what == 'classifier' else x) for i,x in enumerate(xs)]
    dls = DataLoaders(*[DataLoader(ds, bs=4, before_batch=pad) for _ in range(2)], device='cpu')
    torch.manual_seed(0)
    make,config,split = ((text.get_text_classifier, text.awd_lstm_clas_config, text.awd_lstm_clas_split) if what == 'classifier' else
                         (text.get_language_model, text.awd_lstm_lm_config, text.awd_lstm_lm_split))
    config = config | dict(emb_sz=8, n_hid=8, n_layers=1) | ({} if what == 'classifier' else dict(tie_weights=False))
    model = make(text.AWD_LSTM, 10, *[2] if what == 'classifier' else [], config=config)
    learn = Learner(dls, model, CrossEntropyLossFlat(), SGD, splitter=split, cbs=[*text.rnn_cbs(), *L(cbs)])
    quiet(learn).freeze()
    return learn

class HeldText(Callback):
    order = math.inf
    def before_batch(self): self.learn.model[0].eval()

def test_a_text_classifier_on_a_frozen_encoder():
    "It starts from no state in each batch, and can be kept if all texts are of one length"
    def run(cb):
        learn = text_learner('classifier')
        torch.manual_seed(1)
        learn.fit(3, .005, cbs=cb)
        return weights(learn.model)
    assert torch.allclose(run(FeatureCache()), run(HeldText()), atol=1e-5)
    with pytest.raises(ValueError, match='one size|differently each time|something else'):
        text_learner('classifier', lengths=(6, 6, 6, 6, 9, 9, 9, 9)).fit(1, cbs=FeatureCache)

def test_a_language_model():
    "Its first layer trains with the last one. With all of its body frozen, its state goes from batch to batch: the layer is named"
    with pytest.raises(ValueError, match='finds none at the front of this SequentialRNN'): text_learner('language').fit(1, cbs=FeatureCache)
    learn = text_learner('language')
    learn.model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r'something else for the same items|does not give tensors'): learn.fit(1, cbs=FeatureCache)

def test_the_learner_of_tables():
    from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(kind=list('abc')*20, size=np.random.rand(60), price=np.random.rand(60)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['kind'], cont_names=['size'], y_names='price', bs=8, device='cpu')
    learn = quiet(tabular_learner(dls, layers=[6], y_range=(0, 1)))
    with pytest.raises(ValueError, match='nothing is frozen'): learn.fit(1, cbs=FeatureCache)
    learn.model.embeds.requires_grad_(False)
    with pytest.raises(ValueError, match='finds none at the front of this TabularModel'): learn.fit(1, cbs=FeatureCache)


# Interrupts and errors

@pytest.mark.parametrize('exc', [KeyboardInterrupt(), ValueError('broken'), CancelFitException()])
@pytest.mark.parametrize('event,on_disk', [('before_batch', True), ('after_pred', False), ('after_batch', True), ('before_validate', False)])
def test_nothing_half_is_kept(exc, event, on_disk, tmp_path):
    cb,learn = FeatureCache(path=tmp_path/'kept' if on_disk else None),learner()
    dls,loaders = learn.dls,list(learn.dls)
    fault = At(event, stop(exc), it=None if event == 'before_validate' else 3, ep=0)
    try: learn.fit(2, .05, cbs=[cb, fault])
    except (KeyboardInterrupt, ValueError): learn.dl = None
    is_clean(learn, dls, loaders)
    if not isinstance(exc, CancelFitException) and event != 'before_validate': assert not cb.nbytes
    if on_disk and event != 'before_validate' and not isinstance(exc, CancelFitException):
        gc.collect()
        assert not [*(tmp_path/'kept').iterdir()]
    learn.model.load_state_dict(net().state_dict())
    learn.model.zero_grad() # fastai leaves some
    learn.probe.__init__()
    learn.opt = None
    assert_same(fit(learn, cb), fit(learner(), Held()))


# On disk

def files(path): return sorted(o.name for o in path.iterdir())

def test_features_on_disk_are_found_again(tmp_path):
    expected = fit(learner(), FeatureCache())
    for n in 54, 0, 0:
        assert_same(fit(learner(), FeatureCache(path=tmp_path/'new'/'kept')), expected)
        assert n <= Body.n <= n+46
    assert len(files(tmp_path/'new'/'kept')) == 2
    fit(learner(model=net(seed=3)), FeatureCache(path=tmp_path/'new'/'kept'))
    assert Body.n >= 54 and len(files(tmp_path/'new'/'kept')) == 4

@pytest.mark.parametrize('spoil', [lambda o: o.write_bytes(b'junk'), lambda o: o.write_bytes(o.read_bytes()[:-9]), lambda o: o.write_bytes(b''),
                                   lambda o: o.write_bytes(bytes(64)+o.read_bytes()[64:])], ids=['junk', 'cut', 'empty', 'other numbers'])
def test_spoiled_files_are_written_anew(spoil, tmp_path):
    expected = fit(learner(), FeatureCache(path=tmp_path))
    for o in tmp_path.iterdir(): spoil(o)
    for _ in range(2): assert_same(fit(learner(), FeatureCache(path=tmp_path)), expected)
    assert Body.n <= 40

def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    learn = learner()
    with pytest.raises(OSError, match='MB.*No space left on device.*another `path`'): learn.fit(1, cbs=FeatureCache(path=tmp_path))
    assert not [*tmp_path.iterdir()]
    learn.dl = None
    learn.probe.__init__()
    learn.opt = None
    assert_same(fit(learn, FeatureCache()), fit(learner(), Held()))

def test_a_disk_that_is_full_in_the_end(tmp_path, monkeypatch):
    "The features are there, so the fit goes on"
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='could not write.*No space left'): got = fit(learner(), FeatureCache(path=tmp_path))
    assert_same(got, fit(learner(), Held()))
    assert not [*tmp_path.iterdir()]

def test_a_killed_process_leaves_nothing(tmp_path):
    "And what one leaves that is killed while it writes is removed by the next that writes there, an hour later"
    script = (f"import sys, os, signal; sys.path.insert(0, {str(HERE)!r}); from test_features import *; "
              f"fit(learner(), [FeatureCache(path={str(tmp_path)!r}), At('after_batch', lambda cb: os.kill(os.getpid(), signal.SIGKILL), it=3)])")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], env=os.environ|{'OMP_NUM_THREADS': '1'})
    assert done.returncode == -9 and not [*tmp_path.iterdir()]
    fit(learner(), FeatureCache(path=tmp_path))
    name = files(tmp_path)[0]
    (tmp_path/name).unlink()
    parts = [tmp_path/f'.{name}.{o}' for o in ('old', 'new')]
    for o in parts: o.write_text('half')
    os.utime(parts[0], (time.time()-4000,)*2)
    fit(learner(), FeatureCache(path=tmp_path))
    assert [o.exists() for o in parts] == [False, True] and len(files(tmp_path)) == 3

def test_a_path_that_is_a_file(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError, match='can.t keep'): learner().fit(1, cbs=FeatureCache(path=tmp_path/'file'))
    assert (tmp_path/'file').read_text() == 'mine'

def test_two_processes_that_write_one_path(tmp_path):
    "Both are right, both files are whole, and nothing is left beside them"
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_features import *; print(fit(learner(), FeatureCache(path={str(tmp_path)!r}))['weights'])"
    env = os.environ|{'OMP_NUM_THREADS': '1'}
    both = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = fit(learner(), Held())['weights']
    assert [o.communicate(timeout=120)[0].strip() for o in both] == [str(expected)]*2
    assert len(files(tmp_path)) == 2 and all(o.endswith('.features') for o in files(tmp_path))
    assert fit(learner(), FeatureCache(path=tmp_path))['weights'] == expected and Body.n <= 40


# Several processes

def ranks(out):
    "What each of two processes does"
    from accelerate import Accelerator
    from processes import dist # which calls `cpu_processes`
    Accelerator(cpu=True) # starts the process group
    left = {}
    for name,cb in dict(cache=FeatureCache(), again=None, held=Held()).items():
        cb = cb or shared
        shared,learn = cb,learner(data(n=43, shuffle=True, n_valid=15))
        with learn.distrib_ctx(cpu=True, sync_bn=False): left[name] = fit(learn, cb, how='fit_one_cycle'),Body.n
    learn = learner(DataLoaders(DataLoader(Random() if dist.get_rank() else data(n=20).train_ds, bs=5), data().valid, device='cpu'))
    with learn.distrib_ctx(cpu=True, sync_bn=False):
        try: learn.fit(1, cbs=FeatureCache())
        except ValueError as e: left['refused'] = str(e)
    torch.save(left, Path(out)/f'{dist.get_rank()}.pt')
    dist.destroy_process_group()

def test_processes_share_the_work(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', __file__, tmp_path]
    done = subprocess.run(command, env=os.environ|{'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'CUDA_VISIBLE_DEVICES': ''},
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180)
    assert done.returncode == 0, done.stdout[-4000:]
    for left in [torch.load(tmp_path/f'{rank}.pt', weights_only=False) for rank in range(2)]:
        assert 'read differently each time, by the data set, a Random' in left.pop('refused') # on the other rank only
        (got,n),(again,n_again),(expected,n_held) = left.values()
        assert_close(got, expected)
        assert_close(again, expected)
        assert n <= (43+15)/2+4*8+16 and n_again <= 12 and n_held >= 3*(43+15)/2

if __name__ == '__main__': ranks(sys.argv[1])
