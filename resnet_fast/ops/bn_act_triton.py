"""``bn_act`` by the Triton kernel of ``kernels/bn_act.py``."""

from __future__ import annotations

from resnet_fast.ops._triton import implement, register

register(
    "_bn_act_triton",
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, str act) -> Tensor",
    "bn_act",
    "launch_bn_act",
    ("bn_act_kernel",),
)
implement("bn_act", "bn_act", "launch_bn_act", "torch.nn.functional.batch_norm")
