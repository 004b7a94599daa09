"""Runs of several vocabularies in one table and picture."""

import json

import pytest

from benchmarks import vq_sizes


def run(head, seed, lr, end, vocab=64, seconds=1.0):
    settings = {"head": head, "seed": seed, "lr": lr, "options": {}, "backbone": {"hidden_size": 4}}
    curve = [[100, 2 * end], [200, end]]
    sizes = {"floats": vocab, "dense_floats": 4 * vocab}
    return {"settings": settings, "curve": curve, "test_ppl": end + 1, "step_seconds": seconds, **sizes}


def test_the_best_rate_of_all_seeds_counts(tmp_path, capsys):
    small = [run("two_fitted", seed, lr, 10.0 * lr + seed) for seed in (0, 1) for lr in (1, 2)]
    small += [run("dense", seed, 1, 20.0 + 2 * seed, seconds=2.0) for seed in (0, 1)]
    small += [run("two_fitted", 0, 0.5, 1.0)]  # the best, of one seed only
    large = [run("two_fitted", 0, 1, 30.0, vocab=128), run("dense", 0, 1, 40.0, vocab=128)]
    for name, runs in (("small", small), ("large", large)):
        (tmp_path / name).write_text(json.dumps({"runs": runs}))
    files = [str(tmp_path / "large"), str(tmp_path / "small")]
    vq_sizes.main([*files, "--picture", str(tmp_path / "sizes.png")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["64", "25.0%", "200", "[0, 1]", "0.500 ± 0.000", "0.523 ± 0.001", "0.50 ± 0.00"]
    assert lines[3] == ["128", "25.0%", "200", "[0]", "0.750", "0.756", "1.00"]
    assert (tmp_path / "sizes.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_missing_is_told(tmp_path):
    for runs in ([run("dense", 0, 1, 9.0)], [run("dense", 0, 1, 9.0), run("two_fitted", 1, 1, 9.0)]):
        (tmp_path / "runs").write_text(json.dumps({"runs": runs}))
        with pytest.raises(SystemExit, match="Expected runs of 'two_fitted' and 'dense' of the same seed"):
            vq_sizes.main([str(tmp_path / "runs")])
