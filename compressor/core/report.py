"""compression.json: what an artifact says of itself. One schema, through which it is written and read.

Written by a newer version it may hold more: what is not known here is kept and not looked at. What an older one did not
write is absent, and stays so when it is written again.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.core.identity import Identity

Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = (
    Annotated[int, Field(gt=-(2**62), lt=2**62)] | Annotated[float, Field(allow_inf_nan=False, gt=-1e300, lt=1e300)]
)
Facts = dict[str, Any]
"""What a pass or a stage says of itself, as it likes."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, validate_assignment=True)


class Source(_Section):
    """The original, as `Checkpoint.describe` has it; `sha256` is of its weight files, `path` holds in any folder.

    revision   the hub's commit, of what lies in a hub's cache
    """

    path: str | None = None
    kind: str | None = None
    architecture: str | None = None
    family: str | None = None
    files: list[str] = []
    file_bytes: Count = 0
    n_tensors: Count = 0
    n_parameters: Count = 0
    tensor_bytes: Count = 0
    bytes_by_dtype: dict[str, Count] = {}
    tied: dict[str, str] = {}
    tokenizer_files: list[str] = []
    card: dict[str, str] = {}
    sha256: str | None = None
    revision: str | None = None
    arch: str | None = None


class Data(_Section):
    """What was learned from and judged by: names, SHA-256 of both, the share that both hold, and the options."""

    calibration: str | None = None
    evaluation: str | None = None
    sha256: dict[str, str | None] = {}
    overlap: Number = 0.0
    arguments: dict[str, str | None] = {}


class Stage(_Section):
    """What a stage of the run took; CPU time of all its processes, memory the first one's peak until its end."""

    cpu_seconds: Number
    seconds: Number
    peak_memory: Count | None = None


class Distance(_Section):
    """How far the outputs of two networks are apart, by the output that differs most; where there are several, of each.

    Figures of classes are absent where an output has none.
    """

    output: str | None = None
    max_relative_error: Number | None = None
    kl_divergence: Number | None = None
    top1_agreement: Number | None = None
    n_positions: Count = 0
    outputs: dict[str, Distance] = {}


class Proof(_Section):
    """How far the graph is from the network of the decoded weights: with exact activations, and as it is shipped.

    in_steps   of a decoder with a cache, with exact activations: the last tokens are read one at a time
    paired     of an encoder-decoder's own two graphs, as they are shipped, read so
    """

    exact: Distance | None = None
    in_steps: Distance | None = None
    as_shipped: Distance | None = None
    paired: Distance | None = None


class Output(_Section):
    """How one output is beside the original's; figures that its kind does not have are absent.

    `n_above` is how many scores lie above the threshold, the mean of both networks' numbers, `same_above` which share
    of them are the same ones.
    """

    kind: str
    n_examples: Count = 0
    n_compared: Count | None = None
    threshold: Number | None = None
    agreement: Number | None = None
    n_above: Number | None = None
    same_above: Number | None = None
    kl_divergence: Number | None = None
    accuracy: Number | None = None
    original_accuracy: Number | None = None
    cosine: Number | None = None
    least_cosine: Number | None = None
    relative_error: Number | None = None
    r_squared: Number | None = None
    max_relative_error: Number | None = None
    mean_relative_error: Number | None = None
    notes: list[str] = []


class Quality(_Section):
    """Of a language model, or of outputs: the worst of each figure over all of them, and in `worst` of which it is."""

    perplexity: Number | None = None
    original_perplexity: Number | None = None
    ratio: Number | None = None
    accuracy: Number | None = None
    original_accuracy: Number | None = None
    top1_agreement: Number | None = None
    kl_divergence: Number | None = None
    cosine: Number | None = None
    least_cosine: Number | None = None
    relative_error: Number | None = None
    max_relative_error: Number | None = None
    mean_relative_error: Number | None = None
    outputs: dict[str, Output] = {}
    worst: dict[str, str] = {}
    labels: str | None = None


class Memory(_Section):
    """Bytes of the process: before the graph is opened, when it is, and the peaks; None where the system tells not.

    `loading` is what opening the graph adds, resident: its peak, and what there is after. `running` is the most that
    opening and running add, of a decoder with a text of so many `n_tokens`, and what it grew by `per_thousand_tokens`.
    """

    start: dict[str, Count | None] = {}
    loaded: dict[str, Count | None] = {}
    loading: dict[str, Count | None] = {}
    running: dict[str, Count | None] = {}
    peak_resident: Count | None = None
    peak_private: Count | None = None


class Speed(_Section):
    """What `bench` says of a graph; `measured` is false where the recipe leaves it out, `failure` why it could not.

    `latency_error` is the latency's relative standard error. Those of artifact and original were timed in turn.
    `processor_seconds` are of a run on one thread, which others on the machine change little: measured where the
    artifact seemed to be the slower one.
    """

    measured: bool = True
    failure: str | None = None
    kind: str | None = None
    threads: Count | None = None
    load_seconds: Number | None = None
    load_cpu_seconds: Number | None = None
    memory: Memory | None = None
    decode_tokens_per_second: Number | None = None
    prefill_tokens_per_second: Number | None = None
    latency_seconds: Number | None = None
    latency_error: Number | None = None
    processor_seconds: Number | None = None
    input_shapes: dict[str, list[int]] | None = None


class Size(_Section):
    """Bytes of every file that running the artifact needs."""

    bytes: Annotated[int, Field(ge=1, lt=2**62)]
    files: dict[str, Count] = {}
    original_bytes: Count | None = None


class Trial(_Section):
    """A student that a search judged; its accuracy is None where it was not."""

    stage: str
    epoch: Count
    reward: Number
    student: str
    parameters: Count
    accuracy: Number | None


class Teacher(_Section):
    parameters: Count


class Search(_Section):
    """How a student was searched for, as the page draws it."""

    trials: list[Trial] = []
    removed: list[str]
    shrunk: list[Annotated[tuple[str, str, Number], Field(strict=False)]]
    teacher: Teacher
    policy: str
    n_judged: Count
    measure: str
    validation: str
    best: str


class Step(_Section):
    """Of what a structure pass says, that which is shown."""

    parameters: Count | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _of_a_student(self) -> Step:
        if self.search is not None and self.parameters is None:
            raise ValueError("a student was found, and not how many parameters it has")
        return self


class Allocation(_Section):
    """Of what is said on chosen widths, that which is shown; the loss is None before it is measured."""

    kind: str
    predicted_loss: Number
    target_size: Count | None = None
    loss: Number | None = None


class Recipe(_Section):
    """Of a recipe, that which is shown."""

    name: str | None = None
    gates: dict[str, Number | None] | None = None


def _as(shape: type[BaseModel]) -> AfterValidator:
    """Facts are held against a shape, and stay as they are, in their order."""

    def held(facts: Facts) -> Facts:
        shape.model_validate(facts)
        return facts

    return AfterValidator(held)


class Blame(_Section):
    """Alike tensors, what changed them, and the share of the loss that goes when they are the original's again."""

    tensors: str
    by: str
    share: Number


class Gates(_Section):
    """Whether the recipe's limits are kept, a sentence for each that is not, one for each that few data leave open.

    sizes   of an artifact of several networks, those of the smaller ones by name; `failures` has them, too
    """

    passed: bool = True
    failures: list[str] = []
    sizes: dict[str, list[str]] = {}
    doubts: list[str] = []
    blame: list[Blame] = []

    @classmethod
    def of(cls, failures: list[str], sizes: dict[str, list[str]], doubts: list[str], blame: list[Blame]) -> Gates:
        """Of what the artifact's network misses, and what smaller ones do, each by its name."""
        missed = {name: found for name, found in sizes.items() if found}
        told = [f"size {name}: {failure}" for name, found in missed.items() for failure in found]
        found = cls(passed=not (failures or told), failures=failures + told, doubts=doubts, blame=blame)
        if missed:
            found.sizes = missed
        return found

    def of_size(self, size: str, largest: bool) -> list[str]:
        """What one of several networks misses."""
        told = {f"size {name}: {failure}" for name, found in self.sizes.items() for failure in found}
        return [each for each in self.failures if each not in told] if largest else self.sizes.get(size, [])


class Searched(_Section):
    """A search for a network that is fast enough, and the network that it came to, measured anew in the artifact.

    over        what was chosen: sizes, or layers
    target_latency, target_speedup  what was asked for: seconds, or times the original's speed
    threads     of onnxruntime; None: all cores
    n_measured  networks; front.json has them
    tau         of all that was predicted and then measured: of the time, and of the loss
    choices     of the network, by what they are of
    latency, original  seconds of both, which alternated in a process of their own
    spread      of the pairs, as a share
    fastest     what the fastest network that was measured took: seconds, or a share of the original's time
    """

    over: str
    target_latency: float | None = None
    target_speedup: float | None = None
    threads: int | None = None
    batch: Count = 1
    n_measured: Count
    tau: list[float] | None = None
    choices: dict[str, Any] = {}
    latency: float | None = None
    original: float | None = None
    spread: float | None = None
    fastest: float | None = None


class Binary(_Section):
    """What binary layers take and run as."""

    layers: Count
    bytes: Count
    float_bytes: Count
    runs_as: dict[str, Count] = {}
    each: dict[str, str] = {}


class Report(_Section):
    """Sections in the order of the file; what was not said is not written.

    identity     which run it was
    cost         by stage
    skipped      tensors that stay as they are, each with the reason
    learning     what gradient steps came to
    structure    of each pass that made the network smaller, or trained it before it was encoded
    allocation   where widths were chosen per tensor
    search       where a network was searched that is fast enough
    sizes        of an artifact of several networks, what is said of each; sizes.json has the rest
    errors       ‖W − Ŵ‖ / ‖W‖ by tensor
    sha256       of every file
    extracted    of which artifact this is one size alone
    seal         SHA-256 of report.html and README.md, and of all else that compression.json says
    """

    compressor: str | None = None
    source: Source | None = None
    recipe: Annotated[Facts, _as(Recipe)] | None = None
    seed: int | None = None
    mode: str | None = None
    identity: Identity | None = None
    data: Data | None = None
    versions: dict[str, str] | None = None
    cost: dict[str, Stage] | None = None
    skipped: dict[str, str] | None = None
    learning: list[Facts] | None = None
    structure: list[Annotated[Facts, _as(Step)]] | None = None
    proof: Proof | None = None
    quality: Quality | None = None
    least_onnxruntime: str | None = None
    allocation: Annotated[Facts, _as(Allocation)] | None = None
    binary: Binary | None = None
    search: Searched | None = None
    sizes: dict[str, Facts] | None = None
    speed: Speed | None = None
    original_speed: Speed | None = None
    size: Size | None = None
    errors: dict[str, Number] | None = None
    gates: Gates | None = None
    sha256: dict[str, str] | None = None
    extracted: dict[str, str] | None = None
    seal: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """What was said, as the file holds it."""
        return self.model_dump(exclude_unset=True)

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n"


def misshapen(content: dict[str, Any]) -> str:
    """What is wrong with a report, in a few words; empty where nothing is."""
    try:
        Report.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""
