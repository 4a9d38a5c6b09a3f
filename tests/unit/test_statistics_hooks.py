"""The comparison that decides whether hooks give exact gradients of single examples."""

from __future__ import annotations

import weakref

import pytest
import torch

from merganser.statistics._gradients import Comparison


def test_gradients_are_compared_as_they_arrive_and_none_is_kept() -> None:
    torch.manual_seed(0)
    truth = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.zeros(2)}
    ours = {name: torch.stack([g * (1 + 1e-6), torch.full_like(g, 7.0)]) for name, g in truth.items()}
    kept = [weakref.ref(g) for g in (*truth.values(), *ours.values())]
    comparison = Comparison(truth)
    for name in ("a", "b"):  # the third has no influence on the loss, so it never arrives
        comparison(name, 0, ours[name])
        comparison(name, 2, ours[name][1:])
        del ours[name]
    assert [ref() is None for ref in kept] == [True, True, False, True, True, False]
    assert comparison.agree()


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.2]), torch.zeros(2), None], ids=["off", "zero", "absent"])
def test_gradients_that_differ_do_not_agree(wrong: torch.Tensor | None) -> None:
    comparison = Comparison({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])})
    comparison("b", 0, torch.tensor([[3.0]]))
    if wrong is not None:
        comparison("a", 0, wrong[None])
    assert not comparison.agree()
