"""What is measured

A case has variants, each in a process of its own. Its function, `setup(variant, quick)`, builds and warms up, and
returns another that does one turn: `(value, unit, at)` for each thing measured, where `at` says at what. In a variant
such as 'here, 8', what follows the comma is a setting of its process. Each process imports no more than it needs.
"""
import resource, sys, time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

import peers


@dataclass
class Goal:
    "What `of` should be: in parts of `to`, to hundredths, or by itself"
    sense:str # 'at most' or 'at least'
    value:float
    unit:str
    of:str = 'here'
    to:str = None
    where:Callable = lambda at: True # at what it holds
    def met(self, o):
        if self.to: o = round(o, 2)
        return o <= self.value if self.sense == 'at most' else o >= self.value

@dataclass
class Case:
    name:str
    title:str
    variants:tuple
    goal:Goal
    setup:Callable
    sessions:int # sets of new processes
    turns:int # in each of them
    n_proc:int # of one variant
    env:dict # of each process
    device:str = 'cpu'

cases = {}
def case(title, variants, goal, sessions=1, turns=1, n_proc=1, env={}):
    "Make a case of a set-up function"
    def _inner(f):
        cases[f.__name__] = Case(f.__name__, title, tuple(variants), goal, f, sessions, turns, n_proc, env)
        return f
    return _inner


# What several of them need

def train(variant, *args, window, bs, **kwargs):
    "Train as `variant` does, in windows of `window` items from batches of `bs`"
    peers.peers[variant](*args, window=window, k=-(-window//bs), **kwargs)

def loader(data, bs): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), bs)

def pictures(n, size=32, device='cpu'):
    "Random pictures and classes"
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g).to(device), torch.randint(10, (n,), generator=g).to(device)

def resnet(device='cpu'):
    from torchvision.models import resnet18
    return resnet18(num_classes=10).to(device)

class Now:
    "A moment; the difference of two is in seconds. On a GPU it is the GPU that takes the time"
    def __init__(self, device):
        self.t = time.perf_counter() if device == 'cpu' else torch.cuda.Event(enable_timing=True)
        if device != 'cpu': self.t.record()
    def __sub__(self, earlier):
        if isinstance(self.t, float): return self.t-earlier.t
        self.t.synchronize()
        return earlier.t.elapsed_time(self.t)/1000

def window_seconds(variant, model, data, bs, window, device='cpu', **kwargs):
    "Train, and give the mean time from an optimizer step to the next"
    steps = []
    opt = peers.Noting(model.parameters(), 1e-3, lambda: steps.append(Now(device)))
    train(variant, model, loader(data, bs), nn.CrossEntropyLoss(), opt, bs=bs, window=window, **kwargs)
    return (steps[-1]-steps[0])/(len(steps)-1)

def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter()-start

def quiet_fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)

def at_precision(precision): return {} if precision is None else dict(precision=precision)


# The cases

@case('Exactness: the largest error of a gradient', peers.peers, Goal('at most', 1e-6, 'of the gradient'))
def exactness(variant, quick):
    grid = [(64, 8, 32), (60, 8, 32), (40, 8, 32), (50, 8, 20), (96, 12, 32), (96, 48, 32)][:2 if quick else None]
    def error(loss, items, bs, window):
        g = torch.Generator().manual_seed(0)
        x,y = torch.randn(items, 8, generator=g), torch.randint(4, (items,), generator=g)
        if loss == 'masked': # -100 is what the loss ignores
            y[torch.rand(items, generator=g) < torch.linspace(.1, .8, items)] = -100
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        twin,seen,errors = deepcopy(model).double(),[],[]
        loss_func = nn.CrossEntropyLoss(reduction='sum' if loss == 'sum' else 'mean')
        def compare():
            "With the gradient of all that was seen since the last step as one batch, in double precision"
            batch = torch.cat(seen)
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            loss_func(twin(batch.double()), y[(batch[:,None] == x).all(2).int().argmax(1)]).backward()
            ours,exact = [torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (model, twin)]
            errors.append(((ours-exact).norm()/exact.norm()).item())
            seen.clear()
        model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        train(variant, model, loader((x, y), bs), loss_func, peers.Noting(model.parameters(), .01, compare), bs=bs,
              window=window, n_epoch=2, count=(lambda yb: (yb[0] != -100).sum()) if loss == 'masked' else None)
        return max(errors)
    def turn():
        for loss,(items,bs,window) in product(('mean', 'masked', 'sum'), grid):
            at = dict(loss=loss, items=items, batch=bs, window=window)
            yield error(loss, items, bs, window), 'of the gradient', at
    return turn


@case('Overhead: a tiny model, with each callback', ('no callback', 'fastai', 'here'),
      Goal('at most', 1, 'µs a batch', to='fastai'), sessions=5, turns=6)
def overhead(variant, quick, device='cpu', precision=None):
    from fastai.basics import DataLoaders, Learner, SGD
    from fastai.callback.all import MixedPrecision
    import fastai.callback.training as fastai
    import fastcb_training.all as here
    batches = [(torch.randn(16, 2, device=device), torch.randn(16, 1, device=device))]*(100 if quick else 400)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).to(device)
    model[1].requires_grad_(False)
    learn = Learner(DataLoaders(batches, []), model, nn.MSELoss(), opt_func=SGD, train_bn=False,
                    cbs=[MixedPrecision(amp_mode=precision)] if precision else [])
    source = dict(here=here, fastai=fastai).get(variant)
    callbacks = dict(ShortEpochCallback=[.5], GradientAccumulation=[64], GradientClip=[], BnFreeze=[])
    def turn():
        quiet_fit(learn) # after the turns of the others the first fit is slow
        for name,args in callbacks.items():
            start,cbs = Now(device),[getattr(source, name)(*args)] if source else []
            quiet_fit(learn, *cbs)
            yield (Now(device)-start)/learn.train_iter*1e6, 'µs a batch', dict(callback=name)|at_precision(precision)
    list(turn()) # warms up
    return turn


# glibc gives memory back after a batch and fetches it again, more in one process than in the next; here it keeps it
keep_memory = dict.fromkeys(('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'), str(2**32))

@case('Throughput: accumulation, resnet18 at 32 pixels, batches of 16, windows of 64', peers.peers,
      Goal('at least', .98, 'items a second', to='plain loop'), sessions=2, turns=8, env=keep_memory)
def throughput(variant, quick, device='cpu', precision=None):
    model,data = resnet(device),pictures(64*(2 if quick else 16), device=device)
    def turn():
        took = window_seconds(variant, model, data, bs=16, window=64, device=device, precision=precision)
        yield 64/took, 'items a second', at_precision(precision)
    list(turn()) # warms up
    return turn


@case('Memory: windows of 256, resnet18 at 64 pixels',
      ('one batch, 256', *(f'{v}, {bs}' for v in ('small batch', 'here', 'fastai') for bs in (8, 16, 32))),
      Goal('at most', 1.02, 'MiB', to='small batch'), sessions=3)
def memory(variant, quick, device='cpu', precision=None):
    name,bs = variant.split(', ')
    bs = int(bs)
    window = 256 if name in ('here', 'fastai') else bs # where the small batch is the limit, it is a window
    def turn():
        window_seconds(name if name in peers.peers else 'plain loop', resnet(device), data, bs=bs, window=window,
                       device=device, precision=precision)
        peak = torch.cuda.max_memory_allocated() if device == 'cuda' else resident_peak()
        yield peak/2**20, 'MiB', dict(batch=bs)|at_precision(precision)
    import fastai.callback.all, fastcb_training.all # in each, so that what is compared is the training
    data = pictures(512, size=32 if quick else 64, device=device)
    return turn

def resident_peak():
    "The most memory that this process has had, in bytes"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)


@case('Short epochs: seconds against the part of an epoch', ('limit', 'fastai', 'here'),
      Goal('at most', 1.10, 's', to='limit'), sessions=1, turns=5)
def short_epochs(variant, quick):
    from fastai.callback.core import Callback
    from fastai.callback.training import ShortEpochCallback as fastai
    from fastai.vision.all import DataLoader, DataLoaders, Learner, PILImage, get_image_files, SGD, tensor
    from fastcb_training.data import digits
    from fastcb_training.shortepoch import ShortEpochCallback as here
    class Span(Callback):
        "How long it took from when the first batch was there to when the last was trained"
        def before_fit(self): self.first = None
        def before_batch(self): self.first = self.first or time.perf_counter()
        def after_train(self): self.took = time.perf_counter()-self.first
    n,bs,files = 20 if quick else 100,8,get_image_files(digits(size=64))
    class Digits:
        def __len__(self): return n*bs
        def __getitem__(self, i):
            image = PILImage.create(files[i]).resize((32, 32))
            return tensor(image).permute(2, 0, 1)/255, int(files[i].parent.name)
    def seconds_to_end(dl):
        "How long it takes to put the loader down after its first batch, with workers that have begun on others"
        batches = iter(dl)
        next(batches)
        start = time.perf_counter()
        batches.close()
        dl.__dict__.pop('it', None)
        return time.perf_counter()-start
    def learner(workers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
                              nn.Linear(32*28*28, 10))
        dls = DataLoaders(DataLoader(Digits(), bs=bs, shuffle=True, num_workers=workers), [])
        return Learner(dls, model, nn.CrossEntropyLoss(), opt_func=SGD)
    learners = {workers: learner(workers) for workers in (0, 2)}
    parts = (.1, 1) if quick else (.01, .02, .05, .1, .2, .5, 1)
    def turn():
        quiet_fit(learners[0], here(n_batches=5)) # after the turns of the others the first fit is slow
        for workers,learn in learners.items():
            if variant == 'limit':
                whole,ends = seconds(quiet_fit, learn, span := Span()),seconds_to_end(learn.dls.train)
            for pct in parts:
                if variant != 'limit': took = seconds(quiet_fit, learn, shortened(pct))
                else: took = whole-(1-pct)*span.took + ends*(pct < 1)
                yield took, 's', dict(workers=workers, pct=pct)
    shortened = dict(here=here, fastai=fastai).get(variant)
    quiet_fit(learners[2], here(n_batches=5)) # warms up
    return turn


@case('Processes: two of them, 4 million parameters, batches of 8 in windows of 64', ('here', 'fastai', 'Accelerate'),
      Goal('at most', .75, 's an epoch', to='fastai'), sessions=2, turns=5, n_proc=2)
def processes(variant, quick):
    from accelerate import Accelerator
    from fastai.distributed import DistributedDL
    import fastai.vision.all
    from torch import distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    Accelerator(cpu=True) # starts the process group
    def broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast # fastai's calls `.cuda()`
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                          nn.Linear(1024, 10)) # gradients that are large against the arithmetic
    n_steps,syncs = 2 if quick else 8,0
    data = pictures(n_steps*64*dist.get_world_size())
    def counted(ddp):
        nonlocal syncs
        def hook(state, bucket):
            nonlocal syncs
            syncs += bucket.is_last()
            return allreduce_hook(None, bucket)
        syncs = 0
        ddp.register_comm_hook(None, hook)
    def turn():
        took = window_seconds(variant, model, data, bs=8, window=64, wrapped=counted,
                              ctx=lambda learn: learn.distrib_ctx(cpu=True, sync_bn=False))
        yield took*n_steps, 's an epoch', {}
        yield syncs, 'synchronisations an epoch', {}
    list(turn()) # warms up
    return turn


@case('Scale: batchnorm layers, to find the frozen ones and to look at each before a batch', ('line', 'fastai', 'here'),
      Goal('at most', 1.25, 'ms', to='line', where=lambda at: at['layers'] > 1000), turns=5)
def scale_layers(variant, quick):
    from fastai.callback.training import set_bn_eval
    from fastcb_training.bnfreeze import BnFreeze, frozen_bn
    def tasks(n):
        "What is timed on a frozen model of `n` layers"
        model = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(n))).requires_grad_(False)
        if variant == 'fastai': return dict(find=partial(set_bn_eval, model))
        cb = BnFreeze()
        cb.learn = SimpleNamespace(model=model, train_bn=False, training=True)
        cb.before_train()
        forward = partial(model, torch.ones(2, 1))
        return {'find': partial(frozen_bn, model), 'look': cb.before_batch, 'forward pass': forward}
    def turn():
        for n in sizes:
            for what,f in models[n].items():
                took = median(seconds(f) for _ in range(max(3, 1000//n)))*1000
                if variant != 'line': yield took, 'ms', dict(what=what, layers=n)
                else:
                    for m in (n, 10*n): yield took*m/n, 'ms', dict(what=what, layers=m)
    sizes = [1000] if variant == 'line' else [10, 100, 1000] if quick else [10, 100, 1000, 10_000]
    models = {n: tasks(n) for n in sizes}
    list(turn()) # warms up
    return turn


@case('Scale: a short epoch of two batches, from loaders of any length', ('loader alone', 'fastai', 'here'),
      Goal('at most', 1.10, 'ms', to='loader alone'), turns=5)
def scale_items(variant, quick):
    from fastai.basics import DataLoader, DataLoaders, Learner, SGD
    from fastai.callback.training import ShortEpochCallback as fastai
    from fastcb_training.shortepoch import ShortEpochCallback as here
    class Items:
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): return torch.ones(2), torch.ones(1)
    class Two:
        "A loader's first two batches, as a loader"
        def __init__(self, dl): self.dl = dl
        def __len__(self): return 2
        def __iter__(self): return islice(self.dl, 2)
    def turn():
        for n in sizes:
            dl = DataLoader(Items(n), bs=16)
            cbs = dict(here=[here(n_batches=2)], fastai=[fastai(1/len(dl))]).get(variant, []) # fastai's trains one more
            learn = Learner(DataLoaders(dl if cbs else Two(dl), []), nn.Linear(2, 1), nn.MSELoss(), opt_func=SGD)
            took = median(seconds(quiet_fit, learn, *cbs) for _ in range(1 if n > 10**6 else 9))
            yield took*1000, 'ms', dict(items=n)
    sizes = (10**2, 10**4) if quick else [10**i for i in range(2, 8)]
    list(turn()) # warms up
    return turn


@case('Scale: closing a window, by the number of gradients', ('one tensor', 'one by one', 'here'),
      Goal('at most', 1.10, 'ms', to='one tensor', where=lambda at: at['parameters'] >= 10**7), turns=5)
def scale_parameters(variant, quick):
    import psutil
    from fastcb_training.accumulation import _Window
    def cost(n):
        "Milliseconds to divide the gradients of `n` parameters, in a hundred tensors, by what was gathered"
        grads = [torch.ones(n)] if variant == 'one tensor' else [torch.ones(n//100) for _ in range(100)]
        params,window = [SimpleNamespace(grad=g) for g in grads],_Window()
        window.open(64, params)
        def close():
            window.unit = 64 # of the last batch, in a window of 72 items
            if variant == 'here': window.measure(72)
            else:
                for g in grads: g.mul_(64/72)
        return median(seconds(close) for _ in range(max(3, min(1000, 10**7//n))))*1000
    def turn():
        for n in [10**i for i in range(4, 7 if quick else 10)]:
            if 4*n < psutil.virtual_memory().available/2: yield cost(n), 'ms', dict(parameters=n)
    list(turn()) # warms up
    return turn


# Some of them again on a GPU

def on_gpu(setup, variant, quick):
    variant,_,precision = variant.rpartition(', ')
    return setup(variant, quick, device='cuda', precision=precision)

for c in [cases[name] for name in ('overhead', 'throughput', 'memory')]:
    cases[f'cuda_{c.name}'] = replace(
        c, name=f'cuda_{c.name}', title=f'{c.title}, on a GPU', setup=partial(on_gpu, c.setup), device='cuda',
        variants=tuple(f'{v}, {p}' for p in ('fp16', 'bf16') for v in c.variants))
