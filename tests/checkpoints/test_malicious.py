"""Damaged, foreign and malicious files in each format: refused and named, nothing run, nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distrain.checkpoints.export import export, import_checkpoint, open_foreign
from distrain.checkpoints.foreign import pickles
from distrain.checkpoints.foreign.pickles import PickleRefused, read_pickle
from distrain.config import UserError


class Canary:
    """Runs a command when Python opens it; the command leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path):
    """Return an object that runs when it is opened, and see to it afterwards that it did not."""
    path = tmp_path / "canary"
    yield Canary(path)
    assert not path.exists(), "what was in the file ran"


def refused(path: Path, tmp_path: Path, *, match: str, **options: object) -> None:
    """Both import and export refuse `path`, and leave nothing behind."""
    for action in (
        lambda: import_checkpoint(path, tmp_path / "out", **options),
        lambda: export(path, tmp_path / "out.safetensors", **options),
    ):
        with pytest.raises(UserError, match=match):
            action()
    assert not (tmp_path / "out.safetensors").exists()
    assert not list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else True
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def rewritten(path: Path, change) -> None:
    """Write the archive at `path` anew, each record through `change(name, bytes)`; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


@pytest.fixture
def plain(tmp_path):
    """Return a state dict as torch.save writes it."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(1000.0), "b": torch.zeros(3)}, path)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Pickles that run something


@pytest.mark.fault(26)
def test_a_state_dict_with_more_than_tensors(tmp_path, canary):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(3), "x": canary}, path)
    refused(path, tmp_path, match=r"model\.pt: its pickle is not opened: it names posix\.system.*--trust")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.fault(26)
def test_every_protocol_of_pickle_runs_nothing(tmp_path, canary, protocol):
    with pytest.raises(PickleRefused):
        read_pickle(pickle.dumps({"x": canary}, protocol))


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch canary'\ntR.",
        b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
        b"cbuiltins\ngetattr\n(ctorch\nSize\nX\x08\x00\x00\x00__init__tR.",
        b"(S'touch canary'\nios\nsystem\n.",
        b"(ios\nsystem\n.",
        b"\x80\x02ctorch.serialization\nload\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"\x80\x02X\x02\x00\x00\x00os\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",
        b"P1\n.",
        b"\x80\x02ctorch\nSize\n}(X\x08\x00\x00\x00__code__K\x01ub.",
    ],
)
def test_programs_that_are_no_tensors(program):
    with pytest.raises(PickleRefused):
        read_pickle(program)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02h\x05.",
        b"\x80\x02",
        b"",
        b"\x80\x02t.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02}" + b"(" * 1000 + b"K\x01" + b"t" * 1000 + b"K\x01s.",
    ],
)
def test_programs_that_are_damaged_or_bombs(program):
    with pytest.raises(PickleRefused):
        read_pickle(program)


@pytest.mark.parametrize("operation", [b"]", b"N", b"K\x01", b"(", b"}q\x00"])
def test_a_program_of_too_many_operations(monkeypatch, operation):
    monkeypatch.setattr(pickles, "_MAX_OPERATIONS", 10_000)
    with pytest.raises(PickleRefused, match="more than 10,000 operations"):
        read_pickle(b"\x80\x02" + operation * 10_000 + b".")
    assert read_pickle(b"\x80\x02" + b"N" * 9_000 + b".") is None


@pytest.mark.parametrize("name", [b"torch\nSize", b"builtins\nset", b"collections\nOrderedDict"])
def test_copying_a_long_list_counts_as_reading_it(monkeypatch, name):
    """A few bytes each would copy what takes many to write."""
    monkeypatch.setattr(pickles, "_MAX_OPERATIONS", 10_000)
    long = b"\x80\x02c" + name + b"\nq\x00](" + b"K\x01K\x02\x86" * 1000 + b"eq\x01"
    assert len(read_pickle(long + b"0h\x00h\x01\x85R.")) in (1, 1000)
    with pytest.raises(PickleRefused, match="more than 10,000 operations"):
        read_pickle(long + b"0h\x00h\x01\x85R" * 10 + b".")


def test_a_place_in_the_memo_costs_no_memory():
    assert read_pickle(b"\x80\x02K\x07r\xff\xff\xff\xff.") == 7


def test_a_mapping_in_one_operation_is_one_value_of_its_list():
    assert read_pickle(b"\x80\x02](X\x01\x00\x00\x00aK\x01(K\x02NdK\x03e.") == ["a", 1, {2: None}, 3]


def test_tuples_of_tuples_are_no_keys():
    doubling = b"\x80\x02K\x01" + b"2\x86" * 60 + b"}q\x01h\x01"
    with pytest.raises(PickleRefused):
        read_pickle(doubling.replace(b"}q\x01h\x01", b"q\x00}h\x00K\x01s."))


def test_trust_opens_in_a_process_of_its_own(tmp_path, monkeypatch):
    path, ran = tmp_path / "model.pt", tmp_path / "ran"
    torch.save({"state_dict": {"w": torch.arange(6.0).reshape(2, 3).t()}, "x": Canary(ran), "global_step": 4}, path)
    with pytest.raises(UserError, match="--trust"):
        import_checkpoint(path, tmp_path / "out")
    assert not ran.exists()
    done = import_checkpoint(path, tmp_path / "out", trust=True)
    assert ran.exists()
    assert done.step == 4
    tensors = safetensors.torch.load_file(export(done.path, tmp_path / "out.safetensors").paths[0])
    assert torch.equal(tensors["w"], torch.arange(6.0).reshape(2, 3).t())


def test_a_whole_model_opens_with_trust_alone(tmp_path):
    model = torch.nn.Linear(3, 2)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        export(tmp_path / "model.pt", tmp_path / "out.safetensors")
    path = export(tmp_path / "model.pt", tmp_path / "out.safetensors", trust=True).paths[0]
    assert torch.equal(safetensors.torch.load_file(path)["weight"], model.weight)


def test_files_from_before_archives(tmp_path, canary):
    shared = torch.arange(8.0)
    state = {"w": shared[2:6], "again": shared[2:6], "half": torch.ones(3, dtype=torch.bfloat16)}
    path = tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    tensors = safetensors.torch.load_file(export(path, tmp_path / "out.safetensors").paths[0])
    assert sorted(tensors) == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor)
    torch.save({"w": torch.zeros(2), "x": canary}, path, _use_new_zipfile_serialization=False)
    (tmp_path / "out.safetensors").unlink()
    refused(path, tmp_path, match=r"old\.pt: torch does not open it without running what is in it.*--trust")


def test_modules_beside_a_file_do_not_run(tmp_path, monkeypatch):
    """A folder that came with its own json.py and torch.py: opening an old file there, trusted or not, imports none."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("json", "torch", "safetensors", "os"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(folder)
    torch.save({"w": torch.arange(3.0)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.arange(3.0), "x": Canary(tmp_path / "trusted")}, folder / "trusted.pt")
    for name, trust in (("old", False), ("trusted", True)):
        path = export(folder / f"{name}.pt", tmp_path / f"{name}.safetensors", trust=trust).paths[0]
        assert torch.equal(safetensors.torch.load_file(path)["w"], torch.arange(3.0))
    assert (tmp_path / "trusted").exists()
    assert not (tmp_path / "ran").exists(), "a module beside the file ran"


def test_trusted_pickles_may_name_modules_beside_them(tmp_path, monkeypatch):
    (tmp_path / "their_layers.py").write_text("import torch\nclass Layer(torch.nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    write = "import torch, their_layers; torch.save(their_layers.Layer(2, 2), 'model.pt')"
    subprocess.run([sys.executable, "-c", write], check=True)
    path = export(tmp_path / "model.pt", tmp_path / "out.safetensors", trust=True).paths[0]
    assert sorted(safetensors.torch.load_file(path)) == ["bias", "weight"]


# --------------------------------------------------------------------------------------------------------------------
# Archives


def test_a_flipped_bit_is_found(plain, tmp_path):
    raw = bytearray(plain.read_bytes())
    raw[raw.index(torch.arange(1000.0).numpy().tobytes()) + 77] ^= 1
    plain.write_bytes(raw)
    refused(plain, tmp_path, match=r"model\.pt: its bytes are not those that were written: a checksum differs")
    export(plain, tmp_path / "unchecked.safetensors", verify=False)


def test_a_flipped_bit_in_a_name_is_found(plain, tmp_path):
    raw = bytearray(plain.read_bytes())
    raw[raw.index(b"X\x01\x00\x00\x00w") + 5] ^= 2
    plain.write_bytes(raw)
    refused(plain, tmp_path, match=r"model\.pt: its bytes are not those that were written: a checksum differs")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off(plain, tmp_path, share):
    raw = plain.read_bytes()
    plain.write_bytes(raw[: int(len(raw) * share)])
    refused(plain, tmp_path, match=r"model\.pt: it does not end as a zip archive does")


def test_something_behind_the_archive(plain, tmp_path):
    plain.write_bytes(plain.read_bytes() + b"more")
    refused(plain, tmp_path, match="something was put behind it")


def test_compressed_records(plain, tmp_path):
    with zipfile.ZipFile(plain) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(plain, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records:
            archive.writestr(name, content)
        archive.writestr("model/data/9", bytes(10**7))  # a thousand times smaller as it lies there
    refused(plain, tmp_path, match=r"record 'model/[^']*' is compressed or encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_that_are_there_twice(plain, tmp_path):
    with zipfile.ZipFile(plain, "a") as archive:
        archive.writestr("model/data.pkl", b"cos\nsystem\n.")
    refused(plain, tmp_path, match=r"record 'model/data\.pkl' is there twice")


def test_records_over_each_other(plain, tmp_path):
    """Two entries of the directory point to one record: what a bomb without compression does."""
    with zipfile.ZipFile(plain) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records:
            archive.writestr(name, content)
        archive.writestr("model/data/8", bytes(100))
        archive.writestr("model/data/9", bytes(100))
    raw = bytearray(out.getvalue())
    first, second = (raw.index(f"model/data/{n}".encode(), raw.index(b"PK\x01\x02")) for n in (8, 9))
    local = raw.index(b"model/data/9") - 30
    raw[first - 4 : first] = struct.pack("<L", local - 50)
    assert second > first
    plain.write_bytes(raw)
    refused(plain, tmp_path, match="is not where the directory says|is not as the directory says|lie over each other")


def test_sizes_that_cannot_be(plain, tmp_path):
    raw = bytearray(plain.read_bytes())
    where = raw.index(b"PK\x06\x06") if b"PK\x06\x06" in raw else raw.index(b"PK\x05\x06")
    raw[where + 24 : where + 56] = b"\xff" * 32
    plain.write_bytes(raw)
    refused(plain, tmp_path, match="its directory is not where a zip archive's is")


def test_a_tensor_beyond_its_storage(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(4, 4)}, path)
    rewritten(path, lambda name, raw: raw[:32] if name.endswith("data/0") else raw)
    refused(path, tmp_path, match="storage '0' should have 64 bytes, and has 32")
    torch.save({"w": torch.zeros(4, 4)}, path)
    rewritten(path, lambda name, raw: raw.replace(b"K\x04K\x04\x86", b"K\x04K\x7f\x86") if "pkl" in name else raw)
    refused(path, tmp_path, match="a tensor reaches beyond the bytes of storage '0'")
    torch.save({"w": torch.zeros(4, 4)}, path)
    rewritten(path, lambda name, raw: None if name.endswith("data/0") else raw)
    refused(path, tmp_path, match="the bytes of storage '0' are not in the file")


def test_big_endian_files(plain, tmp_path):
    rewritten(plain, lambda name, raw: b"big" if name.endswith("byteorder") else raw)
    refused(plain, tmp_path, match="big-endian")


def test_what_is_no_state_dict(tmp_path):
    for content, found in (([torch.zeros(3)], "list"), ({"a": 1}, "found a"), ({}, "an empty mapping")):
        torch.save(content, tmp_path / "model.pt")
        refused(tmp_path / "model.pt", tmp_path, match=f"{found}.*expected a state dict")


def test_a_zip_file_that_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("folder/../../evil", b"x")
    refused(tmp_path / "model.pt", tmp_path, match=r"no record data\.pkl")


# --------------------------------------------------------------------------------------------------------------------
# Safetensors and Hugging Face's folders


def header(tmp_path: Path, content: object, data: bytes = bytes(16)) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "data", "match"),
    [
        ({"w": ONE}, bytes(15), "does not have the bytes"),
        ({"w": ONE}, bytes(17), "header lists"),
        ({"w": ONE, "v": ONE}, bytes(16), "does not lie where the one before it ends"),
        ({"w": ONE | {"data_offsets": [4, 20]}}, bytes(20), "does not lie where"),
        ({"w": ONE | {"data_offsets": [16, 0]}}, bytes(16), "does not have the bytes"),
        ({"w": ONE | {"shape": [-4]}}, bytes(16), "are not sizes"),
        ({"w": ONE | {"shape": [2**62, 2**62]}}, bytes(16), "are not sizes"),
        ({"w": ONE | {"shape": [2**61, 2**61]}}, bytes(16), "does not have the bytes"),
        ({"w": ONE | {"dtype": "Q4"}}, bytes(16), "dtype 'Q4'"),
        ({"w": {"dtype": "F32"}}, b"", "is missing"),
        (b'{"w": 1, "w": 2}', b"", "a key is there twice"),
        (b"{", b"", "is not the JSON"),
        (b'{"a":' * 30_000, b"", "is not the JSON"),
    ],
)
def test_headers_that_cannot_be(tmp_path, content, data, match):
    path = header(tmp_path, content, data)
    refused(path, tmp_path, match=rf"model\.safetensors: .*{match}", format="safetensors")


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    refused(path, tmp_path, match="its header would have 1,000,000,000,000 bytes")


@pytest.mark.parametrize("name", ["../victim.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\ny"])
@pytest.mark.fault(27)
def test_indexes_that_lead_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "victim.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(
        folder, tmp_path, match=r"model\.safetensors\.index\.json: a file in weight_map is .*not the name of a file"
    )


def test_indexes_that_do_not_fit(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}))
    refused(folder, tmp_path, match=r"a\.safetensors: it is not there")
    safetensors.torch.save_file({"w": torch.zeros(3)}, folder / "a.safetensors")
    refused(folder, tmp_path, match=r"a\.safetensors: its tensors are not those that .* lists for it, such as 'v'")
    index.write_text("[]")
    refused(folder, tmp_path, match=r"index\.json: it is not a JSON object")


def test_indexes_of_torch_files_that_do_not_fit(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "pytorch_model.bin.index.json"
    torch.save({"a": torch.zeros(3)}, folder / "one.bin")
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, folder / "two.bin")
    for mapping, name, odd in (
        ({"a": "one.bin", "b": "two.bin"}, "two", "a"),  # two files hold an `a`, and only one of them is meant
        ({"a": "one.bin", "b": "one.bin"}, "one", "b"),
        ({"b": "two.bin"}, "two", "a"),
    ):
        index.write_text(json.dumps({"weight_map": mapping}))
        refused(
            folder, tmp_path, match=rf"{name}\.bin: its tensors are not those that .* lists for it, such as '{odd}'"
        )
    torch.save({"b": torch.ones(3)}, folder / "two.bin")
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    tensors = safetensors.torch.load_file(export(folder, tmp_path / "out.safetensors").paths[0])
    assert torch.equal(tensors["a"], torch.zeros(3))
    assert torch.equal(tensors["b"], torch.ones(3))


@pytest.mark.fault(27)
def test_symbolic_links_are_not_followed(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "victim.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "victim.safetensors")
    refused(folder, tmp_path, match=r"model\.safetensors: it is a symbolic link")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, tmp_path, match=r"model\.safetensors: it is not a regular file")
    # what the user names may be a link
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "victim.safetensors")
    export(tmp_path / "link.safetensors", tmp_path / "fine.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint and Accelerate


@pytest.fixture
def dcp(written, tmp_path):
    """Return a copy of a folder of torch.distributed.checkpoint."""
    return Path(shutil.copytree(written("dcp").path, tmp_path / "dcp"))


def changed(folder: Path, change) -> None:
    """Write `.metadata` anew as `change` leaves it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def set_all(field: str, value: object):
    def change(metadata) -> None:
        for info in metadata.storage_data.values():
            setattr(info, field, value)

    return change


@pytest.mark.fault(26)
def test_metadata_that_runs_something(dcp, tmp_path, canary):
    changed(dcp, lambda metadata: setattr(metadata, "planner_data", canary))
    refused(dcp, tmp_path, match=r"\.metadata: it names posix\.system")


@pytest.mark.fault(26)
def test_parts_that_run_something(dcp, tmp_path, canary):
    content = io.BytesIO()
    torch.save(canary, content)
    (dcp / "__0_0.distcp").write_bytes(content.getvalue())
    for field, value in (("relative_path", "__0_0.distcp"), ("offset", 0), ("length", len(content.getvalue()))):
        changed(dcp, set_all(field, value))
    refused(dcp, tmp_path, match=r"__0_0\.distcp: .*it names posix\.system")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("relative_path", "../victim", "a file is '../victim', which is not the name of a file"),
        ("relative_path", "/etc/passwd", "which is not the name of a file"),
        ("offset", 10**12, r"distcp: a part of it would reach beyond its end"),
        ("offset", -5, r"distcp: a part of it would reach beyond its end"),
        ("offset", 3, r"distcp: "),
        ("length", 100, r"distcp: "),
        ("transform_descriptors", ["zstd"], "was transformed when it was written"),
    ],
)
def test_places_that_cannot_be(dcp, tmp_path, field, value, match):
    changed(dcp, set_all(field, value))
    refused(dcp, tmp_path, match=match)


def test_parts_that_are_missing_or_double(dcp, tmp_path):
    def drop(metadata) -> None:
        key = next(index for index in metadata.storage_data if index.fqn == "model.rows")
        del metadata.storage_data[key]

    changed(dcp, drop)
    refused(dcp, tmp_path, match=r"tensor 'model/rows' is not whole: it has 15 elements, and its parts hold")


def test_parts_over_each_other(dcp, tmp_path):
    def move(metadata) -> None:
        chunks = metadata.state_dict_metadata["model.columns"].chunks
        assert chunks[1].offsets == torch.Size([0, 4, 0])
        chunks[1].offsets = torch.Size([0, 3, 0])
        for index in metadata.storage_data:
            if index.fqn == "model.columns" and index.offset == torch.Size([0, 4, 0]):
                object.__setattr__(index, "offset", torch.Size([0, 3, 0]))

    changed(dcp, move)
    refused(dcp, tmp_path, match=r"tensor 'model/columns' is not whole: parts of it lie over each other")


def test_a_missing_file_of_the_folder(dcp, tmp_path):
    (dcp / "__1_0.distcp").unlink()
    refused(dcp, tmp_path, match=r"__1_0\.distcp: it is not there")


def test_folders_of_one_rank_alone(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    torch.save({}, folder / "pytorch_model_fsdp_0_rank0.bin")
    refused(folder, tmp_path, match="holds one rank's shards.*SHARDED_STATE_DICT")


def test_pickles_of_accelerate_are_left_alone(written, tmp_path, canary):
    folder = Path(shutil.copytree(written("plain").path / "safetensors", tmp_path / "state"))
    (folder / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(canary))
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(canary))
    done = import_checkpoint(folder, tmp_path / "out")
    assert any("custom_checkpoint_0.pkl" in what for what in done.skipped)


# --------------------------------------------------------------------------------------------------------------------
# DeepSpeed


@pytest.fixture
def zero(written, tmp_path):
    """Return a copy of a folder of DeepSpeed's ZeRO-2, and the folder of its tag."""
    folder = Path(shutil.copytree(written("zero2").path, tmp_path / "zero"))
    return folder, folder / "global_step3"


@pytest.mark.fault(26)
def test_a_state_that_runs_something(zero, tmp_path, canary):
    folder, tag = zero
    file = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"x": canary}, file)
    refused(folder, tmp_path, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: .*it names posix\.system")


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "", "nothing", "a\nb"])
@pytest.mark.fault(27)
def test_tags_that_lead_elsewhere(zero, tmp_path, tag):
    folder, _ = zero
    (folder / "latest").write_text(tag)
    refused(folder, tmp_path, match="latest: the tag is|and there is no such folder")


@pytest.mark.fault(27)
def test_tags_that_are_links(zero, tmp_path):
    folder, tag = zero
    tag.rename(tmp_path / "moved")
    tag.symlink_to(tmp_path / "moved")
    refused(folder, tmp_path, match="there is no such folder")


def test_ranks_that_are_missing_or_of_another_checkpoint(zero, written, tmp_path):
    folder, tag = zero
    second = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.rename(tmp_path / "kept")
    refused(folder, tmp_path, match=r"written by 2 ranks, and there are 1 \*_optim_states")
    other = next((written("zero1").path / "global_step3").glob("*rank_1_*optim*"))
    shutil.copy(other, tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    refused(folder, tmp_path, match="rank 1 has no file like")
    (tmp_path / "kept").rename(second)
    refused(folder, tmp_path, match=r"written by 2 ranks, and there are 3 \*_optim_states")


def test_files_that_do_not_belong_together(zero, tmp_path):
    folder, tag = zero
    file = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(5)
    torch.save(content, file)
    refused(folder, tmp_path, match="elements, and .* are needed: it was cut off")
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(500)
    torch.save(content, file)
    refused(folder, tmp_path, match="the files do not belong together")


def test_tensor_parallel_folders(zero, tmp_path):
    folder, tag = zero
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    refused(folder, tmp_path, match="tensor parallelism")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("layer_01-model_00-model_states.pt", "pipeline"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "expert"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "expert"),
        ("zero", "universal"),
    ],
)
def test_other_parallel_folders(zero, tmp_path, name, match):
    folder, tag = zero
    (tag / name).mkdir()
    refused(folder, tmp_path, match=f"{name}: it is of .*{match}")


def test_folders_without_fp32_weights(zero, tmp_path):
    folder, tag = zero
    for file in tag.glob("*_optim_states.pt"):
        file.unlink()
    refused(folder, tmp_path, match=r"there are no \*_optim_states\.pt files")
    export(tag / "mp_rank_00_model_states.pt", tmp_path / "weights.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# Any


def test_what_is_no_checkpoint(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, tmp_path, match="is not a checkpoint in a known format: it is empty")
    (folder / "notes.txt").write_text("text")
    refused(folder, tmp_path, match=r"it holds notes\.txt; expected a folder of Accelerate")
    refused(folder / "notes.txt", tmp_path, match="neither a safetensors file nor one of torch", format=None)
    with pytest.raises(UserError, match="there is no"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with (
        pytest.raises(UserError, match=r"no format 'deepsped'.*did you mean 'deepspeed'"),
        open_foreign(folder, format="deepsped"),
    ):
        pass


def optimizer_file(tmp_path, entries, **more):
    """Write a model of one parameter, with these entries as its optimizer's state."""
    path = tmp_path / "model.pt"
    torch.save(
        {"model": {"w": torch.zeros(2)}, "optimizer": {"state": {"w": entries}, "param_groups": []}} | more, path
    )
    return path


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1, [3], (3, [4]), "3", torch.tensor(float("nan")), 1e30])
def test_steps_that_cannot_be(tmp_path, step):
    path = optimizer_file(tmp_path, {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": step})
    with open_foreign(path) as source:
        assert source.step is None


def test_values_that_unfold_without_end(tmp_path):
    bomb = [0] * 10
    for _ in range(30):
        bomb = [bomb] * 10
    path = optimizer_file(tmp_path, {"exp_avg": torch.zeros(2), "odd": bomb})
    assert path.stat().st_size < 5000
    refused(path, tmp_path, match="unfold to more numbers than any optimizer keeps")


def test_values_that_are_nested_too_deep(tmp_path):
    """Pickled by hand: Python's own pickler does not go so deep."""
    path = optimizer_file(tmp_path, {"exp_avg": torch.zeros(2), "odd": "HERE"})
    deep = b"]" * 5000 + b"a" * 4999
    rewritten(path, lambda name, raw: raw.replace(b"X\x04\x00\x00\x00HERE", deep) if "pkl" in name else raw)
    refused(path, tmp_path, match=r"model\.pt.*(damaged, or not|is not opened)")


def test_optimizers_as_far_as_they_are_known(tmp_path):
    for entries, kind in (
        ({"exp_avg": torch.zeros(2)}, "Lion"),
        ({"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}, "AdamW"),
        ({"momentum_buffer": torch.zeros(2)}, "SGD"),
        ({"square_avg": torch.zeros(2), "momentum_buffer": torch.zeros(2)}, "RMSprop"),
    ):
        with open_foreign(optimizer_file(tmp_path, entries)) as source:
            assert source.optimizer == kind
    state = {"state": {"w": {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    with open_foreign(optimizer_file(tmp_path, {}, optimizer=[state, state, state])) as source:
        assert "several optimizers that have state for the same parameters (w)" in source.optimizer_problem


def test_tying_one_name_takes_no_other(tmp_path):
    path, same = tmp_path / "model.pt", torch.ones(2)
    names = ("h", "h2", "e")
    torch.save({"model": {n: same.clone() for n in names}, "ema": {n: same.clone() for n in names}}, path)
    with open_foreign(path, tied={"h": "e"}) as source:
        assert sorted(source.names) == ["ema/e", "ema/h2", "model/e", "model/h2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero3", "fsdp", "dcp", "plain"])
def test_whatever_is_damaged_is_refused_with_words(kind, written, tmp_path):
    """Bytes changed, taken out and put in at random: the outcome is an export or a UserError, never anything else."""
    folder = written(kind).path
    folder = next(folder.glob("*/pytorch_model*"), folder) if kind in ("fsdp", "plain") else folder
    rng = random.Random(kind)
    refusals = 0
    for _ in range(150):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy) if folder.is_dir() else shutil.copy(folder, copy)
        inside = copy.rglob("*") if copy.is_dir() else [copy]
        path = rng.choice(sorted(file for file in inside if file.is_file() and file.suffix != ".py"))
        raw = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 1, 4])):
            place, some = rng.randrange(len(raw)), rng.randrange(1, 20)
            match rng.randrange(4):
                case 0:
                    del raw[place : place + some]
                case 1:
                    raw[place:place] = rng.randbytes(some)
                case _:
                    raw[place] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            export(copy, tmp_path / "out.safetensors", overwrite=True, sync=False)
        except UserError:
            refusals += 1
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    assert refusals > 50
