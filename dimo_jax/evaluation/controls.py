"""Sets of images whose scores are known in kind: what the metrics say of real digits, of noise, and of copies."""

import numpy as np

from dimo_jax.evaluation.manifold import distance_tiles

HELD_OUT = "held-out real"
RESAMPLED = "real resampled"
INDEPENDENT = "independent pixels"
COPIES = "nearest training copies"


def rows(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    samples: np.ndarray,
    sample_labels: np.ndarray,
    rng: np.random.Generator | int,
    *,
    num_samples: int = 1000,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The control rows as (name, images, labels); images [N, H, W, C] float32 in [-1, 1], labels [N].

    held-out real: the test split. real resampled: train and test together, drawn with replacement.
    independent pixels: every pixel from another training image of the class, classes in equal numbers.
    nearest training copies: for each of the samples (a generator's row) the training image nearest in pixels, of any
    class, under the label that the sample was asked for.

    Args:
      rng: a generator, or the seed of one, for the resampled and the shuffled row.
      num_samples: of these two rows; the others have as many as they are given.
    """
    rng = np.random.default_rng(rng)
    everything, all_labels = np.concatenate([images, test_images]), np.concatenate([labels, test_labels])
    drawn = rng.integers(len(everything), size=num_samples)
    classes = np.unique(labels)
    wanted = classes[np.arange(num_samples) % len(classes)]
    return [
        (HELD_OUT, test_images, test_labels),
        (RESAMPLED, everything[drawn], all_labels[drawn]),
        (INDEPENDENT, independent_pixels(images, labels, wanted, rng), wanted),
        (COPIES, images[nearest(samples, images)], sample_labels),
    ]


def independent_pixels(
    images: np.ndarray, labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Images [len(wanted), H, W, C] of the classes `wanted`: each pixel is that pixel of a random image of the class.

    Every pixel has its class's own law, and no pixel knows of another.
    """
    height, width = images.shape[1:3]
    shuffled = np.empty((len(wanted), *images.shape[1:]), images.dtype)
    for label in np.unique(wanted):
        places, pool = np.flatnonzero(wanted == label), images[labels == label]
        source = rng.integers(len(pool), size=(len(places), height, width))
        shuffled[places] = pool[source, np.arange(height)[:, None], np.arange(width)]
    return shuffled


def nearest(images: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """For each image [N, H, W, C] the number of the image of the pool [M, H, W, C] nearest in pixels: [N] int."""
    tiles = distance_tiles(images.reshape(len(images), -1), pool.reshape(len(pool), -1))
    return np.concatenate([distances.argmin(axis=1) for _, distances in tiles])
