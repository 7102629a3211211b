"""configs/<algorithm>/<task>.yaml: the task is the table's, the values are the published ones."""

import csv
import functools
import re

import pytest
import yaml
from conftest import REPOSITORY, load_script

FILES = {}  # of whatever folder there is
for path in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
    FILES.setdefault(path.parent.name, []).append(path)
COMPLETE = ["bc", "bc_10", "iql"]  # folders with a file for every task
SCRIPT = {"bc_10": "bc"}  # where a folder is not named as its script
TASK_FIELDS = {"dataset_id", "download", "fallback_dataset_id", "env_id"}
TASK_FIELDS |= {"ref_min_score", "ref_max_score"}

with (REPOSITORY / "datasets" / "tasks.csv").open(newline="") as file:
    TASKS = {row["task"].rpartition("-v")[0]: row for row in csv.DictReader(file)}

every_folder = pytest.mark.parametrize("folder", FILES)


def config_class(folder):
    return load_script(SCRIPT.get(folder, folder)).TrainConfig


@functools.cache
def read(path):
    """The config as its script reads it, and the fields that the file itself sets."""
    script = load_script(SCRIPT.get(path.parent.name, path.parent.name))
    config = script.parse_config(script.TrainConfig, ["--config", str(path)])
    return config, yaml.safe_load(path.read_text(encoding="utf-8"))


def comment(path) -> str:
    """The comment that the file starts with, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.lstrip("#") for line in lines[:first]).split())


# ---- every file of every folder


def test_the_table_has_the_current_tasks():
    suites = [row["suite"] for row in TASKS.values()]
    counts = {suite: suites.count(suite) for suite in suites}
    assert counts == {"locomotion": 18, "maze2d": 6, "antmaze": 6, "adroit": 12, "kitchen": 3}


@pytest.mark.parametrize("folder", COMPLETE)
def test_every_task_has_a_file(folder):
    assert {path.stem for path in FILES[folder]} == TASKS.keys()


@every_folder
def test_every_file_is_of_a_task(folder):
    names = {path.name for path in FILES[folder][0].parent.iterdir()}
    assert names <= {f"{task}.yaml" for task in TASKS}


@every_folder
def test_data_and_references_are_the_tables(folder):
    for path in FILES[folder]:
        config, task = read(path)[0], TASKS[path.stem]
        assert config.dataset_id == task["minari_id"], path
        assert not config.download, path  # the hub's re-created sets share such names
        assert config.ref_min_score == float(task["ref_min_score"]), path
        assert config.ref_max_score == float(task["ref_max_score"]), path


@every_folder
def test_environment(folder):
    """By name for locomotion, stored with the data for the others; none takes kitchen's data."""
    for path in FILES[folder]:
        task = TASKS[path.stem]
        names = {"locomotion": task["eval_env"], "kitchen": "none"}
        assert read(path)[0].env_id == names.get(task["suite"], "auto"), path


@every_folder
def test_a_fallback_is_the_same_robots_data_of_that_kind(folder):
    for path in FILES[folder]:
        bundled = f"datasets/{path.stem.replace('-', '/', 1)}-v0"
        used = read(path)[0].fallback_dataset_id
        assert used == bundled or (used == "" and not (REPOSITORY / bundled).exists()), path


@every_folder
def test_nothing_repeats_a_default(folder):
    default = config_class(folder)()
    for path in FILES[folder]:
        config, given = read(path)
        assert [k for k in given if getattr(config, k) == getattr(default, k)] == [], path


@every_folder
def test_comment_names_task_source_and_environment(folder):
    for path in FILES[folder]:
        words, task = comment(path), TASKS[path.stem]
        assert re.match(rf"D4RL {re.escape(task['task'])}[.;] ", words), path
        assert "Source: " in words, path
        if task["note"]:
            assert f"Environment differs: {task['note']}." in words, path
        else:
            assert "Environment differs" not in words, path
        if task["suite"] == "kitchen":
            hint = (
                f"--dataset_id {task['hub_id']} --download true --env_id auto --ref_min_score null"
            )
            assert f"{hint} --ref_max_score null" in words, path
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == [], path


# ---- published values, copied from the sources that the files name, not from the files

BC = {"normalize_obs": True, "top_fraction": 1.0, "batch_size": 256, "num_updates": 1_000_000}
BC |= {"actor_lr": 3e-4, "hidden_dim": 256, "hidden_layers": 2, "reward_by_return_range": False}
BC |= {"eval_every": 5_000, "eval_episodes": 10, "final_eval_episodes": 100, "label": ""}
BC_10 = {**BC, "top_fraction": 0.1, "label": "10% BC"}
MAZE2D = {"eval_episodes": 100}
ANTMAZE = {"eval_episodes": 100, "eval_every": 100_000}

IQL = {"normalize_obs": False, "num_updates": 1_000_000, "batch_size": 256, "gamma": 0.99}
IQL |= {"expectile": 0.7, "inverse_temperature": 3.0, "tau": 0.005, "deterministic": False}
IQL |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "cosine_actor_lr": True}
IQL |= {"hidden_dim": 256, "hidden_layers": 2, "actor_dropout": 0.0, "label": ""}
IQL |= {"reward_scale": 1.0, "reward_shift": 0.0, "reward_by_return_range": False}
IQL |= {"eval_every": 5_000, "eval_episodes": 10, "final_eval_episodes": 100}
DEXTEROUS = {"inverse_temperature": 0.5, "actor_dropout": 0.1}

PUBLISHED = {
    "bc": (BC, {"maze2d": MAZE2D, "antmaze": ANTMAZE}),
    "bc_10": (BC_10, {"maze2d": MAZE2D, "antmaze": ANTMAZE}),
    "iql": (
        IQL,
        {
            "locomotion": {"reward_by_return_range": True},
            "maze2d": {**MAZE2D, "normalize_obs": True},  # CORL's, as the paper has none
            "antmaze": {
                **ANTMAZE,
                "expectile": 0.9,
                "inverse_temperature": 10.0,
                "reward_shift": -1.0,
            },
            "adroit": DEXTEROUS,
            "kitchen": DEXTEROUS,
        },
    ),
}


@pytest.mark.parametrize("folder", PUBLISHED)
def test_values_are_the_published_ones(folder):
    common, per_suite = PUBLISHED[folder]
    for path in FILES[folder]:
        config, given = read(path)
        published = {**common, **per_suite.get(TASKS[path.stem]["suite"], {})}
        assert {name: getattr(config, name) for name in published} == published, path
        assert given.keys() <= published.keys() | TASK_FIELDS, path
