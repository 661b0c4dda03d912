"""
Does the test suite notice when a line that decides a number is wrong? One-line mutants of the trainers and of what they
are made of, each tried in a copy of the checkout on the tests that cover its file. Run by hand:

    python experiments/mutants.py --random 100 --jobs 2      # the list written by hand, and a hundred drawn
    python experiments/mutants.py --report                   # the table of what was tried so far
    python experiments/mutants.py --again                    # try the survivors again, after better tests

Results are rows of out/mutants.jsonl; what is there is not tried again. A mutant is killed when a test fails, when the
tests do not end in time, and when they cannot begin. On a busy machine ranks wait for each other longer than tests
allow: a mutant killed by a test that has nothing to do with it is tried again on a quiet one.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# the tests that cover a file, in an order in which most mutants die early
TESTS = {
    "train.py": "flags plain_loops extensions evaluate train run_folder half_precision train_wan preference previews "
                "parallel",
    "train_spo.py": "flags plain_loops spo half_precision run_folder lora",
    "experts.py": "experts plain_loops extensions train previews",
    "evaluate.py": "evaluate previews spo",
    "run_folder.py": "flags log extensions plain_loops run_folder train evaluate",
    "run_log.py": "log tracker extensions plain_loops run_folder train evaluate",
    "ref_cache.py": "ref_cache parallel plain_loops",
    "fsdp_utils.py": "plain_loops half_precision parallel run_folder"}
# of these files some functions only
ONLY = {"fsdp_utils.py": (
    "make_optimizer", "clip_gradients", "ema_update", "positions_of", "total", "extremes", "spread", "build_model",
    "my_rows", "load_weights", "shard_model")}


class Mutant(NamedTuple):
    file: str
    line: int      # of the first changed character
    before: str    # the changed lines
    after: str
    source: str    # the whole file

    @property
    def key(self):
        """Names the change, wherever in the file it is."""
        return hashlib.sha256("\n".join([self.file, self.before, self.after]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# by hand: (file, text that is in it once, what it becomes)

BY_HAND = [
    # the learning rate, its schedule, clipping, what is scaled
    ("train.py", 'group["lr"] = row["lr"]', 'group["lr"] = group["lr"]'),
    ("train.py", 'row["lr"] = learning_rate(args, step, own_step)',
     'row["lr"] = learning_rate(args, step + 1, own_step + 1)'),
    ("train.py", "warm = min(1.0, (own_step + 1) / max(1, args.warmup_steps))",
     "warm = min(1.0, own_step / max(1, args.warmup_steps))"),
    ("train.py", "warm = min(1.0, (own_step + 1) / max(1, args.warmup_steps))",
     "warm = min(1.0, (own_step + 1) / max(1, args.warmup_steps + 1))"),
    ("train.py", "decay = (args.steps - step) / args.decay_steps",
     "decay = (args.steps - step - 1) / args.decay_steps"),
    ("train.py", "decay = (args.steps - step) / args.decay_steps",
     "decay = (args.steps - step) / (args.decay_steps + 1)"),
    ("train.py", "return args.learning_rate * min(warm, decay)", "return args.learning_rate * warm * decay"),
    ("train.py", "scale = args.loss_scale * ranks.world / args.batch_size",
     "scale = args.loss_scale / args.batch_size"),
    ("train.py", "args.loss_scale = args.loss_scale or OBJECTIVES", "args.loss_scale = OBJECTIVES"),
    ("train.py", "clip_gradients(policy.parameters(), args.max_grad_norm, kept)",
     "clip_gradients(policy.parameters(), float('inf'), kept)"),
    ("fsdp_utils.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
    ("fsdp_utils.py", "eps=1e-8 * loss_scale", "eps=1e-8"),
    ("fsdp_utils.py", 'is_matrix = param.ndim > 1 and not name.endswith(("modulation", "emb_pos"))',
     "is_matrix = True"),
    ("fsdp_utils.py", 'is_matrix = param.ndim > 1 and not name.endswith(("modulation", "emb_pos"))',
     "is_matrix = param.ndim > 1"),
    # the average
    ("train.py", "min(args.ema_decay, (own_step + 1) / (own_step + 10))", "args.ema_decay"),
    ("train.py", "min(args.ema_decay, (own_step + 1) / (own_step + 10))",
     "min(args.ema_decay, (own_step + 2) / (own_step + 10))"),
    ("experts.py", "return self.policy if self.ema is None else self.ema", "return self.policy"),
    # the mean over pairs
    ("train.py", 'kept = sums["pairs"] / max(1, sums["kept"]) if "kept" in sums else 1.0', "kept = 1.0"),
    ("train.py", 'if sums.get("kept", 1):', "if True:"),
    ("run_log.py", 'row["loss"] *= sums["pairs"] / max(1, sums["kept"])', "pass"),
    # importance weights
    ("train.py", "return weight_win, importance_weight(pair.err_lose, pair.sigma, sigma_next)",
     "return weight_win, importance_weight(pair.err_win, pair.sigma, sigma_next)"),
    ("train.py", "sigma_next = next_sigma(pair.sigma, args.weight_steps, args.flow_shift)",
     "sigma_next = next_sigma(pair.sigma, args.weight_steps, 1.0)"),
    # data, noise, conditions
    ("train.py", "flow_shift = 1.0 if OBJECTIVES[args.loss].trains_scores else args.flow_shift",
     "flow_shift = args.flow_shift"),
    ("train.py", "flow_shift = 1.0 if OBJECTIVES[args.loss].trains_scores else args.flow_shift", "flow_shift = 1.0"),
    ("train.py", "limits = (flow_shift, *timesteps_of(args, positions[0] // args.batch_size), args.timestep_sampling)",
     "limits = (flow_shift, *timesteps_of(args, positions[0] // args.batch_size))"),
    ("train.py", "x_sigma, timestep = add_noise(latents, noise, sigma), 1000 * sigma",
     "x_sigma, timestep = add_noise(latents, noise, sigma), 999 * sigma"),
    # the reference, and what a resume is compared with
    ("train.py", "may_change, init=init, data=data)", "may_change, data=data)"),
    ("train.py", "may_change, init=init, data=data)", "may_change, init=init)"),
    ("train.py", 'may_change = MAY_CHANGE if args.decay_steps else MAY_CHANGE | {"steps"}',
     'may_change = MAY_CHANGE | {"steps"}'),
    ("experts.py", "(expert.policy, expert.optimizer, expert.ema)", "(expert.policy, expert.optimizer, None)"),
    # what is judged
    ("evaluate.py", "toy.make_clips(count, seed=1, held_out=True)", "toy.make_clips(count, seed=1, held_out=False)"),
    ("evaluate.py", 'seeds = [seed_of("held out", i) for i in indices]',
     'seeds = [seed_of("held out", 0) for i in indices]'),
    ("evaluate.py", 'seed = seed_of("preview", indices[0])', 'seed = seed_of("preview", 0)'),
    ("evaluate.py", "args.init, config, ranks, sampler_of(args), count, seed=3, held_out=True",
     "args.init, config, ranks, sampler_of(args), count, seed=3, held_out=False"),
    ("evaluate.py", 'randomness(0, i, "probe")', 'randomness(0, 0, "probe")'),
    ("evaluate.py", 'return Sampler("euler", args.sample_steps, args.flow_shift, args.guidance)',
     'return Sampler("euler", args.sample_steps, args.flow_shift)'),
    ("train.py", 'row["probe"] = probe(averaged, args.beta)', 'row["probe"] = probe(policy, args.beta)'),
    ("train.py", 'held_out.judge("before", experts.as_model("ref"), ranks, keep=True)',
     'held_out.judge("before", experts.as_model("policy"), ranks, keep=False)'),
    # two experts
    ("experts.py", "SIDES[0] if turns_of_high(args, turn + 1) > turns_of_high(args, turn) else SIDES[1]", "SIDES[0]"),
    ("experts.py", "expert = self.experts.bring(SIDES[0] if is_high.all() else SIDES[1])",
     "expert = self.experts.bring(SIDES[1])"),
    ("experts.py", "return own_turns * args.switch_every + step_of_turn", "return step"),
    ("experts.py", "return (highest - boundary) / (highest - lowest)", "return 0.5"),
    ("experts.py", "return bell_share(u) if args.timestep_sampling == \"logit_normal\" else u", "return u"),
    # SPO
    ("train_spo.py", 'group["lr"] = args.learning_rate *', 'group["lr"] = group["lr"] *'),
    ("train_spo.py", "min(1.0, (done + 1) / max(1, args.warmup_steps))", "min(1.0, done / max(1, args.warmup_steps))"),
    ("train_spo.py", "done = step * args.updates + update", "done = step"),
    ("train_spo.py", "min(args.ema_decay, (done + 1) / (done + 10))", "args.ema_decay"),
    ("train_spo.py", "scale = ranks.world / (args.beta * pairs)", "scale = ranks.world / args.beta"),
    ("train_spo.py", "loss_scale=1 / args.beta", "loss_scale=1.0"),
    # precision
    ("fsdp_utils.py", "full = MixedPrecisionPolicy(cast_forward_inputs=False)",
     "full = MixedPrecisionPolicy(cast_forward_inputs=True)"),
]


def mutants_by_hand():
    for file, old, new in BY_HAND:
        source = (ROOT / file).read_text()
        if source.count(old) != 1:
            print(f"WARNING: {old!r} is {source.count(old)} times in {file}, expected once; mend BY_HAND")
            continue
        begin = source.index(old)
        yield make_mutant(file, source, begin, begin + len(old), new)


def make_mutant(file, source, begin, end, new):
    mutated = source[:begin] + new + source[end:]
    first, last = source.rfind("\n", 0, begin) + 1, source.find("\n", end)
    before, after = source[first:last], mutated[first:last + len(mutated) - len(source)]
    line = source.count("\n", 0, begin) + 1
    return Mutant(file, line, before.strip(), after.strip(), mutated)


# ------------------------------------------------------------------------------------------------------------------
# drawn: every place where an operator, a constant, a condition or a statement can be changed

OPERATORS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
             ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
             ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"),
             ast.Mult: ("*", "/"),
             ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.And: ("and", "or"),
             ast.Or: ("or", "and"), ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|")}
SAY_ONLY = ("print", "add_argument", "ArgumentParser", "ValueError", "RuntimeError", "tqdm", "warn")
TEXT = ("help", "desc", "unit", "metavar", "flush", "description", "disable")


class Finder(ast.NodeVisitor):
    """Collects (begin, end, new text) of every mutation of a source. Leaves out what only decides a text."""

    def __init__(self, source, functions=()):
        self.source, self.functions = source, functions
        self.starts = [0]                                  # of lines, in bytes
        self.data = source.encode()
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found = []

    def span(self, node):
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        begin, end = self.span(node)
        return self.data[begin:end].decode()

    def add(self, begin, end, new):
        self.found.append((begin, end, new))

    def between(self, left, right, operator):
        """Change the operator between two operands."""
        old, new = OPERATORS[type(operator)]
        begin, end = self.span(left)[1], self.span(right)[0]
        gap = self.data[begin:end].decode()
        pattern = rf"(?<![\w]){old}(?![\w])" if old.isalpha() else re.escape(old)
        at = re.search(pattern.replace(" ", r"\s+"), gap)
        if at:
            self.add(begin + at.start(), begin + at.end(), new)

    def visit_Raise(self, node):
        pass

    visit_JoinedStr = visit_Import = visit_ImportFrom = visit_Raise

    def visit_Module(self, node):
        for child in node.body:
            is_main = isinstance(child, ast.If)            # if __name__ == "__main__"
            is_function = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            if not is_main and (not self.functions or is_function and child.name in self.functions):
                self.visit(child)

    def visit_FunctionDef(self, node):
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default:
                self.visit(default)
        for child in node.body:
            self.visit(child)

    def visit_ClassDef(self, node):
        for child in node.body:
            self.visit(child)

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Expr(self, node):
        value = node.value
        if isinstance(value, ast.Constant):                # a docstring
            return
        if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] not in (*SAY_ONLY, "add", "barrier"):
            self.add(*self.span(node), "pass")
        self.visit(value)

    def visit_AugAssign(self, node):
        self.add(*self.span(node), "pass")
        self.visit(node.value)

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:]):
            self.between(left, right, operator)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        is_text = any(isinstance(side, (ast.JoinedStr, ast.Constant)) and not isinstance(
            getattr(side, "value", ""), (int, float)) for side in (node.left, node.right))
        if type(node.op) in OPERATORS and not is_text:
            self.between(node.left, node.right, node.op)
            for side in (node.left, node.right):           # one of the two terms is dropped
                self.add(*self.span(node), f"({ast.unparse(side)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, node.op)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add(*self.span(node), f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add(*self.span(node), str(not value))
        elif isinstance(value, int):
            self.add(*self.span(node), str(value + 1))
        elif isinstance(value, float):
            self.add(*self.span(node), repr(2 * value if value else 0.5))

    def negate(self, test):
        if not isinstance(test, (ast.Compare, ast.UnaryOp)):
            self.add(*self.span(test), f"(not ({ast.unparse(test)}))")

    def visit_If(self, node):
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.negate(node.test)
        for side in (node.body, node.orelse):
            self.add(*self.span(node), f"({ast.unparse(side)})")
        self.generic_visit(node)

    def visit_Call(self, node):
        name = ast.unparse(node.func).split(".")[-1]
        if name in SAY_ONLY:
            for keyword in node.keywords:                  # the default of a flag decides
                if keyword.arg == "default":
                    self.visit(keyword.value)
            return
        if name in ("min", "max", "any", "all"):
            other = {"min": "max", "max": "min", "any": "all", "all": "any"}[name]
            begin, end = self.span(node.func)
            self.add(end - len(name), end, other)
        places = [arg for arg in node.args if not isinstance(arg, (ast.Starred, ast.Constant))]
        can_swap = len(places) >= 2 and places[:2] == node.args[:2] and ast.unparse(places[0]) != "args"
        if can_swap and name not in ("min", "max", "isinstance", "getattr", "range"):
            (begin, _), (_, end) = self.span(places[0]), self.span(places[1])
            if self.text(places[0]) != self.text(places[1]):
                gap = self.data[self.span(places[0])[1]:self.span(places[1])[0]].decode()
                self.add(begin, end, self.text(places[1]) + gap + self.text(places[0]))
        self.visit(node.func)
        for arg in node.args:
            self.visit(arg)
        for keyword in node.keywords:
            if keyword.arg not in TEXT:
                self.visit(keyword.value)


def mutants_of(file):
    """Every mutant of a file, in the order of its lines; some are not Python, or change nothing."""
    source = (ROOT / file).read_text()
    finder = Finder(source, ONLY.get(file, ()))
    finder.visit(ast.parse(source))
    for begin, end, new in sorted(finder.found):
        yield make_mutant(file, source, len(finder.data[:begin].decode()), len(finder.data[:end].decode()), new)


def drawn(count, seed, files):
    """
    {key: mutant} of `count` mutants, from each file in proportion to how many it has. Their order is that of a hash, so
    that an edit of the code changes the draw by the mutants of the edited lines only.
    """
    def place(mutant):
        return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()

    mutants = {}
    for mutant in sorted((mutant for file in files for mutant in mutants_of(file)), key=place):
        if len(mutants) == count:
            break
        source = (ROOT / mutant.file).read_text()
        try:
            is_change = ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if is_change:
            mutants[mutant.key] = mutant
    return mutants


# ------------------------------------------------------------------------------------------------------------------
# trying

def copy_checkout(to):
    """A copy of the tracked files, which mutants may spoil."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in files:
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def run_tests(folder, names, seconds):
    """Run these test files. Returns the first test that failed, "timeout", or "" where all passed."""
    tests = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--show-capture=no", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)
    try:
        said = job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        said = "FAILED timeout"
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)             # ranks that hang
        except ProcessLookupError:
            pass
        job.wait()
    if job.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
    return failed[1] if failed else f"no test began: {said[-200:]!r}"


def try_mutant(mutant, folder, seconds):
    began = time.monotonic()
    target = folder / mutant.file
    original = target.read_text()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)      # a change of the same size within a second
    target.write_text(mutant.source)
    try:
        killer = run_tests(folder, TESTS[mutant.file].split(), seconds)
    finally:
        target.write_text(original)
    return {"key": mutant.key, "file": mutant.file, "line": mutant.line, "before": mutant.before, "after": mutant.after,
            "killed_by": killer, "seconds": round(time.monotonic() - began)}


def read_results(path):
    """{key: row}, the newest of each."""
    if not path.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}


def try_all(mutants, path, jobs, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = Queue()
        for number in range(jobs):
            folders.put(copy_checkout(Path(temporary) / f"copy_{number}"))
        names = dict.fromkeys(name for mutant in mutants for name in TESTS[mutant.file].split())
        failed = run_tests(Path(temporary) / "copy_0", names, 4 * seconds)
        if failed:
            sys.exit(f"mutants.py: {failed} fails without a mutant")

        def job(mutant):
            folder = folders.get()
            try:
                row = try_mutant(mutant, folder, seconds)
            finally:
                folders.put(folder)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(line_of(row), flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(job, mutants))


def line_of(row):
    fate = f"killed by {row['killed_by']}" if row["killed_by"] else "SURVIVED"
    return f"{row['file']}:{row['line']}  {fate}  ({row['seconds']} s)\n    - {row['before']}\n    + {row['after']}"


def report(results):
    """The survivors, and how many of each file were killed."""
    for row in results:
        if not row["killed_by"]:
            print(line_of(row))
    print(f"\n{'file':<16}{'tried':>8}{'killed':>8}")
    for file in [*TESTS, "all"]:
        rows = [row for row in results if file in (row["file"], "all")]
        print(f"{file:<16}{len(rows):>8}{sum(bool(row['killed_by']) for row in rows):>8}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=100, help="mutants drawn in addition to those written by hand")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=TESTS, help="files to draw from")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at a time, each in a copy of the checkout")
    parser.add_argument("--seconds", type=float, default=900, help="time for the tests of one mutant")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutants.jsonl", help="where results are kept")
    parser.add_argument("--again", action="store_true", help="try those again that survived")
    parser.add_argument("--report", action="store_true", help="only print what is known of these mutants")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    args = parser.parse_args(argv)
    by_hand = {mutant.key: mutant for mutant in mutants_by_hand() if mutant.file in args.files}
    mutants = by_hand | drawn(args.random, args.seed, args.files)
    if args.list:
        for mutant in mutants.values():
            print(f"{mutant.file}:{mutant.line}\n    - {mutant.before}\n    + {mutant.after}")
        return
    results = read_results(args.out)
    if not args.report:
        todo = [mutant for key, mutant in mutants.items()
                if key not in results or args.again and not results[key]["killed_by"]]
        print(f"{len(mutants)} mutants, {len(todo)} to try", flush=True)
        if todo:
            try_all(todo, args.out, args.jobs, args.seconds)
        results = read_results(args.out)
    report([results[key] for key in mutants if key in results])


if __name__ == "__main__":
    main(sys.argv[1:])
