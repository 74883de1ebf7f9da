"""Two coins that agree nine times in ten: can one step learn to correlate them? The exact teacher, the real train_step.

A one-step model of independent tokens cannot: its best total variation to p is 0.4. Randomness must come from x_init.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import COINS, exact_teacher

from dimo_jax import dimo, dimo_state, objective
from dimo_jax.divergences import token_divergence
from dimo_jax.nets import Conditions
from dimo_jax.optim import OptimSpec, make_learning_rate, make_transform
from dimo_jax.rng import Draws
from dimo_jax.samplers import SAMPLERS
from dimo_jax.spec import DimoSpec
from dimo_jax.state import Optimizer, merge

NUM_STEPS, BATCH = 2000, 128


def total_variation(spec: DimoSpec) -> float:
    """Distil for NUM_STEPS steps; total variation between the EMA generator's samples and p."""
    teacher, params = exact_teacher(COINS)
    optimizers = {}
    for name, rate in (("generator", 0.01), ("auxiliary", 0.05)):
        optim = OptimSpec(learning_rate=rate, schedule="constant", beta1=0.5)
        optimizers[name] = Optimizer(make_transform(optim), make_learning_rate(optim, NUM_STEPS))
    step = functools.partial(dimo.train_step, teacher=teacher, spec=spec, optimizers=optimizers)
    batch = {"generator": Conditions(jnp.zeros((1, BATCH))), "auxiliary": Conditions(jnp.zeros((1, 1, BATCH)))}

    @jax.jit
    def run(state, params, draws):
        return jax.lax.scan(lambda state, _: step(state, params, batch, draws), state, None, NUM_STEPS)

    state, metrics = run(dimo_state.init_dimo(params["net"], spec, optimizers), params, Draws(jax.random.key(0)))
    assert bool(state.finite) and int(state.outer_step) == NUM_STEPS
    sampler = SAMPLERS["one_step"](r_init=spec.r_init, sigma_init=spec.sigma_init)
    net, theta = teacher.net, merge(params["net"], state.ema)

    def denoise(x, *, r, step, scale, sigma, noise):
        h = net.trunk(
            theta, x, jnp.zeros(len(x)), r, sigma=sigma, noise=jax.random.normal(noise, net.noise_shape(len(x)))
        )
        return net.head(theta, h, 0, 2)

    ids = np.asarray(sampler(denoise, jax.random.key(1), teacher.tokens, 20_000))
    counts = np.histogram2d(ids[:, 0], ids[:, 1], bins=[[-0.5, 0.5, 1.5]] * 2)[0]
    return float(np.abs(counts / len(ids) - COINS).sum() / 2)


BASE = DimoSpec(
    r_init=0.5, sigma_init=0.1, exact_count=False, mask_schedule="linear", auxiliary_mask_schedule="linear",
    label_smoothing=0.0, teacher_cfg_scale=1.0, dropout=False, teacher_dropout=False, ema_decay=0.99,
)  # fmt: skip


def with_(**changes):
    import dataclasses

    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize("resample", [True, False], ids=["fresh", "reused"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", {"name": "jeffreys", "beta": -0.2}], ids=str)
def test_one_step_learns_the_joint(divergence, resample):
    assert total_variation(with_(divergence=divergence, resample=resample)) < 0.05


def test_a_deterministic_start_cannot():
    assert total_variation(with_(r_init=1.0, sigma_init=0.0)) > 0.3


def test_the_sign_of_the_gradient_matters(monkeypatch):
    def flipped(divergence):
        objective_ = token_divergence(divergence)
        return lambda z_theta, z_phi, z_psi: objective_(-z_theta, z_phi, z_psi)

    monkeypatch.setattr(objective, "token_divergence", flipped)
    assert total_variation(BASE) > 0.3


def test_the_auxiliary_model_matters(monkeypatch):
    def without_psi(divergence):
        objective_ = token_divergence(divergence)
        return lambda z_theta, z_phi, z_psi: objective_(z_theta, z_phi, z_phi)

    monkeypatch.setattr(objective, "token_divergence", without_psi)
    assert total_variation(BASE) > 0.3
