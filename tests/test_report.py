"""The report: means, spreads, joined seeds, the README's table, errors."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import REPOSITORY

spec = importlib.util.spec_from_file_location("report", REPOSITORY / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


def fake_run(folder, label="IQL", seeds=(0, 1), scores=(10.0, 30.0), best=(20.0, 40.0), **changes):
    """A finished run with one evaluation at update 5 and the last at 10."""
    folder.mkdir(parents=True)
    last = [{"seed": s, "update": 10, "eval/score": v} for s, v in zip(seeds, scores, strict=True)]
    top = [{"seed": s, "update": 5, "eval/score": v} for s, v in zip(seeds, best, strict=True)]
    result = {"label": label, "dataset_id": "toy/data-v0", "num_updates": 10, "last": last}
    result |= {"best_oracle": top, "final_eval_episodes": 100, "commit": "0123456789abcdef"}
    (folder / "result.json").write_text(json.dumps({**result, **changes}))
    rows = [{"update": 5, "seed": 0, "train/loss": 1.0}, *top, *last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_holds_mean_and_spread_of_the_last_policies(tmp_path):
    fake_run(tmp_path / "a")
    row = report.table(report.read_runs(tmp_path)).splitlines()[-1]
    cells = "toy/data-v0 | IQL | 10 | 2 | 20.0 ± 10.0 | 30.0 ± 10.0 | 100 | 01234567"
    assert row == f"| {cells} |"


def test_scores_of_another_environment_say_so(tmp_path):
    fake_run(tmp_path / "a", environment_differs="no pen is dropped")
    assert "| 20.0 ± 10.0 (environment differs) |" in report.table(report.read_runs(tmp_path))


def fake_online_run(folder, **changes):
    """50 at the switch (update 10), then 20 and 80 at 15 and 20."""
    seeds = [{"seed": s, "switch": 50.0, "drop": 30.0, "regret": 0.5} for s in (0, 1)]
    online = {"online_steps": 10, "updates_per_step": 1, "online_share": None, "seeds": seeds}
    fake_run(folder, online=online, label="CalQL", **changes)
    scores = {10: 50.0, 15: 20.0, 20: 80.0}
    rows = [{"update": u, "seed": s, "eval/score": v} for u, v in scores.items() for s in (0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_online_runs_stand_apart_from_offline_ones(tmp_path):
    fake_run(tmp_path / "a", label="CalQL")
    fake_online_run(tmp_path / "b", scores=(70.0, 90.0))
    groups = report.read_runs(tmp_path)
    first, second = report.table(groups).split("\n\n")
    assert "| Cal-QL | 10 | 2 | 20.0 ± 10.0 |" in first
    assert "| Cal-QL | 10 + 10 online | 2 | 80.0 ± 10.0 |" in first
    cells = "Cal-QL | 10 + 10 online | 50.0 ± 0.0 | 30.0 ± 0.0 | 80.0 ± 10.0 | 0.50"
    assert second.splitlines()[2:] == [f"| toy/data-v0 | {cells} |"]


def test_the_picture_marks_the_switch(tmp_path, monkeypatch):
    fake_run(tmp_path / "a")
    fake_online_run(tmp_path / "b")
    marks, old = [], report.plt.Axes.axvline
    monkeypatch.setattr(
        report.plt.Axes, "axvline", lambda axis, x, **k: marks.append(x) or old(axis, x, **k)
    )
    report.picture(report.read_runs(tmp_path), tmp_path / "p.png")
    assert marks == [10]


def test_online_runs_without_scores_have_no_regret(tmp_path):
    fake_online_run(tmp_path / "b")
    path = tmp_path / "b" / "result.json"
    result = json.loads(path.read_text())
    for row in result["online"]["seeds"]:
        row |= {"regret": None, "switch": None, "drop": None}
    path.write_text(json.dumps(result))
    assert "| Cal-QL | 10 + 10 online |  |  | 20.0 ± 10.0 |  |" in report.table(
        report.read_runs(tmp_path)
    )


def test_runs_of_other_seeds_join_and_a_repeated_seed_counts_once(tmp_path, capsys):
    fake_run(tmp_path / "20260101-000000", seeds=(0, 1), scores=(10.0, 30.0))
    fake_run(tmp_path / "20260102-000000", seeds=(1, 2), scores=(50.0, 90.0))
    group = report.read_runs(tmp_path)["toy/data-v0"][("IQL", 10, 0, 0)]
    assert group["last"] == {0: 10.0, 1: 50.0, 2: 90.0}
    assert group["curve"][10] == {0: 10.0, 1: 50.0, 2: 90.0}
    assert "replaces earlier runs of seeds [1]" in capsys.readouterr().err


def test_returns_stand_in_where_there_are_no_scores(tmp_path):
    rows = [{"seed": 0, "update": 10, "eval/return": 7.0}]
    fake_run(tmp_path / "a", last=rows, best_oracle=rows)
    assert "IQL (return)" in report.table(report.read_runs(tmp_path))


def test_main_writes_table_picture_and_readme(tmp_path, capsys):
    fake_run(tmp_path / "runs" / "a")
    fake_run(tmp_path / "runs" / "b", label="BC", scores=(1.0, 2.0))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(tmp_path / "runs"), "--readme", str(readme)]) == 0
    table = (tmp_path / "runs" / "report.md").read_text()
    assert table.index("| BC |") < table.index("| IQL |")  # the weaker one first
    assert readme.read_text() == f"before\n{report.BEGIN}\n{table}{report.END}\nafter\n"
    assert table in capsys.readouterr().out
    picture = report.plt.imread(tmp_path / "runs" / "report.png")
    colors = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in report.COLORS[:2]}
    assert colors <= set(
        map(tuple, np.unique((picture[..., :3] * 255).round().reshape(-1, 3), axis=0))
    )


@pytest.mark.parametrize("case", ["no runs", "no marks"])
def test_errors_are_one_line(case, tmp_path, capsys):
    arguments = [str(tmp_path)]
    if case == "no marks":
        fake_run(tmp_path / "a")
        (tmp_path / "README.md").write_text("nothing here\n")
        arguments += ["--readme", str(tmp_path / "README.md")]
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    if case == "no marks":
        assert (tmp_path / "README.md").read_text() == "nothing here\n"


DIFFERENT = [
    ({"env_id": "Car-v0"}, "env_id"),
    ({"fingerprint": "ab"}, "fingerprint"),
    ({"algorithm": "BC"}, "algorithm"),
    ("setting", "expectile"),
    ("start", "from a checkpoint"),
]


@pytest.mark.parametrize("change, name", DIFFERENT)
def test_runs_that_differ_in_more_than_seeds_are_not_joined(tmp_path, capsys, change, name):
    changes = {} if isinstance(change, str) else change
    fake_run(tmp_path / "a", seeds=(0, 1))
    fake_run(tmp_path / "b", seeds=(2, 3), scores=(50.0, 50.0), **changes)
    if change == "setting":
        (tmp_path / "a" / "config.yaml").write_text("expectile: 0.7\nseed: 0\n")
        (tmp_path / "b" / "config.yaml").write_text("expectile: 0.9\nseed: 2\n")
    if change == "start":
        (tmp_path / "b" / "environment.json").write_text('{"checkpoint": "runs/a"}')
    groups = report.read_runs(tmp_path)
    rows = report.table(groups).splitlines()[2:]
    assert ["20.0 ± 10.0" in row for row in rows] == [True, False]
    assert f"b differs from other runs of IQL in {name}: a row" in capsys.readouterr().err
    report.picture(groups, tmp_path / "report.png")


def test_joined_runs_name_each_commit(tmp_path, capsys):
    for seed, commit in ((0, "a" * 40), (1, "a" * 40), (2, "b" * 40 + "-dirty"), (3, None)):
        folder = tmp_path / str(seed)
        fake_run(folder, seeds=(seed,), scores=(1.0,), best=(1.0,), commit=commit)
        newer = f"label: IQL\nonline_steps: {seed - 1}\n" if seed == 1 else "label: ''\n"
        text = f"expectile: 0.7\nseed: {seed}\ndevice: {seed}\n{newer}"
        (folder / "config.yaml").write_text(text)
    row = report.table(report.read_runs(tmp_path)).splitlines()[-1]
    assert "| 4 |" in row and row.endswith("| aaaaaaaa, bbbbbbbb-dirty, unknown |")
    assert not capsys.readouterr().err
