"""Data is data: what a dataset or a checkpoint says names things and runs nothing.

And what users of such tools report: each kind of input ends in the right number or in one line.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import (
    TOY,
    load_script,
    load_tool,
    toy_episode,
    toy_episodes,
    words,
    write_dataset,
)
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.envs.registration import EnvSpec
from test_runs import rows, saved

EVIL = "import pathlib\npathlib.Path('ran').write_text('x')\n"
OWN = {"dataset_id": "store/own-v0"}


def vectors(low=-2.0, high=2.0, shape=(1,), dtype=np.float32, obs=None) -> dict:
    """The spaces of a dataset without an environment."""
    space = obs or gym.spaces.Box(-np.inf, np.inf, (3,))
    low, high = (np.full(shape, x, dtype) for x in (low, high))
    return {"env": None, "observation_space": space, "action_space": gym.spaces.Box(low, high)}


def describe(data: Path, **changes) -> None:
    """Change a dataset's metadata; None leaves an entry out."""
    about = {**json.loads((data / "metadata.json").read_text()), **changes}
    about = {key: value for key, value in about.items() if value is not None}
    (data / "metadata.json").write_text(json.dumps(about))


@pytest.fixture
def evil(monkeypatch):
    """A module that leaves a file behind when it is imported."""
    Path("evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield "evil"
    sys.modules.pop("evil", None)
    assert not Path("ran").exists()


# ---- nothing runs


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize("entry", ["os:system", "evil:Env"])
@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
def test_the_entry_point_of_a_dataset_is_not_imported(iql, refused, entry, key):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    kwargs = {"command": "touch ran"} if entry == "os:system" else {}
    spec = EnvSpec("Own-v0", entry_point=entry, kwargs=kwargs).to_json()
    for stored in (spec, spec.replace("Own-v0", "evil:Own-v0")):
        describe(data, **{key: stored})
        refused(iql, words(**OWN), "env_id", "module:Id-v0")
    describe(data, **{key: EnvSpec("Pendulum-v1", entry_point=entry).to_json()})
    assert iql.main(words(**OWN)) == 0  # the one that is registered here


@pytest.mark.usefixtures("evil")
def test_a_wrapper_of_a_dataset_is_one_of_gymnasiums(iql, refused):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    for name, place in (("Env", "evil:Env"), ("RecordVideo", "gymnasium.wrappers:RecordVideo")):
        spec = json.loads(gym.spec("Pendulum-v1").to_json())
        spec["additional_wrappers"] = [{"name": name, "entry_point": place, "kwargs": {}}]
        describe(data, env_spec=json.dumps(spec))
        refused(iql, words(**OWN), name, "wrapper")
    spec["additional_wrappers"] = [{"name": "ClipAction", "entry_point": "evil:X", "kwargs": {}}]
    describe(data, env_spec=json.dumps(spec))
    assert iql.main(words(**OWN)) == 0


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize("key", ["observation_space", "action_space"])
def test_a_set_without_spaces_is_refused_before_minari_builds_its_environment(iql, refused, key):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    describe(data, **{key: None, "env_spec": EnvSpec("Own-v0", entry_point="evil:Env").to_json()})
    refused(iql, words(**OWN), "store/own-v0", "spaces")


@pytest.mark.usefixtures("evil")
def test_a_string_of_code_anywhere_in_the_metadata_does_nothing(iql):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    about = json.loads((data / "metadata.json").read_text())
    for key, value in about.items():
        for code in (
            "__import__('evil')",
            "evil:Env",
            "!!python/object/apply:os.system [touch ran]",
        ):
            if isinstance(value, str):
                describe(data, **{**about, key: code})
                iql.main(words(**OWN, run_dir=f"{key}{len(code)}"))


@pytest.mark.usefixtures("evil")
def test_the_environment_of_a_checkpoint_is_not_imported(iql, capsys):
    assert iql.main(words()) == 0
    content = saved("run")
    content["config"]["env_id"] = "evil:Own-v0"
    torch.save(content, "run/checkpoint.pt")
    assert load_tool("tools/policy.py").main(["evaluate", "run"]) == 2
    assert "--env_id evil:Own-v0" in capsys.readouterr().err
    known = content["about"]["env_id"]  # a name that the user trusts vouches for no other
    assert load_tool("tools/policy.py").main(["evaluate", "run", "--env_id", known]) == 2
    assert "--env_id evil:Own-v0" in capsys.readouterr().err


@pytest.mark.usefixtures("evil")
def test_the_environment_of_a_config_is_not_imported(iql, refused):
    """A file is passed on from hand to hand; the command line is one's own."""
    Path("c.yaml").write_text("env_id: evil:Own-v0\n")
    refused(iql, words(config="c.yaml"), "c.yaml", "--env_id evil:Own-v0")
    assert iql.main(words(config="c.yaml", env_id="auto")) == 0


def test_a_resumed_run_asks_again_for_the_word(iql, refused, monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    place = "gymnasium.envs.classic_control:PendulumEnv"
    text = f"import gymnasium\ngymnasium.register('Own-v0', '{place}', max_episode_steps=5)\n"
    Path("own_env.py").write_text(text)
    assert iql.main(words(env_id="own_env:Own-v0")) == 0
    resume = ["--run_dir", "run", "--resume", "true"]
    refused(iql, resume, "--env_id own_env:Own-v0")
    assert iql.main([*resume, "--env_id", "own_env:Own-v0"]) == 0
    gym.registry.pop("Own-v0")


def test_big_endian_arrays(iql):
    episodes = toy_episodes()
    data = write_dataset(Path("store"), "own-v0", episodes)
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        for name in ("rewards", "observations", "actions"):
            values = file[f"episode_0/{name}"][:]
            del file[f"episode_0/{name}"]
            file[f"episode_0/{name}"] = values.astype(values.dtype.newbyteorder(">"))
    assert iql.main(words(**OWN)) == 0
    assert iql.main(words(run_dir="toy")) == 0
    fingerprints = [saved(name)["about"]["fingerprint"] for name in ("run", "toy")]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("name", ["bc", "dt"])
@pytest.mark.parametrize("limit, score", [(9, 100), (5, 0)])
def test_success_is_the_score_where_there_are_no_references(name, limit, score):
    """Of an episode's last step; a set with reference returns keeps its scores."""
    script = load_script(name)
    more = {"env_id": "TrustSuccess-v0", "env_kwargs": f"{{max_episode_steps: {limit}}}"}
    assert script.main(words(**more)) == 0
    assert {row["score"] for row in rows("run/episodes.jsonl")} == {score}
    known = {"ref_min_score": -1e4, "ref_max_score": 1e4, "run_dir": "known"}
    assert script.main(words(**more, **known)) == 0
    assert {row["score"] for row in rows("known/episodes.jsonl")}.isdisjoint({0, 100})


@pytest.mark.parametrize("name", ["bc", "dt"])
def test_an_environment_that_tells_of_its_successes_only(name, monkeypatch, capsys):
    """The other episodes were none; the tool that plays a saved policy says the same."""
    script, count, played = load_script(name), itertools.count(), Success.step

    def step(self, action):
        obs, reward, *ends, info = played(self, action)
        return obs, reward, *ends, info if info["success"] and next(count) % 3 == 0 else {}

    monkeypatch.setattr(Success, "step", step)
    more = {"env_id": "TrustSuccess-v0", "num_updates": 1, "eval_every": 9}
    assert script.main(words(**more, eval_episodes=3, final_eval_episodes=6)) == 0
    assert [row["score"] for row in rows("run/episodes.jsonl")][-6:] == [100, 0, 0] * 2
    tool = ["evaluate", "run", "--env_id", "TrustSuccess-v0"]
    assert load_tool("tools/policy.py").main(tool) == 0
    assert "score 33.33" in capsys.readouterr().out
    monkeypatch.setattr(Success, "step", lambda *_: (*played(*_)[:4], {"success": "yes"}))
    assert load_tool("tools/policy.py").main(tool) == 2
    assert "the evaluation fails" in capsys.readouterr().err


def test_aliases_that_explode(iql, refused):
    """In a file and on the command line, within a moment."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for i, name in enumerate("bcdefghijkl"):
        before = "abcdefghijk"[i]
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    Path("bomb.yaml").write_text(f"{bomb}gamma: *l\n")
    refused(iql, words(config="bomb.yaml"), "bomb.yaml", "aliases")
    refused(iql, words(env_kwargs="{a: &a [1], b: *a}"), "env_kwargs")
    refused(iql, words(config_path="bomb.yaml"), "config_path", "--config FILE")


# ---- the user's own environment


class Endless(PendulumEnv):
    """No time limit."""


class Window(PendulumEnv):
    def __init__(self, render_mode=None, **_):
        assert render_mode is None, "there is no display"
        super().__init__()


class Column(PendulumEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


class Mixed(PendulumEnv):
    """Observations of several kinds, of which the first element of each is the time."""

    def __init__(self):
        super().__init__()
        parts = {"pos": self.observation_space, "mode": gym.spaces.Discrete(3, start=1)}
        parts["flags"] = gym.spaces.Tuple([gym.spaces.MultiBinary(2), gym.spaces.Box(0, 1, ())])
        self.observation_space = gym.spaces.Dict(parts)

    def _get_obs(self):
        return {"pos": super()._get_obs(), "mode": 2, "flags": (np.int8([1, 0]), np.float32(0.5))}


class Success(PendulumEnv):
    """Says at every step whether it is a success; the sixth is."""

    def reset(self, **kwargs):
        self.count = 0
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *_ = super().step(action)
        self.count += 1
        return obs, reward, self.count == 6, False, {"success": np.bool_(self.count == 6)}


for kind in (Endless, Window, Column, Mixed, Success):
    gym.register(f"Trust{kind.__name__}-v0", kind, max_episode_steps=None)


def test_an_environment_of_a_module(iql, monkeypatch):
    text = "import gymnasium as gym\ngym.register('Mine-v0', 'gymnasium.envs.classic_control."
    Path("mine.py").write_text(text + "pendulum:PendulumEnv', max_episode_steps=9)\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert iql.main(words(env_id="mine:Mine-v0")) == 0
    assert {row["length"] for row in rows("run/episodes.jsonl")} == {9}


def test_what_has_no_time_limit_gets_the_datas_longest(iql, capsys):
    assert iql.main(words(env_id="TrustEndless-v0")) == 0
    assert {row["length"] for row in rows("run/episodes.jsonl")} == {40}
    assert "no time limit" in capsys.readouterr().out


def test_evaluation_never_renders(iql):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    spec = EnvSpec("TrustWindow-v0", kwargs={"render_mode": "human"}, max_episode_steps=5)
    describe(data, env_spec=spec.to_json())
    assert iql.main(words(**OWN)) == 0


def test_a_reward_of_one_element_counts(iql):
    assert iql.main(words(env_id="TrustColumn-v0")) == 0


@pytest.mark.parametrize("name", ["NormalizeReward", "NormalizeObservation"])
def test_statistics_that_run_on_are_refused(iql, refused, name):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    env = getattr(gym.wrappers, name)(gym.make("Pendulum-v1"))
    describe(data, env_spec=env.spec.to_json())
    refused(iql, words(**OWN), name)
    gym.register("TrustOwn-v0", lambda: getattr(gym.wrappers, name)(PendulumEnv()))
    refused(iql, words(env_id="TrustOwn-v0"), name)


def test_few_environments_at_once_play_the_same(iql):
    for count in (1, 3, 64):
        assert iql.main(words(num_seeds=2, max_envs=count, run_dir=count)) == 0
    one, three, all_ = ([r["return"] for r in rows(f"{n}/episodes.jsonl")] for n in (1, 3, 64))
    assert one == pytest.approx(all_, rel=1e-4) and three == pytest.approx(all_, rel=1e-4)


# ---- observations and actions of users


def test_observations_of_several_kinds(iql):
    rng, steps = np.random.default_rng(0), 9
    obs = {"pos": rng.normal(size=(steps + 1, 3)).astype(np.float32)}
    obs["mode"] = np.full(steps + 1, 2)
    flags = np.tile(np.int8([1, 0]), (steps + 1, 1)), np.full(steps + 1, 0.5, np.float32)
    episode = toy_episode(rng, steps, True, observations={**obs, "flags": flags})
    spaces = {"observation_space": Mixed().observation_space}
    spaces["action_space"] = gym.spaces.Box(-2, 2, (1,))
    write_dataset(Path("store"), "own-v0", [episode], env=None, **spaces)
    data = iql.load_dataset(iql.TrainConfig(dataset_id="store/own-v0"))[0][0]["obs"]
    expected = np.concatenate([np.tile([1, 0, 0.5, 0, 1, 0], (steps + 1, 1)), obs["pos"]], 1)
    np.testing.assert_allclose(data, expected)
    assert iql.main(words(**OWN, env_id="TrustMixed-v0")) == 0


def test_a_number_that_is_none_of_a_discrete_space(iql):
    space = gym.spaces.Discrete(3, start=1)
    assert iql.flatten_obs(space, np.array([1, 3])).tolist() == [[1, 0, 0], [0, 0, 1]]
    for wrong in (0, 4, -1):
        with pytest.raises(iql.RunError, match="Discrete"):
            iql.flatten_obs(space, np.array([2, wrong]))


def test_stacked_vectors_are_flattened(iql):
    rng = np.random.default_rng(0)
    episode = toy_episode(rng, 9, True, observations=rng.normal(size=(10, 4, 3)))
    space = gym.spaces.Box(-np.inf, np.inf, (4, 3), np.float64)
    write_dataset(Path("store"), "own-v0", [episode], **vectors(obs=space))
    assert iql.main(words(**OWN, env_id="none")) == 0
    assert saved("run")["agent"]["obs_mean"].shape == (12,)


def test_columns_are_read_as_rows(iql):
    plain, names = toy_episodes(), ("rewards", "terminations", "truncations")
    columns = [
        dataclasses.replace(each, **{name: getattr(each, name)[:, None] for name in names})
        for each in plain
    ]
    write_dataset(Path("store"), "own-v0", columns)
    found = iql.load_dataset(iql.TrainConfig(dataset_id="store/own-v0"))[0]
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours["reward"], theirs.rewards)


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 1)])
def test_actions_of_any_shape(iql, shape):
    rng = np.random.default_rng(0)
    episode = toy_episode(rng, 9, True, actions=rng.uniform(-2, 2, (9, *shape)).astype("f4"))
    write_dataset(Path("store"), "own-v0", [episode], **vectors(shape=shape))
    assert iql.main(words(**OWN, env_id="none")) == 0
    assert saved("run")["agent"]["action_center"].shape == (max(1, int(np.prod(shape))),)


def test_float64_actions_at_a_large_bound(iql):
    high = 1_000_000.3
    actions = np.full((9, 1), high)
    episode = toy_episode(np.random.default_rng(0), 9, True, actions=actions)
    write_dataset(Path("store"), "own-v0", [episode], **vectors(0, high, dtype=np.float64))
    assert iql.main(words(**OWN, env_id="none")) == 0


def test_bounds_that_are_infinite_are_taken_from_the_data_when_asked(iql, refused):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-3, 5, (50, 1)).astype(np.float32)
    episode = toy_episode(rng, 50, True, actions=actions)
    write_dataset(Path("store"), "own-v0", [episode], **vectors(-np.inf, np.inf))
    refused(iql, words(**OWN, env_id="none"), "--action_bounds data", "bounds")
    assert iql.main(words(**OWN, env_id="none", action_bounds="data")) == 0
    agent = saved("run")["agent"]
    low = float(agent["action_center"] - agent["action_half_range"])
    assert low == pytest.approx(float(actions.min()), rel=1e-5)


def test_a_constant_action_stays_what_it_is(iql):
    low, high = np.float32([-1, 0.3]), np.float32([1, 0.3])
    actions = np.random.default_rng(0).uniform(low, high, (9, 2)).astype("f4")
    episode = toy_episode(np.random.default_rng(0), 9, True, actions=actions)
    spaces = {**vectors(), "action_space": gym.spaces.Box(low, high)}
    write_dataset(Path("store"), "own-v0", [episode], **spaces)
    assert iql.main(words(**OWN, env_id="none")) == 0
    agent = load_tool("tools/policy.py").restore(iql, saved("run"))
    assert (agent.act(torch.randn(1, 5, 3))[..., 1] == np.float32(0.3)).all()


class Steps(PendulumEnv):
    """Takes whole numbers from 0 to 4 and keeps what it got."""

    seen: ClassVar = []

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(0, 4, (1,), np.int64)

    def step(self, action):
        assert action.dtype == np.int64 and action.shape == (1,)
        self.seen.append(int(action[0]))
        return super().step(action - 2.0)


def test_integers_are_rounded_on_the_way_out(iql):
    gym.register("TrustSteps-v0", Steps, max_episode_steps=9, disable_env_checker=True)
    env, found = gym.make("TrustSteps-v0"), []
    env.reset(seed=0)
    for value in (0.6, 1.4, 3.99, 17.0, -3.0):
        iql.env_step(env, np.float32([value]))
        found.append(Steps.seen[-1])
    assert found == [1, 1, 4, 4, 0]


def test_other_bounds_than_the_environments_are_told(iql, capsys):
    actions = np.full((9, 1), 0.9, np.float32)
    episode = toy_episode(np.random.default_rng(0), 9, True, actions=actions)
    write_dataset(Path("store"), "own-v0", [episode], **vectors(-1, 1))
    assert iql.main(words(**OWN, env_id="Pendulum-v1")) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "WARNING: actions" in line]
    assert len(told) == 1 and "[-1.]" in told[0] and "[-2.]" in told[0]


def test_rewards_that_are_too_large(iql, refused):
    episode = toy_episode(np.random.default_rng(0), 5, True, rewards=np.full(5, 1e20))
    write_dataset(Path("store"), "own-v0", [episode])
    refused(iql, words(**OWN), "reward_scale", "1e+20")


def test_equal_references_give_no_score(iql, capsys):
    assert iql.main(words(ref_min_score=3, ref_max_score=3)) == 0
    assert {row["score"] for row in rows("run/episodes.jsonl")} == {None}
    assert capsys.readouterr().out.count("WARNING: ref_min_score") == 1


@pytest.mark.parametrize("name", ["bc", "iql", "dt"])
def test_a_last_observation_that_nobody_knows(name):
    """Steps without it are used by what needs no next observation, and by nothing else."""
    script, episodes = load_script(name), toy_episodes()
    episodes[1].observations[-1] = np.nan
    write_dataset(Path("store"), "own-v0", episodes)
    kept, build = [], script.batches
    try:
        script.batches = lambda agent, table, *rest: (
            kept.append(table) or build(agent, table, *rest)
        )
        assert script.main(words(**OWN)) == 0
    finally:
        script.batches = build
    assert len(kept[0]["obs"]) == (70 if name == "iql" else 71)
    assert all(values.isfinite().all() for values in kept[0].values())


# ---- the doctor says the same


@pytest.mark.usefixtures("evil")
def test_the_doctor_runs_nothing(capsys):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    describe(data, env_spec=EnvSpec("Own-v0", entry_point="evil:Env").to_json())
    assert load_tool("datasets/doctor.py").main(["store/own-v0", "--out", "pictures"]) == 1
    describe(data, observation_space=None)
    assert load_tool("datasets/doctor.py").main(["store/own-v0", "--out", "pictures"]) == 2
    assert TOY not in capsys.readouterr().err
