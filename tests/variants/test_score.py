"""Scores of two pairs by hand."""

import math

import numpy as np
import pytest

from sdpo.errors import UserError
from sdpo.variants import score as scores

LOGPS = np.array([[-4.0, -6.0], [-9.0, -8.0]])
LENGTHS = np.array([[2, 6], [9, 4]])


def test_gamma_is_the_difference_of_sums():
    assert scores.gamma(LOGPS).tolist() == [2.0, -1.0]


def test_gamma_per_token_is_the_difference_of_means():
    assert scores.gamma_per_token(LOGPS, LENGTHS).tolist() == [-2.0 + 1.0, -1.0 + 2.0]


def test_implicit_reward_is_the_change_of_gamma_by_fine_tuning():
    base = np.array([[-5.0, -5.0], [-3.0, -6.0]])
    assert scores.implicit_reward(LOGPS, base, path="base").tolist() == [2.0, -4.0]
    assert scores.implicit_reward(LOGPS, LOGPS, path="itself").tolist() == [0.0, 0.0]


def test_reward_model_is_the_gap_of_rewards():
    assert scores.reward_model(np.array([[0.5, -1.0], [2.0, 3.0]]), path="rm").tolist() == [1.5, -1.0]


def test_rating_gap_needs_both_ratings():
    assert scores.rating_gap(np.array([[8.0, 3.0], [6.0, 6.5]])).tolist() == [5.0, -0.5]
    with pytest.raises(UserError, match="which 1 of 2 training pairs lack; choose another score"):
        scores.rating_gap(np.array([[8.0, 3.0], [6.0, np.nan]]))


def test_a_column_is_taken_as_it_is():
    assert scores.column(np.array([0.5, -3.0]), file="easy.csv").tolist() == [0.5, -3.0]


def test_a_shorter_chosen_response_and_a_shorter_prompt_are_easier():
    assert scores.length_gap(LENGTHS).tolist() == [4, -5]
    assert scores.prompt_length(np.array([7, 3])).tolist() == [-7, -3]


def test_validation_loss_is_the_mean_over_repeats():
    # At margin 0 the loss is ln 2; at beta * margin = ln 3 it is -ln(3/4), at -ln 3 it is -ln(1/4).
    margins = np.array([[0.0, 0.0], [2 * math.log(3), -2 * math.log(3)]])
    values = scores.validation_loss(margins, beta=0.5)
    assert values == pytest.approx([-math.log(2), (math.log(3 / 4) + math.log(1 / 4)) / 2])
