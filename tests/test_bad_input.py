"""Planted faults: one line that names the thing and its mend, exit code 2, nothing lost."""

import errno
import itertools
import json
import os
import pickle
import platform
import resource
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import contents, load_script, toy_episode, toy_episodes, words, write_dataset
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from test_runs import RESUME, rows

VECTORS = {  # a dataset without an environment says what its arrays are
    "env": None,
    "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,)),
    "action_space": gym.spaces.Box(-2, 2, (1,)),
}
OWN = {"dataset_id": "store/own-v0"}


@pytest.fixture
def data() -> Path:
    """A dataset of the test's own, below the working directory: its `data` folder."""
    return write_dataset(Path("store"), "own-v0", toy_episodes())


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that is out of reach; says which ids were asked for."""
    asked = []

    def download(dataset_id):
        asked.append(dataset_id)
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(minari, "download_dataset", download)
    return asked


# ---- datasets


def test_unknown_dataset(script, refused, no_hub):
    refused(script, words(dataset_id="own/nowhere-v0"), "own/nowhere-v0", "check its name")
    refused(script, words(dataset_id="D4RL/nowhere/medium-v2"), "D4RL/nowhere/medium-v2")
    refused(script, words(dataset_id=""), "dataset_id", "not set")
    assert no_hub == []


def test_unknown_dataset_on_the_hub(iql, no_hub, capsys):
    assert iql.main(words(dataset_id="D4RL/nowhere/medium-v2", download="true")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "D4RL/nowhere/medium-v2" in lines[-1]
    assert "python datasets/d4rl.py nowhere-medium-v2" in lines[-1]
    assert len(lines) == 2 and "no network" in lines[0]
    assert no_hub == ["D4RL/nowhere/medium-v2"]
    assert contents() == {}


def test_a_hub_that_claims_success_but_leaves_nothing(iql, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(minari, "download_dataset", asked.append)
    assert iql.main(words(dataset_id="D4RL/nowhere/medium-v2", download="true")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "D4RL/nowhere/medium-v2" in lines[-1]
    assert len(lines) <= 2 and len(asked) == 1


def test_an_unknown_fallback(iql, capsys):
    argv = words(dataset_id="D4RL/nowhere/medium-v2", fallback_dataset_id="nor/this-v0")
    assert iql.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "nor/this-v0" in line
    assert contents() == {}


@pytest.mark.parametrize(
    "name",
    ["../nothing", "..", ".", "/nothing/here", "/", "a/../../../x", "plain", "file.txt", "toy"],
)
def test_paths_that_are_no_dataset(iql, refused, no_hub, name):
    """The last one is a namespace of the store."""
    Path("plain").mkdir()
    Path("plain/notes.txt").write_text("mine")
    Path("file.txt").write_text("mine")
    refused(iql, words(dataset_id=name, download="true"), name)
    assert no_hub == []


def test_empty_dataset(iql, refused, data):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        for name in list(file):
            del file[name]
    about = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**about, "total_episodes": 0}))
    refused(iql, words(**OWN), "store/own-v0", "no episodes")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ["observations", "actions", "rewards"])
def test_values_that_are_not_finite(iql, refused, data, array, value):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file[f"episode_1/{array}"][3] = value
    refused(iql, words(**OWN), "store/own-v0", "episode 1", "NaN", "datasets/doctor.py")


def test_values_that_float32_cannot_hold(iql, refused):
    rng = np.random.default_rng(0)
    rewards = np.full(5, 1e39)
    write_dataset(Path("store"), "own-v0", [toy_episode(rng, 5, True, rewards=rewards)])
    refused(iql, words(**OWN), "store/own-v0", "episode 0", "reward")


@pytest.mark.parametrize("value", [2.1, -2.001, 30.0])
def test_actions_outside_of_their_space(iql, refused, data, value):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file["episode_1/actions"][3] = value
    refused(iql, words(**OWN), "store/own-v0", "episode 1", "action")


@pytest.mark.parametrize("array", ["terminations", "truncations"])
def test_an_end_inside_an_episode(iql, refused, data, array):
    """A dataset whose ends were lost would train across them."""
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file[f"episode_1/{array}"][3] = True
    refused(iql, words(**OWN), "store/own-v0", "episode 1", "datasets/doctor.py")


@pytest.mark.parametrize(
    "array, length",
    [
        ("observations", 40),
        ("observations", 42),
        ("actions", 39),
        ("actions", 41),
        ("rewards", 39),
        ("rewards", 0),
        ("terminations", 39),
        ("truncations", 41),
    ],
)
def test_lengths_that_do_not_fit(iql, refused, data, array, length):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        old = file[f"episode_1/{array}"][()]
        del file[f"episode_1/{array}"]
        file[f"episode_1/{array}"] = np.resize(old, (length, *old.shape[1:]))
    refused(iql, words(**OWN), "store/own-v0", "episode 1", "datasets/doctor.py")


@pytest.mark.parametrize("array", ["observations", "actions", "rewards"])
def test_shapes_that_do_not_fit(iql, refused, data, array):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        old = file[f"episode_2/{array}"][()]
        del file[f"episode_2/{array}"]
        file[f"episode_2/{array}"] = np.stack([old, old], -1).reshape(len(old), -1)
    refused(iql, words(**OWN), "store/own-v0", "episode 2")


@pytest.mark.parametrize("name", ["", "observations", "actions", "rewards", "terminations"])
def test_a_missing_array(iql, refused, data, name):
    """Or a whole episode."""
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file[f"episode_1/{name}"]
    refused(iql, words(**OWN), "store/own-v0", "cannot be read")


@pytest.mark.parametrize(
    "name, keep", [("main_data.hdf5", 0), ("main_data.hdf5", 3000), ("metadata.json", 20)]
)
def test_truncated_files(iql, refused, data, name, keep):
    (data / name).write_bytes((data / name).read_bytes()[:keep])
    refused(iql, words(**OWN), "store/own-v0", "cannot be read")


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null"])
def test_metadata_of_something_else(iql, refused, data, text):
    (data / "metadata.json").write_text(text)
    refused(iql, words(**OWN), "store/own-v0", "cannot be read")


def test_no_arrays_beside_the_metadata(iql, refused, data):
    (data / "main_data.hdf5").unlink()
    refused(iql, words(**OWN), "store/own-v0", "cannot be read")


@pytest.mark.parametrize(
    "space, actions",
    [
        (gym.spaces.Discrete(3), np.zeros(5, np.int64)),
        (gym.spaces.MultiDiscrete([3, 3]), np.zeros((5, 2), np.int64)),
        (gym.spaces.Box(-np.inf, np.inf, (1,)), np.zeros((5, 1), np.float32)),
        (gym.spaces.Box(-3.4e38, 3.4e38, (1,)), np.zeros((5, 1), np.float32)),  # as good as none
    ],
)
def test_action_spaces_that_no_script_here_takes(iql, refused, space, actions):
    episodes = [toy_episode(np.random.default_rng(0), 5, True, actions=actions)]
    write_dataset(Path("store"), "own-v0", episodes, **{**VECTORS, "action_space": space})
    refused(iql, words(**OWN), "store/own-v0", "actions", "Box")


def test_observations_that_are_no_vectors(iql, refused):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    space = {"observation_space": gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)}
    episode = toy_episode(rng, 5, True, observations=images)
    write_dataset(Path("store"), "own-v0", [episode], **{**VECTORS, **space})
    refused(iql, words(**OWN), "observations", "images")


def test_equal_returns_have_no_range(iql, refused):
    write_dataset(Path("store"), "own-v0", [toy_episode(np.random.default_rng(0), 5, True)])
    argv = words(**OWN, reward_by_return_range="true")
    refused(iql, argv, "reward_by_return_range", "false")


# ---- checkpoints

WARM = {"run_dir": "warm", "checkpoint": "run"}


@pytest.mark.parametrize("name, value", [("hidden_dim", 32), ("num_seeds", 2)])
def test_a_checkpoint_of_other_networks(script, refused, name, value):
    assert script.main(words()) == 0
    refused(script, words(**{**WARM, name: value}), "checkpoint", name)


@pytest.mark.parametrize("kind", ["observation", "action"])
def test_a_checkpoint_of_another_size(iql, refused, kind):
    assert iql.main(words()) == 0
    rng, count = np.random.default_rng(0), 4 if kind == "observation" else 2
    space = gym.spaces.Box(-2, 2, (count,))
    values = rng.uniform(-1, 1, size=(31 if kind == "observation" else 30, count))
    episode = toy_episode(rng, 30, True, **{f"{kind}s": values.astype(np.float32)})
    write_dataset(Path("store"), "own-v0", [episode], **{**VECTORS, f"{kind}_space": space})
    refused(iql, words(**OWN, env_id="none", **WARM), "checkpoint")


def test_a_checkpoint_of_other_bounds(script, refused):
    """Its policy cannot play all of these actions, and its critics would see them beyond 1."""
    assert script.main(words()) == 0
    discrete = hasattr(script, "DiscreteAgent")
    space = gym.spaces.Discrete(2, start=1) if discrete else gym.spaces.Box(-3, 3, (1,))
    actions = np.ones(30, np.int64) if discrete else np.full((30, 1), 2.5, np.float32)
    obs = np.random.default_rng(0).normal(size=(31, 4 if discrete else 3)).astype(np.float32)
    episode = toy_episode(np.random.default_rng(0), 30, True, observations=obs, actions=actions)
    about = {**VECTORS, "observation_space": gym.spaces.Box(-np.inf, np.inf, obs.shape[1:])}
    write_dataset(Path("store"), "own-v0", [episode], **{**about, "action_space": space})
    refused(script, words(**OWN, env_id="none", **WARM), "checkpoint", "store/own-v0", "bounds")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def torch_file(content) -> bytes:
    torch.save(content, "made.pt")
    content = Path("made.pt").read_bytes()
    Path("made.pt").unlink()
    return content


NAMES = ("config", "about", "agent", "step", "seconds", "online", "window", "sizes")
FOREIGN = {
    "empty": lambda _: b"",
    "half": lambda good: good[: len(good) // 2],
    "without its end": lambda good: good[:-10],
    "text": lambda _: b'{"step": 3}',
    "a pickled class": lambda _: pickle.dumps(Evil()),
    "a class in torch's format": lambda _: torch_file({"step": 3, "agent": Evil()}),
    "an old pickle": lambda _: pickle.dumps({"step": 3}),
    "a tensor": lambda _: torch_file(torch.zeros(3)),
    "only weights": lambda _: torch_file({"weight": torch.zeros(3)}),
    "its names alone": lambda _: torch_file({name: {} for name in NAMES}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_truncated_and_foreign_checkpoints(iql, refused, kind):
    assert iql.main(words()) == 0
    file = Path("run/checkpoint.pt")
    file.write_bytes(FOREIGN[kind](file.read_bytes()))
    refused(iql, words(**WARM), "checkpoint")
    refused(iql, words(**{**WARM, "checkpoint": file}), "checkpoint")
    Path("run/result.json").unlink()  # as if interrupted
    refused(iql, RESUME, "checkpoint")
    assert not Path("executed").exists()


BROKEN = {
    **{f"{name} of another type": {name: "x"} for name in NAMES},
    "a step before the first": {"step": -1},
    "a step behind the last": {"step": 7},
    "a config without its seed": {"config": {"normalize_obs": False}},
    "a config that is a tensor": {"config": {"seed": torch.zeros(1)}},
    "no fingerprint": {"about": {}},
    "weights of another shape": {"agent": {"obs_mean": torch.zeros(9)}},
    "logs longer than they are": {"sizes": {"metrics": 10**6, "episodes": 0}},
    "logs shorter than nothing": {"sizes": {"metrics": -1, "episodes": 0}},
    "no sizes": {"sizes": {}},
    "metrics of other seeds": {"window": {"q": [torch.zeros(5), 1]}},
    "metrics that are no tensors": {"window": {"q": [1.0, 1]}},
    "metrics of no update": {"window": {"q": [torch.zeros(2), 0]}},
    "metrics of half an update": {"window": {"q": [torch.zeros(2), 0.5]}},
    "metrics of more updates than there were": {"window": {"q": [torch.zeros(2), 10**20]}},
    "metrics without their number": {"window": {"q": torch.zeros(2, 2)}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_with_broken_fields(iql, refused, kind):
    assert iql.main(words(num_seeds=2)) == 0
    Path("run/result.json").unlink()  # as if interrupted
    content = torch.load("run/checkpoint.pt")
    torch.save({**content, **BROKEN[kind]}, "run/checkpoint.pt")
    Path("run/lock").write_text(f"process {os.getpid()} on {platform.node()}\n")
    refused(iql, RESUME, "checkpoint")


ONLINE = {"num_updates": 3, "online_steps": 6}


@pytest.mark.parametrize(
    "name, value",
    [
        *itertools.product(("begun", "rows"), (None, [], 0)),
        ("begun", [-1]),
        ("begun", ["x"]),
        ("begun", [9]),
        ("rows", 7),
    ],
)
def test_a_checkpoint_with_a_broken_online_phase(iql, refused, name, value):
    assert iql.main(words(**ONLINE)) == 0
    Path("run/result.json").unlink()
    content = torch.load("run/checkpoint.pt")
    if value == 7:  # times as many
        rows = content["online"]["rows"][0]
        value = [{k: torch.cat([v] * 7) for k, v in rows.items()}]
    content["online"][name] = value
    torch.save(content, "run/checkpoint.pt")
    Path("run/lock").write_text(f"process {os.getpid()} on {platform.node()}\n")
    refused(iql, RESUME, "online")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"last": 3}', '{"last": [{}]}'])
def test_a_broken_result(iql, refused, text):
    assert iql.main(words()) == 0
    Path("run/result.json").write_text(text)
    refused(iql, words(), "run/result.json")


def test_no_checkpoint_there(iql, refused):
    Path("empty").mkdir()
    refused(iql, words(checkpoint="nowhere.pt"), "nowhere.pt")
    refused(iql, words(checkpoint="empty"), "empty")


@pytest.mark.parametrize("first, second", [("bc", "iql"), ("cql", "cal_ql"), ("cal_ql", "cql")])
def test_a_run_of_another_algorithm(refused, first, second):
    first, second = load_script(first), load_script(second)
    assert first.main(words()) == 0
    refused(second, words(**WARM), "checkpoint")
    refused(second, words(), "run")
    refused(second, RESUME, "run")
    Path("run/result.json").unlink()
    refused(second, words(resume="true"), "run")
    refused(second, RESUME, "run")


# ---- run folders


def test_a_run_folder_in_use(script, refused):
    assert script.main(words()) == 0
    refused(script, words(seed=5), "run", "seed", "another run")
    Path("run/result.json").unlink()  # as if interrupted
    refused(script, words(), "run", "in use", "--resume true")
    Path("run/checkpoint.pt").unlink()  # as if interrupted early
    refused(script, words(), "run", "in use", "--resume true")


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "checkpoint.pt", "metrics.jsonl"])
def test_a_folder_with_other_files(iql, refused, name):
    """Nobody's files are written over or cut, not even with --resume true."""
    Path("run").mkdir()
    Path("run", name).write_text("mine")
    refused(iql, words(), "run")
    if name == "thesis.tex":  # which is in nobody's way
        assert iql.main(words(resume="true")) == 0
    else:
        refused(iql, words(resume="true"), "run")
    assert Path("run", name).read_text() == "mine"


def test_resume_needs_a_run_dir(iql, refused):
    argv = words(resume="true")
    at = argv.index("--run_dir")
    refused(iql, argv[:at] + argv[at + 2 :], "resume", "run_dir")


def test_resume_where_no_run_is_and_no_settings_are(iql, refused):
    refused(iql, ["--run_dir", "nowhere", "--resume", "true"], "dataset_id", "not set")


# ---- disks


@contextmanager
def file_limit(size: int):
    """As a full disk: no file may grow beyond `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def error_line(capsys) -> str:
    """The last line of stderr, below the progress."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: "), err
    return line


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(iql, capsys, monkeypatch):
    assert iql.main(words(run_dir="whole")) == 0
    update, kept, limits = iql.IQL.update, {}, []

    def fill(agent, batch, noise, *variant):
        if Path("run/checkpoint.pt").is_file() and not limits:
            kept.update(contents("run"))
            limits.append(file_limit(4000))
            limits[0].__enter__()
        return update(agent, batch, noise, *variant)

    monkeypatch.setattr(iql.IQL, "update", fill)
    try:
        assert iql.main(words()) == 2
    finally:
        limits[0].__exit__(None, None, None)
    assert os.strerror(errno.EFBIG) in error_line(capsys)
    assert contents("run")["run/checkpoint.pt"] == kept["run/checkpoint.pt"]
    monkeypatch.setattr(iql.IQL, "update", update)
    assert iql.main(RESUME) == 0
    assert rows("run/metrics.jsonl") == rows("whole/metrics.jsonl")
    assert rows("run/episodes.jsonl") == rows("whole/episodes.jsonl")


def test_a_disk_that_is_full_from_the_start(iql, capsys):
    with file_limit(0):
        assert iql.main(words()) == 2
    assert os.strerror(errno.EFBIG) in error_line(capsys)
    assert iql.main(words(resume="true")) == 0  # once there is room again


def test_a_log_that_cannot_be_written(iql, capsys, monkeypatch):
    monkeypatch.setattr(iql.Run, "log", lambda *_: open("/dev/full", "w").write("x" * 99999))
    assert iql.main(words()) == 2
    assert os.strerror(errno.ENOSPC) in error_line(capsys)


def test_places_where_nothing_can_be_written(iql, refused):
    Path("file").write_text("mine")
    refused(iql, words(run_dir="file/run"), "file")
    refused(iql, words(run_dir="file"), "file")
    if Path("/proc/self").is_dir():
        refused(iql, words(run_dir="/proc/run"), "/proc/run")


# ---- environments and devices


class TwoActions(PendulumEnv):
    """Pendulum's observations, but two actions."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-2, 2, (2,))


class Buttons(PendulumEnv):
    """Pendulum's observations, but discrete actions."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)


class Broken(PendulumEnv):
    """Does not start."""

    def __init__(self):
        raise RuntimeError("no licence\nfor this simulator")


for kind in (TwoActions, Buttons, Broken):
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=20)


def test_unknown_environments(iql, refused):
    refused(iql, words(env_id="Nowhere-v7"), "Nowhere", "env_id", "name another")
    refused(iql, words(env_id="nowhere.at.all:Nowhere-v7"), "env_id", "name another")
    refused(iql, words(env_id=""), "env_id")
    refused(iql, words(env_id="Broken-v0"), "Broken-v0", "no licence")
    refused(iql, words(env_kwargs="{colour: blue}"), "env_id", "colour")


@pytest.mark.parametrize("name", ["MountainCar-v0", "TwoActions-v0", "Buttons-v0"])
def test_environments_that_do_not_fit(script, refused, name):
    refused(script, words(env_id=name), name)


def test_a_dataset_without_an_environment(iql, refused):
    write_dataset(Path("store"), "own-v0", toy_episodes(), **VECTORS)
    refused(iql, words(**OWN), "env_id", "none")
    assert iql.main(words(**OWN, env_id="none")) == 0


@pytest.mark.parametrize("name", ["tpu", "", "meta", "cuda:99"])
def test_devices_that_are_not_there(iql, refused, name):
    refused(iql, words(device=name), "device", "auto")


def test_cuda_graphs_without_cuda(iql, refused):
    refused(iql, words(device="cpu", compile="graphs"), "compile", "cuda", "true")
