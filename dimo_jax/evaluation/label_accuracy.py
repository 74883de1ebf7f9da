"""How often the scoring CNN sees the class that was asked for."""

from collections.abc import Mapping

import numpy as np

FEATURES = ("predicted", "label")


def compute(features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of images whose predicted class is their label; the reference is not needed."""
    del reference
    return {"label_accuracy": float(np.mean(features["predicted"] == features["label"]))}
