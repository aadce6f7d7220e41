"Several processes against one that has the whole batch"
import os, subprocess, sys
from pathlib import Path

import pytest

from common import *
from processes import Branches, frozen_body_model, mask

HERE = Path(__file__).parent


@pytest.fixture(scope='module', params=[2, 3])
def seen(request, tmp_path_factory):
    "What each process saw, in each case of processes.py"
    out,n = tmp_path_factory.mktemp('ranks'),request.param
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}',
               HERE/'processes.py', out]
    done = subprocess.run(command, env=os.environ|{'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'CUDA_VISIBLE_DEVICES': ''},
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180)
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(out/f'{rank}.pt', weights_only=False) for rank in range(n)]


def ranks(seen, case): return [o[case] for o in seen]


def twin(seen, case, n_acc, flush=False, loss_func=F.mse_loss, count=len, max_norm=None, n_epoch=2, lr=.01):
    "The same in one process: the gradient of each step over what all processes trained in that window, and the weights"
    per_rank = ranks(seen, case)
    full = regression(43 if case == 'ragged' else 40).train_ds.tensors
    def targ(x): # of the recorded inputs, in the data set
        y = full[1][[(full[0] == row).all(1).nonzero()[0, 0].item() for row in x]].clone()
        if case.startswith(('masked', 'named')):
            for i,row in enumerate(x):
                if (full[0] == row).all(1).nonzero()[0, 0].item() in mask: y[i] = float('nan')
        return y
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = partial(SGD, mom=.9)([*model.parameters()], lr=lr)
    n = len(per_rank[0]['xs'])//n_epoch
    grads,window,items = [],[],0
    for i in range(n*n_epoch):
        batch = [r['xs'][i] for r in per_rank]
        window += batch
        items += sum(count(targ(x)) for x in batch)
        if items >= n_acc*len(per_rank) or (flush and i%n == n-1 and items > 0):
            x = torch.cat(window)
            loss_func(model(x), targ(x)).backward()
            if max_norm: nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            grads.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
            opt.step()
            opt.zero_grad()
            window,items = [],0
    return grads,weights(model)


def check(seen, case, syncs=None, **kwargs):
    grads,final = twin(seen, case, **kwargs)
    for r in ranks(seen, case):
        assert len(r['grads']) == len(grads)
        for ours,theirs in zip(r['grads'], grads): assert (ours-theirs).norm() <= 2e-6*theirs.norm()
        assert torch.allclose(r['weights'], final, atol=1e-6)
        assert torch.equal(r['weights'], ranks(seen, case)[0]['weights'])
        assert r['syncs'] == (len(grads) if syncs is None else syncs)
        assert all(r['flags']) and r['no_grads']


def masked_mse(pred, targ): return F.mse_loss(pred[~targ.isnan()], targ[~targ.isnan()])
def unmasked(targ): return (~targ.isnan()).sum().item()


@pytest.mark.parametrize('case, kwargs', [
    ('exact', dict(n_acc=8)), ('carried', dict(n_acc=12)), ('flushed', dict(n_acc=12, flush=True)),
    ('ragged', dict(n_acc=7, flush=True)), ('uneven', dict(n_acc=8)), ('clipped', dict(n_acc=8, max_norm=.5)),
    ('masked', dict(n_acc=3, loss_func=masked_mse, count=unmasked)),
    ('named', dict(n_acc=3, loss_func=masked_mse, count=unmasked)), ('own', dict(n_acc=8)),
    ('masked_flushed', dict(n_acc=7, flush=True, loss_func=masked_mse, count=unmasked)),
    ('twice', dict(n_acc=8, loss_func=lambda *o: 2*F.mse_loss(*o))),
    ('micro', dict(n_acc=1)), ('micro_accumulated', dict(n_acc=8, max_norm=.5))])
def test_steps_weights_and_synchronisations_are_those_of_the_big_batch(seen, case, kwargs): check(seen, case, **kwargs)


def test_a_static_graph_synchronises_its_first_batch_too(seen):
    check(seen, 'static', n_acc=8, syncs=ranks(seen, 'static')[0]['syncs'])
    assert ranks(seen, 'static')[0]['syncs'] <= len(ranks(seen, 'static')[0]['grads'])+1


def test_targets_that_come_after_the_forward_pass_are_refused(seen):
    for r in ranks(seen, 'late'): assert '0 items before the forward pass' in r and '4 after the loss' in r


def test_processes_ask_each_other_where_a_window_may_close(seen):
    for r in ranks(seen, 'asked'): assert r == {2: 6, 3: 5}[len(seen)]


def test_a_sum_is_averaged_over_the_processes(seen):
    "As `DistributedDataParallel` always does"
    check(seen, 'summed', n_acc=8, lr=1e-3, loss_func=lambda *o: F.mse_loss(*o, reduction='sum')/len(seen))


def test_all_processes_skip_the_step_that_overflows_on_one(seen):
    n = len(ranks(seen, 'overflow')[0]['xs'])
    for r in ranks(seen, 'overflow'):
        assert len(r['grads']) == n-2 and r['weights'].isfinite().all() # one batch in each of two epochs
        assert torch.equal(r['weights'], ranks(seen, 'overflow')[0]['weights'])


def test_a_cancelled_last_batch_is_flushed_all_the_same(seen):
    check(seen, 'last_cancelled', n_acc=12, flush=True, syncs=ranks(seen, 'last_cancelled')[0]['syncs'])


def test_unused_parameters(seen):
    for r in ranks(seen, 'unused'):
        assert r['syncs'] == len(r['grads']) > 0
        assert torch.equal(r['weights'], ranks(seen, 'unused')[0]['weights'])


def test_microbatches_with_unused_parameters(seen):
    "A batch synchronises once"
    for r in ranks(seen, 'micro_unused'):
        assert r['syncs'] == len(r['grads']) == len(r['xs'])
        assert torch.equal(r['weights'], ranks(seen, 'micro_unused')[0]['weights'])


def test_microbatches_are_refused_where_batchnorm_is_synchronised(seen):
    for r in ranks(seen, 'micro_synchronised'): assert [len(r['xs']), r['grads']] == [1, []]


def test_what_not_all_processes_use_is_flushed(seen):
    "In parameters that nobody uses, there is nothing to step"
    torch.manual_seed(0)
    fresh,first = Branches().state_dict(),ranks(seen, 'branches')[0]
    for r in ranks(seen, 'branches'):
        assert [len(o) for o in r['grads']] == [8, 8] and torch.equal(r['weights'], first['weights'])
        assert {k.split('.')[0] for k in fresh if not torch.equal(fresh[k], r['state'][k])} == {'first', 'others'}


@pytest.mark.parametrize('case', ['cancelled', 'failed', 'failed_on_learner'])
def test_synchronising_is_left_as_it_was_found(seen, case):
    for r in ranks(seen, case): assert [r['flags'], r['after'], r['grads']] == [[True]*2, True, []]


@pytest.mark.parametrize('case', ['cancelled', 'failed'])
def test_no_gradient_is_left(seen, case):
    for r in ranks(seen, case): assert r['no_grads']


def test_short_epochs_are_equally_long_on_each_process(seen):
    for r in ranks(seen, 'short'): assert [len(r['xs']), len(r['rows'])] == [2*2, 2]


def test_each_process_overfits_on_batches_of_its_own(seen):
    xs = [torch.stack(r['xs']) for r in ranks(seen, 'overfit')]
    for x,r in zip(xs, ranks(seen, 'overfit')): assert x.equal(x[:2].repeat(3, 1, 1, 1).view_as(x)) and x.equal(torch.stack(r['valid_xs']))
    assert len(torch.cat([x[:2].flatten(0, 1) for x in xs]).unique(dim=0)) == len(seen)*2*4


def test_a_dry_run_of_several_processes_writes_to_one_folder_and_leaves_nothing(seen):
    both = ranks(seen, 'dry_run')
    assert all(r['same'] and not r['files'] for r in both)
    folder, = {path for r in both for path in r['paths']}
    assert not Path(folder).exists()


def test_resumed_epochs_cover_the_data_between_the_processes(seen):
    n = -(-40//len(seen)) # items a process
    batches = -(-n//4) # of a pass
    both = ranks(seen, 'resumed')
    assert all(len(r['xs']) == 10 for r in both)
    for i in range(10//batches):
        rows = torch.cat([x for r in both for x in r['xs'][i*batches:(i+1)*batches]])
        assert len(rows) == n*len(seen) and len(rows.unique(dim=0)) == 40


@pytest.mark.parametrize('case', ['frozen', 'all'])
def test_frozen_synchronised_batchnorm_is_held(seen, case):
    for r in ranks(seen, case):
        assert r['state']['1.num_batches_tracked'] == 0 and not r['state']['1.running_mean'].any()
        assert torch.equal(r['weights'], ranks(seen, case)[0]['weights'])


@pytest.mark.parametrize('case', ['meddled', 'held', 'held_part'])
def test_a_frozen_body_is_held_whatever_runs_the_model(seen, case):
    "Weights, statistics and what `forward` itself counts; without `BnFreeze` all of them move"
    torch.manual_seed(0)
    fresh = frozen_body_model().state_dict()
    for r in ranks(seen, case):
        moved = {k for k,o in r['state'].items() if not torch.equal(o, fresh[k])}
        assert moved == ({*fresh} if case == 'meddled' else {'1.weight', '1.bias'})
        if case != 'meddled': assert torch.equal(r['weights'], ranks(seen, case)[0]['weights'])
