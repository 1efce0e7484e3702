"""The diffs of docs/design.md: small, applied to a copy of the tree, and what they add is used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"## Add an? ([\w ]+)\n.*?```diff\n(.*?)```", PAGE, re.DOTALL))

USES = {
    "score": f"""
from bshub_cli.main import app
app(["scan", {str(DEMO / "model")!r}, "--clean-dir", {str(DEMO / "clean")!r}, "--score", "idle", "--mu", "3"])
""",
    "op rule": """
import torch
from torch import nn
from bshub.graph.coupling import follow_channels
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.act = nn.Softshrink(0.1)
    def forward(self, x):
        return self.b(self.act(self.norm(self.a(x)))).mean((2, 3))
net = Net().eval()
with torch.no_grad():
    norm = net.norm
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.uniform_(0.5, 1.5)
import numpy as np
from bshub.graph.pairs import find_pairs
from bshub.surgery.remove import remove
flow, _ = follow_channels(net, (3, 8, 8))
done = remove(net, flow, find_pairs(net, flow), {"a": np.array([1, 5])}, torch.randn(2, 3, 8, 8))
print("removed" if done.model.a.out_channels == 6 else "kept")
""",
    "attack": """
from pathlib import Path
import torch
from bshub.evaluation.attacks.interface import Setup
from bshub.evaluation.attacks.registry import find_attack
from bshub.evaluation.attacks.trigger import load_trigger, save_trigger
from bshub.progress import Steps
pixels = torch.randint(0, 200, (20, 3, 16, 16), dtype=torch.uint8)
setup = Setup(torch.arange(20) % 4, lambda index: pixels[index], (16, 16), 0, 0.25, 0, lambda x: x,
              torch.device("cpu"), Path(), lambda: None, Steps())
attack = find_attack("stripe", {"width": 3})(setup)
roles = attack.roles(0)
stamped = attack.stamp(pixels, roles, torch.arange(20), torch.Generator())
assert int(roles.sum()) == 5
assert (stamped[roles == 1][..., :3] == 255).all() and (stamped[roles == 0] == pixels[roles == 0]).all()
save_trigger(attack.trigger(), Path())
assert (load_trigger(Path("trigger.json"))(pixels)[..., :3] == 255).all()
print("stamped")
""",
    "repair": f"""
from bshub_cli.main import app
app(["sanitize", {str(DEMO / "model")!r}, "--clean-dir", {str(DEMO / "clean")!r}, "--repair", "match-logits", "--mu",
     "3", "--finetune-epochs", "1", "--no-onnx", "--no-report", "-o", "out"])
""",
}
SAID = {"score": "(idle;", "op rule": "removed", "attack": "stamped", "repair": "written: out"}


def test_the_page_shows_the_four_things_and_each_is_short() -> None:
    assert set(DIFFS) == set(USES)
    assert {name: text.count("\n") for name, text in DIFFS.items() if text.count("\n") >= 30} == {}


def use(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = f"import bshub; assert bshub.__file__.startswith({str(folder)!r})\n{USES[name]}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to apply a diff")
@pytest.mark.parametrize("name", sorted(USES))
def test_a_diff_of_the_page_applies_and_adds_what_it_says(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bshub", tmp_path / "bshub", ignore=shutil.ignore_patterns("__pycache__"))
    before = use(name, tmp_path)
    assert SAID[name] not in before.stdout, "it is there without the diff"
    done = subprocess.run(
        ["git", "apply", "--verbose", "-"], cwd=tmp_path, input=DIFFS[name], capture_output=True, text=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = use(name, tmp_path)
    assert after.returncode == 0, after.stderr
    assert SAID[name] in after.stdout
