"""Statistics against dense per-example loops, on tiny models of every kind of layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import merganser.statistics as ms
from merganser.errors import InputError
from tests.unit.statistics_models import CASES, Case, close, make, oracle

NAMES = sorted(CASES)
GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "curvature" / "regmean"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _ends(sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(sizes))[:-1]


def split(case: Case, *sizes: int) -> list[dict[str, torch.Tensor]]:
    parts: Any = {key: torch.tensor_split(value, _ends(sizes)) for key, value in case.batch.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(sizes))]


@pytest.mark.parametrize("name", NAMES)
def test_gram_and_kfac_are_those_of_single_unpadded_examples(name: str) -> None:
    case = make(name)
    truth = oracle(case)
    found = ms.collect(case.model, [case.batch], ["gram", "kfac"])
    diagonal = {n for n in found.gram if found.gram[n].dim() == 1}
    assert set(found.gram) - diagonal == set(truth.gram)
    assert set(found.output_gram) == set(truth.output_gram)
    largest = max(float(g.abs().max()) for g in truth.output_gram.values())
    for weight, gram in truth.gram.items():
        close(found.gram[weight], gram, case.tolerance)
        close(found.output_gram[weight], truth.output_gram[weight], case.tolerance, 1e-6 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_mean_is_that_of_the_inputs_of_single_unpadded_examples(name: str) -> None:
    case = make(name)
    truth = oracle(case)
    found = ms.collect(case.model, split(case, 2, 3), ["mean"])
    assert set(found.mean) == set(truth.mean)
    assert not found.gram
    assert "loss" not in found.provenance
    largest = max(float(m.abs().max()) for m in truth.mean.values())
    for weight, mean in truth.mean.items():
        close(found.mean[weight], mean, case.tolerance, 1e-3 * largest)
    both = ms.collect(case.model, [case.batch], ["gram", "mean"])
    assert all(both.counts[f"mean/{weight}"] == both.counts[f"gram/{weight}"] for weight in truth.mean)


@pytest.mark.parametrize("name", NAMES)
def test_fisher_is_the_mean_of_squared_gradients_of_single_examples(name: str) -> None:
    case = make(name)
    truth = oracle(case)
    found = ms.collect(case.model, [case.batch], ["fisher"])
    largest = max(float(f.max()) for f in truth.fisher.values())
    for parameter, fisher in truth.fisher.items():
        close(found.fisher[parameter], fisher, case.tolerance, 1e-6 * largest)
    assert found.provenance["gradients"] == ("loop" if name in {"t5"} else "hooks")


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_changes_nothing(name: str) -> None:
    case = make(name)
    kinds = ["kfac", "fisher"]
    whole = ms.collect(case.model, [case.batch], kinds)
    for sizes in ((1, 1, 1, 1, 1), (2, 3), (4, 1)):
        parts = ms.collect(case.model, split(case, *sizes), kinds)
        for table in ("gram", "output_gram", "fisher"):
            assert set(parts.table(table)) == set(whole.table(table))
            largest = max(float(t.abs().max()) for t in whole.table(table).values())
            for key, tensor in whole.table(table).items():
                close(parts.table(table)[key], tensor, case.tolerance, 1e-6 * largest)
        assert parts.counts == whole.counts


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_more_padding_changes_nothing(name: str) -> None:
    case = make(name)
    wide = dict(case.batch)
    for key, value in case.batch.items():
        if value.dim() == 2:
            fill = -100 if key == "labels" else 0
            wide[key] = nn.functional.pad(value, (0, 4), value=fill)
    plain = ms.collect(case.model, [case.batch], ["kfac"])
    padded = ms.collect(case.model, [wide], ["kfac"])
    for table in ("gram", "output_gram"):
        largest = max(float(t.abs().max()) for t in plain.table(table).values())
        for key, tensor in plain.table(table).items():
            close(padded.table(table)[key], tensor, case.tolerance, 1e-6 * largest)
    assert plain.counts == padded.counts


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_the_left_changes_nothing(name: str, labelled: bool) -> None:
    case = make(name)
    case.model.float().config._attn_implementation = "eager"  # type: ignore[union-attr]
    lengths = case.batch["attention_mask"].sum(1).tolist()
    width = case.batch["input_ids"].shape[1]
    left = {key: torch.zeros_like(value) for key, value in case.batch.items()}
    left["position_ids"] = torch.zeros_like(left["input_ids"])
    for row, length in enumerate(lengths):
        for key, value in case.batch.items():
            left[key][row, width - length :] = value[row, :length]
        left["position_ids"][row, width - length :] = torch.arange(length)
    # the labels of padding are those of its tokens: the mask says what counts
    right = {**case.batch, "labels": torch.where(case.batch["attention_mask"] == 1, case.batch["labels"], 7)}
    if not labelled:
        del left["labels"], right["labels"]
    estimator = "empirical" if labelled else "argmax"
    singles = []
    for index, length in enumerate(lengths):
        one = {key: value[index : index + 1, :length] for key, value in case.batch.items()}
        singles.append(one if labelled else {key: value for key, value in one.items() if key != "labels"})
    plain = ms.collect(case.model, singles, ["kfac", "fisher"], estimator=estimator)
    for padded in (left, right):
        found = ms.collect(case.model, [padded], ["kfac", "fisher"], estimator=estimator)
        for table in ("gram", "output_gram", "fisher"):
            largest = max(float(t.abs().max()) for t in plain.table(table).values())
            for key, tensor in plain.table(table).items():
                close(found.table(table)[key], tensor, 1e-3, 1e-5 * largest)


def test_a_decoder_that_is_padded_draws_no_labels_there() -> None:
    case = make("t5")
    sizes = [3, 6, 2, 9, 1]
    batch = {key: value for key, value in case.batch.items() if key != "labels"}
    batch["decoder_input_ids"] = case.batch["labels"].clamp(min=0)
    batch["decoder_attention_mask"] = (case.batch["labels"] != -100).long()
    singles = []
    for index, size in enumerate(sizes):
        length = int(batch["attention_mask"][index].sum())
        cut = {key: value[index : index + 1, : size if "decoder" in key else length] for key, value in batch.items()}
        singles.append(cut)
    for estimator in ("argmax", "sampled"):
        found = ms.collect(case.model, [batch], ["kfac", "fisher"], estimator=estimator)
        plain = ms.collect(case.model, singles, ["kfac", "fisher"], estimator=estimator)
        for table in ("output_gram", "fisher"):
            largest = max(float(t.abs().max()) for t in plain.table(table).values())
            for key, tensor in plain.table(table).items():
                close(found.table(table)[key], tensor, 1e-4, 1e-6 * largest)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_have_the_names_that_peft_saves() -> None:
    peft = pytest.importorskip("peft")
    case = make("t5")
    config = peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(case.model, config)
    found = ms.collect(model, [case.batch], ["block"])
    assert set(found.block) == set(peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("name", NAMES)
def test_shards_add_up(name: str) -> None:
    case = make(name)
    kinds = ["kfac", "fisher"]
    whole = ms.collect(case.model, [case.batch], kinds)
    first, second = split(case, 2, 3)
    total = ms.collect(case.model, [first], kinds) + ms.collect(case.model, [second], kinds)
    for table in ("gram", "output_gram", "fisher"):
        for key, tensor in whole.table(table).items():
            close(total.table(table)[key], tensor, max(case.tolerance, 1e-9), 1e-6)
    assert total.counts == whole.counts
    assert total.groups == whole.groups


def test_shared_inputs_are_one_matrix() -> None:
    case = make("bert")
    found = ms.collect(case.model, [case.batch], ["gram"])
    stem = "bert.encoder.layer.1.attention.self"
    group = tuple(f"{stem}.{part}.weight" for part in ("query", "key", "value"))
    assert group in found.groups
    assert found.gram[group[0]] is found.gram[group[2]]
    apart = ms.collect(case.model, [case.batch], ["gram"], share_inputs=False)
    assert apart.groups == ()
    assert torch.equal(apart.gram[group[2]], found.gram[group[2]])


def test_shared_inputs_of_a_gated_and_a_cross_attending_model() -> None:
    llama = ms.collect(make("llama").model, [make("llama").batch], ["gram"])
    assert ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight") in llama.groups
    found = ms.collect(make("t5").model, [make("t5").batch], ["gram"])
    cross = next(group for group in found.groups if any("EncDecAttention" in n for n in group))
    assert len(cross) == 4  # key and value of both decoder layers read the encoder's output


def test_embeddings_have_a_diagonal() -> None:
    case = make("gpt2")
    found = ms.collect(case.model, [case.batch], ["gram"])
    ids, mask = case.batch["input_ids"], case.batch["attention_mask"]
    counts = torch.bincount(ids[mask == 1], minlength=60) / mask.sum()
    close(found.gram["transformer.wte.weight"], counts, 1e-12)
    places = torch.arange(ids.shape[1]).expand_as(ids)[mask == 1]
    close(found.gram["transformer.wpe.weight"], torch.bincount(places, minlength=20) / mask.sum(), 1e-12)
    assert found.gram["lm_head.weight"].shape == (32, 32)
    assert found.transposed == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_tied_weights_have_one_fisher_under_both_names() -> None:
    case = make("gpt2")
    found = ms.collect(case.model, [case.batch], ["fisher"])
    assert found.fisher["lm_head.weight"] is found.fisher["transformer.wte.weight"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "clip"])
def test_blocks_and_rows_of_vectors(name: str) -> None:
    case = make(name)
    truth = oracle(case)
    found = ms.collect(case.model, split(case, 3, 2), ["block", "rows"])
    vectors = {n for n, p in case.model.named_parameters() if p.numel() == max(p.shape)}
    assert set(found.block) == set(found.rows) == vectors
    largest = max(float(truth.gradients[n].abs().max()) for n in vectors)
    for parameter in vectors:
        rows = truth.gradients[parameter].flatten(1)
        close(found.rows[parameter], rows, case.tolerance, 1e-5 * largest)
        close(found.block[parameter], rows.T @ rows / len(rows), case.tolerance, 1e-6 * largest**2)


def test_sdpa_and_eager_attention_agree() -> None:
    results = []
    for kind in ("sdpa", "eager"):
        case = make("bert")
        model: Any = case.model
        model.set_attn_implementation(kind)
        results.append(ms.collect(model, [case.batch], ["kfac", "fisher"]))
    for table in ("gram", "output_gram", "fisher"):
        for key, tensor in results[0].table(table).items():
            close(results[1].table(table)[key], tensor, 1e-9, 1e-12)


class Ia3(nn.Module):
    """A linear layer whose output is scaled by a learned vector."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.ia3_l = nn.Parameter(torch.ones(base.out_features, 1).normal_(1, 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y * self.ia3_l.flatten()


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_ia3_vectors_are_found_and_exact(estimator: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Ia3(nn.Linear(5, 8)), nn.Tanh(), Ia3(nn.Linear(8, 3))).double()
    x, labels = torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    found = ms.collect(model, [(x, labels)], ["block", "rows", "fisher"], estimator=estimator)
    assert set(found.block) == set(found.rows) == set(found.fisher) == {"0.ia3_l", "2.ia3_l"}
    truth: dict[str, list[torch.Tensor]] = {name: [] for name in found.block}
    for i in range(6):
        log_p = torch.log_softmax(model(x[i : i + 1]), -1)[0]
        for c in range(3):
            weight = log_p[c].exp().item() if estimator == "exact" else float(c == labels[i])
            if weight:
                for name in truth:
                    (g,) = torch.autograd.grad(log_p[c], model.get_parameter(name), retain_graph=True)
                    truth[name].append(weight**0.5 * g.flatten())
    for name, parts in truth.items():
        rows = torch.stack(parts)
        close(found.block[name], rows.T @ rows / 6, 1e-12)
        close(found.fisher[name].flatten(), rows.square().sum(0) / 6, 1e-12)
        kept = found.rows[name]
        close(kept.T @ kept / len(kept), found.block[name], 1e-12)


class Bare(nn.Module):
    """Uses a weight outside its module, in the way that hooks cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(input_ids)
        h, _ = self.mix(h, h, h)
        logits: torch.Tensor = h.mean(1) @ self.embedding.weight.T
        return logits


def test_weights_used_outside_their_modules_are_noticed() -> None:
    torch.manual_seed(0)
    model = Bare().double()
    batch = {"input_ids": torch.randint(0, 9, (4, 5)), "labels": torch.tensor([0, 1, 2, 3])}
    found = ms.collect(model, [batch], ["fisher"])
    assert found.provenance["gradients"] == "loop"
    case = Case(model, batch, lambda i: {k: v[i : i + 1] for k, v in batch.items()})
    for name, fisher in oracle(case).fisher.items():
        close(found.fisher[name], fisher, 1e-10)


class SequenceFirst(nn.Module):
    """Works on (tokens, examples, features), here with as many tokens as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1)))
        logits: torch.Tensor = self.second(torch.cumsum(h, 0)[-1])
        return logits


def test_a_first_dimension_that_is_not_the_examples_is_noticed() -> None:
    torch.manual_seed(0)
    model = SequenceFirst().double()
    batch = {"x": torch.randn(4, 4, 4).double(), "labels": torch.tensor([0, 1, 2, 0])}
    found = ms.collect(model, [batch], ["fisher"])
    assert found.provenance["gradients"] == "loop"
    case = Case(model, batch, lambda i: {k: v[i : i + 1] for k, v in batch.items()})
    for name, fisher in oracle(case).fisher.items():
        close(found.fisher[name], fisher, 1e-10)


class Fickle(nn.Module):
    """Two layers that read one activation, or two, depending on the number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.one(x) + self.two(x if len(x) == 1 else 2 * x)
        return total


def test_sharing_that_does_not_hold_is_an_error() -> None:
    torch.manual_seed(0)
    model, x = Fickle(), torch.randn(5, 4)
    with pytest.raises(InputError, match="share_inputs"):
        ms.collect(model, [x], "gram")
    found = ms.collect(model, [x], "gram", share_inputs=False)
    close(found.gram["two.weight"], 4 * found.gram["one.weight"], 1e-6)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data are not here")
@pytest.mark.parametrize("layer", ["fc1", "c1", "fc2", "cls"])
@pytest.mark.parametrize("model", [0, 1, 2])
def test_golden_grams(model: int, layer: str) -> None:
    golden = load_file(GOLDEN / "three_models.safetensors")
    x = golden[f"input{model}.{layer}"]
    found = ms.collect(nn.Linear(x.shape[1], 2).double(), torch.tensor_split(x, [3, 4, 20]), "gram")
    close(found.gram["weight"], golden[f"gram{model}.{layer}"], 1e-9)
