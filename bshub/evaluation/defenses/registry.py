"""``DEFENSES``: the published methods that the benchmark compares with, one function each."""

from __future__ import annotations

from bshub.errors import UsageError, choices
from bshub.evaluation.defenses.anp import anp
from bshub.evaluation.defenses.awm import awm
from bshub.evaluation.defenses.bnp import bnp
from bshub.evaluation.defenses.clp import clp
from bshub.evaluation.defenses.fine_pruning import fine_pruning
from bshub.evaluation.defenses.ft import ft
from bshub.evaluation.defenses.ft_sam import ft_sam
from bshub.evaluation.defenses.i_bau import i_bau
from bshub.evaluation.defenses.ims import ims
from bshub.evaluation.defenses.interface import Defense
from bshub.evaluation.defenses.nad import nad
from bshub.evaluation.defenses.rnp import rnp
from bshub.evaluation.defenses.tsbd import tsbd

DEFENSES: dict[str, Defense] = {
    "anp": anp,
    "awm": awm,
    "bnp": bnp,
    "clp": clp,
    "fine-pruning": fine_pruning,
    "ft": ft,
    "ft-sam": ft_sam,
    "i-bau": i_bau,
    "ims": ims,
    "nad": nad,
    "rnp": rnp,
    "tsbd": tsbd,
}


def find_defense(name: str, others: tuple[str, ...] = ()) -> Defense:
    """Look a defense up.

    Args:
        name: Key of ``DEFENSES``.
        others: Further names that the message offers.

    Returns:
        Its function.

    Raises:
        UsageError: There is no such defense.
    """
    if name not in DEFENSES:
        raise UsageError(f"unknown method {name!r}", hint=choices(name, (*others, *DEFENSES)))
    return DEFENSES[name]
