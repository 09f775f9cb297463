"""Weights on disk: an Orbax `params/` directory and, beside it, `tensors.json` with a hash of every tensor.

Orbax alone loads a flipped byte silently. SHA-256 is computed over the tensor's bytes in row-major order, and is the
fastest of hashlib's cryptographic hashes where processors have instructions for it. Leaves are written and read one by
one: a checkpoint is never in memory as a whole unless the caller collects it.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp

from granite_jax.array_types import Shape
from granite_jax.checkpoint.tree import check_shapes, flatten, raise_named, unflatten
from granite_jax.errors import CheckpointError
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json

PARAMS, TENSORS = "params", "tensors.json"
_MARKER = "commit_success.txt"
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "bfloat16", "float16")}
# Leaves are written and read together up to this size: every call adds files or time.
_GROUP_BYTES = 1 << 28
# Zeros compress a thousandfold, weights hardly: a small file must not be able to claim all memory.
_MAX_COMPRESSION, _FREE_BYTES = 16, 1 << 26

Leaves = Iterable[tuple[str, Any]]  # dotted path, array


def write(directory: Path, leaves: Leaves, expected: Mapping[str, Shape]) -> dict[str, dict[str, Any]]:
    """Writes `params/` and `tensors.json` into an existing directory, and returns the content of the latter.

    Raises:
      CheckpointError: naming leaves that are not `expected`, missing, misshapen, or of a dtype that is not supported;
        naming `params/` if it cannot be written.
    """
    records: dict[str, dict[str, Any]] = {}
    group: dict[str, np.ndarray] = {}
    context = ocp.Context()
    context.array.saving.use_compression = False  # compression saves little and doubles the time
    with context:
        for name, leaf in leaves:
            array = np.asarray(leaf)
            check_shapes({name: array.shape}, {name: expected[name]} if name in expected else {})
            raise_named("unsupported dtype:", [f"{name} {array.dtype}"] if array.dtype.name not in DTYPES else [])
            records[name] = record(array)
            group[name] = array
            if sum(x.nbytes for x in group.values()) > _GROUP_BYTES:
                _orbax(directory, "write", ocp.partial.save, unflatten(group))
                group = {}
        raise_named("missing:", [name for name in expected if name not in records])
        if group:
            _orbax(directory, "write", ocp.partial.save, unflatten(group))
        _orbax(directory, "write", ocp.partial.finalize)
    if (marker := directory / PARAMS / _MARKER).exists():
        marker.write_text("complete\n", encoding="utf-8")  # Orbax writes the path of a directory that is renamed later
    text = json.dumps(records, indent=1, sort_keys=True)
    (directory / TENSORS).write_text(text + "\n", encoding="utf-8")
    return records


def record(array: np.ndarray) -> dict[str, Any]:
    """`{"shape", "dtype", "sha256"}` of a leaf."""
    contiguous = np.ascontiguousarray(array)
    digest = hashlib.sha256(contiguous.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def read(
    directory: Path, expected: Mapping[str, Shape], verify: bool = True, paths: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads leaf by leaf into host memory: dotted path and numpy array of the dtype it was saved in.

    Args:
      expected: shape of every leaf of the checkpoint.
      verify: check every leaf against its hash.
      paths: the leaves to read; default all.

    Raises:
      CheckpointError: naming the leaves that are not `expected` or, with `verify`, do not match their hash.
    """
    dtypes = stored_dtypes(directory, expected)
    paths = list(dtypes if paths is None else paths)
    records = _read_records(directory, expected, dtypes, paths) if verify else {}
    for group in _groups(paths, {path: math.prod(expected[path]) * dtypes[path].itemsize for path in dtypes}):
        abstract = {path: np.broadcast_to(np.zeros((), dtypes[path]), expected[path]) for path in group}
        leaves = flatten(_load(directory, abstract))
        for path in group:
            leaf = leaves.pop(path)
            if verify and record(leaf) != records[path]:
                raise CheckpointError(f"{directory}: damaged (hash differs from {TENSORS}): {path}")
            yield path, leaf
            del leaf  # before the next one is allocated


def read_into(
    directory: Path, expected: Mapping[str, Shape], dtype: np.dtype, shardings: Mapping[str, jax.sharding.Sharding]
) -> Any:
    """Reads the leaves that `shardings` names by dotted path straight into devices, cast to `dtype`, unverified."""
    stored_dtypes(directory, expected)
    abstract = {
        path: jax.ShapeDtypeStruct(expected[path], dtype, sharding=sharding) for path, sharding in shardings.items()
    }
    return _load(directory, abstract)


def stored_dtypes(directory: Path, expected: Mapping[str, Shape]) -> dict[str, np.dtype]:
    """Checks the stored tree against `expected` before anything is loaded; the dtype of every leaf by dotted path."""
    size = paths.check_links(directory / PARAMS)
    tree = _orbax(directory, "read", ocp.metadata).metadata
    if not isinstance(tree, Mapping):  # Orbax only logs that its manifest is damaged
        raise CheckpointError(f"{directory / PARAMS}: holds no parameter tree that Orbax can read")
    try:
        metadata = flatten(tree)
        check_shapes({path: tuple(getattr(leaf, "shape", ())) for path, leaf in metadata.items()}, expected)
        dtypes = {path: str(np.dtype(leaf.dtype)) for path, leaf in metadata.items()}
        raise_named("unsupported dtype:", [f"{path} {name}" for path, name in dtypes.items() if name not in DTYPES])
        declared = sum(math.prod(expected[path]) * DTYPES[name].itemsize for path, name in dtypes.items())
        if declared > _MAX_COMPRESSION * size + _FREE_BYTES:
            raise CheckpointError(f"declares {declared} bytes of tensors, its files hold {size}")
    except CheckpointError as error:
        raise CheckpointError(f"{directory / PARAMS}: {error}") from None
    return {path: DTYPES[name] for path, name in dtypes.items()}


def leaf_shapes(directory: Path) -> dict[str, Shape]:
    """The shapes of the leaves by dotted path, as the directory says; no weights are read.

    Raises CheckpointError if neither `tensors.json` nor Orbax's own metadata can be read.
    """
    if (path := paths.find(directory, TENSORS)) is not None:
        records = read_json(path)
        shapes = {name: record.get("shape") for name, record in records.items() if isinstance(record, Mapping)}
    else:
        tree = _orbax(directory, "read", ocp.metadata).metadata
        shapes = {name: list(x.shape) for name, x in flatten(tree if isinstance(tree, Mapping) else {}).items()}
    valid = {name: tuple(shape) for name, shape in shapes.items() if isinstance(shape, list)}
    return {name: shape for name, shape in valid.items() if all(type(size) is int for size in shape)}


def _groups(paths: list[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """`paths` in order, in runs of at most `_GROUP_BYTES` or of one leaf."""
    group, total = [], 0
    for path in paths:
        if path in group or (group and total + sizes[path] > _GROUP_BYTES):
            yield group
            group, total = [], 0
        group.append(path)
        total += sizes[path]
    if group:
        yield group


def _read_records(
    directory: Path, expected: Mapping[str, Shape], dtypes: Mapping[str, np.dtype], names: list[str]
) -> dict[str, Any]:
    """Reads `tensors.json` and checks that it describes this checkpoint's leaves."""
    path = paths.find(directory, TENSORS)
    if path is None:
        raise CheckpointError(
            f"{directory / TENSORS}: no such file; without it damage goes unnoticed (verify=False loads nevertheless)"
        )
    stored = read_json(path)
    try:
        raise_named("no hash for", [name for name in names if not isinstance(stored.get(name), Mapping)])
        described = {name: {"shape": list(expected[name]), "dtype": dtypes[name].name} for name in names}
        differ = [name for name in names if {**stored[name], "sha256": 0} != {**described[name], "sha256": 0}]
        raise_named(f"not what {TENSORS} describes:", differ)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return stored


def _load(directory: Path, abstract: Mapping[str, Any]) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return _orbax(directory, "read", ocp.load, unflatten(abstract))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax and tensorstore from printing a traceback for each array when a disk is full.

    After a failure, tensorstore's threads go on for a while, and find the event loop of their writes closed.
    """
    logger, previous = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
        sys.unraisablehook = previous
    finally:
        logger.setLevel(level)


def _orbax(directory: Path, verb: str, function: Callable[..., Any], *arguments: Any) -> Any:
    path = directory.resolve() / PARAMS
    try:
        with _quiet():
            return function(str(path), *arguments)
    except Exception as error:  # Orbax and tensorstore raise many types for damaged files and full disks
        reason = (str(error).splitlines() or [""])[0]
        if len(reason) > 400:  # the cause is at either end, or given as an error number of the system
            number = re.search(r"os_error_code='(\d{1,4})'", reason)
            reason = f"{reason[:200]} ... {os.strerror(int(number[1])) if number else reason[-200:]}"
        raise CheckpointError(f"{path}: Orbax cannot {verb} it ({type(error).__name__}: {reason})") from error
