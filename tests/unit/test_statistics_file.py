"""Statistics in memory and in files: sharing, adding, reading one tensor, damage, resuming."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import merganser.statistics as ms
from merganser.errors import (
    EnvironmentFault,
    InputError,
    MerganserError,
    NumericError,
    ResourceError,
    SecurityError,
    UsageError,
)
from tests.unit.statistics_models import close, make


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(count: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 4, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(count)
    ]


def same(a: ms.Statistics, b: ms.Statistics) -> None:
    for table in ms.TABLES:
        assert set(a.table(table)) == set(b.table(table))
        for name in a.table(table):
            assert torch.equal(a.table(table)[name], b.table(table)[name])
    assert dict(a.counts) == dict(b.counts)
    assert a.transposed == b.transposed


def test_a_file_holds_shared_inputs_once(tmp_path: Path) -> None:
    case = make("bert")
    found = ms.collect(case.model, [case.batch], ["kfac", "fisher", "block", "rows"])
    path = tmp_path / "s.safetensors"
    found.save(path)
    read = ms.Statistics.load(path)
    same(found, read)
    assert read.groups == found.groups
    assert read.provenance == json.loads(json.dumps(found.provenance))
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        assert file.metadata()["format"] == "pt"
    stem = "bert.encoder.layer.0.attention.self"
    assert f"gram/{stem}.query.weight" in keys
    assert f"gram/{stem}.key.weight" not in keys
    assert {f"output_gram/{stem}.{part}.weight" for part in ("query", "key", "value")} <= keys


def test_provenance_says_where_it_comes_from(model: nn.Module) -> None:
    found = ms.collect(model, batches(), "fisher", estimator="sampled", seed=3)
    facts = found.provenance
    assert (facts["estimator"], facts["label_source"], facts["seed"]) == ("sampled", "sampled", 3)
    assert facts["examples"] == 20
    assert facts["dtype"] == "float32"
    assert facts["model"]["weights"]["0.weight"] == ms.tensor_digest(model.get_parameter("0.weight"))
    other = ms.collect(model, batches(seed=1), "fisher")
    assert other.provenance["data"] != facts["data"]
    assert other.provenance["model"] == facts["model"]


def test_statistics_know_their_model(model: nn.Module, tmp_path: Path) -> None:
    found = ms.collect(model, batches(), "gram")
    found.save(tmp_path / "s.safetensors")
    read = ms.Statistics.load(tmp_path / "s.safetensors")
    read.verify(model)
    read.verify({name: p.to(torch.bfloat16) for name, p in model.state_dict().items()})
    changed = {name: p.clone() for name, p in model.state_dict().items()}
    changed["2.weight"] += 0.01
    with pytest.raises(InputError, match=r"2\.weight"):
        read.verify(changed)


def test_a_long_tensor_has_the_same_digest_in_memory_and_in_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from merganser.checkpoint import open_checkpoint

    tensor = torch.randn(123, 457)
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "w.safetensors"))
    assert ms.checkpoint_digest(checkpoint, "w") == ms.tensor_digest(tensor)
    assert ms.tensor_digest(tensor) != ms.tensor_digest(tensor + 0.1)


def test_reading_one_tensor_reads_no_other(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.checkpoint import FileCheckpoint

    ms.collect(model, batches(), ["kfac"]).save(tmp_path / "s.safetensors")
    seen: list[str] = []
    original = FileCheckpoint.read_range

    def spy(self: FileCheckpoint, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        seen.append(name)
        original(self, name, start, stop, out)

    monkeypatch.setattr(FileCheckpoint, "read_range", spy)
    read = ms.Statistics.load(tmp_path / "s.safetensors")
    assert read.describe("gram", "2.weight") == ((6, 6), torch.float32)
    assert "2.weight" in read.gram
    assert read.gram.get("nothing") is None
    assert not seen
    read.gram["2.weight"]
    assert seen == ["gram/2.weight"]


def test_adding_in_memory_and_in_files_is_collecting_all(model: nn.Module, tmp_path: Path) -> None:
    kinds = ["kfac", "fisher", "block", "rows"]
    data = batches(6)
    whole = ms.collect(model, data, kinds)
    parts = [ms.collect(model, data[i:j], kinds) for i, j in ((0, 1), (1, 4), (4, 6))]
    paths = []
    for i, part in enumerate(parts):
        paths.append(tmp_path / f"{i}.safetensors")
        part.save(paths[-1])
    merged = ms.merge_files(paths, tmp_path / "all.safetensors")
    summed = sum(parts)
    assert isinstance(summed, ms.Statistics)
    for table in ms.TABLES:
        for name, tensor in merged.table(table).items():
            close(summed.table(table)[name], tensor, 1e-6)
    for table in ms.TABLES:
        for name, tensor in whole.table(table).items():
            close(merged.table(table)[name], tensor, 1e-6)
    assert merged.counts == whole.counts
    assert len(merged.provenance["data"]) == 3
    assert merged.provenance["examples"] == 30
    assert torch.equal(merged.rows["0.bias"], whole.rows["0.bias"])


def test_what_cannot_be_added(model: nn.Module, tmp_path: Path) -> None:
    a = ms.collect(model, batches(), "gram")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for b, message in (
        (ms.collect(other, batches(seed=2), "gram"), "different models"),
        (ms.collect(model, batches(seed=2), "kfac"), "only one of them"),
        (ms.Statistics(gram={"0.weight": torch.eye(4), "2.weight": torch.eye(6)}), "count"),
    ):
        with pytest.raises(InputError, match=message):
            a + b
    fisher = ms.collect(model, batches(), "fisher")
    with pytest.raises(InputError, match="estimator"):
        fisher + ms.collect(model, batches(seed=1), "fisher", estimator="sampled")
    a.save(tmp_path / "a.safetensors")
    a.save(tmp_path / "again.safetensors")
    with pytest.raises(InputError, match="same examples"):
        ms.merge_files([tmp_path / "a.safetensors", tmp_path / "again.safetensors"], tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_parts_of_one_file_that_overlap_cannot_be_added(model: nn.Module, tmp_path: Path) -> None:
    found = ms.collect(model, batches(), "gram")
    paths = []
    for start, stop in ((0, 4), (4, 6), (3, 5)):
        data = [{"digest": "d", "examples": [start, stop]}]
        paths.append(tmp_path / f"{start}.safetensors")
        dataclasses.replace(found, provenance={**found.provenance, "data": data}).save(paths[-1])
    ms.merge_files(paths[:2], tmp_path / "good.safetensors")
    for pair in (paths[::2], paths[1:]):
        with pytest.raises(InputError, match="same examples"):
            ms.merge_files(pair, tmp_path / "bad.safetensors")


def test_statistics_made_by_hand(tmp_path: Path) -> None:
    shared = torch.eye(3)
    made = ms.Statistics(gram={"a": shared, "b": shared}, fisher={"a": torch.rand(2, 3)}, rows={"v": torch.rand(4, 3)})
    assert made.groups == (("a", "b"),)
    made.save(tmp_path / "s.safetensors")
    same(made, ms.Statistics.load(tmp_path / "s.safetensors"))
    wrong: list[dict[str, Any]] = [{"gram": torch.rand(2, 3)}, {"block": torch.rand(3)}, {"rows": torch.rand(3)}]
    for tables in wrong:
        with pytest.raises(InputError, match="shape"):
            ms.Statistics(**{table: {"a": tensor} for table, tensor in tables.items()})  # type: ignore[arg-type]


def test_files_are_not_overwritten(model: nn.Module, tmp_path: Path) -> None:
    found = ms.collect(model, batches(), "gram")
    path = tmp_path / "s.safetensors"
    found.save(path)
    with pytest.raises(EnvironmentFault, match="exists"):
        found.save(path)
    found.save(path, overwrite=True)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"precious")
    with pytest.raises(EnvironmentFault, match="never replaced"):
        found.save(foreign, overwrite=True)
    with pytest.raises(EnvironmentFault, match="exists"):
        ms.collect(model, batches(), "gram", out=foreign)
    assert foreign.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.safetensors", "s.safetensors"]


def rewrite(path: Path, **metadata: str | None) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    for key, value in metadata.items():
        if value is None:
            del table["__metadata__"][key]
        else:
            table["__metadata__"][key] = value
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "metadata",
    [
        {"merganser_statistics": None},
        {"merganser_statistics": "99"},
        {"counts": "not json"},
        {"counts": '{"gram/0.weight": -1}'},
        {"counts": "[]"},
        {"aliases": '{"gram/x": "gram/nothing"}'},
        {"aliases": '{"gram/x": 3}'},
        {"aliases": '{"gram/0.weight": "gram/2.weight"}'},
        {"transposed": "[3]"},
        {"provenance": None},
    ],
)
def test_damaged_metadata(model: nn.Module, tmp_path: Path, metadata: dict[str, str | None]) -> None:
    path = tmp_path / "s.safetensors"
    ms.collect(model, batches(), "gram").save(path)
    ms.Statistics.load(path)
    rewrite(path, **metadata)
    with pytest.raises(InputError) as caught:
        ms.Statistics.load(path)
    assert caught.value.code == "E0418"
    assert str(path) in str(caught.value)


def test_damaged_files(model: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    ms.collect(model, batches(), "gram").save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    with pytest.raises(InputError, match="truncated"):
        ms.Statistics.load(path)
    path.write_bytes(b"\x80\x04" + b"x" * 100)
    with pytest.raises(SecurityError):
        ms.Statistics.load(path)
    with pytest.raises(InputError, match="does not exist"):
        ms.Statistics.load(tmp_path / "nothing.safetensors")
    save_file({"weight": torch.eye(2)}, path)
    with pytest.raises(InputError, match="no statistics"):
        ms.Statistics.load(path)
    bad = ms.Statistics(gram={"a": torch.full((2, 2), float("nan")), "b": torch.eye(2)})
    bad.save(tmp_path / "nan.safetensors")
    read = ms.Statistics.load(tmp_path / "nan.safetensors")
    assert torch.equal(read.gram["b"], torch.eye(2))
    with pytest.raises(NumericError, match="gram/a"):
        read.gram["a"]


class StopError(Exception):
    """What kills a run in these tests."""


def failing(data: list[Any], after: int) -> Iterator[Any]:
    for index, batch in enumerate(data):
        if index == after:
            raise StopError
        yield batch


@pytest.mark.parametrize("estimator", ["empirical", "sampled"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_resumed_run_gives_the_same_bits(model: nn.Module, tmp_path: Path, after: int, estimator: str) -> None:
    kinds = ["kfac", "fisher", "block", "rows"]
    data = batches(6)
    truth = ms.collect(model, data, kinds, estimator=estimator)
    state = tmp_path / "state"
    settings: dict[str, Any] = {"checkpoint": state, "checkpoint_seconds": 0.0, "estimator": estimator}
    with pytest.raises(StopError):
        ms.collect(model, failing(data, after), kinds, **settings)
    assert state.exists()
    found = ms.collect(model, iter(data), kinds, resume=True, **settings)
    same(found, truth)
    assert found.provenance["data"] == truth.provenance["data"]
    assert not state.exists()


def test_a_run_is_resumed_only_with_the_same_model_data_and_settings(model: nn.Module, tmp_path: Path) -> None:
    data = batches(6)
    state = tmp_path / "state"
    settings: dict[str, Any] = {"checkpoint": state, "checkpoint_seconds": 0.0}
    with pytest.raises(StopError):
        ms.collect(model, failing(data, 3), "gram", **settings)
    kept = state.read_bytes()
    with pytest.raises(InputError, match="other settings"):
        ms.collect(model, data, "kfac", resume=True, **settings)
    state.write_bytes(kept)
    with pytest.raises(InputError, match="data differ"):
        ms.collect(model, batches(6, seed=5), "gram", resume=True, **settings)
    state.write_bytes(kept)
    fresh = ms.collect(model, data, "gram", **settings)
    same(fresh, ms.collect(model, data, "gram"))


def test_a_run_is_resumed_only_with_the_same_loss_function(model: nn.Module, tmp_path: Path) -> None:
    def first(output: Any, batch: Any) -> torch.Tensor:
        return torch.as_tensor(output).square().sum(1)

    def second(output: Any, batch: Any) -> torch.Tensor:
        return 100 * torch.as_tensor(output).square().sum(1)

    data, state = batches(6), tmp_path / "state"
    settings: dict[str, Any] = {"checkpoint": state, "checkpoint_seconds": 0.0}
    with pytest.raises(StopError):
        ms.collect(model, failing(data, 3), "fisher", loss=first, **settings)
    kept = state.read_bytes()
    with pytest.raises(InputError, match="other settings"):
        ms.collect(model, data, "fisher", loss=second, resume=True, **settings)
    state.write_bytes(kept)
    found = ms.collect(model, data, "fisher", loss=first, resume=True, **settings)
    same(found, ms.collect(model, data, "fisher", loss=first))


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("gram", torch.eye(4).bfloat16()),
        ("output_gram", torch.eye(4).half()),
        ("block", torch.eye(4).bfloat16()),
        ("fisher", torch.ones(4, dtype=torch.int64)),
        ("rows", torch.ones(0, 4)),
    ],
)
def test_what_is_no_statistic(table: str, value: torch.Tensor) -> None:
    wrong: list[Any] = [{table: {"w": value}}, {table: {"w": [[1.0]]}}]
    with pytest.raises(InputError, match=table):
        ms.Statistics(**wrong[0])
    with pytest.raises(UsageError, match="no tensor"):
        ms.Statistics(**wrong[1])


def test_memory_is_known_before_the_start() -> None:
    case = make("bert")
    plans: list[ms.MemoryPlan] = []
    found = ms.collect(case.model, [case.batch], ["kfac", "fisher"], on_plan=plans.append)
    stored: dict[str, int] = {}
    for table in ("gram", "output_gram", "fisher"):
        tensors = {id(t): t for t in found.table(table).values()}
        stored[table] = sum(t.numel() * t.element_size() for t in tensors.values())
    assert {table: size for table, (size, _) in plans[0].tables.items()} == stored
    assert plans[0].shared == 4
    with pytest.raises(ResourceError, match="include"):
        ms.collect(case.model, [case.batch], ["kfac"], max_memory=1000)


def test_sums_in_float64_of_a_float32_model(model: nn.Module) -> None:
    wide = ms.collect(model, batches(), ["kfac", "fisher"], accumulate="float64")
    narrow = ms.collect(model, batches(), ["kfac", "fisher"])
    assert wide.gram["0.weight"].dtype == torch.float64
    assert narrow.gram["0.weight"].dtype == torch.float32
    for table in ("gram", "output_gram", "fisher"):
        for name, tensor in wide.table(table).items():
            close(narrow.table(table)[name], tensor, 1e-5)


def test_bfloat16_models_have_float32_statistics(model: nn.Module) -> None:
    half = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(torch.bfloat16)
    data = [(x.to(torch.bfloat16), y) for x, y in batches()]
    found = ms.collect(half, data, ["kfac", "fisher"])
    exact = ms.collect(half.float(), [(x.float(), y) for x, y in data], ["kfac", "fisher"])
    assert all(t.dtype == torch.float32 for t in found.gram.values())
    close(found.gram["0.weight"], exact.gram["0.weight"], 1e-6)
    close(found.fisher["0.weight"], exact.fisher["0.weight"], 0.05)
    assert float(torch.linalg.eigvalsh(found.gram["2.weight"].double()).min()) > -1e-6


def test_errors_are_ours() -> None:
    with pytest.raises(MerganserError):
        ms.collect("no/such/model", "data.jsonl")
    with pytest.raises(MerganserError):
        ms.collect(nn.Linear(2, 2), "data.jsonl")
    with pytest.raises(MerganserError):
        ms.collect(nn.Linear(2, 2), [["text"]])
    with pytest.raises(MerganserError):
        ms.collect(nn.Tanh(), [torch.randn(2, 2)])
