"""What the solver of the matching system costs, and how many iterations it needs.

    python -m benchmarks.matching [--shapes 1024x1024 2816x1024] [--models 8] [--iterations 100] [--repeats 3]
    python -m benchmarks.matching --device cuda --stack 8

1. CPU time of conjugate gradients on a K-FAC system over the CPU time of its matrix products alone, beside the same
   ratio for SciPy's `cg` with a LinearOperator around torch, as the authors' code runs it. On an accelerator instead
   the share of the rate of matrix products that the solver reaches over a stack of blocks.
2. Iterations until the objective's gap is a tenth, a hundredth, ... of that of the initialisation, plain and with the
   eKron preconditioner, on systems of tasks whose metrics are more or less aligned, damped and not.

Figures are medians. The objective's gap is ``<x - x*, A (x - x*)>``, in float64.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from merganser.operators import Kronecker, System, normal_equations, stack
from merganser.solvers import CG, EKron

LIMIT_RATIO = 1.3
LIMIT_ITERATIONS = 1 / 3
LIMIT_SHARE = 0.6
GAPS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Problem:
    """Metrics, models and an initialisation of one weight ``[out, in]``."""

    metrics: list[Kronecker]
    models: list[torch.Tensor]
    x0: torch.Tensor

    @property
    def system(self) -> System:
        """The linear system."""
        return normal_equations(self.metrics, self.models, x0=self.x0)


def spectral(generator: torch.Generator, shared: torch.Tensor, power: float, mix: float, samples: int) -> torch.Tensor:
    """The second moment of samples whose spectrum falls as ``k^-power``, in a basis partly shared by all tasks."""
    size = len(shared)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** (-power / 2)
    own: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    common, private = (torch.randn(samples, size, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    x: torch.Tensor = (1 - mix) ** 0.5 * common @ shared.T + mix**0.5 * private @ own.T
    return x.T @ x / samples


def realistic(models: int, rows: int, columns: int, *, mix: float, damping: float, seed: int = 0) -> Problem:
    """A small K-FAC problem in float64: spectra that fall off, and tasks of very different scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    right, left = torch.linalg.qr(normal(columns, columns)).Q, torch.linalg.qr(normal(rows, rows)).Q
    base = normal(rows, columns) / columns**0.5
    metrics = []
    for _ in range(models):
        a = spectral(generator, right, 1.0, mix, 4 * columns)
        g = spectral(generator, left, 1.5, mix, 2 * rows) * 10 ** float(normal(1))
        metrics.append(Kronecker(a, g).normalized().damped(damping))
    tuned = [base + 0.1 * normal(rows, columns) / columns**0.5 for _ in range(models)]
    start = base + 0.3 * torch.stack([weight - base for weight in tuned]).sum(0)
    return Problem(metrics, tuned, start)


def random_problem(models: int, rows: int, columns: int, device: str, seed: int = 0) -> Problem:
    """A K-FAC problem of any size in float32, made cheaply; its spectrum does not matter."""
    generator = torch.Generator().manual_seed(seed)

    def factor(size: int) -> torch.Tensor:
        x = torch.randn(2 * size, size, generator=generator).to(device)
        return (x.T @ x).div_(2 * size)

    def weight() -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device)

    metrics = [Kronecker(factor(columns), factor(rows), damping=1e-9) for _ in range(models)]
    return Problem(metrics, [weight() for _ in range(models)], weight())


def solves(system: System, iterations: int) -> list[Callable[[], object]]:
    """A fixed number of iterations, plain and preconditioned."""

    def run(solver: CG) -> object:
        solve = solver.solve_stack if system.operator.stacked else solver.solve
        return solve(system.operator, system.b, x0=system.x0, r0=system.r0)

    choices = (None, EKron())
    return [partial(run, CG(iterations, tolerance=0.0, preconditioner=choice)) for choice in choices]


# --- CPU time ---------------------------------------------------------------------------------------------------------


def cpu_seconds(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median CPU times of actions that take turns, after one round that is not counted."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for action, own in zip(actions, seconds, strict=True):
            began = time.process_time()
            action()
            if turn:
                own.append(time.process_time() - began)
    return [statistics.median(own) for own in seconds]


def products_alone(problem: Problem, iterations: int) -> Callable[[], None]:
    """The products of that many iterations, into tensors that exist."""
    x, work, out = (torch.empty_like(problem.x0).copy_(problem.x0) for _ in range(3))

    def run() -> None:
        for _ in range(iterations):
            for metric in problem.metrics:
                torch.mm(metric.g, x, out=work)
                torch.addmm(out, work, metric.a, beta=0, out=out)

    return run


def scipy_solver(problem: Problem, iterations: int) -> Callable[[], object] | None:
    """SciPy's `cg` on flat numpy vectors, with torch inside the product; None where SciPy is not installed."""
    try:
        from scipy.sparse.linalg import LinearOperator, cg
    except ImportError:
        return None
    shape, system = tuple(problem.x0.shape), problem.system
    metrics = [(metric.a, metric.g) for metric in problem.metrics]

    def matvec(vector: object) -> object:
        x = torch.as_tensor(vector).view(shape)
        return torch.stack([g @ x @ a for a, g in metrics]).sum(0).view(-1).numpy()

    size = problem.x0.numel()
    operator = LinearOperator((size, size), matvec=matvec, dtype="float32")
    b, start = system.b.view(-1).numpy(), problem.x0.view(-1).numpy()
    return lambda: cg(operator, b, x0=start, rtol=0.0, atol=0.0, maxiter=iterations)


def cpu_table(shapes: Sequence[tuple[int, int]], models: int, iterations: int, repeats: int) -> bool:
    """Print the ratios; whether all of ours are within the limit."""
    print(f"\n{models} models, {iterations} iterations, float32, {torch.get_num_threads()} thread(s)\n")
    print("| shape | products alone, CPU s | ours / products | eKron, set-up included | SciPy / products |")
    print("|---|---|---|---|---|")
    good = True
    for rows, columns in shapes:
        problem = random_problem(models, rows, columns, "cpu")
        other = scipy_solver(problem, iterations)
        actions = [
            products_alone(problem, iterations),
            *solves(problem.system, iterations),
            *([other] if other else []),
        ]
        alone, ours, ekron, *rest = cpu_seconds(actions, repeats)
        theirs = f"{rest[0] / alone:.2f}" if rest else "not installed"
        print(f"| {rows} x {columns} | {alone:.2f} | {ours / alone:.3f} | {ekron / alone:.3f} | {theirs} |", flush=True)
        good &= ours / alone <= LIMIT_RATIO
    return good


# --- iterations -------------------------------------------------------------------------------------------------------


def iterations_to(problem: Problem, solver: CG) -> list[int | None]:
    """After how many iterations the objective's gap falls below each of `GAPS`, relative to that of x0."""
    system = problem.system
    exact = CG(5000, tolerance=1e-12, preconditioner=EKron(), undamped=True)
    best = exact.solve(system.operator, system.b, x0=system.x0, r0=system.r0).x
    path = solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0).iterates

    def gap(x: torch.Tensor) -> float:
        return float(((x - best) * system.operator.matvec(x - best)).sum())

    first = gap(system.x0)
    reached: list[int | None] = [None] * len(GAPS)
    for step, x in sorted(path.items()):
        value = gap(x) / first
        reached = [step if seen is None and value <= level else seen for seen, level in zip(reached, GAPS, strict=True)]
    return reached


def iteration_table(models: int, shape: tuple[int, int], limit: int) -> bool:
    """Print iterations to each gap; whether eKron needs at most a third for a gap of 1e-2 and of 1e-3."""
    rows, columns = shape
    print(
        f"\niterations to an objective gap of {', '.join(f'{g:g}' for g in GAPS)}: {models} models, {rows} x {columns}"
    )
    print("\n| own share of the bases | damping | plain | eKron | eKron / plain at 1e-2, 1e-3 |")
    print("|---|---|---|---|---|")
    good = True
    for mix in (0.1, 0.5, 0.9):
        for damping in (0.0, 0.01, 0.1):
            problem = realistic(models, rows, columns, mix=mix, damping=damping)
            every = tuple(range(limit + 1))
            plain, ekron = (
                iterations_to(problem, CG(limit, tolerance=0.0, keep=every, preconditioner=choice, undamped=True))
                for choice in (None, EKron())
            )
            shares = [e / (p or limit) if e is not None else float("inf") for p, e in zip(plain, ekron, strict=True)]
            good &= max(shares[1:3]) <= LIMIT_ITERATIONS
            cells = (", ".join(f">{limit}" if n is None else str(n) for n in counts) for counts in (plain, ekron))
            print(f"| {mix} | {damping:g} | {' | '.join(cells)} | {shares[1]:.2f}, {shares[2]:.2f} |", flush=True)
    return good


# --- accelerators -----------------------------------------------------------------------------------------------------


def device_seconds(action: Callable[[], object], repeats: int) -> float:
    """The median wall time of finished work, after one call that is not counted."""
    action()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def device_table(
    shapes: Sequence[tuple[int, int]], models: int, blocks: int, iterations: int, repeats: int, device: str
) -> bool:
    """Print the share of the matrix product rate that the solver reaches over a stack of blocks."""
    size = 8192
    one, other = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    peak = 2 * size**3 / device_seconds(lambda: one @ other, repeats)
    print(f"\n{torch.cuda.get_device_name()}, float32, {size} x {size} products at {peak / 1e12:.1f} TFLOP/s\n")
    print(f"| shape, {models} models, {blocks} blocks | solver, TFLOP/s | share of that | eKron with set-up |")
    print("|---|---|---|---|")
    good = True
    for rows, columns in shapes:
        problems = [random_problem(models, rows, columns, device, seed) for seed in range(blocks)]
        metrics = [stack([p.metrics[i] for p in problems]) for i in range(models)]
        weights = [torch.stack([p.models[i] for p in problems]) for i in range(models)]
        system = normal_equations(metrics, weights, x0=torch.stack([p.x0 for p in problems]))
        del problems, metrics, weights
        work = 2.0 * models * blocks * rows * columns * (rows + columns) * iterations
        rates = [work / device_seconds(run, repeats) for run in solves(system, iterations)]
        share = rates[0] / peak
        print(f"| {rows} x {columns} | {rates[0] / 1e12:.1f} | {share:.2f} | {rates[1] / 1e12:.1f} |", flush=True)
        good &= share >= LIMIT_SHARE
    return good


def shape_of(text: str) -> tuple[int, int]:
    """``"1024x512"`` as numbers."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def main() -> None:
    """Measure and print tables in Markdown; status 1 where a limit does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="*", default=[(1024, 1024), (2816, 1024)])
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stack", type=int, default=8, help="blocks per stack on an accelerator")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--convergence", type=shape_of, default=(192, 256), help="shape for the count of iterations")
    parser.add_argument("--limit", type=int, default=400, help="most iterations that are counted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}")
    good = True
    if options.device.startswith("cuda"):
        good &= device_table(
            options.shapes, options.models, options.stack, options.iterations, options.repeats, options.device
        )
    elif options.shapes:
        good &= cpu_table(options.shapes, options.models, options.iterations, options.repeats)
    if options.limit:
        good &= iteration_table(options.models, options.convergence, options.limit)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
