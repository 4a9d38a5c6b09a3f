"""What a model's task is sensitive to: Gram matrices, Kronecker factors, Fisher information; collected and stored."""

from merganser.statistics._api import collect, prepare
from merganser.statistics._file import merge_files
from merganser.statistics._fingerprint import checkpoint_digest, tensor_digest
from merganser.statistics._losses import ESTIMATORS
from merganser.statistics._memory import MemoryPlan
from merganser.statistics._models import ModelFolder, modules_of, open_model
from merganser.statistics._runnable import TaskData, load_runnable, open_task
from merganser.statistics._settings import KINDS
from merganser.statistics._statistics import TABLES, Statistics, check_weights
from merganser.statistics._walk import LayerWalk

__all__ = [
    "ESTIMATORS",
    "KINDS",
    "TABLES",
    "LayerWalk",
    "MemoryPlan",
    "ModelFolder",
    "Statistics",
    "TaskData",
    "check_weights",
    "checkpoint_digest",
    "collect",
    "load_runnable",
    "merge_files",
    "modules_of",
    "open_model",
    "open_task",
    "prepare",
    "tensor_digest",
]
