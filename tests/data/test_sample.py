"""What is drawn depends on its key alone."""

import numpy as np
import pytest

from mm.data.sample import Choice, Media, Sample, Text, Turn, keyed_rng


@pytest.mark.parametrize("count", [1, 2, 6])
def test_visits_walk_through_all_options(count: int) -> None:
    options = tuple((Text("prompt: ", False), Text(f"{k}")) for k in range(count))
    samples = [Sample(f"s/0/{n}", (Media("image", b"x", "png"), Choice(options))) for n in range(40)]
    firsts = set()
    for sample in samples:
        drawn = [sample.drawn(7, visit) for visit in range(2 * count)]
        assert {parts[1:] for parts in drawn[:count]} == set(options) and drawn[count:] == drawn[:count]
        assert all(parts[0] == Media("image", b"x", "png") for parts in drawn)
        firsts.add(drawn[0])
    assert len(firsts) == count, "not every sample begins with the same option"
    if count > 1:
        assert [sample.drawn(7, 0) for sample in samples] != [sample.drawn(8, 0) for sample in samples]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_visits_has_the_text_first(share: float) -> None:
    """All of it, prompt and all, in its order; drawn anew for each visit, and the same again."""
    media, options = Media("image", b"x", "png"), ((Text("en: ", False), Text("a")), (Text("de: ", False), Text("b")))
    first = 0
    for n in range(400):
        sample, plain = (Sample(f"s/0/{n}", (media, Choice(options)), text_first=one) for one in (share, 0.0))
        for visit in range(4):
            drawn, texts = sample.drawn(7, visit), plain.drawn(7, visit)[1:]
            assert drawn in ((media, *texts), (*texts, media)) and drawn == sample.drawn(7, visit)
            first += drawn[0] != media
    assert abs(first - 1600 * share) <= 5 * (1600 * share * (1 - share)) ** 0.5
    several = Sample("s/0/k", (media, Text("a"), media, Text("b"), Turn("user")), text_first=1.0)
    assert several.drawn(0, 0) == (Text("a"), Text("b"), Turn("user"), media, media)


def test_equal_keys_draw_the_same_whatever_their_types() -> None:
    plain = keyed_rng(3, "epoch", 5).permutation(50)
    assert np.array_equal(plain, keyed_rng(np.int64(3), "epoch", np.int32(5)).permutation(50))
    for other in ((3, "epoch", 6), (4, "epoch", 5), (3, "epoch", "5"), (3, "epoch")):
        assert not np.array_equal(plain, keyed_rng(*other).permutation(50))
