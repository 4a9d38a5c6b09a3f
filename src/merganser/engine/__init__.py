"""Plan a merge, stream it, commit it."""

from merganser.engine._api import merge
from merganser.engine._executor import Executor, LocalThreads, available_cores
from merganser.engine._extract import Extracted, extract, extract_adapter
from merganser.engine._front import map_front
from merganser.engine._layerwise import is_layerwise
from merganser.engine._licences import needs_decision
from merganser.engine._locked import Locked, open_locked
from merganser.engine._measure import Difference, TensorStatistics, compare, group_of, matching_tensors, statistics
from merganser.engine._merge import DEFAULT_SHARD, Outcome, execute, in_memory, save, to_memory, usable_device
from merganser.engine._names import describe_method
from merganser.engine._onto import onto_recipe
from merganser.engine._parents import read_card
from merganser.engine._place import check_output
from merganser.engine._plan import DEFAULT_MEMORY, Plan, make_plan
from merganser.engine._provenance import versions
from merganser.engine._relations import Counts, Relations, relate
from merganser.engine._search import Evaluator, FolderEvaluator, as_scores, resolve
from merganser.engine._stream import Stream
from merganser.engine._subspaces import Subspaces, sample_matrices, subspaces
from merganser.engine._tensor import Input, TensorPlan
from merganser.engine._verify import Verified, verify

__all__ = [
    "DEFAULT_MEMORY",
    "DEFAULT_SHARD",
    "Counts",
    "Difference",
    "Evaluator",
    "Executor",
    "Extracted",
    "FolderEvaluator",
    "Input",
    "LocalThreads",
    "Locked",
    "Outcome",
    "Plan",
    "Relations",
    "Stream",
    "Subspaces",
    "TensorPlan",
    "TensorStatistics",
    "Verified",
    "as_scores",
    "available_cores",
    "check_output",
    "compare",
    "describe_method",
    "execute",
    "extract",
    "extract_adapter",
    "group_of",
    "in_memory",
    "is_layerwise",
    "make_plan",
    "map_front",
    "matching_tensors",
    "merge",
    "needs_decision",
    "onto_recipe",
    "open_locked",
    "read_card",
    "relate",
    "resolve",
    "sample_matrices",
    "save",
    "statistics",
    "subspaces",
    "to_memory",
    "usable_device",
    "verify",
    "versions",
]
