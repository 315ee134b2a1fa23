"""What can stand in for self-attention in a self-supervised speech encoder, and what it costs."""
__version__ = "0.1.0"

from importlib import import_module

# The public names, each with the module it lives in; a module is imported when one of its names is first asked for.
_HOME = {
    "list_mixers": "mixers.base", "build_mixer": "mixers.base", "check_mixer": "mixers.checks",
    "EncoderConfig": "models.config", "build_encoder": "models.encoder", "load_encoder": "models.checkpoint",
    "LiGRU": "ligru.layer", "SLiGRU": "ligru.layer",
    "load_corpus": "data.corpus", "list_objectives": "objectives.objective",
    "PretrainConfig": "train.config", "pretrain": "train.loop",
    "list_probes": "eval.probe", "run_probe": "eval.probe",
    "training_cost": "eval.cost", "deployment_cost": "eval.cost",
    "Study": "study.study", "load_results": "study.results", "pareto_front": "study.pareto",
    "influence_map": "viz.mixing", "create_app": "app.explorer",
}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'essl_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value = getattr(import_module(f"essl_nb.{_HOME[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
