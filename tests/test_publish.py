"""publish: the real client against a Hub on the loopback."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_WEIGHTS, DEMO, bshub_command
from loopback_hub import LoopbackHub, point_client_at

from bshub.errors import PublishError
from bshub.release import publish as module
from bshub.release.publish import Published, preview, publish

CANARY = "hf_canaryCANARYcanaryCANARY"
REPO = "me/cleaned"
CREATE, INFO, COMMIT = "POST /api/repos/create", "GET /api/models/", "POST /api/models/me/cleaned/commit/"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(module, "_WAITS", (0.01, 0.01))
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        yield hub
    assert CANARY not in caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "plots").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)  # four parts
    (folder / "model.onnx").write_bytes(b"onnx" * 100)
    (folder / "plots" / "layer 1.svg").write_text("<svg/>")
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\nÜ\n")
    (folder / "bshub-report.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*args: Any, **kwargs: Any) -> PublishError:
    with pytest.raises(PublishError) as caught:
        publish(*args, **kwargs)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


def test_makes_the_repository_and_one_commit(hub: LoopbackHub, folder: Path) -> None:
    made = publish(folder, REPO, private=True, message="first")
    expected = contents(folder)
    assert hub.files(REPO).items() >= expected.items()
    assert set(hub.files(REPO)) - set(expected) == {".gitattributes"}
    assert hub.count(COMMIT) == 1
    assert made == Published(f"{hub.url}/{REPO}", hub.repos[REPO].refs["main"], tuple(sorted(expected)), False)
    assert hub.repos[REPO].private
    assert f"Bearer {CANARY}" in hub.authorizations  # so the other tests look for a token that was really sent


def test_publishing_the_same_again_commits_nothing(hub: LoopbackHub, folder: Path) -> None:
    first = publish(folder, REPO)
    again = publish(folder, REPO)
    assert (again.unchanged, again.commit, hub.count(COMMIT)) == (True, first.commit, 1)
    (folder / "config.json").write_text("[]")
    third = publish(folder, REPO)
    assert (third.unchanged, hub.count(COMMIT)) == (False, 2)
    assert hub.files(REPO)["config.json"] == b"[]"


def test_deletes_what_an_earlier_artifact_left_and_nothing_else(hub: LoopbackHub, folder: Path) -> None:
    own = {"plots/old.svg": b"", "metrics.json": b"{}", "bshub-report.json": b"old", "report.html": b"old"}
    own |= {"dense/model.safetensors": b"old", "receipt.sigstore.json": b"{}"}
    foreign = {"notes.md": b"mine", "other/model.onnx": b"x", "pytorch_model.bin": b"x"}
    hub.seed(REPO, own | foreign)
    publish(folder, REPO)
    assert set(hub.files(REPO)) == set(contents(folder)) | set(foreign)
    assert hub.count(COMMIT) == 1


def test_deletes_nothing_where_there_was_no_artifact(hub: LoopbackHub, folder: Path) -> None:
    hub.seed(REPO, {"metrics.json": b"somebody's own", "plots/theirs.png": b"x"})
    publish(folder, REPO)
    assert {"metrics.json", "plots/theirs.png"} <= set(hub.files(REPO))


def test_leaves_out_links_and_hidden_files(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    expected = set(contents(folder))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / ".env").write_text("x")
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "key.txt").symlink_to(tmp_path / "secret" / "key")
    assert set(publish(folder, REPO).files) == expected


@pytest.mark.parametrize("name", ["model.onnx", "plots"])
def test_refuses_an_artifact_of_links(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).symlink_to(tmp_path)
    assert "symbolic link" in str(refused(folder, REPO))
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["a\\..\\x", "../x", "a/b/c", "x", "a/b\n", "a--b/c", "me/x@main", ""])
def test_refuses_a_bad_name_before_asking(hub: LoopbackHub, folder: Path, repo_id: str) -> None:
    refused(folder, repo_id)
    assert hub.requests == []


def test_refuses_a_missing_or_empty_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    assert "cannot be read" in str(refused(tmp_path / "none", REPO))
    (tmp_path / "empty").mkdir()
    assert "no files" in str(refused(tmp_path / "empty", REPO))
    (tmp_path / "diary.txt").write_text("dear diary")
    assert "no artifact of bshub" in str(refused(tmp_path, REPO))
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_private(hub: LoopbackHub, folder: Path) -> None:
    hub.seed(REPO, {})
    assert "is public" in str(refused(folder, REPO, private=True))
    assert hub.count(COMMIT) == 0


def test_a_competing_push_is_an_error(hub: LoopbackHub, folder: Path) -> None:
    def push(request: str) -> None:
        if request.startswith(COMMIT):
            hub.seed(REPO, {"theirs.txt": b"x"})

    hub.before = push
    error = refused(folder, REPO)
    assert "somebody pushed" in str(error) and "--create-pr" in str(error)
    assert "model.onnx" not in hub.files(REPO)


def test_pull_request_and_branch(hub: LoopbackHub, folder: Path) -> None:
    head = hub.seed(REPO, {"x": b""})
    hub.seed(REPO, {"x": b""}, revision="dev")
    proposed = publish(folder, REPO, create_pr=True)
    assert proposed.url == f"{hub.url}/{REPO}/discussions/1"
    assert (hub.repos[REPO].refs["main"], hub.repos[REPO].refs["refs/pr/1"]) == (head, proposed.commit)
    assert publish(folder, REPO, revision="dev").url == f"{hub.url}/{REPO}/tree/dev"
    assert "model.onnx" in hub.files(REPO, "dev")
    assert "hf repos branch create me/cleaned gone" in str(refused(folder, REPO, revision="gone"))


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        (CREATE, 401, "hf auth login"),
        (INFO, 403, "hf auth whoami"),
        (COMMIT, 403, "--create-pr"),
        (COMMIT, 409, "in progress"),
        (COMMIT, 412, "nothing was overwritten"),
        (COMMIT, 404, "has no revision main"),
        (COMMIT, 413, "413 (injected ***)"),
        ("/validate-yaml", 400, "README.md"),
        ("objects/batch", 403, "may not write"),
    ],
)
def test_each_refusal_has_its_cause(hub: LoopbackHub, folder: Path, path: str, status: int, says: str) -> None:
    # A server that echoes the token back must not get it into our message.
    # Where the client may not create a repository, it asks whether there is one already.
    hub.fail(f"{CREATE}|{INFO}" if path == CREATE else path, status, times=2, message=f"injected {CANARY}")
    assert says in str(refused(folder, REPO))


@pytest.mark.parametrize("path", [CREATE, INFO, COMMIT])
@pytest.mark.parametrize("status", [429, 503])
def test_a_passing_fault_is_waited_out(hub: LoopbackHub, folder: Path, path: str, status: int) -> None:
    hub.fail(path, status)
    assert not publish(folder, REPO).unchanged
    assert hub.count(COMMIT) == (2 if path == COMMIT else 1)


def test_gives_up_after_a_few_attempts(hub: LoopbackHub, folder: Path) -> None:
    hub.fail(CREATE, 500, times=99)
    assert "the Hub failed (500)" in str(refused(folder, REPO))
    assert len(hub.requests) == 3
    hub.faults.clear()
    hub.fail(CREATE, 429, headers={"Retry-After": "600"})
    assert "asks to wait 600 s" in str(refused(folder, REPO))


@pytest.mark.parametrize("status", [0, 504])
def test_a_commit_whose_answer_was_lost_is_found(hub: LoopbackHub, folder: Path, status: int) -> None:
    hub.fail(COMMIT, status, after=True)
    made = publish(folder, REPO)
    assert (hub.count(COMMIT), len(hub.repos[REPO].commits)) == (1, 2)
    assert made.commit == hub.repos[REPO].refs["main"]


def test_a_lost_answer_opens_no_second_pull_request(hub: LoopbackHub, folder: Path) -> None:
    hub.fail(COMMIT, 504, after=True)
    refused(folder, REPO, create_pr=True)
    assert hub.count(COMMIT) == 1


def test_a_silent_hub_is_given_up(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUTS", (0.2, 0.2, 0.2, 0.2))
    monkeypatch.setattr(module, "_WAITS", ())
    hub.fail(CREATE, 0, delay=5)
    start = time.monotonic()
    assert "no answer from 127.0.0.1" in str(refused(folder, REPO))
    assert time.monotonic() - start < 3


def test_something_that_is_not_the_hub(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopback_hub.ROUTES", [(".*", lambda h: (b"<html>please log in</html>", {}))])
    assert "look at HF_ENDPOINT" in str(refused(folder, REPO))


def test_a_commit_that_cannot_be_read_back_is_told(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("GET .*/revision/[0-9a-f]{40}", 403)
    assert "was made, but not read back" in str(refused(folder, REPO))
    assert publish(folder, REPO).unchanged


def test_a_file_the_repository_ignores_is_noticed(hub: LoopbackHub, folder: Path) -> None:
    hub.seed(REPO, {".gitignore": b"model.onnx"})
    assert "does not hold model.onnx" in str(refused(folder, REPO))


def test_no_network(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    assert "no connection to 127.0.0.1" in str(refused(folder, REPO))
    assert json.loads((folder / "config.json").read_text()) == {}


def test_a_card_the_hub_would_refuse_is_told(hub: LoopbackHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mine\nlibrary_name: timm\n---\n")
    assert "README.md" in str(refused(folder, REPO))
    assert "model.onnx" not in hub.files(REPO)


def shows_images(folder: Path, number: int = 3) -> None:
    (folder / "report.html").write_text("<img>")
    (folder / "bshub-report.json").write_text(json.dumps({"page": {"clean_images_shown": number}}))


def test_clean_images_are_not_shown_to_the_world_unasked(hub: LoopbackHub, folder: Path) -> None:
    shows_images(folder)
    error = refused(folder, REPO)
    assert "shows 3 of the clean images" in str(error) and "--show-images" in str(error)
    assert REPO not in hub.repos
    assert "report.html" in publish(folder, REPO, show_images=True).files
    assert "--show-images" in str(refused(folder, REPO))  # it exists and is public
    assert "report.html" in publish(folder, "me/secret", private=True).files
    assert publish(folder, "me/secret").unchanged


def test_a_page_without_clean_images_is_published_like_any_file(hub: LoopbackHub, folder: Path) -> None:
    shows_images(folder, 0)
    assert "report.html" in publish(folder, REPO).files


def test_a_preview_lists_the_files_and_asks_nobody(hub: LoopbackHub, folder: Path) -> None:
    shows_images(folder)
    plan = preview(folder, REPO)
    assert plan["files"] == {path: len(data) for path, data in contents(folder).items()}
    assert plan["bytes"] == sum(map(len, contents(folder).values()))
    assert plan["card"] == (folder / "README.md").read_text()
    assert plan["clean_images_shown"] == 3
    assert hub.requests == []
    with pytest.raises(PublishError, match="is not"):
        preview(folder, "no name")


def test_the_command_publishes_and_says_where(hub: LoopbackHub, folder: Path) -> None:
    dry = bshub_command("publish", folder, "--repo", REPO, "--dry-run")
    assert dry.exit_code == 0 and "model.safetensors" in dry.stdout and "library_name: timm" in dry.stdout
    assert hub.requests == []
    first = bshub_command("publish", folder, "--repo", REPO, "--private", "-m", "first", "-q")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.splitlines()[0] == f"published: {hub.url}/{REPO}"
    assert hub.repos[REPO].private
    again = bshub_command("publish", folder, "--repo", REPO, "--json")
    assert json.loads(again.stdout)["unchanged"] is True
    proposed = bshub_command("publish", folder, "--repo", REPO, "--create-pr", "--json")
    assert proposed.exit_code == 0
    wrong = bshub_command("publish", folder / "nowhere", "--repo", REPO)
    assert wrong.exit_code == 2 and wrong.stderr.startswith("bshub: ") and wrong.stdout == ""


QUICK = (*BY_WEIGHTS, "--no-report")


def test_a_refused_push_after_a_run_keeps_the_model_and_says_how_to_go_on(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fail(COMMIT, 403, times=1)
    out = tmp_path / "out"
    refused = bshub_command("sanitize", DEMO / "model", *QUICK, "-o", out, "--push-to", REPO, "--private", "-q")
    assert refused.exit_code == 2 and "may not write" in refused.stderr
    assert f"whole in {out}" in refused.stderr.replace("\n", "")
    again = f"bshub publish {out} --repo {REPO} --private"
    assert again in refused.stderr.replace("\n", "")
    assert (out / "model.safetensors").is_file()
    done = bshub_command(*again.split()[1:])
    assert done.exit_code == 0, done.stderr
    assert hub.repos[REPO].private and "model.safetensors" in hub.files(REPO)


def test_a_bad_name_is_refused_before_the_work(hub: LoopbackHub, tmp_path: Path) -> None:
    refused = bshub_command("sanitize", DEMO / "model", *QUICK, "-o", tmp_path / "out", "--push-to", "no name", "-q")
    assert refused.exit_code == 2 and "is not" in refused.stderr
    assert not (tmp_path / "out").exists() and hub.requests == []
