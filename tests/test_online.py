"""The online phase: resume, going on from a checkpoint, buffers, sampling, failures, metrics."""

import dataclasses
import itertools
import json
import math
import os
import signal
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS,
    TOY,
    contents,
    load_script,
    toy_episodes,
    words,
    write_dataset,
)
from test_runs import (
    Crash,
    agent_of,
    assert_same_run,
    before_update,
    crash_at,
    failing_evaluation,
    leaves,
    rows,
    saved,
)

ONLINE = [name for name in SCRIPTS if hasattr(load_script(name), "Online")]
WHOLE_EPISODES = ["cal_ql", "rebrac"]
SEEDS = (5, 6)
# Of the environment steps 18 lies amid a log interval, a chunk of 32 updates and an episode.
SETTINGS = {
    "env_id": "OnlineToy-v0",
    "ref_min_score": -8,
    "ref_max_score": 0,
    "num_updates": 10,
    "online_steps": 40,
    "updates_per_step": 2,
    "log_every": 7,
    "eval_every": 13,
    "checkpoint_every": 6,
    "num_seeds": 2,
    "seed": 5,
    "normalize_obs": "true",
    "reward_scale": 0.5,
    "reward_shift": 0.1,
    "reward_by_return_range": "true",
}
# Set where a script has the field. A cosine over all updates is no offline run's.
MORE = {
    "cosine_actor_lr": "false",
    "actor_dropout": 0.3,
    "exploration_noise": 0.3,
    "num_actions": 2,
    "lagrange": "false",
}
# A step as the file online.bin has it: one for each member, step after step.
RECORD = np.dtype(
    [
        ("obs", "<f4", 3),
        ("action", "<f4", 1),
        ("reward", "<f8"),
        ("next_obs", "<f4", 3),
        ("terminated", "?"),
        ("truncated", "?"),
    ]
)


class Toy(gym.Env):
    """A point that drifts outwards: short episodes, some terminate, some reach their 9 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    @staticmethod
    def fault(env, what, value):  # noqa: ARG004
        """Tests put in its place what goes wrong; `value` is what reset or step would return."""
        return value

    def obs(self):
        return np.array([self.x, self.x**2, self.count / 9], np.float32)

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        self.seed, self.count, self.x = seed, 0, self.np_random.uniform(-1.4, 1.4)
        return self.fault(self, "reset", (self.obs(), {}))

    def step(self, action):
        self.x, self.count = 1.1 * self.x + 0.3 * float(action[0]), self.count + 1
        ended = abs(self.x) > 1.6
        return self.fault(self, "step", (self.obs(), -abs(self.x), ended, False, {}))


gym.register("OnlineToy-v0", Toy, max_episode_steps=9, disable_env_checker=True)


def line(script, **settings) -> list[str]:
    """The command line of a run with an online phase."""
    own = {k: v for k, v in MORE.items() if k in script.TrainConfig.__dataclass_fields__}
    return words(**{**SETTINGS, **own, **settings})


@pytest.fixture(params=ONLINE)
def script(request):
    """Each script that has an online phase."""
    return load_script(request.param)


@pytest.fixture
def made(monkeypatch):
    """Train and return the finished `Run`."""

    def make(script, *argv, **settings):
        kept, finish = [], script.Run.finish
        with monkeypatch.context() as patch:
            patch.setattr(script.Run, "finish", lambda run: kept.append(run) or finish(run))
            assert script.main([*line(script, **settings), *argv]) == 0
        return kept[0]

    return make


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict:
    return {"": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def whole_of(whole_runs):
    """The folder of a script's uninterrupted run, made once."""

    def make(script) -> Path:
        folder = whole_runs[""] / script.__name__
        if script not in whole_runs:
            assert script.main(line(script, run_dir=folder)) == 0
            whole_runs[script] = contents(folder)
        assert contents(folder) == whole_runs[script]
        return folder

    return make


@pytest.fixture
def whole(script, whole_of) -> Path:
    return whole_of(script)


def stored(folder, members: int = 2) -> np.ndarray:
    """The steps of online.bin [steps, members]."""
    return np.fromfile(Path(folder, "online.bin"), RECORD).reshape(-1, members)


def result_of(folder) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def assert_same(one, other) -> None:
    assert_same_run(one, other)
    assert Path(one, "online.bin").read_bytes() == Path(other, "online.bin").read_bytes()


def episode_seed(seed: int, number: int) -> int:
    words_ = np.random.SeedSequence([seed, zlib.crc32(b"episode"), number]).generate_state(1)
    return int(words_[0])


def split(steps: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """One member's episodes, and the one that has not ended."""
    *ended, running = np.split(steps, np.flatnonzero(steps["terminated"] | steps["truncated"]) + 1)
    return ended, running


RESUME = ["--run_dir", "run", "--resume", "true"]

# ---- resume


@pytest.mark.parametrize(
    "number, steps",
    [(11, 0), (56, 18)],  # the first step's updates; between the two updates of step 23
)
def test_resume_after_a_crash(script, whole, monkeypatch, number, steps):
    crash_at(monkeypatch, script, line(script), number)
    assert (saved("run")["step"], saved("run")["online_steps"]) == (10 + 2 * steps, steps)
    for name in ("metrics.jsonl", "episodes.jsonl"):  # cut off while they were written
        with open(Path("run", name), "a") as file:
            file.write('{"update": 18, "seed": 5, "ret')
    with open("run/online.bin", "ab") as file:
        file.write(bytes(RECORD.itemsize * 3 + 5))
    assert script.main(RESUME) == 0
    assert_same("run", whole)


def test_where_these_crashes_lie(whole):
    """The checkpoint at step 18 lies amid everything, and its last log row before it."""
    steps = stored(whole)[:18]
    assert any(len(split(steps[:, member])[1]) for member in range(2))
    assert len(stored(whole)) == 40
    assert stored(whole)["truncated"].any() and stored(whole)["terminated"].any()
    assert (10 + 2 * 18) % 32 and 18 % 7


def test_resume_after_a_crash_offline(script, whole, monkeypatch):
    crash_at(monkeypatch, script, line(script), 9)
    assert (saved("run")["step"], saved("run")["online_steps"]) == (6, 0)
    assert script.main(line(script, resume="true")) == 0
    assert_same("run", whole)


@pytest.mark.parametrize("at, stops", [(3, 3), (10, 10), (55, 56), (90, 90)])
def test_resume_after_a_signal(whole_of, monkeypatch, capsys, at, stops):
    script = load_script("rebrac")

    def action(_, n):
        if n == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_update(patch, script, action)
        assert script.main(line(script)) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"update {stops}," in last and last.endswith("--run_dir run --resume true")
    assert saved("run")["step"] == stops and not Path("run/result.json").exists()
    assert script.main(RESUME) == 0
    assert_same("run", whole_of(script))


def test_interrupted_twice(whole_of, monkeypatch):
    """A resume writes to the same file where the first run stopped."""
    script = load_script("cal_ql")
    crash_at(monkeypatch, script, line(script), 56)
    crash_at(monkeypatch, script, RESUME, 40)
    assert saved("run")["online_steps"] == 36
    crash_at(monkeypatch, script, RESUME, 3)
    assert script.main(RESUME) == 0
    assert_same("run", whole_of(script))


def test_a_crash_in_the_final_evaluation(iql, whole_of, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(iql.Run, "finish", lambda _: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            iql.main(line(iql))
    assert saved("run")["online_steps"] == 40
    assert iql.main(RESUME) == 0
    assert_same("run", whole_of(iql))


@pytest.mark.parametrize("number, at", [(1, 10), (2, 36)])
def test_an_evaluation_that_failed_is_made_up_for(script, whole, monkeypatch, number, at):
    """At the switch and behind it."""
    with monkeypatch.context() as patch:
        failing_evaluation(patch, script, number)
        assert script.main(line(script)) == 1
    assert saved("run")["step"] == at
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


# ---- going on from a checkpoint of an offline run


OFFLINE = {"online_steps": 0, "updates_per_step": 1, "run_dir": "offline"}
FORK = ["--checkpoint", "offline", "--online_steps", "40", "--updates_per_step", "2"]


def assert_goes_on(whole, fork="run", step: int = 10) -> None:
    """The fork is the whole run from update `step` on."""
    for name in ("metrics.jsonl", "episodes.jsonl"):
        expected = [
            row
            for row in rows(whole / name)
            if row["update"] > step or (row["update"] == step and "final" in row)
        ]
        assert rows(Path(fork, name)) == expected, name
    first, second = dict(leaves(saved(whole))), dict(leaves(saved(fork)))
    assert first.keys() == second.keys()
    for path in first.keys() - {("seconds",), ("config", "checkpoint_every")}:
        same = torch.equal if isinstance(first[path], torch.Tensor) else lambda a, b: a == b
        assert same(first[path], second[path]), path
    assert Path(fork, "online.bin").read_bytes() == (whole / "online.bin").read_bytes()
    ours, theirs = result_of(fork), result_of(whole)
    assert ours["online"] == theirs["online"]
    for a, b in zip(ours["last"], theirs["last"], strict=True):
        assert a["eval/return"] == b["eval/return"]


def test_going_on_equals_the_whole_run(script, whole):
    assert script.main(line(script, **OFFLINE)) == 0
    before = contents("offline")
    assert script.main([*FORK, "--run_dir", "run"]) == 0
    assert contents("offline") == before
    assert_goes_on(whole)
    assert Path("run/config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()
    assert json.loads(Path("run/environment.json").read_bytes())["checkpoint"] == "offline"


def test_going_on_from_amid_the_offline_updates(iql, whole_of, monkeypatch):
    crash_at(monkeypatch, iql, line(iql, **OFFLINE), 9)
    assert iql.main([*FORK, "--run_dir", "run"]) == 0
    assert_goes_on(whole_of(iql), step=6)


@pytest.mark.parametrize("name", ["iql", "rebrac"])
def test_going_on_is_resumed_before_a_first_checkpoint(name, whole_of, monkeypatch):
    script = load_script(name)
    assert script.main(line(script, **OFFLINE)) == 0
    fork = [*FORK, "--run_dir", "run", "--checkpoint_every", "1000"]
    crash_at(monkeypatch, script, fork, 8)
    assert script.main(RESUME if name == "iql" else [*fork, "--resume", "true"]) == 0
    assert_goes_on(whole_of(script))


def test_a_crash_in_the_evaluation_at_the_switch(iql, whole_of, monkeypatch):
    """The folder of the fork must not begin from nothing on a resume."""
    assert iql.main(line(iql, **OFFLINE)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(iql, "evaluate", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            iql.main([*FORK, "--run_dir", "run"])
    before_update(monkeypatch, iql, lambda agent, n: n == 1 and seen.append(optimizer_step(agent)))
    seen = []
    assert iql.main(RESUME) == 0
    assert seen == [10]
    assert_goes_on(whole_of(iql))


def optimizer_step(agent) -> int:
    return int(next(iter(agent.critic_optimizer.state.values()))["step"])


def test_going_on_is_refused(iql, refused):
    assert iql.main(line(iql, **OFFLINE)) == 0
    refused(iql, [*FORK, "--run_dir", "run", "--env_id", "none"], "online_steps", "env_id")
    refused(iql, [*FORK, "--run_dir", "run", "--num_updates", "9"], "checkpoint", "10", "9")
    refused(iql, [*FORK, "--run_dir", "run", "--hidden_dim", "8"], "hidden_dim", "16")
    refused(iql, [*FORK, "--run_dir", "offline"], "offline", "another run")
    write_dataset(Path("store"), "other-v0", toy_episodes(seed=1))
    other = [*FORK, "--run_dir", "run", "--dataset_id", "store/other-v0"]
    refused(iql, other, "checkpoint", "store/other-v0")
    refused(iql, [*FORK, "--run_dir", "run", "--online_share", "1.5"], "online_share")


def test_an_online_run_is_not_gone_on_with(iql, refused, whole_of):
    argv = ["--checkpoint", str(whole_of(iql)), "--online_steps", "50", "--run_dir", "run"]
    refused(iql, argv, "checkpoint", "90", "num_updates")


def test_nothing_to_play(iql, refused):
    refused(iql, line(iql, env_id="none"), "online_steps", "env_id")


@pytest.mark.parametrize("keep", [0, 5 * 2 * RECORD.itemsize, None])
def test_a_file_of_steps_that_is_too_short(iql, refused, monkeypatch, keep):
    crash_at(monkeypatch, iql, line(iql), 56)
    if keep is None:
        Path("run/online.bin").unlink()
    else:
        os.truncate("run/online.bin", keep)
    refused(iql, RESUME, "run/online.bin")


# ---- what is learned from


def replay(steps: np.ndarray, seed: int) -> None:
    """The recorded actions in fresh environments give the recorded steps."""
    env = gym.make("OnlineToy-v0")
    ended, running = split(steps)
    for number, episode in enumerate([*ended, *([running] if len(running) else [])]):
        obs, _ = env.reset(seed=episode_seed(seed, number))
        for step in episode:
            assert np.array_equal(step["obs"], obs)
            obs, reward, terminated, truncated, _ = env.step(step["action"])
            assert np.array_equal(step["next_obs"], obs) and step["reward"] == reward
            assert (step["terminated"], step["truncated"]) == (terminated, truncated)


def test_the_file_holds_what_the_environments_did(whole):
    for member, seed in enumerate(SEEDS):
        replay(stored(whole)[:, member], seed)
    assert not np.array_equal(stored(whole)[:, 0], stored(whole)[:, 1])


def by_hand(script, steps: np.ndarray, **settings) -> dict:
    """The rows of a member's steps, from the formulas: what the table must hold."""
    episodes, name = toy_episodes(), script.__name__.split(".")[-1]
    obs = np.concatenate([np.float64(e.observations[:-1]) for e in episodes])
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    returns = [np.float64(e.rewards).sum() for e in episodes]
    scale = 0.5 * 1000 / (max(returns) - min(returns))
    ended, running = split(steps)
    if name not in WHOLE_EPISODES and len(running):
        ended = [*ended, running]
    columns = {}
    for episode in ended:
        action, reward = np.float64(episode["action"]) / 2, scale * episode["reward"] + 0.1
        own = {
            "obs": (episode["obs"] - mean) / std,
            "next_obs": (episode["next_obs"] - mean) / std,
            "action": action,
            "reward": reward,
            "terminated": np.float64(episode["terminated"]),
        }
        count = len(episode)
        if name == "rebrac":
            own["next_action"] = np.concatenate([action[1:], np.zeros((1, 1))])
            count -= not episode["terminated"][-1]
        if name == "cal_ql":
            mc = np.zeros(count)
            after = 0.0
            if settings.get("infinite_horizon") and not episode["terminated"][-1]:
                after = reward[-1] / (1 - 0.99)
            for i in reversed(range(count)):
                after = mc[i] = reward[i] + 0.99 * after
            own["mc_return"] = mc
        for key, values in own.items():
            columns.setdefault(key, []).append(values[:count])
    return {key: np.concatenate(each) for key, each in columns.items()}


def assert_table(run, script, **settings) -> None:
    """The rows after the data: each member's own, in its own place, and no others."""
    offline, room = run.online.offline, run.cfg.online_steps
    assert len(run.data["obs"]) == offline + run.cfg.num_seeds * room
    steps = stored(run.folder, run.cfg.num_seeds)
    for member in range(run.cfg.num_seeds):
        expected = by_hand(script, steps[:, member], **settings)
        assert expected.keys() == run.data.keys()
        count, begin = len(expected["obs"]), offline + member * room
        assert int(run.online.filled[member]) == count
        assert int(run.online.first[member]) == begin
        ended, at = split(steps[:, member])[0], 0
        for episode, found in zip(ended, run.online.episodes[member], strict=True):
            at += len(episode)
            assert found == (at, episode["reward"].sum(), len(episode))
        for name, values in run.data.items():
            found = values[begin : begin + room].numpy()
            assert np.allclose(found[:count], expected[name], rtol=1e-4, atol=1e-4), name
            assert not found[count:].any(), name


def test_the_table_by_hand(script, made):
    run = made(script)
    assert run.online.offline == (70 if script.__name__.endswith("rebrac") else 71)
    assert_table(run, script)
    offline = made(script, run_dir="offline", online_steps=0, num_updates=1).data
    for name, values in run.data.items():  # the data's own rows are as without the phase
        assert torch.equal(values[: run.online.offline], offline[name])


def test_the_table_after_a_resume(script, made, monkeypatch):
    crash_at(monkeypatch, script, line(script), 56)
    assert_table(made(script, "--resume", "true"), script)


def test_returns_of_episodes_that_were_cut_off(made):
    script = load_script("cal_ql")
    assert_table(made(script, infinite_horizon="true"), script, infinite_horizon=True)


def test_a_reward_of_success_is_a_termination_online_too(iql, made):
    run = made(iql, success_reward=-0.5, reward_by_return_range="false")
    own = stored("run")[:, 0]
    found = run.data["terminated"][run.online.offline :][:40].numpy().astype(bool)
    expected = own["terminated"] | (np.float32(own["reward"]) >= -0.5)
    assert (found == expected).all() and found.sum() > own["terminated"].sum()


# ---- sampling


def drawn_rows(script, monkeypatch, made, **settings) -> tuple:
    """A finished run, and (filled [S], rows [S, B]) of each of its online updates."""
    seen, draw = [], script.Online.rows

    def rows_(self, step):
        found = draw(self, step)
        seen.append((self.filled.flatten().clone(), found.clone()))
        return found

    monkeypatch.setattr(script.Online, "rows", rows_)
    return made(script, **settings), seen


@pytest.mark.parametrize(
    "name, share, of_batch",
    [
        ("iql", 0.5, 4),
        ("rebrac", 0.3, 2),
        ("iql", 0, 0),
        ("cal_ql", 1, 8),
        ("iql", None, None),
        ("rebrac", None, None),
    ],
)
def test_shares_of_a_batch(name, share, of_batch, monkeypatch, made):
    script, word = load_script(name), "null" if share is None else share
    settings = {"online_share": word, "num_seeds": 3, "online_steps": 20}
    run, seen = drawn_rows(script, monkeypatch, made, **settings)
    assert len(seen) == 40
    offline = run.online.offline
    for filled, rows_ in seen:
        assert rows_.shape == (3, 8)
        for member in range(3):
            begin = offline + 20 * member
            new = rows_[member][rows_[member] >= offline]
            assert ((begin <= new) & (new < begin + filled[member])).all()
            assert (rows_[member] >= 0).all()
            if share is not None:
                assert len(new) == (of_batch if filled[member] else 0)
        assert not torch.equal(rows_[0], rows_[1])
    if name in WHOLE_EPISODES:
        assert (seen[0][0] == 0).all() and (seen[-1][0] > 0).all()
    else:
        assert [int(filled[0]) for filled, _ in seen] == [i // 2 + 1 for i in range(40)]


@pytest.mark.parametrize("share", [None, 0.5])
def test_rows_are_uniform(iql, made, share):
    run = made(iql, online_share="null" if share is None else share)
    online, offline = run.online, run.online.offline
    online.filled = torch.tensor([[29], [40]])
    many = torch.cat([online.rows(step) for step in range(6400)], -1)
    for member, filled in enumerate((29, 40)):
        begin = offline + 40 * member
        valid = [*range(offline), *range(begin, begin + filled)]
        counts = torch.bincount(many[member], minlength=len(run.data["obs"]))
        assert int(counts[valid].sum()) == 6400 * 8
        parts = [valid] if share is None else [valid[:offline], valid[offline:]]
        for part in parts:
            own = counts[part].double()
            if share is not None:
                assert int(own.sum()) == 6400 * 4
            chi = float(((own - own.mean()).square() / own.mean()).sum())
            assert abs(chi - (len(part) - 1)) < 4 * math.sqrt(2 * (len(part) - 1))


def test_alone_or_together(script, made):
    """A member's steps, losses and weights are those of the solo run of its seed."""
    together = made(script, run_dir="together", num_seeds=3)
    for k in (2,):
        alone = made(script, run_dir=f"alone{k}", num_seeds=1, seed=5 + k)
        ours, theirs = stored("together", 3)[:, k], stored(f"alone{k}", 1)[:, 0]
        for name in RECORD.names:
            assert np.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-3), name
        state = together.agent.state_dict()
        for name, own in alone.agent.state_dict().items():
            found = state[name]
            if found.shape != own.shape:
                found = found.unflatten(0, (3, -1))[k]
            assert torch.allclose(found, own, rtol=1e-2, atol=1e-3), name
        mine = [row for row in rows("together/metrics.jsonl") if row["seed"] == 5 + k]
        for a, b in zip(mine, rows(f"alone{k}/metrics.jsonl"), strict=True):
            assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


# ---- environments that fail, or do not repeat


def raises(_):
    raise RuntimeError("the simulator\nis gone")


def nan_reward(value):
    return value[0], math.nan, *value[2:]


def infinite_reward(value):
    return value[0], math.inf, *value[2:]


def nan_obs(value):
    return np.array([0, math.nan, 0], np.float32), *value[1:]


FAULTS = [
    ("step", raises),
    ("step", nan_reward),
    ("step", infinite_reward),
    ("step", nan_obs),
    ("reset", raises),
    ("reset", nan_obs),
]


@pytest.mark.parametrize(
    "name, kind, spoil",
    [*(("iql", *fault) for fault in FAULTS), ("rebrac", *FAULTS[1]), ("rebrac", *FAULTS[4])],
)
def test_an_environment_that_fails(name, whole_of, monkeypatch, capsys, kind, spoil):
    """Seed 6's fails in its third episode, after seed 5's has made the same step."""
    script = load_script(name)
    whole, ended = whole_of(script), split(stored(whole_of(script))[:, 1])[0]
    begin, at = sum(map(len, ended[:2])), 0 if kind == "reset" else 1
    assert len(ended[2]) > at

    def fault(env, what, value):
        here = env.seed == episode_seed(6, 2) and (what, env.count) == (kind, at)
        return spoil(value) if here else value

    failing = line(script, checkpoint_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "fault", staticmethod(fault))
        for argv in (failing, RESUME):  # not mended: the same again
            capsys.readouterr()
            assert script.main(argv) == 1
            err = capsys.readouterr().err.strip().splitlines()
            assert err[-1].startswith("error: ") and "Traceback" not in "".join(err)
            steps = begin + (kind == "step" and at - 1)
            assert f"seed 6 at online step {steps + 1} " in err[-1]
            assert ("simulator is gone" in err[-1]) == (spoil is raises)
            assert ("not finite" in err[-1]) == (spoil is not raises)
            found = saved("run")
            assert (found["step"], found["online_steps"]) == (10 + 2 * steps, steps)
            assert not Path("run/result.json").exists()
    assert script.main(RESUME) == 0
    config = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(config.replace("_every: 1000", "_every: 6"))
    content = saved("run")
    content["config"]["checkpoint_every"] = 6
    torch.save(content, "run/checkpoint.pt")
    assert_same("run", whole)


def test_an_environment_that_fails_while_it_is_played_again(iql, monkeypatch, capsys):
    """On a resume: one line, nothing is lost."""
    crash_at(monkeypatch, iql, line(iql), 56)
    with monkeypatch.context() as patch:
        online = {episode_seed(seed, k) for seed in SEEDS for k in range(40)}
        spoil = lambda env, _, value: raises(value) if env.seed in online else value  # noqa: E731
        patch.setattr(Toy, "fault", staticmethod(spoil))
        capsys.readouterr()
        assert iql.main(RESUME) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and "simulator is gone" in last and "seed " in last
    assert saved("run")["online_steps"] == 18
    assert iql.main(RESUME) == 0


def moody(seed: int, ends: bool):
    """Observations (and with `ends` the ends of episodes) from randomness that is not repeated."""
    rng = np.random.default_rng(seed)

    def fault(env, what, value):
        if env.seed < 20_000:  # evaluations
            return value
        if what == "step" and getattr(env, "over", -1) == env.seed:
            raise RuntimeError("stepped past its end")
        value = (value[0] + np.float32(rng.normal()), *value[1:])
        if what == "step" and ends and rng.random() < 0.4:
            env.over = env.seed
            value = (*value[:2], True, *value[3:])
        return value

    return staticmethod(fault)


@pytest.mark.parametrize(
    "name, ends", [("iql", False), ("rebrac", False), ("iql", True), ("cal_ql", True)]
)
def test_an_environment_that_does_not_repeat(name, made, monkeypatch, capsys, ends):
    script = load_script(name)
    monkeypatch.setattr(Toy, "fault", moody(0, ends))
    crash_at(monkeypatch, script, line(script), 56)
    flags = stored("run")[:18]
    running = [member for member in range(2) if len(split(flags[:, member])[1])]
    assert running
    before = Path("run/online.bin").read_bytes()[: 18 * 2 * RECORD.itemsize]
    for seed in (1, 2):  # the second resume finds the episodes ended
        monkeypatch.setattr(Toy, "fault", moody(seed, ends))
        capsys.readouterr()
        if seed == 1:
            crash_at(monkeypatch, script, RESUME, 3)
        else:
            run = made(script, "--resume", "true")
        said = [row for row in capsys.readouterr().err.splitlines() if "does not repeat" in row]
        expected = [f"seed {SEEDS[member]}: " for member in running if seed == 1]
        assert [row[:8] for row in said] == expected
    kept = np.frombuffer(before, RECORD).reshape(18, 2).copy()
    kept["truncated"][17, running] = True
    assert stored("run")[:18].tobytes() == kept.tobytes()
    assert len(stored("run")) == 40 and result_of("run")["online"]["online_steps"] == 40
    assert_table(run, script)
    for member, seed in enumerate(SEEDS):
        ended, running_ = split(stored("run")[:, member])
        for episode in [*ended, *([running_] if len(running_) else [])]:
            assert np.array_equal(episode["obs"][1:], episode["next_obs"][:-1]), seed


# ---- logs and the result


def test_returns_and_lengths_of_episodes(whole):
    for member, seed in enumerate(SEEDS):
        ended, start = [], 0
        for episode in split(stored(whole)[:, member])[0]:
            start += len(episode)
            ended.append((start, episode["reward"].sum(), len(episode)))
        own = [r for r in rows(whole / "metrics.jsonl") if r["seed"] == seed and "final" not in r]
        assert [(r["update"], r["environment_step"]) for r in own] == [
            *((u, 0) for u in (7, 10)),
            *((10 + 2 * s, s) for s in (7, 14, 21, 28, 35, 40)),
        ]
        last = 0
        for row in own:
            recent = [e for e in ended if last < e[0] <= row["environment_step"]]
            last = row["environment_step"]
            if recent:
                assert row["online/return"] == pytest.approx(np.mean([e[1] for e in recent]))
                assert row["online/length"] == pytest.approx(np.mean([e[2] for e in recent]))
            else:
                assert not [name for name in row if name.startswith("online/")]


def test_evaluations_count_environment_steps(whole):
    found = [r for r in rows(whole / "metrics.jsonl") if "eval/return" in r]
    expected = [(10, 0, False), (36, 13, False), (62, 26, False), (88, 39, False), (90, 40, True)]
    assert [(r["update"], r["environment_step"], r["final"]) for r in found] == [
        each for each in expected for _ in SEEDS
    ]
    online = result_of(whole)["online"]
    assert {name: online[name] for name in ("online_steps", "updates_per_step")} == {
        "online_steps": 40,
        "updates_per_step": 2,
    }
    for row, seed in zip(online["seeds"], SEEDS, strict=True):
        scores = [r["eval/score"] for r in found if r["seed"] == seed]
        assert row["seed"] == seed and row["switch"] == scores[0]
        assert row["drop"] == pytest.approx(max(0, scores[0] - min(scores[1:])))
        assert row["regret"] == pytest.approx(np.mean([1 - s / 100 for s in scores[1:]]))


def summary(script, *evaluations, unit="eval/score", seeds: int = 1) -> list[dict]:
    """The seeds' rows for made-up evaluations (seed, update, environment step, value)."""
    online = object.__new__(script.Online)
    online.cfg = script.TrainConfig(num_updates=100, num_seeds=seeds, online_steps=30_000)
    made_up = [
        {"seed": s, "update": u, "environment_step": e, "eval/return": -1.0, unit: v}
        for s, u, e, v in evaluations
    ]
    return online.summary(made_up)["seeds"]


def test_drop_and_regret_by_hand(iql):
    one = [(0, 50, 0, 1.0), (0, 100, 0, 60.0), (0, 5100, 5000, 30.0), (0, 10100, 10_000, 20.0)]
    two = [(0, 15100, 15_000, 10.0), (0, 30100, 30_000, 90.0)]
    (row,) = summary(iql, *one, *two)
    assert row == {"seed": 0, "switch": 60.0, "drop": 40.0, "regret": pytest.approx(0.625)}
    other = [(1, 100, 0, 10.0), (1, 5100, 5000, 120.0)]
    found = summary(iql, *one, *other, seeds=2)
    assert [row["drop"] for row in found] == [40.0, 0]  # never below it: no drop
    assert found[1]["regret"] == pytest.approx(-0.2)
    (row,) = summary(iql, *one, unit="eval/return")  # no scores: no regret
    assert (row["switch"], row["drop"], row["regret"]) == (60.0, 40.0, None)
    (row,) = summary(iql, *two)  # nothing at the switch
    assert (row["switch"], row["drop"], row["regret"]) == (None, None, pytest.approx(0.5))
    (row,) = summary(iql, one[1], *two)  # nothing in the first 10,000 steps
    assert (row["switch"], row["drop"], row["regret"]) == (60.0, None, pytest.approx(0.5))
    (row,) = summary(iql, *one[:2])  # nothing after the switch
    assert (row["switch"], row["drop"], row["regret"]) == (60.0, None, None)
    (row,) = summary(iql)
    assert (row["switch"], row["drop"], row["regret"]) == (None, None, None)


@pytest.mark.parametrize("during, final", [(0, 0), (0, 3), (2, 0)])
def test_without_evaluations(iql, during, final):
    settings = {"eval_episodes": during, "final_eval_episodes": final, "eval_every": 1000}
    assert iql.main(line(iql, **settings)) == 0
    for row in result_of("run")["online"]["seeds"]:
        assert (row["switch"] is None) == (during == 0)
        assert (row["drop"] is None) == (not (during and final))
        assert (row["regret"] is None) == (final == 0)


def test_without_an_online_phase(script):
    assert script.main(line(script, online_steps=0)) == 0
    assert result_of("run")["online"] is None and not Path("run/online.bin").exists()
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert not any("environment_step" in row for row in rows(Path("run", name)))
    assert max(row["update"] for row in rows("run/metrics.jsonl")) == 10


# ---- schedules and exploration


def test_the_cosine_never_rises(iql, monkeypatch):
    seen = []
    optimizers = ("actor_optimizer", "critic_optimizer")

    def look(agent, _):
        """The rate that is set before an update holds in it."""
        seen.append([getattr(agent, name).param_groups[0]["lr"] for name in optimizers])

    before_update(monkeypatch, iql, look)
    assert iql.main(line(iql, cosine_actor_lr="true")) == 0
    rates = [3e-4 * (1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    assert [actor for actor, _ in seen] == pytest.approx(rates)
    assert all(b < a for a, b in itertools.pairwise(actor for actor, _ in seen))
    assert {critic for _, critic in seen} == {3e-4}


@pytest.mark.parametrize("fell", ["true", "false"])
def test_a_rate_that_climbs_is_told(iql, capsys, fell):
    assert iql.main(line(iql, **OFFLINE, cosine_actor_lr=fell)) == 0
    capsys.readouterr()
    assert iql.main([*FORK, "--run_dir", "run", "--cosine_actor_lr", "false"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "climbs" in line]
    told = "online: the learning rate of actor_optimizer climbs from 7.3e-06 to 3.0e-04"
    assert lines == ([told] if fell == "true" else [])


def test_a_fork_has_its_own_rates(iql):
    assert iql.main(line(iql, **OFFLINE)) == 0
    assert iql.main([*FORK, "--run_dir", "run", "--critic_lr", "1e-5", "--actor_lr", "2e-5"]) == 0
    optimizers = saved("run")["optimizers"]
    rates = {name: state["param_groups"][0]["lr"] for name, state in optimizers.items()}
    expected = {"actor_optimizer": 2e-5, "critic_optimizer": 1e-5, "value_optimizer": 3e-4}
    assert rates == expected


def test_the_penalties_of_rebrac(monkeypatch):
    script, seen = load_script("rebrac"), []
    update = script.ReBRAC.update

    def patched(self, batch, noise, *variant):
        seen.append(variant)
        return update(self, batch, noise, *variant)

    monkeypatch.setattr(script.ReBRAC, "update", patched)
    penalties = {"actor_penalty": 0.2, "critic_penalty": 0.4}
    shares = {"online_actor_share": 0.25, "online_critic_share": 0.125}
    assert script.main(line(script, **penalties, **shares)) == 0
    assert [moves for moves, *_ in seen] == [False, True] * 45
    assert [(a, c) for _, a, c in seen[:10]] == [(0.2, 0.4)] * 10
    expected = [(0.2 * max(1 - i / 80, 0.25), 0.4 * 0.125) for i in range(80)]
    assert [(a, c) for _, a, c in seen[10:]] == [pytest.approx(each) for each in expected]
    # without an online phase they stay, however far the updates go
    cfg = dataclasses.replace(script.TrainConfig(), num_updates=10, **penalties)
    agent = object.__new__(script.ReBRAC)
    torch.nn.Module.__init__(agent)
    agent.cfg = cfg
    assert agent.variant(10**6)[1:] == (0.2, 0.4)


def expected_action(agent, name: str, obs, noise, deterministic: bool) -> torch.Tensor:
    """The documented exploration, in [-1, 1]."""
    obs = (obs - agent.scaler.obs_mean) / agent.scaler.obs_std
    if name in ("cql", "cal_ql"):
        mean, log_std = agent.actor(obs)
        return (mean + log_std.exp() * noise).tanh()
    if name == "awac":
        mean, log_std = agent.actor(obs)
        return mean + log_std.exp() * noise
    if name == "iql":
        std = 0.3 if deterministic else agent.actor.log_std.clamp(-5, 2).exp()
        return agent.actor.mean(obs).tanh() + std * noise
    return agent.actor(obs).tanh() + 0.3 * noise


@pytest.mark.parametrize(
    "name, deterministic", [*((name, False) for name in ONLINE), ("iql", True)]
)
def test_exploration(name, made, monkeypatch, deterministic):
    script = load_script(name)
    seen, agent_class = [], agent_of(script)
    explore = agent_class.explore

    def patched(self, obs, noise):
        found = explore(self, obs, noise)
        with torch.no_grad():
            by_formula = expected_action(self, name, obs, noise, deterministic)
        torch.testing.assert_close(found, 2 * by_formula.clamp(-1, 1))
        for sign in (-1, 1):  # clipped to the environment's bounds
            assert (explore(self, obs, torch.full_like(noise, sign * 1e6)) == 2 * sign).all()
        torch.testing.assert_close(explore(self, obs, 0 * noise), self.act(obs))
        seen.append((noise.clone(), found))
        return found

    monkeypatch.setattr(agent_class, "explore", patched)
    made(script, **({"deterministic": "true"} if deterministic else {}))
    noise = torch.stack([noise for noise, _ in seen])  # [40, S, 1, 1]
    assert noise.shape == (40, 2, 1, 1) and len(noise.unique()) == 80
    assert abs(float(noise.mean())) < 0.4 and 0.7 < float(noise.std()) < 1.3
    played = np.stack([found.squeeze(1).numpy() for _, found in seen])
    assert np.array_equal(stored("run")["action"], played) and np.abs(played).max() <= 2


@pytest.mark.parametrize("name", ["td3_bc", "rebrac"])
def test_no_exploration_noise_plays_the_policy(name, monkeypatch):
    script = load_script(name)
    agent_class = agent_of(script)
    explore = agent_class.explore

    def patched(self, obs, noise):
        assert torch.equal(explore(self, obs, noise), self.act(obs))
        return self.act(obs)

    monkeypatch.setattr(agent_class, "explore", patched)
    assert script.main(line(script, exploration_noise=0)) == 0


def test_the_datasets_own_environment(iql):
    """`env_id: auto`: Pendulum with episodes of 20 steps, which never terminate."""
    settings = {"env_id": "auto", "ref_min_score": "null", "ref_max_score": "null"}
    assert iql.main(line(iql, **settings)) == 0
    steps = stored("run")
    assert not steps["terminated"].any()
    assert (np.flatnonzero(steps["truncated"][:, 0]) == [19, 39]).all()
    assert result_of("run")["dataset_id"] == TOY
