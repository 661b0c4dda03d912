"""The repository's own rules: who imports whom, widths and lengths, files that people copy, flags shown on pages."""
import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from functools import lru_cache

import pytest

from conftest import ROOT

TOP = sorted(path.name for path in ROOT.glob("*.py"))
PYTHON = TOP + sorted(str(path.relative_to(ROOT)) for folder in ("tests", "benchmarks", "experiments")
                      for path in (ROOT / folder).glob("*.py"))
PAGES = ["README.md", "NOTES.md", "toy_base/README.md",
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]

# File: which of our files it may import; those after "inside" inside functions only.
MACHINERY = ("losses model data samples sample memory fsdp_utils weights lora run_folder run_log evaluate curves "
             "pictures toy")
IMPORTS = {
    "losses.py": "", "model.py": "", "memory.py": "", "toy.py": "", "curves.py": "", "pictures.py": "", "video.py": "",
    "step_folder.py": "model",
    "samples.py": "",
    "data.py": "losses samples",
    "weights.py": "model inside export",
    "lora.py": "model inside lora_files",
    "lora_files.py": "model lora samples weights",
    "export.py": "samples step_folder weights lora_files",
    "streaming.py": "lora_files memory weights",
    "experts.py": "data fsdp_utils lora losses weights",
    "fsdp_utils.py": "model memory weights lora",
    "run_folder.py": "data samples weights step_folder fsdp_utils tracker",
    "run_log.py": "run_folder fsdp_utils tracker",
    "tracker.py": "samples",
    "ref_cache.py": "data samples fsdp_utils",
    "sample.py":
        "losses model data samples weights lora_files streaming memory fsdp_utils pictures toy "
        "inside encode tables wan_encoders video",
    "evaluate.py": "losses model data samples sample weights toy fsdp_utils pictures",
    "encode.py": "data samples model toy pictures tables video wan_encoders",
    "tables.py": "data samples video",
    "wan_encoders.py": "model streaming weights",
    "train.py": MACHINERY + " experts export ref_cache",
    "train_spo.py": MACHINERY + " export",
}
# File: which packages it may import beyond the core, all inside functions. Some need less than the core.
CORE = "torch numpy einops safetensors tqdm"
PACKAGES = {
    "losses.py": "torch", "model.py": "torch einops", "toy.py": "torch einops", "lora.py": "torch",
    "curves.py": "inside matplotlib",
    "pictures.py": f"{CORE} inside av",
    "tracker.py": f"{CORE} inside PIL wandb",
    "video.py": f"{CORE} inside av PIL",
    "wan_encoders.py": f"{CORE} inside diffusers transformers accelerate ftfy",
}

# What does not hold yet; empty when the redesign is done.
WIDE = []
LONG = []
STALE = []


def cases(names, exceptions):
    """Parameters of a test, one per name; the exceptions are expected to fail, and the test fails when they do not."""
    yet = pytest.mark.xfail(strict=True, reason="not done yet: take it off the list when it passes")
    return [pytest.param(name, marks=yet) if name in exceptions else name for name in names]


def imports(path):
    """(module, is at the top level) of every import of a Python file, in order."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            yield module.split(".")[0], id(node) in at_top


def allowed(rule):
    """ "a b inside c" -> ({a, b}, {a, b, c}): what may be imported at the top level, and what inside functions."""
    at_top, _, inside = rule.partition("inside")
    return set(at_top.split()), set(at_top.split()) | set(inside.split())


# ----------------------------------------------------------------------------------------------------------------------
# imports

@pytest.mark.parametrize("name", TOP)
def test_a_file_imports_only_what_the_design_allows(name):
    assert name in IMPORTS, f"{name} has no row in the table of files: what is it for, and what may it import?"
    ours_at_top, ours_inside = allowed(IMPORTS[name])
    packages_at_top, packages_inside = allowed(PACKAGES.get(name, CORE))
    for module, is_top in imports(ROOT / name):
        if f"{module}.py" in TOP:
            assert module in (ours_at_top if is_top else ours_inside), f"{name} may not import {module} here"
        elif module not in sys.stdlib_module_names:
            assert module in (packages_at_top if is_top else packages_inside), f"{name} may not import {module} here"


def test_only_tests_benchmarks_and_experiments_import_a_trainer():
    for name in TOP:
        assert not {module for module, _ in imports(ROOT / name)} & {"train", "train_spo"}, name


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        assert not [module for module, _ in imports(path) if module.startswith("test_")], path.name


def test_the_core_requirements_are_six_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=!~\[; ]", line.strip())[0].lower() for line in lines if line.strip()[:1] not in ("", "#")]
    assert sorted(names) == sorted([*CORE.split(), "pytest"])


# ----------------------------------------------------------------------------------------------------------------------
# widths, lengths, words

@pytest.mark.parametrize("name", cases(PYTHON, WIDE))
def test_no_line_is_over_120_columns(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []


@pytest.mark.parametrize("name", cases(TOP, LONG))
def test_no_file_at_the_top_level_is_over_560_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 560


@pytest.mark.parametrize("page", PAGES)
def test_prose_on_pages_is_at_most_100_columns(page):
    wide, is_code = [], False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if line.startswith("```"):
            is_code = not is_code
        may_be_wide = is_code or re.match(r"\||!\[|<!--", line)                 # tables, pictures and comments are
        if len(line) > 100 and not may_be_wide:
            wide.append(number)
    assert wide == []


def test_the_readme_is_at_most_170_lines_and_12_kb():
    content = (ROOT / "README.md").read_bytes()
    assert len(content.splitlines()) <= 170 and len(content) <= 12_000


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_on_pages_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (folder / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("name", [name for name in PYTHON if name != "tests/test_layout.py"])
def test_the_words_are_win_and_lose(name):
    assert re.findall(r"\b(?:chosen|rejected|model_pred)\b", (ROOT / name).read_text()) == []


# ----------------------------------------------------------------------------------------------------------------------
# copied alone

USES = {
    "losses.py": """
        import torch, losses
        v = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        errors = [losses.flow_error(v, scale * v) for scale in (0.9, 0.5, 0.8, 0.6)]
        values, metrics = losses.regdpo_loss(*errors, beta=30.0)
        assert values.shape == metrics["margin"].shape == (4,)
    """,
    "model.py": """
        import torch, model
        wan = model.WanModel(model.CONFIGS["tiny"])
        velocity = wan(torch.randn(2, 12, 3, 4, 6), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 32))
        velocity.square().mean().backward()
        assert velocity.shape == (2, 12, 3, 4, 6) and velocity.dtype == torch.float32
    """,
    "curves.py": """
        import json, curves
        with open("log.jsonl", "w") as log:
            log.write(json.dumps({"step": 0, "loss": 0.2, "err_win": 0.2}))
        curves.main(["log.jsonl", "--no_plot"])
    """,
}


@pytest.mark.parametrize("name", USES)
def test_a_file_that_people_copy_works_alone_in_an_empty_folder(name, tmp_path):
    (tmp_path / name).write_text((ROOT / name).read_text())
    packages, _ = allowed(PACKAGES[name])
    blocked = {*CORE.split(), "diffusers", "transformers", "matplotlib"} - packages
    blocked -= {"numpy"}                                   # torch itself asks for it
    script = ["import sys", "sys.path.insert(0, '.')"]
    script += [f"sys.modules[{module!r}] = None" for module in sorted(blocked)]      # importing one of these fails
    script += textwrap.dedent(USES[name]).splitlines()
    command = [sys.executable, "-I", "-c", "\n".join(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# flags shown in README and docs

PASSES_ON = {"benchmarks/bench.py": ["train.py"]}         # scripts that take the flags of others as well


@lru_cache
def parser_of(script):
    """The argparse parser that a script of ours uses for its command line, or None for a script without one."""
    if "ArgumentParser" not in (ROOT / script).read_text():
        return None
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: parsers.append(self))
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsers[0]


def pieces_of_code(page):
    """Lines of the fenced blocks of a page, joined where they end in a backslash, and its inline code."""
    text = (ROOT / page).read_text()
    fence = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    for block in fence.findall(text):
        yield from block.replace("\\\n", " ").splitlines()[1:-1]
    for code in re.findall(r"`([^`]+)`", fence.sub("", text)):
        yield code.replace("\n", " ")


def commands(page):
    """(script, its arguments) for every command of a page that runs one of our scripts with python or torchrun."""
    for piece in pieces_of_code(page):
        for command in re.split(r"&&|\|\|?|;", re.sub(r"(^|\s)#.*", "", piece)):
            try:
                words = shlex.split(command)
            except ValueError:                             # an apostrophe: prose, not a command
                words = command.split()
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts and {"python", "python3", "torchrun"} & set(words[:scripts[0]]):
                yield words[scripts[0]], words[scripts[0] + 1:]


@pytest.mark.parametrize("page", cases(PAGES, STALE))
def test_every_command_on_a_page_has_a_script_and_flags_that_exist(page):
    for script, words in commands(page):
        assert (ROOT / script).is_file(), f"{page} runs {script}, which does not exist"
        actions = {}
        for parser in map(parser_of, (script, *PASSES_ON.get(script, ()))):
            actions |= parser._option_string_actions if parser else {}
        for i, word in enumerate(words):
            if not word.startswith("--"):
                continue
            flag, _, value = word.partition("=")
            assert flag in actions, f"{page} runs {script} with {flag}, which it does not have"
            value = value or (words + [""])[i + 1]
            if actions[flag].choices and value[:1] not in ("", "$", "-"):
                assert value in map(str, actions[flag].choices), f"{page} runs {script} with {flag} {value}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_a_page_mentions_belongs_to_some_script_of_ours(page):
    scripts = [name for name in PYTHON if not name.startswith("tests/") and parser_of(name)]
    flags = {flag for script in scripts for flag in parser_of(script)._option_string_actions}
    flags |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts"}    # torchrun's
    flags |= {"--videos_path", "--dimension"}                                                           # VBench's
    flags |= {"--logdir"}                                                                               # TensorBoard's
    for piece in pieces_of_code(page):
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", piece)) - flags      # ours have no hyphen inside
        assert not unknown, f"{page} mentions {' '.join(sorted(unknown))}, which no script of ours has"
