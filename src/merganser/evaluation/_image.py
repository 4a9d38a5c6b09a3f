"""Image classification: accuracy, and batch normalisation that is estimated again for merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from merganser._torch import torch
from merganser.errors import InputError
from merganser.evaluation._classification import accuracy, one_class
from merganser.evaluation._heads import classifier, head_of
from merganser.evaluation._items import Images, read_images
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._models import ModelFolder

__all__ = ["ImageClassification", "image_batches", "pixel_values"]


class ImageClassification:
    """The share of images whose likeliest label is theirs."""

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read the images, and check the labels against the head."""
        images, count = read_images(task, task.split), head_of(task, home).count
        labels = images.labels.tolist()
        wrong = next((index for index, label in enumerate(labels) if not 0 <= label < count), None)
        if wrong is not None:
            raise InputError("E0416", f"the label {labels[wrong]} is not one of the head's {count}", places=task.place)
        return Prepared((), images.digest, images.digests, warnings=one_class(labels), extra={"images": images})

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Label every image."""
        images: Images = prepared.extra["images"]
        logits = classifier(task, subject)
        right: list[float] = []
        losses: list[float] = []
        for start, pixels in image_batches(images.pixels, task.batch_size, config_of(subject)):
            targets = torch.from_numpy(images.labels[start : start + task.batch_size]).to(subject.device)
            hits, more = accuracy(logits({"pixel_values": pixels.to(subject.device)}), targets)
            right += hits
            losses += more
        return Outcomes("accuracy", tuple(right), others={"loss": sum(losses) / len(losses)})


def config_of(subject: Subject) -> dict[str, Any]:
    """The configuration of the model, as far as it is known."""
    return {} if subject.home is None else dict(subject.home.config)


def image_batches(images: npt.NDArray[Any], size: int, config: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Batches of images as a model reads them, each with the number of its first image."""
    for start in range(0, len(images), size):
        yield start, pixel_values(images[start : start + size], config)


def pixel_values(images: npt.NDArray[Any], config: dict[str, Any]) -> torch.Tensor:
    """Images (n, height, width, channels) of 0..255 as (n, channels, height, width) of -1..1, as the model wants them.

    Grey images are repeated over the channels of ``num_channels``, and resized to ``image_size`` (bilinear).
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    channels, wanted = config.get("num_channels"), config.get("image_size")
    if type(channels) is int and channels != pixels.shape[1]:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if type(wanted) is int and tuple(pixels.shape[2:]) != (wanted, wanted):
        pixels = torch.nn.functional.interpolate(pixels, (wanted, wanted), mode="bilinear", antialias=True)
    return pixels.contiguous()
