"""Draw tokens from logits: temperature, top-k, top-p, Gumbel arg max."""

import jax
import jax.numpy as jnp


def filter_logits(z: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Set logits [..., V] outside the top_k largest, then outside the nucleus of mass top_p, to -inf; 0 is off.

    As in the released generate_one_step: ties with the k-th largest stay, and the nucleus keeps the token that
    crosses top_p.
    """
    if top_k:
        z = jnp.where(z < jax.lax.top_k(z, min(top_k, z.shape[-1]))[0][..., -1:], -jnp.inf, z)
    if top_p:
        order = jnp.argsort(-z, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(z, order, -1)), -1)
        beyond = jnp.concatenate([jnp.zeros_like(mass[..., :1], bool), mass[..., :-1] > top_p], -1)
        z = jnp.where(jnp.take_along_axis(beyond, jnp.argsort(order, axis=-1), -1), -jnp.inf, z)
    return z


def sample_ids(z: jax.Array, gumbel: jax.Array | None, *, temperature=1.0, top_k: int = 0, top_p: float = 0.0):
    """Ids [...] drawn from softmax(z / temperature) after top-k and top-p, in at least float32, without a gradient.

    z, gumbel [..., V]. Without gumbel noise, or at temperature 0, it is the arg max.
    """
    z = jax.lax.stop_gradient(z).astype(jnp.promote_types(z.dtype, jnp.float32))
    if gumbel is None or (isinstance(temperature, int | float) and temperature == 0):
        return jnp.argmax(z, -1).astype(jnp.int32)
    return jnp.argmax(filter_logits(z / temperature, top_k, top_p) + gumbel, -1).astype(jnp.int32)
