"""Decoding on the device: `lax.while_loop`s over a step function, with or without drafts."""

from granite_jax.decoding.automaton import Automata, Bias, FullError, Phrase, Trie, build, no_keywords, pool
from granite_jax.decoding.draft import REALIGN, Draft, Realign
from granite_jax.decoding.loop import WINDOW, Proposed, Verified, choose, decode, greedy_decode, verify, with_end
from granite_jax.decoding.state import DecodeState

__all__ = [
    "REALIGN",
    "WINDOW",
    "Automata",
    "Bias",
    "DecodeState",
    "Draft",
    "FullError",
    "Phrase",
    "Proposed",
    "Realign",
    "Trie",
    "Verified",
    "build",
    "choose",
    "decode",
    "greedy_decode",
    "no_keywords",
    "pool",
    "verify",
    "with_end",
]
