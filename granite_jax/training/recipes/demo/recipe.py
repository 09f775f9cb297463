"""The recipe of `checkpoints/demo`: a small Granite Speech model trained on synthetic speech.

    make demo-checkpoint      # or: python -m granite_jax.training.recipes.demo.recipe all WORK

runs, each step resumable by itself:

    data       speak 40,000 training and 1,200 held-out utterances   (granite_jax.training.recipes.demo.synthesis)
    encoder    train the encoder by CTC
    decoder    train projector and decoder on the frozen encoder
    export     write the checkpoint in bfloat16
    evaluate   word error rates on the held-out utterances

Work files stay in WORK; the checkpoint is written to WORK/demo, for `checkpoints/demo`.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from orbax.checkpoint import v1 as ocp
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from granite_jax import pretrained
from granite_jax.inference.transcriber import Transcriber
from granite_jax.model import ctc, granite_speech
from granite_jax.model.config import Config
from granite_jax.model.features import log_mel, num_frames
from granite_jax.text.tasks import ChatTemplate, instruction
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.training import batches
from granite_jax.training.corpus import Corpus
from granite_jax.training.recipes.demo import synthesis
from granite_jax.training.steps import TrainState, ctc_step, lm_step, make_optimizer

SEED = 20260
VOCABULARY = 768
SPECIALS = ("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>")
TRAIN_UTTERANCES, HELDOUT_UTTERANCES = 40_000, 1_200
ENCODER_STEPS, ENCODER_FRAMES = 3_200, 3_000  # frames of a batch
ENCODER_PEAK = 2e-3  # of the learning rate
WARMUP = 300
SAVE_EVERY = 500

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
    "model_type": "granite", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512,
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
    "granite_jax": {"tasks": ["transcribe"], "languages": ["en"]},
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


@dataclasses.dataclass(frozen=True)
class Round:
    """A run of the decoder's optimizer.

    Fields:
      steps, frames: of the run, of a batch.
      peak: of the learning rate.
      joined: share of the batches whose rows are several utterances, joined in the encoder's activations.
    """

    steps: int
    frames: int
    peak: float
    joined: float


# The first discovers that the audio says what to write. The second takes smaller batches, hence more steps in the same
# time. What was then still wrong was mostly in long audio, of which later ones see more.
DECODER_ROUNDS = (
    Round(2_800, 4_000, 1e-3, 0.0),
    Round(12_000, 2_000, 1e-3, 0.0),
    Round(9_000, 2_000, 7e-4, 0.5),
    Round(10_000, 2_000, 7e-4, 0.7),
    Round(6_000, 2_000, 5e-4, 0.8),
)

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Argument(help="directory of the work files")]


def train_tokenizer(texts: list[str]) -> BaseTokenizer:
    """A byte-level BPE over transcripts and prompt, with Granite's special tokens first."""
    tokenizer = BaseTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompt = f"USER: {instruction('transcribe')}\n ASSISTANT:"
    tokenizer.train_from_iterator([*texts, *[prompt] * (len(texts) // 10)], trainer)
    return tokenizer


@app.command()
def data(work: Work) -> None:
    """Synthesise training and held-out speech, and train the tokenizer."""
    synthesis.generate(work / "train", "train", TRAIN_UTTERANCES, seed=1)
    synthesis.generate(work / "heldout", "heldout", HELDOUT_UTTERANCES, seed=2)
    corpus = Corpus.open(work / "train")
    train_tokenizer([corpus[i].text for i in range(len(corpus))]).save(str(work / "tokenizer.json"))


@app.command()
def encoder(work: Work) -> None:
    """Stage 1: the encoder by CTC."""
    config, corpus = Config.from_dict(CONFIG), Corpus.open(work / "train")
    buckets = batches.make_buckets(corpus.lengths, ENCODER_FRAMES)
    steps = ENCODER_STEPS
    optimizer = make_optimizer(ENCODER_PEAK, steps, WARMUP)
    params = {"encoder": granite_speech.init(config, jax.random.key(SEED))["encoder"]}
    step, state = ctc_step(config, optimizer), TrainState(params, optimizer.init(params))
    log = Log(work / "encoder.log", steps)
    for index, (bucket, rows) in zip(range(steps), batches.forever(buckets, SEED), strict=False):
        samples, lengths = batches.waveforms(corpus, rows, bucket.samples)
        labels = [ctc.to_labels(corpus[int(row)].text) for row in rows]
        padded, label_lengths = batches.pad_ids(labels, bucket.frames // 2)
        state, loss = step(state, jax.random.key(SEED + index), samples, lengths, padded, label_lengths)
        log(index, loss)
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            ocp.save(str((work / "encoder").resolve()), state.params, overwrite=True)


def encode_corpus(config: Config, params: Any, corpus: Corpus, path: Path) -> np.ndarray:
    """Encoder activations of every utterance, one after another, float16 `[frames, d]` in a memory-mapped file."""
    starts = frame_starts(corpus)
    done = path.with_suffix(".done")
    shape = (int(starts[-1]), config.encoder.hidden_dim)
    if done.exists():
        return np.memmap(path, np.float16, "r", shape=shape)
    run = jax.jit(
        lambda x, n: granite_speech.encode(config, params, log_mel(x, n), num_frames(n)).hidden.astype(jnp.float16)
    )
    hidden = np.memmap(path, np.float16, "w+", shape=shape)
    for bucket in batches.make_buckets(corpus.lengths, ENCODER_FRAMES):
        size = bucket.batch_size
        for i in range(0, len(bucket.indices), size):
            rows = np.resize(bucket.indices[i : i + size], size)  # a short last batch repeats its rows
            encoded = np.asarray(run(*batches.waveforms(corpus, rows, bucket.samples)))
            for row, activations in zip(rows, encoded, strict=True):
                hidden[starts[row] : starts[row + 1]] = activations[: starts[row + 1] - starts[row]]
    done.touch()
    return hidden


def frame_starts(corpus: Corpus) -> np.ndarray:
    """First frame of every utterance among the corpus's encoder frames, and the total: int64 `[len + 1]`."""
    return np.concatenate([[0], np.cumsum(num_frames(corpus.lengths))])


@app.command()
def decoder(work: Work) -> None:
    """Stage 2: projector and decoder on the frozen encoder; each round starts from the parameters of the one before."""
    config = Config.from_dict(CONFIG)
    params = {
        name: part for name, part in granite_speech.init(config, jax.random.key(SEED)).items() if name != "encoder"
    }
    params["alignment"] = jnp.zeros((config.decoder.hidden_size, config.decoder.vocab_size))  # of the loss alone
    for number, settings in enumerate(DECODER_ROUNDS, 1):
        finished = work / f"decoder-{number}"
        if not finished.exists():
            params = decoder_round(work, config, params, settings, seed=SEED + number - 1)
            ocp.save(str(finished.resolve()), params)
        params = ocp.load(str(finished.resolve()))


def decoder_round(work: Path, config: Config, params: Any, settings: Round, seed: int) -> Any:
    """The parameters after one round from `params`; saves the latest to WORK/decoder now and then."""
    corpus = Corpus.open(work / "train")
    tokenizer = Tokenizer.from_file(work / "tokenizer.json")
    frozen = {"encoder": ocp.load(str((work / "encoder").resolve()))["encoder"]}
    hidden, starts = encode_corpus(config, frozen, corpus, work / "hidden.f16"), frame_starts(corpus)
    buckets = batches.make_buckets(corpus.lengths, settings.frames)
    optimizer = make_optimizer(settings.peak, settings.steps, WARMUP)
    step, state = lm_step(config, optimizer), TrainState(params, optimizer.init(params))
    prompt = ChatTemplate(None).tokens(tokenizer, instruction("transcribe"))
    log = Log(work / "decoder.log", settings.steps)
    shuffled = batches.joining(buckets, np.diff(starts), settings.joined, seed)
    for index, (bucket, rows) in zip(range(settings.steps), shuffled, strict=False):
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
        texts = [" ".join(corpus[j].text for j in row) for row in rows]
        answers = [[*tokenizer.encode(text), config.decoder.eos_token_id] for text in texts]
        # About 0.2 tokens and 0.2 audio embeddings a frame at most, and the prompt.
        width = 24 + bucket.frames * 2 // 5
        tokens, lengths = batches.pad_ids([p + a for p, a in zip(prompts, answers, strict=True)], width)
        prompt_lengths = np.array([len(p) for p in prompts], np.int32)
        state, loss = step(state, activations, frames, tokens, prompt_lengths, lengths)
        log(index, loss)
        if (index + 1) % SAVE_EVERY == 0:
            ocp.save(str((work / "decoder").resolve()), state.params, overwrite=True)
    return state.params


@app.command()
def export(work: Work) -> None:
    """Write the checkpoint: bfloat16 parameters, config, tokenizer and chat template."""
    finished = work / f"decoder-{len(DECODER_ROUNDS)}"
    params = ocp.load(str((work / "encoder").resolve())) | ocp.load(str(finished.resolve()))
    params.pop("alignment")
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    pretrained.save(work / "demo", CONFIG, params, tokenizer_file=work / "tokenizer.json", chat_template=CHAT_TEMPLATE)


@app.command()
def evaluate(work: Work) -> None:
    """Word error rates of WORK/demo on the held-out utterances, as a Markdown table."""
    from granite_jax.evaluation.metrics import score

    corpus = Corpus.open(work / "heldout")
    asr = Transcriber.from_pretrained(work / "demo", dtype="float32")
    spoken = [corpus[i] for i in range(len(corpus))]
    transcripts = asr.transcribe([utterance.samples for utterance in spoken])
    references, names = [u.text for u in spoken], [u.names for u in spoken]
    print("| decoding | all words | invented names | other words |\n| --- | --- | --- | --- |")
    for decoding, texts in {
        "language model, greedy": [t.text for t in transcripts],
        "encoder, greedy CTC": [t.ctc_text for t in transcripts],
    }.items():
        rates = score(references, texts, names)
        print(f"| {decoding} | {rates.wer} | {rates.b_wer} | {rates.u_wer} |")


@app.command("all")
def run_all(work: Work) -> None:
    """All steps, one after another."""
    for step in (data, encoder, decoder, export, evaluate):
        step(work)


class Log:
    """Appends step, loss and seconds to a file, every 50 steps."""

    def __init__(self, path: Path, steps: int):
        self._file, self._steps, self._start = path.open("w"), steps, time.monotonic()
        self._losses: list[jax.Array] = []

    def __call__(self, index: int, loss: jax.Array) -> None:
        self._losses.append(loss)
        if (index + 1) % 50 == 0 or index + 1 == self._steps:
            mean = float(np.mean([float(x) for x in self._losses]))
            entry = {"step": index + 1, "loss": round(mean, 4), "seconds": round(time.monotonic() - self._start)}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            self._losses.clear()


if __name__ == "__main__":
    app()
