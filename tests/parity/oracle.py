"""The oracle: `transformers`, one utterance at a time, in float32."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the reference computes for one utterance; `t` frames, `p` prompt tokens, `r` generated ones.

    Fields:
      features: `[t, 160]`.
      layers: output of every encoder block before self-conditioning, `[l, t, d]`.
      hidden: of the encoder, `[t, d]`.
      ctc: `[t, c]`.
      audio: the projector's output, `[a, e]`.
      prompt: ids `[p]`.
      k, v: keys and values of every layer after the prompt, `[l, k, p, h]`.
      prompt_logits: `[p, v]`.
      tokens: greedy ids `[r]`, end of text included if it came.
      logits: those each token was chosen by, `[r, v]`.
    """

    features: np.ndarray
    layers: np.ndarray
    hidden: np.ndarray
    ctc: np.ndarray
    audio: np.ndarray
    prompt: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prompt_logits: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray


class Oracle:
    """A checkpoint as transformers loads it."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32):
        self.model, info = GraniteSpeechForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, output_loading_info=True
        )
        problems = {kind: names for kind, names in info.items() if names}
        if problems:
            raise ValueError(f"transformers did not load {directory} as it is: {problems}")
        self.model.eval()
        config = self.model.config
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.features = GraniteSpeechFeatureExtractor(
            projector_window_size=config.window_size, projector_downsample_rate=config.downsample_rate
        )
        self.processor = GraniteSpeechProcessor(self.features, self.tokenizer)

    def render(self, instruction: str) -> str:
        """The prompt's text, as IBM's examples build it."""
        turn = [{"role": "user", "content": f"<|audio|>{instruction}"}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def answer(self, sound: np.ndarray, instruction: str, new_tokens: int) -> Answer:
        """Runs one utterance through everything."""
        model, text = self.model, self.model.config.text_config
        inputs = self.processor(self.render(instruction), torch.from_numpy(sound)[None], return_tensors="pt")
        layers: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: layers.append(output.clone()))
            for layer in model.encoder.layers
        ]
        hidden = model.encoder(inputs["input_features"].to(model.dtype), return_dict=True).last_hidden_state
        for hook in hooks:
            hook.remove()
        forward = model(**inputs, use_cache=True)
        never = [model.config.audio_token_id, text.pad_token_id]
        generated = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=text.eos_token_id,
            suppress_tokens=[token for token in never if token != text.eos_token_id],
            output_scores=True,
            return_dict_in_generate=True,
        )
        prompt = inputs["input_ids"][0]
        cache = forward.past_key_values.layers
        found = {
            "features": inputs["input_features"][0],
            "layers": torch.cat(layers),
            "hidden": hidden[0],
            "ctc": model.encoder.out(hidden)[0],
            "audio": model.projector(hidden)[0],
            "prompt": prompt,
            "k": torch.cat([layer.keys for layer in cache]),
            "v": torch.cat([layer.values for layer in cache]),
            "prompt_logits": forward.logits[0],
            "tokens": generated.sequences[0, len(prompt) :],
            "logits": torch.cat(generated.scores),
        }
        return Answer(**{name: tensor.to(_numpy_dtype(tensor)).numpy() for name, tensor in found.items()})

    @torch.no_grad()
    def forced(self, sound: np.ndarray, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """Audio embeddings `[a, e]`, and the logits `[r, v]` that would choose each token of a given answer."""
        inputs = self.processor(self.render("x"), torch.from_numpy(sound)[None], return_tensors="pt")
        features = inputs["input_features"].to(self.model.dtype)
        tokens = torch.from_numpy(np.concatenate([answer.prompt, answer.tokens[:-1]]))[None]
        audio = self.model.get_audio_features(features, return_dict=True).pooler_output
        logits = self.model(input_ids=tokens, input_features=features).logits
        return audio[0].float().numpy(), logits[0, -len(answer.tokens) :].float().numpy()


def _numpy_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else torch.int32
