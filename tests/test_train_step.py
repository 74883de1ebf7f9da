"""train_step and pretrain_step: updates that are not finite, and two routes to one result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import ACTS, BATCH, OPTIM, batch_of, changed, conditions, distilled, optimizer, poisoned, pretrained, weights
from toys import ledger_teacher

from dimo_jax import dimo, dimo_state, mdm
from dimo_jax.errors import UserError
from dimo_jax.mdm import PretrainSpec
from dimo_jax.rng import Draws
from dimo_jax.spec import DimoSpec

pytestmark = pytest.mark.usefixtures("little_optimization")


# Updates that are not finite.


def poison(*networks: str):
    """Batches whose first one has a condition that is not a number."""

    def batch(n, spec):
        return {k: poisoned(v) if n == 0 and k in networks else v for k, v in batch_of(n, spec).items()}

    return batch


@pytest.mark.parametrize("bad", ["generator", "auxiliary"])
def test_skip_leaves_a_network_as_it_was_and_counts(bad):
    first, last = distilled(DimoSpec(nonfinite="skip"), batch=poison(bad))
    start = dimo_state.init_dimo(
        ledger_teacher()[1]["net"], DimoSpec(), dict.fromkeys(("generator", "auxiliary"), optimizer(OPTIM))
    )
    for one, two in zip(*map(jax.tree.leaves, (getattr(first, bad), getattr(start, bad))), strict=True):
        np.testing.assert_array_equal(one, two)
    good = ({"generator", "auxiliary"} - {bad}).pop()
    assert good in changed(weights(first), weights(start))
    assert all(np.isfinite(value) for value in jax.tree.leaves(first.metrics))
    assert bad in changed(weights(last), weights(first))
    assert int(first.skipped) == int(last.skipped) == 1 and bool(last.finite)


@pytest.mark.parametrize("bad", ["generator", "auxiliary"])
def test_stop_clears_the_flag_for_good(bad):
    for state in distilled(DimoSpec(), batch=poison(bad)):
        assert not bool(state.finite) and int(state.skipped) == 0


def test_pretraining_skips_and_counts_or_clears_the_flag():
    (first, metrics), (last, _) = pretrained(PretrainSpec(nonfinite="skip"), bad_step=0)
    start = mdm.init_pretrain(ledger_teacher()[1]["net"], optimizer(OPTIM))
    for one, two in zip(*map(jax.tree.leaves, (first.net, start.net)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert all(np.isfinite(value) for value in metrics.values())  # the loop stops on any that is not
    assert int(metrics["skipped"]) == int(last.skipped) == 1 and bool(last.finite)
    assert changed({"net": jax.device_get(last.net.params)}, {"net": jax.device_get(start.net.params)})
    assert not any(bool(state.finite) for state, _ in pretrained(PretrainSpec(), bad_step=0))


# Two routes to one result.


def recorded_draws(num_microbatches: int) -> tuple[dict, callable]:
    """(draws, batches) of one batch in equal parts. Every sample masks two tokens, so that parts weigh the same."""
    rng = np.random.default_rng(0)

    def masks():
        return np.argsort(rng.random((BATCH, 3)), -1) < 2

    def draws():
        return {
            "x_init": {"fill": rng.integers(0, 3, (BATCH, 3)), "masked": masks()},
            "noise": rng.normal(size=(BATCH, 3, 6)).astype(np.float32),
            "tokens": rng.gumbel(size=(BATCH, 3, 3)).astype(np.float32),
            "x_t": {"ratio": rng.random(BATCH).astype(np.float32), "masked": masks()},
        }

    def split(tree, *lead):
        return jax.tree.map(lambda a: jnp.asarray(a).reshape(*lead, num_microbatches, -1, *a.shape[1:]), tree)

    recorded = {"generator": {"microbatch": split(draws())}, "auxiliary": {"microbatch": split(draws(), 1)}}

    def batch(n, spec):
        whole = conditions(n, BATCH)
        return {"generator": split(whole), "auxiliary": split(whole, 1)}

    return recorded, batch


@pytest.mark.parametrize("resample", [True, False])
def test_two_microbatches_are_one_batch_of_both(resample):
    spec = DimoSpec(dropout=False, teacher_dropout=False, resample=resample)
    one, two = (
        weights(distilled(spec, batch=batch, recorded=recorded)[-1])
        for recorded, batch in (recorded_draws(1), recorded_draws(2))
    )
    assert changed(one, two, by=ACTS) == set()


def test_share_x_t_takes_reused_samples_and_one_update_of_each():
    DimoSpec(share_x_t=True, resample=False)
    for fields in (
        {"resample": True},
        {"num_auxiliary_updates": 2},
        {"generator_every": 2},
        {"auxiliary_cfg_scale": 2.0},
        {"auxiliary_mask_schedule": "linear"},
    ):
        with pytest.raises(UserError, match="share_x_t"):
            DimoSpec(share_x_t=True, **{"resample": False, **fields})


def trunk_calls(spec: DimoSpec) -> int:
    """How many forward passes of a trunk one step holds."""
    calls = []
    teacher, params = ledger_teacher()

    def trunk(*args, **kwargs):
        calls.append(args)
        return teacher.net.trunk(*args, **kwargs)

    counting = teacher._replace(net=teacher.net._replace(trunk=trunk))
    static = dict.fromkeys(("generator", "auxiliary"), optimizer(OPTIM))
    step = functools.partial(dimo.train_step, teacher=counting, spec=spec, optimizers=static)
    jax.eval_shape(
        step, dimo_state.init_dimo(params["net"], spec, static), params, batch_of(0, spec), Draws(jax.random.key(0))
    )
    return len(calls)


def test_share_x_t_saves_a_forward_pass():
    # theta at x_init, phi and psi at x_t, psi at its own x_t; fresh samples cost one more of theta
    assert trunk_calls(DimoSpec(resample=False, share_x_t=True)) == 3
    assert trunk_calls(DimoSpec(resample=False)) == 4
    assert trunk_calls(DimoSpec()) == 5
