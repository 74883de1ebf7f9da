"""The forward process: mask tokens (Eq. 1), and the generator's initial state x_init (Sec. 4.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.scipy.stats import norm

from dimo_jax.errors import UserError
from dimo_jax.nets import TokenSpec
from dimo_jax.registry import lookup
from dimo_jax.rng import Draws


def _mage(u):
    """Inverse distribution function of N(.55, .25^2) truncated to [.5, 1] (MAGE)."""
    low, high = norm.cdf(-0.2), norm.cdf(1.8)
    return jnp.clip(0.55 + 0.25 * ndtri(low + u * (high - low)), 0.5, 1.0)


# The mask ratio r of u ~ U[0, 1] (paper, Sec. 4.1; the released get_mask_code).
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda u: u,
    "square": lambda u: u**2,
    "cosine": lambda u: jnp.cos(jnp.pi * u / 2),
    "arccos": lambda u: jnp.arccos(u) / (jnp.pi / 2),
    "mage": _mage,
}


def mask_ratio(draws: Draws, batch: int, schedule: str, bounds: tuple[float, float] = (0.0, 1.0)) -> jax.Array:
    """Mask ratios r [batch] of `schedule`, clamped to `bounds` (Meissonic: 0.02 to 0.98). Draw: `ratio`, the u."""
    u = draws.uniform("ratio", (batch,))
    return jnp.clip(lookup(SCHEDULES, schedule, "mask schedule")(u), *bounds)


def bound_weight(u: jax.Array, schedule: str) -> jax.Array:
    """|dr/du| / r: with it the expected sum of masked cross-entropies over u ~ U[0, 1] bounds -log p(x_0) (Eq. 3).

    It is the 1/t of the linear schedule, carried over to any schedule by a change of variables. Where r = 0 nothing is
    masked, and the weight is 0.
    """
    ratio, slope = jax.jvp(lookup(SCHEDULES, schedule, "mask schedule"), (u,), (jnp.ones_like(u),))
    return jnp.where(ratio > 0, jnp.abs(slope) / jnp.where(ratio > 0, ratio, 1), 0)


def corrupt(draws: Draws, x, ratio, mask_token: int, *, exact_count: bool, maskable=None):
    """x_t ~ q(x_t | x): replace tokens of x [B, L] by the mask token -> (x_t [B, L], masked [B, L] bool). Eq. 1.

    exact_count masks round(L ratio) tokens, half to even and at least one, L counting the maskable positions (the
    released code); otherwise each is masked independently with probability `ratio` [B] (the paper). Draw: `masked`.
    """
    maskable = jnp.ones(x.shape, bool) if maskable is None else maskable
    ratio = jnp.broadcast_to(ratio, x.shape[:1])
    if exact_count:
        count = jnp.maximum(jnp.round(maskable.sum(-1) * ratio), 1).astype(jnp.int32)
        masked = draws.subset("masked", count, maskable)
    else:
        masked = draws.coins("masked", ratio, maskable)
    return jnp.where(masked, mask_token, x), masked


def _class_range(tokens: TokenSpec) -> tuple[int, int]:
    if not tokens.class_tokens[1]:
        raise UserError("this fill of x_init needs class tokens in the embedding table, and this teacher has none")
    first, count = tokens.class_tokens
    return first, first + count


# What the unmasked positions of x_init hold: (draws, tokens, shape) -> ids (paper, Tab. of initialisations).
FILLS: dict[str, Callable[[Draws, TokenSpec, tuple[int, int]], jax.Array]] = {
    "random_ids": lambda draws, tokens, shape: draws.randint("fill", shape, 0, tokens.codebook_size),
    "one_id": lambda draws, tokens, shape: jnp.zeros(shape, jnp.int32),
    "class_token": lambda draws, tokens, shape: jnp.full(shape, _class_range(tokens)[0]),
    "random_class_tokens": lambda draws, tokens, shape: draws.randint("fill", shape, *_class_range(tokens)),
}


def hybrid_init(draws: Draws, tokens: TokenSpec, batch: int, r_init, *, fill="random_ids", maskable=None, given=None):
    """x_init (Sec. 4.3): round(L r_init) positions, at least one, hold [M], the others the fill.

    -> (x_init, is_mask), both [B, L]. Positions that are not maskable hold `given` instead. Draws: `fill` (ids) and
    `masked`.
    """
    x = lookup(FILLS, fill, "fill of x_init")(draws, tokens, (batch, tokens.length)).astype(jnp.int32)
    if maskable is not None:
        x = jnp.where(maskable, x, given)
    return corrupt(draws, x, r_init, tokens.mask_token, exact_count=True, maskable=maskable)
