"""Writes a Hugging Face checkpoint directory, tensor by tensor: no second copy of the weights is held in memory."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granite_jax.checkpoint.directory import COMPANIONS, Checkpoint
from granite_jax.checkpoint.orbax import DTYPES
from granite_jax.checkpoint.save import CONFIG, copy_files, write_config
from granite_jax.checkpoint.tree import expected_shapes
from granite_jax.convert import adapter, mapping, safetensors_file
from granite_jax.convert.reader import INDEX, WEIGHTS, Progress
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json
from granite_jax.models.registry import family_of, with_release_name

MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: str | None  # path of its leaf; None for a counter
    tensor_of: Callable[[Any], np.ndarray]  # leaf -> tensor

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def export(
    checkpoint: Checkpoint,
    hf_dir: Path,
    names: mapping.Spelling = "released",
    dtype: Any = None,
    *,
    home: Path | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes weights and configuration into the existing directory `hf_dir`, and copies tokenizer and templates.

    Args:
      checkpoint: the checkpoint to export; its leaves are read one by one.
      names: spelling of tensor names, as in `mapping`.
      dtype: dtype of the written weights; default that of the checkpoint.
      home: final path of `hf_dir`, by which transformers finds an adapter's base weights.
      max_bytes: size above which the weights are split into several files with an index.
      progress: called after every tensor.
    """
    chosen = None if dtype is None else np.dtype(dtype)
    dtypes = {path: chosen or DTYPES[stored] for path, (_, stored) in checkpoint.stored().items()}
    lora, tensors = _adapter_entries(checkpoint, dtypes, names), _entries(checkpoint, dtypes, names)
    separate, tensors = _separated(checkpoint, tensors)
    shards = dict(_shards(tensors, max_bytes))
    contents = {**({adapter.WEIGHTS: lora} if lora else {}), **shards, **separate}
    copy_files(companions(checkpoint), hf_dir)
    _write_processor_config(checkpoint, hf_dir)
    if lora:
        raw = {**read_json(hf_dir / adapter.CONFIG), "base_model_name_or_path": str(home or hf_dir)}
        (hf_dir / adapter.CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    entries = [entry for file in contents.values() for entry in file]
    # A leaf is read once if its tensors follow each other, and is released before the next one.
    order = [path for path, _ in itertools.groupby(entry.path for entry in entries) if path is not None]
    leaves = checkpoint.leaves(paths=order)
    progress = progress or (lambda done, total: None)
    done, path, leaf = 0, None, None
    for name, file in contents.items():
        with open(hf_dir / name, "wb") as opened:
            opened.write(safetensors_file.make_header((entry.name, entry.dtype, entry.shape) for entry in file))
            for entry in file:
                if entry.path not in (None, path):
                    leaf = None
                    path, leaf = next(leaves)
                array = np.empty(entry.shape, entry.dtype)
                mapping.copy(array, entry.tensor_of(leaf))
                opened.write(array.reshape(-1).view(np.uint8).data)
                done += 1
                progress(done, len(entries))
    if len(shards) > 1:
        _write_index(hf_dir, shards)
    write_config(hf_dir, configuration(checkpoint, chosen))


def _write_index(hf_dir: Path, shards: Mapping[str, list["_Entry"]]) -> None:
    total = sum(entry.nbytes for shard in shards.values() for entry in shard)
    weight_map = {entry.name: name for name, shard in shards.items() for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (hf_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def count_tensors(checkpoint: Checkpoint) -> int:
    """The number of tensors on the Hugging Face side that carry information, an adapter's included."""
    return sum(1 for _ in (*_tensors(checkpoint), *_adapter_tensors(checkpoint)))


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The files that a conversion copies: tokenizer, templates and the like."""
    found = (paths.find(checkpoint.directory, name) for name in COMPANIONS)
    return [path for path in found if path is not None]


def configuration(checkpoint: Checkpoint, dtype: Any) -> Mapping[str, Any] | Path:
    """`config.json`, with the dtype that weights are cast to, and the release's name if only a directory tells it."""
    raw = with_release_name(checkpoint.raw_config, checkpoint.config, checkpoint.release)
    if dtype is None:
        return checkpoint.directory / CONFIG if raw is checkpoint.raw_config else raw
    return _with_dtype(raw, np.dtype(dtype).name)


def _write_processor_config(checkpoint: Checkpoint, hf_dir: Path) -> None:
    """Writes what `AutoProcessor` of transformers needs, unless the checkpoint came with it."""
    if (hf_dir / "preprocessor_config.json").exists() or (hf_dir / "processor_config.json").exists():
        return
    if checkpoint.family.processor_config is None:
        return
    raw = checkpoint.family.processor_config(checkpoint.config)
    (hf_dir / "preprocessor_config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _with_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # transformers loads weights in the declared dtype: a stale one would silently undo the cast.
    declared = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(raw.get(key), str)}
    nested = {key: _with_dtype(value, dtype) for key, value in raw.items() if isinstance(value, Mapping)}
    return {**raw, **nested, **declared}


def _entries(checkpoint: Checkpoint, dtypes: Mapping[str, np.dtype], names: mapping.Spelling) -> list[_Entry]:
    # Nothing reads the counters, but transformers writes them: a checkpoint without them would look incomplete.
    zero = np.zeros((), np.int64)
    names_of_counters = mapping.counters(checkpoint.family.tensors, expected_shapes(checkpoint.config))
    counters = [_Entry(name, (), zero.dtype, None, lambda _: zero) for name in names_of_counters]
    tensors = [
        _Entry(name, shape, dtypes[path], path, tensor_of) for name, shape, path, tensor_of in _tensors(checkpoint)
    ]
    return [dataclasses.replace(entry, name=mapping.spelled(entry.name, names)) for entry in counters + tensors]


def _separated(checkpoint: Checkpoint, entries: list[_Entry]) -> tuple[dict[str, list[_Entry]], list[_Entry]]:
    """The entries of every file of its own, named as in it, and the other entries."""
    files, others = collections.defaultdict[str, list[_Entry]](list), []
    separate = family_of(checkpoint.config.model_type).tensors.separate
    for entry in entries:
        prefix = next((prefix for prefix in separate if entry.name.startswith(prefix)), None)
        if prefix is None:
            others.append(entry)
        else:
            files[separate[prefix]].append(dataclasses.replace(entry, name=entry.name.removeprefix(prefix)))
    return files, others


def _tensors(checkpoint: Checkpoint) -> Iterator[mapping.HFTensor]:
    config = checkpoint.config
    return mapping.hf_tensors(family_of(config.model_type).tensors, expected_shapes(config))


def _adapter_entries(checkpoint: Checkpoint, dtypes: Mapping[str, np.dtype], names: mapping.Spelling) -> list[_Entry]:
    tensors = _adapter_tensors(checkpoint, names)
    return [_Entry(name, shape, dtypes[path], path, tensor_of) for name, shape, path, tensor_of in tensors]


def _adapter_tensors(checkpoint: Checkpoint, names: mapping.Spelling = "released") -> Iterable[mapping.HFTensor]:
    lora = adapter.read_config(checkpoint.directory) if checkpoint.adapter is not None else None
    return [] if lora is None else adapter.hf_tensors(lora, checkpoint.config, names)


def _shards(entries: list[_Entry], max_bytes: int) -> Iterator[tuple[str, list[_Entry]]]:
    """Names and entries of files of at most `max_bytes`, or of one tensor."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        yield name, sorted(shard, key=lambda entry: -entry.dtype.itemsize)  # wide elements first keep tensors aligned
