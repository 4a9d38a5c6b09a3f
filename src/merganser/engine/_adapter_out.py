"""A folder with an adapter, as PEFT reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from merganser.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, keeps_transposed
from merganser.engine._card import model_card
from merganser.engine._names import public_name
from merganser.engine._partial import beside, sync_folder
from merganser.engine._place import check_free
from merganser.engine._plan import Plan
from merganser.engine._side import SideWriter, as_json
from merganser.errors import EnvironmentFault, Place
from merganser.methods._spectral import Triple

__all__ = ["AdapterOut"]


class AdapterOut:
    """Writes the factors of a merge's changes.

    Args:
        plan: the merge.
        rank: that was asked for.
        share: of the squared change that the factors hold.
    """

    def __init__(self, plan: Plan, rank: int, share: float) -> None:
        self._plan, self._rank, self._share = plan, rank, share

    def write(self, out: Path, factors: Mapping[str, Triple]) -> None:
        """Write the folder, which appears only when it is complete.

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
            side.write(ADAPTER_WEIGHTS, self._weights(factors))
            facts = f"A LoRA adapter of rank {self._rank} at most; it holds {self._share:.2%} of the squared change."
            side.write(CARD, model_card(self._plan, facts).encode())
            side.write(ADAPTER_CONFIG, as_json(self._config(factors)))
            check_free(out, overwrite=False)
            partial.rename(out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _turned(self, name: str) -> bool:
        return bool(keeps_transposed(self._plan.donor.config, name.removesuffix(".weight")))

    def _weights(self, factors: Mapping[str, Triple]) -> bytes:
        tensors = {}
        for name, (left, values, right) in factors.items():
            root = values.sqrt()
            outer, inner = left * root, root[:, None] * right
            if self._turned(name):
                outer, inner = inner.mT, outer.mT
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = inner.float().contiguous()
            tensors[f"{module}.lora_B.weight"] = outer.float().contiguous()
        return save(tensors, metadata={"format": "pt"})

    def _config(self, factors: Mapping[str, Triple]) -> dict[str, Any]:
        ranks = {name.removesuffix(".weight"): len(values) for name, (_, values, _) in sorted(factors.items())}
        rank = max(ranks.values())
        others = {module: own for module, own in ranks.items() if own != rank}
        base = self._plan.recipe.base
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self._writes() else None,
            "base_model_name_or_path": public_name(base) if isinstance(base, str | Path) else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": self._targets(list(ranks)),
            "fan_in_fan_out": any(self._turned(name) for name in factors),
            "lora_dropout": 0.0,
            "bias": "none",
            "modules_to_save": None,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _writes(self) -> bool:
        listed = (self._plan.donor.config or {}).get("architectures")
        return isinstance(listed, list) and any(str(kind).endswith(("CausalLM", "LMHeadModel")) for kind in listed)

    def _targets(self, modules: Sequence[str]) -> list[str]:
        """The last parts of the modules' names, where they mean these modules alone, or else the whole names."""
        chosen = set(modules)
        weights = [tensor.spec.name for tensor in self._plan.tensors if len(tensor.spec.shape) >= 2]
        others = {
            n.removesuffix(".weight").rpartition(".")[2] for n in weights if n.removesuffix(".weight") not in chosen
        }
        return sorted({last if (last := name.rpartition(".")[2]) not in others else name for name in modules})
