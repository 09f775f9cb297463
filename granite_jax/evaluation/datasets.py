"""Evaluation sets: manifests with `text`, prepared TFDS data sets, and TFDS's own data sets by name."""

import contextlib
import io
import json
import os
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from granite_jax.batch.access import AudioStorage, scheme
from granite_jax.batch.listing import root_of, split_tfds
from granite_jax.batch.manifest import FIELDS, MAX_LINE, Entry, ignored_fields, parse_line
from granite_jax.batch.manifest_files import to_json_lines
from granite_jax.batch.tfds import open_dataset
from granite_jax.errors import GraniteError, one_line, printable
from granite_jax.options import TranscribeOptions

KNOWN = {
    "librispeech-clean": ("LS Clean", "tfds:librispeech#test_clean"),
    "librispeech-other": ("LS Other", "tfds:librispeech#test_other"),
    "tedlium": ("Tedlium", "tfds:tedlium/release3#test"),
}
"""The Open ASR leaderboard's sets that TFDS has: title of the column there, and source. TFDS lacks the others (AMI,
Earnings22, GigaSpeech, SPGISpeech, VoxPopuli); evaluate them from manifests."""
TEXT = ("text", "sentence", "transcription", "transcript")
"""Features that can hold the reference; the first that a data set has is taken."""


@dataclass(frozen=True)
class Utterance:
    """A reference and the length of its audio.

    Fields:
      id: the set's own id, or the utterance's index.
      text: what is said, or its translation.
      keywords: words of the text that B-WER counts; None if the set does not tell.
      biasing: keywords that the model is told when it is biased; None for `keywords`.
      seconds: length of the audio; None if the set does not tell.
    """

    id: str
    text: str
    keywords: tuple[str, ...] | None = None
    seconds: float | None = None
    biasing: tuple[str, ...] | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """References, and where a batch job finds their audio.

    Fields:
      name: title of the set's column in the table.
      source: a manifest for `batch.run`, whose entries are the utterances in this order.
      root: directory that the set's local files must be below.
      entries: JSON lines of a manifest, without references; none for other sources.
    """

    name: str
    source: str
    root: str
    utterances: tuple[Utterance, ...]
    entries: tuple[str, ...] = ()

    @property
    def directory(self) -> str:
        """Name of the directory of the set's results: the letters and digits of its name, of any script."""
        name = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", self.name)).strip("-").lower()[:80]
        return name or f"set-{zlib.crc32(self.name.encode('utf-8', 'surrogatepass')):08x}"

    def job_manifest(self, work: Path) -> str:
        """What a batch job transcribes: `source`, or a manifest without references, which is written to `work`.

        So a set whose references alone have changed is the same job.
        """
        if not self.entries:
            return self.source
        path = work / f"{self.directory}.jsonl"
        path.write_text("".join(self.entries), encoding="utf-8")
        return str(path)


def open_sets(specs: Sequence[str], root: str | None = None) -> list[EvaluationSet]:
    """Opens sets, and prepares TFDS sets that are not prepared yet.

    Args:
      specs: each is a manifest's path, `tfds:DIRECTORY#SPLIT` for a prepared data set, `tfds:NAME[/CONFIG]#SPLIT` for
        one of TFDS's own, "demo", or a key of `KNOWN`; a title for the column can precede it, as in `calls=m.jsonl`.
      root: directory that the manifests' local files must be below; default each manifest's directory.

    Raises:
      GraniteError: a set or one of its entries cannot be used, or two sets have one name; the message names them.
    """
    if not specs:
        raise GraniteError("there is no set to evaluate on")
    sets = [_open(spec, root) for spec in specs]
    for position, evaluation_set in enumerate(sets):
        if evaluation_set.directory in [earlier.directory for earlier in sets[:position]]:
            raise GraniteError(
                f"two sets are called {evaluation_set.name!r:.60}: name one of them, as in NAME={specs[position]}"
            )
    return sets


def _open(spec: str, root: str | None) -> EvaluationSet:
    label, separator, target = spec.partition("=")
    if not separator or os.path.exists(spec):
        label, target = "", spec
    name, source = KNOWN.get(target, ("", target))
    if source == "demo":
        from granite_jax.evaluation.heldout import SPLIT, prepare

        return _open_tfds(label or "demo", str(prepare()), SPLIT)
    if source.startswith("tfds:"):
        location, split = split_tfds(source)
        directory = location if os.path.isdir(location) else _prepare(location, split)
        return _open_tfds(label or name or f"{_builder_name(location)} {split}", directory, split)
    access = AudioStorage(root or root_of(target))
    with tempfile.TemporaryDirectory(prefix=f"granite-jax-{os.getpid()}-") as work:
        try:
            lines = list(_read_manifest(to_json_lines(Path(target), target, Path(work)), access))
        except GraniteError as error:
            reason = str(error).removeprefix(f"{printable(target)}: ")
            raise GraniteError(f"{printable(target)}: {reason}") from None
    utterances, entries = zip(*lines, strict=True)
    return EvaluationSet(label or Path(target).stem, target, access.root, utterances, entries)


# Manifests.


def _read_manifest(path: Path, access: AudioStorage) -> Iterator[tuple[Utterance, str]]:
    """References and entries of a manifest; a bad line is an error, because a score must cover the whole set."""
    first_indices: dict[Any, int] = {}  # by id, and by segment of audio
    index = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if line.isspace():
                    continue
                yield _utterance(line, index, first_indices, access), _without_reference(line)
                index += 1
    except OSError as error:
        raise GraniteError(f"cannot be read ({error.strerror or error})") from None
    if not index:
        raise GraniteError("has no entries")


def _utterance(line: bytes, index: int, first_indices: dict[Any, int], access: AudioStorage) -> Utterance:
    complete = len(line) <= MAX_LINE or line.endswith(b"\n")
    entry = parse_line(line if complete else None, index, TranscribeOptions())
    if entry.error is not None:
        raise GraniteError(entry.error)
    text = json.loads(line.decode("utf-8-sig")).get("text")
    if not isinstance(text, str):
        raise GraniteError(f"entry {index}: text must be a string, not {text!r:.40}")
    for key, kind in (
        (entry.id, f"id {entry.id!r:.60}"),
        ((entry.audio, entry.offset, entry.duration), "audio"),
    ):
        first = first_indices.setdefault(key, index)
        if first != index:
            raise GraniteError(f"entry {index}: has the {kind} of entry {first}, and would count twice")
    words = None
    if entry.keywords is not None:
        words = tuple(keyword if isinstance(keyword, str) else keyword[0] for keyword in entry.keywords)
    return Utterance(entry.id, text, words, _seconds(entry, access))


def _without_reference(line: bytes) -> str:
    """The fields of a line that decide what is transcribed, or look so; keywords are what its score counts."""
    fields = json.loads(line.decode("utf-8-sig"))
    kept = {*FIELDS, *ignored_fields(line)} - {"keywords"}
    return json.dumps({key: value for key, value in fields.items() if key in kept}, sort_keys=True) + "\n"


def _seconds(entry: Entry, access: AudioStorage) -> float | None:
    """Length of an entry's audio, if need be by its file's header; None if the file is remote, or does not tell."""
    if entry.duration is not None:
        return entry.duration
    try:
        if scheme(access.resolve(entry.audio)) is not None:
            return None
        with access.open(entry.audio) as file:
            return max(0.0, soundfile.info(file).duration - entry.offset)
    except soundfile.LibsndfileError:  # it may be a format of FFmpeg's
        return None
    except (GraniteError, OSError):  # the job reports it
        return 0.0


# TFDS.


def _prepare(name: str, split: str) -> str:
    """The directory of one of TFDS's own data sets; downloads and prepares the set if it is not there yet."""
    with _quietly(f"tfds:{name}"):
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder(name, file_format="array_record")
        if split not in builder.info.splits:
            builder.download_and_prepare()
        return str(builder.data_dir)


@contextlib.contextmanager
def _quietly(source: str) -> Iterator[None]:
    """Hides what TFDS prints, and raises its errors as GraniteError."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        needed = "needs pip install 'granite-jax[tfds-audio]', which brings TensorFlow"
        raise GraniteError(f"{source}: {needed} ({one_line(error)})") from None
    except Exception as error:
        raise GraniteError(f"{source}: cannot be opened ({type(error).__name__}: {one_line(error)})") from None


def _builder_name(path: str) -> str:
    """`librispeech` of librispeech/default/2.1.0, or of a path to it."""
    parts = [part for part in Path(path).parts if not re.fullmatch(r"\d+\.\d+\.\d+|default", part)]
    return parts[-1] if parts else path


def _open_tfds(name: str, directory: str, split: str) -> EvaluationSet:
    examples = open_dataset(directory, split)
    text = next((key for key in TEXT if key in examples.features), None)
    if text is None:
        raise GraniteError(f"{directory}: has no feature named {', '.join(TEXT)}")
    utterances = []
    for index in range(len(examples)):
        example = examples.source[index]
        keywords = tuple(map(_text, example["keywords"])) if "keywords" in examples.features else None
        identity = _text(example.get("id", index))
        utterances.append(Utterance(identity, _text(example[text]), keywords, examples.seconds(example)))
    return EvaluationSet(name, f"tfds:{directory}#{split}", directory, tuple(utterances))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
