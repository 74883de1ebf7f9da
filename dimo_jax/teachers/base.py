"""The teacher: everything of a pre-trained masked diffusion model that distillation and sampling see."""

from collections.abc import Callable
from typing import NamedTuple

from dimo_jax.nets import Net, TokenSpec


class Teacher(NamedTuple):
    """A masked diffusion model as functions. Parameters {net, ...} are arguments everywhere and are never changed.

    init(rng) -> parameters.
    encode(params, raw) -> cond, from raw conditions (labels, prompts) to what the trunk takes; leading axis B.
    null(params, cond, role) -> the unconditional cond of the same shape; role teacher or auxiliary.
    decode(params, ids [B, L]) -> images [B, H, W, C] float32 in [-1, 1].
    conditions(seed, n, shape) -> raw conditions of step n with leading axes `shape`, a pure function of the arguments.
    gallery(count) -> raw conditions [count] that make a good picture grid of ten columns.
    logical_axes: (regex of a parameter's path, logical axis names), for sharding.
    """

    net: Net
    tokens: TokenSpec
    init: Callable
    encode: Callable
    null: Callable
    decode: Callable
    conditions: Callable
    gallery: Callable
    logical_axes: tuple
