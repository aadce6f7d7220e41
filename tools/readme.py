"Makes README.md from nbs/index.ipynb, as nbdev-readme does with Quarto, but without it; and nbs/llms.txt from all pages"
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


def raw_html(markdown):
    "The HTML in it as GitHub takes it, which is Quarto's without the fence"
    return re.sub(r'^```\{=html\}\n(.*?)\n```$', r'\1', markdown, flags=re.M | re.S)

def plain(cell, site):
    "`cell` without what only the site understands"
    cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)
    if cell.cell_type == 'markdown':
        cell.source = re.sub(r'(\]\(|(?:href|src)=")([^)"\s]+)', lambda m: m[1] + absolute(m[2], site), cell.source)
    if cell.cell_type == 'code':
        # A picture would have to be a file of its own beside README.md
        cell.outputs = [o for o in cell.outputs if 'image/png' not in o.get('data', {})]
        for o in cell.outputs:
            if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = raw_html(o.data['text/markdown'])
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


def title(path):
    "What the page says it is: its first lines, `# title` and `> description`"
    source = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown')
    return re.match(r'# (.+)\n+> (.+)', source).groups()

def llms(root=ROOT):
    "The text of nbs/llms.txt, which nbdev would make of the modules alone: each page of the sidebar, as Markdown"
    cfg, root = get_config(root), Path(root)
    intro = next(c.source for c in nbformat.read(root/'nbs/index.ipynb', as_version=4).cells if '#| export' in c.source)
    blocks = [f'# {cfg.title}', f'> {cfg.description}', intro.replace('#| export\n', '', 1)]
    for section in yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if 'contents' not in section: continue
        pages = [(*title(root/'nbs'/page), absolute(page, cfg.doc_url)) for page in section['contents']]
        blocks += [f"## {section['section']}", '\n'.join(f'- [{t}]({url}.md): {d}' for t, d, url in pages)]
    return '\n\n'.join([*blocks, '<!-- Made by `make readme` -->']) + '\n'


MADE = {'README.md': readme, 'nbs/llms.txt': llms}

def make(root=ROOT):
    for path, text in MADE.items(): (Path(root)/path).write_text(text(root), encoding='utf-8')


if __name__ == '__main__': make()
