"""Reports in a real browser: nothing on the console, nothing asked of the network, and tables that sort."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from merganser.report import write_report
from tests.report.documents import tune_data, write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-features=NetworkTimeServiceQuerying",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--window-size=1150,4000",
]
OWN = re.compile(r"https?://[\w.-]+\.(google|googleapis|gstatic)\.com[/:]")
"""What the browser asks for by itself, whatever the page is."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

CLICKS = """
const table = Array.from(document.querySelectorAll("table")).find((t) => t.caption.textContent === "Trials");
const column = (index) => Array.from(table.tBodies[0].rows).map((row) => row.cells[index].textContent).join(" ");
const seen = [column(0)];
table.tHead.rows[0].cells[0].querySelector("button").click();
table.tHead.rows[0].cells[0].querySelector("button").click();
seen.push(column(0), table.tHead.rows[0].cells[0].getAttribute("aria-sort"));
document.title = seen.join(" | ");
"""


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The page's document after it has loaded, and what the browser logged."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_report(write(tmp_path / "tune.json", tune_data()), tmp_path / "report.html").out


def test_no_message_and_no_request(page: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    _, messages = browse(page, tmp_path / "profile", "--dump-dom", f"--log-net-log={log}")
    assert "CONSOLE" not in messages
    assert "Content Security Policy" not in messages
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text(encoding="utf-8", errors="replace")))
    assert not [url for url in asked if not OWN.match(url)]


def test_a_foreign_script_and_a_request_are_refused(page: Path, tmp_path: Path) -> None:
    """The policy works: the same page with something smuggled in complains, and does not run it."""
    smuggled = '<script>document.title = "taken"</script><img alt="" src="https://example.org/x.png"></body>'
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", smuggled), encoding="utf-8")
    document, messages = browse(page, tmp_path / "profile", "--dump-dom")
    assert "<title>taken</title>" not in document
    assert messages.count("Content Security Policy") >= 2


def test_tables_sort(page: Path, tmp_path: Path) -> None:
    """By a script of the test's own, for which the policy is taken away."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    page.write_text(source.replace("</body>", f"<script>{CLICKS}</script></body>"), encoding="utf-8")
    document, messages = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in messages
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None
    assert title[1] == "0 1 2 3 4 5 6 7 8 9 10 | 10 9 8 7 6 5 4 3 2 1 0 | descending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_drawn(scheme: str, page: Path, tmp_path: Path) -> None:
    """Each scheme has its ground, and the drawings put many colours on it."""
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, tmp_path / "profile", f"--screenshot={shot}", *dark)
    with image.open(shot) as drawn:
        pixels = drawn.convert("RGB").resize((230, 800))
        counts = sorted(pixels.getcolors(230 * 800), reverse=True)
    assert counts[0][1] == ((255, 255, 255) if scheme == "light" else (21, 24, 27))
    assert any(blue > 120 and red < 60 for _, (red, _, blue) in counts)
    assert len(counts) > 500
