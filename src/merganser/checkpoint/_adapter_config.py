"""The configuration of an adapter: what is read of it, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoint._folder import ADAPTER_CONFIG, check_inside
from merganser.checkpoint._json import read_json
from merganser.errors import InputError, Place

__all__ = ["AdapterConfig", "read_adapter_config"]

_KINDS = ("LORA", "IA3")
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# what is used here, or decides nothing once the factors are trained
_KNOWN = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "init_lora_weights",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "lora_dropout",
        "bias",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "init_ia3_weights",
        "runtime_config",
    }
)
_PATTERN = re.compile(r"^([\w.^$\\|()\[\]-]{0,300})$")  # without repetitions, which can take for ever to match
_MOST_GROUPS = 3  # each of which multiplies the ways to match


@dataclass(frozen=True)
class AdapterConfig:
    """What the tensors of an adapter mean.

    Attributes:
        file: where it is.
        kind: ``LORA`` or ``IA3``.
        rank: of the factors.
        alpha: their scale is ``alpha / rank``, with `rooted` ``alpha / sqrt(rank)``.
        ranks: other ranks, by pattern of module names.
        alphas: other alphas.
        rooted: rank-stabilised LoRA.
        weight_decomposed: DoRA.
        transposed: layers keep their weights as (in, out), where shapes and names do not tell.
        ties: the factors of tied weights are those of both.
        base: the model that it was trained on, as far as it says, with the revision.
    """

    file: Path
    kind: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rooted: bool
    weight_decomposed: bool
    transposed: bool
    ties: bool
    base: str | None

    def rank_of(self, module: str) -> Any:
        """The rank of a module's factors."""
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of a module's product.

        Raises:
            InputError: E0409, its alpha is no number.
        """
        alpha = _matching(self.alphas, module, self.alpha)
        if not _is_number(alpha):
            raise _fault(self.file, "alpha_pattern", f"the alpha of `{module}` is no number")
        return float(alpha) / (math.sqrt(rank) if self.rooted else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
        InputError: E0409, it is damaged, or of a kind or with an option that is not known here.
        SecurityError: E0501, it is a link to a place outside the folder.
    """
    file = folder / ADAPTER_CONFIG
    check_inside(file, folder, file.name)
    data = read_json(file, "E0409")
    if not isinstance(data, dict):
        raise _fault(file, None, "it is not a JSON object")
    kind = data.get("peft_type")
    if kind not in _KINDS:
        raise _fault(file, "peft_type", f"adapters of the kind {kind} are not folded into weights")
    exotic = sorted(key for key, value in data.items() if key not in _KNOWN and value not in (None, False, {}, []))
    if exotic:
        raise _fault(file, exotic[0], f"the option {exotic[0]} is not known, and may change what the factors mean")
    start = data.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise _fault(file, "init_lora_weights", f"{start} changes the weights of the base, too, so its file is needed")
    rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
    if kind == "LORA" and (type(rank) is not int or rank < 1):
        raise _fault(file, "r", f"the rank is {rank}")
    if kind == "LORA" and not _is_number(alpha):
        raise _fault(file, "lora_alpha", "alpha is no number")
    patterns = {key: _patterns(data.get(key) or {}, file, key) for key in ("rank_pattern", "alpha_pattern")}
    base, revision = data.get("base_model_name_or_path"), data.get("revision")
    if isinstance(base, str) and isinstance(revision, str) and revision and not Path(base).exists():
        base = f"{base}@{revision}"
    return AdapterConfig(
        file=file,
        kind=kind,
        rank=rank,
        alpha=alpha,
        ranks=patterns["rank_pattern"],
        alphas=patterns["alpha_pattern"],
        rooted=bool(data.get("use_rslora")),
        weight_decomposed=bool(data.get("use_dora")),
        transposed=bool(data.get("fan_in_fan_out")),
        ties=bool(data.get("ensure_weight_tying")),
        base=base if isinstance(base, str) and base else None,
    )


def _patterns(found: Any, file: Path, key: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise _fault(file, key, "it is not a JSON object")
    for pattern in found:
        if not _PATTERN.match(pattern) or pattern.count("(") > _MOST_GROUPS or pattern.count("|") > 30:
            raise _fault(
                file, key, f"the pattern {pattern[:80]} is no name, and longer or repeating ones are not matched"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise _fault(file, key, f"the pattern {pattern[:80]} is wrong: {error}") from None
    return found


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, from a dot on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _fault(file: Path, key: str | None, message: str) -> InputError:
    return InputError(
        "E0409",
        f"the adapter cannot be used: {message}",
        places=Place(file=str(file), key=key),
        fix="fold it into its base with the library that made it, and name the result",
    )
