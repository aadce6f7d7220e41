"""Faults at each moment of a fit: the next fit is that of a Learner that never had one

A fault is each kind of cancel, an error or Ctrl-C, raised by another callback that comes before all of ours or after
them. Equal means: given back the weights and statistics that it began with, and a new optimizer, the Learner fits as a
new one does: the same batches, events, gradients, rates, losses, rows, weights, statistics and modes, bit for bit."""
import gc, multiprocessing, os, time, warnings
from math import inf
from functools import cache

import pytest

from common import *

ours_each = pytest.mark.parametrize('name', ours)

class Fault(Callback):
    "Raise `exc` at the `n`-th `event` of a fit that is in training or not, as asked, after `first` has been raised"
    def __init__(self, event, exc, n, order, training=None, first=None):
        self.event,self.exc,self.n,self.order = event,exc,n,order
        self.phase,self.first,self.raised = training,first,False
    def __call__(self, event):
        if self.first and not self.first.raised or event != self.event or self.raised: return
        if self.phase not in (None, self.learn.training): return
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
    **{o: [o, 2 if 'step' in o else 3, True] for o in inner},
    **{o: [o, 2] for o in outer}, **{o: [o, 1] for o in whole},
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
def without_ours(moment, i, order):
    "What comes out of a fit with this fault and fastai alone"
    return outcome(frozen_learner()[0], faulty(moment, faults[i], order))

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
            for o in cbs:
                if isinstance(o, ResumeFit): o.fname = o.fname.with_suffix('.next') # another call than the one that it would go on with
            got = fit_anew(learn, probe, to_fit if place == 'fit' else None)
            assert_same(got, as_new(None if place == 'removed' else name), case)


# Faults of the data

class Fragile(torch.utils.data.Dataset):
    "Items of which one cannot be read, once; or reading it ends the process"
    def __init__(self, data, fails, dies=False): self.data,self.fails,self.dies = data,fails,dies
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        if i == self.fails:
            if self.dies:
                time.sleep(1) # the batches before it have to be fetched first: they are in this process's memory
                os._exit(3)
            self.fails = None
            raise OSError('no such item')
        return self.data[i]

def fragile(fails=None, dies=False, **kwargs):
    "Data as `frozen_data` has them, of which the item `fails` in training"
    train,valid = ([(x, y) for xs,ys in dl for x,y in zip(xs, ys)] for dl in frozen_data())
    return DataLoaders(*(DataLoader(o, bs=4, **kwargs) for o in (Fragile(train, fails, dies), valid)), device='cpu')

places_each = pytest.mark.parametrize('on_learner', [True, False])

def fails_then_fits(name, on_learner, dls, error, mend=noop):
    "A fit with `dls` fails; what is wrong with them is mended, and the next fit is as new"
    cbs = ours[name]()
    learn,probe = frozen_learner(cbs if on_learner else None, dls)
    to_fit = None if on_learner else cbs
    raised = False
    try: learn.fit(2, .1, cbs=to_fit)
    except error: raised = True # `pytest.raises` would keep the worker that died, and PyTorch raise for it again
    gc.collect()
    assert raised and probe.xs
    start_over(learn, probe)
    mend(dls)
    assert_same(fit_anew(learn, probe, to_fit), as_new(name))

@places_each
@ours_each
def test_a_loader_that_raises_in_mid_epoch(name, on_learner): fails_then_fits(name, on_learner, fragile(9), OSError)

@places_each
@pytest.mark.parametrize('name', ['short', 'all'])
def test_a_worker_that_dies(name, on_learner):
    "Another process takes its place in the next fit, and none is left after it"
    def mend(dls): dls.train.dataset.fails = None
    before = {o.pid for o in multiprocessing.active_children()}
    fails_then_fits(name, on_learner, fragile(9, True, num_workers=1), RuntimeError, mend)
    assert {o.pid for o in multiprocessing.active_children()} <= before


# A loss that turns NaN, and a checkpoint that is loaded, in mid-window

def spoiled(at, value=np.nan):
    dls = frozen_data()
    dls.train_ds.tensors[1][4*at:4*at+4] = value
    return dls

@pytest.mark.parametrize('at', range(5))
@ours_each
def test_a_loss_that_turns_nan_ends_the_fit(name, at):
    "With `TerminateOnNaNCallback`; the next fit is as new"
    learn,probe = frozen_learner([TerminateOnNaNCallback(), *ours[name]()], spoiled(at))
    learn.fit(3, .1)
    assert len(probe.xs) < 15 or name == 'short' and at == 4
    learn.dls = frozen_data()
    start_over(learn, probe)
    learn.remove_cb(TerminateOnNaNCallback)
    assert_same(fit_anew(learn, probe), as_new(name))

@pytest.mark.parametrize('at', range(5))
def test_a_nan_takes_its_window_with_it_and_no_more(at):
    "`GradientClip` skips the step; the next window has the gradient that it has without the one that was lost"
    lost = at//2
    learn,probe = frozen_learner([GradientAccumulation(8, flush=True), GradientClip()], spoiled(at))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(1, 0.)
    whole,expected = frozen_learner([GradientAccumulation(8, flush=True), GradientClip()])
    whole.fit(1, 0.)
    assert sum('is nan: it is skipped' in str(o.message) for o in seen) == 1
    assert [o.tolist() for o in probe.grads] == [o.tolist() for i,o in enumerate(expected.grads) if i != lost]

@places_each
@pytest.mark.parametrize('moment', ['after_epoch', 'before_epoch'])
@ours_each
def test_a_checkpoint_loaded_between_epochs(name, moment, on_learner, tmp_path):
    "The epoch after it is the one before it again, if it has the same data, and the next fit is as new"
    def load(cb): cb.learn.load('start', weights_only=False)
    cbs = ours[name]()
    learn,probe = frozen_learner(cbs if on_learner else None, path=tmp_path)
    learn.create_opt()
    learn.opt.set_hypers(lr=.1)
    learn.save('start')
    epoch = dict(after_epoch=0, before_epoch=1)[moment]
    learn.fit(2, .1, cbs=[*([] if on_learner else cbs), At(moment, load, ep=epoch, order=100)])
    rows = learn.recorder.values
    if name != 'short' and not name.startswith('all'): assert rows[0][1:] == rows[1][1:] # those go on in the data
    assert len(rows) == 2 and np.isfinite(rows).all()
    if name == 'bnfreeze' or name.startswith('all'): assert stats(learn.model)['0.1'] == stats(frozen_net())['0.1']
    start_over(learn, probe)
    assert_same(fit_anew(learn, probe, None if on_learner else cbs), as_new(name))

def test_a_checkpoint_loaded_in_mid_window(tmp_path):
    "The window goes on: the gradient of its step is the mean of its batches', each where the weights were then"
    learn,probe = frozen_learner([GradientAccumulation(8), BnFreeze()], path=tmp_path)
    learn.fit(1, .1)
    learn.save('later')
    alone = []
    start_over(learn, probe)
    def load(cb): cb.learn.load('later', weights_only=False)
    def grad(cb):
        ps = [p for p in cb.learn.model.parameters() if p.requires_grad]
        if not cb.training: return
        grads = torch.autograd.grad(cb.learn.loss, ps, retain_graph=True)
        alone.append(torch.cat([o.flatten() for o in grads]))
    learn.fit(1, .1, cbs=[At('after_batch', load, it=2, order=100), At('after_loss', grad, order=100)])
    assert len(probe.grads) == 2
    for got,a,b in zip(probe.grads, alone[::2], alone[1::2]): assert torch.allclose(got, (a+b)/2, rtol=1e-4, atol=1e-6)
