"""The report: means, spreads, joined seeds, the README's table, errors."""

import json

import numpy as np
import pytest
from conftest import REPOSITORY, load_script, load_tool, words

report = load_tool("tools/report.py")


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_run(folder, label="IQL", seeds=(0, 1), scores=(10.0, 30.0), best=(20.0, 40.0), **changes):
    """A finished run with one evaluation at update 5 and the last at 10."""
    folder.mkdir(parents=True)
    last = [{"seed": s, "update": 10, "eval/score": v} for s, v in zip(seeds, scores, strict=True)]
    top = [{"seed": s, "update": 5, "eval/score": v} for s, v in zip(seeds, best, strict=True)]
    result = {"label": label, "dataset_id": "toy/data-v0", "num_updates": 10, "last": last}
    result |= {"final_eval_episodes": 100, "commit": "0123456789abcdef"}
    (folder / "result.json").write_text(json.dumps({**result, **changes}))
    write_rows(folder, [{"update": 5, "seed": 0, "train/loss": 1.0}, *top, *last])


def test_table_holds_mean_and_spread_of_the_last_policies(tmp_path):
    fake_run(tmp_path / "a")
    row = report.table(report.read_runs(tmp_path)).splitlines()[-1]
    cells = "toy/data-v0 | IQL | 10 | 2 | 20.0 ± 10.0 | 30.0 ± 10.0 | 100 | 01234567"
    assert row == f"| {cells} |"


def test_the_best_may_be_the_last(tmp_path):
    fake_run(tmp_path / "a", best=(0.0, 40.0))
    assert "| 20.0 ± 10.0 | 25.0 ± 15.0 |" in report.table(report.read_runs(tmp_path))


def test_what_a_script_writes_is_read(tmp_path):
    """Two runs of one script, offline and online, with the names of what was trained and played."""
    iql = load_script("iql")
    assert iql.main(words(run_dir="runs/a", num_seeds=2)) == 0
    assert iql.main(words(run_dir="runs/b", num_seeds=2, seed=5)) == 0
    assert iql.main(words(run_dir="runs/c", num_seeds=2, online_steps=3)) == 0
    groups = report.read_runs(tmp_path / "runs")
    first, second = report.table(groups).split("\n\n")
    assert "| toy/pendulum-v0 | IQL | 6 | 4 |" in first
    assert "| toy/pendulum-v0 | IQL | 6 + 3 online | 2 |" in first
    online = groups["toy/pendulum-v0"]["IQL", 6, 3, 0]["online"]
    assert list(online) == [0, 1] and None not in online[0].values()
    assert "| toy/pendulum-v0 | IQL | 6 + 3 online |" in second
    result = report.read(tmp_path / "runs" / "a" / "result.json")
    assert result["env_id"] == "Pendulum-v1"


def test_scores_of_another_environment_say_so(tmp_path):
    fake_run(tmp_path / "a", environment_differs="no pen is dropped")
    assert "| 20.0 ± 10.0 (environment differs) |" in report.table(report.read_runs(tmp_path))


def fake_online_run(folder, unit="eval/score", **changes):
    """50 at the switch (update 10), then 20 within and 0 after 10,000 steps, and 80 at the end."""
    last = [{"update": 40, "seed": s, unit: 80.0 + 10 * s} for s in (0, 1)]
    fake_run(folder, label="CalQL", online_steps=30_000, last=last, **changes)
    values = {
        5: (0, 60.0),
        10: (0, 50.0),
        15: (10_000, 20.0),
        20: (10_001, 0.0),
        40: (30_000, 80.0),
    }
    rows = [
        {"update": u, "environment_step": step, "seed": s, unit: v + 10 * s}
        for u, (step, v) in values.items()
        for s in (0, 1)
    ]
    write_rows(folder, rows)


def test_online_runs_stand_apart_from_offline_ones(tmp_path):
    fake_run(tmp_path / "a", label="CalQL")
    fake_online_run(tmp_path / "b")
    first, second = report.table(report.read_runs(tmp_path)).split("\n\n")
    assert "| Cal-QL | 10 | 2 | 20.0 ± 10.0 | 30.0 ± 10.0 |" in first
    assert "| Cal-QL | 10 + 30,000 online | 2 | 85.0 ± 5.0 | 85.0 ± 5.0 |" in first
    cells = "Cal-QL | 10 + 30,000 online | 55.0 ± 5.0 | 30.0 ± 0.0 | 85.0 ± 5.0 | 0.62"
    assert second.splitlines()[2:] == [f"| toy/data-v0 | {cells} |"]


def test_nothing_drops_below_the_switch():
    rows = [(5, 0, 90.0), (10, 0, 50.0), (15, 5, 60.0), (20, 10, 100.0)]
    names = ("update", "environment_step", "eval/score")
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    found = report.online(rows, "eval/score", switch=10)
    assert found == {"switch": 50.0, "drop": 0, "regret": pytest.approx(0.2)}
    assert report.online(rows[:1], "eval/score", switch=10) == dict.fromkeys(found)


def test_online_runs_without_scores_have_no_regret(tmp_path):
    fake_online_run(tmp_path / "b", unit="eval/return")
    text = report.table(report.read_runs(tmp_path))
    cells = "Cal-QL | 10 + 30,000 online | 55.0 ± 5.0 | 30.0 ± 0.0 | 85.0 ± 5.0 |  |"
    assert text.splitlines()[-1] == f"| toy/data-v0 | {cells}"


def test_online_runs_without_an_evaluation_at_the_switch(tmp_path):
    fake_online_run(tmp_path / "b")
    rows = report.read_rows(tmp_path / "b" / "metrics.jsonl")
    write_rows(tmp_path / "b", [row for row in rows if row["update"] == 40])
    text = report.table(report.read_runs(tmp_path))
    assert "| Cal-QL | 10 + 30,000 online |  |  | 85.0 ± 5.0 | 0.15 |" in text


def test_the_picture_marks_the_switch(tmp_path, monkeypatch):
    fake_run(tmp_path / "a")
    fake_online_run(tmp_path / "b")
    marks, old = [], report.plt.Axes.axvline
    monkeypatch.setattr(
        report.plt.Axes, "axvline", lambda axis, x, **k: marks.append(x) or old(axis, x, **k)
    )
    report.picture(report.read_runs(tmp_path), tmp_path / "p.png")
    assert marks == [10]


def test_runs_of_other_seeds_join_and_a_repeated_seed_counts_once(tmp_path, capsys):
    fake_run(tmp_path / "20260101-000000", seeds=(0, 1), scores=(10.0, 30.0))
    fake_run(tmp_path / "20260102-000000", seeds=(1, 2), scores=(50.0, 90.0), best=(20.0, 10.0))
    group = report.read_runs(tmp_path)["toy/data-v0"][("IQL", 10, 0, 0)]
    assert group["last"] == {0: 10.0, 1: 50.0, 2: 90.0}
    assert group["best"] == {0: 20.0, 1: 50.0, 2: 90.0}
    assert group["curve"][10] == {0: 10.0, 1: 50.0, 2: 90.0}
    assert "replaces earlier runs of seeds [1]" in capsys.readouterr().err


def test_returns_stand_in_where_there_are_no_scores(tmp_path):
    rows = [{"seed": 0, "update": 10, "eval/return": 7.0}]
    fake_run(tmp_path / "a", last=rows)
    write_rows(tmp_path / "a", rows)
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


BROKEN = [
    ("metrics.jsonl", None),
    ("metrics.jsonl", ""),
    ("metrics.jsonl", '{"update": 5, "seed"'),
    ("metrics.jsonl", "5\n"),
    ("metrics.jsonl", '{"eval/score": 5}\n'),
    ("metrics.jsonl", '{"update": 10, "seed": 0, "eval/score": 5}\n'),  # none of seed 1
    ("metrics.jsonl", '{"update": 10, "seed": 0, "eval/score": null}\n'),
    ("result.json", ""),
    ("result.json", "[]"),
    ("result.json", "{}"),
    ("result.json", b"\xff"),
    ("result.json", {"last": 5}),
    ("result.json", {"last": [{"update": 10}]}),
    ("result.json", {"final_eval_episodes": None, "num_updates": "ten"}),
    ("config.yaml", "a: [\n"),
    ("environment.json", "{"),
]


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_run_is_one_line_that_names_it(tmp_path, capsys, name, content):
    fake_run(tmp_path / "a")
    path = tmp_path / "a" / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path / "a") in error


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
        newer = f"label: IQL\nupdates_per_step: {seed}\n" if seed == 1 else "label: ''\n"
        text = f"expectile: 0.7\nseed: {seed}\ndevice: {seed}\n{newer}"
        (folder / "config.yaml").write_text(text)
    row = report.table(report.read_runs(tmp_path)).splitlines()[-1]
    assert "| 4 |" in row and row.endswith("| aaaaaaaa, bbbbbbbb-dirty, unknown |")
    assert not capsys.readouterr().err


def test_every_label_of_the_stored_results_has_a_colour_of_its_own():
    groups = report.read_runs(REPOSITORY / "benchmarks" / "results")
    labels = {label for rows in groups.values() for label, *_ in rows}
    assert len(set(report.COLORS)) == len(report.COLORS) >= len(labels)
