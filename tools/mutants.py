"Breaks the lines in tests/mutants.yml, one at a time in a copy of the project, and notes which check sees it"
import json, os, re, subprocess, sys
from pathlib import Path
from shutil import copy2
from tempfile import TemporaryDirectory

import nbformat, yaml
from nbclient.exceptions import CellExecutionError

from notebooks import Runner
from readme import ROOT

LIST, TABLE = ROOT/'tests/mutants.yml', ROOT/'nbs/explanations/mutants.json'


def mutants(): return yaml.safe_load(LIST.read_text(encoding='utf-8'))

def source(root, module):
    "The first notebook named in an exported module"
    text = (root/f'fastcb_training/{module}.py').read_text(encoding='utf-8')
    return root/'fastcb_training'/re.search(r'File to edit: (.+?\.ipynb)', text)[1]

def once(text, old, new):
    "`text` with the one `old` in it replaced"
    if text.count(old) != 1: raise ValueError(f'{text.count(old)} times, not once: {old}')
    return text.replace(old, new)

def break_line(root, module, old, new):
    "Break a line of a module, and of the notebook that it comes from"
    path = root/f'fastcb_training/{module}.py'
    path.write_text(once(path.read_text(encoding='utf-8'), old, new), encoding='utf-8')
    nb = nbformat.read(source(root, module), as_version=4)
    exported = [c for c in nb.cells if c.cell_type == 'code' and re.search(r'^#\| *exports?\b', c.source, re.M)]
    cell, = [c for c in exported if old in c.source]
    cell.source = once(cell.source, old, new)
    nbformat.write(nb, source(root, module))


def copy_project(to):
    "What git knows of, as it stands now"
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split('\0')):
        if not (ROOT/name).exists(): continue
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT/name, to/name, follow_symlinks=False)

def page_fails(path):
    "The section of the page at `path` in which a cell fails, or None"
    runner = Runner(Path(path).resolve())
    try: runner.execute()
    except CellExecutionError:
        heading = ''
        for cell in runner.nb.cells:
            if cell.cell_type == 'markdown': heading = (re.findall(r'^#+ (.+)$', cell.source, re.M) or [heading])[-1]
            if any(o.output_type == 'error' for o in cell.get('outputs', ())): return heading
        return heading

def seen(root, check):
    "What fails in `check`, a page or a test, of the project in `root`; None if nothing does"
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = ([sys.executable, '-W', 'ignore', 'tools/mutants.py', '--page', check] if check.endswith('.ipynb') else
               [sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider', check])
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode == 0: return None
    found = re.search(r'^fails in: (.*)$', done.stdout, re.M) or re.search(r'^FAILED .*?::(\w+)', done.stdout, re.M)
    if not found: raise RuntimeError(f'{check} could not run:\n{done.stdout}{done.stderr}')
    return found[1]


def run(words=()):
    "Try the mutants whose module is among `words`, or all; the table keeps what it has of the others"
    known = {m['breaks']: m for m in json.loads(TABLE.read_text(encoding='utf-8'))} if TABLE.exists() else {}
    rows, sound = [], {}
    for m in mutants():
        if words and m['module'] not in words:
            if m['breaks'] in known: rows.append(known[m['breaks']])
            continue
        with TemporaryDirectory() as tmp:
            root, check = Path(tmp).resolve(), m['seen_by']
            copy_project(root)
            if check not in sound: sound[check] = seen(root, check)
            if sound[check] is not None: raise SystemExit(f'{check} fails with nothing broken: {sound[check]}')
            break_line(root, m['module'], m['old'], m['new'])
            found = seen(root, check)
        rows.append(dict(m, found=found))
        print(f"{'seen' if found is not None else 'NOT SEEN'}: {m['module']}: {m['breaks']} ({check}: {found})", flush=True)
    TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return sum(m['found'] is None for m in rows)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--page']:
        where = page_fails(sys.argv[2])
        if where is not None: sys.exit(print(f'fails in: {where}') or 1)
    else: sys.exit(run(sys.argv[1:]) > 0)
