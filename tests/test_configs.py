"""Every config builds and its steps trace; what a config cannot mean dies with its own name and the known ones."""

import functools
import importlib
from pathlib import Path

import jax
import pytest

from dimo_jax import data, dimo, dimo_state, mdm, tasks
from dimo_jax.errors import UserError
from dimo_jax.nets import Conditions
from dimo_jax.registry import make
from dimo_jax.rng import Draws
from dimo_jax.run_config import from_dict
from dimo_jax.sample import make_sampling
from dimo_jax.teachers import TEACHERS

FILES = [path.stem for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))]
MODULES = {name: importlib.import_module(f"configs.{name}") for name in FILES if name not in ("__init__", "common")}
CONFIGS = [(name, preset) for name, module in MODULES.items() for preset in module.PRESETS]


def config_of(name: str = "digits", preset: str = "tiny") -> dict:
    return MODULES[name].get_config(preset).to_dict()


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def arrays(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(step, state, *arguments):
    """The step keeps the state's shapes, so that it can be donated, and its metrics are scalars."""
    new, metrics = jax.eval_shape(step, state, *arguments)
    assert shapes(new) == shapes(state)
    assert all(value.shape == () for value in metrics.values())
    return metrics


@pytest.mark.parametrize("name, preset", CONFIGS)
def test_builds_and_its_steps_trace(name, preset):
    config = from_dict(config_of(name, preset))
    teacher = make(TEACHERS, config.teacher, "teacher")
    params = jax.eval_shape(teacher.init, jax.random.key(0))
    draws = jax.eval_shape(lambda: Draws(jax.random.key(0)))

    def conditions(*shape):
        return Conditions(jax.eval_shape(lambda: teacher.conditions(0, 0, shape)))

    stage = config.pretrain
    optimizer = tasks.make_optimizer(stage.optimizer, stage.num_steps)
    state = jax.eval_shape(lambda net: mdm.init_pretrain(net, optimizer), params["net"])
    ids = arrays("int32", stage.batch_size, teacher.tokens.length)
    step = functools.partial(mdm.pretrain_step, teacher=teacher, spec=stage.spec, optimizer=optimizer)
    metrics = trace(step, state, {}, {"ids": ids, "conditions": conditions(stage.batch_size)}, draws)
    assert set(metrics) == {*mdm.METRICS, "skipped"}

    stage = config.distill
    optimizers = {
        net: tasks.make_optimizer(getattr(stage, f"{net}_optimizer"), stage.num_steps)
        for net in ("generator", "auxiliary")
    }
    state = jax.eval_shape(lambda net: dimo_state.init_dimo(net, stage.spec, optimizers), params["net"])
    microbatches = (stage.accumulation, stage.batch_size)
    batch = {
        "generator": conditions(*microbatches),
        "auxiliary": conditions(stage.spec.num_auxiliary_updates, *microbatches),
    }
    step = functools.partial(dimo.train_step, teacher=teacher, spec=stage.spec, optimizers=optimizers)
    assert "generator/divergence" in trace(step, state, params, batch, draws)

    raw = conditions(10).raw
    for sampler in (stage.sampler, config.sample.sampler, *(row["sampler"] for row in config.evaluate.rows)):
        sampling = make_sampling(teacher, sampler)
        ids = jax.eval_shape(sampling, params, params["net"], raw, jax.eval_shape(lambda: jax.random.key(0)))
        assert ids.shape == (10, teacher.tokens.length)
    assert config.data["name"] in data.DATASETS and set(config.stages) <= set(tasks.TASKS)


def flipped(path: str, value) -> dict:
    """The tiny config with one key changed, or added."""
    config = config_of()
    *parents, last = path.split(".")
    functools.reduce(dict.__getitem__, parents, config)[last] = value
    return config


PLACES = [
    "", "logging.", "pretrain.", "pretrain.spec.", "pretrain.optimizer.", "distill.", "distill.spec.",
    "distill.generator_optimizer.", "distill.auxiliary_optimizer.", "evaluate.", "sample.",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_named_with_its_place_and_the_known_ones(place):
    with pytest.raises(UserError, match=rf"unknown config key config\.{place}nope: known are \w+, \w+"):
        from_dict(flipped(f"{place}nope", 1))


@pytest.mark.parametrize("key", ["seed", "distill", "pretrain.num_steps", "distill.generator_optimizer"])
def test_a_missing_key_is_named(key):
    config = config_of()
    *parents, last = key.split(".")
    del functools.reduce(dict.__getitem__, parents, config)[last]
    with pytest.raises(UserError, match=f"the config lacks config.{key}"):
        from_dict(config)


UNKNOWN = [
    ("distill.spec.divergence", "nope", "unknown divergence 'nope': known are alpha, forward_kl, jeffreys"),
    ("distill.spec.divergence", {"name": "jeffreys", "gamma": 1}, "divergence 'jeffreys' does not take the arguments"),
    ("distill.spec.divergence", {"name": "alpha", "alpha": 2}, "alpha divergence takes 0 < alpha < 1, given 2"),
    ("distill.spec.mask_schedule", "nope", "unknown mask_schedule 'nope': known are arccos, cosine, linear"),
    ("distill.spec.auxiliary_mask_schedule", "nope", "unknown auxiliary_mask_schedule 'nope': known are arccos"),
    ("distill.spec.fill", "nope", "unknown fill 'nope': known are class_token, one_id"),
    ("distill.spec.sigma_schedule", "nope", "unknown sigma_schedule 'nope': known are cos, exp, fix, linear"),
    ("distill.spec.frozen", ("^nope$",), "match no parameter: the parameters are bias, blocks"),
    ("distill.spec.num_chunks", 7, "num_chunks 7 does not divide the 64 tokens"),
    ("distill.generator_optimizer.name", "nope", "unknown optimiser name 'nope': known are adam, adamw"),
    ("distill.auxiliary_optimizer.schedule", "nope", "unknown optimiser schedule 'nope': known are constant"),
    ("pretrain.spec.mask_schedule", "nope", "unknown mask_schedule 'nope': known are arccos, cosine, linear"),
    ("pretrain.spec.loss_on", "nope", "unknown loss_on 'nope': known are all, masked"),
    ("pretrain.sampler.name", "nope", "unknown sampler 'nope': known are confidence, one_step, random"),
    ("pretrain.sampler.nope", 1, "sampler 'random' does not take the arguments"),
    ("distill.sampler.name", "nope", "unknown sampler 'nope': known are confidence, one_step, random"),
    ("sample.sampler.name", "nope", "unknown sampler 'nope': known are confidence, one_step, random"),
    ("evaluate.inpaint_teacher.name", "nope", "unknown sampler 'nope': known are confidence, one_step, random"),
    ("stages", ("pretrain", "nope"), "unknown stage 'nope': known are distill, evaluate, pretrain, sample"),
    ("teacher.name", "nope", "unknown teacher 'nope': known are digits"),
    ("teacher.nope", 1, "teacher 'digits' does not take the arguments"),
    ("teacher.num_logits", 20, "num_logits is codebook_size 17, or one more; given 20"),
    ("data.name", "nope", "unknown dataset 'nope': known are digits"),
    ("data.nope", 1, "dataset 'digits' does not take the arguments {'nope': 1}"),
    ("mesh", {"nope": 1}, "unknown mesh axes"),
    ("sharding", {"embed": "nope"}, "unknown mesh axis 'nope': known are data, fsdp, tensor"),
    ("sharding", {"nope": "data"}, "unknown logical axis 'nope': known are embed, hidden"),
]


@pytest.mark.parametrize("key, value, said", UNKNOWN, ids=[f"{key}={value}" for key, value, _ in UNKNOWN])
def test_what_does_not_exist_is_refused_before_a_folder_is_claimed(key, value, said, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "claim_workdir", lambda *_: pytest.fail("the folder is claimed"))
    with pytest.raises(UserError) as refusal:
        tasks.run(flipped(key, value), tmp_path)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
