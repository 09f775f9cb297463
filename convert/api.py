"""The conversion itself: `convert(source, destination)`."""

import collections
import dataclasses
import math
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from granite_jax.checkpoint import hub
from granite_jax.checkpoint.directory import COMPANIONS, Checkpoint, parse_dtype
from granite_jax.checkpoint.orbax import record
from granite_jax.checkpoint.save import copy_files, write_weights
from granite_jax.checkpoint.source import local_directory
from granite_jax.checkpoint.tree import Shape, raise_named
from granite_jax.convert import reader, writer
from granite_jax.convert.directory import open_directory
from granite_jax.convert.mapping import SPELLINGS, Spelling
from granite_jax.errors import CheckpointError
from granite_jax.files.atomic import new_directory


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Fields:
      kind: kind of the destination: "orbax" (this program's own) or "hf".
      tensors: number of tensors on the Hugging Face side that carry information.
      parameters: number of their elements by part: encoder, projector, decoder, and lora if there is an adapter.
      dtype: dtype of the written weights; several are joined by "+".
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
    names: Spelling = "released",
    revision: str | None = None,
    verify: bool = False,
    progress: reader.Progress | None = None,
) -> Report:
    """Converts a Hugging Face checkpoint to one of this program, or back, depending on the kind of `source`.

    The destination appears only once it is complete. Without `dtype`, converting there and back is bit-exact. Weights
    are read and written leaf by leaf. Hashes of the source are checked if it has any.

    Args:
      source: a directory of either kind, a hub id, or "demo".
      destination: a directory that does not exist or is empty.
      dtype: "float32" or "bfloat16"; default that of the source.
      names: spelling of tensor names in a Hugging Face destination: "released"; "new", as transformers since 5.10 has
        them; or "nested", as transformers about 5.19 saved them.
      revision: branch, tag or commit of a hub id.
      verify: read everything back before the destination appears, and compare it with the source.
      progress: called with (tensors done, total).

    Raises:
      CheckpointError: naming the file, directory or tensors at fault. A tokenizer or a chat template that is missing or
        damaged is at fault, too.
    """
    started = time.monotonic()
    if names not in SPELLINGS:
        raise CheckpointError(f"names {names!r} is none of {', '.join(SPELLINGS)}")
    chosen = None if dtype is None else parse_dtype(dtype)
    directory = local_directory(source, revision) or hub.snapshot(str(source), revision, COMPANIONS)
    opened = open_directory(directory)
    opened.check_text()
    to_orbax = opened.kind == "hf"
    if to_orbax:
        hub.verify(opened.directory)  # checkpoints of this program contain their hashes
    with new_directory(destination) as partial:
        if to_orbax:
            adapter = opened.adapter  # raises if one is announced, but missing
            with_adapter = adapter is not None
            leaves = reader.read_leaves(directory, opened.config, chosen, progress, with_adapter=with_adapter)
            copy_files(writer.companions(opened), partial)
            write_weights(partial, writer.configuration(opened, chosen), opened.config, leaves, adapter)
        else:
            home = Path(destination).absolute()
            writer.export(opened, partial, names, chosen, home=home, progress=progress)
        written = open_directory(partial)
        if verify:
            _compare(opened, written, chosen)
        stored = written.stored()
        tensors = writer.count_tensors(written)
    return _report("orbax" if to_orbax else "hf", tensors, stored, Path(destination), time.monotonic() - started)


def _compare(source: Checkpoint, written: Checkpoint, dtype: np.dtype | None) -> None:
    """Raises CheckpointError naming leaves of `written` that differ from those of `source`; both are read again."""
    by_path = {path: record(leaf.astype(dtype or leaf.dtype, copy=False)) for path, leaf in source.leaves()}
    differ = [path for path, leaf in written.leaves() if record(leaf) != by_path[path]]
    raise_named("read back differently than written:", differ)


def _report(
    kind: Literal["orbax", "hf"],
    tensors: int,
    stored: Mapping[str, tuple[Shape, str]],
    directory: Path,
    seconds: float,
) -> Report:
    parameters = collections.Counter[str]()
    for path, (shape, _) in stored.items():
        parameters[path.split(".")[0]] += math.prod(shape)
    return Report(
        kind=kind,
        tensors=tensors,
        parameters=dict(sorted(parameters.items())),
        dtype="+".join(sorted({dtype for _, dtype in stored.values()})),
        bytes=sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        seconds=seconds,
    )
