"""Merging layer by layer leaves out what is done already, and the merge has the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import merganser as mg
from merganser.engine import _sequential
from tests.helpers import tuned

LAYERS = 5


class Block(nn.Module):
    """Two weights, and a count of its calls, which is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        found: torch.Tensor = x + self.down(self.up(x).relu())
        return found


class Chain(nn.Module):
    """Blocks one after the other, between two more weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x).tanh()
        found: torch.Tensor = self.last(x)
        return found


class InPlace(Chain):
    """What a block returns is changed by the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x).mul_(0.5).sin_()
        found: torch.Tensor = self.last(x)
        return found


class Bridges(Chain):
    """Every block reads the two before it, and the last weight all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [self.first(x), self.first(x)]
        for block in self.blocks:
            seen.append(block(seen[-1] + seen[-2]).tanh())
        found: torch.Tensor = self.last(torch.stack(seen[1:]).sum(0))
        return found


class Opaque(Chain):
    """The blocks' outputs travel in an object."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        class Box:
            def __init__(self, value: torch.Tensor) -> None:
                self.value = value

        handles = [block.register_forward_hook(lambda _m, _a, out: Box(out)) for block in self.blocks]
        try:
            x = self.first(x)
            for block in self.blocks:
                x = block(x).value.tanh()
        finally:
            for handle in handles:
                handle.remove()
        found: torch.Tensor = self.last(x)
        return found


class Branches(nn.Module):
    """A list whose entries do not run one after the other, and differ in what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 2)])
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.cat([branch(x) for branch in self.branches], 1).tanh())
        return found


def family(make: type[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    base = make()
    return base, [tuned(base, 1), tuned(base, 2)]


def batches(seed: int, count: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(9, 5, generator=g) for _ in range(count)]


def merged(base: Any, models: Sequence[Any], data: Any, method: str, room: int, **options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sequential, "ROOM", room)
        found: dict[str, Any] = mg.merge(models, base=base, data=data, method=method, **options)
    return found


def assert_same(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert found.keys() == other.keys()
    for name, value in found.items():
        assert torch.equal(value, other[name]), name


def examples(model: nn.Module) -> list[int]:
    """How many examples each block saw."""
    return [sum(block.calls) for block in model.modules() if isinstance(block, Block)]


@pytest.mark.parametrize("make", [Chain, InPlace, Bridges, Opaque, Branches])
@pytest.mark.parametrize("method", ["regmean_pp", "output_matching", "sequential_mats"])
def test_the_bits_do_not_depend_on_what_is_kept(make: type[nn.Module], method: str) -> None:
    base, models = family(make)
    data = [batches(3), batches(4)]
    expected = merged(base, models, data, method, 0)
    for room in (1 << 30, 3000, 10):
        assert_same(merged(base, models, data, method, room), expected)


def test_a_second_round_begins_from_the_start() -> None:
    base, models = family(Chain)
    data = [batches(3), batches(4)]
    expected = merged(base, models, data, "sequential_mats", 0, rounds=2)
    assert_same(merged(base, models, data, "sequential_mats", 1 << 30, rounds=2), expected)


def test_a_settled_block_runs_once_per_batch_and_for_one_example_where_passes_are_compared() -> None:
    base, models = family(Chain)
    data = [batches(3, 20), batches(4, 20)]
    merged(base, models, data, "output_matching", 1 << 30)
    short = examples(models[0])
    for model in models:
        for block in model.modules():
            if isinstance(block, Block):
                block.calls.clear()
    merged(base, models, data, "output_matching", 0)
    whole = examples(models[0])
    groups = 2  # of weights in a block
    size = sum(map(len, data[0]))
    assert all(count <= (groups + 1) * size + 2 * (groups * LAYERS + 2) for count in short)
    assert whole[0] > groups * (LAYERS - 1) * size


@pytest.mark.parametrize("method", ["regmean_pp", "output_matching", "sequential_mats"])
def test_first_layers_that_all_models_share_stay_and_are_not_measured(method: str) -> None:
    base, models = family(Chain)
    for model in models:
        frozen = {n: v for n, v in base.state_dict().items() if n.startswith(("first", "blocks.0", "blocks.1", "last"))}
        model.load_state_dict(frozen, strict=False)
    data = [batches(3, 6), batches(4, 6)]
    found = merged(base, models, data, method, 1 << 30)
    for name, value in frozen.items():
        assert torch.equal(found[name], value) or name.startswith("last")
    assert not torch.equal(found["blocks.2.up.weight"], base.state_dict()["blocks.2.up.weight"])
    if method == "output_matching":
        assert 4 * examples(models[0])[0] < examples(models[0])[2]
    assert_same(found, merged(base, models, data, method, 0))


@pytest.mark.parametrize("sort", ["llama", "bert", "t5"])
def test_models_of_transformers(sort: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if sort == "llama":
        sizes: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 24, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, num_attention_heads=4, **sizes)
        base: nn.Module = transformers.LlamaForCausalLM(config)
    elif sort == "bert":
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
        base = transformers.BertModel(transformers.BertConfig(vocab_size=40, hidden_size=16, **sizes))
    else:
        sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=40, d_model=16, **sizes))
    models = [tuned(base, 1), tuned(base, 2)]
    ids = torch.randint(1, 40, (2, 8, 2, 5), generator=torch.Generator().manual_seed(5))
    more = {"decoder_input_ids": ids[0, 0, :, :3]} if sort == "t5" else {}
    data = [[{"input_ids": batch, **more} for batch in own] for own in ids]
    whole, passes = counted(base, models, data, 0)
    short, fewer = counted(base, models, data, 1 << 30)
    assert_same(short, whole)
    assert fewer < 0.75 * passes


def counted(base: Any, models: Sequence[nn.Module], data: Any, room: int) -> tuple[dict[str, Any], int]:
    """A merge, and how many modules of the last model it ran."""
    count: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda *_: count.append(1)) for m in models[-1].modules()]
    found = merged(base, models, data, "output_matching", room)
    for hook in hooks:
        hook.remove()
    return found, len(count)
