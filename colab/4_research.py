# %% [markdown]
# # Research: hidden states, gradients, fine-tuning, export
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/granite_jax/blob/main/colab/4_research.ipynb)
#
# The model is pure functions of `(config, params, inputs)`, and `params` a nested dictionary of arrays: everything that
# JAX does to functions and trees applies.

# %% tags=["install"]
# !git clone --quiet --depth 1 https://github.com/OWNER/granite_jax granite-jax; sh granite-jax/colab/install.sh

# %%
# %matplotlib inline
import json
import platform
import tempfile
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from matplotlib.figure import Figure

import granite_jax as gj
from granite_jax import convert, plotting, pretrained
from granite_jax.models.layers import ctc
from granite_jax.recognition.words import locate_words
from granite_jax.training.steps import ctc_loss

ROOT = next(path for path in map(Path, ("granite-jax", ".", "..")) if (path / "samples").is_dir())
print(
    "Python", platform.python_version(), "granite_jax", gj.__version__, "jax", jax.__version__, "flax", flax.__version__
)
print(f"optax {optax.__version__}; devices:", jax.devices())

# %%
CHECKPOINT = "demo"
config, params = gj.load(CHECKPOINT, dtype="float32")
sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
print(", ".join(f"{part}: {size:,} parameters" for part, size in sizes.items()))

# %% [markdown]
# ## Hidden states
#
# `capture_layers=True` returns the activations after each block: `[layers, b, t, d]`. Reading all of them by the CTC
# head shows where in the encoder the text appears.

# %%
waveform, _ = soundfile.read(ROOT / "samples" / "one-name.wav", dtype="float32")
lengths = jnp.array([len(waveform)])
features, frames = gj.log_mel(jnp.asarray(waveform)[None], lengths), gj.num_frames(lengths)
encoded = gj.encode(config, params, features, frames, capture_layers=True)
print("activations:", encoded.layers.shape)
readings = []
for number, hidden in enumerate(encoded.layers):
    labels = ctc.best_labels(gj.ctc_logits(config, params, hidden), frames)
    readings.append(ctc.to_text(np.asarray(labels)[0]))
    print(f"after block {number}: {readings[-1]!r}")

# %% [markdown]
# ## Gradients
#
# What the model listens to when it hears a word: the gradient of the word's CTC score with respect to the features.

# %%
logits = gj.ctc_logits(config, params, encoded.hidden)
best = ctc.best_labels(logits, frames)[0]
word = max(locate_words(np.asarray(logits[0]), readings[-1]), key=lambda each: each.end - each.start)
inside = slice(round(word.start / ctc.FRAME_SECONDS), round(word.end / ctc.FRAME_SECONDS))


@jax.jit
def score(features):
    """Log-likelihood of the labels that were heard while the word was spoken."""
    hidden = gj.encode(config, params, features, frames).hidden
    likelihoods = jax.nn.log_softmax(gj.ctc_logits(config, params, hidden)[0])
    return jnp.take_along_axis(likelihoods, best[:, None], axis=1)[inside].sum()


saliency = np.abs(jax.grad(score)(features)[0])
share = saliency[inside].sum() / saliency.sum()
print(f"{word.text!r}, {word.start:.2f} to {word.end:.2f} s, holds {share:.0%} of the gradient")
figure = Figure(figsize=(10, 5), layout="constrained")
above, below = figure.subplots(2, 1, sharex=True)
plotting.log_mel(features[0], ax=above)
plotting.mel_map(saliency, "|gradient|\n(nats per feature unit)", colors="viridis", ax=below)
for ax in (above, below):
    ax.axvspan(word.start, word.end, fill=False, edgecolor="white", linestyle="--")
above.set(title=f"what is heard as {word.text!r}", xlabel="")
figure

# %% [markdown]
# ## A few steps of fine-tuning
#
# On three recordings, by the CTC loss of the encoder's recipe, with optax. Three utterances are learnt by heart, of
# course: this shows the mechanics. `granite_jax.training` is the whole recipe, of both stages.

# %%
RECORDINGS = ["one-name", "two-names", "noisy"]
STEPS = 8
listed = (ROOT / "samples" / "samples.jsonl").read_text().splitlines()
said = {each["audio"]: each["text"] for each in map(json.loads, listed)}
audio = [soundfile.read(ROOT / "samples" / f"{name}.wav", dtype="float32")[0] for name in RECORDINGS]
samples = jnp.array([np.pad(each, (0, max(map(len, audio)) - len(each))) for each in audio])
lengths = jnp.array([len(each) for each in audio])
spelled = [ctc.to_labels(said[f"{name}.wav"]) for name in RECORDINGS]
label_lengths = jnp.array([len(each) for each in spelled])
labels = jnp.array([np.pad(each, (0, max(map(len, spelled)) - len(each))) for each in spelled])

inputs = gj.log_mel(samples, lengths), gj.num_frames(lengths), labels, label_lengths
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))


@jax.jit
def step(encoder, state, *inputs):
    """One step; BatchNorm keeps its running statistics, which are no parameters."""

    def loss_of(encoder):
        return ctc_loss(config, {"encoder": encoder}, *inputs)[0]

    loss, gradients = jax.value_and_grad(loss_of)(encoder)
    updates, state = optimizer.update(gradients, state, encoder)
    return optax.apply_updates(encoder, updates), state, loss


encoder, state, losses = params["encoder"], optimizer.init(params["encoder"]), []
for _ in range(STEPS):
    encoder, state, loss = step(encoder, state, *inputs)
    losses.append(float(loss))
tuned = {**params, "encoder": encoder}
print(f"loss: {losses[0]:.4f} nats a label before, {losses[-1]:.4f} after {STEPS} steps")

figure = Figure(figsize=(6, 3), layout="constrained")
ax = figure.subplots()
ax.plot(range(1, STEPS + 1), losses, marker="o", color=plotting.BLUE)
ax.set(xlabel="step", ylabel="CTC loss (nats a label)", ylim=(0, None))
figure

# %% [markdown]
# ## Save with Orbax, and open again
#
# A checkpoint is a directory: Orbax arrays with a hash for each, the configuration, tokenizer and chat template.

# %%
work = Path(tempfile.mkdtemp())
source = pretrained.open_checkpoint(CHECKPOINT).directory
pretrained.save(
    work / "tuned",
    source / "config.json",
    tuned,
    tokenizer_file=source / "tokenizer.json",
    chat_template=(source / "chat_template.jinja").read_text(),
)
_, restored = gj.load(work / "tuned", dtype="float32")
same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tuned, restored))
print("restored as it was saved, to the bit:", same)
asr = gj.Transcriber.from_pretrained(work / "tuned", dtype="float32")
transcripts = asr.transcribe(audio)
for name, each in zip(RECORDINGS, transcripts, strict=True):
    print(f"said           {said[f'{name}.wav']}\nencoder, tuned {each.ctc_text}\nlanguage model {each.text}\n")

# %% [markdown]
# ## Export to Hugging Face
#
# The same weights under the names and in the layout that `transformers` reads
# (`GraniteSpeechForConditionalGeneration.from_pretrained`). This package opens such a directory as it is, too.

# %%
report = convert.convert(work / "tuned", work / "hf", verify=True)
print(f"{report.tensors} tensors, {report.bytes / 1e6:.0f} MB, {report.dtype}")
print(*sorted(file.name for file in (work / "hf").iterdir()))
exported = gj.Transcriber.from_pretrained(work / "hf", dtype="float32").transcribe(audio)
print("the same tokens:", [each.tokens for each in exported] == [each.tokens for each in transcripts])
