"""What a text begins with that a network writes; no numpy, so that a plan knows it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import DataError

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint

BETWEEN_DOCUMENTS = "<|endoftext|>"


def start_token(checkpoint: Checkpoint, tokenizer: Path) -> int:
    """What a document begins after: the separator of the pre-training if the tokenizer has it, else the config's bos.

    A chat model's bos opens a turn; after the separator it writes as it was pre-trained.

    Raises:
        DataError: There is neither, or the network is no decoder.
    """
    if checkpoint.family != "decoder":
        raise DataError(f"{checkpoint.path}: {checkpoint.architecture} writes no text; set generated to 0")
    file = tokenizer / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", []) if file.is_file() else []
    config = checkpoint.config or {}
    named = [token["id"] for token in added if token["content"] == BETWEEN_DOCUMENTS]
    ids = [*named, config.get("bos_token_id"), config.get("eos_token_id")]
    for found in ids:
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and not isinstance(found, bool) and found < config.get("vocab_size", found + 1):
            return found
    raise DataError(
        f"{checkpoint.path}: names no token that text begins with; write bos_token_id in config.json, or set generated "
        "to 0"
    )
