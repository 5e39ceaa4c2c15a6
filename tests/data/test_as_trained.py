"""An exported model carries how it was trained to talk."""

import json

import pytest
import torch
from conftest import byte_tokenizer, random_model
from test_tokenize import EOS, SPLITS_THOUGHTS, TURNS, pair, tokens
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from sdpo import export
from sdpo.data.prompt_and_answer import ChatFormat, as_trained
from sdpo.data.templates import TEMPLATES
from sdpo.data.tokenize import content_hash, prompt_ids

ASKED = [{"role": "user", "content": "Why?"}]


def test_a_model_trained_with_chatml_answers_in_chatml(run, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save_pretrained(tmp_path / "model")
    random_model().save_pretrained(tmp_path / "model")
    generation = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}  # as some are published, without do_sample
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    folder = run(f"model.path={tmp_path / 'model'}", "data.template=chatml", "split=all_at_once", "evaluate=[]")
    exported = export.export(folder, 1, tmp_path / "M_1")
    model, own = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert own.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == [own.eos_token_id, 2]
    assert model.generation_config.temperature == 0.9
    asked = own.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")
    assert asked["input_ids"].tolist() == prompt_ids(ChatFormat(tokenizer, "chatml"), [tuple(ASKED)])
    # The model is made to end its turn: generation stops there, and the answer is empty once decoded.
    with torch.no_grad():
        model.lm_head.weight[own.eos_token_id] = 10 * model(**asked, output_hidden_states=True).hidden_states[-1][0, -1]
    answer = model.generate(**asked, max_new_tokens=9, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert answer.tolist() == [own.eos_token_id] and own.decode(answer, skip_special_tokens=True) == ""


@pytest.mark.parametrize(("named", "kept"), [([7, 2, 5], [259, 2, 7, 5]), (5, [259, 2, 5]), (2, [259, 2])])
def test_a_model_keeps_the_stops_that_s_names_behind_its_own(run, tmp_path, named, kept):
    tokenizer, folder = byte_tokenizer(), tmp_path / "model"
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    tokenizer.save_pretrained(folder)
    random_model().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    trained = run(f"model.path={folder}", "data.template=chatml", "split.keep=0.5", "split=random", "evaluate=[]")
    for t in (1, 2):
        saved = json.loads((trained / "steps" / str(t) / "generation_config.json").read_text())
        assert saved["eos_token_id"] == kept


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("marks", [[], ["<|im_start|>", "<|im_end|>"]])
def test_a_trained_tokenizer_has_the_ids_of_the_training_in_its_own_template(bos_tokenizer, template, marks, tmp_path):
    bos_tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    bos_tokenizer.chat_template = SPLITS_THOUGHTS
    carrying, stops = as_trained(bos_tokenizer, template), ChatFormat(bos_tokenizer, template).stops
    carrying.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    asked = [pair(turns=TURNS), pair("2")]
    rows, report = tokens(asked, bos_tokenizer, template)
    again, _ = tokens(asked, loaded, None)
    assert content_hash(again.values()) == content_hash(rows.values())
    assert rows["1"].chosen[-1] == stops[0] and EOS in stops
    assert loaded.eos_token == report["stop"]
    assert loaded(loaded.decode(rows["1"].chosen), add_special_tokens=False).input_ids == rows["1"].chosen.tolist()
