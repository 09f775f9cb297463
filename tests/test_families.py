"""A family is one entry of the registry."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctc_family
import hf_fixture
import jax
import numpy as np
import pytest
from batch_jobs import results
from hf_fixture import TINY
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax import batch, cli
from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert, mapping
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.errors import CheckpointError
from granite_jax.models import registry
from granite_jax.models.family import Family
from granite_jax.models.granite_speech.config import read_config
from granite_jax.models.layers import ctc, linear
from granite_jax.models.work import Workload
from granite_jax.planning import roofline
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.partition import param_shardings, split_axis
from granite_jax.text.tasks import Capabilities
from granite_jax.waveform import SAMPLING_RATE

SAMPLES = Path(__file__).parents[1] / "samples"
RELEASED, RENAMED = "encoder.input_linear.weight", "encoder.first.weight"


def _family() -> Family:
    """Granite Speech under another name, with a tensor renamed and one task."""
    base = registry.FAMILIES["granite_speech"]
    rules = tuple(dataclasses.replace(r, hf=RENAMED) if r.hf == RELEASED else r for r in base.tensors.rules)
    return dataclasses.replace(
        base,
        read_config=lambda raw, shapes: dataclasses.replace(
            read_config({**raw, "model_type": "granite_speech"}, shapes), model_type=raw["model_type"]
        ),
        tensors=dataclasses.replace(base.tensors, rules=rules),
        capabilities=Capabilities(tasks=("punctuate",), languages=()),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of `granite_speech_renamed`."""
    directory = tmp_path / "hf"
    hf_fixture.write_random_checkpoint(directory, **TINY)
    tensors = load_file(directory / "model.safetensors")
    tensors[RENAMED] = tensors.pop(RELEASED)
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text()) | {"model_type": "granite_speech_renamed"}
    raw.pop("granite_jax", None)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_an_entry_is_read_converted_and_exported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a registry with one more entry
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "granite_speech_renamed": _family()})
    # When a checkpoint of that type is converted there and back
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    # Then its own tensor names, its tensors and its tasks are those of the entry
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert set(after) == set(before)
    assert all(np.array_equal(after[name], before[name]) for name in before if "num_batches_tracked" not in name)
    opened = open_checkpoint(tmp_path / "orbax")
    assert opened.config.model_type == "granite_speech_renamed"
    assert opened.capabilities.tasks == ("punctuate",)
    assert flatten(opened.read())["encoder.input.kernel"].T.tolist() == before[RENAMED].tolist()


def test_an_unknown_type_is_named(source: Path) -> None:
    # Given a checkpoint of a type without an entry, when it is opened, then the error names the file, type and choices
    with pytest.raises(CheckpointError, match=r"config\.json: config: model_type 'granite_speech_renamed' .*only"):
        open_checkpoint(source)


@pytest.fixture(scope="module")
def encoder_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded checkpoint's encoder as a checkpoint of a registered family without anything else."""
    directory, demo = tmp_path_factory.mktemp("ctc") / "hf", open_checkpoint("demo")
    directory.mkdir()
    encoder = dataclasses.replace(demo.config.encoder, bpe_output_dim=0)
    recorded = {name: demo.raw_config["granite_jax"][name] for name in ("word_offsets", "segment_seconds")}
    raw = {"model_type": "tiny_ctc", "encoder": dataclasses.asdict(encoder), "granite_jax": recorded}
    (directory / "config.json").write_text(json.dumps(raw))
    shutil.copy(demo.directory / "tokenizer.json", directory)
    leaves = {path: leaf for path, leaf in demo.leaves() if path in ctc_family.PATHS}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    tensors = mapping.hf_tensors(ctc_family.FAMILY.tensors, shapes)
    save_file(
        {name: np.array(tensor_of(leaves[path]), np.float32) for name, _, path, tensor_of in tensors},
        directory / "model.safetensors",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "tiny_ctc", ctc_family.FAMILY)
        yield directory


@pytest.fixture(scope="module")
def asr(encoder_alone: Path) -> gj.Transcriber:
    buckets = [Bucket(rows, 10 * SAMPLING_RATE, 0, 0) for rows in (1, 2)]
    return gj.Transcriber.from_pretrained(encoder_alone, dtype="float32", batch_size=2, buckets=buckets)


def test_a_family_of_an_encoder_alone_transcribes(asr: gj.Transcriber) -> None:
    # Given real sentences, and what the embedded checkpoint's encoder writes of them
    sounds = [str(SAMPLES / name) for name in ("request.wav", "one-name.wav", "two-names.wav")]
    expected = gj.Transcriber.from_pretrained("demo", dtype="float32", batch_size=2).transcribe(
        sounds, recognizer="ctc", word_timestamps=True, keywords=["kravdab"]
    )
    # When a family with the same encoder transcribes them, with its only recognizer
    found = asr.transcribe(sounds, word_timestamps=True, keywords=["kravdab"])
    # Then texts, tokens, words, confidences and keywords are the same
    assert [transcript.text for transcript in found] == [transcript.text for transcript in expected]
    assert all(transcript.text and transcript.stats["route"] == "ctc" for transcript in found)
    assert [transcript.segments for transcript in found] == [transcript.segments for transcript in expected]
    assert [transcript.tokens for transcript in found] == [transcript.tokens for transcript in expected]
    # And alone in its batch, each has the same result
    assert asr.transcribe(sounds[1], word_timestamps=True, keywords=["kravdab"]) == found[1]


def test_recordings_and_emissions_of_an_encoder_alone(asr: gj.Transcriber) -> None:
    # Given a recording of several segments, when it is transcribed, then its segments have times and words
    recording = asr.transcribe(str(SAMPLES / "long.wav"), segment_seconds=8, word_timestamps=True)
    assert len(recording.segments) > 2 and all(segment.words for segment in recording.segments)
    # And the emissions spell the text of one sentence
    emissions = asr.ctc_emissions(str(SAMPLES / "request.wav"))
    assert (
        ctc.to_text(emissions.ctc_logits.argmax(-1)).split()
        == asr.transcribe(str(SAMPLES / "request.wav")).text.split()
    )


@pytest.mark.parametrize("fields", [{"task": "translate", "target_language": "fr"}, {"draft_from": "ctc"}], ids=str)
def test_options_of_a_language_model_are_refused_without_one(asr: gj.Transcriber, fields: dict[str, Any]) -> None:
    with pytest.raises(gj.GraniteError, match=f"{next(iter(fields))} is for the language model"):
        asr.transcribe(np.zeros(16_000, np.float32), **fields)
    with pytest.raises(gj.GraniteError, match="recognizer='speech-lm' cannot run 'tiny_ctc', only 'ctc' can"):
        asr.transcribe(np.zeros(16_000, np.float32), recognizer="speech-lm")
    with pytest.raises(gj.GraniteError, match="draft is for the language model"):
        asr.transcribe(np.zeros(16_000, np.float32), draft="x")


def test_limits_of_an_encoder_alone_are_named(asr: gj.Transcriber, encoder_alone: Path) -> None:
    # Given a family without a language model, when audio is longer than its buckets or the model allow
    # Then the error says so, without positions that the model does not have
    for seconds, problem in (
        (20, "20.0 s of audio exceed every bucket"),
        (61, "60 seconds, more than the model takes"),
    ):
        with pytest.raises(gj.ContextError, match=problem):
            asr.transcribe(np.zeros(seconds * SAMPLING_RATE, np.float32), segment_seconds=None)
    # And when programs of a recognizer that it does not have are asked for, then the error names those it has
    for compile_ahead in (True, False):
        with pytest.raises(gj.GraniteError, match="recognizer='speech-lm' cannot run 'tiny_ctc', only 'ctc' can"):
            gj.Transcriber.from_pretrained(encoder_alone, recognizer="speech-lm", compile_ahead=compile_ahead)


def test_a_family_is_converted_inspected_planned_and_run_in_batches(encoder_alone: Path, tmp_path: Path) -> None:
    # Given a checkpoint of the family, when it is converted there and back
    convert(encoder_alone, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    # Then no bit has changed
    before, after = (load_file(path / "model.safetensors") for path in (encoder_alone, tmp_path / "back"))
    assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)
    # And it is described without limits that it does not have
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "orbax")])
    assert result.exit_code == 0 and "positions" not in result.output and "60 s" in result.output
    # And several devices give the text of one, by every way of spreading rows
    texts = [
        gj.Transcriber.from_pretrained(
            tmp_path / "orbax", dtype="float32", batch_size=1, devices=jax.devices()[:count], parallel=parallel,
            buckets=[Bucket(1, 10 * SAMPLING_RATE, 0, 0)], compilation_cache=False,
        ).transcribe([str(SAMPLES / "request.wav"), str(SAMPLES / "one-name.wav")])
        for count, parallel in ((1, "shard_map"), (2, "shard_map"), (2, "pmap"))
    ]  # fmt: skip
    assert texts[0] == texts[1] == texts[2]
    # And a job's lines have them
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "a", "audio": "request.wav"}) + "\n")
    batch.run(tmp_path / "manifest.jsonl", tmp_path / "out", tmp_path / "orbax", root=SAMPLES, batch_size=1)
    (line,) = results(tmp_path / "out")
    assert line["text"] == texts[0][0].text
    # And nothing is claimed of a chip for which its work is not counted, or of a recognizer that it does not have
    for recognizer, problem in (("ctc", "no roofline for 'tiny_ctc'"), ("speech-lm", "cannot run 'tiny_ctc'")):
        with pytest.raises(gj.GraniteError, match=problem):
            roofline.roofline(ctc_family.TINY, roofline.CHIPS["v5e"], Workload(1, 10.0), recognizer=recognizer)


def test_the_encoder_is_that_of_any_recognizer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given Granite Speech, and a family whose only recognizer is its language model's
    base = registry.FAMILIES["granite_speech"]
    alone = dataclasses.replace(base, recognizers={"speech-lm": base.recognizers["speech-lm"]})
    config = registry.release("granite-4.0-1b-speech").config
    # When their encoder is looked up, then both have the same one
    assert registry.encoder_of(config) is base.recognizers["ctc"]
    monkeypatch.setitem(registry.FAMILIES, "granite_speech", alone)
    assert registry.encoder_of(config) is base.recognizers["ctc"]


def test_published_models_have_names_of_their_own() -> None:
    # Given all families, when their published models are joined, then each is found by its name, with its family's type
    assert len(registry.releases()) == sum(len(family.releases) for family in registry.FAMILIES.values())
    for model_type, family in registry.FAMILIES.items():
        assert {release.config.model_type for release in family.releases.values()} <= {model_type}


def test_a_model_is_split_by_its_familys_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a family with a rule for one kind of layer, in every form of its weights
    rules = {r"encoder\.layers\.ff1\.up": linear.OUTPUTS, r"encoder\.layers\.ff1\.down": linear.INPUTS}
    monkeypatch.setitem(
        registry.FAMILIES,
        "tiny_ctc",
        dataclasses.replace(ctc_family.FAMILY, partition_rules=lambda config, parts: rules),
    )
    # When its weights are placed on two devices that share a copy
    shardings = flatten(param_shardings(ctc_family.TINY, DeviceMesh.make(jax.devices()[:2], model_parallel=2)))
    # Then outputs and inputs are split, and nothing else is
    split = {path: tuple(sharding.spec) for path, sharding in shardings.items() if any(sharding.spec)}
    assert split == {
        "encoder.layers.ff1.up.kernel": (None, None, "model"),
        "encoder.layers.ff1.up.bias": (None, "model"),
        "encoder.layers.ff1.down.kernel": (None, "model"),
    }
    axes = {part: split_axis(rules, f"encoder.layers.3.ff1.down.{part}") for part in ("q", "scale", "a", "b", "bias")}
    assert axes == {"q": -2, "scale": None, "a": -2, "b": None, "bias": None}


def test_tensors_of_another_rank_are_named(tmp_path: Path) -> None:
    # Given a checkpoint with a convolution's kernel of one axis, from which no shape of a leaf follows
    hf_fixture.write_random_checkpoint(tmp_path / "hf", **TINY)
    tensors, name = load_file(tmp_path / "hf/model.safetensors"), "encoder.layers.0.conv.up_conv.weight"
    save_file({**tensors, name: tensors[name].reshape(-1)}, tmp_path / "hf/model.safetensors")
    # When it is read, then the error names the tensor
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_checkpoint(tmp_path / "hf").read()
