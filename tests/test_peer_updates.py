"""Three updates of each algorithm against the numbers that other people's code gave: peer_updates/.

The files hold weights, batches, random numbers and losses of the authors' or CORL's code; their
README.md says how they were made and what the keys mean. Member 1 of two repeats the updates.
"""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DISCRETE, REPOSITORY, SCRIPTS, load_script
from plain import make_units

FOLDER, BOUND = Path(__file__).parent / "peer_updates", 1e-8
FILES = sorted(path.stem for path in FOLDER.glob("*.npz"))
WINDOWS = {"obs": "states", "action": "actions", "return_to_go": "returns"}
WINDOWS |= {"timestep": "time_steps"}


def load(name: str) -> tuple[dict, dict, dict]:
    """The settings of a file, what they say of the script, and the arrays."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    settings = json.loads(str(arrays.pop("settings")))
    return settings, settings["stitch"], {k: torch.from_numpy(v) for k, v in arrays.items()}


def make_agent(stitch: dict, arrays: dict, patch) -> torch.nn.Module:
    """A population of two in float64, brought in line with the peer."""
    script = load_script(Path(stitch["script"]).stem)
    names = ("obs_mean", "obs_std", "action_low", "action_high")
    units = make_units(*[arrays[f"env/{name}"] for name in names])
    cfg = script.TrainConfig(**stitch["config"], batch_size=8, num_seeds=2)
    agent = getattr(script, stitch["agent"])(cfg, units).double()
    for name, eps in stitch.get("optimizer_eps", {}).items():
        getattr(agent, name.replace("optimizer", "adam")).options["eps"] = eps
    if "layer_norm_eps" in stitch:
        norm = functools.partial(script.F.layer_norm, eps=stitch["layer_norm_eps"])
        patch.setattr(script.F, "layer_norm", norm)
    if stitch.get("policy") == "free":  # CORL's AWAC
        free = lambda self, obs: (self.mean(obs), self.log_std_logit.clamp(-20, 2))  # noqa: E731
        patch.setattr(script.Policy, "forward", free)
    return agent


def peer_weights(stitch: dict, arrays: dict, agent, t: int) -> dict:
    """The peer's weights after t updates, named and shaped as those of one member."""
    weights = {}
    for name, parameter in agent.named_parameters():
        source = stitch["weights"][name]
        networks = [
            torch.cat([torch.atleast_1d(arrays[f"weights/{part}"][t]) for part in parts])
            for parts in source["peer"]
        ]
        networks = [x.mT if source["form"] == "matrix" else x for x in networks]
        rows = torch.stack([x[: source.get("rows")] for x in networks])
        weights[name] = rows.reshape(member(parameter).shape)
    assert weights.keys() == stitch["weights"].keys()
    return weights


def member(values: torch.Tensor) -> torch.Tensor:
    """Member 1's part."""
    return values.detach().chunk(2)[1]


def read_batch(arrays: dict, agent, t: int) -> dict:
    """Both members get the batch of an update, member 0 in another order."""
    if "batch/rows" in arrays:
        return read_windows(arrays, agent, t)
    env, seen = (
        {k.split("/")[-1]: v[t] for k, v in arrays.items() if k.startswith(f"batch/{units}/")}
        for units in ("env", "seen")
    )
    rows = agent.rows(env | {"obs": torch.cat([env["obs"], env["obs"][-1:]])})  # of one episode
    for name in rows.keys() & {"obs", "action", "reward"}:
        expected = seen[name][: len(rows[name])]  # ReBRAC leaves out a last row that goes on
        torch.testing.assert_close(rows[name], expected, rtol=1e-12, atol=1e-14)
    return {name: torch.stack([values.flip(0), values]) for name, values in seen.items()}


def read_windows(arrays: dict, agent, t: int) -> dict:
    """Windows of the peer's episodes, which are its windows but for what pads them."""
    names, each = ("obs", "action", "reward", "terminated"), []
    for first, end in itertools.pairwise(arrays["data/starts"].tolist()):
        episode = {name: arrays[f"data/env/{name}"][first:end] for name in names}
        episode["obs"] = torch.cat([episode["obs"], episode["obs"][-1:]])  # the last: not read
        each.append(agent.rows(episode))
    table = {name: torch.cat([rows[name] for rows in each]) for name in each[0]}
    rows, mask = arrays["batch/rows"][t], arrays["batch/seen/mask"][t].bool()
    batch = agent.gather(table, torch.stack([rows.flip(0), rows]))
    assert torch.equal(batch["mask"][1], mask)
    for name, theirs in WINDOWS.items():
        expected = arrays[f"batch/seen/{theirs}"][t][mask]
        torch.testing.assert_close(batch[name][1][mask], expected, check_dtype=False)
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def read_noise(arrays: dict, agent, t: int) -> dict:
    """The peer's random numbers as the script names and shapes them, for both members."""
    noise = {k.split("/")[-1]: v[t] for k, v in arrays.items() if k.startswith("noise/")}
    if "uniform" in noise:  # CQL and Cal-QL: [B, n, act_dim]
        by_action = {k: v.transpose(0, 1) for k, v in noise.items() if v.dim() == 3}
        policy = torch.cat([by_action["current"], by_action["next"]], 1)
        uniform = (by_action["uniform"] + 1) / 2
        noise = {"policy": policy, "uniform": uniform, "actor": noise["actor"]}
    if "encoder" in noise:  # BCQ: the candidates of a transition are neighbours
        noise["target"] = noise["target"].unflatten(0, (8, -1)).transpose(0, 1)
    shapes = {name: tuple(shape) for name, (_, shape) in agent.noise_shapes.items()}
    assert {name: tuple(values.shape) for name, values in noise.items()} == shapes
    return {name: torch.stack([values, values]) for name, values in noise.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FILES)
def test_updates_equal_the_peers(name, monkeypatch):
    settings, stitch, arrays = load(name)
    agent = make_agent(stitch, arrays, monkeypatch)
    start, g = peer_weights(stitch, arrays, agent, 0), torch.Generator().manual_seed(0)
    for key, parameter in agent.named_parameters():
        parameter.detach().add_(0.1 * torch.randn(parameter.shape, generator=g))  # of member 0
        member(parameter).copy_(start[key])
    for t in range(3):
        moves = settings.get("moves_actor")
        variant = (moves[t],) if moves else agent.variant(t)
        batch, noise = read_batch(arrays, agent, t), read_noise(arrays, agent, t)
        metrics = agent.update(batch, noise, *variant)
        for key, expected in peer_weights(stitch, arrays, agent, t + 1).items():
            moved = (expected - start[key]).abs().max()
            error = (member(agent.get_parameter(key)) - expected).abs().max()
            assert error <= BOUND * moved, f"{key} after update {t + 1}: {error / moved:.1e}"
        for key, parts in stitch["losses"].items():
            expected = sum(factor * float(arrays[f"losses/{part}"][t]) for factor, part in parts)
            if not np.isnan(expected):  # which the peer did not log
                assert float(metrics[key][1]) == pytest.approx(expected, rel=BOUND, abs=0), key


def test_every_algorithm_has_a_peer():
    """But BRAC, whose authors' code needs TensorFlow 1, EDAC (its D1), X-QL and discrete ones.

    README's table says the same, with the bound.
    """
    scripts = {Path(load(name)[1]["script"]).stem for name in FILES}
    without = {"brac", "edac", "xql", *DISCRETE}
    assert scripts == set(SCRIPTS) - without and len(FILES) == 16
    rows = {"CORL": set(), "the authors": set(), "none": without}
    for settings, stitch, _ in map(load, FILES):
        kind = next(name for name in rows if settings["peer"].startswith(name))
        rows[kind].add(Path(stitch["script"]).stem)
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"{BOUND:g}".replace("e-0", "e-") in text
    for kind, expected in rows.items():
        (line,) = [x for x in text.splitlines() if x.startswith((f"| {kind}", f"| [{kind}]"))]
        assert set(re.findall(r"`(\w+)`", line)) == expected
