"""The training loop: what it minimises, that it resumes to the same state, and that two processes are as one."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from compressor.core.batch import Examples
from compressor.core.errors import DataError, RecipeError, UsageError
from compressor.core.training import Compression, Optimizer
from compressor.learning import trainer as fitting
from compressor.learning.sparse_gradients import SparseGradients
from compressor.learning.trainer import Fitting, called, teaching_loss
from compressor.ops.schedules import rate_share
from compressor.passes.hesso import Hesso, Shrinking
from compressor.passes.oto import Oto, Projecting
from compressor.passes.settings.lrp import LrpSettings
from compressor.passes.settings.n2n import N2nSettings
from compressor.passes.settings.reste import ResteSettings
from compressor.passes.settings.sortednet import SortednetSettings
from compressor.passes.settings.training import TrainingSettings
from tests.learning.training_case import EXAMPLE, N_CLASSES, examples, images, residual, subject_of, with_pooler
from tests.learning.training_worker import SPARSE, STOPS_AT

ROOT = Path(__file__).parents[2]


def fitted(module, settings: TrainingSettings, data: Examples | None = None, advance=lambda share, note: None, **made):
    """The loop's log; `module` is trained in place."""
    subject = subject_of(module)
    loop = Fitting(module, data or examples(), settings, 3, made.get("folder"), advance)
    sparsifier = made["kind"](settings, subject, loop.n_steps) if "kind" in made else None
    return loop.train(sparsifier), sparsifier


def weights(module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in module.state_dict().values()])


def test_a_training_is_plain_steps_of_the_optimizer_over_each_epochs_order():
    settings = Hesso(epochs=2, batch=24, optimizer="SGD", rate=0.1, options={"momentum": 0.5}, rise=0.0)
    module, naive, data = residual(norms=False), residual(norms=False), examples(64)
    loop = Fitting(module, data, settings, 3, None, lambda share, note: None)
    orders = [loop._index(step) for step in range(loop.n_steps)]
    loop.train()
    assert [len(order) for order in orders] == [24] * 4  # the rest of an epoch waits for the next order
    assert len(set(torch.cat(orders[:2]).tolist())) == 48
    assert not torch.equal(orders[0], orders[2])
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.1, momentum=0.5)
    naive.train()
    for step, order in enumerate(orders):
        optimizer.param_groups[0]["lr"] = 0.1 * rate_share(step, 4)
        optimizer.zero_grad()
        functional.cross_entropy(naive(data.inputs[""][order]), data.labels[order]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(naive), rtol=0, atol=0)
    assert not module.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("optimizer", Optimizer.__args__)
def test_every_optimizer_that_a_recipe_may_name_lowers_the_loss(optimizer):
    rate = {"Adafactor": 0.05, "Adadelta": 1.0, "Rprop": 1e-3, "SGD": 0.1, "ASGD": 0.1}.get(optimizer, 5e-3)
    log, _ = fitted(residual(), Hesso(epochs=4, batch=16, optimizer=optimizer, rate=rate))
    assert log[-1]["loss"] < log[0]["loss"]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]


def test_options_that_the_optimizer_does_not_take_are_refused():
    with pytest.raises(RecipeError, match=r"torch\.optim\.Adam does not take options \{'momentum': 0\.9\}"):
        fitted(residual(), Hesso(optimizer="Adam", options={"momentum": 0.9}))


def test_labels_that_are_not_there_are_refused():
    with pytest.raises(DataError, match="loss labels needs labels, and the data has none; write loss: teacher"):
        fitted(residual(), Hesso(loss="labels"), Examples({"": images(32)}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(32) % 7, "labels go from 0 to 6, but the network has 5 outputs"),
        (torch.arange(32) - 1, "labels go from -1 to"),
        (torch.zeros(32, 2, dtype=torch.long), r"have shape \(32, 2\), outputs \(32, 5\); expected \(32,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        fitted(residual(), Hesso(), Examples({"": images(32)}, labels))


def test_a_training_that_diverges_ends():
    data = Examples({"": images(32) * 1e30}, torch.zeros(32, dtype=torch.long))
    with pytest.raises(RecipeError, match=r"hesso: the loss is nan at step \d+ of \d+; .* write a smaller rate"):
        fitted(residual(), Hesso(epochs=3, batch=16, rate=1e20), data)


def test_without_labels_the_original_is_the_teacher():
    """Which is what the module was when the loop was made."""
    module, data = residual(), Examples({"": images(64)})
    settings = Hesso(epochs=30, batch=32, rate=0.05)
    loop = Fitting(module, data, settings, 3, None, lambda share, note: None)
    with torch.no_grad():
        wanted = module(EXAMPLE).softmax(1)
        module.head.weight.mul_(-1.0)
        before = float((module(EXAMPLE).softmax(1) - wanted).norm())
    log = loop.train()
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    with torch.no_grad():
        assert float((module(EXAMPLE).softmax(1) - wanted).norm()) < 0.5 * before


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teaching_by_the_paper(temperature):
    generator = torch.Generator().manual_seed(0)
    outputs, wanted = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for row, other in zip(outputs.view(6, 7), wanted.view(6, 7), strict=True):
        p, q = torch.softmax(other / temperature, 0), torch.softmax(row / temperature, 0)
        total += sum(float(a) * float((a / b).log()) for a, b in zip(p, q, strict=True))
    found = teaching_loss(outputs, wanted, "kl", temperature)
    assert float(found) == pytest.approx(temperature**2 * total / 6, rel=1e-9)
    assert float(teaching_loss(outputs, wanted, "mse", 1.0)) == pytest.approx(
        float((outputs - wanted).square().mean()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (Hesso(epochs=4, batch=16, periods=2), Shrinking),
        (Hesso(epochs=4, batch=16, periods=1, pruning=0.3, cycles=2, cycle_steps=3), Shrinking),
        (Oto(epochs=4, batch=16, penalty=3.0, optimizer="AdamW", rate=1e-3), Projecting),
    ],
)
@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_training_goes_on_to_the_same_state(tmp_path, monkeypatch, method, kind, stop):
    """With dropout, whose draws have to be the same as well."""
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_SAVES", -1.0)

    def dropping():
        module = residual()
        module.block.append(torch.nn.Dropout(0.3))
        return module

    whole, interrupted = dropping(), dropping()
    log, _ = fitted(whole, method, kind=kind)
    calls = iter(range(1000))

    def advance(share, note):
        if next(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted, method, kind=kind, folder=tmp_path, advance=advance)
    torch.rand(7)  # whatever the global generator has come to
    resumed = dropping()
    shares = []
    again, _ = fitted(resumed, method, kind=kind, folder=tmp_path, advance=lambda share, note: shares.append(share))
    assert again == log
    assert torch.equal(weights(resumed), weights(whole))
    assert shares[0] == pytest.approx((stop - 1) / 16)
    assert sum(shares) == pytest.approx(1)


def test_the_global_generator_is_left_alone_and_does_not_matter():
    found = []
    for seed in (1, 2):
        module = residual()
        module.block.append(torch.nn.Dropout(0.3))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        fitted(module, Hesso(epochs=1, batch=16))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(module))
    assert torch.equal(*found)


def test_progress_says_loss_sparsity_and_size():
    notes = []
    _, shrinking = fitted(
        residual(), Hesso(epochs=2, batch=16, periods=1), kind=Shrinking, advance=lambda share, note: notes.append(note)
    )
    form = re.compile(r"loss \d+\.\d{4} · (\d+)% of units gone · (\d\.\d\d) MB in float32")
    first, last = (form.fullmatch(note) for note in (notes[1], notes[-1]))
    assert first[1] == "0"
    assert last[1] == f"{100 * shrinking.sparsity():.0f}"
    assert float(last[2]) < float(first[2])


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_schedules(schedule, middle):
    shares = [rate_share(step, 100, schedule, rise=10) for step in range(100)]
    assert shares[50] == pytest.approx(middle)
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) <= 1
    assert rate_share(99, 100, schedule, floor=0.3) >= 0.3


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes under torchrun have come to."""
    folder = tmp_path_factory.mktemp("two")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.learning.training_worker",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_under_torchrun_train_as_one(two):
    """On a network without batch norms, whose statistics are of each process's own share."""
    first, second = (each["shrunk"] for each in two)
    alone = with_pooler(residual(norms=False))
    _, shrinking = fitted(alone, Hesso(epochs=4, batch=16, periods=2), kind=Shrinking)
    wanted = weights(alone)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], wanted, rtol=1e-4, atol=1e-5)
    assert first["gone"] == second["gone"] == [flags.tolist() for flags in shrinking.gone]
    assert not torch.equal(first["examples"], second["examples"])


def test_two_processes_send_compressed_gradients_by_the_paper(two):
    """Both in turn, in loops: clipped, with momentum, the largest sent, all of it cleared there, decay apart. What the
    forward leaves out does not change."""
    module, data, settings = with_pooler(residual(norms=False)), examples(), SPARSE
    loop = Fitting(module, data, settings.model_copy(update={"gradients": "dense"}), 3, None, lambda share, note: None)
    tensors = {name: tensor for name, tensor in module.named_parameters() if "pooler" not in name}
    u, v = ([{name: torch.zeros_like(t) for name, t in tensors.items()} for _ in range(2)] for _ in range(2))
    dense, decay = ({name: torch.zeros_like(t) for name, t in tensors.items()} for _ in range(2))
    for step in range(loop.n_steps):
        share = 0.3 if step < 4 else 0.01
        index, total = loop._index(step), {name: torch.zeros_like(t) for name, t in tensors.items()}
        for process in range(2):
            part = index[process::2]
            loss = functional.cross_entropy(module(data.inputs[""][part]), data.labels[part])
            gradients = torch.autograd.grad(loss, list(tensors.values()))
            shrinks = min(1.0, 0.5 / 2**0.5 / float(torch.cat([g.flatten() for g in gradients]).norm()))
            for (name, t), gradient in zip(tensors.items(), gradients, strict=True):
                g = shrinks * gradient
                if t.dim() < 2:
                    total[name] += g / 2
                    continue
                u[process][name] = 0.9 * u[process][name] + g
                v[process][name] = v[process][name] + u[process][name]
                flat = v[process][name].flatten()
                places = flat.abs().argsort(descending=True)[: math.ceil(flat.numel() * share)]
                total[name].view(-1)[places] += flat[places] / 2
                v[process][name].view(-1)[places] = 0.0
                if share <= 0.01:
                    u[process][name].view(-1)[places] = 0.0
        with torch.no_grad():
            for name, t in tensors.items():
                decay[name] = 0.9 * decay[name] + 0.01 * t
                if t.dim() < 2:
                    dense[name] = total[name] = 0.9 * dense[name] + total[name]
                t -= 0.1 * rate_share(step, loop.n_steps) * (total[name] + decay[name])
    for each in two:
        torch.testing.assert_close(each["sparse"]["weights"], weights(module), rtol=1e-4, atol=1e-6)
    sizes = [t.numel() for t in module.parameters() if t.dim() > 1]
    whole = 4 * sum(t.numel() for t in module.parameters() if t.dim() < 2)
    n_sent = [sum(math.ceil(n * share) for n in sizes) for share in (0.3, 0.01, 0.01)]
    written = [math.floor(math.log2(sum(sizes) / n)) for n in n_sent]  # bits of each place as they are
    grows = [n + (sum(sizes) - 1) // 2**low for n, low in zip(n_sent, written, strict=True)]
    bits = [n * low + more for n, low, more in zip(n_sent, written, grows, strict=True)]
    n_bytes = [whole + 4 * n + math.ceil(m / 8) for n, m in zip(n_sent, bits, strict=True)]
    assert [entry["bytes_per_step"] for entry in two[0]["sparse"]["log"]] == n_bytes


def test_each_process_goes_on_with_what_it_has_not_sent_yet(two):
    assert two[0]["kept"] == [f"gradients-{STOPS_AT - 1}-0.pt", f"gradients-{STOPS_AT - 1}-1.pt", "training.pt"]
    for each in two:
        assert torch.equal(each["resumed"]["weights"], each["sparse"]["weights"])
    assert two[0]["resumed"]["log"] == two[0]["sparse"]["log"]  # the first's, which is what is written


def test_what_another_number_of_processes_has_not_sent_is_not_lost_in_silence(tmp_path):
    sparse = SparseGradients(residual(), SPARSE)
    sparse.save(tmp_path, 5)
    sparse.restore(tmp_path, 5)
    for rank in (1, 2):
        (tmp_path / f"gradients-5-{rank}.pt").touch()
    torch.save({"processes": 3}, tmp_path / "gradients-5-0.pt")
    with pytest.raises(UsageError, match=r"training of 3 processes, .* and these are 1; start 3 with torchrun"):
        sparse.restore(tmp_path, 5)


@pytest.mark.parametrize(
    ("kind", "others", "message"),
    [
        (
            ResteSettings,
            {"optimizer": "Adam", "options": {}},
            "Adam scales each entry by its own past, .* write optimi",
        ),
        (ResteSettings, {"options": {"momentum": 0.9, "dampening": 0.1}}, "knows of the options .*, found dampening"),
        (LrpSettings, {"optimizer": "SGD"}, "is of a training, and epochs is 0"),
        (Hesso, {}, "compressed: hesso tells by each step which units matter.*; write gradients: dense"),
        (Oto, {}, "compressed: oto tells by each step which units matter"),
        (SortednetSettings, {}, "compressed: sortednet trains in one process"),
        (N2nSettings, {}, "compressed: n2n trains its students in processes of its own"),
        (ResteSettings, {"gradients": "dense", "compression": Compression(share=0.01)}, "leave compression out"),
    ],
)
def test_gradients_that_cannot_be_compressed_are_refused_when_the_recipe_is_read(kind, others, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"gradients": "compressed"} | others)


def test_one_process_has_nobody_to_send_compressed_gradients_to():
    with pytest.raises(RecipeError, match=r"lrp: gradients: compressed is of several .* torchrun --nproc-per-node 2"):
        fitted(residual(), SPARSE)


def test_outputs_by_name_and_by_position():
    module = residual()
    assert called(module, {"": EXAMPLE}).shape == (len(EXAMPLE), N_CLASSES)
    torch.testing.assert_close(called(module, {"x": EXAMPLE}), module(EXAMPLE))
