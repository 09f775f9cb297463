"""Where arrays live: a mesh of devices, and programs that run on all of them.

    devices     0 1 2 3 4 5 6 7         model_parallel=2
    mesh        data 0: 0 1   data 1: 2 3   data 2: 4 5   data 3: 6 7
    batch       rows are split over `data`; every group of devices runs its own loop and never waits for the others
    weights     replicated over `data`, split over `model` as their model says

Along `data` programs are `jit(shard_map(...))`: automatic sharding would put a collective into every step of the decode
loop, and all devices would wait for the slowest row. Along `model` sharding is automatic, inside the same shard_map.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from granite_jax.engine import _pmap
from granite_jax.errors import GraniteError

DeviceList = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]  # a class that JAX declares as a variable

Parallel = Literal["shard_map", "pmap"]

BATCH, REPLICATED = PartitionSpec("data"), PartitionSpec()


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

    @property
    def parts(self) -> int:
        """Devices that share one copy of the weights."""
        return self.mesh.shape["model"]

    def sharding(self, split_axis: int | None = None) -> NamedSharding:
        """That of a weight: replicated, or one axis of it split over `model`."""
        return NamedSharding(
            self.mesh, REPLICATED if split_axis is None else PartitionSpec(*[None] * split_axis, "model")
        )

    def put(self, params: Any, shardings: Any = REPLICATED) -> Any:
        """Puts arrays where programs take their `REPLICATED` arguments; arrays that are there already are not copied.

        Args:
          shardings: those of the leaves, made by `sharding`; default replicated.
        """
        if shardings is REPLICATED:
            shardings = jax.tree.map(lambda _: NamedSharding(self.mesh, REPLICATED), params)
        placed = jax.device_put(params, shardings)
        if self.parallel == "pmap":
            return _pmap.stacked(placed, NamedSharding(self.mesh, BATCH), list(self.mesh.devices.flat))
        return placed

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
            return _pmap.compiled(function, in_specs, out_specs, donated, list(self.mesh.devices.flat), self.shard_rows)

        def run(*args, **options):
            body = functools.partial(function, **options)
            if self.mesh.size == 1:
                return body(*args)
            mapped = jax.shard_map(
                body, mesh=self.mesh, in_specs=tuple(in_specs), out_specs=out_specs, axis_names={"data"}
            )
            return mapped(*args)

        return jax.jit(run, static_argnames=static, donate_argnums=donated)
