"The benchmarks: quick runs of some cases, the form of what they write, the arithmetic, and what a failure does"
import json, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import jsonschema, pytest, torch

HERE = Path(__file__).resolve().parent.parent/'benchmarks'
SCHEMA = json.loads((HERE/'result.schema.json').read_text(encoding='utf-8'))
sys.path.insert(0, str(HERE))

from cases import Goal, cases
import run


def main(monkeypatch, *args):
    "`run.py` with `args`, in this process"
    monkeypatch.setattr(sys, 'argv', ['run.py', *args])
    return run.main()

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "What a quick run of a case wrote, and what it printed"
    out = tmp_path_factory.mktemp('bench')/'a new folder'
    command = [sys.executable, HERE/'run.py', '--quick', '--only', 'overhead', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=300)
    assert (done.returncode, done.stderr) == (0, ''), done.stdout + done.stderr
    assert [p.name for p in out.iterdir()] == ['overhead.json']
    return json.loads((out/'overhead.json').read_text(encoding='utf-8')), done.stdout

def test_quick_run_has_the_form(written):
    result, printed = written
    jsonschema.validate(result, SCHEMA)
    variants, names = {r['variant'] for r in result['rows']}, {r['at']['callback'] for r in result['rows']}
    assert variants == {*cases['overhead'].variants}
    assert names == {'ShortEpochCallback', 'GradientAccumulation', 'GradientClip', 'BnFreeze'}
    assert len(result['rows']) == len(variants)*len(names) and all(r['median'] > 0 for r in result['rows'])
    assert len(result['ratios']) == len(names) == printed.count('of fastai; goal at most 1 ')
    assert cases['overhead'].title in printed and all(f'callback {n}, µs a batch' in printed for n in names)

def test_ratios_are_those_of_the_rows(written):
    "One turn, so the median ratio is the ratio of the medians"
    rows = {(r['variant'], r['at']['callback']): r['median'] for r in written[0]['rows']}
    for r in written[0]['ratios']:
        def part(variant): return pytest.approx(rows[variant, r['at']['callback']]/rows['fastai', r['at']['callback']])
        assert r['median'] == part('here') and r['peer'] == dict(variant='fastai', median=1)
        assert r['limit'] == dict(variant='no callback', median=part('no callback'))

def test_nothing_names_the_machine_or_its_user(written):
    text = json.dumps(written[0])
    assert not any(o in text for o in (os.uname().nodename, str(HERE.parent), str(Path.home())))

@pytest.mark.parametrize('path', sorted((HERE/'results').glob('*.json')), ids=lambda p: p.stem)
def test_results_in_the_repository_have_the_form(path):
    result = json.loads(path.read_text(encoding='utf-8'))
    jsonschema.validate(result, SCHEMA)
    assert path.stem == result['case'] and {r['variant'] for r in result['rows']} | {*result['left_out']} == {
        *map(run.label, cases[path.stem].variants)}

# In the order of what they take; the others train for longer
@pytest.mark.parametrize('name', ['out_of_memory', 'resume_exact', 'spread_validation'])
def test_the_new_cases_run(name, tmp_path, monkeypatch):
    "What is counted, not timed, comes out as claimed"
    main(monkeypatch, '--quick', '--only', name, '--out', str(tmp_path))
    result = json.loads((tmp_path/f'{name}.json').read_text(encoding='utf-8'))
    jsonschema.validate(result, SCHEMA)
    counted = [r for r in result['ratios'] if r['unit'] != 's']
    assert counted and all(r['met'] for r in counted), counted

def test_every_case_has_a_result():
    assert {p.stem for p in (HERE/'results').glob('*.json')} >= {c.name for c in cases.values() if c.device == 'cpu'}

@pytest.mark.parametrize('spoil', [
    lambda r: r.pop('commit'), lambda r: r['rows'].clear(), lambda r: r['rows'][0].update(median='fast'),
    lambda r: r['rows'][0].pop('high'), lambda r: r['ratios'][0].pop('claim'),
    lambda r: r['ratios'][0].update(peer='fastai'), lambda r: r['machine'].update(hostname='pc'), lambda r: r.update(date='today')])
def test_the_form_refuses_what_is_none(written, spoil):
    result = json.loads(json.dumps(written[0]))
    spoil(result)
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate(result, SCHEMA)


def test_spread_is_median_and_quartiles():
    assert run.spread([1, 2, 3, 4, 100]) == dict(median=3, low=2, high=4, n=5)
    assert run.spread([7]) == dict(median=7, low=7, high=7, n=1)

def goal(sense, value, unit, **kwargs): return Goal('what', sense, value, unit, **kwargs)

@pytest.mark.parametrize('here, met', [([1.1, 2.2], False), ([.9, 1.9], True), ([1.001, 2.002], True)])
def test_ratios_are_paired_and_judged(here, met):
    found = {('here', 's', ('pct', 1)): here, ('fastai', 's', ('pct', 1)): [1, 2], ('here', 'MiB', ('pct', 1)): [5, 5]}
    ratio, = run.judge(goal('at most', 1, 's', to='fastai'), found)
    assert ratio['median'] == pytest.approx((here[0]+here[1]/2)/2) and (ratio['met'], ratio['at']) == (met, {'pct': 1})

def test_goals_without_a_peer_are_exact():
    found = {('here', 'error', ('bs', 1)): [2e-6]}
    assert [r['met'] for r in run.judge(goal('at most', 1e-6, 'error'), found)] == [False]
    assert [r['met'] for r in run.judge(goal('at least', 1e-6, 'error'), found)] == [True]
    assert [*run.judge(goal('at most', 1e-6, 'error', where=lambda at: at['bs'] > 1), found)] == []

@pytest.mark.parametrize('sense, best', [
    ('at most', dict(variant='b', median=.5)), ('at least', dict(variant='a', median=3))])
def test_best_peer_and_limit_are_in_the_same_parts(sense, best):
    found = {(v, 's'): o for v,o in dict(here=[1, 4], base=[1, 2], a=[3, 6], b=[.5, 1]).items()}
    def judged(**kwargs): return next(run.judge(goal(sense, 1, 's', to='base', **kwargs), found))
    assert judged(peers=['a', 'b', 'absent'], limit='b')['peer'] == best
    assert judged(limit='b')['limit'] == dict(variant='b', median=.5) and judged()['peer'] is None
    assert judged(limit=4/3)['limit'] == dict(variant=None, median=4/3)
    assert judged(limit='absent')['limit'] is None

def test_a_case_may_have_several_goals(tmp_path, monkeypatch, capsys):
    found = {('here', 's an epoch'): [1.], ('fastai', 's an epoch'): [2.], ('Accelerate', 's an epoch'): [.8]}
    monkeypatch.setattr(run, 'measure', lambda *args: found)
    run.run(cases['processes'], tmp_path, True, {})
    ratios = json.loads((tmp_path/'processes.json').read_text())['ratios']
    assert [(r['to'], r['met']) for r in ratios] == [('fastai', True), ('Accelerate', False)]
    printed = capsys.readouterr().out
    assert '0.500 of fastai; goal at most 0.75 met  1.250 of Accelerate; goal at most 1.1 MISSED' in printed

def test_goals_speak_of_what_is_there():
    for c in cases.values():
        labels = {run.label(v) for v in c.variants}
        for g in c.goals: assert {o for o in (g.of, g.to, *g.peers, g.limit) if isinstance(o, str)} <= labels
        assert len({g.claim for g in c.goals}) == len(c.goals)


def test_peers_that_are_not_installed_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, 'packages', {'one by one': 'no_such_package'})
    measured = []
    def measure(case, variants, quick):
        measured.extend(variants)
        return {('here', 'ms', ('parameters', 10**9)): [1.]}
    monkeypatch.setattr(run, 'measure', measure)
    run.run(cases['scale_parameters'], tmp_path, True, {})
    assert measured == ['one tensor', 'here']
    assert json.loads((tmp_path/'scale_parameters.json').read_text())['left_out'] == ['one by one']
    assert 'Left out, not installed: one by one' in capsys.readouterr().out

def test_a_worker_that_fails_is_named_with_its_error(monkeypatch):
    with pytest.raises(run.Failed, match='nobody failed:(.|\n)*ValueError'):
        run.measure(cases['memory'], ['nobody'], True)

def test_a_case_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    done = []
    def fails(case, *args):
        if case.name == 'scale_items': raise run.Failed('here failed:\nno reason')
        if case.name == 'scale_layers': 1/0
        done.append(case.name)
    monkeypatch.setattr(run, 'run', fails)
    with pytest.raises(SystemExit) as e: main(monkeypatch, '--only', 'scale', '--quick', '--out', str(tmp_path))
    assert e.value.code == '2 of 3 failed: scale_layers, scale_items' and done == ['scale_parameters']
    printed = capsys.readouterr().out
    assert 'here failed:\nno reason' in printed and 'ZeroDivisionError' in printed

def test_what_hangs_is_stopped(monkeypatch):
    popen,begin = subprocess.Popen,time.monotonic()
    monkeypatch.setattr(run.subprocess, 'Popen', lambda command, **kwargs: popen(['sleep', '60'], **kwargs))
    monkeypatch.setattr(run, 'GRACE', .5)
    with pytest.raises(run.Failed, match='took too long'):
        run.measure(replace(cases['memory'], minutes=0), ['here'], True)
    assert time.monotonic()-begin < 30

def test_minutes_end_a_case(monkeypatch):
    "The first turn is done, however long it takes"
    class Fake:
        errors = None
        def __init__(self, case, variant, *args): self.variant,self.ranks = variant,[]
        def read(self): pass
        def turn(self): return [(1., 's', {})]
        def end(self, failed): pass
    monkeypatch.setattr(run, 'Worker', Fake)
    case = cases['overhead']
    def turns(minutes): return len(run.measure(replace(case, minutes=minutes), ['here'], False)['here', 's'])
    assert turns(0) == 1 and turns(1) == case.sessions*case.turns

def test_a_case_that_does_not_exist_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit): main(monkeypatch, '--only', 'sleep')
    assert "there is no case that begins with 'sleep'" in capsys.readouterr().err

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    main(monkeypatch, '--cuda')
    assert capsys.readouterr().out == 'Skipped: there is no CUDA GPU here.\n'
