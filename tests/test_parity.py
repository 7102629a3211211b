"""BC and IQL: losses, gradients, whole updates against float64 computations from the papers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script, words
from plain import (
    ACT,
    BATCH,
    SEEDS,
    PlainAdam,
    check_act,
    check_critics,
    check_moments,
    check_weights,
    flat,
    forward,
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

# ---- BC


def bc_loss(network, obs, action):
    """E[ 1/act_dim |pi(s) - a|^2 ] with pi(s) = tanh(network(s))."""
    error = (forward(obs, network).tanh() - action) ** 2
    return sum(row.sum() / ACT for row in error) / len(error)


def test_bc_loss_and_gradients():
    agent, (batch, _) = make_agent("bc", "BC"), make_batch(2)
    loss = agent.actor_loss(batch["obs"], batch["action"])
    for k in range(SEEDS):
        network = matrices(agent.actor, k)
        expected = bc_loss(network, batch["obs"][k], batch["action"][k])
        same_gradient(loss, agent.actor, expected, flat(network), k)


def test_bc_updates():
    agent = make_agent("bc", "BC", actor_lr=0.02)
    networks = [matrices(agent.actor, k) for k in range(SEEDS)]
    adams = [PlainAdam(flat(network), 0.02) for network in networks]
    for seed in (3, 4):
        batch, noise = make_batch(seed)
        metrics = agent.update(batch, noise)
        for k, (network, adam) in enumerate(zip(networks, adams, strict=True)):
            loss = bc_loss(network, batch["obs"][k], batch["action"][k])
            same(metrics["actor_loss"][k], loss, "actor_loss")
            adam.step(loss)
            check_weights(agent.actor, k, network, "actor")
    check_moments(agent.actor_adam, adams)


def test_bc_acts_in_the_environments_units():
    agent, (batch, _) = make_agent("bc", "BC"), make_batch(5)
    check_act(agent, agent.actor, 3 * batch["obs"])


# ---- IQL


CASES = {
    "gaussian": {},
    "gaussian, dropout": {"actor_dropout": 0.4},
    "deterministic": {"deterministic": True},
    "deterministic, dropout": {"deterministic": True, "actor_dropout": 0.4},
    "constant rate": {"cosine_actor_lr": False},
}
# A learning rate of its own for each network, one that falls fast, a tau that shows, weights on
# both sides of 100.
LOUD = {
    "expectile": 0.8,
    "inverse_temperature": 30.0,
    "gamma": 0.9,
    "tau": 0.1,
    "value_lr": 0.03,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "num_updates": 6,
}


def make_iql(**settings):
    """IQL with targets that differ from the critics, and log_std on both sides of its bounds."""
    agent, g = make_agent("iql", "IQL", **{**LOUD, **settings}), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in agent.target_critic.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g))
        if not settings.get("deterministic"):
            log_std = torch.tensor([[-5.5, 0.3, -1.0], [2.5, -0.5, 1.0], [0.0, 1.9, -2.0]])
            agent.actor.log_std.copy_(log_std.unsqueeze(1))
    return agent


class PlainIQL:
    """One member: V, two critics, their targets and the policy as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.value = matrices(agent.value, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.policy, self.log_std = matrices(agent.actor.mean, k), None
        if not self.c.deterministic:
            self.log_std = agent.actor.log_std[k, 0].detach().clone().requires_grad_()
        # The script's order of parameters: an nn.Module's own come before those of its modules.
        own = [] if self.c.deterministic else [self.log_std]
        self.actor_adam = PlainAdam(own + flat(self.policy), self.c.actor_lr)
        self.value_adam = PlainAdam(flat(self.value), self.c.value_lr)
        self.critic_adam = PlainAdam(
            flat(self.critics[0]) + flat(self.critics[1]), self.c.critic_lr
        )

    def v(self, obs):
        return forward(obs, self.value)[:, 0]

    def each_q(self, networks, batch):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        return [forward(pair, network)[:, 0] for network in networks]

    def q_bar(self, batch):
        first, second = self.each_q(self.targets, batch)
        return torch.minimum(first, second).detach()

    def value_loss(self, batch):
        """Equations 3 and 5: |tau - 1(u < 0)| u^2."""
        u = self.q_bar(batch) - self.v(batch["obs"])
        return (abs(self.c.expectile - (u < 0).double()) * u**2).mean()

    def weights(self, batch):
        advantage = self.q_bar(batch) - self.v(batch["obs"]).detach()
        return torch.minimum(torch.exp(self.c.inverse_temperature * advantage), torch.tensor(100.0))

    def actor_loss(self, batch, masks):
        """Equation 7, negated: a mean of weight times log-likelihood (or minus squared error)."""
        mean, total = forward(batch["obs"], self.policy, masks).tanh(), 0.0
        for row, weight in enumerate(self.weights(batch)):
            for j in range(ACT):
                a, mu = batch["action"][row, j], mean[row, j]
                if self.c.deterministic:
                    total = total + weight * -((a - mu) ** 2)
                else:
                    sigma = torch.exp(torch.clip(self.log_std[j], -5, 2))
                    total = total + weight * torch.distributions.Normal(mu, sigma).log_prob(a)
        return -total / BATCH

    def critic_loss(self, batch):
        """Equation 6, summed over the critics."""
        loss, next_v = 0.0, self.v(batch["next_obs"]).detach()
        for row in range(BATCH):
            target = batch["reward"][row]
            if not batch["terminated"][row]:
                target = target + self.c.gamma * next_v[row]
            for q in self.each_q(self.critics, batch):
                loss = loss + (target - q[row]) ** 2 / BATCH
        return loss

    def update(self, batch, masks):
        """V, policy with the new V, critics with the new V, targets with the new critics."""
        metrics = {"value_loss": self.value_loss(batch)}
        self.value_adam.step(metrics["value_loss"])
        v = self.v(batch["obs"]).detach()
        metrics |= {"v": v.mean(), "advantage": (self.q_bar(batch) - v).mean()}
        metrics["clipped_weights"] = (self.weights(batch) == 100).double().mean()
        metrics["actor_loss"] = self.actor_loss(batch, masks)
        if self.c.cosine_actor_lr:
            share = self.actor_adam.t / self.c.num_updates  # before this step
            self.actor_adam.lr = self.c.actor_lr * (1 + math.cos(math.pi * share)) / 2
        self.actor_adam.step(metrics["actor_loss"])
        metrics["q"] = sum(self.each_q(self.critics, batch)).mean() / 2
        metrics["critic_loss"] = self.critic_loss(batch)
        self.critic_adam.step(metrics["critic_loss"])
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(flat(target), flat(critic), strict=True):
                    old.copy_((1 - self.c.tau) * old + self.c.tau * new)
        return metrics


def plain_masks(noise: dict, k: int, p: float):
    """A hidden unit is dropped with probability p, and scaled by 1 / (1 - p) otherwise."""
    if not noise:
        return None
    kept = np.where(noise["kept"][k].numpy(), 1 / (1 - p), 0.0)
    assert 0 < (kept == 0).mean() < 1
    return torch.as_tensor(kept)


@pytest.mark.parametrize("case", CASES)
def test_iql_losses_and_gradients(case):
    settings = CASES[case]
    agent = make_iql(**settings)
    batch, noise = make_batch(8, dropout=settings.get("actor_dropout", 0))
    plain = [PlainIQL(agent, k) for k in range(SEEDS)]
    target_q = torch.stack([plain[k].q_bar(member(batch, k)) for k in range(SEEDS)])
    v, next_v = (
        torch.stack([plain[k].v(batch[name][k]) for k in range(SEEDS)]).detach()
        for name in ("obs", "next_obs")
    )
    actor_loss, clipped = agent.actor_loss(
        target_q - v,
        batch["obs"],
        batch["action"],
        noise["kept"] / (1 - agent.cfg.actor_dropout) if noise else None,
    )
    critic_loss, q = agent.critic_loss(batch, next_v)
    found = {
        "value": (agent.value_loss(target_q, batch["obs"]), agent.value),
        "actor": (actor_loss, agent.actor),
        "critic": (critic_loss, agent.critic),
    }
    # Tame numbers would leave branches untested.
    assert (target_q < v).any() and (target_q > v).any()
    assert 0 < clipped.mean() < 1
    pairs = [member_.each_q(member_.targets, member(batch, k)) for k, member_ in enumerate(plain)]
    assert 0 < torch.stack([(q1 < q2).double() for q1, q2 in pairs]).mean() < 1
    for k, member_ in enumerate(plain):
        one, masks = member(batch, k), plain_masks(noise, k, agent.cfg.actor_dropout)
        same(q[k], sum(member_.each_q(member_.critics, one)).mean() / 2, "q")
        expected = {
            "value": (member_.value_loss(one), member_.value_adam),
            "actor": (member_.actor_loss(one, masks), member_.actor_adam),
            "critic": (member_.critic_loss(one), member_.critic_adam),
        }
        for name, (loss, module) in found.items():
            theirs, adam = expected[name]
            same_gradient(loss, module, theirs, adam.parameters, k, name)


@pytest.mark.parametrize("case", CASES)
def test_iql_updates(case):
    """Two updates in a row: the second one sees any order that is not the paper's."""
    settings = CASES[case]
    agent = make_iql(**settings)
    plain, clipped = [PlainIQL(agent, k) for k in range(SEEDS)], []
    for seed in (9, 10):
        batch, noise = make_batch(seed, dropout=settings.get("actor_dropout", 0))
        metrics = updated(agent, batch, noise)
        for k, member_ in enumerate(plain):
            masks = plain_masks(noise, k, agent.cfg.actor_dropout)
            expected = member_.update(member(batch, k), masks)
            clipped.append(expected["clipped_weights"])
            same_metrics(metrics, expected, k)
            check_weights(agent.value, k, member_.value, "V")
            check_weights(agent.actor.mean, k, member_.policy, "policy")
            check_critics(agent, k, member_)
            if member_.log_std is not None:
                same(agent.actor.log_std[k, 0], member_.log_std, "log_std")
    assert 0 < torch.stack(clipped).mean() < 1
    for name in ("value", "actor", "critic"):
        adams = [getattr(member_, f"{name}_adam") for member_ in plain]
        check_moments(getattr(agent, f"{name}_adam"), adams)
    assert all(p.grad is None for p in agent.target_critic.parameters())


@pytest.mark.parametrize("case", CASES)
def test_iql_acts_with_the_mean_and_without_dropout(case):
    agent, (batch, _) = make_iql(**CASES[case]), make_batch(11)
    check_act(agent, agent.actor.mean, 3 * batch["obs"])


def test_iql_defaults_are_the_papers():
    cfg = load_script("iql").TrainConfig()
    assert (cfg.gamma, cfg.expectile, cfg.inverse_temperature, cfg.tau) == (0.99, 0.7, 3.0, 0.005)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.value_lr) == (3e-4, 3e-4, 3e-4)
    assert (cfg.batch_size, cfg.hidden_dim, cfg.hidden_layers) == (256, 256, 2)
    assert (cfg.num_updates, cfg.actor_dropout, cfg.deterministic) == (1_000_000, 0.0, False)
    assert cfg.cosine_actor_lr and not cfg.normalize_obs


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 1), (250, (1 + 0.5**0.5) / 2), (500, 0.5), (999, None), (1000, 0), (1001, 0), (2000, 0)],
)
def test_iql_cosine_schedule(step, share):
    """lr (1 + cos(pi step / num_updates)) / 2, which stays 0 past the end."""
    agent = make_agent("iql", "IQL", actor_lr=0.02, num_updates=1000)
    agent.actor_adam.steps.fill_(step)
    share = math.sin(math.pi * 1 / 2000) ** 2 if share is None else share
    found = agent.scheduled_actor_lr().item()
    assert found == pytest.approx(0.02 * share, rel=1e-9, abs=1e-15)


def test_iql_constant_schedule():
    agent = make_agent("iql", "IQL", actor_lr=0.02, cosine_actor_lr=False)
    assert agent.scheduled_actor_lr() is None and agent.actor_adam.options["lr"] == 0.02


def test_bootstrap_stops_at_terminations_only(monkeypatch):
    """The toy data's second episode is truncated: it is 40 steps long and bootstraps throughout."""
    torch.set_default_dtype(torch.float32)
    script, tables = load_script("iql"), []
    batches = script.batches
    monkeypatch.setattr(script, "batches", lambda *args: tables.append(args[1]) or batches(*args))
    assert script.main(words(num_updates=1, env_id="none")) == 0
    (data,) = tables
    assert data["terminated"].nonzero().flatten().tolist() == [29, 70]
    inner = [i for i in range(70) if i not in (29, 69)]
    follows = [i + 1 for i in inner]
    torch.testing.assert_close(data["next_obs"][inner], data["obs"][follows])
    for last in (29, 69):
        assert not torch.allclose(data["next_obs"][last], data["obs"][last + 1])
