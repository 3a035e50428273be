"""The matchers of torchcfm, for loops that compute their own loss from (t, x_t, u_t), and its sampler of optimal pairs.

::

    from fm_fast.compat.torchcfm.conditional_flow_matching import ConditionalFlowMatcher  # was: from torchcfm.…

A seed of torch's generator gives torchcfm's numbers, up to rounding, on the CPU. On purpose it differs in this:

* Without a width, sigma = 0, no noise is drawn: most of the time that a step of torchcfm takes. The generator then goes on earlier.
* Times are drawn on the device of x0; torchcfm draws them on the CPU and waits for the copy.
* ``TargetConditionalFlowMatcher`` and ``SchrodingerBridgeConditionalFlowMatcher`` take u_t from the noise that they drew. torchcfm divides
  it out of x_t, and what is left of it in 16 bits, or near the ends, is often not finite.
* Optimal pairs are an assignment (:mod:`fm_fast.couplings`): each sample once, instead of draws with replacement from the plan, which
  ``OTPlanSampler`` makes in ``sample_map``, where ``replace=True`` asks for them, and from the plan of a subclass with a ``get_map`` of its
  own, by torch's generator instead of NumPy's.
* Shapes, dtypes and devices of x0 and x1, and t, are checked. x_t and u_t have the dtype of x0, whatever that of t.

Entropic, unbalanced and partial plans are not covered, nor are the models, the data sets and the plots; ``optimal_transport.wasserstein``
is exact, of batches of one size. A sampler of torchcfm's own may be put in the place of a matcher's ``ot_sampler``.
:func:`fm_fast.flow_matching_loss` fuses noise, point, target and loss, which separate tensors cannot.
"""

from fm_fast.compat.torchcfm import conditional_flow_matching, optimal_transport, utils
from fm_fast.compat.torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
    pad_t_like_x,
)
from fm_fast.compat.torchcfm.optimal_transport import OTPlanSampler

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "OTPlanSampler",
    "SchrodingerBridgeConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "conditional_flow_matching",
    "optimal_transport",
    "pad_t_like_x",
    "utils",
]
