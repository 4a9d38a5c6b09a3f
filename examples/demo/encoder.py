"""The model of every task: a BERT encoder, the mean of its outputs over the tokens, a linear head."""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MAX_TOKENS = 32


def load_encoder(folder: Path) -> Any:
    """The encoder in a Hugging Face folder, in float32, without a pooling layer."""
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a Hugging Face folder."""
    return _transformers().AutoTokenizer.from_pretrained(folder)


def _transformers() -> Any:
    """The library, imported when it is needed: a run whose evaluations are all cached starts without it."""
    return importlib.import_module("transformers")


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut at `MAX_TOKENS`."""
    return list(tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"])


def pooled(encoder: Any, ids: Sequence[Sequence[int]]) -> Tensor:
    """Mean of the encoder's outputs over each text's tokens, padding left out: (texts, width)."""
    rows = [torch.tensor(row) for row in ids]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pooled_outputs(encoder, tokens, mask)


def pooled_outputs(encoder: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of the encoder's outputs over the tokens of padded texts: (texts, width)."""
    states: Tensor = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def batches(ids: Sequence[Sequence[int]], size: int, seed: str) -> Iterator[list[int]]:
    """Endless batches of indices in random order, of texts of about one length, so that little of them is padding."""
    random_ = random.Random(seed)
    order = list(range(len(ids)))
    while True:
        random_.shuffle(order)
        found: list[list[int]] = []
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size], key=lambda index: len(ids[index]))
            found += [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
        random_.shuffle(found)
        yield from found


def predictions(encoder: Any, head: nn.Linear, ids: Sequence[Sequence[int]], size: int = 64) -> list[int]:
    """The label that the head finds likeliest for each text."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found = [0] * len(ids)
    encoder.eval()
    with torch.inference_mode():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            likeliest = head(pooled(encoder, [ids[index] for index in batch])).argmax(dim=1).tolist()
            for index, label in zip(batch, likeliest, strict=True):
                found[index] = label
    return found
