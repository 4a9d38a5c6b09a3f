"""Files that are not what their names say, told by their first bytes."""

from __future__ import annotations

from merganser.errors import InputError, Place, SecurityError

__all__ = ["pickle_refused", "refuse_other_kinds"]

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"gguf", "a GGUF file", "get the model's original safetensors weights"),
    (b"<!doctype html", "an HTML page", "download the file again; the address gave a web page"),
    (b"<html", "an HTML page", "download the file again; the address gave a web page"),
    (b"<?xml", "an XML page", "download the file again; the address gave an error message"),
    (b"{", "a JSON text", "download the file again; the address may have given an error message"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89hdf\r\n", "an HDF5 file", "get the model's safetensors weights, or convert it"),
    (b"\x93numpy", "a NumPy array", "save the model's tensors as safetensors"),
)


def refuse_other_kinds(prefix: bytes, file: str) -> None:
    """Refuse a file whose first bytes are those of another format.

    Raises:
        InputError: E0403.
        SecurityError: E0502, a pickle or an archive that may hold one.
    """
    text = prefix.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, kind, fix in _MAGIC:
        if text.startswith(magic):
            raise InputError("E0403", f"the file is {kind}", places=Place(file=file), fix=fix)
    old_pickle = prefix[:1] == b"\x80" and prefix[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if old_pickle or prefix.startswith(b"PK\x03\x04"):
        raise pickle_refused(file)


def pickle_refused(file: str) -> SecurityError:
    """The error for weights in a pickle, which are never opened."""
    return SecurityError(
        "E0502",
        "the weights are a pickle, which can run code when it is read; they are not opened",
        places=Place(file=file),
        fix="get the model's safetensors weights, or convert the file yourself where you trust its author",
    )
