"""Policy × record → findings. What the policy asks and the record does not answer is inconclusive, never a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from bshub.errors import printable
from bshub.release.finding import INCONCLUSIVE, NOTE, PASS, REFUSED, Finding
from bshub.release.policy import Policy, lost_of, older, rate_of
from bshub.release.receipt import Receipt

_TEST = "measure it now: bshub gate … --test-dir DIR"
_DAY = 86_400.0
_AHEAD = 1 / 24  # days that two clocks may disagree


def judge_receipt(policy: Policy, receipt: Receipt, now: datetime | None = None) -> Iterator[Finding]:
    """What does not need a measurement: age, method, version, licence, drop, files, proofs.

    Args:
        policy: What is asked.
        receipt: Of the artifact.
        now: The time, for tests.
    """
    kind = receipt.get("kind") or receipt.get("command")
    if not isinstance(receipt.get("settings", "method"), str) or not isinstance(receipt.get("counts"), dict):
        reason = f"the receipt is not that of a sanitizing run ({printable(kind, 40)})"
        hint = "gate the folder above it" if kind == "dense copy" else "bshub sanitize MODEL --clean-dir DIR -o FOLDER"
        yield Finding("sanitized", REFUSED, reason, hint)
        return
    yield from _age(policy, receipt, now or datetime.now(UTC))
    yield from _method(policy, receipt)
    yield from _licence(policy, receipt)
    yield from _drop(policy, receipt)
    for name in policy.required_files:
        if name not in (receipt.get("files") or {}):
            yield Finding(
                "file-required", REFUSED, f"{name} is not part of the artifact", "sanitize again with it", name
            )
    proof = receipt.get("proof", "holds")
    if proof is True:
        yield Finding("proof", PASS, "the surgery was proved")
    else:
        yield Finding("proof", REFUSED, "the receipt states no proof of the surgery", "sanitize the model again")
    if "model.onnx" in (receipt.get("files") or {}):
        if receipt.get("onnx", "holds") is True:
            yield Finding("onnx-record", PASS, "ONNX and weights were compared when they were written")
        else:
            reason = "the receipt states no comparison of model.onnx with the weights"
            yield Finding("onnx-record", REFUSED, reason, "sanitize the model again", "model.onnx")


def judge_rates(policy: Policy, rates: Mapping[str, Any] | None, whence: str) -> Iterator[Finding]:
    """Accuracy and attack success of the artifact.

    Args:
        policy: What is asked.
        rates: ``accuracy`` and perhaps ``asr``, as a report has them.
        whence: ``recorded`` or ``measured``, for the reader.
    """
    accuracy, asr = (rate_of((rates or {}).get(name)) for name in ("accuracy", "asr"))
    if policy.min_accuracy is not None:
        yield from _bounded("accuracy", "accuracy", accuracy, policy.min_accuracy, policy, whence, least=True)
    if policy.max_asr is None:
        return
    if asr is None and not policy.require_asr:
        yield Finding("asr", NOTE, "no trigger is known: the attack success rate was not measured")
    else:
        yield from _bounded("asr", "attack success", asr, policy.max_asr, policy, whence, least=False)


def judge_unmeasured(policy: Policy) -> Iterator[Finding]:
    """What only a look at the weights can answer, where there was none."""
    if policy.max_suspicious is not None:
        reason = f"suspicious filters were not counted; the policy allows {policy.max_suspicious}"
        yield Finding("suspicious-filters", INCONCLUSIVE, reason, "look at the weights: bshub gate … --measure")


def _bounded(
    rule: str,
    name: str,
    rate: tuple[float, float, float, int] | None,
    bound: float,
    policy: Policy,
    whence: str,
    least: bool,
) -> Iterator[Finding]:
    if rate is None:
        how = f"{_TEST}{'' if least else ' --trigger FILE'}"
        yield Finding(rule, INCONCLUSIVE, f"{name} was not measured", how)
        return
    percent, low, high, count = rate
    text = f"{whence} {name} {percent:.1f} % [{low:.1f}, {high:.1f}] on {count} images"
    if count < policy.min_images:
        yield Finding("images", INCONCLUSIVE, f"{text}: fewer than {policy.min_images}", "measure on more images")
    judged = percent if not policy.worst_case else low if least else high
    if judged < bound if least else judged > bound:
        asked = f"{'at least' if least else 'at most'} {bound:g} %"
        hint = "look at report.html; a higher --mu removes less" if least else "a lower --mu or more clean images"
        yield Finding(rule, REFUSED, f"{text}; the policy asks {asked}", hint)
    else:
        yield Finding(rule, PASS, text)


def _drop(policy: Policy, receipt: Receipt) -> Iterator[Finding]:
    if policy.max_accuracy_drop is None:
        return
    measured = lost_of(receipt.get("evaluation"))
    if measured is None:
        reason = "accuracy before and after was not measured on test images"
        yield Finding("accuracy-drop", INCONCLUSIVE, reason, "sanitize again with --test-dir DIR")
        return
    before, after, most = measured
    drop, text = before - after, f"accuracy went from {before:.1f} to {after:.1f} %"
    if policy.worst_case:
        drop, text = most, f"{text}, a loss of up to {most:.1f} points (95 %)"
    if drop > policy.max_accuracy_drop + 1e-9:  # 2.2 - 0.2 is a little more than 2
        reason = f"{text}; the policy allows {policy.max_accuracy_drop:g} points"
        yield Finding("accuracy-drop", REFUSED, reason, "sanitize with a higher --mu, or more clean images")
    else:
        yield Finding("accuracy-drop", PASS, text)


def _age(policy: Policy, receipt: Receipt, now: datetime) -> Iterator[Finding]:
    if policy.max_age_days is None:
        return
    again = "sanitize the model again, with the bshub of today"
    try:
        created = datetime.fromisoformat(str(receipt.get("created")))
        days = (now - created).total_seconds() / _DAY
    except (ValueError, TypeError, OverflowError):  # no date, or one without a time zone
        yield Finding("age", INCONCLUSIVE, "the receipt does not say when it was written", again)
        return
    if days < -_AHEAD:
        yield Finding("age", REFUSED, "the receipt was written in the future", "look at the clocks of both machines")
    elif days > policy.max_age_days:
        reason = f"expired: written {days:.0f} days ago, the policy allows {policy.max_age_days:g}"
        yield Finding("age", REFUSED, reason, again)
    else:
        yield Finding("age", PASS, f"written {max(days, 0):.0f} days ago")


def _method(policy: Policy, receipt: Receipt) -> Iterator[Finding]:
    method, version = receipt.get("settings", "method"), receipt.get("versions", "bshub")
    if policy.methods:
        if method in policy.methods:
            yield Finding("method", PASS, f"sanitized by {printable(method, 40)}")
        else:
            reason = f"sanitized by {printable(method, 40)}; the policy accepts {', '.join(policy.methods)}"
            yield Finding("method", REFUSED, reason, f"bshub sanitize … --method {policy.methods[0]}")
    if policy.min_bshub is not None:
        if isinstance(version, str) and not older(version, policy.min_bshub):
            yield Finding("version", PASS, f"bshub {printable(version, 40)}")
        else:
            reason = f"sanitized by bshub {printable(version, 40)}; the policy asks {policy.min_bshub} or newer"
            yield Finding("version", REFUSED, reason, "upgrade bshub and sanitize the model again")


def _licence(policy: Policy, receipt: Receipt) -> Iterator[Finding]:
    if policy.licences is None:
        return
    licence = receipt.get("model", "licence")
    allowed = {name.casefold() for name in policy.licences}
    if isinstance(licence, str) and licence.casefold() in allowed:
        yield Finding("licence", PASS, f"licence {printable(licence, 60)}")
    elif licence is None:
        reason = "the base model states no licence"
        yield Finding("licence", REFUSED, reason, "ask its author; the policy allows " + ", ".join(policy.licences))
    else:
        reason = f"licence {printable(licence, 60)} is not one of {', '.join(policy.licences)}"
        yield Finding("licence", REFUSED, reason, "have the licence cleared and added to the policy")
