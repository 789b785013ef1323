"""What a run is asked to do; the command line fills it in, and so may Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressor.core.errors import UsageError
from compressor.core.files import resolved, short_name
from compressor.core.model_names import hub_name

if TYPE_CHECKING:
    from compressor.core.progress import Progress

Format = Literal["onnx", "safetensors"]
Mode = Literal["default", "standard", "compat"]
Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class RunOptions:
    """One compression.

    model     the checkpoint's path, or its name on a hub
    recipe    a shipped recipe's name, or a file
    output    the artifact's directory; None: `<model>-<recipe>` in the working directory
    data      calibration data; None: the built-in sample
    eval      evaluation data; None: the built-in sample's other part
    arch      `module:callable` that returns the network, or a folder with its config; None: the checkpoint tells
    trust_pickle  let a checkpoint run code when it is read, as pickled modules and exported programs do
    format    onnx, or safetensors: the packed weights without a graph
    sets      "section.key=value", over the recipe
    mode      how the graph is written: default, standard (DequantizeLinear) or compat (older onnxruntimes)
    seed      of everything that is random
    target_size   bytes of all files, which an allocation of widths stays below, within 1 %; of a recipe that encodes
                  nothing, what its structure pass has to leave
    target_flops  share of a forward's multiplications that the recipe's structure pass leaves
    max_loss      a gate on the loss of quality; without target_size also what widths are allocated for
    max_ram       bytes of memory; a plan that needs more is refused
    engine    where blocks are encoded side by side: local processes, or tasks on the Ray cluster at `address`
    workers   how many of them at a time; None: 1 of local processes, which is this one, and of a cluster its cores
    device    where blocks of language models and encoders are computed with: cpu, cuda, cuda:1, or auto, which is a GPU
              where there is one
    target_latency  seconds of one run in onnxruntime, for which networks are searched; target_speedup, times the
                  original's speed
    threads, batch  of onnxruntime, and examples in a run, that such a target is of; None: all cores
    resume    go on with the blocks of an interrupted run
    force     replace an artifact that is already there
    trust_recipe  let a recipe that is not shipped lead out of the process, as to a Ray cluster
    progress  told what goes on; None: the log
    """

    model: str
    recipe: str = "llm-2bit"
    output: Path | None = None
    data: str | None = None
    eval: str | None = None
    arch: str | None = None
    trust_pickle: bool = False
    format: Format = "onnx"
    sets: tuple[str, ...] = ()
    mode: Mode = "default"
    seed: int = 0
    target_size: int | None = None
    target_flops: float | None = None
    max_loss: float | None = None
    max_ram: int | None = None
    engine: Engine = "local"
    workers: int | None = None
    address: str = "auto"
    device: str = "cpu"
    target_latency: float | None = None
    target_speedup: float | None = None
    threads: int | None = None
    batch: int = 1
    resume: bool = False
    force: bool = False
    trust_recipe: bool = False
    progress: Progress | None = None

    def with_progress(self, progress: Progress) -> RunOptions:
        """The same, reporting to `progress`."""
        return replace(self, progress=progress)

    @property
    def allocates(self) -> bool:
        """Whether widths are allocated per tensor."""
        return self.target_size is not None or self.max_loss is not None

    @property
    def side_by_side(self) -> bool:
        """Whether blocks are encoded in processes beside this one."""
        return self.engine == "ray" or (self.workers or 1) > 1

    @property
    def searches(self) -> bool:
        """Whether a network is searched that is fast enough."""
        return self.target_latency is not None or self.target_speedup is not None

    @property
    def directory(self) -> Path:
        """Where the artifact goes."""
        if self.output is not None:
            return self.output
        model = resolved(Path(self.model))
        stem = hub_name(self.model) or (model.name if model.is_dir() else model.stem)
        return Path(short_name(f"{stem}-{Path(self.recipe).stem}"))


def refuse_seed(seed: int) -> None:
    """Refuses a seed that generators do not take.

    Raises:
        UsageError: It is below 0, or too large.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: is {seed}; give a whole number from 0 to {2**63 - 1}")
