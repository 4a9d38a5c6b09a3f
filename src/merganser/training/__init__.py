"""What happens while models are trained so that they merge well, and what a merged model needs before it is used."""

from merganser.training._adamr import AdamR
from merganser.training._batch_norm import update_batch_norm
from merganser.training._graft import train_graft_mask
from merganser.training._ia3 import fold_ia3, ia3_vectors, insert_ia3
from merganser.training._pull import AdapterPull

__all__ = ["AdamR", "AdapterPull", "fold_ia3", "ia3_vectors", "insert_ia3", "train_graft_mask", "update_batch_norm"]
