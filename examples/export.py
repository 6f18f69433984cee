"""Ship a compressed model: a torch.export program, a compressed folder, and plain dense files.

    python examples/export.py --out exported

- ``model.pt2``: the graph and the packed weights; ``torch.export.load`` loads it without the model's own
  code, once s3tensor is imported, for its operator.
- ``compressed/``: a Hugging Face folder with packed weights, for transformers with s3tensor.
- ``dense/``: the same with zeros written out, for transformers and any other program, without s3tensor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import s3tensor as s3


def export_program(folder: Path) -> None:
    """A small network to ``model.pt2`` and back, for any batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    s3.sparsify_(model, "2:4")
    model.requires_grad_(False)
    x = torch.randn(3, 128)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).run_decompositions()
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    print(f"the program: {', '.join(operators)}")
    assert operators.count("s3tensor.linear.default") == 2
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    x = torch.randn(17, 128)
    torch.testing.assert_close(loaded(x), model(x))
    print(f"model.pt2: {(folder / 'model.pt2').stat().st_size:,} bytes, answers as the model does")


WITHOUT_US = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "s3tensor" not in sys.modules
torch.save(model(input_ids=torch.arange(16)[None]).logits, sys.argv[2])
"""


def export_folders(folder: Path) -> None:
    """A small language model to two folders; a program without s3tensor reads the dense one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = [torch.randint(256, (2, 32)) for _ in range(2)]
    s3.llm.prune_model(model, tokens, "2:4", "wanda", progress=False)
    s3.save_pretrained(model, folder / "compressed")
    s3.save_pretrained(model, folder / "dense", dense=True)
    for name in ("compressed", "dense"):
        size = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
        print(f"{name + '/':12} {size:,} bytes")
    logits = folder / "logits.pt"
    command = [sys.executable, "-c", WITHOUT_US, str(folder / "dense"), str(logits)]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(16)[None]).logits
    torch.testing.assert_close(torch.load(logits, weights_only=True), expected)
    logits.unlink()
    print("dense/ was read without s3tensor: the same logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder to keep the files in; by default they are deleted"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        export_program(folder)
        export_folders(folder)


if __name__ == "__main__":
    main()
