"""The trials of a search, kept by optuna: in memory, or in a database from which a stopped search goes on."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from merganser.errors import EnvironmentFault, UsageError
from merganser.evaluation._space import Choices, Range, Space

__all__ = ["OBJECTIVES", "SAMPLERS", "Trial", "Trials"]

SAMPLERS = ("grid", "tpe", "cmaes")
OBJECTIVES = ("mean", "pareto")


@dataclass(frozen=True)
class Trial:
    """A set of options, and what came of it.

    Attributes:
        number: counted from 0.
        params: the options.
        state: ``complete`` or ``failed``.
        value: the mean over the tasks; None if it failed.
        tasks: the figures of each task.
        reused: what the merge was made from.
        seconds: of merging and of evaluating.
        error: why it failed: a code and a message.
    """

    number: int
    params: Mapping[str, Any]
    state: str
    value: float | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reused: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As in the JSON output."""
        return asdict(self)


class Trials:
    """Asks for options and takes in what came of them.

    Args:
        name: of the study: the same name in the same database is the same search.
        space: what is searched.
        sampler: ``grid`` (the given points), ``tpe`` or ``cmaes``.
        points: of a grid.
        tasks: their number, if each is an objective of its own; 0 for the mean.
        seed: of the sampler.
        storage: URL of a database, e.g. ``sqlite:///tune.db``; in memory if None.

    Raises:
        EnvironmentFault: E0704, optuna is not installed; E0703, the database cannot be used.
        UsageError: E0201, the sampler cannot search this.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        *,
        sampler: str,
        points: Sequence[Mapping[str, Any]],
        tasks: int,
        seed: int,
        storage: str | None,
    ) -> None:
        self._optuna = _optuna()
        self._space = {option: _distribution(self._optuna, found) for option, found in space.items()}
        if sampler == "cmaes":
            named = [option for option, found in space.items() if isinstance(found, Choices)]
            if named or tasks:
                raise UsageError(
                    "E0201",
                    f"cmaes searches ranges, and `{named[0]}` is a list of values"
                    if named
                    else "cmaes has one objective",
                    fix="use --sampler tpe",
                )
        with _quiet(self._optuna), _database(storage):
            self._study = self._optuna.create_study(
                study_name=name,
                storage=storage,
                sampler=_sampler(self._optuna, sampler, seed),
                directions=["maximize"] * max(1, tasks),
                load_if_exists=True,
            )
            self._resume()
            for point in points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)
        self._several = tasks > 0

    def _resume(self) -> None:
        """What was running when an earlier process ended is asked for again."""
        running = self._optuna.trial.TrialState.RUNNING
        for trial in self._study.get_trials(deepcopy=False, states=(running,)):
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    def done(self) -> list[Trial]:
        """The trials that have ended, those of earlier runs included; interrupted ones are left out."""
        return [
            Trial(number=t.number, params=dict(t.params), **t.user_attrs["result"])
            for t in self._study.get_trials(deepcopy=False)
            if "result" in t.user_attrs
        ]

    @contextlib.contextmanager
    def next(self) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        """A trial: its number, its options, and a mapping to be filled with the other attributes of `Trial`."""
        with _quiet(self._optuna):
            trial = self._study.ask(self._space)
        result: dict[str, Any] = {}
        yield trial.number, dict(trial.params), result
        with _quiet(self._optuna):
            trial.set_user_attr("result", result)
            if result["state"] == "complete":
                values = [task["value"] for task in result["tasks"].values()] if self._several else result["value"]
                self._study.tell(trial, values)
            else:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise EnvironmentFault(
            "E0704", "searching needs the package optuna", why=str(error), fix="pip install 'merganser[tune]'"
        ) from None


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without the package's own messages; what it was set to is put back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


@contextlib.contextmanager
def _database(storage: str | None) -> Iterator[None]:
    """Errors of the database as errors of ours."""
    try:
        yield
    except (UsageError, EnvironmentFault):
        raise
    except Exception as error:
        if storage is None:
            raise
        raise EnvironmentFault(
            "E0703",
            f"the storage `{storage}` cannot be used",
            why=str(error).splitlines()[0],
            fix="name a file that can be written: --storage sqlite:///tune.db",
        ) from None


def _distribution(optuna: Any, space: Range | Choices) -> Any:
    if isinstance(space, Choices):
        return optuna.distributions.CategoricalDistribution(list(space.values))
    if space.whole:
        return optuna.distributions.IntDistribution(int(space.low), int(space.high), log=space.log)
    return optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    if name not in SAMPLERS:
        raise UsageError("E0201", f"there is no sampler `{name}`", fix=f"one of {', '.join(SAMPLERS)}")
    if name == "cmaes":
        try:
            importlib.import_module("cmaes")
        except ImportError as error:
            raise EnvironmentFault(
                "E0704",
                "the sampler cmaes needs the package cmaes",
                why=str(error),
                fix="pip install 'merganser[tune]'",
            ) from None
        return optuna.samplers.CmaEsSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)
