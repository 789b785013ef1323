#!/usr/bin/env python3
"""Runs tiny networks of many architectures as a user would: scripts/families.py [--only NAME…] [--seconds 300].

Each network of scripts/family_models.py is saved as transformers saves it, planned (`--dry-run`) and run at eight bits
with float activations, in a process of its own. The artifact is then run in plain onnxruntime and compared with the
original's forward on the decoded weights: texts of 17, 128, 300 and 700 tokens, and, where the graph has a cache, one
token at a time against the whole. What is measured already is kept (`--again` measures it anew). Writes
docs/measured/families.json, and the table of docs/families.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measured import markdown, read_results, write_results  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from family_models import Family
    from torch import nn

LENGTHS = (17, 128, 300, 700)
STEPS = 140
"""Tokens that are read one by one: beyond every window, and beyond what a run's own proof looks at."""
LARGEST = 1e-3
RECIPE = """
name: families
description: Eight bits per weight, float activations.
needs: text to calibrate on.
passes:
  - pass: affine
    bits: 8
    group: 16
embeddings: {bits: 8, group: 16}
export: {activations: exact}
calibration: {tokens: 512, window: 64}
evaluation: {tokens: 256, window: 64, speed: false}
"""


def families_table(results: dict[str, Any]) -> str:
    """A row for each network: what plan and run said, and how far the artifact is from the original's forward."""
    titles = ["network", "class", "plan", "run", "cache", *(f"{n} tokens" for n in LENGTHS), "step by step"]
    rows = []
    for name, found in results.items():
        errors = [_error(found.get("errors", {}).get(str(n))) for n in LENGTHS]
        cache = {True: "yes", False: "no", None: None}[found.get("cache")]
        steps = _error(found.get("steps"))
        rows.append([name, f"`{found['kind']}`", found["plan"], found["run"], cache, *errors, steps])
    return markdown(titles, rows) + f"\n\n{_summary(results)}" + _reasons(results)


def _summary(results: Mapping[str, Any]) -> str:
    done = [found for found in results.values() if found["run"] == 0]
    right = [found for found in done if is_right(found)]
    cached = sum(bool(found.get("cache")) for found in right)
    refused = sum(found["plan"] == found["run"] != 0 for found in results.values())
    bugs = sum(found["run"] == 5 for found in results.values())
    return (
        f"{len(results)} networks: {len(right)} right within {LARGEST:g} of the largest output, {cached} of them with "
        f"a cache; {len(done) - len(right)} not; {refused} refused by plan and run alike; {bugs} with status 5."
    )


def _reasons(results: Mapping[str, Any]) -> str:
    said = [f"* {name}: {found['why'].replace('](', '] (')}" for name, found in results.items() if found.get("why")]
    return "\n\nWhat was said of those without a cache, refused or wrong:\n\n" + "\n".join(said) if said else ""


def is_right(found: Mapping[str, Any]) -> bool:
    """Whether all errors of a network that ran are small."""
    errors = [*found.get("errors", {}).values(), *([found["steps"]] if "steps" in found else [])]
    return bool(errors) and all(isinstance(error, float) and error <= LARGEST for error in errors)


def _error(error: float | str | None) -> str | None:
    return f"{error:.0e}" if isinstance(error, float) else error


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Plan, run and errors of one network, in this process."""
    warnings.simplefilter("ignore")
    from family_models import FAMILIES

    family, recipe, out = FAMILIES[name], folder / "recipe.yaml", folder / "artifact"
    recipe.write_text(RECIPE)
    model = family.write(folder / "model")
    words = [str(model), "--recipe", str(recipe), "--output", str(out)]
    if family.takes != "text":
        _write_examples(family, folder / "examples.npz")
        words += ["--data", str(folder / "examples.npz")]
    found: dict[str, Any] = {"kind": family.kind}
    found["plan"], planned, plan_error = _called([*words, "--dry-run"])
    began = time.perf_counter()
    found["run"], _, run_error = _called(words)
    found["seconds"] = round(time.perf_counter() - began, 1)
    note = re.search(r"no KV cache: [^;]*; (.*)", planned)
    why = run_error or plan_error or (note[1] if note else "")
    if found["run"] == 0:
        found |= _compared(family, out)
    if why:
        found["why"] = " ".join(why.replace(f"{folder}/", "").split())[:300]
    return found


def _called(words: list[str]) -> tuple[int, str, str]:
    """Status, standard output, and the last line of the errors, of the command."""
    from compressor.cli.commands import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    last = (err.getvalue().strip().splitlines() or [""])[-1] if status else ""
    return status, out.getvalue(), last


def _compared(family: Family, out: Path) -> dict[str, Any]:
    """Errors of the artifact in plain onnxruntime."""
    import onnxruntime

    import compressor

    original = compressor.load(out)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    pasts = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    found: dict[str, Any] = {"cache": bool(pasts)} if family.is_decoder else {}
    if family.takes != "text":
        from family_models import example

        inputs = example(family, 2)
        found["errors"] = {str(LENGTHS[0]): _worst(session, _expected(original, inputs), inputs, names)}
        return found
    found["errors"] = {}
    for n in LENGTHS:
        inputs = text_inputs(n)
        expected = _expected(original, {key: value for key, value in inputs.items() if key != "attention_mask"})
        given = inputs | {entry.name: _empty(entry) for entry in pasts}
        found["errors"][str(n)] = _worst(session, expected, given, names)
    if pasts:
        found["steps"] = step_error(session, pasts, _expected(original, {"input_ids": text_inputs(STEPS)["input_ids"]}))
    return found


def text_inputs(n: int) -> dict[str, np.ndarray]:
    """A text of so many tokens, without padding."""
    import numpy as np

    ids = np.random.default_rng(n).integers(2, 290, (1, n))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids),
            "position_ids": np.arange(n)[None]}  # fmt: skip


def _expected(original: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    from compressor.core.outputs import named_outputs

    known = {"input_ids"} if "input_ids" in inputs and "decoder_input_ids" not in inputs else set(inputs)
    with torch.no_grad():
        found = original(**{key: torch.from_numpy(value) for key, value in inputs.items() if key in known})
    return {name: tensor.float().numpy() for name, tensor in named_outputs(found).items()}


def _worst(session: Any, expected: Mapping[str, np.ndarray], inputs: Mapping[str, Any], names: set[str]) -> float | str:
    outputs = [entry.name for entry in session.get_outputs() if entry.name in expected]
    if len(names) == len(inputs) == 1:  # an only input has no name
        inputs = dict(zip(names, inputs.values(), strict=True))
    try:
        found = session.run(outputs, {name: inputs[name] for name in names})
    except Exception as error:  # onnxruntime's own errors share no narrower class
        return f"fails: {str(error).splitlines()[0][:120]}"
    return max((_difference(a, expected[name]) for a, name in zip(found, outputs, strict=True)), default=9.0)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """max|a − b| / max|b|."""
    import numpy as np

    if found.shape != expected.shape or not np.isfinite(found).all():
        return 9.0
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _empty(entry: Any) -> np.ndarray:
    import numpy as np

    shape = [each if isinstance(each, int) else (1 if axis == 0 else 0) for axis, each in enumerate(entry.shape)]
    return np.zeros(shape, np.float32)


def step_error(session: Any, pasts: list[Any], expected: Mapping[str, np.ndarray]) -> float | str:
    """The largest error of any token that was read alone, against the whole text's."""
    import numpy as np

    ids, names = text_inputs(STEPS)["input_ids"], {entry.name for entry in session.get_inputs()}
    presents = [entry.name.replace("past_key_values", "present") for entry in pasts]
    state, steps = {entry.name: _empty(entry) for entry in pasts}, []
    try:
        for i in range(STEPS):
            inputs = {"input_ids": ids[:, i : i + 1], "attention_mask": np.ones((1, i + 1), np.int64)}
            fed = {name: value for name, value in inputs.items() if name in names} | state
            logits, *found = session.run(["logits", *presents], fed)
            steps.append(logits)
            state = dict(zip(state, found, strict=True))
    except Exception as error:  # onnxruntime's own errors share no narrower class
        return f"fails: {str(error).splitlines()[0][:120]}"
    return _difference(np.concatenate(steps, axis=1), expected["logits"])


def _write_examples(family: Family, path: Path) -> None:
    import numpy as np
    from family_models import example

    np.savez(path, **example(family, 8))


def in_a_process(name: str, seconds: int) -> dict[str, Any]:
    """What `measure` finds, or that it took too long or died. In a fork, which need not import or warm anything."""
    from family_models import FAMILIES

    failed = {"kind": FAMILIES[name].kind, "plan": None, "run": None}
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        answer, said = Path(scratch) / "answer.json", Path(scratch) / "stderr"
        child = multiprocessing.get_context("fork").Process(target=_answer, args=(name, Path(scratch), answer, said))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
            return failed | {"why": f"took over {seconds} s"}
        if answer.exists():
            return json.loads(answer.read_text())
        last = (said.read_text().strip().splitlines() or [f"ended with {child.exitcode}"])[-1]
        return failed | {"why": last[:300].replace(scratch, "")}


def _answer(name: str, folder: Path, answer: Path, said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        found = json.dumps(measure(name, folder))
        answer.write_text(found)


def _warm() -> None:
    """Imports all that a run does, and lets torch fill its tables for tracing: forks share it."""
    from family_models import DECODERS, built

    import compressor.cli.commands
    import compressor.evaluate.judge
    import compressor.run.pipeline
    from compressor.core.tensors import EncodedTensors
    from compressor.export.causal import kv_cache, trace_decoder

    assert compressor.cli.commands and compressor.evaluate.judge and compressor.run.pipeline
    warnings.simplefilter("ignore")
    module = built(DECODERS["gpt2"])
    cache = kv_cache(module)
    assert not isinstance(cache, str)
    names: Any = EncodedTensors([])
    for name, _ in module.named_parameters(remove_duplicate=False):
        names.tied[name] = name
    trace_decoder(module, cache, names, ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks of these names, or of this kind: decoders")
    parser.add_argument("--again", action="store_true", help="measure anew what is measured")
    parser.add_argument("--seconds", type=int, default=300, help="for each network")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    from family_models import DECODERS, FAMILIES

    names = {"decoders": list(DECODERS), "others": [name for name in FAMILIES if name not in DECODERS]}
    chosen = [each for name in given.only or FAMILIES for each in names.get(name, [name])]
    missing = [name for name in chosen if given.again or name not in read_results("families")]
    if missing:
        _warm()
    for name in missing:
        found = in_a_process(name, given.seconds)
        results = read_results("families") | {name: found}
        write_results("families", {each: results[each] for each in FAMILIES if each in results})
        print(name, json.dumps({key: value for key, value in found.items() if key != "kind"}), flush=True)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_tables.py")], check=True)


if __name__ == "__main__":
    main()
