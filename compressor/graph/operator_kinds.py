"""What torch's operators do to channels, by their names; those that have a rule of their own are in propagation.py."""

from __future__ import annotations

MOVES = frozenset((
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "expand", "expand_as", "slice", "select",
    "unsqueeze", "squeeze", "flatten", "unflatten", "split", "split_with_sizes", "chunk", "unbind", "narrow",
    "roll", "flip", "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "unfold", "movedim",
    "swapaxes", "diagonal", "channel_shuffle", "index_select", "tile", "alias", "squeeze_", "view_as", "detach",
))  # fmt: skip
"""What moves entries to other places."""

POINTWISE = frozenset((
    "hardswish", "dropout", "to", "_to_copy", "contiguous", "clone", "masked_fill", "where", "relu6", "type_as",
    "lift_fresh_copy", "feature_dropout", "alpha_dropout", "fill", "bernoulli",
))  # fmt: skip
"""Of each entry by itself, beside what torch marks so."""

POOLS = frozenset((
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
    "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d",
    "upsample_bicubic2d",
))  # fmt: skip
"""Over places, each channel by itself."""

MEANS = frozenset((
    "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "linalg_vector_norm", "softmax",
    "_softmax", "log_softmax", "_log_softmax", "cumsum", "argmax", "argmin", "logsumexp", "var_mean", "all",
    "any", "sort", "topk",
))  # fmt: skip
"""Over an axis: what is left of it, or each entry by all of it (softmax, cumsum)."""

FILLS = frozenset((
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_ones", "new_zeros", "new_full",
))  # fmt: skip
"""All of one value."""

NO_CHANNELS = FILLS | frozenset((
    "arange", "empty", "scalar_tensor", "rand_like", "randn_like", "sym_size", "_assert_tensor_metadata",
))  # fmt: skip
"""What they give has no channels of a weight."""
