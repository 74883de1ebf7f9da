"""Training state: trainable partitions, their optimiser states, the moving average, accumulation over microbatches."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from dimo_jax.errors import UserError


class NetState(NamedTuple):
    """The TRAINABLE parameters of a network (nested dict) and their optimiser state."""

    params: Any
    opt_state: Any


class Optimizer(NamedTuple):
    """`transform` turns gradients into descent directions; the learning rate is a function of the outer step."""

    transform: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]


def partition(params: dict, frozen: Sequence[str]) -> tuple[dict, dict]:
    """Split a nested dict into (trainable, frozen) by regexes searched in the "a/b/c" paths.

    Raises:
      UserError: a regex that matches no parameter.
    """
    flat = flatten_dict(params, sep="/")
    idle = [pattern for pattern in frozen if not any(re.search(pattern, path) for path in flat)]
    if idle:
        raise UserError(f"frozen patterns {idle} match no parameter: the parameters are {', '.join(sorted(flat))}")
    is_frozen = {path: any(re.search(pattern, path) for pattern in frozen) for path in flat}
    parts = ({p: v for p, v in flat.items() if is_frozen[p] == side} for side in (False, True))
    return tuple(unflatten_dict(part, sep="/") for part in parts)


def merge(base: dict, trainable: dict) -> dict:
    """`base` with the leaves of `trainable` in their places."""
    return unflatten_dict({**flatten_dict(base), **flatten_dict(trainable)})


def init_net(optimizer: Optimizer, trainable: dict) -> NetState:
    """A network's state before the first update; owns its buffers (XLA cannot donate one buffer twice)."""
    return NetState(jax.tree.map(jnp.copy, trainable), optimizer.transform.init(trainable))


def apply_gradients(optimizer: Optimizer, state: NetState, grads, outer_step: jax.Array) -> NetState:
    """One optimiser update with the learning rate of `outer_step`."""
    directions, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    rate = optimizer.learning_rate(outer_step)
    return NetState(jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), state.params, directions), opt_state)


def guarded(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `ok`, else `old`: an update that is skipped because it is not finite."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def ema_rate(decay: float, num_updates: jax.Array) -> jax.Array:
    """min(decay, (1 + n) / (10 + n)), n the updates before this one (the released update_ema)."""
    return jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))


def ema_update(average, params, rate: jax.Array):
    """rate * average + (1 - rate) * params; a rate of 1 leaves the average bitwise as it is."""
    return jax.tree.map(lambda a, p: (rate * a + (1 - rate) * p).astype(a.dtype), average, params)


def accumulate(grad_fn: Callable, batch, draws) -> tuple[Any, dict, Any]:
    """Run grad_fn(microbatch, its draws) -> (grads, metrics, samples) over the leading axis A of every leaf of `batch`.

    Returns the mean gradient, the mean metrics and the stacked samples [A, ...]. Microbatch i draws from scope
    `microbatch` i, so no two share a key.
    """
    num = jax.tree.leaves(batch)[0].shape[0]

    def one(i):
        return grad_fn(jax.tree.map(lambda a: a[i], batch), draws.scope("microbatch", i))

    if num == 1:
        grads, metrics, samples = one(0)
        return grads, metrics, jax.tree.map(lambda a: a[None], samples)

    def body(total, i):
        grads, metrics, samples = one(i)
        return jax.tree.map(jnp.add, total, (grads, metrics)), samples

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0)[:2])
    total, samples = jax.lax.scan(body, zeros, jnp.arange(num))
    return *jax.tree.map(lambda a: a / num, total), samples
