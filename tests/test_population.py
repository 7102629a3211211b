"""Laws that hold for every script: seeds as a tensor axis, Adam, targets, devices, compiling.

A short run on the toy data is recorded (what its agent is made of, what `update` is given); the
laws are then tried on agents made anew from the record, so no test knows an algorithm.
"""

import copy
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, load_script, words
from test_runs import agent_of, crash_at, leaves, rows, saved
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEEDS = 3
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# Set where a script has the field, so that more of it runs: dropout draws noise, a large tau shows.
THOROUGH = {"actor_dropout": 0.3, "normalize_obs": "true", "tau": 0.1}
# Phases that a short run reaches, a learned multiplier, a small network beside hidden_dim's.
THOROUGH |= {"behavior_updates": 1, "warm_start": 2, "learn_alpha": "true", "vae_hidden_dim": 16}
THOROUGH |= {"action_noise": 0.1, "random_actions": 2, "value_updates": 2}  # more of V's actions
THOROUGH |= {"vae_updates": 2}
METRIC = re.compile(r"(train|eval|time|online)/[a-z0-9_]+")


def line(script, **settings) -> list[str]:
    """The command line of a short run without evaluation, unless `settings` want one."""
    more = {k: v for k, v in THOROUGH.items() if k in script.TrainConfig.__dataclass_fields__}
    return words(**{"env_id": "none", "compile": "false", **more, **settings})


class Record:
    """A short run: its script, folder, agent, a maker of equal new ones, arguments of updates."""

    def __init__(self, script):
        self.script, self.calls, self.names = script, [], set()

    def new(self):
        return type(self.agent)(*copy.deepcopy(self.args))


def record(script, monkeypatch, run_dir: str = "recorded", **settings) -> Record:
    """Train, and keep what the agent was given."""
    agent_class, kept = agent_of(script), Record(script)

    def init(self, *args):
        kept.agent, kept.args = self, copy.deepcopy(args)
        original_init(self, *args)

    def update(self, *args):
        kept.calls.append(pytree.tree_map_only(torch.Tensor, torch.clone, args))
        metrics = original_update(self, *args)
        kept.names |= metrics.keys()
        return metrics

    original_init, original_update = agent_class.__init__, agent_class.update
    with monkeypatch.context() as patch:
        patch.setattr(agent_class, "__init__", init)
        patch.setattr(agent_class, "update", update)
        assert script.main(line(script, run_dir=run_dir, **{"num_seeds": SEEDS, **settings})) == 0
    assert kept.calls
    return kept


@pytest.fixture
def recorded(script, monkeypatch):
    return record(script, monkeypatch)


def update_all(update, calls) -> list[dict]:
    """The recorded updates, each on copies of its arguments."""
    return [update(*pytree.tree_map_only(torch.Tensor, torch.clone, args)) for args in calls]


def of_members(agent) -> dict:
    """All that training changes, weights, targets, moments; [S*E, ...] as [S, E, ...]."""
    state = {k: x for k, x in agent.state_dict().items() if k not in agent.units}
    own = {k: x.unflatten(0, (SEEDS, -1)) for k, x in state.items() if not k.endswith(".steps")}
    assert own and any("_adam.m0" in name for name in own)
    return own


# ---- the two laws


@pytest.mark.parametrize("change", ["batch and noise", "weights", "not a number"])
def test_no_cross_talk(recorded, change):
    """What happens to member 1 changes nothing of members 0 and 2, to the bit."""
    plain, changed = recorded.new(), recorded.new()
    calls = copy.deepcopy(recorded.calls)
    g = torch.Generator().manual_seed(0)
    for batch, noise, *_ in calls if change != "weights" else ():
        for name, values in {**batch, **noise}.items():
            if name == "terminated":
                values[1] = 1 - values[1]
            elif change == "not a number" and name in batch and values.is_floating_point():
                values[1] = math.nan
            elif values.is_floating_point():
                values[1] = torch.rand(values[1].shape, generator=g)
    if change == "weights":
        for p in changed.parameters():
            own = p.detach().unflatten(0, (SEEDS, -1))[1]
            own += torch.rand(own.shape, generator=g)
    expected, found = (
        update_all(agent.update, each)
        for agent, each in ((plain, recorded.calls), (changed, calls))
    )
    for before, after in zip(expected, found, strict=True):
        for name in before:
            assert before[name].shape == (SEEDS,), f"metric {name} has no value per member"
            assert torch.equal(before[name][[0, 2]], after[name][[0, 2]]), name
        assert any(not torch.equal(before[name][1], after[name][1]) for name in before)
    expected, found = of_members(plain), of_members(changed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name][[0, 2]], found[name][[0, 2]]), name
    assert any(not torch.equal(expected[name][1], found[name][1]) for name in expected)


def test_alone_or_together(script, monkeypatch):
    """Member k of a population is the solo run of its seed: start, weights, logs, evaluation."""
    run = {"num_updates": 40, "env_id": "auto", "eval_every": 20, "log_every": 10}
    together = record(script, monkeypatch, "together", seed=5, **run)
    start, end = of_members(together.new()), of_members(together.agent)
    for k in range(SEEDS):
        alone = record(script, monkeypatch, f"alone{k}", seed=5 + k, num_seeds=1, **run)
        for ours, theirs in zip(together.calls, alone.calls, strict=True):
            for name in (ours[0] | ours[1]).keys():
                member_, solo = (args[0].get(name, args[1].get(name)) for args in (ours, theirs))
                assert torch.equal(member_[k], solo[0]), f"{name} is drawn differently"
        solo_start, solo_end = alone.new().state_dict(), alone.agent.state_dict()
        for name in start:
            assert torch.equal(start[name][k], solo_start[name]), f"{name} starts differently"
        for name in end:
            close(end[name][k], solo_end[name], name)
        for file in ("metrics.jsonl", "episodes.jsonl"):
            ours = [row for row in rows(f"together/{file}") if row["seed"] == 5 + k]
            theirs = rows(f"alone{k}/{file}")
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def close(actual, expected, what: str, rtol: float = 1e-4) -> None:
    """Equal relative to the tensor's largest entry: small ones carry the sums' rounding."""
    scale = max(float(expected.abs().max()), 1e-8)
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=rtol * scale, msg=lambda text: f"{what}: {text}"
    )


def test_members_differ(recorded):
    """Every weight matrix, and all that is drawn, differs between members and within ensembles."""
    for agent in (recorded.new(), recorded.agent):
        for name, p in agent.named_parameters():
            if p.dim() == 3 and p.shape[1] > 1 and p.any():  # not biases and constants
                rows_of = p.detach().flatten(1)
                assert len(torch.unique(rows_of, dim=0)) == len(rows_of), name
    for batch, noise, *_ in recorded.calls:
        for values in (batch["obs"], *noise.values()):
            assert not any(torch.equal(values[i], values[i - 1]) for i in range(SEEDS))
    drawn = [args[0]["obs"] for args in recorded.calls]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))


def test_runs_repeat_to_the_bit(script):
    for name in ("one", "two"):
        assert script.main(line(script, run_dir=name, env_id="auto", num_seeds=2)) == 0
    ours, theirs = (dict(leaves(saved(name)["agent"])) for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    for file in ("metrics.jsonl", "episodes.jsonl"):
        assert rows(f"one/{file}") == rows(f"two/{file}")


def test_metrics_are_finite_and_named_well(script, monkeypatch):
    kept, found = record(script, monkeypatch, env_id="auto"), set()
    for text in Path("recorded/metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(text).items():
            assert name in ("update", "seed", "final") or METRIC.fullmatch(name), name
            assert math.isfinite(value), name
            found.add(name)
    logged = {f"train/{name}" for name in kept.names}
    evaluated = {f"eval/{name}" for name in ("return", "score", "length")}
    timed = {"time/updates_per_second", "time/evaluation_seconds"}
    assert found == {"update", "seed", "final"} | logged | evaluated | timed
    missing = [name for name in logged if f"`{name}`" not in script.__doc__]
    assert not missing, f"the docstring does not say what these metrics mean: {missing}"


# ---- layers


def test_layers_start_within_one_over_the_root_of_fan_in(script):
    """Also in ensembles, and for each of their networks: the bound is not that of fan-out."""
    for in_dim, out_dim in ((200, 4), (4, 200)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
        layer, bound = script.Linear(generators, in_dim, out_dim, ensemble=2), in_dim**-0.5
        assert layer.weight.shape == (SEEDS * 2, in_dim, out_dim)
        assert layer.bias.shape == (SEEDS * 2, 1, out_dim)
        for weight in layer.weight.detach():
            assert 0.98 * bound < weight.abs().max() <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(weight.mean()) < 0.1 * bound
        for bias in layer.bias.detach():
            assert 0.1 * bound < bias.abs().max() <= bound
        alone = script.Linear([torch.Generator().manual_seed(2)], in_dim, out_dim, ensemble=2)
        assert torch.equal(alone.weight, layer.weight[4:])
        x = torch.randn(SEEDS * 2, 7, in_dim)
        for i, y in enumerate(layer(x)):
            torch.testing.assert_close(y, x[i] @ layer.weight[i] + layer.bias[i, 0])


def test_an_agents_layers_keep_that_bound(recorded, script):
    layers = [m for m in recorded.new().modules() if isinstance(m, script.Linear)]
    assert layers
    for layer in layers:
        bound = layer.weight.shape[1] ** -0.5
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound


# ---- Adam and targets


def targets_of(agent) -> dict:
    """Target module -> the module it follows: `target_critic` follows `critic`."""
    modules = dict(agent.named_children())
    return {m: modules[n.removeprefix("target_")] for n, m in modules.items() if "target_" in n}


def check_adams(agent, script) -> None:
    held = [p for m in agent.modules() if isinstance(m, script.Adam) for p in m.params]
    for name, p in agent.named_parameters():
        times = sum(p is other for other in held)
        assert times == (1 if p.requires_grad else 0), f"{name} is in {times} Adams"
    assert len(held) == sum(p.requires_grad for p in agent.parameters())
    for target in targets_of(agent):
        assert not any(p.requires_grad for p in target.parameters())


def test_adams_hold_each_parameter_once_and_no_target(recorded, script, monkeypatch):
    """Also in a new run from the checkpoint, and in the same run after a crash."""
    again = record(script, monkeypatch, "again", checkpoint="recorded", num_updates=8)
    crash_at(monkeypatch, script, line(script, run_dir="cut", num_seeds=SEEDS), 5)
    resumed = record(script, monkeypatch, "cut", resume="true")
    assert (len(again.calls), len(resumed.calls)) == (2, 3)
    for agent in (recorded.new(), recorded.agent, again.agent, resumed.agent):
        check_adams(agent, script)
        memory = [p.data_ptr() for p in agent.parameters()]
        assert len(set(memory)) == len(memory), "a target shares memory with its network"
    start = dict(recorded.new().named_parameters())
    for name, p in recorded.agent.named_parameters():
        assert not torch.equal(p, start[name]), f"{name} never moved"
    for name, x in recorded.agent.state_dict().items():
        assert torch.equal(resumed.agent.state_dict()[name], x), name


def test_targets_move_by_tau_towards_the_new_weights(recorded):
    agent = recorded.new()
    targets = targets_of(agent)
    assert bool(targets) == (hasattr(agent.cfg, "tau"))
    for target in targets:
        for p in target.parameters():
            p.data.add_(torch.rand_like(p))
    moves = 0
    for args in recorded.calls:
        before = [copy.deepcopy(target) for target in targets]
        agent.update(*args)
        for old, (target, online) in zip(before, targets.items(), strict=True):
            sides = (old.parameters(), target.parameters(), online.parameters())
            moved = [not torch.equal(a, b) for a, b, _ in zip(*sides, strict=True)]
            sides = (old.parameters(), target.parameters(), online.parameters())
            assert all(moved) or not any(moved), "only a part of a target moved"
            moves += any(moved)
            for was, now, new in zip(*sides, strict=True) if any(moved) else ():
                expected = was.double() + agent.cfg.tau * (new.double() - was.double())
                torch.testing.assert_close(now.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert moves or not targets


# ---- fresh process


FRESH = """
import importlib.util, json, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("fresh", sys.argv[1])
script = sys.modules["fresh"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
saved = script.read_checkpoint("recorded")
agent_class = vars(script)[saved["about"]["algorithm"]]
units = {name: saved["agent"][name] for name in agent_class.units}
units |= {name: torch.ones_like(units[name]) for name in ("obs_mean", "obs_std", "return_range")}
agent = agent_class(script.TrainConfig(**saved["config"]), units)
agent.load_state_dict(saved["agent"])
place = script.find_environment(agent.cfg, saved["about"], agent)
torch.save(agent.act(torch.load("obs.pt")), "action.pt")
print(json.dumps(script.evaluate(agent, *place, 3)))
"""


def test_a_saved_policy_acts_the_same_in_a_fresh_process(script, monkeypatch):
    """The checkpoint holds all that acting needs: the same actions and episodes to the bit."""
    kept = record(script, monkeypatch, env_id="auto", num_updates=40)
    obs_std = kept.agent.obs_std
    assert not torch.equal(obs_std, torch.ones_like(obs_std)), "nothing would be normalised"
    g = torch.Generator().manual_seed(3)
    obs = 5 * torch.randn(SEEDS, 11, len(obs_std), generator=g)
    torch.save(obs, "obs.pt")
    argv = [sys.executable, "-c", FRESH, script.__file__]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    action = kept.agent.act(obs)
    kinds = 2 if action.dtype == torch.int64 else 11
    assert action.abs().max() <= 2 and len(torch.unique(action)) >= kinds
    assert torch.equal(torch.load("action.pt"), action)
    final = [row for row in rows("recorded/episodes.jsonl") if row["final"]]
    assert [{"update": 40, "final": True, **row} for row in json.loads(done.stdout)] == final


# ---- devices and compiling


class OneDevice(TorchDispatchMode):
    """Fails where an operation sees, makes or copies to a tensor outside of `device`, or waits."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select")

    def __init__(self, device: str):
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} makes the host wait for the device"
        result = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                assert x.device.type == self.device, f"{name} with a tensor on {x.device}"
        self.seen += 1
        return result


@pytest.fixture
def meta_works():
    """What torch lacks: `to("meta")` keeps parameters, and Adam's kernel takes a tensor as rate."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        for name in ("_fused_adam_", "_fused_adamw_"):
            library.impl(f"{name}.tensor_lr", lambda *_, **__: None)
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("meta_works")
def test_updates_stay_on_the_device(recorded, script):
    """On meta, where no value exists: nothing can be read by the host, nothing comes from it."""
    agent = recorded.new().to("meta")
    check_adams(agent, script)
    calls = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), recorded.calls)
    obs = torch.empty(SEEDS, 4, agent.obs_dim, device="meta")
    with OneDevice("meta") as mode:
        for args in calls:
            metrics = agent.update(*args)
            for name, value in metrics.items():
                assert value.shape == (SEEDS,) and not value.requires_grad, name
        assert agent.act(obs).shape == (SEEDS, 4, agent.act_dim)
    assert mode.seen > 10


def test_weights_are_sliced_only_where_a_part_is_meant():
    """The gradient of a slice is a copy of the whole weight, which took a tenth of an update."""

    def slices(**call):
        seen, nodes = [], [mlp(torch.ones(2, 4, 3), **call).sum().grad_fn]
        while nodes:
            nodes += [node for node, _ in nodes[0].next_functions if node]
            seen.append(nodes.pop(0).name())
        return seen.count("SliceBackward0")

    script = load_script("rebrac")
    generators = [script.generator(seed, "init") for seed in range(2)]
    mlp = script.MLP(generators, 3, [5, 5], 1, ensemble=2, norm=script.LayerNorm)
    assert slices() == 0 and slices(first=True) > 0


@pytest.mark.parametrize(
    "trap",
    [
        "x.sum().item()",
        "x + torch.ones(3)",
        "x + torch.tensor(1.0)",
        "float(x[0])",
        "bool(x.any())",
        "x[torch.tensor([0])]",
        "x[x > 0]",
        "x.cpu()",
        "x * torch.zeros(())",
    ],
)
def test_the_device_test_has_teeth(trap):
    x = torch.empty(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OneDevice("meta"):
        eval(trap, {"x": x, "torch": torch})


def same_compiled(script, monkeypatch, backend, device="cpu", wish="true") -> None:
    """20 updates, compiled as the frame does it: one graph for each variant of the update.

    In float64: in float32 a unit of a ReLU may be 0 for one and not for the other.
    """
    kept = record(script, monkeypatch, num_updates=20, hidden_layers=1, device=device)
    eager, compiled = (kept.new().to(device).double() for _ in range(2))
    double = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    calls = pytree.tree_map_only(torch.Tensor, double, kept.calls)
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, **{**kw, "backend": backend}))
    cfg = dataclasses.replace(compiled.cfg, compile=wish)
    update = script.compiled(compiled.update, cfg, torch.device(device))
    torch._dynamo.utils.counters.clear()
    found = update_all(update, calls)
    variants = {tuple(variant) for _, _, *variant in kept.calls}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(variants)
    for ours, theirs in zip(found, update_all(eager.update, calls), strict=True):
        for name in ours:
            close(ours[name], theirs[name], name, 1e-7)
    ours, theirs = compiled.state_dict(), eager.state_dict()
    for name in theirs:
        close(ours[name], theirs[name], name, 1e-7)


def looking(unplaced: list):
    """A backend without a compiler: it traces, and the graphs run as they are.

    It keeps which of the inputs that a graph changes may move in memory: torch leaves CUDA graphs
    out for these, and says so in a log line that nobody reads.
    """

    def look(graph, _):
        about = torch._guards.TracingContext.get().fw_metadata
        changed = set(about.mutated_inp_runtime_indices)
        unplaced.append(sorted(changed - set(about.static_input_indices)))
        return graph

    return aot_autograd(fw_compiler=look, inference_compiler=look)


def test_compiled_equals_eager(script, monkeypatch):
    unplaced = []
    same_compiled(script, monkeypatch, looking(unplaced))
    assert unplaced and not any(unplaced)


def test_the_look_at_places_has_teeth():
    unplaced = []
    torch.compile(lambda x: x.add_(1), backend=looking(unplaced))(torch.ones(2))
    assert unplaced == [[0]]


def compiler_works() -> bool:
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in ("bc", "iql") if name in SCRIPTS])
def test_compiled_by_inductor_equals_eager(name, monkeypatch):
    """The slow one: `-k 'not inductor'` leaves it out."""
    if not compiler_works():
        pytest.skip("torch.compile finds no C++ compiler here")
    same_compiled(load_script(name), monkeypatch, "inductor")


# ---- with a GPU


@cuda
def test_updates_are_equal_on_cuda(recorded):
    """To the CPU's, and without the host waiting for the GPU."""
    cpu, gpu = recorded.new(), recorded.new().to("cuda")
    calls = pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), recorded.calls)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with OneDevice("cuda"):
            found = [gpu.update(*args) for args in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, update_all(cpu.update, recorded.calls), strict=True):
        for name in ours:
            close(ours[name].cpu(), theirs[name], name, 1e-3)


@cuda
@pytest.mark.parametrize("wish", ["true", "graphs"])
def test_compiled_equals_eager_on_cuda(script, monkeypatch, wish):
    same_compiled(script, monkeypatch, "inductor", "cuda", wish)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert not skipped, "it ran, but not as CUDA graphs"


@cuda
@pytest.mark.parametrize("members", [1, 4, 32])
def test_first_member_of_any_population_on_cuda(script, members, monkeypatch):
    run = {"device": "cuda", "num_updates": 20}
    kept = record(script, monkeypatch, "together", num_seeds=members, **run)
    alone = record(script, monkeypatch, "alone", num_seeds=1, **run)
    ours = kept.agent.state_dict()
    for name, theirs in alone.agent.state_dict().items():
        close(ours[name][: len(theirs)], theirs, name, 1e-3)


@cuda
def test_a_run_on_cuda_goes_on_and_moves_to_the_cpu(script, monkeypatch):
    run = {"device": "cuda", "num_updates": 40, "checkpoint_every": 20, "env_id": "auto"}
    whole = record(script, monkeypatch, "whole", **run)
    stopped = line(script, run_dir="parts", num_seeds=SEEDS, **run)
    crash_at(monkeypatch, script, stopped, 31)
    assert script.main(["--run_dir", "parts", "--resume", "true"]) == 0
    found, expected = saved("parts")["agent"], saved("whole")["agent"]
    for name, value in expected.items():
        assert value.device.type == "cuda"
        close(found[name], value, name, 1e-3)
    agent = whole.new()
    agent.load_state_dict(expected)
    obs = torch.randn(SEEDS, 5, agent.obs_dim)
    close(whole.agent.act(obs.cuda()).cpu(), agent.act(obs), "actions", 1e-3)


@cuda
def test_updates_keep_no_memory_on_cuda(script, monkeypatch):
    kept = record(script, monkeypatch, device="cuda", num_updates=20)
    agent = kept.new().to("cuda")
    update_all(agent.update, kept.calls)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        update_all(agent.update, kept.calls)
    assert torch.cuda.memory_allocated() <= before
