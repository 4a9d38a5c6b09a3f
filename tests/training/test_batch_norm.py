"""Running statistics of batch normalisation, estimated again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merganser.errors import MerganserError
from merganser.training import update_batch_norm


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.BatchNorm1d(3, momentum=0.3)
        self.drop = torch.nn.Dropout(0.5)
        self.linear = torch.nn.Linear(3, 4)
        self.second = torch.nn.BatchNorm1d(4)
        self.plain = torch.nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.plain(self.second(self.linear(self.drop(self.first(x)))))
        return out


def data() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [2 + 3 * torch.randn(10, 3, generator=g) for _ in range(4)]


def running(norm: torch.nn.Module, what: str) -> torch.Tensor:
    return norm.get_buffer(f"running_{what}")


def test_the_statistics_are_those_of_the_batches() -> None:
    torch.manual_seed(0)
    net, batches = Net(), data()
    net(batches[0])  # leaves other statistics behind
    net.linear.eval()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    assert update_batch_norm(net, batches) == 4
    means = torch.stack([batch.mean(0) for batch in batches])
    variances = torch.stack([batch.var(0) for batch in batches])
    assert torch.allclose(running(net.first, "mean"), means.mean(0), atol=1e-5)
    assert torch.allclose(running(net.first, "var"), variances.mean(0), rtol=1e-5)
    # the second one sees batches that the first one normalised, without dropout
    inner = [net.linear((b - b.mean(0)) / (b.var(0, correction=0) + 1e-5).sqrt()) for b in batches]
    assert torch.allclose(running(net.second, "mean"), torch.stack([x.mean(0) for x in inner]).mean(0), atol=1e-5)
    assert torch.allclose(running(net.second, "var"), torch.stack([x.var(0) for x in inner]).mean(0), rtol=1e-4)
    assert [module.training for module in net.modules()] == modes
    assert net.first.momentum == 0.3
    assert all(torch.equal(weights[name], value) for name, value in net.named_parameters())


def test_a_second_call_gives_the_same() -> None:
    net, batches = Net(), data()
    update_batch_norm(net, batches)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    update_batch_norm(net, [(batch, torch.zeros(10)) for batch in batches])
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    update_batch_norm(net, [{"x": batch, "labels": torch.zeros(10)} for batch in batches])
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_a_model_without_batch_normalisation_reads_no_batch() -> None:
    batches = iter(data())
    assert update_batch_norm(torch.nn.Linear(2, 2), batches) == 0
    assert len(list(batches)) == 4


@pytest.mark.parametrize(("batches", "code"), [([], "E0417"), ([data()[0], "words"], "E0415")])
def test_nothing_changes_where_it_fails(batches: list[Any], code: str) -> None:
    net = Net()
    net(data()[0])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(MerganserError) as caught:
        update_batch_norm(net, batches)
    assert caught.value.code == code
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert net.first.momentum == 0.3
    assert all(module.training for module in net.modules())
