"""AWAC: losses, gradients and whole updates against float64 computations from the paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
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
# Rates of their own, a tau that shows, weights on both sides of 100.
LOUD = {
    "gamma": 0.9,
    "awr_temperature": 0.3,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "actor_weight_decay": 0.05,
}
CASES = ("softmax", "clipped")


def make_awac(**settings):
    """AWAC with large critics, targets that differ from them, and deviations from 0.003 to 0.98."""
    agent, g = make_agent("awac", "AWAC", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for seed, module in enumerate((agent.critic, agent.target_critic)):
            for p in module.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(100 * seed + p.numel())))
        logit = torch.tensor([[4.0, -4.0, 1.0], [2.0, 0.0, 3.0], [-1.0, 1.5, 0.5]])
        agent.actor.log_std_logit.copy_(logit.unsqueeze(1))
    return agent


def make_inputs(seed: int) -> tuple[dict, dict]:
    g, names = torch.Generator().manual_seed(seed), ("next_action", "action")
    noise = {name: torch.randn(SEEDS, BATCH, ACT, generator=g) for name in names}
    return make_batch(seed)[0], noise


class PlainAWAC:
    """One member: the policy, two critics and their targets as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.policy = matrices(agent.actor.mean, k)
        self.logit = agent.actor.log_std_logit[k, 0].detach().clone().requires_grad_()
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        # The script's order of parameters: an nn.Module's own come before those of its modules.
        self.actor_adam = PlainAdam([self.logit, *flat(self.policy)], self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.outside, self.weights_clipped = 0, 0

    def pi(self, s):
        """The policy at one state as a distribution: log_std = -6 / (1 + exp(logit))."""
        std = torch.exp(-6 / (1 + torch.exp(self.logit)))
        return torch.distributions.Normal(torch.tanh(forward(s, self.policy)), std)

    def action(self, s, epsilon):
        pi = self.pi(s)
        a = (pi.loc + pi.scale * epsilon).detach()
        self.outside += int((a.abs() > 1).sum())
        return torch.clip(a, -1, 1)

    def smaller(self, networks, s, a):
        return min(forward(torch.cat([s, a]), network)[0].detach() for network in networks)

    def target(self, batch, noise):
        y = []
        for row in range(BATCH):
            s = batch["next_obs"][row]
            q = self.smaller(self.targets, s, self.action(s, noise["next_action"][row]))
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.c.gamma * alive * q)
        return torch.stack(y)

    def critic_loss(self, batch, y):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        return sum(((y - forward(pair, network)[:, 0]) ** 2).mean() for network in self.critics)

    def advantage(self, batch, noise):
        each = []
        for row in range(BATCH):
            s, a = batch["obs"][row], batch["action"][row]
            v = self.smaller(self.critics, s, self.action(s, noise["action"][row]))
            each.append(self.smaller(self.critics, s, a) - v)
        return torch.stack(each)

    def actor_loss(self, batch, advantage):
        """exp(A / lambda), over the batch's mean or cut at 100, times log pi, negated."""
        weight = [math.exp(float(a) / self.c.awr_temperature) for a in advantage]
        if self.c.weighting == "softmax":
            weight = [w * BATCH / sum(weight) for w in weight]
        else:
            self.weights_clipped += sum(w > 100 for w in weight)
            weight = [min(w, 100.0) for w in weight]
        self.share = torch.tensor(sum(weight) ** 2 / (BATCH * sum(w * w for w in weight)))
        total = 0.0
        for row in range(BATCH):
            log_prob = self.pi(batch["obs"][row]).log_prob(batch["action"][row]).sum()
            total = total - weight[row] * log_prob
        return total / BATCH

    def update(self, batch, noise):
        """Critics, then the policy with the new critics, then the targets."""
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        q = sum(forward(pair, network)[:, 0] for network in self.critics).mean() / 2
        metrics = {
            "q": q.detach(),
            "critic_loss": self.critic_loss(batch, self.target(batch, noise)),
        }
        self.critic_adam.step(metrics["critic_loss"])
        advantage = self.advantage(batch, noise)
        metrics["advantage"] = advantage.mean()
        metrics["actor_loss"] = self.actor_loss(batch, advantage)
        metrics["effective_sample_share"] = self.share
        squares = sum((p**2).sum() for p in self.actor_adam.parameters)
        self.actor_adam.step(metrics["actor_loss"] + self.c.actor_weight_decay / 2 * squares)
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(flat(target), flat(critic), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


@pytest.mark.parametrize("weighting", CASES)
def test_losses_and_gradients(weighting):
    agent, (batch, noise) = make_awac(weighting=weighting), make_inputs(21)
    obs, action = batch["obs"], batch["action"]
    target = agent.target(batch, noise["next_action"]).detach()
    critic_loss, _ = agent.critic_loss(target, obs, action)
    advantage = agent.advantage(obs, action, noise["action"]).detach()
    actor_loss, share = agent.actor_loss(advantage, obs, action)
    outside = weights_clipped = 0
    for k in range(SEEDS):
        plain, one = PlainAWAC(agent, k), member(batch, k)
        ours = {name: values[k] for name, values in noise.items()}
        y, a = plain.target(one, ours), plain.advantage(one, ours)
        same(target[k], y, "target")
        same(advantage[k], a, "advantage")
        expected = {
            "critic": (critic_loss, plain.critic_loss(one, y), plain.critic_adam, agent.critic),
            "actor": (actor_loss, plain.actor_loss(one, a), plain.actor_adam, agent.actor),
        }
        same(share[k], plain.share, "effective_sample_share")
        assert 1 / BATCH < share[k] < 1
        for name, (found, theirs, adam, module) in expected.items():
            same_gradient(found, module, theirs, adam.parameters, k, name)
        outside, weights_clipped = outside + plain.outside, weights_clipped + plain.weights_clipped
    assert 0 < outside < 2 * SEEDS * BATCH * ACT, "the clip of actions is not tried"
    assert weighting == "softmax" or 0 < weights_clipped < SEEDS * BATCH


@pytest.mark.parametrize("weighting", CASES)
def test_updates(weighting):
    """Three updates in a row see any other order than critics, policy, targets."""
    agent = make_awac(weighting=weighting)
    plain = [PlainAWAC(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch, noise = make_inputs(30 + step)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k))
            same_metrics(metrics, expected, k)
            check_weights(agent.actor.mean, k, one.policy, "policy")
            same(agent.actor.log_std_logit[k, 0], one.logit, "log_std")
            check_critics(agent, k, one)
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_acts_with_the_mean():
    agent, (batch, _) = make_awac(), make_inputs(5)
    check_act(agent, agent.actor.mean, 3 * batch["obs"])


@pytest.mark.parametrize("weighting", CASES)
def test_weights_of_extreme_advantages_stay_finite(weighting):
    """exp(A / lambda) that is 0 or infinite in any float type, for one row or for all."""
    agent, (batch, _) = make_awac(weighting=weighting), make_inputs(6)
    advantage = torch.zeros(SEEDS, BATCH)
    advantage[0], advantage[1], advantage[2, 0] = -1e4, 1e4, 1e4
    loss, share = agent.actor_loss(advantage, batch["obs"], batch["action"])
    assert loss.isfinite().all()
    same(share[:2], torch.ones(2), "equal weights")
    alone = 1 / BATCH if weighting == "softmax" else (110 + 1) ** 2 / (BATCH * (100**2 + 11))
    same(share[2], torch.tensor(alone), "one weight")


def test_a_large_temperature_is_behaviour_cloning():
    batch, noise = make_inputs(7)
    losses = []
    for weighting in CASES:
        agent = make_awac(weighting=weighting, awr_temperature=1e6)
        advantage = agent.advantage(batch["obs"], batch["action"], noise["action"])
        loss, share = agent.actor_loss(advantage.detach(), batch["obs"], batch["action"])
        cloning = -agent.actor.log_prob(batch["obs"], batch["action"]).mean(-1)
        torch.testing.assert_close(loss, cloning, rtol=1e-4, atol=0)
        torch.testing.assert_close(share, torch.ones(SEEDS), rtol=1e-6, atol=0)
        losses.append(loss)
    assert not torch.equal(*losses)


def test_the_deviation_starts_as_the_authors():
    """In the middle of log_std's range, at -3, for every dimension."""
    agent, (batch, _) = make_agent("awac", "AWAC"), make_inputs(8)
    _, log_std = agent.actor(batch["obs"])
    same(log_std, torch.full((SEEDS, 1, ACT), -3.0))


def test_defaults_are_the_papers():
    """The paper's table of hyperparameters; lambda is that of the authors' code."""
    cfg = load_script("awac").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size) == (0.99, 0.005, 1024)
    assert (cfg.awr_temperature, cfg.weighting) == (2.0, "softmax")
    assert (cfg.actor_lr, cfg.critic_lr, cfg.actor_weight_decay) == (3e-4, 3e-4, 1e-4)
    assert (cfg.hidden_dim, cfg.hidden_layers) == (256, 4)
    assert not cfg.normalize_obs and cfg.num_updates == 1_000_000
