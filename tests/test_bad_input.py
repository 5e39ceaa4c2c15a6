"""Bad input through the whole command: one line that says what is wrong, exit code 1, and nothing trained."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, random_model

from sdpo.fields import OF_TRL

TRAIN = CHECKOUT / "train.py"
GOOD = {"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "3"}
MORE = [GOOD | {"prompt": f"What is {n} + {n}?", "chosen": str(2 * n)} for n in (2, 3, 4)]

ROWS = {  # the second row, and the end of "FILE, row 2: ..."
    "missing column": ({"prompt": "x", "chosen": "y"}, "field 'rejected' is missing"),
    "empty prompt": (GOOD | {"prompt": ""}, "field 'prompt' is empty"),
    "empty response": (GOOD | {"chosen": " "}, "field 'chosen' is empty"),
    "chosen is rejected": (
        GOOD | {"chosen": "3"},
        "field 'rejected' equals 'chosen', so the pair states no preference",
    ),
    "not text": (GOOD | {"chosen": 7}, "field 'chosen' is int, not text"),
    "a picture": (GOOD | {"images": ["cat.png"]}, "field 'images' is not supported; data.columns can name the columns"),
    "tools that nobody reads": (
        GOOD | {"tools": "[{"},
        "field 'tools' is written as text, but is neither valid JSON nor",
    ),
    "a conversation cut off": (
        {"chosen": "[{'role': 'user', 'content': 'W", "rejected": "[{'role': 'user', 'content': 'W"},
        "field 'chosen' is written as text, but is neither valid JSON nor a Python value",
    ),
    "duplicate id": (GOOD | {"id": "first"}, "field 'id' 'first' was used before, by"),
    "invalid JSON": ('{"prompt": "x",', "is not valid JSON"),
    "invalid UTF-8": ('{"prompt": "x", "chosen": "\udcff", "rejected": "z"}', "field 'chosen' is not valid UTF-8"),
}
HELD_OUT = "data.held_out=[held_out.jsonl]"
SETTINGS = {
    "no such file": (["data.train=[nowhere.jsonl]"], "nowhere.jsonl: cannot be read (No such file or directory)"),
    "compiled ZeRO-3": (["launch.compile=true", "deepspeed=zero3"], "launch.compile: ZeRO-3 gathers parameters"),
    "no such measure": (
        ["+evaluate.h4.limit=1"],
        "evaluate.h4 has settings, but evaluate does not list it: evaluate=[",
    ),
    "no template": (["data.template=null"], "the tokenizer has no chat template; set data.template to one of"),
    "unknown template": (
        ["data.template=llama"],
        "data.template is 'llama'; it can be null, alpaca, zephyr, chatml, plain",
    ),
    "too long": (["data.max_tokens=4"], "a.jsonl, row 1 has "),
    "no such model": (["model.path=nowhere"], "nowhere holds no config.json"),
    "no attention of ours": (["model.path=mamba"], "MambaForCausalLM cannot share prompts: "),
    "no tokenizer": (["model.path=bare"], "bare holds no tokenizer; save one there with tokenizer.save_pretrained"),
    "a pointer": (["model.path=pointer"], "pointer/tokenizer.json is a pointer of Git LFS, not the file itself; fetch"),
    "no date": (["data.template_date=today"], "data.template_date=today is not a date; write it as 2024-07-26"),
    "held-out pairs too long": (
        ["data.held_out=[long.jsonl]", "data.on_long=drop", "data.max_tokens=40"],
        "no held-out pair of 1 is left after tokenisation (1 long); raise data.max_tokens=40",
    ),
    "fewer pairs than steps": (["split=random", "split.num_chunks=9"], "9 chunks were asked for, but there are only"),
    "a key of TRL": (["+learning_rate=1e-5"], "unknown key learning_rate; TRL's learning_rate is optim.lr here"),
    "unknown key in a sweep": (
        ["experiment=demo", "seed=0,1", "foo=1"],
        "unknown key foo; the configuration has",
    ),
    "unknown option in a sweep": (["experiment=demo", "seed=range(2)", "loss=dppo"], "loss has no 'dppo'; it has apo_"),
    "no ratings": (
        ["loss=odpo"],
        "loss=odpo needs chosen_rating and rejected_rating, which 3 of 3 training pairs lack, a-",
    ),
    "no ratings for one step": (
        ["+steps.2.loss={name: odpo, beta: 0.1, alpha: 1.0}"],
        "loss=odpo needs chosen_rating and rejected_rating, which 3 of 3 training pairs lack, a-",
    ),
    "nobody asks": (
        ["evaluate=[generate]", "data.held_out_share=0"],
        "evaluate=[generate] has no prompt to ask: none of 0 held-out pairs is without tools; set",
    ),
    "moments from S": (
        ["optim.moments=carry", "start=initial"],
        "optim.moments=carry has nothing to carry if a step starts from S: use start=previous",
    ),
    "moments of one step": (
        ["+steps.2.optim.moments=carry"],
        "steps.2.optim.moments: this setting must be equal in all steps: set optim.moments=...",
    ),
    "letters without quotes": (
        ["data.train=[ä/b.jsonl,a.jsonl]"],
        "data.train=[ä/b.jsonl,a.jsonl] has letters outside ASCII, which Hydra reads in quotes only: "
        "write 'data.train=[\"ä/b.jsonl\",a.jsonl]'",
    ),
    "a folder without quotes": (["hydra.run.dir=läuf"], "hydra.run.dir=läuf has letters outside ASCII"),
    "T that nothing reads": (["T=3"], "this run does not read T=3: set split.num_chunks"),
    "a score that nothing reads": (["score=length_gap"], "this run does not read score=length_gap: leave score out"),
    "a cluster without a sweep": (
        ["hydra.launcher.backend=slurm"],
        "hydra.launcher.backend is not read by a single run: use -m, which makes it a sweep",
    ),
    "a sweep in the folder of a run": (
        ["hydra.mode=MULTIRUN"],
        "hydra.run.dir is not read by a sweep: use hydra.sweep.dir",
    ),
    "rows of the laboratory": (
        ["data=lab", "model=lab", "data.limit=5"],
        "this run does not read data.limit=5: the lab",
    ),
    "a key of another option": (["split.num_chunks=3"], "sdpo.variants.split.all_at_once: unknown key num_chunks"),
    "no sweep": (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
    "overlap": ([HELD_OUT], "a.jsonl, row 1: field 'prompt' is held out too, in held_out.jsonl, row 1; repair it or"),
}


@pytest.fixture
def refused(tmp_path, toy, monkeypatch, capsys):
    """refused(*overrides, rows=...): what train.py says, run in this process on rows of the file a.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDPO_STORE", "store")

    def command(*overrides, rows=(GOOD, *MORE)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("a.jsonl").write_text("\n".join(lines), errors="surrogateescape")
        Path("held_out.jsonl").write_text(json.dumps(GOOD))
        base = ["model=local", f"model.path={toy / 'model'}", "data=local", "data.train=[a.jsonl]"]
        base += ["data.template=plain", "split=all_at_once", "hydra.run.dir=run"]
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *base, *overrides])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        torch.set_deterministic_debug_mode("default")
        assert not list(Path("store").glob("step/*")) and capsys.readouterr().out == ""
        assert not list(Path(".").glob("out/*")) and not Path("multirun.yaml").exists()
        assert end.value.code.startswith("error: ") and "\n" not in end.value.code  # Python prints it and exits with 1
        return end.value.code.removeprefix("error: ")

    return command


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_named_with_its_file_and_field(refused, kind):
    row, sentence = ROWS[kind]
    said = refused(rows=[GOOD | {"id": "first"}, row, *MORE])
    assert said.startswith(f"a.jsonl, row 2: {sentence}") and said.endswith("repair it or set data.on_bad_row=skip")
    assert not Path("run").exists()


def test_a_row_that_the_template_cannot_write_is_named_too(refused):
    said = refused(rows=[GOOD, GOOD | {"prompt": "</s>"}, *MORE])
    assert said.startswith("a.jsonl, row 2: field 'prompt' has a turn of nothing but special tokens; repair it or set")


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_does_not_fit_together_is_said(refused, tokenizer, kind):
    overrides, sentence = SETTINGS[kind]
    if kind == "no attention of ours":
        random_model("mamba").save_pretrained("mamba")
        tokenizer.save_pretrained("mamba")
    if kind == "no tokenizer":
        random_model().save_pretrained("bare")
    if kind == "a pointer":
        random_model().save_pretrained("pointer")
        tokenizer.save_pretrained("pointer")
        Path("pointer/tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    if kind == "held-out pairs too long":
        Path("long.jsonl").write_text(json.dumps(GOOD | {"prompt": "What is 5 + 5?" * 9}))
    assert refused(*overrides).startswith(sentence)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "loss={'name': 'dpo', 'betta': 1}",
            "sdpo.variants.loss.dpo: unknown key betta; dpo has beta, label_smoothing",
        ),
        (
            "loss={'name': 'dpo'}, reference={'name': 'initial', 'alpa': 1}",
            "sdpo.variants.reference.initial: unknown key alpa; initial has no settings",
        ),
        ("tune={'name': 'lora', 'rnk': 1}", "sdpo.variants.tune.lora: unknown key rnk; lora has rank, "),
    ],
)
def test_a_misspelt_key_is_named_before_torch_is_imported(settings, said):
    code = f"""
import sys
from sdpo import config, errors, validate
try:
    validate.check(config.Config({settings}))
except errors.UserError as error:
    print(error)
print("torch" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    sentence, has_torch = run.stdout.splitlines()
    assert sentence.startswith(said) and has_torch == "False"


def test_what_trl_s_settings_are_called_here_is_on_its_page():
    page = (CHECKOUT / "docs" / "trl.md").read_text()
    for theirs, ours in OF_TRL.items():
        assert any(f"`{theirs}" in line and f"`{ours}" in line for line in page.splitlines()), theirs
