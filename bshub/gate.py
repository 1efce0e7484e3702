"""``bshub gate``: an artifact and a policy → whether it may ship, with reasons. What cannot be examined does not pass.

Two depths. *receipt* reads files and compares digests, signature and recorded rates; it imports nothing heavy.
*measure* loads the weights as well and measures again, but only those of a folder whose receipt holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bshub.errors import OutputError, UsageError, printable
from bshub.files import MANIFEST
from bshub.progress import Progress
from bshub.release.finding import NOTE, REFUSED, Finding, Verdict
from bshub.release.judge import judge_rates, judge_receipt, judge_unmeasured
from bshub.release.policy import DEFAULT, Policy
from bshub.release.receipt import WEIGHTS, Receipt, read_receipt
from bshub.release.signature import verify_signature

RECEIPT, MEASURE = "receipt", "measure"


def gate(
    target: Path,
    policy: Policy,
    *,
    key: Path | None = None,
    policy_sha256: str | None = None,
    measure: bool = False,
    test_dir: Path | None = None,
    clean_dir: Path | None = None,
    trigger: Path | None = None,
    device: str = "auto",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Verdict:
    """Judge an artifact.

    Args:
        target: An artifact, or a file in one. A file without a receipt beside it, or the name of a library's
            model, is refused.
        policy: What is asked.
        key: Public key that must have signed, beside the one the policy may name.
        policy_sha256: Digest that the policy must have; another one is a refusal.
        measure: Load the weights and measure again; so do any of the next three.
        test_dir: Class folders to measure on.
        clean_dir: The same, where there is no ``test_dir``.
        trigger: Trigger file, for the attack success rate.
        device: Of the measurement.
        batch_size: Of the measurement.
        progress: Shows the steps of the measurement.

    Returns:
        The verdict.

    Raises:
        UsageError: There is nothing at ``target``, or a key or digest cannot be used.
        BshubError: The images or the trigger cannot be used.
    """
    images = test_dir or clean_dir
    measure = measure or images is not None or trigger is not None
    depth = MEASURE if measure else RECEIPT
    findings = list(_pinned(policy, policy_sha256))
    folder = artifact_of(target)
    if folder is None:
        findings.append(_without_receipt(target))
        return Verdict(str(target), depth, tuple(findings), None, policy.as_dict())
    receipt = read_receipt(folder)
    findings += _receipt_findings(receipt, policy, key)
    if measure and receipt.whole:
        recheck = _recheck()
        findings += recheck(receipt, policy, images, trigger, device, batch_size, progress)
    elif measure:
        findings.append(Finding("loads", NOTE, "not measured: the files are not those of the receipt"))
    elif receipt.record:
        findings += judge_rates(policy, receipt.get("evaluation", "after"), "recorded")
        findings += judge_unmeasured(policy)
    return Verdict(str(target), depth, tuple(findings), receipt.found.get(WEIGHTS), policy.as_dict(), folder)


def verify(target: Path, key: Path | None = None) -> Verdict:
    """Only whether the files are those of the receipt, and who signed it.

    Args:
        target: An artifact, or a file in it.
        key: Public key, PEM, that must have signed the receipt.

    Returns:
        The verdict.

    Raises:
        UsageError: There is nothing at ``target``, or the key cannot be used.
    """
    folder = artifact_of(target)
    if folder is None:
        return Verdict(str(target), RECEIPT, (_without_receipt(target),), None, Policy().as_dict())
    receipt = read_receipt(folder)
    signed = [verify_signature(receipt, key)] if receipt.digest else []
    findings = (*receipt.findings, *signed)
    return Verdict(str(target), RECEIPT, findings, receipt.found.get(WEIGHTS), Policy().as_dict(), folder)


def artifact_of(target: Path) -> Path | None:
    """The folder whose receipt speaks of a path; None for a file that has none beside it, or a library's model.

    Args:
        target: A folder or a file.

    Returns:
        The folder.

    Raises:
        UsageError: There is nothing.
    """
    try:
        if target.is_dir():
            return target
        if target.exists() or target.is_symlink():
            return target.parent if os.path.lexists(target.parent / MANIFEST) else None
    except (OSError, ValueError):  # a name that cannot be one
        pass
    if target.parts[:1] in (("timm",), ("torchvision",)) and len(target.parts) == 2:
        return None
    download = f"hf download {target} --local-dir FOLDER, then " if len(target.parts) == 2 else ""
    hint = f"the gate looks at files on this machine: {download}bshub gate FOLDER"
    raise UsageError(f"there is no file or folder {printable(target, 300)}", hint=printable(hint, 600))


def write_policy(path: Path) -> None:
    """Write the commented default policy.

    Args:
        path: The file to write.

    Raises:
        OutputError: The file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(DEFAULT)
    except FileExistsError:
        raise OutputError(f"{path} exists", hint="choose another name: bshub gate --init --policy NEW.toml") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path} cannot be written: {reason}", hint="choose another place with --policy") from None


def _receipt_findings(receipt: Receipt, policy: Policy, key: Path | None) -> Iterator[Finding]:
    yield from receipt.findings
    if receipt.digest is None:
        return
    wanted = policy.signer if policy.signer and policy.signer.startswith("sha256:") else None
    named = Path(policy.signer) if policy.signer and wanted is None else None
    if named is None or key is not None:
        yield verify_signature(receipt, key, wanted)
    if named is not None:
        yield verify_signature(receipt, named)
    if receipt.record:
        yield from judge_receipt(policy, receipt)


def _recheck() -> Callable[..., Iterator[Finding]]:
    """The second depth. A hook that only reads receipts may be installed without what it needs.

    Raises:
        UsageError: A library is missing.
    """
    try:
        from bshub.recheck import recheck
    except ModuleNotFoundError as error:
        raise UsageError(f"measuring needs {error.name}, which is not installed", hint="pip install bshub") from None
    return recheck


def _pinned(policy: Policy, wanted: str | None) -> Iterator[Finding]:
    if wanted is None:
        return
    wanted = wanted.removeprefix("sha256:").casefold()
    if wanted != policy.sha256:
        reason = f"the policy ({policy.origin}) has sha256 {policy.sha256[:12]}…, not {printable(wanted[:12])}…"
        yield Finding("policy-changed", REFUSED, reason, "have the change reviewed, then give its new digest")


def _without_receipt(target: Path) -> Finding:
    write = f"bshub sanitize {target} --clean-dir DIR -o FOLDER writes an artifact"
    if not os.path.lexists(target):
        what, hint = f"{target} is a library's model", f"{write}; then bshub gate FOLDER"
    elif target.suffix == ".onnx":
        what = f"{target.name} is a lone ONNX file"
        hint = "gate the folder that bshub sanitize wrote; its model.onnx is bound to the receipt there"
    else:
        what, hint = f"{target.name} is a file", f"{write} (add --arch ARCH for weights alone); then bshub gate FOLDER"
    return Finding("receipt-missing", REFUSED, f"{what} without a receipt: nothing says that it was sanitized", hint)
