"""N2N: a student of the network, found by policies that remove layers and shrink them, and learn from its reward.

Ashok et al., "N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning", ICLR 2018,
arXiv 1709.06030. Two stages: a bidirectional LSTM keeps or removes each layer; from the best student of that stage an
autoregressive LSTM chooses a multiplier for each attribute of what is left. The reward comes at the end of a rollout.

Ours: students start from the teacher's weights; what cannot win is not trained (`filters`); of transformers the layers
are blocks or their parts, where a fixed number of them is drawn together, so that every student keeps the constraint;
and the baselines are beside: random students, Song et al., SLEB, arXiv 2402.09025 (greedy), Men et al., ShortGPT,
arXiv 2403.03853 (influence). The authors' code gives every rollout of an epoch the same scalar and clamps ε after the
power, so that the constraint fades again after epoch 15; here each rollout has its own reward, and ε stays 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.contract import StructurePass
from compressor.core.errors import RecipeError
from compressor.core.structure import Outcome, Subject
from compressor.core.students import ATTRIBUTES, MULTIPLIERS, Student, Students
from compressor.ops.subsets import sample_subset, subset_log_probability, subset_shares
from compressor.passes.parts.policies import (
    Learner,
    RemovalPolicy,
    ShrinkagePolicy,
    load_policy,
    save_policies,
    standardised,
    state_of,
)
from compressor.passes.settings.n2n import N2nSettings, refuse_overwriting, too_many

INVALID = -1.0
HOPE = 1.02
"""The largest accuracy ratio that a filter believes in: a heuristic."""
FADING = 15


def reward(compression: float, accuracy_ratio: float) -> float:
    """R = C·(2 − C)·A_student/A_teacher, C = 1 − P_student/P_teacher; not clipped at 1."""
    return compression * (2 - compression) * accuracy_ratio


def constraint_decay(epoch: float) -> float:
    """ε(e) = max(0, 1 − e/15)⁴."""
    return max(0.0, 1 - epoch / FADING) ** 4


def constrained(unconstrained: float, epoch: float) -> float:
    """(ε − 1) + ε·R, of a student that violates a constraint: its reward fades to −1."""
    epsilon = constraint_decay(epoch)
    return (epsilon - 1) + epsilon * unconstrained


@dataclass(frozen=True)
class Trial:
    """One rollout of a search; `accuracy` is a ratio, None where a filter skipped the student or it cannot be."""

    student: str
    stage: str
    epoch: int
    parameters: int | None
    accuracy: float | None
    reward: float
    meets: bool


class N2n(N2nSettings, StructurePass):
    """The best student of a search; see the module."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        if self.policy_in and not Path(self.policy_in).is_file():
            raise RecipeError(f"n2n: policy_in {self.policy_in} is not there; give a file that policy_out wrote")
        if self.policy_out:
            refuse_overwriting(Path(self.policy_out))
        return ()

    def restructure(self, subject: Subject) -> Outcome:
        """The smaller network, trained where `epochs` says so."""
        assert subject.students is not None
        self.examine(subject)  # it takes long, and the files may have changed since the plan
        students = subject.students(self)
        try:
            search = Search(self, students, subject.generator)
            best = search.run()
        finally:
            students.close()
        module, log = students.finish(best)
        if self.policy_out and search.policies:
            refuse_overwriting(Path(self.policy_out))  # it may have come while the search went on
            save_policies(Path(self.policy_out), search.policies)
        return Outcome(module, search.report(best) | {"training": log})


class Search:
    """One search; what it asks of students depends on nothing but its settings, its generator and their answers.

    trials     every rollout, in order
    policies   as they are now, by stage
    """

    def __init__(self, settings: N2nSettings, students: Students, generator: torch.Generator) -> None:
        self.settings, self.students, self.generator = settings, students, generator
        self.removable = [number for number, layer in enumerate(students.layers) if not layer.fixed]
        self.of_blocks = all(layer.kind in ("block", "attention", "mlp", "part") for layer in students.layers)
        self.trials: list[Trial] = []
        self.epochs: list[dict[str, Any]] = []
        self.policies: dict[str, nn.Module] = {}
        self._refuse()

    def run(self) -> Student:
        """The best student.

        Raises:
            RecipeError: No student keeps the constraints.
        """
        if self.settings.policy in ("greedy", "influence"):
            return self._greedy() if self.settings.policy == "greedy" else self._least_influence()
        self._removal()
        if self.settings.shrink_epochs:
            self._shrinkage(self.best())
        return self.best()

    def best(self) -> Student:
        """Of the largest reward among those that were judged and keep the constraints."""
        n = self.settings.remove
        found = [
            trial
            for trial in self.trials
            if trial.accuracy is not None and trial.meets and n in (None, len(Student.read(trial.student).removed))
        ]
        if not found:
            raise RecipeError(
                f"n2n: none of {len(self.trials)} students keeps the constraints; write a larger max_parameters or "
                "max_latency, a smaller min_accuracy, or more search_epochs"
            )
        return Student.read(max(found, key=lambda trial: trial.reward).student)

    def report(self, best: Student) -> dict[str, Any]:
        """For compression.json: what was tried, and what came of it."""
        layers = self.students.layers
        return {
            "search": {
                "policy": self.settings.policy, "n_judged": self.students.n_judged,
                "teacher": {"parameters": self.students.parameters, "accuracy": self.students.accuracy},
                "best": best.key,
                "removed": [layers[number].name for number in best.removed],
                "shrunk": [[layers[number].name, name, share] for number, name, share in best.shrunk],
                "epochs": self.epochs, "trials": [asdict(trial) for trial in self.trials],
                **self.students.facts(),
            }
        }  # fmt: skip

    def _refuse(self) -> None:
        """Before any student is built."""
        settings, n = self.settings, len(self.removable)
        if not n:
            reasons = "; ".join(dict.fromkeys(f"'{x.name}' {x.fixed}" for x in self.students.layers if x.fixed))
            raise RecipeError(f"n2n: no layer of the network can go; {reasons or 'it has none'}")
        if not self.students.accuracy > 0:
            raise RecipeError(
                "n2n: the network itself is right on nothing of the validation split, so that no student can be held "
                "to it; write a larger validation, or for a decoder measure: perplexity"
            )
        if settings.remove is not None and settings.remove >= n:
            raise RecipeError(f"n2n: {too_many(settings.remove, n)}")
        if not self.of_blocks and settings.policy in ("greedy", "influence"):
            raise RecipeError(
                f"n2n: policy {settings.policy} is of blocks, and this network's units are layers; write policy: "
                "reinforce or random"
            )

    # -- what a student earns

    def rewards(self, students: Sequence[Student], stage: str, epoch: int) -> list[float]:
        """The reward of each, after those that need it have been trained."""
        sizes = [self.students.size(student) for student in students]
        due = self._worth_training(students, sizes)
        judged = dict(zip(due, self.students.judge(due), strict=True))
        found = []
        for student, size in zip(students, sizes, strict=True):
            ratio = judged[student] / self.students.accuracy if student in judged else None
            earned, meets = INVALID, False
            if size is not None:
                compression = 1 - size / self.students.parameters
                earned = reward(compression, ratio if ratio is not None else self._mean_ratio())
                meets = self._keeps(student, size, ratio)
                earned = earned if meets else constrained(earned, epoch)
            self.trials.append(Trial(student.key, stage, epoch, size, ratio, earned, meets))
            found.append(earned)
        self.epochs.append(
            {"stage": stage, "epoch": epoch, "rewards": [round(each, 6) for each in found],
             "best": round(max((t.reward for t in self.trials if t.meets and t.accuracy is not None),
                               default=INVALID), 6), "judged": self.students.n_judged}
        )  # fmt: skip
        return found

    def _worth_training(self, students: Sequence[Student], sizes: Sequence[int | None]) -> list[Student]:
        """Without those that cannot be, or cannot win."""
        valid = {student: size for student, size in zip(students, sizes, strict=True) if size is not None}
        due = list(valid)
        if self.settings.filters and not self.of_blocks:
            best = max((t.reward for t in self.trials if t.meets and t.accuracy is not None), default=INVALID)
            due = [s for s in due if reward(1 - valid[s] / self.students.parameters, HOPE) >= best]
        return due

    def _mean_ratio(self) -> float:
        found = [trial.accuracy for trial in self.trials if trial.accuracy is not None]
        return sum(found) / len(found) if found else 1.0

    def _keeps(self, student: Student, size: int, ratio: float | None) -> bool:
        """Whether a student keeps the constraints, as far as that is known of it."""
        settings = self.settings
        if settings.max_parameters is not None and size > settings.max_parameters * self.students.parameters:
            return False
        if settings.min_accuracy is not None and ratio is not None and ratio < settings.min_accuracy:
            return False
        return settings.max_latency is None or self.students.slowness(student) <= settings.max_latency

    def _spent(self) -> bool:
        most = self.settings.max_students
        return most is not None and self.students.n_judged >= most

    # -- stage 1

    def _removal(self) -> None:
        """Rollouts of the removal policy; random ones draw from the odds that it starts with."""
        settings, layers = self.settings, self.students.layers
        influence = self.students.influence() if self.of_blocks else None
        state = state_of(layers, influence)
        policy = self._made("removal", lambda: RemovalPolicy(state.shape[1], len(layers) if self.of_blocks else 0))
        learner = Learner(policy, settings.policy_rate, settings.own_rate, settings.memory)
        odds, places = self._first_odds(influence), torch.tensor(self.removable)
        learns = settings.policy == "reinforce"
        for epoch in range(settings.search_epochs):
            logits = (policy(state) + odds)[places] if learns else torch.zeros(len(places))
            gone = [self._draw(logits.detach()) for _ in range(settings.rollouts)]
            rewards = self.rewards([Student.of(places[each].tolist()) for each in gone], "removal", epoch)
            self.epochs[-1]["entropy"] = round(self._entropy(logits.detach()), 4)
            if learns:
                learner.learn(torch.stack([self._log_probability(logits, each) for each in gone]), rewards)
            if self._spent():
                break

    def _first_odds(self, influence: Sequence[float] | None) -> Tensor:
        """Logits (layers,) that the policy's are added to."""
        settings = self.settings
        if influence is None or settings.start == "none" or settings.policy != "reinforce":
            return torch.zeros(len(self.students.layers))
        if settings.start == "greedy" and settings.remove is not None:
            gone = torch.zeros(len(influence))
            gone[list(self._greedy().removed)] = 2.0
            return settings.strength * (gone - 1)
        return -settings.strength * standardised(influence).float()

    def _draw(self, logits: Tensor) -> Tensor:
        """Which of the removable go: BoolTensor."""
        if self.settings.remove is not None:
            return sample_subset(logits, self.settings.remove, self.generator)
        return torch.rand(len(logits), generator=self.generator) < logits.sigmoid()

    def _log_probability(self, logits: Tensor, gone: Tensor) -> Tensor:
        if self.settings.remove is not None:
            return subset_log_probability(logits, gone)
        return -nn.functional.binary_cross_entropy_with_logits(logits, gone.to(logits.dtype), reduction="sum")

    def _entropy(self, logits: Tensor) -> float:
        """Mean of a decision, in nats."""
        share = logits.sigmoid() if self.settings.remove is None else subset_shares(logits, self.settings.remove)
        return float(torch.special.entr(share).add(torch.special.entr(1 - share)).mean())

    # -- stage 2

    def _shrinkage(self, start: Student) -> None:
        """Rollouts of the shrinkage policy over what `start` has left."""
        settings, layers = self.settings, self.students.layers
        decisions = [
            (number, name)
            for number, layer in enumerate(layers)
            for name in layer.shrinks
            if number not in start.removed and name in settings.attributes
        ]
        if not decisions:
            return
        state = state_of(layers)
        rows = state[torch.tensor([number for number, _ in decisions])]
        attributes = torch.tensor([ATTRIBUTES.index(name) for _, name in decisions])
        policy = self._made("shrinkage", lambda: ShrinkagePolicy(state.shape[1]))
        assert isinstance(policy, ShrinkagePolicy)
        learner = Learner(policy, settings.shrink_rate, settings.own_rate, settings.memory)
        learns = settings.policy == "reinforce"
        for epoch in range(settings.shrink_epochs):
            if self._spent():
                break
            chosen, log_p, entropy = policy.roll_out(rows, attributes, settings.rollouts, self.generator)
            if not learns:
                chosen = torch.randint(len(MULTIPLIERS), chosen.shape, generator=self.generator)
            found = [
                Student.of(start.removed, [(*decision, MULTIPLIERS[i]) for decision, i in zip(decisions, row.tolist(),
                                                                                              strict=True)])
                for row in chosen
            ]  # fmt: skip
            rewards = self.rewards(found, "shrinkage", epoch)
            self.epochs[-1]["entropy"] = round(float(entropy), 4)
            if learns:
                learner.learn(log_p, rewards)

    def _made(self, name: str, make: Any) -> Any:
        """A policy, of weights that the search's generator draws, or those that it starts from."""
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = make()
        if self.settings.policy_in:
            load_policy(Path(self.settings.policy_in), name, policy)
        self.policies[name] = policy
        return policy

    # -- baselines, of blocks

    def _greedy(self) -> Student:
        """One after the other, the unit without which the student is best."""
        gone: list[int] = []
        for step in range(self.settings.remove or 0):
            candidates = [Student.of([*gone, number]) for number in self.removable if number not in gone]
            rewards = self.rewards(candidates, "greedy", step)
            best = candidates[max(range(len(candidates)), key=lambda i: rewards[i])]
            gone = list(best.removed)
        return Student.of(gone)

    def _least_influence(self) -> Student:
        """Those that change the hidden state least, all at once."""
        influence = self.students.influence()
        ordered = sorted(self.removable, key=lambda number: (influence[number], number))
        found = Student.of(ordered[: self.settings.remove])
        self.rewards([found], "influence", 0)
        return found
