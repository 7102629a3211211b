"""Exported policies: the same actions as the population's member, where only torch is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SCRIPTS, contents, load_script, words

SIZES = [{"N": n, "T": t} for n, t in ((1, 1), (2, 3), (7, 2), (1, 20), (5, 20))]
# What acting needs, where it is more than the actor.
NETWORKS = {"bcq": {"actor", "vae", "critic", "eval_latents"}}
ALONE = """
import sys
for name in ("gymnasium", "minari", "pyrallis", "numpy", "yaml", "h5py", "tqdm", "onnx"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
found = {}
for name, cases in torch.load("inputs.pt").items():
    policy = torch.export.load(f"{name}.pt2").module()
    found[name] = [policy(*case) for case in cases], dict(policy.state_dict())
torch.save(found, "found.pt")
"""


def trained(name: str, seeds: int = 2, **settings):
    """A short run of normalised observations in the folder `name`; returns its agent."""
    script, kept = load_script(name), []
    with pytest.MonkeyPatch.context() as patch:
        finish = script.Run.finish
        patch.setattr(script.Run, "finish", lambda run: (kept.append(run.agent), finish(run)))
        settings |= {"run_dir": name, "env_id": "none", "num_seeds": seeds, "normalize_obs": "true"}
        assert script.main(words(**settings)) == 0
    assert not torch.equal(kept[0].scaler.obs_std, torch.ones(3))
    return kept[0]


def export(name: str, file: str, *more: str) -> int:
    return load_script(name).main(["--checkpoint", name, "--export", file, *more])


def inputs(agent, sizes: dict) -> list:
    """Inputs of an exported policy, in the environment's units."""
    g, made = torch.Generator().manual_seed(7), []
    for example, axes in agent.export_inputs().values():
        shape = [*(sizes[name] for name in axes), *example.shape[len(axes) :]]
        whole = not example.is_floating_point()
        made.append(torch.arange(shape[0]) if whole else 5 * torch.randn(shape, generator=g))
    return made


def actions(agent, case: list, member: int) -> torch.Tensor:
    """What a member of the population does."""
    seeds = agent.cfg.num_seeds
    spread = [x.expand(seeds, *x.shape) if x.dim() > 1 else x for x in case]  # timestep: of all
    return agent.act(*spread)[member]


def inside(file: str) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_policies_act_the_same_where_only_torch_is(capfd):
    """All scripts, one fresh process: member 1 of 2, other weights than acting needs left out."""
    cases, expected, actors = {}, {}, {}
    for name in SCRIPTS:
        agent = trained(name)
        before = contents(name)
        capfd.readouterr()
        assert export(name, f"{name}.pt2", "--member", "1") == 0
        said = capfd.readouterr()
        assert (said.out, said.err) == (f"{name}.pt2: the policy of seed 1\n", "")
        assert contents(name) == before
        assert str(REPOSITORY).encode() not in inside(f"{name}.pt2")
        cases[name] = [inputs(agent, sizes) for sizes in SIZES]
        expected[name] = [actions(agent, case, 1) for case in cases[name]]
        actors[name] = sum(p.numel() for p in agent.actor.parameters()) // 2
        assert not torch.allclose(actions(agent, cases[name][-1], 0), expected[name][-1])
    Path("empty").mkdir()
    torch.save(cases, "empty/inputs.pt")
    for name in SCRIPTS:
        Path(f"{name}.pt2").rename(f"empty/{name}.pt2")
    argv = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(argv, cwd="empty", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, (found, state) in torch.load("empty/found.pt").items():
        for sizes, ours, theirs in zip(SIZES, found, expected[name], strict=True):
            assert ours.shape == (sizes["N"], 1) and not ours.requires_grad, name
            assert (ours - theirs).abs().max() <= 1e-6, (name, sizes)
        owners = {path.split(".")[1] for path in state}
        assert owners == NETWORKS.get(name, {"actor"}) | {"scaler"}, name
        if name not in NETWORKS:
            weights = sum(x.numel() for path, x in state.items() if ".actor." in path)
            assert 0 < weights <= actors[name], name


def test_a_run_of_one_seed_is_exported_and_an_old_file_replaced(capsys):
    agent = trained("iql", seeds=1)
    Path("policy.pt2").write_bytes(b"old")
    assert export("iql", "policy.pt2") == 0
    assert "policy.pt2: the policy of seed 0" in capsys.readouterr().out
    assert sorted(str(path) for path in Path().iterdir()) == ["iql", "policy.pt2"]
    (obs,) = case = inputs(agent, SIZES[2])
    policy = torch.export.load("policy.pt2").module()
    torch.testing.assert_close(policy(obs), actions(agent, case, 0), rtol=0, atol=1e-6)
    with pytest.raises((AssertionError, RuntimeError)):
        policy(obs[:, :2])


def test_the_context_of_a_transformer_fits_together():
    """Inputs of different numbers of steps or episodes are refused, not spread."""
    agent = trained("dt")
    assert export("dt", "dt.pt2") == 0
    policy = torch.export.load("dt.pt2").module()
    obs, action, return_to_go, timestep = inputs(agent, {"N": 4, "T": 3})
    for wrong in (
        (obs, action[:1], return_to_go, timestep),
        (obs, action, return_to_go[:, :1], timestep),
        (obs, action, return_to_go, timestep[:2]),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            policy(*wrong)


def test_bad_input_is_one_line(iql, refused, monkeypatch):
    trained("iql")
    Path("policy.pt2").write_bytes(b"old")
    Path("taken.pt2").mkdir()
    run = ["--checkpoint", "iql", "--export"]
    refused(iql, ["--export", "policy.pt2"], "export", "--checkpoint")
    refused(iql, ["--export", "policy.pt2", "--checkpoint", "none"], "none", "checkpoint")
    refused(iql, [*run, "policy.pt"], "policy.pt", ".pt2", ".onnx")
    refused(iql, [*run, "policy"], "policy", ".pt2", ".onnx")
    refused(iql, [*run, "policy.pt2", "--member", "2"], "member", "has 2")
    refused(iql, [*run, "policy.pt2", "--member", "-1"], "member")
    refused(iql, [*run, "policy.pt2", "--hidden_dim", "8"], "hidden_dim", "16")
    refused(iql, [*run, "nowhere/policy.pt2"], "nowhere/policy.pt2")
    refused(iql, [*run, "taken.pt2"], "taken.pt2")
    refused(load_script("bc"), [*run, "policy.pt2"], "another algorithm")
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            refused(iql, [*run, "policy.onnx"], "pip install onnx onnxscript")


@pytest.mark.parametrize("name", [n for n in ("bcq", "cql", "dt", "iql") if n in SCRIPTS])
def test_onnx_acts_the_same(name, capfd):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    # The reference implementation cannot gather from more than 64 candidates.
    agent = trained(name, **({"eval_candidates": 32} if name == "bcq" else {}))
    capfd.readouterr()
    assert export(name, "policy.onnx", "--member", "1") == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("policy.onnx: the policy of seed 1\n", "")
    assert str(REPOSITORY).encode() not in Path("policy.onnx").read_bytes()
    session, names = reference.ReferenceEvaluator("policy.onnx"), list(agent.export_inputs())
    assert session.input_names == names and session.output_names == ["next_action"]
    axes = [
        axis.dim_param or axis.dim_value for axis in session.input_types[0].tensor_type.shape.dim
    ]
    assert axes == [*agent.export_inputs()["obs"][1], 3]
    for sizes in SIZES:
        case = inputs(agent, sizes)
        feed = {key: x.numpy() for key, x in zip(names, case, strict=True)}
        (found,) = session.run(None, feed)
        expected = actions(agent, case, 1)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
