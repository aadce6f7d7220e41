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
def without_ours(moment, i, order): return outcome(frozen_learner()[0], faulty(moment, faults[i], order))

places = 'learner','fit','removed'  # on the Learner; passed to both fits; passed to the one with the fault only
everything = int(os.environ.get('TEST_EXAMPLES', 1)) > 1

@pytest.mark.parametrize('moment', moments)
@ours_each
def test_the_next_fit_is_as_if_nothing_had_been(name, moment):
    "And the fault comes out of its fit as it does with fastai alone, and leaves the modes that it leaves then"
    for j,(i,order) in enumerate((i, order) for i in range_of(faults) for order in orders):
        for place in places if everything else [places[(j+len(moment)+len(name)) % 3]]:
            cbs = ours[name]()
            learn,probe = frozen_learner(cbs if place == 'learner' else None)
            to_fit,fault = cbs if place != 'learner' else [],faulty(moment, faults[i], order)
            case = f'{faults[i]!r}, order {order}, place {place}'
            error,left = outcome(learn, [*to_fit, *fault])
            assert fault[-1].raised, f'not raised: {case}'
            plain_error,plain_left = without_ours(moment, i, order)
            assert error == plain_error, case
            if place != 'learner': assert left == plain_left, case
            start_over(learn, probe, zero=name not in ('accumulation', 'all')) # fastai leaves some after an error
            assert_same(fit_anew(learn, probe, to_fit if place == 'fit' else None), as_new(None if place == 'removed' else name), case)
