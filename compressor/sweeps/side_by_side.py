"""Blocks that are encoded on the original's inputs, side by side: in processes of this machine, or as Ray tasks.

The process that has them done runs the original forwards and leaves what reaches each block in a file. A worker reads
its block's weights from the checkpoint and that file, sums the second moments itself, which are most of the products,
and writes the block's tensors as ever. Whoever does it, and however many do, the bytes are the same.
"""

from __future__ import annotations

import functools
import io
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.again import Opening
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError, UsageError
from compressor.core.files import short_name
from compressor.runtime.pool import Pool, Processes, RayTasks, n_of_cluster
from compressor.sweeps.encode import Apart, has_blocks
from compressor.sweeps.network import Arguments, Network

FOLDER = "side-by-side"
"""In the working folder, while there are workers."""


@dataclass(frozen=True)
class BlockWorker:
    """Encodes blocks in a process of its own.

    opening    of the checkpoint
    fast       whether blocks compute in bfloat16, as the process that has them done found
    threads    of torch, as many as that process has: sums depend on it
    """

    apart: Apart
    opening: Opening
    fast: bool
    threads: int
    folder: Path

    def do(self, job: str) -> None:
        """Encodes the block of that name; what reaches it lies in a file."""
        torch.set_num_threads(self.threads)
        network = self._network
        with network.loaded(network.names_in(job)), torch.no_grad():
            reached = torch.load(inputs_file(self.folder, job), weights_only=False)
            self.apart.encode(network, job, network.block(job), reached)

    @functools.cached_property
    def _network(self) -> Network:
        return Network(self.opening.open(), self.fast)


def inputs_file(folder: Path, block: str) -> Path:
    """What reaches a block, of every batch."""
    return folder / f"{short_name(block)}.inputs"


def _save(reached: list[Arguments], file: Path | io.BytesIO, network: Network, name: str) -> None:
    try:
        torch.save(reached, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{network.checkpoint.path}: '{name}' is called with what cannot go to another process; {error}; leave "
            "--workers and --engine out"
        ) from error


def refuse_undivided(checkpoint: Checkpoint, batches: list[Batch], asked: str) -> int:
    """How many blocks a network has, of which several can be encoded at a time.

    Args:
        batches: On which it is tried whether they are called in a row; without any that is not known yet.

    Raises:
        UsageError: It is one block.
        CheckpointError: A block is called with what no file can hold.
    """
    network = Network(checkpoint, fast=False)
    if not has_blocks(network):
        raise UsageError(
            f"{asked}: {checkpoint.path} has no repeated block, of which several could be encoded at a time: no "
            "ModuleList of modules alike; leave it out"
        )
    names = network.blocks
    if batches:
        reached = network.enter(batches)
        refuse_one_block(network, asked)
        _save(reached, io.BytesIO(), network, names[0])
    return len(names)


def refuse_one_block(network: Network, asked: str) -> None:
    """Refuses a network whose blocks turned out to be no row.

    Raises:
        UsageError: They are not.
    """
    if not has_blocks(network):
        raise UsageError(
            f"{asked}: {network.checkpoint.path} does not call its blocks in a row, each on what the one before gives "
            "and nothing else, and is encoded as one block; leave it out"
        )


@dataclass
class Workers:
    """Those that encode the blocks of one run; within a `with`, at whose end they are gone.

    asked     how the user wrote it
    engine    local processes, or tasks on the Ray cluster at `address`
    n         how many at a time; None: as many as the cluster has cores
    memory    bytes that one takes, about
    """

    opening: Opening
    folder: Path
    engine: Literal["local", "ray"]
    n: int | None
    address: str
    memory: int
    asked: str = "--workers"

    def __post_init__(self) -> None:
        self._pool: Pool | None = None
        self._out = 0

    def __enter__(self) -> Workers:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, apart: Apart, network: Network, name: str, reached: list[Arguments]) -> Iterator[str]:
        """Has a block encoded; yields the names of others that are done, where so many were under way already.

        Raises:
            UsageError: It is the whole network.
            CheckpointError: It is called with what no file can hold.
        """
        if self._pool is None:
            refuse_one_block(network, self.asked)
            self._at_once = min(self._at_once, len(network.blocks))
            self._pool = self._started(apart, network)
        if self._out > self._at_once:  # one is ready beside those at work: files and memory are few
            yield self._get()
        _save(reached, inputs_file(self.folder, name), network, name)
        self._out += 1
        self._pool.put(name)

    def rest(self) -> Iterator[str]:
        """The names of the others, as they are done."""
        while self._out:
            yield self._get()

    def _get(self) -> str:
        assert self._pool is not None
        name = self._pool.get()
        self._out -= 1
        inputs_file(self.folder, name).unlink()
        return name

    def _started(self, apart: Apart, network: Network) -> Pool:
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = self.folder.resolve()
        worker = BlockWorker(apart, self.opening, network.fast, torch.get_num_threads(), folder)
        if self.engine == "ray":
            return RayTasks(worker, folder, self.address, self.memory)
        return Processes(worker, folder, self._at_once)

    @functools.cached_property
    def _at_once(self) -> int:
        if self.n is None:
            return n_of_cluster(self.address) if self.engine == "ray" else 1
        return self.n
