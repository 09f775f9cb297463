"""Counts of arithmetic and bytes against the compiler's own, for small models whose layers are not in a loop."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from granite_jax.models import granite_speech
from granite_jax.models.granite_speech import work
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.granite_speech.releases import RELEASES
from granite_jax.models.layers.decoder import KVCache
from granite_jax.models.work import Work, Workload

ROWS = 2
_FRAMES = 128  # two attention blocks of each row


def small(layers: int, **decoder: Any) -> Config:
    """A model in which matrix products dominate, and no two widths that could be mixed up are equal."""
    config = Config.granite_4_0_1b()
    sizes: dict[str, Any] = {"num_layers": layers, "hidden_dim": 256, "num_heads": 3, "dim_head": 64}
    encoder = dataclasses.replace(config.encoder, **sizes, output_dim=96, context_size=64, max_pos_emb=80)
    sizes = {"hidden_size": 192, "encoder_hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 3}
    projector = dataclasses.replace(config.projector, **sizes, intermediate_size=448)
    sizes = {"vocab_size": 1000, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64} | decoder
    changed = dataclasses.replace(config.decoder, **sizes)
    return dataclasses.replace(config, encoder=encoder, projector=projector, decoder=changed, audio_token_id=7)


def unrolled(function: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a Python loop: the compiler counts a loop's body once, however often it runs."""
    results = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        # The index of a layer is a constant, so that the compiler drops the condition on it.
        state = jax.tree.map(lambda x, i=i: jnp.int32(i) if x.dtype == jnp.int32 and x.ndim == 1 else x[i], xs)
        carry, result = function(carry, state)
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@pytest.fixture(autouse=True)
def unrolled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given layers that are not in a loop."""
    monkeypatch.setattr(jax.lax, "scan", unrolled)


def counted(function: Callable, config: Config, *inputs: Any) -> float:
    """FLOPs of a compiled function, as the compiler counts them: elementwise work is part of it."""
    compiled = jax.jit(functools.partial(function, config)).lower(granite_speech.abstract_params(config), *inputs)
    analysis: Any = compiled.compile().cost_analysis()
    return analysis["flops"]


def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


LENGTHS = of(jnp.int32, ROWS)


def encode(config: Config, params: Any, features: Any, lengths: Any) -> Any:
    hidden = granite_speech.encode(config, params, features, lengths).hidden
    return granite_speech.ctc_logits(config, params, hidden)


def cache_of(config: Config, capacity: int) -> KVCache:
    decoder = config.decoder
    shape = (decoder.num_hidden_layers, ROWS, decoder.num_key_value_heads, capacity, decoder.head_dim)
    return KVCache(of(jnp.float32, *shape), of(jnp.float32, *shape), LENGTHS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_as_the_compiler_counts_it(layers: int) -> None:
    # Given encoders of one layer, which conditions nothing, and of two, when whole attention blocks are encoded
    config = small(layers)
    compiler = counted(encode, config, of(jnp.float32, ROWS, _FRAMES, 160), LENGTHS)

    # Then the formula leaves out the elementwise work alone
    formula = work.encode(config, ROWS * _FRAMES, ROWS * _FRAMES / config.encoder.context_size)
    assert formula == pytest.approx(compiler, rel=0.025)
    assert formula < compiler


@pytest.mark.parametrize("layers", [1, 2])
def test_projector_as_the_compiler_counts_it(layers: int) -> None:
    # Given frames of several windows, the last of which is not full, when they are projected
    config = small(layers)
    compiler = counted(granite_speech.project, config, of(jnp.float32, ROWS, _FRAMES, 256), LENGTHS)

    # Then the formula, which counts whole windows, leaves out the elementwise work alone
    formula = work.project(config, ROWS * math.ceil(_FRAMES / config.projector.window_size))
    assert formula == pytest.approx(compiler, rel=0.025)
    assert formula < compiler


@pytest.mark.parametrize("layers", [1, 2])
def test_prefill_as_the_compiler_counts_it(layers: int) -> None:
    # Given prompts short enough that all keys are scored for every query, when each row's last logits are computed
    config, prompt = small(layers), 96
    compiler = counted(granite_speech.prefill, config, of(jnp.int32, ROWS, prompt), LENGTHS)

    # Then the formula leaves out the elementwise work alone
    formula = work.prefill(config, ROWS * prompt, ROWS * prompt**2, ROWS)
    assert formula == pytest.approx(compiler, rel=0.025)
    assert formula < compiler


@pytest.mark.parametrize(("layers", "tied"), [(1, False), (2, False), (2, True)])
def test_decode_step_as_the_compiler_counts_it(layers: int, tied: bool) -> None:
    # Given a cache and a step of several tokens, when the logits of all of them are computed
    config, capacity, step = small(layers, tie_word_embeddings=tied), 128, 8
    inputs = (of(jnp.int32, ROWS, step), cache_of(config, capacity))
    compiler = counted(granite_speech.decode_step, config, *inputs)

    # Then the formula leaves out the elementwise work alone
    formula = work.decode_flops(config, ROWS * step, ROWS * step * (capacity + step))
    assert formula == pytest.approx(compiler, rel=0.025)
    assert formula < compiler


@pytest.mark.parametrize("name", RELEASES)
def test_parameters_are_those_of_the_tree(name: str) -> None:
    # Given every published model, when its parameters are counted, then they are those that would be allocated
    config = RELEASES[name].config
    tree = granite_speech.abstract_params(config)
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree[part])) for part in tree}
    assert work.parameter_count(config) == sizes


@pytest.mark.parametrize("tied", [False, True])
def test_a_decode_step_reads_the_weights_once(tied: bool) -> None:
    # Given heads of their own and tied ones, when the bytes of a step are counted
    config = small(2, tie_word_embeddings=tied)
    embedding = config.decoder.vocab_size * config.decoder.hidden_size
    parameters = work.parameter_count(config)["decoder"]

    # Then there is one matrix as large as the vocabulary, and for each slot the keys and values of all layers
    assert work.decode_bytes(config, 2, 0) == 2 * (parameters - (0 if tied else embedding))
    cache = cache_of(config, 10)
    assert work.decode_bytes(config, 4, 10 * ROWS) - work.decode_bytes(config, 4, 0) == 4 * (
        cache.k.size + cache.v.size
    )


def test_the_released_model_takes_what_was_worked_out_by_hand() -> None:
    # Given granite-4.0-1b-speech, when a second of audio is encoded: 50 frames of 440 million weights or a little less,
    # and ten positions are prefilled: 1.43 billion weights of layers each
    config = Config.granite_4_0_1b()
    assert work.encode(config, 50, 0.25) == pytest.approx(44e9, rel=0.05)
    assert work.prefill(config, 10, 0, 0) == pytest.approx(10 * 2 * 1.43e9, rel=0.05)
    # Then a decode step reads 3.3 GB in bfloat16
    assert work.decode_bytes(config, 2, 0) == pytest.approx(3.3e9, rel=0.02)


def test_work_adds_up() -> None:
    assert Work(1, 2) + Work(3, 5) == Work(4, 7)
    assert Work(1, 2) * 3 == 3 * Work(1, 2) == Work(3, 6)
    assert Work(6, 2).intensity == 3


def test_a_part_filled_block_counts_the_pairs_of_its_frames() -> None:
    # Given rows of 5 s, which are 250 frames: one attention block, and a quarter of the next one
    config = Config.granite_4_0_1b()
    assert config.encoder.context_size == 200
    # When their work is counted, then a quarter of the queries attends to a quarter of the keys
    counted = work.count_work(config, Workload(3, 5.0), 2)
    assert counted["ctc"]["encode"].flops == pytest.approx(work.encode(config, 3 * 250, 3 * (1 + 1 / 16)))
    # And only the language model's audio embeddings need the projector, for 17 windows a row
    projected = counted["speech-lm"]["encode"].flops - counted["ctc"]["encode"].flops
    assert projected == pytest.approx(work.project(config, 3 * 17))
