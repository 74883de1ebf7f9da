"""The stages of a run: build teacher, spec, state and step from the config, and hand them to `fit`."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from clu import parameter_overview
from PIL import Image

from dimo_jax import data, dimo, dimo_state, mdm, sharding
from dimo_jax.checkpoint import Checkpointer, load_params, save_params
from dimo_jax.errors import UserError
from dimo_jax.evaluate import evaluate
from dimo_jax.files import atomic_write, claim_workdir
from dimo_jax.images import grid
from dimo_jax.logs import RunLog
from dimo_jax.nets import Conditions
from dimo_jax.optim import OptimSpec, make_learning_rate, make_transform
from dimo_jax.registry import lookup, make
from dimo_jax.rng import Draws
from dimo_jax.run_config import Logging, RunConfig, from_dict
from dimo_jax.sample import make_sampling
from dimo_jax.samplers import SAMPLERS
from dimo_jax.state import Optimizer, merge, partition
from dimo_jax.teachers import TEACHERS, load_teacher
from dimo_jax.train import fit


def run(config: dict, workdir: Path) -> None:
    """Run config.stages in order; a finished stage is skipped, an unfinished one goes on from its last checkpoint.

    Raises:
      UserError: anything wrong with the config or with what the workdir holds.
    """
    spec = from_dict(config)
    tasks = [lookup(TASKS, stage, "stage") for stage in spec.stages]
    check(spec)
    claim_workdir(workdir, config)
    for stage, task in zip(spec.stages, tasks, strict=True):
        folder = workdir / stage
        if (folder / "done.json").exists():
            absl_logging.info("stage %s was finished before", stage)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        task(spec, workdir, folder)
        seconds = time.perf_counter() - start
        if jax.process_index() == 0:
            atomic_write(folder / "done.json", json.dumps({"seconds": seconds}) + "\n")
        print(f"stage {stage} took {seconds:.1f} s", flush=True)


def check(config: RunConfig) -> None:
    """UserError for what no stage could do, before the config claims a folder and trains for hours."""
    teacher, mesh = make(TEACHERS, config.teacher, "teacher"), sharding.make_mesh(config.mesh)
    make(dict.fromkeys(data.DATASETS, lambda: None), config.data, "dataset")
    sharding.check_rules(config.sharding, teacher.logical_axes, mesh)
    rows = [row["sampler"] for row in config.evaluate.rows]
    stages = (config.pretrain.sampler, config.distill.sampler, config.sample.sampler, config.evaluate.inpaint_teacher)
    for sampler in (*stages, *rows):
        make(SAMPLERS, sampler, "sampler")
    for stage in {"pretrain", "distill"} & set(config.stages):
        sharding.check_batch(getattr(config, stage).batch_size, mesh)
    spec, length = config.distill.spec, teacher.tokens.length
    if length % spec.num_chunks:
        raise UserError(f"num_chunks {spec.num_chunks} does not divide the {length} tokens")
    partition(jax.eval_shape(teacher.init, jax.random.key(0))["net"], spec.frozen)


def pretrain(config: RunConfig, workdir: Path, folder: Path) -> None:
    """Train a masked diffusion teacher from scratch; its EMA weights go to `workdir/pretrain/weights`."""
    stage, teacher = config.pretrain, make(TEACHERS, config.teacher, "teacher")
    mesh = sharding.make_mesh(config.mesh)
    source = data.prepare(config.data["name"], workdir / "data")["train"]
    batches = data.token_batches(source, seed=config.seed, batch_size=stage.batch_size)
    optimizer = make_optimizer(stage.optimizer, stage.num_steps)
    draws = Draws(jax.random.key(config.seed)).scope("pretrain")
    step = functools.partial(mdm.pretrain_step, teacher=teacher, spec=stage.spec, optimizer=optimizer)
    loop = Loop(config, teacher, mesh, {}, draws, stage, folder)

    def init():
        return mdm.init_pretrain(teacher.init(draws.named_key("init"))["net"], optimizer)

    def batch(n):
        records = batches[n]
        return {"ids": records["ids"], "conditions": Conditions(records["label"])}

    state = loop.run(
        step,
        init,
        batch,
        {"ids": 0, "conditions": 0},
        lambda state: state.ema,
        console=("nll", "accuracy", "grad_norm"),
    )
    save_params(folder / "weights", {"net": state.ema}, {"teacher": dict(config.teacher)})


def distill(config: RunConfig, workdir: Path, folder: Path) -> None:
    """Algorithm 1: distil the teacher into a one-step generator; its EMA weights go to `workdir/distill/weights`."""
    stage, teacher = config.distill, make(TEACHERS, config.teacher, "teacher")
    mesh = sharding.make_mesh(config.mesh)
    params, manifest = load_teacher(config.teacher, config.distill.teacher or workdir / "pretrain" / "weights")
    names = ("generator", "auxiliary")
    optimizers = {name: make_optimizer(getattr(stage, f"{name}_optimizer"), stage.num_steps) for name in names}
    step = functools.partial(dimo.train_step, teacher=teacher, spec=stage.spec, optimizers=optimizers)
    draws = Draws(jax.random.key(config.seed)).scope("distill")
    loop = Loop(config, teacher, mesh, params, draws, stage, folder, {"teacher_sha256": manifest["sha256"]})

    def init():
        return dimo_state.init_dimo(params["net"], stage.spec, optimizers)

    def batch(n):
        per_update = (stage.accumulation, stage.batch_size)
        shapes = {"generator": per_update}
        if stage.spec.resample:
            shapes["auxiliary"] = (stage.spec.num_auxiliary_updates, *per_update)
        # Generator and auxiliary have their own streams: even and odd elements.
        raw = {
            name: teacher.conditions(config.seed, 2 * n + i, shape) for i, (name, shape) in enumerate(shapes.items())
        }
        return {name: Conditions(values) for name, values in raw.items()}

    axes = {"generator": 1, "auxiliary": 2} if stage.spec.resample else {"generator": 1}
    shown = ("generator/divergence", "generator/grad_norm", "auxiliary/loss")
    state = loop.run(step, init, batch, axes, lambda state: merge(params["net"], state.ema), console=shown)
    weights = {"net": merge(params["net"], state.ema)}
    save_params(folder / "weights", weights, {"teacher": dict(config.teacher), "teacher_sha256": manifest["sha256"]})


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the training stages share: shard the state, restore it, jit the step, and `fit`."""

    config: RunConfig
    teacher: Any
    mesh: jax.sharding.Mesh
    params: dict
    draws: Draws
    stage: Any
    folder: Path
    metadata: dict = dataclasses.field(default_factory=dict)

    def run(self, step: Callable, init: Callable, batch: Callable, batch_axes: dict, weights: Callable, *, console):
        """`fit` step(state, params, batch, draws) from its last checkpoint, or from init().

        batch_axes: for each entry of a batch the axis that is split over the devices. weights: state -> the net's
        parameters for the sample grids. console: the metrics shown on the console. -> the last state.
        """
        abstract, shardings, params = self.place(init)
        replicated = sharding.replicated(self.mesh)
        inputs = {name: sharding.batch_sharding(self.mesh, axis) for name, axis in batch_axes.items()}
        jitted = jax.jit(
            step,
            in_shardings=(shardings, jax.tree.map(lambda a: a.sharding, params), inputs, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        checkpointer = Checkpointer(self.folder / "checkpoints", metadata=self.metadata)
        start = 0
        if checkpointer.latest() is None:
            state = jax.jit(init, out_shardings=shardings)()
        else:
            start, state = checkpointer.restore(abstract)
            print(f"{self.folder.name} goes on from step {start}", flush=True)
        logging: Logging = self.config.logging
        log = RunLog(
            self.folder, start_step=start, num_steps=self.stage.num_steps, name=self.folder.name, console=console
        )
        try:
            return fit(
                lambda state, batch: jitted(state, params, batch, self.draws),
                state, start=start, num_steps=self.stage.num_steps, batch=batch, log=log, checkpointer=checkpointer,
                checkpoint_every=self.stage.checkpoint_every, logging=logging, folder=self.folder,
                hooks=(self.grid_hook(log, params, weights),),
            )  # fmt: skip
        finally:
            log.close()
            checkpointer.close()

    def place(self, init: Callable):
        """Shapes before memory: (abstract state with shardings, its shardings, the teacher's parameters placed)."""
        rules, axes = self.config.sharding, self.teacher.logical_axes
        abstract = jax.eval_shape(init)
        shardings, notices = sharding.tree_shardings(abstract, self.mesh, axes, rules)
        for notice in notices:
            absl_logging.warning(notice)
        absl_logging.info("\n%s", parameter_overview.get_parameter_overview(abstract.ema, include_stats=False))
        count = parameter_overview.count_parameters(abstract.ema)
        print(f"{self.folder.name}: {count:,} trainable parameters a network, mesh {dict(self.mesh.shape)}", flush=True)
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        params = jax.device_put(self.params, sharding.tree_shardings(self.params, self.mesh, axes, rules)[0])
        return abstract, shardings, params

    def grid_hook(self, log: RunLog, params: dict, weights: Callable) -> Callable:
        """A hook that draws a grid of 10 columns, the first ten conditions, with the stage's sampler."""
        sampling = make_sampling(self.teacher, self.stage.sampler)
        raw = jax.tree.map(jnp.asarray, self.teacher.gallery(80))

        def hook(n, state):
            ids = sampling(params, weights(state), raw, self.draws.named_key("grid"))
            log.images(n, "samples", grid(jax.device_get(self.teacher.decode(params, ids)), 10, 4))

        return hook


def make_optimizer(spec: OptimSpec, num_steps: int) -> Optimizer:
    """The optimiser of a spec for a run of num_steps outer steps."""
    return Optimizer(make_transform(spec), make_learning_rate(spec, num_steps))


def sample(config: RunConfig, workdir: Path, folder: Path) -> None:
    """A grid of one-step samples, a column a class: `workdir/sample/samples.png`."""
    teacher = make(TEACHERS, config.teacher, "teacher")
    params, _ = load_teacher(config.teacher, config.distill.teacher or workdir / "pretrain" / "weights")
    generator, _ = load_params(workdir / "distill" / "weights")
    raw = jax.tree.map(jnp.asarray, teacher.gallery(10 * config.sample.num_per_class))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    ids = make_sampling(teacher, config.sample.sampler)(params, generator["net"], raw, key)
    Image.fromarray(grid(jax.device_get(teacher.decode(params, ids)), 10, 4)).save(folder / "samples.png")


TASKS = {"pretrain": pretrain, "distill": distill, "sample": sample, "evaluate": evaluate}
