"Makes README.md from nbs/index.ipynb: the page as nbdev shows it, in Markdown, with absolute links"
import re
from contextlib import contextmanager
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
from tempfile import TemporaryDirectory
from urllib.parse import urljoin, urlsplit

import nbformat, yaml
from fastcore.foundation import working_directory
from nbconvert import MarkdownExporter
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
SOURCES = 'pyproject.toml', 'README.md', '_quarto.yml', 'nbs', 'fastcb_training'


@contextmanager
def scratch(root=ROOT):
    "Work in a copy of the project as it stands, committed or not"
    with TemporaryDirectory() as tmp:
        for p in (Path(root)/o for o in SOURCES):
            if p.is_dir(): copytree(p, Path(tmp)/p.name, symlinks=True, ignore=ignore_patterns('__pycache__', '.*'))
            elif p.exists(): copy2(p, tmp)
        with working_directory(tmp): yield Path(tmp)


def absolute(link, site):
    "`link` as it reads from outside the site, where 01_x.ipynb is the page x.html"
    if urlsplit(link).scheme or link.startswith('#'): return link
    path, mark, anchor = link.partition('#')
    if path.endswith('.ipynb'): path = nbpath2html(path).as_posix()
    return urljoin(f'{site}/', path) + mark + anchor


def plain(cell, site):
    "`cell` without what only the site understands"
    cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)
    if cell.cell_type == 'markdown':
        cell.source = re.sub(r'(\]\(|(?:href|src)=")([^)"\s]+)', lambda m: m[1] + absolute(m[2], site), cell.source)
    if cell.cell_type == 'code':
        # A picture would have to be a file of its own beside README.md
        cell.outputs = [o for o in cell.outputs if 'image/png' not in o.get('data', {})]
    return cell


def readme(root=ROOT):
    "The text of README.md"
    with scratch(root):
        site = get_config().doc_url
        nb = nbformat.read(proc_nbs(file_glob='index.ipynb', n_workers=0)/'index.ipynb', as_version=4)
    front, *cells = nb.cells
    front = next(yaml.safe_load_all(front.source))
    title = nbformat.v4.new_markdown_cell(f"# {front['title']}\n\n> {front['description']}")
    nb.cells = [title, *(plain(c, site) for c in cells)]
    nb.metadata.language_info = {'name': 'python'}  # the colours of code on GitHub
    text = MarkdownExporter().from_notebook_node(nb)[0]
    text = re.sub(r'<style.*?</style>\n*', '', text, flags=re.S)
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
