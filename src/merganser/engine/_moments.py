"""What a merge layer by layer sums over the tokens of a task."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: ``h h'``, ``(e - h) h'``, and their number.

    Attributes:
        gram: of the inputs h in the merged model.
        drift: of what the inputs e in a fine-tuned model differ from them; zero if that is not followed.
        tokens: how many.
    """

    gram: torch.Tensor
    drift: torch.Tensor
    tokens: int

    @classmethod
    def of(cls, h: torch.Tensor, e: torch.Tensor, dtype: torch.dtype, *, biased: bool, follows: bool) -> Moments:
        """Those of some tokens.

        Args:
            h: inputs in the merged model (tokens x in).
            e: inputs in the fine-tuned model.
            dtype: of the sums.
            biased: whether a last input of 1 stands for the bias.
            follows: whether the drift is wanted.
        """
        wide = h.to(dtype)
        gap = e.to(dtype) - wide
        if biased:
            wide = torch.nn.functional.pad(wide, (0, 1), value=1.0)
            gap = torch.nn.functional.pad(gap, (0, 1))
        return cls(wide.mT @ wide, gap.mT @ wide if follows else gap.new_zeros(()), len(wide))

    def __add__(self, other: Moments) -> Moments:
        """Those of both."""
        return Moments(self.gram + other.gram, self.drift + other.drift, self.tokens + other.tokens)
