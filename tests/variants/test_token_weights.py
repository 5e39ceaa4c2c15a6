"""Weights of response tokens by hand."""

import numpy as np
import pytest

from sdpo.variants import token_weights


def test_sampo_draws_as_many_tokens_of_the_longer_response_as_the_shorter_has():
    chosen, rejected = token_weights.sampo(5, 2, [0])
    assert sorted(chosen) == [0, 0, 0, 1, 1] and rejected.tolist() == [1, 1]
    assert [weights.tolist() for weights in token_weights.sampo(3, 3, [0])] == [[1, 1, 1]] * 2
    draws = np.mean([token_weights.sampo(2, 8, [seed])[1] for seed in range(2000)], axis=0)
    assert draws == pytest.approx([0.25] * 8, abs=0.04)  # each token with probability 2/8; 4 standard errors


def test_ld_dpo_discounts_what_is_behind_the_length_of_the_shorter_response():
    both = token_weights.ld_dpo(2, 5, [0], alpha=0.25)
    assert [weights.tolist() for weights in both] == [[1, 1], [1, 1, 0.25, 0.25, 0.25]]
    both = token_weights.ld_dpo(3, 0, [0], alpha=0.5)
    assert [weights.tolist() for weights in both] == [[0.5] * 3, []]
