"""Transcripts as subtitles: SubRip and WebVTT.

They are safe for parsers: three-digit milliseconds, no blank line within a text, no empty cue, LF, no byte order mark,
and cues in order that neither overlap nor end before they begin.
"""

# ruff: noqa: RUF002 (punctuation of many scripts)

import re
from collections.abc import Sequence

from granite_jax.formats.cues import cues
from granite_jax.formats.schema import Timed


def to_srt(segments: Timed) -> str:
    """One `Transcript`, or segments, as SubRip (.srt), cue by cue as `cues` splits them; "" without text.

        Path("talk.srt").write_text(gj.to_srt(transcript), encoding="utf-8", newline="\\n")

    The first cue of each speaker's turn begins with "Name: ". SRT has no escapes, and its readers take markup of HTML
    and of SubStation Alpha; what would be read as markup is therefore replaced by what looks alike: `<` that could
    begin a tag by `‹`, the end of `-->` by `›`, braces by parentheses. An invisible word joiner (U+2060) follows each
    backslash, and stands within what looks like a time of a cue.
    """
    blocks = []
    shown = cues(segments, label_speakers=True)
    for index, cue in enumerate(shown, 1):
        text = _srt_text(cue.lines)
        if index == len(shown) and len(cue.lines) > 1 and cue.lines[-1].isdecimal():
            text += "\u2060"  # pysubs2 takes a number in a file's last line for an index
        blocks.append(f"{index}\n{_timestamp(cue.start, ',')} --> {_timestamp(cue.end, ',')}\n{text}\n")
    return "\n".join(blocks)


def to_vtt(segments: Timed) -> str:
    """One `Transcript`, or segments, as WebVTT (.vtt), cue by cue as `cues` splits them; the header alone without text.

    The characters `&`, `<` and `>` of the text are escaped. Each cue of a speaker begins with a voice tag, `<v Name>`.
    """
    blocks = ["WEBVTT\n"]
    for cue in cues(segments):
        text = "\n".join(map(_escaped, cue.lines))
        voice = "" if cue.speaker is None else f"<v {_escaped(cue.speaker)}>"
        blocks.append(f"{_timestamp(cue.start, '.')} --> {_timestamp(cue.end, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def _timestamp(seconds: float, separator: str) -> str:
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}{separator}{milliseconds:03}"


def _srt_text(lines: Sequence[str]) -> str:
    text = re.sub(r"-([ -] *)>", "-\\1\u203a", "\n".join(lines))
    text = re.sub(r"<(?=[A-Za-z/!?]|[^>]*>)", "\u2039", text)
    text = text.replace("{", "(").replace("}", ")").replace("\\", "\\\u2060")
    return re.sub(r"(\d:\d{1,2}:\d{1,2})(?=[.,]\d)", "\\1\u2060", text)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
