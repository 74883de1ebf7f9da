"""Prepared datasets and the batches drawn from them: batch n is a pure function of (seed, n), so no state is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from dimo_jax.datasets import digits
from dimo_jax.errors import UserError
from dimo_jax.registry import lookup

DATASETS = {"digits": digits.Builder}


def prepare(name: str, data_dir: str | Path) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Builds the dataset under `data_dir` when it is not there, and opens it.

    The files are written beside and renamed when whole: a killed preparation leaves nothing that passes for a dataset,
    and of two runs that prepare at once one wins.

    Returns:
      split name -> random-access source of records (`tfds.data_source`).

    Raises:
      UserError: an unknown name, a folder that cannot be written, or a folder that holds only a part of the dataset.
    """
    factory = lookup(DATASETS, name, "dataset")
    directory = Path(data_dir).expanduser().absolute()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    failure = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        factory(data_dir=directory, file_format="array_record").download_and_prepare(download_config=config)
    except OSError as error:
        failure = error  # unwritable, or another run has renamed its own copy into place first
    builder = factory(data_dir=directory, file_format="array_record")
    if not builder.info.splits:
        reason = f"could not be written ({failure})" if failure else "is not whole: remove that folder and run again"
        raise UserError(f"dataset {name!r} at {builder.data_path} {reason}") from failure
    return builder.as_data_source()


def load_all(source: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Every record of a split, in its order on disk: `ids` [N, L] int32 (the image's pixels, row by row) and all else.

    Scalars become [N] int32, so digits give `label` and `index` (the number of the image in scikit-learn's set).
    """
    records = source.__getitems__(range(len(source)))
    columns = {key: np.stack([record[key] for record in records]).astype(np.int32) for key in records[0]}
    images = columns.pop("image")
    return {"ids": images.reshape(len(images), -1), **columns}


def token_batches(
    source: Sequence[Mapping[str, Any]], *, seed: int, batch_size: int, shuffle: bool = True
) -> grain.MapDataset:
    """An endless dataset whose element n is batch n: `ids` [B, L] int32, `label` [B] int32, and the other scalars.

    Every pass over the records has an order of its own, and a batch may span two passes. Records are decoded once and
    kept in memory: reading them one by one costs more than a small training step.
    """
    columns = load_all(source)
    numbers = grain.MapDataset.range(len(source))
    if shuffle:
        numbers = numbers.shuffle(seed=seed)
    numbers = numbers.repeat().batch(batch_size)
    return numbers.map(lambda rows: {key: column[rows] for key, column in columns.items()})


def uniform_labels(seed: int, n: int, batch_shape: Sequence[int], num_classes: int) -> np.ndarray:
    """Classes for step n, uniform over `num_classes`, int32 of shape `batch_shape`: what distillation needs for data.

    Raw Philox words keyed by (seed, n): numpy promises that stream for good. The remainder's bias is below 2^-50.
    """
    words = np.random.Philox(key=np.array([seed, n], np.uint64)).random_raw(int(np.prod(batch_shape)))
    return (words % np.uint64(num_classes)).astype(np.int32).reshape(batch_shape)
