"""What is no merge: an encoder that learns from the experts' answers to the inputs of the statistics."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from examples.demo.encoder import load_encoder
from examples.demo.experts import Expert
from examples.demo.measuring import Classifier
from torch import nn

RATE = 1e-4

Batches = Sequence[Mapping[str, torch.Tensor]]


def distilled(
    encoder: Any, experts: Sequence[Expert], inputs: Sequence[Batches], steps: Sequence[int], seed: int = 0
) -> Iterator[tuple[int, float]]:
    """Adam on the divergence of the expert's answers from the encoder's, behind the expert's head.

    Every step takes a batch of one task. There is no dropout.

    Args:
        encoder: where to start; it is changed.
        experts: the experts.
        inputs: the batches of each expert's task.
        steps: after which counts of steps to stop over.
        seed: of the order.

    Yields:
        Each of the counts, and the seconds of training until then.
    """
    random_ = random.Random(f"distillation/{seed}")
    torch.manual_seed(seed)
    heads = [expert.load_head() for expert in experts]
    pairs = []
    for task, (expert, batches) in enumerate(zip(experts, inputs, strict=True)):
        teacher = Classifier(load_encoder(expert.encoder), heads[task]).eval()
        with torch.inference_mode():
            answers = [teacher(**batch).log_softmax(1) for batch in batches]
        pairs += [(task, batch, answer.clone()) for batch, answer in zip(batches, answers, strict=True)]
    optimizer = torch.optim.Adam(encoder.parameters(), lr=RATE, fused=True)
    encoder.eval()
    seconds, done = 0.0, 0
    order: list[int] = []
    for stop in steps:
        began = time.perf_counter()
        while done < stop:
            if not order:
                order = random_.sample(range(len(pairs)), len(pairs))
            task, batch, answer = pairs[order.pop()]
            found = Classifier(encoder, heads[task])(**batch).log_softmax(1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(
                nn.functional.kl_div(found, answer, reduction="batchmean", log_target=True),
                inputs=list(encoder.parameters()),
            )
            optimizer.step()
            done += 1
        seconds += time.perf_counter() - began
        yield stop, seconds
