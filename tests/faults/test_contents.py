"""What the tensors hold and how the models fit together (rows 24 to 37)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.errors import InputError, MerganserError
from tests.conftest import Cli
from tests.helpers import (
    VOCABULARY,
    State,
    classifier_config,
    classifier_state,
    llama_config,
    llama_state,
    names_in,
    read_model,
    same,
    write_files,
    write_model,
    write_weights,
)

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def changed(state: State, **tensors: torch.Tensor | None) -> State:
    """A copy with some tensors replaced, added or (None) removed; `__` in a name stands for a dot."""
    result = dict(state)
    for key, value in tensors.items():
        name = key.replace("__", ".")
        if value is None:
            del result[name]
        else:
            result[name] = value
    return result


def merge_of(tmp_path: Path, cli: Cli, *states: State, extra: tuple[str, ...] = ()) -> Any:
    """The result of the average of models with these tensors."""
    folders = [write_model(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    return cli("merge", "-m", "average", *folders, "-o", tmp_path / "out", *extra)


# --- rows 24 and 25: values that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "slerp"])
def test_values_that_are_not_finite_are_counted_and_found(
    method: str, dtype: torch.dtype, value: float, tmp_path: Path, cli: Cli
) -> None:
    base, good, bad = (llama_state(seed, dtype=dtype) for seed in range(3))
    bad[UP][3, 5] = bad[UP][7, 0] = value
    folders = [write_model(tmp_path / name, s) for name, s in (("base", base), ("good", good), ("bad", bad))]
    result = cli("merge", "-m", method, "--base", *folders, "-o", tmp_path / "out")
    result.failed("E0601", folders[2] / "model.safetensors", UP, "2 of 128 values", "[3, 5]")
    assert names_in(tmp_path) == {"base", "good", "bad"}


@pytest.mark.parametrize("where", ["base", "copied tensor", "one-element tensor"])
def test_values_that_are_not_finite_elsewhere(where: str, tmp_path: Path, cli: Cli) -> None:
    base, a, b = (changed(llama_state(seed), logit_scale=torch.tensor(1.0)) for seed in range(3))
    name = "logit_scale" if where == "one-element tensor" else UP
    target = b if where == "one-element tensor" else base
    target[name].view(-1)[0] = math.nan
    folders = [write_model(tmp_path / n, s) for n, s in (("base", base), ("a", a), ("b", b))]
    extra = ["--exclude", UP] if where == "copied tensor" else []
    result = cli("merge", "-m", "task_arithmetic", "--base", *folders, *extra, "-o", tmp_path / "out")
    result.failed("E0601", folders[2 if target is b else 0], name)


def test_values_that_are_not_finite_are_taken_on_request(tmp_path: Path, cli: Cli) -> None:
    good, bad = llama_state(1), llama_state(2)
    bad[UP][3, 5] = math.nan
    assert merge_of(tmp_path, cli, good, bad, extra=("--allow-nonfinite",)).code == 0
    merged = read_model(tmp_path / "out")
    assert int(torch.isnan(merged[UP]).sum()) == 1
    assert all(torch.isfinite(value).all() for name, value in merged.items() if name != UP)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (torch.float16, None),
        (torch.float32, "f16"),
        (torch.float32, None),
        (torch.float64, "f32"),
        (torch.float64, None),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_a_result_that_overflows_its_type(stored: torch.dtype, asked: str | None, tmp_path: Path, cli: Cli) -> None:
    """Finite inputs, whose sum of task vectors is not."""
    largest = torch.finfo(torch.float16 if asked == "f16" else torch.float32 if asked else stored).max
    base, a, b = ({"w": torch.full((3, 4), 0.0, dtype=stored), "v": torch.ones(2, dtype=stored)} for _ in range(3))
    a["w"][1, 2] = b["w"][1, 2] = largest * 0.75
    folders = [write_model(tmp_path / n, s, {}) for n, s in (("base", base), ("a", a), ("b", b))]
    extra = ["--dtype", asked] if asked else []
    result = cli("merge", "-m", "task_arithmetic", "--base", *folders, *extra, "-o", tmp_path / "out")
    result.failed("E0602", "  --> w", "float32")
    assert re.search(r"element 6\b|\[1, 2\]", result.err)
    assert names_in(tmp_path) == {"base", "a", "b"}


def test_a_copied_tensor_that_overflows_the_output_type(tmp_path: Path, cli: Cli) -> None:
    a = changed(llama_state(1), logit_scale=torch.tensor([1e6]))
    result = merge_of(tmp_path, cli, a, a, extra=("--exclude", "logit_scale", "--dtype", "f16"))
    result.failed("E0602", "logit_scale", "float32")


def test_a_result_in_memory_that_overflows_its_type() -> None:
    state = {"w": torch.full((2,), 60000.0, dtype=torch.float16)}
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(mg.MerganserError) as caught:
        mg.merge([state, state], base=base, method="task_arithmetic")
    assert caught.value.code == "E0602"


# --- row 26: degenerate models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "slerp"])
@pytest.mark.parametrize("kind", ["zeros", "identical", "base is a model"])
def test_degenerate_models_stay_finite(kind: str, method: str, tmp_path: Path, cli: Cli) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in llama_state().items()}
    base, a = write_model(tmp_path / "base"), write_model(tmp_path / "a", zeros if kind == "zeros" else None, seed=1)
    b = write_model(tmp_path / "b", zeros if kind == "zeros" else None, seed=1)
    models = [a, base] if kind == "base is a model" else [a, b]
    result = cli("merge", "-m", method, "--base", base, *models, "-o", tmp_path / "out").succeeded()
    assert all(torch.isfinite(value).all() for value in read_model(tmp_path / "out").values())
    if kind == "base is a model" and method in ("task_arithmetic", "ties", "dare"):
        assert "the base is also listed as a model" in result.err
    if kind == "identical" and method in ("average", "slerp"):
        merged, expected = read_model(tmp_path / "out"), llama_state(1)
        assert all(torch.allclose(merged[name], value, rtol=1e-6, atol=0) for name, value in expected.items())


def test_the_base_as_the_only_model(tmp_path: Path, cli: Cli) -> None:
    """Its task vector is zero: the merge is the base, or an error that says so."""
    base = write_model(tmp_path / "base")
    result = cli("merge", "-m", "ties", "-b", base, base, "-o", tmp_path / "out")
    if result.code:
        result.failed("E0308", "base")
    else:
        assert same(read_model(tmp_path / "out"), llama_state())


# --- rows 27 to 29: names and shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mention"),
    [
        ((8, 16), "transpose"),
        ((128,), "[128]"),
        ((4, 32), "[4, 32]"),
        ((1, 8), "[1, 8]"),
        ((1,), "[1]"),
        ((), "[]"),
        ((16, 8, 1), "[16, 8, 1]"),
        ((0, 8), "[0, 8]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["average", "ties", "slerp"])
def test_shapes_must_be_equal(method: str, shape: tuple[int, ...], mention: str, tmp_path: Path, cli: Cli) -> None:
    base, a = write_model(tmp_path / "base"), write_model(tmp_path / "a", seed=1)
    b = write_model(tmp_path / "b", {**llama_state(2), UP: torch.ones(shape)})
    for command in (["plan"], ["merge", "-o", tmp_path / "out"]):
        result = cli(*command, "-m", method, "--base", base, a, b)
        result.failed("E0407", UP, "[16, 8]", mention, b / "model.safetensors")
    assert names_in(tmp_path) == {"base", "a", "b"}


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_grown_vocabulary(method: str, tmp_path: Path, cli: Cli) -> None:
    base, a = write_model(tmp_path / "base"), write_model(tmp_path / "a", seed=1)
    grown = write_model(tmp_path / "b", llama_state(2, vocabulary=14), llama_config(vocab_size=14))
    result = cli("plan", "-m", method, "--base", base, a, grown)
    result.failed("E0413", "12 and 14 rows", grown / "model.safetensors", "resize the embeddings")
    assert EMBEDDING in result.err or "lm_head.weight" in result.err


def test_a_missing_tensor(tmp_path: Path, cli: Cli) -> None:
    result = merge_of(tmp_path, cli, llama_state(1), changed(llama_state(2), model__norm__weight=None))
    result.failed("E0405", "model.norm.weight", tmp_path / "m1")


def test_an_extra_tensor(tmp_path: Path, cli: Cli) -> None:
    result = merge_of(tmp_path, cli, llama_state(1), changed(llama_state(2), v_head__weight=torch.ones(1, 8)))
    result.failed("E0406", "v_head.weight", tmp_path / "m1")


@pytest.mark.parametrize("prefix", ["module.", "base_model.", "_orig_mod."])
@pytest.mark.parametrize("lacks", [False, True])
def test_a_renamed_prefix_is_recognised(lacks: bool, prefix: str, tmp_path: Path, cli: Cli) -> None:
    plain, renamed = llama_state(1), {prefix + name: value for name, value in llama_state(2).items()}
    first, second = (renamed, plain) if lacks else (plain, renamed)
    result = merge_of(tmp_path, cli, first, second)
    result.failed("E0410", "lacks" if lacks else "adds", f"`{prefix}`")


def test_a_partly_renamed_model(tmp_path: Path, cli: Cli) -> None:
    state = llama_state(2)
    renamed = {("x." + name if "layers" in name else name): value for name, value in state.items()}
    merge_of(tmp_path, cli, llama_state(1), renamed).failed("E0405", "adds the prefix `x.`")


def test_a_misspelt_tensor_is_suggested(tmp_path: Path, cli: Cli) -> None:
    state = llama_state(2)
    state["model.layers.0.mlp.up_prj.weight"] = state.pop(UP)
    merge_of(tmp_path, cli, llama_state(1), state).failed("E0405", UP, "up_prj")


def test_nothing_in_common(tmp_path: Path, cli: Cli) -> None:
    ours, theirs = {"alpha.weight": torch.ones(2)}, {"beta.weight": torch.ones(2)}
    merge_of(tmp_path, cli, ours, theirs).failed("E0410", "alpha.weight", "beta.weight")


def test_no_tensors_at_all(tmp_path: Path, cli: Cli) -> None:
    merge_of(tmp_path, cli, {}, {}).failed("E0410", tmp_path / "m0")


def test_nothing_but_buffers(tmp_path: Path, cli: Cli) -> None:
    ids = {"position_ids": torch.arange(4)}
    merge_of(tmp_path, cli, ids, ids).failed("E0410", tmp_path / "m0")


# --- row 30: data types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_models_of_different_types(
    one: torch.dtype, other: torch.dtype, expected: torch.dtype, tmp_path: Path, cli: Cli
) -> None:
    a, b = llama_state(1, dtype=one), llama_state(2, dtype=other)
    merge_of(tmp_path, cli, a, b).succeeded()
    wide = torch.promote_types(expected, torch.float32)
    for name, value in read_model(tmp_path / "out").items():
        assert value.dtype == expected
        assert torch.equal(value, ((a[name].to(wide) + b[name].to(wide)) / 2).to(expected))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")


def test_types_that_differ_inside_a_model_are_kept(tmp_path: Path, cli: Cli) -> None:
    def mixed(seed: int) -> State:
        return {n: v if "norm" in n else v.bfloat16() for n, v in llama_state(seed).items()}

    merge_of(tmp_path, cli, mixed(1), mixed(2)).succeeded()
    merged = read_model(tmp_path / "out")
    assert {name: value.dtype for name, value in merged.items()} == {n: v.dtype for n, v in mixed(1).items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_in_one_model_and_integers_in_another(tmp_path: Path, cli: Cli) -> None:
    merge_of(tmp_path, cli, llama_state(1), {**llama_state(2), UP: torch.ones(16, 8, dtype=torch.int64)}).failed(
        "E0408", UP
    )


def test_integers_in_one_model_and_weights_in_another(tmp_path: Path, cli: Cli) -> None:
    merge_of(tmp_path, cli, {**llama_state(2), UP: torch.ones(16, 8, dtype=torch.int64)}, llama_state(1)).failed(
        "E0408", UP
    )


# --- rows 31 and 32: small tensors and buffers -----------------------------------------------------------------------


def test_empty_and_scalar_tensors_are_kept(tmp_path: Path, cli: Cli) -> None:
    def state(seed: int) -> State:
        return changed(llama_state(seed), logit_scale=torch.tensor(float(seed)), empty=torch.zeros(0, 3))

    merge_of(tmp_path, cli, state(1), state(2)).succeeded()
    merged = read_model(tmp_path / "out")
    assert merged["logit_scale"].shape == ()
    assert float(merged["logit_scale"]) == 1.5
    assert merged["empty"].shape == (0, 3)


BUFFERS: dict[str, Callable[[int], torch.Tensor]] = {
    "position_ids": lambda seed: torch.arange(seed, seed + 4).unsqueeze(0),
    "bn.num_batches_tracked": lambda seed: torch.tensor(seed),
    "attn.mask": lambda seed: torch.tensor([True, seed > 1]),
    "codes": lambda seed: torch.tensor([seed, 255], dtype=torch.uint8),
    "short": lambda seed: torch.tensor([-seed], dtype=torch.int16),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_copied_and_never_averaged(name: str, tmp_path: Path, cli: Cli) -> None:
    first, second = BUFFERS[name](1), BUFFERS[name](2)
    equal = merge_of(tmp_path, cli, {**llama_state(1), name: first}, {**llama_state(2), name: first}).succeeded()
    assert name not in equal.err
    merged = read_model(tmp_path / "out")[name]
    assert merged.dtype == first.dtype
    assert torch.equal(merged, first)
    other = tmp_path / "other"
    differing = merge_of(other, cli, {**llama_state(1), name: first}, {**llama_state(2), name: second}).succeeded()
    assert f"`{name}`" in differing.err
    assert torch.equal(read_model(other / "out")[name], first)


def test_a_buffer_that_only_one_model_has(tmp_path: Path, cli: Cli) -> None:
    ids = {"position_ids": torch.arange(4)}
    result = merge_of(tmp_path, cli, {**llama_state(1), **ids}, llama_state(2)).succeeded()
    assert "position_ids" in result.err
    assert torch.equal(read_model(tmp_path / "out")["position_ids"], ids["position_ids"])


@pytest.mark.parametrize("other", [torch.arange(8), torch.arange(4, dtype=torch.int32)], ids=["shape", "type"])
def test_buffers_of_another_shape_or_type_are_mentioned(other: torch.Tensor, tmp_path: Path, cli: Cli) -> None:
    ids = torch.arange(4)
    result = merge_of(
        tmp_path, cli, {**llama_state(1), "position_ids": ids}, {**llama_state(2), "position_ids": other}
    ).succeeded()
    assert "position_ids" in result.err


# --- row 33: quantised weights ---------------------------------------------------------------------------------------

QUANTISED: dict[str, State] = {
    "fp8": {UP: torch.zeros(16, 8).to(torch.float8_e4m3fn)},
    "fp8 e5m2": {UP: torch.zeros(16, 8).to(torch.float8_e5m2)},
    "int8": {UP: torch.zeros(16, 8, dtype=torch.int8)},
    "gptq": {UP.replace("weight", "qweight"): torch.zeros(2, 8, dtype=torch.int32)},
    "mxfp4": {UP.replace("weight", "weight_blocks"): torch.zeros(2, 8, dtype=torch.uint8)},
    "complex": {"freqs": torch.zeros(2, dtype=torch.complex64)},
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("position", [0, 1])
def test_quantised_weights_are_refused(position: int, kind: str, tmp_path: Path, cli: Cli) -> None:
    states = [llama_state(1), llama_state(2)]
    states[position] = {**states[position], **QUANTISED[kind]}
    result = merge_of(tmp_path, cli, *states)
    result.failed("E0408", next(iter(QUANTISED[kind])), tmp_path / f"m{position}")


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", None])
def test_a_quantisation_in_the_configuration_is_refused(method: str | None, tmp_path: Path, cli: Cli) -> None:
    quantisation: Any = {"quant_method": method} if method else "yes"
    write_model(tmp_path / "a"), write_model(tmp_path / "b", config=llama_config(quantization_config=quantisation))
    result = cli("plan", "-m", "average", tmp_path / "a", tmp_path / "b")
    result.failed("E0408", tmp_path / "b" / "config.json", method or "unknown")


# --- row 34: tied embeddings -----------------------------------------------------------------------------------------

TIED = llama_config(tie_word_embeddings=True)


def tied_state(seed: int, stored: bool, *, equal: bool = True) -> State:
    state = llama_state(seed, tied=True)
    if stored:
        state["lm_head.weight"] = state[EMBEDDING].clone() if equal else state[EMBEDDING] + 1
    return state


@pytest.mark.parametrize("stored", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_a_tied_head_is_merged_once(method: str, stored: tuple[bool, bool], tmp_path: Path, cli: Cli) -> None:
    folders = [write_model(tmp_path / "base", tied_state(9, stored[0]), TIED)]
    folders += [write_model(tmp_path / f"m{i}", tied_state(i, s), TIED) for i, s in enumerate(stored)]
    result = cli("merge", "-m", method, "--base", *folders, "-o", tmp_path / "out").succeeded()
    assert "tied" not in result.err
    plain = [write_model(tmp_path / f"p{i}", tied_state(s, False), TIED) for i, s in enumerate((9, 0, 1))]
    cli("merge", "-m", method, "--base", *plain, "-o", tmp_path / "expected").succeeded()
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "expected"))


def test_a_tied_head_that_differs_is_a_warning(tmp_path: Path, cli: Cli) -> None:
    a = write_model(tmp_path / "a", tied_state(1, True), TIED)
    b = write_model(tmp_path / "b", tied_state(2, True, equal=False), TIED)
    result = cli("merge", "-m", "average", a, b, "-o", tmp_path / "out").succeeded()
    assert "`lm_head.weight`" in result.err
    assert "tied" in result.err
    merged = read_model(tmp_path / "out")
    assert torch.equal(merged.get("lm_head.weight", merged[EMBEDDING]), merged[EMBEDDING])


def test_an_untied_head_is_merged_for_itself(tmp_path: Path, cli: Cli) -> None:
    merge_of(tmp_path, cli, llama_state(1), llama_state(2)).succeeded()
    merged, a, b = read_model(tmp_path / "out"), llama_state(1), llama_state(2)
    assert torch.equal(merged["lm_head.weight"], (a["lm_head.weight"] + b["lm_head.weight"]) / 2)


def t5_state(seed: int, *, head: bool) -> State:
    g = torch.Generator().manual_seed(seed)
    names = ["shared.weight", *(["lm_head.weight"] if head else [])]
    return {name: torch.randn(12, 8, generator=g) for name in names}


@pytest.mark.parametrize("base_says", [True, False])
def test_a_t5_has_the_head_that_it_stores_whatever_its_configuration_says(
    base_says: bool, tmp_path: Path, cli: Cli
) -> None:
    """transformers 5 writes that it is tied when it saves a T5 1.1, and keeps the head when it loads it again."""
    states = [t5_state(seed, head=True) for seed in (1, 2)]
    folders = [
        write_model(tmp_path / name, state, {"model_type": "t5", "tie_word_embeddings": tied})
        for name, state, tied in zip("ab", states, (base_says, True), strict=True)
    ]
    result = cli("merge", "-m", "average", *folders, "-o", tmp_path / "out").succeeded()
    assert "tied" not in result.err
    merged = read_model(tmp_path / "out")
    for name in ("shared.weight", "lm_head.weight"):
        assert torch.equal(merged[name], (states[0][name] + states[1][name]) / 2)


def test_a_t5_that_stores_no_head_is_tied(tmp_path: Path, cli: Cli) -> None:
    config = {"model_type": "t5", "tie_word_embeddings": True}
    a = write_model(tmp_path / "a", t5_state(1, head=False), config)
    copy = t5_state(2, head=False)
    b = write_model(tmp_path / "b", {**copy, "lm_head.weight": copy["shared.weight"].clone()}, config)
    cli("merge", "-m", "average", a, b, "-o", tmp_path / "out").succeeded()
    assert set(read_model(tmp_path / "out")) == {"shared.weight"}


def test_a_model_in_memory_keeps_its_tied_names() -> None:
    def state(seed: int) -> State:
        tensors = llama_state(seed, tied=True)
        tensors["lm_head.weight"] = tensors[EMBEDDING]
        return tensors

    merged = mg.merge([state(1), state(2)], method="average")
    assert list(merged) == list(state(1))
    assert merged["lm_head.weight"].data_ptr() == merged[EMBEDDING].data_ptr()


# --- row 35: configurations ------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "JSON"),
    "empty": ("", "JSON"),
    "a list": ("[]", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "BOM and NaN": (b'\xef\xbb\xbf{"a": NaN}', "JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "duplicate key": ('{"model_type": "llama", "model_type": "bert"}', "`model_type` appears twice"),
    "deep": ('{"a":' * 100_000, "nested"),
    "other architecture": (llama_config(model_type="bert"), "`llama` and `bert`"),
    "too few layers": (llama_config(1), "says 1 layers, the weights have 2"),
    "too many layers": (llama_config(3), "says 3 layers, the weights have 2"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration(case: str, tmp_path: Path, cli: Cli) -> None:
    config, mention = BAD_CONFIGS[case]
    a, b = write_model(tmp_path / "a"), write_files(write_model(tmp_path / "b"), {"config.json": config})
    cli("merge", "-m", "average", a, b, "-o", tmp_path / "out").failed("E0409", b, mention)


def test_no_configuration(tmp_path: Path, cli: Cli) -> None:
    a, b = write_model(tmp_path / "a"), write_weights(tmp_path / "b", llama_state(1))
    cli("plan", "-m", "average", a, b).failed("E0409", b / "config.json")
    out = tmp_path / "out.safetensors"
    cli("merge", "-m", "average", a / "model.safetensors", b / "model.safetensors", "-o", out).succeeded()
    assert read_model(out).keys() == llama_state().keys()


# --- heads and labels ------------------------------------------------------------------------------------------------

LABELS = ["anger", "joy", "fear"]


def classifiers(tmp_path: Path, *labels: list[str] | None, base: str = "head") -> list[Path]:
    """A base and one model for each set of labels."""
    folders = [write_model(tmp_path / "base", classifier_state(9, head=base == "head"), classifier_config(None))]
    for i, names in enumerate(labels):
        state = classifier_state(i, 3 if names is None else len(names))
        folders.append(write_model(tmp_path / f"m{i}", state, classifier_config(names)))
    return folders


def test_equal_labels_are_merged(tmp_path: Path, cli: Cli) -> None:
    _, *models = classifiers(tmp_path, LABELS, LABELS)
    cli("merge", "-m", "average", *models, "-o", tmp_path / "out").succeeded()
    assert "classifier.weight" in read_model(tmp_path / "out")


@pytest.mark.parametrize("other", [LABELS[::-1], ["a", "b", "c"], LABELS[:2]], ids=["order", "names", "number"])
def test_different_labels_are_an_error(other: list[str], tmp_path: Path, cli: Cli) -> None:
    _, *models = classifiers(tmp_path, LABELS, other)
    result = cli("merge", "-m", "average", *models, "-o", tmp_path / "out")
    result.failed("E0411", *models, "--heads exclude")


def test_different_labels_beside_a_base_without_labels(tmp_path: Path, cli: Cli) -> None:
    base, *models = classifiers(tmp_path, LABELS, LABELS[::-1])
    cli("merge", "-m", "task_arithmetic", "-b", base, *models, "-o", tmp_path / "out").failed("E0411", *models)


@pytest.mark.parametrize("base", ["head", "no head"])
def test_heads_are_excluded_on_request(base: str, tmp_path: Path, cli: Cli) -> None:
    folder, *models = classifiers(tmp_path, LABELS, LABELS[:2], base=base)
    variants: list[list[str | Path]] = [["-m", "average"], ["-m", "ties", "-b", folder]]
    for number, arguments in enumerate(variants):
        out = tmp_path / f"out{number}"
        cli("merge", *arguments, *models, "--heads", "exclude", "-o", out).succeeded()
        merged = read_model(out)
        assert merged.keys() == classifier_state(head=False).keys()
        listed = json.loads((out / "merge.lock.json").read_text())["coverage"]["left_out"]
        assert set(listed) == {"classifier.weight", "classifier.bias"}


def test_a_head_is_kept_from_a_model(tmp_path: Path, cli: Cli) -> None:
    _, *models = classifiers(tmp_path, LABELS, LABELS[:2])
    cli("merge", "-m", "average", *models, "--heads", f"keep-from {models[1]}", "-o", tmp_path / "out").succeeded()
    merged = read_model(tmp_path / "out")
    assert torch.equal(merged["classifier.weight"], classifier_state(1, 2)["classifier.weight"])
    assert merged["classifier.bias"].shape == (2,)


def test_a_kept_head_comes_with_its_labels(tmp_path: Path, cli: Cli) -> None:
    _, *models = classifiers(tmp_path, LABELS, LABELS[:2])
    cli("merge", "-m", "average", *models, "--heads", f"keep-from {models[1]}", "-o", tmp_path / "out").succeeded()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "anger", "1": "joy"}


def test_a_base_without_the_head(tmp_path: Path, cli: Cli) -> None:
    base, *models = classifiers(tmp_path, LABELS, LABELS, base="no head")
    cli("plan", "-m", "ties", "-b", base, *models).failed("E0406", "classifier", "heads: exclude")


@pytest.mark.parametrize("word", ["mrge", "keep", "excluded", "KEEP-FROM x", ""])
def test_an_unknown_wish_for_the_heads(word: str, tmp_path: Path, cli: Cli) -> None:
    _, *models = classifiers(tmp_path, LABELS, LABELS)
    result = cli("plan", "-m", "average", *models, "--heads", word)
    assert result.code in (2, 3)


# --- rows 36 and 37: names -------------------------------------------------------------------------------------------

NAMES = ["../../evil", "/etc/passwd", "\x1b[31mred", "<script>alert(1)</script>", "\u202egnp", "x" * 10_000, "ü b"]


def test_hostile_names_are_kept_and_never_become_paths(tmp_path: Path, cli: Cli) -> None:
    states = [{name: torch.full((2,), float(i + seed)) for i, name in enumerate(NAMES)} for seed in (0, 2)]
    folders = [write_model(tmp_path / f"m{i}", state, {}) for i, state in enumerate(states)]
    out = tmp_path / "deep" / "out"
    for command in (["inspect", folders[0]], ["plan", "-a", "-m", "average", *folders], ["diff", "-a", *folders]):
        shown = cli(*command).succeeded().out
        assert all(line.isprintable() for line in shown.split("\n"))
    cli("merge", "-m", "average", *folders, "--exclude", "*evil", "-o", out, "--shard-size", "16B").succeeded()
    merged = read_model(out)
    assert merged.keys() == set(NAMES)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"m0", "m1", "deep", "out"}
    readme = (out / "README.md").read_text()
    assert "<script>" not in readme
    assert "\x1b" not in readme


def test_many_tensors(tmp_path: Path, cli: Cli) -> None:
    for i in range(2):
        save_file(
            {f"model.layers.{n}.w": torch.full((1,), float(i + n)) for n in range(3000)},
            tmp_path / f"{i}.safetensors",
        )
    out = tmp_path / "out.safetensors"
    cli("merge", "-m", "average", tmp_path / "0.safetensors", tmp_path / "1.safetensors", "-o", out).succeeded()
    assert all(float(value) == int(name.split(".")[2]) + 0.5 for name, value in read_model(out).items())


# --- in memory -------------------------------------------------------------------------------------------------------


def test_what_is_not_a_model() -> None:
    with pytest.raises(InputError) as not_tensor:
        mg.merge([{"w": [1.0]}, {"w": [2.0]}], method="average")
    assert not_tensor.value.code == "E0408"
    with pytest.raises(InputError) as number:
        mg.merge([3, 4], method="average")
    assert number.value.code == "E0401"
    with pytest.raises(InputError) as sparse:
        mg.merge([{"w": torch.eye(3).to_sparse()}] * 2, method="average")
    assert sparse.value.code == "E0408"


@pytest.mark.parametrize("models", [[], "model", {"w": torch.ones(1)}, 5])
def test_models_are_given_as_a_list(models: Any) -> None:
    with pytest.raises(MerganserError) as caught:
        mg.merge(models, method="average")
    assert caught.value.code == "E0308"


def test_the_vocabulary_of_these_tests_is_that_of_the_configuration() -> None:
    assert llama_state()[EMBEDDING].shape[0] == VOCABULARY == llama_config()["vocab_size"]
