"""What blocks are called with and return in other models, and that pruning sees each as it is."""

from __future__ import annotations

import copy
import types
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.llm import calibrate, chain

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 50, 16


def token_batches(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in shapes]


BATCHES = token_batches((2, 24), (3, 16))


def last_states(model: nn.Module, block: nn.Module, batches: list[Tensor]) -> Tensor:
    """What a block returns in passes of the whole model."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, out: Any) -> None:
        seen.append(calibrate.hidden_of(out).flatten())

    with torch.no_grad():
        hook = block.register_forward_hook(look)
        for batch in batches:
            model(input_ids=batch, use_cache=False)
        hook.remove()
    return torch.cat(seen)


def check_errors(model: nn.Module, **options: Any) -> llm.PruneReport:
    """Prune a model; the report's error of the last block must be that of the whole model's states there."""
    dense = copy.deepcopy(model)
    report = llm.prune_model(model, BATCHES, "2:4", progress=False, **options)
    last = report.blocks[-1].block
    (_, ours), (_, theirs) = llm.decoder_blocks(model), llm.decoder_blocks(dense)
    found, expected = (
        last_states(model, ours[last], BATCHES),
        last_states(dense, theirs[last], BATCHES),
    )
    true = float((found - expected).norm() / expected.norm())
    assert report.blocks[-1].error == pytest.approx(true, rel=1e-3)
    return report


class Plain(nn.Module):
    """A block of two linears over a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states + self.down(self.up(hidden_states).tanh())


class Model(nn.Module):
    """A language model of blocks of one kind."""

    def __init__(self, kind: type[nn.Module] = Plain, blocks: int = 3) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        return (self.head(self.passed(self.embed(input_ids))),)

    def passed(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


# What blocks return ---------------------------------------------------------------------------------


class ReturnsList(Plain):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return [super().forward(hidden_states), hidden_states.mean(), None]


class ReturnsState(Plain):
    """Hands on an argument, and something of its own."""

    def forward(self, hidden_states: Tensor, state: Any = None, **_: Any) -> Any:  # type: ignore[override]
        return super().forward(hidden_states), state, hidden_states.sum()


class Unpacks(Model):
    """Takes apart what blocks return, as RWKV, DeBERTa and GPT-1 do."""

    def passed(self, hidden: Tensor) -> Tensor:
        state = {"a": torch.ones(1)}
        for block in self.blocks:
            if isinstance(block, ReturnsList):
                hidden, _mean, none = block(hidden)
                assert none is None
            else:
                hidden, state, _ = block(hidden, state=state)
                assert set(state) == {"a"}
        return hidden


@pytest.mark.parametrize("kind", [ReturnsList, ReturnsState])
def test_tuples_and_lists_of_any_length_are_passed_on_in_their_form(kind: type[nn.Module]) -> None:
    assert len(check_errors(Unpacks(kind))) == 6


@pytest.mark.parametrize(
    ("config", "options", "linears"),
    [
        (
            "DebertaV2ForMaskedLM",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
            },
            12,
        ),
        ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2}, 8),
        # Without a limit of positions, which it gives as -1.
        ("XLNetLMHeadModel", {"d_model": 32, "d_inner": 64, "n_head": 4, "n_layer": 2}, 4),
    ],
)
def test_models_whose_callers_unpack_more_than_hidden_states_are_pruned(
    config: str, options: dict[str, int], linears: int
) -> None:
    kind = getattr(transformers, config)
    torch.manual_seed(0)
    report = check_errors(kind(kind.config_class(**options, vocab_size=VOCABULARY)).eval())
    assert len(report) == linears


def test_a_block_that_returns_no_hidden_states_is_refused() -> None:
    class Dict(Plain):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return {"hidden": super().forward(hidden_states)}

    class Reads(Model):
        def passed(self, hidden: Tensor) -> Tensor:
            for block in self.blocks:
                hidden = block(hidden)["hidden"]
            return hidden

    with pytest.raises(s3.ModelError, match="returns dict, not hidden states"):
        llm.prune_model(Reads(Dict), BATCHES, "2:4", progress=False)


# What blocks are given ------------------------------------------------------------------------------


class Shares(Plain):
    """Stores something for later blocks, or adds what an earlier one stored."""

    stores = True

    def forward(self, hidden_states: Tensor, memory: Any = None, **_: Any) -> Any:  # type: ignore[override]
        inner = self.up(hidden_states).tanh()
        if self.stores:
            memory["inner"] = (inner,)
        else:
            inner = inner + memory["inner"][0]
        return hidden_states + self.down(inner)


class Remembers(Model):
    def __init__(self, memory: Any) -> None:
        super().__init__(Shares)
        self.memory = memory
        for block in list(self.blocks)[1:]:
            block.stores = False

    def passed(self, hidden: Tensor) -> Tensor:
        memory = self.memory()
        for block in self.blocks:
            hidden = block(hidden, memory=memory)
        return hidden


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"budgets": "mixed"}, {"recover": 4}],
    ids=["alpha", "alpha 0", "budgets", "recovery"],
)
def test_each_stream_has_its_own_of_a_container_that_blocks_write_to(
    options: dict[str, Any],
) -> None:
    for memory in (dict, UserDict):
        assert len(check_errors(Remembers(memory), **options)) == 6


def gemma4(shared: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        sliding_window=8,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=shared,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.skipif(
    not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4"
)
class TestGemma4:
    @pytest.mark.parametrize("shared", [0, 1, 2])
    def test_keys_and_values_of_another_layer_are_those_of_the_same_stream(
        self, shared: int
    ) -> None:
        check_errors(gemma4(shared))

    def test_a_run_that_was_interrupted_ends_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, broken = gemma4(2), gemma4(2)
        options: dict[str, Any] = {"progress": False, "work_dir": tmp_path}
        llm.prune_model(whole, BATCHES, "2:4", progress=False)
        real = llm.run._prune_block

        def stops(runner: calibrate.BlockRunner, *rest: Any) -> Any:
            if runner.index == 3:
                raise KeyboardInterrupt
            return real(runner, *rest)

        monkeypatch.setattr(llm.run, "_prune_block", stops)
        with pytest.raises(KeyboardInterrupt):
            llm.prune_model(broken, BATCHES, "2:4", **options)
        monkeypatch.setattr(llm.run, "_prune_block", real)
        again = gemma4(2)
        assert llm.prune_model(again, BATCHES, "2:4", **options).resumed == 3
        for name, tensor in whole.state_dict().items():
            other = again.state_dict()[name]
            if isinstance(tensor, s3.StructuredSparseTensor):
                tensor, other = tensor.to_dense(), other.to_dense()
            assert torch.equal(tensor, other), name


def test_an_object_that_blocks_write_to_and_that_cannot_be_copied_is_refused() -> None:
    class Memory:
        def __setitem__(self, name: str, value: Any) -> None:
            setattr(self, name, value)

        def __getitem__(self, name: str) -> Any:
            return getattr(self, name)

    with pytest.raises(s3.ModelError, match="write to a Memory"):
        llm.prune_model(Remembers(Memory), BATCHES, "2:4", progress=False)


class Wide(Plain):
    """Several streams for each token, of which its linears see one: hyper-connections, AltUp."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states + super().forward(hidden_states[0])


class Streams(Model):
    def passed(self, hidden: Tensor) -> Tensor:
        return super().passed(hidden.expand(4, *hidden.shape)).mean(0)


@pytest.mark.parametrize("recover", [None, 4])
def test_hidden_states_of_four_dims_are_pruned(recover: int | None) -> None:
    report = check_errors(Streams(Wide), recover=recover)
    assert [row.samples for row in report] == [sum(batch.numel() for batch in BATCHES)] * 6
    assert not report.skipped


class Crosses(nn.Module):
    """Reads states of another length, of an encoder or of images."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.own = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, states: Tensor) -> Tensor:
        keys = self.key(states)
        other = self.own(states[:, ::2] * 2)  # of a length that is neither
        scores = (self.query(hidden_states) @ keys.transpose(1, 2)).softmax(-1)
        return hidden_states + scores @ keys + other.mean(1, keepdim=True)


class Encoded(Model):
    def passed(self, hidden: Tensor) -> Tensor:
        states = self.embed.weight[:10].expand(len(hidden), 10, WIDTH)
        for block in self.blocks:
            hidden = block(hidden, states)
        return hidden


def test_keys_of_another_length_are_pruned_by_what_they_see() -> None:
    report = check_errors(Encoded(Crosses))
    samples = {row.name.rpartition(".")[2]: row.samples for row in report}
    assert samples == {"query": 96, "key": 50}  # tokens; states of five sequences
    assert {name for name, _ in report.skipped} == {f"blocks.{n}.own" for n in range(3)}


class SomeCalled(Model):
    """Calls one block of two for token ids, as a model with cross-attention to images does."""

    def passed(self, hidden: Tensor) -> Tensor:
        for block in self.blocks[::2]:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("options", [{}, {"budgets": "mixed"}], ids=["one budget", "mixed"])
def test_blocks_that_token_ids_do_not_call_stay_dense_with_the_reason(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = SomeCalled(blocks=5)
    before = copy.deepcopy(model.blocks[1].state_dict())
    report = check_errors(model, work_dir=tmp_path, **options)
    assert [row.block for row in report.blocks] == [0, 2, 4]
    assert len(report) == 6
    reasons = dict(report.skipped)
    for name in ("blocks.1.up", "blocks.1.down", "blocks.3.up", "blocks.3.down"):
        assert "do not call its block" in reasons[name]
    assert all(torch.equal(before[name], x) for name, x in model.blocks[1].state_dict().items())


def test_a_block_that_some_sequences_call_and_others_do_not_is_refused() -> None:
    class Long(Model):
        def passed(self, hidden: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                if index != 1 or hidden.shape[1] > 20:
                    hidden = block(hidden)
            return hidden

    with pytest.raises(s3.ModelError, match="some calibration sequences call a block"):
        llm.prune_model(Long(), BATCHES, "2:4", progress=False)


def test_a_model_that_calls_no_block_is_refused() -> None:
    class None_(Model):
        def passed(self, hidden: Tensor) -> Tensor:
            return hidden

    with pytest.raises(s3.ModelError, match="calls none of its 3 blocks"):
        llm.prune_model(None_(), BATCHES, "2:4", progress=False)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("ViTForImageClassification", "it takes pixel_values"),
        ("WhisperForConditionalGeneration", "it takes input_features"),
        ("T5ForConditionalGeneration", "on token ids alone"),
    ],
)
def test_models_of_other_inputs_are_refused_with_what_they_take(config: str, what: str) -> None:
    kind = getattr(transformers, config)
    options = {
        "ViT": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "image_size": 32,
        },
        "Whi": {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "T5F": {"d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
    }[config[:3]]
    heads = {"num_attention_heads": 4} if config.startswith("ViT") else {}
    model = kind(kind.config_class(**options, **heads))
    with pytest.raises(s3.ModelError, match=what):
        llm.prune_model(model, token_batches((2, 8)), "2:4", progress=False)


# What a model is besides ----------------------------------------------------------------------------


def test_a_forward_of_a_blocks_own_stays() -> None:
    model = Model()
    block = model.blocks[0]
    block.forward = types.MethodType(lambda self, x: Plain.forward(self, x) * 0.5, block)
    patch = block.__dict__["forward"]
    check_errors(model)
    assert block.__dict__["forward"] is patch
    assert "forward" not in model.blocks[1].__dict__


def test_a_hook_of_accelerate_stays() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Model()
    hooks.add_hook_to_module(
        model.blocks[0], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    )
    patch = model.blocks[0].__dict__["forward"]
    assert len(check_errors(model)) == 6
    assert model.blocks[0].__dict__["forward"] is patch


def compile_blocks(model: Model) -> None:
    for block in model.blocks:
        block.compile(backend="eager")


def compile_parts(model: Model) -> None:
    for block in model.blocks:
        block.up.compile(backend="eager")


def wrap_blocks(model: Model) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")


def compile_forwards(model: Model) -> None:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")


@pytest.mark.parametrize("how", [compile_blocks, compile_parts, wrap_blocks, compile_forwards])
def test_compiled_modules_are_pruned_as_if_they_were_not_and_stay_compiled(how: Any) -> None:
    plain, model = Model(), Model()
    how(model)
    with torch.no_grad():
        model(input_ids=BATCHES[0])
    state = [(x, dict(x.__dict__)) for x in model.modules()]
    expected = llm.prune_model(plain, BATCHES, "2:4", progress=False)
    found = llm.prune_model(model, BATCHES, "2:4", progress=False)
    assert [row.error for row in found] == [row.error for row in expected]
    for module, before in state:
        for key in ("_compiled_call_impl", "forward"):
            assert module.__dict__.get(key) is before.get(key)
    with torch.no_grad():
        assert torch.equal(model(input_ids=BATCHES[0])[0], plain(input_ids=BATCHES[0])[0])
    torch._dynamo.reset()


def test_a_whole_compiled_model_is_pruned() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=BATCHES[0])
    assert len(llm.prune_model(compiled, BATCHES, "2:4", progress=False)) == 6
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=BATCHES[0])[0], model(input_ids=BATCHES[0])[0])
    torch._dynamo.reset()


def test_nothing_pruned_is_an_error_that_names_the_reasons() -> None:
    class Halves(Plain):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            half = hidden_states[:, ::2]
            return hidden_states + self.down(self.up(half).tanh()).mean()

    model = Model(Halves)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(s3.ModelError, match=r"no linear .*blocks\.0\.up: it does not see every"):
        llm.prune_model(model, BATCHES, "2:4", progress=False)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_what_lies_outside_the_blocks_is_reported() -> None:
    class Tower(Model):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4))
            self.head.weight = self.embed.weight  # counted once

    report = llm.prune_model(Tower(), BATCHES, "2:4", blocks=2, progress=False)
    found = [(part.name, part.linears, part.weights) for part in report.outside]
    assert found == [("embed", 0, 800), ("vision", 2, 64), ("blocks.2", 2, 1024)]
    assert report.summary()["outside"][1] == {"name": "vision", "linears": 2, "weights": 64}
    assert "outside the blocks, left as they were: blocks.2 (2 linears, 1,024 weights)" in str(
        report
    )


# One parameter in several places --------------------------------------------------------------------


def tied(options: list[tuple[int, str]]) -> Model:
    """A model in which linears of several blocks have the first one's parameter."""
    model = Model()
    (block, name), *others = options
    for other, leaf in others:
        getattr(model.blocks[other], leaf).weight = getattr(model.blocks[block], name).weight
    return model


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"recover": 4}])
def test_a_parameter_of_two_blocks_is_pruned_once_and_stays_one(
    compress: bool, options: dict[str, Any]
) -> None:
    model = tied([(0, "up"), (2, "up")])
    report = check_errors(model, compress=compress, **options)
    assert model.blocks[0].up.weight is model.blocks[2].up.weight
    assert s3.satisfies(
        model.blocks[0].up.weight.to_dense() if compress else model.blocks[0].up.weight, "2:4"
    )
    assert ("blocks.2.up", "it shares its weight with blocks.0.up") in report.skipped
    assert len(report) == 5


@pytest.mark.parametrize("compress", [True, False])
def test_a_shared_parameter_survives_an_interrupted_run(
    compress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(0, "up"), (1, "up"), (2, "up")]
    whole = tied(places)
    report = llm.prune_model(whole, BATCHES, "2:4", compress=compress, progress=False)
    real = llm.run._prune_block

    def stops(runner: calibrate.BlockRunner, *rest: Any) -> Any:
        if runner.index == 2:
            raise KeyboardInterrupt
        return real(runner, *rest)

    options: dict[str, Any] = {"compress": compress, "progress": False, "work_dir": tmp_path}
    monkeypatch.setattr(llm.run, "_prune_block", stops)
    with pytest.raises(KeyboardInterrupt):
        llm.prune_model(tied(places), BATCHES, "2:4", **options)
    monkeypatch.setattr(llm.run, "_prune_block", real)
    model = tied(places)
    again = llm.prune_model(model, BATCHES, "2:4", **options)
    assert again.resumed == 2
    assert [row.error for row in again.blocks] == [row.error for row in report.blocks]
    assert model.blocks[0].up.weight is model.blocks[1].up.weight is model.blocks[2].up.weight
    with torch.no_grad():
        assert torch.equal(model(input_ids=BATCHES[0])[0], whole(input_ids=BATCHES[0])[0])


def test_a_parameter_that_something_else_uses_too_stays_dense() -> None:
    model = Model()
    model.bridge = nn.Linear(WIDTH, 2 * WIDTH)
    model.bridge.weight = model.blocks[0].up.weight
    model.blocks[2].down = model.blocks[1].down
    report = check_errors(model, blocks=2)
    reasons = dict(report.skipped)
    assert "bridge.weight, which is not pruned" in reasons["blocks.0.up"]
    assert "a later block, which is not pruned" in reasons["blocks.1.down"]
    assert [row.name for row in report] == ["blocks.0.down", "blocks.1.up"]
    assert model.bridge.weight is model.blocks[0].up.weight


def test_a_failure_leaves_a_shared_parameter_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied([(0, "up"), (2, "up")])
    before = model.blocks[0].up.weight
    value = before.detach().clone()

    def fails(*_: Any) -> Any:
        raise RuntimeError("late")

    monkeypatch.setattr(s3.StructuredSparseTensor, "from_dense", fails)
    with pytest.raises(RuntimeError, match="late"):
        llm.prune_model(model, BATCHES, "2:4", progress=False)
    assert model.blocks[0].up.weight is model.blocks[2].up.weight is before
    assert torch.equal(before, value)


def test_probing_leaves_nothing_behind() -> None:
    model = Model()
    chunk = chain.catch_chunks(model, list(model.blocks), BATCHES, "cpu")[0]
    assert chunk.tokens == BATCHES[0].numel()
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
