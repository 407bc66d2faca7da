"""Options that cannot work are refused with the value, the limit and the remedy."""

import pytest

from headrace.config import DesignConfig, InputConfig, LanesConfig, LoadConfig, ModelConfig, RunConfig
from headrace.errors import InvalidOption


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            RunConfig(design=DesignConfig(name="fastest")),
            "--design fastest: .* original, executor, h2d_d2h_threads",
        ),
        (RunConfig(design=DesignConfig(num_workers=0)), "--num-workers 0: at least 1"),
        (RunConfig(design=DesignConfig(name="original", num_workers=2)), "original has one predict thread"),
        (
            RunConfig(design=DesignConfig(num_workers=2), model=ModelConfig(compile=True)),
            "--compile with --num-workers 2: torch.compile is not thread-safe .* --no-compile",
        ),
        (RunConfig(model=ModelConfig(precision="int8")), "--precision int8: the published designs compute float32"),
        (RunConfig(model=ModelConfig(precision="fp8")), "--precision fp8: .* use --design lanes, or tf32"),
        (RunConfig(inputs=InputConfig(batch_size=0)), "--batch-size 0"),
        (RunConfig(inputs=InputConfig(image_size=8)), "--image-size 8: must be 32 to 4096"),
        (RunConfig(inputs=InputConfig(distinct_images=0)), "--distinct-images 0"),
        (RunConfig(inputs=InputConfig(kind="video")), "--input video: choose one of photos, random"),
        (RunConfig(load=LoadConfig(num_iters=0)), "--num-iters 0"),
        (RunConfig(load=LoadConfig(warmup_iters=-1)), "--warmup-iters -1"),
        (RunConfig(load=LoadConfig(stall_timeout_s=0)), "--stall-timeout 0"),
        (RunConfig(lanes=LanesConfig(buckets=())), "--buckets : give ascending numbers of rows"),
        (RunConfig(lanes=LanesConfig(buckets=(0, 1))), "--buckets 0 1: .* at least 1"),
        (RunConfig(lanes=LanesConfig(buckets=(4, 2))), "--buckets 4 2: give ascending"),
        (RunConfig(lanes=LanesConfig(buckets=(2, 2))), "--buckets 2 2: .* each once"),
        (RunConfig(lanes=LanesConfig(max_queue_delay_us=-1)), "--max-queue-delay-us -1: cannot be negative"),
    ],
)
def test_refused(config, words):
    with pytest.raises(InvalidOption, match=words):
        config.validate()


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(design=DesignConfig(num_workers=4)),
        RunConfig(design=DesignConfig(name="original"), model=ModelConfig(compile=True)),
        RunConfig(design=DesignConfig(name="lanes"), model=ModelConfig(precision="int8")),
    ],
    ids=["defaults", "four workers", "compiled with one worker", "lanes in int8"],
)
def test_accepted(config):
    config.validate()


@pytest.mark.parametrize(
    ("design", "name"),
    [
        (DesignConfig(name="original"), "original"),
        (DesignConfig(name="executor"), "executor"),
        (DesignConfig(), "h2d_d2h_threads"),
        (DesignConfig(num_workers=3), "3_predict_workers"),
    ],
)
def test_experiments_have_their_published_names(design, name):
    assert design.experiment == name


@pytest.mark.parametrize(
    ("device", "kind", "index"), [("cpu", "cpu", None), ("cuda", "cuda", 0), ("cuda:3", "cuda", 3)]
)
def test_a_device_is_a_kind_and_a_number(device, kind, index):
    config = RunConfig(device=device)
    assert (config.device_kind, config.gpu_index) == (kind, index)


@pytest.mark.parametrize(
    ("inputs", "batches", "rows"),
    [
        (InputConfig(batch_size=1), 101, 101),
        (InputConfig(batch_size=32), 101, 256),
        (InputConfig(batch_size=512), 3, 512),
        (InputConfig(batch_size=4, distinct_images=2), 3, 4),
    ],
)
def test_distinct_rows(inputs, batches, rows):
    assert inputs.distinct_rows(batches) == rows
