"""The one-step sampler of a distilled generator (paper, Sec. 4.3; released generate_one_step). One evaluation."""

import jax.numpy as jnp

from dimo_jax.categorical import sample_ids
from dimo_jax.corruption import hybrid_init
from dimo_jax.rng import Draws


def one_step(*, r_init=0.6, sigma_init=0.1, fill="random_ids", temperature=1.0, top_k=0, top_p=0.0, cfg_scale=1.0):
    """x_init -> logits -> ids; temperature 0 is the arg max. The paper's FID on ImageNet is lowest at temperature 7.

    [M] may have a column in the logits (the released code draws over it); it is left out here.
    """

    def sampler(denoise, rng, tokens, batch, given=None):
        draws = Draws(rng)
        unknown = None if given is None else given == tokens.mask_token
        x_init, _ = hybrid_init(draws, tokens, batch, r_init, fill=fill, maskable=unknown, given=given)
        r = jnp.full(batch, r_init)
        z = denoise(x_init, r=r, step=0, scale=cfg_scale, sigma=sigma_init, noise=draws.named_key("noise"))
        z = z[..., : tokens.codebook_size]
        gumbel = draws.gumbel("tokens", batch, 0, tokens.length, tokens.codebook_size)
        ids = sample_ids(z, gumbel, temperature=temperature, top_k=top_k, top_p=top_p)
        return ids if given is None else jnp.where(unknown, ids, given)

    return sampler
