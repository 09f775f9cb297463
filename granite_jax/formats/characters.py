"""Characters as they are seen: their widths, and where lines can break between them."""

# ruff: noqa: RUF001 (punctuation of many scripts)

import unicodedata
from collections.abc import Iterator

MAX_WIDTH = 42
"""Columns of a line; East Asian wide characters and emoji take two."""
NO_BREAK_SPACES = "\u00a0\u2007\u202f"
_DIRECTION_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NOT_FIRST = frozenset(
    ".,:;?!)]}%…»›”’、。，．：；？！」』）】〕〉》］｝‥・·゛゜ーゝゞヽヾ々〻％℃؟،؛۔।"
    "ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶㇰㇱㇲㇳㇴㇵㇶㇷㇸㇹㇺㇻㇼㇽㇾㇿ" + NO_BREAK_SPACES
)
NOT_LAST = frozenset("([{«‹“‘「『（【〔〈《［｛¿¡" + NO_BREAK_SPACES)


def clean(text: str) -> str:
    """The text with single spaces, and without control characters and tokens of which nothing can be seen."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    chars = []
    for char in text:
        category = unicodedata.category(char)
        if char in NO_BREAK_SPACES:
            if chars and chars[-1] not in NO_BREAK_SPACES:
                chars.append(char)
        elif char.isspace() or category in ("Zl", "Zp"):
            chars.append(" ")
        elif category != "Cc" and char != "\ufeff" and char not in _DIRECTION_CONTROLS:
            chars.append(char)
    tokens = (token.strip(NO_BREAK_SPACES) for token in "".join(chars).split(" "))
    return " ".join(token for token in tokens if any(map(_is_visible, token)))


def _is_visible(char: str) -> bool:
    return not char.isspace() and unicodedata.category(char) not in ("Cf", "Mn", "Me", "Cc")


def _clusters(text: str) -> Iterator[str]:
    """Characters as they are seen: each with its marks, emoji with their modifiers, flags as pairs."""
    cluster = ""
    for char in text:
        if cluster and not _extends(cluster, char):
            yield cluster
            cluster = ""
        cluster += char
    if cluster:
        yield cluster


def _extends(cluster: str, char: str) -> bool:
    code, category = ord(char), unicodedata.category(char)
    return (
        category in ("Mn", "Mc", "Me", "Cf")
        or (cluster[-1] == "\u200d" and category == "So")
        or 0x1F3FB <= code <= 0x1F3FF
        or code in (0x0E33, 0x0EB3, 0xFF9E, 0xFF9F)
        or 0x1160 <= code <= 0x11FF
        or (_is_regional(char) and _is_regional(cluster[0]) and len(cluster) == 1)
    )


def _is_regional(char: str) -> bool:
    return 0x1F1E6 <= ord(char) <= 0x1F1FF


def _cluster_width(cluster: str) -> int:
    if not any(_is_visible(char) or char.isspace() for char in cluster):
        return 0
    wide = any(unicodedata.east_asian_width(char) in "WF" for char in cluster)
    emoji = "\ufe0f" in cluster and not cluster[0].isspace()
    return 2 if wide or emoji or _is_regional(cluster[0]) else 1


def breaks_anywhere(cluster: str) -> bool:
    """Whether lines can break on both sides of a character: Chinese characters and kana, not Hangul."""
    char = cluster[0]
    return unicodedata.east_asian_width(char) in "WF" and not unicodedata.name(char, "").startswith("HANGUL")


def unbroken(token: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text without spaces, and whether each divides a word that is longer than a line."""
    part, width, last, continues = "", 0, "", False
    for cluster in _clusters(token):
        between = breaks_anywhere(cluster) or (last != "" and breaks_anywhere(last))
        divides = between and cluster[0] not in NOT_FIRST and last[:1] not in NOT_LAST
        columns = _cluster_width(cluster)
        full = width + columns > MAX_WIDTH
        if part and width and (divides or full):
            yield part.strip(NO_BREAK_SPACES), continues
            part, width, continues = "", 0, not divides
        part, width, last = part + cluster, width + columns, cluster
    if part:
        yield part.strip(NO_BREAK_SPACES), continues


def text_width(text: str) -> int:
    """Columns of a text: two for East Asian wide characters and emoji, none for marks and invisible characters."""
    return sum(map(_cluster_width, _clusters(text)))
