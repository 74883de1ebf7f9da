"""Every sampler of the table: what it fills and keeps, how often it asks the network; and the laws of its draws."""

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toys import COINS, exact_teacher

from dimo_jax.categorical import filter_logits, sample_ids
from dimo_jax.errors import UserError
from dimo_jax.nets import TokenSpec
from dimo_jax.rng import Draws
from dimo_jax.samplers import SAMPLERS
from dimo_jax.samplers.loop import MASKED_SHARE, masked_shares

pytestmark = pytest.mark.usefixtures("little_optimization")

K, LENGTH, BATCH, NUM_STEPS = 6, 9, 4, 4
TOKENS = TokenSpec(length=LENGTH, codebook_size=K, mask_token=K, num_logits=K + 1)
# Logits that like [M] (the last column) best of all; a sampler must not draw it.
TABLE = np.random.default_rng(0).normal(0, 2, (LENGTH, K + 1))
TABLE[:, K] = 50.0
OPTIONS = {"one_step": {}, "random": {"num_steps": NUM_STEPS}, "confidence": {"num_steps": NUM_STEPS}}
GIVEN = np.full((BATCH, LENGTH), K)
GIVEN[0, :4], GIVEN[1, ::2], GIVEN[2, :] = 5, np.arange(5), 3  # a prefix, every other one, everything, nothing

each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def run(name, given=None, seed=0, **options):
    """Sample op by op -> (ids, the arguments of every evaluation): in this mode `lax.scan` is a Python loop."""
    calls = []

    def denoise(x, *, r, step, scale, sigma=0.0, noise=None):
        calls.append({"x": np.asarray(x), "r": np.asarray(r), "step": int(step), "scale": float(scale)})
        return jnp.broadcast_to(jnp.asarray(TABLE, jnp.float32), (*x.shape, K + 1))

    sampler = SAMPLERS[name](**{**OPTIONS[name], **options})
    with jax.disable_jit():
        ids = sampler(denoise, jax.random.key(seed), TOKENS, BATCH, given)
    return np.asarray(ids), calls


@pytest.fixture(scope="module", params=SAMPLERS)
def inpainted(request):
    return request.param, *run(request.param, jnp.asarray(GIVEN))


def test_every_sampler_is_tested():
    assert set(OPTIONS) == set(SAMPLERS)


@each_sampler
def test_sampler_sees_only_denoise(name):
    sampler = SAMPLERS[name](**OPTIONS[name])
    assert list(inspect.signature(sampler).parameters) == ["denoise", "rng", "tokens", "batch", "given"]


def test_given_tokens_are_kept_and_the_others_filled(inpainted):
    _, ids, _ = inpainted
    assert ids.dtype == np.int32 and ids.shape == GIVEN.shape
    np.testing.assert_array_equal(ids[GIVEN != K], GIVEN[GIVEN != K])
    assert ids.min() >= 0 and ids.max() < K  # no mask token, though the network likes it best


def test_evaluations_are_exactly_those_asked_for(inpainted):
    """And every one sees the given tokens, and the share of its input that is masked."""
    name, _, calls = inpainted
    assert [call["step"] for call in calls] == list(range(NUM_STEPS if name != "one_step" else 1))
    for call in calls:
        np.testing.assert_array_equal(call["x"][GIVEN != K], GIVEN[GIVEN != K])
        assert call["r"].shape == (BATCH,) and call["x"].dtype == np.int32
        if name != "one_step":  # which is told r_init
            np.testing.assert_allclose(call["r"], (call["x"] == K).mean(-1), rtol=1e-6)


def test_known_tokens_stay_from_step_to_step(inpainted):
    name, ids, calls = inpainted
    for before, after in zip(calls, [*calls[1:], {"x": ids}], strict=True):
        known = before["x"] != K
        if name != "one_step":  # whose x_init holds random ids, not known ones
            np.testing.assert_array_equal(after["x"][known], before["x"][known])


@pytest.mark.parametrize("name", ["random", "confidence"])
def test_tokens_are_revealed_by_schedule(name):
    """floor(9 (1 - i / n)) left after step i: no token twice, none left; with more steps than tokens too."""
    for num_steps in (1, 4, 9, 11):
        _, calls = run(name, num_steps=num_steps, schedule="linear")
        left = [int((call["x"] == K).sum(-1)[0]) for call in calls]
        assert left == [9 - -(-9 * i // num_steps) for i in range(num_steps)]


@each_sampler
def test_temperature_0_is_the_arg_max(name):
    """Whatever the random numbers: [M]'s column left out."""
    expected = np.broadcast_to(TABLE[:, :K].argmax(-1), (BATCH, LENGTH))
    for seed in (0, 1):
        np.testing.assert_array_equal(run(name, seed=seed, temperature=0)[0], expected)


@each_sampler
def test_top_k_and_temperature_reach_the_draw(name):
    """Among the two best, and nearly flat at a high temperature: both are drawn."""
    ids = np.stack([run(name, seed=seed, top_k=2, temperature=100.0)[0] for seed in range(3)]).reshape(-1, LENGTH)
    best = np.argsort(-TABLE[:, :K], axis=-1)[:, :2]
    for i in range(LENGTH):
        assert set(ids[:, i]) == set(best[i])


@pytest.mark.parametrize("name", ["random", "confidence"])
def test_guidance_is_ramped_from_1(name):
    scales = {ramp: [call["scale"] for call in run(name, cfg_scale=4.0, cfg_ramp=ramp)[1]] for ramp in (True, False)}
    np.testing.assert_allclose(scales[True], [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(scales[False], [4, 4, 4, 4], rtol=1e-6)


def test_one_step_passes_its_scale_and_starts_from_x_init():
    _, (call,) = run("one_step", cfg_scale=3.0, r_init=0.5)
    assert call["scale"] == 3.0 and np.all(call["r"] == 0.5)
    assert np.all((call["x"] == K).sum(-1) == 4)  # round(9 * 0.5), half to even


def test_confidence_shows_the_most_probable_first():
    """Without noise the order is that of log p, p = softmax(z / temperature), of the drawn tokens (here the best)."""
    orders = []
    for temperature in (1.0, 0.2):
        options = {"num_steps": LENGTH, "schedule": "linear", "choice_temperature": 0.0, "top_k": 1}
        ids, calls = run("confidence", temperature=temperature, **options)
        shown = [np.flatnonzero(a["x"][0] != b["x"][0]) for a, b in zip(calls, [*calls[1:], {"x": ids}], strict=True)]
        z = TABLE[:, :K] / temperature
        best = z.max(-1) - np.log(np.exp(z).sum(-1))
        np.testing.assert_array_equal(np.concatenate(shown), np.argsort(-best))
        orders.append(np.argsort(-best))
    assert not np.array_equal(*orders)


def test_confidence_noise_fades(monkeypatch):
    """log p + choice_temperature (1 - progress) Gumbel, the Gumbel from the uniform draw `order`, finite at u = 0."""
    monkeypatch.setattr(sys.modules["dimo_jax.samplers.confidence"], "reveal_sampler", lambda score, **options: score)
    score, log_p, u = SAMPLERS["confidence"](choice_temperature=4.5), np.log([0.2, 0.9, 0.5]), np.asarray([0.3, 0.8, 0])
    draws = Draws(jax.random.key(0), {"order": u.astype(np.float32)})
    for progress in (0.0, 0.25, 1.0):
        found = score(draws, jnp.asarray(log_p), progress)
        np.testing.assert_allclose(
            found[:2], log_p[:2] - 4.5 * (1 - progress) * np.log(-np.log(u[:2])), rtol=1e-5, atol=1e-6
        )
        assert np.isfinite(found[2])


@pytest.mark.parametrize("schedule", MASKED_SHARE)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 16])
def test_masked_shares(schedule, num_steps):
    """Never rising, in [0, 1], 0 at the end; at half time the closed forms."""
    shares = masked_shares(schedule, num_steps)
    assert shares.shape == (num_steps,) and shares[-1] == 0
    assert np.all(np.diff(shares) < 0) and np.all((shares >= 0) & (shares < 1))
    if num_steps == 2:
        half = {"linear": 1 / 2, "square": 3 / 4, "cosine": 1 / np.sqrt(2), "arccos": 2 / 3}[schedule]
        np.testing.assert_allclose(shares[0], half, rtol=1e-12)


def test_bad_schedules_are_refused():
    with pytest.raises(UserError, match="sampling schedule 'sine': known are arccos, cosine, linear, square"):
        masked_shares("sine", 4)
    with pytest.raises(UserError, match="at least 1 step, given num_steps 0"):
        masked_shares("linear", 0)


def test_two_coins_in_two_steps_of_random_order():
    """The exact teacher gives p back; in one step its coins are independent."""
    teacher, params = exact_teacher(COINS)

    def denoise(x, *, r, step, scale):
        h = teacher.net.trunk(params["net"], x, jnp.zeros(len(x)), r)
        return teacher.net.head(params["net"], h, 0, 2)

    @jax.jit
    def sample():
        steps = (1, 2)
        return [SAMPLERS["random"](num_steps=n)(denoise, jax.random.key(0), teacher.tokens, 20_000) for n in steps]

    once, twice = (np.bincount(np.asarray(ids) @ [2, 1], minlength=4) for ids in sample())
    assert stats.chisquare(once, np.full(4, 5_000)).pvalue > 1e-3
    assert stats.chisquare(twice, COINS.ravel() * 20_000).pvalue > 1e-3


def numpy_filtered(z, top_k, top_p):
    """One row in the words of the definition: the k largest with ties, then the smallest head of mass > p."""
    kept = np.ones(len(z), bool)
    if top_k:
        kept &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p:
        p = np.where(kept, np.exp(z), 0)
        p, mass = p / p.sum(), 0.0
        for i in np.argsort(-np.where(kept, z, -np.inf), kind="stable"):
            kept[i] &= mass <= top_p
            mass += p[i]
    return np.where(kept, z, -np.inf)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (3, 0.0), (0, 0.7), (5, 0.6), (99, 0.999), (1, 0.01)])
def test_filters_against_numpy(top_k, top_p):
    z = np.random.default_rng(1).normal(0, 2, (40, 12)).astype(np.float32)
    z[0, :6] = 3.0  # ties with the k-th largest stay
    filtered = filter_logits(jnp.asarray(z), top_k, top_p)
    np.testing.assert_array_equal(filtered, np.stack([numpy_filtered(row, top_k, top_p) for row in z]))


def test_drawn_ids_follow_the_tempered_softmax():
    z, temperature, n = jnp.asarray([1.0, 0.0, 3.0, -1.0]), 2.0, 20_000
    gumbel = jax.random.gumbel(jax.random.key(0), (n, 4))
    counts = np.bincount(sample_ids(jnp.broadcast_to(z, (n, 4)), gumbel, temperature=temperature), minlength=4)
    p = np.exp(np.asarray(z, np.float64) / temperature)
    assert stats.chisquare(counts, p / p.sum() * n).pvalue > 1e-3
    half = sample_ids(z.astype(jnp.bfloat16), None)
    assert half == 2 and half.dtype == jnp.int32
    assert not np.any(jax.grad(lambda z: sample_ids(z, gumbel[0]).astype(jnp.float32))(z))
