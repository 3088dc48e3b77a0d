"""Why a site runs the way it does: every code that ``explain()`` prints, with its meaning."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "OK": "the candidate was verified and is in use",
    "ASSUMED": "meta tensors: no number was computed, the candidate is taken as verified",
    "FRAMEWORK": "the framework's own path is the choice at this site",
    "NOT_RUN": "the site has not run yet; a compiler would trace the framework's own path",
    "TRAINING": "training: convolution, then the fused batch-norm, add and activation",
    "TRAINING_UNFUSED": "training where no fused batch-norm runs: the framework's own ops",
    "GRAD": "gradients are recorded in eval(); run under torch.inference_mode() to fuse",
    "HOOKED": "a module of the site has hooks, which a fused call would skip",
    "REPLACED": "the block's activation or shortcut is another module than the site stands for",
    "UNKNOWN_CONV": "the convolution is not a plain torch.nn convolution",
    "UNKNOWN_NORM": "the norm is not a batch norm with the framework's own forward",
    "PADDING_MODE": "the convolution pads with something else than zeros",
    "BATCH_STATS": "the norm uses batch statistics in eval()",
    "ONNX": "exported to ONNX, which knows the framework's operators alone",
    "TRANSFORMED": "a tensor subclass, a functorch transform or a forward-mode tangent",
    "DTYPE_MIX": "input and weight differ in dtype outside autocast, or the dtype has no plan",
    "DEVICE_MIX": "input and parameters are on different devices",
    "SHAPE_MIX": "the input's rank or channels are not the convolution's",
    "RESIDUAL_SHAPE": "the residual broadcasts, it is not of the output's shape",
    "NO_CANDIDATE": "no fused candidate accepts this site",
    "SLOWER": "the layers one by one are faster here, by this device's own measurement",
    "MISMATCH": "a candidate left the error budget here and was rolled back",
}
