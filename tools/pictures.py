"Draws nbs/images: the icon of the site, and the card that is shown where somebody links to it"
from pathlib import Path

import numpy as np
from fastai.callback.schedule import combined_cos
from matplotlib import style
from matplotlib.figure import Figure
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT/'nbs/fastcb.mplstyle'


def course(ax, n, lw, ms):
    "A one-cycle schedule as a line, and as dots where an epoch of `n` batches has its rates"
    rates = combined_cos(.25, .04, 1., 0.)
    def plot(t, *args, **kwargs): ax.plot(t, [rates(o) for o in t], *args, clip_on=False, **kwargs)
    plot(np.linspace(0, 1, 200), lw=lw, solid_capstyle='round')
    plot(np.linspace(0, 1, n), 'o', ms=ms)
    ax.axis('off')

def favicon():
    "64 by 64 pixels"
    fig = Figure(figsize=(.64, .64))
    course(fig.add_axes((.12, .2, .76, .6)), 5, lw=4, ms=9)
    return fig

def card():
    "1,200 by 630 pixels, as the networks ask for"
    fig, cfg = Figure(figsize=(12, 6.3), facecolor='white'), get_config(ROOT)
    course(fig.add_axes((.62, .33, .31, .36)), 9, lw=7, ms=15)
    fig.text(.06, .84, cfg.title, size=52, weight='bold', color='C0', va='center')
    questions = 'Will my run finish?', 'My batch does not fit.', 'Several heads, one frozen body.'
    for y, question in zip((.64, .51, .38), questions): fig.text(.06, y, question, size=25, color='.25', va='center')
    fig.text(.06, .14, cfg.description, size=25, color='.25', va='center')
    return fig


PICTURES = {'favicon.png': favicon, 'card.png': card}

def draw(folder):
    "Draw all of them into `folder`"
    for name, picture in PICTURES.items():
        # The font that matplotlib brings, so that it is the same picture everywhere
        with style.context([STYLE, {'font.family': 'DejaVu Sans', 'figure.constrained_layout.use': False}]):
            fig = picture()
            fig.savefig(Path(folder)/name, dpi=100, transparent=picture is favicon,
                        metadata={'Software': None}, pil_kwargs={'optimize': True})


if __name__ == '__main__': draw(ROOT/'nbs/images')
