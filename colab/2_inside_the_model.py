# %% [markdown]
# # Inside the model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/granite_jax/blob/main/colab/2_inside_the_model.ipynb)
#
# What happens between a waveform and its transcript: log-mel features, the posteriors of the encoder's CTC head, when
# each word was spoken, how the language model checks the encoder's draft, and what keywords change.

# %% tags=["install"]
# !git clone --quiet --depth 1 https://github.com/OWNER/granite_jax granite-jax; sh granite-jax/colab/install.sh

# %%
# %matplotlib inline
import platform
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import soundfile

import granite_jax as gj
from granite_jax import plotting
from granite_jax.models.layers import ctc
from granite_jax.recognition.words import locate_words

ROOT = next(path for path in map(Path, ("granite-jax", ".", "..")) if (path / "samples").is_dir())
print(
    "Python", platform.python_version(), "granite_jax", gj.__version__, "jax", jax.__version__, "flax", flax.__version__
)
print("devices:", jax.devices())

# %%
CHECKPOINT = "demo"
config, params = gj.load(CHECKPOINT, dtype="float32")
asr = gj.Transcriber.from_pretrained(CHECKPOINT, dtype="float32")

# %% [markdown]
# ## Log-mel features
#
# 80 mel bands every 10 ms. Two such frames make an encoder frame of 20 ms: `[t, 160]`.

# %%
path = ROOT / "granite_jax" / "evaluation" / "heldout_clips" / "free-132.ogg"
waveform, rate = soundfile.read(path, dtype="float32")
lengths = jnp.array([len(waveform)])
features = gj.log_mel(jnp.asarray(waveform)[None], lengths)
print(f"{len(waveform) / rate:.2f} s at {rate} Hz -> {features.shape}")
plotting.log_mel(features[0])

# %% [markdown]
# ## CTC posteriors
#
# The encoder's own head says for every 20 ms which character is heard, or that none is (blank). Read from left to right
# without blanks and repetitions, the best labels are a first transcript.

# %%
frames = gj.num_frames(lengths)
encoded = gj.encode(config, params, features, frames)
logits = gj.ctc_logits(config, params, encoded.hidden)
labels = np.asarray(ctc.best_labels(logits, frames))[0]
heard = ctc.to_text(labels)
print(heard)
plotting.ctc_posteriors(logits[0])

# %% [markdown]
# Where it is unsure, the distribution's entropy is large. Relaxed decoding believes a draft without asking the language
# model if no frame has more than 0.7 nats.

# %%
entropy = np.asarray(ctc.frame_entropy(logits, frames))[0]
worst = int(entropy.argmax())
print(f"largest entropy: {entropy[worst]:.2f} nats at {worst * ctc.FRAME_SECONDS:.2f} s")

# %% [markdown]
# ## When each word was spoken
#
# The most likely path through the posteriors that spells a text (Viterbi). Any text in known characters can be aligned,
# such as the language model's.

# %%
transcript = asr.transcribe(path)
words = locate_words(np.asarray(logits[0]), transcript.text)
for word in words:
    print(f"{word.start:5.2f} to {word.end:5.2f} s  {word.text}")
plotting.alignment(words)

# %% [markdown]
# ## Draft and text
#
# The encoder's text is the draft of speculative decoding. The language model runs over prompt and draft at once, and
# accepts what it would have written itself. Where it differs, it writes a token of its own, and goes on with windows of
# four draft tokens, each window followed by a token of its own.

# %%
long = asr.transcribe(ROOT / "samples" / "long.wav")
print(long.stats)
plotting.draft(long, asr.tokenizer)

# %% [markdown]
# A draft cannot change the text, only how soon it is there. Here is one with mistakes, and none at all:

# %%
wrong = transcript.ctc_text.split()
wrong[1], wrong[-2] = "wrong", "mistaken"
drafted = asr.transcribe(path, draft=" ".join(wrong))
greedy = asr.transcribe(path, speculative=False)
for name, each in {"own draft": transcript, "bad draft": drafted, "no draft": greedy}.items():
    print(f"{name}: {each.stats['llm_passes']:2} passes of the language model, {each.text}")
plotting.draft(drafted, asr.tokenizer)

# %% [markdown]
# ## Keywords
#
# Names that the model has never seen are spelled by ear. A list of those that may be spoken helps: an acoustic gate keeps
# the ones that the CTC posteriors can have meant, these correct the draft and bias the language model's decoding, and the
# other words of the list change nothing.

# %%
KEYWORDS = ["tovkog", "kowalczyk", "zurich", "bimgoka"]
named = path.with_name("free-071.ogg")
off = asr.transcribe(named)
on = asr.transcribe(named, keywords=KEYWORDS)
print(f"without keywords  {off.text}\nwith keywords     {on.text}\nheard             {', '.join(on.stats['keywords'])}")
plotting.overview(asr.ctc_emissions(named), on, asr.tokenizer)

# %% [markdown]
# ## Everything in one picture

# %%
plotting.overview(asr.ctc_emissions(path), transcript, asr.tokenizer)
