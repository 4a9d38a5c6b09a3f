"""Fine-tuning that makes models easier to merge."""

from merganser.training._adamr import AdamR

__all__ = ["AdamR"]
