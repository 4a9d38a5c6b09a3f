"""Merges of bfloat16 weights that compiled loops take as files have them: the same bits, whatever is presumed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser import kernels
from merganser.engine import _commit, verify
from merganser.engine._weights import WeightFiles
from merganser.errors import NumericError
from merganser.methods import Block, Context, _select, _tensor_select, _trim, ties
from merganser.methods._select import Threshold
from merganser.methods._tensor_select import Guess
from tests.oracle.test_compiled import accelerated, same


def bfloat16_models(count: int, coarse: bool) -> list[dict[str, torch.Tensor]]:
    """A base and fine-tuned models in bfloat16, some of whose changes cancel."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"a.weight": (300, 700), "b.weight": (64, 33), "c.bias": (5,), "d.weight": (1, 1025), "e.weight": (0, 4)}
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [base]
    for index in range(count):
        change = {name: 0.002 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        models.append({name: x + (change[name] if coarse else 40 * change[name] ** 2) for name, x in base.items()})
        models[-1]["b.weight"] = base["b.weight"] + (0.01 if index % 2 else -0.01)
        models[-1]["c.bias"] = base["c.bias"]
    return [{name: x.bfloat16() for name, x in model.items()} for model in models]


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {}),
        ("ties", {"density": 1.0, "scale": 0.7}),
        ("ties", {"density": 0.001, "merge": "sum"}),
        ("ties", {"trim": "tensor", "merge": "max"}),
        ("ties", {"trim": "tensor", "density": 0.7, "zero_sign": "positive"}),
        ("ties", {"count": "exact"}),
        ("ties", {"count": "exact", "trim": "tensor"}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.01, "election": "ties"}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.2, "scale": 0.7}),
        ("breadcrumbs", {"density": 0.95, "gamma": 0.0, "merge": "mean"}),
        ("breadcrumbs", {"count": "mergellm", "election": "ties", "merge": "sum"}),
        ("sce", {"select": 0.1}),
        ("sce", {"select": 0.6, "scale": 0.7}),
        ("sce", {"select": 0.0}),
        ("sce", {}),
        ("consensus", {}),
        ("della", {"density": 0.5}),
        ("della", {"density": 0.8, "epsilon": 0.2, "election": "ties", "rescale": "none", "scale": 0.7}),
        ("della", {"density": 0.3, "epsilon": 0.3, "merge": "mean"}),
        ("della", {"density": 0.5, "rescale": "l1"}),
        ("della", {"density": 1.0}),
        ("dare", {}),
        ("dare", {"drop_rate": 0.3, "scale": 0.7}),
        ("dare", {"drop_rate": 0.7, "then": "ties"}),
        ("dare", {"drop_rate": 1.0, "then": "ties", "density": 1.0}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "ties", "trim": "tensor", "count": "exact"}}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "task_arithmetic", "scale": 0.3}, "rescale": "l1"}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "task_arithmetic", "scale": 0.3}, "scale": 2.0}),
        ("dare", {"then": "average"}),
        ("model_stock", {}),
        ("model_stock", {"scale": 0.7, "pairs": "angle", "clip": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_merges_of_weights_as_files_have_them(
    method: str, options: dict[str, Any], models: int, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    base, *tuned = bfloat16_models(models, coarse)
    results: list[dict[str, torch.Tensor]] = []
    calls: list[object] = []
    around, merged = kernels.Stored._around, kernels.Combination.merge_stored
    ranked = kernels.Combination.merge_ranked

    def counted(stored: kernels.Stored, split: Any, intervals: list[tuple[int, int]]) -> object:
        calls.append(intervals)
        return around(stored, split, intervals)

    def combined(rule: kernels.Combination, *rest: Any, **named: Any) -> object:
        calls.append(rule)
        return merged(rule, *rest, **named)

    def dropped(rule: kernels.Combination, *rest: Any, **named: Any) -> None:
        calls.append(rule)
        ranked(rule, *rest, **named)

    monkeypatch.setattr(kernels.Combination, "merge_ranked", dropped)
    monkeypatch.setattr(kernels.Stored, "_around", counted)
    monkeypatch.setattr(kernels.Combination, "merge_stored", combined)
    for on in (False, True):
        with accelerated(on):
            results.append(merganser.merge(tuned, method=method, base=base, **options))
        assert any(isinstance(call, list) for call in calls) == (
            on
            and method in ("ties", "breadcrumbs", "sce")
            and options.get("density") != 1.0
            and (method != "sce" or options.get("select", 1.0) < 1)
        )
        assert any(isinstance(call, kernels.Combination) for call in calls) == (
            on
            and method in ("ties", "breadcrumbs", "sce", "della", "dare", "model_stock")
            and not options.get("filter_wise")
            and (method == "dare" or options.get("rescale") != "l1")
            and options.get("then") != "average"
            and (method != "dare" or options.get("scale") != 2.0)
            and (method != "della" or options["density"] != 1.0)
        )
    assert all(same(results[0][name], results[1][name]) for name in base)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("breadcrumbs", {}),
        ("breadcrumbs", {"election": "ties"}),
        ("sce", {}),
        ("della", {"election": "ties"}),
        ("della", {"density": [0.5, 1.0], "election": "ties"}),
        ("della", {}),
        ("model_stock", {}),
    ],
)
def test_weighted_merges_of_weights_as_files_have_them(method: str, options: dict[str, Any]) -> None:
    base, *tuned = bfloat16_models(2, True)
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(merganser.merge(tuned, method=method, base=base, weights=[0.3, 1.7], **options))
    assert all(same(results[0][name], results[1][name]) for name in base)


@pytest.mark.parametrize("numel", [0, 5, 1024, 16384, 50000])
@pytest.mark.parametrize("least", [None, kernels.Wall(0.0), kernels.Wall(1e-6)])
def test_products(numel: int, least: kernels.Wall | None) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(numel, generator=generator).mul(0.02).bfloat16() for _ in range(4))
    deltas = [model.float() - base.float() for model in models]
    variance = kernels.variance(deltas, torch.empty(numel))
    kept = torch.ones(numel) > 0 if least is None else (variance >= least.value) & (variance > 0)
    vectors = [torch.where(kept, delta, 0.0) for delta in deltas]
    pairs = [(0, 0), (2, 2), (0, 1), (1, 2)]
    with accelerated(True):
        found = kernels.Stored(base, models, torch.empty_like(base)).products(pairs, least)
    for own, expected, (one, other) in zip(found, kernels.ordered_products(vectors, pairs), pairs, strict=True):
        assert own.tolist() == expected.tolist()
        assert own.sum() == pytest.approx(float(vectors[one].double() @ vectors[other].double()), rel=1e-9, abs=1e-12)


def test_a_merge_of_weights_as_files_have_them_names_what_is_not_finite() -> None:
    base, *tuned = bfloat16_models(2, True)
    tuned[1]["a.weight"][7, 9] = torch.inf
    with accelerated(True), pytest.raises(NumericError, match=r"1 of 210,000 .* \[7, 9\]"):
        merganser.merge(tuned, method="ties", base=base)


def test_differences_that_are_infinite_are_ranked() -> None:
    generator = torch.Generator().manual_seed(5)
    base, own = (torch.randn(4, 300, generator=generator).bfloat16() for _ in range(2))
    own[1, ::7], base[1, ::7] = 3.3e38, -3.3e38
    messages = []
    for on in (False, True):
        with accelerated(on), pytest.raises(NumericError) as error:
            merganser.merge([{"w": own}, {"w": own}], method="della", base={"w": base}, density=0.8)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("wrong", [None, 0.5, 1.5])
@pytest.mark.parametrize("zero_sign", ["majority", "positive"])
def test_presumed_thresholds(wrong: float | None, zero_sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.randint(-60, 60, (700, 90), generator=generator)}
    tuned = [{"w": base["w"] + torch.randint(-2, 3, (700, 90), generator=generator)} for _ in range(3)]
    base, *tuned = [{"w": (model["w"] / 1024).bfloat16()} for model in (base, *tuned)]
    with accelerated(False):
        expected = merganser.merge(tuned, method="ties", base=base, zero_sign=zero_sign)
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    presumed: list[float] = []

    def clear(context: Context, ranks: list[int]) -> list[float]:
        found = _select.clear_thresholds(context, ranks)
        assert found is not None
        presumed[:] = found if wrong is None else [found[0], found[1] * wrong, found[2]]
        return presumed

    monkeypatch.setattr(_trim, "clear_thresholds", clear)
    whole: list[float] = []
    exact = _select.magnitude_thresholds

    def thresholds(context: Context, ranks: list[int]) -> list[float]:
        whole[:] = exact(context, ranks)
        return whole

    monkeypatch.setattr(_trim, "magnitude_thresholds", thresholds)
    with accelerated(True):
        merged = merganser.merge(tuned, method="ties", base=base, zero_sign=zero_sign)
    assert presumed
    assert bool(whole) == (wrong is not None)
    assert all(same(merged[name], expected[name]) for name in base)


@pytest.mark.parametrize("wrong", [None, 0.5, 1.5])
@pytest.mark.parametrize("zero_sign", ["majority", "positive"])
def test_presumed_thresholds_of_tensors(wrong: float | None, zero_sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {f"w{k}": torch.randint(-60, 60, (700, 90), generator=generator) for k in range(4)}
    tuned = [{n: x + torch.randint(-2, 3, x.shape, generator=generator) for n, x in base.items()} for _ in range(3)]
    base, *tuned = [{n: (x / 1024).bfloat16() for n, x in model.items()} for model in (base, *tuned)]
    for model in (base, *tuned):
        model["small"] = model["w0"][:5].clone()
    settings: dict[str, Any] = {"method": "ties", "trim": "tensor", "zero_sign": zero_sign}
    with accelerated(False):
        expected = merganser.merge(tuned, base=base, **settings)
    monkeypatch.setattr(_tensor_select, "_SAMPLED_FROM", 1 << 12)
    counted: list[set[str]] = []
    exact = _tensor_select.tensor_thresholds

    def guesses(context: Context, *rest: Any, presume: bool) -> dict[str, Guess]:
        found = _tensor_select.tensor_guesses(context, *rest, presume=presume)
        if not presume:
            return found
        assert [name for name, guess in found.items() if guess.clear == [[None]] * 3] == ["small"]
        if wrong is not None:
            clear = [[value * wrong] for (value,) in found["w2"].clear if value is not None]
            found["w2"] = replace(found["w2"], clear=clear)
        return found

    def thresholds(context: Context, *rest: Any, **more: Any) -> dict[str, list[tuple[Threshold, ...]]]:
        counted.append(set(context.specs))
        return exact(context, *rest, **more)

    with monkeypatch.context() as patch, accelerated(True):
        patch.setattr(_trim, "tensor_guesses", guesses)
        patch.setattr(_trim, "tensor_thresholds", thresholds)
        merged = merganser.merge(tuned, base=base, **settings)
    assert counted == [{"small"}, *([{"w2"}] if wrong else [])]
    assert all(same(merged[name], expected[name]) for name in base)


def test_only_blocks_that_cancel_are_merged_again_for_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    change = torch.arange(1, 1001).div(256)
    base = {name: torch.zeros(1000) for name in ("a.weight", "b.weight", "c.weight")}
    one, two = ({name: zeros + sign * change for name, zeros in base.items()} for sign in (1, -1))
    two["b.weight"] = 2 * change  # nothing cancels
    for model in (one, two):
        model["c.weight"] = torch.where(change > 2, -change, model["c.weight"])  # the majority is negative
    merged: list[str] = []
    merge = ties.Ties.merge

    def counted(method: ties.Ties, block: Block, state: ties.TiesState) -> torch.Tensor:
        merged.append(block.key.name)
        return merge(method, block, state)

    def guessed(method: ties.Ties, context: Context, state: ties.TiesState, **rest: Any) -> ties.TiesState:
        return replace(state, majority=dict.fromkeys(state.thresholds, 1))

    expected = merganser.merge([one, two], method="ties", base=base, trim="tensor", density=1.0)
    monkeypatch.setattr(ties.Ties, "merge", counted)
    monkeypatch.setattr(ties.Ties, "_with_majority", guessed)
    found = merganser.merge([one, two], method="ties", base=base, trim="tensor", density=1.0)
    # a.weight has no majority, b.weight the one that was guessed
    assert sorted(merged) == ["a.weight", "a.weight", "b.weight", "c.weight", "c.weight"]
    assert all(same(found[name], expected[name]) for name in base)
    assert not bool(found["a.weight"].any())


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("count", [0, 1, 12, 13, 400])
def test_places_where_entries_cancel(models: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(50_000, generator=generator).bfloat16()
    tuned = [(base.float() + 0.1 * torch.rand(50_000, generator=generator)).bfloat16() for _ in range(models)]
    expected = torch.randperm(50_000, generator=generator)[:count].sort().values
    base[expected] = 1.0
    for model, value in zip(tuned, (1.5, 0.5, 1.0), strict=False):
        model[expected] = value
    stored = kernels.Stored(base, tuned, torch.empty_like(base))
    with accelerated(True):
        found = kernels.Disjoint([1.0] * models, [1.0] * models).merge_stored(stored, kernels.Limits())
    assert found.cancels == (count > 0)
    if count > 50_000 // 4096:
        assert found.places is None
    else:
        assert found.places is not None
        assert found.places.tolist() == expected.tolist()


@pytest.mark.parametrize("guess", [-1, 0, 1])
@pytest.mark.parametrize("extra", [-3, 0, 3])
@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_entries_that_cancel_are_mended(
    trim: str, extra: int, guess: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(6)
    base = {"w": (torch.randint(-60, 60, (300, 400), generator=generator) / 64).bfloat16()}
    change = torch.zeros(2, 120_000)
    change[0, :20], change[1, :20] = 0.5, -0.5  # these cancel
    change[0, 100:110], change[0, 200:210] = 1, -1  # these do not: the majority is that of the extra ones
    change[1, 300 : 300 + abs(extra)] = 2.0 if extra > 0 else -2.0
    tuned = [{"w": (base["w"].float() + own.view(300, 400)).bfloat16()} for own in change]
    deltas = [model["w"].float() - base["w"].float() for model in tuned]
    assert (sum(deltas) > 0).sum() - (sum(deltas) < 0).sum() == extra
    settings: dict[str, Any] = {"method": "ties", "trim": trim, "density": 1.0}
    with accelerated(False):
        expected = merganser.merge(tuned, base=base, **settings)
    merged: list[str] = []
    merge = ties.Ties.merge

    def counted(method: ties.Ties, block: Block, state: ties.TiesState) -> torch.Tensor:
        merged.append(block.key.name)
        return merge(method, block, state)

    def guessed(method: ties.Ties, context: Context, state: ties.TiesState, **rest: Any) -> ties.TiesState:
        return replace(state, majority=dict.fromkeys(state.thresholds, guess))

    monkeypatch.setattr(ties.Ties, "merge", counted)
    monkeypatch.setattr(ties.Ties, "_with_majority", guessed)
    paths = []
    for index, model in enumerate((base, *tuned)):
        paths.append(tmp_path / f"{index}.safetensors")
        save_file(model, paths[-1])
    with accelerated(True):
        found = merganser.merge(tuned, base=base, **settings)
        out = merganser.merge(paths[1:], base=paths[0], **settings, out=tmp_path / "out")
    assert merged == ["w", "w"]
    assert same(found["w"], expected["w"])
    assert same(load_file(out / "model.safetensors")["w"], expected["w"])
    verify(out)


def test_thresholds_that_a_sample_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = bfloat16_models(2, True)
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_select, "_CLEAR", 0.3)
    with accelerated(False):
        expected = merganser.merge(tuned, method="ties", base=base)
    with accelerated(True):
        merged = merganser.merge(tuned, method="ties", base=base)
    assert all(same(merged[name], expected[name]) for name in base)


def test_methods_inside_others_do_not_round() -> None:
    base, *tuned = bfloat16_models(3, True)
    stacked = [{f"layers.{number}.{name}": x for number in range(3) for name, x in m.items()} for m in (base, *tuned)]
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(
                merganser.merge(
                    stacked[1:], method="lines", base=stacked[0], of={"method": "ties"}, alpha=0.3, beta=0.4
                )
            )
    assert all(same(results[0][name], results[1][name]) for name in stacked[0])


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_a_merge_with_presumed_thresholds_goes_on(trim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {f"w{number}": torch.randint(-60, 60, (300, 90), generator=generator) for number in range(4)}
    tuned = [{n: x + torch.randint(-2, 3, x.shape, generator=generator) for n, x in base.items()} for _ in range(3)]
    paths = []
    for index, model in enumerate((base, *tuned)):
        paths.append(tmp_path / f"{index}.safetensors")
        save_file({name: (x / 1024).bfloat16() for name, x in model.items()}, paths[-1])
    settings: dict[str, Any] = {"method": "ties", "base": paths[0], "trim": trim}
    whole = merganser.merge(paths[1:], **settings, out=tmp_path / "whole")
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_tensor_select, "_SAMPLED_FROM", 1 << 12)
    finish = WeightFiles.finish
    finished: list[str] = []

    def stopped(files: WeightFiles, name: str, *rest: Any) -> None:
        if name == "w2":
            raise KeyboardInterrupt
        finish(files, name, *rest)
        finished.append(name)

    with accelerated(True):
        with monkeypatch.context() as patch:
            patch.setattr(_commit, "_WORTH_KEEPING", 0.0)
            patch.setattr(WeightFiles, "finish", stopped)
            with pytest.raises(KeyboardInterrupt):
                merganser.merge(paths[1:], **settings, out=tmp_path / "out")
        assert finished == ["w0", "w1"]
        out = merganser.merge(paths[1:], **settings, out=tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def coarse(count: int = 3, names: int = 4) -> list[dict[str, torch.Tensor]]:
    """A base and fine-tuned models whose changes are -2, ..., 2 times 1/1024."""
    generator = torch.Generator().manual_seed(3)
    base = {f"layers.{k}.w": torch.randint(-60, 60, (300, 90), generator=generator) for k in range(names)}
    tuned = [{n: x + torch.randint(-2, 3, x.shape, generator=generator) for n, x in base.items()} for _ in range(count)]
    return [{n: (x / 1024).bfloat16() for n, x in model.items()} for model in (base, *tuned)]


@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("first", [1 / 1024, 2 / 1024, None])
def test_a_merge_goes_on_though_another_threshold_was_presumed(
    trim: str, first: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of tensors that an earlier run finished are not those of this run's thresholds."""
    paths = []
    for index, model in enumerate(coarse()):
        paths.append(tmp_path / f"{index}.safetensors")
        save_file(model, paths[-1])
    settings: dict[str, Any] = {"method": "ties", "base": paths[0], "trim": trim}
    with accelerated(False):
        whole = merganser.merge(paths[1:], **settings, out=tmp_path / "whole")
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_tensor_select, "_SAMPLED_FROM", 1 << 12)
    finish = WeightFiles.finish

    def stopped(files: WeightFiles, name: str, *rest: Any) -> None:
        if name == "layers.2.w":
            raise KeyboardInterrupt
        finish(files, name, *rest)

    with monkeypatch.context() as patch, accelerated(first is not None):
        patch.setattr(_trim, "clear_thresholds", lambda context, ranks: [first] * 3)
        patch.setattr(_tensor_select, "_clear", lambda *rest: first)
        patch.setattr(_commit, "_WORTH_KEEPING", 0.0)
        patch.setattr(WeightFiles, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            merganser.merge(paths[1:], **settings, out=tmp_path / "out")
    for wrong in (1 / 1024, 3 / 1024):
        with monkeypatch.context() as patch, accelerated(True):
            patch.setattr(_trim, "clear_thresholds", lambda context, ranks, wrong=wrong: [wrong] * 3)
            shutil.copytree(next(tmp_path.glob("out.partial-*")), tmp_path / f"{wrong}.partial-00000000")
            out = merganser.merge(paths[1:], **settings, out=tmp_path / f"{wrong}")
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_empty_tensors_beside_wrong_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = ({**model, "e": torch.zeros(0, 4).bfloat16()} for model in coarse(names=1))
    with accelerated(False):
        expected = merganser.merge(tuned, base=base, method="ties")
    monkeypatch.setattr(_trim, "clear_thresholds", lambda context, ranks: [0.5 / 1024] * 3)
    with accelerated(True):
        merged = merganser.merge(tuned, base=base, method="ties")
    assert all(same(merged[name], expected[name]) for name in base)


def test_norms_of_merges_on_the_way_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{k}.w": 0.02 * torch.randn(300, 90, generator=generator) for k in range(3)}
    tuned = [{n: x + 0.002 * torch.randn(x.shape, generator=generator) for n, x in base.items()} for _ in range(3)]
    base, *tuned = [{name: x.bfloat16() for name, x in model.items()} for model in (base, *tuned)]
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(merganser.merge(tuned, base=base, method="lines", of={"method": "ties"}))
    assert all(same(results[0][name], results[1][name]) for name in base)


def test_merges_on_the_way_do_not_rely_on_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an initialisation, and of norms, the majority is counted, not estimated: nobody reviews them."""
    base, *tuned = coarse()
    shares: list[bool] = []
    found = ties.Ties._with_majority

    def watched(method: ties.Ties, *rest: Any, certain: bool = False) -> ties.TiesState:
        shares.append(certain)
        return found(method, *rest, certain=certain)

    monkeypatch.setattr(ties.Ties, "_with_majority", watched)
    merganser.merge(tuned, base=base, method="lines", of={"method": "ties"})
    gram = [{n: torch.eye(90) for n in base} for _ in tuned]
    statistics = [merganser.Statistics(gram=own) for own in gram]
    merganser.merge(tuned, base=base, method="mats", objective="gram", statistics=statistics, init="ties")
    merganser.merge(tuned, base=base, method="ties")
    assert shares == [True, True, False]
