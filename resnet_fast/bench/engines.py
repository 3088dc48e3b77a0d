"""The engines that a benchmark compares. Each runs alone in a worker process.

An engine is a function ``(Job) -> Callable[[], object]``: it prepares the network once and
returns a call that runs it once on the job's input. ``to_tensor`` turns the call's result into
a CPU tensor. Weights and input are the same for all.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fast import verify
from resnet_fast.bench import int8


class Unavailable(Exception):
    """The engine cannot run here; the message says why in plain words."""


@dataclass(frozen=True)
class Job:
    """What to run: a network, its weights and input, and the machine's share it may use.

    With ``dtype`` int8 weights and input are fp32: the engine quantises the network by itself.
    """

    model: str
    dtype: str
    device: str
    threads: int
    state: dict[str, torch.Tensor]
    x: torch.Tensor

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of weights and input."""
        return torch.float32 if self.int8 else verify.dtype_from_name(self.dtype)

    @property
    def int8(self) -> bool:
        """Whether the network is to run on 8 bits."""
        return self.dtype == "int8"

    def reference(self) -> torch.nn.Module:
        """The reference network holding the job's weights, in fp32 on the CPU."""
        model, _ = verify.build_reference(self.model)
        model.load_state_dict(self.state)
        return model.eval()


Call = Callable[[], object]


def _inference(model: torch.nn.Module, x: torch.Tensor) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def _no_grad(model: Callable[[torch.Tensor], object], x: torch.Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(x)

    return call


def _channels_last(job: Job, model: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor]:
    x = job.x.to(job.device).contiguous(memory_format=torch.channels_last)
    model = model.to(job.device, job.torch_dtype)
    return model.to(memory_format=torch.channels_last), x  # type: ignore[call-overload]


def _graphed(call: Call) -> Call:
    """Record ``call`` in a CUDA graph after three warm-up runs on a side stream.

    The graph reads the network's weights and its input wherever they were: the replay keeps
    ``call``, and with it the memory, for as long as it can be called.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay(_kept: Call = call) -> object:
        graph.replay()
        return output

    return replay


def _need_cuda(job: Job) -> None:
    if job.device != "cuda":
        raise Unavailable("runs on CUDA only")


def _need_float(job: Job) -> None:
    if job.int8:
        raise Unavailable("does not quantise the network")


def _need(module: str, pip_name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"not installed (pip install {pip_name})")


def _ours_model(job: Job) -> tuple[torch.nn.Module, torch.Tensor]:
    x = job.x.to(job.device)
    if job.int8:
        from resnet_fast import accelerate

        return accelerate(job.reference(), dtype="int8", calibration=int8.calibration(job)), x
    if job.model not in verify.model_names():
        from resnet_fast import accelerate

        return accelerate(job.reference().to(job.device, job.torch_dtype), x), x
    model = verify.build_model(job.model)
    model.load_state_dict(job.state)
    return model.to(job.device, job.torch_dtype), x


def resnet_fast(job: Job) -> Call:
    """This package's network as a user first meets it: default plan, NCHW input.

    Where it has none of that name, and on 8 bits, the reference through ``accelerate()``.
    """
    return _inference(*_ours_model(job))


def resnet_fast_tuned(job: Job) -> Call:
    """This package's network with a plan tuned for the job's input."""
    from resnet_fast import plan

    if job.int8:
        raise Unavailable("no plan chooses among 8-bit kernels")
    model, x = _ours_model(job)
    plan.set_plan(plan.tune(model, x))
    return _inference(model, x)


def resnet_fast_graph(job: Job) -> Call:
    """``resnet_fast_tuned`` replayed from a CUDA graph."""
    _need_cuda(job)
    return _graphed(resnet_fast_tuned(job))


def resnet_fast_layers(job: Job) -> Call:
    """``resnet_fast_graph``, every layer by itself: what kernels of several layers are worth."""
    from resnet_fast import plan

    _need_cuda(job)
    model, x = _ours_model(job)
    model.chains = None  # type: ignore[assignment]
    plan.set_plan(plan.tune(model, x))
    return _graphed(_inference(model, x))


def eager(job: Job) -> Call:
    """The reference network as torch runs it by default: eager, NCHW.

    In fp32 where the others run on 8 bits: what they are compared with.
    """
    model = job.reference().to(job.device, job.torch_dtype)
    return _inference(model, job.x.to(job.device))


def eager_nhwc(job: Job) -> Call:
    """The reference network, eager, channels-last."""
    _need_float(job)
    return _inference(*_channels_last(job, job.reference()))


def eager_graph(job: Job) -> Call:
    """``eager_nhwc`` replayed from a CUDA graph."""
    _need_cuda(job)
    return _graphed(eager_nhwc(job))


def _compiled(job: Job, **options: Any) -> Call:
    _need_float(job)
    import torch._inductor.config as inductor

    inductor.freezing = True
    model, x = _channels_last(job, job.reference())
    # dynamic=False: a second batch size in one process must not get a slower, general kernel.
    return _no_grad(torch.compile(model, dynamic=False, **options), x)


def compile(job: Job) -> Call:
    """``torch.compile`` with inductor's weight freezing, channels-last."""
    return _compiled(job)


def compile_max(job: Job) -> Call:
    """``torch.compile(mode="max-autotune")`` with weight freezing, channels-last."""
    return _compiled(job, mode="max-autotune")


def onnxruntime(job: Job) -> Call:
    """ONNX Runtime's CPU provider on the exported network."""
    _need("onnxruntime", "onnxruntime")
    _need("onnx", "onnx")
    if job.device != "cpu":
        raise Unavailable("compared on CPU only")
    if job.dtype == "bf16":
        raise Unavailable("no bf16 convolution in the CPU provider")
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        if job.int8:
            path = int8.onnx_model(job, folder)
        else:
            path = str(Path(folder) / "model.onnx")
            model = job.reference().to(job.torch_dtype)
            torch.onnx.export(model, (job.x,), path, dynamo=False, input_names=["x"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"x": job.x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(job: Job) -> Call:
    """OpenVINO's CPU plugin on the converted network, latency hint, one stream."""
    _need("openvino", "openvino")
    if job.device != "cpu":
        raise Unavailable("compared on CPU only")
    import openvino as ov

    # The plugin lowers fp32 to bf16 by itself where the CPU has it; the precision is pinned so
    # that every engine computes in the dtype that its row names.
    precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}[job.dtype]
    x = job.x.float()
    if job.int8:
        _need("nncf", "nncf")
        model = int8.openvino_model(job)
    else:
        model = ov.convert_model(job.reference(), example_input=x, input=list(x.shape))
    core = ov.Core()
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    used = compiled.get_property("INFERENCE_PRECISION_HINT")
    used_name = used.get_type_name() if hasattr(used, "get_type_name") else str(used)
    if used_name not in (precision, {"f32": "float32", "bf16": "bfloat16"}.get(precision)):
        raise Unavailable(f"the CPU plugin computes in {used_name} here, not {precision}")
    request = compiled.create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


class CudnnFused:
    """A ResNet run with cuDNN's own fused convolutions, BatchNorm folded in fp32.

    Walks torchvision's module names (``conv1 .. layer4 .. fc``), so it serves every network
    with them. ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu`` are torch's calls;
    a projection shortcut has no ReLU and is a plain convolution with a bias.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.model: Any = model
        self.dtype = dtype
        self.folded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _fold(self, conv: Any, bn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if id(conv) not in self.folded:
            scale = bn.weight.float() * torch.rsqrt(bn.running_var.float() + bn.eps)
            weight = conv.weight.float() * scale.view(-1, 1, 1, 1)
            shift = bn.bias.float() - bn.running_mean.float() * scale
            self.folded[id(conv)] = (
                weight.to(self.dtype).contiguous(memory_format=torch.channels_last),
                shift.to(self.dtype),
            )
        return self.folded[id(conv)]

    def _conv_relu(self, x: torch.Tensor, conv: Any, bn: Any) -> torch.Tensor:
        weight, bias = self._fold(conv, bn)
        return torch.cudnn_convolution_relu(
            x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def _block(self, x: torch.Tensor, block: Any) -> torch.Tensor:
        shortcut = x
        if block.downsample is not None:
            conv, bn = block.downsample
            weight, bias = self._fold(conv, bn)
            shortcut = torch.nn.functional.conv2d(
                x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
            )
        last = 3 if hasattr(block, "conv3") else 2
        for index in range(1, last):
            x = self._conv_relu(x, getattr(block, f"conv{index}"), getattr(block, f"bn{index}"))
        conv, bn = getattr(block, f"conv{last}"), getattr(block, f"bn{last}")
        weight, bias = self._fold(conv, bn)
        return torch.cudnn_convolution_add_relu(
            x, weight, shortcut, 1.0, bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network on a channels-last input."""
        model = self.model
        x = model.maxpool(self._conv_relu(x, model.conv1, model.bn1))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                x = self._block(x, block)
        return model.fc(model.avgpool(x).flatten(1))


def cudnn_fused(job: Job) -> Call:
    """cuDNN's fused convolutions (``CudnnFused``) replayed from a CUDA graph."""
    _need_cuda(job)
    model, x = _channels_last(job, job.reference())
    if not all(hasattr(model, name) for name in ("maxpool", "layer4", "avgpool")):
        raise Unavailable("serves ImageNet ResNets only")
    return _graphed(_no_grad(CudnnFused(model, job.torch_dtype), x))


ENGINES: dict[str, Callable[[Job], Call]] = {
    engine.__name__: engine
    for engine in (
        resnet_fast,
        resnet_fast_tuned,
        resnet_fast_graph,
        resnet_fast_layers,
        eager,
        eager_nhwc,
        eager_graph,
        compile,
        compile_max,
        onnxruntime,
        openvino,
        cudnn_fused,
    )
}
OURS = ("resnet_fast", "resnet_fast_tuned", "resnet_fast_graph", "resnet_fast_layers")
PEERS = tuple(name for name in ENGINES if name not in OURS)


def to_tensor(output: object) -> torch.Tensor:
    """Copy an engine's output into a CPU tensor."""
    if isinstance(output, torch.Tensor):
        return output.detach().cpu().clone()
    return torch.from_numpy(output.copy())  # type: ignore[attr-defined]
