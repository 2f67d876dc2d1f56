"""Policies outside of this package: exported as ONNX or for PyTorch, and loaded again."""

from sb3_ppo_plus.export.exporting import export_policy
from sb3_ppo_plus.export.loading import ExportedPolicy, load_exported

__all__ = ["ExportedPolicy", "export_policy", "load_exported"]
