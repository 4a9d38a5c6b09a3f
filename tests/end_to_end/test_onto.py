"""Models that are added to an earlier merge, without the models that it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError
from tests.conftest import Cli
from tests.helpers import State, llama_state, read_model, write_model


def states(dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    base = llama_state(0)
    tuned = [{k: v + 0.05 * (1 + i) * llama_state(9 + i)[k] for k, v in base.items()} for i in range(4)]
    return {k: v.to(dtype) for k, v in base.items()}, [{k: v.to(dtype) for k, v in s.items()} for s in tuned]


def folders(root: Path, dtype: torch.dtype = torch.float64) -> tuple[Path, list[Path]]:
    base, tuned = states(dtype)
    return write_model(root / "base", base), [write_model(root / f"m{i}", s) for i, s in enumerate(tuned)]


def opcm(models: Sequence[Path], base: Path, out: Path, **options: Any) -> State:
    return read_model(mg.merge(models, base=base, method="opcm", out=out, **options))


def gap(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.04)]
)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.8, "keep_diagonal": True, "scale": -0.5}])
def test_one_model_more_is_the_merge_of_all(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    """Up to the rounding of the earlier merge, which in bfloat16 is that of the weights, not of the task vectors."""
    base, models = folders(tmp_path, dtype)
    everything = opcm(models[:3], base, tmp_path / "all", **options)
    opcm(models[:2], base, tmp_path / "two", **options)
    again = mg.merge([models[2]], base=base, method="opcm", onto=tmp_path / "two")
    assert gap(again, everything) <= tolerance
    assert gap(again, read_model(tmp_path / "two")) > 0.05 or options


def test_models_one_by_one(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    everything = opcm(models, base, tmp_path / "all", weights=[1, 0.5, 1, 2])
    opcm(models[:1], base, tmp_path / "1")
    for number, weight in ((1, 0.5), (2, 1), (3, 2)):
        earlier, out = tmp_path / f"{number}", tmp_path / f"{number + 1}"
        mg.merge([models[number]], base=base, method="opcm", onto=earlier, weights=[weight], out=out)
    assert gap(read_model(tmp_path / "4"), everything) <= 1e-12
    locks = [json.loads((tmp_path / name / "merge.lock.json").read_text())["memory"] for name in ("4", "all")]
    assert locks[0]["norms"] == pytest.approx(locks[1]["norms"], rel=1e-12)
    assert locks[0]["sum"] == pytest.approx(locks[1]["sum"], rel=1e-12)


def test_two_models_at_once(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    everything = opcm(models, base, tmp_path / "all")
    opcm(models[:2], base, tmp_path / "two")
    assert gap(mg.merge(models[2:], base=base, method="opcm", onto=tmp_path / "two"), everything) <= 1e-12


def test_the_command_finds_method_and_base(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = folders(tmp_path)
    everything = opcm(models[:3], base, tmp_path / "all", alpha=0.7)
    opcm(models[:2], base, tmp_path / "two", alpha=0.7)
    monkeypatch.chdir("/")
    cli("plan", "--onto", tmp_path / "two", models[2]).succeeded()
    cli("merge", "--onto", tmp_path / "two", models[2], "-o", tmp_path / "three").succeeded()
    assert gap(read_model(tmp_path / "three"), everything) <= 1e-12
    lock = json.loads((tmp_path / "three" / "merge.lock.json").read_text())
    assert lock["recipe"]["models"] == ["two", "m2"]
    assert lock["recipe"]["methods"][0]["options"]["alpha"] == 0.7
    assert str(tmp_path) not in json.dumps(lock)
    shutil.move(base, tmp_path / "moved")
    result = cli("merge", "--onto", tmp_path / "two", models[2], "-o", tmp_path / "four")
    result.failed("E0308", "base")
    cli("merge", "--onto", tmp_path / "two", "-b", tmp_path / "moved", models[2], "-o", tmp_path / "four").succeeded()


def test_what_was_left_out_stays_left_out(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    from merganser.recipe import simple_recipe

    selection: dict[str, Any] = {"exclude": ("*norm*",), "heads": f"keep-from {models[0]}"}
    for count in (2, 3):
        recipe = simple_recipe(models[:count], base=base, method="opcm", **selection)
        mg.save(mg.make_plan(recipe), tmp_path / f"of{count}")
    again = mg.merge([models[2]], base=base, method="opcm", onto=tmp_path / "of2")
    assert gap(again, read_model(tmp_path / "of3")) <= 1e-12
    assert torch.equal(again["lm_head.weight"], read_model(models[0])["lm_head.weight"])


def test_models_equal_to_the_base(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    everything = opcm([copy, models[0]], base, tmp_path / "all")
    opcm([copy], base, tmp_path / "one")
    assert gap(mg.merge([models[0]], base=base, method="opcm", onto=tmp_path / "one"), everything) <= 1e-12


def refused(code: str, **arguments: Any) -> None:
    with pytest.raises(MerganserError) as caught:
        mg.merge(**{"method": "opcm", **arguments})
    assert caught.value.code == code, str(caught.value)


def test_another_base_or_changed_weights_are_noticed(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    opcm(models[:2], base, tmp_path / "two")
    refused("E0421", models=[models[2]], base=models[3], onto=tmp_path / "two")
    changed = {k: v * 1.5 for k, v in read_model(tmp_path / "two").items()}
    write_model(tmp_path / "two", changed)
    refused("E0421", models=[models[2]], base=base, onto=tmp_path / "two")


def test_merges_that_cannot_be_continued(tmp_path: Path) -> None:
    base, models = folders(tmp_path)
    new: dict[str, Any] = {"models": [models[2]], "base": base}
    refused("E0421", **new, onto=models[0])
    refused("E0306", **new, onto={})
    mg.merge(models[:2], base=base, method="ties", out=tmp_path / "ties")
    refused("E0421", **new, onto=tmp_path / "ties")
    opcm(models[:2], base, tmp_path / "two")
    refused("E0305", **{**new, "method": "ties"}, onto=tmp_path / "two")
    refused("E0305", **new, onto=tmp_path / "two", beta=1)
    refused("E0305", **new, onto=tmp_path / "two", statistics=[{}])
    opcm(models[:2], base, tmp_path / "nothing", scale=0.0)
    refused("E0421", **new, onto=tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"memory": None},
        {"memory": {"norms": [1.0]}},
        {"recipe": {}},
        {"norms": []},
        {"norms": ["x"]},
        {"sum": 1e999},
        {"sum": None},
        {"sum": -1.0},
        {"scale": 1e999},
        {"method": {"name": "none such", "options": {}}},
        {"method": {"name": "opcm", "options": {"alpha": "x"}}},
        {"method": "opcm"},
    ],
)
def test_lock_files_that_say_nonsense(tmp_path: Path, change: dict[str, Any]) -> None:
    base, models = folders(tmp_path)
    opcm(models[:2], base, tmp_path / "two")
    file = tmp_path / "two" / "merge.lock.json"
    lock = json.loads(file.read_text())
    target = lock if set(change) & {"memory", "recipe"} else lock["memory"]
    file.write_text(json.dumps({**lock, **change} if target is lock else {**lock, "memory": {**target, **change}}))
    refused("E0421", models=[models[2]], base=base, onto=tmp_path / "two")
