"""How a solve runs: settings -> plan (times and coefficients on the host) -> loop or adaptive -> the field, with divergences along.

Samples           sampler.py
The arguments     settings.py (checked), conditioning.py (what they do to errors)
The network       field.py, guidance.py, evaluate.py, learned.py (with a path's own parameters), recording.py (for products J^T z)
Fixed steps       plan.py, loop.py, state.py, history.py (of outputs), churn.py (noise on the way), trajectory.py, progress.py
Adaptive steps    rules.py, derivative.py, arithmetic.py, first_step.py; of the whole batch: adaptive.py, trial.py; of each sample's own:
                  per_sample.py, trials.py, steps.py, saved.py
Likelihoods       integrate.py, estimator.py, probes.py, prior.py
Without a path    ode.py
"""
