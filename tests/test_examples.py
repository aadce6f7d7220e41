"The example scripts, run as a user runs them"
import os, re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent/'examples'

# Runs a script after its callbacks were replaced by one that does nothing
WITHOUT = '''
import runpy, sys
from fastai.callback.core import Callback
import fastcb_training.all as library

class Idle(Callback):
    def __init__(self, *args): pass

for name in 'ShortEpochCallback', 'GradientAccumulation', 'BnFreeze': setattr(library, name, Idle)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''

def run(*args, **more):
    "Exit status, output and errors of Python with `args`, and `more` in its environment"
    env = os.environ|{'OMP_NUM_THREADS': '1'}|more  # threads that wait for a busy core take ten times as long
    done = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True,
                          encoding='utf-8', timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "examples/digits.py, at its shortest: its output folder and what it printed"
    out = tmp_path_factory.mktemp('demo')/'a new folder'
    status, printed, errors = run(EXAMPLES/'digits.py', '--epochs', 1, '--out', out)
    assert (status, errors) == (0, ''), printed + errors
    return out, printed

def test_digits_prints_whole_tables(demo):
    rows = [line.split() for line in demo[1].splitlines() if re.match(r'epoch|\d ', line)]
    assert len(rows) == 2*6 and {len(row) for row in rows} == {6}
    assert '\r' not in demo[1]

def test_digits_keeps_its_promises(demo):
    kept = re.findall('(kept|BROKEN): +(.*)', demo[1])
    assert len(kept) == 5 and {word for word,_ in kept} == {'kept'}

def test_digits_sums_up(demo):
    summary = demo[1].partition('Summary')[2]
    assert 'on 1 of 44 batches' in summary and '11 steps of 64 images, from 45 batches of 16' in summary
    rows = dict(re.findall(r'^([^\d\n]+?) +(\d.*)$', summary.partition('without')[2], re.M))
    assert [rows[o].split() for o in rows if o.startswith('tensors')] == [['0', '60'], ['0', '40']]
    (own, _), (other, worse) = (re.findall('[0-9.]+', rows[o]) for o in rows if o.startswith('accuracy of head A'))
    assert own == other and float(worse) < float(own)

def test_digits_draws_every_curve(demo):
    pixels = np.asarray(Image.open(demo[0]/'digits.png').convert('RGB')).reshape(-1, 3)
    for color in '009E73', '0072B2', 'D55E00':
        assert (pixels == list(bytes.fromhex(color))).all(1).sum() > 100

def test_digits_leaves_its_files_in_one_folder(demo):
    out, _ = demo
    assert {o.name for o in out.iterdir()} == {'digits_01234_32px', 'digits_56789_32px', 'models', 'digits.png'}
    assert [o.name for o in out.parent.iterdir()] == [out.name]


def test_digits_says_what_is_broken(tmp_path):
    status, printed, errors = run('-W', 'ignore', '-c', WITHOUT, EXAMPLES/'digits.py', '--epochs', 1, '--out', tmp_path)
    assert (status, errors) == (1, ''), printed + errors
    assert re.findall('BROKEN: (.*)', printed) == [
        'the smoke test trains 1 batches', 'each head takes 11 steps',
        'with BnFreeze, both bodies are the frozen one, bit for bit']


def test_digits_help():
    status, printed, errors = run(EXAMPLES/'digits.py', '--help')
    assert (status, errors) == (0, '') and all(o in printed for o in ('--out', '--epochs', '--seed', 'default: 4'))

@pytest.mark.parametrize('args, says', [
    (('--epochs', 0), '--epochs has to be 1 or more, not 0'),
    (('--seed', -1), '--seed has to be from 0 to 4294967295, not -1'),
    (('--out', __file__), '--out has to be a folder to write to, not ')])
def test_digits_refuses(args, says):
    status, printed, errors = run(EXAMPLES/'digits.py', *args)
    assert (status, printed) == (1, '') and errors.startswith(says) and errors.count('\n') == 1


def run_distributed(*args):
    "Exit status, output and errors of Python with `args` on two CPU processes"
    return run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, *args, CUDA_VISIBLE_DEVICES='')

def table_rows(printed):
    "Rank, batches, steps, synchronisations, items a second, weights and accuracy, each row of each table"
    return [line.split() for line in printed.splitlines() if re.match(r'\d ', line)]

def test_distributed(tmp_path):
    status, printed, errors = run_distributed(EXAMPLES/'distributed.py', '--epochs', 1, '--out', tmp_path)
    assert status == 0, printed + errors
    assert 'Processes: 2, on CPU. A step takes 2 × 64 images.' in printed
    rows = table_rows(printed)
    assert [row[:4] for row in rows] == [[rank, '44', '11', syncs] for syncs in ('44', '11') for rank in '01']
    assert rows[0][5] == rows[1][5] and rows[2][5] == rows[3][5]
    assert re.findall('(kept|BROKEN):', printed) == ['kept']*4

def test_distributed_on_one_process(tmp_path):
    status, printed, errors = run(EXAMPLES/'distributed.py', '--epochs', 1, '--out', tmp_path, CUDA_VISIBLE_DEVICES='')
    assert (status, errors) == (0, ''), printed + errors
    assert 'torchrun --nproc-per-node 2' in printed
    assert [row[:4] for row in table_rows(printed)] == [['0', '89', '22', '0']]*2

def test_distributed_says_what_is_broken(tmp_path):
    (tmp_path/'without.py').write_text(WITHOUT)
    status, printed, errors = run_distributed(tmp_path/'without.py', EXAMPLES/'distributed.py', '--epochs', 1, '--out', tmp_path)
    assert status, printed + errors
    assert re.findall('BROKEN: (.*)', printed) == ['a step takes a window, and not a batch']

@pytest.mark.parametrize('args, says', [
    (('--epochs', 0), '--epochs has to be 1 or more, not 0'), (('--out', __file__), '--out has to be a folder to write to, not ')])
def test_distributed_refuses(args, says):
    status, printed, errors = run(EXAMPLES/'distributed.py', *args, CUDA_VISIBLE_DEVICES='')
    assert (status, printed) == (1, '') and errors.startswith(says) and errors.count('\n') == 1
