"""The experts: the base encoder fine-tuned on each task, and their statistics; both kept in the cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from examples.demo.encoder import batches, load_encoder, pooled
from examples.demo.experts import Expert
from examples.demo.measuring import Classifier
from examples.demo.store import key, read_json, weights_digest, write_json, written_whole
from safetensors.torch import save_file
from torch import nn

from benchmarks.text_family.data import MAX_TOKENS, Task, digest
from merganser import Statistics, collect

Say = Callable[[str], None]

_PREFIX = "encoder."


@dataclass(frozen=True, slots=True)
class Settings:
    """How every expert is fine-tuned: all weights, AdamW, rates that fall linearly to 0.

    The head starts from noise. At the encoder's rate it would stay near it, and the encoder would turn its features to
    a random direction per task: experts as good, but far apart. Constant rates leave them less accurate and farther
    apart, too. Without dropout the experts are surer of their answers than they are right, which leaves the metrics
    to a few examples.
    """

    steps: int = 300
    batch: int = 16
    rate: float = 1e-4
    head_rate: float = 1e-3
    dropout: bool = True
    max_tokens: int = MAX_TOKENS
    seed: int = 0


def fine_tune(task: Task, base: Path, cache: Path, settings: Settings, say: Say) -> Expert:
    """The task's expert, from the cache if it is there."""
    made_with = key(digest(task.train), task.classes, weights_digest(base), asdict(settings))
    folder = cache / "experts" / f"{task.name}-{made_with}"
    if not (folder / "meta.json").exists():
        seconds = _train(task, base, folder, settings)
        say(f"fine-tuned {task.name} in {seconds:.0f} s")
    meta = read_json(folder / "meta.json")
    return Expert(task.name, folder / "encoder", folder / "head.safetensors", meta["digest"], meta["seconds"])


def _train(task: Task, base: Path, folder: Path, settings: Settings) -> float:
    torch.manual_seed(settings.seed)
    began = time.perf_counter()
    encoder = load_encoder(base)
    head = nn.Linear(encoder.config.hidden_size, task.classes)
    groups = [{"params": encoder.parameters()}, {"params": head.parameters(), "lr": settings.head_rate}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    targets = torch.tensor(task.train.targets)
    encoder.train(settings.dropout)
    for batch in islice(batches(task.train.ids, settings.batch, f"{task.name}/{settings.seed}"), settings.steps):
        logits = head(pooled(encoder, [task.train.ids[index] for index in batch]))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(nn.functional.cross_entropy(logits, targets[batch]))
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    with written_whole(folder) as draft:
        encoder.save_pretrained(draft / "encoder")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()},
            draft / "head.safetensors",
        )
        facts = {"digest": weights_digest(draft / "encoder"), "seconds": seconds, "settings": asdict(settings)}
        write_json(draft / "meta.json", facts)
    return seconds


def measure(
    expert: Expert,
    ids: Sequence[Sequence[int]],
    labels: Sequence[int] | str,
    kinds: tuple[str, ...],
    cache: Path,
    say: Say,
) -> Path:
    """The file of an expert's statistics, of its encoder alone.

    Args:
        expert: the expert.
        ids: the inputs.
        labels: the given labels, or the estimator that takes the expert's own: ``sampled`` or ``exact``.
        kinds: what to measure.
        cache: the benchmark's cache folder.
        say: called with each line of progress.
    """
    estimator, given = (labels, None) if isinstance(labels, str) else ("empirical", labels)
    name = key(
        expert.digest,
        weights_digest(expert.head.parent),
        tuple(map(tuple, ids)),
        labels,
        kinds,
        estimator,
        _collector(),
    )
    out = cache / "statistics" / f"{expert.task}-{name}.safetensors"
    if out.exists():
        return out
    began = time.perf_counter()
    classifier = Classifier(load_encoder(expert.encoder), expert.load_head())
    found = collect(classifier, list(padded(ids, given)), kinds, estimator=estimator)
    out.parent.mkdir(parents=True, exist_ok=True)
    gram, output_gram, fisher = map(_encoder_only, (found.gram, found.output_gram, found.fisher))
    Statistics(gram=gram, output_gram=output_gram, fisher=fisher).save(out)
    say(f"measured {expert.task}, {estimator} labels, in {time.perf_counter() - began:.0f} s")
    return out


def _encoder_only(table: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What belongs to the encoder, by the encoder's own names."""
    return {name.removeprefix(_PREFIX): value for name, value in table.items() if name.startswith(_PREFIX)}


def padded(
    ids: Sequence[Sequence[int]], labels: Sequence[int] | None = None, size: int = 16
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of texts of about one length, with their labels if there are some."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = [torch.tensor(ids[index]) for index in chosen]
        batch = {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        yield batch if labels is None else batch | {"labels": torch.tensor([labels[index] for index in chosen])}


@functools.cache
def _collector() -> str:
    return source_digest("merganser.statistics")


def source_digest(package: str) -> str:
    """A digest of a package's source: what an older one made is not taken for what this one makes."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return key([path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*.py"))])
