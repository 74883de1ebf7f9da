"""The mathematics of the masking process on an enumerable chain: three tokens, three symbols, exact conditionals.

Every law is computed by enumeration in numpy's float64 and compared with what the package computes or draws.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import exact_table, exact_teacher

from dimo_jax.categorical import sample_ids
from dimo_jax.corruption import SCHEDULES, corrupt
from dimo_jax.mdm import PretrainSpec, masked_losses
from dimo_jax.rng import Draws
from dimo_jax.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("little_optimization")

L, V, M = 3, 3, 3  # tokens, symbols, the mask token
STATES = list(itertools.product(range(V + 1), repeat=L))
WORDS = [x for x in STATES if M not in x]
PATTERNS = list(itertools.product([False, True], repeat=L))  # where [M] is
TENSOR = np.exp(1.5 * np.random.default_rng(0).normal(size=(V,) * L))
JOINT = TENSOR / TENSOR.sum()
CONDITIONALS = np.exp(exact_table(JOINT)).reshape(*(V + 1,) * L, L, V)
TEACHER, PARAMS = exact_teacher(JOINT)
ALL_MASKED = {(M,) * L: 1.0}
JOINT_LAW = {x: JOINT[x] for x in WORDS}
NUM_SAMPLES = 50_000


def logits_of(x):
    """The teacher's logits [N, L, V] at states x [N, L]."""
    h = TEACHER.net.trunk(PARAMS["net"], x, jnp.zeros(len(x)), 0.0)
    return TEACHER.net.head(PARAMS["net"], h, 0, L)


def index(x):
    """The place of states x [..., L] in STATES."""
    return np.asarray(x) @ (V + 1) ** np.arange(L)[::-1]


def law_of(samples):
    """Relative frequencies [states] of samples [N, L]."""
    return np.bincount(index(samples), minlength=len(STATES)) / len(samples)


def as_vector(law):
    return np.asarray([law.get(x, 0.0) for x in STATES])


def total_variation(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).sum() / 2


def completions(x):
    """Every way to fill the masked tokens of x, each drawn from its own conditional given the known ones: (x_0, p)."""
    masked = [i for i in range(L) if x[i] == M]
    for symbols in itertools.product(range(V), repeat=len(masked)):
        x_0 = list(x)
        for i, v in zip(masked, symbols, strict=True):
            x_0[i] = v
        yield tuple(x_0), np.prod([CONDITIONALS[x][i, x_0[i]] for i in masked])


def advance(law, kernel):
    """sum_x law(x) kernel(x) as a dict; kernel(x) yields (y, p)."""
    new = {}
    for x, p in law.items():
        for y, q in kernel(x):
            new[y] = new.get(y, 0.0) + p * q
    return new


def test_the_table_is_exact():
    """All three tokens, one at a time in any order, have the joint's probability."""
    for order in itertools.permutations(range(L)):
        for x in WORDS:
            known, p = [M] * L, 1.0
            for i in order:
                p *= CONDITIONALS[tuple(known)][i, x[i]]
                known[i] = x[i]
            np.testing.assert_allclose(p, JOINT[x], rtol=1e-12)


def posterior(draws, x_t, x_0, ratio):
    """x_s ~ q(x_s | x_t, x_0) for ratio = r_s / r_t: `corrupt` of x_0 restricted to the masked positions of x_t."""
    unknown = x_t == M
    return corrupt(draws, jnp.where(unknown, x_0, x_t), ratio, M, exact_count=False, maskable=unknown)[0]


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0): [M] stays with probability r_s / r_t."""
    r_s, r_t, x_0 = 0.3, 0.7, np.asarray([2, 0, 1])
    beta = (r_t - r_s) / (1 - r_s)  # what is shown at s is masked at t

    def forward(ratio, start, end):
        return np.prod([float(t) if s else (ratio if t else 1 - ratio) for s, t in zip(start, end, strict=True)])

    marginal_s, marginal_t = (np.asarray([forward(r, (False,) * L, x) for x in PATTERNS]) for r in (r_s, r_t))
    joint = marginal_s[:, None] * np.asarray([[forward(beta, x_s, x_t) for x_t in PATTERNS] for x_s in PATTERNS])
    np.testing.assert_allclose(joint.sum(0), marginal_t, rtol=1e-12)  # one Markov chain has both marginals
    bayes = (joint / marginal_t).T  # [t, s]

    x_t = np.where(PATTERNS, M, x_0)
    tiled = jnp.repeat(jnp.asarray(x_t), NUM_SAMPLES, axis=0)
    x_s = np.asarray(posterior(Draws(jax.random.key(0)), tiled, jnp.asarray(x_0), r_s / r_t))
    for samples, expected in zip(x_s.reshape(len(PATTERNS), NUM_SAMPLES, L), bayes, strict=True):
        law = law_of(samples)
        assert total_variation(law[index(x_t)], expected) < 0.02
        np.testing.assert_allclose(law[index(x_t)].sum(), 1)  # a token is [M] or x_0's


def test_corrupt_has_the_marginal():
    """q(x_t | x_0) of Eq. 1, and of the exact count: any of the subsets of size round(L r)."""
    x_0 = jnp.broadcast_to(jnp.asarray([2, 0, 1]), (NUM_SAMPLES, L))
    num_masked = np.sum(PATTERNS, -1)
    for exact_count, expected in ((False, 0.6**num_masked * 0.4 ** (L - num_masked)), (True, (num_masked == 2) / 3)):
        x_t, _ = corrupt(Draws(jax.random.key(0)), x_0, 0.6, M, exact_count=exact_count)
        assert total_variation(law_of(x_t)[index(np.where(PATTERNS, M, [2, 0, 1]))], expected) < 0.02


def ancestral_law(ratios):
    """Law after the steps from ratio to ratio, starting from all masked at 1: x_0 from the conditionals, posterior."""

    def kernel(x, stay):
        masked = [i for i in range(L) if x[i] == M]
        for x_0, p in completions(x):
            for pattern in itertools.product([False, True], repeat=len(masked)):
                y = list(x_0)
                for i, stays in zip(masked, pattern, strict=True):
                    y[i] = M if stays else x_0[i]
                yield tuple(y), p * np.prod([stay if stays else 1 - stay for stays in pattern])

    law = ALL_MASKED
    for before, after in itertools.pairwise((1.0, *ratios)):
        law = advance(law, lambda x, stay=after / before: kernel(x, stay))
    return law


def test_ancestral_law():
    """Sampled with the package's parts it is the enumerated law, which tends to the joint as steps get small."""
    num_steps = 3
    ratios = 1 - np.arange(1, num_steps + 1) / num_steps

    @jax.jit
    def sample():
        x, draws = jnp.full((NUM_SAMPLES, L), M), Draws(jax.random.key(0))
        for i, (before, after) in enumerate(itertools.pairwise((1.0, *ratios))):
            z = logits_of(x)
            x_0 = sample_ids(z, draws.scope("step", i).gumbel("tokens", *z.shape[:1], 0, *z.shape[1:]))
            x = posterior(draws.scope("step", i), x, x_0, after / before)
        return x

    assert total_variation(law_of(sample()), as_vector(ancestral_law(ratios))) < 0.02
    errors = [
        total_variation(as_vector(ancestral_law(1 - np.arange(1, n + 1) / n)), as_vector(JOINT_LAW))
        for n in (1, 2, 4, 16, 64)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2 and errors[-1] < 0.01


def reveal_law(counts, most_confident):
    """Law of revealing `counts` tokens step by step: the most probable of those drawn, or any subset alike."""

    def kernel(x, count):
        masked = [i for i in range(L) if x[i] == M]
        for x_0, p in completions(x):
            subsets = list(itertools.combinations(masked, count))
            if most_confident:
                ranked = sorted(masked, key=lambda i, x_0=x_0: -CONDITIONALS[x][i, x_0[i]])
                subsets = [ranked[:count]]
            for shown in subsets:
                yield tuple(x_0[i] if i in shown else x[i] for i in range(L)), p / len(subsets)

    law = ALL_MASKED
    for count in counts:
        law = advance(law, lambda x, count=count: kernel(x, count))
    return law


COUNTS = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}  # tokens revealed in each of K steps, linear schedule


@pytest.fixture(scope="module")
def sampled():
    """Law of each sampler at each number of steps, from samples."""

    def denoise(x, *, r, step, scale):
        return logits_of(x)

    samplers = {
        (name, num_steps): SAMPLERS[name](num_steps=num_steps, schedule="linear", **options)
        for name, options in (("random", {}), ("confidence", {"choice_temperature": 0.0}))
        for num_steps in COUNTS
    }

    @jax.jit
    def run():
        return {k: s(denoise, jax.random.key(0), TEACHER.tokens, NUM_SAMPLES) for k, s in samplers.items()}

    return {key: law_of(ids) for key, ids in run().items()}


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("name", ["random", "confidence"])
def test_law_of_samplers(sampled, name, num_steps):
    expected = as_vector(reveal_law(COUNTS[num_steps], most_confident=name == "confidence"))
    assert total_variation(sampled[name, num_steps], expected) < 0.02


def test_one_token_at_a_time_in_random_order_is_the_joint(sampled):
    """Exactly so for random order; one step draws from the product of the marginals; confidence is biased."""
    joint = as_vector(JOINT_LAW)
    np.testing.assert_allclose(as_vector(reveal_law(COUNTS[3], False)), joint, rtol=1e-12)
    assert total_variation(sampled["random", 3], joint) < 0.02
    marginals = [JOINT.sum(axis=tuple(j for j in range(L) if j != i)) for i in range(L)]
    product = as_vector({x: np.prod([m[v] for m, v in zip(marginals, x, strict=True)]) for x in WORDS})
    assert total_variation(sampled["random", 1], product) < 0.02
    assert (
        total_variation(sampled["random", 1], joint) > 0.2 and total_variation(sampled["confidence", 3], joint) > 0.05
    )


ENTROPY = -np.sum(JOINT * np.log(JOINT))
BOUND_SCHEDULES = sorted(set(SCHEDULES) - {"mage"})  # mage never goes below 1/2: its sum bounds nothing


def losses(schedule, x, draws):
    return masked_losses(
        TEACHER.net, PARAMS["net"], TEACHER.tokens, x, jnp.zeros(len(x)), PretrainSpec(mask_schedule=schedule), draws
    )


def test_bound_weights_are_beta_integrals():
    """The integral of (1/t) t^k (1 - t)^(L - k) over t is (k - 1)! (L - k)! / L!: the bound of exact conditionals is
    the mean over orders of the chain rule, and so the entropy."""
    weight = {1: 2 / 6, 2: 1 / 6, 3: 2 / 6}
    bound = 0.0
    for x_0 in WORDS:
        for pattern in PATTERNS[1:]:
            nll = -np.log(CONDITIONALS[tuple(np.where(pattern, M, x_0))][np.arange(L), x_0])
            bound += JOINT[x_0] * weight[sum(pattern)] * np.sum(nll[list(pattern)])
    np.testing.assert_allclose(bound, ENTROPY, rtol=1e-12)


@pytest.mark.parametrize("schedule", BOUND_SCHEDULES)
def test_bound_is_the_entropy_by_enumeration(schedule):
    """`masked_losses` itself, over all words, all masks and a quadrature of u: E[bound] = H(p) for any schedule."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    v = (nodes + 1) / 2  # u = cos(pi v / 2): takes away the singularity of arccos at u = 1
    u, du = np.cos(np.pi * v / 2), weights / 2 * np.pi / 2 * np.sin(np.pi * v / 2)

    @jax.jit
    @jax.vmap
    def bound(u, masked, x):  # of one sample
        return losses(schedule, x[None], Draws(jax.random.key(0), {"ratio": u[None], "masked": masked[None]}))["bound"]

    grid = list(itertools.product(range(len(u)), range(len(PATTERNS)), range(len(WORDS))))
    i, j, k = np.asarray(grid).T
    values = np.asarray(bound(jnp.asarray(u, jnp.float32)[i], jnp.asarray(PATTERNS)[j], jnp.asarray(WORDS)[k]))
    r, num_masked = np.asarray(SCHEDULES[schedule](u), np.float64)[i], np.sum(PATTERNS, -1)[j]
    p = np.asarray([JOINT[x] for x in WORDS])[k]
    expected = np.sum(du[i] * p * r**num_masked * (1 - r) ** (L - num_masked) * values)
    np.testing.assert_allclose(expected, ENTROPY, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "arccos", "cosine"])
def test_bound_by_sampling(schedule):
    """Mean of `masked_losses`' bound over its own draws: within three standard errors, themselves below 2 %."""
    num_batches, batch = 200, 2_000
    rng = np.random.default_rng(0)
    x = np.asarray(WORDS)[rng.choice(len(WORDS), (num_batches, batch), p=JOINT.ravel())]

    @jax.jit
    def run(x):
        draws = Draws(jax.random.key(0))
        return jax.lax.map(lambda item: losses(schedule, item[1], draws.scope("batch", item[0]))["bound"],
                           (jnp.arange(num_batches), x))  # fmt: skip

    values = np.asarray(run(jnp.asarray(x)), np.float64)
    error = values.std() / np.sqrt(num_batches)
    assert error < 0.02 * ENTROPY and abs(values.mean() - ENTROPY) < 3 * error
