"""Opens checkpoint directories of either kind."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from granite_jax.array_types import Shape
from granite_jax.checkpoint import orbax
from granite_jax.checkpoint.backend import start_jax
from granite_jax.checkpoint.directory import Checkpoint, OrbaxCheckpoint
from granite_jax.checkpoint.lora import ALONE
from granite_jax.checkpoint.save import CONFIG
from granite_jax.convert import adapter as adapters
from granite_jax.convert.reader import (
    INDEX,
    TORCH_INDEX,
    TORCH_WEIGHTS,
    WEIGHTS,
    WIDEST,
    leaf_shapes,
    open_plans,
    read_leaves,
)
from granite_jax.errors import CheckpointError
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json
from granite_jax.models.registry import family_of, read_config


class HuggingFaceCheckpoint(Checkpoint):
    """A Hugging Face directory; it has no hashes to verify."""

    kind = "hf"

    def leaves(
        self, verify: bool = True, *, adapter: bool = True, paths: Iterable[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """As in `Checkpoint`."""
        assert paths is None, "Hugging Face files are read in their own order"
        yield from read_leaves(self.directory, self.config, WIDEST, with_adapter=adapter and self.adapter is not None)

    def stored(self) -> dict[str, tuple[Shape, str]]:
        """As in `Checkpoint`."""
        with open_plans(self.directory, self.config, WIDEST) as plans:
            return {plan.path: (plan.shape, plan.dtype.name) for plan in plans}


def open_directory(directory: Path) -> Checkpoint:
    """Opens a directory of this program or of Hugging Face.

    Raises:
      CheckpointError: naming the directory and what is wrong with it.
      BackendError: JAX, which Orbax and the weights need, cannot start.
    """
    start_jax()
    path = paths.find(directory, CONFIG)
    is_orbax = (directory / orbax.PARAMS).is_dir()
    is_hf = any((directory / name).is_file() for name in (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX))
    if not is_orbax and not is_hf and paths.find(directory, adapters.CONFIG) is not None:
        raise CheckpointError(f"{directory}: {ALONE}")
    if path is None:
        raise CheckpointError(f"{directory}: no checkpoint, {CONFIG} is missing")
    if is_orbax == is_hf:
        contents = "both params/ and" if is_orbax else "neither params/ nor"
        raise CheckpointError(f"{directory}: holds {contents} {WEIGHTS}")
    raw = read_json(path)
    try:
        table = family_of(raw.get("model_type")).tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    shapes = orbax.leaf_shapes(directory) if is_orbax else leaf_shapes(directory, table)
    try:
        config = read_config(raw, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return (OrbaxCheckpoint if is_orbax else HuggingFaceCheckpoint)(directory, config, raw, adapters.read)
