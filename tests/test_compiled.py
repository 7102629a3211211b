"""A compiled update in a run: steps of Adam, schedules, resume, going online, CUDA graphs."""

import itertools
import types

import pytest
import torch
from conftest import load_script, words
from test_online import line
from test_population import close
from test_runs import Crash, crash, rows, saved

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = {"hidden_layers": 1}  # fewer nodes to trace
KINDS = {
    "Adam": (torch.optim.Adam, 0.0, False),
    "Adam with an L2 penalty": (torch.optim.Adam, 0.1, False),
    "AdamW": (torch.optim.AdamW, 0.1, True),
}


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: it traces, and the graphs run as they are."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: compile_(f, **{**kw, "backend": "aot_eager"})
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_torch_optims(iql, kind, scheduled):
    """Five steps, eager and in a graph, of a constant rate and of one that changes."""
    optimizer_class, decay, decoupled = KINDS[kind]
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(3, 1 + i, 5)) for i in range(3)]
    optimizer = optimizer_class(theirs, lr=0.1, weight_decay=decay, fused=False)
    options = {"weight_decay": decay, "decoupled_weight_decay": decoupled}
    adams = [
        iql.Adam([torch.nn.Parameter(p.detach().clone()) for p in theirs], 0.1, **options)
        for _ in range(2)
    ]
    steps = [adams[0].step, torch.compile(adams[1].step, fullgraph=True)]
    for number in range(5):
        rate = 0.125 / 2**number if scheduled else 0.1
        optimizer.param_groups[0]["lr"] = rate
        gradients = [torch.randn(p.shape[0], p.shape[2], p.shape[1]).mT for p in theirs]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        for step in steps:  # strides are not those of the parameters
            step(gradients, torch.tensor(rate) if scheduled else None)
    assert graphs() == 1
    for adam in adams:
        assert (adam.steps == 5).all() and len(adam.steps) == 3
        for i, (ours, p) in enumerate(zip(adam.params, theirs, strict=True)):
            close(ours.detach(), p.detach(), "weight", 1e-5)
            for letter, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                close(getattr(adam, f"{letter}{i}"), optimizer.state[p][name], name, 1e-6)


def same_agent(one, other) -> None:
    ours, theirs = (saved(folder)["agent"] for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        close(ours[name], value, name)


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_follows_its_schedule_and_resumes(iql, monkeypatch):
    """As an eager one, to rounding; one that was cut, as the whole one, to the bit."""
    settings = {**SMALL, "num_updates": 11, "checkpoint_every": 6, "env_id": "none"}
    assert iql.main(words(run_dir="eager", compile="false", **settings)) == 0
    assert iql.main(words(run_dir="whole", compile="true", **settings)) == 0
    assert graphs() == 1
    same_agent("whole", "eager")
    save = iql.Run.save
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(iql.Run, "save", lambda run: save(run) or crash())
        iql.main(words(run_dir="cut", compile="true", **settings))
    assert saved("cut")["step"] == 6
    torch._dynamo.reset()
    assert iql.main(["--run_dir", "cut", "--resume", "true"]) == 0
    ours, theirs = saved("cut")["agent"], saved("whole")["agent"]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert rows("cut/metrics.jsonl") == rows("whole/metrics.jsonl")


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_goes_online():
    """ReBRAC's penalties fall with every step there, and take no graphs of their own."""
    script = load_script("rebrac")
    for mode in ("false", "true"):
        settings = {**SMALL, "run_dir": mode, "compile": mode, "online_steps": 12}
        assert script.main(line(script, **settings)) == 0
    assert graphs() == 2  # without and with a step of the policy
    same_agent("true", "false")


def backend_fails(*_):
    raise OSError("the compiler was killed")


@pytest.mark.parametrize("why", ["the backend fails", "there is no C++ compiler"])
def test_an_update_that_does_not_compile_goes_on_without(iql, monkeypatch, capsys, why):
    if why == "the backend fails":
        compile_ = torch.compile
        patched = lambda f, **kw: compile_(f, **{**kw, "backend": backend_fails})  # noqa: E731
        monkeypatch.setattr(torch, "compile", patched)
    else:
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    settings = {**SMALL, "num_updates": 11, "env_id": "none"}
    assert iql.main(words(run_dir="tried", compile="true", **settings)) == 0
    told = [text for text in capsys.readouterr().out.splitlines() if "going on without" in text]
    assert len(told) == 1 and told[0].startswith("compile: the update fails (")
    assert iql.main(words(run_dir="eager", compile="false", **settings)) == 0
    same_agent("tried", "eager")


@pytest.mark.parametrize("device, enough", [(CPU, 20_000), (CUDA, 5_000)])
def test_auto_says_what_it_chose(iql, monkeypatch, capsys, device, enough):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: asked.append(f) or f)
    for updates, chosen in ((enough - 1, "off"), (enough, "on")):
        iql.compiled(update := object(), iql.TrainConfig(num_updates=updates), device)
        assert asked == ([update] if chosen == "on" else [])
        told = f"compile: {chosen} (auto is on from {enough:,} updates)"
        assert capsys.readouterr().out.splitlines() == [told]


# ---- CUDA graphs


def test_metrics_outlive_the_next_replay(iql, monkeypatch):
    """A CUDA graph writes into the same memory each time."""
    memory, asked, numbers = {"loss": torch.zeros(2)}, {}, iter(range(3))

    def update(batch, noise):  # noqa: ARG001
        memory["loss"].fill_(next(numbers))
        return memory

    monkeypatch.setattr(torch, "compile", lambda f, **kw: asked.update(kw) or f)
    run = iql.Run(iql.TrainConfig(dataset_id="any", compile="graphs"), "IQL")
    run.graph, run.batches = iql.compiled(update, run.cfg, CUDA), itertools.repeat(({}, {}))
    run.agent = types.SimpleNamespace(variant=lambda _: ())
    for _ in range(3):
        run.update()
    total, count = run.window["loss"]
    assert (total.tolist(), count) == ([3, 3], 3)
    assert asked == {"fullgraph": True, "mode": "reduce-overhead"}


def test_graphs_are_for_cuda(iql, refused):
    argv = words(compile="graphs", num_updates=2, env_id="none", device="cpu")
    refused(iql, argv, "compile", "graphs", "cuda")
