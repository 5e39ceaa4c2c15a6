"""Preference losses: functions of the summed log-probs, lengths and ratings of pairs.

The positional parameters name the data that a loss reads, each a `ChosenRejected` [B]: `policy` and `reference`, summed
log-probs of the responses in nats; `lengths` of the responses in tokens; `ratings` of a judge; `divergence`, the sums
of KL(reference || policy) over the tokens of a response, in nats. `mixture` alone reads `parts`, the values of other
losses. If token_weights.py has a function of the loss's name, the sums are weighted. A
loss returns one value per pair [B], which does not depend on other pairs, so gradient accumulation changes no result.

In the equations, margin = (logp_w - logp_l) - (ref_w - ref_l) with w the chosen and l the rejected response, log-ratio
is logp - ref of one response, and r = beta * log-ratio is its reward. Shape suffixes: B pairs.
"""

import math
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo.errors import UserError
from sdpo.types import ChosenRejected


class OverTokens(StrEnum):
    """How the log-probs of a response's tokens are combined."""

    sum = "sum"
    mean = "mean"


def dpo(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin), Rafailov et al. 2305.18290 eq. 7. TRL: `sigmoid`, which has no smoothing.

    `label_smoothing` is the probability that a label is flipped (cDPO, Mitchell 2023). Raises UserError unless
    0 <= label_smoothing < 0.5.
    """
    _check_smoothing(label_smoothing)
    logits_B = beta * _margin(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(logits_B) - label_smoothing * F.logsigmoid(-logits_B)


def robust(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO that stays unbiased if labels are flipped with probability e = `label_smoothing`:
    ((1 - e) dpo(margin) - e dpo(-margin)) / (1 - 2 e), Chowdhury et al. 2403.00409. TRL: `robust`.

    Raises UserError unless 0 <= label_smoothing < 0.5.
    """
    _check_smoothing(label_smoothing)
    logits_B = beta * _margin(policy, reference)
    kept_B = (1 - label_smoothing) * F.logsigmoid(logits_B)
    flipped_B = label_smoothing * F.logsigmoid(-logits_B)
    return (flipped_B - kept_B) / (1 - 2 * label_smoothing)


def ipo(
    policy: ChosenRejected,
    reference: ChosenRejected,
    lengths: ChosenRejected,
    *,
    beta: float,
    over_tokens: OverTokens = OverTokens.mean,
) -> Tensor:
    """(margin - 1 / (2 beta))^2, Azar et al. 2310.12036 eq. 17, with beta for their tau.

    Two losses have this name. `over_tokens=sum` is the equation as printed. `over_tokens=mean` divides each log-ratio
    by the tokens of its response; TRL (`ipo`) does so and says that the authors confirmed it.
    """
    chosen_B, rejected_B = _log_ratios(policy, reference)
    margin_B = _over(over_tokens, chosen_B, lengths.chosen) - _over(over_tokens, rejected_B, lengths.rejected)
    return (margin_B - 1 / (2 * beta)) ** 2


def hinge(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """max(0, 1 - beta * margin), Zhao et al. 2305.10425 (SLiC-HF) in the normalised form of Liu et al.
    2309.06657 (RSO). TRL: `hinge`.
    """
    return F.relu(1 - beta * _margin(policy, reference))


def exo(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, label_smoothing: float) -> Tensor:
    """KL from the policy's preference p = sigmoid(beta * margin) to the smoothed label:
    p log(p / (1 - e)) + (1 - p) log((1 - p) / e) with e = `label_smoothing`, Ji et al. 2402.00856 eq. 16.
    TRL: `exo_pair`.

    Raises UserError unless 0 < label_smoothing < 0.5.
    """
    _check_smoothing(label_smoothing)
    if label_smoothing == 0:
        raise UserError("loss.label_smoothing must be above 0 for loss=exo, because at 0 the loss is infinite")
    logits_B = beta * _margin(policy, reference)
    won_B, lost_B = F.logsigmoid(logits_B), F.logsigmoid(-logits_B)
    kept_B = won_B.exp() * (won_B - math.log1p(-label_smoothing))
    return kept_B + lost_B.exp() * (lost_B - math.log(label_smoothing))


def nca(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """Noise-contrastive alignment for pairs: -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2,
    Chen et al. 2402.05369. TRL: `nca_pair`.
    """
    chosen_B, rejected_B = _rewards(policy, reference, beta)
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def sppo_hard(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """(log-ratio_w - 1 / (2 beta))^2 + (log-ratio_l + 1 / (2 beta))^2, Wu et al. 2405.00675 eq. 4.7 with win
    probabilities 1 and 0, and 1 / beta for their eta. TRL: `sppo_hard`.
    """
    chosen_B, rejected_B = _log_ratios(policy, reference)
    return (chosen_B - 0.5 / beta) ** 2 + (rejected_B + 0.5 / beta) ** 2


def apo_zero(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l), D'Oosterlinck et al. 2408.06266 eq. 7: raises the chosen and lowers the rejected
    response, for chosen responses that are better than the model's own. TRL: `apo_zero`.
    """
    chosen_B, rejected_B = _rewards(policy, reference, beta)
    return torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B)


def apo_down(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l), D'Oosterlinck et al. 2408.06266 eq. 8: lowers both responses, the rejected
    one more, for chosen responses that are worse than the model's own. TRL: `apo_down`.
    """
    chosen_B, rejected_B = _rewards(policy, reference, beta)
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


def discopop(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, tau: float) -> Tensor:
    """(1 - m) log(1 + exp(-z)) + m exp(-z) with z = beta * margin and m = sigmoid(z / tau), Lu et al. 2406.08414 eq. 5
    (LRML): a mixture of the logistic and the exponential loss. TRL: `discopop`.
    """
    logits_B = beta * _margin(policy, reference)
    mix_B = torch.sigmoid(logits_B / tau)
    return (1 - mix_B) * -F.logsigmoid(logits_B) + mix_B * torch.exp(-logits_B)


def hypo(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """DPO with max(gamma_ref, 0) instead of gamma_ref: if the reference prefers the rejected response, the loss ignores
    it. HyPO 2602.11902.
    """
    gamma_ref_B = reference.chosen - reference.rejected
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected - gamma_ref_B.clamp(min=0)))


def odpo(
    policy: ChosenRejected, reference: ChosenRejected, ratings: ChosenRejected, *, beta: float, alpha: float
) -> Tensor:
    """DPO with an offset that the margin must exceed: -log sigmoid(beta * margin - alpha * log(rating gap)), Amini et
    al. 2402.10571. Raises UserError unless every chosen response is rated above its rejected one.
    """
    gap_B = ratings.chosen - ratings.rejected
    if not bool((gap_B > 0).all()):
        raise UserError("loss=odpo needs chosen responses rated above their rejected ones: remove the other pairs")
    return -F.logsigmoid(beta * _margin(policy, reference) - alpha * gap_B.log())


def simpo(policy: ChosenRejected, lengths: ChosenRejected, *, beta: float, target_margin: float) -> Tensor:
    """-log sigmoid(beta * (logp_w / n_w - logp_l / n_l) - target_margin), Meng et al. 2405.14734: reference-free DPO on
    log-probs per token; `target_margin` is their gamma, n are the tokens of a response. TRL's CPO: `simpo`.
    """
    per_token_B = policy.chosen / lengths.chosen - policy.rejected / lengths.rejected
    return -F.logsigmoid(beta * per_token_B - target_margin)


def cpo(
    policy: ChosenRejected,
    lengths: ChosenRejected,
    *,
    beta: float,
    alpha: float,
    over_tokens: OverTokens = OverTokens.mean,
) -> Tensor:
    """-log sigmoid(beta * (logp_w - logp_l)) + alpha * nll_w, Xu et al. 2401.08417: DPO with a uniform reference plus
    the NLL of the chosen response.

    The paper sums the NLL over tokens (`over_tokens=sum`). The authors' code and TRL's CPO take the mean over the
    tokens of the batch; `mean` here is over the tokens of each response.
    """
    nll_B = _over(over_tokens, -policy.chosen, lengths.chosen)
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected)) + alpha * nll_B


def orpo(policy: ChosenRejected, lengths: ChosenRejected, *, beta: float) -> Tensor:
    """NLL per token plus beta (their lambda) times the odds-ratio loss, Hong et al. 2403.07691 eq. 4, 7.

    TRL's ORPO includes the prompt in the NLL; here, as in the paper, the NLL is that of the response only.
    """
    chosen_B, rejected_B = policy.chosen / lengths.chosen, policy.rejected / lengths.rejected
    log_odds_B = chosen_B - rejected_B - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
    return -chosen_B - beta * F.logsigmoid(log_odds_B)


def dpop(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, penalty: float) -> Tensor:
    """-log sigmoid(beta * (margin - penalty * max(0, -log-ratio_w))), DPO-Positive, Pal et al. 2402.13228: DPO with a
    penalty (their lambda) if the chosen response becomes less likely than under the reference.
    """
    chosen_B, rejected_B = _log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen_B - rejected_B - penalty * F.relu(-chosen_B)))


def rpo(
    policy: ChosenRejected,
    reference: ChosenRejected,
    lengths: ChosenRejected,
    *,
    beta: float,
    alpha: float,
    over_tokens: OverTokens = OverTokens.mean,
) -> Tensor:
    """-log sigmoid(beta * margin) + alpha * nll_w: DPO plus the NLL of the chosen response.

    Two losses have this name. `over_tokens=mean` is Pang et al. 2404.19733 (TRL: `sigmoid` and `sft` with weights 1 and
    alpha). `over_tokens=sum` is Liu et al. 2405.16436.
    """
    nll_B = _over(over_tokens, -policy.chosen, lengths.chosen)
    return -F.logsigmoid(beta * _margin(policy, reference)) + alpha * nll_B


def sft(policy: ChosenRejected, lengths: ChosenRejected, *, over_tokens: OverTokens = OverTokens.mean) -> Tensor:
    """The NLL of the chosen response, per token or summed; the rejected response is not read.

    TRL's `sft` takes the mean over the tokens of the batch; `mean` here is over the tokens of each response.
    """
    return _over(over_tokens, -policy.chosen, lengths.chosen)


def sampo(policy: ChosenRejected, reference: ChosenRejected, *, beta: float) -> Tensor:
    """DPO on as many tokens of the longer response as the shorter one has, drawn at random (SamPO, Lu et al.
    2406.10957). token_weights.py draws them, once per pair and step, for policy and reference alike, as in the paper.
    The authors' code draws anew in every forward pass, for each of the two.
    """
    return dpo(policy, reference, beta=beta)


def ld_dpo(policy: ChosenRejected, reference: ChosenRejected, *, beta: float, alpha: float) -> Tensor:
    """DPO in which the tokens of the longer response behind the length of the shorter one count `alpha` each (LD-DPO,
    Liu et al. 2409.06411). token_weights.py reads `alpha`. TRL: `sigmoid` with `ld_alpha`.

    Raises UserError unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"loss.alpha must be from 0 to 1 for loss=ld_dpo, not {alpha}")
    return dpo(policy, reference, beta=beta)


def tdpo1(policy: ChosenRejected, reference: ChosenRejected, divergence: ChosenRejected, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (margin - (D_l - D_w))) with D the sum of KL(reference || policy) over a response's tokens,
    Zeng et al. 2404.11999 (TDPO1).
    """
    return -F.logsigmoid(beta * (_margin(policy, reference) - (divergence.rejected - divergence.chosen)))


def tdpo2(
    policy: ChosenRejected, reference: ChosenRejected, divergence: ChosenRejected, *, beta: float, alpha: float
) -> Tensor:
    """-log sigmoid(beta * (margin - alpha * (D_l - D_w))), where D_w gets no gradient, Zeng et al. 2404.11999
    (TDPO2): the policy stays near the reference on rejected responses only. D is as in `tdpo1`.
    """
    gap_B = divergence.rejected - divergence.chosen.detach()
    return -F.logsigmoid(beta * (_margin(policy, reference) - alpha * gap_B))


def mixture(parts: list[Tensor], *, of: list[dict[str, Any]]) -> Tensor:
    """The weighted sum of other losses. `parts` are their values [B]; `of` are their settings, each with a `weight`."""
    return torch.stack([one["weight"] * part_B for one, part_B in zip(of, parts, strict=True)]).sum(0)


def _log_ratios(policy: ChosenRejected, reference: ChosenRejected) -> ChosenRejected:
    return ChosenRejected(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def _rewards(policy: ChosenRejected, reference: ChosenRejected, beta: float) -> ChosenRejected:
    chosen_B, rejected_B = _log_ratios(policy, reference)
    return ChosenRejected(beta * chosen_B, beta * rejected_B)


def _margin(policy: ChosenRejected, reference: ChosenRejected) -> Tensor:
    """gamma_theta - gamma_ref. This order keeps the most digits: each gamma subtracts numbers of similar size."""
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def _over(over_tokens: OverTokens, logp_B: Tensor, tokens_B: Tensor) -> Tensor:
    return logp_B / tokens_B if OverTokens(over_tokens) is OverTokens.mean else logp_B


def _log1mexp(logp_B: Tensor) -> Tensor:
    """log(1 - exp(logp)); expm1 keeps it accurate if the probability is near one."""
    return torch.log(-torch.expm1(logp_B))


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"loss.label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
