"The site as far as it can be made without Quarto"
import subprocess, sys

import yaml

from readme import ROOT, scratch


def pages(folder):
    "The notebooks in `folder`, hidden ones left out"
    found = {p.relative_to(folder) for p in folder.rglob('*.ipynb')}
    return {p.as_posix() for p in found if not any(part[0] in '._' for part in p.parts)}

def leaves(entry):
    "The files named in an entry of the sidebar"
    if isinstance(entry, str): return {entry}
    return set().union({entry['href']} if 'href' in entry else (), *map(leaves, entry.get('contents', ())))

def test_sidebar_has_every_page():
    website = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
    assert leaves(website['sidebar']) == pages(ROOT/'nbs')

def test_every_page_is_ready_for_quarto():
    "nbdev runs the imports and the exported cells of each, from the root, not from nbs/"
    with scratch() as root:
        done = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'],
                              cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert pages(root/'_proc') == pages(root/'nbs')

def test_no_page_tells_where_it_was_run():
    for page in pages(ROOT/'nbs'):
        text = (ROOT/'nbs'/page).read_text(encoding='utf-8')
        assert str(ROOT) not in text and 'site-packages' not in text, page
