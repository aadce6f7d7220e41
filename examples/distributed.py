"""Real digits on several processes: gradients are synchronised once a step, not once a batch.

    torchrun --nproc-per-node 2 examples/distributed.py
    accelerate launch --num_processes 2 examples/distributed.py  # on GPUs

Each process trains its own part of every epoch, once with fastai's GradientAccumulation and once
with that of fastcb_training. The processes' figures are gathered, and the first one prints them.
Without torchrun it runs as one process, which has nothing to synchronise.
"""
import hashlib,sys,time,warnings
warnings.filterwarnings('ignore', category=FutureWarning, module='torch')  # from fastai's imports
try: import accelerate
except ImportError: sys.exit("Several processes need accelerate: pip install 'fastcb_training[distributed]'")
from fastai.callback.training import GradientAccumulation as FastaiAccumulation
from fastai.distributed import *
from fastai.vision.all import *
from fastcb_training.all import *  # after fastai's, which bear the same names
from fastcb_training.data import digits
from fastcb_training.playground import *
from fastcore.script import call_parse
from torch import distributed as dist

bs,n_acc = 16,64  # images in a batch and in a window, on each process
on_cpu = not torch.cuda.is_available()

if on_cpu: cpu_processes()

class Meter(Callback):
    "Count what this process trains and steps"
    order,run_valid = 100,False  # after those that cancel a step
    def before_fit(self):
        self.batches = self.items = self.steps = 0
        self.start = time.perf_counter()
    def before_step(self): self.steps += 1
    def after_batch(self): self.batches,self.items = self.batches+1,self.items+find_bs(self.yb)
    def after_train(self): self.seconds = time.perf_counter()-self.start

def digest(model):
    "A short text that is the same for the same weights"
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()[:12]

def get_learner(path, seed):
    "A network whose gradients are large against its arithmetic, so that synchronising shows"
    set_seed(seed, reproducible=True)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label,
                      splitter=RandomSplitter(seed=seed))
    dls = block.dataloaders(get_image_files(path).sorted(), bs=bs, num_workers=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32*32, 2048), nn.ReLU(), nn.Linear(2048, 1024),
                          nn.ReLU(), nn.Linear(1024, 10))
    learn = Learner(dls, model, metrics=accuracy, path=path.parent)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(path, epochs, seed, acc):
    "What this process did in a fit with `acc`, as a row"
    learn,meter,syncs = get_learner(path, seed),Meter(),Syncs()
    with learn.distrib_ctx(**(dict(cpu=True, sync_bn=False) if on_cpu else {})):
        learn.fit(epochs, 1e-3, cbs=[acc, meter, syncs])
    return {'batches': meter.batches, 'steps': meter.steps, 'synchronisations': sum(syncs.seen),
            'items a second': round(meter.items/meter.seconds), 'weights': digest(learn.model),
            'accuracy': f'{learn.recorder.values[-1][-1]:.1%}'}

def gather(row):
    "The rows of all processes, by rank"
    if not dist.is_initialized(): return [row]
    rows = [None]*dist.get_world_size()
    dist.all_gather_object(rows, row)
    return rows

def show(title, rows):
    print(f'\n{title}\n\n{pd.DataFrame(rows).rename_axis("rank")}', flush=True)

@call_parse
def main(
    out:Path='out', # Folder for the images
    epochs:int=2, # Epochs in each fit, 1 or more
    seed:int=0, # The same seed gives the same weights on the same machines
):
    "Train digits on all processes that torchrun started, and count what they synchronise"
    if epochs < 1: sys.exit(f'--epochs has to be 1 or more, not {epochs}')
    if not 0 <= seed < 2**32: sys.exit(f'--seed has to be from 0 to {2**32-1}, not {seed}')
    try: path = digits(out)
    except OSError as e: sys.exit(f'--out has to be a folder to write to, not {out}: {e.strerror}')

    theirs = gather(fit(path, epochs, seed, FastaiAccumulation(n_acc)))
    ours = gather(fit(path, epochs, seed, GradientAccumulation(n_acc)))
    n,first = len(ours),ours[0]
    want_syncs = [first['steps'] if n > 1 else 0]*n
    promises = {
        'all processes take the same steps': len({o['steps'] for o in ours}) == 1,
        'and have the same weights': len({o['weights'] for o in ours}) == 1,
        'a step takes a window, and not a batch': first['steps'] == first['batches']*bs//n_acc,
        'synchronised once a step': [o['synchronisations'] for o in ours] == want_syncs}

    if not rank_distrib():
        print(f'Processes: {n}, on {"CPU" if on_cpu else "GPU"}. A step takes {n} × {n_acc} images.')
        if n == 1: print(f'For more of them: torchrun --nproc-per-node 2 {sys.argv[0]}')
        show("GradientAccumulation of fastai", theirs)
        show("GradientAccumulation of fastcb_training", ours)
        print('\nPromises')
        for words,kept in promises.items(): print('kept:  ' if kept else 'BROKEN:', words)
    if dist.is_initialized(): dist.destroy_process_group()
    if not all(promises.values()): sys.exit(1)
