"""Rows of different lengths side by side, so that a program computes what is filled and nothing else.

Three rows of 4, 0 and 6 positions, packed at multiples of 3 with a gap of at least 1, in chunks of 4:

    position   0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
    row        0 0 0 0 . . 2 2 2 2  2  2  .  .  .  .      starts 0, 6, 6; end 15; four chunks
    chunk      0       1       2          3

The shapes are those of full rows. A loop over chunks ends at the last one that holds a position, so that a compiled
program serves batches of all lengths. Padding rows have length 0 and cost nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from granite_jax.array_types import Lengths

Carry = TypeVar("Carry")

_MANY_ROWS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where every row's positions are.

    Fields:
      starts: int32 `[b]`, each row's first position.
      lengths: int32 `[b]`, positions of each row.
      ends: int32 `[b]`, the position after each row's gap, at which the next row starts.
      longest: the most positions that a row can have.
      capacity: the most positions of all rows, gaps included, rounded up to whole chunks.
      chunk: positions that are computed together.
    """

    starts: Lengths
    lengths: Lengths
    ends: Lengths
    longest: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, lengths: Lengths, longest: int, *, gap: int = 0, multiple: int = 1) -> "Packing":
        """Packs rows of these lengths, of `longest` positions at most.

        Args:
          gap: unused positions after each row, at least.
          multiple: rows start at multiples of it.
        """
        rows, lengths = len(lengths), jnp.asarray(lengths, jnp.int32)
        sizes = jnp.where(lengths > 0, -(-(lengths + gap) // multiple) * multiple, 0)
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        most = rows * (-(-(longest + gap) // multiple) * multiple)
        # Larger chunks compute up to a chunk too much; smaller ones read the weights more often than they compute.
        chunk = min(512 if rows >= _MANY_ROWS else 256, -(-most // 16) * 16)
        return cls(ends - sizes, lengths, ends, longest, -(-most // chunk) * chunk, chunk)

    @property
    def num_chunks(self) -> Int[Array, ""]:
        """How many chunks hold a position."""
        return -(-self.ends[-1] // self.chunk)

    @property
    def computed(self) -> Int[Array, ""]:
        """Positions that a loop over chunks computes."""
        return self.num_chunks * self.chunk

    def for_chunks(self, body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry) -> Carry:
        """Calls `body(first position, carry)` for every chunk that holds a position."""
        return jax.lax.fori_loop(jnp.int32(0), self.num_chunks, lambda i, carry: body(i * self.chunk, carry), carry)

    def rows_of(self, positions: Int[Array, "n"]) -> tuple[Int[Array, "n"], Int[Array, "n"], Bool[Array, "n"]]:
        """The row of each position, the position within it, and whether it is one of the row's own."""
        rows = jnp.sum(positions[:, None] >= self.ends[None, :], axis=1, dtype=jnp.int32)
        inside = rows < len(self.ends)
        rows = jnp.minimum(rows, len(self.ends) - 1)
        local = positions - self.starts[rows]
        return rows, local, inside & (local < self.lengths[rows])

    def positions(self, start: Int[Array, ""]) -> Int[Array, "n"]:
        """The positions of the chunk that begins at `start`."""
        return start + jnp.arange(self.chunk, dtype=jnp.int32)

    def take(self, buffer: Array, start: Int[Array, ""]) -> Array:
        """The chunk of a buffer `[positions, ...]` that begins at `start`."""
        return jax.lax.dynamic_slice_in_dim(buffer, start, self.chunk)

    def unpack(self, buffer: Array) -> Array:
        """A buffer `[positions, ...]` as rows `[b, longest, ...]`, each followed by what lies behind it."""
        index = self.starts[:, None] + jnp.arange(self.longest, dtype=jnp.int32)[None, :]
        return buffer[jnp.minimum(index, buffer.shape[0] - 1)]

    def zeros(self, margin: int, *shape: int, dtype: Any = jnp.float32) -> Array:
        """A buffer of zeros `[capacity + margin, ...]`; like the rows, it varies over devices under shard_map."""
        return jnp.zeros((self.capacity + margin, *shape), dtype) + (self.ends[-1] * 0).astype(dtype)


def put(buffer: Array, part: Array, start: Int[Array, ""]) -> Array:
    """Writes `part` at `start`, in place under jit."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, part.astype(buffer.dtype), start, axis=0)
