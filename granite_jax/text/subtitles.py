"""Subtitles: transcripts with times as SRT, WebVTT and TSV.

`cues` splits the text of segments into cues that can be read; `to_srt` and `to_vtt` write them, and `to_tsv` writes the
segments themselves. What is written is safe for parsers: three-digit milliseconds, no blank line within a text, no
empty cue, LF, no byte order mark, and cues in order that neither overlap nor end before they begin.
"""

# ruff: noqa: RUF001, RUF002 (punctuation of many scripts)

import dataclasses
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from granite_jax.errors import GraniteError
from granite_jax.results import Segment, Transcript, Word

MAX_WIDTH = 42
"""Columns of a line; East Asian wide characters and emoji take two."""
MAX_LINES = 2
MAX_MS = 7_000
MIN_MS = 833
"""Shortest cue (5/6 s), where the next one leaves that time."""
GAP_MS = 84
"""Shortest gap between two cues: two frames of 24 a second."""
PAUSE_MS = 500
"""Pause between words that always ends a cue. Shorter gaps between cues are closed to `GAP_MS`."""
MAX_SPEED = 20
"""Columns a second that can be read."""
_SLOT_MS = 250  # of cues whose words have no usable times


Timed = Transcript | Mapping[str, Any] | Iterable[Segment | Mapping[str, Any]]
"""A transcript or its segments; as objects, or as `granite-jax` writes them in JSON."""


@dataclasses.dataclass(frozen=True)
class Cue:
    """A text that is shown for a time.

    Fields:
      start, end: seconds, in whole milliseconds; `end` is after `start`.
      lines: one or two lines of text, without markup.
      speaker: who speaks, if the segment says so.
    """

    start: float
    end: float
    lines: tuple[str, ...]
    speaker: str | None = None


def cues(segments: Timed, *, label_speakers: bool = False) -> list[Cue]:
    """Splits segments into cues by the usual conventions for subtitles.

    A cue has at most two lines of 42 columns and lasts at most 7 s. It begins with its first word. It ends with its
    last word or later: it is prolonged into the pause that follows to 5/6 s, and to the time that 20 columns a second
    take. Gaps between cues are at least 84 ms, and those below 0.5 s are closed to that. A pause of 0.5 s or a change
    of speaker always ends a cue. Otherwise cues and lines break at the end of sentences if they can; then after
    punctuation, at shorter pauses, before conjunctions and prepositions (English, French, German, Spanish, Portuguese,
    Italian); and after articles, pronouns, auxiliaries and the like only if nothing else fits.

    Words have their own times; without words, a segment's time is shared among its characters. Text in Chinese
    characters and kana breaks between any two of them but before closing punctuation and small kana. Words longer than
    a line are broken, never within a character and its combining marks. There is no dictionary for languages without
    spaces such as Thai, whose long texts are broken like long words.

    Right-to-left text keeps its logical order. A line that begins with a letter of the other direction than most of its
    cue gets a mark (U+200F or U+200E) in front, because players take the direction from the first letter; explicit
    embeddings and overrides are removed, because a line could end within one.

    Times that go back or are not finite are replaced by the latest time before them. Cues whose words all have the same
    time last 250 ms each, and later ones are delayed as far as necessary.

    Args:
      segments: in order of time, or a `Transcript`, which has them; or either of these as JSON has it. Those without
        text are left out.
      label_speakers: whether the first cue of each speaker's turn begins with "Name: ".

    Raises:
      GraniteError: it is neither a transcript nor segments with a text and times.
    """
    runs = list(_runs(_segments(segments), label_speakers))
    spans: list[tuple[int, int, tuple[str, ...], str | None]] = []
    for index, run in enumerate(runs):
        following = runs[index + 1].atoms[0].start if index + 1 < len(runs) else None
        for first, last in _partition(run.atoms, following):
            atoms = run.atoms[first:last]
            spans.append((atoms[0].start, atoms[-1].end, _lines(atoms), run.speaker))
    starts: list[int] = []
    for start, *_ in spans:
        starts.append(max(start, starts[-1] + _SLOT_MS + GAP_MS) if starts else start)
    result = []
    for index, (_, spoken, lines, speaker) in enumerate(spans):
        start = starts[index]
        reading = math.ceil(1000 * sum(map(text_width, lines)) / MAX_SPEED)
        end = min(max(spoken, start + max(MIN_MS, reading)), start + MAX_MS)
        if index + 1 < len(starts) and starts[index + 1] - end < PAUSE_MS:
            end = min(starts[index + 1] - GAP_MS, start + MAX_MS)
        result.append(Cue(start / 1000, end / 1000, lines, speaker))
    return result


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


def to_tsv(segments: Timed) -> str:
    """One `Transcript`, or segments, as Whisper's tab-separated values: start, end, text, a line a segment with text.

    The first line is a header. Times are whole milliseconds. Tabs, line breaks and control characters of the text
    become spaces or are removed; quotes are not special (`csv.QUOTE_NONE`). Speakers are left out.
    """
    lines = ["start\tend\ttext\n"]
    latest = 0
    for segment in _segments(segments):
        if text := _clean(segment.text):
            latest = start = _milliseconds(segment.start, latest)
            lines.append(f"{start}\t{max(start, _milliseconds(segment.end, start))}\t{text}\n")
    return "".join(lines)


def text_width(text: str) -> int:
    """Columns of a text: two for East Asian wide characters and emoji, none for marks and invisible characters."""
    return sum(map(_cluster_width, _clusters(text)))


def _segments(timed: Timed) -> list[Segment]:
    """The segments of what is given. Raises GraniteError if it has none."""
    given: Any = timed
    segments = given.get("segments") if isinstance(given, Mapping) else getattr(given, "segments", given)
    if isinstance(segments, str | bytes) or not isinstance(segments, Iterable):
        kind = type(timed).__name__
        raise GraniteError(f"a {kind} has no times: give one Transcript, or segments with text, start and end")
    return [_segment(segment, number) for number, segment in enumerate(segments)]


def _segment(segment: Any, number: int) -> Segment:
    if isinstance(segment, Segment):
        return segment
    try:
        words = tuple(Word(*_text_and_times(word)) for word in segment.get("words") or ())
        text, start, end = _text_and_times(segment)
        return Segment(start, end, text, words=words, speaker=segment.get("speaker"))
    except (AttributeError, KeyError, TypeError, ValueError):
        kind = type(segment).__name__
        raise GraniteError(
            f"item {number}, a {kind}, is not a segment with text, start and end: give one Transcript, or its segments"
        ) from None


def _text_and_times(fields: Mapping[str, Any]) -> tuple[str, float, float]:
    if not isinstance(fields["text"], str):
        raise TypeError
    return fields["text"], float(fields["start"]), float(fields["end"])


# Formats.


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


# Characters.

_NO_BREAK_SPACES = "\u00a0\u2007\u202f"
_DIRECTION_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_NOT_FIRST = frozenset(
    ".,:;?!)]}%…»›”’、。，．：；？！」』）】〕〉》］｝‥・·゛゜ーゝゞヽヾ々〻％℃؟،؛۔।"
    "ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶㇰㇱㇲㇳㇴㇵㇶㇷㇸㇹㇺㇻㇼㇽㇾㇿ" + _NO_BREAK_SPACES
)
_NOT_LAST = frozenset("([{«‹“‘「『（【〔〈《［｛¿¡" + _NO_BREAK_SPACES)


def _clean(text: str) -> str:
    """The text with single spaces, and without control characters and tokens of which nothing can be seen."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    chars = []
    for char in text:
        category = unicodedata.category(char)
        if char in _NO_BREAK_SPACES:
            if chars and chars[-1] not in _NO_BREAK_SPACES:
                chars.append(char)
        elif char.isspace() or category in ("Zl", "Zp"):
            chars.append(" ")
        elif category != "Cc" and char != "\ufeff" and char not in _DIRECTION_CONTROLS:
            chars.append(char)
    tokens = (token.strip(_NO_BREAK_SPACES) for token in "".join(chars).split(" "))
    return " ".join(token for token in tokens if any(map(_is_visible, token)))


def _is_visible(char: str) -> bool:
    return not char.isspace() and unicodedata.category(char) not in ("Cf", "Mn", "Me", "Cc")


def _clusters(text: str) -> Iterator[str]:
    """Characters as they are seen: each with its marks, emoji with their modifiers, flags as pairs."""
    cluster = ""
    for char in text:
        if cluster and _extends(cluster, char):
            cluster += char
        else:
            if cluster:
                yield cluster
            cluster = char
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


def _breaks_anywhere(cluster: str) -> bool:
    """Whether lines can break on both sides of it: Chinese characters and kana, not Hangul."""
    char = cluster[0]
    return unicodedata.east_asian_width(char) in "WF" and not unicodedata.name(char, "").startswith("HANGUL")


# Atoms: what is never divided.


class _Atom(NamedTuple):
    text: str
    start: int  # milliseconds
    end: int
    spaced: bool  # whether a space separates it from the one before
    width: int
    continues: bool = False  # whether it is the rest of a word that is longer than a line
    opens: bool = False  # whether it begins a segment
    label: bool = False  # whether it is of a speaker's name


class _Run(NamedTuple):
    """Atoms of one speaker without a pause."""

    atoms: list[_Atom]
    speaker: str | None


def _milliseconds(seconds: float, latest: int) -> int:
    """The time in milliseconds, not before `latest`, which also replaces what is not finite."""
    return max(latest, round(seconds * 1000)) if math.isfinite(seconds) else latest


def _runs(segments: Iterable[Segment], label_speakers: bool) -> Iterator[_Run]:
    atoms: list[_Atom] = []
    speaker = labeled = None
    latest = 0
    for segment in segments:
        name = _clean(segment.speaker) or None if segment.speaker is not None else None
        opens = True
        for text, start, end, spaced in _pieces(segment, latest):
            for atom in _atoms(text, start, end, spaced):
                if atoms and (name != speaker or atom.start - atoms[-1].end >= PAUSE_MS):
                    yield _Run(atoms, speaker)
                    atoms = []
                if not atoms and label_speakers and name is not None and name != labeled:
                    pieces = _atoms(f"{name}:", atom.start, atom.start, False)
                    atoms = [piece._replace(label=True) for piece in pieces]
                    atom = atom._replace(spaced=True)
                elif opens and atoms:
                    joined = _breaks_anywhere(atoms[-1].text[-1]) and _breaks_anywhere(atom.text)
                    atom = atom._replace(spaced=not joined, opens=True)
                speaker = labeled = name
                atoms.append(atom)
                latest, opens = atom.start, False
    if atoms:
        yield _Run(atoms, speaker)


def _pieces(segment: Segment, latest: int) -> Iterator[tuple[str, int, int, bool]]:
    """Texts of a segment with their times, and whether a space is before each: its words, or all of its text."""
    text = _clean(segment.text)
    if not text:
        return
    start = _milliseconds(segment.start, latest)
    words = _aligned(text, [_clean(word.text) for word in segment.words])
    if words is None:
        yield text, start, _milliseconds(segment.end, start), True
        return
    latest = start if not math.isfinite(segment.words[0].start) else latest
    for (word, spaced), timed in zip(words, segment.words, strict=True):
        latest = _milliseconds(timed.start, latest)
        if word:
            yield word, latest, _milliseconds(timed.end, latest), spaced


def _aligned(text: str, words: Sequence[str]) -> list[tuple[str, bool]] | None:
    """Words with what the text has between them, and whether a space is before each. None: they are not the text's."""
    if not any(words):
        return None
    found_at, cursor = [], 0
    for word in words:
        found = text.find(word, cursor)
        if found < 0 or any(char.isalnum() for char in text[cursor:found]):
            return None
        found_at.append(found)
        cursor = found + len(word)
    if any(char.isalnum() for char in text[cursor:]):
        return None
    result = []
    begin, spaced = 0, True
    for found, word, limit in zip(found_at, words, [*found_at[1:], len(text)], strict=True):
        stop = found + len(word)
        if limit == len(text):
            stop = limit
        else:
            # Punctuation that follows belongs to the word; anything else, such as an opening quote, to the next.
            between = itertools.takewhile(lambda char: char == " " or char in _NOT_FIRST, text[stop:limit])
            stop += len("".join(between).rstrip(f" {_NO_BREAK_SPACES}"))
        result.append((text[begin:stop], spaced))
        spaced = text[stop : stop + 1].isspace()
        begin = stop + spaced
    return result


def _atoms(text: str, start: int, end: int, spaced: bool) -> list[_Atom]:
    """The parts of a text between which lines can break, which share its time by their widths."""
    parts: list[tuple[str, bool, bool]] = []
    for index, token in enumerate(text.split(" ")):
        first = True
        for part, continues in _parts(token):
            parts.append((part, first and (index > 0 or spaced), continues))
            first = False
    widths = [text_width(part) for part, *_ in parts]
    total = max(1, sum(widths))
    atoms, done = [], 0
    for (part, is_spaced, continues), width in zip(parts, widths, strict=True):
        begin = start + (end - start) * done // total
        done += width
        atoms.append(_Atom(part, begin, start + (end - start) * done // total, is_spaced, width, continues))
    return atoms


def _parts(token: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text without spaces, and whether each divides a word that is longer than a line."""
    part, width, last, continues = "", 0, "", False
    for cluster in _clusters(token):
        between = _breaks_anywhere(cluster) or (last != "" and _breaks_anywhere(last))
        divides = between and cluster[0] not in _NOT_FIRST and last[:1] not in _NOT_LAST
        columns = _cluster_width(cluster)
        full = width + columns > MAX_WIDTH
        if part and width and (divides or full):
            yield part.strip(_NO_BREAK_SPACES), continues
            part, width, continues = "", 0, not divides
        part, width, last = part + cluster, width + columns, cluster
    if part:
        yield part.strip(_NO_BREAK_SPACES), continues


# Breaks. The costs order them: an earlier kind is taken instead of a later one if both fit.

_SENTENCE, _CLAUSE, _SHORT_PAUSE = 0.0, 1.0, 2.0
_BEFORE = 3.0  # before a conjunction or preposition
_OTHER, _CHARACTERS = 5.0, 6.0
_NAME, _BOUND = 7.0, 9.0  # within a name; after a word that belongs to the next one
_TIGHT, _INSIDE = 12.0, 20.0  # before or after a mark or label; within a word
_SHORT_PAUSE_MS = 250
_CLOSING = "\"')]}»›”’」』）】"


def _words(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in text.split())


_ABBREVIATIONS = _words(
    "mr. mrs. ms. dr. prof. st. vs. e.g. i.e. jr. sr. z.b. bzw. ca. nr. hr. fr. mme. sra. dra. sig.",
)
_PREPOSITIONS_CONJUNCTIONS = _words(
    # English
    """and or but nor so because although though while when where whether if than that which who whom whose as since
    until unless after before at by for from in into of on onto over under to toward towards with within without
    about against between through during among across behind below beyond""",
    # French
    """et ou mais donc car ni que qui dont où quand comme si lorsque puisque parce de à en dans sur sous avec sans
    pour par vers chez entre pendant depuis avant après contre""",
    # German
    """und oder aber denn sondern weil dass daß ob wenn als wie während obwohl damit bevor nachdem von zu mit bei
    nach aus auf für über unter vor hinter neben zwischen durch gegen ohne um bis seit wegen""",
    # Spanish, Portuguese, Italian
    "y e o u pero sino porque aunque cuando donde mientras sin con por para desde hasta hacia sobre entre según",
    "mas porém embora quando onde enquanto com sem em até após",
    "ed od ma perché dove mentre se che di da su per tra fra senza dopo prima verso",
)
_BOUND_WORDS = _words(
    # Articles, pronouns, possessives, auxiliaries and negations. English
    """a an the this these those my your his her its our their i you he she it we they am is are was were be been
    being have has had do does did will would shall should can could may might must not no very""",
    # French
    """le la les un une des du ce cet cette ces mon ma mes ton ta tes son sa ses notre nos votre vos leur leurs je
    tu il elle on nous vous ils elles ne ai as avons avez ont est sont suis était au aux très""",
    # German
    """der die das den dem des ein eine einen einem einer eines kein keine mein meine sein seine ihr ihre unser
    unsere dieser diese dieses ich du er sie es wir ist sind war waren habe hat haben hatte wird werden kann nicht
    im am zum zur vom sehr""",
    # Spanish, Portuguese, Italian
    """el los las una unos unas lo al del mi mis tus su sus yo él ella nosotros ellos me te se era ha han he hay muy
    este esta estos estas""",
    """os um uma uns umas ao aos do da dos das na nas num numa meu minha seu sua eu ele ela nós eles é são foi tem
    têm não muito""",
    """il gli uno della dello delle degli dei nel nella nei sul sulla dal dalla mio mia suo sua io lui lei noi loro
    è sono ho hai abbiamo hanno non molto questo questa""",
)


def _break_cost(before: _Atom, after: _Atom) -> float:
    """How bad a break between two atoms is."""
    if after.continues:
        return _INSIDE
    if before.label:
        return _TIGHT
    if after.spaced and all(char in _NOT_FIRST for char in after.text):
        return _TIGHT  # a punctuation mark by itself, as before French question marks
    ending = before.text.rstrip(_CLOSING)
    word, following = _bare(before.text), _bare(after.text)
    if ending and ending[-1] in ".!?…。！？؟۔।｡":
        if ending.lower() in _ABBREVIATIONS or re.fullmatch(r"[^\W\d]\.", ending):
            return _BOUND
        goes_on = ending[-1] in ".…" and (after.text[0].islower() or ending[:-1].isdecimal())
        return _CLAUSE if goes_on else _SENTENCE
    if ending and ending[-1] in ",;:、，；：،؛—–":
        return _CLAUSE
    if before.text[-1:] in _NOT_LAST:
        return _TIGHT
    if after.start - before.end >= _SHORT_PAUSE_MS or after.opens:
        return _SHORT_PAUSE
    if not after.spaced:
        return _CHARACTERS
    if word in _BOUND_WORDS or word in _PREPOSITIONS_CONJUNCTIONS:
        return _BOUND
    if following in _PREPOSITIONS_CONJUNCTIONS:
        return _BEFORE
    if before.text[:1].isupper() and after.text[:1].isupper():
        return _NAME
    return _OTHER


def _bare(text: str) -> str:
    return text.strip("\"'“”‘’«»()[]¿¡").lower()


# Cues of a run, and lines of a cue.


def _partition(atoms: Sequence[_Atom], following: int | None) -> list[tuple[int, int]]:
    """Splits the atoms of a run into cues, as ranges: the partition of least cost, by dynamic programming.

    Args:
      following: start of the next run in milliseconds, or None.
    """
    count = len(atoms)
    columns, sentences = [0], [0]  # sums over the atoms before, and over the breaks up to it
    costs = [0.0]
    for index, atom in enumerate(atoms):
        columns.append(columns[-1] + atom.width + atom.spaced)
        costs.append(_break_cost(atom, atoms[index + 1]) if index + 1 < count else 0.0)
        sentences.append(sentences[-1] + (costs[-1] == _SENTENCE))
    reach = _reach(atoms, columns)
    best, previous = [0.0] + [math.inf] * count, [0] * (count + 1)
    for first in range(count):
        last = first
        for _ in range(MAX_LINES):
            last = reach[last] if last < count else last
        start = atoms[first].start
        for stop in range(first + 1, last + 1):
            if stop > first + 1 and atoms[stop - 1].end - start > MAX_MS:
                break
            width = columns[stop] - columns[first] - atoms[first].spaced
            next_start = atoms[stop].start if stop < count else following
            available = MAX_MS if next_start is None else min(MAX_MS, max(0, next_start - GAP_MS - start))
            reading = 1000 * width / MAX_SPEED
            cost = best[first] + 3 + costs[stop] + 4 * (sentences[stop - 1] - sentences[first])
            cost += 2 * max(0.0, 1 - width / 30)  # a few words by themselves
            if available < MIN_MS:
                cost += 2 + 6 * (1 - available / MIN_MS)
            if available < reading:
                cost += 6 * (1 - available / reading)
            if cost < best[stop]:
                best[stop], previous[stop] = cost, first
    ranges = []
    stop = count
    while stop:
        ranges.append((previous[stop], stop))
        stop = previous[stop]
    return ranges[::-1]


def _reach(atoms: Sequence[_Atom], columns: Sequence[int]) -> list[int]:
    """For each atom, where a line that begins with it ends at the latest."""
    reach, stop = [], 0
    for first, atom in enumerate(atoms):
        stop = max(stop, first + 1)
        while stop < len(atoms) and columns[stop + 1] - columns[first] - atom.spaced <= MAX_WIDTH:
            stop += 1
        reach.append(stop)
    return reach


def _lines(atoms: Sequence[_Atom]) -> tuple[str, ...]:
    """The atoms of a cue as one line or two: broken where that is good, of like widths, and the second one longer."""
    whole = _joined(atoms)
    if text_width(whole) <= MAX_WIDTH:
        return _directed([whole])
    options = []
    for index in range(1, len(atoms)):
        top, bottom = _joined(atoms[:index]), _joined(atoms[index:])
        widths = text_width(top), text_width(bottom)
        if max(widths) <= MAX_WIDTH:
            cost = _break_cost(atoms[index - 1], atoms[index]) + abs(widths[0] - widths[1]) / 8
            options.append((cost + (widths[0] > widths[1]), index, [top, bottom]))
    return _directed(min(options)[-1])


def _joined(atoms: Sequence[_Atom]) -> str:
    return "".join(" " * (atom.spaced and index > 0) + atom.text for index, atom in enumerate(atoms))


def _directed(lines: Sequence[str]) -> tuple[str, ...]:
    """Lines that begin with a letter of the cue's direction, or with a mark of that direction."""
    strong = [[char for char in line if unicodedata.bidirectional(char) in ("L", "R", "AL")] for line in lines]
    letters = [unicodedata.bidirectional(char) != "L" for chars in strong for char in chars]
    rtl = 2 * sum(letters) > len(letters)
    mark = "\u200f" if rtl else "\u200e"
    return tuple(
        mark + line if chars and (unicodedata.bidirectional(chars[0]) != "L") != rtl else line
        for line, chars in zip(lines, strong, strict=True)
    )
