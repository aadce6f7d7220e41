"""What is measured

A case has variants, each in a process of its own. Its function, `setup(variant, quick)`, builds and warms up, and
returns another that does one turn: `(value, unit, at)` for each thing measured, where `at` says at what. In a variant
such as 'here, 8', what follows the comma is a setting of its process. Each process imports no more than it needs.
"""
import os, resource, shutil, sys, time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

import peers


@dataclass
class Goal:
    "What `of` should be: in parts of `to`, to hundredths, or by itself"
    claim:str # what is measured, and in parts of what
    sense:str # 'at most' or 'at least'
    value:float
    unit:str
    of:str = 'here'
    to:str = None
    peers:tuple = () # what would be used instead
    limit:str|float = None # the variant that can't be bettered, or what is known to be the best
    where:Callable = lambda at: True # at what it holds
    def met(self, o):
        if self.to: o = round(o, 2)
        return o <= self.value if self.sense == 'at most' else o >= self.value

@dataclass
class Case:
    name:str
    title:str
    variants:tuple
    goals:tuple
    setup:Callable
    sessions:int # sets of new processes
    turns:int # in each of them
    minutes:float # after which no more turns begin
    n_proc:int # of one variant
    env:dict # of each process
    device:str = 'cpu'

cases = {}
def case(title, variants, *goals, sessions=1, turns=1, minutes=2, n_proc=1, env={}):
    "Make a case of a set-up function"
    def _inner(f):
        cases[f.__name__] = Case(f.__name__, title, tuple(variants), goals, f, sessions, turns, minutes, n_proc, env)
        return f
    return _inner


# What several of them need

def train(variant, *args, window, bs, **kwargs):
    "Train as `variant` does, in windows of `window` items from batches of `bs`"
    (peers.peers | dict(Learner=peers.bare_learner))[variant](*args, window=window, k=-(-window//bs), **kwargs)

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

def window_seconds(variant, model, data, bs, window, device='cpu', work=None, **kwargs):
    "Train; the mean time from an optimizer step to the next, and with `work` what is left of it without that"
    marks,loss_func = [],work.loss_func if work else nn.CrossEntropyLoss()
    opt = peers.Noting(model.parameters(), 1e-3, lambda: marks.append((Now(device), work.seconds if work else 0)))
    if work: opt.step_alone,opt.zero_grad = work.timed(opt.step_alone),work.timed(opt.zero_grad)
    train(variant, model, loader(data, bs), loss_func, opt, bs=bs, window=window, **kwargs)
    (start,begun),*_,(end,done) = marks
    n = len(marks)-1
    return ((end-start)/n, (end-start-(done-begun))/n) if work else (end-start)/n

class Work:
    "Adds up the time of what any training does: model, loss, backward pass, optimizer, loader"
    def __init__(self, model):
        from torch.utils.data import dataloader
        self.seconds,self.loss_func = 0,nn.CrossEntropyLoss()
        for o,name in ((model, 'forward'), (self.loss_func, 'forward'), (torch.Tensor, 'backward'),
                       (dataloader._BaseDataLoaderIter, '__next__')): setattr(o, name, self.timed(getattr(o, name)))

    def timed(self, f):
        def _inner(*args, **kwargs):
            start = time.perf_counter()
            try: return f(*args, **kwargs)
            finally: self.seconds += time.perf_counter()-start
        return _inner

def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter()-start

def quiet_fit(learn, *cbs):
    import fastai.callback.progress # has `no_bar`
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)

def at_precision(precision): return {} if precision is None else dict(precision=precision)


# The cases

@case('Exactness: the largest error of a gradient', peers.peers,
      Goal('error of a gradient, in parts of the gradient of the big batch', 'at most', 1e-6, 'of the gradient',
           peers=peers.others))
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
      Goal("a batch of a tiny model, in parts of fastai's callback", 'at most', 1, 'µs a batch', to='fastai',
           peers=['fastai'], limit='no callback'), sessions=4, turns=5)
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

@case('Throughput: accumulation, resnet18 at 32 pixels, batches of 16, windows of 64', (*peers.peers, 'Learner'),
      Goal('items a second with accumulation, in parts of a plain loop', 'at least', .98, 'items a second',
           to='plain loop', peers=['fastai', 'Lightning', 'Accelerate'], limit='plain loop'),
      Goal("items a second with accumulation, in parts of fastai's Learner without a callback", 'at least', 1,
           'items a second', to='Learner', peers=['fastai'], limit='Learner'),
      sessions=2, turns=5, minutes=4, env=keep_memory)
def throughput(variant, quick, device='cpu', precision=None):
    model,data = resnet(device),pictures(64*(2 if quick else 16), device=device)
    def turn():
        took = window_seconds(variant, model, data, bs=16, window=64, device=device, precision=precision)
        yield 64/took, 'items a second', at_precision(precision)
    list(turn()) # warms up
    return turn


@case('Memory: windows of 256, resnet18 at 64 pixels',
      ('one batch, 256', *(f'{v}, {bs}' for v in ('small batch', 'here', 'fastai') for bs in (8, 32))),
      Goal('peak memory of accumulation, in parts of the small batch without', 'at most', 1.02, 'MiB', to='small batch',
           peers=['fastai'], limit='small batch'), sessions=2, minutes=3)
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
      Goal('a short epoch, in parts of what is expected of its share of a whole one', 'at most', 1.10, 's', to='limit',
           peers=['fastai'], limit='limit'), turns=5)
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


@case('Own time: what a batch costs beside model, loss, backward pass, optimizer and loader; training as in throughput',
      (*peers.peers, 'Learner'), sessions=2, turns=4, env=keep_memory)
def own_time(variant, quick):
    settings = learner_settings() if variant == 'Learner' else {'as in throughput': {}}
    model,data = resnet(),pictures(64*(2 if quick else 4))
    work = Work(model)
    def turn():
        for name,kwargs in settings.items():
            _,own = window_seconds(variant, model, data, bs=16, window=64, work=work, **kwargs)
            yield own/4*1e6, 'µs a batch', dict(setting=name)
    list(turn()) # warms up
    return turn

def learner_settings():
    "fastai's Learner as it comes, and then without what each name says, and without all those before"
    from fastai.basics import Learner, Recorder
    from fastai.callback.all import event
    class NoDevice(Learner):
        def _set_device(self, b): return b
    class NoCopy(NoDevice):
        def _do_one_batch(self):
            self.pred = self.model(*self.xb)
            self('after_pred')
            self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
            self('after_loss')
            if self.training: self._do_grad_opt()
    class NoEvents(NoCopy):
        def __call__(self, name):
            if not name.endswith(('_batch', '_pred', '_loss', '_backward', '_step')): super().__call__(name)
    return {'the Learner as it comes': dict(bar=True), 'the progress bar': {}, 'the Recorder': dict(less=[Recorder]),
            'to_device': dict(less=[Recorder], kind=NoDevice),
            'the copy of the loss': dict(less=[Recorder], kind=NoCopy),
            'the events of a batch': dict(less=[Recorder], kind=NoEvents)}


@case('Processes: two of them, 4 million parameters, batches of 8 in windows of 64',
      ('here', 'fastai', 'Accelerate', 'here without Recorder'),
      Goal("an epoch in two processes, in parts of fastai's callback", 'at most', .75, 's an epoch', to='fastai',
           peers=['fastai', 'Accelerate']),
      Goal("an epoch in two processes, in parts of Accelerate's own loop", 'at most', 1.10, 's an epoch',
           to='Accelerate', peers=['fastai', 'Accelerate']), sessions=2, turns=6, n_proc=2)
def processes(variant, quick):
    from accelerate import Accelerator
    from fastai.vision.all import Recorder
    from fastcb_training.playground import cpu_processes
    from torch import distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    Accelerator(cpu=True) # starts the process group
    cpu_processes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                          nn.Linear(1024, 10)) # gradients that are large against the arithmetic
    n_steps,syncs,work = 2 if quick else 8,0,Work(model)
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
        took,own = window_seconds(variant.partition(' ')[0], model, data, bs=8, window=64, wrapped=counted, work=work,
                                  less=[Recorder]*variant.endswith('Recorder'),
                                  ctx=lambda learn: learn.distrib_ctx(cpu=True, sync_bn=False))
        yield took*n_steps, 's an epoch', {}
        yield own*n_steps, 's an epoch, without the work', {}
        yield syncs, 'synchronisations an epoch', {}
    list(turn()) # warms up
    return turn


@case('MicroBatch: resnet18, batches of 64, whole and in microbatches of 16',
      ('whole batch', 'here, 64', 'here, 16', 'split loss', 'small batch'),
      Goal('a batch with MicroBatch where all fits, in parts of no callback', 'at most', 1.01, 's for 64 items',
           to='whole batch', limit='whole batch', where=lambda at: at['at once'] == 64),
      Goal('a batch in four microbatches, in parts of the whole batch', 'at most', 1.40, 's for 64 items',
           to='whole batch', peers=['split loss', 'small batch'], limit=4/3, where=lambda at: at['at once'] == 16),
      turns=5, minutes=3, env=keep_memory)
def microbatch(variant, quick, device='cpu'):
    from fastai.callback.core import Callback
    class Ends(Callback):
        "When each batch was over"
        order = 1000
        def before_fit(self): self.at = []
        def after_batch(self): self.at.append(Now(device))
    name,_,size = variant.partition(', ')
    sizes = [16, 32] if quick else [64, 128]
    learners = {px: split_learner(name, pictures(64, size=px, device=device), 3, device) for px in sizes}
    cbs = micro_batches(name, int(size or 64))
    def turn():
        for px,(learn,every) in learners.items():
            quiet_fit(learn, ends := Ends(), *cbs)
            marks = ends.at[every-1::every]
            took = median(b-a for a,b in zip(marks, marks[1:]))
            for m in [int(size)] if size else [64, 16] if name == 'whole batch' else [16]:
                yield took, 's for 64 items', {'at once': m, 'pixels': px}
    list(turn()) # warms up
    return turn

def micro_batches(name, size):
    from fastcb_training.microbatch import MicroBatch
    return [MicroBatch(size)] if name == 'here' else []

def split_learner(name, data, n, device='cpu'):
    "A Learner for `n` times 64 items, and in how many batches it takes those"
    from fastai.basics import DataLoaders, Learner, SGD
    class SplitLoss(Learner):
        "Composer's way, by hand: each part's share of a mean loss goes back as soon as it has been through the model"
        def _do_one_batch(self):
            (x,),(y,) = self.xb,self.yb
            self.loss = 0
            for x_,y_ in zip(x.split(16), y.split(16)):
                loss = self.loss_func(self.model(x_), y_)*len(x_)/len(x)
                loss.backward()
                self.loss += loss.detach()
            self.opt.step()
            self.opt.zero_grad()
    small = name.startswith('small batch')
    batches = [*zip(*(o.split(16 if small else 64) for o in data))]*n
    kind = SplitLoss if name == 'split loss' else Learner
    learn = kind(DataLoaders(batches, []), resnet(device), nn.CrossEntropyLoss(), opt_func=SGD)
    return learn,4 if small else 1


# glibc gives each large block back at once, so that what is resident is what is in use
give_back_memory = dict(MALLOC_MMAP_THRESHOLD_=str(2**16), MALLOC_TRIM_THRESHOLD_='0')

@case('MicroBatch: peak memory, resnet18 at 128 pixels, batches of 64 in microbatches of 16',
      ('whole batch', 'here', 'split loss', 'small batch + 2 gradients'),
      Goal('peak memory of MicroBatch, in parts of the small batch and two gradients', 'at most', 1.05, 'MiB',
           to='small batch + 2 gradients', peers=['split loss'], limit='small batch + 2 gradients'),
      sessions=2, env=give_back_memory)
def microbatch_memory(variant, quick):
    import psutil
    px = 32 if quick else 128
    learn,_ = split_learner(variant, pictures(64, size=px), 3)
    cbs = micro_batches(variant, 16)
    def turn():
        before = psutil.Process().memory_info().rss # the libraries, the model, the data
        quiet_fit(learn, *cbs)
        more = 2*sum(p.nbytes for p in learn.model.parameters()) if '+' in variant else 0
        yield (resident_peak()-before+more)/2**20, 'MiB', {'at once': 16, 'pixels': px}
    return turn


@case('Out of memory: after 640 items it runs out, and from then on fewer fit than the batch of 64 has',
      ('here', 'Accelerate'),
      Goal('tries that fail until the fit goes on', 'at most', 6, 'failed tries', peers=['Accelerate']),
      Goal('items trained again after memory ran out', 'at most', 0, 'items trained again', peers=['Accelerate']))
def out_of_memory(variant, quick):
    class Limit(nn.Module):
        "A layer that runs out of memory when it sees more items than fit"
        def forward(self, x):
            if len(x) <= self.fits or len(done) < 640: return x
            tries.append(len(x))
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    def model(fits):
        layer = Limit()
        layer.fits = fits
        return nn.Sequential(layer, nn.Linear(2, 1))
    def trained(x):
        "A step with these items was taken"
        items = {*x[:,0].int().tolist()}
        if tries and not after and items <= done: again.append(len(items))
        elif tries: after.append(len(items))
        done.update(items)
    def here(fits):
        from fastai.basics import DataLoaders, Learner, SGD
        from fastai.callback.core import Callback
        from fastcb_training.microbatch import MicroBatch
        class Trained(Callback):
            def after_batch(self): trained(self.xb[0])
        learn = Learner(DataLoaders(loader(data, 64), []), model(fits), nn.MSELoss(), opt_func=SGD, lr=1e-9)
        quiet_fit(learn, MicroBatch(), Trained())
    def accelerate(fits):
        from accelerate.utils import find_executable_batch_size
        @find_executable_batch_size(starting_batch_size=64)
        def train(batch_size):
            net = model(fits)
            opt = torch.optim.SGD(net.parameters(), lr=1e-9)
            for x,y in loader(data, batch_size):
                nn.functional.mse_loss(net(x), y).backward()
                opt.step()
                opt.zero_grad()
                trained(x)
        train()
    data = torch.stack([torch.arange(1280.), torch.ones(1280)], 1),torch.zeros(1280, 1)
    done,tries,again,after = set(),[],[],[]
    def turn():
        for fits in (40, 10, 1):
            for o in done,tries,again,after: o.clear()
            dict(here=here, Accelerate=accelerate)[variant](fits)
            at = {'items fit': fits}
            yield len(tries), 'failed tries', at
            yield sum(again), 'items trained again', at
            yield max(after), 'items a step afterwards', at
    return turn


@case('FeatureCache: heads on a frozen resnet18, digits at 64 pixels', ('fastai', 'here', 'limit'),
      Goal('two heads, ten epochs each, in parts of fastai with its BnFreeze', 'at most', .09, 's', to='fastai',
           peers=['fastai'], limit='limit', where=lambda at: at['heads'] == 2),
      Goal('one head, three epochs, in parts of fastai with its BnFreeze', 'at most', .45, 's', to='fastai',
           peers=['fastai'], limit='limit', where=lambda at: at['heads'] == 1),
      Goal('two heads, ten epochs each, in parts of one pass of the body and the heads alone', 'at most', 1.10, 's',
           to='limit', peers=['fastai'], limit='limit', where=lambda at: at['heads'] == 2),
      Goal("largest difference of a weight from fastai's, after all epochs", 'at most', 1e-5, 'difference of a weight'),
      Goal("start of a second fit, in % of the body's pass", 'at most', 1, "% of the body's pass",
           peers=['fastai']),
      turns=3, minutes=3)
def features(variant, quick):
    from fastai.callback.core import Callback
    from fastai.callback.training import BnFreeze
    from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, ImageBlock,
        Learner, Normalize, RandomSplitter, accuracy, get_image_files, imagenet_stats, resnet18, set_seed,
        vision_learner)
    from fastcb_training.data import digits
    from fastcb_training.features import FeatureCache
    from torch.utils.data import TensorDataset
    files = get_image_files(digits(size=64)).sorted()[::10 if quick else 2]
    def digit(f): return f.parent.name
    def is_odd(f): return int(f.parent.name)%2
    def learner(label):
        set_seed(1)
        dls = DataBlock((ImageBlock, CategoryBlock), get_y=label, splitter=RandomSplitter(seed=1),
                        batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(files, bs=64, num_workers=0)
        set_seed(1)
        learn = vision_learner(dls, resnet18, pretrained=False, train_bn=False, normalize=False, metrics=accuracy)
        learn.freeze() # what it does by itself if it is pretrained
        return learn
    def fit(learn, epochs, *cbs):
        set_seed(2)
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 3e-3, cbs=cbs)
    def through_body(learn):
        "The features of both sets, each in its order"
        body = nn.Sequential(learn.model[0], *learn.model[1][:2]).eval()
        with torch.no_grad(): return [torch.cat([body(x) for x,_ in dl]).as_subclass(torch.Tensor)
                                      for dl in (learn.dls.train.new(shuffle=False, drop_last=False), learn.dls.valid)]
    def head_alone(learn, sets):
        "A Learner for the head, with its data as tensors"
        targets = [torch.tensor([int(o) for o in ds.tls[1]]) for ds in (learn.dls.train_ds, learn.dls.valid_ds)]
        dls = [DataLoader(TensorDataset(*o), bs=64, shuffle=not i, drop_last=not i)
               for i,o in enumerate(zip(sets, targets))]
        return Learner(DataLoaders(*dls), nn.Sequential(*learn.model[1][2:]), CrossEntropyLossFlat(), metrics=accuracy)
    class First(Callback):
        "When the first batch is there"
        order = 1000
        def before_fit(self): self.at = None
        def before_batch(self): self.at = self.at or time.perf_counter()
    def turn():
        for n,epochs in ((2, 2), (1, 1)) if quick else ((2, 10), (1, 3)):
            learns,at,cbs = [learner(o) for o in (digit, is_odd)[:n]],dict(heads=n, epochs=epochs),[]
            start = time.perf_counter()
            if variant == 'limit':
                sets = through_body(learns[0])
                took = time.perf_counter()-start
                learns = [head_alone(o, sets) for o in learns]
                start = time.perf_counter()-took
            else: cbs = [FeatureCache() if variant == 'here' else BnFreeze()]
            for o in learns: fit(o, epochs, *cbs)
            yield time.perf_counter()-start, 's', at
            file,weights = folder()/f'{n}.pth',[p.detach() for o in learns for p in o.model.parameters()]
            if variant == 'fastai': torch.save(weights, file)
            if variant == 'here':
                far = max((a-b).abs().max().item() for a,b in zip(weights, torch.load(file), strict=True))
                yield far, 'difference of a weight', at
        if variant == 'limit': return
        took = seconds(through_body, learns[0])
        def start():
            before = time.perf_counter()
            fit(learns[0], 1, *cbs, first := First())
            return first.at-before
        yield 100*median(start() for _ in range(3))/took, "% of the body's pass", {}
    return turn

def folder():
    "What the processes of a case share"
    return Path(os.environ['BENCH_FOLDER'])


@case('ResumeFit: ten million parameters and the state of Adam', ('torch.save', 'here', 'Accelerate', 'Lightning'),
      Goal('a save, in parts of torch.save and fsync of model and optimizer', 'at most', 1.30, 's a save',
           to='torch.save', peers=['Accelerate', 'Lightning'], limit='torch.save'),
      Goal('saves at the default, in % of the time of a fit', 'at most', 1, '% of a fit'),
      Goal('to go on, in parts of loading the file with torch.load', 'at most', 1.30, 's to go on', to='torch.save',
           peers=['Accelerate', 'Lightning'], limit='torch.save'),
      turns=8, minutes=3, env=keep_memory)
def resume(variant, quick):
    n,done = 300 if quick else 1118,folder()/variant
    way = peers.resuming[variant]
    data = torch.utils.data.TensorDataset(torch.randn(64, n), torch.zeros(64, 1))
    def model(): return nn.Sequential(*(nn.Linear(n, n) for _ in range(8)), nn.Linear(n, 1))
    def turn():
        shutil.rmtree(done, ignore_errors=True)
        done.mkdir()
        run = partial(way, model, data, 8, 1, done)
        save = run(cut=1).saved
        yield save, 's a save', {}
        if variant == 'here': yield 100*save/600, '% of a fit', {}
        yield run(going_on=True, cut=2).began, 's to go on', {}
    list(turn()) # warms up
    return turn


@case('ResumeFit: a fit that is cut off in the middle of its first epoch and goes on',
      ('here', 'Accelerate', 'Lightning'),
      Goal('largest difference of a weight from a fit that was not cut off', 'at most', 0, 'difference of a weight',
           peers=['Accelerate', 'Lightning']),
      Goal('batches loaded again', 'at most', 0, 'batches loaded again', peers=['Accelerate', 'Lightning']),
      Goal('items of the epoch that were trained twice', 'at most', 0, 'items trained twice',
           peers=['Accelerate', 'Lightning']))
def resume_exact(variant, quick):
    class Items:
        "Rows of a table, which notes those that were read"
        def __len__(self): return 96
        def __getitem__(self, i):
            read.append(i)
            return x[i],y[i]
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    x[:,0] = torch.arange(96)/96 # its number
    y,read = x.sum(1, keepdim=True),[]
    def model(): return nn.Sequential(nn.Linear(4, 16), nn.Dropout(.2), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    def turn():
        run = partial(peers.resuming[variant], model, Items(), 8, 3)
        whole,cut = folder()/f'{variant} whole',folder()/f'{variant} cut'
        for o in whole,cut:
            shutil.rmtree(o, ignore_errors=True)
            o.mkdir()
        expected = run(whole)
        first = run(cut, cut=5)
        read.clear()
        second = run(cut, going_on=True)
        far = [(a-b).abs().max().item() for a,b in zip(*(o.model.state_dict().values() for o in (expected, second)))]
        seen = [int(i) for o in (*first.seen[:5], *second.seen[:7]) for i in (o[:,0]*96).round()]
        yield max(far), 'difference of a weight', {}
        yield (len(read)-8*(3*12-5))/8, 'batches loaded again', {}
        yield len(seen)-len({*seen}), 'items trained twice', {}
    return turn


@case('Short validation: 20 of 100 batches', ('limit', 'fastai', 'here'),
      Goal('a spread validation, in parts of a loader of its batches alone', 'at most', 1.10, 's', to='limit',
           peers=['fastai'], limit='limit'),
      Goal('batches that are loaded, in parts of those that are seen', 'at most', 1, 'batches loaded', to='limit',
           peers=['fastai'], limit='limit'),
      Goal('classes that are seen, of ten, in a set in their order', 'at least', 10, 'classes seen', peers=['fastai']),
      turns=7)
def spread_validation(variant, quick):
    from multiprocessing import Value
    from fastai.callback.core import Callback
    from fastai.callback.training import ShortEpochCallback as fastai
    from fastai.vision.all import DataLoader, DataLoaders, Learner, PILImage, get_image_files, SGD, tensor
    from fastcb_training.data import digits
    from fastcb_training.shortepoch import ShortEpochCallback as here
    of_class = [get_image_files(o).sorted()[:160] for o in digits(size=64).ls().sorted()] # 100 batches in their order
    read,bs = Value('i'),16
    class Digits:
        "Pictures, and how often one was read, in whatever process"
        def __init__(self, files): self.files = files
        def __len__(self): return len(self.files)
        def __getitem__(self, i):
            with read.get_lock(): read.value += 1
            return tensor(PILImage.create(self.files[i])).permute(2, 0, 1)/255, int(self.files[i].parent.name)
    class Validation(Callback):
        "How long it takes, and which classes it sees"
        order = 1000
        def before_train(self): self.classes = set()
        def after_train(self): self.start,read.value = time.perf_counter(),0
        def before_batch(self):
            if not self.training: self.classes |= {*self.yb[0].tolist()}
        def after_epoch(self): self.took = time.perf_counter()-self.start
    def learner(workers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32*62*62, 10))
        train = [(torch.randn(bs, 3, 64, 64), torch.randint(10, (bs,)))]
        files = sum((o[:2*bs] if variant == 'limit' else o for o in of_class), [])
        valid = DataLoader(Digits(files), bs=bs, num_workers=workers)
        return Learner(DataLoaders(train, valid), model, nn.CrossEntropyLoss(), opt_func=SGD)
    learners = {workers: learner(workers) for workers in (0, 2)}
    cbs = dict(here=[here(1., n_valid=20)], fastai=[fastai(.19)], limit=[])[variant] # fastai's takes one more
    def turn():
        for workers,learn in learners.items():
            quiet_fit(learn, *cbs, seen := Validation())
            at = dict(workers=workers)
            yield seen.took, 's', at
            yield read.value/bs, 'batches loaded', at
            yield len(seen.classes), 'classes seen', at
    list(turn()) # warms up
    return turn


@case('Scale: batchnorm layers, to find the frozen ones and to look at each before a batch', ('line', 'fastai', 'here'),
      Goal('ten times the batchnorm layers, in parts of ten times the time', 'at most', 1.25, 'ms', to='line',
           limit='line', peers=['fastai'], where=lambda at: at['layers'] > 1000), turns=5)
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
      Goal('a short epoch of a loader of any length, in parts of its batches alone', 'at most', 1.10, 'ms',
           to='loader alone', peers=['fastai'], limit='loader alone'), turns=5)
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
      Goal('to close a window, in parts of one multiplication of its gradients', 'at most', 1.10, 'ms', to='one tensor',
           peers=['one by one'], limit='one tensor', where=lambda at: at['parameters'] >= 10**7), turns=5)
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
