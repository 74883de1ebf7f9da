"""scikit-learn's 1,797 handwritten digits as a tensorflow-datasets builder that needs no TensorFlow."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

NUM_CLASSES = 10
TEST_RATIO = 0.2
SPLIT_SEED = 0


def split_indices(labels: np.ndarray, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Sorted record numbers of `train` and `test`, every class cut in the same ratio.

    The shuffle sorts raw Philox words: numpy promises that stream for good, and not the one of `Generator.permutation`.
    """
    order = np.argsort(np.random.Philox(seed).random_raw(len(labels)), kind="stable")
    in_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        in_test[members[: round(TEST_RATIO * len(members))]] = True
    return {"train": np.flatnonzero(~in_test), "test": np.flatnonzero(in_test)}


class Builder(tfds.core.GeneratorBasedBuilder):
    """8x8 images of ids 0..16 (inked pixels of a 4x4 block), the digit, and the image's number at scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing to download; the inherited look-up would import a package that tfds does not declare

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Optical recognition of handwritten digits (UCI), the 1,797 images that scikit-learn ships.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                    "index": tfds.features.Scalar(np.int32),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # the data come with scikit-learn: nothing is downloaded
        from sklearn.datasets import load_digits

        digits = load_digits()
        return {
            name: self._generate_examples(digits.images, digits.target, indices)
            for name, indices in split_indices(digits.target).items()
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator:
        for index in indices.tolist():
            yield index, {"image": images[index].astype(np.uint8), "label": int(labels[index]), "index": index}
