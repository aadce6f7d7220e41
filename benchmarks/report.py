"What the page of the benchmarks says and draws of the files in results/"
import json
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

files = sorted((Path(__file__).parent/'results').glob('*.json'))
results = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in files}
gpu = [name for name in results if name.startswith('cuda_')]

def frame(name, part='rows'):
    "The rows or the ratios of a result, with what they were measured at as columns"
    return pd.DataFrame([{**r['at'], **r} for r in results[name][part]])

def few(o): return f'{o:.3g}' if o < 100 else f'{o:,.0f}'
def span(lo, hi): return few(lo) if few(lo) == few(hi) else f'{few(lo)} to {few(hi)}'


# Words

# What is measured in each case, and against what
WORDS = {
    'exactness': 'largest error of a gradient, divided by the gradient of the big batch',
    'overhead': "time of a batch in a tiny model, divided by that with fastai's callback",
    'throughput': 'items a second, divided by those of a plain loop',
    'memory': 'peak memory, divided by that of small batches without accumulation',
    'short_epochs': 'time of a short epoch, divided by what is expected of its share of a whole one',
    'processes': "time of an epoch in two processes, divided by that with fastai's callback",
    'scale_layers': 'time with ten times the batchnorm layers, divided by ten times the time',
    'scale_items': 'time of a short epoch, divided by that of its batches alone',
    'scale_parameters': 'time to close a window, divided by that of one multiplication of the gradients'}
NAMES = {'find': 'to find the layers', 'look': 'to check their mode', 'forward pass': 'the forward pass'}

def words(name):
    of = WORDS.get(name.removeprefix('cuda_'), results[name]['title'])
    return f'on a GPU, {of}' if name in gpu else of

def place(at): return ', '.join(NAMES.get(v, f'{v:,} {k}' if isinstance(v, int) else f'{k} {v}') for k,v in at.items())

def goals(name):
    "The goal of a case, and what came of it; a quick look has none"
    r = frame(name, 'ratios')
    if r.empty: return None
    first = r.iloc[0]
    return dict(goal=f'{first.sense} {first.goal:g}', result=span(r['median'].min(), r['median'].max()),
                met=f'{r.met.sum()} of {len(r)}', missed=[o for o in r['at'][~r.met]])

def summary():
    "A row a case: what was measured, against what, and whether the goal was met"
    known = [*WORDS]
    def rank(name): return known.index(name) if name in known else len(known)
    rows = {words(name): goals(name) or dict(result='a quick look') for name in sorted(results, key=rank)}
    return pd.DataFrame(rows).T[['result', 'goal', 'met']].fillna('').rename_axis('what is measured', axis=1)

def verdict(name):
    "The result of a case in a sentence"
    g = goals(name)
    if not g: return Markdown('A quick look has no goal.')
    at = '; '.join(filter(None, map(place, g['missed'])))
    word = f"**Goal missed**{f' ({at})' if at else ''}" if g['missed'] else '**Goal met**'
    text = words(name)
    return Markdown(f"{word}. {text[0].upper()+text[1:]}: {g['result']}. The goal is {g['goal']}.")

def where():
    "Machine, versions, date"
    on_cpu = [r for name,r in results.items() if name not in gpu]
    def each(key): return ' and '.join(dict.fromkeys(str(r[key]) for r in on_cpu))
    m,versions = results['overhead']['machine'],{k: v for o in results.values() for k,v in o['versions'].items()}
    versions = ', '.join(f'{k} {v}' for k,v in versions.items())
    text = (f"Measured on {each('date')} at commit {each('commit')}, on {m['processor']} ({m['architecture']}) with "
            f"{m['cores']} cores and {few(m['memory_gib'])} GiB of memory under {m['system']}, one thread a process, with "
            f"{versions}. It took {few(sum(o['seconds'] for o in on_cpu)/60)} minutes.")
    if any(o['changed'] for o in results.values()): text += ' The code had been changed since that commit.'
    quick = [name for name,o in results.items() if o['quick']]
    absent = sorted({v for o in results.values() for v in o['left_out']})
    if quick: text += f" **Only a quick look, with few turns**: {', '.join(quick)}."
    if absent: text += f" Left out, since not installed: {', '.join(absent)}."
    if not gpu: text += ' There is no result from a GPU yet; `make bench-cuda` measures there.'
    return Markdown(text)


# Pictures

colors = {v: f'C{i}' for i,v in enumerate(['here', 'fastai', 'Lightning', 'Accelerate', 'plain loop', 'one by one'])}

def color(variant): return colors.get(variant.partition(',')[0], '0.5')

def curves(ax, rows, x, **kwargs):
    "A line for each variant, with the quartiles as a band"
    for variant,g in rows.groupby('variant', sort=False):
        style = dict(color=color(variant), ls='-' if variant in colors else '--')
        ax.plot(g[x], g['median'], marker='.', label=variant, **style)
        ax.fill_between(g[x], g.low, g.high, alpha=.2, color=style['color'], lw=0)
    ax.set(**kwargs)

def bars(ax, rows, **kwargs):
    "A bar for each variant, with the quartiles as a whisker"
    rows = rows.iloc[::-1]
    ax.barh(rows.variant, rows['median'], color=[color(v) for v in rows.variant],
            xerr=[rows['median']-rows.low, rows.high-rows['median']])
    ax.set(**kwargs)

def dots(ax, rows, base, **kwargs):
    "A dot for each variant, with the quartiles as a line, as parts of the median of `base`"
    whole = rows['median'][rows.variant == base].item()
    for i,o in enumerate(rows.iloc[::-1].itertuples()):
        ax.plot([o.low/whole, o.high/whole], [i, i], color=color(o.variant), lw=3, alpha=.4)
        ax.plot(o.median/whole, i, 'o', color=color(o.variant))
    ax.set_yticks(range(len(rows)), rows.variant.iloc[::-1])
    ax.set(**kwargs)
