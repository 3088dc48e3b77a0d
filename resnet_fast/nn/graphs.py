"""A network's whole forward as a CUDA graph: recorded once for a kind of input, then replayed.

Launched layer by layer from Python a ResNet-50 keeps a GPU waiting, at one image for nine tenths of
the time (docs/cuda.md). A replay is one launch. It reads its input from the place where it was
recorded and writes its result there, so that each call copies the one in and the other out.

What is recorded holds as long as the modules, their parameters, hooks and modes are what they were;
all of that is compared at each call, and a change has the forward recorded again. What Python
decides in ``forward`` beyond that is taken as it was then.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_fast import _library
from resnet_fast.nn.guarded import guard_of, is_capturing
from resnet_fast.nn.prepared import is_autocasting, is_transforming
from resnet_fast.nn.sequence import global_hooks
from resnet_fast.ops import _pack
from resnet_fast.plan import binding as _binding

# Kinds of input that a network remembers: each holds its activations' memory.
_KINDS = 8
# Unrecorded calls before a recording: in the first every site, chain and library algorithm is
# chosen by measuring, which a recording forbids.
_WARM = 3

Forward = Callable[..., Any]


class CudaRecorder:
    """Records and replays on CUDA; the recordings of one network share their memory."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._last: Any = None

    def record(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        """The recording of ``run`` as a call, and where its results will be."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = self._pools.get(device)
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = run()
            self._pools[device] = graph.pool()
        return graph.replay, result

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """What is launched within comes after what was launched in the turn before, whatever the
        streams."""
        with torch.cuda.device(device):
            if self._last is not None:
                self._last.wait()
            yield
            self._last = torch.cuda.current_stream().record_event()

    def finish(self) -> None:
        """Return when everything launched has run: memory of a recording is about to go."""
        if self._last is not None:
            self._last.synchronize()


@dataclass
class _Recorded:
    """One recording, or why there is none."""

    guard: Any
    generation: int
    epoch: int
    inputs: list[Tensor]
    replay: Callable[[], None] | None = None
    result: Any = None
    reason: str = ""

    def holds(self) -> bool:
        return (
            self.generation == _binding.generation()
            and self.epoch == _pack.epoch()
            and self.guard.holds()
        )


class Replays:
    """The recordings of one network, by kind of input. Copies and pickles start empty.

    Args:
        recorder: how to record; :class:`CudaRecorder` for None.
    """

    def __init__(self, recorder: Any = None) -> None:
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._known: dict[Any, _Recorded] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def lines(self) -> Iterator[str]:
        """What was recorded, and what could not be, for ``explain()``."""
        for recorded in list(self._known.values()):
            sizes = ", ".join("x".join(map(str, t.shape)) for t in recorded.inputs)
            if recorded.reason:
                yield f"the forward of {sizes} is no CUDA graph: {recorded.reason}"
            elif recorded.holds():
                yield f"the forward of {sizes} runs as one CUDA graph"

    def __call__(
        self, model: nn.Module, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """``forward(*args, **kwargs)``, which is ``model``'s, from a recording where one may be."""
        key = self._key(model, args, kwargs)
        if key is None:
            return forward(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with self._lock:
            recorded = self._known.get(key)
            if recorded is None or not recorded.holds():
                recorded = self._record(key, model, forward, args, kwargs)
            if recorded is not None and recorded.replay is not None:
                with self._recorder.turn(given[0].device):
                    for place, value in zip(recorded.inputs, given, strict=True):
                        place.copy_(value)
                    recorded.replay()
                    return tree_map_only(Tensor, torch.clone, recorded.result)
        return forward(*args, **kwargs)

    def _key(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The kind of the input, or None for a call whose meaning a recording would not have."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or model.training
            or torch.jit.is_tracing()
            or is_transforming()
            or _binding.tuning() is not None
            or _binding.grouping() is not None
            or torch.onnx.is_in_onnx_export()
            or global_hooks()
        ):
            return None
        device: torch.device | None = None
        kinds: list[Any] = []
        for name, value in (*enumerate(args), *kwargs.items()):
            if type(value) is Tensor:
                device = value.device if device is None else device
                if value.device != device:
                    return None
                kinds.append((name, value.shape, value.stride(), value.dtype))
            elif value is None or type(value) in (bool, int, float, str):
                kinds.append((name, value))
            else:
                return None
        if device is None or device.type != self._recorder.device_type:
            return None
        given = [value for value in (*args, *kwargs.values()) if type(value) is Tensor]
        if is_autocasting(device) or any(map(is_capturing, given)):
            return None
        return device, tuple(kinds)

    def _record(
        self,
        key: Any,
        model: nn.Module,
        forward: Forward,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> _Recorded | None:
        """Record and remember; None where the modules are of a kind that nothing can watch."""
        if self._known.pop(key, None) is not None or len(self._known) >= _KINDS:
            # A recording goes: nothing of it may be under way.
            self._recorder.finish()
        while len(self._known) >= _KINDS:
            self._known.pop(next(iter(self._known)))
        tensors = itertools.chain(model.parameters(), model.buffers())
        if _library.native() is None or any(t.is_inference() for t in tensors):
            return None  # inference tensors have no version to compare
        guard = guard_of(model)
        for module in model.modules():
            guard.same(module.__dict__, "training", False)
        if not guard.holds():  # hooks, a forward of an instance's own, a part in train()
            return None
        with torch.inference_mode(False), torch.no_grad():

            def own(value: Any) -> Any:
                return value.clone() if isinstance(value, Tensor) else value

            places = [own(value) for value in args]
            named = {name: own(value) for name, value in kwargs.items()}
            inputs = [v for v in (*places, *named.values()) if isinstance(v, Tensor)]
            state = (_binding.generation(), _pack.epoch())
            recorded = _Recorded(guard, *state, inputs)
            try:
                replay, result = self._recorder.record(
                    lambda: forward(*places, **named), inputs[0].device
                )
            except RuntimeError as failure:
                recorded.reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            else:
                leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                if any(leaf.device != inputs[0].device for leaf in leaves):
                    recorded.reason = "it returns tensors of another device"
                else:
                    recorded.replay, recorded.result = replay, result
        if recorded.reason:
            warnings.warn(
                f"resnet_fast: the forward cannot be a CUDA graph: {recorded.reason}",
                stacklevel=4,
            )
        self._known[key] = recorded
        return recorded
