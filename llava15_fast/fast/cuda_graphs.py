"""CUDA graphs: one launch for a whole forward pass instead of several hundred.

A graph has addresses baked in: of weights, of the memory it writes to, of its inputs and output. Therefore

- inputs are copied into static buffers, and the output is copied out, since callers may keep it;
- a step is captured on its second occurrence, into the `Slot` kept by its owner (each set of KV buffers has one for the decode
  step, the vision tower one for each of the most recent sizes), and replayed while its key stays the same;
- the key holds every baked-in address and number, and the tensors at these addresses are kept alive by the slot;
- a capture during which another thread moved a weight is discarded.

Graphs of one model replay one at a time. Settings of torch's arithmetic, such as TF32, are those at capture.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .guards import Facts

logger = logging.getLogger("llava15_fast")

Step = Callable[..., torch.Tensor]
Tensors = tuple[torch.Tensor, ...]

_capturing = threading.Lock()
"""Only one capture at a time per stream and, in torch 2.11, per random generator."""


class CapturedStep:
    """`capture` records the kernels that a function launches on a device, `replay` launches them again.

    `torch.cuda.graph` does not fit: it captures on one stream for all devices, so that work on any other device than the first
    would not be recorded, and after an error the caller is left on that stream.

    Args:
        stream: to capture on. Graphs that share a stream must share a pool: cuBLAS gets one workspace per stream, allocated
            from the first pool captured into and freed with any graph of that stream (pytorch#193402), while the others still
            write to it.
    """

    new_pool = staticmethod(torch.cuda.graph_pool_handle)
    new_stream = staticmethod(torch.cuda.Stream)

    def __init__(self, device: torch.device, stream: Any) -> None:
        self.device, self.stream = device, stream
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], torch.Tensor], pool: Any) -> torch.Tensor:
        with _capturing, torch.cuda.device(self.device), torch.cuda.stream(self.stream), contextlib.ExitStack() as after:
            # Garbage collection may unload a CUDA module, which invalidates a capture.
            after.callback(gc.enable if gc.isenabled() else gc.disable)
            gc.disable()
            # Cached memory cannot be reclaimed during a capture; and a graph that was just dropped may still be running.
            self.wait()
            torch.cuda.empty_cache()
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = step()
            except BaseException:
                # Raises, too, if the first error has invalidated the capture.
                with contextlib.suppress(RuntimeError):
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
            return output

    def replay(self) -> None:
        self.graph.replay()

    def wait(self) -> None:
        """Waits for running replays, whose memory could otherwise be unmapped under them."""
        torch.cuda.synchronize(self.device)


class Slot:
    """State of one recurring step: empty, its key once it was seen, or its graph.

    `key` is everything that must not change: the part of the model, the addresses of its weights (`Facts.fingerprint`), and
    more. `inputs` and `output` are static buffers; the weights that the graph reads are `held`, to keep their addresses taken.
    """

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.clear()

    def clear(self) -> None:
        self.inputs: Tensors = ()
        self.output: torch.Tensor | None = None
        self.held: list[torch.Tensor] = []
        self.graph: CapturedStep | None = None


class Graphs:
    """Captures and replays the graphs of one model, which share a memory pool and so run one at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        self.pool: Any = None
        self.streams: dict[torch.device, Any] = {}
        self.gave_up = False

    @staticmethod
    def can_capture(device: torch.device) -> bool:
        return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def run(
        self, slot: Slot, key: tuple, inputs: Tensors, step: Step, device: torch.device, facts: Facts
    ) -> torch.Tensor | None:
        """`step(*inputs)` by a graph, as a fresh tensor; None if the caller must run it eagerly. The key determines the shapes
        and dtypes of the inputs, which may be on the host: `step` gets static buffers on `device` in their place. It reads the
        weights that `facts` describe."""
        with self.lock:
            if self.gave_up:
                return None
            seen, slot.key = slot.key == key, key  # storing the new object makes the next comparison one by identity
            if not seen:
                slot.clear()
                self._drop_stale(*key[:2])
                return None
            if slot.graph is None and not self._capture(slot, inputs, step, device, facts):
                return None
            _fill(slot.inputs, inputs)
            slot.graph.replay()
            return slot.output.clone()

    def _capture(self, slot: Slot, inputs: Tensors, step: Step, device: torch.device, facts: Facts) -> bool:
        # A pool whose last graph was freed must not be captured into again: torch raises while any of its memory is in use.
        if not any(other.graph is not None for other in self.slots):
            self.pool = CapturedStep.new_pool()
        if device not in self.streams:
            self.streams[device] = CapturedStep.new_stream(device)
        graph, held = CapturedStep(device, self.streams[device]), facts.hold()
        try:
            # A graph may be replayed both inside and outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                buffers = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs)
                _fill(buffers, inputs)
                # Nothing may be compiled or initialized during the capture; and steps are idempotent.
                step(*buffers)
                output = graph.capture(lambda: step(*buffers), self.pool)
        except RuntimeError as error:  # OutOfMemoryError is one
            # A genuine error shows again when the step runs eagerly.
            self.gave_up = True
            logger.warning("CUDA graph capture failed (%s): this model runs without CUDA graphs", error)
            return False
        if not facts.still_hold(held):
            facts.fingerprint = None  # no graphs for the rest of this request
            return False
        slot.inputs, slot.output, slot.graph, slot.held = buffers, output, graph, held
        self.slots.add(slot)
        return True

    def _drop_stale(self, part: str, fingerprint: tuple) -> None:
        """Frees graphs that keep weights alive that `part` no longer uses."""
        for slot in self.slots:
            if slot.graph is not None and slot.key[0] == part and slot.key[1] != fingerprint:
                slot.graph.wait()
                slot.clear()

    def clear(self) -> bool:
        """Frees the graphs. Returns whether there were any."""
        with self.lock:
            held = [slot for slot in self.slots if slot.graph is not None]
            for slot in held:
                slot.graph.wait()
                slot.clear()
            self.pool = None
            return bool(held)


def _fill(buffers: Tensors, inputs: Tensors) -> None:
    for buffer, value in zip(buffers, inputs, strict=True):
        buffer.copy_(value, non_blocking=True)
