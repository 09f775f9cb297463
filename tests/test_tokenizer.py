"""The tokenizer: the file's ids, no interpretation of special tokens in text, clear errors, safe in threads."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from granite_jax.errors import CheckpointError, PromptError
from granite_jax.text.tokenizer import SpecialToken, Tokenizer

SPECIALS = ["<|end_of_text|>", "<|pad|>", "<|audio|>"]
TEXT = ["USER: can you transcribe the speech into a written format?\n ASSISTANT: the cat sat on the mat"] * 20
# The rule of Granite's files: a run of punctuation takes the line feeds after it along.
GRANITE_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(pre_tokenizer):
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(TEXT, trainer)
    return reference


@pytest.fixture(scope="module")
def reference():
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="module")
def tokenizer(reference):
    return Tokenizer(reference.to_str())


@pytest.mark.parametrize("text", ["", "the cat sat", " naïve 日本 🎙\n", "can you transcribe the speech?\n ASSISTANT:"])
def test_text_is_encoded_as_the_file_says_and_decoded_back(reference, tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", "the cat sat", " naïve 日本 🎙\n", "odd \ufffd"])
def test_pieces_are_what_each_id_adds(tokenizer, text):
    # Given ids, of which several may spell one character
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    # Then there is a piece for each, and together they are the text, without halves of characters
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    # And an unfinished character at the end is there as what it is
    assert "".join(tokenizer.pieces(tokenizer.encode("日")[:-1])) == tokenizer.decode(tokenizer.encode("日")[:-1])


def test_special_tokens_in_text_are_plain_text(reference, tokenizer):
    text = "a<|audio|>b<|end_of_text|>"
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == text
    assert set(reference.encode(text).ids) & tokenizer.special_ids  # which the reference alone would have interpreted


def test_special_tokens_of_a_template_are_found_with_their_places(tokenizer):
    found = tokenizer.find_special("é<|audio|> b<|end_of_text|>")
    assert found == [SpecialToken(1, 10, 2), SpecialToken(12, 27, 0)]


def test_decoding_leaves_out_special_and_unknown_ids(tokenizer):
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([2, *ids, 0, 1, tokenizer.vocab_size + 5]) == "the cat"


def test_vocabulary_counts_added_tokens(reference):
    reference = tokenizers.Tokenizer.from_str(reference.to_str())
    size = reference.get_vocab_size()
    reference.add_special_tokens(["<|new|>"])
    tokenizer = Tokenizer(reference.to_str())
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.special_id("<|new|>") == size


def test_an_absent_special_token_is_named(tokenizer):
    with pytest.raises(CheckpointError, match=r"no token '<\|nope\|>'"):
        tokenizer.special_id("<|nope|>")


def test_no_bos_padding_or_truncation_is_added_whatever_the_file_says(reference):
    # Given a file with a post-processor, truncation and padding
    reference = tokenizers.Tokenizer.from_str(reference.to_str())
    reference.post_processor = tokenizers.processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    reference.enable_truncation(2)
    reference.enable_padding(length=64)
    plain = reference.encode("the cat sat on the mat").ids
    # When text is encoded, then its own ids are all there is
    tokenizer = Tokenizer(reference.to_str())
    assert len(plain) == 64
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"
    assert 1 not in tokenizer.encode("the cat sat on the mat")


def test_gpt2_pre_tokenizer_splits_punctuation_from_line_feeds():
    # Given a file with Granite's rule, under which "?" and a line feed are one word
    split = pre_tokenizers.Split(Regex(GRANITE_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    granite = train(pre_tokenizers.Sequence([split, byte_level]))
    as_filed, as_gpt2 = (Tokenizer(granite.to_str(), pre_tokenizer=rule) for rule in ("file", "gpt2"))
    # When both rules encode it, then only the file's merges the two
    assert as_filed.encode("?\n") == [granite.token_to_id("?Ċ")]
    assert as_gpt2.encode("?\n") == [granite.token_to_id("?"), granite.token_to_id("Ċ")]


def test_text_that_is_no_unicode_is_a_prompt_error(tokenizer):
    with pytest.raises(PromptError, match="cannot be tokenized"):
        tokenizer.encode("a\ud800b")


def test_threads_may_share_a_tokenizer(tokenizer):
    text = "the cat <|audio|> sat"
    expected = tokenizer.encode(text), tokenizer.find_special(text)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: (tokenizer.encode(text), tokenizer.find_special(text)), range(400)))
    assert all(result == expected for result in results)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (b'{"model": ' * 5_000, "not a tokenizer"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_unusable_files_are_checkpoint_errors_that_name_them(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json': .*{reason}") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_from_file_reads_what_was_saved(tmp_path, reference, tokenizer):
    reference.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode(TEXT[0]) == tokenizer.encode(TEXT[0])


def test_mutated_files_raise_nothing_but_checkpoint_errors(reference, num_cases):
    # Given small files with a few characters changed
    reference = tokenizers.Tokenizer.from_str(reference.to_str())
    definition = json.dumps(json.loads(reference.to_str()), ensure_ascii=False)
    generator = random.Random(0)
    refused = 0
    for _ in range(num_cases):
        characters = list(definition)
        for _ in range(generator.randint(1, 4)):
            characters[generator.randrange(len(characters))] = generator.choice('"{}[],:09-x\\')
        # When one is read, then it is a tokenizer or a CheckpointError
        try:
            Tokenizer("".join(characters)).encode("the <|audio|> cat")
        except CheckpointError:
            refused += 1
    assert 0 < refused < num_cases
