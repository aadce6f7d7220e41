"Microbatches against the whole batch: random models, losses, sizes, limits and moments at which memory runs out"
import gc, pickle, subprocess, sys
from collections import namedtuple
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from pathlib import Path
from textwrap import dedent
from weakref import WeakSet

import pytest
from hypothesis import assume, example, given, strategies as st

from common import *
from fastcb_training.bnfreeze import BnFreeze
from fastcb_training.microbatch import MicroBatch, _tensors
from torch.utils.checkpoint import checkpoint


@pytest.fixture(scope='module', autouse=True)
def quick_collection():
    "Each failed try collects garbage, for which all that is imported need not be looked through"
    gc.freeze()
    yield
    gc.unfreeze()


class Limit(nn.Module):
    "Memory for `n` items in the forward or only in the backward pass, from its `since`-th pass on"
    def __init__(self, n, where, since=0):
        super().__init__()
        self.n,self.where,self.left,self.failed,self.alive,self.seen_alive = n,where,since,0,WeakSet(),0
    def check(self, x):
        self.left -= 1
        if self.left >= 0 or len(x) <= self.n: return
        self.failed += 1
        self.seen_alive = max(self.seen_alive, len(self.alive))
        big = torch.empty(1) # what a try that failed has computed
        self.alive.add(big)
        raise [torch.OutOfMemoryError('no'), RuntimeError("DefaultCPUAllocator: can't allocate memory")][self.failed%2]
    def forward(self, x):
        if self.where == 'forward': self.check(x)
        elif x.requires_grad: x.register_hook(self.check)
        return x


def model(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), *layers, nn.Tanh(), nn.Linear(6, 1))

def rmse(pred, targ): return F.mse_loss(pred, targ).sqrt()
def contrastive(pred, targ): return F.cross_entropy(pred@pred.T, torch.arange(len(pred))) + F.mse_loss(pred, targ)
def total(pred, targ): return F.mse_loss(pred, targ, reduction='sum')/30
def by_rank(pred, targ): return F.mse_loss(pred.sort(0).values, targ.sort(0).values)
losses = dict(mean=MSELossFlat(), sum=total, rmse=rmse, contrastive=contrastive, rank=by_rank)

def fitted(m, cbs, loss=MSELossFlat(), n=40, bs=16, extra=(), n_epoch=2, lr=.05):
    learn = linear_learner(regression(n, bs, n_valid=24), m, loss, cbs=cbs)
    probe = Probe()
    torch.manual_seed(3)
    learn.fit(n_epoch, lr, cbs=[probe, *extra])
    return learn,probe

def state(learn): return {k: o.tolist() for k,o in learn.model.state_dict().items()}
def assert_close(a, b, tol=2e-6):
    for k,o in a.model.state_dict().items(): assert torch.allclose(o.double(), b.model.state_dict()[k].double(), rtol=tol*10, atol=tol), k
    assert np.allclose(a.recorder.values, b.recorder.values, rtol=1e-5, atol=1e-6)
    assert np.allclose(a.recorder.losses, b.recorder.losses, rtol=1e-5, atol=1e-6)


def spectral():
    torch.manual_seed(1)
    return nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))

layers = dict(none=lambda: [], layernorm=lambda: [nn.LayerNorm(6)], frozen=lambda: [nn.BatchNorm1d(6).eval()],
              spectral=lambda: [spectral()])

@examples(30)
@given(st.sampled_from([*layers]), st.sampled_from([*losses]), st.none() | st.integers(1, 20), st.integers(1, 20),
       st.sampled_from(['forward', 'backward']), st.integers(0, 12), st.sampled_from([16, 12, 40]), st.booleans())
@example('none', 'contrastive', None, 1, 'backward', 0, 16, True)
def test_it_is_the_whole_batch(kind, loss, size, limit, where, since, bs, mixup):
    "Weights, losses and rows, whatever the loss, the size, the limit, and the moment at which memory runs out"
    extra = (lambda: [MixUp()]) if mixup and loss == 'mean' else lambda: []
    extra_ = (lambda: [*extra(), BnFreeze(only_frozen=False)]) if kind == 'frozen' else extra
    whole,probe = fitted(model(*layers[kind]()), [], losses[loss], bs=bs, extra=extra_())
    ours,probe_ = fitted(model(*layers[kind](), memory := Limit(limit, where, since)), cb := MicroBatch(size), losses[loss], bs=bs,
                         extra=extra_())
    for (k,a),(k_,b) in zip(whole.model.state_dict().items(), ours.model.state_dict().items()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (k, (a-b).abs().max())
    assert np.allclose(whole.recorder.values, ours.recorder.values, rtol=1e-4, atol=1e-5)
    assert probe_.events == probe.events and items(probe_.xs) == items(probe.xs)
    assert memory.failed <= 6 and (cb.size is None or cb.size <= max(limit, size or 0))

@examples(20)
@given(st.integers(4, 15), st.sampled_from([16, 13]), st.integers(0, 8))
def test_a_size_that_was_found_is_the_size_known_beforehand(limit, bs, since):
    "Bit for bit, with layers that draw and layers that count, if the forward pass ran out, at whatever batch"
    def net(limit): return model(nn.BatchNorm1d(6), nn.Dropout(.3), Limit(limit, 'forward'))
    def at(size): return At('before_batch', lambda cb: setattr(cb.learn.micro_batch, 'size', size), it=since%3, ep=since//3, order=-5)
    def shrink(cb): cb.learn.model[3].n = limit
    found,probe = fitted(net(100), cb := MicroBatch(), bs=bs, n=3*bs, extra=[At('before_batch', shrink, it=since%3, ep=since//3, order=-5)])
    drawn = torch.rand(3)
    known,probe_ = fitted(net(100), MicroBatch(), bs=bs, n=3*bs, extra=[at(cb.size)])
    assert torch.equal(drawn, torch.rand(3))
    assert state(found) == state(known) and found.recorder.values == known.recorder.values
    assert [o.tolist() for o in probe.grads] == [o.tolist() for o in probe_.grads] and probe.losses == probe_.losses

@pytest.mark.parametrize('drop', [nn.Dropout(.4), nn.AlphaDropout(.4), nn.RReLU()], ids=repr)
def test_halves_of_the_backward_pass_have_what_was_drawn(drop):
    first,_ = fitted(model(drop, Limit(3, 'backward')), MicroBatch(), n=16, n_epoch=1)
    alone,_ = fitted(model(drop), [], n=16, n_epoch=1)
    assert torch.allclose(weights(first.model), weights(alone.model), rtol=1e-4, atol=1e-6)

@examples(30)
@given(st.integers(2, 9), st.sampled_from([.1, .5, 1., None]), st.integers(4, 17), st.booleans())
def test_statistics_are_those_of_the_whole_batch(size, momentum, bs, images):
    "They move once, with mean and unbiased variance of all items"
    def net():
        torch.manual_seed(0)
        norm = (nn.BatchNorm2d(3, momentum=momentum) if images else nn.BatchNorm1d(3, momentum=momentum))
        shape = [nn.Unflatten(1, (3, 1, 1)), nn.Upsample((2, 2)), norm, nn.Flatten(), nn.Linear(12, 1)]
        return nn.Sequential(*shape) if images else nn.Sequential(norm, nn.Linear(3, 1))
    assume(bs//-(-bs//size) > 1) # a batchnorm layer wants two items
    whole,_ = fitted(net(), [], bs=bs, n=bs*3, lr=0.)
    ours,_ = fitted(net(), MicroBatch(size), bs=bs, n=bs*3, lr=0.)
    for a,b in zip(whole.model.buffers(), ours.model.buffers()): assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)

def test_a_batchnorm_layer_called_twice_counts_twice():
    norm = nn.BatchNorm1d(3)
    learn,_ = fitted(nn.Sequential(norm, norm, nn.Linear(3, 1)), MicroBatch(8), n=32, n_epoch=1)
    assert norm.num_batches_tracked == 4

def test_instancenorm_and_other_buffers():
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('n', tensor(0)); self.register_buffer('new', tensor(0.))
        def forward(self, x):
            if self.training: self.n += 1; self.new = self.new+1
            return x
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), Counts(), nn.Linear(3, 1))
    assert_close(fitted(net(), [])[0], fitted(net(), MicroBatch(5))[0])


# Moments

@pytest.mark.parametrize('size', [None, 4])
@pytest.mark.parametrize('f', [
    lambda cb: torch.autograd.grad(cb.learn.loss_grad, [*cb.model.parameters()], retain_graph=True),
    lambda cb: cb.model.eval(), lambda cb: None,
    lambda cb: cb.model(cb.x[:2])], ids=['second backward pass', 'eval', 'nothing', 'another forward pass'])
def test_what_others_do_between_the_passes(f, size):
    "It is that without microbatches, with dropout as whole as the generator allows"
    def then(cb):
        if cb.training: f(cb)
    def back(cb): cb.model.train(cb.training)
    def fit(cbs): return fitted(model(nn.Dropout(.3)), cbs, extra=[At('after_loss', then), At('after_step', back)])[0]
    a,b,c = fit([]),fit(MicroBatch(size)),fit(MicroBatch(size))
    assert state(b) == state(c)
    assert_close(a, b)

def penalty(cb):
    if not cb.training: return
    wanted = [cb.x, *cb.model.parameters()]
    grads = torch.autograd.grad(cb.learn.loss_grad, wanted, create_graph=True)
    cb.learn.loss_grad = cb.learn.loss_grad + .05*sum(o.pow(2).sum() for o in grads)

@pytest.mark.parametrize('size', [None, 5])
def test_second_derivatives_and_gradients_of_inputs(size):
    def wants(cb): cb.learn.xb = (cb.x.clone().requires_grad_(),)
    def fit(cbs): return fitted(model(nn.Dropout(.2)), cbs, extra=[At('before_batch', wants), At('after_loss', penalty)], n_epoch=1)[0]
    assert_close(fit([]), fit(MicroBatch(size)))

@pytest.mark.parametrize('size', [None, 4])
def test_hooks_see_the_whole_gradient_once(size):
    seen = []
    def net():
        m = model()
        m[0].weight.register_hook(lambda g: g*.5)
        m[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(1))
        m.register_full_backward_hook(lambda m, gi, go: seen.append(len(go[0])))
        return m
    a,b = fitted(net(), [])[0],fitted(net(), MicroBatch(size))[0]
    assert_close(a, b)
    assert seen[:len(seen)//2] == seen[len(seen)//2:]

def test_a_model_that_changes_its_input_in_place():
    class Doubles(nn.Module):
        def forward(self, x): return x.mul_(2)
    a,b = [fitted(nn.Sequential(Doubles(), *model(), *o), cbs)[0] for o,cbs in (([], []), ([Limit(3, 'forward')], MicroBatch()))]
    assert_close(a, b)

def test_parameters_that_are_unused_frozen_or_thawed():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a,self.unused,self.frozen = nn.Linear(3, 1),nn.Linear(3, 1),nn.Linear(3, 1).requires_grad_(False)
        def forward(self, x): return self.a(x)+self.frozen(x)
    def thaw(cb): cb.model.frozen.requires_grad_(True)
    a,b = [fitted(Some(), cbs, extra=[At('before_batch', thaw, it=1, ep=0)])[0] for cbs in ([], MicroBatch(5))]
    assert_close(a, b)
    assert b.model.unused.weight.grad is None

def test_an_input_changed_in_place_between_the_passes_is_an_error():
    def change(cb):
        if cb.training: cb.x.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        fitted(model(), MicroBatch(4), extra=[At('after_loss', change)])

@pytest.mark.parametrize('size', [None, 4])
def test_compiled_and_scripted_models(size):
    def in_place():
        m = model()
        m.compile(backend='eager')
        return m
    for f in in_place, lambda: torch.compile(model(), backend='eager'), lambda: torch.jit.script(model()):
        assert_close(fitted(f(), [])[0], fitted(f(), MicroBatch(size))[0])

@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_mixed_precision(mode):
    "The weights' copies that autocast keeps must not be those without a graph"
    a,b,c = [fitted(model(), cbs, extra=[CpuMixedPrecision(amp_mode=mode, init_scale=1024.)], lr=.01)[0]
             for cbs in ([], MicroBatch(4), MicroBatch())]
    assert state(a) == state(c)
    assert torch.allclose(weights(a.model), weights(b.model), rtol=.03, atol=.01)

def test_predictions_outside_of_a_fit():
    learn = linear_learner(model=model(memory := Limit(5, 'forward')))
    twin = linear_learner(model=model())
    preds,_ = learn.get_preds(cbs=(cb := MicroBatch()))
    assert torch.allclose(preds, twin.get_preds()[0], atol=1e-6) and cb.size == 4
    assert 'forward' not in vars(learn.model)


# Gradients that arrive as they come

class TwoLayers(nn.Module):
    "Memory may run out in the backward pass of the first layer, when the gradients of the second have arrived"
    def __init__(self, limit, where='backward', since=0):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.limit = nn.Linear(3, 6),nn.Linear(6, 1),Limit(limit, where, since)
    def forward(self, x): return self.b(self.limit(self.a(x)).tanh())

@pytest.mark.parametrize('n_acc', [1, 40])
@pytest.mark.parametrize('size, since', [(None, 0), (None, 2), (12, 0), (12, 1), (12, 2), (12, 3)])
def test_no_gradient_arrives_twice(n_acc, size, since):
    whole,_ = fitted(TwoLayers(inf), GradientAccumulation(n_acc))
    ours,_ = fitted(memory := TwoLayers(3, since=since), [MicroBatch(size), GradientAccumulation(n_acc)])
    assert memory.limit.failed
    assert_close(whole, ours)

@pytest.mark.parametrize('since, cbs', [(0, []), (3, [GradientAccumulation(64)])])
def test_what_has_arrived_goes_with_an_item_that_does_not_fit(since, cbs):
    learn = linear_learner(model=TwoLayers(0, since=since), cbs=[MicroBatch(), *cbs])
    with pytest.raises(torch.OutOfMemoryError, match='One item alone'): learn.fit(1)
    assert no_grads(learn)
    assert since or all(p.grad is None for p in learn.model.parameters())

@pytest.mark.parametrize('limit, size', [(inf, None), (inf, 5), (3, None)])
def test_a_loss_that_looks_at_the_weights(limit, size):
    def fit(cbs, limit=inf):
        learn = linear_learner(regression(40, 16, n_valid=24), TwoLayers(limit), cbs=cbs)
        learn.loss_func = lambda pred, targ: F.mse_loss(pred, targ) + .1*weights_of(learn).abs().sum()
        learn.fit(2, .05)
        return learn
    def weights_of(learn): return torch.cat([p.flatten() for p in learn.model.parameters()])
    assert_close(fit([]), fit(MicroBatch(size), limit))

@pytest.mark.parametrize('hook', ['register_hook', 'register_post_accumulate_grad_hook'])
@pytest.mark.parametrize('size', [None, 4])
def test_no_hook_is_called_for_an_unused_parameter(hook, size):
    seen = []
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a,self.unused = nn.Linear(3, 1),nn.Linear(3, 1)
            for p in self.parameters(): getattr(p, hook)(lambda o: seen.append(o.sum()))
        def forward(self, x): return self.a(x)
    a,n = fitted(Some(), [])[0],len(seen)
    b,_ = fitted(Some(), MicroBatch(size))
    assert_close(a, b)
    assert len(seen) == 2*n and b.model.unused.weight.grad is None
    assert all(p._backward_hooks or p._post_accumulate_grad_hooks for p in b.model.parameters())

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3, 3),nn.Linear(3, 3),nn.Linear(3, 1); self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x).tanh()).tanh())

class OneGradient(nn.Module):
    "Autograd gives the same tensor to both parameters"
    def __init__(self): super().__init__(); self.a,self.b = nn.Parameter(torch.zeros(1)),nn.Parameter(torch.zeros(1))
    def forward(self, x): return (self.a+self.b).expand(len(x), 1)

class Sparse(nn.Module):
    def __init__(self): super().__init__(); self.e = nn.Embedding(7, 1, sparse=True)
    def forward(self, x): return self.e((x[:, 0].abs()*3).long().clamp(max=6))

class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.r,self.l = nn.LSTM(3, 4, batch_first=True),nn.Linear(4, 1)
    def forward(self, x): return self.l(self.r(x[:, None].repeat(1, 3, 1))[0][:, -1])

class Checkpoint(nn.Module):
    def __init__(self, reentrant): super().__init__(); self.a,self.b,self.reentrant = nn.Sequential(nn.Linear(3, 6), nn.Dropout(.3)),nn.Linear(6, 1),reentrant
    def forward(self, x): return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))

@pytest.mark.parametrize('size', [None, 1, 4, 7, 100])
@pytest.mark.parametrize('net', [Tied, OneGradient, Sparse, Recurrent, partial(Checkpoint, False), partial(nn.DataParallel, nn.Linear(3, 1))])
def test_models_of_many_kinds(net, size):
    def fit(cbs):
        def opt(params, lr, **kwargs): return OptimWrapper(params, torch.optim.SGD, lr=lr)
        torch.manual_seed(0)
        learn = linear_learner(regression(40, 16, n_valid=24), deepcopy(net()), cbs=cbs, opt_func=opt)
        learn.fit(2, .05)
        return learn
    assert_close(fit([]), fit(MicroBatch(size)))

@dataclass(frozen=True)
class Frozen: pred:object; more:object=None
Named = namedtuple('Named', 'pred more')
outputs = dict(dataclass=lambda o: Frozen(o, [o*2]), namedtuple=lambda o: Named(o, o*2), dict=lambda o: dict(a=o, b=dict(c=[o*2], d=None)),
               list=lambda o: [o, o*2], tuple=lambda o: (o, 'x', o*2), image=TensorImage)

@pytest.mark.parametrize('kind', outputs)
@pytest.mark.parametrize('size', [None, 1, 5, 100])
def test_outputs_of_many_kinds(kind, size):
    kinds = []
    class Net(nn.Linear):
        def forward(self, x): return outputs[kind](super().forward(x))
    def loss(pred, targ):
        kinds.append(type(pred))
        return sum(F.mse_loss(o.as_subclass(Tensor), targ) for o in _tensors(pred))
    def fit(cbs):
        torch.manual_seed(0)
        learn = linear_learner(regression(40, 16, n_valid=24), Net(3, 1), loss, cbs=cbs)
        learn.fit(1, .02)
        return learn
    assert_close(fit([]), fit(MicroBatch(size)))
    assert len(set(kinds)) == 1

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step'])
def test_memory_that_runs_out_elsewhere_is_the_error_it_was(event):
    learn = linear_learner(model=model(), cbs=(cb := MicroBatch()))
    with pytest.raises(torch.OutOfMemoryError, match='elsewhere'): learn.fit(1, cbs=At(event, stop(torch.OutOfMemoryError('elsewhere'))))
    assert cb.size is None and 'forward' not in vars(learn.model)
    learn.fit(1)

@pytest.mark.parametrize('size', [None, 4])
def test_what_else_a_learner_does(size):
    def fit(cbs):
        learn = linear_learner(frozen_data(), model(nn.Dropout(.2)), cbs=cbs)
        learn.fit(1, .01)
        return learn
    whole,ours = fit([]),fit(MicroBatch(size))
    for kwargs in dict(with_loss=True), dict(with_decoded=True), dict(ds_idx=0, with_input=True), dict(act=torch.sigmoid):
        for a,b in zip(_tensors(whole.get_preds(**kwargs)), _tensors(ours.get_preds(**kwargs)), strict=True): assert torch.allclose(a, b, atol=1e-5)
    assert_close(whole, ours)
    for o in whole,ours:
        torch.manual_seed(0)
        o.lr_find(show_plot=False)
    assert np.allclose(whole.recorder.losses, ours.recorder.losses, rtol=1e-4)


# Errors, copies

@pytest.mark.parametrize('where', ['forward', 'backward'])
@pytest.mark.parametrize('size', [None, 4])
def test_one_item_that_does_not_fit(where, size):
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('n', tensor(0))
        def forward(self, x): self.n += 1; return x
    learn = linear_learner(model=model(Counts(), nn.Dropout(.3), Limit(0, where)), cbs=(cb := MicroBatch(size)))
    before,drawn = state(learn),[]
    def draw(cb): drawn.append(torch.get_rng_state())
    with pytest.raises(torch.OutOfMemoryError, match='One item alone') as e: learn.fit(1, cbs=At('before_batch', draw))
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert state(learn) == before and cb.size == size and 'forward' not in vars(learn.model) and no_grads(learn)
    assert e.value.__cause__ is not None

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step'])
@pytest.mark.parametrize('exc', [ValueError('x'), KeyboardInterrupt(), CancelBatchException(), CancelFitException()], ids=repr)
def test_the_model_is_as_it_was_after_each_fault(event, exc):
    learn = linear_learner(model=model(nn.BatchNorm1d(6)), cbs=MicroBatch(4))
    for order in (-10, inf):
        with suppress(ValueError, KeyboardInterrupt): learn.fit(1, cbs=At(event, stop(exc), it=1, order=order))
        assert 'forward' not in vars(learn.model) and learn.model[1].momentum == .1 and not learn.model[1]._forward_hooks

def test_an_error_in_a_microbatch_leaves_no_trace():
    class Breaks(nn.Module):
        n = 0
        def forward(self, x):
            self.n += 1
            if self.n == 3: raise ZeroDivisionError
            return x
    learn = linear_learner(model=model(nn.BatchNorm1d(6), Breaks()), cbs=MicroBatch(4))
    before = state(learn)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert state(learn) == before and learn.model[1].momentum == .1 and not learn.model[1]._forward_hooks

def test_what_a_failed_try_holds_is_free_before_the_next():
    fitted(model(memory := Limit(2, 'forward')), MicroBatch())
    assert memory.failed == 3 and memory.seen_alive == 0

def test_branches_of_a_failed_backward_pass_are_free_before_the_next():
    "Autograd has them ready beside the one that failed, and the whole graph behind them"
    alive,seen,limit = WeakSet(),[],Limit(2, 'backward')
    class Linked: pass
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.saved = Linked()
            alive.add(ctx.saved)
            return x.clone()
        @staticmethod
        def backward(ctx, g): return g
    class Branches(nn.Module):
        def __init__(self): super().__init__(); self.left,self.right = nn.Linear(6, 6),nn.Linear(6, 6)
        def forward(self, x):
            seen.append(len(alive))
            x = Keep.apply(x)
            return self.left(x)+limit(self.right(x))
    fitted(model(Branches()), MicroBatch(), n=16, n_epoch=1)
    assert limit.failed == 3 and max(seen) == 0

@pytest.mark.parametrize('size', [None, 5])
def test_lazy_layers_begin_in_the_first_batch(size):
    def net(): return nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    def fit(cbs): return fitted(net(), cbs, lr=0., n_epoch=1)[0]
    for a,b in zip(fit([]).model[0].buffers(), fit(MicroBatch(size)).model[0].buffers()): assert torch.allclose(a, b, atol=1e-6)

def test_a_batch_is_free_when_it_is_over():
    "No cycle keeps it until the garbage collector comes"
    batches,gc_on = WeakSet(),gc.isenabled()
    gc.disable()
    def note(cb):
        if cb.training: batches.add(cb.learn.pred.grad_fn.batch)
        assert len(batches) <= 2
    try: fitted(model(), MicroBatch(4), extra=[At('after_pred', note)])
    finally:
        if gc_on: gc.enable()

def test_the_size_goes_with_a_fit_that_goes_on():
    (a := MicroBatch()).size = 4
    (b := MicroBatch()).load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
    assert b.size == 4
    learn,_ = fitted(model(memory := Limit(4, 'forward')), b)
    assert memory.failed == 0

def test_it_is_said_once(capsys):
    fitted(model(Limit(5, 'forward')), MicroBatch())
    assert capsys.readouterr().out == 'Memory ran out: batches of 16 items go through the model 4 at a time.\n'


# Real memory

def test_in_a_process_with_a_limit_a_batch_trains_that_does_not_fit():
    code = '''
        import resource, sys
        from common import *
        from fastcb_training.microbatch import MicroBatch
        torch.set_num_threads(1)
        def net(): return nn.Sequential(nn.Linear(3, 20_000), nn.Tanh(), nn.Linear(20_000, 1))
        def learner(cbs): return linear_learner(regression(1024, 512, n_valid=8), net(), cbs=cbs)
        learner(None).fit(1, 1e-5, cbs=At('before_batch', lambda cb: setattr(cb.learn, 'xb', (cb.x[:8],)) or setattr(cb.learn, 'yb', (cb.y[:8],))))
        used = int(open('/proc/self/statm').read().split()[0])*4096
        for more in 100,70: # the first runs out in the backward pass, the second in the forward pass
            resource.setrlimit(resource.RLIMIT_AS, (used+more*1_000_000, -1))
            try: learner(None).fit(1, 1e-5)
            except RuntimeError as e: assert "can't allocate memory" in str(e)
            else: raise AssertionError('it fits')
            learn = learner(cb := MicroBatch())
            learn.fit(1, 1e-5)
            print(cb.size, len(learn.recorder.losses))
    '''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', dedent(code)], cwd=Path(__file__).parent, text=True, capture_output=True,
                          env=os.environ|{'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}) # what is freed is given back
    assert done.returncode == 0, done.stderr[-2000:]
    said = 'Memory ran out: batches of 512 items go through the model 256 at a time.'
    assert done.stdout.splitlines() == [said, '256 2']*2 # what a failed try held is there for the next: half is enough

def test_the_peak_is_that_of_small_batches():
    "The most memory in a process each, beyond what tiny batches take: that of batches of `size`, with no copy of the gradients"
    code = '''
        import resource
        from common import *
        from fastcb_training.microbatch import MicroBatch
        torch.set_num_threads(1)
        def most(bs, cbs):
            if pid := os.fork(): return os.waitpid(pid, 0)
            net = nn.Sequential(nn.Linear(3, 20_000), nn.Tanh(), nn.Linear(20_000, 1))
            learn = linear_learner(regression(1024, bs, n_valid=8), net, cbs=cbs)
            learn.fit(1, 1e-5, cbs=ShortEpochCallback(n_batches=2))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
            os._exit(0)
        for bs,cbs in (8, []), (128, []), (512, []), (32, MicroBatch(8)), (512, MicroBatch(128)): most(bs, cbs)
    '''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', dedent(code)], cwd=Path(__file__).parent, text=True, capture_output=True,
                          env=os.environ|{'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}) # what is freed is given back
    assert done.returncode == 0, done.stderr[-2000:]
    idle,small,whole,idle_ours,ours = [int(o)/1000 for o in done.stdout.split()] # MB
    assert whole-idle > 3.5*(small-idle) > 50
    assert ours-idle_ours < 1.05*(small-idle), done.stdout

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA GPU')
def test_on_a_gpu_the_size_that_was_found_is_the_size_known_beforehand():
    "400 MB, where a batch of 2048 saves 135 MB in each of four layers: the forward pass runs out"
    def fit(cb):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2**14), nn.Tanh(), nn.Dropout(.3), nn.GELU(), nn.Linear(2**14, 1)).cuda()
        learn = linear_learner(regression(4096, 2048, n_valid=8).cuda(), net, cbs=cb)
        torch.manual_seed(3)
        learn.fit(1, 1e-5)
        return learn
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(400e6/torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError): fit(None)
        gc.collect()
        found = fit(cb := MicroBatch())
        assert cb.size in (1024, 512, 256)
        known = fit(MicroBatch(cb.size))
        assert state(found) == state(known) and found.recorder.losses == known.recorder.losses
    finally: torch.cuda.set_per_process_memory_fraction(1.)
