"""The corpus of bad inputs and faults, built in code and numbered as in ``docs/hostile-inputs.md``.

Each case makes something bad, sends it through the real door (the command line wherever there is one) and says what
must come of it. ``test_hostile.py`` runs them all; ``python -m bad`` in ``tests/`` prints the table of the docs.
"""

from __future__ import annotations

from bad import checkpoints, folders, graphs, hub, images, onnx_files, outputs, safetensors_files, settings
from bad.bench import Bench, Case, Outcome

__all__ = ["CASES", "NUMBERS", "Bench", "Case", "Outcome", "table"]

NUMBERS = range(1, 66)
CASES: list[Case] = [
    case
    for room in (checkpoints, safetensors_files, graphs, images, folders, settings, outputs, onnx_files, hub)
    for case in room.CASES
]


def table() -> str:
    """The table of ``docs/hostile-inputs.md``."""
    lines = ["| case | what | must happen | exit | says |", "|---|---|---|---|---|"]
    for case in sorted(CASES, key=lambda case: case.number):
        mark = " ●" if case.silent else ""
        must = case.error.__name__ if case.error else "goes on"
        said = case.says.replace("|", "\\|").replace("\x1b", "\\x1b")
        lines.append(f"| {case.number}{mark} | {case.what} | {must} | {case.code} | {f'`{said}`' if said else ''} |")
    return "\n".join(lines) + "\n"
