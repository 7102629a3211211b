"""FQL: losses, gradients and whole updates against float64 computations from the paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    HIGH,
    LOW,
    OBS,
    SEEDS,
    PlainAdam,
    check_critics,
    check_moments,
    flat,
    make_agent,
    make_batch,
    matrices,
    member,
    same,
    same_gradient,
    same_metrics,
    updated,
)

pytestmark = pytest.mark.usefixtures("float64")
# Rates of their own, a tau that shows, few steps of the flow, so that each counts.
LOUD = {
    "gamma": 0.9,
    "alpha": 3.0,
    "flow_steps": 4,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
}
VARIANTS = [
    {"normalize_q_loss": False, "q_aggregation": "mean"},
    {"normalize_q_loss": True, "q_aggregation": "min"},
]


def make_fql(**settings):
    """FQL with loud weights: actions on both sides of their bounds, other targets and norms."""
    agent, g = make_agent("fql", "FQL", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, p in enumerate(agent.parameters()):
            p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(i)))
    return agent


def make_inputs(seed: int) -> tuple[dict, dict]:
    g, batch = torch.Generator().manual_seed(seed), make_batch(seed)[0]
    names = ("flow", "actor", "target")
    noise = {name: torch.randn(SEEDS, BATCH, ACT, generator=g) for name in names}
    return batch, {**noise, "time": torch.rand(SEEDS, BATCH, 1, generator=g)}


class PlainNetwork:
    """Linear maps as matrices, GELU between them; a critic also has gains and shifts of norms."""

    def __init__(self, mlp, index: int):
        self.layers, self.norms = matrices(mlp, index), []
        for norm in mlp.norms:
            pair = (norm.weight[index, 0], norm.bias[index, 0])
            self.norms.append(tuple(x.detach().clone().requires_grad_() for x in pair))

    def parameters(self) -> list[torch.Tensor]:
        return flat(self.layers) + flat(self.norms)

    def __call__(self, *inputs):
        """GELU in the tanh form (arXiv 1606.08415), then normalisation (arXiv 1607.06450)."""
        x = torch.cat(inputs)
        for i, (weight, bias) in enumerate(self.layers[:-1]):
            x = x @ weight + bias
            x = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            if self.norms:
                mean = x.sum() / len(x)
                variance = ((x - mean) ** 2).sum() / len(x)
                x = self.norms[i][0] * (x - mean) / (variance + 1e-5) ** 0.5 + self.norms[i][1]
        weight, bias = self.layers[-1]
        return x @ weight + bias


def check_network(mlp, index: int, network: PlainNetwork, what: str) -> None:
    ours = [p for layer in mlp.layers for p in (layer.weight[index], layer.bias[index, 0])]
    ours += [p[index, 0] for norm in mlp.norms for p in (norm.weight, norm.bias)]
    for a, b in zip(ours, network.parameters(), strict=True):
        same(a, b, what)


class PlainFQL:
    """One member, a row at a time: velocity field, one-step policy, critics, their targets."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.v, self.mu = PlainNetwork(agent.flow, k), PlainNetwork(agent.actor, k)
        self.critics = [PlainNetwork(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [PlainNetwork(agent.target_critic, 2 * k + i) for i in range(2)]
        self.flow_adam = PlainAdam(self.v.parameters(), self.c.actor_lr)
        self.actor_adam = PlainAdam(self.mu.parameters(), self.c.actor_lr)
        both = self.critics[0].parameters() + self.critics[1].parameters()
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.tried = dict.fromkeys(("mu outside", "mu inside", "flow outside", "first less"), 0)

    def flow(self, s, z):
        """Euler's method from time 0 to 1, without gradient; deviation D2: clipped."""
        x, h = z, 1 / self.c.flow_steps
        for i in range(self.c.flow_steps):
            x = (x + h * self.v(s, x, torch.tensor([i * h]))).detach()
        self.tried["flow outside"] += int((x.abs() > 1).sum())
        return torch.clip(x, -1, 1)

    def action(self, s, z):
        """mu(s,z), and its part within the bounds."""
        a = self.mu(s, z)
        self.tried["mu outside"] += int((a.abs() > 1).sum())
        self.tried["mu inside"] += int((a.abs() < 1).sum())
        return a, torch.clip(a, -1, 1)

    def flow_loss(self, batch, noise):
        total = 0
        for row, a in enumerate(batch["action"]):
            x0, t = noise["flow"][row], noise["time"][row]
            error = self.v(batch["obs"][row], t * a + (1 - t) * x0, t) + x0 - a
            total += (error**2).sum() / ACT
        return total / BATCH

    def actor_loss(self, batch, noise):
        distances, values = [], []
        for s, z in zip(batch["obs"], noise["actor"], strict=True):
            a, inside = self.action(s, z)
            distances.append(((a - self.flow(s, z)) ** 2).sum() / ACT)
            values.append(sum(critic(s, inside)[0] for critic in self.critics) / 2)
        self.distill, self.policy_q = sum(distances) / BATCH, sum(values) / BATCH
        size = sum(abs(float(q.detach())) for q in values) / BATCH
        weight = 1 / size if self.c.normalize_q_loss else 1.0
        return self.c.alpha * self.distill - weight * self.policy_q

    def target(self, batch, noise):
        y = []
        for row, s in enumerate(batch["next_obs"]):
            a = self.action(s, noise["target"][row])[1]
            first, second = (float(target(s, a)[0].detach()) for target in self.targets)
            self.tried["first less"] += int(first < second)
            value = min(first, second) if self.c.q_aggregation == "min" else (first + second) / 2
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.c.gamma * alive * value)
        return torch.stack(y)

    def critic_loss(self, batch, y):
        loss, self.mean_q = 0, 0
        for s, a, goal in zip(batch["obs"], batch["action"], y, strict=True):
            for critic in self.critics:
                q = critic(s, a)[0]
                loss, self.mean_q = loss + (goal - q) ** 2, self.mean_q + q / (2 * BATCH)
        return loss / (2 * BATCH)

    def update(self, batch, noise):
        """Deviation D1: all losses at the old weights; D3: the targets after the step."""
        y = self.target(batch, noise)
        metrics = {"flow_loss": self.flow_loss(batch, noise)}
        metrics |= {"actor_loss": self.actor_loss(batch, noise), "distill_loss": self.distill}
        metrics |= {"policy_q": self.policy_q, "critic_loss": self.critic_loss(batch, y)}
        metrics["q"] = self.mean_q
        gradients = {
            adam: torch.autograd.grad(metrics[name], adam.parameters, retain_graph=True)
            for name, adam in (
                ("flow_loss", self.flow_adam),
                ("actor_loss", self.actor_adam),
                ("critic_loss", self.critic_adam),
            )
        }
        for adam, found in gradients.items():
            fixed = zip(adam.parameters, found, strict=True)
            adam.step(sum((p * g.detach()).sum() for p, g in fixed))
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(variant):
    agent, (batch, noise) = make_fql(**variant), make_inputs(21)
    obs, action = batch["obs"], batch["action"]
    target = agent.target(batch, noise["target"])
    flow_loss = agent.flow_loss(obs, action, noise["flow"], noise["time"])
    actor_loss, *_ = agent.actor_loss(obs, noise["actor"])
    critic_loss, _ = agent.critic_loss(target.detach(), obs, action)
    tried = {}
    for k in range(SEEDS):
        plain, one, draws = PlainFQL(agent, k), member(batch, k), member(noise, k)
        y = plain.target(one, draws)
        same(target[k], y, "target")
        same(
            agent.flow_action(obs, noise["actor"])[k, 0],
            plain.flow(one["obs"][0], draws["actor"][0]),
        )
        same_gradient(
            flow_loss, agent.flow, plain.flow_loss(one, draws), plain.v.parameters(), k, "flow"
        )
        same_gradient(
            actor_loss, agent.actor, plain.actor_loss(one, draws), plain.mu.parameters(), k, "actor"
        )
        theirs = plain.critic_loss(one, y)
        same_gradient(critic_loss, agent.critic, theirs, plain.critic_adam.parameters, k, "critic")
        tried = {name: tried.get(name, 0) + count for name, count in plain.tried.items()}
    assert all(count > 0 for count in tried.values()), f"not tried: {tried}"
    assert tried["first less"] < SEEDS * BATCH
    flow = torch.autograd.grad(actor_loss.sum(), list(agent.flow.parameters()), allow_unused=True)
    assert all(g is None for g in flow), "the flow learns from Q"


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates(variant):
    """Three updates: all networks from one point, then the targets."""
    agent = make_fql(**variant)
    plain = [PlainFQL(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch, noise = make_inputs(30 + step)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k))
            same_metrics(metrics, expected, k)
            check_network(agent.flow, k, one.v, "flow")
            check_network(agent.actor, k, one.mu, "one-step policy")
            check_critics(agent, k, one, check_network)
    check_moments(agent.flow_adam, [one.flow_adam for one in plain])
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_explores_with_the_noise_that_it_is_given():
    """a = center + half_range clip(mu((s - mean) / std, z), -1, 1)."""
    agent, g = make_fql(), torch.Generator().manual_seed(5)
    obs, noise = (torch.randn(SEEDS, 40, dim, generator=g) for dim in (OBS, ACT))
    action, low, high, clipped = agent.explore(obs, noise), torch.tensor(LOW), torch.tensor(HIGH), 0
    for k in range(SEEDS):
        plain = PlainFQL(agent, k)
        for row in range(40):
            s = (obs[k, row] - agent.obs_mean) / agent.obs_std
            a = plain.action(s, noise[k, row])[1].detach()
            clipped += int((a.abs() == 1).sum())
            same(action[k, row], low + (high - low) * (a + 1) / 2, "action")
    assert 0 < clipped < SEEDS * 40 * ACT


def test_acts_with_noise_that_the_state_decides(monkeypatch):
    """D4: N(0, 1) over states, each component and seed another; the same for the same state."""
    agent, seen = make_agent("fql", "FQL"), []
    explore = agent.explore
    monkeypatch.setattr(agent, "explore", lambda obs, z: seen.append(z) or explore(obs, z))
    obs = torch.randn(1, 4000, OBS, generator=torch.Generator().manual_seed(6))
    obs = obs.expand(SEEDS, -1, -1)
    action = agent.act(obs)
    same(agent.act(obs[:, :7]), action[:, :7])
    same(seen[1], seen[0][:, :7])
    same(explore(obs, seen[0]), action)
    z = seen[0].transpose(0, 1).flatten(1)  # [states, seeds * components]
    assert z.mean(0).abs().max() < 0.1 and (z.std(0) - 1).abs().max() < 0.1
    shares = [(z.abs() < sigmas).double().mean() for sigmas in (0.5, 1, 2)]
    for share, sigmas in zip(shares, (0.5, 1, 2), strict=True):
        assert abs(share - math.erf(sigmas / math.sqrt(2))) < 0.02
    assert (torch.corrcoef(z.T) - torch.eye(SEEDS * ACT)).abs().max() < 0.1
    agent.act(obs + 0.1)  # a state nearby has noise of its own
    near = seen[-1].transpose(0, 1).flatten(1)
    assert abs(torch.corrcoef(torch.stack([z.flatten(), near.flatten()]))[0, 1]) < 0.1


def test_defaults_are_the_authors():
    cfg = load_script("fql").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size, cfg.num_updates) == (0.99, 0.005, 256, 1_000_000)
    assert (cfg.alpha, cfg.flow_steps, cfg.q_aggregation) == (10.0, 10, "mean")
    assert (cfg.actor_lr, cfg.critic_lr) == (3e-4, 3e-4)
    assert (cfg.hidden_dim, cfg.hidden_layers) == (512, 4)
    assert not cfg.normalize_q_loss and not cfg.normalize_obs
    assert (cfg.online_share, cfg.updates_per_step) == (None, 1)
