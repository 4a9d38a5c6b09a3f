"""The command line, one file per command."""

from merganser.cli._app import main

__all__ = ["main"]
