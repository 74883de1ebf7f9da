"""MaskGIT's sampler (arXiv 2202.04200): reveal where log p(x) + choice_temperature (1 - progress) Gumbel is largest.

ImageNet-256, 8 steps, arccos, choice temperature 4.5, guidance ramped to 4: FID 6.66 (paper, Tab. 1).
"""

import jax.numpy as jnp

from dimo_jax.samplers.loop import reveal_sampler


def confidence(*, num_steps=8, choice_temperature=4.5, **options):
    """`num_steps` evaluations; the other options are those of `reveal_sampler`."""

    def score(draws, log_p, progress):
        u = draws.uniform("order", log_p.shape)
        gumbel = -jnp.log(-jnp.log(jnp.maximum(u, jnp.finfo(u.dtype).tiny)))
        return log_p + choice_temperature * (1 - progress) * gumbel

    return reveal_sampler(score, num_steps=num_steps, **options)
