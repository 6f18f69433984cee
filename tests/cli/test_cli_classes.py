"""``s3tensor prune`` keeps every tensor of a model, whatever class of transformers it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import s3tensor as s3
from s3tensor import cli, llm

transformers = pytest.importorskip("transformers")
from saved_models import byte_level  # noqa: E402 - needs transformers

VOCABULARY = 320
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def classifier() -> Any:
    config = transformers.BertConfig(**_TEXT, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def masked() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT))


def causal() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, bos_token_id=0))


def with_images() -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_IMAGE),
            image_token_index=10,
        )
    )


def encoder_decoder() -> Any:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY,
        num_mel_bins=16, max_source_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def images() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(llm.load_text("pydoc")[:6000], encoding="utf-8")
    return path


def saved(folder: Path, make: Callable[[], Any], tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    if tokenizer:
        byte_level(VOCABULARY).save_pretrained(folder)
    return folder


def prune(model: Path, text: Path, out: Path, *more: str) -> Result:
    options = ("--calibration", text, "--samples", "4", "--seq-len", "16", "--device", "cpu")
    command = ("prune", model, "--out", out, "--eval-samples", "2", *options, *more)
    return CliRunner().invoke(cli.main, [str(each) for each in command])


@pytest.mark.parametrize("make", [classifier, masked, with_images, causal])
@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_a_model_is_pruned_as_the_class_that_its_config_names(
    make: Callable[[], Any], form: str, text: Path, tmp_path: Path
) -> None:
    before = saved(tmp_path / "before", make)
    found = prune(before, text, tmp_path / "after", "--format", form)
    assert found.exit_code == 0, found.output
    name = type(make()).__name__
    assert json.loads((tmp_path / "after/config.json").read_text())["architectures"] == [name]
    if form == "dense":
        kept, all_of_it = (
            load_file(tmp_path / f"{x}/model.safetensors") for x in ("after", "before")
        )
        assert kept.keys() == all_of_it.keys()
        same = {key for key in kept if torch.equal(kept[key], all_of_it[key])}
        assert {key for key in kept if "vision" in key or "classifier" in key} <= same
        assert len(kept.keys() - same) > 0
    else:
        again = s3.from_pretrained(tmp_path / "after")
        assert type(again).__name__ == name
        assert any(isinstance(x, s3.StructuredSparseTensor) for x in again.parameters())


@pytest.mark.parametrize("make", [classifier, masked])
def test_a_model_that_predicts_no_next_token_has_no_perplexity(
    make: Callable[[], Any], text: Path, tmp_path: Path
) -> None:
    found = prune(saved(tmp_path / "before", make), text, tmp_path / "after", "--json")
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["dense_perplexity"] is None and figures["pruned_perplexity"] is None
    assert "no perplexity: Bert" in found.stderr
    outside = {part["name"] for part in figures["outside"]}
    assert "bert.embeddings" in outside
    command = ["eval", str(tmp_path / "before"), "--text", str(text), "--samples", "2"]
    refused = CliRunner().invoke(cli.main, command)
    assert refused.exit_code == 1 and "does not predict the next token" in refused.stderr


@pytest.mark.parametrize(
    ("make", "tokenizer", "takes"),
    [(encoder_decoder, True, "input_features"), (images, False, "pixel_values")],
)
def test_a_model_of_other_inputs_is_refused_in_one_line(
    make: Callable[[], Any], tokenizer: bool, takes: str, text: Path, tmp_path: Path
) -> None:
    found = prune(saved(tmp_path / "before", make, tokenizer), text, tmp_path / "after")
    assert found.exit_code == 1, found.output
    assert f"takes {takes}" in found.stderr
    assert not list((tmp_path / "after").glob("*.safetensors"))


def test_a_class_without_a_place_for_a_tensor_is_refused_by_its_name(
    text: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "before", classifier)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(config))
    found = prune(folder, text, tmp_path / "after")
    assert found.exit_code == 1
    assert "as a BertForMaskedLM would lose bert.pooler.dense.bias and 3 more" in found.stderr
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_tensor_more_or_less_than_the_class_has_is_refused_by_its_name(
    named: bool, text: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "before", causal)
    path = folder / "model.safetensors"
    state = load_file(path)
    if not named:
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    save_file({**state, "visual.proj.weight": torch.ones(2, 2)}, path, {"format": "pt"})
    with pytest.raises(s3.ModelError, match=r"would lose visual\.proj\.weight"):
        s3.load_model(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(s3.ModelError, match=r"random values for model\.layers\.1\.mlp\.up_proj"):
        s3.load_model(folder)


def test_weights_that_the_class_says_to_ignore_are_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "before", causal)
    path = folder / "model.safetensors"
    more = {"mtp.proj.weight": torch.ones(2, 2), "mtp.norm.weight": torch.ones(2)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."], raising=False)
    with pytest.warns(
        UserWarning, match=r"leaves mtp\.norm\.weight and 1 more weights of .*before"
    ):
        s3.load_model(folder)
