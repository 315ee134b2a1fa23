"""Every block and front end of the folder: a module that is here is imported, and so registered."""
import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
del importlib, pkgutil, module
