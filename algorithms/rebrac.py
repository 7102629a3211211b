"""Revisited behaviour-regularised actor-critic (ReBRAC).

Denis Tarasov, Vladislav Kurenkov, Alexander Nikulin, Sergey Kolesnikov: "Revisiting the Minimalist
Approach to Offline Reinforcement Learning", 2023, arXiv 2305.09836. TD3: arXiv 1802.09477.

TD3+BC with a penalty for the critics too, of a weight of its own: an action at s' far from the one
that the data took there is worth less. Deeper networks, layer normalisation in the critics.

    L_Q  = E_(s,a,r,s',a')[ sum_i ( y - Q_i(s,a) )^2 ]                               (eq. 4)
           with y  = r + gamma (1 - terminated) (min_i Qbar_i(s', a~) - beta_2 |a~ - a'|^2)
                a~ = clip(pibar(s') + clip(sigma N(0, 1), -c, c), -1, 1)             (TD3)
                a' = the action of the data at s'
    L_pi = E_(s,a)[ beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s)) ]              (eq. 3)
           with lambda = 1 / E_s |min_i Q_i(s, pi(s))|, a constant

Both penalties are sums over action dimensions (TD3+BC's is a mean). Order of one update: both
critics; in every `policy_delay`-th update also the policy, then the targets of critics and policy.
Online (`online_steps`) beta_1 falls linearly with the steps, no lower than to `online_actor_share`
of itself, beta_2 is `online_critic_share` of itself, and the policy acts with Gaussian noise of
`exploration_noise`: the defaults are those of the fine-tuning in CORL, by the same authors.

Deviations:
    D1  The policy maximises lambda min_i Q_i, as in the authors' code; equation 3 has one Q, and
        TD3 and TD3+BC, where lambda comes from, take Q_1.
    D2  The target policy moves towards the policy after its step, as in TD3; the authors' code
        takes the weights before it. TD3 too moves the policy in the second update of every two,
        the authors' code in the first.
    D3  Weights start from PyTorch's default U(+-1/sqrt(fan_in)): one initialisation for all
        scripts. The authors' code has biases of 0.1 and last layers within 1e-3 (policy) and
        3e-3 (critics) of 0; the paper names none. Its layer normalisation adds 1e-6, ours 1e-5.
    D4  Online steps are learned from once their episode has ended, when a' is known; CORL takes an
        action of the policy for a' at once.

Metrics, means over the batch: `train/critic_loss`, `train/q` the critics at the data (a q that
never stops growing means divergence), `train/target_penalty` beta_2 |a~ - a'|^2, 0 where s'
is terminal (close to q: it rules the target); in the updates that move the policy
`train/actor_loss`, `train/bc_loss` |pi(s) - a|^2, `train/policy_q` min_i Q_i(s, pi(s)) (far above
q: extrapolation). Online also `online/return`, `online/length`, means of the episodes that ended
since the last row.

    python algorithms/rebrac.py --config configs/rebrac/hopper-medium.yaml
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import gymnasium as gym
import minari
import numpy as np
import pyrallis
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


# >>> shared: config
def setting(default, low=None, high=None, choices=(), network=False):
    """A config field with its range (ends included) or choices; checkpoints fix `network` ones."""
    metadata = {"low": low, "high": high, "choices": choices, "network": network}
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """What every script has: the task, the schedule, evaluation, logging, the device."""

    dataset_id: str = ""  # Minari id, or a folder that holds a Minari dataset
    fallback_dataset_id: str = ""  # used, with a warning, where dataset_id is missing
    download: bool = True  # ask Minari's hub for a dataset_id that the local store lacks
    env_id: str = "auto"  # where to evaluate: auto = the dataset's own, none, or a Gymnasium id
    env_kwargs: dict = field(default_factory=dict)  # arguments of the evaluation environment
    ref_min_score: Optional[float] = setting(None, -1e9, 1e9)  # return that scores 0
    ref_max_score: Optional[float] = setting(None, -1e9, 1e9)  # and 100; null = the dataset's
    normalize_obs: bool = setting(False, network=True)  # observations to mean 0, deviation 1
    reward_scale: float = setting(1.0, -1e6, 1e6)  # r <- reward_scale * r + reward_shift
    reward_shift: float = setting(0.0, -1e6, 1e6)  # added to every reward after the scale
    reward_by_return_range: bool = False  # also r <- 1000 r / (best - worst return of the data)
    success_reward: Optional[float] = setting(None, -1e9, 1e9)  # stored r >= this is a termination
    seed: int = setting(0, 0, 2**31)  # seed of the first member
    num_seeds: int = setting(1, 1, 1024, network=True)  # seeds trained at once: seed, seed + 1, ...
    num_updates: int = setting(1_000_000, 1, 10**10)  # gradient updates of each member
    batch_size: int = setting(256, 1, 10**6)  # transitions per member and update
    eval_every: int = setting(5_000, 1, 10**10)  # updates, online steps, between evaluations
    eval_episodes: int = setting(10, 0, 10_000)  # episodes per member and evaluation; 0 = none
    final_eval_episodes: int = setting(100, 0, 10_000)  # episodes per member after the last update
    eval_seed: int = setting(10_000, 0, 2**31)  # episode i starts from eval_seed + i, for any seed
    log_every: int = setting(1_000, 1, 10**7)  # the same between log rows (means of the interval)
    checkpoint_every: int = setting(50_000, 1, 10**10)  # the same between checkpoints
    run_dir: str = ""  # the run's folder; "" = runs/<label>/<dataset>/<date-time>-<seeds>
    resume: bool = False  # go on from the checkpoint in run_dir
    checkpoint: str = ""  # start from (or evaluate) this run folder or checkpoint.pt
    eval_only: bool = False  # only evaluate `checkpoint`, with final_eval_episodes
    export: str = ""  # only write the policy of `checkpoint` to this file: NAME.pt2 or NAME.onnx
    member: int = setting(0, 0, 1023)  # whose policy: 0 is the checkpoint's first seed
    label: str = ""  # name of this variant in folders and tables; "" = the algorithm's name
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: str = setting("auto", choices=("auto", "true", "false", "graphs"))  # auto = long runs
    wandb: str = setting("disabled", choices=("disabled", "offline", "online"))  # Weights & Biases
    wandb_project: str = "stitch"  # project in Weights & Biases


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
class TrainConfig(OnlineConfig):
    """ReBRAC's own settings; defaults: the paper's for locomotion, the penalties its most usual."""

    batch_size: int = setting(1024, 1, 10**6)  # transitions per member and update
    gamma: float = setting(0.99, 0, 1)  # discount
    actor_penalty: float = setting(0.01, 0, 1e6)  # beta_1, weight of the policy's squared error
    critic_penalty: float = setting(0.01, 0, 1e6)  # beta_2, the same in the critics' target
    policy_noise: float = setting(0.2, 0, 2)  # sigma of the noise on the target policy's actions
    noise_clip: float = setting(0.5, 0, 2)  # c, the bound of that noise
    policy_delay: int = setting(2, 1, 1000)  # critic updates for one of policy and targets
    exploration_noise: float = setting(0.0, 0, 2)  # sigma of the noise on online actions
    online_actor_share: float = setting(0.5, 0, 1)  # of beta_1, to which it falls online
    online_critic_share: float = setting(0.0, 0, 1)  # of beta_2, online
    tau: float = setting(0.005, 0, 1)  # step of the targets towards their networks
    actor_lr: float = setting(1e-3, 0, 1)  # learning rate of the policy
    critic_lr: float = setting(1e-3, 0, 1)  # learning rate of the critics
    hidden_dim: int = setting(256, 1, 65_536, network=True)  # width of every hidden layer
    hidden_layers: int = setting(3, 1, 64, network=True)  # hidden layers of every network


# >>> shared: networks
def generator(seed: int, stream: str, index: int = 0, device="cpu") -> torch.Generator:
    """A random generator for each (seed, stream, index), so that no generator state is kept."""
    words = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), index]).generate_state(1)
    return torch.Generator(device).manual_seed(int(words[0]))


def one_of(values: Tensor, every: int) -> Tensor:
    """The first of each `every`; a slice of all of them would cost a copy of their gradient."""
    return values if every == 1 else values[::every]


class Linear(nn.Module):
    """One linear map for each of S members x E: [S*E, B, in_dim] -> [S*E, B, out_dim].

    `generators` holds one CPU generator per member; weights start from U(+-1/sqrt(in_dim)).
    """

    def __init__(self, generators, in_dim: int, out_dim: int, ensemble: int = 1):
        super().__init__()
        bound = in_dim**-0.5

        def draw(*shape):
            each = [
                torch.empty(ensemble, *shape).uniform_(-bound, bound, generator=g)
                for g in generators
            ]
            return nn.Parameter(torch.cat(each))

        self.weight, self.bias = draw(in_dim, out_dim), draw(1, out_dim)

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        """`every` = E runs only the first network of each member: [S, B, in_dim]."""
        weight, bias = one_of(self.weight, every), one_of(self.bias, every)
        if weight.shape[-1] == 1:  # a matrix product is slow for a single column
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) of each of `count` networks: [count, B, dim]."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, dim))
        self.bias = nn.Parameter(torch.zeros(count, 1, dim))

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(one_of(self.bias, every), x, one_of(self.weight, every))


class MLP(nn.Module):
    """ReLU network of each member: [S, B, in_dim] -> [S, B, out_dim]; `hidden`: its widths.

    With `ensemble` = E every member has E networks that read the same input: -> [S, E, B, out_dim].
    `layer_norm` normalises the hidden units after each ReLU.
    """

    def __init__(self, generators, in_dim, hidden, out_dim, ensemble=0, layer_norm=False):
        super().__init__()
        pairs, count = itertools.pairwise([in_dim, *hidden, out_dim]), max(1, ensemble)
        self.layers = nn.ModuleList(Linear(generators, *pair, count) for pair in pairs)
        norms = [LayerNorm(count * len(generators), dim) for dim in hidden] if layer_norm else []
        self.norms, self.ensemble = nn.ModuleList(norms), ensemble

    def forward(self, x: Tensor, masks: Optional[Tensor] = None, first: bool = False) -> Tensor:
        """`masks` [S, hidden_layers, B, hidden_dim] multiply the hidden units (dropout).

        `first` runs only the first network of an ensemble: -> [S, B, out_dim].
        """
        ensemble, every = (0, self.ensemble) if first else (self.ensemble, 1)
        if ensemble:
            x = x.unsqueeze(1).expand(-1, ensemble, -1, -1).flatten(0, 1)
        for i, layer in enumerate(self.layers[:-1]):
            x = F.relu_(layer(x, every))
            if self.norms:
                x = self.norms[i](x, every)
            if masks is not None:
                x = x * masks[:, i]
        x = self.layers[-1](x, every)
        return x.unflatten(0, (-1, ensemble)) if ensemble else x


class Scaler(nn.Module):
    """Maps between the environment's units and the agent's; a buffer of the agent, saved with it.

    obs_mean, obs_std [obs_dim]; action_low, action_high [act_dim] are mapped to [-1, 1].
    """

    def __init__(self, obs_mean, obs_std, action_low, action_high):
        super().__init__()
        low, high = (
            torch.as_tensor(bound, dtype=torch.float32) for bound in (action_low, action_high)
        )
        self.register_buffer("obs_mean", torch.as_tensor(obs_mean, dtype=torch.float32).clone())
        self.register_buffer("obs_std", torch.as_tensor(obs_std, dtype=torch.float32).clone())
        self.register_buffer("action_center", (high + low) / 2)
        self.register_buffer("action_half_range", (high - low) / 2)

    def obs(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def action(self, action: Tensor) -> Tensor:
        return (action - self.action_center) / self.action_half_range

    def env_action(self, action: Tensor) -> Tensor:
        return self.action_center + self.action_half_range * action.clamp(-1, 1)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], in half the time."""
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)


class Agent(nn.Module):
    """What the frame asks of an agent, besides `scaler`, `update` and `act`."""

    batch_fields: tuple  # what `update` reads of the data
    whole_episodes = False  # whether online steps are learned from once their episode has ended

    def table(self, data: dict, starts: Tensor) -> dict:  # noqa: ARG002
        """What batches are drawn from: columns of N rows, given the prepared transitions.

        `starts` [E + 1] is the first row of each episode, then N.
        """
        return {name: data[name] for name in self.batch_fields}

    def gather(self, data: dict, rows: Tensor) -> dict:
        """The batch at `rows` [S, B] of the table."""
        return {name: take_rows(values, rows) for name, values in data.items()}

    def noise_shapes(self) -> dict:
        """The random numbers of `update`: name -> (kind, shape for one member).

        The kind is "normal", "uniform", or a probability: booleans that are True with it.
        """
        return {}

    def variant(self, step: int) -> tuple:  # noqa: ARG002
        """What else `update` is told, such as whether a delayed actor moves.

        Each new value compiles anew, but for floats, which `update` gets as tensors [].
        """
        return ()

    def export_inputs(self) -> dict:
        """Examples of an exported policy's inputs: name -> (tensor, names of its free axes)."""
        return {"obs": (torch.zeros(2, len(self.scaler.obs_mean)), ("N",))}

    def learning_rates(self, step: int) -> dict:  # noqa: ARG002
        """Scheduled learning rates: optimizer -> value."""
        return {}


def adam(parameters, lr: float, decay: float = 0.0) -> torch.optim.Adam:
    """One Adam for all members: it is elementwise, so they do not touch each other."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down `loss` [S]; its sum leaves every member its own gradient."""
    (group,) = optimizer.param_groups
    take_step(optimizer, torch.autograd.grad(loss.sum(), group["params"]))


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer, gradients) -> None:
    """The optimizer's own step; torch.compile cannot trace that, and gets the same made otherwise.

    There the state has to exist, and the learning rate to be a tensor: see `traceable`.
    """
    (group,) = optimizer.param_groups
    params = group["params"]
    gradients = [each.contiguous() for each in gradients]  # fused kernels do not look at strides
    if not torch.compiler.is_compiling():
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        return
    states = [optimizer.state[p] for p in params]
    moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    rates = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
    many = len(params) > 32
    step = adam_kernel if many else adam_in_graph
    step(params, gradients, *moments, *rates, group["decoupled_weight_decay"])


def adam_in_graph(params, gradients, m, v, steps, lr, beta1, beta2, eps, decay, decoupled) -> None:
    """Adam (arXiv 1412.6980, algorithm 1) or AdamW (1711.05101), fused with what is around it."""
    torch._foreach_add_(steps, 1)
    count = steps[0].double()
    # exp, not pow: Inductor would work a pow out again for every few weights
    correction1, correction2 = (1 - (count * math.log(beta)).exp() for beta in (beta1, beta2))
    step_size, root = lr / correction1, correction2.sqrt()
    for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
        if decoupled:
            p.mul_(1 - lr * decay)
        elif decay:
            g = g + decay * p
        m[i].lerp_(g, 1 - beta1)
        v[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(step_size * m[i] / (v[i].sqrt() / root + eps))


@torch.library.custom_op("stitch::adam_kernel", mutates_args=("params", "m", "v", "steps"))
def adam_kernel(
    params: list[Tensor],
    gradients: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
) -> None:
    """The same by torch.optim's kernel, one node of the graph: many tensors compile too long."""
    rates = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay}
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    torch._foreach_add_(steps, 1)
    kernel(params, gradients, m, v, [], steps, **rates, amsgrad=False, maximize=False)


@adam_kernel.register_fake
def adam_kernel_of_fakes(*_) -> None:
    """Nothing is returned, so tracing has nothing to make."""


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- target + tau (online - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


# <<< shared: networks


class ReBRAC(Agent):
    """S independent ReBRAC learners; a batch holds [S, B, dim] or [S, B] tensors, a loss is [S]."""

    batch_fields = ("obs", "action", "reward", "next_obs", "next_action", "terminated")
    whole_episodes = True  # D4

    def __init__(self, cfg: TrainConfig, scaler: Scaler):
        super().__init__()
        self.cfg, self.scaler = cfg, scaler
        obs_dim, act_dim = len(scaler.obs_mean), len(scaler.action_center)
        generators = [generator(seed, "init") for seed in member_seeds(cfg)]  # D3
        hidden = [cfg.hidden_dim] * cfg.hidden_layers
        self.actor = MLP(generators, obs_dim, hidden, act_dim)
        self.critic = MLP(generators, obs_dim + act_dim, hidden, 1, ensemble=2, layer_norm=True)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), cfg.critic_lr)

    def table(self, data: dict, starts: Tensor) -> dict:
        """Adds next_action [N, act_dim], the action of the episode's next step.

        A terminal step needs none and has 0; the last step of a truncated episode, whose next
        action nobody took, is left out.
        """
        last = starts[1:] - 1
        data = {**data, "next_action": data["action"].roll(-1, 0)}
        data["next_action"][last] = 0
        known = torch.ones_like(data["terminated"], dtype=torch.bool)
        known[last] = data["terminated"][last] == 1
        return {name: data[name][known] for name in self.batch_fields}

    def q(self, critic: MLP, obs: Tensor, action: Tensor) -> Tensor:
        """Q_i(s,a) of both critics [S, 2, B]."""
        return critic(torch.cat([obs, action], -1)).squeeze(-1)

    def target(self, batch: dict, noise: Tensor, critic_penalty: Tensor):
        """Equation 4: y [S, B] at the target policy's smoothed action; its mean penalty [S]."""
        cfg, next_obs, alive = self.cfg, batch["next_obs"], 1 - batch["terminated"]
        smoothing = (cfg.policy_noise * noise).clamp(-cfg.noise_clip, cfg.noise_clip)
        policy = (self.target_actor(next_obs).tanh() + smoothing).clamp(-1, 1)
        distance = (policy - batch["next_action"]).square().sum(-1)
        penalty = alive * critic_penalty * distance
        next_q = alive * self.q(self.target_critic, next_obs, policy).amin(-2)
        return batch["reward"] + cfg.gamma * (next_q - penalty), penalty.mean(-1)

    def critic_loss(self, target: Tensor, obs: Tensor, action: Tensor):
        """Equation 4: both critics regress to y."""
        q = self.q(self.critic, obs, action)
        return (target.unsqueeze(-2) - q).square().mean(-1).sum(-1), q.mean((-2, -1))

    def actor_loss(self, obs: Tensor, action: Tensor, actor_penalty: Tensor):
        """Equation 3: the normalised Q of the policy's actions and their squared error."""
        policy = self.actor(obs).tanh()
        q = self.q(self.critic, obs, policy).amin(-2)  # D1
        weight = 1 / q.detach().abs().mean(-1)
        bc_loss = (policy - action).square().sum(-1).mean(-1)
        return actor_penalty * bc_loss - weight * q.mean(-1), bc_loss, q.mean(-1)

    def update(self, batch: dict, noise: dict, move_actor: bool, *penalties: Tensor) -> dict:
        """One update of every member: critics; where it is due the policy, then the targets."""
        obs, action = batch["obs"], batch["action"]
        actor_penalty, critic_penalty = penalties
        with torch.no_grad():
            target, penalty = self.target(batch, noise["target"], critic_penalty)
        critic_loss, q = self.critic_loss(target, obs, action)
        descend(self.critic_optimizer, critic_loss)
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach(), "target_penalty": penalty}
        if move_actor:
            actor_loss, bc_loss, policy_q = self.actor_loss(obs, action, actor_penalty)
            descend(self.actor_optimizer, actor_loss)
            polyak(self.target_critic, self.critic, self.cfg.tau)
            polyak(self.target_actor, self.actor, self.cfg.tau)  # D2
            metrics |= {"actor_loss": actor_loss.detach(), "bc_loss": bc_loss.detach()}
            metrics |= {"policy_q": policy_q.detach()}
        return metrics

    def variant(self, step: int) -> tuple:
        """Whether the policy moves (D2), beta_1 and beta_2."""
        cfg, shares = self.cfg, (1, 1)
        if cfg.online_steps and step >= cfg.num_updates:
            gone = (step - cfg.num_updates) / (cfg.online_steps * cfg.updates_per_step)
            shares = max(1 - gone, cfg.online_actor_share), cfg.online_critic_share
        penalties = shares[0] * cfg.actor_penalty, shares[1] * cfg.critic_penalty
        return ((step + 1) % cfg.policy_delay == 0, *penalties)

    def noise_shapes(self) -> dict:
        return {"target": ("normal", (self.cfg.batch_size, len(self.scaler.action_center)))}

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Actions in the environment's units: [S, N, obs_dim] -> [S, N, act_dim]."""
        return self.scaler.env_action(self.actor(self.scaler.obs(obs)).tanh())

    @torch.no_grad()
    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """As `act`, with noise on it that is made of standard normal noise [S, N, act_dim]."""
        policy = self.actor(self.scaler.obs(obs)).tanh()
        return self.scaler.env_action(policy + self.cfg.exploration_noise * noise)


# ---- frame: the same in every script ----
# >>> shared: command_line
class RunError(Exception):
    """Ends the script with one line and `code`: 2 where the user can mend it."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class UniqueKeys(yaml.SafeLoader):
    """PyYAML would let a key stand twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise RunError(f"{key} more than once: keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, ValueError, yaml.YAMLError, RunError) as error:
        raise RunError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        raise RunError(f"config {path} holds no settings: write lines like 'gamma: 0.99'")
    return values


def convert(spec: dataclasses.Field, raw):
    """A value of a YAML file, or a word of the command line, as the field's type, in its range."""

    def fail(expected: str):
        raise RunError(f"{spec.name}: {raw!r} is not {expected}")

    kind, optional = spec.type, type(None) in typing.get_args(spec.type)
    choices = spec.metadata.get("choices")
    if choices:
        return str(raw).lower() if str(raw).lower() in choices else fail(f"one of {choices}")
    if kind is str:
        return raw if isinstance(raw, str) else fail("text (put it in quotes)")
    try:
        value = yaml.load(raw, UniqueKeys) if isinstance(raw, str) else raw
    except (ValueError, yaml.YAMLError):
        value = raw
    if (optional and value is None) or (kind in (bool, dict) and isinstance(value, kind)):
        return value
    if kind in (bool, dict):
        fail("true or false" if kind is bool else "a mapping like {name: value}")
    kind = float if optional else kind
    try:  # YAML 1.1 takes 1e6 for text
        value = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or (kind is int and value != int(value)):
        fail("a whole number" if kind is int else "a finite number")
    low, high = spec.metadata["low"], spec.metadata["high"]
    return kind(value) if low <= value <= high else fail(f"between {low} and {high}")


def parse_config(config_class, argv: list):
    """`--config FILE` and `--field value` in any order; the command line wins over the file.

    pyrallis prints the help and builds the dataclass. What it would let pass (abbreviations, 2.5
    for an int, duplicates) is refused before.
    """
    if {"-h", "--help"} & set(argv):
        pyrallis.argparsing.ArgumentParser(config_class=config_class).parse_args(["--help"])
    words = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = {}
    for flag, value in itertools.zip_longest(words[::2], words[1::2], fillvalue="--"):
        if flag[:2] != "--" or value[:2] == "--":
            raise RunError(f"{flag}: settings are given as '--name value'; --help lists them")
        given[flag[2:]] = value
    path, own = given.pop("config", None), Path(given.get("run_dir") or ".", "config.yaml")
    if path is None and str(given.get("resume")).lower() == "true" and own.is_file():
        path = str(own)
    given = {**(read_yaml(path) if path is not None else {}), **given}
    fields = {spec.name: spec for spec in dataclasses.fields(config_class)}
    for name in given.keys() - fields.keys():
        close = difflib.get_close_matches(str(name), fields, 1) or ["one that --help lists"]
        raise RunError(f"there is no setting {name}: did you mean {close[0]}?")
    values = {name: convert(fields[name], raw) for name, raw in given.items()}
    if values.get("checkpoint"):
        values = merge_checkpoint(values, fields)
    return pyrallis.decode(config_class, values)


def merge_checkpoint(values: dict, fields: dict) -> dict:
    """Add a checkpoint's settings: all of them, or its networks' to train these offline."""
    saved = read_checkpoint(values["checkpoint"])["config"]
    if saved.keys() - fields.keys():
        raise RunError(f"checkpoint {values['checkpoint']} was made by another algorithm's script")
    if not any(values.get(name) for name in ("eval_only", "export", "online_steps")):
        saved = {k: v for k, v in saved.items() if fields[k].metadata.get("network")}
    for name in saved.keys() & values.keys():
        fixed = fields[name].metadata.get("network") or name == "seed"  # whose weights they are
        if fixed and saved[name] != values[name]:
            raise RunError(f"{name} is {saved[name]} in the checkpoint: leave it out")
    return {**saved, **values}


def member_seeds(cfg) -> range:
    return range(cfg.seed, cfg.seed + cfg.num_seeds)


# <<< shared: command_line


# >>> shared: data
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Dataset:
    """N transitions, episode after episode; E episodes."""

    transitions: dict  # obs, next_obs [N, obs_dim], action [N, act_dim], reward, terminated [N]
    starts: np.ndarray  # [E + 1], the first transition of every episode, then N
    returns: np.ndarray  # [E], undiscounted, of the rewards as they are stored
    metadata: dict  # Minari's
    action_bounds: tuple  # low, high [act_dim]
    fingerprint: str  # of the content; equal on every machine


def flatten_obs(obs) -> np.ndarray:
    """An array, or a (nested) dict of arrays joined in the sorted order of its keys, as float32."""
    if isinstance(obs, dict):
        return np.concatenate([flatten_obs(obs[key]) for key in sorted(obs)], -1)
    return np.asarray(obs, np.float32)


def find_dataset(dataset_id: str, download: bool) -> Optional[Path]:
    """The folder of a dataset: a folder by name, Minari's store, its hub; None = not to be had."""
    inside = not (Path(dataset_id).is_absolute() or ".." in Path(dataset_id).parts)
    stored = minari.storage.get_dataset_path(dataset_id if inside else None)
    bases = (Path(dataset_id), REPOSITORY / dataset_id, stored)
    for base, folder in [(base, base / sub) for base in bases for sub in (".", "data")]:
        if (folder / "metadata.json").is_file():
            for file in [folder, *folder.rglob("*")]:
                if not file.resolve().is_relative_to(base.resolve()):
                    raise RunError(f"dataset {dataset_id}: {file} is a link that leads out of it")
            return folder
    if not inside or any(base.exists() for base in bases):
        raise RunError(f"dataset_id {dataset_id} is no Minari dataset: it has no metadata.json")
    if download:
        try:
            minari.download_dataset(dataset_id)
            return stored / "data"
        except Exception as error:  # every remote of Minari's has errors of its own
            shutil.rmtree(stored, ignore_errors=True)  # half a dataset would pass for one
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            print(f"{dataset_id} does not come from Minari's hub: {reason}", file=sys.stderr)
    return None


def locate_dataset(cfg) -> Path:
    """The folder of `dataset_id`, or of the fallback; `cfg` then names the one that is used."""
    mend = f"check its name and Minari's store {minari.storage.get_dataset_path()}"
    if cfg.dataset_id.startswith("D4RL/"):
        mend = f"python datasets/d4rl.py {cfg.dataset_id[5:].replace('/', '-')}"
    folder = find_dataset(cfg.dataset_id, cfg.download) if cfg.dataset_id else None
    if folder is None and cfg.fallback_dataset_id:
        print(
            f"\nWARNING: {cfg.dataset_id} is not here. Training on {cfg.fallback_dataset_id}:\n"
            f"OTHER DATA, its scores are NOT comparable with published ones. For the real data:\n"
            f"{mend}\n",
            file=sys.stderr,
        )
        cfg.dataset_id, cfg.env_kwargs = cfg.fallback_dataset_id, {}
        cfg.env_id = "none" if cfg.env_id == "none" else "auto"
        cfg.ref_min_score = cfg.ref_max_score = None
        folder = find_dataset(cfg.dataset_id, download=False)
    if folder is None:
        raise RunError(f"dataset_id {cfg.dataset_id or '(not set)'} is not here: {mend}")
    cfg.fallback_dataset_id = ""
    return folder


def load_dataset(dataset_id: str, folder: Path) -> Dataset:
    """Read and check a Minari dataset; an error names the dataset, the episode and the mend."""

    def fail(problem: str):
        raise RunError(f"dataset {dataset_id} {problem}: mend it, or collect or convert it again")

    try:
        source = minari.MinariDataset(folder)
        numbers = range(source.total_episodes)
        with np.errstate(over="ignore"):  # what float32 cannot hold is found below
            stored, rarely = source.storage.get_episodes(numbers), {"delay": 5, "mininterval": 5}
            stored = tqdm(stored, "reading episodes", len(numbers), **rarely)
            episodes = [as_arrays(episode) for episode in stored]
    except Exception as error:  # each of Minari's formats has errors of its own
        fail(f"in {folder} cannot be read ({type(error).__name__} {' '.join(str(error).split())})")
    space = source.action_space
    if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded()):
        fail(f"has actions {space}, not a bounded Box with one axis")
    if not episodes:
        fail("has no episodes")
    for number, episode in enumerate(episodes):
        steps, obs_shape = len(episode["reward"]), episodes[0]["obs"].shape[1:2]
        shapes = {"obs": (steps + 1, *obs_shape), "action": (steps, *space.shape)}
        for name, values in episode.items():
            if steps == 0 or values.shape != shapes.get(name, (steps,)):
                fail(f"episode {number} has {steps} rewards but {name} of shape {values.shape}")
            if not np.isfinite(values).all():
                fail(f"episode {number} has NaN or infinite {name}")
        excess = np.maximum(space.low - episode["action"], episode["action"] - space.high).max()
        if excess > 1e-5:
            fail(f"episode {number} has actions {excess:.2g} outside of the action space")
    bounds = tuple(bound.astype(np.float32) for bound in (space.low, space.high))
    return join_episodes(episodes, source.storage.metadata, bounds)


def as_arrays(episode: dict) -> dict:
    """An episode of T steps as Minari reads it: T + 1 observations and T of the rest, float32."""
    names = {"action": "actions", "reward": "rewards"}
    names |= {"terminated": "terminations", "truncated": "truncations"}
    rest = {name: np.asarray(episode[theirs], np.float32) for name, theirs in names.items()}
    return {"obs": flatten_obs(episode["observations"]), **rest}


def join_episodes(episodes: list, metadata: dict, bounds: tuple) -> Dataset:
    """One table of transitions. The last next_obs of an episode is its own, terminated or not."""
    columns = {name: np.concatenate([e[name] for e in episodes]) for name in episodes[0]}
    lengths = np.array([len(e["reward"]) for e in episodes])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    digest = hashlib.sha256(lengths.astype("<i8").tobytes())
    for name in sorted(columns):
        digest.update(columns[name].astype("<f4", copy=False).tobytes())
    first_obs = starts[:-1] + np.arange(len(episodes))
    obs, truncated = columns.pop("obs"), columns.pop("truncated")
    columns["obs"] = np.delete(obs, first_obs + lengths, axis=0)
    columns["next_obs"] = np.delete(obs, first_obs, axis=0)
    columns["action"] = columns["action"].clip(*bounds)
    returns = np.add.reduceat(columns["reward"].astype(np.float64), starts[:-1])
    fingerprint = digest.hexdigest()[:16]
    print(
        f"{starts[-1]:,} transitions, {len(lengths):,} episodes ({truncated.sum():.0f} truncated), "
        f"return {returns.min():.1f} to {returns.max():.1f}, mean {returns.mean():.1f}; content "
        f"{fingerprint}"
    )
    return Dataset(columns, starts, returns, metadata, bounds, fingerprint)


def fit_scaler(dataset: Dataset, cfg) -> Scaler:
    """Mean and deviation of the observations; 1e-3 guards constant ones, as in TD3+BC's code."""
    obs = dataset.transitions["obs"]
    mean, std = np.zeros(obs.shape[1]), np.ones(obs.shape[1])
    if cfg.normalize_obs:
        mean, std = obs.mean(0, dtype=np.float64), obs.std(0, dtype=np.float64) + 1e-3
    return Scaler(mean, std, *dataset.action_bounds)


def prepare(dataset: Dataset, cfg, scaler: Scaler) -> dict:
    """The transitions on the agent's device and in its units, rewards transformed."""
    device, scale = scaler.obs_mean.device, cfg.reward_scale
    if cfg.reward_by_return_range:
        spread = dataset.returns.max() - dataset.returns.min()
        if spread == 0:
            raise RunError("reward_by_return_range: all returns are equal: set it to false")
        scale *= 1000 / spread
    data = {k: torch.as_tensor(values, device=device) for k, values in dataset.transitions.items()}
    data["obs"], data["next_obs"] = scaler.obs(data["obs"]), scaler.obs(data["next_obs"])
    data["action"] = scaler.action(data["action"])
    if cfg.success_reward is not None:
        data["terminated"] = torch.maximum(
            data["terminated"], (data["reward"] >= cfg.success_reward).float()
        )
    data["reward"] = scale * data["reward"] + cfg.reward_shift
    return data


# <<< shared: data


# >>> shared: environment
@contextlib.contextmanager
def one_thread():
    """For networks so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Environment:
    """Where policies are evaluated. Scores are 100 (return - ref_min) / (ref_max - ref_min)."""

    spec: gym.envs.registration.EnvSpec
    kwargs: dict
    references: tuple  # ref_min, ref_max, or None
    differs: Optional[str] = None  # how it is not the environment that the references belong to
    processes: int = field(default_factory=torch.get_num_threads)  # that play, at most
    copies: list = field(default_factory=list)  # made when needed, then kept
    workers: list = field(default_factory=list)  # pipes to processes that play some of the copies

    def get(self, count: int) -> list:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # v4 environments ask to be replaced
            while len(self.copies) < count:
                self.copies.append(gym.make(self.spec, **self.kwargs))
        return self.copies[:count]

    def score(self, value: float) -> Optional[float]:
        low, high = self.references
        return None if None in (low, high) else 100 * (value - low) / (high - low)

    def play(self, tasks: list, seeds=()) -> list:
        """What comes of tasks[i] for copy i: (obs, reward, whether the episode ends).

        A task is a seed to begin an episode with, an action, or None for a copy that rests. The
        copies are shared out among `processes`, four or more to each; torch's threads by default.
        `seeds` are those of the members, whose copies lie one after the other.
        """
        count = max(1, min(self.processes, len(tasks) // 4)) if sys.platform == "linux" else 1
        shares = [tasks[i::count] for i in range(count)]
        while len(self.workers) < len(shares) - 1:
            self.workers.append(self.fork())
        workers, results = self.workers[: len(shares) - 1], [None] * len(tasks)
        try:
            for worker, share in zip(workers, shares[1:], strict=True):
                worker.send(share)
            answers = [self.play_share(shares[0]), *(worker.recv() for worker in workers)]
        except (EOFError, OSError):
            raise RunError("a process that plays environments ended (out of memory?)", 1) from None
        for i, answer in enumerate(answers):
            if isinstance(answer, tuple):
                copy, reason = i + len(shares) * answer[0], answer[1]
                whose = f" of seed {seeds[copy * len(seeds) // len(tasks)]}" if seeds else ""
                raise RunError(f"the environment fails in the evaluation{whose} ({reason})", 1)
            results[i :: len(shares)] = answer
        return results

    def play_share(self, tasks: list):
        """The results of this process's tasks, or which of them failed and why."""
        results, i = [None] * len(tasks), 0
        try:
            for i, (env, task) in enumerate(zip(self.get(len(tasks)), tasks, strict=True)):
                if task is None:
                    continue
                if isinstance(task, int):
                    obs, reward, ended = env.reset(seed=task)[0], 0.0, False
                else:
                    obs, reward, terminated, truncated, _ = env.step(task)
                    ended = terminated or truncated
                results[i] = flatten_obs(obs), float(reward), ended
                if not (math.isfinite(reward) and (ended or np.isfinite(results[i][0]).all())):
                    raise ValueError("an observation or a reward is not finite")
        except Exception as error:  # an environment may raise anything
            return i, " ".join(str(error).split()) or type(error).__name__
        return results

    def fork(self):
        """A pipe to a new process that plays tasks until this one is gone."""
        context = multiprocessing.get_context("fork")  # the script is not imported again
        ours, theirs = context.Pipe()

        def work():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the first process decides
            for pipe in [ours, *self.workers]:
                pipe.close()
            self.copies = []  # those of the first process stay its own
            with contextlib.suppress(EOFError):
                while True:
                    theirs.send(self.play_share(theirs.recv()))

        context.Process(target=work, daemon=True).start()
        theirs.close()
        # Before the exit waits for the process, which ends with its pipe.
        multiprocessing.util.Finalize(self, ours.close, exitpriority=0)
        return ours


def read_spec(text: str):
    """Gymnasium's JSON of an environment, without fields that this version no longer has."""
    spec_class = gym.envs.registration.EnvSpec
    stored = json.loads(text)
    known = {k: v for k, v in stored.items() if k in spec_class.__dataclass_fields__}
    return spec_class.from_json(json.dumps(known))


def find_environment(cfg, metadata: dict, scaler: Scaler) -> Optional[Environment]:
    """`env_id`; `auto` is the dataset's own environment with its own reference returns."""
    references, stored = (cfg.ref_min_score, cfg.ref_max_score), None
    if cfg.env_id == "none":
        return None
    if cfg.env_id == "auto":
        stored = metadata.get("eval_env_spec") or metadata.get("env_spec")
        if not stored:
            raise RunError("env_id: the dataset names no environment: set one, or none")
        if None in references:
            references = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gymnasium-robotics prints a notice
            if not stored and cfg.env_id not in gym.registry:
                import gymnasium_robotics  # noqa: F401, it registers its environments

            spec = read_spec(stored) if stored else gym.spec(cfg.env_id)
            differs = metadata.get("environment_differs") if stored else None
            environment = Environment(spec, cfg.env_kwargs, references, differs)
            env = environment.get(1)[0]
            found = flatten_obs(env.reset(seed=0)[0]).shape, env.action_space.shape
    except Exception as error:  # an environment may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"env_id {cfg.env_id} does not start ({reason}): name another, or none"
        ) from None
    sizes = (scaler.obs_mean.shape, scaler.action_center.shape)
    if found != sizes:
        sizes = tuple(map(tuple, sizes))
        raise RunError(f"env_id {spec.id} has observations and actions {found}, the agent {sizes}")
    return environment


# <<< shared: environment


# >>> shared: evaluation
def evaluate(agent: nn.Module, environment: Environment, cfg, episodes: int) -> list:
    """Play `episodes` episodes with every member, some 64 environments side by side.

    Episode i starts from `eval_seed` + i for every member and any training seed. A row an episode:
    seed, episode, return (undiscounted), length, score (None without reference returns).
    """
    rows, width = [], max(1, min(episodes, 64 // cfg.num_seeds))
    for first in range(0, episodes, width):
        numbers = range(first, min(first + width, episodes))
        returns, lengths = play(agent, environment, cfg, numbers)
        for (i, seed), (j, episode) in itertools.product(
            enumerate(member_seeds(cfg)), enumerate(numbers)
        ):
            row = {
                "seed": seed,
                "episode": episode,
                "return": returns[i, j],
                "length": int(lengths[i, j]),
            }
            rows.append({**row, "score": environment.score(returns[i, j])})
    return sorted(rows, key=lambda row: (row["seed"], row["episode"]))


@one_thread()
def play(agent: nn.Module, environment: Environment, cfg, numbers: range) -> tuple:
    """Episodes `numbers` of all members side by side: returns and lengths [S, len(numbers)]."""
    shape, seeds = (cfg.num_seeds, len(numbers)), member_seeds(cfg)
    starts = environment.play([cfg.eval_seed + numbers[j] for _, j in np.ndindex(shape)], seeds)
    obs = np.stack([start for start, *_ in starts]).reshape(*shape, -1)
    returns, lengths, alive = np.zeros(shape), np.zeros(shape), np.ones(shape, bool)
    dtype, device = environment.get(1)[0].action_space.dtype, agent.scaler.obs_mean.device
    while alive.any():
        actions = agent.act(torch.as_tensor(obs, device=device)).cpu().numpy().astype(dtype)
        every = list(np.ndindex(shape))
        results = environment.play([actions[at] if alive[at] else None for at in every], seeds)
        for at in zip(*np.nonzero(alive), strict=True):
            obs[at], reward, ended = results[np.ravel_multi_index(at, shape)]
            returns[at], lengths[at], alive[at] = returns[at] + reward, lengths[at] + 1, not ended
    return returns, lengths


def seed_means(cfg, episodes: list) -> list:
    """Mean return, length and score of each seed."""
    rows = []
    for seed in member_seeds(cfg):
        own = [row for row in episodes if row["seed"] == seed]
        names = [name for name in ("return", "score", "length") if own[0][name] is not None]
        means = {f"eval/{name}": sum(row[name] for row in own) / len(own) for name in names}
        rows.append({"seed": seed, **means})
    return rows


# <<< shared: evaluation


# >>> shared: run
# Left out of its config.yaml.
NOT_OF_THE_RUN = ("run_dir", "resume", "checkpoint", "eval_only", "export", "member")
MAY_CHANGE = ("download", "wandb", "wandb_project")  # on resume


def chunk_length(agent: nn.Module) -> int:
    """Updates whose random numbers are drawn at once: 32, or fewer where that takes much memory."""
    numbers = sum(math.prod(shape) for _, shape in agent.noise_shapes().values())
    return max(1, min(32, 2**24 // max(1, numbers)))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def as_tensor(value, device):
    """A float as a tensor []; other values as they are."""
    return torch.full((), value, device=device) if isinstance(value, float) else value


def draw(agent: nn.Module, cfg, chunk: int, count: int, device, into=None) -> tuple:
    """The randomness of the updates of a chunk, each member's from its own generators.

    Row numbers below `count` [S, L, B] and the agent's noise {name: [S, L, *shape]}, L updates.
    They are written over `into`, an earlier chunk's: fresh memory costs as much as the numbers.
    """
    shapes, size = agent.noise_shapes(), (cfg.num_seeds, chunk_length(agent))
    if into is None:
        rows = torch.empty(*size, cfg.batch_size, dtype=torch.long, device=device)
        noise = {}
        for name, (kind, shape) in shapes.items():
            dtype = torch.float32 if isinstance(kind, str) else torch.bool
            noise[name] = torch.empty(*size, *shape, dtype=dtype, device=device)
        into = rows, noise
    rows, noise = into
    for member, seed in enumerate(member_seeds(cfg)):
        rows[member].random_(0, count, generator=generator(seed, "batch", chunk, device))
        for name, (kind, _) in shapes.items():
            fill(noise[name][member], kind, generator(seed, name, chunk, device))
    return into


def fill(values: Tensor, kind, g: torch.Generator) -> None:
    """Random numbers of a kind; probabilities, of 1/65,536 to 1, are rounded to such steps."""
    if kind == "normal":
        values.normal_(generator=g)
    elif kind == "uniform":
        values.uniform_(generator=g)
    else:  # each number of 64 bits makes four of 16: a third of the time
        words = torch.empty((values.numel() + 3) // 4, dtype=torch.long, device=values.device)
        bits = words.random_(-(2**63), None, generator=g).view(torch.int16)[: values.numel()]
        torch.le(bits.view(values.shape), round(kind * 2**16) - 2**15 - 1, out=values)


@contextlib.contextmanager
def writing(path: Path):
    """Turns a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        mend = "make room or name another place; what was there is whole"
        raise RunError(f"cannot write {path} ({error.strerror}): {mend}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Temporary file, sync, rename: the old file stays until the new one is whole."""
    partial = path.with_name(path.name + ".part")
    try:
        with writing(path), open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str) -> dict:
    """A checkpoint file or a run folder's: tensors and plain values only."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise RunError(f"checkpoint {file} does not exist: name a run folder or a checkpoint.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has remarks on foreign files
            saved = dict(torch.load(file, map_location="cpu", weights_only=True))
        for name in ("step", "optimizers", "environment", "fingerprint", "config"):
            saved[name]
        saved["agent"]["scaler.obs_mean"]
        return saved
    except Exception as error:  # and many kinds of errors
        kind = type(error).__name__
        raise RunError(f"{file} is no whole checkpoint ({kind}): use another") from None


def load_agent(agent: nn.Module, saved: dict) -> None:
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"checkpoint does not fit this script or dataset: {reason}") from None


def optimizers_of(agent: nn.Module) -> dict:
    return {k: v for k, v in vars(agent).items() if isinstance(v, torch.optim.Optimizer)}


def describe(device: torch.device, compiled) -> dict:
    """What the numbers of a run depend on besides its config and its data."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = (
        subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    )
    packages = ("torch", "numpy", "gymnasium", "mujoco", "minari")
    return {
        "commit": commit.strip() or None,
        "command": sys.argv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "compile": compiled,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


class Run:
    """A training run: its agent and data, its folder, and where it stands."""

    def __init__(self, cfg, algorithm: str):
        """Look at the folder: finished, to go on with (`saved`), or new; refuse another run's."""
        self.cfg, self.algorithm, self.label = cfg, algorithm, cfg.label or algorithm
        names = [re.sub(r"[^a-z0-9.]+", "-", t.lower()) for t in (self.label, cfg.dataset_id)]
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-s{cfg.seed}x{cfg.num_seeds}"
        self.folder = Path(cfg.run_dir or Path("runs", *[n.strip("-.") for n in names], stamp))
        self.config = {k: v for k, v in pyrallis.encode(cfg).items() if k not in NOT_OF_THE_RUN}
        self.step, self.seconds, self.saved, self.wandb, self.online = 0, 0.0, None, None, None
        self.finished = (self.folder / "result.json").is_file()
        if (self.folder / "config.yaml").is_file():
            self.check_same(read_yaml(str(self.folder / "config.yaml")))
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise RunError(f"run_dir {self.folder} holds other files: name another")
        if cfg.resume and not cfg.run_dir:
            raise RunError("resume: name the run to go on with: --run_dir PATH")
        if cfg.resume and (self.folder / "checkpoint.pt").is_file():
            self.saved = read_checkpoint(str(self.folder))

    def check_same(self, theirs: dict) -> None:
        for name in self.config.keys() - set(MAY_CHANGE):
            if theirs.get(name) != self.config[name]:
                problem = f"{name} is {theirs.get(name)!r} there, not {self.config[name]!r}"
                raise RunError(f"run_dir {self.folder} holds another run: {problem}")
        if not (self.finished or self.cfg.resume):
            raise RunError(f"run_dir {self.folder} is in use: add --resume true, or name another")

    def start(self, agent: nn.Module, dataset: Dataset, environment, about: dict) -> None:
        """Make the folder, or restore the checkpoint and cut the logs back to it."""
        self.agent, self.environment, self.draws, self.window = agent, environment, None, {}
        data = prepare(dataset, self.cfg, agent.scaler)
        self.data = agent.table(data, torch.as_tensor(dataset.starts, device=data["obs"].device))
        if not len(self.data["obs"]):
            raise RunError(f"dataset {self.cfg.dataset_id} has no step that can be learned from")
        self.chunk = chunk_length(agent)
        names = ("eval_env_spec", "env_spec", "ref_min_score", "ref_max_score")
        names += ("environment_differs",)
        self.facts = {"environment": {name: dataset.metadata.get(name) for name in names}}
        self.facts["fingerprint"] = dataset.fingerprint
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.saved:
            self.restore(self.saved)
        else:
            env_id = environment.spec.id if environment else None
            source = {"fingerprint": dataset.fingerprint, "source": dataset.metadata.get("source")}
            about = {**source, "env_id": env_id, **about}
            self.write("config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            self.write("environment.json", json.dumps(about, indent=1))
        for name in ("metrics.jsonl", "episodes.jsonl"):
            rows = [r for r in self.rows(name) if r["update"] <= self.step and not r.get("final")]
            self.write(name, "".join(json.dumps(row) + "\n" for row in rows))
        self.about = json.loads((self.folder / "environment.json").read_bytes())
        if self.cfg.wandb != "disabled":
            self.start_wandb()
        print(f"run folder: {self.folder}")

    def start_wandb(self) -> None:
        key = self.folder / "wandb_id"  # the same page after a resume
        if not key.is_file():
            self.write(key.name, f"{time.time_ns():x}")
        known = {"id": key.read_text(), "resume": "allow", "mode": self.cfg.wandb}
        name = f"{self.label} {self.cfg.dataset_id}"
        try:
            import wandb

            self.wandb = wandb.init(
                project=self.cfg.wandb_project,
                name=name,
                dir=self.folder,
                config=self.config,
                **known,
            )
        except Exception as error:  # no login, no network, not installed
            reason = " ".join(str(error).split())
            raise RunError(f"wandb does not start ({reason}): use offline or disabled") from None

    def write(self, name: str, text: str) -> None:
        write_whole(self.folder / name, text.encode())

    def restore(self, saved: dict) -> None:
        """Go on from a checkpoint, of this run or of the one that is to be fine-tuned."""
        if saved["fingerprint"] != self.facts["fingerprint"]:
            problem = f"{self.cfg.dataset_id} is not the data that the checkpoint was trained on"
            raise RunError(f"{problem}: start a new run")
        load_agent(self.agent, saved)
        for name, optimizer in optimizers_of(self.agent).items():
            if not saved["optimizers"][name]["state"]:
                continue  # it has made no step, and `traceable` may have prepared its first
            (group,) = optimizer.param_groups
            kept = {"fused": True, "lr": group["lr"]}  # a fork may have another
            optimizer.load_state_dict(saved["optimizers"][name])
            optimizer.param_groups[0].update(kept)
        self.step, self.seconds, device = saved["step"], saved["seconds"], self.data["obs"].device
        for name, (updates, values) in saved["window"].items():
            self.window[name] = dict(zip(updates, values.to(device).unbind(), strict=True))

    def save(self) -> None:
        """Write the checkpoint."""
        self.check_finite()
        window = {k: (list(v), torch.stack(list(v.values()))) for k, v in self.window.items()}
        content = {"step": self.step, "seconds": self.seconds, "window": window}
        content["online_steps"] = self.online.sync() if self.online else 0
        content |= {**self.facts, "config": self.config, "agent": self.agent.state_dict()}
        optimizers = optimizers_of(self.agent)
        content["optimizers"] = {name: value.state_dict() for name, value in optimizers.items()}
        buffer = io.BytesIO()  # torch's own writer hides why a disk refuses
        torch.save(content, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())

    def check_finite(self) -> None:
        self.open_window()
        if not all(values.isfinite().all() for values in self.agent.state_dict().values()):
            self.diverged("a weight", f"update {self.step}")

    def diverged(self, what: str, where: str):
        keeps = f"{self.folder} keeps the last good checkpoint"
        raise RunError(f"{what} is not finite at {where}; {keeps}", 1)

    def rows(self, name: str) -> list:
        """The rows of a log; a line that was cut off in writing does not count."""
        path = self.folder / name
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str, rows: list) -> None:
        where = {"update": self.step}
        if self.online:
            where["environment_step"] = self.online.steps
        rows = [{**where, **row} for row in rows]
        with writing(self.folder / name), open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.wandb and name == "metrics.jsonl":
            every = [(key, row["seed"], row[key]) for row in rows for key in row if "/" in key]
            found = {name: [v for key, _, v in every if key == name] for name, *_ in every}
            means = {name: sum(values) / len(values) for name, values in found.items()}
            each = {f"{name}/seed{seed}": value for name, seed, value in every}
            self.wandb.log({**means, **each}, step=self.step)

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.cfg.num_updates + (self.online.updates if self.online else 0)

    @property
    def over(self) -> bool:
        return self.step >= self.cfg.num_updates and (not self.online or self.online.over)

    @property
    def position(self) -> tuple:
        """The number of the last update, or online step, and whether its phase ends with it."""
        if self.online and self.online.steps:
            return self.online.steps, self.online.over
        return self.step, self.step == self.cfg.num_updates

    def advance(self) -> tuple:
        """One update, or one online step with its updates; the new position."""
        if self.step < self.cfg.num_updates:
            self.update()
        else:
            self.online.play()
            for _ in range(self.cfg.updates_per_step):
                self.update()
        return self.position

    def update(self) -> None:
        """One update of all members; its metrics stay on the device."""
        (chunk, offset), agent = divmod(self.step, self.chunk), self.agent
        if offset == 0 or self.draws is None:
            data = self.data["obs"]
            count = self.online.offline if self.online else len(data)
            self.draws = draw(agent, self.cfg, chunk, count, data.device, self.draws)
        rows, noise = self.draws
        online = self.step >= self.cfg.num_updates
        rows = self.online.rows(self.step) if online else rows[:, offset]
        batch = agent.gather(self.data, rows)
        for optimizer, value in agent.learning_rates(self.step).items():
            set_rate(optimizer, value)
        noise = {name: values[:, offset] for name, values in noise.items()}
        variant = [as_tensor(x, rows.device) for x in agent.variant(self.step)]
        metrics = agent.update(batch, noise, *variant)
        self.step += 1
        for name, value in metrics.items():
            self.window.setdefault(name, {})[self.step] = value

    def open_window(self) -> dict:
        """Each metric's values since the last log row [updates, seeds]; all finite, or it ends."""
        found, broken = {}, []
        for name, values in self.window.items():
            found[name] = torch.stack(list(values.values())).cpu().numpy()
            for row, member in np.argwhere(~np.isfinite(found[name]))[:1]:
                broken.append((list(values)[row], self.cfg.seed + member, name))
        for update, seed, name in sorted(broken)[:1]:
            self.diverged(name, f"update {update}, seed {seed}")
        return found

    def log_metrics(self, speed: float) -> None:
        means = {k: v.mean(0, dtype=np.float64) for k, v in self.open_window().items()}
        rows, self.window = [], {}
        for member, seed in enumerate(member_seeds(self.cfg)):
            metrics = {f"train/{name}": values[member] for name, values in means.items()}
            metrics |= self.online.metrics(member) if self.online else {}
            rows.append({"seed": seed, **metrics, "time/updates_per_second": speed})
        self.log("metrics.jsonl", rows)

    def evaluate(self, episodes: int, final: bool = False) -> str:
        """Evaluate all members, log every episode; returns the mean of the seeds in words."""
        if not (self.environment and episodes):
            return ""
        self.check_finite()
        began = time.perf_counter()
        try:
            rows = evaluate(self.agent, self.environment, self.cfg, episodes)
        except RunError as error:
            self.save()
            mend = f"{self.folder} keeps all before it; mend it and add --resume true"
            raise RunError(f"{error} at update {self.step}: {mend}", error.code) from None
        seconds, means = time.perf_counter() - began, seed_means(self.cfg, rows)
        self.log("episodes.jsonl", [{"final": final, **row} for row in rows])
        extra = {"final": final, "time/evaluation_seconds": seconds}
        self.log("metrics.jsonl", [{**row, **extra} for row in means])
        key = "eval/score" if "eval/score" in means[0] else "eval/return"
        return f"{key} {sum(row[key] for row in means) / len(means):.1f}"

    def due(self) -> bool:
        """Whether an evaluation belongs here that an earlier process did not come to."""
        (number, last), step = self.position, self.online.steps if self.online else None
        rows = [r for r in self.rows("metrics.jsonl") if r["update"] == self.step and "final" in r]
        met = any(row.get("environment_step") == step for row in rows)
        return number > 0 and (number % self.cfg.eval_every == 0 or last) and not met

    def finish(self) -> None:
        """Write result.json: the last policy is the headline, the best one takes an oracle."""
        evaluations, best = [row for row in self.rows("metrics.jsonl") if "eval/return" in row], {}
        for row in evaluations:
            old = best.get(row["seed"], row)
            best[row["seed"]] = max(old, row, key=lambda row: row["eval/return"])
        names = ("dataset_id", "num_updates", "seed", "num_seeds", "final_eval_episodes")
        result = {"algorithm": self.algorithm, "label": self.label}
        result |= {name: self.config[name] for name in names}
        result |= {name: self.about[name] for name in ("env_id", "fingerprint", "commit")}
        result["environment_differs"] = self.environment.differs if self.environment else None
        result["seconds"] = round(self.seconds, 1)
        result["last"] = [row for row in evaluations if row["final"]]
        result["best_oracle"] = list(best.values())
        result["online"] = self.online.summary(evaluations) if self.online else None
        self.write("result.json", json.dumps(result, indent=1))
        if self.wandb:
            self.wandb.finish()


# <<< shared: run


# >>> shared: export
class Exported(nn.Module):
    """A solo agent's `act` without the seed axis, which has no place outside of training."""

    def __init__(self, agent: nn.Module, axes: list):
        super().__init__()
        self.agent, self.axes = agent.requires_grad_(False), axes

    def forward(self, *inputs: Tensor) -> Tensor:
        pairs = zip(inputs, self.axes, strict=True)
        inputs = [x.unsqueeze(0) if axes[0] == "N" else x for x, axes in pairs]
        return self.agent.act(*inputs).squeeze(0)


def solo_agent(agent_class, cfg, saved: dict) -> nn.Module:
    """Member `member` of a saved population as an agent of its own."""
    if cfg.member >= cfg.num_seeds:
        last = cfg.num_seeds - 1
        raise RunError(f"member: the checkpoint has {cfg.num_seeds}, the last is {last}")
    obs, action = (saved["agent"][f"scaler.{name}"] for name in ("obs_mean", "action_center"))
    solo = dataclasses.replace(cfg, num_seeds=1, seed=cfg.seed + cfg.member)
    agent = agent_class(solo, Scaler(obs, obs, action, action))
    own, state = agent.state_dict(), dict(saved["agent"])
    for name in own.keys() & state.keys():
        if state[name].shape != own[name].shape:  # else it has no seed axis
            state[name] = state[name].chunk(cfg.num_seeds)[cfg.member]
    load_agent(agent, {"agent": state})
    return agent


def export_policy(agent_class, cfg) -> None:
    """`--checkpoint PATH --export FILE`: a policy that runs without this repository.

    obs [N, obs_dim] -> actions [N, act_dim], both in the environment's units: statistics of the
    observations and bounds of the actions are inside. NAME.pt2 is loaded by torch.export.load.
    """
    path, content = Path(cfg.export), io.BytesIO()
    if not cfg.checkpoint:
        raise RunError("export: name what to export: --checkpoint PATH")
    if path.suffix not in (".pt2", ".onnx"):
        raise RunError(f"export: {cfg.export} must end in .pt2 (torch.export) or .onnx")
    agent = solo_agent(agent_class, cfg, read_checkpoint(cfg.checkpoint))
    inputs = agent.export_inputs()
    examples, axes = zip(*inputs.values(), strict=True)
    free = {name: torch.export.Dim(name) for name in itertools.chain(*axes)}
    shapes = (tuple({i: free[name] for i, name in enumerate(names)} for names in axes),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it does itself
        program = torch.export.export(Exported(agent, axes), examples, dynamic_shapes=shapes)
        trim(program)
        if path.suffix == ".pt2":
            torch.export.save(program, content)
        else:
            content.write(onnx_model(program, inputs))
    write_whole(path, content.getvalue())
    print(f"{path}: the policy of seed {cfg.seed + cfg.member}")


def trim(program: torch.export.ExportedProgram) -> None:
    """Leave out the weights that only training needs, and where the scripts lie."""
    specs = program.graph_signature.input_specs
    for node, spec in zip(list(program.graph.nodes), list(specs), strict=False):
        if spec.target and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            for tensors in (program.state_dict, program.constants):
                tensors.pop(spec.target, None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


def onnx_model(program: torch.export.ExportedProgram, inputs: dict) -> bytes:
    import logging  # only here: torch names the packages that it did not need

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options = {"input_names": list(inputs), "output_names": ["next_action"], "verbose": False}
    options["dynamic_shapes"] = [dict(enumerate(axes)) for _, axes in inputs.values()]
    try:
        model = torch.onnx.export(program, dynamo=True, **options).model_proto
    except ImportError:
        raise RunError("export: ONNX needs more packages: pip install onnx onnxscript") from None
    return model.SerializeToString()


# <<< shared: export


# >>> shared: training_loop
def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        pass  # no such device
    raise RunError(f"device {name!r} is not to be had here: use auto, cpu or cuda")


def traceable(optimizer: torch.optim.Optimizer) -> None:
    """Make now what torch.optim makes in its first step, and a tensor of the learning rate."""
    (group,) = optimizer.param_groups
    device = group["params"][0].device
    group["lr"] = torch.tensor(float(group["lr"]), device=device)
    for p in group["params"]:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=device), **moments}


def compiled(update, graphs: bool = False):
    """`update` as one graph for each variant; where that fails, it is told and `update` goes on.

    With `graphs`, CUDA launches all its kernels as one; what that returns does not outlive the next
    update, hence the copies.
    """
    graph = torch.compile(update, fullgraph=True, mode="reduce-overhead" if graphs else None)
    failures = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit

    def compiled_update(*args):
        nonlocal graph
        try:
            if not graphs:
                return graph(*args)
            torch.compiler.cudagraph_mark_step_begin()
            return {name: value.clone() for name, value in graph(*args).items()}
        except failures as error:  # all of them come before the graph runs
            print(f"compile: the update fails ({type(error).__name__}), going on without")
            graph = update
            return update(*args)

    return compiled_update


def compile_update(agent: nn.Module, cfg, device: torch.device, updates: int):
    """Compile the agent's update; `auto`: where `updates` are enough to gain.

    Compiling takes half a minute and saves up to a third of an update. `graphs` also makes CUDA
    graphs. Returns what was done, as environment.json has it.
    """
    if cfg.compile == "graphs" and device.type != "cuda":
        raise RunError(f"compile: graphs are for cuda, and this runs on {device.type}: use true")
    enough = 5_000 if device.type == "cuda" else 20_000
    wanted = cfg.compile in ("true", "graphs") or (cfg.compile == "auto" and updates >= enough)
    if cfg.compile == "auto":
        chosen = "on" if wanted else "off"
        print(f"compile: auto is {chosen} (on from {enough:,} updates, on {device.type})")
    if wanted:
        try:
            torch._dynamo.config.trace_autograd_ops = True  # gradients are part of the graph
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # whatever a missing or broken compiler brings
            print(f"compile: not possible here ({type(error).__name__}), going on without")
            wanted = False
    if wanted:
        for optimizer in optimizers_of(agent).values():
            traceable(optimizer)
        agent.update = compiled(agent.update, cfg.compile == "graphs")
        wanted = "graphs" if cfg.compile == "graphs" else True
    return wanted


def train(agent_class, cfg, select=None, online=None) -> None:
    """A whole run. `select(dataset, cfg)` may leave out episodes of the data.

    With `online`, the class of that phase, and online_steps a checkpoint's run is gone on with.
    """
    folder = locate_dataset(cfg)
    run = Run(cfg, agent_class.__name__)
    if not run.finished:
        device, dataset = choose_device(cfg.device), load_dataset(cfg.dataset_id, folder)
        dataset = select(dataset, cfg) if select else dataset
        agent = agent_class(cfg, fit_scaler(dataset, cfg)).to(device)
        pretrained = read_checkpoint(cfg.checkpoint) if cfg.checkpoint else None
        if pretrained:
            load_agent(agent, pretrained)
        environment = find_environment(cfg, dataset.metadata, agent.scaler)
        if online and cfg.online_steps:
            run.online = online(run, dataset, environment, pretrained)
        if run.saved:  # the choice of a run stands
            before = json.loads((run.folder / "environment.json").read_bytes())
            cfg = dataclasses.replace(cfg, compile=str(before["compile"]).lower())
        ahead = run.updates - (pretrained["step"] if pretrained and run.online else 0)
        compiled = compile_update(agent, cfg, device, ahead)
        about = {**describe(device, compiled), "checkpoint": cfg.checkpoint or None}
        run.start(agent, dataset, environment, about)
        if run.online:
            run.online.start()
        elif pretrained and not run.saved:
            run.save()  # so that a resume begins with these weights
        with stop_signals() as asked, progress(run) as bar:
            training_loop(run, asked, bar)
        run.evaluate(cfg.final_eval_episodes, final=True)
        run.finish()
    report(json.loads((run.folder / "result.json").read_bytes()), run.folder)


@contextlib.contextmanager
def stop_signals():
    """A list that the first SIGINT or SIGTERM fills; the second one stops at once."""
    asked = []

    def stop(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    old = [signal.signal(number, stop) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def progress(run: Run) -> tqdm:
    """A bar on a terminal, else a plain line every half minute."""
    style = {}
    if not sys.stderr.isatty():
        plain = "{n_fmt}/{total_fmt} updates, {rate_fmt}, {remaining} left{postfix}\n"
        style = {"file": sys.stdout, "mininterval": 30, "bar_format": plain}
    return tqdm(total=run.updates, initial=run.step, unit=" updates", **style)


def training_loop(run: Run, asked: list, bar: tqdm) -> None:
    """Update, log, evaluate, save; ends between two updates once `asked` is filled."""
    cfg = run.cfg
    if not run.over and run.due():
        run.evaluate(cfg.eval_episodes)
    mark, since = time.perf_counter(), run.step
    while not run.over:
        before = run.step
        number, last = run.advance()
        bar.update(run.step - before)
        if number % cfg.log_every == 0 or last:
            elapsed = time.perf_counter() - mark
            run.seconds += elapsed
            run.log_metrics((run.step - since) / elapsed)
            mark, since = time.perf_counter(), run.step
        if (number % cfg.eval_every == 0 or last) and not run.over:
            began = time.perf_counter()
            bar.set_postfix_str(run.evaluate(cfg.eval_episodes), refresh=False)
            mark += time.perf_counter() - began
        if number % cfg.checkpoint_every == 0 or last or asked:
            run.save()
        if asked:
            mend = f"python {sys.argv[0]} --run_dir {run.folder} --resume true"
            raise RunError(f"stopped at update {run.step}, nothing is lost; to go on: {mend}", 130)


def report(result: dict, where) -> None:
    for row in result["last"]:
        score = f", score {row['eval/score']:.1f}" if "eval/score" in row else ""
        print(f"seed {row['seed']}: return {row['eval/return']:.1f}{score}")
    if result["environment_differs"]:
        print(f"the environment differs: {result['environment_differs']}")
    print(f"{result['final_eval_episodes']} evaluation episodes a seed; {where}")


def evaluate_checkpoint(agent_class, cfg) -> None:
    """`--checkpoint PATH --eval_only true`: the returns of a saved population."""
    if not cfg.checkpoint:
        raise RunError("eval_only: name what to evaluate: --checkpoint PATH")
    saved = read_checkpoint(cfg.checkpoint)
    obs, action = (saved["agent"][f"scaler.{name}"] for name in ("obs_mean", "action_center"))
    agent = agent_class(cfg, Scaler(obs, obs, action, action)).to(choose_device(cfg.device))
    load_agent(agent, saved)
    environment = find_environment(cfg, saved["environment"], agent.scaler)
    if not (environment and cfg.final_eval_episodes):
        raise RunError("eval_only: set env_id and final_eval_episodes: there is nothing to play")
    means = seed_means(cfg, evaluate(agent, environment, cfg, cfg.final_eval_episodes))
    result = {"last": means, "final_eval_episodes": cfg.final_eval_episodes}
    report({**result, "environment_differs": environment.differs}, cfg.checkpoint)


def command_line(agent_class, config_class, argv=None, select=None, online=None) -> int:
    """Run a script with the words of the command line, or `argv`; returns the exit code."""
    try:
        cfg = parse_config(config_class, sys.argv[1:] if argv is None else argv)
        if cfg.export:
            export_policy(agent_class, cfg)
        elif cfg.eval_only:
            evaluate_checkpoint(agent_class, cfg)
        else:
            train(agent_class, cfg, select, online)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        what = f"{error.strerror or error}{f' at {error.filename}' if error.filename else ''}"
        print(f"error: {what}: make room or name another place; nothing is lost", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume true goes on from the run's last checkpoint", file=sys.stderr)
        return 130
    return 0


# <<< shared: training_loop


# >>> shared: online
class Online:
    """The online phase: every member plays an environment of its own and fills its own buffer.

    Buffers are rows of the run's table: that of member m begins at row N + m * online_steps, after
    the N rows of the data. `online.bin`, beside the checkpoint, holds every step as the environment
    gave it: records [steps, S] of `dtype`. A resume reads it back. Episode k of a member starts
    from a seed of its own; one that was cut off is played again with the same actions.
    """

    def __init__(self, run: Run, dataset: Dataset, environment, pretrained: Optional[dict]):
        """Only checks; `pretrained` is a checkpoint of the run that is to be gone on with."""
        cfg, self.pretrained = run.cfg, None if run.saved else pretrained
        if not environment:
            raise RunError("online_steps: there is nothing to play: set env_id")
        if self.pretrained and pretrained["fingerprint"] != dataset.fingerprint:
            raise RunError(
                f"checkpoint: it was not trained on {cfg.dataset_id}: leave dataset_id out"
            )
        if self.pretrained and pretrained["step"] > cfg.num_updates:
            where = f"it stands at update {pretrained['step']}, past num_updates {cfg.num_updates}"
            raise RunError(f"checkpoint: {where}: resume its own run, or take an earlier one")
        self.run, self.cfg = run, cfg
        self.dataset = dataclasses.replace(dataset, transitions={})  # for its reward transform
        self.envs = dataclasses.replace(environment, copies=[], workers=[]).get(cfg.num_seeds)
        self.running = [[] for _ in self.envs]  # the steps of the episodes that have not ended
        self.episodes = [[] for _ in self.envs]  # (step at its end, return, length) of the others
        self.drawn, self.updates = {}, cfg.online_steps * cfg.updates_per_step
        obs_dim, self.act_dim = dataset.transitions["obs"].shape[1], len(dataset.action_bounds[0])
        columns = [("obs", "<f4", obs_dim), ("action", "<f4", self.act_dim), ("reward", "<f8")]
        columns += [("next_obs", "<f4", obs_dim), ("terminated", "?"), ("truncated", "?")]
        self.dtype, self.path, self.unsaved = np.dtype(columns), run.folder / "online.bin", []
        self.steps = run.saved["online_steps"] if run.saved else 0
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self.steps * len(self.envs) * self.dtype.itemsize:
            raise RunError(f"{self.path} is not whole, the checkpoint cannot be gone on with")

    @property
    def over(self) -> bool:
        return self.steps == self.cfg.online_steps

    def start(self) -> None:
        """Make room in the table; read back what a run that is resumed has stored."""
        run, cfg = self.run, self.cfg
        self.agent, self.device = run.agent, run.data["obs"].device
        self.offline, room = len(run.data["obs"]), cfg.num_seeds * cfg.online_steps
        members = torch.arange(cfg.num_seeds, device=self.device).unsqueeze(-1)
        self.first, self.filled = self.offline + members * cfg.online_steps, 0 * members
        try:
            for name, values in run.data.items():
                run.data[name] = torch.cat([values, values.new_zeros(room, *values.shape[1:])])
        except RuntimeError:
            what = f"online_steps: {cfg.online_steps:,} for each of {cfg.num_seeds} seeds"
            raise RunError(f"{what} do not fit into memory: take fewer") from None
        self.obs = np.zeros((cfg.num_seeds, *self.dtype["obs"].shape), "f4")
        if self.pretrained:
            run.restore(self.pretrained)
            run.save()  # so that a resume does not begin without it
            rates = self.agent.learning_rates(run.step)
            for name, optimizer in optimizers_of(self.agent).items():
                before = self.pretrained["optimizers"][name]["param_groups"][0]["lr"]
                after = rates.get(optimizer, optimizer.param_groups[0]["lr"])
                if after > 1.001 * before:
                    what = f"the learning rate of {name} climbs from {before:.1e} to {after:.1e}"
                    print(f"online: {what}", file=sys.stderr)
        if self.path.is_file():  # a crash leaves steps after the checkpoint
            with writing(self.path):
                os.truncate(self.path, self.steps * cfg.num_seeds * self.dtype.itemsize)
        if self.steps:
            self.restore(np.fromfile(self.path, self.dtype).reshape(-1, cfg.num_seeds))

    def restore(self, stored: np.ndarray) -> None:
        """Fill the buffers with stored steps and bring the environments to where they were."""
        if not self.agent.whole_episodes:
            self.add(slice(None), stored.T)
        for member in range(len(self.envs)):
            own = stored[:, member].copy()
            ends = np.flatnonzero(own["terminated"] | own["truncated"]) + 1
            *ended, running = np.split(own, ends)
            for end, episode in zip(ends, ended, strict=True):
                self.end_episode(member, episode, int(end))
            if not len(running):
                continue
            again = running.copy()
            with self.watching(member):
                self.reset(member)
                for step in again:
                    self.step(member, step)
                    if step["terminated"] or step["truncated"]:
                        break
            if again.tobytes() == running.tobytes():
                self.running[member], self.obs[member] = list(running), running["next_obs"][-1]
            else:
                self.give_up(member, running)

    def give_up(self, member: int, running: np.ndarray) -> None:
        """End an episode that an environment does not repeat, here and in the file."""
        seed = member_seeds(self.cfg)[member]
        print(
            f"seed {seed}: its environment does not repeat, a new episode begins", file=sys.stderr
        )
        running["truncated"][-1] = True
        with writing(self.path), open(self.path, "r+b") as file:
            file.seek(((self.steps - 1) * len(self.envs) + member) * self.dtype.itemsize)
            file.write(running[-1:].tobytes())
        self.end_episode(member, running, self.steps)

    def sync(self) -> int:
        """Bring the new steps to the disk; how many a checkpoint may count on."""
        with writing(self.path), open(self.path, "ab") as file:
            file.write(b"".join(self.unsaved))
            file.flush()
            os.fsync(file.fileno())
        self.unsaved = []
        return self.steps

    def reset(self, member: int) -> None:
        number = len(self.episodes[member])
        seed = generator(member_seeds(self.cfg)[member], "episode", number).initial_seed()
        self.obs[member] = self.finite(self.envs[member].reset(seed=seed)[0])

    def step(self, member: int, step: np.void) -> None:
        """Play the action of a record and fill in what comes of it."""
        env = self.envs[member]
        action = step["action"].astype(env.action_space.dtype)
        obs, reward, step["terminated"], step["truncated"], _ = env.step(action)
        step["reward"], step["next_obs"] = float(reward), self.finite(obs, float(reward))

    @staticmethod
    def finite(obs, reward: float = 0) -> np.ndarray:
        obs = flatten_obs(obs)
        if not np.isfinite([reward, *obs]).all():
            raise ValueError("an observation or reward is not finite")
        return obs

    @contextlib.contextmanager
    def watching(self, member: int):
        """An environment that fails ends the run, which keeps all that was before."""
        try:
            yield
        except Exception as error:  # an environment may raise anything
            self.run.save()
            reason = " ".join(str(error).split()) or type(error).__name__
            where = f"seed {member_seeds(self.cfg)[member]} at online step {self.steps + 1}"
            mend = f"{self.run.folder} keeps all before it; mend it and add --resume true"
            raise RunError(f"the environment fails for {where} ({reason}): {mend}", 1) from None

    def play(self) -> None:
        """One step of every member's environment."""
        steps = np.zeros(len(self.envs), self.dtype)
        for member in range(len(self.envs)):
            if not self.running[member]:
                with self.watching(member):
                    self.reset(member)
        steps["obs"], steps["action"] = self.obs, self.actions()
        for member, step in enumerate(steps):
            with self.watching(member):
                self.step(member, step)
        self.keep(steps)

    def random(self, stream: str, number: int, length: int, sampler) -> Tensor:
        """Entry `number` of each member's stream of random numbers, drawn `length` at a time."""
        chunk, offset = divmod(number, length)
        if self.drawn.get(stream, (None,))[0] != chunk:
            seeds, device = member_seeds(self.cfg), self.device
            each = [sampler(generator=generator(s, stream, chunk, device)) for s in seeds]
            self.drawn[stream] = chunk, torch.stack(each, 1)
        return self.drawn[stream][1][offset]

    def actions(self) -> np.ndarray:
        """The members' actions [S, act_dim]."""
        sampler = functools.partial(torch.randn, 1024, 1, self.act_dim, device=self.device)
        noise = self.random("explore", self.steps, 1024, sampler)
        obs = torch.as_tensor(self.obs, device=self.device).unsqueeze(1)
        return self.agent.explore(obs, noise).squeeze(1).cpu().numpy()

    def keep(self, steps: np.ndarray) -> None:
        """Note a step of every member [S], and enter what can be learned from."""
        self.unsaved.append(steps.tobytes())
        self.steps, self.obs = self.steps + 1, steps["next_obs"].copy()
        if not self.agent.whole_episodes:
            self.add(slice(None), steps[:, None])
        for member, step in enumerate(steps):
            self.running[member].append(step)
            if step["terminated"] or step["truncated"]:
                self.end_episode(member, np.array(self.running[member]), self.steps)
                self.running[member] = []

    def end_episode(self, member: int, episode: np.ndarray, step: int) -> None:
        self.episodes[member].append((step, float(episode["reward"].sum()), len(episode)))
        if self.agent.whole_episodes:
            self.add([member], episode[None])

    def add(self, members, steps: np.ndarray) -> None:
        """Enter steps [M, T] of M members into their buffers, T of one episode each."""
        names = ("obs", "action", "reward", "next_obs", "terminated")
        flat = steps.reshape(-1)
        transitions = {name: flat[name].astype("f4") for name in names}
        dataset = dataclasses.replace(self.dataset, transitions=transitions)
        data = prepare(dataset, self.cfg, self.agent.scaler)
        count, length = steps.shape
        starts = torch.arange(0, count * length + 1, length, device=self.device)
        new = self.agent.table(data, starts)
        each = len(new["obs"]) // count
        at = self.first[members] + self.filled[members] + torch.arange(each, device=self.device)
        for name, values in new.items():
            self.run.data[name][at.flatten()] = values
        self.filled[members] += each

    def rows(self, step: int) -> Tensor:
        """The rows of the table that an update reads [S, B]."""
        cfg, size = self.cfg, (32, self.cfg.batch_size)
        sampler = functools.partial(torch.randint, 2**62, size, device=self.device)
        numbers = self.random("online", step, 32, sampler)
        if cfg.online_share is None:
            rows = numbers % (self.offline + self.filled)
        else:
            online = torch.arange(cfg.batch_size, device=self.device)
            online = (online < round(cfg.online_share * cfg.batch_size)) & (self.filled > 0)
            new = self.offline + numbers % self.filled.clamp(min=1)
            rows = torch.where(online, new, numbers % self.offline)
        return rows + (rows >= self.offline) * (self.first - self.offline)

    def metrics(self, member: int) -> dict:
        """Mean return and length of the episodes that ended since the last log row, if any did."""
        since = (self.steps - 1) // self.cfg.log_every * self.cfg.log_every
        recent = [episode for episode in self.episodes[member] if episode[0] > since]
        names = ("online/return", "online/length") if recent else ()
        return {name: sum(e[i] for e in recent) / len(recent) for i, name in enumerate(names, 1)}

    def summary(self, evaluations: list) -> dict:
        """What result.json says of the phase, in scores (or returns, without references).

        For each seed: `switch`, the evaluation before the first step; `drop`, how far the worst one
        of the first 10,000 steps lies below it (0: none does); `regret`, the mean of 1 - score/100
        over all evaluations after the switch.
        """
        rows = []
        for seed in member_seeds(self.cfg):
            own = [row for row in evaluations if row["seed"] == seed]
            unit = "eval/score" if own and "eval/score" in own[0] else "eval/return"
            switch = [row[unit] for row in own if row["update"] == self.cfg.num_updates]
            later = [row for row in own if row["update"] > self.cfg.num_updates]
            early = [row[unit] for row in later if row["environment_step"] <= 10_000]
            drop = max(0, switch[-1] - min(early)) if switch and early else None
            regrets = [1 - row[unit] / 100 for row in later if unit == "eval/score"]
            regret = sum(regrets) / len(regrets) if regrets else None
            row = {"seed": seed, "switch": switch[-1] if switch else None, "drop": drop}
            rows.append({**row, "regret": regret})
        names = ("online_steps", "updates_per_step", "online_share")
        return {**{name: getattr(self.cfg, name) for name in names}, "seeds": rows}


# <<< shared: online


def main(argv=None) -> int:
    return command_line(ReBRAC, TrainConfig, argv, online=Online)


if __name__ == "__main__":
    sys.exit(main())
