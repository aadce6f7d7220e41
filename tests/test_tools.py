"The scripts in tools/: what is stale is named, and nothing else is touched"
import json, shutil

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

import check, mutants, notebooks, readme


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The project as nbdev makes it of the notebooks"
    with check.scratch() as root:
        for step, _ in check.STEPS.values(): step()
        return shutil.copytree(root, tmp_path_factory.mktemp('made')/'tree', symlinks=True)

@pytest.fixture
def tree(made):
    "A copy of it to spoil, which is the current directory"
    with check.scratch(made) as root: yield root


def test_check_passes_what_nbdev_made(tree, capsys):
    assert check.main(tree) == 0
    assert [l[:4] for l in capsys.readouterr().out.splitlines()] == ['ok: '] * 3


def edit_module(root):
    path = root/'fastcb_training/bnfreeze.py'
    path.write_text(path.read_text() + '\n# by hand\n')

def leave_orphan(root):
    shutil.copy(root/'fastcb_training/bnfreeze.py', root/'fastcb_training/orphan.py')

def run_a_cell(root):
    path = root/'nbs/06_bnfreeze.ipynb'
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7', 1))

def edit_readme(root): (root/'README.md').write_text('# Another\n')

def add_to_llms(root):
    with (root/'nbs/llms.txt').open('a') as f: f.write('by hand\n')


@pytest.mark.parametrize('fault, path, command', [
    (edit_module, 'fastcb_training/bnfreeze.py', 'nbdev-export'),
    (leave_orphan, 'fastcb_training/orphan.py', 'nbdev-export'),
    (run_a_cell, 'nbs/06_bnfreeze.ipynb', 'nbdev-clean'),
    (edit_readme, 'README.md', 'make readme'), (add_to_llms, 'nbs/llms.txt', 'make readme')])
def test_check_names_what_is_stale(tree, capsys, fault, path, command):
    fault(tree)
    before = check.contents()
    assert check.main(tree) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [l for l in lines if not l.startswith('ok: ')] == [f'stale: {path} (run {command})']
    assert check.contents() == before


@pytest.mark.parametrize('link, outside', [
    ('shortepoch.html', 'https://a.io/b/shortepoch.html'),
    ('03_accumulation.ipynb#rules', 'https://a.io/b/accumulation.html#rules'),
    ('tutorials/smoke_test.ipynb', 'https://a.io/b/tutorials/smoke_test.html'),
    ('#install', '#install'), ('https://c.io/d.ipynb', 'https://c.io/d.ipynb')])
def test_readme_links(link, outside): assert readme.absolute(link, 'https://a.io/b') == outside


def test_readme_has_no_directives(): assert '#|' not in readme.readme()


def notebook(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources]), path)
    return path

def outputs(path): return [c.outputs for c in nbformat.read(path, as_version=4).cells]

def test_notebooks_run_in_place(tree):
    path = notebook(tree/'nbs/a.ipynb',
                    'from fastprogress import *\nfor _ in progress_bar(range(3), leave=False): pass',
                    "mb = master_bar(range(2))\nfor _ in mb: mb.write(['a', 'b'], table=True)",
                    '#| eval: false\n1/0', '1 + 1')
    notebooks.run(path)
    bar, table, skipped, value = outputs(path)
    assert bar == skipped == []
    assert [list(o.data) for o in table] == [['text/html']] and '<th>a</th>' in table[0].data['text/html']
    assert value[0].data == {'text/plain': '2'}
    once = path.read_bytes()
    notebooks.run(path)
    assert path.read_bytes() == once

def test_notebook_that_fails_stays_as_it_was(tree):
    path = notebook(tree/'nbs/a.ipynb', '1 + 1', '1/0')
    before = path.read_bytes()
    with pytest.raises(Exception, match='ZeroDivisionError'): notebooks.run(path)
    assert path.read_bytes() == before

def test_notebook_keeps_no_bar_that_stood_still(tree):
    path = notebook(tree/'nbs/a.ipynb', 'from fastprogress import *',
                    "mb = master_bar(range(2))\ntry:\n    for _ in mb:\n        mb.write(['a', 'b'], table=True)\n        1/0\n"
                    "except ZeroDivisionError: pass")
    notebooks.run(path)
    html = ''.join(o.data['text/html'] for o in outputs(path)[1])
    assert '<th>a</th>' in html and '<progress' not in html


# Lines that are broken on purpose

@pytest.mark.parametrize('mutant', mutants.mutants(), ids=lambda m: f"{m['module']}: {m['breaks']}")
def test_a_mutant_breaks_a_line_that_is_there(tree, mutant):
    mutants.break_line(tree, mutant['module'], mutant['old'], mutant['new'])
    assert mutant['old'] not in (tree/f"fastcb_training/{mutant['module']}.py").read_text(encoding='utf-8')
    assert (readme.ROOT/mutant['seen_by'].partition('::')[0]).exists()

def test_the_table_of_mutants_is_that_of_the_list():
    "And each of them was seen"
    table = json.loads(mutants.TABLE.read_text(encoding='utf-8'))
    assert [{k: v for k, v in m.items() if k != 'found'} for m in table] == mutants.mutants()
    assert all(m['found'] for m in table)

def test_a_line_that_is_not_there_is_no_mutant(tree):
    with pytest.raises(ValueError, match='0 times'): mutants.break_line(tree, 'core', 'no such line', '')
