"""Teachers: `TEACHERS[name](**arguments) -> Teacher`, one file each, and loading their weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dimo_jax.checkpoint import load_params
from dimo_jax.errors import UserError
from dimo_jax.teachers.digits import digits

TEACHERS = {"digits": digits}


EXECUTION = ("dtype", "remat", "unroll", "dropout")  # how a network runs; the same weights serve


def load_teacher(entry: Mapping[str, Any], folder: str | Path) -> tuple[dict, dict]:
    """(parameters {net, ...}, manifest) of the teacher `entry` from a folder of weights.

    Raises:
      UserError: the folder is missing or damaged, or holds the weights of another teacher than `entry` describes.
    """
    params, manifest = load_params(folder)
    there, asked = (_identity(teacher) for teacher in (manifest.get("teacher", {}), entry))
    if there != asked:
        raise UserError(f"the weights in {folder} are of the teacher {there}, the config asks for {asked}")
    return params, manifest


def _identity(entry: Mapping[str, Any]) -> dict:
    return json.loads(json.dumps({key: value for key, value in entry.items() if key not in EXECUTION}))
