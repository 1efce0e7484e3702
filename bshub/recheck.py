"""The gate's second depth: load an artifact's weights, measure again, compare ONNX, look for suspicious filters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from bshub.commands import evaluate_reference, scan_reference
from bshub.errors import BshubError, InconclusiveError
from bshub.inputs import Inputs, load_inputs
from bshub.intake.folders import ClassFolder
from bshub.intake.models import LoadedModel
from bshub.progress import Progress, Steps
from bshub.release.finding import INCONCLUSIVE, NOTE, PASS, REFUSED, Finding
from bshub.release.judge import judge_rates
from bshub.release.onnx import compare_onnx
from bshub.release.policy import Policy
from bshub.release.receipt import Receipt
from bshub.settings import Settings

PARITY_IMAGES = 16
SUSPECTS = 20  # findings of their own; the count says the rest
ONNX = "model.onnx"


def recheck(
    receipt: Receipt,
    policy: Policy,
    test_dir: Path | None,
    trigger: Path | None,
    device: str,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """Measure an artifact.

    Args:
        receipt: Of the artifact; its files hold.
        policy: What is asked.
        test_dir: Class folders; None: the recorded rates are judged, and ONNX is compared on noise.
        trigger: Trigger file; needs ``test_dir``.
        device: Of the measurement.
        batch_size: Of the measurement.
        progress: Shows the steps.

    Raises:
        BshubError: The images or the trigger cannot be used. What is wrong with the model is a finding.
    """
    steps, model = Steps(progress), str(receipt.folder.resolve())
    try:
        source, _, _, _ = load_inputs(Inputs(model), Settings(device=device), steps)
    except BshubError as error:
        yield Finding("loads", REFUSED, error.message, error.hint)
        return
    yield Finding("loads", PASS, f"{source.origin.architecture.name} was rebuilt from its recipe")
    inputs = Inputs(model, test_dir=test_dir, trigger=trigger)
    _, _, test, _ = load_inputs(inputs, Settings(device=device), steps)  # refuses images and trigger that do not fit
    if test is not None:
        report = evaluate_reference(inputs, Settings(device=device, batch_size=batch_size), progress=progress)
        rates = dict(report["evaluation"])
        if "asr" not in rates and receipt.get("evaluation", "after", "asr") is not None:
            rates["asr"] = receipt.get("evaluation", "after", "asr")
        yield from judge_rates(policy, rates, "measured")
    else:
        yield from judge_rates(policy, receipt.get("evaluation", "after"), "recorded")
    if ONNX in receipt.found:
        yield _parity(source, receipt.folder / ONNX, test, steps)
    yield from _suspects(model, policy, device, batch_size, progress)


def _parity(source: LoadedModel, path: Path, test: ClassFolder | None, steps: Steps) -> Finding:
    images, kind = _images(source, test)
    try:
        with steps.step("onnx"):
            parity = compare_onnx(source.module, images, path)
    except BshubError as error:
        return Finding("onnx-parity", REFUSED, error.message, error.hint, ONNX)
    answers = "the same answers" if parity.same_answers else "other answers"
    text = f"relative error {parity.error:.1e} (at most {parity.bound:g}), {answers} on {kind}"
    if parity.holds:
        return Finding("onnx-parity", PASS, text, path=ONNX)
    hint = "export it again: bshub sanitize writes an ONNX file that was compared"
    return Finding("onnx-parity", REFUSED, f"the ONNX file is not the weights: {text}", hint, ONNX)


def _images(source: LoadedModel, test: ClassFolder | None) -> tuple[Tensor, str]:
    """Normalised images ``[n, c, h, w]`` spread over the folder, or noise, and which of them."""
    if test is None or not len(test):
        noise = torch.randn(PARITY_IMAGES, *source.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
        return noise, "noise"
    step = max(len(test) // PARITY_IMAGES, 1)
    chosen = ClassFolder(test.root, test.paths[::step], test.labels[::step], test.matched)
    return torch.stack([source.preprocessing(image) for image, _ in islice(chosen.read(), PARITY_IMAGES)]), "images"


def _suspects(model: str, policy: Policy, device: str, batch_size: int, progress: Progress | None) -> Iterator[Finding]:
    settings = Settings(mu=policy.suspicious_mu, device=device, batch_size=batch_size)
    try:
        report = scan_reference(Inputs(model), settings, progress=progress)
    except InconclusiveError as error:
        yield Finding("suspicious-filters", INCONCLUSIVE, error.message, error.hint)
        return
    except BshubError as error:
        yield Finding("suspicious-filters", REFUSED, error.message, error.hint)
        return
    count = report["diagnosis"]["counts"]["flagged"]
    text = f"{count} of {report['diagnosis']['filters']} filters lie more than {policy.suspicious_mu:g} deviations out"
    if policy.max_suspicious is None:
        yield Finding("suspicious-filters", NOTE, f"{text}; the policy sets no bound")
    elif count <= policy.max_suspicious:
        yield Finding("suspicious-filters", PASS, text)
    else:
        hint = "bshub sanitize the artifact again with a lower --mu, or have the filters looked at"
        yield Finding("suspicious-filters", REFUSED, f"{text}; the policy allows {policy.max_suspicious}", hint)
        for suspect in report["suspects"][:SUSPECTS]:
            layer, channel = suspect["layer"], suspect["filter"]
            where = f"{layer}[{channel}] lies {suspect['score']:.1f} deviations above its layer"
            yield Finding("suspicious-filters", NOTE, where, layer=layer, channel=channel)
