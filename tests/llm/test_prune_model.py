"""Whole models: structure, calibration, plan and run, resuming, and every kind of refusal."""

from __future__ import annotations

import csv
import inspect
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.llm import calibrate, chain, plan, progress, run, structure
from s3tensor.text import text

transformers = pytest.importorskip("transformers")
import tiny_models  # noqa: E402 - needs transformers
from tiny_models import VOCABULARY  # noqa: E402

LINUX = sys.platform == "linux"


def tiny(kind: str, blocks: int = 2) -> nn.Module:
    """A small random language model; a Llama with tied embeddings."""
    return tiny_models.tiny("llama, tied" if kind == "llama" else kind, blocks, positions=128)


def batches(count: int = 4, tokens: int = 24) -> list[torch.Tensor]:
    return tiny_models.batches(count, tokens)


FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_linear_of_every_family_is_pruned_and_compressed(kind: str) -> None:
    model = tiny(kind)
    head = model.get_output_embeddings().weight.detach().clone()
    report = llm.prune_model(model, batches(), "2:4", progress=False)
    linears = [
        m for b in llm.decoder_blocks(model)[1] for m in b.modules() if structure.is_linear(m)
    ]
    assert len(report.linears) == len(linears) == (8 if kind == "gpt2" else 14)
    for linear in linears:
        weight = linear.weight
        assert isinstance(weight, s3.StructuredSparseTensor)
        upright = weight.t() if weight.transposed else weight
        assert s3.satisfies(upright.to_dense(), "2:4")
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert all(0 < row.error < 1 for row in report.linears)
    assert not report.skipped


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_compressed_model_computes_what_the_dense_one_with_zeros_computes(kind: str) -> None:
    model = tiny(kind)
    llm.prune_model(model, batches(), "2:4", "magnitude", progress=False)
    ids = batches(1)[0]
    with torch.no_grad():
        compressed = model(input_ids=ids).logits
    for block in llm.decoder_blocks(model)[1]:
        for module in block.modules():
            if structure.is_linear(module):
                dense = module.weight.to_dense()
                module.weight = nn.Parameter(dense.contiguous(), requires_grad=False)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    # The same products in float32; only the memory layout given to the matmul may differ.
    torch.testing.assert_close(compressed, plain, rtol=1e-5, atol=1e-6)


CPU = torch.device("cpu")


def test_linears_that_share_an_input_share_a_group_in_the_order_of_their_calls() -> None:
    model = tiny("llama", 1)
    prefix, blocks = llm.decoder_blocks(model)
    assert prefix == "model.layers"
    layers, _ = llm.prunable_layers(blocks[0], prefix, s3.Pattern.parse("2:4"))
    chunk = chain.catch_chunks(model, blocks, batches(1), "cpu")[0]
    runner = calibrate.BlockRunner(blocks[0], 0, prefix, CPU, CPU)
    groups = runner.input_groups(chunk, [layer.module for layer in layers])
    assert [[layers[i].name.rpartition(".")[2] for i in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_the_dense_target_lowers_the_error_of_the_last_block_on_calibration_data() -> None:
    def last_error(alpha: float) -> float:
        report = llm.prune_model(tiny("llama", 3), batches(8), "2:4", alpha=alpha, progress=False)
        return report.blocks[-1].error

    assert last_error(0.5) < last_error(0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_error_of_a_block_is_that_of_the_pruned_models_hidden_states(
    kind: str, alpha: float
) -> None:
    def hidden(model: nn.Module, block: int) -> torch.Tensor:
        """What a block gives on all batches, in a pass of the whole model."""
        with s3.ModuleInputCatcher(llm.decoder_blocks(model)[1][block + 1]) as catcher:
            for batch in batches():
                catcher.run(model, input_ids=batch, use_cache=False)
        return torch.cat([calibrate.split_hidden(*call)[0] for call in catcher.inputs[0]]).double()

    model = tiny(kind, 3)
    report = llm.prune_model(model, batches(), "2:4", alpha=alpha, progress=False)
    with torch.no_grad():
        for row in report.blocks[:-1]:
            dense = hidden(tiny(kind, 3), row.block)
            lost = (hidden(model, row.block) - dense).norm() / dense.norm()
            assert row.error == pytest.approx(float(lost), rel=1e-4)


def test_pruning_is_deterministic() -> None:
    def state() -> dict[str, torch.Tensor]:
        model = tiny("llama")
        llm.prune_model(model, batches(), "2:4", compress=False, progress=False)
        return model.state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_linear_that_does_not_fit_is_skipped_with_the_reason_or_refused() -> None:
    model = tiny("llama")
    pattern = s3.Pattern(block=(1, 1), scope=(1, 64), keep=32)  # fits down_proj (64 inputs) alone
    report = llm.prune_model(model, batches(), pattern, "magnitude", progress=False)
    assert len(report.linears) == 2
    assert len(report.skipped) == 12
    assert "multiple of 64" in report.skipped[0][1]
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(s3.PatternError, match=r"q_proj.*multiple of 64"):
        llm.prune_model(model, batches(), pattern, "magnitude", on_misfit="error", progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_filter_leaves_linears_dense() -> None:
    model = tiny("llama")
    report = llm.prune_model(
        model,
        batches(),
        "2:4",
        "magnitude",
        filter_fn=lambda _, name: "mlp" in name,
        progress=False,
    )
    assert {row.name.split(".")[3] for row in report.linears} == {"mlp"}
    assert not isinstance(model.model.layers[0].self_attn.q_proj.weight, s3.StructuredSparseTensor)


def test_only_the_first_blocks_are_pruned_when_asked() -> None:
    model = tiny("llama", 3)
    report = llm.prune_model(model, batches(), "2:4", "wanda", blocks=1, progress=False)
    assert [row.block for row in report.blocks] == [0]
    assert isinstance(model.model.layers[1].mlp.up_proj.weight, nn.Parameter)
    assert not isinstance(model.model.layers[1].mlp.up_proj.weight, s3.StructuredSparseTensor)


def test_nan_in_a_weight_is_refused_by_name_before_any_work() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(s3.NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        llm.prune_model(model, batches(), "2:4", progress=False)


def test_inf_in_activations_is_refused_by_name() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(s3.NonFiniteError, match=r"model\.layers\.0\.input_layernorm gives NaN"):
        llm.prune_model(model, batches(), "2:4", progress=False)


def test_a_model_without_decoder_blocks_is_refused() -> None:
    with pytest.raises(s3.ModelError, match="no decoder blocks"):
        llm.prune_model(nn.Sequential(nn.ReLU()), batches(), "2:4", progress=False)


@pytest.mark.parametrize(
    "calibration",
    [
        [],
        [torch.zeros(2, 8)],
        [torch.zeros(8, dtype=torch.int64)],
        [torch.zeros(0, 8, dtype=torch.int64)],
        ["x"],
        [torch.full((1, 8), VOCABULARY)],
        [torch.full((1, 8), -1)],
        [torch.zeros(1, 129, dtype=torch.int64)],
    ],
    ids=["none", "float", "one dim", "no sequence", "strings", "beyond", "negative", "too long"],
)
@pytest.mark.parametrize("resume", [True, False])
def test_unusable_calibration_is_refused(
    tmp_path: Path, calibration: list[object], resume: bool
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(s3.CalibrationError):
        llm.prune_model(
            tiny("gpt2"),
            calibration,
            "2:4",
            work_dir=folder if resume else None,
            progress=False,
        )
    assert not folder.exists()


def test_an_unknown_pruner_and_an_unknown_option_are_refused() -> None:
    with pytest.raises(s3.S3Error, match="admm"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "optimal", progress=False)
    with pytest.raises(TypeError, match="has no option 'speed'"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "admm", speed=9, progress=False)
    with pytest.raises(s3.PrunerError, match="dense target"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "wanda", alpha=0.3, progress=False)
    with pytest.raises(s3.PrunerError, match=r"alpha=2\.0 must be from 0"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "admm", alpha=2.0, progress=False)
    with pytest.raises(s3.PrunerError, match=r"damp=-1 must be"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "admm", damp=-1, progress=False)


def test_a_plan_leaves_the_model_as_it_is_and_a_run_carries_it_out() -> None:
    model, expected = tiny("llama"), tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planned = plan.Plan.of(model, batches(), "2:4", "wanda", blocks=1, progress=False)
    assert [block.name for block in planned.blocks] == ["model.layers.0"]
    assert len(planned.patterns) == len(planned.blocks[0].layers) == 7
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = run.run(planned)
    same = llm.prune_model(expected, batches(), "2:4", "wanda", blocks=1, progress=False)
    assert [row.error for row in report] == [row.error for row in same]


def test_a_plan_takes_the_arguments_of_prune_model() -> None:
    one, other = (inspect.signature(f).parameters for f in (llm.prune_model, plan.Plan.of))
    assert [(p.name, p.kind, p.default) for p in one.values()] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]


def test_an_unknown_way_with_misfits_is_refused() -> None:
    with pytest.raises(s3.errors.OptionError, match="on_misfit='ignore' must be 'skip' or 'error'"):
        llm.prune_model(tiny("llama"), batches(), "2:4", on_misfit="ignore", progress=False)  # type: ignore[arg-type]


def test_a_compressed_model_is_not_pruned_again() -> None:
    model = tiny("llama")
    llm.prune_model(model, batches(), "2:4", "wanda", progress=False)
    with pytest.raises(s3.ModelError, match="compressed already"):
        llm.prune_model(model, batches(), "2:4", "wanda", progress=False)


def test_training_mode_is_given_back() -> None:
    model = tiny("llama").train()
    llm.prune_model(model, batches(), "2:4", "magnitude", progress=False)
    assert model.training


def test_progress_in_a_log_is_one_line_a_block_with_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm.prune_model(tiny("llama"), batches(), "2:4", "magnitude")
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["block 1/2", "block 2/2"]
    assert re.search(r"about \d+ s left", lines[0])
    assert "about 0 s left" in lines[1]


class TestProgress:
    def row(self, **change: object) -> llm.BlockRow:
        return llm.BlockRow(
            **{
                "block": 0,
                "linears": 1,
                "error": 0.5,
                "seconds": 2.0,
                "solver_seconds": 1.0,
                "peak_memory_bytes": 0,
                **change,
            }
        )

    def linear(self) -> llm.LinearRow:
        return llm.LinearRow(0, "x", 10, 10, 0.5, 1.0, 4, 0.5, 0)

    def test_the_time_left_is_that_of_the_weights_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: now)
        with progress.PruneProgress(weights=1000, blocks=4) as bar:
            now = 5000.0  # what came before the first block tells nothing about the others
            bar.resumed(500)
            bar.doing(2, "dense pass")
            now = 5100.0
            bar.linear(self.linear())
            bar.skip(100)
            bar.block(self.row())
        # 100 weights in 100 s; 1000 - 500 - 100 - 100 = 300 are left.
        assert "about 5 min 0 s left" in capsys.readouterr().err

    def test_nothing_is_shown_when_nothing_is_asked_for(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with progress.PruneProgress(100, 1, show=False) as bar:
            bar.doing(0, "x")
            bar.block(self.row())
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
    )
    def test_time_is_written_as_people_read_it(self, seconds: float, text: str) -> None:
        assert progress._clock(seconds) == text


def test_the_columns_of_both_tables_are_right(tmp_path: Path) -> None:
    began = time.perf_counter()
    report = llm.prune_model(tiny("llama"), batches(), "2:4", work_dir=tmp_path, progress=False)
    whole = time.perf_counter() - began
    with (tmp_path / "linears.csv").open() as file:
        linears = list(csv.DictReader(file))
    with (tmp_path / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert [row["name"] for row in linears] == [row.name for row in report.linears]
    for index, row in enumerate(blocks):
        mine = [float(x["seconds"]) for x in linears if int(x["block"]) == index]
        assert float(row["solver_seconds"]) == pytest.approx(sum(mine))
        assert 0 < sum(mine) <= float(row["seconds"])
        assert int(row["linears"]) == len(mine) == 7
    assert sum(float(row["seconds"]) for row in blocks) <= report.seconds <= whole
    used = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if LINUX else 1
    for row in (*linears, *blocks):
        # The peak of a process is at least what it uses now, less what it gave back since.
        assert used / 4 < int(row["peak_memory_bytes"]) < 2**40


def test_the_report_gives_frames_and_a_summary() -> None:
    report = llm.prune_model(tiny("llama"), batches(), "2:4", "wanda", progress=False)
    linears, blocks = report.frames()
    assert linears["name"].iloc[0] == "model.layers.0.self_attn.q_proj"
    assert len(blocks) == 2
    assert list(report) == report.linears and len(report) == 14
    assert report.to_frame().equals(linears)
    assert (linears["density"] == 0.5).all()
    assert (linears["samples"] == 4 * 2 * 24).all()
    assert json.loads(json.dumps(report.summary()))["layers"] == 14
    assert "14 linears in 2 blocks" in str(report)


class TestModuleInputCatcher:
    def test_it_records_arguments_and_ends_the_pass(self) -> None:
        late = nn.Linear(4, 4)
        late.forward = None  # type: ignore[assignment] # would fail if it were called
        net = nn.Sequential(nn.Linear(3, 4), late)
        with s3.ModuleInputCatcher(late, "cpu") as catcher:
            assert catcher.run(net, torch.ones(2, 3)) is None
        (args, kwargs) = catcher.pop()
        assert args[0].shape == (2, 4)
        assert kwargs == {}

    def test_it_leaves_no_hooks_behind(self) -> None:
        linear = nn.Linear(3, 4)
        with s3.ModuleInputCatcher(linear):
            assert len(linear._forward_pre_hooks) == 1
        assert not linear._forward_pre_hooks

    def test_an_error_in_the_module_is_not_swallowed(self) -> None:
        linear = nn.Linear(3, 4)
        with s3.ModuleInputCatcher(linear, stop=False) as catcher, pytest.raises(RuntimeError):
            catcher.run(linear, torch.ones(2, 5))


def test_transfer_to_device_keeps_structure_and_moves_tensors() -> None:
    from collections import namedtuple

    pair = namedtuple("pair", "a b")
    value = {"x": [torch.ones(2), (torch.zeros(1), None)], "y": pair(torch.ones(1), "text")}
    moved = s3.transfer_to_device(value, "meta")
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["x"][1][1] is None
    assert isinstance(moved["y"], pair)
    assert moved["y"].b == "text"
    here = torch.ones(2)
    assert s3.transfer_to_device(here, "cpu") is here


class TestText:
    def test_the_parts_of_pydoc_share_no_topic_and_no_paragraph(self) -> None:
        from pydoc_data.topics import topics

        def paragraphs(text: str) -> list[str]:
            return [" ".join(p.split()) for p in text.split("\n\n")]

        names = ("calibration", "development", "held-out")
        parts = [text.load_text("pydoc", part) for part in names]
        for n, part in enumerate(parts):
            earlier = [" ".join(other.split()) for other in parts[:n]]
            assert not any(p in other for p in paragraphs(part) for other in earlier)
        # Nothing else is left out.
        everything = " ".join(" ".join(part.split()) for part in parts)
        assert all(p in everything for topic in topics.values() for p in paragraphs(topic))
        kept = [text.pydoc_topics(part) for part in names]
        assert sum(map(len, kept)) == len({name for part in kept for name in part})

    def test_windows_do_not_overlap_and_are_seeded(self) -> None:
        tokens = torch.arange(100)
        picked = llm.windows(tokens, 5, 16, seed=3)
        assert picked.unique().numel() == picked.numel() == 80
        assert torch.equal(picked, llm.windows(tokens, 5, 16, seed=3))
        assert not torch.equal(picked, llm.windows(tokens, 5, 16, seed=4))

    def test_a_text_too_short_names_both_numbers(self) -> None:
        with pytest.raises(s3.CalibrationError, match=r"100 tokens.*7 x 16 = 112.*at most 6"):
            llm.windows(torch.arange(100), 7, 16)

    def test_paths_are_read_and_bad_ones_refused(self, tmp_path: Path) -> None:
        (tmp_path / "b.txt").write_text("second")
        (tmp_path / "a.md").write_text("first")
        (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
        assert llm.load_text(str(tmp_path)) == "first\n\nsecond"
        with pytest.raises(s3.CalibrationError, match="no text at"):
            llm.load_text(str(tmp_path / "nothing"))
        with pytest.raises(s3.CalibrationError, match="UTF-8"):
            llm.load_text(str(tmp_path / "c.bin"))
        (tmp_path / "empty.txt").write_text("  ")
        with pytest.raises(s3.CalibrationError, match="holds no text"):
            llm.load_text(str(tmp_path / "empty.txt"))

    def test_c4_comes_in_samples_of_one_sequence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            text, "_hub_text", lambda source, part, documents: f"{source} {part} " * 30
        )
        ids = {"c4": 1, "calibration": 2, "held-out": 3}

        def tokenizer(words: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ids[word] for word in words.split()]}

        picked = s3.get_c4(3, 8, tokenizer, split="validation")
        assert [tuple(p.shape) for p in picked] == [(1, 8)] * 3
        assert set(torch.cat(picked).flatten().tolist()) == {1, 3}
        pairs = s3.get_c4(3, 8, tokenizer, split="validation", pairs=True)
        assert all(torch.equal(pair[0], each) for pair, each in zip(pairs, picked, strict=True))
        assert pairs[0][1].tolist() == [[-100] * 7 + picked[0][0, -1:].tolist()]
        with pytest.raises(s3.CalibrationError, match="unknown split 'test'"):
            s3.get_c4(3, 8, tokenizer, split="test")
