"""How fast the full-size model runs on a CUDA GPU, compared with transformers and with what the card can do at most.

    python benchmarks/gpu.py                           # made for one GPU with 80 GB; stops after 450 s at the latest
    python benchmarks/gpu.py --batch 128 --seconds 30  # other shapes
    python benchmarks/gpu.py --probe                   # only says what is installed and what is missing
    python benchmarks/gpu.py --small                   # a tiny model, to try the script on any machine

Nothing is downloaded. The weights are random bfloat16 numbers in the shapes of granite-4.0-1b-speech, and the audio is
noise, so every row is of full length. granite_jax and transformers run one after the other, each in its own process.
The output is a probe of what is installed, one JSON object for every measurement as soon as it is made, and Markdown
tables. Without torch or transformers, the tables have no numbers of theirs. If a Python package is missing, the probe
prints the command that downloads its wheel elsewhere; wheels in the directory `--wheels` are used as if installed.
The exit status is 1 if something of granite_jax could not be measured.

What the tables mean:

- Every time is the median of at least three runs that end with a synchronized device. Importing, the copy of the
  weights from host memory to the device, and the first run of a program, which compiles it, are listed apart.
- RTFx is seconds of audio for each second from waveforms in host memory to token ids in host memory: log-mel, encoder,
  projector, prefill and decoding. Audio files, tokenizer and the making of drafts are not part of it.
- Decoding writes exactly 2.5 tokens for each second of audio: the end-of-text token is ruled out. "Verified drafts"
  have the greedy tokens as drafts, so that the prefill accepts all of them and no decode step is left.
- The output head is the embedding shifted by one row, so that in both frameworks token n is followed by n + 1, by a
  margin that rounding cannot close. "As expected" counts the rows that hold exactly these tokens.
- The ceilings are measured in the same run: a bfloat16 matrix product on random data, and one pass over a large array,
  counting bytes read and bytes written. The better of the two frameworks' rates is the ceiling for both.
- A part's share of a ceiling is the time that its operations, or its bytes, need at that ceiling over its measured
  time; the larger of the two is its share of the roofline. Both are counted by formula, because the compiler's count
  has the body of a loop over layers only once. Operations are matrix products (log-mel left out) over real frames and
  tokens; bytes are weights, KV cache and inputs, each once. This is the least that is needed: padding up to the
  shapes of a bucket, masked positions and repeated reads lower the share.
- A decode step of granite_jax is a step of the loop on the device; one of transformers is a forward pass and an argmax.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# This module imports neither granite_jax nor a framework: they may be missing, and each has a process of its own.
ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000
TOKENS_PER_SECOND = 2.5
TITLES = {"jax": "granite_jax", "torch": "transformers"}
MODULES = {
    "jax": "jax jaxlib flax jaxtyping numpy ml_dtypes absl etils msgpack optax opt_einsum yaml rich treescope "
    "typing_extensions wadler_lindig",
    "torch": "torch transformers torchaudio",
}
DISTRIBUTIONS = {"absl": "absl-py", "yaml": "PyYAML"}  # where the name is not the module's
# fmt: off
SMALL = {
    "audio_token_index": 1023,
    "encoder_config": {"num_layers": 2, "hidden_dim": 64, "num_heads": 2, "dim_head": 32},
    "projector_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 4,
                         "intermediate_size": 128},
    "text_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "intermediate_size": 256, "vocab_size": 1024, "bos_token_id": 1022, "eos_token_id": 1022,
                    "pad_token_id": 1021},
}
# fmt: on

Row = dict[str, Any]
Action = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What both frameworks are given: `config.json`, rows, seconds of audio of each row, whether it is a trial."""

    config: dict[str, Any]
    batch: int
    seconds: float
    small: bool

    @property
    def samples(self) -> int:
        return round(self.seconds * RATE)

    @property
    def frames(self) -> int:
        return (self.samples // 160 + 1) // 2

    @property
    def windows(self) -> int:
        return -(-self.frames // self.config["window_size"])

    @property
    def queries(self) -> int:
        return self.config["window_size"] // self.config["downsample_rate"]

    @property
    def prompt(self) -> list[int]:
        """As long as the released chat template's: 4 tokens, the audio's, 14 tokens, of which the last is token 1."""
        return [2] * 4 + [self.config["audio_token_index"]] * self.windows * self.queries + [2] * 13 + [1]

    @property
    def new_tokens(self) -> int:
        return max(2, round(TOKENS_PER_SECOND * self.seconds))


def count_work(work: Workload) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes that each part needs at least."""
    batch, text = work.batch, work.config["text_config"]
    encoder, projector = work.config["encoder_config"], work.config["projector_config"]

    width, inner = encoder["hidden_dim"], encoder["num_heads"] * encoder["dim_head"]
    channels, layers = width * encoder["conv_expansion_factor"], encoder["num_layers"]
    block = 4 * encoder["feedforward_mult"] * width**2 + 4 * width * inner + 3 * width * channels
    block += channels * encoder["conv_kernel_size"]
    labels, context = width * encoder["output_dim"], encoder["context_size"]
    full, rest = divmod(work.frames, context)
    # Of each block of frames: queries with keys, queries with relative positions, weights with values.
    attention = 3 * inner * (full * context**2 + rest**2)
    products = work.frames * (layers * block + encoder["input_dim"] * width + 3 * labels) + layers * attention
    weights = layers * (block + (2 * encoder["max_pos_emb"] + 1) * encoder["dim_head"]) + 2 * labels

    # Q-Former: of each window, self-attention, cross-attention and feed-forward of its queries.
    width, keys, queries = projector["hidden_size"], work.config["window_size"], work.queries
    square, sources = width**2, projector["encoder_hidden_size"] * width
    ahead = 2 * width * projector["intermediate_size"]
    layer = queries * (6 * square + ahead) + 2 * keys * sources + 2 * queries * (queries + keys) * width
    output = width * text["hidden_size"]
    products += work.windows * (projector["num_hidden_layers"] * layer + queries * output)
    weights += projector["num_hidden_layers"] * (6 * square + 2 * sources + ahead) + output
    audio = work.windows * queries * text["hidden_size"]
    counted = {"encode": (2.0 * batch * products, 2.0 * weights + batch * (4.0 * work.samples + 2.0 * audio))}

    width, heads, groups = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    size, layers = text.get("head_dim") or width // heads, text["num_hidden_layers"]
    layer = 2 * width * size * (heads + groups) + 3 * width * text["intermediate_size"]
    head, cache = width * text["vocab_size"], 4.0 * layers * groups * size  # bytes of a position's keys and values

    def decoder(positions: int, pairs: float, logits: int, read: float) -> tuple[float, float]:
        """`pairs` of a query and a key it attends to; `read`, positions that the cache holds before."""
        products = positions * layers * layer + 2 * layers * heads * size * pairs + logits * head
        moved = (positions + read) * cache + 2.0 * positions * width
        return 2.0 * batch * products, 2.0 * (layers * layer + head) + batch * moved

    prompt, new = len(work.prompt), work.new_tokens
    counted["prefill"] = decoder(prompt, prompt * (prompt + 1) / 2, 1, 0)
    both = prompt + new
    counted["prefill with drafts"] = decoder(both, both * (both + 1) / 2, new + 1, 0)
    filled = prompt + new / 2  # on average over the steps
    counted["decode step"] = decoder(1, filled, 1, filled)
    return counted


class Bench:
    """Times what it is given and prints a JSON object for every measurement at once, so that it outlasts what follows.

    What fails, for want of memory for example, is reported, and the rest goes on.
    """

    def __init__(self, part: str, work: Workload):
        self.part, self.work = part, work

    def emit(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"part": self.part, "kind": kind, **fields}), flush=True)

    def attempt(self, name: str, action: Action) -> Any:
        """The action's result, or None if it failed."""
        try:
            return action()
        except Exception as error:  # every framework has a class of its own for too little memory
            self.emit("failed", name=name, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])
            return None

    def once(self, name: str, action: Action) -> Any:
        """The action's result, its time reported."""

        def timed() -> Any:
            began = time.perf_counter()
            result = action()
            self.emit("once", name=name, seconds=time.perf_counter() - began)
            return result

        return self.attempt(name, timed)

    def median(self, action: Callable[..., Any], setup: Action | None = None) -> tuple[float, int]:
        """Median seconds of an action on what `setup` returns, and how often it ran."""
        times: list[float] = []
        began, longest = time.perf_counter(), 0.2 if self.work.small else 3.0
        while len(times) < 3 or (time.perf_counter() - began < longest and len(times) < 50):
            arguments = () if setup is None else (setup(),)
            start = time.perf_counter()
            action(*arguments)
            times.append(time.perf_counter() - start)
        return statistics.median(times), len(times)

    def steady(self, name: str, action: Callable[..., Any], setup: Action | None = None, parts: int = 1) -> None:
        """Reports the time of one of an action's equal parts."""
        if timing := self.attempt(name, lambda: self.median(action, setup)):
            self.emit("steady", name=name, seconds=timing[0] / parts, runs=timing[1])

    def ceilings(self, product: Action, operations: float, copy: Action, moved: float, wait: Action) -> None:
        """Reports rates, given functions that queue a matrix product and a copy, and one that waits."""

        def burst(action: Action) -> None:
            for _ in range(10):
                action()
            wait()

        for name, action, amount in (("matrix product", product, operations), ("copy", copy, moved)):
            self.attempt(name, functools.partial(burst, action))
            if timing := self.attempt(name, lambda action=action: self.median(lambda: burst(action))):
                self.emit("ceiling", name=name, rate=10 * amount / timing[0])

    def speed(self, name: str, transcribe: Callable[[], tuple[list[list[int]], int]]) -> list[list[int]]:
        """Reports RTFx of a function that returns tokens and passes of the language model; returns the tokens."""
        tokens, passes = self.attempt(name, transcribe) or ([], 0)
        if timing := tokens and self.attempt(name, lambda: self.median(transcribe)):
            expected = list(range(2, 2 + self.work.new_tokens))  # the prompt ends with token 1
            right = sum(row == expected for row in tokens)
            lengths = "/".join(str(length) for length in sorted({len(row) for row in tokens}))
            text = f"{lengths} tokens a row in {passes} passes, {right} of {len(tokens)} rows as expected"
            rtfx = self.work.batch * self.work.seconds / timing[0]
            self.emit("speed", name=name, rtfx=rtfx, seconds=timing[0], runs=timing[1], text=text)
        return tokens


def run_jax(work: Workload, bench: Bench) -> None:
    """Measures the programs of granite_jax."""
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    from granite_jax.keywords.automaton import no_keywords
    from granite_jax.keywords.spotter import make_keyword_batch
    from granite_jax.models import granite_speech
    from granite_jax.models.granite_speech.config import Config
    from granite_jax.recognition.buckets import make_bucket
    from granite_jax.recognition.speech_lm_programs import SpeechLMPrograms, pad_drafts

    device, wait = jax.devices()[0], jax.block_until_ready
    bench.emit("once", name="import", seconds=time.perf_counter() - began)
    bench.emit("about", text=f"JAX {jax.__version__} on {device.device_kind}")
    if device.platform == "cpu" and not work.small:
        raise SystemExit("JAX sees no GPU; --small runs on a CPU")

    side, count = (512, 1 << 22) if work.small else (8192, 1 << 29)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    queued: dict[str, jax.Array] = {}

    def queue(name: str, function: Callable[..., jax.Array], *arrays: jax.Array) -> Action:
        return lambda: queued.update({name: function(*arrays)})

    square = [jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys[:2]]
    product = queue("product", jax.jit(jnp.matmul), *square)
    copy = queue("copy", jax.jit(lambda x: x + jnp.uint32(1)), jax.random.bits(keys[2], (count,), jnp.uint32))
    bench.ceilings(product, 2.0 * side**3, copy, 8.0 * count, lambda: wait(queued))
    del square, product, copy
    queued.clear()

    config = Config.from_dict(work.config)
    # The token that ends a text is the audio token, which is never produced: every row is decoded up to its limit.
    endless = dataclasses.replace(config.decoder, eos_token_id=config.audio_token_id)
    config = dataclasses.replace(config, decoder=endless)
    bucket, programs = make_bucket(config, work.batch, work.seconds), SpeechLMPrograms(config, jnp.bfloat16)
    split, place = programs.devices.shard_rows, programs.devices.put
    bench.emit("about", text=str(bucket))

    @jax.jit
    def random(key: jax.Array) -> Any:
        params = granite_speech.init(config, key, jnp.bfloat16)
        embedding = jax.random.normal(key, (config.decoder.vocab_size, config.decoder.hidden_size), jnp.bfloat16)
        params["decoder"]["embedding"]["embedding"] = embedding
        params["decoder"]["head"]["kernel"] = jnp.roll(embedding, 1, axis=0).T
        return params

    host = bench.once("random weights", lambda: jax.device_get(random(keys[3])))
    params = bench.once("load", lambda: wait(place(host)))
    size = sum(array.nbytes for array in jax.tree.leaves(host))
    bench.emit("about", text=f"weights of {size / 1e9:.2f} GB")
    del host

    def rows(value: Any, dtype: Any = np.int32) -> jax.Array:
        return split(np.full(work.batch, value, dtype))

    waveforms = np.zeros((work.batch, bucket.samples), np.float32)
    waveforms[:, : work.samples] = np.random.default_rng(0).uniform(-0.5, 0.5, (work.batch, work.samples))
    prompts = np.zeros((work.batch, bucket.prompt), np.int32)
    prompts[:, : len(work.prompt)] = work.prompt
    samples, tokens, lengths = split(waveforms), split(prompts), rows(len(work.prompt))
    audio_lengths, limits, lossless = rows(work.samples), rows(work.new_tokens), rows(np.inf, np.float32)
    sounds, automata = split(make_keyword_batch([None] * work.batch)), no_keywords(work.batch)
    keywords = dataclasses.replace(place(automata), starts=split(automata.starts))

    def encode(samples: jax.Array) -> Any:
        return programs.encode(params, samples, audio_lengths, sounds, rows(0)).audio

    def draft(texts: list[list[int]] | None = None) -> Any:
        return split(pad_drafts(texts or [[]] * work.batch, bucket.draft))

    def prefill(audio: jax.Array, draft: Any) -> Any:
        return programs.prefill(params, tokens, lengths, audio, draft, keywords, capacity=bucket.capacity)

    def decode(prefilled: Any, draft: Any) -> Any:
        return programs.decode(
            params, *prefilled, draft, limits, lossless, keywords, max_out_length=bucket.max_out_length
        )

    def transcribe(texts: list[list[int]] | None = None) -> tuple[list[list[int]], int]:
        drafts = draft(texts)
        state = decode(prefill(encode(split(waveforms)), drafts), drafts)
        generated, counts, passes = jax.device_get((state.tokens, state.num_tokens, state.num_forward_passes))
        return [row[:count].tolist() for row, count in zip(generated, counts, strict=True)], int(passes.max())

    empty = draft()
    audio = bench.once("first encode", lambda: wait(encode(samples)))
    bench.steady("encode", lambda: wait(encode(samples)))
    prefilled = bench.once("first prefill", lambda: wait(prefill(audio, empty)))
    bench.steady("prefill", lambda: wait(prefill(audio, empty)))
    bench.once("first decode", lambda: wait(decode(prefilled, empty)))
    del prefilled  # the decode program has taken its memory
    # As the loop on the device runs it: the first token is the prefill's.
    steps = work.new_tokens - 1
    bench.steady("decode step", lambda x: wait(decode(x, empty)), lambda: wait(prefill(audio, empty)), steps)
    if greedy := bench.speed("autoregressive", transcribe):
        bench.speed("verified drafts", lambda: transcribe(greedy))
        drafted = draft(greedy)
        bench.steady("prefill with drafts", lambda: wait(prefill(audio, drafted)))
    if peak := (device.memory_stats() or {}).get("peak_bytes_in_use"):
        bench.emit("about", text=f"at most {peak / 1e9:.1f} GB of device memory in use")


def run_torch(work: Workload, bench: Bench) -> None:
    """Measures `GraniteSpeechForConditionalGeneration` of transformers as it comes: eager, with its default cache."""
    began = time.perf_counter()
    import torch
    import transformers

    bench.emit("once", name="import", seconds=time.perf_counter() - began)
    cuda = torch.cuda.is_available()
    device, name = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", "cpu")
    wait = torch.cuda.synchronize if cuda else lambda: None
    bench.emit("about", text=f"PyTorch {torch.__version__}, transformers {transformers.__version__} on {name}")
    if not cuda and not work.small:
        raise SystemExit("PyTorch sees no GPU; --small runs on a CPU")
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)

    side, count = (512, 1 << 22) if work.small else (8192, 1 << 29)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    bench.ceilings(lambda: left @ right, 2.0 * side**3, lambda: target.copy_(source), 8.0 * count, wait)
    del left, right, source, target

    def random() -> Any:
        config = transformers.GraniteSpeechConfig.from_dict(json.loads(json.dumps(work.config)))
        with torch.device(device):
            model: Any = transformers.GraniteSpeechForConditionalGeneration(config)
        model.to(torch.bfloat16).eval()
        embedding = model.get_input_embeddings().weight.normal_()
        model.get_output_embeddings().weight.copy_(embedding.roll(1, 0))
        return model.to("cpu")

    model = bench.once("random weights", random)
    bench.once("load", lambda: (model.to(device), wait()))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    bench.emit("about", text=f"weights of {size / 1e9:.2f} GB")

    extract = bench.attempt("log-mel, which is left out", transformers.GraniteSpeechFeatureExtractor)
    waveforms = torch.rand(work.batch, work.samples) - 0.5
    samples, tokens = waveforms.to(device), torch.tensor([work.prompt] * work.batch, device=device)
    noise = torch.randn(work.batch, work.frames, 160, device=device)

    def features(samples: Any) -> Any:
        log_mel = extract(samples, device=device)["input_features"] if extract else noise
        return log_mel.to(torch.bfloat16)

    def encode() -> None:
        model.get_audio_features(features(samples))
        wait()

    def prefill() -> Any:
        # Without features, so that the encoder is not run again: another embedding is in the place of the audio's.
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        wait()
        return output

    def decode(output: Any) -> None:
        for _ in range(work.new_tokens - 1):
            best, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            output = model(input_ids=best, past_key_values=cache, use_cache=True, logits_to_keep=1)
        output.logits.argmax(-1)
        wait()

    def transcribe() -> tuple[list[list[int]], int]:
        limits = {"min_new_tokens": work.new_tokens, "max_new_tokens": work.new_tokens, "do_sample": False}
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        generated = model.generate(**inputs, input_features=features(waveforms.to(device)), **limits)
        return generated[:, tokens.shape[1] :].tolist(), work.new_tokens

    bench.once("first encode", encode)
    bench.steady("encode", encode)
    prefilled = bench.once("first prefill", prefill)
    bench.steady("prefill", prefill)
    bench.once("first decode", lambda: decode(prefilled))
    del prefilled
    bench.steady("decode step", decode, prefill, work.new_tokens - 1)
    bench.speed("autoregressive", transcribe)
    if cuda:
        bench.emit("about", text=f"at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of device memory in use")


def download_command(names: list[str]) -> str:
    """The command that fetches the wheels of modules for this Python on a machine with a network."""
    machine = platform.machine()
    platforms = " ".join(f"--platform manylinux{tag}_{machine}" for tag in ("_2_28", "_2_17", "2014"))
    wheels = [DISTRIBUTIONS.get(name, name) for name in names]
    version = f"--python-version {sys.version_info.major}.{sys.version_info.minor} --implementation cp"
    return f"pip download --no-deps --only-binary=:all: {version} {platforms} -d wheels/ {' '.join(wheels)}"


def probe(frameworks: list[str]) -> None:
    """Prints the card, the versions that are installed, and what is missing with the command that fetches it."""
    print(f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        print("GPU:", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "none")
    else:
        print("GPU: no nvidia-smi")
    versions = {package.name: package.version for package in importlib.metadata.distributions() if package.name}
    wanted = [DISTRIBUTIONS.get(name, name) for modules in MODULES.values() for name in modules.split()]
    shown = sorted(name for name in versions if name in wanted or name.startswith("jax"))
    print("installed:", ", ".join(f"{name} {versions[name]}" for name in shown))
    for framework in frameworks:
        missing = [name for name in MODULES[framework].split() if importlib.util.find_spec(name) is None]
        if missing:
            print(f"missing for {TITLES[framework]}: {', '.join(missing)}. On a machine with a network, run\n")
            print(f"    {download_command(missing)}\n\nand bring the wheels: --wheels wheels/")
    print(flush=True)


def unpack(wheels: Path, directory: str) -> None:
    """Unpacks every wheel and makes its packages importable."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        print(f"from {wheels}: {wheel.name}")
    sys.path.insert(0, directory)


def run_part(part: str, seconds: float, packages: str) -> Iterator[Row]:
    """Measures one framework in a process of its own, which is ended after `seconds`; yields its rows as they come."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    paths = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                if line.startswith("{") and line.endswith("}\n"):
                    yield json.loads(line)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
        took = time.perf_counter() - began
        if status:
            errors.seek(0)
            trace = errors.read().strip()[-2000:]
            print(trace)
            ended = f"exit status {status}: {trace.splitlines()[-1] if trace else ''}"
            reason = f"stopped after {took:.0f} s" if took >= seconds else ended
            yield {"part": part, "kind": "failed", "name": "process", "error": reason}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers have three significant digits, and a dash stands for what was not measured."""

    def text(cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"
        return "-" if cell is None else cell

    return "\n".join(f"| {' | '.join(map(text, cells))} |" for cells in [header, ["---"] * len(header), *rows])


def report(rows: list[Row], work: Workload) -> Iterator[str]:
    """The tables, and what went wrong."""
    measured = collections.defaultdict(dict, {(row["kind"], row.get("name"), row["part"]): row for row in rows})

    def values(kind: str, name: str, field: str = "seconds", scale: float = 1.0) -> list[Any]:
        fields = [measured[kind, name, part].get(field) for part in TITLES]
        return [value * scale if isinstance(value, float) else value for value in fields]

    def ratio(value: float | None, by: float | None) -> float | None:
        return value / by if value and by else None

    titles = list(TITLES.values())
    units = {"matrix product": (1e-12, "TFLOP/s in bfloat16"), "copy": (1e-9, "GB/s read and written")}
    ceilings = [[f"{name}, {unit}", *values("ceiling", name, "rate", scale)] for name, (scale, unit) in units.items()]
    yield table(["ceiling", *titles], ceilings)
    steps = dict.fromkeys(row["name"] for row in rows if row["kind"] == "once")
    yield table(["once, seconds", *titles], [[name, *values("once", name)] for name in steps])

    best = [max((rate for rate in values("ceiling", name, "rate") if rate), default=None) for name in units]
    parts: list[list[Any]] = []
    for name, amounts in count_work(work).items():
        cells: list[Any] = [name, amounts[0] / 1e12, amounts[1] / 1e9]
        ours, theirs = times = values("steady", name)
        for seconds in times:
            shares = [ratio(ratio(amount, rate), seconds) for amount, rate in zip(amounts, best, strict=True)]
            cells += [seconds and 1e3 * seconds, *(share and f"{100 * share:.1f} %" for share in shares)]
        parts.append([*cells, ratio(theirs, ours)])
    columns = [f"{title}, {column}" for title in titles for column in ("ms", "of matrix product", "of copy")]
    yield table(["part", "TFLOP", "GB", *columns, "times as fast"], parts)

    speeds: list[list[Any]] = []
    baseline = measured["speed", "autoregressive", "torch"].get("rtfx")
    for name in ("autoregressive", "verified drafts"):
        rtfx, texts = values("speed", name, "rtfx"), values("speed", name, "text")
        details = "; ".join(f"{title}: {text}" for title, text in zip(titles, texts, strict=True) if text)
        speeds.append([name, *rtfx, ratio(rtfx[0], baseline), details])
    yield table(["RTFx", *titles, "times transformers' autoregressive", "what ran"], speeds)

    notes = [row | {"error": f"FAILED, {row['name']}: {row['error']}"} for row in rows if row["kind"] == "failed"]
    notes = [row for row in rows if row["kind"] == "about"] + notes
    yield "\n".join(f"- {TITLES[row['part']]}: {row.get('text') or row['error']}" for row in notes)
    missing = {name for row in notes for name in re.findall(r"No module named '(\w+)", row.get("error", ""))}
    if missing:
        yield f"Missing: {', '.join(sorted(missing))}. {download_command(sorted(missing))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="utterances that are transcribed together (default 64, small 2)")
    parser.add_argument("--seconds", type=float, help="length of each utterance (default 20, small 2)")
    parser.add_argument("--small", action="store_true", help="run a tiny model, on a CPU if there is no GPU")
    parser.add_argument("--frameworks", nargs="+", choices=TITLES, default=list(TITLES), help="what to measure")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="directory of carried wheels")
    parser.add_argument("--probe", action="store_true", help="only print what is installed and what is missing")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which measuring stops")
    parser.add_argument("--part", choices=TITLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    began, batch, seconds = time.perf_counter(), *((2, 2.0) if options.small else (64, 20.0))
    file = ROOT / "granite_jax/models/granite_speech/config.json"
    config = json.loads(file.read_text())
    for key, value in SMALL.items() if options.small else ():
        config[key] = config[key] | value if isinstance(value, dict) else value
    work = Workload(config, options.batch or batch, options.seconds or seconds, options.small)
    if options.part:
        run = {"jax": run_jax, "torch": run_torch}[options.part]
        run(work, Bench(options.part, work))
        return

    print(f"{datetime.datetime.now(datetime.UTC).date()}: python {shlex.join(sys.argv)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as packages:
        unpack(options.wheels, packages)
        probe(options.frameworks)
        if options.probe:
            return
        for index, part in enumerate(options.frameworks, 1):
            left = options.limit - (time.perf_counter() - began)
            # The first of two leaves some time to the second.
            rows += run_part(part, left if index == len(options.frameworks) else 0.65 * left, packages)
    for text in report(rows, work):
        print(f"\n{text}")
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    sys.exit(any((row["part"], row["kind"]) == ("jax", "failed") for row in rows))


if __name__ == "__main__":
    main()
