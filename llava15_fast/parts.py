"""The modules whose work fused code does without calling them, and whether they still compute what it stands for."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType

from torch import nn

from .refusal import has_hooks, inside


@dataclass(frozen=True)
class Part:
    """One of them, or many of a kind.

    Attributes:
        path: below the module that has the fused code, `*` for every child.
        module_class: what it has to be, with the forward of that class.
        parameters: names of the parameters of that forward.
    """

    path: str
    module_class: type[nn.Module]
    parameters: tuple[str, ...]


def walk(root: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `path` means, each with its own path.

    Raises:
        LookupError: a name on the way is missing; the message says where.
    """

    def below(module: nn.Module, done: str, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
        if not names:
            yield done, module
        elif names[0] == "*":
            for index, child in module.named_children():
                yield from below(child, f"{done}.{index}", names[1:])
        elif (child := getattr(module, names[0], None)) is not None:
            yield from below(child, f"{done}.{names[0]}".lstrip("."), names[1:])
        else:
            raise LookupError(f"{done or type(module).__name__} has no {names[0]!r}")

    return below(root, "", path.split(".") if path else [])


def difference(path: str, module: nn.Module, module_class: type[nn.Module], method: str = "forward") -> str | None:
    """What tells that `module` computes by its class something else than `module_class` does, or None."""
    if not isinstance(module, module_class):
        return f"{path} is a {type(module).__name__}, expected {module_class.__name__}"
    if getattr(type(module), method, None) is not getattr(module_class, method, None):
        return f"{path}: {type(module).__name__} has its own {method}, expected {module_class.__name__}'s"
    return None


def is_replaced(module: nn.Module, slot: str = "forward", method: str = "forward") -> bool:
    """Whether the instance has a method of its own; its class's, bound to it, is none: accelerate leaves that behind."""
    present = vars(module).get(slot)
    return present is not None and not (isinstance(present, MethodType) and present.__func__ is getattr(type(module), method))


def obstacle(root: nn.Module, parts: Iterable[Part]) -> str | None:
    """Why the original has to run: a part that someone listens to, has adapted, or put something else in the place of."""
    try:
        for part in parts:
            # Those above come first, so that what is below a part is there.
            for path, module in walk(root, part.path):
                if inside(module) is not module:
                    return f"an adapter sits on {path}, which the fused code would pass over"
                if has_hooks(module):
                    return f"a hook sits on {path}, which the fused code would pass over"
                if found := difference(path, module, part.module_class):
                    return found
                # Someone may have replaced the method of the class itself, for all models.
                if is_replaced(module) or type(module).forward.__module__ != part.module_class.__module__:
                    return f"{path}.forward was replaced"
    except LookupError as error:
        return str(error)
    return None


def activation_obstacle(module: nn.Module, classes: Container[type[nn.Module]]) -> str | None:
    """The same for an activation, which a configuration chooses."""
    if has_hooks(module):
        return "a hook sits on an activation, which the fused code would pass over"
    if type(module) not in classes or is_replaced(module) or getattr(module, "approximate", "none") != "none":
        return f"no kernel for the activation {type(module).__name__}"
    return None
