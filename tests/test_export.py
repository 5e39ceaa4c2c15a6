"""An exported step loads as a Hugging Face folder with a card; with its exported pairs TRL computes our losses."""

import json
import math
import shutil

import huggingface_hub
import pytest
import torch
from conftest import byte_tokenizer, random_model, read_lines
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo import export
from sdpo.config import Config, Data, Model, to_yaml
from sdpo.errors import UserError
from sdpo.store.artifacts import Store

MEASURE = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 8}


@pytest.fixture(scope="module")
def model():
    return random_model(seed=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """The folder of a finished run of two steps; its last model has several shards."""

    def build(folder):
        model.save_pretrained(folder, max_shard_size="40KB")
        byte_tokenizer().save_pretrained(folder)
        (folder / "adapter").mkdir()
        for name in ("train.json", "reference.parquet", "moments-0.safetensors"):
            (folder / name).write_text("{}")
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a" * 64}))

    root = tmp_path_factory.mktemp("out")
    step = Store(root / "store").make("step", {"of": "a test"}, build)
    folder = root / "by_source-s0"
    (folder / "steps").mkdir(parents=True)
    (folder / "steps" / "2").symlink_to(step.folder)
    external = "e" * 64
    steps = [
        _step(1, "a" * 64, start="s" * 64, weights={"s" * 64: 1.0}, gamma=-38.6),
        _step(2, step.key, start="a" * 64, weights={"a" * 64: 0.9, external: 0.1}, gamma=None),
    ]
    manifest = {"run": folder.name, "model_key": "s" * 64, "steps": steps}
    manifest |= {"versions": {"sdpo": "0.1.0", "deepspeed": None}, "git": {"commit": "c0ffee"}}
    losses = [{"first_loss": 0.69314718, "last_loss": 0.5, "eval": {}}] * 2
    summary = {"initial": {"eval": {"lab/gold": MEASURE | {"value": 0.25}}}, "steps": losses}
    summary["steps"] = [losses[0], losses[1] | {"eval": {"lab/gold": MEASURE, "lab/kl": MEASURE | {"low": None}}}]
    for name, content in {"manifest": manifest, "summary": summary, "data_report": {"dropped": {"empty": 3}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    config = Config(
        model=Model(name="local", path="/home/someone/model"),
        data=Data(name="local", train=["/home/someone/orca.jsonl"]),
        split={"name": "replay", "path": "/home/someone/split.json"},
        loss={"name": "dpo", "beta": 0.1},
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def _step(t, key, start, weights, gamma):
    windows = [{"num_updates": 5, "weights": weights}]
    lineage = {"t": t, "key": key, "start": start, "windows": windows}
    return lineage | {"num_pairs": 7, "sources": {"orca": 7}, "gamma_ref_mean": gamma}


def test_the_folder_loads_and_holds_nothing_of_the_store(finished, model, tmp_path):
    folder = export.export(finished, 2, tmp_path / "M_2")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(folder)("hi").input_ids == byte_tokenizer()("hi").input_ids
    names = {path.name for path in folder.iterdir()}
    assert not {"manifest.json", "train.json", "reference.parquet", "moments-0.safetensors"} & names
    assert "adapter" in names and not (export.export(finished, 2, tmp_path / "merged", merge=True) / "adapter").exists()


def test_an_adapter_and_the_card_name_the_model_that_it_goes_on_top_of(finished, tmp_path):
    folder = export.export(finished, 2, tmp_path / "M_2")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "M_1"
    assert "it goes on top of M_1, and on top of any other model" in (folder / "README.md").read_text()
    merged = export.export(finished, 2, tmp_path / "merged", merge=True)
    assert "adapter" not in (merged / "README.md").read_text()


def test_the_card_has_lineage_scores_and_settings_but_no_paths(finished, tmp_path):
    card = (export.export(finished, 2, tmp_path / "M_2") / "README.md").read_text()
    assert "| M_1 | S | S | orca (7) | -38.6 | 0.6931 → 0.5 |" in card
    assert "| M_2 | M_1 | 0.9 M_1 + 0.1 external eeeeeeee | orca (7) | - | 0.6931 → 0.5 |" in card
    assert "| lab/gold | 0.25 [0.5, 1] (n = 8) | 0.75 [0.5, 1] (n = 8) |" in card
    assert "| lab/kl | - | 0.75 (n = 8) |" in card
    assert "beta: 0.1" in card and "path: split.json" in card and "sources: orca.jsonl" in card
    assert '{"empty": 3}' in card and "kim-etal-2025-sdpo" in card and "code was at commit c0ffee" in card
    assert "/home/someone" not in card


def test_what_cannot_be_exported_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="has steps 1 to 2, and no step 3"):
        export.export(finished, 3, tmp_path / "M_3")
    with pytest.raises(UserError, match="is not empty"):
        export.export(finished, 2, finished)
    with pytest.raises(UserError, match="holds no summary.json"):
        export.export(tmp_path, 1, tmp_path / "M_1")


def test_an_upload_that_the_hub_refuses_is_one_sentence(tmp_path, monkeypatch):
    def refuse(self, name, **options):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.\nLog in")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"^me/aligned: the Hub refused the upload \(Token is required. Log in\); "):
        export.push(tmp_path, "me/aligned")


def test_nothing_is_pushed_unless_asked_and_then_privately(finished, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options["private"]))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, *, folder_path, repo_id):
            calls.append((repo_id, (folder_path / "README.md").is_file()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export.main([str(finished), "--step", "2", "--out", str(tmp_path / "kept")])
    assert calls == []
    export.main([str(finished), "--step", "2", "--out", str(tmp_path / "pushed"), "--push", "me/aligned"])
    assert calls == [("me/aligned", True), ("me/aligned", True)]
    assert "https://huggingface.co/me/aligned" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # TRL's own warnings
def test_trl_computes_our_losses(run, tmp_path):
    from trl import DPOConfig, DPOTrainer

    folder = run("split=by_source", "reference=initial", "optim.pairs_per_update=100")
    file = export.export_pairs(folder, 2, tmp_path / "pairs.parquet")
    data = Dataset.from_parquet(str(file))
    start = folder / "steps" / "1"
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.1, "output_dir": str(tmp_path / "trl")}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(start),
        args=DPOConfig(per_device_train_batch_size=len(data), **settings),
        processing_class=AutoTokenizer.from_pretrained(start),
        train_dataset=data,
    )
    for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(trainer.train_dataset[part]) == list(data[part])  # its tokens of our texts are our tokens
    trainer.precompute_ref_logps = True  # read the columns
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False).item()
    ours = read_lines(folder, "step")[1]["first_loss"]
    assert theirs == pytest.approx(ours, abs=1e-6) and abs(ours - math.log(2)) > 1e-3


def test_changed_pairs_and_several_references_are_refused(run, toy, tmp_path):
    folder = run("split=all_at_once", "reference=periodic", "reference.updates=2")
    with pytest.raises(UserError, match="step 1 read .* references; TRL's columns hold exactly one"):
        export.export_pairs(folder, 1, tmp_path / "pairs.parquet")
    folder = run("split=all_at_once", name="changed")
    text = (folder / "config.yaml").read_text().replace("max_tokens: 1024", "max_tokens: 30")
    (folder / "config.yaml").write_text(text.replace("on_long: error", "on_long: truncate_response"))
    with pytest.raises(UserError, match="the pairs of .* have changed since step 1 was trained"):
        export.export_pairs(folder, 1, tmp_path / "pairs.parquet")


def test_a_run_that_was_started_again_and_failed_is_not_exported(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again, symlinks=True)
    manifest = json.loads((again / "manifest.json").read_text())
    del manifest["steps"]  # it is written when a run ends
    (again / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was started again and has not finished"):
        export.export(again, 2, tmp_path / "M_2")
