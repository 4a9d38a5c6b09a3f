"""Image tasks: ResNets and ViTs on arrays, and batch normalisation that is estimated again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.evaluation._image import pixel_values

transformers = pytest.importorskip("transformers")


def write_resnet(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(folder)
    return folder


def write_images(path: Path, count: int = 40, *, labels: int = 3, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_test": rng.integers(0, 256, (count, 12, 12, 1), dtype=np.uint8),
        "y_test": rng.integers(0, labels, count),
        "x_train": rng.integers(100, 256, (count, 12, 12, 1), dtype=np.uint8),
        "y_train": rng.integers(0, labels, count),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


@pytest.fixture
def head(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.randn(3, 12, generator=generator), "bias": torch.zeros(3)}, path)
    return path


def test_images_are_classified_by_the_pooled_network(tmp_path: Path, head: Path) -> None:
    folder, data = write_resnet(tmp_path / "m"), write_images(tmp_path / "d.npz")
    task: dict[str, Any] = {"kind": "image", "data": str(data), "head": str(head), "batch_size": 7}
    found = mg.evaluate(folder, {"tasks": {"t": task, "pooler": {**task, "pooling": "pooler"}}})
    model, tensors, arrays = transformers.AutoModel.from_pretrained(folder).eval(), load_file(head), np.load(data)
    with torch.no_grad():
        pixels = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 127.5 - 1
        features = model(pixel_values=pixels).pooler_output.flatten(1)
    right = (features @ tensors["weight"].T).argmax(1).numpy() == arrays["y_test"]
    assert found.results["t"].outcomes.values == tuple(map(float, right))
    assert found.results["pooler"].outcomes.values == tuple(map(float, right))


def test_batch_norm_is_estimated_on_the_training_images_and_the_model_is_left_alone(tmp_path: Path, head: Path) -> None:
    folder, data = write_resnet(tmp_path / "m"), write_images(tmp_path / "d.npz")
    state = load_file(folder / "model.safetensors")
    before = {name: value.clone() for name, value in state.items()}
    tasks: dict[str, Any] = {
        "base": str(folder),
        "tasks": {"t": {"kind": "image", "data": str(data), "head": str(head), "batch_size": 40}},
    }
    again = mg.evaluate(state, {**tasks, "batch_norm": 40}).results["t"].outcomes
    assert all(torch.equal(state[name], before[name]) for name in before)
    model, tensors, arrays = transformers.AutoModel.from_pretrained(folder), load_file(head), np.load(data)
    order = list(range(40))
    random.Random(0).shuffle(order)
    mg_pixels = pixel_values(arrays["x_train"][order], {"num_channels": 1})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(pixel_values=mg_pixels)
        features = model.eval()(pixel_values=pixel_values(arrays["x_test"], {"num_channels": 1})).pooler_output.flatten(
            1
        )
    loss = torch.nn.functional.cross_entropy(features @ tensors["weight"].T, torch.from_numpy(arrays["y_test"]))
    assert again.others["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert again.others["loss"] != mg.evaluate(state, tasks).results["t"].outcomes.others["loss"]


def test_a_classifier_of_images_with_its_own_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    data = write_images(tmp_path / "d.npz")
    found = mg.evaluate(tmp_path / "m", {"tasks": {"t": {"kind": "image", "data": str(data), "examples": 9}}})
    with torch.no_grad():
        pixels = pixel_values(np.load(data)["x_test"][:9], {"num_channels": 3, "image_size": 8})
        logits = model(pixel_values=pixels).logits
    assert pixels.shape == (9, 3, 8, 8)
    right = logits.argmax(1).numpy() == np.load(data)["y_test"][:9]
    assert found.results["t"].outcomes.values == tuple(map(float, right))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"y_test": None}, "E0415"),
        ({"y_test": np.zeros(3, dtype=np.int64)}, "E0415"),
        ({"x_test": np.zeros((40, 12, 12, 1))}, "E0415"),
        ({"y_test": np.full(40, 3)}, "E0416"),
        ({"x_test": np.array([{}] * 40, dtype=object)}, "E0414"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, head: Path, changes: dict[str, Any], code: str) -> None:
    folder, data = write_resnet(tmp_path / "m"), write_images(tmp_path / "d.npz", **changes)
    found = mg.evaluate(folder, {"tasks": {"t": {"kind": "image", "data": str(data), "head": str(head)}}})
    assert found.errors["t"].code == code
