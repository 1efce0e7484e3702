"""``OP_RULES``: how each ATen operation carries channels. One line per operation; none is skipped silently.

A rule takes the bookkeeping and a :class:`Call` and returns the traveller(s) of the result. It couples, pins
or reads the lanes it meets. An operation without a rule pins every channel it touches, with its name and the
module's, so that nothing is removed there: refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels
from bshub.graph.rules_axes import along, group_norm, layer_norm, reduction, spatial
from bshub.graph.rules_elementwise import (
    copy_,
    divide,
    elementwise,
    gate,
    like,
    plain,
    same,
    shifted,
)
from bshub.graph.rules_mixing import addmm, batch_norm, convolution, linear, matmul
from bshub.graph.rules_shape import (
    cat,
    expand,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    select,
    slice_,
    split,
    squeeze,
    stack,
    transpose,
    unbind,
    unsqueeze,
    view,
)

Rule = Callable[[Channels, Call], Result]


add = partial(elementwise, combine="add")
multiply = partial(elementwise, combine="multiply")
unknown = partial(elementwise, combine="unknown")

OP_RULES: dict[str, Rule] = {
    # mixing: the channels of one axis become new ones
    "convolution": convolution,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "cudnn_batch_norm": batch_norm,
    "_batch_norm_with_update": batch_norm,
    "addmm": addmm,
    "mm": matmul,
    "bmm": matmul,
    "linear": linear,
    # element by element over several tensors
    "_prelu_kernel": multiply,
    "prelu": multiply,
    "add": add,
    "sub": add,
    "rsub": add,
    "maximum": add,
    "minimum": add,
    "mul": multiply,
    "div": divide,
    "where": unknown,
    "pow": unknown,
    # element by element, f(0) = 0
    "relu": same,
    "relu6": same,
    "hardtanh": same,
    "silu": same,
    "gelu": same,
    "hardswish": same,
    "mish": same,
    "leaky_relu": same,
    "elu": same,
    "tanh": same,
    "sqrt": same,
    "abs": same,
    "neg": same,
    "clone": same,
    "copy": copy_,
    "detach": same,
    "alias": same,
    "lift_fresh": same,
    "_to_copy": same,
    "contiguous": same,
    "native_dropout": lambda channels, call: call.first(same(channels, call)),
    "bernoulli": same,
    # new tensors
    "empty_like": like,
    "zeros_like": like,
    "ones_like": like,
    "rand_like": like,
    "randn_like": like,
    "empty": plain,
    "new_empty": plain,
    "new_zeros": plain,
    "new_ones": plain,
    "new_full": plain,
    "zeros": plain,
    "ones": plain,
    "full": plain,
    "arange": plain,
    # element by element, f(0) ≠ 0
    "sigmoid": gate,
    "hardsigmoid": gate,
    "softplus": shifted,
    "exp": shifted,
    "clamp": shifted,
    "clamp_min": shifted,
    "rsqrt": shifted,
    "reciprocal": shifted,
    # space only
    "max_pool2d_with_indices": spatial,
    "avg_pool2d": spatial,
    "_adaptive_avg_pool2d": spatial,
    "adaptive_max_pool2d": spatial,
    "constant_pad_nd": spatial,
    "reflection_pad2d": spatial,
    "replication_pad2d": spatial,
    "upsample_nearest2d": spatial,
    "_upsample_nearest_exact2d": spatial,
    "upsample_bilinear2d": spatial,
    "upsample_bicubic2d": spatial,
    "_upsample_bilinear2d_aa": spatial,
    "_upsample_bicubic2d_aa": spatial,
    # over an axis
    "mean": reduction,
    "sum": reduction,
    "amax": reduction,
    "amin": reduction,
    "var": reduction,
    "var_mean": reduction,
    "max": reduction,
    "_softmax": along,
    "_log_softmax": along,
    "cumsum": along,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    # moving positions
    "view": view,
    "_unsafe_view": view,
    "reshape": view,
    "permute": permute,
    "transpose": transpose,
    "t": transpose,
    "expand": expand,
    "repeat": repeat,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "cat": cat,
    "stack": stack,
    "split": split,
    "split_with_sizes": split,
    "unbind": unbind,
    "slice": slice_,
    "select": select,
}
