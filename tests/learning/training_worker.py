"""One of the processes of data-parallel trainings, started by torchrun; writes what it has come to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from compressor.core.training import Compression
from compressor.learning import trainer
from compressor.learning.trainer import Fitting
from compressor.passes.hesso import Hesso, Shrinking
from compressor.passes.settings.lrp import LrpSettings
from compressor.runtime.torchrun import process_group, rank
from tests.learning.training_case import examples, residual, subject_of, with_pooler

SPARSE = LrpSettings(
    epochs=3, batch=16, optimizer="SGD", rate=0.1, rise=0.0, gradients="compressed",
    options={"momentum": 0.9, "weight_decay": 0.01},
    compression=Compression(share=0.01, warmup=[0.3], clip=0.5),
)  # fmt: skip
STOPS_AT = 7


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in module.state_dict().values()])


def shrunk() -> dict:
    module = with_pooler(residual(norms=False))
    settings = Hesso(epochs=4, batch=16, periods=2)
    loop = Fitting(module, examples(), settings, 3, None, lambda share, note: None)
    shrinking = Shrinking(settings, subject_of(module), loop.n_steps)
    loop.train(shrinking)
    gone = [flags.tolist() for flags in shrinking.gone]
    return {"weights": flat(module), "gone": gone, "examples": loop._index(0)}


def sparse(folder: Path | None = None, stop: int = 0) -> dict:
    """Compressed gradients; with a `stop`, interrupted there."""
    module, calls = with_pooler(residual(norms=False)), iter(range(1000))

    def advance(share: float, note: str) -> None:
        if stop and next(calls) == stop:
            raise KeyboardInterrupt

    log = Fitting(module, examples(), SPARSE, 3, folder, advance).train()
    return {"weights": flat(module), "log": log}


def main(folder: Path) -> None:
    with process_group():
        found = {"shrunk": shrunk(), "sparse": sparse()}
        trainer.SECONDS_BETWEEN_SAVES = -1.0
        kept = folder / "training"
        try:
            sparse(kept, STOPS_AT)
        except KeyboardInterrupt:
            found["kept"] = sorted(file.name for file in kept.iterdir())
        found["resumed"] = sparse(kept)
        torch.save(found, folder / f"{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
