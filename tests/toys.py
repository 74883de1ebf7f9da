"""Small exact models that the tests share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dimo_jax.models.layers import SelfAttention, embed, perturb
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


def ledger_teacher(num_logits: int = 3) -> tuple[Teacher, dict]:
    """Three tokens over the ids 0..2, [M] = 3 and the class tokens 4 and 5: a teacher to which every option matters.

    Its random table reads the whole input, the time and the condition, and its dropout acts; the parameters are the
    same with and without a column for [M] (num_logits 4 and 3).
    """
    tokens = TokenSpec(length=3, codebook_size=3, mask_token=3, num_logits=num_logits, class_tokens=(4, 2))
    whole = table_net(length=3, num_ids=6, num_logits=4)
    net = whole._replace(head=lambda params, h, start, size: whole.head(params, h, start, size)[..., :num_logits])
    rows = {"table": 6**3, "time": 1, "cond": 1}
    keys = jax.random.split(jax.random.key(0), len(rows))
    params = {name: jax.random.normal(key, (rows[name], 3, 4)) for name, key in zip(rows, keys, strict=True)}
    return toy_teacher(net, tokens, lambda rng: {"net": params}), {"net": params}


class Reader(nnx.Module):
    """A line of text: one layer of attention over ids 0..V - 1 and [M] = V, with a vector per sample as condition."""

    def __init__(self, length: int, size: int, width: int, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.tok_emb = nnx.Param(normal(rngs.params(), (size + 1, width)))
        self.pos_emb = nnx.Param(normal(rngs.params(), (length, width)))
        self.bias = nnx.Param(jnp.zeros((length, size)))
        self.attention = SelfAttention(width, 2, 0.1, jnp.float32, rngs)

    def __call__(self, x, cond, r, *, sigma=0.0, noise=None, dropout_rng=None, attn_mask=None):
        h = perturb(embed(self.tok_emb[...], x), sigma, noise) + self.pos_emb[...] + cond[:, None]
        return h + self.attention(h, dropout_rng, attn_mask)

    def head(self, h, start, size):
        h = jax.lax.dynamic_slice_in_dim(h, start, size, axis=1)
        return h @ self.tok_emb[:-1].T + jax.lax.dynamic_slice_in_dim(self.bias[...], start, size, axis=0)


def text_teacher(length: int = 8, size: int = 5, width: int = 4) -> tuple[Teacher, dict]:
    """A teacher of text: no grid, and what may be seen and changed comes with the conditions."""
    graph, state = nnx.split(Reader(length, size, width, nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(state)

    def bind(params):
        filled = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)

    net = Net(
        trunk=lambda params, *args, **kwargs: bind(params)(*args, **kwargs),
        head=lambda params, *args: bind(params).head(*args),
        features=lambda params, *args, **kwargs: (bind(params)(*args, **kwargs), {}),
        noise_shape=lambda batch: (batch, length, width),
    )
    tokens = TokenSpec(length=length, codebook_size=size, mask_token=size, num_logits=size)
    return toy_teacher(net, tokens, lambda rng: {"net": params}), {"net": params}
