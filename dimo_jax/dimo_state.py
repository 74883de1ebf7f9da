"""What a Di[M]O step changes: theta, psi, the EMA and the counters, and how an update enters them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dimo_jax.objective import AUXILIARY_METRICS, GENERATOR_METRICS, Step
from dimo_jax.spec import DimoSpec
from dimo_jax.state import NetState, apply_gradients, ema_rate, ema_update, guarded, init_net, partition


class DimoState(NamedTuple):
    """Everything that training changes. Parameters are trainable partitions; frozen leaves stay the teacher's.

    metrics: {generator, auxiliary}, those of the latest update of each. skipped: non-finite updates that were skipped.
    finite: False from the first non-finite update on, unless such updates are skipped.
    """

    generator: NetState
    auxiliary: NetState
    ema: Any
    metrics: dict
    outer_step: jax.Array
    generator_updates: jax.Array
    ema_updates: jax.Array
    skipped: jax.Array
    finite: jax.Array


def init_dimo(net_params: dict, spec: DimoSpec, optimizers: dict) -> DimoState:
    """Line 1: theta, psi and the EMA start as copies of the teacher's trainable leaves."""
    trainable, _ = partition(net_params, spec.frozen)
    zeros = {
        "generator": {name: jnp.zeros(()) for name in (*GENERATOR_METRICS, "grad_norm")},
        "auxiliary": {name: jnp.zeros(()) for name in (*AUXILIARY_METRICS, "grad_norm")},
    }
    counters = {
        name: jnp.zeros((), jnp.int32) for name in ("outer_step", "generator_updates", "ema_updates", "skipped")
    }
    return DimoState(
        generator=init_net(optimizers["generator"], trainable),
        auxiliary=init_net(optimizers["auxiliary"], trainable),
        ema=jax.tree.map(jnp.copy, trainable),
        metrics=zeros,
        finite=jnp.ones((), bool),
        **counters,
    )


def update_when_due(every: int, update, skip, state: DimoState):
    """`update(state)` on every `every`-th outer step, from step 0 on, else `skip(state)`."""
    if every == 1:
        return update(state)
    return jax.lax.cond(state.outer_step % every == 0, update, skip, state)


def apply_update(step: Step, state: DimoState, name: str, grads, metrics: dict) -> DimoState:
    """The optimiser update of network `name`; a non-finite one clears `finite`, or is skipped and counted."""
    norm = optax.global_norm(grads)
    metrics = {**metrics, "grad_norm": norm}
    ok = jnp.isfinite(sum(jnp.sum(value) for value in metrics.values()))
    new = apply_gradients(step.optimizers[name], getattr(state, name), grads, state.outer_step)
    skipped, finite = state.skipped, state.finite & ok
    if step.spec.nonfinite == "skip":
        new, metrics = guarded(ok, (new, metrics), (getattr(state, name), state.metrics[name]))
        skipped, finite = skipped + (~ok).astype(skipped.dtype), state.finite
    metrics = jax.tree.map(lambda value: value.astype(jnp.float32), metrics)
    return state._replace(**{name: new}, metrics={**state.metrics, name: metrics}, skipped=skipped, finite=finite)


def finish_step(step: Step, state: DimoState) -> tuple[DimoState, dict]:
    """After both updates: the EMA of the generator, where it was updated, and the counters -> (state, flat metrics)."""
    due = state.outer_step % step.spec.generator_every == 0
    average_now = due & (state.generator_updates % step.spec.ema_every == 0)
    rate = jnp.where(average_now, ema_rate(step.spec.ema_decay, state.generator_updates), 1.0)
    flat = {f"{net}/{name}": value for net, values in state.metrics.items() for name, value in values.items()}
    metrics = {**flat, "sigma": step.sigma, "r_init": step.r_init, "skipped": state.skipped}
    state = state._replace(
        ema=ema_update(state.ema, state.generator.params, rate),
        outer_step=state.outer_step + 1,
        generator_updates=state.generator_updates + due,
        ema_updates=state.ema_updates + average_now,
    )
    return state, metrics
