"""FNet."""
import math

import torch

from essl_nb.mixers.fnet import FNet

from . import case, compare


@case(FNet, package="transformers", what="FNetBasicFourierTransform, made orthonormal", tolerance=1e-12)
def fnet():
    from transformers import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    theirs = FNetBasicFourierTransform(FNetConfig(hidden_size=24, use_tpu_fourier_optimizations=False))
    scale = math.sqrt(50 * 24)  # ours is orthonormal
    return compare(FNet(24), lambda x: theirs(x)[0] / scale, torch.randn(3, 50, 24, dtype=torch.float64))
