"""Writes the files beside it, in version 0.1.0 before the modules moved into folders (commit 5c542eb).

They are kept as they were written: ``tests/test_written_before.py`` reads them with today's code. To keep
files of a later version too, run this in a checkout of it with another folder: ``python write.py FOLDER``.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.llm import driver  # since moved

VOCABULARY = 53
PATTERNS = ["2:4", "coupled2:4", "pair4:8", "rowpair16", "1:4", "block:4x4@0.5", "unstructured@0.5"]


def tiny(blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def token_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def weights() -> dict[str, torch.Tensor]:
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    made = {name: s3.StructuredSparseTensor.from_dense(dense, name) for name in PATTERNS}
    made["transposed"] = s3.StructuredSparseTensor.from_dense(dense, "2:4").t()
    made["bfloat16"] = s3.StructuredSparseTensor.from_dense(dense.bfloat16(), "2:4")
    made["int8"] = s3.Int8SparseTensor.from_sparse(made["2:4"])
    made["parameter"] = nn.Parameter(made["2:4"], requires_grad=False)
    return made


def in_training() -> nn.Module:
    """Linears under each mode of S3Sparse, a coupling and a transposable mask; one step taken."""
    torch.manual_seed(3)
    names = ["ste", "srste", "soft", "fixed"]
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in names})
    for name in names:
        sparse = s3.S3Sparse("2:4", mode=name)
        parametrize.register_parametrization(model[name], "weight", sparse)
    model["turned"] = nn.Linear(32, 32)
    sparse = s3.S3Sparse("2:4", mode="ste", transposable=True)
    parametrize.register_parametrization(model["turned"], "weight", sparse)
    model["later"] = nn.Linear(32, 32)
    sparse = s3.S3Sparse("1:4", schedule=s3.Density(1.0, 0.25, steps=10))
    parametrize.register_parametrization(model["later"], "weight", sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    sum(layer(x).square().sum() for layer in model.values()).backward()
    optimizer.step()
    s3.step(model)
    return model


class Killed(BaseException):
    pass


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = weights()
    dense = {name: weight.to_dense() for name, weight in made.items()}
    torch.save(made, folder / "weights.pt")
    torch.save(dense, folder / "weights_dense.pt")
    (folder / "weights.pickle").write_bytes(pickle.dumps(made))

    hessian = s3.Hessian(32)
    hessian.update(torch.randn(64, 32, generator=torch.Generator().manual_seed(5)))
    pruned = s3.prune.admm(torch.randn(8, 32), hessian.value(), "2:4")
    values = {
        "pattern": s3.Pattern.parse("coupled2:4"),
        "bound": s3.Pattern.parse("2:4").bind((8, 16)),
        "layout": s3.Layout((4, 8), (8, 1)),
        "hessian": hessian,
        "pruned": pruned,
        "density": s3.Density(1.0, 0.5, steps=10),
    }
    (folder / "values.pickle").write_bytes(pickle.dumps(values))

    training = in_training()
    sparse = {name: layer.parametrizations.weight[-1] for name, layer in training.items()}
    torch.save(sparse, folder / "s3sparse.pt")
    torch.save(training.state_dict(), folder / "training_state.pt")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    torch.save(
        {name: layer(x).detach() for name, layer in training.items()}, folder / "training_out.pt"
    )

    model = tiny()
    report = s3.llm.prune_model(model, [token_ids()], "2:4", "magnitude", progress=False)
    (folder / "report.pickle").write_bytes(pickle.dumps(report))
    s3.save_pretrained(model, folder / "model")
    torch.save(model(input_ids=token_ids()).logits.detach(), folder / "model_out.pt")
    s3.quantize_(model)
    s3.save_pretrained(model, folder / "model_int8")
    torch.save(model(input_ids=token_ids()).logits.detach(), folder / "model_int8_out.pt")

    # A run of three blocks that is broken off after the first, and what a whole run leaves.
    whole = tiny(3)
    s3.llm.prune_model(whole, [token_ids()], "2:4", "admm", damp=0.01, progress=False)
    torch.save(
        {
            name: p.to_dense() if hasattr(p, "pattern") else p
            for name, p in whole.state_dict().items()
        },
        folder / "run_dense.pt",
    )
    real = driver._prune_block

    def dies_in_the_second(runner: object, *rest: object) -> object:
        if runner.index == 1:
            raise Killed
        return real(runner, *rest)

    driver._prune_block = dies_in_the_second
    with contextlib.suppress(Killed):
        s3.llm.prune_model(
            tiny(3),
            [token_ids()],
            "2:4",
            "admm",
            damp=0.01,
            progress=False,
            work_dir=folder / "run",
        )
    driver._prune_block = real


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
