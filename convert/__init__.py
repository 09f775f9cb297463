"""Conversion between Hugging Face checkpoints and this program's own: `convert(source, destination)`.

`mapping` is the table of tensors, `reader` and `writer` the two sides of it.
"""

import dataclasses
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from granite_jax import checkpoint as checkpoints
from granite_jax._tree import flatten
from granite_jax.convert import mapping, reader, writer
from granite_jax.errors import CheckpointError

__all__ = ["Report", "convert"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Fields:
      kind: of the destination: "orbax" (this program's own) or "hf".
      tensors: tensors of the Hugging Face side that carry information.
      parameters: their elements by part: encoder, projector, decoder.
      dtype: of the weights written; several are joined by "+".
      bytes: size of the destination's files.
      seconds: wall time.
    """

    kind: Literal["orbax", "hf"]
    tensors: int
    parameters: dict[str, int]
    dtype: str
    bytes: int
    seconds: float


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    dtype: Any = None,
    *,
    names: writer.Names = "released",
    progress: reader.Progress | None = None,
) -> Report:
    """Converts a Hugging Face directory to a checkpoint of this program, or back, by what `source` is.

    The destination appears only once it is complete. Without `dtype`, converting there and back is bit-exact.

    Args:
      source: a directory of either kind, or "demo".
      destination: a directory that does not exist or is empty.
      dtype: "float32" or "bfloat16"; default that of the source.
      names: spelling of tensor names in a Hugging Face destination: "released", or "new" as newer transformers save.
      progress: called with (tensors done, tensors in all).

    Raises:
      CheckpointError: naming the file, directory or tensors at fault.
    """
    started = time.monotonic()
    if names not in ("released", "new"):
        raise CheckpointError(f'names {names!r} is neither "released" nor "new"')
    chosen = None if dtype is None else checkpoints.parse_dtype(dtype)
    opened = checkpoints.open_checkpoint(source)
    if opened.kind == "hf":
        params = reader.read_params(opened.directory, opened.config, chosen, progress)
        config, files = writer.configuration(opened, chosen), writer.companions(opened)
        checkpoints.save(destination, config, params, extra_files=files)
    else:
        params = opened.read()
        with checkpoints.new_directory(destination) as partial:
            writer.export(opened, params, partial, names, chosen, progress=progress)
    seconds = time.monotonic() - started
    return _report("orbax" if opened.kind == "hf" else "hf", params, chosen, Path(destination), seconds)


def _report(
    kind: Literal["orbax", "hf"], params: Mapping[str, Any], dtype: np.dtype | None, directory: Path, seconds: float
) -> Report:
    leaves = flatten(params)
    return Report(
        kind=kind,
        tensors=sum(1 for _ in mapping.hf_tensors(leaves)),
        parameters={part: sum(x.size for x in flatten(tree).values()) for part, tree in sorted(params.items())},
        dtype=dtype.name if dtype else "+".join(sorted({x.dtype.name for x in leaves.values()})),
        bytes=sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        seconds=seconds,
    )
