"""``s3tensor compare``, ``convert`` and ``--config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import s3tensor as s3
from s3tensor import cli, hf, llm

transformers = pytest.importorskip("transformers")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(llm.load_text("pydoc")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a random Llama with zeros: 2:4 in the first block, rowpair16 in the other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text.read_text(encoding="utf-8")], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(fast), max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            pattern = "2:4" if ".0." in name else "rowpair16"
            module.weight.data *= s3.project(module.weight, pattern)
    folder = tmp_path_factory.mktemp("models") / "plain"
    hf.save_pretrained(model, folder, fast, dense=True)
    return folder


def test_convert_there_and_back_changes_no_value(dense: Path, tmp_path: Path) -> None:
    sparse, again = tmp_path / "sparse", tmp_path / "again"
    there = run("convert", dense, "--to", "compressed", "--out", sparse)
    assert there.exit_code == 0, there.output
    assert "compressed 7 to rowpair16, 7 to 2:4" in there.stdout
    rows = json.loads(run("verify", sparse, "--json").stdout)
    assert sorted({row["pattern"] for row in rows}) == ["2:4", "rowpair16"] and len(rows) == 14
    back = run("convert", sparse, "--to", "dense", "--out", again)
    assert back.exit_code == 0, back.output
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, again)
    )
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_convert_rounds_values_to_int8(dense: Path, text: Path, tmp_path: Path) -> None:
    sparse, small, again = (tmp_path / name for name in ("sparse", "small", "again"))
    assert run("convert", dense, "--to", "compressed", "--out", sparse).exit_code == 0
    found = run("convert", sparse, "--to", "compressed", "--int8", "--out", small)
    assert found.exit_code == 0, found.output
    assert "14 compressed weights have int8 values" in found.stdout
    at_once = run("convert", dense, "--to", "compressed", "--int8", "--out", again)
    assert at_once.exit_code == 0 and "compressed 7 to rowpair16, 7 to 2:4" in at_once.stdout
    assert (small / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert "14 sparse weights satisfy 2:4, rowpair16" in run("verify", small).stdout
    options = ("--text", text, "--samples", "3", "--seq-len", "16", "--device", "cpu")
    rows = json.loads(run("compare", sparse, small, *options, "--json").stdout)
    assert rows[1]["sparse_weights"] == 14 and rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    assert 0 < rows[1]["divergence"] < 1e-3
    rounded = run("eval", small, *options)
    assert rounded.exit_code == 0, rounded.output
    back = run("convert", small, "--to", "dense", "--out", tmp_path / "plain")
    assert back.exit_code == 0, back.output
    wrong = run("convert", small, "--to", "dense", "--int8", "--out", tmp_path / "x")
    assert wrong.exit_code == 2 and "--to compressed" in wrong.stderr
    twice = run("convert", small, "--to", "compressed", "--int8", "--out", tmp_path / "x")
    assert twice.exit_code == 1 and "has int8 values" in twice.stderr
    again = run("convert", small, "--to", "compressed", "--out", tmp_path / "x")
    assert again.exit_code == 1 and "compressed already" in again.stderr
    other = "--to", "compressed", "--int8", "--pattern", "1:4", "--out", tmp_path / "x"
    missed = run("convert", sparse, *other)
    assert missed.exit_code == 1 and "satisfies 1:4" in missed.stderr
    half = run("convert", sparse, *other[:3], "--dtype", "bfloat16", "--out", tmp_path / "half")
    assert half.exit_code == 0, half.output
    entry = json.loads((tmp_path / "half/config.json").read_text())
    assert (entry["dtype"], len(entry["quantization_config"]["int8"])) == ("bfloat16", 14)
    pruned = run("prune", small, "--calibration", text, "--out", tmp_path / "x", *options[2:])
    assert pruned.exit_code == 1 and "compressed already" in pruned.stderr, pruned.output


def test_convert_refuses_what_has_no_pattern_and_what_is_there(dense: Path, tmp_path: Path) -> None:
    found = run("convert", dense, "--to", "compressed", "--pattern", "1:4", "--out", tmp_path / "a")
    assert found.exit_code == 1 and "no weight of" in found.stderr and "1:4" in found.stderr
    assert not (tmp_path / "a").exists()
    found = run("convert", dense, "--to", "dense", "--out", dense)
    assert found.exit_code == 1 and "already" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_compare_shows_models_side_by_side(dense: Path, text: Path, tmp_path: Path) -> None:
    assert run("convert", dense, "--to", "compressed", "--out", tmp_path / "sparse").exit_code == 0
    options = ("--text", text, "--samples", "3", "--seq-len", "16", "--device", "cpu")
    found = run("compare", dense, tmp_path / "sparse", *options, "--json")
    assert found.exit_code == 0, found.output
    first, second = json.loads(found.stdout)
    assert (first["name"], second["name"]) == ("plain", "sparse")
    assert second["divergence"] < 1e-6 and second["agreement"] == 1.0
    assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert second["sparse_weights"] == 14 and second["density"] == 0.5
    assert second["weight_bytes"] < first["weight_bytes"]
    table = run("compare", dense, tmp_path / "sparse", *options)
    assert table.exit_code == 0
    assert "100.0%" in table.stdout and "ppl" in table.stdout, table.stdout
    alone = run("compare", dense, *options)
    assert alone.exit_code == 2 and "two models or more" in alone.stderr


def test_a_configuration_gives_defaults_and_the_command_line_counts_first(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("bench:\n  shape: [16x64]\n  batch: [1, 2]\n  device: cpu\n  json: true\n")
    rows = json.loads(run("--config", config, "bench").stdout)["rows"]
    assert [(row["rows"], row["batch"]) for row in rows] == [(16, 1), (16, 2)]
    rows = json.loads(run("--config", config, "bench", "--batch", "3").stdout)["rows"]
    assert [row["batch"] for row in rows] == [3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bench: {shap: 1}", "bench has no option 'shap'; it has batch"),
        ("bunch: {}", "no command 'bunch'; there are bench"),
        ("bench: 3", "bench must map options"),
        ("- bench", "must map commands"),
        ("a: [", "is no YAML"),
        ("bench: {shape: [3x6], pattern: ['2:4'], device: cpu}", "2:4 does not fit"),
    ],
)
def test_a_configuration_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    found = run("--config", config, "bench")
    assert found.exit_code == 2 and message in found.stderr, found.output
    assert len(found.stderr.splitlines()) == 1
