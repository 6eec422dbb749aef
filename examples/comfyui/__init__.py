"""Custom nodes for ComfyUI: copy or link this folder into ComfyUI's custom_nodes."""

from rest_lightning.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
