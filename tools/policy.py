"""Evaluate a saved population, check its critics, or export one seed's policy to run alone.

    python tools/policy.py evaluate RUN --episodes 100          # returns and scores of every seed
    python tools/policy.py values RUN --episodes 20             # the critics against what is earned
    python tools/policy.py export RUN policy.pt2 --member 0     # the policy of the first seed

RUN is a run's folder, or a checkpoint.pt; nothing is written into it. An exported policy maps
obs [N, obs_dim] to actions [N, act_dim], both in the environment's units: statistics of the
observations and bounds of the actions are inside. One that looks at earlier steps (Decision
Transformer) takes the last T steps, at most its setting `context`, of N episodes: obs
[N, T, obs_dim], action [N, T, act_dim], of which the last one does not count, return_to_go [N, T],
what is left of the return asked for, and timestep [T], int64, 0 at an episode's first step.

    FILE.pt2     policy = torch.export.load("FILE.pt2").module(); floats of any type go in
    FILE.onnx    asks for onnx and onnxscript; floats are float32: convert MuJoCo's float64
"""

import argparse
import dataclasses
import functools
import importlib.util
import inspect
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"
# What `act` may take, of N episodes; T falls away where it takes nothing but an observation.
AXES = {"obs": ["N", "T", "obs_dim"], "action": ["N", "T", "act_dim"], "return_to_go": ["N", "T"]}
AXES["timestep"] = ["T"]


def load_script(name: str):
    """algorithms/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ALGORITHMS / f"{name}.py")
    script = sys.modules[name] = importlib.util.module_from_spec(spec)  # where it finds itself
    spec.loader.exec_module(script)
    return script


def opened(frame, run: Path, errors: list) -> tuple:
    """A run's script, one of those here, and what it saved; its own error joins `errors`."""
    saved = frame.read_checkpoint(run)
    name, there = saved["about"].get("script"), [x.stem for x in ALGORITHMS.glob("*.py")]
    frame.check(name in there, f"{run} is of a script {name!r}, which is not here")
    script = load_script(name)
    errors.append(script.RunError)
    return script, saved


def restore(script, saved: dict, member=None, device="cpu") -> nn.Module:
    """The saved population, or its member number `member` as a population of one."""
    try:
        state, agent_class = saved["agent"], vars(script)[saved["about"]["algorithm"]]
        script.check(issubclass(agent_class, script.Agent), "its algorithm is no agent")
        cfg = script.TrainConfig(**saved["config"])
        seeds, solo = cfg.num_seeds, member is not None
        script.check(not solo or 0 <= member < seeds, f"--member: not one of {[*range(seeds)]}")
        if solo:
            cfg = dataclasses.replace(cfg, num_seeds=1, seed=cfg.seed + member)
        agent = agent_class(cfg, {name: state[name] for name in agent_class.units})
        for name, own in agent.state_dict().items():
            if solo and own.shape != state[name].shape:  # members are its first axis
                state[name] = state[name].chunk(seeds)[member]
        agent.load_state_dict(state)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        problem = f"the checkpoint does not go into {script.__name__}.py: {error!r:.200}"
        raise script.RunError(problem) from None
    try:
        return agent.requires_grad_(False).to(device)
    except (AssertionError, RuntimeError) as error:
        raise script.RunError(f"--device {device} does not work here: {error!r:.200}") from None


def player(script, saved: dict, args) -> tuple:
    """What plays: the population, a spec of its environment, reference returns, episodes."""
    about, config = saved["about"], saved["config"]
    if args.env_id not in (None, config.get("env_id"), about.get("env_id")):
        config |= {"env_id": args.env_id, "env_kwargs": {}}  # and the run's scores do not hold
        config |= {"ref_min_score": None, "ref_max_score": None}
    agent = restore(script, saved, device=args.device)
    named = agent.cfg.env_id
    trusted = args.env_id == named or ":" not in named
    script.check(trusted, f"{named} is imported on your own word only: add --env_id {named}")
    spec, references = script.find_environment(agent.cfg, about, agent)
    script.check(spec, "there is nothing to play: name an environment with --env_id")
    episodes = agent.cfg.final_eval_episodes if args.episodes is None else args.episodes
    script.check(episodes > 0, "--episodes: at least 1 is to be played")
    return agent, spec, references, episodes


def evaluate(script, saved: dict, args) -> None:
    """Play and print: the means of each seed, with the deviation of its episodes."""
    agent, spec, references, episodes = player(script, saved, args)
    with script.explained("the evaluation fails"):
        rows, groups = script.evaluate(agent, spec, references, episodes), {}
    units = [unit for unit in ("return", "score") if rows[0][unit] is not None]
    for row in rows:  # a Decision Transformer may have been asked for several returns
        own = groups.setdefault(row.get("target"), {}).setdefault(f"seed {row['seed']}", [])
        own.append([row[unit] for unit in units])
    for target, seeds in groups.items():
        means = {f"{len(seeds)} seeds": [np.mean(own, 0) for own in seeds.values()]}
        for name, values in (seeds | means).items():
            mean_std = zip(units, np.mean(values, 0), np.std(values, 0), strict=True)
            text = ", ".join(f"{unit} {mean:.2f} ± {std:.2f}" for unit, mean, std in mean_std)
            print(f"{name}{'' if target is None else f', target {target:.1f}'}: {text}")
    print(f"± is the deviation of the {episodes} episodes of a seed, or of the seeds; {spec.id}")


def values(script, saved: dict, args) -> None:
    """Compare what critics promise where episodes begin with what the policy then earns.

    Promised is Q(s, a) of an episode's first step, the mean of the critics; earned is the
    discounted sum of the rewards that training sees, of what is played: an episode that is cut
    off after T steps leaves out what gamma^T weighs. A promise far above what is earned is
    over-estimation, the error that offline methods are made against, or comes of critics that have
    not come down yet: their targets take some 1 / (tau (1 - gamma)) moves. Entropy and penalties
    within Q (EDAC, BRAC, ReBRAC, CQL's entropy_backup) are promised too, and not earned.
    """
    agent, spec, _, episodes = player(script, saved, args)
    known = hasattr(agent, "q") and hasattr(agent, "critic")
    script.check(known, f"{script.__name__}.py has no Q(s, a) of one action to compare")
    seeds, pairs = agent.cfg.num_seeds, []
    played = play(script, agent, spec, episodes)
    for first in range(0, len(played), seeds):
        rows = [script.Agent.rows(agent, each) for each in played[first : first + seeds]]
        obs, action = (torch.stack([row[k][:1] for row in rows]) for k in ("obs", "action"))
        promised = q_values(agent, obs, action).mean((1, 2)).tolist()
        rewards, gamma = [row["reward"].double().cpu() for row in rows], discount(agent.cfg, saved)
        earned = [(gamma ** torch.arange(len(r)) * r).sum().item() for r in rewards]
        pairs.append(list(zip(promised, earned, strict=True)))
    means = np.mean(pairs, 0)  # [S, 2]
    names = [f"seed {seed}" for seed in agent.cfg.seeds] + [f"{seeds} seeds"]
    for name, (promised, earned) in zip(names, [*means, means.mean(0)], strict=True):
        print(f"{name}: promised {promised:.2f}, earned {earned:.2f}, {promised - earned:+.2f}")
    print(f"discounted rewards from the start of {episodes} episodes a seed; {spec.id}")


def discount(cfg, saved: dict) -> float:
    """That of the critics when they were saved: SPOT may have another one online."""
    online = getattr(cfg, "online_gamma", None) if saved["step"] > cfg.num_updates else None
    return cfg.gamma if online is None else online


@torch.no_grad()
def q_values(agent: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
    """Q of every critic [S, critics, N], of normalised obs [S, N, obs_dim] and unit actions."""
    several = "actions" in inspect.signature(agent.q).parameters  # a state's: [S, m, N, act_dim]
    return agent.q(agent.critic, obs, action[:, None] if several else action).flatten(2)


def play(script, agent: nn.Module, spec, episodes: int) -> list:
    """Episode 0 of all members, then episode 1, ...: what `evaluate` plays, laid out as data."""
    step, played, current = script.env_step, [], {}

    def recorded(env, action=None, seed=None):
        found = obs, reward, terminated, truncated, _ = step(env, action, seed)
        if action is None:
            current[env] = {"obs": [obs], "action": [], "reward": [], "terminated": []}
            played.append(current[env])
        else:
            values = (obs, action, reward, terminated)
            for kept, value in zip(current[env].values(), values, strict=True):
                kept.append(value)
        if terminated or truncated:
            current.pop(env)
        return found

    script.env_step = recorded
    try:
        with script.explained("the evaluation fails"):
            script.evaluate(agent, spec, (None, None), episodes)
    finally:
        script.env_step = step
    return [{name: np.array(kept) for name, kept in episode.items()} for episode in played]


class Exported(nn.Module):
    """A solo agent's `act` without the seed axis, which has no place outside of training."""

    def __init__(self, agent: nn.Module, shapes: list):
        super().__init__()
        self.agent, self.shapes = agent, shapes

    def forward(self, *inputs: Tensor) -> Tensor:
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        pairs = zip(inputs, self.shapes, strict=True)
        return self.agent.act(*[x[None] if "N" in shape else x for x, shape in pairs]).squeeze(0)


def export(script, saved: dict, args) -> None:
    """Write the policy of one member."""
    path, content, pt2 = args.file, io.BytesIO(), args.file.suffix == ".pt2"
    right = (pt2 or path.suffix == ".onnx") and not path.is_dir()
    script.check(right, f"{path} must be a file that ends in .pt2 (torch.export) or .onnx")
    agent = restore(script, saved, args.member)
    names = list(inspect.signature(agent.act).parameters)
    script.check(set(names) <= AXES.keys(), f"{script.__name__}.py acts on {names}")
    shapes = [[axis for axis in AXES[x] if axis != "T" or len(names) > 1] for x in names]
    sizes = {"N": 2, "T": 3, "obs_dim": agent.obs_dim, "act_dim": agent.act_dim}
    examples = [torch.zeros([sizes[axis] for axis in shape]) for shape in shapes]
    kinds = [torch.int64 if x == "timestep" else torch.float64 if pt2 else None for x in names]
    examples = tuple(x.to(kind) for x, kind in zip(examples, kinds, strict=True))
    free = [{i: axis for i, axis in enumerate(shape) if axis in "NT"} for shape in shapes]
    longest = {"T": getattr(agent.cfg, "context", None), "N": None}
    known = {axis: torch.export.Dim(axis, max=most) for axis, most in longest.items()}
    dims = tuple({i: known[axis] for i, axis in each.items()} for each in free)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it does itself
        program = torch.export.export(Exported(agent, shapes), examples, dynamic_shapes=(dims,))
        trim(program)
        if pt2:
            torch.export.save(program, content)
        else:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names spare packages
            options = {"input_names": names, "output_names": ["next_action"], "verbose": False}
            try:
                model = torch.onnx.export(program, dynamo=True, dynamic_shapes=free, **options)
            except ImportError:
                raise script.RunError("ONNX asks for: pip install onnx onnxscript") from None
            content.write(model.model_proto.SerializeToString())
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(content.getvalue())
    partial.replace(path)
    print(f"{path}: the policy of seed {agent.cfg.seed}")


def trim(program: torch.export.ExportedProgram) -> None:
    """Leave out weights that only training needs, the place of the scripts, the examples' types."""
    specs = program.graph_signature.input_specs
    for node, spec in zip(list(program.graph.nodes), list(specs), strict=False):
        if spec.target and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            for tensors in (program.state_dict, program.constants):
                tensors.pop(spec.target, None)
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    frame = load_script("iql")  # its shared blocks are those of all
    known = [frame.RunError, OSError, KeyboardInterrupt]
    commands = parser.add_subparsers(required=True, metavar="evaluate | values | export")
    for command in (evaluate, values, export):
        one = commands.add_parser(command.__name__, description=command.__doc__, **style)
        one.error = parser.error = functools.partial(frame.check, False)
        one.set_defaults(command=command)
        one.add_argument("run", type=Path, metavar="RUN", help="a run's folder or checkpoint.pt")
        if command is not export:
            one.add_argument("--episodes", type=int, help="of each seed; else as after the run")
            one.add_argument("--env_id", help="another environment than the run's")
            auto = "cuda" if torch.cuda.is_available() else "cpu"
            one.add_argument("--device", default=auto, help="cuda, cpu; else cuda if there is one")
        else:
            one.add_argument("file", type=Path, metavar="FILE", help="NAME.pt2 or NAME.onnx")
            one.add_argument("--member", type=int, default=0, help="0 = the run's first seed")
    try:
        args = parser.parse_args(argv)
        script, saved = opened(frame, args.run, known)
        args.command(script, saved, args)
        return 0
    except tuple(known) as error:
        print("error:", *(str(error) or "stopped").split(), file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
