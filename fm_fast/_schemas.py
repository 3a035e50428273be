"""The arguments of every op. Also setup.py reads this file, by itself: a native library records for which arguments it was built."""

import hashlib

SCHEMAS = {
    "noise": "(Tensor(a!) out, Tensor key, int kind, int stream, int index) -> ()",
    "path_sample": (
        "(Tensor(a!) x_t, Tensor(b!) t, Tensor(c!) coef, Tensor x1, Tensor x0, Tensor key, int path, float path_a, float path_b, "
        "int objective, int t_sampler, float t_mean, float t_std, float t_min, float t_max, float flip, float levels, "
        "bool dequantise) -> ()"
    ),
    "path_loss": (
        "(Tensor(a!) loss, Tensor(b!) grad, Tensor o, Tensor x1, Tensor x0, Tensor key, Tensor coef, Tensor weight, int reduction, "
        "float flip, float levels, bool dequantise, Tensor? x_t=None) -> ()"
    ),
    "path_loss_backward": (
        "(Tensor(a!) grad, Tensor o, Tensor x1, Tensor x0, Tensor key, Tensor coef, Tensor weight, Tensor grad_output, int reduction, "
        "float flip, float levels, bool dequantise, bool finished=False) -> ()"
    ),
    "linear_step": (
        "(Tensor(a!) out, Tensor(b!) copy, Tensor x, Tensor[] k, Tensor table, int row, float guidance, Tensor(c!)? kept=None) -> ()"
    ),
    "step_error": "(Tensor(a!) means, Tensor y, Tensor end, Tensor[] k, Tensor coefficients, float rtol, float atol) -> ()",
    "step_control": (
        "(Tensor(a!) numbers, Tensor(b!) counts, Tensor(c!) totals, Tensor(d!) accepted, Tensor(e!) times, Tensor(f!) factors, "
        "Tensor means, Tensor stops, Tensor nodes, int order, int evaluations) -> ()"
    ),
    "probe": "(Tensor(a!) out, Tensor key, Tensor codes, Tensor rows, int index, int first, int share) -> ()",
    "divergence_step": (
        "(Tensor(a!) sums, Tensor(b!) dots, Tensor g, Tensor key, Tensor codes, Tensor rows, int kind, int index, int first, int share, "
        "int groups, float bias, float factor) -> ()"
    ),
    "adamw_ema_norm": "(Tensor(a!) total, Tensor[] g) -> ()",
    "adamw_ema": (
        "(Tensor(a!)[] p, Tensor(b!)[] copies, Tensor(c!) m, Tensor(d!) v, Tensor(e!) averages, Tensor(f!) counts, Tensor[] g, "
        "Tensor layout, Tensor total, Tensor settings, Tensor decays) -> ()"
    ),
    "group_norm_silu": (
        "(Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor x, Tensor second, Tensor embedding, Tensor weight, Tensor bias, "
        "Tensor scale, Tensor shift, Tensor key, int groups, float eps, bool activation, float dropout, int index) -> ()"
    ),
    "group_norm_silu_backward": (
        "(Tensor(a!) grad_x, Tensor(b!) grad_second, Tensor(c!) grad_embedding, Tensor(d!) grad_weight, Tensor(e!) grad_bias, "
        "Tensor(f!) grad_scale, Tensor(g!) grad_shift, Tensor grad_y, Tensor x, Tensor second, Tensor embedding, Tensor weight, "
        "Tensor bias, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor key, int groups, bool activation, float dropout, "
        "int index) -> ()"
    ),
    "attention": "(Tensor(a!) out, Tensor(b!) log_sums, Tensor joint) -> ()",
    "attention_backward": "(Tensor(a!) grad_joint, Tensor grad_out, Tensor joint, Tensor out, Tensor log_sums) -> ()",
    "assignment": "(Tensor(a!) columns, Tensor costs, Tensor guess) -> ()",
    "conv3x3": "(Tensor(a!) y, Tensor x, Tensor weight, Tensor bias, bool transposed) -> ()",
    "conv_weight_grad": "(Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor grad_y, Tensor x) -> ()",
}


def digest() -> str:
    """Of all schemas: what a library must have been built for to be called by them."""
    return hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:16]
