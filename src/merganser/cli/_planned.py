"""A plan, as the commands show it."""

from __future__ import annotations

from typing import Any

from merganser.errors import escape

__all__ = ["coverage", "plan_data", "rule_text", "type_name"]


def type_name(dtype: Any) -> str:
    """As users write it."""
    return str(dtype).removeprefix("torch.")


def rule_text(tensor: Any) -> str:
    """What becomes of a tensor, in words."""
    from merganser.engine import describe_method

    if tensor.method is None:
        return f"copy: {escape(tensor.reason)}"
    options = ", ".join(f"{key}={value}" for key, value in describe_method(tensor.method)["options"].items())
    weights = ", ".join(f"{weight:g}" for weight in tensor.weights)
    return f"{tensor.method.name}({options}) of {len(tensor.inputs)} models, weights {weights}"


def coverage(made: Any) -> dict[str, Any]:
    """What is merged, what is copied and why, and what is left out."""
    return {
        "merged": len(made.tensors) - len(made.copies()),
        "copied": {t.spec.name: t.reason for t in made.copies()},
        "left_out": dict(made.omitted),
    }


def plan_data(made: Any) -> dict[str, Any]:
    """A plan as JSON."""
    from merganser.engine import describe_method, is_layerwise

    return {
        "tensors": [
            {
                "name": t.spec.name,
                "shape": list(t.spec.shape),
                "dtype": type_name(t.spec.dtype),
                "bytes": t.spec.nbytes,
                "rule": "copy" if t.method is None else t.method.name,
                "options": None if t.method is None else describe_method(t.method)["options"],
                "weights": list(t.weights),
                "inputs": [{"file": i.checkpoint.place_of(i.name), "tensor": i.name} for i in t.inputs],
                "base": t.base and {"file": t.base.checkpoint.place_of(t.base.name), "tensor": t.base.name},
                "reason": t.reason,
            }
            for t in made.tensors
        ],
        "aliases": dict(made.aliases),
        "left_out": dict(made.omitted),
        "dtype": made.dtype_name(),
        "bytes_read": made.bytes_read,
        "bytes_written": made.bytes_written,
        "peak_memory": made.peak_memory,
        "seconds": None if is_layerwise(made.recipe) else made.seconds,
        "threads": made.threads,
        "block_elements": made.block_elements,
        "files_from": made.donor.label,
        "tokenizer_from": made.tokenizer.label,
        "warnings": list(made.warnings),
    }
