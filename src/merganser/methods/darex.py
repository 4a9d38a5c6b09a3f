"""DAREx: drop entries of task vectors at random, and divide the rest by a factor that is chosen for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import is_head
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context, Transform, TransformedBlock, TransformedContext
from merganser.methods._compose import Around, Staged
from merganser.methods._matching import rescaled
from merganser.methods._options import method_option, option, per_model
from merganser.methods._schedule import CoarseToFine, coarse_to_fine, mean_without_outlier, output_change
from merganser.methods._search import Choice, Search, Trials
from merganser.methods.task_arithmetic import TaskArithmetic

__all__ = ["CoarseToFine", "Darex", "analytic_q", "coarse_to_fine", "mean_without_outlier", "output_change"]

_CONFIDENCE = 0.95
_STOPPED = 0.8
_STEPS = 64


@dataclass(frozen=True)
class _DarexState(Around):
    transform: Transform


@dataclass(frozen=True)
class Darex(Staged, Search, name="darex"):
    """``t_i' = m_i t_i / q`` with a random mask that drops each entry with probability p, then a merge.

    DARE divides by ``1 - p``; where nearly everything is dropped, a larger q is better (``1 - p <= q <= 1``).

    - With `q`: one factor for all layers.
    - With `eta`: one factor per layer from an analytic bound (`analytic_q`). It needs the mean input of every linear
      layer, from statistics of the kind ``mean`` (``merganser.collect(model, data, ["mean"])``; no labels). Biases
      take the q of their weight, and all other tensors the mean over the layers.
    - With neither, `tune` says which of them is searched with the evaluator, by the authors' schedule
      (`coarse_to_fine`): the quality of the merged model, or without labels minus the `output_change` by pruning.

    Heads keep their whole task vectors; with ``prune="blocks"``, for decoders, everything does whose name has neither
    ``mlp`` nor ``self_attn``. Masks are those of `dare`, given by (seed, model, tensor name, position).

    One pass, and with `eta` one more, beside those of `then`. O(models x elements).
    """

    drop_rate: float = option(0.9, "probability p that an entry is dropped", ge=0.0, le=1.0, per_model=True)
    q: float | None = option(None, "what the rest is divided by, in all layers", gt=0.0, per_model=True)
    eta: float | None = option(None, "weight of the analytic bound that gives each layer's q", gt=0.0, per_model=True)
    tune: str = option("q", "what an evaluator searches, where neither is given", choices=("q", "eta"))
    low: float | None = option(None, "where the search begins; 1 - p for q, 0.1 for eta", gt=0.0)
    high: float | None = option(None, "where it ends; 1 for q, 0.7 for eta", gt=0.0)
    step: float = option(0.05, "step of the coarse grid", gt=0.0)
    prune: str = option(
        "body", "which tensors: all but heads, attention and MLP only, or all", choices=("body", "blocks", "all")
    )
    then: Method = method_option("task_arithmetic", "the merge of what is left")

    about = About(
        title="Drop entries of the task vectors at random and rescale by a chosen factor, then merge",
        equation="t_i' = m_i t_i / q,  m_i ~ Bernoulli(1 - p),  1 - p <= q <= 1;  then task arithmetic or any merge",
        source="Deng et al., DARE the extreme (DAREx), 2024, arXiv:2410.09344",
        helps="Dropping 99% and more of the changes, where DARE's factor 1/(1-p) breaks the model.",
        hurts="Moderate drop rates, for which DARE is as good; without an evaluator or data, q must be guessed.",
        work=12,
        deviations="The name DAREx-q is used elsewhere for fixed factors; here they are searched or analytic.",
    )
    symmetric = False
    scope = "model"
    needs = frozenset({"base"})

    def requires(self, models: int) -> frozenset[str]:
        """With `eta` also the mean inputs; with neither q nor eta an evaluator."""
        analytic = self.eta is not None or (self.searching and self.tune == "eta")
        return (
            super().requires(models)
            | ({"mean"} if analytic else frozenset())
            | ({"evaluator"} if self.searching else frozenset())
        )

    @property
    def searching(self) -> bool:
        """Whether neither q nor eta is given."""
        return self.q is None and self.eta is None

    def check(self, models: int, weights: Sequence[float]) -> None:
        """At most one of q and eta."""
        super().check(models, weights)
        if self.q is not None and self.eta is not None:
            raise RecipeError("E0306", "`darex` takes q or eta, not both", places=Place(key="q"))

    def search(self, trials: Trials) -> Choice:
        """Try values of q or eta by the schedule."""
        keep = 1 - min(per_model(self.drop_rate, index) for index in range(trials.models))
        low, high = (max(keep, 0.001), 1.0) if self.tune == "q" else (0.1, 0.7)
        low = low if self.low is None else self.low
        high = max(low, high) if self.high is None else self.high

        def score(value: float) -> float:
            return trials.score(self._with(value), trials.weights) if value > 0 else -math.inf

        found = coarse_to_fine(score, low, high, self.step, backward=self.prune == "blocks")
        tried = [{self.tune: value, "score": number} for value, number in found.visited if value > 0]
        record = {"tried": tried, self.tune: found.best, "score": found.score}
        return Choice(self._with(found.best), trials.weights, None, record)

    def _with(self, value: float) -> Darex:
        return replace(self, q=value) if self.tune == "q" else replace(self, eta=value)

    def passes(self) -> int:
        """Those of the merge, and one for the influences."""
        return super().passes() + (self.eta is not None)

    def buffers(self, models: int) -> int:
        """Those of the merge and the mask; or, wider, the influences with their positions."""
        return super().buffers(models) + (3 if self.eta is None else 18)

    @property
    def inner(self) -> Method:
        """The merge of what is left."""
        if isinstance(self.then, TaskArithmetic):
            return replace(self.then, scale=self.then.scale * self.scale)
        return self.then

    def _prunes(self, name: str) -> bool:
        if self.prune == "blocks":
            return "mlp" in name or "self_attn" in name
        return self.prune == "all" or not is_head(name)

    def prepare(self, context: Context) -> _DarexState:
        """The factors, and the passes of the merge."""
        factors = None if self.eta is None else self._analytic(context)

        def transform(block: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
            key = block.key
            if not self._prunes(key.name):
                return delta
            rate = per_model(self.drop_rate, index)
            mask = kernels.drop_mask(block.seed, index, key.name, key.start, key.stop - key.start, rate)
            q = per_model(self.q, index) if factors is None else factors[key.name][index]
            return delta.mul_(mask.to(delta.device)).div_(q)

        return _DarexState(self.inner.prepare(TransformedContext(context, transform)), transform)

    def _analytic(self, context: Context) -> Mapping[str, list[float]]:
        """The factor of every tensor and model.

        Raises:
            RecipeError: E0308, no tensor has the mean of its input.
        """
        sums: dict[str, list[torch.Tensor]] = {}
        for key, pieces in context.each(self._influences):
            for index, (first, part) in enumerate(pieces):
                rows = sums.setdefault(key.name, [torch.zeros(0, 2, dtype=torch.float64)] * context.models)
                if len(rows[index]) < first + len(part):
                    grown = torch.zeros(first + len(part), 2, dtype=torch.float64)
                    grown[: len(rows[index])] = rows[index]
                    rows[index] = grown
                rows[index][first : first + len(part)] += part
        weights = {name for name in sums if len(context.specs[name].shape) > 1}
        if not weights:
            raise RecipeError(
                "E0308",
                "`darex` with eta needs the mean inputs of linear layers; the statistics have none",
                places=Place(key="eta"),
                fix='collect them: merganser.collect(model, data, ["mean"])',
            )
        factors: dict[str, list[float]] = {}
        for name in sorted(weights):
            bias = _bias_of(name)
            rows = sums[name]
            if bias in sums and context.specs[bias].numel == len(rows[0]):
                rows = [one + other for one, other in zip(rows, sums[bias], strict=True)]
            factors[name] = [self._factor(found, index) for index, found in enumerate(rows)]
        means = [math.fsum(column) / len(weights) for column in zip(*factors.values(), strict=True)]
        for name in context.specs:
            if name not in weights:
                owner = name.removesuffix("bias") + "weight"
                factors[name] = factors[owner] if name.endswith("bias") and owner in weights else means
        return factors

    def _factor(self, rows: torch.Tensor, index: int) -> float:
        assert self.eta is not None
        first, second = rows.to(torch.float16).unbind(1)
        return analytic_q(first, second, per_model(self.drop_rate, index), per_model(self.eta, index))

    def _influences(self, block: Block) -> list[tuple[int, torch.Tensor]]:
        """For each model the first output, and for the outputs from there on the sums of c and of c^2 in the block.

        A weight's influence is ``c_jk = t_jk mean(x_k)``, a bias' is ``t_j``; both are rounded to float16, so that
        sums in float64 are exact and do not depend on the blocks.
        """
        spec, key = block.spec, block.key
        if not self._prunes(key.name) or not spec.numel or len(spec.shape) not in (1, 2, 4):
            return []
        if len(spec.shape) == 1:
            deltas = (block.delta(index, slot=0).to(torch.float16) for index in range(len(block.weights)))
            return [(key.start, _moments(c).cpu()) for c in deltas] if key.name.endswith("bias") else []
        found = []
        for index in range(len(block.weights)):
            mean = block.statistic("mean", index)
            if mean is None:
                return []
            position = torch.arange(key.start, key.stop, device=mean.device)
            columns = spec.numel // spec.shape[0]
            row, column = position // columns, position % columns
            output, source = (column, row) if block.transposed else (row, column)
            c = block.delta(index, slot=0).mul_(mean[source]).to(torch.float16)
            first = int(output.min())
            total = torch.zeros(int(output.max()) - first + 1, 2, dtype=torch.float64, device=c.device)
            found.append((first, total.index_add_(0, output - first, _moments(c)).cpu()))
        return found

    def merge(self, block: Block, state: _DarexState) -> torch.Tensor:
        """The merge of what is left."""
        return self._finish(block, self.inner.merge(TransformedBlock(block, state.transform), state.inner))

    def results(self, block: Block, state: _DarexState) -> list[torch.Tensor]:
        """Those of the merge of what is left."""
        found = self.inner.results(TransformedBlock(block, state.transform), state.inner)
        return [self._finish(block, merged) for merged in found]

    def _finish(self, block: Block, merged: torch.Tensor) -> torch.Tensor:
        return merged if isinstance(self.then, TaskArithmetic) else rescaled(block, merged, self.scale)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _moments(c: torch.Tensor) -> torch.Tensor:
    """``(c, c^2)`` of float16 numbers, the square rounded to float16 too; shape (n, 2), in float64."""
    return torch.stack([c.double(), (c * c).double()], 1)


def analytic_q(first: torch.Tensor, second: torch.Tensor, drop_rate: float, eta: float) -> float:
    """The factor q of a layer, from an analytic bound on the change of its outputs.

    It is the mean over the outputs j of the q that minimises

        ``| eta (1 - (1 - p) / q) sum_k c_jk + eta^2 phi(p) sum_k c_jk^2 / (4 q^2) + ln(2 / 0.05) |``

    with ``phi(p) = (1 - 2 p) / ln((1 - p) / p)``, 1/2 at p = 1/2. The grid has steps of 0.001, from 1 - p
    (rounded down) to below 0.999. It is scanned upwards until 80% of the outputs have had a step that did not lower the
    value; of equal values the last counts. All is evaluated in float16 as in the released code, whose resolution is
    what ends the scan.

    Args:
        first: ``sum_k c_jk``, shape (outputs,), float16.
        second: ``sum_k c_jk^2``, likewise.
        drop_rate: p.
        eta: weight of the influences.

    Source: Deng et al., DAREx, 2024, arXiv:2410.09344.

    Complexity: O(999 p x outputs); memory for 64 steps at a time.
    """
    keep = 1 - drop_rate
    if drop_rate in (0.0, 1.0):
        phi = 0.0
    else:
        phi = 0.5 if drop_rate == 0.5 else (1 - 2 * drop_rate) / math.log(keep / drop_rate)
    constant = _half(torch.tensor(math.log(2 / (1 - _CONFIDENCE))))
    chosen = torch.full(first.shape, max(keep, 0.001), dtype=torch.float64)
    lowest = torch.full(first.shape, 10_000.0)
    stopped = torch.zeros(first.shape, dtype=torch.bool)
    for start in range(max(1, int(keep * 1000)), 999, _STEPS):
        grid = torch.arange(start, min(start + _STEPS, 999), dtype=torch.float64).mul_(0.001).unsqueeze(1)
        linear = _half(eta * _half((1 - keep / grid).float() * first.float()))
        spread = _half(_half(eta**2 * phi * second.float()) / (4 * grid.square()).float())
        value = _half(linear + _half(spread + constant)).abs_().nan_to_num_(math.inf, math.inf)
        before = torch.cat([lowest.unsqueeze(0), value]).cummin(0).values
        ended = (value >= before[:-1]).cumsum(0).bool() | stopped
        enough = torch.nonzero(ended.double().mean(1) >= _STOPPED)
        last = int(enough[0]) if len(enough) else len(grid) - 1
        better = torch.where(value <= before[:-1], grid, 0.0)[: last + 1].amax(0)
        chosen = torch.where(better > 0, better, chosen)
        if len(enough):
            break
        lowest, stopped = before[-1], ended[-1]
    return float(chosen.mean())


def _half(x: torch.Tensor) -> torch.Tensor:
    """Float32 numbers, rounded to float16."""
    return x.to(torch.float16).float()
