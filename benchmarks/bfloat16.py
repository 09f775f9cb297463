"""How often bfloat16 generates the tokens of float32, and how often batching changes a bfloat16 result.

    python benchmarks/bfloat16.py [--checkpoint demo] [FILE ...]

Transcribes the files (default: the committed held-out clips) in float32, in bfloat16 in batches of eight, and in
bfloat16 one by one, in one run, and prints the shares of equal transcripts and of equal tokens up to the first
difference.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import granite_jax as gj
from granite_jax.evaluation.heldout import CLIPS


def agreement(left: Sequence[gj.Transcript], right: Sequence[gj.Transcript]) -> dict[str, float]:
    """Shares of equal transcripts, and of tokens before the first difference."""
    same = [a.tokens == b.tokens for a, b in zip(left, right, strict=True)]
    common = 0
    for a, b in zip(left, right, strict=True):
        differences = (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
        common += next(differences, min(len(a.tokens), len(b.tokens)))
    total = sum(max(len(a.tokens), len(b.tokens)) for a, b in zip(left, right, strict=True))
    return {"transcripts": round(sum(same) / len(same), 4), "tokens": round(common / max(total, 1), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--checkpoint", default="demo")
    args = parser.parse_args()
    files = args.files or sorted(CLIPS.glob("*.ogg"))

    def run(dtype: str, batch_size: int) -> list[gj.Transcript]:
        asr = gj.Transcriber.from_pretrained(args.checkpoint, dtype=dtype, batch_size=batch_size)
        return asr.transcribe(list(files))

    float32, batched, single = run("float32", 8), run("bfloat16", 8), run("bfloat16", 1)
    print(json.dumps({"files": len(files), "bfloat16 against float32": agreement(float32, batched)}))
    print(json.dumps({"files": len(files), "bfloat16 batched against single": agreement(batched, single)}))


if __name__ == "__main__":
    main()
