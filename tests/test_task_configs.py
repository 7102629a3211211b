"""configs/<algorithm>/<task>.yaml: the task is the table's, the values are the published ones.

<task>-online.yaml goes on online after the offline updates, as does all that cal_ql has.
"""

import csv
import dataclasses
import functools
import re

import pytest
import yaml
from conftest import REPOSITORY, load_script, load_tool

with (REPOSITORY / "datasets" / "ogbench.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
OGBENCH = {f"{row['environment']}-{kind}": row for row in rows for kind in row["data"].split()}

# Tasks of discrete actions: games of DQN's replay logs, whole or in part, and recorded runs of DQN.
GAMES = ["asterix", "breakout", "pong", "qbert", "seaquest"]
SHARES = {"": "", "-1pct": " --share 0.01", "-10pct": " --share 0.1"}  # of dqn_replay.py
REPLAYS = {f"{game}{part}": f"dqn-replay/{game}/run1{part}-v0" for game in GAMES for part in SHARES}
RECORDED = {
    f"{game}-uniform-10": f"datasets/{game}/uniform-10-v0"
    for game in ("cartpole", "minatar-breakout")
}

# of whatever folder there is, for D4RL's tasks, OGBench's, those of discrete actions and the maze
FILES, OGBENCH_FILES, DISCRETE_FILES, MAZE_FILES = {}, {}, {}, {}
MAZE = "pointmaze-stitch"
for path in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
    online = "-online" if path.stem.endswith("-online") else ""  # a folder of its own: iql-online
    task = path.stem.removesuffix("-online")
    files = DISCRETE_FILES if task in REPLAYS | RECORDED else FILES
    files = OGBENCH_FILES if task in OGBENCH else MAZE_FILES if task == MAZE else files
    files.setdefault(path.parent.name + online, []).append(path)
# folders with a file for every task
COMPLETE = ["awac", "bc", "bc_10", "bcq", "brac", "cql", "dt", "iql", "rebrac", "td3_bc"]
PARTIAL = {  # of <suite>/<task>: what a folder lacks, as nobody published settings for it
    "edac": r"-dense|kitchen/",
    "lb_sac": r"(maze2d|antmaze|adroit|kitchen)/",
    "sac_n": r"-dense|kitchen/",
}
ONLINE = ["awac-online", "cal_ql", "cql-online", "fql-online", "iql-online", "rebrac-online"]
ONLINE += ["spot-online"]
MAZES = ["umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"]
HANDS = ["door", "hammer", "pen", "relocate"]
SCRIPT = load_tool("tools/sweep.py").SCRIPTS
TASK_FIELDS = {"dataset_id", "download", "fallback_dataset_id", "env_id", "env_kwargs"}
TASK_FIELDS |= {"ref_min_score", "ref_max_score"}

with (REPOSITORY / "datasets" / "tasks.csv").open(newline="") as file:
    TASKS = {row["task"].rpartition("-v")[0]: row for row in csv.DictReader(file)}

every_folder = pytest.mark.parametrize("folder", FILES)


def task_of(path) -> str:
    return path.stem.removesuffix("-online")


def in_suite(task: str) -> str:
    return f"{TASKS[task]['suite']}/{task}"


def script_of(path):
    return load_script(SCRIPT.get(path.parent.name, path.parent.name))


@functools.cache
def read(path):
    """The config as its script reads it, and the fields that the file itself sets."""
    script = script_of(path)
    config = script.parse(script.TrainConfig, ["--config", str(path)])
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


def test_xql_has_the_tasks_of_its_settings():
    """X-QL C, one setting for a suite, is also adroit's."""
    hands = {f"{hand}-{data}" for hand in HANDS for data in ("human", "cloned")}
    for folder, tasks in {"xql": XQL_TUNED.keys(), "xql_c": XQL_TUNED.keys() | hands}.items():
        assert {path.stem for path in FILES[folder]} == tasks


@pytest.mark.parametrize("folder", PARTIAL)
def test_every_task_with_published_settings_has_a_file(folder):
    tasks = {task for task in TASKS if not re.search(PARTIAL[folder], in_suite(task))}
    assert {path.stem for path in FILES[folder]} == tasks


def test_every_folder_is_listed():
    others = ["fql", "spot", "xql", "xql_c"]  # whose tables below name their tasks
    assert sorted([*COMPLETE, *PARTIAL, *ONLINE, *others]) == sorted(FILES)


@pytest.mark.parametrize("folder", ONLINE)
def test_the_fine_tuned_tasks_have_a_file(folder):
    tasks = {f"antmaze-{maze}" for maze in MAZES} | {f"{hand}-cloned" for hand in HANDS}
    assert {task_of(path) for path in FILES[folder]} == tasks
    assert {path.parent.name for path in FILES[folder]} == {folder.removesuffix("-online")}


def test_only_these_go_online():
    goes = {
        folder
        for folder, paths in FILES.items()
        if any(getattr(read(path)[0], "online_steps", 0) for path in paths)
    }
    assert goes == set(ONLINE)


@pytest.mark.parametrize("folder", ONLINE)
def test_both_phases_have_the_offline_configs_task(folder):
    offline = folder.removesuffix("-online").replace("cal_ql", "cql")
    for path in FILES[folder]:
        pair = read(path), read(path.parents[1] / offline / f"{task_of(path)}.yaml")
        for name in TASK_FIELDS:
            config, other = ((getattr(config, name), name in given) for config, given in pair)
            assert config == other, (path, name)


@every_folder
def test_every_file_is_of_a_task(folder):
    names = {path.name for path in FILES[folder][0].parent.iterdir()}
    tasks = TASKS.keys() | OGBENCH.keys() | {MAZE}
    assert names <= {f"{task}{online}.yaml" for task in tasks for online in ("", "-online")}


@every_folder
def test_data_and_references_are_the_tables(folder):
    for path in FILES[folder]:
        config, task = read(path)[0], TASKS[task_of(path)]
        assert config.dataset_id == task["minari_id"], path
        assert not config.download, path  # the hub's re-created sets share such names
        assert config.ref_min_score == float(task["ref_min_score"]), path
        assert config.ref_max_score == float(task["ref_max_score"]), path


@every_folder
def test_environment(folder):
    """By name for locomotion, stored with the data for the others; none takes kitchen's data."""
    for path in FILES[folder]:
        task = TASKS[task_of(path)]
        names = {"locomotion": task["eval_env"], "kitchen": "none"}
        assert read(path)[0].env_id == names.get(task["suite"], "auto"), path


@every_folder
def test_a_fallback_is_the_same_robots_data_of_that_kind(folder):
    for path in FILES[folder]:
        bundled = f"datasets/{task_of(path).replace('-', '/', 1)}-v0"
        used = read(path)[0].fallback_dataset_id
        assert used == bundled or (used == "" and not (REPOSITORY / bundled).exists()), path


@every_folder
def test_nothing_repeats_a_default(folder):
    for path in FILES[folder]:
        default, (config, given) = script_of(path).TrainConfig(), read(path)
        assert [k for k in given if getattr(config, k) == getattr(default, k)] == [], path


@every_folder
def test_comment_names_task_source_and_environment(folder):
    for path in FILES[folder]:
        words, task = comment(path), TASKS[task_of(path)]
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

RUN = {"num_updates": 1_000_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005, "label": ""}
RUN |= {"normalize_obs": False, "reward_by_return_range": False}
RUN |= {"reward_scale": 1.0, "reward_shift": 0.0, "hidden_dim": 256}
RUN |= {"eval_every": 5_000, "eval_episodes": 10, "final_eval_episodes": 100}

TD3_BC = {**RUN, "normalize_obs": True, "alpha": 2.5, "policy_noise": 0.2, "noise_clip": 0.5}
TD3_BC |= {"policy_delay": 2, "actor_lr": 3e-4, "critic_lr": 3e-4, "hidden_layers": 2}

REBRAC = {**RUN, "policy_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2, "hidden_layers": 3}
SMALL_STEPS = {"batch_size": 256, "actor_lr": 3e-4, "critic_lr": 3e-4}
PENALTIES = {  # beta_1, beta_2 of the paper's table; of the authors' configs where it differs (*)
    "halfcheetah-random": (0.001, 0.1),
    "halfcheetah-medium": (0.001, 0.01),
    "halfcheetah-expert": (0.01, 0.01),
    "halfcheetah-medium-expert": (0.01, 0.1),
    "halfcheetah-medium-replay": (0.01, 0.001),
    "halfcheetah-full-replay": (0.001, 0.1),
    "hopper-random": (0.001, 0.01),
    "hopper-medium": (0.01, 0.01),  # * 0.001
    "hopper-expert": (0.1, 0.1),  # * 0.001
    "hopper-medium-expert": (0.1, 0.01),
    "hopper-medium-replay": (0.05, 0.5),
    "hopper-full-replay": (0.01, 0.01),
    "walker2d-random": (0.01, 0.0),
    "walker2d-medium": (0.05, 0.1),
    "walker2d-expert": (0.01, 0.5),
    "walker2d-medium-expert": (0.01, 0.01),
    "walker2d-medium-replay": (0.05, 0.01),
    "walker2d-full-replay": (0.01, 0.01),
    "antmaze-umaze": (0.003, 0.002),
    "antmaze-umaze-diverse": (0.003, 0.001),
    "antmaze-medium-play": (0.001, 0.0005),
    "antmaze-medium-diverse": (0.001, 0.0),
    "antmaze-large-play": (0.002, 0.001),
    "antmaze-large-diverse": (0.002, 0.002),
    "pen-human": (0.1, 0.5),
    "pen-cloned": (0.05, 0.5),
    "pen-expert": (0.01, 0.01),
    "door-human": (0.1, 0.1),
    "door-cloned": (0.01, 0.1),
    "door-expert": (0.05, 0.01),
    "hammer-human": (0.01, 0.5),
    "hammer-cloned": (0.1, 0.5),
    "hammer-expert": (0.01, 0.01),
    "relocate-human": (0.1, 0.01),
    "relocate-cloned": (0.1, 0.01),
    "relocate-expert": (0.05, 0.01),
}

AWAC = {**RUN, "normalize_obs": True, "weighting": "clipped", "awr_temperature": 0.1}  # CORL's
AWAC |= {"actor_weight_decay": 0.0, "hidden_layers": 3, "actor_lr": 3e-4, "critic_lr": 3e-4}

CQL = {**RUN, "regularizer": "h", "num_actions": 10, "alpha": 5.0, "lagrange": False}
CQL |= {"target_gap": 10.0, "gap_floor": None, "max_backup": False, "entropy_backup": False}
CQL |= {"learn_entropy_coef": True, "bc_updates": 40_000, "actor_lr": 1e-4, "critic_lr": 3e-4}
CQL |= {"hidden_layers": 3, "critic_hidden_layers": 3}
CQL_TEXT = {"lagrange": True, "target_gap": 5.0, "actor_lr": 3e-5, "alpha": 1.0}  # the paper's

BCQ = {**RUN, "batch_size": 100, "min_weight": 0.75, "max_perturbation": 0.05, "latent_clip": 0.5}
BCQ |= {"target_candidates": 10, "eval_candidates": 100, "kl_weight": 0.5, "actor_lr": 1e-3}
BCQ |= {"critic_lr": 1e-3, "vae_lr": 1e-3, "hidden_dim": 400, "last_hidden_dim": 300}
BCQ |= {"vae_hidden_dim": 750, "hidden_layers": 2}

BRAC = {**RUN, "divergence": "kl", "divergence_samples": 4, "alpha": 1.0, "learn_alpha": False}
BRAC |= {"alpha_limit": 500.0, "divergence_threshold": 0.0, "entropy_coef": 0.0, "mmd_sigma": 20.0}
BRAC |= {"warm_start": 20_000, "actor_lr": 3e-5, "critic_lr": 1e-3, "behavior_lr": 5e-4}
BRAC |= {"alpha_lr": 1e-5, "hidden_dim": 200, "critic_hidden_dim": 300, "hidden_layers": 2}

SPOT = {
    **RUN,
    "num_updates": 1_100_000,
    "vae_updates": 100_000,
    "policy_delay": 2,
    "kl_weight": 0.5,
}
SPOT |= {"policy_noise": 0.2, "noise_clip": 0.5, "density": "elbo", "density_samples": 1}
SPOT |= {"vae_lr": 1e-3, "critic_lr": 3e-4, "vae_hidden_dim": 750, "hidden_layers": 2}
SPOT_OTHERS = {"actor_lr": 1e-4, "actor_dropout": 0.0}  # those without dropout
LAMBDAS = {
    "halfcheetah-medium": 0.05,
    "halfcheetah-medium-replay": 0.05,
    "halfcheetah-medium-expert": 1.0,
    "hopper-medium": 0.1,
    "hopper-medium-replay": 0.1,
    "hopper-medium-expert": 0.2,
    "walker2d-medium": 0.2,
    "walker2d-medium-replay": 0.2,
    "walker2d-medium-expert": 0.5,
    "antmaze-umaze": 0.25,
    "antmaze-umaze-diverse": 0.25,
    "antmaze-medium-play": 0.05,
    "antmaze-medium-diverse": 0.025,
    "antmaze-large-play": 0.025,
    "antmaze-large-diverse": 0.025,
    **{f"{hand}-cloned": 1.0 for hand in HANDS},
}
EDAC = {**RUN, "num_updates": 3_000_000, "num_critics": 10, "eta": 1.0, "layer_norm": False}
EDAC |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "hidden_layers": 3}
SAC_N = {**EDAC, "eta": 0.0, "label": "SAC-N"}
LB_SAC = {**SAC_N, "label": "LB-SAC", "num_updates": 350_000, "batch_size": 10_000}
LB_SAC |= {"actor_lr": 1.8e-3, "critic_lr": 1.8e-3}
CRITICS = {  # N of SAC-N, N and eta of EDAC, N of LB-SAC
    "halfcheetah-random": (10, 10, 0.0, 2),
    "halfcheetah-medium": (10, 10, 1.0, 4),
    "halfcheetah-expert": (10, 10, 1.0, 6),
    "halfcheetah-medium-expert": (10, 10, 5.0, 8),
    "halfcheetah-medium-replay": (10, 10, 1.0, 10),
    "halfcheetah-full-replay": (10, 10, 1.0, 4),
    "hopper-random": (500, 50, 0.0, 25),
    "hopper-medium": (500, 50, 1.0, 25),
    "hopper-expert": (500, 50, 1.0, 50),
    "hopper-medium-expert": (200, 50, 1.0, 40),
    "hopper-medium-replay": (200, 50, 1.0, 20),
    "hopper-full-replay": (200, 50, 1.0, 25),
    "walker2d-random": (20, 10, 1.0, 15),
    "walker2d-medium": (20, 10, 1.0, 10),
    "walker2d-expert": (100, 10, 5.0, 30),
    "walker2d-medium-expert": (20, 10, 5.0, 10),
    "walker2d-medium-replay": (20, 10, 1.0, 10),
    "walker2d-full-replay": (20, 10, 1.0, 4),
}
PEN = {"pen-human": 1000.0, "pen-cloned": 10.0, "pen-expert": 10.0}  # eta

DT = {"normalize_obs": True, "num_updates": 100_000, "batch_size": 64, "context": 20, "label": ""}
DT |= {"return_scale": 1000.0, "hidden_dim": 128, "hidden_layers": 3, "attention_heads": 1}
DT |= {"dropout": 0.1, "actor_lr": 1e-4, "warmup_updates": 10_000, "weight_decay": 1e-4}
DT |= {"grad_clip": 0.25, "eval_every": 5_000, "eval_episodes": 10, "final_eval_episodes": 100}
DT_CORL = {"return_scale": 1.0, "batch_size": 4096, "actor_lr": 8e-4}
TARGETS = {  # by robot, or by the task where it has its own
    "hopper": "3600, 1800",
    "halfcheetah": "12000, 6000",
    "walker2d": "5000, 2500",
    "maze2d": "280, 140",
    "antmaze": "1, 0.5",
    "antmaze-umaze-diverse": "1, 0.5, 0.25, 0.125, 0.06, 0.03",
    "antmaze-medium-diverse": "1, 0.5, 0.25, 0.125, 0.06, 0.03",
    "antmaze-large-diverse": "1, 0.5, 0.25, 0.125, 0.06, 0.03",
    "pen": "3100, 1550",
    "hammer": "12800, 6400",
    "relocate": "4300, 2150",
    "door": "2900, 1450",
    "kitchen": "4, 2",
}

XQL = {**RUN, "gumbel_temperature": 2.0, "value_loss": "rescaled", "max_clip": 7.0}
XQL |= {"value_updates": 1, "action_noise": 0.0, "random_actions": 0, "hidden_layers": 2}
XQL |= {"inverse_temperature": 3.0, "cosine_actor_lr": True, "actor_dropout": 0.0}
XQL |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "label": "X-QL T"}
XQL_MAZES = {"inverse_temperature": 10.0, "cosine_actor_lr": False, "reward_shift": -1.0}
XQL_MAZES |= {"eval_every": 30_000, "eval_episodes": 100}
XQL_TUNED = {  # the authors' scripts: batch, beta, clip and what else they set
    "halfcheetah-medium": (1024, 1.0, 7.0, {"action_noise": 0.1}),
    "halfcheetah-medium-expert": (1024, 1.0, 5.0, {}),
    "halfcheetah-medium-replay": (256, 1.0, 5.0, {}),
    "hopper-medium": (1024, 5.0, 7.0, {}),
    "hopper-medium-expert": (1024, 2.0, 7.0, {"random_actions": 1}),
    "hopper-medium-replay": (256, 2.0, 7.0, {}),
    "walker2d-medium": (1024, 10.0, 7.0, {}),
    "walker2d-medium-expert": (256, 2.0, 5.0, {}),
    "walker2d-medium-replay": (1024, 5.0, 5.0, {}),
    "antmaze-umaze": (256, 2.0, 7.0, {}),
    "antmaze-umaze-diverse": (256, 5.0, 7.0, {"random_actions": 1}),
    "antmaze-medium-play": (256, 0.8, 5.0, {}),
    "antmaze-medium-diverse": (256, 0.6, 7.0, {"value_updates": 4}),
    "antmaze-large-play": (1024, 0.6, 5.0, {}),
    "antmaze-large-diverse": (1024, 0.55, 5.0, {}),
    "kitchen-complete": (1024, 2.0, 7.0, {}),
    "kitchen-partial": (1024, 5.0, 7.0, {}),
    "kitchen-mixed": (1024, 8.0, 7.0, {}),
}
FQL = {**RUN, "alpha": 10.0, "normalize_q_loss": False, "q_aggregation": "mean", "flow_steps": 10}
FQL |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "hidden_dim": 512, "hidden_layers": 4}
FQL |= {"eval_every": 100_000, "eval_episodes": 50}
FQL_ALPHA = {  # where it is not 10
    "antmaze-large-play": 3,
    "antmaze-large-diverse": 3,
    "pen-human": 10_000,
    "pen-cloned": 10_000,
    "pen-expert": 3_000,
    "door-human": 30_000,
    "door-cloned": 30_000,
    "door-expert": 30_000,
    "hammer-human": 30_000,
    "hammer-cloned": 10_000,
    "hammer-expert": 30_000,
    "relocate-human": 10_000,
    "relocate-cloned": 30_000,
    "relocate-expert": 30_000,
}
FQL_ONLINE_ALPHA = {  # where it is not the offline one
    "pen-cloned": 1_000,
    "door-cloned": 1_000,
    "hammer-cloned": 1_000,
    "relocate-cloned": 10_000,
}

# of the fine-tuning: CORL's, but for IQL's on antmaze, which are its authors'
FINE_TUNE = {"online_steps": 1_000_000, "updates_per_step": 1, "online_share": None}
# CORL has 100 episodes every 50,000: too late to see a drop.
FINE_TUNE_MAZES = {"eval_every": 10_000, "eval_episodes": 20}
IQL_ONLINE = {**IQL, **FINE_TUNE, "cosine_actor_lr": False}
REBRAC_ONLINE = {**REBRAC, **FINE_TUNE, "online_share": 0.5, "exploration_noise": 0.0}
REBRAC_ONLINE |= {"online_actor_share": 0.5, "online_critic_share": 0.0}
CQL_ONLINE = {**CQL, **FINE_TUNE, "gap_floor": -200.0, "max_backup": True, "bc_updates": 0}
CQL_ONLINE_MAZES = {**FINE_TUNE_MAZES, "lagrange": True, "target_gap": 0.8}
CQL_ONLINE_MAZES |= {"critic_hidden_layers": 5, "reward_scale": 10.0, "reward_shift": -5.0}
CAL_QL = {**CQL_ONLINE, "target_gap": 0.8, "online_share": 0.5, "infinite_horizon": False}
del CAL_QL["regularizer"], CAL_QL["bc_updates"]  # fields that its script lacks

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
    "td3_bc": (TD3_BC, {"maze2d": MAZE2D, "antmaze": {**ANTMAZE, "reward_shift": -1.0}}),
    "rebrac": (
        REBRAC,
        {
            "locomotion": {"batch_size": 1024, "actor_lr": 1e-3, "critic_lr": 1e-3},
            "maze2d": {
                **SMALL_STEPS,
                **MAZE2D,
                "actor_penalty": 0.003,
                "critic_penalty": 0.001,
            },
            "antmaze": {
                **SMALL_STEPS,
                "critic_lr": 5e-5,
                "gamma": 0.999,
                "reward_scale": 100.0,
                "eval_episodes": 100,
                "eval_every": 50_000,
            },
            "adroit": SMALL_STEPS,
            "kitchen": {**SMALL_STEPS, "actor_penalty": 0.1, "critic_penalty": 0.01},
        },
    ),
    "awac": (
        AWAC,
        {
            "locomotion": {"awr_temperature": 0.3333},
            "maze2d": MAZE2D,
            "antmaze": {**ANTMAZE, "reward_shift": -1.0},
        },
    ),
    "cql": (
        CQL,
        {
            "maze2d": {  # CORL's
                **MAZE2D,
                "normalize_obs": True,
                "alpha": 10.0,
                "lagrange": True,
                "target_gap": 5.0,
                "bc_updates": 0,
                "actor_lr": 3e-5,
            },
            "antmaze": {
                "lagrange": True,
                "target_gap": 1.0,  # tau 5 / alpha 5
                "reward_scale": 4.0,  # (r - 0.5) * 4
                "reward_shift": -2.0,
                "eval_episodes": 100,
                "eval_every": 50_000,
            },
            "adroit": CQL_TEXT,
            "kitchen": CQL_TEXT,
        },
    ),
    "edac": (
        EDAC,
        {
            "maze2d": {"eta": 0.1},
            "adroit": {"num_critics": 50, "eta": 200.0},
        },
    ),
    "sac_n": (
        SAC_N,
        {
            "maze2d": {"num_critics": 25},
            "antmaze": {"num_critics": 25},
            "adroit": {"num_critics": 100},
        },
    ),
    "lb_sac": (LB_SAC, {}),
    "bcq": (BCQ, {"maze2d": MAZE2D, "antmaze": ANTMAZE}),
    "brac": (BRAC, {"maze2d": MAZE2D, "antmaze": ANTMAZE}),
    "xql": (
        XQL,
        {
            "locomotion": {"reward_by_return_range": True},
            "antmaze": XQL_MAZES,
            "kitchen": DEXTEROUS,
        },
    ),
    "xql_c": (
        {**XQL, "label": "X-QL C"},
        {
            "locomotion": {"reward_by_return_range": True},
            "antmaze": {**XQL_MAZES, "gumbel_temperature": 0.6},
            "adroit": {**DEXTEROUS, "gumbel_temperature": 5.0},
            "kitchen": {**DEXTEROUS, "gumbel_temperature": 5.0},
        },
    ),
    "iql-online": (
        IQL_ONLINE,
        {
            "antmaze": {
                **FINE_TUNE_MAZES,
                "expectile": 0.9,
                "inverse_temperature": 10.0,
                "reward_shift": -1.0,
            },
            "adroit": {"normalize_obs": True, "expectile": 0.8, "actor_dropout": 0.1},
        },
    ),
    "awac-online": (
        {**AWAC, **FINE_TUNE},
        {"antmaze": {**FINE_TUNE_MAZES, "reward_shift": -1.0}},
    ),
    "cql-online": (CQL_ONLINE, {"antmaze": CQL_ONLINE_MAZES, "adroit": {"alpha": 1.0}}),
    "cal_ql": (
        CAL_QL,
        {
            "antmaze": {**CQL_ONLINE_MAZES, "infinite_horizon": True},
            "adroit": {"alpha": 1.0},
        },
    ),
    "rebrac-online": (
        REBRAC_ONLINE,
        {
            "antmaze": {
                **FINE_TUNE_MAZES,
                **SMALL_STEPS,
                "critic_lr": 5e-5,
                "gamma": 0.999,
                "reward_scale": 100.0,
            },
            "adroit": SMALL_STEPS,
        },
    ),
    "spot": (
        SPOT,
        {
            "locomotion": {"normalize_obs": True, "actor_lr": 3e-4, "actor_dropout": 0.1},
            "antmaze": {
                **SPOT_OTHERS,
                "reward_shift": -1.0,
                "eval_episodes": 100,
                "eval_every": 50_000,
            },
            "adroit": SPOT_OTHERS,
        },
    ),
    "spot-online": (
        {**SPOT, **SPOT_OTHERS, **FINE_TUNE, "exploration_noise": 0.1},
        {
            "antmaze": {
                **FINE_TUNE_MAZES,
                "reward_shift": -1.0,
                "online_penalty_share": 0.2,
                "online_gamma": 0.995,
            },
            "adroit": {"online_penalty_share": 0.5, "online_gamma": None},
        },
    ),
    "fql": (
        FQL,
        {
            "antmaze": {"reward_shift": -1.0, "num_updates": 500_000},
            "adroit": {"q_aggregation": "min", "num_updates": 500_000},
        },
    ),
    "fql-online": (
        {**FQL, **FINE_TUNE},
        {"antmaze": {"reward_shift": -1.0}, "adroit": {"q_aggregation": "min"}},
    ),
    "dt": (
        DT,
        {
            "maze2d": {**DT_CORL, **MAZE2D},
            "antmaze": {"return_scale": 1.0, "eval_episodes": 100, "eval_every": 10_000},
            "adroit": DT_CORL,
            "kitchen": {"return_scale": 1.0},
        },
    ),
}
PER_TASK = {
    "rebrac": {
        task: {"actor_penalty": actor, "critic_penalty": critic}
        for task, (actor, critic) in PENALTIES.items()
    },
    "dt": {
        task: {"target_returns": TARGETS.get(task, TARGETS[task.partition("-")[0]])}
        for task in TASKS
    },
}
PER_TASK["xql"] = {
    task: {"batch_size": batch, "gumbel_temperature": beta, "max_clip": clip, **own}
    for task, (batch, beta, clip, own) in XQL_TUNED.items()
}
PER_TASK["rebrac-online"] = PER_TASK["rebrac"]
PER_TASK["spot"] = {task: {"penalty": penalty} for task, penalty in LAMBDAS.items()}
PER_TASK["spot-online"] = PER_TASK["spot"]
PER_TASK["fql"] = {task: {"alpha": alpha} for task, alpha in FQL_ALPHA.items()}
PER_TASK["fql-online"] = {
    task: {"alpha": alpha} for task, alpha in (FQL_ALPHA | FQL_ONLINE_ALPHA).items()
}
PER_TASK["sac_n"] = {task: {"num_critics": n} for task, (n, *_) in CRITICS.items()}
PER_TASK["lb_sac"] = {task: {"num_critics": n} for task, (*_, n) in CRITICS.items()}
PER_TASK["lb_sac"]["hopper-medium"]["layer_norm"] = True
PER_TASK["lb_sac"]["hopper-expert"]["num_updates"] = 500_000
PER_TASK["edac"] = {task: {"num_critics": 20, "eta": eta} for task, eta in PEN.items()}
PER_TASK["edac"] |= {
    task: {"num_critics": n, "eta": eta} for task, (_, n, eta, _) in CRITICS.items()
}
UNTUNED = {  # of <suite>/<task>: settings that nobody published for it
    "awac": r"kitchen/",
    "bc": r"kitchen/",
    "bc_10": r"kitchen/",
    "bcq": r"(maze2d|antmaze|adroit|kitchen)/",
    "brac": r"",
    "cql": r"full-replay|adroit/.*-expert",
    "dt": r"locomotion/[a-z0-9]+-(random|full-replay|expert)|-dense|kitchen/",
    "rebrac": r"-dense|kitchen/",
    "td3_bc": r"kitchen/",
}


@pytest.mark.parametrize("folder", PUBLISHED)
def test_values_are_the_published_ones(folder):
    common, per_suite = PUBLISHED[folder]
    for path in FILES[folder]:
        config, given = read(path)
        published = {**common, **per_suite.get(TASKS[task_of(path)]["suite"], {})}
        published |= PER_TASK.get(folder, {}).get(task_of(path), {})
        assert {name: getattr(config, name) for name in published} == published, path
        assert given.keys() <= published.keys() | TASK_FIELDS, path


@pytest.mark.parametrize("folder", UNTUNED)
def test_untuned_settings_say_so(folder):
    for path in FILES[folder]:
        untuned = re.search(UNTUNED[folder], in_suite(path.stem))
        assert ("untuned" in comment(path)) == bool(untuned), path


# ---- OGBench's tasks

# Of the FQL paper (2502.02538): its methods' common settings, and those of each task.
OGBENCH_NETWORKS = {"hidden_dim": 512, "hidden_layers": 4, "batch_size": 256, "label": ""}
OGBENCH_NETWORKS |= {"normalize_obs": False, "num_updates": 1_000_000, "actor_lr": 3e-4}
OGBENCH_NETWORKS |= {"eval_every": 100_000, "eval_episodes": 50, "final_eval_episodes": 100}
OGBENCH_VALUES = {**OGBENCH_NETWORKS, "critic_lr": 3e-4, "tau": 0.005, "reward_scale": 1.0}
OGBENCH_VALUES |= {"reward_shift": 0.0, "reward_by_return_range": False}
OGBENCH_PUBLISHED = {
    "bc": {**OGBENCH_NETWORKS, "top_fraction": 1.0},
    "iql": {
        **OGBENCH_VALUES,
        "value_lr": 3e-4,
        "expectile": 0.9,
        "cosine_actor_lr": False,
        "deterministic": True,  # a Gaussian of constant deviation
        "actor_dropout": 0.0,
    },
    "rebrac": {**OGBENCH_VALUES, "policy_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2},
    "fql": FQL,
}
OGBENCH_TASKS = {  # gamma, IQL's alpha, ReBRAC's alpha_1 and alpha_2
    "antmaze-large-navigate": (0.99, 10.0, 0.003, 0.01),
    "antmaze-giant-navigate": (0.995, 10.0, 0.003, 0.01),
    "humanoidmaze-medium-navigate": (0.995, 10.0, 0.01, 0.01),
    "humanoidmaze-large-navigate": (0.995, 10.0, 0.01, 0.01),
    "antsoccer-arena-navigate": (0.995, 1.0, 0.01, 0.01),
    "cube-single-play": (0.99, 1.0, 1.0, 0.0),
    "cube-double-play": (0.99, 0.3, 0.1, 0.0),
    "scene-play": (0.99, 10.0, 0.1, 0.01),
    "puzzle-3x3-play": (0.99, 10.0, 0.3, 0.01),
    "puzzle-4x4-play": (0.99, 3.0, 0.3, 0.01),
}
OGBENCH_PER_TASK = {"bc": {}, "iql": {}, "rebrac": {}}
for task, (gamma, alpha, actor, critic) in OGBENCH_TASKS.items():
    OGBENCH_PER_TASK["iql"][task] = {"gamma": gamma, "inverse_temperature": alpha}
    penalties = {"actor_penalty": actor, "critic_penalty": critic}
    OGBENCH_PER_TASK["rebrac"][task] = {"gamma": gamma, **penalties}

FQL_TASKS = {  # gamma, alpha, the aggregation of both targets
    "antmaze-large-navigate": (0.99, 10, "min"),
    "antmaze-giant-navigate": (0.995, 10, "min"),
    "humanoidmaze-medium-navigate": (0.995, 30, "mean"),
    "humanoidmaze-large-navigate": (0.995, 30, "mean"),
    "antsoccer-arena-navigate": (0.995, 10, "mean"),
    "cube-single-play": (0.99, 300, "mean"),
    "cube-double-play": (0.99, 300, "mean"),
    "scene-play": (0.99, 300, "mean"),
    "puzzle-3x3-play": (0.99, 1000, "mean"),
    "puzzle-4x4-play": (0.99, 1000, "mean"),
}
FQL_ONLINE_TASKS = {
    "humanoidmaze-medium-navigate": (0.995, 100, "mean"),
    "antsoccer-arena-navigate": (0.995, 30, "mean"),
    "cube-double-play": (0.99, 300, "mean"),
    "scene-play": (0.99, 300, "mean"),
    "puzzle-4x4-play": (0.99, 1000, "mean"),
}
for folder, table in (("fql", FQL_TASKS), ("fql-online", FQL_ONLINE_TASKS)):
    OGBENCH_PER_TASK[folder] = {
        task: {"gamma": gamma, "alpha": alpha, "q_aggregation": aggregation}
        for task, (gamma, alpha, aggregation) in table.items()
    }

every_ogbench_folder = pytest.mark.parametrize("folder", OGBENCH_FILES)


@pytest.mark.parametrize("folder", OGBENCH_PUBLISHED)
def test_every_default_task_of_ogbench_has_a_file(folder):
    assert {path.stem for path in OGBENCH_FILES[folder]} == OGBENCH_TASKS.keys()


@every_ogbench_folder
def test_ogbenchs_data_and_environment(folder):
    """The default task's; no reference returns, no other data, and nothing that is a default."""
    for path in OGBENCH_FILES[folder]:
        default, (config, given), task = script_of(path).TrainConfig(), read(path), task_of(path)
        row = OGBENCH[task]
        name = f"singletask-task{row['default_task']}-v0"
        assert config.dataset_id == f"ogbench/{task}/{name}", path
        assert config.env_id == f"{row['environment']}-{name}", path
        assert not config.download and config.fallback_dataset_id == "", path
        assert config.ref_min_score is config.ref_max_score is None, path
        assert [k for k in given if getattr(config, k) == getattr(default, k)] == [], path


@every_ogbench_folder
def test_ogbenchs_comment_names_task_and_source(folder):
    for path in OGBENCH_FILES[folder]:
        words, task = comment(path), task_of(path)
        default = f"its default task, task{OGBENCH[task]['default_task']}"
        assert words.startswith(f"OGBench {task}-singletask-v0 ({default}). "), path
        assert "Source: " in words, path
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == [], path


def test_the_fine_tuned_tasks_of_ogbench_have_a_file():
    assert {task_of(path) for path in OGBENCH_FILES["fql-online"]} == FQL_ONLINE_TASKS.keys()
    assert {folder for folder in OGBENCH_FILES if "online" in folder} == {"fql-online"}


@pytest.mark.parametrize("folder", [*OGBENCH_PUBLISHED, "fql-online"])
def test_ogbenchs_values_are_the_published_ones(folder):
    for path in OGBENCH_FILES[folder]:
        config, given = read(path)
        common = (OGBENCH_PUBLISHED | {"fql-online": PUBLISHED["fql-online"][0]})[folder]
        published = common | OGBENCH_PER_TASK[folder].get(task_of(path), {})
        assert {name: getattr(config, name) for name in published} == published, path
        assert given.keys() <= published.keys() | TASK_FIELDS, path


# ---- tasks of discrete actions

# The REM paper's settings (1907.04543), which QR-DQN and CQL share on the logs; BCQ's are its own.
ATARI = {"encoder": "nature", "frame_stack": 4, "clip_rewards": True, "eval_epsilon": 0.001}
ATARI |= {"gamma": 0.99, "batch_size": 32, "hidden_dim": 512, "hidden_layers": 1, "tau": 1.0}
ATARI |= {"critic_lr": 5e-5, "adam_eps": 0.01 / 32, "num_updates": 200 * 250_000 // 4}
ATARI |= {"target_every": 8_000 // 4, "eval_every": 250_000, "eval_episodes": 5}
ATARI |= {"final_eval_episodes": 100, "reward_scale": 1.0, "reward_shift": 0.0}
ATARI_BCQ = {"critic_lr": 6.25e-5, "adam_eps": 1.5e-4, "target_every": 8_000}
VECTORS = {"encoder": "mlp", "frame_stack": 1, "clip_rewards": False, "num_updates": 50_000}
VECTORS |= {
    "eval_epsilon": 0.0,
    "batch_size": 64,
    "critic_lr": 3e-4,
    "adam_eps": 1e-8,
    "gamma": 0.99,
    "tau": 0.005,
}
VECTORS |= {"target_every": 1, "hidden_dim": 256, "hidden_layers": 2, "final_eval_episodes": 100}
SMALL_IMAGES = {**VECTORS, "encoder": "minatar", "num_updates": 100_000, "batch_size": 32}
SMALL_IMAGES |= {"hidden_dim": 128, "hidden_layers": 1, "eval_epsilon": 0.001}
SETTINGS = {"cartpole-uniform-10": VECTORS, "minatar-breakout-uniform-10": SMALL_IMAGES}
OWN = {  # of each folder: on any task, and by the part of the logs
    "dqn": ({"head": "dqn", "double_q": False, "label": ""}, {}),
    "qr_dqn": (
        {"head": "qr_dqn", "double_q": False, "label": "QR-DQN"},
        {part: {"heads": 50 if part == "10" else 200} for part in ("10", "1pct", "10pct", "")},
    ),
    "rem": ({"head": "rem", "heads": 200, "double_q": False, "label": "REM"}, {}),
    "discrete_cql": (
        {"label": ""},
        {
            "10": {"alpha": 1.0, "quantiles": 50},  # of recorded runs: a CPU is enough
            "1pct": {"alpha": 4.0, "quantiles": 200},
            "10pct": {"alpha": 1.0, "quantiles": 200},
        },
    ),
    "discrete_bcq": (
        {"threshold": 0.3, "logit_penalty": 0.01, "label": ""},
        {"1pct": ATARI_BCQ, "10pct": ATARI_BCQ},
    ),
}
WHOLE = ["dqn", "qr_dqn", "rem"]  # also on whole logs
# The DT paper's table 8 (2106.01345): five epochs of 500,000 steps.
DT = {"context": 30, "hidden_dim": 128, "hidden_layers": 6, "attention_heads": 8, "dropout": 0.1}
DT |= {"batch_size": 128, "actor_lr": 6e-4, "weight_decay": 0.1, "grad_clip": 1.0}
DT |= {"adam_beta2": 0.95, "encoder": "nature", "frame_stack": 4, "return_scale": 1.0}
DT |= {"max_episode_steps": 27_000, "num_updates": 5 * 3_906, "warmup_updates": 3}
DT_PONG = {"batch_size": 512, "context": 50, "num_updates": 5 * 977, "warmup_updates": 1}
DT_TARGETS = {"breakout": "90", "pong": "20", "qbert": "2500", "seaquest": "1450"}
DT_SMALL = {"encoder", "num_updates", "batch_size", "context", "max_episode_steps", "hidden_dim"}
DT_SMALL |= {"hidden_layers", "attention_heads", "warmup_updates", "eval_every"}  # untuned

every_discrete_folder = pytest.mark.parametrize("folder", DISCRETE_FILES)


@every_discrete_folder
def test_every_discrete_task_has_a_file(folder):
    parts = ("", "-1pct", "-10pct") if folder in WHOLE else ("-1pct", "-10pct")
    tasks = {f"{game}{part}" for game in GAMES for part in parts}
    tasks = {f"{game}-1pct" for game in DT_TARGETS} if folder == "discrete_dt" else tasks
    assert {path.stem for path in DISCRETE_FILES[folder]} == tasks | RECORDED.keys()
    assert folder not in FILES.keys() | OGBENCH_FILES.keys()
    assert folder in OWN or folder == "discrete_dt"


def test_the_replays_are_named_as_the_converter_does():
    """Of the command that the config's comment gives, the id is the config's."""
    tool = load_tool("datasets/dqn_replay.py")
    table = tool.read_table()
    for task, dataset_id in REPLAYS.items():
        game, _, part = task.partition("-")
        args = tool.parse([game, *SHARES[f"-{part}" if part else ""].split()])
        log = dataclasses.replace(tool.find_game(args.game, table), share=args.share)
        assert log.minari_id == dataset_id


def test_the_recorded_runs_are_bundled():
    assert [name for name in RECORDED.values() if not (REPOSITORY / name).is_dir()] == []


@every_discrete_folder
def test_discrete_data_and_environment(folder):
    """The data name their environment and references; nothing else takes their place."""
    for path in DISCRETE_FILES[folder]:
        default, (config, given) = script_of(path).TrainConfig(), read(path)
        assert config.dataset_id == (REPLAYS | RECORDED)[path.stem], path
        assert config.env_id == "auto" and config.fallback_dataset_id == "", path
        assert config.ref_min_score is config.ref_max_score is None, path
        assert config.download == (path.stem in RECORDED), path
        assert [k for k in given if getattr(config, k) == getattr(default, k)] == [], path


@every_discrete_folder
def test_discrete_comments_name_the_data_and_the_source(folder):
    for path in DISCRETE_FILES[folder]:
        words, lines = comment(path), path.read_text(encoding="utf-8").splitlines()
        assert "Source: " in words and "arXiv" in words, path
        assert [line for line in lines if len(line) > 100] == [], path
        if path.stem in REPLAYS:
            game, _, part = path.stem.partition("-")
            share = SHARES[f"-{part}" if part else ""]
            assert f"#   python datasets/dqn_replay.py {game.title()}{share}" in lines, path
        else:
            assert "(datasets/collect_dqn.py). " in words, path
        published = folder == "discrete_bcq" and "cartpole" in path.stem
        published = published or (folder != "discrete_bcq" and path.stem in REPLAYS)
        assert ("untuned" in words) != published, path


def test_the_values_of_discrete_dt_are_the_published_ones():
    for path in DISCRETE_FILES["discrete_dt"]:
        (config, given), (game, _, part) = read(path), path.stem.partition("-")
        if path.stem in RECORDED:
            assert given.keys() <= DT_SMALL | TASK_FIELDS, path
            continue
        published = {**DT, **(DT_PONG if game == "pong" else {})}
        published["target_returns"] = DT_TARGETS[game]
        assert {name: getattr(config, name) for name in published} == published, path
        assert given.keys() <= published.keys() | TASK_FIELDS | {"max_envs"} and part == "1pct"


@pytest.mark.parametrize("folder", OWN)
def test_discrete_values_are_the_published_ones(folder):
    for path in DISCRETE_FILES[folder]:
        (config, given), (common, per_part) = read(path), OWN[folder]
        published = {**SETTINGS.get(path.stem, ATARI), **common}
        published |= per_part.get(path.stem.partition("-")[2].rpartition("-")[2], {})
        assert {name: getattr(config, name) for name in published} == published, path
        assert given.keys() <= published.keys() | TASK_FIELDS, path


# ---- the bundled maze: what each paper has for antmaze-umaze, in small networks and short runs

MAZE_SIZES = {"hidden_dim", "hidden_layers", "critic_hidden_layers", "vae_hidden_dim"}
MAZE_SIZES |= {"critic_hidden_dim", "behavior_updates", "warm_start"}
MAZE_SIZES |= {"num_updates", "vae_updates", "bc_updates", "warmup_updates", "online_steps"}
MAZE_SIZES |= {"eval_every", "eval_episodes"}
MAZE_FOLDERS = "bc bc_10 dt iql awac cql cal_ql td3_bc rebrac spot fql xql brac bcq edac".split()


def test_the_maze_has_a_file_for_each_of_these():
    online = {name for name in MAZE_FILES if name.endswith("-online")} | {"cal_ql"}
    assert online == {*ONLINE, "td3_bc-online"}
    assert MAZE_FILES.keys() == {*MAZE_FOLDERS, *online}


@pytest.mark.parametrize("folder", MAZE_FILES)
def test_the_mazes_settings_are_antmazes_but_for_sizes(folder):
    (path,) = MAZE_FILES[folder]
    likes = [path.with_name(path.name.replace(MAZE, "antmaze-umaze"))]
    likes += [path.with_name("antmaze-umaze.yaml")]  # nobody published TD3+BC's online
    (config, given), (like, _) = read(path), read(next(x for x in likes if x.exists()))
    names = {field.name for field in dataclasses.fields(config)}
    apart = {name for name in names if getattr(config, name) != getattr(like, name)}
    assert apart <= TASK_FIELDS | MAZE_SIZES
    assert TASK_FIELDS & given.keys() == {"dataset_id"}  # the data know environment and scores
    assert (REPOSITORY / config.dataset_id / "data" / "metadata.json").is_file()
    assert {getattr(config, name) for name in MAZE_SIZES & names if "dim" in name} == {128}
    assert {getattr(config, name) for name in MAZE_SIZES & names if "layers" in name} == {2}
    first = {"vae_updates", "behavior_updates"} & names  # updates of what imitates the data
    assert config.num_updates - sum(getattr(config, name) for name in first) == 50_000
    online = folder.endswith("-online") or folder == "cal_ql"
    assert getattr(config, "online_steps", 0) == 50_000 * online


@pytest.mark.parametrize("folder", MAZE_FILES)
def test_the_mazes_files_repeat_no_default_and_name_their_source(folder):
    (path,) = MAZE_FILES[folder]
    default, (config, given) = script_of(path).TrainConfig(), read(path)
    assert [k for k in given if getattr(config, k) == getattr(default, k)] == []
    assert re.search(r"Source: .*antmaze-umaze.*(arXiv \d{4}\.\d{5}|github\.com)", comment(path))
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
