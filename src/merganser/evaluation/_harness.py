"""Tasks of lm-evaluation-harness, from a task file on disk: its prompts and metrics, our items and intervals."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import yaml

from merganser.errors import EnvironmentFault, InputError
from merganser.evaluation._items import chosen
from merganser.evaluation._likelihood import language_model
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._models import ModelFolder

__all__ = ["Harness"]


class Harness:
    """A metric of lm-evaluation-harness that has a number per item, of which more is better.

    The task file is trusted: it may name Python code, which the harness runs. Its data set has to be on disk.
    """

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Let the harness read the task file and its data set."""
        folder = language_model(task, home)
        manager, name = _opened(task)
        documents = [dict(document) for document in manager.load([name])["tasks"][name].eval_docs]
        indices = chosen(task, range(len(documents)))
        written = [json.dumps(documents[index], sort_keys=True, default=str).encode() for index in indices]
        return Prepared(
            [{"index": index} for index in indices],
            hashlib.blake2b(task.data.read_bytes() + b"".join(written), digest_size=16).hexdigest(),
            tuple(hashlib.blake2b(text, digest_size=8).hexdigest() for text in written),
            Encoder(folder, task.max_length),
            extra={"manager": manager, "name": name},
        )

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Run the harness on a model in memory."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        assert prepared.encoder is not None
        model = HFLM(
            pretrained=subject.model(task.name), tokenizer=prepared.encoder.tokenizer(), batch_size=task.batch_size
        )
        name: str = prepared.extra["name"]
        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=prepared.extra["manager"],
            samples={name: [item["index"] for item in prepared.items]},
            num_fewshot=task.shots,
            bootstrap_iters=0,
        )
        by_item: dict[int, Mapping[str, Any]] = {sample["doc_id"]: sample for sample in found["samples"][name]}
        samples = [by_item[item["index"]] for item in prepared.items]
        metrics = list(samples[0]["metrics"])
        metric = task.metric or metrics[0]
        if metric not in metrics:
            raise InputError(
                "E0425",
                f"the task `{name}` has no metric `{metric}`",
                places=task.place,
                fix=f"it has: {', '.join(metrics)}",
            )
        if not found["higher_is_better"][name].get(metric, True) or not _numbers(samples, metric):
            raise InputError(
                "E0425",
                f"`{metric}` of the task `{name}` is not a number per item of which more is better",
                places=task.place,
                fix="name another `metric`",
            )
        values = tuple(float(sample[metric]) for sample in samples)
        others = {
            other: sum(float(sample[other]) for sample in samples) / len(samples)
            for other in metrics
            if other != metric and _numbers(samples, other)
        }
        return Outcomes(metric, values, others=others, proportion=set(values) <= {0.0, 1.0})


def _numbers(samples: list[Mapping[str, Any]], metric: str) -> bool:
    return all(isinstance(sample.get(metric), int | float) for sample in samples)


def _opened(task: Task) -> tuple[Any, str]:
    """The harness's index of the folder of a task file, and the name of the task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EnvironmentFault(
            "E0704", "lm-evaluation-harness is not installed", places=task.place, fix="pip install 'merganser[harness]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        loaded = _Names(task.data.read_bytes()).get_single_data()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("E0414", "the task file cannot be read", places=task.place, why=str(error)) from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("task"), str):
        raise InputError("E0414", "the file has no key `task` that names one", places=task.place)
    try:
        return TaskManager(include_path=str(task.data.parent.resolve()), include_defaults=False), loaded["task"]
    except Exception as error:  # noqa: BLE001 - whatever the harness raises on other files of the folder
        raise InputError(
            "E0414", "the harness cannot read the folder of the task file", places=task.place, why=str(error)
        ) from None


class _Names(yaml.SafeLoader):
    """Reads plain values; tags of the harness stand for themselves."""


_Names.add_multi_constructor("!", lambda loader, suffix, node: None)
