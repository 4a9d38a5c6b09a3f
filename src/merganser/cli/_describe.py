"""What the registry says of a method, as data."""

from __future__ import annotations

from typing import Any

from merganser.methods import Method, option_info

__all__ = ["method_data"]


def method_data(cls: type[Method]) -> dict[str, Any]:
    """Everything that is known of a method, from its class."""
    about = cls.about
    low, high = cls.arity
    count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    needs = [f"{count} model{'' if count == '1' else 's'}", *(("a base",) if "base" in cls.needs else ())]
    return {
        "name": cls.name,
        "aliases": list(cls.aliases),
        "title": about.title,
        "equation": about.equation,
        "source": about.source,
        "needs": ", ".join(needs),
        "cost": f"reads every weight {about.passes} time{'' if about.passes == 1 else 's'}",
        "helps": about.helps,
        "hurts": about.hurts,
        "deviations": about.deviations,
        "options": [
            {
                "name": name,
                "default": field.default,
                "values": option_info(field).bounds,
                "help": option_info(field).help,
                "per_model": option_info(field).per_model,
            }
            for name, field in cls.options().items()
        ],
    }
