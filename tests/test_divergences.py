"""Divergences: the custom VJP against the derivative of the value, float32 against float64, the released gradients."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.divergences import DIVERGENCES, f_divergence, logit_gradient, token_divergence
from dimo_jax.errors import UserError
from dimo_jax.objective import reduce_tokens
from dimo_jax.registry import make
from dimo_jax.spec import DimoSpec

pytestmark = pytest.mark.usefixtures("little_optimization")


def alpha_f(a):
    return lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


def jeffreys_f(b):
    return lambda u: ((1 - b) * u - b) * jnp.log(u)


# Entry of the table, and the scalar f with D = sum q f(p / q).
CASES = {
    "forward_kl": ("forward_kl", lambda u: u * jnp.log(u)),
    "reverse_kl": ("reverse_kl", lambda u: -jnp.log(u)),
    "jeffreys(-0.2)": ({"name": "jeffreys", "beta": -0.2}, jeffreys_f(-0.2)),
    "jeffreys(0.5)": ({"name": "jeffreys", "beta": 0.5}, jeffreys_f(0.5)),
    "jensen_shannon": ("jensen_shannon", lambda u: -(u + 1) * jnp.log((1 + u) / 2) + u * jnp.log(u)),
    "squared_hellinger": ("squared_hellinger", lambda u: (jnp.sqrt(u) - 1) ** 2),
    "alpha(0.3)": ({"name": "alpha", "alpha": 0.3}, alpha_f(0.3)),
    "alpha(0.5)": ({"name": "alpha", "alpha": 0.5}, alpha_f(0.5)),
    "alpha(0.7)": ({"name": "alpha", "alpha": 0.7}, alpha_f(0.7)),
}
ROUTES = [(name, route) for name in CASES for route in ("by hand", "from f")]
# f_divergence continues f beyond |log u| = 40 in float32 (its docstring): these two f decay too slowly for that.
SLOW_TAILS = [("alpha(0.3)", "from f"), ("alpha(0.7)", "from f")]
each_case = pytest.mark.parametrize("name", CASES)
each_route = pytest.mark.parametrize(("name", "route"), ROUTES)


def divergence_of(name, route="by hand"):
    entry, f = CASES[name]
    return make(DIVERGENCES, entry, "divergence") if route == "by hand" else f_divergence(f)


def logit_pairs(size, rng=None):
    """Float64 (z_phi, z_psi) [4, 40, 7]: uniform in +-size, all at +-size, moderate, equal."""
    rng = rng or np.random.default_rng(0)
    uniform, extreme = rng.uniform(-size, size, (2, 40, 7)), rng.choice([-size, size], (2, 40, 7))
    moderate = rng.normal(0, min(size / 3, 3), (2, 40, 7))
    return np.stack([uniform, extreme, moderate, moderate[[0, 0]]], axis=1)


def value_and_gradient(divergence, pairs, dtype):
    with jax.enable_x64(dtype == np.float64):
        value, g = logit_gradient(divergence, *jnp.asarray(pairs, dtype))
        assert value.dtype == g.dtype == dtype
        return np.asarray(value), np.asarray(g)


def test_every_entry_of_the_table_is_tested():
    assert {entry if isinstance(entry, str) else entry["name"] for entry, _ in CASES.values()} == set(DIVERGENCES)


@each_route
def test_vjp_is_the_derivative_of_the_value(name, route):
    divergence, (z_phi, z_psi) = divergence_of(name, route), logit_pairs(60.0)

    def value(z_psi):  # plain differentiation through softmax and divergence; no rule of ours takes part
        log_p, log_q = jax.nn.log_softmax(z_phi), jax.nn.log_softmax(z_psi)
        return divergence(log_p, log_q)[0]

    def both(z_theta, z_psi, cotangent):
        (handed_on,) = jax.vjp(lambda z: token_divergence(divergence)(z, z_phi, z_psi)[0], z_theta)[1](cotangent)
        (derived,) = jax.vjp(value, z_psi)[1](cotangent)
        return handed_on, derived

    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        handed_on, derived = both(rng.normal(size=z_psi.shape), z_psi, rng.normal(size=z_psi.shape[:-1]))
    assert handed_on.dtype == np.float64 and np.abs(derived).max() > 0.1
    scale = np.abs(derived).max(-1, keepdims=True)  # of a token's gradient
    # 1e-12: where terms of size 100 cancel to a gradient of 0, both are 0 to float64's rounding of the terms.
    assert np.all(np.abs(handed_on - derived) <= 1e-6 * scale + 1e-12)


@pytest.mark.parametrize(("name", "route"), [r for r in ROUTES if r not in SLOW_TAILS])
def test_float32_at_logits_of_60(name, route):
    """Relative to the larger of 1 and the size of a token's value (gradient) in float64."""
    check_float32(name, route, 60.0)


@pytest.mark.parametrize(("name", "route"), SLOW_TAILS)
def test_float32_where_f_is_not_continued(name, route):
    check_float32(name, route, 19.0)  # |log p - log q| stays below 40


def check_float32(name, route, size):
    pairs = logit_pairs(size)
    pairs = pairs.astype(np.float32).astype(np.float64)
    value, g = value_and_gradient(divergence_of(name), pairs, np.float64)
    value32, g32 = value_and_gradient(divergence_of(name, route), pairs, np.float32)
    assert np.all(np.abs(value32 - value) <= 1e-4 * np.maximum(1, np.abs(value)))
    assert np.all(np.abs(g32 - g) <= 1e-4 * np.maximum(1, np.abs(g).max(-1, keepdims=True)))


@each_case
def test_f_divergence_is_the_handwritten_one(name):
    pairs = logit_pairs(60.0)
    by_hand = value_and_gradient(divergence_of(name), pairs, np.float64)
    from_f = value_and_gradient(divergence_of(name, "from f"), pairs, np.float64)
    np.testing.assert_allclose(from_f[0], by_hand[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(from_f[1], by_hand[1], rtol=1e-10, atol=1e-12)


@each_case
def test_value_is_a_divergence(name):
    """D >= 0 (a negative beta is no f-divergence), D = 0 and g = 0 at p = q, and g sums to 0 over the columns."""
    value, g = value_and_gradient(divergence_of(name), logit_pairs(60.0), np.float64)
    assert (value.min() < -1) if name == "jeffreys(-0.2)" else (value.min() > -1e-14)
    assert np.abs(value[-1]).max() < 1e-14 and np.abs(g[-1]).max() < 1e-14
    assert np.abs(g.sum(-1)).max() < 1e-12


def test_f_divergence_compiles():
    pairs = jnp.asarray(logit_pairs(5.0), jnp.float32)
    divergence = divergence_of("forward_kl", "from f")
    compiled = jax.jit(lambda zs: logit_gradient(divergence, *zs)[1])(pairs)
    np.testing.assert_allclose(compiled, logit_gradient(divergence, *pairs)[1], atol=1e-6)


def test_definition_of_f_divergence():
    """sum q f(p / q) in plain numpy, with an f that is in no table: le Cam's (u - 1)^2 / (u + 1)."""
    pairs = logit_pairs(5.0)
    value, _ = value_and_gradient(f_divergence(lambda u: (u - 1) ** 2 / (u + 1)), pairs, np.float64)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in pairs)
    np.testing.assert_allclose(value, ((p - q) ** 2 / (p + q)).sum(-1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0, 2.0])
def test_alpha_outside_its_domain_is_refused(alpha):
    with pytest.raises(UserError, match="0 < alpha < 1"):
        make(DIVERGENCES, {"name": "alpha", "alpha": alpha}, "divergence")


@each_case
def test_gradient_goes_to_theta_alone_in_its_dtype(name):
    z_phi, z_psi = logit_pairs(5.0)
    objective = token_divergence(divergence_of(name))
    zs = tuple(jnp.asarray(z, jnp.bfloat16) for z in (np.zeros_like(z_psi), z_phi, z_psi))
    (value, surrogate), vjp = jax.vjp(objective, *zs)
    assert value.dtype == surrogate.dtype == jnp.float32
    to_theta, to_phi, to_psi = vjp((jnp.ones_like(value), jnp.zeros_like(value)))
    expected = logit_gradient(divergence_of(name), zs[1], zs[2])[1]
    assert to_theta.dtype == jnp.bfloat16
    np.testing.assert_array_equal(to_theta, expected.astype(jnp.bfloat16))
    assert not jnp.any(to_phi) and not jnp.any(to_psi)
    np.testing.assert_allclose(surrogate, 0.5 * (expected**2).sum(-1), rtol=1e-6)
    assert not jnp.any(vjp((jnp.zeros_like(value), jnp.ones_like(value)))[0])


# Name in the recording: (entry, token_reduction, teacher temperature, auxiliary temperature, accumulation steps).
RECORDED = {
    "FKL": ("forward_kl", "sum", 1.0, 1.0, 1),
    "RKL": ("reverse_kl", "sum", 1.0, 1.0, 1),
    "Jeffreys_-0.2": ({"name": "jeffreys", "beta": -0.2}, "sum", 1.0, 1.0, 1),
    "Jeffreys_0.5": ({"name": "jeffreys", "beta": 0.5}, "sum", 1.0, 1.0, 1),
    "FKL_mean": ("forward_kl", "mean_all", 1.0, 1.0, 1),
    "Jeffreys_0.5_temps": ({"name": "jeffreys", "beta": 0.5}, "sum", 1.7, 0.6, 2),
}


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parent / "goldens" / "dimo_gradients.npz") as file:
        return dict(file)


def test_every_recording_is_replayed(recorded):
    assert {key.split("/")[1] for key in recorded if key.startswith("out/")} == set(RECORDED)
    temperatures = json.loads(str(recorded["meta"]))["Jeffreys_0_5_temps"]
    assert temperatures == {"true_temp": 1.7, "fake_temp": 0.6, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("name", RECORDED)
def test_released_gradients_and_losses(recorded, name):
    entry, reduction, t_phi, t_psi, accumulation = RECORDED[name]
    spec = DimoSpec(divergence=entry, token_reduction=reduction)
    masked = jnp.asarray(recorded["in/mask"])
    z_theta, z_phi, z_psi = (jnp.asarray(recorded[f"in/{k}_logit"]) for k in ("pred", "teacher", "aux"))
    objective = token_divergence(make(DIVERGENCES, entry, "divergence"))

    def loss(z_theta):
        value, surrogate = objective(z_theta, z_phi / t_phi, z_psi / t_psi)
        return tuple(reduce_tokens(spec, x, masked, z_theta.shape[-1]) / accumulation for x in (value, surrogate))

    gradient, surrogate = jax.grad(loss, has_aux=True)(z_theta)
    logged = recorded[f"out/{name}/loss_dm_{'mean' if reduction == 'mean_all' else 'sum'}"]
    np.testing.assert_allclose(surrogate, logged, rtol=5e-6)
    np.testing.assert_allclose(gradient, recorded[f"out/{name}/dloss_dpred"], rtol=0, atol=5e-6)
    if f"out/{name}/grad" in recorded:
        g = logit_gradient(make(DIVERGENCES, entry, "divergence"), z_phi / t_phi, z_psi / t_psi)[1]
        np.testing.assert_allclose(g * masked[..., None], recorded[f"out/{name}/grad"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["FKL", "RKL"])
def test_exact_gradients(recorded, name):
    pairs = np.stack([recorded["in/teacher_logit"], recorded["in/aux_logit"]])
    masked, exact = recorded["in/mask"][..., None], recorded[f"out/{name}/grad_exact_f64"]
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 5e-6)):
        _, g = value_and_gradient(make(DIVERGENCES, RECORDED[name][0], "divergence"), pairs, dtype)
        np.testing.assert_allclose(g * masked, exact, rtol=0, atol=tolerance)


def test_token_reductions():
    """Closed forms on [B, L] = [2, 3] tokens of V = 5, one, two of them masked."""
    values = jnp.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    masked = jnp.asarray([[True, False, False], [False, True, True]])
    for reduction, expected in (("sum", (1 + 48) / 2), ("mean_tokens", (1 + 24) / 2), ("mean_all", (1 + 48) / 30)):
        reduced = reduce_tokens(DimoSpec(token_reduction=reduction), values, masked, 5)
        np.testing.assert_allclose(reduced, expected, rtol=1e-6)
