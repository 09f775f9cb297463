"""Tables between the tensors of a Hugging Face checkpoint and the leaves of a parameter tree.

One `Rule` is one kind of tensor, read in both directions. Leaves are named by dotted paths (`encoder.out.kernel`);
equal layers are stacked on a leading axis, `{layer}` in the Hugging Face name.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from granite_jax.array_types import Shape


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor (one layer of a stacked leaf) changes its axes: pure re-arrangement, hence exact."""

    from_hf: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[Shape], Shape]  # of our shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name as released, its path in the parameter tree, the change of axes."""

    hf: str
    path: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


SAME = Transform(lambda x: x, lambda x: x, lambda s: s)
LINEAR = Transform(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])  # [out, in] <-> [in, out]
POINTWISE = Transform(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None], lambda s: (s[1], s[0], 1))
DEPTHWISE = Transform(lambda x: x[:, 0].T, lambda x: x.T[:, None], lambda s: (s[1], 1, s[0]))
# Two halves along the output axis become an axis of their own: [2 inner, in] <-> [in, 2, inner].
HALVES = Transform(
    lambda x: x.reshape(2, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    lambda s: (s[1] * s[2], s[0]),
)
POINTWISE_HALVES = Transform(
    lambda x: HALVES.from_hf(x[:, :, 0]),
    lambda x: HALVES.to_hf(x)[:, :, None],
    lambda s: (*HALVES.hf_shape(s), 1),
)
BIAS_HALVES = Transform(lambda x: x.reshape(2, -1), lambda x: x.reshape(-1), lambda s: (s[0] * s[1],))


def linear(hf: str, path: str, bias: bool = True) -> list[Rule]:
    """The rules of a linear layer."""
    kernel = Rule(f"{hf}.weight", f"{path}.kernel", LINEAR)
    return [kernel, Rule(f"{hf}.bias", f"{path}.bias", SAME)] if bias else [kernel]


def norm(hf: str, path: str) -> list[Rule]:
    """The rules of a normalization's scale and bias."""
    return [Rule(f"{hf}.weight", f"{path}.scale", SAME), Rule(f"{hf}.bias", f"{path}.bias", SAME)]


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """All tensors of a model's checkpoints.

    Fields:
      rules: of the tensors that carry information.
      tied: names of the output head and of the embedding that it repeats when the two are tied; None without a head.
      separate: prefix of tensors that are in a safetensors file of their own, without the prefix -> the file's name.
      counter: name of an int64 scalar that transformers writes for every layer of the encoder and nothing reads.
      ignored: further names that carry no information.
    """

    rules: tuple[Rule, ...]
    tied: tuple[str, str] | None = None
    separate: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counter: str | None = None
    ignored: tuple[str, ...] = ()
