"""What surrounds a training: a launcher's variables, the caller's random numbers and modes, the disk."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from persona_plug.errors import ConfigError, PersonaPlugError, first_line

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables that say how many processes there are, as accelerate reads them."""
PLACES = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_")
"""How variables begin that a launcher at work sets besides."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How the system, safetensors and torch (twice) say so.
_FULL_TEXTS = ("No space left", "File too large", "Disk quota exceeded", "PytorchStreamWriter", "inline_container.cc")


def check_launcher() -> None:
    """Refuse variables of a launcher that is not there: a training would wait for processes that never come.

    Raises:
        ConfigError: There are such variables; they are named.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    if any(name.startswith(LAUNCHERS) for name in os.environ):
        return
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in SIZES)
    if several or "LOCAL_RANK" in os.environ:
        found = [name for name in (*SIZES, *PLACES) if name in os.environ]
        shown = ", ".join(f"{name}={os.environ[name]:.20}" for name in found[:3])
        raise ConfigError(
            f"{shown} speak of several processes, but no launcher started this one: go on alone with "
            f"`unset {' '.join(found)}`, or start it with `accelerate launch`"
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute in float32 with gradients, whatever the caller has set; leave their random numbers as they were."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002 - the caller's own numbers
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002


@contextmanager
def room_on_disk(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into one line.

    Raises:
        PersonaPlugError: The disk is full.
    """
    try:
        yield
    except Exception as exc:  # torch, safetensors and the system each raise their own
        full = isinstance(exc, OSError) and exc.errno in FULL
        if isinstance(exc, PersonaPlugError) or not (full or any(text in str(exc) for text in _FULL_TEXTS)):
            raise
        raise PersonaPlugError(
            f"{folder}: a checkpoint cannot be written ({first_line(exc)}); make room there, then resume"
        ) from exc
