"""A folder with an adapter, as PEFT reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, ShardWriter, lay_out
from merganser.engine._card import model_card
from merganser.engine._layers import Layers, target_modules
from merganser.engine._names import public_name
from merganser.engine._partial import beside, sync_folder
from merganser.engine._plan import Plan
from merganser.engine._side import SideWriter, as_json
from merganser.errors import EnvironmentFault, Place

__all__ = ["AdapterOut", "Factors"]

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"
"""``A`` and ``B`` in float32, and the singular values of ``B A``."""


class AdapterOut:
    """Writes the factors of a merge's changes.

    Args:
        plan: the merge.
        layers: of the base.
        rank: that was asked for.
        share: of the squared change that the factors hold.
    """

    def __init__(self, plan: Plan, layers: Layers, rank: int, share: float) -> None:
        self._plan, self._layers, self._rank, self._share = plan, layers, rank, share

    def write(self, out: Path, factors: Mapping[str, Factors]) -> None:
        """Write the folder, which appears only when it is complete.

        Args:
            out: the folder.
            factors: by the names of layers.

        Raises:
            EnvironmentFault: E0701, E0703.
            ResourceError: E0803.
        """
        out = out.absolute()
        partial = beside(out, "partial")
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise EnvironmentFault(
                "E0701", f"the output cannot be created: {error.strerror}", places=Place(file=str(out))
            ) from None
        try:
            side = SideWriter(partial)
            self._write_weights(partial, factors)
            facts = f"A LoRA adapter of rank {self._rank} at most; it holds {self._share:.2%} of the squared change."
            side.write(CARD, model_card(self._plan, facts).encode())
            side.write(ADAPTER_CONFIG, as_json(self._config(factors)))
            partial.rename(out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_weights(self, folder: Path, factors: Mapping[str, Factors]) -> None:
        tensors = {}
        for module, (inner, outer, _) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = inner
            tensors[f"base_model.model.{module}.lora_B.weight"] = outer
        specs = [BlockSpec(name, tuple(x.shape), x.dtype, Role.LINEAR) for name, x in tensors.items()]
        (shard,) = lay_out(specs, sum(spec.nbytes for spec in specs) + 1, stem=Path(ADAPTER_WEIGHTS).stem)
        writer = ShardWriter(folder, shard)
        for name, value in tensors.items():
            writer.write(name, 0, value.view(-1))
        writer.sync()

    def _config(self, factors: Mapping[str, Factors]) -> dict[str, Any]:
        ranks = {module: len(values) for module, (_, _, values) in sorted(factors.items())}
        rank = max(ranks.values())
        others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
        names = self._layers.names(tensor.spec.name for tensor in self._plan.tensors)
        base = self._plan.recipe.base
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self._writes() else None,
            "base_model_name_or_path": public_name(base) if isinstance(base, str | Path) else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": target_modules(ranks, names),
            "fan_in_fan_out": any(self._layers.turned(module) for module in factors),
            "lora_dropout": 0.0,
            "bias": "none",
            "modules_to_save": None,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _writes(self) -> bool:
        listed = (self._layers.base.config or {}).get("architectures")
        return isinstance(listed, list) and any(str(kind).endswith(("CausalLM", "LMHeadModel")) for kind in listed)
