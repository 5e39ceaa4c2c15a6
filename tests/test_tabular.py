"""With shared Bradley-Terry labels and converged steps, a moving reference is a smaller beta.

A converged step multiplies the reference by exp(reward / beta), so T steps at beta give S * exp(T reward /
beta), which is one step at beta / T. Policies are tables of log-probs over the answers to one prompt.

Shape suffixes: K answers, P ordered pairs of answers.
"""

import torch
from torch.autograd.functional import hessian, jacobian

from sdpo.types import ChosenRejected
from sdpo.variants import reference as references
from sdpo.variants.loss import dpo

K, T, BETA = 5, 4, 0.8


def table(seed):
    return torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


REWARD_K = 2 * table(0)
WON_P, LOST_P = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
CHANCE_P = torch.sigmoid(REWARD_K[WON_P] - REWARD_K[LOST_P])  # that the first of a pair is preferred


def converged(reference_K, beta):
    """The minimiser of DPO's expected loss over all pairs, by Newton's method from the reference."""

    def expected_loss(logits_K):
        policy, reference = (
            ChosenRejected(logps_K[WON_P], logps_K[LOST_P]) for logps_K in (logits_K.log_softmax(-1), reference_K)
        )
        return (CHANCE_P * dpo(policy, reference, beta=beta)).mean()

    logits_K = reference_K.clone()
    for _ in range(50):
        gradient_K = jacobian(expected_loss, logits_K)
        curvature_KK = hessian(expected_loss, logits_K)
        step_K = torch.linalg.pinv(curvature_KK, hermitian=True, rtol=1e-10) @ gradient_K  # logits plus c are one
        logits_K = logits_K - step_K.clamp(-1, 1)
    assert gradient_K.abs().max() < 1e-12
    return logits_K.log_softmax(-1)


def test_steps_at_beta_are_one_step_at_a_smaller_beta():
    models = {"M_0": table(1)}
    for t in range(1, T + 1):
        (window,) = references.previous(t, num_updates=1)
        (handle,) = window.weights
        models[f"M_{t}"] = converged(models[handle], BETA)

    closed_form_K = (models["M_0"] + T * REWARD_K / BETA).log_softmax(-1)
    torch.testing.assert_close(models[f"M_{T}"], closed_form_K, rtol=0, atol=1e-7)
    torch.testing.assert_close(models[f"M_{T}"], converged(models["M_0"], BETA / T), rtol=0, atol=1e-7)
    assert (models["M_1"] - models[f"M_{T}"]).abs().max() > 1  # the steps did move
