"""How good a merge is: evaluators, the search of options, and suites of experiments."""

from merganser.evaluation._evaluator import Evaluator, evaluate, evaluator
from merganser.evaluation._outcomes import Evaluation, Outcomes, TaskResult
from merganser.evaluation._overlap import refuse_overlap, refuse_tuned
from merganser.evaluation._tasks import Task, Tasks, read_tasks

__all__ = [
    "Evaluation",
    "Evaluator",
    "Outcomes",
    "Task",
    "TaskResult",
    "Tasks",
    "evaluate",
    "evaluator",
    "read_tasks",
    "refuse_overlap",
    "refuse_tuned",
]
