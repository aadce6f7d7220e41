"The site as far as it can be made without Quarto: every page as nbdev hands it over, its links, names and pictures"
import ast, base64, builtins, inspect, io, os, re, subprocess, sys
from itertools import chain, count
from pathlib import PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import fastai.vision.all, mistune, nbformat, pytest, torch, yaml
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.test import nb_test_cells
from PIL import Image

import build_site, fastcb_training, fastcb_training.all as fastcb
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
def processed():
    "The pages, and what nbdev said. It runs the imports and the exported cells of each, from the root, not from nbs/"
    with scratch() as root:
        done = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'],
                              cwd=root, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT/'tools')})
        assert done.returncode == 0, done.stderr
        yield {page: read(root/'_proc'/page) for page in sorted(pages(root/'_proc'))}, done.stderr

@pytest.fixture(scope='module')
def made(processed): return processed[0]

def test_nbdev_has_nothing_to_say(processed):
    "It warns about each cell that mixes imports with other code"
    assert re.findall(r'imports and other code.*\n---\n((?:.+\n)+)', processed[1]) == []

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

SECTIONS = [o for o in QUARTO['website']['sidebar']['contents'] if 'section' in o]

def test_each_section_has_a_list_of_its_pages(made):
    "With their own titles and descriptions; a breadcrumb leads to it"
    for section in SECTIONS:
        listing = '\n'.join(written(made[section['href']]))
        for page in section['contents']:
            path, o = nbpath2html(PurePosixPath(page)), front(made[page])
            assert f'- [{o["title"]}]({path.name}): {o["description"]}' in listing, page

def test_assistants_are_sent_to_every_page():
    there = (NBS/'llms.txt').read_text(encoding='utf-8')
    for section in SECTIONS:
        assert f'\n## {section["section"]}\n' in there
        for page in section['contents']: assert f']({url(page)}.md): ' in there, page

def test_files_named_in_the_settings_are_there():
    website, html = QUARTO['website'], QUARTO['format']['html']
    named = [*QUARTO['project']['resources'], html['css'], website['favicon'], website['image'].lstrip('/')]
    assert [o for o in named if not any(NBS.glob(o))] == []
    assert (NBS/'404.qmd').exists() and website['repo-subdir'] == NBS.name
    for name, size in {'favicon.png': (64, 64), 'card.png': (1200, 630)}.items():
        assert Image.open(NBS/'images'/name).size == size and (NBS/'images'/name).stat().st_size < 100_000

def test_the_shell_says_what_the_package_is():
    cfg = get_config(ROOT)
    site, website, html = build_site.settings(cfg)['website'], QUARTO['website'], QUARTO['format']['html']
    assert {'nbdev.yml', 'site.yml'} == {*QUARTO['metadata-files']}
    assert fastcb_training.__version__ in site['page-footer']['left'] and 'Apache-2.0' in site['page-footer']['left']
    assert site['navbar']['right'][0]['href'] == cfg.git_url and site['navbar']['right'][0]['aria-label']
    assert (ROOT/'.github/ISSUE_TEMPLATE'/site['issue-url'].partition('template=')[2]).exists()
    for o in re.findall(r'/blob/main/([\w.]+)', str(site['page-footer'])): assert (ROOT/o).exists(), o
    assert website['page-navigation'] and html['canonical-url'] and html['toc'] and html['html-math-method'] == 'mathml'
    assert 'format-links: false' in (NBS/'404.qmd').read_text(encoding='utf-8')  # its address is any, a relative link is dead


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


def test_no_link_to_a_notebook(made):
    "In HTML Quarto would follow it, in the Markdown edition it would be dead"
    assert faults(made, lambda page, nb: [o for o in chain(*map(links, written(nb))) if '.ipynb' in o and SITE not in o
                                          and 'colab' not in o]) == {}

def test_fastais_names_lead_to_fastai(made):
    ours = rf"fastai's (?:own )?\[`\w+(?:\(\))?`\]\({re.escape(SITE)}"
    assert faults(made, lambda page, nb: re.findall(ours, '\n'.join(written(nb)))) == {}
    theirs = r"fastai's (?:own )?\[`(?:BnFreeze|GradientClip|GradientAccumulation|ShortEpochCallback)`\]\(https://docs.fast.ai/"
    assert re.search(theirs, '\n'.join(chain(*map(written, made.values()))))


COLAB = 'https://colab.research.google.com/github/'

def test_pages_that_set_colab_up_can_be_opened_there(made):
    "And they set up what this project is, at the place where the page is"
    cfg, opened = get_config(ROOT), set()
    for page, nb in made.items():
        link = front(nb).get('code-links')
        setup = [c.source for c in read(NBS/page).cells if 'google.colab' in c.source]
        assert bool(link) == bool(setup), page
        if not link: continue
        opened.add(page)
        assert link[0]['href'] == f'{COLAB}{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{page}'
        assert cfg.git_url in setup[0] and f"'{cfg.repo}/{PurePosixPath('nbs', page).parent}'" in setup[0], page
    assert opened


# The form of a page

def headings(nb):
    "The levels and texts of all headings; the title is the first"
    yield 1, front(nb)['title']
    for token, _ in all_tokens(nb):
        if token['type'] == 'heading': yield token['attrs']['level'], raw(token)

def jumps(page, nb):
    "The headings that are more than one level below the one before, and those of level 1"
    levels = list(headings(nb))
    return [name for (before, _), (level, name) in zip(levels, levels[1:]) if level > before+1 or level == 1]

def test_headings_do_not_jump(made): assert faults(made, jumps) == {}

def test_no_section_is_empty(made):
    "A heading is followed by something, if only by one of a lower level"
    def empty(page, nb):
        blocks = [(cell, [t for t in markdown(cell.source) if t['type'] != 'blank_line'] if cell.cell_type == 'markdown' else [None])
                  for cell in nb.cells[1:]]
        flat = [t for _, tokens in blocks for t in tokens]
        for token, after in zip(flat, [*flat[1:], 'end']):
            if not token or token['type'] != 'heading': continue
            if after == 'end' or after and after['type'] == 'heading' and after['attrs']['level'] <= token['attrs']['level']:
                yield raw(token)
    assert faults(made, empty) == {}

def test_headings_are_in_the_contents(made):
    "Pandoc takes none from the output of a cell that begins with something else, as nbdev's documentation does"
    def inside(page, nb):
        for cell in nb.cells:
            for o in cell.get('outputs', ()):
                yield from re.findall(r'^#+ .*', text(o.get('data', {}).get('text/markdown', '')), re.M)
    assert faults(made, inside) == {}
    named = {re.sub('`', '', name).partition('.')[0] for nb in made.values() for _, name in headings(nb)}
    assert {name for name, o in vars(fastcb).items() if isinstance(o, type) and o.__module__.startswith('fastcb')} <= named

def test_source_begins_folded(made):
    assert faults(made, lambda page, nb: [c.id for c in nb.cells if '#| code-fold: show' in c.source]) == {}

def test_no_directive_is_left_in_a_text(made):
    assert faults(made, lambda page, nb: [c.source for c in nb.cells if c.cell_type == 'markdown' and '#|' in c.source[:2]]) == {}

def test_no_script_from_another_host(made):
    "Quarto loads jquery and require.js where an output has the type text/html, and MathJax where there is a formula"
    def loads(page, nb):
        return [c.id for c in nb.cells for o in c.get('outputs', ()) if 'text/html' in o.get('data', {})]
    assert faults(made, loads) == {} and not any('widgets' in nb.metadata for nb in made.values())

def stored(page): return [(cell, o) for cell in read(NBS/page).cells for o in cell.get('outputs', ())]

def test_no_progress_bar_is_stored():
    for page in pages(NBS):
        for cell, o in stored(page): assert '<progress' not in text(o.get('data', {}).get('text/html', '')), (page, cell.id)

def test_code_is_as_wide_as_the_page(made):
    "126 characters at 1,440 pixels"
    def wide(page, nb):
        for cell in nb.cells:
            if cell.cell_type == 'code' and '#| echo: false' not in cell.source:
                yield from (l for l in cell.source.splitlines() if len(l) > 120 and not l.startswith('#|'))
    assert faults(made, wide) == {}

BARE = r'[\[(][\d\s.,()\[\]e+-]*,[\d\s.,()\[\]e+-]*[\])]'

def test_numbers_have_names():
    "An output such as ((8, 7), (6, 5)) says nothing"
    def bare(page, _):
        for cell, o in stored(page):
            value = text(o.get('data', {}).get('text/plain', ''))
            if o.output_type == 'execute_result' and re.fullmatch(BARE, value) and '[' != value[0]: yield value
    assert faults({page: None for page in pages(NBS)}, bare) == {}

def docments(f):
    "The comments on the arguments of `f`, from its source"
    lines = inspect.getsource(f).splitlines()
    end = next(i for i, l in enumerate(lines) if re.search(r'^\s*\).*:|^\s*(def|class).*:$', l))
    return [l.partition(' # ')[2].strip() for l in lines[:end+1] if ' # ' in l]

def test_no_argument_loses_its_comment(made):
    "The comments are the only documentation of an argument"
    shown = '\n'.join(text(o.data['text/markdown']) for nb in made.values() for c in nb.cells for o in c.get('outputs', ())
                      if 'text/markdown' in o.get('data', {}))
    for name in OURS:
        o = getattr(fastcb, name)
        if inspect.isclass(o) or inspect.isfunction(o):
            for comment in docments(o.__init__ if inspect.isclass(o) else o): assert comment in shown, (name, comment)

# What a reader types who has the problem of this page
SEARCHED = {'index.ipynb': ['install'], '06_bnfreeze.ipynb': ['freeze batchnorm'], '03_accumulation.ipynb': ['out of memory'],
            '01_shortepoch.ipynb': ['smoke test'], '04_clip.ipynb': ['NaN'], '02_resume.ipynb': ['resume'],
            '05_microbatch.ipynb': ['out of memory'], '07_features.ipynb': ['precompute']}

@pytest.mark.parametrize('page', sorted(SEARCHED))
def test_the_words_that_are_searched_for_are_near_the_top(made, page):
    if page not in made: pytest.skip('this page is not there yet')
    top = ' '.join(' '.join([front(made[page])['description'], *written(made[page])]).split()[:250]).lower()
    for word in SEARCHED[page]: assert word.lower() in top, word


# Names

OURS = {name for name in vars(fastcb) if name[0] != '_'}

def unlinked(source):
    "The names in `source` that nbdev could link, or that are ours, but that are no links"
    for token, inside in tokens(source):
        if token['type'] != 'codespan' or any(t['type'] == 'link' for t in inside): continue
        name = token['raw'].removesuffix('()')
        private = name.rpartition('.')[2].startswith('_') # it has no heading
        if not private and (NbdevLookup()[name] or name in OURS): yield name

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

def test_charts_and_photographs_are_told_apart(made):
    "The dark theme turns charts over"
    for page, nb in made.items():
        for cell, _ in shown(nb):
            assert ('#| classes: photo' in cell.source) == bool(re.search(build_site.PHOTOS, cell.source)), (page, cell.id)


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
        text = str([c.get('outputs') for c in read(NBS/page).cells])
        assert str(ROOT) not in text and 'site-packages' not in text, page
