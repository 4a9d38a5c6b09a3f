"""The loss of one example, and where its label comes from.

The loss of example n is the mean over its target tokens of ``-log p(label)``. The label is the given one (`empirical`),
drawn from the model (`sampled`), the most probable one (`argmax`), or all of them, each with its probability (`exact`).
Statistics are quadratic in the gradient, so a pass over label c with probability p uses the loss times ``sqrt(p)``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, NumericError, UsageError, suggestion
from merganser.statistics._batch import Batch

__all__ = ["ESTIMATORS", "LABEL_SOURCES", "Objective", "make_objective"]

ESTIMATORS = ("empirical", "sampled", "exact", "argmax")
LABEL_SOURCES = {"empirical": "gold", "sampled": "sampled", "exact": "exact", "argmax": "argmax"}
TASKS = ("classification", "causal_lm", "seq2seq")
MAX_PASSES = 4096
IGNORED = -100

Loss = Callable[[Any, Any], "torch.Tensor"]


@dataclass(frozen=True)
class Objective:
    """Losses of single examples.

    Attributes:
        task: ``"classification"`` (one label per example), ``"causal_lm"`` (logits at t predict the label at t + 1),
            ``"seq2seq"`` (logits at t predict the label at t), None to decide by the model, or the user's function of
            the model's output and the batch that returns one loss per example.
        estimator: where labels come from.
        seed: of sampled labels.
        samples: how many labels are drawn per example.
        model: the model's class, to decide by.
    """

    task: str | Loss | None
    estimator: str
    seed: int
    samples: int
    model: str

    @property
    def name(self) -> str:
        """The task, for the provenance."""
        return "callable" if callable(self.task) else str(self.task or "model")

    @property
    def identity(self) -> str:
        """What a resumed run must have in common: of a function its name and its code."""
        if not callable(self.task):
            return self.name
        code = getattr(self.task, "__code__", None)
        text = repr((code.co_code, code.co_consts, code.co_names)) if code is not None else repr(type(self.task))
        where = f"{getattr(self.task, '__module__', '')}.{getattr(self.task, '__qualname__', '')}"
        return f"{where} {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def passes(self, output: Any, batch: Batch) -> Iterator[torch.Tensor]:
        """For every pass over labels, the (scaled) loss of each example, shape ``(examples,)``.

        Raises:
            NumericError: E0603, a loss is not finite; the batch and the examples are named.
            InputError: E0415, E0416, labels are missing, of a wrong shape or out of range.
        """
        if callable(self.task):
            losses = self.task(output, batch.given)
            if isinstance(losses, torch.Tensor) and losses.dim() == 0 and batch.size == 1:
                losses = losses.unsqueeze(0)
            if not isinstance(losses, torch.Tensor) or tuple(losses.shape) != (batch.size,):
                shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
                raise UsageError(
                    "E0201",
                    f"the loss function returned {shape}; it must return one loss per example, ({batch.size},)",
                    fix='use reduction="none" and take the mean over the tokens of each example',
                )
            yield _finite(losses, batch)
            return
        logits, targets, valid = self._targets(_logits(output), batch)
        counts = valid.sum(1)
        if not bool((counts > 0).all()):
            index = int((counts == 0).nonzero()[0])
            raise InputError("E0415", f"{batch.name(index)} has no target token")
        # what stands at padding may be NaN, and counts nowhere
        logits = torch.where(valid.unsqueeze(-1), logits, logits.new_zeros(()))
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        share = valid.to(log_p.dtype) / counts[:, None]

        def loss(labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            return (torch.where(valid, nll, nll.new_zeros(())) * weight).sum(1)

        if self.estimator == "empirical":
            yield _finite(loss(targets, share), batch)
        elif self.estimator == "argmax":
            yield _finite(loss(log_p.detach().argmax(-1), share), batch)
        elif self.estimator == "sampled":
            _finite(torch.where(valid, log_p.detach().amax(-1), 0.0).sum(1), batch)
            for labels in self._draw(log_p.detach(), valid, batch):
                yield _finite(loss(labels, share / self.samples**0.5), batch)
        else:
            yield from self._every_label(log_p, share, loss, batch)

    def _every_label(
        self, log_p: torch.Tensor, share: torch.Tensor, loss: Callable[..., torch.Tensor], batch: Batch
    ) -> Iterator[torch.Tensor]:
        """One pass per position and label. Scores of different positions are uncorrelated, so their squares add."""
        positions, classes = log_p.shape[1:]
        if positions * classes > MAX_PASSES:
            raise UsageError(
                "E0201",
                f"the exact expectation needs {positions * classes:,} backward passes per batch; at most "
                f"{MAX_PASSES:,} are run",
                places=batch.place(),
                fix="use the estimator `sampled`",
            )
        _finite(torch.where(share > 0, log_p.detach().amax(-1), 0.0).sum(1), batch)
        root = (0.5 * log_p.detach()).exp()
        for position in range(positions):
            for label in range(classes):
                here = torch.zeros_like(share, dtype=root.dtype)
                here[:, position] = share[:, position] * root[:, position, label]
                yield loss(torch.full(share.shape, label, device=share.device), here)

    def _targets(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits ``(n, t, c)``, labels ``(n, t)`` and which of them count."""
        task = self.task or _task(self.model, logits, batch)
        labels = batch.labels
        if task == "classification":
            if logits.dim() != 2 or len(logits) != batch.size:
                raise _mismatch(batch, f"the logits have the shape {tuple(logits.shape)}, not (examples, classes)")
            logits = logits.unsqueeze(1)
            if labels is not None:
                if labels.is_floating_point() or labels.dim() != 1:
                    raise _mismatch(batch, "the labels are not one integer per example")
                labels = labels.unsqueeze(1)
            known = torch.ones(batch.size, 1, dtype=torch.bool, device=logits.device)
        else:
            if logits.dim() != 3:
                raise _mismatch(
                    batch, f"the logits have the shape {tuple(logits.shape)}, not (examples, tokens, labels)"
                )
            mask = batch.kwargs.get("attention_mask" if task == "causal_lm" else "decoder_attention_mask")
            known = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            if isinstance(mask, torch.Tensor) and mask.shape == known.shape:
                known = mask != 0
            if labels is not None and labels.shape != logits.shape[:2]:
                raise _mismatch(
                    batch, f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}"
                )
            if task == "causal_lm":
                # a token is a target if it and the one that predicts it are no padding, on whichever side that is
                logits, known = logits[:, :-1], known[:, :-1] & known[:, 1:]
                labels = None if labels is None else labels[:, 1:]
        if labels is None:
            if self.estimator == "empirical":
                raise InputError(
                    "E0415",
                    "the batch has no labels",
                    places=batch.place(),
                    fix="add `labels`, or use the estimator `sampled`, which draws them from the model",
                )
            return logits, torch.zeros(known.shape, dtype=torch.long, device=logits.device), known
        valid = (labels != IGNORED) & known if task == "causal_lm" else labels != IGNORED
        bad = valid & ((labels < 0) | (labels >= logits.shape[-1]))
        if self.estimator == "empirical" and bool(bad.any()):
            index, position = (int(i) for i in bad.nonzero()[0])
            raise InputError(
                "E0416",
                f"{batch.name(index)}: the label {int(labels[index, position])} is not in 0..{logits.shape[-1] - 1}",
            )
        return logits, torch.where(valid & ~bad, labels, labels.new_zeros(())), valid

    def _draw(self, log_p: torch.Tensor, valid: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Labels by inversion of the cumulative distribution, shape ``(samples, n, t)``.

        The random numbers of an example depend on the seed and on its number in the data alone, so labels are the
        same whatever the batch size and padding.
        """
        drawn = torch.zeros(self.samples, *valid.shape, dtype=torch.long, device=log_p.device)
        for index in range(batch.size):
            where = valid[index].nonzero().squeeze(1)
            key = hashlib.blake2b(f"{self.seed}:{batch.start + index}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            u = torch.rand(len(where), self.samples, dtype=torch.float64, generator=generator).to(log_p.device)
            total = log_p[index, where].double().exp().cumsum(-1)
            found = torch.searchsorted(total, u * total[:, -1:], right=True)
            drawn[:, index, where] = found.clamp_(max=log_p.shape[-1] - 1).T
        return drawn


def make_objective(
    task: str | Loss | None, estimator: str, seed: int, samples: int, model: torch.nn.Module
) -> Objective:
    """Check the settings of a loss.

    Raises:
        UsageError: an unknown name, or a combination without meaning.
    """
    estimator = "empirical" if estimator == "gold" else estimator
    if estimator not in ESTIMATORS:
        raise UsageError("E0201", f"there is no estimator `{estimator}`", fix=suggestion(estimator, ESTIMATORS))
    if isinstance(task, str) and task not in TASKS:
        raise UsageError("E0201", f"there is no loss `{task}`", fix=suggestion(task, TASKS))
    if callable(task) and estimator != "empirical":
        raise UsageError(
            "E0201", f"the estimator `{estimator}` draws labels itself, so it cannot use a loss function of yours"
        )
    if samples < 1 or (samples > 1 and estimator != "sampled"):
        raise UsageError("E0201", "`samples` is a positive number, and belongs to the estimator `sampled`")
    return Objective(task, estimator, seed, samples, type(model).__name__)


def _logits(output: Any) -> torch.Tensor:
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise InputError(
            "E0419",
            "the model's output has no logits, so there is no loss to differentiate",
            fix="collect the kind `gram`, which needs none, or pass `loss=`, a function of the output and the batch",
        )
    return found


_CAUSAL = re.compile(r"ForCausalLM$|LMHeadModel$|DoubleHeadsModel$")
_TOKENS = re.compile(r"For(ConditionalGeneration|TokenClassification|MaskedLM)$|Seq2SeqLM$")


def _task(model: str, logits: torch.Tensor, batch: Batch) -> str:
    if logits.dim() == 2:
        return "classification"
    if _CAUSAL.search(model):
        return "causal_lm"
    if _TOKENS.search(model) or "decoder_input_ids" in batch.kwargs:
        return "seq2seq"
    raise UsageError(
        "E0201",
        f"it is unclear which loss belongs to logits of shape {tuple(logits.shape)} of {model}",
        fix='pass loss="causal_lm" (logits at t predict the label at t + 1) or loss="seq2seq" (at t)',
    )


def _mismatch(batch: Batch, message: str) -> InputError:
    return InputError("E0415", message, places=batch.place())


def _finite(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    good = torch.isfinite(losses.detach())
    if not bool(good.all()):
        bad = [batch.name(int(i)) for i in (~good).nonzero().squeeze(1)[:5]]
        raise NumericError(
            "E0603",
            f"the loss is not finite: {'; '.join(bad)}",
            places=batch.place(),
            fix="look at these examples, or load the model in float32; nothing was written",
        )
    return losses
