"""Every example is run, as it stands."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, find_chromium
from conftest import DEMO, ROOT, Artifact
from loopback_hub import LoopbackHub, point_client_at
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a script of the folder in this process, as ``python examples/NAME.py`` would; its stdout."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_timm_model_is_sanitized_from_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = run("sanitize_timm", monkeypatch, capsys)
    assert "silenced" in said
    assert "conv1: [" in said
    assert "proof: equals the masked original" in said


@pytest.mark.slow
def test_a_torchvision_checkpoint_is_sanitized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nets import randomize_batch_norm
    from torchvision import models

    torch.manual_seed(0)
    model = randomize_batch_norm(models.resnet18(num_classes=10))
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    for source in sorted((DEMO / "clean").iterdir()):
        (tmp_path / "samples" / source.name).mkdir(parents=True)
        for image in sorted(source.iterdir())[:2]:
            shutil.copy(image, tmp_path / "samples" / source.name)
    arch = "torchvision/resnet18?num_classes=10&input_size=64"
    out = tmp_path / "cleaned"
    said = run(
        "sanitize_torchvision_checkpoint", monkeypatch, capsys,
        tmp_path / "resnet18.pth", "--arch", arch, "--clean-dir", tmp_path / "samples", "--output", out,
    )  # fmt: skip
    assert "parameters" in said
    assert {"model.safetensors", "model.onnx", "README.md"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_a_custom_score_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bshub.scoring.suspiciousness import SCORES

    monkeypatch.setattr("bshub.scoring.suspiciousness.SCORES", dict(SCORES))
    said = run("custom_score", monkeypatch, capsys)
    assert "filters above" in said
    assert said.count("[") >= 5


def test_the_score_of_the_example_is_ten_lines_at_most() -> None:
    text = (EXAMPLES / "custom_score.py").read_text(encoding="utf-8")
    assert len(text[text.index("def loud") : text.index("def main")].strip().splitlines()) <= 10


def test_publish_and_load_back(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path)
        first = run("publish_and_load", monkeypatch, capsys, artifact.folder, "me/cleaned")
        again = run("publish_and_load", monkeypatch, capsys, artifact.folder, "me/cleaned")
        assert load_file(artifact.folder / "model.safetensors").keys()
        assert hub.files("me/cleaned")["model.safetensors"] == (artifact.folder / "model.safetensors").read_bytes()
    assert first.startswith(f"published {hub.url}/me/cleaned")
    assert again.startswith("was already there")
    assert first.count("bit for bit") == again.count("bit for bit") == 1


def test_the_onnx_file_is_enough(complete: Artifact, child_environment: dict[str, str]) -> None:
    """Run where torch, timm, the Hub's client and bshub cannot be imported; its answers are the network's."""
    import bshub

    loaded = bshub.load(str(complete.folder))
    assert loaded.labels is not None
    pictures = [next(iter(sorted(folder.iterdir()))) for folder in sorted((DEMO / "heldout").iterdir())]
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'bshub', 'huggingface_hub', 'onnx'): sys.modules[name] = None\n"
        f"runpy.run_path({str(EXAMPLES / 'onnx_alone.py')!r}, run_name='__main__')"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(complete.folder / "model.onnx"), *map(str, pictures)],
        env=child_environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    from bshub.intake.images import read_image

    with torch.no_grad():
        wanted = [int(loaded.module(loaded.preprocessing(read_image(path))[None]).argmax()) for path in pictures]
    answers = [line.split(": ")[1].split(" (")[0] for line in child.stdout.splitlines()]
    assert answers == [loaded.labels[index] for index in wanted]


@pytest.mark.slow
def test_the_notebook_runs_and_carries_no_outputs(tmp_path: Path) -> None:
    notebook = EXAMPLES / "tour.ipynb"
    assert notebook.stat().st_size < 20_000
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    pytest.importorskip("nbmake", reason="pip install 'bshub[dev]'")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600", "-p", "no:cacheprovider",
         "--rootdir", str(EXAMPLES), "-c", os.devnull, str(notebook)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path / "ipython")},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Space, started as the Hub would; its address."""
    pytest.importorskip("gradio", reason="pip install 'bshub[space]'")
    folder = tmp_path_factory.mktemp("space")
    log = folder / "log"
    environment = {
        **os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_NAME": "127.0.0.1", "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(folder / "uploads"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=EXAMPLES / "space", env=environment, stdout=subprocess.PIPE, stderr=out,
            text=True,
        )  # fmt: skip
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        address = next((line.split()[-1] for line in lines if "http://" in line), "")
        try:
            assert address, log.read_text()
            yield address
        finally:
            server.terminate()
            server.wait(30)


def test_the_space_answers(space: str) -> None:
    with urllib.request.urlopen(space, timeout=60) as answer:
        assert b"bshub scan" in answer.read()


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_a_click_through_the_space_shows_the_report(space: str, tmp_path: Path) -> None:
    chromium = find_chromium()
    assert chromium
    with Browser(chromium) as browser:
        browser.look(1100, 1400)
        browser.call("Page.navigate", url=space)
        browser.wait("document.querySelectorAll('input[type=file]').length >= 2")
        choose(browser, 1, sorted((DEMO / "clean").rglob("*.jpg"))[::5])
        browser.wait("document.body.innerText.match(/\\.jpg/g)?.length >= 20")
        choose(browser, 0, [DEMO / "model" / "model.safetensors"])
        browser.wait("document.body.innerText.includes('model.safetensors')")
        write(browser, "[data-testid=textbox]", "timm/resnet18?num_classes=10&channels=24,48,96,192&input_size=64")
        browser.wait("!document.querySelector('[data-testid=upload-progress]')")
        press(browser, "Scan")
        browser.wait("document.body.innerText.includes('deviations above their layer')")
        browser.wait("[...document.images].some(picture => picture.naturalWidth > 600)")
        text = browser.run("document.body.innerText")
        assert "of 1,864 filters" in text
        assert "on the clean images" in text, "the pictures were not used"
        assert "layer4.1.conv1" in text
        browser.picture(Path(os.environ.get("SPACE_PICTURE", tmp_path / "space.png")))
        outside = [url for url in browser.requests if not url.startswith((space, "data:", "blob:"))]
        assert not outside

        # what is refused says so, without a page of somebody else's making
        write(browser, "[data-testid=textbox]", "timm/<img src=x onerror=document.title='owned'>")
        press(browser, "Scan")
        browser.wait("document.body.innerText.includes('has no model')")
        assert browser.run("document.title") == "bshub scan"


def choose(browser: Browser, number: int, files: list[Path]) -> None:
    """Put files into the page's file input of that number."""
    script = f"document.querySelectorAll('input[type=file]')[{number}]"
    found = browser.call("Runtime.evaluate", expression=script)["result"]["objectId"]
    browser.call("DOM.setFileInputFiles", files=[str(path) for path in files], objectId=found)


def write(browser: Browser, selector: str, text: str) -> None:
    """Replace the text of a field as a user would."""
    browser.run(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))")
    browser.call("Input.insertText", text=text)
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


def press(browser: Browser, name: str) -> None:
    """Click the button of that name."""
    browser.run(f"[...document.querySelectorAll('button')].find(it => it.innerText.trim() === {name!r}).click()")
