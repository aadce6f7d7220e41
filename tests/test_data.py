"What the page of `digits` cannot show: all of the data, processes at once, interrupts, a full disk"
import errno, multiprocessing, os, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sklearn.datasets import load_digits

from fastcb_training import data
from fastcb_training.data import digits


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return digits(tmp_path_factory.mktemp('whole'), size=8)


def files(folder): return sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*') if o.is_file())
def state(folder): return {o: (o.stat().st_mtime_ns, o.stat().st_ino) for o in [folder, *folder.rglob('*')]}
def is_whole(folder, classes):
    return files(folder) == sorted(f'{c}/{i:04}.png' for i,c in enumerate(load_digits().target) if c in classes)


def test_all_of_the_data(whole):
    "At its own size each picture is the digit: 0 to 16 as 0 to 255"
    truth = load_digits()
    assert is_whole(whole, range(10)) and len(files(whole)) == 1797
    for i,(image,c) in enumerate(zip(truth.images, truth.target)):
        with Image.open(whole/str(c)/f'{i:04}.png') as picture:
            assert picture.format == 'PNG' and picture.mode == 'RGB' and picture.size == (8, 8)
            assert (np.asarray(picture) == np.rint(image*255/16)[..., None]).all()


@pytest.mark.parametrize('size', [1, 5, 32, np.int64(50)])
def test_sizes(tmp_path, size):
    "Larger pictures are interpolated bilinearly, as torch does"
    folder,truth = digits(tmp_path, classes=[3], size=size),load_digits().images
    assert is_whole(folder, [3])
    for file in (folder/'3').iterdir():
        with Image.open(file) as picture:
            assert picture.mode == 'RGB' and picture.size == (size, size)
            pixels = np.asarray(picture).astype(float)
        assert (pixels == pixels[..., :1]).all()
        image = torch.tensor(truth[int(file.stem)]*255/16).round()[None,None]
        twin = torch.nn.functional.interpolate(image, (int(size),)*2, mode='bilinear', antialias=True)[0,0].numpy()
        assert abs(pixels[..., 0]-twin).max() <= 1 # rounded once for each direction


@pytest.mark.parametrize('classes,names', [([7], '7'), ((9, 0, 9), '09'), ({1, 2}, '12'), (range(4, 6), '45'),
                                           (np.arange(3), '012'), ((c for c in (8, 1)), '18')])
def test_classes(tmp_path, classes, names):
    folder = digits(tmp_path, classes, 8)
    assert sorted(o.name for o in folder.iterdir()) == sorted(names) and is_whole(folder, [int(c) for c in names])


def test_found_again_and_not_written(tmp_path, monkeypatch):
    first = digits(tmp_path, [8, 0], 8)
    before = state(tmp_path)
    monkeypatch.setattr(Image.Image, 'save', None)
    monkeypatch.setattr(data, 'load_digits', None)
    for classes in ([0, 8], (8, 0, 8), range(0, 9, 8), np.array([0, 8])):
        assert digits(tmp_path, classes, size=8) == first
    assert state(tmp_path) == before


def test_each_choice_has_a_folder_of_its_own(tmp_path):
    "Else a small choice would be found again for a large one"
    choices = [([0], 8), ([0, 1], 8), ([0], 9), ([1], 8), ([0], 1)]
    folders = [digits(tmp_path, *o) for o in choices]
    assert len({*folders}) == len(choices) and all(is_whole(f, c) for f,(c,_) in zip(folders, choices))
    assert sorted(folders) == sorted(tmp_path.iterdir())


def in_a_process(path, barrier, results):
    rename = os.rename
    def together(*args, **kwargs):
        barrier.wait(60)
        return rename(*args, **kwargs)
    os.rename = together
    try: results.put(digits(path, [1, 2], 8))
    except BaseException as e: results.put(e)


def test_processes_at_once_give_one_whole_folder(tmp_path, n=3):
    "All of them have written everything before the first one gives it its name"
    ctx = multiprocessing.get_context('fork')
    barrier,results = ctx.Barrier(n),ctx.Queue()
    processes = [ctx.Process(target=in_a_process, args=(tmp_path, barrier, results)) for _ in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning) # a fork beside threads
        for p in processes: p.start()
    found = {results.get(timeout=60) for _ in processes}
    for p in processes: p.join(60)
    folder, = found
    assert is_whole(folder, [1, 2]) and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize('where,error', [('save', OSError(errno.ENOSPC, 'No space left on device')), ('rename', KeyboardInterrupt()),
                                         ('load', SystemExit(1))])
def test_a_failure_leaves_nothing_and_the_next_call_writes_all(tmp_path, monkeypatch, where, error):
    calls = []
    def fail(f, after):
        def _inner(*args, **kwargs):
            calls.append(args)
            if len(calls) > after: raise error
            return f(*args, **kwargs)
        return _inner
    with monkeypatch.context() as m:
        if where == 'save': m.setattr(Image.Image, 'save', fail(Image.Image.save, 200))
        elif where == 'rename': m.setattr(os, 'rename', fail(os.rename, 0))
        else: m.setattr(data, 'load_digits', fail(load_digits, 0))
        with pytest.raises(type(error)) as e: digits(tmp_path/'new', [1, 2], 8)
    assert e.value is error and calls and not [*(tmp_path/'new').iterdir()]
    assert is_whole(digits(tmp_path/'new', [1, 2], 8), [1, 2])


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert digits('a/b', [1], 8).resolve().parent == tmp_path/'a'/'b'
    assert digits(Path('.'), [1], 8).resolve().parent == tmp_path
    assert digits(str(tmp_path/'c'), [1], 8).parent == digits(tmp_path/'c', [1], 8).parent == tmp_path/'c'


def test_the_folder_of_fastai_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    fastai_cfg.cache_clear() # it keeps what it has read
    try: assert digits(classes=[1], size=8).parent == tmp_path/'data'/'fastcb_training'
    finally: fastai_cfg.cache_clear()


def test_fastai_reads_it(whole):
    dls = ImageDataLoaders.from_folder(whole, valid_pct=.2, seed=0, bs=32, num_workers=0, device='cpu')
    x,y = dls.train.one_batch()
    assert [*dls.vocab] == [*'0123456789'] and x.shape == (32, 3, 8, 8) and len(dls.train_ds)+len(dls.valid_ds) == 1797
    assert 0 <= x.min() and x.max() == 1 and y.shape == (32,)


def test_others_may_read_it(whole):
    "The folder has the rights of any that is made here, not those of a temporary one"
    (made := whole.parent/'made').mkdir()
    assert whole.stat().st_mode == (whole/'0').stat().st_mode == made.stat().st_mode
    made.rmdir()
