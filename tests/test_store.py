"""The results store: what a run told is what pandas reads; what is not whole is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, contents, load_script, load_tool, words

store = load_tool("tools/store.py")
StoreError = store.StoreError
HERE = ("--run_dir", "/tmp/runs/a", "--config", "/home/me/stitch/configs/iql/hopper-medium.yaml")


def fake_run(folder, scores=None, seeds=(0, 1), label="IQL", config=None, about=None, **changes):
    """A finished run: of each update, each seed's score is that of its two episodes."""
    scores = scores or {5: (20.0, 40.0), 10: (10.0, 30.0)}
    folder.mkdir(parents=True)
    config = {"label": "", "seed": seeds[0], "num_seeds": len(seeds), **(config or {})}
    result = {"label": label, "algorithm": "IQL", "script": "iql", "dataset_id": "toy/data-v0"}
    result |= {"num_updates": 10, "final_eval_episodes": 2, "env_id": "Toy-v0", "seconds": 60.0}
    result |= {"commit": "0123456789abcdef", "fingerprint": "f", "machine": "Linux x86_64, 2 CPUs"}
    result |= {"threads": 1, "command": ["/home/me/stitch/algorithms/iql.py", *HERE]}
    result |= {**config, "label": label, **changes}
    episodes, metrics, last = [], [], list(scores)[-1]
    for update, values in scores.items():
        step = max(0, update - result["num_updates"])
        for seed, score in zip(seeds, values, strict=True):
            where = {"update": update, "environment_step": step, "seed": seed}
            for i, one in enumerate((score - 5, score + 5)):
                row = {**where, "final": update == last, "episode": i, "length": 7}
                episodes.append({**row, "return": 10 * one, "score": one})
            metrics.append({**where, "train/loss": 0.5, "time/updates_per_second": 4.0})
            means = {"eval/return": 10 * score, "eval/score": score, "eval/length": 7.0}
            metrics.append({**where, **means, "final": update == last})
    result["last"] = changes.get("last", [row for row in metrics if row.get("final")])
    about = {"checkpoint": None, **(about or {})}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_rows(folder, episodes=episodes, metrics=metrics)
    return folder


def write_rows(folder, **tables):
    for name, rows in tables.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def test_pandas_reads_what_the_run_told(tmp_path):
    (name,) = store.add([fake_run(tmp_path / "a")], tmp_path / "store")
    runs, episodes, metrics = (pd.read_parquet(tmp_path / "store" / n) for n in store.SCHEMAS)
    (run,) = store.records(runs)
    command = "python algorithms/iql.py --config configs/iql/hopper-medium.yaml"
    facts = {"run": name, "label": "IQL", "num_updates": 10, "online_steps": 0, "command": command}
    assert facts.items() <= run.items() and run["checkpoint"] is False
    assert json.loads(run["config"]) == {"label": "", "seed": 0, "num_seeds": 2}
    assert episodes.groupby(["update", "seed"])["score"].mean().tolist() == [20, 40, 10, 30]
    assert set(metrics["name"]) == {"train/loss", "time/updates_per_second"}
    store.read(tmp_path / "store").check()


def test_what_scripts_write_is_stored(tmp_path):
    """Offline, online, and of a sequence model that is asked for two returns."""
    assert load_script("iql").main(words(run_dir="iql", num_seeds=2, online_steps=3)) == 0
    assert load_script("dt").main(words(run_dir="dt", target_returns="-20,-40")) == 0
    assert len(store.add([tmp_path / "iql", tmp_path / "dt"], tmp_path / "store")) == 2
    results = store.read(tmp_path / "store")
    results.check()
    assert results.runs.set_index("script")["online_steps"].to_dict() == {"dt": 0, "iql": 3}
    (dt,) = results.runs["run"][results.runs["script"] == "dt"]
    asked = results.episodes[results.episodes["run"] == dt]
    assert set(asked["target"]) == {-20, -40}
    assert set(store.first_target(asked)["target"]) == {-20}


def test_a_run_is_a_file_in_each_table_and_is_written_once(tmp_path):
    folder = fake_run(tmp_path / "a")
    names = store.add([folder], tmp_path / "store")
    before = contents(tmp_path / "store")
    assert len(before) == 3 and store.add([folder], tmp_path / "store") == []
    store.add([fake_run(tmp_path / "b", seeds=(2, 3))], tmp_path / "store")
    after = contents(tmp_path / "store")
    assert len(after) == 6 and before.items() <= after.items() and names[0] in " ".join(before)


def test_an_old_run_of_few_words_is_stored(tmp_path):
    """Before the frame told script, threads and packages by name."""
    machine = "Linux-6.1.0-host-x86_64-with-glibc2.36, 2"
    about = {"packages": {"torch": "2.13.0"}, "machine": machine}
    folder = fake_run(tmp_path / "a", about=about, script=None, threads=None)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"machine": machine}))
    (run,) = store.records(store.read_folder(folder).runs)
    assert (run["script"], run["machine"], run["threads"]) == ("iql", "Linux x86_64, 2", None)
    assert json.loads(run["packages"]) == {"torch": "2.13.0"}


def change(folder, name, edit):
    rows = store.read_rows(folder / f"{name}.jsonl")
    edit(rows)
    write_rows(folder, **{name: rows})


REFUSED = {
    "an episode is missing": ("episodes", lambda rows: rows.pop(), "final episodes"),
    "a seed is missing": ("episodes", lambda rows: rows.__delitem__(slice(-2, None)), "{0: 2}"),
    "twice": ("episodes", lambda rows: rows.append(rows[-1]), "twice"),
    "not finite": ("episodes", lambda rows: rows[0].update({"return": float("nan")}), "finite"),
    "no score": ("episodes", lambda rows: rows[0].update(score=None), "finite score"),
    "another mean": ("episodes", lambda rows: rows[-1].update(score=99.0), "eval/score is not"),
    "no number": ("episodes", lambda rows: rows[0].update(length="long"), "cannot be read"),
    "no loss": ("metrics", lambda rows: rows[0].update({"train/loss": float("inf")}), "finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_is_not_whole_is_refused(case, tmp_path, capsys):
    name, edit, problem = REFUSED[case]
    change(fake_run(tmp_path / "a"), name, edit)
    assert_refused(tmp_path, capsys, "a", problem)


def assert_refused(tmp_path, capsys, *problems):
    before = contents(tmp_path)
    assert store.main([str(tmp_path), "--into", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(problem in error for problem in problems), error
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"last": []}, "has no final evaluation"),
        ({"dataset_id": "/home/me/data"}, "dataset_id holds /home/me/data, a path of one machine"),
        ({"config": {"fallback_dataset_id": "/home/me/data"}}, "config holds /home/me/data"),
        ({"dataset_id": "/data"}, "dataset_id holds /data"),
        ({"dataset_id": "/my data/set/v0"}, "dataset_id holds /my"),
        ({"machine": ""}, "machine is empty"),
        ({"threads": "many"}, "cannot be read"),
        ({"seconds": None}, "seconds is not a finite number"),
        ({"final_eval_episodes": 3}, "not {0: 3, 1: 3}"),
    ],
)
def test_facts_that_cannot_be(changes, problem, tmp_path, capsys):
    fake_run(tmp_path / "a", **changes)
    assert_refused(tmp_path, capsys, problem)


def test_no_run_and_no_such_store(tmp_path, capsys):
    assert_refused(tmp_path, capsys, "holds no finished run")
    store.add([fake_run(tmp_path / "a")], tmp_path / "store")
    next((tmp_path / "store" / "runs").iterdir()).write_bytes(b"PAR1")
    assert_refused(tmp_path, capsys, "cannot be read", "restore it from git")


def test_all_or_none_is_stored(tmp_path, capsys):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", seeds=(1, 2))
    assert_refused(tmp_path, capsys, "seeds [1] of the same settings are stored")


def test_other_settings_may_hold_the_same_seed(tmp_path):
    for i, tau in enumerate((0.1, 0.2)):
        fake_run(tmp_path / str(i), config={"tau": tau, "checkpoint_every": i})
    store.add([tmp_path / "0", tmp_path / "1"], tmp_path / "store")
    again = fake_run(tmp_path / "2", config={"tau": 0.2, "device": "cpu"})
    with pytest.raises(StoreError, match="same settings"):
        store.add([again], tmp_path / "store")


def test_the_same_name_in_two_spellings_is_one(tmp_path):
    store.add([fake_run(tmp_path / "old", label="TD3BC")], tmp_path / "store")
    fake_run(tmp_path / "new" / "a", label="TD3+BC")
    with pytest.raises(StoreError, match="same settings"):
        store.add([tmp_path / "new"], tmp_path / "store")


@pytest.mark.parametrize(
    "about, facts",
    [({"env_spec": '{"max_episode_steps": 50}'}, {}), ({}, {"ref_max_score": 50.0})],
)
def test_data_of_another_environment_or_scale_are_other_settings(tmp_path, about, facts):
    """Metadata, of which the fingerprint knows nothing."""
    first = {"about": {"env_spec": '{"max_episode_steps": 500}'}, "ref_max_score": 499.0}
    store.add([fake_run(tmp_path / "0", **first)], tmp_path / "store")
    changed = {"about": {**first["about"], **about}, "ref_max_score": 499.0, "seconds": 9.0}
    store.add([fake_run(tmp_path / "1", **{**changed, **facts})], tmp_path / "store")
    rows = store.records(store.read(tmp_path / "store").runs)
    assert len(store.differences(*map(store.settings, rows))) == 1
    older = {**rows[0], "env_spec": None, "ref_max_score": None}  # of before they were stored
    assert all(store.differences(store.settings(older), store.settings(row)) == [] for row in rows)


def test_a_store_and_run_folders_give_the_oldest_run_first(tmp_path):
    for i in range(6):
        fake_run(
            tmp_path / "runs" / str(i),
            seeds=(2 * i, 2 * i + 1),
            about={"id": f"{(7 * i) % 6 + 1:x}"},
        )
    store.add([tmp_path / "runs"], tmp_path / "store")
    for name in ("runs", "store"):
        assert store.read(tmp_path / name).runs["began"].tolist() == [1, 2, 3, 4, 5, 6]


def test_runs_behind_a_link_are_found(tmp_path):
    fake_run(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(store.read(tmp_path / "runs").runs) == 1
    assert len(store.add([tmp_path / "runs"], tmp_path / "store")) == 1


@pytest.mark.parametrize("table", store.SCHEMAS)
def test_a_store_that_lost_a_file_says_which_and_adding_mends_it(tmp_path, table):
    """Also one that was cut off between two tables, or amid a file."""
    for i in range(2):
        store.add([fake_run(tmp_path / str(i), seeds=(2 * i, 2 * i + 1))], tmp_path / "store")
    whole = contents(tmp_path / "store")
    gone = min((tmp_path / "store" / table).iterdir())
    gone.rename(gone.with_name(f".{gone.stem}.part"))
    with pytest.raises(StoreError, match=f"{gone.stem} has no file in {table}: add it again"):
        store.read(tmp_path / "store")
    assert store.add([tmp_path / "0", tmp_path / "1"], tmp_path / "store") == [gone.stem]
    assert contents(tmp_path / "store") == whole
    store.read(tmp_path / "store").check()


def test_a_copied_file_is_not_read_twice(tmp_path):
    store.add([fake_run(tmp_path / "a")], tmp_path / "store")
    (file,) = (tmp_path / "store" / "episodes").iterdir()
    file.with_stem("copy").write_bytes(file.read_bytes())
    with pytest.raises(StoreError, match="run copy has no file in runs"):
        store.read(tmp_path / "store")


@pytest.mark.parametrize("name", ["label", "config", "packages", "seconds", "num_seeds"])
def test_a_store_of_another_version_is_one_line(tmp_path, name):
    store.add([fake_run(tmp_path / "a")], tmp_path / "store")
    (file,) = (tmp_path / "store" / "runs").iterdir()
    pd.read_parquet(file).drop(columns=[name]).to_parquet(file)
    with pytest.raises(StoreError, match=f"{file.stem}: {name} "):
        store.read(tmp_path / "store")
    with pytest.raises(StoreError, match=f"{file.stem}: {name} "):
        store.add([fake_run(tmp_path / "b", commit="another")], tmp_path / "store")


def test_words_with_an_equals_sign_are_words_too(tmp_path):
    words = ["/home/algorithms/stitch/algorithms/iql.py", "--run_dir=/tmp/a", "--resume=true"]
    words += ["--config=/home/me/stitch/configs/iql/hopper-medium.yaml", "--label=a=b"]
    store.add([fake_run(tmp_path / "a", command=words)], tmp_path / "store")
    (row,) = store.records(store.read(tmp_path / "store").runs)
    wanted = "python algorithms/iql.py --config configs/iql/hopper-medium.yaml --label a=b"
    assert row["command"] == wanted


def test_the_committed_store_is_whole_and_small():
    """Every episode is there, finite and once; no path of a machine; a run is below 60 kB."""
    results = store.read(REPOSITORY / "benchmarks" / "results")
    results.check()
    for name in results.runs["run"]:
        files = [REPOSITORY / "benchmarks/results" / n / f"{name}.parquet" for n in store.SCHEMAS]
        assert sum(path.stat().st_size for path in files) < 60_000
    assert np.isfinite(results.episodes["score"]).all()
    for name, schema in store.SCHEMAS.items():  # pandas takes the columns of the first file
        found = pd.read_parquet(REPOSITORY / "benchmarks" / "results" / name)
        assert found.columns.tolist() == schema.names
