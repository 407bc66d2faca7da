import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from headrace.bench.inputs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PAYLOAD,
    make_inputs,
    make_rows,
    photograph_files,
    photograph_folder,
    require_memory,
    shuffled,
)
from headrace.config import InputConfig
from headrace.errors import InputError

ROW_BYTES = 3 * 32 * 32 * 4


def small(**options) -> InputConfig:
    return InputConfig(**({"image_size": 32, "batch_size": 4, "distinct_images": 16} | options))


def as_pixels(row: torch.Tensor) -> np.ndarray:
    return ((row.numpy().transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN) * 255).round()


@pytest.fixture
def files(tmp_path):
    """Six files of one colour each: brightness 0, 40, 80, ..."""
    paths = tuple(tmp_path / f"{k}.png" for k in range(6))
    for k, path in enumerate(paths):
        Image.new("RGB", (300, 280), (40 * k,) * 3).save(path)
    return paths


@pytest.mark.parametrize("kind", ["photos", "random"])
def test_batches_are_copies_of_the_rows_that_the_index_names(kind):
    made = make_inputs(small(kind=kind), 6)
    assert (made.rows.dtype, made.rows.shape) == (torch.float32, (16, 3, 32, 32))
    assert made.row_index.shape == (6, 4)
    assert made.row_index.dtype == np.int64
    assert made.note is None
    for batch, index in zip(made.batches, made.row_index, strict=True):
        assert torch.equal(batch, made.rows[torch.from_numpy(index)])
        assert batch.is_contiguous()
        assert not batch.is_shared()
        assert not batch.is_pinned()


def test_no_two_batches_share_memory():
    made = make_inputs(small(kind="random"), 6)
    assert len({batch.untyped_storage().data_ptr() for batch in [made.rows, *made.batches]}) == 7


@pytest.mark.parametrize("kind", ["photos", "random"])
def test_the_seed_decides_everything_and_another_process_can_make_the_rows_again(kind):
    first, again = make_inputs(small(kind=kind, seed=3), 5), make_inputs(small(kind=kind, seed=3), 5)
    other = make_inputs(small(kind=kind, seed=4), 5)
    assert torch.equal(first.rows, again.rows)
    assert np.array_equal(first.row_index, again.row_index)
    assert torch.equal(first.rows, make_rows(small(kind=kind, seed=3), len(first.rows)))
    assert not torch.equal(first.rows, other.rows)
    assert not np.array_equal(first.row_index, other.row_index)


@pytest.mark.parametrize(
    ("options", "num_batches", "distinct"),
    [
        pytest.param({"distinct_images": 256}, 3, 12, id="no more rows than requests carry"),
        pytest.param({"distinct_images": 5}, 100, 5, id="as many as asked for"),
        pytest.param({"distinct_images": 1}, 100, 4, id="at least a batch"),
    ],
)
def test_how_many_rows_are_made(options, num_batches, distinct):
    assert len(make_inputs(small(kind="random", **options), num_batches).rows) == distinct


def test_every_photograph_row_is_another_one():
    rows = make_rows(small(), 64).reshape(64, -1)
    distances = torch.cdist(rows, rows) + torch.eye(64) * 1e9
    assert distances.min() > 1


def test_the_first_rows_are_the_whole_photographs():
    row = make_rows(small(image_size=64), 2)[PAYLOAD.index("coffee")]
    with Image.open(photograph_files()["coffee"]) as photograph:
        expected = np.asarray(photograph.resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
    difference = np.abs(as_pixels(row) - expected)
    assert difference.mean() < 4  # the photograph was made smaller in two steps


def test_noise_is_standard_normal():
    rows = make_rows(small(kind="random"), 16)
    assert abs(rows.mean()) < 0.05
    assert abs(rows.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("limit_batches", "count"), [(3, 3), (0.5, 1)], ids=["some fit", "none fits: one is made all the same"]
)
def test_beyond_the_memory_limit_batches_take_turns_and_a_note_says_so(limit_batches, count):
    limit = int(limit_batches * 4 * ROW_BYTES)
    made = make_inputs(small(kind="random", memory_limit_bytes=limit), 10)
    assert len(made.batches) == count
    assert made.note is not None
    assert "10 requests take turns" in made.note


def test_more_memory_than_the_machine_has_is_refused_before_any_is_taken():
    with pytest.raises(InputError, match=r"payloads need \d{6,}\.\d GB .* lower --batch-size"):
        make_inputs(InputConfig(kind="random", batch_size=1_000_000, image_size=4096), 1)


@pytest.mark.parametrize(("needed", "refused"), [(999, False), (1000, False), (1001, True)])
def test_the_memory_limit_is_what_is_free(needed, refused):
    if refused:
        with pytest.raises(InputError, match="are free"):
            require_memory(needed, 1000)
    else:
        require_memory(needed, 1000)


@given(
    distinct=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    count=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_shuffled_batches_hold_distinct_rows_and_differ_while_that_is_possible(distinct, batch_size, count, seed):
    distinct = max(distinct, batch_size)
    batches = [tuple(batch) for batch in shuffled(distinct, count, batch_size, seed).tolist()]
    assert len(batches) == count
    assert all(len(set(batch)) == batch_size and set(batch) <= set(range(distinct)) for batch in batches)
    assert len(set(batches)) == min(count, math.perm(distinct, batch_size))


def test_all_rows_are_used_before_one_comes_again():
    assert sorted(shuffled(12, 3, 4, seed=0).ravel().tolist()) == list(range(12))


def test_files_become_rows_in_their_order(files):
    made = make_inputs(small(files=files, batch_size=2), 3)
    values = [(40 * k / 255 - 127 / 255) / (128 / 255) for k in range(6)]
    assert made.rows.shape == (6, 3, 32, 32)
    assert np.allclose(made.rows.numpy().mean(axis=(1, 2, 3)), values, atol=1e-5)
    assert made.row_index.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat(made.batches), made.rows)
    assert made.note is None


@pytest.mark.parametrize(
    ("num_batches", "count", "noted"),
    [(2, 2, False), (3, 3, False), (7, 3, True)],
    ids=["fewer", "equal", "more"],
)
def test_files_make_no_more_batches_than_asked_for_and_take_turns_beyond(files, num_batches, count, noted):
    made = make_inputs(small(files=files, batch_size=2), num_batches)
    assert len(made.batches) == count
    assert (made.note is not None) == noted


def test_a_file_is_cropped_at_its_centre_and_turned_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (512, 256), "black")
    picture.paste("white", (256 - 50, 0, 256 + 50, 256))  # a vertical bar; the camera says: turn by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    (row,) = make_inputs(small(files=(tmp_path / "turned.png",), batch_size=1, image_size=224), 1).rows
    bright = row[0] > 0
    assert bright[112].all()
    assert not bright[[0, -1]].any()


def test_a_crop_larger_than_the_usual_resize_is_filled(files):
    rows = make_rows(small(files=files[5:], batch_size=1, image_size=400), 1)
    assert rows.min() == rows.max()


def test_files_must_fill_their_batches(files):
    with pytest.raises(InputError, match=r"6 files do not fill batches of 4.*--batch-size 1"):
        make_inputs(small(files=files, batch_size=4), 1)


def test_missing_and_unreadable_files_are_named(tmp_path, files):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:300])
    for name in ("absent.png", "text.png", "half.png", "."):
        with pytest.raises(InputError, match="not readable as an image") as error:
            make_inputs(small(files=(tmp_path / name,), batch_size=1), 1)
        assert str(tmp_path / name) in str(error.value)


def test_the_photographs_to_classify():
    found = photograph_files()
    assert list(found) == ["chelsea", "coffee", "rocket", "motorcycle_left", "camera"]
    assert all(path.is_file() for path in found.values())


def test_without_scikit_image_photographs_are_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"pip install 'headrace\[photos\]', or use --input random"):
        photograph_folder("no_such_package")


def test_a_missing_photograph_is_named(tmp_path):
    (tmp_path / "chelsea.png").touch()
    with pytest.raises(InputError, match="no photograph coffee, camera there"):
        photograph_files(("chelsea", "coffee", "camera"), tmp_path)
