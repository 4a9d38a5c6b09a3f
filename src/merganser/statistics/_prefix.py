"""What the settled blocks of a model return for each batch, so that later passes need not run them again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from merganser._torch import torch

__all__ = ["Kept", "Level", "Prefix"]

Level = tuple[tuple[int, int], ...]
"""For each stack that is cut short, its number and the last of its blocks that does not run."""


class _OpaqueError(TypeError):
    """A block returned something that holds no tensors that can be copied."""


@dataclass
class _Stack:
    """A list of modules that run one after the other, such as the layers of a transformer.

    Attributes:
        blocks: the modules.
        open: for each of them the weights inside that are not settled.
    """

    blocks: tuple[torch.nn.Module, ...]
    open: list[set[str]]

    def settled(self) -> int:
        """How many blocks, from the first on, have no open weight."""
        return next((index for index, names in enumerate(self.open) if names), len(self.open))


@dataclass
class Kept:
    """What was kept of a batch: for each stack the last block that did not have to run, and what it returned."""

    outputs: dict[int, tuple[int, Any]] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """See `Level`."""
        return tuple(sorted((stack, last) for stack, (last, _) in self.outputs.items()))


class Prefix:
    """Passes through a model that leave out its settled blocks.

    In a pass the blocks of a stack up to the last settled one return what that one returned for the batch before; what
    lies between the stacks runs as always. Only the output of that one is kept, so this is right for models whose
    blocks read nothing but the block before; `Prefix` does not know whether a model is one, its user has to check.

    Args:
        model: the model.
        paths: for each weight the paths of the modules that it belongs to.
        room: bytes for what is kept; the passes of batches for which there is no room left run everything.

    Attributes:
        room: the bytes that are left.
    """

    def __init__(self, model: torch.nn.Module, paths: Mapping[str, Collection[str]], room: int) -> None:
        self._stacks = list(_stacks(model, paths))
        self._kept: dict[int, Kept] = {}
        self.room = room
        self._full = [list(map(set, stack.open)) for stack in self._stacks]

    def restart(self) -> None:
        """Nothing is settled."""
        for stack, names in zip(self._stacks, self._full, strict=True):
            stack.open = list(map(set, names))
        self._release()

    def settle(self, names: Iterable[str]) -> None:
        """Some weights do not change any more."""
        settled = set(names)
        for stack in self._stacks:
            for own in stack.open:
                own.difference_update(settled)

    def abandon(self) -> None:
        """Run everything from now on."""
        self._stacks, self._full = [], []
        self._release()

    def level(self, key: int) -> Level:
        """What the next pass of a batch leaves out; empty for nothing."""
        return self._kept[key].level if key in self._kept else ()

    def short(self, key: int) -> contextlib.AbstractContextManager[None]:
        """For the time of the block passes leave out what they can, and keep what later ones can leave out.

        Args:
            key: of the batch.
        """
        return self.shortened(self._kept.setdefault(key, Kept()))

    def adopt(self, key: int, other: Prefix) -> None:
        """Keep of a batch what another model's blocks have returned, which are equal as far as they are settled."""
        kept = other._kept.get(key, Kept())
        size = sum(kept.nbytes.values())
        if self._stacks and key not in self._kept and size <= self.room:
            self.room -= size
            self._kept[key] = Kept(dict(kept.outputs), dict(kept.nbytes))

    @contextlib.contextmanager
    def shortened(self, kept: Kept) -> Iterator[None]:
        """The same with what the caller keeps of a batch."""
        with contextlib.ExitStack() as undo:
            for number, stack in enumerate(self._stacks):
                last, output = kept.outputs.get(number, (-1, None))
                for block in stack.blocks[: last + 1]:
                    undo.enter_context(_replaced(block, partial(_copied, output)))
                for index in range(last + 1, stack.settled()):
                    hook = partial(self._keep, kept, number, index)
                    undo.callback(stack.blocks[index].register_forward_hook(hook).remove)
            yield

    def _keep(self, kept: Kept, stack: int, index: int, module: Any, args: Any, output: Any) -> None:
        with contextlib.suppress(_OpaqueError):
            size = _nbytes(output)
            more = size - kept.nbytes.get(stack, 0)
            if more <= self.room:
                self.room -= more
                kept.outputs[stack], kept.nbytes[stack] = (index, _copied(output)), size

    def _release(self) -> None:
        self.room += sum(sum(kept.nbytes.values()) for kept in self._kept.values())
        self._kept = {}


def _stacks(model: torch.nn.Module, paths: Mapping[str, Collection[str]]) -> Iterator[_Stack]:
    """The outermost lists of modules on the paths."""
    found: dict[str, dict[str, set[int]]] = {}
    modules = dict(model.named_modules())
    for name, own in paths.items():
        for path in own:
            parts = path.split(".")
            for depth in range(len(parts)):
                parent = ".".join(parts[:depth])
                if isinstance(modules.get(parent), torch.nn.ModuleList | torch.nn.Sequential):
                    index = list(modules[parent]._modules).index(parts[depth])
                    found.setdefault(parent, {}).setdefault(name, set()).add(index)
                    break
    for parent, names in found.items():
        blocks = tuple(modules[parent].children())
        if len(blocks) == len(modules[parent]._modules):  # no module stands there twice
            yield _Stack(blocks, [{name for name, own in names.items() if i in own} for i in range(len(blocks))])


@contextlib.contextmanager
def _replaced(block: torch.nn.Module, result: Callable[[], Any]) -> Iterator[None]:
    """A module that returns something instead of running."""
    own = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *args, **kwargs: result()
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own


def _copied(value: Any) -> Any:
    """The same with copies of the tensors: a model may change in place what a block returns."""
    return _mapped(value, lambda tensor: tensor.detach().clone())


def _nbytes(value: Any) -> int:
    sizes: list[int] = []
    _mapped(value, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


def _mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Tensors, nested in tuples, lists and dictionaries.

    Raises:
        _OpaqueError: there is something else.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, list):
        return type(value)(_mapped(inner, function) for inner in value)
    if type(value) is dict:
        return {key: _mapped(inner, function) for key, inner in value.items()}
    raise _OpaqueError
