"""Metrics: symmetric positive semi-definite operators on the tensors of one shape, one kind per file.

    C = sum((w * Kronecker(A, G).normalized().damped(0.1) for w, A, G in ...), 0)
    system = normal_equations(metrics, weights, x0=start)

Operators are immutable, are composed by ``+`` and by multiplication with a number, act in PyTorch's layout
``[out, in]``, and can be stacked, so that one call acts on many tensors of a shape at once.
"""

from merganser.operators._base import ClosedForm, Operator, stack
from merganser.operators._exact import largest_eigenvalue, rank_tolerance, solve_psd
from merganser.operators._system import System, normal_equations, objective
from merganser.operators.dense import Dense
from merganser.operators.diagonal import Diagonal
from merganser.operators.gram import Gram
from merganser.operators.identity import Identity
from merganser.operators.kronecker import Kronecker
from merganser.operators.lowrank import LowRank
from merganser.operators.sum import Sum

__all__ = [
    "ClosedForm",
    "Dense",
    "Diagonal",
    "Gram",
    "Identity",
    "Kronecker",
    "LowRank",
    "Operator",
    "Sum",
    "System",
    "largest_eigenvalue",
    "normal_equations",
    "objective",
    "rank_tolerance",
    "solve_psd",
    "stack",
]
