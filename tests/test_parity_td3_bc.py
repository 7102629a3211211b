"""TD3+BC: losses, gradients and whole updates against float64 computations from the paper."""

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
# Rates of their own, a tau that shows, noise on both sides of its clip, actions on both of theirs.
LOUD = {
    "gamma": 0.9,
    "alpha": 1.7,
    "policy_noise": 0.4,
    "noise_clip": 0.3,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
}


def make_td3_bc(**settings):
    """TD3+BC with targets that differ from their networks, and policies that saturate at times."""
    agent, g = make_agent("td3_bc", "TD3BC", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for seed, module in enumerate((agent.target_critic, agent.target_actor, agent.critic)):
            for p in module.parameters():  # loud, so that Q has both signs within a batch
                g.manual_seed(1000 * seed + p.numel())
                p.copy_(0.8 * torch.randn(p.shape, generator=g))
    return agent


def make_noise(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"target": torch.randn(SEEDS, BATCH, ACT, generator=g)}


class PlainTD3BC:
    """One member: the policy, two critics and their targets as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.policy, self.target_policy = matrices(agent.actor, k), matrices(agent.target_actor, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.actor_adam = PlainAdam(flat(self.policy), self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)

    def target(self, batch, noise):
        """TD3's y, a row at a time."""
        y, clipped = [], 0
        for row in range(BATCH):
            epsilon = [min(max(self.c.policy_noise * float(e), -0.3), 0.3) for e in noise[row]]
            a = forward(batch["next_obs"][row], self.target_policy).tanh() + torch.tensor(epsilon)
            clipped += int((a.abs() > 1).sum())
            pair = torch.cat([batch["next_obs"][row], torch.clip(a, -1, 1)])
            q = min(forward(pair, network)[0].detach() for network in self.targets)
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.c.gamma * alive * q)
        self.clipped = clipped
        return torch.stack(y)

    def critic_loss(self, batch, y):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        return sum(((y - forward(pair, network)[:, 0]) ** 2).mean() for network in self.critics)

    def actor_loss(self, batch):
        """Equations 3 and 5 with deviations D1 and D2."""
        policy = forward(batch["obs"], self.policy).tanh()
        q1 = forward(torch.cat([batch["obs"], policy], 1), self.critics[0])[:, 0]
        scale = sum(abs(float(q)) for q in q1.detach()) / BATCH
        self.bc = ((policy - batch["action"]) ** 2).sum(1).mean() / ACT
        self.policy_q = q1.mean()
        return -(self.c.alpha / scale) * q1.mean() + self.bc

    def update(self, batch, noise, move_actor):
        y = self.target(batch, noise)
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        q = sum(forward(pair, network)[:, 0] for network in self.critics).mean() / 2
        metrics = {"q": q.detach(), "critic_loss": self.critic_loss(batch, y)}
        self.critic_adam.step(metrics["critic_loss"])
        if move_actor:
            metrics["actor_loss"] = self.actor_loss(batch)
            metrics |= {"bc_loss": self.bc, "policy_q": self.policy_q}
            self.actor_adam.step(metrics["actor_loss"])
            pairs = [(self.target_policy, self.policy), *zip(self.targets, self.critics)]  # noqa: B905
            with torch.no_grad():
                for target, online in pairs:
                    for old, new in zip(flat(target), flat(online), strict=True):
                        old.copy_(0.9 * old + 0.1 * new)
        return metrics


def test_losses_and_gradients():
    agent, (batch, _), noise = make_td3_bc(), make_batch(21), make_noise(22)
    target = agent.target(batch, noise["target"])
    critic_loss, _ = agent.critic_loss(target, batch["obs"], batch["action"])
    actor_loss, _, _ = agent.actor_loss(batch["obs"], batch["action"])
    saturated = 0
    for k in range(SEEDS):
        plain, one = PlainTD3BC(agent, k), member(batch, k)
        y = plain.target(one, noise["target"][k])
        saturated += plain.clipped
        same(target[k], y, "target")
        expected = {
            "critic": (critic_loss, plain.critic_loss(one, y), plain.critic_adam, agent.critic),
            "actor": (actor_loss, plain.actor_loss(one), plain.actor_adam, agent.actor),
        }
        for name, (ours, theirs, adam, module) in expected.items():
            same_gradient(ours, module, theirs, adam.parameters, k, name)
    assert 0 < saturated < SEEDS * BATCH * ACT, "the clip of actions is not tried"
    assert 0 < (noise["target"].abs() * 0.4 > 0.3).double().mean() < 1


def test_updates():
    """Five updates: the policy and all targets move in the second and the fourth alone."""
    agent = make_td3_bc()
    plain = [PlainTD3BC(agent, k) for k in range(SEEDS)]
    for step in range(5):
        (batch, _), noise = make_batch(30 + step), make_noise(40 + step)
        assert agent.variant(step) == (step in (1, 3),)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), noise["target"][k], step in (1, 3))
            same_metrics(metrics, expected, k)
            check_weights(agent.actor, k, one.policy, "policy")
            check_weights(agent.target_actor, k, one.target_policy, "target policy")
            check_critics(agent, k, one)
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_acts_with_the_policy_itself():
    agent, (batch, _) = make_td3_bc(), make_batch(5)
    check_act(agent, agent.actor, 3 * batch["obs"])


@pytest.mark.parametrize("delay", [1, 3])
def test_the_policy_moves_in_every_nth_update(delay):
    agent = make_agent("td3_bc", "TD3BC", policy_delay=delay)
    assert [agent.variant(step)[0] for step in range(6)] == [
        (step + 1) % delay == 0 for step in range(6)
    ]


def test_without_q_it_is_bc():
    agent, (batch, _) = make_td3_bc(alpha=0.0), make_batch(6)
    loss, bc_loss, _ = agent.actor_loss(batch["obs"], batch["action"])
    bc = make_agent("bc", "BC")
    bc.actor.load_state_dict(agent.actor.state_dict())
    same(loss, bc.actor_loss(batch["obs"], batch["action"]))
    same(bc_loss, loss)


def test_defaults_are_the_papers():
    cfg = load_script("td3_bc").TrainConfig()
    assert (cfg.gamma, cfg.alpha, cfg.tau, cfg.policy_delay) == (0.99, 2.5, 0.005, 2)
    assert (cfg.policy_noise, cfg.noise_clip, cfg.batch_size) == (0.2, 0.5, 256)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.hidden_dim, cfg.hidden_layers) == (3e-4, 3e-4, 256, 2)
    assert cfg.normalize_obs and cfg.num_updates == 1_000_000
