"""Solvers of ``(sum_i w_i C_i) x = sum_i w_i C_i W_i``, one per file.

Every solver computes a correction to the initialisation, ``x = x0 + A^-1 (b - A x0)``, so that what the metrics do not
see stays as it is, and returns a `Solution` that says how well it did.

    system = normal_equations(metrics, models, weights, x0=start)
    solution = CG(max_iterations=15, preconditioner=EKron()).solve(system.operator, system.b, x0=start, r0=system.r0)
"""

from merganser.solvers._base import Solution, Solver, Status
from merganser.solvers.cg import CG
from merganser.solvers.direct import Direct
from merganser.solvers.preconditioners import EKron, Jacobi, Preconditioner, Prepared
from merganser.solvers.two_model import TwoModel

__all__ = [
    "CG",
    "Direct",
    "EKron",
    "Jacobi",
    "Preconditioner",
    "Prepared",
    "Solution",
    "Solver",
    "Status",
    "TwoModel",
]
