"""What a model's task is sensitive to: Gram matrices, Kronecker factors, Fisher information; collected and stored."""

from merganser.statistics._api import collect, prepare
from merganser.statistics._file import merge_files
from merganser.statistics._fingerprint import checkpoint_digest, tensor_digest
from merganser.statistics._losses import ESTIMATORS
from merganser.statistics._memory import MemoryPlan
from merganser.statistics._settings import KINDS
from merganser.statistics._statistics import TABLES, Statistics, check_weights
from merganser.statistics._walk import LayerWalk

__all__ = [
    "ESTIMATORS",
    "KINDS",
    "TABLES",
    "LayerWalk",
    "MemoryPlan",
    "Statistics",
    "check_weights",
    "checkpoint_digest",
    "collect",
    "merge_files",
    "prepare",
    "tensor_digest",
]
