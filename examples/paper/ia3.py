"""Fisher blocks of (IA)^3 vectors, which `merganser collect` cannot reach: they live in adapters, not in models.

    python -m examples.paper.ia3 BASE ADAPTER.safetensors --data TASK.jsonl -o STATISTICS.safetensors

The adapter is a file as PEFT saves it: `base_model.model.<layer>.ia3_l`, of shape (out, 1) to scale a layer's output
(keys and values) or (1, in) to scale its input (the second matrix of a feed-forward layer). PEFT is not needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merganser as mg
from merganser.training import insert_ia3


def batches(tokenizer: Any, data: Path, examples: int, size: int = 16) -> Iterator[dict[str, Tensor]]:
    """The first examples of a file of JSON lines with `text` and `target`."""
    with data.open(encoding="utf-8") as lines:
        records = islice((json.loads(line) for line in lines), examples)
        while group := list(islice(records, size)):
            options = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
            inputs = tokenizer([record["text"] for record in group], **options)
            labels = tokenizer(text_target=[record["target"] for record in group], **options)
            ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
            yield {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": ids}


def measure(model: nn.Module, data: Iterator[dict[str, Tensor]] | list[dict[str, Tensor]]) -> mg.Statistics:
    """`F = mean over examples of g g'` for every vector, g the gradient of its example's loss with the given labels."""
    return mg.collect(model, data, "block", loss="seq2seq", include=["*.ia3_l"])


def main() -> None:
    """Runs the script."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Fisher blocks of the (IA)^3 vectors of a T5.")
    parser.add_argument("base", type=Path, help="folder of the model that the adapter belongs to")
    parser.add_argument("adapter", type=Path, help="adapter_model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with text and target")
    parser.add_argument("--out", "-o", type=Path, required=True, help="statistics file to write")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--ones", type=Path, help="also write the adapter that changes nothing, the recipe's base")
    given = parser.parse_args()
    vectors = load_file(given.adapter)
    if given.ones is not None:
        save_file({name: torch.ones_like(vector) for name, vector in vectors.items()}, given.ones)
    model = insert_ia3(AutoModelForSeq2SeqLM.from_pretrained(given.base), vectors)
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    measure(model, batches(tokenizer, given.data, given.examples)).save(given.out)


if __name__ == "__main__":
    main()
