"""Model folders: which task they are for, and loading them with transformers."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import Checkpoint, open_checkpoint, read_json
from merganser.errors import EnvironmentFault, InputError, Place, SecurityError
from merganser.statistics._records import Labels

__all__ = [
    "ModelFolder",
    "build_model",
    "has_vocabulary",
    "load_model",
    "modules_of",
    "open_model",
    "skeleton",
    "transformers",
]

# the suffix of an architecture, the class that loads it, and its task; None: no loss that is known here
_FORMS: tuple[tuple[str, str, str | None], ...] = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "classification"),
    ("ForCausalLM", "AutoModelForCausalLM", "causal_lm"),
    ("LMHeadModel", "AutoModelForCausalLM", "causal_lm"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM", "seq2seq"),
    ("Seq2SeqLM", "AutoModelForSeq2SeqLM", "seq2seq"),
    ("ForImageClassification", "AutoModelForImageClassification", "classification"),
    ("ForMaskedLM", "AutoModelForMaskedLM", None),
    ("Model", "AutoModel", None),
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a configuration, weights and perhaps a tokenizer.

    Attributes:
        path: the folder.
        config: the parsed ``config.json``.
        loader: the class of transformers that loads it.
        task: classification, causal_lm, seq2seq, or None if there is no loss.
        labels: of a classifier.
        adapted: the model with its adapters; None where the folder's own weights count.
    """

    path: Path
    config: Mapping[str, Any]
    loader: str
    task: str | None
    labels: Labels | None
    adapted: Checkpoint | None = None

    @property
    def positions(self) -> int:
        """The longest sequence, as far as the configuration tells."""
        found = [self.config.get(key) for key in ("max_position_embeddings", "n_positions")]
        return min([n for n in found if type(n) is int and n > 0], default=2**31)


def open_model(path: str, base: str | None = None) -> ModelFolder:
    """Read headers and configuration of a model; no weight is loaded.

    Args:
        path: the model.
        base: the model that an adapter which is named alone is folded into.

    Raises:
        InputError: it does not exist, is damaged (see `open_checkpoint`), or is of a form that needs the Python API.
        SecurityError: it needs code from its folder.
    """
    checkpoint = open_checkpoint(path, base=None if base is None else open_checkpoint(base))
    folder, config = checkpoint.folder, checkpoint.config
    if folder is None or config is None:
        raise InputError(
            "E0409",
            "a model that runs is a folder with config.json, weights and tokenizer",
            places=Place(file=path),
            fix="name the model's folder, or load it in Python and pass the module",
        )
    place = Place(file=str(folder / "config.json"), key="architectures")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError("E0409", "config.json names no architecture", places=place)
    if config.get("auto_map"):
        raise SecurityError(
            "E0503",
            "the model needs code from its folder, which is never run",
            places=Place(file=str(folder / "config.json"), key="auto_map"),
            fix="load it yourself in Python where you trust its author, and pass the module",
        )
    form = next(((loader, task) for suffix, loader, task in _FORMS if names[0].endswith(suffix)), None)
    if form is None:
        raise InputError(
            "E0419",
            f"models of the architecture {names[0]} are not loaded by name",
            places=place,
            fix="load it yourself in Python and pass the module",
        )
    loader, task = form
    labels = _labels(config) if task == "classification" else None
    return ModelFolder(folder, config, loader, task, labels, checkpoint if checkpoint.beside else None)


def _labels(config: Mapping[str, Any]) -> Labels:
    names = config.get("label2id") or {}
    names = {k: v for k, v in names.items() if type(v) is int} if isinstance(names, dict) else {}
    listed = config.get("id2label")
    count = config.get("num_labels")
    if type(count) is not int:
        count = len(listed) if isinstance(listed, dict) and listed else len(names) or 2
    return Labels(count, names)


def transformers() -> Any:
    """The package, imported when a model folder is loaded.

    Raises:
        EnvironmentFault: E0704, it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentFault(
            "E0704",
            "loading a model folder needs the package transformers",
            why=str(error),
            fix="pip install 'merganser[hf]', or pass a module in Python",
        ) from None


@contextlib.contextmanager
def _silent(package: Any) -> Iterator[None]:
    """Without the package's own notes on missing weights; they are checked here."""
    log = package.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def load_model(folder: ModelFolder, *, dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, frozenset[str]]:
    """The model, and the weights that its files do not hold (which are random, and must not be measured).

    Raises:
        InputError: E0409, transformers cannot make the model of its configuration, or the weights are of another.
    """
    package = transformers()
    try:
        if folder.adapted is not None:
            built, missing = build_model(folder, {name: folder.adapted.read(name) for name in folder.adapted.specs()})
            return built.to(device=device, dtype=dtype), missing
        with _silent(package):
            model, info = getattr(package, folder.loader).from_pretrained(
                str(folder.path),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(
            "E0409",
            "transformers cannot load the model: configuration and weights do not fit together",
            places=Place(file=str(folder.path / "config.json")),
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="download the model again, or load it yourself in Python and pass the module",
        ) from None
    return model.to(device=device, dtype=dtype), frozenset(str(name) for name in info["missing_keys"])


def build_model(
    folder: ModelFolder, tensors: Mapping[str, torch.Tensor], *, loader: str | None = None
) -> tuple[torch.nn.Module, frozenset[str]]:
    """A model of a folder's configuration with the given weights, in float32 and evaluation mode.

    Args:
        folder: whose configuration is used; none of its weights is read.
        tensors: the weights, which the model may share.
        loader: the class of transformers that builds it, if not the folder's own: a bare encoder is ``AutoModel``.

    Returns:
        The model, and the names of the weights that are not given (which are random).
    """
    package = transformers()
    with _silent(package), torch.random.fork_rng(devices=[]):
        config = package.AutoConfig.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            kind: Any = type(getattr(package, loader or folder.loader).from_config(config))
        model, info = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, dtype=torch.float32
        )
    module: torch.nn.Module = model.eval()
    return module, frozenset(str(name) for name in info["missing_keys"])


def load_tokenizer(folder: ModelFolder) -> Any:
    """The folder's tokenizer.

    Raises:
        InputError: E0401, there is none that can be read.
    """
    package = transformers()
    try:
        if not has_vocabulary(folder.path):
            raise ValueError("no vocabulary")
        with _silent(package):
            return package.AutoTokenizer.from_pretrained(
                str(folder.path), local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            "E0401",
            "the model's folder holds no tokenizer that can be read",
            places=Place(file=str(folder.path)),
            why=str(error).strip().split("\n")[0],
            fix="add the tokenizer's files, or give `input_ids` instead of `text`",
        ) from None


_VOCABULARY = ("tokenizer.json", "tekken.json", "bpe.codes")
_BYTES = ("ByT5", "Canine", "Perceiver")


def has_vocabulary(folder: Path) -> bool:
    """Whether there are words to look up; without them transformers would build an empty tokenizer."""
    names = os.listdir(folder)
    if any(n in _VOCABULARY or n.startswith(("vocab.", "merges.")) or n.endswith((".model", ".spm")) for n in names):
        return True
    config = read_json(folder / "tokenizer_config.json", "E0414") if "tokenizer_config.json" in names else {}
    return isinstance(config, dict) and str(config.get("tokenizer_class", "")).startswith(_BYTES)


def modules_of(folder: Path, architecture: str) -> dict[str, str]:
    """The names of a model's modules, and of their classes; no weight is made.

    Args:
        folder: with the configuration.
        architecture: a class of transformers.

    Raises:
        EnvironmentFault: E0704, transformers is not installed.
        InputError: E0419, it has no such class, or cannot make it of this configuration.
    """
    package = transformers()
    kind: Any = getattr(package, architecture, None)
    try:
        if kind is None:
            raise ValueError(f"it has no class {architecture}")
        with _silent(package), torch.device("meta"):
            config = package.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            model: torch.nn.Module = kind(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise InputError(
            "E0419",
            "transformers cannot make the model",
            places=Place(file=str(folder)),
            why=str(error).strip().split("\n")[0],
        ) from None
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def skeleton(folder: ModelFolder) -> torch.nn.Module:
    """The model without weights, to know the order of its parameters."""
    package = transformers()
    with _silent(package), torch.device("meta"):
        config = package.AutoConfig.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
        model: torch.nn.Module = getattr(package, folder.loader).from_config(config)
    return model
