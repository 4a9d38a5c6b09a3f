"""Training of graft masks, the adapter pull, and masks as an option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.errors import MerganserError
from merganser.training import AdapterPull, train_graft_mask

State = dict[str, torch.Tensor]


def pair() -> tuple[State, State]:
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (6, 4), "up.weight": (5, 4), "up.bias": (5,), "lm_head.weight": (6, 5)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return base, {name: value + torch.randn(value.shape, generator=g) for name, value in base.items()}


# --- the mask as an option -------------------------------------------------------------------------------------------


def test_masks_in_memory_and_in_files_of_any_type(tmp_path: Path) -> None:
    base, tuned = pair()
    mask = {"up.weight": torch.arange(20).view(5, 4) % 3 == 0}
    expected = {k: v.clone() for k, v in base.items()}
    expected["up.weight"] += mask["up.weight"] * 0.5 * (tuned["up.weight"] - base["up.weight"])
    for dtype in (torch.bool, torch.uint8, torch.float32):
        file = tmp_path / f"{str(dtype)[6:]}.safetensors"
        save_file({name: value.to(dtype) for name, value in mask.items()}, file)
        for given in (file, str(file), {name: value.to(dtype) for name, value in mask.items()}, [file]):
            merged = mg.merge([tuned], base=base, method="graft", mask=given, scale=0.5)
            assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_one_mask_for_each_model() -> None:
    base, tuned = pair()
    first, second = {"up.bias": torch.ones(5)}, {"up.weight": torch.ones(5, 4)}
    merged = mg.merge([tuned, tuned], base=base, method="graft", mask=[first, second], weights=[1, 2])
    assert torch.allclose(merged["up.bias"], tuned["up.bias"])
    assert torch.allclose(merged["up.weight"], 2 * tuned["up.weight"] - base["up.weight"], atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_the_lock_file_names_the_mask(tmp_path: Path) -> None:
    base, tuned = pair()
    save_file({"up.bias": torch.ones(5)}, tmp_path / "mask.safetensors")
    out = mg.merge([tuned], base=base, method="graft", mask=tmp_path / "mask.safetensors", out=tmp_path / "out")
    lock = (out / "merge.lock.json").read_text()
    assert '"mask": "mask.safetensors"' in lock
    assert str(tmp_path) not in lock


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        ({"up.bias": torch.ones(4)}, "E0407"),
        ({"up.bias": torch.full((5,), 2.0)}, "E0306"),
        ({"down.bias": torch.ones(5)}, "E0406"),
        (3, "E0306"),
        ("no such file", "E0401"),
        ([{"up.bias": torch.ones(5)}] * 3, "E0306"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, code: str) -> None:
    base, tuned = pair()
    with pytest.raises(MerganserError) as caught:
        mg.merge([tuned], base=base, method="graft", mask=mask)
    assert caught.value.code == code


def test_without_a_mask_the_largest_changes_are_taken() -> None:
    base, tuned = pair()
    merged = mg.merge([tuned], base=base, method="graft", density=0.4)
    changes = torch.cat([(tuned[name] - base[name]).abs().view(-1) for name in ("up.weight", "up.bias")])
    threshold = changes.sort(descending=True).values[int(0.4 * 25) - 1]
    for name in ("up.weight", "up.bias"):
        delta = tuned[name] - base[name]
        assert torch.equal(merged[name] != base[name], delta.abs() > threshold)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


# --- training --------------------------------------------------------------------------------------------------------


def loss(weights: State, batch: torch.Tensor) -> torch.Tensor:
    return (batch @ weights["up.weight"].T + weights["up.bias"]).square().mean()


BATCHES = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_one_step_is_gradient_descent_through_the_soft_mask() -> None:
    """Against autograd through the whole expression, whose gradient is what the released code writes out."""
    base, tuned = pair()
    init = {name: torch.full(tuned[name].shape, 9.5) for name in ("up.weight", "up.bias")}
    deltas = {name: tuned[name] - base[name] for name in init}
    patch = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    scores = {name: value.clone().requires_grad_() for name, value in init.items()}
    total = torch.zeros(())
    for batch in BATCHES[:2]:
        weights = {name: base[name] + torch.sigmoid(s - 10) * deltas[name] for name, s in scores.items()}
        total = total + loss(weights, batch) / 2
    gradients = dict(zip(scores, torch.autograd.grad(total, list(scores.values())), strict=True))
    expected = {k: torch.sigmoid(s.detach() - 50 * gradients[k] - 10) > 0.5 for k, s in scores.items()}
    found = train_graft_mask(
        base, tuned, loss, BATCHES, density=0, epochs=1, learning_rate=50, accumulate=2, init=init, names=list(init)
    )
    assert set(found) == set(patch) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(value.any() for value in expected.values())


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    base, tuned = pair()
    seen: list[State] = []

    def score(weights: State) -> float:
        seen.append(weights)
        return [0.0, 2.0, 2.0, 1.0][len(seen) - 1]

    out = tmp_path / "mask.safetensors"
    options: dict[str, Any] = {"density": 0.2, "learning_rate": 1e6, "epochs": 4}
    mask = train_graft_mask(base, tuned, loss, BATCHES, score=score, out=out, **options)
    merged = mg.merge([tuned], base=base, method="graft", mask=out)
    assert all(torch.allclose(merged[name], value) for name, value in seen[1].items())
    assert any(not torch.equal(seen[1][name], seen[3][name]) for name in base)
    assert all(torch.equal(mask[name], value) for name, value in load_file(out).items())
    assert set(mask) == {"up.weight", "up.bias"}
    again = train_graft_mask(base, tuned, loss, BATCHES, density=0.2, learning_rate=1e6, epochs=2)
    assert all(torch.equal(mask[name], value) for name, value in again.items())


def test_nothing_given_is_changed() -> None:
    base, tuned = pair()
    copies = [{name: value.clone() for name, value in state.items()} for state in (base, tuned)]
    train_graft_mask(base, tuned, loss, BATCHES, density=0.2, epochs=2)
    for state, copy in zip((base, tuned), copies, strict=True):
        assert all(torch.equal(state[name], value) and not value.requires_grad for name, value in copy.items())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"density": 2.0}, "E0201"),
        ({"accumulate": 0}, "E0201"),
        ({"data": []}, "E0201"),
        ({"names": ["down.weight"]}, "E0405"),
        ({"tuned": {"up.weight": torch.zeros(2)}}, "E0407"),
        ({"tuned": {}}, "E0405"),
        ({"init": {"up.weight": torch.zeros(5, 4)}}, "E0405"),
        ({"loss": lambda weights, batch: weights["up.bias"].sum() * float("nan")}, "E0603"),
    ],
)
def test_training_refuses(change: dict[str, Any], code: str) -> None:
    base, tuned = pair()
    arguments: dict[str, Any] = {"tuned": tuned, "loss": loss, "data": BATCHES, **change}
    rest = {k: v for k, v in change.items() if k not in ("tuned", "loss", "data")}
    with pytest.raises(MerganserError) as caught:
        train_graft_mask(base, arguments["tuned"], arguments["loss"], arguments["data"], **rest)
    assert caught.value.code == code


# --- the adapter pull ------------------------------------------------------------------------------------------------


def test_the_pull_is_toward_the_mean_of_the_earlier_adapters() -> None:
    earlier = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    adapter = {"a": torch.nn.Parameter(torch.tensor([0.0, 0.0]))}
    AdapterPull(earlier, momentum=0.25).step(adapter)
    assert adapter["a"].tolist() == [0.5, 1.0]
    assert earlier[0]["a"].tolist() == [1.0, 2.0]
    AdapterPull([], momentum=0.25).step(adapter)
    assert adapter["a"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("earlier", "adapter", "momentum", "code"),
    [
        ([{"a": torch.zeros(2)}], {"a": torch.zeros(3)}, 0.1, "E0407"),
        ([{"a": torch.zeros(2)}], {"b": torch.zeros(2)}, 0.1, "E0405"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], {}, 0.1, "E0405"),
        ([], {}, 1.5, "E0201"),
    ],
)
def test_the_pull_refuses(earlier: list[State], adapter: State, momentum: float, code: str) -> None:
    with pytest.raises(MerganserError) as caught:
        AdapterPull(earlier, momentum=momentum).step(adapter)
    assert caught.value.code == code
