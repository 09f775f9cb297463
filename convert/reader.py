"""Reads the weights of a Hugging Face checkpoint directory, leaf by leaf; safetensors files need no torch."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granite_jax.array_types import Shape
from granite_jax.checkpoint.tree import expected_shapes, raise_named
from granite_jax.convert import adapter, mapping, safetensors_file, torch_file
from granite_jax.convert.safetensors_file import Tensor
from granite_jax.errors import CheckpointError
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json
from granite_jax.models.registry import family_of
from granite_jax.models.tensor_table import TensorTable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

WIDEST = "widest"
"""As `dtype`: that of the tensors of a leaf, or float32, which holds all of them, where they differ."""

Progress = Callable[[int, int], None]  # (tensors done, total)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One leaf to read: its dtype, and the tensors that fill it."""

    path: str
    shape: Shape
    dtype: np.dtype
    tensors: tuple[Tensor, ...]
    fill: Callable[[np.ndarray, int, np.ndarray], None]  # (leaf, number of the tensor, tensor)


@contextlib.contextmanager
def open_plans(directory: Path, config: Any, dtype: Any = None, *, with_adapter: bool = True) -> Iterator[list[Plan]]:
    """Opens a checkpoint directory and finds the leaf of every tensor; only headers are read.

    Args:
      config: its configuration; every tensor is checked against it.
      dtype: dtype of the leaves, or `WIDEST`; default that of the tensors, which must be one within a leaf.
      with_adapter: include the LoRA adapter's leaves, if there is one.

    Raises:
      CheckpointError: naming the file or tensors that are damaged, unmatched, duplicate, missing or misshapen.
    """
    with contextlib.ExitStack() as stack:
        table = family_of(config.model_type).tensors
        tensors = _open(directory, table, stack)
        lora = adapter.read_config(directory) if with_adapter else None
        try:
            leaves, tied_head = mapping.match(tensors, table, expected_shapes(config))
            plans = [_plan(leaf, tensors, dtype) for leaf in leaves]
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        if tied_head is not None:
            _check_tied(tensors[tied_head], table, leaves, tensors)
        yield ([] if lora is None else _adapter_plans(directory, config, lora, dtype, stack)) + plans


def read_leaves(
    directory: Path,
    config: Any,
    dtype: Any = None,
    progress: Progress | None = None,
    *,
    with_adapter: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads leaf by leaf: dotted path and numpy array, equal layers stacked; an adapter's leaves (`lora.*`) come first.

    Args and errors as in `open_plans`; `progress` is called after every tensor.
    """
    with open_plans(directory, config, dtype, with_adapter=with_adapter) as plans:
        done, total = 0, sum(len(plan.tensors) for plan in plans)
        for plan in plans:
            # Zeros, because adapters of unequal rank leave part of it unfilled.
            leaf = np.zeros(plan.shape, plan.dtype)
            for number, tensor in enumerate(plan.tensors):
                plan.fill(leaf, number, tensor.read())
                done += 1
                if progress is not None:
                    progress(done, total)
            yield plan.path, leaf
            del leaf  # before the next one is allocated


def leaf_shapes(directory: Path, table: TensorTable) -> dict[str, Shape]:
    """The shapes of the leaves by dotted path, as far as the tensors determine them; only headers are read.

    Raises CheckpointError as `open_plans`.
    """
    with contextlib.ExitStack() as stack:
        tensors = {mapping.released_name(name): x.shape for name, x in _open(directory, table, stack).items()}
    shapes = {}
    for rule in table.rules:
        if (first := tensors.get(rule.hf.format(layer=0))) is not None:
            layers = itertools.takewhile(lambda i, rule=rule: rule.hf.format(layer=i) in tensors, itertools.count())
            with contextlib.suppress(ValueError, IndexError):  # of another rank, which is reported later
                shape = rule.transform.from_hf(np.broadcast_to(np.float32(0), first)).shape
                shapes[rule.path] = (sum(1 for _ in layers), *shape) if rule.stacked else shape
    return shapes


def _open(directory: Path, table: TensorTable, stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    """Every tensor of the checkpoint by name. Files stay open while `stack` is."""
    tensors = dict(_open_main(directory, stack))
    for prefix, file in table.separate.items():
        if (path := paths.find(directory, file)) is not None:
            separate = safetensors_file.open_file(path, stack)
            added = {prefix + name: dataclasses.replace(x, name=prefix + name) for name, x in separate.items()}
            raise_named(f"{directory}: both in {file} and in the other weights:", [n for n in added if n in tensors])
            tensors |= added
    return tensors


def _open_main(directory: Path, stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    for index, single, open_file in (
        (INDEX, WEIGHTS, lambda path: safetensors_file.open_file(path, stack)),
        (TORCH_INDEX, TORCH_WEIGHTS, torch_file.open_file),
    ):
        if (path := paths.find(directory, index)) is not None:
            return _open_indexed(directory, path, open_file)
        if (path := paths.find(directory, single)) is not None:
            return open_file(path)
    raise CheckpointError(f"{directory}: holds neither {WEIGHTS} nor {TORCH_WEIGHTS}")


def _open_indexed(directory: Path, path: Path, open_file: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{path}: weight_map is no map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        try:
            file_path = paths.require(directory, file)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        for name, tensor in open_file(file_path).items():
            if name in tensors:
                raise CheckpointError(f"{directory}: {name} is in more than one file")
            tensors[name] = tensor
    try:
        raise_named("in the index but in no file:", [ascii(name)[1:-1][:200] for name in index if name not in tensors])
        raise_named("in a file but not in the index:", [name for name in tensors if name not in index])
        wrong = [name for name, tensor in tensors.items() if index[name] != tensor.path.name]
        raise_named("in another file than the index says:", wrong)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return tensors


def _plan(leaf: mapping.Leaf, tensors: Mapping[str, Tensor], dtype: Any) -> Plan:
    parts = tuple(tensors[name] for name in leaf.names)
    check_shapes(parts, [leaf.tensor_shape] * len(parts))

    def fill(array: np.ndarray, number: int, tensor: np.ndarray) -> None:
        mapping.copy(array[number] if leaf.rule.stacked else array, leaf.rule.transform.from_hf(tensor))

    return Plan(leaf.rule.path, leaf.shape, common_dtype(parts, dtype), parts, fill)


def _adapter_plans(
    directory: Path, config: Any, lora: adapter.AdapterConfig, dtype: Any, stack: contextlib.ExitStack
) -> list[Plan]:
    path = paths.require(directory, adapter.WEIGHTS)
    tensors = safetensors_file.open_file(path, stack)
    try:
        plans = []
        for target in adapter.match(tensors, lora, config):
            parts = tuple(tensors[name] for name in target.names)
            check_shapes(parts, target.tensor_shapes)
            plans.append(Plan(target.path, target.shape, common_dtype(parts, dtype), parts, target.fill))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return plans


def check_shapes(tensors: tuple[Tensor, ...], expected: list[Shape]) -> None:
    """Raises CheckpointError naming tensors that are not of the `expected` shape."""
    wrong = [
        f"{tensor.name} {list(tensor.shape)}, not {list(shape)}"
        for tensor, shape in zip(tensors, expected, strict=True)
        if tensor.shape != shape
    ]
    raise_named("wrong shape:", wrong)


def common_dtype(tensors: tuple[Tensor, ...], dtype: Any) -> np.dtype:
    """The dtype of the leaf that `tensors` make up: `dtype`, or theirs. Raises CheckpointError if theirs differ."""
    first, *others = tensors
    odd = next((tensor for tensor in others if tensor.dtype != first.dtype), None)
    if dtype is WIDEST:
        return first.dtype if odd is None else np.dtype(np.float32)
    if dtype is None and odd is not None:
        raise CheckpointError(
            f"{odd.name} is {odd.dtype}, {first.name} {first.dtype}: pass dtype (--dtype) to read them as one"
        )
    return np.dtype(dtype or first.dtype)


def _check_tied(head: Tensor, table: TensorTable, leaves: list[mapping.Leaf], tensors: Mapping[str, Tensor]) -> None:
    """A head beside a tied embedding must repeat it bit for bit, or config.json is wrong about the checkpoint."""
    name = next(leaf.names[0] for leaf in leaves if table.tied and leaf.rule.hf == table.tied[1])
    same = head.shape == tensors[name].shape and head.dtype == tensors[name].dtype
    if not same or not np.array_equal(head.read().view(np.uint8), tensors[name].read().view(np.uint8)):
        raise CheckpointError(f"{head.path}: {head.name} differs from {name}, but config.json ties them")
