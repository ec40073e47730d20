"""Many adapters are a matrix, a dendrogram and a forecast, against dense linear algebra in float64 on their updates."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from workbench import Workbench

import loratool

Deltas = dict[str, np.ndarray]
SHAPES = {"a": (30, 20), "b": (16, 40)}
RANKS = (3, 5, 2, 4, 3, 3)


def factors(seed: int, rank: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    draw = generator.standard_normal
    return draw((shape[0], rank)).astype("f4"), draw((rank, shape[1])).astype("f4")


def write(folder: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> Deltas:
    """An adapter with α = 2r, and its updates."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (up, down) in layers.items():
        tensors[f"base_model.model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.model.{module}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(layers.values()))[1].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {module: 2 * up.astype("f8") @ down.astype("f8") for module, (up, down) in layers.items()}


def spaces(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Deltas], loratool.CompareReport]:
    """Six adapters: the fifth is near the first, and the last has one layer only."""
    home = tmp_path_factory.mktemp("many")
    paths, deltas = [], []
    for at, rank in enumerate(RANKS):
        layers = {m: factors(10 * at + k, rank, shape) for k, (m, shape) in enumerate(SHAPES.items())}
        if at == 4:
            first = {m: factors(k, rank, shape) for k, (m, shape) in enumerate(SHAPES.items())}
            layers = {m: (up + 0.3 * layers[m][0], down) for m, (up, down) in first.items()}
        if at == 5:
            del layers["b"]
        paths.append(home / f"adapter-{at}")
        deltas.append(write(paths[-1], layers))
    return paths, deltas, loratool.compare(paths, device="cpu")


def test_every_cell_is_that_of_the_dense_updates(
    many: tuple[list[Path], list[Deltas], loratool.CompareReport],
) -> None:
    paths, deltas, report = many
    matrix = report.matrix
    for i, j in itertools.permutations(range(len(paths)), 2):
        shared = [m for m in SHAPES if m in deltas[i] and m in deltas[j]]
        one, other = (np.concatenate([deltas[at][m].ravel() for m in shared]) for at in (i, j))
        assert matrix.cosine[i][j] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-9)
        out, into, sti, signs = [], [], [], []
        for module in shared:
            a, b = deltas[i][module], deltas[j][module]
            (u, s, vt), (x, t, yt) = spaces(a, RANKS[i]), spaces(b, RANKS[j])
            out.append(np.sum((u.T @ x) ** 2) / min(RANKS[i], RANKS[j]))
            into.append(np.sum((vt @ yt.T) ** 2) / min(RANKS[i], RANKS[j]))
            left, right, values = np.hstack([u, x]), np.vstack([vt, yt]).T, np.concatenate([s, t])
            eye = np.eye(len(values))
            sti.append(np.abs((left.T @ left - eye) @ np.diag(values) @ (right.T @ right - eye)).sum() / values.sum())
            signs.append(np.mean(a * b < 0))
        assert matrix.overlap_out[i][j] == pytest.approx(np.mean(out))
        assert matrix.overlap_in[i][j] == pytest.approx(np.mean(into))
        assert matrix.interference[i][j] == pytest.approx(np.mean(sti))
        assert matrix.sign_conflict[i][j] == pytest.approx(np.mean(signs), abs=0.04)
    assert [matrix.cosine[at][at] for at in range(len(paths))] == pytest.approx([1.0] * len(paths))
    assert [matrix.interference[at][at] for at in range(len(paths))] == [0.0] * len(paths)


def of_the_sum(deltas: list[Deltas], ranks: dict[str, int]) -> tuple[list[float], float]:
    """What the sum, cut to a rank in each layer, has of each adapter's energy and of its own."""
    inside, own = np.zeros(len(deltas)), np.zeros(len(deltas))
    reached = whole = 0.0
    for module, rank in ranks.items():
        every = [delta.get(module, np.zeros(SHAPES[module])) for delta in deltas]
        u, s, vt = spaces(np.sum(every, axis=0), rank)
        inside += [np.sum((u.T @ delta @ vt.T) ** 2) for delta in every]
        own += [np.sum(delta**2) for delta in every]
        reached, whole = reached + np.sum(s**2), whole + np.sum(np.sum(every, axis=0) ** 2)
    return list(inside / own), reached / whole


def test_the_forecast_is_what_the_dense_sum_cut_to_the_rank_has_of_each(
    many: tuple[list[Path], list[Deltas], loratool.CompareReport],
) -> None:
    paths, deltas, report = many
    usual = of_the_sum(deltas, {module: max(RANKS) for module in SHAPES})
    assert list(report.forecast.energy_kept.values()) == pytest.approx(usual[0])
    assert report.forecast.sum_kept == pytest.approx(usual[1])
    asked = loratool.compare(paths[:2], rank=2, device="cpu").forecast
    expected = of_the_sum(deltas[:2], dict.fromkeys(SHAPES, 2))
    assert asked.rank == 2
    assert list(asked.energy_kept.values()) == pytest.approx(expected[0])
    assert asked.sum_kept == pytest.approx(expected[1])


def test_the_interference_of_all_is_that_of_the_dense_bases(
    many: tuple[list[Path], list[Deltas], loratool.CompareReport],
) -> None:
    _, deltas, report = many
    found = []
    for module in SHAPES:
        parts = [spaces(delta[module], rank) for delta, rank in zip(deltas, RANKS, strict=True) if module in delta]
        left, right = np.hstack([u for u, _, _ in parts]), np.vstack([vt for _, _, vt in parts]).T
        values = np.concatenate([s for _, s, _ in parts])
        eye = np.eye(len(values))
        sti = (left.T @ left - eye) @ np.diag(values) @ (right.T @ right - eye)
        found.append(np.abs(sti).sum() / values.sum())
    assert report.forecast.interference == pytest.approx(np.mean(found))


def test_the_dendrogram_is_average_linkage_by_its_definition(
    many: tuple[list[Path], list[Deltas], loratool.CompareReport],
) -> None:
    """Each join is of the two clusters whose pairs have the least mean distance, found among all."""
    _, _, report = many
    distance = 1 - np.array(report.matrix.cosine)
    clusters = {at: [at] for at in range(len(RANKS))}
    assert len(report.tree) == len(RANKS) - 1
    for number, join in enumerate(report.tree, len(RANKS)):
        means = {
            (a, b): np.mean([distance[i, j] for i in clusters[a] for j in clusters[b]])
            for a, b in itertools.combinations(sorted(clusters), 2)
        }
        least = min(means, key=lambda pair: means[pair])
        assert (join.one, join.other) == least
        assert join.distance == pytest.approx(means[least])
        clusters[number] = clusters.pop(join.one) + clusters.pop(join.other)
        assert join.adapters == len(clusters[number])
    assert (report.tree[0].one, report.tree[0].other) == (0, 4)


def test_pairs_worth_knowing_about_are_named_with_the_reason(tmp_path: Path) -> None:
    layer, other = factors(1, 3, (300, 200)), factors(2, 3, (300, 200))
    turned = (layer[0], np.linalg.qr(other[1].T)[0].T.astype("f4"))
    made = {
        "one": layer,
        "twin": (layer[0] * np.float32(2), layer[1] / 2),
        "against": (-layer[0] + other[0] / 3, layer[1]),
        "near": (layer[0] + other[0] / 2, layer[1]),
        "beside": turned,
        "unrelated": factors(3, 3, (300, 200)),
    }
    for name, (up, down) in made.items():
        write(tmp_path / name, {"a": (up, down)})
    report = loratool.compare([tmp_path / name for name in made], device="cpu")
    reasons = {pair.pair: pair.why for pair in report.notable}
    assert reasons["one × twin"] == "same"
    assert reasons["one × against"] == "opposed"
    assert reasons["one × near"] == "alike"
    assert reasons["one × beside"] == "shared-directions"
    assert not any("unrelated" in pair for pair in reasons)


def test_adapters_of_a_sum_of_ranks_above_the_exact_limit_are_forecast_as_dense_algebra_does(tmp_path: Path) -> None:
    """24 adapters of rank 16 on one weight: the leading directions are looked for in a smaller space, in float32."""
    deltas, paths = [], []
    for at in range(24):
        up, down = factors(at, 16, (500, 450))
        weights = np.float32(0.8) ** np.arange(16, dtype="f4")  # a spectrum that falls, as trained ones do
        paths.append(tmp_path / str(at))
        deltas.append(write(paths[-1], {"a": (up * weights, down)})["a"])
    report = loratool.compare(paths, rank=16, device="cpu")
    u, s, vt = spaces(np.sum(deltas, axis=0), 16)
    inside = [np.sum((u.T @ delta @ vt.T) ** 2) / np.sum(delta**2) for delta in deltas]
    assert report.forecast.sum_kept == pytest.approx(np.sum(s**2) / np.sum(np.sum(deltas, axis=0) ** 2), rel=0.02)
    assert list(report.forecast.energy_kept.values()) == pytest.approx(inside, abs=0.02)
    flat = np.stack([delta.ravel() for delta in deltas])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(report.matrix.cosine), flat @ flat.T, atol=2e-6)


def test_fifty_adapters_fit_a_screen_and_every_pair_is_shown_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Workbench(tmp_path / "bench", capsys)
    paths = [tmp_path / f"a-rather-long-name-{at:02d}" for at in range(60)]
    for at, path in enumerate(paths):
        write(path, {"a": factors(at // 2, 2, (12, 10))})
    for count in (50, 60):
        lines = bench.run("compare", *paths[:count]).out.splitlines()
        assert len(lines) <= 72
        assert max(map(len, lines[:50])) <= 80  # the matrix
    assert "2× " in "\n".join(lines)
    assert "the same update, cosine" in "\n".join(lines)
    text = bench.run("compare", *paths[:4], "--pairs").out
    assert text.count("the only layer") == 6
    assert json.loads(bench.run("compare", *paths[:4], "--json").out)["modules"] == {}
    table = json.loads(bench.run("compare", *paths[:4], "--pairs", "--json").out)
    assert len(table["modules"]["model.a.weight"]) == 6


def test_an_adapter_of_zeros_has_no_numbers_and_stands_apart(tmp_path: Path) -> None:
    for at in range(4):
        up, down = factors(at, 2, (12, 10))
        write(tmp_path / str(at), {"a": (up * np.float32(at != 3), down)})
    report = loratool.compare([tmp_path / str(at) for at in range(4)], device="cpu")
    assert report.matrix.cosine[3] == (None,) * 4
    assert report.forecast.energy_kept["3"] is None
    assert len(report.tree) == 3
    assert "–" in str(report)
