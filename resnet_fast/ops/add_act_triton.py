"""``add_act`` and its backward by the Triton kernels of ``kernels/add_act.py``."""

from __future__ import annotations

from resnet_fast.ops._triton import implement, register

register(
    "_add_act_triton",
    "(Tensor x, Tensor residual, str act) -> Tensor",
    "add_act",
    "launch_add_act",
    ("add_act_kernel",),
)
register(
    "_add_act_backward_triton",
    "(Tensor grad_y, Tensor x, Tensor residual, str act) -> Tensor",
    "add_act",
    "launch_add_act_backward",
    ("add_act_backward_kernel",),
)
implement("add_act", "add_act", "launch_add_act", "torch.add")
implement("_add_act_backward", "add_act", "launch_add_act_backward", "torch.add")
