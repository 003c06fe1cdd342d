"""The layout as told is the layout as it is: README, rooms of tests, shelves and their contracts, decisions."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlab import registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qlab"
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)

# Modules without a test file of their own, and the file that tests them.
TESTED_BY: dict[str, str] = {
    "adapters/dora": "adapters/test_contract.py",
    "adapters/lora": "adapters/test_contract.py",
    "core/adapt/recovery": "engine/adapt/test_init.py",
    "core/adapt/report": "views/adapter/test_report.py",
    "core/adapt/retention": "engine/adapt/test_fuse.py",
    "core/config/code": "lab/test_adapter.py",
    "core/config/lora": "core/config/test_train.py",
    "core/config/solver": "solvers/test_contract.py",
    "core/config/spec": "core/config/test_train.py",
    "core/evaluate/text": "core/test_values.py",
    "core/graph/products": "core/graph/test_formula.py",
    "core/graph/primitives": "core/graph/test_simulate.py",
    "core/panels/adapter": "views/adapter/test_widget.py",
    "core/panels/estimate": "views/estimate/test_widget.py",
    "core/panels/quantizer": "views/quantizer/test_widget.py",
    "core/panels/trainer": "views/trainer/test_widget.py",
    "core/progress": "lab/test_panel.py",
    "core/quantize/report": "views/quantizer/test_report.py",
    "core/quantize/table": "core/quantize/test_compare.py",
    "core/train/events": "core/train/test_report.py",
    "core/train/schedule": "engine/train/test_loop.py",
    "engine/adapt/activations": "engine/adapt/test_init.py",
    "engine/adapt/attach": "engine/adapt/test_init.py",
    "engine/adapt/directions": "engine/adapt/test_init.py",
    "engine/adapt/mlx_layout": "engine/adapt/test_files.py",
    "engine/adapt/parameters": "engine/adapt/test_init.py",
    "engine/adapt/peft": "engine/adapt/test_files.py",
    "engine/adapt/peft_read": "engine/adapt/test_file_refusals.py",
    "engine/adapt/preview": "engine/adapt/test_fuse.py",
    "engine/adapt/recovery": "engine/adapt/test_init.py",
    "engine/adapt/recovery_cache": "engine/adapt/test_init.py",
    "engine/adapt/targets": "engine/adapt/test_files.py",
    "engine/evaluate/answers": "engine/evaluate/test_judge.py",
    "engine/evaluate/divergence": "lab/test_quantizer.py",
    "engine/evaluate/generate": "engine/evaluate/test_predict.py",
    "engine/evaluate/golden": "engine/evaluate/test_judge.py",
    "engine/evaluate/teacher": "engine/evaluate/test_judge.py",
    "engine/memory/block_passes": "engine/memory/test_whole_step.py",
    "engine/memory/blockwise_loss": "engine/memory/test_whole_step.py",
    "engine/memory/blockwise_step": "engine/memory/test_whole_step.py",
    "engine/memory/graph_pieces": "engine/memory/test_whole_step.py",
    "engine/memory/inputs": "engine/memory/test_forecast.py",
    "engine/memory/measure": "engine/memory/test_forecast.py",
    "engine/memory/split_model": "engine/memory/test_whole_step.py",
    "engine/memory/step_graphs": "engine/memory/test_formulas.py",
    "engine/memory/sweep": "views/estimate/test_widget.py",
    "engine/memory/trace": "engine/memory/test_whole_step.py",
    "engine/memory/update_graph": "engine/memory/test_whole_step.py",
    "engine/models/fingerprint": "engine/train/test_run_folder.py",
    "engine/models/functional": "engine/step/test_blockwise.py",
    "engine/models/surgery": "engine/models/test_blocks.py",
    "engine/quantize/measurements": "lab/test_quantizer.py",
    "engine/quantize/sample_bank": "engine/quantize/test_table_filler.py",
    "engine/step/block": "engine/step/test_blockwise.py",
    "engine/step/choose": "engine/step/test_blockwise.py",
    "engine/step/head": "engine/step/test_blockwise.py",
    "engine/step/loss": "engine/step/test_whole.py",
    "engine/step/program": "engine/step/test_blockwise.py",
    "engine/step/protocol": "engine/step/test_whole.py",
    "engine/train/callbacks": "engine/train/test_reporters.py",
    "engine/train/inputs": "engine/train/test_loop.py",
    "engine/train/meter": "engine/train/test_loop.py",
    "engine/train/run_file": "test_run.py",
    "engine/train/saving": "engine/train/test_loop.py",
    "engine/train/session": "lab/test_trainer.py",
    "engine/train/setup": "engine/train/test_loop.py",
    "engine/train/task": "engine/train/test_loop.py",
    "engine/train/validate": "engine/train/test_distributed.py",
    "lab/adapted_model": "lab/test_adapter.py",
    "lab/adapter_base": "lab/test_adapter.py",
    "lab/adapter_traits": "lab/test_adapter.py",
    "lab/estimate": "lab/test_estimation.py",
    "lab/estimate_findings": "lab/test_estimation.py",
    "lab/estimate_link": "lab/test_estimation.py",
    "lab/estimate_source": "lab/test_estimation.py",
    "lab/evaluation": "lab/test_trainer.py",
    "lab/kernel_runs": "lab/test_trainer.py",
    "lab/quantizer_traits": "lab/test_quantizer.py",
    "lab/run_memory": "lab/test_trainer.py",
    "lab/run_results": "lab/test_trainer.py",
    "lab/run_setup": "test_run.py",
    "lab/sample_generations": "lab/test_trainer.py",
    "lab/training_run": "lab/test_trainer.py",
    "nn/frozen": "nn/test_linear.py",
    "nn/low_rank": "adapters/test_contract.py",
    "nn/stored": "nn/test_kinds.py",
    "ops/custom_gradient": "engine/memory/test_custom_gradients.py",
    "ops/dynamic_map": "optimizers/test_adamw8bit.py",
    "ops/matmul": "nn/test_experts.py",
    "ops/packing": "schemes/test_contract.py",
    "optimizers/adafactor": "optimizers/test_contract.py",
    "optimizers/adamw": "optimizers/test_contract.py",
    "optimizers/lion": "optimizers/test_contract.py",
    "optimizers/muon": "optimizers/test_contract.py",
    "registry": "core/config/test_train.py",
    "schemes/affine": "schemes/test_reference.py",
    "schemes/mxfp": "schemes/test_reference.py",
    "schemes/nf4": "schemes/test_reference.py",
    "schemes/nvfp4": "schemes/test_reference.py",
    "schemes/symmetric": "schemes/test_reference.py",
    "solvers/rtn": "solvers/test_contract.py",
    "solvers/searched": "solvers/test_contract.py",
    "views/adapter/retention": "engine/adapt/test_fuse.py",
    "views/adapter/static": "views/adapter/test_widget.py",
    "views/cards/evaluation": "views/cards/test_runs.py",
    "views/estimate/static": "views/estimate/test_widget.py",
    "views/quantizer/static": "views/quantizer/test_widget.py",
    "views/shared/chart": "views/cards/test_runs.py",
    "views/shared/panel": "lab/test_panel.py",
    "views/trainer/curve": "views/trainer/test_widget.py",
    "views/trainer/static": "views/trainer/test_widget.py",
    "views/trainer/words": "views/trainer/test_widget.py",
}


def readme_tree() -> set[str]:
    """Paths that the README's picture of the house names, below qlab/."""
    text = (ROOT / "README.md").read_text()
    block = text.split("## The house")[1].split("```")[1]
    paths: set[str] = set()
    parents: list[str] = []
    for line in block.splitlines():
        match = re.match(r"^( +)([\w.]+/?)(\s|$)", line)
        if not match:
            continue
        depth = len(match[1]) // 2 - 1
        parents = [*parents[:depth], match[2]]
        paths.add("".join(parents))
    return paths


def real_tree() -> set[str]:
    """Folders of the package, and the modules at its top."""
    folders = {
        f"{path.relative_to(PACKAGE)}/"
        for path in PACKAGE.rglob("*")
        if path.is_dir() and path.name != "__pycache__" and "assets/" not in str(path)
    }
    return folders | {path.name for path in PACKAGE.glob("*.py")}


def test_readme_draws_the_tree_that_is_there():
    assert readme_tree() == real_tree()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_has_its_test_file_or_a_line_that_says_who_tests_it(module):
    mirrored = ROOT / "tests" / module.parent / f"test_{module.name}.py"
    if str(module) in TESTED_BY:
        assert not mirrored.exists(), "it has a test file now: delete its line in TESTED_BY"
        assert (ROOT / "tests" / TESTED_BY[str(module)]).exists()
    else:
        assert mirrored.exists()


def test_tested_by_names_modules_that_are_there():
    assert set(TESTED_BY) <= {str(module) for module in MODULES}


def names_that_a_contract_runs_over(shelf: str) -> set[str]:
    """Names of a shelf's objects among the rows of its contract tests."""
    contract = importlib.import_module(f"tests.{shelf}.test_contract")
    marks = [
        mark
        for value in vars(contract).values()
        for mark in getattr(value, "pytestmark", ())
        if mark.name == "parametrize"
    ]
    rows = [row for mark in marks for row in mark.args[1]]
    values = [value for row in rows for value in getattr(row, "values", [row])]
    named = [value for value in values if isinstance(value, str)]
    return {*named, *(getattr(value, "name", "") or getattr(value, "mode", "") for value in values)}


@pytest.mark.parametrize("shelf", registry.SHELVES)
def test_every_file_of_a_shelf_has_its_rows_in_the_contract(shelf):
    assert set(registry.shelf(shelf)) <= names_that_a_contract_runs_over(shelf)


def test_decisions_are_numbered_without_a_gap_and_short():
    decisions = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        assert path.read_text().count("\n") <= 60, f"{path.name} has over 60 lines"


def test_every_page_of_the_docs_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert not [str(page) for page in pages if str(page) not in menu]


def test_architecture_names_files_that_are_there_and_its_picture_is_that_of_the_code():
    page = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(
        r"`((?:lab|engine|views|core|runtime|adapters|nn|ops)/[\w/]+\.(?:py|js))", page
    )
    assert named
    assert not [path for path in named if not (PACKAGE / path).exists()]
    drawing = [sys.executable, "docs/draw_architecture.py", "--check"]
    assert subprocess.run(drawing, cwd=ROOT).returncode == 0, "run docs/draw_architecture.py"
