"""How often the scoring CNN takes an image for a real one rather than for class-conditional noise."""

from collections.abc import Mapping

import numpy as np

FEATURES = ("real_probability",)


def compute(features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of images whose probability of being real is above 1/2; the reference is not needed."""
    del reference
    return {"called_real": float(np.mean(features["real_probability"] > 0.5))}
