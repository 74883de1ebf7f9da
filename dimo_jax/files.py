"""Files that are either whole or absent, and the claim of one config on one working folder."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from dimo_jax.errors import UserError

_ABSENT = "absent"


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write into that takes its name only once it is whole and on disk; on an error nothing changes.

    The temporary name is fixed, so what a killed process left behind is overwritten by the next one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Puts a rename on disk; a folder has to be opened for that, and closed again."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes the whole file at once (text as UTF-8): a reader, or a kill, never meets half of it."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def claim_workdir(workdir: str | Path, config: Mapping[str, Any], ignore: Collection[str] = ("logging",)) -> None:
    """Makes the folder this config's own: creates it and writes `config.json`, or checks the one that is there.

    Args:
      workdir: the folder of one run.
      config: nested dict that JSON can hold.
      ignore: top-level keys that may change between a run and its resumption (the file then holds the new ones).

    Raises:
      UserError: the folder belongs to another config, or cannot be written. What it holds is left as it was.
    """
    workdir, path = Path(workdir), Path(workdir) / "config.json"
    given = json.loads(json.dumps(config))  # tuples become lists, as they will when read back
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _refuse_other_config(path, json.loads(path.read_text()), given, ignore)
        if jax.process_index() == 0:
            atomic_write(path, json.dumps(given, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error}): give another --workdir") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or give another --workdir") from error


def _refuse_other_config(path: Path, there: dict, given: dict, ignore: Collection[str]) -> None:
    old, new = (_dotted({k: v for k, v in config.items() if k not in ignore}) for config in (there, given))
    differing = [key for key in sorted(old | new) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    if not differing:
        return
    lines = [f"{key} is {old.get(key, _ABSENT)!r} there and {new.get(key, _ABSENT)!r} now" for key in differing[:5]]
    more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
    raise UserError(
        f"workdir {path.parent} belongs to a run with another config: {'; '.join(lines)}{more}; "
        "give another --workdir, or the config of that run"
    )


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}; an empty dict stays, as a value to compare."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(_dotted(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat
