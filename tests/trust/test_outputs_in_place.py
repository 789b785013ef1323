"""Files outside and files lost: what a run may replace, what it must not touch, and what it makes of what it finds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compressor.run.encoding
import compressor.run.pipeline
import compressor.run.prepare
from compressor.core.artifact import Artifact, damaged_files, foreign_files
from compressor.core.errors import ChangedError, CheckpointError, UsageError
from compressor.core.failures import USAGE, explain
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.run.pipeline import run
from compressor.run.place import CLEARED, DELIVERED, FINISHED, held, resumable
from tests import pico
from tests.core.interrupting import Interrupting

RECIPE = """
passes: [{pass: affine, method: rtn, bits: 4, group: 16}]
calibration: {tokens: 64, window: 32}
evaluation: {tokens: 0, samples: 0, speed: false}
"""


@pytest.fixture
def lab(here: Path, checkpoints: Callable[..., Path]) -> Path:
    """The working folder, with two networks and their data, all of it to be changed."""
    shutil.copytree(checkpoints("llama", n_layers=2), here / "llama")
    pico.write_state_dict(pico.ResNet, here / "cnn.pt")
    (here / "net.py").write_text("from tests.pico import ResNet\n")
    generator = np.random.default_rng(0)
    images = generator.standard_normal((32, 3, 12, 12)).astype("f4")
    np.savez(here / "images.npz", input=images, labels=generator.integers(0, 10, 32))
    np.save(here / "images.npy", images)
    (here / "r.yaml").write_text(RECIPE)
    (here / "a.txt").write_text(pico.text(1, 400))
    (here / "b.txt").write_text(pico.text(2, 400))
    return here


def cnn(**more) -> RunOptions:
    known = {"data": "images.npz", "arch": "net:ResNet", "format": "safetensors", "output": Path("out")}
    return RunOptions("cnn.pt", "r.yaml", **(known | more))


def llama(**more) -> RunOptions:
    known = {"data": "a.txt", "eval": "b.txt", "format": "safetensors", "output": Path("out")}
    return RunOptions("llama", "r.yaml", **(known | more))


CNN = "run cnn.pt -r r.yaml --data images.npz --arch net:ResNet --format safetensors -o out"
LLAMA = "run llama -r r.yaml --data a.txt --eval b.txt --format safetensors -o out"


def content(directory: str = "out") -> dict[str, bytes]:
    made_again = ("compression.json", "report.html", "README.md")
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name not in made_again}


def before_delivery(monkeypatch, action: Callable[[], object], step: str = "weight_errors") -> None:
    """Something happens elsewhere, just before an artifact is delivered."""
    real = getattr(compressor.run.pipeline, step)

    def acting(*args):
        action()
        return real(*args)

    monkeypatch.setattr(compressor.run.pipeline, step, acting)


class Hearing(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


# --- where an artifact may go


@pytest.mark.parametrize("output", [".", "..", "../here", "sub/..", "out/../../here", "inner"])
def test_the_folder_that_one_is_in_is_no_place_for_an_artifact(command, lab, monkeypatch, output):
    (lab / "here" / "inner" / "deep").mkdir(parents=True)
    (lab / "here" / "sub").mkdir()
    (lab / "here" / "out").mkdir()
    monkeypatch.chdir(lab / "here" / ("inner/deep" if output == "inner" else ""))
    output = str(lab / "here" / "inner") if output == "inner" else output
    words = ["run", str(lab / "cnn.pt"), "-r", str(lab / "r.yaml"), "--arch", "tests.pico:ResNet", "-o", output]
    for more in ([], ["--force"], ["--resume"]):
        said = command(*words, *more)
        assert said.status == 2
        assert "is the folder that you are in" in said.err
    assert not list(lab.rglob("*.partial"))


def test_a_disk_of_its_own_is_no_place_for_an_artifact(command, lab, monkeypatch):
    (lab / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    assert "is a disk of its own" in command(CNN).err
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out.partial")
    assert "is a disk of its own" in command(CNN).err


@pytest.mark.parametrize("what", ["model", "data"])
def test_an_artifact_does_not_replace_what_it_is_made_of(lab, what):
    run(cnn())
    (lab / "cnn.pt" if what == "model" else lab / "images.npz").rename(lab / "out" / "model.bin")
    (lab / "out" / "model.bin").rename(lab / "out" / ("model.pt" if what == "model" else "model.npz"))
    changed = RunOptions("out/model.pt", **_kept(cnn())) if what == "model" else cnn(data="out/model.npz", force=True)
    with pytest.raises(UsageError, match="out: would replace .*out/model.*, which is read"):
        run(changed)
    assert (lab / "out" / "model.safetensors").exists()


def _kept(options: RunOptions) -> dict:
    return {
        "recipe": options.recipe, "output": options.output, "data": options.data, "arch": options.arch,
        "format": options.format, "force": True,
    }  # fmt: skip


@pytest.mark.parametrize("more", ["", " --force", " --resume"])
def test_a_folder_of_the_users_beside_the_output_is_kept(command, lab, more):
    (lab / "out.partial" / "work").mkdir(parents=True)
    (lab / "out.partial" / "work" / "thesis.tex").write_text("the only copy")
    said = command(CNN + more)
    assert said.status == 2
    assert "out.partial: is in the way and not ours" in said.err
    assert (lab / "out.partial" / "work" / "thesis.tex").read_text() == "the only copy"
    assert sorted(path.name for path in (lab / "out.partial").iterdir()) == ["work"]


# --- two runs


def test_the_second_run_on_an_output_is_refused_before_it_reads_anything(lab, monkeypatch):
    waiting, going = threading.Event(), threading.Event()
    real = compressor.run.prepare.open_checkpoint

    def slow(*args, **more):
        waiting.set()
        assert going.wait(60)
        return real(*args, **more)

    monkeypatch.setattr(compressor.run.prepare, "open_checkpoint", slow)
    ended: list[object] = []
    first = threading.Thread(target=lambda: ended.append(run(cnn())))
    first.start()
    assert waiting.wait(60)
    monkeypatch.setattr(compressor.run.prepare, "open_checkpoint", lambda *args, **more: pytest.fail("was opened"))
    for more in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(UsageError, match="out.partial: another run is writing here") as refused:
            run(cnn(sets=("affine.bits=8",), **more))
        assert explain(refused.value) == (USAGE, str(refused.value))
    monkeypatch.setattr(compressor.run.prepare, "open_checkpoint", slow)
    going.set()
    first.join()
    assert len(ended) == 1
    assert not (lab / "out.partial").exists()


# --- what comes to stand at the output while a run goes on


def a_folder() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("the only copy")


def a_file() -> None:
    Path("out").write_text("the only copy")


def a_link() -> None:
    Path("out").symlink_to("cnn.pt")


def an_artifact() -> None:
    shutil.copytree("other", "out")


@pytest.mark.parametrize(
    ("comes", "force"),
    [(a_folder, False), (a_folder, True), (a_file, False), (a_link, True), (an_artifact, False), (an_artifact, True)],
)
def test_what_appears_at_the_output_is_kept(lab, monkeypatch, comes, force):
    if comes is an_artifact:
        run(cnn(output=Path("other"), sets=("affine.bits=8",)))
    before_delivery(monkeypatch, comes)
    with pytest.raises(ChangedError, match=f"out: was not as it is now .* is whole in .*{FINISHED}"):
        run(cnn(force=force))
    monkeypatch.undo()
    os.chdir(lab)
    if Path("out").is_dir():
        kept = {"thesis.tex"} if comes is a_folder else {path.name for path in Path("other").iterdir()}
        assert {path.name for path in Path("out").iterdir()} == kept
    else:
        assert os.path.lexists("out")
    finished = Artifact.open(Path("out.partial/work") / FINISHED)
    assert not damaged_files(finished)
    Path("out").rename("moved")
    artifact = run(cnn(resume=True))
    assert damaged_files(artifact) == foreign_files(artifact.directory) == []
    assert not Path("out.partial").exists()


def test_an_artifact_that_changes_while_another_replaces_it_is_kept(lab, monkeypatch):
    run(cnn(sets=("affine.bits=8",)))
    before_delivery(monkeypatch, lambda: Path("out/thesis.tex").write_text("the only copy"))
    with pytest.raises(ChangedError, match="out: was not as it is now when this run began"):
        run(cnn(force=True))
    assert Path("out/thesis.tex").read_text() == "the only copy"


def test_an_empty_folder_that_appears_is_used(lab, monkeypatch):
    before_delivery(monkeypatch, lambda: Path("out").mkdir())
    assert not damaged_files(run(cnn()))


# --- what changes while it is read


def other_weights(path: str) -> None:
    """In place, of the same size."""
    if path.endswith(".pt"):
        values = torch.load(path, weights_only=True)
        for tensor in values.values():
            tensor += 1
        Path("other").mkdir()
        torch.save(values, f"other/{path}")
        Path(path).write_bytes(Path("other", path).read_bytes())
    else:
        values = {name: tensor + 1 for name, tensor in load_file(path).items()}
        save_file(values, "values.tmp", {"format": "pt"})
        Path(path).write_bytes(Path("values.tmp").read_bytes())


CHANGES: dict[str, tuple[Callable[..., RunOptions], Callable[[], object]]] = {
    "weights": (cnn, lambda: other_weights("cnn.pt")),
    "weights of a language model": (llama, lambda: other_weights("llama/model.safetensors")),
    "config": (llama, lambda: Path("llama/config.json").write_text(Path("llama/config.json").read_text() + " ")),
    "tokenizer": (llama, lambda: Path("llama/tokenizer.json").write_text("{}")),
    "a replaced file": (cnn, lambda: os.replace(shutil.copy("cnn.pt", "copy.pt"), "cnn.pt")),
    "a file that is gone": (cnn, lambda: Path("cnn.pt").rename("moved.pt")),
    "data": (cnn, lambda: shutil.copy(shutil.copy("images.npy", "images.npz.tmp"), "images.npz")),
    "mapped data": (lambda: cnn(data="images.npy"), lambda: np.save("images.npy", np.zeros((32, 3, 12, 12), "f4"))),
    "text": (llama, lambda: Path("a.txt").write_text(pico.text(5, 400))),
    "the code of the network": (cnn, lambda: Path("net.py").write_text("from tests.pico import ResNet  # other\n")),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_source_that_changes_while_a_run_reads_it_gives_no_artifact(lab, monkeypatch, kind):
    options, change = CHANGES[kind]
    before_delivery(monkeypatch, change)
    with pytest.raises(ChangedError, match="changed while this run read it"):
        run(options())
    assert not Path("out").exists()
    assert not resumable(Path("out"))


def test_a_clock_that_is_set_back_hides_nothing(lab, monkeypatch):
    before = os.stat("cnn.pt")

    def quietly() -> None:
        other_weights("cnn.pt")
        os.utime("cnn.pt", ns=(before.st_atime_ns, before.st_mtime_ns))

    before_delivery(monkeypatch, quietly, "prove")
    with pytest.raises(ChangedError, match="it or the data were written again while this run read them"):
        run(cnn())
    assert os.stat("cnn.pt").st_mtime_ns == before.st_mtime_ns
    assert not Path("out").exists()


def test_a_file_that_is_cut_off_while_it_is_read_has_changed(lab, monkeypatch):
    """Whatever that makes its reader raise."""
    real = compressor.run.encoding.encode_network

    def cut(*args):
        os.truncate("llama/model.safetensors", 10_000)
        return real(*args)

    monkeypatch.setattr(compressor.run.encoding, "encode_network", cut)
    with pytest.raises(ChangedError, match="model.safetensors: changed while this run read it"):
        run(llama())


def interrupted(options: Callable[..., RunOptions] = llama) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(options(progress=Interrupting("encoding", 2)))
    assert resumable(Path("out"))


def goes_on(options: Callable[..., RunOptions]) -> bool:
    """Whether --resume does, which then says what was written again; else it says whose work that is."""
    hearing = Hearing()
    try:
        run(options(resume=True, progress=hearing))
    except UsageError as error:
        assert "belongs to another run" in str(error)
        return False
    assert any("was written again since" in text for text in hearing.said)
    return True


BETWEEN: dict[str, Callable[[], object]] = {
    "weights": lambda: other_weights("llama/model.safetensors"),
    "config": lambda: Path("llama/config.json").write_text(
        json.dumps(json.loads(Path("llama/config.json").read_text()) | {"rms_norm_eps": 1e-3})
    ),
    "tokenizer": lambda: Path("llama/tokenizer.json").write_text(
        Path("llama/tokenizer.json").read_text().replace('"<s>"', '"<t>"')
    ),
    "text": lambda: Path("a.txt").write_text(pico.text(5, 400)),
    "nothing but its time": lambda: os.utime("llama/model.safetensors", ns=(1, 10**18)),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_what_changes_between_a_run_and_its_resumption_is_never_mixed(lab, kind):
    interrupted()
    BETWEEN[kind]()
    if not goes_on(llama):
        run(llama())
    run(llama(output=Path("whole")))
    assert content() == content("whole")


def test_labels_that_change_between_are_not_mixed_either(lab):
    with pytest.raises(KeyboardInterrupt):
        run(cnn(progress=Interrupting("encoding", 1)))
    arrays = dict(np.load("images.npz"))
    np.savez("images.npz", input=arrays["input"], labels=arrays["labels"][::-1])
    goes_on(cnn)


# --- what is kept, and what is said of it


def test_too_little_memory_leaves_what_is_finished(command, lab, monkeypatch):
    interrupted()
    before = {path.name: path.read_bytes() for path in Path("out.partial/work").iterdir() if path.is_file()}
    assert "model.layers.0.safetensors" in before

    def fails(*args, **more):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "__init__", fails)
        assert command(LLAMA + " --resume").status == 4
    after = {path.name: path.read_bytes() for path in Path("out.partial/work").iterdir() if path.is_file()}
    assert after == before
    run(llama(resume=True))


@pytest.mark.parametrize("error", [CheckpointError("damaged"), UsageError("wrong"), RuntimeError("out of order")])
def test_no_error_takes_finished_blocks_away(lab, monkeypatch, error):
    interrupted()

    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(compressor.run.encoding, "encode_network", fails)
        with pytest.raises(type(error)):
            run(llama(resume=True))
    assert Path("out.partial/work/model.layers.0.safetensors").exists()
    hearing = Interrupting()
    run(llama(resume=True, progress=hearing))
    assert "surveying" not in hearing.seen


MOMENTS = {
    "prepare.open_checkpoint": False, "pipeline.open_work": False, "encoding.encode_network": True,
    "write.write_tensors": True, "pipeline.deliver": True,
}  # fmt: skip
"""Function of a module of the room that Ctrl-C comes in -> whether there is something to go on from."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interrupt_says_that_a_run_goes_on_where_it_does(command, lab, monkeypatch, moment, goes_on):
    def interrupts(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"compressor.run.{moment}", interrupts)
        said = command(LLAMA)
    assert said.status == 130
    promised = "the same command with --resume goes on from here" in said.err
    assert promised == MOMENTS[moment] == resumable(Path("out"))
    if promised or goes_on:
        assert command(LLAMA + " --resume" * promised).status == 0


STATES = {
    "nothing but the folder": [], "a lock": [".lock"], "an empty working folder": ["work/"],
    "half of the first note": [".lock", "work/.run.json.partial"],
    "a cleared note": [("work/run.json", CLEARED), "work/model.layers.0.safetensors"],
    "what is left of a delivery": [("work/run.json", DELIVERED), "work/finished/compression.json"],
    "another run's": [("work/run.json", "{}"), "work/model.layers.0.safetensors", "config.json"],
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("more", ["", " --force", " --resume"])
def test_whatever_a_run_left_the_next_command_says_so_and_goes_on(command, lab, state, more):
    Path("out.partial").mkdir()
    for entry in STATES[state]:
        name, text = entry if isinstance(entry, tuple) else (entry, "")
        Path("out.partial", name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            Path("out.partial", name).mkdir()
        else:
            Path("out.partial", name).write_text(text)
    said = command(LLAMA + more)
    if state == "another run's" and more == " --resume":
        assert (said.status, "was begun by another version of compressor, or is damaged" in said.err) == (2, True)
        assert Path("out.partial/work/model.layers.0.safetensors").exists()
        return
    assert said.status == 0, said.err
    if more == " --resume":
        assert "starts from the beginning" in said.err
    assert not Path("out.partial").exists()
    assert not damaged_files(Artifact.open("out"))


def test_resuming_what_was_delivered_says_so_and_succeeds(command, lab):
    assert command(LLAMA).status == 0
    before = content()
    said = command(LLAMA + " --resume")
    assert (said.status, "out: was delivered by the run that is to be resumed" in said.err) == (0, True)
    assert content() == before
    assert "holds an artifact of another run" in command(LLAMA + " --resume --seed 3").err
    assert command(LLAMA + " --force --set gates.max_size=1kB").status == 1
    assert command(LLAMA + " --force --set gates.max_size=1kB --resume").status == 2


@pytest.mark.parametrize("name", ["run.json", "sources.json", "model.layers.0.safetensors", "model.safetensors"])
def test_a_full_disk_at_any_file_leaves_something_to_go_on_from(command, lab, monkeypatch, name):
    real = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        said = command(LLAMA)
    assert said.status == 4
    goes_on = resumable(Path("out"))
    assert ("--resume" in said.err) == goes_on
    assert command(LLAMA + " --resume" * goes_on).status == 0


def test_what_a_run_holds_is_nobody_elses_until_it_is_done(lab):
    with held(Path("out"), False, False, lambda text: None) as place:
        assert place.partial == Path("out.partial")
        with pytest.raises(UsageError, match="another run is writing here"), held(Path("out"), False, False, str):
            pass
    assert not Path("out.partial").exists()
