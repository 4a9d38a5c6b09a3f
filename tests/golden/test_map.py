"""MAP's surrogates, fronts and spherical coordinates beside the authors'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from merganser import pareto
from merganser.pareto._surrogate import Array
from tests.golden.conftest import State

Load = Callable[[str], State]
ACTIVATED: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.logaddexp(0, z),
}


def arrays(golden: Load, name: str) -> dict[str, Array]:
    return {key: value.numpy().astype(np.float64) for key, value in golden(f"curvature/map/{name}.safetensors").items()}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("activation", pareto.ACTIVATIONS)
def test_surrogates(golden: Load, n: int, activation: str) -> None:
    """The authors' fits stop at a relative tolerance of 1e-8; ours has no larger error, and no slope is left."""
    data = arrays(golden, "surrogate_and_front")
    points, scores, theirs = data[f"n{n}.C"], data[f"n{n}.Y_{activation}"], data[f"n{n}.authors_{activation}"]
    found = pareto.fit(points, scores, activation)
    assert np.abs(found.parameters - theirs).max() < 2e-5
    act, phi = ACTIVATED[activation], pareto.features(points)
    residual = scores - found.predict(points)
    assert ((residual**2).sum(0) <= ((scores - act(phi @ theirs.T)) ** 2).sum(0) + 1e-15).all()
    step = 1e-6
    for task in range(n):
        for direction in np.eye(phi.shape[1]):
            moved = [
                ((scores[:, task] - act(phi @ (found.parameters[task] + sign * step * direction))) ** 2).sum()
                for sign in (1, -1)
            ]
            assert abs(moved[0] - moved[1]) / (2 * step) < 1e-8


@pytest.mark.parametrize("n", [2, 3])
def test_the_closed_form(golden: Load, n: int) -> None:
    data = arrays(golden, "surrogate_and_front")
    found = pareto.fit(data[f"n{n}.C"], data[f"n{n}.Y_identity"], "identity")
    np.testing.assert_allclose(found.parameters, data[f"n{n}.lstsq_identity"], atol=1e-12)
    logits = np.log(data[f"n{n}.Y_sigmoid"]) - np.log1p(-data[f"n{n}.Y_sigmoid"])
    start = pareto.fit(data[f"n{n}.C"], logits, "identity")
    np.testing.assert_allclose(start.parameters, data[f"n{n}.lstsq_logit"], atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_predictions_and_quadratic_forms(golden: Load, n: int) -> None:
    data = arrays(golden, "surrogate_and_front")
    ones = np.ones(n)
    sigmoid = pareto.Surrogate(data[f"n{n}.authors_sigmoid"], "sigmoid", ones)
    np.testing.assert_allclose(sigmoid.predict(data[f"n{n}.C"]), data[f"n{n}.authors_predict_sigmoid"], atol=1e-12)
    identity = pareto.Surrogate(data[f"n{n}.authors_identity"], "identity", ones)
    for task in range(n):
        A, b, e = identity.quadratic(task)
        np.testing.assert_allclose(A, data[f"n{n}.A{task}"], atol=1e-12)
        np.testing.assert_allclose(b, data[f"n{n}.b{task}"], atol=1e-12)
        assert e == pytest.approx(float(data[f"n{n}.e{task}"][0]), abs=1e-12)
        points = data[f"n{n}.C"]
        form = 0.5 * np.einsum("ni,ij,nj->n", points, A, points) + points @ b + e
        np.testing.assert_allclose(identity.predict(points)[:, task], form, atol=1e-12)


@pytest.mark.parametrize("how", ["grid", "nsga3"])
def test_the_front_is_near_the_analytic_one(golden: Load, how: str) -> None:
    """The authors' own distance is 0.034 on the mean and 0.13 at most."""
    data = arrays(golden, "surrogate_and_front")
    surrogate = pareto.Surrogate(data["pf.params"], "sigmoid", np.ones(2))
    if how == "grid":
        points = pareto.grid_points(2)
        points = points[pareto.non_dominated(surrogate.predict(points))]
    else:
        points = pareto.nsga3(surrogate.predict, 2, np.random.default_rng(0))
    gaps = np.linalg.norm(points[:, None] - data["pf.analytic_decision"][None], axis=2)
    assert gaps.min(axis=1).mean() < 0.012
    assert gaps.min(axis=1).max() < 0.05
    scores = surrogate.predict(points)
    between = np.linalg.norm(data["pf.analytic_points"][:, None] - scores[None], axis=2)
    assert between.min(axis=1).max() < 0.03  # and covers it
    for score in scores:
        assert not ((scores >= score).all(axis=1) & (scores > score).any(axis=1)).any()
    # no point of the analytic front beats one of ours by more than the grid's coarseness
    beaten = (data["pf.analytic_points"][:, None] > scores[None] + 2e-3).all(axis=2)
    assert not beaten.any()
    known = pareto.Front(("a", "b"), ("x", "y"), (1.0, 1.0), points, scores, points, scores, surrogate, np.eye(2))
    np.testing.assert_allclose(points[known.pick()], [2 / 3, 2 / 3], atol=0.02)


def test_spherical_coordinates(golden: Load) -> None:
    data = arrays(golden, "bayesian_helpers")
    radii, angles = pareto.to_spherical(data["C"])
    np.testing.assert_allclose(radii, data["r"], atol=1e-12)
    np.testing.assert_allclose(angles, data["phi"], atol=1e-12)
    np.testing.assert_allclose(pareto.from_spherical(radii, angles), data["back"], atol=1e-12)


def test_the_softmax_over_bins(golden: Load) -> None:
    from merganser.pareto._sampling import _softmax

    golden("curvature/map/bayesian_helpers.safetensors")
    np.testing.assert_allclose(
        _softmax(np.array([0.1, 0.3])), [0.05431326613264065, 0.9456867338673594], atol=1e-12
    )  # a bin without points is not among them: its share is zero
