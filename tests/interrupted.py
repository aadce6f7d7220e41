"""Fits that are killed, for test_resume.py. It imports everything once, then forks a process for each life of a fit

Each line that it reads is a case and the deaths that its lives die; each that it writes says how they ended.
The process that forks never trains: then a child can, also where there is a GPU, which is hidden."""
import json, os, signal, socket, sys, traceback
from pathlib import Path

if __name__ == '__main__': os.environ['CUDA_VISIBLE_DEVICES'] = ''

from common import *
from fastcb_training.all import *
from fastcb_training import resume
from fastcb_training.core import FitCallback
from fastcb_training.playground import cpu_processes
from fastcb_training.resume import ResumeFit
import sklearn.metrics as skm


# What is trained

class Noisy:
    "Items with noise: random numbers of Python's, NumPy's, PyTorch's and a generator of its own"
    def __init__(self, n, draws=True):
        g = torch.Generator().manual_seed(n)
        self.x,self.draws,self.rng = torch.randn(n, 3, generator=g),draws,np.random.default_rng(0)
        self.y = self.x @ tensor([[1.], [-2.], [3.]])+1
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        x = self.x[i]
        if self.draws: x = x+random.random()/9+np.random.rand()/9+torch.rand(3)/9+self.rng.random()/9
        return x.float(),self.y[i]

class Net(nn.Module):
    "Batchnorm, dropout, a buffer that no file of fastai's has, and a memory of the last batch"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 1))
        self.register_buffer('mean', torch.zeros(3), persistent=False)
        self.hidden,self.n = [torch.zeros(1)],0
    def forward(self, x):
        if self.training:
            self.n += 1
            self.mean = .9*self.mean+.1*x.mean(0).detach()
        out = self.layers(x+self.mean)+self.hidden[0]+self.n/100
        self.hidden = [.5*out.detach().mean(0)]
        return out

class Seen(Callback):
    "Which batches were trained and validated; its lists go on, since they are data"
    order = 200
    last = None
    def __init__(self): self.xs = []
    def after_batch(self): self.xs.append(self.xb[-1].double().sum().item()+100*self.training)

class Every2(Callback):
    "Step after two batches, with `state_dict` and what a phase resets"
    order = 8
    def __init__(self): self._n,self._seen = 0,object()
    def before_epoch(self): self.in_epoch = 0
    def before_step(self):
        vars(self).update(_n=self._n+1, in_epoch=self.in_epoch+1)
        if self._n%2: raise CancelBatchException
    def state_dict(self): return dict(n=self._n, in_epoch=self.in_epoch)
    def load_state_dict(self, state): vars(self).update(_n=state['n'], in_epoch=state['in_epoch'])

class Plateau(FitCallback):
    "The protocol of a callback of ours: its state comes before the epoch's events"
    order = 7
    def start_fit(self): self._told = []
    def before_epoch(self): getattr(self, '_told', []).append('epoch')
    def after_batch(self): self._told.append(self.iter)
    def state_dict(self): return dict(told=list(self._told))
    def load_state_dict(self, state):
        assert self._in_fit
        self._told = state['told']

def mae(p, t): return (p-t).abs().mean()
def rmse(): return skm_to_fastai(skm.mean_squared_error)

def loaders(workers=0, n=44, bs=8, cls=DataLoader, draws=True, generator=False):
    def dl(n, shuffle):
        if cls is DataLoader: return DataLoader(Noisy(n, draws), bs=bs, shuffle=shuffle, num_workers=workers)
        return cls(Noisy(n, draws), batch_size=bs, shuffle=shuffle, num_workers=workers, generator=torch.Generator() if generator else None)
    return DataLoaders(dl(n, True), dl(20, True), device='cpu')

def learner(folder, dls=None, model=None, loss_func=None, **kwargs):
    set_seed(7)
    return quiet(Learner(dls or loaders(), model or Net(), loss_func or MSELossFlat(), path=folder, model_dir='.', **kwargs))

class Kept(ResumeFit):
    "Save after every batch, or where an environment variable says"
    def __init__(self, every=0., **kwargs): super().__init__(every=every, **kwargs)

def plain(folder):
    learn = learner(folder, opt_func=partial(SGD, mom=.9), metrics=[mae, rmse()])
    learn.fit(3, .05, cbs=[Kept(), Seen()])
    return learn

def one_cycle(folder):
    learn = learner(folder, metrics=[mae, rmse()])
    learn.recorder.train_metrics = True
    learn.fit_one_cycle(3, .05, cbs=[Kept(), Seen(), Every2(), Plateau(), CSVLogger(), SaveModelCallback('valid_loss', with_opt=True)])
    return learn

def trackers(folder):
    (Path(folder)/'history.csv').exists() or (Path(folder)/'history.csv').write_text('of an earlier fit\n')
    learn = learner(folder, metrics=mae)
    learn.fit(6, .5, cbs=[Kept(), Seen(), CSVLogger(append=True), ReduceLROnPlateau(min_delta=10., patience=1), EarlyStoppingCallback(min_delta=10., patience=4)])
    return learn

def torch_loaders(folder):
    learn = learner(folder, loaders(cls=torch.utils.data.DataLoader))
    learn.fit(3, .05, cbs=[Kept(), Seen()])
    return learn

def torch_generator(folder):
    learn = learner(folder, loaders(cls=torch.utils.data.DataLoader, generator=True), opt_func=OptimWrapper_Adam)
    learn.fit(3, .05, cbs=[Kept(), Seen()])
    return learn

def OptimWrapper_Adam(params, **kwargs): return OptimWrapper(params, torch.optim.AdamW, **kwargs)

def workers(folder):
    learn = learner(folder, loaders(2, draws=False))
    learn.fit(2, .05, cbs=[Kept(), Seen()])
    return learn

def torch_workers(folder):
    learn = learner(folder, loaders(2, draws=False, cls=torch.utils.data.DataLoader))
    learn.fit(2, .05, cbs=[Kept(), Seen()])
    return learn

def mixed(folder):
    learn = learner(folder)
    learn.fit_one_cycle(3, .05, cbs=[Kept(), Seen(), CpuMixedPrecision(init_scale=2.**20, growth_interval=3)])
    return learn

class Classes(Noisy):
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x,(y > 0).long()[0]

def mixup(folder):
    dls = DataLoaders(DataLoader(Classes(44), bs=8, shuffle=True), DataLoader(Classes(20), bs=8), device='cpu')
    learn = learner(folder, dls, nn.Sequential(Net(), nn.Linear(1, 2)), CrossEntropyLossFlat())
    learn.fit(3, .05, cbs=[Kept(), Seen(), MixUp()])
    return learn

def stream(folder):
    class Stream(Noisy):
        "Batches that can't be asked for by number"
        def __iter__(self): return (self[i] for i in range(len(self)))
    dls = DataLoaders(DataLoader(Stream(44), bs=8, indexed=False), DataLoader(Stream(20), bs=8, indexed=False), device='cpu')
    learn = learner(folder, dls)
    learn.fit(3, .05, cbs=[Kept(), Seen()])
    return learn

def tuned(folder):
    learn = learner(folder, splitter=lambda m: [params(m.layers[:3]), params(m.layers[3:])], metrics=mae)
    learn.fine_tune(2, .05, freeze_epochs=2, cbs=[Kept(), Seen(), CSVLogger(append=True)])
    return learn

def ours(folder):
    learn = learner(folder)
    learn.fit_one_cycle(3, .05, cbs=[Kept(), Seen(), GradientAccumulation(20), GradientClip(.5), ShortEpochCallback(n_batches=4, resume=True),
        BnFreeze(), MicroBatch(3)])
    return learn

def features(folder):
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    learn = learner(folder, loaders(draws=False), nn.Sequential(body, nn.Sequential(nn.Dropout(.2), nn.Linear(4, 1))), train_bn=False, metrics=mae)
    learn.fit(3, .05, cbs=[Kept(), Seen(), FeatureCache()])
    return learn

def two(folder):
    "On each of two processes; half of the data, other random numbers"
    from accelerate import Accelerator
    import fastai.distributed
    cpu_processes()
    Accelerator(cpu=True)
    learn = learner(folder, model=Net(), metrics=mae)
    learn.model.layers[3].p = .5
    set_seed(rank_distrib())
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_one_cycle(3, .05, cbs=[Kept(), Seen(), *([CSVLogger()] if not rank_distrib() else [])])
    return learn

cases = {f.__name__: f for f in (plain, one_cycle, trackers, torch_loaders, torch_generator, workers, torch_workers, mixed, mixup, stream, tuned, ours, features, two)}


# How it dies

class Dies(Callback):
    "Kill the process at the `n`-th of some events of this life"
    order = 150
    def __init__(self, *plan): self._plan = _Plan(*plan)
    def __call__(self, event): self._plan(self, event)

class _Plan:
    "No data, so that each life keeps its own"
    def __init__(self, sig, when, n, phase=None): store_attr()
    def __call__(self, cb, event):
        if event != self.when or self.phase and self.phase != ('train' if cb.training else 'valid'): return
        self.n -= 1
        if self.n == 0: os.kill(os.getpid(), self.sig)

def dies_in(name, n):
    "Kill at the `n`-th call of a function of the module `os`, or half-way through a `torch.save`"
    left = [n]
    owner = torch if name == 'save' else os
    f = getattr(owner, name)
    def _inner(*args, **kwargs):
        left[0] -= 1
        if left[0]: return f(*args, **kwargs)
        if name == 'save':
            f(*args)
            os.truncate(args[1], os.path.getsize(args[1])//2)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, _inner)

def state_of(opt):
    sd = opt.state_dict()
    return resume._pack([dict(o) for o in sd['state']] if not isinstance(sd['state'], dict) else sd['state']),resume._pack([dict(o) for o in opt.hypers])

def outcome(folder, learn):
    "What a fit leaves"
    rec = learn.recorder
    csv = Path(folder)/'history.csv'
    cut = lambda row: row.rpartition(',')[0] or row
    return dict(weights={k: o.clone() for k,o in learn.model.state_dict().items()}, opt=state_of(learn.opt), hidden=[list(o.hidden)+[o.n, o.mean] for o in learn.model.modules() if isinstance(o, Net)],
        grads=[None if p.grad is None else p.grad for p in learn.model.parameters()],
        rows=[list(o) for o in rec.values], losses=[o.item() for o in rec.losses], lrs=[float(o) for o in rec.lrs], iters=rec.iters, names=list(rec.metric_names),
        hps=resume._pack(getattr(rec, 'hps', None)), pct=learn.pct_train, train_iter=learn.train_iter, seen=Seen.last, trackers=_Last.trackers,
        csv=[cut(o) for o in csv.read_text().splitlines()] if csv.exists() else None,
        random=[random.random(), np.random.rand(), torch.rand(2), *(next(iter(dl))[0] for dl in learn.dls.loaders if not getattr(dl, 'num_workers', 0))],
        files=sorted(o.name for o in Path(folder).glob('*') if o.name.startswith('resume.rank' if rank_distrib() else 'resume') and (rank_distrib() or 'rank' not in o.name)))

def life(case, folder, death):
    how,*args = death or ('SIGKILL', None, 0)
    if how == 'os': dies_in(*args)
    defaults.callbacks = [*defaults.callbacks, Dies(getattr(signal, how, None), *args), _Last]
    set_seed(7) # Python's random numbers are others after a fork
    learn = cases[case](folder)
    with open(Path(folder)/f'outcome{os.environ.get("RANK", "")}', 'wb') as f: torch.save(outcome(folder, learn), f)

class _Last(Callback):
    "What callbacks know that are taken back when the fit is over"
    order,trackers = 300,None
    def after_fit(self):
        Seen.last = self.learn.seen.xs if hasattr(self.learn, 'seen') else None
        _Last.trackers = [(type(o).__name__, o.best, getattr(o, 'wait', None)) for o in self.learn.cbs if isinstance(o, TrackerCallback)]

def born(case, folder, death, **env):
    "The number of a process in which the fit runs"
    if pid := os.fork(): return pid
    code = 1
    try:
        os.environ.update(env)
        log = os.open(f'{folder}/log', os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        life(case, folder, death)
        code = 0
    except BaseException: traceback.print_exc()
    for o in sys.stdout,sys.stderr: o.flush()
    os._exit(code)

def together(case, folder, death):
    "Two processes; when one has died, so does the other. It is the first, or the second, that is killed"
    with socket.socket() as o:
        o.bind(('127.0.0.1', 0))
        env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(o.getsockname()[1]))
    dying,pids = death[-1] if death else None,[]
    for rank in range(2):
        pids.append(born(case, folder, death[:-1] if rank == dying else None, RANK=str(rank), LOCAL_RANK=str(rank), **env))
    ends = []
    while pids:
        pid,status = os.wait()
        pids.remove(pid)
        ends.append(os.waitstatus_to_exitcode(status))
        if ends[0]:
            for o in pids: os.kill(o, signal.SIGKILL)
    return next((o for o in ends if o), 0)

def lives(case, folder, deaths):
    "Run until it ends; how each life ended"
    ends = []
    for death in [*deaths, None]:
        if case == 'two': ends.append(together(case, folder, death))
        else: ends.append(os.waitstatus_to_exitcode(os.waitpid(born(case, folder, death), 0)[1]))
        if ends[-1] >= 0: break
    return ends

if __name__ == '__main__':
    for line in sys.stdin:
        print(json.dumps(lives(**json.loads(line))), flush=True)
