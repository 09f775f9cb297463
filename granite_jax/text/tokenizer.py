"""Text <-> token ids, from a checkpoint's `tokenizer.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from granite_jax.errors import CheckpointError, PromptError

PreTokenizer = Literal["file", "gpt2"]

_MAX_FILE_BYTES = 1 << 28


class SpecialToken(NamedTuple):
    """A special token found in a text, at the characters [start, end)."""

    start: int
    end: int
    id: int


class Tokenizer:
    """A byte-level BPE tokenizer that never interprets special tokens in text unless asked to.

    Safe to use from several threads: whether specials are interpreted is a mutable property of the underlying
    `tokenizers.Tokenizer`, so there are two of them, and neither changes after construction.
    """

    def __init__(self, definition: str, *, pre_tokenizer: PreTokenizer = "file") -> None:
        """Builds the tokenizer from the JSON text of a `tokenizer.json`; see `from_file`.

        Raises:
          CheckpointError: `definition` does not describe a tokenizer.
        """
        self._plain = _build(definition, pre_tokenizer)
        self._plain.encode_special_tokens = True
        self._interpreting = _build(definition, pre_tokenizer)
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        """Ids of all special tokens."""
        self._added_ids = frozenset(added)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, pre_tokenizer: PreTokenizer = "file") -> Tokenizer:
        """Reads a `tokenizer.json`.

        Args:
          path: the file.
          pre_tokenizer: how text is split into words before merging. "file": as the file says. "gpt2": by GPT-2's
            rule whatever the file says, as transformers 5 does if `tokenizer_class` is `GPT2Tokenizer`. For Granite's
            files the two differ, e.g. in whether `?` and a line feed after it are one token.

        Raises:
          CheckpointError: the file is missing, unreadable or not a tokenizer.
        """
        shown = ascii(os.fspath(path))
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if len(data) > _MAX_FILE_BYTES:
            raise CheckpointError(f"{shown}: more than {_MAX_FILE_BYTES >> 20} MiB")
        try:
            return cls(data.decode("utf-8"), pre_tokenizer=pre_tokenizer)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{shown}: not UTF-8 text") from error
        except CheckpointError as error:
            raise CheckpointError(f"{shown}: {error}") from error.__cause__

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._plain.get_vocab_size(with_added_tokens=True)

    def special_id(self, token: str) -> int:
        """The id of a special token such as `<|audio|>`; CheckpointError if the vocabulary has no such token."""
        token_id = self._plain.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which `<|audio|>` and the like are plain text. No BOS or EOS is added.

        Raises:
          PromptError: the text cannot be encoded, e.g. because it holds unpaired surrogates.
        """
        return _encode(self._plain, text).ids

    def find_special(self, text: str) -> list[SpecialToken]:
        """The special tokens in a text that may contain them (a rendered template, not a user's text), in order.

        Added tokens that the file does not call special are included: they, too, split the text before any merging.
        """
        encoding = _encode(self._interpreting, text)
        return [
            SpecialToken(start, end, id)
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id in self._added_ids
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids outside the vocabulary are left out, as in the reference."""
        return self._plain.decode([int(id) for id in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text of those before it; a character that several ids spell belongs to the last."""
        pieces, previous = [], ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            cut = len(text) if end == len(ids) else len(text.rstrip("\ufffd"))
            pieces.append(text[len(previous) : cut])
            previous += pieces[-1]
        return pieces


def _build(definition: str, pre_tokenizer: PreTokenizer) -> tokenizers.Tokenizer:
    if pre_tokenizer not in ("file", "gpt2"):
        raise ValueError(f"pre_tokenizer must be 'file' or 'gpt2', not {pre_tokenizer!r}")
    try:
        built = tokenizers.Tokenizer.from_str(definition)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # The library raises bare Exceptions, and PanicException, which is not one.
        raise CheckpointError(f"not a tokenizer ({' '.join(str(error).split())[:200]})") from error
    built.no_truncation()
    built.no_padding()
    if pre_tokenizer == "gpt2":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    return built


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # As above; TypeError for unpaired surrogates.
        raise PromptError(f"{ascii(text)[:60]}: cannot be tokenized ({' '.join(str(error).split())[:100]})") from error
