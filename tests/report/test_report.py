"""Reports: their structure, what is escaped, what is not in them, and what is wrong with their input."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.report import write_report
from merganser.report._redact import without_private_parts
from tests.conftest import Cli
from tests.helpers import State, llama_state, read_model, write_model
from tests.report.documents import TASKS, bench_data, eval_data, tune_data, write
from tests.report.page import Page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></style><b>",
    "evil\x1b[31mred",
    "\u202egpj.exe",
    "$\\frac{1}{0}$ & {{ 7*7 }} {% raw %}",
    "n" * 10_000,
    "=HYPERLINK(1)",
    "模型 نموذج 🦆",
)


def moved(base: State, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * torch.randn(w.shape, generator=g) for name, w in base.items()}


@pytest.fixture
def merge(tmp_path: Path, cli: Cli) -> Path:
    base = write_model(tmp_path / "base", llama_state(0))
    models = [write_model(tmp_path / f"m{seed}", moved(llama_state(0), seed)) for seed in (1, 2, 3)]
    arguments = ("merge", "-m", "mats", "-s", "objective=identity", "-s", "preconditioner=none", "-b", base, *models)
    cli(*arguments, "-o", tmp_path / "merged", "-q").succeeded()
    return tmp_path / "merged"


def check(page: Page) -> None:
    """What holds for every report."""
    assert page.source.startswith("<!DOCTYPE html>")
    assert len(page.source.encode()) < 3_000_000
    assert page.references() == set()
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in page.all("a") + page.all("use") if link.get("href", "").startswith("#")}
    targets |= {link["xlink:href"][1:] for link in page.all("use") if "xlink:href" in link}
    assert targets <= set(ids)
    for tag, attributes in page.tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    images = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) == len(page.all("svg")) == len(page.all("figure"))
    assert all(len(image["aria-label"]) > 30 for image in images)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert len(page.all(kind)) == 1
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("data", "pictures", "said"),
    [
        (tune_data(), 6, ["11 trials by grid, of which 1 failed", "merged values are not finite", "400"]),
        (bench_data(), 7, ["The best merge is MaTS", "95.6 % of the experts", "the statistics do not fit"]),
        (eval_data(), 1, ["a label is none of the model's", "cola"]),
    ],
    ids=["tune", "bench", "eval"],
)
def test_results(data: dict[str, Any], pictures: int, said: list[str], tmp_path: Path, cli: Cli) -> None:
    path = write(tmp_path / "results.json", data)
    made = cli("report", path, "-o", tmp_path / "out.html", "--json").succeeded().json
    assert made["pictures"] == pictures
    assert made["bytes"] == (tmp_path / "out.html").stat().st_size
    page = Page(tmp_path / "out.html")
    check(page)
    assert len(page.all("figure")) == pictures
    for text in said:
        assert text in page.text
    assert "/home" not in page.source


def test_a_merge(merge: Path, tmp_path: Path, cli: Cli) -> None:
    """Cosines, conflicts, norms, coefficients, spectra, overlap, residuals and objectives."""
    cli("report", merge, "-o", tmp_path / "out.html").succeeded()
    page = Page(tmp_path / "out.html")
    check(page)
    assert len(page.all("figure")) == 8
    tables = page.tables()
    cosines = [row.split(",") for row in tables["cosines.csv"].splitlines()]
    assert cosines[0] == ["", "m1", "m2", "m3", "merged"]
    states = {name: states_of(tmp_path / name) for name in ("base", "m1", "m2", "m3", "merged")}
    vectors = {n: torch.cat([(s[k] - states["base"][k]).flatten() for k in s]).double() for n, s in states.items()}
    for row in cosines[1:]:
        for name, value in zip(cosines[0][1:], row[1:], strict=True):
            wanted = torch.nn.functional.cosine_similarity(vectors[row[0]], vectors[name], dim=0)
            assert float(value) == pytest.approx(float(wanted), abs=1e-6)
    coefficients = [row.split(",") for row in tables["coefficients-in-merged-and-the-share-explained.csv"].splitlines()]
    for row in coefficients[1:]:  # the identity metric averages
        assert [float(value) for value in row[1:4]] == pytest.approx([1 / 3] * 3, abs=1e-4)
        assert float(row[4]) == pytest.approx(1.0, abs=1e-4)
    residuals = tables["relative-residual.csv"].splitlines()
    assert len(residuals) > 8
    assert str(tmp_path) not in page.source


def states_of(folder: Path) -> State:
    return read_model(folder)


def test_the_same_run_gives_the_same_bytes(merge: Path, tmp_path: Path) -> None:
    one, two = (write_report(merge, tmp_path / f"{index}.html").out.read_bytes() for index in range(2))
    assert one == two
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_user_settings_of_the_plotting_library_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    path = write(tmp_path / "eval.json", eval_data())
    one = write_report(path, tmp_path / "one.html").out.read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        two = write_report(path, tmp_path / "two.html").out.read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert one == two


def test_hostile_names(tmp_path: Path) -> None:
    """In every place that a name can come to: tasks, rows, models, options, messages."""
    data = tune_data()
    tasks = dict(zip(TASKS, HOSTILE, strict=False))
    text = json.dumps(data)
    for task, name in tasks.items():
        text = text.replace(json.dumps(task), json.dumps(name))
    for word, name in zip(("task_arithmetic", "base", "merged", "grid", "scale"), HOSTILE[4:], strict=True):
        text = text.replace(json.dumps(word), json.dumps(name))
    path = tmp_path / "tune.json"
    path.write_text(text, encoding="utf-8")
    write_report(path, tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    check(page)
    assert "<script>alert(1)</script>" in page.text
    assert not page.all("img")
    assert not page.all("b")
    assert not any(character in page.source for character in "\x1b\u202e\x00")
    for table in page.tables().values():
        assert not [cell for row in table.splitlines() for cell in row.split(",") if cell.strip('"').startswith("=")]


def test_a_merge_with_hostile_names(tmp_path: Path, cli: Cli) -> None:
    names = ["<b>&amp;", "evil\x1b[0m\u202e", "$x$ {{ y }}"]
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.eye(8) for name in names})
    models = [
        write_model(tmp_path / folder, {f"{name}.weight": torch.eye(8) + seed * torch.rand(8, 8) for name in names})
        for seed, folder in ((0.1, "<i>one"), (0.2, "two & three"))
    ]
    cli("merge", "-m", "ties", "-b", base, *models, "-o", tmp_path / "merged", "-q").succeeded()
    cli("report", tmp_path / "merged", "-o", tmp_path / "out.html").succeeded()
    page = Page(tmp_path / "out.html")
    check(page)
    assert not page.all("b")
    assert not page.all("i")
    assert "<i>one" in page.text
    assert len(page.all("figure")) == 6


def test_large_results_are_cut_to_size(tmp_path: Path) -> None:
    steps = [{"name": "expert", "state": "done", "seconds": 81.0, "error": None}] * 5_000
    data = {"format": "merganser-bench", "version": 1, "steps": steps}
    write_report(write(tmp_path / "bench.json", data), tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    check(page)
    assert "of 5000 rows" in page.text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no file /home/ann/models/base/x.safetensors here", "no file x.safetensors here"),
        ("`/data/My Models/base` is missing", "`base` is missing"),
        (r"C:\Users\ann\base is missing", "base is missing"),
        ("~/secret/base", "base"),
        ("hf_abcdefghijklmnopqrstu", "…"),
        ("token=abcdef123", "token=…"),
        ("https://ann:pw@example.org/a?key=1", "https://example.org/a"),
        ("file:///home/ann/x", "x"),
        ("org/name and 3/4 and a/b", "org/name and 3/4 and a/b"),
        ("arXiv:2312.04339", "arXiv:2312.04339"),
    ],
)
def test_private_parts_are_left_out(text: str, left: str) -> None:
    assert without_private_parts(text) == left


def test_inputs_that_are_not_there(merge: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "m1").rename(tmp_path / "elsewhere")
    cli("report", merge, "-o", tmp_path / "out.html").succeeded()
    assert "the models m1 were not found; give all with --model" in Page(tmp_path / "out.html").text
    given = ("--model", tmp_path / "elsewhere", "--model", tmp_path / "m2", "--model", tmp_path / "m3")
    cli("report", merge, "-o", tmp_path / "out.html", "--overwrite", *given).succeeded()
    page = Page(tmp_path / "out.html")
    check(page)
    assert "elsewhere" in page.text
    assert len(page.all("figure")) == 8


def test_a_model_that_changed_its_shape_is_not_taken(merge: Path, tmp_path: Path, cli: Cli) -> None:
    write_model(tmp_path / "m1", llama_state(0, layers=3))
    cli("report", merge, "-o", tmp_path / "out.html").succeeded()
    assert "the models m1 were not found" in Page(tmp_path / "out.html").text


@pytest.mark.parametrize(
    ("contents", "code", "word"),
    [
        ("{", "E0414", "JSON"),
        ("[1]", "E0414", "no JSON object"),
        ('{"format": "other"}', "E0414", "no result of merganser"),
        ('{"format": "merganser-eval", "version": 2}', "E0414", "another version"),
        ('{"format": "merganser-eval", "version": 1, "tasks": 3}', "E0414", "`tasks` is no object"),
        ('{"format": "merganser-eval", "version": 1, "tasks": {"a": {"value": "x"}}}', "E0414", "tasks.a.value"),
        ('{"format": "merganser-tune", "version": 1, "trials": [1]}', "E0414", "trials[0]"),
        ('{"format": "merganser-bench", "version": 1, "summary": {}}', "E0414", "`summary` is no list"),
        ('{"format": "merganser-eval", "version": 1, "mean": {"value": NaN}}', "E0414", "JSON"),
    ],
)
def test_damaged_results(contents: str, code: str, word: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "run.json").write_text(contents)
    cli("report", tmp_path / "run.json", "-o", tmp_path / "out.html").failed(code, word, tmp_path / "run.json")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("kind", ["eval", "tune", "bench"])
def test_results_without_contents(kind: str, tmp_path: Path) -> None:
    made = write_report(write(tmp_path / "r.json", {"format": f"merganser-{kind}", "version": 1}), tmp_path / "o.html")
    assert made.pictures == 0
    check(Page(made.out))


def test_outputs(tmp_path: Path, cli: Cli) -> None:
    run, out = write(tmp_path / "r.json", eval_data()), tmp_path / "o.html"
    cli("report", tmp_path / "none", "-o", out).failed("E0401", "none")
    cli("report", tmp_path, "-o", out).failed("E0401", "neither merge.lock.json nor results.json")
    cli("report", run, "-o", tmp_path / "no" / "o.html").failed("E0703")
    out.write_text("mine")
    cli("report", run, "-o", out).failed("E0701", "--overwrite")
    assert out.read_text() == "mine"
    cli("report", run, "-o", tmp_path, "--overwrite").failed("E0701")
    cli("report", run, "-o", out, "--overwrite").succeeded()
    cli("report", run, "-o", tmp_path / "p.html", "--base", "x").failed("E0201")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages(package: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "r.json", {"format": "merganser-eval", "version": 1})
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert importlib.util.find_spec("merganser.report")
    cli("report", run, "-o", tmp_path / "o.html").failed("E0704", package, "pip install 'merganser[report]'")
    assert not (tmp_path / "o.html").exists()
