"""What is derived from the registry is up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from merganser.cli._describe import methods_page, methods_table
from merganser.errors import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_of_methods_is_that_of_the_registry() -> None:
    """Made anew by `merganser methods --markdown > docs/methods.md`."""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods_page()


def test_the_readme_lists_the_methods() -> None:
    assert methods_table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_code_has_a_text_that_ends_as_a_sentence() -> None:
    assert all(text.endswith(".") for text in CATALOGUE.values())


def test_the_example_of_a_method_runs() -> None:
    """The code of docs/extending.md, as it stands there."""
    import torch

    import merganser as mg

    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    assert match[1].count("\n") < 40
    scope: dict[str, Any] = {"__name__": __name__}
    exec(match[1].replace(', name="consent"', ""), scope)  # unnamed, so that it does not join the registry
    method = scope["Consent"]
    method.name = "consent"
    base = {"w": torch.zeros(3)}
    models = [{"w": torch.tensor([1.0, 1.0, -1.0])}, {"w": torch.tensor([1.0, -1.0, -1.0])}]
    merged = mg.merge(models, base=base, method=method(agreement=1.0))
    assert merged["w"].tolist() == [1.0, 0.0, -1.0]
