"""Gradients of single examples: from hooks for the whole batch at once, or one example after the other.

Both hand every parameter's gradients to a `Sink`, some examples at a time. The hooks are exact as long as every use of
a parameter passes through a hooked module that keeps the examples apart; `hooks_are_exact` compares them with an
ordinary backward pass of one example, and the loop is used where they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from merganser._torch import torch
from merganser.statistics._batch import Batch, Caller, Tokens
from merganser.statistics._layers import Embedding, Layer
from merganser.statistics._layout import Layout, parameter_names
from merganser.statistics._losses import Objective
from merganser.statistics._tape import Call, Tape, version_of

__all__ = [
    "Comparison",
    "HookGradients",
    "NotPerExampleError",
    "Sink",
    "hooks_are_exact",
    "lookahead",
    "loop_gradients",
]

CHUNK = 1 << 22
"""Elements of per-example gradients that are formed at a time."""

T = TypeVar("T")


class NotPerExampleError(Exception):
    """A layer's input does not hold the examples in its first dimension."""


class Sink(Protocol):
    """Receives per-example gradients."""

    def __call__(self, name: str, start: int, gradients: torch.Tensor, index: int | None = None) -> None:
        """Gradients ``(n, *shape)`` of the examples from `start` on, of pass `index` over labels (or the current)."""

    def sparse(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        """Where only squares are wanted: receives rows of the parameter and values to add to them; else None."""
        ...


def lookahead(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether another one follows."""
    current: list[T] = []
    for item in items:
        if current:
            yield current.pop(), True
        current.append(item)
    if current:
        yield current.pop(), False


class HookGradients:
    """Collects the uses of each parameter in a backward pass, and forms its gradients when the last one has arrived.

    Memory: the inputs and output gradients of the layers that still wait, and `CHUNK` elements of gradients.
    """

    def __init__(self, model: torch.nn.Module, layout: Layout, wanted: set[str], sink: Sink) -> None:
        names, _ = parameter_names(model)
        self._sink = sink
        self.local: dict[int, list[tuple[str, str]]] = {}
        layers: list[Layer] = []
        for layer in (*layout.layers, *layout.others):
            local = [(names[id(layer.module.get_parameter(n))], n) for n in layer.parameters.values()]
            local = [(name, n) for name, n in local if name in wanted]
            if local:
                self.local[id(layer)] = local
                layers.append(layer)
        self.layers = tuple(layers)
        self._expected: dict[str, int] = {}
        self._arrived: dict[str, list[tuple[Call, str, torch.Tensor]]] = {}
        self.tape: Tape | None = None

    def start(self) -> None:
        """A forward pass begins."""
        self._expected = {}
        self._arrived = {}

    def on_call(self, call: Call) -> None:
        """Count a use."""
        for name, _ in self.local.get(id(call.layer), ()):
            self._expected[name] = self._expected.get(name, 0) + 1

    def on_gradient(self, call: Call, g: torch.Tensor) -> None:
        """A use's gradient arrives."""
        for name, local in self.local.get(id(call.layer), ()):
            uses = self._arrived.setdefault(name, [])
            uses.append((call, local, g.detach()))
            if len(uses) == self._expected[name]:
                self._form(name, self._arrived.pop(name))

    def flush(self) -> None:
        """The backward pass is over: form what had uses without influence on the loss."""
        for name in list(self._arrived):
            self._form(name, self._arrived.pop(name))

    def _form(self, name: str, uses: list[tuple[Call, str, torch.Tensor]]) -> None:
        assert self.tape is not None
        size = self.tape.size
        aligned = [self._align(call, local, g, size) for call, local, g in uses]
        sparse = self._sink.sparse(name)
        if sparse is not None and len(aligned) == 1:
            layer, _, x, g, _ = aligned[0]
            if isinstance(layer, Embedding):
                sparse(*layer.squares(x, g))
                return
        numel = max(1, aligned[0][0].module.get_parameter(aligned[0][1]).numel())
        step = max(1, CHUNK // numel)
        self.tape.paused = True  # layers of no known form call their module again
        try:
            for start in range(0, size, step):
                stop = min(size, start + step)
                total: torch.Tensor | None = None
                for layer, local, x, g, extra in aligned:
                    part = layer.gradient(local, x[start:stop], g[start:stop], extra)
                    total = part if total is None else total.add_(part)
                assert total is not None
                self._sink(name, start, total)
        finally:
            self.tape.paused = False

    @staticmethod
    def _align(
        call: Call, local: str, g: torch.Tensor, size: int
    ) -> tuple[Layer, str, torch.Tensor, torch.Tensor, tuple[tuple[object, ...], dict[str, object]]]:
        x = call.x
        if version_of(x) != call.version:
            raise NotPerExampleError(f"the input of {call.layer.path} was changed in place")
        if not call.examples:
            flat = x.dim() == 2 == g.dim() and len(x) == len(g) and len(x) % size == 0
            if not flat:
                raise NotPerExampleError(call.layer.path)
            x, g = x.view(size, -1, x.shape[-1]), g.reshape(size, -1, g.shape[-1])
        return call.layer, local, x, g, call.extra


def loop_gradients(
    model: torch.nn.Module, call: Caller, objective: Objective, batch: Batch, wanted: set[str], sink: Sink
) -> int:
    """The same for one example after the other, by ordinary backward passes; exact for any model.

    Returns:
        The number of passes over labels per example.
    """
    chosen = {name: p for name, p in model.named_parameters() if name in wanted}
    count = 0
    for p in chosen.values():
        p.requires_grad_(True)
    try:
        for index in range(batch.size):
            example = batch.only(index)
            with torch.enable_grad():
                output = call(example)
                count = 0
                for losses, more in lookahead(objective.passes(output, example)):
                    count += 1
                    if not losses.requires_grad:
                        continue
                    gradients = torch.autograd.grad(
                        losses.sum(), tuple(chosen.values()), retain_graph=more, materialize_grads=True
                    )
                    for name, gradient in zip(chosen, gradients, strict=True):
                        sink(name, index, gradient.detach().unsqueeze(0), count - 1)
    finally:
        for p in chosen.values():
            p.requires_grad_(False)
    return count


class _First:
    """Keeps the first example's gradients of the first pass."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, start: int, gradients: torch.Tensor, index: int | None = None) -> None:
        if start == 0 and name not in self.found:
            self.found[name] = gradients[0].detach()

    def sparse(self, name: str) -> None:
        """Dense gradients, please."""


class Comparison:
    """Compares the first example's gradients with the true ones as they arrive, and keeps neither.

    They agree up to rounding; gradients that are nothing but rounding (key biases) are measured by the largest.
    """

    def __init__(self, truth: dict[str, torch.Tensor]) -> None:
        self._truth = truth
        self._norms = {name: _norm(g) for name, g in truth.items()}
        self._largest = max(self._norms.values(), default=0.0)
        self._agree = True

    def __call__(self, name: str, start: int, gradients: torch.Tensor, index: int | None = None) -> None:
        if start == 0 and name in self._truth:
            truth = self._truth.pop(name)
            self._judge(name, truth.dtype, _norm(gradients[0].detach() - truth))

    def sparse(self, name: str) -> None:
        """Dense gradients, please."""

    def agree(self) -> bool:
        """Whether all agreed; those that never arrived count as zero."""
        for name, truth in self._truth.items():
            self._judge(name, truth.dtype, self._norms[name])
        return self._agree

    def _judge(self, name: str, dtype: torch.dtype, difference: float) -> None:
        tolerance = 1e-2 if torch.finfo(dtype).eps < 1e-5 else 0.25
        self._agree &= not difference > tolerance * (self._norms[name] + 1e-3 * self._largest)


def _norm(g: torch.Tensor) -> float:
    """The Euclidean norm in float64, without a copy of the whole in that type."""
    return math.hypot(*(float(part.double().norm()) for part in torch.split(g.reshape(-1), CHUNK)))


def hooks_are_exact(
    model: torch.nn.Module, call: Caller, objective: Objective, batch: Batch, layout: Layout, wanted: set[str]
) -> bool:
    """Whether hooks give the gradients of the batch's first example that a pass of it alone gives.

    They do not where a weight is also used outside its module, where a module mixes the examples, or where the first
    dimension of an activation is not that of the examples.

    Complexity: one forward and backward pass of the batch, and one of an example. Memory: the gradients of an example.
    """
    if layout.orphans:
        return False
    truth = _First()
    loop_gradients(model, call, _FirstPass(objective), batch.only(0), wanted, truth)
    ours = Comparison(truth.found)
    hooks = HookGradients(model, layout, wanted, ours)
    try:
        with Tape(model, hooks.layers, hooks.on_call, hooks.on_gradient, hooks.layers) as tape, torch.enable_grad():
            hooks.tape = tape
            hooks.start()
            tape.start(Tokens.of(batch), batch.size)
            losses = next(objective.passes(call(batch), batch))
            tape.backward(losses.sum(), again=False)
            hooks.flush()
    except (NotPerExampleError, NotImplementedError):
        return False
    except RuntimeError as error:
        if "vmap" in str(error) or "functorch" in str(error) or "functional" in str(error):
            return False
        raise
    return ours.agree()


class _FirstPass(Objective):
    """An objective of which only the first pass over labels counts."""

    def __init__(self, inner: Objective) -> None:
        super().__init__(inner.task, inner.estimator, inner.seed, inner.samples, inner.model)

    def passes(self, output: object, batch: Batch) -> Iterator[torch.Tensor]:
        yield next(super().passes(output, batch))
