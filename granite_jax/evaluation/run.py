"""An evaluation: a resumable batch job for each set, and the scores of its texts.

OUT/SET/           the job's parts, its times, and utterances.jsonl: references and hypotheses
OUT/results.json   all numbers
OUT/results.md     the same as tables
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax

import granite_jax
from granite_jax import batch
from granite_jax.batch.access import scheme
from granite_jax.batch.parts import weights_identity
from granite_jax.batch.store import LocalStore
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.errors import GraniteError
from granite_jax.evaluation import normalize, transcribed
from granite_jax.evaluation.datasets import EvaluationSet, Utterance, open_sets
from granite_jax.evaluation.keyword_lists import KeywordList, lists_of, read_keyword_lists
from granite_jax.evaluation.metrics import Counts, rate, score_translations
from granite_jax.evaluation.report import to_markdown
from granite_jax.evaluation.transcribed import Transcribed
from granite_jax.files import atomic
from granite_jax.options import ModelOptions, TranscribeOptions, accepts, resolve
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import Bucket
from granite_jax.text.tasks import Capabilities, language_code
from granite_jax.transcriber import Transcriber
from granite_jax.waveform import SAMPLING_RATE

RESULTS = "results.json"
PART_SIZE = 128
_PACKAGES = ("jiwer", "whisper-normalizer", "kaldialign", "sacrebleu")
_TIMES = "times-"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that one run spent on a set; a run that is killed records none.

    Fields:
      load: loading the weights.
      compile: compiling the programs that the set's lengths need, and running each once on silence.
      steady: from the first utterance to the last, reading included.
      wait: the part of `steady` in which the device had no audio.
      audio: length of the audio transcribed in `steady`.
      late_compilations: programs that were compiled within `steady`.
    """

    load: float = 0.0
    compile: float = 0.0
    steady: float = 0.0
    wait: float = 0.0
    audio: float = 0.0
    late_compilations: int = 0

    def __add__(self, other: "Times") -> "Times":
        return Times(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def rtfx(self) -> float | None:
        """Seconds of audio a second of `steady`."""
        return self.audio / self.steady if self.steady else None


@accepts(ModelOptions, TranscribeOptions)
def evaluate(
    sets: Sequence[str],
    out: str | os.PathLike[str],
    model: ModelOptions | str | os.PathLike[str] = "demo",
    options: TranscribeOptions | None = None,
    *,
    transcriber: tuple[Transcriber, str] | None = None,
    reference_language: str | None = None,
    normalizer: normalize.Name | None = None,
    keyword_lists: Sequence[str | os.PathLike[str]] = (),
    bias: bool = False,
    root: str | None = None,
    part_size: int = PART_SIZE,
    progress: Callable[[batch.Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **fields: Any,
) -> dict[str, Any] | None:
    """Transcribes sets and compares them with their references; continues an earlier run that was interrupted.

    An utterance that fails counts as an empty hypothesis; one whose reference has no words is not counted. With
    another normalizer, other references, or keyword lists that only score, a directory is scored again but not
    transcribed again.

    Args:
      sets: as in `datasets.open_sets`.
      out: a local directory, for one checkpoint and one set of options. Results of other sets, of earlier runs, stay.
      model, options: as in `batch.run`.
      transcriber: a loaded Transcriber in place of a checkpoint, and a name for its weights and dtype.
      reference_language: language of the references, as a code or a name; default the target of a translation, or the
        option `language`, or English.
      normalizer: as in `normalize.normalizer`; default "english" for English, "basic" for others.
      keyword_lists: files in the format of the LibriSpeech biasing lists, for B-WER.
      bias: whether the model is told each utterance's list: that of `keyword_lists`, or else the set's own.
      root: directory that the manifests' local files must be below; default each manifest's directory.
      part_size: most utterances that are committed together.
      progress: called when some utterances are done.
      stop: polled often; True ends the run, which a later one can continue.
      fields: `ModelOptions` and `TranscribeOptions` fields that override `model` and `options`.

    Returns:
      The contents of `results.json`; None if the run was stopped.

    Raises:
      GraniteError: a set, an option, a list or the checkpoint is not usable, or the directory belongs to another run.
      OSError: results cannot be written.
    """
    model_options, transcribe_options = resolve(model, options, fields)
    scoring = _Scoring.choose(transcribe_options, reference_language, normalizer)
    lists = read_keyword_lists(keyword_lists)
    opened = [_with_lists(evaluation_set, lists, scoring.normalize) for evaluation_set in open_sets(sets, root)]
    for evaluation_set in opened:
        if not any(transcribed.is_scored(utterance.text, scoring.normalize) for utterance in evaluation_set.utterances):
            raise GraniteError(f"set {evaluation_set.name}: no reference has a word in it")
    if scheme(os.fspath(out)) is not None:
        raise GraniteError(f"{out}: an evaluation is written to a local directory")
    store = LocalStore(Path(out))
    if transcriber is None:
        weights = weights_identity(open_checkpoint(model_options.checkpoint, model_options.revision))
        identity = f"{weights} {parse_dtype(model_options.dtype).name}"
        loader = _Loader(lambda: Transcriber.from_options(model_options, transcribe_options.recognizer))
    else:
        loaded, identity = transcriber
        loader = _Loader(lambda: loaded)
    decisive = {
        "weights": identity,
        "version": granite_jax.__version__,
        "options": dataclasses.asdict(transcribe_options),
        "scoring": dataclasses.asdict(scoring),
        "bias": bias,
    }
    decisive = json.loads(json.dumps(decisive))
    current = {each.directory: _Finished(each.name, each.directory, each.source, each) for each in opened}
    _former_sets(store.directory, decisive, current)  # raises before the work
    for evaluation_set in opened:
        with tempfile.TemporaryDirectory(prefix=f"granite-jax-{os.getpid()}-") as work:
            summary = batch.run(
                evaluation_set.job_manifest(Path(work)),
                store.directory / evaluation_set.directory,
                options=transcribe_options,
                transcriber=(
                    lambda evaluation_set=evaluation_set: loader.ready(evaluation_set.utterances, transcribe_options),
                    identity,
                ),
                shard=0,
                num_shards=1,
                part_size=part_size,
                root=evaluation_set.root,
                keyword_lists=_biasing(evaluation_set) if bias else (),
                progress=progress,
                stop=stop,
            )
        times = loader.times(summary)
        if times.audio:
            LocalStore(store.directory / evaluation_set.directory).create(
                f"{_TIMES}{uuid.uuid4().hex}.json", json.dumps(dataclasses.asdict(times)).encode()
            )
        if summary.stopped:
            return None
    with atomic.locked(store.directory, wait=True):
        results = _write_results(
            store.directory,
            _former_sets(store.directory, decisive, current) | current,
            decisive | {"model": os.fspath(model_options.checkpoint) if transcriber is None else identity},
            scoring,
        )
    return results


def _write_results(
    directory: Path, sets: dict[str, "_Finished"], description: dict[str, Any], scoring: "_Scoring"
) -> dict[str, Any]:
    """Scores sets whose jobs are done, and writes and returns the results."""
    results = {
        **description,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.local_devices()],
        **_scores(list(sets.values()), directory, scoring),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    atomic.replace(directory / RESULTS, f"{text}\n")
    atomic.replace(directory / "results.md", to_markdown(results))
    return json.loads(text)


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """How texts are scored; only runs that have this in common can be compared."""

    translation: bool
    language: str
    normalizer: normalize.Name

    @classmethod
    def choose(cls, options: TranscribeOptions, language: str | None, name: normalize.Name | None) -> "_Scoring":
        recognized = Capabilities().recognize(options.prompt) if options.prompt is not None else None
        target = options.target_language or (recognized and recognized.target_language)
        translation = target is not None or options.task.startswith("translate")
        code = language_code(target or language or options.language or "en")
        if translation:
            score_translations(["a"], ["a"], language=code)  # fails before hours of work if its tokenizer is missing
        return cls(translation, code, name or normalize.default_name(code))

    def normalize(self, text: str) -> str:
        return normalize.normalizer(self.normalizer, self.language)(text)


class _Loader:
    """Loads and compiles when there is something to transcribe, and measures how long that takes."""

    def __init__(self, load: Callable[[], Transcriber]):
        self._load = load
        self._asr: Transcriber | None = None
        self._warm: set[tuple[Bucket, bool]] = set()  # with words, or without
        self._spent = Times()
        self._compilations = 0

    def ready(self, utterances: Sequence[Utterance], options: TranscribeOptions) -> Transcriber:
        """The Transcriber, after compiling the programs that these utterances need."""
        began = time.monotonic()
        if self._asr is None:
            self._asr = self._load()
        loaded = time.monotonic()
        longest = self._asr.segment_seconds(options)
        needed = needed_buckets(self._asr.recognizer(options).buckets, utterances, longest)
        words = options.word_timestamps or any((utterance.seconds or 0) > longest for utterance in utterances)
        self._asr.warmup([bucket for bucket in needed if (bucket, words) not in self._warm], options, words=words)
        self._warm |= {(bucket, words) for bucket in needed}
        self._compilations = self._asr.compilations
        self._spent = Times(load=loaded - began, compile=time.monotonic() - loaded)
        return self._asr

    def times(self, summary: batch.Summary) -> Times:
        """Times of the set just finished."""
        late = self._asr.compilations - self._compilations if self._asr is not None else 0
        spent, self._spent = self._spent, Times()
        steady, wait, audio = summary.wall_seconds, summary.read_wait_seconds, summary.audio_seconds
        return dataclasses.replace(spent, steady=steady, wait=wait, audio=audio, late_compilations=late)


def needed_buckets(buckets: Sequence[Bucket], utterances: Sequence[Utterance], longest: float) -> list[Bucket]:
    """The buckets that utterances of these lengths go to; all buckets if a length is unknown.

    Args:
      longest: seconds of the longest segment.
    """
    lengths = {utterance.seconds and min(utterance.seconds, longest) for utterance in utterances}
    needed = set(buckets) if None in lengths else set()
    for rows in {bucket.batch for bucket in buckets}:
        ascending = sorted((bucket for bucket in buckets if bucket.batch == rows), key=lambda bucket: bucket.samples)
        for seconds in lengths:
            fitting = [bucket for bucket in ascending if bucket.samples >= (seconds or 0) * SAMPLING_RATE]
            needed.update(fitting[:1])
    return [bucket for bucket in buckets if bucket in needed]


def _with_lists(
    evaluation_set: EvaluationSet, lists: dict[str, KeywordList], normalize: Callable[[str], str]
) -> EvaluationSet:
    """The set with the keywords of the lists, if they cover it."""
    try:
        texts = [utterance.text for utterance in evaluation_set.utterances]
        keyword_lists = lists_of(lists, [utterance.id for utterance in evaluation_set.utterances], texts, normalize)
    except GraniteError as error:
        raise GraniteError(f"set {evaluation_set.name}: {error}") from None
    if keyword_lists is None:
        return evaluation_set
    utterances = (
        dataclasses.replace(utterance, keywords=listed.words, biasing=listed.biasing)
        for utterance, listed in zip(evaluation_set.utterances, keyword_lists, strict=True)
    )
    return dataclasses.replace(evaluation_set, utterances=tuple(utterances))


def _biasing(evaluation_set: EvaluationSet) -> list[tuple[str, ...]]:
    """Keywords that the model is told for each utterance. Raises GraniteError if the set has no lists."""
    lists = [
        utterance.keywords if utterance.biasing is None else utterance.biasing
        for utterance in evaluation_set.utterances
    ]
    if any(listed is None for listed in lists):
        raise GraniteError(f"set {evaluation_set.name}: has no keyword lists to bias with")
    return [listed or () for listed in lists]


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A set whose job is done, in this run or, if there is no `evaluation_set`, in an earlier one."""

    name: str
    directory: str
    source: str
    evaluation_set: EvaluationSet | None = None

    def lines(self, directory: Path) -> list[Transcribed]:
        if self.evaluation_set is None:
            return transcribed.read(directory)
        return transcribed.collect(self.evaluation_set, directory)


def _former_sets(out: Path, decisive: dict[str, Any], again: Collection[str]) -> dict[str, _Finished]:
    """The sets of earlier runs into one directory, by the directories of their own.

    Raises:
      GraniteError: those that are not evaluated `again` had other weights, options or scoring, or cannot be read.
    """
    path = out / RESULTS
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        sets = [_Finished(*(each[key] for key in ("name", "directory", "source"))) for each in former["sets"]]
        different = [key for key, value in decisive.items() if former[key] != value]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise GraniteError(f"{path}: is not the result of an evaluation ({error})") from None
    for kept in [each for each in sets if each.directory not in again]:
        if different:
            raise GraniteError(f"{path}: has results of set {kept.name} with other {', '.join(different)}")
        kept.lines(out / kept.directory)
    return {each.directory: each for each in sets}


def _scores(sets: Sequence[_Finished], out: Path, scoring: _Scoring) -> dict[str, Any]:
    """The results for texts and times."""
    descriptions, counted, total = [], [], Times()
    for finished in sets:
        directory = out / finished.directory
        lines = finished.lines(directory)
        scored = [line for line in lines if line.is_scored(scoring.normalize)]
        times = _times(directory)
        total += times
        description = {
            "name": finished.name,
            "directory": finished.directory,
            "source": finished.source,
            "utterances": len(lines),
            "scored": len(scored),
            "failed": sum(line.error is not None for line in lines),
            "flags": dict(collections.Counter(flag for line in lines for flag in line.flags)),
            "hours": sum(line.seconds for line in lines) / 3600,
            "seconds": dataclasses.asdict(times),
            "rtfx": times.rtfx,
        }
        if scoring.translation:
            description |= _translation_scores(scored, scoring.language)
        else:
            counts = transcribed.error_counts(scored, scoring.normalize)
            counted.append(counts)
            description["words"] = int(counts["wer"].total.sum())
            description |= {name: dataclasses.asdict(rate([metric_counts])) for name, metric_counts in counts.items()}
        descriptions.append(description)
    return {
        "sets": descriptions,
        "average": _average(counted),
        "seconds": dataclasses.asdict(total),
        "rtfx": total.rtfx,
    }


def _average(sets: Sequence[dict[str, Counts]]) -> dict[str, Any]:
    """Means of the rates that all sets have."""
    names = [name for name in sets[0] if all(name in counts for counts in sets)] if sets else []
    return {name: dataclasses.asdict(rate([counts[name] for counts in sets])) for name in names}


def _translation_scores(lines: Sequence[Transcribed], language: str) -> dict[str, Any]:
    references, hypotheses = [line.reference for line in lines], [line.hypothesis for line in lines]
    results = score_translations(references, hypotheses, language=language)
    scores = {name: dataclasses.asdict(score.score) for name, (score,) in results.items()}
    return scores | {"signatures": {name: score.signature for name, (score,) in results.items()}}


def _times(directory: Path) -> Times:
    """Total times of all runs that worked on a set."""
    runs = [Times(**json.loads(path.read_text())) for path in sorted(directory.glob(f"{_TIMES}*.json"))]
    return sum(runs, Times())
