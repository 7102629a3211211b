"""A compiled update in a run: steps of Adam, schedules, resume, going online, forks."""

import math

import pytest
import torch
from conftest import SCRIPTS, load_script, words
from test_online import line
from test_population import close, record, update_all
from test_runs import leaves, rows, saved
from torch._dynamo.backends.common import aot_autograd

KINDS = {
    "Adam": (torch.optim.Adam, 0.0),
    "Adam with an L2 penalty": (torch.optim.Adam, 0.1),
    "AdamW": (torch.optim.AdamW, 0.1),
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
@pytest.mark.parametrize("tensors", [2, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_torch_optims(iql, kind, tensors):
    """Five steps whose learning rate changes; of many tensors, by the same kernel."""
    optimizer_class, decay = KINDS[kind]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 1 + i, 5)) for i in range(tensors)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    compiled, own = (
        optimizer_class(ps, lr=0.1, weight_decay=decay, fused=True) for ps in (ours, theirs)
    )
    iql.traceable(compiled)
    step_in_a_graph = torch.compile(iql.take_step, fullgraph=True)
    for step in range(5):
        gradients = [torch.randn_like(p) for p in ours]
        for optimizer in (compiled, own):
            iql.set_rate(optimizer, 0.125 / 2**step)
        step_in_a_graph(compiled, gradients)
        iql.take_step(own, gradients)
    assert graphs() == 1
    exact = {"rtol": 0, "atol": 0} if tensors > 32 else {"rtol": 1e-5, "atol": 1e-7}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **exact)
        for name, value in own.state[b].items():
            torch.testing.assert_close(compiled.state[a][name], value, **exact)


def test_a_step_reads_a_gradient_by_its_strides(iql):
    ours, theirs = (torch.nn.Parameter(torch.ones(2, 3, 5)) for _ in range(2))
    theirs.grad = torch.arange(-9.0, 21.0).view(2, 5, 3).mT
    iql.take_step(iql.adam([ours], 0.1), [theirs.grad])
    torch.optim.Adam([theirs], lr=0.1, fused=False).step()
    torch.testing.assert_close(ours, theirs)


def same(ours: dict, theirs: dict) -> None:
    """The tensors of two checkpoints, but for learning rates, which are numbers in eager ones."""
    ours, theirs = (
        {name: x for name, x in leaves(each) if isinstance(x, torch.Tensor) and x.dim()}
        for each in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        close(ours[name], value, str(name))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", [name for name in ("iql", "dt") if name in SCRIPTS])
def test_a_compiled_run_follows_its_schedule_and_resumes(name, monkeypatch):
    """As an eager one, to rounding; one that was cut, as the whole one, to the bit."""
    script = load_script(name)
    settings = {"num_updates": 11, "checkpoint_every": 6, "env_id": "none", "normalize_obs": "true"}
    assert script.main(words(run_dir="eager", compile="false", **settings)) == 0
    assert script.main(words(run_dir="whole", compile="true", **settings)) == 0
    assert graphs() == 2  # with the look for a compiler
    same(saved("whole"), saved("eager"))
    with monkeypatch.context() as patch:
        save = script.Run.save

        def stop(run):
            save(run)
            raise KeyboardInterrupt

        patch.setattr(script.Run, "save", stop)
        assert script.main(words(run_dir="cut", compile="true", **settings)) == 130
    assert script.main(["--run_dir", "cut", "--resume", "true"]) == 0
    ours, theirs = saved("cut")["agent"], saved("whole")["agent"]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert rows("cut/metrics.jsonl") == rows("whole/metrics.jsonl")


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name, variants", [("iql", 1), ("rebrac", 2)])
def test_a_compiled_run_goes_online(name, variants):
    """ReBRAC's penalties fall with every step there, and take no graphs of their own."""
    script = load_script(name)
    for mode in ("false", "true"):
        assert script.main(line(script, run_dir=mode, compile=mode, online_steps=12)) == 0
    same(saved("true"), saved("false"))
    assert graphs() == variants + 1  # with the look for a compiler


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_goes_on_from_an_optimizer_without_steps():
    """The policy moves in every second update: after the first one Adam has no state of it."""
    script, settings = load_script("td3_bc"), {"env_id": "OnlineToy-v0", "num_updates": 1}
    assert script.main(words(run_dir="first", compile="false", **settings)) == 0
    assert not saved("first")["optimizers"]["actor_optimizer"]["state"]
    more = {"checkpoint": "first", "online_steps": 4, "compile": "true"}
    assert script.main(words(run_dir="fork", **settings, **more)) == 0
    assert graphs() == 3


def test_an_update_that_does_not_compile_goes_on_without(iql, monkeypatch, capsys):
    """Ctrl-C in a terminal, too, ends the compiler first: the run then stops as it always does."""
    compile_ = torch.compile

    def fails(*_):
        raise OSError("the compiler was killed")

    def only_sin(f, **kw):
        return compile_(f, **{**kw, "backend": "eager" if f is torch.sin else fails})

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", only_sin)
    settings = {"num_updates": 11, "env_id": "none"}
    assert iql.main(words(run_dir="tried", compile="true", **settings)) == 0
    told = "compile: the update fails (BackendCompilerFailed), going on without"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert iql.main(words(run_dir="eager", compile="false", **settings)) == 0
    same(saved("tried"), saved("eager"))


# ---- CUDA graphs, as far as they can be looked at without a GPU


def unplaced(script, agent, calls, monkeypatch) -> list[list[str]]:
    """For each graph, the inputs that it changes and torch does not know to stay in place."""
    found = []

    def look(graph, _):
        about = torch._guards.TracingContext.get().fw_metadata
        changed = set(about.mutated_inp_runtime_indices)
        assert changed
        found.append(sorted(changed - set(about.static_input_indices)))
        return graph

    compile_, backend = torch.compile, aot_autograd(fw_compiler=look, inference_compiler=look)
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = True  # as `compile_update` does
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **_: compile_(f, fullgraph=True, backend=backend))
        for optimizer in script.optimizers_of(agent).values():
            script.traceable(optimizer)
        agent.update = script.compiled(agent.update, graphs=True)
    update_all(agent, calls)
    return found


def test_what_an_update_changes_keeps_its_place_in_memory(script, monkeypatch):
    """Else torch leaves CUDA graphs out, and says so in a log line that nobody reads."""
    kept = record(script, monkeypatch, num_updates=3)
    graphs = unplaced(script, kept.new(), kept.calls, monkeypatch)
    assert graphs and not any(graphs)
    agent = kept.new()
    update = agent.update

    def changes_its_batch(batch, *rest):
        batch["obs"].add_(1)
        return update(batch, *rest)

    agent.update = changes_its_batch
    assert all(unplaced(script, agent, kept.calls, monkeypatch)), "the check finds nothing"


def test_metrics_outlive_the_next_replay(iql, monkeypatch):
    """A CUDA graph writes into the same memory each time."""
    memory, asked = {"loss": torch.zeros(2)}, {}

    def update(step):
        memory["loss"].fill_(step)
        return memory

    monkeypatch.setattr(torch, "compile", lambda f, **kw: asked.update(kw) or f)
    replay = iql.compiled(update, graphs=True)
    found = [replay(step) for step in range(3)]
    assert [each["loss"].tolist() for each in found] == [[0, 0], [1, 1], [2, 2]]
    assert asked == {"fullgraph": True, "mode": "reduce-overhead"}


def test_graphs_are_for_cuda(iql, capsys):
    assert iql.main(words(compile="graphs", num_updates=2, env_id="none")) == 2
    told = "error: compile: graphs are for cuda, and this runs on cpu: use true"
    assert capsys.readouterr().err.strip().splitlines()[-1] == told


# ---- checkpoints of compiled runs


@pytest.mark.usefixtures("traced")
def test_a_compiled_checkpoint_serves_an_eager_fork(iql, capsys):
    """And its learning rate, a tensor there, is told like any other."""
    settings = {"env_id": "OnlineToy-v0", "cosine_actor_lr": "false", "num_updates": 6}
    assert iql.main(words(run_dir="first", compile="true", **settings)) == 0
    more = {"checkpoint": "first", "online_steps": 3, "actor_lr": 6e-4, "compile": "false"}
    assert iql.main(words(run_dir="fork", **settings, **more)) == 0
    assert "the learning rate of actor_optimizer climbs from 3.0e-04 to 6.0e-04" in (
        capsys.readouterr().err
    )
    (group,) = saved("fork")["optimizers"]["actor_optimizer"]["param_groups"]
    assert math.isclose(group["lr"], 6e-4)
