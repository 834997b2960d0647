"""Mask voting against a reference that loops over classes, candidates and pixels."""

import math

import numpy as np
import pytest
import torch
from benchmarks.measure import peak_process_memory
from torchvision.ops import nms

from mnc_d2.modeling import vote_masks
from mnc_d2.modeling.roi_heads import mask_voting, selection

SIZE = (22, 30)  # height, width
M, CLASSES = 5, 3


def make_candidates(count=24, seed=0):
    """Candidates in a few clusters, so that many vote for one another: boxes, scores, masks."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.tensor([[2.0, 3.0, 13.0, 12.0], [12.0, 5.0, 28.0, 20.0], [4.0, 11.0, 11.0, 20.0]])
    boxes = clusters[torch.arange(count) % 3] + 2.5 * torch.randn(count, 4, generator=generator)
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, SIZE[1])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, SIZE[0])
    scores = torch.rand(count, CLASSES + 1, generator=generator).mul(2).softmax(dim=1)[:, :CLASSES]
    # Mostly high in the middle and low at the rim.
    rim = torch.tensor([0.2, 0.6, 0.9, 0.6, 0.2])
    masks = (rim[:, None] * rim + 0.5 * torch.rand(count, M, M, generator=generator)).clamp(max=1)
    return boxes, scores, masks


def slow_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def slow_bilinear(image, y, x):
    """Value at continuous index (y, x), clamped to the border."""
    y, x = min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
    top = image[y0, x0] * (x0 + 1 - x) + image[y0, x1] * (x - x0)
    bottom = image[y1, x0] * (x0 + 1 - x) + image[y1, x1] * (x - x0)
    return top * (y0 + 1 - y) + bottom * (y - y0)


def slow_render(box, mask, size):
    """A mask in the frame of its box as an image: pixels whose centre is inside the box."""
    image = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = row + 0.5, column + 0.5
            if box[0] <= x < box[2] and box[1] <= y < box[3]:
                v, u = (y - box[1]) / (box[3] - box[1]), (x - box[0]) / (box[2] - box[0])
                image[row, column] = slow_bilinear(mask, v * len(mask) - 0.5, u * len(mask) - 0.5)
    return image


def slow_vote(boxes, scores, masks, size, score_threshold, nms_threshold, iou_threshold, mask_threshold, limit):
    """Detections (score, class, box, mask, image), best first."""
    survivors = []
    for cls in range(scores.shape[1]):
        candidates = [k for k in range(len(boxes)) if scores[k, cls] > score_threshold]
        kept = nms(boxes[candidates].view(-1, 4), scores[candidates, cls], nms_threshold).tolist()
        survivors += [(scores[candidates[i], cls].item(), cls, candidates[i]) for i in kept]
    detections = []
    boxes, scores, masks = boxes.double().tolist(), scores.double().tolist(), masks.double().numpy()
    for score, cls, survivor in sorted(survivors, reverse=True)[:limit]:
        voters = [k for k in range(len(boxes)) if slow_iou(boxes[k], boxes[survivor]) >= iou_threshold]
        total = sum(scores[k][cls] for k in voters)
        image = np.zeros(size)
        for k in voters:
            image += scores[k][cls] / total * slow_render(boxes[k], masks[k], size)
        rows, columns = np.nonzero(image >= mask_threshold)
        box = boxes[survivor]
        if len(rows):
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        mask = np.zeros((M, M))
        for i in range(M):
            for j in range(M):
                y, x = box[1] + (i + 0.5) / M * (box[3] - box[1]), box[0] + (j + 0.5) / M * (box[2] - box[0])
                mask[i, j] = slow_bilinear(image, y - 0.5, x - 0.5)
        detections.append((score, cls, box, mask, len(voters)))
    return detections


DEFAULTS = {
    "score_threshold": 0.05,
    "nms_threshold": 0.3,
    "voting_iou_threshold": 0.5,
    "mask_threshold": 0.4,
    "max_detections": 100,
}


def check_against_slow(candidates, **changes):
    settings = {**DEFAULTS, **changes}
    result = vote_masks(*candidates, SIZE, **settings)
    expected = slow_vote(*candidates, SIZE, *settings.values())
    assert len(result) == len(expected)
    assert result.image_size == SIZE
    assert result.pred_classes.tolist() == [cls for _, cls, *_ in expected]
    assert result.scores.tolist() == [score for score, *_ in expected]
    # float32 sums of some tens of terms in [0, 1]; the boxes are whole pixels or candidates, so they are exact.
    for i, (_, _, box, mask, _) in enumerate(expected):
        assert result.pred_boxes.tensor[i].tolist() == box
        np.testing.assert_allclose(result.pred_masks[i, 0].numpy(), mask, atol=1e-5)
    return expected


@pytest.fixture(params=["detections one by one", "detections at once"])
def either_way(request, monkeypatch):
    """Average the masks of each detection alone, and of all together."""
    monkeypatch.setattr(mask_voting, "_MAX_PADDING", 0 if request.param == "detections one by one" else math.inf)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_reference(seed):
    expected = check_against_slow(make_candidates(seed=seed))
    assert len(expected) > 8 and max(voters for *_, voters in expected) > 3


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    "setting",
    [
        {"score_threshold": 0.3},
        {"nms_threshold": 0.6},
        {"voting_iou_threshold": 0.8},
        {"mask_threshold": 0.6},
        {"mask_threshold": 0.9},
        {"mask_threshold": 0.0},
        {"max_detections": 3},
        {"max_detections": 0},
    ],
    ids=str,
)
def test_every_setting_is_that_of_the_slow_reference(setting):
    check_against_slow(make_candidates(), **setting)


def test_candidates_and_voters_of_each_detection_are_told():
    boxes, scores, masks = make_candidates()
    boxes[3] = math.nan  # left out, but counted
    result = vote_masks(boxes, scores, masks, SIZE)
    assert torch.equal(result.scores, scores[result.candidates, result.pred_classes])
    for candidate, count in zip(result.candidates.tolist(), result.num_voters.tolist()):
        ious = [slow_iou(boxes[candidate].tolist(), box) for box in boxes[boxes.isfinite().all(dim=1)].tolist()]
        # A box without area overlaps not even itself, but it votes.
        assert count == max(1, sum(iou >= 0.5 for iou in ious))


def test_unknown_detection_box_is_an_error():
    with pytest.raises(ValueError, match="tight.*regressed.*loose"):
        vote_masks(*make_candidates(), SIZE, detection_box="loose")


def test_regressed_boxes_need_boxes_of_each_class():
    with pytest.raises(ValueError, match="needs class_boxes"):
        vote_masks(*make_candidates(), SIZE, detection_box="regressed")


@pytest.mark.parametrize("limit", [1, 3, 20, 10_000, -1])
@pytest.mark.parametrize("count, num_classes", [(40, 1), (60, 7), (30, 300)])
def test_detections_are_the_best_survivors_of_one_nms_for_each_class(limit, count, num_classes):
    generator = torch.Generator().manual_seed(0)
    start = 900 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat((start, start + 50 + 300 * torch.rand(count, 2, generator=generator)), dim=1)
    # All different, as the order of equal ones is nobody's promise.
    scores = torch.randperm(count * num_classes, generator=generator).view(count, num_classes) / (count * num_classes)
    survivors = []
    for cls in range(num_classes):
        candidates = (scores[:, cls] > 0.2).nonzero().squeeze(1)
        kept = candidates[nms(boxes[candidates], scores[candidates, cls], 0.3)]
        survivors += [(scores[k, cls].item(), k.item(), cls) for k in kept]
    survivors = sorted(survivors, reverse=True)[: limit if limit > 0 else None]
    index, cls = selection.select_detections(boxes, scores, 0.2, 0.3, limit)
    assert list(zip(index.tolist(), cls.tolist())) == [(k, c) for _, k, c in survivors]


def test_max_detections_keeps_the_best_of_all_classes():
    everything, best = vote_masks(*make_candidates(), SIZE), vote_masks(*make_candidates(), SIZE, max_detections=4)
    assert len(everything) > 4
    assert torch.equal(best.scores, everything.scores[:4])
    assert torch.equal(best.pred_classes, everything.pred_classes[:4])
    assert len(best.pred_classes.unique()) > 1


@pytest.mark.parametrize("padding", [0, 1.2, math.inf])
@pytest.mark.parametrize("averaged", [1, 2000, 2**24])
@pytest.mark.parametrize("rendered", [1, 800])
def test_what_is_held_at_once_does_not_change_the_result(monkeypatch, padding, averaged, rendered):
    """24 voters of 5 x 5 cells in 22 x 30 pixels."""
    whole = vote_masks(*make_candidates(), SIZE)
    monkeypatch.setattr(mask_voting, "_MAX_PADDING", padding)
    monkeypatch.setattr(mask_voting, "_MAX_AVERAGED", averaged)
    monkeypatch.setattr(mask_voting, "_MAX_ELEMENTS", rendered)
    parts = vote_masks(*make_candidates(), SIZE)
    assert len(parts) > 4 and torch.equal(parts.pred_boxes.tensor, whole.pred_boxes.tensor)
    torch.testing.assert_close(parts.pred_masks, whole.pred_masks, rtol=0, atol=1e-6)


def test_groups_of_all_sizes_equal_the_slow_reference(monkeypatch):
    monkeypatch.setattr(mask_voting, "_MAX_PADDING", math.inf)
    boxes, scores, masks = make_candidates(36)
    boxes[::6] = torch.tensor([20.3, 1.2, 22.9, 4.1]) + boxes[::6].sub(boxes[::6].floor())  # a few pixels
    boxes[1::6] = torch.tensor([-3.0, -2.0, 33.0, 21.5]) + boxes[1::6].sub(boxes[1::6].floor())  # beyond the image
    sizes = [box[2] - box[0] for _, _, box, *_ in check_against_slow((boxes, scores, masks))]
    assert min(sizes) <= 4 and max(sizes) >= 20


@pytest.mark.usefixtures("either_way")
def test_a_detection_without_foreground_among_others_equals_the_slow_reference():
    boxes, scores, masks = make_candidates()
    masks[1::3] *= 0.2  # one of three clusters
    expected = check_against_slow((boxes, scores, masks))
    assert any(box == boxes[k].tolist() for *_, box, _, _ in expected for k in range(1, 24, 3))


@pytest.mark.cpu_only
def test_memory_of_a_large_photograph_is_bounded():
    """Objects over most of 8000 x 6000 pixels, one average is 183 MiB: voting takes less than 256 MiB."""
    size, count = (6000, 8000), 40
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([0.0, 0, 8000, 6000]) + 100 * torch.randn(count, 4, generator=generator)
    scores, masks = torch.rand(count, 2, generator=generator), torch.rand(count, 28, 28, generator=generator)
    calls = {"before": lambda: None, "call": lambda: vote_masks(boxes, scores, masks, size, max_detections=2)}
    peaks = peak_process_memory(calls)
    assert peaks["call"] - peaks["before"] < 256 * 2**20


@pytest.mark.usefixtures("either_way")
def test_at_a_threshold_of_0_all_pixels_belong_to_a_detection():
    boxes, scores, masks = make_candidates(3)
    result = vote_masks(boxes.clamp(6, 15), scores, masks, SIZE, mask_threshold=0.0)
    assert len(result) > 0
    assert result.pred_boxes.tensor.tolist() == [[0, 0, SIZE[1], SIZE[0]]] * len(result)


def test_order_of_candidates_does_not_matter():
    candidates = make_candidates()
    order = torch.randperm(len(candidates[0]), generator=torch.Generator().manual_seed(0))
    a, b = vote_masks(*candidates, SIZE), vote_masks(*(x[order] for x in candidates), SIZE)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    # The sums run in another order.
    torch.testing.assert_close(a.pred_masks, b.pred_masks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 5])
def test_nothing_above_the_score_threshold(count):
    boxes, scores, masks = make_candidates(count)
    result = vote_masks(boxes, scores, masks, SIZE, score_threshold=1.0)
    assert len(result) == 0
    assert result.pred_boxes.tensor.shape == (0, 4)
    assert result.pred_masks.shape == (0, 1, M, M)
    assert result.scores.shape == result.pred_classes.shape == (0,)


def single(box, mask, score=0.9):
    """One candidate of one class."""
    return torch.tensor([box], dtype=torch.float32), torch.tensor([[score]]), torch.tensor(mask)[None].float()


def test_weights_add_up_to_one():
    # Three equal boxes with equal masks but different scores: the result is the mask itself.
    box, mask = [4.0, 4.0, 14.0, 14.0], np.full((M, M), 0.45)
    boxes, _, masks = (x.repeat(3, *[1] * (x.dim() - 1)) for x in single(box, mask))
    result = vote_masks(boxes, torch.tensor([[0.1], [0.002], [0.3]]), masks, SIZE)
    torch.testing.assert_close(result.pred_masks, torch.full((1, 1, M, M), 0.45))


def test_voters_are_weighted_by_their_score_for_the_class_of_the_detection():
    boxes = torch.tensor([[4.0, 4.0, 14.0, 14.0]] * 2)
    scores = torch.tensor([[0.6, 0.1], [0.2, 0.3]])
    masks = torch.stack((torch.ones(M, M), torch.zeros(M, M)))
    result = vote_masks(boxes, scores, masks, SIZE)
    assert result.pred_classes.tolist() == [0, 1]
    means = result.pred_masks.mean(dim=(1, 2, 3))
    torch.testing.assert_close(means, torch.tensor([0.6 / 0.8, 0.1 / 0.4]))


def test_box_is_the_tight_box_of_the_mask():
    mask = np.zeros((M, M))
    mask[1:3, 2] = 1  # of 5 mask cells of 2 pixels each
    result = vote_masks(*single([4.0, 6.0, 14.0, 16.0], mask), SIZE, mask_threshold=0.5)
    # A pixel centre is a quarter or three quarters of the way between two cells: 0.75 and 0.25 beside 1, across the
    # two directions at most 0.75 * 0.75 = 0.56 in the cells that are 1, and 0.25 around them.
    assert result.pred_boxes.tensor.tolist() == [[8.0, 8.0, 10.0, 12.0]]


def test_with_class_boxes_the_box_is_the_mean_of_those_of_the_voters_for_the_class():
    candidates = boxes, scores, masks = make_candidates()
    generator = torch.Generator().manual_seed(1)
    class_boxes = boxes.repeat(1, CLASSES) + 4 * torch.randn(len(boxes), 4 * CLASSES, generator=generator)
    result = vote_masks(*candidates, SIZE, class_boxes=class_boxes, detection_box="regressed")
    tight = vote_masks(*candidates, SIZE)
    for i, (survivor, cls) in enumerate(zip(result.candidates.tolist(), result.pred_classes.tolist())):
        ious = [slow_iou(box, boxes[survivor].tolist()) for box in boxes.tolist()]
        voters = [k for k, iou in enumerate(ious) if iou >= 0.5 or k == survivor]
        total = sum(scores[k, cls].item() for k in voters)
        for side, limit in zip(range(4), (SIZE[1], SIZE[0]) * 2):
            mean = sum(scores[k, cls].item() * class_boxes[k, 4 * cls + side].item() for k in voters) / total
            # Coordinates up to 30 in float32.
            assert result.pred_boxes.tensor[i, side].item() == pytest.approx(min(max(mean, 0), limit), abs=1e-4)
    assert torch.equal(result.mask_boxes.tensor, tight.pred_boxes.tensor)
    for name in ("pred_masks", "scores", "pred_classes", "candidates"):
        assert torch.equal(result.get(name), tight.get(name))


def test_class_boxes_that_are_not_finite_leave_their_candidate_out():
    boxes, scores, masks = make_candidates()
    class_boxes = boxes.repeat(1, CLASSES)
    class_boxes[3, 5] = math.nan
    settings = {"class_boxes": class_boxes, "detection_box": "regressed", "nms_threshold": 1.0}
    assert 3 not in vote_masks(boxes, scores, masks, SIZE, **settings).candidates


def test_class_boxes_of_no_candidates():
    result = vote_masks(*make_candidates(0), SIZE, class_boxes=torch.zeros(0, 4 * CLASSES), detection_box="regressed")
    assert result.pred_boxes.tensor.shape == result.mask_boxes.tensor.shape == (0, 4)


@pytest.mark.usefixtures("either_way")
def test_box_stays_where_no_pixel_reaches_the_threshold():
    box = [4.25, 6.5, 14.0, 16.75]
    result = vote_masks(*single(box, np.full((M, M), 0.3)), SIZE)
    assert result.pred_boxes.tensor.tolist() == [box]
    torch.testing.assert_close(result.pred_masks.max(), torch.tensor(0.3))


@pytest.mark.usefixtures("either_way")
def test_box_without_area_is_a_detection_with_an_empty_mask():
    result = vote_masks(*single([4.0, 6.0, 4.0, 16.0], np.ones((M, M))), SIZE)
    assert len(result) == 1
    assert result.pred_masks.abs().sum() == 0 and result.pred_boxes.tensor.isfinite().all()


def test_a_pixel_belongs_to_a_box_if_its_centre_is_inside():
    result = vote_masks(*single([4.4, 6.6, 9.4, 12.5], np.ones((M, M))), SIZE)
    # Centres 4.5 to 8.5 and 7.5 to 11.5; 12.5 is the open end.
    assert result.pred_boxes.tensor.tolist() == [[4.0, 7.0, 9.0, 12.0]]


@pytest.mark.usefixtures("either_way")
def test_part_of_a_box_outside_the_image_is_cut_off_together_with_its_part_of_the_mask():
    mask = np.zeros((M, M))
    mask[:, 2:] = 1  # the left two mask cells, of 4 pixels each, and half the third lie outside
    result = vote_masks(*single([-10.0, 2.0, 10.0, 20.0], mask), SIZE)
    assert result.pred_boxes.tensor.tolist() == [[0.0, 2.0, 10.0, 20.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["box", "score"])
def test_candidates_that_are_not_finite_are_left_out(what, bad):
    boxes, scores, masks = make_candidates()
    expected = vote_masks(boxes[1:], scores[1:], masks[1:], SIZE)
    {"box": boxes, "score": scores}[what][0].view(-1)[0] = bad
    result = vote_masks(boxes, scores, masks, SIZE)
    assert torch.equal(result.scores, expected.scores)
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_autocast_changes_nothing():
    expected = vote_masks(*make_candidates(), SIZE)
    with torch.autocast(expected.scores.device.type, dtype=torch.bfloat16):
        result = vote_masks(*make_candidates(), SIZE)
    assert torch.equal(result.pred_masks, expected.pred_masks)
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_half_precision_candidates_give_float32_results():
    result = vote_masks(*(x.bfloat16() for x in make_candidates()), SIZE)
    assert result.scores.dtype == result.pred_masks.dtype == result.pred_boxes.tensor.dtype == torch.float32


def test_a_box_whose_area_is_not_finite_is_left_out():
    boxes, scores, masks = make_candidates()
    expected = vote_masks(boxes[1:], scores[1:], masks[1:], SIZE)
    boxes[0] = torch.tensor([-3e38, -3e38, 3e38, 3e38])
    assert torch.equal(vote_masks(boxes, scores, masks, SIZE).scores, expected.scores)


def test_a_negative_score_threshold_is_an_error():
    with pytest.raises(ValueError, match="score_threshold must be at least 0, got -1"):
        vote_masks(*make_candidates(), SIZE, score_threshold=-1)
