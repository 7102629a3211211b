"""Discrete CQL: loss, gradients and updates against float64 computations from the papers."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    BATCH,
    NUM_ACTIONS,
    SEEDS,
    PlainAdam,
    check_best,
    check_moments,
    check_weights,
    descended,
    flat,
    forward,
    huber,
    make_discrete,
    make_discrete_batch,
    matrices,
    member,
    moved,
    same,
    same_gradient,
    same_metrics,
    updated,
)

pytestmark = pytest.mark.usefixtures("float64")
N = 5
# A tau and an epsilon of Adam that show, a target that moves after every second update.
LOUD = {"quantiles": N, "alpha": 1.7, "gamma": 0.9, "tau": 0.3, "target_every": 2}
LOUD |= {"critic_lr": 0.02, "adam_eps": 1e-3}


def make_cql(**settings):
    return make_discrete("discrete_cql", "DiscreteCQL", **{**LOUD, **settings})


class PlainCQL:
    """One member: a network of N quantiles an action and its target as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.network, self.target = (
            matrices(net.values, k) for net in (agent.critic, agent.target_critic)
        )
        self.adam = PlainAdam(flat(self.network), self.c.critic_lr, self.c.adam_eps)
        self.seen = {"outside": [], "negative": []}  # which branches there were

    def theta(self, network, obs):
        return forward(obs, network).reshape(len(obs), N, NUM_ACTIONS)

    def targets(self, batch):
        """Of each step r + gamma theta_bar_j(s', a'), a' by the target's own means."""
        theta, found = self.theta(self.target, batch["next_obs"]).detach(), []
        for row in range(BATCH):
            means = [float(theta[row, :, a].sum()) / N for a in range(NUM_ACTIONS)]
            best = means.index(max(means))
            left = 0.0 if batch["terminated"][row] else self.c.gamma
            found.append([batch["reward"][row] + left * theta[row, j, best] for j in range(N)])
        return found

    def td_loss(self, batch):
        """Equation 10 of QR-DQN, summed over quantiles, a mean over targets."""
        theta, total = self.theta(self.network, batch["obs"]), 0.0
        for row, targets in enumerate(self.targets(batch)):
            for i in range(N):
                for target in targets:
                    u = target - theta[row, i, batch["action"][row]]
                    self.seen["outside"].append(bool(abs(u) > 1))
                    self.seen["negative"].append(bool(u < 0))
                    weight = abs((i + 0.5) / N - (1.0 if u < 0 else 0.0))
                    total = total + weight * huber(u) / N
        return total / BATCH

    def gap(self, batch):
        """The first term of equation 4."""
        theta, total = self.theta(self.network, batch["obs"]), 0.0
        for row in range(BATCH):
            q = [theta[row, :, a].sum() / N for a in range(NUM_ACTIONS)]
            total = total + torch.log(sum(torch.exp(x) for x in q)) - q[batch["action"][row]]
        return total / BATCH

    def loss(self, batch):
        return self.td_loss(batch) + self.c.alpha * self.gap(batch)

    def update(self, batch, moves: bool):
        q = self.theta(self.network, batch["obs"]).detach().mean(1)
        best = [row.tolist().index(max(row)) for row in q]
        agreed = [float(a == b) for a, b in zip(best, batch["action"].tolist(), strict=True)]
        metrics = {"td_loss": self.td_loss(batch), "conservative_gap": self.gap(batch)}
        metrics["q"] = sum(q[row, batch["action"][row]] for row in range(BATCH)) / BATCH
        metrics["max_q"] = sum(q[row].max() for row in range(BATCH)) / BATCH
        metrics |= {"agreement": torch.tensor(agreed).mean(), "critic_loss": self.loss(batch)}
        self.adam.step(metrics["critic_loss"])
        if moves:
            moved(self.target, self.network, self.c.tau)
        return metrics


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}, {"alpha": 4.0}], ids=str)
def test_loss_and_gradients(settings):
    agent, batch, seen = make_cql(**settings), make_discrete_batch(8), {}
    loss = descended(agent, batch, {})
    for k in range(SEEDS):
        plain = PlainCQL(agent, k)
        expected = plain.loss(member(batch, k))
        same_gradient(loss, agent.critic, expected, flat(plain.network), k, "L")
        seen = {name: seen.get(name, []) + found for name, found in plain.seen.items()}
    for name, found in seen.items():
        assert {True, False} == set(found), f"a branch of the loss is not seen: {name}"


def test_updates():
    """Three updates; the target moves after the second one, towards its new weights."""
    agent = make_cql()
    plain = [PlainCQL(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch = make_discrete_batch(20 + step)
        assert agent.variant(step) == (step == 1,)
        metrics = updated(agent, batch, {}, *agent.variant(step))
        for k, one in enumerate(plain):
            same_metrics(metrics, one.update(member(batch, k), step == 1), k)
            check_weights(agent.critic.values, k, one.network, "network")
            check_weights(agent.target_critic.values, k, one.target, "target")
    check_moments(agent.critic_adam, [one.adam for one in plain])


def test_it_acts_by_the_mean_of_the_quantiles():
    agent = make_cql()

    def best(k, seen):
        one = PlainCQL(agent, k)
        return one.theta(one.network, seen).mean(1).argmax(-1)

    check_best(agent, 3 * make_discrete_batch(11)["obs"], best)


def test_without_alpha_it_is_qr_dqn():
    """The same numbers as dqn.py's, which draws the same weights."""
    shared = {name: LOUD[name] for name in LOUD.keys() - {"quantiles", "alpha"}}
    other = make_discrete("dqn", "DQN", head="qr_dqn", heads=N, **shared)
    agent, batch = make_cql(alpha=0.0), make_discrete_batch(3)
    for step in range(2):
        ours = agent.update(batch, {}, *agent.variant(step))
        theirs = other.update(batch, {}, *other.variant(step))
        same(ours["critic_loss"], theirs["critic_loss"], "L")
    for a, b in zip(agent.parameters(), other.parameters(), strict=True):
        same(a, b.detach(), "weights")


def test_alpha_pushes_unseen_actions_down():
    """The data has one action of reward 0 in every state; alone, QR-DQN leaves the others be."""
    gaps = {}
    for alpha in (0.0, 1.0):
        agent, batch = make_cql(alpha=alpha), make_discrete_batch(0)
        batch |= {"action": 0 * batch["action"], "reward": 0 * batch["reward"]}
        for step in range(200):
            metrics = agent.update(batch, {}, *agent.variant(step))
        gaps[alpha] = metrics["max_q"] - metrics["q"]
    assert (gaps[1.0] == 0).all() and (gaps[0.0] > 0.1).all(), gaps


def test_defaults_are_the_papers():
    cfg = load_script("discrete_cql").TrainConfig()
    assert (cfg.quantiles, cfg.alpha, cfg.gamma, cfg.eval_epsilon) == (200, 1.0, 0.99, 0.001)
