"What the page of `BnFreeze` cannot show: every kind of layer and optimizer, random models, histories and moments, copies"
import inspect, pickle, warnings
from collections import Counter
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from math import inf

import pytest
from hypothesis import given, strategies as st
from torch.nn.utils import parametrizations, spectral_norm
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from common import *
from fastai.callback.all import ParamScheduler
from fastcb_training.bnfreeze import BnFreeze, bn_types, frozen_bn, set_bn_eval


def net(body=None, frozen=True):
    "A body, frozen or not, and a head that trains; `0.1` and `1.1` are batchnorm"
    torch.manual_seed(0)
    body = body or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    for p in body.parameters(): p.requires_grad = not frozen
    return nn.Sequential(body, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))

def body_and_head(m): return [params(m[0]), params(m[1])]
def learner(model=None, cbs=None, train_bn=False, splitter=body_and_head, **kwargs):
    return linear_learner(model=model or net(), cbs=cbs, train_bn=train_bn, splitter=splitter, **kwargs)

def bits(m): return {k: o.clone() for k,o in m.state_dict().items()}
def moved(before, m): return {k for k,o in bits(m).items() if not o.equal(before[k])}
def left_on(m): return [n for n,o in m.named_modules() if {'train', '__getstate__', '__deepcopy__', 'reset_running_stats'} & {*vars(o)}]

class On(Callback):
    "Do `f(learn)` at `event`, from the first one on, also where there is no epoch yet"
    def __init__(self, event, f, order=0): self.event,self.f,self.order,self.n = event,f,order,0
    def __call__(self, event):
        if event == self.event: self.n += 1; self.f(self.learn)

@contextmanager
def said():
    "The warnings of `BnFreeze`"
    res = []
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        yield res
    res += [str(w.message) for w in ws if 'BnFreeze' in str(w.message)]


# Which layers

class Own(nn.BatchNorm1d): "A batchnorm layer that somebody derived"
class Evo(nn.Module):
    "A norm with a running variance, and nothing else of batchnorm"
    def __init__(self):
        super().__init__()
        self.scale,_ = nn.Parameter(torch.ones(4)),self.register_buffer('running_var', torch.ones(4))
    def forward(self, x):
        if self.training: self.running_var.lerp_(x.detach().float().var(0), .1)
        return x/(self.running_var+1e-5).sqrt()*self.scale
class Instance(nn.InstanceNorm1d):
    "Of three places a feature, where they differ"
    def forward(self, x): return super().forward(x[:,:,None]+tensor([0., 1., 3.]))[:,:,0]
class Functional(nn.BatchNorm1d):
    "Batchnorm that extraction takes apart, as it does timm's"
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
class Output(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x)['2']
Functional.__module__ = 'timm.layers' # what is not torch's own is traced through

def seq(*layers): return nn.Sequential(nn.Linear(3, 4), *layers)
def quietly(f):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f()
def untracked(layer): layer.track_running_stats = False; return layer
def scripted(): return quietly(lambda: torch.jit.script(seq(nn.BatchNorm1d(4))))
def compiled(): return torch.compile(seq(nn.BatchNorm1d(4)), backend='eager')
held = dict(
    batchnorm=lambda: seq(nn.BatchNorm1d(4)), bare=lambda: seq(nn.BatchNorm1d(4, affine=False)),
    momentum=lambda: seq(nn.BatchNorm1d(4, momentum=None)), lazy=lambda: seq(nn.LazyBatchNorm1d()),
    own=lambda: seq(Own(4)), deep=lambda: seq(nn.Sequential(nn.Sequential(nn.BatchNorm1d(4)))), evo=lambda: seq(Evo()),
    instance=lambda: seq(Instance(4, affine=True, track_running_stats=True)), compiled=compiled, scripted=scripted,
    untracked=lambda: seq(untracked(nn.BatchNorm1d(4))), extracted=lambda: Output(create_feature_extractor(seq(Functional(4), nn.ReLU()), ['2'])),
    parametrized=lambda: seq(parametrizations.weight_norm(nn.BatchNorm1d(4).double().float(), dim=None)),
    data_parallel=lambda: nn.DataParallel(seq(nn.BatchNorm1d(4))))

class Heedless(Evo):
    def forward(self, x):
        self.running_var = self.running_var.lerp(x.detach().float().var(0), .1) # another tensor each time
        return x*self.scale
class Counting(nn.Module):
    def __init__(self): super().__init__(); self.register_buffer('n', tensor(0))
    def forward(self, x):
        if self.training: self.n += len(x)
        return x
put_back = dict(
    heedless=lambda: seq(Heedless()), counting=lambda: seq(Counting()), spectral=lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4))),
    traced=lambda: quietly(lambda: torch.jit.trace(seq(nn.BatchNorm1d(4)), torch.randn(4, 3))),
    fx=lambda: torch.fx.symbolic_trace(seq(Functional(4))),
    untracked_instance=lambda: seq(untracked(Instance(4, track_running_stats=True))))

@pytest.mark.parametrize('all_layers', [False, True])
@pytest.mark.parametrize('kind', [*held, *put_back])
def test_every_kind_of_layer_keeps_every_tensor(kind, all_layers):
    "And moves without `BnFreeze`; what has to be put back is named"
    def fit(*cbs):
        body = (held | put_back)[kind]()
        if kind == 'lazy': body.eval()(torch.randn(2, 3)); body.train()
        model = net(body)
        learn,before,head = learner(model, splitter=trainable_params),bits(model[0]),bits(model[1])
        learn.fit(2, .01, cbs=[*cbs, On('after_batch', lambda learn: (learn.model.train(), learn.model(torch.randn(4, 3))))])
        assert moved(head, model[1]) and not left_on(model)
        return moved(before, model[0])
    with said() as messages: assert not fit(BnFreeze(all_layers=all_layers))
    heeds = kind in held or all_layers and kind in ('counting', 'spectral')
    assert len(messages) == (not heeds) and all('0.' in o and ('all_layers=True' in o) == (kind in ('counting', 'spectral')) for o in messages)
    assert fit() or kind == 'untracked' # that one gives something else in training

@pytest.mark.parametrize('kind', [o for o in held if o != 'lazy'])
def test_set_bn_eval_finds_them_too(kind):
    body = held[kind]()
    for p in body.parameters(): p.requires_grad = False
    layers = [o for _,o in frozen_bn(body)]
    assert len(layers) == 1
    set_bn_eval(body)
    assert not layers[0].training and body(torch.randn(4, 3)).isfinite().all()
    assert sum(not o.training for o in body.modules()) == 1 # what is inside keeps its mode
    set_bn_eval(body, use_eval=False)
    assert all(o.training for o in body.modules())

Seq,bare = nn.Sequential,partial(nn.BatchNorm1d, 3, affine=False)
def linear(train=True): return nn.Linear(3, 3).requires_grad_(train)
shared = linear(False)
@pytest.mark.parametrize('m,names', [
    (bare(), set()), (Seq(nn.ReLU(), bare()), set()), (Seq(linear(False), bare()), {'1'}),
    (Seq(linear(), bare()), set()), (Seq(Seq(Seq(bare())), linear(False)), {'0.0.0'}),
    (Seq(Seq(linear(False), Seq(bare())), linear()), {'0.1.0'}),
    (Seq(Seq(linear(), Seq(bare())), linear(False)), set()),
    (Seq(shared, Seq(shared, bare()), linear()), {'1.1'}),
    (Seq(Seq(nn.BatchNorm1d(3).requires_grad_(False), bare()), bare(), linear()), {'0.0', '0.1'})])
def test_a_layer_without_parameters_goes_with_the_nearest_module_that_has_some(m, names):
    for setter in set_bn_eval, lambda m: m.apply(set_bn_eval):
        m.train()
        setter(m)
        assert {n for n,_ in frozen_bn(m)} == names == {n for n,o in m.named_modules() if not o.training}
    m.train()
    set_bn_eval(m, only_frozen=False)
    assert {n for n,o in m.named_modules() if not o.training} == {n for n,_ in batchnorms(m)}


# Whatever happened before, and whoever runs the model

torch_adamw = partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True))
def lookahead(ps, **kwargs): return Lookahead(SGD(ps, mom=.9, **kwargs), k=3) # a fit of ten batches ends between two of its steps
optimizers = dict(
    SGD=SGD, momentum=partial(SGD, mom=.9), l2=partial(SGD, mom=.9, decouple_wd=False), RMSProp=RMSProp, Adam=Adam, RAdam=RAdam,
    QHAdam=QHAdam, Larc=Larc, LARS=partial(Larc, clip=False), Lamb=Lamb, ranger=ranger, Lookahead=lookahead, AdamW=torch_adamw)

def thawed(learn):
    learn.unfreeze()
    learn.fit(1, .01)
    learn.freeze()
    return learn
def new_learner(learn): return learner(thawed(learn).model, opt_func=learn.opt_func, wd=learn.wd, path=learn.path)
def found_rate(learn):
    learn.unfreeze()
    learn.lr_find(num_it=5, show_plot=False)
    learn.freeze()
    return learn
def fine_tuned(learn):
    learn.fine_tune(1)
    learn.freeze()
    return learn
def interrupted(learn):
    "Gradients that are not zero are left"
    learn.unfreeze()
    with suppress(KeyboardInterrupt): learn.fit(1, .01, cbs=At('after_backward', stop(KeyboardInterrupt()), it=3))
    learn.freeze()
    return learn
histories = [thawed, new_learner, found_rate, fine_tuned, interrupted]
endings = dict(plain=[], accumulation=[GradientAccumulation(40)], clip=[GradientClip(.1)], precision=[CpuMixedPrecision()])

@pytest.mark.parametrize('history', histories, ids=lambda o: o.__name__)
@pytest.mark.parametrize('opt', optimizers)
def test_frozen_parameters_stay_whatever_was_before(opt, history, tmp_path):
    learn = history(learner(net(frozen=False), opt_func=optimizers[opt], wd=.1, path=tmp_path))
    before,head = bits(learn.model[0]),bits(learn.model[1])
    learn.fit(3, .01, cbs=BnFreeze)
    assert not moved(before, learn.model[0]) and moved(head, learn.model[1])
    learn.unfreeze()
    learn.fit(1, .01, cbs=BnFreeze)
    assert moved(before, learn.model[0]) >= {'0.weight', '1.weight', '1.running_mean'} # it trains again

def test_lookahead_leaves_what_is_frozen_by_hand_between_two_of_its_steps():
    "`Learner.freeze` makes it forget its slow copies"
    model,before = net(frozen=False),[]
    def freeze(learn):
        if not learn.training or learn.iter != 3: return
        model[0].requires_grad_(False)
        before.append(bits(model[0]))
    learner(model, [BnFreeze, On('after_batch', freeze)], opt_func=lookahead).fit(1, .01)
    assert not moved(before[0], model[0])

def test_what_is_loaded_before_the_first_batch_is_what_is_held():
    body = seq(Counting())
    learn = learner(net(body), [BnFreeze(), On('before_train', lambda learn: body[1].n.fill_(7))], splitter=trainable_params)
    quietly(lambda: learn.fit(1))
    assert body[1].n == 7

def test_gradients_that_others_put_on_frozen_parameters_do_nothing():
    learn = learner(net(), opt_func=Adam, wd=.1)
    before = bits(learn.model[0])
    def fill(learn):
        for p in learn.model[0].parameters(): p.grad = torch.ones_like(p)
    learn.fit(2, .01, cbs=[BnFreeze, On('before_step', fill)])
    assert not moved(before, learn.model[0])

layer_kinds = dict(linear=partial(nn.Linear, 4, 4), bn=partial(nn.BatchNorm1d, 4), bare=partial(nn.BatchNorm1d, 4, affine=False),
                   dropout=nn.Dropout, depth=partial(StochasticDepth, .5, 'row'), spectral=lambda: spectral_norm(nn.Linear(4, 4)),
                   evo=Evo, counting=Counting, heedless=Heedless, instance=lambda: Instance(4, affine=True, track_running_stats=True))
def run(learn):
    learn.model.train()
    learn.model(torch.randn(4, 3))
def flagged(learn):
    "As some context managers do"
    for m in learn.model.modules(): m.training = True
def updated(learn): torch.optim.swa_utils.update_bn([torch.randn(4, 3)], learn.model)
events = [o for o in Callback._methods if o != 'after_create' and 'cancel' not in o]
# what resets statistics between a forward pass and its backward pass breaks the graph of layers that train
meddlers = st.one_of(st.tuples(st.sampled_from([run, flagged]), st.sampled_from(events)),
                     st.tuples(st.just(updated), st.sampled_from([o for o in events if o not in ('after_pred', 'after_loss', 'before_backward')])))

@examples(40)
@given(kinds=st.lists(st.sampled_from([*layer_kinds]), max_size=4), nest=st.booleans(), opt=st.sampled_from([*optimizers]), all_layers=st.booleans(),
       history=st.sampled_from([noop, thawed, new_learner, interrupted]), ending=st.sampled_from([*endings]), meddle=meddlers,
       when=st.one_of(st.none(), st.tuples(st.sampled_from(events), st.integers(0, 9))), order=st.sampled_from([-20, 0, 100]))
def test_random_models_optimizers_histories_and_moments(kinds, nest, opt, all_layers, history, ending, meddle, when, order):
    "Every tensor of the body is what it was when it was frozen, before the fit or in it"
    if meddle[1] in ('before_fit', 'before_epoch', 'before_train') and not when: # put back is what moves in a batch
        kinds = [o for o in kinds if o != 'heedless' and (all_layers or o not in ('spectral', 'counting'))]
    torch.manual_seed(0)
    layers = [layer_kinds[o]() for o in kinds]
    body = nn.Sequential(nn.Linear(3, 4), *([nn.Sequential(*layers)] if nest else layers))
    learn = history(learner(net(body, frozen=False), opt_func=optimizers[opt], wd=.1))
    before = []
    def freeze(learn):
        learn.freeze()
        before.append(bits(learn.model[0]))
    class FreezeAt(On):
        def __call__(self, event):
            if not before and event == self.event and getattr(self.learn, 'iter', 0) >= when[1]*(event in batch_events): self.f(self.learn)
    batch_events = {'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch'}
    if when: learn.unfreeze()
    else: freeze(learn)
    cbs = [BnFreeze(all_layers=all_layers), *deepcopy(endings[ending]), FreezeAt(when[0], freeze, order)] if when else [BnFreeze(all_layers=all_layers), *deepcopy(endings[ending])]
    if not when: cbs.append(On(meddle[1], meddle[0], order))
    quietly(lambda: learn.fit(2, .01, cbs=cbs))
    assert not moved(before[0], learn.model[0]) and not left_on(learn.model)

def test_it_follows_what_is_frozen_from_batch_to_batch():
    "A layer is frozen for three batches, trained for three, and so on; its statistics count the batches in which it trains"
    model = net(frozen=False)
    counts = []
    def switch(learn):
        if not learn.training: return
        counts.append(model[0][1].num_batches_tracked.item())
        model[0].requires_grad_(learn.iter % 6 >= 2)
    learner(model, [BnFreeze(), At('after_batch', lambda cb: switch(cb.learn))]).fit(1)
    assert counts == [1, 1, 1, 2, 3, 4, 5, 5, 5, 6]

@pytest.mark.parametrize('kind', ['counting', 'heedless', 'traced'])
def test_what_moves_is_put_back_at_each_step(kind):
    "Not only at the end"
    body,seen = put_back[kind](),[]
    before = bits(body)
    probe = At('after_step', lambda cb: seen.append(moved(before, body)))
    quietly(lambda: learner(net(body), [BnFreeze(), probe], splitter=trainable_params).fit(1))
    assert seen == [set()]*10

@pytest.mark.parametrize('kwargs', [{}, dict(all_layers=True)], ids=str)
def test_nothing_is_changed_where_nothing_is_frozen(kwargs):
    def left(*cbs):
        learn,probe = learner(net(frozen=False), opt_func=ranger, wd=.1),Probe()
        learn.fit_one_cycle(2, .1, cbs=[*cbs, probe])
        return {**left_by(learn, probe), 'bits': bits(learn.model)}
    ours,plain = left(BnFreeze(**kwargs)),left()
    assert all(torch.equal(a, b) for a,b in zip(ours.pop('bits').values(), plain.pop('bits').values()))
    assert_same(ours, plain)


# all_layers, part

def test_all_layers_holds_the_modules_in_which_nothing_trains():
    body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Dropout())
    model = net(body)
    body[2][1].requires_grad_(True) # a part that mixes
    def modes(learn): seen.append({n for n,o in learn.model.named_modules() if not o.training})
    seen,train_dropout = [],lambda learn: [o.train() for o in learn.model.modules() if isinstance(o, nn.Dropout)]
    learner(model, [BnFreeze(all_layers=True), On('before_batch', train_dropout, 100), On('after_pred', modes)]).fit(1)
    assert seen[0] == {'0.0', '0.2.0'} # the dropout goes with the body, which trains a batchnorm layer
    body.requires_grad_(False)
    seen.clear()
    learner(model, [BnFreeze(all_layers=True), On('before_batch', train_dropout, 100), On('after_pred', modes)]).fit(1)
    assert seen[0] == {n for n,_ in model.named_modules() if n.startswith('0')}

wrappers = dict(none=noop, compiled=partial(torch.compile, backend='eager'), parallel=nn.DataParallel,
                both=lambda m: nn.DataParallel(torch.compile(m, backend='eager')))
@pytest.mark.parametrize('wrapper', wrappers)
def test_part_gets_the_model_inside_of_wrappers(wrapper):
    model = net(frozen=False)
    before = bits(model)
    learn = learner(wrappers[wrapper](model), splitter=trainable_params)
    learn.fit(1, .1, cbs=BnFreeze(part=lambda m: m[0], only_frozen=False))
    after = moved(before, model)
    assert {o for o in after if 'running' in o or 'num' in o} == {'1.1.running_mean', '1.1.running_var', '1.1.num_batches_tracked'}
    assert '0.0.weight' in after and '0.1.weight' in after

def test_compiled_models_are_not_compiled_again():
    "There is one graph for training and one for validation"
    def n_graphs(): return torch._dynamo.utils.counters['stats']['unique_graphs']
    torch._dynamo.reset()
    n,learn = n_graphs(),learner(torch.compile(net(), backend='eager'), splitter=trainable_params)
    for kwargs in ({}, {}, dict(all_layers=True)): learn.fit(2, cbs=[BnFreeze(**kwargs)])
    assert n_graphs() == n+2


# Nests, ends, copies

def test_two_learners_and_two_callbacks_hold_one_body():
    "Each in the other's fit, in each order of ending"
    body = net()[0]
    inner = learner(net(body))
    outer = learner(net(body), [BnFreeze(), BnFreeze(all_layers=True)])
    before = bits(body)
    def nested(cb):
        inner.fit(1, .1, cbs=BnFreeze)
        run(cb.learn)
    outer.fit(2, .1, cbs=At('after_batch', nested, it=2))
    assert not moved(before, body) and not left_on(outer.model)

def meant(*cbs, end):
    "The modes that a fit leaves, which ends like this"
    learn = learner(net())
    with suppress(KeyboardInterrupt, ValueError): learn.fit(2, cbs=[*cbs, *end()])
    return modes(learn.model),left_on(learn.model)
ends = dict(
    whole=lambda: [], error=lambda: [At('after_batch', stop(ValueError('oh')), it=2)], before_fit=lambda: [On('before_fit', lambda learn: 1/0)],
    interrupted=lambda: [At('before_backward', stop(KeyboardInterrupt()), it=2)], cancelled=lambda: [At('after_batch', stop(CancelFitException()), it=2)],
    eval_body=lambda: [On('before_batch', lambda learn: learn.model[0].eval()), At('after_batch', stop(KeyboardInterrupt()), it=2)],
    late=lambda: [On('after_fit', lambda learn: learn.model.train())])
@pytest.mark.parametrize('end', ends)
def test_the_modes_are_those_that_fastai_leaves(end):
    def left(*cbs):
        learn = learner(net())
        with suppress(KeyboardInterrupt, ValueError, ZeroDivisionError): learn.fit(2, cbs=[*cbs, *ends[end]()])
        return modes(learn.model),left_on(learn.model)
    assert left(BnFreeze(all_layers=True)) == left(BnFreeze()) == left()
    assert not left()[1]

class Stubborn(nn.Sequential):
    "A body with a `train` of its own; and one more on the instance"
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self
def test_a_train_of_ones_own_is_kept():
    body = Stubborn(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    body[2].train = own = lambda mode=True: body[2]
    for all_layers in False, True:
        learner(net(body), BnFreeze(all_layers=all_layers)).fit(1)
        assert body[2].train is own and 'train' not in vars(body)
    body.train()
    assert body.training and not body[1].training

def pickled(o): return pickle.loads(pickle.dumps(o))
def shallow(m): return nn.Sequential(*[copy(o) for o in m.modules() if not len([*o.children()])])
@pytest.mark.parametrize('kind', ['batchnorm', 'bare', 'evo', 'compiled', 'extracted', 'parametrized'])
@pytest.mark.parametrize('how', [copy, deepcopy, pickled, shallow, torch.optim.swa_utils.AveragedModel])
def test_copies_of_held_modules_are_free(how, kind):
    if (how, kind) in [(pickled, 'parametrized'), (shallow, 'extracted'), (shallow, 'parametrized')]: return # PyTorch refuses, or they don't run
    model,copies = net(held[kind]()),[]
    def take(cb): copies.append(how(cb.learn.model))
    learner(model, [BnFreeze(all_layers=True), At('before_batch', take, it=3, ep=0)], splitter=trainable_params).fit(1)
    if how is copy: return # it shares its layers
    [o] = copies
    assert not left_on(o) and not left_on(model)
    o.train()
    assert all(m.training for m in o.modules())


# What it says

def forgotten(**kwargs):
    learn = learner(net(frozen=False), train_bn=True, **kwargs)
    learn.freeze()
    return learn
def by_hand(body, **kwargs): return learner(net(body), train_bn=True, splitter=trainable_params, **kwargs)
def two_norms(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
def trained_norm():
    "Its Learner was made with `train_bn=False`, so somebody wanted it"
    model = net()
    model[0][1].requires_grad_(True)
    return model
def without_norm(): return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
def fixed(): return nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1, 1)), FrozenBatchNorm2d(4), nn.Flatten())
def again(learn):
    "As a Learner that was exported and loaded: what trains is what trained, but its optimizer is new"
    learn.opt = None
    return learn
def frozen_two():
    learn = learner(net(two_norms(), frozen=False), train_bn=True)
    learn.freeze()
    return learn
cases = dict(
    forgotten=(forgotten, '1 batchnorm layer of the frozen part trains, '), several=(frozen_two, '2 batchnorm layers of the frozen part train, '),
    new_optimizer=(lambda: again(forgotten()), 'freeze it too'), given=(lambda: learner(), None), unfrozen=(lambda: learner(net(frozen=False), train_bn=True), None),
    on_purpose=(lambda: learner(trained_norm()), None), no_norm=(lambda: by_hand(without_norm()), None), frozen_norm=(lambda: by_hand(fixed()), None), hand=(lambda: by_hand(None), None))
@pytest.mark.parametrize('case', cases)
def test_it_warns_once_a_fit_where_batchnorm_was_forgotten(case):
    build,words = cases[case]
    learn = build()
    for _ in range(2):
        with said() as messages: learn.fit(2, cbs=[BnFreeze, On('after_epoch', lambda learn: learn.get_preds(inner=True))])
        assert len(messages) == bool(words) and all(words in o and 'train_bn=False' in o for o in messages)
    with said() as messages:
        learn.fit(1, cbs=BnFreeze(only_frozen=False))
        learn.validate(cbs=BnFreeze)
    assert not messages

def test_a_callback_that_updates_a_frozen_target_is_let_be():
    "Such as the momentum encoder of BYOL: what it copies into the frozen part stays"
    model = net()
    def follow(learn):
        for a,b in zip(model[0].buffers(), model[1][1].buffers()): a.copy_(b)
    with said() as messages: learner(model, [BnFreeze(), On('after_step', follow)]).fit(2)
    assert not messages and all(torch.equal(a, b) for a,b in zip(model[0].buffers(), model[1][1].buffers()))

@pytest.mark.parametrize('event', Callback._methods)
def test_an_event_is_called_as_often_as_in_any_callback(event):
    calls = Counter()
    def count(cb): calls[type(cb), cb.learn.training] += 1
    learn = learner(cbs=[cls(**{event: count}) for cls in (Callback, BnFreeze)])
    learn.fit(2, cbs=At('before_step', stop(CancelStepException()), it=2, order=inf))
    learn.validate()
    for training in (True, False): assert calls[BnFreeze, training] == calls[Callback, training]

def test_signatures():
    assert str(inspect.signature(BnFreeze)).startswith('(*, only_frozen: bool = True, all_layers: bool = False, part:')
    assert str(inspect.signature(set_bn_eval)).endswith('use_eval: bool = True, *, only_frozen: bool = True) -> None')
    assert BnFreeze.__doc__ and issubclass(BnFreeze, Callback) and all(issubclass(o, bn_types) for o in fastai_training.bn_types)
