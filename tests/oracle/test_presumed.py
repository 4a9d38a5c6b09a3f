"""What TIES presumes and estimates is found out: the same bits, also of merges that go on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.engine import _commit, verify
from merganser.engine._weights import WeightFiles
from merganser.methods import Block, Context, _select, _tensor_select, _trim, ties
from merganser.methods._select import Threshold
from merganser.methods._tensor_select import Guess
from tests.oracle.test_compiled import accelerated, same
from tests.oracle.test_stored import bfloat16_models


def watched_merges(monkeypatch: pytest.MonkeyPatch, guess: int) -> list[str]:
    """Guess every majority; the tensors of all blocks that TIES merges from now on."""
    merged: list[str] = []
    merge = ties.Ties.merge

    def counted(method: ties.Ties, block: Block, state: ties.TiesState) -> torch.Tensor:
        merged.append(block.key.name)
        return merge(method, block, state)

    def guessed(method: ties.Ties, context: Context, state: ties.TiesState, **rest: Any) -> ties.TiesState:
        return replace(state, majority=dict.fromkeys(state.thresholds, guess))

    monkeypatch.setattr(ties.Ties, "merge", counted)
    monkeypatch.setattr(ties.Ties, "_with_majority", guessed)
    return merged


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
    expected = merganser.merge([one, two], method="ties", base=base, trim="tensor", density=1.0)
    merged = watched_merges(monkeypatch, 1)
    found = merganser.merge([one, two], method="ties", base=base, trim="tensor", density=1.0)
    # a.weight has no majority, b.weight the one that was guessed
    assert sorted(merged) == ["a.weight", "a.weight", "b.weight", "c.weight", "c.weight"]
    assert all(same(found[name], expected[name]) for name in base)
    assert not bool(found["a.weight"].any())


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
    merged = watched_merges(monkeypatch, guess)
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
