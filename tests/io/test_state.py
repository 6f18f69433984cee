"""Checkpoints: what is written comes back, and what is damaged or hostile is refused, never believed."""

from __future__ import annotations

import ast
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from limits import little_memory
from mixed_state import equal_states, mixed_bytes, mixed_state, same
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import s3tensor as s3
from s3tensor.files import write_atomically, write_json, write_output
from s3tensor.io import state as checkpoint
from s3tensor.io.state import METADATA_KEY, flatten_state, load_state, save_state, unflatten_state
from s3tensor.pattern import BoundPattern
from s3tensor.testing import bound_patterns, weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One folder serves all examples of a test: each example writes the same names anew.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@one_folder
@given(bound_patterns(max_elements=1024), st.data())
def test_what_is_saved_is_loaded(tmp_path: Path, bound: BoundPattern, data: st.DataObject) -> None:
    dense = data.draw(weights(bound.shape, DTYPES))
    tensor: Tensor = s3.StructuredSparseTensor.from_dense(dense, bound.pattern)
    if dense.ndim == 2 and data.draw(st.booleans()):
        tensor = tensor.t()
    state = {"w": tensor, "dense": dense}
    save_state(tmp_path / "x", state)
    found = load_state(tmp_path / "x")
    assert equal_states(found, state)
    expected = tensor.to_dense()
    assert torch.equal(found["w"].to_dense(), expected)


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "x", mixed_state())
    assert equal_states(load_state(tmp_path / "x"), mixed_state())


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for index in range(8):
        save_state(tmp_path / str(index), mixed_state())
        found.add((tmp_path / str(index)).read_bytes())
    assert len(found) == 1


def test_tensors_that_share_storage_are_stored_once_for_each_name(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    sparse = mixed_state()["q.weight"]
    state = {"a": whole, "b": whole, "row": whole[2], "turned": whole.t(), "p": sparse, "q": sparse}
    save_state(tmp_path / "x", state)
    assert equal_states(load_state(tmp_path / "x"), state)


def test_any_reader_of_safetensors_sees_flat_names(tmp_path: Path) -> None:
    state = mixed_state()
    save_state(tmp_path / "x", state)
    with safe_open(tmp_path / "x", "pt") as file:
        assert {"q.weight.packed", "q.weight.indices", "norm.weight"} <= set(file.keys())
        assert torch.equal(file.get_tensor("q.weight.packed"), state["q.weight"].packed)
        digest, text = file.metadata()[METADATA_KEY].split(" ", 1)
        assert len(digest) == 64
        assert json.loads(text)["sparse"]["q.weight"]["shape"] == [8, 16]


def test_a_pattern_is_stored_by_its_parts_and_shown_by_its_name(tmp_path: Path) -> None:
    save_state(tmp_path / "x", mixed_state())
    found = load_state(tmp_path / "x")["k.weight"]
    assert str(found.pattern) == "coupled2:4"
    with safe_open(tmp_path / "x", "pt") as file:
        fields = json.loads(file.metadata()[METADATA_KEY].split(" ", 1)[1])["sparse"]["k.weight"]
    # A reader in which "coupled2:4" means something else still gets this pattern.
    assert s3.Pattern.parse(fields["pattern"]) == s3.Pattern.parse("coupled2:4")
    assert "view=" in fields["pattern"]


def test_two_tensors_of_one_stored_name_are_refused(tmp_path: Path) -> None:
    state = {"w": mixed_state()["q.weight"], "w.packed": torch.ones(2)}
    with pytest.raises(s3.CheckpointError, match=r"two tensors.*w\.packed"):
        save_state(tmp_path / "x", state)
    assert not (tmp_path / "x").exists()


# flat states ----------------------------------------------------------------------------------------


@given(bound_patterns(max_elements=1024), st.booleans(), st.data())
def test_unflatten_is_the_inverse_of_flatten(
    bound: BoundPattern, checksums: bool, data: st.DataObject
) -> None:
    dense = data.draw(weights(bound.shape, DTYPES))
    tensor = s3.StructuredSparseTensor.from_dense(dense, bound.pattern)
    state: dict[str, Tensor] = {"w": tensor, "dense": dense}
    if dense.ndim == 2:
        state["turned"] = tensor.t()
    tensors, description = flatten_state(state, checksums=checksums)
    assert all(type(t) is Tensor and t.is_contiguous() for t in tensors.values())
    assert equal_states(unflatten_state(tensors, description), state)


def test_a_file_is_the_flat_state_with_its_description(tmp_path: Path) -> None:
    state = mixed_state()
    save_state(tmp_path / "x", state)
    tensors, description = flatten_state(state, checksums=True)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {METADATA_KEY: description}
        assert set(file.keys()) == set(tensors)
        assert all(same(file.get_tensor(name), tensors[name]) for name in tensors)


def sealed(document: Any) -> str:
    text = json.dumps(document)
    return f"{checkpoint._digest(text)} {text}"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("", "checksum of its metadata"),
        (None, "NoneType, not the string"),
        (b"bytes", "bytes, not the string"),
        ("0" * 64 + " {}", "checksum of its metadata"),
        (sealed([]), "format None"),
        (sealed({"format": 2, "sparse": {}}), "format 2"),
        (sealed({"format": 1}), "lacks 'sparse'"),
        (sealed({"format": 1, "sparse": {}, "sha256": []}), "damaged 'sha256'"),
        (sealed({"format": 1, "sparse": {"other": {}}}), "other: damaged description"),
        (sealed({"format": 1, "sparse": {"w": None}}), "w: damaged description"),
        (sealed({"format": 1, "sparse": {}, "sha256": {}}), "'w.indices' is missing"),
    ],
)
def test_a_description_of_another_state_is_refused(description: Any, message: str) -> None:
    with pytest.raises(s3.CheckpointError, match=message):
        unflatten_state(sparse_parts(), description)


@pytest.mark.parametrize("checksums", [False, True])
def test_changed_tensors_are_refused(checksums: bool) -> None:
    tensors, description = flatten_state(mixed_state(), checksums=checksums)
    changed = {**tensors, "q.weight.indices": torch.zeros_like(tensors["q.weight.indices"])}
    with pytest.raises(s3.CheckpointError, match=r"the state.*q\.weight"):
        unflatten_state(changed, description)
    changed = {**tensors, "norm.weight": tensors["norm.weight"] + 1}
    if checksums:
        with pytest.raises(s3.CheckpointError, match=r"checksum of 'norm\.weight'"):
            unflatten_state(changed, description)
    else:  # nothing says what a dense tensor was
        assert not equal_states(unflatten_state(changed, description), mixed_state())


@given(st.data())
def test_any_description_of_true_tensors_gives_sound_weights_or_a_refusal(
    data: st.DataObject,
) -> None:
    fields = data.draw(
        JSON
        | st.fixed_dictionaries({}, optional=dict.fromkeys(TRUE_FIELDS, JSON)).map(
            lambda change: {**TRUE_FIELDS, **change}
        )
    )
    try:
        found = unflatten_state(sparse_parts(), sealed({"format": 1, "sparse": {"w": fields}}))
    except s3.CheckpointError:
        return
    upright = found["w"].t() if found["w"].transposed else found["w"]
    assert s3.satisfies(upright.to_dense(), found["w"].pattern)


# damage ---------------------------------------------------------------------------------------------


def loads_as_it_was_or_is_refused(path: Path, data: bytes) -> bool:
    """True when the file was refused; fails when anything but the truth is loaded."""
    path.write_bytes(data)
    try:
        found = load_state(path)
    except s3.CheckpointError as error:
        refusal = str(error)
    else:
        assert equal_states(found, mixed_state())
        return False
    assert str(path) in refusal
    assert "\n" not in refusal
    return True


@one_folder
@given(st.data())
def test_changed_bytes_are_refused_or_change_nothing(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(mixed_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from((8, header_end(whole), len(whole))))
        where = data.draw(st.integers(0, min(end, len(whole)) - 1))
        whole[where] = data.draw(st.integers(0, 255))
    loads_as_it_was_or_is_refused(tmp_path / "x", bytes(whole))


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x0F])  # 0x0F makes I32 of F32, 0x01 makes 9 of 8
def test_a_change_of_any_single_byte_is_refused(tmp_path: Path, flip: int) -> None:
    whole = mixed_bytes()
    kept = []
    # Every byte of the header; of the tensors' bytes, which are all alike, every seventh.
    for where in (*range(header_end(whole)), *range(header_end(whole), len(whole), 7)):
        data = bytearray(whole)
        data[where] ^= flip
        if not loads_as_it_was_or_is_refused(tmp_path / "x", bytes(data)):
            kept.append(where)
    # Only the padding behind the header's JSON may change, and only to other white space.
    assert all(whole[where : where + 1] == b" " for where in kept)


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    whole = mixed_bytes()
    cuts = {*range(0, len(whole), 5), 7, 8, 9, header_end(whole), len(whole) - 1}
    for length in sorted(cuts):
        assert loads_as_it_was_or_is_refused(tmp_path / "x", whole[:length]), length


@one_folder
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 8)  # a header of 2**64 bytes
@example(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path: Path, data: bytes) -> None:
    assert loads_as_it_was_or_is_refused(tmp_path / "x", data)


def test_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    assert loads_as_it_was_or_is_refused(tmp_path / "x", mixed_bytes() + b"\0")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(s3.CheckpointError, match="not an s3tensor file"):
        load_state(tmp_path / "plain")
    with pytest.raises(s3.CheckpointError, match="does not exist"):
        load_state(tmp_path / "nothing")
    with pytest.raises(s3.CheckpointError):
        load_state(tmp_path)


# hostility ------------------------------------------------------------------------------------------


def forge(path: Path, document: Any, tensors: dict[str, Tensor], text: str | None = None) -> None:
    """A file whose checksums all hold, with any document."""
    text = json.dumps(document) if text is None else text
    save_file(tensors, path, {METADATA_KEY: f"{checkpoint._digest(text)} {text}"})


def sparse_parts() -> dict[str, Tensor]:
    tensor = mixed_state()["q.weight"]
    return {"w.packed": tensor.packed, "w.indices": tensor.indices}


def forge_sparse(path: Path, fields: Any, tensors: dict[str, Tensor] | None = None) -> None:
    tensors = sparse_parts() if tensors is None else tensors
    sums = {name: checkpoint.checksum(tensor) for name, tensor in tensors.items()}
    forge(path, {"format": 1, "sparse": {"w": fields}, "sha256": sums}, tensors)


TRUE_FIELDS = {"pattern": "2:4", "label": "2:4", "shape": [8, 16], "transposed": False}


def test_the_forgery_of_these_tests_loads_when_it_tells_the_truth(tmp_path: Path) -> None:
    forge_sparse(tmp_path / "x", TRUE_FIELDS)
    assert equal_states(load_state(tmp_path / "x"), {"w": mixed_state()["q.weight"]})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [8, 2**62]},
        {"shape": [2**39, 2**39]},
        {"shape": [2**100, 16]},
        {"shape": [-8, 16]},
        {"shape": [8, -16]},
        {"shape": [0, 16]},
        {"shape": [8.0, 16.0]},
        {"shape": [True, 128]},
        {"shape": ["8", "16"]},
        {"shape": "8x16"},
        {"shape": 128},
        {"shape": None},
        {"shape": []},
        {"shape": [128]},
        {"shape": [2, 4, 16]},
        {"shape": [8, 20]},
        {"shape": {"8": 16}},
        {"shape": [1] * 10_000},
        {"transposed": 1},
        {"transposed": None},
        {"transposed": "false"},
        {"pattern": None},
        {"pattern": ["2:4"]},
        {"pattern": ""},
        {"pattern": "nonsense"},
        {"pattern": "4:8"},
        {"pattern": "1:4"},
        {"pattern": "9" * 5000 + ":" + "9" * 5000},
        {"pattern": "2:" + "9" * 900},
        {"pattern": "block=1,1; scope=1,4; keep=2" + "; keep=2" * 10_000},
        {"pattern": "block=1,1; scope=1,4; keep=1e999"},
        {"pattern": "block=1,1; scope=1,4; keep=nan"},
        {"pattern": "block=-1,-1; scope=-1,-1; keep=0.5"},
        {"pattern": "view=m (t h p) -> m t p h; sizes=h:0,p:8; block=1,1,1,2; scope=1,1,4,1; keep=2"},
        {"pattern": "view=" + "(" * 900},
        {"pattern": "\ud800"},
    ],
    ids=lambda change: json.dumps(change)[:48],
)  # fmt: skip
def test_hostile_descriptions_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    forge_sparse(tmp_path / "x", {**TRUE_FIELDS, **change})
    with little_memory(), pytest.raises(s3.CheckpointError) as refused:
        load_state(tmp_path / "x")
    assert len(str(refused.value)) < 4000


@pytest.mark.parametrize("fields", [None, 3, "text", [], {}, [TRUE_FIELDS]], ids=repr)
def test_descriptions_of_the_wrong_type_are_refused(tmp_path: Path, fields: Any) -> None:
    forge_sparse(tmp_path / "x", fields)
    with pytest.raises(s3.CheckpointError, match="damaged description"):
        load_state(tmp_path / "x")


def test_a_few_bytes_cannot_claim_a_huge_weight(tmp_path: Path) -> None:
    # One kept weight of 2**39: five bytes of index, a terabyte when unpacked.
    pattern = "block=1,1; scope=1,-1; keep=1"
    bound = s3.Pattern.parse(pattern).bind((1, 2**39))
    tensors = {
        "w.packed": torch.ones(bound.packed_shape),
        "w.indices": torch.zeros(bound.index_bytes, dtype=torch.uint8),
    }
    forge_sparse(tmp_path / "x", {**TRUE_FIELDS, "pattern": pattern, "shape": [1, 2**39]}, tensors)
    with little_memory(), pytest.raises(s3.CheckpointError, match="for 1 stored values"):
        load_state(tmp_path / "x")


TEXT = st.text(max_size=60) | st.text("0123456789:;=,.-@() >mkhtp", max_size=60)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | TEXT
    | st.sampled_from(["2:4", "coupled2:4", "block=1,1; scope=1,4; keep=2"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


@one_folder
@given(st.dictionaries(st.sampled_from(["pattern", "label", "shape", "transposed"]), JSON))
@example({"label": "9" * 5000})
@example({"shape": [8, 16], "label": "2:4@"})
def test_any_fields_give_the_weight_or_a_refusal(tmp_path: Path, change: dict[str, Any]) -> None:
    forge_sparse(tmp_path / "x", {**TRUE_FIELDS, **change})
    try:
        found = load_state(tmp_path / "x")["w"]
    except s3.CheckpointError:
        return
    assert isinstance(found, s3.StructuredSparseTensor)
    assert found.numel() == 128
    upright = found.t() if found.transposed else found
    assert s3.satisfies(upright.to_dense(), found.pattern)


@one_folder
@given(TEXT)
def test_any_pattern_string_gives_its_pattern_or_a_refusal(tmp_path: Path, text: str) -> None:
    forge_sparse(tmp_path / "x", {**TRUE_FIELDS, "pattern": text, "label": text})
    try:
        found = load_state(tmp_path / "x")["w"]
    except s3.CheckpointError:
        return
    assert found.pattern == s3.Pattern.parse(text)


@one_folder
@given(JSON)
@example([])
@example({"format": 1})
@example({"format": True, "sparse": {}, "sha256": {}})
@example({"format": 1.0, "sparse": {}, "sha256": {}})
@example({"format": 2, "sparse": {}, "sha256": {}})
@example({"format": 1, "sparse": [], "sha256": {}})
@example({"format": 1, "sparse": {"w": {}}, "sha256": {"w.packed": None, "w.indices": 3}})
def test_any_document_but_the_true_one_is_refused(tmp_path: Path, document: Any) -> None:
    forge(tmp_path / "x", document, sparse_parts())
    with pytest.raises(s3.CheckpointError):
        load_state(tmp_path / "x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"format": ' + "9" * 10_000 + "}",
        '{"format": NaN}',
        '{"format": 1, "sparse": {}, "sha256": {}} trailing',
    ],
    ids=["empty", "cut", "deep lists", "deep objects", "long number", "nan", "trailing"],
)
def test_text_that_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    forge(tmp_path / "x", None, sparse_parts(), text)
    with pytest.raises(s3.CheckpointError):
        load_state(tmp_path / "x")


def _parts(**change: Tensor) -> dict[str, Tensor]:
    return {**sparse_parts(), **change}


@pytest.mark.parametrize(
    "tensors",
    [
        {"w.packed": sparse_parts()["w.packed"]},
        _parts(**{"w.packed": torch.zeros(32, 2, 1, dtype=torch.int32)}),
        _parts(**{"w.packed": torch.zeros(64, dtype=torch.bfloat16)}),
        _parts(**{"w.packed": torch.zeros(31, 2, 1)}),
        _parts(**{"w.indices": torch.zeros(16, dtype=torch.int8)}),
        _parts(**{"w.indices": torch.zeros(15, dtype=torch.uint8)}),
        _parts(**{"w.indices": torch.zeros(16, dtype=torch.uint8)}),  # block 0 kept twice
        _parts(**{"w.indices": torch.full((16,), 0x11, dtype=torch.uint8)}),  # descending
        _parts(w=torch.ones(8, 16)),  # dense and sparse under one name
    ],
    ids=["missing", "int values", "flat", "short", "signed", "cut", "twice", "descending", "both"],
)
def test_parts_that_packing_could_not_have_made_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    forge_sparse(tmp_path / "x", TRUE_FIELDS, tensors)
    with pytest.raises(s3.CheckpointError):
        load_state(tmp_path / "x")


def test_no_pickle_is_read_or_written_anywhere() -> None:
    """No module of the package but the test helpers names pickle, torch.load or torch.save."""
    package = Path(s3.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {"pickle", "marshal", "shelve", "dill"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, (
                    path
                )


# writing --------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def half(temporary: str) -> None:
        Path(temporary).write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(s3.CheckpointError, match=r"No space left on device.*free space"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert not leftovers(tmp_path)


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def stopped(temporary: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stopped)
    assert path.read_text() == "old"
    assert not leftovers(tmp_path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
import s3tensor as s3
from s3tensor.io.state import save_state

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
try:
    save_state(Path(sys.argv[1]), {"w": torch.ones(1024, 1024)})
except s3.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a thing of POSIX")
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {path}")
    assert done.stdout.count("\n") == 1
    assert path.read_text() == "old"
    assert not leftovers(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(s3.CheckpointError, match="cannot write") as refused:
        save_state(blocked / "x", {"w": torch.ones(2)})
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the super-user may write anywhere"
)
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(s3.CheckpointError, match="cannot write"):
            save_state(folder / "x", {"w": torch.ones(2)})
    finally:
        folder.chmod(stat.S_IRWXU)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permission bits are a thing of POSIX")
def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {"a": 1})
        assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "x.json", {"z": 1, "a": [math.pi]})
    assert json.loads((tmp_path / "a" / "b" / "x.json").read_text()) == {"z": 1, "a": [math.pi]}


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    file, link, later = tmp_path / "a" / "file", tmp_path / "link", tmp_path / "later"
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to(file)
    later.symlink_to(tmp_path / "b" / "new")
    for path in (link, later):
        write_output(path, "new")
        assert path.is_symlink() and path.read_text() == "new"
    assert file.read_text() == "new" and (tmp_path / "b" / "new").read_text() == "new"
    assert not leftovers(tmp_path) and not leftovers(file.parent)


def test_a_link_in_a_folder_of_a_model_is_replaced_and_what_it_names_left_alone(
    tmp_path: Path,
) -> None:
    """Such folders are views of the cache of Hugging Face, whose files other models share."""
    (tmp_path / "blob").write_text("shared")
    for name, write in (
        ("x.json", lambda path: write_json(path, {"a": 1})),
        ("x.safetensors", lambda path: save_state(path, {"w": torch.ones(2)})),
    ):
        (tmp_path / name).symlink_to(tmp_path / "blob")
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "blob").read_text() == "shared"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a thing of POSIX")
def test_a_pipe_and_a_device_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, nothing = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    nothing.symlink_to(os.devnull)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_output(pipe, "words")
    reader.join(60)
    assert read == ["words"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write_output(nothing, "words")
    assert nothing.is_symlink() and stat.S_ISCHR(nothing.stat().st_mode)
    assert not leftovers(tmp_path)
