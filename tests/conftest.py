"""Toy data and the scripts, for all tests. Nothing here needs a network or MuJoCo."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (REPOSITORY / "algorithms").glob("*.py"))
TOY = "toy/pendulum-v0"  # of a store for continuous scripts, and of another for discrete ones
DISCRETE = [name for name in SCRIPTS if name == "dqn" or name.startswith("discrete_")]
# Observation 3, action 1 within [-2, 2] (so that scaling shows), episodes of 20 steps.
TOY_ENV = gym.envs.registration.EnvSpec(
    "Pendulum-v1",
    entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv",
    max_episode_steps=20,
)
# Observation 4, two actions, for scripts of discrete actions.
TOY_DISCRETE_ENV = gym.envs.registration.EnvSpec(
    "CartPole-v1",
    entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv",
    max_episode_steps=20,
)
torch.set_num_threads(1)


def load_script(name: str):
    """A script as a module, loaded once."""
    key = f"algorithms.{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, REPOSITORY / "algorithms" / f"{name}.py")
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def load_tool(place: str):
    """A tool's file, such as "tools/report.py", as a module of its own."""
    path = REPOSITORY / place
    if path.parent.name == "tools" and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as where it is run: tools share tools/store.py
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def toy_episode(rng, steps: int, terminated: bool, **changes) -> EpisodeBuffer:
    """A random episode of Pendulum's sizes; `changes` replace its arrays."""
    ends = np.arange(steps) == steps - 1
    arrays = {
        "observations": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        "actions": rng.uniform(-2, 2, size=(steps, 1)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminations": ends & terminated,
        "truncations": ends & (not terminated),
    }
    return EpisodeBuffer(**{**arrays, **changes})


def toy_episodes(seed: int = 0) -> list[EpisodeBuffer]:
    """Three episodes: one that terminates, one that is truncated, one a single step long."""
    rng = np.random.default_rng(seed)
    return [toy_episode(rng, 30, True), toy_episode(rng, 40, False), toy_episode(rng, 1, True)]


def discrete_episodes(seed: int = 0) -> list[EpisodeBuffer]:
    """The same with CartPole's sizes."""
    rng, changes = np.random.default_rng(seed), []
    for steps in (30, 40, 1):
        obs = rng.normal(size=(steps + 1, 4)).astype(np.float32)
        changes.append({"observations": obs, "actions": rng.integers(2, size=steps)})
    ends = zip((30, 40, 1), (True, False, True), changes, strict=True)
    return [toy_episode(rng, steps, end, **own) for steps, end, own in ends]


def write_dataset(store: Path, dataset_id: str, episodes: list[EpisodeBuffer], **options) -> Path:
    """Write episodes into the Minari store `store`; returns the dataset's `data` folder."""
    old = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(store.resolve())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            defaults = {"env": TOY_ENV, "ref_min_score": -160.0, "ref_max_score": -20.0}
            minari.create_dataset_from_buffers(dataset_id, episodes, **{**defaults, **options})
    finally:
        if old is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = old
    return store / dataset_id / "data"


def plain_agent(script, obs_dim: int, act_dim: int):
    """An agent without networks, for what asks for sizes and units alone."""
    zeros, ones = torch.zeros, torch.ones
    units = (zeros(obs_dim), ones(obs_dim), zeros(act_dim), ones(act_dim), zeros(2))
    return script.Agent(script.TrainConfig(), dict(zip(script.Agent.units, units, strict=True)))


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory) -> Path:
    """A Minari store with the toy dataset in it."""
    store = tmp_path_factory.mktemp("store")
    write_dataset(store, TOY, toy_episodes())
    return store


@pytest.fixture(scope="session")
def discrete_store(tmp_path_factory) -> Path:
    """Another, whose dataset of the same name has discrete actions."""
    store = tmp_path_factory.mktemp("discrete")
    returns = {"ref_min_score": 0.0, "ref_max_score": 20.0}
    write_dataset(store, TOY, discrete_episodes(), env=TOY_DISCRETE_ENV, **returns)
    return store


@pytest.fixture(autouse=True)
def own_store(toy_store, discrete_store, tmp_path, monkeypatch, request):
    """Every test reads the toy store of its script and writes its runs into its own folder."""
    callspec = getattr(request.node, "callspec", None)
    named = {x for x in callspec.params.values() if isinstance(x, str)} if callspec else set()
    store = discrete_store if named & set(DISCRETE) else toy_store
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(store))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    return load_script(request.param)


SHORT = {
    "dataset_id": TOY,
    "download": "false",
    "num_updates": 6,
    "batch_size": 8,
    "hidden_dim": 16,
    "eval_every": 3,
    "eval_episodes": 2,
    "final_eval_episodes": 3,
    "log_every": 2,
    "checkpoint_every": 3,
    "run_dir": "run",
}


def words(**settings) -> list[str]:
    """A command line of a short run on the toy data, with `settings` on top."""
    return [part for k, v in {**SHORT, **settings}.items() for part in (f"--{k}", str(v))]


def contents(folder: Path | str = ".") -> dict[str, bytes]:
    """Every file below a folder, to show that nothing was lost."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def float64():
    """Python numbers in `torch.where` and the like then lose no digits either."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def iql():
    """One script, for what the shared blocks alone decide."""
    return load_script("iql")


@pytest.fixture
def refused(capsys):
    """Run a command line that must end with exit code 2 and one line, and change no file."""

    def run(script, argv: list[str], *names: str) -> str:
        before = contents()
        capsys.readouterr()
        assert script.main(argv) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and len(line.splitlines()) == 1, line
        for name in names:
            assert str(name) in line
        assert contents() == before
        return line

    return run
