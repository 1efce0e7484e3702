"""An admitted state dict → a module, strictly: everything fits, or nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bshub.errors import CheckpointError, printable
from bshub.intake.fitting import fitting

_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNTER = "num_batches_tracked"
_TRAINED = "name the architecture that was trained: --arch NAME"


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Load weights into a module; on refusal the module is as it was.

    Prefixes that wrappers leave (``module.``, ``_orig_mod.``, ``model.``) are taken off when every key carries them.
    Floats are cast to the module's own precision.

    Args:
        module: The network that the weights should fit.
        state: Admitted weights.
        origin: Where they came from, for messages.

    Raises:
        CheckpointError: Keys are missing or left over, a size or a kind of number differs, or a value overflows.
    """
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    given = _unprefixed(state, expected)
    missing = [name for name in expected if name not in given and name.rpartition(".")[2] != _COUNTER]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        parts = [f"{len(missing)} missing ({_first(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({_first(unexpected)})"] if unexpected else []
        raise CheckpointError(
            f"{origin}: its tensors are not those of the model: {', '.join(parts)}",
            hint=_other(state),
        )
    differing = [name for name, value in expected.items() if name in given and value.shape != given[name].shape]
    if differing:
        name = differing[0]
        theirs, ours = list(given[name].shape), list(expected[name].shape)
        raise CheckpointError(
            f"{origin}: {len(differing)} of {len(given)} tensors have another size; '{printable(name, 80)}' is "
            f"{theirs} in the checkpoint and {ours} in the model",
            hint=_remedy(module, given, expected, differing) or _other(state),
        )
    ready = {name: _cast(name, value, expected[name].dtype, origin) for name, value in given.items()}
    try:
        # the module's own state dict, so that modules with versions (torchvision's MNASNet) know theirs
        complete = module.state_dict()
        complete.update(ready)
        module.load_state_dict(complete, strict=True)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{origin}: the model refused its weights: {printable(error, 160)}",
            hint=_TRAINED,
        ) from None


def _unprefixed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A model may have a child called "model" of its own, so the reading that fits best wins, not the shortest.
    return max(_readings(state), key=lambda reading: len(reading.keys() & expected.keys()))


def _readings(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A state dict as it is, then with one prefix after the other taken off."""
    readings = [dict(state)]
    while readings[-1]:
        last = readings[-1]
        prefix = next((known for known in _PREFIXES if all(name.startswith(known) for name in last)), None)
        if prefix is None:
            break
        readings.append({name.removeprefix(prefix): value for name, value in last.items()})
    return readings


def _other(state: Mapping[str, Tensor]) -> str:
    """What to type where the weights are those of another network."""
    fit = next(filter(None, map(fitting, _readings(state))), None)
    return f"the weights are those of another network: {fit}" if fit else _TRAINED


def _remedy(
    module: nn.Module, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], differing: list[str]
) -> str | None:
    """The number of classes that would fit, where nothing but the head differs."""
    heads = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | _ConvNd)]
    head = f"{heads[-1]}." if heads and heads[-1] else ""
    weight = f"{head}weight"
    own = {weight, f"{head}bias"}
    if weight in differing and own.issuperset(differing) and given[weight].shape[1:] == expected[weight].shape[1:]:
        classes = given[weight].shape[0]
        return f"the checkpoint was trained for {classes} classes: --num-classes {classes}"
    return None


def _cast(name: str, value: Tensor, dtype: torch.dtype, origin: str) -> Tensor:
    what = None
    cast = value.to(dtype)
    if dtype.is_floating_point:
        if not value.is_floating_point():
            what = f"holds {_short(value.dtype)} where the model computes in {_short(dtype)}"
        elif not torch.isfinite(cast).all():
            what = f"overflows {_short(dtype)}"
    elif not torch.equal(cast.to(value.dtype), value):
        what = f"holds {_short(value.dtype)} that {_short(dtype)} cannot hold"
    if what is not None:
        raise CheckpointError(
            f"{origin}: tensor '{printable(name, 80)}' {what}", hint="save the weights in float32: model.float()"
        )
    return cast


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(names: Iterable[str]) -> str:
    chosen = [printable(name, 60) for name in names]
    return ", ".join(chosen[:3]) + (", …" if len(chosen) > 3 else "")
