"""N2N: reward, constraint, REINFORCE and both policies against the paper, and on searches of known answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from compressor.core.errors import RecipeError
from compressor.core.students import MULTIPLIERS, Layer, Student
from compressor.ops.subsets import sample_subset, subset_log_probability, subset_shares
from compressor.passes.n2n import N2n, Search, constrained, constraint_decay, reward
from compressor.passes.parts.policies import (
    Learner,
    RemovalPolicy,
    ShrinkagePolicy,
    load_policy,
    reinforce_loss,
    save_policies,
    state_of,
)

# -- by the paper


def test_the_worked_values_of_reward_and_constraint():
    assert reward(0.9, 0.95) == pytest.approx(0.9405)
    assert reward(0.0, 1.0) == 0
    assert reward(0.95, 1.05) > 1  # not clipped
    assert constraint_decay(3) == pytest.approx(0.4096)
    assert constraint_decay(0) == 1
    assert constraint_decay(15) == constraint_decay(20) == 0  # it does not come back
    assert constrained(0.5, 0) == pytest.approx(0.5)
    assert constrained(0.5, 3) == pytest.approx(0.4096 - 1 + 0.4096 * 0.5)
    assert constrained(0.5, 99) == -1


def test_a_row_of_the_state_is_the_papers():
    layer = Layer("c", "conv", kernel=3, stride=2, outputs=64, padding=1, skip_start=1, skip_end=2)
    assert layer.row() == (0, 3, 2, 64, 1, 1, 2)
    assert state_of([layer]).shape == (1, 7)


def test_the_gradient_is_the_mean_of_advantages_times_scores_by_the_paper():
    """Independent coins of logits θ, float64: ∇ log π = a − σ(θ), written out."""
    torch.manual_seed(0)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    actions = torch.rand(3, 5) < 0.5
    rewards, baseline = [0.7, -1.0, 0.4], 0.2
    log_p = torch.stack([
        -torch.nn.functional.binary_cross_entropy_with_logits(theta, a.double(), reduction="sum") for a in actions
    ])  # fmt: skip
    reinforce_loss(log_p, torch.tensor(rewards, dtype=torch.float64), baseline).backward()
    for t in range(5):
        share = 1 / (1 + math.exp(-float(theta[t].detach())))
        ascent = sum((r - baseline) * (float(a[t]) - share) for r, a in zip(rewards, actions, strict=True)) / 3
        assert float(theta.grad[t]) == pytest.approx(-ascent, abs=1e-12)


def test_subsets_of_a_size_are_as_likely_as_enumeration_says_float64():
    theta = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    for k in (1, 2, 4):
        subsets = list(itertools.combinations(range(5), k))
        weights = [math.exp(sum(float(theta[i].detach()) for i in subset)) for subset in subsets]
        shares = [sum(w for s, w in zip(subsets, weights, strict=True) if i in s) / sum(weights) for i in range(5)]
        assert subset_shares(theta, k).tolist() == pytest.approx(shares)
        for subset, weight in zip(subsets, weights, strict=True):
            flags = torch.zeros(5, dtype=torch.bool)
            flags[list(subset)] = True
            assert float(subset_log_probability(theta, flags).detach()) == pytest.approx(
                math.log(weight / sum(weights))
            )
        (gradient,) = torch.autograd.grad(subset_log_probability(theta, flags), theta)
        assert gradient.tolist() == pytest.approx([float(f) - s for f, s in zip(flags, shares, strict=True)])


def test_drawn_subsets_have_the_size_and_the_shares():
    theta = torch.tensor([1.5, -1.0, 0.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_subset(theta, 2, generator) for _ in range(2000)])
    assert bool((drawn.sum(1) == 2).all())
    assert drawn.double().mean(0).tolist() == pytest.approx(subset_shares(theta, 2).tolist(), abs=0.04)
    with pytest.raises(ValueError, match="5 of 4 cannot be drawn"):
        sample_subset(theta, 5, generator)


# -- policies


@pytest.mark.parametrize("reward_of_it", [1.0, -1.0])
def test_a_rollout_above_the_baseline_gains_probability_and_one_below_loses_it(reward_of_it):
    torch.manual_seed(0)
    state = state_of([Layer(str(i), "conv", 3, 1, 8 * (i + 1), 1) for i in range(6)])
    policy = RemovalPolicy(7)
    learner = Learner(policy, 3e-3, 0.1, 0.8)
    learner.baseline = 0.0
    action = torch.tensor([1.0, 0, 1, 0, 0, 1])

    def log_p() -> torch.Tensor:
        return -torch.nn.functional.binary_cross_entropy_with_logits(policy(state), action, reduction="sum")

    before = float(log_p().detach())
    learner.learn(log_p().unsqueeze(0), [reward_of_it])
    assert (float(log_p().detach()) - before) * reward_of_it > 0
    assert learner.baseline == pytest.approx(0.2 * reward_of_it)


def test_each_rollout_of_an_epoch_has_its_own_credit():
    """The sum of both rewards is 0: with one scalar for all, nothing would be learned."""
    torch.manual_seed(0)
    state = state_of([Layer(str(i), "conv", 3, 1, 16, 1) for i in range(4)])
    policy = ShrinkagePolicy(7)
    rows, attributes = state, torch.zeros(4, dtype=torch.long)
    chosen = torch.tensor([[0, 0, 1, 6], [6, 5, 5, 2]])
    learner = Learner(policy, 1e-2, 0.1, 0.8)
    learner.baseline = 0.0

    def log_p() -> torch.Tensor:
        return policy.roll_out(rows, attributes, 2, torch.Generator(), chosen)[1]

    before = log_p().detach()
    learner.learn(log_p(), [0.5, -0.5])
    gained = log_p().detach() - before
    assert float(gained[0]) > 0 > float(gained[1])


def test_the_shrinkage_policy_is_told_what_it_chose():
    torch.manual_seed(0)
    policy = ShrinkagePolicy(7)
    rows, attributes = torch.zeros(3, 7), torch.zeros(3, dtype=torch.long)
    chosen = torch.tensor([[0, 3, 3], [6, 3, 3]])
    scores = policy.roll_out(rows, attributes, 2, torch.Generator(), chosen)[1].detach()
    step = torch.cat([torch.zeros(7), torch.tensor([1.0, 0, 0]), torch.zeros(7)]).view(1, 1, -1)
    first = policy.head(policy.lstm(step)[0][0]).log_softmax(1)[0].detach()
    later = scores - first[chosen[:, 0]]
    assert float(later[0]) != pytest.approx(float(later[1]), abs=1e-4)


def test_policies_are_saved_and_start_a_search_on_a_teacher_of_another_depth(tmp_path):
    torch.manual_seed(0)
    small, large = RemovalPolicy(9, 4), RemovalPolicy(9, 11)
    with torch.no_grad():
        small.own.fill_(1.0)
    save_policies(tmp_path / "policy.safetensors", {"removal": small})
    load_policy(tmp_path / "policy.safetensors", "removal", large)
    assert torch.equal(large.head.weight, small.head.weight)
    assert large.own.tolist() == [0.0] * 11
    with pytest.raises(RecipeError, match="holds no shrinkage policy that fits"):
        load_policy(tmp_path / "policy.safetensors", "shrinkage", ShrinkagePolicy(7))
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(RecipeError, match="is no saved policy"):
        load_policy(tmp_path / "broken", "removal", large)


# -- searches of known answer


class Bandit:
    """Students whose accuracy is told by a formula: each layer has a worth that is lost with it."""

    accuracy, n_judged = 0.8, 0

    def __init__(self, worth, size=100, kind="conv", shrinks=()):
        self.worth, self.unit, self.seen, self.asked = worth, size, {}, []
        self.layers = [
            Layer(f"l{i}", kind, 1 + 3 * (i % 3), 1, 4 ** (i % 6), i % 2, shrinks=shrinks) for i in range(len(worth))
        ]
        self.parameters = size * len(worth)

    def size(self, student):
        shares = {layer: share for layer, _, share in student.shrunk}
        found = sum(self.unit * shares.get(i, 1.0) for i in range(len(self.worth)) if i not in student.removed)
        return int(found) if 0 < found < self.parameters else None

    def judge(self, students):
        for student in students:
            if student not in self.seen:
                self.asked.append(student)
                lost = sum(self.worth[i] for i in student.removed)
                lost += sum(self.worth[i] * (1 - share) / 2 for i, _, share in student.shrunk)
                self.seen[student] = max(0.0, self.accuracy * (1 - lost))
        self.n_judged = len(self.seen)
        return [self.seen[student] for student in students]

    def influence(self):
        return [0.01 + worth for worth in self.worth]

    def slowness(self, student):
        return self.size(student) / self.parameters

    def facts(self):
        return {}


def searched(bandit, seed=0, **settings):
    search = Search(N2n(**settings), bandit, torch.Generator().manual_seed(seed))
    return search.run(), search


WORTH = [0.5, 0.0, 0.4, 0.02, 0.3, 0.01]


def test_the_policy_finds_the_known_best_student_and_comes_to_prefer_it():
    """Of 64 students the best by R is the one without the three worthless layers."""
    options = [Student.of(each) for n in range(1, 6) for each in itertools.combinations(range(6), n)]
    bandit = Bandit(WORTH)
    known = max(options, key=lambda s: reward(1 - bandit.size(s) / 600, bandit.judge([s])[0] / 0.8))
    bandit = Bandit(WORTH)
    best, search = searched(bandit, search_epochs=200, filters=False, policy_rate=1e-2)
    assert best == known
    means = [sum(epoch["rewards"]) / 5 for epoch in search.epochs]
    assert sum(means[-20:]) / 20 > sum(means[:20]) / 20 + 0.1
    last = [trial.student for trial in search.trials[-50:]]
    assert last.count(known.key) > 40
    assert search.epochs[-1]["entropy"] < search.epochs[0]["entropy"]


def test_a_fixed_number_of_blocks_goes_and_the_policy_beats_random_ones():
    worth = [0.2, 0.01, 0.3, 0.02, 0.25, 0.15, 0.03, 0.4, 0.05, 0.1, 0.12, 0.3]
    bandit = Bandit(worth, kind="block")
    best, search = searched(bandit, units="block", remove=4, search_epochs=40, start="none")
    assert all(len(Student.read(trial.student).removed) == 4 for trial in search.trials)
    _, random = searched(Bandit(worth, kind="block"), units="block", remove=4, search_epochs=40, policy="random")
    means = [sum(t.reward for t in each.trials[-50:]) / 50 for each in (search, random)]
    assert means[0] > means[1] + 0.05
    assert sum(worth[i] for i in best.removed) <= 0.15


def test_the_baselines_take_what_they_say():
    worth = [0.2, 0.01, 0.3, 0.02, 0.25]
    bandit = Bandit(worth, kind="block")
    best, _ = searched(bandit, policy="greedy", remove=2, units="block")
    assert best.removed == (1, 3)
    assert len(bandit.asked) == 5 + 4  # SLEB asks every one that is left, anew after each
    bandit = Bandit(worth, kind="block")
    assert searched(bandit, policy="influence", remove=3, units="block")[0].removed == (0, 1, 3)
    assert len(bandit.asked) == 1


def test_a_start_from_greedy_is_never_worse_than_greedy():
    bandit = Bandit([0.2, 0.01, 0.3, 0.02, 0.25, 0.04], kind="block")
    greedy, _ = searched(bandit, policy="greedy", remove=3, units="block")
    best, _ = searched(bandit, start="greedy", remove=3, units="block", search_epochs=3)
    assert bandit.seen[best] >= bandit.seen[greedy]


def test_layers_shrink_where_that_pays():
    bandit = Bandit([0.9, 0.0, 0.9], shrinks=("outputs",))
    best, search = searched(bandit, search_epochs=5, shrink_epochs=60, filters=False, shrink_rate=0.02)
    assert {trial.stage for trial in search.trials} == {"removal", "shrinkage"}
    assert all(share in MULTIPLIERS for _, _, share in best.shrunk)
    stages = [max(t.reward for t in search.trials if t.stage == stage) for stage in ("removal", "shrinkage")]
    assert stages[1] > stages[0]


def test_a_constraint_is_kept_by_what_comes_out():
    bandit = Bandit(WORTH)
    best, search = searched(bandit, search_epochs=60, max_parameters=0.4, filters=False)
    assert bandit.size(best) <= 0.4 * bandit.parameters
    late = [t for t in search.trials if t.epoch >= 15 and not t.meets]
    assert late
    assert {t.reward for t in late} == {-1.0}
    best, _ = searched(Bandit(WORTH), search_epochs=60, min_accuracy=0.95, filters=False)
    assert Bandit(WORTH).judge([best])[0] >= 0.95 * 0.8
    with pytest.raises(RecipeError, match="none of 10 students keeps the constraints"):
        searched(Bandit(WORTH), search_epochs=2, max_parameters=1e-3)


def test_students_that_cannot_win_are_not_trained_and_the_answer_is_the_same():
    plain, filtered = Bandit(WORTH), Bandit(WORTH)
    best, _ = searched(plain, search_epochs=40, filters=False)
    again, search = searched(filtered, search_epochs=40)
    assert len(filtered.asked) < len(plain.asked)
    assert plain.seen[again] == pytest.approx(filtered.seen[again])
    values = [reward(1 - plain.size(s) / 600, s_a / 0.8) for s, s_a in ((best, plain.seen[best]),
                                                                         (again, filtered.seen[again]))]  # fmt: skip
    assert values[1] >= values[0] - 0.02
    skipped = [t for t in search.trials if t.accuracy is None and t.parameters is not None]
    assert skipped
    assert all(-1 < t.reward <= 1.02 for t in skipped)


def test_of_students_of_one_size_none_is_left_untrained():
    """No score tells which of them will be better."""
    search = Search(N2n(search_epochs=1), Bandit(WORTH), torch.Generator().manual_seed(0))
    equals = [Student.of([number]) for number in range(6)]
    search.rewards(equals, "removal", 0)
    assert all(trial.accuracy is not None for trial in search.trials)


def test_an_invalid_student_earns_minus_one():
    _, search = searched(Bandit([0.1, 0.1]), search_epochs=10)
    invalid = [t for t in search.trials if t.parameters is None]
    assert invalid
    assert {t.reward for t in invalid} == {-1.0}


def test_the_same_seed_gives_the_same_search_and_another_another():
    first, second, third = (searched(Bandit(WORTH), seed, search_epochs=5)[1].trials for seed in (1, 1, 2))
    assert first == second != third


def test_max_students_ends_a_search():
    bandit = Bandit([0.1] * 12)
    searched(bandit, search_epochs=100, max_students=12, filters=False)
    assert 12 <= len(bandit.asked) < 12 + 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "greedy"}, "policy greedy has to know how many blocks go; write remove: 3"),
        ({"policy": "greedy", "remove": 2, "units": "layer"}, "policy greedy is of blocks, but units is layer"),
        ({"policy": "influence", "remove": 2, "units": "part"}, "policy influence is of whole blocks"),
        ({"measure": "perplexity", "units": "layer"}, "measure perplexity is of blocks"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        N2n(**settings)


def test_what_cannot_be_removed_is_refused_before_a_student_is_built():
    bandit = Bandit(WORTH)
    with pytest.raises(RecipeError, match="remove is 6, but of 6 units one has to stay; write at most 5"):
        searched(bandit, remove=6)
    with pytest.raises(RecipeError, match="policy greedy is of blocks, and this network's units are layers"):
        searched(bandit, policy="greedy", remove=2)
    bandit.layers = [Layer("head", "linear", fixed="is the last layer")]
    with pytest.raises(RecipeError, match="no layer of the network can go; 'head' is the last layer"):
        searched(bandit)
    assert not bandit.asked


def test_a_students_description_is_canonical():
    student = Student.of([3, 1, 3], [(1, "outputs", 0.5), (4, "kernel", 1.0), (2, "outputs", 0.25)])
    assert student == Student((1, 3), ((2, "outputs", 0.25),))
    assert Student.read(student.key) == student
