"""Small exact models that the tests share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.models.layers import embed, perturb
from dimo_jax.nets import Net, TokenSpec
from dimo_jax.teachers.base import Teacher

COINS = np.array([[0.45, 0.05], [0.05, 0.45]])  # p(x_1, x_2)


def table_net(length: int, num_ids: int, num_logits: int) -> Net:
    """Any function of the whole input: logits [L, V] from a table with one row per input sequence.

    Parameters {table: [num_ids ** L, L, V], time: [L, V]}; the mask ratio is added through `time`.
    """

    def trunk(params, x, cond, r, *, sigma=0.0, noise=None, dropout_rng=None, attn_mask=None):
        e = perturb(embed(jnp.eye(num_ids), x), sigma, noise)
        if dropout_rng is not None:
            e = e * jax.random.bernoulli(dropout_rng, 0.9, e.shape) / 0.9
        rows = e[:, 0]
        for i in range(1, length):
            rows = (rows[:, :, None] * e[:, i, None, :]).reshape(len(e), -1)
        r = jnp.broadcast_to(jnp.reshape(r, (-1, 1)), (len(e), 1))
        h = jnp.concatenate([rows, r, jnp.reshape(cond, (-1, 1)).astype(rows.dtype)], -1)
        return jnp.broadcast_to(h[:, None], (len(e), length, h.shape[-1]))

    def head(params, h, start, size):
        h = jax.lax.dynamic_slice_in_dim(h, start, size, 1)
        weights = jnp.concatenate([params["table"], params["time"], params["cond"]])
        weights = jax.lax.dynamic_slice_in_dim(weights, start, size, 1)
        return jnp.einsum("bld,dlv->blv", h, weights)

    return Net(
        trunk=trunk,
        head=head,
        features=lambda *args, **kwargs: (trunk(*args, **kwargs), {}),
        noise_shape=lambda batch: (batch, length, num_ids),
    )


def toy_teacher(net: Net, tokens: TokenSpec, init: Callable) -> Teacher:
    """A teacher without pictures; the raw condition is a number per sample, the null condition is 0."""
    return Teacher(
        net=net,
        tokens=tokens,
        init=init,
        encode=lambda params, raw: raw,
        null=lambda params, cond, role: jnp.zeros_like(cond) - (role == "teacher"),
        decode=lambda params, ids: ids,
        conditions=lambda seed, n, shape: np.zeros(shape, np.float32),
        gallery=lambda count: np.zeros(count, np.float32),
        logical_axes=((r"", (None,)),),
    )


def exact_table(joint: np.ndarray) -> np.ndarray:
    """log p(x_i = v | the known tokens) for every input over ids 0..V (V is [M]): [(V+1)^L, L, V].

    The logits of a token that is known already are those of the token given the others.
    """
    length, size = joint.ndim, joint.shape[0]
    table = np.zeros((size + 1,) * length + (length, size))
    for x in np.ndindex(*(size + 1,) * length):
        for i in range(length):
            index = tuple(slice(None) if j == i or x[j] == size else x[j] for j in range(length))
            axes = tuple(a for a, j in enumerate(k for k in range(length) if k == i or x[k] == size) if j != i)
            conditional = joint[index].sum(axis=axes)
            table[x][i] = np.log(conditional / conditional.sum())
    return table.reshape(-1, length, size)


def exact_teacher(joint: np.ndarray) -> tuple[Teacher, dict]:
    """The teacher whose conditionals are exactly those of `joint`, and its parameters."""
    length, size = joint.ndim, joint.shape[0]
    params = {
        "table": jnp.asarray(exact_table(joint), jnp.float32),
        "time": jnp.zeros((1, length, size)),
        "cond": jnp.zeros((1, length, size)),
    }
    tokens = TokenSpec(length=length, codebook_size=size, mask_token=size, num_logits=size)
    teacher = toy_teacher(table_net(length, size + 1, size), tokens, lambda rng: {"net": params})
    return teacher, {"net": params}
