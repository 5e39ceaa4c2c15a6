"""A run without held-out pairs ends with a report like any other."""

from analysis import report
from sdpo import config
from sdpo.run import folder as run_folder


def test_a_run_without_held_out_pairs_has_a_report(run):
    folder = run("data.held_out_share=0", "evaluate=[preference]")
    run_folder.finish(folder, run_folder.stamp(config.load(folder / "config.yaml")))
    page = report.write_report(folder).read_text()
    assert "Loss</h" in page and "Memorisation</h" in page and "Accuracy by source</h" not in page
