"""probe.file: the policy answers fixed prompts while it trains, which changes no bit of what is trained."""

import json
import shutil

import pytest
from conftest import needs_bf16, random_model, read_lines
from test_wandb_mirror import mirrored

from sdpo import config
from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals import generation
from sdpo.evals.decoding import Decoding
from sdpo.store.artifacts import Artifact, Store
from sdpo.train.setup import open_runner

PROMPTS = [Prompt("a", ["Say a."], "file"), Prompt("b", ["And b, in more words?"], "file")]


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt.turns[0]}) + "\n" for prompt in PROMPTS))
    return [f"probe.file={file}", "probe.answers_every=3", "probe.max_new_tokens=6", "record=wandb"]


QUICK = ["split=by_source", "evaluate=[]"]  # three steps of three updates
BF16 = ["precision=bf16", "launch.attention=plain"]


@pytest.mark.parametrize("more", [[], ["tune=lora"], pytest.param(BF16, marks=needs_bf16)])
def test_samples_change_no_bit_and_are_the_policy_s_greedy_answers(run, asked, monkeypatch, tmp_path, more):
    plain = run(*QUICK, *more, name="plain")
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    folder = run(*QUICK, *more, *asked, name="sampled")
    for t in "123":
        weights = [(one / "steps" / t / "model.safetensors").read_bytes() for one in (plain, folder)]
        assert weights[0] == weights[1]
    entries = read_lines(folder, "train")
    given = {(entry["t"], entry["update"]): entry["samples"] for entry in entries if "samples" in entry}
    assert set(given) == {(1, 3), (2, 3), (3, 3)}
    assert [row["prompt"] for row in given[2, 3]] == [prompt.turns[0] for prompt in PROMPTS]
    if not more:  # in fp32 M_2 is the policy after the last update of step 2
        assert [row["answer"] for row in given[2, 3]] == answers_of_m_2(folder)


def answers_of_m_2(folder):
    settings = config.load(folder / "config.yaml")
    runner, _ = open_runner(settings, Store())
    model = (folder / "steps" / "2").resolve()
    key = json.loads((folder / "manifest.json").read_text())["steps"][1]["key"]
    greedy = Decoding(0.0, 6, 2, 0)
    return [turns[0]["text"] for turns in generation.answers(Artifact(key, model, True), PROMPTS, greedy, runner)]


def test_w_and_b_has_a_table_of_all_samples_so_far_and_a_found_step_repeats_its_own(run, asked):
    first = read_lines(run(*QUICK, *asked, name="first"), "train")
    folder = run(*QUICK, *asked, name="again")
    assert read_lines(folder, "train") == first
    rows = [row["samples.nrows"] for row in mirrored(folder)[1] if "samples.nrows" in row]
    assert rows == [2, 4, 6]


def test_a_found_step_has_no_answers_to_prompts_that_were_not_asked(run, asked, tmp_path, capsys):
    run(*QUICK, *asked, name="first")
    other = tmp_path / "other.txt"
    other.write_text("Say c.")
    for named in ([f"probe.file={other}", "probe.answers_every=3"], []):
        found = read_lines(run(*QUICK, *named, name=f"with {len(named)}"), "train")
        assert len(found) == 9 and not any("samples" in entry for entry in found)
        assert capsys.readouterr().err.count("without these prompts of probe.file") == (3 if named else 0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_prompt_whose_answer_would_go_beyond_the_model_is_refused_before_any_work(run, toy, tmp_path, architecture):
    """GPT-2 has a table of positions, which ends; rotary positions go on without a word."""
    shutil.copytree(toy / "model", tmp_path / "model")
    random_model(architecture, max_position_embeddings=80).save_pretrained(tmp_path / "model")
    (tmp_path / "ask.txt").write_text("a" * 70)
    probed = [f"model.path={tmp_path / 'model'}", f"probe.file={tmp_path / 'ask.txt'}", "probe.answers_every=1"]
    cut = ["data.max_tokens=80", "data.on_long=drop", "split=all_at_once", "evaluate=[]"]
    sentence = "reads 80 tokens, .* may have 81; lower probe.max_new_tokens=11 or shorten the prompts of probe.file=/"
    with pytest.raises(UserError, match=sentence):
        run(*probed, *cut, "probe.max_new_tokens=11")
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))
    folder = run(*probed, *cut, "probe.max_new_tokens=10")
    assert all("samples" in entry for entry in read_lines(folder, "train"))


def test_a_file_that_cannot_be_read_is_named(run, tmp_path):
    with pytest.raises(UserError, match="nowhere.txt: cannot be read"):
        run(*QUICK, f"probe.file={tmp_path / 'nowhere.txt'}")
