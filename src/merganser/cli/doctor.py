"""``merganser doctor``."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, format_size
from merganser.errors import EnvironmentFault, Place, escape

_PROBE = 1 << 26


@app.command(epilog="Example: merganser doctor --path /scratch")
def doctor(
    path: Annotated[str, typer.Option("--path", help="A folder on the disk to measure.")] = ".",
    json: Json = False,
) -> None:
    """Report versions, processor, memory, GPUs and the speed of a disk; 64 MB are written there and removed."""
    import resource

    from merganser._version import __version__
    from merganser.engine import available_cores, versions

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    data: dict[str, Any] = {
        "merganser": __version__,
        **versions(),
        "cores": available_cores(),
        **_memory(),
        "open_files": soft,
        "gpus": _gpus(),
        "disk": _disk(path),
        "extras": _extras(),
    }
    if json:
        emit(data)
        return
    for key in ("merganser", "torch", "safetensors", "numpy", "python", "machine", "cores"):
        print(f"{key:16} {data[key]}")
    print(f"{'memory':16} {format_size(data['memory'])}, {format_size(data['memory_available'])} available")
    print(f"{'open files':16} {data['open_files']}")
    for gpu in data["gpus"]:
        print(f"{'GPU':16} {gpu['name']}, {format_size(gpu['memory'])}")
    if not data["gpus"]:
        print(f"{'GPU':16} none that torch can use")
    disk = data["disk"]
    rates = f"write {format_size(disk['write'])}/s, read {format_size(disk['read'])}/s"
    print(f"{'disk':16} {escape(path)}: {format_size(disk['free'])} free, {rates}")
    print(f"{'extras':16} {', '.join(f'{name} {version}' for name, version in data['extras'].items()) or 'none'}")


def _memory() -> dict[str, int]:
    """Bytes of memory, and those that are available now, in this container as far as it says."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a file of the system
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    return {"memory": total, "memory_available": free}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory": gpu.total_memory} for gpu in found]


def _extras() -> dict[str, str]:
    """Which of the optional packages are installed; none of them is imported."""
    from importlib import metadata

    found = {}
    for name in ("transformers", "peft", "huggingface_hub", "optuna", "ray", "numba"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _disk(path: str) -> dict[str, float]:
    """Free bytes, and bytes per second of a write that waits for the disk and of a read that the cache does not help.

    Raises:
        EnvironmentFault: E0703, the folder cannot be written.
    """
    import shutil
    import tempfile
    import time

    data = os.urandom(_PROBE)
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            started = time.perf_counter()
            written = file.write(data)
            os.fsync(file.fileno())
            write = written / (time.perf_counter() - started)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            read = len(file.read()) / (time.perf_counter() - started)
        return {"free": shutil.disk_usage(path).free, "write": write, "read": read}
    except OSError as error:
        raise EnvironmentFault(
            "E0703", f"the folder cannot be written: {error.strerror}", places=Place(file=path)
        ) from None
