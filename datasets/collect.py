"""Collect offline datasets the way D4RL did: train SAC online, keep policies, record them.

    python datasets/collect.py hopper train            # SAC for 200k steps -> policies and recipe
    python datasets/collect.py hopper medium           # record a tier into Minari's store
    python datasets/collect.py hopper medium-replay    # run that training again, keep its replay
    python datasets/collect.py pointmaze umaze         # needs no training: a controller plans

Tiers, after D4RL (arXiv 2004.07219, section 5); training is evaluated every 5,000 steps:

    random         uniformly random actions
    medium         the policy of the first evaluation between a third and a half of the best return
    medium-replay  every transition that the learner saw up to the medium policy, or its first
                   --steps of them
    expert         the policy of the best evaluation
    medium-expert  one half medium, one half expert

Policies act stochastically while they are recorded, as D4RL's did. Reference returns are means
over 100 episodes: 0 = random actions, 100 = the mean action of our expert. The same command gives
the same `fingerprint` (in the metadata) on the same machine and package versions.

PointMaze, after D4RL's maze2d: a controller heads from cell to cell, with Gaussian noise on its
actions. Observations are x, y and velocities. They do not show the goal, which is evaluation's:
reaching it brings reward 1 and ends the episode. A score of 100 means that every episode from the
start reaches the goal, as the controller's without noise do; 0 = random actions.

    umaze, medium, large  from any cell to random cells, one after the other
    stitch                in a cross of corridors; no episode runs from the start to the goal

Numbered actions (CartPole, MinAtar): collect_dqn.py.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Optional

import gymnasium as gym
import minari
import numpy as np
import torch
from gymnasium.wrappers import FilterObservation, FlattenObservation
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

SPEC = importlib.util.spec_from_file_location("d4rl", Path(__file__).resolve().with_name("d4rl.py"))
d4rl = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(d4rl)  # for its writer

POLICIES = Path(__file__).resolve().parent / "policies"
ENVIRONMENTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
TIERS = ("random", "medium", "medium-replay", "expert", "medium-expert")
# maze: environment, D4RL's limit of steps, start and goal of evaluation as cells (row, column)
MAZES = {
    "umaze": ("PointMaze_UMaze-v3", 300, (1, 1), (3, 1)),
    "medium": ("PointMaze_Medium-v3", 600, (1, 1), (6, 6)),
    "large": ("PointMaze_Large-v3", 800, (1, 1), (7, 9)),
    "stitch": ("PointMaze_UMaze-v3", 300, (4, 3), (2, 5)),
}
# stitch has a maze of its own, with the start S, the goal G and a dead end A. Eight of nine
# episodes come from S and turn left into A, which they never leave. One of nine comes from B,
# wanders between B and the crossing, also a bit down the stem s, and goes on to G. So cloning the
# data leads from S to A, and only values tell to turn right.
#
#     # # # # # # #
#     # # # B # # #
#     # A a . . G #
#     # # # s # # #
#     # # # S # # #
#     # # # # # # #
CROSS = [
    [1] * 7,
    [1, 1, 1, 0, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    *[[1, 1, 1, 0, 1, 1, 1]] * 2,
    [1] * 7,
]
# cells to start from, cells to head for, steps
TO_A = ([(4, 3)], [(2, 1), (2, 2)], 120)
TO_G = ([(1, 3)], [(1, 3), (3, 3), (2, 5)], math.inf)
ACTION_NOISE = 0.5  # standard deviation, as D4RL's
SPEED = 3.0  # metres, or cells, a second
VERSION = "v0"
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
# what an environment's entry point has in its name: the packages that it needs
PACKAGES = {"mujoco": ["mujoco"], "robotics": ["mujoco", "gymnasium-robotics"]}
PACKAGES |= {"box2d": ["box2d"], "minatar": ["MinAtar"]}
SOURCE = "collected by datasets/collect.py"
MAZE_EPISODES = 100  # that a maze's reference returns are means over
EVAL_SEED = 10_000  # evaluation episodes start from seeds that training never uses


class CollectError(Exception):
    """Something the user can mend."""


class Actor(nn.Module):
    """Squashed Gaussian policy; actions in [-1, 1]^act_dim, scaled to the space by the caller."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(obs_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 2 * act_dim),
        )

    def forward(self, obs):
        """obs [B, obs_dim] -> (sampled action, its log-probability [B], mean action)."""
        mean, log_std = self.trunk(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        # log pi(a|s) = log N(raw) - sum log(1 - tanh(raw)^2), in its numerically stable form
        log_prob = -0.5 * noise.square() - log_std - 0.5 * np.log(2 * np.pi)
        log_prob = log_prob - 2 * (np.log(2) - raw - F.softplus(-2 * raw))
        return raw.tanh(), log_prob.sum(-1), mean.tanh()


class TwinCritic(nn.Module):
    """Two Q-functions as one batched network: obs, action -> [2, B]."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        sizes = [obs_dim + act_dim, 256, 256, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = fan_in**-0.5
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x.squeeze(-1)


class SAC:
    """Soft actor-critic with a learned temperature, arXiv 1812.05905, equations 5, 7 and 18."""

    def __init__(self, obs_dim: int, act_dim: int):
        self.actor, self.critic = Actor(obs_dim, act_dim), TwinCritic(obs_dim, act_dim)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.target_entropy = -float(act_dim)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), 3e-4, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), 3e-4, fused=True)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], 3e-4)

    def update(self, obs, action, reward, next_obs, terminated):
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob, _ = self.actor(next_obs)
            next_v = self.target(next_obs, next_action).amin(0) - alpha * next_log_prob
            target = reward + 0.99 * (1 - terminated) * next_v
        critic_loss = (self.critic(obs, action) - target).square().mean(-1).sum()
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        new_action, log_prob, _ = self.actor(obs)
        actor_loss = (alpha * log_prob - self.critic(obs, new_action).amin(0)).mean()
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor_opt.step()

        alpha_loss = -self.log_alpha * (log_prob.detach() + self.target_entropy).mean()
        self.alpha_opt.zero_grad()
        alpha_loss.backward()
        self.alpha_opt.step()
        torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), 0.005)


def progress(what: str, total: int) -> tqdm:
    """A bar with the time left, or a plain line every ten seconds where there is no terminal."""
    plain = "{desc}: {n_fmt}/{total_fmt} steps, {rate_fmt}, {remaining} left\n"
    style = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": plain}
    return tqdm(desc=what, total=total, unit=" steps", **style)


def rescale(action, space):
    """[-1, 1] -> the environment's bounds."""
    return (space.low + (action + 1) * 0.5 * (space.high - space.low)).astype(np.float32)


def evaluate(actor: Actor, env_id: str, episodes: int, seed: int = EVAL_SEED) -> list[float]:
    """Undiscounted returns of the mean action, all episodes side by side."""
    envs = [gym.make(env_id) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, alive = np.zeros(episodes), list(range(episodes))
    while alive:
        with torch.no_grad():
            mean, _ = actor.trunk(torch.as_tensor(obs[alive], dtype=torch.float32)).chunk(2, dim=-1)
        for i, action in zip(list(alive), mean.tanh().numpy(), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(
                rescale(action, envs[i].action_space)
            )
            returns[i] += reward
            if terminated or truncated:
                alive.remove(i)
    return returns.tolist()


def train_sac(
    env_id: str, steps: int, seed: int, on_eval=None, eval_every: int = 5_000
) -> list[EpisodeBuffer]:
    """Train online for `steps` environment steps, one update each after 5,000 random ones.

    Returns all that the learner saw, as episodes, and calls `on_eval(step, actor)` every
    `eval_every` steps. Evaluation touches no generator that training draws from, so a shorter run
    is the beginning of a longer one.
    """
    torch.manual_seed(seed)
    rng, env, bar = np.random.default_rng(seed), gym.make(env_id), progress(f"SAC {env_id}", steps)
    obs_dim, act_dim = sizes(env_id)
    agent, episodes = SAC(obs_dim, act_dim), []
    shapes = {"obs": (obs_dim,), "action": (act_dim,), "reward": ()}
    shapes |= {"next_obs": (obs_dim,), "terminated": ()}
    replay = {name: torch.zeros(steps, *shape) for name, shape in shapes.items()}
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    for step in range(steps):
        obs = torch.as_tensor(observations[-1], dtype=torch.float32)
        if step < 5_000:
            action = rng.uniform(-1, 1, act_dim).astype(np.float32)
        else:
            with torch.no_grad():
                action = agent.actor(obs[None])[0][0].numpy()
        next_obs, reward, terminated, truncated, _ = env.step(rescale(action, env.action_space))
        for name, value in zip(replay, (obs, action, reward, next_obs, terminated), strict=True):
            replay[name][step] = torch.as_tensor(value, dtype=torch.float32)
        observations.append(next_obs)
        actions.append(rescale(action, env.action_space))
        rewards.append(reward)
        if terminated or truncated or step + 1 == steps:
            episodes.append(as_episode(observations, actions, rewards, terminated))
            observations, actions, rewards = [env.reset()[0]], [], []
        if step >= 5_000:
            rows = torch.as_tensor(rng.integers(0, step + 1, 256))
            agent.update(**{name: values[rows] for name, values in replay.items()})
        bar.update()
        if on_eval and (step + 1) % eval_every == 0:
            on_eval(step + 1, agent.actor)
    return episodes


def as_episode(observations, actions, rewards, terminated) -> EpisodeBuffer:
    """T + 1 observations, T actions and rewards; an episode that did not terminate is truncated."""
    terminations = np.zeros(len(rewards), bool)
    truncations = np.zeros(len(rewards), bool)
    terminations[-1], truncations[-1] = terminated, not terminated
    return EpisodeBuffer(
        observations=np.asarray(observations, np.float32),
        actions=np.asarray(actions, np.float32),
        rewards=np.asarray(rewards, np.float32),
        terminations=terminations,
        truncations=truncations,
    )


def record(actor: Optional[Actor], env_id: str, steps: int, seed: int) -> list[EpisodeBuffer]:
    """`steps` steps of a stochastic policy (None: uniformly random); the last episode is cut."""
    torch.manual_seed(seed)
    rng, env = np.random.default_rng(seed), gym.make(env_id)
    bar, episodes, total = progress(f"recording {env_id}", steps), [], 0
    while total < steps:
        obs, _ = env.reset(seed=seed + len(episodes))
        observations, actions, rewards, terminated, truncated = [obs], [], [], False, False
        while not (terminated or truncated) and total < steps:
            if actor is None:
                action = rng.uniform(-1, 1, env.action_space.shape)
            else:
                with torch.no_grad():
                    action = actor(torch.as_tensor(obs, dtype=torch.float32)[None])[0][0].numpy()
            action = rescale(action, env.action_space)
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            actions.append(action)
            rewards.append(reward)
            total += 1
            bar.update()
        episodes.append(as_episode(observations, actions, rewards, terminated))
    return episodes


def random_returns(env: gym.Env, episodes: int) -> list[float]:
    """Undiscounted returns of uniformly random actions."""
    returns = []
    for i in range(episodes):
        env.reset(seed=EVAL_SEED + i)
        env.action_space.seed(EVAL_SEED + i)
        total, ended = 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    return returns


def maze_env(name: str) -> gym.Env:
    """The maze with its one start and goal, which observations do not show: x, y, velocities."""
    env_id, limit, start, goal = MAZES[name]
    with redirect_stderr(io.StringIO()):  # it prints a notice of its own
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    cells = np.array(CROSS if name == "stitch" else gym.spec(env_id).kwargs["maze_map"], object)
    cells[start], cells[goal] = "r", "g"
    env = gym.make(env_id, maze_map=cells.tolist(), continuing_task=False, max_episode_steps=limit)
    return FlattenObservation(FilterObservation(env, ["observation"]))


def free_cells(env: gym.Env) -> list[tuple]:
    rows = enumerate(env.unwrapped.maze.maze_map)
    return [(i, j) for i, row in rows for j, cell in enumerate(row) if cell != 1]


def shortest(free: list, start: tuple, end: tuple) -> list[tuple]:
    """The cells of a shortest way, both ends included: breadth first."""
    before, queue = {start: None}, deque([start])
    while end not in before:
        i, j = cell = queue.popleft()
        for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if near in free and near not in before:
                before[near] = cell
                queue.append(near)
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def waypoints(env: gym.Env, start: tuple, ends: Iterable[tuple]) -> Iterator[np.ndarray]:
    """Centres [2] of the cells on the way from `start` to each of `ends` in turn."""
    free = free_cells(env)
    for end in ends:
        yield from map(env.unwrapped.maze.cell_rowcol_to_xy, shortest(free, start, end))
        start = end


def walk(
    env: gym.Env, start: tuple, ends: Iterable[tuple], seed: int, rng=None, steps=math.inf
) -> EpisodeBuffer:
    """One episode of the controller, at most `steps` long.

    D4RL's PD controller, but with a bounded speed: D4RL's brakes before every waypoint, which no
    observation shows, so that policies cloned from it come to rest between two cells. With `rng` it
    aims anywhere near the cells' centres, so that the data fill the corridors, and its actions
    are noisy.
    """
    (obs, _), way = env.reset(seed=seed, options={"reset_cell": start}), waypoints(env, start, ends)
    observations, actions, rewards, target, ended = [obs], [], [], obs[:2], False
    while not ended:
        if np.linalg.norm(target - obs[:2]) < 0.3:
            target = next(way) + (rng.uniform(-0.25, 0.25, 2) if rng else 0)
        velocity = 10 * (target - obs[:2])
        velocity *= SPEED / max(SPEED, np.linalg.norm(velocity))
        action = velocity - obs[2:] + (rng.normal(scale=ACTION_NOISE, size=2) if rng else 0)
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
        ended = terminated or truncated or len(rewards) >= steps
    return as_episode(observations, actions, rewards, terminated)


def walk_maze(name: str, env: gym.Env, steps: int, seed: int) -> list[EpisodeBuffer]:
    """`steps` steps of the noisy controller; the last episode is cut."""
    rng, bar = np.random.default_rng(seed), progress(f"recording {name}", steps)
    goal, free = MAZES[name][3], free_cells(env)
    anywhere = ([cell for cell in free if cell != goal], free, math.inf)
    kinds = itertools.cycle([TO_A] * 8 + [TO_G] if name == "stitch" else [anywhere])
    episodes, total = [], 0
    while total < steps:
        starts, ends, most = next(kinds)
        start = starts[rng.integers(len(starts))]
        heads_for = (ends[rng.integers(len(ends))] for _ in itertools.count())
        most = min(most, steps - total)
        episode = walk(env, start, heads_for, seed + len(episodes), rng, most)
        if name == "stitch" and joins(episode, env, goal):
            raise CollectError(f"episode {len(episodes)} joins start and goal: change --seed")
        episodes.append(episode)
        total += len(episode.rewards)
        bar.update(len(episode.rewards))
    return episodes


def joins(episode: EpisodeBuffer, env: gym.Env, goal: tuple) -> bool:
    """Whether it visits both the cell of the start and the goal."""
    cell = env.unwrapped.maze.cell_xy_to_rowcol
    cells = {tuple(cell(obs[:2]).tolist()) for obs in episode.observations}
    return MAZES["stitch"][2] in cells and (goal in cells or bool(episode.terminations[-1]))


def collect_maze(
    name: str, env: gym.Env, steps: int, seed: int
) -> tuple[list[EpisodeBuffer], dict]:
    """The episodes, and what the metadata say of them."""
    env_id, _, start, goal = MAZES[name]
    episodes = walk_maze(name, env, steps, seed)
    best = [
        walk(env, start, itertools.repeat(goal), EVAL_SEED + i).rewards.sum()
        for i in range(MAZE_EPISODES)
    ]
    about = {
        "env_id": env_id,
        "algorithm": "waypoint controller",
        "start_cell": start,
        "goal_cell": goal,
        "action_noise": ACTION_NOISE,
        "ref_min_score": float(np.mean(random_returns(env, MAZE_EPISODES))),
        "ref_max_score": float(np.mean(best)),
    }
    about["description"] = (
        f"pointmaze {name} in {env_id} with start {start} and goal {goal}, {SOURCE}: a waypoint "
        f"controller with noise of {ACTION_NOISE} on its actions. Not D4RL's data: reaching the "
        f"goal brings 1 and ends the episode. Of {MAZE_EPISODES} episodes from the start, random "
        f"actions reach it in {about['ref_min_score']:.0%}, which scores 0, the controller without "
        f"noise in {about['ref_max_score']:.0%}, which scores 100."
    )
    return episodes, about


def choose(curve: list) -> tuple[int, int]:
    """Training steps of the medium and the expert policy, from [(step, mean return), ...]."""
    best_step, best = max(curve, key=lambda point: point[1])
    for step, value in curve:
        if best / 3 <= value <= best / 2:
            return step, best_step
    raise CollectError(f"no evaluation lies within {best / 3:.0f} to {best / 2:.0f}: change --seed")


def train(robot: str, steps: int, seed: int) -> None:
    """SAC, then the chosen policies with their recipe into datasets/policies/<robot>.pt."""
    env_id, curve, actors = ENVIRONMENTS[robot], [], {}
    if (POLICIES / f"{robot}.pt").exists():  # the recorded sets belong to them
        raise CollectError(f"{POLICIES / robot}.pt exists: move it away to train anew")

    def on_eval(step, actor):
        curve.append((step, float(np.mean(evaluate(actor, env_id, 10)))))
        actors[step] = copy.deepcopy(actor.state_dict())
        print(f"step {step:,}: return {curve[-1][1]:.1f}", flush=True)

    train_sac(env_id, steps, seed, on_eval)
    keep(robot, env_id, seed, curve, actors)


def keep(robot: str, env_id: str, seed: int, curve: list, actors: dict) -> None:
    medium_step, expert_step = choose(curve)
    expert = Actor(*sizes(env_id))
    expert.load_state_dict(actors[expert_step])
    recipe = {
        "env_id": env_id,
        "algorithm": "SAC",
        "seed": seed,
        "medium_step": medium_step,
        "medium_return": dict(curve)[medium_step],
        "expert_step": expert_step,
        "expert_return": dict(curve)[expert_step],
        "training_steps": curve[-1][0],
        "ref_min_score": float(np.mean(random_returns(gym.make(env_id), 100))),
        "ref_max_score": float(np.mean(evaluate(expert, env_id, 100))),
        "curve": [list(point) for point in curve],
    }
    policies = {"recipe": recipe, "medium": actors[medium_step], "expert": actors[expert_step]}
    POLICIES.mkdir(exist_ok=True)
    torch.save(policies, POLICIES / f"{robot}.pt")
    print(
        f"kept in {POLICIES / robot}.pt: "
        + json.dumps({k: v for k, v in recipe.items() if k != "curve"})
    )


def sizes(env_id: str) -> tuple[int, int]:
    env = gym.make(env_id)
    return env.observation_space.shape[0], env.action_space.shape[0]


def collect(robot: str, tier: str, steps: int, seed: int, policies: dict) -> list[EpisodeBuffer]:
    """The episodes of one tier."""
    recipe, env_id = policies["recipe"], ENVIRONMENTS[robot]
    if tier == "random":
        return record(None, env_id, steps, seed)
    if tier == "medium-replay":
        return train_sac(env_id, steps, recipe["seed"])
    if tier == "medium-expert":
        parts = (("medium", steps // 2), ("expert", steps - steps // 2))
        halves = (collect(robot, name, own, seed, policies) for name, own in parts)
        return [episode for half in halves for episode in half]
    actor = Actor(*sizes(env_id))
    actor.load_state_dict(policies[tier])
    return record(actor, env_id, steps, seed)


def collect_tier(
    robot: str, tier: str, steps: Optional[int], seed: int, policies: dict
) -> tuple[list[EpisodeBuffer], dict]:
    """The episodes, and what the metadata say of them."""
    about = {name: value for name, value in policies["recipe"].items() if name != "curve"}
    if tier == "medium-replay":
        about["learner_steps"] = steps = steps or about["medium_step"]
        if steps > about["training_steps"]:
            most = f"the training had {about['training_steps']:,}"
            raise CollectError(f"--steps {steps}: {most}, give at most that")
    about["description"] = (
        f"{robot} {tier} in {about['env_id']}, {SOURCE}. Not D4RL's data: a score of 100 "
        "is the return of the best policy of this collection."
    )
    return collect(robot, tier, steps or 200_000, seed, policies), about


def fingerprint(episodes: list[EpisodeBuffer]) -> str:
    """Of the content alone, as a run's environment.json has it: lengths, then each array."""
    digest = hashlib.sha256(np.array([len(e.rewards) for e in episodes], "<i8").tobytes())
    for name in ("actions", "observations", "rewards", "terminations", "truncations"):
        for episode in episodes:
            values = getattr(episode, name)
            values = values if values.dtype == np.uint8 else values.astype("<f4")
            digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()[:16]


def write(
    episodes: list[EpisodeBuffer],
    dataset_id: str,
    target: Path,
    about: dict,
    env: gym.Env,
    observation_space: Optional[gym.Space] = None,
) -> None:
    """Write a Minari dataset to the folder `target`: built beside it, then moved.

    Its arrays are compressed, one chunk each; `about` goes into the metadata.
    """
    box, total = env.observation_space, sum(len(episode.rewards) for episode in episodes)
    space = observation_space
    if space is None:  # float32, as the episodes
        space = gym.spaces.Box(box.low.astype(np.float32), box.high.astype(np.float32))
    with d4rl.replacing(target) as folder:
        spaces = {"observation_space": space, "action_space": env.action_space}
        storage = MinariStorage.new(folder, **spaces, env_spec=env.spec, jpeg_encoding=False)
        arrays = ({name: getattr(each, name) for name in ARRAYS} for each in episodes)
        bar = d4rl.Progress(f"writing {dataset_id}", "steps")
        d4rl.write_episodes(folder, arrays, bar, total, gzip=9)
        whole = {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "total_episodes": len(episodes),
            "total_steps": total,
            "author": {"The Stitch authors"},
            "algorithm_name": about["algorithm"],
            "num_episodes_average_score": 100,
            "requirements": requirements(env),
        }
        storage.update_metadata({"code_permalink": "datasets/collect.py", **whole, **about})
        storage.update_metadata({"dataset_size": float(storage.get_size())})  # MB


def requirements(env: gym.Env) -> list[str]:
    """The packages that the environment's own code needs, with their versions here."""
    place = env.spec.entry_point
    packages = next((PACKAGES[part] for part in PACKAGES if part in place), ["gymnasium"])
    return [f"{name}=={importlib.metadata.version(name)}" for name in packages]


def look_at_place(target: Path) -> None:
    """Raise CollectError where no set can be written, before hours of recording one."""
    if target.exists():
        raise CollectError(f"{target} exists: delete it, or give another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".stitch-").cleanup()
    except OSError as error:
        text = f"{target} cannot be written ({error.strerror})"
        raise CollectError(f"{text}: give another --out") from None


def check_seed(seed: int) -> None:
    """Raise CollectError where generators would not take it."""
    if not 0 <= seed < 2**31:
        raise CollectError(f"--seed {seed}: give one from 0 to {2**31 - 1}")


def read_policies(robot: str) -> dict:
    file = POLICIES / f"{robot}.pt"
    if not file.is_file():
        raise CollectError(f"{file} is not there: run 'collect.py {robot} train' first")
    return torch.load(file, weights_only=True)


def record_tier(
    robot: str, tier: str, steps: Optional[int], seed: int, out: Optional[Path]
) -> None:
    """Collect one tier and write it as a Minari dataset, to `out` or into Minari's store."""
    dataset_id = f"stitch/{robot}/{tier}-{VERSION}"
    target = (out or minari.storage.get_dataset_path(dataset_id)).resolve()
    look_at_place(target)
    policies = None if robot == "pointmaze" else read_policies(robot)
    if policies is None:
        env, default = maze_env(tier), 100_000 if tier == "stitch" else 200_000
        episodes, about = collect_maze(tier, env, steps or default, seed)
    else:
        env = gym.make(ENVIRONMENTS[robot])
        episodes, about = collect_tier(robot, tier, steps, seed, policies)
    about |= {"tier": tier, "collection_seed": seed, "fingerprint": fingerprint(episodes)}
    about["source"] = SOURCE
    write(episodes, dataset_id, target, about, env)
    steps = sum(len(e.rewards) for e in episodes)
    print(f"{target}: {steps:,} steps, {len(episodes):,} episodes, content {about['fingerprint']}")


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("robot", choices=(*ENVIRONMENTS, "pointmaze"))
    parser.add_argument("what", choices=dict.fromkeys(("train", *TIERS, *MAZES)))
    parser.add_argument("--steps", type=int, help="to train or record; 200,000, stitch 100,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the dataset; default: Minari's store")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the order of sums, and so every bit, depends on it
    try:
        least = 2 if args.what == "medium-expert" else 1
        if args.steps is not None and args.steps < least:
            raise CollectError(f"--steps {args.steps}: give at least {least}")
        check_seed(args.seed)
        known = MAZES if args.robot == "pointmaze" else ("train", *TIERS)
        if args.what not in known:
            raise CollectError(f"{args.robot} has no {args.what}: give one of {', '.join(known)}")
        if args.what == "train":
            train(args.robot, args.steps or 200_000, args.seed)
        else:
            record_tier(args.robot, args.what, args.steps, args.seed, args.out)
    except (CollectError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
