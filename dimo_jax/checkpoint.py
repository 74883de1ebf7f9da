"""Checkpoints of a training state (Orbax, asynchronous), and finished parameters in a folder with a hash.

A state is any pytree of arrays; on disk it is one flat dict, key path -> array, so that what is missing, extra or
mis-shaped can be named, and no class has to exist to read a checkpoint. Step folders appear by a rename when whole.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dimo_jax.errors import UserError
from dimo_jax.files import atomic_file, atomic_write

FORMAT_VERSION = 1
State = Any  # a pytree of arrays


def flatten(tree: State) -> dict[str, Any]:
    """Leaves by name: dict keys, attribute names and positions on the way to each, joined by "/".

    Raises:
      ValueError: two leaves share a name (a key holds "/").
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves have the same name: no key may hold a '/'")
    return flat


class Checkpointer:
    """The checkpoints of one run, in one folder, one sub-folder a step.

    Reading changes nothing on disk. The first `save` removes what a killed save left and sets unsound steps aside.
    """

    def __init__(self, folder: str | Path, *, metadata: Mapping[str, Any], keep: int = 2):
        """
        Args:
          folder: where the steps lie; created by the first `save`.
          metadata: JSON values stored in every checkpoint; `restore` refuses one in which any of them differs.
          keep: how many of the newest checkpoints stay.
        """
        self._folder = Path(folder).absolute()
        self._metadata = {"format_version": FORMAT_VERSION, **metadata}
        self._keep = keep
        items = {"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))
        self._manager: ocp.CheckpointManager | None = None
        self._unreadable: set[int] = set()

    def latest(self) -> int | None:
        """The newest sound step on disk; a loud warning for every newer one that is empty or half-written."""
        sound = self._sound_steps()
        return sound[0] if sound else None

    def restore(self, abstract_state: State) -> tuple[int, State]:
        """The newest checkpoint that can be read, as (step, state).

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with `sharding` set: structure, shapes, dtypes and placement.

        Raises:
          UserError: there is none; or it has another format version, other metadata, or leaves that are missing, extra
            or of another shape or dtype (all named). Nothing on disk is changed.
        """
        wanted = flatten(abstract_state)
        for step in self._sound_steps():
            self._refuse_other_metadata(step)
            self._refuse_other_leaves(step, wanted)
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                flat = self._reader.restore(self._folder / str(step), args=args).state
            except jax.errors.JaxRuntimeError:
                raise  # out of device memory, say: not the checkpoint's fault
            except Exception as error:  # no narrower one: Orbax raises this very class for bytes it cannot read
                said = str(error)[:200]
                logging.warning("CHECKPOINT %s CANNOT BE READ and is skipped: %s", self._folder / str(step), said)
                self._unreadable.add(step)
                continue
            return step, jax.tree.unflatten(jax.tree.structure(abstract_state), [flat[name] for name in wanted])
        raise UserError(f"there is no sound checkpoint in {self._folder}: start the run anew, or give its workdir")

    def save(self, step: int, state: State) -> None:
        """Starts to save and returns; the values are those at the call, even if the buffers are donated next.

        A step that is already there is left as it is: a resumed run makes the same bits again.
        """
        if self._manager is None:
            self._manager = self._open_for_writing()
        if step in self._manager.all_steps():
            return
        # Orbax returns with the values on the host; on a CPU they are views, which XLA will not give away by donation.
        items = {"state": ocp.args.StandardSave(flatten(state)), "metadata": ocp.args.JsonSave(self._metadata)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        if self._manager is not None:
            self._manager.close()
        self._reader.close()

    def _open_for_writing(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            sound = self._sound_steps()
            for step in set(self._steps()) - set(sound):
                aside = self._folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self._folder / str(step), aside)
        self._unreadable.clear()  # those numbers are free again
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep), create=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=("state", "metadata"))

    def _steps(self) -> list[int]:
        """All step folders, newest first."""
        if not self._folder.is_dir():
            return []
        return sorted((int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)

    def _sound_steps(self) -> list[int]:
        sound = []
        for step in self._steps():
            reason = self._damage(step)
            if reason is None:
                sound.append(step)
            else:
                logging.warning("CHECKPOINT %s IS DAMAGED and is skipped: %s", self._folder / str(step), reason)
        return sound

    def _damage(self, step: int) -> str | None:
        """Why a step cannot be used, as far as its small files tell; only `restore` reads the arrays."""
        if step in self._unreadable:
            return "its arrays cannot be read"
        try:
            self._saved_metadata(step)
            self._saved_leaves(step)
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        return None

    def _saved_metadata(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return self._reader.restore(self._folder / str(step), args=args).metadata

    def _saved_leaves(self, step: int) -> dict[str, Any]:
        """Name -> something with `shape` and `dtype`, without reading the arrays."""
        item = self._reader.metadata(self._folder / str(step)).item_metadata["state"]
        if item is None:
            raise ValueError("it holds no state")
        return dict(item.tree)

    def _refuse_other_metadata(self, step: int) -> None:
        saved = self._saved_metadata(step)
        for key, value in self._metadata.items():
            if saved.get(key) != value:
                raise UserError(
                    f"checkpoint {self._folder / str(step)} has {key} {json.dumps(saved.get(key))} and this run has "
                    f"{json.dumps(value)}: resume with what it was made with, or give another --workdir"
                )

    def _refuse_other_leaves(self, step: int, wanted: Mapping[str, Any]) -> None:
        saved = self._saved_leaves(step)
        both = sorted(saved.keys() & wanted.keys())
        problems = {
            "missing there": sorted(wanted.keys() - saved.keys()),
            "unknown here": sorted(saved.keys() - wanted.keys()),
            "of another shape or dtype": [
                f"{name} ({_kind(saved[name])} there, {_kind(wanted[name])} here)"
                for name in both
                if _kind(saved[name]) != _kind(wanted[name])
            ],
        }
        said = "; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names)
        if said:
            raise UserError(
                f"checkpoint {self._folder / str(step)} is not of this run's shape ({said}): "
                "resume with the config it was made with, or give another --workdir"
            )


def _kind(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def tree_sha256(tree: State) -> str:
    """Hash of names, dtypes, shapes and bytes of all leaves, sorted by name: equal exactly when the trees are."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        digest.update(f"{name}:{_kind(array)};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_params(folder: str | Path, params: dict, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a nested dict of arrays and `manifest.json` (the caller's entries, and what `load_params` checks).

    The arrays' file is named by its hash and the manifest, replaced last, points to it: a kill at any moment leaves the
    old pair or the new one.

    Returns:
      the manifest as written: format_version, sha256, file, num_arrays, num_parameters, dtypes, the caller's entries.
    """
    folder, flat = Path(folder), {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    if jax.tree.structure(_nested(flat)) != jax.tree.structure(params):
        raise ValueError("params must be nested dicts with string keys")
    sha256 = tree_sha256(params)
    manifest = {
        **manifest,
        "format_version": FORMAT_VERSION,
        "sha256": sha256,
        "file": f"params-{sha256[:16]}.npz",
        "num_arrays": len(flat),
        "num_parameters": sum(array.size for array in flat.values()),
        "dtypes": {name: array.dtype.name for name, array in flat.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / manifest["file"]) as file:
        np.savez(file, **{name: array.view(f"V{array.itemsize}") for name, array in flat.items()})  # npz lacks bfloat16
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    for other in folder.glob("params-*.npz"):
        if other.name != manifest["file"]:
            other.unlink()
    return manifest


def load_params(folder: str | Path) -> tuple[dict, dict[str, Any]]:
    """Reads what `save_params` wrote: (nested dict of numpy arrays, manifest).

    Raises:
      UserError: the folder or a file is missing, the format version is another, or the arrays are not those recorded.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {manifest['format_version']}, this program reads {FORMAT_VERSION}")
        with np.load(folder / manifest["file"]) as archive:
            params = _nested({name: archive[name].view(jnp.dtype(t)) for name, t in manifest["dtypes"].items()})
        if tree_sha256(params) != manifest["sha256"]:
            raise ValueError("their sha256 is not the recorded one")
    except FileNotFoundError as error:
        raise UserError(f"there are no parameters in {folder}: {error.filename} is missing") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"parameters in {folder} cannot be used: {error}; make them anew, or restore them") from error
    return params, manifest


def _nested(flat: Mapping[str, Any]) -> dict:
    nested: dict = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested
