"""Small random Hugging Face checkpoints, written with numpy alone.

Tensor names and shapes are spelled out here as `transformers` has them, not taken from the mapping table under test.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }}\n ASSISTANT:"
    "{% else %}{{ message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
)
# Overrides for the smallest that has every kind of tensor: tests of files need no more.
TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4, "max_pos_emb": 40},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2},
}
SPECIALS = ("<|pad|>", "<|end_of_text|>", "<|audio|>")
_TEXT = (
    "can you transcribe the speech into a written format? "
    "transcribe the speech with proper punctuation and capitalization. "
    "transcribe the speech to text. Keywords: translate the speech to French. USER: ASSISTANT:"
)


def write_random_checkpoint(
    directory: str | Path,
    seed: int = 0,
    *,
    tied: bool = False,
    names: str = "released",
    shards: int = 1,
    dtype: str = "float32",
    bpe_labels: int = 0,
    **overrides: Any,
) -> dict[str, Any]:
    """Writes config.json, model.safetensors (or `shards` files and an index), the tokenizer and the chat template.

    Args:
      directory: is made if need be.
      tied: tie the embeddings; the checkpoint then has no lm_head.
      names: spelling of tensor names, "released", "new" or "nested".
      dtype: "float32" or "bfloat16".
      bpe_labels: labels of a BPE head, in its own file out_llm.safetensors; 0 for none.
      **overrides: keys of config.json; `encoder_config`, `projector_config` and `text_config` are merged key by key.

    Returns:
      The content of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    special = {"pad_token": "<|pad|>", "bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = make_config(tokenizer, tied, dtype, **overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(directory, random_tensors(config, seed), names, shards, dtype)
    if bpe_labels:
        head = random_bpe_head(config, bpe_labels, seed)
        to = np.dtype(getattr(ml_dtypes, dtype, dtype))
        save_file({name: x.astype(to) for name, x in head.items()}, directory / "out_llm.safetensors")
    return config


def random_bpe_head(config: dict[str, Any], labels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of out_llm.safetensors, float32. Its blank wins about half of the windows."""
    rng, width = np.random.default_rng(seed + 1000), config["encoder_config"]["hidden_dim"]
    bias = rng.standard_normal(labels)
    bias[0] += 4.0
    weight = rng.standard_normal((labels, width)) * 3 * width**-0.5
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE with a few merges; the special tokens have the last ids, `<|audio|>` the very last."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def make_config(tokenizer: tokenizers.Tokenizer, tied: bool, dtype: str, **overrides: Any) -> dict[str, Any]:
    """A small configuration in which no two sizes that could be mixed up are equal."""
    pad, end, audio = (tokenizer.token_to_id(token) for token in SPECIALS)
    config: dict[str, Any] = {
        "architectures": ["GraniteSpeechForConditionalGeneration"],
        "audio_token_index": audio,
        "downsample_rate": 5,
        "dtype": dtype,
        "encoder_config": {
            "context_size": 40,
            "conv_expansion_factor": 2,
            "conv_kernel_size": 15,
            "dim_head": 12,
            "feedforward_mult": 3,
            "hidden_dim": 40,
            "input_dim": 160,
            "max_pos_emb": 64,
            "model_type": "granite_speech_encoder",
            "num_heads": 2,
            "num_layers": 4,
            "output_dim": 348,
        },
        "has_lora_adapter": False,
        "initializer_range": 0.02,
        "model_type": "granite_speech",
        "projector_config": {
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 40,
            "hidden_act": "gelu",
            "hidden_size": 36,
            "intermediate_size": 56,
            "layer_norm_eps": 1e-12,
            "model_type": "blip_2_qformer",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "use_qformer_text_input": False,
        },
        "text_config": {
            "attention_bias": False,
            "attention_multiplier": 0.0625,
            "bos_token_id": end,
            "embedding_multiplier": 12.0,
            "eos_token_id": end,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 80,
            "logits_scaling": 8.0,
            "max_position_embeddings": 1024,
            "mlp_bias": False,
            "model_type": "granite",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": pad,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": tied,
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "tie_word_embeddings": tied,
        "window_size": 15,
    }
    for key, value in overrides.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors under their released names: activations of order one, logits several units apart."""
    rng = np.random.default_rng(seed)
    text = config["text_config"]
    gains = {
        # So that attention is not uniform, the layers matter, and audio weighs as much as text.
        "q_proj.weight": 2.0,
        "k_proj.weight": 2.0,
        "o_proj.weight": 2.0,
        "mlp.down_proj.weight": 2.0,
        "projector.linear.weight": 1 / text["embedding_multiplier"],
        "lm_head.weight": 3 * text["logits_scaling"],
        "encoder.out.weight": 4.0,
    }
    embedding_scale = 1 / text["embedding_multiplier"]
    tensors = {}
    for name, shape in hf_shapes(config):
        gain = next((gain for suffix, gain in gains.items() if name.endswith(suffix)), 1.0)
        normal = rng.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7, np.int64)
            continue
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 2, shape)
        elif name.endswith("embed_tokens.weight"):
            value = normal * embedding_scale
        elif name.endswith(("query", "rel_pos_emb.weight")):
            value = normal * 0.7
        elif len(shape) == 1 and name.endswith("weight"):
            value = 1 + 0.1 * normal
            if name == "language_model.model.norm.weight" and text["tie_word_embeddings"]:
                value *= 3 * text["logits_scaling"] / embedding_scale / text["hidden_size"] ** 0.5
        elif len(shape) == 1:
            value = 0.1 * normal
        else:
            value = gain * normal * np.prod(shape[1:]) ** -0.5
        tensors[name] = value.astype(np.float32)
    return tensors


def hf_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name as released and shape of every tensor that transformers has for `config`."""
    yield from _encoder_shapes(config["encoder_config"])
    yield from _projector_shapes(config)
    yield from _decoder_shapes(config["text_config"])


def _linear(name: str, width: int, out: int, bias: bool = True) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, width)), *([(f"{name}.bias", (out,))] if bias else [])]


def _norm(name: str, width: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _encoder_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, attention = config["hidden_dim"], config["num_heads"] * config["dim_head"]
    inner, wide = width * config["conv_expansion_factor"], width * config["feedforward_mult"]
    yield from _linear("encoder.input_linear", config["input_dim"], width)
    for i in range(config["num_layers"]):
        layer = f"encoder.layers.{i}"
        for part in ("ff1", "ff2"):
            yield from _norm(f"{layer}.{part}.pre_norm", width)
            yield from _linear(f"{layer}.{part}.up_proj", width, wide)
            yield from _linear(f"{layer}.{part}.down_proj", wide, width)
        yield from _norm(f"{layer}.attn.pre_norm", width)
        yield from _linear(f"{layer}.attn.to_q", width, attention, bias=False)
        yield from _linear(f"{layer}.attn.to_kv", width, 2 * attention, bias=False)
        yield from _linear(f"{layer}.attn.to_out", attention, width)
        yield f"{layer}.attn.rel_pos_emb.weight", (2 * config["max_pos_emb"] + 1, config["dim_head"])
        yield from _norm(f"{layer}.conv.norm", width)
        yield f"{layer}.conv.up_conv.weight", (2 * inner, width, 1)
        yield f"{layer}.conv.up_conv.bias", (2 * inner,)
        yield f"{layer}.conv.depth_conv.conv.weight", (inner, 1, config["conv_kernel_size"])
        yield from _norm(f"{layer}.conv.batch_norm", inner)
        yield f"{layer}.conv.batch_norm.running_mean", (inner,)
        yield f"{layer}.conv.batch_norm.running_var", (inner,)
        yield f"{layer}.conv.batch_norm.num_batches_tracked", ()
        yield f"{layer}.conv.down_conv.weight", (width, inner, 1)
        yield f"{layer}.conv.down_conv.bias", (width,)
        yield from _norm(f"{layer}.post_norm", width)
    yield from _linear("encoder.out", width, config["output_dim"])
    yield from _linear("encoder.out_mid", config["output_dim"], width)


def _projector_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    qformer = config["projector_config"]
    width, wide = qformer["hidden_size"], qformer["intermediate_size"]
    yield "projector.query", (1, config["window_size"] // config["downsample_rate"], width)
    yield from _norm("projector.qformer.layernorm", width)
    for i in range(qformer["num_hidden_layers"]):
        layer = f"projector.qformer.encoder.layer.{i}"
        for part, source in (("attention", width), ("crossattention", qformer["encoder_hidden_size"])):
            yield from _linear(f"{layer}.{part}.attention.query", width, width)
            yield from _linear(f"{layer}.{part}.attention.key", source, width)
            yield from _linear(f"{layer}.{part}.attention.value", source, width)
            yield from _linear(f"{layer}.{part}.output.dense", width, width)
            yield from _norm(f"{layer}.{part}.output.LayerNorm", width)
        yield from _linear(f"{layer}.intermediate_query.dense", width, wide)
        yield from _linear(f"{layer}.output_query.dense", wide, width)
        yield from _norm(f"{layer}.output_query.LayerNorm", width)
    yield from _linear("projector.linear", width, config["text_config"]["hidden_size"])


def _decoder_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = config.get("head_dim", width // config["num_attention_heads"])
    heads, groups = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "language_model.model.embed_tokens.weight", (vocab, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", width, heads, bias=False)
        yield from _linear(f"{layer}.self_attn.k_proj", width, groups, bias=False)
        yield from _linear(f"{layer}.self_attn.v_proj", width, groups, bias=False)
        yield from _linear(f"{layer}.self_attn.o_proj", heads, width, bias=False)
        yield from _linear(f"{layer}.mlp.gate_proj", width, wide, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", width, wide, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", wide, width, bias=False)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "language_model.model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "language_model.lm_head.weight", (vocab, width)


def write_tensors(
    directory: Path, tensors: dict[str, np.ndarray], names: str = "released", shards: int = 1, dtype: str = "float32"
) -> None:
    """Writes tensors with released names as model.safetensors, or as `shards` files and an index."""
    to = np.dtype(getattr(ml_dtypes, dtype, dtype))
    spelled = {spell(name, names): x if x.dtype == np.int64 else x.astype(to) for name, x in tensors.items()}
    if shards == 1:
        save_file(spelled, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: spelled[name] for name in sorted(spelled)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in spelled.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def spell(name: str, names: str = "new") -> str:
    """A released name as newer transformers has it, or as releases about 5.19 saved it."""
    if names == "released":
        return name
    if names == "nested":
        return name.replace("language_model.model.", "language_model.model.model.")
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")
