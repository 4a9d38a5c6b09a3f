"""Real labelled tasks from data that installed Python packages carry: nothing is downloaded, nothing is copied here."""

from __future__ import annotations

import csv
import gzip
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from examples.demo.tasks import Item, Task, build_task

LIBRARIES = ("networkx", "scipy", "sympy", "torch", "transformers")
CHAPTERS: Mapping[str, str] = {
    "Certain infectious and parasitic diseases": "infection",
    "Neoplasms": "neoplasm",
    "Endocrine, nutritional and metabolic diseases": "metabolic",
    "Diseases of the nervous system": "nervous",
    "Diseases of the circulatory system": "circulatory",
    "Diseases of the digestive system": "digestive",
    "Diseases of the genitourinary system": "genitourinary",
    "Diseases of the musculoskeletal system and connective tissue": "musculoskeletal",
}
LANGUAGES: Mapping[str, str] = {
    "de": "German",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "id": "Indonesian",
    "pl": "Polish",
    "tr": "Turkish",
}
BUILTINS: Mapping[str, str] = {
    "_cocoa_builtins": "Cocoa",
    "_csound_builtins": "Csound",
    "_lasso_builtins": "Lasso",
    "_openedge_builtins": "OpenEdge",
    "_php_builtins": "PHP",
    "_scilab_builtins": "Scilab",
}

_DOCSTRING = re.compile(  # a definition, then its docstring's first sentence, where that is on one line
    r'^[ \t]*(?:async )?(?:def|class) [^"\']{0,600}?:[ \t]*\n'
    r'[ \t]*r?"""\s*(?P<text>[A-Z][^\n"]{30,160}?)\.?(?:\s*\n\s*\n|"""|\.\s)',
    re.MULTILINE,
)
_IDENTIFIER = re.compile(r"`[^`]*`|\{[^}]*\}|\b\w*[a-z][A-Z]\w*|\b\w*[_\d]\w*")


def library() -> Task:
    """First sentence of a docstring: which library is it from?

    Sentences that differ only in the identifiers they name are one group (copied docstrings).
    """
    items = (
        Item(found["text"], name, re.sub(r"\W+", " ", _IDENTIFIER.sub("_", found["text"])).casefold())
        for name in LIBRARIES
        for source in _sources(name)
        for found in _DOCSTRING.finditer(source)
    )
    return build_task("library", "Which library does this docstring document?", _packages(*LIBRARIES), items)


def diagnosis() -> Task:
    """Name of a diagnosis: which chapter of ICD-10-CM is it in? The diagnoses of a category are one group."""
    file = next((_folder("simple_icd_10_cm") / "data").glob("*.xml"))

    def items() -> Iterator[Item]:
        for chapter in ElementTree.parse(file).getroot().iter("chapter"):
            label = CHAPTERS.get(chapter.findtext("desc", "").rpartition(" (")[0])
            for category in chapter.iterfind("section/diag") if label else ():
                for entry in category.iter("diag"):
                    if label and len(entry.findtext("name", "")) <= len("A00.00"):
                        yield Item(entry.findtext("desc", ""), label, category.findtext("name", ""))

    return build_task("diagnosis", "Which chapter of ICD-10-CM is this in?", _packages("simple-icd-10-cm"), items())


def language() -> Task:
    """Name of a country, language, currency or script: which language is the name in? What it names is its group."""
    from babel import Locale

    def items() -> Iterator[Item]:
        for code, label in LANGUAGES.items():
            locale = Locale.parse(code)
            for kind in ("territories", "languages", "currencies", "scripts"):
                for key, text in getattr(locale, kind).items():
                    if len(text) >= 5:
                        yield Item(text, label, f"{kind}/{key}")

    return build_task("language", "Which language is this name in?", _packages("Babel"), items())


def speech() -> Task:
    """Word with one part of speech in the lexicon: which one? Words with the same first letters are one group."""
    parts: dict[str, set[str]] = {}
    with gzip.open(_folder("lemminflect") / "resources" / "lemma_lu.csv.gz", "rt", encoding="utf-8") as file:
        for word, part, _ in csv.reader(file):
            if word.isalpha():
                parts.setdefault(word, set()).add(part)
    single = ((word, *found) for word, found in parts.items() if len(found) == 1 and "aux" not in found)
    items = (Item(word, part, word[:6]) for word, part in single)
    return build_task("speech", "Which part of speech is this word?", _packages("lemminflect"), items)


def identifier() -> Task:
    """Builtin name: which programming language defines it? Names with the same first letters are one group."""

    def items() -> Iterator[Item]:
        for module, label in BUILTINS.items():
            for name, value in vars(importlib.import_module(f"pygments.lexers.{module}")).items():
                for text in _strings(value) if not name.startswith("__") else ():
                    if 5 <= len(text) <= 40 and text.isascii():
                        yield Item(text, label, text.casefold()[:6])

    return build_task("identifier", "Which language is this name built into?", _packages("Pygments"), items())


def sentiment() -> Task:
    """Word of the VADER lexicon: do people rate it positive or negative? Forms of a word are one group."""
    lexicon = _folder("vaderSentiment") / "vader_lexicon.txt"

    def items() -> Iterator[Item]:
        for line in lexicon.read_text(encoding="utf-8").splitlines():
            word, rating = line.split("\t")[:2]
            if word.isalpha() and len(word) >= 3 and abs(float(rating)) >= 0.5:
                yield Item(word, "positive" if float(rating) > 0 else "negative", word[:5])

    return build_task("sentiment", "Is this word positive or negative?", _packages("vaderSentiment"), items())


BUILDERS: tuple[Callable[[], Task], ...] = (library, diagnosis, language, identifier, speech, sentiment)


def build_tasks() -> tuple[Task, ...]:
    """Every task of the demo, in the order of the table's columns."""
    return tuple(build() for build in BUILDERS)


def _folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo needs the package {package!r}: pip install 'merganser[demo]'")
    return Path(spec.submodule_search_locations[0])


def _packages(*names: str) -> str:
    """Names and versions, for the reader and the record."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def _sources(package: str) -> Iterator[str]:
    """The text of every source file of a package, its tests left out."""
    folder = _folder(package)
    for path in sorted(folder.rglob("*.py")):
        if not any(part.startswith("test") for part in path.relative_to(folder).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _strings(value: object) -> Iterator[str]:
    """Every string in nested dictionaries' values, sets, tuples and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, set, frozenset, tuple, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
