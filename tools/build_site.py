"Builds the site with Quarto, and finishes what nbdev makes of a page: `doc_procs` in pyproject.toml names `Page`"
import inspect, re
from pathlib import Path, PurePosixPath
from shutil import rmtree
from urllib.parse import urlsplit

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.quarto import nbdev_docs
from nbdev.processors import mk_cell

import fastcb_training.all, fastcb_training.playground

ROOT = Path(__file__).resolve().parent.parent


def text(value): return ''.join(value) # a notebook may keep a text as its lines

def markdown_of(nb):
    "Read and write access to all Markdown of a page: (holder, key) of its cells and of their outputs"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield cell, 'source'
        for o in cell.get('outputs', ()):
            if 'text/markdown' in o.get('data', {}): yield o['data'], 'text/markdown'

def sub(nb, pattern, new):
    for holder, key in markdown_of(nb): holder[key] = re.sub(pattern, new, text(holder[key]), flags=re.M)


def drop_directives(nb):
    "nbdev leaves its directives in a text, where Quarto would show them"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)

def close_folds(nb):
    "Source that is shown beside its documentation begins closed"
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = cell.source.replace('#| code-fold: show\n', '#| code-fold: true\n', 1)


RULED = r'\A---\n+((?:\[source\].*\n+)?)(#+) (.+)\n+'

def lift_headings(nb):
    "`show_doc` puts its heading below a rule and inside an output, where Pandoc takes it into no table of contents"
    cells, named, level = [], set(), 1
    def key(name): return re.sub(r'\W', '', name)
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            for marks, name in re.findall(r'^(#+) (.+)$', without_code(cell.source), re.M):
                named.add(key(name))
                level = len(marks)
        for o in cell.get('outputs', ()):
            found = re.match(RULED, text(o.get('data', {}).get('text/markdown', '')))
            if found:
                source, _, name = found.groups()
                o['data']['text/markdown'] = source + text(o['data']['text/markdown'])[found.end():]
                if key(name) not in named: # else the page has a heading of its own for it
                    named.add(key(name))
                    level = min(level+1, 3)
                    cells.append(mk_cell(f'{"#"*level} {name}', 'markdown'))
        cells.append(cell)
    nb.cells = cells

def without_code(source): return re.sub(r'^```.*?^```', '', source, flags=re.M | re.S)


def keep_comments(nb):
    "fastcore drops the comment on `**kwargs`, which is its documentation"
    ours = vars(fastcb_training.all) | vars(fastcb_training.playground)
    for cell in nb.cells:
        shown = re.search(r'^show_doc\((\w+)', cell.source, re.M)
        if not shown or shown[1] not in ours: continue
        comments = re.findall(r'(\*\*\w+),? +(# .+)', inspect.getsource(ours[shown[1]]))
        for o in cell.get('outputs', ()):
            for arg, comment in comments:
                md = text(o.get('data', {}).get('text/markdown', ''))
                if md: o['data']['text/markdown'] = re.sub(rf'({re.escape(arg)}\b[^#\n]*)\n', rf'\1 {comment}\n', md, count=1)

def fastai_page(name):
    "Where fastai documents the class or function of this name"
    modules = NbdevLookup().entries['fastai']['syms'].values()
    return next((url for module in modules for key, (url, *_) in module.items() if key.endswith(f'.{name}')), None)

def link_fastai(nb):
    "nbdev links a name to ours; where the page says \"fastai's `X`\", theirs is meant"
    def theirs(m): return f'{m[1]}({url})' if (url := fastai_page(m[2])) else m[0]
    sub(nb, r"(fastai's (?:own )?\[`(\w+)(?:\(\))?`\])\([^)]*\)", theirs)


def unlink_private(nb):
    "A private name has no heading that its link could lead to"
    sub(nb, r'\[(`(?:\w+\.)*_\w+(?:\(\))?`)\]\([^)]*\)', r'\1')


def as_html(link):
    "The link to a notebook, as a link to its page"
    path, mark, anchor = link.partition('#')
    if urlsplit(link).scheme or not path.endswith('.ipynb'): return link
    return nbpath2html(PurePosixPath(path)).as_posix() + mark + anchor

def link_pages(nb):
    "Quarto follows links to notebooks in HTML; in the Markdown edition they would stay, and be dead"
    sub(nb, r'(?<=\]\()([^)\s]+)', lambda m: as_html(m[1]))


def plain_html(nb):
    "For output of the type text/html Quarto would load jquery and require.js from another host; ours are tables"
    for cell in nb.cells:
        for o in cell.get('outputs', ()):
            html = text(o.get('data', {}).pop('text/html', ''))
            html = re.sub(r'<style.*?</style>\s*', '', html, flags=re.S).strip()
            if html: o['data']['text/markdown'] = f'```{{=html}}\n{html}\n```'
    nb.metadata.pop('widgets', None)


PHOTOS = r'show_(image|images|batch|results)\(|imshow\('

def name_photos(nb):
    "Charts are turned over in the dark theme, photographs are not"
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(PHOTOS, cell.source): cell.source = f'#| classes: photo\n{cell.source}'


def front(nb): return next(yaml.safe_load_all(nb.cells[0].source))

def open_in_colab(nb, page):
    "A page whose first cells set Colab up can be opened there"
    cfg = get_config()
    url = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{page}'
    links = dict(front(nb), **{'code-links': [dict(text='Open in Colab', icon='play-circle', href=url)]})
    nb.cells[0].source = f'---\n{yaml.safe_dump(links, sort_keys=False, allow_unicode=True)}---\n'


STEPS = drop_directives, close_folds, lift_headings, keep_comments, link_fastai, unlink_private, link_pages, plain_html, name_photos

class Page(Processor):
    "All of it, after nbdev's own processors"
    def __init__(self, nb):
        super().__init__(nb)
        self.page = Path(nb.path_).resolve().relative_to(get_config().nbs_path.resolve()).as_posix()
        self.colab = any('google.colab' in c.source for c in read_nb(nb.path_).cells) # hidden, so gone by now

    def begin(self):
        for step in STEPS: step(self.nb)
        if self.colab: open_in_colab(self.nb, self.page)


def settings(cfg):
    "What the site says about the package, from pyproject.toml: the footer, the repository, where to report a fault"
    repo = cfg.git_url
    return dict(website={
        'issue-url': f'{repo}/issues/new?template=bug.yml',
        'navbar': {'right': [dict(icon='github', href=repo, **{'aria-label': 'The repository on GitHub'})]},
        'page-footer': {'left': f'{cfg.title} {fastcb_training.__version__}, '
                                f'[Apache-2.0]({repo}/blob/{cfg.branch}/LICENSE)',
                        'right': f'[What has changed]({repo}/blob/{cfg.branch}/CHANGELOG.md)'}})


if __name__ == '__main__':
    cfg = get_config(ROOT)
    (cfg.nbs_path/'site.yml').write_text(yaml.safe_dump(settings(cfg), sort_keys=False), encoding='utf-8')
    rmtree(cfg.config_path/'_proc', ignore_errors=True) # nbdev would keep pages that an older `Page` has made
    nbdev_docs.__wrapped__()
