"""Text from the artifact of a language model, in onnxruntime: to see that it speaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compressor.checkpoints.architecture import family_of
from compressor.checkpoints.positions import positions_of
from compressor.core.errors import CheckpointError, DataError
from compressor.core.reading import read_json
from compressor.core.sizes import graph_of

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""At the end of a text: the first bytes of a character."""


def generate_text(
    directory: Path, prompt: str, n: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    chat: bool = False, size: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Pieces of text that continue `prompt`, or answer it where the network is an encoder-decoder: up to `n` tokens and
    as many as the network has positions for.

    Args:
        temperature: 0 takes the likeliest token each time.
        chat: The prompt is what a user says, in the tokenizer's template of a chat; the text is the answer.
        size: Of an artifact of several sizes, which one; by default the largest.

    Raises:
        CheckpointError: It is no artifact of a language model, or of a chat's, or the prompt is empty or too long.
        DataError: Its tokenizer cannot be read.
    """
    from compressor.data.tokens import explained, fast_tokenizer
    from compressor.evaluate.installation import graph_to_run
    from compressor.evaluate.pair_session import PairSession, is_pair
    from compressor.evaluate.session import DecoderSession

    graph = graph_of(directory, size)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: has no tokenizer.json; give the artifact of a language model")
    tokenizer = fast_tokenizer(file)
    asked = _turn(directory, prompt) if chat else prompt
    with explained(file):
        ids = tokenizer.encode(asked, add_special_tokens=not chat).ids
    if not ids:
        raise CheckpointError(f"{directory}: the prompt has no tokens; give some text to go on from")
    session = PairSession(directory) if is_pair(directory) else DecoderSession(graph_to_run(graph))
    if isinstance(session, PairSession) and "input_ids" not in session.encoder.inputs:
        reads = ", ".join(session.encoder.inputs)
        raise CheckpointError(f"{directory}: its encoder reads {reads}, and a prompt is text; run it in Python instead")
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    if isinstance(session, DecoderSession) and not session.past and family_of(config) != "decoder":
        raise CheckpointError(f"{directory}: is no language model's; found {config.get('architectures')}")
    longest = positions_of(config)
    if longest is not None:
        if len(ids) > longest:
            raise CheckpointError(
                f"{directory}: the prompt has {len(ids)} tokens, and the network positions for {longest}; shorten it"
            )
        before = 1 if isinstance(session, PairSession) else len(ids)
        n = min(n, longest - before + 1)  # the last token is only written, not read
    tokens: list[int] = []
    text = shown = ""
    if isinstance(session, PairSession):
        written = session.generate({"input_ids": np.array([ids], np.int64)}, n, temperature, top_p, seed)
    else:
        written = session.generate(np.array(ids, np.int64), n, temperature, top_p, seed)
    for token in written:
        tokens.append(token)
        with explained(file):
            text = tokenizer.decode(tokens)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if text != shown:  # nothing finishes it any more
        yield text[len(shown) :]


def _turn(directory: Path, prompt: str) -> str:
    """What a chat's template makes of one thing that a user says, up to where the answer begins.

    A template is a program: it gets so much time and memory, and what it raises is its own.
    """
    from compressor.data.tokens import auto_tokenizer
    from compressor.runtime.bounded import Exceeded, bounded

    asked = [{"role": "user", "content": prompt}]
    try:
        tokenizer = auto_tokenizer(directory)
        return bounded(lambda: str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)))
    except (DataError, ValueError, Exceeded) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{directory}: no template of a chat can be used: {first}; leave --chat out") from error
