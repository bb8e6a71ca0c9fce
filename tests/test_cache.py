"""Rows on the disk are read as they were written, or count as missing, whoever writes and is killed."""

import errno
import multiprocessing
import os
import pickle
import shutil

import pytest
import torch

from hf_vpt.data.cache import ArrayCache, cache_folder, make_key


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


def rows(number=4, shape=(3, 5), dtype=torch.float32):
    values = torch.randn(number, *shape, generator=torch.Generator().manual_seed(0))
    return (values * 50 + 100).clamp(0, 255).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_read_in_any_order_as_they_were_written(tmp_path, dtype):
    values, cache = rows(dtype=dtype), ArrayCache(tmp_path / "folder" / "rows", 4, (3, 5), dtype)
    assert cache.missing() == [0, 1, 2, 3]
    for row in (2, 0, 3):
        cache.write(row, values[row])
    assert cache.missing() == [1]
    for opened in (cache, ArrayCache(tmp_path / "folder" / "rows", 4, (3, 5), dtype)):
        assert [opened.is_done(row) for row in range(4)] == [True, False, True, True]
        found = opened.read([3, 0])
        assert found.dtype == dtype
        assert torch.equal(found, values[[3, 0]])


def test_a_row_is_rounded_to_the_number_format_of_the_cache(tmp_path):
    values, cache = rows(1), ArrayCache(tmp_path / "rows", 1, (3, 5), torch.bfloat16)
    cache.write(0, values[0])
    assert torch.equal(cache.read([0]), values.bfloat16())


def test_what_is_read_is_a_copy(tmp_path):
    cache = ArrayCache(tmp_path / "rows", 1, (2,), torch.float32)
    cache.write(0, torch.tensor([1.0, 2.0]))
    cache.read([0]).zero_()
    assert cache.read([0]).tolist() == [[1.0, 2.0]]


def test_a_row_whose_bytes_are_not_those_that_were_written_counts_as_missing(tmp_path):
    values, cache = rows(2), ArrayCache(tmp_path / "rows", 2, (3, 5), torch.float32)
    for row in range(2):
        cache.write(row, values[row])
    content = bytearray((tmp_path / "rows").read_bytes())
    content[-1] ^= 1  # as a power failure between the row and its checksum might leave it
    (tmp_path / "rows").write_bytes(content)
    opened = ArrayCache(tmp_path / "rows", 2, (3, 5), torch.float32)
    assert opened.is_done(0) and not opened.is_done(1)
    assert opened.missing() == [1]
    opened.write(1, values[1])
    assert torch.equal(opened.read([0, 1]), values)


def test_a_row_of_zeros_is_not_taken_for_a_missing_one(tmp_path):
    ArrayCache(tmp_path / "rows", 2, (2,), torch.float32).write(1, torch.zeros(2))
    opened = ArrayCache(tmp_path / "rows", 2, (2,), torch.float32)
    assert [opened.is_done(row) for row in range(2)] == [False, True]


def test_a_file_whose_making_was_interrupted_is_made_to_its_end(tmp_path):
    (tmp_path / "rows").write_bytes(b"")
    cache = ArrayCache(tmp_path / "rows", 3, (2,), torch.float32)
    assert cache.missing() == [0, 1, 2]
    assert (tmp_path / "rows").stat().st_size == cache.num_bytes == 3 * (4 + 8)


def test_opening_a_second_time_keeps_what_is_there(tmp_path):
    first = ArrayCache(tmp_path / "rows", 2, (2,), torch.float32)
    first.write(0, torch.ones(2))
    second = ArrayCache(tmp_path / "rows", 2, (2,), torch.float32)
    second.write(1, torch.full((2,), 2.0))
    assert first.missing() == second.missing() == []
    assert first.read([0, 1]).tolist() == second.read([0, 1]).tolist() == [[1.0, 1.0], [2.0, 2.0]]


def fill(file, offset):
    cache = ArrayCache(file, 200, (50,), torch.float32)
    for step in range(200):
        row = (step + offset) % 200
        if not cache.is_done(row):
            cache.write(row, torch.full((50,), float(row)))


def test_several_processes_make_and_fill_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path / "rows", offset)) for offset in (0, 0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = ArrayCache(tmp_path / "rows", 200, (50,), torch.float32)
    assert all(cache.is_done(row) for row in range(200))
    assert torch.equal(cache.read(range(200)), torch.arange(200.0)[:, None].expand(-1, 50))


def test_a_pickled_cache_shows_the_same_file_and_takes_no_rows_along(tmp_path):
    cache = ArrayCache(tmp_path / "rows", 2, (1000, 100), torch.float32)
    cache.write(0, torch.ones(1000, 100))
    words = pickle.dumps(cache)
    assert len(words) < 10_000
    copy = pickle.loads(words)
    copy.write(1, torch.zeros(1000, 100))
    assert cache.is_done(1) and copy.is_done(0)


def test_a_row_of_another_shape_is_an_error_that_says_what_all_images_need(tmp_path):
    cache = ArrayCache(tmp_path / "rows", 2, (2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"shape \(3, 2\).*\(2, 3\).*one size"):
        cache.write(0, torch.zeros(3, 2))
    assert cache.missing() == [0, 1]


def test_too_small_a_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"(?s)0\.00 GiB free.*needs 4\.00 GiB.*cache_dir"):
        ArrayCache(tmp_path / "rows", 2**10, (2**20,), torch.float32)
    assert not (tmp_path / "rows").exists()


def test_keys_tell_all_parts_from_one_another():
    same = [make_key("a", {"x": 1, "y": [2, 3]}), make_key("a", {"y": [2, 3], "x": 1})]
    others = [make_key("a", {"x": 1, "y": [3, 2]}), make_key("b", {"x": 1, "y": [2, 3]}), make_key("a")]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


def test_caches_lie_in_the_folder_that_is_named_or_in_hugging_faces_own(tmp_path):
    from huggingface_hub.constants import HF_HOME

    assert cache_folder(str(tmp_path), "images") == tmp_path / "images"
    assert str(cache_folder(None, "images")).startswith(HF_HOME)


def test_a_file_system_that_reserves_nothing_gets_a_file_with_holes(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    cache = ArrayCache(tmp_path / "rows", 3, (2,), torch.float32)
    cache.write(2, torch.ones(2))
    assert cache.missing() == [0, 1]


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(OSError, match=r"(?s)GiB free.*The cache needs.*free some"):
        ArrayCache(tmp_path / "rows", 3, (2,), torch.float32)
    assert not (tmp_path / "rows").exists()
