"""The names of a network's outputs, and what each is taken for."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from compressor.core.output_kinds import kind_of
from compressor.core.outputs import named_outputs

A, B, C = (torch.full((2,), float(i)) for i in range(3))


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (A, ["output"]),
        ((A,), ["output"]),
        ((A, None), ["output"]),
        ((A, ()), ["output"]),
        ((A, B), ["output_0", "output_1"]),
        ((A, (B, C)), ["output_0", "output_1.0", "output_1.1"]),
        ([[A, B]], ["output_0.0", "output_0.1"]),
        ({"logits": A, "boxes": B}, ["logits", "boxes"]),
        ({"logits": A, "levels": (B, C)}, ["logits", "levels.0", "levels.1"]),
        ({"text": OrderedDict(pooled=A), "loss": None}, ["text.pooled"]),
        ({"logits": A, "past_key_values": ((B, C),)}, ["logits"]),
    ],
)
def test_every_tensor_is_named_by_the_way_to_it(returned, names):
    found = named_outputs(returned)
    assert list(found) == names
    assert found[names[0]] is A


def test_what_is_no_tensor_is_no_output():
    assert named_outputs("nothing") == {}


TEXT = {"input_ids": np.ones((3, 5), int), "attention_mask": np.ones((3, 5), int)}
IMAGE = {"pixel_values": np.zeros((3, 3, 8, 8))}


def spread(*shape):
    return np.random.default_rng(0).normal(size=shape) * 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "values", "inputs", "label"),
    [
        ("logits", spread(3, 4), TEXT, "classes"),
        ("logits", spread(3, 1), TEXT, "scores"),  # relevance: one logit
        ("logits", spread(3, 5, 4), TEXT, "tokens"),
        ("logits", spread(3, 5), TEXT, "scores"),  # a logit for each token, as of a discriminator
        ("start_logits", spread(3, 5), TEXT, "positions"),
        ("last_hidden_state", spread(3, 5, 8), TEXT, "vectors"),
        ("pooler_output", spread(3, 8), TEXT, "vectors"),
        ("image_embeds", spread(3, 8), IMAGE, "vectors"),
        ("logits", spread(3, 4, 8, 8), IMAGE, "classes"),  # of every pixel
        ("logits", spread(3, 7, 4), IMAGE, "classes"),  # of every query
        ("pred_boxes", sigmoid(spread(3, 7, 4)), IMAGE, "values"),
        ("pred_masks", spread(3, 7, 4, 4), IMAGE, "scores"),
        ("output", spread(3, 4), IMAGE, "classes"),
        ("output", softmax(spread(3, 4)), IMAGE, "classes"),
        ("output", sigmoid(spread(3, 4)), IMAGE, "scores"),  # classes that do not exclude each other
        ("output", spread(3, 1), IMAGE, "values"),
        ("output", spread(3), IMAGE, "values"),
        ("output", sigmoid(spread(3, 1)), IMAGE, "scores"),
        ("output", spread(3, 3, 8, 8), IMAGE, "values"),
        ("output", spread(3, 9, 4), IMAGE, "vectors"),
        ("output", np.arange(3), IMAGE, "numbers"),
    ],
)
def test_an_output_is_taken_for_what_its_name_shape_and_values_say(name, values, inputs, label):
    assert kind_of(name, values, inputs).label == label


def test_probabilities_are_told_from_logits():
    assert kind_of("output", softmax(spread(3, 4)), IMAGE).probabilities
    assert not kind_of("output", spread(3, 4), IMAGE).probabilities


def test_scores_have_the_threshold_of_logits_or_of_probabilities():
    assert kind_of("logits", spread(3, 1), TEXT).threshold == 0
    assert kind_of("output", sigmoid(spread(3, 1)), IMAGE).threshold == 0.5


def test_a_config_says_what_logits_are_for():
    assert kind_of("logits", spread(3, 4), TEXT, {"problem_type": "multi_label_classification"}).label == "scores"
    assert kind_of("logits", spread(3, 4), TEXT, {"problem_type": "regression"}).label == "values"


def test_labels_tell_classes_from_vectors():
    assert kind_of("output", spread(3, 9, 4), IMAGE, labels=np.zeros((3, 9), int)).label == "classes"
    assert kind_of("output", spread(3, 4, 8, 8), IMAGE, labels=np.zeros((3, 8, 8), int)).axis == 1


BOX = np.random.default_rng(0).normal(size=(8, 4)) * 0.1  # offsets, as face finders give


@pytest.mark.parametrize(
    ("name", "values", "label"),
    [
        ("dense_5", BOX, "values"),
        ("logits", BOX, "classes"),
        ("output", np.sort(np.random.default_rng(1).uniform(0, 300, (8, 4))), "values"),  # corners
        ("dense_6", np.random.default_rng(2).uniform(0.2, 0.9, (8, 10)), "values"),  # five points
        ("output", np.random.default_rng(3).normal(size=(8, 4)) * 3, "classes"),
        ("output", sigmoid(np.random.default_rng(4).normal(size=(8, 10)) * 4), "scores"),
        ("output", BOX[:3], "classes"),  # too few to tell
    ],
)
def test_boxes_and_points_that_no_name_tells_of_are_known_by_their_values(name, values, label):
    assert kind_of(name, values, IMAGE).label == label


def test_a_state_that_a_step_hands_on_is_a_vector_and_what_the_network_says_of_its_input_is_not():
    state = spread(3, 2, 1, 8)
    given = {"input": spread(3, 16), "state": state}
    assert kind_of("stateN", state, given).label == "vectors"
    assert kind_of("stateN", state, given | {"state": state[:, :1]}).label == "values"
    picture = spread(3, 3, 8, 8)
    assert kind_of("image_sharp", picture, {"image": picture, "sigma": spread(3)}).label == "values"
