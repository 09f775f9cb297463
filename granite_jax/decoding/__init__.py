"""Decoding on the device: `lax.while_loop`s over a step function, with or without drafts."""

from granite_jax.decoding.bias import LogitBias, NoBias, States
from granite_jax.decoding.choice import Choice, Greedy, Selection
from granite_jax.decoding.draft import REALIGN, Draft, Realign
from granite_jax.decoding.loop import (
    WINDOW,
    DraftProposal,
    VerifierOutput,
    accept_draft,
    decode,
    greedy_decode,
    verify,
    with_end,
)
from granite_jax.decoding.state import DecodeState

__all__ = [
    "REALIGN",
    "WINDOW",
    "Choice",
    "DecodeState",
    "Draft",
    "DraftProposal",
    "Greedy",
    "LogitBias",
    "NoBias",
    "Realign",
    "Selection",
    "States",
    "VerifierOutput",
    "accept_draft",
    "decode",
    "greedy_decode",
    "verify",
    "with_end",
]
