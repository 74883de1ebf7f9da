"""The prepared digits are scikit-learn's, whole or absent; batch n depends on (seed, n) and nothing else."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dimo_jax.data import DATASETS, load_all, prepare, token_batches, uniform_labels
from dimo_jax.datasets.digits.digits_dataset_builder import split_indices
from dimo_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def splits(data_dir):
    return prepare("digits", data_dir)


def test_records_are_the_real_digits_each_once(splits):
    digits = load_digits()
    columns = {name: load_all(source) for name, source in splits.items()}
    assert set(columns) == {"train", "test"}
    for split in columns.values():
        assert split["ids"].dtype == split["label"].dtype == np.int32
        np.testing.assert_array_equal(split["ids"], digits.data[split["index"]])
        np.testing.assert_array_equal(split["label"], digits.target[split["index"]])
    indices = np.concatenate([split["index"] for split in columns.values()])
    assert sorted(indices) == list(range(1797))
    assert len(columns["test"]["index"]) == 359


def test_split_is_fixed_and_even_over_the_classes():
    labels = load_digits().target
    first = split_indices(labels)
    assert first["test"][:8].tolist() == [
        0,
        3,
        8,
        9,
        14,
        15,
        18,
        19,
    ]  # recorded: a run can be compared with one made years ago
    for label in range(10):
        ratio = (labels[first["test"]] == label).sum() / (labels == label).sum()
        assert abs(ratio - 0.2) < 0.003
    assert not np.array_equal(first["test"], split_indices(labels, seed=1)["test"])


def test_a_second_preparation_only_opens(splits, data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    again = prepare("digits", data_dir)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before
    assert {name: len(source) for name, source in again.items()} == {"train": 1438, "test": 359}


KILLED = """
import os, signal, sys
import tensorflow_datasets as tfds
from dimo_jax.data import prepare
tfds.core.DatasetInfo.write_to_directory = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
prepare("digits", sys.argv[1])
"""


def test_killed_preparation_is_not_taken_for_a_dataset(tmp_path):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert child.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.array_record*")), "the kill came before anything was written"
    assert {name: len(source) for name, source in prepare("digits", tmp_path).items()} == {"train": 1438, "test": 359}


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=f"unknown dataset 'mnist': known are {', '.join(sorted(DATASETS))}"):
        prepare("mnist", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        prepare("digits", tmp_path / "file" / "data")
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="is not whole: remove that folder"):
        prepare("digits", tmp_path)


def test_batch_n_is_a_function_of_seed_and_n(splits):
    first = token_batches(splits["train"], seed=5, batch_size=64)
    second = token_batches(splits["train"], seed=5, batch_size=64)
    for n in (1000, 3, 0, 3):  # any order, any process
        one, two = first[n], second[n]
        assert one["ids"].shape == (64, 64) and one["ids"].dtype == one["label"].dtype == np.int32
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not np.array_equal(first[3]["index"], token_batches(splits["train"], seed=6, batch_size=64)[3]["index"])


def test_every_pass_holds_every_record_once_in_its_own_order(splits):
    batches = token_batches(splits["train"], seed=0, batch_size=100)
    indices = np.concatenate([batches[n]["index"] for n in range(29)])
    passes = indices[: 2 * 1438].reshape(2, 1438)
    assert len(set(passes[0])) == len(set(passes[1])) == 1438
    assert (passes[0] == passes[1]).mean() < 0.01
    plain = token_batches(splits["test"], seed=0, batch_size=359, shuffle=False)
    assert np.array_equal(plain[0]["ids"], load_all(splits["test"])["ids"])


class CountedReads(list):
    reads = 0

    def __getitems__(self, numbers):
        self.reads += len(numbers)
        return [self[number] for number in numbers]


def test_every_record_is_read_and_decoded_once(splits):
    source = CountedReads(splits["test"])
    batches = token_batches(source, seed=0, batch_size=64)
    for n in range(20):
        batches[n]
    assert source.reads == len(source)


def test_uniform_labels():
    labels = uniform_labels(3, 10, (2, 4, 500), 10)
    assert labels.shape == (2, 4, 500) and labels.dtype == np.int32
    assert np.array_equal(labels, uniform_labels(3, 10, (2, 4, 500), 10))
    for seed, n in ((4, 10), (3, 11), (4, 9), (10, 3)):
        assert abs((labels.ravel() == uniform_labels(seed, n, (4000,), 10)).mean() - 0.1) < 0.02  # independent
    counts = np.bincount(np.concatenate([uniform_labels(0, n, (100,), 10) for n in range(1000)]), minlength=10)
    assert np.abs(counts - 10_000).max() < 4 * np.sqrt(10_000 * 0.9)
    assert uniform_labels(0, 0, (8,), 10).tolist() == [9, 8, 9, 6, 3, 5, 7, 6]


def test_neither_tensorflow_nor_torch_is_imported(data_dir, splits):
    code = (
        "import sys; from dimo_jax.data import load_all, prepare; import dimo_jax.checkpoint\n"
        "load_all(prepare('digits', sys.argv[1])['test'])\n"
        "print({'tensorflow', 'torch'} & set(sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(data_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (child.returncode, child.stdout) == (0, "set()\n")
