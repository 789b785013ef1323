"""One process, or those that torchrun started: who is first, and waiting for one another.

Every process runs the same command. All of them train, each on its share of every batch; the first alone writes. They
need a folder that all can read, as on one machine or a shared disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed

LONGEST_WAIT = timedelta(days=2)
"""Of the others for the first, which may encode and measure for hours."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, on the CPU by gloo; nothing where this is the only one."""
    if n_started() == 1 or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def n_started() -> int:
    """How many processes torchrun started, of which this is one, whether or not they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks and writes: the only one, or the first that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def n_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 is the first, which writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait() -> None:
    """Until all processes have come here."""
    if distributed.is_initialized():
        distributed.barrier()
