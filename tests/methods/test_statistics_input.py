"""Statistics beside models: what fits, what does not, and what the errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.errors import MerganserError
from merganser.statistics import Statistics
from tests.conftest import Cli

State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(20, 6, generator=g),
        "model.layers.0.up.weight": torch.randn(8, 6, generator=g),
        "model.layers.0.up.bias": torch.randn(8, generator=g),
    }


def gram(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / 50


NAME = "model.layers.0.up.weight"
A, B = state(1), state(2)


def failure(statistics: list[Any] | None, method: str = "regmean", **options: Any) -> MerganserError:
    with pytest.raises(MerganserError) as caught:
        mg.merge([A, B], method=method, statistics=statistics, **options)
    return caught.value


def test_impossible_metrics_are_found_whatever_the_objective() -> None:
    good = torch.ones(8, 6)
    bad = good.clone()
    bad[2, 3] = -1
    for method, options in (("mats", {"objective": "diagonal"}), ("fisher", {}), ("ubgm", {})):
        error = failure([Statistics(fisher={NAME: f}) for f in (good, bad)], method, base=A, **options)
        assert (error.code, "negative" in error.message) == ("E0604", True)
    fishers = [Statistics(fisher={NAME: f}) for f in (bad, good, good)]
    assert failure(fishers, "ubgm", base=A).code == "E0604"
    blocks = [torch.eye(8), torch.diag(torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]))]
    blocks.append(torch.eye(8) + torch.triu(torch.ones(8, 8), 1))
    bias = NAME.replace("weight", "bias")
    for block in blocks[1:]:
        known = [Statistics(block={bias: b}) for b in (blocks[0], block)]
        assert failure(known, "mats", base=A, objective="block").code == "E0604"
    zero = [Statistics(gram={NAME: g}, output_gram={NAME: gram(8)}) for g in (gram(6), torch.zeros(6, 6))]
    assert failure(zero, "mats", base=A).code == "E0604"
    # a layer through which no gradient flows is insensitive, not impossible: the other model decides on it
    dead = [Statistics(gram={NAME: gram(6)}, output_gram={NAME: g}) for g in (gram(8), torch.zeros(8, 8))]
    merged = mg.merge([A, B], base=state(3), method="mats", statistics=dead, iterations=200, tolerance=1e-7)
    assert torch.allclose(merged[NAME], A[NAME], atol=1e-3)


def test_a_gram_matrix_that_is_diagonal_in_one_model_alone() -> None:
    square = {"up.weight": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))}
    known = [Statistics(gram={"up.weight": g}) for g in (gram(6), torch.ones(6))]
    with pytest.raises(MerganserError, match="E0604"):
        mg.merge([square, square], method="regmean", statistics=known)


def test_an_undamped_optimum_is_an_override_away() -> None:
    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, 5 + i)}) for i in range(2)]
    options: dict[str, Any] = {"base": A, "statistics": known, "method": "mats", "damping": 0.0}
    for solver in ("exact", "cg"):
        with pytest.raises(MerganserError, match="undamped=true"):
            mg.merge([A, B], **options, solver=solver)
        mg.merge([A, B], **options, solver=solver, undamped=True, tolerance=0.5)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_common_factor_of_the_weights_changes_nothing(recipe: str) -> None:
    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, 5 + i)}) for i in range(2)]
    base = state(3)
    options: dict[str, Any] = {"base": base, "statistics": known, "method": "mats", "recipe": recipe, "iterations": 2}
    one = mg.merge([A, B], **options, weights=[1.0, 1.0])
    for factor in (0.25, 8.0):
        other = mg.merge([A, B], **options, weights=[factor, factor])
        assert all(torch.allclose(other[name], value, atol=1e-5) for name, value in one.items())


def test_reports_say_how_every_system_was_solved(tmp_path: Path, cli: Cli) -> None:
    folders = []
    for number, tensors in enumerate((A, B)):
        folders.append(tmp_path / f"{number}")
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text('{"model_type": "made-up"}')
        Statistics(gram={NAME: gram(6, number)}).save(tmp_path / f"{number}.safetensors")
    files = [word for number in range(2) for word in ("--statistics", tmp_path / f"{number}.safetensors")]
    for method, more in (
        ("regmean", files),
        ("actmat", []),
        ("wudi", ["--set", "solver=gradient", "--set", "iterations=3"]),
    ):
        command = ["merge", "-m", method, *folders, *more, "-o", tmp_path / method, "--json"]
        found = cli(*command, *([] if more is files else ["--base", folders[0]])).succeeded().json["report"][NAME]
        assert {"status", "iterations", "residual", "largest", "seconds"} <= set(found)
        assert found["largest"] > 0
        if method != "wudi":
            assert 0 < found["smallest"] <= found["largest"]


def test_statistics_are_asked_for_with_the_command_that_makes_them() -> None:
    error = failure(None)
    assert error.code == "E0308"
    assert "merganser collect" in error.fix
    assert "kfac" in failure(None, "mats", base=A).fix


def test_statistics_of_another_shape_name_the_layer() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics(gram={NAME: gram(5)})])
    assert (error.code, error.places[0].tensor) == ("E0418", NAME)


def test_statistics_of_unknown_layers_are_refused_with_the_nearest_name() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics(gram={NAME.replace("up", "pu"): gram(6)})])
    assert error.code == "E0418"
    assert NAME in error.why


def renamed(tensors: State, old: str, new: str) -> State:
    return {new + name.removeprefix(old): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"), [("", "body."), ("model.", ""), ("", "wrapper.body.")], ids=["wrapped", "bare", "wrapped twice"]
)
def test_statistics_are_matched_although_all_names_have_another_prefix(old: str, new: str, tmp_path: Path) -> None:
    from merganser.engine import make_plan
    from merganser.recipe import simple_recipe

    def known(number: int) -> Statistics:
        inputs, outputs = {NAME: gram(6, number)}, {NAME: gram(8, number)}
        return Statistics(gram=renamed(inputs, old, new), output_gram=renamed(outputs, old, new))

    plain = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i)}) for i in range(2)]
    truth = mg.merge([A, B], base=state(0), method="mats", statistics=plain)
    other = [known(i) for i in range(2)]
    merged = mg.merge([A, B], base=state(0), method="mats", statistics=[plain[0], other[1]])
    assert all(torch.equal(value, truth[name]) for name, value in merged.items())
    plan = make_plan(simple_recipe([A, B], base=state(0), method="mats", statistics=other))
    assert any("matched" in text for text in plan.warnings)


def test_a_prefix_must_fit_every_name() -> None:
    odd = Statistics(gram={f"body.{NAME}": gram(6), "head.weight": gram(6)})
    assert failure([odd, odd]).code == "E0418"
    assert failure([Statistics(gram={"weight": gram(6)})] * 2).code == "E0418"


def test_layers_that_only_one_model_has_statistics_of_are_named() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics()])
    assert (error.code, error.places[0].tensor) == ("E0418", NAME)


def test_a_negative_fisher_and_values_that_are_not_finite() -> None:
    good = Statistics(fisher={NAME: torch.ones(8, 6)})
    assert failure([good, Statistics(fisher={NAME: -torch.ones(8, 6)})], "fisher").code == "E0604"
    assert failure([good, Statistics(fisher={NAME: torch.full((8, 6), torch.nan)})], "fisher").code == "E0603"


def test_statistics_and_inits_that_nothing_uses_are_refused() -> None:
    some = [Statistics(gram={NAME: gram(6)})] * 2
    assert failure(some, "average").code == "E0305"
    assert failure(some, "regmean", init="average").code == "E0305"


def test_a_tied_head_may_be_described_under_its_second_name(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        known = Statistics(gram={NAME: gram(6, number), "lm_head.weight": gram(6, number)})
        known.save(tmp_path / f"{number}.safetensors")
        files.append(tmp_path / f"{number}.safetensors")
    merged = mg.merge([A, B], method="regmean", statistics=files)
    assert list(merged) == list(A)


def test_a_singular_system_keeps_the_mean_where_no_model_sees_anything() -> None:
    flat = torch.zeros(6, 6)
    flat[:3, :3] = gram(3)
    merged = mg.merge([A, B], method="regmean", statistics=[Statistics(gram={NAME: flat})] * 2, off_diagonal=1.0)
    assert torch.allclose(merged[NAME], (A[NAME] + B[NAME]) / 2, atol=1e-5)


def test_the_report_says_how_every_solve_ended() -> None:
    from merganser.engine import execute, make_plan
    from merganser.engine._merge import _MemorySink
    from merganser.recipe import simple_recipe

    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i)}) for i in range(2)]
    plan = make_plan(simple_recipe([A, B], base=state(0), method="mats", statistics=known))
    report = execute(plan, _MemorySink(plan)).report
    assert set(report) == {NAME}
    assert report[NAME]["status"] == "converged"
    assert report[NAME]["residual"] < 1e-4
    assert report[NAME]["iterations"] <= 15


def test_an_exact_solution_without_damping_is_refused() -> None:
    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i)}) for i in range(2)]
    error = failure(known, "mats", base=state(0), damping=0.0)
    assert error.code == "E0312"
    assert "damping" in error.fix


def damaged(kind: str) -> torch.Tensor:
    matrix = gram(6)
    if kind == "asymmetric":
        matrix[0, 1] += 1
    elif kind == "indefinite":
        matrix -= 2 * torch.linalg.eigvalsh(matrix)[-1] * torch.eye(6)
    elif kind == "slightly indefinite":
        values, vectors = torch.linalg.eigh(matrix)
        values[0] = -1e-3 * values.sum()
        matrix = vectors @ values.diag() @ vectors.T
    elif kind == "zero":
        matrix.zero_()
    else:
        matrix[0, 0] = float("nan")
    return matrix


@pytest.mark.parametrize("method", ["regmean", "mats"])
@pytest.mark.parametrize("kind", ["asymmetric", "indefinite", "slightly indefinite", "zero", "nan"])
def test_a_matrix_that_is_no_gram_matrix_names_its_layer(kind: str, method: str) -> None:
    given = [Statistics(gram={NAME: gram(6)}), Statistics(gram={NAME: damaged(kind)})]
    options = {"objective": "gram", "base": A} if method == "mats" else {}
    error = failure(given, method, **options)
    assert error.code == ("E0603" if kind == "nan" else "E0604")
    assert (error.places[0].tensor, error.places[0].file) == (NAME, "statistics[1]")


def test_output_factors_are_checked_too() -> None:
    good = Statistics(gram={NAME: gram(6)}, output_gram={NAME: gram(8)})
    bad = Statistics(gram={NAME: gram(6)}, output_gram={NAME: gram(8) - 9 * torch.eye(8)})
    assert failure([good, bad], "mats", base=A).code == "E0604"


@pytest.mark.parametrize("rank", [1, 3])
def test_gram_matrices_of_few_inputs_are_taken(rank: int) -> None:
    """Singular, and indefinite by rounding alone."""
    x = torch.randn(rank, 6, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 3, 6)
    given = [Statistics(gram={NAME: x.T @ x}), Statistics(gram={NAME: gram(6)})]
    for method in ("regmean", "mats"):
        options: dict[str, Any] = {"objective": "gram", "base": A} if method == "mats" else {}
        merged = mg.merge([A, B], method=method, statistics=given, **options)
        assert all(torch.isfinite(value).all() for value in merged.values())


# --- what was not solved ---------------------------------------------------------------------------------------------

BASE = state(3)
KFAC = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i + 5)}) for i in range(2)]


def test_systems_that_are_not_solved_are_an_error_if_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    error = failure(KFAC, "mats", base=BASE, iterations=1, require_convergence=True)
    assert (error.code, error.places[0].tensor) == ("E0605", NAME)
    mg.merge([A, B], base=BASE, method="mats", statistics=KFAC, iterations=1)
    assert "1 of 1 linear systems did not reach their tolerance in 1 iterations" in caplog.text
    caplog.clear()
    mg.merge(
        [A, B], base=BASE, method="mats", statistics=KFAC, iterations=200, tolerance=1e-4, require_convergence=True
    )
    assert not caplog.text


def test_the_command_line_warns_and_is_strict(tmp_path: Path, cli: Cli) -> None:
    for name, weights in (("base", BASE), ("a", A), ("b", B)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    for index, statistics in enumerate(KFAC):
        statistics.save(tmp_path / f"s{index}.safetensors")
    command = ["merge", "-m", "mats", "-s", "iterations=1", "--base", tmp_path / "base.safetensors"]
    command += ["--statistics", tmp_path / "s0.safetensors", "--statistics", tmp_path / "s1.safetensors"]
    command += [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = cli(*command, "-o", tmp_path / "out.safetensors").succeeded()
    assert "did not reach their tolerance" in done.err
    cli(*command, "-o", tmp_path / "strict.safetensors", "--strict").failed("E0605", NAME)
    assert not (tmp_path / "strict.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"preconditioner": "none"}, {"recipe": "paper"}], ids=str)
def test_the_identity_needs_no_statistics_and_gives_the_mean(options: dict[str, Any]) -> None:
    merged = mg.merge([A, B], base=state(0), method="mats", objective="identity", **options)
    for name, value in merged.items():
        assert torch.allclose(value, (A[name] + B[name]) / 2, atol=1e-6)


def test_statistics_of_another_model_are_refused() -> None:
    """Two models of one shape whose statistics are given in the wrong order."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)))
    known = [mg.collect(model, [torch.randn(16, 4)], ["gram"]) for model in models]
    states = [{k: v.detach() for k, v in model.state_dict().items()} for model in models]
    mg.merge(states, method="regmean", statistics=known)
    mg.merge([{k: v.bfloat16() for k, v in s.items()} for s in states], method="regmean", statistics=known)
    with pytest.raises(MerganserError, match="other weights") as caught:
        mg.merge(states, method="regmean", statistics=known[::-1])
    assert (caught.value.code, caught.value.places[0].tensor) == ("E0418", "0.weight")


def test_an_option_beside_the_papers_recipe_stands_even_with_its_default_value() -> None:
    method = mg.create_method("mats", {"recipe": "paper", "iterations": 15, "damping": 0.1})
    assert (method.iterations, method.damping) == (15, 0.1)  # type: ignore[attr-defined]
    assert (method.normalize, method.preconditioner) == ("none", "none")  # type: ignore[attr-defined]
    assert mg.create_method("mats", {"recipe": "paper"}).iterations == 100  # type: ignore[attr-defined]
    assert mg.create_method("mats", {"recipe": "paper", "keep": (2, 4)}).iterations == 4  # type: ignore[attr-defined]


def test_a_misspelt_start_is_pointed_out() -> None:
    known = [Statistics(gram={NAME: gram(6)})] * 2
    error = failure(known, "mats", base=A, objective="gram", init="task_aritmetic")
    assert (error.code, "task_arithmetic" in error.fix) == ("E0304", True)
    assert failure(known, "mats", base=A, objective="gram", init="./somewhere").code == "E0401"
