"""How large batches are: as the server's options say, else as the model's description does."""

import pytest
import torch
from torch import nn

from headrace.backend.process import lanes_config
from headrace.config import LanesConfig
from headrace.model.described import Described
from headrace.model_options import ModelOptions, served_model


def found(described_options, **options):
    served = served_model(ModelOptions(source="file.py:build", device="cpu", **options).completed())
    description = Described(nn.Identity(), example={"input": torch.zeros(1)}, **described_options)
    config = lanes_config(served, description)
    assert lanes_config(served, None) == served.lanes
    return config.buckets, config.max_queue_delay_us


@pytest.mark.parametrize(
    ("described", "options", "expected"),
    [
        ({}, {}, (LanesConfig().buckets, 0)),
        ({"max_batch_size": 6, "max_queue_delay_us": 9}, {}, ((1, 2, 4, 6), 9)),
        ({"max_batch_size": 6}, {"max_batch_size": 3}, ((1, 2, 3), 0)),
        ({"max_batch_size": 6}, {"buckets": (5,)}, ((5,), 0)),
        ({"max_queue_delay_us": 9}, {"max_queue_delay_us": 7}, (LanesConfig().buckets, 7)),
    ],
)
def test_options_go_before_the_description_and_the_description_before_defaults(described, options, expected):
    assert found(described, **options) == expected
