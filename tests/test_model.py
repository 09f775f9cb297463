"""The model against goldens of transformers, and against itself: batched, padded, in several steps, in other shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import CASES, GOLDEN_CASES, GOLDEN_SOUNDS, STRIDE, fingerprint, golden_path, sounds
from plain_transcriber import PlainTranscriber

from granite_jax.models import granite_speech
from granite_jax.models.layers import decoder
from granite_jax.models.layers.decoder import KVCache
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket
from granite_jax.transcriber import Transcriber

TIE = 1e-3  # where the two best logits are nearer than this, either is right
GARBAGE = 1e4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(CASES["base"].write(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def config(checkpoint):
    return checkpoint.config


@pytest.fixture(scope="module")
def params(checkpoint):
    return checkpoint.load_params("float32")


@pytest.fixture(scope="module")
def utterances() -> list[np.ndarray]:
    """Sixteen sounds of 0.3 to 3 s: chirps in noise, of any loudness."""
    rng = np.random.default_rng(1)
    lengths = [4_800, 48_000, *rng.integers(4_800, 48_000, 14)]
    chirps = [np.sin(2 * np.pi * (rng.uniform(0.01, 0.2) + 1e-6 * np.arange(n)) * np.arange(n)) for n in lengths]
    mixed = [10 ** rng.uniform(-3, -0.5) * (chirp + 0.1 * rng.standard_normal(len(chirp))) for chirp in chirps]
    return [sound.astype(np.float32) for sound in mixed]


@functools.partial(jax.jit, static_argnums=0)
def embed(config, params, samples, lengths):
    """Samples -> every encoder block, the encoder's output, audio embeddings."""
    frames = num_frames(lengths)
    encoded = granite_speech.encode(config, params, log_mel(samples, lengths), frames, capture_layers=True)
    return encoded.layers, encoded.hidden, granite_speech.project(config, params, encoded.hidden, frames)


prefill = jax.jit(granite_speech.prefill, static_argnums=0, static_argnames=("capacity", "dtype"))
step = jax.jit(granite_speech.decode_step, static_argnums=0)


def padded(rows, length: int, filling: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows along the first axis padded to `length`, and their own lengths."""
    batch = np.full((len(rows), length, *rows[0].shape[1:]), filling, rows[0].dtype)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return batch, np.array([len(row) for row in rows], np.int32)


def relative_error(ours, reference: np.ndarray) -> float:
    """The largest difference over the root mean square of the reference."""
    return float(np.max(np.abs(ours - reference)) / np.sqrt(np.mean(np.square(reference))))


def all_positions(tokens) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def random_tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 300, shape, dtype=np.int32)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_activations_logits_and_tokens_are_those_of_transformers(name, tmp_path):
    # Given a checkpoint made from its seed, and what transformers computed with it for two utterances
    checkpoint = open_checkpoint(CASES[name].write(tmp_path))
    config, params, golden = checkpoint.config, checkpoint.load_params("float32"), np.load(golden_path(name))
    assert fingerprint(tmp_path) == golden["fingerprint"], "not the goldens' weights: run `python -m goldens.make`"
    samples, lengths = padded([sounds()[sound] for sound in GOLDEN_SOUNDS], 48_000, GARBAGE)
    answers = [np.concatenate([golden[f"{sound}/prompt"], golden[f"{sound}/tokens"]]) for sound in GOLDEN_SOUNDS]
    tokens, token_lengths = padded(answers, 90, 7)

    # When both are computed in one padded batch
    features = jax.jit(log_mel)(samples, lengths)
    layers, hidden, audio = embed(config, params, samples, lengths)
    logits, cache = prefill(config, params, tokens, token_lengths, audio, logit_positions=all_positions(tokens))

    # Then each stage agrees
    for i, sound in enumerate(GOLDEN_SOUNDS):
        expected = {field: golden[f"{sound}/{field}"] for field in ("features", "layers", "hidden", "audio", "k", "v")}
        frames, positions = num_frames(lengths[i]), len(golden[f"{sound}/prompt"])
        found = {
            "features": features[i, :frames:STRIDE],
            "layers": layers[:, i, :frames:STRIDE],
            "hidden": hidden[i, :frames:STRIDE],
            "audio": audio[i, : len(expected["audio"])],
            "k": cache.k[:, i, :, :positions:STRIDE],
            "v": cache.v[:, i, :, :positions:STRIDE],
        }
        for field, reference in expected.items():
            assert found[field].shape == reference.shape, field
            assert relative_error(found[field], reference) < 1e-4, field

        # And so do the logits and choices of the answer, but for ties
        chosen_by = np.array(logits[i, positions - 1 : token_lengths[i] - 1])
        chosen_by[:, [config.audio_token_id, config.decoder.pad_token_id]] = -np.inf
        reference = golden[f"{sound}/logits"]
        possible = np.isfinite(reference)
        assert relative_error(chosen_by[::STRIDE][possible], reference[possible]) < 1e-4
        decided = golden[f"{sound}/margins"] > TIE
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(chosen_by.argmax(-1)[decided], golden[f"{sound}/tokens"][decided])


@pytest.mark.slow
def test_tokens_do_not_depend_on_batch_order_or_bucket(checkpoint, config, params, utterances):
    # Given every utterance transcribed alone
    @functools.cache
    def load(batch: int, seconds: float) -> Transcriber:
        bucket = make_bucket(config, batch, seconds)
        return PlainTranscriber(config, params, checkpoint.tokenizer(), batch_size=batch, buckets=[bucket])

    def transcribe(batch: int, seconds: float, rows):
        transcripts = load(batch, seconds).transcribe([utterances[i] for i in rows])
        return {row: transcript.tokens for row, transcript in zip(rows, transcripts, strict=True)}

    rows = list(range(16))
    alone = transcribe(1, 3.3, rows)
    assert len(set(alone.values())) > 8, "these texts are too much alike to prove anything"
    shuffled = np.random.default_rng(0).permutation(16).tolist()
    # When all are in one batch, shuffled, or in half batches of a longer bucket
    for found in (transcribe(16, 3.3, rows), transcribe(16, 3.3, shuffled), transcribe(8, 6.1, shuffled)):
        # Then every text is the same, up to a tie of its own
        for row in rows:
            assert_same_but_for_ties(checkpoint, params, utterances[row], found[row], alone[row])


def assert_same_but_for_ties(checkpoint, params, samples, found, expected) -> None:
    if found == expected:
        return
    config, shared = checkpoint.config, 0
    while shared < min(len(found), len(expected)) and found[shared] == expected[shared]:
        shared += 1
    prompt = checkpoint.chat_template().tokens(
        checkpoint.tokenizer(), "can you transcribe the speech into a written format?"
    )
    audio = [config.audio_token_id] * config.num_audio_tokens(num_frames(len(samples)))
    tokens = np.array([[*prompt.prefix, *audio, *prompt.suffix, *expected[:shared]]], np.int32)
    _, _, embeddings = embed(config, params, samples[None], np.array([len(samples)]))
    logits, _ = prefill(config, params, tokens, np.array([tokens.size]), embeddings)
    best = np.sort(np.delete(logits[0, 0], [config.audio_token_id, config.decoder.pad_token_id]))
    assert best[-1] - best[-2] <= TIE, f"differ at token {shared}: {found} and {expected}"


def test_activations_do_not_depend_on_the_batch(config, params, utterances):
    # Given every utterance alone, without any padding
    batch, lengths = padded(utterances, 48_000)
    _, together, audio_together = embed(config, params, batch, lengths)
    _, longer, audio_longer = embed(config, params, np.pad(batch, ((0, 0), (0, 20_000))), lengths)
    for row in (0, 1, 2):
        _, alone, audio = embed(config, params, utterances[row][None], lengths[row : row + 1])
        # When computed in a batch of sixteen, or in longer shapes / Then activations are the same
        for hidden, embeddings in ((together, audio_together), (longer, audio_longer)):
            np.testing.assert_allclose(hidden[row, : alone.shape[1]], alone[0], atol=1e-5)
            np.testing.assert_allclose(embeddings[row, : audio.shape[1]], audio[0], atol=1e-5)


@pytest.mark.parametrize("garbage", [GARBAGE, -1e-3])
def test_what_follows_the_end_of_the_samples_changes_nothing(config, params, utterances, garbage):
    # Given a batch padded with zeros, and with garbage
    rows = utterances[:4]
    clean, lengths = padded(rows, 48_000)
    dirty, _ = padded(rows, 48_000, garbage)
    # When both are encoded
    expected, found = embed(config, params, clean, lengths), embed(config, params, dirty, lengths)
    # Then no bit of any valid frame differs
    for row, frames in enumerate(num_frames(lengths)):
        np.testing.assert_array_equal(found[0][:, row, :frames], expected[0][:, row, :frames])
        np.testing.assert_array_equal(found[1][row, :frames], expected[1][row, :frames])
        count = config.num_audio_tokens(frames)
        np.testing.assert_array_equal(found[2][row, :count], expected[2][row, :count])


def test_frames_past_the_end_change_nothing_in_encoder_and_projector(config, params):
    # Given features whose second row ends within the second attention block and within a projector window
    rng = np.random.default_rng(2)
    features, lengths = rng.standard_normal((2, 100, 160), np.float32), jnp.array([100, 47])
    dirty = features.copy()
    dirty[1, 47:] = GARBAGE

    @jax.jit
    def run(features):
        hidden = granite_speech.encode(config, params, features, lengths).hidden
        return hidden, granite_speech.project(config, params, hidden, lengths)

    # When what follows its end is garbage
    (hidden, audio), (dirty_hidden, dirty_audio) = run(features), run(dirty)
    # Then nothing valid changes, while what the row does hold matters
    np.testing.assert_array_equal(dirty_hidden[1, :47], hidden[1, :47])
    np.testing.assert_array_equal(dirty_audio[1, :12], audio[1, :12])
    features[1, 46] += 1
    assert np.abs(run(features)[0][1, 40] - hidden[1, 40]).max() > 1e-3


def test_tokens_past_the_end_of_a_prompt_change_nothing(config, params):
    # Given prompts of several lengths
    rng = np.random.default_rng(3)
    tokens, lengths = random_tokens(rng, 3, 12), np.array([12, 5, 9], np.int32)
    expected, cache = prefill(config, params, tokens, lengths)
    # When other tokens, or audio, follow their ends
    tokens[np.arange(12) >= lengths[:, None]] = config.audio_token_id
    found, dirty = prefill(config, params, tokens, lengths)
    # Then logits and the valid part of the cache are the same
    np.testing.assert_array_equal(found, expected)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(dirty.k[:, row, :, :length], cache.k[:, row, :, :length])


def test_slots_past_the_length_of_the_cache_are_never_read(config, params):
    # Given a cache, and one whose free slots hold garbage
    rng = np.random.default_rng(4)
    lengths, following = np.array([12, 5, 9], np.int32), random_tokens(rng, 3, 2)
    _, cache = prefill(config, params, random_tokens(rng, 3, 12), lengths, capacity=16)
    free = (np.arange(16) >= lengths[:, None])[None, :, None, :, None]
    dirty = KVCache(jnp.where(free, GARBAGE, cache.k), jnp.where(free, -GARBAGE, cache.v), cache.lengths)
    # When two more tokens are run / Then their logits are the same
    np.testing.assert_array_equal(step(config, params, following, dirty)[0], step(config, params, following, cache)[0])


def test_several_tokens_a_step_equal_one_by_one_with_roll_back(config, params):
    # Given rows of different lengths, and four tokens for each run one by one
    rng = np.random.default_rng(5)
    tokens, following = random_tokens(rng, 3, 12), random_tokens(rng, 3, 4)
    _, start = prefill(config, params, tokens, np.array([12, 5, 9], np.int32), capacity=20)
    cache, single = start, []
    for i in range(4):
        logits, cache = step(config, params, following[:, i : i + 1], cache)
        single.append(logits)
    expected = np.concatenate(single, axis=1)

    # When run in one step
    together, cache_together = step(config, params, following, start)
    # Then logits and caches are the same
    np.testing.assert_allclose(together, expected, atol=1e-4)
    np.testing.assert_array_equal(cache_together.lengths, [16, 9, 13])
    for row, length in enumerate([16, 9, 13]):
        np.testing.assert_allclose(cache_together.k[:, row, :, :length], cache.k[:, row, :, :length], atol=1e-5)

    # When instead wrong tokens follow the first one, two and none of a row, and are rolled back
    kept = np.array([1, 2, 0])
    draft = np.where(np.arange(4) < kept[:, None], following, 299 - following)
    _, cache = step(config, params, draft, start)
    cache = cache.rolled_back(start.lengths + kept)
    rest = np.stack([np.roll(row, -count) for row, count in zip(following, kept, strict=True)])
    again, _ = step(config, params, rest, cache)
    # Then what follows is as if they had never been
    for row, count in enumerate(kept):
        np.testing.assert_allclose(again[row, : 4 - count], expected[row, count:], atol=1e-4)


def test_a_step_reads_the_cache_up_to_its_longest_row_only(config, params):
    # Given a cache of 300 slots, of which rows fill 128 and 20, and one that fills a position more
    rng = np.random.default_rng(8)
    k, v = random_cache(config, rng, 300)
    tokens = random_tokens(rng, 2, 2)
    for longest, prefix in ((128, 128), (129, 192)):
        lengths = np.array([longest, 20], np.int32)
        assert KVCache(k, v, lengths).prefixes == [64, 128, 192, 256, 300]
        expected, _ = step(config, params, tokens, KVCache(k[..., :prefix, :], v[..., :prefix, :], lengths))
        # When the slots of the next sizes hold NaN, which even a weight of 0 would not hide
        unread = np.arange(300)[:, None] >= prefix
        dirty = KVCache(jnp.where(unread, jnp.nan, k), jnp.where(unread, jnp.nan, v), lengths)
        found, _ = step(config, params, tokens, dirty)
        # Then logits are those of a cache without these slots
        np.testing.assert_allclose(found, expected, atol=1e-5)


def random_cache(config, rng: np.random.Generator, capacity: int) -> list[jax.Array]:
    """Keys and values of two rows."""
    decoder = config.decoder
    shape = (decoder.num_hidden_layers, 2, decoder.num_key_value_heads, capacity, decoder.head_dim)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in "kv"]


@pytest.mark.parametrize("capacity", [16, 128, 560, 4096])
def test_few_sizes_of_the_cache_leave_little_to_read_in_vain(capacity):
    # Given a cache, when the size that is read for every number of positions is looked up
    cache = KVCache(*[jax.ShapeDtypeStruct((1, 1, 1, capacity, 1), jnp.float32)] * 2, jnp.zeros(1, jnp.int32))
    positions = np.arange(min(150, capacity), capacity + 1)
    read = np.array([min(size for size in cache.prefixes if size >= count) for count in positions])
    # Then it is less than 15 % too much on average, and there are few sizes
    assert np.mean(read / positions) < 1.15
    assert len(cache.prefixes) <= 30 and cache.prefixes[-1] == capacity


def test_a_step_can_be_differentiated(config, params):
    # Given a cache that is filled in part
    k, v = random_cache(config, np.random.default_rng(9), 200)
    lengths, tokens = jnp.array([130, 20], jnp.int32), jnp.array([[5, 6], [7, 8]], jnp.int32)

    @jax.jit
    def gradients(k, v):
        def total(k):
            return granite_speech.decode_step(config, params, tokens, KVCache(k, v, lengths))[0].sum()

        return jax.grad(total)(k)

    # When logits are differentiated by its keys / Then filled slots have a gradient, and others have none
    found = gradients(k, v)
    filled = np.arange(200) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(np.any(found != 0, axis=(0, 2, 4)), filled)
    # And it is that of a cache without other sizes
    np.testing.assert_allclose(found[..., :130, :], gradients(k[..., :130, :], v[..., :130, :]), atol=1e-5)


def test_prefill_equals_token_by_token(config, params):
    # Given prompts of different lengths with logits of every position
    rng = np.random.default_rng(6)
    tokens, lengths = random_tokens(rng, 3, 12), np.array([12, 5, 9], np.int32)
    expected, _ = prefill(config, params, tokens, lengths, logit_positions=all_positions(tokens))
    # When run token by token from an empty cache
    shape = (config.decoder.num_hidden_layers, 3, config.decoder.num_key_value_heads, 20, config.decoder.head_dim)
    cache = KVCache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(3, jnp.int32))
    for i in range(12):
        logits, cache = step(config, params, tokens[:, i : i + 1], cache)
        # Then each row's logits agree
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-4)


def test_long_prompts_in_chunks_of_queries_equal_the_whole(config, params, monkeypatch):
    # Given a prompt longer than one chunk of queries, and one that ends within the second chunk
    rng = np.random.default_rng(7)
    tokens, lengths = random_tokens(rng, 2, 600), np.array([600, 530], np.int32)
    assert 512 == decoder._QUERY_CHUNK < 600

    def run():  # traced anew each time
        return jax.jit(functools.partial(granite_speech.prefill, config))(
            params, tokens, lengths, logit_positions=all_positions(tokens)[:, ::37]
        )

    chunked, chunked_cache = run()
    # When computed without chunks
    monkeypatch.setattr(decoder, "_QUERY_CHUNK", 600)
    whole, cache = run()
    # Then logits on both sides of the seam agree, and so do the keys
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    np.testing.assert_allclose(chunked_cache.k, cache.k, atol=1e-4)


@pytest.mark.slow
def test_gradients_are_finite_and_stop_at_the_end_of_the_samples(config, params, utterances):
    # Given a short and a long utterance with prompts
    samples, lengths = padded([utterances[0], utterances[1]], 48_000, 0.5)
    counts = config.num_audio_tokens(num_frames(lengths))
    tokens, token_lengths = padded(
        [np.array([5, *[config.audio_token_id] * count, 6, 7], np.int32) for count in counts], 36
    )

    @jax.jit
    def gradients(params, samples):
        def loss(params, samples):
            frames = num_frames(jnp.asarray(lengths))
            encoded = granite_speech.encode(config, params, log_mel(samples, jnp.asarray(lengths)), frames)
            audio = granite_speech.project(config, params, encoded.hidden, frames)
            logits, _ = granite_speech.prefill(config, params, jnp.asarray(tokens), jnp.asarray(token_lengths), audio)
            ctc = jax.nn.log_softmax(granite_speech.ctc_logits(config, params, encoded.hidden))
            valid = jnp.arange(ctc.shape[1])[None, :] < frames[:, None]
            return -jax.nn.log_softmax(logits)[..., 9].sum() - jnp.where(valid, ctc[..., 40], 0).mean()

        return jax.grad(loss, argnums=(0, 1))(params, samples)

    # When a loss is differentiated by weights and samples
    by_params, by_samples = gradients(params, samples)
    # Then all gradients are finite, every weight has one, and padding has none
    for path, leaf in jax.tree.leaves_with_path(by_params):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        assert np.any(leaf != 0), jax.tree_util.keystr(path)
    assert np.all(np.isfinite(by_samples))
    for row, length in zip(np.asarray(by_samples), lengths, strict=True):
        assert np.any(row[:length] != 0) and not np.any(row[length:])


def test_bfloat16_agrees_with_float32_on_almost_all_choices(checkpoint, config, params, utterances):
    # Given the choices of float32 for sixteen utterances, after every position of a random text
    rng = np.random.default_rng(8)
    counts = [config.num_audio_tokens(num_frames(len(sound))) for sound in utterances]
    texts = [np.array([*[config.audio_token_id] * n, *rng.integers(0, 300, 32)], np.int32) for n in counts]
    samples, lengths = padded(utterances, 48_000)
    tokens, token_lengths = padded(texts, 64)
    positions = token_lengths[:, None] - 32 + np.arange(32, dtype=np.int32)

    def logits(params):
        _, _, audio = embed(config, params, samples, lengths)
        return np.asarray(prefill(config, params, tokens, token_lengths, audio, logit_positions=positions)[0])

    expected = logits(params)
    # When weights and activations are bfloat16
    found = logits(checkpoint.load_params("bfloat16"))
    # Then nearly all choices agree, and those that were clear do
    agree = found.argmax(-1) == expected.argmax(-1)
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 0.5
    print(f"bfloat16 agrees on {agree.mean():.3f} of all choices, {agree[clear].mean():.3f} of clear ones")
    assert agree.mean() > 0.9
    assert clear.mean() > 0.5 and agree[clear].mean() > 0.995


def test_the_abstract_tree_is_that_of_random_parameters(config) -> None:
    # Given the tree of shapes, which is made without the random numbers
    abstract = granite_speech.abstract_params(config, jnp.bfloat16)
    # When it is compared with the tree that `init` would return, then paths, shapes and dtypes are the same
    expected = jax.eval_shape(lambda: granite_speech.init(config, jax.random.key(0), jnp.bfloat16))
    assert jax.tree.structure(abstract) == jax.tree.structure(expected)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(expected)
