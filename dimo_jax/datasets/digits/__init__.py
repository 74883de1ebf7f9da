"""scikit-learn's handwritten digits."""

from dimo_jax.datasets.digits.digits_dataset_builder import NUM_CLASSES, Builder

__all__ = ["NUM_CLASSES", "Builder"]
