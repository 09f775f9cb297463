"""Parameter trees by dotted path (`encoder.out.kernel`), and errors that name leaves."""

import functools
import itertools
import types
from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util

from granite_jax.array_types import Shape
from granite_jax.errors import CheckpointError
from granite_jax.models.family import ModelConfig
from granite_jax.models.registry import family_of


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> one dictionary with dotted paths."""
    return traverse_util.flatten_dict(tree, sep=".")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep=".")


@functools.lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """The shape of every leaf that `config` asks for, by dotted path."""
    params = family_of(config.model_type).abstract_params(config)
    return types.MappingProxyType({path: leaf.shape for path, leaf in flatten(params).items()})


def check_shapes(actual: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raises CheckpointError naming leaves that are unexpected, missing or misshapen."""
    raise_named("no place in the model for", [path for path in actual if path not in expected])
    raise_named("missing:", [path for path in expected if path not in actual])
    wrong = [path for path in actual if tuple(actual[path]) != expected[path]]
    raise_named("wrong shape:", [f"{path} {list(actual[path])}, not {list(expected[path])}" for path in wrong])


def raise_named(problem: str, names: Iterable[str], count: int | None = None) -> None:
    """Raises CheckpointError with the first few of `names` and the number of the others, unless there are none.

    Pass `count`, the number of names, where listing them all could take forever.
    """
    if count is None:
        names = list(names)
        count = len(names)
    if count:
        shown = list(itertools.islice(names, 4))
        more = f" and {count - len(shown)} more" if count > len(shown) else ""
        raise CheckpointError(f"{problem} {', '.join(shown)}{more}")
