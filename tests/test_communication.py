"""What exchanges between processes cost: on paper by hand, and as two processes measure it."""

import pytest
import torch
from conftest import SMALL
from processes import Launch, complete

import communication
import distributed
from configuration import load_config
from training_state import TrainingState

CPU = torch.device("cpu")


def test_exchanges_on_paper_by_hand() -> None:
    cluster = communication.Cluster(
        gpus=8, flops=1e12, share=0.5, nvlink=1e9, network=1e8, link_share=0.5, latency=1e-3
    )
    assert communication.exchange_seconds(8_000_000, 1, cluster) == 0
    inside = 2 * 7 / 8 * 8e6 / 0.5e9 + 1e-3
    assert communication.exchange_seconds(8_000_000, 8, cluster) == pytest.approx(inside)
    outside = 2 * 3 / 4 * 1e6 / 0.5e8 + 2e-3  # an eighth of the bytes between 4 machines
    assert communication.exchange_seconds(8_000_000, 32, cluster) == pytest.approx(inside + outside)
    parts = [communication.Exchange("discriminator", 8_000_000, 5)]
    assert communication.estimate(1e9, parts, 8, cluster) == pytest.approx((2e-3, 5 * inside))


def test_the_cost_of_exchanges_is_measured(launch: Launch) -> None:
    ended = launch(2, communication.main, SMALL)
    complete(ended)
    config = load_config(None, SMALL)
    state = TrainingState(config, CPU)
    critic, rest = (
        sum(p.numel() for name in names for p in state.parameters[name])
        for names in (["discriminator"], ["vae", "predictor"])
    )
    numbers = 2 * (critic + distributed.VOTES) + rest + distributed.VOTES  # two critic steps
    assert f"an iteration: {4 * numbers / 1e6:.1f} MB" in ended[0].output
    assert "2 processes, batch 4" in ended[0].output
    assert ended[1].output == ""
