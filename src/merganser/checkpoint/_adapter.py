"""A model with an adapter, seen as the model that has it folded in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._adapter_config import read_adapter_config
from merganser.checkpoint._base import Checkpoint, name_of_folder
from merganser.checkpoint._file import FileCheckpoint, stamp_of
from merganser.checkpoint._files import FilePool
from merganser.checkpoint._folder import check_inside, open_file
from merganser.checkpoint._folding import Change, Matrices
from merganser.checkpoint._kinds import pickle_refused
from merganser.errors import InputError, Place, escape, suggestion

__all__ = ["AdaptedCheckpoint"]

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.default)?(\.weight)?$"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_DEPTH = 4  # parts that a name in the model may have before those in the adapter
_UNUSED = ".original_module."
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")  # layers of GPT-2 and its kin, which keep (in, out)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TIED_INPUT = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in)\.weight$")
_TIED_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|decoder\.weight)$")


class AdaptedCheckpoint(Checkpoint):
    """A model with an adapter of PEFT folded in, piece by piece while it is read.

    ``W + s B A`` with ``s = alpha / r`` (``alpha / sqrt(r)`` if rank-stabilised), LoRA (Hu et al., 2021,
    arXiv:2106.09685) on linear layers, convolutions and embeddings; DoRA (Liu et al., 2024, arXiv:2402.09353), which
    gives every row of that the norm of its magnitude; (IA)^3 (Liu et al., 2022, arXiv:2205.05638), ``l W``. Tensors
    that the adapter brings whole replace those of the model.

    What is folded has the type float32 (float64 in models of float64), so that nothing of a small change is lost
    before the models are merged; `written` tells the type of the model.

    Args:
        inner: the model.
        folder: the adapter.
        pool: open files to share with other checkpoints.

    Raises:
        InputError: the adapter is damaged, does not fit the model, or is of a kind that is not known.

    Complexity: reading an element of a folded tensor takes r multiplications; no folded tensor is in memory as a whole.
    """

    def __init__(self, inner: Checkpoint, folder: Path, pool: FilePool | None = None) -> None:
        self.label = f"{inner.label}+{folder}"
        self.folder, self.config = inner.folder, inner.config
        self._adapter = folder
        self.beside = (*inner.beside, folder)
        self._inner = inner
        self._settings = read_adapter_config(folder)
        self._factors = self._open(folder, pool)
        self._stamps = {file: stamp_of(file) for file in (self._settings.file, folder / _WEIGHTS)}
        self._sources: dict[str, tuple[Checkpoint, str]] = {name: (inner, name) for name in inner.specs()}
        self._endings = _endings(self._sources)
        self._changes: dict[str, Change] = {}
        self._matrices = Matrices(self._factors)
        parts = self._sorted_parts()
        for module, own in parts.items():
            self._fold(module, own)
        self._check_ties()
        self._specs = {name: self._spec(name) for name in self._sources}
        self.warnings = (*inner.warnings, *self._doubts())

    def _open(self, folder: Path, pool: FilePool | None) -> FileCheckpoint:
        path = folder / _WEIGHTS
        if not path.is_file():
            pickled = folder / "adapter_model.bin"
            if pickled.is_file():
                raise pickle_refused(str(pickled))
            raise InputError("E0401", f"the adapter has no {_WEIGHTS}", places=Place(file=str(folder)))
        check_inside(path, folder, path.name)
        return open_file(path, pool)

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
        before, own = self._sources.get(name, (self._inner, name))
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
        self._sources[name] = (self._factors, key)

    def _find(self, name: str) -> str | None:
        """What the model calls a tensor: it may have, or lack, the prefix of a class of models."""
        for known in (name, name.partition(".")[2]):
            if known in self._sources:
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
            close = suggestion(f"{module}.weight", self._sources)
            raise self._fault(key, f"the model has no weight of `{module}`", "E0405", close)
        checkpoint, own = self._sources[name]
        shape = checkpoint.specs()[own].shape
        if not checkpoint.specs()[own].is_float or len(shape) < 2:
            raise self._fault(key, f"`{name}` is no matrix of weights", "E0407")
        if name in self._changes:
            raise self._fault(key, f"`{name}` is changed twice")
        if ("ia3_l" in parts) != (self._settings.kind == "IA3"):
            raise self._fault(key, f"it is no part of an adapter of the kind {self._settings.kind}")
        if "ia3_l" in parts:
            self._changes[name] = self._scaled(module, name, parts, shape)
        else:
            self._changes[name] = self._product(module, parts, shape)

    def _turned(self, module: str, outputs: int, inputs: int, shape: tuple[int, ...]) -> bool:
        """Whether a layer keeps its weight as (in, out): what fits, or where both do, what its kind of layer does."""
        if len(shape) != 2 or outputs != inputs:
            return shape[:2] == (inputs, outputs) and len(shape) == 2
        family = (self.config or {}).get("model_type")
        if isinstance(family, str):
            return family in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D
        return self._settings.transposed

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
            self._changes[bias] = Change(factor=key)
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

    def _spec(self, name: str) -> BlockSpec:
        checkpoint, own = self._sources[name]
        spec = checkpoint.specs()[own]
        dtype = spec.dtype
        if name in self._changes:
            dtype = torch.promote_types(dtype, torch.float32)
        return BlockSpec(name, spec.shape, dtype, infer_role(name, spec.shape, is_float=spec.is_float))

    @property
    def _tied(self) -> bool:
        """Whether the head of a language model is its embeddings."""
        config = self.config or {}
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
        whole = {name: key for name, (c, key) in self._sources.items() if c is self._factors}
        for name, key in whole.items():
            if _TIED_INPUT.search(name) or _TIED_OUTPUT.search(name):
                found = self._factors.read(key)
                if name not in self._inner.specs() or not torch.equal(found, self._inner.read(name).to(found.dtype)):
                    raise self._fault(key, f"`{name}` is new, and in the model embeddings and head are one tensor")
                self._sources[name] = (self._inner, name)

    def _doubts(self) -> list[str]:
        """What the user should know."""
        found = []
        named = self._settings.base
        known = {self._inner.title, Path(self._inner.label).name}
        if named is not None and Path(named.partition("@")[0]).name not in known:
            found.append(
                f"{self._adapter}: the adapter says that it was trained on {escape(named)}; "
                f"it is folded into {self._inner.label}"
            )
        if self._tied and not self._settings.ties and any(_TIED_INPUT.search(name) for name in self._changes):
            found.append(f"{self._adapter}: the model's head is its embeddings, so both are changed by the adapter")
        new = sorted(name for name in self._sources if name not in self._inner.specs())
        if new:
            some = ", ".join(map(escape, new[:3])) + (", ..." if len(new) > 3 else "")
            found.append(f"{self._adapter}: {len(new)} tensors that the model does not have: {some}")
        return found

    def _fault(self, key: str, message: str, code: str = "E0409", fix: str = "") -> InputError:
        return InputError(
            code,
            f"the adapter cannot be folded: {message}",
            places=Place(file=str(self._adapter / _WEIGHTS), tensor=key),
            fix=fix or "name the model that the adapter was trained on, or export the adapter anew",
        )

    @property
    def title(self) -> str:
        """The names of the model and of the adapter."""
        return f"{self._inner.title}+{name_of_folder(self._adapter)}"

    def specs(self) -> Mapping[str, BlockSpec]:
        """All tensors by name; those that are folded in float32."""
        return self._specs

    def written(self, name: str) -> torch.dtype:
        """The type of the tensor in the model or, of one that the model does not have, in the adapter."""
        checkpoint, own = self._sources[name]
        return self._inner.written(name) if name in self._inner.specs() else checkpoint.written(own)

    def aliases(self) -> Mapping[str, str]:
        """Those of the model, as far as neither name is changed."""
        kept = {n for n, (c, _) in self._sources.items() if c is self._inner and n not in self._changes}
        return {alias: owner for alias, owner in self._inner.aliases().items() if alias in kept and owner in kept}

    def place_of(self, name: str) -> str:
        """The file that holds the tensor before it is changed."""
        if name not in self._sources:
            return self.label
        checkpoint, own = self._sources[name]
        return checkpoint.place_of(own)

    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Read elements of a tensor, with what the adapter changes."""
        if name not in self._sources:
            raise InputError(
                "E0405",
                f"the model has no tensor `{name}`",
                places=Place(file=self.label, tensor=name),
                fix=suggestion(name, self._sources),
            )
        checkpoint, own = self._sources[name]
        change = self._changes.get(name)
        if change is None or start == stop:
            checkpoint.read_range(own, start, stop, out)
            return
        spec = checkpoint.specs()[own]
        width = max(1, spec.numel // spec.shape[0])
        first, last = start // width, -(-stop // width)
        rows = checkpoint.read(own, slice(first, last)).to(out.dtype).reshape(last - first, width).numpy()
        change.apply(rows, self._matrices, first, last)
        flat = torch.from_numpy(rows.reshape(-1))
        out.copy_(flat[start - first * width : stop - first * width])

    def check_unchanged(self) -> None:
        """Check that neither the model nor the adapter was changed.

        Raises:
            InputError: E0412.
        """
        self._inner.check_unchanged()
        self._factors.check_unchanged()
        if stamp_of(self._settings.file) != self._stamps[self._settings.file]:
            raise InputError(
                "E0412",
                "the file changed while it was read",
                places=Place(file=str(self._settings.file)),
                fix="run the merge again",
            )

    def files(self) -> tuple[Path, ...]:
        """The files of the model, and configuration and weights of the adapter."""
        return (*self._inner.files(), *sorted(self._stamps)) if self._inner.files() else ()

    def named_files(self) -> dict[str, Path]:
        """Those of the model as they are; those of adapters behind a number, the first adapter's being 1."""
        number = len(self.beside)
        return self._inner.named_files() | {f"{number}/{path.name}": path for path in sorted(self._stamps)}

    def stamps(self) -> Mapping[Path, tuple[int, ...]]:
        """What was known of every file when it was opened."""
        return {**self._inner.stamps(), **self._stamps} if self._inner.stamps() else {}

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._inner.close()
        self._factors.close()


def _endings(names: Iterable[str]) -> dict[str, str]:
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
