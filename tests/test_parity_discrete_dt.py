"""The discrete Decision Transformer against plain float64 computations.

Written from the paper's algorithm 1 with the cross-entropy of section 4.1: one member, one window,
one step of it and one query at a time. Data and environment have images, three actions from 2 on,
and two frames in an observation.
"""

import copy
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TOY, load_script, toy_episode, words, write_dataset
from plain import SEEDS, check_moments, make_units, of_member, same
from test_parity_dt import Plain as PlainTransformer
from test_runs import rows

K, WINDOWS, TIMES, ACTIONS, FIRST = 4, 5, 9, 3, 2  # FIRST is the environment's number of action 0
SHAPE, STACK, LENGTHS = (4, 5, 2), 2, (12, 7, 1)  # of a frame; frames; steps of the episodes
SIZE = {"context": K, "batch_size": WINDOWS, "max_episode_steps": TIMES, "hidden_dim": 8}
LOUD = {"hidden_layers": 2, "attention_heads": 2, "return_scale": 10.0, "weight_decay": 0.1}
IMAGES = {"encoder": "minatar", "frame_stack": STACK}
INPUTS = ("obs", "action", "return_to_go", "timestep")
DATA = {"context": 6, "max_episode_steps": 12, "return_scale": 30, "attention_heads": 2, **IMAGES}


def make_ddt(**settings):
    """One whose weights are not near zero, as they start, and whose normalisations do something."""
    script, g = load_script("discrete_dt"), torch.Generator().manual_seed(2)
    settings = {**SIZE, **LOUD, **IMAGES, "num_seeds": SEEDS, "actor_lr": 0.02, **settings}
    cfg = script.TrainConfig(**{"num_updates": 10, **settings})
    mean, std = (torch.rand(math.prod(SHAPE), generator=g) + 0.5 for _ in range(2))
    units = make_units(mean, std, [float(FIRST)], [float(FIRST + ACTIONS - 1)])
    return loud(script.DiscreteDT(cfg, {**units, "frame_shape": SHAPE}).double())


@torch.no_grad()
def loud(agent):
    g = torch.Generator().manual_seed(3)
    for p in agent.actor.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=g))
    return agent


def make_windows(seed: int) -> tuple[dict, dict]:
    """Windows of all lengths from 1 to K; what pads them is as large as the rest."""
    g, shape = torch.Generator().manual_seed(seed), (SEEDS, WINDOWS, K)
    lengths = torch.stack([1 + (torch.arange(WINDOWS) + k) % K for k in range(SEEDS)])
    batch = {
        "obs": torch.randn(*shape, STACK * math.prod(SHAPE), generator=g),
        "action": torch.randint(ACTIONS, shape, generator=g),
        "return_to_go": torch.randn(shape, generator=g),
        "timestep": torch.randint(TIMES, shape[:2], generator=g),
        "mask": torch.arange(K) < lengths[..., None],
    }
    kept = torch.rand(SEEDS, 5, WINDOWS * K * 3, SIZE["hidden_dim"], generator=g) >= 0.3
    return batch, {"kept": kept}


# ---- the plain computation


class Plain(PlainTransformer):
    """One member: its weights by name, and the forward pass in loops."""

    def encode(self, obs):
        """Of one observation: a convolution spelled out over the window's places."""
        if self.cfg.encoder == "mlp":
            return obs
        height, width, channels = SHAPE
        frames = [frame.reshape(SHAPE) for frame in obs.split(math.prod(SHAPE))]
        weight, bias = (self.w[f"encoder.convs.0.{name}"] for name in ("weight", "bias"))
        found = []
        for o in range(len(weight)):
            for y in range(height - 2):
                for x in range(width - 2):
                    part = [frame[y : y + 3, x : x + 3, c] for frame in frames for c in range(2)]
                    found.append((weight[o] * torch.stack(part)).sum() + bias[o])
        assert channels == 2
        return torch.stack(found).clamp(min=0)

    def forward(self, obs, action, return_to_go, timestep, keep=None):
        """Logits at the steps of one window [T, ...]; keep [5, 3T, dim] multiplies."""
        time, tokens = self.w["embed_timestep.weight"][timestep], []
        for t in range(len(obs)):
            of_return = self.linear("embed_return", return_to_go[t].reshape(1))
            of_obs = self.linear("embed_obs", self.encode(obs[t]))
            tokens += [of_return, of_obs, self.w["embed_action.weight"][action[t]]]
        places = self.w["embed_place.weight"][: len(tokens)]
        x = torch.stack([torch.tanh(token) + time for token in tokens]) + places
        masks = torch.ones(1 + 2 * self.cfg.hidden_layers, *x.shape) if keep is None else keep
        x = x * masks[0]
        for i in range(self.cfg.hidden_layers):
            name, real = f"blocks.{i}", [True] * len(x)
            added = self.attention(name, self.norm(f"{name}.attention_norm", x), real)
            x = x + added * masks[1 + 2 * i]
            hidden = self.linear(f"{name}.mlp.layers.0", self.norm(f"{name}.mlp_norm", x))
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2  # arXiv 1606.08415
            x = x + self.linear(f"{name}.mlp.layers.1", hidden) * masks[2 + 2 * i]
        return self.linear("head", self.norm("last_norm", x)[1::3])

    def window(self, batch, noise, k, b):
        """The logits of window b of member k at its real steps, and the data's actions."""
        steps = int(batch["mask"][k, b].sum())
        inputs = [batch[name][k, b] for name in INPUTS]
        inputs[:3] = [values[:steps] for values in inputs[:3]]
        keep = noise["kept"][k].unflatten(1, (WINDOWS, 3 * K))[:, b, : 3 * steps]
        keep = torch.where(keep, 1 / (1 - self.cfg.dropout), 0.0)
        return self.forward(*inputs, keep), inputs[1]

    def loss(self, batch, noise, k) -> tuple:
        """And the share of steps at which the most likely action is the data's."""
        total, count, right = 0.0, 0, 0
        for b in range(WINDOWS):
            for logits, action in zip(*self.window(batch, noise, k, b), strict=True):
                probability = torch.exp(logits) / torch.exp(logits).sum()
                total, count = total - torch.log(probability[action]), count + 1
                right += int(logits.tolist().index(max(logits.tolist())) == action)
        return total / count, right / count


class PlainAdamW:
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; decay of matrices and filters only."""

    def __init__(self, named: dict):
        self.named, self.t = named, 0
        self.m = {name: torch.zeros_like(p) for name, p in named.items()}
        self.v = {name: torch.zeros_like(p) for name, p in named.items()}

    @staticmethod
    def decays(name: str) -> bool:
        bare = name.endswith("bias") or "norm" in name
        tables = ("embed_action.weight", "embed_timestep.weight", "embed_place.weight")
        return not bare and name not in tables

    def step(self, loss, lr, decay, clip) -> float:
        self.t += 1
        gradients = torch.autograd.grad(loss, list(self.named.values()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        with torch.no_grad():
            for (name, p), g in zip(self.named.items(), gradients, strict=True):
                g = g * min(1.0, clip / (norm + 1e-6))
                self.m[name] = 0.9 * self.m[name] + 0.1 * g
                self.v[name] = 0.95 * self.v[name] + 0.05 * g**2
                m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.95**self.t)
                p -= lr * (m / (v.sqrt() + 1e-8) + (decay * p if self.decays(name) else 0))
        return norm


# ---- the network, its loss, its updates


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("encoder", ["minatar", "mlp"])
def test_logits_loss_and_gradients(encoder):
    agent, (batch, noise) = make_ddt(encoder=encoder, dropout=0.3), make_windows(3)
    logits = agent.actor(*(batch[name] for name in INPUTS), noise["kept"] / 0.7)
    loss = agent.actor_loss(logits, batch)
    found = torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))
    assert loss.shape == (SEEDS,) and logits.shape == (SEEDS, WINDOWS, K, ACTIONS)
    for k in range(SEEDS):
        plain = Plain(agent, k)
        for b in range(WINDOWS):
            expected, _ = plain.window(batch, noise, k, b)
            same(logits[k, b, : len(expected)], expected, f"window {b}")
        expected, _ = plain.loss(batch, noise, k)
        same(loss[k], expected, "loss")
        wanted = torch.autograd.grad(expected, list(plain.w.values()))
        for name, a, b in zip(plain.w, of_member(found, k), wanted, strict=True):
            same(a, b, f"gradient of {name}")


@pytest.mark.usefixtures("float64")
def test_updates():
    """Five: the rate rises, falls and stays; some gradients are clipped; matrices alone decay."""
    settings = {"warmup_updates": 2, "num_updates": 4, "grad_clip": 1.0, "dropout": 0.3}
    agent = make_ddt(**settings)
    plain = [Plain(agent, k) for k in range(SEEDS)]
    adams, clipped = [PlainAdamW(one.w) for one in plain], []
    fall = [(1 + math.cos(math.pi * n / 2.8)) / 2 for n in (1, 2)]  # 0 would be at 1.2 * 4 updates
    for step, share in enumerate((0.5, 1.0, *fall, 0.1)):
        batch, noise = make_windows(10 + step)
        kept = copy.deepcopy((batch, noise))
        losses, right = zip(*(one.loss(batch, noise, k) for k, one in enumerate(plain)))  # noqa: B905
        steps = zip(adams, losses, strict=True)
        norms = [adam.step(loss, 0.02 * share, 0.1, 1.0) for adam, loss in steps]
        clipped += [norm > 1 for norm in norms]
        metrics = agent.update(batch, noise, *agent.variant(step))
        assert metrics.keys() == {"actor_loss", "agreement", "grad_norm"}
        for new, old in zip((batch, noise), kept, strict=True):
            assert all(torch.equal(new[name], old[name]) for name in old)
        for k in range(SEEDS):
            same(metrics["actor_loss"][k], losses[k], "loss")
            same(metrics["agreement"][k], torch.tensor(right[k]), "agreement")
            same(metrics["grad_norm"][k], torch.tensor(norms[k]), "norm")
            for name, p in agent.actor.named_parameters():
                check_weight(name, p[k].detach(), plain[k].w[name].detach())
    assert 0 < sum(clipped) < len(clipped), clipped
    names = {id(p): name for name, p in agent.actor.named_parameters()}
    for ours in (agent.map_adam, agent.other_adam):
        own = [names[id(p)] for p in ours.params]
        assert {adams[0].decays(name) for name in own} == {ours is agent.map_adam}
        check_moments(ours, [Moments(adam, own) for adam in adams])


class Moments:
    """Those of some parameters, as check_moments asks for them."""

    def __init__(self, adam, names):
        self.t = adam.t
        self.m, self.v = ([each[name] for name in names] for each in (adam.m, adam.v))


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
    agent, (batch, noise) = make_ddt(dropout=0.3), make_windows(5)
    changed, other = copy.deepcopy(batch), make_windows(6)[0]
    for name in ("obs", "action", "return_to_go"):
        padding = ~batch["mask"]
        changed[name][padding] = other[name][padding]
        assert not torch.equal(changed[name], batch[name])
    each = [agent.actor(*(x[n] for n in INPUTS), noise["kept"] / 0.7) for x in (batch, changed)]
    losses = [agent.actor_loss(logits, x) for logits, x in zip(each, (batch, changed), strict=True)]
    same(losses[0], losses[1])
    gradients = [torch.autograd.grad(x.sum(), list(agent.actor.parameters())) for x in losses]
    for a, b in zip(*gradients, strict=True):
        same(a, b)
    metrics = [copy.deepcopy(agent).update(x, noise) for x in (batch, changed)]
    for name in metrics[0]:
        torch.testing.assert_close(metrics[0][name], metrics[1][name])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("step", range(K))
def test_an_action_sees_its_own_past_alone(step):
    """And all of it: every earlier token, its own return and observation, not its own action."""
    agent, (batch, _) = make_ddt(), make_windows(7)
    inputs = {name: batch[name] for name in INPUTS}
    before = agent.actor(**inputs)
    for name in ("obs", "action", "return_to_go"):
        changed = {**inputs, name: inputs[name].clone()}
        changed[name][:, :, step] += 1
        changed["action"] = changed["action"] % ACTIONS
        moved = (agent.actor(**changed) - before).abs().amax(-1).amin((0, 1))
        first = step + (name == "action")
        assert not moved[:first].any() and (moved[first:] > 1e-6).all(), name


@pytest.mark.usefixtures("float64")
def test_windows_do_not_see_each_other():
    agent, (batch, _) = make_ddt(), make_windows(8)
    inputs = [batch[name] for name in INPUTS]
    together = agent.actor(*inputs)
    for b in range(WINDOWS):
        same(together[:, b], agent.actor(*[x[:, b : b + 1] for x in inputs])[:, 0])


def test_initial_weights():
    script = load_script("discrete_dt")
    units = {**make_units(torch.zeros(4), torch.ones(4), [0.0], [5.0]), "frame_shape": (4,)}
    agent = script.DiscreteDT(script.TrainConfig(num_seeds=2), units)
    found = {name: p.detach() for name, p in agent.actor.named_parameters()}
    for name, p in found.items():
        if name.startswith(("blocks.", "head")) and "norm" not in name:
            scale = float(p.double().square().mean().sqrt())
            assert scale == pytest.approx(0 if "bias" in name else 0.02, rel=0.05), name
    assert float(found["embed_action.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert found["embed_timestep.weight"].shape == (2, 1000, 128)
    assert found["embed_place.weight"].shape == (2, 90, 128)
    assert not found["embed_timestep.weight"].any() and not found["embed_place.weight"].any()
    assert 0.4 < found["embed_obs.weight"].abs().max() <= 0.5


def test_defaults_are_the_authors():
    cfg = load_script("discrete_dt").TrainConfig()
    assert (cfg.context, cfg.hidden_dim, cfg.hidden_layers, cfg.attention_heads) == (30, 128, 6, 8)
    assert (cfg.dropout, cfg.grad_clip, cfg.weight_decay, cfg.actor_lr) == (0.1, 1.0, 0.1, 6e-4)
    assert (cfg.batch_size, cfg.adam_beta2, cfg.warmup_updates) == (128, 0.95, 3)
    assert (cfg.return_scale, cfg.max_episode_steps, cfg.clip_rewards) == (None, 1000, False)


# ---- windows


class Steps(gym.Env):
    """Episodes of 1 to 7 steps, by seed; frames and rewards that actions change."""

    observation_space = gym.spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = gym.spaces.Discrete(ACTIONS, start=FIRST)

    def look(self):
        g = np.random.default_rng((self.start, self.time, self.state))
        return g.integers(256, size=SHAPE, dtype=np.uint8)

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        self.start, self.time, self.state = seed or 0, 0, 0
        return self.look(), {}

    def step(self, action):
        assert action in self.action_space and isinstance(action, np.integer)
        self.time, self.state = self.time + 1, 3 * self.state + int(action)
        reward, over = self.state % 5 - 1.5, self.time == 1 + self.start % 7
        return self.look(), reward, over, False, {}


gym.register("Steps-v0", Steps)


def image_episodes() -> list:
    rng, episodes = np.random.default_rng(4), []
    for steps, terminated in zip(LENGTHS, (True, False, True), strict=True):
        changes = {"observations": rng.integers(1, 256, (steps + 1, *SHAPE), dtype=np.uint8)}
        changes["actions"] = FIRST + rng.integers(ACTIONS, size=steps)
        episodes.append(toy_episode(rng, steps, terminated, **changes))
    return episodes


@pytest.fixture(scope="module")
def image_store(tmp_path_factory) -> Path:
    spaces = {"observation_space": Steps.observation_space, "action_space": Steps.action_space}
    store = tmp_path_factory.mktemp("images")
    write_dataset(store, TOY, image_episodes(), env=None, **spaces)
    return store


@pytest.fixture(autouse=True)
def image_data(own_store, image_store, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(image_store))


def make_table(change=lambda episodes: episodes, **settings):
    """The agent and the table of the images, of which `change` may make others."""
    script = load_script("discrete_dt")
    cfg = script.TrainConfig(dataset_id=TOY, download=False, num_seeds=2, **{**DATA, **settings})
    episodes, space, metadata = script.load_dataset(cfg, script.DiscreteDT)
    units = {**script.measure(episodes, space, cfg), "frame_shape": metadata["frame_shape"]}
    agent = script.DiscreteDT(cfg, units)
    return agent, agent.table(change(episodes))


def stacked(frames, t: int) -> np.ndarray:
    """The last STACK frames up to t, zeros before the first."""
    empty = np.zeros_like(frames[0])
    last = [frames[i] if i >= 0 else empty for i in range(t - STACK + 1, t + 1)]
    return np.concatenate([frame.ravel() for frame in last]).astype(np.float64)


@pytest.mark.parametrize("encoder", ["minatar", "mlp"])
def test_windows_by_hand(encoder):
    """From every row: never beyond the episode's end, no frame of another, returns to the end."""
    total, row = sum(LENGTHS), 0
    agent, table = make_table(encoder=encoder, normalize_obs=encoder == "mlp")
    assert table["frames"].dtype == torch.uint8
    assert len(table["frames"]) == total + len(LENGTHS)
    batch = agent.gather(table, torch.arange(total).expand(2, -1))
    assert batch.keys() == {*INPUTS, "mask"}
    mean, std = (np.tile(x.numpy(), STACK) for x in (agent.obs_mean, agent.obs_std))
    for episode in image_episodes():
        steps = len(episode.rewards)
        for t in range(steps):
            length = min(6, steps - t)
            for member in range(2):
                window = {name: values[member, row] for name, values in batch.items()}
                assert window["mask"].tolist() == [i < length for i in range(6)]
                assert window["timestep"] == t
                for i in range(6):
                    at = min(t + i, steps - 1)  # what pads is of the same episode
                    seen = torch.as_tensor((stacked(episode.observations, at) - mean) / std)
                    torch.testing.assert_close(
                        window["obs"][i].double(), seen, rtol=1e-5, atol=1e-5
                    )
                    assert window["action"][i] == episode.actions[at] - FIRST
                    left = sum(float(r) for r in episode.rewards[at:]) / 30
                    assert float(window["return_to_go"][i]) == pytest.approx(left, abs=1e-7)
            row += 1
    assert row == total


def test_returns_of_clipped_rewards_and_of_an_unknown_end():
    """The authors' log has clipped rewards; a last step counts whatever followed it."""

    def unknown(episodes):
        last = episodes[1]
        last["obs"] = np.append(last["obs"][:-1], np.full_like(last["obs"][:1], np.nan), 0)
        return episodes

    def floats(episodes):
        for episode in episodes:
            episode["obs"] = episode["obs"].astype(np.float32)
        return unknown(episodes)

    plain = make_table()[1]
    _, table = make_table(floats, clip_rewards=True, target_returns="5")
    assert len(table["return_to_go"]) == sum(LENGTHS)
    expected = []
    for episode in image_episodes():
        clipped = np.clip(episode.rewards.astype(np.float64), -1, 1)
        expected += [clipped[t:].sum() / 30 for t in range(len(clipped))]
    np.testing.assert_allclose(table["return_to_go"].numpy(), expected, atol=1e-6)
    assert not torch.allclose(table["return_to_go"], plain["return_to_go"])
    assert table["frames"].isfinite().all()


def test_settings_that_do_not_fit(refused):
    script = load_script("discrete_dt")

    def line(**settings):
        return words(**{**DATA, "env_id": "none", **settings})

    refused(script, line(max_episode_steps=11), "max_episode_steps is 11", "12 steps", "raise")
    refused(script, line(attention_heads=3), "attention_heads", "hidden_dim")
    refused(script, line(reward_scale=0.1), "reward_scale", "return_scale")
    refused(script, line(reward_shift=-1), "reward_shift", "return_scale")
    refused(script, line(clip_rewards="true"), "target_returns", "clip_rewards")
    refused(script, line(target_returns="much"), "target_returns")
    refused(script, line(encoder="nature"), "encoder", "too small")


def test_the_scale_fits_the_data_unless_it_is_set():
    agent, table = make_table(return_scale=None)
    returns = [float(np.sum(e.rewards, dtype=np.float64)) for e in image_episodes()]
    assert float(agent.return_scale()) == pytest.approx(max(map(abs, returns)), rel=1e-6)
    starts = table["return_to_go"][table["timestep"] == 0]
    assert float(starts.abs().max()) == pytest.approx(1, rel=1e-6)
    assert [float(x) for x in agent.targets()] == pytest.approx([max(returns)], rel=1e-6)


# ---- acting and evaluation


@pytest.mark.usefixtures("float64")
def test_acts_at_the_start_and_later():
    """The most likely action; beyond the table of times, its last row."""
    agent, (batch, _) = make_ddt(target_returns="7, 3"), make_windows(9)
    obs, left, time = 3 * batch["obs"], 20 * batch["return_to_go"], torch.arange(K) + TIMES + 1
    raw, logits = (batch["action"] + FIRST).double().unsqueeze(-1), []
    raw[:, :, -1] = 0  # of the last step the evaluation does not know it
    agent.actor.register_forward_hook(lambda *call: logits.append(call[-1][:, :, -1]))
    actions = agent.act(obs[:, :, 0]), agent.act(obs, raw, left, time)
    mean, std = (x.repeat(STACK) for x in (agent.obs_mean, agent.obs_std))
    for k in range(SEEDS):
        plain = Plain(agent, k)
        for b in range(WINDOWS):
            seen = (obs[k, b] - mean) / std
            first = plain.forward(seen[:1], [0], torch.tensor([0.7]), 0)
            later = plain.forward(seen, batch["action"][k, b], left[k, b] / 10, TIMES - 1)
            for action, ours, expected in zip(actions, logits, (first, later), strict=True):
                same(ours[k, b], expected[-1], "logits")
                assert action[k, b].tolist() == [FIRST + int(expected[-1].argmax())]
    assert actions[0].shape == (SEEDS, WINDOWS, 1) and len(actions[0].unique()) > 1


def plain_episode(plain, agent, told, seed: int, target: float) -> tuple[float, int, list]:
    """One episode; `told` are the windows that the agent acted by, which must be those by hand."""
    env, over, total, left = Steps(), False, 0.0, [target]
    frames, actions, context = [env.reset(seed=seed)[0]], [], agent.cfg.context
    mean, std = (x.double().repeat(STACK) for x in (agent.obs_mean, agent.obs_std))
    while not over:
        t = len(actions)
        begin = max(0, t + 1 - context)
        obs = torch.as_tensor(np.stack([stacked(frames, i) for i in range(begin, t + 1)]))
        same(told[t]["obs"], obs, "frames")
        same(told[t]["action"][:-1, 0], torch.tensor(actions[begin:]).double(), "actions")
        same(told[t]["return_to_go"], torch.tensor(left[begin:]).double(), "what is left")
        assert told[t]["timestep"].tolist() == list(range(begin, t + 1))
        numbers = [action - FIRST for action in actions[begin:]] + [0]
        inputs = (numbers, torch.tensor(left[begin:]).double() / agent.cfg.return_scale)
        logits = plain.forward((obs - mean) / std, *inputs, begin)[-1]
        actions.append(FIRST + int(logits.argmax()))
        frame, reward, over, _, _ = env.step(np.int64(actions[-1]))
        frames.append(frame)
        total, left = total + reward, [*left, left[-1] - reward]
    return total, len(actions), actions


def test_evaluation_equals_a_plain_loop(monkeypatch):
    """Every action of every episode, from the frames, actions and returns of the last K steps."""
    script, told, taken, agents = load_script("discrete_dt"), [], [], set()
    act = script.DiscreteDT.act

    def spy(agent, *window):
        agents.add(agent if agent in agents else loud(agent))
        told.append(dict(zip(("obs", "action", "return_to_go", "timestep"), window, strict=True)))
        return act(agent, *window)

    monkeypatch.setattr(script.DiscreteDT, "act", spy)
    settings = {**DATA, "env_id": "Steps-v0", "num_seeds": 2, "seed": 7, "eval_seed": 125}
    settings |= {"context": 3, "target_returns": "20, -20", "eval_episodes": 0, "eval_epsilon": 0}
    settings |= {"hidden_layers": 2, "num_updates": 1}
    assert script.main(words(**settings, final_eval_episodes=2)) == 0
    (agent,), logged = agents, rows("run/episodes.jsonl")
    assert len(told) == 7 and len(logged) == 8  # two episodes, 7 steps and 1
    for row, at in zip(logged, [(k, column) for k in range(2) for column in range(4)], strict=True):
        own = [{n: x[at] if n != "timestep" else x for n, x in window.items()} for window in told]
        seed, target = 125 + row["episode"], (20.0, -20.0)[at[1] // 2]
        plain = Plain(agent, at[0])
        total, length, actions = plain_episode(plain, agent, own, seed, target)
        assert (row["seed"], row["target"], row["episode"]) == (7 + at[0], target, at[1] % 2)
        assert (row["return"], row["length"]) == (pytest.approx(total), length)
        taken.append(actions)
    assert len({action for actions in taken for action in actions}) > 1, taken
    assert taken[0] != taken[2] or taken[4] != taken[6], "the target changes nothing"
