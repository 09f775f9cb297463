"""Decoding on the device: `lax.while_loop`s over a step function, with or without drafts."""

from granite_jax.decoding.draft import REALIGN, Draft, Realign, Spelling
from granite_jax.decoding.loop import WINDOW, Verified, choose, decode, greedy_decode, verify, with_end
from granite_jax.decoding.state import DecodeState

__all__ = [
    "REALIGN",
    "WINDOW",
    "DecodeState",
    "Draft",
    "Realign",
    "Spelling",
    "Verified",
    "choose",
    "decode",
    "greedy_decode",
    "verify",
    "with_end",
]
