"""The transport of SiT (Scalable Interpolant Transformers): its training loss by the fused kernels, its ODE and SDE samplers, likelihoods.

::

    from fm_fast.compat.transport import Sampler, create_transport  # was: from transport import …

Models are called ``model(x, t, **model_kwargs)`` with t [B], float32 (float64 for float64 data), as everywhere in fm_fast. On purpose it
differs in this:

* ``training_losses`` draws its noise in the kernel, from a seed of torch's generator: other numbers than SiT's, and repeatable alike. The
  noise of ``sample_sde`` is drawn on x's device; from a seed it is SiT's on the CPU but for float64.
* A name that there is not is an error, where SiT takes the velocity or no weight in silence; so is a ``loss_weight`` of the velocity, which
  has none. ``train_eps`` and ``sample_eps`` have defaults of their own; as in SiT neither keeps the times of a velocity on the linear or
  the GVP path away from the ends, but for ``sample_eps`` in an SDE.
* ``diffusion_form="SBDM"`` needs a ``sample_eps`` on these paths, where its diffusion is infinite at t = 0. Models are never asked where
  the velocity, or in an SDE the score, has no finite value, but 1e-5 away.
* Likelihoods hold their probe for an adaptive solve, draw it afresh at every evaluation of fixed steps, and call the model once for both
  the velocity and its divergence. log p is float64 and without a gradient.
* Losses and samplers know a plan by its ``path`` alone (``alpha``, ``sigma`` and their derivatives): a plan of one's own has another
  ``path``. Other methods that a subclass of a plan has of its own, and a ``get_drift`` or ``get_score``, are not called by them.
* Samples of an ODE that are not finite are an error. Outputs of another shape than x are one everywhere.
* 16-bit states are float32 between evaluations.

Gradients of an ODE are recorded where they are enabled, as there: sampling belongs under ``torch.no_grad()``, where it is fused. The
methods of ``sample_ode`` are those of :mod:`fm_fast.compat.torchdiffeq`. Not there: the modules ``integrators`` and ``utils``.
:func:`fm_fast.flow_matching_loss`, :func:`fm_fast.sample` and :func:`fm_fast.log_likelihood` are what it is made of, and have more.
"""

from fm_fast.compat.transport import path, transport
from fm_fast.compat.transport.transport import ModelType, PathType, Sampler, Transport, WeightType, create_transport

__all__ = ["ModelType", "PathType", "Sampler", "Transport", "WeightType", "create_transport", "path", "transport"]
