"""A state dict as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._base import Checkpoint
from merganser.errors import InputError, Place, suggestion

__all__ = ["DictCheckpoint"]


class DictCheckpoint(Checkpoint):
    """Tensors in memory. They are read, never changed.

    Names that share one storage (tied weights) are one tensor: the first name counts, the others are `aliases`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], label: str = "state dict") -> None:
        self.label = label
        self._specs: dict[str, BlockSpec] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, str] = {}
        owners: dict[tuple[int, tuple[int, ...], tuple[int, ...], str], str] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise InputError("E0408", "the value is not a tensor", places=Place(file=label, key=str(name)))
            tensor = tensor.detach()
            if tensor.layout is not torch.strided:
                raise InputError(
                    "E0408", f"sparse tensors ({tensor.layout}) cannot be merged", places=Place(file=label, tensor=name)
                )
            owner = None
            if tensor.numel():
                identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.device))
                owner = owners.setdefault(identity, name)
            tied_to = owner if owner is not None and owner != name else None
            if tied_to is not None:
                self._aliases[name] = tied_to
            self._tensors[name] = tensor
            shape = tuple(tensor.shape)
            role = infer_role(name, shape, is_float=tensor.dtype.is_floating_point)
            self._specs[name] = BlockSpec(name, shape, tensor.dtype, role, tied_to)

    def specs(self) -> Mapping[str, BlockSpec]:
        """All tensors by name."""
        return self._specs

    def aliases(self) -> Mapping[str, str]:
        """Names that share their storage with an earlier one."""
        return self._aliases

    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy elements of the flattened tensor into `out`."""
        if name not in self._tensors:
            raise InputError(
                "E0405",
                f"the model has no tensor `{name}`",
                places=Place(file=self.label, tensor=name),
                fix=suggestion(name, self._tensors),
            )
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            tensor = self._tensors[name] = tensor.contiguous()
        out.copy_(tensor.view(-1)[start:stop])

    def place_of(self, name: str) -> str:
        """The label of the model."""
        return self.label
