"""The rows of the table: what merges are compared with, and each merge made, timed and evaluated."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from examples.demo import merges
from examples.demo.evaluation import Model, evaluate
from examples.demo.experts import Expert
from examples.demo.merges import Cost, Merge
from examples.demo.store import key, read_json, weights_digest, write_json
from examples.demo.table import Row
from examples.demo.tasks import Task

AT_ONCE = 4
"""Merges whose weights are on the disk at once, to be evaluated side by side."""
PATIENCE = 5.0
"""Seconds: a merge that once took longer is not made again, its cost and outcomes are read from the cache."""


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
                models = [self._model(merge, Path(folder)) for merge in group]
                costs = [self._make(merge, model) for merge, model in zip(group, models, strict=True)]
                found = evaluate(models, self.cache, self.pool)
                for merge, model, cost, outcomes in zip(group, models, costs, found, strict=True):
                    row = {"label": merge.label, "weights": weights_digest(model.folder), "outcomes": outcomes}
                    write_json(self._record(merge), row | asdict(cost))
        return [self._row(merge) for merge in wanted]

    def _row(self, merge: Merge) -> Row:
        record = read_json(self._record(merge))
        cost = Cost(record["seconds"], record["peak_mb"])
        return Row(merge.label, merge.kind, record["outcomes"], cost, record["weights"])

    def _make(self, merge: Merge, model: Model) -> Cost:
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
        """Whether to take a merge's row from the cache."""
        record = read_json(self._record(merge))
        if record is None or record["seconds"] < PATIENCE:
            return False
        self.say(f"{merge.label}: from an earlier run, which took {record['seconds']:.0f} s to merge")
        return True

    def _record(self, merge: Merge) -> Path:
        """Where a merge's row is kept: a name that changes with all it depends on."""
        model = self._model(merge, Path())
        inputs = [expert.digest for expert in model.experts], [task.digest for task in model.tasks]
        name = key(repr(merge), inputs, weights_digest(self.base), _library_digest())
        return self.cache / "merges" / f"{name}.json"


@functools.cache
def _library_digest() -> str:
    """A digest of the library's source as the run finds it: an older library's results are not taken for this one's."""
    spec = find_spec("merganser")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return key([path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*.py"))])
