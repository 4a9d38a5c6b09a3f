"""A batch: what the model is called with, its labels, its examples, and which of its tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, Place, UsageError

__all__ = ["Batch", "Caller", "Tokens"]


@dataclass
class Batch:
    """Examples in the first dimension of every tensor.

    Attributes:
        given: the batch as it came, on the model's device; a user's loss gets it.
        args: positional arguments of the model.
        kwargs: keyword arguments, without the labels.
        labels: the labels, if any.
        size: the number of examples.
        number: the batch's number, from 0.
        start: the number of its first example in the whole data.
        names: what messages call the examples (line numbers of a data file).
    """

    given: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    size: int
    number: int = 0
    start: int = 0
    names: tuple[str, ...] = ()

    @staticmethod
    def of(given: Any, device: torch.device, *, number: int = 0, start: int = 0) -> Batch:
        """Read a batch: a mapping of keyword arguments, a tensor, or a pair (input, labels).

        Raises:
            InputError: E0415, it is none of these, or its tensors have different numbers of examples.
        """
        names: tuple[str, ...] = ()
        if isinstance(given, Mapping):
            given = dict(given)
            names = tuple(given.pop("__names__", ()))
        given = _moved(given, device)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        labels: Any = None
        inner = given
        if isinstance(given, list | tuple) and len(given) == 2:
            inner, labels = given
        if isinstance(inner, Mapping):
            kwargs = dict(inner)
            labels = kwargs.pop("labels", labels)
        elif isinstance(inner, torch.Tensor):
            args = (inner,)
        else:
            raise _bad(number, f"a batch is a mapping of the model's arguments or a tensor, not {type(given).__name__}")
        sizes = {key: len(value) for key, value in kwargs.items() if isinstance(value, torch.Tensor) and value.dim()}
        if args and args[0].dim():
            sizes["input"] = len(args[0])
        if labels is not None and not isinstance(labels, torch.Tensor):
            labels = torch.as_tensor(labels, device=device)
        if not sizes:
            raise _bad(number, "the batch holds no tensor")
        first = next((sizes[k] for k in ("input_ids", "inputs_embeds", "pixel_values", "input") if k in sizes), None)
        size = next(iter(sizes.values())) if first is None else first
        if labels is not None and (not labels.dim() or len(labels) != size):
            raise _bad(number, f"there are {size} examples and {len(labels) if labels.dim() else 1} labels")
        return Batch(given, args, kwargs, labels, size, number, start, names)

    def only(self, index: int) -> Batch:
        """One example, as a batch of its own."""

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == self.size:
                return value[index : index + 1]
            if isinstance(value, Mapping):
                return {key: cut(inner) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(cut(inner) for inner in value)
            return value

        return Batch(
            cut(self.given),
            cut(self.args),
            cut(self.kwargs),
            cut(self.labels),
            1,
            self.number,
            self.start + index,
            self.names[index : index + 1],
        )

    def name(self, index: int) -> str:
        """What to call an example."""
        if self.names:
            return self.names[index]
        return f"batch {self.number}, example {index} (number {self.start + index} of the data)"

    def place(self) -> Place:
        """The batch, for messages."""
        if self.names:
            last = self.names[-1]
            return Place(found=f"batch {self.number}: {self.names[0]}" + (f" to {last}" if self.size > 1 else ""))
        return Place(found=f"batch {self.number}, examples {self.start} to {self.start + self.size - 1}")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor | Mapping) for v in value):
        return [_moved(inner, device) for inner in value]
    return value


def _bad(number: int, message: str) -> InputError:
    return InputError("E0415", message, places=Place(found=f"batch {number}"))


class Caller:
    """Calls a model with a batch: keeps the labels from it where it can do without, so that it computes no loss."""

    def __init__(self, model: torch.nn.Module, *, own_loss: bool) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        needs = "labels" in parameters and parameters["labels"].default is inspect.Parameter.empty
        self._labels = needs or (own_loss and "labels" in self._takes)
        self._own_loss = own_loss
        config = getattr(model, "config", None)
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._no_cache = "use_cache" in self._takes and bool(getattr(config, "use_cache", False))

    def __call__(self, batch: Batch) -> Any:
        """The model's output."""
        kwargs = dict(batch.kwargs)
        pass_labels = self._labels
        if self.encoder_decoder and batch.labels is not None and "decoder_input_ids" not in kwargs:
            shift: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shift is not None and batch.labels.dim() == 2 and "decoder_input_ids" in self._takes:
                kwargs["decoder_input_ids"] = shift(labels=batch.labels)
            else:
                pass_labels = pass_labels or "labels" in self._takes
        if pass_labels and batch.labels is not None:
            kwargs["labels"] = batch.labels
        if self._no_cache:
            kwargs.setdefault("use_cache", False)
        if not self._open:
            odd = sorted(key for key in kwargs if key not in self._takes)
            if odd and self._own_loss:
                kwargs = {key: value for key, value in kwargs.items() if key not in odd}
            elif odd:
                raise UsageError("E0201", f"the model takes no argument `{odd[0]}`", places=batch.place())
        return self.model(*batch.args, **kwargs)


@dataclass
class Tokens:
    """Which rows of an activation are real tokens.

    An activation of shape ``(examples, positions, ...)`` (or flattened to ``(examples x positions, d)``) is matched
    with the mask of that shape. In encoder-decoder models the encoder's layers, and the layers of the decoder that read
    the encoder's output, use the encoder's mask; the others that of the decoder.
    """

    encoder: torch.Tensor | None
    decoder: torch.Tensor | None
    states: Any = None
    _rows: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch) -> Tokens:
        """The masks of a batch: ``attention_mask``, ``decoder_attention_mask``, or labels that are not -100."""

        def mask(name: str) -> torch.Tensor | None:
            value = batch.kwargs.get(name)
            return value != 0 if isinstance(value, torch.Tensor) and value.dim() == 2 else None

        decoder = mask("decoder_attention_mask")
        if decoder is None and batch.labels is not None and batch.labels.dim() == 2:
            decoder = batch.labels != -100
        return Tokens(mask("attention_mask"), decoder)

    def rows(self, side: str | None, x: torch.Tensor, leading: tuple[int, ...]) -> torch.Tensor | None:
        """The indices of the real rows among the flattened leading dimensions; None if all are.

        Args:
            side: ``"encoder"``, ``"decoder"`` or None for other models.
            x: the layer's input.
            leading: its dimensions but the last.
        """
        own_side = side == "decoder" and not self._is_states(x)
        for mask in (self.decoder, self.encoder) if own_side else (self.encoder,):
            if mask is None:
                continue
            flat = (mask.numel(),)
            if leading[:2] == tuple(mask.shape) or leading == flat:
                inner = 1
                for n in leading[2:]:
                    inner *= n
                return self._indices(mask, inner)
        return None

    def _is_states(self, x: torch.Tensor) -> bool:
        return isinstance(self.states, torch.Tensor) and (
            x is self.states or (x.data_ptr() == self.states.data_ptr() and x.shape == self.states.shape)
        )

    def _indices(self, mask: torch.Tensor, inner: int) -> torch.Tensor | None:
        key = (id(mask), inner)
        if key not in self._rows:
            flat = mask.reshape(-1)
            if inner > 1:
                flat = flat.repeat_interleave(inner)
            self._rows[key] = None if bool(flat.all()) else flat.nonzero().squeeze(1)
        return self._rows[key]
