"""The embedded checkpoint's held-out clips as a TFDS data set of int16 tensors, which needs no TensorFlow."""

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tensorflow_datasets as tfds

from granite_jax.errors import GraniteError, one_line
from granite_jax.files.paths import cache_directory
from granite_jax.waveform import SAMPLING_RATE

CLIPS = Path(__file__).with_name("heldout_clips")
"""300 clips of synthetic speech and `heldout.jsonl`."""
SPLIT = "test"


class DemoHeldout(tfds.core.GeneratorBasedBuilder):
    """Samples, their text, and the invented names in it."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, clips: Path = CLIPS, **options: Any):
        self._clips = clips
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    "text": tfds.features.Text(),
                    "keywords": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            metadata=tfds.core.MetadataDict(sampling_rate=SAMPLING_RATE),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Any:
        lines = (self._clips / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        for index, clip in enumerate(map(json.loads, lines)):
            samples, rate = soundfile.read(self._clips / clip["audio"], dtype="int16")
            assert rate == SAMPLING_RATE
            yield index, {"id": clip["id"], "audio": samples, "text": clip["text"], "keywords": clip["names"]}


def _digest(clips: Path) -> str:
    """Identifies the contents of all files of a directory."""
    digest = hashlib.sha256()
    for path in sorted(clips.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def prepare(directory: Path | None = None, clips: Path | None = None) -> Path:
    """The directory of the prepared data set; prepares it if it is not there yet.

    Args:
      directory: default one in the user's cache for each version of the clips.
      clips: default `CLIPS`.

    Raises:
      GraniteError: the directory cannot be written.
    """
    clips = clips or CLIPS
    directory = directory or cache_directory() / "tfds" / _digest(clips)
    builder = DemoHeldout(clips, data_dir=str(directory), file_format="array_record")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # hides its progress
            builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record's is a RuntimeError
        advice = "XDG_CACHE_HOME sets another directory for the cache"
        raise GraniteError(f"{directory}: cannot be written ({one_line(error)}): {advice}") from error
    return Path(builder.data_dir)
