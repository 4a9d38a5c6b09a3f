"""A model with an adapter, seen as the model that has it folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._adapter_config import read_adapter_config
from merganser.checkpoint._base import Checkpoint, name_of_folder
from merganser.checkpoint._file import FileCheckpoint, stamp_of
from merganser.checkpoint._files import FilePool
from merganser.checkpoint._fitting import Fitting
from merganser.checkpoint._folder import ADAPTER_WEIGHTS, check_inside, open_file
from merganser.checkpoint._folding import Matrices
from merganser.checkpoint._kinds import pickle_refused
from merganser.errors import InputError, Place, suggestion

__all__ = ["AdaptedCheckpoint"]


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
        self._stamps = {file: stamp_of(file) for file in (self._settings.file, folder / ADAPTER_WEIGHTS)}
        self._matrices = Matrices(self._factors)
        fitting = Fitting(inner, self._factors, self._settings, folder / ADAPTER_WEIGHTS)
        self._sources, self._changes = fitting.sources, fitting.changes
        self._specs = {name: self._spec(name) for name in self._sources}
        self.warnings = (*inner.warnings, *fitting.doubts())

    def _open(self, folder: Path, pool: FilePool | None) -> FileCheckpoint:
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            pickled = folder / "adapter_model.bin"
            if pickled.is_file():
                raise pickle_refused(str(pickled))
            raise InputError("E0401", f"the adapter has no {ADAPTER_WEIGHTS}", places=Place(file=str(folder)))
        check_inside(path, folder, path.name)
        return open_file(path, pool)

    def _spec(self, name: str) -> BlockSpec:
        checkpoint, own = self._sources[name]
        spec = checkpoint.specs()[own]
        dtype = spec.dtype
        if name in self._changes:
            dtype = torch.promote_types(dtype, torch.float32)
        return BlockSpec(name, spec.shape, dtype, infer_role(name, spec.shape, is_float=spec.is_float))

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
