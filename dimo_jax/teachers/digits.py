"""The digits teacher: a small MaskGIT transformer on scikit-learn's 8x8 digits; the pixels 0..16 are the tokens."""

import jax.numpy as jnp
import numpy as np

from dimo_jax.data import uniform_labels
from dimo_jax.models import maskgit
from dimo_jax.teachers.base import Teacher

NUM_LEVELS, GRID, NUM_CLASSES = 17, (8, 8), 10


def digits(**architecture) -> Teacher:
    """`architecture`: the fields of MaskGITSpec apart from the token space, which the data fix."""
    spec = maskgit.MaskGITSpec(codebook_size=NUM_LEVELS, grid=GRID, num_classes=NUM_CLASSES, **architecture)
    return Teacher(
        net=maskgit.as_net(spec),
        tokens=spec.tokens,
        init=lambda rng: {"net": maskgit.init(spec, rng)},
        encode=lambda params, labels: labels,
        null=lambda params, labels, role: jnp.full_like(labels, NUM_CLASSES),
        decode=decode,
        conditions=lambda seed, n, shape: uniform_labels(seed, n, shape, NUM_CLASSES),
        gallery=lambda count: np.arange(count, dtype=np.int32) % NUM_CLASSES,
        logical_axes=maskgit.LOGICAL_AXES,
    )


def decode(params, ids):
    """Ids [B, 64] in 0..16 -> images [B, 8, 8, 1], -1 background to 1 ink."""
    return (ids.reshape(-1, *GRID, 1) / 8 - 1).astype(jnp.float32)
