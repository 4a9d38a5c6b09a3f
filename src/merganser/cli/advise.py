"""``merganser advise``."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, settle_process
from merganser.errors import escape

_MARKS = {"good": "ok  ", "note": "note", "warning": "warn", "bad": "BAD ", "stop": "STOP"}


@app.command(epilog="Example: merganser advise math code chat --base llama")
def advise(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Two or more fine-tuned models.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")],
    json: Json = False,
) -> None:
    """Say from the weights alone whether models merge well, why, and which command to run next."""
    from merganser.advice import advice_data
    from merganser.advice import advise as look

    settle_process()
    advice = look(models, base=base)
    if json:
        emit(advice_data(advice))
        return
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    print(advice.summary)
    for finding in advice.findings:
        _show(f"  {_MARKS[finding.level.value]}  {finding.about:<12}  ", finding.text, width)
        if finding.fix and finding.level.value != "good":
            _show(" " * 22, f"-> {finding.fix}", width)
    for item in advice.suggestions:
        _suggestion(item, width)
    if advice.next:
        print(f"\nnext: {advice.next}")


def _suggestion(item: Any, width: int) -> None:
    print(f"\nWith {item.title}: {', then '.join(item.methods)}")
    for claim in item.evidence:
        _show("  ", f"{claim.text} [{claim.source}]", width)
    for command in item.commands:
        print(f"    {command}")


def _show(head: str, text: str, width: int) -> None:
    """A paragraph whose lines hang below its head; words of the models' are made safe for the terminal."""
    lines = textwrap.wrap(text, max(20, width - len(head)), break_on_hyphens=False) or [""]
    print(head + f"\n{' ' * len(head)}".join(escape(line) for line in lines))
