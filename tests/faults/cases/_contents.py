"""Rows 24 to 37: what the tensors hold, and how the models fit together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.faults.cases._case import INPUT, INSPECT, MERGE, MERGES, NUMERIC, OK, PLAN, TIES, Case, Command
from tests.helpers import State, llama_config, llama_state, read_model, write_files, write_model

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
FILE = "bad/model.safetensors"
ADDED: Command = ("merge", "-m", "task_arithmetic", "-b", "base", "good", "bad", "-o", "out")
RUNS = (MERGE, ("merge", "recipe.yml", "-o", "out"))


def _state(change: Callable[[State], object], *, both: bool = False, **config: Any) -> Callable[[Path], object]:
    """Change the tensors of the bad model, or of both."""

    def build(root: Path) -> None:
        for seed, name in ((1, "good"), (2, "bad")):
            if name == "bad" or both:
                state = llama_state(seed)
                change(state)
                write_model(root / name, state, llama_config(**config))

    return build


def _value(value: float) -> Callable[[Path], object]:
    def change(state: State) -> None:
        state[UP][3, 5] = state[UP][7, 0] = value

    return _state(change)


def _tensor(name: str, value: torch.Tensor | None, *, both: bool = False) -> Callable[[Path], object]:
    def change(state: State) -> None:
        if value is None:
            del state[name]
        else:
            state[name] = value.clone()

    return _state(change, both=both)


def _differing(name: str, make: Callable[[int], torch.Tensor]) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        for seed, folder in ((1, "good"), (2, "bad")):
            write_model(root / folder, {**llama_state(seed), name: make(seed)})

    return build


def _cast(dtype: torch.dtype, *, norms: bool = True) -> Callable[[Path], object]:
    def change(state: State) -> None:
        state.update({n: v.to(dtype) for n, v in state.items() if norms or "norm" not in n})

    return _state(change)


def _overflow(root: Path) -> None:
    write_model(root / "base", {n: torch.zeros_like(v).half() for n, v in llama_state().items()})
    for folder in ("good", "bad"):
        write_model(root / folder, {n: torch.full_like(v, 40_000.0).half() for n, v in llama_state().items()})


def _prefixed(prefix: str) -> Callable[[Path], object]:
    return lambda root: write_model(root / "bad", {prefix + n: v for n, v in llama_state(2).items()})


def _zero(*folders: str) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        write_model(root / "base")
        for folder in folders:
            write_model(root / folder, {n: torch.zeros_like(v) for n, v in llama_state().items()})

    return build


def _same(*folders: str) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        for folder in folders:
            write_model(root / folder, seed=1)

    return build


def _config(text: str | bytes | dict[str, Any] | None) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        if text is None:
            (root / "bad" / "config.json").unlink()
        else:
            write_files(root / "bad", {"config.json": text})

    return build


def _tied(second: str) -> Callable[[Path], object]:
    """Tied embeddings, stored once, or a second time in the bad model."""

    def build(root: Path) -> None:
        for seed, folder in ((1, "good"), (2, "bad")):
            state = llama_state(seed, tied=True)
            if folder == "bad" and second:
                state["lm_head.weight"] = state[EMBEDDING].clone() + (second == "different")
            write_model(root / folder, state, llama_config(tie_word_embeddings=True))

    return build


def _many(count: int) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        for number, folder in enumerate(("good", "bad")):
            tensors = {f"model.layers.{n // 10}.w{n % 10}": torch.full((1,), float(number)) for n in range(count)}
            save_file(tensors, root / folder / "model.safetensors")
            write_files(root / folder, {"config.json": {"model_type": "x"}})

    return build


def _named(name: str) -> Callable[[Path], object]:
    """Both models have a tensor of that name, and a recipe cannot reach it."""
    return _tensor(name, torch.ones(2), both=True)


def _kept(name: str) -> Callable[[Path], bool]:
    return lambda out: name in read_model(out)


def _finite(out: Path) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in read_model(out).values())


def _case(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return Case(f"ct_{name}", row, build, **{"mentions": mentions, "commands": MERGES, **rest})


def _warned(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return _case(name, row, build, *mentions, **{"exits": (OK,), "made": _finite, "commands": RUNS, **rest})


QUANTISED: dict[str, tuple[str, torch.Tensor]] = {
    "fp8": (UP, torch.zeros(16, 8).to(torch.float8_e4m3fn)),
    "fp8_e5m2": (UP, torch.zeros(16, 8).to(torch.float8_e5m2)),
    "fp8_scale": (f"{UP}_scale_inv", torch.ones(1, 1)),
    "bnb_int8": (UP, torch.zeros(16, 8, dtype=torch.int8)),
    "bnb_int8_scb": ("model.layers.0.mlp.up_proj.SCB", torch.ones(16)),
    "bnb_4bit": (UP, torch.zeros(64, 1, dtype=torch.uint8)),
    "gptq": ("model.layers.0.mlp.up_proj.qweight", torch.zeros(1, 8, dtype=torch.int32)),
    "gptq_zeros": ("model.layers.0.mlp.up_proj.qzeros", torch.zeros(1, 8, dtype=torch.int32)),
    "mxfp4": ("model.layers.0.mlp.up_proj_blocks", torch.zeros(4, 4, dtype=torch.uint8)),
}
CONFIGS: dict[str, str | bytes | dict[str, Any] | None] = {
    "config_missing": None,
    "config_empty": "",
    "config_not_json": "{'model_type': 'llama'}",
    "config_yaml": "model_type: llama\n",
    "config_truncated": json.dumps(llama_config())[:-5],
    "config_list": "[]",
    "config_null": "null",
    "config_bom": b"\xef\xbb\xbf" + json.dumps(llama_config()).encode(),
    "config_bom_nan": b"\xef\xbb\xbf" + json.dumps({**llama_config(), "a": math.nan}).encode(),
    "config_nan": json.dumps({**llama_config(), "a": math.nan}),
    "config_utf16": json.dumps(llama_config()).encode("utf-16"),
    "config_latin1": b'{"model_type": "ll\xe4ma"}',
    "config_duplicate": '{"model_type": "llama", "model_type": "llama"}',
    "config_deep": json.dumps(llama_config())[:-1] + ', "a": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "config_deep_500": json.dumps(llama_config())[:-1] + ', "a": ' + '{"a":' * 500 + "1" + "}" * 501,
    "config_100k_lists": json.dumps(llama_config())[:-1] + ', "a": [' + "[]," * 1_600_000 + "1]}",
    "config_large": json.dumps(llama_config())[:-1] + ', "a": "' + "x" * 20_000_000 + '"}',
    "config_quantised": llama_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config_quantised_word": llama_config(quantization_config="int8"),
    "other_architecture": llama_config(model_type="gpt2"),
    "other_class": llama_config(architectures=["BertModel"], model_type="bert"),
    "config_layers_lie": llama_config(num_hidden_layers=99),
    "config_layers_few": llama_config(num_hidden_layers=1),
}
NAMES = {
    "traversal": "../../evil",
    "absolute": "/etc/cron.d/evil",
    "ansi": "\x1b[2J\x1b[31mred",
    "newline": "a\nerror[E0000] forged",
    "html": "<script>alert(1)</script>",
    "markdown": "[x](javascript:alert(1))`|`",
    "rtl": "model.\u202egnp.weight",
    "zero_width": "model.\u200bnorm",
    "nul": "a\0b",
    "long": "x" * 10_000,
    "unicode": "модель.權重",
    "percent": "%s%n{0}{{}}",
    "template": "{{ 7*7 }}${HOME}",
    "empty": "",
    "dot": ".",
    "slash": "a/b/c",
    "quote": "a\"b'c",
}

CONTENTS = (
    *(
        _case(name, 24, _value(value), FILE, UP, "2 of 128", "[3, 5]", commands=(*RUNS, TIES), exits=(NUMERIC,))
        for name, value in (("nan", math.nan), ("inf", math.inf), ("minus_inf", -math.inf))
    ),
    _case("nan_allowed", 24, _value(math.nan), commands=((*MERGE, "--allow-nonfinite"),), exits=(OK,)),
    _case("fp16_overflow", 25, _overflow, "weight", "float32", commands=(ADDED,), exits=(NUMERIC,)),
    _warned("all_zero_model", 26, _zero("bad"), commands=(*RUNS, ADDED, TIES)),
    _warned("all_zero_models", 26, _zero("good", "bad"), commands=(*RUNS, ADDED)),
    _warned("identical_files", 26, _same("good", "bad"), commands=RUNS),
    _warned("one_zero_task_vector", 26, _same("base", "bad"), commands=(ADDED,)),
    _case("shape_transposed", 27, _tensor(UP, torch.ones(8, 16)), FILE, UP, "[8, 16]", "[16, 8]"),
    _case("shape_same_numel", 27, _tensor(UP, torch.ones(4, 32)), FILE, UP),
    _case("shape_flat", 27, _tensor(UP, torch.ones(128)), FILE, UP),
    _case("shape_extra_dimension", 27, _tensor(UP, torch.ones(1, 16, 8)), FILE, UP),
    _case("broadcastable_shape", 27, _tensor(UP, torch.ones(1, 8)), FILE, UP),
    _case("broadcastable_scalar", 27, _tensor(UP, torch.tensor(1.0)), FILE, UP),
    _case(
        "vocab_grown",
        28,
        lambda root: write_model(root / "bad", llama_state(2, vocabulary=14), llama_config(vocab_size=14)),
        FILE,
        "weight",
        "vocabular",
    ),
    _case("missing_tensor", 29, _tensor("model.norm.weight", None), "bad", "model.norm.weight"),
    _case("missing_tensor_base", 29, _tensor("model.norm.weight", None), "bad", "model.norm.weight", commands=(TIES,)),
    _case("extra_tensor", 29, _tensor("extra.weight", torch.ones(3)), FILE, "extra.weight"),
    *(_case(f"prefix_renamed_{p}", 29, _prefixed(f"{p}."), "bad", f"`{p}.`") for p in ("module", "_orig_mod")),
    _case(
        "prefix_lacks",
        29,
        lambda root: write_model(root / "bad", {n.removeprefix("model."): v for n, v in llama_state(2).items()}),
        "bad",
        "`model.`",
    ),
    _case("no_common_names", 29, lambda root: write_model(root / "bad", {"a": torch.ones(2)}), FILE, "a"),
    _case("zero_tensors", 29, lambda root: write_model(root / "bad", {}), "bad", commands=(*MERGES, INSPECT)),
    _warned("dtype_between_models", 30, _cast(torch.bfloat16)),
    _warned("dtype_f64", 30, _cast(torch.float64)),
    _warned("dtype_inside_model", 30, _cast(torch.float16, norms=False)),
    _case("dtype_int_model", 30, _cast(torch.int32), FILE, "model."),
    _warned("zero_size", 31, _tensor("empty", torch.zeros(0, 4), both=True), made=_kept("empty")),
    _warned("zero_dim", 31, _tensor("logit_scale", torch.tensor(2.5), both=True), made=_kept("logit_scale")),
    _warned("int_buffer_equal", 32, _tensor("position_ids", torch.arange(4), both=True), made=_kept("position_ids")),
    _warned("int_buffer_different", 32, _differing("position_ids", lambda s: torch.arange(4) + s), "position_ids"),
    _warned("bool_buffer_different", 32, _differing("mask", lambda s: torch.tensor([True, s > 1])), "mask"),
    _warned("batchnorm_counter", 32, _differing("bn.num_batches_tracked", torch.tensor), "bn.num_batches_tracked"),
    *(_case(name, 33, _tensor(key, value), FILE, key) for name, (key, value) in QUANTISED.items()),
    *(_case(f"{name}_both", 33, _tensor(key, value, both=True), key) for name, (key, value) in QUANTISED.items()),
    _warned("tied_stored_once", 34, _tied("")),
    _warned("tied_stored_twice", 34, _tied("same")),
    _warned("tied_different", 34, _tied("different"), "lm_head.weight", "tied"),
    *(_case(name, 35, _config(text), "bad", "config.json", commands=MERGES) for name, text in CONFIGS.items()),
    _warned("config_infinity", 35, _config(json.dumps({**llama_config(), "time_step_limit": [0.0, math.inf]}))),
    *(
        Case(
            f"ct_name_{name}",
            36,
            _named(key),
            (INSPECT, PLAN, *RUNS, ("diff", "-a", "good", "bad")),
            (OK,),
            made=_kept(key),
        )
        for name, key in NAMES.items()
    ),
    Case("ct_name_repeated_as_shape", 36, _tensor(NAMES["ansi"], torch.ones(2)), MERGES, (INPUT,), ("\\x1b[2J",)),
    _case("many_tensors", 37, _many(20_000), commands=(MERGE,), exits=(OK,), heavy=True),
)
