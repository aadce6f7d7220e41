"""Everything with everything: random sets of our callbacks and fastai's, in random order, over two fits

Nothing raises, and each rule that can be seen from outside holds. A case is a few lines of Python; one that fails
prints them, and they run in the folder `tests`."""
import matplotlib, warnings
matplotlib.use('agg')
from fractions import Fraction
from math import ceil, inf
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from hypothesis import example, given, note, strategies as st

from common import *
from fastcb_training.bnfreeze import BnFreeze, frozen_bn
from fastcb_training.accumulation import GradientAccumulation
from fastcb_training.clip import GradientClip
from fastcb_training.features import FeatureCache
from fastcb_training.microbatch import MicroBatch
from fastcb_training.shortepoch import ShortEpochCallback


# A small convolutional net with a frozen body

def pictures(n, seed):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=g), torch.randint(3, (n,), generator=g))

def learner(n=40, bs=8, shuffle=False, drop_last=False, reduction='mean', train_bn=False, cbs=None):
    "A Learner that is watched; its folder goes with it"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    dls = DataLoaders(DataLoader(pictures(n, 1), bs=bs, shuffle=shuffle, drop_last=drop_last),
                      DataLoader(pictures(20, 2), bs=8), device='cpu')
    folder = TemporaryDirectory()
    learn = Learner(dls, nn.Sequential(body, head), CrossEntropyLossFlat(reduction=reduction), partial(SGD, mom=.9),
                    splitter=lambda m: [params(m[0]), params(m[1])], cbs=cbs, metrics=accuracy, path=folder.name,
                    train_bn=train_bn)
    learn.folder = folder
    if not any(o is ShowGraphCallback or isinstance(o, ShowGraphCallback) for o in L(cbs)): quiet(learn)
    learn.freeze()
    return learn


# What is seen from outside

class Items(Callback):
    "Record the items of each batch, before anybody mixes them"
    order = -100
    def before_fit(self): self.train,self.valid = [],[]
    def before_batch(self): (self.train if self.training else self.valid).append(self.x.flatten(1)[:, 0].tolist())

class Watch(Callback):
    "Record what each batch brings to the gradient, taken from its loss, and what each step makes of it"
    order,run_valid = 1e6,False
    def __init__(self): self.fits = []

    def before_fit(self):
        model,cbs = self.learn.model,{type(o): o for o in self.learn.cbs}
        self.fits.append(SimpleNamespace(cbs=cbs, batches=[], before=stats(model), n_epoch=self.n_epoch, frozen=set()))
    def before_train(self): self.fits[-1].frozen = {n for n,_ in frozen_bn(self.learn.model)}

    def after_loss(self):
        ps = [p for p in self.learn.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.learn.loss_grad, ps, retain_graph=True)
        self.fits[-1].batches.append(SimpleNamespace(
            grad=torch.cat([o.flatten() for o in grads]), ps=ps, step=None, pct=self.pct_train, yb=self.learn.yb,
            last=self.iter == self.n_iter-1))
    def before_step(self):
        batch = self.fits[-1].batches[-1]
        batch.step = torch.cat([p.grad.flatten() for p in batch.ps])
    def after_batch(self): self.fits[-1].after = stats(self.learn.model)
    def after_fit(self):
        rec = self.learn.recorder
        self.fits[-1].__dict__.update(rows=[list(o) for o in rec.values], losses=[o.item() for o in rec.losses],
                                      names=list(rec.metric_names), lrs=rec.lrs, items=self.learn.items.train,
                                      valid=self.learn.items.valid,
                                      norm=getattr(self.fits[-1].cbs.get(GradientClip), 'norm', None))

# The learning rate as a function of the part of the fit that is done; of each fit, there are two in `fine_tune`
def flat(lr): return lambda pct: lr
courses = dict(
    fit=lambda lr: [flat(lr)], fit_one_cycle=lambda lr: [combined_cos(.25, lr/25, lr, lr/1e5)],
    fit_flat_cos=lambda lr: [combined_cos(.75, lr, lr, lr/1e5)], lr_find=lambda lr: [SchedExp(1e-7, lr)],
    fine_tune=lambda lr: [combined_cos(.99, lr/25, lr, lr/1e5), combined_cos(.3, lr/10, lr/2, lr/2e5)])

def run(learn, how, n_epoch, lr, cbs=()):
    "Fit, and check every rule"
    watch,seen,loss_func = Watch(),Items(),learn.loss_func
    dls,loaders,before = learn.dls,list(learn.dls),list(learn.cbs)
    with learn.added_cbs([watch, seen]), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if how == 'lr_find':
            with learn.added_cbs(cbs):
                learn.lr_find(end_lr=lr, num_it=12, stop_div=False, show_plot=False, suggest_funcs=None)
        else: getattr(learn, how)(n_epoch, lr, cbs=cbs)
    fits = watch.fits
    assert len(fits) == len(courses[how](lr))
    for fit,course in zip(fits, courses[how](lr)): check(learn, fit, course, how == 'lr_find')
    assert no_grads(learn)
    assert learn.dls is dls and all(map(operator.is_, dls, loaders)) and learn.dl is None
    assert list(learn.cbs) == before and learn.loss_func is loss_func
    if CSVLogger in fits[-1].cbs and how != 'lr_find': check_csv(learn, fits[-1])
    preds = [len(learn.get_preds(i)[0]) for i in (0, 1)]
    assert preds == [len(dl.dataset) for dl in dls]

def check(learn, fit, course, finds):
    short,held = fit.cbs.get(ShortEpochCallback),fit.cbs.get(BnFreeze)
    if finds: short = None
    n,n_valid = map(len, learn.dls)
    k,k_valid = n_short(short, n, short and short.resume),n_short(short if short and short.short_valid else None, n_valid)
    # Rows and losses
    n_epoch = len(fit.rows)
    if not finds:
        assert n_epoch == fit.n_epoch or EarlyStoppingCallback in fit.cbs and 0 < n_epoch < fit.n_epoch
        assert fit.names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
        assert all(len(o) == 3 for o in fit.rows) and np.isfinite(fit.rows).all()
    if finds and GradientAccumulation in fit.cbs: # a point a window
        assert len(fit.losses) == len(fit.lrs) == 12 and len(fit.batches) >= 12
        return
    n_batches = 12 if finds else n_epoch*k
    assert len(fit.batches) == len(fit.losses) == len(fit.items) == n_batches and np.isfinite(fit.losses).all()
    assert len(fit.valid) == (0 if finds else n_epoch*k_valid)
    if FeatureCache not in fit.cbs: check_items(learn, fit.items, n if short and short.resume else k) # else features come
    check_steps(fit, learn.loss_func.reduction == 'sum')
    # Rates
    rates = [course(i/(12 if finds else fit.n_epoch*k)) for i in range(n_batches)]
    if ReduceLROnPlateau not in fit.cbs or rates[0] != rates[-1]: assert np.allclose(fit.lrs, rates, rtol=1e-4)
    # Statistics
    names = set(fit.before)
    held = names if held and not held.only_frozen else fit.frozen if held or FeatureCache in fit.cbs and not finds else set()
    assert {o for o in names if fit.before[o] != fit.after[o]} == names-held

def n_short(cb, n, more=False):
    if not cb: return n
    if cb.n_batches is None: return ceil(Fraction(str(cb.pct))*n)
    return cb.n_batches if more else min(cb.n_batches, n)

def check_items(learn, batches, length):
    "Passes of so many batches: none has an item twice, and where nobody shuffles, each begins from the first item"
    dl = learn.dls.train
    for i in range(0, len(batches), length):
        got = sum(batches[i:i+length], [])
        assert len(set(got)) == len(got)
        if not dl.shuffle: assert got == dl.dataset.tensors[0][:len(got), 0, 0, 0].tolist()

def check_steps(fit, adds_up):
    "The gradient of each step is that of its window's loss, clipped once"
    acc,clip = fit.cbs.get(GradientAccumulation),fit.cbs.get(GradientClip)
    tol,window = 3e-2 if CpuMixedPrecision in fit.cbs else 1e-4,[] # bfloat16 has three digits
    for batch in fit.batches:
        if not window and acc: size = acc.n_acc(batch.pct) if callable(acc.n_acc) else acc.n_acc
        window.append((Fraction(acc.count(batch.yb) if acc else 1), batch.grad))
        count = sum(c for c,_ in window)
        closes = not acc or count >= size or acc.flush and batch.last
        assert (batch.step is not None) == closes
        if not closes: continue
        grad = sum(g if adds_up else float(c/count)*g for c,g in window)
        norm = grad.norm(clip.norm_type) if clip else None
        if clip: grad = grad*min(1, clip.max_norm/norm)
        assert (batch.step-grad).norm() <= tol*grad.norm()
        window = []
        if clip: last = norm
    if clip and any(o.step is not None for o in fit.batches): assert torch.allclose(fit.norm, last, rtol=tol)

def check_csv(learn, fit):
    log = pd.read_csv(learn.path/'history.csv')
    assert list(log) == fit.names and np.allclose(log.iloc[:, 1:-1], fit.rows, rtol=1e-5)


# Cases, as source

def call(name, *args, **kwargs):
    "One call of `name`, each argument one of those given or left out"
    args = st.tuples(*(st.sampled_from(o) for o in args))
    kwargs = st.fixed_dictionaries({}, optional={k: st.sampled_from(o) for k,o in kwargs.items()})
    def text(o): return f"{name}({', '.join([*map(str, o[0]), *(f'{k}={v}' for k,v in o[1].items())])})"
    return st.tuples(args, kwargs).map(text)

bools = True,False
ours = [
    st.one_of(st.just('ShortEpochCallback'), call('ShortEpochCallback', [.01, .07, .3, .5, .9, 1], bools, resume=bools),
              call('ShortEpochCallback', n_batches=[1, 2, 5, 100], resume=bools, short_valid=bools)),
    st.one_of(st.just('GradientAccumulation'),
              call('GradientAccumulation', [.5, 1, 8, 16, 20, 37, 1000, 'SchedLin(8, 40)'], flush=bools),
              call('GradientAccumulation', [2, 2.5, 'SchedCos(1, 4)'], flush=bools, count=['lambda yb: 1'])),
    st.one_of(st.just('GradientClip'), call('GradientClip', ['.01', '1', '1e3', 'inf'], [2, 1, 'inf'],
              nonfinite=["'skip'", "'raise'", "'ignore'"])),
    st.one_of(st.just('BnFreeze'), call('BnFreeze', only_frozen=bools)),
    st.one_of(st.just('MicroBatch'), call('MicroBatch', [3, 4, 6, 100]), call('FeatureCache', [None, 'lambda m: m[0]'], views=[2]))]
trackers = [call(o, patience=[1, 2]) for o in ('EarlyStoppingCallback', 'ReduceLROnPlateau')]
savers = [call('SaveModelCallback', **{k: [True]}) for k in ('with_opt', 'every_epoch', 'at_end')]
theirs = [call('CpuMixedPrecision', ["'bf16'"], init_scale=[1024.]),
          st.sampled_from(['MixUp', 'CutMix', 'MixUp(.2)', 'CutMix(.5)']),
          *map(st.just, ('ChannelsLast', 'CSVLogger', 'TerminateOnNaNCallback', 'ShowGraphCallback')),
          *trackers, st.one_of(savers)]

@st.composite
def cases(draw):
    "The lines of a case: callbacks on the Learner, others passed to both fits"
    cbs = [draw(o) for o in ours if draw(st.integers(0, 3))] + [draw(o) for o in theirs if not draw(st.integers(0, 2))]
    cbs = draw(st.permutations(cbs))
    on_learner = [draw(st.booleans()) or o.startswith('ShowGraph') for o in cbs]
    n,bs = draw(st.integers(16, 60)),draw(st.sampled_from([4, 5, 8, 16]))
    reduction = draw(st.sampled_from(['mean', 'mean', 'sum']))
    if n%bs == 1: n += 1  # batchnorm and `MixUp` need two items
    kwargs = dict(n=n, bs=bs, reduction=reduction)
    kwargs |= {o: draw(st.booleans()) for o in ('shuffle', 'drop_last', 'train_bn')}
    if any(o.startswith('FeatureCache') for o in cbs): # its body is frozen whole, and gets what the loader gives
        kwargs['train_bn'],cbs = False,[o for o in cbs if not o.startswith(('MixUp', 'CutMix'))]
    lr = draw(st.sampled_from([.01, .03])) / (1 if reduction == 'mean' else 10)
    def listed(on): return f"[{', '.join(cb for cb,o in zip(cbs, on_learner) if o == on)}]"
    arguments = ', '.join(f'{k}={v!r}' for k,v in kwargs.items())
    lines = [f'learn = learner({arguments}, cbs={listed(True)})', f'cbs = {listed(False)}']
    hows = [draw(st.sampled_from([*courses])) for _ in range(2)]
    return '\n'.join([*lines, *(f"run(learn, {how!r}, {draw(st.integers(1, 3))}, {lr}, cbs)" for how in hows)])

@examples(30)
@given(cases())
@example("learn = learner(32, 8)\nrun(learn, 'fit', 2, .01, [ShortEpochCallback(.5), GradientAccumulation])") # 2 of 4 batches, exactly
def test_everything_with_everything(lines):
    note(f'from test_composition import *\n{lines}')
    exec(lines, dict(globals()))
