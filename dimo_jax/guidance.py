"""Classifier-free guidance: one formula, one way of running it."""

import jax
import jax.numpy as jnp


def guided(z_conditional: jax.Array, z_unconditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """z_u + scale (z_c - z_u) for logits [B, ..., V] and a scale or one per sample [B]; scale 1 is no guidance."""
    scale = jnp.reshape(scale, jnp.shape(scale) + (1,) * (z_conditional.ndim - jnp.ndim(scale)))
    return z_unconditional + scale.astype(z_conditional.dtype) * (z_conditional - z_unconditional)


def guidance_scale(scale: float, ratio: jax.Array, *, adaptive: bool):
    """The scale at mask ratio `ratio` [B]: constant, or 1 + (scale - 1) ratio (no gain, says the paper)."""
    return 1 + (scale - 1) * ratio if adaptive and scale != 1 else scale


def guided_head(net, params, x, cond, null, r, scale, **trunk_arguments):
    """Guided logits of `net` at x [B, L] as a function (start, length) -> [B, length, V].

    Both branches run as one batch of 2B, so they get different dropout masks. When `scale` is the number 1 the
    unconditional branch is not run at all.
    """
    if isinstance(scale, int | float) and scale == 1:
        h = net.trunk(params, x, cond, r, **trunk_arguments)
        return lambda start, length: net.head(params, h, start, length)

    mask = trunk_arguments.get("attn_mask")
    if mask is not None:  # it may be one for all samples
        trunk_arguments["attn_mask"] = jnp.broadcast_to(mask, (len(x), *mask.shape[-2:]))
    both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null)
    doubled = {k: v if k in ("sigma", "dropout_rng") else _double(v) for k, v in trunk_arguments.items()}
    h = net.trunk(params, _double(x), both, _double(jnp.broadcast_to(r, x.shape[:1])), **doubled)

    def head(start, length):
        return guided(*jnp.split(net.head(params, h, start, length), 2), scale)

    return head


def _double(array):
    return None if array is None else jnp.concatenate([array, array])
