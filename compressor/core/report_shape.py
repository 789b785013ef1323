"""The shape of what other code reads from compression.json, so that a damaged one is refused where it is opened."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(allow_inf_nan=False, gt=-1e300, lt=1e300)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Source(_Section):
    path: str | None = None
    architecture: str | None = None
    sha256: str | None = None
    arch: str | None = None
    tensor_bytes: Count = 0
    n_parameters: Count = 0


class _Size(_Section):
    bytes: Annotated[int, Field(ge=1, lt=2**62)]
    original_bytes: Count | None = None
    files: dict[str, Count] = {}


class _Stage(_Section):
    seconds: Number
    cpu_seconds: Number
    peak_memory: Count | None = None


class _Memory(_Section):
    peak_private: Count | None = None


class _Speed(_Section):
    measured: bool = True
    memory: _Memory | None = None
    failure: str | None = None
    latency_seconds: Number | None = None
    decode_tokens_per_second: Number | None = None


class _Output(_Section):
    kind: str
    n_examples: Count = 0
    agreement: Number | None = None
    kl_divergence: Number | None = None
    cosine: Number | None = None
    relative_error: Number | None = None
    notes: list[str] = []


class _Quality(_Section):
    """Of a language model, or of outputs: the worst of each figure over all of them."""

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
    mean_relative_error: Number | None = None
    outputs: dict[str, _Output] = {}
    worst: dict[str, str] = {}
    labels: str | None = None


class _Blame(_Section):
    tensors: str
    by: str
    share: Number


class _Binary(_Section):
    layers: Count
    bytes: Count
    float_bytes: Count
    runs_as: dict[str, Count] = {}


class _Gates(_Section):
    passed: bool = True
    failures: list[str] = []
    blame: list[_Blame] = []


class Report(_Section):
    """The shape of what other code reads from compression.json; whatever else is in it is not looked at."""

    source: _Source | None = None
    size: _Size | None = None
    speed: _Speed | None = None
    original_speed: _Speed | None = None
    gates: _Gates | None = None
    recipe: dict[str, Any] | str | None = None
    quality: _Quality | None = None
    data: dict[str, Any] | None = None
    errors: dict[str, Number] | None = None
    versions: dict[str, str] | None = None
    sha256: dict[str, str] | None = None
    cost: dict[str, _Stage] | None = None
    allocation: dict[str, Any] | None = None
    binary: _Binary | None = None


def misshapen(content: dict[str, Any]) -> str:
    """What is wrong with a report, in a few words; empty where nothing is."""
    try:
        Report.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""
