"What several tests need: quiet Learners, a probe that records, data that is counted"
import warnings
from functools import cache
from itertools import count
from tempfile import mkdtemp

from fastai.basics import *
from fastai.callback.all import *
from hypothesis import HealthCheck, settings
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

import fastai.callback.training as fastai_training
from fastcb_training.bnfreeze import BnFreeze
from fastcb_training.accumulation import GradientAccumulation
from fastcb_training.clip import GradientClip
from fastcb_training.features import FeatureCache
from fastcb_training.microbatch import MicroBatch
from fastcb_training.playground import CpuMixedPrecision
from fastcb_training.resume import ResumeFit
from fastcb_training.shortepoch import ShortEpochCallback


def quiet(learn):
    "`learn` without progress bars and printed rows"
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def regression(n=160, bs=16, n_valid=32, seed=0, shuffle=False, **kwargs):
    "Random data for a linear model, the same for the same seed"
    g = torch.Generator().manual_seed(seed)
    def ds(n):
        x = torch.randn(n, 3, generator=g)
        return TensorDataset(x, x @ tensor([[1.], [-2.], [3.]]) + 1 + .1*torch.randn(n, 1, generator=g))
    return DataLoaders(DataLoader(ds(n), bs=bs, shuffle=shuffle, **kwargs), DataLoader(ds(n_valid), bs=bs, **kwargs), device='cpu')


def linear_learner(dls=None, model=None, loss_func=None, cbs=None, seed=0, **kwargs):
    "A quiet Learner of a linear model, SGD with momentum, the same for the same seed"
    torch.manual_seed(seed)
    model = nn.Linear(3, 1) if model is None else model
    learn = Learner(dls or regression(), model, loss_func or MSELossFlat(), opt_func=kwargs.pop('opt_func', partial(SGD, mom=.9)), **kwargs)
    return quiet(learn).add_cbs(cbs)


class Probe(Callback):
    "Record, after every other callback, what each batch and each step saw"
    order = 200
    def __init__(self): self.xs,self.valid_xs,self.lrs,self.grads,self.losses,self.events = [],[],[],[],[],[]
    def __call__(self, event):
        self.events.append(event)
        super().__call__(event)
    def before_batch(self): (self.xs if self.training else self.valid_xs).append(self.x.clone())
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten().clone() for p in self.learn.model.parameters() if p.grad is not None]))
        self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())


def items(batches): return [row.tolist() for x in batches for row in x]


def left_by(learn, probe):
    "What a fit leaves behind, as plain numbers"
    rec = learn.recorder
    return dict(header=list(rec.metric_names), rows=[list(o) for o in rec.values], lrs=rec.lrs, iters=rec.iters,
                losses=[o.item() for o in rec.losses], hps=getattr(rec, 'hps', None), pct_train=learn.pct_train,
                weights=weights(learn.model).tolist(), stats=stats(learn.model), modes=modes(learn.model),
                grads=[o.tolist() for o in probe.grads], events=probe.events,
                xs=items(probe.xs), valid_xs=items(probe.valid_xs))


class At(Callback):
    "Do `f(self)` at `event`, in iteration `it` of epoch `ep` (None: always)"
    def __init__(self, event, f, it=None, ep=None, order=0):
        self.event,self.f,self.it,self.ep,self.order = event,f,it,ep,order
    def __call__(self, event):
        if event == self.event and self.it in (None, getattr(self, 'iter', None)) and self.ep in (None, self.epoch): self.f(self)


def stop(exc):
    "A function that raises `exc`, for `At`"
    def _inner(cb): raise exc
    return _inner


class Held(list):
    "Data that a Learner can be exported with: items, or the batches of the quickest of all loaders"
    device = torch.device('cpu')
    @property
    def dataset(self): return self
    def new_empty(self): return Held()
    def new(self, dataset): return dataset
    def to(self, device): pass


def frozen_net():
    "A frozen body with a batchnorm layer, and a head with one that trains"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    return nn.Sequential(body, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))


class Items(TensorDataset):
    "Data with indices that a Learner can be exported with"
    def new_empty(self): return Items(*(o[:0] for o in self.tensors))


def frozen_data():
    "Five batches of four items to train, and two to validate"
    def loader(n, seed):
        g = torch.Generator().manual_seed(seed)
        batches = [(torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g)) for _ in range(n)]
        return DataLoader(Items(*map(torch.cat, zip(*batches))), bs=4)
    return DataLoaders(loader(5, 0), loader(2, 1), device=Held.device)


def frozen_learner(cbs=None, dls=None, **kwargs):
    "A Learner of `frozen_net`, and the Probe on it"
    probe = Probe()
    return linear_learner(dls or frozen_data(), frozen_net(), cbs=[*L(cbs), probe], train_bn=False, **kwargs),probe


_files = (Path(mkdtemp(prefix='fastcb'))/str(i) for i in count()) # for `ResumeFit`: each fit needs its own

# Each of our callbacks, and all of them; a window of two batches is open after the third batch of an epoch
ours = dict(
    short=lambda: [ShortEpochCallback(n_batches=4, resume=True)],
    accumulation=lambda: [GradientAccumulation(8, flush=True)],
    clip=lambda: [GradientClip(.1)], bnfreeze=lambda: [BnFreeze()], micro=lambda: [MicroBatch(3)],
    features=lambda: [FeatureCache()], resume=lambda: [ResumeFit(next(_files))])
def _all_but(name): return lambda: [cb for k,f in ours.items() if k != name and not k.startswith('all') for cb in f()]
ours |= dict(all=_all_but('features'), all_features=_all_but('micro')) # the two exclude each other


def start_over(learn, probe, zero=True):
    "Give back the weights and statistics of a new Learner, and `zero` the gradients"
    learn.model.load_state_dict(frozen_net().state_dict())
    if zero: learn.model.zero_grad()
    probe.__init__()


def fit_anew(learn, probe, cbs=None, **kwargs):
    "What a fit with a new optimizer leaves, with the warnings"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(1, .1, cbs=cbs, reset_opt=True)
    return left_by(learn, probe) | dict(warned=[str(o.message) for o in seen])


def assert_same(left, expected, case=''):
    different = {o: (left[o], expected[o]) for o in expected if left[o] != expected[o]}
    assert not different, (case, different)


@cache
def as_new(name):
    "`fit_anew` of a new Learner with the callbacks `ours[name]`, or with none"
    return fit_anew(*frozen_learner(ours[name]() if name else None))


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
def batchnorms(m): return [(n,l) for n,l in m.named_modules() if isinstance(l, _BatchNorm)]
def stats(m):
    "The bits of each batchnorm layer's mean, variance and batch counter"
    return {n: b''.join(o.numpy().tobytes() for o in l.buffers()) for n,l in batchnorms(m)}
def modes(m): return {n: l.training for n,l in m.named_modules()}
def no_grads(learn): return all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def examples(n):
    "Settings for a hypothesis test: `n` examples, the same in each run; TEST_EXAMPLES=10 in the environment makes it 10 times as many"
    return settings(max_examples=n*int(os.environ.get('TEST_EXAMPLES', 1)), deadline=None, database=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


for _name in [o for o in globals() if o.startswith('test')]: del globals()[_name]  # fastcore's, that pytest would take for tests
