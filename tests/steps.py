"""Two real steps on the toy of the ledger, op by op: what one spec has compiled serves the next."""

import jax
import jax.numpy as jnp
import numpy as np
from toys import ledger_teacher

from dimo_jax import dimo, dimo_state, mdm
from dimo_jax.mdm import PretrainSpec
from dimo_jax.nets import Conditions
from dimo_jax.optim import OptimSpec, make_learning_rate, make_transform
from dimo_jax.rng import Draws
from dimo_jax.spec import DimoSpec
from dimo_jax.state import Optimizer, merge

BATCH, NUM_STEPS = 16, 2
OPTIM = OptimSpec(learning_rate=0.1, schedule="constant", eps=1e-2)  # with a large eps Adam sees the scale of a loss
ACTS = 1e-5  # what a flip must change some weight by; rounding changes less


def optimizer(spec: OptimSpec) -> Optimizer:
    return Optimizer(make_transform(spec), make_learning_rate(spec, NUM_STEPS))


def conditions(seed: int, *shape: int) -> Conditions:
    return Conditions(jax.random.normal(jax.random.key(seed), shape))


def batch_of(n: int, spec: DimoSpec) -> dict:
    shape = (spec.num_auxiliary_updates, 1, BATCH)
    return {"generator": conditions(2 * n, 1, BATCH), "auxiliary": conditions(2 * n + 1, *shape)}


def distilled(
    spec: DimoSpec, *, num_logits=3, generator=OPTIM, auxiliary=OPTIM, batch=batch_of, recorded=None
) -> list[dimo_state.DimoState]:
    """The states after each step of the real train_step."""
    teacher, params = ledger_teacher(num_logits)
    static = {"generator": optimizer(generator), "auxiliary": optimizer(auxiliary)}
    state, found = dimo_state.init_dimo(params["net"], spec, static), []
    draws = Draws(jax.random.key(1), recorded or {})
    for n in range(NUM_STEPS):
        state, _ = dimo.train_step(state, params, batch(n, spec), draws, teacher=teacher, spec=spec, optimizers=static)
        found.append(state)
    return found


def weights(state: dimo_state.DimoState) -> dict:
    """The three networks whole, frozen leaves included."""
    base = ledger_teacher()[1]["net"]
    trainable = {"generator": state.generator.params, "auxiliary": state.auxiliary.params, "ema": state.ema}
    return {name: jax.tree.map(np.asarray, merge(base, tree)) for name, tree in trainable.items()}


def changed(one: dict, two: dict, by: float = 0.0) -> set[str]:
    """The names of the trees in which some number differs by more than `by`."""
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((one, two)))
    differ = jax.tree.map(lambda a, b: np.abs(a - b).max() > by, one, two)
    return {name for name, leaves in differ.items() if any(jax.tree.leaves(leaves))}


def poisoned(conditions: Conditions) -> Conditions:
    """The same, but the first sample's condition is not a number."""
    return Conditions(conditions.raw.at[..., 0].set(jnp.nan))


def pretrained(spec: PretrainSpec, bad_step: int | None = None) -> list[tuple[mdm.PretrainState, dict]]:
    """(state, metrics) after each step of the real pretrain_step; the conditions of bad_step are poisoned."""
    teacher, params = ledger_teacher()
    static = optimizer(OPTIM)
    state, found = mdm.init_pretrain(params["net"], static), []
    for n in range(NUM_STEPS):
        raw = conditions(n, BATCH)
        ids = jax.random.randint(jax.random.key(n), (BATCH, 3), 0, 3)
        batch = {"ids": ids, "conditions": poisoned(raw) if n == bad_step else raw}
        draws = Draws(jax.random.key(1))
        state, metrics = mdm.pretrain_step(state, {}, batch, draws, teacher=teacher, spec=spec, optimizer=static)
        found.append((state, metrics))
    return found
