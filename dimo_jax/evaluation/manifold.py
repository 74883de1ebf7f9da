"""How two sets of points cover each other: precision, recall, density and coverage.

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991. Density and coverage: Naeem et al. 2020, arXiv
2002.09797. A set's manifold is the union of open balls around its points, each as wide as the distance to the point's
k-th nearest neighbour in the set.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from dimo_jax.errors import UserError

FEATURES = ("pixels",)

_TILE_ELEMENTS = 2**22  # of float64: 32 MB a tile


def compute(
    features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], *, feature: str = "pixels", k: int = 3
) -> dict[str, float]:
    """Precision, recall, density and coverage in the space of the named feature.

    precision: share of the samples inside the reference's manifold; recall: share of the reference inside the samples'.
    density: how many reference balls hold a sample, over k; 1 for the reference's own law, and it can exceed 1.
    coverage: share of the reference balls that hold a sample.

    Raises:
      UserError: a set of k points or fewer, where the k-th neighbour does not exist.
    """
    samples, real = features[feature], reference[feature]
    if min(len(samples), len(real)) <= k:
        raise UserError(f"k = {k} neighbours need more than {k} points: given {len(samples)} samples, {len(real)} real")
    real_radii, sample_radii = neighbour_radii(real, k), neighbour_radii(samples, k)
    balls_around = np.zeros(len(samples), int)
    covered, recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in distance_tiles(real, samples):
        inside = distances < real_radii[rows, None]
        balls_around += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        recalled[rows] = (distances < sample_radii).any(axis=1)
    return {
        "precision": float((balls_around > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls_around.mean() / k),
        "coverage": float(covered.mean()),
    }


def neighbour_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [N] of each point of x [N, D] to its k-th nearest other point."""
    radii = np.empty(len(x))
    for rows, distances in distance_tiles(x, x):
        radii[rows] = np.partition(distances, k, axis=1)[:, k]  # place 0 is the point itself
    return radii


def distance_tiles(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of x [N, D] to y [M, D], some rows of x at a time: (rows, [rows, M] float64).

    Squares of multiples of 1/16 are exact in float64, so ties between digits stay ties.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = np.sum(y**2, axis=1)
    height = max(1, _TILE_ELEMENTS // len(y))
    for start in range(0, len(x), height):
        tile = x[start : start + height]
        squares = np.sum(tile**2, axis=1)[:, None] + norms - 2 * tile @ y.T
        yield slice(start, start + len(tile)), squares.clip(min=0)
