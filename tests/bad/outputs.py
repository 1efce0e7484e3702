"""48 to 53: what happens to the output. The faults need processes of their own, see ``test_faults.py``."""

from __future__ import annotations

from collections.abc import Callable

from bad.bench import Bench, Case, Outcome, contents
from bshub.errors import OutputError
from bshub.files import MANIFEST, output_folder
from bshub.release import artifact


def full_disk(bench: Bench) -> Outcome:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    bench.monkeypatch.setattr(artifact, "save_file", full)
    return bench.sanitize()


def interrupted(bench: Bench) -> Outcome:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    bench.monkeypatch.setattr(artifact, "save_file", interrupt)
    return bench.sanitize()


def killed(bench: Bench) -> Outcome:
    """What a killed run leaves beside the output is cleared by the next one."""
    litter = bench.out.with_name(f".{bench.out.name}.12345.tmp")
    litter.mkdir()
    (litter / "half").write_text("x")
    bench.out.with_name(f".{bench.out.name}.lock").touch()
    outcome = bench.sanitize(output=bench.out)
    assert [path.name for path in bench.out.parent.iterdir()] == ["out"]
    assert {"model.safetensors", MANIFEST} <= contents(bench.out).keys()
    restore(bench)
    return outcome


def restore(bench: Bench) -> None:
    """Put the earlier output back where a case has rightly replaced it."""
    for path in bench.out.iterdir():
        path.unlink()
    for name, data in bench.before.items():
        if name != "out":
            (bench.root / "outputs" / name).write_bytes(data)


def two_runs(bench: Bench) -> Outcome:
    with output_folder(bench.out, True) as place:
        outcome = bench.sanitize()
        for path in bench.out.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
    return outcome


def not_empty(bench: Bench) -> Outcome:
    return bench.command("sanitize", bench.model, "--clean-dir", bench.clean, "-o", bench.out)


def foreign(bench: Bench) -> Outcome:
    bench.put("photos/wedding.jpg", b"irreplaceable")
    outcome = bench.sanitize(output=bench.bad / "photos")
    assert contents(bench.bad) == {"photos": b"", "photos/wedding.jpg": b"irreplaceable"}
    return outcome


def named(name: str) -> Callable[[Bench], Outcome]:
    def run(bench: Bench) -> Outcome:
        outcome = bench.sanitize(output=bench.bad / name)
        assert not set("\x1b\x9b\u202e") & set(outcome.text)
        if outcome.code:
            assert list(bench.bad.iterdir()) == []
        else:
            assert [path.name for path in bench.bad.iterdir()] == [name]
        return outcome

    return run


def link(bench: Bench) -> Outcome:
    (bench.bad / "link").symlink_to(bench.out)
    return bench.sanitize(output=bench.bad / "link")


CASES = [
    Case(48, "disk full", full_disk, OutputError, "failed: No space left on device", 2, silent=True),
    Case(49, "what a killed run left", killed, says="written: "),
    Case(50, "two runs into one folder", two_runs, OutputError, "another run is writing", 2),
    Case(51, "output that is not empty", not_empty, OutputError, "is not empty", 2),
    Case(51, "output that is not ours", foreign, OutputError, "holds something else", 2),
    Case(52, "Ctrl-C", interrupted, says="interrupted; nothing was left behind", code=130),
    Case(53, "output with control characters", named("a\x1b[2J\x9b\u202eb"), says="a\\x1b[2J\\x9b\\u202eb"),
    Case(53, "output like an option", named("--overwrite"), says="written: "),
    Case(53, "output with a long name", named("o" * 250), OutputError, "is too long", 2),
    Case(53, "output that is a link", link, OutputError, "is not a folder", 2),
]
