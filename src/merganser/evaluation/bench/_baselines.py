"""What is no merge: an ensemble of the experts, a model that imitates them, and heads for held-out tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from merganser.errors import MerganserError
from merganser.evaluation._classification import accuracy
from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._heads import pooled
from merganser.evaluation._outcomes import Evaluation, Outcomes
from merganser.evaluation._perplexity import log_likelihoods
from merganser.evaluation._subject import read_tensors
from merganser.evaluation._tasks import Tasks
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._lab import Lab, linear_head
from merganser.evaluation.bench._learning import Examples, Network, distil
from merganser.statistics._losses import IGNORED

__all__ = ["Found", "composed", "distilled", "ensemble", "found_of", "held_out"]

RIDGE = 0.1


@dataclass
class Found:
    """What a model scores on some tasks.

    Attributes:
        outcomes: by task.
        errors: of the tasks that could not be measured.
        warnings: what the user should know of a task's data.
    """

    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    errors: dict[str, MerganserError] = field(default_factory=dict)
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def take(self, other: Found) -> None:
        """Add what another found."""
        self.outcomes |= other.outcomes
        self.errors |= other.errors
        self.warnings |= other.warnings


def found_of(evaluation: Evaluation) -> Found:
    """The parts of an evaluation."""
    outcomes = {name: result.outcomes for name, result in evaluation.results.items()}
    warnings = {name: result.warnings for name, result in evaluation.results.items() if result.warnings}
    return Found(outcomes, dict(evaluation.errors), warnings)


def ensemble(lab: Lab, experts: Sequence[Expert]) -> dict[str, Outcomes]:
    """Every task by the mean of the logits of all experts, encoders with the task's head or language models.

    It costs as many forward passes as there are experts. Tasks with a head that is a folder, and choices and
    generation, are left out.
    """
    headed = [e for e in experts if e.head is not None and not e.head.is_dir()]
    encoders = [lab.encoder(e.model, e.head) for e in headed]
    found = {}
    for expert in headed:
        assert expert.head is not None
        head = linear_head(expert.head)
        networks = [Network(encoder, head, lab.settings.pooling) for encoder in encoders]
        right: list[float] = []
        losses: list[float] = []
        with torch.inference_mode():
            for inputs, labels in lab.examples(expert.task, "test", expert.head).all(lab.settings.batch_size):
                logits = torch.stack([network(**inputs) for network in networks]).mean(0)
                hits, more = accuracy(logits, labels)
                right += hits
                losses += more
        found[expert.task] = Outcomes("accuracy", tuple(right), others={"loss": sum(losses) / len(losses)})
    return found | _ensemble_of_language_models(lab, experts)


def _ensemble_of_language_models(lab: Lab, experts: Sequence[Expert]) -> dict[str, Outcomes]:
    """The log-likelihoods of the texts of tasks without a head."""
    tasks = [e.task for e in experts if e.head is None and lab.entry(e.task).kind == "perplexity"]
    networks = [lab.network(e.model, None) for e in experts if e.head is None] if tasks else []
    found = {}
    for task in tasks:
        sums: list[float] = []
        counts: list[int] = []
        with torch.inference_mode():
            for inputs, labels in lab.examples(task, "test", None).all(8):
                logits = torch.stack([network(**inputs) for network in networks]).mean(0)[:, :-1]
                losses = nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED
                )
                sums += (-losses.view(len(labels), -1).double().sum(1)).tolist()
                counts += (labels[:, 1:] != IGNORED).sum(1).tolist()
        found[task] = log_likelihoods(sums, counts)
    return found


def composed(lab: Lab, model: Mapping[str, torch.Tensor] | str, experts: Sequence[Expert]) -> Found:
    """Compositional generalisation: tasks that the head of one of these experts answers, on data of another kind."""
    heads, found = {e.task: e.head for e in experts}, Found()
    for name, entry in lab.settings.composition.items():
        if entry.answers in heads:
            try:
                task = lab.task(name, "test", heads[entry.answers])
                found.take(found_of(Evaluator(Tasks((task,), lab.base, lab.settings.batch_norm)).measure(model)))
            except MerganserError as error:
                found.errors[name] = error
    return found


def distilled(lab: Lab, experts: Sequence[Expert], seed: int) -> dict[str, torch.Tensor]:
    """The average of the experts, trained by Adam to give their answers on the examples of the statistics."""
    states = [read_tensors(e.model) for e in experts]
    average = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    del states
    networks = {e.task: lab.network(e.model, e.head) for e in experts}
    student = lab.encoder(average, experts[0].head)
    data = {e.task: lab.examples(e.task, "statistics", e.head) for e in experts}
    settings, training = lab.settings.baseline_training, lab.settings.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        distil(
            student,
            networks,
            data,
            lab.settings.pooling,
            training.only if training.method == "full" else ["*"],
            settings.distillation_steps,
            float(settings.distillation_rate),
            seed,
        )
    return {**average, **lab.state_of(student)}


def held_out(lab: Lab, model: Mapping[str, torch.Tensor] | str) -> Found:
    """Tasks without an expert in the merge: texts by the model itself, classification by a head on its features.

    The head is ridge regression of the labels on the standardised features of `splits.probe` training examples.
    """
    found = Found()
    for name, entry in lab.settings.held_out.items():
        try:
            if entry.kind in ("classification", "image"):
                found.outcomes[name] = _probed(lab, model, name)
            else:
                found.take(found_of(Evaluator(Tasks((lab.task(name, "test"),), lab.base, 0)).measure(model)))
        except MerganserError as error:
            found.errors[name] = error
    return found


def _probed(lab: Lab, model: Mapping[str, torch.Tensor] | str, name: str) -> Outcomes:
    head = lab.fresh_head(name, 0)
    encoder = lab.encoder(model, head)
    train = dataclasses.replace(lab.task(name, "train", head), examples=lab.settings.splits.probe)
    prepared = Evaluator(Tasks((train,), lab.base, 0)).prepared(lab.home)[name]
    features, labels = _features(lab, encoder, Examples(prepared, lab.home.config))
    tests, targets = _features(lab, encoder, lab.examples(name, "test", head))
    logits = _ridge(features, labels, tests, lab.classes(name))
    right, losses = accuracy(logits, targets)
    return Outcomes("accuracy", tuple(right), others={"loss": sum(losses) / len(losses)})


def _features(lab: Lab, encoder: nn.Module, data: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    rows, labels = [], []
    with torch.inference_mode():
        for inputs, targets in data.all(lab.settings.batch_size):
            rows.append(pooled(encoder(**inputs), inputs.get("attention_mask"), lab.settings.pooling))
            labels.append(targets)
    return torch.cat(rows).double(), torch.cat(labels)


def _ridge(x: torch.Tensor, y: torch.Tensor, tests: torch.Tensor, classes: int) -> torch.Tensor:
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, tests = (x - mean) / deviation, (tests - mean) / deviation
    targets = nn.functional.one_hot(y, classes).double()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight: torch.Tensor = torch.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    return tests @ weight + targets.mean(0)
