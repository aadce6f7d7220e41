"GradientAccumulation, held against the big batch itself"
import pickle, warnings

import pytest
from hypothesis import given, strategies as st
from torch.nn.utils import vector_to_parameters

from common import *
from fastcb_training.accumulation import GradientAccumulation
from fastcb_training.clip import GradientClip

nan,inf = float('nan'),float('inf')
Acc,Clip = GradientAccumulation,GradientClip


# Data

def batched(data, sizes): return Held(zip(*(o.split(sizes) for o in data)))

def items(n, seed=0, dtype=torch.float32):
    "`n` items of a regression so far from its solution that gradients don't vanish"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=dtype)
    return x, x @ tensor([[1.], [-2.], [3.]]).to(dtype) + 5 + torch.randn(n, 1, generator=g, dtype=dtype)

def labelled(n, *shape, classes=5):
    "`n` random items, and a class for each place in `shape`"
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, 3, generator=g), torch.randint(classes, (n, *shape), generator=g)

def batches_of(*sizes): return batched(items(sum(sizes)), sizes)

def spoil(batches, it, value):
    batches[it][1].fill_(value)
    return batches

def learner(batches, model=None, loss_func=None, **kwargs):
    "A Learner that trains `batches`, in this order"
    train,valid = DataLoader(Held(batches), bs=None),DataLoader(Held(zip(*batches[0])), bs=4)
    return linear_learner(DataLoaders(train, valid, device=batches[0][0].device), model, loss_func, **kwargs)


# The trusted twin: big batches, in plain PyTorch

def windows(batches, n_acc, n_epoch=1, flush=False, count=find_bs, skip=()):
    "The windows of a fit, each a list of batches, if those numbered `skip` in an epoch don't count"
    closed,window,n,total = [],[],0,len(batches)*n_epoch
    for i in range(total):
        it = i % len(batches)
        if not window: size = n_acc(i/total) if callable(n_acc) else n_acc
        if it not in skip:
            window.append(batches[it])
            n += count(batches[it][1:])
        if n and (n >= size or flush and it == len(batches)-1):
            closed.append(window)
            window,n = [],0
    return closed

def flat_grads(model):
    "All gradients as one vector, 0 where there is none"
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])

def big_grad(model, loss_func, window, at=None):
    "The gradient of all batches in `window` as one, where the weights are `at`"
    if at is not None: vector_to_parameters(at, model.parameters())
    model.zero_grad()
    x,*ys = map(torch.cat, zip(*window))
    loss_func(model(x), *ys).backward()
    return flat_grads(model)

def plain_loop(model, loss_func, wins, opt):
    "The weights after training `model` with real big batches"
    for o in wins:
        big_grad(model, loss_func, o)
        opt.step()
    return weights(model)

class Steps(Probe):
    "Record at each step the gradient, the weights where it was taken, and a copy of the model"
    def __init__(self): super().__init__(); self.weights,self.twins = [],[]
    def before_fit(self): self.twin = deepcopy(self.learn.model)
    def before_step(self):
        self.grads.append(flat_grads(self.learn.model))
        self.weights.append(weights(self.learn.model))
        self.twins.append(self.twin)

def assert_big(steps, wins, loss_func, tol=1e-6):
    "One step for each window, with the gradient of the big batch"
    assert len(steps.grads) == len(wins)
    for grad,at,twin,window in zip(steps.grads, steps.weights, steps.twins, wins):
        big = big_grad(twin, loss_func, window, at)
        assert (grad-big).norm() <= tol*big.norm()

def check(learn, cbs, wins, n_epoch=1, lr=.001, loss_func=None, tol=1e-6):
    "Fit `learn` with `cbs`, and see that its steps are those of the big batches `wins`"
    steps = Steps()
    learn.fit(n_epoch, lr, cbs=[*L(cbs), steps])
    assert_big(steps, wins, loss_func or learn.loss_func, tol)
    return steps


# The gradient, the number of steps and the weights, whatever the sizes

def own_mean(pred, targ): return (pred-targ).square().mean()
def own_sum(pred, targ): return (pred-targ).square().sum()
own_sum.reduction = 'sum'

opts = dict(SGD=partial(SGD, mom=.9, wd=.01, decouple_wd=False), Adam=partial(Adam, wd=.01))

def torch_opt(name, model, lr, wd=.01):
    "PyTorch's counterpart of `opts[name]`; weight decay leaves the bias out, as fastai's does"
    groups = [dict(params=[model.weight], weight_decay=wd), dict(params=[model.bias], weight_decay=0.)]
    if name == 'SGD': return torch.optim.SGD(groups, lr=lr, momentum=.9)
    return torch.optim.AdamW(groups, lr=lr, betas=(.9, .99), eps=1e-5)

@pytest.mark.parametrize('dtype, losses, tol', [
    (torch.float32, dict(mean=MSELossFlat(), sum=MSELossFlat(reduction='sum')), 1e-6),
    (torch.float64, dict(mean=own_mean, sum=own_sum), 1e-12)], ids=['float32', 'float64'])
@examples(40)
@given(n=st.integers(1, 200), bs=st.integers(1, 64), n_acc=st.integers(1, 300), flush=st.booleans(),
       n_epoch=st.integers(1, 3), loss=st.sampled_from(['mean', 'sum']), opt=st.sampled_from(['SGD', 'Adam']))
def test_big_batch(dtype, losses, tol, n, bs, n_acc, flush, n_epoch, loss, opt):
    batches,lr = batched(items(n, dtype=dtype), bs),1e-5 if loss == 'sum' else 1e-3
    learn = learner(batches, nn.Linear(3, 1).to(dtype), losses[loss], opt_func=opts[opt])
    if dtype == torch.float64: learn.remove_cb(Recorder) # it averages in float32
    plain,start,wins = deepcopy(learn.model),weights(learn.model),windows(batches, n_acc, n_epoch, flush)
    check(learn, Acc(n_acc, flush=flush), wins, n_epoch, lr, tol=tol)
    moved = plain_loop(plain, losses[loss], wins, torch_opt(opt, plain, lr)) - start
    assert (weights(learn.model)-start-moved).norm() <= 1e-10*moved.norm() + 1e3*torch.finfo(dtype).eps


# Losses

def unmasked(yb): return (yb[0] != -100).sum()

def masked(x, y):
    "A growing share of the targets masked"
    shares,g = torch.linspace(0, .95, len(y)).view(-1, *[1]*(y.ndim-1)),torch.Generator().manual_seed(1)
    return x, y.masked_fill(torch.rand(y.shape, generator=g) < shares, -100)

class Pixels(nn.Linear):
    "Classes on axis 1, as in segmentation"
    def forward(self, x): return super().forward(x).movedim(-1, 1)

class_weights = tensor([.2, 1., 3., .5, 2.])
weighted_ce = partial(CrossEntropyLossFlat, weight=class_weights)
tokens,pixels,classes,values = labelled(40, 7),labelled(40, 4, 4),labelled(40),items(40)

@pytest.mark.parametrize('loss_func, data, n_acc, count', [
    (CrossEntropyLossFlat(), masked(*tokens), 60, unmasked),
    (CrossEntropyLossFlat(axis=1), masked(*pixels), 200, unmasked),
    (CrossEntropyLossFlat(ignore_index=2), classes, 12, lambda yb: (yb[0] != 2).sum().item()),
    (weighted_ce(), classes, 12.5, lambda yb: class_weights[yb[0]].sum()),
    (weighted_ce(reduction='sum'), classes, 12, find_bs),
    (LabelSmoothingCrossEntropyFlat(), classes, 12, find_bs),
    (LabelSmoothingCrossEntropyFlat(reduction='sum'), classes, 12, find_bs),
    (FocalLossFlat(), classes, 12, find_bs),
    (DiceLoss(), pixels, 12, find_bs), # fastai's default is a sum here
    (L1LossFlat(), values, 12, find_bs),
    (nn.MSELoss(reduction='sum'), values, 12, find_bs),
    (partial(F.mse_loss, reduction='sum'), values, 12, find_bs),
    (partial(nn.MSELoss(reduction='sum')), values, 12, find_bs),
], ids='tokens pixels ignored weights weights_sum smooth smooth_sum focal dice l1 sum partial nested'.split())
@pytest.mark.parametrize('flush', [False, True])
def test_losses(loss_func, data, n_acc, count, flush):
    torch.manual_seed(0)
    batches,model = batched(data, [8, 3, 9, 1, 8, 8, 3]),Pixels if data[1].ndim == 3 else nn.Linear
    learn = learner(batches, model(3, 1 if data is values else 5), loss_func)
    check(learn, Acc(n_acc, count=count, flush=flush), windows(batches, n_acc, 2, flush, count), 2)

@pytest.mark.parametrize('f', [torch.sqrt, torch.exp])
def test_losses_that_need_their_own_value(f):
    "They don't average over items, so a window's loss is that of its batches, weighted by their items"
    def batch_loss(pred, targ): return f(.1*F.mse_loss(pred, targ))
    def window_loss(pred, targ):
        sizes = {11: [8, 3], 10: [9, 1]}[len(targ)]
        return sum(len(t)*batch_loss(p, t) for p,t in zip(pred.split(sizes), targ.split(sizes)))/len(targ)
    batches = batches_of(8, 3, 9, 1, 8)
    check(learner(batches, loss_func=batch_loss), Acc(10), windows(batches, 10), loss_func=window_loss)

class Mixed(Callback):
    "Record what `mix` made of each batch"
    order,run_valid = 100,False
    def __init__(self, mix): self.mix,self.seen = mix,[]
    def before_batch(self):
        lam = torch.as_tensor(self.mix.lam).reshape(-1).expand(len(self.y))
        self.seen.append(tuple(o.clone() for o in (self.x, self.y, *self.mix.yb1, lam)))

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('kind', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat, partial])
def test_mixed_batches(mix, reduction, kind):
    g,mix,has_classes = torch.Generator().manual_seed(0),mix(),kind not in (MSELossFlat, partial)
    y = torch.randint(3, (31,), generator=g) if has_classes else torch.randn(31, 1, generator=g) + 5
    batches,mixed,steps = batched((torch.randn(31, 1, 6, 6, generator=g), y), [8, 4, 9, 2, 8]),Mixed(mix),Steps()
    loss_func = partial(F.mse_loss, reduction=reduction) if kind is partial else kind(reduction=reduction)
    def mixed_loss(pred, y, y1, lam):
        if not has_classes: return loss_func(pred, y)
        each = kind(reduction='none')
        return getattr(torch.lerp(each(pred, y1), each(pred, y), lam), reduction)()
    learn = learner(batches, nn.Sequential(nn.Flatten(), nn.Linear(36, 3 if has_classes else 1)), loss_func)
    learn.fit(1, .01, cbs=[mix, Acc(10), mixed, steps])
    assert_big(steps, windows(mixed.seen, 10), mixed_loss)

def test_penalties_of_others():
    "A penalty that another callback adds to the loss is weighted with it"
    batches,penalty = batches_of(4, 2, 5, 4, 3),lambda model: .1*sum(p.square().sum() for p in model.parameters())
    def add(cb): cb.learn.loss_grad = cb.learn.loss_grad + penalty(cb.learn.model)
    learn,steps = learner(batches),Steps()
    learn.fit(1, .01, cbs=[Acc(8), steps, At('after_loss', lambda cb: cb.training and add(cb), order=100)])
    assert_big(steps, windows(batches, 8), lambda pred,y: learn.loss_func(pred, y) + penalty(steps.twin))

@pytest.mark.parametrize('event', ['after_loss', 'before_backward'])
def test_gradients_taken_by_others(event):
    "A callback that differentiates the loss for itself, to log it, say, doesn't make the batch count twice"
    batches = batches_of(4, 2, 5, 4, 3, 4)
    def take(cb):
        if cb.training: torch.autograd.grad(cb.learn.loss_grad, cb.learn.model.weight, retain_graph=True)
    check(learner(batches), [Acc(8), At(event, take, order=100)], windows(batches, 8))


# Windows

@pytest.mark.parametrize('flush', [False, True])
@pytest.mark.parametrize('sizes, n_acc, n_steps', [
    ([4]*6, 8, (6, 6)), # exact
    ([4]*6, 6, (6, 6)), # overshoots
    ([4]*6, 3, (12, 12)), # below the batch size
    ([4]*6, .5, (12, 12)),
    ([4, 4, 4, 4, 1], 8, (4, 6)), # carried into the next epoch, or flushed
    ([3, 5, 2, 7, 1, 1], 10, (3, 4)),
    ([4]*3, 20, (1, 2)), # above the epoch
    ([4]*3, 24, (1, 2)), # the fit
    ([4]*3, 25, (0, 2)), # above the fit
    ([1], 1, (2, 2)),
    ([5], 7, (1, 2))])
def test_windows(sizes, n_acc, n_steps, flush):
    batches = batches_of(*sizes)
    learn = learner(batches)
    steps = check(learn, Acc(n_acc, flush=flush), windows(batches, n_acc, 2, flush), 2)
    assert len(steps.grads) == n_steps[flush] and no_grads(learn)
    assert steps.events.count('after_cancel_batch') == 2*len(sizes) - n_steps[flush] # each step is part of a batch

def test_batches_can_be_counted():
    batches = batches_of(4, 1, 4, 4)
    learn = learner(batches, loss_func=MSELossFlat(reduction='sum'))
    check(learn, Acc(2, count=lambda yb: 1), [batches[:2], batches[2:]])

def test_counts_need_not_be_whole():
    "Ten times .1 is 1, though it is less where each sum is rounded"
    batches = batches_of(*[2]*22)
    steps = check(learner(batches), Acc(1, count=lambda yb: .1), [batches[:10], batches[10:20]])
    assert len(steps.losses) == 22

def finite_items(yb): return yb[0].isfinite().sum()

@pytest.mark.parametrize('loss_func, data, value, count', [
    (MSELossFlat(), items(24), nan, finite_items),
    (CrossEntropyLossFlat(), labelled(24), -100, unmasked)], ids=['nan', 'ignored'])
@pytest.mark.parametrize('empty', [{0}, {1}, {2}, {3}, {5}, {0, 1, 2}, {4, 5}, {2, 5}, set(range(6))], ids=str)
@pytest.mark.parametrize('flush', [False, True])
def test_batch_that_counts_0(loss_func, data, value, count, empty, flush):
    batches = batched([o.clone() for o in data], 4)
    for i in empty: spoil(batches, i, value)
    learn = learner(batches, nn.Linear(3, 1 if value is nan else 5), loss_func)
    check(learn, Acc(12, count=count, flush=flush), windows(batches, 12, 2, flush, skip=empty), 2)
    assert weights(learn.model).isfinite().all()

@pytest.mark.parametrize('event, exc', [
    *[(o, CancelBatchException) for o in ('before_batch', 'after_pred', 'after_loss', 'before_backward')],
    ('before_backward', CancelBackwardException)])
@pytest.mark.parametrize('order', [5, 7], ids=['before_ours', 'after_ours'])
@pytest.mark.parametrize('it', [0, 2, 3, 5])
@pytest.mark.parametrize('flush', [False, True])
def test_cancelled_batch(event, exc, order, it, flush):
    "It doesn't count; if it is the last of an epoch, `flush` closes the window without it"
    batches = batches_of(4, 5, 3, 4, 4, 2)
    cut = At(event, stop(exc()), it, order=order)
    check(learner(batches), [Acc(8, flush=flush), cut], windows(batches, 8, 2, flush, skip={it}), 2)

@pytest.mark.parametrize('event', ['after_backward', 'before_step'])
@pytest.mark.parametrize('order', [5, 7])
@pytest.mark.parametrize('n_acc, flush, it, wins', [(7, False, 1, [(0, 3), (3, 5)]), (15, True, 3, [(0, 5), (5, 6)])])
def test_step_put_off(event, order, n_acc, flush, it, wins):
    "A batch cancelled after its gradient has arrived counts, and its window takes in the next one, too"
    batches = batches_of(*[4]*6)
    cut = At(event, stop(CancelBatchException()), it, order=order)
    check(learner(batches), [Acc(n_acc, flush=flush), cut], [batches[a:b] for a,b in wins])

def test_last_step_put_off_is_flushed():
    batches = batches_of(*[4]*6)
    cut = At('after_backward', stop(CancelBatchException()), 5)
    check(learner(batches), [Acc(16, flush=True), cut], windows(batches, 16, 2, True), 2)

@pytest.mark.parametrize('order', [5, 7])
@pytest.mark.parametrize('exc, wins', [
    (CancelStepException, lambda b: [b[:4], b[:4], b[4:5]]),
    (CancelBatchException, lambda b: [b[:4], [b[4], *b[:3]], b[3:5]])])
def test_flush_refused(exc, wins, order):
    "The last batch of the epoch was cancelled, and a callback cancels the step, or puts it off"
    batches = batches_of(*[4]*6)
    cut,refuse = At('before_batch', stop(CancelBatchException()), 5),At('before_step', stop(exc()), 5, 0, order=order)
    check(learner(batches), [Acc(16, flush=True), cut, refuse], wins(batches), 2)

@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('order', [7, 100])
def test_cancelled_after_a_step(exc, order):
    "fastai doesn't come to zero the gradients then; the next window begins without them all the same"
    batches = batches_of(*[4]*6)
    wins = windows(batches, 8)
    cut = At('after_step', stop(exc()), 3, 0, order=order)
    check(learner(batches), [Acc(8), cut], [*(wins if exc == CancelBatchException else wins[:2]), *wins], 2)

@pytest.mark.parametrize('flush', [False, True])
@pytest.mark.parametrize('exc', [CancelTrainException, CancelEpochException])
def test_cancelled_training_is_flushed(flush, exc):
    batches = batches_of(*[4]*6)
    cut = At('after_batch', stop(exc()), 2)
    check(learner(batches), [Acc(8, flush=flush), cut], windows(batches, 8, 2, flush, skip={3, 4, 5}), 2)

def halves(pct): return 20 if pct < .5 else 5
scheds = dict(lin=SchedLin(4, 40), cos=SchedCos(3, 29), combined=combined_cos(.25, 6, 20, 6), halves=halves)

@pytest.mark.parametrize('n_acc', scheds.values(), ids=scheds)
@pytest.mark.parametrize('flush', [False, True])
def test_schedule(n_acc, flush):
    "It is asked once a window, when the window opens"
    asked,batches = [],batches_of(*[4, 3, 5, 2]*5)
    def ask(pct): asked.append(pct); return n_acc(pct)
    wins = windows(batches, n_acc, 2, flush)
    check(learner(batches), Acc(ask, flush=flush), wins, 2)
    opened = np.cumsum([0, *map(len, wins)])/40
    assert np.allclose(asked, opened[opened < 1])


# Arguments

def raising(exc, *bad): return [(o, exc) for o in bad]
zeros = raising(ValueError, 0, 0.)
bad_amounts = raising(ValueError, -1, nan, inf) + raising(TypeError, None, '32', True, 1j)
bad_tensors = raising(ValueError, tensor(nan), tensor(-1)) + raising(TypeError, tensor(True), tensor([1., 2.]))

@pytest.mark.parametrize('bad, exc', [*zeros, *raising(ValueError, tensor(0)), *bad_amounts, *bad_tensors], ids=str)
def test_schedule_that_makes_no_sense(bad, exc):
    with pytest.raises(exc, match='`n_acc`'): learner(batches_of(4, 4)).fit(1, cbs=Acc(lambda pct: bad))

@pytest.mark.parametrize('bad, exc', [*bad_amounts, *bad_tensors], ids=str)
def test_count_that_makes_no_sense(bad, exc):
    with pytest.raises(exc, match='`count`'): learner(batches_of(4, 4)).fit(1, cbs=Acc(8, count=lambda yb: bad))

@pytest.mark.parametrize('number', [8, 8., np.int64(8), np.float32(8), tensor(8), tensor(8.)], ids=repr)
def test_what_counts_as_a_number(number):
    batches = batches_of(*[4]*4)
    for acc in Acc(number), Acc(lambda pct: number), Acc(16, count=lambda yb: number):
        check(learner(batches), acc, windows(batches, 8))

def test_arguments():
    "fastai's by position, with its default; the others by name"
    assert (Acc().n_acc, Acc(7).n_acc) == (32, 7)
    with pytest.raises(TypeError): Acc(7, len)


# Nothing enters a fit, nothing leaves it

def unfinished(learn, cbs): learn.fit(1, cbs=cbs)
def find_lr(learn, cbs):
    with learn.added_cbs(cbs): learn.lr_find(num_it=7, show_plot=False, suggest_funcs=None)

def cut_short(event, exc, it=2):
    def _inner(learn, cbs):
        try: learn.fit(1, cbs=[*cbs, At(event, stop(exc), it, order=100)])
        except (KeyboardInterrupt, RuntimeError): pass
    return _inner

ways = dict(unfinished=unfinished, lr_find=find_lr, **{
    f'{type(exc).__name__} {event}': cut_short(event, exc)
    for event in ('after_backward', 'after_step', 'after_batch', 'before_validate')
    for exc in (CancelFitException(), KeyboardInterrupt(), RuntimeError('a fault'))})

@pytest.mark.parametrize('place', ['fit', 'learner'])
@pytest.mark.parametrize('then', ['with', 'without', 'lr_find'])
@pytest.mark.parametrize('way', ways)
def test_nothing_leaks(way, then, place, tmp_path):
    "The first gradient of the next fit is clean, with the callback and without"
    batches,steps,acc = batches_of(*[4]*7),Steps(),[Acc(12)]
    learn,passed = learner(batches, path=tmp_path, cbs=acc if place == 'learner' else []),acc if place == 'fit' else []
    ways[way](learn, passed)
    if then == 'without': learn.remove_cbs(acc)
    if place == 'fit' or then == 'without': assert no_grads(learn)
    (find_lr if then == 'lr_find' else unfinished)(learn, [steps] if then == 'without' else [*passed, steps])
    steps.grads = steps.grads[:1]
    assert_big(steps, [batches[:1 if then == 'without' else 3]], learn.loss_func)

@pytest.mark.parametrize('place', ['fit', 'learner'])
def test_gradients_made_before_a_fit_stay_out(place):
    batches,acc = batches_of(*[4]*7),[Acc(12)]
    learn = learner(batches, cbs=acc if place == 'learner' else [])
    for p in learn.model.parameters(): p.grad = torch.full_like(p, 1e3)
    check(learn, acc if place == 'fit' else [], windows(batches, 12))

def test_frozen_fit_into_unfrozen():
    batches,steps,model = batches_of(*[4]*7),Steps(),nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    learn = learner(batches, model, splitter=lambda m: [list(o.parameters()) for o in m])
    learn.fine_tune(1, freeze_epochs=1, cbs=[Acc(12), steps])
    assert [o[0].weight.requires_grad for o in steps.twins] == [False, False, True, True]
    assert_big(steps, windows(batches, 12)*2, learn.loss_func)

def test_parameters_that_are_not_the_models_or_not_stepped():
    "The optimizer has a parameter of the loss, and lacks the body"
    batches,clip,scale = batches_of(*[4]*7),Clip(inf),nn.Parameter(torch.ones(1))
    def loss_func(pred, targ): return F.mse_loss(pred*scale, targ)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    learn = learner(batches, model, loss_func, splitter=lambda m: [*m[1].parameters(), scale])
    learn.fit(1, 0., cbs=[Acc(11), clip])
    assert not scale.grad.any() and no_grads(learn)
    big_grad(model, loss_func, batches[3:6])
    assert torch.allclose(clip.norm, torch.cat([p.grad.flatten() for p in (*model[1].parameters(), scale)]).norm())

@pytest.mark.parametrize('acc', [Acc, Acc(32)], ids=['class', 'object'])
def test_passed_to_fit_again_and_again(acc):
    batches = batches_of(*[12]*5)
    learn = learner(batches)
    for _ in range(3):
        check(learn, [acc], windows(batches, 32))
        assert no_grads(learn) and not learn._grab_cbs(Acc)

@pytest.mark.parametrize('place', ['fit', 'learner'])
def test_no_stale_window_if_the_first_epoch_is_cancelled(place):
    batches,acc = batches_of(*[4]*6),[Acc(12, flush=True)]
    learn,passed = learner(batches, cbs=acc if place == 'learner' else []),acc if place == 'fit' else []
    cut_short('after_batch', KeyboardInterrupt(), 1)(learn, passed)
    check(learn, [*passed, At('before_train', stop(CancelTrainException()), ep=0)], windows(batches, 12), 2)


# A `validate` or `get_preds` in the middle of a fit

looks = dict(validate=Learner.validate, get_preds=Learner.get_preds, inner=partial(Learner.get_preds, inner=True))

def inside_an_epoch(look):
    "`look` at the Learner in training, and put back all that a `validate` changes"
    names = 'training dl n_iter iter xb yb pred loss loss_grad epoch train_iter pct_train'.split()
    def f(cb):
        if not cb.training: return
        state = {o: getattr(cb.learn, o) for o in names}
        look(cb.learn)
        for k,v in state.items(): setattr(cb.learn, k, v)
        cb.learn.model.train()
    return f

@pytest.mark.parametrize('look', looks)
@pytest.mark.parametrize('order', [0, 7, 100])
@pytest.mark.parametrize('flush', [False, True])
def test_validation_inside_an_epoch(look, order, flush):
    batches = batches_of(4, 4, 4, 4, 3)
    look = At('after_batch', inside_an_epoch(looks[look]), order=order)
    check(learner(batches), [Acc(8, flush=flush), look], windows(batches, 8, 2, flush), 2)

def test_validation_that_leaves_the_length_of_its_loader():
    "Putting back the training mode is enough for fastai to go on; `n_iter` stays that of the other loader"
    batches = batches_of(4, 4, 4, 4, 3)
    def look(cb):
        if not cb.training: return
        cb.learn.validate(dl=DataLoader(Held(batches[:3]), bs=None))
        cb.learn.training = True
        cb.learn.model.train()
    look = At('after_batch', look, 1, order=100)
    check(learner(batches), [Acc(16, flush=True), look], windows(batches, 16, 2, True), 2)

def between_epochs(look):
    "`look`, but not from within itself"
    def f(cb):
        if not cb.learn.lock.locked(): look(cb.learn)
    return f

@pytest.mark.parametrize('look', ['validate', 'get_preds'])
@pytest.mark.parametrize('event', ['after_train', 'before_validate', 'after_validate', 'after_epoch'])
@pytest.mark.parametrize('order', [0, 100])
@pytest.mark.parametrize('cancelled', [None, 4])
@pytest.mark.parametrize('flush', [False, True])
def test_validation_between_epochs(look, event, order, cancelled, flush):
    batches = batches_of(4, 4, 4, 4, 3)
    cbs = [Acc(12, flush=flush), At(event, between_epochs(looks[look]), order=order)]
    if cancelled: cbs.append(At('before_batch', stop(CancelBatchException()), cancelled))
    check(learner(batches), cbs, windows(batches, 12, 2, flush, skip={cancelled}), 2)


# What the others see

def test_what_the_others_see():
    "Losses and rates by batches, steps by windows, and the loss as it is"
    batches,seen,sched = batches_of(4, 4, 4, 4, 3),[],ParamScheduler(dict(lr=SchedLin(0., 0.)))
    events = 'after_loss before_backward after_backward before_step after_step after_cancel_batch after_batch'.split()
    def look(cb): seen.append(cb.learn.loss_grad.item() == cb.learn.loss.item())
    probes = [At(o, look, order=100) for o in events]
    learn,wins = learner(batches),windows(batches, 8, 2)
    steps = check(learn, [Acc(8), sched, *probes], wins, 2)
    assert steps.losses == [learn.loss_func(learn.model(x), y).item() for x,y in batches]*2 and all(seen)
    assert steps.events.count('after_step') == len(wins)
    assert steps.events.count('after_cancel_batch') == 10-len(wins)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == len(sched.hps['lr']) == 10

def test_scheduler_goes_by_batches():
    batches = batches_of(*[4]*8)
    learn,plain = learner(batches),learner(batches)
    learn.fit_one_cycle(2, .01, cbs=Acc(8))
    plain.fit_one_cycle(2, .01)
    assert learn.recorder.hps == plain.recorder.hps and learn.recorder.lrs == plain.recorder.lrs

@pytest.mark.parametrize('name', opts)
def test_momentum_and_weight_decay_act_once_a_window(name):
    batches = batches_of(*[4, 2, 5]*6)
    learn = learner(batches, opt_func=opts[name])
    plain = deepcopy(learn.model)
    learn.fit(3, .01, wd=.3, cbs=Acc(8))
    expected = plain_loop(plain, learn.loss_func, windows(batches, 8, 3), torch_opt(name, plain, .01, .3))
    assert torch.allclose(weights(learn.model), expected, rtol=1e-5)

@pytest.mark.parametrize('flush', [False, True])
def test_wrapped_optimizer(flush):
    batches = batches_of(*[4, 2, 5]*3)
    learn = learner(batches, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    plain,wins = deepcopy(learn.model),windows(batches, 8, 2, flush)
    check(learn, [Acc(8, flush=flush), Clip(inf)], wins, 2, lr=.01)
    expected = plain_loop(plain, learn.loss_func, wins, torch.optim.SGD(plain.parameters(), lr=.01, momentum=.9))
    assert torch.allclose(weights(learn.model), expected, rtol=1e-5) and no_grads(learn)


# Mixed precision, on a CPU and on a GPU

gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA GPU')]
on_each = pytest.mark.parametrize('amp', [
    pytest.param((device, mode), id=f'{device}_{mode}', marks=gpu if device == 'cuda' else [])
    for device in ('cpu', 'cuda') for mode in ('fp16', 'bf16')])

def precision(amp, init_scale=2.**4, growth_interval=1, **kwargs):
    "fastai's callback for a device and a mode; its scale doubles with each step, but for bf16 on a GPU, which needs none"
    device,mode = amp
    cls = MixedPrecision if device == 'cuda' else partial(CpuMixedPrecision, enabled=True)
    return cls(mode, init_scale=init_scale, growth_interval=growth_interval, **kwargs)

def on_device(amp, batches): return Held(tuple(o.to(amp[0]) for o in batch) for batch in batches)

class Scales(Callback):
    "Record the scale after each batch, as a power of 2"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append(math.log2(self.learn.scaler.get_scale()))

def check_scales(amp, scales, exponents):
    "One exponent a batch"
    assert scales.seen == ([0]*len(exponents) if amp == ('cuda', 'bf16') else exponents)

class Norms(Steps):
    "Record also `clip.norm`"
    def __init__(self, clip): super().__init__(); self.clip,self.norms = clip,[]
    def before_step(self): super().before_step(); self.norms.append(self.clip.norm)

@on_each
@pytest.mark.parametrize('n_acc', [8, 7])
def test_mixed_precision(n_acc, amp):
    "The scale grows once a window, and those who come later see unscaled gradients"
    batches,scales,clip = on_device(amp, batches_of(*[4]*6)),Scales(),Clip(inf)
    norms = Norms(clip)
    steps = check(learner(batches), [Acc(n_acc), precision(amp), clip, scales, norms], windows(batches, 8), tol=2e-2)
    check_scales(amp, scales, [4, 5, 5, 6, 6, 7])
    assert np.allclose(norms.norms, [g.norm().item() for g in steps.grads])

@on_each
def test_scale_does_not_matter(amp):
    batches,grads = on_device(amp, batches_of(4, 3, 5, 4, 2)),[]
    for scale in (2., 2.**6):
        steps = Steps()
        cbs = [Acc(8), precision(amp, scale, growth_interval=1000), Clip(inf), steps]
        learner(batches).fit(1, .01, cbs=cbs)
        grads.append(torch.stack(steps.grads))
    assert torch.equal(*grads)

@on_each
@pytest.mark.parametrize('bad', range(6))
@pytest.mark.parametrize('flush', [False, True])
def test_overflow_skips_its_window_alone(bad, flush, amp):
    batches,scales = on_device(amp, batches_of(*[4]*6)),Scales()
    batches[bad][0].mul_(1e30)
    learn,wins = learner(batches),windows(batches, 8)
    check(learn, [Acc(8, flush=flush), precision(amp), Clip(inf), scales], wins[:bad//2] + wins[bad//2+1:], tol=2e-2)
    exponents = np.cumsum([4, *[-1 if o == bad//2 else 1 for o in range(3)]])
    check_scales(amp, scales, np.repeat(exponents, 2)[1:-1].tolist())
    assert no_grads(learn)

@on_each
@pytest.mark.parametrize('n_acc', [8, 7])
def test_clip_in_mixed_precision(n_acc, amp):
    "Clipped is what was unscaled, once a window: 1 is left of a norm above 1"
    batches,clip = on_device(amp, batches_of(*[4]*6)),Clip(1.)
    norms = Norms(clip)
    learner(batches).fit(1, .001, cbs=[Acc(n_acc), precision(amp), clip, norms])
    assert len(norms.grads) == 3 and all(o > 1 for o in norms.norms)
    assert np.allclose([g.norm().item() for g in norms.grads], 1, rtol=1e-4)

@on_each
@pytest.mark.parametrize('empty', range(3))
def test_mixed_precision_and_a_batch_that_counts_0(empty, amp):
    batches,scales = on_device(amp, spoil(batches_of(4, 4, 4), empty, nan)),Scales()
    wins = windows(batches, 12, 2, flush=True, skip={empty})
    check(learner(batches), [Acc(12, count=finite_items, flush=True), precision(amp), scales], wins, 2, tol=2e-2)
    check_scales(amp, scales, [4, 4, 5, 5, 5, 6])

@on_each
def test_mixed_precision_and_a_flush_after_a_cancelled_batch(amp):
    batches,scales,clip = on_device(amp, batches_of(4, 4, 4)),Scales(),Clip(inf)
    cut = At('before_batch', stop(CancelBatchException()), 2, order=-20)
    wins = windows(batches, 12, 2, flush=True, skip={2})
    steps = check(learner(batches), [Acc(12, flush=True), precision(amp), clip, scales, cut], wins, 2, tol=2e-2)
    check_scales(amp, scales, [4, 4, 4, 5, 5, 5])
    assert torch.allclose(clip.norm, steps.grads[-1].norm())

@pytest.mark.parametrize('order', [1, -1], ids=['sorted', 'reversed'])
def test_given_in_any_order(order):
    steps = Steps()
    learner(batches_of(*[4]*6)).fit(1, .01, cbs=[*[Acc(8), precision(('cpu', 'bf16')), Clip()][::order], steps])
    assert len(steps.grads) == 3 and all(abs(g.norm()-1) < 1e-5 for g in steps.grads)

@contextmanager
def shown(action='default'):
    "The warnings that Python shows by default"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        yield seen

def test_names_that_the_model_has_too():
    class Named(nn.Linear): window = count = flush = n_acc = reduction = 7
    batches = batches_of(*[4]*6)
    with shown('always') as seen: check(learner(batches, Named(3, 1)), Acc(8), windows(batches, 8))
    assert not [o for o in seen if 'shadowing' in str(o.message)]


# Whoever stands beside us

def plain(loss_func=F.mse_loss): return dict(loss_func=loss_func)

class Adapter(Callback):
    "Targets that come late, by a callback of any `order`: away in `before_batch`, back in `after_pred`; shortened, too"
    def __init__(self, order): self.order = order
    def before_batch(self): self.kept,self.learn.yb = self.yb,()
    def after_pred(self): self.learn.yb,self.learn.pred = (self.kept[0][:3],),self.pred[:3]

@pytest.mark.parametrize('order', [-20, 0, 5, 7, 60, inf])
def test_targets_are_those_that_the_loss_has_seen(order):
    batches = batches_of(4, 5, 3, 4, 4, 6)
    short = [tuple(o[:3] for o in b) for b in batches]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # as many targets as inputs are the default's assumption
        check(learner(batches), [Acc(6), Adapter(order)], windows(short, 6))

class Masked(Callback):
    "As tsai's masked pretraining: the targets are the inputs, made after everybody"
    order = 60
    def before_batch(self): self.learn.yb,self.learn.xb = (self.x[:, :1],),(self.x*.5,)

def test_targets_made_by_a_callback_of_order_60():
    batches = batches_of(*[4]*12)
    wins = windows([(x*.5, x[:, :1]) for x,_ in batches], 8)
    def unlabelled(cb): cb.learn.yb = ()
    assert len(check(learner(batches), [Acc(8), Masked, At('before_batch', unlabelled, order=-30)], wins).grads) == 6

class Scaled(Callback):
    "fastai's `NonNativeMixedPrecision`, but for the half precision: it scales the loss, and the gradients back"
    def __init__(self, order, inplace, overflow=()): self.order,self.inplace,self.overflow,self.n = order,inplace,overflow,0
    def before_backward(self):
        if self.inplace: self.learn.loss_grad *= 512
        else: self.learn.loss_grad = self.loss_grad*512
    def before_step(self):
        self.n += 1
        if self.n-1 in self.overflow:
            self.model.zero_grad()
            raise CancelBatchException
        for p in self.model.parameters(): p.grad /= 512
    def after_batch(self):
        if self.training: self.learn.loss_grad /= 512

@pytest.mark.parametrize('order', [-20, 0, 5, 7, 10])
@pytest.mark.parametrize('inplace', [True, False])
@pytest.mark.parametrize('n_acc', [8, 7])
def test_loss_scaled_by_a_callback(order, inplace, n_acc):
    batches = batches_of(4, 4, 5, 3, 4, 4)
    check(learner(batches), [Acc(n_acc), Scaled(order, inplace)], windows(batches, n_acc))

def test_overflow_that_another_callback_drops():
    batches = batches_of(4, 4, 5, 3, 4, 4)
    check(learner(batches), [Acc(8), Scaled(10, True, overflow=[1])], [batches[:2], batches[4:]])

@pytest.mark.parametrize('order', [-inf, -20, 0, 5, 7, 100])
def test_before_step_is_called_once_a_window_on_the_whole_gradient(order):
    batches,seen = batches_of(4, 5, 3, 4, 4, 6),[]
    learn,wins = learner(batches),windows(batches, 8)
    backward = []
    look = At('before_step', lambda cb: seen.append(flat_grads(cb.learn.model)), order=order)
    each = At('after_backward', lambda cb: backward.append(1), order=order)
    steps = check(learn, [Acc(8), look, each], wins)
    assert len(seen) == len(wins) and len(backward) == len(batches)
    assert all(torch.equal(a, b) for a,b in zip(seen, steps.grads))

@pytest.mark.parametrize('order', [-20, 0, 100])
def test_a_gradient_set_in_before_step_is_stepped(order):
    "A clip of one's own, where the window ends with other than `n_acc` items"
    batches = batches_of(*[64]*3)
    def clip(cb): nn.utils.clip_grad_norm_(cb.learn.model.parameters(), .001)
    steps = Steps()
    learner(batches).fit(1, .001, cbs=[Acc(), At('before_step', clip, order=order), steps])
    assert [round(g.norm().item(), 6) for g in steps.grads] == [.001]*3

def test_tied_parameters_are_scaled_once():
    batches = batches_of(4, 5, 3, 4)
    model = nn.Linear(3, 1)
    learn = learner(batches, model, splitter=lambda m: [[m.weight], [m.weight, m.bias]])
    check(learn, Acc(8), windows(batches, 8), lr=0.)

@pytest.mark.parametrize('empty', [{0}, {2}, {5}, {0, 1}])
def test_a_batch_that_counts_0_leaves_no_trace(empty):
    "The Recorder's losses are those of the other batches, and `TerminateOnNaNCallback` goes on"
    batches = batched([o.clone() for o in items(24)], 4)
    for i in empty: spoil(batches, i, nan)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn,without = learner(batches),learner([b for i,b in enumerate(batches) if i not in empty])
        end = TerminateOnNaNCallback()
        end.run_valid = False # the batch to validate may be the same
        check(learn, [Acc(8, count=finite_items), end], windows(batches, 8, skip=empty, count=finite_items))
        without.fit(1, .001, cbs=Acc(8))
    assert torch.equal(torch.stack(learn.recorder.losses), torch.stack(without.recorder.losses))
    assert learn.recorder.values[0][0] == without.recorder.values[0][0]

def own_mse(pred, targ): return (pred-targ).square().sum()

@pytest.mark.parametrize('reduction, loss_func', [('sum', own_mse), ('mean', F.mse_loss), ('mean', MSELossFlat(reduction='sum'))])
def test_reduction_can_be_said(reduction, loss_func):
    batches = batches_of(4, 5, 3, 4)
    steps = Steps()
    learner(batches, loss_func=loss_func).fit(1, 0., cbs=[Acc(8, reduction=reduction), steps])
    for grad,window in zip(steps.grads, windows(batches, 8)):
        parts = [big_grad(steps.twin, loss_func, [b]) for b in window]
        if reduction == 'mean': parts = [g*len(b[0])/sum(len(b[0]) for b in window) for g,b in zip(parts, window)]
        assert torch.allclose(grad, sum(parts), rtol=1e-5)

@pytest.mark.parametrize('bad, exc', [('none', ValueError), ('', ValueError), (1, TypeError), (True, TypeError)])
def test_reduction_that_makes_no_sense(bad, exc):
    with pytest.raises(exc, match='`reduction`'): Acc(reduction=bad)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_targets_can_not_be_counted(mix):
    batches = batched((torch.randn(8, 1, 6, 6), torch.randint(3, (8,))), 4)
    learn = learner(batches, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), CrossEntropyLossFlat())
    with pytest.raises(ValueError, match=f'`{mix.__name__}`.*`count`'): learn.fit(1, cbs=[mix, Acc(8, count=unmasked)])

def ours_said(seen): return [str(o.message) for o in seen if '`GradientAccumulation`' in str(o.message) or '`n_acc`' in str(o.message)]

def concat_loss(pred, targ): return pred.square().mean()*targ.float().mean()

def test_a_default_that_is_wrong_says_so_once():
    boxes = lambda k: [dict(boxes=torch.randn(k, 4)) for _ in range(4)]
    def dict_loss(pred, targ): return pred.square().mean()
    x = torch.randn(4, 3)
    for ys,loss_func in (([boxes(3), boxes(4)], dict_loss), ([torch.ones(9), torch.ones(7)], concat_loss),
                         ([torch.ones(4, 7), torch.ones(4, 5)], concat_loss)):
        learn = learner(batches_of(4, 4), loss_func=loss_func)
        def put(cb):
            if cb.training: cb.learn.yb = (ys[cb.iter],)
        for count,n in ((find_bs, 1), (lambda yb: 4, 0)):
            with shown() as seen: learn.fit(1, 0., cbs=[Acc(8, count=count), At('after_pred', put)])
            about = [o for o in seen if '`count`' in str(o.message)]
            assert [o.filename for o in about] == [__file__]*n, (ys, ours_said(seen))

@pytest.mark.parametrize('place', ['fit', 'learner'])
def test_a_fit_without_a_step_says_so_once(place):
    cbs,batches = [Acc(100)],batches_of(*[4]*3)
    learn = learner(batches, cbs=cbs if place == 'learner' else [])
    for _ in range(2):
        with shown() as seen: learn.fit(2, cbs=cbs if place == 'fit' else [])
        assert len(ours_said(seen)) == 1 and all(o in ours_said(seen)[0] for o in ('24', '100', '`n_acc`', '`flush=True`'))
        assert __file__ == [o for o in seen if '`n_acc`' in str(o.message)][0].filename
    with shown() as seen:
        learn.fit(0, cbs=cbs if place == 'fit' else [])
        learner(batches).fit(2, cbs=Acc(24))
        learner(batches).fit(1, cbs=Acc(100, flush=True))
    assert not ours_said(seen)

def found(learn, **kwargs):
    "What `lr_find` recorded"
    learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None, stop_div=False, **kwargs)
    return np.stack([learn.recorder.lrs, torch.stack(learn.recorder.losses)])

def test_the_learning_rate_finder_goes_by_windows(tmp_path):
    "It finds the rates of the big batch, with as many points"
    data = items(96)
    small = learner(batched(data, 4), cbs=Acc(24), path=tmp_path)
    big = learner(batched(data, 24), path=tmp_path)
    start = weights(small.model)
    a,b = found(small),found(big)
    assert a.shape == b.shape == (2, 20) and np.allclose(a, b, rtol=1e-4)
    assert torch.equal(weights(small.model), start)
    check(small, [], windows(batched(data, 4), 24))

class Two(nn.Module):
    "Two models, of which one is trained at a time, as fastai's `GANModule`"
    def __init__(self): super().__init__(); self.a,self.b,self.on = nn.Linear(3, 1),nn.Linear(3, 1),False
    def forward(self, x): return (self.b if self.on else self.a)(x)

class Side(Callback):
    "As `GANTrainer` with `FixedGANSwitcher(n, n)`"
    def __init__(self, n): self.n,self.i = n,0
    def before_fit(self): self.switch(False)
    def switch(self, on):
        self.gen_mode = self.model.on = on
        for m,rg in ((self.model.a, not on), (self.model.b, on)): m.requires_grad_(rg)
    def after_batch(self):
        self.i += 1
        if self.training and not self.i % self.n: self.switch(not self.gen_mode)

@pytest.mark.parametrize('n, ok', [(2, True), (4, True), (1, False), (3, False)])
def test_two_models_in_turn(n, ok):
    batches = batches_of(*[4]*8)
    learn,steps = learner(batches, Two()),Steps()
    if not ok:
        with pytest.raises(RuntimeError, match='FixedGANSwitcher'): learn.fit(1, cbs=[Acc(8), Side(n), steps])
        return
    learn.fit(1, 0., cbs=[Acc(8), Side(n), steps])
    assert [bool(g[:4].any()) for g in steps.grads] == ([True, False]*2 if n == 2 else [True, True, False, False])

@pytest.mark.parametrize('n_acc', [1, 3, 5, 7, 7.3])
def test_a_window_of_one_batch_is_bit_for_bit_the_plain_step(n_acc):
    batches = batches_of(11, 9, 13, 10, 8)
    learn,without = learner(batches),learner(batches)
    learn.fit(2, .01, cbs=Acc(n_acc))
    without.fit(2, .01)
    assert torch.equal(weights(learn.model), weights(without.model))

@pytest.mark.parametrize('order', [-20, 0, 5, 7, 100])
@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException])
def test_a_cancel_in_after_step_does_not_hide_the_step(order, exc):
    batches = batches_of(*[4]*6)
    learn,steps = learner(batches),Steps()
    learn.fit(2, .001, cbs=[Acc(8), At('after_step', stop(exc()), 3, 0, order=order), steps])
    assert_big(steps, windows(batches, 8)[:3 if exc is CancelBatchException else 2] + windows(batches, 8), learn.loss_func)

# Other backward passes

def own_pass(cb):
    if not cb.training: return
    cb.learn.loss_grad.backward(create_graph=True)
    raise CancelBackwardException

@pytest.mark.parametrize('order', [-20, 5, 7, 100])
@pytest.mark.parametrize('sizes', [[4]*6, [4, 5, 3, 4, 4, 6]])
@pytest.mark.filterwarnings('ignore:Using backward')
def test_a_backward_pass_of_another_callback_in_place_of_fastais(order, sizes):
    batches = batches_of(*sizes)
    check(learner(batches), [Acc(8), At('before_backward', own_pass, order=order)], windows(batches, 8))

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward', 'after_backward'])
@pytest.mark.parametrize('order', [-20, 7])
@pytest.mark.parametrize('sizes', [[4]*6, [4, 5, 3, 4, 4, 6]])
def test_one_more_backward_pass(event, order, sizes):
    "An auxiliary loss is weighted as the loss is; where that can't be known any more, it is refused"
    batches = batches_of(*sizes)
    def aux(cb):
        if cb.training: F.l1_loss(cb.learn.model(cb.learn.xb[0]), batches[cb.iter][1]).backward()
    def both(pred, targ): return F.mse_loss(pred, targ)+F.l1_loss(pred, targ)
    def fit(): check(learner(batches, loss_func=F.mse_loss), [Acc(8), At(event, aux, order=order)], windows(batches, 8), loss_func=both)
    if len(set(sizes)) == 1 or event.endswith('backward'): return fit()
    with pytest.raises(RuntimeError, match='`GradientAccumulation`'): fit()

@pytest.mark.parametrize('other', [Acc, fastai_training.GradientAccumulation])
def test_two_accumulations_are_refused(other):
    with pytest.raises(ValueError, match='one `GradientAccumulation`'): learner(batches_of(4, 4), cbs=Acc(8)).fit(1, cbs=other(8))

def test_idioms_of_fastais_notebooks():
    "Events without an optimizer, and targets that are a tensor"
    with learner(batches_of(4, 4), cbs=Acc(8)) as learn: learn('before_train')
    batches = batches_of(4, 4, 5, 3)
    def bare(cb): cb.learn.yb = cb.learn.yb[0]
    def loss_func(pred, *targ): return F.mse_loss(pred, torch.stack(targ) if len(targ) > 1 else targ[0])
    with shown() as seen: check(learner(batches, loss_func=loss_func), [Acc(8), At('before_batch', bare)], windows(batches, 8))
    assert not ours_said(seen)

def test_a_copy_made_in_a_fit_is_in_none():
    batches,kept = batches_of(*[4]*6),[]
    def keep(cb): kept.append(copy(cb.learn.gradient_accumulation))
    learn = learner(batches)
    learn.fit(1, cbs=[Acc(8), At('after_batch', keep, 2)])
    check(learner(batches), kept[0], windows(batches, 8))

@pytest.mark.parametrize('it', range(6))
def test_a_window_that_goes_on_in_another_process(it):
    "What `ResumeFit` keeps after batch `it` is all that the window is"
    batches,kept,steps = batches_of(4, 5, 3, 4, 4, 6),[],Steps()
    learn = learner(batches)
    def keep(cb): kept.append((pickle.dumps(cb.learn.gradient_accumulation.state_dict()), weights(cb.learn.model)))
    check(learn, [Acc(11), At('after_batch', keep, it, order=100)], windows(batches, 11))
    (state,at),again = kept[0],learner(batches[it+1:] or batches)
    vector_to_parameters(at, again.model.parameters())
    load = At('before_train', lambda cb: cb.learn.gradient_accumulation.load_state_dict(pickle.loads(state)), ep=0, order=50)
    again.fit(1, .001, cbs=[Acc(11), load, steps])
    ends = np.cumsum([len(o) for o in windows(batches, 11)])
    done = sum(ends <= it+1)
    if it < 5: assert len(steps.grads) == len(ends)-done
    wins = windows(batches, 11)[done:]
    if it < 5: assert all((g-big_grad(steps.twin, learn.loss_func, w, at)).norm() < 1e-5*g.norm()
                          for g,at,w in zip(steps.grads, steps.weights, wins))

def test_a_batch_trained_by_hand_is_a_plain_step():
    batches,ends = batches_of(4),[]
    for cbs in ([Acc(8)], []):
        learn = learner(batches, cbs=cbs)
        learn.create_opt()
        learn.remove_cb(Recorder)
        learn.training,learn.n_iter,learn.train_iter,learn.pct_train = True,1,0,0.
        learn.one_batch(0, batches[0])
        ends.append(weights(learn.model))
    assert torch.equal(*ends)
