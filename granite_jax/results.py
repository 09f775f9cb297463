"""The results of inference."""

import dataclasses
from typing import Any

import numpy as np

LOW_AGREEMENT = 0.4
"""Share of different words beyond which a transcript is flagged; see `disagreement`."""
NOT_FINITE = "the model computes no numbers for it (NaN): its weights are damaged, or too large for their dtype"
FLAGS = {
    "truncated-input": "the file lacks its end",
    "damaged-input": "some of the file could not be decoded, and is silent",
    "one-channel": "the channels cancel each other out, so one of them was taken instead of their mean",
    "duplicate-channel": "the channel is the same as an earlier one of the file, so its text says the same",
    "one-track": "the file has several audio tracks, and only the one that is its default, or its best, was read",
    "prompt-fallback": "the model was not trained with the prompt, so this is the raw transcript",
    "retried": "what was written first repeated itself, stopped early or left something out, so this was decoded again",
    "loop": "the model repeated itself without end, so what it wrote was replaced or cut",
    "length": "the text ended at its budget of tokens, so its end may be missing",
    "silence": "nobody was heard to speak, so nothing was written",
    "low-agreement": "the encoder's own text differs much, so this text may be wrong or lack what was said",
}
"""The values of a transcript's `flags` and their meanings."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a transcript, as it is written there.

    Fields:
      text: with its letter case and punctuation.
      start, end: seconds of the input; `end` is after `start`.
      confidence: mean probability of its characters in the CTC head, at the frames that the alignment gives them.
    """

    text: str
    start: float
    end: float
    confidence: float | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a recording that was decoded in one pass.

    Fields:
      start, end: seconds of the input: from where its first word begins to where its last one ends, as far as the CTC
        head shows that; the part's own limits if it has no text.
      text: its share of the transcript's text.
      tokens: generated ids of that text.
      confidence: as in `Transcript`.
      words: with `word_timestamps=True`, its words.
      speaker: of models that tell speakers apart.
      route: as in `Transcript.stats`.
      flags: warnings about its text, from `FLAGS`.
      channel: as in `Transcript`.
    """

    start: float
    end: float
    text: str = ""
    tokens: tuple[int, ...] = ()
    confidence: float | None = None
    words: tuple[Word, ...] = ()
    speaker: str | None = None
    route: str | None = None
    flags: tuple[str, ...] = ()
    channel: int | None = None


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The result for one input.

    Fields:
      audio: name of the input: its path, or a name made from its position in the list.
      text: the transcript or translation.
      tokens: generated ids, without end-of-text and padding.
      duration: seconds of audio.
      confidence: mean probability of the tokens in the language model's own distribution, without any boost; None if it
        did not run or wrote nothing.
      ctc_text: greedy text of the encoder's own CTC head: lower case, no punctuation, never a translation.
      stats: `route`, how the text came about: "ctc" (the encoder's own text), "silence" (there was nothing to write),
        "verified" (the language model's first pass accepted the draft), "resumed" (it went on from the part it
        accepted), "greedy" (there was no draft) or, if segments differ, "mixed"; `llm_passes` (the
        prefill included); `draft_tokens`; `accepted_tokens` (tokens of the text that a draft proposed); `draft_from`:
        the encoder's head that drafted, "ctc" or "bpe", or "caller", or None, or "mixed"; `finish`: "end" if the model
        ended the text, "length" if it reached `max_new_tokens`; with keywords, `keywords`: those that were heard, best
        first.
      draft: ids of the draft as it was proposed, for recordings of one segment.
      accepted_spans: the spans of `tokens` that were taken from the draft, each (position in `tokens`, position in
        `draft`, size).
      flags: warnings about the text, from `FLAGS`: those of any segment. "silence": of some segment, and there is
        neither a text nor a `ctc_text`. "low-agreement", for raw transcripts only: a segment's `disagreement` with its
        `ctc_text` exceeds `LOW_AGREEMENT`.
      error: why there is no result, or None.
      segments: the parts of the recording in order. Their texts, joined, are `text`.
      channel: the channel of the input, from 1 on, with `channels="split"`.
      damage: the seconds of the input, from and to, that could not be decoded and are silent.
    """

    audio: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    duration: float = 0.0
    confidence: float | None = None
    ctc_text: str = ""
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    draft: tuple[int, ...] = ()
    accepted_spans: tuple[tuple[int, int, int], ...] = ()
    flags: tuple[str, ...] = ()
    error: str | None = None
    segments: tuple[Segment, ...] = ()
    channel: int | None = None
    damage: tuple[tuple[float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Emissions:
    """Features and CTC logits of one input, for plots and measurements.

    Fields:
      features: log-mel, float32 `[t, 160]`, as returned by `log_mel`.
      ctc_logits: float32 `[t, c]`.
    """

    features: np.ndarray
    ctc_logits: np.ndarray


def disagreement(text: str, ctc_text: str) -> float:
    """The word edit distance of two texts, as a share of the longer one's words: 0 to 1."""
    words, ctc_words = text.split(), ctc_text.split()
    row = np.arange(len(ctc_words) + 1)
    for i, word in enumerate(words, 1):
        changed = np.minimum(row[:-1] + [word != ctc_word for ctc_word in ctc_words], row[1:] + 1)
        # Skipped `ctc_words`: the minimum over all earlier columns, plus one for each column from there.
        row = np.minimum.accumulate(np.concatenate([[i], changed]) - np.arange(len(row))) + np.arange(len(row))
    return float(row[-1] / max(len(words), len(ctc_words), 1))
