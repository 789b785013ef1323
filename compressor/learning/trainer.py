"""The training loop of passes that train: any optimizer of torch, labels or the original as teacher, resumable.

A training is a pure function of the network, the examples, the settings and the seed: the order of an epoch, and what
dropout draws at a step, come from generators of their own, so that a resumed training arrives at the same weights.
Under torchrun each process takes its share of every batch and gradients are averaged (`DistributedDataParallel`), so
that the result is that of one process, but for batch norms, which see their process's share. Compressed gradients
(`sparse_gradients.py`) are another training: what a process has not sent yet is its own, and each saves its own.

Teaching: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from compressor.core.batch import Examples, call
from compressor.core.errors import DataError, RecipeError
from compressor.core.files import whole
from compressor.core.follower import Follower
from compressor.core.training import Training, alone, too_few, unlabelled
from compressor.graph.blocks import first_tensor
from compressor.learning.sparse_gradients import SparseGradients
from compressor.ops.schedules import rate_share
from compressor.runtime.torchrun import n_processes, rank, wait

SECONDS_BETWEEN_SAVES = 60.0
STATE = "training.pt"


class Fitting:
    """Trains a module in place as a pass's settings say; a `core.follower.Trainer`.

    Args:
        module: float32; trained, and in eval mode again at the end.
        folder: Where the state of an interrupted training is kept; None keeps none.
        advance: Reports a share of the whole training, and how it goes.
        teacher: Whose outputs are learned, where any are; None: the module's own, as it is now.

    Raises:
        DataError: Labels are asked for and there are none, or there are fewer examples than processes.
        RecipeError: The optimizer does not take the options, or gradients are compressed and this is the only process.
    """

    def __init__(
        self, module: nn.Module, examples: Examples, settings: Training, seed: int, folder: Path | None,
        advance: Callable[[float, str], None], teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.module, self.examples, self.settings, self.seed = module, examples, settings, seed
        self.folder, self.advance = folder, advance
        self.loss = settings.loss or ("teacher" if examples.labels is None else "labels")
        if self.loss != "teacher" and examples.labels is None:
            raise DataError(unlabelled(settings, self.loss))
        self.n_steps, self.batch = settings.steps(len(examples), n_processes())
        if not self.batch:
            raise DataError(too_few(settings, len(examples), n_processes()))
        self.steps_per_epoch = len(examples) // self.batch
        self.teacher = None
        if self.loss != "labels" and (teacher is not None or examples.wanted is None):
            self.teacher = (teacher or copy.deepcopy(module)).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(settings, module)
        self.sparse = None
        if settings.gradients == "compressed":
            if n_processes() == 1:
                raise RecipeError(alone(settings))
            self.sparse = SparseGradients(module, settings)

    def train(self, follower: Follower | None = None) -> list[dict[str, float]]:
        """All steps, or those that an interrupted training has left; what each epoch came to.

        Args:
            follower: Goes along with every step; without one the network is only trained.
        """
        parallel = self.module
        if self.sparse is not None:
            self.sparse.align()
        elif n_processes() > 1:  # what a forward leaves out, as a pooler, has no gradient, as in one process
            parallel = DistributedDataParallel(self.module, find_unused_parameters=True)
        step, log, total = self._restore(follower)
        self.advance(step / self.n_steps, "")
        self.saved, self.due = time.monotonic(), False
        self.module.train()
        with torch.random.fork_rng(devices=[]):
            while step < self.n_steps:
                total += self._step(parallel, step, follower)
                step += 1
                if step % self.steps_per_epoch == 0:
                    log.append(self._epoch(step, total / self.steps_per_epoch, follower))
                    total = 0.0
                self.advance(1 / self.n_steps, self._note(step, total, log, follower))
                if self.due:
                    self._save(follower, step, log, total)
                    self.saved = time.monotonic()
        self.module.eval().requires_grad_(False)
        self.optimizer.zero_grad()
        return log

    def _step(self, parallel: nn.Module, step: int, follower: Follower | None) -> float:
        """One step of the optimizer, and of what makes units go; its loss."""
        settings = self.settings
        share = rate_share(step, self.n_steps, settings.schedule, round(settings.rise * self.n_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * share
        torch.manual_seed(self.seed + (step * n_processes() + rank()) * 7919)
        examples = self.examples.part(self._index(step))
        self.optimizer.zero_grad()
        loss = self._gradients(parallel, examples, step)
        if not math.isfinite(loss):
            raise RecipeError(
                f"{settings.name}: the loss is {loss} at step {step + 1} of {self.n_steps}; the training has diverged "
                f"at a rate of {settings.rate * share:g}; write a smaller rate"
            )
        self.due = self.folder is not None and time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES
        if self.sparse is not None:  # each has some of the state: all save that of one step
            self.sparse.begin(step // self.steps_per_epoch)
            self.due = self.sparse.exchange(self.due)
        before = follower.before() if follower else {}
        self.optimizer.step()
        if follower:
            with torch.no_grad():
                follower.step(step, before, settings.rate * share)
        return loss

    def _gradients(self, parallel: nn.Module, examples: Examples, step: int) -> float:
        """The loss of a step's examples, whose gradients the parameters have then."""
        loss = self._loss(called(parallel, examples.inputs), examples)
        loss.backward()
        return float(loss.detach())

    def _index(self, step: int) -> Tensor:
        """The examples of this process at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch * 104729)
        order = torch.randperm(len(self.examples), generator=generator)
        return order[place * self.batch : (place + 1) * self.batch][rank() :: n_processes()]

    def _loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        terms = []
        if self.loss != "teacher":
            assert examples.labels is not None
            terms.append(class_loss(outputs, examples.labels, self.settings.name))
        if self.loss != "labels":
            wanted = self._wanted(examples)
            assert wanted is not None
            terms.append(teaching_loss(outputs, wanted, self.settings.distance, self.settings.temperature))
        return torch.stack(terms).mean()

    def _wanted(self, examples: Examples) -> Tensor | None:
        """What the teacher says of examples."""
        return examples.wanted if self.teacher is None else self._taught(examples.inputs)

    @torch.no_grad()
    def _taught(self, batch: dict[str, Tensor]) -> Tensor:
        assert self.teacher is not None
        return called(self.teacher, batch)

    def _epoch(self, step: int, loss: float, follower: Follower | None) -> dict[str, float]:
        found = {"epoch": step // self.steps_per_epoch, "loss": round(loss, 6)}
        if self.sparse is not None:
            found |= {"share": self.sparse.share, "bytes_per_step": self.sparse.bytes_sent}
        return found | (follower.entry() if follower else {})

    def _note(self, step: int, total: float, log: list[dict[str, float]], follower: Follower | None) -> str:
        done = step % self.steps_per_epoch
        loss = total / done if done else log[-1]["loss"]
        beside = follower.note() if follower else ""
        return f"loss {loss:.4f} · {beside}" if beside else f"loss {loss:.4f}"

    def _save(self, follower: Follower | None, step: int, log: list[dict[str, float]], total: float) -> None:
        """Whole or not at all, by the first process, once each has saved what is its own."""
        if self.folder is None:
            return
        if self.sparse is not None:
            self.sparse.save(self.folder, step)
            wait()
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step, "log": log, "total": total, "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(), "follower": follower.state() if follower else {},
        }  # fmt: skip
        with whole(self.folder / STATE) as partial:
            torch.save(state, partial)
        if self.sparse is not None:
            self.sparse.forget(self.folder, step)

    def _restore(self, follower: Follower | None) -> tuple[int, list[dict[str, float]], float]:
        """(steps done, log, sum of losses in this epoch) of an interrupted training; of a new one 0."""
        wait()
        if self.folder is None or not (self.folder / STATE).is_file():
            return 0, [], 0.0
        state: dict[str, Any] = torch.load(self.folder / STATE, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparse is not None:
            self.sparse.restore(self.folder, state["step"])
        if follower:
            follower.restore(state["follower"])
        return state["step"], state["log"], state["total"]


def called(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first tensor of the forward's outputs."""
    return first_tensor(call(module, batch))


def class_loss(outputs: Tensor, labels: Tensor, name: str) -> Tensor:
    """The mean cross-entropy of outputs (…, classes) with labels (…).

    Raises:
        DataError: They do not fit together.
    """
    if labels.shape != outputs.shape[:-1]:
        raise DataError(
            f"{name}: labels of a batch have shape {tuple(labels.shape)}, outputs {tuple(outputs.shape)}; expected "
            f"{tuple(outputs.shape[:-1])}, one class for each row of the last axis; or write loss: teacher"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[-1]:
        raise DataError(
            f"{name}: labels go from {low} to {high}, but the network has {outputs.shape[-1]} outputs; number the "
            "classes from 0"
        )
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def teaching_loss(outputs: Tensor, wanted: Tensor, distance: str, temperature: float) -> Tensor:
    """T²·KL(softmax(wanted/T) ‖ softmax(outputs/T)), the mean over all but the last axis; or the mean squared error."""
    if distance == "mse":
        return functional.mse_loss(outputs, wanted)
    log_p, log_q = (functional.log_softmax(each.flatten(0, -2) / temperature, -1) for each in (wanted, outputs))
    return temperature**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def make_optimizer(settings: Training, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by its name in torch.optim.

    Raises:
        RecipeError: It does not take the options.
    """
    kind = getattr(torch.optim, settings.optimizer)
    options = {} if settings.gradients == "compressed" else settings.options  # its momentum is in what is sent
    try:
        return kind(module.parameters(), lr=settings.rate, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{settings.name}: torch.optim.{settings.optimizer} does not take options {settings.options}; {error}; "
            "write such as options: {momentum: 0.9} for SGD"
        ) from error
