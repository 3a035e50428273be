"""How a solve runs: plan (times and coefficients on the host) -> loop or adaptive -> evaluate the field, with divergences along."""
