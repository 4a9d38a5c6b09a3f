"""The linear layers of a model in the order in which an input reaches them, and what reaches them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError
from merganser.statistics._batch import Batch, Caller, Tokens
from merganser.statistics._layers import Layer
from merganser.statistics._layout import find_layers
from merganser.statistics._prefix import Level, Prefix
from merganser.statistics._settings import accumulator
from merganser.statistics._tape import Call, Identity, Quiet, Tape, identity

__all__ = ["LayerWalk"]


class _ReachedError(Exception):
    """Everything that was asked for has been seen; the rest of the forward pass is of no use."""


class LayerWalk:
    """The linear layers of a model (Linear, Conv1D, Conv2d) as matrices ``[out, in]``, and the inputs that reach them.

    A weight that is also an embedding (a tied head) is not among them. Only real tokens count.

    A pass leaves out the blocks (of a list of modules) whose weights are all settled, as far as memory allows, so that
    passes to one layer after the other cost O(layers) and not O(layers^2). Whether the model allows that is checked:
    before the first pass to some weights that leaves something out, one of a single example is compared with a whole
    one, bit for bit.

    Args:
        model: the model; its mode is put back after each pass, its weights change only by `put`.
        room: bytes for the outputs of settled blocks.

    Attributes:
        order: the names of the weights in the order in which the first pass reached them; empty before `explore`.
        dtype: of sums over tokens: the wider of float32 and the model's type.
    """

    def __init__(self, model: torch.nn.Module, room: int = 0) -> None:
        layers, names, _ = find_layers(model)
        embeddings = {id(layer.weight) for layer in layers if layer.one_hot}
        self._model = model
        self._call = Caller(model, own_loss=False)
        self._layers: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.linear and id(layer.weight) not in embeddings:
                self._layers.setdefault(names[id(layer)], []).append(layer)
        self._names = names
        self._calls: dict[str, list[Identity]] = {}
        paths = {name: [layer.path for layer in own] for name, own in self._layers.items()}
        self._prefix = Prefix(model, paths, room)
        self._trusted: set[tuple[Level, tuple[str, ...]]] = set()
        self._example: Batch | None = None
        self.dtype = accumulator(None, model)

    @property
    def order(self) -> tuple[str, ...]:
        """See the class."""
        return tuple(self._calls)

    def batches(self, data: Iterable[Any]) -> list[Batch]:
        """The data as batches on the model's device.

        Raises:
            InputError: E0415, a batch is of no known form; E0417, there is none.
        """
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        found, start = [], 0
        for number, given in enumerate(data):
            batch = Batch.of(given, device, number=number, start=start)
            start += batch.size
            if batch.size:
                found.append(batch)
        if not found:
            raise InputError("E0417", "the data hold no example")
        return found

    def explore(self, batch: Batch) -> None:
        """Learn from one example in which order the layers are reached, how often, and which share their input."""
        alive: list[torch.Tensor] = []  # so that no other activation gets the address of one

        def on_call(call: Call) -> None:
            alive.append(call.x)
            self._calls.setdefault(self._names[id(call.layer)], []).append(identity(call.layer, call.x))

        self._run(batch.only(0), self._layers, on_call)

    def groups(self) -> list[tuple[str, ...]]:
        """The weights in the order of `order`; those that read the same activation (query, key, value) together."""
        found: dict[tuple[Identity, ...], list[str]] = {}
        for name, calls in self._calls.items():
            found.setdefault(tuple(calls), []).append(name)
        return [tuple(names) for names in found.values()]

    def restart(self) -> None:
        """All weights that a pass reaches may change."""
        self._prefix.restart()
        self.settle(self._layers.keys() - self._calls.keys())

    def settle(self, names: Iterable[str]) -> None:
        """Some weights, and what is before them, change no more."""
        self._prefix.settle(names)

    def inputs(self, batch: Batch, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The rows that each weight multiplies, ``(tokens, in)``; weights that share their input share the rows.

        The pass ends with the last call of the last of them.
        """
        case = self._prefix.level(id(batch)), tuple(names)
        if case not in self._trusted:
            if not self._is_short(case, batch):
                self._prefix.abandon()
            self._trusted.add(case)
        return self._short_rows(batch, names)

    def _is_short(self, case: tuple[Level, tuple[str, ...]], batch: Batch) -> bool:
        """Whether a pass to some weights that leaves as much out gives what a whole one gives.

        The example is passed to all weights in their order, as the batch is, so as much of it is kept.
        """
        level, names = case
        if self._example is None:
            self._example = batch.only(0)
        example = self._example
        try:
            if self._prefix.level(id(example)) != level or not level:
                self._short_rows(example, names)
            if not level:
                return True
            if self._prefix.level(id(example)) != level:
                example = batch
            whole, rows = self._rows(example, names), self._short_rows(example, names)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):  # of the model's own code
            return False
        return all(torch.equal(rows[name], whole[name]) for name in names)

    def adopt(self, other: LayerWalk, batch: Batch) -> None:
        """Keep of a batch what another model's walk keeps, whose settled blocks, and what is before them, are equal."""
        self._prefix.adopt(id(batch), other._prefix)

    def _short_rows(self, batch: Batch, names: Collection[str]) -> dict[str, torch.Tensor]:
        with self._prefix.short(id(batch)):
            return self._rows(batch, names)

    def _rows(self, batch: Batch, names: Collection[str]) -> dict[str, torch.Tensor]:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        known: dict[Identity, torch.Tensor] = {}
        alive: list[torch.Tensor] = []
        left = sum(len(self._calls[name]) for name in names)

        def on_call(call: Call) -> None:
            nonlocal left
            mark = identity(call.layer, call.x)
            if mark not in known:
                alive.append(call.x)
                rows = call.layer.inputs(call.x)
                rows = rows.reshape(-1, rows.shape[-1])
                known[mark] = rows if call.rows is None else rows.index_select(0, call.rows.to(rows.device))
            parts[self._names[id(call.layer)]].append(known[mark])
            left -= 1
            if not left:
                raise _ReachedError

        self._run(batch, names, on_call)
        return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in parts.items()}

    def _run(self, batch: Batch, names: Iterable[str], on_call: Callable[[Call], None]) -> None:
        layers = [layer for name in names for layer in self._layers[name]]
        with Quiet(self._model), Tape(self._model, layers, on_call) as tape, torch.no_grad():
            tape.start(Tokens.of(batch), batch.size)
            try:
                self._call(batch)
            except _ReachedError:
                return

    def matrix(self, name: str) -> torch.Tensor:
        """A copy of the weight, as a matrix ``[out, in]`` in the type of the sums."""
        layer = self._layers[name][0]
        weight = layer.weight.detach()
        matrix = weight.mT if layer.transposed else weight.reshape(layer.out_size(), -1)
        return matrix.to(self.dtype, copy=True).contiguous()

    def bias(self, name: str) -> torch.Tensor | None:
        """A copy of the layer's bias, if it has one and no other layer uses the weight."""
        module: Any = self._layers[name][0].module
        bias = getattr(module, "bias", None)
        if not isinstance(bias, torch.Tensor) or len(self._layers[name]) > 1:
            return None
        return bias.detach().to(self.dtype, copy=True)

    def put(self, name: str, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Set the weight, and the bias if one is given."""
        layer = self._layers[name][0]
        with torch.no_grad():
            layer.weight.copy_((matrix.mT if layer.transposed else matrix).reshape(layer.weight.shape))
            if bias is not None:
                target: Any = layer.module.bias
                target.copy_(bias)

    def tensors(self, name: str, *, bias: bool) -> Sequence[str]:
        """The names of the parameters that `put` sets."""
        return [name, f"{self._layers[name][0].path}.bias".lstrip(".")] if bias else [name]
