"""Meshes, and parameter shardings by rules: regex of the path -> logical axes -> mesh axes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dimo_jax.errors import UserError
from dimo_jax.registry import lookup

BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, e.g. {"data": -1}; -1 takes the devices that are left.

    Raises:
      UserError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = ("data", "fsdp", "tensor")
    if set(axes) - set(names):
        raise UserError(f"unknown mesh axes {sorted(set(axes) - set(names))}: known are {', '.join(names)}")
    sizes = [axes.get(name, 1) for name in names]
    if sizes.count(-1) == 1 and len(devices) % -np.prod(sizes) == 0:
        sizes[sizes.index(-1)] = len(devices) // -int(np.prod(sizes))
    if np.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {dict(axes)} does not fit {len(devices)} devices: the sizes must multiply to that number"
        )
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_of(key_path) -> str:
    """A pytree key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def tree_shardings(tree, mesh: Mesh, logical_axes: Sequence, rules: Mapping[str, str]) -> tuple[Any, list[str]]:
    """Shardings of a pytree of arrays or shapes -> (pytree of NamedSharding, notices).

    A leaf belongs to the parameter whose path ends its own (so optimiser moments and averages follow their parameter);
    `logical_axes` gives the first matching regex's axis names, `rules` maps those to mesh axes. Scalars are replicated.
    An axis that does not divide stays whole, with a notice.

    Raises:
      UserError: leaves that no regex covers, all of them named.
    """
    notices, uncovered = [], []

    def one(key_path, leaf):
        path = path_of(key_path)
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        suffixes = (path.split("/", i)[-1] for i in range(path.count("/") + 1))
        names = next((n for s in suffixes for regex, n in logical_axes if re.search(regex, s)), None)
        if names is None:
            uncovered.append(path)
            return NamedSharding(mesh, P())
        spec = []
        for size, name in zip(leaf.shape, names, strict=False):
            axis = rules.get(name)
            if axis and size % mesh.shape[axis]:
                notices.append(
                    f"{path}: {name} of {size} does not divide over {axis} of {mesh.shape[axis]}, kept whole"
                )
                axis = None
            spec.append(axis)
        return NamedSharding(mesh, P(*spec))

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if uncovered:
        raise UserError(f"no sharding rule covers {', '.join(uncovered)}: add a regex to the network's LOGICAL_AXES")
    return shardings, notices


def check_rules(rules: Mapping[str, str], logical_axes: Sequence, mesh: Mesh) -> None:
    """UserError for a rule from an axis that no parameter has, or to one that the mesh has not."""
    names = {name: None for _, names in logical_axes for name in names if name}
    for name, axis in rules.items():
        lookup(names, name, "logical axis")
        lookup(mesh.shape, axis, "mesh axis")


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Arrays split along `axis` over the data and fsdp axes."""
    return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """UserError unless the batch divides over the devices that split it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} does not divide over {parts} devices (mesh axes data x fsdp): take a multiple of "
            f"{parts}, or another mesh"
        )
