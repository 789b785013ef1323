"""The usual methods on the linears, embedding and head encoded as in our recipes, through compressor's sweeps.

rtn     round to nearest, the scale of each group searched
hqq     half-quadratic fitting of the zero point, which stays a float16; from the range's scale and from a searched one
gptq    error feedback, the scale of each group searched when it is due, weighted by the Hessian
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import cached
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from compressor import data
from compressor.core.batch import Batch
from compressor.core.encoding import Dense
from compressor.core.spec import group_columns
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.data.batches import calibration_batches
from compressor.export.loading import decoded_checkpoint
from compressor.ops.grids import code, search_scale
from compressor.passes.affine import Affine, hqq_zero
from compressor.passes.settings.affine import AffineSettings
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Calibration, Embeddings, Recipe, Step
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey, head_inputs, head_of, survey

CALIBRATION = Calibration(tokens=8192, window=512, token_importance=False)
EMBEDDINGS = Embeddings(bits=4, group=64, scale_bits=8)
WINDOWS_AT_A_TIME = 4
VARIANTS = {"rtn": ("learned", "half"), "hqq": ("float", "float searched"), "gptq": ("learned", "half")}
"""Zero points that are tried; the best counts."""


class FloatHqq(Affine):
    """HQQ as its authors store it: the zero point of a group is not rounded to the grid."""

    searched: bool = False

    def encode(self, weight: Tensor, hessian: Tensor | None, generator: torch.Generator) -> Dense:
        """What the grid of a matrix (out, in) decodes to; its bytes are counted from the setting."""
        n_rows, columns = weight.shape
        group = group_columns(self.group, columns)
        groups = functional.pad(weight.float(), (0, -columns % group)).view(n_rows, -1, group)
        scale, zero = search_scale(groups, self.bits, "learned", n_steps=20 if self.searched else 1)
        scale = scale.clamp_min(6.2e-5).half().float()
        zero = hqq_zero(groups, scale, zero, self.bits).half().float()
        values = scale * (code(groups, scale, zero, self.bits) - zero)
        return Dense((n_rows, columns), values.flatten(1)[:, :columns].contiguous())


class FloatHqqStep(Step):
    """A step of a recipe that computes with FloatHqq."""

    searched: bool = False

    def load(self) -> FloatHqq:
        return FloatHqq(**self.settings.model_dump(), searched=self.searched)


@dataclass(frozen=True)
class Setting:
    """One baseline."""

    method: str
    bits: int
    group: int
    zero: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits} bit, groups of {self.group}, zero {self.zero}"

    @property
    def family(self) -> tuple[str, int, int]:
        """Settings of one family differ in what is tried; the best of it counts."""
        return self.method, self.bits, self.group

    @property
    def recipe(self) -> Recipe:
        floating = self.zero.startswith("float")
        settings = AffineSettings(
            method=self.method, bits=self.bits, group=self.group, zero="middle" if floating else self.zero,
        )  # fmt: skip
        searched = "searched" in self.zero
        step = FloatHqqStep(settings=settings, searched=searched) if floating else Step(settings=settings)
        return Recipe(name=self.name, passes=(step,), calibration=CALIBRATION, embeddings=EMBEDDINGS)


def settings(bits: list[int], methods: list[str]) -> list[Setting]:
    """All that is tried, what matters most first."""
    sizes = [(width, group) for width in bits for group in ((64, 32) if width == 2 else (64,))]
    return [
        Setting(method, width, group, zero)
        for width, group in sizes for method in methods for zero in VARIANTS[method]
    ]  # fmt: skip


def file_bytes(setting: Setting, plan: Plan) -> int:
    """Every file of an artifact with this baseline's encodings; float zero points are two bytes a group."""
    if not setting.zero.startswith("float"):
        return plan.bytes_after
    linears = [tensor for tensor in plan.tensors if tensor.by == "affine"]
    zeros = sum(tensor.matrix[0] * math.ceil(tensor.matrix[1] / setting.group) for tensor in linears)
    return plan.bytes_after + 2 * zeros


class Bench:
    """A checkpoint, its calibration batches and the survey; what all baselines share is made once and cached."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.batches = calibration_batches(data.load(None, "calibration"), _plain(), checkpoint.path, seed=0)
        self.folder = cached(f"baselines-{checkpoint.digest()[:12]}")
        self.survey = self._survey()

    def _survey(self) -> Survey:
        file = self.folder / "survey.bin"
        if not file.exists():
            generator = Work(self.folder, 0).generator("survey")
            found = survey(Network(self.checkpoint), self.batches, self.folder, False, generator)
            save_file(found.pack(), file)
        return Survey.unpack(load_file(file))

    def encode(self, setting: Setting) -> EncodedTensors:
        """The network with a baseline's encodings, from its working folder where it is already there."""
        folder = self.work_folder(setting)
        folder.mkdir(exist_ok=True)
        shared, own = self.folder / "outside.safetensors", folder / "outside.safetensors"
        if shared.exists():
            shutil.copyfile(shared, own)
        needed = self.batches if setting.method == "gptq" else [{"input_ids": self.batches[0]["input_ids"][:1, :16]}]
        plan = make_plan(self.checkpoint, setting.recipe)
        tensors, _ = encode_network(
            Network(self.checkpoint), needed, setting.recipe, plan, self.survey, Work(folder, 0), lambda note: None
        )
        if not shared.exists():
            shutil.copyfile(own, shared)
        return tensors

    def work_folder(self, setting: Setting) -> Path:
        return self.folder / setting.name.replace(",", "").replace(" ", "-")

    def perplexity(self, tensors: EncodedTensors, windows: np.ndarray) -> float:
        """exp of the mean loss over windows (n, length), in torch, as the sweeps compute."""
        network = Network(decoded_checkpoint(self.checkpoint, tensors))
        batches: list[Batch] = [{"input_ids": part} for part in torch.from_numpy(windows).split(WINDOWS_AT_A_TIME)]
        rows = head_inputs(network, batches, lambda: None)
        head = head_of(network.module)
        name = next(name for name, parameter in network.module.named_parameters() if parameter is head.weight)
        table = tensors[name].decode().to(torch.bfloat16 if network.fast else torch.float32)
        losses = torch.cat(list(_losses(batches, rows, table)))
        return math.exp(min(float(losses.double().mean()), 700.0))


@torch.no_grad()
def _losses(batches: list[Batch], rows: list[Tensor], table: Tensor) -> Iterator[Tensor]:
    for batch, states in zip(batches, rows, strict=True):
        ids = batch["input_ids"]
        for window, state in zip(ids, states.view(*ids.shape, -1), strict=True):
            logits = functional.linear(state[:-1].to(table.dtype), table).float()
            yield functional.cross_entropy(logits, window[1:].long(), reduction="none")


def _plain() -> Recipe:
    return Setting("rtn", 4, 64, "half").recipe
