"""The peers of benchmarks/peers.py are the same network: they follow the same curve."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


def test_every_peer_follows_the_curve_of_lascaux(peers: ModuleType) -> None:
    shape = peers.Shape(2, 32, 2, 16, 8, 61, 4)
    steps = {
        "lascaux": peers.lascaux_step(shape, "fp32", False),
        "loop": peers.peer_step(peers.loop_model(shape), shape, "fp32", False),
        "transformers": peers.peer_step(peers.transformers_model(shape), shape, "fp32", False),
    }
    curves = {name: [step() for _ in range(5)] for name, step in steps.items()}
    assert curves["lascaux"][-1] < curves["lascaux"][0]
    for curve in curves.values():
        assert curve == pytest.approx(curves["lascaux"], rel=1e-6)
