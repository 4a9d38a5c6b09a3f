"""What happens while models are trained so that they merge well."""

from merganser.training._adamr import AdamR
from merganser.training._graft import train_graft_mask
from merganser.training._pull import AdapterPull

__all__ = ["AdamR", "AdapterPull", "train_graft_mask"]
