"""The other ways

Five ways to train the same model on the same batches, with gradients accumulated over windows of `k` batches; and three
to go on with a fit that was cut off.
"""
import os, time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import torch


class Noting(torch.optim.SGD):
    "SGD that calls `note` at each step, with the gradients whole and not yet used"
    def __init__(self, params, lr, note):
        super().__init__(params, lr)
        self.note = note

    def step(self, closure=None):
        if closure: closure() # Lightning's has the backward pass in it
        self.note()
        self.step_alone()

    def step_alone(self): super().step()


def loop(model, loader, loss_func, opt, k, n_epoch=1, precision=None, **_):
    "What is usually written by hand: `loss / k`, and a step after each `k` batches and the last one"
    scaler = torch.amp.GradScaler('cuda', enabled=precision == 'fp16')
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(precision)
    for _ in range(n_epoch):
        for i,(x,y) in enumerate(loader, 1):
            with torch.autocast('cuda', dtype) if precision else nullcontext(): loss = loss_func(model(x), y)
            scaler.scale(loss/k).backward()
            if i%k == 0 or i == len(loader):
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()


def accelerate(model, loader, loss_func, opt, k, n_epoch=1, precision=None, wrapped=None, **_):
    "Accelerate's own accumulation"
    from accelerate import Accelerator
    accelerator = Accelerator(gradient_accumulation_steps=k, mixed_precision=precision, cpu=not precision)
    model,opt,loader = accelerator.prepare(model, opt, loader)
    if wrapped: wrapped(model)
    for _ in range(n_epoch):
        for x,y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_func(model(x), y))
                opt.step()
                opt.zero_grad()


def lightning(model, loader, loss_func, opt, k, n_epoch=1, precision=None, **_):
    "Lightning's Trainer, quiet"
    import lightning as L
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
        def training_step(self, batch, i): return loss_func(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return opt
    L.Trainer(max_epochs=n_epoch, accumulate_grad_batches=k, accelerator='gpu' if precision else 'cpu', devices=1,
              precision=dict(fp16='16-mixed', bf16='bf16-mixed').get(precision), logger=False, barebones=True
              ).fit(Module(), loader)


def learner(accumulation, model, loader, loss_func, opt, precision=None, wrapped=None, ctx=nullcontext, n_epoch=1,
            kind=None, less=(), bar=False, **_):
    "fastai's Learner, quiet, with callbacks that accumulate; or another `kind`, with `less` callbacks, with its `bar`"
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.all import Callback, CancelValidException, MixedPrecision
    class TrainOnly(Callback):
        def before_train(self):
            if wrapped and self.epoch == 0: wrapped(self.learn.model)
        def before_validate(self): raise CancelValidException
    learn = (kind or Learner)(DataLoaders(loader, loader), model, loss_func, lr=opt.defaults['lr'],
        opt_func=lambda *_, **__: OptimWrapper(opt=opt), cbs=[*accumulation, TrainOnly()]).remove_cbs(less)
    if precision: learn.add_cb(MixedPrecision(amp_mode=precision))
    with ctx(learn), nullcontext() if bar else learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, opt.defaults['lr'])

def bare_learner(model, loader, loss_func, opt, k, **kwargs):
    "fastai's Learner without a callback: its optimizer does something every `k` batches"
    calls,step,zero_grad = 0,opt.step,opt.zero_grad
    def step_last():
        nonlocal calls
        calls += 1
        if not calls%k: step()
    opt.step,opt.zero_grad = step_last,lambda: zero_grad() if not calls%k else None
    learner([], model, loader, lambda pred, y: loss_func(pred, y)/k, opt, **kwargs)


def fastai(*args, window, **kwargs):
    "fastai's own `GradientAccumulation`"
    from fastai.callback.training import GradientAccumulation
    learner([GradientAccumulation(window)], *args, **kwargs)


def here(*args, window, count=None, **kwargs):
    "The `GradientAccumulation` of this library"
    from fastcb_training.accumulation import GradientAccumulation
    learner([GradientAccumulation(window, **(dict(count=count) if count else {}))], *args, **kwargs)


peers = {'here': here, 'fastai': fastai, 'Lightning': lightning, 'Accelerate': accelerate, 'plain loop': loop}
others = [o for o in peers if o != 'here']
packages = {'Lightning': 'lightning', 'Accelerate': 'accelerate'} # those that need not be there


# A fit that is cut off before batch number `cut` of its first epoch, and goes on: what comes out, how long the save
# took, how long it took from the beginning to the first batch, and the inputs that were trained

class Cut(Exception): "The fit is cut off here"

def fastai_fit(model, items, bs, n_epoch, folder, cut, cbs=()):
    "A fit of fastai's Learner: the Learner, and what was seen of it"
    from fastai.basics import DataLoader, DataLoaders, Learner, set_seed
    from fastai.callback.all import Callback
    set_seed(0)
    class Watch(Callback):
        order = 1000
        def before_batch(self):
            now = time.perf_counter()
            found.began = found.began or now-start
            if self.iter == cut and not self.epoch:
                found.saved = now-found.end
                raise Cut('here')
            found.seen.append(self.xb[0])
        def after_batch(self): found.end = time.perf_counter()
    found = SimpleNamespace(began=None, saved=None, seen=[], model=model())
    learn = Learner(DataLoaders(DataLoader(items, bs=bs, shuffle=True, num_workers=0), []), found.model,
                    torch.nn.MSELoss(), lr=1e-3, path=folder, model_dir='.')
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(), suppress(Cut): learn.fit(n_epoch, cbs=[Watch(), *cbs])
    return learn,found

def resume_here(*args, cut=None, going_on=False):
    "`ResumeFit`, with a save after each batch"
    from fastcb_training.resume import ResumeFit
    return fastai_fit(*args, cut, cbs=[ResumeFit(every=0)])[1]

def resume_plain(model, items, bs, n_epoch, folder, cut=None, going_on=False):
    "`torch.save` and `torch.load` of the same model and optimizer, and no more"
    learn,found = fastai_fit(model, items, bs, n_epoch, folder, 1)
    start = time.perf_counter()
    if going_on:
        state = torch.load(folder/'plain.pth', map_location='cpu', weights_only=False)
        learn.model.load_state_dict(state['model'])
        learn.opt.load_state_dict(state['opt'])
    else:
        torch.save(dict(model=learn.model.state_dict(), opt=learn.opt.state_dict()), folder/'plain.pth')
        with open(folder/'plain.pth', 'rb+') as f: os.fsync(f.fileno())
    found.saved = found.began = time.perf_counter()-start
    return found

def resume_accelerate(model, items, bs, n_epoch, folder, cut=None, going_on=False):
    "Accelerate's `save_state`, `load_state` and `skip_first_batches`, with the sampler that it can find again"
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed
    set_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    found,loss_func = SimpleNamespace(began=None, saved=None, seen=[], model=model()),torch.nn.MSELoss()
    net,opt,loader = accelerator.prepare(found.model, torch.optim.Adam(found.model.parameters(), 1e-3),
                                         torch.utils.data.DataLoader(items, bs, shuffle=True))
    start,skip = time.perf_counter(),0
    if going_on:
        accelerator.load_state(folder/'state')
        skip = int((folder/'batch').read_text())
    for epoch in range(n_epoch):
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, skip) if skip else loader
        for i,(x,y) in enumerate(rest, skip):
            found.began = found.began or time.perf_counter()-start
            if i == cut and not epoch: return found
            found.seen.append(x)
            accelerator.backward(loss_func(net(x), y))
            opt.step()
            opt.zero_grad()
            if i+1 == cut and not epoch and not going_on:
                before = time.perf_counter()
                accelerator.save_state(folder/'state')
                found.saved = time.perf_counter()-before
                (folder/'batch').write_text(str(cut))
        skip = 0
    return found

def resume_lightning(model, items, bs, n_epoch, folder, cut=None, going_on=False):
    "Lightning's checkpoint after a batch"
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    L.seed_everything(0, verbose=False)
    loss_func = torch.nn.MSELoss()
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = found.model
        def on_train_batch_start(self, batch, i):
            found.began = found.began or time.perf_counter()-start
            if i == cut and not self.current_epoch: raise Cut('here')
        def training_step(self, batch, i):
            found.seen.append(batch[0])
            return loss_func(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), 1e-3)
    class Checkpoint(ModelCheckpoint):
        def _save_checkpoint(self, trainer, path):
            before = time.perf_counter()
            super()._save_checkpoint(trainer, path)
            found.saved = time.perf_counter()-before
    found = SimpleNamespace(began=None, saved=None, seen=[], model=model())
    saves = [Checkpoint(folder, 'cut', every_n_train_steps=cut)] if cut and not going_on else []
    trainer = L.Trainer(max_epochs=n_epoch, accelerator='cpu', devices=1, logger=False, callbacks=saves,
                        enable_checkpointing=bool(saves), enable_progress_bar=False, enable_model_summary=False,
                        default_root_dir=folder)
    module,loader = Module(),torch.utils.data.DataLoader(items, bs, shuffle=True)
    start = time.perf_counter()
    with suppress(Cut): trainer.fit(module, loader, ckpt_path=folder/'cut.ckpt' if going_on else None)
    return found

resuming = {'here': resume_here, 'torch.save': resume_plain, 'Accelerate': resume_accelerate,
            'Lightning': resume_lightning}
