"""Measure this library beside what would be used instead of it

Each variant of a case has a process of its own. It sets up and warms up; then the variants take turns, A B A B, and
only one of them works at a time. A session is a set of new processes. What comes out, a JSON file a case, has medians
with the lower and the upper quartile; a ratio is taken turn by turn, and its median and quartiles are over the turns. A
case whose minutes are used up begins no more turns. One that fails is named at the end, and the others are measured.
"""
import argparse, importlib.util, json, os, platform, re, subprocess, sys, threading, time, traceback
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from socket import socket
from statistics import median, quantiles
from tempfile import TemporaryDirectory, TemporaryFile

from cases import cases
from peers import packages

HERE = Path(__file__).resolve().parent
GRACE = 300 # seconds that a session may take beyond its case's minutes, before it is killed


class Failed(Exception): "A case has no result"


def label(variant):
    "Its name, without the setting of its process"
    return variant.partition(',')[0]


class Worker:
    "The process, or the several ranks, of one variant: does a turn when told to"
    def __init__(self, case, variant, quick, folder):
        env = os.environ|{'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'BENCH_FOLDER': folder}|case.env
        with socket() as s: # a free port
            s.bind(('127.0.0.1', 0))
            group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(case.n_proc))
        if case.n_proc > 1: env |= group
        self.variant,self.errors = variant,TemporaryFile('w+')
        command = [sys.executable, __file__, '--worker', case.name, variant] + ['--quick']*quick
        rank = (lambda r: dict(RANK=str(r), LOCAL_RANK=str(r))) if case.n_proc > 1 else lambda r: {}
        self.ranks = [subprocess.Popen(command, env=env|rank(r), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=self.errors, text=True) for r in range(case.n_proc)]

    def read(self):
        "What the first rank says, once all have said something"
        lines = [p.stdout.readline() for p in self.ranks]
        if all(lines): return json.loads(lines[0])
        self.errors.seek(0)
        raise Failed(f'{self.variant} failed:\n{self.errors.read()[-3000:] or "it was killed, or took too long"}')

    def turn(self):
        for p in self.ranks: print('go', file=p.stdin, flush=True)
        return self.read()

    def end(self, failed):
        "No more turns"
        for p in self.ranks:
            if failed: p.kill()
            p.communicate()
        self.errors.close()


def work(case, variant, quick):
    "What a worker does: its turns alone go to standard output"
    out,sys.stdout = sys.stdout,sys.stderr
    turn = case.setup(variant, quick)
    print('"ready"', file=out, flush=True)
    for _ in sys.stdin: print(json.dumps(list(turn())), file=out, flush=True)


class Clock:
    "The time that a case has, and a line now and then that says how far it is"
    def __init__(self, minutes, quick):
        self.start,self.seconds,self.quick = time.monotonic(),60*minutes,quick
        self.said,self.live = self.start,sys.stderr.isatty()

    def is_over(self): return not self.quick and time.monotonic()-self.start > self.seconds

    def say(self, session, turn, variant):
        now = time.monotonic()
        text = f'  session {session+1}, turn {turn+1}, {now-self.start:.0f} s: {variant}'
        if self.live: print(f'{text:60}', end='\r', file=sys.stderr, flush=True)
        elif now-self.said > 30:
            self.said = now
            print(text, flush=True)

def measure(case, variants, quick):
    "`(variant, unit, at) -> values`, one for each turn"
    found,clock = {},Clock(case.minutes, quick)
    with TemporaryDirectory() as folder:
        for session in range(1 if quick else case.sessions):
            if session and clock.is_over(): break
            one_session(case, variants, quick, folder, session, clock, found)
    return found

def one_session(case, variants, quick, folder, session, clock, found):
    "Turns of a set of new processes"
    workers,failed = [],True
    stop = threading.Timer(clock.seconds+GRACE, lambda: [p.kill() for w in workers for p in w.ranks]) # one hangs
    stop.start()
    try:
        for v in variants: workers.append(Worker(case, v, quick, folder))
        for w in workers: w.read()
        for turn in range(1 if quick else case.turns):
            if turn and clock.is_over(): break
            for w in workers:
                clock.say(session, turn, w.variant)
                for value,unit,at in w.turn():
                    found.setdefault((label(w.variant), unit, *at.items()), []).append(value)
        failed = False
    finally:
        stop.cancel()
        for w in workers: w.end(failed)


def spread(values):
    "Median and quartiles"
    low,median,high = quantiles(values, n=4, method='inclusive') if len(values) > 1 else values*3
    return dict(median=median, low=low, high=high, n=len(values))

def judge(goal, found):
    "The paired ratios that `goal` speaks of, each with its verdict, and what the best peer and the limit reach"
    for (variant,unit,*at),values in found.items():
        if variant != goal.of or unit != goal.unit or not goal.where(dict(at)): continue
        def paired(v):
            "The values of variant `v`, in parts of what the goal speaks of"
            own,base = found.get((v, unit, *at)),found.get((goal.to, unit, *at)) if goal.to else [1]*len(values)
            return [a/b for a,b in zip(own, base)] if own and base else None
        if not (ratios := paired(variant)): continue
        peers = [dict(variant=p, median=median(o)) for p in goal.peers if p != variant and (o := paired(p))]
        limit = goal.limit
        if isinstance(limit, str): limit = dict(variant=limit, median=median(o)) if (o := paired(limit)) else None
        elif limit is not None: limit = dict(variant=None, median=limit)
        ratio,best = spread(ratios),min if goal.sense == 'at most' else max
        yield dict(claim=goal.claim, of=goal.of, to=goal.to, unit=unit, at=dict(at), **ratio, sense=goal.sense,
                   goal=goal.value, met=goal.met(ratio['median']),
                   peer=best(peers, key=lambda o: o['median'], default=None), limit=limit)


def git(*args): return subprocess.run(['git', *args], cwd=HERE, capture_output=True, text=True).stdout.strip()

def cpu():
    "The processor's name"
    if sys.platform == 'darwin':
        return subprocess.check_output(['sysctl', '-n', 'machdep.cpu.brand_string'], text=True).strip()
    info = Path('/proc/cpuinfo')
    found = re.search('model name.*: (.*)', info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or 'unknown'

def about(cuda):
    "Where, when and with what this is measured; nothing that names the machine or its user"
    import psutil, torch
    names = 'torch', 'torchvision', 'fastai', 'fastcb_training', *filter(importlib.util.find_spec, packages.values())
    return dict(
        date=f'{datetime.now(timezone.utc):%Y-%m-%d}', commit=git('rev-parse', '--short', 'HEAD'),
        changed=bool(git('status', '--porcelain', '--', '../fastcb_training', '*.py')),
        machine=dict(system=platform.system(), architecture=platform.machine(), processor=cpu(),
                     cores=os.cpu_count(), memory_gib=round(psutil.virtual_memory().total/2**30, 1),
                     gpu=torch.cuda.get_device_name() if cuda else None),
        versions={'python': platform.python_version(), **{o: version(o) for o in names}})


def cell(r): return f"{r['median']:.4g} ±{(r['high']-r['low'])/2/(r['median'] or 1):.0%}"

def table(result):
    "A result for the terminal: a line for each thing measured, half the distance of the quartiles behind each median"
    variants = list(dict.fromkeys(r['variant'] for r in result['rows']))
    ratios,lines = {},{}
    for r in result['ratios']: ratios.setdefault((r['unit'], *r['at'].items()), []).append(r)
    for r in result['rows']: lines.setdefault((r['unit'], *r['at'].items()), {})[r['variant']] = r
    yield f"  {'':48}" + ''.join(f'{v:>18}' for v in variants)
    for key,row in lines.items():
        cells = [cell(row[v]) if v in row else '' for v in variants]
        line = f"  {', '.join([*(f'{k} {v}' for k,v in key[1:]), key[0]]):48}" + ''.join(f'{c:>18}' for c in cells)
        for g in ratios.get(key, []):
            of = f"{g['median']:.3f} of {g['to']}; " if g['to'] else ''
            line += f"  {of}goal {g['sense']} {g['goal']:g} {'met' if g['met'] else 'MISSED'}"
        yield line


def run(case, out, quick, header):
    "Measure, write, and show one case"
    absent = {v for v,p in packages.items() if not importlib.util.find_spec(p)}
    print(case.title, flush=True)
    start,variants = time.monotonic(),[v for v in case.variants if label(v) not in absent]
    found = measure(case, variants, quick)
    result = dict(
        case=case.name, title=case.title, **header, quick=quick,
        sessions=1 if quick else case.sessions, turns=1 if quick else case.turns,
        left_out=sorted(absent & {*map(label, case.variants)}),
        rows=[dict(variant=v, unit=unit, at=dict(at), **spread(values)) for (v,unit,*at),values in found.items()],
        ratios=[r for goal in case.goals for r in judge(goal, found)], seconds=round(time.monotonic()-start, 1))
    out.mkdir(parents=True, exist_ok=True)
    (out/f'{case.name}.json').write_text(json.dumps(result, indent=1)+'\n', encoding='utf-8')
    print(*table(result), sep='\n')
    if result['left_out']: print('  Left out, not installed:', ', '.join(result['left_out']))
    print(f"  {result['seconds']:.0f} s\n", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--quick', action='store_true', help='a look: one turn each, and smaller')
    p.add_argument('--only', metavar='NAME', help=f"one case, or those that begin so: {', '.join(cases)}")
    p.add_argument('--cuda', action='store_true', help='the cases for a GPU, and no others')
    p.add_argument('--out', type=Path, help='folder for the JSON files; benchmarks/results if not given')
    p.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker: return work(cases[args.worker[0]], args.worker[1], args.quick)
    chosen = [c for c in cases.values() if (c.device == 'cuda') == args.cuda and c.name.startswith(args.only or '')]
    if not chosen: p.error(f"--only: there is no case that begins with '{args.only}'")
    if args.cuda:
        import torch
        if not torch.cuda.is_available(): return print('Skipped: there is no CUDA GPU here.')
    out,header = args.out or HERE/('../out/benchmarks' if args.quick else 'results'),about(args.cuda)
    failed = []
    for i,case in enumerate(chosen, 1):
        print(f'{i} of {len(chosen)}, {case.name}. ', end='')
        try: run(case, out, args.quick, header)
        except Exception as e:
            failed.append(case.name)
            why = e if isinstance(e, Failed) else traceback.format_exc()
            print(f'  FAILED, and has no new result: {why}\n', flush=True)
    if failed: sys.exit(f"{len(failed)} of {len(chosen)} failed: {', '.join(failed)}")


if __name__ == '__main__': main()
