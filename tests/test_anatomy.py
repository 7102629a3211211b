"""Every script has the same anatomy, the same shared blocks and the same words. Read, not run."""

import ast
import io
import re
import tokenize
from functools import cached_property
from pathlib import Path

import pytest
import sync_blocks
from conftest import REPOSITORY, SCRIPTS

FRAME = "# ---- frame: the same in every script ----"
# Lines of a script, and of the shared blocks that a script with an online phase has.
# What they hold today, and no more; the aim is 640 for bc.py and 820 for iql.py.
TOTALS = {"awac": 1265, "bc": 1070, "bcq": 1179, "brac": 1231, "cal_ql": 1345, "cql": 1336}
TOTALS |= {"discrete_bcq": 1304, "discrete_cql": 1298, "discrete_dt": 1493, "dqn": 1314}
TOTALS |= {"dt": 1286, "edac": 1205, "fql": 1286, "iql": 1279, "rebrac": 1288, "spot": 1297}
TOTALS |= {"td3_bc": 1232, "xql": 1184}
BLOCKS = ["config", "online_config", "discrete_config", "networks", "layer_norm"]
BLOCKS += ["squashed_policy", "transformer", "discrete", "data", "evaluation", "run", "online"]
OPTIONAL = ["online_config", "discrete_config", "layer_norm", "squashed_policy", "transformer"]
OPTIONAL += ["discrete", "online"]
SHARED_LINES = 1049  # without layer_norm and squashed_policy; the aim is 580
MEND = "edit one script, then run: python tests/sync_blocks.py algorithms/<that script>.py"

GLOSSARY = set(
    """
    dataset_id fallback_dataset_id download env_id env_kwargs ref_min_score ref_max_score seed
    num_seeds eval_seed num_updates online_steps updates_per_step eval_every eval_episodes
    final_eval_episodes log_every checkpoint_every run_dir resume checkpoint
    device compile wandb wandb_project label batch_size gamma tau actor_lr critic_lr value_lr
    normalize_obs reward_scale reward_shift reward_by_return_range inverse_temperature
    awr_temperature entropy_coef action_bounds max_envs
    """.split()
)
# What others call these things. A glossary name in another order or number is found without it.
SYNONYMS = {
    "beta": "inverse_temperature",
    "temperature": "inverse_temperature, awr_temperature or entropy_coef",
    "awac_lambda": "awr_temperature",
    "discount": "gamma",
    "polyak": "tau",
    "soft_target_update_rate": "tau",
    "dataset": "dataset_id",
    "env": "env_id",
    "env_name": "env_id",
    "n_seeds": "num_seeds",
    "max_timesteps": "num_updates",
    "max_steps": "num_updates",
    "num_steps": "num_updates",
    "train_steps": "num_updates",
    "eval_freq": "eval_every",
    "eval_interval": "eval_every",
    "log_freq": "log_every",
    "log_interval": "log_every",
    "save_freq": "checkpoint_every",
    "n_episodes": "eval_episodes",
    "num_eval_episodes": "eval_episodes",
    "lr": "actor_lr",
    "learning_rate": "actor_lr",
    "policy_lr": "actor_lr",
    "q_lr": "critic_lr",
    "qf_lr": "critic_lr",
    "v_lr": "value_lr",
    "vf_lr": "value_lr",
    "normalize": "normalize_obs",
    "normalize_states": "normalize_obs",
    "normalize_observations": "normalize_obs",
    "reward_bias": "reward_shift",
    "load": "checkpoint",
    "load_model": "checkpoint",
    "project": "wandb_project",
    "name": "label",
    "group": "label",
    "log_dir": "run_dir",
    "save_dir": "run_dir",
}
OTHER_BATCH_FIELDS = {"state": "obs", "observation": "obs", "terminal": "terminated"}
TASKS = (
    r"antmaze|hopper|halfcheetah|walker2d|maze2d|pointmaze|adroit|kitchen|relocate|\b(pen|door)\b"
)
WAITS = {"item", "cpu", "numpy", "tolist", "is_nonzero"}
DRAWS = set(
    """
    rand rand_like randn randn_like randint randint_like randperm normal normal_ uniform_ bernoulli
    bernoulli_ exponential_ random_ multinomial poisson dropout alpha_dropout Dropout sample rsample
    manual_seed seed default_rng Generator generator
    """.split()
)
SPEAKS = {"print", "info", "warn", "warning", "debug", "write", "open"}


class Source:
    """A script's text and its parts."""

    def __init__(self, path: Path):
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.docstring = ast.get_docstring(self.tree) or ""

    def line(self, text: str) -> int:
        """The number of the one line that is `text`."""
        found = [i for i, line in enumerate(self.lines, 1) if line == text]
        assert len(found) == 1, f"{self.path.name}: {len(found)} lines are {text!r}"
        return found[0]

    def top(self, kind, name: str):
        """The top-level class or function of that name."""
        found = [n for n in self.tree.body if isinstance(n, kind) and n.name == name]
        assert len(found) == 1, f"{self.path.name}: {len(found)} top-level definitions of {name}"
        return found[0]

    @cached_property
    def agent(self) -> ast.ClassDef:
        bases = {n.name: [ast.unparse(b) for b in n.bases] for n in self.classes}
        found = [n for n in self.classes if {"Agent", "DiscreteAgent"} & {*bases[n.name]}]
        found = [n for n in found if n.name != "DiscreteAgent"]
        assert len(found) == 1, f"{self.path.name}: agents {[n.name for n in found]}"
        return found[0]

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        return [n for n in self.tree.body if isinstance(n, ast.ClassDef)]

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]

    @cached_property
    def fields(self) -> dict[str, ast.AnnAssign]:
        """Name -> definition of every setting."""
        names = ("RunConfig", "OnlineConfig", "DiscreteConfig", "TrainConfig")
        bodies = [n.body for n in self.classes if n.name in names]
        return {n.target.id: n for body in bodies for n in body if isinstance(n, ast.AnnAssign)}

    @cached_property
    def blocks(self) -> dict[str, str]:
        return sync_blocks.blocks(self.text)

    @cached_property
    def in_update(self) -> list[ast.FunctionDef]:
        """What may run inside `update`: methods of networks and agent, and their helpers."""
        begin, end = self.line("# >>> shared: networks"), self.line(FRAME)
        shared_end = self.line("# <<< shared: networks")
        apart = {
            "__init__",
            "act",
            "noise_shapes",
            "variant",
            "select",
            "rows",
            "table",
            "generator",
        }
        functions = [n for n in self.tree.body if isinstance(n, ast.FunctionDef)]
        functions = [n for n in functions if begin < n.lineno < shared_end]
        for n in self.classes:
            if begin < n.lineno < end and "gym.ActionWrapper" not in map(ast.unparse, n.bases):
                functions += [m for m in n.body if isinstance(m, ast.FunctionDef)]
        return [n for n in functions if n.name not in apart]

    def shared(self, line: int) -> bool:
        """Whether a line lies in a shared block."""
        begins = sum(text.startswith("# >>> shared: ") for text in self.lines[:line])
        return begins > sum(text.startswith("# <<< shared: ") for text in self.lines[:line])


SOURCES = {name: Source(REPOSITORY / "algorithms" / f"{name}.py") for name in SCRIPTS}


@pytest.fixture(params=SCRIPTS)
def source(request) -> Source:
    return SOURCES[request.param]


def where(source: Source, node) -> str:
    return f"{source.path.name}:{node.lineno}: {ast.unparse(node).splitlines()[0][:80]}"


def called(node: ast.Call) -> str:
    """The last name of what is called: `sample` for `pi.sample()`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def calls(tree) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call)]


# ---- order


def test_sections_stand_in_order(source):
    first = source.tree.body[0]
    assert isinstance(first, ast.Expr) and first.lineno == 1, "the docstring comes first"
    imports = [n.lineno for n in source.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    run_config, config = (source.top(ast.ClassDef, n) for n in ("RunConfig", "TrainConfig"))
    base = "OnlineConfig" if "online" in source.blocks else "RunConfig"
    base = "DiscreteConfig" if "discrete" in source.blocks else base
    assert [ast.unparse(base) for base in config.bases] == [base]
    main, guard = source.top(ast.FunctionDef, "main"), source.tree.body[-1]
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    sys.exit(main())"
    order = [
        first.end_lineno,
        *imports,
        source.line("# >>> shared: config"),
        run_config.lineno,
        source.line("# <<< shared: config"),
        config.lineno,
        source.line("# >>> shared: networks"),
        source.line("# <<< shared: networks"),
        source.agent.lineno,
        source.line(FRAME),
        source.line("# >>> shared: data"),
        source.line("# <<< shared: run"),
        main.lineno,
        guard.lineno,
    ]
    assert order == sorted(order)
    own_networks = [
        n.lineno for n in source.classes if n is not config and not source.shared(n.lineno)
    ]
    assert own_networks[-1] == source.agent.lineno, "the agent is the last class before the frame"


def test_frame_is_shared_blocks_and_the_binding(source):
    """After the frame's line only shared blocks, then main, which names the agent."""
    last = source.line(FRAME)
    own = [
        line
        for i, line in enumerate(source.lines, 1)
        if i > last and line and not source.shared(i) and not line.startswith("# <<< shared: ")
    ]
    online = ", online=Online" if "online" in source.blocks else ""
    binding = f"    return command_line({source.agent.name}, TrainConfig, argv{online})"
    guard = ['if __name__ == "__main__":', "    sys.exit(main())"]
    assert own == ["def main(argv=None) -> int:", binding, *guard]


def test_docstring_has_its_parts(source):
    text = source.docstring
    parts = [
        r"arXiv \d{4}\.\d{5}",
        r"(?m)^    L\w* += ",
        r"(?m)^Deviations:",
        r"(?m)^Metrics",
        rf"(?m)^    python algorithms/{source.path.name} --config (\S+)\s*\Z",
    ]
    found = [re.search(part, text) for part in parts]
    assert all(found), f"missing: {[p for p, m in zip(parts, found, strict=True) if not m]}"
    begins = [match.start() for match in found[1:]]
    assert begins == sorted(begins), "equations, deviations, metrics, usage: in this order"
    usage = found[-1][1]
    assert usage.startswith(f"configs/{source.path.stem}/")
    assert (REPOSITORY / usage).is_file(), f"{usage} does not exist"


def test_agent_reads_like_the_paper(source):
    """A loss a method, with a docstring; `update` and `act` are there."""
    methods = {n.name: n for n in source.agent.body if isinstance(n, ast.FunctionDef)}
    assert {"__init__", "update", "act"} <= methods.keys()
    assert [a.arg for a in methods["update"].args.args[:3]] == ["self", "batch", "noise"]
    for name in {*(name for name in methods if name.endswith("_loss")), "update"}:
        assert ast.get_docstring(methods[name]), f"{name} has no docstring"


# ---- deviations


def declared(source: Source) -> list[int]:
    return [int(n) for n in re.findall(r"(?m)^    D(\d+)  \S", source.docstring)]


def tagged(source: Source) -> dict[int, int]:
    """Number -> line of each deviation's tag in a comment."""
    return {
        int(n): line
        for line, comment in source.comments
        for n in re.findall(r"(?:^# |, |\()D(\d+)\b", comment)
    }


def test_deviations_are_numbered_and_tagged(source):
    numbers, tags = declared(source), tagged(source)
    assert numbers == list(range(1, len(numbers) + 1)), f"declared: {numbers}"
    missing = [f"D{n}" for n in numbers if n not in tags]
    assert not missing, f"{source.path.name}: no line has the comment '# {missing[0]}' ({missing})"
    unknown = [f"D{n} at line {tags[n]}" for n in tags if n not in numbers]
    assert not unknown, f"{source.path.name}: the docstring does not declare {unknown}"
    shared = [f"D{n}" for n in tags if source.shared(tags[n])]
    assert not shared, f"{shared}: shared blocks hold no deviation, tag the line that uses them"
    undeclared = set(re.findall(r"\bD\d+\b", source.text)) - {f"D{n}" for n in numbers}
    assert not undeclared, f"{source.path.name} mentions {undeclared}"


# ---- shared blocks


def test_markers_pair_up(source):
    open_block, names = None, []
    for i, line in enumerate(source.lines, 1):
        begin, end = re.match(r"\s*# >>> (.*)", line), re.match(r"\s*# <<< (.*)", line)
        if begin:
            assert line.startswith("# >>> shared: ") and not open_block, f"line {i}"
            open_block = begin[1]
            names.append(open_block)
        if end:
            assert line.startswith("# <<< shared: ") and end[1] == open_block, f"line {i}"
            open_block = None
    assert open_block is None and len(set(names)) == len(names)
    assert set(source.blocks) == {n.removeprefix("shared: ") for n in names}


def test_shared_blocks_are_the_same_bytes():
    seen = {}
    for name, source in SOURCES.items():
        for block, body in source.blocks.items():
            first, expected = seen.setdefault(block, (name, body))
            same = body.encode() == expected.encode()
            assert same, f"block '{block}' of {name}.py is not that of {first}.py: {MEND}"


def test_every_script_has_every_block(source):
    """Or a variant of it, such as `evaluation:sequence`; in one order everywhere."""
    kinds = [name.split(":")[0] for name in source.blocks]
    assert kinds == [kind for kind in BLOCKS if kind in kinds]
    assert set(BLOCKS) - set(kinds) <= set(OPTIONAL)
    assert ("online" in kinds) == ("online_config" in kinds)
    assert ("discrete" in kinds) == ("discrete_config" in kinds)


def names_in(source: Source) -> set[str]:
    used = {n.attr for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}
    return used | {n.id for n in ast.walk(source.tree) if isinstance(n, ast.Name)}


def test_nothing_in_a_block_is_left_over():
    """What blocks define, some script uses."""
    used = set().union(*map(names_in, SOURCES.values())) | {"forward"}
    for source in SOURCES.values():
        for n in ast.walk(source.tree):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and source.shared(n.lineno):
                assert n.name in used or n.name.startswith("__"), where(source, n)


@pytest.mark.parametrize("block", ["layer_norm", "squashed_policy"])
def test_blocks_stand_where_they_are_used(source, block):
    """Another block's use does not count."""
    defines = set(re.findall(r"(?m)^(?:def|class) (\w+)", source.blocks.get(block, "")))
    own = [line for i, line in enumerate(source.lines, 1) if not source.shared(i)]
    used = defines & set(re.findall(r"\w+", "\n".join(own)))
    assert used or block not in source.blocks, f"{source.path.name} does not use {block}"


def test_one_sitting_reads_it(source):
    """Whoever adds lines to a script or to what all share takes others out."""
    limit, name = TOTALS[source.path.stem], source.path.name
    assert len(source.lines) <= limit, f"{name}: {len(source.lines)} lines, at most {limit}"


def test_shared_blocks_stay_small():
    """With both markers; those for some networks alone apart."""
    blocks = SOURCES["iql"].blocks
    sizes = {name: body.count("\n") + 2 for name, body in blocks.items()}
    total = sum(n for name, n in sizes.items() if name not in ("layer_norm", "squashed_policy"))
    assert total <= SHARED_LINES, f"{total} lines, at most {SHARED_LINES}: {sizes}"


@pytest.fixture
def copies(tmp_path, monkeypatch) -> list[Path]:
    """Copies of two scripts for sync_blocks to work on; the first one gets edited."""
    paths = [tmp_path / "algorithms" / f"{name}.py" for name in ("edited", "other")]
    paths[0].parent.mkdir()
    for path, name in zip(paths, (SCRIPTS[0], SCRIPTS[-1]), strict=True):
        path.write_text(SOURCES[name].text)
    monkeypatch.setattr(sync_blocks, "ALGORITHMS", paths[0].parent)
    return paths


DATA = "# >>> shared: data\n"
LINE = "NEW = r'\\1 \\g<0>'  # a backslash is a backslash\n"


def test_sync_blocks_copies_blocks_and_nothing_else(copies):
    edited, other = copies
    own = edited.read_text().replace("class TrainConfig", "# its own\nclass TrainConfig")
    edited.write_text(own.replace(DATA, DATA + LINE))
    expected = [edited.read_text(), other.read_text().replace(DATA, DATA + LINE)]
    for _ in range(2):
        assert sync_blocks.main([str(edited)]) == 0
        assert [path.read_text() for path in copies] == expected


def test_sync_blocks_leaves_variants_alone(copies):
    edited, other = copies
    variant = other.read_text().replace("shared: data\n", "shared: data:sequence\n")
    other.write_text(variant)
    edited.write_text(edited.read_text().replace(DATA, DATA + LINE))
    assert sync_blocks.main([str(edited)]) == 0
    assert other.read_text() == variant


@pytest.mark.parametrize("argv", [[], ["absent.py"], ["a.py", "b.py"]])
def test_sync_blocks_wants_one_script(argv, copies, capsys):
    assert sync_blocks.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.read_text() for path in copies] == [SOURCES[SCRIPTS[i]].text for i in (0, -1)]


# ---- never in a script


def test_imports(source):
    """Nothing of this repository; wandb only inside a function; no pickles."""
    ours = {p.stem for p in REPOSITORY.iterdir()} | {p.stem for p in REPOSITORY.glob("*/*.py")}
    top = set(map(id, source.tree.body))
    for n in ast.walk(source.tree):
        if not isinstance(n, (ast.Import, ast.ImportFrom)):
            continue
        assert not getattr(n, "level", 0), where(source, n)
        names = [n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names]
        for name in (name.split(".")[0] for name in names):
            assert name not in ours | {"pickle", "dill", "joblib", "cloudpickle"}, where(source, n)
            assert name != "wandb" or id(n) not in top, where(source, n)
    assert "sys.path" not in source.text
    # of the environment that the user names, and of the packages that register their own
    assert source.text.count("import_module") == 2
    assert 'PACKAGES = ("gymnasium_robotics", "ogbench", "ale_py", "minatar.gym")' in source.text


def test_no_work_at_import_time(source):
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    for n in source.tree.body[1:-1]:
        target = n.targets[0] if isinstance(n, ast.Assign) else getattr(n, "target", None)
        constant = target is not None and target.id.isupper()
        assert constant or isinstance(n, kinds), where(source, n)
        allowed = {"Path", "resolve", "frozenset", "compile"}
        assert not constant or {called(c) for c in calls(n)} <= allowed, where(source, n)


def test_updates_neither_wait_nor_draw_nor_speak(source):
    assert {"update", "forward", "descend", "polyak"} <= {n.name for n in source.in_update}
    for function in source.in_update:
        for call in calls(function):
            assert called(call) not in WAITS | DRAWS | SPEAKS, where(source, call)
            parts = ast.unparse(call.func).split(".")
            assert "random" not in parts and "logging" not in parts, where(source, call)
            if called(call) in ("float", "int", "bool"):
                assert not isinstance(call.func, ast.Name), where(source, call)


def test_updates_branch_on_settings_only(source):
    """A condition calls nothing and looks into no batch, but for shapes: no tensor's value.

    It may ask whether torch.compile is at work.

    What this cannot see, such as `if loss > 0`, the run on the meta device does.
    """
    for function in source.in_update:
        for n in ast.walk(function):
            tests = [n.test] if isinstance(n, (ast.If, ast.IfExp, ast.While, ast.Assert)) else []
            tests += n.ifs if isinstance(n, ast.comprehension) else []
            for test in tests:
                inside = [m for m in ast.walk(test) if isinstance(m, (ast.Call, ast.Subscript))]
                harmless = (".shape[", "torch.compiler.is_compiling()")
                inside = [m for m in inside if not any(h in ast.unparse(m) for h in harmless)]
                assert not inside, where(source, test)


def test_forbidden_words(source):
    for n in ast.walk(source.tree):
        names = [getattr(n, key, None) for key in ("id", "attr", "arg", "name", "value")]
        names = {name for name in names if isinstance(name, str)}
        assert not names & {"done", "dones"}, f"{where(source, n)}: say terminated or truncated"
        assert not names & {"nan_to_num", "nan_to_num_"}, where(source, n)
        bare = isinstance(n, ast.ExceptHandler) and n.type is None
        assert not bare, f"{source.path.name}:{n.lineno}: a bare except"
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load":
            options = {k.arg: ast.unparse(k.value) for k in n.keywords}
            assert options.get("weights_only") == "True", where(source, n)


def test_no_task_is_a_special_case(source):
    """Task names stand in docstrings and YAML files only."""
    texts = {id(n.value) for n in ast.walk(source.tree) if isinstance(n, ast.Expr)}
    for n in ast.walk(source.tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in texts:
            assert not re.search(TASKS, n.value, re.IGNORECASE), where(source, n)


def test_no_code_in_comments(source):
    code = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.If, ast.For)
    for line, comment in source.comments:
        try:
            body = ast.parse(comment.lstrip("#").strip()).body
        except SyntaxError:
            continue
        for n in body:
            value = getattr(n, "value", None)
            found = isinstance(n, code) or isinstance(value, ast.Call)
            assert not found, f"{source.path.name}:{line}: {comment}"


def test_lines_fit(source):
    long = [i for i, line in enumerate(source.lines, 1) if len(line) > 100]
    assert not long, f"{source.path.name}: over 100 columns: lines {long}"
    assert source.text.endswith("\n") and "\t" not in source.text and "\r" not in source.text


# ---- settings and names


def test_every_setting_is_read(source):
    """As `cfg.name` somewhere: a setting that nothing reads misleads."""
    read = set()
    for n in ast.walk(source.tree):
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load):
            owner = n.value.attr if isinstance(n.value, ast.Attribute) else ast.unparse(n.value)
            read |= {n.attr} if owner == "cfg" else set()
    unread = source.fields.keys() - read
    assert not unread, f"{source.path.name}: no line reads cfg.{', cfg.'.join(sorted(unread))}"


def test_every_setting_has_a_comment_on_its_line(source):
    """One line, as pyrallis gives a comment after a closing bracket to the next setting."""
    comments = dict(source.comments)
    for name, n in source.fields.items():
        assert n.lineno == n.end_lineno, f"{where(source, n)}: {name} takes more than one line"
        assert len(comments.get(n.lineno, "").split()) > 1, f"{where(source, n)}: no comment"


def test_defaults_stand_in_the_config_only(source):
    """No parameter of a function repeats a setting's default."""
    begin, end = source.line("# >>> shared: networks"), source.line(FRAME)
    own = set(source.fields) - {"device", "seed"}
    for n in ast.walk(source.tree):
        if isinstance(n, ast.FunctionDef) and begin < n.lineno < end:
            positional, named = n.args.args, n.args.kwonlyargs
            with_default = positional[len(positional) - len(n.args.defaults) :]
            with_default += [a for a, d in zip(named, n.args.kw_defaults, strict=True) if d]
            repeated = own & {a.arg for a in with_default}
            assert not repeated, f"{where(source, n)}: {repeated}"


def canonical(name: str) -> tuple:
    """The same for actor_lr, lr_actor, actor_lrs and actor_learning_rate."""
    name = name.replace("learning_rate", "lr").replace("normalise", "normalize")
    name = re.sub(r"observations?|states?", "obs", name)
    name = re.sub(r"(?<![a-z])(n|number|max)_", "num_", name)
    name = re.sub(r"_(freq|frequency|interval|period)$", "_every", name)
    name = re.sub(r"(gradient_)?steps$", "updates", name) if "online" not in name else name
    return tuple(sorted(word.rstrip("s") for word in name.split("_")))


def test_settings_are_named_as_the_glossary_does(source):
    known = {canonical(name): name for name in GLOSSARY}
    for name, n in source.fields.items():
        if name not in GLOSSARY:
            better = SYNONYMS.get(name) or known.get(canonical(name))
            assert not better, f"{where(source, n)}: call it {better}"
    body = source.top(ast.ClassDef, "RunConfig").body
    shared = {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    assert shared <= GLOSSARY, f"not in the glossary: {shared - GLOSSARY}"
    assert not GLOSSARY & SYNONYMS.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lr_actor", "actor_lr"),
        ("critic_learning_rate", "critic_lr"),
        ("normalise_obs", "normalize_obs"),
        ("normalize_state", "normalize_obs"),
        ("n_updates", "num_updates"),
        ("max_steps", "num_updates"),
        ("eval_freq", "eval_every"),
        ("seeds", "seed"),
    ],
)
def test_the_glossary_test_has_teeth(name, expected):
    known = {canonical(name): name for name in GLOSSARY}
    assert known.get(canonical(name)) == expected


def test_batch_fields_are_named_well(source):
    """That columns are what is read, and metrics what is explained, the runs show."""
    for function in source.in_update:
        for n in ast.walk(function):
            read = isinstance(n, ast.Subscript) and ast.unparse(n.value) == "batch"
            if read and isinstance(n.slice, ast.Constant):
                name = n.slice.value
                assert re.fullmatch(r"[a-z0-9_]+", name)
                assert name.rstrip("s") not in OTHER_BATCH_FIELDS.keys() | {"don", "next_state"}
                assert name.endswith("obs") or not name.endswith("s"), f"singular: {name}"
