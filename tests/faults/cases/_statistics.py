"""Rows 66 to 68: statistics that a solver cannot take as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.faults.cases._case import INPUT, NUMERIC, OK, Case, Command
from tests.helpers import State, llama_state, read_model, write_files

UP = "model.layers.0.mlp.up_proj.weight"
FACTS = {"merganser_statistics": "1", "counts": "{}", "aliases": "{}", "transposed": "[]", "provenance": "{}"}
FILE = "bad.stats"


def _grams(state: State) -> State:
    g = torch.Generator().manual_seed(3)
    found = {}
    for name, value in state.items():
        if value.dim() == 2 and "proj" in name:
            x = torch.randn(64, value.shape[1], generator=g)
            found[f"gram/{name}"] = x.T @ x / 64
            y = torch.randn(64, value.shape[0], generator=g)
            found[f"output_gram/{name}"] = y.T @ y / 64
    return found


def _fishers(state: State) -> State:
    g = torch.Generator().manual_seed(3)
    return {f"fisher/{name}": torch.rand(value.shape, generator=g) for name, value in state.items()}


def _files(kind: str, change: Callable[[State], object], *, both: bool = False, **facts: Any) -> Callable[[Path], Any]:
    """Statistics of both models, those of the bad one changed."""

    def build(root: Path) -> None:
        for seed, name in ((1, "good"), (2, "bad")):
            tensors = (_grams if kind == "gram" else _fishers)(llama_state(seed))
            if name == "bad" or both:
                change(tensors)
            tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
            save_file(tensors, root / f"{name}.stats", metadata={**FACTS, **(facts if name == "bad" else {})})

    return build


def _gram(value: Callable[[torch.Tensor], torch.Tensor], **rest: Any) -> Callable[[Path], Any]:
    def change(tensors: State) -> None:
        tensors[f"gram/{UP}"] = value(tensors[f"gram/{UP}"])

    return _files("gram", change, **rest)


def _fisher(value: Callable[[torch.Tensor], torch.Tensor], *, everywhere: bool = False, **rest: Any) -> Any:
    def change(tensors: State) -> None:
        for key in list(tensors) if everywhere else [f"fisher/{UP}"]:
            tensors[key] = value(tensors[key])

    return _files("fisher", change, **rest)


def _with(name: str, value: torch.Tensor | None) -> Callable[[State], object]:
    def change(tensors: State) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


def _indefinite(gram: torch.Tensor) -> torch.Tensor:
    return gram - 3 * torch.eye(len(gram))


def _asymmetric(gram: torch.Tensor) -> torch.Tensor:
    return gram + torch.triu(torch.ones_like(gram), 1)


def _nan(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[3] = math.nan
    return value


def _conditioned(gram: torch.Tensor) -> torch.Tensor:
    return torch.diag(torch.logspace(-30, 0, len(gram), dtype=torch.float64).float())


def _average(out: Path) -> bool:
    a, b, merged = llama_state(1)[UP], llama_state(2)[UP], read_model(out)[UP]
    return bool(torch.allclose(merged, (a + b) / 2, atol=1e-6))


def _finite(out: Path) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in read_model(out).values())


def _merge(method: str, *more: str) -> Command:
    statistics = ("--statistics", "good.stats", "--statistics", FILE)
    return ("merge", "-m", method, *statistics, *more, "good", "bad", "-o", "out")


REGMEAN, FISHER = _merge("regmean"), _merge("fisher")
MATS = _merge("mats", "-b", "good", "-s", "objective=gram")
TIGHT = _merge("mats", "-b", "good", "-s", "objective=gram", "-s", "iterations=3", "-s", "preconditioner=none")


def _case(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return Case(f"ss_{name}", row, build, **{"commands": (REGMEAN,), "exits": (NUMERIC,), "mentions": mentions, **rest})


def _raw(text: str | bytes) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        _files("gram", lambda tensors: None)(root)
        write_files(root, {FILE: text})

    return build


def _without_file(root: Path) -> None:
    _files("gram", lambda tensors: None)(root)
    (root / FILE).unlink()


STATISTICS = (
    _case("gram_ok", 66, _files("gram", lambda tensors: None), commands=(REGMEAN, MATS), exits=(OK,), made=_finite),
    _case(
        "gram_singular",
        66,
        _gram(lambda g: torch.ones_like(g), both=True),
        commands=(REGMEAN,),
        exits=(OK, NUMERIC),
        made=_finite,
    ),
    _case("gram_zero", 66, _gram(torch.zeros_like, both=True), commands=(REGMEAN,), exits=(OK, NUMERIC), made=_finite),
    _case("gram_indefinite", 66, _gram(_indefinite), FILE, UP, commands=(REGMEAN, MATS)),
    _case("gram_negative_diagonal", 66, _gram(lambda g: -g), FILE, UP, commands=(REGMEAN, MATS)),
    _case("gram_asymmetric", 66, _gram(_asymmetric), FILE, UP, commands=(REGMEAN, MATS)),
    _case("gram_nan", 66, _gram(_nan), FILE, UP, commands=(REGMEAN, MATS)),
    _case("gram_inf", 66, _gram(lambda g: g * math.inf), FILE, UP),
    _case("gram_wrong_shape", 66, _gram(lambda g: g[:4, :4]), FILE, UP, exits=(INPUT,)),
    _case("gram_not_square", 66, _gram(lambda g: g[:4]), FILE, UP, exits=(INPUT,)),
    _case("gram_integer", 66, _gram(lambda g: g.int()), FILE, UP, exits=(INPUT,)),
    _case("gram_missing_layer", 66, _files("gram", _with(f"gram/{UP}", None)), FILE, UP, exits=(INPUT,)),
    _case("unknown_layer", 66, _files("gram", _with("gram/ghost.weight", torch.eye(8))), FILE, "ghost", exits=(INPUT,)),
    _case("unknown_table", 66, _files("gram", _with("ghost/a", torch.eye(8))), FILE, "ghost", exits=(INPUT,)),
    _case("other_kind", 66, _files("fisher", lambda tensors: None), "gram", exits=(INPUT, 3)),
    _case("empty_file", 66, _raw(b""), FILE, exits=(INPUT,)),
    _case("text_file", 66, _raw("gram"), FILE, exits=(INPUT,)),
    _case(
        "model_file",
        66,
        lambda root: (
            _files("gram", lambda t: None)(root),
            (root / FILE).write_bytes((root / "bad/model.safetensors").read_bytes()),
        ),
        FILE,
        exits=(INPUT,),
    ),
    _case(
        "missing_file",
        66,
        _without_file,
        FILE,
        exits=(INPUT,),
    ),
    _case("other_version", 66, _files("gram", lambda t: None, merganser_statistics="99"), FILE, "99", exits=(INPUT,)),
    _case("facts_not_json", 66, _files("gram", lambda t: None, counts="{"), FILE, "counts", exits=(INPUT,)),
    _case("facts_list", 66, _files("gram", lambda t: None, aliases="[]"), FILE, "aliases", exits=(INPUT,)),
    _case(
        "alias_to_nothing",
        66,
        _files("gram", lambda t: None, aliases=json.dumps({"gram/a": "gram/b"})),
        FILE,
        "gram/a",
        exits=(INPUT,),
    ),
    _case(
        "facts_deep",
        66,
        _files("gram", lambda t: None, provenance='{"a":' * 90_000 + "1" + "}" * 90_000),
        FILE,
        exits=(INPUT,),
    ),
    _case(
        "facts_of_another_shape",
        66,
        _files("gram", lambda t: None, provenance='{"model": [1], "data": 7}'),
        exits=(INPUT, OK),
    ),
    _case(
        "gram_ill_conditioned",
        67,
        _gram(_conditioned, both=True),
        "proj.weight",
        commands=(TIGHT,),
        exits=(OK,),
        made=_finite,
    ),
    _case(
        "gram_ill_conditioned_strict",
        67,
        _gram(_conditioned, both=True),
        "proj.weight",
        commands=((*TIGHT, "--strict"),),
        exits=(NUMERIC,),
    ),
    _case("fisher_ok", 68, _files("fisher", lambda t: None), commands=(FISHER,), exits=(OK,), made=_finite),
    _case(
        "fisher_zero",
        68,
        _fisher(torch.zeros_like, everywhere=True, both=True),
        commands=(FISHER,),
        exits=(OK,),
        made=_average,
    ),
    _case("fisher_negative", 68, _fisher(lambda f: f - 0.5), FILE, UP, commands=(FISHER,)),
    _case(
        "fisher_denormal",
        68,
        _fisher(lambda f: torch.full_like(f, 1e-44), everywhere=True, both=True),
        commands=(FISHER,),
        exits=(OK,),
        made=_average,
    ),
    _case("fisher_overflow", 68, _fisher(lambda f: torch.full_like(f, math.inf)), FILE, UP, commands=(FISHER,)),
    _case(
        "fisher_huge",
        68,
        _fisher(lambda f: torch.full_like(f, 3e38), everywhere=True, both=True),
        commands=(FISHER,),
        exits=(OK, NUMERIC),
        made=_finite,
    ),
    _case("fisher_nan", 68, _fisher(_nan), FILE, UP, commands=(FISHER,)),
    _case("fisher_wrong_shape", 68, _fisher(lambda f: f.T), FILE, UP, commands=(FISHER,), exits=(INPUT,)),
)
