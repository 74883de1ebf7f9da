"""The loop of samplers that reveal tokens for good: `num_steps` evaluations, a scan over the counts left masked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.categorical import sample_ids
from dimo_jax.errors import UserError
from dimo_jax.registry import lookup
from dimo_jax.rng import Draws

# Share of the tokens still masked at progress s in [0, 1] (MaskGIT, arXiv 2202.04200, Sec. 3.3).
MASKED_SHARE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda s: 1 - s,
    "square": lambda s: 1 - s**2,
    "cosine": lambda s: np.cos(np.pi * s / 2),
    "arccos": lambda s: np.arccos(s) / (np.pi / 2),
}


def masked_shares(schedule: str, num_steps: int) -> np.ndarray:
    """Share of the tokens still masked after each of `num_steps` steps, float64 [num_steps]; the last is exactly 0."""
    if num_steps < 1:
        raise UserError(f"a sampler takes at least 1 step, given num_steps {num_steps}")
    share = lookup(MASKED_SHARE, schedule, "sampling schedule")(np.arange(1, num_steps + 1) / num_steps)
    return np.append(share[:-1], 0.0)


def reveal_sampler(
    score: Callable, *, num_steps, schedule="arccos", temperature=1.0, top_k=0, top_p=0.0, cfg_scale=1.0, cfg_ramp=False
):
    """A sampler that, step by step, draws all unknown tokens and keeps those with the highest `score`.

    score(draws, log_p, progress) -> [B, L]: log_p of the drawn tokens, progress i / (num_steps - 1) of step i.
    temperature 0 takes the arg max. cfg_ramp raises the guidance scale linearly from 1 at the first step to cfg_scale
    at the last. [M] is never drawn; every unknown token is revealed exactly once.
    """
    shares = masked_shares(schedule, num_steps)
    progress = np.arange(num_steps) / max(num_steps - 1, 1)
    scales = 1 + (cfg_scale - 1) * (progress if cfg_ramp else np.ones(num_steps))

    def sampler(denoise, rng, tokens, batch, given=None):
        ids = jnp.full((batch, tokens.length), tokens.mask_token) if given is None else given
        unknown = ids == tokens.mask_token
        wanted = unknown.sum(-1)

        def step(carry, inputs):
            ids, unknown = carry
            i, share, progress, scale = inputs
            draws = Draws(rng).at_step(i)
            r = unknown.sum(-1) / tokens.length
            z = denoise(ids, r=r, step=i, scale=1 if cfg_scale == 1 else scale)[..., : tokens.codebook_size]
            gumbel = draws.gumbel("tokens", batch, 0, tokens.length, tokens.codebook_size)
            drawn = sample_ids(z, gumbel, temperature=temperature, top_k=top_k, top_p=top_p)
            tempered = z.astype(jnp.float32) / (temperature or 1)
            log_p = jnp.take_along_axis(jax.nn.log_softmax(tempered), drawn[..., None], -1)[..., 0]
            order = jnp.where(unknown, score(draws, log_p, progress), -jnp.inf)
            rank = jnp.argsort(jnp.argsort(-order, axis=-1), axis=-1)
            left = jnp.floor(wanted * share).astype(jnp.int32)
            reveal = unknown & (rank < (unknown.sum(-1) - left)[:, None])
            return (jnp.where(reveal, drawn, ids), unknown & ~reveal), None

        inputs = (jnp.arange(num_steps), *(jnp.asarray(a, jnp.float32) for a in (shares, progress, scales)))
        (ids, _), _ = jax.lax.scan(step, (ids.astype(jnp.int32), unknown), inputs)
        return ids

    return sampler
