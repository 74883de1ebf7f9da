"""Sampling: put a network and a sampler together, draw ids for conditions, decode them to pictures."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from dimo_jax.guidance import guided_head
from dimo_jax.registry import make
from dimo_jax.samplers import SAMPLERS


def make_denoise(teacher, params: dict, net_params: dict, raw) -> Callable:
    """All that a sampler sees of a model: see dimo_jax/samplers. `net_params` may be the teacher's or a generator's."""
    net, cond = teacher.net, teacher.encode(params, raw)
    null = teacher.null(params, cond, "teacher")

    def denoise(x, *, r, step, scale, sigma=0.0, noise=None):
        noise = None if noise is None else jax.random.normal(noise, net.noise_shape(len(x)))
        return guided_head(net, net_params, x, cond, null, r, scale, sigma=sigma, noise=noise)(0, teacher.tokens.length)

    return denoise


def make_sampling(teacher, sampler: Mapping[str, Any]) -> Callable:
    """(params, net_params, raw [B], rng, given=None) -> ids [B, L], jitted; `sampler` names one of SAMPLERS."""
    draw = make(SAMPLERS, sampler, "sampler")

    @jax.jit
    def run(params, net_params, raw, rng, given=None):
        denoise = make_denoise(teacher, params, net_params, raw)
        return draw(denoise, rng, teacher.tokens, jax.tree.leaves(raw)[0].shape[0], given)

    return run
