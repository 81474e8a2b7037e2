"""ComfyUI nodes that draw with a deployment profile of stagevar-tune. See README.md."""

from .nodes import StageVarExtension, comfy_entrypoint

__all__ = ["StageVarExtension", "comfy_entrypoint"]
