"""Discrete BCQ: loss, gradients and updates against float64 computations from the paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    BATCH,
    FIRST,
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
# A tau and an epsilon of Adam that show, a target that moves after every second update.
LOUD = {"gamma": 0.9, "tau": 0.3, "target_every": 2, "critic_lr": 0.02, "adam_eps": 1e-3}
LOUD |= {"logit_penalty": 0.05}
VARIANTS = [{}, {"threshold": 0.0}, {"threshold": 1.0}, {"logit_penalty": 0.0}]
each_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def make_bcq(**settings):
    return make_discrete("discrete_bcq", "DiscreteBCQ", **{**LOUD, **settings})


class PlainBCQ:
    """One member: Q, the logits, and the targets of both as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.q, self.logits = (matrices(net, k) for net in self.nets(agent.critic))
        self.target_q, self.target_logits = (
            matrices(net, k) for net in self.nets(agent.target_critic)
        )
        both = flat(self.q) + flat(self.logits)
        self.adam = PlainAdam(both, self.c.critic_lr, self.c.adam_eps)
        self.outside, self.held_back, self.double = [], [], []  # which branches there were

    @staticmethod
    def nets(network):
        return network.values, network.logits

    def allowed(self, logits) -> list:
        """p(a|s) / max p(.|s) > threshold; at 1 the likeliest itself."""
        total = sum(math.exp(x) for x in logits)
        p = [math.exp(x) / total for x in logits]
        return [x / max(p) > self.c.threshold or x == max(p) for x in p]

    def best(self, q, logits) -> int:
        pairs = enumerate(self.allowed(logits.tolist()))
        return max((float(q[a]), a) for a, right in pairs if right)[1]

    def targets(self, batch):
        """r + gamma Qbar(s', a'): Q chooses a' among the allowed, its target rates it."""
        q, logits, rated = (
            forward(batch["next_obs"], net).detach() for net in (self.q, self.logits, self.target_q)
        )
        found = []
        for row in range(BATCH):
            best = self.best(q[row], logits[row])
            self.held_back.append(best != int(q[row].argmax()))
            self.double.append(best != self.best(rated[row], logits[row]))
            left = 0.0 if batch["terminated"][row] else self.c.gamma
            found.append(float(batch["reward"][row] + left * rated[row, best]))
        return found

    def losses(self, batch) -> tuple:
        """L_Q, L_p and the mean square of the logits."""
        q, logits = forward(batch["obs"], self.q), forward(batch["obs"], self.logits)
        critic_loss = imitation_loss = square = 0.0
        for row, y in enumerate(self.targets(batch)):
            action = batch["action"][row]
            self.outside.append(bool(abs(y - q[row, action]) > 1))
            critic_loss = critic_loss + huber(y - q[row, action]) / BATCH
            total = sum(torch.exp(logits[row, a]) for a in range(NUM_ACTIONS))
            imitation_loss = imitation_loss - torch.log(torch.exp(logits[row, action]) / total)
            square = square + sum(x**2 for x in logits[row]) / NUM_ACTIONS / BATCH
        return critic_loss, imitation_loss / BATCH, square

    def loss(self, batch):
        critic_loss, imitation_loss, square = self.losses(batch)
        return critic_loss + imitation_loss + self.c.logit_penalty * square

    def update(self, batch, moves: bool):
        critic_loss, imitation_loss, _ = self.losses(batch)
        metrics = {"critic_loss": critic_loss, "imitation_loss": imitation_loss}
        q, logits = forward(batch["obs"], self.q), forward(batch["obs"], self.logits)
        best = [self.best(*pair) for pair in zip(q.detach(), logits.detach(), strict=True)]
        metrics["q"] = sum(q[row, batch["action"][row]] for row in range(BATCH)) / BATCH
        metrics["max_q"] = sum(q[row, a] for row, a in enumerate(best)) / BATCH
        share = [sum(self.allowed(row)) / NUM_ACTIONS for row in logits.tolist()]
        metrics["allowed"] = torch.tensor(share).mean()
        agreed = [float(a == b) for a, b in zip(best, batch["action"].tolist(), strict=True)]
        metrics["agreement"] = torch.tensor(agreed).mean()
        self.adam.step(self.loss(batch))
        if moves:
            moved(self.target_q, self.q, self.c.tau)
            moved(self.target_logits, self.logits, self.c.tau)
        return metrics


@each_variant
def test_loss_and_gradients(settings):
    agent, batch, outside, held_back, double = (
        make_bcq(**settings),
        make_discrete_batch(8),
        [],
        [],
        [],
    )
    loss = descended(agent, batch, {})
    for k in range(SEEDS):
        plain = PlainBCQ(agent, k)
        expected = plain.loss(member(batch, k))
        same_gradient(loss, agent.critic, expected, plain.adam.parameters, k, "L")
        outside, held_back = outside + plain.outside, held_back + plain.held_back
        double += plain.double
    assert {True, False} == set(outside), "one branch of the Huber loss"
    assert any(held_back) == (settings.get("threshold") != 0), "the threshold does nothing"
    assert any(double) == (settings.get("threshold") != 1), "both networks choose the same"


@each_variant
def test_updates(settings):
    """Three updates; the target moves after the second one, towards its new weights."""
    agent = make_bcq(**settings)
    plain = [PlainBCQ(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch = make_discrete_batch(20 + step)
        assert agent.variant(step) == (step == 1,)
        metrics = updated(agent, batch, {}, *agent.variant(step))
        for k, one in enumerate(plain):
            same_metrics(metrics, one.update(member(batch, k), step == 1), k)
            pairs = zip(one.nets(agent.critic), (one.q, one.logits), strict=True)
            for net, expected in pairs:
                check_weights(net, k, expected, "network")
            theirs = one.target_q, one.target_logits
            for net, expected in zip(one.nets(agent.target_critic), theirs, strict=True):
                check_weights(net, k, expected, "target")
    check_moments(agent.critic_adam, [one.adam for one in plain])


@each_variant
def test_it_acts_by_the_best_allowed_action(settings):
    agent = make_bcq(**settings)

    def best(k, seen):
        one = PlainBCQ(agent, k)
        q, logits = (forward(seen, net).detach() for net in (one.q, one.logits))
        return [one.best(*pair) for pair in zip(q, logits, strict=True)]

    check_best(agent, 3 * make_discrete_batch(11)["obs"], best)


def test_the_threshold_by_known_logits():
    """p = 0.6, 0.2, 0.15, 0.05: shares of 1, 0.33, 0.25, 0.08."""
    logits = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
    shares = {0.3: 2, 0.26: 2, 0.2: 3, 0.08: 4, 0.0: 4, 1.0: 1}
    for threshold, count in shares.items():
        allowed = make_bcq(threshold=threshold).allowed(logits)
        assert allowed.tolist() == [i < count for i in range(4)], threshold


def test_an_action_that_the_data_lacks_is_not_taken():
    """However high its value: double DQN takes it, BCQ does not."""
    agent, batch = make_bcq(), make_discrete_batch(0)
    with torch.no_grad():
        agent.critic.values.layers[-1].bias[..., 3] += 1000
    batch["action"] = batch["action"].clamp(max=2)
    for step in range(300):
        agent.update(batch, {}, *agent.variant(step))
    obs = batch["obs"] * agent.obs_std + agent.obs_mean
    taken = []
    for threshold in (0.3, 0.0):
        agent.cfg.threshold = threshold
        taken.append((agent.act(obs) == FIRST + 3).double().mean().item())
    assert taken[0] == 0 and taken[1] > 0.9, taken


def test_images_share_the_encoder():
    """One trunk below both heads, of which the classifier's loss moves its part, too."""
    script, shape = load_script("discrete_bcq"), (10, 10, 4)
    cfg = script.TrainConfig(encoder="minatar", hidden_dim=8, hidden_layers=1)
    net = script.QNetwork([script.generator(0, "init")], cfg, shape, NUM_ACTIONS)
    _, logits = net(torch.rand(1, 3, 400))
    logits.sum().backward()
    assert all((p.grad != 0).any() for p in net.encoder.parameters())
    assert all(p.grad is None for p in net.values.parameters())


def test_defaults_are_the_papers():
    cfg = load_script("discrete_bcq").TrainConfig()
    assert (cfg.threshold, cfg.logit_penalty, cfg.gamma, cfg.tau) == (0.3, 0.01, 0.99, 0.005)
    assert (cfg.critic_lr, cfg.hidden_dim, cfg.hidden_layers) == (3e-4, 256, 2)
