"""`merganser push`, to a hub that runs here."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.engine import read_card
from tests.conftest import Cli
from tests.helpers import Result, write_files, write_model

pytest.importorskip("huggingface_hub")


class Hub:
    """What the hub knows: repositories, their files, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.refuses = 0
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, data: Any, status: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = b""
                while size := int(self.rfile.readline(), 16):
                    parts += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return parts
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            hub.asked.append(f"GET {self.path}")
            repo = "/".join(self.path.partition("/api/models/")[2].split("/")[:2])
            siblings = [{"rfilename": name} for name in hub.files.get(repo, {})]
            self.answer({"id": repo, "sha": "0" * 40, "private": hub.private.get(repo), "siblings": siblings})

        def do_POST(self) -> None:
            hub.asked.append(f"POST {self.path}")
            body = self.body()
            if hub.refuses:
                self.answer({"error": "no"}, hub.refuses)
            elif self.path.endswith("/repos/create"):
                data = json.loads(body)
                repo = f"{data.get('organization') or 'me'}/{data['name']}"
                hub.private.setdefault(repo, data.get("private", False) or data.get("visibility") == "private")
                hub.files.setdefault(repo, {})
                self.answer({"url": f"{hub.url}/{repo}", "name": repo})
            elif self.path.endswith("/validate-yaml"):
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                self.answer(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            elif "/commit/" in self.path:
                repo = "/".join(self.path.partition("/api/models/")[2].split("/")[:2])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    if line["key"] == "deletedFile":
                        del hub.files[repo][line["value"]["path"]]
                self.answer(
                    {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'1' * 40}"}
                )
            else:
                self.answer({"error": self.path}, 404)

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def merged(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed=seed, files={"README.md": "---\nlicense: apache-2.0\n---\n# a model\n"})
    cli("merge", "-m", "average", "a", "b", "-o", "merged").succeeded()
    return tmp_path / "merged"


def push(hub: Hub, *words: Any, **environment: str) -> Result:
    variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "merganser", "push", *map(str, words)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "hf_secret" not in done.stdout + done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_private_repository_gets_every_file(merged: Path, hub: Hub) -> None:
    found = push(hub, merged, "me/model", "--json").succeeded().json
    assert hub.files == {"me/model": on_disk(merged)}
    assert hub.private == {"me/model": True}
    assert (found["pushed"], found["private"], found["license"]) == (True, True, "apache-2.0")
    assert found["url"].startswith(hub.url)


def test_a_public_one(merged: Path, hub: Hub) -> None:
    assert "me/model/commit" in push(hub, merged, "me/model", "--public").succeeded().out
    assert hub.private == {"me/model": False}


def test_a_dry_run_asks_nobody(merged: Path, hub: Hub) -> None:
    out = push(hub, merged, "me/model", "--dry-run").succeeded().out
    assert all(name in out for name in on_disk(merged))
    assert "would be pushed to me/model" in out
    assert hub.asked == []


def test_only_what_the_merge_wrote_is_pushed(merged: Path, hub: Hub) -> None:
    write_files(merged, {"secret.txt": "x"})
    push(hub, merged, "me/model").failed("E0423", "secret.txt")
    (merged / "secret.txt").unlink()
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    push(hub, merged, "me/model").failed("E0423", "model.safetensors")
    assert hub.asked == []


def test_the_card_may_be_edited(merged: Path, hub: Hub) -> None:
    card = merged / "README.md"
    card.write_text(card.read_text() + "\nMade for a test.\n")
    push(hub, merged, "me/model").succeeded()
    assert hub.files["me/model"]["README.md"].endswith(b"Made for a test.\n")


@pytest.mark.parametrize(
    ("head", "word"),
    [
        ("", "no licence"),
        ("license: other\nlicense_name: llama", "llama"),
        ("license: cc-by-nc-4.0", "commercial"),
        ("license: [CC-BY-NC-SA-4.0]", "commercial"),
        ("license: [mit, cc-by-nc-4.0]", "special"),
        ("license: fair-noncommercial-research-license", "commercial"),
    ],
)
def test_a_licence_that_needs_a_decision(head: str, word: str, merged: Path, hub: Hub) -> None:
    (merged / "README.md").write_text(f"---\n{head}\n---\n# merged\n")
    push(hub, merged, "me/model").failed("E0203", word, "--accept-license")
    assert word in push(hub, merged, "me/model", "--dry-run").succeeded().out
    assert hub.asked == []
    push(hub, merged, "me/model", "--accept-license").succeeded()


def test_a_repository_with_a_model_is_replaced_only_if_that_is_said(merged: Path, hub: Hub) -> None:
    push(hub, merged, "me/model").succeeded()
    old = ("model-00001-of-00002.safetensors", "adapter_config.json", "pytorch_model.bin", "x/model.bin.index.json")
    for name in old:
        hub.files["me/other"] = {name: b"old"}
        push(hub, merged, "me/other").failed("E0701", "--overwrite")
    hub.files["me/model"] |= {**dict.fromkeys(old, b"old"), "notes.md": b"kept"}
    push(hub, merged, "me/model").failed("E0701", "--overwrite")
    push(hub, merged, "me/model", "--overwrite").succeeded()
    assert hub.files["me/model"] == {**on_disk(merged), "notes.md": b"kept"}


@pytest.mark.parametrize(("status", "word"), [(401, "hf auth login"), (403, "hf auth login"), (500, "network")])
def test_a_hub_that_refuses(status: int, word: str, merged: Path, hub: Hub) -> None:
    hub.refuses = status
    push(hub, merged, "me/model").failed("E0708", word)


def test_no_network(merged: Path, hub: Hub) -> None:
    push(hub, merged, "me/model", HF_HUB_OFFLINE="1").failed("E0708")
    assert hub.asked == []
    for name in ("not a name", "model", "a/b/c"):
        push(hub, merged, name).failed("E0201", "ORG/NAME")
    push(hub, merged, "me/model", HF_ENDPOINT="http://127.0.0.1:9").failed("E0708", "network")


# --- the card ---------------------------------------------------------------------------------------------------------


def card_of(folder: Path, cli: Cli, *heads: dict[str, Any] | str) -> tuple[dict[str, Any], str, str]:
    """The metadata, the text and the messages of a merge of models with these cards."""
    names = []
    for seed, head in enumerate(heads):
        text = head if isinstance(head, str) else f"---\n{yaml.safe_dump(head)}---\n"
        write_model(folder / f"m{seed}", seed=seed, files={"README.md": text})
        names.append(folder / f"m{seed}")
    result = cli("merge", "-m", "average", *names, "-o", folder / "out").succeeded()
    return dict(read_card(folder / "out")), (folder / "out" / "README.md").read_text(), result.err.replace("\n", " ")


def test_a_licence_that_all_parents_have(tmp_path: Path, cli: Cli) -> None:
    found, text, said = card_of(tmp_path, cli, {"license": "mit"}, {"license": ["mit"]})
    assert found["license"] == "mit"
    assert "| `m1` | mit |" in text
    assert "licences" not in said


def test_licences_that_differ(tmp_path: Path, cli: Cli) -> None:
    found, text, said = card_of(tmp_path, cli, {"license": "mit"}, {"license": "other", "license_name": "llama3"}, "#")
    assert (found["license"], found["license_name"]) == ("other", "those-of-the-parents")
    assert all(row in text for row in ("| `m0` | mit |", "| `m1` | llama3 |", "| `m2` | not stated |"))
    assert "different licences" in said


def test_a_special_licence_that_all_parents_have_stays_special(tmp_path: Path, cli: Cli) -> None:
    special = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/LICENSE"}
    found, text, said = card_of(tmp_path, cli, special, special)
    assert special.items() <= found.items()
    assert "| `m1` | llama3 |" in text
    assert "licences" not in said


def test_a_parent_without_a_folder_states_no_licence(tmp_path: Path, cli: Cli) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed=seed, files={"README.md": "---\nlicense: mit\n---\n"})
    file = tmp_path / "b" / "model.safetensors"
    cli("merge", "-m", "average", tmp_path / "a", file, "-o", tmp_path / "out").succeeded()
    assert read_card(tmp_path / "out")["license"] == "other"
    assert "| `model.safetensors` | not stated |" in (tmp_path / "out" / "README.md").read_text()


def test_languages_data_sets_and_task(tmp_path: Path, cli: Cli) -> None:
    first = {"language": "en", "datasets": ["glue"], "pipeline_tag": "text-generation"}
    found, _, _ = card_of(tmp_path, cli, first, {"language": ["de", "en"], "pipeline_tag": "other"})
    assert found["language"] == ["en", "de"]
    assert found["datasets"] == ["glue"]
    assert found["pipeline_tag"] == "text-generation"
    assert "license" not in found


@pytest.mark.parametrize(
    "text",
    [
        "---\n- a\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: mit\n",
        "---\na: &a {x: 1}\n" + "".join(f"a{i}: &a {{<<: [*a, *a]}}\n" for i in range(200)) + "---\n",
        "---\n" + "[" * 30_000 + "\n---\n",
        "---\nlicense: {a: 1}\nlanguage: {b: 2}\ndatasets: [[x], 3, 'a|b']\npipeline_tag: 'x\n y'\n---\n",
        '---\nlicense: "a | b\\n# c `d`"\n---\n',
        "\0",
    ],
)
def test_cards_of_strangers_do_no_harm(text: str, tmp_path: Path, cli: Cli) -> None:
    found, card, _ = card_of(tmp_path, cli, text, {"license": "mit"})
    assert found["library_name"] == "transformers"
    assert "\n# c" not in card
    assert "language" not in found
    assert "pipeline_tag" not in found
