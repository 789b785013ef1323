"""Which network a checkpoint belongs to: from `--arch`, a config, the file itself, or keys and shapes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.reach import offline, to_build
from compressor.checkpoints.source import Source, TensorInfo
from compressor.checkpoints.ties import architecture_of
from compressor.core.errors import CheckpointError, is_out_of_memory
from compressor.core.references import call

if TYPE_CHECKING:
    from torch import nn

DECODERS = ("ForCausalLM", "LMHeadModel")
ENCODER_HEADS = (
    "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
ENCODER_TYPES = frozenset((
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3",
    "layoutlm", "lilt", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra",
    "nomic_bert", "nystromformer", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "splinter", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso",
))  # fmt: skip
"""BERT's kin: they take text alone."""
TOKEN_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class Architecture:
    """A network by name. `construct` takes the config and returns the module, with whatever weights."""

    name: str
    family: str
    construct: Callable[[dict[str, Any] | None], nn.Module]


def resolve(path: Path, source: Source, config: dict[str, Any] | None, reference: str | None) -> Architecture:
    """The architecture of a checkpoint; where nothing determines it, one that refuses to be built."""
    if reference is not None:
        return Architecture(reference, "module", lambda _: call_reference(reference))
    if config is not None:
        name = architecture_of(config) or str(config.get("model_type", "unknown"))
        return Architecture(name, family_of(config), lambda config: build_transformers(path, config or {}))
    if source.module is not None:
        return Architecture(type(source.module).__name__, "module", lambda _: _copy(source.module))
    from compressor.checkpoints.vision import recognise

    known = recognise(source.tensors)
    if known is not None:
        return Architecture(known.name, "module", lambda _: known.build())
    return Architecture("unknown", "module", lambda _: _refuse(path, source.tensors))


def family_of(config: dict[str, Any]) -> str:
    """ "decoder" for causal language models, "encoder" for BERT's kin, "module" for the rest."""
    name, model_type = architecture_of(config), config.get("model_type")
    if name.endswith(DECODERS):
        return "decoder"
    if model_type in ENCODER_TYPES and (not name or name.endswith((*ENCODER_HEADS, "Model"))):
        return "encoder"
    return "encoder" if name.endswith("ForMaskedLM") else "module"


_MISCONFIGURED = (
    TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError, AssertionError, ArithmeticError,
    ImportError, NotImplementedError,
)  # fmt: skip
_LARGEST = 2**40
_MOST = {
    "theta": 2**40, "vocab": 2**28, "layer": 10_000, "position": 2**24, "expert": 2**15, "window": 2**24,
    "groups": 100_000, "heads": 100_000,
    **dict.fromkeys(("dim", "hidden", "intermediate", "d_model", "d_kv", "d_ff", "embd", "inner", "channels"), 2**20),
}  # fmt: skip
"""Word in a setting's name, the first that fits -> the largest number that a network may have there."""
_BOUND = "limit"
"""At the end of a setting's name: where a number that is infinite is none."""


def build_transformers(path: Path, config: dict[str, Any]) -> nn.Module:
    """The transformers model of a config. Classes come from the installed library only: no remote code."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(config.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: config.json has model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; code inside of checkpoints is never run; give "
            "--arch module:callable"
        )
    config = _with_special_floats(config)
    refuse_implausible(path, config)
    described = to_build(path, config)
    name = architecture_of(config)
    model_class = getattr(transformers, name, None) if name else None
    if name and not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{path}: config.json names architecture '{name}', which transformers {transformers.__version__} "
            "does not have; code inside of checkpoints is never run; give --arch module:callable"
        )
    try:
        with offline():
            settings = transformers.CONFIG_MAPPING[model_type].from_dict(described)
            if model_class:
                return model_class(settings)
            return transformers.AutoModel.from_config(settings, trust_remote_code=False)
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: config.json asks for something that is not in the folder, and nothing is ever fetched for a "
            f"config; {str(error).splitlines()[0]}; write out what it names{_named_backbone(config)}, or give --arch "
            "module:callable"
        ) from error
    except (*_MISCONFIGURED, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: config.json does not describe a {name or model_type}; {error}; correct the config"
        ) from error


def _named_backbone(config: dict[str, Any]) -> str:
    return f", as backbone '{config['backbone']}'" if isinstance(config.get("backbone"), str) else ""


def _with_special_floats(value: Any) -> Any:
    """A config whose infinite numbers, which transformers writes as {"__float__": "Infinity"}, are numbers."""
    if isinstance(value, dict):
        if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_special_floats(each) for key, each in value.items()}
    return [_with_special_floats(each) for each in value] if isinstance(value, list) else value


def refuse_implausible(path: Path, config: dict[str, Any]) -> None:
    """Refuses numbers that would build modules, or fill buffers, for hours."""
    for key, value in _numbers(config):
        most = next((most for word, most in _MOST.items() if word in key), _LARGEST)
        if not abs(value) <= most and not (key.endswith(_BOUND) and math.isinf(value)):
            raise CheckpointError(
                f"{path}: config.json has {key} {_short(value)}; expected at most {most:,}; correct it"
            )


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a config, its parts' and lists' too, each with the nearest name."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, key)
    elif type(config) in (int, float):
        yield key, config


def _short(value: int | float) -> str:
    """A whole number of any length, which no float need hold."""
    return f"{value:.6g}" if isinstance(value, float) or abs(value) < 10**300 else f"{value!s:.8}…"


def call_reference(reference: str) -> nn.Module:
    """The network that `module:callable` returns, found from the working directory and PYTHONPATH."""
    from torch import nn

    module = call(reference, "--arch", CheckpointError, lambda found: _needs_no_arguments(reference, found))
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"--arch {reference}: returned a {type(module).__name__}; a torch.nn.Module was expected")
    return module


def _needs_no_arguments(reference: str, found: Any) -> None:
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise CheckpointError(
            f"--arch {reference}: must be callable without arguments; {error}; write a function that fills them in"
        ) from error
    except ValueError:
        return  # built in, without a signature: the call itself will tell


def _copy(module: nn.Module) -> nn.Module:
    """A copy; weights that a hook has computed, which torch does not copy, are what they are by then."""
    import copy

    from torch import Tensor

    for layer in module.modules():
        made = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor) and not value.is_leaf}
        vars(layer).update({name: value.detach() for name, value in made.items()})
    return copy.deepcopy(module)


def _refuse(path: Path, tensors: dict[str, TensorInfo]) -> nn.Module:
    if any(name.endswith(TOKEN_TABLES) for name in tensors):
        raise CheckpointError(
            f"{path}: holds the weights of a language model, but its config and tokenizer are missing; head "
            "counts and rotary bases are not in the weights; put config.json and tokenizer.json beside the "
            "file, or give --arch DIR with a folder that has them (config.json needs model_type, "
            "architectures, num_attention_heads, num_key_value_heads and rope_theta)"
        )
    first = next(iter(tensors), "none")
    raise CheckpointError(
        f"{path}: its architecture is unknown; found {len(tensors)} tensors (the first is '{first}') and no "
        "config.json; give --arch module:callable, a function that returns the module, or --arch DIR with "
        "a config.json"
    )
