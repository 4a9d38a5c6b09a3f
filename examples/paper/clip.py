"""Kronecker factors of CLIP's vision encoder on image classification; `merganser collect` itself reads texts.

The head of a task is the embeddings of its class names, from the text encoder that nobody fine-tunes.

    python -m examples.paper.clip head CLIP CLASSES.txt -o HEAD.safetensors
    python -m examples.paper.clip collect ENCODER HEAD.safetensors IMAGES.safetensors -o STATISTICS.safetensors

CLASSES.txt holds a prompt per class ("a photo of a tabby cat."), in the order of the labels; IMAGES.safetensors holds
`pixel_values` (n, 3, size, size), preprocessed, and `labels` (n).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merganser as mg

Head = Mapping[str, Tensor]


def text_head(clip: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head that tokenized prompts make: their unit embeddings times the temperature, and the visual projection."""
    with torch.no_grad():
        pooled = clip.text_model(**inputs).pooler_output
        embeddings = nn.functional.normalize(clip.text_projection(pooled), dim=-1)
        weight = embeddings * clip.logit_scale.exp()
    return {"weight": weight, "projection": clip.visual_projection.weight.detach().clone()}


def contrast(head: Head) -> Callable[[Any, Any], Tensor]:
    """The loss of each image: cross-entropy of the cosines between its embedding and those of the classes."""

    def loss(output: Any, batch: Any) -> Tensor:
        features = nn.functional.normalize(output.pooler_output @ head["projection"].mT, dim=-1)
        return nn.functional.cross_entropy(features @ head["weight"].mT, batch["labels"], reduction="none")

    return loss


def measure(encoder: nn.Module, head: Head, images: Mapping[str, Tensor], size: int = 50) -> mg.Statistics:
    """`A` and `G` of every linear layer of the transformer, with the given labels."""
    data = [
        {key: images[key][start : start + size] for key in ("pixel_values", "labels")}
        for start in range(0, len(images["labels"]), size)
    ]
    return mg.collect(encoder, data, "kfac", loss=contrast(head), include=["*encoder.layers.*"])


def main() -> None:
    """Runs the script."""
    from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head", help="embed the classes of a task")
    head.add_argument("clip", type=Path, help="folder of the whole CLIP model, with its tokenizer")
    head.add_argument("classes", type=Path, help="one prompt per line")
    collect = commands.add_parser("collect", help="measure a fine-tuned encoder")
    collect.add_argument("encoder", type=Path, help="folder of the fine-tuned vision model")
    collect.add_argument("head", type=Path)
    collect.add_argument("images", type=Path)
    for command in (head, collect):
        command.add_argument("--out", "-o", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "head":
        prompts = given.classes.read_text(encoding="utf-8").splitlines()
        inputs = AutoTokenizer.from_pretrained(given.clip)(prompts, padding=True, return_tensors="pt")
        save_file(text_head(CLIPModel.from_pretrained(given.clip), inputs), given.out)
    else:
        encoder = CLIPVisionModel.from_pretrained(given.encoder)
        measure(encoder, load_file(given.head), load_file(given.images)).save(given.out)


if __name__ == "__main__":
    main()
