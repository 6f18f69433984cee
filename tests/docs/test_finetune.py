"""examples/finetune.py and bench/training.py at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
from saved_models import byte_level  # noqa: E402 - needs transformers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def save_toy(folder: Path) -> None:
    """A random Llama with room for 512 positions, and a tokenizer of bytes and some merges."""
    byte_level(300).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def test_the_example_trains_saves_reloads_and_compiles(tmp_path: Path) -> None:
    save_toy(tmp_path / "toy")
    arguments = [
        "--model", "toy", "--pruner", "magnitude", "--samples", "1", "--steps", "6", "--batch", "2",
        "--sequences", "6", "--seq-len", "64", "--eval-samples", "2", "--rates", "1e-6,1e-2",
        "--eval-every", "4", "--device", "cpu", "--out", "finetune.json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["pruned_linears"] == 14
    assert [row["method"] for row in record["rows"]] == [
        "fine-tuning",
        "fine-tuning + distillation",
    ]
    for row in record["rows"]:
        assert row["masks_unchanged"] and row["reload_equal"] and row["verified_weights"] == 14
        assert row["compiled"]["relative_difference"] < 1e-5
        best = min(row["tried"], key=lambda each: each["development_perplexity"])
        assert row["rate"] == best["rate"] and len(row["tried"]) == 2
        assert [point["step"] for point in row["history"]] == [0, 4, 6]
        least = min(row["history"], key=lambda point: point["perplexity"])
        assert row["kept_step"] == least["step"]
        assert row["development_perplexity"] == least["perplexity"]
    assert record["rows"][0]["perplexity"] < record["pruned_perplexity"]
    assert str(tmp_path) not in json.dumps(record)  # it is published


@pytest.mark.parametrize("name", ["training", "finetune"])
def test_a_table_shows_what_is_stored_and_nothing_where_nothing_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_tables

    page = f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n"
    shown = readme_tables.rendered(page, Path("page.md"), (name,))
    assert "| dense |" in shown and "old" not in shown
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    bare = readme_tables.rendered(shown, Path("page.md"), (name,))
    assert bare == page.replace("old\n", "")


def test_the_table_of_steps_has_the_products_by_sparse_cores_once_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_tables

    stored = json.loads((ROOT / "bench" / "results" / "training.json").read_text())
    stored["sparse_cores"] = [
        {
            "linear": [64, 32], "tokens": 16, "product": "forward", "dense_ms": 0.2, "product_ms": 0.15,
            "compress_ms": 0.1, "torch_compress_ms": 0.4,
            "timed_in": {"product": "graph", "torch_compress": "stream"},
        }
    ]  # fmt: skip
    last = readme_tables.training(stored).splitlines()[-1]
    expected = (
        "| 64x32, 16 tokens, forward (with the host) | 0.200 | 0.150 | 0.100 | 1.25 | 0.400 |"
    )
    assert last == expected


def test_the_learning_rate_warms_up_and_falls_by_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from finetune import learning_rate

    rates = [learning_rate(count, 100, 2.0, 0.1) for count in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(1.1, abs=0.02) and rates[-1] == pytest.approx(0.2, abs=0.01)


def test_the_benchmark_of_steps_stores_a_row_for_each_variant(tmp_path: Path) -> None:
    arguments = [
        "--tiny",
        "--ways",
        "eager",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "steps.json"),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "training.py"), *arguments],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert (
        len({row["variant"] for row in rows}) == len(rows) == 16
        and rows[0]["variant"] == "dense"
        and rows[0]["ratio"] == 1.0
    )
    assert all(row["ms"] > 0 and row["way"] == "eager" for row in rows)
