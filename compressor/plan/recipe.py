"""A recipe: passes in order with their settings, calibration, export, gates. Plain data, and no torch.

`load_recipe` reads one by name or path; `compressor.plan.recipe_file` says how YAML becomes a recipe and words the
mistakes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from compressor.core.errors import UsageError
from compressor.core.passes import Need, Pass, PruningSettings, Role, WeightSettings
from compressor.core.quantities import parse_share, parse_size
from compressor.core.roles import is_token_table
from compressor.core.spec import AffineSpec, DenseSpec, RefinedSpec, Spec
from compressor.core.training import Rate
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.fields import GroupSetting

SHORTEST_WINDOW = 16
"""Tokens of a text that are read together, at least."""
MEASURED_TEXT = 512
"""Tokens of the text that speed and memory of a decoder are measured with."""
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

SMALLEST = 4096
"""Matrices with fewer weights stay dense: they do not count, and some are precious."""


ONLY_PRUNED = AffineSettings(bits=8, group=64)


@dataclass(frozen=True)
class Chosen:
    """What a recipe does with one matrix.

    by       the step that names the encoding, "embeddings" for tables, "" where the matrix stays dense
    method   the pass that encodes it; None for plain floats
    prune    the pass that drops weights before
    """

    by: str = ""
    method: WeightSettings | None = None
    prune: PruningSettings | None = None
    spec: Spec | None = None


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


TOKENS_PER_BATCH = 2048
WINDOWS_AT_ONCE = 128
"""Documents that the original writes side by side."""


class Calibration(_Section):
    """The text, or the samples, that passes learn from.

    token_importance: weigh each token by the loss's gradient at each layer; one backward pass.
    generated: share of the text that the original itself writes; decoders only.
    correct_means: set biases and the means of batch norms so that each layer's mean output is the original's again.
    inputs: what a block's layers are encoded on: prefix, what the compressed blocks before it give; original, what the
        original's give, so that blocks do not wait for one another and may be encoded side by side.
    drift: share of the step that makes up for how far a layer's inputs have moved from the original's; 0 is none.
    drift_damping: added to the diagonal of the inputs' second moment in that step, relative to its mean.
    """

    token_importance: bool = True
    generated: Share = 0.0
    correct_means: bool = False
    inputs: Literal["prefix", "original"] = "prefix"
    drift: Share = 0.0
    drift_damping: Rate = 0.05
    tokens: Positive = 16384
    window: Annotated[int, Field(ge=SHORTEST_WINDOW)] = 512
    samples: Positive = 256


class Images(_Section):
    """How pictures become inputs, in the words of preprocessor_config.json; what is null is as that file says, where it
    lies beside the model, else as ImageNet's networks have it.

    size            of the inputs in pixels: a side, or height and width; 224
    shortest_edge   length to which a picture's short side is scaled before the middle is cropped; 8/7 of the size.
                    0 crops nothing: the whole picture is squeezed into the size
    image_mean      per channel, taken off after `rescale_factor` (1/255); [0.485, 0.456, 0.406]
    image_std       by which that is divided; [0.229, 0.224, 0.225]
    layout          nchw, or nhwc: channels last
    channels        rgb, bgr or grey, a single one
    classes         the network's, in its order, as folders are called. Null: as the config's id2label has them, else
                    as numbers of folders say, else the folders in sorted order where they are as many as the classes
    """

    size: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = None
    shortest_edge: Annotated[int, Field(ge=0)] | None = None
    rescale_factor: Annotated[float, Field(gt=0)] | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr", "grey"] = "rgb"
    classes: list[str] | None = None


class Distill(_Section):
    """Learning at the end, for any weight pass of a language model: the whole network on the original's predictions.

    steps                    of Adam, about 2,048 tokens each; 0 is off
    tokens                   of text; more steps go over it again
    generated                share of it that the original itself writes
    codebook_rate            learning rates: of codewords in steps of the int4 grid, of scales relative to their mean,
    scale_rate, dense_rate   of norms and biases
    mapping_rate             of the proximal search that moves codes; 0 leaves them
    """

    steps: Annotated[int, Field(ge=0)] = 0
    tokens: Positive = 131072
    generated: Share = 0.0
    codebook_rate: Rate = 0.03
    scale_rate: Rate = 0.01
    dense_rate: Rate = 1e-3
    mapping_rate: Annotated[float, Field(ge=0)] = 0.0


class Embeddings(_Section):
    """How the embedding and the output table are stored; 16 and 32 bits are plain floats.

    sweeps   of coordinate descent over codes and scales, behind error feedback
    ridge    of a tied table: an embedding's part in its second moment beside the head's, in which every column counts
    refined, refined_bits   rows, of the most frequent tokens of the calibration text, with as many more bits
    """

    bits: Literal[2, 3, 4, 8, 16, 32] = 4
    group: GroupSetting = 32
    zero: Literal["middle", "learned"] = "middle"
    scale_bits: Literal[8, 16] = 8
    sweeps: Annotated[int, Field(ge=0)] = 0
    ridge: Rate = 0.1
    refined: Annotated[int, Field(ge=0)] = 0
    refined_bits: Literal[2, 3, 4] = 4

    def method(self) -> AffineSettings | None:
        """The pass that encodes such a table; None for plain floats."""
        if self.bits >= 16:
            return None
        own = self.model_dump(exclude={"ridge", "refined", "refined_bits"})
        return AffineSettings(**own, method="gptq")

    def extra(self) -> AffineSettings:
        """The pass that encodes what the first leaves of refined rows."""
        return AffineSettings(bits=self.refined_bits, group=32, zero="learned", scale_bits=8, method="gptq")

    def spec(self, name: str, rows: int) -> Spec:
        """The encoding of such a table."""
        if self.bits >= 16:
            return DenseSpec(dtype=f"F{self.bits}")
        inner = AffineSpec(bits=self.bits, group=self.group, zero=self.zero, scale_bits=self.scale_bits)
        if not 0 < self.refined < rows or not is_token_table(name):
            return inner
        extra = self.extra().spec_for(name, (self.refined, 1), "linear")
        assert isinstance(extra, AffineSpec)
        return RefinedSpec(inner=inner, extra=extra, n=self.refined)


class Export(_Section):
    """The artifact: the type of what stays dense, and the precision of activations.

    int8          in matrix products, scaled as they come
    static_int8   in convolutions as well, in ranges that the calibration data show; needs their weights in 8 bits
    exact         float32
    """

    dense: Literal["float16", "float32"] = "float32"
    activations: Literal["int8", "static_int8", "exact"] = "int8"


def _share(value: Any) -> Any:
    return _parsed(parse_share, value, "a share, as 5% or .05")


def _size(value: Any) -> Any:
    return _parsed(parse_size, value, "a size, as 60MB, 60MiB or bytes")


def _parsed(parse: Callable[[str, str], Any], value: Any, wanted: str) -> Any:
    """A quantity that is written as people write it; numbers stay."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value, "")
    except UsageError as error:
        raise ValueError(wanted) from error


class Gates(_Section):
    """Limits that the artifact has to keep; None is no limit. Ratios are to the original.

    max_loss      whichever loss the network's outputs have: 5% more perplexity, .05 less cosine, accuracy or agreement,
                  a relative error of 5%; each output has to keep its own
    max_size      of all files together, as 60MB
    max_memory    that loading and running take in onnxruntime, as 200MB: a text of 512 tokens, or one example
    min_speedup   times the original's speed in onnxruntime: tokens/s, or inputs/s

    What a recipe promises by itself is held against what was measured, and only beyond doubt: a few examples that come
    out otherwise by chance break nothing, nor does a speed that is within its error.

    promised_loss   of every output, in the measure that fits it; where another limit of quality, or a target, is given,
                    that counts instead
    promised_size   times the original's bytes
    promised_speed  times the original's speed; where min_speedup is given, that counts instead
    """

    max_loss: Annotated[Share | None, BeforeValidator(_share)] = None
    max_size: Annotated[Positive | None, BeforeValidator(_size)] = None
    max_memory: Annotated[Positive | None, BeforeValidator(_size)] = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None

    max_perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    max_kl_divergence: Annotated[float, Field(gt=0)] | None = None
    min_agreement: Share | None = None
    min_cosine: Share | None = None
    max_accuracy_drop: Share | None = None
    max_error: Annotated[float, Field(gt=0)] | None = None

    promised_loss: Annotated[Share | None, BeforeValidator(_share)] = None
    promised_size: Annotated[float, Field(gt=0)] | None = None
    promised_speed: Annotated[float, Field(gt=0)] | None = None

    @property
    def limits_quality(self) -> bool:
        """Whether a limit of quality is given, other than what is promised."""
        limits = (self.max_loss, self.max_perplexity_ratio, self.max_kl_divergence, self.min_agreement, self.min_cosine,
                  self.max_accuracy_drop, self.max_error)  # fmt: skip
        return any(limit is not None for limit in limits)


class Evaluation(_Section):
    """How much of the evaluation data is measured; 0 tokens or samples skips it, and the original's speed.

    speed   whether load time, memory and speed are measured, of the artifact and of the original
    """

    tokens: Annotated[int, Field(ge=0)] = 32768
    window: Annotated[int, Field(ge=SHORTEST_WINDOW)] = 512
    samples: Annotated[int, Field(ge=0)] = 512
    speed: bool = True

    @property
    def skipped(self) -> bool:
        """Whether no quality is measured."""
        return not (self.tokens and self.samples)


SECTIONS: dict[str, type[_Section]] = {
    "calibration": Calibration,
    "images": Images,
    "embeddings": Embeddings,
    "distill": Distill,
    "export": Export,
    "gates": Gates,
    "evaluation": Evaluation,
}


class Step(BaseModel):
    """One pass, and the tensors that it is for: any pattern of `select`, and none of `skip`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    settings: SerializeAsAny[Pass]
    select: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.settings.name

    def selects(self, tensor: str) -> bool:
        """Whether the pass is for the tensor of that name; `*` in a pattern matches dots as well."""
        return _any_matches(self.select, tensor) and not _any_matches(self.skip, tensor)


class Recipe(BaseModel):
    """What to do with a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    description: str = ""
    needs: str = ""
    passes: tuple[Step, ...]
    calibration: Calibration = Calibration()
    images: Images = Images()
    embeddings: Embeddings = Embeddings()
    distill: Distill = Distill()
    export: Export = Export()
    gates: Gates = Gates()
    evaluation: Evaluation = Evaluation()

    @property
    def required(self) -> frozenset[Need]:
        """What the passes, as they are set, cannot do without."""
        learning: frozenset[Need] = frozenset({"data", "gradients"} if self.distill.steps else ())
        measures = self.embeddings.refined or self.calibration.correct_means or self.export.activations == "static_int8"
        calibrating: frozenset[Need] = frozenset({"data"} if measures else ())
        return learning.union(calibrating, *(step.settings.needs for step in self.passes))

    @property
    def writes_text(self) -> bool:
        """Whether the original itself writes some of the text that is learned from."""
        return bool(self.calibration.generated or (self.distill.steps and self.distill.generated))

    @property
    def corrects_drift(self) -> bool:
        """Whether weights make up for the drift of their inputs: those of passes that look at inputs."""
        looks = any("data" in step.settings.needs for step in self.passes if isinstance(step.settings, WeightSettings))
        return bool(self.calibration.drift) and looks

    @property
    def structure(self) -> tuple[Step, ...]:
        """The steps that make the network smaller, before any other."""
        return tuple(step for step in self.passes if step.settings.stage == "structure")

    @property
    def early(self) -> tuple[Step, ...]:
        """The steps whose network is another before anything is encoded: structure, and encodings that are trained."""
        return tuple(step for step in self.passes if step.settings.stage == "structure" or step.settings.trains)

    @property
    def learns_blocks(self) -> WeightSettings | None:
        """The first pass that asks for gradient steps on blocks, which are then as it says."""
        weight = (step.settings for step in self.passes if isinstance(step.settings, WeightSettings))
        return next((settings for settings in weight if settings.block_learning), None)

    @property
    def learns(self) -> str:
        """Which gradient steps are taken over encodings, in a few words; empty where none are."""
        if self.distill.steps:
            return f"distill.steps: {self.distill.steps}"
        return f"steps of {self.learns_blocks.name} on blocks" if self.learns_blocks else ""

    def leaving(self, name: str, tensors: Iterable[str]) -> Recipe:
        """The recipe whose steps of that name are not for these tensors."""
        further = tuple(tensors)
        if not further:
            return self
        steps = tuple(
            step.model_copy(update={"skip": (*step.skip, *further)}) if step.name == name else step
            for step in self.passes
        )
        return self.model_copy(update={"passes": steps})

    def smallest(self, role: Role) -> int:
        """Matrices with fewer weights stay dense. Of convolutions on int8 none: floats between them cost time. None of
        what is trained either: training makes up for it."""
        trains = role in ("linear", "conv") and any(step.settings.trains for step in self.passes)
        return 1 if trains or (role == "conv" and self.export.activations == "static_int8") else SMALLEST

    def choose(self, name: str, shape: tuple[int, int], role: Role, depthwise: bool = False) -> Chosen:
        """Which passes a matrix goes through and how it is stored: the last step of each kind that is for it.

        Nothing where it stays dense: too small, no pass is for it, or its encoding would not be smaller. What is
        only pruned is stored at 8 bits. A `depthwise` convolution takes a step of 8 bits: it has few weights and
        shows every error.
        """
        if math.prod(shape) < self.smallest(role):
            return Chosen()
        if role == "embedding":
            return Chosen("embeddings", self.embeddings.method(), None, self.embeddings.spec(name, shape[0]))
        steps = [step for step in self.passes if step.settings.stage == "weight" and step.selects(name)]
        due = [step.settings for step in reversed(steps)]
        prune = next((settings for settings in due if isinstance(settings, PruningSettings)), None)
        prune = prune if prune is None or prune.kept(*shape) < math.prod(shape) else None
        for settings in (each for each in due if isinstance(each, WeightSettings)):
            spec = settings.spec_for(name, shape, role)
            if depthwise and not (isinstance(spec, AffineSpec) and spec.bits == 8):
                continue
            if spec is not None and spec.nbytes(*shape) < 4 * math.prod(shape):
                return Chosen(settings.name, settings, prune, spec)
        if prune is not None and role in ("linear", "conv"):
            return Chosen(prune.name, ONLY_PRUNED, prune, ONLY_PRUNED.spec_for(name, shape, role))
        return Chosen()

    def to_dict(self) -> dict[str, Any]:
        """As it would be written in YAML, every setting spelt out; for provenance."""
        steps = [
            {"pass": step.name, "select": list(step.select), "skip": list(step.skip), **step.settings.model_dump()}
            for step in self.passes
        ]
        head = {"name": self.name, "description": self.description, "needs": self.needs, "passes": steps}
        return head | {section: getattr(self, section).model_dump() for section in SECTIONS}


def learning_window(recipe: Recipe) -> int:
    """Half the calibration's window, for gradient steps: attention costs least so."""
    return max(SHORTEST_WINDOW, recipe.calibration.window // 2)


def _any_matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
