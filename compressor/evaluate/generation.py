"""Text from the artifact of a language model, in onnxruntime: to see that it speaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compressor.checkpoints.positions import positions_of
from compressor.core.errors import CheckpointError


def generate_text(
    directory: Path, prompt: str, n: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, up to `n` tokens and as many as the network has positions for.

    At temperature 0 the likeliest token each time.

    Raises:
        CheckpointError: It is no artifact of a language model, or the prompt is empty or too long for it.
    """
    from tokenizers import Tokenizer

    from compressor.evaluate.installation import graph_to_run
    from compressor.evaluate.session import DecoderSession

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: has no tokenizer.json; give the artifact of a language model")
    tokenizer = Tokenizer.from_file(str(file))
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise CheckpointError(f"{directory}: the prompt has no tokens; give some text to go on from")
    session = DecoderSession(graph_to_run(directory))
    longest = positions_of(session.config)
    if longest is not None:
        if len(ids) > longest:
            raise CheckpointError(
                f"{directory}: the prompt has {len(ids)} tokens, and the network positions for {longest}; shorten it"
            )
        n = min(n, longest - len(ids) + 1)  # the last token is only written, not read
    tokens: list[int] = []
    shown = ""
    for token in session.generate(ids, n, temperature=temperature, top_p=top_p, seed=seed):  # type: ignore[arg-type]
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("�"):  # an unfinished character
            yield text[len(shown) :]
            shown = text
