"What each of several processes does, for test_distributed.py: every case in turn, what was seen into a file a rank"
import sys
from operator import itemgetter
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs
from fastai.distributed import *
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from common import *
from fastcb_training.all import *
from fastcb_training.playground import cpu_processes


cpu_processes()


class Syncs(Callback):
    "Count what is synchronised, and note whether the next forward pass would synchronise"
    order = 1 # before `GradientAccumulation`
    def __init__(self): self.n,self.flags = 0,[]
    def before_train(self):
        if self.epoch == 0: self.learn.model.register_comm_hook(None, self.hook)
    def hook(self, state, bucket):
        self.n += bucket.is_last()
        return allreduce_hook(None, bucket)
    def before_batch(self): self.flags.append(self.learn.model.require_backward_grad_sync)


class Twice(nn.Module):
    "A model whose forward pass is two"
    def __init__(self):
        super().__init__()
        self.layer,self.unused = nn.Linear(3, 1),nn.Linear(3, 1)
    def forward(self, x): return self.layer(x)


class Branches(nn.Module):
    "A model of which the first process uses `first`, the others use `others`, and none uses `unused`"
    def __init__(self):
        super().__init__()
        self.first,self.others,self.unused = nn.Linear(3, 1),nn.Linear(3, 1),nn.Linear(3, 1)
    def forward(self, x): return (self.others if dist.get_rank() else self.first)(x)


class Named(nn.Linear):
    "A model whose predictions are a dict"
    def forward(self, x): return dict(pred=super().forward(x), more=[x])

class Asked(Callback):
    "Count the exchanges between processes that are `GradientAccumulation`'s"
    order = 7 # after it
    def before_train(self):
        acc = self.learn.gradient_accumulation._processes
        self.n,exchange = getattr(self, 'n', 0),type(acc).exchange
        def counted(*args):
            self.n += 1
            return exchange(acc, *args)
        acc.exchange = counted

class Late(Callback):
    "Targets that are there in `after_pred` only"
    def before_batch(self): self.kept,self.learn.yb = self.yb,()
    def after_pred(self): self.learn.yb = self.kept

def twice_loss(learn):
    "A loss that calls the model again"
    return lambda pred, targ: F.mse_loss(pred, targ)+F.mse_loss(learn.model(learn.xb[0]), targ)

def masked_mse(pred, targ):
    "Where all is masked, it is NaN, and so are its gradients"
    keep = ~targ.isnan()
    return (keep*(pred-targ.nan_to_num())**2).sum()/keep.sum()

def named_mse(pred, targ): return masked_mse(pred['pred'], targ)

def unmasked(yb): return (~yb[0].isnan()).sum()


def own_pass(cb):
    cb.learn.loss_grad.backward()
    raise CancelBackwardException

def refused(*cbs, **kwargs):
    "What a fit on all processes says no with"
    try: fit([*cbs], **kwargs)
    except RuntimeError as e: return str(e)

def asked():
    "How often the processes ask each other in two epochs"
    cb = Asked()
    fit([GradientAccumulation(8), cb])
    return cb.n

def cancel_last(cb):
    if cb.training and cb.iter == cb.n_iter-1: raise CancelBatchException

def overflow_on_last(cb):
    if dist.get_rank() == dist.get_world_size()-1: cb.learn.loss_grad = cb.learn.loss_grad*float('inf')

def uneven(dls, sizes):
    "`dls` with training batches of these `sizes`, which the processes deal out among themselves"
    train = list(zip(*(o.split(sizes) for o in dls.train_ds.tensors)))
    return DataLoaders(DataLoader(train, bs=None), dls.valid, device='cpu')

def fit(cbs, n=40, bs=4, n_epoch=2, lr=.01, model=None, loss_func=None, mask=None, sizes=None, shuffle=False, ctx={}, fails=(),
        on_learner=(), splitter=trainable_params):
    "Fit on all processes; what this one saw"
    dls = regression(n, bs, n_valid=12, shuffle=shuffle)
    if mask is not None: dls.train_ds.tensors[1][mask] = float('nan')
    torch.manual_seed(0)
    learn = linear_learner(uneven(dls, sizes) if sizes else dls, model and model(), cbs=on_learner, splitter=splitter)
    if loss_func: learn.loss_func = loss_func(learn) if loss_func is twice_loss else loss_func
    probe,syncs,ddp = Probe(),Syncs(),[]
    with learn.distrib_ctx(cpu=True, sync_bn=False, **ctx):
        try: learn.fit(n_epoch, lr, cbs=[probe, syncs, At('before_train', lambda cb: ddp.append(cb.learn.model)), *cbs])
        except fails: pass
    model = getattr(learn.model, 'module', learn.model)
    return dict(xs=probe.xs, valid_xs=probe.valid_xs, grads=probe.grads, losses=probe.losses, syncs=syncs.n, flags=syncs.flags,
                after=ddp[0].require_backward_grad_sync, weights=weights(model), rows=learn.recorder.values, no_grads=no_grads(learn),
                state={k: v.clone() for k,v in model.state_dict().items()})


def dry_run():
    "What a dry run with a saver and a table leaves, and where it wrote"
    learn,paths = linear_learner(regression(40, 4, n_valid=12), path=Path(sys.argv[1])/'dry'),[]
    learn.path.mkdir(exist_ok=True)
    cbs = [ShortEpochCallback(n_batches=2, dry_run=True), SaveModelCallback, CSVLogger, At('after_epoch', lambda cb: paths.append(str(cb.learn.path)))]
    before = weights(learn.model)
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(2, .1, cbs=cbs)
    return dict(same=weights(learn.model).equal(before), paths=paths, files=[*map(str, learn.path.rglob('*'))])


class Synchronise(Callback):
    "What `sync_bn=True` does on GPUs: wrapped before it is converted, a model with `SyncBatchNorm` can be on a CPU"
    def before_train(self):
        if self.epoch == 0: self.learn.model.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model.module)

def frozen_bn_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    for p in model[:2].parameters(): p.requires_grad_(False)
    return model


class Total(nn.Module):
    "Count items, in whatever mode"
    def __init__(self):
        super().__init__()
        self.register_buffer('total', torch.zeros(1))
    def forward(self, x):
        self.total += len(x)
        return x

def frozen_body_model():
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(.3), Total()).requires_grad_(False)
    return nn.Sequential(body, nn.Linear(4, 1))

class Meddle(Callback):
    "Decay weights, leave gradients on the frozen body as after `unfreeze`, and run the model in training mode between batches"
    def before_step(self):
        self.opt.set_hypers(wd=.1)
        for p in self.learn.model.module[0].parameters(): p.grad = torch.ones_like(p)
    def after_batch(self):
        self.learn.model.train()
        self.learn.model.module(self.x)


mask = list(range(0, 14))+[21, 22, 23, 36, 37, 38, 39] # uneven between the processes, whole batches of one among them
cases = dict(
    exact=lambda: fit([GradientAccumulation(8)]),
    carried=lambda: fit([GradientAccumulation(12)]),
    flushed=lambda: fit([GradientAccumulation(12, flush=True)]),
    ragged=lambda: fit([GradientAccumulation(7, flush=True)], n=43),
    masked=lambda: fit([GradientAccumulation(3, count=unmasked)], loss_func=masked_mse, mask=mask),
    masked_flushed=lambda: fit([GradientAccumulation(7, count=unmasked, flush=True)], loss_func=masked_mse, mask=mask),
    last_cancelled=lambda: fit([GradientAccumulation(12, flush=True), At('before_batch', cancel_last)]),
    summed=lambda: fit([GradientAccumulation(8)], lr=1e-3, loss_func=partial(F.mse_loss, reduction='sum')),
    twice=lambda: fit([GradientAccumulation(8)], loss_func=twice_loss),
    uneven=lambda: fit([GradientAccumulation(8)], sizes=[4, 1, 7, 2, 6, 3, 5, 4, 8]),
    branches=lambda: fit([GradientAccumulation(100, flush=True), At('before_batch', cancel_last)], model=Branches),
    unused=lambda: fit([GradientAccumulation(8)], model=Twice, ctx=dict(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])),
    named=lambda: fit([GradientAccumulation(3, count=unmasked)], loss_func=named_mse, mask=mask, model=lambda: Named(3, 1)),
    static=lambda: fit([GradientAccumulation(8)], ctx=dict(kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])),
    own=lambda: fit([GradientAccumulation(8), At('before_backward', own_pass)]),
    clipped=lambda: fit([GradientAccumulation(8), GradientClip(.5)]),
    overflow=lambda: fit([GradientClip(.5), At('before_backward', overflow_on_last, it=1)]),
    cancelled=lambda: fit([GradientAccumulation(12), At('after_loss', stop(CancelFitException), it=1)]),
    failed=lambda: fit([GradientAccumulation(12), At('after_loss', stop(ValueError('on purpose')), it=1)], fails=(ValueError,)),
    failed_on_learner=lambda: fit([At('after_backward', stop(ValueError('on purpose')), it=1)], fails=(ValueError,),
                                  on_learner=[GradientAccumulation(12)]),
    late=lambda: refused(GradientAccumulation(8), Late),
    asked=asked,
    short=lambda: fit([ShortEpochCallback(.4)], lr=0.),
    resumed=lambda: fit([ShortEpochCallback(n_batches=2, resume=True)], n_epoch=5, shuffle=True, lr=0.),
    overfit=lambda: fit([ShortEpochCallback(n_batches=2, overfit=True)], n_epoch=3, shuffle=True),
    dry_run=dry_run,
    micro=lambda: fit([MicroBatch(3)]),
    micro_accumulated=lambda: fit([MicroBatch(1), GradientAccumulation(8), GradientClip(.5)]),
    micro_unused=lambda: fit([MicroBatch(2)], model=Twice, ctx=dict(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])),
    micro_synchronised=lambda: fit([Synchronise, MicroBatch(2)], model=frozen_bn_model, fails=(ValueError,)),
    frozen=lambda: fit([Synchronise, BnFreeze], model=frozen_bn_model),
    meddled=lambda: fit([Meddle], model=frozen_body_model, splitter=params),
    held=lambda: fit([Meddle, BnFreeze], model=frozen_body_model, splitter=params),
    held_part=lambda: fit([Meddle, BnFreeze(all_layers=True, part=itemgetter(0))], model=frozen_body_model, splitter=params),
    all=lambda: fit([Synchronise, BnFreeze, GradientAccumulation(8), GradientClip, ShortEpochCallback(.8)],
                    model=frozen_bn_model),
)

if __name__ == '__main__':
    Accelerator(cpu=True) # starts the process group
    seen = {name: case() for name,case in cases.items()}
    torch.save(seen, Path(sys.argv[1])/f'{dist.get_rank()}.pt')
    dist.destroy_process_group()
