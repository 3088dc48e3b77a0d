"""The ops: one file a contract (checks, reference, fake, autograd, public function)."""

from __future__ import annotations

import importlib
from types import ModuleType

from resnet_fast import _library

# Before the op modules: they register their fakes and gradients on what the library defines.
_library.load()

from resnet_fast.ops.add_act import add_act  # noqa: E402
from resnet_fast.ops.bn_act import bn_act  # noqa: E402
from resnet_fast.ops.bn_act_train import bn_act_train  # noqa: E402
from resnet_fast.ops.conv_bn_act import conv_bn_act  # noqa: E402
from resnet_fast.ops.conv_stats import conv_stats  # noqa: E402
from resnet_fast.ops.norm_act import norm_act  # noqa: E402
from resnet_fast.ops.residual_chain import residual_chain  # noqa: E402
from resnet_fast.ops.stem_pool import stem_pool  # noqa: E402

# Other registrations, where their library or Triton is: a saved graph may call them by name.
from resnet_fast.ops import (  # noqa: E402, F401  # isort: skip
    _max_pool,
    add_act_triton,
    bn_act_triton,
    conv_bn_act_cuda,
    conv_bn_act_triton,
    stem_pool_cuda,
)

OPS = ("conv_bn_act", "bn_act", "add_act", "bn_act_train")
# Ops that stand for several layers: a kernel of their own on CUDA, elsewhere the layers' ops.
FUSED = ("residual_chain", "stem_pool")
# Ops of training that have kernels on CUDA, and elsewhere the layers' ops.
TRAINING = ("conv_stats", "norm_act")

__all__ = [
    "FUSED",
    "OPS",
    "TRAINING",
    "add_act",
    "bn_act",
    "bn_act_train",
    "conv_bn_act",
    "conv_stats",
    "module",
    "norm_act",
    "residual_chain",
    "stem_pool",
]


def module(op: str) -> ModuleType:
    """The module that holds the contract of ``op``; the attribute of that name is its function."""
    return importlib.import_module(f"{__name__}.{op}")
