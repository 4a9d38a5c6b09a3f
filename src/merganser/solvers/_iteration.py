"""The loop of conjugate gradients, over all blocks of a stack at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from merganser._torch import torch
from merganser.operators import Operator
from merganser.solvers._reductions import Dots

__all__ = ["Trace", "iterate"]

_CHECK_EVERY = 10
"""On an accelerator, iterations between two looks at whether any block still runs."""


@dataclass(frozen=True)
class Trace:
    """What happened to n blocks in at most k iterations.

    Attributes:
        y: the corrections, of the residuals' shape.
        kept: corrections after the iterations asked for, as far as the loop came.
        norms: residual norms ``[k + 1, n]``.
        alphas: step lengths ``[k, n]``; 0 where a block had ended.
        betas: ratios ``[k, n]``.
        gains: by how much each step lowered ``<y, A y> / 2 - <y, r>``, ``[k, n]``.
        iterations: steps that each block made, ``[n]``.
        converged: which blocks reached their target, ``[n]``.
        broken: which blocks broke down, ``[n]``.
    """

    y: torch.Tensor
    kept: dict[int, torch.Tensor]
    norms: torch.Tensor
    alphas: torch.Tensor
    betas: torch.Tensor
    gains: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    broken: torch.Tensor


def iterate(
    operator: Operator,
    residual: torch.Tensor,
    target: torch.Tensor,
    *,
    inverse: torch.Tensor | None,
    max_iterations: int,
    keep: Collection[int],
) -> Trace:
    """Conjugate gradients on ``A y = r`` from ``y = 0``, preconditioned elementwise.

    With ``z = inverse * r``, per block and iteration::

        q = A p;  alpha = <r, z> / <p, q>;  y += alpha p;  r -= alpha q
        z = inverse * r;  beta = <r, z>_new / <r, z>_old;  p = z + beta p

    A block ends when ``||r||`` is below its target, or with a breakdown when ``<p, q>`` is not positive or something
    is not finite; from then on its step lengths are 0 and its p is 0, so that it cannot disturb its y. Nothing is
    copied to the host except, every ten iterations on an accelerator, whether any block still runs.

    Args:
        operator: A.
        residual: r, of the shape that `operator` acts on. Overwritten.
        target: norms to reach, ``[n]``.
        inverse: the preconditioner's inverse diagonal, of the shape of r.
        max_iterations: the most iterations.
        keep: iterations after which y is kept.

    Complexity: one product and five (seven if preconditioned) passes over vectors per iteration; six (seven) tensors of
    the residual's size.
    """
    r, count = residual, operator.count or 1
    y, p, q, work = torch.zeros_like(r), torch.empty_like(r), torch.empty_like(r), torch.empty_like(r)
    z = r if inverse is None else torch.empty_like(r)
    flat_y, flat_p, flat_q, flat_r, flat_z = (tensor.view(count, -1) for tensor in (y, p, q, r, z))
    dots = Dots(flat_r)

    def products() -> tuple[torch.Tensor, torch.Tensor]:
        if inverse is None:
            square = dots(flat_r, flat_r)
            return square, square
        torch.mul(r, inverse, out=z)
        return dots(flat_r, flat_r), dots(flat_r, flat_z)

    square, rho = products()
    converged = (square.sqrt() < target) | (square == 0)
    broken = ~converged & ~(rho.isfinite() & (rho > 0))
    active = ~(converged | broken)
    p.copy_(z)
    flat_p.masked_fill_(~active[:, None], 0)
    norms, alphas, betas, gains = [square.sqrt()], [], [], []
    iterations = torch.zeros_like(active, dtype=torch.int64)
    kept = {0: torch.zeros_like(y)} if 0 in keep else {}
    for step in range(1, max_iterations + 1):
        if (r.device.type == "cpu" or step % _CHECK_EVERY == 1) and not bool(active.any()):
            break
        operator.matvec(p, out=q, work=work)
        curvature = dots(flat_p, flat_q)
        sound = active & (curvature > 0) & curvature.isfinite()
        alpha = torch.where(sound, rho / curvature, 0)
        gains.append(alpha * rho / 2)
        length = alpha.to(r.dtype)[:, None]
        flat_y.addcmul_(length, flat_p)
        flat_r.addcmul_(length, flat_q, value=-1)
        square, following = products()
        finite = square.isfinite() & following.isfinite()
        broken = broken | (active & ~sound) | (sound & ~finite)
        reached = sound & finite & ((square.sqrt() < target) | (square == 0))
        converged = converged | reached
        active = sound & finite & ~reached
        broken = broken | (active & ~(following > 0))
        active = active & (following > 0)
        beta = torch.where(active, following / rho, 0)
        torch.addcmul(flat_z, beta.to(r.dtype)[:, None], flat_p, out=flat_p)
        flat_p.masked_fill_(~active[:, None], 0)
        rho = torch.where(active, following, rho)
        iterations += sound
        norms.append(torch.where(sound, square.sqrt(), norms[-1]))
        alphas.append(alpha)
        betas.append(beta)
        if step in keep:
            kept[step] = y.clone()
    empty = norms[0].new_zeros(0, count)
    return Trace(
        y,
        kept,
        torch.stack(norms),
        torch.stack(alphas) if alphas else empty,
        torch.stack(betas) if betas else empty,
        torch.stack(gains) if gains else empty,
        iterations,
        converged,
        broken,
    )
