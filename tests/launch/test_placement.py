"""Where runs go: places and needs worked by hand; a real process that runs out of memory beside another."""

import os
import resource
import time
from math import inf, nan

import pytest
import torch

from sdpo import config, distributed
from sdpo.console import Progress
from sdpo.errors import UserError
from sdpo.launch import forks, placement
from sdpo.launch.order import Turn
from sdpo.launch.placement import Need, Place, choose, places_for
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run
from sdpo.run.needs import Size


def asked(folder, name, **launch):
    settings = {"model": {"name": "lab"}, "data": {"name": "lab"}, "launch": {"device": "auto", **launch}}
    return Run(config.from_composed(settings), folder / name, choices={}, arm=name)


def test_gpus_are_dealt_out_by_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    two = asked(tmp_path, "b", ranks=2)
    assert [place.gpus for place in places_for([asked(tmp_path, "a")], "auto")] == ["0", "1", "2", "3", "4"]
    assert places_for([asked(tmp_path, "a"), two], "auto") == [Place("0,1", 1, 0.0), Place("2,3", 1, 0.0)]
    assert places_for([two], 3) == [Place("0,1", 2, inf), Place("2,3", 1, inf)]
    assert places_for([two], 1) == [Place("0,1", 1, inf)]
    with pytest.raises(UserError, match="launch.ranks=6, but there are 5 GPUs"):
        places_for([asked(tmp_path, "b", ranks=6)], "auto")


def test_cores_are_dealt_out_by_ranks_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    for launch, most in (({}, 8), ({"ranks": 2, "threads": 3}, 1), ({"threads": 16}, 1)):
        assert places_for([asked(tmp_path, "a", device="cpu", **launch)], "auto") == [Place("", most, inf)]


@pytest.mark.parametrize(("cores", "most"), [(4, 2), (64, 8)])
def test_a_gpu_takes_runs_by_its_free_memory_and_the_cores_beside_it(tmp_path, monkeypatch, cores, most):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-c")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    listed = ["0, GPU-a, 9000 MiB", "1, GPU-b, 1000 MiB", "2, GPU-c, 2000 MiB"]
    monkeypatch.setattr(placement, "query_gpus", lambda field: listed)
    half = [Place("1", most, 0.9 * 1000 * 2**20), Place("GPU-c", most, 0.9 * 2000 * 2**20)]
    assert places_for([asked(tmp_path, "a")], "auto") == half


def test_a_run_goes_to_the_least_loaded_place_with_room():
    places = [Place("0", 3, 10.0), Place("1", 3, 10.0)]
    small, large, alone = Need(3.0), Need(8.0), Need(1.0, alone=True)
    assert choose(places, [[], []], small) == 0
    assert choose(places, [[small], []], small) == 1
    assert choose(places, [[small], [Need(2.0)]], small) == 1  # as many runs, but less memory
    assert choose(places, [[small], [large]], small) == 0  # 3 + 8 are more than 10
    assert choose(places, [[small] * 3, [large]], Need(1.0)) == 1  # the first has its three runs
    assert choose(places, [[small] * 3, [large]], small) is None
    assert choose(places, [[small], [alone]], alone) is None  # neither is empty
    assert choose(places, [[small], [alone]], small) == 0
    assert choose(places, [[small], []], Need(99.0)) == 1  # an empty place takes any run


def test_a_run_needs_its_weights_its_activations_and_a_fixed_amount():
    """10 layers of width 1280 have P = 12 x 1280^2 x 10 weights. In bf16 with masters they take 18 P bytes; activations
    of 1000 tokens 42 x 1280 x 10 x 1000 bytes, and 2 P at the head."""
    weights = 12 * 1280**2 * 10
    settings = {"model": {"name": "lab"}, "data": {"name": "lab"}, "tune": {"name": "full"}, "precision": "bf16"}
    settings |= {"loss": {"name": "dpo", "beta": 0.1}}
    chosen = config.from_composed(settings | {"launch": {"tokens_per_pack": 1000}, "optim": {"states": "fp32"}})
    size = Size.of(chosen, weights=weights, reference=0)
    memory = 18 * weights + 1.6 * (42 * 1280 * 10 * 1000 + 2 * weights) + 3e9
    assert placement.need(chosen, size) == Need(pytest.approx(memory), alone=False)
    chosen.launch.tokens_per_pack = None  # 8,192 if others share the GPU
    assert placement.need(chosen, size).memory - memory == pytest.approx(1.6 * 42 * 1280 * 10 * 7_192)
    for change in ({"weights": 1e9}, {"ranks": 2}, {"weights": nan}):
        assert placement.need(chosen, size._replace(**change)).alone


def test_needs_count_only_where_memory_does(tmp_path, monkeypatch):
    todo = [asked(tmp_path, name) for name in "abc"]
    needed = [Turn(run, Need(5.0, alone=True)) for run in todo]
    monkeypatch.setattr(forks, "by_first_missing_step", lambda runs: needed)
    assert forks._in_turn(todo, [Place("0", 8, 10.0)]) == needed
    assert forks._in_turn(todo, [Place("", 2, inf)]) == [Turn(run, Need()) for run in todo]
    enough = [Place(str(i), 8, 10.0) for i in range(3)]  # nobody shares, so a run may use all of its GPU
    assert forks._in_turn(todo, enough) == [Turn(run, Need(alone=True)) for run in todo]


def test_what_stands_for_no_gpu_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert [place.gpus for place in places_for([asked(tmp_path, "a")], "auto")] == [""]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [place.gpus for place in places_for([asked(tmp_path, "a")], "auto")] == [""]


def test_without_nvidia_smi_the_driver_counts_the_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for is_built, counted, gpus in ((True, 2, ["0", "1"]), (True, -1, [""]), (False, 2, [""])):
        monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda counted=counted: counted)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda is_built=is_built: is_built)
        places = places_for([asked(tmp_path, "a")], "auto")
        assert [place.gpus for place in places] == gpus
        assert all(place.most == 1 or not place.gpus for place in places)  # how much memory is free is not known
    assert not torch.cuda.is_initialized()


def test_a_run_that_runs_out_of_memory_beside_another_is_done_again_alone(tmp_path, monkeypatch, capsys):
    """`b` fails in its process for a real lack of memory, once; `a` runs until then, and a little longer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    a, b = asked(tmp_path, "a"), asked(tmp_path, "b")
    for one in (a, b):
        one.prepare()

    def fail_once(folder):
        if not (folder / "tried").exists():
            (folder / "tried").touch()
            resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
            torch.empty(2**33)  # floats: four times as much
        assert (a.folder / "ended").exists()

    def work(chosen, folder):
        try:
            if folder == a.folder:
                while not (b.folder / "error.txt").exists():
                    time.sleep(0.01)
                time.sleep(0.5)
                (folder / "ended").touch()
            else:
                (folder / "error.txt").unlink(missing_ok=True)
                fail_once(folder)
            (folder / "shared").write_text(str(distributed.runs_on_gpu()))
        except Exception as error:
            run_folder.fail(folder, error)
            raise

    monkeypatch.setattr(forks.launch, "run", work)
    with Progress(2, "test", "runs") as bar:
        forks.execute([a, b], 2, bar)
    assert (a.error, b.error) == (None, None)
    assert [(one.folder / "shared").read_text() for one in (a, b)] == ["2", "1"]
    assert "it ran beside 1 others and is done again alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "need", "most", "told"),
    [("0", Need(1.0), 8, "1"), ("0", Need(alone=True), 8, None), ("0", Need(1.0), 1, None), ("", Need(1.0), 8, None)],
)
def test_a_run_knows_its_gpu_and_whether_others_may_come_to_it(gpus, need, most, told, tmp_path, monkeypatch):
    for name in (distributed.SHARING, distributed.SHARES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # restored at the end
        del os.environ[name]
    for owner, name in ((forks, "follow_parent"), (forks.signal, "signal"), (forks.os, "close"), (forks.os, "dup2")):
        monkeypatch.setattr(owner, name, lambda *arguments: None)
    monkeypatch.setattr(forks.launch, "run", lambda config, folder: found.append(os.environ.get(distributed.SHARES)))
    found, one = [], asked(tmp_path, "a")
    one.folder.mkdir()
    forks._child(forks.Turn(one, need), Place(gpus, most, inf), (0, 0))
    assert found == [told] and os.environ.get("CUDA_VISIBLE_DEVICES") == (gpus or None)  # without a GPU it stays
