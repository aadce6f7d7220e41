"The set-up in the Makefile: asked for once, taken up again, refused in plain words"
import os, shutil, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METADATA = 'pyproject.toml', 'settings.ini', 'setup.py'

# Stands for Python and its pip: notes what it is asked, and fails where that has the words in the file `broken`
PYTHON = '''#!/bin/sh
echo "$*" >> log
[ "$1" = --version ] && echo Python 3.9.1
[ "$1 $2" = "-m venv" ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python
broken=$(cat broken)
case "$*" in *"${broken:-nothing}"*) exit 1 ;; esac
'''

@pytest.fixture
def clone(tmp_path):
    "What the set-up reads, in a folder with a space in its name"
    root = tmp_path/'a clone'
    root.mkdir()
    for name in 'Makefile', *METADATA: shutil.copy(ROOT/name, root)
    (root/'python').write_text(PYTHON)
    (root/'python').chmod(0o755)
    (root/'broken').touch()
    return root

def set_up(clone, broken='', python='./python'):
    "`make` with what is broken: its exit status, all it prints, and what Python was asked"
    (clone/'broken').write_text(broken)
    (clone/'log').write_text('')
    # `make test` hands its own options on
    env = {k: v for k, v in os.environ.items() if 'MAKE' not in k and k != 'MFLAGS'}
    done = subprocess.run(['make', f'PYTHON={python}', '.venv/.ready'], cwd=clone, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout, (clone/'log').read_text()


@pytest.mark.parametrize('broken, python, says', [
    ('', './none', 'No ./none here'), ('version_info', './python', 'Python 3.9.1 is too old'),
    ('ensurepip', './python', 'has no venv module')])
def test_refusals(clone, broken, python, says):
    status, out, _ = set_up(clone, broken, python)
    assert status and says in out and 'Setting up' not in out and not (clone/'.venv').exists()

def test_says_what_it_does(clone):
    status, out, log = set_up(clone)
    assert status == 0 and out.count('\n') == 1 and 'about 6 GB' in out
    assert log.splitlines()[-1].endswith('--editable .[dev]')
    assert set_up(clone)[2] == ''

def test_interrupted_is_taken_up_again(clone):
    assert set_up(clone, broken='pip install')[0] and not (clone/'.venv/.ready').exists()
    status, _, log = set_up(clone)
    assert status == 0 and '-m venv' not in log and 'pip install' in log

def test_broken_environment_is_made_anew(clone):
    (clone/'.venv/bin').mkdir(parents=True)
    status, _, log = set_up(clone)
    assert status == 0 and '-m venv --clear .venv' in log

@pytest.mark.parametrize('name', METADATA)
def test_newer_metadata_sets_up_again(clone, name):
    set_up(clone)
    times = {**dict.fromkeys(METADATA, 1), '.venv/.ready': 2}
    for file, t in times.items(): os.utime(clone/file, (t, t))
    assert set_up(clone)[2] == ''
    os.utime(clone/name, (3, 3))
    status, _, log = set_up(clone)
    assert status == 0 and 'pip install' in log and '-m venv' not in log
