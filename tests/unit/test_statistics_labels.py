"""Where labels come from, and what goes wrong with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import merganser.statistics as ms
from merganser.errors import InputError, MerganserError, NumericError, UsageError
from tests.unit.statistics_models import close, make

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "curvature" / "fisher_estimate"


class Mlp(nn.Module):
    """The network of the golden data."""

    def __init__(self, d: int = 5, h: int = 7, c: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, h)
        self.ln = nn.LayerNorm(h)
        self.fc2 = nn.Linear(h, c)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.fc2(self.ln(torch.tanh(self.fc1(input_ids))))
        return SimpleNamespace(logits=logits)


def squares(model: nn.Module, log_p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The squared gradient of a scalar."""
    names = dict(model.named_parameters())
    found = torch.autograd.grad(log_p, tuple(names.values()), retain_graph=True)
    return {name: g.square() for name, g in zip(names, found, strict=True)}


def dense(model: nn.Module, x: torch.Tensor, weigh: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """``mean_n sum_c weigh(n, p)_c (d log p_c)^2``."""
    total: dict[str, Any] = {}
    for n in range(len(x)):
        log_p = torch.log_softmax(model(x[n : n + 1]).logits, -1)[0]
        for c, weight in enumerate(weigh(n, log_p.detach().exp()).tolist()):
            for name, square in squares(model, log_p[c]).items():
                total[name] = total.get(name, 0) + weight * square / len(x)
    return total


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().double()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator).double(), torch.tensor([0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2]])
def test_exact_argmax_and_gold(mlp: Mlp, data: tuple[Any, Any], sizes: list[int]) -> None:
    x, labels = data
    batches = [{"input_ids": a, "labels": b} for a, b in zip(x.split(sizes), labels.split(sizes), strict=True)]
    truth = {
        "exact": dense(mlp, x, lambda n, p: p),
        "argmax": dense(mlp, x, lambda n, p: nn.functional.one_hot(p.argmax(), 3)),
        "gold": dense(mlp, x, lambda n, p: nn.functional.one_hot(labels[n], 3)),
    }
    for estimator, fisher in truth.items():
        found = ms.collect(mlp, batches, ["fisher", "kfac"], estimator=estimator)
        for name, tensor in fisher.items():
            close(found.fisher[name], tensor, 1e-12)
        # the head's factor: E (p - y)(p - y)' over labels
        p = torch.softmax(mlp(x).logits, -1).detach()
        weights = {"exact": p, "argmax": nn.functional.one_hot(p.argmax(-1), 3)}.get(
            estimator, nn.functional.one_hot(labels, 3)
        )
        e = p[:, None, :] - torch.eye(3).double()
        close(found.output_gram["fc2.weight"], torch.einsum("nc,nci,ncj->ij", weights.double(), e, e) / 6, 1e-12)


def test_sampled_labels_depend_on_the_seed_and_the_example_alone(mlp: Mlp) -> None:
    x: Any = torch.randn(8, 5).double()
    runs = [
        ms.collect(mlp, [{"input_ids": part} for part in x.split(size)], "fisher", estimator="sampled", seed=seed)
        for size, seed in ((8, 0), (3, 0), (1, 0), (8, 1))
    ]
    for name in runs[0].fisher:
        close(runs[1].fisher[name], runs[0].fisher[name], 1e-12)
        close(runs[2].fisher[name], runs[0].fisher[name], 1e-12)
    assert any(not torch.allclose(runs[3].fisher[name], runs[0].fisher[name]) for name in runs[0].fisher)


def test_many_samples_approach_the_expectation(mlp: Mlp) -> None:
    x = torch.randn(4, 5).double()
    exact = ms.collect(mlp, [{"input_ids": x}], ["fisher", "rows"], estimator="exact", include=["fc2.bias"])
    drawn = ms.collect(
        mlp, [{"input_ids": x}], ["fisher", "rows"], estimator="sampled", samples=4000, include=["fc2.bias"]
    )
    close(drawn.fisher["fc2.bias"], exact.fisher["fc2.bias"], 0.05)
    rows = drawn.rows["fc2.bias"]
    assert rows.shape == (16_000, 3)
    close(rows.square().mean(0), drawn.fisher["fc2.bias"], 1e-9)


def test_exact_expectation_over_the_tokens_of_a_language_model() -> None:
    """Every sequence of labels with its probability, given the true prefixes: cross terms vanish."""
    torch.manual_seed(0)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.cumsum(self.embedding(input_ids), 1))
            return logits

    model = Tiny().double()
    ids = torch.tensor([[0, 1, 2], [2, 2, 1]])
    found = ms.collect(model, [{"input_ids": ids}], "fisher", estimator="exact", loss="causal_lm")
    total: dict[str, Any] = {}
    for n in range(2):
        log_p = torch.log_softmax(model(ids[n : n + 1]), -1)[0]
        for labels in itertools.product(range(3), repeat=2):
            chosen = log_p[0, labels[0]] + log_p[1, labels[1]]
            for name, square in squares(model, chosen / 2).items():
                total[name] = total.get(name, 0) + chosen.exp().item() * square / 2
    for name, tensor in total.items():
        close(found.fisher[name], tensor, 1e-12)


def test_a_loss_of_ones_own(mlp: Mlp, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = data

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")

    batch = {"input_ids": x, "labels": labels}
    ours = ms.collect(mlp, [batch], ["kfac", "fisher"])
    theirs = ms.collect(mlp, [batch], ["kfac", "fisher"], loss=loss)
    for table in ("output_gram", "fisher"):
        for name, tensor in ours.table(table).items():
            close(theirs.table(table)[name], tensor, 1e-12)
    with pytest.raises(UsageError, match="one loss per example"):
        ms.collect(mlp, [batch], "fisher", loss=lambda output, batch: loss(output, batch).mean())
    with pytest.raises(UsageError, match="draws labels itself"):
        ms.collect(mlp, [batch], "fisher", loss=loss, estimator="sampled")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data are not here")
@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_golden_estimates(batch_size: int) -> None:
    golden: dict[str, Any] = load_file(GOLDEN / "mlp.safetensors")
    facts = json.loads((GOLDEN / "mlp.json").read_text())
    assert facts["reductions"] == "mean over examples"
    model = Mlp().double()
    model.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    labels = {"exact": "Y", "empirical": "Y", "argmax": "Y", "sampled": "sampled_labels"}
    for kind, key in labels.items():
        batches = [
            {"input_ids": a, "labels": b}
            for a, b in zip(golden["X"].split(batch_size), golden[key].split(batch_size), strict=True)
        ]
        found = ms.collect(model, batches, "fisher", estimator="empirical" if kind == "sampled" else kind)
        for name, tensor in found.fisher.items():
            close(tensor, golden[f"fisher.{kind}.{name}"], 1e-9)


def fails(error: type[MerganserError], code: str, call: Callable[[], Any]) -> MerganserError:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def test_labels_that_are_missing_or_out_of_range(mlp: Mlp, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = data
    fails(InputError, "E0415", lambda: ms.collect(mlp, [{"input_ids": x}], "fisher"))
    fails(InputError, "E0415", lambda: ms.collect(mlp, [{"input_ids": x, "labels": labels[:4]}], "fisher"))
    wrong = labels.clone()
    wrong[4] = 3
    batches = [{"input_ids": x, "labels": labels}, {"input_ids": x, "labels": wrong}]
    error = fails(InputError, "E0416", lambda: ms.collect(mlp, batches, "fisher"))
    assert "batch 1, example 4" in str(error)
    assert ms.collect(mlp, [{"input_ids": x, "labels": wrong}], "gram").counts["gram/fc1.weight"] == 6


def test_no_data(mlp: Mlp) -> None:
    fails(InputError, "E0417", lambda: ms.collect(mlp, [], "gram"))


def test_an_infinite_loss_names_batch_and_example_and_leaves_nothing(
    mlp: Mlp, data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    x, labels = data
    bad = x.clone()
    bad[2, 0] = float("nan")
    out = tmp_path / "s.safetensors"
    batches = [{"input_ids": x, "labels": labels}, {"input_ids": bad, "labels": labels}]
    for kinds in ("fisher", "kfac", "gram"):
        error = fails(
            NumericError,
            "E0603",
            lambda kinds=kinds: ms.collect(mlp, batches, kinds, out=out, checkpoint_seconds=0.0),  # type: ignore[misc]
        )
        assert "batch 1" in str(error)
        if kinds != "gram":
            assert "example 2 (number 8 of the data)" in str(error)
        assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(mlp: Mlp, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = data
    mlp.train()
    mlp.ln.eval()
    mlp.fc1.bias.requires_grad_(False)
    before = {name: p.clone() for name, p in mlp.named_parameters()}
    ms.collect(mlp, [{"input_ids": x, "labels": labels}], ["kfac", "fisher"])
    fails(InputError, "E0415", lambda: ms.collect(mlp, [{"input_ids": x}], "fisher"))
    assert mlp.training
    assert mlp.fc1.training
    assert not mlp.ln.training
    assert [n for n, p in mlp.named_parameters() if not p.requires_grad] == ["fc1.bias"]
    assert all(p.grad is None for p in mlp.parameters())
    assert all(torch.equal(before[n], p) for n, p in mlp.named_parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in mlp.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": "gramm"}, "gram"),
        ({"kinds": []}, "some kinds"),
        ({"kinds": ["gram", "squisher"]}, "alone"),
        ({"estimator": "exakt"}, "exact"),
        ({"loss": "casual_lm"}, "causal_lm"),
        ({"samples": 2}, "samples"),
        ({"include": ["*.nothing"]}, "matches"),
        ({"accumulate": "bfloat16"}, "float32"),
    ],
)
def test_wrong_arguments_are_named(mlp: Mlp, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"kinds": "fisher", **change}
    batch = {"input_ids": torch.randn(2, 5).double(), "labels": torch.tensor([0, 1])}
    with pytest.raises(UsageError, match=message):
        ms.collect(mlp, [batch], **settings)


def test_a_model_without_logits_has_no_loss() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    batch = {"input_ids": torch.randint(1, 20, (2, 5)), "labels": torch.tensor([0, 1])}
    assert len(ms.collect(model, [batch], "gram").gram) == 9
    with pytest.raises(MerganserError, match="loss"):
        ms.collect(model, [batch], "fisher")


def test_only_what_is_included_is_measured() -> None:
    case = make("bert")
    found = ms.collect(case.model, [case.batch], ["kfac", "fisher"], include=["*.layer.1.*.weight"])
    assert found.gram
    for table in ("gram", "output_gram", "fisher"):
        assert all(".layer.1." in name and name.endswith(".weight") for name in found.table(table))
