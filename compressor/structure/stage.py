"""The structure stage: passes that return a smaller network, or train what will be encoded, before anything is.

The network is written to the run's working folder and goes on as a checkpoint like any other, so that all later
stages, and --resume, know nothing of how it came about. Quality is still measured beside the original.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.reshaped import open_reshaped, write_reshaped
from compressor.checkpoints.sized import SizedCheckpoint, open_sizes, write_sizes
from compressor.core.absent import Absent
from compressor.core.batch import Batch, Examples, call
from compressor.core.channels import ChannelGraph
from compressor.core.contract import StructurePass, TrainedPass
from compressor.core.errors import CheckpointError, PassError
from compressor.core.fake import shapes_alone
from compressor.core.groups import Branches, Group, Operator
from compressor.core.passes import Pass, StructureSettings, WeightSettings
from compressor.core.progress import Progress
from compressor.core.structure import Layer, Outcome, Removal, Subject
from compressor.core.training import Training
from compressor.core.work import Work
from compressor.graph.blocks import block_names, first_tensor, layers, layout_of, patched, without_cache
from compressor.graph.channels import channel_graph
from compressor.graph.compensation import compensate, mean_inputs, readers
from compressor.graph.cost import multiplications, positions
from compressor.graph.depth import depth_units
from compressor.graph.groups import find_groups
from compressor.graph.operators import find_branches
from compressor.graph.places import layer_places
from compressor.graph.surgery import predicted_parameters, remove_units, sort_units, tensor_shapes, zero_units
from compressor.learning.nested import fitting
from compressor.learning.trainer import Fitting
from compressor.passes.registry import load_pass
from compressor.passes.settings.n2n import N2nSettings
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Recipe, Step
from compressor.runtime.torchrun import rank, wait
from compressor.structure.students.laboratory import Laboratory
from compressor.structure.students.making import students_of

LARGEST_ERROR = 1e-4
"""Of the largest output, between a network with units masked and without them."""
LARGEST_RUN = 200_000_000
"""Bytes of a network that is run on an example before any weight of it is read; of larger ones shapes are computed."""
REPORT, SIZES = "report.json", "sizes"


class GraphSurgeon:
    """Finds and removes units by the traced graph, and checks every removal on an example.

    still   the one network that is looked at does not change meanwhile, so that its groups are found once
    """

    def __init__(self, example: Batch, call: Callable[[nn.Module, Batch], Any], still: bool = False) -> None:
        self.example, self.call, self.still = example, call, still
        self._positions: dict[str, int] = {}
        self._groups: list[Group] | None = None

    def groups(self, module: nn.Module) -> list[Group]:
        found = find_groups(module, self.example) if self._groups is None else self._groups
        self._groups = found if self.still else None
        return found

    def branches(self, module: nn.Module) -> Branches:
        return find_branches(module, self.example)

    def mask(self, module: nn.Module, group: Group, units: Tensor) -> None:
        zero_units(module, group, units)

    def parameters(self, module: nn.Module, removal: Removal) -> int:
        return predicted_parameters(module, removal)

    def shapes(self, module: nn.Module, removal: Removal) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in tensor_shapes(module, removal).items()}

    def multiplications(self, module: nn.Module, removal: Removal) -> int:
        self._positions = self._positions or positions(module, self.call, self.example)
        return multiplications(module, removal, self._positions)

    def compensate(
        self, smaller: nn.Module, original: nn.Module, removal: Removal, batches: list[Batch]
    ) -> list[str]:  # fmt: skip
        paths = list(readers(original, removal))
        return compensate(smaller, original, removal, mean_inputs(original, paths, self.call, batches))

    @torch.no_grad()
    def remove(self, module: nn.Module, removal: Removal) -> nn.Module:
        """The smaller network.

        Raises:
            CheckpointError: It does not run, or computes something else: a size is written into its code.
        """
        smaller = remove_units(module, removal)
        blocks = [group for group in removal if isinstance(group, Operator) and group.whole]
        for group, units in removal.items():
            if group not in blocks:
                zero_units(module, group, units)
        with self.skipping(module, blocks):
            wanted = first_tensor(self.call(module, self.example))
        where = f"{type(module).__name__}: without {sum(len(units) for units in removal.values())} units"
        advice = "a size is written into its forward; take it from an attribute that counts heads, or from a shape"
        try:
            found = first_tensor(self.call(smaller, self.example))
        except (RuntimeError, ValueError, IndexError) as error:  # what shapes that do not fit raise in a forward
            raise CheckpointError(f"{where} it does not run; {str(error).splitlines()[0]}; {advice}") from error
        same = found.shape == wanted.shape
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) if same else float("inf")
        if error > LARGEST_ERROR:
            raise CheckpointError(f"{where} it differs from the masked one by {error:.2g} of the output; {advice}")
        return smaller

    def sort(self, module: nn.Module, group: Group, order: Tensor) -> None:
        sort_units(module, group, order)

    def channels(self, module: nn.Module) -> ChannelGraph:
        return channel_graph(module, self.example)

    def blocks(self, module: nn.Module) -> list[Operator]:
        if block_names(module) == [""]:
            return []
        without_cache(module)
        found = depth_units(module, lambda: self.call(module, self.example), parts=False)
        return [
            Operator(unit.name, 1, (), cut={unit.name: (unit.absent, unit.n_outputs)}, whole=True) for unit in found
        ]

    @contextmanager
    def skipping(self, module: nn.Module, gone: Sequence[Operator]) -> Iterator[None]:
        absent = {path: Absent(*left) for operator in gone for path, left in operator.cut.items()}
        with patched({module.get_submodule(path): each.forward for path, each in absent.items()}):
            yield


@dataclass(frozen=True)
class Reference:
    """The data that structure passes choose by, and train on.

    batches    arguments of the forward, some hundred examples
    labels     (n,) per batch; None where there are none
    examples   all of the data, made when a pass trains
    """

    batches: list[Batch]
    labels: list[Tensor] | None
    examples: Callable[[], Examples]


def restructure(
    checkpoint: Checkpoint, recipe: Recipe, data: Reference, work: Work, progress: Progress
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """The network after all structure passes of the recipe and those whose encoding is trained, and each one's report.

    Under torchrun every process calls this: all of them train, the first alone does the rest.

    Raises:
        CheckpointError: The network cannot be traced, or not made smaller.
    """
    found, reports = checkpoint, []
    for number, step in enumerate(recipe.early):
        folder = written_in(work, number)
        due = not folder.exists() and (rank() == 0 or _trains(step.settings))
        wait()  # until all have looked
        if due:
            what = "a smaller network" if step.settings.stage == "structure" else "training"
            with progress.task(f"{step.name}: {what}", 1) as task:
                subject = _subject(
                    checkpoint,
                    found,
                    step,
                    recipe,
                    data,
                    work,
                    folder,
                    lambda share, note: task.advance(share, note=note),
                )
                outcome = _applied(step.settings, subject)
            if rank() == 0:
                _write(checkpoint, found, outcome, step.name, folder)
        wait()
        found = open_reshaped(checkpoint, folder)
        reports.append(json.loads((folder / REPORT).read_text()))
        progress.say(f"{step.name}: {_summary(reports[-1])}")
    return found, reports


def without_weights(checkpoint: Checkpoint, step: Step, example: Batch) -> tuple[StructurePass, Subject]:
    """A structure pass, and a checkpoint's network for its `examine` and `foretell`, of which no weight is read.

    Args:
        example: Arguments of the forward, of which shapes count.

    Raises:
        CheckpointError: The network cannot be traced, or has no units where the pass wants some.
    """
    assert isinstance(step.settings, StructureSettings)
    module = _weightless(checkpoint.build()).requires_grad_(False)
    large = 4 * sum(info.numel for info in checkpoint.tensors.values()) > LARGEST_RUN
    surgeon = GraphSurgeon(example, _shapes_of if large else call, still=True)
    subject = looked_at(module, [example], surgeon, step.selects)
    method = load_pass(step.settings)
    _refuse_without_units(method, subject)
    return method, subject


def _weightless(module: nn.Module) -> nn.Module:
    """The module, float32, with zeros for what has no memory: pages that nothing writes take none."""
    made: dict[int, nn.Parameter] = {}
    for holder in module.modules():
        for name, parameter in holder._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
                holder._parameters[name] = made.setdefault(id(parameter), zeros)
        for name, buffer in holder._buffers.items():
            if buffer is not None and buffer.is_meta:
                holder._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return module.float()


def _shapes_of(module: nn.Module, batch: Batch) -> Any:
    with shapes_alone():
        return call(module, batch)


def looked_at(
    module: nn.Module, batches: list[Batch], surgeon: GraphSurgeon, selects: Callable[[str], bool]
) -> Subject:  # fmt: skip
    """A network that nothing trains."""
    return Subject(module, batches, None, surgeon, torch.Generator(), selects, lambda *_: None, _trains_nothing)


def _trains_nothing(
    settings: Training, teacher: nn.Module | None = None, other: nn.Module | None = None, *,
    name: str = "", share: float = 1.0,
) -> Fitting:  # fmt: skip
    raise PassError(f"{settings.name} trains where its network is only looked at")


def sizes_of(checkpoint: Checkpoint, recipe: Recipe, work: Work) -> list[SizedCheckpoint]:
    """The networks within what `restructure` made of a checkpoint, smallest first; the last pass alone makes some."""
    return open_sizes(checkpoint, written_in(work, len(recipe.early) - 1) / SIZES)


def written_in(work: Work, number: int) -> Path:
    """The folder of the network that such a pass, by its number, has made."""
    return work.folder / f"structure-{number}"


def decided(recipe: Recipe, reports: list[dict[str, Any]]) -> Recipe:
    """The recipe whose trained steps leave alone what they did leave alone, and that asks for no gradient of a sign."""
    for report in reports:
        recipe = recipe.leaving(report["pass"], report.get("dense", ()))
        if report.get("activations") == "binary":
            calibration = recipe.calibration.model_copy(update={"token_importance": False})
            recipe = recipe.model_copy(update={"calibration": calibration})
    return recipe


def _summary(report: dict[str, Any]) -> str:
    if "binary" in report:
        return f"{len(report['binary'])} layers are binary, {len(report['dense'])} stay as they are"
    if "sizes" in report:
        return (
            f"{len(report['sizes'])} sizes, {report['sizes'][0]['parameters']:,} to {report['parameters']:,} parameters"
        )
    return f"{report['parameters_before']:,} → {report['parameters']:,} parameters"


def _trains(settings: Pass) -> bool:
    return isinstance(settings, Training) and settings.epochs > 0


def _subject(
    original: Checkpoint, checkpoint: Checkpoint, step: Step, recipe: Recipe, data: Reference, work: Work, folder: Path,
    advance: Callable[[float, str], None],
) -> Subject:  # fmt: skip
    if not data.batches:
        raise CheckpointError(f"{checkpoint.path}: {step.name} traces the network on an example; give --data")
    if checkpoint.family == "decoder" and step.settings.refuses_decoders:
        raise CheckpointError(f"{checkpoint.path}: {step.settings.refuses_decoders}")
    module = checkpoint.build("cpu").float()
    example = {name: tensor[:2] for name, tensor in data.batches[0].items()}

    def trainer(
        settings: Training, teacher: nn.Module | None = None, other: nn.Module | None = None, *,
        name: str = "", share: float = 1.0,
    ) -> Fitting:  # fmt: skip
        kept = folder.with_name(f"{folder.name}-training{name and f'-{name}'}")
        if other is not None and teacher is None:
            teacher = original.build("cpu").float()
        return fitting(
            other or module, data.examples(), settings, work.seed, kept,
            lambda part, note: advance(share * part, note), teacher,
        )  # fmt: skip

    def students(settings: StructureSettings) -> Laboratory:
        assert isinstance(settings, N2nSettings)
        searched = folder.with_name(f"{folder.name}-search")
        return students_of(module, data.batches, data.labels, settings, data.examples, work.seed, searched, advance)

    labels = data.labels
    if labels is None and checkpoint.family == "decoder":
        labels = [next_tokens(batch["input_ids"]) for batch in data.batches]
    surgeon, generator = GraphSurgeon(example, call), work.generator(folder.name)
    return Subject(
        module, data.batches, labels, surgeon, generator, step.selects, advance, trainer,
        lambda: _trainable(checkpoint, module, step, recipe, example), students,
    )  # fmt: skip


def _trainable(checkpoint: Checkpoint, module: nn.Module, step: Step, recipe: Recipe, example: Batch) -> list[Layer]:
    """The layers that the plan has the step encode, and why some of them should stay as they are."""
    plan = make_plan(checkpoint, recipe, smaller=True)
    chosen = {tensor.name for tensor in plan.tensors if tensor.method == step.settings}
    places, modules = layer_places(module, example), layers(module)
    uses = Counter(id(weight) for child in module.modules() if (weight := child._parameters.get("weight")) is not None)
    found = []
    for name, place in places.items():
        layout = layout_of(modules[name])
        if name in chosen and layout is not None:
            shared = "is shared by several layers" if uses[id(modules[name].weight)] > 1 else ""
            found.append(Layer(name, modules[name], layout, place or shared))
    return found


def next_tokens(tokens: Tensor) -> Tensor:
    """The labels (n, tokens) of a language model: the token that follows, −100 at the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)


def _applied(settings: Pass, subject: Subject) -> Outcome:
    if isinstance(settings, WeightSettings):
        method = load_pass(settings)
        if not isinstance(method, TrainedPass):
            raise PassError(f"{settings.name} says that it trains, and is no TrainedPass with fit()")
        return method.fit(subject)
    assert isinstance(settings, StructureSettings)
    method = load_pass(settings)
    _refuse_without_units(method, subject)
    outcome = method.restructure(subject)
    if method.measures_norms:
        measure_norms(outcome.module, subject.batches)
    return outcome


def _refuse_without_units(method: StructurePass, subject: Subject) -> None:
    if method.chooses_units and not subject.choosable():
        groups = subject.surgeon.groups(subject.module)
        reasons = "; ".join(dict.fromkeys(f"'{group.name}' {group.reason}" for group in groups if group.reason))
        raise CheckpointError(
            f"{type(subject.module).__name__}: {method.name} can remove nothing from it; {reasons or 'no groups'}; "
            "leave the pass out, or select other tensors"
        )


@torch.no_grad()
def measure_norms(module: nn.Module, batches: list[Batch]) -> None:
    """Batch norms take mean and variance anew, the average over batches; nothing else changes."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for batch in batches if norms else ():
        call(module, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _write(original: Checkpoint, before: Checkpoint, outcome: Outcome, name: str, folder: Path) -> None:
    """Whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_reshaped(original, outcome.module, partial)
    parameters = {
        "parameters_before": sum(p.numel() for p in before.build().parameters()),
        "parameters": sum(p.numel() for p in outcome.module.parameters()),
    }
    (partial / REPORT).write_text(json.dumps({"pass": name} | parameters | outcome.report))
    write_sizes(original, outcome.sizes, partial / SIZES)
    partial.rename(folder)
