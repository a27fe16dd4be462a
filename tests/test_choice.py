"""``kernels/choice.py``: which path runs a product."""

import dataclasses
import itertools

import pytest

from adallm.kernels import choice, hopper
from adallm.kernels.choice import GPU, Row
from adallm.kernels.matmul import Config, blocks
from adallm.sm89 import build

H100, RTX4090 = GPU("sm_90", 132, "none"), GPU("sm_89", 128, "none")
LAYERS = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (51200, 5120), (16, 16), (48, 80)]
TOKENS = [1, 2, 8, 9, 33, 64, 65, 257, 1024, 4096, 100_000]


@pytest.mark.parametrize("gpu", [H100, RTX4090, GPU("sm_80", 108, "none")])
def test_every_size_has_a_path(gpu):
    for kind, m, (n, k) in itertools.product(choice.TABLES[gpu.family], TOKENS, LAYERS):
        config = choice.choose(m, n, k, kind, gpu)
        if config is None:
            assert m > 512
            continue
        assert config.splits == 1 or -(-k // (config.slices * config.k)) >= 2 * config.splits
        assert config.splits == 1 or blocks(config, m, n) <= 4096
        assert config.slices in (1, config.warps)


def test_few_rows_are_split_along_k_and_many_are_not():
    assert choice.choose(16, 4096, 12288, "bf16", H100).splits > 1
    assert choice.choose(16, 51200, 5120, "bf16", H100).splits == 1


def test_a_row_of_times_takes_the_least():
    row = Row(8, (Config(128, 8, 64, 1, 1, 4, 3), Config(16, 8, 64, 1, 1, 4, 3)), ((10.0, 10.0), (3.0, 2.0)))
    assert choice.pick(row, 8, 128 * 10, 4096, 10).n == 128  # one wave of 10 against eight of 2, or one of 3
    assert choice.pick(row, 8, 16 * 10, 4096, 10).n == 16


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("m", [16, 64, 512])
def test_an_overlapping_configuration_takes_its_k(kind, m):
    assert choice.choose(m, 4096, 4096, kind, H100).overlap
    for k in (4096 + 16, 4096 + 64, 96):
        config = choice.choose(m, 4096, k, kind, H100)
        assert config.takes(k)
        assert not config.overlap
    step = Config(64, 64, 128, 1, 3, 4, 4, True)
    assert step.takes(768)
    assert not step.takes(896)
    # Two steps for three splits, as the launcher says before it launches.
    given = build.product("fp8", step, 512)
    with pytest.raises(ValueError, match=r"K is 512; .* has 48 programs for 16 tiles"):
        hopper.launch(**given)


def test_tiles_that_do_not_fill_the_gpu_are_shared_evenly():
    config = Config(64, 64, 64, 1, 1, 4, 4, True, 2)
    row = Row(64, (config,), ((10.0, 10.0),))
    assert choice.pick(row, 64, 64 * 132, 16384, 132) == dataclasses.replace(config, programs=0)
    # 133 tiles take two waves one by one, and hardly more than one evenly.
    assert choice.pick(row, 64, 64 * 133, 16384, 132).programs == 264
    assert [c.programs for c in choice.shared(config, 64, 64 * 133, 128, 132)] == [0]
    alone = dataclasses.replace(config, splits=3, programs=1)
    assert [(c.splits, c.programs) for c in choice.shared(alone, 64, 64 * 80, 4096, 132)] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 132),
    ]
    # More tiles than multiprocessors are not split each.
    assert [(c.splits, c.programs) for c in choice.shared(alone, 64, 64 * 133, 4096, 132)] == [(1, 0), (1, 132)]


def test_no_fp8_before_sm_89():
    with pytest.raises(ValueError, match=r"a100 has no FP8 tensor cores.*supported there: activations='bf16'"):
        choice.choose(1, 16, 16, "fp8", GPU("sm_80", 108, "a100"))


def test_a_tuned_table_goes_first_and_is_kept_in_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.reload()
    config = Config(32, 8, 64, 2, 1, 2, 2)
    path = choice.write_tuned("mine", {("bf16", 48, 80): (Row(4, (config,)), Row(8, (config,)))})
    assert path == tmp_path / "adallm" / "tune" / "mine.json"
    mine = GPU("sm_89", 128, "mine")
    assert choice.choose(3, 48, 80, "bf16", mine) == config
    assert choice.choose(8, 48, 80, "bf16", mine) == config
    assert choice.choose(9, 48, 80, "bf16", mine) == choice.choose(9, 48, 80, "bf16", RTX4090)
    assert choice.choose(3, 64, 80, "bf16", mine) == choice.choose(3, 64, 80, "bf16", RTX4090)
    choice.reload()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"entries": [{"kind": "bf16"}]}', '{"entries": [{"kind": 1, "n": 1, "k": 1, "rows": [{}]}]}']
)
def test_a_damaged_table_is_named(monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.reload()
    path = choice.cache_file("mine")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json: not a tuning table .*run adallm bench tune again"):
        choice.tuned("mine")
    choice.reload()
