"""What every method must hold. The table is the registry: a new method is tested by being there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.engine import LocalThreads, execute, make_plan, resolve
from merganser.engine._merge import _MemorySink
from merganser.errors import MerganserError
from merganser.methods import all_methods, create_method
from merganser.recipe import simple_recipe
from merganser.statistics import TABLES, Statistics

State = dict[str, torch.Tensor]

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "average": [{"normalize": False, "weights": [0.5, 0.25]}],
    "task_arithmetic": [{"scale": 0.4}],
    "slerp": [{"t": 0.3}],
    "ties": [
        {"trim": "tensor", "count": "exact", "merge": "sum"},
        {"count": "exact", "merge": "max", "zero_sign": "positive", "density": [0.1, 0.6]},
    ],
    "dare": [
        {"drop_rate": 0.5},
        {"drop_rate": 0.3, "rescale": "l1", "then": "ties"},
        {"drop_rate": [0.2, 0.7], "rescale": "none", "then": "average"},
        {"drop_rate": 0.2, "rescale": "l1", "then": {"method": "della", "density": 0.6, "rescale": "l1"}},
    ],
    "mats": [
        {"objective": "gram", "solver": "exact"},
        {"objective": "diagonal", "damp": "output"},
        {"recipe": "paper", "off_diagonal": 0.9},
    ],
    "tact": [{"keep": 0.3}],
    "magmax": [{"scale": 0.5, "weights": [1.0, 0.5]}],
    "consensus": [{"threshold": [0.2, 0.6], "agreement": 1}],
    "model_stock": [{"filter_wise": True}, {"pairs": "angle", "clip": True, "weights": [1.0, 3.0]}],
    "breadcrumbs": [
        {"density": [0.3, 0.5], "gamma": 0.05, "election": "ties", "rescale": "l1"},
        {"density": 0.4, "gamma": 0.1, "election": "ties", "merge": "sum", "count": "mergellm"},
        {"merge": "mean", "gamma": 0.0, "scale": 0.5},
    ],
    "lines": [
        {"alpha": 0.3, "beta": 0.4, "layers": 4},
        {"of": "ties", "scale": 0.7},
        {"of": {"method": "della", "election": "ties"}, "beta": -0.2},
        {"of": "actmat"},
    ],
    "sce": [{"select": 0.3, "weights": [1.0, 2.0]}],
    "della": [
        {"density": [0.3, 0.6], "epsilon": 0.2, "election": "ties", "rescale": "l1"},
        {"density": 1.0, "election": "ties", "merge": "sum", "rescale": "none"},
    ],
    "graft": [{"density": 0.3, "scale": 0.5}, {"mask": {"model.layers.0.norm.weight": torch.arange(40) % 2 == 0}}],
    "opcm": [{"alpha": 0.9, "keep_diagonal": True, "scale": 0.5}, {"alpha": 1.0, "weights": [2.0, -1.0]}],
    "emr": [{"rescaler": "means", "weights": [0.5, 1.5]}],
    "widen": [{"threshold": 1.5, "score": 0.7, "direction": "cosine", "weights": [0.5, 2.0]}],
    "pcb": [{"variant": "vision", "scale": 1.2}, {"variant": "es", "density": 0.7}],
    "darex": [
        {"q": [0.2, 0.4], "then": "ties", "scale": 0.7},
        {"drop_rate": 0.95, "eta": 3.0, "weights": [1.0, 0.5]},
        {"drop_rate": [0.5, 1.0], "eta": 0.5, "prune": "blocks", "then": {"method": "average"}},
        {"tune": "eta", "drop_rate": 0.99, "high": 0.3, "step": 0.1},
    ],
    "tsv": [{"lossless": True}],
    "iso_cts": [{"common": 0.5, "scale": 1.5}],
    "knots": [{"density": 0.5, "scale": 0.6}, {"then": {"method": "ties", "count": "exact", "merge": "sum"}}],
    "svc": [
        {"alpha": 0.1, "of": {"method": "ties", "count": "exact"}, "scale": 1.2},
        {"of": "tsv"},
        {"of": {"method": "knots", "scale": 0.6}},
    ],
    "dc_merge": [{"density": 0.02, "rank": 8, "smoothing": "linear"}],
    "hetero_average": [
        {"ratios": [0.2, 0.5, 0.8], "convention": "post"},
        {"logits": [0.3, -0.2, 0.1], "alpha": 0.4, "tensors": "linear"},
        {"alpha": 0.3},
    ],
    "learned_soup": [{"by": "layer", "steps": 3, "weights": [0.5, 0.25]}, {"by": "global", "lr": 0.2}],
    "sparse_soup": [{"greedy": True}, {"masks": "union", "weights": [0.5, 0.25]}],
    "map": [{"samples": 8, "rounds": 1, "round_points": 3, "front": "nsga3", "generations": 5, "weights": [0.5, 2]}],
    "fisher": [{"normalize": False, "floor_on": "target", "floor": 1e-3}],
    "nuslerp": [
        {"weights": [0.3, 0.7], "scale": 0.5},
        {"nuslerp_flatten": False, "weights": [0.3, 0.7]},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{"scale": 0.7, "weights": [0.5, 1.5]}],
    "karcher": [{"max_iter": 3, "tol": 0.0, "scale": 0.5}],
    "nearswap": [{"t": 0.05, "scale": 0.5}],
    "arcee_fusion": [{"scale": 0.5}],
    "ram": [{"epsilon": 0.1, "scale": 0.5}],
    "ramplus_tl": [{"epsilon": 0.1, "r": 0.5, "alpha": 3.0}],
    "checkpoint_average": [{"anchor": 0.02, "weights": [1.0, 3.0]}],
    "lawa": [{"k": 1, "stride": 2}],
    "ema": [{"beta": 0.5, "debias": True, "scale": 0.5}],
    "mwa": [
        {"metric": [2.0, 1.5], "penalty": 3.0},
        {"metric": [0.2, 0.7], "direction": "higher", "family": "minmax"},
        {"metric": [2.0, 1.5], "family": "exp"},
    ],
    "variance_corrected": [{"target": "conservative", "gamma": 0.3, "vectors": True, "eps": 1e-4}],
    "flag": [{"rank": 2, "iterations": 3, "penalty": 1.0, "rescale": "norm"}],
}
"""Options beside the defaults. Every registered method is tested with its defaults by being there."""

AVERAGES = [
    "average",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "checkpoint_average",
    "lawa",
    "ema",
    "mwa",
    "variance_corrected",
]
"""Methods that need no base, and of which copies of one model return it."""


CASES = [
    (name, options)
    for name in sorted({cls.name for cls in all_methods().values() if "data" not in cls.needs})
    for options in ({}, *VARIANTS.get(name, ()))
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]


WEIGHTED = [
    (name, options)
    for name, options in CASES
    if "weights" not in options and (name, options) not in (("lawa", VARIANTS["lawa"][0]), ("map", {}))
    if options.get("family") != "minmax"
]
"""Cases without weights, which could have some. Of two models the last, and the better one, may be all that counts."""


def test_variants_are_of_registered_methods() -> None:
    assert set(VARIANTS) <= set(all_methods())


def make_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(300, 40, generator=g).to(dtype),
        "model.layers.0.mlp.up_proj.weight": torch.randn(160, 130, generator=g).to(dtype),
        "model.layers.0.mlp.up_proj.bias": torch.randn(160, generator=g).to(dtype),
        "model.layers.0.conv.weight": torch.randn(4, 3, 3, 3, generator=g).to(dtype),
        "model.layers.0.three.weight": torch.randn(4, 3, 5, generator=g).to(dtype),
        "model.layers.0.norm.weight": torch.randn(40, generator=g).to(dtype),
        "model.layers.0.empty": torch.zeros(0, 4, dtype=dtype),
        "logit_scale": torch.randn((), generator=g).to(dtype),
    }


BASE = make_state(0)


def evidence(state: State, seed: int) -> Statistics:
    """Statistics of every kind for a model's matrices, and a Fisher for everything."""
    g = torch.Generator().manual_seed(seed)
    fisher = {k: torch.randn(v.shape, generator=g).square() for k, v in state.items()}
    matrices = {k: v for k, v in state.items() if v.dim() == 2 and v.numel()}
    grams, outputs, means = {}, {}, {}
    for name, value in matrices.items():
        rows = torch.randn(400, value.shape[1], generator=g)
        columns = torch.randn(400, value.shape[0], generator=g)
        grams[name], outputs[name] = rows.T @ rows / 400, columns.T @ columns / 400
        means[name] = rows.mean(0)
    return Statistics(gram=grams, output_gram=outputs, mean=means, fisher=fisher)


def requirements(method: str, options: Mapping[str, Any], models: int) -> frozenset[str]:
    """What a method needs with these options: the base, statistics, an evaluator."""
    own = {key: value for key, value in options.items() if key in all_methods()[method].options()}
    return create_method(method, own).requires(models)


def statistics_for(method: str, options: Mapping[str, Any], models: int) -> list[Statistics] | None:
    """What a method needs, if it needs statistics."""
    needed = requirements(method, options, models) & set(TABLES)
    return [evidence(BASE, seed) for seed in range(models)] if needed else None


def fitting(models: list[State], method: str) -> list[State]:
    """As many of the models as the method merges."""
    return models[: all_methods()[method].arity[1]]


def run(models: list[State], method: str, base: State = BASE, **options: Any) -> State:
    """The merge, with the statistics that the method needs; the first model of several."""
    models = fitting(models, method)
    known = statistics_for(method, options, len(models))
    if "evaluator" in requirements(method, options, len(models)):
        options = {"evaluator": size, **options}
    merged: Any = mg.merge(models, base=base, method=method, statistics=known, **options)
    first: State = merged[0] if isinstance(merged, list) else merged
    return first


def size(state: State) -> torch.Tensor:
    """An evaluator that is not about anything: differentiable, or the same for a float32 merge and its rounding."""
    seen = [value if value.requires_grad else value.bfloat16() for value in state.values()]
    return -torch.stack([value.double().square().sum() for value in seen]).sum()


def tuned(base: State, seed: int, scale: float = 0.1, frozen: str = "") -> State:
    noise = make_state(seed)
    return {k: v.clone() if k == frozen else (v.float() + scale * noise[k]).to(v.dtype) for k, v in base.items()}


A, B = tuned(BASE, 1), tuned(BASE, 2)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_inputs_are_not_modified_and_shapes_stay(method: str, options: dict[str, Any]) -> None:
    before = [{k: v.clone() for k, v in state.items()} for state in (BASE, A, B)]
    merged = run([A, B], method, **options)
    for old, new in zip(before, (BASE, A, B), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert list(merged) == list(BASE)
    assert all(merged[k].shape == v.shape and merged[k].dtype == v.dtype for k, v in BASE.items())
    assert all(torch.isfinite(v).all() for v in merged.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_identical_models(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Copies of the base return the base; copies of one model return it wherever the method is an average."""
    base = {k: v.to(dtype) for k, v in BASE.items()}
    copies = [{k: v.clone() for k, v in base.items()} for _ in range(2)]
    merged = run(copies, method, base, **options)
    unnormalised = method == "average" and options.get("normalize") is False
    for name, value in base.items():
        expected = (value.double() * 0.75).to(dtype) if unnormalised else value
        assert torch.allclose(merged[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("method", AVERAGES)
def test_copies_average_to_themselves(method: str, n: int) -> None:
    merged = mg.merge(fitting([A] * n, method), method=method)
    assert all(torch.allclose(merged[k], v, rtol=1e-6, atol=0) for k, v in A.items())


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_one_model_equal_to_the_base(method: str, options: dict[str, Any]) -> None:
    copy = {k: v.clone() for k, v in BASE.items()}
    merged = run([copy, B], method, **options)
    assert all(torch.isfinite(v).all() for v in merged.values())


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_frozen_tensors_stay(method: str, options: dict[str, Any]) -> None:
    frozen = "model.layers.0.mlp.up_proj.weight"
    models = [tuned(BASE, seed, frozen=frozen) for seed in (3, 4)]
    merged = run(models, method, **options)
    factor = 0.75 if method == "average" and options.get("normalize") is False else 1.0
    assert torch.allclose(merged[frozen], BASE[frozen] * factor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "options"), WEIGHTED, ids=map(str, WEIGHTED))
def test_weights_matter_or_are_refused(method: str, options: dict[str, Any]) -> None:
    models, refusal = fitting([A, B], method), None
    merged = plain = run(models, method, **options)
    try:
        merged = run(models, method, weights=[2.0, 0.5][: len(models)], **options)
    except MerganserError as error:
        refusal = error.code
    assert refusal == "E0307" or any(not torch.equal(plain[name], merged[name]) for name in plain)


def known_by_position(method: str, options: dict[str, Any]) -> bool:
    return any(isinstance(v, list) for v in options.values()) or statistics_for(method, options, 1) is not None


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_permutation_of_models(method: str, options: dict[str, Any]) -> None:
    cls = all_methods()[method]
    if not cls.symmetric or cls.arity[1] == 1 or known_by_position(method, options):
        pytest.skip("masks, poles, statistics or per-model options belong to positions")
    one = run([A, B], method, **options)
    two = run([B, A], method, **options)
    assert all(torch.allclose(one[k], two[k], rtol=1e-5, atol=1e-6) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_same_bits_for_any_blocks_threads_and_source(
    method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Blocks, threads, memory or disk, one file or shards: the bits are the same."""
    states = [{k: v.to(dtype) for k, v in state.items()} for state in (BASE, A, B)]
    weights = options.get("weights")
    rest = {k: v for k, v in options.items() if k != "weights"}
    states = [states[0], *fitting(states[1:], method)]
    known = statistics_for(method, options, len(states) - 1)
    recipe = simple_recipe(states[1:], base=states[0], method=method, weights=weights, statistics=known, options=rest)
    evaluator = size if "evaluator" in requirements(method, options, 2) else None
    recipe, _ = resolve(recipe, evaluator)
    results = []
    for elements, threads in ((1 << 14, 1), (1 << 14, 3), (1 << 20, 2)):
        plan = make_plan(recipe, threads=threads)
        object.__setattr__(plan, "block_elements", elements)
        sink = _MemorySink(plan)
        execute(plan, sink, executor=LocalThreads(threads))
        results.append(sink.tensors)
    files = []
    for index, state in enumerate(states):
        files.append(tmp_path / f"{index}.safetensors")
        save_file(dict(reversed(state.items())), files[-1])
    several = bool(plan.outputs)
    target = tmp_path / ("out" if several else "out.safetensors")
    out = mg.merge(
        files[1:], base=files[0], method=method, statistics=known, out=target, evaluator=evaluator, **options
    )
    results.append(load_file(out / "model" / "model.safetensors" if several else out))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_bf16_inputs_are_subtracted_in_float32(method: str, options: dict[str, Any]) -> None:
    """The result is the rounding of the float32 result on the same values."""
    half = [{k: v.bfloat16() for k, v in s.items()} for s in (BASE, A, B)]
    wide = [{k: v.float() for k, v in s.items()} for s in half]
    narrow = run(half[1:], method, half[0], **options)
    exact = run(wide[1:], method, wide[0], **options)
    assert all(torch.equal(narrow[k], exact[k].bfloat16()) for k in narrow)


def test_float64_stays_float64() -> None:
    states = [{k: v.double() for k, v in s.items()} for s in (BASE, A, B)]
    merged = mg.merge(states[1:], base=states[0], method="task_arithmetic", scale=0.3)
    for name, value in states[0].items():
        expected = value + 0.3 * ((states[1][name] - value) + (states[2][name] - value))
        assert torch.equal(merged[name], expected)


def test_a_method_inside_another() -> None:
    """Dropping entries of the task vectors, then any method with options of its own."""
    from_words = run([A, B], "dare", drop_rate=0.5, then="ties", density=0.3, scale=0.7)
    inside = {"method": "ties", "density": 0.3}
    from_mapping = run([A, B], "dare", drop_rate=0.5, then=inside, scale=0.7)
    assert all(torch.allclose(from_words[k], v, rtol=1e-5, atol=1e-6) for k, v in from_mapping.items())
    kept = run([A, B], "dare", drop_rate=0.0, then={"method": "actmat"})
    assert all(torch.allclose(kept[k], v, rtol=1e-5, atol=1e-6) for k, v in run([A, B], "actmat").items())


def test_a_method_inside_another_brings_its_needs() -> None:
    statistics = [evidence(BASE, seed) for seed in range(2)]
    inside = {"method": "mats", "iterations": 3}
    merged = mg.merge([A, B], base=BASE, method="dare", drop_rate=0.0, then=inside, statistics=statistics)
    plain = mg.merge([A, B], base=BASE, method="mats", iterations=3, statistics=statistics)
    assert all(torch.allclose(merged[k], v, rtol=1e-5, atol=1e-6) for k, v in plain.items())
    with pytest.raises(MerganserError, match="E0308"):
        mg.merge([A, B], base=BASE, method="dare", then=inside)
    with pytest.raises(MerganserError, match=r"in `then`.*no option `iteration`"):
        run([A, B], "dare", then={"method": "mats", "iteration": 3})
