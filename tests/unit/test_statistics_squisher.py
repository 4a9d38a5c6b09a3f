"""Adam's second moment as a Fisher estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import merganser.statistics as ms
from merganser.errors import InputError, NumericError, SecurityError, UsageError
from tests.unit.statistics_models import close

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "curvature" / "squisher"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc2(self.norm(torch.tanh(self.fc1(x))))
        return logits


def trained(groups: str = "one", steps: int = 5, **options: Any) -> tuple[Mlp, Any, dict[str, torch.Tensor]]:
    """A model, its optimizer, and ``v / (1 - beta2^t)`` from the recorded gradients."""
    torch.manual_seed(0)
    model = Mlp().double()
    named = dict(model.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    rest = [p for p in named.values() if p.dim() < 2]
    arguments: Any = {
        "one": list(named.values()),
        "two": [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        "named": list(named.items()),
        "reversed": list(reversed(named.values())),
    }[groups]
    optimizer = torch.optim.AdamW(arguments, lr=0.01, betas=(0.9, 0.95), **options)
    v = {name: torch.zeros_like(p) for name, p in named.items()}
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 6).double()), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for name, p in named.items():
            assert p.grad is not None
            v[name] = 0.95 * v[name] + 0.05 * p.grad.square()
        optimizer.step()
    return model, optimizer, {name: value / (1 - 0.95**steps) for name, value in v.items()}


def test_those_of_a_folder_know_their_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = transformers.BertModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(sum(p.sum() for p in model.parameters()))
    optimizer.step()
    model.save_pretrained(tmp_path / "a")
    transformers.BertModel(config).save_pretrained(tmp_path / "b")
    found = ms.collect(tmp_path / "a", optimizer.state_dict(), ["squisher"], batch_size=4)
    assert found.provenance["model"]["fingerprint"]
    found.verify(tmp_path / "a")
    with pytest.raises(InputError, match="other weights"):
        found.verify(tmp_path / "b")


@pytest.mark.parametrize("groups", ["one", "two", "named", "reversed"])
@pytest.mark.parametrize("form", ["optimizer", "state", "file", "folder"])
def test_second_moments_by_name(groups: str, form: str, tmp_path: Path) -> None:
    model, optimizer, truth = trained(groups)
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    given = {"optimizer": optimizer, "state": state, "file": tmp_path / "optimizer.pt", "folder": tmp_path}[form]
    if groups == "reversed" and form != "optimizer":
        with pytest.raises(InputError, match="shape"):
            ms.collect(model, given, "squisher", batch_size=4)
        names = list(reversed([name for name, _ in model.named_parameters()]))
        found = ms.collect(model, given, "squisher", batch_size=4, names=names)
    else:
        found = ms.collect(model, given, ["squisher"], batch_size=4)
    assert set(found.fisher) == set(truth)
    for name, value in truth.items():
        close(found.fisher[name], 4 * value, 1e-9)
    assert found.provenance["estimator"] == "squisher"
    assert found.provenance["steps"] == [5]


def test_it_approaches_the_fisher_at_a_fixed_point() -> None:
    """At fixed weights, ``E[B v] = mean(g^2) + (B - 1) mean(g)^2``."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(32, 6).double(), torch.randint(0, 3, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.9999))
    for _ in range(3000):
        chosen = torch.randint(0, 32, (4,))
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x[chosen]), y[chosen]))
        optimizer.step()
    found = ms.collect(model, optimizer, "squisher", batch_size=4)
    each = ms.collect(model, [(x, y)], ["fisher", "rows"], include=["bias", "weight"])
    mean = each.rows["weight"].mean(0).view(3, 6)
    close(found.fisher["weight"], each.fisher["weight"] + 3 * mean.square(), 0.1)


def test_tied_weights_and_unused_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "unused": nn.Linear(2, 2)})
    b: Any = model["b"]
    b.weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model["b"](model["a"](torch.randn(2, 3))).sum().backward()
    optimizer.step()
    found = ms.collect(model, optimizer.state_dict(), "squisher", batch_size=2)
    assert found.fisher["b.weight"] is found.fisher["a.weight"]
    assert float(found.fisher["unused.weight"].abs().max()) == 0.0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data are not here")
@pytest.mark.parametrize("name", ["b2_0.999", "clip1"])
def test_golden(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    order = facts["param_order_in_state"]
    model = Mlp().double()
    state = {
        "state": {
            i: {"step": torch.tensor(float(facts["steps"])), "exp_avg_sq": golden[f"exp_avg_sq.{key}"]}
            for i, key in enumerate(order)
        },
        "param_groups": facts["param_groups"],
    }
    found = ms.collect(model, state, "squisher", batch_size=facts["batch"] * facts["accum"])
    for key in order:
        close(found.fisher[key], golden[f"squisher_B_vhat.{key}"], 1e-9)


def test_a_trainers_order_with_its_rules(tmp_path: Path) -> None:
    """Decayed parameters first, as the Hugging Face Trainer sorts them: layer norms and biases are the rest."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    named = dict(model.named_parameters())
    rest = {name for name in named if "norm" in name}
    order = [n for n in named if n not in rest] + [n for n in named if n in rest]
    count = len(named) - len(rest)
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in order[:count]]}, {"params": [named[n] for n in order[count:]]}]
    )
    model(input_ids=torch.randint(0, 20, (2, 5)), labels=torch.randint(0, 20, (2, 5))).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path / "model")
    for which in (model, tmp_path / "model"):
        found = ms.collect(which, tmp_path, "squisher", batch_size=2)
        for name, p in named.items():
            assert p.grad is not None
            close(found.fisher[name], 2 * p.grad.square(), 1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    state = optimizer.state_dict()

    def fails(error: type[Exception], message: str, given: Any, size: Any = 4) -> None:
        with pytest.raises(error, match=message):
            ms.collect(model, given, "squisher", batch_size=size)

    fails(UsageError, "batch_size", state, None)
    fails(InputError, "does not exist", tmp_path / "optimizer.pt")
    (tmp_path / "optimizer.pt").write_bytes(b"not a file of torch")
    fails((InputError, SecurityError), "optimizer state", tmp_path)  # type: ignore[arg-type]
    torch.save({"state": Mlp()}, tmp_path / "optimizer.pt")
    fails(SecurityError, "E0502", tmp_path)
    torch.save({"weights": torch.eye(2)}, tmp_path / "optimizer.pt")
    fails(InputError, "no `state`", tmp_path)
    fails(InputError, "optimizer", [1, 2])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    fails(InputError, "exp_avg_sq", sgd)
    fails(InputError, "no step", torch.optim.AdamW(model.parameters()))
    with pytest.raises(InputError, match="parameters"):
        ms.collect(nn.Linear(3, 3), state, "squisher", batch_size=4)
    state["state"][0]["exp_avg_sq"][0, 0] = -1.0
    fails(NumericError, r"fc1\.weight", state)
