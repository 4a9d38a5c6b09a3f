"""Suites: merges by what the experts' optimizers have left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import merganser as mg
from merganser.evaluation._subject import read_tensors
from merganser.evaluation.bench import read_suite
from merganser.evaluation.bench._experts import make_expert
from merganser.evaluation.bench._pretraining import prepared_lab
from merganser.statistics import Statistics
from tests.evaluation.suites import small_suite

pytest.importorskip("transformers")


def test_squisher_merges_by_the_second_moments_that_training_leaves(tmp_path: Path) -> None:
    suite = small_suite(
        tmp_path,
        seeds=[0],
        counts={},
        held_out={},
        composition={},
        baselines=["experts"],
        methods=[{"method": "average"}, {"method": "squisher"}],
    )
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    assert not [step for step in found["steps"] if step["error"]], found["steps"]
    lab = prepared_lab(read_suite(suite, data=tmp_path), tmp_path / "out" / "cache")
    experts = [make_expert(lab, name, 0) for name in ("one", "two", "three")]
    assert not (lab.cache / "statistics").exists()  # nothing was collected
    rows = {row["id"]: row for row in found["rows"]}
    assert rows["squisher"]["data"] == "none"
    assert not any((rows["squisher"]["cost"]["statistics"] or {}).values())
    tensors = [read_tensors(e.model) for e in experts]
    fishers = []
    for expert, own in zip(experts, tensors, strict=True):
        assert expert.moments is not None
        known = Statistics.load(expert.moments)
        assert {n: f.shape for n, f in known.fisher.items()} == {n: own[n].shape for n in known.fisher}
        fishers.append(known.fisher)
    name = "encoder.layer.0.attention.self.query.weight"
    assert float(fishers[0][name].max()) > 0
    merged = mg.merge(tensors, method="squisher", statistics=[str(e.moments) for e in experts], base=str(lab.base))
    fisher = torch.stack([f[name] for f in fishers]).double()
    expected = (fisher * torch.stack([own[name] for own in tensors])).sum(0) / fisher.sum(0)
    assert torch.allclose(merged[name].double(), expected, rtol=1e-3, atol=1e-5)
    scores = lab.evaluator("test", experts)(merged).results
    for task, score in rows["squisher"]["scores"].items():
        assert score["value"] == scores[task].outcomes.value


def test_squisher_needs_experts_that_the_suite_has_trained(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, seeds=[0], counts={}, baselines=["experts"], methods=[{"method": "squisher"}])
    lab = prepared_lab(read_suite(suite, data=tmp_path), tmp_path / "out" / "cache")
    own = make_expert(lab, "one", 0)
    assert own.head is not None
    suite["tasks"]["one"] |= {"expert": str(own.model), "head": str(own.head)}
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    failed = {step["name"]: step["error"] for step in found["steps"] if step["error"]}
    assert list(failed) == ["squisher seed 0"]
    assert failed["squisher seed 0"]["code"] == "E0308"
