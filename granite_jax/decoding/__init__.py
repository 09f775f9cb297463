"""Decoding on the device: one `lax.while_loop` over a step function."""

from granite_jax.decoding.loop import greedy_decode
from granite_jax.decoding.state import DecodeState

__all__ = ["DecodeState", "greedy_decode"]
