"""Weights on disk: an Orbax `params/` directory and, beside it, `tensors.json` with a hash of every tensor.

Orbax alone loads a flipped byte silently. SHA-256 is computed over the tensor's bytes in row-major order, and is the fastest
of hashlib's cryptographic hashes where processors have instructions for it.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp

from granite_jax._tree import Shape, check_shapes, expected_shapes, flatten, raise_named, unflatten
from granite_jax.config import Config, read_json
from granite_jax.errors import CheckpointError

PARAMS, TENSORS = "params", "tensors.json"
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "bfloat16", "float16")}


def write(directory: Path, config: Config, params: Mapping[str, Any]) -> None:
    """Writes `params/` and `tensors.json` into an existing directory.

    Raises:
      CheckpointError: naming leaves that do not belong to `config`, or of a dtype that is not supported.
    """
    leaves = flatten(params)
    check_shapes({path: leaf.shape for path, leaf in leaves.items()}, expected_shapes(config))
    raise_named("unsupported dtype:", [f"{path} {x.dtype}" for path, x in leaves.items() if x.dtype.name not in DTYPES])
    ocp.save(str(directory.resolve() / PARAMS), dict(params))
    text = json.dumps(tensor_records(params), indent=1, sort_keys=True)
    (directory / TENSORS).write_text(text + "\n", encoding="utf-8")


def tensor_records(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted path -> `{"shape", "dtype", "sha256"}` of every leaf."""

    def record(leaf: Any) -> dict[str, Any]:
        array = np.ascontiguousarray(np.asarray(leaf))
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        return {"shape": list(leaf.shape), "dtype": array.dtype.name, "sha256": digest}

    leaves = flatten(params)
    # hashlib releases the interpreter lock; a few threads keep up with the disk.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(leaves, pool.map(record, leaves.values()), strict=True))


def read(directory: Path, config: Config, verify: bool = True) -> dict[str, Any]:
    """Reads all weights into host memory, as numpy arrays of the dtype they were saved in.

    Raises:
      CheckpointError: naming the leaves that do not belong to `config` or, with `verify`, do not match their hash.
    """
    dtypes = _stored_dtypes(directory, config)
    shapes = expected_shapes(config)
    abstract = {path: np.broadcast_to(np.zeros((), dtype), shapes[path]) for path, dtype in dtypes.items()}
    params = _orbax(directory, lambda path: ocp.load(path, unflatten(abstract)))
    if verify:
        _check_records(directory, tensor_records(params))
    return params


def read_into(directory: Path, config: Config, dtype: np.dtype, shardings: Mapping[str, jax.sharding.Sharding]) -> Any:
    """Reads unverified weights straight into devices, cast to `dtype`; `shardings` by dotted path."""
    _stored_dtypes(directory, config)
    shapes = expected_shapes(config)
    abstract = {path: jax.ShapeDtypeStruct(shapes[path], dtype, sharding=shardings[path]) for path in shapes}
    return _orbax(directory, lambda path: ocp.load(path, unflatten(abstract)))


def _stored_dtypes(directory: Path, config: Config) -> dict[str, np.dtype]:
    """Checks the stored tree against `config` before anything is loaded; the dtype of every leaf by dotted path."""
    tree = _orbax(directory, lambda path: ocp.metadata(path).metadata)
    if not isinstance(tree, Mapping):  # Orbax only logs that its manifest is damaged
        raise CheckpointError(f"{directory / PARAMS}: holds no parameter tree that Orbax can read")
    metadata = flatten(tree)
    shapes: dict[str, Shape] = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in metadata.items()}
    try:
        check_shapes(shapes, expected_shapes(config))
        dtypes = {path: str(np.dtype(leaf.dtype)) for path, leaf in metadata.items()}
        raise_named("unsupported dtype:", [f"{path} {name}" for path, name in dtypes.items() if name not in DTYPES])
    except CheckpointError as error:
        raise CheckpointError(f"{directory / PARAMS}: {error}") from None
    return {path: DTYPES[name] for path, name in dtypes.items()}


def _check_records(directory: Path, found: Mapping[str, Any]) -> None:
    path = directory / TENSORS
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; without it damage goes unnoticed (verify=False loads nevertheless)"
        )
    stored = read_json(path)
    try:
        raise_named("no hash for", [name for name in found if name not in stored])
        raise_named("damaged (hash differs from tensors.json):", [n for n in found if found[n] != stored[n]])
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _orbax(directory: Path, read: Callable[[str], Any]) -> Any:
    path = directory.resolve() / PARAMS
    try:
        return read(str(path))
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever they trip over in damaged files.
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: Orbax cannot read it ({type(error).__name__}: {reason[:300]})") from error
