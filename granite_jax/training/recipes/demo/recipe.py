"""The recipe of `checkpoints/demo`: a small Granite Speech model trained on synthetic speech.

    make demo-checkpoint      # or: python -m granite_jax.training.recipes.demo.recipe all WORK

Training continues from the parameters of a checkpoint of this architecture, by default the embedded one. Each step can
be run separately and continues where it was interrupted:

    data       synthesize training, tuning and test speech      (granite_jax.training.recipes.demo.synthesis)
    encoder    train the encoder by CTC
    decoder    train projector and decoder on the frozen encoder
    export     write the checkpoint in bfloat16
    bpe-head   train a BPE head on the frozen encoder of a checkpoint, for tests
    evaluate   word error rates on the tuning or the test utterances

Choose by the tuning utterances; the test utterances are for reports. Work files stay in WORK; the checkpoint is written
to WORK/demo and belongs in `checkpoints/demo`.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from orbax.checkpoint import v1 as ocp

from granite_jax import pretrained
from granite_jax.convert.safetensors_file import make_header
from granite_jax.evaluation.metrics import score
from granite_jax.models import granite_speech
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers import ctc
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.results import disagreement
from granite_jax.text.tasks import ChatTemplate, instruction
from granite_jax.training import batches
from granite_jax.training.corpus import Corpus
from granite_jax.training.recipes.demo import sets, synthesis
from granite_jax.training.steps import TrainState, bpe_step, ctc_step, lm_step, make_optimizer
from granite_jax.transcriber import Transcriber

SEED = 20261
SPECIALS = ("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>")
TRAIN_UTTERANCES = 40_000
ENCODER_STEPS, ENCODER_FRAMES, ENCODER_PEAK = 10_000, 2_000, 8e-4  # frames of a batch; peak of the learning rate
DECODER_STEPS, DECODER_FRAMES, DECODER_PEAK = 14_000, 2_000, 8e-4
JOINED_SHARE = 0.2  # of the decoder's batches have rows of several utterances, joined in the encoder's activations
CORRUPTED_SHARE, CORRUPTION = 0.5, 0.15  # of the rows have a history with wrong tokens; at most this share of it
BPE_STEPS, BPE_FRAMES, BPE_PEAK = 1_500, 4_000, 5e-3
WARMUP = 150
SAVE_EVERY = 250

ENCODER = {
    "input_dim": 160, "num_layers": 4, "hidden_dim": 128, "feedforward_mult": 4, "num_heads": 4, "dim_head": 32,
    "output_dim": 348, "context_size": 100, "max_pos_emb": 128, "conv_kernel_size": 15, "conv_expansion_factor": 2,
}  # fmt: skip
PROJECTOR = {
    "model_type": "blip_2_qformer", "hidden_size": 128, "encoder_hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 512, "cross_attention_frequency": 1,
    "num_queries": 3, "vocab_size": 0,
}  # fmt: skip
DECODER = {
    "model_type": "granite", "vocab_size": 768, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 768,
    "rms_norm_eps": 1e-5, "embedding_multiplier": 12.0, "attention_multiplier": 0.125, "residual_multiplier": 0.5,
    "logits_scaling": 4.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIG = {
    "model_type": "granite_speech", "architectures": ["GraniteSpeechForConditionalGeneration"],
    "audio_token_index": SPECIALS.index("<|audio|>"), "downsample_rate": 5, "window_size": 15,
    "has_lora_adapter": False, "tie_word_embeddings": False, "dtype": "bfloat16", "initializer_range": 0.02,
    "encoder_config": {"model_type": "granite_speech_encoder"} | ENCODER,
    "projector_config": PROJECTOR, "text_config": DECODER,
    "granite_jax": {
        "tasks": ["transcribe"],
        "languages": ["en"],
        "speech_languages": ["en"],
        "segment_seconds": 7.0,  # chosen on the tuning set: benchmarks/long_recordings.py --segment-seconds 5 7 10 ...
        "word_offsets": [-0.125, -0.08],  # of this encoder: benchmarks/word_times.py --fit
    },
}  # fmt: skip

# Granite Speech 4.0's turn format.
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + message['content'] + '\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ASSISTANT:' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ' ASSISTANT:' -}}
{%- endif -%}
"""


app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Argument(help="directory of the work files")]
Start = Annotated[str, typer.Option(help="checkpoint whose parameters training continues from")]


@app.command()
def data(work: Work) -> None:
    """Synthesize training, tuning and test speech."""
    if not (work / "train" / "recipe.json").exists():
        synthesis.generate(work / "train", "train", TRAIN_UTTERANCES, seed=1)
    for name, utterances in sets.SETS.items():
        if not (work / name / "index.jsonl").exists():
            synthesis.write_corpus(utterances(), work / name)


def train(
    work: Path, name: str, step: Callable, state: TrainState, items: Iterator, inputs: Callable, steps: int
) -> Any:
    """Runs an optimizer to its last step and returns the parameters.

    Args:
      name: the stage. Its state is saved to WORK/name every `SAVE_EVERY` steps, and training continues from it.
      step: (state, *inputs) -> (state, loss).
      items: one for each step, in order; `inputs(index, item)` makes the inputs of a step.
    """
    start, leaves, tree = 0, *jax.tree.flatten(state)
    if (work / name).exists():
        start, leaves = _restore(work / name, (0, leaves))
        state = jax.tree.unflatten(tree, leaves)
    log = Log(work / f"{name}.log", steps)
    for index, item in zip(range(start, steps), itertools.islice(items, start, None), strict=False):
        state, loss = step(state, *inputs(index, item))
        log(index, loss)
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            _save(work / name, (index + 1, jax.tree.leaves(state)))
    return state.params


def _save(path: Path, tree: Any) -> None:
    ocp.save(str(path.resolve()), jax.tree.map(jnp.asarray, tree), overwrite=True)


def _restore(path: Path, like: Any) -> Any:
    """What `_save` wrote, with the shapes and dtypes of `like`."""
    return ocp.load(str(path.resolve()), jax.tree.map(jnp.asarray, like))


@app.command()
def encoder(work: Work, start: Start = "demo") -> None:
    """Stage 1: the encoder by CTC."""
    config, loaded = pretrained.load(start, dtype="float32")
    corpus = Corpus.open(work / "train")
    buckets = batches.make_buckets(corpus.lengths, ENCODER_FRAMES)
    optimizer = make_optimizer(ENCODER_PEAK, ENCODER_STEPS, WARMUP)
    params = {"encoder": loaded["encoder"]}

    def inputs(index: int, item: tuple[batches.Bucket, np.ndarray]) -> tuple:
        bucket, rows = item
        labels = [ctc.to_labels(corpus[int(row)].text) for row in rows]
        padded, label_lengths = batches.pad_ids(labels, bucket.frames // 2)
        samples, lengths = batches.waveforms(corpus, rows, bucket.samples)
        return jax.random.key(SEED + index), samples, lengths, padded, label_lengths

    state = TrainState(params, optimizer.init(params))
    shuffled = batches.forever(buckets, SEED)
    params = train(work, "encoder", ctc_step(config, optimizer, augment=False), state, shuffled, inputs, ENCODER_STEPS)
    _save(work / "encoder-params", params)


def encode_corpus(config: Config, params: Any, corpus: Corpus, work: Path) -> np.ndarray:
    """Encoder activations of every utterance, one after another, float16 `[frames, d]` in a memory-mapped file."""
    starts = frame_starts(corpus)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
    path = work / f"hidden-{digest[:12]}.f16"
    marker = path.with_suffix(".done")
    shape = (int(starts[-1]), config.encoder.hidden_dim)
    if marker.exists():
        return np.memmap(path, np.float16, "r", shape=shape)
    encode = jax.jit(
        lambda x, n: granite_speech.encode(config, params, log_mel(x, n), num_frames(n)).hidden.astype(jnp.float16)
    )
    hidden = np.memmap(path, np.float16, "w+", shape=shape)
    for bucket in batches.make_buckets(corpus.lengths, ENCODER_FRAMES):
        size = bucket.batch_size
        for i in range(0, len(bucket.indices), size):
            rows = np.resize(bucket.indices[i : i + size], size)  # a short last batch repeats its rows
            encoded = np.asarray(encode(*batches.waveforms(corpus, rows, bucket.samples)))
            for row, activations in zip(rows, encoded, strict=True):
                hidden[starts[row] : starts[row + 1]] = activations[: starts[row + 1] - starts[row]]
    marker.touch()
    return hidden


def frame_starts(corpus: Corpus) -> np.ndarray:
    """First frame of every utterance among the corpus's encoder frames, and the total: int64 `[len + 1]`."""
    return np.concatenate([[0], np.cumsum(num_frames(corpus.lengths))])


@app.command()
def decoder(work: Work, start: Start = "demo") -> None:
    """Stage 2: projector and decoder on the frozen encoder."""
    config, loaded = pretrained.load(start, dtype="float32")
    corpus = Corpus.open(work / "train")
    tokenizer = pretrained.open_checkpoint(start).tokenizer()
    frozen = _restore(work / "encoder-params", {"encoder": loaded["encoder"]})
    hidden, starts = encode_corpus(config, frozen, corpus, work), frame_starts(corpus)
    buckets = batches.make_buckets(corpus.lengths, DECODER_FRAMES)
    optimizer = make_optimizer(DECODER_PEAK, DECODER_STEPS, WARMUP)
    params = {name: loaded[name] for name in ("projector", "decoder")}
    params["alignment"] = jnp.zeros((config.decoder.hidden_size, config.decoder.vocab_size))  # for the loss only
    prompt = ChatTemplate(None).tokens(tokenizer, instruction("transcribe"))

    def inputs(index: int, item: tuple[batches.Bucket, list[list[int]]]) -> tuple:
        bucket, rows = item
        activations = np.zeros((len(rows), bucket.frames, hidden.shape[1]), np.float32)
        frames = np.zeros(len(rows), np.int32)
        for i, row in enumerate(rows):
            joined = np.concatenate([hidden[starts[j] : starts[j + 1]] for j in row])
            frames[i] = len(joined)
            activations[i, : len(joined)] = joined
        prompts = [
            [*prompt.prefix, *[config.audio_token_id] * int(config.num_audio_tokens(int(n))), *prompt.suffix]
            for n in frames
        ]
        texts = [" ".join(corpus[j].text for j in row if corpus[j].text) for row in rows]
        answers = [[*tokenizer.encode(text), config.decoder.eos_token_id] for text in texts]
        # Fits the prompt, an audio embedding per five frames, and 0.25 tokens a frame.
        width = 24 + bucket.frames * 9 // 20
        tokens, lengths = batches.pad_ids([(p + a)[:width] for p, a in zip(prompts, answers, strict=True)], width)
        prompt_lengths = np.array([len(p) for p in prompts], np.int32)
        rng = np.random.default_rng([SEED, index])
        words = range(len(SPECIALS), config.decoder.vocab_size)
        history = batches.corrupt(rng, tokens, prompt_lengths, CORRUPTED_SHARE, CORRUPTION, words)
        return activations, frames, history, tokens, prompt_lengths, lengths

    state = TrainState(params, optimizer.init(params))
    shuffled = batches.joining(buckets, np.diff(starts), JOINED_SHARE, SEED)
    params = train(work, "decoder", lm_step(config, optimizer), state, shuffled, inputs, DECODER_STEPS)
    params.pop("alignment")
    _save(work / "decoder-params", params)


@app.command()
def export(work: Work, start: Start = "demo") -> None:
    """Write the checkpoint: bfloat16 parameters, the recipe's config and chat template, and the start's tokenizer."""
    checkpoint = pretrained.open_checkpoint(start)
    like = checkpoint.load_params("float32")
    parts = {"encoder-params": ("encoder",), "decoder-params": ("projector", "decoder")}
    params = {}
    for name, keys in parts.items():
        params |= _restore(work / name, {key: like[key] for key in keys})
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    tokenizer_file = checkpoint.directory / "tokenizer.json"
    pretrained.save(work / "demo", CONFIG, params, tokenizer_file=tokenizer_file, chat_template=CHAT_TEMPLATE)


@app.command()
def bpe_head(work: Work, start: Start = "demo") -> None:
    """Train a BPE head on the frozen encoder, and write it to WORK/out_llm.safetensors in bfloat16."""
    loaded_config, loaded = pretrained.load(start, dtype="float32")
    tokenizer, corpus = pretrained.open_checkpoint(start).tokenizer(), Corpus.open(work / "train")
    labels_of_head = loaded_config.decoder.vocab_size + 1
    encoder_config = dataclasses.replace(loaded_config.encoder, bpe_output_dim=labels_of_head)
    config = dataclasses.replace(loaded_config, encoder=encoder_config)
    buckets = batches.make_buckets(corpus.lengths, BPE_FRAMES)
    optimizer = make_optimizer(BPE_PEAK, BPE_STEPS, WARMUP)
    head = {"kernel": jnp.zeros((encoder_config.hidden_dim, labels_of_head)), "bias": jnp.zeros(labels_of_head)}

    def inputs(index: int, item: tuple[batches.Bucket, np.ndarray]) -> tuple:
        bucket, rows = item
        labels = [[token + 1 for token in tokenizer.encode(corpus[int(row)].text)] for row in rows]
        padded, label_lengths = batches.pad_ids([ids[: bucket.frames // 4] for ids in labels], bucket.frames // 4)
        return *batches.waveforms(corpus, rows, bucket.samples), padded, label_lengths

    state = TrainState({"out_bpe": head}, optimizer.init({"out_bpe": head}))
    step = bpe_step(config, optimizer, loaded["encoder"])
    params = train(work, "bpe-head", step, state, batches.forever(buckets, SEED), inputs, BPE_STEPS)
    trained = params["out_bpe"]
    tensors = {"weight": np.asarray(trained["kernel"]).T, "bias": np.asarray(trained["bias"])}
    with open(work / "out_llm.safetensors", "wb") as file:
        bfloat16 = {name: np.ascontiguousarray(x.astype(jnp.bfloat16)) for name, x in tensors.items()}
        file.write(make_header((name, x.dtype, x.shape) for name, x in bfloat16.items()))
        file.writelines(x.tobytes() for x in bfloat16.values())


@app.command()
def evaluate(
    work: Work,
    name: Annotated[str, typer.Option("--set", help="one of the sets in WORK, or people")] = "test",
    checkpoint: Annotated[str, typer.Option(help="default: the exported one")] = "",
) -> None:
    """Word error rates on a set as a Markdown table, and how far the language model and the encoder agree."""
    asr = Transcriber.from_pretrained(checkpoint or work / "demo", dtype="float32")
    groups: dict[str, list[sets.Spoken]] = collections.defaultdict(list)
    for utterance in sets.people() if name == "people" else sets.spoken(Corpus.open(work / name)):
        groups[utterance.group].append(utterance)
    print("| speech | decoding | all words | invented names | other words | differ | flagged |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for group, items in groups.items():
        transcripts = asr.transcribe([item.samples for item in items])
        differ = np.mean([disagreement(transcript.text, transcript.ctc_text) for transcript in transcripts])
        flagged = sum("low-agreement" in transcript.flags for transcript in transcripts)
        for decoding in ("text", "ctc_text"):
            texts = [getattr(transcript, decoding) for transcript in transcripts]
            scored = [(item.text, item.names, text) for item, text in zip(items, texts, strict=True) if item.text]
            if scored:
                references, names, texts = zip(*scored, strict=True)
                rates = score(references, texts, names)
                scores = f"{rates.wer} | {rates.b_wer} | {rates.u_wer}"
            else:
                scores = f"{sum(map(bool, texts))} of {len(texts)} have text | |"
            label = {"text": "language model, greedy", "ctc_text": "encoder, greedy CTC"}[decoding]
            print(f"| {group} | {label} | {scores} | {100 * differ:.1f} % | {flagged} of {len(items)} |")


@app.command("all")
def run_all(work: Work, start: Start = "demo") -> None:
    """Run all steps, one after another."""
    data(work)
    encoder(work, start)
    decoder(work, start)
    export(work, start)
    for name in ("tune", "test", "test-voice", "people"):
        evaluate(work, name)


class Log:
    """Appends step, loss and seconds to a file, every 50 steps."""

    def __init__(self, path: Path, steps: int):
        self._path, self._steps, self._start = path, steps, time.monotonic()
        self._losses: list[jax.Array] = []

    def __call__(self, index: int, loss: jax.Array) -> None:
        self._losses.append(loss)
        if (index + 1) % 50 == 0 or index + 1 == self._steps:
            mean = float(np.mean([float(x) for x in self._losses]))
            entry = {"step": index + 1, "loss": round(mean, 4), "seconds": round(time.monotonic() - self._start)}
            with self._path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            self._losses.clear()


if __name__ == "__main__":
    app()
