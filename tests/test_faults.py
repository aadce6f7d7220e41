"""Faults at each moment of a fit: the next fit is that of a Learner that never had one

A fault is each kind of cancel, an error or Ctrl-C, raised by another callback that comes before all of ours or after
them. Equal means: given back the weights and statistics that it began with, and a new optimizer, the Learner fits as a
new one does: the same batches, events, gradients, rates, losses, rows, weights, statistics and modes, bit for bit."""
import os, warnings
from math import inf
from contextlib import suppress
from functools import cache
from itertools import count

import pytest
from torch.utils.data import Dataset

from common import *
from fastcb_training.bnfreeze import BnFreeze
from fastcb_training.gradient import GradientAccumulation, GradientClip
from fastcb_training.shortepoch import ShortEpochCallback

def net():
    "A frozen body with a batchnorm layer, and a head with one that trains"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    return nn.Sequential(body, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))

def batches(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g)) for _ in range(n)]

def learner(cbs=None, dls=None, **kwargs):
    "A Learner, and the Probe on it; lists are the quickest loaders"
    dls = dls or DataLoaders(batches(), batches(2, seed=1), device=torch.device('cpu'))
    learn,probe = linear_learner(dls, net(), MSELossFlat(), cbs, train_bn=False, **kwargs),Probe()
    return learn.add_cb(probe),probe

# A window of two batches is open after the third
ours = dict(
    short=lambda: [ShortEpochCallback(n_batches=4, resume=True)], accumulation=lambda: [GradientAccumulation(8, flush=True)],
    clip=lambda: [GradientClip(.1)], bnfreeze=lambda: [BnFreeze()])
ours['all'] = lambda: [cb for f in list(ours.values())[:4] for cb in f()]
ours_each = pytest.mark.parametrize('name', ours)

class Fault(Callback):
    "Raise `exc` at the `n`-th `event` of a fit that is in training or not, as asked, after `first` has been raised"
    def __init__(self, event, exc, n, order, training=None, first=None):
        self.event,self.exc,self.n,self.order,self.training_,self.first,self.raised = event,exc,n,order,training,first,False
    def __call__(self, event):
        if self.first and not self.first.raised or event != self.event or self.raised: return
        if self.training_ not in (None, self.learn.training): return
        self.n -= 1
        if self.n: return
        self.raised = True
        raise self.exc

def restore(learn, probe, zero):
    "Give back what a new Learner has; `zero` the gradients that fastai leaves if an error keeps it from doing so"
    learn.model.load_state_dict(net().state_dict())
    if zero: learn.model.zero_grad()
    for o in vars(probe).values():
        if isinstance(o, list): o.clear()

def fit(learn, probe, cbs=None):
    "What a fit leaves, and what it warns of"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(1, .1, cbs=cbs, reset_opt=True)
    return left_by(learn, probe) | dict(warned=[str(o.message) for o in seen])

@cache
def never_had_one(name):
    "The fit of a Learner with these callbacks"
    return fit(*learner(ours[name]() if name else None))

def outcome(learn, cbs):
    "What comes out of a fit, and the modes that it leaves"
    try: learn.fit(2, .1, cbs=cbs)
    except BaseException as e: return type(e),modes(learn.model)
    return None,modes(learn.model)

# The moments

cancels = [CancelBatchException, CancelBackwardException, CancelStepException, CancelTrainException,
           CancelValidException, CancelEpochException, CancelFitException]
faults = [*(o() for o in cancels), ValueError('broken'), KeyboardInterrupt()]
inner = 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch'.split()
outer = 'before_epoch before_train after_train before_validate after_validate after_epoch'.split()
whole = ['before_fit', 'after_fit']
# Which event fires after what is cancelled where
cancelled = dict(
    batch=('after_loss', CancelBatchException, 3), backward=('before_backward', CancelBackwardException, 3),
    step=('before_step', CancelStepException, 2), train=('after_backward', CancelTrainException, 3),
    validate=('before_validate', CancelValidException, 2), epoch=('after_train', CancelEpochException, 2),
    fit=('after_backward', CancelFitException, 3))
moments = dict(
    **{o: [o, 2 if 'step' in o else 3, True] for o in inner}, **{o: [o, 2] for o in outer}, **{o: [o, 1] for o in whole},
    **{f'{o} in validation': [o, 2, False] for o in ('before_batch', 'after_pred', 'after_loss', 'after_batch')},
    **{f'after_cancel_{o}': [f'after_cancel_{o}', 1] for o in cancelled})
assert {o for o,*_ in moments.values()} == {*event.__dict__} & {*Callback._methods} - {'after_create'}
orders = -20,inf  # before fastai's own, and after BnFreeze

def faulty(moment, exc, order):
    "The callbacks that bring about a fault"
    event,n,*training = moments[moment]
    first = cancelled.get(event.removeprefix('after_cancel_'))
    first = [Fault(first[0], first[1](), first[2], 7.5)] if first else []
    return [*first, Fault(event, exc, n, order, *(training or [None]), *first)]

@cache
def without_ours(moment, i, order): return outcome(learner()[0], faulty(moment, faults[i], order))

places = 'learner','fit','removed'  # on the Learner; passed to both fits; passed to the one with the fault only
everything = int(os.environ.get('TEST_EXAMPLES', 1)) > 1

@pytest.mark.parametrize('moment', moments)
@ours_each
def test_the_next_fit_is_as_if_nothing_had_been(name, moment):
    "And the fault comes out of its fit as it does with fastai alone, and leaves the modes that it leaves then"
    for j,(i,order) in enumerate((i, order) for i in range_of(faults) for order in orders):
        for place in places if everything else [places[(j+len(moment)+len(name)) % 3]]:
            cbs = ours[name]()
            learn,probe = learner(cbs if place == 'learner' else None)
            to_fit,fault = cbs if place != 'learner' else [],faulty(moment, faults[i], order)
            case = f'{faults[i]!r}, order {order}, place {place}'
            error,left = outcome(learn, [*to_fit, *fault])
            assert fault[-1].raised, f'not raised: {case}'
            plain_error,plain_left = without_ours(moment, i, order)
            assert error == plain_error, case
            if place != 'learner': assert left == plain_left, case
            drops = name in ('accumulation', 'all')
            restore(learn, probe, zero=not drops)
            expected = never_had_one(None if place == 'removed' else name)
            got = fit(learn, probe, to_fit if place == 'fit' else None)
            different = [o for o in expected if got[o] != expected[o]]
            assert not different, f'{case}: {different}'
