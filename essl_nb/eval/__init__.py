"""Probes, costs and intervals. Importing this package registers the probes."""

import importlib
from pathlib import Path

for probe_module in ("phones", "voices", "finetune"):
    if (Path(__file__).parent / f"{probe_module}.py").exists():
        importlib.import_module(f"{__name__}.{probe_module}")
