"""Why a site runs the way it does: every code that ``explain()`` prints, with its meaning."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "OK": "the candidate was verified and is in use",
    "FRAMEWORK": "the framework's own path is the choice at this site",
    "NOT_RUN": "the site has not run yet, so nothing has been planned for it",
    "TRAINING": "training: convolution, then the fused batch-norm, add and activation",
    "GRAD": "gradients are recorded in eval(); run under torch.inference_mode() to fuse",
    "HOOKED": "the convolution or the norm has hooks, which a fused call would skip",
    "UNKNOWN_CONV": "the convolution is not a plain torch.nn convolution",
    "UNKNOWN_NORM": "the norm is not a batch norm with the framework's own forward",
    "PADDING_MODE": "the convolution pads with something else than zeros",
    "BATCH_STATS": "the norm uses batch statistics in eval()",
    "DTYPE_MIX": "input and weight differ in dtype outside autocast",
    "RESIDUAL_SHAPE": "the residual broadcasts, it is not of the output's shape",
    "NO_CANDIDATE": "no fused candidate accepts this site",
    "UNVERIFIED": "traced before it was planned: run one forward first to fuse under a compiler",
    "MISMATCH": "a candidate left the error budget here and was rolled back",
}
