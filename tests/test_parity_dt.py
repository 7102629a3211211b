"""The Decision Transformer against plain float64 computations written from the paper's algorithm 1.

The expected numbers come from a transformer in loops: one member, one window and one query at a
time, softmax by hand, short windows padded at the front and masked, as the authors have it.
"""

import copy
import json
import math
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import TOY, load_script, toy_episodes, words
from plain import ACT, OBS, SEEDS, check_moments, make_agent, of_member, same
from test_data import Ends, load, policy_of
from test_runs import rows

K, WINDOWS, TIMES = 4, 5, 9  # steps of a window, windows of a batch, times in the table
SIZE = {"context": K, "batch_size": WINDOWS, "max_episode_steps": TIMES, "hidden_dim": 8}
LOUD = {"hidden_layers": 2, "attention_heads": 2, "return_scale": 10.0, "weight_decay": 0.1}


def make_dt(**settings):
    """A DT whose blocks are not near zero, as they start, and whose normalisations do something."""
    agent = make_agent("dt", "DT", **{**SIZE, **LOUD, "actor_lr": 0.02, **settings})
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return agent


def make_windows(seed: int) -> tuple[dict, dict]:
    """Windows of all lengths from 1 to K; what pads them is as large as the rest."""
    g = torch.Generator().manual_seed(seed)
    shape = (SEEDS, WINDOWS, K)
    lengths = torch.stack([1 + (torch.arange(WINDOWS) + k) % K for k in range(SEEDS)])
    start = torch.randint(TIMES - K + 1, shape[:2], generator=g)
    batch = {
        "obs": torch.randn(*shape, OBS, generator=g),
        "action": 2 * torch.rand(*shape, ACT, generator=g) - 1,
        "return_to_go": torch.randn(shape, generator=g),
        "timestep": start[..., None] + torch.arange(K),
        "mask": torch.arange(K) < lengths[..., None],
    }
    kept = torch.rand(SEEDS, 5, WINDOWS * K * 3, SIZE["hidden_dim"], generator=g) >= 0.3
    return batch, {"kept": kept}


# ---- the plain computation


class Plain:
    """One member: its weights by name, and the forward pass in loops."""

    def __init__(self, agent, k: int):
        self.cfg = agent.cfg
        named = agent.actor.named_parameters()
        self.w = {name: p[k].detach().double().clone().requires_grad_() for name, p in named}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"][0]

    def norm(self, name, x):
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        scaled = (x - mean) / (variance + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"][0] + self.w[f"{name}.bias"][0]

    def attention(self, name, x, real):
        """Query by query; masked keys are left out of the softmax."""
        dim, heads = x.shape[-1], self.cfg.attention_heads
        parts, size = self.linear(f"{name}.query_key_value", x), dim // heads
        result = []
        for i in range(len(x)):
            mixed, seen = [], [j for j in range(i + 1) if real[j]]
            for h in range(heads):
                at = slice(h * size, (h + 1) * size)
                q, k, v = (parts[:, n * dim : (n + 1) * dim][:, at] for n in range(3))
                if not seen:
                    mixed.append(torch.zeros(size))
                    continue
                weights = torch.stack([torch.exp((q[i] * k[j]).sum() / size**0.5) for j in seen])
                weights = weights / weights.sum()
                mixed.append(sum(w * v[j] for w, j in zip(weights, seen, strict=True)))
            result.append(torch.cat(mixed))
        return self.linear(f"{name}.projection", torch.stack(result))

    def forward(self, obs, action, return_to_go, timestep, keep=None):
        """The actions of the steps of one window [T, ...], T <= K; keep [5, 3T, dim] multiplies."""
        missing = self.cfg.context - len(obs)  # padded at the front: a = -10, the rest 0
        real = [False] * 3 * missing + [True] * 3 * len(obs)
        tokens = []
        for t in range(-missing, len(obs)):
            time = self.w["embed_timestep.weight"][timestep[t] if t >= 0 else 0]
            s = obs[t] if t >= 0 else torch.zeros_like(obs[0])
            a = action[t] if t >= 0 else torch.full_like(action[0], -10.0)
            r = return_to_go[t] if t >= 0 else torch.zeros(())
            tokens.append(self.linear("embed_return", r.reshape(1)) + time)
            tokens.append(self.linear("embed_obs", s) + time)
            tokens.append(self.linear("embed_action", a) + time)
        count = 1 + 2 * self.cfg.hidden_layers
        masks = torch.ones(count, len(tokens), len(tokens[0]))
        if keep is not None:
            masks[:, 3 * missing :] = keep
        x = self.norm("embed_norm", torch.stack(tokens)) * masks[0]
        for i in range(self.cfg.hidden_layers):
            name = f"blocks.{i}"
            added = self.attention(name, self.norm(f"{name}.attention_norm", x), real)
            x = x + added * masks[1 + 2 * i]
            hidden = self.linear(f"{name}.mlp.layers.0", self.norm(f"{name}.mlp_norm", x))
            added = self.linear(f"{name}.mlp.layers.1", torch.maximum(hidden, torch.zeros(())))
            x = x + added * masks[2 + 2 * i]
        x = self.norm("last_norm", x)[3 * missing :][1::3]
        return torch.tanh(self.linear("head", x))

    def window(self, batch, noise, k, b):
        """The predictions for window b of member k, and its real steps."""
        steps = int(batch["mask"][k, b].sum())
        inputs = [batch[n][k, b, :steps] for n in ("obs", "action", "return_to_go", "timestep")]
        keep, p = None, self.cfg.dropout
        if noise:
            keep = noise["kept"][k].unflatten(1, (WINDOWS, 3 * K))[:, b, : 3 * steps]
            keep = torch.where(keep, 1 / (1 - p), 0.0)
        return self.forward(*inputs, keep), inputs[1]

    def loss(self, batch, noise, k):
        total, count = 0.0, 0
        for b in range(WINDOWS):
            policy, action = self.window(batch, noise, k, b)
            total = total + ((policy - action) ** 2).sum()
            count += action.numel()
        return total / count


class PlainAdamW:
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, behind a clip of the whole norm."""

    def __init__(self, parameters):
        self.parameters, self.t = parameters, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def step(self, loss, lr, decay, clip) -> float:
        self.t += 1
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
                g = g * min(1.0, clip / (norm + 1e-6))
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
                p -= lr * (m / (v.sqrt() + 1e-8) + decay * p)
        return norm


# ---- the network and its loss


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("heads", [1, 2])
def test_actions_loss_and_gradients(heads):
    agent, (batch, noise) = make_dt(attention_heads=heads, dropout=0.3), make_windows(3)
    inputs = [batch[name] for name in ("obs", "action", "return_to_go", "timestep")]
    policy = agent.actor(*inputs, noise["kept"] / 0.7)
    loss = agent.actor_loss(batch, noise)
    found = torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))
    assert loss.shape == (SEEDS,) and policy.shape == batch["action"].shape
    for k in range(SEEDS):
        plain = Plain(agent, k)
        for b in range(WINDOWS):
            expected, _ = plain.window(batch, noise, k, b)
            same(policy[k, b, : len(expected)], expected, f"window {b}")
        expected = plain.loss(batch, noise, k)
        same(loss[k], expected, "loss")
        wanted = torch.autograd.grad(expected, list(plain.w.values()))
        for name, a, b in zip(plain.w, of_member(found, k), wanted, strict=True):
            same(a, b, f"gradient of {name}")


@pytest.mark.usefixtures("float64")
def test_without_dropout_no_noise():
    agent, (batch, _) = make_dt(dropout=0.0), make_windows(4)
    assert agent.noise_shapes == {}
    same(agent.actor_loss(batch, {})[1], Plain(agent, 1).loss(batch, {}, 1))


def test_noise_is_one_number_for_each_unit_and_mask():
    agent = make_dt()
    (kind, shape) = agent.noise_shapes["kept"]
    assert kind == 1 - agent.cfg.dropout and shape == make_windows(0)[1]["kept"].shape[1:]


@pytest.mark.usefixtures("float64")
def test_updates():
    """Four updates: a rising learning rate, some gradients clipped and some not."""
    agent = make_dt(warmup_updates=3, grad_clip=1.0)
    plain = [Plain(agent, k) for k in range(SEEDS)]
    optimizers, clipped = [PlainAdamW(list(one.w.values())) for one in plain], []
    for step in range(4):
        batch, noise = make_windows(10 + step)
        kept = copy.deepcopy((batch, noise))
        lr = 0.02 * min(step + 1, 3) / 3
        losses = [one.loss(batch, noise, k) for k, one in enumerate(plain)]
        steps = zip(optimizers, losses, strict=True)
        norms = [optimizer.step(loss, lr, 0.1, 1.0) for optimizer, loss in steps]
        clipped += [norm > 1 for norm in norms]
        metrics = agent.update(batch, noise, *agent.variant(step))
        assert metrics.keys() == {"actor_loss", "grad_norm"}
        for new, old in zip((batch, noise), kept, strict=True):
            assert all(torch.equal(new[name], old[name]) for name in old)
        for k in range(SEEDS):
            same(metrics["actor_loss"][k], losses[k], "loss")
            same(metrics["grad_norm"][k], torch.tensor(norms[k]), "norm")
            for name, p in agent.actor.named_parameters():
                check_weight(name, p[k].detach(), plain[k].w[name].detach())
    assert 0 < sum(clipped) < len(clipped), clipped
    check_moments(agent.actor_adam, optimizers)


def check_weight(name, actual, expected) -> None:
    """Biases of keys cancel in the softmax: Adam divides the rounding of their zero gradient."""
    if name.endswith("query_key_value.bias"):
        keys = slice(SIZE["hidden_dim"], 2 * SIZE["hidden_dim"])
        torch.testing.assert_close(actual[:, keys], expected[:, keys], rtol=0, atol=1e-8)
        actual, expected = actual.clone(), expected.clone()
        actual[:, keys] = expected[:, keys] = 0
    same(actual, expected, name)


@pytest.mark.usefixtures("float64")
def test_padding_never_matters():
    agent, (batch, noise) = make_dt(), make_windows(5)
    changed, other = copy.deepcopy(batch), make_windows(6)[0]
    for name in ("obs", "action", "return_to_go", "timestep"):
        padding = ~batch["mask"]
        changed[name][padding] = other[name][padding]
        assert not torch.equal(changed[name], batch[name])
    losses = [agent.actor_loss(each, noise) for each in (batch, changed)]
    same(losses[0], losses[1])
    gradients = [torch.autograd.grad(x.sum(), list(agent.actor.parameters())) for x in losses]
    for a, b in zip(*gradients, strict=True):
        same(a, b)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("step", range(K))
def test_an_action_sees_its_own_past_alone(step):
    """And all of it: every earlier token, its own return and observation, not its own action."""
    agent, (batch, _) = make_dt(), make_windows(7)
    inputs = {name: batch[name] for name in ("obs", "action", "return_to_go", "timestep")}
    before = agent.actor(**inputs)
    for name in ("obs", "action", "return_to_go"):
        changed = {**inputs, name: inputs[name].clone()}
        changed[name][:, :, step] += 1.0
        moved = (agent.actor(**changed) - before).abs().amin((0, 1, 3))
        first = step + (name == "action")
        assert not moved[:first].any() and (moved[first:] > 1e-6).all(), name


@pytest.mark.usefixtures("float64")
def test_windows_do_not_see_each_other():
    agent, (batch, _) = make_dt(), make_windows(8)
    inputs = [batch[name] for name in ("obs", "action", "return_to_go", "timestep")]
    together = agent.actor(*inputs)
    for b in range(WINDOWS):
        same(together[:, b], agent.actor(*[x[:, b : b + 1] for x in inputs])[:, 0])


def test_initial_weights():
    dt = load_script("dt")
    sizes = {name: torch.ones(5 if "obs" in name else 3) for name in dt.Agent.units}
    agent = dt.DT(dt.TrainConfig(num_seeds=2), sizes)
    found = {name: p.detach() for name, p in agent.actor.named_parameters()}
    for name, p in found.items():
        if name.startswith("blocks.") and "norm" not in name:
            scale = float(p.double().square().mean().sqrt())
            assert scale == pytest.approx(0 if "bias" in name else 0.02, rel=0.02), name
    assert float(found["embed_timestep.weight"].std()) == pytest.approx(1, rel=0.01)
    assert found["embed_timestep.weight"].shape == (2, 1000, 128)
    assert found["head.weight"].abs().max() > 0.9 * 128**-0.5


# ---- windows


BEST = max(episode.rewards.sum(dtype=np.float64) for episode in toy_episodes())


def toy_table(**settings):
    dt = load_script("dt")
    (episodes, space, _), cfg = load(dt), dt.TrainConfig(context=6, **settings)
    agent = dt.DT(cfg, dt.measure(episodes, space, cfg))
    each = [agent.rows(episode) for episode in episodes]
    return agent, {name: torch.cat([part[name] for part in each]) for name in each[0]}


def test_windows_by_hand():
    """From every row of the data: never beyond the episode's end, returns to the very end."""
    agent, table = toy_table(return_scale=1000)
    assert {len(values) for values in table.values()} == {71}
    batch = agent.gather(table, torch.arange(71).expand(2, -1))
    assert batch.keys() == {"obs", "action", "return_to_go", "timestep", "mask"}
    row = 0
    for episode in toy_episodes():
        steps = len(episode.rewards)
        for t in range(steps):
            length = min(6, steps - t)
            for member in range(2):
                window = {name: values[member, row] for name, values in batch.items()}
                assert window["mask"].tolist() == [i < length for i in range(6)]
                assert window["timestep"][:length].tolist() == list(range(t, t + length))
                for i in range(length):
                    left = sum(float(r) for r in episode.rewards[t + i :]) / 1000
                    assert float(window["return_to_go"][i]) == pytest.approx(left, abs=1e-8)
                    seen = torch.as_tensor(episode.observations[t + i])
                    seen = (seen - agent.obs_mean) / agent.obs_std
                    torch.testing.assert_close(window["obs"][i], seen)
                    action = torch.as_tensor(episode.actions[t + i]) / 2
                    torch.testing.assert_close(window["action"][i], action)
                assert all(values.isfinite().all() for values in window.values())
                assert window["timestep"].max() < steps  # what pads is of the same episode
            row += 1
    assert row == 71


def test_targets():
    def targets(*text):
        settings = {"target_returns": text[0]} if text else {}
        return [float(x) for x in toy_table(**settings)[0].targets()]

    assert targets() == pytest.approx([BEST], rel=1e-6)
    assert targets("3600, 1.8e3,-5") == [3600, 1800, -5]
    assert targets("50%, 7, 100 %,7.0") == pytest.approx([BEST / 2, 7, BEST], rel=1e-6)


@pytest.mark.parametrize("text", ["much", "3600; 1800", "nan", "1, inf", "", "%", "1%%"])
def test_targets_that_are_none(refused, text):
    refused(load_script("dt"), words(target_returns=text), "target_returns")


def test_settings_that_do_not_fit(refused):
    dt = load_script("dt")
    refused(dt, words(max_episode_steps=39), "max_episode_steps is 39", "40 steps")
    refused(dt, words(attention_heads=3), "attention_heads", "hidden_dim")
    changes = {"reward_scale": 0.001, "reward_shift": -1, "reward_by_return_range": "true"}
    for name, value in changes.items():
        refused(dt, words(**{name: value}), name, "return_scale")
    assert dt.main(words(max_episode_steps=40)) == 0


# ---- acting and evaluation


@pytest.mark.usefixtures("float64")
def test_acts_at_the_start_and_later():
    agent, (batch, _) = make_dt(target_returns="7, 3"), make_windows(9)
    low, high = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 0.5])
    obs, left = 3 * batch["obs"], 20 * batch["return_to_go"]
    raw, time = low + (high - low) * (batch["action"] + 1) / 2, torch.arange(K) + TIMES - 2
    first, later = agent.act(obs[:, :, 0]), agent.act(obs, raw, left, time)
    for k in range(SEEDS):
        plain = Plain(agent, k)
        for b in range(WINDOWS):
            seen = (obs[k, b] - agent.obs_mean) / agent.obs_std
            begin = plain.forward(seen[:1], raw[k, b, :1], torch.tensor([0.7]), [0])[-1]
            same(first[k, b], low + (high - low) * (begin + 1) / 2, "first action")
            times = [min(t, TIMES - 1) for t in time.tolist()]  # the table ends there
            policy = plain.forward(seen, batch["action"][k, b], left[k, b] / 10, times)[-1]
            same(later[k, b], low + (high - low) * (policy + 1) / 2, "later action")


def plain_episode(plain, agent, env, seed: int, target: float) -> tuple[float, int]:
    """One episode, every action from the whole window of the last K steps, as in the paper."""
    obs, over, total = env.reset(seed=seed)[0], False, 0.0
    observations, actions, returns, cfg = [], [], [target], plain.cfg
    while not over:
        observations.append((torch.as_tensor(obs).double() - agent.obs_mean) / agent.obs_std)
        actions.append(torch.zeros(1))
        begin = max(0, len(actions) - cfg.context)
        left = torch.tensor(returns)[begin:] / cfg.return_scale
        inputs = (torch.stack(observations[begin:]), torch.stack(actions[begin:]), left)
        actions[-1] = plain.forward(*inputs, range(begin, len(actions)))[-1].detach()
        action = (2 * actions[-1]).numpy().astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
        returns.append(returns[-1] - float(reward))
    return total, len(actions)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("env_id, seeds", [("auto", 2), ("Ends-v0", 2), ("Ends-v0", 16)])
def test_evaluation_equals_a_plain_loop(env_id, seeds):
    """With 16 members and two targets two episodes of each fit into a wave of 64."""
    torch.set_default_dtype(torch.float32)
    dt, targets = load_script("dt"), (900.0, -700.0)
    settings = {"num_seeds": seeds, "seed": 7, "eval_seed": 123, "eval_episodes": 0}
    settings |= {"target_returns": "900, -700", "env_id": env_id, "final_eval_episodes": 3}
    settings |= {"context": 5, "hidden_layers": 2, "actor_lr": 0.01, "warmup_updates": 1}
    settings |= {"return_scale": 30, "hidden_dim": 8, "num_updates": 10}
    Ends.seeds = ()
    assert dt.main(words(**settings)) == 0
    if env_id == "Ends-v0":
        assert {s for s in Ends.seeds if s} == {123, 124, 125}
    agent = policy_of(dt, "run")
    env = gym.make(minari.load_dataset(TOY).spec.env_spec if env_id == "auto" else env_id)
    episodes, metrics = rows("run/episodes.jsonl"), rows("run/metrics.jsonl")
    assert [(r["seed"], r["target"], r["episode"]) for r in episodes] == [
        (s, t, i) for s in range(7, 7 + seeds) for t in targets for i in range(3)
    ]
    torch.set_default_dtype(torch.float64)
    for member in {0, seeds - 1}:
        plain, logged = Plain(agent, member), [r for r in metrics if r["seed"] == 7 + member][-1]
        for number, target in enumerate(targets):
            at = 6 * member + 3 * number
            played = [(r["return"], r["length"]) for r in episodes[at : at + 3]]
            expected = [plain_episode(plain, agent, env, 123 + i, target) for i in range(3)]
            assert [length for _, length in played] == [length for _, length in expected]
            found = [value for value, _ in played]
            np.testing.assert_allclose(found, [x for x, _ in expected], rtol=1e-6, atol=1e-3)
            ending = "_target_2" if number else ""
            assert logged[f"eval/return{ending}"] == pytest.approx(np.mean(found))
            assert ("eval/score" + ending in logged) == (env_id == "auto")
            lengths = [length for _, length in played]
            assert logged[f"eval/length{ending}"] == pytest.approx(np.mean(lengths))
        ours = [r["return"] for r in episodes if r["seed"] == 7 + member]
        assert np.abs(np.subtract(ours[:3], ours[3:])).min() > 0.01, "the target changes nothing"


def test_equal_targets_are_played_once(monkeypatch):
    """A share of the best return may be what another target asks for."""
    dt = load_script("dt")
    monkeypatch.setattr(dt.DT, "targets", lambda _: [7.0, 9.0, 7.0])
    assert dt.main(words(final_eval_episodes=2, num_seeds=2)) == 0
    lines = Path("run/episodes.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["final"]]
    assert [(row["seed"], row["target"], row["episode"]) for row in found] == [
        (seed, target, i) for seed in (0, 1) for target in (7.0, 9.0) for i in (0, 1)
    ]


def test_the_agent_is_told_what_is_left(monkeypatch):
    """R_(t+1) = R_t - r_t for each target, absolute times, the actions taken, K steps at most."""
    dt, told = load_script("dt"), []
    act, step, rewards = dt.DT.act, Ends.step, []

    def spy(agent, *window):
        names = ("obs", "action", "return_to_go", "timestep")
        told.append({name: x.clone() for name, x in zip(names, window, strict=True)})
        return act(agent, *window)

    def log(env, action):
        result = step(env, action)
        rewards.append((env.time, float(action[0]), result[1]))
        return result

    monkeypatch.setattr(dt.DT, "act", spy)
    monkeypatch.setattr(Ends, "step", log)
    settings = {"env_id": "Ends-v0", "eval_seed": 125, "eval_episodes": 0, "context": 3}
    assert dt.main(words(**settings, target_returns="2000, 100", final_eval_episodes=1)) == 0
    del rewards[0]  # of the step that was tried before the first update
    assert len(told) == 1 + 125 % 7 == 7
    for t, window in enumerate(told):
        begin = max(0, t - 2)
        assert window["timestep"].tolist() == list(range(begin, t + 1))
        assert window["obs"].shape == (1, 2, t + 1 - begin, 3)
        for j, target in enumerate((2000.0, 100.0)):
            own = rewards[j::2]  # two episodes side by side, of one length
            left = [target - sum(r for _, _, r in own[:i]) for i in range(begin, t + 1)]
            np.testing.assert_allclose(window["return_to_go"][0, j], left, rtol=1e-5)
            taken = [action for _, action, _ in own[begin:t]]
            np.testing.assert_allclose(window["action"][0, j, :-1, 0], taken, rtol=1e-6)


def test_a_checkpoint_keeps_the_best_return_of_its_data():
    dt = load_script("dt")
    assert dt.main(words()) == 0
    assert [float(x) for x in policy_of(dt, "run").targets()] == pytest.approx([BEST], rel=1e-6)
    assert {row["target"] for row in rows("run/episodes.jsonl")} == {float(np.float32(BEST))}
    result = json.loads(Path("run/result.json").read_text())
    assert "eval/return_target_2" not in result["last"][0]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["target_returns"] == "100%"


def test_defaults_are_the_papers():
    cfg = load_script("dt").TrainConfig()
    assert (cfg.context, cfg.hidden_dim, cfg.hidden_layers, cfg.attention_heads) == (20, 128, 3, 1)
    assert (cfg.dropout, cfg.grad_clip, cfg.weight_decay, cfg.actor_lr) == (0.1, 0.25, 1e-4, 1e-4)
    assert (cfg.batch_size, cfg.num_updates, cfg.warmup_updates) == (64, 100_000, 10_000)
    assert (cfg.return_scale, cfg.max_episode_steps, cfg.normalize_obs) == (None, 1000, True)


def test_the_scale_fits_the_data_unless_it_is_set():
    """Largest |return| of the data: returns-to-go are then within [-1, 1] at the start."""
    agent, table = toy_table()
    returns = [float(np.sum(e.rewards, dtype=np.float64)) for e in toy_episodes()]
    assert float(agent.return_scale()) == pytest.approx(max(map(abs, returns)), rel=1e-6)
    starts = table["return_to_go"][table["timestep"] == 0]
    assert float(starts.abs().max()) == pytest.approx(1, rel=1e-6)
    assert toy_table(return_scale=30)[0].return_scale() == 30
