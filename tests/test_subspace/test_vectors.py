"""The specification's own numbers, to the precision they are printed with, by every route."""

from __future__ import annotations

import numpy as np
import pytest

from mergepipe.tasks.subspace.frames import nearest
from mergepipe.tasks.subspace.route import FULL_ELEMENTS
from support.matrices import Matrix, random_deltas, solve

pytestmark = pytest.mark.usefixtures("device")

SPEC = [
    [[-8,0,-1,9,15],[1,-7,11,-7,11],[-6,13,-7,-1,1],[4,-7,14,8,8],[-11,12,-14,-1,-1],[8,-13,-5,0,13]],
    [[1,-2,-7,-5,15],[-14,-4,-3,-9,10],[-15,-16,-15,-8,-14],[-11,8,14,1,-6],[-8,0,-9,6,-8],[11,13,-8,-7,-9]],
]  # fmt: skip
DELTAS = [np.array(rows, float) / 16 for rows in SPEC]
VALUES = [2.251650638839, 1.421201297263, 2.155874603046, 1.659694004817]
M_U = [
    [-0.392393672318, 0.601295213266, -0.373751727541, 0.164850186593],
    [-0.705372861687, -0.131149279984, 0.455741814165, 0.380780327506],
    [-0.115198347242, -0.092345372965, 0.791590360536, -0.584046640329],
    [-0.396248739496, 0.311630802312, 0.156018067255, -0.071400130072],
    [0.347887040907, 0.242920022091, -0.032562134443, -0.558244928555],
    [-0.239096666496, 0.675716191069, -0.024327272338, -0.412292252234],
]
MERGED = {
    "etf": [
        [0.416205218881, -0.071669280875, 0.479273358777, 0.828224594171, 1.068173302752],
        [-0.061717057542, -1.875569644480, 0.440401441224, -0.173130299863, 0.420164915431],
        [-0.701835392658, -1.226610432851, -0.660293794326, 0.317011165984, -1.184429290293],
        [-0.032966120046, -0.823046996368, 0.100432537451, 0.606724897550, 0.250359373924],
        [-0.204744313910, 0.732092147968, -0.544308709745, 0.573103630740, -0.627327970376],
        [-0.025749187411, -0.214971919074, -0.134213663527, 1.262627858250, 0.154709667550],
    ],
    "tsv": [
        [-0.342417776505, 0.223604931866, -0.197985820181, 0.269248886619, 1.343147928626],
        [-0.310272166753, -1.534220732670, 0.158345531518, -0.307338816508, 0.509156149542],
        [-1.150858528082, -0.879381458871, -1.043142153986, -0.054376769206, -0.723016131509],
        [0.362322316287, -0.880226338621, 0.428450420344, 0.778443946892, -0.020239736715],
        [-0.616869968595, 0.801891212948, -0.854154659720, 0.221221446718, -0.287752053047],
        [0.412682893588, -0.373045972556, 0.263773060369, 1.375393240327, -0.130223415861],
    ],
    "projection": [
        [0.471886427646, -0.308898705539, 0.709638810729, 0.362337958692, 1.417050004298],
        [-0.068885662945, -1.185294575416, 0.378342466095, -0.123334116584, 1.032225180970],
        [-1.066622713433, -0.304913543654, -1.122134902075, -0.221650708516, -1.089288181033],
        [-0.144729066387, -0.495127791247, 0.048712469953, 0.114994628829, 0.597422869545],
        [-0.381907129116, 0.636284666654, -0.676714182422, 0.088880201623, -0.929138727238],
        [-0.233991981682, -0.083606362822, -0.192029973889, 0.300685603409, 0.368172044760],
    ],
}
PRINTED = 6e-13


def generated(start: int) -> Matrix:
    x, values = start, []
    for _ in range(30):
        x = (1103515245 * x + 12345) % 2**31
        values.append(((x >> 16) % 33 - 16) / 16)
    return np.array(values).reshape(6, 5)


def test_deltas_are_the_generators() -> None:
    for number, delta in enumerate(DELTAS):
        np.testing.assert_array_equal(delta, generated(number + 1))


@pytest.mark.parametrize("svd", ["exact", "full", "gram"])
@pytest.mark.parametrize("mode", ["etf", "tsv", "projection"])
def test_merged(mode: str, svd: str) -> None:
    update, found = solve("mda", DELTAS, {"mode": mode, "rank": 2, "svd": svd})
    np.testing.assert_allclose(update, MERGED[mode], rtol=0, atol=PRINTED)
    assert found["subspace_lost"][0] == 0


@pytest.mark.parametrize("svd", ["full", "gram"])
def test_auto_rank_is_the_vectors_rank(svd: str) -> None:
    update, _ = solve("mda", DELTAS, {"svd": svd})
    np.testing.assert_allclose(update, MERGED["etf"], rtol=0, atol=PRINTED)


def test_lambda_scales() -> None:
    update, _ = solve("mda", DELTAS, {"lambda": 0.25})
    np.testing.assert_allclose(update, np.array(MERGED["etf"]) / 4, rtol=0, atol=PRINTED)


@pytest.mark.parametrize("way", ["full", "gram"])
def test_simplex_frame(way: str) -> None:
    import torch

    from support.matrices import components

    left, values, _ = components(DELTAS, 2)
    np.testing.assert_allclose(values, VALUES, rtol=0, atol=PRINTED)
    frame = nearest(torch.from_numpy(left.copy()), "etf", way, 1e-10)  # type: ignore[arg-type]
    assert frame.rank == 3
    vectors = frame.dense().numpy()
    np.testing.assert_allclose(vectors, M_U, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4) * 4 / 3 - 1 / 3, atol=1e-10)


@pytest.mark.slow
def test_exact_takes_the_gram_route_beyond_its_bound() -> None:
    deltas = random_deltas(1025, 4096, 2)
    assert deltas[0].size > FULL_ELEMENTS
    found = solve("mda", deltas, {"rank": 8})[1]
    assert found["subspace_route"][0] == 1
