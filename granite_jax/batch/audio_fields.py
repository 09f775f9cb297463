"""Where a manifest's entry says which audio it is of: in fields of this program, or of other tools.

| fields | from |
| --- | --- |
| `audio`, `audio_filepath` | this program, NeMo |
| one of `OTHER_NAMES`, if there is neither | Common Voice, Hugging Face's `metadata.csv`, SpeechBrain |
| `{"audio": {"path": ...}}` | Hugging Face |
| `recording`, `start`, `duration` | cuts of Lhotse |
| `sources` | recordings of Lhotse |
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from granite_jax.errors import GraniteError

MAX_TEXT = 8192
"""Characters of an audio name, an id, a prompt or a keyword."""
NAMES = ("audio", "audio_filepath")
OTHER_NAMES = (
    *("path", "file_name", "file", "filename", "wav"),
    *("audio_path", "audio_file", "file_path", "filepath", "wav_path"),
)
# Fields by which other tools' manifests name an excerpt, in units and from origins that differ between tools.
_EXCERPT = re.compile(
    r"start|stop|end|begin|onset|t0|(begin|start|end)_time|(?!duration|length).*_(ms|sec|frames?)|frame_offset"
    r"|segments?|channel"
)


def name_of_audio(names: Iterable[str]) -> str | None:
    """The field or column that names the audio; None if there is none. Raises GraniteError if there are several."""
    given = set(names)
    for known in (NAMES, OTHER_NAMES):
        found = [name for name in known if name in given]
        if len(found) > 1:
            raise GraniteError(f"has both {found[0]} and {found[1]}")
        if found:
            return found[0]
    return None


def is_lhotse(fields: Mapping[str, Any]) -> bool:
    """Whether an entry is a cut or a recording of Lhotse."""
    recording = fields.get("recording", fields)
    sources = recording.get("sources") if isinstance(recording, Mapping) else None
    return isinstance(sources, list) and all(isinstance(source, Mapping) for source in sources)


def audio_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `audio` of an entry, and the `offset` and `duration` of an excerpt where other fields say these.

    Raises:
      GraniteError: the entry names no audio, several, or what is not a whole file or an excerpt of one; or it names an
        excerpt by fields whose meaning is not certain.
    """
    name = name_of_audio(fields)
    if is_lhotse(fields):
        if name is not None:
            raise GraniteError(f"has both {name} and a recording of Lhotse")
        return _lhotse(fields)
    if name is None:
        raise GraniteError(f"names no audio by audio or path; its fields are {', '.join(fields)[:200] or 'none'}")
    if (excerpt := uncertain_excerpt(fields)) is not None:
        raise GraniteError(f"names an excerpt by {excerpt:.40}: give offset and duration, in seconds")
    value = fields[name]
    if isinstance(value, Mapping):
        if value.get("bytes") is not None or value.get("array") is not None:
            raise GraniteError(f"{name} holds the samples or bytes themselves: write them to files, and name these")
        value = value.get("path")
    return {"audio": text_field(name, value)}


def uncertain_excerpt(fields: Mapping[str, Any]) -> str | None:
    """A field that may say where an excerpt of the audio begins or ends, and is not `offset` or `duration`.

    Beside `audio` or `audio_filepath`, fields of others change nothing, except those that give `offset` or `duration`
    another meaning.
    """
    if "start" in fields and "duration" in fields and "offset" not in fields:
        return "start"
    if "onset" in fields and "offset" in fields:  # which is then the excerpt's end
        return "onset"
    if any(name in fields for name in NAMES):
        return None
    found = (field for field in fields if _EXCERPT.fullmatch(field.lower()))
    # The column `segment` of Common Voice has the name of a subset.
    return next((field for field in found if field != "segment" or re.search(r"\d", str(fields[field]))), None)


def text_field(name: str, value: Any) -> str:
    """The value of a field if it is a short text. Raises GraniteError if not."""
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT or "\0" in value:
        raise GraniteError(f"{name} must be a short string that is not empty, not {value!r:.40}")
    return value


def _lhotse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a cut or recording of Lhotse: all of its channels, from the cut's start on."""
    recording = fields.get("recording", fields)
    source = recording["sources"][0] if len(recording["sources"]) == 1 else None
    if not isinstance(source, Mapping) or source.get("type") not in ("file", "url"):
        raise GraniteError("is a recording of Lhotse that is not one file or URL")
    if recording.get("transforms"):
        raise GraniteError("is a recording of Lhotse with transforms: write what they make to files")
    audio = text_field("source", source.get("source"))
    start, duration = fields.get("start"), fields.get("duration")
    if recording is not fields:
        chosen, channels = fields.get("channel", 0), source.get("channels", [0])
        if _as_set(chosen) != _as_set(channels):
            raise GraniteError(f"is a cut of channel {chosen} of {channels}: write it to a file of its own")
    if not start and duration == recording.get("duration"):
        duration = None  # which may be rounded
    return {"audio": audio, "offset": start, "duration": duration}


def _as_set(channels: Any) -> set[str]:
    return set(map(repr, channels if isinstance(channels, list) else [channels]))
