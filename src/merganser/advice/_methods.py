"""Which methods fit what the user has, with the figures that say so and the commands to run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoint import is_adapter

__all__ = ["CLAIMS", "Claim", "Situation", "Suggestion", "suggest"]

_ENCODER, _EIGHT = "README.md", "docs/results.md"
_FAMILY, _LANGUAGE = "docs/results-text.md", "docs/results-lm.md"


@dataclass(frozen=True)
class Claim:
    """Evidence for a method.

    Attributes:
        text: what was measured.
        source: the document of this project, or the paper.
        quotes: pieces of that document that the text rests on; none for a paper.
    """

    text: str
    source: str
    quotes: tuple[tuple[str, ...], ...] = ()


CLAIMS = {
    "encoder-none": Claim(
        "eight tasks on a small encoder, three seeds, no data: TACT 79.9, ACTMat and TSV-M 79.4, TIES 71.7, average "
        "69.1 of the experts' 87.6 %",
        _EIGHT,
        (
            ("| tact |", "| 79.9 |"),
            ("| actmat |", "| 79.4 |"),
            ("| tsv |", "| 79.4 |"),
            ("| ties |", "| 71.7 |"),
            ("| average |", "| 69.1 |"),
            ("| *experts* |", "| 87.6 |"),
        ),
    ),
    "encoder-inputs": Claim(
        "the same tasks, with inputs but no labels: MaTS 84.2, RegMean 79.0 of the experts' 87.6 %; layer by layer, "
        "with `--data` (`sequential_mats`), 86.9",
        _EIGHT,
        (
            ("| mats |", "| 84.2 |"),
            ("| regmean |", "| 79.0 |"),
            ("| sequential_mats |", "| 86.9 |"),
            ("| *experts* |", "| 87.6 |"),
        ),
    ),
    "encoder-labels": Claim(
        "six tasks on that encoder: 200 labels per task for choosing the options of MaTS changed nothing on average "
        "(78.0)",
        _ENCODER,
        (("| MaTS, tuned on 200 labels per task |", "78.0"), ("| MaTS |", "78.0")),
    ),
    "language-none": Claim(
        "a small language model on three books, share of the experts' gain that is kept: ACTMat 88 %, TACT 87 %, TIES "
        "80 %, average 67 %",
        _LANGUAGE,
        (("ACTMat, which needs no data, keeps 88 %", "TACT 87 %", "TIES 80 %", "the average 67 %"),),
    ),
    "language-inputs": Claim(
        "the same language model: MaTS 85 %, RegMean 84 % with inputs, less than ACTMat without",
        _LANGUAGE,
        (("MaTS 85 %", "RegMean 84 %"),),
    ),
    "language-labels": Claim(
        "the same language model: MaTS 86 % with the text's own labels; task arithmetic with its scale chosen on "
        "validation text equals MaTS",
        _LANGUAGE,
        (("86 % with the text's own labels",), ("Task arithmetic equals MaTS", "chosen among five on validation text")),
    ),
    "wild": Claim(
        "published language models in the wild: only task arithmetic gained reliably (+1.0 with 12 models); TIES lost "
        "4.3, TSV-M 2.4, Iso-C 5.4 points",
        "arXiv:2511.21437",
    ),
    "untuned": Claim(
        "CLIP ViT-B/32, nothing tuned: TACT 84.5, TSV-M 83.3 %",
        "arXiv:2604.01329",
    ),
    "soup": Claim(
        "runs on one task with different seeds and options: an average of those that help beats the best single run",
        "Wortsman et al., 2022, arXiv:2203.05482",
    ),
    "exact": Claim(
        "another six tasks, 15 iterations of MaTS: 87.7 % with all labels by the models' own "
        "probabilities, 86.5 with labels drawn once, 86.3 with the given ones, of the experts' 90.4",
        _FAMILY,
        (
            ("| exact | 0.1 | 84.9 | 87.2 | 87.7 |",),
            ("| sampled | 0.1 | 83.0 | 86.2 | 86.5 |",),
            ("| gold | 0.1 | 82.8 | 86.3 | 86.3 |",),
            ("| individual experts |", "90.4"),
        ),
    ),
    "sampled": Claim(
        "labels that the model samples cost MaTS 0.003 nats per token against the text's own",
        _LANGUAGE,
        (("MaTS is better with the text's labels than with sampled ones by 0.003",),),
    ),
}


@dataclass(frozen=True)
class Situation:
    """What decides between methods.

    Attributes:
        language: whether the models generate text.
        alike: whether the task vectors are those of runs on one task.
        heads: the setting `heads` that the merge needs.
        dtype: the type to write; None for that of the inputs.
    """

    language: bool
    alike: bool
    heads: str
    dtype: str | None


@dataclass(frozen=True)
class Suggestion:
    """What fits one kind of user.

    Attributes:
        needs: none, unlabelled or labelled.
        title: what the user has, in words.
        methods: registry names, the best first.
        evidence: why.
        commands: what to run; none where the models have no paths.
    """

    needs: str
    title: str
    methods: tuple[str, ...]
    evidence: tuple[Claim, ...]
    commands: tuple[str, ...]


def suggest(situation: Situation, models: Sequence[Any], base: Any) -> tuple[Suggestion, ...]:
    """Suggestions for no data, unlabelled inputs and labelled examples."""
    command = _Commands(situation, models, base)
    kind, labels = ("language", "sampled") if situation.language else ("encoder", "exact")
    first: tuple[str, ...]
    evidence: tuple[str, ...]
    if situation.alike:
        first, evidence = ("average",), ("soup",)
    elif situation.language:
        first, evidence = ("actmat", "task_arithmetic"), ("language-none", "wild")
    else:
        first, evidence = ("tact", "actmat"), ("encoder-none", "untuned")
    return (
        Suggestion("none", "no data", first, _claims(*evidence), command.merge(first[0])),
        Suggestion(
            "unlabelled",
            "inputs of every task, without labels",
            ("mats", "regmean"),
            _claims(f"{kind}-inputs", labels),
            command.matched(labels),
        ),
        Suggestion(
            "labelled",
            "labelled examples of every task",
            ("mats", "task_arithmetic"),
            _claims(f"{kind}-labels"),
            command.tuned("empirical" if situation.language else "exact"),
        ),
    )


def _claims(*keys: str) -> tuple[Claim, ...]:
    return tuple(CLAIMS[key] for key in keys)


class _Commands:
    """Command lines about some models, quoted for a shell."""

    def __init__(self, situation: Situation, models: Sequence[Any], base: Any) -> None:
        self._known = all(isinstance(model, str | os.PathLike) for model in (*models, base))
        self._models = [os.fspath(model) for model in models] if self._known else []
        self._base = os.fspath(base) if self._known else ""
        self._tail = ["--heads", "exclude"] if situation.heads == "exclude" else []
        self._tail += ["--dtype", situation.dtype] if situation.dtype is not None else []

    def merge(self, method: str) -> tuple[str, ...]:
        """One merge."""
        return (self._line("merge", method, ()),) if self._known else ()

    def matched(self, estimator: str) -> tuple[str, ...]:
        """Statistics of every model with labels of its own, and MaTS with them."""
        if not self._known:
            return ()
        files, collected = self._collected(estimator)
        return (*collected, self._line("merge", "mats", files))

    def tuned(self, estimator: str) -> tuple[str, ...]:
        """Statistics of every model, and MaTS with the best of a few options on labelled examples."""
        if not self._known:
            return ()
        files, collected = self._collected(estimator)
        search = ("--search", "iterations=1,2,5,10,15", "--search", "damping=0.03,0.1,0.3", "--sampler", "grid")
        return (*collected, self._line("tune", "mats", files, *search, "--tasks", "validation.yml"))

    def _line(self, verb: str, method: str, statistics: Sequence[str], *more: str) -> str:
        words = ["merganser", verb, "-m", method, "--base", self._base, *self._models]
        for file in statistics:
            words += ["--statistics", file]
        return shlex.join([*words, *more, *self._tail, "-o", "merged"])

    def _runnable(self, model: str) -> str:
        """A model as it is named alone: an adapter behind its base."""
        return f"{self._base}+{model}" if Path(model).is_dir() and is_adapter(Path(model)) else model

    def _collected(self, estimator: str) -> tuple[list[str], list[str]]:
        """The statistics files of the models, and the commands that make them."""
        stems: list[str] = []
        for model in self._models:
            stem = Path(model).resolve().name or "model"
            stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
        files = [f"{stem}.stats.safetensors" for stem in stems]
        options = ["-k", "kfac", "-e", estimator, "-o"]
        collected = [
            shlex.join(["merganser", "collect", self._runnable(model), "--data", f"{stem}.jsonl", *options, file])
            for model, stem, file in zip(self._models, stems, files, strict=True)
        ]
        return files, collected
