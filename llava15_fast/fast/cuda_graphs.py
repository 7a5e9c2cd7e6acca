"""CUDA graphs: one launch for a whole forward pass instead of several hundred.

A graph remembers addresses: of weights, of what it writes to, of its inputs and output. So

- inputs are copied into buffers of the graph, and its output is copied out, for callers keep what they are given;
- a step is captured when it comes for the second time, into the `Slot` that its owner keeps for it (KV buffers one for the
  decode step on them, the vision tower one for each of the last sizes), and replayed as long as it comes with the same key;
- the key holds every address and number that a capture fixes, and the tensors behind them stay alive with the graph;
- a capture during which another thread has moved a weight is not used.

Graphs of one model replay on one stream at a time. Settings of torch's own arithmetic, TF32 say, are those of the capture.
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
"""A stream captures one graph at a time, and so, in torch 2.11, does a random generator."""


class CapturedStep:
    """`capture` records what a function launches on a device, `replay` launches it again.

    `torch.cuda.graph` is not for this: it captures on one stream for all devices, so that nothing of a model on another than
    the first would be recorded, and an error leaves the caller on that stream.

    Args:
        stream: to capture on. Graphs that share one have to share a pool: torch gives matrix products a workspace for each
            stream, takes it from the pool that is captured into first, and frees it with any graph of that stream
            (pytorch#193402), while the others still write to it.
    """

    new_pool = staticmethod(torch.cuda.graph_pool_handle)
    new_stream = staticmethod(torch.cuda.Stream)

    def __init__(self, device: torch.device, stream: Any) -> None:
        self.device, self.stream = device, stream
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], torch.Tensor], pool: Any) -> torch.Tensor:
        with _capturing, torch.cuda.device(self.device), torch.cuda.stream(self.stream), contextlib.ExitStack() as after:
            # What Python collects may unload a module of kernels, which no capture survives.
            after.callback(gc.enable if gc.isenabled() else gc.disable)
            gc.disable()
            # While capturing, memory that others have left cannot be reclaimed; and a graph that was dropped may still run.
            self.wait()
            torch.cuda.empty_cache()
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = step()
            except BaseException:
                # Ends with an error of its own, where the first one has spoilt the capture.
                with contextlib.suppress(RuntimeError):
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
            return output

    def replay(self) -> None:
        self.graph.replay()

    def wait(self) -> None:
        """Until no replay runs any more: memory that can be unmapped is taken away from one that does."""
        torch.cuda.synchronize(self.device)


class Slot:
    """The place of one recurring step: nothing, its key when it was seen once, or its graph.

    `key` is what must be as it was: the part of the model, where its weights lie (`Facts.fingerprint`), and more. `inputs` and
    `output` are at fixed addresses; the weights that the graph reads are `held`, so that nothing else comes to lie there.
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
    """Captures and replays the graphs of one model, all in one pool of memory and so one at a time."""

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
        """`step(*inputs)` by a graph, a tensor of its own; None where it is to run without. Inputs, of shapes and dtypes that
        the key stands for, may be on the host: `step` is given buffers on `device` in their place. It reads the weights that
        `facts` are about."""
        with self.lock:
            if self.gave_up:
                return None
            seen, slot.key = slot.key == key, key  # compared by identity from now on, as long as it is the same
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
        # A pool whose last graph is gone must not be captured into again: torch raises, as long as something in it lives.
        if not any(other.graph is not None for other in self.slots):
            self.pool = CapturedStep.new_pool()
        if device not in self.streams:
            self.streams[device] = CapturedStep.new_stream(device)
        graph, held = CapturedStep(device, self.streams[device]), facts.hold()
        try:
            # What is captured may be replayed in and out of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                buffers = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs)
                _fill(buffers, inputs)
                # Nothing may be compiled or set up while capturing; and a step can be repeated.
                step(*buffers)
                output = graph.capture(lambda: step(*buffers), self.pool)
        except RuntimeError as error:  # out of memory is one
            # Whatever it was, running without says it better, or does without.
            self.gave_up = True
            logger.warning("a CUDA graph could not be captured (%s): this model runs without", error)
            return False
        if not facts.still_hold(held):
            facts.fingerprint = None  # this request goes on without
            return False
        slot.inputs, slot.output, slot.graph, slot.held = buffers, output, graph, held
        self.slots.add(slot)
        return True

    def _drop_stale(self, part: str, fingerprint: tuple) -> None:
        """Graphs that keep weights alive which `part` has left."""
        for slot in self.slots:
            if slot.graph is not None and slot.key[0] == part and slot.key[1] != fingerprint:
                slot.graph.wait()
                slot.clear()

    def clear(self) -> bool:
        """Frees the graphs; whether there were any."""
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
