"""The figures of `granite_jax.plotting`."""

import difflib
import functools
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from granite_jax.errors import GraniteError, printable
from granite_jax.models.layers import ctc
from granite_jax.models.layers.features import HOP, NUM_MELS
from granite_jax.recognition.words import locate_words
from granite_jax.results import Emissions, Transcript, Word
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE

try:
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'granite-jax[plots]'") from error

if TYPE_CHECKING:
    from granite_jax.batch import Progress, Summary

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_MEL_SECONDS = HOP / SAMPLING_RATE
_HERTZ = (250, 500, 1000, 2000, 4000)
_SECONDS_PER_ROW = 8.0  # of an overview
_FLOOR = 0.1
_WORDS = re.compile(r"\s*\S+|\s+$")
_WIDTH, _OVERVIEW_WIDTH = 10.0, 13.0  # inches
_FONT_POINTS, _CELL_POINTS, _LABEL, _LINE_INCHES = 10.0, 6.03, 7, 0.5  # of a comparison's monospaced lines
_STYLES: Mapping[str, dict[str, Any]] = {
    "written": {},
    "accepted": {"bbox": {"facecolor": "#BBDDF0", "edgecolor": "none", "pad": 1.2}},
    "same": {"bbox": {"facecolor": "white", "edgecolor": BLUE, "pad": 1.2}},
    "rejected": {"bbox": {"facecolor": "white", "edgecolor": ORANGE, "linestyle": "--", "pad": 1.2}},
    "corrected": {"bbox": {"facecolor": "#FBCBA6", "edgecolor": ORANGE, "pad": 1.2}, "weight": "bold"},
}
_LEGEND = {
    "accepted": "accepted from the draft",
    "same": "the language model's own, as in the draft",
    "rejected": "rejected",
    "corrected": "correction",
}
_ASIAN_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei")


def overview(emissions: Emissions, transcript: Transcript, tokenizer: Tokenizer, text: str | None = None) -> Figure:
    """One utterance: log-mel, CTC posteriors and words over time, then draft and text.

    Args:
      emissions: those of the same audio, from `Transcriber.ctc_emissions`.
      text: text to align to the audio, default the transcript's; for a translation, pass the `ctc_text`.

    Raises:
      GraniteError: the transcript is an error.
    """
    if transcript.error is not None:
        raise GraniteError(transcript.error)
    duration = len(emissions.features) * ctc.FRAME_SECONDS
    rows = max(1, math.ceil(duration / _SECONDS_PER_ROW - 0.05))
    lines = _lines(compare(transcript, tokenizer), _columns(_OVERVIEW_WIDTH))
    num_labels = len(_probable_labels(_probabilities(emissions.ctc_logits)))
    heights = [*[1.6, 0.6 + 0.12 * num_labels, 0.6] * rows, 0.5 + _LINE_INCHES * len(lines)]
    figure = _figure(_OVERVIEW_WIDTH, 0.7 + sum(heights) + 0.25 * len(heights))
    figure.suptitle(f"{printable(transcript.audio)}: {duration:.1f} s", fontfamily=_fonts(), parse_math=False)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[60, 1])
    aligned_words = _words(emissions.ctc_logits, transcript.text if text is None else text, transcript.ctc_text)
    for row in range(rows):
        panels = [figure.add_subplot(grid[3 * row + panel, 0]) for panel in range(3)]
        bars = [figure.add_subplot(grid[3 * row + panel, 1]) for panel in range(2)]
        log_mel(emissions.features, ax=panels[0], cax=bars[0])
        ctc_posteriors(emissions.ctc_logits, ax=panels[1], cax=bars[1])
        alignment(aligned_words, ax=panels[2])
        start = row * _SECONDS_PER_ROW
        end = duration if rows == 1 else start + _SECONDS_PER_ROW
        for ax in panels:
            ax.set_xlim(start, max(end, duration) if row == rows - 1 else end)
        for ax in panels[:2]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
    draft(transcript, tokenizer, ax=figure.add_subplot(grid[-1, :]))
    return figure


def log_mel(features: Float[np.ndarray, "t 160"], *, ax: Axes | None = None, cax: Axes | None = None) -> Figure:
    """Log-mel features of one utterance, from `granite_jax.log_mel`, in decibels below the loudest.

    Args:
      ax, cax: axes for the picture and for its color bar.
    """
    # The features are log10(power) / 4 + 1.
    level = 40.0 * (np.asarray(features) - np.max(features))
    return mel_map(level, "log-mel level\n(dB below the loudest)", ax=ax, cax=cax, limits=(-80.0, 0.0))


def mel_map(
    values: Float[np.ndarray, "t 160"],
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    colors: str = "magma",
    ax: Axes | None = None,
    cax: Axes | None = None,
) -> Figure:
    """Anything that has the shape of the features, such as gradients with respect to them.

    Args:
      label: of the color bar: what the values are, with their unit.
      limits: values of the first and the last color.
      colors: a color map of matplotlib.
    """
    ax = _axes(ax, 10.0, 3.0)
    picture = np.asarray(values, np.float32).reshape(-1, NUM_MELS).T
    low, high = limits or (float(picture.min()), float(picture.max()))
    image = ax.imshow(
        picture,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0.0, picture.shape[1] * _MEL_SECONDS, 0.0, NUM_MELS),
        vmin=low,
        vmax=high,
        cmap=colors,
    )
    ax.set_yticks([_mel_position(hertz) for hertz in _HERTZ], [f"{hertz:,}" for hertz in _HERTZ], fontsize=8)
    ax.set_ylabel(f"{NUM_MELS} mel bands,\nfrequency (Hz)")
    ax.set_xlabel("time (s)")
    return _with_bar(ax, cax, image, label)


def ctc_posteriors(
    logits: Float[np.ndarray, "t c"], *, floor: float = _FLOOR, ax: Axes | None = None, cax: Axes | None = None
) -> Figure:
    """CTC posteriors of one utterance: probabilities of the blank and of characters in every 20 ms frame.

    Args:
      logits: those of `granite_jax.ctc_logits`.
      floor: characters that are less probable than this in every frame are left out.
    """
    ax = _axes(ax, 10.0, 3.6)
    probabilities = _probabilities(logits)
    labels = _probable_labels(probabilities, floor)
    names = ["blank", *("space" if label == ord(" ") else ctc.label_character(label) for label in labels)]
    image = ax.imshow(
        probabilities[:, [ctc.BLANK, *labels]].T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0.0, len(probabilities) * ctc.FRAME_SECONDS, -0.5, len(names) - 0.5),
        vmin=0.0,
        vmax=1.0,
        cmap="Blues",
    )
    ax.set_yticks(range(len(names)), names, fontsize=7, fontfamily=_fonts())
    ax.hlines(np.arange(len(names)) + 0.5, 0.0, len(probabilities) * ctc.FRAME_SECONDS, color="#e0e0e0", linewidth=0.4)
    ax.set_ylabel("CTC label")
    ax.set_xlabel("time (s)")
    return _with_bar(ax, cax, image, "probability")


def alignment(words: Sequence[Word], *, ax: Axes | None = None) -> Figure:
    """When each word was spoken, according to `inference.words`."""
    ax = _axes(ax, 10.0, 1.0)
    for position, word in enumerate(words):
        ax.axvspan(word.start, word.end, facecolor=("#d0d0d0", "#e8e8e8")[position % 2], edgecolor=GREY, linewidth=0.5)
        ax.text(
            (word.start + word.end) / 2, (0.72, 0.28)[position % 2], word.text, ha="center", va="center", fontsize=9,
            fontfamily=_fonts(), parse_math=False, clip_on=True,
        )  # fmt: skip
    ax.set_ylim(0.0, 1.0)
    ax.set_yticks([])
    ax.set_ylabel("words")
    ax.set_xlabel("time (s)")
    if words:
        ax.set_xlim(0.0, words[-1].end + 0.1)
    return _figure_of(ax)


Kind = Literal["accepted", "same", "corrected", "written"]


class Passage(NamedTuple):
    """A passage of the draft and the text in its place.

    Fields:
      kind: "accepted": draft tokens that were accepted; "same": tokens that the language model wrote and the draft has,
        too; "corrected": tokens that it wrote in place of the draft's, either of which can be empty; "written": a whole
        text without a draft.
      draft, text: the passage in each.
    """

    kind: Kind
    draft: str
    text: str


def compare(transcript: Transcript, tokenizer: Tokenizer) -> list[Passage]:
    """What became of the draft, from the record of the decode loop (`Transcript.draft`, `.accepted_spans`)."""
    draft_tokens, tokens = transcript.draft, transcript.tokens
    draft_pieces, pieces = tokenizer.pieces(draft_tokens), tokenizer.pieces(tokens)
    if not draft_tokens:
        return [Passage("written", "", "".join(pieces))] if pieces else []
    passages: list[Passage] = []

    def add(kind: Kind, i: int, j: int, a: int, b: int) -> None:
        """Draft tokens i to j beside tokens a to b."""
        if i < j or a < b:
            passages.append(Passage(kind, "".join(draft_pieces[i:j]), "".join(pieces[a:b])))

    def add_own(i: int, j: int, a: int, b: int) -> None:
        """What the language model wrote itself, beside the draft tokens that were not accepted."""
        matcher = difflib.SequenceMatcher(None, draft_tokens[i:j], tokens[a:b], autojunk=False)
        for tag, i1, i2, a1, a2 in matcher.get_opcodes():
            add("same" if tag == "equal" else "corrected", i + i1, i + i2, a + a1, a + a2)

    i = a = 0
    for position, source, size in transcript.accepted_spans:
        add_own(i, max(i, source), a, position)  # decoding can go back in the draft
        add("accepted", source, source + size, position, position + size)
        i, a = source + size, position + size
    # The rest of the draft was rejected only if the language model ended the text.
    add_own(i, len(draft_tokens) if transcript.stats.get("finish") == "end" else i, a, len(tokens))
    return passages


def draft(transcript: Transcript, tokenizer: Tokenizer, *, ax: Axes | None = None) -> Figure:
    """Draft above text, with the passages of `compare` marked by kind."""
    passages, stats = compare(transcript, tokenizer), transcript.stats
    width = _WIDTH if ax is None else cast(Figure, ax.get_figure()).get_figwidth()
    lines = _lines(passages, _columns(width))
    ax = _axes(ax, _WIDTH, 0.9 + _LINE_INCHES * len(lines))
    ax.set_axis_off()
    ax.set_ylim(-max(1, len(lines)), 0)
    shown = [row for row in (0, 1) if row or transcript.draft]
    for number, line in enumerate(lines):
        heights = [-number - (0.72, 0.28)[row == 0] for row in (0, 1)]
        for row in shown:
            _put(ax, ("draft", "text")[row], 0, heights[row], color=GREY)
        for column, passage in line:
            for row in shown:
                side = (passage.draft, passage.text)[row]
                style = _STYLES["rejected" if row == 0 and passage.kind == "corrected" else passage.kind]
                if side.strip():
                    _put(ax, side.strip(), _LABEL + column + _cells(side[: -len(side.lstrip())]), heights[row], **style)
    kinds = {"rejected" if passage.kind == "corrected" and passage.draft else passage.kind for passage in passages}
    kinds |= {"corrected"} & {passage.kind for passage in passages if passage.text}
    boxes = {kind: {**_STYLES[kind]["bbox"], "label": label} for kind, label in _LEGEND.items() if kind in kinds}
    handles = [Patch(**{key: value for key, value in box.items() if key != "pad"}) for box in boxes.values()]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, borderaxespad=0)
    accepted, drafted = stats.get("accepted_tokens", 0), stats.get("draft_tokens", 0)
    passes = stats.get("llm_passes", 0)
    passes_title = f"{passes} pass{'es' * (passes != 1)} of the language model for {len(transcript.tokens)} tokens"
    ax.set_title(f"{passes_title}; {accepted} of {drafted} draft tokens accepted", fontsize=10, loc="left", pad=24)
    return _figure_of(ax)


def throughput(runs: Mapping[str, tuple["Summary", Sequence["Progress"]]]) -> Figure:
    """How batch jobs went: utterances over time, and audio transcribed a second.

    Args:
      runs: by name, a job's summary and copies of the reports that its `progress` was called with.
    """
    figure = _figure(_WIDTH, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for position, (name, (_, reports)) in enumerate(runs.items()):
        color, marker = _COLORS[position % len(_COLORS)], "osD^vP"[position % 6]
        seconds, done = [0.0, *(r.seconds for r in reports)], [0, *(r.done for r in reports)]
        left.step(seconds, done, where="post", color=color, marker=marker, markevery=[-1], label=name)
    left.set(xlabel="time (s)", ylabel="utterances transcribed", xlim=(0.0, None), ylim=(0.0, None))
    left.legend(loc="lower right")
    left.grid(color="#e0e0e0")
    rates = [summary.rtfx for summary, _ in runs.values()]
    bars = right.barh(list(runs), rates, color=[_COLORS[i % len(_COLORS)] for i in range(len(runs))])
    right.bar_label(bars, [f" {rate:.1f}" for rate in rates])
    right.set(xlabel="RTFx (seconds of audio a second)", xlim=(0.0, 1.2 * max([*rates, 0.1])))
    right.invert_yaxis()
    right.spines[["top", "right"]].set_visible(False)
    return figure


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises GraniteError if matplotlib cannot write pictures with this ending."""
    suffix = os.path.splitext(os.fspath(path))[1][1:].lower()
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if suffix not in kinds:
        raise GraniteError(f"{printable(os.fspath(path))}: a picture ends in one of .{', .'.join(kinds)}")


def _probabilities(logits: np.ndarray) -> np.ndarray:
    scores = np.asarray(logits, np.float64)
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def _probable_labels(posteriors: np.ndarray, floor: float = _FLOOR) -> list[int]:
    """Labels of characters that are at least this probable in some frame."""
    return [int(label) for label in np.flatnonzero(posteriors.max(axis=0) >= floor) if ctc.label_character(int(label))]


_Line = list[tuple[int, Passage]]


def _lines(passages: Sequence[Passage], columns: int) -> list[_Line]:
    """Passages in lines, broken between words, each with the column that it begins at."""
    words: list[list[Passage]] = []
    for kind, *sides in passages:
        for draft, text in itertools.zip_longest(*map(_WORDS.findall, sides), fillvalue=""):
            if not words or draft[:1].isspace() or text[:1].isspace():
                words.append([])
            words[-1].append(Passage(kind, draft, text))
    lines: list[_Line] = [[]]
    column = 0
    for word in words:
        if column and column + sum(map(_width, word)) > columns:
            word[0] = word[0]._replace(draft=word[0].draft.lstrip(), text=word[0].text.lstrip())
            lines.append([])
            column = 0
        for part in word:
            lines[-1].append((column, part))
            column += _width(part)
    return [line for line in lines if any(map(_width, (part for _, part in line)))]


def _width(passage: Passage) -> int:
    return max(_cells(passage.draft), _cells(passage.text))


def _cells(text: str) -> int:
    """Width in columns of a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _columns(inches: float) -> int:
    return int((72 * inches - 100) / _CELL_POINTS) - _LABEL


def _put(ax: Axes, text: str, column: int, y: float, **style: Any) -> None:
    """Monospaced text at a column, whatever the width of the axes."""
    box = style.pop("bbox", None)
    # Boxes are drawn below all text, those without an edge lowest.
    layers = [{"color": "none", "bbox": box, "zorder": 1 if box["edgecolor"] == "none" else 2}] if box else []
    for layer in (*layers, {**style, "zorder": 3}):
        ax.annotate(
            text, (0.0, y), (column * _CELL_POINTS, 0.0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="baseline", fontsize=_FONT_POINTS, fontfamily=_fonts("DejaVu Sans Mono"),
            parse_math=False, annotation_clip=False, **layer,
        )  # fmt: skip


def _words(logits: np.ndarray, *texts: str) -> Sequence[Word]:
    """Words of the first text that can be aligned and has characters that the CTC head knows."""
    for text in texts:
        words = locate_words(logits, text)
        if any(word.confidence for word in words):
            return words
    return ()


def _mel_position(hertz: float) -> float:
    """Position of a frequency among the mel bands, whose centers divide the mel scale from 0 to 8 kHz evenly."""
    mel = [math.log1p(f / 700.0) for f in (hertz, SAMPLING_RATE / 2)]
    return mel[0] / mel[1] * (NUM_MELS + 1) - 0.5


@functools.cache
def _fonts(first: str = "DejaVu Sans") -> list[str]:
    """A font, followed by the installed fonts for Asian scripts."""
    names = set(font_manager.get_font_names())
    return [first, *(font for font in _ASIAN_FONTS if font in names)]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return _figure(width, height).add_subplot() if ax is None else ax


def _figure_of(ax: Axes) -> Figure:
    return cast(Figure, ax.get_figure())


def _with_bar(ax: Axes, cax: Axes | None, image: Any, label: str) -> Figure:
    figure = _figure_of(ax)
    figure.colorbar(image, ax=None if cax is not None else ax, cax=cax, label=label)
    return figure
