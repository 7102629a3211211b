"""Planted faults: one line that names the thing and its mend, exit code 2, nothing lost."""

import errno
import json
import os
import pickle
import resource
import shutil
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

VECTORS = {  # a dataset without an environment says what its arrays are
    "env": None,
    "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,)),
    "action_space": gym.spaces.Box(-2, 2, (1,)),
}


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
    assert len(lines) == 2 and "no network" in lines[0]
    assert no_hub == ["D4RL/nowhere/medium-v2"]
    assert contents() == {}


def test_a_hub_that_claims_success_but_leaves_nothing(iql, monkeypatch, capsys):
    monkeypatch.setattr(minari, "download_dataset", lambda _: None)
    assert iql.main(words(dataset_id="D4RL/nowhere/medium-v2", download="true")) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "D4RL/nowhere/medium-v2" in line and "\n" not in line


def test_an_unknown_fallback(iql, capsys):
    argv = words(dataset_id="D4RL/nowhere/medium-v2", fallback_dataset_id="nor/this-v0")
    assert iql.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "nor/this-v0" in line
    assert contents() == {}


@pytest.mark.parametrize(
    "name",
    ["../nothing", "..", ".", "/nothing/here", "/", "a/../../../x", "plain", "file.txt", "./plain"],
)
def test_paths_that_are_no_dataset(iql, refused, no_hub, name):
    Path("plain").mkdir()
    Path("plain/notes.txt").write_text("mine")
    Path("file.txt").write_text("mine")
    refused(iql, words(dataset_id=name, download="true"), name, "metadata.json")
    assert no_hub == []


def test_a_namespace_of_the_store_is_no_dataset(iql, refused):
    refused(iql, words(dataset_id="toy"), "toy")


def test_links_that_lead_out_of_a_dataset(iql, refused, data):
    outside = Path("outside.bin").resolve()
    outside.write_bytes(b"mine")
    (data / "extra").symlink_to(outside)
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "link", "extra")
    (data / "extra").unlink()
    shutil.move(data / "main_data.hdf5", "elsewhere.hdf5")
    (data / "main_data.hdf5").symlink_to(Path("elsewhere.hdf5").resolve())
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "link", "main_data.hdf5")
    refused(iql, words(dataset_id=str(data.resolve())), "link", "main_data.hdf5")
    (data / "main_data.hdf5").unlink()
    (data / "main_data.hdf5").symlink_to("twin.hdf5")  # a link inside is nobody's harm
    shutil.move("elsewhere.hdf5", data / "twin.hdf5")
    assert iql.main(words(dataset_id="store/own-v0")) == 0


def test_the_data_folder_is_itself_a_link_that_leads_out(iql, refused, data):
    shutil.move(data, "elsewhere")
    data.symlink_to(Path("elsewhere").resolve())
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "link")


def test_empty_dataset(script, refused, data):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        for name in list(file):
            del file[name]
    about = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**about, "total_episodes": 0}))
    refused(script, words(dataset_id="store/own-v0"), "store/own-v0", "no episodes")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ["observations", "actions", "rewards"])
def test_values_that_are_not_finite(iql, refused, data, array, value):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file[f"episode_1/{array}"][3] = value
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "episode 1", "NaN", "mend it")


def test_values_that_float32_cannot_hold(iql, refused):
    rng = np.random.default_rng(0)
    rewards = np.full(5, 1e39)
    write_dataset(Path("store"), "big-v0", [toy_episode(rng, 5, True, rewards=rewards)])
    refused(iql, words(dataset_id="store/big-v0"), "store/big-v0", "episode 0", "reward")


@pytest.mark.parametrize("value", [2.1, -2.001, 30.0])
def test_actions_outside_of_their_space(script, refused, data, value):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file["episode_1/actions"][3] = value
    refused(script, words(dataset_id="store/own-v0"), "store/own-v0", "episode 1", "actions")


@pytest.mark.parametrize(
    "array, rows",
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
def test_lengths_that_do_not_fit(iql, refused, data, array, rows):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        old = file[f"episode_1/{array}"][()]
        del file[f"episode_1/{array}"]
        file[f"episode_1/{array}"] = np.resize(old, (rows, *old.shape[1:]))
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "episode 1", "mend it")


@pytest.mark.parametrize("array", ["observations", "actions", "rewards"])
def test_shapes_that_do_not_fit(iql, refused, data, array):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        old = file[f"episode_2/{array}"][()]
        del file[f"episode_2/{array}"]
        file[f"episode_2/{array}"] = np.stack([old, old], -1).reshape(len(old), -1)
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "episode 2")


@pytest.mark.parametrize("array", ["observations", "actions", "rewards", "terminations"])
def test_a_missing_array(iql, refused, data, array):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file[f"episode_1/{array}"]
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "cannot be read")


def test_a_missing_episode(iql, refused, data):
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file["episode_1"]
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "cannot be read")


@pytest.mark.parametrize(
    "name, keep", [("main_data.hdf5", 0), ("main_data.hdf5", 3000), ("metadata.json", 20)]
)
def test_truncated_files(iql, refused, data, name, keep):
    (data / name).write_bytes((data / name).read_bytes()[:keep])
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "cannot be read")


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null"])
def test_metadata_of_something_else(iql, refused, data, text):
    (data / "metadata.json").write_text(text)
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "cannot be read")


def test_no_arrays_beside_the_metadata(iql, refused, data):
    (data / "main_data.hdf5").unlink()
    refused(iql, words(dataset_id="store/own-v0"), "store/own-v0", "cannot be read")


@pytest.mark.parametrize(
    "space, actions",
    [
        (gym.spaces.Discrete(3), np.zeros(5, np.int64)),
        (gym.spaces.MultiDiscrete([3, 3]), np.zeros((5, 2), np.int64)),
        (gym.spaces.Box(-np.inf, np.inf, (1,)), np.zeros((5, 1), np.float32)),
        (gym.spaces.Box(-1, 1, (1, 2)), np.zeros((5, 1, 2), np.float32)),
    ],
)
def test_action_spaces_that_no_script_here_takes(iql, refused, space, actions):
    rng = np.random.default_rng(0)
    episodes = [toy_episode(rng, 5, True, actions=actions)]
    write_dataset(Path("store"), "other-v0", episodes, **{**VECTORS, "action_space": space})
    refused(iql, words(dataset_id="store/other-v0"), "store/other-v0", "actions", "Box")


def test_observations_that_are_no_vectors(iql, refused):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 4, 4)).astype(np.float32)
    episode = toy_episode(rng, 5, True, observations=images)
    space = gym.spaces.Box(-np.inf, np.inf, (4, 4))
    spaces = {**VECTORS, "observation_space": space}
    write_dataset(Path("store"), "images-v0", [episode], **spaces)
    refused(iql, words(dataset_id="store/images-v0"), "store/images-v0", "obs")


def test_equal_returns_have_no_range(iql, refused):
    rng = np.random.default_rng(0)
    write_dataset(Path("store"), "single-v0", [toy_episode(rng, 5, True)])
    argv = words(dataset_id="store/single-v0", reward_by_return_range="true")
    refused(iql, argv, "reward_by_return_range", "false")


# ---- checkpoints

WARM = {"run_dir": "warm", "checkpoint": "run"}


@pytest.fixture
def finished(iql) -> Path:
    """The checkpoint of a finished run."""
    assert iql.main(words()) == 0
    return Path("run/checkpoint.pt")


def test_a_checkpoint_of_another_observation_size(script, refused):
    assert script.main(words()) == 0
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(31, 4)).astype(np.float32)
    spaces = {**VECTORS, "observation_space": gym.spaces.Box(-np.inf, np.inf, (4,))}
    episode = toy_episode(rng, 30, True, observations=wide)
    write_dataset(Path("store"), "wide-v0", [episode], **spaces)
    argv = words(dataset_id="store/wide-v0", env_id="none", **WARM)
    refused(script, argv, "checkpoint", "does not fit")


def test_a_checkpoint_of_another_action_size(iql, refused):
    assert iql.main(words()) == 0
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, size=(30, 2)).astype(np.float32)
    spaces = {**VECTORS, "action_space": gym.spaces.Box(-1, 1, (2,))}
    episode = toy_episode(rng, 30, True, actions=actions)
    write_dataset(Path("store"), "arms-v0", [episode], **spaces)
    argv = words(dataset_id="store/arms-v0", env_id="none", **WARM)
    refused(iql, argv, "checkpoint", "does not fit")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def torch_file(content) -> bytes:
    torch.save(content, "made.pt")
    content = Path("made.pt").read_bytes()
    Path("made.pt").unlink()
    return content


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
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_truncated_and_foreign_checkpoints(iql, refused, finished, kind):
    finished.write_bytes(FOREIGN[kind](finished.read_bytes()))
    refused(iql, words(**WARM), "checkpoint.pt", "no whole checkpoint")
    refused(iql, words(**{**WARM, "checkpoint": finished}), "checkpoint.pt")
    refused(iql, ["--checkpoint", "run", "--eval_only", "true"], "checkpoint.pt")
    Path("run/result.json").unlink()  # as if interrupted
    refused(iql, ["--run_dir", "run", "--resume", "true"], "checkpoint.pt")
    assert not Path("executed").exists()


def test_a_dictionary_with_a_checkpoints_names(iql, refused):
    names = ("step", "agent", "optimizers", "config")
    Path("fake.pt").write_bytes(torch_file({name: {} for name in names}))
    refused(iql, words(run_dir="warm", checkpoint="fake.pt"), "checkpoint")
    refused(iql, ["--checkpoint", "fake.pt", "--eval_only", "true"], "checkpoint")


def test_no_checkpoint_there(iql, refused):
    Path("empty").mkdir()
    refused(iql, words(checkpoint="nowhere.pt"), "nowhere.pt", "name")
    refused(iql, words(checkpoint="empty"), "empty", "name")
    refused(iql, ["--eval_only", "true"], "eval_only", "--checkpoint")


@pytest.mark.parametrize("first, second", [("bc", "iql"), ("iql", "bc")])
def test_a_checkpoint_of_another_algorithm(refused, first, second):
    first, second = load_script(first), load_script(second)
    assert first.main(words()) == 0
    refused(second, words(**WARM), "checkpoint run", "another algorithm")
    refused(second, ["--checkpoint", "run", "--eval_only", "true"], "another algorithm")
    refused(second, words(num_updates=9), "run")
    refused(second, words(), "run")
    Path("run/result.json").unlink()
    for argv in (words(resume="true"), ["--run_dir", "run", "--resume", "true"]):
        refused(second, argv)


# ---- run folders


def test_a_run_folder_in_use(script, refused):
    assert script.main(words()) == 0
    refused(script, words(seed=5), "run", "seed", "another run")
    Path("run/result.json").unlink()  # as if interrupted
    refused(script, words(), "run", "in use", "--resume true")
    Path("run/checkpoint.pt").unlink()  # as if interrupted early
    refused(script, words(), "run", "in use", "--resume true")


def test_a_folder_with_other_files(iql, refused):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("mine")
    refused(iql, words(), "run", "other files")
    refused(iql, words(resume="true"), "run", "other files")
    Path("run/thesis.tex").rename("run/config.yaml")
    refused(iql, words(), "run")
    Path("run/config.yaml").rename("run/checkpoint.pt")
    refused(iql, words(), "run", "other files")


def test_resume_needs_a_run_dir(script, refused):
    argv = words(resume="true")
    at = argv.index("--run_dir")
    refused(script, argv[:at] + argv[at + 2 :], "resume", "run_dir")


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


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(script, capsys, monkeypatch):
    assert script.main(words(run_dir="whole")) == 0
    agent_class = next(c for c in vars(script).values() if c in script.Agent.__subclasses__())
    update, kept, limits = agent_class.update, {}, []

    def fill(agent, batch, noise, *variant):
        if Path("run/checkpoint.pt").is_file() and not limits:
            kept.update(contents("run"))
            limits.append(file_limit(4000))
            limits[0].__enter__()
        return update(agent, batch, noise, *variant)

    monkeypatch.setattr(agent_class, "update", fill)
    try:
        assert script.main(words()) == 2
    finally:
        limits[0].__exit__(None, None, None)
    line = error_line(capsys)
    assert os.strerror(errno.EFBIG) in line and "make room" in line
    assert "checkpoint.pt" in line
    after = contents("run")
    assert after.keys() == kept.keys()
    assert after["run/checkpoint.pt"] == kept["run/checkpoint.pt"]
    monkeypatch.setattr(agent_class, "update", update)
    assert script.main(["--run_dir", "run", "--resume", "true"]) == 0
    assert Path("run/episodes.jsonl").read_bytes() == Path("whole/episodes.jsonl").read_bytes()


def test_a_disk_that_is_full_from_the_start(iql, capsys):
    with file_limit(0):
        assert iql.main(words()) == 2
    assert "run" in error_line(capsys)
    assert iql.main(words(resume="true")) == 0  # once there is room again


def test_a_log_that_cannot_be_written(iql, capsys, monkeypatch):
    monkeypatch.setattr(iql.Run, "log", lambda *_: open("/dev/full", "w").write("x" * 99999))
    assert iql.main(words()) == 2
    assert os.strerror(errno.ENOSPC) in error_line(capsys)


def test_places_where_nothing_can_be_written(iql, refused):
    Path("file").write_text("mine")
    refused(iql, words(run_dir="file/run"), "file/run", "make room")
    refused(iql, words(run_dir="file"), "file")
    if Path("/proc/self").is_dir():
        refused(iql, words(run_dir="/proc/run"), "/proc/run", "make room")


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


gym.register("TwoActions-v0", TwoActions, max_episode_steps=20)
gym.register("Buttons-v0", Buttons, max_episode_steps=20)
gym.register("Broken-v0", Broken, max_episode_steps=20)


def test_unknown_environments(iql, refused):
    refused(iql, words(env_id="Nowhere-v7"), "Nowhere", "env_id", "name another")
    refused(iql, words(env_id="nowhere.at.all:Nowhere-v7"), "env_id", "name another")
    refused(iql, words(env_id=""), "env_id")
    refused(iql, words(env_id="Broken-v0"), "Broken-v0", "no licence")
    refused(iql, words(env_kwargs="{colour: blue}"), "env_id", "colour")


@pytest.mark.parametrize("name", ["CartPole-v1", "TwoActions-v0", "Buttons-v0"])
def test_environments_that_do_not_fit(iql, refused, name):
    refused(iql, words(env_id=name), name)


def test_an_environment_that_does_not_fit_a_checkpoint(iql, refused, finished):
    argv = ["--checkpoint", str(finished), "--eval_only", "true", "--env_id"]
    refused(iql, [*argv, "CartPole-v1"], "CartPole-v1")
    refused(iql, [*argv, "none"], "eval_only", "env_id")


def test_a_dataset_without_an_environment(iql, refused):
    write_dataset(Path("store"), "bare-v0", toy_episodes(), **VECTORS)
    refused(iql, words(dataset_id="store/bare-v0"), "env_id", "none")


@pytest.mark.parametrize("name", ["tpu", "", "meta", "cuda:99"])
def test_devices_that_are_not_there(script, refused, name):
    refused(script, words(device=name), "device", "auto")


def test_no_members(script, refused):
    refused(script, words(num_seeds=0), "num_seeds", "between 1 and")
