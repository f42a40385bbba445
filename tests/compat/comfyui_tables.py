"""Validates the workflows with ComfyUI's own code, and records what tests compare them with.

    python tests/compat/comfyui_tables.py COMFYUI WANVIDEOWRAPPER

Both are checkouts (last recorded: ComfyUI 0.3.64 at a125cd8, ComfyUI-WanVideoWrapper 1.4.6 at
60a3875), and the packages of ComfyUI's requirements.txt are importable; torchvision, torchaudio,
kornia and spandrel need not be. Written are tests/recorded/comfyui_nodes.json and
comfyui_simple_sigmas.json.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "planning")]

from wan_shapes import A14B, A14B_I2V, config_of, teacher_of

from wan_distill.results.workflow_nodes import Workflow
from wan_distill.results.workflows import comfyui_workflow
from wan_distill.results.wrapper_workflow import wrapper_workflow

WRAPPER_FILES = ("nodes.py", "nodes_model_loading.py", "nodes_sampler.py")
WRAPPERS = ("WanVideo", "LoadWanVideo")  # how its nodes' names begin
FILE_INPUTS = ("unet_name", "lora_name", "clip_name", "vae_name")


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that ComfyUI imports and these nodes do not use."""

    packages = ("torchvision", "torchaudio", "kornia", "spandrel")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def anything(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock()

        module.__getattr__ = anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def kinds(inputs: dict[str, Any]) -> dict[str, str]:
    """Name -> type of a node's inputs; COMBO where one of several values is chosen."""
    return {k: v[0] if isinstance(v[0], str) else "COMBO" for k, v in inputs.items()}


def start_comfyui(checkout: str) -> None:
    """Makes its modules importable, on the CPU, with all of its own nodes."""
    sys.argv = ["main.py"]
    sys.path.insert(0, checkout)
    sys.meta_path.insert(0, Absent())
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())


def comfyui_nodes(workflow: Workflow) -> dict[str, Any]:
    """Validates the workflow as ComfyUI does before it runs one; gives its nodes' inputs."""
    import execution
    import folder_paths

    files = [n["inputs"][k] for n in workflow.values() for k in FILE_INPUTS if k in n["inputs"]]
    folder_paths.get_filename_list = lambda folder: files
    folder_paths.exists_annotated_filepath = lambda name: True  # the picture of LoadImage
    valid, error, _, of_nodes = asyncio.run(execution.validate_prompt("0", workflow, None))
    if not valid:
        sys.exit(f"ComfyUI refuses the workflow: {error} {of_nodes}")
    return inputs_of({node["class_type"] for node in workflow.values()})


def inputs_of(names: set[str]) -> dict[str, Any]:
    """The inputs and outputs of ComfyUI's own nodes."""
    import nodes

    table = {}
    for name in names:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        given = node.INPUT_TYPES()
        table[name] = dict(
            required=kinds(given.get("required", {})),
            optional=kinds(given.get("optional", {})),
            outputs=list(node.RETURN_TYPES),
        )
    return table


def wrapper_nodes(checkout: str, workflow: Workflow) -> dict[str, Any]:
    """The inputs of WanVideoWrapper's nodes, whose modules need a GPU's packages to be imported."""
    wanted = {node["class_type"] for node in workflow.values()}
    schedulers = ast.parse(Path(checkout, "wanvideo/schedulers/__init__.py").read_text("utf-8"))
    scope: dict[str, Any] = dict(
        folder_paths=MagicMock(get_filename_list=lambda folder: []),
        rope_functions=["default"],
        attention_modes=["sdpa"],
    )
    for statement in schedulers.body:
        if isinstance(statement, ast.Assign):
            exec(compile(ast.Module([statement], []), "schedulers", "exec"), scope)
    table = {}
    for file in WRAPPER_FILES:
        for node in ast.parse(Path(checkout, file).read_text("utf-8")).body:
            if not (isinstance(node, ast.ClassDef) and node.name in wanted):
                continue
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "INPUT_TYPES":
                    part.decorator_list = []
                    exec(compile(ast.Module([part], []), file, "exec"), scope)
                if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "RETURN_TYPES":
                    outputs = list(ast.literal_eval(part.value))
            given = scope["INPUT_TYPES"](None)
            table[node.name] = dict(
                required=kinds(given["required"]),
                optional=kinds(given.get("optional", {})),
                outputs=outputs,
            )
    return table


def simple_sigmas() -> dict[str, list[float]]:
    """What ComfyUI's scheduler `simple` gives."""
    import comfy.model_sampling
    import comfy.samplers

    table = {}
    for shift in (3.0, 5.0, 8.0, 12.0):
        model = comfy.model_sampling.ModelSamplingDiscreteFlow()
        model.set_parameters(shift=shift)
        for steps in (1, 2, 3, 4, 5, 6, 8):
            sigmas = comfy.samplers.simple_scheduler(model, steps).tolist()
            table[f"{steps} steps, shift {shift:g}"] = [round(sigma, 7) for sigma in sigmas]
    return table


def record(name: str, table: dict[str, Any]) -> None:
    file = TESTS / "recorded" / name
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"recorded {file}")


def main() -> None:
    comfyui, wrapper = sys.argv[1:]
    info = teacher_of(A14B, Path("nowhere"))
    config = config_of(info)
    workflow = comfyui_workflow(config, info, ("high", "low"))
    pictured = teacher_of(A14B_I2V, Path("nowhere"), takes_picture=True, boundary_ratio=0.9)
    begun = comfyui_workflow(config_of(pictured), pictured, ("high", "low"))
    others = [
        wrapper_workflow(config, info, ("high", "low")),
        wrapper_workflow(config_of(pictured), pictured, ("high", "low")),
    ]
    start_comfyui(comfyui)
    table = comfyui_nodes(workflow) | comfyui_nodes(begun)
    for other in others:
        kept = {n["class_type"] for n in other.values() if not n["class_type"].startswith(WRAPPERS)}
        table |= wrapper_nodes(wrapper, other) | inputs_of(kept)
    used = {
        (node["class_type"], name)
        for made in (workflow, begun, *others)
        for node in made.values()
        for name in node["inputs"]
    }
    for name, node in table.items():
        node["optional"] = {k: v for k, v in node["optional"].items() if (name, k) in used}
    record("comfyui_nodes.json", table)
    record("comfyui_simple_sigmas.json", simple_sigmas())


if __name__ == "__main__":
    main()
