"""Self-supervised objectives: what the frames of an encoder should be. Every module here is imported, so one decorator registers."""
import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
