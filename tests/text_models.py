"""Tiny text models with a tokenizer, as folders, and data files for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "</s>",
    *("a", "good", "bad", "film", "plot", "was", "not", "very", "the", "and", "dull", "bright", "story", "it", "we"),
]


def add_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)


def write_encoder(folder: Path, seed: int = 0, *, head: int = 0, names: Iterable[str] = (), noise: float = 0.0) -> Path:
    """A BERT; a classifier with that many labels, if `head` is given; with noise, weights off those of the seed."""
    torch.manual_seed(seed)
    labels = list(names) or [f"LABEL_{index}" for index in range(head)]
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(WORDS),
        max_position_embeddings=24,
        pad_token_id=0,
        initializer_range=0.5,
        **({"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if head else {}),
    )
    model = (transformers.BertForSequenceClassification if head else transformers.BertModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def write_decoder(folder: Path, seed: int = 0, *, tied: bool = False) -> Path:
    """A Llama."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def write_seq2seq(folder: Path, seed: int = 2) -> Path:
    """A T5."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        vocab_size=len(WORDS),
        decoder_start_token_id=0,
        initializer_factor=3.0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different random sentences of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        length = int(torch.randint(2, 9, (), generator=generator))
        words = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        found[" ".join(WORDS[word] for word in words)] = None
    return list(found)
