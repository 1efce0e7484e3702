"""Verdict → JUnit XML, the form in which build servers show what passed and what did not."""

from __future__ import annotations

from xml.etree import ElementTree

from bshub.release.finding import INCONCLUSIVE, NOTE, REFUSED, RULES, Verdict

_TAGS = {REFUSED: "failure", INCONCLUSIVE: "error", NOTE: "skipped"}


def junit(verdict: Verdict) -> str:
    """One suite, one case per finding: refused is a failure, inconclusive an error, not asked is skipped."""
    counts = {tag: sum(_TAGS.get(finding.level) == tag for finding in verdict.findings) for tag in _TAGS.values()}
    suite = ElementTree.Element(
        "testsuite",
        name="bshub gate",
        tests=str(len(verdict.findings)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    for finding in verdict.findings:
        place = finding.path or (f"{finding.layer}[{finding.channel}]" if finding.layer else None)
        name = f"{finding.rule}: {place}" if place else finding.rule
        case = ElementTree.SubElement(suite, "testcase", classname="bshub.gate", name=name, time="0")
        if tag := _TAGS.get(finding.level):
            said = ElementTree.SubElement(case, tag, message=finding.message)
            if tag != "skipped":
                said.set("type", finding.rule)
                said.text = "\n".join([RULES[finding.rule], *([f"Next: {finding.hint}"] if finding.hint else [])])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
