"""Ray Data as the engine: a class for `ray.data.Dataset.map_batches`, whose actors hold a Transcriber each.

    import ray
    from granite_jax.batch.ray_data import Transcribe

    rows = ray.data.read_json("manifest.jsonl", lines=True)
    rows.map_batches(
        Transcribe, fn_constructor_kwargs={"model": "demo", "root": "/data"}, batch_size=128, concurrency=8
    ).write_json("out/")

Ray restarts actors that died and repeats their batches. Needs `pip install 'granite-jax[ray]'`; Ray itself
is not imported here.
"""

import dataclasses
import os
from concurrent.futures import wait
from typing import Any

import numpy as np

from granite_jax.batch.access import PROTOCOLS, AudioStorage
from granite_jax.batch.manifest import parse_entry
from granite_jax.batch.reading import Reader
from granite_jax.batch.transcription import submit_entry, transcript_of
from granite_jax.errors import GraniteError
from granite_jax.formats.schema import transcript_fields
from granite_jax.options import ModelOptions, TranscribeOptions, accepts, check_mixed, resolve
from granite_jax.results import Transcript
from granite_jax.transcriber import Transcriber


class Transcribe:
    """A manifest's columns in; `id`, `audio` and a transcript's other fields out.

    Instead of `audio` there can be `bytes`, the contents of files, with their names in `path`, as
    `ray.data.read_binary_files(..., include_paths=True)` has them.
    """

    @accepts(ModelOptions, TranscribeOptions)
    def __init__(
        self,
        model: ModelOptions | str | os.PathLike[str] = "demo",
        options: TranscribeOptions | None = None,
        *,
        root: str | os.PathLike[str] = ".",
        allow: tuple[str, ...] = PROTOCOLS,
        num_readers: int = 16,
        **fields: Any,
    ):
        """
        Args:
          model, options, root, allow, num_readers, fields: as in `batch.run`; readers are always threads.

        Raises:
          GraniteError: the checkpoint or an option is not usable.
        """
        model_options, self._options = resolve(model, options, fields)
        check_mixed(self._options)
        self._asr = Transcriber.from_options(model_options, self._options.recognizer)
        max_seconds = self._asr.config.max_seconds if self._options.segment_seconds is None else None
        self._reader = Reader(AudioStorage(os.fspath(root), tuple(allow)), max_seconds)
        if num_readers < 1:
            raise GraniteError(f"num_readers is {num_readers}, not a positive number")
        self._asr.readers.limit = num_readers

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Transcribes a batch; a row that failed has an `error`, no text and no `stats`."""
        contents = rows.get("bytes")  # no array: NumPy would drop zeros at their ends
        columns = {name: np.asarray(column).tolist() for name, column in rows.items() if name != "bytes"}
        count = len(next(iter(rows.values()), []))
        fields = [{name: _plain(column[i]) for name, column in columns.items()} for i in range(count)]
        for i, row in enumerate(fields):
            if contents is not None:
                row.setdefault("audio", row.get("path") or f"bytes[{i}]")
        entries = [parse_entry(row, i, self._options) for i, row in enumerate(fields)]
        data = [None] * count if contents is None else list(contents)
        opened = [self._reader.open(entry, contents) for entry, contents in zip(entries, data, strict=True)]
        with self._asr.expecting():
            futures = [submit_entry(self._asr, audio, self._options) for audio in opened]
        wait(futures)
        transcripts = [transcript_of(entry, future) for entry, future in zip(entries, futures, strict=True)]
        written = [transcript_fields(transcript) for transcript in transcripts]
        named = [row.get("id") is not None for row in fields]
        return {field.name: [row[field.name] for row in written] for field in dataclasses.fields(Transcript)} | {
            "id": [e.id if is_named else e.audio or e.id for e, is_named in zip(entries, named, strict=True)],
            "audio": [entry.audio for entry in entries],
            "stats": [None if row["error"] else row["stats"] for row in written],  # Parquet has no empty structs
        }


def _plain(value: Any) -> Any:
    """A cell as a JSON value; NaN becomes None because columns with gaps hold NaN."""
    if isinstance(value, float) and value != value:
        return None
    return value.tolist() if isinstance(value, np.ndarray) else value
