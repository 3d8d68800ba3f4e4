"""The weight perturbations of the literature: choices of ball, ascent, scale and rules."""
