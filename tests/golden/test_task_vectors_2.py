"""Parity with the authors' outputs: PCB, WIDEN, OPCM, EMR, grafting and MOS. One row per case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

import merganser as mg
from merganser.training import AdapterPull, train_graft_mask
from tests.golden.conftest import State, assert_close

Load = Callable[[str], State]
MODELS = ("ft1", "ft2", "ft3")


def inputs(golden: Load, names: tuple[str, ...] = MODELS) -> tuple[State, list[State]]:
    folder = "task_vectors/_inputs/generic"
    return golden(f"{folder}/base.safetensors"), [golden(f"{folder}/{name}.safetensors") for name in names]


def flat(state: Mapping[str, torch.Tensor], base: State) -> torch.Tensor:
    """The task vector of a model, in the sorted order of names."""
    return torch.cat([(state[name].double() - base[name].double()).view(-1) for name in sorted(base)])


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(
    ("variant", "options"),
    [("main", {}), ("nlp", {}), ("vision", {"scale": 1.2}), ("es", {"weights": [1.2, 0.9, 1.05]})],
)
def test_pcb(golden: Load, variant: str, options: dict[str, Any], density: float) -> None:
    base, models = inputs(golden)
    expected = golden(f"task_vectors/pcb/generic_{variant}_r{density}.safetensors")["merged_tv"]
    merged = mg.merge(models, base=base, method="pcb", variant=variant, density=density, **options)
    assert_close({"t": flat(merged, base)}, {"t": expected}, 1e-6)


@pytest.mark.parametrize("direction", ["chord", "cosine"])
@pytest.mark.parametrize(("threshold", "score", "n"), [(1.0, 1.0, 2), (1.0, 1.0, 3), (1.0, 0.7, 3), (1.5, 1.0, 3)])
def test_widen(golden: Load, threshold: float, score: float, n: int, direction: str) -> None:
    """The deltas are large enough for the authors' float32 cosines; threshold 2 is decided by rounding, so not here."""
    base, models = inputs(golden, MODELS[:n])
    expected = golden(f"task_vectors/widen/generic_widen_t{threshold}_s{score}_n{n}.safetensors")
    options: dict[str, Any] = {"threshold": threshold, "score": score, "direction": direction}
    assert_close(mg.merge(models, base=base, method="widen", **options), expected, 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("release", "keep_diagonal"), [("asreleased", True), ("diagfix", False)])
def test_opcm(golden: Load, release: str, keep_diagonal: bool, alpha: float) -> None:
    """The tolerance is that of the authors' float32; alpha = 1 is decided by rounding there, so it is not here."""
    base, models = inputs(golden)
    expected = golden(f"task_vectors/opcm/generic_{release}_alpha{alpha}.safetensors")
    merged = mg.merge(models, base=base, method="opcm", alpha=alpha, keep_diagonal=keep_diagonal)
    assert_close(merged, expected, 5e-6)


RESEARCH: dict[str, tuple[str, dict[str, Any]]] = {
    "opcm_0.5": ("opcm", {}),
    "pcb_r0.05_lam1.2": ("pcb", {"scale": 1.2}),
    "pcb_r0.1_lam1.2": ("pcb", {"scale": 1.2, "density": 0.1}),
    "pcb_r0.2_lam1.2": ("pcb", {"scale": 1.2, "density": 0.2}),
}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", RESEARCH)
def test_research_outputs(golden: Load, case: str, dtype: str) -> None:
    method, options = RESEARCH[case]
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(3)]
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method=method, **options)
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, 1e-8 if dtype == "f64" else 1e-4)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_emr(golden: Load, dtype: str) -> None:
    """The released code keeps its rescalers in float32 whatever the models' type."""
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(3)]
    stored = golden(f"research/out__emr__normal__{dtype}.safetensors")
    released: Any = mg.merge(models, base=base, method="emr", rescaler="means")
    paper: Any = mg.merge(models, base=base, method="emr")
    unified = {name: stored[f"unified.{name}"] for name in base}
    for index in range(3):
        expected = {name: stored[f"task{index}.{name}"] for name in base}
        assert_close(released[index], expected, 1e-7 if dtype == "f64" else 1e-6)
        masks = {name: stored[f"mask{index}.{name}"].to(base[name].dtype) for name in base}
        own = sum(float((models[index][name] - base[name]).abs().sum()) for name in base)
        factor = own / sum(float((masks[name] * unified[name]).abs().sum()) for name in base)
        exact = {name: base[name] + factor * masks[name] * unified[name] for name in base}
        assert_close(paper[index], exact, 1e-8 if dtype == "f64" else 1e-6)


def last_logits(weights: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss of the golden masks: a tiny language model's cross-entropy at the last token."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[name]

    layer = "model.layers.0"
    hidden = weights["model.embed_tokens.weight"][batch[0]]
    x = norm(hidden, f"{layer}.input_layernorm.weight")
    x = functional.linear(x, weights[f"{layer}.self_attn.q_proj.weight"], weights[f"{layer}.self_attn.q_proj.bias"])
    x = functional.relu(functional.linear(x, weights[f"{layer}.mlp.up_proj.weight"]))
    hidden = hidden + functional.linear(x, weights[f"{layer}.mlp.down_proj.weight"])
    logits = functional.linear(norm(hidden, "model.norm.weight"), weights["lm_head.weight"])
    return functional.cross_entropy(logits[:, -1], batch[1])


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_graft(golden: Load, density: float) -> None:
    """The base patch, the scores after three epochs of training (seen through many thresholds), and the graft."""
    base, (tuned,) = inputs(golden, ("ft1",))
    data = golden(f"task_vectors/grafting/generic_ft1_sparsity{density}.safetensors")

    def part(prefix: str) -> State:
        return {k.removeprefix(f"{prefix}.t."): v for k, v in data.items() if k.startswith(f"{prefix}.t.")}

    dataless = mg.merge([tuned], base=base, method="graft", density=density)
    assert_close(dataless, part("grafted_basepatch_only"), 1e-7)
    patch = part("basepatch")
    batches = [(data[f"ids.{i}"], data[f"labels.{i}"]) for i in range(4)]
    grafted: list[dict[str, torch.Tensor]] = []
    soft: list[dict[str, torch.Tensor]] = []

    def loss(weights: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        soft.append({name: value.detach().clone() for name, value in weights.items()})
        return last_logits(weights, batch)

    def score(weights: dict[str, torch.Tensor]) -> float:
        grafted.append(weights)
        return float(len(grafted))

    options: dict[str, Any] = {"density": density, "learning_rate": 1e4, "accumulate": 4, "init": part("init")}
    mask = train_graft_mask(base, tuned, loss, batches, epochs=4, score=score, **options)
    assert all(torch.equal(mask[name], value.bool()) for name, value in patch.items())
    # the weights of the fourth epoch are those at the scores after the third
    for name, final in part("final").items():
        gate = patch[name] + (1 - 2 * patch[name]) * torch.sigmoid(final - 10)
        expected = base[name] + gate * (tuned[name] - base[name])
        assert torch.allclose(soft[12][name], expected, rtol=0, atol=2e-8), name
    merged = mg.merge([tuned], base=base, method="graft", mask=mask)
    assert_close(merged, part("grafted"), 1e-7)
    assert_close(grafted[2], part("grafted"), 1e-7)


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_mos(golden: Load, momentum: float) -> None:
    data = golden(f"task_vectors/mos/ema_mom{momentum}.safetensors")
    names = sorted({key.split(".", 3)[3] for key in data})

    def state(kind: str, task: int, step: int) -> State:
        return {name: data[f"{kind}.t{task}.s{step}.{name}"].clone() for name in names}

    finished: list[State] = []
    for task in range(3):
        pull = AdapterPull(finished, momentum=momentum)
        adapter = state("before", task, 0)
        for step in range(4):
            for name, value in state("upd", task, step).items() if step else ():
                adapter[name] += value
            assert_close(adapter, state("before", task, step), 1e-6)
            pull.step(adapter)
            assert_close(adapter, state("after", task, step), 1e-6)
        finished.append(adapter)
