"""Two heads on one frozen body: the callbacks of fastcb_training at work on real digits.

A resnet18 learns the digits 5 to 9, and its body is frozen. Two heads are trained on that body
with the digits 0 to 4: A tells whether the sheet lies on its side, B reads the digit. Whoever
serves both wants to hold the body once, and may if both heads were trained on the very same one.
"""
import math,sys,time,warnings
warnings.filterwarnings('ignore', category=FutureWarning, module='torch')  # from fastai's imports
from fastai.vision.all import *
from fastcb_training.all import *  # after fastai's, which bear the same names
from fastcb_training.data import digits
from fastcore.script import call_parse
from matplotlib.figure import Figure

bs,n_acc = 16,64  # images that fit in memory at once, and images wanted in an optimizer step

def digit(file):
    "Label for the body and for head B"
    return file.parent.name

def posture(file):
    "Label for head A: every other sheet was fed in sideways"
    return 'lying' if int(file.stem)%2 else 'upright'

def scan(file):
    "Image for head A, turned as its label says"
    return PILImage.create(file).rotate(90 if posture(file) == 'lying' else 0)

tasks = {'Head A: does the sheet lie on its side?': (posture, scan),
         'Head B: which digit is it?': (digit, noop)}

def get_learner(path, label, image, seed, **kwargs):
    "A resnet18 that knows nothing yet; the same seed gives the same weights, split and batches"
    set_seed(seed, reproducible=True)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=image, get_y=label,
                      splitter=RandomSplitter(seed=seed))
    dls = block.dataloaders(get_image_files(path).sorted(), bs=bs, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, path=path.parent,
                           metrics=[accuracy, F1Score(average='macro')], **kwargs)
    return learn if sys.stdout.isatty() else rows_only(learn)

def rows_only(learn):
    "fastai's table without its progress bars, which would fill a log with carriage returns"
    def show(row): print(*(f'{o:<11.4f}' if isinstance(o, float) else f'{o!s:<11}' for o in row))
    def log(row):
        if row[0] == 0: show(learn.recorder.metric_names)
        show(row)
    learn.remove_cb(ProgressCallback)
    learn.logger = log
    return learn

def fit_body(path, epochs, seed, *cbs):
    "The whole pipeline: a one-cycle schedule, metrics, and the model of the best epoch kept"
    learn,start = get_learner(path, digit, noop, seed),time.perf_counter()
    learn.fit_one_cycle(epochs, 3e-3, cbs=[SaveModelCallback(fname='body'), *cbs])
    print(f'Batches trained: {len(learn.recorder.losses)}, in {time.perf_counter()-start:.1f} s')
    return learn

def fit_heads(body, path, epochs, seed, *cbs):
    "Heads A and B, each on a frozen copy of `body`, in steps of `n_acc` images; and the seconds it took"
    heads,start = [],time.perf_counter()
    for title,(label,image) in tasks.items():
        print(f'\n{title}')
        heads.append(learn := on_body(body, path, label, image, seed))
        learn.fit_one_cycle(epochs, 3e-3, cbs=[GradientAccumulation(n_acc), *cbs])
    return heads,time.perf_counter()-start

def on_body(body, path, label, image, seed):
    "A Learner with a new head on a frozen copy of `body`"
    learn = get_learner(path, label, image, seed, train_bn=False)
    learn.model[0].load_state_dict(body.state_dict())
    learn.freeze()
    return learn

def fit_on_features(body, path, epochs, seed):
    "The same heads again, without a table: the body's features are computed once"
    heads,start,cache = [],time.perf_counter(),FeatureCache()
    for label,image in tasks.values():
        heads.append(learn := on_body(body, path, label, image, seed))
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, 3e-3, cbs=[GradientAccumulation(n_acc), cache])
    return heads,time.perf_counter()-start

def furthest(heads, others):
    "The largest difference between the weights of heads and those of others"
    pairs = [(p, q) for a,b in zip(heads, others) for p,q in zip(a.model.parameters(), b.model.parameters())]
    return max((p-q).abs().max().item() for p,q in pairs)

def steps(learn):
    "Optimizer steps, as Adam counted them"
    return max(state.get('step', 0) for state in learn.opt.state.values())

def is_whole(recorder, epochs):
    "Has the table all its rows, and each row all its numbers?"
    rows,columns = L(recorder.values),recorder.metric_names[1:-1]  # but for `epoch` and `time`
    return rows.map(len) == [len(columns)]*epochs and np.isfinite(list(rows.concat())).all()

def n_differing(a, b):
    "How many tensors are not equal bit for bit: weights, running statistics, batch counters"
    a,b = a.state_dict(),b.state_dict()
    return sum(not torch.equal(a[name], b[name]) for name in a)

def accuracy_with(body, learn):
    "Accuracy of the head of `learn` at its own task, when it is served with `body`"
    model = nn.Sequential(body, learn.model[1])
    served = Learner(learn.dls, model, learn.loss_func, metrics=accuracy)
    with served.no_bar(): return served.validate()[1]

def compare(body, A, B):
    "What became of `body` under two heads, and how accurate head A is with either one's"
    a,b = A.model[0],B.model[0]
    return {'tensors that drifted in body A': n_differing(body, a),
            'tensors that differ between bodies A and B': n_differing(a, b),
            'accuracy of head A with its own body': f'{accuracy_with(a, A):.1%}',
            'accuracy of head A with body B': f'{accuracy_with(b, A):.1%}'}

def plot_losses(learn, held, drifted):
    "Training losses of the body and of its heads, as a figure that needs no display"
    fig = Figure(figsize=(10, 4), layout='constrained')
    left,right = fig.subplots(1, 2, sharey=True)
    left.plot(learn.recorder.losses, color='#009E73')
    heads = zip(('A (posture)', 'B (digit)'), ('#0072B2', '#D55E00'), held, drifted)
    for name,color,on,off in heads:  # in colours that the colour-blind tell apart
        right.plot(on.recorder.losses, color=color, label=f'head {name}, with BnFreeze')
        right.plot(off.recorder.losses, ':', color=color, label=f'head {name}, without')
    left.set(title='Body, digits 5 to 9', ylabel='training loss, smoothed (nats)', ylim=0)
    right.set(title='Heads on the frozen body, digits 0 to 4')
    right.legend()
    for ax in left,right: ax.set(xlabel=f'batches trained ({bs} images each)')
    return fig

@call_parse
def main(
    out:Path='out', # Folder for the images, the model and the picture
    epochs:int=4, # Epochs in each fit, 1 or more
    seed:int=0, # The same seed gives the same figures on the same machine
):
    "Train two heads on one frozen body, with BnFreeze and without, and see what becomes of it"
    if epochs < 1: sys.exit(f'--epochs has to be 1 or more, not {epochs}')
    if not 0 <= seed < 2**32: sys.exit(f'--seed has to be from 0 to {2**32-1}, not {seed}')
    try: old,new = digits(out, range(5, 10)),digits(out, range(5))
    except OSError as e: sys.exit(f'--out has to be a folder to write to, not {out}: {e.strerror}')

    print('1. Smoke test: the whole pipeline on 1% of each epoch\n')
    smoke = fit_body(old, epochs, seed, ShortEpochCallback())
    print('\n2. The body: a resnet18 learns the digits 5 to 9\n')
    learn = fit_body(old, epochs, seed)
    body = learn.model[0]
    print('\n3. Two heads for the digits 0 to 4, with BnFreeze')
    held,seconds = fit_heads(body, new, epochs, seed, BnFreeze())
    print('\n4. The same two heads, without BnFreeze')
    drifted,_ = fit_heads(body, new, epochs, seed)
    print('\n5. The same two heads with FeatureCache')
    cached,less = fit_on_features(body, new, epochs, seed)

    A,table = held[0],pd.DataFrame({'with BnFreeze': compare(body, *held),
                                    'without': compare(body, *drifted)})
    n_smoke,n_body,n_head = (len(o.recorder.losses) for o in (smoke, learn, A))
    print(f'''
Summary
The smoke test ran the whole pipeline on {n_smoke} of {n_body} batches.
The body reads the digits 5 to 9 with an accuracy of {accuracy_with(body, learn):.1%}.
Each head took {steps(A)} steps of {n_acc} images, from {n_head} batches of {bs}.
With FeatureCache both heads took {less:.1f} s instead of {seconds:.1f} s, to the same weights (± {furthest(held, cached):.0e}).
The body has {len(body.state_dict())} tensors. What became of them, and of head A:

{table}
''')
    plot_losses(learn, held, drifted).savefig(out/'digits.png', dpi=150)
    print(f'The training losses are drawn in {out/"digits.png"}')

    want_smoke,want_steps = epochs*math.ceil(len(smoke.dls.train)/100),n_head*bs//n_acc
    promises = {
        f'the smoke test trains {want_smoke} batches': n_smoke == want_smoke,
        'its table is whole': is_whole(smoke.recorder, epochs),
        f'each head takes {want_steps} steps': all(steps(o) == want_steps for o in held+drifted),
        'with BnFreeze, both bodies are the frozen one, bit for bit': not any(table.iloc[:2, 0]),
        'without it, they differ': table.iloc[1, 1] > 0}
    print('\nPromises')
    for words,kept in promises.items(): print('kept:  ' if kept else 'BROKEN:', words)
    if not all(promises.values()): sys.exit(1)
