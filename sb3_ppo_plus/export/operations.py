"""Closed lists of operations that files without trust may have: those of PPOPlus's policies, and of common layers."""

# None of them has a graph inside
_ONNX = """
    Abs Add And ArgMax AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape
    Conv Cos CumSum Div Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mish Mod Mul Neg Not OneHot
    Or PRelu Pad Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Round ScatterElements
    ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh Tile
    Transpose Unsqueeze Where Xor
"""
ONNX_OPERATIONS = frozenset(_ONNX.split())
"""For .onnx files, with the names of ONNX's own domain."""

_ATEN = """
    __and__.Tensor __or__.Tensor _assert_tensor_metadata.default abs.default adaptive_avg_pool2d.default add.Scalar
    add.Tensor alias.default all.dim amax.default amin.default any.dim arange.default arange.start argmax.default
    avg_pool2d.default batch_norm.default bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bmm.default
    cat.default celu.default chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default
    clip.default clone.default contiguous.default conv1d.default conv2d.default conv2d.padding cos.default
    cumsum.default detach.default detach_.default div.Scalar div.Tensor dropout.default elu.default eq.Scalar
    eq.Tensor exp.default expand.default expm1.default flatten.using_ints flip.default full.default
    full_like.default gather.default ge.Scalar ge.Tensor gelu.default group_norm.default gru_cell.default gt.Scalar
    gt.Tensor hardtanh.default layer_norm.default le.Scalar le.Tensor leaky_relu.default lift_fresh_copy.default
    linear.default log.default log1p.default log_softmax.int logical_and.default logical_not.default
    logical_or.default lstm_cell.default lt.Scalar lt.Tensor masked_fill.Scalar matmul.default max_pool2d.default
    maximum.default mean.default mean.dim minimum.default mish.default movedim.int mul.Scalar mul.Tensor ne.Scalar
    ne.Tensor neg.default new_zeros.default one_hot.default ones_like.default pad.default permute.default
    pow.Tensor_Scalar reciprocal.default relu.default reshape.default round.default rsqrt.default rsub.Scalar
    scaled_dot_product_attention.default scatter.value select.int selu.default sigmoid.default sign.default
    silu.default sin.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default
    sqrt.default squeeze.dim stack.default sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int
    tanh.default to.dtype to.dtype_layout transpose.int unbind.int unflatten.int unfold.default unsafe_chunk.default
    unsqueeze.default view.default where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""
PT2_OPERATIONS = frozenset(f"torch.ops.aten.{name}" for name in _ATEN.split())
"""For .pt2 files."""
