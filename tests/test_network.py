"Nothing is fetched and nothing is sent, be it an import or a fit"
import socket, subprocess, sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from conftest import reached


def in_new_process(code):
    "Run `code` where no other machine can be reached"
    guarded = f'from conftest import reached\n{code}\nassert not reached, reached'
    return subprocess.run([sys.executable, '-c', guarded], cwd=Path(__file__).parent, capture_output=True, text=True)

def test_no_import_and_no_fit_uses_the_network(tmp_path):
    done = in_new_process(f'''
from fastai.vision.all import *
from fastcb_training.all import *
from fastcb_training.data import digits
dls = ImageDataLoaders.from_folder(digits({str(tmp_path)!r}, [0, 1], 8), valid_pct=.5, bs=16, num_workers=0, device='cpu')
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).requires_grad_(False), nn.Flatten(), nn.Linear(144, 2))
learn = Learner(dls, model, cbs=[GradientAccumulation, GradientClip, BnFreeze])
learn.fit(1, cbs=ShortEpochCallback(.2))
assert learn.recorder.values and frozen_bn(model)
set_bn_eval(model)''')
    assert done.returncode == 0, done.stderr

tries = ["urlopen('http://example.com')", "socket.create_connection(('192.0.2.1', 80), timeout=1)",
         "socket.create_connection(('2001:db8::1', 80), timeout=1)"]

@pytest.mark.parametrize('reach', tries)
def test_a_try_is_seen(reach):
    with pytest.raises(RuntimeError, match='is another machine'): eval(reach)
    assert [reached.pop()] and not reached

@pytest.mark.parametrize('reach', tries)
def test_a_try_is_seen_where_the_failure_is_swallowed(reach):
    imports = 'import socket\nfrom contextlib import suppress\nfrom urllib.request import urlopen\n'
    done = in_new_process(f'{imports}with suppress(Exception): {reach}')
    assert done.returncode and 'AssertionError' in done.stderr

def test_this_machine_may_be_reached():
    with socket.create_server(('127.0.0.1', 0)) as server:
        for host in '127.0.0.1', 'localhost': socket.create_connection((host, server.getsockname()[1])).close()
