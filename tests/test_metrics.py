"""Every metric against a closed form, a hand-made example or a naive implementation; the controls; the scoring CNN."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dimo_jax.datasets.digits.digits_dataset_builder import split_indices
from dimo_jax.errors import UserError
from dimo_jax.evaluation import METRICS, controls, digit_cnn, features_of, manifold, score
from dimo_jax.evaluation.columns import COLUMNS
from dimo_jax.evaluation.frechet import frechet_distance


def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    return {name: (images[rows], data.target[rows]) for name, rows in split_indices(data.target).items()}


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Points whose sample mean and sample covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x = x - x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    return white @ np.linalg.cholesky(covariance).T + mean


def manifold_scores(samples, real, **options) -> dict[str, float]:
    return manifold.compute({"pixels": np.asarray(samples)}, {"pixels": np.asarray(real)}, **options)


def naive_manifold(samples: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """The four definitions point by point."""

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(point, points, radii):
        return [np.linalg.norm(point - p) < r for p, r in zip(points, radii, strict=True)]

    real_radii = [radius(real, i) for i in range(len(real))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    balls = np.array([inside(s, real, real_radii) for s in samples])
    return {
        "precision": np.mean([any(row) for row in balls]),
        "recall": np.mean([any(inside(r, samples, sample_radii)) for r in real]),
        "density": balls.sum() / (k * len(samples)),
        "coverage": np.mean([any(column) for column in balls.T]),
    }


def test_frechet_of_diagonal_gaussians():
    m, n = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    s, t = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    expected = np.sum((m - n) ** 2) + np.sum((np.sqrt(s) - np.sqrt(t)) ** 2)
    x, y = with_moments(m, np.diag(s), 200, 0), with_moments(n, np.diag(t), 150, 1)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    """In two dimensions tr (S T)^(1/2) = sqrt(tr(S T) + 2 sqrt(det S det T))."""
    s, t = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.5], [-1.5, 1.0]])
    cross = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s) * np.linalg.det(t)))
    expected = 25 + np.trace(s) + np.trace(t) - 2 * cross
    x, y = with_moments(np.array([3.0, 0.0]), s, 100, 0), with_moments(np.array([0.0, 4.0]), t, 80, 1)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_equal_and_of_degenerate_sets():
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert frechet_distance(x, x) < 1e-12
    assert frechet_distance(x, x[::-1]) < 1e-12
    x[:, 3:] = 0  # singular, as the corners of every digit are
    assert frechet_distance(x, x) < 1e-12
    assert frechet_distance(x, x + 2) == pytest.approx(32, rel=1e-6)
    with pytest.raises(UserError, match="given 1 and 50"):
        frechet_distance(x[:1], x)


def test_manifold_by_hand():
    """On a line, k = 1. Real 0 1 3 7: radii 1 1 2 4, so their balls are (-1,1) (0,2) (1,5) (3,11).

    Samples 0.5 1.5 4 20 lie in 2, 2, 2 and 0 of them; their radii are 1 1 2.5 16: balls (-.5,1.5) (.5,2.5) (1.5,6.5)
    (4,36), which hold all of the reference.
    """
    real, samples = np.array([[0.0], [1.0], [3.0], [7.0]]), np.array([[0.5], [1.5], [4.0], [20.0]])
    values = manifold_scores(samples, real, k=1)
    assert values == {"precision": 0.75, "recall": 1.0, "density": 1.5, "coverage": 1.0}
    values = manifold_scores(real, samples, k=1)  # the other way round, recall and precision change places
    assert (values["precision"], values["recall"]) == (1.0, 0.75)


def test_manifold_of_far_and_of_collapsed_samples():
    real = np.random.default_rng(0).normal(size=(40, 5))
    assert set(manifold_scores(real + 100, real).values()) == {0.0}
    collapsed = manifold_scores(np.repeat(real[:1], 40, axis=0), real)
    assert collapsed["precision"] == 1 and collapsed["recall"] == 0
    assert 0 < collapsed["coverage"] < 0.3
    with pytest.raises(UserError, match="k = 3 neighbours need more than 3 points: given 3 samples, 40 real"):
        manifold_scores(real[:3], real)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_is_the_naive_one_in_any_tiling_and_order(k, monkeypatch):
    rng = np.random.default_rng(k)
    real, samples = rng.normal(size=(31, 4)), 1.3 * rng.normal(size=(23, 4))
    expected = pytest.approx(naive_manifold(samples, real, k), abs=1e-12)
    assert manifold_scores(samples, real, k=k) == expected
    monkeypatch.setattr(manifold, "_TILE_ELEMENTS", 100)
    assert [len(tile) for _, tile in manifold.distance_tiles(real, samples)] == [4] * 7 + [3]
    shuffled = manifold_scores(rng.permutation(samples), rng.permutation(real), k=k)
    assert shuffled == expected


def test_score_runs_every_metric_and_names_what_is_missing():
    rng = np.random.default_rng(0)
    features = {
        "pixels": rng.random((20, 6)),
        "cnn": rng.random((20, 4)),
        "real_probability": np.array([0.5] * 4 + [0.51] * 16),
        "predicted": np.arange(20) % 10,
        "label": np.where(np.arange(20) < 5, 9, np.arange(20) % 10),
    }
    values = score(features, features)
    assert set(values) == set(COLUMNS)
    assert values["called_real"] == 0.8 and values["label_accuracy"] == 0.75
    assert values["pixel_fd"] < 1e-12 and values["recall"] == 1
    order = rng.permutation(20)
    assert score({k: v[order] for k, v in features.items()}, features) == pytest.approx(values, abs=1e-12)
    with pytest.raises(UserError, match="'frechet' needs the features cnn: given are pixels, label"):
        score({"pixels": features["pixels"], "label": features["label"]}, features)
    assert all(type(value) is float for value in values.values())
    assert all(metric.FEATURES for metric in METRICS.values())


def test_control_rows():
    data = digits()
    train, test = data["train"], data["test"]
    samples = (train[0][::-1][:30] + 0.01, np.arange(30) % 10)
    rows = {
        name: (images, labels) for name, images, labels in controls.rows(*train, *test, *samples, 3, num_samples=500)
    }
    assert list(rows) == [controls.HELD_OUT, controls.RESAMPLED, controls.INDEPENDENT, controls.COPIES]
    assert [len(images) for images, _ in rows.values()] == [len(test[0]), 500, 500, 30]
    assert all(len(images) == len(labels) for images, labels in rows.values())
    again = controls.rows(*train, *test, *samples, np.random.default_rng(3), num_samples=500)
    assert all(np.array_equal(rows[name][0], images) for name, images, _ in again)

    everything = {image.tobytes() for image in np.concatenate([train[0], test[0]])}
    resampled = {image.tobytes() for image in rows[controls.RESAMPLED][0]}
    assert resampled <= everything and len(resampled) < 500
    np.testing.assert_array_equal(rows[controls.COPIES][0], train[0][::-1][:30])
    np.testing.assert_array_equal(rows[controls.COPIES][1], samples[1])


def test_independent_pixels_keep_each_pixels_law_and_nothing_else():
    images = np.empty((300, 8, 8, 1), np.float32)
    images[:] = np.arange(300).reshape(-1, 1, 1, 1)  # within an image all pixels are equal
    labels = np.arange(300) % 3
    wanted = np.repeat([0, 2], 2000)
    shuffled = controls.independent_pixels(images, labels, wanted, np.random.default_rng(0))
    assert shuffled.dtype == np.float32
    np.testing.assert_array_equal(shuffled % 3, np.broadcast_to(wanted.reshape(-1, 1, 1, 1), shuffled.shape))
    assert abs(shuffled[:2000].mean() - images[labels == 0].mean()) < 1
    correlation = np.corrcoef(shuffled[:2000].reshape(2000, 64), rowvar=False)
    assert np.abs(correlation - np.eye(64)).max() < 0.15


def test_cnn_learns_a_little_in_a_few_steps_and_repeats():
    data = digits()
    network = digit_cnn.train(*data["train"], *data["test"], seed=1, num_steps=60)
    assert network.accuracies["held_out_accuracy"] > 0.5 and network.accuracies["held_out_joint_accuracy"] > 0.3
    images, labels = data["test"]
    features = features_of(images, labels, network.features)
    assert features["cnn"].shape == (len(images), 64) and features["pixels"].shape == (len(images), 64)
    assert features["pixels"].min() == 0 and features["pixels"].max() == 1
    assert np.mean(features["predicted"] == labels) == network.accuracies["held_out_accuracy"]
    assert np.all((0 <= features["real_probability"]) & (features["real_probability"] <= 1 + 1e-6))
    again = digit_cnn.train(*data["train"], *data["test"], seed=1, num_steps=60)
    assert again.accuracies == network.accuracies
    for name, layer in network.params.items():
        np.testing.assert_array_equal(layer["weight"], again.params[name]["weight"])


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cnn_is_a_sound_scorer(seed):
    data = digits()
    network = digit_cnn.train(*data["train"], *data["test"], seed=seed)
    assert network.accuracies["held_out_accuracy"] >= 0.975
    assert network.accuracies["held_out_joint_accuracy"] >= 0.94
    images, labels = (np.concatenate(parts) for parts in zip(*data.values(), strict=True))
    reference = features_of(images, labels, network.features)
    values = {
        name: score(features_of(*row, network.features), reference)
        for name, *row in controls.rows(*data["train"], *data["test"], *data["test"], seed)
    }
    assert values[controls.HELD_OUT]["called_real"] > 0.95 > 0.1 > values[controls.INDEPENDENT]["called_real"]
    assert values[controls.RESAMPLED]["cnn_fd"] < 0.02 * values[controls.INDEPENDENT]["cnn_fd"]
