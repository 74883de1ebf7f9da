"""Samplers: `sampler(denoise, rng, tokens, batch, given=None) -> ids [B, L]`; of a model they see only `denoise`.

denoise(x, *, r, step, scale, sigma=0., noise=None) -> logits [B, L, V] at ids x [B, L] and mask ratio r [B], guided
with `scale`; `noise` is a key for the perturbation of the embeddings. `given` [B, L] holds known ids, and the mask
token where ids are wanted: known ids are kept (inpainting, prefixes).
"""

from dimo_jax.samplers.confidence import confidence
from dimo_jax.samplers.one_step import one_step
from dimo_jax.samplers.random import random_order

SAMPLERS = {"one_step": one_step, "random": random_order, "confidence": confidence}
