"""What every test shares: one thread for each process, no network, one cache in the repository."""
import os
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported: pytest-xdist already uses every core, and one thread gives the same sums everywhere.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ[name] = "false" if name.startswith("TOKEN") else "1"
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["ESSL_QUICK"] = "1"  # tutorials train for a few steps only
os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"
# Everything in the cache is named by its content and written atomically, so runs and workers may share it.
os.environ.setdefault("ESSL_CACHE", str(ROOT / ".cache" / "tests"))

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests and notebook cells marked slow")
    parser.addoption("--net", action="store_true", help="also run the tests that may leave this machine")


def pytest_collection_modifyitems(config, items):
    skip = {}
    if not config.getoption("--slow"):
        skip["slow"] = "slow: run with --slow"
    if not config.getoption("--net"):
        skip["net"] = "needs the network: run with --net"
    if any("cuda" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            skip["cuda"] = "no CUDA device here"
    for item in items:
        for marker, reason in skip.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def is_loopback(address) -> bool:
    "Whether a socket address stays on this machine (Unix sockets do)."
    host = address[0] if isinstance(address, tuple) else ""
    return not host or host in ("localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")


@pytest.fixture(autouse=True)
def loopback_only(request, monkeypatch):
    "No test leaves this machine, unless it is marked `net`."
    if "net" in request.keywords:
        return
    connect = socket.socket.connect

    def guarded(self, address):
        if not is_loopback(address):
            raise OSError(f"A test tried to reach {address}. Tests stay on this machine; mark it `net` if it must not.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT
