"""Minari's hub, made here: its ids, namespaces, formats and environments go through the scripts."""

import fnmatch
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import gymnasium_robotics
import minari
import minari.storage.remotes.huggingface as remote
import numpy as np
import pytest
from conftest import plain_agent, words
from minari.data_collector import EpisodeBuffer

# Remarks of Minari's on what a dataset lacks, and of Gymnasium's on versions.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 6  # an episode's
FORMATS = ("hdf5", "arrow")
KITCHEN = {
    "tasks_to_complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "remove_task_when_completed": False,
    "terminate_on_tasks_completed": False,
}
# id on the hub: (environment, its arguments, sizes of observations and actions)
SETS = {
    "D4RL/pointmaze/umaze-v2": ("PointMaze_UMaze-v3", {}, 2 + 2 + 4, 2),
    "D4RL/antmaze/umaze-v1": ("AntMaze_UMaze-v4", {}, 2 + 2 + 27, 8),
    "D4RL/kitchen/complete-v2": ("FrankaKitchen-v1", KITCHEN, 2 * 11 + 59, 9),
    "D4RL/door/human-v2": ("AdroitHandDoor-v1", {}, 39, 28),
    "mujoco/hopper/medium-v0": ("Hopper-v5", {}, 11, 3),
}
MAZE = "D4RL/pointmaze/umaze-v2"
GOAL = ["kettle", "light switch", "microwave", "slide cabinet"]
ORDER = {  # in which a dict's arrays are joined
    MAZE: ["achieved_goal", "desired_goal", "observation"],
    "D4RL/antmaze/umaze-v1": ["achieved_goal", "desired_goal", "observation"],
    "D4RL/kitchen/complete-v2": [
        *[f"achieved_goal/{part}" for part in GOAL],
        *[f"desired_goal/{part}" for part in GOAL],
        "observation",
    ],
}


def age(file: Path) -> None:
    """The metadata as Minari 0.5.0 wrote them with Gymnasium 0.29, and without reference scores."""
    metadata = json.loads(file.read_text())
    for name in {"env_spec", "eval_env_spec"} & metadata.keys():
        spec = json.loads(metadata[name])
        flags = {"order_enforce": True, "autoreset": False, "disable_env_checker": False}
        flags["apply_api_compatibility"] = False
        rest = {key: spec[key] for key in spec.keys() - flags.keys()}
        metadata[name] = json.dumps({**flags, **rest})
    metadata["minari_version"] = "0.5.0"
    for name in ("jpeg_encoding", "ref_min_score", "ref_max_score"):
        metadata.pop(name, None)
    file.write_text(json.dumps(metadata))


def stack(observations: list):
    """Observations of an episode, (nested) dicts of arrays included."""
    if isinstance(observations[0], dict):
        return {key: stack([each[key] for each in observations]) for key in observations[0]}
    return np.stack(observations)


def record(dataset_id: str, env: gym.Env, data_format: str, **options) -> None:
    """Two episodes of random actions, in the layout of the hub's."""
    buffers = []
    for seed in (0, 1):
        rows, observations, ended = [], [env.reset(seed=seed)[0]], False
        env.action_space.seed(seed)
        while not ended:
            action = env.action_space.sample()
            observation, *rest, _ = env.step(action)
            rows.append((action, *rest))
            observations.append(observation)
            ended = rest[1] or rest[2]
        names = ("actions", "rewards", "terminations", "truncations")
        arrays = {
            key: np.array(each) for key, each in zip(names, zip(*rows, strict=True), strict=True)
        }
        states = len(observations)
        infos = {"success": [False] * states, "qpos": np.zeros((states, 2))}
        buffers.append(EpisodeBuffer(observations=stack(observations), infos=infos, **arrays))
    options = {"env": env, "data_format": data_format, **options}
    minari.create_dataset_from_buffers(dataset_id, buffers, **options)
    env.close()


@pytest.fixture(scope="module")
def hubs(tmp_path_factory) -> dict[str, Path]:
    """The hub's repositories in each format: a namespace is one, a set is a folder in it."""
    gym.register_envs(gymnasium_robotics)
    roots = {}
    with pytest.MonkeyPatch.context() as patch, pytest.warns():
        for data_format in FORMATS:
            roots[data_format] = root = tmp_path_factory.mktemp(data_format)
            patch.setenv("MINARI_DATASETS_PATH", str(root))
            for dataset_id, (name, kwargs, *_) in SETS.items():
                env = gym.make(name, max_episode_steps=STEPS, **kwargs)
                record(dataset_id, env, data_format)
                age(root / dataset_id / "data" / "metadata.json")
            for namespace in ("D4RL", "mujoco"):
                ids = [dataset_id for dataset_id in SETS if dataset_id.startswith(namespace)]
                inner = {Path(dataset_id).parent.as_posix() for dataset_id in ids}
                about = {"datasets": ids, "namespaces": sorted(inner)}
                (root / namespace / "namespace_metadata.json").write_text(json.dumps(about))
                for folder in inner:
                    (root / folder / "namespace_metadata.json").write_text("{}")
    return roots


class Api:
    """What Minari uses of Hugging Face's API, over a folder."""

    root: Path
    leaves_off = ""  # the download ends before this file

    def __init__(self, token=None):
        assert token is None

    def list_datasets(self, author: str, dataset_name: str | None = None) -> Iterable:
        for folder in self.root.iterdir():
            if dataset_name is None or dataset_name in folder.name:
                yield SimpleNamespace(id=f"{author}/{folder.name}")

    def hf_hub_download(self, repo_id, filename, repo_type, local_dir=None, force_download=False):
        assert repo_type == "dataset" and repo_id.startswith("farama-minari/")
        file = self.root / repo_id.partition("/")[2] / filename
        if local_dir is None:
            return str(file)
        assert force_download
        return shutil.copy(file, Path(local_dir, filename))

    def snapshot_download(self, repo_id, allow_patterns, repo_type, local_dir):
        assert repo_type == "dataset"
        source = self.root / repo_id.partition("/")[2]
        for file in sorted(source.rglob("*")):
            name = file.relative_to(source).as_posix()
            if file.is_file() and fnmatch.fnmatch(name, allow_patterns):
                if file.name == self.leaves_off:
                    raise ConnectionError("the connection broke")
                target = Path(local_dir, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)


@pytest.fixture
def use_hub(hubs, tmp_path, monkeypatch):
    """use_hub(format, leaves_off) -> an empty store whose hub has the sets in this format."""

    def use(data_format: str, leaves_off: str = "") -> Path:
        state = {"root": hubs[data_format], "leaves_off": leaves_off}
        monkeypatch.setattr(remote, "HfApi", type("Local", (Api,), state))
        monkeypatch.delenv("MINARI_REMOTE", raising=False)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "own"))
        return tmp_path / "own"

    return use


def fetch(**settings) -> list[str]:
    short = {"download": "true", "eval_every": 100, "final_eval_episodes": 1}
    return words(**{**short, **settings})


def episodes() -> list[dict]:
    return [json.loads(line) for line in Path("run/episodes.jsonl").read_text().splitlines()]


def load(script, dataset_id: str) -> tuple:
    """Episodes, action space, metadata."""
    return script.load_dataset(script.TrainConfig(dataset_id=dataset_id, download=False))


# ---- ids of the hub


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dataset_id", SETS)
def test_an_id_is_fetched_trained_on_and_evaluated(iql, use_hub, dataset_id, data_format):
    name, _, obs_dim, act_dim = SETS[dataset_id]
    store = use_hub(data_format)
    assert iql.main(fetch(dataset_id=dataset_id)) == 0
    metadata = json.loads((store / dataset_id / "data" / "metadata.json").read_text())
    assert (metadata["data_format"], metadata["minari_version"]) == (data_format, "0.5.0")
    assert json.loads(Path("run/result.json").read_text())["env_id"] == name
    (row,) = episodes()
    told = not dataset_id.startswith(("mujoco/", "D4RL/kitchen/"))  # by their environments
    success = 0.0 if told else None
    assert row["length"] == STEPS and row["score"] == success
    saved = iql.read_checkpoint("run")["agent"]
    assert saved["obs_mean"].shape == (obs_dim,)
    assert saved["action_center"].shape == (act_dim,)


def test_a_fetched_set_needs_no_hub_again(iql, use_hub, monkeypatch):
    use_hub("hdf5")
    assert iql.main(fetch(dataset_id=MAZE)) == 0
    monkeypatch.setattr(minari, "download_dataset", None)
    assert iql.main(fetch(dataset_id=MAZE, run_dir="again")) == 0
    files = [Path(folder, "episodes.jsonl").read_text() for folder in ("run", "again")]
    assert files[0] == files[1]


def test_the_environment_meant_for_evaluation_wins(iql, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=STEPS)
    own = gym.make("PointMaze_UMaze-v3", max_episode_steps=STEPS + 3)
    record("D4RL/pointmaze/own-v0", env, "hdf5", eval_env=own)
    age(tmp_path / "D4RL/pointmaze/own-v0/data/metadata.json")
    assert iql.main(fetch(dataset_id="D4RL/pointmaze/own-v0")) == 0
    assert episodes()[0]["length"] == STEPS + 3


def test_wrappers_of_a_stored_environment_are_kept(iql, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=STEPS)
    env = gym.wrappers.FilterObservation(env, ["observation", "desired_goal"])
    record("own/wrapped-v0", gym.wrappers.FlattenObservation(env), "hdf5")
    assert iql.main(fetch(dataset_id="own/wrapped-v0")) == 0
    assert iql.read_checkpoint("run")["agent"]["obs_mean"].shape == (6,)


# ---- what is read


def part(observations: dict, path: str) -> np.ndarray:
    for key in path.split("/"):
        observations = observations[key]
    return observations


@pytest.mark.parametrize("dataset_id", ORDER)
def test_dicts_are_joined_in_the_order_of_their_keys(iql, hubs, monkeypatch, dataset_id):
    prints = set()
    for data_format in FORMATS:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(hubs[data_format]))
        data, _, about = load(iql, dataset_id)
        stored = minari.load_dataset(dataset_id)[0].observations
        joined = np.concatenate([part(stored, path) for path in ORDER[dataset_id]], -1)
        np.testing.assert_array_equal(data[0]["obs"], joined)
        prints.add(about["fingerprint"])
    assert len(prints) == 1  # the same content in both formats

    name, kwargs, *_ = SETS[dataset_id]
    cfg = iql.TrainConfig(dataset_id=dataset_id)  # the policy sees what the data hold
    sizes = plain_agent(iql, joined.shape[1], SETS[dataset_id][3])
    env = gym.make(iql.find_environment(cfg, about, sizes)[0])
    live = iql.flatten_obs(env.observation_space, env.reset(seed=0)[0])
    np.testing.assert_array_equal(live.astype("f4"), joined[0].astype("f4"))
    assert env.spec.id == name and env.spec.kwargs.items() >= kwargs.items()


def test_both_formats_hold_the_same_steps(iql, hubs, monkeypatch):
    prints = []
    for data_format in FORMATS:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(hubs[data_format]))
        data, _, about = load(iql, "D4RL/door/human-v2")
        assert [len(episode["reward"]) for episode in data] == [STEPS, STEPS]
        assert not any(episode["terminated"].any() for episode in data)
        prints.append(about["fingerprint"])
    assert prints[0] == prints[1]


# ---- what goes wrong


def said(capsys) -> tuple[str, str]:
    """The reason and the error: a line each, and no more."""
    reason, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return reason, error


@pytest.mark.parametrize("name", ["D4RL/pointmaze/nowhere-v2", "nobody/nothing-v0"])
def test_an_id_that_the_hub_lacks(iql, use_hub, capsys, name):
    store = use_hub("hdf5")
    assert iql.main(fetch(dataset_id=name)) == 2
    reason, error = said(capsys)
    assert name in reason and "hub" in reason and "any version" in reason and name in error
    assert not (store / name).exists() and not Path("run").exists()


def test_a_version_that_the_hub_lacks_names_the_one_it_has(iql, use_hub, capsys):
    use_hub("hdf5")
    assert iql.main(fetch(dataset_id="D4RL/pointmaze/umaze-v7")) == 2
    assert MAZE in said(capsys)[0]


@pytest.mark.parametrize("leaves_off", ["main_data.hdf5", "metadata.json"])
def test_a_broken_download_leaves_nothing_behind(iql, use_hub, capsys, leaves_off):
    store = use_hub("hdf5", leaves_off)
    assert iql.main(fetch(dataset_id=MAZE)) == 2
    assert "the connection broke" in said(capsys)[0]
    assert not (store / MAZE).exists()
    use_hub("hdf5")
    assert iql.main(fetch(dataset_id=MAZE)) == 0


def test_arrow_without_pyarrow(iql, hubs, refused, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(hubs["arrow"]))
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(iql, fetch(dataset_id=MAZE), MAZE, "pyarrow")


@pytest.fixture
def no_robotics(monkeypatch):
    """As in a process that has not imported gymnasium-robotics yet."""
    own = ("PointMaze", "FrankaKitchen")
    known = {name: spec for name, spec in gym.registry.items() if not name.startswith(own)}
    monkeypatch.setattr(gym.envs.registration, "registry", known)
    monkeypatch.setattr(gym, "registry", known)
    monkeypatch.delitem(sys.modules, "gymnasium_robotics")


@pytest.mark.usefixtures("no_robotics")
@pytest.mark.parametrize("env_id", ["auto", "PointMaze_UMaze-v3"])
def test_gymnasium_robotics_is_imported_where_needed(iql, use_hub, capsys, env_id):
    use_hub("hdf5")
    settings = {"env_id": env_id, "env_kwargs": f"{{max_episode_steps: {STEPS + 1}}}"}
    assert iql.main(fetch(dataset_id=MAZE, **settings)) == 0
    assert episodes()[0]["length"] == STEPS + 1
    lines = capsys.readouterr().err.split("\n")  # progress, and no notice of the package's
    assert not [line for line in lines if line.strip() and " updates" not in line]


@pytest.mark.usefixtures("no_robotics")
def test_a_policy_that_fits_no_environment_is_one_line(iql, hubs, refused, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(hubs["hdf5"]))
    refused(iql, fetch(dataset_id=MAZE, env_id="FrankaKitchen-v1"), "FrankaKitchen-v1", "(8, 2)")
    refused(iql, fetch(dataset_id=MAZE, env_id="PointMaze-v99"), "PointMaze-v99")
