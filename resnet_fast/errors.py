"""Typed errors: each names what was wrong, what was expected and what came."""

from __future__ import annotations


class ResNetFastError(Exception):
    """Base of every error that this package raises."""


class ArgumentError(ResNetFastError, ValueError):
    """An argument has a wrong rank, size, value or device.

    Attributes ``argument``, ``expected`` and ``got`` hold the parts of the message.
    """

    def __init__(self, argument: str, expected: object, got: object) -> None:
        # All three go to Exception.args, so that pickling rebuilds the error.
        super().__init__(argument, expected, got)
        self.argument = argument
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"argument '{self.argument}': expected {self.expected}, got {self.got}"


class DTypeError(ArgumentError, TypeError):
    """An argument has an unsupported dtype, or one that does not go with the others."""


class LibraryError(ResNetFastError, RuntimeError):
    """A native library or an optional package is needed and is not there."""


class PlanError(ResNetFastError, ValueError):
    """A plan is malformed, or was made for something else."""


class VerificationError(ResNetFastError, RuntimeError):
    """A candidate's result left the error budget."""


class WeightsError(ResNetFastError, ValueError):
    """A weight file is missing, truncated or does not fit the model."""


class AccelerateError(ResNetFastError, RuntimeError):
    """A model cannot be rewritten as asked."""
