"""Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

from collections.abc import Mapping

import numpy as np

from dimo_jax.errors import UserError

FEATURES = ("pixels", "cnn")


def compute(features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The distance in pixels (of [0, 1]) and in the scoring CNN's features, whose scale is that CNN's own."""
    return {
        "pixel_fd": frechet_distance(features["pixels"], reference["pixels"]),
        "cnn_fd": frechet_distance(features["cnn"], reference["cnn"]),
    }


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of x [N, D] and y [M, D], in float64; covariances over N - 1.

    The trace of (S_x S_y)^(1/2) is the sum of the singular values of S_x^(1/2) S_y^(1/2). With symmetric roots it
    stays real, symmetric in x and y, and accurate where a covariance is singular.

    Raises:
      UserError: fewer than two samples on a side, so there is no covariance.
    """
    if min(len(x), len(y)) < 2:
        raise UserError(f"a Frechet distance needs two samples or more on each side: given {len(x)} and {len(y)}")
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x), _moments(y)
    cross = np.linalg.svd(_root(cov_x) @ _root(cov_y), compute_uv=False).sum()
    distance = np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    return max(0.0, float(distance))  # rounding can leave -1e-15 between equal sets


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(x, np.float64)
    return x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix [D, D]."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
