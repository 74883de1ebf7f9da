"""A run's configuration as frozen dataclasses, built from a config file's ConfigDict: a typo dies with its name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dimo_jax.mdm import PretrainSpec
from dimo_jax.optim import OptimSpec
from dimo_jax.registry import build
from dimo_jax.spec import DimoSpec


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Stage `pretrain`: batch_size samples a step; sampler of the grids drawn while training."""

    batch_size: int
    num_steps: int
    checkpoint_every: int
    spec: PretrainSpec
    optimizer: OptimSpec
    sampler: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Distill:
    """Stage `distill`: accumulation microbatches of batch_size an update; teacher: a folder of weights, "" for the
    one that stage `pretrain` left in the same workdir; sampler: of the grids drawn while training."""

    batch_size: int
    num_steps: int
    checkpoint_every: int
    spec: DimoSpec
    generator_optimizer: OptimSpec
    auxiliary_optimizer: OptimSpec
    sampler: Mapping[str, Any]
    accumulation: int = 1
    teacher: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Stage `evaluate`: num_samples a row; rows {name, net: teacher or generator, sampler}; repeats of each timing;
    heldout_passes mask draws over the held-out split; the steps of the CNN that scores."""

    num_samples: int
    rows: tuple[Mapping[str, Any], ...]
    inpaint_teacher: Mapping[str, Any]
    repeats: int = 3
    heldout_passes: int = 8
    cnn_steps: int = 1500


@dataclasses.dataclass(frozen=True)
class Sample:
    """Stage `sample`: a grid of num_per_class pictures a class with the generator's EMA weights."""

    num_per_class: int
    sampler: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Logging:
    """What is written while training; the one part of a config that may change between runs of a workdir.

    log_every, sample_every: in steps (0: no grids). profile_start: the step where a trace of profile_steps begins
    (-1: none).
    """

    log_every: int = 50
    sample_every: int = 0
    profile_start: int = -1
    profile_steps: int = 5


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. mesh: axis -> size, -1 for the devices that are left; sharding: logical axis -> mesh axis."""

    seed: int
    stages: tuple[str, ...]
    data: Mapping[str, Any]
    teacher: Mapping[str, Any]
    mesh: Mapping[str, int]
    sharding: Mapping[str, str]
    logging: Logging
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate
    sample: Sample


def from_dict(config: Mapping[str, Any]) -> RunConfig:
    """Nested dict of a config file -> RunConfig.

    Raises:
      UserError: unknown or missing keys, named with their place and the known ones; choices that do not exist.
    """
    return build(RunConfig, config, "config")
