"""Every case of the fault list that concerns files and recipes: what is wrong, and what must be said about it."""

from tests.faults.cases._case import Case, Made, run_case
from tests.faults.cases._code import CODE
from tests.faults.cases._containers import CONTAINERS
from tests.faults.cases._contents import CONTENTS
from tests.faults.cases._data import DATA
from tests.faults.cases._folders import FOLDERS
from tests.faults.cases._recipes import RECIPES
from tests.faults.cases._statistics import STATISTICS

__all__ = ["CASES", "Case", "Made", "run_case"]

CASES: tuple[Case, ...] = (*CONTAINERS, *FOLDERS, *CONTENTS, *CODE, *RECIPES, *STATISTICS, *DATA)
