"""What a caller gives, as inputs one after another: with their names, channels, keywords and drafts."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple

from granite_jax.audio.load import is_encoded, num_channels, path_of, read_stream
from granite_jax.errors import AudioError, GraniteError
from granite_jax.keywords.options import KeywordList
from granite_jax.options import Channels


class Input(NamedTuple):
    """One input, or a channel of one.

    Fields:
      name: in results and errors.
      source: as in `Transcriber.transcribe`.
      channel: from 0 on; None for the mean of all.
      keywords: that replace those of the options.
      draft: for the language model.
    """

    name: str
    source: Any
    channel: int | None = None
    keywords: KeywordList | None = None
    draft: str | None = None


def inputs_of(
    audio: Iterable[Any],
    channels: Channels,
    keyword_lists: Iterable[KeywordList | None] | None = None,
    drafts: Iterable[str | None] | None = None,
) -> Iterator[Input]:
    """Each input under its name, once for each of its channels if these are split.

    Raises:
      GraniteError: a list has another length than `audio`: where an input lacks an entry, or after the last input.
    """
    for index, (source, keywords, draft) in enumerate(_with_lists(audio, keyword_lists, drafts)):
        name = name_of(source, index)
        for content, channel in _channels(source, channels):
            yield Input(name, content, channel, keywords, draft)


def is_one_input(audio: Any) -> bool:
    """Whether this is one input though it can be iterated: a file, a dict, an array, or a pair (array, rate)."""
    if isinstance(audio, tuple):
        return len(audio) == 2 and isinstance(audio[1], Real)
    # An array or a column of a table can also hold names of files.
    is_array = hasattr(audio, "__array__") and getattr(getattr(audio, "dtype", None), "kind", "f") not in "OSTU"
    return is_array or is_encoded(audio) or isinstance(audio, Mapping)


def name_of(source: Any, index: int) -> str:
    """The path of a source, or a name made from its position."""
    path = path_of(source)
    return f"audio[{index}]" if path is None else path


def _with_lists(
    audio: Iterable[Any], keyword_lists: Iterable[Any] | None, drafts: Iterable[Any] | None
) -> Iterator[tuple[Any, Any, Any]]:
    """Inputs with their keywords and drafts. Raises GraniteError if there are not as many."""
    given = {"keyword_lists": keyword_lists, "drafts": drafts}
    lists = {name: iter(values) for name, values in given.items() if values is not None}
    count, end = 0, object()
    for source in audio:
        values = {name: next(entries, end) for name, entries in lists.items()}
        for name, value in values.items():
            if value is end:
                raise GraniteError(f"{name} has {count} entries, and there are more inputs")
        yield source, values.get("keyword_lists"), values.get("drafts")
        count += 1
    for name, entries in lists.items():
        if next(entries, end) is not end:
            raise GraniteError(f"{name} has more than {count} entries, as many as there are inputs")


def _channels(source: Any, channels: Channels) -> Iterator[tuple[Any, int | None]]:
    """An input for each of its channels from 0 on; once, without a channel, if they are mixed."""
    if channels == "mix":
        yield source, None
        return
    count = 1  # of what cannot be read: the error is reported where it is read again
    with contextlib.suppress(AudioError):
        if hasattr(source, "read"):
            source = read_stream(source)  # several readers cannot share a file
        count = num_channels(source)
    yield from ((source, channel) for channel in range(count))
