"""A model with an adapter, seen as the model that has it folded in."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._adapter_config import read_adapter_config
from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._file import FileCheckpoint, stamp_of
from merganser.checkpoint._files import FilePool
from merganser.checkpoint._folder import check_inside, open_file
from merganser.checkpoint._kinds import pickle_refused
from merganser.errors import InputError, Place, suggestion

__all__ = ["AdaptedCheckpoint"]

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.default)?(\.weight)?$"
)
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
_KEPT = 8  # factors in memory, as float32 matrices


@dataclass(frozen=True)
class _Change:
    """What an adapter does to a tensor: ``m (W + s L R) / |W + s L R|``, without m ``W + s L R``; or ``l W``.

    Attributes:
        left: key of L and whether it is stored transposed.
        right: key of R and whether it is.
        scale: s.
        magnitude: key of m, one number per row.
        factor: key of l, one number per row or column.
        rows: whether l has one per row.
    """

    left: tuple[str, bool] = ("", False)
    right: tuple[str, bool] = ("", False)
    scale: float = 0.0
    magnitude: str | None = None
    factor: str | None = None
    rows: bool = True


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
        self._changes: dict[str, _Change] = {}
        self._matrices = _Matrices(self._factors)
        parts = self._sorted_parts()
        for module, own in parts.items():
            self._fold(module, own)
        self._specs = {name: self._spec(name) for name in self._sources}
        self.warnings = (*inner.warnings, *self._doubts())

    def _open(self, folder: Path, pool: FilePool | None) -> FileCheckpoint:
        path = folder / _WEIGHTS
        if not path.is_file():
            pickled = folder / "adapter_model.bin"
            if pickled.is_file():
                raise pickle_refused(str(pickled))
            raise InputError("E0401", f"the adapter has no {_WEIGHTS}", places=Place(file=str(folder)))
        for file in (path, self._settings.file):
            check_inside(file, folder, file.name)
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
            else:
                plain = _WRAPPED.sub("", name)
                self._sources[self._find(plain) or plain] = (self._factors, key)
        return found

    def _find(self, name: str) -> str | None:
        """What the model calls a tensor: it may have, or lack, the prefix of a class of models."""
        for known in (name, name.partition(".")[2]):
            if known in self._sources:
                return known
        longer = [known for known in self._sources if known.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None

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
        if "ia3_l" in parts:
            self._changes[name] = self._scaled(module, name, parts, shape)
        else:
            self._changes[name] = self._product(module, parts, shape)

    def _scaled(self, module: str, name: str, parts: Mapping[str, str], shape: tuple[int, ...]) -> _Change:
        key = parts["ia3_l"]
        vector = self._factors.specs()[key].shape
        given = tuple(size for size in vector if size != 1) or (1,)
        transposed = self._settings.transposed
        outputs, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        by_output = vector[0] != 1 or outputs == 1
        if len(parts) > 1 or len(shape) != 2 or given != ((outputs if by_output else inputs),):
            raise self._fault(key, f"it does not fit {list(shape)}, the shape of `{name}`", "E0407")
        bias = self._find(f"{module}.bias") if by_output else None
        if bias is not None:
            self._changes[bias] = _Change(factor=key)
        return _Change(factor=key, rows=by_output != transposed)

    def _product(self, module: str, parts: Mapping[str, str], shape: tuple[int, ...]) -> _Change:
        embedding = any(part.startswith("lora_embedding") for part in parts)
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        key = next(iter(parts.values()))
        for part in (first, second):
            if part not in parts:
                raise self._fault(key, f"`{module}` has no {part}", "E0405")
        a, b = (self._factors.specs()[parts[part]].shape for part in (first, second))
        rank = a[0] if a else 0
        turned = embedding or self._settings.transposed
        rows, columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        sizes = ((rank, rows), (columns, rank)) if turned else ((rank, columns), (rows, rank))
        flat = tuple((s[0], int(np.prod(s[1:], dtype=np.int64))) if s else () for s in (a, b))
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
        return _Change(
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

    def _doubts(self) -> list[str]:
        """What the user should know."""
        found = []
        named = self._settings.base
        if named is not None and Path(named).name not in {self._inner.title, Path(self._inner.label).name}:
            found.append(
                f"{self._adapter}: the adapter says that it was trained on {named}; "
                f"it is folded into {self._inner.label}"
            )
        new = sorted(name for name in self._sources if name not in self._inner.specs())
        if new:
            some = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
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
        return f"{self._inner.title}+{self._adapter.resolve().name}"

    def specs(self) -> Mapping[str, BlockSpec]:
        """All tensors by name; those that are folded in float32."""
        return self._specs

    def written(self, name: str) -> torch.dtype:
        """The type of the tensor in the model or, of one that the adapter brings, there."""
        checkpoint, own = self._sources[name]
        return checkpoint.written(own)

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
        if change.factor is not None:
            factor = self._matrices.get(change.factor, flat=True).astype(rows.dtype, copy=False)
            rows *= factor[first:last, None] if change.rows else factor
        else:
            self._add_product(rows, change, first, last)
        flat = torch.from_numpy(rows.reshape(-1))
        out.copy_(flat[start - first * width : stop - first * width])

    def _add_product(self, rows: np.ndarray[Any, Any], change: _Change, first: int, last: int) -> None:
        """Add ``s L R``, one rank at a time, so that the bits do not depend on how many rows are read."""
        left = self._matrices.get(*change.left)[first:last].astype(rows.dtype)
        right = self._matrices.get(*change.right)
        product, total = np.empty_like(rows), np.zeros_like(rows)
        for index in range(left.shape[1]):
            np.multiply(left[:, index, None], right[index], out=product)
            total += product
        total *= rows.dtype.type(change.scale)
        rows += total
        if change.magnitude is not None:
            magnitude = self._matrices.get(change.magnitude, flat=True)[first:last].astype(rows.dtype)
            norms = np.sqrt(np.add.reduce(np.square(rows, dtype=np.float64), axis=1))
            with np.errstate(divide="ignore", invalid="ignore"):  # of a row of zeros; NaN is refused later
                rows *= (magnitude / norms).astype(rows.dtype)[:, None]

    def check_unchanged(self) -> None:
        """Check that neither the model nor the adapter was changed.

        Raises:
            InputError: E0412.
        """
        self._inner.check_unchanged()
        self._factors.check_unchanged()

    def files(self) -> tuple[Path, ...]:
        """The files of the model, and configuration and weights of the adapter."""
        return (*self._inner.files(), *sorted(self._stamps)) if self._inner.files() else ()

    def stamps(self) -> Mapping[Path, tuple[int, ...]]:
        """What was known of every file when it was opened."""
        return {**self._inner.stamps(), **self._stamps} if self._inner.stamps() else {}

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._inner.close()
        self._factors.close()


class _Matrices:
    """The last few factors that were read, as matrices of float32; safe to share between threads."""

    def __init__(self, factors: Checkpoint) -> None:
        self._factors = factors
        self._kept: OrderedDict[tuple[str, bool, bool], np.ndarray[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, turned: bool = False, *, flat: bool = False) -> np.ndarray[Any, Any]:
        """A factor: rows as they are and all the rest as columns, transposed, or as a vector."""
        wanted = (key, turned, flat)
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
                return self._kept[wanted]
        tensor = self._factors.read(key)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
        found = wide.reshape(-1) if flat else wide.reshape(len(wide), -1)
        found = np.ascontiguousarray(found.T) if turned else found
        with self._lock:
            self._kept[wanted] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found
