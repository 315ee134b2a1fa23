"""What can stand in for self-attention in a self-supervised speech encoder, and what it costs."""
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

# The public names, each with the module it lives in; a module is imported when one of its names is first asked for.
_HOME = {
    "list_mixers": "mixers.base", "build_mixer": "mixers.base", "check_mixer": "mixers.checks",
    "Mixer": "mixers.base",
    "EncoderConfig": "models.config", "Encoder": "models.encoder", "build_encoder": "models.encoder", "load_encoder": "models.encoder",
    "from_torchaudio": "models.wav2vec2", "from_transformers": "models.wav2vec2", "from_published": "models.published", "export_onnx": "models.export",
    "LiGRU": "ligru.layer", "SLiGRU": "ligru.layer",
    "load_corpus": "data.corpus", "open_index": "data.opening",
    "list_objectives": "objectives.objective",
    "PretrainConfig": "train.config", "pretrain": "train.loop",
    "FinetuneConfig": "probes.words_config", "finetune_words": "probes.words",
    "list_probes": "probes.probe", "run_probe": "probes.probe",
    "training_cost": "costs.cards", "deployment_cost": "costs.cards",
    "Study": "study.study", "load_results": "study.results", "pareto_front": "study.pareto",
    "influence_map": "viz.mixing", "create_app": "app.explorer",
}
__all__ = [*_HOME]

if TYPE_CHECKING:  # for editors and type checkers; a test keeps it in step with _HOME
    from .mixers.base import list_mixers as list_mixers, build_mixer as build_mixer, Mixer as Mixer
    from .mixers.checks import check_mixer as check_mixer
    from .models.config import EncoderConfig as EncoderConfig
    from .models.encoder import Encoder as Encoder, build_encoder as build_encoder, load_encoder as load_encoder
    from .models.wav2vec2 import from_torchaudio as from_torchaudio, from_transformers as from_transformers
    from .models.published import from_published as from_published
    from .models.export import export_onnx as export_onnx
    from .ligru.layer import LiGRU as LiGRU, SLiGRU as SLiGRU
    from .data.corpus import load_corpus as load_corpus
    from .data.opening import open_index as open_index
    from .objectives.objective import list_objectives as list_objectives
    from .train.config import PretrainConfig as PretrainConfig
    from .train.loop import pretrain as pretrain
    from .probes.words_config import FinetuneConfig as FinetuneConfig
    from .probes.words import finetune_words as finetune_words
    from .probes.probe import list_probes as list_probes, run_probe as run_probe
    from .costs.cards import training_cost as training_cost, deployment_cost as deployment_cost
    from .study.study import Study as Study
    from .study.results import load_results as load_results
    from .study.pareto import pareto_front as pareto_front
    from .viz.mixing import influence_map as influence_map
    from .app.explorer import create_app as create_app


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'essl_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value = getattr(import_module(f"essl_nb.{_HOME[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
