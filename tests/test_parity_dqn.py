"""DQN, double DQN, QR-DQN and REM: losses, gradients, updates against plain float64 numbers."""

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
    same_gradient,
    same_metrics,
    updated,
)

pytestmark = pytest.mark.usefixtures("float64")
HEADS = 5
# A tau and an epsilon of Adam that show, a target that moves after every second update.
LOUD = {"heads": HEADS, "gamma": 0.9, "tau": 0.3, "target_every": 2, "critic_lr": 0.02}
LOUD |= {"adam_eps": 1e-3}
VARIANTS = [{"head": head, "double_q": double} for head in ("dqn", "qr_dqn", "rem")
            for double in (False, True)]  # fmt: skip
each_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def make_dqn(**settings):
    return make_discrete("dqn", "DQN", **{**LOUD, **settings})


def make_noise(agent, seed: int) -> dict:
    """u ~ U(0,1)^K of each member, where the agent asks for it."""
    g = torch.Generator().manual_seed(seed + 900)
    asked = {"mixture": ("uniform", (HEADS,))} if agent.cfg.head == "rem" else {}
    assert agent.noise_shapes == asked
    return {name: torch.rand(SEEDS, *shape, generator=g) for name, (_, shape) in asked.items()}


class PlainDQN:
    """One member: a network of K heads and its target as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.heads = 1 if self.c.head == "dqn" else HEADS
        self.network, self.target = (
            matrices(net.values, k) for net in (agent.critic, agent.target_critic)
        )
        self.adam = PlainAdam(flat(self.network), self.c.critic_lr, self.c.adam_eps)
        self.seen = {"outside": [], "negative": [], "double": []}  # which branches there were

    def theta(self, network, obs):
        """Of each observation and head the values of all actions."""
        return forward(obs, network).reshape(len(obs), self.heads, NUM_ACTIONS)

    def mixture(self, theta, draws):
        """REM's convex combination of the heads [K, A]; of the others the mean, to choose by."""
        share = draws / draws.sum() if self.c.head == "rem" else [1 / self.heads] * self.heads
        return [sum(share[i] * theta[i, a] for i in range(self.heads)) for a in range(NUM_ACTIONS)]

    def targets(self, batch, draws):
        """Of each step the list of its targets: N of QR-DQN, one of the others."""
        theirs = self.theta(self.target, batch["next_obs"]).detach()
        ours = self.theta(self.network, batch["next_obs"]).detach()
        found = []
        for row in range(BATCH):
            by_target, by_network = (self.mixture(x[row], draws) for x in (theirs, ours))
            choosing = by_network if self.c.double_q else by_target
            best = choosing.index(max(choosing))
            self.seen["double"].append(best != by_target.index(max(by_target)))
            values = [by_target[best]]
            if self.c.head == "qr_dqn":
                values = [theirs[row, j, best] for j in range(HEADS)]
            left = 0.0 if batch["terminated"][row] else self.c.gamma
            found.append([batch["reward"][row] + left * value for value in values])
        return found

    def loss(self, batch, draws):
        """The mean of equation 10 of QR-DQN, or of H(y - Q_w(s,a))."""
        theta, total = self.theta(self.network, batch["obs"]), 0.0
        for row, targets in enumerate(self.targets(batch, draws)):
            action = int(batch["action"][row])
            if self.c.head != "qr_dqn":
                total = total + self.huber(targets[0] - self.mixture(theta[row], draws)[action])
                continue
            for i in range(HEADS):
                for target in targets:
                    u = target - theta[row, i, action]
                    weight = abs((i + 0.5) / HEADS - (1.0 if u < 0 else 0.0))
                    total = total + weight * self.huber(u) / HEADS
        return total / BATCH

    def huber(self, u):
        self.seen["outside"].append(bool(abs(u) > 1))
        self.seen["negative"].append(bool(u < 0))
        return huber(u)

    def update(self, batch, draws, moves: bool):
        q = self.theta(self.network, batch["obs"]).detach().mean(1)
        best = [row.tolist().index(max(row)) for row in q]
        agreed = [float(a == b) for a, b in zip(best, batch["action"].tolist(), strict=True)]
        loss = self.loss(batch, draws)
        metrics = {"critic_loss": loss, "agreement": torch.tensor(agreed).mean()}
        metrics["q"] = sum(q[row, batch["action"][row]] for row in range(BATCH)) / BATCH
        metrics["max_q"] = sum(q[row].max() for row in range(BATCH)) / BATCH
        self.adam.step(loss)
        if moves:
            moved(self.target, self.network, self.c.tau)
        return metrics


def draws_of(noise: dict, k: int):
    return noise["mixture"][k] if noise else None


@each_variant
def test_loss_and_gradients(settings):
    agent, batch, seen = make_dqn(**settings), make_discrete_batch(8), {}
    noise = make_noise(agent, 8)
    loss = descended(agent, batch, noise)
    for k in range(SEEDS):
        plain = PlainDQN(agent, k)
        expected = plain.loss(member(batch, k), draws_of(noise, k))
        same_gradient(loss, agent.critic, expected, flat(plain.network), k, "L")
        seen = {name: seen.get(name, []) + found for name, found in plain.seen.items()}
    for name in ("outside", "negative"):
        assert {True, False} == set(seen[name]), f"a branch of the loss is not seen: {name}"
    assert any(seen["double"]) == settings["double_q"], "both networks choose the same"


@each_variant
def test_updates(settings):
    """Three updates; the target moves after the second one, towards its new weights."""
    agent = make_dqn(**settings)
    plain = [PlainDQN(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch, noise = make_discrete_batch(20 + step), make_noise(agent, step)
        assert agent.variant(step) == (step == 1,)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            same_metrics(metrics, one.update(member(batch, k), draws_of(noise, k), step == 1), k)
            check_weights(agent.critic.values, k, one.network, "network")
            check_weights(agent.target_critic.values, k, one.target, "target")
    check_moments(agent.critic_adam, [one.adam for one in plain])


@each_variant
def test_it_acts_by_the_mean_of_the_heads(settings):
    agent = make_dqn(**settings)

    def best(k, seen):
        one = PlainDQN(agent, k)
        return one.theta(one.network, seen).mean(1).argmax(-1)

    check_best(agent, 3 * make_discrete_batch(11)["obs"], best)


def test_the_quantiles_of_known_returns():
    """Two returns at one state: half of the quantiles lands on each (lemma 2 of QR-DQN)."""
    agent = make_dqn(head="qr_dqn", heads=4, hidden_layers=1, critic_lr=0.05, gamma=0.0)
    batch = make_discrete_batch(0)
    batch["obs"], batch["action"] = torch.ones_like(batch["obs"]), 0 * batch["action"]
    batch["reward"] = torch.tensor([-3.0, 3.0]).repeat(BATCH // 2).expand(SEEDS, -1)
    for _ in range(600):
        agent.update(batch, {}, False)
    quantiles = agent.critic(batch["obs"])[:, 0, :, 0].sort(-1).values
    assert (quantiles[:, :2] < -2).all() and (quantiles[:, 2:] > 2).all(), quantiles


def test_defaults_and_heads():
    """N = K = 200 as in both papers; DQN has one head whatever `heads` is."""
    cfg = load_script("dqn").TrainConfig()
    assert (cfg.head, cfg.heads, cfg.double_q, cfg.gamma) == ("dqn", 200, False, 0.99)
    out = {head: make_dqn(head=head).critic.count for head in ("dqn", "qr_dqn", "rem")}
    assert out == {"dqn": 1, "qr_dqn": HEADS, "rem": HEADS}
