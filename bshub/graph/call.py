"""One recorded operation as the rules see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bshub.graph.channels import Traveller

Result = Traveller | list[Traveller]


@dataclass(frozen=True)
class Call:
    """An operation with its arguments; tensors are travellers.

    Attributes:
        op: ATen name without overload and in-place underscore, e.g. ``add``.
        module: Qualified name of the module that ran it.
        args: Positional arguments, in ATen's order.
        result_shape: The result's shape, or a tuple of shapes for several results.
        whole: Whether this is all that the module does: it takes the module's input and gives its output.
    """

    op: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result_shape: Any
    whole: bool = False

    @property
    def several(self) -> bool:
        """Whether the operation returns several tensors."""
        return bool(self.result_shape) and isinstance(self.result_shape[0], tuple)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the one result."""
        return self.result_shape

    @property
    def first_shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return self.result_shape[0] if self.several else self.result_shape

    def arg(self, index: int, default: Any = None) -> Any:
        """Positional argument ``index``."""
        return self.args[index] if index < len(self.args) else default

    def travellers(self) -> list[Traveller]:
        """All tensor arguments, lists opened, in order."""
        found: list[Traveller] = []
        for arg in (*self.args, *self.kwargs.values()):
            if isinstance(arg, Traveller):
                found.append(arg)
            elif isinstance(arg, (list, tuple)):
                found.extend(item for item in arg if isinstance(item, Traveller))
        return found

    def first(self, traveller: Traveller) -> Result:
        """The result with ``traveller`` as its first tensor, the others without channels."""
        if not self.several:
            return traveller
        return [traveller, *(Traveller.plain(shape) for shape in self.result_shape[1:])]

    def everything_plain(self) -> Result:
        """The result without any channels."""
        if self.several:
            return [Traveller.plain(shape) for shape in self.result_shape]
        return Traveller.plain(self.result_shape or ())

    def reason(self, why: str) -> str:
        """``module: op why`` for a pin."""
        return f"{self.module or 'the model'}: {self.op} {why}"
