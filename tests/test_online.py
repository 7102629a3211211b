"""The online phase: buffers, sampling, resume, going on from a checkpoint, failures, metrics."""

import itertools
import math
import os
import signal
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, contents, load_script, toy_episodes, words
from test_runs import (
    agent_of,
    assert_same_run,
    before_update,
    crash_at,
    failing_evaluation,
    rows,
    saved,
)

ONLINE = [name for name in SCRIPTS if hasattr(load_script(name), "Online")]
WHOLE_EPISODES = ["cal_ql", "rebrac"]
SEEDS = (5, 6)
# Update 45 lies amid environment step 18, a log interval, a chunk of 32 updates and an episode.
SETTINGS = {
    "env_id": "OnlineToy-v0",
    "ref_min_score": -8,
    "ref_max_score": 0,
    "num_updates": 10,
    "online_steps": 40,
    "updates_per_step": 2,
    "log_every": 7,
    "eval_every": 13,
    "checkpoint_every": 9,
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
    "vae_updates": 4,
    "vae_hidden_dim": 16,
}
RESUME = ["--run_dir", "run", "--resume", "true"]


PLAYED = {}  # first seed -> [(obs, action, reward, terminated, next_obs)] of its last episode


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
        PLAYED[seed] = []
        return self.fault(self, "reset", (self.obs(), {}))

    def step(self, action):
        before = self.obs()
        self.x, self.count = 1.1 * self.x + 0.3 * float(action[0]), self.count + 1
        reward, ended = -abs(self.x), abs(self.x) > 1.6
        PLAYED[self.seed].append((before, action.copy(), reward, ended, self.obs()))
        return self.fault(self, "step", (self.obs(), reward, ended, False, {}))


gym.register("OnlineToy-v0", Toy, max_episode_steps=9, disable_env_checker=True)


def line(script, **settings) -> list[str]:
    """The command line of a run with an online phase."""
    own = {k: v for k, v in MORE.items() if k in script.TrainConfig.__dataclass_fields__}
    return words(**{**SETTINGS, **own, **settings})


@pytest.fixture(autouse=True)
def nothing_played():
    PLAYED.clear()


@pytest.fixture(params=ONLINE)
def script(request):
    """Each script that has an online phase."""
    return load_script(request.param)


@pytest.fixture
def made(monkeypatch):
    """Train and return the finished `Run`."""

    def make(script, *argv, **settings):
        kept, build = [], script.build
        with monkeypatch.context() as patch:
            patch.setattr(script, "build", lambda run, *rest: kept.append(run) or build(run, *rest))
            assert script.main([*line(script, **settings), *argv]) == 0
        return kept[0]

    return make


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """The folder of a script's uninterrupted run, made once."""
    folder = tmp_path_factory.mktemp("whole")

    def make(script) -> Path:
        own = folder / script.__name__
        assert own.exists() or script.main(line(script, run_dir=own)) == 0
        return own

    return make


@pytest.fixture
def whole(script, whole_of) -> Path:
    return whole_of(script)


def episode_seed(seed: int, number: int) -> int:
    words_ = np.random.SeedSequence([seed, zlib.crc32(b"episode"), number]).generate_state(1)
    return int(words_[0])


def episodes_of(seed: int, first: int = 0) -> list[list[tuple]]:
    """What a member played, from episode number `first` on; the last one may not have ended."""
    found = []
    while (number := episode_seed(seed, first + len(found))) in PLAYED:
        found.append(PLAYED[number])
    return [episode for episode in found if episode]


def ended(episode: list) -> bool:
    return bool(episode[-1][3]) or len(episode) == 9


# ---- what is learned from


def by_hand(name: str, episodes: list, infinite_horizon: bool = False) -> dict:
    """The rows of episodes, from the formulas: what the table must hold."""
    data = toy_episodes()
    obs = np.concatenate([np.float64(e.observations[:-1]) for e in data])
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    returns = [np.float64(e.rewards).sum() for e in data]
    scale, columns = 0.5 * 1000 / (max(returns) - min(returns)), {}
    for episode in episodes:
        arrays = (np.float64(x) for x in zip(*episode, strict=True))
        before, action, reward, terminated, after = arrays
        reward, action, count = scale * reward + 0.1, action / 2, len(episode)
        own = {"obs": (before - mean) / std, "next_obs": (after - mean) / std}
        own |= {"action": action, "reward": reward, "terminated": terminated}
        if name == "rebrac":
            own["next_action"] = np.concatenate([action[1:], np.zeros((1, 1))])
            count -= not terminated[-1]
        if name == "cal_ql":
            last = reward[-1] / (1 - 0.99) if infinite_horizon and not terminated[-1] else 0
            known, powers = np.append(reward, last), 0.99 ** np.arange(count + 1)
            own["mc_return"] = np.array([known[i:] @ powers[: count + 1 - i] for i in range(count)])
        for key, values in own.items():
            columns.setdefault(key, []).append(values[:count])
    return {key: np.concatenate(each) for key, each in columns.items()}


def assert_table(run, name: str, played: list, **options) -> None:
    """The data's rows, then each member's own, in its own place, and no others."""
    data = [(e.observations, e.actions, e.rewards, e.terminations) for e in toy_episodes()]
    parts = [[list(zip(o[:-1], a, r, t, o[1:], strict=True)) for o, a, r, t in data]]
    parts += [[e for e in own if ended(e) or name not in WHOLE_EPISODES] for own in played]
    expected, table = [by_hand(name, part, **options) for part in parts], run.online.table
    counts = [len(each["obs"]) for each in expected]
    assert [run.online.offline, *run.online.filled] == counts
    assert counts[0] == (70 if name == "rebrac" else 71) and len(table["obs"]) == counts[0] + 80
    for begin, count, each in zip((0, counts[0], counts[0] + 40), counts, expected, strict=True):
        assert each.keys() == table.keys()
        for key, values in table.items():
            found = values[begin : begin + count].numpy()
            assert np.allclose(found, each[key], rtol=1e-4, atol=1e-4), key
            assert not begin or not values[begin + count : begin + 40].any(), key


@pytest.mark.parametrize(
    "name, options", [*((name, {}) for name in ONLINE), ("cal_ql", {"infinite_horizon": True})]
)
def test_the_table_by_hand(name, options, made):
    script = load_script(name)
    run = made(script, **options)
    played = [episodes_of(seed) for seed in SEEDS]
    for seed, episodes in zip(SEEDS, played, strict=True):
        assert sum(map(len, episodes)) == 40 and all(map(ended, episodes[:-1])), seed
    ends = [episode[-1][3] for episodes in played for episode in episodes[:-1]]
    assert any(ends) and not all(ends)
    assert_table(run, name, played, **options)


# ---- sampling


@pytest.mark.parametrize("share", [None, 0, 0.5, 1])
def test_rows_are_drawn_equally_often(iql, made, share):
    """Of the steps only the member's own; of the data alone, as long as there are none."""
    word = "null" if share is None else share
    online = made(iql, online_share=word, online_steps=5, num_seeds=3).online
    online.filled, size = [0, 2, 5], 10 * math.lcm(71, 73, 76)
    found = online.rows(torch.arange(size).expand(3, -1))
    for member, filled in enumerate(online.filled):
        data, begin = [*range(71)], 71 + 5 * member
        own = [*range(begin, begin + filled)]
        new = int((share or 0) * size) if own else 0
        parts = [(found[member, :new], own), (found[member, new:], data)]
        for drawn, allowed in parts if share is not None else [(found[member], data + own)]:
            counts = torch.bincount(drawn, minlength=71 + 15)
            assert (counts[allowed] * len(allowed) == len(drawn)).all()
            assert counts.sum() == counts[allowed].sum()


@pytest.mark.parametrize("name", ["iql", "rebrac"])
def test_updates_see_the_steps_that_were_made(name, monkeypatch):
    """A step is learned from at once, or once its episode has ended; members draw their own."""
    script, seen = load_script(name), []
    draw = script.Online.rows
    spied = lambda self, x: seen.append(([*self.filled], draw(self, x))) or seen[-1][1]  # noqa: E731
    monkeypatch.setattr(script.Online, "rows", spied)
    assert script.main(line(script, online_share=0.3)) == 0
    counts = [filled for filled, _ in seen]
    assert counts[:10] == [[0, 0]] * 10
    for member, seed in enumerate(SEEDS):
        expected = []  # after each step
        for episode in episodes_of(seed):
            known = len(by_hand(name, [episode])["obs"]) if ended(episode) else 0
            before, steps = expected[-1] if expected else 0, range(1, len(episode) + 1)
            waits = [before] * (len(episode) - 1) + [before + known]
            expected += waits if name == "rebrac" else [before + i for i in steps]
        assert [filled[member] for filled in counts[10:]] == list(np.repeat(expected, 2))
    for filled, found in seen:
        new = [2 if any_ else 0 for any_ in filled]  # 0.3 of 8
        assert (found >= (70 if name == "rebrac" else 71)).sum(-1).tolist() == new
        assert not torch.equal(found[0], found[1])


def test_alone_or_together(script, made):
    """A member's steps, losses and weights are those of the solo run of its seed."""
    together = made(script, run_dir="together", num_seeds=3).agent.state_dict()
    played = [np.array([step[1] for step in episode]) for episode in episodes_of(7)]
    alone = made(script, run_dir="alone", num_seeds=1, seed=7).agent.state_dict()
    for ours, theirs in zip(played, episodes_of(7), strict=True):
        assert np.allclose(ours, [step[1] for step in theirs], rtol=1e-3, atol=1e-3)
    for name, own in alone.items():
        found = together[name]
        found = found if found.shape == own.shape else found.unflatten(0, (3, -1))[2]
        assert torch.allclose(found, own, rtol=1e-2, atol=1e-3), name
    mine = [row for row in rows("together/metrics.jsonl") if row["seed"] == 7]
    for a, b in zip(mine, rows("alone/metrics.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


# ---- resume: to the bit where no episode was running


@pytest.mark.parametrize("number, step", [(10, 9), (11, 10)])
def test_resume_before_the_first_online_step(script, whole, monkeypatch, number, step):
    crash_at(monkeypatch, script, line(script), number)
    assert saved("run")["step"] == step
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_an_evaluation_that_failed_at_the_switch(script, whole, monkeypatch):
    with monkeypatch.context() as patch:
        failing_evaluation(patch, script, 1)
        assert script.main(line(script)) == 2
    assert saved("run")["step"] == 10
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def places(folder) -> list:
    names = ("update", "environment_step", "seed", "final")
    return [[row.get(name) for name in names] for row in rows(Path(folder, "metrics.jsonl"))]


def test_resume_amid_the_phase(script, whole, made, monkeypatch):
    """Buffers, numbers of episodes and logs go on; the episodes that were running begin anew."""
    crash_at(monkeypatch, script, line(script), 53)
    before, state = saved("run"), saved("run")["online"]
    assert before["step"] == 45  # between the two updates of step 18
    first = [episodes_of(seed)[:number] for seed, number in zip(SEEDS, state["begun"], strict=True)]
    for episodes in first:  # a part of the last one was played behind the checkpoint
        del episodes[-1][18 - sum(map(len, episodes[:-1])) :]
    PLAYED.clear()
    run = made(script, resume="true")
    begun = zip(SEEDS, state["begun"], strict=True)
    second = [episodes_of(seed, number) for seed, number in begun]
    assert [sum(map(len, episodes)) for episodes in second] == [22, 22]
    played = [[*a, *b] for a, b in zip(first, second, strict=True)]
    assert run.online.begun == [len(episodes) for episodes in played]
    assert_table(run, script.__name__.split(".")[-1], played)
    assert places("run") == places(whole)


@pytest.mark.parametrize("number", [3, 55])
def test_a_signal(monkeypatch, capsys, whole_of, number):
    """Well before the phase, or between the two updates of an environment step."""
    script = load_script("rebrac")
    signals = lambda _, n: n == number and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        before_update(patch, script, signals)
        assert script.main(line(script)) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"update {number};" in last and last.endswith("--run_dir 'run' --resume true")
    assert saved("run")["step"] == number
    assert script.main(RESUME) == 0
    assert places("run") == places(whole_of(script))


# ---- going on from a checkpoint of an offline run


def test_going_on_equals_the_whole_run(script, whole):
    assert script.main(line(script, online_steps=0, run_dir="offline")) == 0
    before = contents("offline")
    assert script.main(line(script, checkpoint="offline")) == 0
    assert contents("offline") == before
    for name in ("metrics.jsonl", "episodes.jsonl"):
        expected = [r for r in rows(whole / name) if r["update"] > 10 or "final" in r]
        assert rows(Path("run", name)) == expected, name
    ours, theirs = saved("run"), saved(whole)
    for key, value in theirs["agent"].items():
        assert torch.equal(ours["agent"][key], value), key
    for a, b in zip(ours["online"]["rows"], theirs["online"]["rows"], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


def test_going_on_is_refused(iql, refused, whole_of):
    assert iql.main(line(iql, online_steps=0, run_dir="offline")) == 0
    refused(iql, line(iql, checkpoint="offline", env_id="none"), "online_steps", "env_id")
    refused(iql, line(iql, checkpoint="offline", hidden_dim=8), "checkpoint")
    refused(iql, line(iql, checkpoint="offline", num_updates=9), "checkpoint", "num_updates")
    refused(iql, line(iql, checkpoint="offline", seed=77), "checkpoint", "--seed")
    refused(iql, line(iql, checkpoint="offline", run_dir="offline"), "offline")
    refused(iql, line(iql, checkpoint=whole_of(iql)), "checkpoint", "num_updates")


# ---- environments that fail


def raises(_):
    raise ValueError("the simulator\nis gone")


def with_reward(value: float):
    return lambda result: (result[0], value, *result[2:])


def nan_obs(result):
    return np.array([0, math.nan, 0], np.float32), *result[1:]


FAULTS = [("step", with_reward(math.nan)), ("step", with_reward(math.inf))]
FAULTS += itertools.product(("step", "reset"), (raises, nan_obs))


@pytest.mark.parametrize(
    "name, kind, spoil",
    [*(("iql", *fault) for fault in FAULTS), ("rebrac", *FAULTS[0]), ("rebrac", "reset", raises)],
)
def test_an_environment_that_fails(name, monkeypatch, capsys, kind, spoil):
    """Seed 6's fails in its third episode, after seed 5's has made the same step, and again."""
    script = load_script(name)

    def fault(env, what, value):
        broken = env.seed in {episode_seed(6, k) for k in range(2, 9)}
        return spoil(value) if broken and (what, env.count) == (kind, kind == "step") else value

    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "fault", staticmethod(fault))
        for argv in (line(script, checkpoint_every=1000), RESUME, RESUME):
            capsys.readouterr()
            assert script.main(argv) == 2
            err = capsys.readouterr().err.strip().splitlines()
            assert err[-1].startswith("error: ") and "Traceback" not in "".join(err)
            assert ("simulator is gone" in err[-1]) == (spoil is raises)
            found = saved("run")
            steps.append((found["step"] - 10) / 2)
            assert not Path("run/result.json").exists()
            if name == "iql":  # the step that not all members made is nobody's
                assert [len(r["obs"]) for r in found["online"]["rows"]] == [steps[-1]] * 2
    assert steps[0] > 1 and steps == [steps[0]] * 3
    assert script.main(RESUME) == 0
    assert saved("run")["step"] == 10 + 2 * 40


# ---- logs


def test_rows_of_the_log(script):
    """Means of the episodes that ended since the last row, if any did."""
    assert script.main(line(script)) == 0
    for seed in SEEDS:
        every = [row for row in rows("run/metrics.jsonl") if row["seed"] == seed]
        found = [(row["update"], row["environment_step"]) for row in every if "final" not in row]
        updates = (14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 84, 90)
        assert found == [(7, 0), (10, 0), *((u, math.ceil((u - 10) / 2)) for u in updates)]
        found = [(r["update"], r["environment_step"], r["final"]) for r in every if "final" in r]
        updates = (10, 13, 26, 39, 52, 65, 78, 90)
        assert found == [(u, math.ceil((u - 10) / 2), u == 90) for u in updates]
        episodes, last = list(filter(ended, episodes_of(seed))), 0
        ends = list(itertools.accumulate(map(len, episodes)))
        for row in every:
            if "final" not in row:
                now = row["environment_step"]
                new = [e for e, end in zip(episodes, ends, strict=True) if last < end <= now]
                returns = [sum(step[2] for step in episode) for episode in new]
                means = {"online/return": returns, "online/length": list(map(len, new))}
                means = {k: pytest.approx(np.mean(v)) for k, v in means.items() if v}
                assert {k: v for k, v in row.items() if k.startswith("online/")} == means
                last = now


def test_without_an_online_phase(script):
    assert script.main(line(script, online_steps=0)) == 0
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert not any("environment_step" in row for row in rows(Path("run", name)))
    assert max(row["update"] for row in rows("run/metrics.jsonl")) == 10


# ---- schedules and exploration


def test_the_cosine_never_rises(iql, monkeypatch):
    """The rates that updates use, over both phases."""
    seen, step = [], iql.Adam.step

    def spy(self, gradients, lr=None):
        seen.append(lr)
        step(self, gradients, lr)

    monkeypatch.setattr(iql.Adam, "step", spy)
    assert iql.main(line(iql, cosine_actor_lr="true")) == 0
    rates = [3e-4 * (1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    assert [float(lr) for lr in seen if lr is not None] == pytest.approx(rates, rel=1e-4)
    assert len(seen) == 3 * 90  # V's and Q's are constants


def test_the_penalties_of_rebrac(monkeypatch):
    """Constant offline; online beta_1 falls with every update, beta_2 at once."""
    script, seen = load_script("rebrac"), []
    penalties = script.ReBRAC.penalties
    spied = lambda self: seen.append(penalties(self)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(script.ReBRAC, "penalties", spied)
    settings = {"actor_penalty": 0.2, "critic_penalty": 0.4}
    settings |= {"online_actor_share": 0.25, "online_critic_share": 0.125}
    assert script.main(line(script, **settings)) == 0
    expected = [(0.2, 0.4)] * 10 + [(0.2 * max(1 - i / 80, 0.25), 0.05) for i in range(80)]
    assert [tuple(map(float, each)) for each in seen] == [pytest.approx(e) for e in expected]


def expected_action(agent, name: str, obs, noise, deterministic: bool) -> torch.Tensor:
    """The documented exploration, in [-1, 1]."""
    obs = (obs - agent.obs_mean) / agent.obs_std
    if name in ("cql", "cal_ql"):
        mean, log_std = agent.actor(obs)
        return (mean + log_std.exp() * noise).tanh()
    if name == "awac":
        mean, log_std = agent.actor(obs)
        return mean + log_std.exp() * noise
    if name == "iql":
        std = 0.3 if deterministic else agent.actor.log_std.clamp(-5, 2).exp()
        return agent.actor.mean(obs).tanh() + std * noise
    if name == "fql":
        return agent.actor(obs, noise)
    return agent.actor(obs).tanh() + 0.3 * noise


@pytest.mark.parametrize(
    "name, deterministic", [*((name, False) for name in ONLINE), ("iql", True)]
)
def test_exploration(name, monkeypatch, deterministic):
    script = load_script(name)
    seen, agent_class = [], agent_of(script)
    explore = agent_class.explore

    def patched(self, obs, noise):
        found = explore(self, obs, noise)
        with torch.no_grad():
            by_formula = expected_action(self, name, obs, noise, deterministic)
        torch.testing.assert_close(found, 2 * by_formula.clamp(-1, 1))
        if len(noise[0]) > 1:  # an evaluation's, where `act` makes use of it
            return found
        for sign in (-1, 1):  # clipped to the environment's bounds
            edge = explore(self, obs, torch.full_like(noise, sign * 1e6))
            assert (edge.abs() == 2).all() and (name == "fql" or (edge.sign() == sign).all())
        if name != "fql":  # which has no mean action
            torch.testing.assert_close(explore(self, obs, 0 * noise), self.act(obs))
        seen.append((noise.clone(), found.clone()))
        return found

    monkeypatch.setattr(agent_class, "explore", patched)
    assert script.main(line(script, **({"deterministic": "true"} if deterministic else {}))) == 0
    noise = torch.stack([noise for noise, _ in seen])  # [40, S, 1, 1]
    assert noise.shape == (40, 2, 1, 1) and len(noise.unique()) == 80
    assert abs(float(noise.mean())) < 0.4 and 0.7 < float(noise.std()) < 1.3
    for member, seed in enumerate(SEEDS):
        played = [step[1] for episode in episodes_of(seed) for step in episode]
        assert np.array_equal(played, [found[member, 0].numpy() for _, found in seen])


def test_the_datasets_own_environment(iql):
    """`env_id: auto`: Pendulum with episodes of 20 steps, which never terminate."""
    settings = {"env_id": "auto", "ref_min_score": "null", "ref_max_score": "null"}
    assert iql.main(line(iql, **settings)) == 0
    assert saved("run")["online"]["begun"] == [2, 2]
    assert not any(own["terminated"].any() for own in saved("run")["online"]["rows"])
