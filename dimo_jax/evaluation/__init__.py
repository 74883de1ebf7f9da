"""How good a set of images is: features once, then every metric of METRICS. A new metric is one file and one line here.

A metric is a module with `FEATURES`, the names of the features it reads, and
`compute(features, reference) -> {column: value}`. The features of N images:

  pixels            [N, H*W*C] in [0, 1]
  cnn               [N, F] last hidden layer of the scoring CNN
  real_probability  [N] that CNN's probability of "real"
  predicted         [N] int, the class that CNN sees
  label             [N] int, the class that was asked for
"""

from collections.abc import Callable, Mapping

import numpy as np

from dimo_jax.errors import UserError
from dimo_jax.evaluation import called_real, frechet, label_accuracy, manifold

METRICS = {
    "frechet": frechet,
    "called_real": called_real,
    "label_accuracy": label_accuracy,
    "manifold": manifold,
}


def features_of(images: np.ndarray, labels: np.ndarray, network: Callable) -> dict[str, np.ndarray]:
    """All features of images [N, H, W, C] float32 in [-1, 1] with labels [N]; `network` is `DigitCNN.features`."""
    pixels = (np.asarray(images).reshape(len(images), -1) + 1) / 2
    return {"pixels": pixels, "label": np.asarray(labels), **network(images)}


def score(features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Every metric of a set of images against the reference set: column -> value.

    Raises:
      UserError: a feature that a metric reads is missing, or a set is too small for a metric.
    """
    values = {}
    for name, metric in METRICS.items():
        missing = [feature for feature in metric.FEATURES if feature not in features]
        if missing:
            raise UserError(f"metric {name!r} needs the features {', '.join(missing)}: given are {', '.join(features)}")
        values |= metric.compute(features, reference)
    return values
