"""The examples under the help of each command."""

from __future__ import annotations

STATUSES = (
    "`compress MODEL` is short for `compress run MODEL`. Exit status: 0 done, 1 a gate failed, 2 wrong usage "
    "or recipe, 3 unreadable input, 4 out of disk or memory, 5 our bug or a failed verification, 130 interrupted."
)
EXAMPLES = {
    "": [
        "compress smollm2/ --recipe llm-2bit",
        "compress model.pt --recipe llm-2bit --dry-run",
        'compress generate smollm2-llm-2bit "The capital of France is"',
    ],
    "run": [
        "compress smollm2/ --recipe llm-2bit -o small",
        "compress weights.pt --arch mynet:build --recipe encoder-4bit --data inputs.npz",
        "compress smollm2/ --recipe llm-3bit --set trellis.group=128 --set calibration.tokens=8192",
        "compress resnet.pt --arch mynet:build --recipe cnn-explain --data images.npz --target-flops 60%",
        "compress smollm2/ --recipe llm-2bit --dry-run",
    ],
    "batch": [
        "compress batch models.yaml -o artifacts",
        "compress batch 'vision/*.pth' --recipe cnn-int8 --recipe cnn-4bit --data photos/ --set gates.max_loss=2%",
        "compress batch models.yaml -o artifacts --resume",
        "compress batch models.yaml -o artifacts --engine ray --address 10.0.0.1:6379",
    ],
    "recipes": ["compress recipes", "compress recipes llm-2bit"],
    "inspect": ["compress inspect model.pt", "compress inspect smollm2-llm-2bit --json"],
    "eval": ["compress eval smollm2-llm-2bit", "compress eval smollm2-llm-2bit --data moby-dick.txt"],
    "bench": ["compress bench smollm2-llm-2bit --threads 1", "compress bench resnet-cnn-sorted --size 50"],
    "extract": ["compress extract resnet-cnn-sorted --size 50 -o half"],
    "install": ["compress install smollm2-llm-2bit", "compress install smollm2-llm-2bit --remove"],
    "verify": ["compress verify smollm2-llm-2bit", "compress verify smollm2-llm-2bit --quick --json"],
    "diff": ["compress diff smollm2-llm-2bit smollm2-llm-4bit"],
    "report": ["compress report smollm2-llm-2bit", "compress report smollm2-llm-2bit smollm2-llm-4bit -o page.html"],
    "generate": ['compress generate smollm2-llm-2bit "The capital of France is" --tokens 40'],
}
COMMANDS = tuple(filter(None, EXAMPLES))


def epilog(command: str) -> str:
    """The examples of a command as typer prints them, one per line."""
    # \b keeps typer from filling the lines of a paragraph.
    lines = "\n".join(f"  {example}" for example in EXAMPLES[command])
    tail = f"\n\n{STATUSES}" if command == "" else ""
    return f"Examples:\n\n\b\n{lines}{tail}"
