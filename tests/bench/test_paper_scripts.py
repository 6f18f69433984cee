"""The paper's experiments in ``bench/``, on toy layers and models: what they compute, store and draw."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import s3tensor as s3
from s3tensor import llm

transformers = pytest.importorskip("transformers")
pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
import tiny_models  # noqa: E402 - needs transformers

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _scripts_import_each_other() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def obs() -> ModuleType:
    return importlib.import_module("structured_obs")


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    return importlib.import_module("prune_gpt")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return importlib.import_module("plot_results")


def tiny(blocks: int = 3) -> nn.Module:
    return tiny_models.tiny("llama", blocks, positions=128)


def batches(count: int = 3) -> list[torch.Tensor]:
    return tiny_models.batches(count)


def perplexity(model: nn.Module) -> float:
    return s3.perplexity(model, batches(1)[0], 24)


# the layer of the single-layer experiment ---------------------------------------------------------


def test_the_synthetic_layer_is_a_function_of_its_seed_and_has_correlated_heavy_tails() -> None:
    synthetic = importlib.import_module("synthetic")
    first, again, other = (synthetic.layer(48, 96, 1000, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.hessian, again.hessian)
    assert not torch.equal(first.hessian, other.hessian)
    assert not torch.equal(first.hessian, first.held_out)
    assert (first.samples, first.held_out_samples) == (1000, 250)
    x = next(synthetic.inputs(48, 96, (4000,), torch.Generator().manual_seed(0)))[1].double()
    x = (x - x.mean(0)) / x.std(0)
    assert float((x**4).mean(0).median()) > 6  # a normal variable has 3
    spectrum = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert float(spectrum[-10:].sum() / spectrum.sum()) > 0.3  # 10 of 96 uncorrelated ones: 0.1


PATTERNS = ("24", "48", "coupled24", "block16")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_method_satisfies_its_pattern_on_every_layer(obs: ModuleType, pattern: str) -> None:
    problem = obs.synthetic_layer("32x64", 512, 0, torch.device("cpu"))
    settings = obs.Settings(ng=4, splits=2)
    rows = {
        name: obs.measure(name, method, problem, pattern, settings)
        for name, method in obs.METHODS.items()
    }
    for name, row in rows.items():
        assert not row.failed, (name, row.failed)
        assert row.satisfies, name
        assert 0 < row.error < 1 and 0 < row.held_out_error < 1, name
        assert row.error == row.first_rows_error
    # The exact weights of a mask are never worse than those that SparseGPT leaves, nor is a refit of a
    # scope alone better than one of the whole row.
    assert rows["sparsegpt+refit"].error <= rows["sparsegpt"].error
    assert rows["obs/full"].error <= rows["obs/local"].error
    assert rows["obs/split"].error == pytest.approx(rows["obs/full"].error, rel=1e-4)


def test_slow_methods_get_the_first_rows_and_the_others_tell_their_error_on_them(
    obs: ModuleType,
) -> None:
    problem = obs.synthetic_layer("64x64", 512, 0, torch.device("cpu"))
    method = obs.METHODS["true_obs/largest_first"]
    whole = obs.measure("true_obs/x", method, problem, "24", obs.Settings())
    part = obs.measure("true_obs/x", method, problem, "24", obs.Settings(), slow_rows=16)
    quick = obs.measure("admm", obs.METHODS["admm"], problem, "24", obs.Settings(), slow_rows=16)
    assert (part.rows, part.of_rows, quick.rows, quick.first_rows) == (16, 64, 64, 16)
    assert part.seconds_all_rows == pytest.approx(4 * part.seconds)
    assert quick.seconds_all_rows == quick.seconds
    alone = method(problem.weight[:16].clone(), problem.hessian, "24", obs.Settings())
    assert part.error == s3.output_error(alone, problem.weight[:16], problem.hessian)
    # Rows do not depend on each other: the first ones are pruned as they are among all.
    pruned = method(problem.weight.clone(), problem.hessian, "24", obs.Settings())
    assert torch.allclose(pruned[:16], alone, atol=1e-6)
    assert whole.rows == 64 and whole.error != part.error
    assert "from 16 of 64 rows" in obs.line(part)


def test_a_method_that_fails_is_a_row_that_says_so(obs: ModuleType) -> None:
    problem = obs.synthetic_layer("16x32", 64, 0, torch.device("cpu"))

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("first line\nsecond line")

    row = obs.measure("broken", broken, problem, "24", obs.Settings())
    assert row.failed == "RuntimeError: first line" and row.error is None
    nan = obs.measure("nan", lambda w, *_: w * torch.nan, problem, "24", obs.Settings())
    assert nan.failed == "NaN or Inf in the result"
    assert "failed" in obs.line(row)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_layer_from_files_is_measured_and_stored(
    obs: ModuleType, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weight, x = torch.randn(16, 32), torch.randn(4, 30, 32)
    files = []
    for name, tensor in (("layer", weight), ("x", x)):
        files.append(tmp_path / f"{name}{suffix}")
        if suffix == ".pt":
            torch.save(tensor, files[-1])
        else:
            save_file({name: tensor}, files[-1])
    given = ["--W", files[0], "--X", files[1], "--held-out", "0.25", "--pattern", "24", "48"]
    given += ["--methods", "sparsegpt*", "admm", "--device", "cpu", "--out", tmp_path / "out"]
    rows = obs.main([str(part) for part in given])
    assert [(row.pattern, row.method) for row in rows] == [
        (pattern, method)
        for pattern in ("24", "48")
        for method in ("sparsegpt", "sparsegpt+refit", "admm")
    ]
    stored = json.loads((tmp_path / "out" / "layer.json").read_text())
    assert (stored["samples"], stored["held_out_samples"]) == (90, 30)
    table = pd.read_csv(tmp_path / "out" / "layer.csv", float_precision="round_trip")
    assert table["error"].tolist() == [row["error"] for row in stored["rows"]]
    rows_x = x.flatten(0, 1)[:90]
    mine = s3.prune.admm(weight, rows_x.T @ rows_x / 90, "2:4").weight
    expected = s3.output_error(mine, weight, rows_x.T @ rows_x / 90)
    assert rows[2].error == pytest.approx(expected, rel=1e-3)
    assert "120" not in capsys.readouterr().out.splitlines()[0]  # 90 samples, not all 120


def test_wrong_files_and_methods_are_refused_in_one_line(obs: ModuleType, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, tmp_path / "two.pt")
    torch.save(torch.ones(2, 4), tmp_path / "w.pt")
    torch.save(torch.ones(3, 5), tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="must hold one tensor; it holds a, b"):
        obs.read_tensor(tmp_path / "two.pt")
    with pytest.raises(SystemExit, match=r"W of shape \(2, 4\) and X of shape \(3, 5\)"):
        obs.layer_of_files(tmp_path / "w.pt", tmp_path / "x.pt", 0.0, torch.device("cpu"))
    with pytest.raises(SystemExit, match="no method 'magic'"):
        obs.chosen(["magic"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "64y128"], "must be ROWSxCOLUMNS"),
        (["--memory", "0"], "must be above 0"),
        (["--samples", "0"], "must be 1 or more"),
    ],
)
def test_settings_of_a_layer_that_make_no_sense_are_refused(
    obs: ModuleType, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        obs.arguments(arguments)
    assert message in capsys.readouterr().err


# whole models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(gpt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three methods on a toy model."""
    out = tmp_path_factory.mktemp("results")
    dense = tiny()
    for method, tag in (("sparsegpt_24", ""), ("admm_24", ""), ("wanda_24", ""), ("admm_24", "x")):
        settings = gpt.Settings(eval_every=2, tag=tag)
        outcome = gpt.run_method(dense, batches(), method, settings, perplexity, perplexity(dense))[
            1
        ]
        record = {
            "command": f"prune_gpt.py --method {method}",
            "calibration": "toy",
            "text": "toy",
            "settings": {"damp": settings.damp},
            **gpt.environment("cpu"),
        }
        gpt.store(outcome, "someone/Toy-1", record, out)
    return out


def test_the_tables_hold_a_row_for_each_linear_each_block_and_each_perplexity(
    results: Path,
) -> None:
    folder = results / "Toy-1" / "admm_24"
    linears, blocks, curve = (
        pd.read_csv(folder / f"{name}.csv") for name in ("linears", "blocks", "perplexity")
    )
    assert len(linears) == 3 * 7 and set(linears["sublayer"]) >= {"q_proj", "down_proj"}
    assert set(linears["method"]) == {"admm_24"} and set(blocks["model"]) == {"someone/Toy-1"}
    down = linears[linears["name"] == "model.layers.2.mlp.down_proj"].iloc[0]
    assert (down["index"], down["out_features"], down["in_features"]) == (2, 32, 64)
    assert linears["error"].between(0, 1).all() and (linears["seconds"] > 0).all()
    assert blocks["index"].tolist() == [0, 1, 2] and (blocks["error"] > 0).all()
    assert curve["blocks_pruned"].tolist() == [0, 2, 3]
    summary = json.loads((folder / "run.json").read_text())
    assert summary["perplexity"] == curve["perplexity"].iloc[-1]
    assert summary["pattern"] == "2:4" and summary["layers"] == 21


def test_a_point_of_the_curve_is_the_model_whose_first_blocks_alone_were_pruned(
    gpt: ModuleType,
) -> None:
    dense = tiny()
    settings = gpt.Settings(eval_every=1)
    model, outcome = gpt.run_method(dense, batches(), "obd_24", settings, perplexity, 1.5)
    assert [point for point, _ in outcome.perplexities] == [0, 1, 2, 3]
    assert outcome.perplexities[0] == (0, 1.5)
    assert outcome.perplexities[3][1] == perplexity(model)
    for blocks in (1, 2):
        part = tiny()
        llm.prune_model(
            part, batches(), "2:4", "obd", blocks=blocks, compress=False, progress=False
        )
        assert outcome.perplexities[blocks][1] == pytest.approx(perplexity(part), rel=1e-6)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, tiny().get_parameter(name)), name


def test_the_flags_of_the_reference_mean_ours(gpt: ModuleType) -> None:
    ours = ["--method", "true_obs_24", "--samples", "8", "--seq_len", "64", "--out", "x"]
    theirs = [
        "--method",
        "true_obs_24",
        "--num_samples",
        "8",
        "--seq_length",
        "64",
        "--output",
        "x",
    ]
    assert gpt.arguments(theirs) == gpt.arguments(ours)
    args = gpt.arguments([*theirs, "--chunk_size", "3"])
    settings = gpt.Settings(chunk_size=args.chunk_size)
    assert gpt.method_of("true_obs_24", settings)[3]["chunk_size"] == 3
    assert "chunk_size" not in gpt.method_of("admm_24", settings)[3]
    found = [
        gpt.run_method(tiny(1), batches(), "true_obs_24", each, perplexity, 1.0)[0].state_dict()
        for each in (settings, gpt.Settings())
    ]
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt_48", "true_obs_block16", "admm_coupled24"])
def test_methods_are_pruners_on_patterns(gpt: ModuleType, method: str) -> None:
    pruner, pattern, alpha, options = gpt.method_of(method, gpt.Settings(ng=8))
    assert (pruner, pattern) == {
        "sparsegpt_48": ("sparsegpt", "pair4:8"),
        "true_obs_block16": ("obs", "rowpair16"),
        "admm_coupled24": ("admm", "coupled2:4"),
    }[method]
    assert alpha == (0.0 if pruner == "obs" else None)
    assert options == ({"order": "largest_first", "ng": 8} if pruner == "obs" else {})
    model, outcome = gpt.run_method(tiny(1), batches(), method, gpt.Settings(), perplexity, 1.0)
    for row in outcome.report.linears:
        assert s3.satisfies(model.get_submodule(row.name).weight, pattern), row.name
    with pytest.raises(SystemExit, match="no method 'admm_25'"):
        gpt.method_of("admm_25", gpt.Settings())


def test_original_h_prunes_each_linear_by_the_inputs_that_the_dense_model_gives_it(
    gpt: ModuleType,
) -> None:
    dense = tiny(2)
    original = gpt.OriginalHessians(dense, batches(), 0.01)
    before = set(s3.prune.PRUNERS)
    model, outcome = gpt.run_method(
        dense, batches(), "sparsegpt_24", gpt.Settings(), perplexity, 1.0, original
    )
    assert set(s3.prune.PRUNERS) == before
    assert len(outcome.report.linears) == 14
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        linear = dense.get_submodule(name)
        hessian = s3.Hessian(linear.in_features)
        hook = linear.register_forward_pre_hook(lambda _, args, h=hessian: h.update(args[0]))
        with torch.no_grad():
            for batch in batches():
                dense(input_ids=batch)
        hook.remove()
        expected = s3.prune.sparsegpt(linear.weight, hessian.value(), "2:4", damp=0.01).weight
        assert torch.allclose(model.get_submodule(name).weight, expected, atol=1e-6), name


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_text_that_cannot_be_had_is_replaced_by_pydoc_and_only_where_none_was_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(source: str, part: str) -> str:
        if source == "c4":
            raise s3.CalibrationError("no network")
        return "word " * 100

    monkeypatch.setattr(llm, "load_text", offline)
    text = gpt.text_of(None, "c4", "calibration", Words(), 64, 16)
    assert text.source == "pydoc" and text.tokens.shape == (6, 16)
    assert text.described == "pydoc calibration, 6 x 16 tokens"
    said = capsys.readouterr().out
    assert "pydoc, because no network" in said and "6 windows" in said
    with pytest.raises(s3.CalibrationError, match="no network"):
        gpt.text_of("c4", "c4", "calibration", Words(), 64, 16)
    with pytest.raises(s3.CalibrationError, match="at most 6 samples"):
        gpt.text_of("wikitext2", "wikitext2", "held-out", Words(), 64, 16)


def test_a_saved_model_is_the_pruned_one(gpt: ModuleType, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer").write_text("here")

    model, outcome = gpt.run_method(tiny(1), batches(), "admm_24", gpt.Settings(), perplexity, 1.0)
    gpt.save(model, Tokenizer(), outcome, tmp_path / "saved")
    again = s3.from_pretrained(tmp_path / "saved")
    assert perplexity(again) == pytest.approx(outcome.perplexities[-1][1], rel=1e-5)
    assert len(s3.verify(tmp_path / "saved")) == 7
    assert (tmp_path / "saved" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "admm_24", "--eval_every", "-1"], "must be >= 0"),
        (["--method", "admm_24", "--original_h", "--alpha", "0.5"], "exclude each other"),
        (["--method", "admm_24", "--text", "a.txt", "--calibration", "a.txt"], "would flatter"),
        (["--method", "admm_24", "--batch", "0"], "--batch 0 must be 1 or more"),
        (["--method", "admm_24", "--samples", "0"], "--samples 0 must be 1 or more"),
        (["--method", "admm_24", "--chunk_size", "0"], "--chunk_size 0 must be 1 or more"),
        (["--method", "admm_24", "--alpha", "3"], "--alpha 3.0 must lie from 0 to 1"),
        (["--method", "admm_24", "--damp", "-1"], "--damp -1.0 must be 0 or more"),
    ],
)
def test_arguments_that_contradict_are_refused(
    gpt: ModuleType, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpt.arguments(arguments)
    assert message in capsys.readouterr().err


# pictures -----------------------------------------------------------------------------------------


def test_the_report_shows_six_pictures_and_the_figures_of_every_method(
    plot: ModuleType, results: Path, tmp_path: Path
) -> None:
    path = plot.main([str(results), "--model", "someone/Toy-1", "--out", str(tmp_path)])
    text = path.read_text()
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        f"{name}-2-4.png"
        for name in ("decoder-error", "gain", "perplexity", "scatter", "sublayers", "time")
    ]
    for picture in pictures:
        assert f"({picture.name})" in text
        assert picture.stat().st_size > 5000
    for label in ("SparseGPT", "Wanda", "ADMM", "ADMM (x)"):
        assert f"| {label} |" in text
    assert text.count("**") == 2 * text.count("| **")  # the best of a column is bold
    assert "prune_gpt.py --method admm_24" in text


def test_two_methods_are_compared_linear_by_linear(plot: ModuleType, results: Path) -> None:
    runs = plot.read(results, "Toy-1")
    assert [run.method for run in runs] == ["sparsegpt_24", "wanda_24", "admm_24", "admm_24-x"]
    first, second = plot.pair_of(runs, ["wanda_24", "admm_24"])
    both = plot.side_by_side(first, second)
    assert len(both) == 21
    one = both[both["name"] == "model.layers.1.mlp.up_proj"].iloc[0]
    errors = [run.linears.set_index("name")["error"][one["name"]] for run in (first, second)]
    assert one["gain"] == pytest.approx(1 - errors[1] / errors[0])
    assert plot.pair_of(runs, None)[0].method == "sparsegpt_24"
    assert plot.pair_of(runs[:1], None) is None
    looks = list(plot.looks(runs).values())
    assert len({(look.color, look.marker) for look in looks}) == 4
    assert plot.looks(runs)["ADMM"] == plot.looks(runs[2:])["ADMM"]


def test_results_that_are_not_there_are_refused_with_those_that_are(
    plot: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no results of Other .* there are Toy-1"):
        plot.main([str(results), "--model", "Other"])
    with pytest.raises(SystemExit):
        plot.main([str(results), "--model", "Toy-1", "--compare", "admm_24", "obs_24"])
    assert "no results of 'obs_24'" in capsys.readouterr().err
