"""Maps to boxes and back, against positions and boxes worked out by hand."""

import pytest
import torch

from lightning_quant.domains.detection.boxes import centers, decode, raw_maps, stride_of, to_boxes
from lightning_quant.domains.detection.losses import assign, detection_losses
from lightning_quant.errors import ConfigurationError

SIZE = (32, 48)  # height and width: 4 x 6 positions with a stride of 8


def empty_maps() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 2, 4, 6), -10.0), torch.zeros(1, 4, 4, 6)


def test_centers_are_in_the_middle_of_their_positions_row_by_row() -> None:
    points = centers(torch.zeros(1, 2, 4, 6), 8)
    assert points[:2].tolist() == [[4, 4], [12, 4]]
    assert points[6].tolist() == [4, 12]
    assert points[-1].tolist() == [44, 28]


def test_distances_go_to_the_left_the_top_the_right_and_the_bottom() -> None:
    box = to_boxes(torch.tensor([[20.0, 12.0]]), torch.tensor([[1.0, 0.5, 2.0, 1.5]]), 8)
    assert box.tolist() == [[12, 8, 36, 24]]


def test_decoding_finds_what_the_maps_hold_best_first() -> None:
    scores, distances = empty_maps()
    scores[0, 1, 1, 2] = 2.0
    distances[0, :, 1, 2] = torch.tensor([1.0, 0.5, 2.0, 1.5])
    scores[0, 1, 1, 3] = 1.0  # nearly the same box: the second best of its class is dropped
    distances[0, :, 1, 3] = torch.tensor([2.0, 0.5, 1.0, 1.5])
    scores[0, 0, 1, 3] = 0.5  # and of another class kept
    scores[0, 0, 3, 5] = 3.0  # it reaches beyond the image
    distances[0, :, 3, 5] = 1.0
    (found,) = decode(scores, distances, SIZE, 0.3, 0.5, most=10)
    assert found["labels"].tolist() == [0, 1, 0]
    assert found["boxes"].tolist() == [[36, 20, 48, 32], [12, 8, 36, 24], [12, 8, 36, 24]]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 0.5]).sigmoid())
    (best,) = decode(scores, distances, SIZE, 0.3, 0.5, most=1)
    assert best["labels"].tolist() == [0]
    (none,) = decode(*empty_maps(), SIZE, 0.3, 0.5, most=10)
    assert none["boxes"].shape == (0, 4)


def test_a_position_answers_for_the_smallest_box_around_it() -> None:
    points = centers(torch.zeros(1, 2, 4, 6), 8)
    boxes = torch.tensor([[0.0, 0.0, 48.0, 32.0], [16.0, 8.0, 24.0, 16.0], [41.0, 25.0, 43.0, 27.0]])
    chosen = assign(points, boxes, 8).view(4, 6)
    assert chosen.tolist() == [
        [-1, 0, 0, 0, 0, -1],  # the large one: at most 12 pixels from its center, (24, 16)
        [-1, 0, 1, 0, 0, -1],
        [-1, 0, 0, 0, 0, -1],
        [-1, 0, 0, 0, 0, 2],  # smaller than a position
    ]
    assert (assign(points, torch.zeros(0, 4), 8) == -1).all()


def test_losses_vanish_for_maps_that_are_right_and_count_what_is_wrong() -> None:
    targets = [{"boxes": torch.tensor([[16.0, 8.0, 24.0, 16.0]]), "labels": torch.tensor([1])}]
    scores, distances = empty_maps()
    scores[0, 1, 1, 2], distances[0, :, 1, 2] = 10.0, 0.5
    right = [loss.item() for loss in detection_losses(scores, distances, targets, SIZE)]
    assert right == pytest.approx([0, 0], abs=1e-3)
    distances[0, 2, 1, 2] = 1.5  # twice as wide: the IoU is a half, and the smallest box around both is the wide one
    assert detection_losses(scores, distances, targets, SIZE)[1].item() == pytest.approx(0.5, abs=1e-4)
    scores[0, 1, 1, 2] = 0.0  # focal loss of p = 0.5: 0.25 * 0.5**2 * ln 2
    assert detection_losses(scores, distances, targets, SIZE)[0].item() == pytest.approx(0.0433, abs=1e-3)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert [loss.isfinite().item() for loss in detection_losses(scores, distances, nothing, SIZE)] == [True, True]


def test_maps_are_found_in_a_dict_and_in_a_pair() -> None:
    scores, distances = empty_maps()
    for output in ({"distances": distances, "scores": scores}, (scores, distances), [scores, distances]):
        found = raw_maps(output, 2)
        assert found[0] is scores or torch.equal(found[0], scores)
        assert torch.equal(found[1], distances)


@pytest.mark.parametrize(
    "output",
    [torch.zeros(1, 6, 4, 6), {"scores": torch.zeros(1, 2, 4, 6)}, (torch.zeros(1, 3, 4, 6), torch.zeros(1, 4, 4, 6))],
    ids=["one tensor", "no distances", "other classes"],
)
def test_other_outputs_are_refused(output: object) -> None:
    with pytest.raises(ConfigurationError, match=r"The detector returned .*num_classes=2"):
        raw_maps(output, 2)


def test_a_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="maps of 4x6"):
        stride_of(torch.zeros(1, 2, 4, 6), (32, 50))
