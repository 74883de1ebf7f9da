"""Text needs no other step: a prefix that is kept, and an order of reading, come with the conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import OPTIM, optimizer
from toys import text_teacher

from dimo_jax import dimo, dimo_state, mdm
from dimo_jax.nets import Conditions, logits
from dimo_jax.rng import Draws
from dimo_jax.samplers import SAMPLERS
from dimo_jax.spec import DimoSpec

pytestmark = pytest.mark.usefixtures("little_optimization")
BATCH, LENGTH, SIZE, WIDTH = 4, 8, 5, 4
PREFIXES = np.array([2, 3, 2, 4])  # how many tokens each line begins with; its first two are nobody's to change
MASKABLE = np.arange(LENGTH) >= PREFIXES[:, None]
BLOCK = np.arange(LENGTH) // 2
CAUSAL = BLOCK[:, None] >= BLOCK[None, :]  # a token sees its own block of two, and the blocks before
GIVEN = np.random.default_rng(0).integers(0, SIZE, (BATCH, LENGTH)).astype(np.int32)
RAW = np.random.default_rng(1).normal(size=(BATCH, WIDTH)).astype(np.float32)


def step_on(attn_mask, given=GIVEN, resample=True, spy=lambda x, attn_mask: None):
    """-> (state before, state after) two steps of the real train_step; `spy` sees the input of every forward pass."""
    teacher, params = text_teacher(LENGTH, SIZE, WIDTH)

    def trunk(params, x, *args, attn_mask=None, **kwargs):
        spy(np.asarray(x), attn_mask)
        return teacher.net.trunk(params, x, *args, attn_mask=attn_mask, **kwargs)

    spied = teacher._replace(net=teacher.net._replace(trunk=trunk))
    spec, static = DimoSpec(resample=resample), dict.fromkeys(("generator", "auxiliary"), optimizer(OPTIM))
    conditions = jax.tree.map(lambda a: jnp.asarray(a)[None], Conditions(RAW, given, MASKABLE, attn_mask))
    batch = {"generator": conditions, "auxiliary": jax.tree.map(lambda a: a[None], conditions)}
    start = state = dimo_state.init_dimo(params["net"], spec, static)
    for _ in range(2):
        state, _ = dimo.train_step(
            state, params, batch, Draws(jax.random.key(0)), teacher=spied, spec=spec, optimizers=static
        )
    return start, state


def same(one, two) -> bool:
    return all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


@pytest.mark.parametrize("resample", [True, False])
def test_the_prefix_is_never_changed_masked_or_trained_on(resample):
    seen = []
    start, state = step_on(CAUSAL, resample=resample, spy=lambda x, mask: seen.append((x, mask)))
    assert bool(state.finite) and len(seen) >= 8
    for x, mask in seen:
        copies = len(x) // BATCH  # guidance runs conditional and unconditional as one batch
        np.testing.assert_array_equal(x[np.tile(~MASKABLE, (copies, 1))], np.tile(GIVEN[~MASKABLE], copies))
        assert mask is not None
    assert any((x[:BATCH][MASKABLE] != GIVEN[MASKABLE]).any() for x, _ in seen)
    for name in ("generator", "auxiliary"):
        moved = (getattr(state, name).params["bias"] != getattr(start, name).params["bias"]).any(-1)
        np.testing.assert_array_equal(moved, MASKABLE.any(0))


@pytest.mark.parametrize("shape", [(LENGTH, LENGTH), (1, LENGTH, LENGTH), (BATCH, LENGTH, LENGTH)], ids=str)
def test_the_attention_mask_is_honoured_in_every_forward_pass(shape):
    hidden = CAUSAL.copy()
    hidden[:, 1] = np.arange(LENGTH) == 1  # only the prefix's second token sees itself, and it is not trained on
    other = GIVEN.copy()
    other[:, 1] = (GIVEN[:, 1] + 1) % SIZE
    mask = np.broadcast_to(hidden, shape)
    _, state = step_on(mask)
    assert same(state, step_on(mask, given=other)[1])
    assert same(state, step_on(np.broadcast_to(hidden, (BATCH, LENGTH, LENGTH)))[1])
    assert not same(state, step_on(np.broadcast_to(CAUSAL, shape), given=other)[1])


def test_a_token_sees_its_block_and_those_before():
    teacher, params = text_teacher(LENGTH, SIZE, WIDTH)

    def run(ids):
        return np.asarray(logits(teacher.net, params["net"], jnp.asarray(ids), RAW, jnp.zeros(BATCH), attn_mask=CAUSAL))

    other = GIVEN.copy()
    other[:, 4] = (GIVEN[:, 4] + 1) % SIZE
    changed = (run(GIVEN) != run(other)).any(-1)
    np.testing.assert_array_equal(changed, np.broadcast_to(BLOCK >= 2, (BATCH, LENGTH)))


def test_pretraining_takes_prefix_and_mask():
    teacher, params = text_teacher(LENGTH, SIZE, WIDTH)
    static, draws = optimizer(OPTIM), Draws(jax.random.key(0))
    for loss_on in ("masked", "all"):
        start = mdm.init_pretrain(params["net"], static)
        batch = {"ids": jnp.asarray(GIVEN), "conditions": Conditions(RAW, GIVEN, MASKABLE, CAUSAL)}
        spec = mdm.PretrainSpec(loss_on=loss_on)
        state, _ = mdm.pretrain_step(start, {}, batch, draws, teacher=teacher, spec=spec, optimizer=static)
        moved = (state.net.params["bias"] != start.net.params["bias"]).any(-1)
        np.testing.assert_array_equal(moved, MASKABLE.any(0))


def test_samplers_keep_the_prefix():
    teacher, params = text_teacher(LENGTH, SIZE, WIDTH)

    def denoise(x, *, r, step, scale, sigma=0.0, noise=None):
        return logits(teacher.net, params["net"], x, RAW, r, attn_mask=CAUSAL)

    given = jnp.where(MASKABLE, teacher.tokens.mask_token, GIVEN)
    for name in SAMPLERS:
        ids = np.asarray(SAMPLERS[name]()(denoise, jax.random.key(0), teacher.tokens, BATCH, given))
        np.testing.assert_array_equal(ids[~MASKABLE], GIVEN[~MASKABLE])
        assert (ids < SIZE).all()


def test_a_gradient_flows_to_soft_tokens_through_features():
    teacher, params = text_teacher(LENGTH, SIZE, WIDTH)
    soft = jax.nn.one_hot(GIVEN, SIZE + 1)

    def features(x):
        return teacher.net.features(params["net"], x, RAW, jnp.zeros(BATCH), attn_mask=CAUSAL)[0]

    np.testing.assert_allclose(features(soft), features(jnp.asarray(GIVEN)), atol=1e-5)
    late = jax.grad(lambda x: jnp.sum(features(x)[:, 4] ** 2))(soft)  # what the fifth token's features depend on
    assert late.shape == (BATCH, LENGTH, SIZE + 1)
    np.testing.assert_array_equal((late != 0).any(-1), np.broadcast_to(BLOCK <= 2, (BATCH, LENGTH)))
