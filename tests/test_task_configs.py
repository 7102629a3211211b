"""configs/<algorithm>/<task>.yaml: the task is the table's, the values are the published ones.

<task>-online.yaml goes on online after the offline updates, as does all that cal_ql has.
"""

import csv
import functools
import re

import pytest
import yaml
from conftest import REPOSITORY, load_script

FILES = {}  # of whatever folder there is; what goes on online is a folder of its own: iql-online
for path in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
    online = "-online" if path.stem.endswith("-online") else ""
    FILES.setdefault(path.parent.name + online, []).append(path)
# folders with a file for every task
COMPLETE = ["awac", "bc", "bc_10", "bcq", "brac", "cql", "dt", "iql", "rebrac", "td3_bc"]
PARTIAL = {  # of <suite>/<task>: what a folder lacks, as nobody published settings for it
    "edac": r"-dense|kitchen/",
    "lb_sac": r"(maze2d|antmaze|adroit|kitchen)/",
    "sac_n": r"-dense|kitchen/",
}
ONLINE = ["awac-online", "cal_ql", "cql-online", "iql-online", "rebrac-online"]
MAZES = ["umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"]
HANDS = ["door", "hammer", "pen", "relocate"]
SCRIPT = {
    "bc_10": "bc",
    "lb_sac": "edac",
    "sac_n": "edac",
}  # where a folder is not named as its script
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


@pytest.mark.parametrize("folder", PARTIAL)
def test_every_task_with_published_settings_has_a_file(folder):
    tasks = {task for task in TASKS if not re.search(PARTIAL[folder], in_suite(task))}
    assert {path.stem for path in FILES[folder]} == tasks


def test_every_folder_is_listed():
    assert sorted([*COMPLETE, *PARTIAL, *ONLINE]) == sorted(FILES)


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
    assert names <= {f"{task}{online}.yaml" for task in TASKS for online in ("", "-online")}


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
PER_TASK["rebrac-online"] = PER_TASK["rebrac"]
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
