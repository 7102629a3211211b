"""SPOT: losses, gradients and whole updates against float64 computations from the paper."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_script, words
from plain import (
    ACT,
    BATCH,
    HIDDEN,
    LAYERS,
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
from test_compiled import graphs, traced  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")
LATENT, DRAWS = 2 * ACT, 3
# Rates of their own, a tau that shows, noise on both sides of its clip, actions on both of theirs.
LOUD = {
    "gamma": 0.9,
    "penalty": 0.7,
    "density_samples": DRAWS,
    "kl_weight": 0.4,
    "vae_updates": 2,
    "policy_noise": 0.4,
    "noise_clip": 0.3,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "vae_lr": 0.03,
    "actor_dropout": 0.3,
    "vae_hidden_dim": 8,
}
IWAE = {"density": "iwae"}


def make_spot(top: float = 1.5, **settings):
    """SPOT with loud weights: log_std beyond its bounds, actions near the edge, other targets."""
    agent, g = make_agent("spot", "SPOT", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, p in enumerate(agent.parameters()):
            p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(i)))
        spread = torch.tensor([-9.0, -3.0, -1.0, 0.0, 1.0, top])
        agent.encoder.layers[-1].bias[:, 0, LATENT:] += spread
    return agent


def make_noise(agent, seed: int) -> dict:
    """What the agent asks for, drawn here."""
    g, noise = torch.Generator().manual_seed(seed), {}
    for name, (kind, shape) in agent.noise_shapes.items():
        draw = torch.randn if kind == "normal" else torch.rand
        values = draw(SEEDS, *shape, generator=g)
        noise[name] = values if kind == "normal" else values < kind
    return noise


def log_normal(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).sum()


class PlainSPOT:
    """One member: VAE, policy, two critics and targets as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.encoder, self.decoder = matrices(agent.encoder, k), matrices(agent.decoder, k)
        self.pi, self.target_pi = matrices(agent.actor, k), matrices(agent.target_actor, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.vae_adam = PlainAdam(flat(self.encoder) + flat(self.decoder), self.c.vae_lr)
        self.actor_adam = PlainAdam(flat(self.pi), self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.bounds = {"low": 0, "high": 0, "inside": 0, "clipped": 0}
        self.schedule(0)

    def schedule(self, step):
        """lambda and the discount of update number `step`."""
        self.penalty, self.gamma = self.c.penalty, self.c.gamma
        if self.c.online_steps and step >= self.c.num_updates:
            total = self.c.online_steps * self.c.updates_per_step
            share = 1 - (step - self.c.num_updates) / total
            self.penalty *= max(share, self.c.online_penalty_share)
            self.gamma = self.c.gamma if self.c.online_gamma is None else self.c.online_gamma

    def posterior(self, s, a):
        out = forward(torch.cat([s, a]), self.encoder)
        self.bounds["low"] += int((out[LATENT:] < -4).sum())
        self.bounds["high"] += int((out[LATENT:] > 15).sum())
        return out[:LATENT], torch.exp(torch.clip(out[LATENT:], -4, 15))

    def elbo(self, obs, action, noise):
        """Squared error and KL divergence, a row and a latent at a time; D2: means."""
        error, divergence, draws = 0, 0, len(noise)
        for row, (s, a) in enumerate(zip(obs, action, strict=True)):
            mean, std = self.posterior(s, a)
            q = torch.distributions.Normal(mean, std)
            unit = torch.distributions.Normal(torch.zeros(LATENT), torch.ones(LATENT))
            divergence += torch.distributions.kl_divergence(q, unit).sum() / (BATCH * LATENT)
            for e in noise[:, row]:
                rebuilt = forward(torch.cat([s, mean + std * e]), self.decoder).tanh()
                error += ((rebuilt - a) ** 2).sum() / (BATCH * ACT * draws)
        return error + self.c.kl_weight * divergence, error, divergence

    def iwae(self, obs, action, noise):
        """Minus the log of the mean importance weight, by torch's own densities."""
        total = 0
        for row, (s, a) in enumerate(zip(obs, action, strict=True)):
            (mean, std), weights = self.posterior(s, a), []
            for e in noise[:, row]:
                z = mean + std * e
                decoded = forward(torch.cat([s, z]), self.decoder).tanh()
                log_w = log_normal(a, decoded, (self.c.kl_weight / 4) ** 0.5)
                log_w = log_w + log_normal(z, torch.zeros(LATENT), torch.ones(LATENT))
                weights.append(log_w - log_normal(z, mean, std))
            top = max(float(w.detach()) for w in weights)  # so that the largest weight is 1
            mean_weight = sum(torch.exp(w - top) for w in weights) / len(weights)
            total -= (top + torch.log(mean_weight)) / BATCH
        return total

    def policy(self, network, s, kept):
        masks = None if kept is None else kept / (1 - self.c.actor_dropout)
        return forward(s, network, masks).tanh()

    def target(self, batch, noise):
        """TD3's y, a row at a time, with dropout in the target policy."""
        y = []
        for row, s in enumerate(batch["next_obs"]):
            kept = noise["target_kept"][:, row] if "target_kept" in noise else None
            draws = noise["target"][row]
            epsilon = [min(max(self.c.policy_noise * float(e), -0.3), 0.3) for e in draws]
            a = self.policy(self.target_pi, s, kept) + torch.tensor(epsilon)
            self.bounds["clipped"] += int((a.abs() > 1).sum())
            self.bounds["inside"] += int((a.abs() < 1).sum())
            pair = torch.cat([s, torch.clip(a, -1, 1)])
            q = min(float(forward(pair, network).detach()) for network in self.targets)
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.gamma * alive * q)
        return torch.stack(y)

    def critic_loss(self, batch, y):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        q = [forward(pair, network)[:, 0] for network in self.critics]
        self.mean_q = (q[0].mean() + q[1].mean()) / 2
        return sum(((y - one) ** 2).mean() for one in q)

    def actor_loss(self, batch, noise):
        policy = self.policy(self.pi, batch["obs"], noise.get("kept"))
        if self.c.density == "iwae":
            self.nld = self.iwae(batch["obs"], policy, noise["latent"])
        else:
            self.nld = self.elbo(batch["obs"], policy, noise["latent"])[0]
        q1 = forward(torch.cat([batch["obs"], policy], 1), self.critics[0])[:, 0]
        scale = sum(abs(float(q)) for q in q1.detach()) / BATCH
        self.policy_q = q1.mean()
        return self.penalty * self.nld - self.policy_q / scale

    def update(self, step, batch, noise):
        if step < self.c.vae_updates:
            loss, error, kl = self.elbo(batch["obs"], batch["action"], noise["latent"][:1])
            self.vae_adam.step(loss)
            return {"vae_loss": loss, "reconstruction": error, "kl": kl}
        self.schedule(step)
        loss = self.critic_loss(batch, self.target(batch, noise))
        metrics = {"critic_loss": loss, "q": self.mean_q}
        self.critic_adam.step(loss)
        if (step - self.c.vae_updates) % self.c.policy_delay == self.c.policy_delay - 1:
            metrics["actor_loss"] = self.actor_loss(batch, noise)
            metrics |= {"density_loss": self.nld, "policy_q": self.policy_q}
            self.actor_adam.step(metrics["actor_loss"])
            pairs = [(self.target_pi, self.pi), *zip(self.targets, self.critics, strict=True)]
            with torch.no_grad():
                for target, online in pairs:
                    for old, new in zip(flat(target), flat(online), strict=True):
                        old.copy_(0.9 * old + 0.1 * new)
        return metrics


@pytest.mark.parametrize("settings", [{}, IWAE], ids=["elbo", "iwae"])
def test_losses_and_gradients(settings):
    agent, (batch, _) = make_spot(top=1.5 if settings else 20.0, **settings), make_batch(21)
    noise, obs, action = make_noise(agent, 22), batch["obs"], batch["action"]
    vae_loss = agent.density_loss(obs, action, noise["latent"], "elbo")[0]
    target = agent.target(batch, noise, agent.cfg.gamma)
    critic_loss, _ = agent.critic_loss(target, obs, action)
    actor_loss, nld, _ = agent.actor_loss(obs, noise, agent.cfg.penalty)
    vae, bounds = torch.nn.ModuleList([agent.encoder, agent.decoder]), {}
    for k in range(SEEDS):
        plain, one, draws = PlainSPOT(agent, k), member(batch, k), member(noise, k)
        y = plain.target(one, draws)
        same(target[k], y, "target")
        losses = {
            "vae": plain.elbo(one["obs"], one["action"], draws["latent"])[0],
            "critic": plain.critic_loss(one, y),
            "actor": plain.actor_loss(one, draws),
        }
        same(nld[k], plain.nld, "nld")
        parts = {
            "vae": (vae_loss, vae, plain.vae_adam),
            "critic": (critic_loss, agent.critic, plain.critic_adam),
            "actor": (actor_loss, agent.actor, plain.actor_adam),
        }
        for name, (loss, module, adam) in parts.items():
            same_gradient(loss, module, losses[name], adam.parameters, k, name)
        bounds = {n: bounds.get(n, 0) + count for n, count in plain.bounds.items()}
    if settings:
        bounds.pop("high")  # the weights of so wide a posterior vanish
    assert all(count > 0 for count in bounds.values()), f"not tried: {bounds}"
    assert 0 < (noise["target"].abs() * 0.4 > 0.3).double().mean() < 1
    assert not torch.equal(noise["kept"], noise["target_kept"])


ONLINE = {"num_updates": 4, "online_steps": 2, "updates_per_step": 2}
ONLINE |= {"online_penalty_share": 0.6, "online_gamma": 0.7}


@pytest.mark.parametrize(
    "settings",
    [{}, IWAE, {"actor_dropout": 0.0, "density_samples": 1}, ONLINE],
)
def test_updates(settings):
    """Two updates of the VAE, then four of the critics; the policy moves in each second of them."""
    agent = make_spot(**settings)
    plain = [PlainSPOT(agent, k) for k in range(SEEDS)]
    for step in range(8 if "online_steps" in settings else 6):
        (batch, _), noise = make_batch(30 + step), make_noise(agent, 40 + step)
        assert agent.variant(step) == (step < 2, step in (3, 5, 7))
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            same_metrics(metrics, one.update(step, member(batch, k), member(noise, k)), k)
            check_weights(agent.encoder, k, one.encoder, "encoder")
            check_weights(agent.decoder, k, one.decoder, "decoder")
            check_weights(agent.actor, k, one.pi, "policy")
            check_weights(agent.target_actor, k, one.target_pi, "target policy")
            check_critics(agent, k, one)
    check_moments(agent.vae_adam, [one.vae_adam for one in plain])
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])


def test_elbo_is_the_papers_but_for_scale_and_constant():
    """-ELBO with p(a|s,z) = N(D(s, z), beta / 4): its gradient is 2 act_dim / beta times ours."""
    agent, (batch, _) = make_spot(), make_batch(23)
    noise, obs = make_noise(agent, 24)["latent"], batch["obs"]
    action = batch["action"].clone().requires_grad_()
    ours = agent.density_loss(obs, action, noise, "elbo")[0]
    (ours,) = torch.autograd.grad(ours.sum(), action)
    for k in range(SEEDS):
        plain, a = PlainSPOT(agent, k), batch["action"][k].clone().requires_grad_()
        elbo = 0
        for row in range(BATCH):
            mean, std = plain.posterior(obs[k, row], a[row])
            for e in noise[k, :, row]:
                decoded = forward(torch.cat([obs[k, row], mean + std * e]), plain.decoder).tanh()
                elbo = elbo + log_normal(a[row], decoded, (0.4 / 4) ** 0.5) / (DRAWS * BATCH)
            q = torch.distributions.Normal(mean, std)
            unit = torch.distributions.Normal(torch.zeros(LATENT), torch.ones(LATENT))
            elbo = elbo - torch.distributions.kl_divergence(q, unit).sum() / BATCH
        (expected,) = torch.autograd.grad(-elbo, a)
        same(2 * ACT / 0.4 * ours[k], expected, "gradient")


def test_the_importance_weighted_estimate_is_tighter():
    """On average over latents it lies below the negative ELBO, which is its own of one latent."""
    agent, (batch, _) = make_spot(top=-1.0, density_samples=64), make_batch(25)
    with torch.no_grad():  # a posterior that ignores nothing, and is not at its bounds
        agent.encoder.layers[-1].bias[:, 0, LATENT:] = -1.0
    noise = make_noise(agent, 26)["latent"]
    estimate = lambda e: agent.density_loss(batch["obs"], batch["action"], e, "iwae")[0]  # noqa: E731
    single = torch.stack([estimate(noise[:, i : i + 1]) for i in range(64)]).mean(0)
    assert (estimate(noise) < single).all()


def test_lambda_falls_online_only():
    """Constant offline; then on a line to its share, and the discount is another at once."""
    settings = {"penalty": 0.4, "num_updates": 10, "online_penalty_share": 0.25}
    online = {"online_steps": 4, "updates_per_step": 2, "online_gamma": 0.8}
    agents = [make_spot(**settings, **more) for more in (online, {**online, "online_gamma": None})]
    offline = make_spot(**settings)
    for step, share in {2: 1, 9: 1, 10: 1, 12: 0.75, 16: 0.25, 17: 0.25}.items():
        for agent, gamma in zip(agents, (0.9 if step < 10 else 0.8, 0.9), strict=True):
            agent.vae_adam.steps.fill_(2)
            agent.critic_adam.steps.fill_(step - 2)
            found = [float(x) for x in agent.schedule()]
            assert found == pytest.approx([0.4 * share, gamma])
        assert offline.schedule() == (0.4, 0.9)


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("fitted", [0, 4])
def test_the_policy_moves_in_every_nth_update_after_the_vaes(fitted, delay):
    agent = make_spot(vae_updates=fitted, policy_delay=delay)
    moves = [(i + 1) % delay == 0 for i in range(6)]
    expected = [(True, False)] * fitted + [(False, move) for move in moves]
    assert [agent.variant(step) for step in range(fitted + 6)] == expected


def test_acts_with_the_policy_itself():
    agent, (batch, _) = make_spot(), make_batch(5)
    check_act(agent, agent.actor, 3 * batch["obs"])


def test_widths_and_noise_are_the_settings():
    agent = make_spot(hidden_layers=3)
    shapes = {
        agent.actor: [OBS, HIDDEN, HIDDEN, HIDDEN, ACT],
        agent.critic: [OBS + ACT, HIDDEN, HIDDEN, HIDDEN, 1],
        agent.encoder: [OBS + ACT, 8, 8, 8, 2 * LATENT],
        agent.decoder: [OBS + LATENT, 8, 8, 8, ACT],
    }
    for mlp, widths in shapes.items():
        found = [mlp.layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in mlp.layers)]
        assert found == widths
    kept = (0.7, (LAYERS + 1, BATCH, HIDDEN))
    latents, target = ("normal", (DRAWS, BATCH, LATENT)), ("normal", (BATCH, ACT))
    noise = {"latent": latents, "target": target, "kept": kept, "target_kept": kept}
    assert agent.noise_shapes == noise
    assert make_spot(actor_dropout=0.0).noise_shapes == {"latent": latents, "target": target}


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_has_a_graph_for_each_kind_of_update():
    """The VAE's, the critics', theirs with the policy's; they give what eager updates give."""
    torch.set_default_dtype(torch.float32)
    script, small = load_script("spot"), {"hidden_layers": 1, "vae_hidden_dim": 8, "log_every": 4}
    settings = {**small, "vae_updates": 4, "num_updates": 12, "env_id": "none"}
    for mode in ("false", "true"):
        assert script.main(words(run_dir=mode, compile=mode, **settings)) == 0
    assert graphs() == 3
    ours, theirs = (script.read_checkpoint(mode)["agent"] for mode in ("true", "false"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_defaults_are_the_authors():
    """Of their code for locomotion; 100,000 updates of the VAE before 1M of the policy (D1)."""
    cfg = load_script("spot").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size, cfg.policy_delay) == (0.99, 0.005, 256, 2)
    assert (cfg.num_updates, cfg.vae_updates) == (1_100_000, 100_000)
    assert (cfg.density, cfg.density_samples, cfg.kl_weight) == ("elbo", 1, 0.5)
    assert (cfg.policy_noise, cfg.noise_clip, cfg.exploration_noise) == (0.2, 0.5, 0.1)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.vae_lr) == (3e-4, 3e-4, 1e-3)
    assert (cfg.hidden_dim, cfg.vae_hidden_dim, cfg.hidden_layers) == (256, 750, 2)
    assert (cfg.actor_dropout, cfg.online_penalty_share, cfg.online_gamma) == (0.1, 0.2, None)
    assert cfg.normalize_obs
