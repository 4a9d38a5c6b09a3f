"""Hooks on a model: what every layer is called with, and the gradient that comes back to its output."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from merganser._torch import torch
from merganser.statistics._batch import Tokens
from merganser.statistics._layers import Layer

__all__ = ["Call", "Identity", "Quiet", "Tape", "identity"]

Identity = tuple[Any, ...]


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: the layer.
        x: its input, detached.
        extra: the other arguments, and the keyword arguments.
        version: how often the input had been modified in place.
        rows: the indices of its real rows; None if all are.
        examples: whether the first dimension of input and output holds the examples.
    """

    layer: Layer
    x: torch.Tensor
    extra: tuple[tuple[Any, ...], dict[str, Any]]
    version: int
    rows: torch.Tensor | None = None
    examples: bool = False


def version_of(x: torch.Tensor) -> int:
    """How often a tensor was modified in place."""
    return 0 if x.is_inference() else x._version


def identity(layer: Layer, x: torch.Tensor) -> Identity:
    """Equal for two layers exactly if they read the same activation in the same way (while it lives)."""
    return (*layer.key(), x.data_ptr(), tuple(x.shape), x.stride(), version_of(x))


class Tape:
    """Watches layers for the time of a ``with`` block.

    Outputs through which no gradient would flow are made to depend on a scalar `root`, so that a backward pass to it
    visits every output although all weights are frozen, and computes no gradient of a weight.

    Args:
        model: the model, to find encoder and decoder of sequence-to-sequence models.
        layers: what to watch.
        on_call: called in the forward pass.
        on_gradient: called in the backward pass with the gradient of the output; None if there will be none.
        watched: the layers whose gradients are wanted.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[Layer],
        on_call: Callable[[Call], None],
        on_gradient: Callable[[Call, torch.Tensor], None] | None = None,
        watched: Iterable[Layer] = (),
    ) -> None:
        self._layers = tuple(layers)
        self._on_call = on_call
        self._on_gradient = on_gradient
        self._watched = {id(layer) for layer in watched}
        self._handles: list[Any] = []
        self._decoder: Any = None
        self._sides: Mapping[int, str] = {}
        self._find_sides(model)
        self.tokens = Tokens(None, None)
        self.size = 0
        self.root: torch.Tensor | None = None
        self.paused = False

    def _find_sides(self, model: Any) -> None:
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return
        encoder: Any = model.get_encoder() if hasattr(model, "get_encoder") else None
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
        self._sides = {id(m): "encoder" if id(m) in inside else "decoder" for m in model.modules()}

    def start(self, tokens: Tokens, size: int) -> None:
        """A new forward pass of a batch of `size` examples begins."""
        self.tokens = tokens
        self.size = size
        self.root = torch.zeros((), requires_grad=True) if self._on_gradient is not None else None

    def __enter__(self) -> Tape:
        try:
            if self._decoder is not None:
                hook = self._decoder.register_forward_pre_hook(self._keep_states, with_kwargs=True)
                self._handles.append(hook)
            for layer in self._layers:
                hook = layer.module.register_forward_hook(partial(self._forward, layer), with_kwargs=True)
                self._handles.append(hook)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.root = None

    def _keep_states(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens.states = kwargs.get("encoder_hidden_states")

    def _forward(
        self, layer: Layer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        if self.paused or not isinstance(output, torch.Tensor):
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs.get("input"), ())
        if not isinstance(x, torch.Tensor):
            return None
        watched = self._on_gradient is not None and id(layer) in self._watched
        shared = layer.one_hot and x.dim() == 2 and len(x) == 1 != self.size
        if shared:  # one row of indices for all examples, such as positions
            x = x.expand(self.size, -1)
            output = output.expand(self.size, *output.shape[1:])
        call = Call(layer, x.detach(), (rest, dict(kwargs)), version_of(x))
        leading = layer.leading(x) if layer.linear else None
        if leading is not None:
            call.rows = self.tokens.rows(self._sides.get(id(module)), x, leading)
        call.examples = bool(x.dim() and output.dim() and len(x) == self.size == len(output))
        self._on_call(call)
        if not watched:
            return None
        assert self._on_gradient is not None
        assert self.root is not None
        if not output.requires_grad:
            output = output + self.root.to(output.device)
        assert isinstance(output, torch.Tensor)
        hooked: Any = output  # register_hook has no types
        hooked.register_hook(partial(self._on_gradient, call))
        return output

    def backward(self, loss: torch.Tensor, *, again: bool) -> None:
        """Run the backward pass of a scalar.

        Args:
            loss: the sum of the examples' losses.
            again: whether another pass through the same graph follows.
        """
        assert self.root is not None
        if loss.requires_grad:
            torch.autograd.grad(loss, self.root, retain_graph=again, allow_unused=True)


class Quiet:
    """The model in evaluation mode with frozen weights; both are put back at the end of the ``with`` block."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modes: list[tuple[torch.nn.Module, bool]] = []
        self._frozen: list[torch.nn.Parameter] = []

    def __enter__(self) -> Quiet:
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._frozen = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for module, _ in self._modes:
            module.training = False
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for module, mode in self._modes:
            module.training = mode
        for parameter in self._frozen:
            parameter.requires_grad_(True)
