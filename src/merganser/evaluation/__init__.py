"""How good a merge is: evaluators, the search of options, and suites of experiments."""

from merganser.evaluation._evaluator import Evaluator, evaluate, evaluator
from merganser.evaluation._outcomes import Evaluation, Outcomes, TaskResult
from merganser.evaluation._overlap import refuse_overlap, refuse_tuned
from merganser.evaluation._space import Choices, Range, parse_space, space_of
from merganser.evaluation._tasks import Task, Tasks, read_tasks
from merganser.evaluation._trials import Trial
from merganser.evaluation._tune import tune
from merganser.evaluation._tuning import Tuning, tune_recipe

__all__ = [
    "Choices",
    "Evaluation",
    "Evaluator",
    "Outcomes",
    "Range",
    "Task",
    "TaskResult",
    "Tasks",
    "Trial",
    "Tuning",
    "evaluate",
    "evaluator",
    "parse_space",
    "read_tasks",
    "refuse_overlap",
    "refuse_tuned",
    "space_of",
    "tune",
    "tune_recipe",
]
