"""58 to 65: the Hub, and what is published."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from typing import Any

from markdown_it import MarkdownIt

from bad.bench import TOKEN, Bench, Case, Outcome, contents, make_images, make_model
from bshub.errors import ImageDataError, ModelReferenceError, PublishError
from bshub.intake import datasets
from bshub.intake import hub as intake
from bshub.release.publish import publish

LOOK_UP, COMMIT = "HEAD /them/net/resolve/", "POST /api/models/me/cleaned/commit/"
STEERS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SCRIPT = "<script>alert(1)</script>"
HOSTILE = (f"{SCRIPT}\x1b[2J\u202e", "![i](http://evil) `x` | **b**\n---\nlicense: mit", "dog")


def seeded(bench: Bench) -> None:
    bench.hub.seed("them/net", {path.name: path.read_bytes() for path in bench.model.iterdir()})


def fetching(pattern: str, status: int, times: int = 9, **more: Any) -> Callable[[Bench], Outcome]:
    """A model of the Hub while it answers so; the server repeats the token it was sent."""

    def run(bench: Bench) -> Outcome:
        seeded(bench)
        bench.hub.fail(pattern, status, times, message=f"you sent {TOKEN}", **more)
        outcome = bench.sanitize("them/net")
        assert f"Bearer {TOKEN}" in bench.hub.authorizations
        assert TOKEN not in outcome.text
        return outcome

    return run


def passing(pattern: str, status: int, times: int = 1, **more: Any) -> Callable[[Bench], Outcome]:
    """The same, over after a while."""

    def run(bench: Bench) -> Outcome:
        seeded(bench)
        bench.hub.fail(pattern, status, times, **more)
        return bench.command("evaluate", "them/net", "--test-dir", bench.clean)

    return run


def silent(bench: Bench) -> Outcome:
    bench.monkeypatch.setattr(intake, "_LOOK_UP_SECONDS", 0.1)
    return fetching(LOOK_UP, 0, delay=1)(bench)


def dataset(status: int, **more: Any) -> Callable[[Bench], Outcome]:
    """A data set of the Hub while it answers so."""

    def run(bench: Bench) -> Outcome:
        bench.hub.fail("GET /api/datasets/me/set", status, 9, message=f"you sent {TOKEN}", **more)
        outcome = bench.sanitize(clean="hf://datasets/me/set")
        assert f"Bearer {TOKEN}" in bench.hub.authorizations
        return outcome

    return run


def silent_dataset(bench: Bench) -> Outcome:
    bench.monkeypatch.setattr(datasets, "_LOOK_UP_SECONDS", 0.1)
    return dataset(0, delay=1)(bench)


def cut_dataset(bench: Bench) -> Outcome:
    make_images(bench.bad / "set", each=1)
    files = {name: data for name, data in contents(bench.bad / "set").items() if data}
    bench.hub.seed("me/set", files)
    bench.hub.fail("GET /datasets/me/set/resolve/", 200, 2, cut=True)
    return bench.command("evaluate", bench.model, "--test-dir", "hf://datasets/me/set", "--json")


def artifact(bench: Bench) -> Any:
    folder = bench.bad / "artifact"
    make_model(folder)
    (folder / "bshub-report.json").write_text("{}")
    return folder


def publishing(pattern: str, status: int, times: int = 9, **more: Any) -> Callable[[Bench], Outcome]:
    def run(bench: Bench) -> Outcome:
        bench.hub.fail(pattern, status, times, message=f"you sent {TOKEN}", **more)
        outcome = bench.call(publish, artifact(bench), "me/cleaned")
        assert TOKEN not in outcome.text
        return outcome

    return run


def competing_push(bench: Bench) -> Outcome:
    hub = bench.hub

    def push(request: str) -> None:
        if request.startswith(COMMIT):
            hub.seed("me/cleaned", {"theirs.txt": b"x"})

    hub.before = push
    outcome = bench.call(publish, artifact(bench), "me/cleaned")
    assert "model.safetensors" not in hub.files("me/cleaned")
    return outcome


def partial_upload(bench: Bench) -> Outcome:
    """The weights do not arrive: there is no commit, and the next run makes one that holds them, byte for byte."""
    folder = artifact(bench)
    bench.hub.fail("PUT /_lfs/", 403, 99)
    first = bench.call(publish, folder, "me/cleaned")
    assert first.code == 2 and bench.hub.count(COMMIT) == 0
    assert "model.safetensors" not in bench.hub.files("me/cleaned")
    bench.hub.faults.clear()
    made = bench.call(publish, folder, "me/cleaned")
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert bench.hub.files("me/cleaned").items() >= ours.items()
    return Outcome(made.error, made.code, first.text)


def ignored_file(bench: Bench) -> Outcome:
    bench.hub.seed("me/cleaned", {".gitignore": b"model.safetensors"})
    return bench.call(publish, artifact(bench), "me/cleaned")


def hostile_labels(bench: Bench) -> Outcome:
    """They lie in the model's config and in its folder's name, and come out in the card, the page and the terminal."""
    model = make_model(bench.bad / "<img src=x onerror=alert(1)>", HOSTILE)
    make_images(bench.bad / "clean", ("0", "1", "2"))
    out = bench.bad / "out"
    findings = ["--sarif", bench.bad / "x.sarif", "--junit", bench.bad / "x.xml"]
    outcome = bench.command(
        "sanitize", model, "--clean-dir", bench.bad / "clean", "-o", out, "--mu", 2, "--finetune-epochs", 0,
        "--no-onnx", "--json",
    )  # fmt: skip
    texts = {path: path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".html", ".json", ".svg")}
    assert len(texts) >= 4
    for path, text in {**texts, "stdout": outcome.text}.items():
        # line ends, and the tabs of the page's chart library
        assert not STEERS.search(re.sub("[\t\n]", "", text)), path
        if not str(path).endswith(("json", "stdout")):
            outside_code = re.sub("```.*?```", "", text, flags=re.DOTALL) if path.suffix == ".md" else text
            assert not re.search(r"(?<!\\)<(script>alert|img src=x)", outside_code), path
    card = (out / "README.md").read_text()
    rendered = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.split("\n---\n", 1)[1])
    tags = re.findall(r"<(script|iframe|svg|img|a)\b([^>]*)", rendered)
    assert {name for name, _ in tags} <= {"img", "a"}  # our own plots and links
    assert not any("evil" in attributes or "onerror" in attributes for _, attributes in tags)
    assert card.count("\n---\n") == 1 and not re.search("^license: mit", card, re.MULTILINE)
    assert json.loads((out / "config.json").read_text())["label_names"] == list(HOSTILE)
    for command in (["scan", model], ["evaluate", out, "--test-dir", bench.bad / "clean"], ["gate", out, *findings]):
        printed = bench.command(*command)
        assert not STEERS.search(printed.text.replace("\n", "")), command
    for path in findings[1::2]:
        assert not STEERS.search(path.read_text().replace("\n", "")), path
    return outcome


def canary(bench: Bench) -> Outcome:
    """A token in the environment, and all that is printed, logged and written on good ways and bad, in debug too."""
    seeded(bench)
    records: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.startswith("httpcore"):  # the wire itself, which nothing here turns on
                records.append(self.format(record))

    listener, root = Listener(), logging.getLogger()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        out = bench.bad / "out"
        good = bench.command(
            "sanitize", "them/net", "--clean-dir", bench.clean, "-o", out, "--no-onnx", "--push-to", "me/cleaned",
            "--mu", 2, "--finetune-epochs", 0, "--no-thumbnails", "--debug",
        )  # fmt: skip
        texts = [good.text]
        for status in (401, 403, 404, 412, 429, 500):
            bench.hub.faults.clear()
            bench.hub.fail("", status, 9, message=TOKEN, headers={"X-Error-Message": f"Bearer {TOKEN}"})
            for more in ([], ["--debug"]):
                texts.append(bench.sanitize("them/net@other", *more).text)
                texts.append(bench.call(publish, out, "me/cleaned").text)
        bench.monkeypatch.setattr("bshub.commands.scan_reference", leaks)
        texts += [bench.command("scan", bench.model, *more).text for more in ([], ["--debug"])]
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    assert f"Bearer {TOKEN}" in bench.hub.authorizations  # it was really sent
    written = [data.decode("latin-1") for data in contents(out).values()]
    published = [data.decode("latin-1") for data in bench.hub.files("me/cleaned").values()]
    assert len(texts) > 25 and "Traceback" in texts[-1]
    assert {"README.md", "report.html", "bshub-report.json", "metrics.json"} <= contents(out).keys()
    assert {"README.md", "report.html"} <= bench.hub.files("me/cleaned").keys()
    assert any("huggingface_hub" in record or "http" in record for record in records)  # there was something to leak
    for text in (*texts, *records, *written, *published):
        assert TOKEN not in text
    return good


def leaks(*arguments: object, **more: object) -> None:
    """A library that puts a secret into an unexpected error."""
    try:
        raise ValueError(f"401 for Authorization: Bearer {TOKEN}")
    except ValueError as error:
        raise RuntimeError(f"request to https://user:{TOKEN}@example.com failed") from error


def same_again(bench: Bench) -> Outcome:
    """What a worker that was killed and started again does: the same bytes, and nothing is committed twice."""
    digests, outcomes, hub = [], [], bench.hub
    for _ in range(2):
        outcomes.append(bench.sanitize(None, "--push-to", "me/again", output=bench.bad / "out"))
        written = contents(bench.bad / "out")
        digests.append([hashlib.sha256(written[name]).hexdigest() for name in ("model.safetensors", "config.json")])
    assert digests[0] == digests[1]
    assert list((bench.bad).iterdir()) == [bench.bad / "out"]
    assert "model.safetensors" in hub.files("me/again")
    again = bench.call(publish, bench.bad / "out", "me/again")
    assert "unchanged=True" in again.text
    return outcomes[1]


NOT_THERE = "is not on the Hub, or is private"
FETCH, PUSH = ModelReferenceError, PublishError
CASES = [
    Case(58, "401", fetching(LOOK_UP, 401), FETCH, f"{NOT_THERE} (401)", 2),
    Case(58, "403", fetching(LOOK_UP, 403), FETCH, "may not read them/net (403)", 2),
    Case(58, "404", fetching(LOOK_UP, 404, code="RepoNotFound"), FETCH, f"{NOT_THERE} (404)", 2),
    Case(58, "gated", fetching(LOOK_UP, 403, code="GatedRepo"), FETCH, "them/net is gated", 2),
    Case(58, "data set, 401", dataset(401), ImageDataError, f"{NOT_THERE} (401)", 2),
    Case(58, "data set, 403", dataset(403), ImageDataError, "may not read datasets/me/set (403)", 2),
    Case(58, "data set, 404", dataset(404), ImageDataError, f"{NOT_THERE} (404)", 2),
    Case(58, "gated data set", dataset(403, code="GatedRepo"), ImageDataError, "datasets/me/set is gated", 2),
    Case(58, "publishing, 401", publishing(COMMIT, 401), PUSH, "does not know who publishes to me/cleaned (401)", 2),
    Case(58, "publishing without rights", publishing(COMMIT, 403), PUSH, "may not write to me/cleaned", 2),
    Case(58, "publishing, 404", publishing(COMMIT, 404), PUSH, "me/cleaned has no revision main", 2),
    Case(59, "429 once", passing(LOOK_UP, 429), says="accuracy %"),
    Case(59, "429 for long", fetching(LOOK_UP, 429, headers={"Retry-After": "600"}), FETCH, "asks to wait 600 s", 2),
    Case(59, "500 twice", passing(LOOK_UP, 500, 2), says="accuracy %"),
    Case(59, "500 for good", fetching(LOOK_UP, 500), FETCH, "the Hub failed (500)", 2),
    Case(59, "timeout", silent, FETCH, "no answer from 127.0.0.1", 2),
    Case(59, "data set, 429 for long", dataset(429, headers={"Retry-After": "600"}), ImageDataError,
         "asks to wait 600 s", 2),
    Case(59, "data set, 500 for good", dataset(500), ImageDataError, "the Hub failed (500)", 2),
    Case(59, "data set, timeout", silent_dataset, ImageDataError, "no answer from 127.0.0.1", 2),
    Case(59, "data set, a download that is cut", cut_dataset, says='"n": 3'),
    Case(59, "publishing, 429 for long", publishing(COMMIT, 429, headers={"Retry-After": "600"}), PUSH,
         "asks to wait 600 s", 2),
    Case(59, "publishing, 500 for good", publishing(COMMIT, 500), PUSH, "the Hub failed (500)", 2),
    Case(59, "a slow Hub", passing("/them/net/resolve/", 200, 9, delay=0.2), says="accuracy %"),
    Case(59, "a download that is cut", passing("GET /them/net/resolve/", 200, cut=True), says="accuracy %"),
    Case(60, "competing push", competing_push, PUSH, "somebody pushed to me/cleaned in the meantime", 2),
    Case(60, "412", publishing(COMMIT, 412), PUSH, "nothing was overwritten (412)", 2),
    Case(61, "partial upload", partial_upload, says="may not write to me/cleaned (403)"),
    Case(61, "a file the repository ignores", ignored_file, PUSH, "does not hold model.safetensors", 2),
    Case(62, r"model a\..\x", lambda b: b.sanitize("a\\..\\x"), FETCH, "is neither a path nor a model reference", 2,
         silent=True),
    Case(62, r"repository a\..\x", lambda b: b.call(publish, artifact(b), "a\\..\\x"), PUSH,
         "is not a model on the Hub", 2, silent=True),
    Case(62, r"data set a\..\x", lambda b: b.sanitize(clean="hf://datasets/a/..\\x"), ImageDataError,
         "is not a data set on the Hub", 2,
         silent=True),
    Case(63, "hostile labels and names", hostile_labels, silent=True),
    Case(64, "token in the environment", canary, says="published: "),
    Case(65, "the same run twice", same_again, says="published: "),
]  # fmt: skip
