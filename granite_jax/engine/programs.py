"""Jitted programs that run on every device's own rows, and what each was traced for."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from granite_jax.engine.compilation import Lowerable
from granite_jax.engine.sharding import DeviceMesh


class Programs:
    """The programs of a recognizer.

    Fields:
      traces: by program, for each trace the type of every array, by argument.
    """

    def __init__(self, devices: DeviceMesh | None = None):
        self.devices = devices or DeviceMesh.make(jax.devices()[:1])
        self.traces: dict[str, list[dict[str, str]]] = {}

    def lowerables(self, params: Any, bucket: Any) -> list[Lowerable]:
        """The programs for a bucket, in an order in which they can be lowered.

        Args:
          params: the model's parameters as shapes with shardings.
        """
        raise NotImplementedError

    @property
    def num_traces(self) -> int:
        """How many programs were traced so far, to be compiled."""
        return sum(map(len, self.traces.values()))

    def compile(
        self,
        name: str,
        function: Callable,
        in_specs: Sequence[Any],
        out_specs: Any,
        *,
        static: str | None = None,
        donate: int | None = None,
    ) -> Callable[..., Any]:
        """As `DeviceMesh.compile`; traces are counted under `name`."""
        signature, traces = inspect.signature(function), self.traces.setdefault(name, [])

        @functools.wraps(function)
        def counted(*args, **kwargs):
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            leaves = jax.tree.leaves_with_path(arguments)
            traces.append(
                {jax.tree_util.keystr(path, simple=True, separator="."): _type(leaf) for path, leaf in leaves}
            )
            return function(*args, **kwargs)

        return self.devices.compile(counted, in_specs, out_specs, static=static, donate=donate)


def _type(leaf: Any) -> str:
    """The type of an argument's leaf: a change of it causes a retrace."""
    return f"{jax.typeof(leaf)}{' (weak)' * jax.typeof(leaf).weak_type}" if isinstance(leaf, jax.Array) else str(leaf)
