"""README, docs and examples: the paths that they name exist, their flags are valid, and shipped configs are valid."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_tst.config import RunConfig, UserError, config_from_mapping, parse_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
FOLDERS = (ROOT / "examples", ROOT / "launch")
# examples/evaluate holds a task of the evaluation harness, which is not a config.
CONFIGS = sorted(c for folder in FOLDERS for c in folder.rglob("*.yaml") if c.parent.name != "evaluate")
NAMED = re.compile(r"[`(\s]((?:megatron_tst|examples|launch|tools|benchmarks|tests|docs)/[\w./-]*\w)")


SETTINGS = {"--config"} | {
    f"--{setting.name.replace('_', '-')}"
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(section.type)
    for setting in dataclasses.fields(section.type)
}


def names(document: Path) -> set[str]:
    return set(NAMED.findall(document.read_text(encoding="utf-8")))


def code_blocks(document: Path) -> str:
    blocks = re.findall(r"^```\w*\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_paths_named_in_documents_exist(document: Path):
    missing = [n for n in names(document) if not ((ROOT / n).exists() or (document.parent / n).exists())]
    assert missing == []


def test_a_missing_path_is_found():
    assert NAMED.findall("see `tools/nowhere.py`, or (docs/none.md)") == ["tools/nowhere.py", "docs/none.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_commands_in_documents_have_valid_flags(document: Path):
    for line in code_blocks(document).splitlines():
        if line.startswith("python pretrain_tst.py"):
            parse_config(shlex.split(line)[2:])
        elif program := re.match(r"python ((tools|examples|benchmarks)/\S+\.py)", line):
            source = (ROOT / program[1]).read_text()
            unknown = [w for w in shlex.split(line) if w.startswith("--") and f'"{w}"' not in source]
            # Some programs pass unknown flags on to pretrain_tst.py's parser.
            assert [w for w in unknown if "parse_known_args" not in source or w not in SETTINGS] == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.relative_to(ROOT)))
def test_shipped_configs_build(config: Path):
    # A job script adds these flags to its config.
    site = "--data-path corpus --tokenizer-model tokenizer --tst-run-dir run".split()
    parsed = parse_config(["--config", str(config), *(site if "launch" in config.parts else ())])
    assert parsed.schedule.num_steps == parsed.training.train_iters
    broken = {**yaml.safe_load(config.read_text()), "modell": {}}
    with pytest.raises(UserError, match="modell"):
        config_from_mapping(broken, str(config))


def test_every_variable_of_the_job_scripts_is_documented():
    scripts = "".join(path.read_text() for path in (ROOT / "launch").glob("*.sh"))
    variables = {name for names in re.findall(r"^ *export (.*)", scripts, re.MULTILINE)
                 for name in re.findall(r"\b([A-Z][A-Z_]+)=", names)}  # fmt: skip
    assert len(variables) > 12
    documented = (ROOT / "docs/cluster.md").read_text()
    assert [name for name in sorted(variables) if f"`{name}`" not in documented] == []


def test_shell_scripts_parse():
    folders = ("examples/**/*.sh", "launch/*.sh", "tests/**/*.sh", "tools/*.sh")
    scripts = [*(path for folder in folders for path in ROOT.glob(folder)), ROOT / ".ci/run"]
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0, script


def test_constraints_pin_every_dependency():
    pins = (ROOT / "constraints.txt").read_text().lower()
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.findall(r'^    "([A-Za-z0-9_-]+)[^"]*",', project.split("[project.optional")[0], re.MULTILINE)
    assert len(dependencies) >= 8
    assert [name for name in dependencies if not re.search(rf"^{name.lower()}==", pins, re.MULTILINE)] == []
