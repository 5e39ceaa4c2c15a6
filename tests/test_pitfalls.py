"""What goes wrong elsewhere when DPO is done in steps, and where it is tested that it does not here.

T1  steps chained in one process: a reference that is S still      below
T2  steps of adapters: the third one fails, or starts off zero     test_adapters.py
T3  cached log-probs under ZeRO-3: two models have one key         test_engine.py
T4  cached log-probs of tokens cut at another length               test_faults.py
T6  a stale cache: the first loss is not ln 2, and training goes on  test_faults.py
T9  a resumed step whose reference is the checkpoint               below
T10 a resumed step whose moved reference is S again                test_faults.py
"""

import numpy as np
import pytest
import torch
from conftest import read_lines
from test_equivalence import chunks
from test_faults import Killed, interrupt_after
from transformers import AutoModelForCausalLM

from sdpo.errors import UserError
from sdpo.model.logprobs import naive_logprobs
from sdpo.train.logprob_table import read


def naive(model_folder, rows):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        return np.array([[float(logp) for logp in naive_logprobs(model, row)] for row in rows])


def reference(folder, t):
    return read(folder / "steps" / str(t) / "reference.parquet")


def test_t1_the_second_step_reads_the_first_one_s_model(run, toy):
    """T1: three steps in one process."""
    folder = run("optim.epochs=2")
    _, steps = chunks(folder)
    of_first, of_initial = naive(folder / "steps/1", steps[1]), naive(toy / "model", steps[1])
    assert np.abs(of_first - of_initial).max() > 0.1
    np.testing.assert_allclose(reference(folder, 2), of_first, atol=1e-3)
    starts = [entry for entry in read_lines(folder, "train") if entry["update"] == 1]
    assert [entry["loss"] for entry in starts] == pytest.approx([np.log(2)] * 3, abs=1e-7)


def test_t9_a_checkpoint_is_continued_and_never_a_reference(run, toy, tmp_path, monkeypatch):
    """T9: what a killed step left is no model to start from, and its reference is the step's own when it goes on."""
    overrides = ["split=all_at_once", "optim.epochs=2", "launch.checkpoint_minutes=0"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Killed):
            run(*overrides)
    checkpoint = max((tmp_path / "store" / "partial").glob("*/[0-9]*"))
    with pytest.raises(UserError, match="holds no config.json; name a Hugging Face model folder"):
        run(*overrides, f"model.path={checkpoint}", name="from_checkpoint")
    resumed = run(*overrides)
    _, (rows,) = chunks(resumed)
    np.testing.assert_allclose(reference(resumed, 1), naive(toy / "model", rows), atol=1e-3)
    seventh = read_lines(resumed, "train")[6]
    assert abs(seventh["margin"]) > 0.01 and seventh["loss"] < 0.69
