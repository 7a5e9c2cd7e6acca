"""`patch`, `unpatch`, `patched`: put the kernels into the forward passes of one model instance, and remove them.

Patching changes the class of a module to a subclass defined at module level (`guards.stands_for`), in which the original is
`super()`. Weights, other models and classes are not touched; copies, pickles and replicas compute with their own weights; a
`forward` set on an instance takes precedence; and changing the class back undoes the patch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from llava15_kernels._dispatch import Backend

from ..fast import generate, text, vision  # noqa: F401  -- declare the patched classes
from ..fast.guards import FAST
from ..fast.runtime import RUNTIME, FastModule, Runtime, runtime_of
from .report import PatchHandle
from .targets import check_model, find_model, patched_modules


def patch(model: nn.Module, backend: Backend = "auto", *, cuda_graph: bool = True) -> PatchHandle:
    """Makes this model instance run the kernels in the methods of `TARGETS`.

    Args:
        model: a `LlavaOnevision1_5ForConditionalGeneration` or `LlavaOnevision1_5Model`, or a module that holds one.
        backend: "triton" for the kernels, "torch" for their eager counterparts, "auto" for the kernels wherever they can
            run. Calls that need gradients fall back to transformers' forward.
        cuda_graph: on a GPU, replay the decode step, and the vision tower on small images of recurring sizes, as CUDA graphs.

    Returns:
        A handle with `report()`. Patching a patched model again has no effect unless options differ.

    Raises:
        TypeError: `model` contains no supported model.
        PatchError: a target is missing or has another class, signature, dtype or head_dim than expected.
        RuntimeError: the backend cannot run on the model's device.
    """
    root = find_model(model)
    check_model(root, backend)
    modules = patched_modules(root)
    present = [runtime_of(module) if isinstance(module, FastModule) else None for module, _ in modules]
    # Incomplete after an interrupted `unpatch`.
    first, complete = present[0], all(runtime is present[0] for runtime in present)
    if first is not None and complete and (first.backend, first.cuda_graph) == (backend, cuda_graph):
        return PatchHandle(model)
    try:
        unpatch(model)
        runtime = Runtime(backend, cuda_graph)
        for module, base in modules:
            _install(module, FAST[base], runtime)
    except BaseException:
        unpatch(model)
        raise
    return PatchHandle(model)


def unpatch(model: nn.Module) -> None:
    """Restores the original classes. Has no effect on a model that is not patched.

    Raises:
        TypeError: `model` contains no supported model.
    """
    find_model(model)
    for module in model.modules():
        if isinstance(module, FastModule):
            _change_class(module, unpatched_class(type(module)))
        # Last, so that a patched class has its runtime until the end, and an interrupted call can be repeated.
        if (runtime := vars(module).pop(RUNTIME, None)) is not None:
            runtime.release()


@contextlib.contextmanager
def patched(model: nn.Module, backend: Backend = "auto", *, cuda_graph: bool = True) -> Iterator[PatchHandle]:
    """`patch` for the duration of a `with` block; undone even if the body raises.

    A model that was patched before remains so, with its previous backend.
    """
    before = next((found for module, _ in patched_modules(find_model(model)) if (found := runtime_of(module))), None)
    handle = patch(model, backend, cuda_graph=cuda_graph)
    try:
        yield handle
    finally:
        try:
            unpatch(model)
        finally:  # interrupted or not
            if before is not None:
                patch(model, before.backend, cuda_graph=before.cuda_graph)


def _install(module: nn.Module, fast: type[nn.Module], runtime: Runtime) -> None:
    vars(module)[RUNTIME] = runtime
    _change_class(module, patched_class(type(module), fast))  # type: ignore[arg-type]


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class and rebinds forwards that accelerate's hooks have left on the instance, which are bound to the class at
    the time."""
    before = vars(type(module)).get("forward") or type(module).forward
    bound = [
        slot
        for slot in ("forward", "_old_forward")
        if isinstance(method := vars(module).get(slot), MethodType) and method.__self__ is module and method.__func__ is before
    ]
    module.__class__ = cls
    for slot in bound:
        vars(module)[slot] = MethodType(cls.forward, module)


@functools.cache
def patched_class(cls: Any, fast: Any) -> Any:
    """The patched version of `cls`: `fast` itself or, for subclasses made by users, FSDP2 or parametrizations, a dynamic class
    derived from both, pickled by its bases."""
    if FAST.get(cls) is fast:
        return fast
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce, ORIGINAL: cls}
    base, *others = cls.__bases__
    if not others and cls.__name__ == f"Parametrized{base.__name__}":
        # torch removes its properties from the module's class and, after the last one, restores the first base.
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        return type(cls)(cls.__name__, (patched_class(base, fast),), {**own, ORIGINAL: cls})
    return type(cls)(cls.__name__, (fast, cls), body)


ORIGINAL = "_llava15_original"


def _properties(cls: type) -> dict[str, property]:
    """Parametrizations are properties of the module's class that come and go."""
    return {name: value for name, value in vars(cls).items() if isinstance(value, property)}


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    fast = next(fast for fast in FAST.values() if isinstance(module, fast))
    return _new, (vars(type(module))[ORIGINAL], fast), module.__getstate__()


def _new(cls: type[nn.Module], fast: type[nn.Module]) -> nn.Module:
    made = patched_class(cls, fast)  # type: ignore[arg-type]
    return made.__new__(made)


def unpatched_class(cls: Any) -> Any:
    """The class before `patch`, even if FSDP2 or a parametrization has derived from ours since."""
    if not issubclass(cls, FastModule):
        return cls
    if (found := vars(cls).get(ORIGINAL)) is not None:
        for name in _properties(found).keys() - _properties(cls).keys():
            delattr(found, name)
        for name in _properties(cls).keys() - _properties(found).keys():
            setattr(found, name, vars(cls)[name])
        return found
    for base, fast in FAST.items():
        if cls is fast:
            return base
    bases = tuple(dict.fromkeys(map(unpatched_class, cls.__bases__)))
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)
