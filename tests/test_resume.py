"""A fit that was cut off and goes on leaves what a fit leaves that was not, bit for bit

Real processes are killed, each forked from one that has everything imported (interrupted.py). What needs no process is cut off
by an exception. TEST_DEATHS=100 in the environment adds as many random deaths."""
import json, pickle, random as rnd, signal, subprocess, threading, warnings
from collections import OrderedDict, deque
from copy import copy, deepcopy
from fractions import Fraction

import pytest

import pandas as pd
from fastai.data.transforms import Normalize
from fastai.tabular.core import TabularPandas
from fastai.text.data import LMDataLoader, SortedDL
from fastai.callback.rnn import ModelResetter

from interrupted import *
from interrupted import _Last

def differs(a, b, at=''):
    "Where two outcomes differ"
    if type(a) is not type(b): return [f'{at}: {type(a)}, {type(b)}']
    if isinstance(a, dict): return [o for k in {**a, **b} for o in (differs(a[k], b[k], f'{at}.{k}') if k in a and k in b else [f'{at}.{k}'])]
    if isinstance(a, list|tuple):
        return [f'{at}: {len(a)}, {len(b)} long']*(len(a) != len(b)) + [o for i,v in enumerate(zip(a, b)) for o in differs(*v, f'{at}[{i}]')]
    if isinstance(a, torch.Tensor): return [at]*(a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes())
    return [] if a == b or a != a and b != b else [f'{at}: {a}, {b}']


# Processes that are killed

class Server:
    "Ask it for a case and its deaths: how each life ended, and what the last one left, by process"
    def __init__(self, folder):
        self.folder,self.n,self.known = folder,0,{}
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', Path(__file__).with_name('interrupted.py')], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def __call__(self, case, *deaths):
        if not deaths and case in self.known: return self.known[case]
        self.n += 1
        folder = self.folder/str(self.n)
        folder.mkdir()
        print(json.dumps(dict(case=case, folder=str(folder), deaths=deaths)), file=self.process.stdin, flush=True)
        ends = json.loads(self.process.stdout.readline())
        assert ends[-1] == 0, (ends, (folder/'log').read_text()[-3000:])
        left = [torch.load(o, weights_only=False) for o in sorted(folder.glob('outcome*'))]
        if not deaths: self.known[case] = ends,left
        return ends,left

    def assert_same(self, case, *deaths):
        (_,expected),(ends,left) = self(case),self(case, *deaths)
        assert not (diff := differs(expected, left)), (case, deaths, ends, diff[:9])
        return ends

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('lives'))
    yield server
    server.process.stdin.close()
    server.process.wait()

killed = [
    ('plain', ['SIGKILL', 'after_batch', 5], ['SIGTERM', 'after_pred', 4], ['SIGKILL', 'before_batch', 4]),
    ('one_cycle', ['SIGKILL', 'after_backward', 4], ['SIGTERM', 'after_batch', 2, 'valid'], ['os', 'save', 2]),
    ('one_cycle', ['SIGKILL', 'after_batch', 2, 'valid'], ['SIGKILL', 'after_epoch', 1], ['SIGKILL', 'after_fit', 1]),
    ('trackers', ['SIGTERM', 'after_epoch', 2], ['os', 'replace', 4], ['os', 'replace', 5]),
    ('torch_loaders', ['SIGKILL', 'before_batch', 3], ['SIGKILL', 'before_validate', 1]),
    ('torch_generator', ['SIGTERM', 'before_batch', 9], ['os', 'fsync', 3]),
    ('workers', ['SIGKILL', 'before_batch', 3], ['SIGTERM', 'after_batch', 4]),
    ('torch_workers', ['SIGKILL', 'before_batch', 10]),
    ('mixed', ['SIGKILL', 'after_pred', 5], ['SIGKILL', 'before_batch', 2]),
    ('mixup', ['SIGKILL', 'after_pred', 5], ['SIGKILL', 'after_batch', 1, 'valid'], ['SIGTERM', 'after_batch', 1, 'valid']),
    ('stream', ['SIGKILL', 'before_batch', 5]),
    ('tuned', ['SIGKILL', 'before_batch', 5], ['SIGKILL', 'after_fit', 1], ['SIGTERM', 'before_batch', 4]),
    ('ours', ['SIGKILL', 'before_batch', 10], ['SIGTERM', 'after_batch', 2, 'valid'], ['SIGKILL', 'before_batch', 2]),
    ('features', ['SIGKILL', 'after_batch', 4], ['SIGTERM', 'after_batch', 2, 'valid'], ['SIGKILL', 'before_batch', 2]),
    ('two', ['SIGKILL', 'after_batch', 5, None, 0], ['SIGTERM', 'after_batch', 4, None, 1], ['os', 'replace', 4, 1]),
]

@pytest.mark.parametrize('case,deaths', [(case, deaths) for case,*deaths in killed], ids=[f'{o[0]}-{i}' for i,o in enumerate(killed)])
def test_killed(server, case, deaths):
    ends = server.assert_same(case, *deaths)
    assert len(ends) == len(deaths)+1, ends # each death was died
    for end,(how,*_) in zip(ends, deaths): assert end == -getattr(signal, how, signal.SIGKILL)

n_deaths = int(os.environ.get('TEST_DEATHS', 0))

@pytest.mark.skipif(not n_deaths, reason='TEST_DEATHS=100 dies a hundred random deaths')
@pytest.mark.parametrize('seed', range(max(1, n_deaths//4)))
def test_random_deaths(server, seed):
    rng = rnd.Random(seed)
    case = sorted(cases)[seed%len(cases)]
    def death():
        kind = rng.choice(['batch', 'batch', 'valid', 'epoch', 'os'])
        if kind == 'os': how = ['os', *rng.choice([('save', rng.randint(1, 6)), ('replace', rng.randint(1, 12)), ('fsync', rng.randint(1, 12))])]
        else:
            events = dict(batch=['before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_step'], valid=['before_batch', 'after_batch'],
                          epoch=['before_train', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'before_epoch', 'after_fit'])[kind]
            how = [rng.choice(['SIGKILL', 'SIGTERM']), rng.choice(events), rng.randint(1, dict(batch=9, valid=3, epoch=2)[kind]),
                   'valid' if kind == 'valid' else None]
        return [*how, rng.randint(0, 1)] if case == 'two' else how
    server.assert_same(case, *[death() for _ in range(4)])


# Cut off by an exception, in this process

class Cut(Exception): "The fit ends here"

class Cuts(Callback):
    "Cut off at an event; in each fit that is compared there is one"
    order = 160
    def __init__(self, event=None, n=0): self._plan = dict(event=event, left=object()),
    def __call__(self, event):
        if Cuts.at and event == Cuts.at[0]:
            Cuts.at = (event, Cuts.at[1]-1)
            if Cuts.at[1] == 0:
                Cuts.at = None
                raise Cut
    at = None

def fitted(folder, make, at=None):
    "The Learner after a fit that is cut off at the `n`-th of an event"
    folder.mkdir(exist_ok=True)
    Cuts.at = at
    learn = make(folder)
    try: learn.todo()
    except Cut: leave_autocast()
    return learn

def leave_autocast():
    "fastai's mixed precision leaves it on when a batch fails"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if not torch.is_autocast_cpu_enabled(): return
        torch.set_autocast_cpu_enabled(False)
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()

def richly(folder, cbs=(), n_epoch=3, **kwargs):
    "A Learner with something of everything that is kept; `todo` fits"
    learn = learner(folder, metrics=[mae, rmse()], **kwargs)
    learn.recorder.train_metrics = True
    learn.resumes = Kept()
    learn.todo = lambda: learn.fit_one_cycle(n_epoch, .05, cbs=[
        learn.resumes, Cuts(), Seen(), Every2(), CSVLogger(), SaveModelCallback(),
        EarlyStoppingCallback(min_delta=10., patience=9), CpuMixedPrecision(init_scale=2.**10, growth_interval=3), _Last(), *cbs])
    return learn

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a fit leaves that nobody cuts off"
    folder = tmp_path_factory.mktemp('whole')
    return outcome(folder, fitted(folder, richly))

def file_of(folder): return folder/'resume.pth'
def change(folder, f):
    "Let `f` change what the file says"
    saved = torch.load(file_of(folder), weights_only=True)
    f(saved)
    torch.save(saved, file_of(folder))

def drop_attr(cb, *names):
    def f(saved):
        for o in names: del saved['state']['others'][cb]['attrs'][o]
    return f

def dropped(*path, to=None):
    "Without what is at `path`, or with `to` in its place"
    def f(saved):
        o = saved
        for k in path[:-1]: o = o[k]
        if to is None: del o[path[-1]]
        else: o[path[-1]] = to(o[path[-1]]) if callable(to) else to
    return f

def zeroed(o): return {k: v*0 for k,v in o.items()}
def other(o): return resume._pack(random.Random(3).getstate())
def other_order(key, place):
    def f(saved): (saved if key == 'drawn' else saved['state'])[key].update({k: other(v) for k,v in saved['drawn'].items() if k == place})
    return f

pieces = dict(
    none=lambda saved: None,
    weights=dropped('state', 'model', 'state', to=zeroed),
    buffers=dropped('state', 'model', 'buffers', to={}),
    attributes=dropped('state', 'model', 'attrs', to={}),
    gradients=dropped('state', 'params', to=lambda o: {k: [v, 0] for k,(v,_) in o.items()}),
    optimizer=lambda saved: [o.update(step=1) for o in saved['state']['opt']['state']],
    scaler=dropped('state', 'others', 'scaler'),
    pct_train=dropped('state', 'learn', 'pct_train'), train_iter=dropped('state', 'learn', 'train_iter'),
    metrics=dropped('state', 'others', to=lambda o: {k: v for k,v in o.items() if 'metric' not in k}),
    python=dropped('state', 'rng', 'python', to=other),
    numpy=dropped('state', 'rng', 'numpy', to=lambda o: resume._pack(np.random.RandomState(3).get_state())),
    torch=dropped('state', 'rng', 'torch', to=lambda o: torch.Generator().manual_seed(3).get_state()),
    data_set=dropped('state', 'rng', '0.dataset.rng'), order=other_order('drawn', '0.rng'), other_loaders=other_order('rng', '1.rng'),
    recorder=dropped('state', 'others', 'Recorder.0'), losses=drop_attr('Recorder.0', 'losses'), rows=drop_attr('Recorder.0', 'values'),
    smooth_loss=dropped('state', 'others', 'Recorder.0', 'parts', 'smooth_loss'),
    tracker=drop_attr('EarlyStoppingCallback.0', 'best'), schedule=dropped('state', 'others', 'ParamScheduler.0'),
    csv=dropped('state', 'others', 'CSVLogger.0'), own_state=dropped('state', 'others', 'Every2.0'),
    batch=lambda saved: saved['place'].__setitem__(2, saved['place'][2]-1), epoch=lambda saved: saved['place'].__setitem__(0, 0))

@pytest.mark.parametrize('piece', pieces)
def test_each_piece_is_needed(piece, whole, tmp_path):
    "Cut off in the second epoch with a window half full; without any one piece something else comes out"
    fitted(tmp_path, richly, ('after_batch', 13)) # 6 and 3 batches, and the fourth of the second epoch
    assert torch.load(file_of(tmp_path), weights_only=True)['place'] == [1, 'train', 3]
    change(tmp_path, pieces[piece])
    try: diff = differs(whole, outcome(tmp_path, fitted(tmp_path, richly)))
    except Exception as e: diff = [e]
    assert bool(diff) == (piece != 'none'), diff

@pytest.mark.parametrize('at', [('before_epoch', 1), ('before_train', 2), ('before_batch', 1), ('after_pred', 7), ('after_batch', 8), ('after_validate', 1),
                                ('after_epoch', 3), ('after_fit', 1), ('before_fit', 1)], ids=str)
def test_cut_off_anywhere(at, whole, tmp_path):
    fitted(tmp_path, richly, at)
    assert differs(whole, outcome(tmp_path, fitted(tmp_path, richly))) == []

def test_the_same_learner_goes_on(whole, tmp_path):
    "A cell that is run again after Ctrl-C, with the model as it was left"
    learn = fitted(tmp_path, richly, ('after_pred', 12))
    learn.todo()
    left = outcome(tmp_path, learn)
    assert differs({k: whole[k] for k in ('weights', 'rows', 'losses', 'opt')}, {k: left[k] for k in ('weights', 'rows', 'losses', 'opt')}) == []

def test_neutral(tmp_path):
    "With it, a fit that nobody cuts off is the fit without it"
    def make(with_it):
        def f(folder):
            learn = learner(folder, metrics=mae)
            learn.todo = lambda: learn.fit_one_cycle(2, .05, cbs=[*([Kept()] if with_it else []), Seen(), _Last()])
            return learn
        return f
    a,b = (outcome(tmp_path/str(o), fitted(tmp_path/str(o), make(o))) for o in (True, False))
    assert differs(a, b) == []

def test_nothing_is_loaded_again(tmp_path):
    loaded = []
    class Counted(Noisy):
        def __getitem__(self, i):
            loaded.append(i)
            return super().__getitem__(i)
    def make(folder):
        dls = DataLoaders(DataLoader(Counted(44, False), bs=8, shuffle=True), DataLoader(Counted(20, False), bs=8), device='cpu')
        learn = learner(folder, dls)
        learn.todo = lambda: learn.fit(2, .05, cbs=[Kept(), Cuts()])
        return learn
    fitted(tmp_path, make, ('after_batch', 4))
    first,loaded[:] = loaded[:],[]
    fitted(tmp_path, make)
    assert len(first) == 4*8 and len(loaded) == 44-3*8+20+44+20
    assert sorted(first[:24]+loaded[:20]) == list(range(44))


# Files

def simple(folder, n_epoch=3, lr=.05, cbs=(), n=44, bs=8, shuffle=True, model=None, opt=partial(SGD, mom=.9), loss=None, every=0., fname='resume', wd=None, ds=None):
    set_seed(7)
    dls = DataLoaders(DataLoader(ds or Noisy(n), bs=bs, shuffle=shuffle), DataLoader(Noisy(20), bs=8), device='cpu')
    learn = learner(folder, dls, model, loss, opt_func=opt)
    learn.resumes = ResumeFit(fname, every=every)
    learn.todo = lambda: learn.fit(n_epoch, lr, wd=wd, cbs=[learn.resumes, Cuts(), *cbs])
    return learn

@pytest.mark.parametrize('other,says', [
    (dict(n_epoch=4), 'epochs: 3 there, 4 here'), (dict(lr=.06), '`lr`: [0.05] there, [0.06] here'), (dict(wd=.1), '`wd`'),
    (dict(n=45), 'training data, items: 44 there, 45 here'), (dict(bs=9), 'training data, bs'), (dict(shuffle=False), 'training data, shuffle'),
    (dict(model=nn.Linear(3, 1)), 'of the model'), (dict(opt=Adam), 'optimizer'), (dict(opt=partial(SGD, mom=.8)), '`mom`'),
    (dict(loss=L1LossFlat()), 'loss'), (dict(cbs=[GradientClip(1.)]), 'callback GradientClip.0: none there, GradientClip here'), (dict(ds=Noisy(44).x.numpy()[::-1].tolist()), 'training data')], ids=lambda o: o.replace(' ', '_') if isinstance(o, str) else '_'.join(o))
def test_other_fits_are_refused(other, says, tmp_path):
    fitted(tmp_path, simple, ('after_batch', 4))
    before = file_of(tmp_path).read_bytes()
    (tmp_path/'history.csv').write_text('mine')
    with pytest.raises(ValueError, match='is not of this fit') as e: fitted(tmp_path, partial(simple, **other))
    assert says in str(e.value) and '`fname`' in str(e.value) and 'delete' in str(e.value), e.value
    assert file_of(tmp_path).read_bytes() == before and (tmp_path/'history.csv').read_text() == 'mine'

def test_arguments_of_callbacks_and_versions(tmp_path):
    fitted(tmp_path, partial(simple, cbs=[GradientClip(1.), CSVLogger()]), ('after_batch', 4))
    csv = (tmp_path/'history.csv').read_text()
    with pytest.raises(ValueError, match='`max_norm` of GradientClip.0: 1.0 there, 2.0 here'): fitted(tmp_path, partial(simple, cbs=[GradientClip(2.), CSVLogger()]))
    assert (tmp_path/'history.csv').read_text() == csv # it had not been opened yet
    change(tmp_path, lambda saved: saved['fit'].update({'version of fastcb_training': "'0.0.0'"}))
    with pytest.raises(ValueError, match='version of fastcb_training: .0.0.0. there'): fitted(tmp_path, partial(simple, cbs=[GradientClip(1.), CSVLogger()]))

@pytest.mark.parametrize('size', [0, 100, .5, -1])
def test_a_broken_file(size, tmp_path):
    "The one before it; none that can be read is an error"
    expected = fitted(tmp_path/'whole', simple)
    fitted(tmp_path, simple, ('after_batch', 5))
    content = file_of(tmp_path).read_bytes()
    def broken(o): return o[:int(len(o)*size) if size == .5 else size] if size != -1 else o[:len(o)//2]+bytes([o[len(o)//2]^1])+o[len(o)//2+1:]
    file_of(tmp_path).write_bytes(broken(content))
    both = tmp_path/'both'
    shutil.copytree(tmp_path, both)
    with pytest.warns(UserWarning, match='older file'): learn = fitted(tmp_path, simple)
    assert differs(expected.model.state_dict(), learn.model.state_dict()) == []
    (both/'resume.prev').write_bytes(broken((both/'resume.prev').read_bytes()))
    with pytest.raises(RuntimeError, match='resume.prev.*can.t be read.*Delete'): fitted(both, simple)
    assert file_of(both).exists()

def test_nothing_is_read_from_the_file_later(whole, tmp_path, monkeypatch):
    "It is mapped while a fit goes on; when the next one is written, all of it has been copied"
    write = resume._write_file
    def spoiled(path, state):
        for o in path,path.with_suffix('.prev'):
            if o.exists():
                with o.open('r+b') as f: f.write(bytes(o.stat().st_size))
        write(path, state)
    fitted(tmp_path, richly, ('after_batch', 13))
    with monkeypatch.context() as m:
        m.setattr(resume, '_write_file', spoiled)
        fitted(tmp_path, richly, ('after_batch', 2))
    assert differs(whole, outcome(tmp_path, fitted(tmp_path, richly))) == []

def test_a_full_disk(tmp_path, monkeypatch):
    save,n = torch.save,[0]
    def full(state, f, **kwargs):
        n[0] += 1
        if n[0] in (3, 4):
            f.write_bytes(b'half of it')
            raise OSError(28, 'No space left on device')
        save(state, f, **kwargs)
    expected = fitted(tmp_path/'whole', simple)
    monkeypatch.setattr(torch, 'save', full)
    with pytest.warns(UserWarning, match='could not be written.*No space left') as seen: fitted(tmp_path, simple, ('after_batch', 5))
    assert len([o for o in seen if 'could not be' in str(o.message)]) == 1
    assert torch.load(file_of(tmp_path), weights_only=True)['place'] == [0, 'train', 2] and not (tmp_path/'resume.new').exists()
    assert differs(expected.model.state_dict(), fitted(tmp_path, simple).model.state_dict()) == []

def test_when_it_saves(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(resume, '_write_file', lambda path, state: places.append(state['place']))
    fitted(tmp_path, partial(simple, every=10.))
    assert places == [[i, None, 0] for i in (1, 2, 3)]
    places.clear()
    fitted(tmp_path, partial(simple, n_epoch=1))
    assert places == [[0, 'train', i] for i in range(1, 6)]+[[0, 'validate', i] for i in (1, 2)]+[[1, None, 0]]

def test_a_fit_that_ended_has_no_file(tmp_path):
    fitted(tmp_path, simple)
    assert not list(tmp_path.glob('resume*'))

def test_two_fits_of_one_name(tmp_path):
    fitted(tmp_path, simple, ('after_batch', 4))
    fitted(tmp_path, partial(simple, n_epoch=2, fname='second'), ('after_batch', 4)) # has its own
    assert (tmp_path/'second.pth').exists()


# How it ends

def test_minutes(tmp_path):
    expected = fitted(tmp_path/'whole', simple)
    learn = simple(tmp_path)
    learn.resumes.minutes = 1e-9
    with pytest.warns(UserWarning, match='ended after 1e-09 minutes, in epoch 0.*goes on'): learn.todo()
    assert learn.resumes.stopped and torch.load(file_of(tmp_path), weights_only=True)['place'] == [0, 'train', 1]
    learn = fitted(tmp_path, simple)
    assert not learn.resumes.stopped and differs(expected.model.state_dict(), learn.model.state_dict()) == []

def test_minutes_end_a_fine_tune(tmp_path):
    learn = learner(tmp_path, splitter=lambda m: [params(m.layers[:3]), params(m.layers[3:])])
    with pytest.warns(UserWarning, match='ended after'): learn.fine_tune(2, freeze_epochs=1, cbs=[res := ResumeFit(minutes=1e-9)])
    assert res.stopped and learn.train_iter == 1 and learn.opt.frozen_idx == 1 and torch.load(file_of(tmp_path), weights_only=True)['place'] == [0, 'train', 1]

@pytest.mark.parametrize('on_learner', [False, True])
def test_a_handler_of_the_users(on_learner, tmp_path):
    "It is asked when the fit has ended in order, and is there afterwards"
    seen,old = [],signal.signal(signal.SIGTERM, lambda *args: seen.append(learn.in_order))
    try:
        learn = learner(tmp_path)
        learn.in_order = False
        def end(cb): learn.in_order = True
        cbs = [Kept(), At('after_pred', lambda cb: os.kill(os.getpid(), signal.SIGTERM), it=3), At('after_fit', end, order=100)]
        if on_learner: learn.add_cb(cbs.pop(0))
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.warns(UserWarning, match='SIGTERM'): learn.fit(1, .05, cbs=cbs)
        assert seen == [True] and signal.getsignal(signal.SIGTERM) is handler
        assert torch.load(file_of(tmp_path), weights_only=True)['place'] == [0, 'train', 4]
    finally: signal.signal(signal.SIGTERM, old)

def test_in_a_thread(tmp_path):
    "Only the main thread can have a handler; the rest works"
    expected,done = fitted(tmp_path/'whole', simple),[]
    fitted(tmp_path, simple, ('after_batch', 4))
    thread = threading.Thread(target=lambda: done.append(fitted(tmp_path, simple)))
    thread.start(), thread.join()
    assert differs(expected.model.state_dict(), done[0].model.state_dict()) == []

def test_only_a_fit(tmp_path):
    "`validate`, `get_preds` and `lr_find` write nothing, and take nothing from a file"
    fitted(tmp_path, simple, ('after_batch', 4))
    before = file_of(tmp_path).read_bytes()
    learn = simple(tmp_path)
    learn.add_cb(Kept())
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=6, show_plot=False)
    assert file_of(tmp_path).read_bytes() == before

def test_looks_and_fits_inside(tmp_path):
    "A validation, a finder and a fit in the middle of it are their own"
    def make(folder):
        learn = learner(folder)
        def look(cb):
            if cb.epoch == 1:
                learn.validate()
                learn.get_preds()
        learn.todo = lambda: learn.fit(3, .05, cbs=[Kept(), Cuts(), Seen(), At('after_train', look), _Last()])
        return learn
    expected = outcome(tmp_path/'whole', fitted(tmp_path/'whole', make))
    fitted(tmp_path, make, ('after_batch', 30))
    assert differs(expected, outcome(tmp_path, fitted(tmp_path, make))) == []

def test_a_state_that_is_no_data_is_said_at_once(tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(f=Odd)
        def load_state_dict(self, state): pass
    learn = learner(tmp_path)
    with pytest.raises(TypeError, match='Odd.state_dict.*plain data'): learn.fit(1, .05, cbs=[ResumeFit(), Odd()])
    assert learn.train_iter == 1

@pytest.mark.parametrize('o', [None, True, -3, 2.5, float('nan'), 'é', b'\0a', [1, 'a', None], [1.5, tensor(2)], (1, (2,)), {'a': [1], 2: {}}, {1, 2}, L(1, 2), L(),
    deque([1, 2], 3), Path('a/b'), Fraction(1, 3), 1+2j, np.float32(.1), np.int64(3), np.arange(6).reshape(2, 3)[:, 1:], np.array(['a', 'bc']), np.array(3.),
    [np.float64(1), np.float64(2)]*30, [tensor(1.), tensor(2.)]*30, [1.5, 2.]*30, [3, 4]*30, [2**70]*60, [True, 2]*30, [np.float32(1)], [tensor(1.)], torch.rand(3, 4).t(), tensor([True]), random.getstate(), np.random.get_state(), OrderedDict(a=1)], ids=lambda o: type(o).__name__)
def test_what_is_packed_comes_back(o, tmp_path):
    torch.save(resume._pack(o), tmp_path/'o')
    back = resume._unpack(torch.load(tmp_path/'o', weights_only=True))
    assert type(back) is type(o) and repr(back) == repr(o)
    if isinstance(o, list|L): assert list(map(type, back)) == list(map(type, o))

@pytest.mark.parametrize('o', [len, object(), nn.Linear(1, 1), nn.Parameter(torch.rand(1)), [1, len], {'a': object()}, {(1, 2): 3}, np.array([len])], ids=lambda o: type(o).__name__)
def test_what_is_no_data(o):
    with pytest.raises(resume._NoData): resume._pack(o)

def pickled(o): return pickle.loads(pickle.dumps(o))

class Copied(Callback):
    "Copy the Learner's `ResumeFit` after the first epoch"
    order,copies = 10,{}
    def __init__(self, how): self.how = how
    def after_epoch(self): Copied.copies.setdefault(self.how, self.how(self.kept))

@pytest.mark.parametrize('how', [copy, deepcopy, pickled])
def test_copies(how, tmp_path):
    "New, and in the middle of a fit"
    cb = how(ResumeFit('a', every=3, minutes=5))
    assert (cb.fname, cb.every, cb.minutes) == ('a', 3, 5)
    expected,learn = fitted(tmp_path/'whole', simple),simple(tmp_path)
    del learn.todo # can't be pickled
    learn.fit(2, .05, cbs=[Kept(), Copied(how)])
    assert not file_of(tmp_path).exists()
    learn = simple(tmp_path)
    learn.resumes = Copied.copies[how]
    learn.todo()
    assert not file_of(tmp_path).exists() and differs(expected.model.state_dict(), learn.model.state_dict()) == []

@pytest.mark.parametrize('kwargs,error', [(dict(fname=''), ValueError), (dict(fname=3), TypeError), (dict(every=-1), ValueError), (dict(every=float('nan')), ValueError),
    (dict(every='1'), TypeError), (dict(every=True), TypeError), (dict(minutes=0), ValueError), (dict(minutes='1'), TypeError), (dict(minutes=float('nan')), ValueError)], ids=str)
def test_refusals(kwargs, error):
    with pytest.raises(error, match=f'`{[*kwargs][0]}` has to be'): ResumeFit(**kwargs)


# What users do

def weighted(n=44):
    return WeightedDL(Noisy(n), bs=8, wgts=np.arange(1., n+1), shuffle=True, num_workers=0)

def sampled(n=44):
    "Draws as it goes, from a generator of its own: with replacement, 32 numbers at a time"
    ds,g = Noisy(n),torch.Generator().manual_seed(3)
    return torch.utils.data.DataLoader(ds, batch_size=8, generator=g, sampler=torch.utils.data.RandomSampler(ds, True, n, generator=g))

def one_cycle_of(learn, cbs): learn.fit_one_cycle(3, .05, cbs=cbs)
def found(learn, cbs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=6, show_plot=False)
    learn.fit(3, .05, cbs=cbs)

class Heavy(nn.Linear):
    "More than five items do not fit"
    def forward(self, x):
        if len(x) > 5: raise torch.OutOfMemoryError('too many')
        return super().forward(x)

def text():
    ds = L(torch.arange(n, n+n%7+3)%11 for n in range(20))
    return LMDataLoader(ds, lens=[len(o) for o in ds], bs=3, seq_len=4, shuffle=True)

def sorted_texts():
    ds = [(torch.rand(n%7+3, 3).sum(0), torch.ones(1)*n) for n in range(44)]
    return SortedDL(ds, sort_func=lambda o: o[1].item()%9, bs=8, shuffle=True, num_workers=0)

def tabular():
    df = pd.DataFrame(dict(a=np.arange(44.)%5, b=np.arange(44.)%7, y=np.arange(44.)))
    return TabularPandas(df, procs=[Normalize], cont_names=['a', 'b'], y_names='y').dataloaders(bs=8).train

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.lin = nn.Embedding(11, 5),nn.GRU(5, 5, batch_first=True),nn.Linear(5, 11)
        self.reset()
    def reset(self): self.h = None
    def forward(self, x):
        if self.h is None or self.h.shape[1] != len(x): self.h = torch.zeros(1, len(x), 5)
        out,h = self.rnn(self.emb(x.as_subclass(torch.Tensor)), self.h)
        self.h = h.detach()
        return self.lin(out)

class OfTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 1)
    def forward(self, cat, cont): return self.lin(cont)

uses = dict( # the fit, its other callbacks, its training loader, its model
    flat_cos=(lambda learn, cbs: learn.fit_flat_cos(3, .05, cbs=cbs), list, None, None),
    sgdr=(lambda learn, cbs: learn.fit_sgdr(2, 1, .05, cbs=cbs), list, None, None),
    lr_find=(found, list, None, None),
    each_epoch_saved=(one_cycle_of, lambda: [SaveModelCallback(every_epoch=True), CSVLogger(append=True)], None, None),
    plateau=(lambda learn, cbs: learn.fit(4, .5, cbs=cbs), lambda: [ReduceLROnPlateau(min_delta=10.), SaveModelCallback(reset_on_fit=False)], None, None),
    persistent=(one_cycle_of, list, lambda: DataLoader(Noisy(44, False), bs=8, shuffle=True, num_workers=2, persistent_workers=True), None),
    weighted=(one_cycle_of, list, weighted, None), sampled=(one_cycle_of, list, sampled, None),
    last_dropped=(one_cycle_of, list, lambda: DataLoader(Noisy(44), bs=8, shuffle=True, drop_last=True), None),
    a_part=(one_cycle_of, lambda: [ShortEpochCallback(.5)], None, None),
    goes_on=(one_cycle_of, lambda: [ShortEpochCallback(n_batches=4, resume=True)], None, None),
    longer=(one_cycle_of, lambda: [ShortEpochCallback(n_batches=7, resume=True)], None, None),
    goes_on_sampled=(one_cycle_of, lambda: [ShortEpochCallback(n_batches=4, resume=True)], sampled, None),
    overfit=(one_cycle_of, lambda: [ShortEpochCallback(n_batches=2, overfit=True)], None, None),
    some_validated=(one_cycle_of, lambda: [ShortEpochCallback(n_batches=3, n_valid=1)], None, None),
    half_full=(one_cycle_of, lambda: [GradientAccumulation(20), GradientClip(.1), CpuMixedPrecision()], None, None),
    flushed=(one_cycle_of, lambda: [GradientAccumulation(20, flush=True)], None, None),
    frozen=(one_cycle_of, lambda: [BnFreeze(all_layers=True)], None, lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False), nn.Linear(4, 1))),
    found_size=(one_cycle_of, lambda: [MicroBatch(), GradientAccumulation(20)], None, lambda: Heavy(3, 1)),
    text=(one_cycle_of, lambda: [ModelResetter()], text, Recurrent), sorted=(one_cycle_of, list, sorted_texts, None),
    tabular=(one_cycle_of, list, tabular, OfTable), start_epoch=(lambda learn, cbs: learn.fit(4, .05, cbs=cbs, start_epoch=1), list, None, None),
    bar=(one_cycle_of, lambda: [ProgressCallback(), ShowGraphCallback()], None, None),
    as_class=(one_cycle_of, lambda: [TerminateOnNaNCallback], None, None))

def used(use, folder):
    fit,cbs,loader,model = uses[use]
    set_seed(7)
    dls = loaders()
    if loader: dls.loaders[0] = loader()
    if use in ('text', 'tabular'): dls.loaders[1] = loader()
    set_seed(7)
    loss = CrossEntropyLossFlat() if use == 'text' else None
    learn = learner(folder, dls, model and model(), loss, metrics=None if use == 'text' else mae)
    learn.todo = lambda: fit(learn, [Kept(), Cuts(), Seen(), _Last(), *cbs()])
    return learn

@pytest.mark.parametrize('use', uses)
def test_uses(use, tmp_path):
    "Cut off several times in a row: in training, in validation, between two epochs"
    warnings.simplefilter('ignore')
    def end(folder, *cuts):
        for at in (*cuts, None): learn = fitted(folder, partial(used, use), at)
        return outcome(folder, learn)
    expected = end(tmp_path/'whole')
    n = len(expected['losses'])//len(expected['rows']) # batches of an epoch
    cuts = ('after_backward', 3), ('after_backward', 2), ('after_backward', n), ('after_pred', 2), ('after_epoch', 1), ('before_batch', n)
    assert differs(expected, end(tmp_path/'cut', *cuts)) == []

def test_a_disk_that_is_full(tmp_path):
    "A limit on the size of files is what a process can have of its own; the system refuses to write more"
    resource = pytest.importorskip('resource')
    expected = fitted(tmp_path/'whole', simple)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    def limit(n): return lambda cb: resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
    cbs = [At('before_batch', limit(9_000), it=2, ep=0), At('before_batch', limit(limits[0]), it=4, ep=0)]
    try:
        with pytest.warns(UserWarning, match='could not be written.*Training goes on') as seen: fitted(tmp_path, partial(simple, cbs=cbs), ('after_loss', 5))
        assert torch.load(file_of(tmp_path), weights_only=True)['place'] == [0, 'train', 2] and not (tmp_path/'resume.new').exists()
        assert len([o for o in seen if 'could not be' in str(o.message)]) == 1
        assert differs(expected.model.state_dict(), fitted(tmp_path, partial(simple, cbs=cbs)).model.state_dict()) == []
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits) # of this process, in which other tests follow

def test_a_folder_that_can_not_be_written(tmp_path):
    "It is no folder, for instance"
    (tmp_path/'models').write_text('a file')
    learn = simple(tmp_path, every=0)
    learn.model_dir = 'models'
    with pytest.warns(UserWarning, match='could not be written'): learn.todo()
    assert len(learn.recorder.losses) == 3*6

def test_two_in_one_fit(tmp_path):
    learn = simple(tmp_path, cbs=[ResumeFit('b')])
    with pytest.raises(ValueError, match='Two `ResumeFit`'): learn.todo()
    learn = simple(tmp_path)
    learn.fit(1, .05, cbs=ResumeFit) # as a class
    learn.add_cb(ResumeFit('c'))
    learn.fit(1, .05)
    with pytest.raises(ValueError, match='Two `ResumeFit`'): learn.fit(1, .05, cbs=ResumeFit)
    assert not [*tmp_path.glob('*.pth')]
