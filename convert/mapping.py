"""The table between the tensors of a Hugging Face checkpoint and the leaves of the parameter tree.

One `Rule` is one kind of tensor, read in both directions. Leaves are named by dotted paths (`encoder.out.kernel`);
equal layers are stacked on a leading axis, `{layer}` in the Hugging Face name. Two spellings of names exist: as
released (`encoder.*`, `language_model.model.*`), which the table uses, and that of newer transformers
(`model.encoder.*`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from granite_jax.checkpoint.tree import Shape, raise_named


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor (one layer of a stacked leaf) changes its axes: pure re-arrangement, hence exact."""

    from_hf: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[Shape], Shape]  # of our shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name as released, its path in the parameter tree, the change of axes."""

    hf: str
    path: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


SAME = Transform(lambda x: x, lambda x: x, lambda s: s)
LINEAR = Transform(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])  # [out, in] <-> [in, out]
POINTWISE = Transform(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None], lambda s: (s[1], s[0], 1))
DEPTHWISE = Transform(lambda x: x[:, 0].T, lambda x: x.T[:, None], lambda s: (s[1], 1, s[0]))
# Two halves along the output axis become an axis of their own: [2 inner, in] <-> [in, 2, inner].
HALVES = Transform(
    lambda x: x.reshape(2, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    lambda s: (s[1] * s[2], s[0]),
)
POINTWISE_HALVES = Transform(
    lambda x: HALVES.from_hf(x[:, :, 0]),
    lambda x: HALVES.to_hf(x)[:, :, None],
    lambda s: (*HALVES.hf_shape(s), 1),
)
BIAS_HALVES = Transform(lambda x: x.reshape(2, -1), lambda x: x.reshape(-1), lambda s: (s[0] * s[1],))


def _linear(hf: str, path: str, bias: bool = True) -> list[Rule]:
    kernel = Rule(f"{hf}.weight", f"{path}.kernel", LINEAR)
    return [kernel, Rule(f"{hf}.bias", f"{path}.bias", SAME)] if bias else [kernel]


def _norm(hf: str, path: str) -> list[Rule]:
    return [Rule(f"{hf}.weight", f"{path}.scale", SAME), Rule(f"{hf}.bias", f"{path}.bias", SAME)]


def _feed_forward(hf: str, path: str) -> list[Rule]:
    return [
        *_norm(f"{hf}.pre_norm", f"{path}.norm"),
        *_linear(f"{hf}.up_proj", f"{path}.up"),
        *_linear(f"{hf}.down_proj", f"{path}.down"),
    ]


def _encoder() -> list[Rule]:
    hf, path = "encoder.layers.{layer}", "encoder.layers"
    return [
        *_linear("encoder.input_linear", "encoder.input"),
        *_feed_forward(f"{hf}.ff1", f"{path}.ff1"),
        *_norm(f"{hf}.attn.pre_norm", f"{path}.attention.norm"),
        *_linear(f"{hf}.attn.to_q", f"{path}.attention.q", bias=False),
        Rule(f"{hf}.attn.to_kv.weight", f"{path}.attention.kv.kernel", HALVES),
        *_linear(f"{hf}.attn.to_out", f"{path}.attention.out"),
        Rule(f"{hf}.attn.rel_pos_emb.weight", f"{path}.attention.relative.embedding", SAME),
        *_norm(f"{hf}.conv.norm", f"{path}.convolution.norm"),
        Rule(f"{hf}.conv.up_conv.weight", f"{path}.convolution.up.kernel", POINTWISE_HALVES),
        Rule(f"{hf}.conv.up_conv.bias", f"{path}.convolution.up.bias", BIAS_HALVES),
        Rule(f"{hf}.conv.depth_conv.conv.weight", f"{path}.convolution.depthwise", DEPTHWISE),
        *_norm(f"{hf}.conv.batch_norm", f"{path}.convolution.batch_norm"),
        Rule(f"{hf}.conv.batch_norm.running_mean", f"{path}.convolution.batch_norm.mean", SAME),
        Rule(f"{hf}.conv.batch_norm.running_var", f"{path}.convolution.batch_norm.var", SAME),
        Rule(f"{hf}.conv.down_conv.weight", f"{path}.convolution.down.kernel", POINTWISE),
        Rule(f"{hf}.conv.down_conv.bias", f"{path}.convolution.down.bias", SAME),
        *_feed_forward(f"{hf}.ff2", f"{path}.ff2"),
        *_norm(f"{hf}.post_norm", f"{path}.norm"),
        *_linear("encoder.out", "encoder.out"),
        *_linear("encoder.out_mid", "encoder.out_mid"),
    ]


def _qformer_attention(hf: str, path: str) -> list[Rule]:
    return [
        *_linear(f"{hf}.attention.query", f"{path}.q"),
        *_linear(f"{hf}.attention.key", f"{path}.k"),
        *_linear(f"{hf}.attention.value", f"{path}.v"),
        *_linear(f"{hf}.output.dense", f"{path}.out"),
        *_norm(f"{hf}.output.LayerNorm", f"{path}.norm"),
    ]


def _projector() -> list[Rule]:
    hf, path = "projector.qformer.encoder.layer.{layer}", "projector.layers"
    return [
        Rule("projector.query", "projector.query", SAME),
        *_norm("projector.qformer.layernorm", "projector.norm"),
        *_qformer_attention(f"{hf}.attention", f"{path}.self_attention"),
        *_qformer_attention(f"{hf}.crossattention", f"{path}.cross_attention"),
        *_linear(f"{hf}.intermediate_query.dense", f"{path}.up"),
        *_linear(f"{hf}.output_query.dense", f"{path}.down"),
        *_norm(f"{hf}.output_query.LayerNorm", f"{path}.norm"),
        *_linear("projector.linear", "projector.out"),
    ]


def _decoder() -> list[Rule]:
    hf, path = "language_model.model.layers.{layer}", "decoder.layers"
    return [
        Rule("language_model.model.embed_tokens.weight", "decoder.embedding.embedding", SAME),
        Rule(f"{hf}.input_layernorm.weight", f"{path}.input_norm.scale", SAME),
        *_linear(f"{hf}.self_attn.q_proj", f"{path}.attention.q", bias=False),
        *_linear(f"{hf}.self_attn.k_proj", f"{path}.attention.k", bias=False),
        *_linear(f"{hf}.self_attn.v_proj", f"{path}.attention.v", bias=False),
        *_linear(f"{hf}.self_attn.o_proj", f"{path}.attention.out", bias=False),
        Rule(f"{hf}.post_attention_layernorm.weight", f"{path}.post_norm.scale", SAME),
        *_linear(f"{hf}.mlp.gate_proj", f"{path}.gate", bias=False),
        *_linear(f"{hf}.mlp.up_proj", f"{path}.up", bias=False),
        *_linear(f"{hf}.mlp.down_proj", f"{path}.down", bias=False),
        Rule("language_model.model.norm.weight", "decoder.norm.scale", SAME),
        Rule(HEAD, "decoder.head.kernel", LINEAR),  # absent from the tree when embeddings are tied
    ]


HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
RULES: tuple[Rule, ...] = (*_encoder(), *_projector(), *_decoder())

# Carry no information: a counter that inference never reads, and a table recomputed from the config.
BATCH_COUNTER = "encoder.layers.{layer}.conv.batch_norm.num_batches_tracked"
_IGNORED = (BATCH_COUNTER, "encoder.attention_dists")

# (as released, newer transformers); the first that matches counts.
_SPELLINGS = (
    (HEAD, "lm_head.weight"),
    ("language_model.model.", "model.language_model."),
    ("encoder.", "model.encoder."),
    ("projector.", "model.projector."),
)
_LAYER = re.compile(r"\.(layers?)\.(0|[1-9][0-9]{0,5})\.")
_TILE = 16
_BY_HF = {rule.hf: rule for rule in RULES}


def released_name(name: str) -> str:
    """The released spelling of a name in either spelling."""
    for released, new in _SPELLINGS:
        if name.startswith(new):
            return released + name[len(new) :]
    return name


def new_name(name: str) -> str:
    """The spelling of newer transformers of a name as released."""
    for released, new in _SPELLINGS:
        if name.startswith(released):
            return new + name[len(released) :]
    return name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree: its shape, and the checkpoint's own names of the tensors it consists of, in layer order."""

    rule: Rule
    shape: Shape
    names: tuple[str, ...]

    @property
    def tensor_shape(self) -> Shape:
        """Shape of each tensor in the Hugging Face checkpoint."""
        return self.rule.transform.hf_shape(self.shape[1:] if self.rule.stacked else self.shape)


def match(names: Iterable[str], shapes: Mapping[str, Shape]) -> tuple[list[Leaf], str | None]:
    """Finds the place of every tensor of a checkpoint.

    Args:
      names: tensor names, in either spelling.
      shapes: dotted path -> shape of every leaf the config asks for.

    Returns:
      A `Leaf` for every path, and the name of an `lm_head` that repeats a tied embedding, or None.

    Raises:
      CheckpointError: naming tensors without a place, in both spellings at once, or missing.
    """
    found: dict[tuple[str, int], str] = {}
    unmatched, duplicate, tied_head = [], [], None
    for name in names:
        released = released_name(name)
        template, layer = _template(released)
        rule = _BY_HF.get(template)
        if template in _IGNORED:
            continue
        if rule is not None and rule.hf == HEAD and rule.path not in shapes:
            duplicate += [name] if tied_head else []
            tied_head = name
        elif rule is None or (rule.stacked and layer >= shapes[rule.path][0]):
            unmatched.append(name)
        elif (rule.path, layer) in found:
            duplicate += [found[rule.path, layer], name]
        else:
            found[rule.path, layer] = name
    wanted = [rule for rule in RULES if rule.path in shapes]
    missing = (
        rule.hf.format(layer=layer)
        for rule in wanted
        for layer in _layers(rule, shapes)
        if (rule.path, layer) not in found
    )
    total = sum(len(_layers(rule, shapes)) for rule in wanted)
    raise_named("no place in the model for", unmatched)
    raise_named("more than one tensor for the same place:", duplicate)
    raise_named("missing:", missing, total - len(found))
    leaves = [
        Leaf(rule, shapes[rule.path], tuple(found[rule.path, i] for i in _layers(rule, shapes))) for rule in wanted
    ]
    return leaves, tied_head


def hf_tensors(
    shapes: Mapping[str, Shape],
) -> Iterator[tuple[str, Shape, str, Callable[[np.ndarray], np.ndarray]]]:
    """For every tensor of leaves of these `shapes`: its released name, shape, leaf, and how to get it from the leaf."""
    for rule in RULES:
        if rule.path in shapes:
            shape = rule.transform.hf_shape(shapes[rule.path][1:] if rule.stacked else shapes[rule.path])
            for layer in _layers(rule, shapes):
                yield rule.hf.format(layer=layer), shape, rule.path, functools.partial(_tensor_of, rule, layer)


def _tensor_of(rule: Rule, layer: int, leaf: np.ndarray) -> np.ndarray:
    return rule.transform.to_hf(leaf[layer] if rule.stacked else leaf)


def copy(into: np.ndarray, array: np.ndarray) -> None:
    """`into[...] = array`, fast where `array` is a transposed view: rows of both then stay in the processor's cache."""
    if array.ndim < 2 or array.flags.c_contiguous:
        into[...] = array
        return
    for start in range(0, array.shape[-1], _TILE):
        into[..., start : start + _TILE] = array[..., start : start + _TILE]


def _template(name: str) -> tuple[str, int]:
    layer = _LAYER.search(name)
    if layer is None:
        return name.replace("{", ""), 0  # a name that spells "{layer}" is no layer
    return _LAYER.sub(r".\1.{layer}.", name, count=1), int(layer[2])


def _layers(rule: Rule, shapes: Mapping[str, Shape]) -> range:
    return range(shapes[rule.path][0] if rule.stacked else 1)
