"""Transcribes every sample with the embedded checkpoint and prints each text beside what was said."""

import json
import time
from pathlib import Path

import granite_jax as gj

SAMPLES = Path(__file__).parent


def main() -> None:
    """Runs the demo."""
    samples = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text().splitlines()]
    asr = gj.Transcriber.from_pretrained("demo")
    started = time.monotonic()
    transcripts = asr.transcribe([SAMPLES / sample["audio"] for sample in samples])
    seconds = time.monotonic() - started
    for sample, transcript in zip(samples, transcripts, strict=True):
        print(f"{sample['audio']} ({transcript.duration:.1f} s)")
        print(f"  said   {sample['text']}")
        print(f"  heard  {transcript.text}\n")
    exact = sum(sample["text"] == transcript.text for sample, transcript in zip(samples, transcripts, strict=True))
    print(f"{exact} of {len(samples)} without an error; {seconds:.1f} s, compilation included")


if __name__ == "__main__":
    main()
