"""One batch after the other into running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, NumericError, Place, UsageError
from merganser.statistics._batch import Batch, Caller, Tokens
from merganser.statistics._gradients import (
    HookGradients,
    NotPerExampleError,
    hooks_are_exact,
    lookahead,
    loop_gradients,
)
from merganser.statistics._layout import Layout
from merganser.statistics._losses import Objective
from merganser.statistics._statistics import INPUT_KINDS, TABLES
from merganser.statistics._sums import Sums
from merganser.statistics._tape import Call, Identity, Tape, identity

__all__ = ["Collector"]

EXAMPLE_KINDS = ("fisher", "block", "rows")


class Collector:
    """Adds batches to sums. The model is in evaluation mode and frozen while it works.

    Args:
        model: the model.
        call: calls it.
        objective: the losses; not used where only Gram matrices of inputs are wanted.
        layout: its layers.
        kinds: some of the tables of `Statistics`.
        wanted: for each per-example kind, the parameters.
        dtype: of the sums.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        call: Caller,
        objective: Objective,
        layout: Layout,
        kinds: frozenset[str],
        wanted: Mapping[str, frozenset[str]],
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._call = call
        self._objective = objective
        self._layout = layout
        self._kinds = kinds
        self._wanted = wanted
        self._every = set().union(*wanted.values()) if wanted else set()
        self._hooks: HookGradients | None = None
        self.strategy = ""
        self.sums = Sums(dtype)
        self._seen: dict[str, list[tuple[Identity, int]]] = {}
        self._size = 0
        self._pass = 0
        self.passes = 0
        self._buffer: dict[tuple[str, int], list[torch.Tensor]] = {}

    def prepare(self, first: Batch) -> None:
        """Choose between hooks and a loop for the per-example statistics, by the first batch."""
        if self._every and not self.strategy:
            exact = hooks_are_exact(self._model, self._call, self._objective, first, self._layout, self._every)
            self.strategy = "hooks" if exact else "loop"
        if self.strategy == "hooks" and self._hooks is None:
            self._hooks = HookGradients(self._model, self._layout, self._every, self)

    def update(self, batch: Batch) -> None:
        """Add the statistics of a batch.

        Raises:
            NumericError: E0603, a loss or a sum is not finite; the batch, and the layer or examples, are named.
            InputError: labels are missing or wrong, or the model does not allow these statistics.
        """
        self._size, self._seen, self._buffer = batch.size, {}, {}
        backward = "output_gram" in self._kinds or self._hooks is not None
        if backward:
            self._with_gradients(batch)
        elif self._kinds & INPUT_KINDS:
            with Tape(self._model, self._layout.layers, self._on_call) as tape, torch.no_grad():
                tape.start(Tokens.of(batch), batch.size)
                self._call(batch)
        self._check_sharing(batch)
        if self.strategy == "loop":
            passes = loop_gradients(self._model, self._call, self._objective, batch, self._every, self)
            self._count_passes(passes, batch)
        self._end_rows(batch)
        for kind, names in self._wanted.items():
            for name in names if kind != "rows" else ():
                self.sums.count(f"{kind}/{name}", batch.size)
        self._check_finite(batch)

    def _with_gradients(self, batch: Batch) -> None:
        hooks = self._hooks
        watched = [layer for layer in self._layout.layers if self._wants_output(layer)]
        layers = self._layout.layers
        if hooks is not None:
            watched += [layer for layer in hooks.layers if not self._wants_output(layer)]
            layers = (*layers, *self._layout.others)
            hooks.start()
        with Tape(self._model, layers, self._on_call, self._on_gradient, watched) as tape, torch.enable_grad():
            if hooks is not None:
                hooks.tape = tape
            tape.start(Tokens.of(batch), batch.size)
            output = self._call(batch)
            self._pass = 0
            try:
                for losses, more in lookahead(self._objective.passes(output, batch)):
                    tape.backward(losses.sum(), again=more)
                    if hooks is not None:
                        hooks.flush()
                    self._pass += 1
            except NotPerExampleError as error:
                raise InputError(
                    "E0419",
                    "gradients of single examples cannot be told apart",
                    places=Place(tensor=str(error)),
                    fix="use batches of one example",
                ) from None
        if hooks is not None:
            self._count_passes(self._pass, batch)

    def _wants_output(self, layer: Any) -> bool:
        name = self._layout.names.get(id(layer))
        return (
            "output_gram" in self._kinds
            and name in self._layout.chosen
            and name not in self._layout.heads
            and not layer.one_hot
        )

    def _on_call(self, call: Call) -> None:
        if self._hooks is not None:
            self._hooks.on_call(call)
        layer = call.layer
        name = self._layout.names.get(id(layer))
        if name in self._layout.chosen and (self._kinds & {*INPUT_KINDS, "output_gram"}):
            assert name is not None
            if not layer.one_hot or name in self._layout.frequencies:
                self._add_input(name, call)
        if self._hooks is None or id(layer) not in self._hooks.local:
            call.x = torch.empty(0)  # nobody needs it any more

    def _add_input(self, name: str, call: Call) -> None:
        layer, x = call.layer, call.x
        if "output_gram" in self._kinds and not call.examples and x.dim() > 2 and len(x) == 1 != self._size:
            raise InputError(
                "E0419",
                "the layer's input is shared by all examples of a batch",
                places=Place(tensor=name),
                fix="use batches of one example, or leave the layer out with `include`",
            )
        leader = self._layout.leaders.get(name, name)
        mark = identity(layer, x)
        calls = self._seen.setdefault(name, [])
        if leader == name:
            if layer.one_hot:
                rows = x.reshape(-1) if call.rows is None else x.reshape(-1)[call.rows.to(x.device)]
                if "gram" in self._kinds:
                    self.sums.add_frequencies(f"gram/{name}", rows, layer.in_size())
            else:
                rows = layer.inputs(x)
                rows = rows.reshape(-1, rows.shape[-1])
                rows = rows if call.rows is None else rows.index_select(0, call.rows.to(rows.device))
                if "gram" in self._kinds:
                    self.sums.add_outer(f"gram/{name}", rows)
                if "mean" in self._kinds:
                    self.sums.add_sum(f"mean/{name}", rows)
            number = len(rows)
        else:
            known = self._seen.get(leader, [])
            number = known[len(calls)][1] if len(known) > len(calls) else -1
            if number < 0 or known[len(calls)][0] != mark:
                raise self._not_shared(name, leader)
        calls.append((mark, number))
        for kind in self._kinds & INPUT_KINDS:
            self.sums.count(f"{kind}/{name}", number)
        if self._wants_output(layer):
            self.sums.count(f"output_gram/{name}", number)

    def _check_sharing(self, batch: Batch) -> None:
        for name, leader in self._layout.leaders.items():
            if len(self._seen.get(name, ())) != len(self._seen.get(leader, ())):
                raise self._not_shared(name, leader)

    def _not_shared(self, name: str, leader: str) -> InputError:
        return InputError(
            "E0419",
            f"`{name}` and `{leader}` read the same activation for some examples and different ones for others",
            places=Place(tensor=name),
            fix="pass share_inputs=False, which keeps one Gram matrix for each",
        )

    def _on_gradient(self, call: Call, g: torch.Tensor) -> None:
        layer = call.layer
        if self._wants_output(layer):
            rows = layer.outputs(g.detach())
            rows = rows.reshape(-1, rows.shape[-1])
            rows = rows if call.rows is None else rows.index_select(0, call.rows.to(rows.device))
            self.sums.add_outer(f"output_gram/{self._layout.names[id(layer)]}", rows)
        if self._hooks is not None:
            self._hooks.on_gradient(call, g)

    # per-example gradients arrive here

    def __call__(self, name: str, start: int, gradients: torch.Tensor, index: int | None = None) -> None:
        """Take gradients of some examples, of pass `index` over labels or of the one that is running."""
        if name in self._wanted.get("fisher", ()):
            self.sums.add_squares(f"fisher/{name}", gradients)
        flat = gradients.reshape(len(gradients), -1)
        if name in self._wanted.get("block", ()):
            self.sums.add_outer(f"block/{name}", flat)
        if name in self._wanted.get("rows", ()):
            self._buffer.setdefault((name, self._pass if index is None else index), []).append(flat)

    def sparse(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        """Squares of an embedding's gradient, for the few rows that occur."""
        if any(name in self._wanted.get(kind, ()) for kind in ("block", "rows")):
            return None
        shape = self._model.get_parameter(name).shape

        def add(index: torch.Tensor, values: torch.Tensor) -> None:
            self.sums.total(f"fisher/{name}", shape, values).index_add_(0, index, values.to(self.sums.dtype))

        return add

    def _count_passes(self, passes: int, batch: Batch) -> None:
        if self.passes and passes != self.passes and "rows" in self._wanted:
            raise UsageError(
                "E0201",
                f"rows need the same number of labels for every batch; there are {self.passes} and {passes}",
                places=batch.place(),
                fix="use the estimator `sampled`",
            )
        self.passes = passes

    def _end_rows(self, batch: Batch) -> None:
        """Append the batch's rows, example by example; scaled so that ``rows' rows / n`` is the mean over examples."""
        for name in sorted(self._wanted.get("rows", ())):
            parameter = self._model.get_parameter(name)
            passes = []
            for index in range(self.passes):
                parts = self._buffer.get((name, index))
                passes.append(torch.cat(parts) if parts else parameter.new_zeros(batch.size, parameter.numel()))
            rows = torch.stack(passes, 1).reshape(batch.size * self.passes, -1) * self.passes**0.5
            self.sums.add_rows(f"rows/{name}", rows)
            self.sums.count(f"rows/{name}", len(rows))
        self._buffer = {}

    def _check_finite(self, batch: Batch) -> None:
        key = self.sums.unsound()
        if key is not None:
            table, _, name = key.partition("/")
            raise NumericError(
                "E0603",
                f"`{table}` of `{name}` is not finite after this batch",
                places=[Place(tensor=name, found=batch.place().found)],
                fix="look at these examples, or load the model in float32; nothing was written",
            )

    def tables(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, int]]:
        """The means by table and weight name, and their counts; names that share a tensor hold the same one."""
        means = self.sums.means()
        tables: dict[str, dict[str, torch.Tensor]] = {table: {} for table in TABLES}
        for key, tensor in means.items():
            table, _, name = key.partition("/")
            tables[table][name] = tensor
        for kind in EXAMPLE_KINDS[:2]:
            for name in self._wanted.get(kind, ()):
                if name not in tables[kind]:  # it had no influence on any loss
                    p = self._model.get_parameter(name)
                    shape = tuple(p.shape) if kind == "fisher" else (p.numel(),) * 2
                    tables[kind][name] = torch.zeros(shape, dtype=self.sums.dtype)
        counts = dict(self.sums.counts)
        shared = [(table, *pair) for table in sorted(INPUT_KINDS) for pair in self._layout.leaders.items()]
        shared += [(table, *pair) for table in ("gram", "output_gram", "mean") for pair in self._layout.aliases.items()]
        shared += [(table, *pair) for table in EXAMPLE_KINDS for pair in self._layout.tied.items()]
        for table, name, owner in shared:
            if owner in tables[table]:
                tables[table][name] = tables[table][owner]
                counts[f"{table}/{name}"] = counts[f"{table}/{owner}"]
        known = {f"{table}/{name}" for table in TABLES for name in tables[table]}
        return tables, {key: count for key, count in counts.items() if key in known}
