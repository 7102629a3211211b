"""X-QL: losses, gradients, whole updates against float64 computations from the paper."""

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

CASES = {
    "rescaled": {},
    "gumbel": {"value_loss": "gumbel"},
    "log": {"value_loss": "log"},
    "low z": {"gumbel_temperature": 0.3, "low_q": 40.0},  # where m ends at -1
    "noisy actions": {"action_noise": 0.6},
    "random actions": {"random_actions": 2},
    "noisy and random actions": {"action_noise": 0.6, "random_actions": 1},
    "steps of V": {"value_updates": 3, "action_noise": 0.6},
    "dropout, constant rate": {"actor_dropout": 0.4, "cosine_actor_lr": False},
}
# A learning rate of its own for each network, one that falls fast, a tau that shows, z and weights
# on both sides of their bounds.
LOUD = {
    "gumbel_temperature": 0.7,
    "max_clip": 1.5,
    "inverse_temperature": 30.0,
    "gamma": 0.9,
    "tau": 0.1,
    "value_lr": 0.03,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "num_updates": 6,
}


def make_xql(low_q: float = 0.0, **settings):
    """Targets that differ from the critics, norms that do something, log_std beyond its bounds."""
    agent, g = make_agent("xql", "XQL", **{**LOUD, **settings}), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in agent.target_critic.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g))
        agent.target_critic.layers[-1].bias.sub_(low_q)
        for p in agent.value.norms.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        log_std = torch.tensor([[-5.5, 0.3, -1.0], [2.5, -0.5, 1.0], [0.0, 1.9, -2.0]])
        agent.log_std.copy_(log_std.unsqueeze(1))
    return agent


def make_inputs(seed: int, cfg):
    """A batch with some rewards that are far off, and the noise of an update."""
    batch, noise = make_batch(seed, dropout=cfg.actor_dropout)
    batch["reward"][:, ::4] *= 40
    g = torch.Generator().manual_seed(seed + 100)
    if cfg.action_noise:
        noise["action"] = torch.randn(SEEDS, BATCH, ACT, generator=g)
    if cfg.random_actions:
        noise["random"] = torch.rand(SEEDS, cfg.random_actions * BATCH, ACT, generator=g)
    return batch, noise


class PlainXQL:
    """One member: V, two critics, their targets and the policy as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.value, norms = matrices(agent.value, k), agent.value.norms
        copied = [(norm.weight[k, 0], norm.bias[k, 0]) for norm in norms]
        self.norms = [tuple(x.detach().clone().requires_grad_() for x in pair) for pair in copied]
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.policy = matrices(agent.actor, k)
        self.log_std = agent.log_std[k, 0].detach().clone().requires_grad_()
        self.value_adam = PlainAdam(flat(self.value) + flat(self.norms), self.c.value_lr)
        self.critic_adam = PlainAdam(
            flat(self.critics[0]) + flat(self.critics[1]), self.c.critic_lr
        )
        self.actor_adam = PlainAdam([self.log_std, *flat(self.policy)], self.c.actor_lr)

    def v(self, obs):
        """A linear map, layer normalisation (biased variance), a ReLU; the last map is linear."""
        for (weight, bias), (scale, shift) in zip(self.value[:-1], self.norms, strict=True):
            x = obs @ weight + bias
            x = x - x.mean(1, keepdim=True)
            x = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-5)
            obs = torch.clip(x * scale + shift, 0, None)
        return (obs @ self.value[-1][0] + self.value[-1][1])[:, 0]

    def each_q(self, networks, obs, action):
        pair = torch.cat([obs, action], 1)
        return [forward(pair, network)[:, 0] for network in networks]

    def q_bar(self, obs, action):
        return torch.minimum(*self.each_q(self.targets, obs, action)).detach()

    def samples(self, batch, noise):
        """What V is fitted to: (s, a), one of the batch after the other, then random actions."""
        states, actions = list(batch["obs"]), list(batch["action"])
        if self.c.action_noise:
            error = torch.clip(self.c.action_noise * noise["action"], -0.5, 0.5)
            actions = [torch.clip(a + e, -1, 1) for a, e in zip(actions, error, strict=True)]
        for i in range(self.c.random_actions * BATCH):
            states.append(batch["obs"][i % BATCH])
            actions.append(-1 + 2 * noise["random"][i])
        return torch.stack(states), torch.stack(actions)

    def z(self, batch, noise):
        obs, action = self.samples(batch, noise)
        free = (self.q_bar(obs, action) - self.v(obs)) / self.c.gumbel_temperature
        return torch.minimum(free, torch.tensor(self.c.max_clip))

    def value_loss(self, batch, noise):
        """Equation 11, or as the authors' offline code has it, z by z."""
        z = self.z(batch, noise)
        if self.c.value_loss == "gumbel":
            return sum(math.e**x - x - 1 for x in z) / len(z)
        if self.c.value_loss == "log":
            return torch.log(sum(math.e**x - x for x in z) / len(z))
        m = max(-1.0, max(z.tolist()))
        scale = math.exp(-m)
        return sum(torch.exp(x - m) - x * scale - scale for x in z) / len(z)

    def advantage(self, batch):
        return self.q_bar(batch["obs"], batch["action"]) - self.v(batch["obs"]).detach()

    def weights(self, batch):
        weights = torch.exp(self.c.inverse_temperature * self.advantage(batch))
        return torch.minimum(weights, torch.tensor(100.0))

    def actor_loss(self, batch, masks):
        """Equation 12, negated: a mean of weight times log-likelihood."""
        mean, total = forward(batch["obs"], self.policy, masks).tanh(), 0.0
        sigma = torch.exp(torch.clip(self.log_std, -5, 2))
        for row, weight in enumerate(self.weights(batch)):
            density = torch.distributions.Normal(mean[row], sigma)
            total = total + weight * density.log_prob(batch["action"][row]).sum()
        return -total / BATCH

    def critic_loss(self, batch):
        """Equation 14 with Huber's loss, summed over the critics."""
        loss, next_v = 0.0, self.v(batch["next_obs"]).detach()
        for row in range(BATCH):
            target = batch["reward"][row]
            if not batch["terminated"][row]:
                target = target + self.c.gamma * next_v[row]
            for q in self.each_q(self.critics, batch["obs"], batch["action"]):
                error = abs(target - q[row])
                loss = loss + (error**2 / 2 if error <= 20 else 20 * error - 200) / BATCH
        return loss

    def update(self, batch, noise, masks):
        """V, policy with the new V, critics with the new V, targets with the new critics."""
        for _ in range(self.c.value_updates):
            clipped = (self.z(batch, noise) == self.c.max_clip).double().mean()
            metrics = {"value_loss": self.value_loss(batch, noise), "clipped_z": clipped}
            self.value_adam.step(metrics["value_loss"])
        metrics["v"] = self.v(batch["obs"]).detach().mean()
        metrics["advantage"] = self.advantage(batch).mean()
        metrics["clipped_weights"] = (self.weights(batch) == 100).double().mean()
        metrics["actor_loss"] = self.actor_loss(batch, masks)
        if self.c.cosine_actor_lr:
            share = self.actor_adam.t / self.c.num_updates  # before this step
            self.actor_adam.lr = self.c.actor_lr * (1 + math.cos(math.pi * share)) / 2
        self.actor_adam.step(metrics["actor_loss"])
        metrics["q"] = sum(self.each_q(self.critics, batch["obs"], batch["action"])).mean() / 2
        metrics["critic_loss"] = self.critic_loss(batch)
        self.critic_adam.step(metrics["critic_loss"])
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(flat(target), flat(critic), strict=True):
                    old.copy_((1 - self.c.tau) * old + self.c.tau * new)
        return metrics


def plain_masks(noise: dict, k: int, p: float):
    """A hidden unit is dropped with probability p, and scaled by 1 / (1 - p) otherwise."""
    return torch.where(noise["kept"][k], 1 / (1 - p), 0.0) if p else None


def of(noise: dict, k: int) -> dict:
    return {name: values[k] for name, values in noise.items()}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case):
    agent = make_xql(**CASES[case])
    cfg, plain = agent.cfg, [PlainXQL(agent, k) for k in range(SEEDS)]
    batch, noise = make_inputs(8, cfg)
    ones = [(one, member(batch, k), of(noise, k)) for k, one in enumerate(plain)]
    samples = [one.samples(own, random) for one, own, random in ones]
    value_obs, value_action = (torch.stack(each) for each in zip(*samples, strict=True))
    value_q = torch.stack([one.q_bar(*pair) for one, pair in zip(plain, samples, strict=True)])
    next_v = torch.stack([one.v(own["next_obs"]) for one, own, _ in ones]).detach()
    advantage = torch.stack([one.advantage(own) for one, own, _ in ones])
    masks = noise["kept"] / (1 - cfg.actor_dropout) if cfg.actor_dropout else None
    actor_loss, clipped = agent.actor_loss(advantage, batch["obs"], batch["action"], masks)
    critic_loss, q = agent.critic_loss(batch, next_v)
    value_loss, z = agent.value_loss(value_q, value_obs)
    # Tame numbers would leave branches untested.
    if case == "low z":
        assert z.max() < -1
    else:
        assert 0 < (z == cfg.max_clip).double().mean() < 1 and 0 < clipped.mean() < 1
    if cfg.action_noise or cfg.random_actions:
        found = agent.smoothed(batch["obs"], batch["action"], noise)
        same(found[0], value_obs, "states of V")
        same(found[1], value_action, "actions of V")
    for k, (one, own, random) in enumerate(ones):
        each = one.each_q(one.critics, own["obs"], own["action"])
        same(q[k], sum(each).mean() / 2, "q")
        kept, parts = plain_masks(noise, k, cfg.actor_dropout), one.actor_adam.parameters
        value, theirs = one.value_loss(own, random), one.value_adam.parameters
        same_gradient(value_loss, agent.value, value, theirs, k, "V")
        critic, theirs = one.critic_loss(own), one.critic_adam.parameters
        same_gradient(critic_loss, agent.critic, critic, theirs, k, "critics")
        module = torch.nn.ParameterList(agent.actor_adam.params)
        same_gradient(actor_loss, module, one.actor_loss(own, kept), parts, k, "policy")


@pytest.mark.parametrize("case", CASES)
def test_updates(case):
    """Two updates in a row: the second one sees any order that is not the authors'."""
    agent = make_xql(**CASES[case])
    plain, clipped = [PlainXQL(agent, k) for k in range(SEEDS)], []
    for seed in (9, 10):
        batch, noise = make_inputs(seed, agent.cfg)
        assert noise.keys() == agent.noise_shapes.keys()
        metrics = updated(agent, batch, noise)
        clipped.append(metrics["clipped_weights"])
        for k, one in enumerate(plain):
            masks = plain_masks(noise, k, agent.cfg.actor_dropout)
            expected = one.update(member(batch, k), of(noise, k), masks)
            same_metrics(metrics, expected, k)
            check_weights(agent.value, k, one.value, "V")
            check_weights(agent.actor, k, one.policy, "policy")
            check_critics(agent, k, one)
            same(agent.log_std[k, 0], one.log_std, "log_std")
            for norm, (weight, bias) in zip(agent.value.norms, one.norms, strict=True):
                same(norm.weight[k, 0], weight, "weight of a norm")
                same(norm.bias[k, 0], bias, "bias of a norm")
    if case != "low z":
        assert 0 < torch.stack(clipped).mean() < 1
    for name in ("value", "actor", "critic"):
        adams = [getattr(one, f"{name}_adam") for one in plain]
        check_moments(getattr(agent, f"{name}_adam"), adams)
    assert all(p.grad is None for p in agent.target_critic.parameters())


def test_the_minimum_of_every_value_loss_is_the_soft_maximum():
    """Lemma 3.2: h = beta log E[exp(x / beta)], here of ten values of one state, not clipped."""
    q = torch.linspace(-1, 2, 10).expand(SEEDS, -1)
    for beta in (0.3, 1.0, 5.0):
        expected = beta * torch.log(torch.exp(q[0] / beta).mean())
        for form in ("rescaled", "gumbel", "log"):
            agent = make_xql(gumbel_temperature=beta, value_loss=form, max_clip=80.0)
            with torch.no_grad():
                agent.value.layers[-1].weight.zero_()
                agent.value.layers[-1].bias.fill_(expected)
            loss, _ = agent.value_loss(q, torch.zeros(SEEDS, 10, 5))
            (gradient,) = torch.autograd.grad(loss.sum(), agent.value.layers[-1].bias)
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["rescaled", "gumbel", "log"])
def test_the_largest_bound_of_z_is_finite_in_float32(form):
    torch.set_default_dtype(torch.float32)
    agent = make_xql(gumbel_temperature=1e-6, value_loss=form, max_clip=80.0).float()
    q = torch.tensor([[-1e3, 0.0, 1e3]]).expand(SEEDS, -1)
    loss, z = agent.value_loss(q, torch.randn(SEEDS, 3, 5))
    gradients = torch.autograd.grad(loss.sum(), list(agent.value.parameters()))
    assert z.max() == 80 and all(x.isfinite().all() for x in (loss, *gradients))


def test_acts_with_the_mean_and_without_dropout():
    agent = make_xql(actor_dropout=0.4)
    check_act(agent, agent.actor, 3 * make_batch(11)[0]["obs"])


def test_defaults_are_the_consistent_ones_of_locomotion():
    cfg = load_script("xql").TrainConfig()
    assert (cfg.gamma, cfg.gumbel_temperature, cfg.max_clip, cfg.tau) == (0.99, 2.0, 7.0, 0.005)
    assert (cfg.value_loss, cfg.value_updates, cfg.inverse_temperature) == ("rescaled", 1, 3.0)
    assert (cfg.action_noise, cfg.random_actions, cfg.actor_dropout) == (0.0, 0, 0.0)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.value_lr) == (3e-4, 3e-4, 3e-4)
    assert (cfg.batch_size, cfg.hidden_dim, cfg.hidden_layers) == (256, 256, 2)
    assert cfg.num_updates == 1_000_000 and cfg.cosine_actor_lr and not cfg.normalize_obs
