"""Behavioural proofs: small experiments that show that each algorithm does what its paper is about.

    python benchmarks/proofs/prove.py                    # all, into benchmarks/proofs/results
    python benchmarks/proofs/prove.py awac_temperature bcq_support --out /tmp/proofs

Each proof trains scripts of algorithms/ with four seeds on the CPU and measures one claim by a
criterion that is written down here, before the numbers. DIR/<proof>.json holds the claim, the
criterion, every command line, the numbers of every seed and whether the claim holds;
DIR/proofs.png shows all of them that lie there. Exit code: 0 all claims hold, 1 one does not, 2 bad
input.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import sys
import tempfile
import textwrap
import time
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2, 3)
REPLAY = "datasets/hopper/medium-replay-v0"
MAZE = "datasets/pointmaze/stitch-v0"
COMMON = {
    "download": "false",
    "env_id": "none",
    "device": "cpu",
    "compile": "false",
    "seed": SEEDS[0],
    "num_seeds": len(SEEDS),
    "log_every": 500,
}
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")  # Tol, bright


class ProofError(Exception):
    """Something the user can mend."""


# ---- proofs: numbers are {measure: {setting: [a value for each seed]}} ----


@dataclass
class Proof:
    claim: str
    criterion: str  # `holds` in words
    seconds: float  # on one core of 2020's, for the time left
    holds: typing.Callable  # numbers -> whether the claim holds
    axes: tuple  # of the picture: x, y, scale of y (symlog: and what it shows as linear)
    measure: typing.Callable  # lab -> numbers


PROOFS = {}


def proof(**about):
    """Enter a function into the list of proofs."""

    def register(function):
        PROOFS[function.__name__] = Proof(measure=function, **about)
        return function

    return register


def rows(measure: dict) -> np.ndarray:
    """[settings, seeds]"""
    return np.array(list(measure.values()), np.float64)


def falls(values: np.ndarray) -> bool:
    """Whether values [settings, seeds] fall from each setting to the next, in every seed."""
    return bool((np.diff(values, axis=0) < 0).all())


def spearman(x, y) -> float:
    """Rank correlation; equal values share a rank, 0 where all values are equal."""
    ranks = [[np.less(v, a).sum() + np.equal(v, a).sum() / 2 for a in v] for v in (x, y)]
    return round(float(np.corrcoef(ranks)[0, 1]), 9) if np.std(ranks, axis=1).all() else 0.0


def cloning_is_neared(numbers: dict) -> bool:
    distance = rows(numbers["distance to BC"])
    return falls(distance) and bool(distance[-1].max() < 1e-6)


@proof(
    claim="As alpha falls, TD3+BC's policy nears the one of behaviour cloning.",
    criterion="In every seed the mean squared distance of the actions to BC's falls from alpha 2.5 "
    "to 0.25, 0.025 and 0, where it is below 1e-6. At policy_delay 1, so that both see the same "
    "batches; how far other batches alone move a cloned policy is shown beside it.",
    seconds=75,
    holds=cloning_is_neared,
    axes=("alpha", "mean squared distance", "symlog", 1e-5),
)
def td3_bc_alpha(lab) -> dict:
    """With the paper's delay of 2 the policy moves on every second batch only."""
    small = {"dataset_id": REPLAY, "hidden_dim": 64, "batch_size": 128}
    obs, distance = lab.observations(REPLAY), {}
    bc = lab.train("bc", **small, num_updates=2000).act(obs)
    for alpha, delay in ((2.5, 1), (0.25, 1), (0.025, 1), (0, 1), (0, 2)):
        words = {"alpha": alpha, "policy_delay": delay, "num_updates": 2000 * delay}
        policy = lab.train("td3_bc", **small, **words).act(obs)
        distance[alpha, delay] = (policy - bc).square().mean((-2, -1)).tolist()
    other = {"0": distance.pop((0, 2))}
    same = {str(alpha): values for (alpha, _), values in distance.items()}
    return {"distance to BC": same, "distance by other batches alone": other}


def behaviour_is_neared(numbers: dict) -> bool:
    divergence, distance = rows(numbers["KL divergence from b"]), rows(numbers["distance to b"])
    ranks = [spearman(range(len(divergence)), seed) for seed in divergence.T]
    return max(ranks) <= -0.9 and bool((distance[-1] <= 0.1 * distance[0]).all())


@proof(
    claim="As alpha grows, BRAC's policy nears the fitted behaviour policy b.",
    criterion="In every seed the rank correlation of alpha and the KL divergence from b is at most "
    "-0.9, and the mean squared distance of the mean actions to b's is at the largest alpha at "
    "most a tenth of that at the smallest.",
    seconds=400,
    holds=behaviour_is_neared,
    axes=("alpha", "KL divergence, squared distance", "log"),
)
def brac_alpha(lab) -> dict:
    small = {"dataset_id": REPLAY, "hidden_dim": 64, "critic_hidden_dim": 64, "batch_size": 128}
    small |= {"behavior_updates": 1500, "warm_start": 0, "actor_lr": 3e-4, "critic_lr": 3e-4}
    obs, divergence, distance = lab.observations(REPLAY), {}, {}
    for alpha in (0.1, 1, 10, 100, 10_000):
        run = lab.train("brac", **small, alpha=alpha, num_updates=4000)
        divergence[str(alpha)] = run.last("train/divergence")
        with torch.no_grad():
            mean, _ = run.agent.behavior(run.agent.normalize(obs))
        b = run.agent.env_action(mean.tanh())
        distance[str(alpha)] = (run.act(obs) - b).square().mean((-2, -1)).tolist()
    return {"KL divergence from b": divergence, "distance to b": distance}


@proof(
    claim="As its temperature falls, AWAC's weights concentrate on fewer samples.",
    criterion="In every seed the effective share of the samples of a batch falls from each "
    "temperature to the next.",
    seconds=70,
    holds=lambda numbers: falls(rows(numbers["effective share of the samples"])),
    axes=("awr_temperature", "share", "log"),
)
def awac_temperature(lab) -> dict:
    small = {"dataset_id": REPLAY, "hidden_dim": 64, "hidden_layers": 2, "batch_size": 128}
    shares = {}
    for temperature in (100, 10, 2, 0.5, 0.1):
        run = lab.train("awac", **small, awr_temperature=temperature, num_updates=3000)
        shares[str(temperature)] = run.last("train/effective_sample_share")
    return {"effective share of the samples": shares}


def middle(obs: np.ndarray) -> np.ndarray:
    """The centre of the bandit's actions at states [N, 1]."""
    return 0.4 * np.sin(np.pi * obs)


def one_step(obs: np.ndarray, action: np.ndarray, reward: np.ndarray) -> EpisodeBuffer:
    """An episode of one step: obs, action and reward [1]."""
    return EpisodeBuffer(
        observations=obs.repeat(2)[:, None],
        actions=action[None].astype(np.float32),
        rewards=reward.copy(),
        terminations=np.array([True]),
        truncations=np.array([False]),
    )


def write_bandit(lab, width: float, act_dim: int = 1) -> str:
    """One-step episodes, a = f(s) + U(-width, width), r = mean a: better actions lie outside."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)
    spread = rng.uniform(-width, width, (len(obs), act_dim))
    actions = (middle(obs) + spread).astype(np.float32)
    pairs = zip(obs, actions, strict=True)
    episodes = [one_step(s, a, a.mean(keepdims=True)) for s, a in pairs]
    return lab.write_dataset("proofs/bandit-v0", episodes, obs_dim=1, act_dim=act_dim)


@proof(
    claim="BCQ's actions stay on the support of the data, where TD3 leaves it for a better Q.",
    criterion="In every seed at least 95 % of BCQ's actions lie within the support widened by Phi, "
    "and at most 20 % of TD3's.",
    seconds=250,
    holds=lambda numbers: (
        min(numbers["share on the support"]["BCQ"]) >= 0.95
        and max(numbers["share on the support"]["TD3"]) <= 0.2
    ),
    axes=("", "share of states", "linear"),
)
def bcq_support(lab) -> dict:
    """A contextual bandit; TD3 is TD3+BC with a huge alpha."""
    width, phi, share = 0.2, 0.05, {}
    small = {"dataset_id": write_bandit(lab, width), "hidden_dim": 64, "num_updates": 4000}
    bcq = {"max_perturbation": phi, "last_hidden_dim": 64, "vae_hidden_dim": 64}
    obs = torch.linspace(-1, 1, 1001).unsqueeze(-1).expand(len(SEEDS), -1, -1)
    for name, script, settings in (("BCQ", "bcq", bcq), ("TD3", "td3_bc", {"alpha": 1e6})):
        action = lab.train(script, **small, batch_size=128, **settings).act(obs)
        away = np.abs(action.numpy() - middle(obs.numpy()))
        share[name] = (away <= width + phi).mean((-2, -1)).tolist()
    return {"share on the support": share}


def soft_maximum(beta: float, width: float) -> float:
    """beta log E[exp(u / beta)] of u ~ U(-width, width)."""
    return beta * float(np.log(np.sinh(width / beta) * beta / width))


def soft_maximum_is_neared(numbers: dict) -> bool:
    fitted, exact = (rows(numbers[name]) for name in ("X-QL", "soft maximum"))
    near = np.abs(fitted - exact).max() <= 0.05
    return bool(near and (fitted[-1] > rows(numbers["IQL"])[1]).all()) and falls(-fitted)


@proof(
    claim="X-QL's V is the soft maximum of the values, and nears their maximum as beta falls.",
    criterion="In every seed the mean of V is within 0.05 of the soft maximum of the rewards (they "
    "span 1) at each beta, rises as beta falls, and lies at the smallest beta above that of IQL at "
    "its largest published expectile, 0.9. IQL at 0.99 is reported as it is.",
    seconds=150,
    holds=soft_maximum_is_neared,
    axes=("", "V - f(s); the maximum is 0.5", "linear"),
)
def xql_soft_maximum(lab) -> dict:
    """The bandit, whose rewards are uniform within f(s) +- 0.5: the soft maximum has a formula."""
    width, values = 0.5, {"X-QL": {}, "soft maximum": {}, "IQL": {}}
    small = {"dataset_id": write_bandit(lab, width), "hidden_dim": 32, "num_updates": 1000}
    small |= {"batch_size": 128, "critic_lr": 3e-3, "value_lr": 3e-3, "tau": 0.05}
    obs = torch.linspace(-1, 1, 1001).unsqueeze(-1).expand(len(SEEDS), -1, -1)
    centre = torch.as_tensor(middle(obs.numpy())).squeeze(-1)
    for beta in (5, 0.5, 0.05, 0.015):
        agent = lab.train("xql", **small, gumbel_temperature=beta).agent
        with torch.no_grad():
            values["X-QL"][f"beta {beta}"] = (agent.value(obs) - centre).mean(-1).tolist()
        values["soft maximum"][f"beta {beta}"] = [soft_maximum(beta, width)] * len(SEEDS)
    for expectile in (0.7, 0.9, 0.99):
        agent = lab.train("iql", **small, expectile=expectile).agent
        with torch.no_grad():
            values["IQL"][f"tau {expectile}"] = (agent.v(obs) - centre).mean(-1).tolist()
    return values


def peaks_are_kept(numbers: dict) -> bool:
    on, better = (numbers[f"share on {name} peak"] for name in ("a", "the better"))
    mixed, chosen = better["FQL, alpha 100"], better["FQL, alpha 0.03"]
    kept = max(on["BC"]) <= 0.1 and min(on["FQL, alpha 100"]) >= 0.8
    return kept and 0.3 <= min(mixed) and max(mixed) <= 0.7 and min(chosen) >= 0.9


def write_peaks(lab) -> str:
    """One-step episodes, a = +-0.6 + U(-0.1, 0.1), r = 1 - (a - 0.6)^2."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)
    actions = 0.6 * rng.choice([-1, 1], obs.shape) + rng.uniform(-0.1, 0.1, obs.shape)
    episodes = [one_step(s, a, 1 - (a - 0.6) ** 2) for s, a in zip(obs, actions, strict=True)]
    return lab.write_dataset("proofs/peaks-v0", episodes, obs_dim=1, act_dim=1)


@proof(
    claim="Where a behaviour has two peaks, FQL keeps to them and takes the better one; BC goes "
    "between.",
    criterion="In every seed at most 10 % of BC's actions lie on a peak; at alpha 100, near to "
    "cloning, at least 80 % of FQL's do and 30 to 70 % on the better one; at alpha 0.03 at least "
    "90 % lie on the better one. On a peak is within 0.2 of its centre.",
    seconds=130,
    holds=peaks_are_kept,
    axes=("", "share of actions", "linear"),
)
def fql_peaks(lab) -> dict:
    """A contextual bandit; FQL's actions are those of new noise in each state."""
    small = {"dataset_id": write_peaks(lab), "hidden_dim": 64, "hidden_layers": 2}
    small |= {"batch_size": 64, "num_updates": 3000, "actor_lr": 1e-3}
    obs = torch.linspace(-1, 1, 1000).unsqueeze(-1).expand(len(SEEDS), -1, -1)
    noise = torch.randn(obs.shape, generator=torch.Generator().manual_seed(0))
    actions = {"BC": lab.train("bc", **small).act(obs)}
    for alpha in (100, 0.03):
        run = lab.train("fql", **small, critic_lr=1e-3, alpha=alpha)
        actions[f"FQL, alpha {alpha}"] = run.agent.explore(obs, noise)
    on = {name: (action.abs() - 0.6).abs() <= 0.2 for name, action in actions.items()}
    better = {name: (action - 0.6).abs() <= 0.2 for name, action in actions.items()}
    shares = {"share on a peak": on, "share on the better peak": better}
    return {
        measure: {name: v.float().mean((-2, -1)).tolist() for name, v in each.items()}
        for measure, each in shares.items()
    }


def half_as_many_critics_do(numbers: dict) -> bool:
    cosine, spread = (
        [rows(numbers[f"{measure}, {name}"]) for name in ("SAC-N", "EDAC")]
        for measure in ("cosine", "pessimism")
    )
    apart, pessimistic = cosine[1] < cosine[0], spread[1][:-1] >= spread[0][1:]
    return bool(apart.all() and pessimistic.all())


@proof(
    claim="EDAC's critics differ in their slopes at the data's actions, and half as many of them "
    "are as pessimistic about other actions as SAC-N's.",
    criterion="In every seed and for 2, 5 and 10 critics the mean cosine of two critics' gradients "
    "by the action, at the data's, is lower with eta 1 than with 0; and the pessimism, mean_i Q_i "
    "- min_i Q_i at uniform actions minus the same at the data's, of 2 and 5 critics with eta is "
    "at least that of 5 and 10 without.",
    seconds=200,
    holds=half_as_many_critics_do,
    axes=("critics", "cosine, pessimism", "linear"),
)
def edac_diversity(lab) -> dict:
    """A contextual bandit of three action dimensions, where nothing bootstraps."""
    small = {"dataset_id": write_bandit(lab, width=0.1, act_dim=3), "hidden_dim": 32}
    small |= {"hidden_layers": 2, "batch_size": 64, "critic_lr": 1e-3, "num_updates": 1500}
    obs, numbers = lab.observations(small["dataset_id"]), {}
    action = torch.as_tensor(middle(obs.numpy())).expand(-1, -1, 3)
    other = 2 * torch.rand(action.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    for (name, eta), count in itertools.product((("SAC-N", 0), ("EDAC", 1)), (2, 5, 10)):
        agent = lab.train("edac", **small, eta=eta, num_critics=count).agent
        agent.cfg.eta = 1.0  # so that SAC-N says, too, how similar its critics are
        _, of_data = agent.critic_loss(torch.zeros(obs.shape[:2]), obs, action)
        pairs = [torch.cat([obs, a.expand_as(action)], -1).unsqueeze(1) for a in (other, action)]
        with torch.no_grad():
            above = [(q.mean(1) - q.amin(1)).mean(-1) for q in map(agent.critic, pairs)]
        found = {"cosine": of_data["similarity"].detach(), "pessimism": above[0] - above[1]}
        for measure, values in found.items():
            numbers.setdefault(f"{measure}, {name}", {})[str(count)] = values.tolist()
    return dict(sorted(numbers.items()))


def peak(obs: np.ndarray) -> np.ndarray:
    """The better peak of the two-peaked bandit's actions at states [N, 1]; the other is minus it.

    How far it lies from the mean of the actions, 0, depends on the state.
    """
    return 0.45 + 0.2 * np.sin(np.pi * obs)


def write_two_peaks(lab, width: float) -> str:
    """a = peak(s) + U(-width, width) or -peak(s) + U(-width, width), as often."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (2000, 1))
    actions = rng.choice([-1, 1], obs.shape) * peak(obs) + rng.uniform(-width, width, obs.shape)
    obs, actions = np.float32(obs), np.float32(actions)
    episodes = [one_step(s, a, a) for s, a in zip(obs, actions, strict=True)]
    return lab.write_dataset("proofs/two-peaks-v0", episodes, obs_dim=1, act_dim=1)


def better_peak_is_kept(numbers: dict) -> bool:
    spot, td3, *td3_bc = rows(numbers["share on the better peak"])
    return bool(spot.min() >= 0.9 and td3.max() <= 0.2 and np.max(td3_bc) <= 0.7)


@proof(
    claim="SPOT takes the better of two peaks of the data, where TD3 leaves the data for a better "
    "Q and TD3+BC keeps a distance from the mean action.",
    criterion="In every seed at least 90 % of SPOT's actions lie on the better peak widened by "
    "0.05, at most 20 % of TD3's and at most 70 % of TD3+BC's at each alpha.",
    seconds=200,
    holds=better_peak_is_kept,
    axes=("", "share of states", "linear"),
)
def spot_peaks(lab) -> dict:
    """A contextual bandit; beta is small so that the VAE tells the peaks apart.

    Its decoder's deviation is sqrt(beta / 4): 0.07 here, 0.35 at the authors' 0.5. lambda is
    larger for it (D2 of the script). TD3 is TD3+BC with a huge alpha, 2.5 is the paper's.
    """
    width, share = 0.1, {}
    small = {"dataset_id": write_two_peaks(lab, width), "hidden_dim": 64, "batch_size": 128}
    spot = {"vae_hidden_dim": 64, "vae_updates": 1500, "num_updates": 4000, "actor_dropout": 0}
    runs = {"SPOT": ("spot", {**spot, "kl_weight": 0.02, "penalty": 20})}
    for name, alpha in (("TD3", 1e6), ("+BC 2.5", 2.5), ("+BC 0.5", 0.5), ("+BC 0.25", 0.25)):
        runs[name] = ("td3_bc", {"alpha": alpha, "num_updates": 2500})
    obs = torch.linspace(-1, 1, 1001).unsqueeze(-1).expand(len(SEEDS), -1, -1)
    for name, (script, settings) in runs.items():
        action = lab.train(script, **small, **settings).act(obs)
        away = np.abs(action.numpy() - peak(obs.numpy()))
        share[name] = (away <= width + 0.05).mean((-2, -1)).tolist()
    return {"share on the better peak": share}


def values_are_bounded(numbers: dict) -> bool:
    learned, true = (rows(numbers[name]) for name in ("learned value", "true value"))
    return bool((learned[0] < true[0]).all() and (learned[1] > true[1]).all())


def write_pendulum(lab) -> str:
    """Episodes of a PD controller whose noise is small: what other actions do is not shown."""
    rng, env, episodes = np.random.default_rng(0), gym.make("Pendulum-v1"), []
    for number in range(100):
        obs, actions, rewards, ended = [env.reset(seed=number)[0]], [], [], False
        while not ended:
            torque = -2 * np.arctan2(obs[-1][1], obs[-1][0]) - 0.5 * obs[-1][2]
            actions.append(np.float32([np.clip(torque / 2 + rng.normal(scale=0.1), -1, 1)]))
            step_obs, reward, _, ended, _ = env.step(2 * actions[-1])
            obs.append(step_obs)
            rewards.append(reward)
        ends = np.arange(len(rewards)) == len(rewards) - 1
        flags = {"terminations": np.zeros_like(ends), "truncations": ends}
        arrays = {"observations": np.array(obs), "actions": np.array(actions), "rewards": rewards}
        episodes.append(EpisodeBuffer(**arrays, **flags))
    return lab.write_dataset("proofs/pendulum-v0", episodes, obs_dim=3, act_dim=1)


def pendulum_values(run, obs: torch.Tensor, steps: int = 150) -> list:
    """The mean discounted return of a run's policy from obs [S, N, 3], for each seed."""
    env, total = gym.make("Pendulum-v1").unwrapped, torch.zeros(obs.shape[:-1])
    env.reset(seed=0)
    obs = obs.clone()
    for step in range(steps):
        action = 2 * run.act(obs)
        for at in np.ndindex(*total.shape):
            cos, sin, speed = obs[at].tolist()
            env.state = np.array([np.arctan2(sin, cos), speed])
            after, reward, *_ = env.step(action[at].numpy())
            obs[at] = torch.as_tensor(after)
            total[at] += run.cfg.gamma**step * float(reward)
    return total.mean(-1).tolist()


@proof(
    claim="CQL's values lie below the true ones of its policy, unregularised SAC's above.",
    criterion="In every seed the mean of min_i Q_i(s, pi(s)) over states of the data is below the "
    "mean discounted return of the policy from these states for CQL, above it for SAC (alpha 0).",
    seconds=300,
    holds=values_are_bounded,
    axes=("", "value", "linear"),
)
def cql_pessimism(lab) -> dict:
    """Pendulum, where any state of the data can be a start; pi(s) is the policy's mean action."""
    small = {"dataset_id": write_pendulum(lab), "hidden_dim": 64, "batch_size": 64, "gamma": 0.95}
    small |= {"hidden_layers": 2, "critic_hidden_layers": 2, "bc_updates": 0, "num_actions": 4}
    small |= {"entropy_coef": 0.01, "learn_entropy_coef": "false", "actor_lr": 3e-4, "tau": 0.01}
    obs = lab.observations(small["dataset_id"])[:, ::20]
    learned, true = {}, {}
    for name, alpha in (("CQL", 5), ("SAC", 0)):
        run = lab.train("cql", **small, alpha=alpha, num_updates=8000)
        with torch.no_grad():
            q = run.agent.q(run.agent.critic, obs, run.act(obs).unsqueeze(1))
        learned[name] = q.amin(1).mean((-2, -1)).tolist()
        true[name] = pendulum_values(run, obs)
    return {"learned value": learned, "true value": true}


def parts_are_joined(numbers: dict) -> bool:
    reached = numbers["share of episodes that reach the goal"]
    return max(reached["BC"] + reached["DT"]) <= 0.1 and min(reached["IQL"]) >= 0.8


@proof(
    claim="IQL joins parts of episodes to a way that none of them goes; BC and DT cannot.",
    criterion="In every seed at least 80 % of the episodes reach the goal with IQL, and at most "
    "10 % with BC and with DT. TD3+BC and AWAC are reported as they are.",
    seconds=4000,
    holds=parts_are_joined,
    axes=("", "share of episodes", "linear"),
)
def stitching(lab) -> dict:
    """The bundled maze: values alone tell to turn right, where most episodes turn left."""
    maze = {"dataset_id": MAZE, "env_id": "auto", "hidden_dim": 128, "eval_every": 10_000}
    maze |= {"eval_episodes": 20, "final_eval_episodes": 50}
    values = {"reward_scale": 100, "batch_size": 256, "num_updates": 20_000}
    sequences = {"context": 20, "hidden_dim": 64, "hidden_layers": 2, "target_returns": "1"}
    sequences |= {"return_scale": 1, "warmup_updates": 300, "actor_lr": 1e-3}
    settings = {
        "BC": ("bc", {"num_updates": 10_000}),
        "DT": ("dt", {**sequences, "num_updates": 10_000}),
        "IQL": ("iql", {**values, "expectile": 0.9, "inverse_temperature": 10}),
        "TD3+BC": ("td3_bc", values),
        "AWAC": ("awac", {**values, "hidden_layers": 2}),
    }
    runs = {name: lab.train(script, **{**maze, **own}) for name, (script, own) in settings.items()}
    reached = {name: run.result("eval/return") for name, run in runs.items()}
    return {"share of episodes that reach the goal": reached}


def returns_follow(numbers: dict) -> bool:
    returns = rows(numbers["achieved return"])
    return float(np.mean([spearman(range(len(returns)), seed) for seed in returns.T])) >= 0.7


@proof(
    claim="The return that Decision Transformer achieves rises with the return it is asked for.",
    criterion="The rank correlation of target and mean return is at least 0.7, mean over seeds.",
    seconds=4000,
    holds=returns_follow,
    axes=("target, % of the data's best return", "return", "linear"),
)
def dt_targets(lab) -> dict:
    small = {"dataset_id": REPLAY, "env_id": "auto", "hidden_dim": 64, "hidden_layers": 2}
    small |= {"context": 20, "actor_lr": 1e-3, "warmup_updates": 300, "num_updates": 10_000}
    targets = [f"{share}%" for share in (10, 23, 36, 49, 61, 74, 87, 100)]
    small |= {"target_returns": ", ".join(targets), "eval_every": 10**9, "final_eval_episodes": 50}
    run = lab.train("dt", **small)
    names = ["eval/return"] + [f"eval/return_target_{i}" for i in range(2, len(targets) + 1)]
    return {"achieved return": {t: run.result(n) for t, n in zip(targets, names, strict=True)}}


def write_cartpole(lab, name: str, episodes: int, wide: bool) -> str:
    """Play of a good controller of which a share is random: 5 %, or between none and all of it."""
    rng, env, played = np.random.default_rng(0), gym.make("CartPole-v1"), []
    for number in range(episodes):
        obs, actions, ends = [env.reset(seed=number)[0]], [], [False, False]
        share = rng.random() if wide else 0.05
        while not any(ends):
            push = int(np.dot((0.05, 0.1, 1, 0.5), obs[-1]) > 0)
            actions.append(int(rng.integers(2)) if rng.random() < share else push)
            step_obs, _, *ends, _ = env.step(actions[-1])
            obs.append(step_obs)
        last = np.arange(len(actions)) == len(actions) - 1
        flags = {"terminations": last & ends[0], "truncations": last & (not ends[0])}
        arrays = {"observations": np.array(obs), "actions": np.array(actions)}
        played.append(EpisodeBuffer(**arrays, rewards=np.ones(len(actions), np.float32), **flags))
    return lab.write_dataset(f"proofs/{name}-v0", played, obs_dim=4, actions=env.action_space)


def constraint_is_needed(numbers: dict) -> bool:
    returns = numbers["return"]
    held = returns["discrete CQL"] + returns["discrete BCQ"]
    return max(returns["DQN"]) <= 100 and min(held) >= 400


@proof(
    claim="On the narrow log of one good policy DQN fails; discrete CQL and discrete BCQ do not.",
    criterion="In every seed the mean return is at most 100 with DQN and at least 400 of 500 with "
    "discrete CQL and with discrete BCQ. DQN on a log of play of every quality is shown beside it.",
    seconds=300,
    holds=constraint_is_needed,
    axes=("", "return", "linear"),
)
def discrete_narrow(lab) -> dict:
    """CartPole: 40 episodes of 500 steps with 5 % random actions; play of every quality: 80."""
    narrow, wide = write_cartpole(lab, "narrow", 40, False), write_cartpole(lab, "wide", 80, True)
    small = {"env_id": "CartPole-v1", "hidden_dim": 64, "batch_size": 64, "num_updates": 5000}
    small |= {"eval_every": 10**9, "final_eval_episodes": 20, "eval_epsilon": 0}
    runs = {
        "DQN": lab.train("dqn", **small, dataset_id=narrow),
        "discrete CQL": lab.train("discrete_cql", **small, dataset_id=narrow, quantiles=20),
        "discrete BCQ": lab.train("discrete_bcq", **small, dataset_id=narrow),
        "DQN, every quality": lab.train("dqn", **small, dataset_id=wide),
    }
    return {"return": {name: run.result("eval/return") for name, run in runs.items()}}


def mixtures_are_better(numbers: dict) -> bool:
    dqn, rem = (np.array(numbers["return"][name]) for name in ("DQN", "REM"))
    return rem.mean() > dqn.mean() and int((rem > dqn).sum()) >= 3


@proof(
    claim="On a wide log REM finds better policies than DQN.",
    criterion="REM's mean return over the seeds is above DQN's, and it is in at least three of "
    "four seeds. QR-DQN is reported as it is.",
    seconds=900,
    holds=mixtures_are_better,
    axes=("", "return", "linear"),
)
def rem_wide(lab) -> dict:
    """CartPole: 200 episodes of play of every quality."""
    small = {"dataset_id": write_cartpole(lab, "wide", 200, True), "env_id": "CartPole-v1"}
    small |= {"hidden_dim": 64, "batch_size": 64, "num_updates": 10_000, "eval_epsilon": 0}
    small |= {"eval_every": 10**9, "final_eval_episodes": 50}
    heads = {"DQN": {}, "QR-DQN": {"head": "qr_dqn", "heads": 50}, "REM": {"head": "rem"}}
    runs = {name: lab.train("dqn", **small, **own) for name, own in heads.items()}
    return {"return": {name: run.result("eval/return") for name, run in runs.items()}}


# ---- helpers: what proofs are made of ----


def load_script(name: str):
    """A script of algorithms/ as a module, loaded once."""
    key = f"algorithms.{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, REPOSITORY / "algorithms" / f"{name}.py")
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


class Trained:
    """A finished run folder with its agent; lists hold a value for each seed."""

    def __init__(self, module, folder: Path):
        self.folder, saved = folder, module.read_checkpoint(folder)
        self.cfg, kind = module.TrainConfig(**saved["config"]), saved["about"]["algorithm"]
        units = {name: saved["agent"][name] for name in vars(module)[kind].units}
        self.agent = vars(module)[kind](self.cfg, units)
        self.agent.load_state_dict(saved["agent"])

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions [S, N, act_dim] at obs [S, N, obs_dim], in the environment's units."""
        return self.agent.act(obs)

    def last(self, name: str) -> list:
        """A training metric, mean over the last log interval."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = {row["seed"]: row[name] for row in map(json.loads, lines) if name in row}
        return [found[seed] for seed in SEEDS]

    def result(self, name: str) -> list:
        """A mean of the final evaluation."""
        result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return [{row["seed"]: row for row in result["last"]}[seed][name] for seed in SEEDS]


class Lab:
    """Trains in a temporary folder, and keeps a record of every run.

    `changes` replace settings of every run whose script has them: for quick tests.
    """

    def __init__(self, folder: Path, say=print, changes: typing.Optional[dict] = None):
        self.folder, self.say, self.changes, self.runs = folder, say, changes or {}, []
        self.commit = None

    def train(self, script: str, **settings) -> Trained:
        """Run a script to its end; its own output goes to a file of the folder."""
        module, folder = load_script(script), self.folder / f"run{len(self.runs)}"
        known = module.TrainConfig.__dataclass_fields__
        settings = {**COMMON, **settings}
        settings |= {name: value for name, value in self.changes.items() if name in known}
        words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        self.say(f"{script}, {settings['num_updates']:,} updates x {len(SEEDS)} seeds")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = module.main([*words, "--run_dir", str(folder)])
        if code:
            raise ProofError(f"{script} ended with exit code {code}: {' '.join(words)}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        self.commit = result["commit"]
        record = {"command": " ".join(["python", f"algorithms/{script}.py", *map(quote, words)])}
        names = ("dataset_id", "fingerprint", "seconds")
        record |= {"updates": result["num_updates"], **{name: result[name] for name in names}}
        self.runs.append(record)
        return Trained(module, folder)

    def observations(self, dataset_id: str) -> torch.Tensor:
        """2,000 observations of a dataset for every seed [S, N, obs_dim], evenly spaced."""
        module = load_script("bc")
        episodes, *_ = module.load_dataset(module.TrainConfig(dataset_id, download=False))
        obs = np.concatenate([episode["obs"][:-1] for episode in episodes])
        obs = torch.as_tensor(obs[np.linspace(0, len(obs) - 1, 2000).astype(int)])
        return obs.expand(len(SEEDS), -1, -1)

    def write_dataset(self, dataset_id: str, episodes, obs_dim, act_dim=1, actions=None) -> str:
        """Write episodes to the temporary store; returns the id. Else actions are in [-1, 1]."""
        spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)}
        spaces["action_space"] = actions or gym.spaces.Box(-1, 1, (act_dim,), np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari advises on optional metadata
            minari.create_dataset_from_buffers(dataset_id, episodes, **spaces)
        return dataset_id


def quote(word: str) -> str:
    return f"'{word}'" if " " in word or not word else word


@contextlib.contextmanager
def temporary_store():
    """A temporary folder, whose `store` is Minari's store meanwhile."""
    old = os.environ.get("MINARI_DATASETS_PATH")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(folder, "store"))
        try:
            yield Path(folder)
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if old is not None:
                os.environ["MINARI_DATASETS_PATH"] = old


# ---- the command ----


def run_proof(name: str, say=print, changes: typing.Optional[dict] = None) -> dict:
    """What DIR/<name>.json holds."""
    about, began = PROOFS[name], time.perf_counter()
    with temporary_store() as folder:
        lab = Lab(folder, say, changes)
        numbers = about.measure(lab)
    return {
        "proof": name,
        "claim": about.claim,
        "criterion": about.criterion,
        "holds": about.holds(numbers),
        "numbers": numbers,
        "seeds": SEEDS,
        "runs": lab.runs,
        "commit": lab.commit,
        "seconds": round(time.perf_counter() - began, 1),
    }


def progress(name: str, todo: list, done: list):
    """A function that prints a line with the time left, from how long earlier proofs took."""
    began = time.perf_counter()
    planned = sum(PROOFS[one["proof"]].seconds for one in done)
    pace = sum(one["seconds"] for one in done) / planned if done else 1

    def say(text: str) -> None:
        left = pace * sum(PROOFS[other].seconds for other in todo)
        left = max(left - (time.perf_counter() - began), 1)
        print(f"{name}: {text}; about {left / 60:.1f} min left", flush=True)

    return say


def spread(values: list) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values):.2g}"


def table(results: list) -> str:
    """Markdown, a row for each proof; mean and deviation (ddof 0) over seeds."""
    lines = ["| claim | measured | holds | seconds |", "|---|---|---|---|"]
    for result in results:
        measured = "; ".join(
            f"{measure}: " + ", ".join(f"{k}: {spread(v)}" for k, v in values.items())
            for measure, values in result["numbers"].items()
        )
        holds = "yes" if result["holds"] else "NO"
        lines.append(f"| {result['claim']} | {measured} | {holds} | {result['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def panel(axis, result: dict) -> None:
    """A dot for each seed, a line through the means where the settings have an order."""
    x_label, y_label, scale, *linear = PROOFS[result["proof"]].axes
    settings = list(dict.fromkeys(k for values in result["numbers"].values() for k in values))
    for color, (measure, values) in zip(COLORS, result["numbers"].items(), strict=False):
        at = [settings.index(name) for name in values]
        style = "o-" if x_label and len(at) > 1 else "D"
        axis.plot(at, rows(values).mean(-1), style, color=color, label=measure)
        for x, seeds in zip(at, values.values(), strict=True):
            axis.plot([x] * len(seeds), seeds, ".", color=color, alpha=0.4, markersize=10)
    crowded = len("".join(settings)) > 40
    axis.set_xticks(range(len(settings)), settings, rotation=30 if crowded else 0)
    verdict = "holds" if result["holds"] else "DOES NOT HOLD"
    axis.set_title("\n".join(textwrap.wrap(result["claim"], 46)) + f"\n{verdict}", fontsize=10)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_yscale(scale, **({"linthresh": linear[0]} if linear else {}))
    if scale != "log" and min(rows(values).min() for values in result["numbers"].values()) >= 0:
        axis.set_ylim(bottom=-0.2 * linear[0] if linear else -0.05)  # a dot at 0 stays whole
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)


def picture(results: list, path: Path) -> None:
    """A panel for each proof."""
    columns = min(3, len(results))
    shape = (-(-len(results) // columns), columns)
    size = (5.0 * shape[1], 4.2 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, result in zip(axes.flat, results, strict=False):
        panel(axis, result)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_results(folder: Path) -> list:
    """All stored results, in the order of the list of proofs."""
    paths = [folder / f"{name}.json" for name in PROOFS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def prove(names: list, out: Path) -> list:
    """Run proofs one after the other; each is stored as soon as it is done."""
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for i, name in enumerate(names):
        result = run_proof(name, progress(name, names[i:], done))
        done.append(result)
        path = out / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        verdict = "holds" if result["holds"] else "DOES NOT HOLD"
        print(f"{name}: {verdict}, {result['seconds']:.0f} seconds, {path}", flush=True)
    picture(read_results(out), out / "proofs.png")
    return done


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROOFS))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(args.names)) or list(PROOFS)
    torch.set_num_threads(1)  # the order of sums, and so every bit, depends on it
    try:
        unknown = [name for name in names if name not in PROOFS]
        if unknown:
            raise ProofError(f"there is no proof {unknown[0]}: give some of {', '.join(PROOFS)}")
        results = prove(names, args.out)
    except (ProofError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(results)}\npicture: {args.out / 'proofs.png'}")
    return 0 if all(result["holds"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
