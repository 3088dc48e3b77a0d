"""``conv_bn_act`` by the Triton kernels of ``kernels/conv_bn_act.py``."""

from __future__ import annotations

from resnet_fast.ops._triton import implement, register

register(
    "_conv_bn_act_triton",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, "
    "int[] padding, int[] dilation, int groups, str act) -> Tensor",
    "conv_bn_act",
    "launch_conv_bn_act",
    ("conv_kernel", "gemm_kernel"),
)
implement("conv_bn_act", "conv_bn_act", "launch_conv_bn_act", "torch.nn.functional.conv2d")
