"""Writes a Hugging Face checkpoint directory, tensor by tensor: no second copy of the weights is held in memory."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from granite_jax._tree import flatten
from granite_jax.checkpoint import COMPANIONS, CONFIG, Checkpoint, copy_files, write_config
from granite_jax.convert import mapping
from granite_jax.convert.reader import INDEX, WEIGHTS, Progress

Names = Literal["released", "new"]

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def export(
    checkpoint: Checkpoint,
    params: Mapping[str, Any],
    hf_dir: Path,
    names: Names = "released",
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Writes weights and configuration into the existing directory `hf_dir`, and copies the tokenizer and its like.

    Args:
      checkpoint: whose configuration and files are taken along.
      params: its weights, numpy arrays.
      names: spelling of tensor names: as released, or of newer transformers (`model.encoder.*`, `lm_head.weight`).
      dtype: of the written weights; default that of `params`.
      max_shard_bytes: beyond this the weights are split into several files with an index.
      progress: called after every tensor.

    Returns:
      The number of tensors written.
    """
    entries = _entries(params, names, None if dtype is None else np.dtype(dtype))
    write_config(hf_dir, configuration(checkpoint, dtype))
    copy_files(companions(checkpoint), hf_dir)
    shards = _shards(entries, max_shard_bytes)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {entry.name: file for entry in shard}
        done = _write_file(hf_dir / file, shard, done, len(entries), progress)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (hf_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(entries)


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The tokenizer, templates and the like that a conversion takes along."""
    return [checkpoint.directory / name for name in COMPANIONS if (checkpoint.directory / name).is_file()]


def configuration(checkpoint: Checkpoint, dtype: Any) -> Mapping[str, Any] | Path:
    """`config.json` as it is, but for the dtype it declares where the weights are cast to `dtype`."""
    return checkpoint.directory / CONFIG if dtype is None else _with_dtype(checkpoint.raw_config, np.dtype(dtype).name)


def _with_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # transformers loads weights in the declared dtype: a stale one would silently undo the cast.
    declared = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(raw.get(key), str)}
    nested = {key: _with_dtype(value, dtype) for key, value in raw.items() if isinstance(value, Mapping)}
    return {**raw, **nested, **declared}


def _entries(params: Mapping[str, Any], names: Names, dtype: np.dtype | None) -> list[_Entry]:
    leaves = flatten(params)
    entries = [
        _Entry(name, shape, dtype or own_dtype, read) for name, shape, own_dtype, read in mapping.hf_tensors(leaves)
    ]
    # Nothing reads the counters, but transformers writes them: a checkpoint without them would look incomplete.
    layers = leaves["encoder.layers.norm.scale"].shape[0]
    zero = np.zeros((), np.int64)
    counters = [_Entry(mapping.BATCH_COUNTER.format(layer=i), (), zero.dtype, lambda: zero) for i in range(layers)]
    spell = mapping.new_name if names == "new" else str
    return [dataclasses.replace(entry, name=spell(entry.name)) for entry in counters + entries]


def _shards(entries: list[_Entry], max_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_file(path: Path, entries: list[_Entry], done: int, total: int, progress: Progress | None) -> int:
    """Writes a safetensors file: header length (8 bytes, little-endian), JSON header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(np.ascontiguousarray(entry.read(), entry.dtype).reshape(-1).view(np.uint8).data)
            done += 1
            if progress is not None:
                progress(done, total)
    return done
