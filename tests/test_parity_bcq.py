"""BCQ: losses, gradients and whole updates against float64 computations from the paper."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    OBS,
    SEEDS,
    PlainAdam,
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
LATENT, CANDIDATES, EVALUATED = 2 * ACT, 4, 9
# Rates of their own, a tau that shows, widths that differ, a perturbation that leaves [-1, 1].
LOUD = {
    "gamma": 0.9,
    "min_weight": 0.7,
    "max_perturbation": 0.3,
    "target_candidates": CANDIDATES,
    "eval_candidates": EVALUATED,
    "latent_clip": 0.6,
    "kl_weight": 0.4,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "vae_lr": 0.03,
    "last_hidden_dim": 6,
    "vae_hidden_dim": 8,
}


def make_bcq(top: float = 1.5, **settings):
    """BCQ with loud weights: log_std beyond its bounds, actions near the edge, other targets."""
    agent, g = make_agent("bcq", "BCQ", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, p in enumerate(agent.parameters()):
            p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(i)))
        spread = torch.tensor([-9.0, -3.0, -1.0, 0.0, 1.0, top])
        agent.vae.encoder.layers[-1].bias[:, 0, LATENT:] += spread
    return agent


def make_noise(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (BATCH,), "target": (CANDIDATES, BATCH), "actor": (BATCH,)}
    return {k: torch.randn(SEEDS, *v, LATENT, generator=g) for k, v in shapes.items()}


class PlainBCQ:
    """One member: VAE, perturbation model, two critics and targets as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.encoder = matrices(agent.vae.encoder, k)
        self.decoder = matrices(agent.vae.decoder, k)
        self.xi, self.target_xi = matrices(agent.actor, k), matrices(agent.target_actor, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.vae_adam = PlainAdam(flat(self.encoder) + flat(self.decoder), self.c.vae_lr)
        self.actor_adam = PlainAdam(flat(self.xi), self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.bounds = {"low": 0, "high": 0, "inside": 0, "actions": 0}

    def vae_loss(self, batch, noise):
        """Sums of algorithm 1 for each row, with deviation D1: means and a weight."""
        error, divergence = 0, 0
        for s, a, e in zip(batch["obs"], batch["action"], noise, strict=True):
            out = forward(torch.cat([s, a]), self.encoder)
            self.bounds["low"] += int((out[LATENT:] < -4).sum())
            self.bounds["high"] += int((out[LATENT:] > 15).sum())
            std = torch.exp(torch.clip(out[LATENT:], -4, 15))
            q = torch.distributions.Normal(out[:LATENT], std)
            unit = torch.distributions.Normal(torch.zeros(LATENT), torch.ones(LATENT))
            divergence += torch.distributions.kl_divergence(q, unit).sum() / LATENT
            rebuilt = forward(torch.cat([s, q.mean + std * e]), self.decoder).tanh()
            error += ((rebuilt - a) ** 2).sum() / ACT
        self.reconstruction, self.kl = error / BATCH, divergence / BATCH
        return self.reconstruction + self.c.kl_weight * self.kl

    def generate(self, s, e):
        """b ~ G(s) from one latent."""
        z = torch.tensor([min(max(float(x), -self.c.latent_clip), self.c.latent_clip) for x in e])
        return forward(torch.cat([s, z]), self.decoder).tanh().detach()

    def perturbed(self, xi, s, b):
        a = b + self.c.max_perturbation * forward(torch.cat([s, b]), xi).tanh()
        self.bounds["actions"] += int((a.abs() > 1).sum())
        self.bounds["inside"] += int((a.abs() < 1).sum())
        return torch.clip(a, -1, 1)

    def target(self, batch, noise):
        """y of algorithm 1, a row and a candidate at a time."""
        y = []
        for row, s in enumerate(batch["next_obs"]):
            values = []
            for j in range(CANDIDATES):
                a = self.perturbed(self.target_xi, s, self.generate(s, noise[j, row]))
                q = [float(forward(torch.cat([s, a]), one).detach()) for one in self.targets]
                values.append(self.c.min_weight * min(q) + (1 - self.c.min_weight) * max(q))
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.c.gamma * alive * max(values))
        return torch.stack(y)

    def critic_loss(self, batch, y):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        q = [forward(pair, network)[:, 0] for network in self.critics]
        self.mean_q = (q[0].mean() + q[1].mean()) / 2
        return sum(((y - one) ** 2).mean() for one in q)

    def actor_loss(self, batch, noise):
        q, moved = 0, 0
        for s, e in zip(batch["obs"], noise, strict=True):
            b = self.generate(s, e)
            a = self.perturbed(self.xi, s, b)
            q += forward(torch.cat([s, a]), self.critics[0])[0] / BATCH
            moved += (a - b).abs().sum() / (BATCH * ACT)
        self.perturbation = moved
        return -q

    def update(self, batch, noise):
        metrics = {"vae_loss": self.vae_loss(batch, noise["encoder"])}
        metrics |= {"reconstruction": self.reconstruction, "kl": self.kl}
        self.vae_adam.step(metrics["vae_loss"])
        y = self.target(batch, noise["target"])
        metrics |= {"critic_loss": self.critic_loss(batch, y), "q": self.mean_q}
        self.critic_adam.step(metrics["critic_loss"])
        metrics["actor_loss"] = self.actor_loss(batch, noise["actor"])
        metrics["perturbation"] = self.perturbation
        self.actor_adam.step(metrics["actor_loss"])
        pairs = [(self.target_xi, self.xi), *zip(self.targets, self.critics, strict=True)]
        with torch.no_grad():
            for target, online in pairs:
                for old, new in zip(flat(target), flat(online), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


def test_losses_and_gradients():
    agent, (batch, _), noise = make_bcq(top=20.0), make_batch(21), make_noise(22)
    obs, action = batch["obs"], batch["action"]
    target = agent.target(batch, noise["target"])
    vae_loss = agent.vae_loss(obs, action, noise["encoder"])[0]
    critic_loss, _ = agent.critic_loss(target.detach(), obs, action)
    actor_loss, _ = agent.actor_loss(obs, noise["actor"])
    bounds = {}
    for k in range(SEEDS):
        plain, one = PlainBCQ(agent, k), member(batch, k)
        draws = member(noise, k)
        y = plain.target(one, draws["target"])
        same(target[k], y, "target")
        theirs = {
            "vae": (vae_loss, plain.vae_loss(one, draws["encoder"]), plain.vae_adam, agent.vae),
            "critic": (critic_loss, plain.critic_loss(one, y), plain.critic_adam, agent.critic),
            "actor": (
                actor_loss,
                plain.actor_loss(one, draws["actor"]),
                plain.actor_adam,
                agent.actor,
            ),
        }
        for name, (loss, expected, adam, module) in theirs.items():
            same_gradient(loss, module, expected, adam.parameters, k, name)
        bounds = {n: bounds.get(n, 0) + count for n, count in plain.bounds.items()}
    assert all(count > 0 for count in bounds.values()), f"not tried: {bounds}"
    assert bounds["low"] + bounds["high"] < SEEDS * BATCH * LATENT
    assert 0 < (noise["target"].abs() > 0.6).double().mean() < 1
    inside = list(agent.vae.parameters())
    fixed = torch.autograd.grad(actor_loss.sum(), inside, allow_unused=True)
    assert all(g is None for g in fixed), "the VAE learns from Q"


def test_updates():
    """Three updates: VAE, critics with the new VAE, perturbation, all targets."""
    agent = make_bcq()
    plain = [PlainBCQ(agent, k) for k in range(SEEDS)]
    for step in range(3):
        (batch, _), noise = make_batch(30 + step), make_noise(40 + step)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k))
            same_metrics(metrics, expected, k)
            check_weights(agent.vae.encoder, k, one.encoder, "encoder")
            check_weights(agent.vae.decoder, k, one.decoder, "decoder")
            check_weights(agent.actor, k, one.xi, "xi")
            check_weights(agent.target_actor, k, one.target_xi, "target xi")
            check_critics(agent, k, one)
    check_moments(agent.vae_adam, [one.vae_adam for one in plain])
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_acts_with_the_best_candidate():
    """For each state the candidate of the largest Q_1; not always the same one."""
    agent, obs = make_bcq(), 2 * make_batch(5)[0]["obs"]
    low, high = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 0.5])
    action, chosen = agent.act(obs), set()
    for k in range(SEEDS):
        plain = PlainBCQ(agent, k)
        for row in range(BATCH):
            s = (obs[k, row] - agent.obs_mean) / agent.obs_std
            values = []
            for latent in agent.eval_latents[k]:
                a = plain.perturbed(plain.xi, s, plain.generate(s, latent)).detach()
                values.append((float(forward(torch.cat([s, a]), plain.critics[0]).detach()), a))
            best = max(range(EVALUATED), key=lambda i: values[i][0])
            chosen.add(best)
            same(action[k, row], low + (high - low) * (values[best][1] + 1) / 2, "action")
    assert len(chosen) > 2


def test_latents_of_evaluation_are_the_seeds_own():
    agent = make_agent("bcq", "BCQ", seed=3)
    assert agent.eval_latents.shape == (SEEDS, 100, LATENT)
    assert abs(agent.eval_latents.std() - 1) < 0.1
    alone = make_agent("bcq", "BCQ", seed=4, num_seeds=1)
    assert torch.equal(alone.eval_latents[0], agent.eval_latents[1])
    assert not torch.equal(agent.eval_latents[0], agent.eval_latents[1])


def test_widths_are_the_settings():
    agent = make_agent("bcq", "BCQ", hidden_layers=3, **{k: LOUD[k] for k in list(LOUD)[-2:]})
    shapes = {
        agent.actor: [OBS + ACT, 7, 7, 6, ACT],
        agent.critic: [OBS + ACT, 7, 7, 6, 1],
        agent.vae.encoder: [OBS + ACT, 8, 8, 8, 2 * LATENT],
        agent.vae.decoder: [OBS + LATENT, 8, 8, 8, ACT],
    }
    for mlp, widths in shapes.items():
        found = [mlp.layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in mlp.layers)]
        assert found == widths


def test_defaults_are_the_authors():
    cfg = load_script("bcq").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size, cfg.num_updates) == (0.99, 0.005, 100, 1_000_000)
    assert (cfg.min_weight, cfg.max_perturbation, cfg.target_candidates) == (0.75, 0.05, 10)
    assert (cfg.eval_candidates, cfg.latent_clip, cfg.kl_weight) == (100, 0.5, 0.5)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.vae_lr) == (1e-3, 1e-3, 1e-3)
    assert (cfg.hidden_dim, cfg.last_hidden_dim, cfg.vae_hidden_dim) == (400, 300, 750)
    assert cfg.hidden_layers == 2 and not cfg.normalize_obs
