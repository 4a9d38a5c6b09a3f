"""``merganser push``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, Threads, format_size
from merganser.errors import EnvironmentFault, MerganserError, Place, UsageError, escape

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)$|\.(safetensors|bin)\.index\.json$|(^|/)adapter_config\.json$"
)
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")


@app.command(epilog="Example: merganser push merged me/my-merge --dry-run")
def push(
    folder: Annotated[str, typer.Argument(help="The output folder of a merge.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is public. [default: private]")] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Push although the card's licence is missing, special or NC.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of a repository that has weights already.")
    ] = False,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload a merged model",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed, and send nothing.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Upload a merge to the Hugging Face hub: just the files of its lock file, and only if they are as it wrote them.

    The card (README.md) may have been edited. A new repository is private; the token is that of `hf auth login`.
    """
    from merganser.checkpoint import CARD
    from merganser.engine import needs_decision, read_card, verify

    if not _REPOSITORY.match(repo):
        raise UsageError("E0201", f"`{repo}` is not the name of a repository: ORG/NAME")
    verify(folder, threads=threads, edited=(CARD,))
    root = Path(folder)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    total = sum((root / name).stat().st_size for name in files)
    card = read_card(root)
    doubt = needs_decision(card)
    data: dict[str, Any] = {
        "repo": repo,
        "files": files,
        "bytes": total,
        "license": card.get("license"),
        "doubt": doubt,
        "pushed": False,
    }
    if not dry_run:
        if doubt is not None and not accept_license:
            raise UsageError(
                "E0203",
                f"nothing was pushed, because {doubt}",
                places=Place(file=str(root / CARD), key="license"),
                fix="write the licence into the head of README.md, or pass --accept-license",
            )
        with _hub_errors():
            data |= _upload(root, repo, files, public=public, overwrite=overwrite, message=message)
    if json:
        emit(data)
        return
    for name in files if dry_run else ():
        print(f"{format_size((root / name).stat().st_size):>8}  {escape(name)}")
    what = f"{len(files)} files, {format_size(total)}"
    if doubt is not None:
        print(f"licence: {escape(doubt)}" + ("; pushing needs --accept-license" if dry_run else ""))
    print(f"{what} would be pushed to {escape(repo)}" if dry_run else f"{what}: {escape(data['url'])}")


def _upload(
    root: Path, repo: str, files: Sequence[str], *, public: bool, overwrite: bool, message: str
) -> Mapping[str, Any]:
    """Make the repository if it is not there, and commit all files at once."""
    hub = _hub()
    api = hub.HfApi(library_name="merganser")
    api.create_repo(repo, private=not public, exist_ok=True)
    there = api.model_info(repo)
    present = [sibling.rfilename for sibling in there.siblings or []]
    weights = [name for name in present if _WEIGHTS.search(name)]
    if weights and not overwrite:
        raise EnvironmentFault(
            "E0701",
            f"{repo} has a model already",
            places=Place(file=weights[0]),
            fix="choose another name, or pass --overwrite",
        )
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(root / name)) for name in files]
    operations += [hub.CommitOperationDelete(path_in_repo=name) for name in weights if name not in files]
    done = api.create_commit(repo, operations, commit_message=message, parent_commit=there.sha)
    return {"pushed": True, "url": str(done.commit_url), "commit": done.oid, "private": bool(there.private)}


def _hub() -> Any:
    """The package, imported when something is pushed.

    Raises:
        EnvironmentFault: E0704, it is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise EnvironmentFault(
            "E0704", "pushing needs the package huggingface_hub", why=str(error), fix="pip install 'merganser[hf]'"
        ) from None


@contextmanager
def _hub_errors() -> Iterator[None]:
    """What the package says of the network, the token or the repository, as an error of ours.

    Raises:
        EnvironmentFault: E0708.
    """
    try:
        yield
    except MerganserError:
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ValueError):
            raise  # a bug; the package raises its own errors, and those of its HTTP client
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise EnvironmentFault(
            "E0708",
            "the hub did not take the model" + (f" (status {status})" if status else ""),
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="log in with a token that may write (hf auth login)"
            if status in (401, 403)
            else "check the name of the repository and the network",
        ) from None
