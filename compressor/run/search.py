"""A search for the network that is fast enough and loses least: some are written and measured, one at a time beside the
original, what they came to predicts the others, and the best of those are next.

Quality is judged on a part of the calibration data that nothing is learned from meanwhile; the report's is of the
evaluation data, as of any run. What was measured lies in the working folder, for `--resume`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.artifact import FRONT, FRONT_PICTURE
from compressor.core.batch import Batch
from compressor.core.errors import ResourceError, UsageError
from compressor.core.files import write_text
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.quantities import short_duration
from compressor.core.report import Searched
from compressor.core.work import Work
from compressor.data.arrays import Arrays
from compressor.data.batches import calibration_batches, sentence_batches
from compressor.data.samples import Samples
from compressor.evaluate.bench import Pair, paired
from compressor.evaluate.comparison import evaluate_outputs
from compressor.evaluate.operators import Table
from compressor.evaluate.original import original_graph
from compressor.evaluate.reference import original_outputs
from compressor.evaluate.session import open_session
from compressor.ops.evolution import Genes, Search
from compressor.plan.searching import BATCH, CONFIRMED, FIRST, MOST, PATIENCE, in_eight_bits, search_space
from compressor.report.front import front_picture
from compressor.run.candidates import Family, Layers, Mixtures, planned_again
from compressor.run.clock import Clock
from compressor.run.encoding import SURVEY, Course, encode
from compressor.run.prepare import Prepared, eight_bits_of
from compressor.widths.allocate import Target

JOURNAL, TABLE = "measured.json", "operators.json"
TRIALS = "trial", "trial-eight"
"""Beside the working folder: what networks are made of, layers as the recipe stores them, and in 8 bits."""
MOST_JUDGED = 128
"""Examples that networks are judged on."""
CERTAIN = 10
"""Blocks of runs where it matters: of the best network, and of the artifact."""


@dataclass(frozen=True)
class Measured:
    """A network: what it takes beside the original, and what it loses."""

    genes: Genes
    latency: float
    original: float
    spread: float
    loss: float

    def as_json(self) -> dict[str, Any]:
        return {
            "genes": list(self.genes), "latency": self.latency, "original": self.original, "spread": self.spread,
            "loss": self.loss,
        }  # fmt: skip


def narrowed(
    start: Prepared, course: Course, target: Target, work: Work, progress: Progress, clock: Clock
) -> tuple[Course, Searched | None]:  # fmt: skip
    """The network that a target of speed comes to, to go on with, and what is said of it; without such a target the
    same as it was.

    Raises:
        UsageError: The original is fast enough.
        ResourceError: It is too large to be measured beside.
    """
    if not start.options.searches:
        return course, None
    with clock.stage("search"):
        samples, judged = _parted(start.samples)
        batches = _batches(samples, course, work)
        trial, eight = (Work(work.folder.parent / name, work.seed) for name in TRIALS)
        table = Table(work.folder / TABLE, start.options.threads, start.options.batch)
        family = _family(start, course, samples, target, (trial, eight), table, progress)
        with original_graph(start.checkpoint, work.folder.parent, batches) as original:
            if original is None:
                raise ResourceError(f"{start.checkpoint.path}: is too large to be measured as it is, beside others")
            hunt = _Hunt(start, family, original, _Judge(start, judged, work.folder.parent), work)
            with progress.task("searching", MOST) as task:
                chosen = hunt.run(lambda note: task.advance(note=note))
        for each in (trial, eight):
            shutil.rmtree(each.folder, ignore_errors=True)
        found = hunt.said(chosen)
        write_text(work.folder / FRONT, json.dumps(hunt.as_json(chosen), indent=1, ensure_ascii=False) + "\n")
        write_text(work.folder / FRONT_PICTURE, hunt.picture(chosen))
        return family.course(chosen.genes, work), found


def deliver_front(work: Work, folder: Path) -> None:
    """What the search measured, beside the artifact."""
    for name in (FRONT, FRONT_PICTURE):
        if (work.folder / name).is_file():
            shutil.copy2(work.folder / name, folder / name)


def checked(
    found: Searched, folder: Path, start: Prepared, batches: Sequence[Mapping[str, Any]]
) -> Searched:  # fmt: skip
    """With what the artifact takes, beside the original in a process of their own."""
    with original_graph(start.checkpoint, folder, [dict(batch) for batch in batches]) as original:
        assert original is not None
        pair = _paired(folder, original, start.options, _shapes(batches), CERTAIN)
    return found.model_copy(update={"latency": pair.latency, "original": pair.original, "spread": pair.spread})


def _paired(
    graph: Path, original: Path, options: RunOptions, shapes: Mapping[str, Sequence[int]], blocks: int = 5
) -> Pair:  # fmt: skip
    return paired(graph, original, options.threads, options.batch, shapes, blocks)


def _shapes(batches: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Of the inputs of a network of arrays; those of texts are open."""
    first = batches[0] if batches else {}
    return {} if "input_ids" in first else {name: [1, *each.shape[1:]] for name, each in first.items() if each.ndim}


def _source(samples: Samples) -> Any:
    assert samples.calibration is not None
    return samples.calibration


def _batches(samples: Samples, course: Course, work: Work) -> list[Batch]:
    """What networks are calibrated on while they are searched."""
    tokenizer, family = work.folder.parent, course.checkpoint.family
    return calibration_batches(_source(samples), course.recipe, tokenizer, work.seed, family=family)


def _parted(samples: Samples) -> tuple[Samples, Any]:
    """What networks learn from while they are searched, and what they are judged on."""
    learned, judged = _source(samples).split()
    return replace(samples, calibration=learned), judged


def _family(
    start: Prepared, course: Course, samples: Samples, target: Target, trials: tuple[Work, Work], table: Table,
    progress: Progress,
) -> Family:  # fmt: skip
    in_eight = eight_bits_of(start.recipe, start.options)
    found = search_space(start.recipe, start.options, start.checkpoint, start.plan, in_eight)
    if found.over == "sizes":
        batches = _batches(samples, course, trials[0])
        return Mixtures(start, course, batches, table)
    for each in trials:
        shutil.rmtree(each.folder, ignore_errors=True)
        each.folder.mkdir()
    trial, eight = trials
    encoded = encode(course, samples, target, trial, progress, Clock())
    if not found.wider:
        return Layers(start, course, encoded, found, table)
    if (trial.folder / SURVEY).exists():  # of the original, for which it makes no difference
        shutil.copy2(trial.folder / SURVEY, eight.folder / SURVEY)
    recipe = in_eight_bits(course.recipe, found.wider)
    wider = replace(course, recipe=recipe, plan=planned_again(start, course, recipe))
    return Layers(start, course, encoded, found, table, encode(wider, samples, target, eight, progress, Clock()))


class _Judge:
    """What networks lose beside the original, on data of their own."""

    def __init__(self, start: Prepared, source: Any, tokenizer: Path) -> None:
        if isinstance(source, Arrays):
            chosen = source.take(slice(0, MOST_JUDGED))
            self.batches = list(chosen.batches(chosen.at_once))
        else:
            batches = sentence_batches(source, tokenizer, start.checkpoint.positions)
            self.batches = batches[: max(1, MOST_JUDGED // len(next(iter(batches[0].values()))))]
        self.wanted = list(original_outputs(start.checkpoint, self.batches))

    def loss(self, graph: Path) -> float:
        """Of classes the divergence of the predictions, which few examples tell better than how many agree; of vectors
        1 − cosine; of all else the relative error."""
        session = open_session(graph, apart=True)
        batches = [
            {name: each for name, each in batch.items() if name in session.inputs or name == "attention_mask"
             or len(batch) == 1}
            for batch in self.batches
        ]  # fmt: skip
        found = evaluate_outputs(session, self.wanted, batches)
        if found.get("kl_divergence") is not None:
            return float(found["kl_divergence"])
        return float(1 - found["cosine"] if found.get("cosine") is not None else found["relative_error"])


class _Hunt:
    """A search with what it measures."""

    def __init__(self, start: Prepared, family: Family, original: Path, judge: _Judge, work: Work) -> None:
        self.options, self.family, self.original, self.judge, self.work = start.options, family, original, judge, work
        self.journal, self.scratch = work.folder / JOURNAL, work.folder / "candidate"
        self.shapes = _shapes([{name: np.asarray(each) for name, each in judge.batches[0].items()}])
        speedup = self.options.target_speedup
        target = self.options.target_latency if speedup is None else 1 / speedup
        assert target is not None
        self.target, self.search = target, Search(family.space, work.seed, target)
        self.measured: dict[Genes, Measured] = {}

    def time(self, found: Measured) -> float:
        """What the target is of: seconds, or a share of the original's time."""
        return found.latency if self.options.target_speedup is None else found.latency / found.original

    def run(self, advance: Any) -> Measured:
        """The best network that meets the target, or the fastest where none does.

        Raises:
            UsageError: The original meets it.
        """
        self._read()
        left = self.search.first(FIRST - len(self.measured))[: self._room] or self._asked()
        stale, best = 0, self.search.best()
        while left and stale < PATIENCE:
            for genes in left:
                self._tell(self._measure(genes))
                advance(self._note())
            if self.options.target_latency is not None:
                self._refuse_met()
            stale = stale + 1 if self.search.best() in (None, best) and best is not None else 0
            best = self.search.best()
            left = self._asked()
        return self._confirmed(advance)

    @property
    def _room(self) -> int:
        return max(0, MOST - len(self.measured))

    def _asked(self) -> list[Genes]:
        return self.search.ask(BATCH)[: self._room]

    def _confirmed(self, advance: Any) -> Measured:
        """The best, measured anew in more blocks; one that is slower than it seemed gives way to the next."""
        for _ in range(CONFIRMED):
            genes = self.search.best()
            if genes is None:
                break
            again = self._measure(genes, CERTAIN)
            self._tell(again)
            advance(f"{self._note()}, measured again")
            if self.time(again) <= self.target:
                return again
        genes = self.search.best()
        return self.measured[genes] if genes is not None else min(self.measured.values(), key=self.time)

    def _measure(self, genes: Genes, blocks: int = 5) -> Measured:
        with self._written(genes) as folder:
            loss = self.judge.loss(folder)
            pair = _paired(folder, self.original, self.options, self.shapes, blocks)
        return Measured(genes, pair.latency, pair.original, pair.spread, loss)

    @contextmanager
    def _written(self, genes: Genes) -> Iterator[Path]:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        try:
            self.family.write(genes, self.scratch)
            yield self.scratch
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _tell(self, found: Measured) -> None:
        self.measured[found.genes] = found
        write_text(self.journal, json.dumps([each.as_json() for each in self.measured.values()]))
        self.search.tell({found.genes: (self.time(found), found.loss)})

    def _read(self) -> None:
        """What an interrupted run has measured."""
        for said in json.loads(self.journal.read_text()) if self.journal.is_file() else ():
            found = Measured(tuple(said.pop("genes")), **said)
            self.measured[found.genes] = found
        self.search.tell({genes: (self.time(found), found.loss) for genes, found in self.measured.items()})

    def _refuse_met(self) -> None:
        originals = sorted(found.original for found in self.measured.values())
        usual = originals[len(originals) // 2]
        if usual <= self.target:
            raise UsageError(
                f"--target-latency: is {short_duration(self.target)}, and the original takes {short_duration(usual)}; "
                "give less, or --target-speedup"
            )

    def _note(self) -> str:
        best = self.search.best()
        told = "none is fast enough" if best is None else f"the best loses {self.measured[best].loss:.3g}"
        return f"{len(self.measured)} measured, {told}"

    def said(self, chosen: Measured) -> Searched:
        """For the report."""
        tau = self.search.tau
        return Searched(
            over="sizes" if isinstance(self.family, Mixtures) else "layers",
            target_latency=self.options.target_latency, target_speedup=self.options.target_speedup,
            threads=self.options.threads, batch=self.options.batch, n_measured=len(self.measured),
            tau=None if tau is None else [round(each, 3) for each in tau],
            choices=self.family.told(chosen.genes), fastest=min(map(self.time, self.measured.values())),
        )  # fmt: skip

    def as_json(self, chosen: Measured) -> dict[str, Any]:
        """front.json: every network that was measured, which of them are the front, and which was chosen."""
        front = set(self.search.front())
        networks = [
            found.as_json() | {"front": found.genes in front, "chosen": found.genes == chosen.genes}
            for found in self.measured.values()
        ]
        return {
            "target_latency": self.options.target_latency, "target_speedup": self.options.target_speedup,
            "threads": self.options.threads, "batch": self.options.batch, "choices": self.family.told(chosen.genes),
            "networks": networks,
        }  # fmt: skip

    def picture(self, chosen: Measured) -> str:
        """front.svg."""
        front = set(self.search.front())
        points = [
            (found.latency / found.original, found.loss,
             "chosen" if found.genes == chosen.genes else "front" if found.genes in front else "other")
            for found in self.measured.values()
        ]  # fmt: skip
        share = self.target if self.options.target_speedup is not None else self.target / chosen.original
        return front_picture(points, share)
