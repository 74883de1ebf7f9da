"""The contracts: what a network, a token space and a batch of conditions are to the algorithms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Net(NamedTuple):
    """A masked-token predictor as pure functions; parameters are always arguments.

    trunk(params, x, cond, r, *, sigma=0., noise=None, dropout_rng=None, attn_mask=None) -> h [B, L, D'].
      x [B, L] int32 ids, or [B, L, K] probabilities over the K = codebook + 1 ids (soft tokens); cond a pytree with
      leading axis B; r [B] the mask ratio (ignored by a network without time input); noise [B, ...] perturbs the
      embeddings e as sqrt(1 - sigma^2) e + sigma noise; dropout is on exactly when dropout_rng is given; attn_mask
      bool, broadcastable to [B, L, L], True where a query (row) may look at a key (column).
    head(params, h, start, length) -> logits [B, length, V] of the positions start .. start + length (start may be
      traced, length is static), pointwise over positions.
    features: trunk's arguments -> (h, dict of intermediates), for later heads on a frozen trunk.
    noise_shape(B) -> shape of the embedding noise.
    """

    trunk: Callable
    head: Callable
    features: Callable
    noise_shape: Callable[[int], tuple[int, ...]]


class TokenSpec(NamedTuple):
    """The token space: ids 0 .. codebook_size - 1, then the mask token.

    num_logits is codebook_size, or codebook_size + 1 when the network's logits have a column for [M] (the released
    MaskGIT). class_tokens = (first id, count) where the embedding table also holds class tokens, else (0, 0).
    """

    length: int
    codebook_size: int
    mask_token: int
    num_logits: int
    grid: tuple[int, int] | None = None
    class_tokens: tuple[int, int] = (0, 0)


class Conditions(NamedTuple):
    """What a batch of B samples is conditioned on.

    raw: pytree with leading axis B (labels, prompts' ids or embeddings), encoded inside the step by Teacher.encode.
    given [B, L] ids and maskable [B, L] bool: positions that are not maskable hold `given` and are never generated,
    masked or trained on (a text prefix, the known part of a picture). attn_mask: see Net.trunk.
    """

    raw: Any
    given: jax.Array | None = None
    maskable: jax.Array | None = None
    attn_mask: jax.Array | None = None


def logits(net: Net, params, x, cond, r, **kwargs) -> jax.Array:
    """Head over all positions of the trunk: [B, L, V]. `kwargs` go to the trunk."""
    h = net.trunk(params, x, cond, r, **kwargs)
    return net.head(params, h, 0, h.shape[1])


def over_positions(function: Callable, length: int, num_chunks: int):
    """function(start, size) -> pytree of [B, size, ...], run in `num_chunks` equal chunks, joined to [B, length, ...].

    The chunks run one after the other and are recomputed in the backward pass, so that one block of logits lives at a
    time. With one chunk it is the plain call.
    """
    if num_chunks == 1:
        return function(0, length)
    size = length // num_chunks
    run = jax.checkpoint(lambda start: function(start, size))
    _, chunks = jax.lax.scan(lambda carry, start: (carry, run(start)), None, jnp.arange(num_chunks) * size)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], length, *a.shape[3:]), chunks)
