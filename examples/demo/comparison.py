"""The rows of the table: what merges are compared with, and each merge made, timed and evaluated."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from examples.demo import merges
from examples.demo.evaluation import Model, Outcomes, evaluate
from examples.demo.experts import Expert
from examples.demo.merges import Cost, Merge
from examples.demo.store import key, read_json, weights_digest, write_json
from examples.demo.table import Row
from examples.demo.tasks import Task
from examples.demo.tuning import Candidate, Choice, choose, kept, total

AT_ONCE = 4
"""Merges whose weights (all those tried, for a tuned one) are on the disk at once, to be evaluated side by side."""
PATIENCE = 5.0
"""Seconds: a merge that once took longer is not made again, its cost and outcomes are read from the cache."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A merged encoder that is to be a row of the table, its cost, and how it was chosen, where it was."""

    label: str
    model: Model
    cost: Cost
    choice: Choice | None = None


@dataclass(frozen=True)
class Comparison:
    """The experts and the base to merge, their tasks, and where and how to work.

    Attributes:
        tasks: The tasks, in the order of the table's columns.
        experts: The expert of each task.
        statistics: The statistics file of each task's expert.
        base: The base encoder's folder.
        cache: The demo's cache folder.
        pool: The processes that evaluate.
        say: Called with each line of progress.
    """

    tasks: Sequence[Task]
    experts: Sequence[Expert]
    statistics: Mapping[str, Path]
    base: Path
    cache: Path
    pool: Executor
    say: Callable[[str], None]

    def references(self) -> list[Row]:
        """The most frequent label, the base encoder with the experts' heads, and the experts."""
        frequent, fine_tuned = {}, {}
        for task in self.tasks:
            label = Counter(task.train.targets).most_common(1)[0][0]
            frequent[task.name] = [target == label for target in task.test.targets]
        alone = [Model(expert.encoder, [task], [expert]) for task, expert in zip(self.tasks, self.experts, strict=True)]
        of_base, *of_experts = evaluate([Model(self.base, self.tasks, self.experts), *alone], self.cache, self.pool)
        for outcomes in of_experts:
            fine_tuned.update(outcomes)
        return [
            Row("most frequent label", "floor", frequent),
            Row("base encoder", "base", of_base),
            Row("fine-tuned, one per task", "experts", fine_tuned),
        ]

    def merged(self, wanted: Sequence[Merge]) -> list[Row]:
        """Makes merges one after the other, and evaluates a few at a time; the merged weights are not kept."""
        for first in range(0, len(wanted), AT_ONCE):
            group = [merge for merge in wanted[first : first + AT_ONCE] if not self._is_kept(merge)]
            with tempfile.TemporaryDirectory(prefix="merge-", dir=self.cache) as folder:
                made = [self._make(merge, Path(folder)) for merge in group]
                found = iter(evaluate([entry.model for entries in made for entry in entries], self.cache, self.pool))
                for merge, entries in zip(group, made, strict=True):
                    rows = [_row(entry, merge.kind, next(found)) for entry in entries]
                    write_json(self._record(merge), [asdict(row) for row in rows])
        return [row for merge in wanted for row in self._rows(merge)]

    def _rows(self, merge: Merge) -> list[Row]:
        """The rows of a merge that the cache has."""
        return [
            Row(**record | {"cost": Cost(**record["cost"]), "choice": record["choice"] and Choice(**record["choice"])})
            for record in read_json(self._record(merge)) or ()
        ]

    def _make(self, merge: Merge, folder: Path) -> list[Entry]:
        """Makes a merge; where there are options to try, all of them, and chooses a second entry on validation data."""
        if not merge.tries:
            model = self._model(merge, folder)
            return [Entry(merge.label, model, self._run(merge, model))]
        tried: list[Candidate] = []
        costs = []
        for number, options in enumerate(merge.tries, 1):
            label = f"{merge.label}, solve {number} of {len(merge.tries)}"
            solve = replace(merge, label=label, options={**merge.options, **options}, tries=())
            model = self._model(solve, folder)
            costs.append(self._run(solve, model))
            tried += kept(options, model)
        found = evaluate([candidate.model for candidate in tried], self.cache, self.pool, "validation")
        choice = choose(tried, found, untuned=len(merge.tries[0]["keep"]) - 1)
        self.say(f"{merge.label}: best of {len(tried)} on validation data: {choice.named(choice.best)}")
        label = f"{merge.label}, tuned on {choice.labels} labels per task"
        return [
            Entry(merge.label, tried[choice.untuned].model, costs[0]),
            Entry(label, tried[choice.best].model, total(costs), choice),
        ]

    def _run(self, merge: Merge, model: Model) -> Cost:
        files = [self.statistics[expert.task] for expert in model.experts]
        cost = merges.run(merge, [expert.encoder for expert in model.experts], files, self.base, model.folder)
        self.say(f"{merge.label}: merged {len(model.experts)} experts in {cost.seconds:.1f} s")
        return cost

    def _model(self, merge: Merge, folder: Path) -> Model:
        """The folder a merge goes to, and the tasks to evaluate it on: those of the experts it joins."""
        names = merge.experts or tuple(task.name for task in self.tasks)
        joined = [expert for expert in self.experts if expert.task in names]
        return Model(folder / key(merge.label), [task for task in self.tasks if task.name in names], joined)

    def _is_kept(self, merge: Merge) -> bool:
        """Whether to take a merge's rows from the cache."""
        seconds = max((row.cost.seconds for row in self._rows(merge) if row.cost), default=0.0)
        if seconds < PATIENCE:
            return False
        self.say(f"{merge.label}: from an earlier run, which took {seconds:.0f} s to merge")
        return True

    def _record(self, merge: Merge) -> Path:
        """Where a merge's rows are kept: a name that changes with all it depends on."""
        model = self._model(merge, Path())
        inputs = [expert.digest for expert in model.experts], [task.digest for task in model.tasks]
        name = key(repr(merge), inputs, weights_digest(self.base), _library_digest())
        return self.cache / "merges" / f"{name}.json"


def _row(entry: Entry, kind: str, outcomes: Outcomes) -> Row:
    return Row(entry.label, kind, outcomes, entry.cost, weights_digest(entry.model.folder), entry.choice)


@functools.cache
def _library_digest() -> str:
    """A digest of the library's source as the run finds it: an older library's results are not taken for this one's."""
    spec = find_spec("merganser")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return key([path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*.py"))])
