"""What no run reads is refused, and what an arm's name denies; what some arms read may be given to all."""

import pytest
from omegaconf import OmegaConf

from sdpo.errors import UserError
from sdpo.launch import unread


def job(reads_t):
    return OmegaConf.create({"T": 2, "split": {"name": "random", "num_chunks": "${T}" if reads_t else 2}})


def test_t_is_refused_where_it_makes_equal_runs():
    reader, other = job(reads_t=True), job(reads_t=False)
    unread.refuse({"easy": (reader, ["arm=easy", "T=3"]), "plain": (other, ["arm=plain", "T=3"])})
    unread.refuse({"easy T=3": (reader, ["T=3"]), "easy T=4": (reader, ["T=4"])})
    unread.refuse({"plain": (other, ["arm=plain"])})
    with pytest.raises(UserError, match="this run does not read T=3: set split.num_chunks"):
        unread.refuse({"plain": (other, ["arm=plain", "T=3"])})
    with pytest.raises(
        UserError, match="the arm 'p T=3' does not read T=3"
    ):  # two rows with different names, but one result
        unread.refuse({f"{arm} T={t}": (one, [f"T={t}"]) for arm, one in (("e", reader), ("p", other)) for t in (3, 4)})


def test_an_arm_is_refused_whose_name_would_be_false():
    arm = "arm=baseline/easy_to_hard"
    unread.refuse({"easy_to_hard": (job(reads_t=True), [arm, "reference=previous", "loss=ipo"])})
    with pytest.raises(UserError, match="easy_to_hard is reference=previous, so with reference=initial its"):
        unread.refuse({"easy_to_hard": (job(reads_t=True), [arm, "reference=initial"])})


@pytest.mark.parametrize("split", [{"name": "easy_to_hard"}, {"name": "random", "num_chunks": 2, "keep": 0.5}])
def test_a_score_is_read_where_pairs_are_sorted_or_dropped(split):
    unread.refuse({"": (OmegaConf.create({"split": split}), ["score=gamma"])})


def test_a_limit_of_what_is_held_out_is_read_for_sets_alone_too():
    given = {"name": "local", "held_out": [], "held_out_sets": {"other": ["b.jsonl"]}}
    unread.refuse({"": (OmegaConf.create({"data": given}), ["data.held_out_limit=5"])})
    with pytest.raises(UserError, match="this run does not read data.held_out_limit=5: name held-out data"):
        unread.refuse({"": (OmegaConf.create({"data": given | {"held_out_sets": {}}}), ["data.held_out_limit=5"])})


def test_a_score_is_refused_where_none_is_read():
    with pytest.raises(UserError, match="this run does not read score=gamma"):
        unread.refuse({"": (job(reads_t=False), ["score=gamma"])})
