"""The part of ComfyUI's published V3 interface that our nodes use, for machines without ComfyUI.

Names, arguments and defaults are those of comfy_api.latest; what a node may not say there raises TypeError here too.
Source: ComfyUI's comfy_api/latest/_io.py and __init__.py (facts).
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


class Input:
    """An input of a node."""

    io_type = ""

    def __init__(self, id: str, display_name=None, optional=False, tooltip=None, lazy=None):
        self.id, self.optional, self.tooltip = id, optional, tooltip


class _Widget(Input):
    def __init__(self, id: str, display_name=None, optional=False, tooltip=None, lazy=None, default: Any = None):
        super().__init__(id, display_name, optional, tooltip, lazy)
        self.default = default


class Output:
    """An output of a node."""

    io_type = ""

    def __init__(self, id=None, display_name=None, tooltip=None, is_output_list=False):
        self.id, self.display_name = id, display_name


def _kind(io_type: str, base: type[Input] = Input) -> Any:
    parts = {"io_type": io_type}
    return type(io_type, (), {"Input": type("Input", (base,), parts), "Output": type("Output", (Output,), parts)})


class _String(_Widget):
    def __init__(self, id: str, *, multiline=False, placeholder=None, dynamic_prompts=None, **common):
        super().__init__(id, **common)


class _Int(_Widget):
    def __init__(self, id: str, *, min=None, max=None, step=None, control_after_generate=None, **common):
        super().__init__(id, **common)
        self.min, self.max = min, max


class _Combo(_Widget):
    def __init__(self, id: str, options: list[str], **common):
        super().__init__(id, **common)
        self.options = options


@dataclass
class Schema:
    """A node's description."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False


class ComfyNode(ABC):
    """Base of nodes: class methods only."""

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema: ...

    @classmethod
    @abstractmethod
    def execute(cls, **kwargs: Any) -> Any: ...

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The schema, checked: ids are unique, also between inputs and outputs."""
        schema = cls.define_schema()
        ids = [part.id for part in (*schema.inputs, *schema.outputs) if part.id is not None]
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids must be unique: {ids}")
        return schema


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: str | None = None):
        self.args = args

    @property
    def result(self) -> Any:
        return self.args or None


class ComfyExtension(ABC):
    """What an entry point returns."""

    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]: ...


def modules() -> dict[str, types.ModuleType]:
    """comfy_api and comfy_api.latest, to stand in sys.modules."""
    io = types.SimpleNamespace(
        Input=Input, Output=Output, Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput, Custom=_kind,
        String=_kind("STRING", _String), Int=_kind("INT", _Int), Combo=_kind("COMBO", _Combo), Image=_kind("IMAGE"),
    )  # fmt: skip
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, ComfyExtension  # type: ignore[attr-defined]
    package = types.ModuleType("comfy_api")
    package.latest = latest  # type: ignore[attr-defined]
    return {"comfy_api": package, "comfy_api.latest": latest}
