"""The command line: commands, exit codes, and how errors look.

stdout is the result, everything else goes to stderr. Exit codes: 0 ok, 1 bug, 2 usage, 3 recipe, 4 input, 5 security,
6 numeric, 7 environment, 8 resource, 130 and 143 for SIGINT and SIGTERM.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import tempfile
import traceback
from typing import Any

import typer

from merganser._version import __version__
from merganser.cli._signals import StoppedError, StopSignals, leave_in_time
from merganser.errors import EnvironmentFault, MerganserError, UsageError

__all__ = ["app", "emit", "main"]

app = typer.Typer(
    name="merganser",
    help="Merge fine-tuned models by matching them in their task parameter subspaces.",
    epilog="Exit codes: 0 ok, 1 bug, 2 usage, 3 recipe, 4 input, 5 security, 6 numeric, 7 environment, 8 resource, "
    "130/143 signals. `merganser explain CODE` explains an error.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# newer releases of typer carry their own copy of click, so the class is found through one that both export
_PARSER_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def emit(data: Any) -> None:
    """Print one JSON document on stdout; numbers that JSON does not know become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; the console script passes it to the system.

    Args:
        arguments: the words of the command; None for those of the process, which then also ends soon after a signal.
    """
    if arguments is None:
        return leave_in_time(lambda: main(sys.argv[1:]))
    from merganser.cli import (  # noqa: F401
        advise,
        bench,
        collect,
        diff,
        doctor,
        eval,  # noqa: A004
        explain,
        extract,
        import_,
        inspect,
        merge,
        methods,
        push,
        report,
        schema,
        stats,
        tune,
        verify,
    )

    wants_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with StopSignals():
            code = app(args=arguments, prog_name="merganser", standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
        return int(code or 0)
    except MerganserError as error:
        _report(error, wants_json)
        return error.exit_code
    except StoppedError as stop:
        if wants_json:
            emit({"error": {"code": None, "message": "stopped"}})
        print("stopped", file=sys.stderr)
        return stop.exit_code
    except (BrokenPipeError, SystemExit):  # the parser turns a closed stdout into the second
        _silence_stdout()
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: no traceback reaches the terminal
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _silence_stdout()  # which is full, and would be tried again when the process ends
            _report(EnvironmentFault("E0703", "no space is left for what is printed"), wants_json=False)
            return EnvironmentFault.exit_code
        return _foreign(error, wants_json)


def _silence_stdout() -> None:
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: MerganserError, wants_json: bool) -> None:
    if wants_json:
        emit({"error": error.as_dict()})
    print(f"error{error}", file=sys.stderr)


def _foreign(error: Exception, wants_json: bool) -> int:
    """Usage errors of the parser, and bugs."""
    if isinstance(error, _PARSER_ERROR):
        if wants_json:
            emit({"error": UsageError("E0201", error.format_message()).as_dict()})
        error.show()
        return int(error.exit_code)
    if isinstance(error, typer.Abort):
        return 130
    with tempfile.NamedTemporaryFile("w", prefix="merganser-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    if wants_json:
        emit({"error": {"code": None, "message": f"internal error: {type(error).__name__}", "log": log.name}})
    print(f"internal error: {type(error).__name__}; the details are in {log.name}. Please report it.", file=sys.stderr)
    return 1
