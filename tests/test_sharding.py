"""One device, eight by data, and parameters split three ways: the same losses and gradients."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, digits
from dimo_jax import dimo, dimo_state, mdm, sharding
from dimo_jax.errors import UserError
from dimo_jax.nets import Conditions
from dimo_jax.registry import make
from dimo_jax.rng import Draws
from dimo_jax.run_config import from_dict
from dimo_jax.tasks import make_optimizer
from dimo_jax.teachers import TEACHERS

MESHES = ({"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
RULES = common.base_config().sharding.to_dict()


def steps():
    """Name -> (step, init, teacher's parameters, batch, axis that each entry is split along), of the tiny config."""
    config = from_dict(digits.get_config("tiny").to_dict())
    teacher = make(TEACHERS, config.teacher, "teacher")
    params = teacher.init(jax.random.key(0))
    labels = np.arange(8, dtype=np.int32)
    optimizer = make_optimizer(config.pretrain.optimizer, 10)
    step = functools.partial(mdm.pretrain_step, teacher=teacher, spec=config.pretrain.spec, optimizer=optimizer)
    batch = {"ids": np.arange(8 * 64, dtype=np.int32).reshape(8, 64) % 17, "conditions": Conditions(labels)}
    yield "pretrain", step, lambda: mdm.init_pretrain(params["net"], optimizer), {}, batch, 0, teacher
    optimizers = dict.fromkeys(("generator", "auxiliary"), optimizer)
    spec = config.distill.spec
    step = functools.partial(dimo.train_step, teacher=teacher, spec=spec, optimizers=optimizers)
    batch = {"generator": Conditions(labels[None])}

    def init():
        """psi away from phi: where they are equal the generator's gradient is rounding noise."""
        state = dimo_state.init_dimo(params["net"], spec, optimizers)
        psi = teacher.init(jax.random.key(2))["net"]
        return state._replace(auxiliary=state.auxiliary._replace(params=psi))

    yield "distill", step, init, params, batch, 1, teacher


def first_steps() -> dict:
    """Metrics of two steps, and the first moments after the first (a tenth of its gradient), on every mesh."""
    results = {}
    for name, step, init, params, batch, axis, teacher in steps():
        for axes in MESHES:
            mesh = sharding.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
            place = functools.partial(
                sharding.tree_shardings, mesh=mesh, logical_axes=teacher.logical_axes, rules=RULES
            )
            shardings = place(jax.eval_shape(init))[0]
            inputs = (shardings, place(params)[0], sharding.batch_sharding(mesh, axis), sharding.replicated(mesh))
            jitted = jax.jit(step, in_shardings=inputs, out_shardings=(shardings, sharding.replicated(mesh)))
            state, draws = jax.jit(init, out_shardings=shardings)(), Draws(jax.random.key(1))
            state, first = jitted(state, params, batch, draws)
            moments = {
                sharding.path_of(path): np.asarray(leaf).ravel().tolist()
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
                if "/mu/" in sharding.path_of(path)
            }
            state, second = jitted(state, params, batch, draws)
            metrics = [{key: float(value) for key, value in values.items()} for values in (first, second)]
            results[f"{name} {json.dumps(axes)}"] = {"metrics": metrics, "moments": moments}
            assert jitted._cache_size() == 1
    return results


@pytest.fixture(scope="module")
def results():
    here = os.path.dirname(__file__)
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]),
    }
    program = "import json, test_sharding; print(json.dumps(test_sharding.first_steps()))"
    run = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("axes", MESHES[1:], ids=json.dumps)
@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_losses_and_first_gradients_do_not_depend_on_the_mesh(results, name, axes):
    one, many = results[f"{name} {json.dumps(MESHES[0])}"], results[f"{name} {json.dumps(axes)}"]
    for mine, theirs in zip(one["metrics"], many["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_allclose(theirs[key], mine[key], rtol=1e-5, atol=1e-7, err_msg=key)
    assert one["moments"].keys() == many["moments"].keys() and len(one["moments"]) > 10
    for path, moment in one["moments"].items():
        scale = np.abs(moment).max()
        np.testing.assert_allclose(many["moments"][path], moment, rtol=1e-5, atol=1e-5 * scale + 1e-9, err_msg=path)


def test_an_uncovered_parameter_is_refused_by_name():
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(UserError, match="net/stray"):
        sharding.tree_shardings({"net": {"stray": jnp.zeros(3)}}, mesh, ((r"^known$", (None,)),), {})


def test_an_axis_that_does_not_divide_is_kept_whole_with_a_notice():
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
    tree = {"a": jax.ShapeDtypeStruct((4, 3), jnp.float32), "b": jax.ShapeDtypeStruct((4, 257), jnp.float32)}
    axes = ((r"^[ab]$", ("x", "y")),)
    shardings, notices = sharding.tree_shardings(tree, mesh, axes, {"x": "fsdp", "y": "fsdp"} | {"x": None})
    assert shardings["a"].spec == shardings["b"].spec == jax.sharding.PartitionSpec(None, None)
    assert len(notices) == 2 and "257" in notices[1]


def test_moments_are_split_like_their_parameter():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    leaf = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
    tree = {
        "params": {"blocks": {"fc1": {"kernel": leaf}}},
        "opt_state": [{"mu": {"blocks": {"fc1": {"kernel": leaf}}}}],
    }
    axes = ((r"^blocks/.*fc1/kernel$", ("layers", "embed", "hidden")),)
    shardings, notices = sharding.tree_shardings(tree, mesh, axes, RULES)
    specs = {s.spec for s in jax.tree.leaves(shardings)}
    assert specs == {jax.sharding.PartitionSpec(None, "fsdp", "tensor")} and not notices


def test_batches_and_meshes_that_do_not_fit_are_refused():
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    sharding.check_batch(3, mesh)
    with pytest.raises(UserError, match="batch_size 6 does not divide over 4 devices"):
        sharding.check_batch(6, jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor")))
    with pytest.raises(UserError, match="does not fit"):
        sharding.make_mesh({"data": 3}, jax.devices()[:1])
    with pytest.raises(UserError, match="unknown mesh axes"):
        sharding.make_mesh({"rows": 1}, jax.devices()[:1])
