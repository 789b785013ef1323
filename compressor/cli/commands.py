"""The command: parsing, printing, exit statuses; nothing else. Whatever is slow to import is imported when used."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from compressor.cli.exit_status import INTERRUPTED, explained
from compressor.cli.help_examples import COMMANDS, epilog
from compressor.core.errors import GateFailed, ResourceError, UsageError, suggestion
from compressor.core.failures import RESOURCES
from compressor.core.options import RunOptions
from compressor.core.terminal import failure_of, open_streams, printable
from compressor.runtime.supervisor import HELP_OPTIONS

if TYPE_CHECKING:
    from compressor.core.artifact import Artifact

_RESUMABLE: list[Callable[[], bool]] = []
"""Tell whether the command that is running has work that --resume would go on from."""


class Format(str, Enum):
    onnx = "onnx"
    safetensors = "safetensors"


class EngineName(str, Enum):
    local = "local"
    ray = "ray"


class _Group(TyperGroup):
    """`compress MODEL …` is `compress run MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in HELP_OPTIONS:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Arch = Annotated[
    str | None,
    typer.Option(metavar="DIR|MODULE:CALLABLE", help="A folder with config.json and tokenizer, or a function that "
                 "returns the network, where the file does not say."),
]  # fmt: skip
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let code inside of the file run. Only for files that you trust.")
]
TrustRecipe = Annotated[
    bool, typer.Option("--trust-recipe", help="Let a recipe or manifest that somebody else wrote name code that is run "
                       "(module:callable, trust_pickle) or a Ray cluster.")
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ArchAgain = Annotated[
    str | None,
    typer.Option("--arch", metavar="DIR|MODULE:CALLABLE", help="As in the run. What the artifact names is not run."),
]
Original = Annotated[
    str | None,
    typer.Option(metavar="PATH", show_default="where it was", help="The network that it was made from."),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="NAME", show_default="the largest", help="Of an artifact of several sizes: 50."),
]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory that compress wrote.")]


@app.callback(epilog=epilog(""))
def _about(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Compresses trained networks to ONNX that plain onnxruntime runs."""


@app.command(epilog=epilog("run"))
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, a name on its "
                                         "hub (ORG/NAME@REVISION), or a .safetensors, .pt, .pth, .bin, .pt2, .gguf or "
                                         ".onnx file.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="NAME|FILE", show_default=False,
                                        help="Required; see `compress recipes`.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", show_default="MODEL-RECIPE",
                                                help="Where the artifact goes.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="Calibration data: text, JSONL, "
                    "images by class, .npz or .safetensors arrays. For text a sample is built in.")] = None,
    eval: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="Evaluation data, of the same "
                    "kinds; disjoint from the calibration data.")] = None,
    arch: Arch = None,
    trust_pickle: TrustPickle = False,
    trust_recipe: TrustRecipe = False,
    format: Annotated[Format, typer.Option(help="onnx, or only the packed weights.")] = Format.onnx,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="PASS.KEY=VALUE", help="Change a setting of the "
                    "recipe; also calibration.KEY, embeddings.KEY, and so on. Repeatable.")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Of n2n: start from the policies in FILE if it is "
                      "there, and save there what they have learned.")] = None,
    target_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Give each tensor its own width, so that all "
                           "files stay below 60MB, say, within 1 %. Where the recipe encodes nothing, its structure "
                           "pass removes as much as that takes.")] = None,
    target_flops: Annotated[str | None, typer.Option(metavar="SHARE", help="Of 50%, say: remove channels, heads and "
                            "neurons until so many multiplications are left; recipes with lrp, hesso or oto.")] = None,
    target_latency: Annotated[str | None, typer.Option(metavar="TIME", help="Of 5ms, say: search for the network that "
                              "takes no longer in onnxruntime on this machine, and loses least: among sizes of a "
                              "sorted network, or integer and float layers.")] = None,
    target_speedup: Annotated[float | None, typer.Option(metavar="TIMES", help="The same for 2 times the original's "
                              "speed, say.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, show_default="all cores", help="Of onnxruntime, for "
                       "which that is.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a run, for which that is.")] = 1,
    max_loss: Annotated[str | None, typer.Option(metavar="SHARE", help="Of 5%, say: rise of perplexity, loss of "
                        "cosine, or points of accuracy. Makes the smallest artifact that is predicted to keep it, and "
                        "checks it as a gate; beside --target-size it is the gate alone.")] = None,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Refuse a plan that needs more memory than 4GB, "
                       "say, and tell what would need less.")] = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="A gate: all files together, as 60MB.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="A gate: what loading and running take in "
                          "onnxruntime, as 200MB.")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="A gate: times the original's speed.")] = None,
    min_agreement: Annotated[float | None, typer.Option(min=0, max=1, help="A gate: share of predictions that are "
                             "the original's.")] = None,
    standard: Annotated[bool, typer.Option("--standard", help="Standard ONNX operators only.")] = False,
    compat: Annotated[bool, typer.Option("--compat", help="A graph that older onnxruntimes run fast.")] = False,
    engine: Annotated[EngineName, typer.Option(help="Where blocks are encoded side by side, with --set "
                      "calibration.inputs=original: processes here, or tasks on a Ray cluster.")] = EngineName.local,
    workers: Annotated[int | None, typer.Option(min=1, show_default="1 here, else the cluster's cores", help="How many "
                       "of them at a time.")] = None,
    address: Annotated[str, typer.Option(help="Of the Ray cluster; `local` starts one.")] = "auto",
    device: Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N|auto", help="Where blocks of language models and "
                      "encoders are computed with; auto is a GPU where torch sees one.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, or why it "
                          "cannot be.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Compress MODEL by a recipe."""
    from compressor.core.quantities import parse_latency, parse_share, parse_size
    from compressor.plan.recipe_file import shipped_recipes

    if standard and compat:
        raise UsageError("--standard and --compat exclude each other; give one of them")
    gates = {
        "max_size": None if max_size is None else parse_size(max_size, "--max-size"),
        "max_memory": None if max_memory is None else parse_size(max_memory, "--max-memory"),
        "min_speedup": min_speedup, "min_agreement": min_agreement,
    }  # fmt: skip
    sets = [*(set_ or ()), *(f"gates.{name}={limit}" for name, limit in gates.items() if limit is not None)]
    if policy is not None:
        from compressor.passes.settings.n2n import refuse_overwriting

        refuse_overwriting(policy)
        sets += [f"n2n.policy_in={policy}"] * policy.exists() + [f"n2n.policy_out={policy}"]
    options = RunOptions(
        model=model, recipe=recipe, output=output, data=data, eval=eval, arch=arch, trust_pickle=trust_pickle,
        trust_recipe=trust_recipe, format=format.value, sets=tuple(sets),
        mode="standard" if standard else "compat" if compat else "default", seed=seed, resume=resume, force=force,
        target_size=None if target_size is None else parse_size(target_size, "--target-size"),
        target_flops=None if target_flops is None else parse_share(target_flops, "--target-flops"),
        max_loss=None if max_loss is None else parse_share(max_loss, "--max-loss"),
        max_ram=None if max_ram is None else parse_size(max_ram, "--max-ram"),
        engine=engine.value, workers=workers, address=address, device=device,
        target_latency=None if target_latency is None else parse_latency(target_latency, "--target-latency"),
        target_speedup=target_speedup, threads=threads, batch=batch,
    )  # fmt: skip
    _refuse_misspelt_command(model)
    if not recipe:
        raise UsageError(f"no recipe; write --recipe NAME. {suggestion('', shipped_recipes())}")
    if dry_run:
        _dry_run(options, json)
        return
    from compressor.run.prepare import first_recipe

    first_recipe(options)  # before torch is imported

    from compressor.core.artifact import Artifact, failed_directory, is_artifact
    from compressor.core.progress import make_progress
    from compressor.run.place import resumable

    _RESUMABLE.append(lambda: resumable(options.directory))
    from compressor.run.pipeline import run as compress
    from compressor.runtime.torchrun import is_first

    options = options.with_progress(make_progress(silent=json))
    try:
        artifact = compress(options)
    except GateFailed:
        failed = failed_directory(options.directory)
        if is_artifact(failed):
            _print_outcome(Artifact.open(failed), json)
        raise
    if is_first():
        _print_outcome(artifact, json)


def _print_outcome(artifact: Artifact, json: bool) -> None:
    if json:
        _print_json(artifact.report)
        return
    from compressor.report.tables import run_tables, show

    show(*run_tables(artifact.report, str(artifact.directory)))


def _dry_run(options: RunOptions, json: bool) -> None:
    from compressor.run.prepare import prepare

    start = prepare(options)
    reach = start.ladder.reach() if start.ladder else None
    if json:
        _print_json(start.plan.as_json() | ({"reach": reach} if reach else {}))
        return
    from compressor.report.tables import plan_tables, reach_line, show

    show(*plan_tables(start.plan), *([reach_line(*reach, options.target_size)] if reach else []))


def _refuse_misspelt_command(word: str) -> None:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1, cutoff=0.7)
    if near and not Path(word).exists():
        raise UsageError(f"{word}: no such model, and no such command. {suggestion(word, COMMANDS)}")


@app.command(epilog=epilog("batch"))
def batch(
    models: Annotated[list[str], typer.Argument(metavar="MANIFEST|MODEL…", help="A manifest in YAML, or models and "
                                                "patterns that match some.")],
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", metavar="NAME|FILE", show_default=False,
                                                     help="Of models on the line. Repeatable.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", show_default="the manifest's name",
                                                help="Where artifacts, logs and the summary go.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="Calibration data of models on the "
                    "line.")] = None,
    arch: Arch = None,
    trust_recipe: TrustRecipe = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="PASS.KEY=VALUE", help="A setting of their "
                    "recipes, gates.max_loss=5% for example. Repeatable.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, show_default="cores", help="At most so many at a "
                    "time, as far as their memory fits.")] = None,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", show_default="what is free", help="Of all jobs that "
                       "run at a time, by their plans.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Processes here, or a Ray cluster.")] = EngineName.local,
    address: Annotated[str, typer.Option(help="Of the Ray cluster; `local` starts one.")] = "auto",
    retries: Annotated[int, typer.Option(min=0, help="Of a job whose worker crashed.")] = 1,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", show_default="none", help="End a job that takes longer "
                       "than 30min or 2h, say; what it has finished stays for --resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is complete, go on with what is not.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace artifacts that are already there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Compress many models.

    By a manifest, or by the same recipes. One that fails stops none of the others.
    """
    from compressor.batch.jobs import JOURNAL, Batch, worst
    from compressor.batch.summary import Board, summary_table, totals
    from compressor.core.machine import available_memory, cores
    from compressor.core.quantities import parse_duration, parse_size
    from compressor.runtime.workers import Budget, LocalEngine, RayEngine

    planned = _batch_jobs(models, {"recipes": recipe, "data": data, "arch": arch}, set_ or [], trust_recipe)
    directory = output or Path(Path(models[0]).stem if models[0].endswith((".yaml", ".yml")) else "artifacts")
    budget = Budget(available_memory() if max_ram is None else parse_size(max_ram, "--max-ram"))
    limit = None if timeout is None else parse_duration(timeout, "--timeout")
    running = LocalEngine(limit) if engine is EngineName.local else RayEngine(address, limit)
    _RESUMABLE.append(lambda: (directory / JOURNAL).exists())
    many = Batch(planned, directory, running, jobs or cores(), budget, resume, force, retries)
    outcomes = many.run(Board(len(planned), silent=json))
    if json:
        _print_json([outcome.as_json() for outcome in outcomes])
    else:
        from compressor.report.tables import show

        show(summary_table(outcomes), f"{totals(outcomes)}. Summary in {directory}/summary.jsonl and summary.xml")
    if many.unwritten:
        raise ResourceError(many.unwritten)
    raise typer.Exit(worst(outcomes))


def _batch_jobs(models: list[str], settings: dict[str, Any], sets: list[str], trusted: bool) -> Any:
    from compressor.batch.manifest import jobs_of_line, read_manifest, trusting

    given = {key: value for key, value in settings.items() if value}
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        if given or sets:
            raise UsageError(f"{models[0]}: is a manifest; write --{next(iter(given), 'set').rstrip('s')} in it")
        planned = read_manifest(Path(models[0]))
        code = list(dict.fromkeys(each for job in planned for each in job.code))
        if code and not trusted:
            raise UsageError(
                f"{models[0]}: names what runs code or leads out of this process: {', '.join(code[:5])}; nothing was "
                "run; give --trust-recipe if you trust whoever wrote it"
            )
        for each in code:
            print(f"{models[0]}: runs {each}", file=sys.stderr)
        return trusting(planned, trusted)
    return trusting(jobs_of_line(models, given, sets), trusted)


@app.command(epilog=epilog("recipes"))
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Explain this one.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or explain one."""
    from compressor.plan.recipe_file import find_recipe, load_recipe, shipped_recipes

    loaded = [load_recipe(each) for each in ([name] if name else shipped_recipes())]
    if json:
        _print_json(loaded[0].to_dict() if name else [recipe.to_dict() for recipe in loaded])
        return
    from compressor.report.tables import recipe_tables, recipes_table, show

    show(*recipe_tables(loaded[0], str(find_recipe(name))) if name else [recipes_table(loaded)])


@app.command(epilog=epilog("inspect"))
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A checkpoint, or an artifact.")],
    arch: Arch = None,
    trust_pickle: TrustPickle = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint or artifact holds.

    Architecture, bytes per kind of tensor, encodings, provenance.
    """
    from compressor.evaluate.inspection import inspect_path

    found = inspect_path(path, arch, trust_pickle)
    if json:
        _print_json(found)
        return
    from compressor.report.tables import inspection_tables, show

    show(*inspection_tables(found))


@app.command("eval", epilog=epilog("eval"))
def evaluate(
    artifact: ArtifactPath,
    data: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="Evaluation data; by default that "
                    "of the run.")] = None,
    calibration: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="--data of the run, where it "
                           "was a module:callable and a part of it is evaluated on.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, metavar="N", show_default="the recipe's",
                      help="Of a text, how many are measured.")] = None,
    size: Size = None,
    arch: ArchAgain = None,
    original: Original = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure quality, beside the original's.

    Of the artifact in onnxruntime.
    """
    from compressor.core.artifact import Artifact
    from compressor.evaluate.again import Given, named_paths
    from compressor.evaluate.judge import evaluate as measure

    given = Given(original, arch, calibration, data, tokens)
    found = measure(artifact, given, size)
    for path in named_paths(Artifact.open(artifact), given):
        print(f"read as {artifact}/compression.json names it: {path}", file=sys.stderr)
    _print(found, json, str(artifact))


@app.command(epilog=epilog("bench"))
def bench(
    artifact: ArtifactPath,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, show_default="all cores", help="Of onnxruntime.")
    ] = None,
    size: Size = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure load time, memory and speed.

    Of the artifact in onnxruntime, in a process of its own.
    """
    from compressor.core.sizes import graph_of
    from compressor.evaluate.bench import bench as measure
    from compressor.evaluate.bench import size as bytes_of

    found = measure(graph_of(artifact, size), threads=threads)
    _print(found | {"size": bytes_of(artifact)}, json, str(artifact))


@app.command(epilog=epilog("extract"))
def extract(
    artifact: ArtifactPath,
    size: Annotated[str, typer.Option("--size", metavar="NAME", help="Which one, 50 for example.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", show_default="ARTIFACT-SIZE",
                                                help="Where it goes.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write one of an artifact's sizes as an artifact alone.

    It computes the same to the bit, and is tried on made-up inputs before it is put in its place.
    """
    from compressor.evaluate.extraction import extract as write

    _print(write(artifact, size, output, force), json, str(artifact))


@app.command(epilog=epilog("install"))
def install(
    artifact: ArtifactPath,
    remove: Annotated[bool, typer.Option("--remove", help="Take away what was installed.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Unfold an artifact once, for this machine.

    Writes the graph that onnxruntime really runs beside the small one: more bytes on this disk, loaded in a fraction of
    the time and memory, the same results. `generate` and `bench` use it, and make it anew for another onnxruntime.
    """
    from compressor.evaluate import installation

    if remove:
        gone = installation.remove(artifact)
        _print({"removed": gone}, json, str(artifact))
        return
    _print(installation.install(artifact).as_json(), json, str(artifact))


@app.command(epilog=epilog("verify"))
def verify(
    artifact: ArtifactPath,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out what takes long and needs the original: whether "
            "weights and quality are still as far from it.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|MODULE:CALLABLE", help="As in the run, where it was a module:callable or is elsewhere now."
        ),
    ] = None,
    eval: Annotated[str | None, typer.Option(metavar="PATH|MODULE:CALLABLE", help="Likewise.")] = None,
    size: Size = None,
    arch: ArchAgain = None,
    original: Original = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an artifact.

    Files, figures, provenance, that onnxruntime opens it, and how far its weights and its quality are from the
    original's. Status 5 where something does not hold, or nothing could be held against the original. What the artifact
    names as code is not run: give it anew.
    """
    from compressor.core.errors import VerificationError
    from compressor.evaluate.again import Given
    from compressor.evaluate.verification import failures
    from compressor.evaluate.verification import verify as check

    checks = check(artifact, not quick, Given(original, arch, data, eval), size)
    if json:
        _print_json([each.as_json() for each in checks])
    else:
        from compressor.report.tables import checks_table, show

        show(checks_table(checks))
    wrong = failures(checks)
    if wrong:
        raise VerificationError(f"{artifact}: {wrong}; fetch it again, or compress again")


@app.command(epilog=epilog("diff"))
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An artifact.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two artifacts.

    Tensor by tensor: how it is stored, its bytes, and how far the values are apart.
    """
    from compressor.report.difference import compare

    found = compare(first, second)
    if json:
        _print_json([each.as_json() for each in found])
        return
    from compressor.report.tables import difference_tables, show

    show(*difference_tables(found))


@app.command(epilog=epilog("report"))
def report(
    artifact: ArtifactPath,
    others: Annotated[list[Path] | None, typer.Argument(metavar="[OTHERS]…", help="Artifacts to hold it against, by "
                                                        "default those beside it of the same original.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE",
                                                show_default="ARTIFACT/report.html", help="The page.")] = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show a run as one HTML page with pictures."""
    from compressor.core.artifact import PAGE, Artifact, refuse_unsealed, reseal
    from compressor.core.files import resolved
    from compressor.report.facts import siblings
    from compressor.report.page import write_page

    opened = Artifact.open(artifact)
    beside = others or [other.directory for other in siblings(opened)]
    target = output or artifact / PAGE
    own = target.name == PAGE and resolved(target.parent) == resolved(artifact)
    if own:
        refuse_unsealed(opened)
    write_page([artifact, *beside], target)
    if own:
        reseal(opened)
    print(printable(str(target)))


@app.command(epilog=epilog("generate"))
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Argument(metavar="TEXT", help="What the text goes on from.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    size: Size = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="TEXT is what a user says, in the tokenizer's template of a chat; only the answer is written.",
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write text with the artifact of a language model, or of an encoder-decoder what it makes of a text."""
    from compressor.evaluate.generation import generate_text
    from compressor.evaluate.pair_session import is_pair

    pieces = generate_text(artifact, prompt, tokens, temperature, top_p, seed, chat, size)
    if json:
        _print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    shown = printable if sys.stdout.isatty() else str  # into a file go the letters that were written
    goes_on = not chat and not is_pair(artifact)
    for i, piece in enumerate(pieces):
        sys.stdout.write(shown(prompt + piece if i == 0 and goes_on else piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print(content: dict[str, Any], json: bool, title: str) -> None:
    if json:
        _print_json(content)
        return
    from compressor.report.tables import fields_table, show

    show(fields_table(content), title)


def _print_json(content: Any) -> None:
    import json

    print(json.dumps(content, indent=2))  # in ASCII: whatever is in it, any console and any reader takes it


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its status."""
    args = sys.argv[1:] if arguments is None else arguments
    open_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where whoever started us ignores it
            signal.signal(signal.SIGINT, interrupt)
    sys.exit(_printed(_status(args or ["--help"])))


def _printed(status: int) -> int:
    """The status of a command; what it printed has to have arrived, where somebody waits for it."""
    failure = failure_of(sys.stdout)
    if failure is None:
        return status
    _say(f"Error: stdout: cannot be written; {failure.strerror}; what was made is there, what was printed is lost")
    return status or RESOURCES


def _say(text: str) -> None:
    """A line on stderr, which may be closed."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: resumable. While a library is imported, which may swallow it, it waits."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.1, signal.raise_signal, [number])
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > _SECONDS_OF_ONE_INTERRUPT:
        raise KeyboardInterrupt


_interrupted = -math.inf
_SECONDS_OF_ONE_INTERRUPT = 0.5
"""Ctrl-C, and who hands signals on, may send one twice; the second would end the orderly end of the first."""


def _status(args: list[str]) -> int:
    if args == ["--version"]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"compressor {version('compressor')}")
        except PackageNotFoundError:
            print("compressor, not installed")
        return 0
    _RESUMABLE.clear()
    try:
        # Outside of its standalone mode typer returns the status of an early exit, and commands return None.
        status = app(args, prog_name="compress", standalone_mode=False) or 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException as error:  # SystemExit and the panics of Rust's libraries among them
        if "--debug" in args:
            traceback.print_exc()
        status, message = explained(error)
        _say(f"Error: {message}")
    if status == INTERRUPTED:
        goes_on = any(resumable() for resumable in _RESUMABLE)
        _say(f"Interrupted{'; the same command with --resume goes on from here' * goes_on}.")
    return status
