"Five ways to train the same model on the same batches, with gradients accumulated over windows of `k` batches"
from contextlib import nullcontext

import torch


class Noting(torch.optim.SGD):
    "SGD that calls `note` at each step, with the gradients whole and not yet used"
    def __init__(self, params, lr, note):
        super().__init__(params, lr)
        self.note = note

    def step(self, closure=None):
        if closure: closure() # Lightning's has the backward pass in it
        self.note()
        super().step()


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


def learner(accumulation, model, loader, loss_func, opt, precision=None, wrapped=None, ctx=nullcontext, n_epoch=1, **_):
    "fastai's Learner, quiet, with the callback that accumulates"
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.all import Callback, CancelValidException, MixedPrecision
    class TrainOnly(Callback):
        def before_train(self):
            if wrapped and self.epoch == 0: wrapped(self.learn.model)
        def before_validate(self): raise CancelValidException
    learn = Learner(DataLoaders(loader, loader), model, loss_func, opt_func=lambda *_, **__: OptimWrapper(opt=opt),
                    lr=opt.defaults['lr'], cbs=[accumulation, TrainOnly()])
    if precision: learn.add_cb(MixedPrecision(amp_mode=precision))
    with ctx(learn), learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, opt.defaults['lr'])


def fastai(*args, window, **kwargs):
    "fastai's own `GradientAccumulation`"
    from fastai.callback.training import GradientAccumulation
    learner(GradientAccumulation(window), *args, **kwargs)


def here(*args, window, count=None, **kwargs):
    "The `GradientAccumulation` of this library"
    from fastcb_training.accumulation import GradientAccumulation
    learner(GradientAccumulation(window, **(dict(count=count) if count else {})), *args, **kwargs)


peers = {'here': here, 'fastai': fastai, 'Lightning': lightning, 'Accelerate': accelerate, 'plain loop': loop}
packages = {'Lightning': 'lightning', 'Accelerate': 'accelerate'} # those that need not be there
