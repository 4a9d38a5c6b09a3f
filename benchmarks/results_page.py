"""A page of the results of suites: their tables as Markdown, and the report's pictures as files beside it.

    python -m benchmarks.results_page NAME=OUT/results.json ... -o docs/results.md

replaces what follows the line `<!-- generated -->` of the page, and writes `docs/results-NAME-PICTURE.svg`. Every
figure is read from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.report._bench import bench_document
from merganser.report._record import Record

COLOURS = "svg { --ink: #101112; --line: #a1a2a3; --ground: #fdfcfb; background: #fdfcfb }"
MARK = "<!-- generated -->"
SECTIONS = ("Result", "Cost and generalisation", "Number of models")
USES = {"none": "-", "unlabelled": "inputs", "labelled": "labels"}


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="NAME=FILE", help="results.json of `merganser bench`")
    parser.add_argument("--out", "-o", type=Path, required=True, help="the page, whose text stays")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="whose pictures are drawn; all by default")
    given = parser.parse_args()
    parts = []
    for word in given.results:
        name, _, file = word.partition("=")
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        parts.append("\n".join(page(name, found, pictures(name, found, given.out, given.section or SECTIONS))))
    text, mark, _ = given.out.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        parser.error(f"{given.out} has no line {MARK}")
    given.out.write_text(f"{text}{mark}\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def pictures(name: str, found: Mapping[str, Any], out: Path, chosen: Sequence[str]) -> list[tuple[str, str, str]]:
    """Writes the pictures of some sections; their files, titles and descriptions."""
    written = []
    sections = bench_document(Record(found, name)).sections
    for section in [section for section in sections if section.title in chosen]:
        for picture in section.pictures:
            kind = re.sub(r"[^a-z]+", "-", picture.title.lower()).strip("-")
            file = out.with_name(f"{out.stem}-{name}-{kind}.svg")
            file.write_text(alone(picture.svg), encoding="utf-8")
            written.append((file.name, picture.title, picture.alt))
    return written


def alone(svg: str) -> str:
    """An element of a report's page as a file: with the namespace and the colours that the page gives it."""
    element, rest = svg.split(">", 1)
    if " xmlns=" not in element:
        element += ' xmlns="http://www.w3.org/2000/svg"'
    return f"{element}><style>{COLOURS}</style>{rest}\n"


def page(name: str, found: Mapping[str, Any], drawn: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """The lines of one suite."""
    scale = 1 if any(task["kind"] == "perplexity" for task in found["tasks"]) else 100
    labels = {row["id"]: labels_of(found["rows"], row["id"]) for row in found["summary"]}
    yield f"## {name}"
    yield ""
    columns = ("row", "uses", "held in", "95 %", "over seeds", "% of experts", "held out")
    costs = ("statistics CPU s", "merge CPU s", "tuning CPU s")
    yield f"| {' | '.join((*columns, *costs, 'labels', 'seeds'))} |"
    yield "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in sorted(found["summary"], key=lambda row: -row["held_in"]["mean"]):
        held, share, out = row["held_in"], row["held_in_normalised"], row["held_out"]
        cells = [
            f"*{row['label']}*" if row["kind"] == "baseline" else row["label"],
            USES[row["data"]],
            shown(held["mean"], scale),
            f"{shown(held['interval'][0], scale)} to {shown(held['interval'][1], scale)}",
            shown(held["spread"], scale),
            shown(None if share is None else share["mean"], 100),
            shown(None if out is None else out["mean"], scale),
            *(shown(row["cpu_seconds"][part] or None) for part in ("statistics", "merge", "tuning")),
            str(labels[row["id"]] or ""),
            str(row["seeds"]),
        ]
        yield f"| {' | '.join(cells)} |"
    failed = [row for row in found["rows"] if row["error"] is not None]
    if failed:
        yield ""
        said = [f"{row['label']} (seed {row['seed']}): {row['error']['message']}" for row in failed]
        yield f"Failed: {'; '.join(said)}."
    for file, title, alt in drawn:
        yield ""
        yield f"![{title}. {alt}]({file})"


def labels_of(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    """The labelled examples that a row's search looked at."""
    own = [row["cost"]["tuning"]["labels"] for row in rows if row["id"] == name and row["cost"] and row["draw"] is None]
    return max(own, default=0)


def shown(value: float | None, scale: float = 1) -> str:
    """A number with one digit behind the point."""
    return "" if value is None or math.isnan(value) else f"{scale * value:.{1 if scale == 100 or value >= 1 else 2}f}"


if __name__ == "__main__":
    main()
