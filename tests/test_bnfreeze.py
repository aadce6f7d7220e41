"What the page of `BnFreeze` cannot show: every kind of layer, random models, meddlers, interrupts, copies"
import inspect, pickle, warnings
from collections import Counter
from contextlib import contextmanager, suppress
from copy import deepcopy
from math import inf

import pytest
from hypothesis import given, strategies as st
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from common import *
from fastai.distributed import ParallelTrainer
from fastcb_training.bnfreeze import BnFreeze, bn_types, frozen_bn, set_bn_eval
from fastcb_training.accumulation import GradientAccumulation
from fastcb_training.clip import GradientClip
from fastcb_training.shortepoch import ShortEpochCallback


class Own(nn.BatchNorm1d): "A batchnorm layer that somebody derived"
class Squared(nn.Module):
    def forward(self, x): return x*x


class Chain(nn.Module):
    "The layers of any container, one after the other"
    def __init__(self, layers):
        super().__init__()
        self.layers,self.scale = layers,nn.Parameter(torch.ones(1))
    def forward(self, x):
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers: x = layer(x)
        return x*self.scale


def net(frozen=True):
    "A body, frozen or not, and a head that trains; `0.1` and `1.1` are batchnorm"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return nn.Sequential(body.requires_grad_(not frozen), head)


def learner(model=None, cbs=None, train_bn=False, **kwargs):
    return linear_learner(model=net() if model is None else model, cbs=cbs, train_bn=train_bn, **kwargs)


def body_and_head(m): return [params(m[0]), params(m[1])]
def split_learner(cbs=None, **kwargs):
    "Nothing is frozen yet: `freeze` and `fine_tune` do that"
    return learner(net(frozen=False), cbs, splitter=body_and_head, **kwargs)


def frozen_learner(cbs=None, **kwargs):
    learn = split_learner(cbs, **kwargs)
    learn.freeze()
    return learn


def freeze(m):
    "`m`, frozen; `requires_grad_` refuses lazy parameters"
    for p in m.parameters(): p.requires_grad = False
    return m


def tracked(m): return {n for n,l in batchnorms(m) if l.track_running_stats}
def moved(before, m): return {n for n,o in stats(m).items() if o != before[n]}
def found(m): return {n for n,_ in frozen_bn(m)}


def rule(m):
    "The names of the frozen layers, by walking down: the nearest module with parameters has none that can be trained"
    names,seen = set(),set()
    def walk(l, path, name):
        if l is None or l in seen: return
        seen.add(l)
        path = [l]+path
        if isinstance(l, _BatchNorm) and l.track_running_stats:
            own = next((ps for ps in (list(o.parameters()) for o in path) if ps), [])
            if not any(p.requires_grad for p in own): names.add('.'.join(name))
        for n,child in l._modules.items(): walk(child, path, name+[n])
    walk(m, [], [])
    return names


# What counts, and what is set

lazy = [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d]
kinds = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, Own, *lazy]


@pytest.mark.parametrize('momentum', [.1, None])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('kind', kinds)
def test_every_kind_is_found_set_and_set_back(kind, affine, momentum):
    layer = kind(*[] if kind in lazy else [3], affine=affine, momentum=momentum)
    m = freeze(nn.Sequential(nn.Sequential(nn.Identity(), layer)))
    x = torch.randn(4, 3, *[2]*dict(zip(kinds[1:3]+lazy[1:], [2, 3, 2, 3])).get(kind, 0))
    assert isinstance(layer, bn_types)
    for _ in range(2): # a lazy one doesn't know its size the first time
        assert frozen_bn(m) == [('0.1', layer)]
        set_bn_eval(m)
        assert modes(m) == {'': True, '0': True, '0.0': True, '0.1': False}
        m(x)
        assert layer.num_batches_tracked == 0 and not layer.running_mean.any() and (layer.running_var == 1).all()
    set_bn_eval(m, use_eval=False)
    before = stats(m)
    m(x)
    assert all(modes(m).values()) and moved(before, m) == {'0.1'}
    set_bn_eval(m.requires_grad_(True))
    assert (found(m) == set()) == affine and layer.training == affine


@pytest.mark.parametrize('layer', [
    nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.Dropout()], ids=lambda o: type(o).__name__)
def test_what_keeps_no_batch_statistics_is_left_alone(layer):
    m = nn.Sequential(layer, nn.Linear(3, 3)).requires_grad_(False)
    for kwargs in ({}, {'only_frozen': False}): set_bn_eval(m, **kwargs)
    assert layer.training and not len(frozen_bn(m))
    m.eval()
    set_bn_eval(m, False, only_frozen=False)
    assert not layer.training


@pytest.mark.parametrize('weight,bias', [(False, False), (False, True), (True, False), (True, True)])
def test_a_layer_is_frozen_if_none_of_its_parameters_can_be_trained(weight, bias):
    m = net()
    m[0][1].weight.requires_grad_(weight)
    m[0][1].bias.requires_grad_(bias)
    assert found(m) == (set() if weight or bias else {'0.1'})
    before,learn = stats(m),learner(m, BnFreeze())
    learn.fit(1)
    assert moved(before, m) == ({'0.1', '1.1'} if weight or bias else {'1.1'})


Seq,bare = nn.Sequential,partial(nn.BatchNorm1d, 3, affine=False)
def linear(train=True): return nn.Linear(3, 3).requires_grad_(train)
shared = linear(False)
@pytest.mark.parametrize('m,names', [
    (bare(), {''}), (Seq(nn.ReLU(), bare()), {'1'}), (Seq(linear(False), bare()), {'1'}),
    (Seq(linear(), bare()), set()), (Seq(Seq(Seq(bare())), linear(False)), {'0.0.0'}),
    (Seq(Seq(linear(False), Seq(bare())), linear()), {'0.1.0'}),
    (Seq(Seq(linear(), Seq(bare())), linear(False)), set()),
    (Seq(shared, Seq(shared, bare()), linear()), {'1.1'}),
    (Seq(Seq(nn.BatchNorm1d(3).requires_grad_(False), bare()), bare(), linear()), {'0.0', '0.1'})])
def test_a_layer_without_parameters_goes_with_the_nearest_module_that_has_some(m, names):
    assert found(m) == rule(m) == names
    set_bn_eval(m)
    assert {n for n,mode in modes(m).items() if not mode} == names


def test_only_frozen_false_takes_all_and_sets_them_back():
    m = nn.Sequential(net(frozen=False), nn.Sequential(bare(), nn.Dropout()))
    set_bn_eval(m, only_frozen=False)
    assert {n for n,mode in modes(m).items() if not mode} == {'0.0.1', '0.1.1', '1.0'}
    set_bn_eval(m, False)
    assert not m[0][0][1].training
    set_bn_eval(m, False, only_frozen=False)
    assert all(modes(m).values())


@st.composite
def models(draw, size=3):
    "Layers nested in each other at random, some of them in several places, their parameters frozen at random"
    pool = []
    def layer(depth):
        kind = draw(st.sampled_from(['bn', 'bn', 'linear', 'relu', 'again']+['seq', 'list', 'dict']*(depth > 0)))
        if kind == 'again' and pool: return draw(st.sampled_from(pool))
        if kind == 'linear': m = nn.Linear(size, size)
        elif kind == 'bn':
            cls = draw(st.sampled_from([nn.BatchNorm1d, nn.SyncBatchNorm, Own, nn.LazyBatchNorm1d]))
            m = cls(*[] if cls in lazy else [size], affine=draw(st.booleans()),
                    momentum=draw(st.sampled_from([.1, None])), track_running_stats=draw(st.integers(0, 3)) > 0)
        elif kind in ('seq', 'list', 'dict'):
            inner = [layer(depth-1) for _ in range(draw(st.integers(0, 4)))]
            if kind == 'seq': m = nn.Sequential(*inner)
            elif kind == 'list': m = Chain(nn.ModuleList(inner))
            else: m = Chain(nn.ModuleDict({str(i): o for i,o in enumerate(inner)}))
        else: m = nn.ReLU()
        for p in m.parameters(recurse=False): p.requires_grad = draw(st.booleans())
        if all(o.affine for _,o in batchnorms(m)): pool.append(m) # its place would matter otherwise
        return m
    return nn.Sequential(*[layer(3) for _ in range(draw(st.integers(1, 4)))])


@examples(80)
@given(models(), st.randoms(use_true_random=False), st.booleans())
def test_random_models_are_set_by_the_rule_and_nothing_else_is(m, random, only_frozen):
    layers = rule(m) if only_frozen else tracked(m)
    assert found(m) == rule(m)
    set_bn_eval(m, only_frozen=only_frozen)
    assert modes(m) == {n: n not in layers for n in modes(m)}
    set_bn_eval(m, use_eval=False, only_frozen=only_frozen)
    assert all(modes(m).values())
    for l in m.modules(): l.training = random.random() < .5
    for use_eval in (True, False):
        before = modes(m)
        set_bn_eval(m, use_eval, only_frozen=only_frozen)
        assert modes(m) == {n: not use_eval if n in layers else mode for n,mode in before.items()}


@examples(25)
@given(models(), st.booleans(), st.sampled_from([-20, 0, 1e9]))
def test_random_models_are_held_by_the_rule_in_a_fit(m, only_frozen, order):
    m = nn.Sequential(m, nn.Linear(3, 1))
    m.eval()(torch.randn(2, 3)) # lazy ones learn their size
    m.train()
    before,meddler = stats(m),At('after_batch', lambda cb: m.train(), order=order)
    learner(m, [BnFreeze(only_frozen=only_frozen), meddler]).fit(2, 1e-3)
    assert moved(before, m) == (tracked(m)-rule(m) if only_frozen else set())


# In a fit

places = dict(
    itself=lambda bn: bn, deep=lambda bn: nn.Sequential(nn.Sequential(nn.Sequential(bn))),
    module_list=lambda bn: Chain(nn.ModuleList([bn])), module_dict=lambda bn: Chain(nn.ModuleDict({'a': bn})),
    two_parents=lambda bn: nn.Sequential(nn.Sequential(bn), nn.Sequential(bn)), data_parallel=nn.DataParallel,
    parametrized=lambda bn: parametrize.register_parametrization(bn, 'weight', Squared()),
    compiled=lambda bn: torch.compile(nn.Sequential(bn), backend='eager'))
def compiled_in_place(m):
    m.compile(backend='eager')
    return m
wholes = dict(data_parallel=nn.DataParallel, compiled=partial(torch.compile, backend='eager'),
              in_place=compiled_in_place)
where = [*[(o, 'model') for o in places], *[(o, w) for o in ('deep', 'two_parents') for w in wholes]]


@pytest.mark.parametrize('place,whole', where)
def test_wherever_the_layer_is(place, whole):
    for cbs,held in (([], False), ([BnFreeze()], True)):
        torch.manual_seed(0)
        body = places[place](nn.BatchNorm1d(3)).requires_grad_(False)
        m = wholes.get(whole, noop)(nn.Sequential(body, nn.Linear(3, 1)))
        before,learn = stats(m),learner(m, cbs)
        w = weights(m).clone()
        assert len(before) == len(found(m)) == 1 and found(m) == set(before)
        learn.fit(2, .1)
        assert (not moved(before, m)) == held and not torch.equal(w, weights(m)) and not any(modes(m).values())


@pytest.mark.parametrize('kind', [nn.BatchNorm1d, nn.SyncBatchNorm, Own, nn.LazyBatchNorm1d])
@pytest.mark.parametrize('affine', [True, False])
def test_kinds_in_a_fit(kind, affine):
    "A lazy one learns its size in the first batch, and nothing else"
    layer = kind(*[] if kind in lazy else [3], affine=affine)
    m = nn.Sequential(freeze(nn.Sequential(nn.Linear(3, 3), layer)), nn.Linear(3, 1))
    learner(m, BnFreeze()).fit(2)
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any() and (layer.running_var == 1).all()


def test_the_model_is_the_layer():
    m = nn.BatchNorm1d(3)
    before,w = stats(m),weights(m).clone()
    learner(m, BnFreeze(only_frozen=False), loss_func=lambda p,t: (p-t).pow(2).mean()).fit(2)
    assert not moved(before, m) and not torch.equal(w, weights(m))


def test_no_statistics_are_no_obstacle():
    bn,ran = nn.BatchNorm1d(3, track_running_stats=False).requires_grad_(False),[]
    m = nn.Sequential(linear(False), bn, nn.Linear(3, 1))
    learner(m, [BnFreeze(), At('after_pred', lambda cb: ran.append((bn.training, m.training)))]).fit(1)
    assert all(a == b for a,b in ran) and len(ran) == 12


fits = dict(
    several=lambda l,**kw: [l.fit(n, **kw) for n in (1, 2, 1)],
    one_cycle=lambda l,**kw: [l.fit_one_cycle(n, .1, **kw) for n in (2, 1)],
    flat_cos=lambda l,**kw: l.fit_flat_cos(2, .1, **kw), sgdr=lambda l,**kw: l.fit_sgdr(1, 2, **kw),
    start_epoch=lambda l,**kw: l.fit(3, start_epoch=1, **kw),
    looked_at=lambda l,**kw: [l.fit(1, **kw), l.validate(), l.get_preds(), l.fit(1, **kw)])
@pytest.mark.parametrize('given', ['to the Learner', 'to fit', 'as a class'])
@pytest.mark.parametrize('name', fits)
def test_held_to_the_last_bit_while_the_head_learns(name, given):
    bn = BnFreeze if given == 'as a class' else BnFreeze()
    for cbs,names in ((None, {'0.1', '1.1'}), (bn, {'1.1'})):
        learn = frozen_learner(cbs if given == 'to the Learner' else None)
        before,w = stats(learn.model),weights(learn.model[1]).clone()
        fits[name](learn, **({} if given == 'to the Learner' else {'cbs': cbs}))
        assert moved(before, learn.model) == names and not torch.equal(w, weights(learn.model[1]))


def test_fine_tune_holds_while_frozen_and_trains_after():
    learn = split_learner(BnFreeze())
    before,phases = stats(learn.model),[]
    learn.add_cb(At('after_fit', lambda cb: phases.append(moved(before, learn.model))))
    learn.fine_tune(2, freeze_epochs=2)
    assert phases == [{'1.1'}, {'0.1', '1.1'}]


def test_lr_find_holds(tmp_path):
    learn,seen = frozen_learner(BnFreeze(), path=tmp_path),set()
    before = stats(learn.model)
    learn.add_cb(At('after_pred', lambda cb: seen.update(moved(before, learn.model))))
    learn.lr_find(num_it=12, show_plot=False)
    assert seen == {'1.1'} and not moved(before, learn.model)


def test_two_heads_serve_on_each_others_body():
    "The use that it is for: the bodies stay equal, so it does not matter which one serves a head"
    x,learns = torch.randn(8, 3),[]
    for seed in (1, 2):
        m = net()
        nn.init.normal_(m[1][0].weight, generator=torch.Generator().manual_seed(seed))
        learns.append(learner(m, BnFreeze(), dls=regression(seed=seed)))
        learns[-1].fit_one_cycle(2, .1)
    a,b = (l.model.eval() for l in learns)
    assert all(torch.equal(p, q) for p,q in zip(a[0].state_dict().values(), b[0].state_dict().values()))
    assert torch.equal(a(x), a[1](b[0](x))) and not torch.equal(a(x), b(x))


def test_only_frozen_false_holds_statistics_while_affine_parameters_train():
    learn = learner(net(frozen=False), BnFreeze(only_frozen=False))
    before,affine = stats(learn.model),[p.clone() for i in (0, 1) for p in learn.model[i][1].parameters()]
    learn.fit(2, .1)
    after = [p for i in (0, 1) for p in learn.model[i][1].parameters()]
    assert not moved(before, learn.model) and not any(torch.equal(p, q) for p,q in zip(affine, after))


def test_the_layers_are_looked_for_at_each_epoch():
    learn,phases = learner(net(frozen=False), BnFreeze()),[]
    def freeze_second(cb): learn.model[0].requires_grad_(cb.epoch != 1)
    def look(cb): phases.append(stats(learn.model))
    learn.fit(3, cbs=[At('before_epoch', freeze_second), At('before_epoch', look), At('after_fit', look)])
    trained = [{n for n in a if a[n] != b[n]} for a,b in zip(phases, phases[1:])]
    assert trained == [{'0.1', '1.1'}, {'1.1'}, {'0.1', '1.1'}]


def test_a_batch_costs_a_look():
    "The layers are looked for, and their modes are set, as often for many batches as for few"
    def calls(n, cbs):
        calls,m = Counter(),net()
        def counted(f, name): return lambda *args,**kwargs: calls.update([name]) or f(*args, **kwargs)
        m.named_modules,m[0][1].train = counted(m.named_modules, 'search'),counted(m[0][1].train, 'mode')
        learner(m, cbs, dls=regression(n)).fit(2)
        return calls
    few,many = (calls(n, BnFreeze())-calls(n, None) for n in (64, 320))
    assert few == many


# Others meddle

events = [o for o in Callback._methods if o != 'after_create' and 'cancel' not in o]


@pytest.mark.parametrize('order', [-20, 10**9, inf])
@pytest.mark.parametrize('event', events)
def test_model_train_and_eval_change_nothing(event, order):
    for mode in (True, False):
        meddler = Callback(**{event: lambda cb: cb.learn.model.train(mode)})
        meddler.order = order
        learn = frozen_learner([meddler, BnFreeze()])
        before,w = stats(learn.model),weights(learn.model[1]).clone()
        learn.fit(2)
        assert '0.1' not in moved(before, learn.model) and not torch.equal(w, weights(learn.model[1]))
        if mode: assert '1.1' in moved(before, learn.model)


def predict_and_go_on(cb, inner):
    "Predict in the middle, as a callback may; `get_preds` fires events itself"
    learn,event,cb.event = cb.learn,cb.event,None
    learn.get_preds(inner=inner)
    learn.model.train()
    cb.event = event


@pytest.mark.parametrize('training', [True, False], ids=['training', 'as get_preds leaves it'])
@pytest.mark.parametrize('inner', [True, False])
@pytest.mark.parametrize('event', ['before_epoch', 'before_batch', 'after_batch', 'after_train', 'after_epoch'])
def test_predictions_in_the_fit_change_nothing(event, inner, training):
    def predict(cb):
        predict_and_go_on(cb, inner)
        if training: cb.learn.training = True
    learn = frozen_learner(BnFreeze())
    before = stats(learn.model)
    learn.fit(2, cbs=At(event, predict, it=3 if 'batch' in event else None, order=100))
    assert moved(before, learn.model) == {'1.1'} and not learn.bn_freeze._in_fit


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'before_step', 'after_batch',
                                   'after_train', 'after_epoch'])
def test_a_callback_that_runs_the_model_itself_changes_nothing(event):
    "As adversarial training, sharpness-aware steps and consistency losses do"
    def run(cb): cb.learn.model(torch.randn(4, 3))
    learn = frozen_learner([At(event, run), BnFreeze()])
    before = stats(learn.model)
    learn.fit(2)
    assert moved(before, learn.model) == {'1.1'}


@pytest.mark.parametrize('event,it', [('before_batch', 0), ('after_backward', 5), ('after_train', None),
                                      ('before_validate', None), ('after_epoch', None)])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), ValueError('oh'), CancelFitException()], ids=repr)
def test_an_interrupt_leaves_the_statistics_and_the_next_fit_holds_them(exc, event, it):
    for to_fit in (True, False):
        learn,bn = frozen_learner(),BnFreeze()
        before = stats(learn.model)
        if not to_fit: learn.add_cb(bn)
        with suppress(type(exc)): learn.fit(2, cbs=[At(event, stop(exc), it, ep=0)]+[bn]*to_fit)
        assert moved(before, learn.model) <= {'1.1'}
        learn.fit(1, cbs=[bn]*to_fit)
        assert moved(before, learn.model) == {'1.1'} and not any(modes(learn.model).values())
        if not to_fit: learn.remove_cb(bn)
        learn.fit(1)
        assert moved(before, learn.model) == {'0.1', '1.1'}


others = dict(
    mixup=MixUp, clip=GradientClip, accumulation=partial(GradientAccumulation, 48), channels=ChannelsLast,
    short=partial(ShortEpochCallback, .5), early=partial(EarlyStoppingCallback, patience=1), plateau=ReduceLROnPlateau,
    saver=SaveModelCallback, parallel=partial(ParallelTrainer, []), second=partial(BnFreeze, only_frozen=False))
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('name', others)
def test_with_the_other_callbacks(name, first, tmp_path):
    learn = frozen_learner(path=tmp_path)
    before,w = stats(learn.model),weights(learn.model[1]).clone()
    learn.fit_one_cycle(3, .01, cbs=[BnFreeze(), others[name]()][::1 if first else -1])
    assert moved(before, learn.model) == (set() if name == 'second' else {'1.1'})
    assert not torch.equal(w, weights(learn.model[1]))


# What is left behind

class NormEval(nn.Sequential):
    "A model that keeps its first batchnorm layer in eval mode by itself"
    def train(self, mode=True):
        super().train(mode)
        self[0][1].eval()
        return self


def stopped(event, exc, **kwargs): return lambda: [At(event, stop(exc), **kwargs)]
def body_eval(cb): cb.learn.model[0].eval()
fit_cancelled = stopped('after_batch', CancelFitException(), it=2)
interrupted = stopped('before_backward', KeyboardInterrupt(), it=2)
endings = dict(
    whole=lambda: [], batch_cancelled=stopped('before_batch', CancelBatchException(), it=2),
    train_cancelled=stopped('after_batch', CancelTrainException(), it=2),
    train_not_begun=stopped('before_train', CancelTrainException(), order=-20),
    valid_cancelled=stopped('before_validate', CancelValidException(), order=-20),
    epoch_cancelled=stopped('after_batch', CancelEpochException(), it=2),
    epoch_not_begun=stopped('before_epoch', CancelEpochException(), order=100),
    fit_not_begun=stopped('before_fit', CancelFitException()), fit_cancelled=fit_cancelled, interrupted=interrupted,
    fit_cancelled_late=stopped('before_epoch', CancelFitException(), ep=1),
    fit_cancelled_in_validation=stopped('after_validate', CancelFitException()),
    error=stopped('after_batch', ValueError('oh'), it=2),
    interrupted_in_validation=stopped('after_validate', KeyboardInterrupt()),
    train_at_end=lambda: [At('after_fit', lambda cb: cb.learn.model.train())],
    train_after_epoch=lambda: [At('after_epoch', lambda cb: cb.learn.model.train())],
    eval_and_cancelled=lambda: [At('after_batch', lambda cb: cb.learn.model.eval(), it=2), *fit_cancelled()],
    body_eval=lambda: [At('before_train', body_eval), *fit_cancelled()],
    body_eval_late=lambda: [At('before_batch', body_eval), *interrupted()],
    train_in_validation=lambda: [At('before_validate', lambda cb: cb.learn.model.train())],
    predicted_early=lambda: [At('after_batch', partial(predict_and_go_on, inner=True), it=0), *fit_cancelled()],
    predicted=lambda: [At('after_batch', partial(predict_and_go_on, inner=True), it=2), *fit_cancelled()])
@pytest.mark.parametrize('model', [net, lambda: NormEval(*net())], ids=['net', 'norm_eval'])
@pytest.mark.parametrize('ending', endings)
def test_the_modes_are_those_that_fastai_leaves(ending, model):
    def left(*cbs):
        learn = learner(model())
        with suppress(ValueError, KeyboardInterrupt): learn.fit(2, cbs=[*cbs, *endings[ending]()])
        return modes(learn.model)
    assert left(BnFreeze()) == left()


def test_a_model_that_is_the_layer_gets_its_mode_back():
    for exc in (CancelFitException(), KeyboardInterrupt()):
        learn = learner(nn.BatchNorm1d(3), loss_func=lambda p,t: (p-t).pow(2).mean())
        with suppress(KeyboardInterrupt): learn.fit(1, cbs=[BnFreeze(only_frozen=False), At('after_batch', stop(exc))])
        assert learn.model.training


def test_parameters_keys_and_optimizer_are_the_same():
    def facts(learn):
        m,opt = learn.model,learn.opt
        return dict(keys=[*m.state_dict()], grad=[p.requires_grad for p in m.parameters()], frozen=opt.frozen_idx,
                    hypers=[dict(h) for h in opt.hypers], state=[sorted(opt.state[o[0]]) for o in opt.all_params()],
                    hooks=[[*l._forward_pre_hooks, *l._forward_hooks] for l in m.modules()],
                    objects=[id(o) for o in [*m.parameters(), *m.buffers(), *m.modules()]],
                    groups=[[id(p) for p in group] for group in opt.param_lists])
    learn,plain = frozen_learner(),frozen_learner()
    for l in (learn, plain): l.fit(1, .1)
    before,during = facts(learn),[]
    learn.fit(2, .1, cbs=[BnFreeze(), At('after_step', lambda cb: during.append(facts(learn)), order=100)])
    plain.fit(2, .1)
    assert facts(learn) == before and all(o == before for o in during) and len(during) == 20
    for name in ('keys', 'grad', 'frozen', 'hypers', 'state'): assert facts(learn)[name] == facts(plain)[name]


# The warning

@contextmanager
def shown():
    "The warnings about batchnorm that Python shows by default"
    res = []
    with warnings.catch_warnings(record=True) as ws:
        warnings.resetwarnings() # whatever pytest or its caller set
        yield res
    res += [str(w.message) for w in ws if issubclass(w.category, UserWarning) and 'BnFreeze' in str(w.message)]


def forgotten(cbs=BnFreeze, **kwargs): return frozen_learner(cbs, train_bn=True, **kwargs)
def validated(learn): learn.fit(2, cbs=At('after_epoch', partial(predict_and_go_on, inner=False)))
def interrupted_once(learn):
    with suppress(KeyboardInterrupt): learn.fit(1, cbs=At('after_batch', stop(KeyboardInterrupt())))
    learn.fit(1)
def no_batchnorm(*layers): return learner(nn.Sequential(linear(False), *layers, nn.Linear(3, 1)), BnFreeze())
def no_statistics(): return no_batchnorm(nn.BatchNorm1d(3, track_running_stats=False))
warned = dict(
    once_a_fit=(forgotten, lambda l: l.fit(3), 1),
    again_in_the_next=(forgotten, lambda l: [l.fit(1) for _ in range(3)], 3),
    as_a_class=(lambda: forgotten(None), lambda l: [l.fit(2, cbs=BnFreeze) for _ in range(2)], 2),
    fine_tune=(lambda: split_learner(BnFreeze, train_bn=True), lambda l: l.fine_tune(2, freeze_epochs=2), 1),
    with_predictions=(forgotten, validated, 1), no_fit=(forgotten, lambda l: [l.validate(), l.get_preds()], 0),
    after_an_error=(forgotten, interrupted_once, 2),
    train_bn_false=(lambda: frozen_learner(BnFreeze), lambda l: l.fit(2), 0),
    fine_tune_train_bn_false=(lambda: split_learner(BnFreeze), lambda l: l.fine_tune(2, freeze_epochs=2), 0),
    nothing_frozen=(lambda: learner(net(frozen=False), BnFreeze), lambda l: l.fit(2), 0),
    no_batchnorm=(no_batchnorm, lambda l: l.fit(2), 0), no_statistics=(no_statistics, lambda l: l.fit(2), 0),
    all_wanted=(lambda: forgotten(BnFreeze(only_frozen=False)), lambda l: l.fit(2), 0))
@pytest.mark.parametrize('case', warned)
def test_it_warns_when_batchnorm_was_forgotten_and_only_then(case):
    build,run,n = warned[case]
    with shown() as messages: run(build())
    assert len(messages) == n and all('train_bn=False' in o for o in messages)


def test_no_attribute_of_the_model_is_in_the_way():
    m = net()
    m._layers = m.layers = m.only_frozen = 1
    with warnings.catch_warnings(record=True) as ws:
        warnings.resetwarnings()
        learner(m, BnFreeze()).fit(2)
    assert not [str(w.message) for w in ws if 'shadowing' in str(w.message)]


# Events

def note(cb): cb.noted = getattr(cb, 'noted', 0)+1
def cancelled():
    "Cancel once each what can be cancelled, after everybody has seen the event"
    last = [('after_pred', CancelBatchException, 2, None), ('before_backward', CancelBackwardException, 3, None),
            ('before_step', CancelStepException, 4, None), ('before_train', CancelTrainException, None, 1),
            ('before_validate', CancelValidException, None, 2), ('after_validate', CancelEpochException, None, 3),
            ('after_validate', CancelFitException, None, 4)]
    return [At(event, stop(exc()), it, ep, order=inf) for event,exc,it,ep in last]


@pytest.mark.parametrize('event', Callback._methods)
def test_an_event_is_called_besides_its_own_work_as_often_as_in_any_callback(event):
    calls = Counter()
    def count(cb): calls[type(cb), cb.learn.training] += 1
    def meddle(cb): cb.learn.model.train(cb.learn.training)
    counters = [cls(**{event: count}) for cls in (Callback, BnFreeze)]
    learn = frozen_learner([*counters, At('after_batch', meddle), *cancelled()])
    before = stats(learn.model)
    learn.fit(5)
    for training in (True, False): assert calls[BnFreeze, training] == calls[Callback, training]
    assert moved(before, learn.model) == {'1.1'} and (calls or event == 'after_create')


def test_an_event_sees_the_layers_held():
    seen = []
    learn = frozen_learner(At('before_batch', lambda cb: cb.learn.model.train(), order=100))
    learn.fit(1, cbs=BnFreeze(before_batch=lambda cb: seen.append(cb.learn.model[0][1].training)))
    assert seen and not any(seen)


# Copies

copiers = dict(deepcopy=deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o)))
copies = []
def copy_now(cb): copies or copies.append(copiers[cb.how](cb.learn.bn_freeze))
def interrupt(cb): raise KeyboardInterrupt
all_events = dict.fromkeys(['before_fit', 'before_train', 'before_batch', 'after_batch', 'after_fit'], note)


@pytest.mark.parametrize('kwargs', [{'only_frozen': False}, all_events], ids=['all', 'events'])
@pytest.mark.parametrize('when', ['new', 'trained', 'training', 'validation', 'interrupted'])
@pytest.mark.parametrize('how', copiers)
def test_a_copy_holds_on_its_own(how, when, kwargs):
    def noted(bn, learn):
        before = stats(learn.model)
        learn.fit(2, cbs=bn)
        return getattr(bn, 'noted', 0),moved(before, learn.model),[*modes(learn.model).values()]
    copies.clear()
    learn,bn = frozen_learner(),BnFreeze(**kwargs)
    event,it = ('after_validate', None) if when == 'validation' else ('before_batch', 0)
    at = At(event, interrupt if when == 'interrupted' else copy_now, it, ep=1)
    at.how = how
    with suppress(KeyboardInterrupt):
        if when != 'new': learn.add_cb(bn).fit(2, cbs=None if when == 'trained' else at)
    copied = copies[0] if copies else copiers[how](bn)
    already,of_the_first = getattr(copied, 'noted', 0),getattr(bn, 'noted', 0)
    expected = noted(BnFreeze(**kwargs), frozen_learner())
    n,names,left = noted(copied, frozen_learner())
    assert copied.only_frozen == bn.only_frozen and names == expected[1] == ({'1.1'} if bn.only_frozen else set())
    assert n-already == expected[0] and left == expected[2] and getattr(bn, 'noted', 0) == of_the_first


xy = regression().train_ds.tensors
def x_of(i): return xy[0][i]
def y_of(i): return xy[1][i]
def export_now(cb): cb.learn.export()


@pytest.mark.parametrize('kwargs', [{}, all_events], ids=['plain', 'events'])
@pytest.mark.parametrize('when', ['new', 'trained', 'training'])
def test_export_and_load_learner(when, kwargs, tmp_path):
    dsets = Datasets(range(160), [x_of, y_of], splits=[range(128), range(128, 160)])
    dls = dsets.dataloaders(bs=16, device='cpu', num_workers=0)
    learn = frozen_learner(BnFreeze(**kwargs), path=tmp_path, dls=dls)
    if when != 'new': learn.fit(1, cbs=At('after_validate', export_now) if when == 'training' else None)
    if when != 'training': learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    assert all(torch.equal(a, b) for a,b in zip(learn.get_preds(), loaded.get_preds(dl=dls.valid)))
    loaded.dls,before = dls,stats(loaded.model)
    loaded.fit(1)
    assert moved(before, loaded.model) == {'1.1'} and loaded.bn_freeze.only_frozen
    loaded.remove_cb(BnFreeze)
    loaded.fit(1)
    assert moved(before, loaded.model) == {'0.1', '1.1'}


# The surface

def test_signatures():
    assert str(inspect.signature(BnFreeze)) == '(*, only_frozen: bool = True, **events)'
    assert str(inspect.signature(set_bn_eval)).endswith('use_eval: bool = True, *, only_frozen: bool = True) -> None')
    assert [*inspect.signature(set_bn_eval).parameters][0] == [*inspect.signature(frozen_bn).parameters][0] == 'm'
    assert BnFreeze.__doc__ and set_bn_eval(net()) is None and issubclass(BnFreeze, Callback)
    assert all(issubclass(k, bn_types) for k in [*fastai_training.bn_types, *kinds])
