"""How the weights of Granite Speech are split between the devices that share a copy of them.

Megatron layout: column-parallel projections into heads or channels (-1), row-parallel projections out of them (-2); one
all-reduce for each sublayer.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax

from granite_jax.checkpoint.tree import expected_shapes, unflatten
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.errors import GraniteError
from granite_jax.models import granite_speech
from granite_jax.models.granite_speech.config import Config

PARTITION_RULES: Mapping[str, int] = {
    r"encoder\.layers\.ff[12]\.up\.(kernel|bias)": -1,
    r"encoder\.layers\.ff[12]\.down\.kernel": -2,
    r"encoder\.layers\.attention\.(q|kv)\.kernel": -1,
    r"encoder\.layers\.attention\.out\.kernel": -2,
    r"encoder\.layers\.convolution\.(up\.kernel|up\.bias|depthwise)": -1,
    r"encoder\.layers\.convolution\.batch_norm\.\w+": -1,
    r"encoder\.layers\.convolution\.down\.kernel": -2,
    r"encoder\.out_bpe\.(kernel|bias)": -1,
    r"decoder\.layers\.attention\.[qkv]\.kernel": -1,
    r"decoder\.layers\.attention\.out\.kernel": -2,
    r"decoder\.layers\.(gate|up)\.kernel": -1,
    r"decoder\.layers\.down\.kernel": -2,
    r"decoder\.head\.kernel": -1,
    r"decoder\.embedding\.embedding": -2,
}
"""Path of a leaf -> the axis that is split over `model`. Everything else is replicated."""


def param_shardings(config: Config, devices: DeviceMesh) -> dict[str, Any]:
    """The sharding of every parameter, nested like the parameters.

    Raises:
      GraniteError: attention heads cannot be split between so many devices.
    """
    encoder, decoder, parts = config.encoder, config.decoder, devices.parts
    for name, heads in (("encoder", encoder.num_heads), ("decoder", decoder.num_attention_heads)):
        if heads % parts:
            raise GraniteError(f"model_parallel={parts} does not divide the {name}'s {heads} attention heads")
    # Heads are never split: keys and values are replicated if their heads do not divide evenly.
    replicated = r"decoder\.layers\.attention\.[kv]\.kernel" if decoder.num_key_value_heads % parts else r"(?!)"

    def split_axis(path: str, shape: tuple[int, ...]) -> int | None:
        axis = next((axis for rule, axis in PARTITION_RULES.items() if re.fullmatch(rule, path)), None)
        if parts == 1 or axis is None or re.fullmatch(replicated, path) or shape[axis] % parts:
            return None
        return len(shape) + axis

    shapes = expected_shapes(config)
    return unflatten({path: devices.sharding(split_axis(path, shape)) for path, shape in shapes.items()})


def abstract_params(config: Config, dtype: Any, devices: DeviceMesh) -> dict[str, Any]:
    """The parameters as shapes with shardings."""
    shapes = granite_speech.abstract_params(config, dtype)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        param_shardings(config, devices),
    )
