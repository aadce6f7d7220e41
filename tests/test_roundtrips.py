"""There and back: a copy, made at any moment and in any way, trains as the original; so does what has been used before

The yardstick is a fit of a new Learner with new callbacks: the same batches, events, gradients, rates, losses, rows,
weights, statistics and modes, bit for bit."""
import inspect, pickle, warnings
from contextlib import suppress
from copy import copy, deepcopy
from threading import Barrier, Thread

import cloudpickle, pytest

from common import *

ours_each = pytest.mark.parametrize('name', ours)

def pickled(o):
    "Without a warning: PyTorch has one for hooks, and before 2.4 for those that `unserializable_hook` marks too"
    with warnings.catch_warnings():
        if ismin_torch('2.4'): warnings.simplefilter('error')
        return pickle.loads(pickle.dumps(o))

def cloudpickled(o): return pickle.loads(cloudpickle.dumps(o))

def saved(learn):
    file = learn.path/'learn.pkl'
    torch.save(learn, file, pickle_module=cloudpickle)
    return torch.load(file, weights_only=False)

def exported(learn):
    learn.export()
    loaded = load_learner(learn.path/'export.pkl')
    assert not loaded.dls.train and not loaded.dls.valid
    loaded.dls = frozen_data()
    return loaded

class Midway(Callback):
    "Do `f(learn)` once: in `batch` 2 while a window is open, at an event between two epochs, or just before Ctrl-C"
    order = 200
    def __init__(self, moment, f): self.moment,self.f,self.res = moment,f,[]
    def __call__(self, event):
        batch = event == 'after_batch' and self.training and self.iter == 2 and self.moment in ('batch', 'interrupted')
        if self.res or not batch and event != self.moment: return
        self.res.append(self.f(self.learn))
        if self.moment == 'interrupted': raise KeyboardInterrupt

moments = 'new after before_fit before_train batch after_train after_validate after_epoch after_fit interrupted'.split()
moments_each = pytest.mark.parametrize('moment', moments[2:])

def at(moment, learn, f):
    "What `f(learn)` gives when it is done at this moment: before a fit, in it or after it"
    if moment == 'after': learn.fit(2, .1)
    if moment in ('new', 'after'): return f(learn)
    midway = Midway(moment, f)
    with suppress(KeyboardInterrupt): learn.fit(2, .1, cbs=midway)
    [res] = midway.res
    return res

def fits_as_new(name, learn):
    "A Learner that was copied in the middle of a fit has the copier on it, and its Probe"
    learn.remove_cb(Midway)
    start_over(learn, learn.probe)
    assert_same(fit_anew(learn, learn.probe), as_new(name))


# Callbacks

@pytest.mark.parametrize('how', [copy, deepcopy, pickled, cloudpickled])
@ours_each
def test_copies_of_callbacks_that_are_on_no_learner(name, how):
    "Before they are used, and after; the originals go on as well"
    cbs = ours[name]()
    for _ in range(2):
        copies = [how(o) for o in cbs]
        for o in copies,cbs,copies: assert_same(fit_anew(*frozen_learner(), o), as_new(name))

def copy_ours(how, learn): return how([o for o in learn.cbs if type(o).__module__.startswith('fastcb_training')])
def possible(*hows):
    """PyTorch refuses to deep-copy what a Learner has between a forward pass in training and one in validation, and
    fastai's `export` puts down the loader that a phase is about to read"""
    impossible = {deepcopy: ('batch', 'after_train', 'interrupted'), exported: ('before_train',)}
    return pytest.mark.parametrize('how,moment', [
        (how, moment) for how in hows for moment in moments if moment not in impossible.get(how, ())])

@possible(deepcopy, pickled, cloudpickled)
@ours_each
def test_copies_of_callbacks_in_a_fit(name, moment, how):
    "They have a copy of their Learner with them, until they get another one"
    cbs = ours[name]()
    copies = at(moment, frozen_learner(cbs)[0], partial(copy_ours, how))
    for _ in range(2): assert_same(fit_anew(*frozen_learner(), copies), as_new(name))
    for o in cbs: o.learn = None
    assert_same(fit_anew(*frozen_learner(), cbs), as_new(name))

def arguments(cb): return {k: getattr(cb, k) for k in inspect.signature(type(cb)).parameters if k != 'events'}

@pytest.mark.parametrize('how', [copy, deepcopy, pickled, cloudpickled])
@pytest.mark.parametrize('cb', [
    ShortEpochCallback(short_valid=False, n_batches=2, resume=True), GradientAccumulation(len, count=sum, flush=True),
    GradientClip(.5, 1, nonfinite='raise'), BnFreeze(only_frozen=False), MicroBatch(8), FeatureCache(views=2), ResumeFit('a', every=1, minutes=2)], ids=repr)
def test_copies_have_the_arguments(cb, how): assert repr(arguments(how(cb))) == repr(arguments(cb)) and arguments(cb)


# Learners

@possible(deepcopy, pickled, cloudpickled, saved, exported)
@ours_each
def test_copies_of_the_learner(name, moment, how, tmp_path):
    "The fit in which the copy is made goes on as if nobody had looked"
    learn,probe = frozen_learner(ours[name](), path=tmp_path)
    copied = at(moment, learn, how)
    if moment not in ('new', 'interrupted'): assert_same(left_by(learn, probe), two_epochs(name))
    for o in copied,learn: fits_as_new(name, o)

@cache
def two_epochs(name):
    learn,probe = frozen_learner(ours[name]())
    learn.fit(2, .1)
    return left_by(learn, probe)


# Checkpoints

@moments_each
@ours_each
def test_a_checkpoint_written_in_a_fit(name, moment, tmp_path):
    "Writing it changes nothing, and it holds the weights of that moment"
    learn,probe = frozen_learner(ours[name](), path=tmp_path)
    def save(learn):
        learn.save('here')
        return weights(learn.model),stats(learn.model)
    then = at(moment, learn, save)
    if moment != 'interrupted': assert_same(left_by(learn, probe), two_epochs(name))
    learn.load('here')
    assert torch.equal(weights(learn.model), then[0]) and stats(learn.model) == then[1]
    fits_as_new(name, learn)

@pytest.mark.parametrize('on_learner', [True, False])
@ours_each
def test_training_goes_on_from_a_checkpoint_as_without_one(name, on_learner, tmp_path):
    "A fit, a checkpoint, and a fit by somebody else: the same as two fits"
    def second(first):
        cbs = ours[name]()
        learn,probe = frozen_learner(cbs if on_learner else None, path=tmp_path)
        cbs = None if on_learner else cbs
        if first:
            learn.fit(2, .1, cbs=cbs)
            learn.save('first')
        else:
            learn.create_opt()
            learn.load('first', weights_only=False)
        probe.__init__()
        learn.fit(2, .05, cbs=cbs)
        return left_by(learn, probe)
    assert_same(second(True), second(False))

whole_epochs = dict(short=lambda: [ShortEpochCallback(.5)])
whole_epochs |= {o: ours[o] for o in ('accumulation', 'clip', 'bnfreeze', 'micro')}
whole_epochs['all'] = lambda: [cb for f in list(whole_epochs.values())[:5] for cb in f()]

@pytest.mark.parametrize('name', whole_epochs)
def test_a_fit_is_taken_up_at_the_epoch_where_it_was_cut(name, tmp_path):
    "With `start_epoch`, where no window and no pass through the data is in the middle: the epochs left are the same"
    learn,probe = frozen_learner(whole_epochs[name](), path=tmp_path)
    learn.fit(3, .1, cbs=SaveModelCallback(fname='epoch', every_epoch=True, with_opt=True))
    other,probe_ = frozen_learner(whole_epochs[name](), path=tmp_path)
    other.create_opt()
    other.load('epoch_0', weights_only=False)
    other.fit(3, .1, start_epoch=1)
    rows,other_rows = learn.recorder.values,other.recorder.values
    assert len(other_rows) == 3 and [o[1:] for o in other_rows[1:]] == [o[1:] for o in rows[1:]]
    assert torch.equal(weights(other.model), weights(learn.model))
    assert items(probe_.xs) == items(probe.xs)[len(items(probe.xs))//3:] and stats(other.model) == stats(learn.model)


# One callback, two Learners

@pytest.mark.parametrize('on_learner', [True, False])
@pytest.mark.parametrize('interrupted', [True, False])
@ours_each
def test_one_object_on_two_learners_in_turn(name, on_learner, interrupted):
    cbs,learns = ours[name](),[frozen_learner() for _ in range(2)]
    for learn,probe in learns*2:
        start_over(learn, probe)
        if on_learner:
            with learn.added_cbs(cbs): assert_same(fit_anew(learn, probe), as_new(name))
        else: assert_same(fit_anew(learn, probe, cbs), as_new(name))
        if interrupted:
            fault = At('after_backward', stop(KeyboardInterrupt()), 2)
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[*cbs, fault])

@ours_each
def test_two_learners_at_once(name):
    "In two threads, which wait for each other at each batch"
    barrier,left = Barrier(2, timeout=60),{}
    def work(i):
        learn,probe = learns[i]
        learn.fit(2, .1)
        left[i] = left_by(learn, probe)
    def meet(cb): barrier.wait()
    learns = [frozen_learner([*ours[name](), At('after_loss', meet, order=o)]) for o in (-100, 100)]
    threads = [Thread(target=work, args=[i]) for i in range(2)]
    for o in threads: o.start()
    for o in threads: o.join(60)
    for i in range(2): assert_same(left[i], two_epochs(name))
