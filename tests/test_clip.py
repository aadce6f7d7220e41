"GradientClip, held against a plain loop"
import io, pickle, warnings
from contextlib import nullcontext, redirect_stdout
from types import SimpleNamespace

import pytest
import matplotlib.pyplot as plt
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from common import *

nan,inf = math.nan,math.inf
Acc,Clip = GradientAccumulation,GradientClip


def batches_of(n, spoiled=(), bs=4):
    "`n` batches of a regression far from its solution; the loss of those that are `spoiled` is NaN"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, bs, 3, generator=g)
    y = x @ tensor([[1.], [-2.], [3.]]) + 5 + torch.randn(n, bs, 1, generator=g)
    for i,value in dict(spoiled).items(): y[i] = value
    return Held(zip(x, y))

def learner(batches, model=None, **kwargs):
    valid = DataLoader(Held(zip(*batches[0])), bs=4)
    return linear_learner(DataLoaders(DataLoader(batches, bs=None), valid, device='cpu'), model, **kwargs)

def said(f):
    "The warnings about norms of `f()`, and what it raised"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [o for o in seen if o.category is UserWarning and 'norm' in str(o.message)]

class Scaler(CpuMixedPrecision):
    "The scaler alone, without the arithmetic in 16 bits"
    def before_fit(self):
        super().before_fit()
        self.autocast = nullcontext()


# Every step

class Twin:
    "A plain loop: a step for each window of `k` batches"
    def __init__(self, learn): self.model,self.opt = deepcopy(learn.model),None
    def fit(self, batches, k, n_epoch, flush, max_norm, norm_type, policy, lr=.01):
        opt = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=.9)
        self.norms,self.means,self.skipped,window = [],[],0,[]
        for i in range(n_epoch*len(batches)):
            start = len(self.norms) if i % len(batches) == 0 else start
            window.append(batches[i % len(batches)])
            last = i % len(batches) == len(batches)-1
            if len(window) == k or flush and last:
                x,y = map(torch.cat, zip(*window))
                opt.zero_grad()
                F.mse_loss(self.model(x), y).backward()
                grad = torch.cat([p.grad.flatten() for p in self.model.parameters()])
                norm,window = grad.norm(norm_type),[]
                self.norms.append(norm.item())
                if norm.isfinite() or policy == 'ignore':
                    for p in self.model.parameters(): p.grad *= (max_norm/(norm+1e-6)).clamp(max=1)
                    opt.step()
                else: self.skipped += 1
            if last:
                finite = [o for o in self.norms[start:] if math.isfinite(o)]
                self.means.append(np.mean(finite) if finite else nan)

@examples(60)
@given(n=st.integers(1, 7), k=st.integers(1, 4), n_epoch=st.integers(1, 3), flush=st.booleans(), spoiled=st.sets(st.integers(0, 6)),
       value=st.sampled_from([nan, inf, -inf]), max_norm=st.sampled_from([1e-3, 5, 1e9, inf]), scaled=st.booleans(),
       norm_type=st.sampled_from([2., 1., inf, 3]), policy=st.sampled_from(['skip', 'ignore']), where=st.sampled_from(['fit', 'learner']),
       order=st.permutations(range(4)))
def test_plain_loop(n, k, n_epoch, flush, spoiled, value, max_norm, scaled, norm_type, policy, where, order):
    "Norms, weights, skipped steps, the column: with windows, the scaler, spoiled batches, whatever the order of the callbacks"
    batches,clip = batches_of(n, {i: value for i in spoiled if i < n}),Clip(max_norm, norm_type, nonfinite=policy)
    cbs = [[clip], [Acc(4*k, flush=flush)], [Scaler('fp16', init_scale=16.)] if scaled else [], [Probe()]]
    cbs = sum([cbs[i] for i in order], [])
    learn = learner(batches, metrics=clip.metric, cbs=cbs if where == 'learner' else [])
    twin = Twin(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n_epoch, .01, cbs=cbs if where == 'fit' else [])
    twin.fit(batches, k, n_epoch, flush, max_norm, norm_type, 'skip' if scaled else policy)
    assert np.allclose(clip.norms, twin.norms, rtol=1e-4, equal_nan=True) and clip.norms.shape == (len(twin.norms),)
    assert clip.skipped == twin.skipped
    assert torch.allclose(weights(learn.model), weights(twin.model), rtol=1e-4, equal_nan=True)
    assert np.allclose([row[2] for row in learn.recorder.values], twin.means, rtol=1e-4, equal_nan=True)
    if twin.norms: assert np.allclose(clip.norm, twin.norms[-1], rtol=1e-4, equal_nan=True)
    if where == 'fit' or k == 1: assert no_grads(learn) or policy == 'ignore' and not weights(learn.model).isfinite().all()

def test_an_infinite_max_norm_changes_nothing():
    batches,models = batches_of(5),[]
    for cbs in ([], [Clip(inf)], [Clip(inf, 1, nonfinite='ignore')]):
        learn = learner(batches)
        learn.fit(2, .01, cbs=cbs)
        models.append(weights(learn.model))
    assert models[0].equal(models[1]) and models[0].equal(models[2])

def test_only_what_is_stepped_is_measured():
    "Not what has no gradient, is frozen, or is not the optimizer's; but a parameter of the loss"
    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.Linear(4, 1))
            self.unused,self.fixed = nn.Parameter(torch.ones(2)),nn.Parameter(torch.ones(2), requires_grad=False)
    clip,scale = Clip(1e-3),nn.Parameter(torch.ones(1))
    def loss_func(pred, targ): return F.mse_loss(pred*scale, targ)
    def split(m): return [list(m[0].parameters()), [*m[1].parameters(), m.unused, m.fixed, scale]]
    learn = learner(batches_of(4), Model(), loss_func=loss_func, splitter=split)
    learn.create_opt()
    for freeze in (learn.freeze, learn.unfreeze):
        freeze()
        probe = Probe()
        learn.fit(1, 0., cbs=[clip, probe])
        moved = [p for p in (*learn.model.parameters(), scale) if p.requires_grad and p is not learn.model.fixed]
        for norm,(x,y) in zip(clip.norms, batches_of(4), strict=True):
            grads = torch.autograd.grad(loss_func(learn.model(x), y), moved, allow_unused=True)
            assert torch.allclose(norm, torch.cat([g.flatten() for g in grads if g is not None]).norm())
    def of(m): return m[0].parameters()
    learn = learner(batches_of(1), Model(), splitter=lambda m: [list(of(m))])
    learn.fit(1, 0., cbs=(clip := Clip(inf)))
    (x,y), = batches_of(1)
    grads = torch.autograd.grad(F.mse_loss(learn.model(x), y), list(of(learn.model)))
    assert torch.allclose(clip.norm, torch.cat([g.flatten() for g in grads]).norm())


# Parameters of every kind

class Embedded(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.emb,self.head = nn.Embedding(9, 3, sparse=sparse),nn.Linear(3, 1)
    def forward(self, x): return self.head(self.emb(x.abs().long() % 9).mean(1))

def test_sparse_gradients_are_clipped_as_dense_ones():
    "An item that comes twice in a batch is added up before it is measured"
    seen = []
    for sparse in (True, False):
        torch.manual_seed(0)
        learn,clip = learner(batches_of(5), Embedded(sparse), opt_func=SGD),Clip(.5)
        learn.fit(2, .1, cbs=clip)
        seen.append((clip.norms, weights(learn.model)))
    assert all(torch.allclose(a, b, rtol=1e-5) for a,b in zip(*seen))

def test_complex_parameters():
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 1, dtype=torch.complex64))
        def forward(self, x): return (x.to(torch.complex64) @ self.w).abs()
    learn,clip = learner(batches_of(3), Wave(), opt_func=SGD),Clip(.5)
    left = []
    learn.fit(1, 0., cbs=[clip, At('before_step', lambda cb: left.append(cb.model.w.grad.norm().item()), order=99)])
    expected = [torch.autograd.grad(F.mse_loss(learn.model(x), y), learn.model.w)[0].norm() for x,y in batches_of(3)]
    assert torch.allclose(clip.norms, torch.stack(expected)) and np.allclose(left, .5)

def stepped(grads, *args, before=lambda clip: None):
    "The norm of parameters with these gradients, and what is left of them"
    ps = [nn.Parameter(torch.zeros(3, dtype=torch.float32 if g is None else g.dtype)) for g in grads]
    for p,g in zip(ps, grads): p.grad = g
    clip = Clip(*args)
    clip.learn = SimpleNamespace(opt=SGD(ps, lr=1.))
    clip.before_step()
    return clip,[p.grad for p in ps]

@pytest.mark.parametrize('norm_type', [.5, 1., 2., 3, inf])
@pytest.mark.parametrize('scale', [1e-3, 1., 4e4])
@pytest.mark.parametrize('dtypes', [
    [torch.float16], [torch.float16, torch.float32, None], [torch.bfloat16], [torch.bfloat16, torch.float32],
    [torch.float64], [torch.float16, torch.bfloat16, torch.float64], [torch.float16, torch.complex64], [torch.float32, torch.complex128]])
def test_precision(dtypes, scale, norm_type):
    "The norm is right where the parameters' own type can't hold it; 16 bits of bfloat16 are good for two digits"
    g = torch.Generator().manual_seed(0)
    grads = [o and (scale*torch.rand(3, generator=g)).to(o) for o in dtypes]
    whole = torch.cat([o.to(torch.complex128) for o in grads if o is not None])
    expected,tol = whole.norm(norm_type),2e-2 if torch.bfloat16 in dtypes else 2e-3
    clip,left = stepped(grads, scale/2, norm_type)
    assert torch.allclose(clip.norms.double(), expected.double(), rtol=tol)
    left = torch.cat([o.to(torch.complex128) for o in left if o is not None])
    assert torch.allclose(left, whole*min(1, scale/2/expected), rtol=2*tol, atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_no_gradient_at_all(dtype):
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    clip = Clip()
    clip.learn = SimpleNamespace(opt=SGD([p], lr=1.))
    clip.before_step()
    assert clip.norm == 0 and p.grad is None
    p.grad = torch.full_like(p, 2)
    clip.before_step()
    assert torch.allclose(clip.norms, tensor([0., 12**.5]))


# Norms that are not finite

@pytest.mark.parametrize('value', [nan, inf])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9, wd=.01), partial(Adam, wd=.01)], ids=['SGD', 'Adam'])
@pytest.mark.parametrize('n_acc, lost', [(None, 1), (4, 1), (8, 2)])
def test_a_skipped_step_is_as_if_its_window_had_not_been_there(value, opt_func, n_acc, lost):
    "In the parameters, and in the optimizer's state"
    def fit(batches):
        learn = learner(batches, opt_func=opt_func)
        said(lambda: learn.fit(1, .01, wd=.3, cbs=[Clip(), *([Acc(n_acc)] if n_acc else [])]))
        states = learn.opt.state_dict()['state']
        return [weights(learn.model), *(torch.as_tensor(v) for o in states for v in o.values())]
    whole = batches_of(8)
    absent,skipped = fit(Held(whole[:2]+whole[2+lost:])),fit(batches_of(8, {2: value}))
    assert len(skipped) == len(absent) and all(map(torch.equal, skipped, absent))

@pytest.mark.parametrize('place', ['fit', 'learner'])
@pytest.mark.parametrize('then', ['with', 'without'])
def test_raise(place, then):
    "Nothing was stepped, and the fit after it is the one that it would have been"
    clip = [Clip(nonfinite='raise')]
    learn = learner(batches_of(4, {0: nan}), cbs=clip if place == 'learner' else [])
    start = weights(learn.model)
    with pytest.raises(RuntimeError, match='gradient norm of step 0 is non-finite: nan'): learn.fit(1, cbs=clip if place == 'fit' else [])
    assert weights(learn.model).equal(start) and no_grads(learn) and len(clip[0].norms) == 1
    learn.dls = learner(batches_of(4)).dls
    if then == 'without': learn.remove_cbs(clip)
    learn.fit(1, .01, reset_opt=True, cbs=clip if place == 'fit' and then == 'with' else [])
    clean = learner(batches_of(4))
    clean.fit(1, .01, cbs=Clip() if then == 'with' else [])
    assert weights(learn.model).equal(weights(clean.model))

def test_ignore_is_what_pytorch_does():
    learn = learner(batches_of(4, {2: inf}), opt_func=SGD)
    plain = deepcopy(learn.model)
    assert not said(lambda: learn.fit(1, .01, cbs=Clip(nonfinite='ignore')))
    for x,y in batches_of(4, {2: inf}):
        plain.zero_grad()
        F.mse_loss(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.)
        for p in plain.parameters(): p.data -= .01*p.grad
    assert torch.allclose(weights(learn.model), weights(plain), equal_nan=True) and not weights(plain).isfinite().any()

@pytest.mark.parametrize('place', ['fit', 'learner'])
def test_one_warning_and_one_last_word_a_fit(place, capsys):
    "At the user's line, and at once; in each fit, with a `validate` in its middle"
    clip = [Clip()]
    looks = At('after_train', lambda cb: cb.learn.validate())
    learn = learner(batches_of(6, {2: nan, 4: inf}), cbs=clip if place == 'learner' else [])
    for _ in range(2):
        seen = said(lambda: learn.fit(2, .01, cbs=[looks, *(clip if place == 'fit' else [])]))
        assert [str(o.message)[:33] for o in seen] == ['The gradient norm of step 2 is na']
        assert seen[0].filename == __file__
        assert capsys.readouterr().out.splitlines() == ['4 of 12 steps were skipped: their gradient norm was not finite']
        assert (clip[0].skipped, len(clip[0].norms)) == (4, 12)
    learn.dls = learner(batches_of(6)).dls
    assert not said(lambda: learn.fit(1, .01, cbs=clip if place == 'fit' else [])) and not capsys.readouterr().out and not clip[0].skipped

def test_all_steps_skipped(capsys):
    learn,clip = learner(batches_of(8, dict.fromkeys(range(8), nan))),Clip()
    assert len(said(lambda: learn.fit(5, .01, cbs=clip))) == 1
    assert clip.skipped == len(clip.norms) == 40 and '40 of 40 steps were skipped' in capsys.readouterr().out

def test_all_steps_skipped_by_the_scaler(capsys):
    "No warning, as a scale is looked for, but a last word; none where some were taken"
    for spoiled,word in (range(8), '40 of 40 steps'),(range(1), ''):
        clip = Clip()
        cbs = [clip, Scaler('fp16', init_scale=16.)]
        assert not said(lambda: learner(batches_of(8, dict.fromkeys(spoiled, nan))).fit(5, .01, cbs=cbs))
        assert capsys.readouterr().out[:14] == word and clip.skipped == 5*len(spoiled)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ValueError, CancelFitException])
def test_the_last_word_of_a_fit_that_was_cut_off(exc, capsys):
    learn,clip = learner(batches_of(6, {1: nan})),Clip()
    def fit(): learn.fit(1, .01, cbs=[clip, At('after_batch', stop(exc('on purpose')), it=3)])
    with nullcontext() if exc is CancelFitException else pytest.raises(exc): said(fit)
    assert '1 of 4 steps' in capsys.readouterr().out and len(clip.norms) == 4 and clip._in_fit is False

def test_a_batch_trained_by_hand():
    learn = learner(batches_of(1), cbs=[Acc(4), Clip()])
    learn.create_opt()
    learn.remove_cb(Recorder)
    learn.training,learn.n_iter,learn.train_iter,learn.pct_train = True,1,0,0.
    start = weights(learn.model)
    assert len(said(lambda: learn.one_batch(0, batches_of(1, {0: nan})[0]))) == 1 and weights(learn.model).equal(start)
    assert learn.gradient_clip.skipped == 1

@pytest.mark.parametrize('order, measured', [(0, 3), (99, 3)])
def test_a_step_that_another_callback_cancels(order, measured):
    "It is measured once, and is not one that was skipped for its norm"
    clip = Clip()
    learner(batches_of(3)).fit(1, .01, cbs=[clip, At('before_step', stop(CancelStepException()), it=1, order=order)])
    assert len(clip.norms) == measured and clip.skipped == 0 and clip.norms.isfinite().all()


# What is kept

class Syncs(TorchDispatchMode):
    "Count what waits for a device: the value of a tensor, or a copy to another device"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.name() in ('aten::_local_scalar_dense', 'aten::_to_copy', 'aten::is_nonzero', 'aten::nonzero')
        return func(*args, **kwargs or {})

@pytest.mark.parametrize('policy, n', [('skip', 1), ('raise', 1), ('ignore', 0)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_waits(policy, n, dtype):
    "A step waits once to know whether it is to be skipped, or never, also where norms are packed"
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    clip = Clip(nonfinite=policy)
    clip.learn = SimpleNamespace(opt=SGD([p], lr=1.))
    for i in range(1100):
        p.grad = torch.full_like(p, i)
        with Syncs() as syncs: clip.before_step()
        assert syncs.n == n
    assert torch.allclose(clip.norms, 3**.5*torch.arange(1100.), rtol=1e-5)
    assert len(clip._packed) == 1

def test_a_look_in_the_middle_of_a_fit():
    "`validate`, `get_preds`, and the norms asked for at each step, change nothing"
    def fit(*cbs):
        clip = Clip(.5)
        learn = learner(batches_of(5), metrics=clip.metric)
        learn.fit(2, .01, cbs=[clip, *cbs])
        return clip,learn
    def ask(cb): cb.gradient_clip.norms,cb.gradient_clip.norm,cb.gradient_clip.metric.value
    def look(cb):
        before = cb.gradient_clip.metric.value
        cb.learn.get_preds(),cb.learn.validate()
        assert cb.gradient_clip.metric.value == before
    (plain,learn),(asked,other),(looked,_) = fit(),fit(At('after_step', ask)),fit(At('after_train', look))
    assert plain.norms.equal(asked.norms) and plain.norms.equal(looked.norms)
    assert [row[2] for row in learn.recorder.values] == [row[2] for row in other.recorder.values]
    before = plain.norms
    learn.validate(), learn.get_preds()
    assert plain.norms.equal(before)

def test_the_column_belongs_to_the_fit():
    "NaN where the callback is not in the fit, and in `validate`; a mean in `train_metrics` too"
    clip = Clip(.5)
    learn = learner(batches_of(4), metrics=clip.metric)
    learn.fit(2, .01, cbs=clip)
    assert np.allclose([row[2] for row in learn.recorder.values], clip.norms.view(2, 4).mean(1))
    learn.fit(1, .01)
    assert math.isnan(learn.recorder.values[0][2]) and math.isnan(learn.validate()[1])
    learn.recorder.train_metrics = True
    learn.fit(1, .01, cbs=clip)
    assert learn.recorder.metric_names[1:-1] == ['train_loss', 'train_grad_norm', 'valid_loss', 'valid_grad_norm']
    assert np.allclose([learn.recorder.values[0][i] for i in (1, 3)], clip.norms.mean())

def test_trackers(tmp_path):
    clip = Clip(.5)
    learn = learner(batches_of(4), metrics=clip.metric, path=tmp_path)
    best = SaveModelCallback('grad_norm', comp=np.less, fname='best')
    with redirect_stdout(io.StringIO()):
        learn.fit(4, .2, cbs=[clip, CSVLogger, best, EarlyStoppingCallback('grad_norm', comp=np.less, patience=2)])
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log)[3] == 'grad_norm' and np.allclose(log.grad_norm, [row[2] for row in learn.recorder.values])
    assert best.best == log.grad_norm.min() and (tmp_path/'models/best.pth').exists()

@pytest.mark.parametrize('cut', [0, 1, 4])
@pytest.mark.parametrize('spoiled', [{}, {0: nan}, {2: inf, 4: nan}])
def test_state(cut, spoiled, capsys):
    "A fit that was cut off after batch `cut` of its second epoch, and goes on with the next"
    def learn_of(batches, clip): return learner(batches, metrics=clip.metric)
    batches,clip,state = batches_of(5, spoiled),Clip(),[]
    learn = learn_of(batches, clip)
    keep = At('after_batch', lambda cb: state.append(pickle.dumps(clip.state_dict())), it=cut, ep=1, order=100)
    def double(cb): cb.learn.loss_grad = 2*cb.learn.loss_grad # so that the epochs have other means
    said(lambda: learn.fit(2, 0., cbs=[clip, keep, At('before_backward', double, ep=0)]))
    other,word = Clip(),capsys.readouterr().out
    def load(cb):
        other._begin()
        other.load_state_dict(pickle.loads(state[0]))
    rest = learn_of(batches, other)
    rest.dls.loaders[0] = DataLoader(Held(batches[cut+1:]), bs=None) if cut < 4 else []
    warned_again = said(lambda: rest.fit(1, 0., cbs=[other, At('before_epoch', load, order=-100)]))
    assert torch.allclose(other.norms, clip.norms, equal_nan=True) and other.skipped == clip.skipped
    assert np.allclose(rest.recorder.values[-1][2], learn.recorder.values[-1][2], equal_nan=True)
    assert len(warned_again) == 0 and capsys.readouterr().out == word


# Copies and idioms

class Look(Callback):
    "Pickle the callback in a fit"
    order = 90
    def after_batch(self):
        if self.training and self.iter == 2: self.copied = pickle.dumps(self.learn.gradient_clip)

@pytest.mark.parametrize('how', [copy, deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['copy', 'deepcopy', 'pickle'])
def test_copies(how):
    "They have the norms of their original, and a fit of their own"
    clip,look = Clip(.5),Look()
    learner(batches_of(5)).fit(1, .01, cbs=[clip, look])
    norms = clip.norms
    for o in how(clip),pickle.loads(look.copied):
        assert o.norms.equal(norms[:len(o.norms)]) and len(o.norms) in (3, 5)
        learner(batches_of(4)).fit(1, .01, cbs=o)
        assert len(o.norms) == 4 and clip.norms.equal(norms)

def test_export(tmp_path):
    clip = Clip(.5)
    learn = learner(batches_of(5), metrics=clip.metric, cbs=clip, path=tmp_path)
    learn.fit(1, .01)
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    assert loaded.gradient_clip.norms.equal(clip.norms) and loaded.metrics[0].clip is loaded.gradient_clip

def test_as_a_class_again_and_again():
    learn = learner(batches_of(3))
    for _ in range(2): learn.fit(1, .01, cbs=Clip)
    assert [type(o) for o in learn.cbs].count(Clip) == 0

def test_begun_by_hand():
    "fastai's notebooks do this, where there is no optimizer yet"
    with learner(batches_of(2), cbs=(clip := Clip())) as learn: learn('before_train')
    assert len(clip.norms) == 0 and clip.norm is None

def test_lr_find(tmp_path):
    learn = learner(batches_of(5), cbs=(clip := Clip()), path=tmp_path)
    learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    assert len(clip.norms) == 9

def test_names_that_the_model_has_too():
    class Named(nn.Linear): norm = norms = skipped = metric = max_norm = norm_type = nonfinite = 7
    clip = Clip()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learner(batches_of(6, {5: nan}), Named(3, 1)).fit(2, .01, cbs=[Acc(8), clip])
    assert clip.skipped == 2 and not [o for o in seen if 'shadowing' in str(o.message)]

def test_arguments():
    "fastai's by position, with its defaults; the others by name"
    assert [(o.max_norm, o.norm_type) for o in (Clip(), Clip(3, 1))] == [(1, 2), (3, 1)]
    with pytest.raises(TypeError): Clip(1, 2, 'skip')


# The plot

def plotted(clip):
    fig,ax = plt.subplots()
    assert clip.plot_norms(ax) is ax
    lines = {o.get_label(): list(o.get_xdata()) for o in ax.lines}
    fig.canvas.draw()
    plt.close(fig)
    return lines

def test_plot():
    clip = Clip(5.)
    learn = learner(batches_of(6, {1: nan, 4: inf}))
    said(lambda: learn.fit(1, .01, cbs=clip))
    above = [i for i,o in enumerate(clip.norms) if math.isfinite(o) and o > 5]
    below = [i for i,o in enumerate(clip.norms) if math.isfinite(o) and o <= 5]
    assert plotted(clip) == {f'not clipped: {len(below)}': below, f'clipped: {len(above)}': above,
                             'not finite: 2, skipped: 2': [1, 4], 'max_norm': [0, 1]}

@pytest.mark.parametrize('clip', [Clip(), Clip(inf)], ids=['1', 'inf'])
def test_plot_of_nothing(clip): assert [*plotted(clip)][:2] == ['not clipped: 0', 'clipped: 0']
