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

def few(o): return f'{o:.3g}' if abs(o) < 100 else f'{o:,.0f}'
def span(lo, hi): return few(lo) if few(lo) == few(hi) else f'{few(lo)} to {few(hi)}'


# Words

# The cases, in the order of the questions that bring people here
ORDER = ('short_epochs spread_validation scale_items resume resume_exact exactness microbatch microbatch_memory '
         'out_of_memory memory throughput processes features overhead scale_layers scale_parameters').split()
NAMES = {'find': 'to find the layers', 'look': 'to check their mode', 'forward pass': 'the forward pass'}

def place(at): return ', '.join(NAMES.get(v, f'{v:,} {k}' if isinstance(v, int) else f'{k} {v}') for k,v in at.items())

def claims(name):
    "The ratios of a case by what they claim"
    found = {}
    for r in results[name]['ratios']: found.setdefault(r['claim'], []).append(r)
    return found

def others(found, part):
    "What the best peers, or the limits, reach, with their names"
    found = [r[part] for r in found if r[part]]
    if not found: return ''
    names = ', '.join(dict.fromkeys(o['variant'] for o in found if o['variant'] not in (None, 'limit', 'line')))
    reached = span(*(f(o['median'] for o in found) for f in (min, max)))
    return f'{reached} ({names})' if names else reached

def outcome(found):
    "Goal, and what came of it, of the ratios of one claim"
    first,n_met = found[0],sum(r['met'] for r in found)
    met = 'met' if n_met == len(found) else 'missed'
    if n_met and met == 'missed': met = f'missed in {len(found)-n_met} of {len(found)}'
    medians = [r['median'] for r in found]
    return {'here': span(min(medians), max(medians)), 'best peer': others(found, 'peer'),
            'limit': others(found, 'limit'), 'goal': f"{first['sense']} {first['goal']:g}", 'result': met}

def summary():
    "A row for each claim: this library, the best of the others, the limit, and whether the goal was met"
    rank = {name: i for i,name in enumerate([*ORDER, *(f'cuda_{o}' for o in ORDER)])}
    rows = {}
    for name in sorted((o for o in results if o in rank), key=rank.get):
        for claim,found in claims(name).items():
            rows[claim + (', on a GPU' if name in gpu else '')] = outcome(found)
    return pd.DataFrame(rows).T.rename_axis('what is measured', axis=1)

def verdict(name):
    "What came of the goals of a case, a sentence each"
    lines = []
    for claim,found in claims(name).items():
        o,missed = outcome(found),[place(r['at']) for r in found if not r['met']]
        at = '; '.join(filter(None, missed)) if len(found) > 1 else ''
        word = f"**Goal missed**{f' ({at})' if at else ''}" if missed else '**Goal met**'
        lines.append(f"- {word}. {claim[0].upper()+claim[1:]}: {o['here']}. The goal is {o['goal']}.")
    if results[name]['quick']: lines.append('- A quick look, of one turn, and smaller: no measurement.')
    return Markdown('\n'.join(lines))

def value(name, variant, unit=None, **at):
    "A median of a case"
    rows = [r for r in results[name]['rows'] if r['variant'] == variant and unit in (None, r['unit'])
            and all(r['at'].get(k) == v for k,v in at.items())]
    return rows[0]['median'] if rows else float('nan')

def grid(name, names, columns, at=None):
    "A table of medians, with half the distance of the quartiles: a row for each of `names`, unit -> words"
    rows = {}
    for r in results[name]['rows']:
        if r['unit'] not in names: continue
        label = names[r['unit']] + (f", {place(r['at'])}" if r['at'] else '')
        rows.setdefault(label, {})[columns.get(r['variant'], r['variant'])] = spread(r)
    kept = [*dict.fromkeys(columns.values())]
    return pd.DataFrame(rows).T.reindex(columns=kept).fillna('').rename_axis(None)

def own_time():
    "The own time of each way to train, in µs a batch and in % of a batch, beside its throughput"
    items = {r['variant']: r['median'] for r in results['throughput']['rows']}
    rows = {}
    for r in results['own_time']['rows']:
        v = r['variant']
        if v == 'Learner' and r['at']['setting'] != 'the progress bar': continue # quiet, as the others are
        batch = 16e6/items[v] # µs
        name = 'Learner, no callback' if v == 'Learner' else v
        rows[name] = {'own time (µs a batch)': spread(r), 'of a batch (%)': few(100*r['median']/batch),
                      'items a second, of the plain loop': f"{items[v]/items['plain loop']:.3f}"}
    return pd.DataFrame(rows).T.rename_axis(None)

def own_words():
    "What the missing part of the throughput is made of"
    own = {r['variant']: r['median'] for r in results['own_time']['rows']
           if r['at']['setting'] in ('as in throughput', 'the progress bar')}
    loop = own['plain loop']
    batch = 16e6/next(r['median'] for r in results['throughput']['rows'] if r['variant'] == 'plain loop')
    return Markdown(
        f"fastai's Learner without a callback takes {few(own['Learner']-loop)} µs a batch more than a plain loop, "
        f"{few(100*(own['Learner']-loop)/batch)} % of this batch; that is the same for a batch of any size, so "
        f"larger batches feel less of it. `GradientAccumulation` adds {few(own['here']-own['Learner'])} µs, fastai's "
        f"{few(own['fastai']-own['Learner'])} µs: it divides the loss, ours multiplies the gradients, once a window.")

def learner_time():
    "fastai's Learner, taken apart"
    rows = [r for r in results['own_time']['rows'] if r['variant'] == 'Learner']
    table = {}
    for r,before in zip(rows, [None, *rows]):
        name = r['at']['setting']
        saved = few(before['median']-r['median']) if before else ''
        table[f'without {name}' if before else name] = {'own time (µs a batch)': spread(r), 'saved (µs)': saved}
    return pd.DataFrame(table).T.rename_axis(None)

def spread(r):
    half = (r['high']-r['low'])/2
    return few(r['median']) + (f' ± {few(half)}' if half else '')


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
