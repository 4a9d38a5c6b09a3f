"""Which tensors of a model an adapter changes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint._adapter_config import AdapterConfig
from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._folding import Change
from merganser.errors import InputError, Place, escape, suggestion

__all__ = ["CONV1D_LAYERS", "Fitting", "keeps_transposed", "unique_endings"]

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.default)?(\.weight)?$"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_DEPTH = 4  # parts that a name in the model may have before those in the adapter
_UNUSED = ".original_module."
CONV1D_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")  # layers of GPT-2 and its kin, which keep (in, out)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TIED_INPUT = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in)\.weight$")
_TIED_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|decoder\.weight)$")


def keeps_transposed(config: Mapping[str, Any] | None, module: str) -> bool | None:
    """Whether a layer of a model keeps its weight as (in, out); None if its configuration does not tell.

    Args:
        config: of the model.
        module: the layer.
    """
    family = (config or {}).get("model_type")
    if not isinstance(family, str):
        return None
    return family in _CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LAYERS


class Fitting:
    """The tensors of an adapter, assigned to those of a model.

    Args:
        inner: the model.
        factors: the weights of the adapter.
        settings: its configuration.
        file: where the weights are.

    Attributes:
        sources: where every tensor of the model with the adapter is read, and what it is called there.
        changes: of those tensors that factors change.

    Raises:
        InputError: the adapter does not fit the model, or is of a kind that is not known.
    """

    def __init__(self, inner: Checkpoint, factors: Checkpoint, settings: AdapterConfig, file: Path) -> None:
        self._inner, self._factors, self._settings = inner, factors, settings
        self._file = file
        self.sources: dict[str, tuple[Checkpoint, str]] = {name: (inner, name) for name in inner.specs()}
        self.changes: dict[str, Change] = {}
        self._endings = unique_endings(self.sources)
        for module, parts in self._sorted_parts().items():
            self._fold(module, parts)
        self._check_ties()

    def _sorted_parts(self) -> dict[str, dict[str, str]]:
        """The keys of the factors by module and part; what is no factor becomes a source of its own."""
        found: dict[str, dict[str, str]] = {}
        for key in self._factors.specs():
            name = key.removeprefix(_PREFIX)
            match = _KEY.match(name)
            if match:
                own = found.setdefault(match["module"], {})
                if match["part"] in own:
                    raise self._fault(key, "there are two of these tensors")
                own[match["part"]] = key
            elif ".lora_" in name or ".ia3_" in name:
                raise self._fault(key, "it is of a kind of factor that is not known")
            elif _UNUSED not in f".{name}":
                self._replace(key, _WRAPPED.sub("", name))
        return found

    def _replace(self, key: str, plain: str) -> None:
        """Take a tensor that the adapter brings whole.

        Raises:
            InputError: E0407, it has another shape than that of the model; E0409, it comes twice, with other values.
        """
        name = self._find(plain) or plain
        before, own = self.sources.get(name, (self._inner, name))
        if before is self._factors:
            if torch.equal(before.read(own), before.read(key)):
                return
            raise self._fault(key, f"`{name}` comes twice, with other values")
        known = self._inner.specs().get(own)
        shape = self._factors.specs()[key].shape
        if known is not None and known.shape != shape:
            raise self._fault(
                key,
                f"`{name}` has the shape {list(shape)}, and {list(known.shape)} in the model",
                "E0407",
                "give the model the adapter's vocabulary first, and name that model",
            )
        self.sources[name] = (self._factors, key)

    def _find(self, name: str) -> str | None:
        """What the model calls a tensor: it may have, or lack, the prefix of a class of models."""
        for known in (name, name.partition(".")[2]):
            if known in self.sources:
                return known
        return self._endings.get(name)

    def _fold(self, module: str, parts: Mapping[str, str]) -> None:
        """Note what the factors of a module change.

        Raises:
            InputError: E0405, there is no such tensor, or one of the two factors is missing; E0407, a shape is wrong.
        """
        key = next(iter(parts.values()))
        name = self._find(f"{module}.weight")
        if name is None:
            close = suggestion(f"{module}.weight", self.sources)
            raise self._fault(key, f"the model has no weight of `{module}`", "E0405", close)
        checkpoint, own = self.sources[name]
        shape = checkpoint.specs()[own].shape
        if not checkpoint.specs()[own].is_float or len(shape) < 2:
            raise self._fault(key, f"`{name}` is no matrix of weights", "E0407")
        if name in self.changes:
            raise self._fault(key, f"`{name}` is changed twice")
        if ("ia3_l" in parts) != (self._settings.kind == "IA3"):
            raise self._fault(key, f"it is no part of an adapter of the kind {self._settings.kind}")
        if "ia3_l" in parts:
            self.changes[name] = self._scaled(module, name, parts, shape)
        else:
            self.changes[name] = self._product(module, parts, shape)

    def _turned(self, module: str, outputs: int, inputs: int, shape: tuple[int, ...]) -> bool:
        """Whether a layer keeps its weight as (in, out): what fits, or where both do, what its kind of layer does."""
        if len(shape) != 2 or outputs != inputs:
            return shape[:2] == (inputs, outputs) and len(shape) == 2
        known = keeps_transposed(self._inner.config, module)
        return self._settings.transposed if known is None else known

    def _scaled(self, module: str, name: str, parts: Mapping[str, str], shape: tuple[int, ...]) -> Change:
        key = parts["ia3_l"]
        vector = self._factors.specs()[key].shape
        if len(parts) > 1 or len(shape) != 2 or len(vector) != 2 or min(vector) != 1 or max(vector) not in shape:
            raise self._fault(key, f"{list(vector)} does not fit {list(shape)}, the shape of `{name}`", "E0407")
        by_output = vector[1] == 1
        first = (max(vector), shape[1] if shape[0] == max(vector) else shape[0])
        transposed = self._turned(module, *(first if by_output else first[::-1]), shape)
        bias = self._find(f"{module}.bias") if by_output else None
        if bias is not None:
            self.changes[bias] = Change(factor=key)
        return Change(factor=key, rows=by_output != transposed)

    def _product(self, module: str, parts: Mapping[str, str], shape: tuple[int, ...]) -> Change:
        embedding = any(part.startswith("lora_embedding") for part in parts)
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        key = next(iter(parts.values()))
        for part in (first, second):
            if part not in parts:
                raise self._fault(key, f"`{module}` has no {part}", "E0405")
        a, b = (self._factors.specs()[parts[part]].shape for part in (first, second))
        rank = a[0] if a else 0
        turned = embedding or (len(a) == len(b) == 2 and self._turned(module, b[0], a[1], shape))
        rows, columns = shape[0], math.prod(shape[1:])
        sizes = ((rank, rows), (columns, rank)) if turned else ((rank, columns), (rows, rank))
        flat = tuple((s[0], math.prod(s[1:])) if s else () for s in (a, b))
        fits = len(a) == len(b) and (len(a) == 2 or (len(a) == len(shape) and a[1:] == shape[1:] and set(b[2:]) == {1}))
        if rank < 1 or flat != sizes or not fits:
            raise self._fault(
                key, f"factors of {list(a)} and {list(b)} do not fit {list(shape)}, the shape of the weight", "E0407"
            )
        if rank != self._settings.rank_of(module):
            raise self._fault(key, f"the rank of `{module}` is {rank}, and the configuration says otherwise", "E0407")
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != self._settings.weight_decomposed:
            raise self._fault(key, f"DoRA, and `{module}` has {'a' if magnitude else 'no'} magnitude vector", "E0405")
        if magnitude is not None and (turned or len(shape) != 2 or self._factors.specs()[magnitude].shape != (rows,)):
            raise self._fault(magnitude, f"DoRA of a weight of the shape {list(shape)} is not folded", "E0407")
        left, right = (first, second) if turned else (second, first)
        return Change(
            left=(parts[left], turned),
            right=(parts[right], turned),
            scale=self._settings.scale_of(module, rank),
            magnitude=magnitude,
        )

    @property
    def _tied(self) -> bool:
        """Whether the head of a language model is its embeddings."""
        config = self._inner.config or {}
        listed = config.get("architectures")
        kinds = listed if isinstance(listed, list) else []
        writes = any(str(kind).endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for kind in kinds)
        alone = not any(_TIED_OUTPUT.search(name) for name in self._inner.specs())
        return bool(config.get("tie_word_embeddings", alone)) and writes

    def _check_ties(self) -> None:
        """Refuse new values for one of two tensors that the model keeps as one.

        Raises:
            InputError: E0409.
        """
        if not self._tied or self._settings.ties:
            return
        whole = {name: key for name, (c, key) in self.sources.items() if c is self._factors}
        for name, key in whole.items():
            if _TIED_INPUT.search(name) or _TIED_OUTPUT.search(name):
                found = self._factors.read(key)
                if name not in self._inner.specs() or not torch.equal(found, self._inner.read(name).to(found.dtype)):
                    raise self._fault(key, f"`{name}` is new, and in the model embeddings and head are one tensor")
                self.sources[name] = (self._inner, name)

    def doubts(self) -> list[str]:
        """What the user should know."""
        found = []
        named = self._settings.base
        known = {self._inner.title, Path(self._inner.label).name}
        if named is not None and Path(named.partition("@")[0]).name not in known:
            found.append(
                f"{self._file.parent}: the adapter says that it was trained on {escape(named)}; "
                f"it is folded into {self._inner.label}"
            )
        if self._tied and not self._settings.ties and any(_TIED_INPUT.search(name) for name in self.changes):
            found.append(f"{self._file.parent}: the model's head is its embeddings, so both are changed by the adapter")
        new = sorted(name for name in self.sources if name not in self._inner.specs())
        if new:
            some = ", ".join(map(escape, new[:3])) + (", ..." if len(new) > 3 else "")
            found.append(f"{self._file.parent}: {len(new)} tensors that the model does not have: {some}")
        return found

    def _fault(self, key: str, message: str, code: str = "E0409", fix: str = "") -> InputError:
        return InputError(
            code,
            f"the adapter cannot be folded: {message}",
            places=Place(file=str(self._file), tensor=key),
            fix=fix or "name the model that the adapter was trained on, or export the adapter anew",
        )


def unique_endings(names: Iterable[str]) -> dict[str, str]:
    """Names by their endings from a dot on, as far as no other name ends so."""
    found: dict[str, str] = {}
    twice = set()
    for name in names:
        ending = name
        for _ in range(_DEPTH):
            ending = ending.partition(".")[2]
            if ending and found.setdefault(ending, name) != name:
                twice.add(ending)
    return {ending: name for ending, name in found.items() if ending not in twice}
