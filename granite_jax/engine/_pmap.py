"""`parallel="pmap"`: the same programs by `jax.pmap`, whose arguments have the devices as their first axis.

weights     [...]        as [n, ...], every device its own copy
rows        [n * b, ...] as [n, b, ...] in a program, and back after it
the rest    arrays whose rows are on another axis, such as the KV cache, stay as the program before returned them
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

_BATCH = PartitionSpec("data")


def compiled(
    function: Callable,
    in_specs: Sequence[Any],
    out_specs: Any,
    donated: tuple[int, ...],
    devices: Sequence[Any],
    shard_rows: Callable[[Any], Any],
) -> Callable:
    """As `DeviceMesh.compile`.

    Args:
      donated: indices of arguments whose memory results can reuse.
      shard_rows: puts rows `[n, ...]` on the devices.
    """

    @functools.lru_cache
    def mapped(**options):
        return jax.pmap(functools.partial(function, **options), devices=devices, donate_argnums=donated)

    def run(*args, **options):
        shard = lambda x: shard_rows(x.reshape(len(devices), -1, *x.shape[1:]))  # noqa: E731
        stacked = [_on_rows(shard, spec, arg) for spec, arg in zip(in_specs, args, strict=True)]
        return _on_rows(lambda x: x.reshape(-1, *x.shape[2:]), out_specs, mapped(**options)(*stacked))

    return run


def stacked(params: Any, sharding: NamedSharding, devices: Sequence[Any]) -> Any:
    """Replicated arrays `[...]` as `[n, ...]`; each device keeps its copy."""

    def stack(array: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data[None] for shard in array.addressable_shards}
        shape = (len(devices), *array.shape)
        return jax.make_array_from_single_device_arrays(shape, sharding, [shards[device] for device in devices])

    return jax.tree.map(stack, params)


def _on_rows(change: Callable[[jax.Array], jax.Array], specs: Any, tree: Any) -> Any:
    """Applies `change` to the leaves whose rows are on the first axis."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(change, part) if spec == _BATCH else part, specs, tree, is_leaf=is_spec
    )
