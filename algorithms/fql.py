"""Flow Q-learning (FQL).

Seohong Park, Qiyang Li, Sergey Levine: "Flow Q-Learning", 2025, arXiv 2502.02538.

A velocity field v learns by flow matching how noise becomes an action of the data, whatever their
distribution. A second network mu makes the action in one step: it maximises Q and stays near what
the flow makes of the same noise. So nothing is differentiated through the flow's steps.

    L_flow = E_(s,a,x0,t)[ |v(s, x_t, t) - (a - x0)|^2 ]
             with x_t = (1 - t) x0 + t a, x0 ~ N(0, 1), t ~ U(0, 1)
    L_mu   = E_(s,z)[ alpha |mu(s,z) - flow(s,z)|^2 - lambda mean_i Q_i(s, clip(mu(s,z), -1, 1)) ]
             with flow(s,z): from z ~ N(0, 1) by Euler steps x <- x + v(s, x, t) / flow_steps
                  lambda = 1, or 1 / E_s |mean_i Q_i|, a constant (normalize_q_loss)
    L_Q    = E_(s,a,r,s')[ mean_i ( y - Q_i(s,a) )^2 ]
             with y = r + gamma (1 - terminated) mean_i Qbar_i(s', clip(mu(s',z), -1, 1))
                  or min_i in place of mean_i (q_aggregation)

Order of one update: the three losses, a step of each network, the targets. Online (`online_steps`)
the same goes on; an action is mu(s,z) with new noise z.

Deviations:
    D1  All losses are taken before any step, as in the authors' code, which sums them; the paper
        updates one network after the other.
    D2  Distances of actions are means over dimensions, and flow(s,z) is clipped, as in the authors'
        code, to which the published alphas belong; the paper has squared norms.
    D3  The targets move towards the critics after their step; the authors' towards those before.
    D4  `act` draws nothing: its noise z is a sum of 32 random waves over the states, fixed for a
        seed, and so nearly N(0, 1); the authors draw z anew in each step.
    D5  Weights start from PyTorch's default U(+-1/sqrt(fan_in)), one initialisation for all
        scripts; the authors' from Glorot's. Their layer normalisation adds 1e-6, ours 1e-5.
    D6  The data's actions are used as they are; the authors clip OGBench's to +-(1 - 1e-5).
    D7  Online no transition is forgotten; the authors' buffer is a ring of two million.

Metrics, means over the batch: `train/flow_loss` (never near 0, as many x0 lead through x_t);
`train/actor_loss`, with `train/distill_loss` |mu - flow|^2 (it grows: alpha is small for the scale
of Q) and `train/policy_q` the critics at mu(s,z) (far above q: extrapolation); `train/critic_loss`,
`train/q` the critics at the data (one that never stops growing means divergence). Online also
`online/return`, `online/length`, means of the episodes that ended since the last row.

    python algorithms/fql.py --config configs/fql/antmaze-large-play.yaml
"""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Optional

import gymnasium as gym
import minari
import numpy as np
import pyrallis
import torch
import yaml
from minari.dataset.minari_storage import MinariStorage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from tqdm import tqdm


# >>> shared: config
class RunError(Exception):
    """Ends the script with one line and exit code 2."""


def check(right, problem: str) -> None:
    if not right:
        raise RunError(problem)


@contextlib.contextmanager
def explained(problem: str):
    """Whatever is raised within becomes one line."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # libraries, environments and data may raise anything
        raise RunError(f"{problem}: {type(error).__name__} {error!s:.300}") from None


def setting(default, low=-math.inf, high=math.inf, choices=()):
    """A config field with its range (ends included) or its choices."""
    limits = {"choices": choices} if choices else {"low": low, "high": high}
    return field(default=default, metadata=limits)


@dataclass
class RunConfig:
    """What every script has: the task, the schedule, evaluation, logging, the device."""

    dataset_id: str = ""  # Minari id, or a folder that holds a Minari dataset
    fallback_dataset_id: str = ""  # used, with a warning, where dataset_id is missing
    download: bool = True  # ask Minari's hub for a dataset_id that the local store lacks
    env_id: str = "auto"  # where to evaluate: auto = the dataset's own, none, or a Gymnasium id
    env_kwargs: dict = field(default_factory=dict)  # arguments of the evaluation environment
    ref_min_score: Optional[float] = setting(None, -1e9, 1e9)  # return that scores 0
    ref_max_score: Optional[float] = setting(None, -1e9, 1e9)  # 100; null = as the dataset says
    action_bounds: str = setting("space", choices=("space", "data"))  # data = its extremes
    normalize_obs: bool = False  # observations to mean 0, deviation 1
    reward_scale: float = setting(1.0, -1e6, 1e6)  # r <- reward_scale * r + reward_shift
    reward_shift: float = setting(0.0, -1e6, 1e6)  # added to every reward after the scale
    reward_by_return_range: bool = False  # also r <- 1000 r / (best - worst return of the data)
    seed: int = setting(0, 0, 2**31)  # seed of the first member
    num_seeds: int = setting(1, 1, 1024)  # seeds trained at once: seed, seed + 1, ...
    num_updates: int = setting(1_000_000, 1, 10**10)  # gradient updates of each member
    batch_size: int = setting(256, 1, 10**6)  # transitions per member and update
    eval_every: int = setting(5_000, 1, 10**10)  # updates between evaluations
    eval_episodes: int = setting(10, 0, 10_000)  # episodes per member and evaluation; 0 = none
    max_envs: int = setting(64, 1, 10_000)  # environments at once in an evaluation
    final_eval_episodes: int = setting(100, 0, 10_000)  # episodes per member after the last update
    eval_seed: int = setting(10_000, 0, 2**31)  # episode i starts from eval_seed + i, for any seed
    log_every: int = setting(1_000, 1, 10**7)  # updates between log rows (means of the interval)
    checkpoint_every: int = setting(50_000, 1, 10**10)  # updates between checkpoints
    run_dir: str = ""  # the run's folder; "" = runs/<label>/<dataset>/<date-time>-<seeds>
    resume: bool = False  # go on from the checkpoint in run_dir
    checkpoint: str = ""  # start from the agent and update of this run folder or checkpoint.pt
    label: str = ""  # name of this variant in folders and tables; "" = the algorithm's name
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))  # auto = cuda if there is one
    compile: str = setting("auto", choices=("auto", "true", "false", "graphs"))  # auto = long runs
    wandb: str = setting("disabled", choices=("disabled", "offline", "online"))  # Weights & Biases
    wandb_project: str = "stitch"  # project in Weights & Biases

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, checked(spec, getattr(self, spec.name)))
        self.seeds = range(self.seed, self.seed + self.num_seeds)


def checked(spec: dataclasses.Field, raw):
    """A value of YAML, the command line or Python in its field's type and range."""
    kind, shown = spec.type, "a number of thousands of digits"
    low, high = spec.metadata.get("low", -math.inf), spec.metadata.get("high", math.inf)
    choices = spec.metadata.get("choices")
    with contextlib.suppress(Exception):  # YAML's tags have errors of their own
        shown, text = repr(raw), str(raw).lower()
        if kind is dict:
            values = {**(yaml.load(raw, UniqueKeys) if isinstance(raw, str) else raw)}
            return json.loads(json.dumps(values, allow_nan=False))  # what a checkpoint can hold
        if kind is str and choices and text in choices:
            return text
        if kind is str and not choices and isinstance(raw, str) and raw.isprintable():
            return raw
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind == Optional[float] and text in ("none", "null"):
            return None
        number = float(text)  # YAML 1.1 takes 1e6 for text
        whole = kind is int and number.is_integer()
        if low <= number <= high and (whole or kind in (float, Optional[float])):
            return int(number) if whole else number
    kinds = {str: "text (in quotes)", bool: "true or false", dict: "a mapping {name: plain value}"}
    wanted = kinds.get(kind, f"a {'whole ' * (kind is int)}number from {low} to {high}")
    raise RunError(f"{spec.name}: {shown:.80} is not {f'one of {choices}' if choices else wanted}")


# <<< shared: config


# >>> shared: online_config
@dataclass
class OnlineConfig(RunConfig):
    """What scripts have that go on in the environment after the offline updates."""

    online_steps: int = setting(0, 0, 10**9)  # environment steps of each member then; 0 = none
    updates_per_step: int = setting(1, 1, 1000)  # updates after each of these steps
    online_share: Optional[float] = setting(None, 0, 1)  # of a batch; null = one buffer for all


# <<< shared: online_config


@dataclass
class TrainConfig(OnlineConfig):  # D7
    """FQL's own settings; defaults: the authors', who tune alpha for every task."""

    gamma: float = setting(0.99, 0, 1)  # discount
    alpha: float = setting(10.0, 0, 1e9)  # weight of the one-step policy's distance to the flow
    normalize_q_loss: bool = False  # Q by its mean size in L_mu; alpha is then from 0.03 to 10
    q_aggregation: str = setting("mean", choices=("mean", "min"))  # of both targets at s'
    flow_steps: int = setting(10, 1, 1000)  # Euler steps from noise to action
    tau: float = setting(0.005, 0, 1)  # step of the targets towards their networks
    actor_lr: float = setting(3e-4, 0, 1)  # learning rate of v and of mu
    critic_lr: float = setting(3e-4, 0, 1)  # learning rate of the critics
    hidden_dim: int = setting(512, 1, 65_536)  # width of every hidden layer
    hidden_layers: int = setting(4, 1, 64)  # hidden layers of every network


# >>> shared: networks
# Shapes: S members (one a seed), E networks of an ensemble, B transitions, N environments, T steps.
def generator(seed: int, stream: str, index: int = 0, device="cpu") -> torch.Generator:
    """A random generator for each (seed, stream, index), so that no generator state is kept."""
    words = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), index]).generate_state(1)
    return torch.Generator(device).manual_seed(int(words[0]))


class Linear(nn.Module):
    """One linear map for each of S members x E: [S*E, B, in_dim] -> [S*E, B, out_dim].

    Weights start from U(+-1/sqrt(in_dim)), drawn from the generator of each member.
    """

    def __init__(self, generators, in_dim: int, out_dim: int, ensemble: int = 1):
        super().__init__()
        bound, draws = in_dim**-0.5, []
        for shape in ((ensemble, in_dim, out_dim), (ensemble, 1, out_dim)):
            each = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
            draws.append(nn.Parameter(torch.cat(each)))
        self.weight, self.bias = draws

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """`stride` = E runs only the first network of each member: [S, B, in_dim]."""
        weight, bias = (p if stride == 1 else p[::stride] for p in (self.weight, self.bias))
        if weight.shape[-1] == 1:  # a matrix product is slow for a single column
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class MLP(nn.Module):
    """ReLU network of each member: [S, B, in_dim] -> [S, B, out_dim]; `hidden`: its widths.

    With `ensemble` = E every member has E networks that read the same input: -> [S, E, B, out_dim].
    `norm(count, dim)` makes a module that normalises the units of `count` networks after each ReLU.
    """

    def __init__(self, generators, in_dim, hidden, out_dim, ensemble=0, norm=None):
        super().__init__()
        pairs, count = itertools.pairwise([in_dim, *hidden, out_dim]), max(1, ensemble)
        self.layers = nn.ModuleList(Linear(generators, *pair, count) for pair in pairs)
        norms = [norm(count * len(generators), dim) for dim in hidden] if norm else []
        self.norms, self.ensemble = nn.ModuleList(norms), ensemble

    def forward(self, x: Tensor, masks: Optional[Tensor] = None, first: bool = False) -> Tensor:
        """Dropout `masks` [S, hidden_layers, B, hidden_dim] multiply the hidden units.

        `first` runs only the first network of an ensemble: -> [S, B, out_dim].
        """
        ensemble, stride = (0, self.ensemble) if first else (self.ensemble, 1)
        if ensemble:
            x = x.unsqueeze(1).expand(-1, ensemble, -1, -1).flatten(0, 1)
        for i, layer in enumerate(self.layers[:-1]):
            x = F.relu_(layer(x, stride))
            x = self.norms[i](x, stride) if self.norms else x
            x = x if masks is None else x * masks[:, i]
        x = self.layers[-1](x, stride)
        return x.unflatten(0, (-1, ensemble)) if ensemble else x


class Adam(nn.Module):
    """Adam (arXiv 1412.6980) for parameters of all members: elementwise, so they stay apart.

    Moments and steps are buffers, so that `agent.state_dict()` is the whole state of training.
    """

    def __init__(self, params, lr: float, **options):
        super().__init__()
        self.params = list(params)
        self.options = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        self.options |= {"amsgrad": False, "maximize": False, "foreach": False, **options}
        for name, (i, p) in itertools.product("mv", enumerate(self.params)):
            self.register_buffer(f"{name}{i}", torch.zeros_like(p))
        self.register_buffer("steps", torch.zeros(len(self.params)))

    def descend(self, loss: Tensor, lr: Optional[Tensor] = None) -> None:
        """One step down `loss` [S]; its sum leaves every member its own gradient."""
        self.step(torch.autograd.grad(loss.sum(), self.params), lr)

    @torch.no_grad()
    def step(self, gradients, lr: Optional[Tensor] = None) -> None:
        """By torch's own function; a scheduled rate `lr` [] takes the place of the constant."""
        gradients = [g.contiguous() for g in gradients]  # the fused kernel ignores strides
        m, v = ([getattr(self, f"{name}{i}") for i in range(len(gradients))] for name in "mv")
        options = self.options if lr is None else {**self.options, "lr": lr}
        fused = not torch.compiler.is_compiling()  # what is fused cannot be traced
        adam(self.params, gradients, m, v, [], [*self.steps.unbind()], fused=fused, **options)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- target + tau (online - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Agent(nn.Module):
    """What the frame asks of an agent, besides `update(batch, noise)` and `act(obs)`.

    Its networks see normalised observations and actions within [-1, 1]; `units` lead there:
    obs_mean, obs_std [obs_dim], action_center, action_half_range [act_dim], and the worst and best
    return of the data [2].
    """

    units = ("obs_mean", "obs_std", "action_center", "action_half_range", "return_range")
    actions, images = gym.spaces.Box, False  # the space of its actions; whether it sees images
    wrappers = ()  # specs of wrappers of the evaluation environment
    whole_episodes = False  # whether online steps are learned from once their episode has ended

    def __init__(self, cfg, units: dict):
        super().__init__()
        self.cfg = cfg
        self.noise_shapes = {}  # random numbers of `update`: name -> (kind, shape for one member)
        for name in self.units:  # buffers, so that they are saved with the weights
            self.register_buffer(name, torch.as_tensor(units[name], dtype=torch.float32).clone())
        self.obs_dim, self.act_dim = len(self.obs_mean), len(self.action_center)

    @staticmethod
    def select(episodes: list, cfg) -> list:  # noqa: ARG004
        """The episodes of the data to learn from."""
        return episodes

    def variant(self, step: int) -> tuple:  # noqa: ARG002
        """What else `update` is told, such as whether a delayed actor moves."""
        return ()

    def normalize(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def env_action(self, action: Tensor) -> Tensor:
        """An action within [-1, 1] in the environment's units."""
        return self.action_center + self.action_half_range * action.clamp(-1, 1)

    def unit_action(self, action: Tensor) -> Tensor:
        """An action in the environment's units within [-1, 1]; 0 where it is a constant."""
        return (action - self.action_center) / self.action_half_range.clamp(min=1e-30)

    def rows(self, episode: dict) -> dict:
        """An episode of T + 1 observations as T rows of the table that batches are drawn from."""
        like = {"device": self.obs_mean.device, "dtype": self.obs_mean.dtype}
        parts = {name: torch.as_tensor(values, **like) for name, values in episode.items()}
        obs, scale = self.normalize(parts["obs"]), self.cfg.reward_scale
        if self.cfg.reward_by_return_range:
            scale = scale * 1000 / self.return_range.diff()
        rows = {"obs": obs[:-1], "action": self.unit_action(parts["action"]), "next_obs": obs[1:]}
        rows["reward"] = scale * parts["reward"] + self.cfg.reward_shift
        return {**rows, "terminated": parts["terminated"]}

    def table(self, episodes: list) -> dict:
        """The rows of all episodes, but for steps whose next observation is not known."""
        rows = [self.rows(episode) for episode in episodes]
        table = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
        known = table.get("next_obs", table["obs"]).isfinite().all(-1)
        if not known.all():
            print(f"{int((~known).sum())} steps are left out: what followed them is unknown")
        return {name: values[known] for name, values in table.items()}

    def gather(self, table: dict, rows: Tensor) -> dict:
        """The batch at `rows` [S, B] of the table, by what takes half the time of table[rows]."""
        at, shape = rows.flatten(), rows.shape
        return {name: v.index_select(0, at).unflatten(0, shape) for name, v in table.items()}


# <<< shared: networks


# >>> shared: layer_norm
class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) of each of `count` networks: [count, B, dim]."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, dim))
        self.bias = nn.Parameter(torch.zeros(count, 1, dim))

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        weight, bias = self.weight, self.bias
        if every > 1:
            weight, bias = weight[::every], bias[::every]
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


# <<< shared: layer_norm


class GELUNetwork(MLP):
    """An MLP of several inputs, with GELU (its tanh form, as the authors') in place of ReLU."""

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, -1)
        if self.ensemble:
            x = x.unsqueeze(1).expand(-1, self.ensemble, -1, -1).flatten(0, 1)
        for i, layer in enumerate(self.layers[:-1]):
            x = F.gelu(layer(x), approximate="tanh")
            x = self.norms[i](x) if self.norms else x
        x = self.layers[-1](x)
        return x.unflatten(0, (-1, self.ensemble)) if self.ensemble else x


class FQL(Agent):
    """S independent FQL learners; a batch holds [S, B, dim] or [S, B] tensors, a loss is [S]."""

    def __init__(self, cfg: TrainConfig, units: dict):
        super().__init__(cfg, units)
        pair, hidden = self.obs_dim + self.act_dim, [cfg.hidden_dim] * cfg.hidden_layers
        generators = [generator(seed, "init") for seed in cfg.seeds]  # D5
        self.flow = GELUNetwork(generators, pair + 1, hidden, self.act_dim)  # v
        self.actor = GELUNetwork(generators, pair, hidden, self.act_dim)  # mu
        self.critic = GELUNetwork(generators, pair, hidden, 1, ensemble=2, norm=LayerNorm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        waves = Linear(generators, self.obs_dim + 1, 32 * self.act_dim)  # D4
        self.register_buffer("waves", waves.weight.detach())
        self.flow_adam = Adam(self.flow.parameters(), cfg.actor_lr)
        self.actor_adam = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_adam = Adam(self.critic.parameters(), cfg.critic_lr)
        normal = ("normal", (cfg.batch_size, self.act_dim))
        self.noise_shapes = {name: normal for name in ("flow", "actor", "target")}
        self.noise_shapes["time"] = ("uniform", (cfg.batch_size, 1))

    def q(self, critic: GELUNetwork, obs: Tensor, action: Tensor) -> Tensor:
        """Q_i(s, clip(a, -1, 1)) of both critics [S, 2, B]."""
        return critic(obs, action.clamp(-1, 1)).squeeze(-1)

    def flow_action(self, obs: Tensor, x: Tensor) -> Tensor:
        """flow(s,z) [S, B, act_dim]: where v leads from the noise x = z."""
        steps = self.cfg.flow_steps
        for step in range(steps):
            x = x + self.flow(obs, x, torch.full_like(x[..., :1], step / steps)) / steps
        return x.clamp(-1, 1)  # D2

    def flow_loss(self, obs: Tensor, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """L_flow: along the straight way from noise to action, v is their difference."""
        velocity = self.flow(obs, (1 - time) * noise + time * action, time)  # D6
        return (velocity - (action - noise)).square().mean((-2, -1))  # D2

    def actor_loss(self, obs: Tensor, noise: Tensor):
        """L_mu: near to what the flow makes of the noise, and of high value."""
        with torch.no_grad():
            flow_action = self.flow_action(obs, noise)
        policy = self.actor(obs, noise)
        distill_loss = (policy - flow_action).square().mean((-2, -1))
        q = self.q(self.critic, obs, policy).mean(-2)
        weight = 1 / q.detach().abs().mean(-1) if self.cfg.normalize_q_loss else 1
        return self.cfg.alpha * distill_loss - weight * q.mean(-1), distill_loss, q.mean(-1)

    def target(self, batch: dict, noise: Tensor) -> Tensor:
        """y [S, B]: the value of the one-step policy's action at s'."""
        q = self.q(self.target_critic, batch["next_obs"], self.actor(batch["next_obs"], noise))
        next_q = q.amin(-2) if self.cfg.q_aggregation == "min" else q.mean(-2)
        return batch["reward"] + self.cfg.gamma * (1 - batch["terminated"]) * next_q

    def critic_loss(self, target: Tensor, obs: Tensor, action: Tensor):
        """L_Q: both critics regress to y."""
        q = self.q(self.critic, obs, action)
        return (target.unsqueeze(-2) - q).square().mean((-2, -1)), q.mean((-2, -1))

    def update(self, batch: dict, noise: dict) -> dict:
        """One update of every member: flow, one-step policy and critics, then the targets."""
        obs, action = batch["obs"], batch["action"]
        with torch.no_grad():
            target = self.target(batch, noise["target"])
        flow_loss = self.flow_loss(obs, action, noise["flow"], noise["time"])
        actor_loss, distill_loss, policy_q = self.actor_loss(obs, noise["actor"])
        critic_loss, q = self.critic_loss(target, obs, action)
        self.actor_adam.descend(actor_loss)  # D1; through the critics, so before their step
        self.critic_adam.descend(critic_loss)
        self.flow_adam.descend(flow_loss)
        polyak(self.target_critic, self.critic, self.cfg.tau)  # D3
        metrics = {"flow_loss": flow_loss, "actor_loss": actor_loss, "distill_loss": distill_loss}
        metrics |= {"policy_q": policy_q, "critic_loss": critic_loss, "q": q}
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Actions in the environment's units: [S, N, obs_dim] -> [S, N, act_dim]."""
        waves = (100 * F.pad(self.normalize(obs), (0, 1), value=1.0) @ self.waves).cos()
        return self.explore(obs, waves.unflatten(-1, (self.act_dim, 32)).sum(-1) / 4)  # D4

    @torch.no_grad()
    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """As `act`, with standard normal noise [S, N, act_dim]."""
        return self.env_action(self.actor(self.normalize(obs), noise))


# ---- frame: the same in every script ----
# >>> shared: data
SCRIPT = Path(__file__).resolve()
NAMES = {"action": "actions", "obs": "observations", "reward": "rewards"}
NAMES |= {"terminated": "terminations", "truncated": "truncations"}  # as Minari has them
PACKAGES = ("gymnasium_robotics", "ogbench", "ale_py", "minatar.gym")  # with environments
WRAPPERS = ("ClipAction", "ClipReward", "DtypeObservation", "FilterObservation", "TimeLimit")
WRAPPERS += ("FlattenObservation", "FrameStackObservation", "RescaleAction", "RescaleObservation")
WRAPPERS += ("ReshapeObservation", "TimeAwareObservation", "AtariPreprocessing")  # no statistics


def flatten_obs(space: gym.Space, obs) -> np.ndarray:
    """Observations [...] of a space as vectors [..., obs_dim]; keys of a Dict in sorted order."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flatten_obs(space[key], obs[key]) for key in sorted(space)]
        return np.concatenate(parts, -1)
    if isinstance(space, gym.spaces.Tuple):
        parts = [flatten_obs(*pair) for pair in zip(space, obs, strict=True)]
        return np.concatenate(parts, -1)
    if isinstance(space, gym.spaces.Discrete):
        one_hot = np.asarray(obs)[..., None] == space.start + np.arange(space.n)
        check(one_hot.any(-1).all(), f"an observation is not one of {space}")
        return 1.0 * one_hot
    vector = isinstance(space, (gym.spaces.Box, gym.spaces.MultiBinary))
    check(vector, f"observations {space} are not numbers")
    obs = np.asarray(obs)
    return obs.reshape(*obs.shape[: obs.ndim - len(space.shape)], -1)


def has_image(space: gym.Space) -> bool:
    parts = getattr(space, "spaces", ())
    parts = parts.values() if isinstance(parts, dict) else parts
    return (space.dtype == np.uint8 and len(space.shape) > 1) or any(map(has_image, parts))


def as_box(space: gym.Space) -> gym.Space:
    """Discrete actions as whole numbers within bounds."""
    if isinstance(space, gym.spaces.Discrete):
        return gym.spaces.Box(space.start, space.start + space.n - 1, (), np.int64)
    return space


def find_dataset(cfg) -> Path:
    """The folder of `dataset_id`, or of the fallback, which `cfg` names from then on."""
    name, stored = cfg.dataset_id, minari.storage.get_dataset_path(cfg.dataset_id)
    bases = (Path(name), SCRIPT.parent.parent / name, stored) if name else ()
    files = [base / inner / "metadata.json" for base in bases for inner in (".", "data")]
    absent = cfg.download and not stored.exists() and not any(file.is_file() for file in files)
    if absent and re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name):
        try:
            minari.download_dataset(name)
        except Exception as error:  # every remote of Minari's has errors of its own
            shutil.rmtree(stored, ignore_errors=True)  # half a dataset would pass for one
            print(f"{name} does not come from Minari's hub: {error!r:.200}", file=sys.stderr)
    for file in filter(Path.is_file, files):
        return file.parent
    mend = f"check its name (as in me/set-v0) and the store {minari.storage.get_dataset_path()}"
    space, _, task = name.partition("/")
    if space in ("D4RL", "ogbench", "dqn-replay"):
        tool = space.lower().replace("-", "_")
        mend = f"python datasets/{tool}.py {task.replace('/', '-')}"
    check(cfg.fallback_dataset_id, f"dataset_id {name or '(not set)'} is not here: {mend}")
    told = f"WARNING: {name} is not here. Training on {cfg.fallback_dataset_id}:\nOTHER DATA, its "
    told += f"scores are NOT comparable with published ones. For the real data:\n{mend}"
    print(f"\n{told}\n", file=sys.stderr)
    cfg.dataset_id, cfg.fallback_dataset_id, cfg.download = cfg.fallback_dataset_id, "", False
    cfg.env_id, cfg.env_kwargs = "none" if cfg.env_id == "none" else "auto", {}
    cfg.ref_min_score = cfg.ref_max_score = None
    return find_dataset(cfg)


def load_dataset(cfg, agent_class=Agent) -> tuple:
    """The episodes, the action space and the metadata of a Minari dataset, checked.

    An episode is {obs [T + 1, obs_dim], action [T, act_dim], reward, terminated, truncated [T]};
    what followed a last step may be unknown: its observation is NaN then.
    """
    folder, about = find_dataset(cfg), f"dataset {cfg.dataset_id}"
    with explained(f"{about} cannot be read"):
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        spaces = {"observation_space", "action_space"} <= metadata.keys()
        check(spaces, f"{about} cannot be read: it lacks its spaces")  # Minari would run its env
        storage = MinariStorage.read(folder)
        seen, space, count = storage.observation_space, storage.action_space, storage.total_episodes
        kind, sees = agent_class.actions, agent_class.images or not has_image(seen)
        check(isinstance(space, kind), f"{about} has actions {space}, not a {kind.__name__}")
        check(sees, f"{about} has observations {seen}: {SCRIPT.name} takes no images")
        stored = tqdm(storage.get_episodes(range(count)), "reading", count, delay=5, disable=None)
        pairs = enumerate(stored)
        episodes = [read_episode(each, storage, f"{about}, episode {i}") for i, each in pairs]
    check(episodes and episodes[0]["obs"].size, f"{about} has no episodes or no observations")
    space, shape = as_box(space), seen.shape or episodes[0]["obs"].shape[1:]
    if cfg.action_bounds == "data":
        actions = np.concatenate([episode["action"] for episode in episodes])
        space = gym.spaces.Box(actions.min(0), actions.max(0), dtype=space.dtype)
    text = f"{about} has actions {space} without bounds: --action_bounds data takes the data's"
    check((np.abs([space.low, space.high], dtype=float) < 1e9).all(), text)
    ends = {name: metadata.get(name) for name in ("ref_min_score", "ref_max_score")}
    numbers = all(x is None or (type(x) in (int, float) and abs(x) < 1e9) for x in ends.values())
    check(numbers, f"{about} has {ends}, not numbers")
    lengths = [len(episode["reward"]) for episode in episodes]
    digest = hashlib.sha256(np.array(lengths, "<i8").tobytes())
    for name, episode in itertools.product(NAMES, episodes):
        values = episode[name]
        values = values if values.dtype == np.uint8 else values.astype("<f4")
        digest.update(np.ascontiguousarray(values))
    more = {"fingerprint": digest.hexdigest()[:16], "longest_episode": max(lengths)}
    return episodes, space, {**metadata, **more, "frame_shape": shape}


def read_episode(stored: dict, storage, where: str) -> dict:
    """An episode in the types that it is stored in."""
    space, steps, episode = as_box(storage.action_space), len(stored["rewards"]), {}
    low, high = space.low.reshape(-1), space.high.reshape(-1)
    raw = {name: np.asarray(stored[key]) for name, key in NAMES.items() if name != "obs"}
    raw["obs"] = flatten_obs(storage.observation_space, stored["observations"])
    obs_dim = gym.spaces.flatdim(storage.observation_space)
    shapes = {"obs": (steps + 1, obs_dim), "action": (steps, len(low))}
    for name, values in raw.items():
        shape = shapes.get(name, (steps,))  # one of (T, 1) is right, too
        right = steps and len(values) == shape[0] and values.size == math.prod(shape)
        if right:
            native = values.dtype.newbyteorder("=")
            values = episode[name] = values.reshape(shape).astype(native, copy=False)
            unknown = name == "obs" and np.isnan(values[-1]).all() and not raw["terminated"].any()
            known, small = values[:-1] if unknown else values, values.dtype.itemsize == 1
            right = small or (np.abs(known) < np.float64(3e38)).all()  # float32's range
        if right and name == "action":
            slack = 1e-5 * np.maximum(np.minimum(1, high - low), np.abs(values))  # rounding
            right = ((values >= low - slack) & (values <= high + slack)).all()
            episode[name] = values.clip(low, high)
        if right and name in ("terminated", "truncated"):
            right = not values[:-1].any() and values[-1] in (0, 1)
        fault = "has a wrong shape, NaN, a value out of bounds or an end before the last step"
        check(right, f"{where}: {name} {fault}; datasets/doctor.py says more")
    return episode


def measure(episodes: list, space: gym.spaces.Box, cfg) -> dict:
    """The agent's units, from the data; 1e-3 guards constant observations, as in TD3+BC's code."""
    steps, obs_dim = sum(len(e["reward"]) for e in episodes), episodes[0]["obs"].shape[1]
    mean, std = np.zeros(obs_dim), np.ones(obs_dim)
    if cfg.normalize_obs:
        obs = np.concatenate([episode["obs"][:-1] for episode in episodes])
        mean, std = obs.mean(0, dtype=np.float64), obs.std(0, dtype=np.float64) + 1e-3
    returns = [episode["reward"].sum(dtype=np.float64) for episode in episodes]
    worst, best = min(returns), max(returns)
    print(f"{steps:,} transitions, {len(returns):,} episodes, return {worst:.1f} to {best:.1f}")
    equal = worst == best and cfg.reward_by_return_range
    check(not equal, "reward_by_return_range: all returns are equal: set it to false")
    least, most = (float(f([f(e["reward"]) for e in episodes])) for f in (min, max))
    small = cfg.reward_by_return_range or abs(cfg.reward_scale) * max(-least, most) < 1e9
    check(small, f"rewards from {least:g} to {most:g} are too large: set reward_scale")
    low, high = space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float)
    values = (mean, std, (high + low) / 2, (high - low) / 2, (worst, best))
    return dict(zip(Agent.units, values, strict=True))


def find_environment(cfg, metadata: dict, agent: nn.Module) -> tuple:
    """The environment's spec, or None, and its reference returns; `auto` has the dataset's.

    A dataset names an environment, no code: its id is looked up among those that are registered.
    """
    references, auto = (cfg.ref_min_score, cfg.ref_max_score), cfg.env_id == "auto"
    if cfg.env_id == "none":
        return None, references
    stored = metadata.get("eval_env_spec") or metadata.get("env_spec")
    check(stored or not auto, "env_id: the dataset names no environment: set one, or none")
    mend = "name another, one of a module of yours (module:Id-v0), or none"
    with explained(f"env_id {cfg.env_id} does not start, {mend}"):
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
            for package in PACKAGES:
                with contextlib.suppress(ImportError):  # it registers environments, or if asked
                    getattr(importlib.import_module(package), "register_envs", dict)()
        module, _, env_id = cfg.env_id.rpartition(":")
        if module:
            importlib.import_module(module)  # the user's own word
        named = json.loads(stored) if stored and (auto or module) else {}
        named = named if auto or named.get("id") == env_id else {}  # of the dataset
        if named:
            own = metadata.get("ref_min_score"), metadata.get("ref_max_score")
            pairs = zip(references, own, strict=True)
            references = tuple(theirs if ours is None else ours for ours, theirs in pairs)
        spec = copy.deepcopy(gym.spec(named.get("id", env_id)))
        spec.kwargs = {**spec.kwargs, **(named.get("kwargs") or {}), **cfg.env_kwargs}
        spec.kwargs.pop("render_mode", None)
        for wrapper in named.get("additional_wrappers") or ():
            name, known = wrapper["name"], wrapper["name"] in WRAPPERS
            check(known, f"env_id: the dataset's wrapper {name} is not one of {WRAPPERS}")
            place = f"gymnasium.wrappers:{name}", wrapper["kwargs"] or {}
            spec.additional_wrappers += (gym.envs.registration.WrapperSpec(name, *place),)
        spec.additional_wrappers += agent.wrappers
        limit = named.get("max_episode_steps") or spec.max_episode_steps
        spec.max_episode_steps = spec.kwargs.pop("max_episode_steps", limit)
        if not spec.max_episode_steps:
            spec.max_episode_steps = metadata["longest_episode"]
            print(f"{spec.id} has no time limit: {spec.max_episode_steps} steps, as the data")
        try_environment(gym.make(spec), agent)
    if None not in references and references[0] >= references[1]:
        print("WARNING: ref_min_score is not below ref_max_score: there are no scores")
        references = None, None
    return spec, references


def try_environment(env: gym.Env, agent: nn.Module) -> None:
    """Look at spaces and wrappers, reset and make a step, before the first update."""
    box, middle = as_box(env.action_space), agent.action_center.cpu().numpy()
    same = isinstance(env.action_space, agent.actions)
    check(same, f"{env.spec.id} has actions {env.action_space}, not a {agent.actions.__name__}")
    sizes, ours = (env_step(env, seed=0)[0].size, box.low.size), (agent.obs_dim, agent.act_dim)
    check(sizes == ours, f"{env.spec.id} has {sizes} observations and actions, the data {ours}")
    env_step(env, middle)
    half, wrapper = agent.action_half_range.cpu().numpy(), env
    ends = np.stack([middle - half, middle + half, box.low.ravel(), box.high.ravel()])
    if not np.allclose(ends[:2], ends[2:], rtol=1e-3):
        text = "actions of the data lie in [{}, {}], those of the environment in [{}, {}]"
        inside = (ends[:2] >= ends[2]).all() and (ends[:2] <= ends[3]).all()
        check(inside or agent.actions is gym.spaces.Box, f"{env.spec.id}: {text.format(*ends)}")
        print("WARNING:", text.format(*ends))
    while isinstance(wrapper, gym.Wrapper):
        counts = type(wrapper).__name__ in ("NormalizeObservation", "NormalizeReward")
        check(not counts, f"{env.spec.id}: {type(wrapper).__name__} has statistics that run on")
        wrapper = wrapper.env
    env.close()


def env_step(env: gym.Env, action=None, seed: Optional[int] = None) -> tuple:
    """A step, or a reset with a seed: obs [obs_dim], reward, terminated, truncated, info."""
    with explained(f"the environment {env.spec.id} fails"):
        if action is None:
            obs, reward, *ends, info = env.reset(seed=seed)[0], 0.0, False, False, {}
        else:
            space = as_box(env.action_space)
            action = np.asarray(action, np.float64).reshape(space.shape)
            action = np.rint(action) if space.dtype.kind in "iu" else action
            action = action.clip(space.low, space.high).astype(space.dtype)
            obs, reward, *ends, info = env.step(action)
        obs, reward = flatten_obs(env.observation_space, obs), np.asarray(reward, float).item()
    finite = math.isfinite(reward) and np.isfinite(obs).all()
    check(finite, f"the environment {env.spec.id} fails: NaN or infinite numbers")
    return obs.astype(np.float32), reward, *map(bool, ends), info


# <<< shared: data


# >>> shared: evaluation
def evaluate(agent: nn.Module, spec, references: tuple, episodes: int) -> list:
    """Play `episodes` episodes with every member, `max_envs` of them side by side.

    Episode i starts from `eval_seed` + i for every member and any training seed. A row an episode:
    seed, episode, return (undiscounted), length, score: by the reference returns; without them 100
    or 0 where the last info of any episode says whether it was a success, else None.
    """
    cfg, rows, success, (low, high) = agent.cfg, [], {}, references
    tasks = list(itertools.product(range(episodes), range(cfg.num_seeds)))
    for first in range(0, len(tasks), cfg.max_envs):
        played = tasks[first : first + cfg.max_envs]
        begin, shape = played[0][0], (cfg.num_seeds, played[-1][0] - played[0][0] + 1)
        envs = {(i, number - begin): gym.make(spec) for number, i in played}
        obs, totals = np.zeros((*shape, agent.obs_dim)), np.zeros((*shape, 2))  # return, length
        for at, env in envs.items():
            obs[at] = env_step(env, seed=cfg.eval_seed + begin + at[1])[0]
        while envs:  # those that have ended rest
            actions = agent.act(agent.obs_mean.new_tensor(obs)).cpu().numpy()
            for at, env in list(envs.items()):
                obs[at], reward, *ends, info = env_step(env, actions[at])
                totals[at] += reward, 1
                if any(ends):
                    envs.pop(at).close()
                    success[at] = 100 * float(info["success"]) if "success" in info else None
        for number, i in played:
            value, length = totals[i, number - begin].tolist()
            known = None not in references
            score = 100 * (value - low) / (high - low) if known else success[i, number - begin]
            row = {"seed": cfg.seeds[i], "episode": number, "return": value}
            rows.append({**row, "length": int(length), "score": score})
    told = any(row["score"] is not None for row in rows)  # some tell of their successes only
    rows = [{**row, "score": row["score"] or 0.0} if told else row for row in rows]
    return sorted(rows, key=lambda row: (row["seed"], row["episode"]))


def seed_means(rows: list) -> list:
    """Mean return, length and score of each seed."""
    means = {}
    for row, name in itertools.product(rows, ("return", "score", "length")):
        if row[name] is not None:
            means.setdefault(row["seed"], {}).setdefault(f"eval/{name}", []).append(row[name])
    return [{"seed": i} | {k: sum(v) / len(v) for k, v in of.items()} for i, of in means.items()]


# <<< shared: evaluation


# >>> shared: run
class Run:
    """A run: its folder, which one process owns, and where its training stands."""

    def __init__(self, cfg, algorithm: str):
        """Look at the folder: finished, to go on with, or new; another run's is refused."""
        self.cfg, label = cfg, cfg.label or algorithm
        self.about = {"script": SCRIPT.stem, "algorithm": algorithm, "label": label}
        self.about["checkpoint"] = cfg.checkpoint or None  # that it started from
        self.step, self.seconds, self.window, self.online, self.wandb = 0, 0.0, {}, None, None
        self.stopped = self.playing = False
        slug = [re.sub(r"[^a-z0-9.]+", "-", x.lower()).strip("-.") for x in (label, cfg.dataset_id)]
        stamp = f"{datetime.now():%Y%m%d-%H%M%S.%f}-s{cfg.seed}x{cfg.num_seeds}"
        self.folder = Path(cfg.run_dir or Path("runs", *slug, stamp))
        apart = ("run_dir", "resume", "checkpoint")
        self.config = {k: v for k, v in pyrallis.encode(cfg).items() if k not in apart}
        self.there = there = {path.name for path in self.folder.glob("*")}
        known, self.finished = "config.yaml" in there, "result.json" in there
        theirs = read_yaml(self.folder / "config.yaml") if known else self.config
        for name, value in self.config.items():
            what = f"{name} is {theirs.get(name)!r} there, not {value!r}"
            same = theirs.get(name) == value or name in ("download", "wandb", "wandb_project")
            check(same, f"run_dir {self.folder} holds another run: {what}")
        check(cfg.run_dir or not cfg.resume, "resume: name the run to go on with: --run_dir PATH")
        logged = any(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        right = not there or self.finished or (cfg.resume and (known or not logged))
        check(right, f"run_dir {self.folder} is in use: add --resume true, or name another")
        self.saved = read_checkpoint(self.folder) if "checkpoint.pt" in there else None

    def open(self) -> None:
        """Take the folder, with the logs cut back to the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=bool(self.cfg.run_dir))
        self.lock = open(self.folder / "lock", "a+")
        self.lock.seek(0)
        taken = f"run_dir {self.folder}: another process trains there, {self.lock.read()}"
        with explained(taken):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check({path.name for path in self.folder.glob("*")} <= {"lock", *self.there}, taken)
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=self.lock, flush=True)
        self.logs = {n: open(self.folder / f"{n}.jsonl", "ab") for n in ("metrics", "episodes")}
        apart = f"run_dir {self.folder}: the checkpoint does not fit its logs or seeds, train anew"
        with explained(apart):
            sizes = self.saved["sizes"] if self.saved else dict.fromkeys(self.logs, 0)
            whole = {n: range(log.tell() + 1) for n, log in self.logs.items()}
            check(all(type(sizes[n]) is int and sizes[n] in whole[n] for n in whole), apart)
            if self.saved:
                self.about, self.seconds = self.about | self.saved["about"], self.saved["seconds"]
                for name, (total, count) in self.saved["window"].items():
                    right = total.shape == (self.cfg.num_seeds,) and type(count) is int
                    check(right and 0 < count <= self.step, apart)
                    total = total.detach().double().clone()
                    self.window[name] = [total.to(self.agent.obs_mean.device), count]
        for name, file in self.logs.items():
            file.truncate(sizes[name])
            file.seek(0, os.SEEK_END)  # so that tell() says where it writes
        if self.cfg.wandb != "disabled":
            with explained("wandb does not start, use offline or disabled"):
                import wandb

                known = {"id": self.about["id"], "resume": "allow", "dir": self.folder}
                known |= {"project": self.cfg.wandb_project, "mode": self.cfg.wandb}
                self.wandb = wandb.init(name=self.about["label"], config=self.config, **known)
        if not self.saved:  # last: a folder with these goes on without its --checkpoint
            self.write("config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())
            self.write("environment.json", json.dumps(self.about, indent=1).encode())
        print(f"run folder: {self.folder}")

    def write(self, name: str, content: bytes) -> None:
        """Temporary file, sync, rename: the old file stays until the new one is whole."""
        partial = self.folder / f"{name}.part"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / name)

    def log(self, name: str, rows: list) -> None:
        where = {"update": self.step}
        where |= {"environment_step": self.online.steps} if self.online else {}
        for row in rows:
            self.logs[name].write(f"{json.dumps({**where, **row})}\n".encode())
            if self.wandb and name == "metrics":
                values = {f"{k}/seed{row['seed']}": v for k, v in row.items() if "/" in k}
                self.wandb.log(values, step=self.step)
        self.logs[name].flush()

    def means(self) -> list:
        """Of each seed, its metrics since the last log row, which must be finite."""
        rows = [{"seed": seed} for seed in self.cfg.seeds]
        for name, (total, count) in self.window.items():
            for row, value in zip(rows, (total / count).tolist(), strict=True):
                self.check_finite(torch.tensor(value), f"{name} of seed {row['seed']}")
                row[f"train/{name}"] = value
        return rows

    def check_finite(self, values: Tensor, name: str) -> None:
        keeps = f"{self.folder} keeps the last good checkpoint, if there was one"
        check(values.isfinite().all(), f"{name} not finite by update {self.step}; {keeps}")

    def save(self) -> None:
        """Write the checkpoint, behind the logs that it counts on."""
        content = {"agent": self.agent.state_dict(), "step": self.step, "seconds": self.seconds}
        self.means()  # whose check names metric and seed
        for name, values in content["agent"].items():
            self.check_finite(values, name)
        for file in self.logs.values():
            os.fsync(file.fileno())
        content["sizes"] = {name: file.tell() for name, file in self.logs.items()}
        content |= {"config": self.config, "about": self.about, "window": self.window}
        content["online"] = self.online.state() if self.online else None
        buffer = io.BytesIO()  # torch's own writer hides why a disk refuses
        torch.save(content, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def update(self) -> None:
        """One update of all members; its metrics stay on the device."""
        arguments = (*next(self.batches), *self.agent.variant(self.step))
        try:
            metrics = self.graph(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before the graph runs
            print(f"compile: the update fails ({error!r:.200}), going on without")
            self.graph = self.agent.update
            metrics = self.graph(*arguments)
        self.step += 1
        for name, value in metrics.items():  # summed: a tensor kept of each would split the heap
            total, count = self.window.get(name) or (torch.zeros_like(value).double(), 0)
            self.window[name] = [total.add_(value), count + 1]

    def log_metrics(self) -> None:
        """Write the means since the last log row."""
        rows, seconds = self.means(), time.perf_counter() - self.mark
        for i, row in enumerate(rows):
            row |= self.online.metrics(i) if self.online else {}
            row["time/updates_per_second"] = (self.step - self.logged) / seconds
        self.log("metrics", rows)
        self.window, self.seconds = {}, self.seconds + seconds
        self.mark, self.logged = time.perf_counter(), self.step

    def evaluate(self, episodes: int, final: bool = False) -> list:
        """Evaluate all members, log every episode; the means of each seed."""
        began, self.playing = time.perf_counter(), True
        with explained("the evaluation fails"):
            rows = evaluate(self.agent, self.spec, self.references, episodes) if self.spec else []
        self.playing, seconds = False, time.perf_counter() - began
        self.mark += seconds  # the clock of the updates stood still
        self.log("episodes", [{"final": final, **row} for row in rows])
        extra = {"final": final, "time/evaluation_seconds": seconds}
        means = [{**row, **extra} for row in seed_means(rows)]
        self.log("metrics", means)
        return means

    def stop(self, now: bool) -> None:
        """What a signal asks for: to end, between two updates or amid an evaluation."""
        self.stopped = True
        if now:
            mend = f"python {sys.argv[0]} --run_dir {str(self.folder)!r} --resume true"
            raise KeyboardInterrupt(f"stopped at update {self.step}; to go on: {mend}")

    def loop(self) -> None:
        """Evaluate, play, update, log, save."""
        cfg, self.mark, self.logged = self.cfg, time.perf_counter(), self.step
        last = cfg.num_updates + (cfg.online_steps * cfg.updates_per_step if self.online else 0)
        plain = "{n_fmt}/{total_fmt} updates, {rate_fmt}, {remaining} left\n"  # for no terminal
        style = {"mininterval": 30, "bar_format": plain, "file": sys.stdout}
        style = {} if sys.stderr.isatty() else style
        style |= {"initial": self.step, "total": last, "unit": " updates"}

        def due(every: int) -> bool:
            return self.step % every == 0 or self.step in (cfg.num_updates, last)

        for _ in tqdm(range(self.step, last), **style):
            if self.step and due(cfg.eval_every):
                self.evaluate(cfg.eval_episodes)
            past = self.step - cfg.num_updates
            if past >= 0 and past % cfg.updates_per_step == 0:
                self.online.play()
            self.update()
            if due(cfg.log_every):
                self.log_metrics()
            if due(cfg.checkpoint_every):
                self.save()
            if self.stopped:
                self.stop(now=True)


def read_checkpoint(path) -> dict:
    """The checkpoint of a run folder, or a checkpoint file: tensors and plain values only."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    kinds = dict.fromkeys(("config", "about", "agent", "window", "sizes"), dict)
    kinds |= {"step": int, "seconds": float, "online": (dict, type(None))}
    with explained(f"{file} is no whole checkpoint"):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for name, kind in kinds.items():
            check(isinstance(saved[name], kind), f"{file} is no whole checkpoint: its {name}")
        json.dumps([saved[k] for k in ("config", "about", "seconds")], allow_nan=False)
        return {name: saved[name] for name in kinds}


def batches(agent: nn.Module, table: dict, first: int, online=None):
    """Yields the batch and the noise of every update from number `first` on.

    Each member draws from generators of its own, the numbers for some 32 updates at once.
    """
    cfg, device, drawn = agent.cfg, agent.obs_mean.device, {}
    kinds = {"rows": ("whole", (cfg.batch_size,)), **agent.noise_shapes}
    length = max(1, min(32, 2**24 // sum(math.prod(shape) for _, shape in kinds.values())))
    for number in itertools.count(first):
        chunk, offset = divmod(number, length)
        for name, (kind, shape) in kinds.items() if offset == 0 or not drawn else ():
            own = [generator(seed, name, chunk, device) for seed in cfg.seeds]
            drawn[name] = torch.stack([random_numbers(kind, (length, *shape), g) for g in own])
        noise = {name: values[:, offset] for name, values in drawn.items()}
        rows = noise.pop("rows")
        rows = online.rows(rows) if online else rows % len(table["obs"])
        yield agent.gather(table, rows), noise


def random_numbers(kind, size: tuple, g: torch.Generator) -> Tensor:
    """Numbers "normal" or "uniform", "whole" ones, or booleans that are True with chance `kind`."""
    how = {"generator": g, "device": g.device}
    if kind in ("normal", "uniform"):
        return (torch.randn if kind == "normal" else torch.rand)(size, **how)
    if kind == "whole":
        return torch.randint(2**62, size, **how)
    words = torch.randint(-(2**63), 2**63 - 1, (math.prod(size) // 4 + 1,), **how)
    bits = words.view(torch.int16)[: math.prod(size)]  # four from each number: a third of the time
    return bits.view(size) <= round(kind * 2**16) - 2**15 - 1


def compiled(update, cfg, device: torch.device):
    """`update`, as one graph in long runs: half a minute, for a third less time from then on."""
    graphs, enough = cfg.compile == "graphs", 5_000 if device.type == "cuda" else 20_000
    check(device.type == "cuda" or not graphs, "compile: graphs are for cuda: use true")
    wanted = cfg.num_updates >= enough if cfg.compile == "auto" else cfg.compile != "false"
    print(f"compile: {'on' if wanted else 'off'} (auto is on from {enough:,} updates)")
    if not wanted:
        return update
    torch._dynamo.config.trace_autograd_ops = True  # gradients are part of the graph
    mode = "reduce-overhead" if graphs else None  # CUDA launches all kernels at once
    return torch.compile(update, fullgraph=True, mode=mode)


def describe(metadata: dict, spec, device: torch.device) -> dict:
    """What the numbers of a run depend on besides its config."""
    git = ["git", "-C", str(SCRIPT.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    git.append("--exclude=*")  # no tag
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    names = ("eval_env_spec", "env_spec", "ref_min_score", "ref_max_score", "environment_differs")
    names += ("fingerprint", "source", "longest_episode")
    about = {name: metadata.get(name) for name in names}
    about |= {"id": f"{time.time_ns():x}", "commit": (commit or "").strip() or None}
    about |= {"env_id": spec.id if spec else None, "command": sys.argv}
    about["machine"] = f"{platform.platform()}, {os.cpu_count()} CPUs, {device}"
    about["threads"], packages = torch.get_num_threads(), ("torch", "gymnasium", "mujoco", "minari")
    return about | {name: importlib.metadata.version(name) for name in packages}


def build(run: Run, agent_class, online_class) -> None:
    """All that a run needs; its folder comes last, when nothing is wrong."""
    cfg, cuda = run.cfg, torch.cuda.is_available()
    check(cuda or cfg.device != "cuda", "device: there is no cuda here, use auto or cpu")
    device = torch.device("cuda" if cuda and cfg.device != "cpu" else "cpu")
    episodes, space, metadata = load_dataset(cfg, agent_class)
    episodes = agent_class.select(episodes, cfg)
    units = {**measure(episodes, space, cfg), "frame_shape": metadata["frame_shape"]}
    run.agent = agent = agent_class(cfg, units).to(device)
    run.spec, run.references = find_environment(cfg, metadata, agent)
    saved = run.saved or (read_checkpoint(cfg.checkpoint) if cfg.checkpoint else None)
    if saved:
        with explained("the checkpoint is not of this script, its data or its sizes"):
            run.step, state, config = saved["step"], saved["agent"], saved["config"]
            for name in ("seed", "num_seeds", "normalize_obs", "hidden_dim"):
                own, mend = config[name], f"give --{name} {config[name]}".lower()
                check(own == getattr(cfg, name), f"checkpoint: its {name} is {own}, {mend}")
            same = [torch.allclose(state[n], agent.get_buffer(n).cpu()) for n in Agent.units[2:4]]
            check(all(same), f"checkpoint: {cfg.dataset_id} has other bounds of actions")
            same = saved["about"]["fingerprint"] == metadata["fingerprint"] or not run.saved
            check(same, f"{cfg.dataset_id} is not the data that {run.folder} began with")
            agent.load_state_dict(state)
        last, goes_on = cfg.num_updates, run.saved and online_class
        last += cfg.online_steps * cfg.updates_per_step if goes_on else 0
        check(0 <= run.step <= last, f"checkpoint: at update {run.step} of {last}, see num_updates")
    with explained(f"{cfg.dataset_id} does not go into the memory of {device}"):
        table = agent.table(episodes)
    check(len(table["obs"]), f"dataset {cfg.dataset_id} has no step to learn from")
    if online_class and cfg.online_steps:
        check(run.spec, "online_steps: there is nothing to play: set env_id")
        with explained("the online phase does not begin"):
            run.online = online_class(agent, run.spec, table, run.saved)
    run.batches = batches(agent, table, run.step, run.online)
    run.graph = compiled(agent.update, cfg, device)
    run.about |= describe(metadata, run.spec, device)
    run.open()
    if saved and not run.saved:
        run.save()  # so that a resume begins with it


def train(agent_class, cfg, online_class=None) -> None:
    """A whole run; with `online_class` and online_steps it goes on in the environment."""
    find_dataset(cfg)  # which may change dataset_id
    run = Run(cfg, agent_class.__name__)
    if not run.finished:
        build(run, agent_class, online_class)
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(n, lambda *_: run.stop(run.playing)) for n in numbers]
        try:
            run.loop()
            last = run.evaluate(cfg.final_eval_episodes, final=True)
        except (RunError, KeyboardInterrupt):  # an environment failed, or a signal came
            with contextlib.suppress(RunError):  # NaN is not saved
                run.save()
            raise
        finally:
            for number, handler in zip(numbers, old, strict=True):
                signal.signal(number, handler)
        result = {**run.config, **run.about, "seconds": round(run.seconds, 1), "last": last}
        result |= dict(zip(("ref_min_score", "ref_max_score"), run.references, strict=True))
        run.write("result.json", json.dumps(result, indent=1).encode())
        if run.wandb:
            run.wandb.finish()
    with explained(f"{run.folder}/result.json cannot be read, move it away and resume"):
        result = json.loads((run.folder / "result.json").read_bytes())
        for row in result["last"]:
            score = f", score {row['eval/score']:.1f}" if "eval/score" in row else ""
            print(f"seed {row['seed']}: return {row['eval/return']:.1f}{score}")
        if result["environment_differs"]:
            print(f"the environment differs: {result['environment_differs']}")
        episodes = result["final_eval_episodes"] if result["last"] else 0
        print(f"{episodes} evaluation episodes a seed; {run.folder}")


class UniqueKeys(yaml.SafeLoader):
    """PyYAML would let a key stand twice, and aliases explode."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not for settings: write the value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping, keys = super().construct_mapping(node, deep), [key.value for key, _ in node.value]
        if len(mapping) < len(keys):
            raise yaml.YAMLError(f"{max(keys, key=keys.count)} more than once: keep one")
        return mapping


def read_yaml(path) -> dict:
    """The settings of a YAML file."""
    with explained(f"config {path} cannot be read"):
        values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    right = isinstance(values, dict) and values
    check(right, f"config {path} holds no settings: write lines like 'gamma: 0.99'")
    return values


def parse(config_class, argv=None):
    """`--config FILE` and `--field value` in any order; the command line wins over the file.

    A resumed run has its file in its folder. pyrallis makes the help of the fields' comments.
    """
    argv, given = sys.argv[1:] if argv is None else argv, {}
    if {"-h", "--help"} & set(argv):
        inspect.getsource = functools.cache(inspect.getsource)  # pyrallis asks for each field
        pyrallis.argparsing.ArgumentParser(config_class).parse_args(["--help"])
    words = [part for x in argv for part in (x.split("=", 1) if x[:2] == "--" else [x])]
    for flag, value in itertools.zip_longest(words[::2], words[1::2], fillvalue="--"):
        right = flag[:2] == "--" != flag and value[:2] != "--"
        check(right, f"{flag} {value}: settings are given as '--name value'; --help lists them")
        given[flag[2:]] = value
    path, own = given.pop("config", None), Path(given.get("run_dir", ""), "config.yaml")
    if path is None and given.get("resume", "").lower() == "true" and own.is_file():
        path = own
    values = {**(read_yaml(path) if path is not None else {}), **given}
    env_id = str(values.get("env_id"))
    word = f"config {path}: {env_id} is imported on your own word only: add --env_id {env_id}"
    check(":" not in env_id or "env_id" in given, word)
    unknown = values.keys() - {spec.name for spec in dataclasses.fields(config_class)}
    where = f"config {path}: " if path is not None else ""
    mend = "--config FILE reads a file, --help lists the settings"
    check(not unknown, f"{where}there is no setting {[*unknown][:1]}: {mend}")
    return config_class(**values)


def command_line(agent_class, config_class, argv=None, online=None) -> int:
    """Run a script with the words of the command line, or `argv`; returns the exit code."""
    gym.logger.min_level = gym.logger.ERROR  # v4 environments ask to be replaced
    try:
        train(agent_class, parse(config_class, argv), online)
        return 0
    except (RunError, OSError, KeyboardInterrupt) as error:
        print("error:", re.sub(r"\s*\n\s*", " ", str(error) or "stopped"), file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


# <<< shared: run


# >>> shared: online
class Online:
    """The online phase: every member plays an environment of its own and fills its own buffer.

    That of member m lies in the table from row `first[m]` on, behind the data's. Checkpoints hold
    the buffers; after a resume the running episodes begin anew.
    """

    def __init__(self, agent: nn.Module, spec, table: dict, saved: Optional[dict]):
        self.agent, self.cfg, self.table, self.steps = agent, agent.cfg, table, 0
        self.envs, self.running = [gym.make(spec) for _ in self.cfg.seeds], {}
        self.begun, self.filled = [0] * len(self.envs), [0] * len(self.envs)
        self.ended = [[] for _ in self.envs]  # (return, length) of episodes since the last log row
        self.offline, room = len(table["obs"]), len(self.envs) * self.cfg.online_steps
        self.first = [self.offline + i * self.cfg.online_steps for i in range(len(self.envs))]
        for name, values in table.items():
            table[name] = torch.cat([values, values.new_zeros(room, *values.shape[1:])])
        if saved and saved["online"]:
            past = max(0, saved["step"] - self.cfg.num_updates)  # it may stand before the phase
            self.steps = math.ceil(past / self.cfg.updates_per_step)
            kept = zip(self.begun, saved["online"]["begun"], saved["online"]["rows"], strict=True)
            for i, (_, begun, rows) in enumerate(kept):
                most = max(begun, len(rows["obs"]))
                check(
                    0 <= begun and most <= self.steps, "online: the checkpoint has too many steps"
                )
                self.begun[i] = int(begun)
                self.enter(i, rows)

    def state(self) -> dict:
        """What a checkpoint holds of the phase."""
        spans = [slice(f, f + n) for f, n in zip(self.first, self.filled, strict=True)]
        rows = [{name: v[span].clone() for name, v in self.table.items()} for span in spans]
        return {"begun": list(self.begun), "rows": rows}

    def enter(self, member: int, rows: dict) -> None:
        """Add rows to a member's buffer."""
        start = self.first[member] + self.filled[member]
        self.filled[member] += len(rows["obs"])
        for name, values in rows.items():
            self.table[name][start : start + len(values)] = values

    def play(self) -> None:
        """One step of every member's environment."""
        noise, whole = [], self.agent.whole_episodes
        for i, seed in enumerate(self.cfg.seeds):
            g = generator(seed, "explore", self.steps)
            noise.append(torch.randn(1, self.agent.act_dim, generator=g))
            if i not in self.running:
                first = generator(seed, "episode", self.begun[i]).initial_seed()
                obs, self.begun[i] = env_step(self.envs[i], seed=first)[0], self.begun[i] + 1
                self.running[i] = {"obs": [obs], "action": [], "reward": [], "terminated": []}
        obs = torch.as_tensor(np.stack([self.running[i]["obs"][-1:] for i in range(len(noise))]))
        obs, noise = (x.to(self.agent.obs_mean.device) for x in (obs, torch.stack(noise)))
        actions = self.agent.explore(obs, noise).squeeze(1).cpu().numpy()
        steps = [env_step(env, actions[i]) for i, env in enumerate(self.envs)]
        for i, (obs, reward, terminated, truncated, _) in enumerate(steps):
            episode, ended = self.running[i], terminated or truncated
            values = (obs, actions[i], reward, terminated)
            for column, value in zip(episode.values(), values, strict=True):
                column.append(value)
            if ended or not whole:
                new = {"obs": episode["obs"] if whole else episode["obs"][-2:]}
                new |= {k: v if whole else v[-1:] for k, v in episode.items() if k != "obs"}
                new = {k: np.array(v, np.float32) for k, v in new.items()}
                self.enter(i, self.agent.rows(new))
            if ended:
                self.ended[i].append((sum(episode["reward"]), len(episode["reward"])))
                del self.running[i]
        self.steps += 1

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows that an update reads, chosen by whole numbers [S, B]."""
        share, size = self.cfg.online_share, numbers.shape[-1]
        first, filled = (
            torch.tensor(x, device=numbers.device)[:, None] for x in (self.first, self.filled)
        )
        if share is None:
            rows = numbers % (self.offline + filled)
        else:
            new = torch.arange(size, device=numbers.device) < round(share * size)
            own = self.offline + numbers % filled.clamp(min=1)
            rows = torch.where(new & (filled > 0), own, numbers % self.offline)
        return rows + (rows >= self.offline) * (first - self.offline)

    def metrics(self, member: int) -> dict:
        """Mean return and length of the episodes that ended since the last log row, if any did."""
        ended, self.ended[member] = self.ended[member], []
        names = ("online/return", "online/length") if ended else ()
        return {name: float(np.mean([e[i] for e in ended])) for i, name in enumerate(names)}


# <<< shared: online


def main(argv=None) -> int:
    return command_line(FQL, TrainConfig, argv, online=Online)


if __name__ == "__main__":
    sys.exit(main())
