"The package as pip gets it: the sdist, the wheel built from it, and that installed on its own"
import configparser, email, subprocess, sys, tarfile, zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns
from types import SimpleNamespace

import pytest
from nbdev.config import read_version

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
VERSION = read_version(ROOT/'fastcb_training')
NAMES = {'ShortEpochCallback', 'ResumeFit', 'GradientAccumulation', 'GradientClip', 'MicroBatch', 'FeatureCache',
         'BnFreeze', 'set_bn_eval', 'frozen_bn', 'bn_types'}


@pytest.fixture(scope='session')
def settings():
    cfg = configparser.ConfigParser(delimiters='=')
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "The sdist and the wheel, built in a copy, and without the network"
    tmp = tmp_path_factory.mktemp('dist')
    left = ignore_patterns('.*', '_docs', '_proc', '*.egg-info', 'build', 'dist')
    copytree(ROOT, tmp/'tree', symlinks=True, ignore=left)
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp, tmp/'tree'],
                   check=True, capture_output=True)
    sdist, wheel = tmp/f'fastcb_training-{VERSION}.tar.gz', tmp/f'fastcb_training-{VERSION}-py3-none-any.whl'
    return SimpleNamespace(sdist=sdist, wheel=wheel)

@pytest.fixture(scope='session')
def metadata(dist):
    with zipfile.ZipFile(dist.wheel) as z:
        return email.message_from_string(z.read(f'fastcb_training-{VERSION}.dist-info/METADATA').decode())


def test_metadata_is_that_of_pyproject(metadata):
    assert metadata['Name'] == PROJECT['name'] == 'fastcb_training'
    assert metadata['Version'] == VERSION
    assert metadata['Summary'] == PROJECT['description']
    assert metadata['License-Expression'] == PROJECT['license'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == PROJECT['requires-python'] == '>=3.10'
    assert set(metadata.get_all('Project-URL')) == {f'{k}, {v}' for k, v in PROJECT['urls'].items()}
    assert metadata.get_payload().strip() == (ROOT/'README.md').read_text(encoding='utf-8').strip()
    assert metadata['Description-Content-Type'] == 'text/markdown'

def test_metadata_is_that_of_settings(metadata, settings):
    assert metadata['Author'] == settings['author']
    assert metadata['Keywords'].split(',') == settings['keywords'].split()
    assert metadata.get_all('Classifier') == settings['classifiers'].strip().splitlines()

def test_requirements(metadata, settings):
    extras = {k[:-len('_requirements')]: v.split() for k, v in settings.items() if k.endswith('_requirements')}
    assert set(metadata.get_all('Provides-Extra')) == set(extras) == {'distributed', 'bench', 'dev'}
    optional = {f'{r}; extra == "{name}"' for name, rs in extras.items() for r in rs}
    assert set(metadata.get_all('Requires-Dist')) == {*settings['requirements'].split()} | optional
    assert settings['requirements'].split() == ['fastai>=2.8.1', 'torch>=2.3']

def test_wheel_has_the_package_and_nothing_else(dist):
    modules = {f'fastcb_training/{p.name}' for p in (ROOT/'fastcb_training').glob('*.py')}
    with zipfile.ZipFile(dist.wheel) as z: names = set(z.namelist())
    assert modules | {'fastcb_training/py.typed'} == {n for n in names if '.dist-info/' not in n}
    assert f'fastcb_training-{VERSION}.dist-info/licenses/LICENSE' in names

def test_sdist_has_what_the_wheel_needs_and_nothing_else(dist):
    with tarfile.open(dist.sdist) as t: tops = {n.split('/')[1] for n in t.getnames() if '/' in n}
    assert tops == {'LICENSE', 'MANIFEST.in', 'PKG-INFO', 'README.md', 'fastcb_training', 'fastcb_training.egg-info',
                    'pyproject.toml', 'settings.ini', 'setup.cfg', 'setup.py'}

def test_installed_on_its_own(dist, tmp_path):
    site, elsewhere = tmp_path/'site', tmp_path/'elsewhere'
    elsewhere.mkdir()
    pip = sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index'
    subprocess.run([*pip, '--target', site, dist.wheel], check=True)
    # In a folder of its own, with the installed one ahead of the checkout
    code = f'''import sys; sys.path.insert(0, {str(site)!r})
from fastcb_training.all import *
names = {{n for n in dir() if n[0] != '_'}} - {{'sys'}}
import fastcb_training
print(fastcb_training.__file__, fastcb_training.__version__, *sorted(names), sep='\\n')'''
    out = subprocess.run([sys.executable, '-c', code], cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    file, version, *names = out.splitlines()
    assert Path(file) == site/'fastcb_training/__init__.py'
    assert version == VERSION and set(names) == NAMES


# Runs what follows as if accelerate were not installed
WITHOUT_ACCELERATE = "import sys; sys.modules['accelerate'] = None\n"

def without_accelerate(code, *args):
    "Exit status, output and errors"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT_ACCELERATE + code, *args], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def test_accelerate_is_optional():
    status, out, errors = without_accelerate('''
from fastai.test_utils import *
from fastcb_training.all import *
learn = synth_learner()
with learn.no_bar(), learn.no_logging():
    learn.fit(1, cbs=[GradientAccumulation, GradientClip, ShortEpochCallback, BnFreeze])
print(len(learn.recorder.losses))''')
    assert (status, out) == (0, '1\n'), errors

def test_example_says_what_to_install():
    "fastai's own error is a NameError, which the page names: its import has no other"
    status, out, errors = without_accelerate('import runpy; runpy.run_path(sys.argv[1], run_name="__main__")',
                                             str(ROOT/'examples/distributed.py'))
    assert (status, out) == (1, '') and errors == "Several processes need accelerate: pip install 'fastcb_training[distributed]'\n"
    status, out, errors = without_accelerate('from fastai.distributed import *')
    assert status == 1 and errors.splitlines()[-1] == "NameError: name 'Accelerator' is not defined"
