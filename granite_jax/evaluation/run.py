"""An evaluation: a batch job a set, which resumes, and what its texts are worth.

OUT/SET/           the job's parts, its times, and utterances.jsonl: references and hypotheses
OUT/results.json   all numbers
OUT/results.md     the same as tables
"""

import dataclasses
import importlib.metadata
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
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
from granite_jax.inference.buckets import Bucket
from granite_jax.inference.options import ModelOptions, TranscribeOptions, accepts, resolve
from granite_jax.inference.transcriber import Transcriber
from granite_jax.model.features import SAMPLING_RATE
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import language_code

RESULTS = "results.json"
PART_SIZE = 128
_PACKAGES = ("jiwer", "whisper-normalizer", "kaldialign", "sacrebleu")
_TIMES = "times-"


@dataclasses.dataclass(frozen=True)
class Times:
    """What one run spent on a set, in seconds; a run that is killed leaves none.

    Fields:
      load: for the weights.
      compile: for the programs that the set's lengths need, run once on silence.
      steady: from the first utterance to the last, reading included; `wait` of it, for which the device had no audio.
      audio: transcribed in `steady`.
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
    language: str = "en",
    normalizer: normalize.Name | None = None,
    keyword_lists: Sequence[str | os.PathLike[str]] = (),
    bias: bool = False,
    root: str | None = None,
    part_size: int = PART_SIZE,
    progress: Callable[[batch.Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **fields: Any,
) -> dict[str, Any] | None:
    """Transcribes sets and compares with their references; goes on where an earlier run was interrupted.

    An utterance that fails counts as if nothing had been heard; one whose reference has no words is not counted. With
    another normalizer or other keyword lists a directory is scored again, and not transcribed again.

    Args:
      sets: as of `datasets.open_sets`.
      out: a local directory, for one checkpoint and one choice of options.
      model, options: as in `batch.run`.
      transcriber: one that is loaded already, in place of a checkpoint, and a name for its weights and dtype.
      language: of the references, as a code or a name; that of a translation is its target.
      normalizer: as of `normalize.normalizer`; default "english" for English, "basic" for others.
      keyword_lists: files in the format of the LibriSpeech biasing lists, for B-WER.
      bias: whether the model is told each utterance's list: that of `keyword_lists`, or else the set's own.
      root: what the manifests' local files have to be below; default each manifest's directory.
      part_size: utterances that are lost together when a run is killed.
      progress: called when some utterances are done.
      stop: asked often; True ends the run, which a later one continues.
      fields: of `ModelOptions` and `TranscribeOptions`, in place of theirs.

    Returns:
      What `results.json` has; None if the run was stopped.

    Raises:
      GraniteError: a set, an option, a list or the checkpoint is not usable, or the directory is another run's.
      OSError: results cannot be written.
    """
    where, asked = resolve(model, options, fields)
    scoring = _Scoring.choose(asked, language, normalizer)
    lists = read_keyword_lists(keyword_lists)
    opened = [_with_lists(each, lists, scoring.normalize) for each in open_sets(sets, root)]
    if scheme(os.fspath(out)) is not None:
        raise GraniteError(f"{out}: an evaluation is written to a local directory")
    store = LocalStore(Path(out))
    if transcriber is None:
        weights = weights_identity(open_checkpoint(where.checkpoint, where.revision))
        identity = f"{weights} {parse_dtype(where.dtype).name}"
        loader = _Loader(lambda: Transcriber.from_options(where))
    else:
        given, identity = transcriber
        loader = _Loader(lambda: given)
    for each in opened:
        summary = batch.run(
            each.source,
            store.directory / each.directory,
            options=asked,
            transcriber=(lambda each=each: loader.ready(each.utterances), identity),
            shard=0,
            num_shards=1,
            part_size=part_size,
            root=each.root,
            keyword_lists=_biasing(each) if bias else (),
            progress=progress,
            stop=stop,
        )
        times = loader.times(summary)
        if times.audio:
            LocalStore(store.directory / each.directory).create(
                f"{_TIMES}{uuid.uuid4().hex}.json", json.dumps(dataclasses.asdict(times)).encode()
            )
        if summary.stopped:
            return None
    results = {
        "model": os.fspath(where.checkpoint) if transcriber is None else identity,
        "weights": identity,
        "version": granite_jax.__version__,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.local_devices()],
        "options": dataclasses.asdict(asked),
        "scoring": dataclasses.asdict(scoring),
        **_scores(opened, store.directory, scoring),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    transcribed.write(store.directory / RESULTS, f"{text}\n")
    transcribed.write(store.directory / "results.md", to_markdown(results))
    return json.loads(text)


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """How texts are compared: what two runs must have in common to be compared with one another."""

    translation: bool
    language: str
    normalizer: normalize.Name

    @classmethod
    def choose(cls, asked: TranscribeOptions, language: str, name: normalize.Name | None) -> "_Scoring":
        translation = asked.task == "translate" or asked.target_language is not None
        code = language_code(asked.target_language if translation and asked.target_language else language)
        if translation:
            score_translations(["a"], ["a"], language=code)  # before hours of work, for its tokenizer may be missing
        return cls(translation, code, name or normalize.default_name(code))

    def normalize(self, text: str) -> str:
        return normalize.normalizer(self.normalizer, self.language)(text)


class _Loader:
    """Loads and compiles when something is to be transcribed, and knows how long that took."""

    def __init__(self, load: Callable[[], Transcriber]):
        self._load = load
        self._asr: Transcriber | None = None
        self._warm: set[Bucket] = set()
        self._spent = Times()
        self._compilations = 0

    def ready(self, utterances: Sequence[Utterance]) -> Transcriber:
        """The Transcriber, with the programs compiled that these utterances need."""
        began = time.monotonic()
        if self._asr is None:
            self._asr = self._load()
        loaded = time.monotonic()
        needed = needed_buckets(self._asr.buckets, utterances)
        self._asr.warmup([bucket for bucket in needed if bucket not in self._warm])
        self._warm |= set(needed)
        self._compilations = self._asr.compilations
        self._spent = Times(load=loaded - began, compile=time.monotonic() - loaded)
        return self._asr

    def times(self, summary: batch.Summary) -> Times:
        """Of the set just done."""
        late = self._asr.compilations - self._compilations if self._asr is not None else 0
        spent, self._spent = self._spent, Times()
        steady, wait, audio = summary.wall_seconds, summary.read_wait_seconds, summary.audio_seconds
        return dataclasses.replace(spent, steady=steady, wait=wait, audio=audio, late_compilations=late)


def needed_buckets(buckets: Sequence[Bucket], utterances: Sequence[Utterance]) -> list[Bucket]:
    """Those that utterances of these lengths go to; all, if the set does not tell a length."""
    lengths = {utterance.seconds for utterance in utterances}
    needed = set(buckets) if None in lengths else set()
    for rows in {bucket.batch for bucket in buckets}:
        ascending = sorted((bucket for bucket in buckets if bucket.batch == rows), key=lambda bucket: bucket.samples)
        for seconds in lengths:
            fitting = [bucket for bucket in ascending if bucket.samples >= (seconds or 0) * SAMPLING_RATE]
            needed.update(fitting[:1])
    return [bucket for bucket in buckets if bucket in needed]


def _with_lists(each: EvaluationSet, lists: dict[str, KeywordList], normalize: Callable[[str], str]) -> EvaluationSet:
    """The set with the lists' keywords, if they are about it."""
    try:
        texts = [utterance.text for utterance in each.utterances]
        found = lists_of(lists, [utterance.id for utterance in each.utterances], texts, normalize)
    except GraniteError as error:
        raise GraniteError(f"set {each.name}: {error}") from None
    if found is None:
        return each
    utterances = (
        dataclasses.replace(utterance, keywords=listed.words, biasing=listed.biasing)
        for utterance, listed in zip(each.utterances, found, strict=True)
    )
    return dataclasses.replace(each, utterances=tuple(utterances))


def _biasing(each: EvaluationSet) -> list[tuple[str, ...]]:
    """What the model is told of each utterance. Raises GraniteError if the set has no lists."""
    lists = [u.keywords if u.biasing is None else u.biasing for u in each.utterances]
    if any(listed is None for listed in lists):
        raise GraniteError(f"set {each.name}: has no keyword lists to bias with")
    return [listed or () for listed in lists]


def _scores(sets: Sequence[EvaluationSet], out: Path, scoring: _Scoring) -> dict[str, Any]:
    """The part of the results that is about texts and times."""
    found, counted, total = [], [], Times()
    for each in sets:
        directory = out / each.directory
        lines = transcribed.collect(each, directory)
        scored = [line for line in lines if line.is_scored(scoring.normalize)]
        if not scored:
            raise GraniteError(f"set {each.name}: no reference has a word in it")
        times = _times(directory)
        total += times
        description = {
            "name": each.name,
            "directory": each.directory,
            "source": each.source,
            "utterances": len(lines),
            "scored": len(scored),
            "failed": sum(line.error is not None for line in lines),
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
            description |= {name: dataclasses.asdict(rate([each])) for name, each in counts.items()}
        found.append(description)
    return {
        "sets": found,
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
    found = score_translations(references, hypotheses, language=language)
    scores = {name: dataclasses.asdict(ours.score) for name, (ours,) in found.items()}
    return scores | {"signatures": {name: ours.signature for name, (ours,) in found.items()}}


def _times(directory: Path) -> Times:
    """Of all runs that worked on a set."""
    found = [Times(**json.loads(path.read_text())) for path in sorted(directory.glob(f"{_TIMES}*.json"))]
    return sum(found, Times())
