"""Mask schedules, the two ways of masking, x_init, and the named draws they are made from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dimo_jax.corruption import FILLS, SCHEDULES, bound_weight, corrupt, hybrid_init, mask_ratio
from dimo_jax.errors import UserError
from dimo_jax.nets import TokenSpec
from dimo_jax.rng import Draws

pytestmark = pytest.mark.usefixtures("little_optimization")

TOKENS = TokenSpec(length=8, codebook_size=20, mask_token=20, num_logits=20, class_tokens=(21, 5))
DRAWS = Draws(jax.random.key(0))
BATCH = 64  # one shape in all tests: less to compile
U = np.linspace(0, 1, 1001)[1:-1]

# u -> mask ratio, and |dr/du| / r, in numpy's float64.
CLOSED_FORMS = {
    "linear": (lambda u: u, lambda u: 1 / u),
    "square": (lambda u: u**2, lambda u: 2 / u),
    "cosine": (lambda u: np.cos(np.pi * u / 2), lambda u: np.pi / 2 * np.tan(np.pi * u / 2)),
    "arccos": (lambda u: np.arccos(u) * 2 / np.pi, lambda u: 1 / (np.sqrt(1 - u**2) * np.arccos(u))),
    "mage": (lambda u: MAGE.ppf(u), lambda u: 1 / (MAGE.pdf(MAGE.ppf(u)) * MAGE.ppf(u))),
}
MAGE = stats.truncnorm((0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25, loc=0.55, scale=0.25)


def test_every_schedule_has_its_closed_form():
    assert set(CLOSED_FORMS) == set(SCHEDULES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_schedule_is_its_closed_form(name):
    ratio, weight = CLOSED_FORMS[name]
    u = U.astype(np.float32)
    np.testing.assert_allclose(SCHEDULES[name](jnp.asarray(u)), ratio(u.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(bound_weight(jnp.asarray(u), name), weight(u.astype(np.float64)), rtol=2e-4)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_mask_ratio_stays_in_its_range(name):
    """At both ends of u, clamped (Meissonic) and not."""
    draws = Draws(jax.random.key(0), {"ratio": jnp.asarray([0.0, 0.5, 1.0])})
    low, high = (0.5, 1.0) if name == "mage" else (0.0, 1.0)
    ratio = np.sort(mask_ratio(draws, 3, name))
    np.testing.assert_allclose(ratio[[0, -1]], [low, high], atol=1e-6)
    assert ratio[0] >= low and ratio[-1] <= high
    clamped = np.sort(mask_ratio(draws, 3, name, (0.02, 0.98)))
    np.testing.assert_allclose(clamped[[0, -1]], [max(low, 0.02), 0.98], atol=1e-6)


def test_bound_weight_is_0_where_nothing_is_masked():
    assert bound_weight(jnp.zeros(1), "linear") == bound_weight(jnp.zeros(1), "square") == 0
    assert bound_weight(jnp.ones(1), "cosine") == bound_weight(jnp.ones(1), "arccos") == 0


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match="mask schedule 'sine': known are arccos, cosine, linear, mage, square"):
        mask_ratio(DRAWS, 2, "sine")


def test_exact_count_is_half_to_even_and_at_least_one():
    """round(L r), L the maskable positions: 0.5 -> 0 -> 1, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4, as in the released code."""
    ratio = np.resize(np.arange(17) / 16, BATCH)
    x = jnp.broadcast_to(jnp.arange(8), (BATCH, 8))
    for maskable, length in ((None, 8), (x < 2, 2)):
        x_t, masked = corrupt(DRAWS, x, jnp.asarray(ratio), 20, exact_count=True, maskable=maskable)
        np.testing.assert_array_equal(masked.sum(-1), np.maximum(np.round(ratio * length), 1))
        np.testing.assert_array_equal(x_t, np.where(masked, 20, x))
        assert maskable is None or not jnp.any(masked & ~maskable)


def test_subsets_are_uniform():
    """All 10 pairs out of 5 maskable positions, equally often."""
    maskable = jnp.broadcast_to(jnp.asarray([True, False, True, True, True, True]), (20_000, 6))
    subset = np.asarray(DRAWS.subset("masked", jnp.full(20_000, 2), maskable))
    pairs = [tuple(np.flatnonzero(row)) for row in subset]
    expected = list(itertools.combinations([0, 2, 3, 4, 5], 2))
    assert set(pairs) == set(expected)
    assert stats.chisquare([pairs.count(pair) for pair in expected]).pvalue > 1e-3


def test_independent_masking_has_its_rate():
    """Every maskable token with probability r, independently: at r = 1/2 the counts are binomial."""
    n, ratio = 4_000, np.asarray([0.0, 0.1, 0.5, 0.9, 1.0])
    maskable = jnp.broadcast_to(jnp.arange(8) != 3, (5 * n, 8))
    x = jnp.ones((5 * n, 8), jnp.int32)
    _, masked = corrupt(DRAWS, x, jnp.repeat(jnp.asarray(ratio), n), 20, exact_count=False, maskable=maskable)
    masked = np.asarray(masked).reshape(5, n, 8)
    rate = np.delete(masked, 3, axis=-1).mean(1)
    assert not masked[:, :, 3].any()
    assert np.all(np.abs(rate - ratio[:, None]) <= 4.5 * np.sqrt(ratio * (1 - ratio) / n)[:, None])
    counts = np.bincount(masked[2].sum(-1), minlength=8)
    assert stats.chisquare(counts, stats.binom.pmf(np.arange(8), 7, 0.5) * n).pvalue > 1e-3


@pytest.mark.parametrize("fill", FILLS)
def test_x_init_counts_and_fills(fill):
    x_init, is_mask = hybrid_init(DRAWS, TOKENS, BATCH, 0.6, fill=fill)
    assert x_init.dtype == jnp.int32 and np.all(is_mask.sum(-1) == 5)  # round(8 * 0.6)
    np.testing.assert_array_equal(x_init == TOKENS.mask_token, is_mask)
    seen = set(np.unique(x_init[~is_mask]))
    assert seen == {
        "random_ids": set(range(20)), "one_id": {0}, "class_token": {21}, "random_class_tokens": set(range(21, 26)),
    }[fill]  # fmt: skip


def test_x_init_keeps_what_is_given():
    maskable = jnp.broadcast_to(jnp.arange(8) >= 4, (BATCH, 8))
    given = jnp.where(maskable, TOKENS.mask_token, 7)
    x_init, is_mask = hybrid_init(DRAWS, TOKENS, BATCH, 0.5, maskable=maskable, given=given)
    assert np.all(x_init[:, :4] == 7) and np.all(is_mask.sum(-1) == 2) and not is_mask[:, :4].any()


def test_class_fills_need_class_tokens():
    for fill in ("class_token", "random_class_tokens"):
        with pytest.raises(UserError, match="needs class tokens"):
            hybrid_init(DRAWS, TOKENS._replace(class_tokens=(0, 0)), 2, 0.6, fill=fill)
    with pytest.raises(UserError, match="unknown fill of x_init 'zeros': known are class_token"):
        hybrid_init(DRAWS, TOKENS, 2, 0.6, fill="zeros")


def every_draw(draws, n=BATCH):
    """One draw of each kind."""
    maskable = jnp.ones((n, 8), bool)
    return {
        "uniform": draws.uniform("uniform", (n, 8)),
        "normal": draws.normal("normal", (n, 8)),
        "randint": draws.randint("randint", (n, 8), 0, 1000),
        "subset": draws.subset("subset", jnp.full(n, 4), maskable),
        "coins": draws.coins("coins", jnp.full(n, 0.5), maskable),
        "gumbel": draws.gumbel("gumbel", n, 0, 8, 3),
    }


def test_recorded_draws_are_used_as_given():
    fresh = every_draw(DRAWS)
    recorded = jax.tree.map(lambda a: jnp.flip(a, 0), fresh)
    replayed = every_draw(Draws(jax.random.key(5), recorded))
    for name, value in recorded.items():
        np.testing.assert_array_equal(replayed[name], value)
        assert not np.array_equal(fresh[name], value), name


@pytest.mark.parametrize("name", ["uniform", "normal", "randint", "subset", "coins"])
def test_recorded_draw_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=f"recorded draw '{name}' has the shape"):
        every_draw(Draws(jax.random.key(0), {name: jnp.zeros((BATCH, 7))}))


def test_every_scope_step_and_name_draws_its_own():
    scopes = [DRAWS, DRAWS.at_step(0), DRAWS.at_step(1), DRAWS.scope("a"), DRAWS.scope("b")]
    scopes += [DRAWS.scope("a", 0), DRAWS.scope("a", 1), DRAWS.scope("a").scope("b")]
    values = [float(draws.uniform(name, ())) for draws in scopes for name in ("a", "b", "noise", "masked", "ratio")]
    assert len(set(values)) == len(values) == 40
    again = [float(draws.uniform(name, ())) for draws in scopes for name in ("a", "b", "noise", "masked", "ratio")]
    assert values == again


def test_scope_index_leads_recorded_arrays():
    recorded = {"pass": {"u": jnp.arange(6.0).reshape(3, 2)}}
    np.testing.assert_array_equal(Draws(jax.random.key(0), recorded).scope("pass", 1).uniform("u", (2,)), [2, 3])


def test_gumbel_noise_of_a_position_depends_on_the_position_alone():
    whole = DRAWS.gumbel("gumbel", BATCH, 0, 8, 3)
    np.testing.assert_array_equal(DRAWS.gumbel("gumbel", BATCH, 2, 8, 3)[:, :6], whole[:, 2:])
    assert stats.kstest(np.ravel(whole), stats.gumbel_r.cdf).pvalue > 1e-3
