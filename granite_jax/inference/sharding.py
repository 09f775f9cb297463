"""Where arrays live: a mesh of devices, partition rules for the weights, and programs that run on all devices.

    devices     0 1 2 3 4 5 6 7         model_parallel=2
    mesh        data 0: 0 1   data 1: 2 3   data 2: 4 5   data 3: 6 7
    batch       rows are split over `data`; every group of devices runs its own loop and never waits for the others
    weights     replicated over `data`, split over `model` by `PARTITION_RULES`

Along `data` programs are `jit(shard_map(...))`: automatic sharding would put a collective into every step of the decode
loop, and all devices would wait for the slowest row. Along `model` sharding is automatic, inside the same shard_map.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from granite_jax.checkpoint.tree import expected_shapes, unflatten
from granite_jax.errors import GraniteError
from granite_jax.inference.options import Parallel
from granite_jax.model.config import Config

DeviceList = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]  # a class that JAX declares as a variable

BATCH, REPLICATED = PartitionSpec("data"), PartitionSpec()

PARTITION_RULES: Mapping[str, int] = {
    # Megatron layout: column-parallel projections into heads or channels (-1), row-parallel projections out of them
    # (-2); one all-reduce for each sublayer.
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


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """The devices that programs run on.

    Fields:
      mesh: axes `data` and `model`.
      parallel: how the rows of a batch are spread over `data`.
    """

    mesh: Mesh
    parallel: Parallel = "shard_map"

    @classmethod
    def make(
        cls, devices: DeviceList | None = None, *, parallel: Parallel = "shard_map", model_parallel: int = 1
    ) -> "DeviceMesh":
        """A mesh of all `devices`, `model_parallel` of them per copy of the weights.

        Args:
          devices: default all local devices, or only the first CPU.
          parallel: "shard_map", or "pmap" with the same results.

        Raises:
          GraniteError: naming the option that conflicts with the others.
        """
        if devices is None:
            # Several CPU devices are emulated, and share the same cores.
            devices = jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]
        chosen = list(devices)
        if not chosen or len(set(chosen)) != len(chosen):
            raise GraniteError(f"devices: {len(chosen)} of them, {len(set(chosen))} distinct")
        if parallel not in ("shard_map", "pmap"):
            raise GraniteError(f'parallel is "shard_map" or "pmap", not {parallel!r:.60}')
        if model_parallel < 1 or len(chosen) % model_parallel:
            raise GraniteError(f"model_parallel={model_parallel} does not divide {len(chosen)} devices")
        if parallel == "pmap" and model_parallel > 1:
            raise GraniteError('model_parallel is for parallel="shard_map"; pmap replicates the weights')
        grid = np.array(chosen).reshape(-1, model_parallel)
        return cls(Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)), parallel)

    @property
    def replicas(self) -> int:
        """Copies of the weights, each with its own rows: the size of every batch is a multiple of this."""
        return self.mesh.shape["data"]

    def param_shardings(self, config: Config) -> dict[str, Any]:
        """The sharding of every parameter, nested like the parameters.

        Raises:
          GraniteError: attention heads cannot be split over `model`.
        """
        parts = self.mesh.shape["model"]
        encoder, decoder = config.encoder, config.decoder
        for name, heads in (("encoder", encoder.num_heads), ("decoder", decoder.num_attention_heads)):
            if heads % parts:
                raise GraniteError(f"model_parallel={parts} does not divide the {name}'s {heads} attention heads")
        # Heads are never split: keys and values are replicated if their heads do not divide evenly.
        replicated = r"decoder\.layers\.attention\.[kv]\.kernel" if decoder.num_key_value_heads % parts else r"(?!)"

        def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
            axis = next((axis for rule, axis in PARTITION_RULES.items() if re.fullmatch(rule, path)), None)
            if parts == 1 or axis is None or re.fullmatch(replicated, path) or shape[axis] % parts:
                return REPLICATED
            return PartitionSpec(*[None] * (len(shape) + axis), "model")

        shapes = expected_shapes(config)
        return unflatten({path: NamedSharding(self.mesh, spec(path, shape)) for path, shape in shapes.items()})

    def put(self, params: Any, shardings: Any = REPLICATED) -> Any:
        """Puts arrays where programs take their `REPLICATED` arguments; arrays that are there already are not copied.

        Args:
          shardings: those of the leaves, as in `param_shardings`; default replicated.
        """
        if shardings is REPLICATED:
            shardings = jax.tree.map(lambda _: NamedSharding(self.mesh, REPLICATED), params)
        placed = jax.device_put(params, shardings)
        return jax.tree.map(self._stacked, placed) if self.parallel == "pmap" else placed

    def result_shardings(self, specs: Any) -> Any:
        """How a program's results lie on the devices, if each device has its own copy of the weights.

        Args:
          specs: `out_specs` of `compile`.
        """
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        alone = self.mesh.size == 1
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, REPLICATED if alone else spec), specs, is_leaf=is_spec
        )

    def shard_rows(self, rows: Any) -> Any:
        """Splits host arrays over `data` as programs return theirs, so that both have the same type when compiled."""
        return jax.device_put(rows, self.result_shardings(BATCH))

    def unstack(self, params: Any) -> Any:
        """Gives arrays returned by `put` their original shape."""
        return jax.tree.map(lambda array: array[0], params) if self.parallel == "pmap" else params

    def compile(
        self,
        function: Callable[..., Any],
        in_specs: Sequence[Any],
        out_specs: Any,
        *,
        static: str | None = None,
        donate: int | None = None,
    ) -> Callable[..., Any]:
        """Compiles `function`, of positional arrays and the keyword `static`, to run on every device's own rows.

        Args:
          in_specs: for every argument `REPLICATED` if `put` returned it, else `BATCH` or a tree of `PartitionSpec`s.
          out_specs: likewise for the results.
          donate: index of the argument whose memory the result can reuse.
        """
        donated = () if donate is None else (donate,)
        if self.parallel == "pmap":
            return self._pmapped(function, in_specs, out_specs, donated)

        def run(*args, **options):
            body = functools.partial(function, **options)
            if self.mesh.size == 1:
                return body(*args)
            mapped = jax.shard_map(
                body, mesh=self.mesh, in_specs=tuple(in_specs), out_specs=out_specs, axis_names={"data"}
            )
            return mapped(*args)

        return jax.jit(run, static_argnames=static, donate_argnums=donated)

    def _pmapped(self, function: Callable, in_specs: Sequence[Any], out_specs: Any, donated: tuple[int, ...]):
        """Rows `[n * b, ...]` become `[n, b, ...]` and back; arrays with rows on another axis stay stacked."""

        @functools.lru_cache
        def mapped(**options):
            body = functools.partial(function, **options)
            return jax.pmap(body, devices=list(self.mesh.devices.flat), donate_argnums=donated)

        def run(*args, **options):
            shard = lambda x: self.shard_rows(x.reshape(self.replicas, -1, *x.shape[1:]))  # noqa: E731
            stacked = [_on_rows(shard, spec, arg) for spec, arg in zip(in_specs, args, strict=True)]
            return _on_rows(lambda x: x.reshape(-1, *x.shape[2:]), out_specs, mapped(**options)(*stacked))

        return run

    def _stacked(self, array: jax.Array) -> jax.Array:
        """A replicated array `[...]` as `[n, ...]`; each device keeps its copy."""
        shards = {shard.device: shard.data[None] for shard in array.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            (self.replicas, *array.shape),
            NamedSharding(self.mesh, BATCH),
            [shards[device] for device in self.mesh.devices.flat],
        )


def _on_rows(change: Callable[[jax.Array], jax.Array], specs: Any, tree: Any) -> Any:
    """Applies `change` to the leaves whose rows are on the first axis."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(change, part) if spec == BATCH else part, specs, tree, is_leaf=is_spec
    )
