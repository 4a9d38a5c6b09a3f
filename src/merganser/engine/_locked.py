"""Doing a merge again from its lock file, and checking that it gives the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.checkpoint import describe_file, name_of_folder, open_checkpoint, parts_of_reference
from merganser.engine._lock import LOCK_FILE, read_lock
from merganser.engine._provenance import describe_data, digest_files, versions
from merganser.errors import InputError, MerganserError, Place, escape
from merganser.recipe import Recipe, recipe_from

__all__ = ["Locked", "open_locked"]

_SHOWN = 20


@dataclass(frozen=True)
class Locked:
    """A merge as a lock file describes it, with its inputs found.

    Attributes:
        file: the lock file.
        recipe: the recipe, with the paths of the inputs here.
        settings: how the files are laid out, and what else changes the bytes.
        threads: how many there were.
        files: of every weight file of the earlier output its digests.
        differences: versions that are other ones here.
    """

    file: Path
    recipe: Recipe
    settings: Mapping[str, Any]
    threads: int
    files: Mapping[str, Any]
    differences: tuple[str, ...]

    def check(self, files: Mapping[str, Any]) -> None:
        """Compare the digests of new weight files with those of the earlier output.

        Raises:
            InputError: E0424, with the tensors that differ.
        """
        places = []
        for name in sorted({*files, *self.files}):
            new, old = (table.get(name, {}) for table in (files, self.files))
            tensors = [key for key in old.get("tensors", {}) if new.get("tensors", {}).get(key) != old["tensors"][key]]
            places += [Place(file=name, tensor=tensor, found="other values") for tensor in tensors]
            if not tensors and new != old:
                places.append(Place(file=name, found="other names, types or shapes"))
        if places:
            raise InputError(
                "E0424",
                f"the merge does not give the weights of {self.file}: {len(places)} tensors or files differ",
                places=places[:_SHOWN],
                why="; ".join(self.differences)
                or "the inputs differ where their digests do not look, or the machine computes otherwise",
                fix="use the same versions, and record whole inputs with --hash-inputs when you merge",
            )


def open_locked(path: str | os.PathLike[str], models: Sequence[str] = ()) -> Locked:
    """Read a lock file, and find its inputs.

    Every input is looked for among `models` by its name, then here, beside the folder of the lock file, and in the
    local Hugging Face cache; it must have the digests that the lock file gives.

    Args:
        path: a lock file, or the folder that it is in.
        models: paths of inputs that are elsewhere: models, statistics files and data.

    Raises:
        InputError: E0423 (the lock file is damaged), E0424 (an input is another one, or the merge cannot be repeated),
            E0401 (an input is not found).
    """
    file = Path(path) / LOCK_FILE if Path(path).is_dir() else Path(path)
    lock = read_lock(file)
    if lock.get("normalised") is None:
        raise InputError(
            "E0424",
            "the merge cannot be repeated from its lock file: it had models, statistics, data or options in memory",
            places=Place(file=str(file)),
        )
    finder = _Finder(file, models)
    try:
        found = [finder.model(entry) for entry in lock["inputs"]]
        statistics = [finder.statistics(entry) for entry in lock["statistics"]]
        data = [finder.data(entry) for entry in lock.get("data", ())]
        recipe = recipe_from(lock["normalised"], found.__getitem__, statistics.__getitem__, data.__getitem__)
        files = {name: entry for name, entry in lock["files"].items() if "tensors" in entry}
        now = {"merganser": __version__, **versions()}
        differences = tuple(
            f"{key} is {value} here, and was {lock[key]}" for key, value in now.items() if lock[key] != value
        )
        return Locked(file, recipe, lock["settings"], int(lock["threads"]), files, differences)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, MerganserError):
            raise
        raise InputError(
            "E0424", "the lock file is of another version of merganser", places=Place(file=str(file))
        ) from None


class _Finder:
    """Finds the files of a lock file's entries."""

    def __init__(self, lock: Path, given: Sequence[str]) -> None:
        self._lock = lock
        self._given = given

    def _candidates(self, entry: Mapping[str, Any]) -> list[str]:
        name = str(entry["name"])
        found = [path for path in self._given if _title(path) == name]
        for folder in (Path(), self._lock.absolute().parent.parent):
            whole = (folder / name).exists()
            paths = [folder / part for part in ([name] if whole else name.split("+"))]
            found += ["+".join(map(str, paths))] if all(path.exists() for path in paths) else []
        given = [next((path for path in self._given if _title(path) == part), None) for part in name.split("+")]
        found += ["+".join(path for path in given if path)] if len(given) > 1 and None not in given else []
        parts = zip(str(entry.get("repo", "")).split("+"), str(entry.get("commit", "")).split("+"), strict=False)
        return found + (["+".join(f"{repo}@{commit}" for repo, commit in parts)] if "repo" in entry else [])

    def _choose(self, entry: Mapping[str, Any], differs: Callable[[str], Place | None]) -> str:
        """The first candidate that is what the entry describes."""
        faults = []
        for candidate in self._candidates(entry):
            fault = differs(candidate)
            if fault is None:
                return candidate
            faults.append(fault)
        if faults:
            raise InputError(
                "E0424",
                f"the input `{escape(str(entry['name']))}` is not the one that was merged",
                places=faults,
                fix="restore the file, or name the right one behind the lock file",
            )
        raise InputError(
            "E0401",
            f"the input `{escape(str(entry['name']))}` of the lock file is not found",
            places=Place(file=str(self._lock)),
            fix="name it: merganser merge --locked LOCK PATH... -o OUT",
        )

    def model(self, entry: Mapping[str, Any]) -> str:
        """The path of a model.

        Raises:
            InputError: E0424, E0401.
        """

        def differs(candidate: str) -> Place | None:
            try:
                checkpoint = open_checkpoint(candidate)
            except MerganserError as error:
                return Place(file=candidate, found=error.message)
            if not checkpoint.files():
                return Place(file=candidate, found="has no files")
            recorded = entry["files"]
            whole = all("sha256" in known for known in recorded.values())
            paths = checkpoint.named_files()
            if paths.keys() != recorded.keys():
                return Place(file=candidate, found="has other weight files")
            digests = digest_files(paths.values(), 2, whole=whole)
            for name, path in paths.items():
                if digests[path] != recorded[name]:
                    return Place(file=str(path), found="has other contents")
            return None

        if not entry["files"]:
            raise InputError("E0424", "an input was in memory", places=Place(file=str(self._lock)))
        return self._choose(entry, differs)

    def statistics(self, entry: Mapping[str, Any]) -> str:
        """The path of a statistics file.

        Raises:
            InputError: E0424, E0401.
        """

        def differs(candidate: str) -> Place | None:
            try:
                found = describe_file(Path(candidate), whole="sha256" in entry)
            except MerganserError as error:
                return Place(file=candidate, found=error.message)
            return None if found.items() <= entry.items() else Place(file=candidate, found="has other contents")

        return self._choose(entry, differs)

    def data(self, entry: Mapping[str, Any]) -> str:
        """The path of the data of a task.

        Raises:
            InputError: E0424, E0401.
        """

        def differs(candidate: str) -> Place | None:
            try:
                found = describe_data(candidate)
            except MerganserError as error:
                return Place(file=candidate, found=error.message)
            return (
                None if found | {"name": entry["name"]} == entry else Place(file=candidate, found="has other contents")
            )

        if entry.keys() == {"name"}:
            raise InputError("E0424", "the data of a task were in memory", places=Place(file=str(self._lock)))
        return self._choose(entry, differs)


def _title(reference: str) -> str:
    """What the lock file calls a model: the last part of its path, and those of its adapters."""
    parts = parts_of_reference(reference)
    return "+".join(name_of_folder(Path(part if Path(part).exists() else part.partition("@")[0])) for part in parts)
