"""Reads the weights of a Hugging Face checkpoint directory, tensor by tensor, without torch."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from granite_jax._tree import expected_shapes, raise_named, unflatten
from granite_jax.config import Config, read_json
from granite_jax.convert import mapping
from granite_jax.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)


def read_params(
    hf_dir: str | Path, config: Config, dtype: Any = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads the parameter tree from `model.safetensors`, or from the shards its index names.

    Args:
      hf_dir: a Hugging Face checkpoint directory.
      config: its configuration; every tensor is checked against it before anything is read.
      dtype: of the result; default that of the checkpoint.
      progress: called after every tensor.

    Returns:
      Nested dictionaries of numpy arrays, layers stacked.

    Raises:
      CheckpointError: naming the file or tensors that are damaged, unmatched, duplicate, missing or misshapen.
    """
    directory = Path(hf_dir)
    _refuse_adapter(directory)
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        try:
            leaves, tied_head = mapping.match(tensors, expected_shapes(config))
            dtypes = _checked(leaves, tensors, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        done, total = 0, sum(len(leaf.names) for leaf in leaves)
        flat: dict[str, np.ndarray] = {}
        for leaf in leaves:
            array = np.empty(leaf.shape, dtypes[leaf.rule.path])
            for layer, name in enumerate(leaf.names):
                place = array[layer : layer + 1] if leaf.rule.stacked else array[None]
                place[0] = leaf.rule.transform.from_hf(tensors[name].read())
                done += 1
                if progress is not None:
                    progress(done, total)
            flat[leaf.rule.path] = array
        if tied_head is not None:
            _check_tied(tensors[tied_head], leaves, tensors)
    return unflatten(flat)


class _Tensor:
    """One tensor of an open safetensors file; its bytes are read only by `read`."""

    def __init__(self, file: Any, path: Path, name: str):
        self._file, self._path, self._name = file, path, name
        view = file.get_slice(name)
        self.shape, self.dtype_name = tuple(view.get_shape()), view.get_dtype()

    @property
    def dtype(self) -> np.dtype:
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(f"{self._name} is {self.dtype_name}; supported are {', '.join(_DTYPES)}")
        return _DTYPES[self.dtype_name]

    def read(self) -> np.ndarray:
        try:
            return self._file.get_tensor(self._name)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self._path}: cannot read {self._name} ({error})") from error


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every tensor of the checkpoint by name. Files stay memory-mapped while `stack` is open."""
    if not (directory / INDEX).is_file():
        return dict(_open_file(directory / WEIGHTS, stack))
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{directory / INDEX}: weight_map is no map from tensors to files")
    tensors: dict[str, _Tensor] = {}
    for file in sorted(set(index.values())):
        # Names alone decide: hub caches keep the files themselves as links to elsewhere.
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{directory / INDEX}: {file!r} is not a file of this directory")
        for name, tensor in _open_file(directory / file, stack):
            if name in tensors:
                raise CheckpointError(f"{directory}: {name} is in more than one file")
            tensors[name] = tensor
    try:
        raise_named("in the index but in no file:", [name for name in index if name not in tensors])
        raise_named("in a file but not in the index:", [name for name in tensors if name not in index])
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return tensors


def _open_file(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, _Tensor]]:
    try:
        file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
            yield name, _Tensor(file, path, name)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _checked(leaves: list[mapping.Leaf], tensors: dict[str, _Tensor], dtype: Any) -> dict[str, np.dtype]:
    """Checks all shapes and returns the dtype of every leaf."""
    misshapen = [
        f"{name} {list(tensors[name].shape)}, not {list(leaf.tensor_shape)}"
        for leaf in leaves
        for name in leaf.names
        if tensors[name].shape != leaf.tensor_shape
    ]
    raise_named("wrong shape:", misshapen)
    dtypes = {}
    for leaf in leaves:
        stored = {name: tensors[name].dtype for name in leaf.names}
        dtypes[leaf.rule.path] = np.dtype(dtype or stored[leaf.names[0]])
        if dtype is None and len(set(stored.values())) > 1:
            odd = next(name for name, found in stored.items() if found != stored[leaf.names[0]])
            raise CheckpointError(
                f"{odd} is {stored[odd]}, {leaf.names[0]} {stored[leaf.names[0]]}: pass dtype to read them as one"
            )
    return dtypes


def _check_tied(head: _Tensor, leaves: list[mapping.Leaf], tensors: dict[str, _Tensor]) -> None:
    """A head stored beside a tied embedding must repeat it bit for bit, or the checkpoint is not what config.json says."""
    name = next(leaf.names[0] for leaf in leaves if leaf.rule.hf == mapping.EMBEDDING)
    ours, theirs = head.read(), tensors[name].read()
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if not same or not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):
        raise CheckpointError(f"{head._path}: {head._name} differs from {name}, but config.json ties them")


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_model.safetensors").exists():
        raise CheckpointError(f"{directory}: adapter_model.safetensors: LoRA adapters are not supported yet")
