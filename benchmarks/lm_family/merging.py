"""The merges: which there are, making each in a process of its own, scoring it, throwing the weights away."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from examples.demo.merges import Cost, Merge, run
from examples.demo.store import key, read_json, weights_digest, write_json

from benchmarks.lm_family.family import Expert
from benchmarks.lm_family.measuring import Measured
from benchmarks.lm_family.scores import Scores, mean_loss, score

SCALES = (0.3, 0.5, 0.7, 1.0, 1.4)
"""Scales of task arithmetic to choose from by the validation parts."""

MERGES: tuple[tuple[Merge, str], ...] = (
    (Merge("average", "average", base=False), ""),
    (Merge("task arithmetic 0.3", "task_arithmetic", {"scale": 0.3}), ""),
    (Merge("task arithmetic 0.5", "task_arithmetic", {"scale": 0.5}), ""),
    (Merge("task arithmetic 1.0", "task_arithmetic", {"scale": 1.0}), ""),
    (Merge("TIES 0.2", "ties", {"density": 0.2, "scale": 1.0}), ""),
    (Merge("DARE 0.5, then 0.5", "dare", {"drop_rate": 0.5, "then": "task_arithmetic", "scale": 0.5}), ""),
    (Merge("ACTMat", "actmat"), ""),
    (Merge("TACT 0.5", "tact"), ""),
    (Merge("Fisher", "fisher", measured=True, base=False), "sampled"),
    (Merge("RegMean 0.9", "regmean", measured=True, base=False), "sampled"),
    (Merge("MaTS, inputs alone", "mats", {"objective": "gram"}, measured=True), "sampled"),
    (Merge("MaTS", "mats", measured=True), "sampled"),
    (Merge("MaTS, the text's labels", "mats", measured=True), "empirical"),
)
"""Every merge with fixed options, and the labels of the statistics that it is given."""

PAPER = (Merge("MaTS, the paper's recipe", "mats", {"recipe": "paper"}, measured=True), "sampled")
"""A hundred iterations: made on request, because it takes longer than all others together."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a model, its losses on the test windows of every book, and what the merge took."""

    label: str
    kind: str
    scores: Scores
    cost: Cost | None = None


@dataclass(frozen=True)
class Workshop:
    """What merges are made from, and where.

    Attributes:
        experts: the models.
        statistics: by estimator.
        base: the base model's folder.
        windows: test windows per book.
        validation: validation windows per book.
        length: tokens per window.
        cache: the benchmark's cache folder.
        say: called with each line of progress.
    """

    experts: Sequence[Expert]
    statistics: Mapping[str, Measured]
    base: Path
    windows: int
    validation: int
    length: int
    cache: Path
    say: Callable[[str], None]

    def references(self) -> list[Row]:
        """The base and every expert on all books, and every book's score by its own expert."""
        folders = {"base": self.base} | {f"fine-tuned on {e.book.name}": e.folder for e in self.experts}
        rows = []
        for label, folder in folders.items():
            rows.append(Row(label, "base" if folder == self.base else "expert", self._score(folder, "test")))
            self.say(f"{label}: {mean_loss(rows[-1].scores):.4f}")
        own = {e.book.name: row.scores[e.book.name] for e, row in zip(self.experts, rows[1:], strict=True)}
        return [*rows, Row("fine-tuned, each on its own book", "experts", own)]

    def row(self, merge: Merge, estimator: str) -> Row:
        """Makes and scores a merge."""
        cost, scores = self._outcome(merge, estimator, "test")
        self.say(f"{merge.label}: {mean_loss(scores):.4f}, merged in {cost.seconds:.1f} s")
        return Row(merge.label, "merge", scores, cost)

    def tuned(self) -> Row:
        """Task arithmetic at the scale with the least mean loss on the validation parts; its cost is of one merge."""
        losses = {}
        for scale in SCALES:
            merge = Merge(f"task arithmetic {scale}", "task_arithmetic", {"scale": scale})
            losses[scale] = mean_loss(self._outcome(merge, "", "validation")[1])
            self.say(f"  validation at scale {scale}: {losses[scale]:.4f}")
        best = min(SCALES, key=losses.__getitem__)
        found = self.row(Merge(f"task arithmetic {best}", "task_arithmetic", {"scale": best}), "")
        return Row(f"task arithmetic, tuned: {best}", "tuned", found.scores, found.cost)

    def _outcome(self, merge: Merge, estimator: str, part: str) -> tuple[Cost, dict[str, list[float]]]:
        files = self.statistics[estimator].files if estimator else ()
        inputs = [expert.digest for expert in self.experts], [file.name for file in files]
        size = self.windows if part == "test" else self.validation
        name = key(repr(merge), inputs, weights_digest(self.base), part, size, self.length, _library_digest())
        record = self.cache / "merges" / f"{name}.json"
        if not record.is_file():
            draft = Path(tempfile.mkdtemp(prefix="merge-", dir=self.cache))
            try:
                cost = run(merge, [expert.folder for expert in self.experts], files, self.base, draft / "merged")
                write_json(record, asdict(cost) | {"scores": self._score(draft / "merged", part)})
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        found = read_json(record)
        return Cost(found["seconds"], found["peak_mb"]), found["scores"]

    def _score(self, folder: Path, part: str) -> dict[str, list[float]]:
        count = self.windows if part == "test" else self.validation
        return score(folder, [expert.book for expert in self.experts], part, count, self.length, self.cache)


def _library_digest() -> str:
    """A digest of the library's source: merges of an older library are not taken for those of this one."""
    spec = find_spec("merganser")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return key([path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*.py"))])
