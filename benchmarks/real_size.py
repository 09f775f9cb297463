"""How fast this is beside `transformers` at the real size, as a whole and by part, and what it takes to begin.

    python benchmarks/real_size.py [--batch 1 4 8] [--turns 3] [--seconds 2.9] [--layers 40] [--format json]

A random model of the proportions of granite-4.0-1b-speech, but with the vocabulary of tests/hf_fixture.py, of about
300 tokens: 1.9 billion parameters, float32, 7.6 GB, written to a temporary directory. `--layers` makes it smaller. Each
side is a process of its own, which waits while the other computes; both have as many threads as there are cores. They
take 16 GB of memory together, and some 15 minutes on two cores with one batch size.

    greedy, lossless, verified drafts    as in benchmarks/vs_transformers.py, 16 new tokens
    encoder, projector; prefill; decode  the parts of a greedy run, of one batch of clips of the same length

Prints the times of both sides and the median and range of their ratio within a turn; the first transcript of each
process after its weights are loaded, for this program with nothing compiled before and, in a second process, from the
cache; and the peak of each process's anonymous memory (RssAnon) beside the bytes of the weights. Needs what
benchmarks/vs_transformers.py needs.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NEW_TOKENS = 16
RATE = 16_000
SIDES = ("transformers", "ours")
# fmt: off
MODEL: dict[str, Any] = {
    "encoder_config": {"num_layers": 16, "hidden_dim": 1024, "num_heads": 8, "dim_head": 128, "feedforward_mult": 4,
                       "context_size": 200, "max_pos_emb": 512},
    "projector_config": {"hidden_size": 1024, "encoder_hidden_size": 1024, "num_attention_heads": 16,
                         "num_hidden_layers": 2, "intermediate_size": 4096},
    "text_config": {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 4,
                    "head_dim": 128, "intermediate_size": 4096, "attention_multiplier": 0.0078125,
                    "max_position_embeddings": 4096},
}
# fmt: on


def write_model(directory: Path, layers: int) -> int:
    """Writes the model with this many layers of the language model; returns its parameters.

    It writes letters alone that the tokenizer never joins, so that a text encodes to the tokens that it was made of.
    """
    import numpy as np
    from hf_fixture import (  # pyright: ignore[reportMissingImports]
        TINY,
        make_config,
        make_tokenizer,
        random_tensors,
        write_random_checkpoint,
        write_tensors,
    )

    write_random_checkpoint(directory, **TINY)  # for its tokenizer and template
    tokenizer, sizes = make_tokenizer(), {name: dict(part) for name, part in MODEL.items()}
    sizes["text_config"]["num_hidden_layers"] = layers
    sizes["encoder_config"]["num_layers"] = max(2, layers * 16 // 40)
    config = make_config(tokenizer, False, "float32", **sizes)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, 0)
    head = tensors["language_model.lm_head.weight"]
    head[np.setdiff1d(np.arange(len(head)), [tokenizer.token_to_id(letter) for letter in "BCDGHJLMOPQVWXYZ"])] = 0
    write_tensors(directory, tensors)
    return sum(tensor.size for tensor in tensors.values())


def peak_anonymous() -> Callable[[], int]:
    """Starts to sample this process's RssAnon; the function returns the largest value so far, in bytes."""
    peak = 0

    def sample() -> None:
        nonlocal peak
        while True:
            status = Path("/proc/self/status").read_text()
            kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            peak = max(peak, 1024 * kilobytes)
            time.sleep(0.02)

    threading.Thread(target=sample, daemon=True).start()
    return lambda: peak


def clips(count: int, seconds: float) -> list[Any]:
    """Sentences of one length."""
    from benchmarks.speculation import read_speech
    from granite_jax.evaluation.heldout import CLIPS

    size = round(seconds * RATE)
    return [sound[:size] for sound in read_speech(CLIPS, None).audio if len(sound) >= size][:count]


def transformers_side(directory: Path, audio: list[Any], steps: int) -> tuple[dict[str, Callable[[], float]], Any]:
    """What is timed of transformers, and the texts of a greedy run."""
    import torch
    import transformers

    from benchmarks.timing import elapsed
    from benchmarks.vs_transformers import Reference, reference_stages
    from granite_jax.text.tasks import Prompts

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    reference, instruction = Reference(directory, NEW_TOKENS), Prompts().transcribe
    whole = functools.partial(elapsed, lambda: reference.generate(audio, instruction))
    stages = reference_stages(reference, audio, instruction, steps)
    return {"greedy": whole, **stages}, lambda: [each.text for each in reference.generate(audio, instruction)]


def own_side(directory: Path, audio: list[Any], steps: int) -> tuple[dict[str, Callable[[], float]], Any]:
    """What is timed of this program, and the texts of a greedy run."""
    import granite_jax as gj
    from benchmarks.speculation import ONE_PASS
    from benchmarks.stages import own_stages
    from benchmarks.timing import elapsed

    asr = gj.Transcriber.from_pretrained(directory, dtype="float32", batch_size=len(audio))
    run = functools.partial(asr.transcribe, audio, max_new_tokens=NEW_TOKENS, **ONE_PASS)
    texts = functools.cache(lambda: [transcript.text for transcript in run(speculative=False)])
    modes = {
        "greedy": lambda: elapsed(lambda: run(speculative=False)),
        "lossless": lambda: elapsed(run),
        "verified drafts": lambda: elapsed(lambda: run(draft=texts())),
    }
    return {**modes, **own_stages(asr, asr.params, audio, NEW_TOKENS, steps)}, texts


def serve(side: str, directory: Path, count: int, seconds: float) -> None:
    """Answers the names on standard input, a line each, with the seconds that they took; "all" is not measured here."""
    peak, started = peak_anonymous(), time.perf_counter()
    audio = clips(count, seconds)
    make = own_side if side == "ours" else transformers_side
    measures, texts = make(directory, audio, NEW_TOKENS - 1)
    loaded = time.perf_counter() - started
    first = measures["greedy"]()
    names = [name for name in measures if name not in ("all", "log-mel")]
    print(json.dumps({"load": loaded, "first": first, "texts": texts(), "measures": names}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": measures[line.strip()](), "peak": peak()}), flush=True)


class Side:
    """A process that measures one side."""

    def __init__(self, side: str, directory: Path, count: int, seconds: float, cache: Path):
        command = [sys.executable, __file__, "--serve", side, str(directory), "--batch", str(count)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about = self._answer()
        self.peak = 0

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def measure(self, name: str) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self._process.wait()}: {' '.join(map(str, sys.argv))}")
        return json.loads(line)


def compare(directory: Path, batch: int, seconds: float, turns: int, cache: Path) -> Iterator[dict[str, Any]]:
    """Rows of a batch size: modes and parts, then beginnings and memory."""
    with Side("ours", directory, batch, seconds, cache) as cold:
        first_cold = cold.about["first"]
    with (
        Side("transformers", directory, batch, seconds, cache) as theirs,
        Side("ours", directory, batch, seconds, cache) as ours,
    ):
        for name in ours.about["measures"]:
            reference = name if name in theirs.about["measures"] else "greedy"
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            ours.measure(name)  # compiles
            for _ in range(turns):
                times["transformers"].append(theirs.measure(reference))
                times["ours"].append(ours.measure(name))
            ratios = [a / b for a, b in zip(times["transformers"], times["ours"], strict=True)]
            medians = {side: statistics.median(values) for side, values in times.items()}
            spread = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            yield {"batch": batch, "measure": name, **medians, **spread}
        same = sum(a == b for a, b in zip(theirs.about["texts"], ours.about["texts"], strict=True))
        yield {"batch": batch, "measure": "equal texts", "ours": same, "transformers": batch}
        loads = {"transformers": theirs.about["load"], "ours": ours.about["load"]}
        yield {"batch": batch, "measure": "load", **loads}
        firsts = {"transformers": theirs.about["first"], "ours": ours.about["first"]}
        yield {"batch": batch, "measure": "first transcript", **firsts, "ours, nothing compiled": first_cold}
        yield {"batch": batch, "measure": "peak RssAnon, bytes", "transformers": theirs.peak, "ours": ours.peak}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"| {row['batch']} | {row['measure']}"]
    cells += [f"{row[side]:,.2f}" if row[side] < 1e6 else f"{row[side]:,}" for side in SIDES]
    if "ratio" in row:
        cells.append(f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})")
    else:
        cells.append(", ".join(f"{name} {row[name]:.1f}" for name in row if name.startswith("ours,")))
    return " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.9, help="of audio, each clip")
    parser.add_argument(
        "--layers", type=int, default=40, help="of the language model; 4 for each 10, the encoder's, too"
    )
    parser.add_argument("--format", choices=("txt", "json"), default="txt")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        side, directory = args.serve
        serve(side, Path(directory), args.batch[0], args.seconds)
        return
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "hf"
        parameters = write_model(directory, args.layers)
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        cpu = {name: name in flags.split() for name in ("avx2", "avx512f", "amx_bf16")}
        about = {"parameters": parameters, "weight_bytes": 4 * parameters, "cores": os.cpu_count(), "cpu": cpu}
        if args.format == "txt":
            print(", ".join(f"{name} {value}" for name, value in about.items()))
            print("\n| batch | measure | transformers, s | granite_jax, s | times as fast (range) |")
            print("| --- | --- | --- | --- | --- |", flush=True)
        rows = []
        for batch in args.batch:
            cache = Path(parent) / f"cache-{batch}"
            for row in compare(directory, batch, args.seconds, args.turns, cache):
                rows.append(row)
                if args.format == "txt":
                    print(line(row), flush=True)
        if args.format == "json":
            print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
