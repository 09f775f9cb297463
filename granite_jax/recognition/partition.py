"""Where the parameters of a model lie on devices that share a copy of them."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from granite_jax.checkpoint.tree import flatten, unflatten
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.models.family import PartitionRules
from granite_jax.models.registry import family_of


def abstract_params(config: Any, dtype: Any, devices: DeviceMesh) -> dict[str, Any]:
    """The parameters as shapes with shardings, by the rules of the model's family.

    Raises:
      GraniteError: the model cannot be split between so many devices.
    """
    family, parts = family_of(config.model_type), devices.parts
    rules = family.partition_rules(config, parts)

    def placed(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        axis = split_axis(rules, path)
        axis = None if parts == 1 or axis is None or leaf.shape[axis] % parts else len(leaf.shape) + axis
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=devices.sharding(axis))

    return unflatten({path: placed(path, leaf) for path, leaf in flatten(family.abstract_params(config)).items()})


def param_shardings(config: Any, devices: DeviceMesh) -> dict[str, Any]:
    """The sharding of every parameter, nested like the parameters. Raises as `abstract_params`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, jnp.float32, devices))


def split_axis(rules: PartitionRules, path: str) -> int | None:
    """The axis of the leaf at a dotted path that is split, counted from its end; None if it is replicated."""
    module, _, part = re.sub(r"\.\d+\.", ".", path).rpartition(".")
    axes = next((axes for rule, axes in rules.items() if re.fullmatch(rule, module)), {})
    return axes.get(part)
