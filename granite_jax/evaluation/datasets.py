"""What can be evaluated on: manifests with `text`, prepared TFDS data sets, and TFDS's own sets by name."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from granite_jax.audio.load import printable
from granite_jax.audio.resample import one_line
from granite_jax.batch.access import AudioStorage, scheme
from granite_jax.batch.manifest import MAX_LINE, Entry, parse_line, root_of, split_tfds
from granite_jax.batch.tfds import open_dataset
from granite_jax.errors import GraniteError
from granite_jax.inference.options import TranscribeOptions

KNOWN = {
    "librispeech-clean": ("LS Clean", "tfds:librispeech#test_clean"),
    "librispeech-other": ("LS Other", "tfds:librispeech#test_other"),
    "tedlium": ("Tedlium", "tfds:tedlium/release3#test"),
}
"""The Open ASR leaderboard's sets that TFDS has, by their columns there. The others (AMI, Earnings22, GigaSpeech,
SPGISpeech, VoxPopuli) TFDS does not have; their manifests do."""
TEXT = ("text", "sentence", "transcription", "transcript")
"""Names of a data set's feature that is the reference: the first that it has."""


@dataclass(frozen=True)
class Utterance:
    """A reference.

    Fields:
      id: the set's own name of it, or its place.
      text: what is said, or its translation.
      keywords: those words of the text that B-WER is about; None if the set does not tell.
      biasing: what the model is told if it is to be biased; None for `keywords`.
      seconds: of audio, if the set tells.
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
      name: the column of the table.
      source: a manifest as `batch.run` takes it, with as many entries, in this order.
      root: what its local files have to be below.
    """

    name: str
    source: str
    root: str
    utterances: tuple[Utterance, ...]

    @property
    def directory(self) -> str:
        """A name for its results."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.name).strip("-").lower() or "set"


def open_sets(specs: Sequence[str], root: str | None = None) -> list[EvaluationSet]:
    """Opens sets, and prepares those of TFDS that are not prepared yet.

    Args:
      specs: each a manifest's path, `tfds:DIRECTORY#SPLIT` of a prepared data set, `tfds:NAME[/CONFIG]#SPLIT` of one of
        TFDS's own, "demo", or a name of `KNOWN`; with a name for its column in front, if wanted, as in `calls=m.jsonl`.
      root: of manifests; default each one's directory.

    Raises:
      GraniteError: naming the set, and the entry of it, that cannot be used, or two sets of one name.
    """
    if not specs:
        raise GraniteError("there is no set to evaluate on")
    sets = [_open(spec, root) for spec in specs]
    for place, each in enumerate(sets):
        if each.directory in [other.directory for other in sets[:place]]:
            raise GraniteError(f"two sets are called {each.name!r:.60}: name one of them, as in NAME={specs[place]}")
    return sets


def _open(spec: str, root: str | None) -> EvaluationSet:
    label, separator, rest = spec.partition("=")
    if not separator or os.path.exists(spec):
        label, rest = "", spec
    name, source = KNOWN.get(rest, ("", rest))
    if source == "demo":
        from granite_jax.evaluation.heldout import SPLIT, prepare

        return _open_tfds(label or "demo", str(prepare()), SPLIT)
    if source.startswith("tfds:"):
        place, split = split_tfds(source)
        directory = place if os.path.isdir(place) else _prepare(place, split)
        return _open_tfds(label or name or f"{_builder_name(place)} {split}", directory, split)
    access = AudioStorage(root or root_of(rest))
    return EvaluationSet(label or Path(rest).stem, rest, access.root, tuple(_read_manifest(rest, access)))


# Manifests.


def _read_manifest(path: str, access: AudioStorage) -> Iterator[Utterance]:
    """References of a manifest, all of whose lines have to be good: numbers without some of them are no numbers."""
    seen: dict[Any, int] = {}  # ids and segments of audio
    index = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if line.isspace():
                    continue
                try:
                    yield _utterance(line, index, seen, access)
                except GraniteError as error:
                    raise GraniteError(f"{printable(path)}: {error}") from None
                index += 1
    except OSError as error:
        raise GraniteError(f"{printable(path)}: cannot be read ({error.strerror or error})") from None
    if not index:
        raise GraniteError(f"{printable(path)}: has no entries")


def _utterance(line: bytes, index: int, seen: dict[Any, int], access: AudioStorage) -> Utterance:
    whole = len(line) <= MAX_LINE or line.endswith(b"\n")
    entry = parse_line(line if whole else None, index, TranscribeOptions())
    if entry.error is not None:
        raise GraniteError(entry.error)
    text = json.loads(line.decode("utf-8-sig")).get("text")
    if not isinstance(text, str):
        raise GraniteError(f"entry {index}: text must be a string, not {text!r:.40}")
    for key, what in (
        (entry.id, f"id {entry.id!r:.60}"),
        ((entry.audio, entry.offset, entry.duration), "audio"),
    ):
        first = seen.setdefault(key, index)
        if first != index:
            raise GraniteError(f"entry {index}: has the {what} of entry {first}, and would count twice")
    return Utterance(entry.id, text, entry.keywords, _seconds(entry, access))


def _seconds(entry: Entry, access: AudioStorage) -> float | None:
    """Length of an entry's audio, as far as its file's header is to be trusted; None if the file is remote."""
    if entry.duration is not None:
        return entry.duration
    try:
        if scheme(access.resolve(entry.audio)) is not None:
            return None
        with access.open(entry.audio) as file:
            return max(0.0, soundfile.info(file).duration - entry.offset)
    except (GraniteError, OSError, soundfile.LibsndfileError):  # the job will say so
        return 0.0


# TFDS.


def _prepare(name: str, split: str) -> str:
    """The directory of one of TFDS's own data sets, which is downloaded and prepared when it is not there yet."""
    with _quietly(f"tfds:{name}"):
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder(name, file_format="array_record")
        if split not in builder.info.splits:
            builder.download_and_prepare()
        return str(builder.data_dir)


@contextlib.contextmanager
def _quietly(what: str) -> Iterator[None]:
    """TFDS's many ways to fail become a GraniteError."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        needed = "needs pip install 'granite-jax[tfds-audio]', which brings TensorFlow"
        raise GraniteError(f"{what}: {needed} ({one_line(error)})") from None
    except Exception as error:
        raise GraniteError(f"{what}: cannot be opened ({type(error).__name__}: {one_line(error)})") from None


def _builder_name(place: str) -> str:
    """`librispeech` of librispeech/default/2.1.0, or of a path to it."""
    parts = [part for part in Path(place).parts if not re.fullmatch(r"\d+\.\d+\.\d+|default", part)]
    return parts[-1] if parts else place


def _open_tfds(name: str, directory: str, split: str) -> EvaluationSet:
    examples = open_dataset(directory, split)
    text = next((key for key in TEXT if key in examples.features), None)
    if text is None:
        raise GraniteError(f"{directory}: has no feature named {', '.join(TEXT)}")
    utterances = []
    for place in range(len(examples)):
        example = examples.source[place]
        keywords = tuple(map(_text, example["keywords"])) if "keywords" in examples.features else None
        identity = _text(example.get("id", place))
        utterances.append(Utterance(identity, _text(example[text]), keywords, examples.seconds(example)))
    return EvaluationSet(name, f"tfds:{directory}#{split}", directory, tuple(utterances))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
