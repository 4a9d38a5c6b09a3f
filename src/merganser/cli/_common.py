"""Options that several commands share, and what they become."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from merganser.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Inputs = Annotated[
    list[str], typer.Argument(metavar="RECIPE | MODEL...", help="A recipe file; or, with --method, the models.")
]
OptionalInputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | MODEL...",
        help="A recipe file; or, with --method, the models; or, with --locked, those that are not beside it.",
    ),
]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="Merge method; see `merganser methods`.")]
Base = Annotated[str | None, typer.Option("--base", "-b", help="The model that the others were fine-tuned from.")]
Weights = Annotated[str | None, typer.Option("--weights", "-w", help="One number per model, e.g. 0.7,0.3.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="OPTION=VALUE", help="Option of the method.")]
Evidence = Annotated[
    list[str] | None,
    typer.Option("--statistics", help="Statistics file; once per model, in their order (the base's before them)."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        help="Data of a model's task, as for `collect`, for methods that merge layer by layer; once per model.",
    ),
]
Init = Annotated[
    str | None, typer.Option("--init", help="Where iterative methods start: a method or a model. [default: its own]")
]
Onto = Annotated[
    str | None,
    typer.Option("--onto", metavar="FOLDER", help="An earlier merge by opcm, to which the models are added."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Type of the result: bf16, f16, f32 or f64.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of random masks. [default: 0]")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Pattern of tensors that are copied from the base, not merged.")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", help="Pattern of the tensors that are merged; the rest is the base's.")
]
Heads = Annotated[str | None, typer.Option("--heads", help="merge, exclude, or 'keep-from MODEL'. [default: merge]")]
FilesFrom = Annotated[
    str | None,
    typer.Option("--files-from", help="Whose configuration and tokenizer are taken. [default: base, or first]"),
]
Memory = Annotated[str, typer.Option("--max-memory", help="Memory above the interpreter.")]
Budget = Annotated[
    str | None,
    typer.Option("--max-memory", help="Memory above the interpreter. [default: 1GB; layer by layer, what it takes]"),
]
Threads = Annotated[int | None, typer.Option("--threads", "-j", min=1, help="Worker threads. [default: all cores]")]

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """A number of bytes from text such as ``5GB``, ``500M`` or ``1GiB``.

    Raises:
        UsageError: it is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    unit = unit[:-1] if unit.endswith("B") and unit != "B" else unit
    if match is None or unit not in _UNITS:
        raise UsageError("E0201", f"`{text}` is not a size; write e.g. 500MB, 5GB or 1GiB")
    return int(float(match[1]) * _UNITS[unit])


def format_size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 100
                else f"{count:.0f} {unit}"
            )
        count /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def given_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that were given on the command line."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return {key: value for key, value in given.items() if value is not None and value != ()}


def build_recipe(
    inputs: Sequence[str],
    method: str | None,
    base: str | None,
    weights: str | None,
    settings: Sequence[str] | None,
    statistics: Sequence[str] | None,
    *,
    data: Sequence[str] | None = None,
    onto: str | None = None,
    **keys: Any,
) -> Any:
    """The recipe of a command line: a file, or models and a method. Options given beside a file override its keys.

    Args:
        inputs: a recipe file, or the models.
        method: registry name, with the models.
        base: the base model.
        weights: numbers with commas.
        settings: ``OPTION=VALUE``.
        statistics: a file per model.
        data: a file per model.
        onto: the folder of an earlier merge; the method and the base are then those of that merge if not given.
        **keys: further keys of the recipe; those that are None or empty were not given.

    Raises:
        UsageError: neither or both are given.
        RecipeError: the recipe or an option is wrong.
    """
    import dataclasses

    from merganser.recipe import load_recipe, simple_recipe

    extra = given_keys(keys)
    numbers = None if weights is None else _numbers(weights)
    if onto is not None:
        from merganser.engine import onto_recipe

        if statistics or data:
            raise UsageError("E0201", f"{'--statistics' if statistics else '--data'} are of no use with --onto")
        options = _options(settings or ())
        return onto_recipe(list(inputs), onto, base=base, method=method, weights=numbers, options=options, **extra)
    if method is None:
        if len(inputs) != 1:
            raise UsageError("E0201", "give one recipe file, or --method and the models")
        if Path(inputs[0]).is_dir():
            raise UsageError("E0201", f"`{inputs[0]}` is a model folder; add --method and the other models")
        if base is not None or weights is not None or settings or statistics or data:
            raise UsageError(
                "E0201",
                "--base, --weights, --set, --statistics and --data belong to --method; write them into the recipe",
            )
        return dataclasses.replace(load_recipe(Path(inputs[0])), **extra)
    return simple_recipe(
        list(inputs),
        base=base,
        method=method,
        weights=numbers,
        statistics=statistics or None,
        data=data or None,
        options=_options(settings or ()),
        **extra,
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError("E0201", f"`{text}` is not a list of numbers; write e.g. --weights 0.7,0.3") from None


def _options(settings: Sequence[str]) -> dict[str, Any]:
    from merganser.recipe import parse_scalar

    options: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError("E0201", f"`--set {text}` is not OPTION=VALUE")
        if key in options:
            raise UsageError("E0201", f"the option `{key}` is set twice")
        parts = [parse_scalar(part.strip()) for part in value.split(",")]
        options[key] = parts[0] if len(parts) == 1 else parts
    return options


def settle_process(threads: int = 1) -> None:
    """Settings of this process, which only an application may choose.

    Blocks run in threads of our own, so each torch operation runs in one; where models run, in as many as are
    given. A plan makes hundreds of thousands of small objects that live until the end; the collector is told not to
    look through them again and again.
    """
    import gc

    import torch

    torch.set_num_threads(threads)
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
