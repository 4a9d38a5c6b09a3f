"""Surrogates, samples and fronts by their invariants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser import pareto
from merganser.errors import MerganserError
from merganser.pareto._surrogate import Array


@given(st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_not_dominated(tasks: int, count: int, seed: int) -> None:
    """Beside the definition, on scores with many ties."""
    scores = np.random.default_rng(seed).integers(0, 6, (count, tasks)).astype(float)
    kept = pareto.non_dominated(scores).tolist()
    expected = []
    for index, row in enumerate(scores):
        beaten = ((scores >= row).all(axis=1) & (scores > row).any(axis=1)).any()
        copied = (scores[:index] == row).all(axis=1).any()
        if not beaten and not copied:
            expected.append(index)
    assert kept == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_grids_fit_in_memory(size: int) -> None:
    points = pareto.grid_points(size)
    assert points.shape[1] == size
    assert len(points) <= 80_000
    assert {tuple(point) for point in np.eye(size)} <= {tuple(point) for point in points}


@pytest.mark.parametrize(("size", "count"), [(1, 6), (2, 12), (2, 200), (3, 20), (6, 56)])
def test_samples(size: int, count: int) -> None:
    rng = np.random.default_rng(0)
    points = pareto.sample_points(size, count, rng, isotropic=0.2, onehot=0.2)
    assert points.shape == (count, size)
    assert points.min() >= 0
    assert points.max() <= 1
    assert {tuple(point) for point in np.eye(size)} <= {tuple(point) for point in points}
    assert len({tuple(point) for point in points}) == count
    if size > 1:
        assert (np.ptp(points, axis=1) < 1e-12).sum() == round(0.2 * (count - size)) // 2
    if (size, count) != (2, 200):  # where the grid suffices
        assert np.linalg.matrix_rank(pareto.features(points)) == (size + 1) * (size + 2) // 2
    again = pareto.sample_points(size, count, np.random.default_rng(0), isotropic=0.2, onehot=0.2)
    assert np.array_equal(points, again)


def test_spherical_coordinates_of_any_sign() -> None:
    points = np.random.default_rng(0).normal(size=(50, 5))
    assert np.allclose(pareto.from_spherical(*pareto.to_spherical(points)), points)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_new_points_go_where_the_error_is(size: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.random((200, size))
    near = points[:, 0] / np.linalg.norm(points, axis=1) > 0.9
    found = pareto.uncertain_points(points, np.where(near, 1.0, 0.01), 300, rng)
    radii = np.linalg.norm(found, axis=1)
    assert radii.min() >= 0.2
    assert radii.max() <= 0.8
    assert found.min() >= 0
    shares = [(x[:, 0] / np.linalg.norm(x, axis=1) > np.cos(np.pi / 4)).mean() for x in (found, points)]
    assert shares[0] > shares[1] + 0.1


@pytest.mark.parametrize(("objectives", "most", "count"), [(1, 10, 1), (2, 100, 100), (3, 100, 91), (4, 14, 10)])
def test_reference_points(objectives: int, most: int, count: int) -> None:
    points = pareto.reference_points(objectives, most)
    assert points.shape == (count, objectives)
    assert np.allclose(points.sum(axis=1), 1)
    assert points.min() >= 0
    assert len({tuple(point) for point in points}) == count


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_an_evolved_front_of_a_known_problem(tasks: int) -> None:
    """The score of task t is minus the squared distance from corner t: the front is the corners' convex hull."""

    def score(points: Array) -> Array:
        distances: Array = ((points[:, None] - np.eye(5)[None, :tasks]) ** 2).sum(axis=2)
        return -distances

    wanted = np.array([[0.3, 0.1, 0.1, 0.2, 0.3]])[:, :tasks]
    points = pareto.nsga3(score, 5, np.random.default_rng(1), population=60, generations=80, weights=wanted)
    assert len(points) <= 121
    assert len(pareto.non_dominated(score(points))) == len(points)
    assert np.abs(points.sum(axis=1) - 1).mean() < 0.12
    assert points[:, tasks:].mean() < 0.02 if tasks < 5 else True
    assert np.abs(score(points).max(axis=0)).max() < 1e-6  # each corner is reached
    rows = np.concatenate([wanted / wanted.sum(), np.random.default_rng(0).dirichlet(np.ones(tasks), 20)])
    for number, weights in enumerate(rows):
        target = np.zeros(5)
        target[:tasks] = weights  # the best point by these weights
        assert (score(points) @ weights).max() > (score(target[None]) @ weights)[0] - (0.1 if number else 1e-3)


@given(st.sampled_from(pareto.ACTIVATIONS), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_what_a_surrogate_made_is_found_again(activation: str, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    unknowns = (size + 1) * (size + 2) // 2
    points = rng.random((3 * unknowns, size))
    true = pareto.Surrogate(rng.normal(size=(2, unknowns)), activation, np.ones(2))
    found = pareto.fit(points, true.predict(points), activation)
    there = rng.random((50, size))
    assert np.allclose(found.predict(there), true.predict(there), atol=1e-6)


def test_minus_losses_are_fitted_as_losses() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((20, 2))
    losses = pareto.Surrogate(rng.normal(size=(2, 6)), "softplus", np.ones(2)).predict(points)
    mixed = losses * np.array([1.0, -1.0])
    found = pareto.fit(points, mixed, "softplus")
    assert found.sign.tolist() == [1.0, -1.0]
    assert np.allclose(found.predict(points), mixed, atol=1e-8)


def test_scores_at_the_edge_of_their_range() -> None:
    points = np.random.default_rng(0).random((30, 2))
    scores = np.stack([(points[:, 0] > 0.5).astype(float), np.zeros(30)], axis=1)
    for activation in ("sigmoid", "softplus"):
        found = pareto.fit(points, scores, activation)
        assert np.isfinite(found.predict(points)).all()
        assert ((found.predict(points)[:, 0] > 0.5) == (points[:, 0] > 0.5)).mean() > 0.9


@pytest.mark.parametrize(("activation", "value"), [("sigmoid", 1.5), ("sigmoid", -0.1)])
def test_scores_out_of_range(activation: str, value: float) -> None:
    with pytest.raises(MerganserError, match="activation=sigmoid") as caught:
        pareto.fit(np.random.default_rng(0).random((9, 2)), np.full((9, 1), value), activation)
    assert caught.value.code == "E0201"
    with pytest.raises(MerganserError, match="losses"):
        pareto.fit(np.random.default_rng(0).random((2, 2)), np.array([[1.0], [-1.0]]), "softplus")


def make_front(tasks: int) -> pareto.Front:
    rng = np.random.default_rng(0)
    sampled = rng.random((20, 2))
    true = pareto.Surrogate(rng.normal(size=(tasks, 6)), "identity", np.ones(tasks))
    points = pareto.grid_points(2)
    points = points[pareto.non_dominated(true.predict(points))]
    names = tuple(f"t{t}" for t in range(tasks))
    ones = (1.0,) * tasks
    return pareto.Front(
        ("a", "b"), names, ones, points, true.predict(points), sampled, true.predict(sampled), true, np.eye(2)
    )


def test_a_long_front_is_recorded_in_part() -> None:
    front = make_front(3)
    assert len(front) > 200
    record: dict[str, Any] = front.record()
    scores = np.array(record["front"]["scores"])
    assert (len(scores), record["front"]["size"]) == (200, len(front))
    assert np.array_equal(scores.max(axis=0), front.scores.max(axis=0))
    assert record["r2"] == pytest.approx(dict.fromkeys(front.tasks, 1.0))


def test_preferences_pick() -> None:
    front = make_front(3)
    assert front.pick([1, 0, 0]) == front.scores[:, 0].argmax()
    assert front.pick() == front.scores.sum(axis=1).argmax()
    for wrong in ([1.0], [1, 1, -1], [0, 0, 0]):
        with pytest.raises(MerganserError, match="E0306"):
            front.pick(wrong)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
def test_pictures(tasks: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = make_front(tasks).plot(tmp_path / "front.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MerganserError, match=r"merganser\[report\]") as caught:
        make_front(2).plot(tmp_path / "front.png")
    assert caught.value.code == "E0704"
