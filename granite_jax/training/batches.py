"""Shuffled, length-bucketed training batches of a synthesized corpus."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from granite_jax.models.layers.features import HOP
from granite_jax.training.corpus import Corpus

BUCKET_FRAMES = (130, 170, 220, 300, 500, 800, 1410)  # 20 ms encoder frames


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Utterances of similar length, trained on together.

    Fields:
      frames: encoder frames that every batch is padded to.
      indices: utterances of the corpus.
      batch_size: rows of a batch; batches of all buckets have about the same number of frames.
    """

    frames: int
    indices: np.ndarray
    batch_size: int

    @property
    def samples(self) -> int:
        """Samples at 16 kHz that every row is padded to."""
        return self.frames * 2 * HOP


def make_buckets(samples: np.ndarray, frames_per_batch: int) -> list[Bucket]:
    """Buckets of utterances with the given lengths in samples; those longer than the last bucket are left out."""
    bounds = np.array(BUCKET_FRAMES) * 2 * HOP
    positions = np.searchsorted(bounds, samples)
    return [
        Bucket(frames, np.flatnonzero(positions == i), max(1, frames_per_batch // frames))
        for i, frames in enumerate(BUCKET_FRAMES)
        if np.any(positions == i)
    ]


def epoch(buckets: Sequence[Bucket], rng: np.random.Generator) -> Iterator[tuple[Bucket, np.ndarray]]:
    """Every full batch once, in random order: the bucket and its utterances' indices, `[batch_size]`."""
    groups: list[tuple[Bucket, np.ndarray]] = []
    for bucket in buckets:
        count = len(bucket.indices) // bucket.batch_size
        shuffled = rng.permutation(bucket.indices)[: count * bucket.batch_size]
        groups += [(bucket, rows) for rows in shuffled.reshape(count, bucket.batch_size)]
    for i in rng.permutation(len(groups)):
        yield groups[i]


def forever(buckets: Sequence[Bucket], seed: int) -> Iterator[tuple[Bucket, np.ndarray]]:
    """Epoch after epoch, each shuffled anew."""
    rng = np.random.default_rng(seed)
    while True:
        yield from epoch(buckets, rng)


def joining(
    buckets: Sequence[Bucket], frames: np.ndarray, share: float, seed: int
) -> Iterator[tuple[Bucket, list[list[int]]]]:
    """Like `forever`, but a row is a list of utterances to join: random ones in a `share` of the batches, else one.

    Args:
      frames: encoder frames of every utterance. Joined rows are filled up to a bucket's frames.
    """
    rng = np.random.default_rng([seed, 1])

    def random_row(capacity: int) -> list[int]:
        row: list[int] = []
        while True:
            index = int(rng.integers(len(frames)))
            if frames[index] <= capacity:
                row.append(index)
                capacity -= int(frames[index])
            elif row:
                return row

    for bucket, rows in forever(buckets, seed):
        if rng.random() < share:
            longer = buckets[int(rng.integers(len(buckets) // 2, len(buckets)))]
            yield longer, [random_row(longer.frames) for _ in range(longer.batch_size)]
        else:
            yield bucket, [[int(row)] for row in rows]


def waveforms(corpus: Corpus, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded float32 waveforms `[b, width]` in [-1, 1] and their lengths int32 `[b]` in samples."""
    padded = np.zeros((len(rows), width), np.float32)
    lengths = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        samples = corpus[int(row)].samples
        padded[i, : len(samples)] = samples / 32768.0
        lengths[i] = len(samples)
    return padded, lengths


def pad_ids(sequences: Sequence[Sequence[int]], width: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token or label ids padded to int32 `[b, width]`, and their lengths int32 `[b]`."""
    padded = np.full((len(sequences), width), fill, np.int32)
    for i, ids in enumerate(sequences):
        padded[i, : len(ids)] = ids
    return padded, np.array([len(ids) for ids in sequences], np.int32)


def corrupt(
    rng: np.random.Generator, tokens: np.ndarray, starts: np.ndarray, share: float, most: float, vocabulary: range
) -> np.ndarray:
    """Replaces, in a `share` of rows, up to a fraction `most` of `tokens` `[b, p]` from `starts` `[b]` on at random.

    A decoder trained with such a history has to find its position in the audio from more than the last token, and
    continues correctly after its own mistakes.
    """
    rates = np.where(rng.random(len(tokens)) < share, rng.random(len(tokens)) * most, 0.0)
    wrong = (rng.random(tokens.shape) < rates[:, None]) & (np.arange(tokens.shape[1]) >= starts[:, None])
    return np.where(wrong, rng.integers(vocabulary.start, vocabulary.stop, size=tokens.shape), tokens).astype(np.int32)
