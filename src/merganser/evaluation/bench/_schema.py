"""The grammar of suite files, as pydantic models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from merganser.evaluation._schema import Strict

__all__ = ["MethodEntry", "Splits", "SuiteFile", "SuiteTask", "Training"]

Number = StrictFloat | StrictInt
Baseline = Literal["base", "experts", "multitask", "ensemble", "distillation"]


class BaseEntry(Strict):
    """The model that all experts start from: a folder, what a package carries, or a configuration."""

    path: StrictStr | None = Field(default=None, description="A model's folder.")
    package: StrictStr | None = Field(default=None, description="An installed package that carries a model.")
    folder: StrictStr = Field(default=".", description="Where in the package.")
    gguf: StrictStr | None = Field(default=None, description="The model is a GGUF file of that name there.")
    config: dict[str, Any] | None = Field(default=None, description="config.json of a model to be trained from noise.")
    pretrain: list[StrictStr] = Field(default=[], description="npz files on which it is trained first, all together.")
    steps: StrictInt = Field(default=400, ge=1, description="Steps of that training.")


class SuiteTask(Strict):
    """A task: its files, and an expert if it is not to be fine-tuned here."""

    kind: Literal["classification", "choice", "perplexity", "image", "generation"]
    train: StrictStr | None = Field(default=None, description="Training data: JSON lines.")
    test: StrictStr | None = Field(default=None, description="Test data: JSON lines.")
    data: StrictStr | None = Field(default=None, description="One file of all: npz, or a plain text that is cut up.")
    labels: list[StrictStr] | None = Field(default=None, description="Names of the labels, where the data have names.")
    expert: StrictStr | None = Field(default=None, description="Folder of a fine-tuned model.")
    head: StrictStr | None = Field(default=None, description="Its head, as in a task file.")


class ComposedTask(SuiteTask):
    """A task that the head of another answers: its data combine what the experts have seen apart."""

    answers: StrictStr = Field(description="The held-in task whose expert's head answers.")


class Splits(Strict):
    """Examples (or windows of a plain text) per task; what neither tests nor measures nor validates, trains."""

    test: StrictInt = Field(default=500, ge=1)
    validation: StrictInt = Field(default=100, ge=1)
    statistics: StrictInt = Field(default=192, ge=1)
    train: StrictInt | None = Field(default=None, ge=1)
    probe: StrictInt = Field(default=200, ge=1, description="Labelled examples of a held-out task for its head.")


class Training(Strict):
    """How every expert is fine-tuned: all weights (or some) or (IA)^3 vectors, AdamW, warm-up and linear decay."""

    method: Literal["full", "ia3"] = Field(default="full", description="ia3: vectors are trained, and merged.")
    outputs: list[StrictStr] = Field(default=[], description="ia3: patterns of layers whose output is scaled.")
    inputs: list[StrictStr] = Field(default=[], description="ia3: patterns of layers whose input is scaled.")
    steps: StrictInt = Field(default=300, ge=1)
    batch: StrictInt = Field(default=16, ge=1)
    rate: Number = Field(default=1e-4, gt=0)
    head_rate: Number = Field(default=1e-3, gt=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    warmup: Number = Field(default=0.1, ge=0, le=1)
    clip: Number = Field(default=1.0, gt=0)
    dropout: StrictBool = True
    only: list[StrictStr] = Field(default=["*"], description="Patterns of the weights that are trained.")

    def identity(self) -> str:
        """What experts depend on."""
        return self.model_dump_json(exclude={"outputs", "inputs"} if self.method == "full" else set())

    @model_validator(mode="after")
    def _vectors_have_layers(self) -> Training:
        if (self.method == "ia3") != bool(self.outputs or self.inputs):
            raise ValueError("`outputs` and `inputs` name the layers of `method: ia3`, and of no other")
        return self


class StatisticsEntry(Strict):
    """What is collected of every expert, on examples that it was not trained on."""

    kinds: list[StrictStr] = Field(default=["kfac", "fisher"], min_length=1)
    estimator: Literal["empirical", "sampled", "exact", "argmax"] = "sampled"


class MethodEntry(Strict):
    """A row of the table: a method with its options, or with options that are searched on the validation data."""

    id: StrictStr | None = Field(default=None, description="A name that no other row has. [default: the method's]")
    label: StrictStr | None = None
    method: StrictStr
    options: dict[str, Any] = Field(default={}, description="Options of the method.")
    search: dict[str, Any] = Field(default={}, description="By option a list, or text LOW:HIGH or LOW:HIGH:log.")
    trials: StrictInt | None = Field(default=None, ge=1)
    init: Any = None

    @property
    def reads_moments(self) -> bool:
        """Whether the method reads what the experts' optimizers have left, and no other statistics."""
        return self.method == "squisher"


class BaselineTraining(Strict):
    """Baselines that are trained: steps and rates; by default those of the experts."""

    multitask_steps: StrictInt | None = Field(default=None, ge=1, description="[default: steps x tasks]")
    distillation_steps: StrictInt = Field(default=200, ge=1)
    distillation_rate: Number = Field(default=1e-4, gt=0)


class Counts(Strict):
    """Merges of some of the models: random subsets of each size."""

    models: list[StrictInt] = Field(default=[], description="How many models.")
    draws: StrictInt = Field(default=3, ge=1)
    methods: list[StrictStr] = Field(default=[], description="Ids of rows that are not tuned.")
    seeds: StrictInt | None = Field(default=None, ge=1, description="Only for the first so many seeds. [default: all]")


class MergeKeys(Strict):
    """Keys of the recipe of every merge."""

    exclude: list[StrictStr] = Field(default=[])
    only: list[StrictStr] = Field(default=[])
    heads: StrictStr = "merge"


class SuiteFile(Strict):
    """An experiment: experts of one base, merged by several methods, beside what is no merge."""

    name: StrictStr
    base: BaseEntry
    tasks: dict[StrictStr, SuiteTask] = Field(min_length=2)
    held_out: dict[StrictStr, SuiteTask] = Field(default={}, description="Tasks without an expert in the merge.")
    composition: dict[StrictStr, ComposedTask] = Field(default={}, description="Compositional generalisation.")
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    max_length: StrictInt = Field(default=64, ge=2)
    batch_size: StrictInt = Field(default=64, ge=1, description="Examples per batch of an evaluation.")
    batch_norm: StrictInt = Field(default=0, ge=0, description="As in a task file.")
    splits: Splits = Splits()
    training: Training = Training()
    statistics: StatisticsEntry = StatisticsEntry()
    merge: MergeKeys = MergeKeys()
    methods: list[MethodEntry] = Field(min_length=1)
    baselines: list[Baseline] = Field(default=["base", "experts", "multitask", "ensemble", "distillation"])
    baseline_training: BaselineTraining = BaselineTraining()
    counts: Counts = Counts()
    seeds: list[StrictInt] = Field(default=[0], min_length=1)
    quick: dict[str, Any] = Field(default={}, description="What --quick changes: keys of this file, merged into it.")

    @property
    def keeps_moments(self) -> bool:
        """Whether the second moments of the experts' optimizers are kept, because a row merges by them."""
        return any(entry.reads_moments for entry in self.methods)
