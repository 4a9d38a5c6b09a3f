"""What the registry says of a method, as data."""

from __future__ import annotations

from typing import Any

from merganser.methods import Method, all_methods, option_info

__all__ = ["method_data", "methods_page", "methods_table"]


def method_data(cls: type[Method]) -> dict[str, Any]:
    """Everything that is known of a method, from its class."""
    about = cls.about
    low, high = cls.arity
    count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    kinds = ", ".join(sorted(cls.needs - {"base", "data", "evaluator"}))
    needs = [f"{count} model{'' if count == '1' else 's'}", *(("a base",) if "base" in cls.needs else ())]
    needs += ["an evaluator"] if "evaluator" in cls.needs else []
    needs += ["inputs of every task"] if "data" in cls.needs else []
    needs += ["a base if wanted"] if cls.takes_base else []
    needs += [f"statistics ({kinds})"] if kinds else []
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


def _classes() -> list[type[Method]]:
    return [cls for _, cls in sorted({cls.name: cls for cls in all_methods().values()}.items())]


def methods_table() -> str:
    """The table of all methods, as Markdown."""
    lines = ["| method | what it does | needs | source |", "|---|---|---|---|"]
    for cls in _classes():
        data = method_data(cls)
        names = ", ".join(f"`{name}`" for name in (data["name"], *data["aliases"]))
        lines.append(f"| {names} | {data['title']} | {data['needs']} | {data['source']} |")
    return "\n".join(lines) + "\n"


def methods_page() -> str:
    """The reference of all methods and options, as Markdown."""
    lines = [
        "# Methods",
        "",
        "Made from the registry by `merganser methods --markdown`; do not edit.",
        "",
        "Every method takes `weights`, one number per model, default 1 each. `t_i = W_i - W_0` is the task vector of "
        "model i, `W_0` the base, `lambda` the option `scale`.",
        "",
        methods_table(),
    ]
    for cls in _classes():
        data = method_data(cls)
        lines += [f"## {data['name']}", "", f"{data['title']}.", "", f"    {data['equation']}", ""]
        lines += [
            f"- **Source**: {data['source']}",
            f"- **Needs**: {data['needs']}",
            f"- **Cost**: {data['cost']}",
            f"- **Helps**: {data['helps']}",
            f"- **Hurts**: {data['hurts']}",
        ]
        if data["deviations"]:
            lines.append(f"- **Other implementations**: {data['deviations']}")
        lines += ["", "| option | default | values | meaning |", "|---|---|---|---|"]
        for option in data["options"]:
            many = " (or one per model)" if option["per_model"] else ""
            values = option["values"].replace("|", "/") or "number"
            if isinstance(option["default"], bool):
                values = "true, false"
            lines.append(f"| `{option['name']}` | {option['default']} | {values}{many} | {option['help']} |")
        lines.append("")
    return "\n".join(lines)
