"""ALGORITHM 1 of Di[M]O (arXiv 2503.15457): distil a masked diffusion teacher phi into a one-step generator theta.

psi, the auxiliary model, is trained on theta's own samples and stands in for theta's intractable conditionals. Networks
are `Net`s, parameters are arguments, every random number comes from `draws`. Shapes: B batch, L tokens, V logits.
The terms that the lines of the algorithm call are in objective.py, what a step changes is in dimo_state.py.
"""

import jax

from dimo_jax.dimo_state import DimoState, apply_update, finish_step, update_when_due
from dimo_jax.nets import Conditions
from dimo_jax.objective import Step, auxiliary_loss, begin_step, corrupt_sample, generate, generator_loss
from dimo_jax.rng import Draws
from dimo_jax.spec import DimoSpec
from dimo_jax.state import accumulate


def train_step(state: DimoState, params: dict, batch: dict, draws: Draws, *, teacher, spec: DimoSpec, optimizers: dict):
    """One iteration of Algorithm 1 -> (state, metrics). Pure: jit it with teacher, spec and optimizers bound.

    Args:
      state: theta, psi and the EMA (line 1 made them copies of phi: `init_dimo`).
      params: the teacher's {net, ...}; never changed.
      batch: {generator: Conditions [A, B, ...], auxiliary: Conditions [n, A, B, ...]}, A microbatches and n auxiliary
        updates; without `resample` the auxiliary reuses the generator's and its entry is not read.
      draws: the run's random numbers; the step takes its own by state.outer_step.
    """
    draws = draws.at_step(state.outer_step)
    step = begin_step(teacher, spec, optimizers, params, state.outer_step, draws)
    theta, conditions = state.generator.params, batch["generator"]
    if spec.share_x_t:  # lines 3-13 on one x_t
        state = shared_update(step, state, conditions, draws.scope("generator"))
        return finish_step(step, state)
    state, samples = generator_step(step, state, conditions, draws.scope("generator"))  # lines 3-10
    if spec.resample:  # the auxiliary learns from fresh samples of the updated generator (DEVIATION 1)
        theta = state.generator.params
    for i in range(spec.num_auxiliary_updates):
        if spec.resample:
            conditions, samples = jax.tree.map(lambda a, i=i: a[i], batch["auxiliary"]), None
        state = auxiliary_step(step, state, theta, conditions, samples, draws.scope("auxiliary", i))  # lines 11-13
    return finish_step(step, state)


def generator_step(step: Step, state: DimoState, conditions: Conditions, draws: Draws):
    """Lines 3-10: sample x, mask it to x_t, hand dD(p_phi || p_psi)/dz_psi at x_t to theta's logits (Eq. 7).

    -> (state, samples [A, ...]); samples is None when the auxiliary draws its own.
    """

    def grad_fn(conditions, draws):
        def loss_fn(theta):
            sample = generate(step, theta, conditions, draws)  # lines 4-6
            x_t = corrupt_sample(step, "mask_schedule", sample, conditions, draws.scope("x_t"))  # line 8
            loss, metrics, _ = generator_loss(
                step, theta, state.auxiliary.params, sample, x_t, conditions, draws
            )  # 9-10
            return loss, (metrics, sample)

        grads, (metrics, sample) = jax.grad(loss_fn, has_aux=True)(state.generator.params)
        return grads, metrics, None if step.spec.resample else sample

    def sample_only(conditions, draws):
        return (), {}, None if step.spec.resample else generate(step, state.generator.params, conditions, draws)

    def update(state):
        grads, metrics, samples = accumulate(grad_fn, conditions, draws)
        return apply_update(step, state, "generator", grads, metrics), samples

    def skip(state):
        return state, accumulate(sample_only, conditions, draws)[2]

    return update_when_due(step.spec.generator_every, update, skip, state)


def auxiliary_step(step: Step, state: DimoState, theta, conditions: Conditions, samples, draws: Draws):
    """Lines 11-13: mask the samples with their own ratio and update psi by masked cross-entropy (Eq. 3) -> state.

    theta: the generator that drew (or, when `samples` is None, now draws) the samples.
    """

    def grad_fn(item, draws):
        conditions, sample = item
        if sample is None:
            sample = generate(step, theta, conditions, draws)

        def loss_fn(psi):
            x_t = corrupt_sample(step, "auxiliary_mask_schedule", sample, conditions, draws.scope("x_t"))  # line 12
            return auxiliary_loss(step, theta, psi, sample, x_t, conditions, draws)  # line 13

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.auxiliary.params)
        return grads, metrics, None

    def update(state):
        grads, metrics, _ = accumulate(grad_fn, (conditions, samples), draws)
        return apply_update(step, state, "auxiliary", grads, metrics)

    return update_when_due(step.spec.auxiliary_every, update, lambda state: state, state)


def shared_update(step: Step, state: DimoState, conditions: Conditions, draws: Draws) -> DimoState:
    """Lines 3-13 with one x_t for both updates: psi's forward pass at x_t serves Eq. 7 and Eq. 3 alike.

    Beyond paper and released code. The two losses share no gradient: Eq. 7 gives none to psi, Eq. 3 none to theta.
    """

    def grad_fn(conditions, draws):
        def loss_fn(both):
            theta, psi = both
            sample = generate(step, theta, conditions, draws)
            x_t = corrupt_sample(step, "mask_schedule", sample, conditions, draws.scope("x_t"))
            loss, metrics, z_psi = generator_loss(step, theta, psi, sample, x_t, conditions, draws)
            aux_loss, aux_metrics = auxiliary_loss(step, theta, psi, sample, x_t, conditions, draws, z_psi=z_psi)
            return loss + aux_loss, (metrics, aux_metrics)

        return *jax.grad(loss_fn, has_aux=True)((state.generator.params, state.auxiliary.params)), None

    (theta_grads, psi_grads), (metrics, aux_metrics), _ = accumulate(grad_fn, conditions, draws)
    state = apply_update(step, state, "generator", theta_grads, metrics)
    return apply_update(step, state, "auxiliary", psi_grads, aux_metrics)
