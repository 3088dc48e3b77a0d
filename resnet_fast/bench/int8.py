"""Networks on 8 bits for the engines that take them: quantised after training, on the same images.

Activations are unsigned and have one scale a tensor, weights are signed and have one a filter,
as this package has them: what the peers' CPU kernels are fastest at.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from resnet_fast.bench.engines import Job

_BATCHES, _IMAGES = 4, 4


def calibration(job: Job) -> list[torch.Tensor]:
    """Batches drawn as the job's input was, of its size: other images, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    shape = (_IMAGES, *job.x.shape[1:])
    return [torch.randn(shape, generator=generator) for _ in range(_BATCHES)]


def onnx_model(job: Job, folder: str) -> str:
    """The path of the job's network as ONNX Runtime quantises it."""
    return quantized_onnx(job.reference(), calibration(job), folder)


def quantized_onnx(model: torch.nn.Module, batches: list[torch.Tensor], folder: str) -> str:
    """The path, in ``folder``, of ``model`` as ONNX Runtime quantises it on ``batches``.

    Static, QDQ, each filter apart; the input is called ``x``, of any batch.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    raw, inferred, done = (str(Path(folder) / f"{name}.onnx") for name in ("raw", "inferred", "q"))
    torch.onnx.export(
        model,
        (batches[0],),
        raw,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
    )
    quant_pre_process(raw, inferred)
    quantize_static(
        inferred,
        done,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return done


def openvino_model(job: Job) -> Any:
    """The network as NNCF quantises it for OpenVINO, at the job's batch."""
    import nncf
    import openvino as ov

    shape = list(job.x.shape)
    model = ov.convert_model(job.reference(), example_input=job.x, input=[-1, *shape[1:]])
    data = nncf.Dataset(calibration(job), lambda batch: batch.numpy())
    quantised = nncf.quantize(model, data, subset_size=_BATCHES)
    quantised.reshape(shape)
    return quantised
