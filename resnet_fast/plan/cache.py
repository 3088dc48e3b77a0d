"""The file that remembers verdicts, so that verification is paid once a site and device.

JSON under the user's cache folder, keyed by versions, site and candidate. Writers merge under a
lock and replace the file in one step; a file that cannot be read as what it should be is set aside
with a warning and rebuilt. A folder that is not there or cannot be written costs the memory, never
the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resnet_fast._version import __version__
from resnet_fast.testing.budget import REVISION

_FORMAT = 1
_lock = threading.Lock()
_memory: dict[str, dict[str, Any]] | None = None
_memory_path: Path | None = None
_warned_unwritable = False


def path() -> Path | None:
    """Where verdicts are kept: ``$RESNET_FAST_CACHE_DIR``, or the XDG cache folder.

    None for a user without a home folder: then they last as long as the process.
    """
    override = os.environ.get("RESNET_FAST_CACHE_DIR")
    if override:
        folder = Path(override)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        try:
            folder = (Path(base) if base else Path.home() / ".cache") / "resnet_fast"
        except RuntimeError:
            return None
    return folder / f"verdicts-{_FORMAT}.json"


def _figure(value: object) -> bool:
    if isinstance(value, int):
        # An integer of JSON may be larger than any float.
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _valid(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("ok"), bool)
        and all(_figure(entry.get(field)) for field in ("error", "limit"))
        # A verdict that claims success must carry figures that support it.
        and (
            not entry["ok"] or (math.isfinite(entry["error"]) and entry["error"] <= entry["limit"])
        )
    )


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as failure:
        warnings.warn(f"plan cache {file} cannot be read ({failure}); rebuilding", stacklevel=4)
        return {}
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT or not isinstance(data["verdicts"], dict):
            raise ValueError(f"format {data['format']}")
        entries = data["verdicts"]
        if not all(_valid(entry) for entry in entries.values()):
            raise ValueError("an entry is malformed")
        return entries
    except (ValueError, KeyError, TypeError, RecursionError) as failure:
        warnings.warn(f"plan cache {file} is damaged ({failure}); rebuilding it", stacklevel=4)
        with contextlib.suppress(OSError):
            file.replace(file.with_suffix(".damaged"))
        return {}


@contextlib.contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no advisory locks: the atomic replace alone keeps the file whole
        yield
        return
    with open(file.with_suffix(".lock"), "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _entries() -> dict[str, dict[str, Any]]:
    global _memory, _memory_path
    file = path()
    if _memory is None or _memory_path != file:
        _memory, _memory_path = {} if file is None else _read(file), file
    return _memory


def entry_key(site_key: str, candidate: str) -> str:
    """Cache key of one verdict; a new criterion or version of either package starts afresh."""
    versions = f"{__version__}|criterion {REVISION}|torch {torch.__version__}"
    return f"{versions}|{candidate}|{site_key}"


def get(site_key: str, candidate: str) -> dict[str, Any] | None:
    """The kept verdict ``{"ok", "error", "limit"}``, or None."""
    with _lock:
        return _entries().get(entry_key(site_key, candidate))


def _warn_kept_in_memory(why: str) -> None:
    global _warned_unwritable
    if not _warned_unwritable:
        _warned_unwritable = True
        warnings.warn(f"{why}; verdicts last as long as this process", stacklevel=4)


def put(site_key: str, candidate: str, *, ok: bool, error: float, limit: float) -> None:
    """Keep a verdict, merged with what other processes have written meanwhile."""
    global _memory
    entry = {"ok": ok, "error": error if math.isfinite(error) else 1e300, "limit": limit}
    with _lock:
        entries = _entries()
        entries[entry_key(site_key, candidate)] = entry
        file = path()
        if file is None:
            return _warn_kept_in_memory("plan cache: there is no home folder to keep it in")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(file):
                merged = {**_read(file), **entries}
                descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
                try:
                    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                        json.dump({"format": _FORMAT, "verdicts": merged}, handle)
                    os.replace(name, file)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(name)
                    raise
            _memory = merged
        except OSError as failure:
            _warn_kept_in_memory(f"plan cache {file} cannot be written ({failure})")


def forget() -> None:
    """Drop what this process has read; the next look-up reads the file again."""
    global _memory
    with _lock:
        _memory = None
