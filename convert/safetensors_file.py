"""The safetensors format, by plain file reads and writes.

The header is checked in full before anything of its size is allocated, so that damage is reported by the tensor's name;
a memory-mapped file would count as resident memory twice. Format (huggingface/safetensors, README): 8 bytes of
header length, little-endian; a JSON header `{name: {dtype, shape, data_offsets}}`; the tensors' bytes, without gaps,
to the end.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from granite_jax.checkpoint.tree import Shape
from granite_jax.errors import CheckpointError

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_HEADER_BYTES = 1 << 24  # a hundred times what the largest model of the family needs
_MAX_AXES = 8
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}


class Tensor(Protocol):
    """A tensor of an open file: only `read` reads its bytes."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype:
        """Raises CheckpointError if weights cannot have the tensor's type."""
        ...

    def read(self) -> np.ndarray:
        """Reads the tensor. Raises CheckpointError naming it if that fails."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Fields:
      path, file: its file, which is open as long as the `ExitStack` that it was opened with.
      start, nbytes: where its bytes are in the file.
    """

    name: str
    path: Path
    shape: Shape
    dtype_name: str
    start: int
    nbytes: int
    file: BinaryIO = dataclasses.field(repr=False, compare=False)

    @property
    def dtype(self) -> np.dtype:
        if self.dtype_name not in DTYPES:
            raise CheckpointError(f"{self.name} is {self.dtype_name}; supported are {', '.join(DTYPES)}")
        return DTYPES[self.dtype_name]

    def read(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        remaining = array.reshape(-1).view(np.uint8).data
        try:
            self.file.seek(self.start)
            while remaining:
                count = self.file.readinto(remaining)  # type: ignore[attr-defined]  # Linux: 2 GiB at most
                if not count:
                    raise CheckpointError(f"{self.path}: cut short while {self.name} was read")
                remaining = remaining[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name} ({error.strerror})") from error
        return array


def open_file(path: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a safetensors file for as long as `stack` is open, and returns its tensors by name.

    Raises:
      CheckpointError: naming the file and, where one is at fault, the tensor.
    """
    try:
        file = stack.enter_context(open(path, "rb", buffering=0))
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({str(error)[:200]})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: not a readable safetensors file (__metadata__ is no object)")
    try:
        entries = [(name, *check_entry(name, entry)) for name, entry in header.items()]
        _check_offsets(entries, size - start)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {
        name: StoredTensor(name, path, shape, dtype_name, start + begin, end - begin, file)
        for name, dtype_name, shape, begin, end in entries
    }


def make_header(tensors: Iterable[tuple[str, np.dtype, Shape]]) -> bytes:
    """A file up to its data: the bytes of these tensors (name, dtype, shape) must follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    names = {dtype: name for name, dtype in (*DTYPES.items(), ("I64", np.dtype("int64")))}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_name(name: Any) -> str:
    """Returns `name` if it is a printable tensor name, else raises CheckpointError."""
    if not isinstance(name, str) or not name.isascii() or not name.isprintable() or not 0 < len(name) <= 256:
        raise CheckpointError(f"{name!a:.100} is no tensor name")
    return name


def check_entry(name: str, entry: Any) -> tuple[str, Shape, int, int]:
    """Dtype, shape, begin and end of a header's entry. Raises CheckpointError naming the tensor."""
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name}: its header is not dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _ITEM_BYTES:
        raise CheckpointError(f"{name}: unknown dtype {dtype_name!a:.40}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(f"{name}: shape {shape!a:.80} is not a list of at most {_MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{name}: data_offsets {offsets!a:.80} are not a begin and an end")
    nbytes, begin, end = math.prod(shape) * _ITEM_BYTES[dtype_name], *offsets
    if end - begin != nbytes:
        raise CheckpointError(f"{name}: {dtype_name} {shape} takes {nbytes} bytes, data_offsets give {end - begin}")
    return dtype_name, tuple(shape), begin, end


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and the position at which the data begin. Raises ValueError or RecursionError."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"{size} bytes cannot hold a header of {length}" if len(prefix) == 8 else f"{size} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, at most {MAX_HEADER_BYTES} are accepted")
    header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!a:.100} is in its header twice")
    return members


def _check_offsets(entries: list[tuple[str, str, Shape, int, int]], size: int) -> None:
    """Tensors must follow each other without gaps or overlaps and end where the file does."""
    expected = 0
    for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != expected:
            raise CheckpointError(f"{name}: begins at byte {begin} of the data, where {expected} is expected")
        if end > size:
            raise CheckpointError(f"{name}: cut short, it ends at byte {end} of the data and the file at {size}")
        expected = end
    if expected != size:
        raise CheckpointError(f"{size - expected} bytes follow the last tensor")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
