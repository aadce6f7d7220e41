"Runs notebooks in place and cleans them: the ones named, or all"
import os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells


class Runner(NotebookClient):
    "Runs the cells that `nbdev-test` runs; Jupyter by itself doesn't know `#| eval: false`"
    def __init__(self, path):
        cfg = get_config()
        self.runs = {c.id for c in nb_test_cells(path, cfg.tst_flags.split())}
        super().__init__(nbformat.read(path, as_version=4), kernel_name='python3', timeout=cfg.cell_timeout,
                         coalesce_streams=True, record_timing=False, store_widget_state=False,
                         extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(path.parent)}})

    async def async_execute_cell(self, cell, *args, **kwargs):
        return await super().async_execute_cell(cell, *args, **kwargs) if cell.id in self.runs else cell


BAR = r'\s*<div>\s*<progress.*?</div>\s*'  # one that stood still when an error came

def tidy(outputs):
    "`outputs` without what progress bars leave: themselves, their style, emptied lines, and the table's source as text"
    kept = []
    for o in outputs:
        data = o.get('data', {})
        html = data.get('text/html')
        if html is not None:
            html = data['text/html'] = re.sub(BAR, '', html, flags=re.S)
            if not re.sub('<style>.*?</style>', '', html, flags=re.S).strip(): continue
        # Quarto would show this in place of the table
        if data.get('text/markdown', '').startswith('```html'): del data['text/markdown'], data['text/plain']
        kept.append(o)
    return kept


def run(path):
    "Run the notebook at `path` in place; if a cell fails, the file stays as it was"
    nb = Runner(path).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = tidy(cell.outputs)
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(str(path))


if __name__ == '__main__':
    # torch's, of what fastai calls: it would be stored, with the place of the environment
    os.environ['PYTHONWARNINGS'] = 'ignore::FutureWarning'
    for name in sys.argv[1:] or sorted(nbglob()):
        start = time.time()
        run(Path(name).resolve())
        print(f'{name}: {time.time() - start:.0f} s', flush=True)
