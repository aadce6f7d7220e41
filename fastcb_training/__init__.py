"""Training callbacks for fastai that do exactly what they say

If you train with fastai, you meet three problems: *Will my run finish? My batch does not fit. Several heads, one frozen body.* fastai
has four callbacks for them, each with bugs that you will run into. Ours have the same names, arguments and defaults, without the
bugs: you change one import. Three more are new.

Modules:

- `fastcb_training.accumulation`: My batch does not fit: train as if it did. The gradient of every step is the gradient of the big batch
- `fastcb_training.bnfreeze`: Freeze batchnorm, weights and all the rest of a body to the last bit, so that it can carry several heads
- `fastcb_training.clip`: My loss explodes or turns NaN: clip the norm of the whole gradient, see the norm of every step, skip what is not finite
- `fastcb_training.data`: Real handwritten digits as an image folder, without a download
- `fastcb_training.features`: What never changes is computed once: train heads on the features of a frozen body
- `fastcb_training.microbatch`: CUDA out of memory: keep the batch you want, and send as much of it at once through the model as fits
- `fastcb_training.playground`: What pages, tests and examples train with: a quiet fit, half precision and several processes on a CPU
- `fastcb_training.resume`: Will my run finish? When the machine is taken away, the same call goes on where the fit was cut off, bit for bit
- `fastcb_training.shortepoch`: Will my run finish? Fit a part of each epoch, with everything that a whole epoch has"""

__version__ = "0.1.0"
