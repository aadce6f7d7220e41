"The site as far as it can be made without Quarto: every page as nbdev hands it over, its links, names and pictures"
import ast, base64, builtins, io, re, subprocess, sys
from itertools import chain, count
from pathlib import PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import fastai.vision.all, mistune, nbformat, numpy as np, pytest, torch, yaml
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.test import nb_test_cells
from PIL import Image

import fastcb_training.all as fastcb
import pictures
from readme import ROOT, scratch

NBS, SITE = ROOT/'nbs', get_config(ROOT).doc_url.rstrip('/') + '/'
QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))


def pages(folder):
    "The notebooks in `folder`, hidden ones left out"
    found = {p.relative_to(folder) for p in folder.rglob('*.ipynb')}
    return {p.as_posix() for p in found if not any(part[0] in '._' for part in p.parts)}

def read(path): return nbformat.read(path, as_version=4)
def url(page): return SITE + nbpath2html(page).as_posix()
def text(value): return ''.join(value)  # a notebook may keep a text as its lines


@pytest.fixture(scope='module')
def made():
    "nbdev runs the imports and the exported cells of each page, from the root, not from nbs/"
    with scratch() as root:
        done = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'],
                              cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield {page: read(root/'_proc'/page) for page in sorted(pages(root/'_proc'))}

def front(nb): return next(yaml.safe_load_all(nb.cells[0].source))

def test_every_page_is_ready_for_quarto(made): assert set(made) == pages(NBS)

def test_every_page_says_what_it_is(made):
    "Title and description are what a search and a link elsewhere show; both are unique"
    fronts = [front(nb) for nb in made.values()]
    for o in fronts: assert 0 < len(o['title']) <= 60 and 20 <= len(o['description']) <= 160, o
    for key in 'title', 'description': assert len({o[key] for o in fronts}) == len(made)


# Navigation

def leaves(entry):
    "The files named in an entry of the sidebar"
    if isinstance(entry, str): return {entry}
    return set().union({entry['href']} if 'href' in entry else (), *map(leaves, entry.get('contents', ())))

def test_sidebar_has_every_page(): assert leaves(QUARTO['website']['sidebar']) == pages(NBS)

def test_each_folder_has_a_list_of_its_pages(made):
    "With their own titles and descriptions"
    for page, nb in made.items():
        path, o = PurePosixPath(page), front(nb)
        if len(path.parts) == 1 or path.name == 'index.ipynb': continue
        listing = '\n'.join(written(made[str(path.with_name('index.ipynb'))]))
        assert f'- [{o["title"]}]({path.name}): {o["description"]}' in listing, page

def test_files_named_in_the_settings_are_there():
    website, html = QUARTO['website'], QUARTO['format']['html']
    named = [*QUARTO['project']['resources'], html['css'], website['favicon'], website['image'].lstrip('/')]
    assert [o for o in named if not any(NBS.glob(o))] == []
    assert (NBS/'404.qmd').exists() and website['repo-subdir'] == NBS.name


# Links

markdown = mistune.create_markdown(renderer=None, plugins=['table'])

def tokens(source, inside=()):
    "The tokens of a Markdown text, each with those around it"
    for token in markdown(source) if isinstance(source, str) else source:
        yield token, inside
        yield from tokens(token.get('children', ()), (*inside, token))

def raw(token): return token.get('raw', '') + ''.join(map(raw, token.get('children', ())))

def written(nb):
    "What is written on a page: its Markdown cells and the Markdown in its outputs"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield cell.source
        for o in cell.get('outputs', ()):
            if 'text/markdown' in o.get('data', {}): yield text(o.data['text/markdown'])

def anchor(heading):
    "The identifier that Pandoc gives it: https://pandoc.org/MANUAL.html#extension-auto_identifiers"
    name = '-'.join(re.sub(r'[^\w\s.-]', '', heading.lower()).split())
    return re.sub(r'^[\W\d_]+', '', name) or 'section'

def anchors(source):
    "The identifiers of all headings; one that is taken gets a number"
    found = set()
    for token, _ in tokens('\n\n'.join(source)):
        if token['type'] == 'heading':
            name = anchor(raw(token))
            found.add(next(n for n in chain([name], (f'{name}-{i}' for i in count(1))) if n not in found))
    return found

@pytest.mark.parametrize('heading, name', [
    ('3. Only `fit` is shortened', 'only-fit-is-shortened'), ('GradientClip.before_step', 'gradientclip.before_step'),
    ('2. `resume=True` goes  on', 'resumetrue-goes-on'), ('_private', 'private'), ('1. 2.', 'section'),
    ("What's *new*?", 'whats-new')])
def test_anchor(heading, name): assert anchors([f'# {heading}']) == {name}

def test_anchor_that_is_taken(): assert anchors(['# A\n\n## A', '# A']) == {'a', 'a-1', 'a-2'}

def all_tokens(nb): return chain(*map(tokens, written(nb)))
def links(source): return [token['attrs']['url'] for token, _ in tokens(source) if token['type'] == 'link']

def dead(source, here, there):
    "The links in `source`, written at the address `here`, that lead to none of the pages and anchors in `there`"
    for link in links(source):
        if link.endswith('.html.md'): link = link.removesuffix('.md')  # the page in Markdown
        page, mark = urldefrag(urljoin(here, link))
        if page.endswith('.ipynb'): page = urljoin(page, nbpath2html(PurePosixPath(urlsplit(page).path).name).name)
        if page.startswith(SITE) and (page not in there or mark and unquote(mark) not in there[page]): yield link

def faults(made, find):
    "What `find` finds on each page that has a fault"
    return {page: found for page, nb in made.items() if (found := list(find(page, nb)))}

@pytest.fixture(scope='module')
def there(made): return {url(page): anchors(written(nb)) for page, nb in made.items()}

def test_links_inside_the_site_lead_somewhere(made, there):
    assert faults(made, lambda page, nb: chain(*(dead(source, url(page), there) for source in written(nb)))) == {}

@pytest.mark.parametrize('path', ['README.md', 'CONTRIBUTING.md', 'nbs/404.qmd', 'nbs/llms.txt'])
def test_links_into_the_site_lead_somewhere(there, path):
    source = (ROOT/path).read_text(encoding='utf-8')
    assert links(source) and list(dead(source, SITE, there)) == []

@pytest.mark.parametrize('link, is_dead', [
    ('a.html', False), ('00_a.ipynb', False), ('00_a.ipynb#one', False), ('00_a.ipynb#two', True), ('b.html', True),
    ('#one', False), ('#two', True), ('c/d.ipynb', False), (SITE + 'a.html#one', False), (SITE + 'a.html#two', True),
    ('https://pandoc.org/b.html', False)])
def test_dead_links_are_found(link, is_dead):
    there = {SITE + 'a.html': {'one'}, SITE + 'c/d.html': set()}
    assert list(dead(f'[A]({link})', SITE + 'a.html', there)) == [link]*is_dead


# Names

OURS = {name for name in vars(fastcb) if name[0] != '_'}

def unlinked(source):
    "The names in `source` that nbdev could link, or that are ours, but that are no links"
    for token, inside in tokens(source):
        if token['type'] != 'codespan' or any(t['type'] == 'link' for t in inside): continue
        name = token['raw'].removesuffix('()')
        if NbdevLookup()[name] or name in OURS: yield name

def test_names_are_links(made): assert faults(made, lambda page, nb: chain(*map(unlinked, written(nb)))) == {}

def test_unlinked_names_are_found():
    source = '`BnFreeze`, [`BnFreeze`](a.html), `Learner`, `bn_types`, `nobody`'
    assert list(unlinked(source)) == ['BnFreeze', 'Learner', 'bn_types']

def test_no_link_inside_a_link(made):
    "nbdev links names also where the text of a link has one, and then that is a link no more"
    def broken(page, nb): return (t['raw'] for t, _ in all_tokens(nb) if t['type'] == 'text' and '](' in t['raw'])
    assert faults(made, broken) == {}

KNOWN = {name for o in (builtins, torch.nn, torch.nn.parallel, fastai.vision.all) for name in dir(o)}

def unknown(page, nb):
    "The names like `ThisOne` on a page that neither its code nor any library knows"
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code')
    for token, _ in all_tokens(nb):
        for name in re.findall(r'\b[A-Z]\w*[a-z][A-Z]\w*', token['raw'] if token['type'] == 'codespan' else ''):
            if name not in KNOWN and not NbdevLookup()[name] and not re.search(rf'\b{name}\b', code): yield name

def test_names_are_those_of_something(made): assert faults(made, unknown) == {}


# Pictures

def png(data): return Image.open(io.BytesIO(base64.b64decode(data)))

def shown(nb):
    "The cells whose outputs have a picture, with the picture"
    for cell in nb.cells:
        for o in cell.get('outputs', ()):
            if 'image/png' in o.get('data', {}): yield cell, o.data['image/png']

def alt(cell): return ''.join(re.findall(r'^#\| fig-alt: "(.+)"$', cell.source, re.M))

def test_pictures_are_small(made):
    for page, nb in made.items():
        for cell, data in shown(nb): assert len(data) < 300_000 and max(png(data).size) <= 1600, (page, cell.id)

def test_pictures_have_an_alternative_text(made):
    for page, nb in made.items():
        for cell, _ in shown(nb): assert len(alt(cell)) >= 20, (page, cell.id)
        for token, _ in all_tokens(nb): assert token['type'] != 'image' or raw(token), (page, token)

def test_pictures_of_the_site_are_what_the_script_draws(tmp_path):
    "Up to what another version of matplotlib draws otherwise"
    pictures.draw(tmp_path)
    sizes = {'favicon.png': (64, 64), 'card.png': (1200, 630)}
    assert {p.name for p in (NBS/'images').iterdir()} == set(sizes) == set(pictures.PICTURES)
    for name, size in sizes.items():
        there, drawn = [Image.open(folder/name) for folder in (NBS/'images', tmp_path)]
        assert there.format == 'PNG' and there.size == size and (NBS/'images'/name).stat().st_size < 100_000
        assert np.abs(np.asarray(there.convert('RGBA'), float) - np.asarray(drawn.convert('RGBA'))).mean() < 2


# Pages that run anywhere

DOWNLOADS = {'untar_data', 'URLs', 'download_url', 'download_data', 'urlopen', 'urlretrieve', 'requests', 'hub'}
LEARNERS = {'vision_learner', 'unet_learner', 'cnn_learner'}  # their default is pretrained

def name_of(node): return getattr(node, 'id', getattr(node, 'attr', ''))

def fetches(source):
    "What in `source` would wait for a network"
    for node in ast.walk(ast.parse(re.sub('^[%!].*', '', source, flags=re.M))):  # without Jupyter's own lines
        if name_of(node) in DOWNLOADS: yield name_of(node)
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            pretrained = given.get('pretrained', str(name_of(node.func) in LEARNERS))
            if pretrained != 'False' or re.search('DEFAULT|IMAGENET', given.get('weights', '')): yield name_of(node.func)

def test_no_page_waits_for_a_network():
    for page in pages(NBS):
        for cell in nb_test_cells(NBS/page): assert list(fetches(cell.source)) == [], (page, cell.id)
        for o in chain(*(cell.get('outputs', ()) for cell in read(NBS/page).cells)):
            assert not re.search('src="?http', text(o.get('data', {}).get('text/html', ''))), page

@pytest.mark.parametrize('source, found', [
    ('path = untar_data(URLs.MNIST_TINY)', {'untar_data', 'URLs'}), ('resnet18()', set()),
    ('vision_learner(dls, resnet18)', {'vision_learner'}), ('vision_learner(dls, resnet18, pretrained=False)', set()),
    ('%%writefile a.py\nrequests', {'requests'}), ('models.resnet18(weights="DEFAULT")', {'resnet18'}),
    ('resnet18(pretrained=True)', {'resnet18'}),
    ('dict(weights=w)', set())])
def test_fetches(source, found): assert set(fetches(source)) == found

def test_no_page_tells_where_it_was_run():
    for page in pages(NBS):
        text = (NBS/page).read_text(encoding='utf-8')
        assert str(ROOT) not in text and 'site-packages' not in text, page
