"""The model card: its front matter, its rates, and the loader text that is executed here as it stands."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import TORCH_AND_TIMM, bare_python, bare_variables
from card_rules import faults
from conftest import DEMO, Artifact, bshub_command
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, point_client_at

import bshub
from bshub.intake.models import LoadedModel
from bshub.release.card import escape, loader_text, lost_text, model_card, rate_text

HOSTILE = "<script>alert(1)</script> [x](javascript:1) ![i](http://evil) `code` **b** # h | t\n---\nlicense: mit\x1b[2J"


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return bshub.load(str(DEMO / "model"))


@pytest.fixture(scope="module")
def text(artifact: Artifact) -> str:
    return (artifact.folder / "README.md").read_text(encoding="utf-8")


def render(source: LoadedModel, report: dict[str, Any], command: str = "bshub sanitize x") -> str:
    return model_card(source, source.module, source.origin.recipe, report, command)


def code(text: str) -> str:
    """The program that rebuilds the network with torch and the model library alone."""
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if '["bshub"]' in block)
    return found


def test_front_matter_is_read_by_the_hubs_own_parser(text: str, artifact: Artifact) -> None:
    data = ModelCard(text).data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert "bshub" in data.tags
    assert "model-index" in data.to_dict()
    assert faults(text) == []


def test_every_rate_stands_in_the_model_index_with_n_and_interval(text: str, artifact: Artifact) -> None:
    results = ModelCard(text).data.eval_results
    found = {result.metric_name: result for result in results if result.dataset_split == "held-out"}
    names = {"accuracy": "accuracy", "asr": "attack success rate", "ra": "robust accuracy"}
    for when in ("before", "after"):
        for key, name in names.items():
            rate, result = artifact.report["evaluation"][when][key], found.pop(f"{name} {when} sanitizing")
            assert result.metric_value == pytest.approx(rate["percent"] / 100)
            assert result.metric_args["n"] == rate["n"]
            assert result.metric_args["interval"] == pytest.approx([rate["low"] / 100, rate["high"] / 100])
    sizes = {"parameters": "parameters", "macs": "multiply-accumulates for one image"}
    for when in ("before", "after"):
        for key, name in sizes.items():
            assert found.pop(f"{name} {when}").metric_value == artifact.report[key][when]
    assert found == {}


def test_the_card_of_a_hardened_network_says_what_was_done_and_not_that_it_was_repaired(
    source: LoadedModel, artifact: Artifact
) -> None:
    counts = dict.fromkeys(artifact.report["counts"], 0)
    diagnosis = {**artifact.report["diagnosis"], "flagged": {}}
    hardening = {"share": 0.7, "agreement": 0.9624, "passes": 6}
    told = {"counts": counts, "diagnosis": diagnosis, "hardening": hardening, "repair_passes": 6}
    text = render(source, {**artifact.report, **told, "repaired": True})
    assert "Nothing stood out on" in text and "the network was hardened" in text and "repair" not in text.lower()
    assert "The hardening went 6 times over the clean images" in text and "as far as 96 % of mixtures" in text
    text = render(source, {**artifact.report, **told, "repaired": False})
    assert "so nothing was\ndone against one" in text and "harden" not in text
    assert (
        "pruned" not in ModelCard(text).data.tags and "pruned" in ModelCard(render(source, artifact.report)).data.tags
    )
    assert faults(text) == []


def test_rates_on_the_images_that_sanitizing_used_are_told_apart(text: str, artifact: Artifact) -> None:
    clean = [result for result in ModelCard(text).data.eval_results if result.dataset_split == "clean"]
    rates = artifact.report["clean_images"]
    assert {result.metric_name.split()[1]: result.metric_value for result in clean} == {
        when: pytest.approx(rates[f"accuracy_{when}"]["percent"] / 100) for when in ("before", "after")
    }
    assert {result.metric_args["n"] for result in clean} == {rates["n"]}
    assert {result.dataset_name for result in clean} == {"the clean images that sanitizing used"}


def test_agreement_with_the_models_own_answers_is_not_called_accuracy(source: LoadedModel, artifact: Artifact) -> None:
    report = copy.deepcopy({key: value for key, value in artifact.report.items() if key != "evaluation"})
    report["model"]["unlabelled"] = True
    results = ModelCard(render(source, report)).data.eval_results
    assert {result.metric_type for result in results} == {"parameters", "macs"}


@pytest.mark.parametrize("which", ["whole", "without test images", "dense copy"])
def test_the_hubs_validation_accepts_the_card(
    which: str, source: LoadedModel, artifact: Artifact, complete: Artifact, tmp_path: Path, monkeypatch: Any
) -> None:
    """By the client's own call, which sends the card to the Hub's endpoint for it."""
    without = {key: value for key, value in artifact.report.items() if key != "evaluation"}
    text = {
        "whole": (complete.folder / "README.md").read_text(encoding="utf-8"),
        "without test images": render(source, without),
        "dense copy": (complete.folder / "dense" / "README.md").read_text(encoding="utf-8"),
    }[which]
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path)
        ModelCard(text).validate()
        with pytest.raises(ValueError, match="license"):
            ModelCard(text.replace("license: apache-2.0", "license: mine")).validate()
        assert hub.requests == ["POST /api/validate-yaml"] * 2


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [("MIT", {"license": "mit"}), ("Own Terms", {"license": "other", "license_name": "Own Terms"}), (None, {})],
)
def test_the_licence_is_the_sources_in_words_the_hub_takes(
    source: LoadedModel, artifact: Artifact, licence: str | None, wanted: dict[str, str]
) -> None:
    text = render(replace(source, origin=replace(source.origin, licence=licence)), artifact.report)
    assert {k: v for k, v in ModelCard(text).data.to_dict().items() if k.startswith("license")} == wanted
    assert ("states no licence" in text) is (licence is None)
    assert faults(text) == []


def test_it_says_in_words_what_left_and_how_the_limit_was_found(text: str, artifact: Artifact) -> None:
    counts, diagnosis = artifact.report["counts"], artifact.report["diagnosis"]
    words = text.split("## What was removed, and why")[1].split("## Limits")[0]
    assert f"{counts['removed']:,} flagged filters were cut out" in words
    assert f"{counts['silenced']:,} were set to zero" in words
    assert f"{diagnosis['threshold']['mu']:.2f} standard deviations" in words
    most = max(diagnosis["flagged"].items(), key=lambda item: len(item[1]))
    assert f"| {escape(most[0])} | {len(most[1])} |" in words
    assert sum(int(n) for n in re.findall(r"\| (\d+) \|$", words, re.MULTILINE)) == counts["flagged"]


@pytest.mark.parametrize(
    ("score", "flagged", "said"),
    [
        ("bn-shift", True, "7 of them lie off their batch norm's statistics and were flagged"),
        ("tac", True, "the mean of their layer, or lie off their batch norm's statistics, and were flagged"),
        ("tac", False, "the mean of their layer and were flagged"),
    ],
)
def test_it_says_what_batch_norm_remembers_and_whether_that_flagged_filters(
    source: LoadedModel, artifact: Artifact, score: str, flagged: bool, said: str
) -> None:
    shifted = {"filters": 3, "chance": 0.03, "bound": 0.03, "reason": "three filters lie off", "flagged": flagged}
    report = {
        **artifact.report,
        "diagnosis": {**artifact.report["diagnosis"], "score": score, "shifted": shifted},
        "counts": {**artifact.report["counts"], "flagged": 7},
    }
    words = " ".join(render(source, report).split())
    assert said in words and "the clean ones were held against them: three filters lie off." in words


def test_the_three_ways_to_load_are_there(complete: Artifact) -> None:
    text = (complete.folder / "README.md").read_text(encoding="utf-8")
    ways = text.split("## How to load it")[1].split("## How to make it")[0]
    programs = re.findall(r"```python\n(.*?)```", ways, re.DOTALL)
    for mark in ("bshub.load(", '["bshub"]', "onnxruntime.InferenceSession", "local-dir:dense"):
        assert sum(mark in program for program in programs) == 1, mark
    for program in programs:
        compile(program, "card", "exec")
        assert len(program.splitlines()) <= 15
    assert "report.html" in text and "Made with bshub" in text


def test_no_markup_is_left_over_and_nothing_is_undefined(text: str) -> None:
    assert not re.search(r"{{|}}|{%|%}|\bNone\b|\bnan\b|Undefined", text.split("```python")[0])
    assert text.endswith("\n")


def test_the_rates_of_the_report_stand_in_the_table(text: str, artifact: Artifact) -> None:
    evaluation = artifact.report["evaluation"]
    for when in ("before", "after"):
        for key in ("accuracy", "asr", "ra"):
            assert rate_text(evaluation[when][key]) in text
    assert rate_text({"percent": 83.44, "low": 80.91, "high": 85.6, "n": 1000}) == "83.4 [80.9, 85.6] n=1000"
    assert f"| clean accuracy lost, points | – | {lost_text(evaluation['accuracy_lost'])} |" in text
    assert lost_text({"points": -0.04, "low": -1.0, "high": 0.96, "n": 1000}) == "-0.0 [-1.0, 1.0] n=1000"
    assert f"{artifact.report['parameters']['after']:,}" in text
    table = [line for line in text.split("## What was removed")[0].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {4}


LOADER = """
import importlib.util, sys
assert not any(importlib.util.find_spec(name) for name in ("bshub", "onnx", "onnxruntime", "typer"))
import torch
source = open(sys.argv[1], encoding="utf-8").read()
space = {}
exec(compile(source, "card", "exec"), space)
model = space["model"]
assert not any(module.training for module in model.modules())
torch.manual_seed(0)
with torch.no_grad():
    torch.save(model(torch.randn(4, 3, 64, 64)), sys.argv[2])
"""


def test_the_printed_loader_gives_the_same_logits_bit_for_bit(text: str, artifact: Artifact, tmp_path: Path) -> None:
    """In an environment of its own, which holds torch, timm and what they need."""
    python = bare_python(tmp_path / "bare", TORCH_AND_TIMM)
    (tmp_path / "loader.py").write_text(code(text), encoding="utf-8")
    child = subprocess.run(
        [python, "-c", LOADER, tmp_path / "loader.py", tmp_path / "logits.pt"],
        cwd=artifact.folder, env=bare_variables({"OMP_NUM_THREADS": "1"}), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    model = bshub.load(str(artifact.folder)).module
    torch.manual_seed(0)
    images, threads = torch.randn(4, 3, 64, 64), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            wanted = model(images)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), wanted)


# No network of torchvision slides along its channels, and none of timm has all three.
KINDS = [
    (library, stem, buffers, refilled)
    for library in ("timm", "torchvision")
    for stem in (None, "cifar")
    for buffers in (False, True)
    for refilled in (False, True)
    if not (refilled and (library == "torchvision" or (stem and buffers)))
]


@pytest.mark.parametrize(("library", "stem", "buffers", "refilled"), KINDS)
def test_the_loader_is_short_and_is_python(library: str, stem: str | None, buffers: bool, refilled: bool) -> None:
    source = loader_text(library, stem, buffers, refilled)
    assert len(source.splitlines()) <= 15
    assert max(map(len, source.splitlines())) <= 120
    compile(source, "loader", "exec")
    assert "bshub" not in " ".join(re.findall(r"^(?:from|import) (.*)$", source, re.MULTILINE))


def test_the_loader_of_a_cifar_stem_builds_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_test_images: Path
) -> None:
    """A file of weights with ``stem=cifar``, sanitized, loaded by the card's own lines."""
    import timm
    from nets import randomize_batch_norm
    from safetensors.torch import save_file

    from bshub.intake.recipe import replace_stem

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, channels=[8, 8, 16, 16])
    replace_stem(model)
    save_file(randomize_batch_norm(model).state_dict(), tmp_path / "w.safetensors")
    result = bshub_command(
        "sanitize", tmp_path / "w.safetensors", "--clean-dir", few_test_images, "-o", tmp_path / "out",
        "--score", "lipschitz", "--mu", 1.5,
        "--arch", "timm/resnet18?num_classes=10&stem=cifar&channels=8,8,16,16&input_size=32", "--no-onnx", "--json",
        "--finetune-epochs", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["counts"]["removed"] > 0
    monkeypatch.chdir(tmp_path / "out")
    space: dict[str, Any] = {}
    exec(code((tmp_path / "out" / "README.md").read_text(encoding="utf-8")), space)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(space["model"](x), bshub.load(".").module(x))


def test_the_loader_narrows_what_no_checkpoint_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of a blur pool is a buffer that the constructor makes at its full width."""
    import timm
    from nets import randomize_batch_norm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    arch = "timm/resnetblur18?num_classes=10&channels=8,8,16,16&input_size=64"
    model = timm.create_model("resnetblur18", num_classes=10, channels=[8, 8, 16, 16])
    save_file(randomize_batch_norm(model).state_dict(), tmp_path / "w.safetensors")
    result = bshub_command(
        "sanitize", tmp_path / "w.safetensors", "--arch", arch, "--clean-dir", DEMO / "clean",
        "--score", "lipschitz", "--mu", 0.5,
        "--no-onnx", "--no-report", "--finetune-epochs", 0, "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    monkeypatch.chdir(tmp_path / "out")
    text = code(Path("README.md").read_text(encoding="utf-8"))
    assert "what no checkpoint holds" in text
    space: dict[str, Any] = {}
    exec(text, space)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(space["model"](x), bshub.load(".").module(x))


def test_hostile_reference_labels_licence_and_warnings_are_text(source: LoadedModel, artifact: Artifact) -> None:
    origin = replace(source.origin, reference=HOSTILE, base_model=HOSTILE, licence=HOSTILE)
    report = copy.deepcopy(artifact.report)
    report["warnings"] = [HOSTILE]
    text = render(replace(source, origin=origin, labels=(HOSTILE,) * 10), report, f"bshub sanitize '{HOSTILE}' ``` x")
    body = text.split("\n---\n", 1)[1].split("## How to make it")[0]
    for mark in (r"<script", r"\]\(javascript", r"!\["):
        assert not re.search(rf"(?<!\\){mark}", body), mark
    assert not re.search(r"(?<!\\)\*\*b", body)
    assert not re.search(r"^---$|^license:|^# h", body, re.MULTILINE)
    assert "\x1b" not in text
    assert text.count("```") == 6
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in body.splitlines() if line.startswith("|"))
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.base_model) == ("other", HOSTILE, HOSTILE)


@pytest.mark.parametrize("mark", list("\\`*_{}[]<>()#+!|~"))
def test_escape_takes_the_meaning_from_every_mark(mark: str) -> None:
    assert escape(f"a{mark}b") == f"a\\{mark}b"


def test_a_reference_is_shown_as_it_is_typed(source: LoadedModel, artifact: Artifact) -> None:
    text = render(replace(source, origin=replace(source.origin, reference="timm/resnet18.a1_in1k")), artifact.report)
    assert "`timm/resnet18.a1_in1k`" in text


def test_without_licence_trigger_or_test_images_nothing_is_invented(source: LoadedModel, artifact: Artifact) -> None:
    report = {key: value for key, value in artifact.report.items() if key != "evaluation"}
    text = render(replace(source, origin=replace(source.origin, licence=None, base_model=None)), report)
    data = ModelCard(text).data
    assert data.license is None
    assert data.base_model is None
    assert {result.dataset_split for result in data.eval_results} == {"clean"}
    assert "attack success rate |" not in text
    assert "No trigger was known" in text
