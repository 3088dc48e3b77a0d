"""Weights: torchvision's enums, files, and the digits network that this package ships."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import WeightsError

SHIPPED = Path(__file__).resolve().parent.parent / "weights"


def resolve(name: str, weights: Any) -> Any:
    """The member of torchvision's weights enum for the network ``name``, or None for None.

    ``weights`` is such a member or a string: "DEFAULT", "IMAGENET1K_V2" or
    "ResNet50_Weights.IMAGENET1K_V2". Raises ``WeightsError`` if torchvision is missing or
    ``weights`` is not one of this network's.
    """
    if weights is None:
        return None
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise WeightsError(
            f"argument 'weights': {weights!r} needs torchvision, which does not import ({error});"
            " install the release that goes with this torch, or load a file with"
            " resnet_fast.models.load_weights(path, model)"
        ) from error
    enum = get_model_weights(name)
    if isinstance(weights, enum):
        return weights
    if isinstance(weights, str):
        member = enum.__members__.get(weights.removeprefix(f"{enum.__name__}."))
        if member is not None:
            return member
    known = ", ".join(enum.__members__)
    raise WeightsError(
        f"argument 'weights': expected None or one of {enum.__name__} ({known}), got {weights!r}"
    )


def load_into(model: nn.Module, state: Mapping[str, Any], source: str = "state dict") -> None:
    """Copies ``state`` into ``model`` after all of it was found to fit: all or nothing.

    Raises ``WeightsError`` naming the missing, the unexpected and the misshapen entries. A
    missing ``num_batches_tracked`` (files older than torch 0.4.1) leaves the model's own.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misfits = []
    for k, mine in own.items():
        value = state.get(k)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            misfits.append(f"{k} is a {type(value).__name__}, not a tensor")
        elif value.layout is not torch.strided:
            misfits.append(f"{k} is {value.layout}, not dense")
        elif value.is_meta and not mine.is_meta:
            misfits.append(f"{k} is a meta tensor, without values")
        elif value.shape != mine.shape:
            misfits.append(f"{k} has shape {tuple(value.shape)}, not {tuple(mine.shape)}")
        elif value.is_floating_point() != mine.is_floating_point() or value.is_complex():
            misfits.append(f"{k} has dtype {value.dtype}, not {mine.dtype}")
    problems = [
        f"{label}: {', '.join(map(str, items[:5]))}" + (", ..." if len(items) > 5 else "")
        for label, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misfitting", misfits),
        )
        if items
    ]
    if problems:
        raise WeightsError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    # load_state_dict and not copy_: it runs the model's own load hooks.
    model.load_state_dict({**own, **state})


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``torch.save`` file of tensors only.

    Nothing in a file is executed: ``torch.load`` runs with ``weights_only=True``. A dict with the
    single tensor mapping under "state_dict" or "model" is unwrapped. Raises ``WeightsError``
    naming the path for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"argument 'path': expected a weight file, got {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"argument 'path': expected a file of tensors only (weights_only=True), got {path}:"
            f" {_first_line(error)}"
        ) from error
    except Exception as error:  # zip, struct, safetensors and OS errors share no base
        raise WeightsError(
            f"argument 'path': expected a readable weight file, got {path}: {_first_line(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise WeightsError(
            f"argument 'path': expected a file that maps names to tensors, got {path} with a"
            f" {type(state).__name__}"
        )
    return dict(state)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_weights(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Reads a weight file (see ``read``) and, given ``model``, copies it in, all or nothing.

    Returns the tensors by name. Raises ``WeightsError``; the model is then as it was.
    """
    state = read(path)
    if model is not None:
        load_into(model, state, str(path))
    return state


def digits_resnet20() -> nn.Module:
    """The ResNet-20 for 1x32x32 handwritten digits that the package ships, in eval.

    Its inputs are those of ``resnet_fast.data.digits``. Raises ``WeightsError`` if the file is
    missing or its sha256 is not the recorded one.
    """
    from resnet_fast.models.cifar import cifar_resnet20

    record_path = SHIPPED / "digits_resnet20.json"
    try:
        record = json.loads(record_path.read_text())
        path, expected = SHIPPED / record["file"], record["sha256"]
        got = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"shipped weights are incomplete: {record_path}: {error}") from error
    if got != expected:
        raise WeightsError(f"{path} is damaged: expected sha256 {expected}, got {got}")
    model = cifar_resnet20(in_channels=1)
    load_weights(path, model)
    return model.eval()
