"""What the tests of sequences share."""

from __future__ import annotations

import pytest

from resnet_fast.ops import _checks

needs_sequences = pytest.mark.skipif(
    not _checks.has_op("_run_sequence"), reason="the CPU op library is not loaded"
)
