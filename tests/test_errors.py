"""Bad input: a typed error that names the argument, from the public function; never a crash."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import errors, ops
from resnet_fast.errors import ArgumentError, DTypeError, LibraryError
from resnet_fast.testing import cases

CASE = {
    "conv_bn_act": "3x3_odd",
    "bn_act": "silu_residual",
    "add_act": "relu",
    "bn_act_train": "relu_residual",
}
HALF, META = torch.bfloat16, torch.device("meta")


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# x is [2, 17, 7, 7], weight [19, 17, 3, 3], padding 1, the output [2, 19, 7, 7].
BAD_CONV = {
    "x_not_a_tensor": ("x", {"x": [1.0]}, ArgumentError),
    "x_rank": ("x", {"x": t(17, 7)}, ArgumentError),
    "x_integers": ("x", {"x": t(2, 17, 7, 7, dtype=torch.int32)}, DTypeError),
    "x_complex": ("x", {"x": t(2, 17, 7, 7, dtype=torch.complex64)}, DTypeError),
    "x_sparse": ("x", {"x": t(2, 17, 7, 7).to_sparse()}, ArgumentError),
    "weight_rank": ("weight", {"weight": t(19, 17, 3)}, ArgumentError),
    "weight_dtype": ("weight", {"weight": t(19, 17, 3, 3, dtype=HALF)}, DTypeError),
    "weight_device": ("weight", {"weight": t(19, 17, 3, 3).to(META)}, ArgumentError),
    "weight_none": ("weight", {"weight": None}, ArgumentError),
    "weight_channels": ("weight", {"weight": t(19, 16, 3, 3)}, ArgumentError),
    "weight_empty": ("weight", {"weight": t(0, 17, 3, 3)}, ArgumentError),
    "kernel_empty": ("weight", {"weight": t(19, 17, 0, 3)}, ArgumentError),
    "kernel_too_large": ("weight", {"weight": t(19, 17, 3, 10)}, ArgumentError),
    "dilated_too_large": ("weight", {"dilation": 5}, ArgumentError),
    "scale_length": ("scale", {"scale": t(18)}, ArgumentError),
    "scale_rank": ("scale", {"scale": t(19, 1)}, ArgumentError),
    "scale_dtype": ("scale", {"scale": t(19, dtype=HALF)}, DTypeError),
    "scale_wide": ("scale", {"scale": t(19, dtype=torch.float64)}, DTypeError),
    "scale_device": ("scale", {"scale": t(19).to(META)}, ArgumentError),
    "shift_length": ("shift", {"shift": t(1)}, ArgumentError),
    "shift_dtype": ("shift", {"shift": t(19, dtype=torch.int64)}, DTypeError),
    "residual_shape": ("residual", {"residual": t(2, 19, 7, 6)}, ArgumentError),
    "residual_broadcast": ("residual", {"residual": t(1, 19, 1, 1)}, ArgumentError),
    "residual_rank": ("residual", {"residual": t(2, 19, 49)}, ArgumentError),
    "residual_dtype": ("residual", {"residual": t(2, 19, 7, 7, dtype=HALF)}, DTypeError),
    "residual_device": ("residual", {"residual": t(2, 19, 7, 7).to(META)}, ArgumentError),
    "stride_zero": ("stride", {"stride": 0}, ArgumentError),
    "stride_negative": ("stride", {"stride": (1, -1)}, ArgumentError),
    "stride_count": ("stride", {"stride": (1, 1, 1)}, ArgumentError),
    "stride_float": ("stride", {"stride": 1.5}, ArgumentError),
    "padding_negative": ("padding", {"padding": -1}, ArgumentError),
    "padding_name": ("padding", {"padding": "same"}, ArgumentError),
    "padding_huge": ("padding", {"padding": 2**62}, ArgumentError),
    "dilation_zero": ("dilation", {"dilation": 0}, ArgumentError),
    "groups_zero": ("groups", {"groups": 0}, ArgumentError),
    "groups_negative": ("groups", {"groups": -1}, ArgumentError),
    "groups_of_x": ("groups", {"groups": 3}, ArgumentError),
    "groups_of_weight": ("groups", {"groups": 17, "weight": t(19, 1, 3, 3)}, ArgumentError),
    "act_unknown": ("act", {"act": "mish"}, ArgumentError),
    "act_case": ("act", {"act": "ReLU"}, ArgumentError),
    "act_none": ("act", {"act": None}, ArgumentError),
}
# x and residual are [2, 5, 7, 7].
BAD_BN = {
    "x_rank": ("x", {"x": t(5)}, ArgumentError),
    "x_dtype": ("x", {"x": t(2, 5, 7, 7, dtype=torch.bool)}, DTypeError),
    "scale_length": ("scale", {"scale": t(7)}, ArgumentError),
    "scale_dtype": ("scale", {"scale": t(5, dtype=HALF)}, DTypeError),
    "shift_device": ("shift", {"shift": t(5).to(META)}, ArgumentError),
    "residual_shape": ("residual", {"residual": t(2, 5, 7, 1)}, ArgumentError),
    "residual_dtype": ("residual", {"residual": t(2, 5, 7, 7, dtype=HALF)}, DTypeError),
    "act_unknown": ("act", {"act": "swish"}, ArgumentError),
}
BAD_ADD = {
    "x_dtype": ("x", {"x": t(2, 5, 7, 7, dtype=torch.uint8)}, DTypeError),
    "residual_none": ("residual", {"residual": None}, ArgumentError),
    "residual_shape": ("residual", {"residual": t(2, 5, 7, 8)}, ArgumentError),
    "residual_dtype": ("residual", {"residual": t(2, 5, 7, 7, dtype=HALF)}, DTypeError),
    "residual_device": ("residual", {"residual": t(2, 5, 7, 7).to(META)}, ArgumentError),
    "act_unknown": ("act", {"act": ""}, ArgumentError),
}
# x and residual are [3, 19, 7, 7].
BAD_TRAIN = {
    "x_rank": ("x", {"x": t(19)}, ArgumentError),
    "x_empty": ("x", {"x": t(0, 19, 7, 7), "residual": None}, ArgumentError),
    "x_one_value": ("x", {"x": t(1, 19, 1, 1), "residual": None}, ArgumentError),
    "x_no_channels": (
        "x",
        {"x": t(2, 0, 3), "weight": None, "bias": None, "residual": None},
        ArgumentError,
    ),
    "weight_length": ("weight", {"weight": t(18)}, ArgumentError),
    "weight_dtype": ("weight", {"weight": t(19, dtype=HALF)}, DTypeError),
    "bias_rank": ("bias", {"bias": t(1, 19)}, ArgumentError),
    "residual_shape": ("residual", {"residual": t(3, 19, 7, 6)}, ArgumentError),
    "eps_negative": ("eps", {"eps": -1e-5}, ArgumentError),
    "eps_nan": ("eps", {"eps": float("nan")}, ArgumentError),
    "act_unknown": ("act", {"act": "tanh"}, ArgumentError),
}
BAD = [
    pytest.param(op, *entry, id=f"{op}-{name}")
    for op, table in (
        ("conv_bn_act", BAD_CONV),
        ("bn_act", BAD_BN),
        ("add_act", BAD_ADD),
        ("bn_act_train", BAD_TRAIN),
    )
    for name, entry in table.items()
]


def good(op: str) -> dict[str, Any]:
    return cases.make(cases.case(op, CASE[op]))


@pytest.mark.parametrize("op", ops.OPS)
def test_the_arguments_around_the_bad_one_are_good(op: str) -> None:
    ops.module(op).check(**good(op))


@pytest.mark.parametrize(("op", "argument", "bad", "kind"), BAD)
def test_bad_argument_is_named(
    op: str, argument: str, bad: dict[str, Any], kind: type[ArgumentError]
) -> None:
    with pytest.raises(ArgumentError) as caught:
        getattr(ops, op)(**(good(op) | bad))
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    message = str(caught.value)
    assert message.startswith(f"argument '{argument}': expected ") and ", got " in message
    assert "\n" not in message


@pytest.mark.parametrize(("op", "argument", "bad", "kind"), BAD)
def test_fake_and_call_share_their_checks(
    op: str, argument: str, bad: dict[str, Any], kind: type[ArgumentError]
) -> None:
    """What an eager call refuses, a traced one refuses as well."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kwargs = good(op) | bad
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            key: mode.from_tensor(value)
            if isinstance(value, torch.Tensor) and value.layout == torch.strided
            else value
            for key, value in kwargs.items()
        }
        with pytest.raises(ArgumentError) as caught:
            ops.module(op).check(**fake)
    assert caught.value.argument == argument


def direct(name: str, *args: Any) -> Callable[[], Any]:
    return lambda: getattr(torch.ops.resnet_fast, name)(*args)


def conv(**changes: Any) -> Callable[[], Any]:
    kwargs = {
        "x": t(2, 4, 5, 5),
        "weight": t(6, 4, 3, 3),
        "scale": t(6),
        "shift": t(6),
        "residual": t(2, 6, 5, 5),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "act": "relu",
    } | changes
    return direct("conv_bn_act", *kwargs.values())


X = t(2, 4, 5, 5)
HOSTILE = {
    "conv-weight_rank": conv(weight=t(6, 4, 3)),
    "conv-weight_channels": conv(weight=t(6, 5, 3, 3)),
    "conv-weight_empty": conv(weight=t(0, 4, 3, 3)),
    "conv-weight_dtype": conv(weight=t(6, 4, 3, 3, dtype=torch.float64)),
    "conv-x_rank": conv(x=t(4)),
    "conv-x_scalar": conv(x=t()),
    "conv-x_rank6": conv(x=t(2, 4, 5, 5, 5, 5), weight=t(6, 4, 3, 3, 3, 3)),
    "conv-x_dtype": conv(x=t(2, 4, 5, 5, dtype=torch.int64)),
    "conv-scale_short": conv(scale=t(5)),
    "conv-scale_rank": conv(scale=t(6, 6)),
    "conv-scale_dtype": conv(scale=t(6, dtype=HALF)),
    "conv-shift_short": conv(shift=t(0)),
    "conv-shift_dtype": conv(shift=t(6, dtype=torch.float64)),
    "conv-residual_small": conv(residual=t(2, 6, 5, 4)),
    "conv-residual_rank": conv(residual=t(6)),
    "conv-residual_dtype": conv(residual=t(2, 6, 5, 5, dtype=HALF)),
    "conv-stride_zero": conv(stride=[0, 1]),
    "conv-stride_negative": conv(stride=[-1, 1]),
    "conv-stride_count": conv(stride=[1]),
    "conv-stride_none": conv(stride=[]),
    "conv-padding_negative": conv(padding=[-1, 1]),
    "conv-padding_count": conv(padding=[1, 1, 1]),
    "conv-padding_overflow": conv(padding=[2**62, 2**62]),
    "conv-dilation_zero": conv(dilation=[0, 1]),
    "conv-dilation_overflow": conv(dilation=[2**62, 2**62]),
    "conv-kernel_too_large": conv(weight=t(6, 4, 9, 9)),
    "conv-groups_zero": conv(groups=0),
    "conv-groups_negative": conv(groups=-2),
    "conv-groups_indivisible": conv(groups=3),
    "conv-groups_of_weight": conv(groups=4, weight=t(6, 1, 3, 3)),
    "conv-act": conv(act="nothing"),
    "conv-act_empty": conv(act=""),
    "bn-scale_short": direct("bn_act", X, t(3), t(4), None, "relu"),
    "bn-shift_dtype": direct("bn_act", X, t(4), t(4, dtype=HALF), None, "relu"),
    "bn-residual_small": direct("bn_act", X, t(4), t(4), t(2, 4, 5, 4), "relu"),
    "bn-x_rank": direct("bn_act", t(4), t(4), t(4), None, "relu"),
    "bn-x_dtype": direct("bn_act", X.int(), None, None, None, "relu"),
    "bn-act": direct("bn_act", X, t(4), t(4), None, "RELU"),
    "add-residual_small": direct("add_act", X, t(2, 4, 5, 4), "relu"),
    "add-residual_dtype": direct("add_act", X, X.double(), "relu"),
    "add-x_dtype": direct("add_act", X.int(), X.int(), "relu"),
    "add-act": direct("add_act", X, X, "?"),
    "add_backward-grad_small": direct("_add_act_backward", t(2, 4, 5, 4), X, X, "relu"),
    "add_backward-residual_small": direct("_add_act_backward", X, X, t(1), "relu"),
    "add_backward-grad_dtype": direct("_add_act_backward", X.double(), X, X, "relu"),
    "train-weight_short": direct("bn_act_train", X, t(3), t(4), None, 1e-5, "relu"),
    "train-bias_dtype": direct("bn_act_train", X, t(4), t(4).double(), None, 1e-5, "relu"),
    "train-residual_small": direct("bn_act_train", X, None, None, t(2, 4, 5, 4), 1e-5, "relu"),
    "train-empty": direct("bn_act_train", t(0, 4, 5, 5), None, None, None, 1e-5, "relu"),
    "train-one_value": direct("bn_act_train", t(1, 4), None, None, None, 1e-5, "relu"),
    "train-x_rank": direct("bn_act_train", t(4), None, None, None, 1e-5, "relu"),
    "train-act": direct("bn_act_train", X, None, None, None, 1e-5, "elu"),
    "train_backward-grad_small": direct(
        "_bn_act_train_backward", t(2, 4, 5, 4), X, t(4), t(4), None, t(4), t(4), "relu"
    ),
    "train_backward-mean_short": direct(
        "_bn_act_train_backward", X, X, t(4), t(4), None, t(3), t(4), "relu"
    ),
    "train_backward-rstd_short": direct(
        "_bn_act_train_backward", X, X, t(4), t(4), None, t(4), t(1), "relu"
    ),
    "train_backward-weight_short": direct(
        "_bn_act_train_backward", X, X, t(1), t(4), None, t(4), t(4), "relu"
    ),
    "train_backward-residual_small": direct(
        "_bn_act_train_backward", X, X, t(4), t(4), t(2, 4), t(4), t(4), "relu"
    ),
}


@pytest.mark.parametrize("call", HOSTILE.values(), ids=HOSTILE.keys())
def test_native_ops_guard_themselves(call: Callable[[], Any]) -> None:
    """Without the checks in front, the library itself refuses: it never reads out of bounds."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    assert not isinstance(caught.value, NotImplementedError)


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["weight", "scale", "residual"])
def test_cpu_beside_cuda(argument: str) -> None:
    kwargs = good("conv_bn_act")
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    moved[argument] = kwargs[argument]
    with pytest.raises(ArgumentError) as caught:
        ops.conv_bn_act(**moved)
    assert caught.value.argument == argument
    with pytest.raises(RuntimeError):
        torch.ops.resnet_fast.add_act(kwargs["x"].cuda(), kwargs["x"], "relu")


def test_every_error_survives_copy_and_pickle() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ResNetFastError):
            args = ("x", "a", "b") if issubclass(kind, ArgumentError) else ("reason",)
            error = kind(*args)
            for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
                assert type(twin) is kind and str(twin) == str(error)


def test_errors_are_the_builtin_kinds_too() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(DTypeError, TypeError)
    assert issubclass(LibraryError, RuntimeError)


def test_without_the_library_import_works_and_ops_say_why(tmp_path: Path) -> None:
    """A copy of the package without its shared objects."""
    import shutil

    package = Path(ops.__file__).parents[1]
    shutil.copytree(
        package,
        tmp_path / "resnet_fast",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    script = (
        "import torch, resnet_fast\n"
        "from resnet_fast import ops\n"
        "x = torch.randn(2, 3, 4, 4)\n"
        "w = torch.randn(5, 3, 1, 1)\n"
        "calls = [lambda: ops.conv_bn_act(x, w), lambda: ops.bn_act(x),\n"
        "         lambda: ops.add_act(x, x), lambda: ops.bn_act_train(x)]\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "    except resnet_fast.errors.LibraryError as error:\n"
        "        print(error)\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 4 and all("not built" in line and "pip install" in line for line in lines)
