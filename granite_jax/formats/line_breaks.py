"""Where lines and cues break best."""

# ruff: noqa: RUF001 (punctuation of many scripts)

import re
import unicodedata
from collections.abc import Sequence

from granite_jax.formats.atoms import Atom
from granite_jax.formats.characters import MAX_WIDTH, NOT_FIRST, NOT_LAST, text_width

# Breaks. The costs order them: an earlier kind is taken instead of a later one if both fit.

SENTENCE, _CLAUSE, _SHORT_PAUSE = 0.0, 1.0, 2.0
_BEFORE = 3.0  # before a conjunction or preposition
_OTHER, _CHARACTERS = 5.0, 6.0
_NAME, _BOUND = 7.0, 9.0  # within a name; after a word that belongs to the next one
_TIGHT, _INSIDE = 12.0, 20.0  # before or after a mark or label; within a word
_SHORT_PAUSE_MS = 250
_CLOSING = "\"')]}»›”’」』）】"


def _words(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


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


def break_cost(before: Atom, after: Atom) -> float:
    """How bad a break between two atoms is."""
    if after.continues:
        return _INSIDE
    if before.label:
        return _TIGHT
    if after.spaced and all(char in NOT_FIRST for char in after.text):
        return _TIGHT  # a punctuation mark by itself, as before French question marks
    ending = before.text.rstrip(_CLOSING)
    word, following = _bare(before.text), _bare(after.text)
    if ending and ending[-1] in ".!?…。！？؟۔।｡":
        if ending.lower() in _ABBREVIATIONS or re.fullmatch(r"[^\W\d]\.", ending):
            return _BOUND
        goes_on = ending[-1] in ".…" and (after.text[0].islower() or ending[:-1].isdecimal())
        return _CLAUSE if goes_on else SENTENCE
    if ending and ending[-1] in ",;:、，；：،؛—–":
        return _CLAUSE
    if before.text[-1:] in NOT_LAST:
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


def lines_of(atoms: Sequence[Atom]) -> tuple[str, ...]:
    """The atoms of a cue as one line or two: broken where that is good, of like widths, and the second one longer."""
    whole = _joined(atoms)
    if text_width(whole) <= MAX_WIDTH:
        return _directed([whole])
    options = []
    for index in range(1, len(atoms)):
        top, bottom = _joined(atoms[:index]), _joined(atoms[index:])
        widths = text_width(top), text_width(bottom)
        if max(widths) <= MAX_WIDTH:
            cost = break_cost(atoms[index - 1], atoms[index]) + abs(widths[0] - widths[1]) / 8
            options.append((cost + (widths[0] > widths[1]), index, [top, bottom]))
    return _directed(min(options)[-1])


def _joined(atoms: Sequence[Atom]) -> str:
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
