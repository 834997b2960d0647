"""The arithmetic of RoI warp and its max pooling: the largest of several weighted sums of feature vectors."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

# Bytes of one intermediate result. On a CPU the samples of a chunk are still in the cache when their maximum is taken,
# which is what makes the fused form fast; a GPU only has to be kept busy, within bounds of its memory.
_CHUNK_BYTES_CPU = 2 * 2**20
_CHUNK_BYTES_GPU = 64 * 2**20


@torch.library.custom_op(
    "mnc_d2::bag_max", mutates_args=(), schema="(Tensor[] features, Tensor index, Tensor weight) -> Tensor"
)
def bag_max(features: Sequence[torch.Tensor], index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``out[r, b, c] = max over p of (sum over t of weight[r, b, p, t] * table[index[r, b, p, t], c])``.

    The rows of ``table`` are the pixels of all feature maps: map after map, in each image after image, and row by row.
    A sum is an embedding bag with per-sample weights, which PyTorch has fast on every device.

    Chunk after chunk of the boxes, so that neither the samples nor what backward needs of them is ever held for all
    boxes: backward samples again instead, which is a small part of its time. One operator of its own, so that
    torch.compile and torch.export need not unroll the chunks.

    Args:
        features: one (N, C, H_l, W_l) per map l, all of one floating-point dtype. Those of half precision are summed
            in float32.
        index: (R, B, P, T), int64, rows of the table; it must be valid.
        weight: (R, B, P, T), float64 for float64 features, else float32.

    Returns:
        (R, B, C), dtype of ``features``. The gradients to ``features`` and ``weight`` are exact; where several of the
        sums are the largest the first takes the gradient, as in PyTorch's max pooling.
    """
    table = _make_table(features, weight.dtype)
    result = features[0].new_empty(*index.shape[:2], table.shape[1])
    # As 32-bit integers, which are enough for any number of pixels, the copy is half as large.
    index, weight = _by_sample(index.int()), _by_sample(weight)
    for chunk in _chunks(result.shape, table):
        result[chunk] = _largest(_sample(table, index[:, chunk], weight[:, chunk])).view_as(result[chunk])
    return result


@bag_max.register_fake
def _(features, index, weight):
    return features[0].new_empty(index.shape[0], index.shape[1], features[0].shape[1])


@torch.library.custom_op(
    "mnc_d2::bag_max_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor[] features, Tensor index, Tensor weight, bool[2] needed) -> (Tensor, Tensor)",
)
def bag_max_backward(
    gradient: torch.Tensor,
    features: Sequence[torch.Tensor],
    index: torch.Tensor,
    weight: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`bag_max` to its table and to ``weight``.

    Args:
        gradient: (R, B, C), any strides, that of the result.
        features, index, weight: those of the forward pass.
        needed: for the table and for the weight, whether to compute the gradient.

    Returns:
        (rows, C) and (R, B, P, T), dtype of ``weight``; no elements where not needed.
    """
    table = _make_table(features, weight.dtype)
    table_gradient = torch.zeros_like(table if needed[0] else table[:0])
    weight_gradient = torch.empty_like(weight if needed[1] else weight[:0])
    index, weight = _by_sample(index), _by_sample(weight)
    for chunk in _chunks(gradient.shape, table):
        chunk_index, chunk_weight = index[:, chunk], weight[:, chunk]
        # The samples are in the order (p, r, b): (P * n, C).
        routed = _route_to_largest(gradient[chunk].flatten(0, 1).to(table), table, chunk_index, chunk_weight)
        if needed[0]:
            _add_table_gradient(table_gradient, routed, chunk_index.flatten(0, 2), chunk_weight.flatten(0, 2))
        if needed[1]:
            products = _weight_gradient(routed, table, chunk_index.flatten(0, 2))
            weight_gradient[chunk] = products.view_as(chunk_index).permute(1, 2, 0, 3)
    return table_gradient, weight_gradient


@bag_max_backward.register_fake
def _(gradient, features, index, weight, needed):
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features) if needed[0] else 0
    return weight.new_empty(rows, features[0].shape[1]), torch.empty_like(weight if needed[1] else weight[:0])


def _setup_context(ctx, inputs, output):
    features, index, weight = inputs
    ctx.save_for_backward(index, weight, *features)


def _backward(ctx, gradient):
    index, weight, *features = ctx.saved_tensors
    needed = [any(ctx.needs_input_grad[0]), ctx.needs_input_grad[2]]
    table_gradient, weight_gradient = bag_max_backward(gradient, features, index, weight, needed)
    feature_gradients = [None] * len(features)
    if needed[0]:
        sizes = [x.shape[0] * x.shape[2] * x.shape[3] for x in features]
        feature_gradients = [
            rows.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2).to(x.dtype)
            for rows, x in zip(table_gradient.split(sizes), features)
        ]
    return feature_gradients, None, weight_gradient if needed[1] else None


bag_max.register_autograd(_backward, setup_context=_setup_context)


class _PassGradientToWeight(torch.autograd.Function):
    """Identity of a result of :func:`bag_max` that had no gradient to its weight; this one has."""

    @staticmethod
    def forward(ctx, result, index, weight, *features):
        ctx.save_for_backward(index, weight, *features)
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient):
        index, weight, *features = ctx.saved_tensors
        _, weight_gradient = bag_max_backward(gradient, features, index, weight, [False, True])
        return gradient, None, weight_gradient, *([None] * len(features))


def pass_gradient_to_weight(
    result: torch.Tensor, features: Sequence[torch.Tensor], index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return what ``bag_max(features, index, weight)`` returns, from ``result``, the same with the weight detached.

    So the sums are computed once where some of what uses them is not to pass gradients to the weight.
    """
    return _PassGradientToWeight.apply(result, index, weight, *(x.detach() for x in features))


def _make_table(features: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All pixels of all maps: (rows, C), contiguous; without a copy for a single channels_last map of this dtype."""
    pixels = [x.permute(0, 2, 3, 1) for x in features]
    channels = features[0].shape[1]
    if len(pixels) == 1 and pixels[0].dtype == dtype and pixels[0].is_contiguous():
        return pixels[0].view(-1, channels)
    sizes = [x.shape[0] * x.shape[1] * x.shape[2] for x in pixels]
    table = torch.empty(sum(sizes), channels, dtype=dtype, device=pixels[0].device)
    for x, rows in zip(pixels, table.split(sizes)):
        rows.view_as(x).copy_(x)
    return table


def _by_sample(x: torch.Tensor) -> torch.Tensor:
    """(R, B, P, T) as (P, R, B, T), contiguous: what belongs to one sample of some boxes lies side by side."""
    return x.permute(2, 0, 1, 3).contiguous()


def _chunks(shape: torch.Size, table: torch.Tensor) -> list[slice]:
    """Cut the boxes into runs of which a result of this shape, (R, B, C), has about the size of a chunk."""
    chunk_bytes = _CHUNK_BYTES_CPU if table.device.type == "cpu" else _CHUNK_BYTES_GPU
    step = max(1, chunk_bytes // max(1, shape[1] * shape[2] * table.element_size()))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _sample(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The P weighted sums of index and weight (P, r, b, T), one after another: each (r * b, C)."""
    for i, w in zip(index, weight):
        yield F.embedding_bag(i.flatten(0, 1), table, per_sample_weights=w.flatten(0, 1), mode="sum")


def _largest(samples: Iterator[torch.Tensor]) -> torch.Tensor:
    """The maximum, element by element, of tensors of one shape, in the memory of the first."""
    best = next(samples)
    for others in samples:
        torch.maximum(best, others, out=best)
    return best


def _route_to_largest(
    gradient: torch.Tensor, table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Give the gradient (n, C) of a maximum to the first of the P samples that attain it: (P * n, C), 0 elsewhere.

    Index and weight are those of :func:`_sample`.
    """
    if len(index) == 1:
        return gradient.contiguous()
    # For each sample but the first, 1 where it is larger than all before it: a factor, in place of which the gradient
    # is written. Factors are many times faster on a CPU than masks of bool.
    routed = gradient.new_empty(len(index), *gradient.shape)
    samples = _sample(table, index, weight)
    best = next(samples)
    for others, larger in zip(samples, routed[1:]):
        torch.gt(others, best, out=larger)
        torch.maximum(best, others, out=best)
    rest = gradient
    for p in range(len(routed) - 1, 0, -1):
        routed[p] *= rest
        rest = torch.sub(rest, routed[p], out=routed[0])
    return routed.flatten(0, 1)


def _add_table_gradient(
    table_gradient: torch.Tensor, gradient: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> None:
    """Add what the weighted sums of index and weight (n, T) pass back of their gradient (n, C) to that of the table.

    This is the sum the other way round: a row of the table is given the weighted sum of the gradients of the samples
    that it is part of, another embedding bag. No atomic additions, hence the same result on every run.
    """
    sorted_index, order = index.flatten().sort(stable=True)
    # Only the rows that occur; how many these are would have to be read back from a GPU, where it is all rows instead.
    rows, offsets = (
        _occurring_rows(sorted_index) if index.device.type == "cpu" else _all_rows(sorted_index, len(table_gradient))
    )
    sums = F.embedding_bag(
        order // index.shape[1], gradient, offsets, per_sample_weights=weight.flatten()[order], mode="sum"
    )
    table_gradient.index_add_(0, rows, sums)


def _occurring_rows(sorted_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different values of a sorted index, and the position of the first of each."""
    rows, counts = sorted_index.unique_consecutive(return_counts=True)
    return rows, counts.cumsum(0) - counts


def _all_rows(sorted_index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers below ``count``, and the position in a sorted index of the first that is not smaller than each."""
    rows = torch.arange(count, device=sorted_index.device)
    return rows, torch.searchsorted(sorted_index, rows)


def _weight_gradient(gradient: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gradient of the weights of weighted sums over ``index`` (n, T), given that of the sums (n, C): (n, T)."""
    samples, terms = index.shape
    of_sample = torch.arange(samples, device=index.device)
    # The derivative that autograd takes of F.embedding_bag; an operator's own backward pass is out of autograd's reach.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient, table, index.flatten(), of_sample * terms, of_sample.repeat_interleave(terms), mode=0
    )
    return products.view(samples, terms)
