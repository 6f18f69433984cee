"""``s3tensor compare``, ``convert`` and ``--config``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.io import pretrained as hf

transformers = pytest.importorskip("transformers")
from saved_models import byte_level  # noqa: E402 - needs transformers


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
    fast = byte_level(300, text.read_text(encoding="utf-8"))
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
    assert "--overwrite" in found.stderr and "overwrite=True" not in found.stderr


def test_convert_changes_the_dtype_of_what_is_compressed(dense: Path, tmp_path: Path) -> None:
    sparse, small, half = (tmp_path / name for name in ("sparse", "small", "half"))
    assert run("convert", dense, "--to", "compressed", "--out", sparse).exit_code == 0
    assert run("convert", sparse, "--to", "compressed", "--int8", "--out", small).exit_code == 0
    command = ("--to", "compressed", "--dtype", "bfloat16", "--out")
    for source, target in ((sparse, half), (small, tmp_path / "small-half")):
        found = run("convert", source, *command, target)
        assert found.exit_code == 0, found.output
        assert "14 sparse weights satisfy 2:4, rowpair16" in run("verify", target).stdout
        one, other = hf.load_model(source)[0], hf.load_model(target)[0]
        assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert b.dtype == torch.bfloat16 and type(a) is type(b), name
            expected, got = hf.densified(a.detach()), hf.densified(b.detach())
            # With int8 values a scale is rounded, then its product: twice half a unit of 2**-8.
            assert torch.allclose(got.float(), expected, rtol=2**-8 + 2**-17, atol=0), name
            assert source == small or torch.equal(got, expected.bfloat16()), name
    as_it_is = run("convert", half, "--to", "compressed", "--out", tmp_path / "x")
    assert as_it_is.exit_code == 1 and "--dtype" in as_it_is.stderr


LOADING = "The weights are compressed"


def test_a_card_follows_a_model_through_conversions(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["s3tensor", "convert"])
    sparse, plain, small = (tmp_path / name for name in ("sparse", "plain", "small"))
    assert run("convert", dense, "--to", "compressed", "--out", sparse).exit_code == 0
    assert not (sparse / "README.md").exists()  # nothing was known
    known = {
        "model": "some/model", "pattern": "a | b", "pruner": "admm", "dense_perplexity": 17.5,
        "pruned_perplexity": 21.25, "calibration": {"source": "c4"},
        "command": "s3tensor prune some/model",
    }  # fmt: skip
    s3.save_pretrained(*hf.load_model(sparse)[:1], tmp_path / "known", card=known)
    hf.load_model(sparse)[1].save_pretrained(tmp_path / "known")
    kept = (
        "| Pruned from | some/model |", "| Pruner | admm |", "| Perplexity before | 17.5 |",
        "| Calibration | source c4 |", "    s3tensor prune some/model",
    )  # fmt: skip

    def card(folder: Path) -> str:
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert set(kept) <= set(text.splitlines()), text
        assert text.count("## Structured sparsity") == 1
        return text

    assert LOADING in card(tmp_path / "known")
    assert run("convert", tmp_path / "known", "--to", "dense", "--out", plain).exit_code == 0
    text = card(plain)
    assert LOADING not in text and "import s3tensor" not in text
    assert "| Pattern | a \\| b |" in text and "| Perplexity after | 21.25 |" in text
    assert text.count("\n    s3tensor ") == 2  # how it was pruned, and converted
    options = ("--to", "compressed", "--int8", "--out", small)
    assert run("convert", plain, *options).exit_code == 0
    text = card(small)
    assert LOADING in text
    assert "| Pattern | 2:4 with int8 values (7 weights), rowpair16 with int8 values" in text
    assert "| Perplexity after | 21.25, before convert --int8 |" in text
    assert text.count("\n    s3tensor ") == 3
    # In place.
    (small / "README.md").write_text("# Mine\n\n" + text, encoding="utf-8")
    assert run("convert", small, "--to", "dense", "--out", small, "--overwrite").exit_code == 0
    text = card(small)
    assert text.startswith("# Mine\n") and LOADING not in text


def test_the_card_of_a_model_that_is_replaced_goes_with_it(dense: Path, tmp_path: Path) -> None:
    model, tokenizer = hf.load_model(dense)
    s3.save_pretrained(model, tmp_path / "a", tokenizer, card={"pruner": "wanda"})
    command = ("--to", "compressed", "--out", tmp_path / "a", "--overwrite")
    assert run("convert", dense, *command).exit_code == 0
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "wanda" not in text and LOADING in text


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


def test_a_narrow_terminal_folds_names_and_cuts_no_figure() -> None:
    from rich.console import Console

    from s3tensor.cli.compare import _table
    from s3tensor.evaluate.compare import Side

    name, patterns = "some-owner/some-model-135M", ("pair4:8", "rowpair16")
    side = Side(name, 1, 538_100_000, 210, patterns, 0.5, 345.67, 0.1234, 1.0)
    for width in (40, 60, 80, 120):
        console = Console(soft_wrap=True, width=width, record=True, file=io.StringIO())
        console.print(_table([side, side], width))
        text = console.export_text()
        assert "…" not in text
        for figure in ("538.1 MB", "1.000", "0.500", "345.67", "0.1234", "100.0%"):
            assert text.count(figure) == 2, text
        rows = [line.strip("│").split("│") for line in text.splitlines() if "│" in line]
        assert "".join(row[0].strip() for row in rows) == 2 * name
        if width >= 60:
            assert max(map(len, text.splitlines())) <= width


def test_a_configuration_gives_defaults_and_the_command_line_counts_first(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("bench:\n  shape: [16x64]\n  batch: [1, 2]\n  device: cpu\n  json: true\n")
    rows = json.loads(run("--config", config, "bench").stdout)["rows"]
    assert [(row["rows"], row["batch"]) for row in rows] == [(16, 1), (16, 2)]
    rows = json.loads(run("--config", config, "bench", "--batch", "3").stdout)["rows"]
    assert [row["batch"] for row in rows] == [3]


def test_a_configuration_takes_a_bare_pattern_and_one_value_of_several(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    for pattern, shape in (("2:4", "16x64"), ("[2:4, 4:8]", "[16x64, 32x64]")):
        config.write_text(
            f"bench: {{pattern: {pattern}, shape: {shape}, batch: 1, device: cpu, json: true}}\n"
        )
        done = run("--config", config, "bench")
        assert done.exit_code == 0, done.output
        found = {(row["pattern"], row["rows"]) for row in json.loads(done.stdout)["rows"]}
        assert found >= {("2:4", 16)} and len(found) == (4 if "[" in pattern else 1)


def test_yaml_numbers_are_numbers_and_what_has_a_colon_is_not(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("[2:4, 1:30.5, 12, -3, 0x10, 0.5, 1.0e+3, .inf, true, null, '2', a]")
    found = cli.group.read_yaml(file)
    assert found == ["2:4", "1:30.5", 12, -3, 16, 0.5, 1000.0, float("inf"), True, None, "2", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bench: {shap: 1}", "bench has no option 'shap'; it has batch"),
        ("bunch: {}", "no command 'bunch'; there are bench"),
        ("bench: 3", "bench must map options"),
        ("- bench", "must map commands"),
        ("a: [", "is not YAML"),
        ("bench: {shape: [3x6], pattern: ['2:4'], device: cpu}", "2:4 does not fit"),
    ],
)
def test_a_configuration_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    found = run("--config", config, "bench")
    assert found.exit_code == 2 and message in found.stderr, found.output
    assert len(found.stderr.splitlines()) == 1
