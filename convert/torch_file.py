"""Reads `pytorch_model.bin` with torch, if the installed version loads weights without running code.

`torch.load(weights_only=True)` could be made to run code before torch 2.6 (CVE-2025-32434).
"""

import dataclasses
import importlib.metadata
import itertools
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from granite_jax.checkpoint.tree import Shape, raise_named
from granite_jax.convert.safetensors_file import check_name
from granite_jax.errors import CheckpointError

OLDEST_TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of a memory-mapped torch file."""

    name: str
    path: Path
    tensor: Any = dataclasses.field(repr=False, compare=False)

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        name = str(self.tensor.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"{self.name} is {name}; supported are float32, float16, bfloat16")
        return np.dtype(getattr(ml_dtypes, name, name))

    def read(self) -> np.ndarray:
        import torch  # type: ignore[import-not-found]

        dtype = self.dtype  # raises if it is not supported
        is_bfloat16 = dtype == ml_dtypes.bfloat16  # which torch does not convert to numpy
        return (self.tensor.view(torch.int16).numpy().view(dtype) if is_bfloat16 else self.tensor.numpy()).copy()


def open_file(path: Path) -> dict[str, TorchTensor]:
    """The tensors of a file of `torch.save`, by name.

    Raises:
      CheckpointError: torch >= 2.6 is not installed, or the file is not a dictionary of tensors stored in full.
    """
    _check_torch(path)
    import torch  # type: ignore[import-not-found]

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # Unpickling damaged files raises anything.
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: torch does not load it ({type(error).__name__}: {reason[:200]})") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds {type(tensors).__name__}, not a dictionary of tensors")
    size = path.stat().st_size
    ranges = []
    try:
        for name, tensor in tensors.items():
            check_name(name)
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise CheckpointError(f"{name}: is not a dense tensor")
            # A few bytes can pose as a tensor of any size through zero strides or shared memory.
            if not tensor.is_contiguous() or tensor.numel() * tensor.element_size() > size:
                raise CheckpointError(f"{name}: is not stored in full")
            if not name.endswith("lm_head.weight"):  # which may repeat the embedding
                ranges.append((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name))
        raise_named("shares its memory with another tensor:", _overlapping(ranges))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {name: TorchTensor(name, path, tensor.detach()) for name, tensor in tensors.items()}


def _overlapping(ranges: list[tuple[int, int, str]]) -> list[str]:
    """Names of the tensors (begin, end, name) that begin before the preceding one ends."""
    ordered = sorted((begin, end, name) for begin, end, name in ranges if begin < end)
    return [after[2] for before, after in itertools.pairwise(ordered) if after[0] < before[1]]


def _check_torch(path: Path) -> None:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"{path}: reading it takes torch >= 2.6, which is not installed; safetensors files need no torch"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise CheckpointError(
            f"{path}: torch {version} can be made to run code by such a file; it takes torch >= 2.6, or safetensors"
        )
