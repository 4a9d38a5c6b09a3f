"""One exception tree. Every error has a code, a place, a cause and a fix.

The first two digits of a code are the exit code of its class, so ``E0402`` is an input error and ends the command
line with status 4. ``merganser explain CODE`` prints the catalogue entry.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = [
    "CATALOGUE",
    "FIXES",
    "EnvironmentFault",
    "InputError",
    "MerganserError",
    "NumericError",
    "Place",
    "RecipeError",
    "ResourceError",
    "SecurityError",
    "UsageError",
    "escape",
    "nearest",
    "suggestion",
]

CATALOGUE: dict[str, str] = {
    "E0201": "The command line is incomplete or contradicts itself.",
    "E0202": "There is no method, command or error code of that name.",
    "E0203": "A model is to be published whose card states no licence, a special one, or one that forbids commercial "
    "use. Who publishes it has to say that this was considered.",
    "E0301": "The recipe file cannot be read as YAML: wrong syntax, wrong encoding, or beyond the limits on size, "
    "depth and aliases.",
    "E0302": "The recipe has a key that does not exist. Unknown keys are refused, because a misspelt key that is "
    "ignored gives another model than the one asked for.",
    "E0303": "A required key of the recipe is missing, or two keys exclude each other.",
    "E0304": "There is no merge method of that name.",
    "E0305": "The method has no option of that name.",
    "E0306": "The value of an option is of the wrong kind or out of its range.",
    "E0307": "The weights are unusable: one is not a finite number, their count differs from the number of models, "
    "or they sum to zero where they must be normalised.",
    "E0308": "The method needs something that was not given (a base model, a certain number of models).",
    "E0309": "A filter of the recipe matches no tensor, or leaves a required option without a value.",
    "E0310": "The layer range of a slice does not exist in the model, or the slices do not fit together.",
    "E0311": "The data type is unknown or cannot hold merged weights.",
    "E0312": "The solver does not fit the metric: a preconditioned or exact solution needs damping, or a closed form.",
    "E0401": "The model was not found, or the folder holds no weights that can be read.",
    "E0402": "A safetensors file is damaged: truncated, with a broken header, or with bytes that belong to no tensor.",
    "E0403": "The file is not a safetensors file, whatever its name says.",
    "E0404": "The index of a sharded checkpoint is damaged, or names a shard or tensor that does not exist.",
    "E0405": "A tensor is missing in one of the models.",
    "E0406": "A tensor exists in only some of the models.",
    "E0407": "A tensor has different shapes in the models.",
    "E0408": "The weights are quantised or of a data type that cannot be merged as numbers.",
    "E0409": "config.json is missing, damaged, or describes another architecture.",
    "E0410": "The models have nothing to merge: no tensor in common, or no tensor at all.",
    "E0411": "The models predict different label sets, so their heads cannot be merged.",
    "E0412": "An input changed while it was read.",
    "E0413": "The vocabulary or tokenizer of the models differs.",
    "E0414": "A data file cannot be read: not UTF-8, not JSON lines, truncated, or of another kind.",
    "E0415": "An example of the data lacks a value that is needed, or has one of the wrong kind.",
    "E0416": "A label of the data is out of the model's range, or is not one of its labels.",
    "E0417": "The data hold no example.",
    "E0418": "A statistics file is damaged, of another format version, or does not fit the model or the other files.",
    "E0419": "Statistics of this kind cannot be collected from this model.",
    "E0420": "The optimizer state does not fit the model, or holds no second moment of Adam.",
    "E0421": "The earlier merge cannot be continued: its lock file does not say how, the base is another one, or its "
    "weights were changed.",
    "E0422": "The models were pruned with different masks, so their average has fewer zeros than each of them.",
    "E0423": "An output is not as its merge wrote it: a file is missing, was added or was changed, or the lock file "
    "was. `merganser verify` names them.",
    "E0424": "A merge from a lock file does not give the weights that the lock file describes: an input or a version "
    "is another one.",
    "E0425": "A task does not fit the model: its kind, its head, or what the model returns.",
    "E0426": "Examples that a merge was tuned on are among those that it is to be reported on. A figure on them would "
    "say how well the search fitted these examples, not how good the merge is.",
    "E0501": "A path inside a checkpoint points outside its folder.",
    "E0502": "The weights are stored as a pickle, which can run code when it is read.",
    "E0503": "The model needs code from its folder, which is never run.",
    "E0601": "The weights contain values that are not finite.",
    "E0602": "The merged weights are not finite although the inputs are: the result overflows its data type.",
    "E0603": "A statistic, or the loss that it is made from, is not finite.",
    "E0604": "A statistic has values that it cannot have: a negative Fisher, an asymmetric or indefinite Gram matrix.",
    "E0605": "A linear system was not solved to its tolerance, and the merge was to be strict about that.",
    "E0606": "A score is not finite.",
    "E0607": "No trial of a search succeeded, so there is nothing to choose.",
    "E0701": "The output already exists, or cannot be created.",
    "E0702": "The output is one of the inputs, or lies inside one.",
    "E0703": "A file cannot be read or written: permission denied, or another error of the operating system.",
    "E0704": "A package that this command needs is not installed.",
    "E0705": "The model is not on this machine, and is not downloaded implicitly.",
    "E0706": "The device does not exist, or torch was built without it.",
    "E0707": "The command that evaluates candidates failed, or printed no number.",
    "E0708": "The model hub cannot be reached, or did not take what was pushed.",
    "E0801": "The disk has too little free space for the output.",
    "E0802": "The merge does not fit the memory budget.",
    "E0803": "The disk filled up, or another resource ran out, while writing.",
}

FIXES: dict[str, str] = {
    "E0201": "see --help of the command",
    "E0301": "correct the file; `merganser explain E0301` lists the limits",
    "E0302": "correct or remove the key; docs/recipes.md lists all keys",
    "E0303": "correct the key; docs/recipes.md shows the form of every key",
    "E0305": "see `merganser explain METHOD` for its options",
    "E0306": "see `merganser explain METHOD` for the values of its options",
    "E0307": "give every model one finite number, not all zero, e.g. weight: 0.5",
    "E0308": "see `merganser explain METHOD` for what it needs",
    "E0309": "give the option a value without a filter, for all other tensors",
    "E0310": "give every source of a slice the same number of existing layers, e.g. layer_range: [0, 8]",
    "E0401": "correct the path; a model is a folder with config.json and safetensors weights, or a safetensors file",
    "E0404": "download the model again, or export it anew",
    "E0405": "use models of the same architecture, or exclude the tensor (`exclude:`, --exclude)",
    "E0406": "use models of the same architecture, or exclude the tensor (`exclude:`, --exclude)",
    "E0408": "convert the model to bf16, f16 or f32 first",
    "E0409": "use models of one architecture, each with its own config.json",
    "E0410": "name models of the same architecture that have weights",
    "E0412": "run the command again when nothing else writes the file",
    "E0414": 'write one JSON object per line as UTF-8, e.g. {"text": "...", "label": 0}; .gz is read too',
    "E0415": "correct or remove the line",
    "E0417": "add examples, one JSON object per line",
    "E0418": "collect the statistics again with `merganser collect`",
    "E0419": "load the model yourself in Python, and pass the module",
    "E0501": "do not use this checkpoint unless you know why it does that",
    "E0701": "choose another output path",
    "E0703": "check the path and its permissions",
}
"""What to do about an error where its place says nothing better."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is wrong: a file, and inside it a tensor, a key or a line, with what was found there."""

    file: str | None = None
    tensor: str | None = None
    key: str | None = None
    line: int | None = None
    found: str | None = None

    def __str__(self) -> str:
        where = escape(self.file) if self.file else ""
        if self.line is not None:
            where = f"{where or 'line'}:{self.line}" if where else f"line {self.line}"
        inner = self.key or self.tensor
        parts = [where, escape(inner) if inner else "", escape(self.found) if self.found else ""]
        return "  ".join(part for part in parts if part)


class MerganserError(Exception):
    """An error with a code, the places it concerns, a cause and a fix.

    Args:
        code: entry of `CATALOGUE`.
        message: one line that says what is wrong, foreign names included as they are.
        places: where; the first one is what the JSON output names.
        why: the cause, if it is more than the message says.
        fix: what to do; the one of the code if empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, code: str, message: str, *, places: Sequence[Place] | Place = (), why: str = "", fix: str = ""
    ) -> None:
        self.code = code
        self.message = message
        self.places: tuple[Place, ...] = (places,) if isinstance(places, Place) else tuple(places)
        self.why = why
        self.fix = fix or FIXES.get(code, "")
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"[{self.code}] {escape(self.message)}"]
        lines += [f"  --> {place}" for place in self.places if str(place)]
        if self.why:
            lines.append(f"  why: {escape(self.why)}")
        if self.fix:
            lines.append(f"  fix: {escape(self.fix)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The error as the `--json` output shows it: plain strings, unescaped (JSON escapes them itself)."""
        first = self.places[0] if self.places else Place()
        return {
            "code": self.code,
            "message": self.message,
            "file": first.file,
            "tensor": first.tensor,
            "key": first.key,
            "line": first.line,
            "why": self.why,
            "fix": self.fix,
            "places": [
                {"file": p.file, "tensor": p.tensor, "key": p.key, "line": p.line, "found": p.found}
                for p in self.places
            ],
        }


class UsageError(MerganserError, ValueError):
    """The command line or call is incomplete (exit code 2)."""

    exit_code = 2


class RecipeError(MerganserError, ValueError):
    """The recipe, or the options of a method, are wrong (exit code 3)."""

    exit_code = 3


class InputError(MerganserError, ValueError):
    """A model or data file is wrong (exit code 4)."""

    exit_code = 4


class SecurityError(MerganserError):
    """A file asks for something dangerous, and is refused (exit code 5)."""

    exit_code = 5


class NumericError(MerganserError, ArithmeticError):
    """Values are not finite, or a computation did not succeed (exit code 6)."""

    exit_code = 6


class EnvironmentFault(MerganserError):
    """Permission, existing output, missing package, no network (exit code 7)."""

    exit_code = 7


class ResourceError(MerganserError):
    """Too little disk space or memory (exit code 8)."""

    exit_code = 8


def escape(text: str) -> str:
    r"""Foreign text made safe for a terminal: control, format and bidirectional characters become ``\x1b`` etc.

    Newlines inside foreign names are escaped too; a text over 300 characters is shortened in its middle.
    """
    if len(text) > 300:
        text = f"{text[:200]}...({len(text)} characters)...{text[-60:]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(ch if _is_shown(ch) else ch.encode("unicode_escape").decode() for ch in text)


def _is_shown(ch: str) -> bool:
    category = unicodedata.category(ch)
    return category[0] != "C" and category not in ("Zl", "Zp")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was probably meant to be, or None."""
    pool = {c.lower().replace("-", "_"): c for c in candidates}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(pool), n=1, cutoff=0.6)
    return pool[close[0]] if close else None


_LONGEST_LIST = 1000
"""Characters of names beyond which they are not listed."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """A sentence that names the nearest candidate, or lists all of them where none is near."""
    known = sorted(candidates)
    close = nearest(name, known)
    if close is not None:
        return f"did you mean `{close}`?"
    listed = ", ".join(known)
    return f"known: {listed}" if len(listed) <= _LONGEST_LIST else ""
