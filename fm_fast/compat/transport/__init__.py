"""The transport of SiT (Scalable Interpolant Transformers): its training loss by the fused kernels, its ODE and SDE samplers, likelihoods.

::

    from fm_fast.compat.transport import Sampler, create_transport  # was: from transport import …

Models are called ``model(x, t, **model_kwargs)`` with t [B], in float32, as everywhere in fm_fast. On purpose it differs in this:

* ``training_losses`` draws its noise in the kernel, from a seed of torch's generator: other numbers than SiT's, and repeatable alike.
* A name that there is not is an error, where SiT takes the velocity or no weight in silence; so is a ``loss_weight`` of the velocity, which
  has none. ``train_eps`` and ``sample_eps`` are followed where they are given, each with a default of its own.
* ``diffusion_form="SBDM"`` needs a ``sample_eps`` on the linear and the GVP path, where its diffusion is infinite at t = 0.
* Likelihoods hold their probe for an adaptive solve, draw it afresh at every evaluation of fixed steps, and call the model once for both
  the velocity and its divergence. log p is float64.
* 16-bit states are float32 between evaluations.

The methods of ``sample_ode`` are those of :mod:`fm_fast.compat.torchdiffeq`. :func:`fm_fast.flow_matching_loss`, :func:`fm_fast.sample` and
:func:`fm_fast.log_likelihood` are what it is made of, and have more.
"""

from fm_fast.compat.transport import path, transport
from fm_fast.compat.transport.transport import ModelType, PathType, Sampler, Transport, WeightType, create_transport

__all__ = ["ModelType", "PathType", "Sampler", "Transport", "WeightType", "create_transport", "path", "transport"]
