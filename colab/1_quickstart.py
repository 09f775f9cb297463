# %% [markdown]
# # Quickstart: speech to text with granite_jax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/granite_jax/blob/main/colab/1_quickstart.ipynb)
#
# Install, transcribe a sample, upload or record speech of your own. Runs on CPU, T4 and TPU runtimes.

# %% tags=["install"]
# !git clone --quiet --depth 1 https://github.com/OWNER/granite_jax granite-jax; sh granite-jax/colab/install.sh

# %%
# %matplotlib inline
import json
import platform
from pathlib import Path

import flax
import jax
from IPython.display import Audio, display

import granite_jax as gj
from granite_jax import plotting

ROOT = next(path for path in map(Path, ("granite-jax", ".", "..")) if (path / "samples").is_dir())
print(
    "Python", platform.python_version(), "granite_jax", gj.__version__, "jax", jax.__version__, "flax", flax.__version__
)
print("devices:", jax.devices())

# %% [markdown]
# ## A checkpoint
#
# `"demo"` comes with the package: a small model trained on synthetic English speech, which shows that everything works,
# not how good the released model is. The released one has about 2 billion parameters (a download of 4.6 GB), and knows
# six languages, punctuation and translation; take a runtime with a GPU or TPU for it.

# %%
CHECKPOINT = "demo"  # @param ["demo", "ibm-granite/granite-4.0-1b-speech"]
asr = gj.Transcriber.from_pretrained(CHECKPOINT)
print("tasks:", ", ".join(asr.capabilities.tasks))

# %% [markdown]
# ## Transcribe
#
# Programs are compiled for each length of audio when they are first needed; what follows runs at full speed.

# %%
sample = ROOT / "samples" / "two-names.wav"
display(Audio(str(sample)))
transcript = asr.transcribe(sample)
print(transcript.text)
print(transcript.duration, "s,", transcript.stats)
if "translate" in asr.capabilities.tasks:  # the demo checkpoint only transcribes
    print(asr.transcribe(sample, task="punctuate").text)
    print(asr.transcribe(sample, task="translate", target_language="fr").text)

# %% [markdown]
# Several inputs at once: paths, bytes, arrays. A bad one costs the others nothing.

# %%
listed = [json.loads(line) for line in (ROOT / "samples" / "samples.jsonl").read_text().splitlines()]
transcripts = asr.transcribe([*(ROOT / "samples" / each["audio"] for each in listed), b"no audio"], on_error="return")
for each, heard in zip(listed, transcripts, strict=False):
    print(f"{each['audio']:15} said   {each['text']}\n{'':15} heard  {heard.text}")
print(transcripts[-1].error)

# %% [markdown]
# The picture of one utterance: what the model is given, what its encoder hears, when each word was spoken, and what the
# language model made of the encoder's draft. On the command line it is `granite-jax transcribe a.wav --plot out.png`.

# %%
plotting.overview(asr.ctc_emissions(sample), transcript, asr.tokenizer)

# %% [markdown]
# ## Your own: upload a file
#
# wav, flac, mp3, m4a, mp4 or another format of sound or video. Outside Colab, or if you cancel, the sample stands in.


# %%
def upload():
    """Files of yours, by name."""
    try:
        from google.colab import files
    except ImportError:
        return {}
    return files.upload()


uploaded = list(upload().values()) or [sample.read_bytes()]
mine = asr.transcribe(uploaded, on_error="return")
for each in mine:
    print(each.error or each.text)

# %% [markdown]
# ## Your own: record
#
# The browser asks whether it may use the microphone. Outside Colab the sample stands in.

# %%
import base64

import numpy as np

RECORD = """
async function record(seconds) {
  const stream = await navigator.mediaDevices.getUserMedia({audio: true});
  const context = new AudioContext();
  const source = context.createMediaStreamSource(stream);
  const recorder = context.createScriptProcessor(4096, 1, 1);
  const blocks = [];
  recorder.onaudioprocess = event => blocks.push(new Float32Array(event.inputBuffer.getChannelData(0)));
  source.connect(recorder);
  recorder.connect(context.destination);
  await new Promise(resolve => setTimeout(resolve, 1000 * seconds));
  recorder.disconnect();
  stream.getTracks().forEach(track => track.stop());
  await context.close();
  let bytes = "";
  for (const block of blocks) {
    for (const sample of block) {
      const value = Math.round(32767 * Math.max(-1, Math.min(1, sample))) & 0xffff;
      bytes += String.fromCharCode(value & 0xff, value >> 8);
    }
  }
  return {rate: context.sampleRate, pcm: btoa(bytes)};
}
"""


def record(seconds=5):
    """16-bit samples from the microphone and their rate in Hz; None outside Colab."""
    try:
        from google.colab import output
    except ImportError:
        return None
    found = output.eval_js(f"{RECORD}; record({seconds})")
    return np.frombuffer(base64.b64decode(found["pcm"]), "<i2"), int(found["rate"])


recording = record() or sample
spoken = asr.transcribe(recording)
print(spoken.text)
