"""Rows 38 to 42 and 63: what would run code, and secrets."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.cases._case import ALL, BY_RECIPE, INPUT, MERGE, OK, PLAN, SECURITY, Case
from tests.helpers import contents, llama_config, write_files, write_model

RUN = "import pathlib; pathlib.Path('canary').touch()\n"
SECRET = "hf_hunter2hunter2hunter2"


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("canary",))


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": _Canary()}))


def _zipped(path: Path) -> None:
    import torch

    torch.save({"w": _Canary()}, path)


def _only(file: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """The bad model has no other weights."""

    def build(root: Path) -> None:
        (root / "bad" / "model.safetensors").unlink()
        make(root / "bad" / file)

    return build


def _beside(*files: str) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        for file in files:
            _pickle(root / "good" / file)

    return build


def _config(**keys: Any) -> Callable[[Path], object]:
    """Both models say so, and have the code."""

    def build(root: Path) -> None:
        for seed, folder in ((1, "good"), (2, "bad")):
            files = {f"{kind}_evil.py": RUN for kind in ("modeling", "configuration", "tokenization")}
            write_model(root / folder, config=llama_config(**keys), seed=seed, files=files)

    return build


def _stripped(*words: str) -> Callable[[Path], bool]:
    """The output's configuration has none of the words, and no code came along."""

    def made(out: Path) -> bool:
        text = (out / "config.json").read_text()
        return not any(word in text for word in words) and not list(out.rglob("*.py"))

    return made


def _template(root: Path) -> None:
    payload = "{{ cycler.__init__.__globals__.os.mkdir('canary') }}"
    for folder in ("good", "bad"):
        files = {"chat_template.jinja": payload, "tokenizer_config.json": f'{{"chat_template": "{payload}"}}'}
        write_files(root / folder, files)


def _has_template(out: Path) -> bool:
    return "__globals__" in (out / "chat_template.jinja").read_text()


def _shadow(root: Path) -> None:
    names = ("sitecustomize", "usercustomize", "torch", "json", "yaml", "numpy", "typer", "safetensors", "pydantic")
    write_files(root, {f"{name}.py": RUN for name in names})


def _nothing_evil(out: Path) -> bool:
    return not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in contents(out))


def _no_secret(out: Path) -> bool:
    return not any(SECRET.encode() in raw for raw in contents(out).values())


def _secret(root: Path) -> None:
    os.environ["HF_TOKEN"] = SECRET


def _case(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return Case(name, row, build, **{"mentions": mentions, **rest})


_RUNS = (PLAN, MERGE, BY_RECIPE)
_REMOTE = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "rc_auto_map": ({"auto_map": _REMOTE}, "auto_map"),
    "rc_auto_map_remote": ({"auto_map": {"AutoModel": "attacker/repo--modeling.Evil"}}, "auto_map"),
    "rc_trust_remote_code": ({"trust_remote_code": True}, "trust_remote_code"),
    "rc_trust_remote_code_nested": ({"text_config": {"trust_remote_code": True}}, "text_config.trust_remote_code"),
    "rc_attn_implementation_internal": (
        {"_attn_implementation_internal": "attacker/kernel"},
        "_attn_implementation_internal",
    ),
    "rc_attn_implementation": ({"_attn_implementation": "attacker/kernel:attention"}, "_attn_implementation"),
    "rc_attn_implementation_public": ({"attn_implementation": "attacker/kernel"}, "attn_implementation"),
    "rc_experts_implementation": ({"_experts_implementation": "attacker/kernel"}, "_experts_implementation"),
    "rc_custom_pipelines": ({"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}, "custom_pipelines"),
    "rc_name_or_path": ({"_name_or_path": "/home/someone/model"}, "_name_or_path"),
}

CODE = (
    *(
        _case(f"pk_bin_{name}", 38, _only(file, make), f"bad/{file}", "pickle", exits=(SECURITY,))
        for name, file, make in (
            ("legacy", "pytorch_model.bin", _pickle),
            ("zip", "pytorch_model.bin", _zipped),
            ("pt", "model.pt", _pickle),
            ("pth", "weights.pth", _zipped),
            ("ckpt", "last.ckpt", _pickle),
            ("pkl", "model.pkl", _pickle),
            ("shard", "pytorch_model-00001-of-00002.bin", _zipped),
        )
    ),
    _case("pk_adapter_bin", 38, _only("adapter_model.bin", _zipped), "bad", exits=(SECURITY, INPUT)),
    _case(
        "pk_file",
        38,
        lambda root: _zipped(root / "evil.bin"),
        "evil.bin",
        "pickle",
        commands=(("inspect", "evil.bin"), ("merge", "-m", "average", "good", "evil.bin", "-o", "out")),
        exits=(SECURITY,),
    ),
    _case("pk_sibling_bin", 39, _beside("pytorch_model.bin"), exits=(OK,), made=_nothing_evil),
    _case("pk_training_args", 39, _beside("training_args.bin", "optimizer.pt"), exits=(OK,), made=_nothing_evil),
    *(
        _case(
            name,
            40,
            _config(**keys),
            path,
            commands=(MERGE, BY_RECIPE),
            exits=(OK,),
            made=_stripped("attacker", path.split(".")[-1], "evil", "someone"),
        )
        for name, (keys, path) in KEYS.items()
    ),
    _case("rc_jinja_template", 41, _template, exits=(OK,), made=_has_template),
    _case("rc_sitecustomize", 42, _shadow, exits=(OK,)),
    _case("ev_secret_in_env", 63, _secret, exits=(OK,), made=_no_secret, commands=ALL),
)
