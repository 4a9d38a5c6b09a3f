"""Fine-tuning that makes models easier to merge."""

from merganser.training._adamr import AdamR

__all__ = ["AdamR"]
"""What happens while models are trained so that they merge well."""

from merganser.training._graft import train_graft_mask
from merganser.training._pull import AdapterPull

__all__ = ["AdapterPull", "train_graft_mask"]
