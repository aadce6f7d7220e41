"Everything that makes no sense is refused at once, and says so: the table is in refusals.py"
import inspect
from fractions import Fraction

import pytest

import fastcb_training.all as everything
from common import *
from fastcb_training.all import *
from fastcb_training.data import digits
from refusals import refusals

public = {name: o for name,o in [*vars(everything).items(), ('digits', digits)] if callable(o) and not name.startswith('_')}
rows = [(name, arg, error, value) for name,args in refusals.items() for arg,errors in args.items()
        for error,values in errors.items() for value in values]
allowed = dict(fname='the name of a file', every='a number of minutes, 0 or above', minutes='a number of minutes above 0, or None',
               body='a module, a function of the model, or None', views='a whole number, 1 or more',
               pct='a number above 0 and at most 1', n_batches='a whole number, 1 or more', n_valid='a whole number, 1 or more',
               n_acc='a finite number above 0', count='a function of the targets', reduction="None or one of ('mean', 'sum')",
               max_norm='a number above 0', norm_type='a number above 0', nonfinite="one of ('skip', 'raise', 'ignore')",
               m='a module', part='a function of the model, or None', path='a path', classes='one or more whole numbers from 0 to 9',
               size='a whole number', before_fit='a function of the callback')


def shown(value):
    "How a message may show `value`: as it is, by the number it holds, by what in it is at fault"
    parts = [value, value.item()] if getattr(value, 'ndim', None) == 0 else [value]
    if isinstance(value, (str, list, tuple, dict, range)): parts += [[*value], *value]
    return [f'not {o!r}' for o in parts]

@pytest.mark.parametrize('name, arg, error, value', rows, ids=lambda o: getattr(o, '__name__', repr(o)))
def test_refused(tmp_path, monkeypatch, name, arg, error, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    kwargs = value if arg == 'events' else {arg: value}
    m = nn.BatchNorm1d(3).requires_grad_(False)
    if name == 'set_bn_eval': kwargs = {'m': m, **kwargs}
    with pytest.raises(error) as raised: public[name](**kwargs)
    assert type(raised.value) is error
    assert m.training and not [*tmp_path.iterdir()], 'something was done all the same'
    message = str(raised.value)
    if arg == 'events': [(arg, value)] = value.items()
    if name == 'BnFreeze' and arg not in ('only_frozen', 'all_layers', 'part', 'before_fit'): # no argument at all
        assert f'`{arg}`' in message and all(event in message for event in Callback._methods)
    else:
        assert f"`{arg}` has to be {allowed.get(arg, 'True or False')}" in message
        assert any(o in message for o in shown(value))


def test_every_argument_has_its_rows():
    assert {name: {*args} for name,args in refusals.items()} == {name: {*inspect.signature(o).parameters} for name,o in public.items()}
    assert all(values for args in refusals.values() for errors in args.values() for values in errors.values())


def fitted(cbs):
    learn = linear_learner(cbs=cbs)
    learn.fit(2, .1)
    assert not weights(learn.model).equal(weights(linear_learner().model))
    return weights(learn.model)

@pytest.mark.parametrize('number', [Fraction, np.float16, np.float32, np.float64], ids=lambda o: o.__name__)
def test_numbers_of_every_kind(number):
    "A fit with them is the one with Python's own"
    def cbs(kind): return [ShortEpochCallback(kind(.5)), GradientAccumulation(kind(24.5)), GradientClip(kind(.25), kind(2.5))]
    assert fitted(cbs(number)).equal(fitted(cbs(float)))

@pytest.mark.parametrize('whole', [np.int8, np.uint8, np.int64], ids=lambda o: o.__name__)
def test_whole_numbers_of_every_kind(tmp_path, whole):
    def cbs(kind): return [ShortEpochCallback(n_batches=kind(6)), GradientAccumulation(kind(24)), GradientClip(kind(1), kind(3))]
    assert fitted(cbs(whole)).equal(fitted(cbs(int)))
    assert digits(tmp_path, [whole(1), whole(3)], whole(8)) == digits(tmp_path, [1, 3], 8)
