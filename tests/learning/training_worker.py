"""One of the processes of a data-parallel training, started by torchrun; writes what it has come to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from compressor.learning.trainer import Fitting
from compressor.passes.hesso import Hesso, Shrinking
from compressor.runtime.torchrun import process_group, rank
from tests.learning.training_case import examples, residual, subject_of, with_pooler


def main(folder: Path) -> None:
    with process_group():
        module = with_pooler(residual(norms=False))
        settings = Hesso(epochs=4, batch=16, periods=2)
        loop = Fitting(module, examples(), settings, 3, None, lambda share, note: None)
        shrinking = Shrinking(settings, subject_of(module), loop.n_steps)
        loop.train(shrinking)
        weights = torch.cat([tensor.detach().flatten() for tensor in module.state_dict().values()])
        gone = [flags.tolist() for flags in shrinking.gone]
        torch.save({"weights": weights, "gone": gone, "examples": loop._index(0)}, folder / f"{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
