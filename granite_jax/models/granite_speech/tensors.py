"""The tensor names of the released checkpoints."""

from granite_jax.models.tensor_table import (
    BIAS_HALVES,
    DEPTHWISE,
    HALVES,
    LINEAR,
    POINTWISE,
    POINTWISE_HALVES,
    SAME,
    Rule,
    TensorTable,
    linear,
    norm,
)

_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.model.embed_tokens.weight"


def _feed_forward(hf: str, path: str) -> list[Rule]:
    return [
        *norm(f"{hf}.pre_norm", f"{path}.norm"),
        *linear(f"{hf}.up_proj", f"{path}.up"),
        *linear(f"{hf}.down_proj", f"{path}.down"),
    ]


def _encoder() -> list[Rule]:
    hf, path = "encoder.layers.{layer}", "encoder.layers"
    return [
        *linear("encoder.input_linear", "encoder.input"),
        *_feed_forward(f"{hf}.ff1", f"{path}.ff1"),
        *norm(f"{hf}.attn.pre_norm", f"{path}.attention.norm"),
        *linear(f"{hf}.attn.to_q", f"{path}.attention.q", bias=False),
        Rule(f"{hf}.attn.to_kv.weight", f"{path}.attention.kv.kernel", HALVES),
        *linear(f"{hf}.attn.to_out", f"{path}.attention.out"),
        Rule(f"{hf}.attn.rel_pos_emb.weight", f"{path}.attention.relative.embedding", SAME),
        *norm(f"{hf}.conv.norm", f"{path}.convolution.norm"),
        Rule(f"{hf}.conv.up_conv.weight", f"{path}.convolution.up.kernel", POINTWISE_HALVES),
        Rule(f"{hf}.conv.up_conv.bias", f"{path}.convolution.up.bias", BIAS_HALVES),
        Rule(f"{hf}.conv.depth_conv.conv.weight", f"{path}.convolution.depthwise", DEPTHWISE),
        *norm(f"{hf}.conv.batch_norm", f"{path}.convolution.batch_norm"),
        Rule(f"{hf}.conv.batch_norm.running_mean", f"{path}.convolution.batch_norm.mean", SAME),
        Rule(f"{hf}.conv.batch_norm.running_var", f"{path}.convolution.batch_norm.var", SAME),
        Rule(f"{hf}.conv.down_conv.weight", f"{path}.convolution.down.kernel", POINTWISE),
        Rule(f"{hf}.conv.down_conv.bias", f"{path}.convolution.down.bias", SAME),
        *_feed_forward(f"{hf}.ff2", f"{path}.ff2"),
        *norm(f"{hf}.post_norm", f"{path}.norm"),
        *linear("encoder.out", "encoder.out"),
        *linear("encoder.out_mid", "encoder.out_mid"),
        *linear("out_llm", "encoder.out_bpe"),  # in a file of its own, of which not all checkpoints have one
    ]


def _qformer_attention(hf: str, path: str) -> list[Rule]:
    return [
        *linear(f"{hf}.attention.query", f"{path}.q"),
        *linear(f"{hf}.attention.key", f"{path}.k"),
        *linear(f"{hf}.attention.value", f"{path}.v"),
        *linear(f"{hf}.output.dense", f"{path}.out"),
        *norm(f"{hf}.output.LayerNorm", f"{path}.norm"),
    ]


def _projector() -> list[Rule]:
    hf, path = "projector.qformer.encoder.layer.{layer}", "projector.layers"
    return [
        Rule("projector.query", "projector.query", SAME),
        *norm("projector.qformer.layernorm", "projector.norm"),
        *_qformer_attention(f"{hf}.attention", f"{path}.self_attention"),
        *_qformer_attention(f"{hf}.crossattention", f"{path}.cross_attention"),
        *linear(f"{hf}.intermediate_query.dense", f"{path}.up"),
        *linear(f"{hf}.output_query.dense", f"{path}.down"),
        *norm(f"{hf}.output_query.LayerNorm", f"{path}.norm"),
        *linear("projector.linear", "projector.out"),
    ]


def _decoder() -> list[Rule]:
    hf, path = "language_model.model.layers.{layer}", "decoder.layers"
    return [
        Rule(_EMBEDDING, "decoder.embedding.embedding", SAME),
        Rule(f"{hf}.input_layernorm.weight", f"{path}.input_norm.scale", SAME),
        *linear(f"{hf}.self_attn.q_proj", f"{path}.attention.q", bias=False),
        *linear(f"{hf}.self_attn.k_proj", f"{path}.attention.k", bias=False),
        *linear(f"{hf}.self_attn.v_proj", f"{path}.attention.v", bias=False),
        *linear(f"{hf}.self_attn.o_proj", f"{path}.attention.out", bias=False),
        Rule(f"{hf}.post_attention_layernorm.weight", f"{path}.post_norm.scale", SAME),
        *linear(f"{hf}.mlp.gate_proj", f"{path}.gate", bias=False),
        *linear(f"{hf}.mlp.up_proj", f"{path}.up", bias=False),
        *linear(f"{hf}.mlp.down_proj", f"{path}.down", bias=False),
        Rule("language_model.model.norm.weight", "decoder.norm.scale", SAME),
        Rule(_HEAD, "decoder.head.kernel", LINEAR),  # absent from the tree when embeddings are tied
    ]


TABLE = TensorTable(
    rules=(*_encoder(), *_projector(), *_decoder()),
    tied=(_HEAD, _EMBEDDING),
    separate={"out_llm.": "out_llm.safetensors"},
    counter="encoder.layers.{layer}.conv.batch_norm.num_batches_tracked",
    ignored=(  # tables that are computed from the config
        "encoder.attention_dists",
        "language_model.model.rotary_emb.inv_freq",
        "language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq",
    ),
)
