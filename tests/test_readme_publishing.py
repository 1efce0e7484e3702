"""The README's section on publishing, followed to the letter against a Hub on the loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT
from loopback_hub import LoopbackHub, environment
from nets import randomize_batch_norm
from safetensors.torch import save_file

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Publish\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", SECTION, re.DOTALL)
ASK = """
images = __import__("torch").randn(2, 3, 64, 64, generator=__import__("torch").Generator().manual_seed(0))
a, b = small(images), dense.eval()(images)
assert (a - b).abs().max() <= 1e-5 * a.abs().max() and (a.argmax(1) == b.argmax(1)).all()
"""


def a_model(folder: Path) -> None:
    """A tiny network of timm in timm's layout, as somebody may have downloaded it."""
    import timm

    torch.manual_seed(0)
    model = randomize_batch_norm(timm.create_model("test_resnet", num_classes=10))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    labels = sorted(path.name for path in (DEMO / "clean").iterdir())
    data = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "license": "mit"}
    config = {"architecture": "test_resnet", "num_classes": 10, "label_names": labels, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_a_new_user_who_types_what_the_readme_says_gets_what_it_promises(tmp_path: Path) -> None:
    a_model(tmp_path / "model")
    shutil.copytree(DEMO / "clean", tmp_path / "samples")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "bshub").write_text(f'#!/bin/sh\nexec {sys.executable} -c "from bshub_cli.main import app; app()" "$@"\n')
    (tools / "bshub").chmod(0o755)
    assert [kind for kind, _ in BLOCKS] == ["sh", "python", "sh"]
    with LoopbackHub() as hub:
        env = {
            **os.environ, **environment(hub.url, tmp_path / "cache"), "OMP_NUM_THREADS": "1",
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        assert "hf auth login" in SECTION
        login = [Path(sys.prefix, "bin", "hf"), "auth", "login", "--token", "hf_x"]
        env.pop("HF_TOKEN", None)
        subprocess.run(login, cwd=tmp_path, env=env, capture_output=True, check=True, timeout=300)
        said = []
        for kind, text in BLOCKS:
            command = ["bash", "-euc", text] if kind == "sh" else [sys.executable, "-c", text + ASK]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
        first = hub.files("user/name")
        assert {"model.safetensors", "model.onnx", "README.md", "report.html", "dense/model.safetensors"} <= set(first)
        assert b"data:image" not in first["report.html"]
        assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files("user/name-dense"))
        assert hub.authorizations >= {"Bearer hf_x"}
    assert f"published: {hub.url}/user/name\n" in said[0]
    assert "library_name: timm" in said[0]  # the card of the dry run
    assert {"small.onnx", "pictures.onnx"} <= {path.name for path in tmp_path.iterdir()}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
