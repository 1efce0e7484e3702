"""An output folder appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from bshub import files
from bshub.errors import OutputError
from bshub.files import MANIFEST, check_output, json_text, output_file, output_folder, recorded_sha256, sha256

posix = pytest.mark.skipif(os.name == "nt", reason="kills a child with a signal")


def write(folder: Path, text: str = "new", overwrite: bool = False) -> None:
    with output_folder(folder, overwrite) as place:
        (place / "sub").mkdir()
        (place / "sub" / "data").write_text(text)
        (place / MANIFEST).write_text("{}")


def text_of(folder: Path) -> str | None:
    """What an output holds, if it is whole; None if there is none. Anything else fails."""
    if not folder.exists():
        return None
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [MANIFEST, "sub", "sub/data"]
    return (folder / "sub" / "data").read_text()


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_a_good_block_leaves_the_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert text_of(tmp_path / "deep" / "out") == "new"
    assert beside(tmp_path / "deep" / "out") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("earlier", [None, "old"])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, error: type, earlier: str | None) -> None:
    folder = tmp_path / "out"
    if earlier:
        write(folder, earlier)
    with (
        pytest.raises(OutputError if error is OSError else error),
        output_folder(folder, True) as place,
    ):
        (place / "half").write_text("x")
        raise error
    assert text_of(folder) == earlier
    assert beside(folder) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as caught, output_folder(tmp_path / "out", False):
        raise OSError(28, "No space left on device")
    assert caught.value.hint == "free space, then rerun"


def test_overwriting_replaces_the_whole_earlier_output(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "old")
    (folder / "stray").write_text("x")
    write(folder, "new", overwrite=True)
    assert text_of(folder) == "new"
    assert beside(folder) == []


def test_a_filled_folder_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    check_output(folder, False)
    write(folder)
    with pytest.raises(OutputError, match="not empty"):
        check_output(folder, False)
    with pytest.raises(OutputError, match="not empty"):
        write(folder)
    assert text_of(folder) == "new"


def test_a_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "wedding.jpg").write_text("irreplaceable")
    with pytest.raises(OutputError, match="something else"):
        check_output(folder, True)
    with pytest.raises(OutputError):
        write(folder, overwrite=True)
    assert (folder / "wedding.jpg").read_text() == "irreplaceable"
    assert beside(folder) == []


@posix
def test_files_and_links_are_no_output_folder(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dangling", "file"):
        with pytest.raises(OutputError, match="not a folder"):
            check_output(tmp_path / name, True)
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "out")


def test_a_second_run_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with output_folder(folder, False) as place:
        with pytest.raises(OutputError, match="another run"):
            write(folder)
        (place / "sub").mkdir()
        (place / "sub" / "data").write_text("first")
        (place / MANIFEST).write_text("{}")
    assert text_of(folder) == "first"
    assert beside(folder) == []


def test_two_runs_into_two_folders_do_not_meet(tmp_path: Path) -> None:
    with output_folder(tmp_path / "a", False) as one, output_folder(tmp_path / "b", False) as two:
        assert one.is_dir()
        assert two.is_dir()


def test_a_run_into_m_spares_a_run_into_m_dot_x(tmp_path: Path) -> None:
    """``timm/resnet18`` and ``timm/resnet18.a1_in1k`` write side by side by default."""
    with output_folder(tmp_path / "m.x", False) as place:
        write(tmp_path / "m")
        assert place.is_dir()
        (place / MANIFEST).write_text("{}")


def test_an_output_that_was_just_moved_aside_is_restored(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "old")
    folder.rename(tmp_path / ".out.old")
    with pytest.raises(ValueError), output_folder(folder, True):
        raise ValueError
    assert text_of(folder) == "old"
    assert beside(folder) == []


def test_a_failed_swap_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "out", Path.rename
    write(folder, "old")
    monkeypatch.setattr(files, "_exchange", lambda *folders: False)

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OutputError):
        write(folder, "new", overwrite=True)
    assert text_of(folder) == "old"


def test_somebody_elses_folder_that_looks_like_a_leftover_survives(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "mine").write_text("irreplaceable")
    (tmp_path / "out").mkdir()
    with suppress(OutputError):
        write(tmp_path / "out")
    assert (tmp_path / ".out.old" / "mine").read_text() == "irreplaceable"


CHILD = """
import os, signal, sys
from pathlib import Path
from bshub import files
from bshub.files import MANIFEST, output_folder

folder, left = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "two renames":
    files._exchange = lambda *folders: False
def hook(event, arguments):
    global left
    watched = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir")
    if watched and str(folder.parent) in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with output_folder(folder, True) as place:
    (place / "sub").mkdir()
    (place / "sub" / "data").write_text("new")
    (place / MANIFEST).write_text("{}")
"""


@posix
@pytest.mark.parametrize("swap", ["one exchange", "two renames"])
def test_killed_at_any_step_the_old_output_or_the_new_one_is_whole(
    tmp_path: Path, child_environment: dict[str, str], swap: str
) -> None:
    """One child per step of the file system; the rerun after each kill mends everything."""
    seen: list[str | None] = []
    for step in range(100):
        folder = tmp_path / str(step) / "out"
        folder.parent.mkdir()
        write(folder, "old")
        command = [sys.executable, "-c", CHILD, str(folder), str(step), swap]
        child = subprocess.run(command, env=child_environment, timeout=60)
        if child.returncode == 0:
            break
        assert child.returncode == -9
        seen.append(text_of(folder))
        if seen[-1] is None:  # killed between the two renames
            assert text_of(folder.with_name(".out.old")) == "old"
        with pytest.raises(ValueError), output_folder(folder, True):
            raise ValueError  # any next run mends, even one that fails itself
        assert text_of(folder) in ("old", "new")
        assert beside(folder) == []
        write(folder, "rerun", overwrite=True)
        assert text_of(folder) == "rerun"
    else:
        pytest.fail("the child never came through")
    assert seen.count("old") >= 5
    assert "new" in seen
    exchanged = swap == "one exchange" and files._exchange(*map(make, (tmp_path / "a", tmp_path / "b")))
    assert (None in seen) is not exchanged


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="has no such call")
def test_an_exchange_gives_each_folder_the_others_name_or_changes_nothing(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (one / "x").touch()
    done = files._exchange(one, other)
    assert [path.name for path in (other if done else one).iterdir()] == ["x"]
    assert not files._exchange(one, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_lock_of_a_run_that_just_ended_excludes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its holder removed it, locked after: the file has no name any more and must not count."""
    samestat, seen = os.path.samestat, []

    def removed_at_first(ours: os.stat_result, named: os.stat_result) -> bool:
        if not seen:
            (tmp_path / ".out.lock").unlink()
            (tmp_path / ".out.lock").touch()
            named = os.stat(tmp_path / ".out.lock")
        seen.append(samestat(ours, named))
        return seen[-1]

    monkeypatch.setattr(os.path, "samestat", removed_at_first)
    write(tmp_path / "out")
    assert seen == [False, True]
    assert text_of(tmp_path / "out") == "new"


@posix
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot write beside"):
        write(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_parents_made_for_a_failed_run_go_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError), output_folder(tmp_path / "a" / "b" / "c" / "out", False):
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    with pytest.raises(OutputError):
        write(Path("a\0b"))


def test_what_somebody_put_there_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputError, match="something else"), output_folder(folder, True) as place:
        (place / MANIFEST).write_text("{}")
        folder.mkdir()
        (folder / "mine").write_text("irreplaceable")
    assert (folder / "mine").read_text() == "irreplaceable"
    assert beside(folder) == []


def test_a_mount_point_is_refused_before_any_work() -> None:
    with pytest.raises(OutputError, match="mount point"):
        check_output(Path(Path.cwd().anchor), True)


def test_json_text_is_json_without_anything_that_steers_a_terminal() -> None:
    data = {"näme\x1b[2J": ["\x9b31m", "\u202e", "\U000e0001", "\ud800", "a\nb", 1.5, None]}
    text = json_text(data)
    assert json.loads(text) == data
    assert "näme" in text
    assert all(ch.isprintable() or ch == "\n" for ch in text)
    text.encode("utf-8")
    with pytest.raises(ValueError):
        json_text(float("nan"))


@pytest.mark.parametrize("name", ["a[b]c", "a*", "a?", "…", "a b", "-x", ".hidden", "a\nb"])
def test_odd_names_are_folders_like_any_other(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    (tmp_path / f".{name}.1.tmp").mkdir()  # a leftover of a killed run
    (tmp_path / ".aXc.1.tmp").mkdir()  # somebody else's
    write(tmp_path / name, "again", overwrite=True)
    assert text_of(tmp_path / name) == "again"
    assert beside(tmp_path / name) == [".aXc.1.tmp"]


@posix
def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path / ("a" * 250))
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_name_that_is_far_too_long_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        check_output(tmp_path / ("a" * 300), False)


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_a_system_without_the_call_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    import ctypes

    asked: list[tuple[object, ...]] = []

    class Library:
        def renamex_np(self, *arguments: object) -> int:
            asked.append(arguments)
            return 0

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())  # one of a system that is not Linux
    done = files._exchange(tmp_path / "a", tmp_path / "b")
    assert done is (system == "darwin")
    assert asked == ([(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path / "b"), 2)] if done else [])


def test_a_manifest_states_the_digest_of_its_files_or_nothing(tmp_path: Path) -> None:
    assert recorded_sha256(tmp_path, "x") is None
    for text in (
        "",
        "[" * 99_999,
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"x": 3}}',
        '{"files": {"x": {"sha256": 3}}}',
    ):
        (tmp_path / MANIFEST).write_text(text)
        assert recorded_sha256(tmp_path, "x") is None
    (tmp_path / MANIFEST).write_text('{"files": {"x": {"sha256": "ab"}}}')
    assert recorded_sha256(tmp_path, "x") == "ab"


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 999)
    assert sha256(tmp_path / "x") == hashlib.sha256(bytes(range(256)) * 999).hexdigest()


# --- a single file


def write_file(path: Path, text: str = "new") -> None:
    with output_file(path) as place:
        place.write_text(text)


def test_a_good_block_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_file(tmp_path / "m.onnx", text)
        assert (tmp_path / "m.onnx").read_text() == text
        assert beside(tmp_path / "m.onnx") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("earlier", [None, "old"])
def test_an_error_inside_leaves_the_earlier_file(tmp_path: Path, error: type, earlier: str | None) -> None:
    path = tmp_path / "m.onnx"
    if earlier:
        path.write_text(earlier)
    with pytest.raises(OutputError if error is OSError else error), output_file(path) as place:
        place.write_text("half")
        place.with_name("m.onnx.data").write_text("half")
        raise error
    assert (path.read_text() if path.exists() else None) == earlier
    assert beside(path) == []


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(OutputError, match="failed: No such file"), output_file(tmp_path / "m.onnx"):
        pass
    assert (tmp_path / "m.onnx").read_text() == "old"


def test_a_second_writer_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with output_file(path) as place:
        with pytest.raises(OutputError, match="another run is writing"):
            write_file(path, "other")
        place.write_text("ours")
    assert path.read_text() == "ours"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, said in (("folder", "not a regular file"), ("link", "not a regular file"), ("o" * 250, "too long")):
        with pytest.raises(OutputError, match=said):
            write_file(tmp_path / name)
    with pytest.raises(OutputError, match="cannot write beside"):
        write_file(tmp_path / "nowhere" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]
    assert not (tmp_path / "target").exists()


FILE_CHILD = (
    CHILD[: CHILD.index("with output_folder")]
    + """
with files.output_file(folder) as place:
    place.write_text("new")
"""
)


@posix
def test_killed_at_any_step_the_old_file_or_the_new_one_is_whole(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    seen: list[str] = []
    for step in range(40):
        path = tmp_path / str(step) / "m.onnx"
        path.parent.mkdir()
        path.write_text("old")
        child = subprocess.run(
            [sys.executable, "-c", FILE_CHILD, str(path), str(step), ""], env=child_environment, timeout=60
        )
        seen.append(path.read_text())
        if child.returncode == 0:
            break
        assert child.returncode == -9
        write_file(path, "rerun")
        assert path.read_text() == "rerun"
        assert beside(path) == []
    else:
        pytest.fail("the child never came through")
    assert seen.count("old") >= 3 and seen[-1] == "new"
    assert set(seen) == {"old", "new"}
