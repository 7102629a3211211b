"""Record a whole learning run of DQN, as REM's authors did on Atari (arXiv 1907.04543).

    python datasets/collect_dqn.py cartpole log           # learn; keep all that the learner saw
    python datasets/collect_dqn.py cartpole uniform-10    # a tenth of that log
    python datasets/collect_dqn.py minatar-breakout log   # needs pip install minatar (GPL)
    python datasets/collect_dqn.py lunarlander log        # needs pip install gymnasium[box2d]

Tiers:

    log        every transition that the learner saw, in its order, from random play to its best;
               the other tiers are made of it
    initial-P  the first P percent of the log's steps, P = 1, 10 or 50: play of a beginner
    uniform-P  P percent of the log's episodes, evenly spaced over it: play of every quality
    medium     50 episodes of a middling policy, nearly greedy (epsilon 0.05): few other actions.
               It is the policy whose evaluation came nearest to half of the best

Episodes stay whole; only the end of the log or of an initial part cuts one (it is truncated there).
The log, with those two policies in `policies.pt` beside its data, lies in Minari's store as
`stitch/<game>/log-v0`. Reference returns are means over 100 episodes: 0 = random actions,
100 = the greedy policy of the best evaluation. The same command gives the same `fingerprint` (in
the metadata) on the same machine and package versions.

The learner is Mnih et al.'s (Nature 2015): replay, a target network copied now and then, Huber's
loss, actions that are random with a probability which falls linearly from 1. Adam in place of
RMSProp. MinAtar's network is Young & Tian's (arXiv 1903.03176): 16 filters of 3 x 3, 128 units.

This is not in collect.py because nothing is shared but the writing: there the data are recorded
from policies that SAC found, here the run itself is the data.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from torch import nn
from torch.nn import functional as F

SPEC = importlib.util.spec_from_file_location(
    "collect", Path(__file__).resolve().with_name("collect.py")
)
collect = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(collect)
Problem = collect.CollectError  # something the user can mend, in one line

SHARES = (1, 10, 50)  # percent of the log
TIERS = ("log", *(f"{kind}-{share}" for kind in ("initial", "uniform") for share in SHARES))
TIERS += ("medium",)
MEDIUM_EPISODES, MEDIUM_EPSILON = 50, 0.05
EVALUATIONS = 30  # of a run, evenly spaced, 10 episodes each
EVAL_SEED = collect.EVAL_SEED
SOURCE = "collected by datasets/collect_dqn.py"


@dataclass(frozen=True)
class Game:
    """An environment and how DQN learns it."""

    env_id: str
    package: str = ""  # to install for it
    limit: Optional[int] = None  # steps of an episode, where the environment has no limit
    steps: int = 500_000  # of the log
    warmup: int = 5_000  # steps before the first update
    exploration: int = 100_000  # steps until epsilon has fallen to its end
    epsilon: float = 0.05  # its end
    memory: int = 100_000  # transitions that updates draw from
    update_every: int = 4  # steps
    copy_every: int = 1_000  # steps between two copies to the target network
    batch_size: int = 32
    gamma: float = 0.99
    lr: float = 5e-4
    error_clip: float = 1.0  # errors beyond it count linearly


# Where values reach 100, clipped errors would hardly count the few failures among them.
CARTPOLE = {"steps": 300_000, "warmup": 10_000, "exploration": 150_000, "memory": 10_000}
CARTPOLE |= {"update_every": 10, "copy_every": 500, "batch_size": 128, "lr": 2.5e-4}
CARTPOLE |= {"error_clip": 100.0}
LANDER = {"package": "gymnasium[box2d]", "steps": 200_000, "exploration": 50_000}
LANDER |= {"memory": 50_000, "update_every": 1, "copy_every": 250, "batch_size": 128}
LANDER |= {"lr": 6.3e-4, "error_clip": 100.0}
MINATAR = {"package": "minatar", "limit": 2_500, "steps": 600_000}
GAMES = {
    "cartpole": Game("CartPole-v1", **CARTPOLE),
    "lunarlander": Game("LunarLander-v3", **LANDER),
    "minatar-breakout": Game("MinAtar/Breakout-v1", **MINATAR),
    "minatar-asterix": Game("MinAtar/Asterix-v1", **MINATAR),
    "minatar-space-invaders": Game("MinAtar/SpaceInvaders-v1", **MINATAR),
}


# ---- the learner


class Network(nn.Sequential):
    """Values of all actions [B, n] from vectors [B, obs_dim] or MinAtar's images [B, 10, 10, C]."""

    def __init__(self, env: gym.Env):
        shape, actions = env.observation_space.shape, int(env.action_space.n)
        if len(shape) == 3:
            body = [nn.Conv2d(shape[2], 16, 3), nn.ReLU(), nn.Flatten()]
            body += [nn.Linear(16 * (shape[0] - 2) * (shape[1] - 2), 128), nn.ReLU()]
        else:
            body = [nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        super().__init__(*body, nn.Linear(128, actions))

    def forward(self, obs):
        obs = obs.float()
        return super().forward(obs.permute(0, 3, 1, 2) if obs.ndim == 4 else obs)

    def greedy(self, obs: np.ndarray) -> int:
        with torch.no_grad():
            return int(self(torch.as_tensor(obs)[None]).argmax())


class DQN:
    """A learner that plays: `act` chooses an action, `see` learns from what it led to."""

    def __init__(self, game: Game, env: gym.Env, seed: int, on_step: Callable[[int], None]):
        torch.manual_seed(seed)
        self.game, self.on_step, self.steps = game, on_step, 0
        self.rng = np.random.default_rng(seed)
        self.actions = int(env.action_space.n)
        self.net = Network(env)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), game.lr, fused=True)
        obs = torch.as_tensor(env.observation_space.sample())
        kinds = {"obs": obs, "action": torch.tensor(0), "reward": torch.tensor(0.0)}
        kinds |= {"next_obs": obs, "terminated": torch.tensor(0.0)}
        self.memory = {
            name: torch.zeros(game.memory, *kind.shape, dtype=kind.dtype)
            for name, kind in kinds.items()
        }

    def act(self, obs: np.ndarray) -> int:
        fallen = min(1, self.steps / self.game.exploration)
        if self.rng.random() < 1 - fallen * (1 - self.game.epsilon):
            return int(self.rng.integers(self.actions))
        return self.net.greedy(obs)

    def see(self, *transition) -> None:
        """obs, action, reward, next_obs, terminated; an update every few steps."""
        game, row = self.game, self.steps % self.game.memory
        for kept, value in zip(self.memory.values(), transition, strict=True):
            kept[row] = torch.as_tensor(value)
        self.steps += 1
        if self.steps >= game.warmup and self.steps % game.update_every == 0:
            rows = self.rng.integers(0, min(self.steps, game.memory), game.batch_size)
            rows = torch.as_tensor(rows)
            self.update(**{name: kept[rows] for name, kept in self.memory.items()})
        if self.steps % game.copy_every == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.on_step(self.steps)

    def update(self, obs, action, reward, next_obs, terminated):
        with torch.no_grad():
            next_value = self.target(next_obs).amax(-1)
        target = reward + self.game.gamma * (1 - terminated) * next_value
        value = self.net(obs).gather(-1, action[:, None])[:, 0]
        self.optimizer.zero_grad()
        F.smooth_l1_loss(value, target, beta=self.game.error_clip).backward()
        self.optimizer.step()


# ---- play


def make(game: Game) -> gym.Env:
    """The environment. Raises Problem where its package is missing."""
    if game.env_id.startswith("MinAtar/") and game.env_id not in gym.registry:
        with contextlib.suppress(ImportError):
            importlib.import_module("minatar.gym").register_envs()
    try:
        return gym.make(game.env_id, max_episode_steps=game.limit)
    except gym.error.Error as error:
        if not game.package:
            raise
        text = f"{game.env_id} does not start ({type(error).__name__})"
        raise Problem(f"{text}: pip install '{game.package}'") from None


def play(env: gym.Env, act, see=None, seed: Optional[int] = None, most=None) -> EpisodeBuffer:
    """One episode of `act(obs)`, of at most `most` steps; `see` is told every transition."""
    obs, _ = env.reset(seed=seed)
    observations, actions, rewards, terminated, truncated = [obs], [], [], False, False
    while not (terminated or truncated):
        actions.append(act(obs))
        next_obs, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(next_obs)
        rewards.append(reward)
        if see:
            see(obs, actions[-1], reward, next_obs, terminated)
        obs, truncated = next_obs, truncated or len(rewards) == most
    return as_episode(np.stack(observations), actions, rewards, terminated)


def as_episode(observations: np.ndarray, actions, rewards, terminated: bool) -> EpisodeBuffer:
    """T + 1 observations, T actions and rewards; an episode that did not terminate is truncated."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=observations,
        actions=np.asarray(actions, np.int64),
        rewards=np.asarray(rewards, np.float32),
        terminations=last & terminated,
        truncations=last & (not terminated),
    )


def record(
    game: Game, net: Optional[Network], episodes: int, epsilon: float = 0.0, seed: int = EVAL_SEED
) -> list[EpisodeBuffer]:
    """Whole episodes of the greedy policy (None: at random), but for a share `epsilon` of steps."""
    env, rng = make(game), np.random.default_rng(seed)
    actions = int(env.action_space.n)

    def act(obs):
        return int(rng.integers(actions)) if rng.random() < epsilon else net.greedy(obs)

    return [play(env, act, seed=seed + i) for i in range(episodes)]


def mean_return(episodes: list[EpisodeBuffer]) -> float:
    return float(np.mean([episode.rewards.sum() for episode in episodes]))


def learn(game: Game, steps: int, seed: int) -> tuple[list[EpisodeBuffer], list, dict]:
    """The log's episodes, the curve [(step, return)] and the networks' weights by step.

    Evaluation touches no generator that learning draws from, so a shorter run whose evaluations
    fall elsewhere is still the beginning of a longer one.
    """
    env, curve, weights = make(game), [], {}
    bar, every = collect.progress(f"DQN {game.env_id}", steps), max(1, steps // EVALUATIONS)

    def on_step(step: int) -> None:
        bar.update()
        if step % every == 0 and step >= game.warmup:
            curve.append((step, mean_return(record(game, learner.net, 10))))
            weights[step] = copy.deepcopy(learner.net.state_dict())
            print(f"step {step:,}: return {curve[-1][1]:.1f}", flush=True)

    learner, episodes = DQN(game, env, seed, on_step), []
    while learner.steps < steps:
        start = None if episodes else seed  # later ones go on with the environment's generator
        left = steps - learner.steps
        episodes.append(play(env, learner.act, learner.see, start, left))
    bar.close()
    return episodes, curve, weights


def choose(curve: list) -> tuple[int, int]:
    """Steps of the medium and the best policy: nearest to half of the best return, and the best."""
    step, best = max(curve, key=lambda point: point[1])
    return min(curve, key=lambda point: abs(point[1] - best / 2))[0], step


# ---- tiers


def make_log(name: str, steps: Optional[int], seed: int) -> tuple[list[EpisodeBuffer], dict, dict]:
    """The log's episodes, what the metadata say of them, and the policies."""
    game = GAMES[name]
    episodes, curve, weights = learn(game, steps or game.steps, seed)
    medium, best = choose(curve)
    net = Network(make(game))
    net.load_state_dict(weights[best])
    about = {
        "env_id": game.env_id,
        "algorithm": "DQN",
        "seed": seed,
        "learner_steps": steps or game.steps,
        "curve": [list(point) for point in curve],
        "medium_step": medium,
        "best_step": best,
        "ref_min_score": mean_return(record(game, None, 100, epsilon=1.0)),
        "ref_max_score": mean_return(record(game, net, 100)),
    }
    return episodes, about, {"medium": weights[medium], "best": weights[best]}


def cut(episodes: list[EpisodeBuffer], tier: str) -> list[EpisodeBuffer]:
    """The part of a log that a tier is: initial-P or uniform-P."""
    kind, share = tier.split("-")
    if kind == "uniform":
        count = max(1, round(len(episodes) * int(share) / 100))
        return [episodes[i] for i in np.linspace(0, len(episodes) - 1, count).round().astype(int)]
    ends = list(itertools.accumulate(len(episode.rewards) for episode in episodes))
    steps = max(1, round(ends[-1] * int(share) / 100))
    last = int(np.searchsorted(ends, steps))
    episode, keep = episodes[last], len(episodes[last].rewards) - (ends[last] - steps)
    terminated = bool(episode.terminations[keep - 1])
    arrays = episode.observations[: keep + 1], episode.actions[:keep], episode.rewards[:keep]
    return [*episodes[:last], as_episode(*arrays, terminated)]


def read_log(name: str) -> tuple[list[EpisodeBuffer], dict, dict]:
    """The stored log: as `make_log` gave it. Raises Problem where there is none."""
    folder = minari.storage.get_dataset_path(dataset_id(name, "log"))
    if not (folder / "data" / "metadata.json").is_file() or not (folder / "policies.pt").is_file():
        raise Problem(f"{folder} has no log: run 'python datasets/collect_dqn.py {name} log' first")
    keys = ("env_id", "algorithm", "seed", "learner_steps", "medium_step", "best_step")
    keys += ("ref_min_score", "ref_max_score")
    try:
        storage = MinariStorage.read(folder / "data")
        about = {key: storage.metadata[key] for key in keys}
        stored = storage.get_episodes(range(storage.total_episodes))
        episodes = [EpisodeBuffer(**{key: each[key] for key in collect.ARRAYS}) for each in stored]
        return episodes, about, torch.load(folder / "policies.pt", weights_only=True)
    except Exception as error:  # h5py, Minari and torch each have errors of their own
        text = f"{folder} cannot be read ({type(error).__name__})"
        raise Problem(f"{text}: move it away and record the log again") from None


def dataset_id(name: str, tier: str) -> str:
    return f"stitch/{name}/{tier}-{collect.VERSION}"


def record_tier(name: str, tier: str, steps: Optional[int], seed: int, out: Optional[Path]) -> None:
    """Write one tier as a Minari dataset, to `out` or into Minari's store."""
    target = (out or minari.storage.get_dataset_path(dataset_id(name, tier))).resolve()
    collect.look_at_place(target)
    game, env = GAMES[name], make(GAMES[name])
    episodes, about, policies = make_log(name, steps, seed) if tier == "log" else read_log(name)
    if tier == "medium":
        net = Network(env)
        net.load_state_dict(policies["medium"])
        episodes = record(game, net, MEDIUM_EPISODES, MEDIUM_EPSILON, seed)
        about["epsilon"] = MEDIUM_EPSILON
    elif tier != "log":
        episodes = cut(episodes, tier)
    about |= {"tier": tier, "collection_seed": seed, "fingerprint": collect.fingerprint(episodes)}
    about["description"] = (
        f"{name} {tier} in {game.env_id}, {SOURCE}: DQN's learning run of "
        f"{about['learner_steps']:,} steps. A score of 100 is the return of the best policy of "
        "that run, 0 that of random actions."
    )
    about |= {"source": SOURCE, "code_permalink": "datasets/collect_dqn.py"}
    collect.write(episodes, dataset_id(name, tier), target, about, env, env.observation_space)
    if tier == "log":
        torch.save(policies, target / "policies.pt")
    total = sum(len(e.rewards) for e in episodes)
    print(f"{target}: {total:,} steps, {len(episodes):,} episodes, content {about['fingerprint']}")


def main(argv=None) -> int:
    """Exit code: 0, or 2 after an error (one line on stderr)."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("game", choices=GAMES)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--steps", type=int, help="to learn, for a log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the dataset; default: Minari's store")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the order of sums, and so every bit, depends on it
    try:
        least = 2 * GAMES[args.game].warmup  # so that there are evaluations to choose from
        if args.steps is not None and (args.tier != "log" or args.steps < least):
            raise Problem(f"--steps {args.steps}: give at least {least}, and only with log")
        collect.check_seed(args.seed)
        record_tier(args.game, args.tier, args.steps, args.seed, args.out)
    except (Problem, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
