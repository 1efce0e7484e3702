"""Checkpoint intake: any bytes become admitted tensors or one CheckpointError, and no foreign code runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bshub.errors import CheckpointError
from bshub.intake import checkpoint, quarantine
from bshub.intake.checkpoint import admit, load_into, read_checkpoint, unwrap
from bshub.intake.child import child_environment


def small(classes: int = 3, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def raw(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(act: Callable[..., object], *arguments: Any, **more: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        act(*arguments, **more)
    error = caught.value
    assert error.hint
    assert str(error).isprintable()
    assert "weights_only" not in str(error)
    return error


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo ran > "{self.marker}"',)


# --- through the child process (each costs an interpreter, most also torch)


def test_a_plain_pickle_payload_is_not_run(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "m.pkl"
    file.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    assert "system" in refused(read_checkpoint, file).message
    assert not marker.exists()


def test_another_pickle_protocol_is_refused_with_its_reason(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "m.pth"
    torch.save({"w": torch.ones(1), "x": Payload(marker)}, file, pickle_protocol=4)
    assert "outside protocol 2" in refused(read_checkpoint, file).message
    assert not marker.exists()


def test_a_zip_checkpoint_is_read_under_a_wrong_extension_and_tied_tensors_are_parted(tmp_path: Path) -> None:
    state, file = small().state_dict(), tmp_path / "m.safetensors"
    torch.save({"epoch": 3, "state_dict": {**state, "tied": state["0.weight"]}, "optimizer": {"lr": 0.1}}, file)
    read = read_checkpoint(file)
    assert same(read, {**state, "tied": state["0.weight"]})
    assert read["tied"].data_ptr() != read["0.weight"].data_ptr()


def test_a_legacy_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "m"), small().state_dict())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
def test_a_legacy_storage_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.pth"
    torch.save({"w": torch.zeros(123_457)}, file, _use_new_zipfile_serialization=False)
    small_count, huge = struct.pack("<i", 123_457), struct.pack("<i", 2**31 - 1)
    data = file.read_bytes()
    assert small_count in data
    file.write_bytes(data.replace(small_count, huge)[:4000])
    assert "more memory than its size" in refused(read_checkpoint, file).message


@pytest.mark.parametrize("kind", ["truncated", "bit flip", "deflate bomb", "torchscript", "other zip"])
def test_a_bad_zip_is_refused_before_anything_is_unpickled(tmp_path: Path, kind: str) -> None:
    file, buffer = tmp_path / "m.pth", io.BytesIO()
    torch.save({"w": torch.full((64,), 0.123)}, buffer)
    data = bytearray(buffer.getvalue())
    expected = {"truncated": "truncated", "bit flip": "checksum of", "deflate bomb": "unpack to"}
    expected |= {"torchscript": "TorchScript", "other zip": "not one that torch.save wrote"}
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "bit flip":
        data[data.index(struct.pack("<f", 0.123) * 4) + 7] ^= 1
    elif kind == "torchscript":
        file.touch()
        torch.jit.save(torch.jit.script(nn.ReLU()), str(file))
        data = bytearray(file.read_bytes())
    else:
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/data.pkl" if kind == "deflate bomb" else "a.txt", "x")
            archive.writestr("m/data/0", bytes(100 << 20 if kind == "deflate bomb" else 1))
        data = bytearray(buffer.getvalue())
    file.write_bytes(data)
    started = time.monotonic()
    assert expected[kind] in refused(quarantine.inspect_archive, file, "m.pth").message
    assert time.monotonic() - started < 2


def test_the_child_passes_its_reason_on(tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "m.pth: a truncated or damaged zip archive" in refused(read_checkpoint, tmp_path / "m.pth").message


def test_the_child_gets_no_secrets_and_no_torch_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    passed = child_environment(tmp_path)
    assert "hf_canary" not in passed.values()
    assert not any(name.startswith("TORCH") for name in passed)


def test_a_child_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "m.pth")
    monkeypatch.setattr(checkpoint, "SECONDS", 0.05)
    assert "stopped after" in refused(read_checkpoint, tmp_path / "m.pth").message


def test_crcs_that_torch_was_told_to_skip_are_not_held_against_a_file(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(1)}, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert quarantine.inspect_archive(tmp_path / "m.pth", "m.pth") > 0


# --- sniffing and safetensors (in this process)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "empty"),
        (tar(), "tar archive"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
        (b"cos\nsystem\n(S'true'\ntR.", "neither safetensors nor"),
        (bytes(64), "neither safetensors nor"),
    ],
    ids=["zero bytes", "tar", "html", "lfs", "hdf5", "protocol 0 pickle", "zeros"],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.pth").write_bytes(data)
    assert said in refused(read_checkpoint, tmp_path / "m.pth").message


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    refused(read_checkpoint, tmp_path / "none.pth")
    refused(read_checkpoint, tmp_path)
    refused(read_checkpoint, Path("a\0b"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        refused(read_checkpoint, tmp_path / "pipe.pth")


def test_a_file_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "m.pth").open("wb") as handle:
        handle.truncate((8 << 30) + 1)
    assert "more than" in refused(read_checkpoint, tmp_path / "m.pth").message


def test_safetensors_are_read_under_a_wrong_extension(tmp_path: Path) -> None:
    safetensors.torch.save_file(small().state_dict(), tmp_path / "m.pth")
    assert same(read_checkpoint(tmp_path / "m.pth"), small().state_dict())


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.ones(4)}, file)
    read = read_checkpoint(file)
    file.write_bytes(bytes(file.stat().st_size))
    assert read["w"].tolist() == [1, 1, 1, 1]


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
ONE = {"a": entry([1], 0, 4)}


@pytest.mark.parametrize(
    "data, said",
    [
        (raw(ONE, bytes(4), 2**63), "header of 9223372036854775808 bytes"),
        (raw(ONE, bytes(4), 200_000_000), "header of 200000000 bytes"),
        (raw(ONE, bytes(4), 5000), "truncated"),
        (raw(ONE, bytes(3)), "truncated"),
        (raw(ONE, bytes(5)), "1 trailing bytes"),
        (raw(TWICE, bytes(4)), "'a' twice"),
        (raw({**ONE, "b": entry([1], 0, 4)}, bytes(4)), "'b' overlaps"),
        (raw({**ONE, "b": entry([1], 8, 12)}, bytes(12)), "'b' leaves a gap"),
        (raw({"a": entry([2], 0, 4)}, bytes(4)), "does not fit"),
        (raw({"a": entry([-1], 0, 4)}, bytes(4)), "no valid shape"),
        (raw({"a": entry([0, 2**70], 0, 0)}, b""), "no valid shape"),
        (raw({"a": entry([1], 0, 8, "C64")}, bytes(8)), "dtype C64"),
        (raw({"a": 1}, b""), "not a tensor description"),
        (raw(b"{" * 100_000, b""), "not JSON"),
        (raw(b'{"a":' + b"9" * 9999 + b"}", b""), "not JSON"),
        (raw({}, b""), "no tensors"),
        (raw({"__metadata__": [], **ONE}, bytes(4)), "refused"),
    ],
)
def test_a_bad_safetensors_header_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    assert said in refused(read_checkpoint, tmp_path / "m.safetensors").message


def test_a_hostile_tensor_name_is_escaped_and_makes_no_path(tmp_path: Path) -> None:
    name, folder = "../../x\0\x1b[2J\u202e\n", tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "m.safetensors").write_bytes(raw({name: entry([1], 0, 4)}, struct.pack("<f", float("nan"))))
    assert r"'../../x\x00\x1b[2J\u202e\n'" in refused(read_checkpoint, folder / "m.safetensors").message
    (folder / "m.safetensors").write_bytes(raw({name: entry([1], 0, 4)}, bytes(4)))
    refused(load_into, small(), read_checkpoint(folder / "m.safetensors"), origin="m\x1b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "m.safetensors"]


SOUND = safetensors.torch.save({"w": torch.ones(2, 3), "n": torch.tensor(1), "running_var": torch.ones(2)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.builds(raw, st.binary(max_size=80).map(lambda rest: b"{" + rest), st.binary(max_size=20)),
        st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(max_size=3)), min_size=1, max_size=4).map(
            lambda edits: _mutated(SOUND, edits)
        ),
    )
)
def test_any_bytes_are_admitted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    def inspect_only(path: Path, origin: str) -> dict[str, Tensor]:
        quarantine.inspect_archive(path, origin)
        raise CheckpointError("a child would open this", hint="-")

    monkeypatch.setattr(checkpoint, "_from_pickle", inspect_only)
    (tmp_path / "any").write_bytes(data)
    try:
        state = read_checkpoint(tmp_path / "any")
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


def _mutated(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for place, piece in edits:
        data = data[:place] + piece + data[place + len(piece) // 2 :]
    return data


# --- admission


@pytest.mark.parametrize(
    "tensor, said",
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "without data"),
        (torch.zeros(2, dtype=torch.complex64), "complex"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.tensor([1.0, float("nan"), float("inf")]), "NaN or Inf in 2 of 3"),
        (torch.tensor([float("inf")], dtype=torch.float16), "NaN or Inf"),
        (torch.frombuffer(bytearray(b"\7"), dtype=torch.bool), "boolean"),
        (torch.zeros(1).expand(9), "storage"),
        ([1.0], "is a list"),
    ],
    ids=["sparse", "meta", "complex", "float8", "nan", "half inf", "bool", "stride 0", "list"],
)
def test_a_tensor_that_cannot_be_weights_is_named(tensor: object, said: str) -> None:
    error = refused(admit, {"fine": torch.ones(1), "layer.weight": tensor}, origin="m")
    assert "'layer.weight'" in error.message
    assert said in error.message


def test_a_negative_running_var_is_named() -> None:
    state = small().state_dict()
    state["1.running_var"][2] = -0.5
    assert "'1.running_var' is a variance and is negative: -0.5" in refused(admit, state).message


def test_thousands_of_names_for_one_storage_are_refused() -> None:
    shared = torch.zeros(1 << 18)
    assert "claims" in refused(admit, {str(index): shared for index in range(1000)}).message


def test_admitted_tensors_are_contiguous_detached_and_own_their_memory() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "t": base.t(),
        "part": base[1],
        "param": nn.Parameter(torch.ones(2)),
        "neg": torch._neg_view(torch.ones(2)),
    }
    admitted = admit(state)
    assert same(admitted, {name: value.detach() for name, value in state.items()})
    assert all(value.is_contiguous() and type(value) is Tensor for value in admitted.values())
    assert len({value.untyped_storage().data_ptr() for value in admitted.values()}) == 4
    assert same(safetensors.torch.load(safetensors.torch.save(admitted)), admitted)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "net", "state_dict_ema", "model_ema"])
def test_a_container_is_unwrapped(key: str) -> None:
    state = {"w": torch.ones(1)}
    assert unwrap({"epoch": 1, key: state}) is state
    assert unwrap({"state_dict": {key: state}}) is state


def test_plain_weights_win_over_their_average() -> None:
    plain = {"w": torch.ones(1)}
    assert unwrap({"state_dict_ema": {"w": torch.zeros(1)}, "model_ema": {}, "state_dict": plain}) is plain


@pytest.mark.parametrize("loaded", [[torch.ones(1)], {0: torch.ones(1)}, {}, {"epoch": 3}, torch.ones(1), None])
def test_what_is_no_state_dict_is_refused(loaded: object) -> None:
    refused(unwrap, loaded)


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    refused(unwrap, loop)


# --- loading


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_wrapper_prefixes_are_taken_off(prefix: str) -> None:
    state = {name: value + 1 for name, value in small().state_dict().items()}
    model = small()
    load_into(model, {prefix + name: value for name, value in state.items()}, origin="m")
    assert same(model.state_dict(), state)


def test_a_models_own_child_called_model_keeps_its_name() -> None:
    wrapper = nn.ModuleDict({"model": small()})
    state = {f"module.{name}": value + 1 for name, value in wrapper.state_dict().items()}
    load_into(wrapper, state, origin="m")
    assert torch.equal(wrapper.state_dict()["model.0.bias"], state["module.model.0.bias"])


def test_a_prefix_on_some_keys_only_is_not_taken_off() -> None:
    state = small().state_dict()
    state["module.0.bias"] = state.pop("0.bias")
    message = refused(load_into, small(), state, origin="m.pth").message
    assert "1 missing (0.bias), 1 unexpected (module.0.bias)" in message


def test_missing_keys_are_counted_and_three_are_listed_and_nothing_is_changed() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = refused(load_into, model, {"0.weight": torch.zeros(4, 3, 3, 3)}, origin="m").message
    assert "7 missing (0.bias, 1.weight, 1.bias, …)" in message
    refused(load_into, model, {}, origin="m")
    assert same(model.state_dict(), before)


def test_a_missing_batch_counter_is_fine() -> None:
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    load_into(small(), state, origin="m")


def test_another_number_of_classes_is_told_with_the_option_that_fits() -> None:
    error = refused(load_into, small(classes=3), small(classes=7).state_dict(), origin="m")
    assert "'4.weight' is [7, 4] in the checkpoint and [3, 4] in the model" in error.message
    assert error.hint is not None and error.hint.endswith("--num-classes 7")


def test_another_width_points_to_the_architecture() -> None:
    error = refused(load_into, small(width=4), small(width=8).state_dict(), origin="m")
    assert error.hint is not None and "--arch" in error.hint and "classes" not in error.hint


def test_integer_weights_are_refused() -> None:
    state = small().state_dict()
    state["0.weight"] = torch.ones(4, 3, 3, 3, dtype=torch.int64)
    assert "'0.weight' holds int64" in refused(load_into, small(), state, origin="m").message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_to_the_models(dtype: torch.dtype) -> None:
    model = small()
    load_into(model, {name: value.to(dtype) for name, value in small().state_dict().items()}, origin="m")
    loaded = model.state_dict()["0.weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, small().state_dict()["0.weight"].to(dtype).float())


def test_a_value_that_overflows_the_models_precision_is_refused() -> None:
    state = small().state_dict()
    state["0.bias"] = torch.full((4,), 1e300, dtype=torch.float64)
    assert "overflows float32" in refused(load_into, small(), state, origin="m").message


def test_a_fractional_batch_counter_is_refused() -> None:
    state = small().state_dict()
    state["1.num_batches_tracked"] = torch.tensor(0.5)
    assert "cannot hold" in refused(load_into, small(), state, origin="m").message
