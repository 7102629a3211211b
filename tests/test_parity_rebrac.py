"""ReBRAC: losses, gradients and updates against float64 computations from the paper; its table."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script, toy_episode, toy_episodes, words, write_dataset
from plain import (
    ACT,
    BATCH,
    HIGH,
    LOW,
    OBS,
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
    "hidden_layers": 3,
    "gamma": 0.9,
    "actor_penalty": 0.7,
    "critic_penalty": 0.6,
    "policy_noise": 0.4,
    "noise_clip": 0.3,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
}


def make_rebrac(**settings):
    """ReBRAC whose targets differ from their networks, whose norms are not the identity."""
    agent, g = make_agent("rebrac", "ReBRAC", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for module in (agent.target_critic, agent.target_actor):
            for i, p in enumerate(module.parameters()):
                p.copy_(0.9 * torch.randn(p.shape, generator=g.manual_seed(i)))
        for i, p in enumerate(agent.critic.norms.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=g.manual_seed(100 + i)))
    return agent


def make_inputs(seed: int) -> tuple[dict, dict]:
    g, batch = torch.Generator().manual_seed(seed), make_batch(seed)[0]
    batch["next_action"] = 2 * torch.rand(SEEDS, BATCH, ACT, generator=g) - 1
    return batch, {"target": torch.randn(SEEDS, BATCH, ACT, generator=g)}


class PlainCritic:
    """One critic: linear maps as matrices, and gain and shift of the norm after each ReLU."""

    def __init__(self, mlp, index: int):
        self.layers, self.norms = matrices(mlp, index), []
        for norm in mlp.norms:
            pair = (norm.weight[index, 0], norm.bias[index, 0])
            self.norms.append(tuple(x.detach().clone().requires_grad_() for x in pair))

    def parameters(self) -> list[torch.Tensor]:
        return flat(self.layers) + flat(self.norms)

    def __call__(self, obs, action):
        """Ba et al. (arXiv 1607.06450): minus the mean, over the deviation of the units."""
        x = torch.cat([obs, action], -1)
        for (weight, bias), (gain, shift) in zip(self.layers[:-1], self.norms, strict=True):
            x = (x @ weight + bias).clip(min=0)
            mean = x.sum(-1, keepdim=True) / x.shape[-1]
            variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
            x = gain * (x - mean) / (variance + 1e-5) ** 0.5 + shift
        weight, bias = self.layers[-1]
        return (x @ weight + bias)[..., 0]


class PlainReBRAC:
    """One member: the policy, two critics and their targets."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.policy, self.target_policy = matrices(agent.actor, k), matrices(agent.target_actor, k)
        self.critics = [PlainCritic(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [PlainCritic(agent.target_critic, 2 * k + i) for i in range(2)]
        self.actor_adam = PlainAdam(flat(self.policy), self.c.actor_lr)
        both = self.critics[0].parameters() + self.critics[1].parameters()
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.weigh()

    def weigh(self):
        """The weights of both penalties in the update to come."""
        self.actor_penalty, self.critic_penalty = self.c.actor_penalty, self.c.critic_penalty
        online = self.critic_adam.t - self.c.num_updates  # updates made online
        if online >= 0 and self.c.online_steps:
            left = 1 - online / (self.c.online_steps * self.c.updates_per_step)
            self.actor_penalty *= max(left, self.c.online_actor_share)
            self.critic_penalty *= self.c.online_critic_share

    def target(self, batch, noise):
        """Equation 4's target, a row at a time; also the mean penalty of what bootstraps."""
        y, penalties, self.clipped, self.first = [], [], 0, 0
        for row in range(BATCH):
            y.append(batch["reward"][row])
            if batch["terminated"][row]:
                penalties.append(torch.tensor(0.0))
                continue
            s = batch["next_obs"][row]
            epsilon = [min(max(self.c.policy_noise * float(e), -0.3), 0.3) for e in noise[row]]
            a = forward(s, self.target_policy).tanh() + torch.tensor(epsilon)
            self.clipped += int((a.abs() > 1).sum())
            a = torch.clip(a, -1, 1)
            distance = sum((a[j] - batch["next_action"][row, j]) ** 2 for j in range(ACT))
            first, second = (network(s, a) for network in self.targets)
            self.first += int(first < second)
            penalties.append(self.critic_penalty * distance)
            y[-1] = y[-1] + self.c.gamma * (min(first, second) - penalties[-1])
        return torch.stack(y).detach(), torch.stack(penalties).mean().detach()

    def critic_loss(self, batch, y):
        each = [critic(batch["obs"], batch["action"]) for critic in self.critics]
        return sum(((y - q) ** 2).mean() for q in each)

    def actor_loss(self, batch):
        """Equation 3, negated, its Q normalised as in TD3+BC."""
        policy = forward(batch["obs"], self.policy).tanh()
        q = torch.minimum(*(critic(batch["obs"], policy) for critic in self.critics))
        scale = sum(abs(float(x)) for x in q.detach()) / BATCH
        self.bc = sum(((policy[i] - batch["action"][i]) ** 2).sum() for i in range(BATCH)) / BATCH
        self.policy_q = q.mean()
        return self.actor_penalty * self.bc - self.policy_q / scale

    def update(self, batch, noise, move_actor):
        self.weigh()
        y, penalty = self.target(batch, noise)
        q = sum(critic(batch["obs"], batch["action"]).mean() for critic in self.critics) / 2
        loss = self.critic_loss(batch, y)
        metrics = {"q": q.detach(), "critic_loss": loss, "target_penalty": penalty}
        self.critic_adam.step(loss)
        if move_actor:
            metrics["actor_loss"] = self.actor_loss(batch)
            metrics |= {"bc_loss": self.bc, "policy_q": self.policy_q}
            self.actor_adam.step(metrics["actor_loss"])
            pairs = [(flat(self.target_policy), flat(self.policy))]
            for target, critic in zip(self.targets, self.critics, strict=True):
                pairs.append((target.parameters(), critic.parameters()))
            with torch.no_grad():
                for old, new in (pair for both in pairs for pair in zip(*both, strict=True)):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


def check_critic(mlp, index: int, critic: PlainCritic, what: str) -> None:
    check_weights(mlp, index, critic.layers, what)
    for norm, (gain, shift) in zip(mlp.norms, critic.norms, strict=True):
        same(norm.weight[index, 0], gain, what)
        same(norm.bias[index, 0], shift, what)


def test_losses_and_gradients():
    agent, (batch, noise) = make_rebrac(), make_inputs(21)
    target, penalty = agent.target(batch, noise["target"], torch.tensor(agent.cfg.critic_penalty))
    critic_loss, _ = agent.critic_loss(target, batch["obs"], batch["action"])
    actor_loss, bc_loss, policy_q = agent.actor_loss(
        batch["obs"], batch["action"], torch.tensor(agent.cfg.actor_penalty)
    )
    clipped, first = 0, 0
    for k in range(SEEDS):
        plain, one = PlainReBRAC(agent, k), member(batch, k)
        y, mean_penalty = plain.target(one, noise["target"][k])
        clipped, first = clipped + plain.clipped, first + plain.first
        same(target[k], y, "target")
        same(penalty[k], mean_penalty, "penalty")
        expected = {
            "critic": (critic_loss, plain.critic_loss(one, y), plain.critic_adam, agent.critic),
            "actor": (actor_loss, plain.actor_loss(one), plain.actor_adam, agent.actor),
        }
        same(bc_loss[k], plain.bc, "bc_loss")
        same(policy_q[k], plain.policy_q, "policy_q")
        for name, (ours, theirs, adam, module) in expected.items():
            same_gradient(ours, module, theirs, adam.parameters, k, name)
    rows = int((1 - batch["terminated"]).sum())
    assert 0 < clipped < rows * ACT, "the clip of actions is not tried"
    assert 0 < first < rows, "the smaller target is always the same critic"
    assert 0 < (noise["target"].abs() * 0.4 > 0.3).double().mean() < 1


ONLINE = {"num_updates": 2, "online_steps": 2, "updates_per_step": 2}
ONLINE |= {"online_actor_share": 0.3, "online_critic_share": 0.6}


@pytest.mark.parametrize("settings", [{}, {"critic_penalty": 0.0}, {"actor_penalty": 0.0}, ONLINE])
def test_updates(settings):
    """Five updates: the policy and all targets move in the second and the fourth alone."""
    agent = make_rebrac(**settings)
    plain = [PlainReBRAC(agent, k) for k in range(SEEDS)]
    for step in range(5):
        batch, noise = make_inputs(30 + step)
        assert agent.variant(step)[0] == (step in (1, 3))
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), noise["target"][k], step in (1, 3))
            same_metrics(metrics, expected, k)
            check_weights(agent.actor, k, one.policy, "policy")
            check_weights(agent.target_actor, k, one.target_policy, "target policy")
            check_critics(agent, k, one, check_critic)
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_the_next_action_of_a_terminal_step_does_not_matter():
    agent, (batch, noise) = make_rebrac(), make_inputs(23)
    target, penalty = agent.target(batch, noise["target"], torch.tensor(agent.cfg.critic_penalty))
    ends = batch["terminated"] == 1
    batch["next_action"][ends] = 5.0
    batch["next_obs"][ends] = -7.0
    for ours, again in zip(
        agent.target(batch, noise["target"], torch.tensor(agent.cfg.critic_penalty)),
        (target, penalty),
        strict=True,
    ):
        assert torch.equal(ours, again)
    same(target[ends], batch["reward"][ends])


def test_acts_with_the_policy_itself():
    agent, (batch, _) = make_rebrac(), make_inputs(5)
    check_act(agent, agent.actor, 3 * batch["obs"])


@pytest.mark.parametrize("delay", [1, 3])
def test_the_policy_moves_in_every_nth_update(delay):
    agent = make_agent("rebrac", "ReBRAC", policy_delay=delay)
    assert [agent.variant(step)[0] for step in range(6)] == [
        (step + 1) % delay == 0 for step in range(6)
    ]


def test_only_the_critics_are_normalised():
    agent = make_rebrac()
    assert len(agent.critic.norms) == len(agent.target_critic.norms) == 3
    assert not agent.actor.norms and not agent.target_actor.norms
    assert len(agent.actor.layers) == len(agent.critic.layers) == 4


def test_defaults_are_the_papers():
    """Tables 10 and 11; TD3's noise and delay."""
    cfg = load_script("rebrac").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.policy_delay, cfg.batch_size) == (0.99, 0.005, 2, 1024)
    assert (cfg.actor_penalty, cfg.critic_penalty) == (0.01, 0.01)
    assert (cfg.policy_noise, cfg.noise_clip) == (0.2, 0.5)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.hidden_dim, cfg.hidden_layers) == (1e-3, 1e-3, 256, 3)
    assert not cfg.normalize_obs and cfg.num_updates == 1_000_000


# ---- what batches are drawn from


def test_next_actions_stay_within_their_episode(monkeypatch):
    """The toy data's episodes: 30 steps and terminated, 40 and truncated, 1 and terminated."""
    torch.set_default_dtype(torch.float32)
    script, tables = load_script("rebrac"), []
    batches = script.batches
    monkeypatch.setattr(script, "batches", lambda *args: tables.append(args[1]) or batches(*args))
    assert script.main(words(num_updates=1, env_id="none")) == 0
    names = ("obs", "action", "reward", "next_obs", "next_action", "terminated")
    rows = {name: [] for name in names}
    for episode in toy_episodes():
        steps = len(episode.rewards)
        for t in range(steps):
            terminated = bool(episode.terminations[t])
            if t == steps - 1 and not terminated:
                continue
            rows["obs"].append(episode.observations[t])
            rows["next_obs"].append(episode.observations[t + 1])
            rows["action"].append(episode.actions[t] / 2)  # Pendulum's actions end at 2
            rows["next_action"].append([0.0] if terminated else episode.actions[t + 1] / 2)
            rows["reward"].append(episode.rewards[t])
            rows["terminated"].append(float(terminated))
    assert len(rows["obs"]) == 30 + 39 + 1 and tables[0].keys() == rows.keys()
    for name, expected in rows.items():
        torch.testing.assert_close(tables[0][name], torch.tensor(np.array(expected, np.float32)))


@pytest.mark.parametrize(("steps", "terminated"), [(1, False), (1, True), (2, True), (3, False)])
def test_rows_of_one_two_and_three_steps(steps, terminated):
    agent = make_rebrac()
    episode = {name: np.arange(1.0, steps + 1) for name in ("reward", "truncated")}
    episode["obs"] = np.arange((steps + 1.0) * OBS).reshape(-1, OBS)
    episode["action"] = np.arange(1.0, steps + 1).repeat(ACT).reshape(-1, ACT) / 10
    episode["terminated"] = np.arange(steps) == steps - 1 if terminated else np.zeros(steps)
    before = copy.deepcopy(episode)
    rows, known = agent.rows(episode), steps if terminated else steps - 1
    assert {len(values) for values in rows.values()} == {known}
    assert rows["reward"].tolist() == [*range(1, known + 1)]
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    action = 2 * (torch.as_tensor(episode["action"]) - low) / (high - low) - 1
    same(rows["next_action"], torch.cat([action[1:], torch.zeros(1, ACT)])[:known], "next_action")
    assert all((episode[name] == before[name]).all() for name in before), "it changed its input"


def test_penalties_fall_online_only():
    """Constant offline; then beta_1 falls on a line to its share, beta_2 is its share at once."""
    settings = {"actor_penalty": 0.4, "critic_penalty": 0.8, "online_actor_share": 0.25}
    settings |= {"online_critic_share": 0.5, "num_updates": 10}
    agent = make_agent("rebrac", "ReBRAC", online_steps=4, updates_per_step=2, **settings)
    offline = make_agent("rebrac", "ReBRAC", **settings)
    expected = {
        0: (1, 1),
        9: (1, 1),
        10: (1, 0.5),
        12: (0.75, 0.5),
        16: (0.25, 0.5),
        17: (0.25, 0.5),
    }
    for step, (actor_share, critic_share) in expected.items():
        agent.critic_adam.steps.fill_(step)
        found = [float(x) for x in agent.penalties()]
        assert found == pytest.approx([0.4 * actor_share, 0.8 * critic_share])
        offline.critic_adam.steps.fill_(step)
        assert [float(x) for x in offline.penalties()] == pytest.approx([0.4, 0.8])


def test_data_without_any_next_action_is_refused(refused, tmp_path):
    rng = np.random.default_rng(3)
    write_dataset(tmp_path, "toy/cut-v0", [toy_episode(rng, 1, False) for _ in range(3)])
    torch.set_default_dtype(torch.float32)
    argv = words(dataset_id="toy/cut-v0", env_id="none")
    refused(load_script("rebrac"), argv, "no step")
