"""Parity with the authors' outputs: task arithmetic, TIES, DARE, SLERP and averages. One row per case."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import merganser as mg
from merganser import kernels
from tests.golden.conftest import ROOT, State, assert_close

Load = Callable[[str], State]
MODELS = ("ft1", "ft2", "ft3")
D = 1712  # parameters of the golden model

TASK_VECTORS: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = [
    *((f"task_arithmetic/generic_sum_lambda{s:.4f}", MODELS, "task_arithmetic", {"scale": s}) for s in (0.3, 0.4, 1.0)),
    ("task_arithmetic/generic_negate_ft1_lambda1", ("ft1",), "task_arithmetic", {"weights": [-1]}),
    (
        "task_arithmetic/generic_analogy_1-2+3_lambda0.7",
        MODELS,
        "task_arithmetic",
        {"weights": [1, -1, 1], "scale": 0.7},
    ),
    ("mergelm/generic_average", MODELS, "average", {}),
    ("mergelm/generic_ta_0.3", MODELS, "task_arithmetic", {"scale": 0.3}),
    # this code keeps from the int(d r)-th smallest on: another count than the authors' for the same share
    *(
        (f"mergelm/generic_ties_mask{r}_lam1.0", MODELS, "ties", {"density": (D - int(D * r)) / D})
        for r in (0.7, 0.8, 0.9)
    ),
    *(
        (
            f"ties/generic_all_K{k}_dis-{how}_lam{scale}",
            MODELS,
            "ties",
            {"density": k / 100, "merge": how, "scale": scale},
        )
        for k, how, scale in (
            (5, "mean", 1),
            (10, "mean", 1),
            (20, "mean", 1),
            (20, "mean", 0.4),
            (20, "sum", 1),
            (20, "max", 1),
            (50, "mean", 1),
        )
    ),
    ("mergellm/generic_slerp_t0.5", ("ft1", "ft2"), "slerp", {"t": 0.5}),
]


def inputs(golden: Load, names: tuple[str, ...]) -> tuple[State, list[State]]:
    folder = "task_vectors/_inputs/generic"
    return golden(f"{folder}/base.safetensors"), [golden(f"{folder}/{name}.safetensors") for name in names]


@pytest.mark.parametrize(("file", "names", "method", "options"), TASK_VECTORS, ids=[row[0] for row in TASK_VECTORS])
def test_authors_outputs(golden: Load, file: str, names: tuple[str, ...], method: str, options: dict[str, Any]) -> None:
    base, models = inputs(golden, names)
    expected = {k: v for k, v in golden(f"task_vectors/{file}.safetensors").items() if not k.startswith("__")}
    assert_close(mg.merge(models, base=base, method=method, **options), expected, 1e-6)


@pytest.mark.parametrize("k", [5, 10, 20, 50])
def test_ties_without_the_head(golden: Load, k: int) -> None:
    base, models = inputs(golden, MODELS)
    for state in (base, *models):
        del state["lm_head.weight"]
    expected = golden(f"task_vectors/ties/generic_no_lm_head_K{k}_dis-mean_lam1.safetensors")
    merged = mg.merge(models, base=base, method="ties", density=k / 100)
    assert_close(merged, {name: expected[name] for name in base}, 1e-6)


def test_ties_keeps_exactly_what_the_authors_keep(golden: Load) -> None:
    base, models = inputs(golden, ("ft1",))
    expected = golden("task_vectors/ties/generic_all_K20_dis-mean_lam1.safetensors")
    merged = mg.merge(models, base=base, method="ties", density=0.2)
    kept = torch.cat([(merged[name] - base[name]).view(-1) != 0 for name in sorted(base)])
    assert torch.equal(kept, expected["__trimmed"][0] != 0)
    exact = mg.merge(models, base=base, method="ties", density=0.2, count="exact")
    assert sum(int((exact[name] != base[name]).sum()) for name in base) == int(D * 0.2)


def masks_from(golden: Load, file: str, monkeypatch: pytest.MonkeyPatch, models: tuple[str, ...]) -> State:
    """Let DARE use the masks that the authors' generator drew."""
    data = golden(f"task_vectors/dare/{file}.safetensors")

    def stored(seed: int, model: int, name: str, start: int, count: int, drop_rate: float) -> torch.Tensor:
        prefix = f"dropmask.{models[model]}." if len(models) > 1 else "dropmask."
        return (1 - data[prefix + name].view(-1)[start : start + count]).to(torch.uint8)

    monkeypatch.setattr(kernels, "drop_mask", stored)
    return {k.removeprefix("out."): v for k, v in data.items() if k.startswith("out.")}


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9, 0.99])
def test_dare_of_one_model(golden: Load, monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    base, models = inputs(golden, ("ft1",))
    expected = masks_from(golden, f"generic_single_ft1_p{p}", monkeypatch, ("ft1",))
    assert_close(mg.merge(models, base=base, method="dare", drop_rate=p), expected, 1e-6)


@pytest.mark.parametrize("p", [0.2, 0.9])
@pytest.mark.parametrize(
    ("name", "then", "density"),
    [
        ("average_merging", "average", 0.2),
        ("task_arithmetic", "task_arithmetic", 0.2),
        ("ties_merging", "ties", (D - int(D * 0.8)) / D),
    ],
)
def test_dare_then(
    golden: Load, monkeypatch: pytest.MonkeyPatch, p: float, name: str, then: str, density: float
) -> None:
    base, models = inputs(golden, MODELS)
    expected = masks_from(golden, f"generic_merge_{name}_p{p}", monkeypatch, MODELS)
    merged = mg.merge(models, base=base, method="dare", drop_rate=p, then=then, density=density)
    assert_close(merged, expected, 1e-6)


@pytest.mark.parametrize(("r", "scale"), [(0.5, 0.5), (0.8, 1.0)])
def test_ties_per_tensor(golden: Load, r: float, scale: float) -> None:
    """MergeLLM trims per tensor from the int(n r)-th smallest on, and elects zeros by the tensor's own majority."""
    base, models = inputs(golden, MODELS)
    expected = golden(f"task_vectors/mergellm/generic_ties_per_tensor_mask{r}_lam{scale}.safetensors")
    for name in base:
        n = base[name].numel()
        one = {name: base[name]}
        merged = mg.merge(
            [{name: model[name]} for model in models],
            base=one,
            method="ties",
            trim="tensor",
            density=(n - int(n * r)) / n,
            scale=scale,
        )
        assert_close(merged, {name: expected[name]}, 1e-6)


RESEARCH: dict[str, tuple[int, str, dict[str, Any]]] = {
    "simple_average": (3, "average", {}),
    "weighted_average": (3, "average", {"weights": [0.2, 0.3, 0.5]}),
    "task_arithmetic_0.3": (3, "task_arithmetic", {"scale": 0.3}),
    "ties_k20_sum_0.3": (3, "ties", {"merge": "sum", "scale": 0.3}),
    "ties_k20_mean_0.3": (3, "ties", {"scale": 0.3}),
    "ties_k20_max_0.3": (3, "ties", {"merge": "max", "scale": 0.3}),
    "ties_flat_k20_mean_1.0": (3, "ties", {}),
    "slerp_t0.5_n2": (2, "slerp", {}),
}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", RESEARCH)
def test_research_outputs(golden: Load, case: str, dtype: str) -> None:
    count, method, options = RESEARCH[case]
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(count)]
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method=method, **options)
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, 1e-8 if dtype == "f64" else 1e-4)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        ("average", "average", {}),
        ("task_arithmetic_lambda0.4", "task_arithmetic", {"scale": 0.4}),
        ("ties_top20_lambda0.7", "ties", {"scale": 0.7}),
    ],
)
def test_mats_baselines(golden: Load, case: str, method: str, options: dict[str, Any], dtype: str) -> None:
    data = golden("mats/mats_cg_golden.safetensors")
    kind = torch.float64 if dtype == "f64" else torch.float32

    def state(prefix: str) -> State:
        return {k.removeprefix(prefix): v.to(kind) for k, v in data.items() if k.startswith(prefix)}

    models = [state(f"in/model{i}/") for i in range(3)]
    expected = state(f"{dtype}/{case}/")
    assert_close(
        mg.merge(models, base=state("in/pre/"), method=method, **options), expected, 1e-5 if dtype == "f32" else 1e-8
    )


@pytest.mark.parametrize("case", ["linear_norm", "linear_bf16", "task_arithmetic", "slerp_t05", "slerp_gradient"])
def test_mergekit_recipes_with_the_same_semantics(golden: Load, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes whose methods mean the same here as in mergekit give its numbers as they are."""
    expected = golden(f"mergekit/outputs/{case}/model.safetensors")
    monkeypatch.chdir(ROOT / "mergekit")
    plan = mg.make_plan(mg.load_recipe(ROOT / "mergekit" / "configs" / f"{case}.yml"))
    merged = mg.to_memory(plan)
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, 1e-6 if "bf16" not in case else 1e-2)


def test_delta_statistics(golden: Load) -> None:
    if not ROOT.is_dir():
        pytest.skip("the golden data are not on this machine")
    known = json.loads((ROOT / "task_vectors/dare/generic_delta_stats.json").read_text())["stats"]
    base, models = inputs(golden, MODELS)
    from merganser.checkpoint import open_checkpoint
    from merganser.engine import Difference, compare

    for name, model in zip(MODELS, models, strict=True):
        found = compare(open_checkpoint(model), open_checkpoint(base), open_checkpoint(base))
        whole = Difference.total(list(found.values()))
        assert whole.norms[0] == pytest.approx(known[name]["l2"], rel=1e-6)
        assert whole.distance == pytest.approx(known[name]["l2"], rel=1e-6)
