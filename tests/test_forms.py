"""The forms in which a parameter tree can have its layers and their weights: no block notices them."""

import functools
from collections.abc import Callable
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from granite_jax.models import granite_speech
from granite_jax.models.layers import linear
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.models.layers.linear import Linear
from granite_jax.models.layers.packed.features import packed_log_mel
from granite_jax.models.layers.stack import for_layers, make_layers, separate
from granite_jax.pretrained import open_checkpoint

Part = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["head", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A random model with a BPE head, its weights as NumPy arrays."""
    directory = tmp_path_factory.mktemp("model")
    hf_fixture.write_random_checkpoint(directory, tied=request.param, bpe_labels=30)
    checkpoint = open_checkpoint(directory)
    return checkpoint.config, checkpoint.read()


@functools.partial(jax.jit, static_argnums=0)
def compute(config: Any, params: Any) -> list[jax.Array]:
    """Everything that the model computes of two sounds, one of them short: row by row and packed."""
    samples = jnp.asarray(np.random.default_rng(3).standard_normal((2, 16_000)), jnp.float32) * 0.1
    lengths, tokens = jnp.array([16_000, 6_000], jnp.int32), jnp.full((2, 8), config.audio_token_id, jnp.int32)
    tokens, frames = tokens.at[:, 6:].set(jnp.array([[5, 7], [9, 11]], jnp.int32)), num_frames(lengths)
    encoded = granite_speech.encode(config, params, log_mel(samples, lengths), frames)
    audio = granite_speech.project(config, params, encoded.hidden, frames)
    valid = (jnp.arange(encoded.hidden.shape[1])[None] < frames[:, None])[..., None].astype(jnp.float32)
    bpe = granite_speech.bpe_logits(config, params, encoded, frames)[:, :1]
    filled = jnp.array([8, 7], jnp.int32)
    logits, cache = granite_speech.prefill(config, params, tokens, filled, audio, capacity=12)
    stepped, _ = granite_speech.decode_step(config, params, tokens[:, -2:], cache)
    packing = granite_speech.pack_frames(config, frames, 50)
    packed = granite_speech.encode_packed(config, params, packed_log_mel(samples, lengths, packing), packing)
    reduced, _ = granite_speech.prefill_packed(
        config, params, tokens, filled, audio, tokens[:, -1:], filled * 0 + 1,
        lambda logits, _: logits.max(axis=-1), tokens[:, :2], capacity=12,
    )  # fmt: skip
    own = [packing.unpack(packed.labels.logits) * valid, packed.audio[:1]]
    return [encoded.hidden * valid, encoded.importance, audio, bpe, logits, stepped, *own, reduced]


def change_linears(tree: dict[str, Any], change: Callable[[Part], Part], stacked: bool = False) -> dict[str, Any]:
    """The tree with other parts for every linear layer; those of stacked layers are changed one by one."""
    if "kernel" not in tree:
        return {
            name: change_linears(branch, change, stacked or name == "layers") if isinstance(branch, dict) else branch
            for name, branch in tree.items()
        }
    if not stacked:
        return change(tree)
    layers = [change({name: part[i] for name, part in tree.items()}) for i in range(len(tree["kernel"]))]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def assert_equal_results(model: tuple[Any, Any], params: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(compute(model[0], params), compute(model[0], expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(jnp.abs(theirs).max()))


def test_layers_can_be_separate_arrays(model) -> None:
    # Given a tree whose layers have arrays of their own
    params = {part: {**tree, "layers": separate(tree["layers"])} for part, tree in model[1].items()}
    # When it computes, then everything is as with stacked arrays
    assert_equal_results(model, params, model[1])


def test_kernels_can_be_transposed(model) -> None:
    # Given a tree with weights as [*out, in], when it computes, then everything is as with kernels
    def transposed(part: Part) -> Part:
        return {"weight": np.moveaxis(part["kernel"], 0, -1), **{k: v for k, v in part.items() if k == "bias"}}

    assert_equal_results(model, change_linears(model[1], transposed), model[1])


def quantized(part: Part) -> Part:
    scale = np.abs(part["kernel"]).max(axis=0) / 127
    q = np.round(part["kernel"] / np.maximum(scale, 1e-12)).astype(np.int8)
    return {"q": q, "scale": scale.astype(np.float32), **{k: v for k, v in part.items() if k == "bias"}}


def test_kernels_can_be_quantized(model) -> None:
    # Given a tree of int8 weights with one scale for each output
    def dequantized(part: Part) -> Part:
        parts = quantized(part)
        return {**part, "kernel": parts["q"].astype(np.float32) * parts["scale"]}

    # When it computes, then everything is as with the float weights that these stand for
    assert_equal_results(model, change_linears(model[1], quantized), change_linears(model[1], dequantized), 1e-4)


@pytest.mark.parametrize("form", [lambda part: part, quantized], ids=["float", "int8"])
def test_adapters_can_stay_beside_the_weights(model, form) -> None:
    # Given a tree with a LoRA adapter in every linear layer, whose weights are floats or quantized
    rng = np.random.default_rng(0)

    def factors(part: Part) -> Part:
        inputs, *outputs = part["kernel"].shape
        a, b = (0.1 * rng.standard_normal(shape).astype(np.float32) for shape in ((inputs, 3), (3, *outputs)))
        return {**part, "a": a, "b": b, "alpha": np.float32(1.5)}

    def adapted(part: Part) -> Part:
        return {**{k: v for k, v in part.items() if k in ("a", "b", "alpha")}, **form(without(part))}

    def without(part: Part) -> Part:
        return {name: value for name, value in part.items() if name in ("kernel", "bias")}

    def merged(part: Part) -> Part:
        parts = form(without(part))
        kernel = parts["kernel"] if "kernel" in parts else parts["q"].astype(np.float32) * parts["scale"]
        return without({**part, "kernel": kernel + part["alpha"] * np.tensordot(part["a"], part["b"], 1)})

    params = change_linears(model[1], factors)
    # When it computes, then everything is as with the adapter merged into the weights
    assert_equal_results(model, change_linears(params, adapted), change_linears(params, merged), 1e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda part: {**part, "a": part["kernel"]}, "without a place in the module: attention.k.a"),
        (lambda part: {**part, "q": part["kernel"]}, "without a place in the module: attention.k.q"),
        (lambda part: {"q": part["kernel"]}, "missing: attention.k.kernel"),
        (lambda part: {**part, "bias": part["kernel"]}, "without a place in the module: attention.k.bias"),
    ],
)
def test_other_forms_are_refused(model, change, problem) -> None:
    # Given trees with half an adapter, two forms at once, half a form, or a part too much
    config, params = model
    params = {**params, "decoder": {**params["decoder"], "layers": change_linears(params["decoder"]["layers"], change)}}
    # When one computes, then the error names the leaves
    with pytest.raises(ValueError, match=problem.replace("attention", "layers.attention")):
        compute(config, params)


def random_parts(form: str, outputs: tuple[int, ...]) -> Part:
    """A linear layer of 8 inputs with a bias and an adapter."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, *outputs), "weight": (*outputs, 8), "q": (8, *outputs), "scale": outputs}
    shapes |= {"a": (8, 3), "b": (3, *outputs), "alpha": (), "bias": outputs}
    names = [*form.split("+"), "a", "b", "alpha", "bias"]
    parts = {name: np.array(rng.standard_normal(shapes[name]), np.float32) for name in names}
    return parts | {"q": np.array(rng.integers(-99, 99, shapes["q"]), np.int8)} if "q" in parts else parts


@pytest.mark.parametrize("outputs", [(6,), (2, 6)], ids=str)
@pytest.mark.parametrize("form", ["kernel", "weight", "q+scale"])
def test_every_form_can_be_split(form: str, outputs: tuple[int, ...]) -> None:
    # Given a layer, and its parts halved along their axes of outputs or of inputs
    x, parts = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32), random_parts(form, outputs)

    def halves(axes: Any) -> list[Part]:
        split = {name: np.split(parts[name], 2, axis) for name, axis in axes.items() if name in parts}
        return [parts | {name: both[i] for name, both in split.items()} for i in range(2)]

    whole = linear.apply(parts, x)
    # When halves of the outputs are computed, then they are the halves of the whole
    found = jnp.concatenate([linear.apply(half, x) for half in halves(linear.OUTPUTS)], axis=-1)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-3)
    # And those of the inputs add up to it, with the bias added once
    if len(outputs) == 1:
        sums = [
            linear.apply(h | {"bias": h["bias"] / 2}, x[:, 4 * i :][:, :4]) for i, h in enumerate(halves(linear.INPUTS))
        ]
        np.testing.assert_allclose(sums[0] + sums[1], whole, rtol=1e-4, atol=1e-3)


def test_products_are_in_the_wider_dtype_and_accumulate_in_float32() -> None:
    # Given bfloat16 activations, when the weights are float32, then so is the product
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (4, 2048)), jnp.bfloat16)
    kernel = np.random.default_rng(1).uniform(0, 1, (2048, 3)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):
        assert linear.apply({"kernel": kernel}, x).dtype == jnp.float32
    assert linear.apply({"kernel": kernel.astype(jnp.bfloat16)}, x).dtype == jnp.bfloat16
    # And a product that is asked for in float32 was not rounded to bfloat16 before, nor that of int8 before its scale
    exact = np.asarray(x, np.float64) @ kernel.astype(jnp.bfloat16).astype(np.float64)
    np.testing.assert_allclose(linear.apply({"kernel": kernel.astype(jnp.bfloat16)}, x, jnp.float32), exact, rtol=1e-5)
    parts = {"q": np.full((2048, 3), 3, np.int8), "scale": np.array([0.1, 0.2, 0.3], np.float32)}
    exact = np.asarray(x, np.float64) @ parts["q"] * parts["scale"]
    np.testing.assert_allclose(linear.apply(parts, x, jnp.float32), exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda layers: {}, "missing: layers.attention.k.kernel"),
        (lambda layers: {0: separate(layers)[0]}, "without a place in the module: layers.0.attention.k.kernel"),
        (lambda layers: {1: layers, 2: layers}, "without a place in the module: layers.1.attention.k.kernel"),
    ],
    ids=["none", "too few", "others"],
)
def test_trees_with_other_layers_are_refused(model, change, problem) -> None:
    # Given trees of separate layers, some of which are missing or have other numbers
    config, params = model
    params = {**params, "decoder": {**params["decoder"], "layers": change(params["decoder"]["layers"])}}
    # When one computes, then the error names the leaves
    with pytest.raises(ValueError, match=problem):
        compute(config, params)


def test_rematerialized_layers_have_the_same_derivative_in_less_memory() -> None:
    # Given a deep stack of layers
    layers = make_layers(lambda rngs: Linear(64, 64, rngs), 12, nnx.Rngs(0))
    definition, weights = nnx.split(layers, graph=False)
    weights, x = nnx.to_pure_dict(weights), jnp.ones((256, 64), jnp.float32)

    def loss(weights: Any, *, remat: bool) -> jax.Array:
        def body(x: jax.Array, layer: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            for _ in range(8):
                x = jnp.tanh(layer(x))
            return x, index

        last, indices = for_layers(nnx.merge(definition, weights), body, x, remat=remat)
        return jnp.sum(last**2) + jnp.sum(indices).astype(jnp.float32)

    gradients, sizes = [], []
    for remat in (False, True):
        # When its derivative is compiled with and without rematerialization
        compiled = jax.jit(jax.grad(functools.partial(loss, remat=remat))).lower(weights).compile()
        gradients.append(compiled(weights))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    # Then both have the same values, and one holds much less for the backward pass
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *gradients)
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("form", [dict, separate], ids=["stacked", "separate"])
def test_the_model_is_rematerialized_on_request(model, form) -> None:
    # Given a loss of encoder and language model
    config = model[0]
    params = {part: {**tree, "layers": form(tree["layers"])} for part, tree in model[1].items()}

    def loss(params: Any, remat: bool) -> jax.Array:
        samples, lengths = jnp.full((1, 9_600), 0.01, jnp.float32), jnp.array([9_600], jnp.int32)
        features, frames = log_mel(samples, lengths), num_frames(lengths)
        hidden = granite_speech.encode(config, params, features, frames, remat=remat).hidden
        tokens = jnp.arange(5, dtype=jnp.int32)[None]
        logits, _ = granite_speech.prefill(config, params, tokens, lengths * 0 + 5, remat=remat)
        return jnp.sum(hidden**2) + jnp.sum(logits**2)

    # When it is differentiated, then layers are computed again in the backward pass, only if asked for
    for remat in (False, True):
        text = str(jax.make_jaxpr(jax.grad(lambda p, remat=remat: loss(p, remat)))(params))
        assert ("remat" in text or "checkpoint" in text) == remat
